"""docs/stages.md, followed to the letter: its stages run and do what it says."""

from __future__ import annotations

import json
import re
import sys
import textwrap
from pathlib import Path

import pytest

from tests.integration.runs import ROOT, command, run_to_end, sessions

LINES_FOR_TWO_STAGES = 30
pytestmark = pytest.mark.timeout(240)


def page_run(
    tmp_path: Path, recipe: str, *overrides: str, score: str = "0.5 + len(solution_str) % 3"
) -> list[dict[str, float]]:
    """The metrics of three updates of the page's recipe of that name, with its files and a `mine.yaml` beside it."""
    page = (ROOT / "docs" / "stages.md").read_text()
    for language, text in re.findall(r"```(python|yaml)\n(.*?)```", page, flags=re.DOTALL):
        name = re.match(r"# (\S+)\n", text)
        assert name is not None, f"every {language} block of the page begins with its file's name"
        (tmp_path / name[1]).write_text(text)
    rows = [{"prompt": f"{a}+{a}=", "data_source": "s", "reward_model": {"ground_truth": str(a)}} for a in range(10)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "my.py").write_text(
        f"def score(data_source, solution_str, ground_truth, extra_info=None):\n    return {score}\n"
    )
    (tmp_path / "mine.yaml").write_text(
        textwrap.dedent(f"""
            run: {{name: brief, session_dir: {sessions(tmp_path)}}}
            model: {{path: model, init: {{layers: 1, hidden_size: 32, intermediate_size: 64}}}}
            data: {{path: sums.jsonl}}
            reward: {{path: "my.py:score"}}
            rollout: {{max_tokens: 6, group_size: 4}}
            train: {{batch_groups: 4, steps: 3, learning_rate: 1e-3}}
        """)
    )
    code, output = run_to_end(command(*overrides, recipe=str(tmp_path / recipe)), timeout_s=180, cwd=tmp_path)
    assert code == 0, output
    return [
        line
        for text in (tmp_path / "runs" / "brief" / "metrics.jsonl").read_text().splitlines()
        if "critic/advantages/max" in (line := json.loads(text))
    ]


@pytest.mark.slow
def test_the_pages_stages_run_as_written(tmp_path: Path) -> None:
    updates = page_run(tmp_path, "brief.yaml", score="0.5")
    assert len((tmp_path / "my_stages.py").read_text().splitlines()) < LINES_FOR_TWO_STAGES
    assert len(updates) == 3
    # The reward is one for all, so what differs within a group is brevity alone: 0.01 for each token of at most 6.
    widest = max(line["critic/advantages/max"] - line["critic/advantages/min"] for line in updates)
    assert 0 < widest <= 0.01 * 6 + 1e-6


@pytest.mark.slow
def test_the_pages_stage_of_batches_runs_as_written(tmp_path: Path) -> None:
    updates = page_run(tmp_path, "scaled.yaml")
    assert len(updates) == 3
    for line in updates:
        assert abs(line["critic/advantages/mean"]) < 1e-5
        assert line["critic/advantages/min"] < 0 < line["critic/advantages/max"]


def test_a_stage_of_batches_gets_whole_updates_once_on_two_ranks_and_is_not_needed_for_a_replay(tmp_path: Path) -> None:
    (tmp_path / "my_count.py").write_text(
        "from transfer_queue.rows import Column\n\n\n"
        "class Count:\n"
        "    def __init__(self, context, settings):\n"
        "        self.calls = 0\n\n"
        "    def process(self, rows):\n"
        "        assert list(rows.columns) == ['reward'] and list(rows.keys) == sorted(rows.keys)\n"
        "        self.calls += 1\n"
        "        return {'advantage': Column.scalars([100 * self.calls + len(rows)] * len(rows), 'float32')}\n"
    )
    overrides = ["pools.train.workers=2", "stages.advantage.run=my_count.py:Count"]
    updates = page_run(tmp_path, "scaled.yaml", *overrides)
    assert [line["critic/advantages/min"] for line in updates] == [116, 216, 316]
    assert [line["critic/advantages/max"] for line in updates] == [116, 216, 316]
    run, again = tmp_path / "runs" / "brief", tmp_path / "again"
    code, output = run_to_end([sys.executable, "-m", "flowrl", "replay", str(run), "--out", str(again)], cwd=tmp_path)
    assert code == 0 and "3 updates replayed on 2 ranks" in output, output
