"""From the recipe to its three data sets. Deterministic: every process that asks gets the same, row for row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from flowrl.config import DataConfig, EvalConfig
from flowrl.data.example import Dataset, Example
from flowrl.data.files import read_rows
from flowrl.data.gym import draw_examples
from flowrl.data.rows import layout_of, to_example


@dataclass(frozen=True)
class Splits:
    """No prompt is in two of them. train: what groups are drawn from. dev: where the warm start looks. held_out: what
    is evaluated, at most `eval.limit` prompts."""

    train: Dataset
    dev: Dataset
    held_out: Dataset


def load_splits(data: DataConfig, evaluation: EvalConfig | None = None) -> Splits:
    """Reads or draws the data, and sets `data.held_out` and `data.dev` prompts apart by `data.seed`. With `eval.path`
    the held-out set is that file's.

    Raises ValueError naming file, line, field and rule.
    """
    if data.source == "reasoning_gym":
        examples = draw_examples(data)
    else:
        assert data.path is not None, "DataConfig refuses source=auto without a path"
        examples = load_file(Path(data.path))
    splits = split(examples, data)
    if evaluation is None:
        return splits
    held_out = Dataset(load_file(Path(evaluation.path))) if evaluation.path is not None else splits.held_out
    return Splits(splits.train, splits.dev, held_out[: evaluation.limit])


def load_file(path: Path) -> list[Example]:
    """Every row of a JSONL or parquet file; the first one says whether it is GSM8K as published."""
    examples: list[Example] = []
    layout = None
    for origin, row in read_rows(path):
        layout = layout or layout_of(row)
        examples.append(to_example(row, layout, len(examples), origin, default_source=path.stem))
    if not examples:
        raise ValueError(f"data.path: {str(path)!r}; holds no row")
    return examples


def save_file(path: Path, examples: Iterable[Example]) -> None:
    """JSONL in the field's columns, which `load_file` reads back to equal examples but for their origin."""
    columns = ("prompt", "data_source", "ground_truth", "extra_info", "demonstration")
    with path.open("wb") as file:
        for example in examples:
            file.write(msgspec.json.encode({name: getattr(example, name) for name in columns}) + b"\n")


def split(examples: Sequence[Example], data: DataConfig) -> Splits:
    """Cuts a seeded permutation into held-out, development and training set. A prompt that occurs several times stays
    on one side: once it is held out or in development, its other rows are left out.

    Raises ValueError if nothing remains for training.
    """
    apart = data.held_out + data.dev
    if apart == 0:
        return Splits(Dataset(examples), Dataset(()), Dataset(()))
    set_apart: dict[str, Example] = {}
    train: list[Example] = []
    for place in np.random.default_rng(data.seed).permutation(len(examples)):
        example = examples[place]
        if example.text in set_apart:
            continue
        if len(set_apart) < apart:
            set_apart[example.text] = example
        else:
            train.append(example)
    if not train:
        raise ValueError(
            f"data.held_out, data.dev: {data.held_out}, {data.dev}; must leave prompts to train on, "
            f"of {len(examples)} (data.size={data.size})"
        )
    chosen = list(set_apart.values())
    return Splits(Dataset(train), Dataset(chosen[data.held_out :]), Dataset(chosen[: data.held_out]))
