"""Several real SGLang servers behind one engine, with a mixture of experts: loss, return, routed experts.

One scenario, because two servers take a minute to start on two cores.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from flowrl.rollout.engine import FinishReason, Generation, PauseMode
from flowrl.rollout.sglang.engine import SGLangEngine
from tests.rollout.conformance import assert_logprobs, prompts, request
from tests.rollout.reference import CONFIGS, MAX_MODEL_TOKENS, reference_model, write_model
from tests.rollout.sglang_environment import sglang_python

pytestmark = [pytest.mark.sglang, pytest.mark.slow, pytest.mark.timeout(400)]
LONG = 400


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    moe = CONFIGS["qwen3_moe"]
    return write_model(tmp_path / "first", 0, moe), write_model(tmp_path / "second", 1, moe)


class Lines(list[str]):
    """What the engine told."""

    async def wait_for(self, part: str, within_s: float) -> None:
        async with asyncio.timeout(within_s):
            while not any(part in line for line in self):
                await asyncio.sleep(0.1)


async def generate_on_both(engine: SGLangEngine, max_tokens: int, during: Callable[[], None]) -> list[Generation]:
    """Twelve requests, of which each server has six; `during` is called when they have tokens."""
    tasks = [
        asyncio.create_task(engine.generate(request(f"r{i}", prompt, max_tokens)))
        for i, prompt in enumerate(prompts(12))
    ]
    await asyncio.sleep(0)
    assert engine._dispatch._router.num_running == [6, 6]
    await engine.generate(request("pilot", (3, 4), 4))
    during()
    return await asyncio.gather(*tasks)


def server(engine: SGLangEngine, number: int) -> psutil.Process:
    assert engine._fleet is not None
    kept = engine._fleet.member(number)._process
    assert kept is not None and kept._process is not None
    return psutil.Process(kept._process.pid).children()[0]


def test_lost_servers_come_back_with_the_newest_weights_while_the_others_go_on(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    first, second = models
    told = Lines()
    engine = SGLangEngine(
        python=str(sglang_python()),
        device="cpu",
        servers=2,
        routed_experts=True,
        server_args={"context_length": MAX_MODEL_TOKENS, "max_running_requests": 32},
        log_path=tmp_path / "server.log",
        startup_timeout_s=200,
        health_every_s=1.0,
        health_timeout_s=15.0,
        log=told.append,
    )

    async def scenario() -> None:
        await engine.start(first, 0)
        try:
            made = await generate_on_both(engine, LONG, server(engine, 1).kill)
            assert_whole(first, 0, made)
            await told.wait_for("1 of 2 servers go on", within_s=30)
            assert "exit code 137" in told[0]
            assert_experts_are_those_of_a_forward(first, prompts(12)[0], made[0])

            await engine.load_weights(second, 1, PauseMode.RECOMPUTE)  # the lost one knows nothing of it
            assert set((await engine.generate(request("meanwhile", (5, 6), 8))).versions.tolist()) == {1}
            await told.wait_for("serves again, version 1", within_s=150)
            assert_whole(second, 1, await generate_on_both(engine, 40, lambda: None))

            await engine.load_weights(first, 2, PauseMode.KEEP)
            frozen = server(engine, 0)
            made = await generate_on_both(engine, LONG, lambda: os.killpg(frozen.pid, signal.SIGSTOP))
            assert_whole(first, 2, made)
            await told.wait_for("generates nothing", within_s=30)
            await asyncio.to_thread(frozen.wait, 30)
        finally:
            await engine.close()

    others = set(psutil.Process().children(recursive=True))
    asyncio.run(scenario())
    assert not set(psutil.Process().children(recursive=True)) - others


def assert_whole(path: Path, version: int, made: list[Generation]) -> None:
    for prompt, result in zip(prompts(12), made, strict=True):
        assert result.finish_reason is FinishReason.LENGTH
        assert set(result.versions.tolist()) == {version}
        assert_logprobs(path, prompt, result, 1.0, slice(None))


@torch.no_grad()
def assert_experts_are_those_of_a_forward(path: Path, prompt: tuple[int, ...], made: Generation) -> None:
    tokens = torch.tensor([[*prompt, *made.tokens.tolist()[:-1]]])
    logits = reference_model(path)(input_ids=tokens, output_router_logits=True).router_logits
    num_layers, num_experts = 2, 2
    assert made.routed_experts is not None
    assert made.routed_experts.shape == (tokens.shape[1], num_layers, num_experts)
    for layer in range(num_layers):
        expected = np.sort(logits[layer].topk(num_experts, dim=-1).indices.numpy(), axis=1)
        assert (np.sort(made.routed_experts[:, layer], axis=1) == expected).mean() > 0.99  # but for near ties
