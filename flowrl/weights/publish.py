"""From sharded parameters to a published version, under the names that the checkpoint on disk has.

Every rank casts its own shards and writes them where they belong, and may train on; a thread of each then agrees with
those of the other ranks that all have, and one rank on each node makes the version visible.
It knows parameters and files, and neither losses nor queues.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import msgspec
import torch
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor

from flowrl.weights.buffers import create_file, has_leases, map_bytes
from flowrl.weights.collective.writer import Collective, CollectiveWriter
from flowrl.weights.form import Form
from flowrl.weights.names import extents_on_disk
from flowrl.weights.plan import Plan, chunk_rows, is_sharded, served_dtypes
from flowrl.weights.pool import OnPublished
from flowrl.weights.progress import Followed
from flowrl.weights.ranks import Ranks, WeightsError
from flowrl.weights.slices import Holdings
from flowrl.weights.store import WeightStore
from flowrl.weights.tensorfile import Kind
from flowrl.weights.writing import FileWriter, PooledWriter, Writer, publisher_of

SERVED_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

logger = logging.getLogger(__name__)


def _ignore(version: int, path: Path) -> None:
    pass


class Publisher:
    """Every rank makes one and publishes with it, in step.

    lm: the Hugging Face model, sharded or not. model_dir: the directory it came from. store: on the ranks that make
    versions visible, None on those that write to the store of the nearest rank before them which has one. is_pooled:
    whether the store is in the memory of this node alone, where files can be reused. collective: instead of any store,
    versions go straight to engines. form: how a version lies on disk, like `model_dir` if None. on_published: called on
    the ranks with a store, possibly by another thread, when a version is there to be read. followed: told of versions
    before that, where a relay is to give them to other nodes while they are written; on all ranks or on none.
    `missing`: names that the directory has and the model does not, which a published version leaves out.
    """

    def __init__(
        self,
        lm: nn.Module,
        model_dir: Path,
        store: WeightStore | None,
        dtype: str,
        *,
        is_pooled: bool = True,
        collective: Collective | None = None,
        form: Form | None = None,
        on_published: OnPublished = _ignore,
        followed: Followed | None = None,
    ) -> None:
        self._form = Form.of_checkpoint(model_dir) if form is None else form
        on_disk = self._form.kinds
        tensors = lm.state_dict(keep_vars=True)
        self._extents = extents_on_disk(tensors, on_disk, model_dir)
        self._tensors: dict[str, torch.Tensor] = {name: tensors[name] for name in self._extents}
        covered = {extent.name for extents in self._extents.values() for extent in extents}
        self.missing = tuple(sorted(set(on_disk) - covered - set(tensors)))
        if self.missing:
            logger.warning("%s: the model does not use %s; published versions lack them", model_dir, self.missing)
        dtypes = served_dtypes(on_disk, self._extents, SERVED_DTYPES[dtype])
        self._ranks = Ranks()
        self.plan = Plan.of(
            self._extents,
            {name: Kind(tensor.shape, dtypes[name]) for name, tensor in self._tensors.items()},
            {name for name, tensor in self._tensors.items() if is_sharded(name, tensor)},
            self._ranks.size,
            self._form.file_name,
        )
        self._refuse_other_shards()
        self._model_dir = model_dir
        self._store = store
        self._is_pooled = is_pooled
        self._collective = collective
        self._on_published = on_published
        self._followed = followed
        self._writer: Writer | None = None
        self._publishers: list[int] = []
        self._thread: ThreadPoolExecutor | None = None
        self._begun: Future[Path | None] | None = None

    @property
    def num_bytes(self) -> int:
        """Of one version."""
        return self.plan.layout.num_bytes

    def publish(self, version: int, *, pin: str = "") -> Path | None:
        """`begin` and `finish`."""
        self.begin(version, pin=pin)
        return self.finish()

    def begin(self, version: int, *, pin: str = "") -> None:
        """On every rank, with parameters sharded. Returns as soon as they may change again; the version is agreed upon
        and made visible in the background. Waits for other ranks the first time, until the version before has been
        agreed upon, and where versions are files on a disk.

        pin: a name under which the version is kept until it is unpinned. Raises what `finish` does, of the version
        before.
        """
        self.finish()
        if self._writer is None:
            self._writer = self._make_writer()
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="publishing")
        error: Exception | None = None
        try:
            self._writer.open(version)
            self._writer.write(self._locals())
        except (OSError, RuntimeError) as failure:
            logger.exception("weights: version %d cannot be written here", version)  # others may end this rank first
            error = failure
        self._begun = self._thread.submit(self._complete, self._writer, version, pin, error)

    def finish(self) -> Path | None:
        """Waits until the version begun last is there. Its path on ranks that make it visible, if it is already; None
        if none was begun, or it has been waited for.

        Raises an error on every rank if one could not write; the version before it is then still in force.
        """
        begun, self._begun = self._begun, None
        return None if begun is None else begun.result()

    def check(self) -> None:
        """Raises what `finish` would if it is known already; waits for nothing."""
        if self._begun is not None and self._begun.done():
            self._begun.result()

    def holdings(self, nodes: Sequence[int]) -> Holdings:
        """What each node's ranks write, once something has been published. nodes: those of the ranks that have a store,
        in the order of their ranks."""
        publishers = [*self._publishers, self._ranks.size]
        spans = [range(first, after) for first, after in pairwise(publishers)]
        held = Holdings.of(nodes, [self.plan.ranges(span) for span in spans], self.num_bytes)
        return msgspec.structs.replace(held, file_name=self._form.file_name, texts=dict(self._form.texts))

    def discard_newer_than(self, version: int) -> None:
        """On every rank, after going back to a checkpoint: those versions will be published anew."""
        self.finish()
        if self._writer is not None:
            self._writer.discard_newer_than(version)

    def close(self) -> None:
        """Leaves what is visible. May be called again. Raises what `finish` does, once all is closed."""
        try:
            self.finish()
        finally:
            if self._thread is not None:
                self._thread.shutdown()
                self._thread = None
            if self._writer is not None:
                self._writer.close()
                self._writer = None

    def check_names(self) -> None:
        """Compares this rank's shards with the checkpoint that they were loaded from, through the plan: a wrong name,
        offset or order would differ. To be called before anything is trained. Raises WeightsError naming the tensor."""
        files = [safe_open(path, framework="pt") for path in sorted(self._model_dir.glob("*.safetensors"))]
        where = {name: file for file in files for name in file.keys()}  # noqa: SIM118
        for name, tensor in self._locals().items():
            begin, end = self._rows(name)
            flat, rest = tensor.reshape(-1), self._tensors[name].shape[1:].numel()
            for extent in self._extents[name]:
                first, last = max(extent.begin, begin * rest), min(extent.begin + extent.shape.numel(), end * rest)
                if first >= last:
                    continue
                mine = flat[first - begin * rest : last - begin * rest]
                theirs = where[extent.name].get_tensor(extent.name).reshape(-1)
                theirs = theirs[first - extent.begin : last - extent.begin].to(mine)
                if not torch.equal(mine, theirs):
                    raise WeightsError(f"weights: {name!r} would be published as {extent.name!r}, which it is not")

    def export(self, path: Path, *, writes: bool = True) -> None:
        """On every rank: a copy that depends on no other directory, at `path`, which must not exist. Gathers one tensor
        after the other, because ranks need not see each other's disks."""
        if path.exists():
            raise ValueError(f"export: {str(path)!r} exists already")
        if not writes:
            for _ in self._full_tensors():
                pass
            return
        staging = path.parent / f".new-{path.name}"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        try:
            for source in self._form.companions:
                shutil.copyfile(source, staging / source.name)
            for name, text in self._form.texts.items():
                (staging / name).write_text(text)
            self._export_tensors(staging / self._form.file_name)
            staging.rename(path)
        except BaseException:
            shutil.rmtree(staging)
            raise

    def full_state(self) -> dict[str, torch.Tensor]:
        """On every rank: all of the model, under the names of its own state, tied tensors once. Unsharded tensors are
        live views."""
        return {name: tensor.detach() for name, tensor in self._full_tensors()}

    def _complete(self, writer: Writer, version: int, pin: str, error: Exception | None) -> Path | None:
        """In the publisher's own thread. error: this rank's, of writing."""
        try:
            writer.agree(version, error)
        except Exception:
            writer.abandon()
            raise
        return writer.commit(version, pin)

    def _make_writer(self) -> Writer:
        """Ranks tell each other where they write; here plans that differ are found out."""
        mine = None if self._store is None else str(self._store.root)
        prints, places = zip(*self._ranks.gather_objects((self.plan.fingerprint, mine)), strict=True)
        differing = [rank for rank, fingerprint in enumerate(prints) if fingerprint != prints[0]]
        if differing:
            raise WeightsError(f"weights: ranks {differing} plan to write other bytes than rank 0; is it one model?")
        publishers = [rank for rank, place in enumerate(places) if place is not None]
        if self._collective is not None:
            return CollectiveWriter(self.plan, self._ranks, self._collective, self._on_published)
        if not publishers or publishers[0] != 0:
            raise ValueError("weights: rank 0 has no store to publish to")
        self._publishers = publishers
        root = Path(places[publisher_of(self._ranks.rank, publishers)])
        companions = [*self._form.companions]
        if self._store is not None:
            self._store.prepare()
            companions += self._store.beside(self._form.texts)
        can_pool = self._is_pooled and (self._store is None or has_leases(self._store.root))
        # All ranks write in one way: where a node's memory tells nothing of readers, no file is written twice.
        if self._is_pooled and all(code for (code,) in self._ranks.gather_numbers([can_pool])):
            return PooledWriter(
                self.plan,
                self._ranks,
                publishers,
                root,
                self._store,
                companions,
                self._on_published,
                self._followed,
            )
        return FileWriter(self.plan, self._ranks, root, self._store, companions, self._on_published)

    def _locals(self) -> Mapping[str, torch.Tensor]:
        with torch.no_grad():
            return {
                name: tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
                for name, tensor in self._tensors.items()
            }

    def _rows(self, name: str) -> tuple[int, int]:
        tensor = self._tensors[name]
        num_rows = tensor.shape[0] if tensor.ndim else 1
        return chunk_rows(self._ranks.rank, num_rows, self._ranks.size) if is_sharded(name, tensor) else (0, num_rows)

    def _refuse_other_shards(self) -> None:
        """What FSDP2 has given to this rank must be what the plan says."""
        tensors = self._locals()
        for name, tensor in self._tensors.items():
            begin, end = self._rows(name)
            planned = (end - begin, *tensor.shape[1:]) if tensor.ndim else ()
            if tuple(tensors[name].shape) != planned:
                raise ValueError(f"weights: {name!r} has a shard of shape {tuple(tensors[name].shape)}, not {planned}")

    def _full_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """One after the other, so that one gathered tensor is alive at a time. An unsharded one is not copied."""
        for name, tensor in self._tensors.items():
            if not isinstance(tensor, DTensor):
                yield name, tensor
            elif tensor.device_mesh.size() == 1:
                yield name, tensor.to_local()
            else:
                yield name, tensor.full_tensor()

    def _export_tensors(self, path: Path) -> None:
        fd = create_file(path, self.plan.layout)
        try:
            file = map_bytes(fd, [])
            begins = {source.name: source for source in self.plan.sources}
            for name, tensor in self._full_tensors():
                kind, begin = begins[name].kind, begins[name].begin
                target = file[begin : begin + kind.num_bytes].view(kind.dtype).view(kind.shape)
                target.copy_(tensor.detach())
            os.fsync(fd)
        finally:
            os.close(fd)
