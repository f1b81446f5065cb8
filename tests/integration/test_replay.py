"""A recorded run is retrained bit for bit, and a replay that differs says where first."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flowrl.replay.record import _LENGTH, Updated, _encode, read_entries
from tests.integration.runs import ROOT, events
from tests.integration.test_determinism import assert_same_bits, tiny_run, weights
from tests.integration.test_resume import command, kill_all_after, run_to_its_end

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


def assert_replayed(run: Path, start: Path, updates: int, ranks: int) -> None:
    """To the same bits, which are not those of the model that the run began with."""
    code, output = replay(run, run / "again")
    assert code == 0, output
    assert f"{updates} updates replayed on {ranks} rank" in output
    assert_same_bits(run / "model", run / "again" / "model")
    before, after = weights(start), weights(run / "model")
    assert any(not torch.equal(before[name], tensor) for name, tensor in after.items())


@pytest.mark.slow
def test_a_run_with_a_critic_and_a_reference_is_replayed_bit_for_bit(tmp_path: Path) -> None:
    run = tiny_run(
        tmp_path, "ppo", "pools.train.workers=2", "algorithm.kl={coef: 0.05, target: 0.01}", recipe="algorithms/ppo"
    )
    assert_replayed(run, tmp_path / "model", updates=5, ranks=2)


@pytest.mark.slow
def test_a_run_with_a_critic_that_was_killed_and_resumed_is_replayed_bit_for_bit(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "cut"
    arguments = command(
        tmp_path, "cut", "run.checkpoint_every=2", "train.steps=8", "algorithm.kl={coef: 0.05, target: 0.01}",
        recipe="algorithms/ppo",
    )  # fmt: skip
    kill_all_after(5, arguments, run)
    run_to_its_end([*arguments, "--resume"])
    assert len((run / "lives.jsonl").read_text().splitlines()) == 2
    assert_replayed(run, tmp_path / "model", updates=8, ranks=1)


@pytest.mark.slow
def test_a_run_of_adapters_from_a_warm_start_is_replayed_bit_for_bit(tmp_path: Path) -> None:
    run = tiny_run(
        tmp_path, "adapters", "model.lora={rank: 4}", "pools.train.workers=2", "data.dev=20",
        "warm_start.max_steps=2", "warm_start.check_every=2",
    )  # fmt: skip
    assert_replayed(run, run / "warm_start", updates=5, ranks=2)


@pytest.mark.slow
def test_a_run_on_two_nodes_is_replayed_on_one_bit_for_bit(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, "two", "data.dev=20", "warm_start.max_steps=2", "warm_start.check_every=2", nodes=2)
    assert {event["node"] for event in events(run) if event["kind"] == "trained"} == {0, 1}
    assert_replayed(run, run / "warm_start", updates=5, ranks=2)


def test_a_run_without_a_record_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("")
    code, output = replay(tmp_path, tmp_path / "replay")
    assert code == 2
    assert "run.record was false" in output
