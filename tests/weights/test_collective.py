"""Versions straight from trainer ranks into engines, each a process, over gloo; and what becomes of the dead."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from flowrl.weights.collective.rounds import Rounds, cut
from flowrl.weights.collective.staging import Staging
from flowrl.weights.loading import Place
from tests.weights.engine_process import SKIPPED
from tests.weights.test_ranks import ROOT, ranks_dir

__all__ = ["ranks_dir"]
NUM_RANKS = 2

pytestmark = pytest.mark.timeout(120)


class Party:
    """Trainer ranks and engines that share a directory."""

    def __init__(self, model_dir: Path, out: Path, timeout_s: float, bends: str) -> None:
        self.out = out
        self._timeout_s = timeout_s
        self._bends = bends
        self.ranks = [
            self._start(
                "rank_process", "collective", str(rank), str(NUM_RANKS), str(model_dir), str(out), log=f"rank-{rank}"
            )
            for rank in range(NUM_RANKS)
        ]
        self.engines: list[subprocess.Popen[bytes]] = []

    def engine(self, name: str, how: str = "follow") -> subprocess.Popen[bytes]:
        self.engines.append(self._start("engine_process", name, str(NUM_RANKS), str(self.out), how, log=name))
        return self.engines[-1]

    def _start(self, module: str, *arguments: str, log: str) -> subprocess.Popen[bytes]:
        """What it says goes to a file of the directory."""
        environment = {
            **os.environ, "TIMEOUT_S": str(self._timeout_s), "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1", "BENDS": self._bends,
        }  # fmt: skip
        command = [sys.executable, "-m", f"tests.weights.{module}", *arguments]
        with (self.out / f"said-{log}").open("ab") as said:
            return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=said)

    def wait_for_words(self, log: str, words: str) -> None:
        deadline = time.monotonic() + 60
        while words not in (said := (self.out / f"said-{log}").read_text()):
            assert time.monotonic() < deadline, f"waited for {words!r} of {log}, which said {said}"
            time.sleep(0.05)

    def publish(self, version: int) -> None:
        (self.out / f"go-{version}").touch()
        self.wait(self.out / f"gathered-{version}.safetensors")

    def wait(self, path: Path) -> None:
        deadline = time.monotonic() + 60
        while not path.exists():
            assert time.monotonic() < deadline, f"waited for {path.name}; there is {self._story()}"
            time.sleep(0.005)

    def _story(self) -> str:
        said = {path.name: path.read_text() for path in sorted(self.out.glob("said-*"))}
        return f"{sorted(os.listdir(self.out))}, and processes said {said}"

    def assert_served(self, name: str, version: int) -> None:
        self.wait(self.out / f"served-{name}-{version}.safetensors")
        served = load_file(self.out / f"served-{name}-{version}.safetensors")
        gathered = load_file(self.out / f"gathered-{version}.safetensors")
        assert served.keys() == gathered.keys()
        assert all(torch.equal(served[key], tensor) for key, tensor in gathered.items())


@contextmanager
def party(model_dir: Path, out: Path, timeout_s: float = 20.0, bends: str = "") -> Iterator[Party]:
    """bends: a rank, see `rank_process.py`."""
    opened = Party(model_dir, out, timeout_s, bends)
    try:
        yield opened
    finally:
        for process in (*opened.ranks, *opened.engines):
            process.kill()
            process.communicate()


def test_engines_receive_what_a_gather_would_give_whoever_dies(ranks_dir: Path, tmp_path: Path) -> None:
    """One engine that corrupts, receives and compares first; one that dies while a version is kept for it and comes
    back, one that hangs then. The trainer waits for none, each side names the other, and at last a rank dies."""
    with party(ranks_dir, tmp_path, timeout_s=4.0) as given:
        steady, dies = given.engine("a", "check"), given.engine("dies", "die-1")
        given.engine("hangs", "hang-2")
        assert dies.wait(60) == 9
        for name in ("a", "hangs"):
            given.wait(tmp_path / f"served-{name}-0.safetensors")
        for version in range(1, 6):
            given.publish(version)
        assert max(float(path.read_text()) for path in tmp_path.glob("pause-*")) < 2.0, "the trainer has waited"
        given.assert_served("a", 5)
        given.engine("dies")  # as its controller would start it again
        given.assert_served("dies", 5)
        for rank in range(NUM_RANKS):
            for name in ("dies", "hangs"):
                given.wait_for_words(f"rank-{rank}", f"engine {name} gets no more from rank {rank}: ")
        given.ranks[1].kill()
        (tmp_path / "published-6").touch()
        assert steady.wait(60) != 0
        given.wait_for_words("a", "PeerLost: trainer ranks [0] did not answer for version 6")


def test_an_engine_that_does_not_take_a_tensor_is_found_at_the_first_synchronisation(
    ranks_dir: Path, tmp_path: Path
) -> None:
    with party(ranks_dir, tmp_path) as given:
        assert given.engine("a", "check-skips").wait(60) != 0
        given.wait_for_words("a", f"weights.check_first_sync: {SKIPPED} is not what was received for it")
        assert not list(tmp_path.glob("served-*"))


def test_bytes_that_do_not_arrive_as_a_rank_has_them_are_found_at_the_first_synchronisation(
    ranks_dir: Path, tmp_path: Path
) -> None:
    """They arrive twice alike, so that the engine alone could not know."""
    with party(ranks_dir, tmp_path, bends="1") as given:
        assert given.engine("a", "check").wait(60) != 0
        given.wait_for_words("a", "weights.check_first_sync: trainer ranks [1] have other bytes than came from them")
        assert not list(tmp_path.glob("served-*"))


ranges = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 40)), min_size=1, max_size=6)


@given(st.lists(ranges, min_size=1, max_size=5), st.integers(1, 200))
def test_rounds_carry_every_byte_once_to_where_it_belongs(dealt: list, bucket_bytes: int) -> None:
    """Ranks own alternating stretches of a file of 8-byte elements; what lands, put together, is the file."""
    streams: list[list[tuple[int, int]]] = [[] for _ in dealt]
    at = 0
    for step in range(6):
        for rank, lengths in enumerate(dealt):
            if step < len(lengths):
                streams[rank].append((at, at + 8 * lengths[step][1]))
                at += 8 * lengths[step][1]
    file = torch.arange(at // 8, dtype=torch.int64)
    target = torch.zeros_like(file)
    bounds = [0, *range(5, at // 8, 7), at // 8]
    places = [
        Place(f"t{first}", target[first:after], 8 * first, 8 * after, torch.int64)
        for first, after in pairwise(bounds)
        if first < after
    ]
    rounds = Rounds(streams, bucket_bytes)
    rounds.refuse_gaps(0, at)
    for round_ in range(rounds.count):
        for rank, owned in enumerate(streams):
            begin, end = rounds.part(rank, round_)
            assert end - begin <= rounds.each
            part = torch.cat([file[a // 8 : b // 8] for a, b in cut(owned, begin, end)] or [file[:0]]).view(torch.uint8)
            for landing in rounds.landings(rank, round_, places):
                landing.target.copy_(part[landing.begin : landing.end].view(landing.dtype))
    assert torch.equal(target, file)


def test_streams_with_a_gap_are_refused() -> None:
    with pytest.raises(ValueError, match="byte 8 of a version is sent by no rank"):
        Rounds([[(0, 8)], [(16, 24)]], 64).refuse_gaps(0, 24)
    with pytest.raises(ValueError, match="ranks send 24 bytes of a version that has 32"):
        Rounds([[(0, 8)], [(8, 24)]], 64).refuse_gaps(0, 32)


def test_trainer_finds_a_buffer_whatever_engines_hold() -> None:
    """And what an engine holds keeps its bytes."""
    staging = Staging(4, torch.device("cpu"), arbitrates=True)
    held = None
    for version in range(10):
        staged = staging.open()
        staged.bytes.fill_(version)
        staging.show(staged, version)
        if version == 3:
            held = staging.hold(3, lambda: False)
    assert held is not None and held.bytes.eq(3).all()
    assert staging.hold(7, lambda: False) is None, "overwritten"
    staging.let_go(held)
    newest = staging.hold(9, lambda: False)
    assert newest is not None and newest.bytes.eq(9).all()


def test_rank_zero_lets_engines_hold_one_version_at_a_time() -> None:
    staging = Staging(4, torch.device("cpu"), arbitrates=True)
    for version in (0, 1):
        staging.show(staging.open(), version)
    held = staging.hold(0, lambda: False)
    assert held is not None
    asked: list[int] = []
    assert staging.hold(1, lambda: len(asked) > 2 or bool(asked.append(1))) is None, "parked until it was over"
    staging.let_go(held)
    assert staging.hold(1, lambda: False) is not None
