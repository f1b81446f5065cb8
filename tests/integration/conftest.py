"""Removes the session roots that the tests of this folder made; what is in them by then the tests have looked at."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from tests.integration.runs import SESSIONS


@pytest.fixture(scope="session", autouse=True)
def session_roots() -> Iterator[None]:
    yield
    shutil.rmtree(SESSIONS, ignore_errors=True)
