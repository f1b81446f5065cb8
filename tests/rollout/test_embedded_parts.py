"""The pure parts of the embedded engine: sampling, the waiting queue, slots, spans, the cache."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowrl.rollout.embedded.kv_cache import KVCache
from flowrl.rollout.embedded.runner import spans
from flowrl.rollout.embedded.sampling import SamplingColumns, penalise, sample, stream_keys, uniforms
from flowrl.rollout.embedded.slots import SlotTable, moves_into_holes
from flowrl.rollout.embedded.waiting import Sequence, WaitingQueue
from flowrl.rollout.engine import GenerateRequest, SamplingParams

NONE = np.empty(0, dtype=np.int32)


def columns(
    rows: int, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0
) -> SamplingColumns:
    return SamplingColumns(
        np.full(rows, temperature, dtype=np.float32),
        np.full(rows, top_p, dtype=np.float32),
        np.full(rows, top_k, dtype=np.int64),
        np.full(rows, min_p, dtype=np.float32),
    )


def sequence(name: str, prompt: tuple[int, ...], max_tokens: int = 4) -> Sequence:
    params = SamplingParams(max_tokens=max_tokens, stop_token_ids=(7, 8))
    one = GenerateRequest(request_id=name, tokens=prompt, sampling=params)
    return Sequence(one, stream_keys([3])[0], NONE, NONE.astype(np.float32), NONE)


def drawn(logits: torch.Tensor, rows: int, **params: float) -> np.ndarray:
    numbers = uniforms(np.repeat(stream_keys([11]), rows), np.arange(rows))
    tokens, _ = sample(logits.expand(rows, -1), columns(rows, **params), numbers)  # type: ignore[arg-type]
    return np.bincount(tokens, minlength=logits.shape[-1]) / rows


def test_tokens_are_drawn_as_often_as_they_are_probable() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5])
    for temperature in (1.0, 0.5):
        expected = torch.softmax(logits / temperature, dim=-1).numpy()
        np.testing.assert_allclose(drawn(logits, 40_000, temperature=temperature), expected, atol=0.01)


def test_filters_renormalise_what_they_keep() -> None:
    probs = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])
    for params, kept in (({"top_k": 2}, 2), ({"top_p": 0.5}, 2), ({"min_p": 0.3}, 3), ({"top_p": 0.8, "top_k": 4}, 3)):
        expected = np.where(np.arange(5) < kept, probs.numpy(), 0)
        np.testing.assert_allclose(drawn(probs.log(), 40_000, **params), expected / expected.sum(), atol=0.01)


def test_penalty_weighs_each_token_of_the_response_once_and_other_rows_not_at_all() -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5, 3.0]]).repeat(3, 1)
    tokens = np.array([[0, 1, 0, 9], [3, 3, 3, 3], [2, 0, 0, 0]], dtype=np.int32)
    penalty = np.array([2.0, 1.0, 4.0], dtype=np.float32)
    weighed = penalise(logits, penalty, tokens, np.array([3, 4, 0]))
    assert weighed.tolist() == [[1.0, -2.0, 0.5, 3.0], [2.0, -1.0, 0.5, 3.0], [2.0, -1.0, 0.5, 3.0]]


def test_impossible_token_is_never_drawn() -> None:
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf])
    numbers = np.array([0.0, 0.5, 1 - 2.0**-23], dtype=np.float32)
    tokens, logprobs = sample(logits.expand(3, -1), columns(3), numbers)
    assert tokens.tolist() == [1, 3, 3]
    np.testing.assert_allclose(logprobs, np.log(0.5), rtol=1e-6)


def test_greedy_and_sampled_rows_share_a_batch() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0]]).repeat(2, 1)
    mixed = dataclasses.replace(columns(2), temperature=np.array([0.0, 0.5], dtype=np.float32))
    tokens, logprobs = sample(logits, mixed, np.array([0.999, 0.999], dtype=np.float32))
    assert tokens.tolist() == [1, 2]
    expected = [torch.log_softmax(logits[0], -1)[1], torch.log_softmax(logits[0] / 0.5, -1)[2]]
    np.testing.assert_allclose(logprobs, expected, rtol=1e-6)


@given(st.lists(st.integers(-(2**70), 2**70), min_size=1, max_size=20), st.integers(0, 2**31))
def test_random_number_depends_on_its_own_seed_and_counter_alone(seeds: list[int], counter: int) -> None:
    keys = stream_keys(seeds)
    together = uniforms(keys, np.full(len(seeds), counter))
    alone = [uniforms(stream_keys([seed]), np.array([counter]))[0] for seed in seeds]
    assert together.tolist() == alone
    assert ((together >= 0) & (together < 1)).all()


def test_random_numbers_are_uniform_over_seeds_and_counters() -> None:
    by_seed = uniforms(stream_keys(list(range(20_000))), np.zeros(20_000, dtype=np.int64))
    by_counter = uniforms(np.repeat(stream_keys([5]), 20_000), np.arange(20_000))
    for numbers in (by_seed, by_counter):
        np.testing.assert_allclose(np.histogram(numbers, bins=10, range=(0, 1))[0] / 20_000, 0.1, atol=0.01)
    assert abs(np.corrcoef(by_seed[:-1], by_seed[1:])[0, 1]) < 0.03


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=12),
    st.integers(1, 25),
    st.lists(st.integers(0, 4), max_size=30),
)
def test_waiting_prompts_are_computed_once_in_order_and_within_limits(
    lengths: list[int], budget: int, freed: list[int]
) -> None:
    queue = WaitingQueue()
    members = [1 + length % 3 for length in lengths]
    for index, (length, count) in enumerate(zip(lengths, members, strict=True)):
        for member in range(count):
            queue.add(sequence(f"{index}-{member}", (index,) * length))
    admitted: list[str] = []
    computed = [0] * len(lengths)
    for free in itertools.chain(freed, itertools.repeat(3)):
        if not queue:
            break
        chunks = queue.plan(budget, free)
        assert sum(chunk.end - chunk.start for chunk in chunks) <= budget
        assert len({chunk.group.slot for chunk in chunks}) == len(chunks)
        assert sum(chunk.num_admitted for chunk in chunks) <= free
        for chunk in chunks:
            index = int(chunk.group.tokens[0])
            assert chunk.start == min(computed[index], lengths[index] - 1)
            computed[index] = chunk.end
            admitted += [one.request.request_id for one in queue.finish(chunk)]
    assert admitted == [f"{index}-{member}" for index, count in enumerate(members) for member in range(count)]


def test_changed_weights_restart_a_prompt_that_was_partly_computed() -> None:
    queue = WaitingQueue()
    queue.add(sequence("r", (1,) * 10))
    [chunk] = queue.plan(4, 1)
    queue.finish(chunk)
    queue.forget_progress()
    [chunk] = queue.plan(100, 1)
    assert (chunk.start, chunk.end) == (0, 10)


def test_request_put_back_goes_first_with_what_it_generated() -> None:
    queue = WaitingQueue()
    queue.add(sequence("waiting", (1, 2)))
    begun = sequence("begun", (3, 4))
    begun.tokens = np.array([5, 6], dtype=np.int32)
    queue.put_back([begun])
    first, second = queue.plan(100, 9)
    assert first.group.tokens.tolist() == [3, 4, 5, 6] and second.group.tokens.tolist() == [1, 2]


@given(st.lists(st.integers(1, 500), min_size=1, max_size=40), st.data())
def test_remaining_rows_are_dense_and_none_is_lost(positions: list[int], data: st.DataObject) -> None:
    num = len(positions)
    holes = data.draw(st.sets(st.integers(0, num - 1)))
    source, target = moves_into_holes(np.array(positions), np.array(sorted(holes), dtype=np.int64))
    rows = np.arange(num)
    rows[target] = rows[source]
    assert set(rows[: num - len(holes)].tolist()) == set(range(num)) - holes


def test_slots_keep_each_requests_tokens_through_removals() -> None:
    rng = np.random.default_rng(0)
    table, expected = SlotTable(8), {}
    for round_ in range(60):
        if table.num_active < 8:
            name = f"r{round_}"
            table.add([sequence(name, (1,) * (1 + round_ % 5), max_tokens=1 + round_ % 40)])
            expected[name] = []
        tokens = rng.integers(10, size=table.num_active)
        for one, token in zip(table.sequences, tokens.tolist(), strict=True):
            expected[one.request.request_id].append(token)
        has_ended, has_stopped = table.record(tokens, tokens / 10, round_)
        assert has_stopped.tolist() == np.isin(tokens, (7, 8)).tolist()
        for one in table.remove(np.flatnonzero(has_ended))[0]:
            assert one.tokens.tolist() == expected[one.request.request_id]
            np.testing.assert_allclose(one.logprobs, one.tokens / 10, rtol=1e-6)
            assert one.versions.tolist() == list(range(round_ - len(one.tokens) + 1, round_ + 1))
        for one, position in zip(table.sequences, table.position.tolist(), strict=False):
            assert position == len(one.request.tokens) + len(expected[one.request.request_id]) - 1


@given(st.lists(st.integers(0, 4000), max_size=60))
def test_spans_cover_every_slot_and_all_of_its_keys(positions: list[int]) -> None:
    found = spans(np.array(positions, dtype=np.int64), 1024)
    covered = [slot for start, stop, _ in found for slot in range(start, stop)]
    assert covered == list(range(len(positions)))
    assert all(max(positions[start:stop]) + 1 == context for start, stop, context in found)


def test_one_long_slot_does_not_make_the_others_read_far() -> None:
    assert spans(np.array([2000, *([100] * 31)]), 1024) == [(0, 1, 2001), (1, 32, 101)]


def test_cache_keeps_what_was_written_while_it_grows() -> None:
    cache, other = KVCache(64, 1000), KVCache(64, 1000)
    expected = torch.zeros(64, 2, 1000, 4)
    torch.manual_seed(0)
    for slots, tokens in ((1, 5), (3, 40), (60, 700)):
        cache.reserve(slots, tokens)
        rows, places = torch.randint(slots, (20,)).unique(), tokens - 1
        states = torch.randn(len(rows), 2, 4)
        cache.write(0, rows, torch.full_like(rows, places), states, -states)
        expected[rows, :, places] = states
        keys, values = cache.slots(0, 0, slots, tokens)
        assert torch.equal(keys, expected[:slots, :, :tokens]) and torch.equal(values, -keys)
    other.reserve(2, 700)
    other.copy(cache, torch.tensor([59, 3]), torch.tensor([0, 1]), 700)
    assert torch.equal(other.slots(0, 0, 2, 700)[0], expected[[59, 3], :, :700])
