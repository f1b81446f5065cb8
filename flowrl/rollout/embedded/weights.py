"""Loading models, and replacing their weights in place.

A replacement is checked whole before anything is overwritten: names, shapes, nothing missing, nothing unknown. Files
are mapped, so that the only copy made is the one into the parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from flowrl.rollout.embedded.attention import SLOT_ATTENTION
from flowrl.rollout.engine import EngineError
from flowrl.weights.adapters import is_adapter, read_config
from flowrl.weights.loading import Loader
from flowrl.weights.store import weights_files


def load_model(path: Path, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """The Hugging Face directory `path`, ready for slots. EngineError if it is not a whole model, ValueError for an
    architecture that does not use the attention interface. A directory of adapters stands for its model with them."""
    if is_adapter(path):
        model = load_model(Path(read_config(path).base_model_name_or_path), device, dtype)
        replace_from_directory(model, path)
        return model
    model = _pretrained(path, dtype)
    if not model._supports_attention_backend:
        raise ValueError(f"model: {type(model).__name__} does not use transformers' attention interface")
    model.set_attn_implementation(SLOT_ATTENTION)
    module: torch.nn.Module = model
    module.to(device).eval().requires_grad_(False)
    _take_out_of_files(model)
    return model


def replace_from_directory(model: PreTrainedModel, path: Path, loader: Loader | None = None) -> None:
    """Overwrites the weights by those of `path`. loader: the model's, if there is one. EngineError, with nothing
    overwritten, if they do not fit."""
    files = weights_files(path)
    if not files:
        raise EngineError(f"weights: no *.safetensors in {path}; nothing was replaced")
    try:
        return (loader or Loader(model.state_dict(keep_vars=True))).load(path)
    except (OSError, ValueError) as error:
        if is_adapter(path):
            raise EngineError(f"{error}; nothing was replaced") from error
        # What does not fit as it lies is named below, or translated.
    with _mapped(files) as tensors:
        if _unknown(model, tensors):
            # Some architectures are stored under other names than they run with; transformers knows how to translate.
            tensors = _pretrained(path, model.dtype).state_dict()
        replace(model, tensors, str(path))


@torch.no_grad()
def replace(model: PreTrainedModel, tensors: Mapping[str, Tensor], source: str) -> None:
    """Overwrites the weights by `tensors`, named as in `model.state_dict()`. Of names that share a tensor (tied
    embeddings) one is enough. EngineError, with nothing overwritten, for missing or unknown names or other shapes."""
    problems = [f"unknown {name}" for name in _unknown(model, tensors)]
    copies: list[tuple[Tensor, Tensor]] = []
    for names, parameter in _tied_names(model):
        given = [name for name in names if name in tensors]
        if not given:
            problems.append(f"missing {names[0]}")
            continue
        tensor = tensors[given[0]]
        if tensor.shape != parameter.shape:
            problems.append(f"{given[0]} has shape {tuple(tensor.shape)}, not {tuple(parameter.shape)}")
        copies.append((parameter, tensor))
    if problems:
        listed = "; ".join(problems[:5]) + ("; …" if len(problems) > 5 else "")
        raise EngineError(f"weights of {source} are not this model's, nothing was replaced: {listed}")
    for parameter, tensor in copies:
        parameter.copy_(tensor)


@torch.no_grad()
def _take_out_of_files(model: PreTrainedModel) -> None:
    """transformers leaves tensors of the right dtype in the mapped file; a file that is mapped cannot be reused."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.detach().clone()


def _unknown(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> list[str]:
    return sorted(tensors.keys() - model.state_dict().keys())


def _tied_names(model: PreTrainedModel) -> list[tuple[list[str], Tensor]]:
    """Every distinct tensor of the state with all of its names."""
    by_storage: dict[tuple[int, torch.Size], tuple[list[str], Tensor]] = {}
    for name, tensor in model.state_dict().items():
        by_storage.setdefault((tensor.data_ptr(), tensor.shape), ([], tensor))[0].append(name)
    return list(by_storage.values())


@contextmanager
def _mapped(files: list[Path]) -> Iterator[dict[str, Tensor]]:
    """Tensors backed by the files' pages, valid while the context lasts."""
    with ExitStack() as stack:
        try:
            opened = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
            tensors = {name: file.get_tensor(name) for file in opened for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise EngineError(f"weights: {files[0].parent}: {error}; nothing was replaced") from error
        yield tensors


def _pretrained(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """EngineError unless every weight came from `path`: transformers would make up the missing ones."""
    load: Any = AutoModelForCausalLM.from_pretrained
    try:
        model, report = load(path, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise EngineError(f"model: {path} cannot be loaded: {error}") from error
    for problem in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if report.get(problem):
            names = sorted(map(str, report[problem]))
            raise EngineError(f"model: {path} is not whole: {problem.replace('_', ' ')} {', '.join(names[:5])}")
    return model
