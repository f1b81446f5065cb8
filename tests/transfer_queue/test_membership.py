"""Who shares the accounts, and what becomes of what a dead shard had in them."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from transfer_queue.clock_messages import Admit, Begin, Claim, ClockReply, Hello, Retire, Unclaim
from transfer_queue.membership import Membership
from transfer_queue.staleness import Accounts

BATCH = 4
SHARDS = ("a", "b", "c")
STEPS = st.lists(
    st.tuples(st.sampled_from(("enter", "admit", "claim", "retire", "begin", "answer", "lose")), st.integers(0, 2)),
    max_size=60,
)


class Peers:
    """Shards as honest as they are short-lived: each knows what it has, and forgets all when it dies. What a shard
    hears of an incarnation it answers in its own time, when there may be another already."""

    def __init__(self) -> None:
        self.members = Membership(Accounts(BATCH, 1))
        self.held: dict[str, Counter[int]] = {}
        self.claimed: dict[str, Counter[int]] = {}
        self.heard: dict[str, list[int]] = {}

    @property
    def accounts(self) -> Accounts:
        return self.members.accounts

    def ask(self, shard: str, request: Admit | Claim | Begin) -> int:
        reply = self.members.serve(shard, request)
        assert isinstance(reply, ClockReply)
        return reply.granted

    def do(self, step: str, shard: str) -> None:
        if step != "enter" and shard not in self.held:
            return
        getattr(self, f"_{step}")(shard)

    def _enter(self, shard: str) -> None:
        self.members.serve(shard, Hello(0, shard))
        self.held[shard], self.claimed[shard] = Counter(), Counter()
        self.heard[shard] = [self.accounts.incarnation] if self.accounts.incarnation else []

    def _admit(self, shard: str) -> None:
        deadline = self.accounts.version + 1
        self.held[shard][deadline] += self.ask(shard, Admit(0, deadline, 1, 3))

    def _claim(self, shard: str) -> None:
        due = sorted(self.held[shard].elements())[:2]
        request = Claim(0, self.accounts.version, self.accounts.incarnation, [(deadline, 1) for deadline in due])
        taken = Counter(due[: self.ask(shard, request)])
        self.held[shard] -= taken
        self.claimed[shard] += taken

    def _retire(self, shard: str) -> None:
        self.members.serve(shard, Retire(0, [(deadline, 1) for deadline in self.held[shard].elements()]))
        self.held[shard] = Counter()

    def _begin(self, shard: str, lost: tuple[str, ...] = ()) -> None:
        """At the version that the clock has: what earlier updates hold has been trained."""
        for name in lost:
            del self.held[name], self.claimed[name], self.heard[name]
        assert self.ask(shard, Begin(0, self.accounts.incarnation + 1, self.accounts.version, list(lost)))
        for heard in self.heard.values():
            heard.append(self.accounts.incarnation)

    def _answer(self, shard: str) -> None:
        if not self.heard[shard]:
            return
        back = Counter({d: n for d, n in self.claimed[shard].items() if d >= self.accounts.version})
        self.members.serve(shard, Unclaim(0, self.heard[shard].pop(0), sorted(back.items())))
        self.held[shard] += back
        self.claimed[shard] = Counter()

    def _lose(self, shard: str) -> None:
        survivors = sorted(set(self.held) - {shard})
        if survivors:
            self._begin(survivors[0], (shard,))


@given(STEPS)
def test_the_accounts_hold_what_living_shards_have_and_nothing_else(steps: list[tuple[str, int]]) -> None:
    peers = Peers()
    for step, at in steps:
        peers.do(step, SHARDS[at])
        alive: Counter[int] = Counter()
        for held in peers.held.values():
            alive += held
        assert Counter(peers.accounts.outstanding) == alive
        assert peers.accounts.awaited_shards <= sum(bool(heard) for heard in peers.heard.values())
    for shard, heard in peers.heard.items():
        while heard:
            peers.do("answer", shard)
    assert peers.accounts.awaited_shards == 0, "all have answered, and one is waited for"


def test_nothing_is_granted_after_a_death_before_the_trainer_begins_anew() -> None:
    members = Membership(Accounts(BATCH, 1))
    for shard in ("a", "b"):
        members.serve(shard, Hello(0, shard))
    admit = Admit(0, 1, 1, 9)
    assert [reply.granted for shard in "ab" if (reply := members.serve(shard, admit))] == [8, 0]
    members.serve("a", Hello(0, "a"))
    assert (members.lost_rows, members.accounts.outstanding) == (8, {})
    reply = members.serve("b", admit)
    assert reply is not None and (reply.granted, reply.state.is_broken) == (0, True)
    members.serve("b", Begin(0, 1, 0, []))
    for shard in ("a", "b"):
        members.serve(shard, Unclaim(0, 1, []))
    assert [reply.granted for shard in "ba" if (reply := members.serve(shard, admit))] == [8, 0]


def test_an_answer_to_an_incarnation_that_has_been_replaced_is_not_the_one_that_is_waited_for() -> None:
    members = Membership(Accounts(BATCH, 1))
    for shard in ("a", "b"):
        members.serve(shard, Hello(0, shard))
    members.serve("a", Begin(0, 1, 0, []))
    members.serve("a", Begin(0, 2, 0, []))
    for shard in ("a", "b"):
        members.serve(shard, Unclaim(0, 1, []))
    assert members.accounts.awaited_shards == 2
    for shard in ("a", "b"):
        members.serve(shard, Unclaim(0, 2, []))
    assert members.accounts.is_granting


def test_a_lost_shard_is_not_waited_for_and_one_that_joins_is_not_awaited() -> None:
    members = Membership(Accounts(BATCH, 1))
    for shard in ("a", "b"):
        members.serve(shard, Hello(0, shard))
    members.serve("a", Begin(0, 1, 0, ["b"]))
    members.serve("c", Hello(0, "c"))
    members.serve("c", Unclaim(0, 1, []))
    assert members.accounts.awaited_shards == 1, "a has not said what it holds"
    members.serve("a", Unclaim(0, 1, []))
    assert members.accounts.is_granting
