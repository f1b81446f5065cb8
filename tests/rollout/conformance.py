"""What every rollout engine must do, on real weights and, where the engine has one, a real server.

A test module subclasses `EngineConformance`, imports the fixtures `models`, `runner` and `engine`, and provides the
module-scoped fixture `make_engine`: a function that returns an engine not yet started, float32, for at least
`MAX_MODEL_TOKENS` tokens a request, preferably with fewer slots than `NUM_CROWD`. The engine is shared by a module's
tests; before each it serves `models.first`, unpaused, under a version of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flowrl.rollout.engine import (
    Engine,
    EngineError,
    FinishReason,
    GenerateRequest,
    Generation,
    PauseMode,
    SamplingParams,
)
from tests.rollout.reference import (
    CONFIGS,
    MAX_MODEL_TOKENS,
    VOCABULARY,
    reference_logits,
    reference_logprobs,
    token_text,
    write_model,
    write_tokenizer,
)

NUM_CROWD = 48
TOLERANCE = 1e-3
TIMEOUT_S = 60.0
# Long enough to be under way still when something happens to it.
LONG = 600
UNDERWAY_S = 0.15


@dataclass(frozen=True)
class Models:
    """Two models of one shape, and one of another."""

    first: Path
    second: Path
    unfit: Path


@dataclass
class Served:
    """A started engine and how to run something on its loop. `versions` gives numbers never used before."""

    engine: Engine
    runner: asyncio.Runner
    versions: Iterator[int] = field(default_factory=lambda: iter(range(1, 1_000_000)))

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.runner.run(asyncio.wait_for(work, TIMEOUT_S))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    root = tmp_path_factory.mktemp("models")
    unfit = write_model(root / "unfit", 2, CONFIGS["llama"])
    return Models(write_tokenizer(write_model(root / "first", 0)), write_model(root / "second", 1), unfit)


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def engine(make_engine: Callable[[], Engine], models: Models, runner: asyncio.Runner) -> Iterator[Served]:
    served = Served(make_engine(), runner)
    served.runner.run(served.engine.start(models.first, 0))
    yield served
    served.run(served.engine.close())


def request(name: str, prompt: tuple[int, ...], max_tokens: int, **params: Any) -> GenerateRequest:
    return GenerateRequest(request_id=name, tokens=prompt, sampling=SamplingParams(max_tokens=max_tokens, **params))


def prompts(count: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Prompts of 3 to 40 random tokens."""
    rng = np.random.default_rng(seed)
    return [tuple(rng.integers(VOCABULARY, size=rng.integers(3, 41)).tolist()) for _ in range(count)]


def assert_logprobs(path: Path, prompt: tuple[int, ...], part: Generation, temperature: float, keep: slice) -> None:
    """The log-probs of the tokens `keep` are those of a forward with the weights of `path`."""
    response = part.tokens.tolist()
    expected = reference_logprobs(path, prompt, response, temperature)
    chosen = expected[torch.arange(len(response)), torch.tensor(response)].numpy()
    np.testing.assert_allclose(part.logprobs[keep], chosen[keep], atol=TOLERANCE)


