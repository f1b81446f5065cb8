"""A published version is a Hugging Face directory, under the names that the checkpoint on disk has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from flowrl.weights.progress import Followed, ProgressReader
from flowrl.weights.publish import Publisher
from flowrl.weights.ranks import WeightsError
from flowrl.weights.store import WeightStore, reading
from flowrl.weights.writing import PooledWriter

TOKENS = torch.tensor([[5, 9, 2, 40]])


def moved_model(model_dir: Path) -> torch.nn.Module:
    """The model of the directory, its weights no longer those on disk."""
    lm = Qwen3ForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return lm


def logits_of(path: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(TOKENS).logits


def test_published_directory_loads_in_transformers_with_equal_logits(model_dir: Path, tmp_path: Path) -> None:
    lm = moved_model(model_dir)
    path = Publisher(lm, model_dir, WeightStore(tmp_path, 2), "float32").publish(12)
    assert path == tmp_path / "v00000012"
    assert {file.name for file in path.iterdir()} == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "model.safetensors",
    }
    with torch.no_grad():
        assert torch.equal(logits_of(path), lm(TOKENS).logits)


def test_bfloat16_version_holds_the_rounded_weights(model_dir: Path, tmp_path: Path) -> None:
    lm = moved_model(model_dir)
    path = Publisher(lm, model_dir, WeightStore(tmp_path, 2), "bfloat16").publish(1)
    assert path is not None
    published = load_file(path / "model.safetensors")
    for name, parameter in lm.named_parameters():
        assert torch.equal(published[name], parameter.to(torch.bfloat16))


def test_names_are_those_on_disk_and_tied_weights_are_written_once(model_dir: Path, tmp_path: Path) -> None:
    publisher = Publisher(moved_model(model_dir), model_dir, WeightStore(tmp_path, 2), "float32")
    path = publisher.publish(1)
    assert path is not None
    assert set(load_file(path / "model.safetensors")) == set(load_file(model_dir / "model.safetensors"))
    assert publisher.missing == ()
    assert publisher.num_bytes == (path / "model.safetensors").stat().st_size


def copy_with(model_dir: Path, target: Path, tensors: dict[str, torch.Tensor]) -> Path:
    target.mkdir()
    (target / "config.json").write_text((model_dir / "config.json").read_text())
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_weight_that_the_directory_does_not_name_is_refused(model_dir: Path, tmp_path: Path) -> None:
    tensors = load_file(model_dir / "model.safetensors")
    tensors["model.layers.1.mlp.renamed.weight"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
    renamed = copy_with(model_dir, tmp_path / "renamed", tensors)
    with pytest.raises(ValueError, match=r"no tensor 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        Publisher(moved_model(model_dir), renamed, WeightStore(tmp_path / "store", 2), "float32")


def test_weight_of_another_shape_is_refused(model_dir: Path, tmp_path: Path) -> None:
    tensors = load_file(model_dir / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(33)
    with pytest.raises(ValueError, match=r"'model\.norm\.weight' of shape \(33,\) on disk, \(32,\)"):
        reshaped = copy_with(model_dir, tmp_path / "reshaped", tensors)
        Publisher(moved_model(model_dir), reshaped, WeightStore(tmp_path / "store", 2), "float32")


def test_weights_that_the_model_lacks_are_reported(
    model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = load_file(model_dir / "model.safetensors") | {"model.extra.weight": torch.ones(2)}
    larger = copy_with(model_dir, tmp_path / "larger", tensors)
    publisher = Publisher(moved_model(model_dir), larger, WeightStore(tmp_path / "store", 2), "float32")
    assert publisher.missing == ("model.extra.weight",)
    assert "model.extra.weight" in caplog.text


def test_directory_without_safetensors_is_refused(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no safetensors file"):
        Publisher(moved_model(model_dir), tmp_path, None, "float32")


def test_fused_experts_are_published_one_by_one_as_the_disk_has_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=48, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=64, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "moe")
    lm = Qwen3MoeForCausalLM.from_pretrained(tmp_path / "moe", dtype=torch.float32)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    publisher = Publisher(lm, tmp_path / "moe", WeightStore(tmp_path / "store", 2), "float32")
    path = publisher.publish(1)
    publisher.export(tmp_path / "exported")
    publisher.close()
    assert path is not None
    names = set(load_file(path / "model.safetensors"))
    assert names == set(load_file(tmp_path / "moe" / "model.safetensors"))
    assert "model.layers.1.mlp.experts.3.up_proj.weight" in names
    for directory in (path, tmp_path / "exported"):
        with torch.no_grad():
            assert torch.equal(logits_of(directory), lm(TOKENS).logits)


def test_plan_that_names_a_tensor_wrongly_is_found_out_against_the_checkpoint(model_dir: Path, tmp_path: Path) -> None:
    lm = Qwen3ForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    Publisher(lm, model_dir, None, "float32").check_names()
    tensors = load_file(model_dir / "model.safetensors")
    one, other = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up"))
    tensors[one], tensors[other] = tensors[other], tensors[one]
    swapped = copy_with(model_dir, tmp_path / "swapped", tensors)
    with pytest.raises(WeightsError, match=r"'model\.layers\.0\.mlp\.gate_proj\.weight' would be published as"):
        Publisher(lm, swapped, None, "float32").check_names()


def test_second_version_holds_the_new_weights(model_dir: Path, tmp_path: Path) -> None:
    """Also in a file that has been used before."""
    lm = moved_model(model_dir)
    publisher = Publisher(lm, model_dir, WeightStore(tmp_path, 2), "float32")
    for version in range(6):
        with torch.no_grad():
            for parameter in lm.parameters():
                parameter.add_(1.0)
        path = publisher.publish(version)
        assert path is not None
        published = load_file(path / "model.safetensors")
        assert all(torch.equal(published[name], parameter) for name, parameter in lm.named_parameters())
        del published
    publisher.close()


def test_whoever_follows_hears_of_what_is_begun_and_what_fails(model_dir: Path, tmp_path: Path) -> None:
    said: list[object] = []
    followed = Followed(lambda version, path: said.append(("begun", version, path.is_dir())), said.append)
    lm = moved_model(model_dir)
    publisher = Publisher(lm, model_dir, WeightStore(tmp_path, 2), "float32", followed=followed)
    publisher.publish(0)
    reader = ProgressReader(tmp_path)
    assert (reader.before(0), said) == (publisher.num_bytes, [("begun", 0, True)])
    writer = publisher._writer
    assert isinstance(writer, PooledWriter) and writer._pool is not None
    write, begin = writer.write, writer._pool.begin

    def broken(*_: object) -> None:
        raise OSError("no memory")

    writer.write = broken  # type: ignore[method-assign]
    with pytest.raises(OSError, match="no memory"):
        publisher.publish(1)
    assert said[1:] == [("begun", 1, True), 1]
    writer._pool.begin = broken  # type: ignore[method-assign, assignment]
    with pytest.raises(OSError, match="no memory"):
        publisher.publish(2)
    assert said[3:] == [], "of a version that was never begun nobody has to hear that it failed"
    writer.write, writer._pool.begin = write, begin  # type: ignore[method-assign]
    assert publisher.publish(3) is not None
    with pytest.raises(ValueError, match="3 is published"):
        publisher.publish(3)
    assert publisher.publish(4) is not None
    reader.close()
    publisher.close()


def test_last_version_that_waits_for_a_reader_is_shown_in_the_end(model_dir: Path, tmp_path: Path) -> None:
    store, shown = WeightStore(tmp_path, 2), []
    publisher = Publisher(
        moved_model(model_dir), model_dir, store, "float32", on_published=lambda version, path: shown.append(version)
    )
    for version in (0, 1):
        publisher.publish(version)
    with reading(store.path(0)):
        assert publisher.publish(2) is None and shown == [0, 1]
        publisher.close()
    assert shown == [0, 1, 2] and store.versions() == [0, 1, 2]
    assert set(load_file(store.path(2) / "model.safetensors")) == set(load_file(model_dir / "model.safetensors"))


def test_directory_on_disk_needs_no_shared_memory(model_dir: Path, tmp_path: Path) -> None:
    lm = moved_model(model_dir)
    seen = []
    publisher = Publisher(
        lm, model_dir, WeightStore(tmp_path, 2), "bfloat16", is_pooled=False, on_published=lambda *one: seen.append(one)
    )
    for version in range(3):
        publisher.publish(version, pin="kept" if version == 0 else "")
    publisher.close()
    assert [version for version, _ in seen] == [0, 1, 2]
    assert WeightStore(tmp_path, 2).versions() == [1, 2]
    for path in (tmp_path / "pins" / "kept" / "v00000000", tmp_path / "v00000002"):
        published = load_file(path / "model.safetensors")
        for name, parameter in lm.named_parameters():
            assert torch.equal(published[name], parameter.to(torch.bfloat16))


def test_export_depends_on_no_other_directory(model_dir: Path, tmp_path: Path) -> None:
    lm = moved_model(model_dir)
    publisher = Publisher(lm, model_dir, None, "float32")
    publisher.export(tmp_path / "final")
    assert not any(file.is_symlink() for file in (tmp_path / "final").iterdir())
    assert json.loads((tmp_path / "final" / "config.json").read_text())["model_type"] == "qwen3"
    with torch.no_grad():
        assert torch.equal(logits_of(tmp_path / "final"), lm(TOKENS).logits)
    with pytest.raises(ValueError, match="exists already"):
        publisher.export(tmp_path / "final")
