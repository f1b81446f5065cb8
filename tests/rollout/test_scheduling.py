"""Who samples what, where, and which samples of a group are kept."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from flowrl.rollout.failure import Failure
from flowrl.rollout.scheduling.groups import first_to_end
from flowrl.rollout.scheduling.routing import Router
from flowrl.rollout.scheduling.surplus import is_overdue
from flowrl.stages.tied import tied_groups
from transfer_queue.rows import RowKey

FAILED = Failure(reason="episode_error", detail="on purpose")


class Turns:
    """Candidates that end in the order asked for, however slow the machine: each waits for its turn."""

    def __init__(self, order: list[int]) -> None:
        self.order = order
        self.ended: list[int] = []
        self.cancelled: set[int] = set()

    async def candidate(self, number: int, outcome: object = None) -> object:
        try:
            while number not in self.order or self.order.index(number) > len(self.ended):
                await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.cancelled.add(number)
            raise
        self.ended.append(number)
        return number if outcome is None else outcome


def keep(
    order: list[int], wanted: int, total: int, failing: set[int] = frozenset()
) -> tuple[dict[int, object], object, Turns]:
    """(what was accepted at which place, the failure, the turns)."""
    turns = Turns(order)
    accepted: dict[int, object] = {}

    def accept(place: int, outcome: object) -> None:
        assert place not in accepted
        accepted[place] = outcome

    async def run() -> object:
        candidates = [turns.candidate(i, FAILED if i in failing else None) for i in range(total)]
        return await asyncio.wait_for(first_to_end(candidates, wanted, accept), 20)

    return accepted, asyncio.run(run()), turns


def test_without_spares_every_sample_keeps_its_place() -> None:
    accepted, failure, _ = keep([2, 0, 1], wanted=3, total=3)
    assert accepted == {0: 0, 1: 1, 2: 2} and failure is None


def test_first_to_end_are_kept_and_the_slow_are_cancelled() -> None:
    accepted, failure, turns = keep([3, 1, 4], wanted=3, total=5)
    assert failure is None
    assert sorted(accepted) == [0, 1, 2] and sorted(accepted.values()) == [1, 3, 4]
    assert accepted[1] == 1
    assert turns.cancelled == {0, 2}


def test_spare_stands_in_for_a_failed_sample() -> None:
    accepted, failure, _ = keep([0, 2, 1], wanted=2, total=3, failing={0})
    assert failure is None and accepted == {0: 2, 1: 1}


def test_group_fails_when_too_few_can_still_end_well() -> None:
    accepted, failure, turns = keep([0, 1], wanted=2, total=3, failing={0, 1})
    assert failure is FAILED and accepted == {}
    assert turns.cancelled == {2}


def test_error_of_a_candidate_is_raised_and_ends_the_others() -> None:
    async def broken() -> object:
        raise RuntimeError("the engine broke")

    async def run() -> None:
        waiting = asyncio.create_task(asyncio.sleep(60))

        async def wait() -> object:
            return await waiting

        with pytest.raises(RuntimeError, match="broke"):
            await first_to_end([broken(), wait()], 2, lambda place, outcome: None)
        assert waiting.cancelled()

    asyncio.run(run())


def test_requests_go_to_the_least_loaded_server() -> None:
    router = Router(3)
    assert [router.choose((number,)) for number in range(6)] == [0, 1, 2, 0, 1, 2]
    router.leave(1)
    assert router.choose((99,)) == 1


def test_samples_of_one_prompt_share_a_server_until_it_is_too_busy() -> None:
    router = Router(2)
    chosen = [router.choose((1, 2, 3)) for _ in range(16)]
    assert chosen[:4] == [0] * 4 and 1 in chosen
    assert abs(router.num_running[0] - router.num_running[1]) <= 8


def test_a_conversation_goes_on_where_its_beginning_is_cached() -> None:
    router = Router(3)
    turns = [tuple(range(start, start + 100)) for start in (0, 1000, 2000)]
    assert [router.choose(turn) for turn in turns] == [0, 1, 2]
    for server in range(3):
        router.leave(server)
    assert [router.choose((*turn, *range(50))) for turn in reversed(turns)] == [2, 1, 0]
    router.forget()
    assert router.choose((*turns[2], *range(90))) == 0


def test_a_closed_server_gets_nothing_and_an_opened_one_is_the_least_loaded() -> None:
    router = Router(2)
    assert router.choose((1,)) == 0
    router.close(0)
    assert [router.choose((number,)) for number in (1, 2, 3)] == [1, 1, 1]
    router.leave(0)
    router.open(0)
    assert router.choose((4,)) == 0 and router.choose((1,)) == 1


def test_groups_whose_rewards_are_all_equal_are_tied() -> None:
    keys = tuple(RowKey("train", group, index) for group in range(3) for index in range(2))
    rewards = np.array([1.0, 1.0, 0.0, 1.0, 0.5, 0.5], dtype=np.float32)
    assert [keys[0].group for keys in tied_groups(keys, rewards)] == [0, 2]


def test_groups_are_told_apart_wherever_their_rows_stand() -> None:
    keys = tuple(RowKey("train", group, index) for index in range(2) for group in range(2))
    assert tied_groups(keys, np.array([0.0, 1.0, 0.0, 0.0])) == [[keys[0], keys[2]]]


@pytest.mark.parametrize(("deadline", "version", "expected"), [(3, 3, False), (3, 4, True), (5, 2, False)])
def test_a_group_is_given_up_when_weights_from_beyond_its_last_update_are_loaded(
    deadline: int, version: int, expected: bool
) -> None:
    assert is_overdue(deadline, version) is expected
