"""The staleness accounts as a shard sees them: requests with callbacks, because they may live in another process.

`LocalClock` answers at once: a shard by itself. `RemoteClock` asks over a ZeroMQ DEALER. Its other side
(`clock_server.py`) binds a ROUTER, applies requests to the one `Accounts` (through `membership.py`, which knows the
shards), and sends `clock_state(accounts)` to every shard whenever `accounts.changes` has moved, so that shards with
refused requests ask again. The messages are `clock_messages.py`'s. Which rows the numbers stand for is `ledger.py`'s.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Protocol

import zmq

from transfer_queue.clock_messages import (
    Admit,
    AnyClockRequest,
    Begin,
    Claim,
    ClockReply,
    ClockState,
    CloseUpdate,
    EndTurn,
    Entries,
    Hello,
    Retire,
    Shift,
    Turn,
    Unclaim,
    clock_state,
    decode_clock_answer,
    encode_clock,
    serve_clock_request,
)
from transfer_queue.security import check_endpoint, secure_client
from transfer_queue.staleness import Accounts


class Clock(Protocol):
    """batch_rows, max_staleness: None until the clock has been heard; surplus_rows: 0. `on_change` is called whenever
    something that was refused may be granted now; the shard sets it. `socket` becomes readable when `receive` has
    something to do."""

    batch_rows: int | None
    max_staleness: int | None
    surplus_rows: int
    on_change: Callable[[], None]
    socket: zmq.Socket | None

    def snapshot(self) -> ClockState: ...

    def admit(self, deadline: int, rows: int, groups: int, reply: Callable[[int], None]) -> None: ...

    def claim(
        self, update: int, incarnation: int, entries: Entries, may_drop: bool, reply: Callable[[int], None]
    ) -> None: ...

    def close_update(self, update: int, incarnation: int, reply: Callable[[bool], None]) -> None: ...

    def begin(self, incarnation: int, version: int, lost: Sequence[str], reply: Callable[[bool], None]) -> None: ...

    def turn(self, reply: Callable[[int], None]) -> None:
        """reply(the deadline up to which this shard may drop late rows, or NOT_BLOCKED); then `end_turn`."""
        ...

    def end_turn(self) -> None: ...

    def shift(self, moves: Sequence[tuple[int, int, int]]) -> None: ...

    def retire(self, entries: Entries) -> None: ...

    def unclaim(self, incarnation: int, entries: Entries) -> None: ...

    def recover(self, version: int, filled: int, incarnation: int, outstanding: Mapping[int, int]) -> None:
        """The shard has come back from its journal: what the accounts were, and its rows by deadline."""
        ...

    def enter(self) -> None:
        """The shard is there. Once, before it asks for anything."""
        ...

    def receive(self) -> None: ...

    def close(self) -> None: ...


class LocalClock:
    """Accounts in the same process and thread."""

    socket: zmq.Socket | None = None

    def __init__(self, accounts: Accounts) -> None:
        self.accounts = accounts
        self.batch_rows: int | None = accounts.batch_rows
        self.max_staleness: int | None = accounts.max_staleness
        self.surplus_rows = accounts.surplus_rows
        self.on_change: Callable[[], None] = _nobody
        self._seen = accounts.changes

    def snapshot(self) -> ClockState:
        return clock_state(self.accounts)

    def admit(self, deadline: int, rows: int, groups: int, reply: Callable[[int], None]) -> None:
        reply(self._serve(Admit(0, deadline, rows, groups)).granted)

    def claim(
        self, update: int, incarnation: int, entries: Entries, may_drop: bool, reply: Callable[[int], None]
    ) -> None:
        reply(self._serve(Claim(0, update, incarnation, list(entries), may_drop)).granted)

    def close_update(self, update: int, incarnation: int, reply: Callable[[bool], None]) -> None:
        reply(bool(self._serve(CloseUpdate(0, update, incarnation)).granted))

    def begin(self, incarnation: int, version: int, lost: Sequence[str], reply: Callable[[bool], None]) -> None:
        """Nobody else can be lost."""
        reply(bool(self._serve(Begin(0, incarnation, version, [])).granted))

    def turn(self, reply: Callable[[int], None]) -> None:
        reply(self._serve(Turn(0)).turn)

    def end_turn(self) -> None:
        self._serve(EndTurn(0))

    def shift(self, moves: Sequence[tuple[int, int, int]]) -> None:
        self._serve(Shift(0, list(moves)))

    def retire(self, entries: Entries) -> None:
        self._serve(Retire(0, list(entries)))

    def unclaim(self, incarnation: int, entries: Entries) -> None:
        self._serve(Unclaim(0, incarnation, list(entries)))

    def recover(self, version: int, filled: int, incarnation: int, outstanding: Mapping[int, int]) -> None:
        """They died with the shard."""
        self.accounts.recover(version, filled, incarnation, outstanding)

    def enter(self) -> None:
        """Nobody waits for it."""

    def receive(self) -> None:
        """Tells the shard of what others changed in the accounts since."""
        if self.accounts.changes != self._seen:
            self._seen = self.accounts.changes
            self.on_change()

    def close(self) -> None:
        self.on_change = _nobody

    def _serve(self, request: AnyClockRequest) -> ClockReply:
        reply = serve_clock_request(self.accounts, request)
        self.receive()
        return reply if reply is not None else _SILENT


_SILENT = ClockReply(0, 0, ClockState(0, 0, 0), 0, 0)


def _nobody() -> None:
    """Nobody listens yet."""


class DistantClock:
    """Accounts somewhere else, without the way there: `send` takes a request, in order; `hear` gets what comes back."""

    socket: zmq.Socket | None = None

    def __init__(self, shard: str, send: Callable[[AnyClockRequest], None]) -> None:
        self.batch_rows: int | None = None
        self.max_staleness: int | None = None
        self.surplus_rows = 0
        self.on_change: Callable[[], None] = _nobody
        self._state = ClockState(0, 0, 0, -1)
        self._ids = itertools.count(1)
        self._waiting: dict[int, Callable[[ClockReply], None]] = {}
        self._refused: dict[Hashable, tuple[int, int]] = {}
        self._send = send
        self._shard = shard
        self._entries: Entries = ()

    def snapshot(self) -> ClockState:
        return self._state

    def admit(self, deadline: int, rows: int, groups: int, reply: Callable[[int], None]) -> None:
        request = Admit(next(self._ids), deadline, rows, groups)
        self._ask_for_room(request, (Admit, deadline), deadline, rows, reply)

    def claim(
        self, update: int, incarnation: int, entries: Entries, may_drop: bool, reply: Callable[[int], None]
    ) -> None:
        request = Claim(next(self._ids), update, incarnation, list(entries), may_drop)
        self._ask_for_room(request, (Claim, update, incarnation, may_drop), *entries[0], reply)

    def close_update(self, update: int, incarnation: int, reply: Callable[[bool], None]) -> None:
        request = CloseUpdate(next(self._ids), update, incarnation)
        self._ask(request, lambda answer: reply(bool(answer.granted)))

    def begin(self, incarnation: int, version: int, lost: Sequence[str], reply: Callable[[bool], None]) -> None:
        request = Begin(next(self._ids), incarnation, version, list(lost))
        self._ask(request, lambda answer: reply(bool(answer.granted)))

    def turn(self, reply: Callable[[int], None]) -> None:
        self._ask(Turn(next(self._ids)), lambda answer: reply(answer.turn))

    def end_turn(self) -> None:
        self._send(EndTurn(0))

    def shift(self, moves: Sequence[tuple[int, int, int]]) -> None:
        self._send(Shift(0, list(moves)))

    def retire(self, entries: Entries) -> None:
        self._send(Retire(0, list(entries)))

    def unclaim(self, incarnation: int, entries: Entries) -> None:
        self._send(Unclaim(0, incarnation, list(entries)))

    def recover(self, version: int, filled: int, incarnation: int, outstanding: Mapping[int, int]) -> None:
        """The accounts live on; what they have of this shard's rows is replaced by what there is."""
        self._entries = sorted(outstanding.items())

    def enter(self) -> None:
        self._ask(Hello(next(self._ids), self._shard, list(self._entries)), self._greet)

    def hear(self, message: ClockReply | ClockState) -> None:
        self._advance(message.state if isinstance(message, ClockReply) else message)
        if isinstance(message, ClockReply):
            waiting = self._waiting.pop(message.id, None)
            if waiting is not None:
                waiting(message)

    def receive(self) -> None:
        """Nothing waits here."""

    def close(self) -> None:
        """There is nothing to let go of."""

    def _advance(self, new: ClockState) -> None:
        """States may overtake one another where requests are forwarded; the later one counts."""
        if new.changes < self._state.changes:
            return
        has_changed = new.changes > self._state.changes
        self._state = new
        if has_changed:
            self._refused.clear()
            self.on_change()

    def _greet(self, reply: ClockReply) -> None:
        self.batch_rows = reply.batch_rows
        self.max_staleness = reply.max_staleness
        self.surplus_rows = reply.surplus_rows
        self.on_change()

    def _ask_for_room(
        self, request: Admit | Claim, terms: Hashable, deadline: int, rows: int, reply: Callable[[int], None]
    ) -> None:
        """What was refused stays refused until the accounts say that they have changed, and so, on the same terms, does
        what has no fewer rows and is due no earlier. Neither is asked again."""
        known = self._refused.get(terms)
        if known is not None and deadline >= known[0] and rows >= known[1]:
            reply(0)
            return

        def answered(answer: ClockReply) -> None:
            if not answer.granted and answer.state.changes == self._state.changes:
                self._refused[terms] = deadline, rows
            reply(answer.granted)

        self._ask(request, answered)

    def _ask(self, request: AnyClockRequest, reply: Callable[[ClockReply], None]) -> None:
        self._waiting[request.id] = reply
        self._send(request)


class RemoteClock(DistantClock):
    """Accounts behind a socket, for the shard of that name. Used from the shard's thread only."""

    def __init__(self, endpoint: str, shard: str, context: zmq.Context | None = None, secret: str = "") -> None:
        check_endpoint(endpoint, secret)
        self.socket = (context or zmq.Context.instance()).socket(zmq.DEALER)
        if secret and endpoint.startswith("tcp://"):
            secure_client(self.socket, secret)
        self.socket.setsockopt(zmq.ROUTING_ID, f"{shard}/{secrets.token_hex(8)}".encode())
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(endpoint)
        super().__init__(shard, self._transmit)

    def receive(self) -> None:
        """Handles all that has arrived."""
        assert self.socket is not None, "the clock has been closed"
        while self.socket.poll(0):
            self.hear(decode_clock_answer(self.socket.recv()))

    def close(self) -> None:
        if self.socket is not None:
            self.socket.close()
            self.socket = None

    def _transmit(self, request: AnyClockRequest) -> None:
        assert self.socket is not None, "the clock has been closed"
        self.socket.send(encode_clock(request))
