"""The reference policy that a KL term holds the policy near: frozen, sharded like the policy, never differentiated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from flowrl.trainer.model import Policy, load_lm
from flowrl.trainer.packing import Sample
from flowrl.trainer.scoring import score_responses
from flowrl.trainer.sharding import COMPUTE_DTYPES, gathered, keep_gathered, shard
from flowrl.trainer.world import World


class Reference:
    """Log-probs of responses under the model at `path`, at the sampling temperature.

    It is held in the compute dtype itself: parameters that never change need no float32 masters. offload: `all` keeps
    the shards on the host between uses.
    """

    def __init__(
        self,
        path: str | Path,
        world: World,
        *,
        temperature: float,
        compute_dtype: str = "float32",
        micro_batch_tokens: int = 8192,
        offload: str = "none",
    ) -> None:
        lm = load_lm(path, COMPUTE_DTYPES[compute_dtype])
        self._policy = Policy(lm, temperature).to(world.device).eval().requires_grad_(False)
        shard(self._policy, lm.base_model, world, offload=offload)
        keep_gathered(self._policy)
        self._budget = micro_batch_tokens
        self._device = world.device
        self._is_open = False

    @contextmanager
    def opened(self) -> Iterator[None]:
        """On every rank: gathers the parameters for as long as the block lasts. Within it `logprobs` waits for nobody,
        and ranks may differ in how often they call it."""
        assert not self._is_open, "the reference is open already"
        with gathered(self._policy):
            self._is_open = True
            try:
                yield
            finally:
                self._is_open = False

    def logprobs(self, samples: Sequence[Sample]) -> list[np.ndarray]:
        """Float32, one for each response token, masked ones included. Outside `opened` every rank must call it, with as
        many samples as it has, none included."""
        if not self._is_open:
            with self.opened():
                return self.logprobs(samples)
        return score_responses(lambda packed: self._policy(packed)[0], samples, self._budget, self._device)


class BaseReference:
    """The model that a policy's adapters stand on: a reference that costs no memory. For use within the policy's
    updates, which have the parameters gathered."""

    def __init__(self, policy: Policy, world: World, *, micro_batch_tokens: int) -> None:
        self._policy = policy
        self._budget = micro_batch_tokens
        self._device = world.device

    @contextmanager
    def opened(self) -> Iterator[None]:
        """As that of `Reference`, with nothing to gather."""
        yield

    def logprobs(self, samples: Sequence[Sample]) -> list[np.ndarray]:
        """As that of `Reference`; waits for nobody."""
        with self._policy.without_adapters():
            return score_responses(lambda packed: self._policy(packed)[0], samples, self._budget, self._device)
