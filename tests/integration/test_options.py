"""Options of a recipe that change how a run is put together, each tried in a whole small run."""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from pathlib import Path

import pytest

from tests.integration.runs import events, run_to_end, small_run

pytestmark = pytest.mark.timeout(240)


def ran(tmp_path: Path, *overrides: str) -> tuple[Path, str]:
    """A run of six updates that ended well and kept the bound."""
    code, output = run_to_end(small_run(tmp_path, "eval=null", *overrides, steps=6), cwd=tmp_path)
    assert code == 0, output
    run = tmp_path / "runs" / "small"
    log = events(run)
    sampled = {tuple(event["key"]): event["versions"] for event in log if event["kind"] == "sampled"}
    trained = {tuple(event["key"]): event["update"] for event in log if event["kind"] == "trained"}
    assert len(trained) == 6 * 64
    assert max(update - version for key, update in trained.items() for version, _ in sampled[key]) <= 2
    return run, output


def test_two_trainer_ranks_of_one_node_share_an_update(tmp_path: Path) -> None:
    run, _ = ran(tmp_path, "pools.train.workers=2", "run.checkpoint_every=3")
    assert (run / "logs" / "train.0.1.log").exists()
    assert (run / "checkpoints" / "step_6").is_dir()


def test_two_rollout_stages_share_the_groups_of_every_update(tmp_path: Path) -> None:
    run, _ = ran(
        tmp_path, "producers={wanderers: {pool: wanderers, in_flight: recompute, concurrency: 4}}",
        "pools.wanderers.workers=2", "rollout.concurrency=4",
    )  # fmt: skip
    log = events(run)
    trained = {tuple(event["key"]) for event in log if event["kind"] == "trained"}
    made_by = {tuple(event["key"]): event["producer"] for event in log if event["kind"] == "reserved"}
    names = Counter(made_by[key] for key in trained)
    assert set(names) == {"rollout.0.0", "wanderers.0.0", "wanderers.0.1"} and min(names.values()) >= 8
    versions = {version for event in log if event["kind"] == "sampled" for version, _ in event["versions"]}
    assert max(versions) >= 3


def test_weights_can_go_straight_into_engines(tmp_path: Path) -> None:
    """Two trainer ranks, two engines, checked at the first synchronisation; versions lie nowhere but where evaluation
    takes them."""
    run, _ = ran(
        tmp_path, "weights.transport=collective", "pools.train.workers=2", "pools.rollout.workers=2",
        "eval={every: 3, limit: 20}",
    )  # fmt: skip
    log = events(run)
    versions = {version for event in log if event["kind"] == "sampled" for version, _ in event["versions"]}
    assert max(versions) >= 3 and {event["version"] for event in log if event["kind"] == "published"} == set(range(7))
    summary = json.loads((run / "summary.json").read_text())
    assert summary["accuracy_after"] is not None


def test_adapters_alone_go_to_engines_by_a_directory_on_disk(tmp_path: Path) -> None:
    run, _ = ran(tmp_path, "model.lora={rank: 4}", "pools.train.workers=2", "weights.transport=disk",
        f"weights.dir={tmp_path}/weights")  # fmt: skip
    versions = sorted((tmp_path / "weights" / "small").glob("v*"))
    assert all((path / "adapter_model.safetensors").exists() for path in versions) and versions
    assert not list((tmp_path / "weights" / "small").glob("v*/model.safetensors"))
    adapters = (versions[-1] / "adapter_model.safetensors").stat().st_size
    assert adapters < (run / "model" / "model.safetensors").stat().st_size / 5


@pytest.mark.slow
def test_late_rows_can_be_dropped_and_kv_recomputed_in_bfloat16(tmp_path: Path) -> None:
    ran(
        tmp_path, "staleness.late=drop", "rollout.in_flight=recompute", "model.dtype=bfloat16",
        "algorithm.name=dr_grpo", "algorithm.dual_clip=null", "algorithm.skip_tied=false",
        "algorithm.aggregate=seq-mean-token-mean", "train.schedule=cosine", "train.micro_batch_tokens=128",
    )  # fmt: skip


def test_a_stage_of_the_users_own_takes_the_place_of_ours(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        textwrap.dedent("""
            import numpy as np
            from transfer_queue.rows import Column

            class Centred:
                def __init__(self, context, settings):
                    self.scale = settings["scale"]

                def process(self, rows):
                    reward = rows["reward"].values
                    return {"advantage": Column.scalars(self.scale * (reward - reward.mean()), "float32")}
        """)
    )
    stage = "{run: 'mine.py:Centred', unit: group, reads: [reward], writes: [advantage], settings: {scale: 2.0}}"
    run, _ = ran(tmp_path, f"stages.advantage={stage}")
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert max(line.get("critic/advantages/max", 0.0) for line in metrics) > 1.0


@pytest.mark.slow
def test_an_episode_of_the_users_own_is_used(tmp_path: Path) -> None:
    (tmp_path / "episodes.py").write_text(
        textwrap.dedent("""
            from flowrl.rollout.episodes import single_turn

            async def noted(context):
                open("noted.txt", "a").write(context.request.request_id + "\\n")
                return await single_turn(context)
        """)
    )
    ran(tmp_path, "rollout.episode=episodes.py:noted")
    assert len((tmp_path / "noted.txt").read_text().splitlines()) >= 6 * 64


def test_a_stage_that_fails_is_named_with_its_log(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "class Broken:\n    def __init__(self, context, settings):\n        1 / 0\n    def process(self, rows): ...\n"
    )
    stage = "{run: 'mine.py:Broken', unit: group, reads: [reward], writes: [advantage]}"
    code, output = run_to_end(small_run(tmp_path, "eval=null", f"stages.advantage={stage}"), cwd=tmp_path)
    assert code == 1
    assert "stages.0.0" in output and "ZeroDivisionError" in output
