"""Responses that a weight update aborts and that go on from their own tokens: on a real engine, under real updates."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flowrl.rollout.embedded.engine import EmbeddedEngine
from flowrl.rollout.engine import FinishReason, GenerateRequest, Generation, PauseMode, SamplingParams
from flowrl.rollout.episodes.resuming import ResumingEngine
from tests.rollout.conformance import Models, assert_logprobs, models, prompts, request  # noqa: F401

LONG = 300
NUM_REQUESTS = 6


@pytest.fixture
def engine() -> Iterator[ResumingEngine]:
    torch.set_num_threads(1)
    yield ResumingEngine(EmbeddedEngine(max_batch=4, prefill_tokens=64, threads=1))


def run(engine: ResumingEngine, path: Path, work: Coroutine[Any, Any, Any]) -> Any:
    async def served() -> Any:
        await engine.start(path, 0)
        try:
            return await asyncio.wait_for(work, 60)
        finally:
            await engine.close()

    return asyncio.run(served())


async def begin(engine: ResumingEngine, requests: list[GenerateRequest]) -> list[asyncio.Task[Generation]]:
    """Tasks of requests of which those that have a place have tokens: one that came just before them has ended."""
    pilot = asyncio.create_task(engine.generate(request("pilot", (3, 4), 8)))
    running = [asyncio.create_task(engine.generate(one)) for one in requests]
    await pilot
    return running


def test_a_response_keeps_its_tokens_over_updates_and_goes_on_under_the_new_weights(
    engine: ResumingEngine,
    models: Models,  # noqa: F811
) -> None:
    """More requests than places, three updates: each token's log-prob is that of the weights that its version names."""
    paths = [models.first, models.second, models.first, models.second]
    texts = prompts(NUM_REQUESTS)

    async def updates_underway() -> list[Generation]:
        running = await begin(engine, [request(f"r{i}", text, LONG, seed=i) for i, text in enumerate(texts)])
        for version in (1, 2, 3):
            await engine.load_weights(paths[version], version, PauseMode.ABORT)
            await asyncio.sleep(0.02)
        return await asyncio.gather(*running)

    results = run(engine, models.first, updates_underway())
    for text, result in zip(texts, results, strict=True):
        assert len(result.tokens) == LONG and result.finish_reason is FinishReason.LENGTH
        assert (np.diff(result.versions) >= 0).all()
        for version in set(result.versions.tolist()):
            [places] = np.nonzero(result.versions == version)
            assert_logprobs(paths[version], text, result, 1.0, slice(places[0], places[-1] + 1))
    assert max(len(set(result.versions.tolist())) for result in results) > 1


def test_stop_tokens_still_end_a_resumed_response(engine: ResumingEngine, models: Models) -> None:  # noqa: F811
    stops = tuple(range(0, 128, 16))

    async def updates_underway() -> list[Generation]:
        running = await begin(engine, [request(f"r{i}", (1, 2, i), LONG, stop_token_ids=stops) for i in range(24)])
        await engine.load_weights(models.second, 1, PauseMode.ABORT)
        return await asyncio.gather(*running)

    for result in run(engine, models.first, updates_underway()):
        assert int(result.tokens[-1]) in stops and result.finish_reason is FinishReason.STOP
        assert not set(result.tokens[:-1].tolist()) & set(stops)


def test_who_asks_for_an_abort_gets_one_also_after_an_update(engine: ResumingEngine, models: Models) -> None:  # noqa: F811
    async def abort_after_update() -> list[Generation]:
        running = await begin(engine, [request(f"r{i}", (1, 2, 3), LONG) for i in range(3)])
        await engine.load_weights(models.second, 1, PauseMode.ABORT)
        await engine.abort("r0")
        first = await running[0]
        await engine.abort()
        return [first, *await asyncio.gather(*running[1:])]

    for result in run(engine, models.first, abort_after_update()):
        assert result.finish_reason is FinishReason.ABORT and 0 < len(result.tokens) < LONG


def test_an_aborting_pause_holds_responses_until_it_is_over(engine: ResumingEngine, models: Models) -> None:  # noqa: F811
    async def pause_underway() -> Generation:
        [running] = await begin(engine, [request("r", (1, 2, 3), LONG)])
        await engine.pause(PauseMode.ABORT)
        await engine.load_weights(models.second, 1, PauseMode.ABORT)
        done, _ = await asyncio.wait([running], timeout=0.3)
        assert not done
        await engine.resume()
        return await running

    result = run(engine, models.first, pause_underway())
    assert len(result.tokens) == LONG and set(result.versions.tolist()) == {0, 1}


def test_a_failed_update_leaves_no_response_waiting(engine: ResumingEngine, models: Models) -> None:  # noqa: F811
    async def update_that_fails() -> Generation:
        [running] = await begin(engine, [request("r", (1, 2, 3), LONG)])
        with pytest.raises(Exception, match="unfit"):
            await engine.load_weights(models.unfit, 1, PauseMode.ABORT)
        return await running

    assert len(run(engine, models.first, update_that_fails()).tokens) == LONG


def test_a_resumed_response_draws_other_random_numbers(engine: ResumingEngine, models: Models) -> None:  # noqa: F811
    """With the same weights on both sides, its second half would otherwise begin with the draws of its first."""

    async def twice() -> Generation:
        [running] = await begin(engine, [request("r", (1, 2, 3), LONG, seed=5)])
        await engine.load_weights(models.first, 1, PauseMode.ABORT)
        return await running

    result = run(engine, models.first, twice())
    cut = int((result.versions == 0).sum())
    num = min(cut, LONG - cut, 50)
    assert result.tokens[:num].tolist() != result.tokens[cut : cut + num].tolist()


@pytest.mark.parametrize("params", [{"stop_strings": ("x",)}, {"repetition_penalty": 1.2}])
def test_what_looks_back_on_a_response_is_refused(engine: ResumingEngine, params: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="look back"):
        asyncio.run(engine.generate(request("r", (1, 2), 4, **params)))


def test_name_of_a_running_request_is_refused(engine: ResumingEngine, models: Models) -> None:  # noqa: F811
    async def same_name_twice() -> None:
        [running] = await begin(engine, [request("same", (1, 2, 3), LONG)])
        with pytest.raises(ValueError, match="request_id"):
            await engine.generate(
                GenerateRequest(request_id="same", tokens=(1,), sampling=SamplingParams(max_tokens=1))
            )
        await engine.abort()
        await running

    run(engine, models.first, same_name_twice())
