"""The shards that share one `Accounts`: who they are, and what each of them has outstanding. Pure.

So the capacity that a dead shard's rows took can be given back, once: when another shard enters under its name, or when
the trainer that begins anew says that it is lost. What an update holds of its rows goes with the incarnation
(`Accounts.begin`). What was outstanding is counted here beside the accounts and never against the rule.
"""

from __future__ import annotations

from collections import Counter

from transfer_queue.clock_messages import (
    Admit,
    AnyClockRequest,
    Begin,
    Claim,
    ClockReply,
    Entries,
    Hello,
    Retire,
    Shift,
    Unclaim,
    serve_clock_request,
)
from transfer_queue.staleness import Accounts


class Membership:
    """lost_rows: outstanding ones that went with their shards, so far."""

    def __init__(self, accounts: Accounts) -> None:
        self.accounts = accounts
        self.lost_rows = 0
        self._outstanding: dict[str, Counter[int]] = {}
        self._awaited: set[str] = set()
        self._unnamed = accounts.awaited_shards

    @property
    def shards(self) -> list[str]:
        return list(self._outstanding)

    def serve(self, shard: str, request: AnyClockRequest) -> ClockReply | None:
        """Applies the request of that shard; None if it has no reply."""
        if isinstance(request, Hello):
            self._enter(shard)
        elif isinstance(request, Begin) and request.incarnation > self.accounts.incarnation:
            for name in request.lost:
                self._lose(name)
            self._awaited = set(self._outstanding)
            self._unnamed = 0
        elif isinstance(request, Unclaim):
            if shard in self._awaited and request.incarnation == self.accounts.incarnation:
                self._awaited.discard(shard)
            else:  # it joined after the incarnation began, or answers one that has been replaced since
                request = Unclaim(request.id, -1, request.entries)
        reply = serve_clock_request(self.accounts, request, len(self._outstanding))
        self._count(self._outstanding.setdefault(shard, Counter()), request, reply)
        return reply

    def _lose(self, shard: str) -> None:
        """It is gone, with all its rows."""
        held = self._outstanding.pop(shard, Counter())
        for deadline, rows in held.items():
            self.accounts.retire(deadline, rows)
        self._awaited.discard(shard)
        self.lost_rows += held.total()

    def _enter(self, shard: str) -> None:
        """Under a name that is known: whoever had it before is dead. Where a whole queue goes on from files, the first
        shards to enter are those that are waited for."""
        if shard in self._outstanding:
            was_awaited = shard in self._awaited
            self._lose(shard)
            self._awaited |= {shard} if was_awaited else set()
            self.accounts.break_off()
        elif self._unnamed:
            self._unnamed -= 1
            self._awaited.add(shard)
        self._outstanding[shard] = Counter()

    def _count(self, mine: Counter[int], request: AnyClockRequest, reply: ClockReply | None) -> None:
        granted = reply.granted if reply is not None else 0
        match request:
            case Hello() | Unclaim():
                for deadline, rows in request.entries:
                    mine[deadline] += rows
            case Admit():
                mine[request.deadline] += request.rows * granted
            case Claim():
                _subtract(mine, request.entries[:granted])
            case Shift():
                for old, new, rows in request.moves:
                    _subtract(mine, [(old, rows)])
                    mine[new] += rows
            case Retire():
                _subtract(mine, request.entries)


def _subtract(mine: Counter[int], entries: Entries) -> None:
    for deadline, rows in entries:
        assert mine[deadline] >= rows, f"a shard gives back {rows} rows due {deadline} and has {mine[deadline]}"
        mine[deadline] -= rows
        if not mine[deadline]:
            del mine[deadline]
