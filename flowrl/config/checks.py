"""Rules for one value. Each raises ValueError that names field, value and rule."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


def check_at_least(name: str, value: float, least: float) -> None:
    if value < least:
        raise ValueError(f"{name}: {value}; must be at least {least}")


def check_one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value in allowed:
        return
    near = difflib.get_close_matches(value, allowed, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise ValueError(f"{name}: {value!r}; must be one of {', '.join(allowed)}{hint}")


def check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name}: {value}; must be above 0")


def check_dotted(name: str, value: str) -> None:
    module, _, attribute = value.rpartition(":")
    if not module or not attribute.isidentifier():
        raise ValueError(f"{name}: {value!r}; must read 'file.py:name' or 'package.module:name'")
