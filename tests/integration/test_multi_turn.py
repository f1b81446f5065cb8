"""Several turns in whole small runs: what tools say is in the rows, not trained on; failed episodes are given back."""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from pathlib import Path

import pytest

from flowrl.report.staleness_check import check_run
from tests.integration.runs import events, run_to_end, small_run

pytestmark = pytest.mark.timeout(240)
STEPS = 4
ROWS = STEPS * 8 * 8


def ran(tmp_path: Path, *overrides: str) -> Path:
    arguments = small_run(tmp_path, "eval=null", "model.init.max_tokens=128", *overrides, steps=STEPS)
    code, output = run_to_end(arguments, timeout_s=200, cwd=tmp_path)
    assert code == 0, output
    run = tmp_path / "runs" / "small"
    findings = check_run(run)
    assert findings.is_clean and findings.total("trained") == ROWS
    return run


@pytest.mark.slow
def test_what_tools_say_reaches_the_rows_and_is_not_trained_on(tmp_path: Path) -> None:
    """Under weight updates that abort responses, which go on from their own tokens."""
    (tmp_path / "mine.py").write_text(
        textwrap.dedent("""
            import numpy as np
            from flowrl.rollout.tools.calls import ToolCall

            def parse(text):
                return [ToolCall("look", {"word": text})]

            def look(word: str) -> str:
                \"\"\"Looks a word up.

                Args:
                    word: The word.
                \"\"\"
                return "zebra"

            class Watch:
                def __init__(self, context, settings):
                    self.file = open(context.run_dir / "seen.txt", "a", buffering=1)

                def process(self, rows):
                    for mask, logprobs, versions in zip(
                        rows["response_mask"], rows["rollout_logprobs"], rows["token_versions"], strict=True
                    ):
                        read = np.flatnonzero(mask == 0)
                        assert len(read) and mask[0] == mask[-1] == 1
                        assert not logprobs[read].any() and (logprobs[mask == 1] < 0).all()
                        self.file.write(f"{len(mask)} {len(read)}\\n")
                    return {}
        """)
    )
    watch = "{run: 'mine.py:Watch', reads: [response_mask, rollout_logprobs, token_versions], writes: []}"
    run = ran(
        tmp_path, "rollout.episode=multi_turn", "rollout.tools=['mine.py:look']", "rollout.tool_parser=mine.py:parse",
        "rollout.max_turns=3", "rollout.turn_tokens=6", "rollout.max_tokens=48", "rollout.in_flight=abort",
        f"stages.watch={watch}",
    )  # fmt: skip
    seen = [tuple(map(int, line.split())) for line in (run / "seen.txt").read_text().splitlines()]
    assert len(seen) >= ROWS and all(length <= 48 for length, _ in seen)
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert samples and all("zebra" in sample["response"] for sample in samples)


def test_failed_episodes_are_given_back_and_the_run_goes_on(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        textwrap.dedent("""
            import random

            class Game:
                def reset(self, example):
                    self.turns = 0
                    return "say something about " + example.prompt[-6:]

                async def step(self, text):
                    self.turns += 1
                    chance = random.random()
                    if chance < 0.01:
                        raise RuntimeError("the game broke")
                    if chance < 0.02:
                        return "nonsense"
                    return "go on", float("e" in text), self.turns == 2
        """)
    )
    run = ran(
        tmp_path, "rollout.episode=environment", "rollout.environment.path=mine.py:Game", "reward.name=episode",
        "warm_start=null", "rollout.turn_tokens=6", "rollout.max_tokens=48", "data.max_prompt_tokens=64",
    )  # fmt: skip
    log = events(run)
    dropped = Counter(event["reason"] for event in log if event["kind"] == "dropped")
    assert dropped and set(dropped) <= {"episode_failed:environment_error", "episode_failed:environment_garbage"}
    failed = {(event["key"][1], event["key"][3]) for event in log if event["kind"] == "dropped"}
    reserved = {(event["key"][1], event["key"][3]) for event in log if event["kind"] == "reserved"}
    assert {(group, attempt + 1) for group, attempt in failed if attempt < 2} & reserved, "prompts are tried again"
    trained = {(event["key"][1], event["key"][3]) for event in log if event["kind"] == "trained"}
    assert not trained & failed
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert max(line.get("critic/score/max", 0.0) for line in metrics) in (0.0, 1.0, 2.0)
    assert any(
        "rollout/failed/environment_error" in line or "rollout/failed/environment_garbage" in line for line in metrics
    )
