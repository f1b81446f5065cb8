"""Requests that an engine is working on, and the gate at which they wait while it is paused. Makes no calls.

A flight waits at the gate, is sent, and ends. While it waits it can be ended at once, because no server knows of it.
"""

from __future__ import annotations

import asyncio
import enum
import secrets
from dataclasses import dataclass, field

from flowrl.rollout.sglang.client import GenerateMeta


class Admission(enum.Enum):
    """What became of a flight at the gate."""

    SENT = "sent"
    ABORTED = "aborted"


@dataclass(eq=False, kw_only=True)
class Flight:
    """rid: its name at the server. `admission` is there when it has left the gate, `call` when it has been sent;
    `ended` is set when it is over."""

    request_id: str
    rid: str
    admission: asyncio.Future[Admission]
    is_aborted: bool = False
    is_dropped: bool = False
    call: asyncio.Task[GenerateMeta] | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def drop(self) -> None:
        """Waits for no answer any longer."""
        if self.call is not None:
            self.is_dropped = True
            self.call.cancel()


class Flights:
    """Used from one asyncio loop. The gate is open at first."""

    def __init__(self) -> None:
        self._flights: dict[str, Flight] = {}
        self._is_open = True

    def enter(self, request_id: str) -> Flight:
        """ValueError if a request of that name is running."""
        if request_id in self._flights:
            raise ValueError(f"request_id: {request_id!r}; a request of that name is running")
        flight = Flight(request_id=request_id, rid=_rid(request_id), admission=asyncio.Future())
        if self._is_open:
            flight.admission.set_result(Admission.SENT)
        self._flights[request_id] = flight
        return flight

    def reenter(self, flight: Flight) -> None:
        """Its server is gone: it comes to the gate anew, under a name that no server has heard."""
        flight.rid, flight.call, flight.admission = _rid(flight.request_id), None, asyncio.Future()
        if flight.is_aborted:
            flight.admission.set_result(Admission.ABORTED)
        elif self._is_open:
            flight.admission.set_result(Admission.SENT)

    def leave(self, flight: Flight) -> None:
        del self._flights[flight.request_id]
        flight.ended.set()

    def close_gate(self) -> None:
        self._is_open = False

    def open_gate(self) -> None:
        """Lets those that wait go, in the order of their arrival."""
        self._is_open = True
        for flight in self._waiting():
            flight.admission.set_result(Admission.SENT)

    def abort(self, request_id: str | None) -> list[Flight]:
        """Ends those that wait at the gate, marks the others and returns them: they are for the servers to end."""
        chosen = [flight for flight in self._flights.values() if request_id in (None, flight.request_id)]
        sent = []
        for flight in chosen:
            flight.is_aborted = True
            if not flight.admission.done():
                flight.admission.set_result(Admission.ABORTED)
            elif not flight.admission.cancelled() and flight.admission.result() is Admission.SENT:
                sent.append(flight)
        return sent

    def aborted(self) -> list[Flight]:
        """Those that an abort has marked and that have not ended."""
        return [flight for flight in self._flights.values() if flight.is_aborted]

    def are_all_aborted(self) -> bool:
        return all(flight.is_aborted for flight in self._flights.values())

    def fail(self, error: Exception) -> None:
        """Those that wait at the gate raise `error`."""
        for flight in self._waiting():
            flight.admission.set_exception(error)

    def _waiting(self) -> list[Flight]:
        return [flight for flight in self._flights.values() if not flight.admission.done()]


async def all_ended(flights: list[Flight], timeout_s: float) -> bool:
    """Whether all of them ended within the time."""
    waits = [asyncio.create_task(flight.ended.wait()) for flight in flights if not flight.ended.is_set()]
    if not waits:
        return True
    _, late = await asyncio.wait(waits, timeout=timeout_s)
    for task in late:
        task.cancel()
    return not late


def _rid(request_id: str) -> str:
    """A server that aborts `q1` aborts `q10` too, and refuses a name until it has forgotten the last request that had
    it. Drawn ids of one length never repeat, nor does one begin another."""
    return f"{secrets.token_hex(8)}:{request_id}"
