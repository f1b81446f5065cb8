"""An engine's end: asks all trainer ranks for a version and puts what they send into the engine's parameters.

    meet -> (open -> receive)*

Meeting makes the process group, and is for the start. `open` may wait, and disturbs nobody; `receive` is what runs
between two decode steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
import zmq

from flowrl.weights.collective.giver import Terms
from flowrl.weights.collective.group import Group, PeerLost, host_store
from flowrl.weights.collective.rounds import Landing, Rounds
from flowrl.weights.collective.wire import Done, EngineNews, Go, Hello, Open, Opened, decode_to_engine, encode
from flowrl.weights.loading import places
from flowrl.weights.tensorfile import slots_of
from transfer_queue.security import secure_server

_POLL_MS = 100
_DAMAGE = 0xA5

Act = Callable[[Landing, torch.Tensor], None]


class Receiver:
    """name: the worker's. num_ranks: of the trainer. bind: an endpoint, its port possibly `*`. directory, address: see
    `host_store`. bucket_bytes: of a round, of which two are held. is_over: whoever waits stops waiting. Used by one
    thread at a time."""

    def __init__(
        self,
        name: str,
        num_ranks: int,
        *,
        bind: str,
        directory: Path | None,
        address: str,
        bucket_bytes: int,
        terms: Terms,
        is_over: Callable[[], bool] = lambda: False,
    ) -> None:
        self._is_over = is_over
        self._num_ranks = num_ranks
        self._terms = terms
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 1000)
        if terms.secret:
            secure_server(self._socket, terms.secret)
        self._socket.bind(bind)
        endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        group = f"{name}-{time.time_ns():x}"
        self._store, where = host_store(directory, group, address, num_ranks + 1, terms.timeout_s)
        self.news = EngineNews(name, endpoint, where, bucket_bytes, group)
        self._hellos: dict[int, Hello] = {}
        self._group: Group | None = None
        self._rounds = Rounds([[]], bucket_bytes)
        self._buffers: list[torch.Tensor] = []
        self._landings: list[dict[int, list[Landing]]] = []
        self._open = -1

    def meet(self) -> bool:
        """Waits for the ranks, which may be busy with a warm start, and forms the group. False if it `is_over`. Raises
        PeerLost if one of them goes away meanwhile, ValueError if they do not send every byte once."""
        while len(self._hellos) < self._num_ranks:
            if self._is_over():
                return False
            if self._socket.poll(_POLL_MS):
                _, body = self._socket.recv_multipart()
                hello = decode_to_engine(body)
                assert isinstance(hello, Hello), "ranks speak first"
                self._hellos[hello.rank] = hello
        prints = {hello.fingerprint for hello in self._hellos.values()}
        if len(prints) > 1:
            raise ValueError(f"weights: trainer ranks plan to send different versions: {sorted(prints)}")
        hellos = [self._hellos[rank] for rank in range(self._num_ranks)]
        self._rounds = Rounds([hello.ranges for hello in hellos], self.news.bucket_bytes)
        self._rounds.refuse_gaps(len(hellos[0].header), hellos[0].num_bytes)
        self._group = Group(
            self.news.group, self._store, 0, self._num_ranks + 1, self._terms.device, self._terms.timeout_s
        )
        return True

    def open(self, version: int) -> bool:
        """Has all ranks keep the version. False if a newer one has taken its place."""
        return self._opened(version, digest=False) is not None

    @torch.no_grad()
    def receive(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Overwrites `tensors`, a state dict with `keep_vars=True` and always the same, by the version that is open.
        Raises ValueError, with nothing overwritten, if they do not fit; PeerLost, and then they may be a mixture."""
        self._prepare(tensors)
        self._transfer(_land)

    @torch.no_grad()
    def check(self, version: int, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Corrupts `tensors`, receives the version, and receives it once more to compare, with the digests that ranks
        tell. False, with tensors corrupt, if it has gone; raises ValueError naming what differs."""
        self._prepare(tensors)
        if not self.open(version):
            return False
        for tensor in tensors.values():
            tensor.detach().view(-1).view(torch.uint8).fill_(_DAMAGE)
        self.receive(tensors)
        digests = self._opened(version, digest=True)
        if digests is None:
            return False
        differing: list[str] = []

        def compare(landing: Landing, given: torch.Tensor) -> None:
            if not torch.equal(landing.target, given.to(landing.target.dtype)):
                differing.append(landing.name)

        hashes = [xxhash.xxh3_64() for _ in range(self._num_ranks)]
        self._transfer(compare, lambda rank, part: hashes[rank].update(part.cpu().numpy().data))
        if differing:
            raise ValueError(f"weights.check_first_sync: {differing[0]} is not what was received for it")
        wrong = [rank for rank, found in enumerate(hashes) if found.intdigest() != digests[rank]]
        if wrong:
            raise ValueError(f"weights.check_first_sync: trainer ranks {wrong} have other bytes than came from them")
        return True

    def close(self) -> None:
        if self._group is not None:
            self._group.close()
        self._socket.close()
        self._context.term()

    def _opened(self, version: int, *, digest: bool) -> dict[int, int] | None:
        """Digests by rank. Rank 0 is asked first: it lets engines have one version at a time."""
        answers = self._ask([0], Open(version, digest))
        if answers[0].is_there:
            answers |= self._ask(range(1, self._num_ranks), Open(version, digest))
        self._open = version
        if all(answer.is_there for answer in answers.values()):
            return {rank: answer.digest for rank, answer in answers.items()}
        self._let_go([rank for rank, answer in answers.items() if answer.is_there])
        return None

    def _ask(self, ranks: Sequence[int], question: Open) -> dict[int, Opened]:
        for rank in ranks:
            self._tell(rank, question)
        # A rank may first have to give another version to another engine, or give that one up.
        deadline = time.monotonic() + 2 * self._terms.timeout_s
        answers: dict[int, Opened] = {}
        while len(answers) < len(ranks):
            if self._socket.poll(_POLL_MS):
                identity, body = self._socket.recv_multipart()
                answer = decode_to_engine(body)
                assert isinstance(answer, Opened), "a rank that starts anew starts all anew"
                answers[int(identity)] = answer
            elif self._is_over():
                raise PeerLost(f"stopped while trainer ranks were asked for version {question.version}")
            elif time.monotonic() > deadline:
                late = sorted(set(ranks) - answers.keys())
                raise PeerLost(f"trainer ranks {late} did not answer for version {question.version}")
        return answers

    def _transfer(self, act: Act, see: Callable[[int, torch.Tensor], None] = lambda rank, part: None) -> None:
        """Calls `act` for all that comes; while one round is put in its place, the next one is under way."""
        for rank in range(self._num_ranks):
            self._tell(rank, Go(self._open))
        under_way = self._begin(0)
        for round_ in range(self._rounds.count):
            following = self._begin(round_ + 1)
            self._group_of().wait(under_way, {rank + 1: f"trainer rank {rank}" for rank in range(self._num_ranks)})
            for rank, landings in self._landings[round_].items():
                part = self._buffer(round_, rank)
                see(rank, part)
                for landing in landings:
                    act(landing, part[landing.begin : landing.end].view(landing.dtype))
            under_way = following
        self._let_go(range(self._num_ranks))

    def _begin(self, round_: int) -> Mapping[int, Any]:
        if round_ >= self._rounds.count:
            return {}
        return self._group_of().receive({rank + 1: self._buffer(round_, rank) for rank in self._landings[round_]})

    def _buffer(self, round_: int, rank: int) -> torch.Tensor:
        begin, end = self._rounds.part(rank, round_)
        return self._buffers[round_ % 2][rank * self._rounds.each :][: end - begin]

    def _prepare(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Once: the same for every version."""
        if self._landings:
            return
        slots = slots_of(self._hellos[0].header)
        placed = sorted(places(tensors, slots, "the trainer"), key=lambda place: place.begin)
        self._landings = [
            {rank: found for rank in range(self._num_ranks) if (found := self._rounds.landings(rank, round_, placed))}
            for round_ in range(self._rounds.count)
        ]
        num_bytes = self._rounds.each * self._num_ranks
        self._buffers = [torch.zeros(num_bytes, dtype=torch.uint8, device=self._terms.device) for _ in range(2)]

    def _let_go(self, ranks: Sequence[int]) -> None:
        """Rank 0 last: once it has let go, others may hold another version."""
        for rank in sorted(ranks, reverse=True):
            self._tell(rank, Done(self._open))

    def _tell(self, rank: int, message: Open | Go | Done) -> None:
        self._socket.send_multipart([str(rank).encode(), encode(message)])

    def _group_of(self) -> Group:
        assert self._group is not None, "met before anything is received"
        return self._group


def _land(landing: Landing, given: torch.Tensor) -> None:
    landing.target.copy_(given)
