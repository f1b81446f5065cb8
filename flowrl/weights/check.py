"""Proof that loading in place reaches the whole model: snapshot, corrupt, synchronise, compare.

Asked of any engine by its own protocol alone: log-probs of a few tokens after it started from a version; with the same
names and shapes full of zeros (of adapters: of some number), they must differ; after loading the version in place, be
as before. An engine that is soon started is started anew on the zeros: a tensor that loading skips stays zero then.
Loaded in place they would not reach such a tensor either, which is right from the start; so a server, whose start takes
long, is proved to follow, and no more. (An expert that no probed token reaches would not be noticed.)
"""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from flowrl.rollout.engine import Engine, EngineError, GenerateRequest, Generation, PauseMode, SamplingParams
from flowrl.weights.adapters import is_adapter, read_config
from flowrl.weights.buffers import link
from flowrl.weights.store import companions_of

TOLERANCE = 1e-3  # in log-prob: one request alone, of the same shapes, is computed alike each time
_PROBE_TOKENS = (1, 2, 3)
_NUM_NEW = 4


async def check_first_sync(engine: Engine, path: Path, version: int, scratch: Path, *, starts_anew: bool) -> None:
    """engine: started from the directory `path` as `version`, nothing running. scratch: a directory to make, where a
    file of holes takes no room; what an engine that was killed meanwhile has left there goes. starts_anew: whether the
    engine may be started a second time. Raises EngineError saying what is wrong."""
    first = await _probe(engine)
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        (make_other_adapters if is_adapter(path) else make_zeroed)(path, scratch)
        if starts_anew:
            await engine.close()
            await engine.start(scratch, version)
        else:
            await engine.load_weights(scratch, version, PauseMode.RECOMPUTE)
    finally:
        shutil.rmtree(scratch)
    zeroed = await _probe(engine)
    await engine.load_weights(path, version, PauseMode.RECOMPUTE)
    last = await _probe(engine)
    if _difference(first, zeroed) < TOLERANCE:
        raise EngineError("weights.check_first_sync: the engine computes as before after other weights were loaded")
    error = _difference(first, last)
    if error > TOLERANCE:
        raise EngineError(
            f"weights.check_first_sync: version {version} loaded in place gives other log-probs than an engine started "
            f"from it, by up to {error:.3g}; some tensor is not replaced"
        )


def make_zeroed(path: Path, target: Path) -> None:
    """A copy of a Hugging Face directory whose weights are all zero. Takes no more room than their headers."""
    target.mkdir(parents=True)
    for source in companions_of(path):
        link(source, target / source.name)
    for file in path.glob("*.safetensors"):
        with file.open("rb") as opened, (target / file.name).open("wb") as made:
            length = opened.read(8)
            made.write(length + opened.read(int.from_bytes(length, "little")))
            made.truncate(os.fstat(opened.fileno()).st_size)


def make_other_adapters(path: Path, target: Path) -> None:
    """A copy of a directory of adapters, all full of one number: every adapted matrix becomes larger by 0.1."""
    target.mkdir(parents=True)
    for source in companions_of(path):
        link(source, target / source.name)
    value = math.sqrt(0.1 / read_config(path).lora_alpha)
    for file in path.glob("*.safetensors"):
        save_file(
            {name: torch.full_like(tensor, value) for name, tensor in load_file(file).items()}, target / file.name
        )


async def _probe(engine: Engine) -> Generation:
    """The likeliest tokens, with their log-probs."""
    sampling = SamplingParams(max_tokens=_NUM_NEW, top_k=1)
    return await engine.generate(
        GenerateRequest(request_id="check-first-sync", tokens=_PROBE_TOKENS, sampling=sampling)
    )


def _difference(one: Generation, other: Generation) -> float:
    """Largest, of the log-probs as far as the tokens are the same; the first token's are always compared."""
    count = min(len(one.tokens), len(other.tokens))
    same = int(np.cumprod(one.tokens[:count] == other.tokens[:count]).sum())
    compared = max(1, same)
    return float(np.abs(one.logprobs[:compared] - other.logprobs[:compared]).max())
