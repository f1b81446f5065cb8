"""Readers racing two writing ranks see whole versions only. FLOWRL_RACES: how many versions are written (1500)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.weights.test_ranks import ROOT, start
from tests.weights.versions import WORDS

RACES = int(os.environ.get("FLOWRL_RACES", "1500"))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("way", ["mapped", "read", "kept"])
def test_reader_racing_two_writing_ranks_never_sees_a_torn_version(way: str, tmp_path: Path) -> None:
    model_dir = tmp_path / "model"
    model_dir.mkdir()
    save_file({name: torch.zeros(shape) for name, shape in WORDS.items()}, model_dir / "model.safetensors")
    reader = subprocess.Popen(
        [sys.executable, "-m", "tests.weights.reading_process", way, str(tmp_path / "weights"), str(RACES)],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    writers = []
    try:
        assert reader.stdout is not None and reader.stdout.readline() == "reading\n"
        writers = start("race", 2, model_dir, tmp_path, RACES=str(RACES))
        for writer in writers:
            _, errors = writer.communicate(timeout=550)
            assert writer.returncode == 0, errors
        output, errors = reader.communicate(timeout=60)
    finally:
        for process in (reader, *writers):
            process.kill()
            process.communicate()
    assert reader.returncode == 0, errors
    num_read, num_versions, _, num_kept = map(int, output.split())
    print(f"{way}: {num_read} reads of {num_versions} of {RACES} versions")
    assert num_read >= num_versions > RACES // 100
    assert (num_kept > num_read // 2) == (way == "kept"), f"{num_kept} of {num_read} out of a mapping that had stayed"