class EngineConformance:
    """Engines whose seeds do not fix the tokens set `has_seeds = False`; those that refuse a repetition penalty,
    `has_repetition_penalty = False`; those that must be restarted after weights that do not fit,
    `survives_unfit_weights = False`."""

    has_seeds = True
    has_repetition_penalty = True
    survives_unfit_weights = True

    @pytest.fixture(autouse=True)
    def _serve_first_model(self, engine: Served, models: Models) -> None:
        async def reset() -> None:
            await engine.engine.resume()
            await engine.engine.load_weights(models.first, next(engine.versions), PauseMode.ABORT)

        engine.run(reset())

    def test_version_is_minus_one_before_the_start(self, make_engine: Callable[[], Engine]) -> None:
        assert make_engine().version == -1

    def test_capabilities_name_length_and_pause_modes(self, engine: Served) -> None:
        assert engine.engine.capabilities.max_model_tokens >= MAX_MODEL_TOKENS
        assert engine.engine.capabilities.pause_modes

    def test_concurrent_greedy_requests_get_the_best_tokens_of_their_own_prompts(
        self, engine: Served, models: Models
    ) -> None:
        requests = [request(f"r{i}", prompt, 4 + i % 9, temperature=0.0) for i, prompt in enumerate(prompts(24))]
        for one, result in zip(requests, generate(engine, requests), strict=True):
            assert len(result.tokens) == one.sampling.max_tokens
            logprobs = reference_logprobs(models.first, one.tokens, result.tokens.tolist())
            chosen = logprobs[torch.arange(len(result.tokens)), torch.from_numpy(result.tokens).long()]
            assert (chosen >= logprobs.max(dim=-1).values - TOLERANCE).all()

    @pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
    def test_logprobs_are_those_of_a_forward_at_the_sampling_temperature(
        self, engine: Served, models: Models, temperature: float
    ) -> None:
        requests = [request(f"r{i}", prompt, 24, temperature=temperature) for i, prompt in enumerate(prompts(8))]
        for one, result in zip(requests, generate(engine, requests), strict=True):
            assert_logprobs(models.first, one.tokens, result, temperature, slice(None))

    def test_filters_restrict_the_tokens_but_not_the_logprobs(self, engine: Served, models: Models) -> None:
        kinds: list[dict[str, Any]] = [{"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.3}]
        requests = [request(f"r{i}", prompt, 30, **kinds[i % 3]) for i, prompt in enumerate(prompts(12))]
        for one, result in zip(requests, generate(engine, requests), strict=True):
            assert_logprobs(models.first, one.tokens, result, 1.0, slice(None))
            probs = reference_logprobs(models.first, one.tokens, result.tokens.tolist()).exp()
            chosen = probs[torch.arange(len(result.tokens)), torch.from_numpy(result.tokens).long()]
            better = (probs > chosen[:, None] + TOLERANCE) * probs
            assert one.sampling.top_k == 0 or ((better > 0).sum(dim=-1) < one.sampling.top_k).all()
            assert (better.sum(dim=-1) < one.sampling.top_p + TOLERANCE).all()
            assert (chosen >= one.sampling.min_p * probs.max(dim=-1).values - TOLERANCE).all()

    def test_length_limit_ends_a_response(self, engine: Served) -> None:
        [result] = generate(engine, [request("r", (5, 6, 7), 11)])
        assert result.finish_reason is FinishReason.LENGTH
        assert (result.tokens.dtype, result.logprobs.dtype, result.versions.dtype) == (np.int32, np.float32, np.int32)
        assert result.tokens.shape == result.logprobs.shape == result.versions.shape == (11,)

    def test_stop_token_ends_a_response_and_is_part_of_it(self, engine: Served) -> None:
        [free] = generate(engine, [request("free", (9, 8, 7), 40, temperature=0.0)])
        stop = int(free.tokens[5])
        first = free.tokens.tolist().index(stop)
        stops = (stop, VOCABULARY - 1)
        [stopped] = generate(engine, [request("stop", (9, 8, 7), 40, temperature=0.0, stop_token_ids=stops)])
        assert stopped.finish_reason is FinishReason.STOP
        assert stopped.tokens.tolist() == free.tokens.tolist()[: first + 1]

    def test_stop_string_ends_a_response_with_the_token_that_completes_it(self, engine: Served) -> None:
        asked = request("free", (9, 8, 7), 40, temperature=0.0)
        [free] = generate(engine, [asked])
        text = "".join(map(token_text, free.tokens.tolist()))
        stop = text[9:12]  # from the middle of a token to the end of another
        [stopped] = generate(engine, [request("stop", (9, 8, 7), 40, temperature=0.0, stop_strings=("nowhere", stop))])
        assert stopped.finish_reason is FinishReason.STOP
        count = len(stopped.tokens)
        assert stopped.tokens.tolist() == free.tokens.tolist()[:count]
        assert len(stopped.logprobs) == len(stopped.versions) == count
        assert stop in text[: 2 * count] and stop not in text[: 2 * count - 2]

    def test_repetition_penalty_weighs_what_the_response_has_and_the_logprobs_say_so(
        self, engine: Served, models: Models
    ) -> None:
        if not self.has_repetition_penalty:
            with pytest.raises(ValueError, match="repetition_penalty"):
                generate(engine, [request("r", (1, 2), 4, repetition_penalty=1.5)])
            return
        requests = [
            request(f"r{i}", one, 20, repetition_penalty=1.5, temperature=0.8) for i, one in enumerate(prompts(4))
        ]
        for one, result in zip(requests, generate(engine, requests), strict=True):
            response = result.tokens.tolist()
            logits = reference_logits(models.first, one.tokens, response)
            for place, token in enumerate(response):
                seen = torch.tensor(sorted(set(response[:place])), dtype=torch.long)
                old = logits[place, seen]
                logits[place, seen] = torch.where(old < 0, old * 1.5, old / 1.5)
                expected = torch.log_softmax(logits[place] / 0.8, dim=-1)[token]
                assert abs(float(expected) - float(result.logprobs[place])) < TOLERANCE

    def test_seed_fixes_the_tokens_whatever_else_runs(self, engine: Served) -> None:
        if not self.has_seeds:
            pytest.skip("this engine does not honour seeds")
        [alone] = generate(engine, [request("alone", (1, 2, 3), 40, seed=7)])
        crowd = [request(f"r{i}", prompt, 5 + i, seed=i) for i, prompt in enumerate(prompts(NUM_CROWD))]
        again, other, *_ = generate(
            engine, [request("again", (1, 2, 3), 40, seed=7), request("other", (1, 2, 3), 40, seed=8), *crowd]
        )
        assert alone.tokens.tolist() == again.tokens.tolist() != other.tokens.tolist()

    def test_unseeded_samples_of_one_prompt_differ(self, engine: Served) -> None:
        results = generate(engine, [request(f"r{i}", (1, 2, 3), 20) for i in range(8)])
        assert len({tuple(result.tokens.tolist()) for result in results}) > 1

    def test_more_requests_than_slots_all_finish(self, engine: Served, models: Models) -> None:
        shared = prompts(NUM_CROWD // 4)
        requests = [request(f"r{i}", shared[i // 4], 1 + i % 13) for i in range(NUM_CROWD)]
        for one, result in zip(requests, generate(engine, requests), strict=True):
            assert len(result.tokens) == one.sampling.max_tokens
            assert_logprobs(models.first, one.tokens, result, 1.0, slice(None))

    def test_every_token_names_the_version_that_sampled_it(self, engine: Served, models: Models) -> None:
        async def twice() -> list[Generation]:
            before = await engine.engine.generate(request("before", (1, 2, 3), 6))
            await engine.engine.load_weights(models.second, 1_000_001)
            return [before, await engine.engine.generate(request("after", (1, 2, 3), 6))]

        version = engine.engine.version
        before, after = engine.run(twice())
        assert set(before.versions.tolist()) == {version}
        assert set(after.versions.tolist()) == {1_000_001} == {engine.engine.version}
        assert_logprobs(models.second, (1, 2, 3), after, 1.0, slice(None))

    @pytest.mark.parametrize("pauses", [False, True])
    def test_recompute_continues_a_response_as_if_the_new_weights_had_read_it(
        self, engine: Served, models: Models, pauses: bool
    ) -> None:
        async def update_underway() -> list[Generation]:
            running = await start(engine, [request(f"r{i}", prompt, LONG) for i, prompt in enumerate(prompts(3))])
            if pauses:
                await engine.engine.pause(PauseMode.RECOMPUTE)
            await engine.engine.load_weights(models.second, new, PauseMode.RECOMPUTE)
            if pauses:
                await engine.engine.resume()
            return await asyncio.gather(*running)

        old, new = engine.engine.version, next(engine.versions)
        for prompt, result in zip(prompts(3), engine.run(update_underway()), strict=True):
            num_old = int((result.versions == old).sum())
            assert 0 < num_old < LONG == len(result.tokens)
            assert result.versions.tolist() == [old] * num_old + [new] * (LONG - num_old)
            assert_logprobs(models.first, prompt, result, 1.0, slice(0, num_old))
            assert_logprobs(models.second, prompt, result, 1.0, slice(num_old, None))

    def test_kept_kv_serves_running_requests_and_no_new_ones(self, engine: Served, models: Models) -> None:
        async def update_underway() -> list[Generation]:
            [running] = await start(engine, [request("running", prompt, LONG)])
            await engine.engine.load_weights(models.second, new, PauseMode.KEEP)
            fresh = await engine.engine.generate(request("fresh", prompt, 12))
            return [await running, fresh]

        prompt = tuple(range(40))
        old, new = engine.engine.version, next(engine.versions)
        running, fresh = engine.run(update_underway())
        assert set(running.versions.tolist()) == {old, new} and len(running.tokens) == LONG
        assert_logprobs(models.first, prompt, running, 1.0, slice(0, int((running.versions == old).sum())))
        assert set(fresh.versions.tolist()) == {new}
        assert_logprobs(models.second, prompt, fresh, 1.0, slice(None))

    def test_aborting_update_returns_what_the_old_weights_wrote(self, engine: Served, models: Models) -> None:
        async def update_underway() -> Generation:
            [running] = await start(engine, [request("running", (1, 2, 3), LONG)])
            await engine.engine.load_weights(models.second, next(engine.versions), PauseMode.ABORT)
            return await running

        old = engine.engine.version
        result = engine.run(update_underway())
        assert result.finish_reason is FinishReason.ABORT
        assert 0 < len(result.tokens) < LONG and set(result.versions.tolist()) == {old}
        assert_logprobs(models.first, (1, 2, 3), result, 1.0, slice(None))

    @pytest.mark.parametrize("mode", [PauseMode.KEEP, PauseMode.RECOMPUTE])
    def test_paused_engine_generates_nothing_until_resumed(
        self, engine: Served, models: Models, mode: PauseMode
    ) -> None:
        async def pause_underway() -> list[Generation]:
            running = await start(engine, [request("running", (1, 2, 3), LONG)])
            await engine.engine.pause(mode)
            running += submit(engine, [request("late", (4, 5, 6), 4)])
            _, pending = await asyncio.wait(running, timeout=0.8)
            assert len(pending) == 2
            await engine.engine.resume()
            return await asyncio.gather(*running)

        for prompt, result in zip([(1, 2, 3), (4, 5, 6)], engine.run(pause_underway()), strict=True):
            assert result.finish_reason is FinishReason.LENGTH
            assert_logprobs(models.first, prompt, result, 1.0, slice(None))

    def test_aborting_pause_ends_running_requests(self, engine: Served) -> None:
        async def pause_underway() -> Generation:
            [running] = await start(engine, [request("running", (1, 2, 3), LONG)])
            await engine.engine.pause(PauseMode.ABORT)
            result = await running
            await engine.engine.resume()
            return result

        assert 0 < len(engine.run(pause_underway()).tokens) < LONG

    def test_memory_given_back_in_a_pause_costs_no_request_a_token(self, engine: Served, models: Models) -> None:
        async def lend_memory() -> list[Generation]:
            running = await start(engine, [request(f"r{i}", prompt, LONG) for i, prompt in enumerate(prompts(3))])
            with pytest.raises(ValueError, match="release_memory"):
                await engine.engine.release_memory()
            await engine.engine.pause(PauseMode.RECOMPUTE)
            await engine.engine.release_memory()
            running += submit(engine, [request("late", prompts(3)[0], 4), request("gone", (4, 5, 6), LONG)])
            await asyncio.sleep(0.1)  # they reach the engine
            for refused in (engine.engine.resume(), engine.engine.load_weights(models.second, new)):
                with pytest.raises(ValueError, match="resume_memory"):
                    await refused
            await engine.engine.abort("gone")
            await engine.engine.resume_memory()
            await engine.engine.load_weights(models.second, new)
            await engine.engine.resume()
            return await asyncio.gather(*running)

        old, new = engine.engine.version, next(engine.versions)
        *results, gone = engine.run(lend_memory())
        assert gone.finish_reason is FinishReason.ABORT and not len(gone.tokens)
        for prompt, result in zip([*prompts(3), prompts(3)[0]], results, strict=True):
            assert result.finish_reason is FinishReason.LENGTH
            num_old = int((result.versions == old).sum())
            assert_logprobs(models.first, prompt, result, 1.0, slice(0, num_old))
            assert_logprobs(models.second, prompt, result, 1.0, slice(num_old, None))

    def test_abort_ends_the_request_named_and_no_other(self, engine: Served, models: Models) -> None:
        async def abort_one() -> list[Generation]:
            running = await start(engine, [request("one", (1, 2, 3), LONG), request("two", (4, 5, 6), LONG)])
            await engine.engine.abort("one")
            await engine.engine.abort("nobody")
            return await asyncio.gather(*running)

        one, two = engine.run(abort_one())
        assert one.finish_reason is FinishReason.ABORT and 0 < len(one.tokens) < LONG
        assert two.finish_reason is FinishReason.LENGTH and len(two.tokens) == LONG
        assert_logprobs(models.first, (1, 2, 3), one, 1.0, slice(None))
        assert_logprobs(models.first, (4, 5, 6), two, 1.0, slice(None))

    def test_abort_without_a_name_ends_all_running_and_waiting(self, engine: Served) -> None:
        async def abort_all() -> list[Generation]:
            running = submit(engine, [request(f"r{i}", (1, 2, i), LONG) for i in range(NUM_CROWD)])
            await asyncio.sleep(UNDERWAY_S)
            await engine.engine.abort()
            return await asyncio.gather(*running)

        results = engine.run(abort_all())
        assert {result.finish_reason for result in results} == {FinishReason.ABORT}
        assert all(len(result.tokens) < LONG for result in results)

    def test_cancelled_request_frees_its_name_and_place(self, engine: Served) -> None:
        async def cancel_one() -> Generation:
            [running] = await start(engine, [request("same", (1, 2, 3), LONG)])
            running.cancel()
            await asyncio.wait([running])
            await engine.engine.abort("same")
            return await engine.engine.generate(request("same", (1, 2, 3), 5))

        assert len(engine.run(cancel_one()).tokens) == 5

    def test_request_that_can_never_be_served_is_refused(self, engine: Served) -> None:
        too_long = engine.engine.capabilities.max_model_tokens
        with pytest.raises(ValueError, match="tokens"):
            generate(engine, [request("long", (1,) * too_long, 1)])
        with pytest.raises(ValueError, match="tokens"):
            generate(engine, [request("empty", (), 1)])

    def test_name_of_a_running_request_is_refused(self, engine: Served) -> None:
        async def same_name_twice() -> None:
            [running] = await start(engine, [request("same", (1, 2, 3), LONG)])
            with pytest.raises(ValueError, match="request_id"):
                await engine.engine.generate(request("same", (4, 5, 6), 1))
            await engine.engine.abort()
            await running

        engine.run(same_name_twice())

    def test_weights_that_do_not_fit_are_refused(self, engine: Served, models: Models) -> None:
        version = engine.engine.version
        with pytest.raises(EngineError):
            engine.run(engine.engine.load_weights(models.unfit, next(engine.versions)))
        if self.survives_unfit_weights:
            assert engine.engine.version == version
            [result] = generate(engine, [request("r", (1, 2, 3), 8)])
            assert_logprobs(models.first, (1, 2, 3), result, 1.0, slice(None))


def generate(engine: Served, requests: list[GenerateRequest]) -> list[Generation]:
    async def gather() -> list[Generation]:
        return await asyncio.gather(*(engine.engine.generate(one) for one in requests))

    return engine.run(gather())


async def start(engine: Served, requests: list[GenerateRequest]) -> list[asyncio.Task[Generation]]:
    """Tasks of requests that have tokens already: a short request that came after them has ended."""
    tasks = submit(engine, requests)
    await engine.engine.generate(request("pilot", (3, 4), 4))
    return tasks


def submit(engine: Served, requests: list[GenerateRequest]) -> list[asyncio.Task[Generation]]:
    return [asyncio.create_task(engine.engine.generate(one)) for one in requests]
