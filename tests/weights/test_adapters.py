"""Adapters alone: published in peft's layout, merged by whoever serves them, to the numbers of the merged model."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3ForCausalLM

from flowrl.config import LoRAConfig, load
from flowrl.rollout.embedded.core import EmbeddedCore
from flowrl.rollout.embedded.engine import EmbeddedEngine
from flowrl.rollout.engine import EngineError, GenerateRequest, PauseMode, SamplingParams
from flowrl.trainer.lora import AdapterModel, MergedModel, adapter_config, add_adapters
from flowrl.weights.adapters import ADAPTER_CONFIG, ADAPTER_FILE
from flowrl.weights.check import check_first_sync
from flowrl.weights.form import Form
from flowrl.weights.loading import load_in_place
from flowrl.weights.place import publishes_adapters, version_bytes
from flowrl.weights.publish import Publisher
from flowrl.weights.store import WeightStore

TOKENS = torch.tensor([[5, 9, 2, 40]])
QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"


def adapted(model_dir: Path, seed: int = 1) -> PreTrainedModel:
    """The model of the directory with adapters that have learned something."""
    lm = Qwen3ForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    add_adapters(lm, LoRAConfig(rank=4, alpha=8.0))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    return lm


def publisher_of(lm: PreTrainedModel, model_dir: Path, root: Path) -> Publisher:
    adapters = AdapterModel(lm)
    form = Form.of_adapters(adapters.state_dict(), adapter_config(lm, model_dir), model_dir)
    return Publisher(adapters, model_dir, WeightStore(root, 2), "float32", form=form)


@pytest.fixture(scope="module")
def adapters_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    publisher = publisher_of(adapted(model_dir), model_dir, tmp_path_factory.mktemp("adapters"))
    path = publisher.publish(3)
    publisher.close()
    assert path is not None
    return path


def merged_state(model_dir: Path, seed: int = 1) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in MergedModel(adapted(model_dir, seed)).state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_in_place_is_the_trainers_merged_model_bit_for_bit(
    dtype: torch.dtype, adapters_dir: Path, model_dir: Path
) -> None:
    served = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype)
    for _ in range(2):  # again from the checkpoint's W, not from what the last version has left
        load_in_place(served.state_dict(keep_vars=True), adapters_dir)
    state = served.state_dict()
    for name, tensor in merged_state(model_dir).items():
        assert torch.equal(state[name], tensor.to(dtype)), name


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks transformers for it
def test_logits_are_those_of_the_exported_merged_directory_and_of_peft(
    adapters_dir: Path, model_dir: Path, tmp_path: Path
) -> None:
    Publisher(MergedModel(adapted(model_dir)), model_dir, None, "float32").export(tmp_path / "merged")
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)(TOKENS).logits
        base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        assert (wanted - base(TOKENS).logits).abs().max() > 0.01
        load_in_place(base.state_dict(keep_vars=True), adapters_dir)
        assert torch.equal(base(TOKENS).logits, wanted)
        again = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        theirs = peft.PeftModel.from_pretrained(again, str(adapters_dir))(TOKENS).logits
    torch.testing.assert_close(theirs, wanted, rtol=1e-4, atol=1e-5)


def test_only_adapters_are_published(adapters_dir: Path, model_dir: Path) -> None:
    assert {ADAPTER_FILE, ADAPTER_CONFIG, "config.json", "tokenizer.json"} <= {
        file.name for file in adapters_dir.iterdir()
    }
    tensors = load_file(adapters_dir / ADAPTER_FILE)
    assert all(".lora_" in name and tensor.dtype == torch.float32 for name, tensor in tensors.items())
    numbers = sum(tensor.numel() for tensor in tensors.values())
    trained = sum(p.numel() for name, p in adapted(model_dir).named_parameters() if ".lora_" in name)
    assert numbers == trained


def test_engine_starts_from_adapters_and_follows_them(adapters_dir: Path, model_dir: Path, tmp_path: Path) -> None:
    publisher = publisher_of(adapted(model_dir, seed=2), model_dir, tmp_path / "store")
    second = publisher.publish(4)
    publisher.close()
    assert second is not None
    save_merged(merged_state(model_dir), model_dir, tmp_path / "one")
    save_merged(merged_state(model_dir, seed=2), model_dir, tmp_path / "two")
    engine = EmbeddedCore(adapters_dir, 3, max_batch=2, max_model_tokens=32)
    assert sampled(engine) == sampled(EmbeddedCore(tmp_path / "one", 3, max_batch=2, max_model_tokens=32))
    engine.load(second, 4, PauseMode.KEEP)
    assert sampled(engine) == sampled(EmbeddedCore(tmp_path / "two", 4, max_batch=2, max_model_tokens=32))


def save_merged(state: dict[str, torch.Tensor], model_dir: Path, target: Path) -> None:
    lm = Qwen3ForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    lm.load_state_dict(state)
    lm.save_pretrained(target)


def sampled(engine: EmbeddedCore) -> tuple[list[int], list[float]]:
    request = GenerateRequest(request_id="r", tokens=(5, 9, 2), sampling=SamplingParams(max_tokens=12, seed=3))
    (found,) = engine.generate_all([request])
    return found.tokens.tolist(), found.logprobs.tolist()


def test_first_sync_of_adapters_that_change_nothing_yet_is_checked(model_dir: Path, tmp_path: Path) -> None:
    """As a run begins: B is zero."""
    lm = Qwen3ForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.mul_(10)  # so that every layer matters
    lm.save_pretrained(tmp_path / "lively")
    add_adapters(lm, LoRAConfig(rank=4, alpha=8.0))
    publisher = publisher_of(lm, tmp_path / "lively", tmp_path / "store")
    path = publisher.publish(0)
    publisher.close()
    assert path is not None

    async def check() -> None:
        engine = EmbeddedEngine(max_batch=2, max_model_tokens=16)
        await engine.start(path, 0)
        try:
            await check_first_sync(engine, path, 0, tmp_path / "scratch", starts_anew=True)
        finally:
            await engine.close()

    asyncio.run(check())


def test_adapters_of_another_model_are_refused_with_nothing_overwritten(
    adapters_dir: Path, model_dir: Path, tmp_path: Path
) -> None:
    tensors = {
        name.replace("layers.1", "layers.7"): tensor for name, tensor in load_file(adapters_dir / ADAPTER_FILE).items()
    }
    save_file(tensors, tmp_path / ADAPTER_FILE)
    (tmp_path / ADAPTER_CONFIG).write_text((adapters_dir / ADAPTER_CONFIG).read_text())
    engine = EmbeddedCore(model_dir, 0, max_batch=2, max_model_tokens=32)
    before = sampled(engine)
    with pytest.raises(EngineError, match=r"adapts model\.layers\.7\..*nothing was replaced"):
        engine.load(tmp_path, 1, PauseMode.KEEP)
    assert sampled(engine) == before


def test_what_is_published_of_adapters_follows_from_the_recipe(model_dir: Path) -> None:
    recipe = load(QUICKSTART, [f"model.path={model_dir}", "model.lora={rank: 4, targets: [q_proj, down_proj]}"])
    assert publishes_adapters(recipe)
    exact = 4 * 4 * 2 * ((32 + 32) + (64 + 32))
    assert version_bytes(recipe) == exact
    sglang = dataclasses.replace(recipe, rollout=dataclasses.replace(recipe.rollout, engine="sglang"))
    straight = dataclasses.replace(recipe, weights=dataclasses.replace(recipe.weights, transport="collective"))
    assert not publishes_adapters(sglang) and not publishes_adapters(straight)
    assert version_bytes(sglang) == version_bytes(straight) > 5 * exact
