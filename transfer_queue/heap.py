"""The segments that a shard knows: how many parcels each holds, and when it may be filled again.

    in use -> idle (no parcel in it) -> told to its writer (once nothing of it is still being sent) -> in use
                                        or removed, beyond IDLE_BYTES a writer

An idle segment's generation is raised at once, so a reader that is still copying out of it will notice. The segment of
small puts that a writer filled last is never removed while the writer lives: more may be on its way into it.
"""

from __future__ import annotations

from transfer_queue import wire
from transfer_queue.segments import Segment
from transfer_queue.writer import SEGMENT_BYTES, Space

IDLE_BYTES = 64 << 20


class Held:
    """puts: how many the shard has seen in it."""

    __slots__ = ("is_idle", "num_parcels", "puts", "segment")

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self.puts = 0
        self.num_parcels = 0
        self.is_idle = False


class _Writer:
    """latest: the segment of small puts that it filled last. is_survivor: of an earlier life of the shard, which does
    not know any more what that is, and lets it keep them all. untold: idle segments, and names of removed ones, that it
    does not know of. offered: bytes of idle segments that it may have been told of and has not used."""

    def __init__(self) -> None:
        self.latest = ""
        self.has_written = False
        self.is_survivor = False
        self.untold: dict[str, Held] = {}
        self.removed: list[wire.Recycled] = []
        self.offered: dict[str, int] = {}


class Heap:
    """Writer 0 is the shard itself."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self.num_bytes = 0
        self._held: dict[str, Held] = {}
        self._writers: dict[int, _Writer] = {0: _Writer()}
        self._num_writers = 1

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, name: str) -> bool:
        return name in self._held

    def add_writer(self) -> int:
        """A number for one who writes here. What dead writers have left idle goes."""
        for number, writer in list(self._writers.items()):
            if number and writer.has_written and not self.space.is_writer_alive(number):
                del self._writers[number]
                for name in (*writer.untold, *writer.offered):
                    self._remove(self._held[name])
        self._num_writers += 1
        self._writers[self._num_writers - 1] = _Writer()
        return self._num_writers - 1

    def held(self, name: str) -> Held:
        return self._held[name]

    def keep(self, segment: Segment) -> Held:
        """A segment in which something new lies."""
        held = self._held.get(segment.name)
        if held is None:
            held = self._held[segment.name] = Held(segment)
            self.num_bytes += segment.capacity
        held.is_idle = False
        writer = self._writers.get(segment.writer)
        if writer is not None:
            writer.has_written = True
            writer.latest = segment.name if segment.capacity == SEGMENT_BYTES else writer.latest
            writer.untold.pop(segment.name, None)
            writer.offered.pop(segment.name, None)
        return held

    def see_put(self, name: str) -> Held:
        """A producer has written a put there. Raises WireError if there is no such segment."""
        known = self._held.get(name)
        held = self.keep(known.segment if known is not None else self.space.open(name))
        held.puts += 1
        return held

    def reopen(self, name: str) -> Held:
        """A segment of an earlier life. Its writer may live, and go on with it. Raises WireError if it is not there."""
        return self._held.get(name) or self.keep(self.space.open(name))

    def sweep(self) -> None:
        """After an earlier life: removes segments in which nothing lies, unless their writer lives, who may be about to
        say that there is something. A number that was given out is not given again."""
        for name in self.space.names():
            number = int(name.partition(".")[0])
            self._num_writers = max(self._num_writers, number + 1)
            held = self._held.get(name)
            if self.space.is_writer_alive(number):
                self._writers[number] = _Writer()
                self._writers[number].has_written = self._writers[number].is_survivor = True
            elif held is None or not held.num_parcels:
                self.space.remove(name)

    def settle(self, held: Held) -> None:
        """Idle, if no parcel is in it."""
        if held.num_parcels or held.is_idle:
            return
        held.is_idle = True
        held.segment.advance()
        writer = self._writers.get(held.segment.writer)
        if writer is None:
            self._remove(held)
            return
        writer.untold[held.segment.name] = held
        idle = sum(writer.offered.values()) + sum(other.segment.capacity for other in writer.untold.values())
        if idle > IDLE_BYTES and held.segment.name != writer.latest and not writer.is_survivor:
            del writer.untold[held.segment.name]
            writer.removed.append(wire.Recycled(held.segment.name, held.puts, True))
            self._remove(held)

    def recycled(self, number: int) -> list[wire.Recycled]:
        """What this writer has not been told yet."""
        writer = self._writers.get(number)
        if writer is None or not (writer.untold or writer.removed):
            return []
        news, writer.removed = writer.removed, []
        for name, held in list(writer.untold.items()):
            if not held.segment.is_lent:
                writer.offered[name] = held.segment.capacity
                news.append(wire.Recycled(name, held.puts, False))
                del writer.untold[name]
        return news

    def close(self) -> None:
        self._held.clear()
        self.space.close()

    def _remove(self, held: Held) -> None:
        del self._held[held.segment.name]
        self.num_bytes -= held.segment.capacity
        self.space.remove(held.segment.name)
