"""What a command line's axes mean: values, ranges, points, names."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowrl.sweep.axes import Span, grid, parse_axes, parse_axis, split_values


def test_the_grid_has_every_combination_and_the_last_axis_changes_fastest() -> None:
    points = grid(parse_axes(["staleness.max=0,1", "train.seed=0,1,2", "train.steps=5"]))
    assert [point.name for point in points] == [
        f"staleness.max={eta}_train.seed={seed}" for eta in (0, 1) for seed in (0, 1, 2)
    ]
    assert points[4].overrides == ["staleness.max=1", "train.seed=1", "train.steps=5"]


@pytest.mark.parametrize(
    ("written", "values"),
    [
        ("[1,2],[3,4]", ["[1,2]", "[3,4]"]),
        ("{a: 1, b: [2, 3]}", ["{a: 1, b: [2, 3]}"]),
        ("'a,b',c", ["'a,b'", "c"]),
        ("my.py:f,my.py:g", ["my.py:f", "my.py:g"]),
        ("1e-5, 1e-4", ["1e-5", "1e-4"]),
        ("null,{path: x}", ["null", "{path: x}"]),
    ],
)
def test_commas_inside_brackets_and_quotes_separate_nothing(written: str, values: list[str]) -> None:
    assert split_values("field", written) == values


@settings(deadline=None)
@given(st.lists(st.text("abc019.-", min_size=1).map(lambda text: text.replace("..", ".")), min_size=1, unique=True))
def test_plain_values_come_back_as_they_were(values: list[str]) -> None:
    assert split_values("field", ",".join(values)) == values


@pytest.mark.parametrize(
    ("axis", "words"),
    [
        ("train.seed", "must read field.name=value"),
        ("=3", "must read field.name=value"),
        ("train.seed=1,,2", "a value is empty"),
        ("train.seed=1,1", "there twice"),
        ("x=[1,2", "'[' is never closed"),
        ("x=1]", "']' closes nothing"),
        ("x='a", "is never closed"),
        ("x=3..1", "the lower end must come first"),
        ("x=0..1:log", "a lower end above 0"),
    ],
)
def test_a_mistaken_axis_is_refused_by_name_and_rule(axis: str, words: str) -> None:
    with pytest.raises(ValueError, match=r"^(x|train\.seed|axis)") as refused:
        parse_axis(axis)
    assert words in str(refused.value)


def test_an_axis_given_twice_and_the_sweeps_own_fields_are_refused() -> None:
    with pytest.raises(ValueError, match=r"train\.seed: given twice"):
        parse_axes(["train.seed=0", "train.seed=1"])
    with pytest.raises(ValueError, match=r"run\.name: the sweep names"):
        parse_axes(["run.name=a,b"])


@pytest.mark.parametrize(
    ("written", "span"),
    [
        ("1e-5..1e-3:log", Span(low=1e-5, high=1e-3, is_whole=False, is_log=True)),
        ("1..8", Span(low=1, high=8, is_whole=True, is_log=False)),
        ("0.5..1.5", Span(low=0.5, high=1.5, is_whole=False, is_log=False)),
        ("-1.5..-0.5", Span(low=-1.5, high=-0.5, is_whole=False, is_log=False)),
    ],
)
def test_a_range_is_read(written: str, span: Span) -> None:
    assert parse_axis(f"x={written}").span == span


def test_a_path_with_two_dots_is_no_range() -> None:
    assert parse_axis("data.path=../a.jsonl,../b.jsonl").values == ("../a.jsonl", "../b.jsonl")


def test_a_range_needs_a_search_that_draws() -> None:
    with pytest.raises(ValueError, match="needs --search random or halving"):
        grid(parse_axes(["train.learning_rate=1e-5..1e-3"]))


def test_names_are_fit_for_directories_and_differ() -> None:
    points = grid(parse_axes(["data.path=a/b,a-b,a//b", "x=" + ",".join(f"{'y' * 120}{n}" for n in range(3))]))
    names = [point.name for point in points]
    assert len(set(names)) == len(names) == 9
    assert all("/" not in name and len(name) <= 100 for name in names)
