"""Stands in for Triton on a machine without a GPU: kernels can be defined and decorated, none can be launched.

SGLang and torch import Triton at module level for kernels that a CPU never runs. Every submodule exists here and every
name can be fetched: a capitalised one is a class (it can be subclassed, constructed and caught), any other is a module
that can be used as a decorator.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Iterator, Sequence
from typing import Any

__version__ = "3.0.0"


class _Placeholder(Exception):
    """What every class of Triton is here; an exception, because some of them are named in `except` clauses."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args)


class _Stub(types.ModuleType):
    """A module all of whose names exist, and an empty collection. Called with one function, it hands it back; otherwise
    it is a decorator."""

    def __getattr__(self, name: str) -> Any:
        return _attribute(self.__name__, name)

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and callable(args[0]) and not kwargs:
            return args[0]
        return lambda function: function


class _StubFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Answers imports of `triton.<anything>`."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not name.startswith(f"{__name__}."):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Stub(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        return None


def _attribute(owner: str, name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(f"module {owner!r} has no attribute {name!r}")
    if name[0].isupper():
        value: Any = type(name, (_Placeholder,), {"__module__": owner})
    elif name == "constexpr":
        value = type(name, (), {"__init__": lambda self, value=None: setattr(self, "value", value)})
    else:
        return importlib.import_module(f"{owner}.{name}")
    setattr(sys.modules[owner], name, value)
    return value


def __getattr__(name: str) -> Any:
    return _attribute(__name__, name)


def cdiv(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)


def next_power_of_2(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


sys.meta_path.append(_StubFinder())
