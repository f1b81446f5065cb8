"""Whether the weights of a directory are those of the model that a server holds. Reads headers alone, without torch.

A server skips names that it does not know, keeps what it is not given, and dies of a file cut short. None of that may
happen while it serves, so all of it is found out before the server is told of the directory.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

Shapes = Mapping[str, tuple[int, ...]]

_LENGTH = struct.Struct("<Q")
_NUM_NAMED = 5


class _Entry(msgspec.Struct, frozen=True):
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


_HEADER = msgspec.json.Decoder(dict[str, msgspec.Raw])


def read_config(path: Path) -> dict[str, Any]:
    """The config of a Hugging Face directory. ValueError if it has none."""
    file = path / "config.json"
    if not file.is_file():
        raise ValueError(f"path: {path}; a Hugging Face directory has a config.json")
    return msgspec.json.decode(file.read_bytes(), type=dict[str, Any])


def vocab_size(config: Mapping[str, Any]) -> int:
    """A model of several parts has it in its text part."""
    return int(config.get("text_config", config)["vocab_size"])


def experts_shape(config: Mapping[str, Any]) -> tuple[int, int]:
    """(layers, experts a token) of a mixture of experts. ValueError for any other model."""
    text = config.get("text_config", config)
    if "num_experts_per_tok" not in text:
        raise ValueError("routed_experts: True; the model's config has no num_experts_per_tok")
    return int(text["num_hidden_layers"]), int(text["num_experts_per_tok"])


def read_shapes(path: Path) -> Shapes:
    """Names and shapes of all tensors in a directory's safetensors files. ValueError if there is none or one is cut."""
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ValueError(f"path: {path}; no *.safetensors in it")
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        shapes |= _file_shapes(file)
    return shapes


def misfit(offered: Shapes, held: Shapes, is_tied: bool) -> str:
    """What is wrong with `offered` for a server that was started on `held`; empty if nothing is. is_tied: the output
    embedding is the input embedding, and need not be there twice."""
    missing = held.keys() - offered.keys()
    if is_tied:
        missing -= {"lm_head.weight"}
    problems = [f"missing {name}" for name in sorted(missing)]
    for name, shape in sorted(offered.items()):
        if name not in held:
            problems.append(f"unknown {name}")
        elif shape != held[name]:
            problems.append(f"{name} has shape {shape}, not {held[name]}")
    return "; ".join(problems[:_NUM_NAMED]) + ("; …" if len(problems) > _NUM_NAMED else "")


def _file_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    with file.open("rb") as opened:
        prefix = opened.read(_LENGTH.size)
        size = _LENGTH.unpack(prefix)[0] if len(prefix) == _LENGTH.size else 0
        header = opened.read(size)
    if not header or len(header) < size:
        raise ValueError(f"path: {file}; cut short in its header")
    raw = _HEADER.decode(header)
    entries = {name: msgspec.json.decode(entry, type=_Entry) for name, entry in raw.items() if name != "__metadata__"}
    expected = _LENGTH.size + size + max((entry.data_offsets[1] for entry in entries.values()), default=0)
    if file.stat().st_size != expected:
        raise ValueError(f"path: {file}; {file.stat().st_size} bytes, and {expected} by its header")
    return {name: entry.shape for name, entry in entries.items()}
