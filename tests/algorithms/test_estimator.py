"""The advantage stage: rows of whole groups in, advantages out, as the recipe composes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import slow_float64 as slow
import torch

from flowrl.config.presets import configured
from flowrl.stages.advantage import GroupAdvantage
from flowrl.trainer.estimator import Estimator
from transfer_queue.rows import Column, RowKey, Rows

SCORES = np.array([1.0, 0.0, 0.5, 2.0, 2.0, 2.0, 0.25, 0.75, 0.0], np.float32)
LENGTHS = [3, 9, 1, 4, 4, 8, 2, 7, 10]
GROUPS = [0, 0, 0, 1, 1, 1, 2, 2, 2]
QUICKSTART = str(Path(__file__).resolve().parents[2] / "recipes" / "quickstart.yaml")


def rows(**columns: Column) -> Rows:
    keys = [RowKey("train", group, place % 3) for place, group in enumerate(GROUPS)]
    return Rows(keys, {"reward": Column.scalars(SCORES), **columns})


def stage(tmp_path: Path, *lines: str) -> GroupAdvantage:
    path = tmp_path / "recipe.yaml"
    path.write_text("\n".join([f"base: {QUICKSTART}", "rollout: {max_tokens: 10}", *lines]))
    context: Any = SimpleNamespace(payload={"recipe": str(path)})
    return GroupAdvantage(context, {})


def of(found: dict[str, Column]) -> np.ndarray:
    assert found["advantage"].values.dtype == np.float32
    return found["advantage"].values


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("grpo", slow.grpo),
        ("dr_grpo", lambda score, group: slow.grpo(score, group, divide_by_std=False)),
        ("rloo", slow.rloo),
        ("grpo_passk", slow.passk),
        ("opo", lambda score, group: slow.opo(score, LENGTHS, group)),
        ("lite_ppo", lambda score, group: slow.lite_ppo(score, group) * (slow.std([float(s) for s in score]) + 1e-6)),
    ],
)
def test_each_preset_has_its_advantage(name: str, formula: Callable[..., np.ndarray], tmp_path: Path) -> None:
    mask = Column.ragged([np.ones(length) for length in LENGTHS], "uint8")
    found = stage(tmp_path, f"algorithm: {{name: {name}}}").process(rows(response_mask=mask))
    np.testing.assert_allclose(of(found), formula(SCORES, GROUPS), rtol=1e-5, atol=1e-6)


def test_an_overlong_response_costs_score(tmp_path: Path) -> None:
    """Counted are the tokens that the model wrote: the last of each response here was not its own."""
    mask = Column.ragged([[*np.ones(length - 1), 0] for length in LENGTHS], "uint8")
    found = stage(tmp_path, "algorithm: {name: rloo, overlong_buffer: 4}").process(rows(response_mask=mask))
    penalty = [-max(0, length - 1 - 6) / 4 for length in LENGTHS]
    np.testing.assert_allclose(of(found), slow.rloo(SCORES + penalty, GROUPS), rtol=1e-5, atol=1e-6)


def test_an_advantage_of_the_users_own_gets_scores_groups_and_settings(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def scaled(score_B, group_B, *, by):\n    return by * score_B + group_B\n")
    algorithm = f"{{advantage: '{tmp_path}/mine.py:scaled', advantage_settings: {{by: 3}}}}"
    found = stage(tmp_path, f"algorithm: {algorithm}").process(rows())
    np.testing.assert_allclose(of(found), 3 * SCORES + GROUPS)


@pytest.mark.parametrize("body", ["score_B[:2]", "score_B / 0 * 0"])
def test_an_advantage_that_is_no_number_a_sample_is_refused(body: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(f"def broken(score_B, group_B):\n    return {body}\n")
    estimator = Estimator(configured("grpo", advantage=f"{tmp_path}/mine.py:broken"))
    with pytest.raises(ValueError, match=r"algorithm\.advantage: gave shape .* must give one finite number each"):
        estimator(torch.tensor([0.0, 1.0, 2.0]), torch.zeros(3))


def test_remax_subtracts_the_score_of_the_groups_greedy_response(tmp_path: Path) -> None:
    baseline = Column.ragged([[0.5], [], [], [], [2.0], [], [0.25], [], []], "float32")
    found = stage(tmp_path, "algorithm: {name: remax}").process(rows(baseline=baseline))
    np.testing.assert_allclose(of(found), SCORES - np.repeat([0.5, 2.0, 0.25], 3))


def test_a_group_without_a_greedy_score_is_an_error_that_names_it(tmp_path: Path) -> None:
    baseline = Column.ragged([[0.5], [], [], [], [], [], [0.25], [], []], "float32")
    with pytest.raises(ValueError, match="baseline: group 1 came without one"):
        stage(tmp_path, "algorithm: {name: remax}").process(rows(baseline=baseline))
