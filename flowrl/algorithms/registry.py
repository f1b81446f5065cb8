"""The functions behind the names in `declarations`. Imports torch; checking a recipe needs only the declarations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flowrl.algorithms import advantages, losses
from flowrl.algorithms.losses import PolicyLoss

ADVANTAGES: dict[str, Callable[..., Any]] = {
    "gae": advantages.gae,
    "grpo": advantages.grpo,
    "rloo": advantages.rloo,
    "reinforce_plus_plus": advantages.reinforce_plus_plus,
    "reinforce_plus_plus_baseline": advantages.reinforce_plus_plus_baseline,
    "lite_ppo": advantages.lite_ppo,
    "remax": advantages.remax,
    "opo": advantages.opo,
    "gdpo": advantages.gdpo,
    "grpo_passk": advantages.grpo_passk,
}

LOSSES: dict[str, Callable[..., PolicyLoss]] = {
    "ppo": losses.ppo,
    "dapo": losses.dapo,
    "gspo": losses.gspo,
    "cispo": losses.cispo,
    "topr": losses.topr,
    "dppo_tv": losses.dppo_tv,
    "sapo": losses.sapo,
    "geo_mean": losses.geo_mean,
    "decoupled_ppo": losses.decoupled_ppo,
    "segment_ppo": losses.segment_ppo,
}
