"""A recorded run is retrained bit for bit, and a replay that differs says where first."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flowrl.replay.record import _LENGTH, Updated, _encode, read_entries
from tests.integration.runs import ROOT
from tests.integration.test_determinism import assert_same_bits, tiny_run

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Asynchronous, on two ranks, from a warm start."""
    return tiny_run(
        tmp_path_factory.mktemp("record"), "recorded", "pools.train.workers=2", "data.dev=20",
        "warm_start.max_steps=2", "warm_start.check_every=2",
    )  # fmt: skip


def replay(run: Path, out: Path) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "flowrl", "replay", str(run), "--out", str(out)],
        cwd=ROOT, capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def test_an_asynchronous_run_is_replayed_bit_for_bit(recorded: Path, tmp_path: Path) -> None:
    code, output = replay(recorded, tmp_path / "replay")
    assert code == 0, output
    assert "5 updates replayed on 2 ranks" in output
    assert_same_bits(recorded / "model", tmp_path / "replay" / "model")


@pytest.mark.slow
def test_a_divergence_is_named_by_its_first_update_and_parameter(recorded: Path, tmp_path: Path) -> None:
    forged = tmp_path / "forged"
    shutil.copytree(recorded, forged)
    record = forged / "record" / "rank1.life0"
    entries = list(read_entries(record))
    with record.open("wb") as file:
        for entry in entries:
            if isinstance(entry, Updated) and entry.update >= 2:
                changed = dict.fromkeys(list(entry.digests)[3:5], "0" * 16)
                entry = Updated(entry.update, entry.digests | changed)
            content = _encode(entry)
            file.write(_LENGTH.pack(len(content)) + content)
    code, output = replay(forged, tmp_path / "replay")
    assert code == 1, output
    assert re.search(r"after update 2, first in \S+ and 1 more of \d+ parameters \(shard of rank 1\)", output), output


def test_a_run_without_a_record_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("")
    code, output = replay(tmp_path, tmp_path / "replay")
    assert code == 2
    assert "run.record was false" in output
