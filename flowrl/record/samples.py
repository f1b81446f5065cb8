"""Writes `samples.jsonl`: trajectories that a person can read. A few of every so many groups, text beside its score."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from flowrl.data.datasets import Example
from transfer_queue.rows import Rows

SAMPLES_OF_A_GROUP = 2


class SampleLog:
    """Appends whole lines; several writers may share the file. `every`: groups between two that are written."""

    def __init__(self, path: Path, every: int) -> None:
        self.file = path.open("a", encoding="utf-8", buffering=1)
        self.every = every

    def write(self, rows: Rows, examples: Sequence[Example], responses: Sequence[str], scores: np.ndarray) -> None:
        for key, example, response, score, versions in zip(
            rows.keys, examples, responses, scores, rows["token_versions"], strict=True
        ):
            if key.group % self.every or key.index >= SAMPLES_OF_A_GROUP:
                continue
            line = {
                "group": key.group,
                "index": key.index,
                "attempt": key.attempt,
                "versions": [int(versions[0]), int(versions[-1])],
                "prompt": example.prompt,
                "response": response,
                "ground_truth": example.ground_truth,
                "reward": float(score),
            }
            self.file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")

    def close(self) -> None:
        self.file.close()
