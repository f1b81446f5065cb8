"""Loading in place: snapshot, corrupt, synchronise, compare; and what does not fit is refused with nothing changed."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from flowrl.rollout.embedded import core
from flowrl.rollout.embedded.engine import EmbeddedEngine
from flowrl.rollout.engine import EngineError
from flowrl.weights import loading
from flowrl.weights.check import check_first_sync, make_zeroed
from flowrl.weights.loading import Loader, load_in_place
from flowrl.weights.publish import Publisher
from flowrl.weights.store import WeightStore


@pytest.fixture(scope="module")
def moe_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("moe")
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=48, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=64, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2,
        bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(path)
    return path


def corrupted(model: torch.nn.Module) -> Mapping[str, torch.Tensor]:
    state = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for tensor in state.values():
            tensor.fill_(float("nan"))
    return state


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", ["model_dir", "moe_dir"])
def test_every_byte_is_back_after_corruption(
    which: str, dtype: torch.dtype, num_threads: int, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Read straight where dtypes agree, cast where they do not (the directory is float32); experts put together. By
    several threads, as large models are, and by one."""
    monkeypatch.setattr(loading, "_NUM_THREADS", num_threads)
    monkeypatch.setattr(loading, "_THREAD_BYTES", 1)
    path = request.getfixturevalue(which)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    snapshot = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    load_in_place(corrupted(model), path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, snapshot[name]), name


def test_what_goes_wrong_in_any_thread_is_raised(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_NUM_THREADS", 3)
    monkeypatch.setattr(loading, "_THREAD_BYTES", 1)
    lately: list[int] = []
    fill = loading._Source.fill

    def failing(source: loading._Source, target: np.ndarray, begin: int) -> None:
        lately.append(threading.get_ident())
        if threading.current_thread() is not threading.main_thread():
            raise OSError("the file has gone bad")
        time.sleep(0.01)  # so that others come to something
        fill(source, target, begin)

    monkeypatch.setattr(loading._Source, "fill", failing)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    with pytest.raises(OSError, match="gone bad"):
        load_in_place(model.state_dict(keep_vars=True), model_dir)
    assert len(set(lately)) > 1


def test_published_version_loads_in_place(model_dir: Path, tmp_path: Path) -> None:
    trained = Qwen3ForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    publisher = Publisher(trained, model_dir, WeightStore(tmp_path, 2), "bfloat16")
    path = publisher.publish(1)
    assert path is not None
    served = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
    load_in_place(corrupted(served), path)
    for name, tensor in trained.named_parameters():
        assert torch.equal(served.state_dict()[name], tensor.to(torch.bfloat16))
    publisher.close()


@pytest.mark.parametrize("damage", ["missing", "unknown", "shape", "cut"])
def test_what_does_not_fit_is_refused_with_nothing_overwritten(damage: str, model_dir: Path, tmp_path: Path) -> None:
    tensors = load_file(model_dir / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    if damage == "missing":
        del tensors[name]
    elif damage == "unknown":
        tensors["model.other"] = torch.zeros(3)
    elif damage == "shape":
        tensors[name] = tensors[name][:, :-1].contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    if damage == "cut":
        whole = (tmp_path / "model.safetensors").read_bytes()
        (tmp_path / "model.safetensors").write_bytes(whole[:-1])
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"up_proj|model\.other|by its header"):
        load_in_place(model.state_dict(keep_vars=True), tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.fixture(scope="module")
def lively_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in which every layer matters, as in one that has been trained."""
    path = tmp_path_factory.mktemp("lively")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=48, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=64, initializer_range=0.3, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(path)
    return path


def check(path: Path, scratch: Path, starts_anew: bool = True) -> None:
    async def run() -> None:
        engine = EmbeddedEngine(max_batch=2, max_model_tokens=16)
        await engine.start(path, 0)
        try:
            await check_first_sync(engine, path, 0, scratch, starts_anew=starts_anew)
        finally:
            await engine.close()

    asyncio.run(run())


@pytest.mark.parametrize("starts_anew", [True, False])
def test_first_sync_passes_and_leaves_nothing(starts_anew: bool, lively_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()  # an engine that was killed in its own check
    (tmp_path / "scratch" / "model.safetensors").touch()
    check(lively_dir, tmp_path / "scratch", starts_anew)
    assert not (tmp_path / "scratch").exists()


def test_first_sync_finds_a_tensor_that_loading_skips(
    lively_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was right from the start."""

    class Skipping(Loader):
        def load(self, path: Path) -> None:
            skipped = self._tensors["model.layers.1.mlp.down_proj.weight"]
            before = skipped.clone()
            super().load(path)
            with torch.no_grad():
                skipped.copy_(before)

    monkeypatch.setattr(core, "Loader", Skipping)
    with pytest.raises(EngineError, match="version 0 loaded in place gives other log-probs"):
        check(lively_dir, tmp_path / "scratch")


@pytest.mark.parametrize(
    ("starts_anew", "message"),
    [(True, "loaded in place gives other log-probs"), (False, "computes as before after other weights were loaded")],
)
def test_first_sync_finds_an_engine_that_loads_nothing(
    starts_anew: bool, message: str, lively_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Loader, "load", lambda self, path: None)
    with pytest.raises(EngineError, match=message):
        check(lively_dir, tmp_path / "scratch", starts_anew)


def test_zeroed_directory_has_the_same_names_and_takes_no_room(lively_dir: Path, tmp_path: Path) -> None:
    make_zeroed(lively_dir, tmp_path / "zero")
    found = load_file(tmp_path / "zero" / "model.safetensors")
    given = load_file(lively_dir / "model.safetensors")
    assert {name: tensor.shape for name, tensor in found.items()} == {name: t.shape for name, t in given.items()}
    assert not any(tensor.any() for tensor in found.values())
    assert (tmp_path / "zero" / "model.safetensors").stat().st_blocks * 512 < 16_384
