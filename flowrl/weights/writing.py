"""Getting a rank's pieces of a version into the version's file. Every rank has one writer; no tensor is gathered.

`PooledWriter` writes to buffers in shared memory that all ranks of a node have mapped; `FileWriter` to a new file in a
directory that all ranks see. Calls come in this order: open, write, agree, then commit or abandon; from `agree` on
possibly in another thread.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import torch

from flowrl.weights.buffers import Buffer, create_file, link
from flowrl.weights.devices import Registered, copy_to_host
from flowrl.weights.lending import Borrower, Lender
from flowrl.weights.plan import Piece, Plan
from flowrl.weights.pool import BufferPool, OnPublished
from flowrl.weights.progress import Followed, Progress
from flowrl.weights.ranks import Ranks, WeightsError, raise_for
from flowrl.weights.store import WeightStore

_CHUNK_BYTES = 1 << 20
_STEP_BYTES = 64 << 20

Locals = Mapping[str, torch.Tensor]


class Writer(Protocol):
    def open(self, version: int) -> None:
        """On every rank: a place to write to."""
        ...

    def write(self, tensors: Locals) -> None:
        """This rank's pieces, from the tensors (or shards) that it has."""
        ...

    def agree(self, version: int, error: Exception | None) -> None:
        """On every rank, once it has written or failed with `error`: raises that, or a WeightsError naming the ranks
        that failed."""
        ...

    def commit(self, version: int, pin: str) -> Path | None:
        """On every rank, after all have agreed. The path on those that publish, if it is visible already."""
        ...

    def abandon(self) -> None:
        """On every rank, instead of commit."""
        ...

    def discard_newer_than(self, version: int) -> None:
        """On every rank: see `WeightStore.discard_newer_than`."""
        ...

    def close(self) -> None: ...


