"""SGLangEngine against real SGLang servers on a CPU: the conformance suite, and what is its own.

`make test-sglang` makes the servers' environment and runs this. One server serves most tests; the last ones start their
own, to end them.
"""

# ruff: noqa: F811 -- fixtures are imported by name, and named again where they are used

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

from flowrl.rollout.engine import EngineError, FinishReason, GenerateRequest, Generation, PauseMode
from flowrl.rollout.sglang.engine import SGLangEngine
from flowrl.weights.check import check_first_sync
from tests.rollout.conformance import (  # noqa: F401
    LONG,
    TOLERANCE,
    EngineConformance,
    Models,
    Served,
    assert_logprobs,
    engine,
    generate,
    models,
    request,
    runner,
)
from tests.rollout.reference import MAX_MODEL_TOKENS, VOCABULARY, reference_logprobs
from tests.rollout.sglang_environment import sglang_python

pytestmark = pytest.mark.sglang


@pytest.fixture(scope="module")
def make_engine(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], SGLangEngine]:
    """A few tokens more than the models were made for, because a server keeps some to itself."""
    python = sglang_python()
    log_path = tmp_path_factory.mktemp("logs") / "server.log"
    return lambda: SGLangEngine(
        python=str(python),
        device="cpu",
        server_args={"context_length": MAX_MODEL_TOKENS + 8, "max_running_requests": 32},
        env={"SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"},
        log_path=log_path,
        startup_timeout_s=110,
    )


async def start(engine: SGLangEngine, asked: list[GenerateRequest]) -> list[asyncio.Task[Generation]]:
    """Tasks of requests that have tokens already: a short request that came after them has ended."""
    tasks = [asyncio.create_task(engine.generate(one)) for one in asked]
    await engine.generate(request("pilot", (3, 4), 4))
    return tasks


