"""`flowrl export` turns a checkpoint into a directory that transformers loads, with the logits of what was trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from flowrl.cli.main import main
from flowrl.config import LoRAConfig, load, to_yaml
from flowrl.trainer.checkpoint import save
from flowrl.trainer.export import export, find
from flowrl.trainer.packing import pack
from flowrl.trainer.world import World
from tests.trainer.cases import TEMPERATURE, make_samples, make_trainer, update
from tests.trainer.ranks import run_ranks

ROOT = Path(__file__).parents[2]
SAMPLES = make_samples(8)
QUICKSTART = ROOT / "recipes" / "quickstart.yaml"


def make_run(run: Path, model_dir: Path, *overrides: str) -> Path:
    run.mkdir()
    given = ["model.init=null", f"model.path={model_dir}", f"run.dir={run.parent}", f"run.name={run.name}", *overrides]
    (run / "recipe.yaml").write_text(to_yaml(load(QUICKSTART, given)))
    return run


def export_by_command(rank: int, world_size: int, out: Path, *arguments: str) -> None:
    """In a process of its own: the export joins a world, and the tests are in one."""
    assert main(["export", *arguments]) == 0


@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=4, alpha=8.0)])
def test_exported_directory_has_the_logits_that_were_trained(
    lora: LoRAConfig | None, world: World, model_dir: Path, tmp_path: Path
) -> None:
    trainer = make_trainer(model_dir, world, lora=lora, rate=1e-2)
    for _ in range(3):
        update(trainer, SAMPLES)
    run = make_run(tmp_path / "run", model_dir, *(["model.lora={rank: 4, alpha: 8.0}"] if lora else []))
    save(run / "checkpoints", trainer, world, extra={}, keep=1)
    out = tmp_path / "exported"
    run_ranks(export_by_command, 1, tmp_path, str(run), str(out))
    prompt, response, mask = SAMPLES[0].prompt_tokens, SAMPLES[0].response_tokens, SAMPLES[0].response_mask
    packed = pack([prompt], [response], [mask], world.device)
    lm = AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        trained_R, _ = trainer.policy(packed)
        logit_LV = lm(torch.tensor([[*prompt.tolist(), *response.tolist()]])).logits[0]
    logprob_RV = (logit_LV[len(prompt) - 1 : -1] / TEMPERATURE).log_softmax(-1)
    kept = torch.from_numpy(mask.astype(bool))
    exported_R = logprob_RV[torch.arange(len(response))[kept], torch.from_numpy(response.astype("int64"))[kept]]
    torch.testing.assert_close(exported_R, trained_R, rtol=1e-4, atol=1e-5)


def test_what_is_no_checkpoint_is_refused_by_name(world: World, model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither a run nor a checkpoint"):
        find(tmp_path)
    run = make_run(tmp_path / "run", model_dir)
    with pytest.raises(ValueError, match=r"has no checkpoint; run\.checkpoint_every"):
        find(run)
    trainer = make_trainer(model_dir, world)
    inside = save(run / "checkpoints", trainer, world, extra={}, keep=1)
    assert find(inside).checkpoint == find(run).checkpoint == inside
    outside = save(tmp_path / "a" / "b", trainer, world, extra={}, keep=1)
    with pytest.raises(ValueError, match="a checkpoint outside a run"):
        find(outside)
    with pytest.raises(ValueError, match="exists already"):
        export(find(run), tmp_path)
