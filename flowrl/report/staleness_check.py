"""Checks a run's event log for staleness, by itself: `python -m flowrl.report.staleness_check RUN`.

For every row taken into update u: max over its sampled tokens of u − version. Imports nothing of the queue, the clock
or the stages that keep the bound, so that it cannot share their errors. Exit code 1 if the log shows a violation.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import OmegaConf

from flowrl.report.events import Event, Key, read_events

COUNTED = ("reserved", "sampled", "taken", "trained", "dropped", "lost")
Group = tuple[str, int, int]


@dataclass(frozen=True, kw_only=True)
class Violation:
    key: Key
    update: int
    rule: str

    def __str__(self) -> str:
        return f"row {list(self.key)} in update {self.update}: {self.rule}"


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What the log shows.

    bound: η, None if unknown. rows_by_staleness: rows taken, by the staleness of their oldest token.
    tokens_by_staleness: all their tokens. counts: [node][kind]. drops: rows by reason. trained_twice: rows trained more
    than once. split_groups: (partition, group, attempt) whose rows trained in several updates. repeated: (partition,
    group, index) trained by several attempts at it. lives: how often the run was started; undone: rows trained in
    updates that a later life went back behind, which are counted nowhere else; last_update: the newest that counts.
    """

    bound: int | None
    rows_by_staleness: Counter[int]
    tokens_by_staleness: Counter[int]
    counts: dict[int, Counter[str]]
    drops: Counter[str]
    violations: list[Violation]
    trained_twice: list[Key]
    split_groups: list[Group]
    repeated: list[Group]
    lives: int = 1
    undone: int = 0
    last_update: int = -1

    @property
    def max_staleness(self) -> int | None:
        return max(self.rows_by_staleness, default=None)

    @property
    def is_clean(self) -> bool:
        return not (self.violations or self.trained_twice or self.split_groups or self.repeated)

    def total(self, kind: str) -> int:
        return sum(count[kind] for count in self.counts.values())


