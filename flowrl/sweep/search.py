"""Points that are drawn instead of enumerated, and points that are given up early. The library behind it is optuna."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flowrl.sweep.axes import Axis, Point, Span, name_points

DRAWS_FOR_A_TRIAL = 100


def draw(axes: Sequence[Axis], trials: int, seed: int) -> list[Point]:
    """`trials` different points, the same ones for the same seed; fewer if there are no more."""
    settings: dict[tuple[tuple[str, str], ...], None] = {}
    study = _optuna().create_study(sampler=_optuna().samplers.RandomSampler(seed=seed))
    distributions = {axis.field: _distribution(axis) for axis in axes}
    for _ in range(trials * DRAWS_FOR_A_TRIAL):
        params = study.ask(distributions).params
        settings[tuple((axis.field, _written(params[axis.field])) for axis in axes)] = None
        if len(settings) == trials:
            break
    return name_points(axes, list(settings))


class Halving:
    """Asynchronous successive halving: at `least`·`reduction`^k updates only the best 1/`reduction` of the points that
    came so far go on. A point reports in the order of its updates; what an earlier life of the sweep saw counts."""

    def __init__(self, goal: str, least: int, reduction: int) -> None:
        optuna = _optuna()
        pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=least, reduction_factor=reduction)
        self._study = optuna.create_study(direction=goal, pruner=pruner)
        self._trials: dict[str, Any] = {}

    def is_given_up(self, point: Point, reports: Sequence[tuple[int, float]]) -> bool:
        """reports: new ones, (update, metric)."""
        trial = self._trials.get(point.name)
        if trial is None:
            trial = self._trials[point.name] = self._study.ask()
        for step, value in reports:
            trial.report(value, step)
            if trial.should_prune():
                return True
        return False

    def ended(self, point: Point, is_pruned: bool, has_failed: bool) -> None:
        states = _optuna().trial.TrialState
        trial = self._trials.get(point.name)
        if trial is None:
            return
        values = self._study.trials[trial.number].intermediate_values
        if has_failed or not values:
            self._study.tell(trial, state=states.FAIL)
        elif is_pruned:
            self._study.tell(trial, state=states.PRUNED)
        else:
            self._study.tell(trial, values[max(values)])


def _distribution(axis: Axis) -> Any:
    distributions = _optuna().distributions
    span: Span | None = axis.span
    if span is None:
        return distributions.CategoricalDistribution(axis.values)
    if span.is_whole:
        return distributions.IntDistribution(int(span.low), int(span.high), log=span.is_log)
    return distributions.FloatDistribution(span.low, span.high, log=span.is_log)


def _written(value: str | int | float) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _optuna() -> Any:
    """Raises ValueError where it is not installed."""
    try:
        import optuna
    except ImportError:
        raise ValueError("--search: random and halving need optuna: pip install 'flowrl[sweep]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
