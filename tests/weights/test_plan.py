"""Every byte of a version is written by exactly one rank, whatever the model and the number of ranks."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from flowrl.weights.names import extents_on_disk
from flowrl.weights.plan import Plan, chunk_rows, is_sharded, served_dtypes
from flowrl.weights.slices import Holdings
from flowrl.weights.tensorfile import Kind


def qwen3(hidden: int, layers: int, heads: int, intermediate: int, tied: bool) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=151936, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=8, head_dim=128, intermediate_size=intermediate, tie_word_embeddings=tied,
    )  # fmt: skip


CONFIGS: dict[str, tuple[PreTrainedConfig, float]] = {
    "Qwen3-0.6B": (qwen3(1024, 28, 16, 3072, True), 0.596),
    "Qwen3-8B": (qwen3(4096, 36, 32, 12288, False), 8.19),
    "Qwen2-0.5B": (
        Qwen2Config(
            vocab_size=151936, hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
            intermediate_size=4864, tie_word_embeddings=True,
        ),
        0.494,
    ),
    "Qwen2-72B": (
        Qwen2Config(
            vocab_size=152064, hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
            intermediate_size=29568, tie_word_embeddings=False,
        ),
        72.7,
    ),
    "Llama-3-70B": (
        LlamaConfig(
            vocab_size=128256, hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
            intermediate_size=28672, tie_word_embeddings=False,
        ),
        70.55,
    ),
    "Qwen3-30B-A3B": (
        Qwen3MoeConfig(
            vocab_size=151936, hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4,
            head_dim=128, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8, tie_word_embeddings=False,
        ),
        30.5,
    ),
}  # fmt: skip


def on_meta(config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        tensors: dict[str, torch.Tensor] = AutoModelForCausalLM.from_config(config).state_dict(keep_vars=True)
        return tensors


def named_as_published(tensors: dict[str, torch.Tensor]) -> dict[str, Kind]:
    """What the hub has for these models: tied weights once, an expert's matrices apart."""
    found: dict[str, Kind] = {}
    seen = set()
    for name, tensor in tensors.items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        prefix, _, last = name.rpartition(".")
        if last in ("gate_up_proj", "down_proj") and tensor.ndim == 3:
            experts, rows, columns = tensor.shape
            parts = ("gate_proj", "up_proj") if last == "gate_up_proj" else ("down_proj",)
            for expert in range(experts):
                for part in parts:
                    shape = torch.Size((rows // len(parts), columns))
                    found[f"{prefix}.{expert}.{part}.weight"] = Kind(shape, torch.bfloat16)
        else:
            found[name] = Kind(tensor.shape, torch.bfloat16)
    return found


def plan_of(tensors: dict[str, torch.Tensor], on_disk: dict[str, Kind], num_ranks: int) -> Plan:
    extents = extents_on_disk(tensors, on_disk, "model")
    dtypes = served_dtypes(on_disk, extents, torch.bfloat16)
    kinds = {name: Kind(tensors[name].shape, dtypes[name]) for name in extents}
    return Plan.of(extents, kinds, set(extents), num_ranks)


def assert_covered_once(plan: Plan) -> None:
    end = len(plan.layout.header)
    for begin, after in sorted(
        (piece.begin, piece.end) for rank in range(plan.num_ranks) for piece in plan.pieces(rank)
    ):
        assert begin == end
        end = after
    assert end == plan.layout.num_bytes


@pytest.mark.parametrize("name", CONFIGS)
def test_real_models_are_covered_once_under_their_names_on_disk(name: str) -> None:
    config, billions = CONFIGS[name]
    tensors = on_meta(config)
    on_disk = named_as_published(tensors)
    for num_ranks in (1, 3, 8, 64):
        plan = plan_of(tensors, on_disk, num_ranks)
        assert_covered_once(plan)
        assert set(plan.layout.slots) == set(on_disk)
        elements = sum(slot.kind.shape.numel() for slot in plan.layout.slots.values())
        assert elements == pytest.approx(billions * 1e9, rel=0.01)


shapes = st.lists(st.integers(1, 9), min_size=1, max_size=3).map(torch.Size)


@settings(deadline=None, max_examples=200)
@given(st.lists(shapes, min_size=1, max_size=6), st.integers(1, 64), st.lists(st.booleans(), min_size=6, max_size=6))
def test_every_byte_is_written_by_one_rank(given_shapes: list[torch.Size], num_ranks: int, wide: list[bool]) -> None:
    """Against `torch.chunk` of real tensors: what the pieces put together is what safetensors would hold."""
    tensors = {f"t{index}": torch.randn(shape) for index, shape in enumerate(given_shapes)}
    kinds = {
        name: Kind(tensor.shape, torch.float32 if wide[index] else torch.bfloat16)
        for index, (name, tensor) in enumerate(tensors.items())
    }
    extents = extents_on_disk(tensors, kinds, "model")
    plan = Plan.of(extents, kinds, set(tensors), num_ranks)
    assert_covered_once(plan)
    file = torch.zeros(plan.layout.num_bytes, dtype=torch.uint8)
    for rank in range(num_ranks):
        for piece in plan.pieces(rank):
            chunks = tensors[piece.name].chunk(num_ranks)
            assert tuple(chunks[rank].shape) == tuple(piece.kind.shape)
            cast = chunks[rank].to(piece.kind.dtype).contiguous()
            file[piece.begin : piece.end] = cast.view(-1).view(torch.uint8)
    for name, slot in plan.layout.slots.items():
        found = file[slot.begin : slot.begin + slot.kind.num_bytes].view(slot.kind.dtype).view(slot.kind.shape)
        assert torch.equal(found, tensors[name].to(slot.kind.dtype))


@given(st.integers(0, 300), st.integers(1, 64))
def test_rows_are_dealt_out_as_torch_chunks_them(num_rows: int, num_ranks: int) -> None:
    lengths = [end - begin for begin, end in (chunk_rows(rank, num_rows, num_ranks) for rank in range(num_ranks))]
    expected = [len(chunk) for chunk in torch.zeros(num_rows).chunk(num_ranks)]
    assert lengths == expected + [0] * (num_ranks - len(expected))


def test_ranges_of_all_nodes_are_every_byte_once() -> None:
    tensors = {"a": torch.zeros(7, 3), "b": torch.zeros(1), "c": torch.zeros(64, 2)}
    on_disk = {name: Kind(tensor.shape, torch.bfloat16) for name, tensor in tensors.items()}
    plan = plan_of(tensors, on_disk, 6)
    held = [plan.ranges(range(0, 2)), plan.ranges(range(2, 6))]
    holdings = Holdings.of([0, 1], held, plan.layout.num_bytes)
    slices = holdings.slices(slice_bytes=16)
    assert sum(part.num_bytes for part in slices) == plan.layout.num_bytes
    assert max(part.num_bytes for part in slices) <= 16


def test_plans_of_other_layouts_have_other_fingerprints() -> None:
    tensors = {"a": torch.zeros(8, 4), "b": torch.zeros(4, 8)}
    on_disk = {name: Kind(tensor.shape, torch.bfloat16) for name, tensor in tensors.items()}
    same = plan_of(tensors, on_disk, 2)
    assert same.fingerprint == plan_of(dict(tensors), dict(on_disk), 2).fingerprint
    others = [
        plan_of(tensors, on_disk, 3),
        plan_of({"b": tensors["b"], "a": tensors["a"]}, on_disk, 2),
        plan_of(tensors | {"a": torch.zeros(4, 8)}, on_disk | {"a": Kind(torch.Size((4, 8)), torch.bfloat16)}, 2),
        Plan.of(extents_on_disk(tensors, on_disk, "m"), on_disk, {"a"}, 2),
    ]
    assert same.fingerprint not in {plan.fingerprint for plan in others}


def test_transposed_tensor_is_refused_by_name() -> None:
    tensors = {"wide.weight": torch.zeros(3, 5)}
    with pytest.raises(ValueError, match=r"'wide\.weight'.*a transpose cannot be written as byte ranges"):
        extents_on_disk(tensors, {"wide.weight": Kind(torch.Size((5, 3)), torch.float32)}, "model")


def test_transposed_experts_are_refused_by_name() -> None:
    tensors = {"mlp.experts.down_proj": torch.zeros(2, 3, 5)}
    disk = {f"mlp.experts.{i}.down_proj.weight": Kind(torch.Size((5, 3)), torch.float32) for i in range(2)}
    with pytest.raises(ValueError, match=r"'mlp\.experts\.0\.down_proj\.weight'.*a transpose cannot be"):
        extents_on_disk(tensors, disk, "model")


def test_missing_expert_is_refused_by_name() -> None:
    tensors = {"mlp.experts.down_proj": torch.zeros(2, 3, 5)}
    disk = {"mlp.experts.0.down_proj.weight": Kind(torch.Size((3, 5)), torch.float32)}
    with pytest.raises(ValueError, match=r"neither 'mlp\.experts\.down_proj' nor 'mlp\.experts\.1\.down_proj\.weight'"):
        extents_on_disk(tensors, disk, "model")


@pytest.fixture
def one_rank(tmp_path: Any) -> Any:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        dist.destroy_process_group()


def test_shardings_that_byte_ranges_cannot_express_are_refused_by_name(one_rank: None) -> None:
    mesh = DeviceMesh("cpu", [0])
    assert is_sharded("w", distribute_tensor(torch.zeros(4, 4), mesh, [Shard(0)]))
    assert not is_sharded("w", distribute_tensor(torch.zeros(4, 4), mesh, [Replicate()]))
    assert not is_sharded("w", torch.zeros(4, 4))
    with pytest.raises(ValueError, match=r"'w' is placed as \(Shard\(dim=1\),\)"):
        is_sharded("w", distribute_tensor(torch.zeros(4, 4), mesh, [Shard(1)]))
    two = DeviceMesh("cpu", [[0]])
    tensor = DTensor.from_local(torch.zeros(4, 4), two, [Shard(0), Shard(1)], run_check=False)
    with pytest.raises(ValueError, match="only tensors sharded along dimension 0 over one mesh dimension"):
        is_sharded("w", tensor)


def test_whole_numbers_and_deliberate_float32_keep_their_dtype() -> None:
    def kind(dtype: torch.dtype) -> Kind:
        return Kind(torch.Size((2,)), dtype)

    tensors = {name: torch.zeros(2) for name in ("w", "bias", "count")}
    mixed = {"w": kind(torch.bfloat16), "bias": kind(torch.float32), "count": kind(torch.int64)}
    extents = extents_on_disk(tensors, mixed, "model")
    found = served_dtypes(mixed, extents, torch.bfloat16)
    assert found == {"w": torch.bfloat16, "bias": torch.float32, "count": torch.int64}
    uniform = mixed | {"w": kind(torch.float32)}
    assert served_dtypes(uniform, extents, torch.bfloat16)["w"] == torch.bfloat16
