"""The proximal stage's bookkeeping, and the numbers it puts against a model that is loaded plainly."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from flowrl.config.recipe import LEAST_LAG
from flowrl.stages.proximal import ProximalStage
from flowrl.stages.segments import HeldRow, Segments
from flowrl.trainer.packing import Sample
from tests.trainer.cases import TEMPERATURE, make_model, padded_scores
from transfer_queue.rows import RowKey


def row(versions: list[int], index: int = 0) -> HeldRow:
    length = len(versions)
    draw = np.random.default_rng(index)
    sample = Sample(
        key=RowKey("train", 0, index),
        prompt_tokens=draw.integers(0, 48, 3).astype(np.int32),
        response_tokens=draw.integers(0, 48, length).astype(np.int32),
        response_mask=np.ones(length, np.uint8),
        rollout_logprobs=np.zeros(length, np.float32),
        advantage=0.0,
    )
    return HeldRow.of(sample, np.array(versions))


def settle_all(segments: Segments, newest: int, gone: set[int] = frozenset()) -> None:  # type: ignore[assignment]
    """Every owed token gets the number of the version that scored it."""
    for version, rows in segments.owed(newest):
        scores = [np.full(len(held.version_T), version + 1, np.float32) for held in rows]
        segments.settle(version, rows, None if version + 1 in gone else scores)


def test_a_row_waits_for_the_version_after_its_youngest_token() -> None:
    segments = Segments(max_staleness=4)
    segments.add([row([3, 3, 4])])
    settle_all(segments, newest=4)
    assert not segments.finished()
    settle_all(segments, newest=5)
    (held,) = segments.finished()
    assert held.value_T.tolist() == [4, 4, 5] and len(segments) == 0


def test_a_row_does_not_wait_for_tokens_that_can_never_be_two_updates_old() -> None:
    segments = Segments(max_staleness=2)
    segments.add([row([3, 4])])
    settle_all(segments, newest=4)
    (held,) = segments.finished()
    np.testing.assert_array_equal(held.value_T, [4, np.nan])


def test_weights_that_are_gone_leave_their_tokens_absent() -> None:
    segments = Segments(max_staleness=4)
    segments.add([row([1, 2, 3])])
    settle_all(segments, newest=4, gone={2, 3})
    (held,) = segments.finished()
    np.testing.assert_array_equal(held.value_T, [np.nan, np.nan, 4])


def test_rows_that_must_have_been_trained_are_forgotten() -> None:
    segments = Segments(max_staleness=2)
    segments.add([row([3, 3]), row([9, 9], index=1)])
    settle_all(segments, newest=9)
    assert len(segments) == 1 and not segments.finished()


@settings(max_examples=200, deadline=None)
@given(
    st.integers(2, 6),
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), min_size=1, max_size=6),
    st.integers(0, 4),
)
def test_whatever_is_put_is_the_next_versions_and_all_that_matters_is_put(
    bound: int, steps: list[list[int]], start: int
) -> None:
    """Rows come at any time, every version is published: what is put lacks nothing that an update could want."""
    segments = Segments(bound)
    rows = [row((start + np.cumsum(given)).tolist(), index) for index, given in enumerate(steps)]
    for newest in range(start, start + 30):
        segments.add(held for held in rows if int(held.version_T.max()) == newest)
        settle_all(segments, newest)
        for held in segments.finished():
            oldest = int(held.version_T.min())
            for version, value in zip(held.version_T, held.value_T, strict=True):
                assert np.isnan(value) or value == version + 1
                assert not np.isnan(value) or oldest + bound - version < LEAST_LAG
    assert len(segments) == 0


class Queue:
    """What the stage asks of a queue: hands out rows once, keeps what is put."""

    def __init__(self) -> None:
        self.columns: dict[RowKey, np.ndarray] = {}

    def put(self, keys: list[RowKey], columns: dict[str, Any]) -> None:
        (column,) = columns.values()
        self.columns |= dict(zip(keys, column, strict=True))


def test_the_stage_puts_log_probs_of_the_version_after_each_tokens_own(tmp_path: Path) -> None:
    model_dir = make_model(tmp_path / "base")
    paths = {version: tmp_path / f"v{version}" for version in (4, 5)}
    for version, path in paths.items():
        shutil.copytree(model_dir, path)
        lm = AutoModelForCausalLM.from_pretrained(model_dir)
        with torch.no_grad():
            for parameter in lm.parameters():
                parameter += 0.02 * version * torch.randn(parameter.shape, generator=torch.manual_seed(version))
        lm.save_pretrained(path)
    announced: dict[str, Any] = {}
    context: Any = SimpleNamespace(device="cpu", stopping=threading.Event(), on=announced.__setitem__)
    recipe: Any = SimpleNamespace(
        model=SimpleNamespace(path=model_dir), rollout=SimpleNamespace(temperature=TEMPERATURE),
        train=SimpleNamespace(micro_batch_tokens=40), staleness=SimpleNamespace(max=4),
    )  # fmt: skip
    stage, queue = ProximalStage(context, recipe), Queue()
    rows = [row([3, 3, 4], 0), row([4, 4, 4, 4, 4], 1), row([3], 2)]
    for version, path in paths.items():
        announced["published"]({"version": version, "path": str(path)})
        stage.segments.add(held for held in rows if int(held.version_T.max()) == version)
        stage.settle()
        stage.put(queue)  # type: ignore[arg-type]
        stage.segments.add([rows[2]] if version == 4 else [])
    stage.settle()
    stage.put(queue)  # type: ignore[arg-type]
    for held in rows:
        for version in (3, 4):
            lm = AutoModelForCausalLM.from_pretrained(paths[version + 1], dtype=torch.float64).eval()
            with torch.no_grad():
                expected_BT = padded_scores(lm, [held.sample]).logprob_BT
            is_ours = held.version_T == version
            np.testing.assert_allclose(queue.columns[held.key][is_ours], expected_BT[0].numpy()[is_ours], atol=1e-4)
    assert len(queue.columns) == 3


@pytest.mark.parametrize("path", [None, Path("/nowhere/v00000004")])
def test_weights_that_cannot_be_had_are_no_failure(path: Path | None, tmp_path: Path) -> None:
    context: Any = SimpleNamespace(device="cpu", stopping=threading.Event(), on=lambda topic, callback: None)
    recipe: Any = SimpleNamespace(
        model=SimpleNamespace(path=make_model(tmp_path)), rollout=SimpleNamespace(temperature=1.0),
        train=SimpleNamespace(micro_batch_tokens=40), staleness=SimpleNamespace(max=4),
    )  # fmt: skip
    assert not ProximalStage(context, recipe).load(4, path)
