"""docs/stages.md, followed to the letter: its two stages run and do what it says."""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path

import pytest

from tests.integration.runs import ROOT, command, run_to_end, sessions

LINES_FOR_TWO_STAGES = 30


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_pages_stages_run_as_written(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "stages.md").read_text()
    for language, text in re.findall(r"```(python|yaml)\n(.*?)```", page, flags=re.DOTALL):
        name = re.match(r"# (\S+)\n", text)
        assert name is not None, f"every {language} block of the page begins with its file's name"
        (tmp_path / name[1]).write_text(text)
    assert len((tmp_path / "my_stages.py").read_text().splitlines()) < LINES_FOR_TWO_STAGES
    rows = [{"prompt": f"{a}+{a}=", "data_source": "s", "reward_model": {"ground_truth": str(a)}} for a in range(10)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "my.py").write_text(
        "def score(data_source, solution_str, ground_truth, extra_info=None):\n    return 0.5\n"
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
    code, output = run_to_end(command(recipe=str(tmp_path / "brief.yaml")), timeout_s=180, cwd=tmp_path)
    assert code == 0, output
    updates = [
        line
        for text in (tmp_path / "runs" / "brief" / "metrics.jsonl").read_text().splitlines()
        if "critic/advantages/max" in (line := json.loads(text))
    ]
    assert len(updates) == 3
    # The reward is one for all, so what differs within a group is brevity alone: 0.01 for each token of at most 6.
    widest = max(line["critic/advantages/max"] - line["critic/advantages/min"] for line in updates)
    assert 0 < widest <= 0.01 * 6 + 1e-6
