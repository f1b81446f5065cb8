"""What an engine and a trainer rank say to each other beside the bytes: frozen msgspec structs over ZeroMQ.

engine announces   EngineNews: where to find it
rank    Hello      what it will send of each version
engine  Open    -> Opened      keep version v for me
engine  Go      -> (bytes, in rounds)
engine  Done                   let go of it
"""

from __future__ import annotations

import msgspec


class EngineNews(msgspec.Struct, frozen=True):
    """name: of the worker; endpoint: where ranks connect to it; store: where the process group meets, a file's path or
    `host:port`; bucket_bytes: of a round; group: the process group's name, no two have the same."""

    name: str
    endpoint: str
    store: str
    bucket_bytes: int
    group: str


class Hello(msgspec.Struct, frozen=True, tag=True):
    """ranges: of the version's file, which this rank sends. header: the file's, from which all else follows."""

    rank: int
    num_ranks: int
    fingerprint: str
    ranges: list[tuple[int, int]]
    num_bytes: int
    header: bytes


class Open(msgspec.Struct, frozen=True, tag=True):
    """digest: whether xxh3 of the rank's bytes is wanted."""

    version: int
    digest: bool


class Opened(msgspec.Struct, frozen=True, tag=True):
    """is_there: False if a newer version has taken its place. digest: 0 where none was wanted."""

    version: int
    is_there: bool
    digest: int


class Go(msgspec.Struct, frozen=True, tag=True):
    version: int


class Done(msgspec.Struct, frozen=True, tag=True):
    version: int


encode = msgspec.msgpack.Encoder().encode
decode_to_rank = msgspec.msgpack.Decoder(Open | Go | Done).decode
decode_to_engine = msgspec.msgpack.Decoder(Hello | Opened).decode
