"""Algorithms whose path through a run is their own, each in a whole small run of real processes."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import pytest

from tests.integration.runs import ROOT, events, run_to_end, small_run

pytestmark = pytest.mark.timeout(240)

STEPS = 5
# Nothing to be learnt here, but no two rewards alike: no group is tied, and every row goes through the model.
REWARD = """
    import zlib

    def compute_score(data_source, solution_str, ground_truth, extra_info):
        score = zlib.crc32(solution_str.encode()) % 1000 / 1000
        return {"score": score, "acc": score}
"""
RECIPES = sorted(path.stem for path in (ROOT / "recipes" / "algorithms").glob("*.yaml"))


def ran(
    tmp_path: Path,
    recipe: str,
    *overrides: str,
    staleness: int = 2,
    steps: int = STEPS,
    rows: int = 64,
    learns: bool = True,
) -> list[dict[str, float]]:
    """What each update of a run that ended well measured; the run kept its bound."""
    (tmp_path / "noise.py").write_text(textwrap.dedent(REWARD))
    arguments = small_run(
        tmp_path,
        "eval=null",
        "warm_start=null",
        "reward.name=null",
        "reward.path=noise.py:compute_score",
        *overrides,
        steps=steps,
    )
    arguments[4] = arguments[4].replace("quickstart.yaml", f"algorithms/{recipe}.yaml")
    code, output = run_to_end(arguments, timeout_s=200, cwd=tmp_path)
    assert code == 0, output
    run = tmp_path / "runs" / "small"
    log = events(run)
    sampled = {tuple(event["key"]): event["versions"] for event in log if event["kind"] == "sampled"}
    trained = {tuple(event["key"]): event["update"] for event in log if event["kind"] == "trained"}
    assert len(trained) == steps * rows
    assert max(update - version for key, update in trained.items() for version, _ in sampled[key]) <= staleness
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if "actor/pg_loss" in line]
    assert len(found) == steps
    assert all((line["actor/grad_norm"] > 0) == learns for line in found)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_runs(recipe: str, tmp_path: Path) -> None:
    rows = 32 if recipe == "remax" else 64
    found = ran(tmp_path, recipe, "rollout.filter_tied=false", "data.size=500", staleness=4, steps=3, rows=rows)
    assert all(abs(line["actor/pg_loss"]) < 100 for line in found)


@pytest.mark.slow
def test_remax_compares_each_prompt_with_its_own_greedy_response(tmp_path: Path) -> None:
    """So cold, sampling is greedy, and no response earns more or less than the greedy one of its prompt."""
    overrides = ("rollout.group_size=1", "train.batch_groups=32", "rollout.temperature=1e-6")
    found = ran(tmp_path, "remax", *overrides, rows=32, learns=False)
    assert all(line["critic/advantages/min"] == line["critic/advantages/max"] == 0 for line in found)
    assert any(line["critic/score/min"] < line["critic/score/max"] for line in found)


@pytest.mark.slow
def test_ppo_trains_policy_and_critic_in_minibatches(tmp_path: Path) -> None:
    found = ran(tmp_path, "ppo", "run.checkpoint_every=3")
    assert all(line["training/steps"] == 2 for line in found)
    assert found[0]["critic/values/mean"] == 0 != found[-1]["critic/values/mean"]
    assert (tmp_path / "runs" / "small" / "checkpoints" / "step_5").is_dir()


def test_decoupled_ppo_keeps_to_a_reference_and_leaves_far_tokens_out(tmp_path: Path) -> None:
    overrides = ("algorithm.kl={coef: 0.01, target: 0.1}", "algorithm.m2po=1e-9", "train.learning_rate=3e-3")
    found = ran(tmp_path, "decoupled_ppo", *overrides, staleness=4)
    assert found[0]["actor/kl"] < found[-1]["actor/kl"]
    assert found[0]["actor/kl_coef"] != found[-1]["actor/kl_coef"]


@pytest.mark.slow
def test_two_ranks_whiten_over_both_and_take_a_kl_off_the_reward(tmp_path: Path) -> None:
    found = ran(tmp_path, "reinforce_plus_plus", "pools.train.workers=2", "train.learning_rate=3e-3")
    assert all(abs(line["critic/advantages/mean"]) < 1e-4 for line in found)
    assert abs(found[-1]["actor/reward_kl"]) > abs(found[0]["actor/reward_kl"])


@pytest.mark.slow
def test_lite_ppo_corrects_for_the_sampler(tmp_path: Path) -> None:
    found = ran(tmp_path, "lite_ppo", "algorithm.opsm=0.01")
    assert all(0 < line["rollout_corr/ess"] < 1.001 for line in found)


@pytest.mark.slow
def test_segments_are_recomputed_while_rows_wait(tmp_path: Path) -> None:
    """Every row of an update is several versions old, and comes with the log-probs of the version after its own."""
    found = ran(tmp_path, "segment_ppo", "train.learning_rate=3e-3", staleness=4, steps=10)
    old = [line for line in found if line["training/off_policy/trajectory_staleness/min"] >= 2]
    assert old, "rows were never two versions old"
    assert min(line["actor/segment_absent"] for line in old) < 0.1


@pytest.mark.slow
def test_dapo_drops_groups_that_teach_nothing(tmp_path: Path) -> None:
    (tmp_path / "coarse.py").write_text("def compute_score(data_source, solution_str, ground_truth, extra_info):\n"
                                        "    return float(len(solution_str) > 5)\n")  # fmt: skip
    found = ran(tmp_path, "dapo", "reward.path=coarse.py:compute_score", "staleness.max=4", staleness=4)
    assert all(line["frac_reward_zero_std"] == 0 for line in found)
    dropped = [event for event in events(tmp_path / "runs" / "small") if event["kind"] == "dropped"]
    assert "tied" in {event["reason"] for event in dropped}


def test_an_advantage_and_a_loss_of_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        textwrap.dedent("""
            def ranked(score_B, group_B, scale):
                return scale * (score_B > score_B.median()).float() - scale / 2

            def plain(logprob_BT, old_logprob_BT, advantage_BT, mask_BT):
                return -advantage_BT * logprob_BT * mask_BT
        """)
    )
    overrides = ("algorithm.advantage=mine.py:ranked", "algorithm.loss=mine.py:plain")
    found = ran(tmp_path, "rloo", *overrides, "algorithm.advantage_settings={scale: 4.0}")
    assert all((line["critic/advantages/min"], line["critic/advantages/max"]) == (-2, 2) for line in found)