class PooledWriter:
    """publishers: of every node. store: this node's, on the rank that publishes there, None on its peers. root: the
    store's. followed: None on all ranks if no relay takes versions before they are whole."""

    def __init__(
        self,
        plan: Plan,
        ranks: Ranks,
        publishers: Sequence[int],
        root: Path,
        store: WeightStore | None,
        companions: Sequence[Path],
        on_published: OnPublished,
        followed: Followed | None,
    ) -> None:
        self._pieces = plan.pieces(ranks.rank)
        self._end = plan.layout.num_bytes
        self._touched = [(piece.begin, piece.end) for piece in self._pieces]
        self._publisher = publisher_of(ranks.rank, publishers)
        peers = [rank for rank in range(ranks.size) if publisher_of(rank, publishers) == ranks.rank != rank]
        self._pool = None if store is None else BufferPool(store, plan.layout, companions, on_published)
        self._views: dict[int, list[torch.Tensor]] = {}
        self._registered: dict[int, Registered] = {}
        self._buffer: Buffer | None = None
        self._live: Sequence[int] = ()
        self._begun: int | None = None
        self._steps = _steps(self._pieces)
        self._key = -1
        self._lender = Lender(root, peers) if peers else None
        self._ranks = ranks.apart() if len(publishers) > 1 else None
        ranks.agree(None, "lending buffers")
        self._followed = followed
        self._progress = Progress(root, ranks.rank - self._publisher) if followed is not None else None
        self._borrower = None if self._pool else Borrower(root, ranks.rank)

    def open(self, version: int) -> None:
        self._begun = None
        if self._progress is not None:
            self._progress.begin(version)
        if self._pool is None:
            assert self._borrower is not None, "either the pool's owner or one of its peers"
            lent = self._borrower.receive(self._touched)
            if lent is None:
                raise WeightsError(f"version {version}: rank {self._publisher} has no room for it; see its log")
            self._keep(lent.key, lent.live, lent.file)
            return
        if self._buffer is None:
            try:
                self._buffer = self._pool.begin()
            except OSError:
                if self._lender is not None:
                    self._lender.refuse()
                raise
            self._lend(self._buffer)
        self._keep(self._buffer.key, self._live, self._buffer.bytes)
        if self._followed is not None:
            self._begun = version
            self._followed.begun(version, self._buffer.path)

    def write(self, tensors: Locals) -> None:
        views = self._views[self._key]
        sources = [tensors[piece.name] for piece in self._pieces]
        if self._key not in self._registered and any(source.is_cuda for source in sources):
            self._registered[self._key] = Registered(views)
        pairs = list(zip(views, sources, strict=True))
        if self._progress is None:
            return copy_to_host(pairs)
        for first, last in self._steps:
            copy_to_host(pairs[first:last])
            self._progress.reach(self._pieces[last].begin if last < len(pairs) else self._end)

    def agree(self, version: int, error: Exception | None) -> None:
        if self._ranks is not None:  # on several nodes
            return self._ranks.agree(error, f"version {version}")
        raise_for(error, self._failed(version, error is None), f"version {version}")

    def commit(self, version: int, pin: str) -> Path | None:
        if self._pool is None:
            return None
        buffer, self._buffer = self._buffer, None
        assert buffer is not None, "opened before"
        path = self._pool.commit(buffer, version, pin)
        # The next one at once: ranks that had to wait for it would run one after the other where cores are few, because
        # the kernel takes whoever wakes somebody else to be about to sleep.
        self._buffer = self._pool.begin_early()
        if self._buffer is not None:
            self._lend(self._buffer)
        return path

    def abandon(self) -> None:
        if self._pool is not None and self._buffer is not None:
            self._pool.abandon(self._buffer)
            self._buffer = None
            if self._followed is not None and self._begun is not None:
                self._followed.failed(self._begun)

    def discard_newer_than(self, version: int) -> None:
        if self._pool is not None:
            self._pool.discard_newer_than(version)

    def close(self) -> None:
        with ExitStack() as stack:  # all of them, whatever one raises
            for end in (self._progress, self._ranks, self._borrower, self._lender, self._pool):
                if end is not None:
                    stack.callback(end.close)
            self._forget([])

    def _lend(self, buffer: Buffer) -> None:
        assert self._pool is not None, "of the pool's owner"
        self._live = self._pool.live_keys()
        if self._lender is not None:
            self._lender.send(buffer.key, self._live, buffer.fd)

    def _failed(self, version: int, is_written: bool) -> Collection[int]:
        """The ranks that could not write it. Peers tell the one that publishes, and it tells them."""
        if self._borrower is not None:
            try:
                self._borrower.report(version, is_written)
                return self._borrower.failed(version)
            except OSError as error:
                raise WeightsError(f"version {version}: rank {self._publisher}, which publishes it: {error}") from error
        failed = [] if is_written else [self._publisher]
        if self._lender is not None:
            failed += self._lender.failed(version)
            self._lender.tell(version, failed)
        return failed

    def _keep(self, key: int, live: Sequence[int], file: torch.Tensor | None) -> None:
        """Views of this rank's pieces in each buffer that lives; they are made once."""
        self._key = key
        self._forget(live)
        if key not in self._views:
            assert file is not None, "a buffer that is new here comes with its file"
            self._views[key] = [_view(file, piece) for piece in self._pieces]

    def _forget(self, live: Sequence[int]) -> None:
        """All buffers but those."""
        for key in self._registered.keys() - set(live):
            self._registered.pop(key).close()
        self._views = {key: views for key, views in self._views.items() if key in live}


