"""The buffers of one node, and which of them holds what. One process has the pool, the one that publishes on the node.

    FREE -> WRITING -> VISIBLE -> FREE (old, and nobody reads it)      VISIBLE -> HELD -> FREE (somebody still did)
                       WRITING -> PENDING -> VISIBLE                    PENDING -> WRITING (a newer version)
                       VISIBLE, PENDING -> gone (pinned: the file belongs to the pin, another takes its place)

There are `buffers` + 1 of them, so there is always one to write to, and the trainer never waits for a reader: a version
that would leave none stays PENDING, is replaced by a newer one, or appears as soon as a reader lets go.
"""

from __future__ import annotations

import enum
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from flowrl.weights.buffers import Blank, Buffer
from flowrl.weights.mappings import MappingServer
from flowrl.weights.store import WeightStore, version_name

_RETRY_S = 0.02
_CREATE_TIMEOUT_S = 300.0

OnPublished = Callable[[int, Path], None]


class BufferState(enum.Enum):
    """The module's docstring draws the arrows."""

    FREE = "free"
    WRITING = "writing"
    PENDING = "pending"
    VISIBLE = "visible"
    HELD = "held"


class BufferPool:
    """`on_published(version, path)` is called once a version is there to be read: by `commit`, or by the pool's own
    thread. Usable from one thread beside that."""

    def __init__(self, store: WeightStore, blank: Blank, companions: Sequence[Path], on_published: OnPublished) -> None:
        self._store = store
        self._blank = blank
        self._companions = companions
        self._on_published = on_published
        self._states: dict[Buffer, BufferState] = {}
        self._versions: dict[Buffer, int] = {}
        self._next_key = 0
        self._changed = threading.Condition()
        self._failure: OSError | None = None
        self._is_closed = False
        store.prepare()
        self._create()
        self._readers = MappingServer(store.root, self._file_of)
        self._thread = threading.Thread(target=self._tend, name="weight-buffers", daemon=True)
        self._thread.start()

    def live_keys(self) -> list[int]:
        """Of the buffers that the pool has."""
        with self._changed:
            return sorted(buffer.key for buffer in self._states)

    def begin(self) -> Buffer:
        """A buffer to write the next version to. Raises OSError if there was no room to make one."""
        with self._changed:
            for pending in self._in_state(BufferState.PENDING):
                if pending.is_pinned():
                    self._reclaim(pending)
                    self._changed.notify_all()
            found = self._in_state(BufferState.PENDING) or self._in_state(BufferState.FREE)
            while not found:
                if self._failure is not None:
                    raise self._failure
                if not self._changed.wait(_CREATE_TIMEOUT_S):
                    raise TimeoutError(f"weights: no buffer was made in {_CREATE_TIMEOUT_S:.0f} s")
                found = self._in_state(BufferState.FREE)
            self._states[found[0]] = BufferState.WRITING
            return found[0]

    def begin_early(self) -> Buffer | None:
        """As `begin`, long before anything will be written; None unless one is free, to be asked again then."""
        with self._changed:
            if self._in_state(BufferState.PENDING) or not (free := self._in_state(BufferState.FREE)):
                return None
            self._states[free[0]] = BufferState.WRITING
            return free[0]

    def commit(self, buffer: Buffer, version: int, pin: str) -> Path | None:
        """Shows what has been written as `version`; the path, or None if it has to wait for a reader. Pinned it is at
        once, if `pin` is not empty. Raises ValueError if the version is there already."""
        path = self._store.path(version)
        if path.exists():
            self.abandon(buffer)
            raise ValueError(f"version: {version} is published at {path}; a published version is never written again")
        buffer.set_read_only(True)
        if pin:
            self._store.pin_from(buffer.path, version, pin)
        with self._changed:
            self._versions[buffer] = version
            self._states[buffer] = BufferState.PENDING
            is_visible = self._show_pending()
            self._changed.notify_all()
        if is_visible:
            self._on_published(version, path)
        return path if is_visible else None

    def abandon(self, buffer: Buffer) -> None:
        """What has been written is not to be seen."""
        with self._changed:
            self._states[buffer] = BufferState.FREE
            self._changed.notify_all()

    def discard_newer_than(self, version: int) -> None:
        """See `WeightStore.discard_newer_than`."""
        with self._changed:
            for buffer in self._in_state(BufferState.VISIBLE) + self._in_state(BufferState.PENDING):
                if self._versions[buffer] > version:
                    self._hide(buffer)
            self._changed.notify_all()

    def close(self) -> None:
        """Shows what has waited for a reader, since no buffer is needed after it; leaves what is visible, and removes
        the rest."""
        with self._changed:
            self._is_closed = True
            waited = self._in_state(BufferState.PENDING)
            for buffer in waited:
                self._expose(buffer)
            self._changed.notify_all()
        self._thread.join()
        for buffer in waited:
            self._on_published(self._versions[buffer], buffer.path)
        self._readers.close()
        for buffer, state in self._states.items():
            if state is not BufferState.VISIBLE:
                shutil.rmtree(buffer.path)
            buffer.close()
        self._states.clear()

    def _file_of(self, inode: int) -> int | None:
        """For readers that keep a mapping of it."""
        with self._changed:
            return next((buffer.fd for buffer in self._states if os.fstat(buffer.fd).st_ino == inode), None)

    def _tend(self) -> None:
        """Makes buffers until there are enough, and shows a pending version when that has become possible."""
        while True:
            with self._changed:
                if self._is_closed:
                    return
                shown = self._in_state(BufferState.PENDING)
                if not (shown and self._show_pending()):
                    shown = []
                is_wanting = len(self._states) <= self._store.buffers and self._failure is None
                if not shown and not is_wanting:
                    self._changed.wait(_RETRY_S if self._in_state(BufferState.PENDING) else None)
                    continue
            for buffer in shown:
                self._on_published(self._versions[buffer], buffer.path)
            if is_wanting:
                self._create()

    def _create(self) -> None:
        """Outside the lock: it takes as long as the pages do."""
        key, self._next_key = self._next_key, self._next_key + 1
        try:
            buffer = Buffer(key, self._store.root / f".buffer-{key}", self._blank, self._companions)
        except OSError as error:
            self._failure = error
            with self._changed:
                self._changed.notify_all()
            return
        with self._changed:
            self._states[buffer] = BufferState.FREE
            self._changed.notify_all()

    def _show_pending(self) -> bool:
        """By one rename, if a buffer is left to write the next version to, or can be made."""
        (buffer,) = self._in_state(BufferState.PENDING)
        if not self._in_state(BufferState.FREE) and len(self._states) > self._store.buffers and not self._retire():
            return False
        self._expose(buffer)
        mine = {self._versions[other] for other in self._in_state(BufferState.VISIBLE)}
        for old in self._store.versions()[: -self._store.buffers]:
            if old not in mine:  # of a writer before this one
                self._store.remove(self._store.path(old))
        return True

    def _expose(self, buffer: Buffer) -> None:
        buffer.move(self._store.root / version_name(self._versions[buffer]))
        self._states[buffer] = BufferState.VISIBLE

    def _retire(self) -> bool:
        """Takes back a version, an old one first, that nobody reads; never the newest that is visible."""
        for buffer in self._in_state(BufferState.HELD):
            if self._reclaim(buffer):
                return True
        visible = sorted(self._in_state(BufferState.VISIBLE), key=lambda buffer: self._versions[buffer])
        for buffer in visible[:-1]:
            if buffer.is_pinned() or buffer.is_unread():
                self._hide(buffer)
                if self._states.get(buffer) is not BufferState.HELD:
                    return True
        return False

    def _hide(self, buffer: Buffer) -> None:
        """Takes the name away; then nobody can come who is not there, and it is known whether somebody is."""
        buffer.move(self._store.root / f".buffer-{buffer.key}")
        self._states[buffer] = BufferState.HELD
        self._reclaim(buffer)

    def _reclaim(self, buffer: Buffer) -> bool:
        if buffer.is_pinned():
            del self._states[buffer]
            buffer.drop()
            return True
        if not buffer.is_unread():
            return False
        buffer.set_read_only(False)
        self._states[buffer] = BufferState.FREE
        return True

    def _in_state(self, state: BufferState) -> list[Buffer]:
        return [buffer for buffer, found in self._states.items() if found is state]
