"""The staleness accounts as a shard sees them: requests with callbacks, because they may live in another process.

`LocalClock` answers at once: the library alone, and tests. `RemoteClock` asks over a ZeroMQ DEALER. Its other side
binds a ROUTER, applies `serve_clock_request` to the one `Accounts`, and sends `clock_state(accounts)` to every shard
whenever `accounts.changes` has moved, so that shards with refused requests ask again. Their messages are here. Which
rows the numbers stand for is `ledger.py`'s business.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import msgspec
import zmq

from transfer_queue.errors import WireError
from transfer_queue.staleness import Accounts

Entries = Sequence[tuple[int, int]]
"""(deadline, rows) each."""

NOT_BLOCKED = -1


class ClockRequest(msgspec.Struct, frozen=True, array_like=True, tag=True):
    id: int


class Hello(ClockRequest, frozen=True):
    shard: str


class Admit(ClockRequest, frozen=True):
    """Up to `groups` groups of `rows` rows each, all with this deadline."""

    deadline: int
    rows: int
    groups: int


class Claim(ClockRequest, frozen=True):
    """A prefix of the (deadline, rows) entries, at least one, for the update. may_drop: if the rule refuses them all,
    every shard is told by what deadline unready rows are in their way (`ClockState.blocked`)."""

    update: int
    incarnation: int
    entries: list[tuple[int, int]]
    may_drop: bool = False


class CloseUpdate(ClockRequest, frozen=True):
    """The update may end short. granted: whether it has ended."""

    update: int
    incarnation: int


class Turn(ClockRequest, frozen=True):
    """May this shard drop late rows? granted: 1 if so; it says `EndTurn` when it has, even if it dropped none."""


class EndTurn(ClockRequest, frozen=True):
    """Has no reply. Comes after the `Retire` of what was dropped."""


class Shift(ClockRequest, frozen=True):
    """(old deadline, new deadline, rows) each. Has no reply."""

    moves: list[tuple[int, int, int]]


class Retire(ClockRequest, frozen=True):
    """Outstanding (deadline, rows) that left for good. Has no reply."""

    entries: list[tuple[int, int]]


class Unclaim(ClockRequest, frozen=True):
    """All (deadline, rows) of this shard that the incarnation has undone are outstanding again. Has no reply."""

    incarnation: int
    entries: list[tuple[int, int]]


class ClockState(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """changes: `Accounts.changes`; it orders states and tells a refusal that has been overtaken. blocked: unready rows
    due by then keep ready ones waiting (`Accounts.blocked`), or NOT_BLOCKED."""

    version: int
    filled: int
    incarnation: int
    changes: int = 0
    blocked: int = NOT_BLOCKED


class ClockReply(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """granted: entries, groups, or whether. blocked: as in ClockState; to a Turn, the deadline up to which to drop."""

    id: int
    granted: int
    version: int
    filled: int
    incarnation: int
    changes: int
    batch_rows: int
    max_staleness: int
    blocked: int = NOT_BLOCKED


AnyClockRequest = Hello | Admit | Claim | CloseUpdate | Shift | Retire | Turn | EndTurn | Unclaim
_encoder = msgspec.msgpack.Encoder()
_requests = msgspec.msgpack.Decoder(AnyClockRequest)
_replies = msgspec.msgpack.Decoder(ClockReply | ClockState)


def encode_clock(message: AnyClockRequest | ClockReply | ClockState) -> bytes:
    return _encoder.encode(message)


def decode_clock_request(frame: bytes) -> AnyClockRequest:
    try:
        return _requests.decode(frame)
    except msgspec.MsgspecError as error:
        raise WireError(f"clock request: {error}") from error


def serve_clock_request(accounts: Accounts, request: AnyClockRequest) -> ClockReply | None:
    """Applies the request; None if it has no reply."""
    granted = 0
    turn: int | None = None
    match request:
        case Hello():
            pass
        case Admit():
            granted = accounts.admit_groups(request.deadline, request.rows, request.groups)
        case Claim():
            granted = accounts.claim_prefix(request.update, request.incarnation, request.entries)
            if request.may_drop and not granted and request.update == accounts.version:
                accounts.note_refused(*request.entries[0])
        case CloseUpdate():
            granted = int(accounts.close(request.update, request.incarnation))
        case Turn():
            turn = accounts.give_turn()
            granted = int(turn is not None)
        case EndTurn():
            accounts.end_turn()
            return None
        case Shift():
            for old, new, rows in request.moves:
                accounts.shift(old, new, rows)
            return None
        case Retire():
            for deadline, rows in request.entries:
                accounts.retire(deadline, rows)
            return None
        case Unclaim():
            accounts.unclaim(request.incarnation, request.entries)
            return None
    state = clock_state(accounts)
    return ClockReply(
        request.id, granted, state.version, state.filled, state.incarnation, state.changes,
        accounts.batch_rows, accounts.max_staleness, state.blocked if turn is None else turn,
    )  # fmt: skip


def clock_state(accounts: Accounts) -> ClockState:
    blocked = accounts.blocked
    return ClockState(
        accounts.version, accounts.filled, accounts.incarnation, accounts.changes,
        NOT_BLOCKED if blocked is None else blocked,
    )  # fmt: skip


def turn_of(reply: ClockReply) -> int:
    """What the reply to a Turn says: the deadline up to which to drop, or NOT_BLOCKED."""
    return reply.blocked if reply.granted else NOT_BLOCKED


class Clock(Protocol):
    """batch_rows, max_staleness: None until the clock has been heard. `on_change` is called whenever something that was
    refused may be granted now; the shard sets it. `socket` becomes readable when `receive` has something to do."""

    batch_rows: int | None
    max_staleness: int | None
    on_change: Callable[[], None]
    socket: zmq.Socket | None

    def snapshot(self) -> ClockState: ...

    def admit(self, deadline: int, rows: int, groups: int, reply: Callable[[int], None]) -> None: ...

    def claim(
        self, update: int, incarnation: int, entries: Entries, may_drop: bool, reply: Callable[[int], None]
    ) -> None: ...

    def close_update(self, update: int, incarnation: int, reply: Callable[[bool], None]) -> None: ...

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

    def receive(self) -> None: ...

    def close(self) -> None: ...


class LocalClock:
    """Accounts in the same process and thread."""

    socket: zmq.Socket | None = None

    def __init__(self, accounts: Accounts) -> None:
        self.accounts = accounts
        self.batch_rows: int | None = accounts.batch_rows
        self.max_staleness: int | None = accounts.max_staleness
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

    def turn(self, reply: Callable[[int], None]) -> None:
        reply(turn_of(self._serve(Turn(0))))

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


_SILENT = ClockReply(0, 0, 0, 0, 0, 0, 0, 0)


def _nobody() -> None:
    """Nobody listens yet."""


class DistantClock:
    """Accounts somewhere else, without the way there: `send` takes a request, in order; `hear` gets what comes back."""

    socket: zmq.Socket | None = None

    def __init__(self, shard: str, send: Callable[[AnyClockRequest], None]) -> None:
        self.batch_rows: int | None = None
        self.max_staleness: int | None = None
        self.on_change: Callable[[], None] = _nobody
        self._state = ClockState(0, 0, 0, -1)
        self._ids = itertools.count(1)
        self._waiting: dict[int, Callable[[ClockReply], None]] = {}
        self._send = send
        self._ask(Hello(next(self._ids), shard), self._greet)

    def snapshot(self) -> ClockState:
        return self._state

    def admit(self, deadline: int, rows: int, groups: int, reply: Callable[[int], None]) -> None:
        self._ask(Admit(next(self._ids), deadline, rows, groups), lambda answer: reply(answer.granted))

    def claim(
        self, update: int, incarnation: int, entries: Entries, may_drop: bool, reply: Callable[[int], None]
    ) -> None:
        request = Claim(next(self._ids), update, incarnation, list(entries), may_drop)
        self._ask(request, lambda answer: reply(answer.granted))

    def close_update(self, update: int, incarnation: int, reply: Callable[[bool], None]) -> None:
        request = CloseUpdate(next(self._ids), update, incarnation)
        self._ask(request, lambda answer: reply(bool(answer.granted)))

    def turn(self, reply: Callable[[int], None]) -> None:
        self._ask(Turn(next(self._ids)), lambda answer: reply(turn_of(answer)))

    def end_turn(self) -> None:
        self._send(EndTurn(0))

    def shift(self, moves: Sequence[tuple[int, int, int]]) -> None:
        self._send(Shift(0, list(moves)))

    def retire(self, entries: Entries) -> None:
        self._send(Retire(0, list(entries)))

    def unclaim(self, incarnation: int, entries: Entries) -> None:
        self._send(Unclaim(0, incarnation, list(entries)))

    def recover(self, version: int, filled: int, incarnation: int, outstanding: Mapping[int, int]) -> None:
        """Nothing to do: they live elsewhere, and have counted these rows all the time."""

    def hear(self, message: ClockReply | ClockState) -> None:
        self._advance(message)
        if isinstance(message, ClockReply):
            waiting = self._waiting.pop(message.id, None)
            if waiting is not None:
                waiting(message)

    def receive(self) -> None:
        """Nothing waits here."""

    def close(self) -> None:
        """There is nothing to let go of."""

    def _advance(self, message: ClockReply | ClockState) -> None:
        """States may overtake one another where requests are forwarded; the later one counts."""
        new = ClockState(message.version, message.filled, message.incarnation, message.changes, message.blocked)
        if new.changes < self._state.changes:
            return
        has_changed = new.changes > self._state.changes
        self._state = new
        if has_changed:
            self.on_change()

    def _greet(self, reply: ClockReply) -> None:
        self.batch_rows = reply.batch_rows
        self.max_staleness = reply.max_staleness
        self.on_change()

    def _ask(self, request: AnyClockRequest, reply: Callable[[ClockReply], None]) -> None:
        self._waiting[request.id] = reply
        self._send(request)


class RemoteClock(DistantClock):
    """Accounts behind a socket. Used from the shard's thread only."""

    def __init__(self, endpoint: str, shard: str, context: zmq.Context | None = None) -> None:
        self.socket = (context or zmq.Context.instance()).socket(zmq.DEALER)
        self.socket.setsockopt(zmq.ROUTING_ID, shard.encode())
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(endpoint)
        super().__init__(shard, self._transmit)

    def receive(self) -> None:
        """Handles all that has arrived."""
        assert self.socket is not None, "the clock has been closed"
        while self.socket.poll(0):
            self.hear(_replies.decode(self.socket.recv()))

    def close(self) -> None:
        if self.socket is not None:
            self.socket.close()
            self.socket = None

    def _transmit(self, request: AnyClockRequest) -> None:
        assert self.socket is not None, "the clock has been closed"
        self.socket.send(encode_clock(request))