class FileWriter:
    """root: seen by all ranks. Each writes with calls, not through a mapping, which some network file systems lack."""

    def __init__(
        self,
        plan: Plan,
        ranks: Ranks,
        root: Path,
        store: WeightStore | None,
        companions: Sequence[Path],
        on_published: OnPublished,
    ) -> None:
        self._layout = plan.layout
        self._pieces = plan.pieces(ranks.rank)
        self._ranks = ranks.apart()
        self._root = root
        self._store = store
        self._companions = companions
        self._on_published = on_published
        self._staging: Path | None = None
        if store is not None:
            store.prepare()

    def open(self, version: int) -> None:
        self._staging = self._root / f".new-v{version:08d}"
        error = None
        if self._store is not None:
            try:
                self._make_staging()
            except OSError as failure:
                error = failure
        self._ranks.agree(error, f"version {version}")

    def write(self, tensors: Locals) -> None:
        assert self._staging is not None, "opened before"
        fd = os.open(self._staging / self._layout.file_name, os.O_WRONLY | os.O_CLOEXEC)
        try:
            for piece in self._pieces:
                for begin, chunk in _cast_chunks(tensors[piece.name], piece):
                    os.pwrite(fd, chunk, begin)
            os.fsync(fd)
        finally:
            os.close(fd)

    def agree(self, version: int, error: Exception | None) -> None:
        self._ranks.agree(error, f"version {version}")

    def commit(self, version: int, pin: str) -> Path | None:
        if self._store is None:
            return None
        assert self._staging is not None, "opened before"
        path = self._store.path(version)
        if path.exists():
            self.abandon()
            raise ValueError(f"version: {version} is published at {path}; a published version is never written again")
        (self._staging / self._layout.file_name).chmod(0o444)
        if pin:
            self._store.pin_from(self._staging, version, pin)
        self._staging.rename(path)
        for old in self._store.versions()[: -self._store.buffers]:
            self._store.remove(self._store.path(old))
        self._on_published(version, path)
        return path

    def abandon(self) -> None:
        if self._store is not None and self._staging is not None:
            shutil.rmtree(self._staging, ignore_errors=True)

    def discard_newer_than(self, version: int) -> None:
        if self._store is not None:
            self._store.discard_newer_than(version)

    def close(self) -> None:
        self.abandon()
        self._ranks.close()

    def _make_staging(self) -> None:
        assert self._staging is not None, "it has a name"
        self._staging.mkdir(parents=True)
        try:
            for source in self._companions:
                link(source, self._staging / source.name)
            os.close(create_file(self._staging / self._layout.file_name, self._layout))
        except OSError:
            self.abandon()
            raise


def publisher_of(rank: int, publishers: Sequence[int]) -> int:
    """The nearest before it."""
    return max(publisher for publisher in publishers if publisher <= rank)


def _steps(pieces: Sequence[Piece]) -> list[tuple[int, int]]:
    """Runs [first, last) of pieces, after each of which it is worth to say how far one has come; one at least."""
    steps, first, num_bytes = [], 0, 0
    for index, piece in enumerate(pieces):
        num_bytes += piece.kind.num_bytes
        if num_bytes >= _STEP_BYTES:
            steps.append((first, index + 1))
            first, num_bytes = index + 1, 0
    if first < len(pieces) or not steps:
        steps.append((first, len(pieces)))
    return steps


def _view(file: torch.Tensor, piece: Piece) -> torch.Tensor:
    return file[piece.begin : piece.end].view(piece.kind.dtype).view(piece.kind.shape)


def _cast_chunks(tensor: torch.Tensor, piece: Piece) -> Iterator[tuple[int, memoryview]]:
    """(offset in the file, bytes): cast a chunk at a time, in a buffer that stays in the cache."""
    dtype = piece.kind.dtype
    flat = (tensor.to(dtype).cpu() if tensor.is_cuda else tensor).reshape(-1)
    each = _CHUNK_BYTES // dtype.itemsize
    staging = torch.empty(min(each, len(flat)), dtype=dtype)
    for begin in range(0, len(flat), each):
        part = flat[begin : begin + each]
        cast = staging[: len(part)]
        cast.copy_(part)
        yield piece.begin + begin * dtype.itemsize, cast.view(torch.uint8).numpy().data
