"""What `algorithm.name` stands for: the fields of `AlgorithmConfig` that the recipe leaves out.

A part that the recipe replaces brings its own defaults: another loss its own clips and aggregation, another advantage
its own settings. What the preset says of the part that was replaced does not outlive it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flowrl.algorithms.declarations import ALGORITHMS, LOSSES, Anchor
from flowrl.config.algorithm import CLIPS, AlgorithmConfig, CorrectionConfig, KLConfig
from flowrl.config.checks import check_one_of


def preset(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Every field that the preset decides, for a recipe that says `given` of the algorithm.

    Raises ValueError for a name that is none.
    """
    check_one_of("algorithm.name", name, list(ALGORITHMS))
    algorithm = ALGORITHMS[name]
    loss = given.get("loss", algorithm.loss)
    advantage = given.get("advantage", algorithm.advantage)
    found: dict[str, Any] = {"name": name, "advantage": advantage, "loss": loss}
    found["advantage_settings"] = dict(algorithm.advantage_settings) if advantage == algorithm.advantage else {}
    if loss == algorithm.loss:
        found["old"] = "recomputed" if algorithm.anchor is Anchor.RECOMPUTED else "rollout"
        found["correction"] = None if algorithm.correction is None else dict(algorithm.correction)
        found["aggregate"] = algorithm.aggregation
    elif loss in LOSSES:
        found["aggregate"] = LOSSES[loss].aggregation
        if Anchor.ROLLOUT not in LOSSES[loss].anchors:
            found |= {"old": "recomputed", "correction": {"mode": "mask", "low": 0.0, "high": 5.0}}
    return found | _clips(loss, algorithm.loss_settings if loss == algorithm.loss else {})


def configured(name: str = "grpo", **given: Any) -> AlgorithmConfig:
    """The configuration that a recipe with these fields comes to."""
    fields = preset(name, given) | given
    for key, kind in (("correction", CorrectionConfig), ("kl", KLConfig)):
        if isinstance(fields.get(key), dict):
            fields[key] = kind(**fields[key])
    return AlgorithmConfig(**fields)


def _clips(loss: str, preferred: Mapping[str, Any]) -> dict[str, Any]:
    """null for what the loss does not have. A loss of the user's takes what it takes from `loss_settings`."""
    found: dict[str, Any] = {**LOSSES[loss].clips, **preferred} if loss in LOSSES else {}
    return {field: found.get(argument) for argument, field in CLIPS.items()}
