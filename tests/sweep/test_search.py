"""Draws are the same for the same seed; halving gives up the worst, and remembers across lives of a sweep."""

from __future__ import annotations

import math

import pytest

from flowrl.sweep.axes import Point, parse_axes
from flowrl.sweep.search import Halving, draw

pytest.importorskip("optuna", reason="optuna is an extra: flowrl[sweep]")


def test_draws_stay_within_their_axes_and_repeat_by_seed() -> None:
    axes = parse_axes(["lr=1e-5..1e-3:log", "eta=0..4", "name=a,b", "steps=7"])
    points = draw(axes, 30, seed=1)
    assert points == draw(axes, 30, seed=1)
    assert points != draw(axes, 30, seed=2)
    assert len({point.settings for point in points}) == len({point.name for point in points}) == 30
    rates = [float(dict(point.settings)["lr"]) for point in points]
    assert all(1e-5 <= rate <= 1e-3 for rate in rates)
    assert any(rate < 1e-4 for rate in rates) and any(rate > 1e-4 for rate in rates), "log-uniform spans decades"
    assert {dict(point.settings)["eta"] for point in points} <= {"0", "1", "2", "3", "4"}
    assert {dict(point.settings)["name"] for point in points} == {"a", "b"}
    assert {dict(point.settings)["steps"] for point in points} == {"7"}


def test_more_trials_than_points_give_every_point_once() -> None:
    points = draw(parse_axes(["a=0,1", "b=0,1,2"]), 50, seed=0)
    assert len(points) == 6


def curve(quality: float, steps: int) -> list[tuple[int, float]]:
    return [(step, quality * (1 - math.exp(-step / 20))) for step in range(1, steps + 1)]


def run_all(halving: Halving, qualities: list[float], steps: int = 90) -> dict[str, int]:
    """Point -> the update at which it was given up, or the last."""
    ended = {}
    for number, quality in enumerate(qualities):
        point = Point(name=str(number), settings=())
        for report in curve(quality, steps):
            if halving.is_given_up(point, [report]):
                break
        ended[point.name] = report[0]
        halving.ended(point, is_pruned=report[0] < steps, has_failed=False)
    return ended


@pytest.mark.parametrize(("goal", "sign"), [("maximize", 1), ("minimize", -1)])
def test_halving_gives_up_the_worst_and_never_the_best_so_far(goal: str, sign: int) -> None:
    qualities = [0.5, 0.9, 0.1, 0.2, 0.95, 0.3, 0.05]
    ended = run_all(Halving(goal, least=10, reduction=3), [sign * quality for quality in qualities])
    assert ended["1"] == ended["4"] == 90, "each was the best when it came"
    assert ended["2"] == ended["3"] == ended["6"] == 10, "the worst go at the first rung"


def test_a_new_life_that_hears_the_old_one_again_judges_alike() -> None:
    qualities = [0.5, 0.9, 0.1, 0.2]
    straight = run_all(Halving("maximize", least=10, reduction=3), [*qualities, 0.3])
    second_life = Halving("maximize", least=10, reduction=3)
    for number, quality in enumerate(qualities):
        point = Point(name=str(number), settings=())
        last = straight[point.name]
        second_life.is_given_up(point, curve(quality, last))
        second_life.ended(point, is_pruned=last < 90, has_failed=False)
    newcomer = Point(name="4", settings=())
    given_up_at = next(report[0] for report in curve(0.3, 90) if second_life.is_given_up(newcomer, [report]))
    assert given_up_at == straight["4"]


def test_a_failed_point_and_one_without_a_report_harm_nothing() -> None:
    halving = Halving("maximize", least=10, reduction=3)
    halving.ended(Point(name="never", settings=()), is_pruned=False, has_failed=True)
    assert not halving.is_given_up(Point(name="silent", settings=()), [])
    halving.ended(Point(name="silent", settings=()), is_pruned=False, has_failed=False)
    assert run_all(halving, [0.5])["0"] == 90
