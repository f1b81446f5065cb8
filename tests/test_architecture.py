"""The rules of docs/architecture.md that a machine can hold."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LEVEL = {"transfer_queue": 0, "controllers": 1, "flowrl": 2}
DISTRIBUTED_LIVES_IN = ("flowrl/trainer/", "flowrl/weights/", "controllers/peers.py")
QUEUE_MAY_IMPORT = {"numpy", "zmq", "msgspec"}


def sources() -> Iterator[Path]:
    for package in LEVEL:
        yield from sorted((ROOT / package).rglob("*.py"))


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def label(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", list(sources()), ids=label)
def test_imports_go_down_only(path: Path) -> None:
    level = LEVEL[path.relative_to(ROOT).parts[0]]
    above = {name for name in imported(path) if LEVEL.get(name.split(".")[0], -1) > level}
    assert not above, f"{label(path)} imports {sorted(above)} from above"


@pytest.mark.parametrize("path", list(sources()), ids=label)
def test_torch_distributed_stays_in_its_rooms(path: Path) -> None:
    uses = any(name.startswith("torch.distributed") for name in imported(path))
    assert not uses or label(path).startswith(DISTRIBUTED_LIVES_IN)


@pytest.mark.parametrize("path", list(sources()), ids=label)
def test_nothing_pickles(path: Path) -> None:
    assert not {"pickle", "cloudpickle", "dill"} & {name.split(".")[0] for name in imported(path)}


def test_the_queue_stands_on_three_libraries() -> None:
    import sys

    for path in (ROOT / "transfer_queue").rglob("*.py"):
        outside = {name.split(".")[0] for name in imported(path)} - {"transfer_queue"} - set(sys.stdlib_module_names)
        assert outside <= QUEUE_MAY_IMPORT, f"{label(path)} imports {sorted(outside - QUEUE_MAY_IMPORT)}"


def test_files_stay_readable() -> None:
    long = {label(path): lines for path in sources() if (lines := path.read_text().count("\n")) > 400}
    assert not long


def test_the_light_half_imports_no_torch() -> None:
    """A recipe is checked, drawn and placed before anything heavy is loaded."""
    import subprocess
    import sys

    program = "import sys; import flowrl.pipeline, flowrl.cli.run, flowrl.cli.graph; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0, done.stderr
