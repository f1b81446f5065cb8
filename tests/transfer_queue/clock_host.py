"""The other side of RemoteClock, for tests: the accounts behind a ROUTER, in a thread."""

from __future__ import annotations

import threading

import zmq

from transfer_queue.clock import clock_state, decode_clock_request, encode_clock, serve_clock_request
from transfer_queue.staleness import Accounts


class ClockHost:
    """Used as a context."""

    def __init__(self, endpoint: str, accounts: Accounts) -> None:
        self.endpoint = endpoint
        self.accounts = accounts
        self._thread = threading.Thread(target=self._run)
        self._stop_sender = zmq.Context.instance().socket(zmq.PAIR)
        self._stop_receiver = zmq.Context.instance().socket(zmq.PAIR)
        self._stop_receiver.bind(f"inproc://stop-{id(self)}")
        self._stop_sender.connect(f"inproc://stop-{id(self)}")
        self._router = zmq.Context.instance().socket(zmq.ROUTER)
        self._router.bind(endpoint)

    def __enter__(self) -> ClockHost:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_sender.send(b"")
        self._thread.join()
        for socket in (self._stop_sender, self._stop_receiver, self._router):
            socket.close(linger=0)

    def _run(self) -> None:
        shards: set[bytes] = set()
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(self._stop_receiver, zmq.POLLIN)
        while True:
            if self._stop_receiver in dict(poller.poll()):
                return
            shard, frame = self._router.recv_multipart()
            shards.add(shard)
            before = self.accounts.changes
            reply = serve_clock_request(self.accounts, decode_clock_request(frame))
            if reply is not None:
                self._router.send_multipart([shard, encode_clock(reply)])
            if self.accounts.changes != before:
                for each in shards:
                    self._router.send_multipart([each, encode_clock(clock_state(self.accounts))])
