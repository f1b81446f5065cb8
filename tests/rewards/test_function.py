from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flowrl.config import RewardConfig
from flowrl.data.example import Example
from flowrl.rewards.function import Score, adapt, load_reward

MESSAGES = [{"role": "user", "content": "2 + 2?"}]


def examples(*prompts: Any) -> list[Example]:
    return [
        Example(
            index=index,
            prompt=prompt,
            data_source="sums",
            ground_truth="4",
            extra_info={"level": index, **({"only_first": True} if index == 0 else {})},
            origin=f"sums.jsonl:{index + 1}",
        )
        for index, prompt in enumerate(prompts)
    ]


def user_file(folder: Path, code: str) -> RewardConfig:
    (folder / "mine.py").write_text(code)
    return RewardConfig(path="mine.py:score")


def test_a_file_of_the_users_is_found_from_the_base_directory(tmp_path: Path) -> None:
    code = (
        "def score(data_source, solution_str, ground_truth, extra_info=None):\n    return solution_str == ground_truth"
    )
    reward = load_reward(user_file(tmp_path, code), tmp_path)
    assert reward(examples("a", "b"), ["4", "5"]) == [Score(1.0), Score(0.0)]


def test_a_package_path_is_imported(tmp_path: Path) -> None:
    reward = load_reward(RewardConfig(path="flowrl.rewards.builtin:exact_match"), tmp_path)
    assert reward(examples("a"), ["4"]) == [Score(1.0)]


def test_verls_form_is_given_the_row_and_may_answer_with_a_mapping() -> None:
    seen = []

    def score(data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any]) -> dict[str, Any]:
        seen.append((data_source, solution_str, ground_truth, extra_info["level"]))
        return {"score": np.float32(0.5), "acc": True, "steps": 3, "said": "text"}

    (first, _) = adapt("mine", score)(examples("a", "b"), ["x", "y"])
    assert seen == [("sums", "x", "4", 0), ("sums", "y", "4", 1)]
    assert (first.value, first.details, first.accuracy) == (0.5, {"acc": 1.0, "steps": 3.0}, 1.0)


def test_trls_form_is_given_the_batch_and_its_columns() -> None:
    seen: dict[str, Any] = {}

    def score(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
        seen.update(columns, prompts=prompts, completions=completions)
        return [1.0, None]

    assert adapt("mine", score)(examples("a", MESSAGES), ["x", "y"]) == [Score(1.0), Score(0.0)]
    assert seen["completions"] == ["x", [{"role": "assistant", "content": "y"}]]
    assert seen["prompts"] == ["a", MESSAGES]
    assert (seen["ground_truth"], seen["level"], seen["data_source"]) == (["4", "4"], [0, 1], ["sums", "sums"])
    assert "only_first" not in seen, "a column has a value for every row"


def test_a_function_is_given_only_what_it_takes() -> None:
    assert adapt("mine", lambda completions, level: level)(examples("a", "b"), ["x", "y"]) == [Score(0.0), Score(1.0)]
    assert adapt("mine", lambda solution_str: len(solution_str))(examples("a"), ["xyz"]) == [Score(3.0)]


def test_without_acc_a_full_reward_is_an_accurate_one() -> None:
    assert [Score(value).accuracy for value in (1.0, 0.9, 0.0)] == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("value", [math.nan, math.inf, "1.0", None, [1.0]], ids=str)
def test_a_reward_that_is_no_finite_number_is_an_error_that_names_the_row(value: Any) -> None:
    def score(solution_str: str) -> Any:
        return 1.0 if solution_str == "good" else value

    with pytest.raises(
        ValueError, match=r"reward 'mine': gave .* for row 1 \(sums\.jsonl:2\).*'bad'; must be a finite"
    ):
        adapt("mine", score)(examples("a", "b"), ["good", "bad"])


def test_nan_in_a_batch_is_an_error_that_names_the_row() -> None:
    with pytest.raises(ValueError, match=r"gave nan for row 1 \(sums\.jsonl:2\)"):
        adapt("mine", lambda completions: [1.0, math.nan])(examples("a", "b"), ["good", "bad"])


@pytest.mark.parametrize("parameter", ["solution_str", "completions"])
def test_a_reward_that_raises_is_an_error_that_names_the_row(parameter: str) -> None:
    def divide(_: Any) -> float:
        return 1 / 0

    scope: dict[str, Any] = {"divide": divide}
    function = eval(f"lambda {parameter}: divide({parameter})", scope)
    with pytest.raises(ValueError, match=r"reward 'mine': raised ZeroDivisionError.*row 0 \(sums\.jsonl:1\)"):
        adapt("mine", function)(examples("a"), ["x"])


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda answer: 1.0, r"takes \(answer\), must take \(data_source, solution_str"),
        (lambda solution_str, colour: 1.0, r"parameter 'colour': must be one of data_source"),
        (3, r"is a int, must be a function"),
    ],
)
def test_a_function_of_another_form_is_refused_with_the_forms(function: Callable[..., Any], said: str) -> None:
    with pytest.raises(ValueError, match=rf"^reward\.path: 'mine'; {said}"):
        adapt("mine", function)


def test_a_coroutine_is_refused() -> None:
    async def score(solution_str: str) -> float:
        return 1.0

    with pytest.raises(ValueError, match="is a coroutine"):
        adapt("mine", score)


def test_a_list_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"gave 1 values; must give a list of 2"):
        adapt("mine", lambda completions: [1.0])(examples("a", "b"), ["x", "y"])


def test_a_mapping_without_a_score_is_refused() -> None:
    with pytest.raises(ValueError, match=r"gave \{'acc': 1\} for row 0.*; needs 'score'"):
        adapt("mine", lambda solution_str: {"acc": 1})(examples("a"), ["x"])


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("missing.py:score", r"missing\.py.*no such file"),
        ("mine.py:other", r"has no 'other'"),
        ("broken.py:score", r"'broken\.py:score'; importing it raised SyntaxError"),
        ("no_such_package.rewards:score", r"no module named 'no_such_package'"),
    ],
)
def test_a_path_that_leads_nowhere_is_refused_by_name(tmp_path: Path, path: str, said: str) -> None:
    user_file(tmp_path, "def score(solution_str): return 1.0")
    (tmp_path / "broken.py").write_text("def score(")
    with pytest.raises(ValueError, match=rf"^reward\.path: .*{said}"):
        load_reward(RewardConfig(path=path), tmp_path)


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"^reward\.name: 'gsm8'; .*did you mean 'gsm8k'"):
        load_reward(RewardConfig(name="gsm8"), Path.cwd())
