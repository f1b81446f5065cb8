"""A reader racing the writer sees whole versions only."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from flowrl.weights.store import WeightStore
from flowrl.weights.tensorfile import TensorFileLayout

ROOT = Path(__file__).parents[2]
NUM_VERSIONS = 400


def test_reader_racing_the_writer_never_sees_a_torn_version(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text("{}")
    store = WeightStore(tmp_path / "store", buffers=2)
    shapes = {f"layer.{index}.weight": torch.Size([128, 128]) for index in range(8)}
    layout = TensorFileLayout(shapes, torch.float32)
    reader = subprocess.Popen(
        [sys.executable, "-m", "tests.weights.reading_process", str(store.root), str(NUM_VERSIONS)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert reader.stdout is not None and reader.stdout.readline() == "reading\n"
        for version in range(1, NUM_VERSIONS + 1):
            full = {name: torch.full(shape, float(version)) for name, shape in shapes.items()}
            store.write(version, layout, full.items(), [config])
        output, errors = reader.communicate(timeout=30)
    finally:
        reader.kill()
        reader.communicate()
    assert reader.returncode == 0, errors
    num_seen, _ = map(int, output.split())
    assert num_seen > NUM_VERSIONS // 20
