"""What shards say to the staleness accounts and what these answer: the messages, and what each does to `Accounts`."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from transfer_queue.errors import WireError
from transfer_queue.staleness import Accounts

Entries = Sequence[tuple[int, int]]
"""(deadline, rows) each."""

NOT_BLOCKED = -1


class ClockRequest(msgspec.Struct, frozen=True, array_like=True, tag=True):
    id: int


class Hello(ClockRequest, frozen=True):
    """A shard's first word. entries: what it has outstanding, if it comes back from a death with its rows."""

    shard: str
    entries: list[tuple[int, int]] = []


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


class Begin(ClockRequest, frozen=True):
    """A new incarnation of the trainer starts at `version`, without the shards that are lost. granted: whether it is
    the current one now."""

    incarnation: int
    at_version: int
    lost: list[str]


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
    due by then keep ready ones waiting (`Accounts.blocked`), or NOT_BLOCKED. is_broken, awaited_shards: as in
    `Accounts`."""

    version: int
    filled: int
    incarnation: int
    changes: int = 0
    blocked: int = NOT_BLOCKED
    is_broken: bool = False
    awaited_shards: int = 0

    @property
    def refuses_by(self) -> str:
        """What a claim or a reservation that is refused now waits for."""
        if self.awaited_shards:
            return f"shards to follow incarnation {self.incarnation}: {self.awaited_shards} yet to do so"
        return "staleness"


class ClockReply(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """granted: entries, groups, or whether. turn: to a Turn, the deadline up to which to drop. batch_rows,
    max_staleness, surplus_rows: of the accounts, and always the same."""

    id: int
    granted: int
    state: ClockState
    batch_rows: int
    max_staleness: int
    turn: int = NOT_BLOCKED
    surplus_rows: int = 0


AnyClockRequest = Hello | Admit | Claim | CloseUpdate | Begin | Shift | Retire | Turn | EndTurn | Unclaim
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


def serve_clock_request(accounts: Accounts, request: AnyClockRequest, num_shards: int = 1) -> ClockReply | None:
    """Applies the request; None if it has no reply. num_shards: those that a new incarnation waits for."""
    granted = 0
    turn: int | None = None
    match request:
        case Hello():
            accounts.enter(request.entries)
        case Admit():
            granted = accounts.admit_groups(request.deadline, request.rows, request.groups)
        case Claim():
            granted = accounts.claim_prefix(request.update, request.incarnation, request.entries)
            if request.may_drop and not granted and request.update == accounts.version:
                accounts.note_refused(*request.entries[0])
        case CloseUpdate():
            granted = int(accounts.close(request.update, request.incarnation))
        case Begin():
            if request.incarnation > accounts.incarnation and 0 <= request.at_version <= accounts.version:
                accounts.begin(request.incarnation, request.at_version, num_shards)
            granted = int(request.incarnation == accounts.incarnation)
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
    return ClockReply(
        request.id, granted, clock_state(accounts), accounts.batch_rows, accounts.max_staleness,
        NOT_BLOCKED if turn is None else turn, accounts.surplus_rows,
    )  # fmt: skip


def clock_state(accounts: Accounts) -> ClockState:
    blocked = accounts.blocked
    return ClockState(
        accounts.version, accounts.filled, accounts.incarnation, accounts.changes,
        NOT_BLOCKED if blocked is None else blocked, accounts.is_broken, accounts.awaited_shards,
    )  # fmt: skip


def decode_clock_answer(frame: bytes) -> ClockReply | ClockState:
    return _replies.decode(frame)
