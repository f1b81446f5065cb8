"""Directories that FlowRL writes, opened as they lie: real SGLang says what transformers says."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flowrl.rollout.sglang.engine import SGLangEngine
from flowrl.trainer.checkpoint import save
from flowrl.weights.publish import Publisher
from flowrl.weights.store import WeightStore
from tests.rollout.conformance import assert_logprobs, prompts, request
from tests.rollout.reference import write_model, write_tokenizer
from tests.rollout.sglang_environment import sglang_python
from tests.trainer.cases import make_trainer
from tests.trainer.ranks import joined, run_ranks
from tests.trainer.test_export import export_by_command, make_run

NUM_NEW = 24


def write_version_and_checkpoint(rank: int, world_size: int, out: Path, model_dir: Path, run: Path) -> None:
    """Of weights that the model's directory does not have."""
    with joined(rank, world_size, out) as world:
        trainer = make_trainer(model_dir, world)
        with torch.no_grad():
            for parameter in trainer.policy.parameters():
                parameter.mul_(1.25)
        store = WeightStore(out / "weights", 2) if rank == 0 else None
        publisher = Publisher(trainer.policy.published, model_dir, store, "float32")
        publisher.publish(0)
        publisher.close()
        save(run / "checkpoints", trainer, world, extra={}, keep=1)


def greedy_by_transformers(path: Path, prompt: tuple[int, ...]) -> list[int]:
    lm = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    asked = torch.tensor([prompt])
    made = lm.generate(asked, attention_mask=torch.ones_like(asked), do_sample=False, max_new_tokens=NUM_NEW)
    return made[0, len(prompt) :].tolist()


@pytest.mark.sglang
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_sglang_generates_from_a_published_version_and_from_an_export_what_transformers_does(tmp_path: Path) -> None:
    """Written by two ranks, each its shards; exported by `flowrl export` from their checkpoint."""
    python = sglang_python()
    model_dir = write_tokenizer(write_model(tmp_path / "model", 0))
    run = make_run(tmp_path / "run", model_dir)
    run_ranks(write_version_and_checkpoint, 2, tmp_path, model_dir, run)
    exported = tmp_path / "exported"
    run_ranks(export_by_command, 1, tmp_path, str(run), str(exported))
    published = WeightStore(tmp_path / "weights", 2).path(0)
    asked = prompts(6)
    expected = [greedy_by_transformers(exported, prompt) for prompt in asked]
    assert expected == [greedy_by_transformers(published, prompt) for prompt in asked]
    assert expected != [greedy_by_transformers(model_dir, prompt) for prompt in asked]

    async def generate() -> None:
        engine = SGLangEngine(python=str(python), device="cpu", log_path=tmp_path / "server.log")
        try:
            for version, path in enumerate((exported, published)):
                await engine.restart(path, version)
                for prompt, tokens in zip(asked, expected, strict=True):
                    made = await engine.generate(request("q", prompt, NUM_NEW, temperature=0.0))
                    assert made.tokens.tolist() == tokens, path
                    assert_logprobs(path, prompt, made, 1.0, slice(None))
        finally:
            await engine.close()

    asyncio.run(generate())
    texts = [AutoTokenizer.from_pretrained(path).decode(expected[0]) for path in (model_dir, exported, published)]
    assert texts[0] and set(texts) == {texts[0]}
