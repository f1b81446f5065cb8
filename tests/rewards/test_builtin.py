from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flowrl.config import DataConfig, RewardConfig
from flowrl.data.datasets import load_splits
from flowrl.rewards.builtin import exact_match, gsm8k
from flowrl.rewards.function import load_reward


@pytest.mark.parametrize(
    ("response", "truth", "expected"),
    [
        ("cat", "cat", 1.0),
        (" cat\n", "cat", 1.0),
        ("cats", "cat", 0.0),
        ("Cat", "cat", 0.0),
        ("", "cat", 0.0),
        ("4", 4, 1.0),
    ],
)
def test_exact_match_compares_stripped_text(response: str, truth: Any, expected: float) -> None:
    assert exact_match("", response, truth, {}) == expected


@pytest.mark.parametrize(
    ("response", "truth", "expected"),
    [
        ("so 3 + 4 = 7\n#### 7", "7", 1.0),
        ("#### 5, no: #### 7", "7", 1.0),
        ("#### 7 apples, of the 9", "7", 1.0),
        ("the answer is 7.", "7", 1.0),
        ("between 3 and 7", "7", 1.0),
        ("7, or rather 8", "7", 0.0),
        ("#### $1,234.00", "1234", 1.0),
        ("it costs 1,234", "1234", 1.0),
        ("#### -3", "-3", 1.0),
        ("#### -3", "3", 0.0),
        ("no number", "7", 0.0),
        ("####", "7", 0.0),
        ("", "7", 0.0),
    ],
)
def test_gsm8k_takes_the_marked_number_or_else_the_last(response: str, truth: str, expected: float) -> None:
    assert gsm8k("", response, truth, {}) == expected


@pytest.mark.parametrize("task", ["spell_backward", "countdown", "rearc", "knights_knaves", "basic_arithmetic"])
def test_the_tasks_own_verifier_judges_as_on_the_entry_itself(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reasoning_gym = pytest.importorskip("reasoning_gym")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    data = DataConfig(source="reasoning_gym", task=task, size=6, seed=5)
    load_splits(data)
    examples = list(load_splits(data).train)
    own = reasoning_gym.create_dataset(task, size=6, seed=5)
    responses = [example.ground_truth or "7" for example in examples]
    scores = load_reward(RewardConfig(name="reasoning_gym"), Path.cwd())(examples, responses)
    expected = [
        own.score_answer(response, own[example.extra_info["item"]])
        for example, response in zip(examples, responses, strict=True)
    ]
    assert [score.value for score in scores] == expected
    assert [score.accuracy for score in scores] == [float(each >= 1) for each in expected]


def test_a_wrong_answer_scores_below_a_right_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("reasoning_gym")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    examples = list(load_splits(DataConfig(source="reasoning_gym", task="spell_backward", size=3)).train)
    score = load_reward(RewardConfig(name="reasoning_gym"), Path.cwd())
    right = score(examples, [f" {example.ground_truth}\n" for example in examples])
    wrong = score(examples, ["???" for _ in examples])
    assert [(one.value, one.accuracy) for one in right] == [(1.0, 1.0)] * 3
    assert [(one.value, one.accuracy) for one in wrong] == [(0.0, 0.0)] * 3
