"""A published version is a Hugging Face directory, under the names that the checkpoint on disk has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3ForCausalLM

from flowrl.weights.publish import Publisher
from flowrl.weights.store import WeightStore

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
