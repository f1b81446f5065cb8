"""What relays say to each other: frozen msgspec structs, a payload in a frame of its own.

Open -> Opened      hold version v for me, and let go of what you held for me before
Ask -> Given + payload, or Gone
Done                v has arrived; it is the base of changes from now on
"""

from __future__ import annotations

import msgspec

NO_BASE = -1


class Open(msgspec.Struct, frozen=True, tag=True):
    version: int


class Opened(msgspec.Struct, frozen=True, tag=True):
    """is_there: False if the version has gone here, or has not come yet."""

    version: int
    is_there: bool


class Ask(msgspec.Struct, frozen=True, tag=True):
    """base: a version that the asker has whole, or NO_BASE."""

    version: int
    index: int
    base: int


class Given(msgspec.Struct, frozen=True, tag=True):
    """The payload follows. encoding: see `delta.py`, against `base`; digest: xxh3 of the slice's bytes."""

    version: int
    index: int
    encoding: int
    base: int
    digest: int


class Gone(msgspec.Struct, frozen=True, tag=True):
    """The version is not here (any more)."""

    version: int
    index: int


class Done(msgspec.Struct, frozen=True, tag=True):
    version: int


Question = Open | Ask | Done
Answer = Opened | Given | Gone

encode = msgspec.msgpack.Encoder().encode
decode_question = msgspec.msgpack.Decoder(Question).decode
decode_answer = msgspec.msgpack.Decoder(Answer).decode
