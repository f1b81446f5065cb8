from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from flowrl.config import DataConfig
from flowrl.data.datasets import Splits, load_splits

pytest.importorskip("reasoning_gym")

WORDS = {"min_word_len": 3, "max_word_len": 5}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "flowrl"


def spell(size: int = 400, **fields: object) -> DataConfig:
    given = {"options": WORDS, "held_out": 30, "dev": 20, **fields}
    return DataConfig(source="reasoning_gym", task="spell_backward", size=size, **given)  # type: ignore[arg-type]


def questions(splits: Splits) -> list[list[str]]:
    return [[example.text for example in side] for side in (splits.train, splits.dev, splits.held_out)]


def test_drawn_questions_are_distinct_and_on_one_side_each() -> None:
    train, dev, held_out = questions(load_splits(spell()))
    assert (len(dev), len(held_out)) == (20, 30)
    every = train + dev + held_out
    assert len(set(every)) == len(every) > 300


def test_examples_carry_answer_demonstration_and_what_the_verifier_needs() -> None:
    example = load_splits(spell()).train[0]
    word = example.text.rpartition(" ")[2]
    assert example.ground_truth == example.demonstration == word[::-1]
    assert example.extra_info["task"] == example.data_source == "spell_backward"
    assert example.extra_info["options"] == WORDS


def test_seed_decides_and_repeats() -> None:
    assert questions(load_splits(spell())) == questions(load_splits(spell()))
    assert questions(load_splits(spell())) != questions(load_splits(spell(seed=1)))


def test_what_was_drawn_is_kept_and_the_library_not_imported_again(cache: Path) -> None:
    drawn = questions(load_splits(spell()))
    code = (
        "import sys; from flowrl.config import DataConfig; from flowrl.data.datasets import load_splits\n"
        f"splits = load_splits({spell()!r})\n"
        "assert 'reasoning_gym' not in sys.modules\n"
        "print([[e.text for e in side] for side in (splits.train, splits.dev, splits.held_out)])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout
    assert said.strip() == str(drawn)
    assert len(list(cache.iterdir())) == 1


def test_a_damaged_cache_file_is_drawn_anew(cache: Path) -> None:
    drawn = questions(load_splits(spell()))
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    assert questions(load_splits(spell())) == drawn
    assert file.stat().st_size > 100


def test_a_home_that_cannot_be_written_to_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(load_splits(spell()).held_out) == 30


def test_sixty_thousand_draws_take_seconds() -> None:
    start = time.monotonic()
    splits = load_splits(spell(60_000))
    assert time.monotonic() - start < 10
    assert len(splits.train) > 10_000


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"task": "no_such_task"}, r"^data\.task: 'no_such_task'; no such task"),
        ({"task": "spell_backward", "options": {"colour": "red"}}, r"^data\.options: .*colour"),
        ({"task": "spell_backward", "options": {"min_word_len": 9, "max_word_len": 3}}, r"^data\.options: "),
    ],
)
def test_an_unknown_task_or_option_is_refused_by_name(fields: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        load_splits(DataConfig(source="reasoning_gym", **fields))  # type: ignore[arg-type]
