"""Policy losses, `f(logprob_BT, old_logprob_BT, advantage_BT, mask_BT, *, lo, hi, c, …) -> PolicyLoss`; `aggregate`.

Which log-probs stand in `old_logprob_BT` is for the caller to know; `declarations.check_policies` refuses what makes no
sense.
"""

from flowrl.algorithms.aggregation import aggregate, denominator_share
from flowrl.algorithms.losses.clipped import dapo, geo_mean, gspo, ppo, sapo
from flowrl.algorithms.losses.decoupled import decoupled_ppo, segment_ppo
from flowrl.algorithms.losses.policy_loss import PolicyLoss
from flowrl.algorithms.losses.weighted import cispo, dppo_tv, topr

__all__ = [
    "PolicyLoss",
    "aggregate",
    "cispo",
    "dapo",
    "decoupled_ppo",
    "denominator_share",
    "dppo_tv",
    "geo_mean",
    "gspo",
    "ppo",
    "sapo",
    "segment_ppo",
    "topr",
]
