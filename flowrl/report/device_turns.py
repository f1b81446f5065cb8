"""Who had a shared device when: `python -m flowrl.report.device_turns RUN`.

From the event log of a run whose engines and trainer ranks take turns at devices. Exit code 1 if two workers had one at
the same time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from flowrl.report.events import Event, read_events


@dataclass(frozen=True)
class Turn:
    """begins, ends: seconds since 1970; ends is infinite for a turn of which the log does not tell the end."""

    worker: str
    begins: float
    ends: float = float("inf")

    @property
    def seconds(self) -> float:
        return self.ends - self.begins


@dataclass(frozen=True)
class DeviceTurns:
    """Of one device of a node, in order of time. memory: worker -> (held, kept), MiB, at the end of each of its turns
    that says so."""

    turns: Sequence[Turn]
    memory: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    @property
    def overlaps(self) -> list[tuple[Turn, Turn]]:
        return [(one, other) for one, other in pairwise(self.turns) if other.begins < one.ends]

    def share(self, worker: str) -> float:
        """Of the time from the first turn on, in turns that have ended."""
        ended = [turn for turn in self.turns if turn.seconds != float("inf")]
        whole = ended[-1].ends - ended[0].begins if ended else 0.0
        return sum(turn.seconds for turn in ended if turn.worker == worker) / whole if whole else 0.0


def turns(events: Iterable[Event]) -> dict[tuple[int, str], DeviceTurns]:
    """(node, device) -> its turns. A life of the run ends all turns that are open."""
    acts = sorted((event for event in events if event.kind in ("device", "resumed")), key=lambda event: event.t)
    open_turns: dict[tuple[int, str], dict[str, Turn]] = defaultdict(dict)
    ended: dict[tuple[int, str], list[Turn]] = defaultdict(list)
    memory: dict[tuple[int, str], dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for event in acts:
        if event.kind == "resumed":
            for place, holders in open_turns.items():
                ended[place] += [Turn(turn.worker, turn.begins, event.t) for turn in holders.values()]
            open_turns.clear()
        for device in event.devices:
            assert event.worker is not None, "an event of a device names its worker"
            place = (event.node, device)
            turn = open_turns[place].pop(event.worker, None)
            if turn is not None:
                ended[place].append(Turn(turn.worker, turn.begins, event.t))
            if event.has:
                open_turns[place][event.worker] = Turn(event.worker, event.t)
            if event.held_mb is not None and event.kept_mb is not None:
                memory[place][event.worker].append((event.held_mb, event.kept_mb))
    for place, holders in open_turns.items():
        ended[place] += holders.values()
    return {
        place: DeviceTurns(sorted(found, key=lambda turn: turn.begins), dict(memory[place]))
        for place, found in sorted(ended.items())
    }


def describe(found: dict[tuple[int, str], DeviceTurns]) -> str:
    lines = []
    for (node, device), told in found.items():
        lines.append(f"node {node}, {device}: {len(told.turns)} turns, {len(told.overlaps)} overlaps")
        for worker in sorted({turn.worker for turn in told.turns}):
            text = f"  {worker}: {sum(turn.worker == worker for turn in told.turns)} turns"
            text += f", {told.share(worker):.0%} of the time"
            if told.memory.get(worker):
                held, kept = (statistics.median(each) for each in zip(*told.memory[worker], strict=True))
                text += f"; memory at their ends, median: {held:.1f} MiB, then {kept:.1f}"
            lines.append(text)
    return "\n".join(lines) or "no device of this run is shared by engine and trainer"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="flowrl.report.device_turns", description="who had a shared device when")
    parser.add_argument("run", type=Path, help="a run's directory")
    run: Path = parser.parse_args(arguments).run
    if not (run / "events.jsonl").is_file():
        print(f"run: {str(run)!r}; has no events.jsonl", file=sys.stderr)
        return 2
    found = turns(read_events(run / "events.jsonl"))
    print(describe(found))
    return int(any(told.overlaps for told in found.values()))


if __name__ == "__main__":
    sys.exit(main())
