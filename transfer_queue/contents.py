"""Which rows of a group have which columns. Names that come in one put are counted as one, so that a question costs as
much as there are kinds of puts, not columns. Rows are bits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

Names = frozenset[str]

MOST_KINDS = 1024


class KnownNames:
    """Gives one and the same set for the same columns, as long as there are few: sets that are one are compared at
    once."""

    def __init__(self) -> None:
        self._known: dict[Names, Names] = {}

    def of(self, columns: Iterable[str]) -> Names:
        names = frozenset(columns)
        if len(self._known) >= MOST_KINDS:
            self._known.clear()
        return self._known.setdefault(names, names)


class Contents:
    """A row may get its columns in several puts, of any names."""

    __slots__ = ("_rows",)

    def __init__(self, entries: Iterable[tuple[Names, int]] = ()) -> None:
        self._rows: dict[Names, int] = dict(entries)

    def add(self, names: Names, rows: int) -> None:
        self._rows[names] = self._rows.get(names, 0) | rows

    def with_any(self, names: Names) -> int:
        """Rows that have at least one of them."""
        rows = 0
        for have, bits in self._rows.items():
            if have is names or not names.isdisjoint(have):
                rows |= bits
        return rows

    def with_all(self, names: Names) -> int:
        """Rows that have every one of them."""
        if len(self._rows) == 1:
            ((have, bits),) = self._rows.items()
            return bits if names <= have else 0
        kinds = [(have, bits) for have, bits in self._rows.items() if not names.isdisjoint(have)]
        if not names <= frozenset().union(*(have for have, _ in kinds)):
            return 0
        every = some = kinds[0][1]
        for _, bits in kinds:
            every &= bits
            some |= bits
        if every == some:  # as a rule: all rows got the same
            return every
        for name in names:
            some &= self.with_any(frozenset((name,)))
        return some

    def columns(self) -> Iterator[tuple[str, int]]:
        """Each name, with the rows that have it."""
        for name in dict.fromkeys(name for have in self._rows for name in sorted(have)):
            yield name, self.with_any(frozenset((name,)))
