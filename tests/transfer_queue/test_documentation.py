"""What docs/transfer_queue.md shows works as it is printed there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from transfer_queue.cli import parser

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "transfer_queue.md").read_text(encoding="utf-8")


def test_the_example_runs_and_prints_what_it_says(tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (promised,) = re.findall(r"# (\[.*\] True)", example)
    file = tmp_path / "example.py"
    file.write_text(example)
    done = subprocess.run(
        [sys.executable, "-W", "error", str(file)], capture_output=True, text=True, timeout=60, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == promised


def test_the_commands_are_those_of_the_parser() -> None:
    (block,) = re.findall(r"## The command\n\n((?:    .*\n)+)", PAGE)
    joined = re.sub(r"\\\n\s*", "", block)
    for line in joined.splitlines():
        command = re.sub(r"\[(--\S+ \S+) \|[^\]]*\]", r"\1", line.strip().removeprefix("transfer-queue "))
        assert parser().parse_args(command.split()).run
