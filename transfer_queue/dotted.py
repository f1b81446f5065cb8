"""Names that stand for code: `package.module:name`, or `file.py:name` relative to the current directory."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any


def load_attribute(path: str) -> Any:
    """Raises ValueError that names the path and what is wrong with it."""
    module_name, _, attribute = path.rpartition(":")
    if not module_name or not attribute:
        raise ValueError(f"{path!r}: must read 'file.py:name' or 'package.module:name'")
    module = _from_file(path, Path(module_name)) if module_name.endswith(".py") else _from_package(path, module_name)
    try:
        return getattr(module, attribute)
    except AttributeError:
        raise ValueError(f"{path!r}: {module_name} has no {attribute!r}") from None


def _from_package(path: str, module_name: str) -> Any:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise
        raise ValueError(f"{path!r}: no module named {error.name!r}") from None


def _from_file(path: str, file: Path) -> Any:
    if not file.is_file():
        raise ValueError(f"{path!r}: no such file as {str(file.resolve())!r}")
    name = f"user_file_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None, f"{file} ends in .py"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
