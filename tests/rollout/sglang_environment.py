"""Where the tests' SGLang is: in an environment of its own, made by `tests/sglang_cpu/install.sh`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

PYTHON = Path(__file__).resolve().parents[2] / ".venv-sglang" / "bin" / "python"


def sglang_python() -> Path:
    """Skips the test where there is none; fails it where FLOWRL_REQUIRE_SGLANG=1 says that there must be."""
    if not PYTHON.exists():
        reason = f"{PYTHON} is not there; tests/sglang_cpu/install.sh makes it"
        if os.environ.get("FLOWRL_REQUIRE_SGLANG") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return PYTHON
