"""Every admitted row's credit comes back exactly once, however the row ends: counted at the accounts' own door."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.transfer_queue.conftest import CONSUMERS, DirectShard
from transfer_queue import wire
from transfer_queue.clock import LocalClock
from transfer_queue.config import QueueConfig
from transfer_queue.rows import RowKey
from transfer_queue.staleness import Accounts

BATCH_ROWS = 4
GROUP_SIZE = 2
STEPS = ("reserve", "tokens", "finish", "drop", "drop", "drop again", "lose", "train", "fill", "expire")


class Counted(Accounts):
    """rows: by what happened to their credit."""

    def __init__(self, *bounds: int, surplus_rows: int = 0) -> None:
        super().__init__(*bounds, surplus_rows=surplus_rows)
        self.rows: Counter[str] = Counter()

    def admit_groups(self, deadline: int, rows: int, groups: int) -> int:
        admitted = super().admit_groups(deadline, rows, groups)
        self.rows["admitted"] += admitted * rows
        return admitted

    def claim(self, deadline: int, rows: int) -> None:
        super().claim(deadline, rows)
        self.rows["claimed"] += rows

    def retire(self, deadline: int, rows: int) -> None:
        super().retire(deadline, rows)
        self.rows["retired"] += rows


class Prompts:
    """Groups on two shards of one account, and where each of them is in its life."""

    def __init__(self, max_staleness: int, late: str, surplus_rows: int = 0) -> None:
        self.accounts = Counted(BATCH_ROWS, max_staleness, surplus_rows=surplus_rows)
        self.shards = [
            DirectShard(
                QueueConfig(
                    endpoint="ipc://unused", consumers=CONSUMERS, first_group=at, group_stride=2, late=late, lease_s=5.0
                ),
                LocalClock(self.accounts),
            )
            for at in (0, 1)
        ]
        self.known: list[tuple[int, wire.Reservation]] = []

    def act(self, step: str, pick: int) -> None:
        at = pick % 2
        shard = self.shards[at]
        if step == "reserve":
            shard.announce("p", self.accounts.version)
            self.known += [(at, group) for group in shard.reserve("p", groups=1 + pick % 3, size=GROUP_SIZE)]
        elif step in ("train", "fill"):
            shard.take("train", BATCH_ROWS if step == "fill" else GROUP_SIZE, update=self.accounts.version)
        elif step == "lose":
            shard.ask(wire.ProducerLost, "p")
        elif step == "expire":
            shard.pass_time(6.0)
        elif self.known:
            self.to_group(step, *self.known[pick % len(self.known)])
        for each in self.shards:
            each.pass_time(0.0)

    def to_group(self, step: str, at: int, group: wire.Reservation) -> None:
        shard = self.shards[at]
        if step == "tokens":
            shard.put(group.keys[:1], ("tokens",), [group.version])
        elif step == "finish":
            for key in group.keys:
                shard.put([key], ("tokens",), [group.version])
            shard.put(group.keys, ("reward",))
            shard.put(group.keys, ("advantage",))
        elif step.startswith("drop"):
            for _ in range(2):
                shard.ask(wire.Drop, group.keys, "tied", step == "drop again")

    def ends(self) -> Counter[RowKey]:
        """How often each row ended untrained, by the shards' own log."""
        return Counter(key for shard in self.shards for kind, key, _ in shard.events if kind in ("dropped", "lost"))


def check(prompts: Prompts) -> None:
    rows, accounts = prompts.accounts.rows, prompts.accounts
    assert rows["admitted"] - rows["claimed"] - rows["retired"] == sum(accounts.outstanding.values())
    ends = prompts.ends()
    assert set(ends.values()) <= {1}, "a row ended twice"
    assert rows["retired"] == sum(ends.values()), "each end gave back one credit"
    taken = [key for shard in prompts.shards for kind, key, _ in shard.events if kind == "taken"]
    assert len(taken) == len(set(taken)) == rows["claimed"]
    assert not set(taken) & set(ends), "what is in an update gives nothing back"


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([0, 1, 2]),
    st.sampled_from(["wait", "drop"]),
    st.sampled_from([0, 2 * GROUP_SIZE]),
    st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 99)), max_size=40),
)
def test_every_credit_comes_back_once(
    max_staleness: int, late: str, surplus_rows: int, steps: Sequence[tuple[str, int]]
) -> None:
    prompts = Prompts(max_staleness, late, surplus_rows)
    for step, pick in steps:
        prompts.act(step, pick)
        check(prompts)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("stage", ["reserved", "begun", "complete", "taken"])
def test_row_rejected_at_any_stage_gives_its_credit_back_once_unless_it_is_in_an_update(
    stage: str, again: bool
) -> None:
    prompts = Prompts(0, "wait")
    prompts.act("reserve", 0)
    at, group = prompts.known[0]
    if stage != "reserved":
        prompts.to_group("tokens" if stage == "begun" else "finish", at, group)
    if stage == "taken":
        prompts.act("train", 0)
    for _ in range(3):
        prompts.to_group("drop again" if again else "drop", at, group)
        prompts.act("lose", 0)
    assert prompts.accounts.rows["retired"] == (0 if stage == "taken" else GROUP_SIZE)
    check(prompts)


def test_credit_of_a_group_dropped_while_the_clock_is_asked_comes_back_once() -> None:
    """The answer decides: granted, the drop came too late; refused, it counts then."""
    requests: list[Any] = []

    class Slow(LocalClock):
        def claim(self, *request: Any) -> None:
            requests.append(request)

    accounts = Counted(BATCH_ROWS, 1)
    config = QueueConfig(endpoint="ipc://unused", consumers=CONSUMERS)
    for is_granted in (True, False):
        shard = DirectShard(config, Slow(accounts))
        before = accounts.rows.copy()
        shard.announce("p", accounts.version)
        (group,) = shard.reserve("p", size=GROUP_SIZE)
        shard.put(group.keys, ("tokens", "advantage"), [group.version] * GROUP_SIZE)
        number = shard.take("train", GROUP_SIZE, update=accounts.version, wait_s=9.0)
        shard.ask(wire.Drop, group.keys, "tied")
        assert accounts.rows["retired"] == before["retired"], "nobody knows yet"
        request = requests.pop()
        if is_granted:
            LocalClock.claim(shard.clock, *request)  # type: ignore[arg-type]
        else:
            request[-1](0)
        taken = shard.answer_to(number)
        assert (taken is not None and len(taken.keys) == GROUP_SIZE) == is_granted
        assert accounts.rows["retired"] - before["retired"] == (0 if is_granted else GROUP_SIZE)
