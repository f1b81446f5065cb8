"""What a sweep varies: `field.name=value,value,…` from the command line, and the points of the grid. Pure."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

CLOSING = {"[": "]", "{": "}", "(": ")"}
LONGEST_NAME = 100
_NUMBER = r"[+-]?(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+)?"
_RANGE = re.compile(rf"(?P<low>{_NUMBER})\.\.(?P<high>{_NUMBER})(?P<log>:log)?")


@dataclass(frozen=True, kw_only=True)
class Span:
    """Numbers to draw from: low and high included; whole ones if `is_whole`; evenly in the logarithm if `is_log`."""

    low: float
    high: float
    is_whole: bool
    is_log: bool


@dataclass(frozen=True, kw_only=True)
class Axis:
    """field: dotted, as in an override. values: as written. span: in place of values, for a search that draws."""

    field: str
    values: tuple[str, ...] = ()
    span: Span | None = None

    @property
    def is_fixed(self) -> bool:
        return self.span is None and len(self.values) == 1


@dataclass(frozen=True, kw_only=True)
class Point:
    """name: of its run and of its files. settings: (field, value) of every axis, in the axes' order."""

    name: str
    settings: tuple[tuple[str, str], ...]

    @property
    def overrides(self) -> list[str]:
        return [f"{field}={value}" for field, value in self.settings]


def parse_axis(text: str) -> Axis:
    """`field=0,1,2`, where commas inside brackets, braces or quotes separate nothing, or `field=1e-5..1e-3[:log]`.

    Raises ValueError naming the axis, what is wrong and the rule."""
    field, equals, written = text.partition("=")
    if not equals or not field.strip():
        raise ValueError(f"axis: {text!r}; must read field.name=value,value,…")
    field = field.strip()
    matched = _RANGE.fullmatch(written.strip())
    if matched is not None:
        return Axis(field=field, span=_span(field, matched["low"], matched["high"], is_log=matched["log"] is not None))
    values = split_values(field, written)
    if len(set(values)) != len(values):
        raise ValueError(f"{field}: {written!r}; a value is there twice")
    return Axis(field=field, values=tuple(values))


def parse_axes(texts: Sequence[str]) -> list[Axis]:
    axes = [parse_axis(text) for text in texts]
    fields = [axis.field for axis in axes]
    for field in fields:
        if fields.count(field) > 1:
            raise ValueError(f"{field}: given twice; an axis lists all its values at once")
        if field in ("run.name", "run.dir"):
            raise ValueError(f"{field}: the sweep names and places its runs itself; leave it out")
    return axes


def split_values(field: str, written: str) -> list[str]:
    """At commas that stand outside brackets and quotes."""
    values, open_brackets, quote = [""], "", ""
    for character in written:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in CLOSING:
            open_brackets += character
        elif character in CLOSING.values():
            if not open_brackets or CLOSING[open_brackets[-1]] != character:
                raise ValueError(f"{field}: {written!r}; {character!r} closes nothing")
            open_brackets = open_brackets[:-1]
        elif character == "," and not open_brackets:
            values.append("")
            continue
        values[-1] += character
    if open_brackets or quote:
        raise ValueError(f"{field}: {written!r}; {(open_brackets or quote)[-1]!r} is never closed")
    values = [value.strip() for value in values]
    if "" in values:
        raise ValueError(f"{field}: {written!r}; a value is empty (write null for none)")
    return values


def grid(axes: Sequence[Axis]) -> list[Point]:
    """Every combination, the last axis changing fastest. Raises ValueError for a span."""
    for axis in axes:
        if axis.span is not None:
            raise ValueError(f"{axis.field}: a range is drawn from, so it needs --search random or halving")
    chosen = itertools.product(*([(axis.field, value) for value in axis.values] for axis in axes))
    return name_points(axes, list(chosen))


def name_points(axes: Sequence[Axis], settings: Sequence[tuple[tuple[str, str], ...]]) -> list[Point]:
    """Names say what varies, are fit for directories, and differ."""
    varying = {axis.field for axis in axes if not axis.is_fixed}
    points: list[Point] = []
    taken: set[str] = set()
    for chosen in settings:
        parts = [f"{field}={re.sub(r'[^A-Za-z0-9.+-]+', '-', value)}" for field, value in chosen if field in varying]
        name = "_".join(parts) or "only"
        if len(name) > LONGEST_NAME or name in taken:
            digest = hashlib.sha256(repr(chosen).encode()).hexdigest()[:8]
            name = f"{name[: LONGEST_NAME - 9]}_{digest}"
        taken.add(name)
        points.append(Point(name=name, settings=chosen))
    return points


def _span(field: str, low: str, high: str, *, is_log: bool) -> Span:
    lowest, highest = float(low), float(high)
    if not lowest < highest:
        raise ValueError(f"{field}: {low}..{high}; the lower end must come first")
    if is_log and lowest <= 0:
        raise ValueError(f"{field}: {low}..{high}:log; a logarithm needs a lower end above 0")
    is_whole = all(re.fullmatch(r"[+-]?\d+", end) for end in (low, high))
    return Span(low=lowest, high=highest, is_whole=is_whole, is_log=is_log)
