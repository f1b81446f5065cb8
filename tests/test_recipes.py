"""Every recipe that ships says something that can be built, on one node and on two."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowrl import pipeline
from flowrl.config import load

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


@pytest.mark.parametrize("num_nodes", [1, 2])
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_builds(path: Path, num_nodes: int, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("{}\n")
    (tmp_path / "model").mkdir()
    overrides = [f"model.path={tmp_path / 'model'}"]
    if "gsm8k" in path.stem:
        overrides += [f"data.path={data}", f"eval.path={data}"]
    recipe = load(path, overrides)
    built = pipeline.build(recipe, num_nodes)
    names = [stage.name for stage in built.graph]
    assert names.index("rollout") < names.index("reward") < names.index("train")
    if not recipe.algorithm.estimates_in_trainer:
        assert names.index("reward") < names.index("advantage") < names.index("train")
    assert {plan.node for plan in built.workers if plan.worker == "rollout"} == set(range(num_nodes))
