"""A task of one's own from an empty directory, and GSM8K as published, by the very same code."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import pytest

from tests.integration.runs import ROOT, command, run_to_end, sessions

pytestmark = pytest.mark.timeout(240)
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k"


def test_a_task_of_ones_own_takes_fifteen_lines(tmp_path: Path) -> None:
    """A JSONL of prompts, a reward in a file beside it, a recipe: the README's example, tried from nothing."""
    long = {"prompt": "1" * 40, "data_source": "sums", "reward_model": {"ground_truth": "1"}}
    rows = [
        {"prompt": f"{a}+{b}=", "data_source": "sums", "reward_model": {"ground_truth": str(a + b)}}
        for a in range(20)
        for b in range(20)
    ]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, long]))
    (tmp_path / "my.py").write_text(
        textwrap.dedent("""
            def score(data_source, solution_str, ground_truth, extra_info=None):
                return sum(a == b for a, b in zip(solution_str, ground_truth)) / len(ground_truth)
        """)
    )
    (tmp_path / "mine.yaml").write_text(
        textwrap.dedent(f"""
            run: {{name: sums, session_dir: {sessions(tmp_path)}}}
            model: {{path: model, init: {{layers: 1, hidden_size: 32, intermediate_size: 64}}}}
            data: {{path: sums.jsonl, held_out: 40, max_prompt_tokens: 30}}
            reward: {{path: "my.py:score"}}
            rollout: {{max_tokens: 3, group_size: 4}}
            train: {{batch_groups: 8, steps: 6, learning_rate: 1e-3}}
            eval: {{every: 3, samples: 2, temperature: 1.0}}
        """)
    )
    arguments = command(recipe=str(tmp_path / "mine.yaml"))
    code, output = run_to_end(arguments, cwd=tmp_path)
    assert code == 0, output
    summary = json.loads((tmp_path / "runs" / "sums" / "summary.json").read_text())
    assert set(summary["accuracy_by_version"]) == {"0", "3", "6"}
    assert (tmp_path / "runs" / "sums" / "model" / "model.safetensors").exists()
    metrics = (tmp_path / "runs" / "sums" / "metrics.jsonl").read_text()
    assert '"data/prompts_dropped": 1.0' in metrics


@pytest.mark.skipif(not GSM8K.exists(), reason=f"no GSM8K at {GSM8K}")
def test_gsm8k_as_published_runs_on_a_small_model(tmp_path: Path) -> None:
    arguments = command(
        f"model.path={tmp_path}/model", "model.init={max_tokens: 640}", f"data.path={GSM8K}/train.jsonl",
        f"eval.path={GSM8K}/test.jsonl", "eval.limit=8", "eval.every=2", f"run.dir={tmp_path}/runs",
        f"run.session_dir={sessions(tmp_path)}", "rollout.max_tokens=24", "rollout.group_size=4",
        "train.batch_groups=2", "train.steps=2", recipe="recipes/grpo_gsm8k.yaml",
    )  # fmt: skip
    code, output = run_to_end(arguments)
    assert code == 0, output
    summary = json.loads((tmp_path / "runs" / "grpo_gsm8k" / "summary.json").read_text())
    assert summary["steps"] == 2
    assert summary["accuracy_after"] is not None
    assert summary["max_staleness"] <= 2
