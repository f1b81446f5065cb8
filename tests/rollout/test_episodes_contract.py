"""`flowrl check` against episodes, environments and rewards that keep the contract, and that break it in each way."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from flowrl.cli.main import main

EPISODES = """
import asyncio
import numpy as np
from flowrl.rollout.engine import FinishReason
from flowrl.rollout.episodes import Trajectory, single_turn

async def thinks_twice(context):
    transcript = context.begin()
    await context.write(transcript)
    if transcript.finish_reason is not FinishReason.ABORT:
        if context.reply(transcript, [{"role": "user", "content": "sure?"}]):
            await context.write(transcript)
    return transcript.trajectory()

async def tokenises_again(context):
    whole = await single_turn(context)
    text = context.encoder.decode(whole.tokens)
    tokens = np.array(context.encoder.encode_response(text), np.int32)[: len(whole.tokens)]
    n = len(tokens)
    return Trajectory(tokens=tokens, mask=whole.mask[:n], logprobs=whole.logprobs[:n], versions=whole.versions[:n],
                      finish_reason=whole.finish_reason)

async def invents_versions(context):
    whole = await single_turn(context)
    newer = np.full_like(whole.versions, context.engine.version + 1)
    return Trajectory(tokens=whole.tokens, mask=whole.mask, logprobs=whole.logprobs, versions=newer,
                      finish_reason=whole.finish_reason)


async def swallows_everything(context):
    try:
        return await single_turn(context)
    except Exception:
        return None


class Game:
    def reset(self, example):
        return "play"

    async def step(self, text):
        return "go on", 0.5, len(text) > 8

class Broken(Game):
    async def step(self, text):
        raise LookupError("no such level")

def score(data_source, solution_str, ground_truth, extra_info=None):
    return float(solution_str == ground_truth)

def breaks(data_source, solution_str, ground_truth, extra_info=None):
    return 1 / len(solution_str)
"""
QUICK = ("rollout.max_tokens=48", "rollout.turn_tokens=12")


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    (tmp_path / "mine.py").write_text(textwrap.dedent(EPISODES))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")

    def check(*arguments: str) -> tuple[int, list[str]]:
        code = main(["check", *arguments])
        return code, capsys.readouterr().out.splitlines()

    return check


def test_an_episode_that_keeps_the_contract_passes(check) -> None:  # type: ignore[no-untyped-def]
    code, lines = check("rollout", "mine.py:thinks_twice", *QUICK)
    assert code == 0 and len(lines) == 6, lines
    assert all(line.startswith("ok") for line in lines)
    assert "up to 2 turns" in lines[0]


@pytest.mark.parametrize(
    ("episode", "failing", "reason"),
    [
        ("tokenises_again", "gives trajectories", "the engine did not write it there"),
        ("invents_versions", "gives trajectories", "the engine did not write it there"),
        ("swallows_everything", "passes on the engine's failure", "let EngineError through"),
    ],
)
def test_an_episode_that_breaks_it_is_told_how(check, episode: str, failing: str, reason: str) -> None:  # type: ignore[no-untyped-def]
    code, lines = check("rollout", f"mine.py:{episode}", *QUICK)
    assert code == 1
    assert any(line.startswith(f"FAIL  {failing}") and reason in line for line in lines), lines


def test_an_environment_is_played(check) -> None:  # type: ignore[no-untyped-def]
    assert check("environment", "mine.py:Game", *QUICK)[0] == 0
    code, lines = check("environment", "mine.py:Broken", *QUICK)
    assert code == 1 and "environment_error" in lines[0] and "no such level" in lines[0]


def test_a_reward_is_tried_on_strange_responses(check) -> None:  # type: ignore[no-untyped-def]
    assert check("reward", "mine.py:score")[0] == 0
    code, lines = check("reward", "mine.py:breaks")
    assert code == 1 and "ZeroDivisionError" in lines[0]


def test_a_check_without_a_path_is_refused(check, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    assert main(["check", "rollout"]) == 2
    assert "path: missing" in capsys.readouterr().err
