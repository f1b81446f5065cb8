"""A slice as it travels: whole, or as the bytes that changed against a version that both ends have.

At small learning rates most bfloat16 weights keep their bits in an update. What is sent then is new XOR old, its byte
planes apart (the high bytes hardly ever change), compressed: never more bytes than the whole. Bytes are compared, not
guessed, and the digest of the new bytes is verified whatever the way.
"""

from __future__ import annotations

import enum

import numpy as np
import xxhash
import zstandard

_PLANES = 4
_LEVEL = 1


def goes_whole(turn: int, anchor_every: int, whole_s: float, changes_s: float) -> bool:
    """Whether a node asks for whole slices in its transfer number `turn`, from 0. The other two: what the last transfer
    of each kind took. Of `anchor_every` transfers the first is whole, and the second of changes; the others go as was
    faster. So both are known, and neither for long."""
    place = turn % anchor_every
    return place == 0 or (place > 1 and whole_s < changes_s)


class Encoding(enum.IntEnum):
    """WHOLE: the bytes. SAME: nothing changed, nothing is sent. CHANGES: see `encode`."""

    WHOLE = 0
    SAME = 1
    CHANGES = 2


def digest(data: np.ndarray) -> int:
    return xxhash.xxh3_64_intdigest(data.data)


def encode(new: np.ndarray, base: np.ndarray | None) -> tuple[Encoding, bytes | np.ndarray]:
    """Of uint8 arrays of equal length; without a base the whole. The payload is never longer than `new`."""
    if base is None:
        return Encoding.WHOLE, new
    changed = np.bitwise_xor(new, base)
    if not changed.any():
        return Encoding.SAME, b""
    packed = zstandard.ZstdCompressor(level=_LEVEL).compress(_into_planes(changed).data)
    return (Encoding.CHANGES, packed) if len(packed) < len(new) else (Encoding.WHOLE, new)


def decode(encoding: Encoding, payload: memoryview | bytes, base: np.ndarray | None, num_bytes: int) -> np.ndarray:
    """The new bytes. Raises ValueError for a payload that cannot be what it is said to be."""
    if encoding is Encoding.WHOLE:
        whole = np.frombuffer(payload, np.uint8)
        if len(whole) != num_bytes:
            raise ValueError(f"a slice of {num_bytes} bytes came with {len(whole)}")
        return whole
    if base is None:
        raise ValueError("changes came to a version that is not here")
    if encoding is Encoding.SAME:
        return base
    try:
        said = zstandard.get_frame_parameters(payload).content_size
        if said != num_bytes:  # before anything is allocated for it
            raise ValueError(f"changes of {num_bytes} bytes that say they are {said}")
        planes = zstandard.ZstdDecompressor().decompress(payload)
    except zstandard.ZstdError as error:
        raise ValueError(f"changes that cannot be unpacked: {error}") from error
    return np.bitwise_xor(_from_planes(np.frombuffer(planes, np.uint8)), base)


def _into_planes(data: np.ndarray) -> np.ndarray:
    """First bytes of all words, then second ones, and so on; what is no whole word at the end."""
    whole = len(data) // _PLANES * _PLANES
    return np.concatenate([*(data[plane:whole:_PLANES] for plane in range(_PLANES)), data[whole:]])


def _from_planes(planes: np.ndarray) -> np.ndarray:
    each = len(planes) // _PLANES
    data = np.empty_like(planes)
    for plane in range(_PLANES):
        data[plane : each * _PLANES : _PLANES] = planes[plane * each : (plane + 1) * each]
    data[each * _PLANES :] = planes[each * _PLANES :]
    return data
