"""Where published weights lie: on the node's tmpfs, or in a directory that all nodes see."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

from flowrl.config import Recipe

EVALUATION_PIN = "evaluate"


def weights_root(recipe: Recipe, session_dir: Path) -> Path:
    if recipe.weights.dir is None:
        return session_dir / "weights"
    return Path(recipe.weights.dir) / recipe.run.name


def serving_bytes(model_dir: Path, dtype: str) -> int:
    """Size of one published version, from the headers of the checkpoint's files. 0 where there are none yet."""
    elements = 0
    for file in model_dir.glob("*.safetensors"):
        with file.open("rb") as opened:
            (header_bytes,) = struct.unpack("<Q", opened.read(8))
            header = json.loads(opened.read(header_bytes))
        elements += sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return elements * (4 if dtype == "float32" else 2)
