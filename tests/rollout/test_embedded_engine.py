"""EmbeddedEngine: the conformance suite, and what only it promises: architectures, sharing, loading, failing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma2Config, MambaConfig

from flowrl.rollout.embedded.core import EmbeddedCore
from flowrl.rollout.embedded.engine import EmbeddedEngine
from flowrl.rollout.embedded.parking import ParkedWeights
from flowrl.rollout.engine import Engine, EngineError, PauseMode
from tests.rollout.conformance import (
    EngineConformance,
    assert_logprobs,
    engine,  # noqa: F401
    models,  # noqa: F401
    prompts,
    request,
    runner,  # noqa: F401
)
from tests.rollout.reference import CONFIGS, VOCABULARY, reference_logprobs, write_model

MAX_BATCH = 12


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def make_engine() -> Callable[[], Engine]:
    return lambda: EmbeddedEngine(max_batch=MAX_BATCH, prefill_tokens=64, threads=1)


class TestEmbeddedEngine(EngineConformance):
    pass


@pytest.mark.parametrize("architecture", CONFIGS)
def test_every_architecture_agrees_with_its_own_forward(architecture: str, tmp_path: Path) -> None:
    path = write_model(tmp_path, 0, CONFIGS[architecture])
    core = EmbeddedCore(path, 0, max_batch=7, prefill_tokens=10)
    texts = prompts(6)
    requests = [request(f"r{i}", texts[i // 2], 3 + 5 * (i % 4), temperature=0.8) for i in range(12)]
    for one, result in zip(requests, core.generate_all(requests), strict=True):
        assert_logprobs(path, one.tokens, result, 0.8, slice(None))


def test_prompt_of_a_group_is_computed_once(tmp_path: Path) -> None:
    core = EmbeddedCore(write_model(tmp_path, 0), 0)
    computed: list[int] = []
    embedding = core._model.get_input_embeddings()
    embedding.register_forward_pre_hook(lambda _, inputs: computed.append(inputs[0].shape[1]))
    core.generate_all([request(f"r{i}", tuple(range(20)), 3) for i in range(8)])
    assert computed == [20, 8, 8]


def test_group_larger_than_the_free_slots_computes_its_prompt_once(tmp_path: Path) -> None:
    core = EmbeddedCore(write_model(tmp_path, 0), 0, max_batch=2)
    computed: list[int] = []
    embedding = core._model.get_input_embeddings()
    embedding.register_forward_pre_hook(lambda _, inputs: computed.append(inputs[0].shape[1]))
    core.generate_all([request(f"r{i}", tuple(range(20)), 2) for i in range(4)])
    assert computed == [20, 2, 1, 2]


def test_weights_replaced_from_tensors_are_those_sampled_from(tmp_path: Path) -> None:
    first, second = write_model(tmp_path / "a", 0), write_model(tmp_path / "b", 1)
    core = EmbeddedCore(first, 0)
    core.load(AutoModelForCausalLM.from_pretrained(second).state_dict(), 5, PauseMode.KEEP)
    [result] = core.generate_all([request("r", (1, 2, 3), 10)])
    assert set(result.versions.tolist()) == {5}
    assert_logprobs(second, (1, 2, 3), result, 1.0, slice(None))


def test_prompt_half_computed_at_an_update_is_computed_anew(tmp_path: Path) -> None:
    first, second = write_model(tmp_path / "a", 0), write_model(tmp_path / "b", 1)
    core = EmbeddedCore(first, 0, prefill_tokens=10)
    core.submit([request("r", tuple(range(30)), 5)])
    assert core.step() == core.step() == []
    core.load(second, 1, PauseMode.KEEP)
    finished = [one for _ in range(10) if core.has_work for one in core.step()]
    [(_, result)] = finished
    assert set(result.versions.tolist()) == {1}
    assert_logprobs(second, tuple(range(30)), result, 1.0, slice(None))


@pytest.mark.parametrize("architecture", ["qwen3", "qwen2"])
def test_update_from_sharded_files_replaces_tied_and_untied_heads(architecture: str, tmp_path: Path) -> None:
    first, second = (write_model(tmp_path / name, seed, CONFIGS[architecture]) for seed, name in enumerate("ab"))
    tensors = load_file(second / "model.safetensors")
    (second / "model.safetensors").unlink()
    names = sorted(tensors)
    for shard in range(2):
        save_file({name: tensors[name] for name in names[shard::2]}, second / f"model-{shard}.safetensors")
    core = EmbeddedCore(first, 0)
    core.load(second, 1, PauseMode.KEEP)
    reference = write_model(tmp_path / "c", 1, CONFIGS[architecture])
    [result] = core.generate_all([request("r", (1, 2, 3), 10)])
    assert_logprobs(reference, (1, 2, 3), result, 1.0, slice(None))


def test_architecture_stored_under_other_names_is_translated(tmp_path: Path) -> None:
    first, second = (write_model(tmp_path / name, seed, CONFIGS["qwen3_moe"]) for seed, name in enumerate("ab"))
    core = EmbeddedCore(first, 0)
    core.load(second, 1, PauseMode.KEEP)
    [result] = core.generate_all([request("r", (1, 2, 3), 10)])
    assert_logprobs(second, (1, 2, 3), result, 1.0, slice(None))


@pytest.mark.parametrize("fault", ["missing", "unknown", "shape"])
def test_refused_weights_leave_every_tensor_as_it_was(fault: str, tmp_path: Path) -> None:
    core = EmbeddedCore(write_model(tmp_path / "a", 0), 0)
    before = {name: tensor.clone() for name, tensor in core._model.state_dict().items()}
    other = load_file(write_model(tmp_path / "b", 1) / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    if fault == "unknown":
        other["model.layers.9.mlp.up_proj.weight"] = other[name].clone()
    elif fault == "missing":
        del other[name]
    else:
        other[name] = other[name][:5].clone()
    (tmp_path / "b" / "model.safetensors").unlink()
    save_file(other, tmp_path / "b" / "model.safetensors")
    with pytest.raises(EngineError, match="up_proj"):
        core.load(tmp_path / "b", 1, PauseMode.KEEP)
    assert core.version == 0
    assert all(torch.equal(before[name], tensor) for name, tensor in core._model.state_dict().items())


def test_directory_without_a_model_is_refused_at_the_start_and_a_later_start_succeeds(tmp_path: Path) -> None:
    async def start_twice() -> int:
        embedded = EmbeddedEngine(threads=1)
        with pytest.raises(EngineError, match="nowhere"):
            await embedded.start(tmp_path / "nowhere", 0)
        await embedded.start(write_model(tmp_path / "a", 0), 3)
        await embedded.close()
        return embedded.version

    assert asyncio.run(start_twice()) == -1


def test_token_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    core = EmbeddedCore(write_model(tmp_path, 0), 0)
    with pytest.raises(ValueError, match="tokens"):
        core.check(request("r", (1, VOCABULARY), 1))


def test_more_tokens_than_the_model_has_positions_for_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_model_tokens"):
        EmbeddedCore(write_model(tmp_path, 0, CONFIGS["gpt2"]), 0, max_model_tokens=5000)


def test_architecture_that_slots_cannot_serve_is_refused(tmp_path: Path) -> None:
    mamba = MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, state_size=4)
    gemma = Gemma2Config(
        **CONFIGS["llama"].to_diff_dict() | {"model_type": "gemma2", "head_dim": 32}, attn_logit_softcapping=5.0
    )
    for name, config in (("mamba", mamba), ("gemma", gemma)):
        with pytest.raises(ValueError, match="model:"):
            EmbeddedCore(write_model(tmp_path / name, 0, config), 0, max_model_tokens=32)


def test_failure_in_a_step_reaches_every_request_and_a_restart_cures_it(tmp_path: Path) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    async def fail_and_restart() -> int:
        embedded = EmbeddedEngine(threads=1)
        await embedded.start(write_model(tmp_path, 0), 0)
        assert embedded._core is not None
        embedded._core._model.get_input_embeddings().register_forward_pre_hook(fail)
        requests = [request(f"r{i}", (1, 2, 3), 4) for i in range(3)]
        results = await asyncio.gather(*(embedded.generate(one) for one in requests), return_exceptions=True)
        assert all(isinstance(one, EngineError) and "out of memory" in str(one) for one in results)
        with pytest.raises(EngineError, match="restart"):
            await embedded.generate(requests[0])
        await embedded.close()
        await embedded.start(tmp_path, 1)
        result = await embedded.generate(requests[0])
        await embedded.close()
        return len(result.tokens)

    assert asyncio.run(fail_and_restart()) == 4


def test_closing_fails_running_requests(tmp_path: Path) -> None:
    async def close_underway() -> None:
        embedded = EmbeddedEngine(threads=1)
        await embedded.start(write_model(tmp_path, 0), 0)
        running = asyncio.create_task(embedded.generate(request("r", (1, 2, 3), 900)))
        await asyncio.sleep(0.05)
        await embedded.close()
        await embedded.close()
        with pytest.raises(EngineError, match="closed"):
            await running

    asyncio.run(close_underway())


def test_request_cancelled_before_it_reached_the_core_is_not_generated(tmp_path: Path) -> None:
    async def cancel_at_once() -> None:
        embedded = EmbeddedEngine(threads=1)
        await embedded.start(write_model(tmp_path, 0), 0)
        await embedded.pause(PauseMode.KEEP)
        task = asyncio.create_task(embedded.generate(request("r", (1, 2, 3), 900)))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        await embedded.abort("nobody")
        assert embedded._core is not None and not embedded._core.has_work
        await embedded.close()

    asyncio.run(cancel_at_once())


def test_loop_stays_free_while_the_model_computes(tmp_path: Path) -> None:
    async def count_turns() -> tuple[int, int]:
        embedded = EmbeddedEngine(prefill_tokens=512, threads=1)
        await embedded.start(write_model(tmp_path, 0), 0)
        steps = 0

        def count_step(*_: object) -> None:
            nonlocal steps
            steps += 1

        assert embedded._core is not None
        embedded._core._model.get_input_embeddings().register_forward_pre_hook(count_step)
        rng = np.random.default_rng(0)
        texts = [tuple(rng.integers(VOCABULARY, size=500).tolist()) for _ in range(20)]
        work = asyncio.gather(*(embedded.generate(request(f"r{i}", text, 1)) for i, text in enumerate(texts)))
        turns = 0
        while not work.done():
            await asyncio.sleep(0.0005)
            turns += 1
        await work
        await embedded.close()
        return turns, steps

    turns, steps = asyncio.run(count_turns())
    assert turns > 3 * steps


@pytest.mark.parametrize("architecture", ["qwen3", "gpt2"])
def test_half_precision_agrees_with_its_own_forward_to_its_precision(architecture: str, tmp_path: Path) -> None:
    path = write_model(tmp_path, 0, CONFIGS[architecture])
    core = EmbeddedCore(path, 0, dtype="bfloat16")
    requests = [request(f"r{i}", prompt, 20) for i, prompt in enumerate(prompts(6))]
    for one, result in zip(requests, core.generate_all(requests), strict=True):
        response = result.tokens.tolist()
        expected = reference_logprobs(path, one.tokens, response)[torch.arange(20), torch.tensor(response)].numpy()
        assert np.abs(result.logprobs - expected).mean() < 0.1


def test_joined_projections_are_the_parameters_that_an_update_replaces(tmp_path: Path) -> None:
    first, second = write_model(tmp_path / "a", 0), write_model(tmp_path / "b", 1)
    core = EmbeddedCore(first, 0)
    attention = core._model.model.layers[0].self_attn
    query, key = attention.q_proj.weight, attention.k_proj.weight
    assert key.data_ptr() == query.data_ptr() + query.nbytes
    core.load(second, 1, PauseMode.KEEP)
    expected = AutoModelForCausalLM.from_pretrained(second).state_dict()
    assert all(torch.equal(expected[name], tensor) for name, tensor in core._model.state_dict().items())


def test_lent_memory_is_free_and_parked_weights_come_back_bit_for_bit(tmp_path: Path) -> None:
    core = EmbeddedCore(write_model(tmp_path, 0), 0)
    core.submit([request("r", (1, 2, 3), 40)])
    for _ in range(5):
        core.step()
    assert core._runner._decode_kv.nbytes > 0
    core.release_memory()
    assert core._runner._decode_kv.nbytes == core._runner._prefill_kv.nbytes == 0
    model = core._model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    head, embedding = model.lm_head.weight, model.model.embed_tokens.weight
    parked = ParkedWeights(model)  # which the core does on a GPU alone
    assert {tensor.untyped_storage().nbytes() for tensor in model.parameters()} == {0}
    parked.restore()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert head.data_ptr() == embedding.data_ptr() and model.lm_head.weight is head
    core.resume_memory()
    [(_, result)] = [one for _ in range(40) if core.has_work for one in core.step()]
    assert_logprobs(tmp_path, (1, 2, 3), result, 1.0, slice(None))


def test_stop_strings_without_a_tokenizer_are_refused(tmp_path: Path) -> None:
    core = EmbeddedCore(write_model(tmp_path, 0), 0)
    with pytest.raises(ValueError, match="stop_strings"):
        core.check(request("r", (1, 2), 1, stop_strings=("x",)))
