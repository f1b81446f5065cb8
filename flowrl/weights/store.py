"""Published versions of the weights on one node: directories under one root, each whole from the moment it has a name.

    root/v00000012/            model.safetensors, beside links to config and tokenizer: a Hugging Face directory
    root/pins/eval/v00000012/  the same inodes, kept until they are unpinned
    root/.new-…, root/.old-…   being written, being removed; no reader looks there

One process writes, any number read. A published file is never written again; a reader that has it open or mapped keeps
it after the version is removed, and one that comes too late finds no file at all.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from flowrl.weights.tensorfile import TensorFileLayout, write_tensors

WEIGHTS_FILE = "model.safetensors"
VERSION_NAME = re.compile(r"v(\d{8,})")
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack"}


class Published(NamedTuple):
    version: int
    path: Path


class WeightStore:
    """`buffers`: how many of the newest versions stay."""

    def __init__(self, root: Path, buffers: int) -> None:
        if buffers < 1:
            raise ValueError(f"weights.buffers: {buffers}; must be at least 1")
        self.root = root
        self._buffers = buffers
        self._has_written = False

    def path(self, version: int) -> Path:
        """Where the version is, was or will be."""
        return self.root / version_name(version)

    def versions(self) -> list[int]:
        """Those published and not yet removed, oldest first."""
        matches = (VERSION_NAME.fullmatch(name) for name in os.listdir(self.root)) if self.root.exists() else ()
        return sorted(int(match[1]) for match in matches if match)

    def latest(self) -> Published | None:
        versions = self.versions()
        return Published(versions[-1], self.path(versions[-1])) if versions else None

    def write(
        self,
        version: int,
        layout: TensorFileLayout,
        tensors: Iterable[tuple[str, torch.Tensor]],
        companions: Sequence[Path],
    ) -> Path:
        """Publishes a version and removes those that are too old. The writer alone may call it.

        Raises ValueError if the version is there already, OSError naming the size if there is no room.
        """
        self._prepare()
        path = self.path(version)
        if path.exists():
            raise ValueError(f"version: {version} is published at {path}; a published version is never written again")
        write_directory(path, layout, tensors, companions, place=_link)
        for old in self.versions()[: -self._buffers]:
            self._remove(self.path(old))
        return path

    def discard_newer_than(self, version: int) -> None:
        """For a writer that has gone back to a checkpoint and will publish those versions anew."""
        for newer in self.versions():
            if newer > version:
                self._remove(self.path(newer))

    def pin(self, version: int, name: str) -> Path:
        """Keeps a version beyond its turn, by hard links, at the path returned. Pinning it twice is pinning it once.

        Raises FileNotFoundError if it has been removed already.
        """
        target = self.root / "pins" / name / version_name(version)
        if target.exists():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = target.parent / f".new-{target.name}-{os.getpid()}"
        staging.mkdir()
        try:
            for source in self.path(version).iterdir():
                os.link(source, staging / source.name, follow_symlinks=False)
            if not (staging / WEIGHTS_FILE).exists():
                raise FileNotFoundError(errno.ENOENT, "removed while it was being pinned", str(self.path(version)))
            staging.rename(target)
        except OSError:
            shutil.rmtree(staging)
            raise
        return target

    def pinned(self, name: str) -> list[Published]:
        """What `name` has pinned, oldest first."""
        pins = self.root / "pins" / name
        matches = (VERSION_NAME.fullmatch(entry) for entry in os.listdir(pins)) if pins.exists() else ()
        versions = sorted(int(match[1]) for match in matches if match)
        return [Published(version, pins / version_name(version)) for version in versions]

    def unpin(self, version: int, name: str) -> None:
        """Does nothing if it is not pinned."""
        target = self.root / "pins" / name / version_name(version)
        if target.exists():
            self._remove(target)

    def _prepare(self) -> None:
        """On the first write: makes the root, and clears what a writer that died here left half-done."""
        if self._has_written:
            return
        self.root.mkdir(parents=True, exist_ok=True)
        for left in (*self.root.glob(".new-*"), *self.root.glob(".old-*")):
            shutil.rmtree(left)
        self._has_written = True

    def _remove(self, path: Path) -> None:
        """Takes the name away first, so that no reader finds a directory with half its files."""
        removed = path.parent / f".old-{path.name}-{os.getpid()}"
        path.rename(removed)
        shutil.rmtree(removed)


def version_name(version: int) -> str:
    return f"v{version:08d}"


def companions_of(model_dir: Path) -> list[Path]:
    """What stands beside the weights: configuration, tokenizer, code."""
    return [
        path.resolve()
        for path in sorted(model_dir.iterdir())
        if path.is_file()
        and path.suffix not in WEIGHT_SUFFIXES
        and not path.name.startswith(".")
        and not path.name.endswith(".index.json")
    ]


def write_directory(
    path: Path,
    layout: TensorFileLayout,
    tensors: Iterable[tuple[str, torch.Tensor]],
    companions: Sequence[Path],
    place: Callable[[Path, Path], object],
) -> None:
    """A Hugging Face directory, under another name until it is whole. `place(source, target)` links or copies."""
    staging = path.parent / f".new-{path.name}-{os.getpid()}"
    staging.mkdir(parents=True)
    try:
        for source in companions:
            place(source, staging / source.name)
        write_tensors(staging / WEIGHTS_FILE, layout, tensors)
        staging.rename(path)
    except BaseException as error:
        shutil.rmtree(staging)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise OSError(errno.ENOSPC, f"no room for {layout.num_bytes} bytes of weights", str(path)) from error
        raise


def _link(source: Path, target: Path) -> None:
    """A hard link lives on when the model directory goes; between file systems only a symbolic one is possible."""
    try:
        os.link(source, target)
    except OSError:
        os.symlink(source, target)
