"""What an update that is not finite consumed, left on disk for whoever looks into it. An npz file a rank, no pickle:

partition, group, index, attempt        of each row
is_culprit                              whether the row's own loss is not finite
advantage, reward                       of each row
prompt_length, response_length          where the rows below are to be cut
prompt_tokens, response_tokens, response_mask, rollout_logprobs, and per-token columns    end to end
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from flowrl.trainer.failure import NonFiniteUpdate
from flowrl.trainer.packing import Sample

ROW_ARRAYS = ("prompt_tokens", "response_tokens", "response_mask", "rollout_logprobs")


@contextmanager
def dumping(directory: Path, update: int, rank: int) -> Iterator[None]:
    """Around an update: if it is not finite, leaves directory/not_finite_UPDATE_RANK.npz, and the error names it."""
    try:
        yield
    except NonFiniteUpdate as error:
        path = directory / f"not_finite_{update}_{rank}.npz"
        dump(path, error)
        error.args = (f"{error}; this rank's rows are in {path}",)
        raise


def dump(path: Path, error: NonFiniteUpdate) -> None:
    samples = error.samples
    culprits = set(error.rows)
    arrays: dict[str, np.ndarray] = {
        "partition": np.array([sample.key.partition for sample in samples], np.str_),
        "is_culprit": np.array([sample.key in culprits for sample in samples], np.bool_),
        "advantage": np.array([sample.advantage for sample in samples]),
        "reward": np.array([sample.reward for sample in samples]),
        "prompt_length": np.array([len(sample.prompt_tokens) for sample in samples], np.int64),
        "response_length": np.array([len(sample.response_tokens) for sample in samples], np.int64),
    }
    for name in ("group", "index", "attempt"):
        arrays[name] = np.array([getattr(sample.key, name) for sample in samples], np.int64)
    for name in ROW_ARRAYS:
        arrays[name] = _end_to_end([getattr(sample, name) for sample in samples])
    for name in _shared_columns(samples):
        arrays[f"per_token_{name}"] = _end_to_end([sample.per_token[name] for sample in samples])
    np.savez(path, **arrays)  # type: ignore[arg-type]


def _shared_columns(samples: tuple[Sample, ...]) -> list[str]:
    return sorted(set.intersection(*(set(sample.per_token) for sample in samples))) if samples else []


def _end_to_end(rows: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(rows) if rows else np.zeros(0)
