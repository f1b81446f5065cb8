"""Published versions of the weights on one node: directories under one root, each whole from the moment it has a name.

    root/v00000012/            model.safetensors, beside links to config and tokenizer: a Hugging Face directory; or
                               adapter_model.safetensors, what peft keeps of a model that is elsewhere
    root/pins/eval/v00000012/  the same files, kept until they are unpinned
    root/.…                    being written, waiting, being removed; no reader looks there but the node's relay

One process of a node publishes, any number reads. A file is never written to while somebody can read it: a reader that
has it open or mapped keeps it as it is after its name has gone, and one that comes too late finds no file at all.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

VERSION_NAME = re.compile(r"v(\d{8,})")
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack"}


class Published(NamedTuple):
    version: int
    path: Path


class WeightStore:
    """`buffers`: how many versions are visible or being read at most."""

    def __init__(self, root: Path, buffers: int) -> None:
        if buffers < 2:
            raise ValueError(f"weights.buffers: {buffers}; must be at least 2")
        self.root = root
        self.buffers = buffers

    def beside(self, texts: Mapping[str, str]) -> list[Path]:
        """Files with these names and contents, from which versions link what they need beside their weights."""
        directory = self.root.with_name(f"{self.root.name}-files")
        if texts:
            directory.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (directory / name).write_text(text)
        return [directory / name for name in texts]

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

    def prepare(self) -> None:
        """Makes the root, and clears what a writer that died here left. For the process that publishes, before that."""
        self.root.mkdir(parents=True, exist_ok=True)
        for left in self.root.glob(".*"):
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink()

    def discard_newer_than(self, version: int) -> None:
        """For a writer that has gone back to a checkpoint and will publish, and pin, those versions anew."""
        for newer in self.versions():
            if newer > version:
                self.remove(self.path(newer))
        for pins in self.root.glob("pins/*"):
            for pinned in self.pinned(pins.name):
                if pinned.version > version:
                    self.unpin(pinned.version, pins.name)

    def pin(self, version: int, name: str) -> Path:
        """Keeps a version beyond its turn, by hard links, at the path returned. Pinning it twice is pinning it once.

        Raises FileNotFoundError if it has been removed already.
        """
        return self.pin_from(self.path(version), version, name)

    def pin_from(self, source: Path, version: int, name: str) -> Path:
        """As `pin`, for a version that lies in another directory."""
        target = self.root / "pins" / name / version_name(version)
        if target.exists():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = target.parent / f".new-{target.name}-{os.getpid()}"
        staging.mkdir()
        try:
            for file in source.iterdir():
                os.link(file, staging / file.name, follow_symlinks=False)
            weights_file(staging)  # or it was removed while it was being pinned
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
            self.remove(target)

    def remove(self, path: Path) -> None:
        """Takes the name away first, so that no reader finds a directory with half its files."""
        removed = path.parent / f".old-{path.name}-{os.getpid()}"
        path.rename(removed)
        shutil.rmtree(removed)


@contextmanager
def reading(path: Path) -> Iterator[list[int]]:
    """Holds the weights of the directory `path` as they are while the block lasts, whoever reads them in it, by having
    their files open: these, in the order of `weights_files`. Raises FileNotFoundError if the version has gone."""
    files = weights_files(path)
    held: list[int] = []
    try:
        for file in files:
            held.append(os.open(file, os.O_RDONLY | os.O_CLOEXEC))
            # Only now is it counted as being read: had it been taken back before that, its name would have gone.
            if not os.path.samestat(os.fstat(held[-1]), os.stat(file)):
                raise FileNotFoundError(errno.ENOENT, "taken back while it was being opened", str(file))
        if not files:
            raise FileNotFoundError(errno.ENOENT, "no weights there (any more)", str(path))
        yield held
    finally:
        for fd in held:
            os.close(fd)


def weights_files(path: Path) -> list[Path]:
    """Those of the directory `path`, by name; none if it has gone."""
    try:
        return [path / name for name in sorted(os.listdir(path)) if name.endswith(".safetensors")]
    except FileNotFoundError:
        return []


def weights_file(path: Path) -> Path:
    """The one file of a published version that has its tensors. Raises FileNotFoundError if it has gone."""
    found = weights_files(path)
    if not found:
        raise FileNotFoundError(errno.ENOENT, "no weights there (any more)", str(path))
    return found[0]


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