class TestSGLangEngine(EngineConformance):
    has_seeds = False
    has_repetition_penalty = False

    def test_capabilities_say_that_a_cpu_server_heeds_no_seed(self, engine: Served) -> None:
        assert not engine.engine.capabilities.takes_seeds

    def test_the_longest_request_is_generated_whole(self, engine: Served) -> None:
        longest = engine.engine.capabilities.max_model_tokens
        [made] = generate(engine, [request("longest", (5,) * (longest - 3), 3)])
        assert len(made.tokens) == 3

    @pytest.mark.parametrize("token", [-1, VOCABULARY])
    def test_a_token_beyond_the_vocabulary_is_refused_and_harms_nothing(self, engine: Served, token: int) -> None:
        with pytest.raises(ValueError, match="vocabulary"):
            generate(engine, [request("unknown", (5, token), 4)])
        assert len(generate(engine, [request("known", (5, 6), 4)])[0].tokens) == 4

    def test_256_requests_run_at_once(self, engine: Served, models: Models) -> None:
        asked = [request(f"r{i}", (5, i % VOCABULARY, i // VOCABULARY), 16) for i in range(256)]
        for one, made in list(zip(asked, generate(engine, asked), strict=True))[::50]:
            assert len(made.tokens) == 16
            assert_logprobs(models.first, one.tokens, made, 1.0, slice(None))

    def test_kept_requests_name_the_weights_of_every_token_and_not_one_too_new(
        self, engine: Served, models: Models
    ) -> None:
        """The old weights explain the log-probs up to the boundary, and not beyond."""

        async def update_underway() -> None:
            asked = [request(f"r{i}", (5, 6, i), LONG) for i in range(6)]
            running = await start(engine.engine, asked)
            await engine.engine.load_weights(models.second, new, PauseMode.KEEP)
            for one, made in zip(asked, await asyncio.gather(*running), strict=True):
                boundary = int((made.versions == old).sum())
                assert made.versions.tolist() == [old] * boundary + [new] * (LONG - boundary)
                response = made.tokens.tolist()
                explained = reference_logprobs(models.first, one.tokens, response)[range(LONG), response].numpy()
                error = np.abs(made.logprobs - explained)
                assert error[:boundary].max() < TOLERANCE < error[boundary : boundary + 3].max()

        old, new = engine.engine.version, next(engine.versions)
        engine.run(update_underway())

    def test_an_abort_spares_names_that_begin_alike(self, engine: Served) -> None:
        async def abort_one() -> None:
            named, other = await start(engine.engine, [request("q1", (1, 2), LONG), request("q10", (1, 2), 300)])
            await engine.engine.abort("q1")
            assert named.done() and named.result().finish_reason is FinishReason.ABORT
            assert (await other).finish_reason is FinishReason.LENGTH

        engine.run(abort_one())

    def test_an_abort_reaches_requests_that_the_server_has_not_read_yet(self, engine: Served) -> None:
        async def abort_at_once() -> None:
            running = [asyncio.create_task(engine.engine.generate(request(f"r{i}", (1, i), LONG))) for i in range(8)]
            await asyncio.sleep(0)
            await engine.engine.abort()
            assert {task.result().finish_reason for task in running} == {FinishReason.ABORT}

        engine.run(abort_at_once())

    @pytest.mark.parametrize("mode", [PauseMode.KEEP, PauseMode.RECOMPUTE])
    def test_what_is_aborted_in_a_pause_has_ended_when_it_is_over(self, engine: Served, mode: PauseMode) -> None:
        async def abort_in_pause() -> None:
            [running] = await start(engine.engine, [request("running", (1, 2), LONG)])
            await engine.engine.pause(mode)
            late = asyncio.create_task(engine.engine.generate(request("late", (3, 4), LONG)))
            await asyncio.sleep(0)
            await engine.engine.abort("late")
            assert len((await late).tokens) == 0 and late.result().finish_reason is FinishReason.ABORT
            await engine.engine.abort("running")
            await engine.engine.check_health()
            await engine.engine.resume()
            assert running.done() and running.result().finish_reason is FinishReason.ABORT

        engine.run(abort_in_pause())

    def test_a_paused_engine_stays_paused_over_loads_and_can_still_abort(self, engine: Served, models: Models) -> None:
        async def load_in_pause() -> None:
            [running] = await start(engine.engine, [request("running", (1, 2), LONG)])
            await engine.engine.pause(PauseMode.KEEP)
            await engine.engine.load_weights(models.second, next(engine.versions), PauseMode.RECOMPUTE)
            await engine.engine.load_weights(models.first, next(engine.versions), PauseMode.RECOMPUTE)
            assert not running.done()
            await engine.engine.pause(PauseMode.ABORT)
            assert running.done() and running.result().finish_reason is FinishReason.ABORT
            await engine.engine.load_weights(models.second, next(engine.versions))
            await engine.engine.resume()
            made = await engine.engine.generate(request("fresh", (1, 2), 12))
            assert_logprobs(models.second, (1, 2), made, 1.0, slice(None))

        engine.run(load_in_pause())

    def test_a_version_that_comes_again_shares_no_prefix_with_its_former_self(
        self, engine: Served, models: Models
    ) -> None:
        async def roll_back() -> None:
            prompt = tuple(range(100))
            await engine.engine.generate(request("before", prompt, 4))
            await engine.engine.load_weights(models.second, engine.engine.version, PauseMode.KEEP)
            made = await engine.engine.generate(request("after", prompt, 12))
            assert_logprobs(models.second, prompt, made, 1.0, slice(None))

        engine.run(roll_back())

    def test_the_first_synchronisation_is_proved_and_an_engine_that_keeps_its_weights_found_out(
        self, engine: Served, models: Models, tmp_path: Path
    ) -> None:
        class Keeping:
            """Says that it has loaded."""

            generate = engine.engine.generate

            async def load_weights(self, path: Path, version: int, mode: PauseMode) -> None:
                pass

        version, scratch = engine.engine.version, tmp_path / "scratch"
        engine.run(check_first_sync(engine.engine, models.first, version, scratch, starts_anew=False))
        assert engine.engine.version == version and not scratch.exists()
        with pytest.raises(EngineError, match="computes as before after other weights were loaded"):
            engine.run(check_first_sync(Keeping(), models.first, version, scratch, starts_anew=False))

    def test_another_engine_can_take_over_a_running_server(self, engine: Served, models: Models) -> None:
        async def take_over() -> None:
            [member] = engine.engine._fleet.serving()
            second = SGLangEngine(urls=[member.client.url])
            version = next(engine.versions)
            await second.start(models.second, version)
            made = await second.generate(request("by url", (1, 2), 12))
            assert set(made.versions.tolist()) == {version} == {second.version}
            assert_logprobs(models.second, (1, 2), made, 1.0, slice(None))
            await second.close()

        engine.run(take_over())


@pytest.mark.timeout(300)
def test_after_a_failed_load_or_a_dead_server_nothing_works_until_a_restart(
    make_engine: Callable[[], SGLangEngine], models: Models
) -> None:
    async def scenario() -> None:
        others = set(psutil.Process().children(recursive=True))
        engine = make_engine()
        await engine.start(models.first, 0)
        try:
            await assert_failed_load_is_final(engine, models)
            await engine.restart(models.second, 1)
            assert engine.version == 1
            family = set(psutil.Process().children(recursive=True)) - others
            [keeper] = family & set(psutil.Process().children())
            await assert_death_is_told(engine, keeper.children()[0])
        finally:
            await engine.close()
        assert not any(process.is_running() for process in family)

    asyncio.run(scenario())


async def assert_failed_load_is_final(engine: SGLangEngine, models: Models) -> None:
    """An index that is none passes for weights until the server reads it."""
    index = models.second / "model.safetensors.index.json"
    index.write_text("nothing")
    [running] = await start(engine, [request("running", (1, 2), LONG)])
    with pytest.raises(EngineError, match="must be restarted"):
        await engine.load_weights(models.second, 1)
    index.unlink()
    for use in (running, engine.generate(request("q", (1, 2), 4)), engine.resume(), engine.abort()):
        with pytest.raises(EngineError, match="must be restarted"):
            await use


async def assert_death_is_told(engine: SGLangEngine, server: psutil.Process) -> None:
    [running] = await start(engine, [request("running", (1, 2), LONG)])
    await engine.pause(PauseMode.KEEP)
    waiting = asyncio.create_task(engine.generate(request("waiting", (1, 2), 4)))
    await asyncio.sleep(0)
    server.send_signal(signal.SIGKILL)
    for use in (running, waiting):
        with pytest.raises(EngineError, match=r"SGLang server http://127.*server\.log"):
            await asyncio.wait_for(use, 20)
    with pytest.raises(EngineError, match=r"ended: exit code 137"):
        await engine.generate(request("later", (1, 2), 4))


def test_no_server_outlives_the_process_that_started_it(
    make_engine: Callable[[], SGLangEngine], models: Models, tmp_path: Path
) -> None:
    program = (
        "import asyncio, pathlib, sys\n"
        "from flowrl.rollout.sglang.engine import SGLangEngine\n"
        "engine = SGLangEngine(python=sys.argv[1], device='cpu', log_path=pathlib.Path(sys.argv[3]))\n"
        "asyncio.run(engine.start(pathlib.Path(sys.argv[2]), 0))"
    )
    command = [sys.executable, "-c", program, str(sglang_python()), str(models.first), str(tmp_path / "server.log")]
    with subprocess.Popen(command, cwd=Path(__file__).resolve().parents[2]) as starter:
        family = wait_for_family(starter.pid, at_least=4)
        starter.kill()
    assert psutil.wait_procs(family, timeout=20)[1] == []


def wait_for_family(pid: int, at_least: int) -> list[psutil.Process]:
    """The processes under `pid`, once there are so many: the keeper, the server, and what it starts when half ready."""
    deadline = time.monotonic() + 60
    while len(family := psutil.Process(pid).children(recursive=True)) < at_least:
        assert time.monotonic() < deadline, f"process {pid} started only {family}"
        time.sleep(0.2)
    return family
