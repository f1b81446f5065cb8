"""The rank that publishes on a node and its peers: buffers one way, what became of a version both ways."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from flowrl.weights import lending
from flowrl.weights.lending import Borrower, Lender

NUM_BYTES = 5000


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "buffer").write_bytes(bytes(NUM_BYTES))
    opened = os.open(tmp_path / "buffer", os.O_RDWR)
    yield opened
    os.close(opened)


@pytest.fixture
def lender(tmp_path: Path) -> Iterator[Lender]:
    lender = Lender(tmp_path, [3, 4])
    yield lender
    lender.close()


@pytest.fixture
def borrowers(lender: Lender, tmp_path: Path) -> Iterator[list[Borrower]]:
    borrowers = [Borrower(tmp_path, rank) for rank in (3, 4)]
    yield borrowers
    for borrower in borrowers:
        borrower.close()


def test_all_write_to_one_file_that_is_passed_on_once(
    lender: Lender, borrowers: list[Borrower], fd: int, tmp_path: Path
) -> None:
    lender.send(7, [6, 7], fd)
    for place, borrower in enumerate(borrowers):
        lent = borrower.receive([(0, 10)])
        assert lent is not None and lent.file is not None and (lent.key, lent.live) == (7, [6, 7])
        lent.file[place] = 1 + place
    assert (tmp_path / "buffer").read_bytes()[:3] == bytes([1, 2, 0])
    lender.send(7, [7], fd)
    again = borrowers[0].receive([])
    assert again is not None and again.file is None
    lender.send(8, [8], fd)
    lender.send(7, [7, 8], fd)  # which had gone in between: another one, of the same key
    received = [borrowers[0].receive([]) for _ in range(2)]
    assert all(lent is not None and isinstance(lent.file, torch.Tensor) for lent in received)


def test_no_buffer_is_told_to_all(lender: Lender, borrowers: list[Borrower]) -> None:
    lender.refuse()
    assert [borrower.receive([]) for borrower in borrowers] == [None, None]


def test_verdict_reaches_all(lender: Lender, borrowers: list[Borrower], fd: int) -> None:
    lender.send(1, [1], fd)
    for borrower, is_written in zip(borrowers, (True, False), strict=True):
        borrower.receive([])
        borrower.report(12, is_written)
    assert lender.failed(12) == [4]
    lender.tell(12, [0, 4])
    assert [borrower.failed(12) for borrower in borrowers] == [[0, 4], [0, 4]]


def test_peer_that_has_gone_has_not_written(lender: Lender, borrowers: list[Borrower], fd: int) -> None:
    lender.send(1, [1], fd)
    borrowers[0].close()
    borrowers[1].receive([])
    borrowers[1].report(5, True)
    assert lender.failed(5) == [3]
    lender.tell(5, [3])
    assert borrowers[1].failed(5) == [3]
    lender.send(1, [1], fd)
    assert borrowers[1].receive([]) is not None
    borrowers[1].report(6, True)
    assert lender.failed(6) == [3]


def test_silent_peer_is_not_waited_for_for_ever_and_what_it_says_late_is_not_taken_for_the_next_version(
    lender: Lender,
    borrowers: list[Borrower],
    fd: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(lending, "_TIMEOUT_S", 0.1)
    lender.send(1, [1], fd)
    borrowers[0].report(1, True)
    assert lender.failed(1) == [4] and "rank 4 does not say whether it has written version 1" in caplog.text
    borrowers[1].report(1, True)
    borrowers[0].report(2, True)
    borrowers[1].report(2, False)
    assert lender.failed(2) == [4]


def test_ranks_that_never_come_are_named(lender: Lender, fd: int, tmp_path: Path) -> None:
    borrower = Borrower(tmp_path, 3)
    lender._listener.settimeout(0.1)
    with pytest.raises(TimeoutError, match=r"ranks \[4\] did not come"):
        lender.send(1, [1], fd)
    borrower.close()
    assert lender.failed(1) == [3, 4]


def test_lender_that_has_gone_is_an_error_of_every_call(lender: Lender, borrowers: list[Borrower], fd: int) -> None:
    lender.send(1, [1], fd)
    lender.close()
    (borrower, _) = borrowers
    assert borrower.receive([]) is not None  # what it had sent before
    for call in (lambda: borrower.receive([]), lambda: borrower.report(1, True), lambda: borrower.failed(1)):
        with pytest.raises(ConnectionError):
            call()