@dataclass
class _Log:
    """What the log says of each row. Processes flush at their own times, so nothing is judged before the end. Only the
    lives of a run come strictly one after the other."""

    spans: dict[Key, Sequence[tuple[int, int]]] = field(default_factory=dict)
    taken: dict[Key, tuple[int, ...]] = field(default_factory=dict)
    trained: dict[Key, tuple[int, ...]] = field(default_factory=dict)
    first_update: dict[Group, int] = field(default_factory=dict)
    split_groups: set[Group] = field(default_factory=set)
    counts: dict[int, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    drops: Counter[str] = field(default_factory=Counter)
    life: int = 0
    undone: int = 0

    def add(self, event: Event) -> None:
        key, kind, update = event.key, event.kind, event.update
        if kind == "resumed" and event.version is not None and event.life is not None:
            self.resume(event.life, event.version)
        if key is None:
            return
        self.counts[event.node][kind] += 1
        if kind == "sampled":
            self.spans[key] = (*self.spans[key], *event.versions) if key in self.spans else event.versions
        elif kind == "taken" and update is not None:
            earlier = self.taken.get(key, ())
            if update not in earlier:
                self.taken[key] = (*earlier, update)
        elif kind == "trained" and update is not None:
            self.trained[key] = (*self.trained.get(key, ()), update)
            group = (key[0], key[1], key[3])
            if self.first_update.setdefault(group, update) != update:
                self.split_groups.add(group)
        elif kind == "dropped":
            self.drops[event.reason or "no reason"] += 1

    def resume(self, life: int, version: int) -> None:
        """Another life goes on from `version`: updates from there on have not been."""
        self.life = life
        self.undone += sum(update >= version for updates in self.trained.values() for update in updates)
        self.trained = _before(version, self.trained)
        self.taken = _before(version, self.taken)
        self.first_update = {group: update for group, update in self.first_update.items() if update < version}


def _before(version: int, updates_of: dict[Key, tuple[int, ...]]) -> dict[Key, tuple[int, ...]]:
    kept = {key: tuple(update for update in updates if update < version) for key, updates in updates_of.items()}
    return {key: updates for key, updates in kept.items() if updates}


def check(events: Iterable[Event], bound: int | None) -> Findings:
    log = _Log()
    for event in events:
        log.add(event)
    rows: Counter[int] = Counter()
    tokens: Counter[int] = Counter()
    violations: list[Violation] = []
    for key, updates in log.taken.items():
        spans = log.spans.get(key, [])
        for update in updates:
            if spans:
                rows[update - min(version for version, _ in spans)] += 1
            for version, count in spans:
                tokens[update - version] += count
            rule = _broken_rule(spans, update, bound)
            if rule is not None:
                violations.append(Violation(key=key, update=update, rule=rule))
    return Findings(
        bound=bound,
        rows_by_staleness=rows,
        tokens_by_staleness=tokens,
        counts=dict(sorted(log.counts.items())),
        drops=log.drops,
        violations=violations + _trained_unseen(log),
        trained_twice=[key for key, updates in log.trained.items() if len(updates) > 1],
        lives=log.life + 1,
        undone=log.undone,
        last_update=max((update for updates in log.trained.values() for update in updates), default=-1),
        split_groups=sorted(log.split_groups),
        repeated=_repeated(log.trained),
    )


def _broken_rule(spans: Sequence[tuple[int, int]], update: int, bound: int | None) -> str | None:
    if not spans:
        return "taken, but nothing says which weights sampled it"
    oldest, newest = min(version for version, _ in spans), max(version for version, _ in spans)
    if newest > update:
        return f"a token of version {newest}, which did not exist yet"
    if bound is not None and update - oldest > bound:
        return f"a token of version {oldest}, staleness {update - oldest} above the bound {bound}"
    return None


def _trained_unseen(log: _Log) -> list[Violation]:
    return [
        Violation(key=key, update=-1, rule="trained, but never taken") for key in log.trained if key not in log.taken
    ]


def _repeated(trained: Iterable[Key]) -> list[Group]:
    attempts = Counter(key[:3] for key in trained)
    return sorted(row for row, count in attempts.items() if count > 1)


def check_run(run: Path, bound: int | None = None) -> Findings:
    """bound: the recipe's own, if not given. Raises ValueError if the run has no event log."""
    path = run / "events.jsonl"
    if not path.is_file():
        raise ValueError(f"run: {str(run)!r}; has no events.jsonl")
    return check(read_events(path), recipe_bound(run) if bound is None else bound)


def recipe_bound(run: Path) -> int | None:
    """`staleness.max` of the recipe as the run resolved it."""
    path = run / "recipe.yaml"
    return OmegaConf.select(OmegaConf.load(path), "staleness.max") if path.is_file() else None


def describe(findings: Findings, most: int = 20) -> str:
    """A table of counts, then each violation, at most `most` of a sort."""
    lines = ["node  " + "".join(f"{kind:>11}" for kind in COUNTED)]
    lines += [
        f"{node:<6}" + "".join(f"{count[kind]:>11}" for kind in COUNTED) for node, count in findings.counts.items()
    ]
    lines += [f"dropped ({reason}): {count}" for reason, count in findings.drops.most_common()]
    histogram = ", ".join(f"{staleness}: {count}" for staleness, count in sorted(findings.rows_by_staleness.items()))
    bound = "unknown" if findings.bound is None else findings.bound
    lines.append(f"staleness of rows taken: {histogram or 'none taken'} (bound {bound})")
    if findings.lives > 1:
        lines.append(f"lives: {findings.lives}; rows trained in updates that were undone: {findings.undone}")
    lines += _listed("violations", findings.violations, most)
    lines += _listed("rows trained twice", [list(key) for key in findings.trained_twice], most)
    lines += _listed("groups split over updates", [list(group) for group in findings.split_groups], most)
    lines += _listed("rows trained by several attempts", [list(row) for row in findings.repeated], most)
    return "\n".join(lines)


def _listed(title: str, found: Sequence[object], most: int) -> list[str]:
    more = [f"  … and {len(found) - most} more"] if len(found) > most else []
    return [f"{title}: {len(found)}", *(f"  {item}" for item in found[:most]), *more]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="flowrl.report.staleness_check", description="check a run's event log")
    parser.add_argument("run", type=Path, help="a run's directory")
    parser.add_argument("--max", type=int, default=None, help="the bound (default: the recipe's staleness.max)")
    given = parser.parse_args(arguments)
    try:
        findings = check_run(given.run, given.max)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(describe(findings))
    return 0 if findings.is_clean else 1


if __name__ == "__main__":
    sys.exit(main())
