"""From the recipe to one callable that scores a batch, whichever form the function behind it has.

    verl's   compute_score(data_source, solution_str, ground_truth, extra_info) -> float | dict with "score"
    TRL's    f(prompts, completions, **columns) -> list[float | None]

The parameters' names tell them apart. A reward that raises, or gives what is no finite number, is an error that names
the row: silently wrong rewards cost more than a stopped run.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from controllers.dotted import load_attribute
from flowrl.config import RewardConfig
from flowrl.data.example import Example
from flowrl.rewards.builtin import BUILTIN

ROW_PARAMETERS = ("data_source", "solution_str", "ground_truth", "extra_info")


@dataclass(frozen=True)
class Score:
    """value: the reward. details: other numbers that the function gave, by name."""

    value: float
    details: Mapping[str, float] = field(default_factory=dict)

    @property
    def accuracy(self) -> float:
        """The function's own `acc`, where it gives one; otherwise whether the reward is full."""
        return self.details.get("acc", float(self.value >= 1.0))


RewardFunction = Callable[[Sequence[Example], Sequence[str]], list[Score]]


def load_reward(config: RewardConfig, base_dir: Path) -> RewardFunction:
    """base_dir: where a relative file path starts. Raises ValueError naming the path and the rule."""
    if config.name is not None:
        if config.name not in BUILTIN:
            near = difflib.get_close_matches(config.name, BUILTIN, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(f"reward.name: {config.name!r}; must be one of {', '.join(BUILTIN)}{hint}")
        return RowReward(config.name, BUILTIN[config.name])
    assert config.path is not None, "RewardConfig refuses a reward without a name and without a path"
    module, _, name = config.path.rpartition(":")
    located = f"{base_dir / module}:{name}" if module.endswith(".py") else config.path
    try:
        function = load_attribute(located)
    except ValueError as error:
        raise ValueError(f"reward.path: {error}") from error
    except Exception as error:  # whatever the user's module does when it is imported
        raise ValueError(f"reward.path: {config.path!r}; importing it raised {error!r}") from error
    return adapt(config.path, function)


def adapt(path: str, function: Any) -> RewardFunction:
    """Chooses the form by the names of the parameters."""
    if not callable(function):
        raise ValueError(f"reward.path: {path!r}; is a {type(function).__name__}, must be a function")
    if inspect.iscoroutinefunction(function):
        raise ValueError(f"reward.path: {path!r}; is a coroutine, must be an ordinary function")
    parameters = set(inspect.signature(function).parameters)
    if "completions" in parameters:
        return BatchReward(path, function)
    if "solution_str" in parameters:
        return RowReward(path, function)
    raise ValueError(
        f"reward.path: {path!r}; takes ({', '.join(inspect.signature(function).parameters)}), must take "
        f"({', '.join(ROW_PARAMETERS)}) or (prompts, completions, **columns)"
    )


class RowReward:
    """verl's form: one call a row."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name = name
        self.function = function
        self.accepts = _acceptance(name, function, ROW_PARAMETERS)

    def __call__(self, examples: Sequence[Example], responses: Sequence[str]) -> list[Score]:
        return [self._score(example, response) for example, response in zip(examples, responses, strict=True)]

    def _score(self, example: Example, response: str) -> Score:
        arguments = {
            "data_source": example.data_source,
            "solution_str": response,
            "ground_truth": example.ground_truth,
            "extra_info": example.extra_info,
        }
        try:
            result = self.function(**{name: arguments[name] for name in arguments if self.accepts(name)})
        except Exception as error:
            raise ValueError(f"reward {self.name!r}: raised {error!r} on {_row(example, response)}") from error
        if not isinstance(result, Mapping):
            return Score(_finite(self.name, result, example, response))
        if "score" not in result:
            where = _row(example, response)
            raise ValueError(f"reward {self.name!r}: gave {dict(result)!r} for {where}; needs 'score'")
        details = {name: float(value) for name, value in result.items() if name != "score" and _is_number(value)}
        return Score(_finite(self.name, result["score"], example, response), details)


class BatchReward:
    """TRL's form: one call a batch. Completions are messages where the prompts are. The columns are ground_truth,
    data_source, extra_info and the entries that every row's extra_info has. None counts as 0, as it does there."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name = name
        self.function = function
        self.accepts = _acceptance(name, function, None)

    def __call__(self, examples: Sequence[Example], responses: Sequence[str]) -> list[Score]:
        if not examples:
            return []
        try:
            results = self.function(**self._arguments(examples, responses))
        except Exception as error:
            first = _row(examples[0], responses[0])
            raise ValueError(f"reward {self.name!r}: raised {error!r} on {len(examples)} rows from {first}") from error
        if not isinstance(results, Sequence) or len(results) != len(examples):
            shown = f"{len(results)} values" if isinstance(results, Sequence) else f"a {type(results).__name__}"
            raise ValueError(f"reward {self.name!r}: gave {shown}; must give a list of {len(examples)}, one a row")
        return [
            Score(0.0 if result is None else _finite(self.name, result, example, response))
            for result, example, response in zip(results, examples, responses, strict=True)
        ]

    def _arguments(self, examples: Sequence[Example], responses: Sequence[str]) -> dict[str, list[Any]]:
        shared = set.intersection(*(set(example.extra_info) for example in examples))
        columns: dict[str, list[Any]] = {name: [e.extra_info[name] for e in examples] for name in sorted(shared)}
        columns |= {
            "prompts": [example.prompt for example in examples],
            "completions": [_completion(e, response) for e, response in zip(examples, responses, strict=True)],
            "data_source": [example.data_source for example in examples],
            "ground_truth": [example.ground_truth for example in examples],
            "extra_info": [example.extra_info for example in examples],
        }
        return {name: values for name, values in columns.items() if self.accepts(name)}


def _completion(example: Example, response: str) -> str | list[dict[str, str]]:
    return response if isinstance(example.prompt, str) else [{"role": "assistant", "content": response}]


def _acceptance(name: str, function: Callable[..., Any], known: Sequence[str] | None) -> Callable[[str], bool]:
    """Which arguments the function takes. `known`: all that there are; a parameter beyond them needs a default."""
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return lambda argument: True
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    for parameter in named.values():
        if known is not None and parameter.name not in known and parameter.default is parameter.empty:
            raise ValueError(f"reward.path: {name!r}; parameter {parameter.name!r}: must be one of {', '.join(known)}")
    return named.__contains__


def _is_number(value: Any) -> bool:
    """Also of numpy and torch, which this file does not import."""
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return not isinstance(value, str)


def _finite(name: str, value: Any, example: Example, response: str) -> float:
    if _is_number(value) and math.isfinite(float(value)):
        return float(value)
    raise ValueError(f"reward {name!r}: gave {value!r} for {_row(example, response)}; must be a finite number")


def _row(example: Example, response: str) -> str:
    """The row as a person finds it."""
    shown = response if len(response) <= 80 else response[:77] + "..."
    return f"row {example.index} ({example.origin}), response {shown!r}"
