from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from flowrl.config import DataConfig, EvalConfig
from flowrl.data.datasets import load_file, load_splits, save_file

FIELD_ROW = {
    "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}],
    "data_source": "sums",
    "reward_model": {"style": "rule", "ground_truth": "4"},
    "extra_info": {"split": "train", "index": 3},
}
GSM8K_ROWS = [
    {"question": "How many?", "answer": "10 * 120 = <<10*120=1200>>1200\n#### 1,200"},
    {"question": "And now?", "answer": "It falls.\n#### -3"},
]


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_the_fields_columns_are_read(tmp_path: Path) -> None:
    (example,) = load_file(write_lines(tmp_path / "sums.jsonl", [FIELD_ROW]))
    assert example.prompt == FIELD_ROW["prompt"]
    assert (example.data_source, example.ground_truth, example.demonstration) == ("sums", "4", "4")
    assert example.extra_info == {"split": "train", "index": 3}
    assert example.origin == f"{tmp_path / 'sums.jsonl'}:1"


@pytest.mark.parametrize("column", ["ground_truth", "answer", "solution"])
def test_flat_columns_are_accepted_where_they_are_unambiguous(tmp_path: Path, column: str) -> None:
    (example,) = load_file(write_lines(tmp_path / "flat.jsonl", [{"prompt": "2 + 2?", column: "4"}]))
    assert (example.prompt, example.ground_truth, example.data_source) == ("2 + 2?", "4", "flat")


def test_parquet_gives_the_same_examples_as_jsonl(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    lines = load_file(write_lines(tmp_path / "sums.jsonl", [FIELD_ROW, FIELD_ROW]))
    parquet.write_table(pyarrow.Table.from_pylist([FIELD_ROW, FIELD_ROW]), tmp_path / "sums.parquet")
    rows = load_file(tmp_path / "sums.parquet")
    assert [(e.prompt, e.ground_truth, e.extra_info) for e in rows] == [
        (e.prompt, e.ground_truth, e.extra_info) for e in lines
    ]
    assert rows[1].origin.endswith("sums.parquet:row 2")


def test_gsm8k_as_published_is_known_by_its_columns(tmp_path: Path) -> None:
    first, second = load_file(write_lines(tmp_path / "train.jsonl", GSM8K_ROWS))
    assert (first.prompt, first.ground_truth, first.data_source) == ("How many?", "1200", "openai/gsm8k")
    assert first.demonstration == GSM8K_ROWS[0]["answer"]
    assert second.ground_truth == "-3"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{", r"bad\.jsonl:2: .*every line must be one JSON object"),
        ([1], r"bad\.jsonl:2: a list; every line must be one JSON object"),
        ({"text": "hello"}, r"bad\.jsonl:2: prompt: None; must be there \(columns found: text\)"),
        ({"prompt": ""}, r"bad\.jsonl:2: prompt: ''; must be a string or a list"),
        ({"prompt": [{"role": "user"}]}, r"bad\.jsonl:2: prompt: .*; a message has the strings"),
        ({"prompt": "x", "answer": "1", "solution": "2"}, r"bad\.jsonl:2: ground_truth: .*; ambiguous"),
        ({"prompt": "x", "extra_info": "y"}, r"bad\.jsonl:2: extra_info: 'y'; must be a mapping"),
        ({"prompt": "x", "data_source": 3}, r"bad\.jsonl:2: data_source: 3; must be a string"),
        ({"prompt": "x", "demonstration": 3}, r"bad\.jsonl:2: demonstration: 3; must be a string"),
    ],
)
def test_a_bad_row_is_refused_by_file_line_field_and_rule(tmp_path: Path, row: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        load_file(write_lines(tmp_path / "bad.jsonl", [FIELD_ROW, row]))


def test_a_gsm8k_row_without_its_mark_is_refused(tmp_path: Path) -> None:
    rows = [*GSM8K_ROWS, {"question": "Why?", "answer": "Because."}]
    with pytest.raises(ValueError, match=r"train\.jsonl:3: answer: 'Because\.'; must end with '#### '"):
        load_file(write_lines(tmp_path / "train.jsonl", rows))


@pytest.mark.parametrize(
    ("name", "content", "said"), [("a.csv", "x", r"must end in"), ("a.jsonl", "\n", "holds no row")]
)
def test_a_file_of_no_use_is_refused(tmp_path: Path, name: str, content: str, said: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=said):
        load_file(tmp_path / name)


def test_a_damaged_parquet_file_is_refused_by_name(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing else")
    with pytest.raises(ValueError, match=r"a\.parquet'; not a readable parquet file"):
        load_file(tmp_path / "a.parquet")


def test_a_prompt_that_occurs_twice_is_never_on_two_sides(tmp_path: Path) -> None:
    rows = [{"prompt": f"question {number % 20}", "answer": str(number)} for number in range(60)]
    path = write_lines(tmp_path / "twice.jsonl", rows)
    for seed in range(5):
        splits = load_splits(DataConfig(path=str(path), held_out=5, dev=4, seed=seed))
        sides = [{example.text for example in side} for side in (splits.train, splits.dev, splits.held_out)]
        assert [len(side) for side in sides] == [11, 4, 5]
        assert len(set.union(*sides)) == 20
        assert len(splits.train) == 33, "every row of a training prompt trains"


def test_a_data_sets_examples_are_numbered_by_their_places(tmp_path: Path) -> None:
    rows = [{"prompt": str(number), "answer": "x"} for number in range(30)]
    splits = load_splits(DataConfig(path=str(write_lines(tmp_path / "rows.jsonl", rows)), held_out=10))
    for side in (splits.train, splits.held_out, splits.train[5:9]):
        assert [example.index for example in side] == list(range(len(side)))


def test_the_evaluation_file_is_the_held_out_set_up_to_its_limit(tmp_path: Path) -> None:
    train = write_lines(tmp_path / "train.jsonl", [{"prompt": "a", "answer": "b"}])
    test = write_lines(tmp_path / "test.jsonl", [{"prompt": str(n), "answer": "b"} for n in range(9)])
    splits = load_splits(DataConfig(path=str(train)), EvalConfig(path=str(test), limit=4))
    assert [example.prompt for example in splits.held_out] == ["0", "1", "2", "3"]
    assert [example.prompt for example in splits.train] == ["a"]


def test_a_split_that_leaves_nothing_to_train_on_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "few.jsonl", [{"prompt": str(n), "answer": "x"} for n in range(3)])
    with pytest.raises(ValueError, match=r"data\.held_out, data\.dev: 2, 1; must leave prompts to train on, of 3"):
        load_splits(DataConfig(path=str(path), held_out=2, dev=1))


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    examples = load_file(write_lines(tmp_path / "train.jsonl", GSM8K_ROWS))
    examples += load_file(write_lines(tmp_path / "sums.jsonl", [FIELD_ROW]))
    save_file(tmp_path / "saved.jsonl", examples)
    again = load_file(tmp_path / "saved.jsonl")
    assert [dataclasses.replace(e, origin="", index=0) for e in again] == [
        dataclasses.replace(e, origin="", index=0) for e in examples
    ]
