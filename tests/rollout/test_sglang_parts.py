"""The parts of the SGLang engine that need no SGLang: versions, command lines, the gate, the tether, broken servers."""

from __future__ import annotations

import asyncio
import base64
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import IO

import numpy as np
import psutil
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from flowrl.rollout.engine import EngineError, FinishReason, GenerateRequest, PauseMode, SamplingParams
from flowrl.rollout.sglang import keeper
from flowrl.rollout.sglang.answers import Parts, cut_at_stop, generate_body, generation
from flowrl.rollout.sglang.arguments import ServerSettings, command_line, environment, gpus_of_servers
from flowrl.rollout.sglang.checkpoint import experts_shape, misfit, read_shapes
from flowrl.rollout.sglang.client import (
    Finish,
    GenerateBody,
    GenerateMeta,
    SGLangClient,
    VersionSpan,
)
from flowrl.rollout.sglang.engine import SGLangEngine
from flowrl.rollout.sglang.flights import Admission, Flights
from flowrl.rollout.sglang.versions import token_versions

KEEPER = Path(keeper.__file__)


def request(request_id: str, *, tokens: tuple[int, ...] = (5, 6, 7), **sampling: object) -> GenerateRequest:
    params = SamplingParams(**{"max_tokens": 4, **sampling})
    return GenerateRequest(request_id=request_id, tokens=tokens, sampling=params)


# GPUs


def test_servers_share_out_the_gpus_of_their_worker() -> None:
    four = [f"cuda:{number}" for number in (4, 5, 6, 7)]
    assert gpus_of_servers(["cpu"], 2, {}) == [{}, {}]
    assert gpus_of_servers(["cuda:3"], 1, {}) == [{"base_gpu_id": 3}]
    assert gpus_of_servers(four, 4, {}) == [{"base_gpu_id": number} for number in (4, 5, 6, 7)]
    pairs = [{"base_gpu_id": first, "gpu_id_step": 1, "tp_size": 2} for first in (4, 6)]
    assert gpus_of_servers(four, 2, {}) == pairs
    assert gpus_of_servers(four, 2, {"dp_size": 2, "base_gpu_id": 0}) == [{"gpu_id_step": 1}] * 2
    assert gpus_of_servers(["cuda:0", "cuda:2"], 1, {}) == [{"base_gpu_id": 0, "gpu_id_step": 2, "tp_size": 2}]


@pytest.mark.parametrize(
    ("devices", "servers", "field"),
    [
        (["cuda:0"], 2, "rollout.servers: 2"),
        (["cuda:0", "cuda:1", "cuda:2"], 2, "rollout.servers: 2"),
        (["cuda:0", "cuda:1", "cuda:3"], 1, "pools"),
        (["cuda:1", "cuda:0"], 1, "pools"),
    ],
)
def test_gpus_that_do_not_divide_are_refused(devices: list[str], servers: int, field: str) -> None:
    with pytest.raises(ValueError, match=field):
        gpus_of_servers(devices, servers, {})


# routing and stop strings


def test_response_is_cut_at_its_first_stop_string_with_all_that_belongs_to_it() -> None:
    entries = [(-0.1 * i, i, None) for i in range(6)]
    meta = GenerateMeta(Finish("length"), entries, [VersionSpan("1", 0, 6)])
    cut = cut_at_stop(generation(meta, 1, set()), ("23",), lambda tokens: "".join(map(str, tokens)))
    assert cut.finish_reason is FinishReason.STOP and cut.tokens.tolist() == [0, 1, 2, 3]
    assert len(cut.logprobs) == len(cut.versions) == 4


def test_several_servers_share_no_log_and_no_port(tmp_path: Path) -> None:
    engine = SGLangEngine(servers=3, log_path=tmp_path / "server.log")
    assert [one.log_path.name for one in engine._settings] == ["server.log", "server.1.log", "server.2.log"]
    with pytest.raises(ValueError, match="servers"):
        SGLangEngine(servers=2, port=30000)


def test_parts_of_a_stream_add_up_whether_they_are_new_or_all_so_far() -> None:
    new, all_so_far = Parts(), Parts()
    for end, number in ((1, 1), (5, 4), (6, 1)):
        entries = [(-0.5, token, None) for token in range(end)]
        assert new.add(GenerateMeta(None, entries[end - number :], completion_tokens=end)) == number
        assert all_so_far.add(GenerateMeta(None, entries, completion_tokens=end)) == number
    assert new.tokens == all_so_far.tokens == list(range(6))
    last = GenerateMeta(Finish("length"), [(-0.5, 6, None)], [VersionSpan("1", 0, 7)], completion_tokens=7)
    assert new.add(last) == 1
    assert generation(new.whole(last), 1, set()).tokens.tolist() == list(range(7))
    with pytest.raises(ValueError, match="completion_tokens"):
        new.add(GenerateMeta(None, [(-0.5, 9, None)], completion_tokens=9))


def test_routed_experts_come_with_the_shape_of_the_model_and_are_cut_with_the_response() -> None:
    routed = np.arange(2 * 8 * 3, dtype=np.int32)  # prompt of 3, response of 6, two layers, three experts a token
    entries = [(-0.1, i, None) for i in range(6)]
    encoded = base64.b64encode(routed.tobytes()).decode()
    meta = GenerateMeta(Finish("length"), entries, [VersionSpan("1", 0, 6)], routed_experts=encoded)
    made = generation(meta, 1, set(), (2, 3))
    assert made.routed_experts is not None and made.routed_experts.shape == (8, 2, 3)
    cut = cut_at_stop(made, ("23",), lambda tokens: "".join(map(str, tokens)))
    assert np.array_equal(cut.routed_experts, made.routed_experts[:6])
    assert experts_shape({"num_hidden_layers": 2, "num_experts_per_tok": 3}) == (2, 3)
    with pytest.raises(ValueError, match="experts"):
        experts_shape({"num_hidden_layers": 2})


# versions


def test_the_step_that_was_ahead_belongs_to_the_weights_that_made_it() -> None:
    spans = [VersionSpan("5", 0, 3), VersionSpan("6", 3, 6)]
    assert token_versions(spans, 6, 5, {6}).tolist() == [5, 5, 5, 5, 6, 6]


def test_a_recomputed_boundary_is_taken_as_the_server_says_it() -> None:
    spans = [VersionSpan("5", 0, 3), VersionSpan("6", 3, 6)]
    assert token_versions(spans, 6, 5, set()).tolist() == [5, 5, 5, 6, 6, 6]


def test_a_first_token_that_was_ahead_belongs_to_the_weights_it_was_sent_to() -> None:
    assert token_versions([VersionSpan("6", 0, 3)], 3, 5, {6}).tolist() == [5, 6, 6]
    assert token_versions([VersionSpan("6", 0, 3)], 3, 6, {6}).tolist() == [6, 6, 6]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=6), st.sets(st.integers(1, 7)))
def test_no_version_is_newer_than_the_server_says(lengths: list[int], ahead: set[int]) -> None:
    ends = np.cumsum(lengths)
    spans = [
        VersionSpan(str(1 + i), int(end - size), int(end))
        for i, (end, size) in enumerate(zip(ends, lengths, strict=True))
    ]
    told = np.repeat(np.arange(1, 1 + len(lengths)), lengths)
    versions = token_versions(spans, int(ends[-1]), 1, ahead)
    assert (versions <= told).all()
    assert (np.diff(versions) >= 0).all()
    assert (versions < told).sum() <= len(ahead)


@pytest.mark.parametrize("spans", [[], [VersionSpan("1", 0, 2)], [VersionSpan("1", 1, 3)]])
def test_a_token_without_version_is_refused(spans: list[VersionSpan]) -> None:
    with pytest.raises(ValueError, match="weight_versions"):
        token_versions(spans, 3, 1, set())


def test_a_token_without_logprob_is_refused() -> None:
    meta = GenerateMeta(Finish("stop"), [(-1.0, 4, None), (None, 5, None)], [VersionSpan("1", 0, 2)])
    with pytest.raises(ValueError, match="output_token_logprobs"):
        generation(meta, 1, set())


# command line


def test_server_args_go_through_by_their_own_names(tmp_path: Path) -> None:
    args = {"tp_size": 2, "enable_metrics": True, "disable_radix_cache": False, "cuda_graph_bs_decode": [1, 2]}
    settings = ServerSettings(log_path=tmp_path / "log", server_args=args)
    words = " ".join(command_line(settings, Path("/models/tiny"), 7, 1234))
    assert "--tp-size 2" in words and "--cuda-graph-bs-decode 1 2" in words and "--enable-metrics" in words
    assert "disable-radix-cache" not in words
    assert "--model-path /models/tiny" in words and "--weight-version 7" in words and "--port 1234" in words


@pytest.mark.parametrize("name", ["port", "model_path", "weight_version", "tp-size"])
def test_arguments_that_are_not_the_users_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        ServerSettings(log_path=tmp_path / "log", server_args={name: 1})


def test_another_interpreter_does_not_see_these_packages(tmp_path: Path) -> None:
    settings = ServerSettings(log_path=tmp_path / "log", python="/other/bin/python", env={"A": "b"})
    inherited = {"PYTHONPATH": "/here", "VIRTUAL_ENV": "/here", "HOME": "/root"}
    assert environment(settings, inherited) == {"HOME": "/root", "A": "b"}


def test_without_stop_tokens_nothing_but_length_stops() -> None:
    assert generate_body(request("q"), "1:q", "k").sampling_params.ignore_eos
    assert not generate_body(request("q", stop_token_ids=(2,)), "1:q", "k").sampling_params.ignore_eos


# checkpoints


def write_checkpoint(path: Path, **shapes: tuple[int, ...]) -> None:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text('{"vocab_size": 8}')
    save_file({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, path / "model.safetensors")


def test_weights_of_another_model_are_told_apart_by_their_headers(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, embed=(8, 4), norm=(4,))
    held = read_shapes(tmp_path)
    assert held == {"embed": (8, 4), "norm": (4,)} and misfit(held, held, is_tied=False) == ""
    assert misfit({"embed": (8, 4)}, held, is_tied=False) == "missing norm"
    assert misfit({**held, "bias": (4,)}, held, is_tied=False) == "unknown bias"
    assert misfit({"embed": (8, 4), "norm": (5,)}, held, is_tied=False) == "norm has shape (5,), not (4,)"


def test_a_tied_output_embedding_need_not_be_there() -> None:
    held = {"embed": (8, 4), "lm_head.weight": (8, 4)}
    assert misfit({"embed": (8, 4)}, held, is_tied=True) == ""
    assert misfit({"embed": (8, 4)}, held, is_tied=False) == "missing lm_head.weight"


@pytest.mark.parametrize("size", [0, 5, 50, -1])
def test_a_file_cut_short_is_refused(tmp_path: Path, size: int) -> None:
    write_checkpoint(tmp_path, embed=(8, 4))
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        read_shapes(tmp_path)


# gate


def test_no_name_at_a_server_begins_another_or_comes_twice() -> None:
    async def rids() -> list[str]:
        flights = Flights()
        entered = [flights.enter(request_id) for request_id in ("q", "q1", "q10")]
        for flight in entered:
            flights.leave(flight)
        return [flight.rid for flight in [*entered, flights.enter("q1")]]

    names = asyncio.run(rids())
    assert not [(i, j) for i, a in enumerate(names) for j, b in enumerate(names) if i != j and b.startswith(a)]


def test_a_closed_gate_holds_and_an_abort_ends_what_it_holds() -> None:
    async def scenario() -> None:
        flights = Flights()
        sent = flights.enter("sent")
        flights.close_gate()
        first, second = flights.enter("first"), flights.enter("second")
        assert not first.admission.done()
        assert flights.abort("first") == []
        assert await first.admission is Admission.ABORTED
        assert flights.abort(None) == [sent]
        flights.open_gate()
        assert await second.admission is Admission.ABORTED
        with pytest.raises(ValueError, match="request_id"):
            flights.enter("sent")

    asyncio.run(scenario())


# keeper

# Starts a child that ignores SIGTERM, in the moment before it could tie itself to anybody.
PROGRAM = """
import os, signal, subprocess, sys, tempfile, time
stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", stubborn], stdout=subprocess.PIPE)
child.stdout.readline()
print(os.getpid(), child.pid, tempfile.mkdtemp(), flush=True)
time.sleep(60)
"""


def kept(parent: int, *command: str) -> list[str]:
    return [sys.executable, "-I", "-S", str(KEEPER), str(parent), *command]


def family_and_directory(output: IO[str] | None) -> tuple[list[psutil.Process], Path]:
    assert output is not None
    program, child, directory = output.readline().split()
    return [psutil.Process(int(program)), psutil.Process(int(child))], Path(directory)


def test_a_program_and_its_children_die_with_the_parent() -> None:
    starts = (
        "import os, subprocess, sys, time\n"
        "keeper, program = sys.argv[1:]\n"
        "subprocess.Popen([sys.executable, keeper, str(os.getpid()), sys.executable, '-c', program])\n"
        "time.sleep(60)"
    )
    command = [sys.executable, "-c", starts, str(KEEPER), PROGRAM]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        family, _ = family_and_directory(parent.stdout)
        parent.send_signal(signal.SIGKILL)
    assert psutil.wait_procs(family, timeout=10)[1] == []


def test_a_program_that_is_asked_to_end_leaves_no_child_and_no_file() -> None:
    command = kept(os.getpid(), sys.executable, "-c", PROGRAM)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        family, directory = family_and_directory(process.stdout)
        assert directory.is_dir()
        process.terminate()
        assert process.wait(timeout=20) == 128 + signal.SIGTERM
        assert not any(member.is_running() for member in family) and not directory.parent.exists()


def test_a_program_that_ends_passes_its_exit_code_on() -> None:
    done = subprocess.run(kept(os.getpid(), "/bin/sh", "-c", "exit 3"), timeout=20)
    assert done.returncode == 3
    missing = subprocess.run(kept(os.getpid(), "/no/such/program"), capture_output=True, text=True, timeout=20)
    assert missing.returncode == 127 and "/no/such/program" in missing.stderr


def test_nothing_is_started_for_a_parent_that_is_dead() -> None:
    done = subprocess.run(kept(os.getpid() + 1, "echo", "started"), capture_output=True, text=True, timeout=20)
    assert done.returncode != 0 and done.stdout == ""


# servers that misbehave


async def with_server(
    handler: Callable[[web.Request], Awaitable[web.StreamResponse]], scenario: Callable[[SGLangClient], Awaitable[None]]
) -> None:
    app = web.Application()
    app.router.add_route("*", "/{route:.*}", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    assert site._server is not None
    port = site._server.sockets[0].getsockname()[1]
    client = SGLangClient(f"http://127.0.0.1:{port}", "SGLang server S (log: L)")
    try:
        await scenario(client)
    finally:
        await client.close()
        await runner.cleanup()


def body() -> GenerateBody:
    return generate_body(request("q"), "1:q", "k")


def test_a_broken_connection_is_an_engine_error_that_names_server_and_log() -> None:
    async def break_off(http: web.Request) -> web.StreamResponse:
        assert http.transport is not None
        http.transport.abort()
        return web.Response()

    async def scenario(client: SGLangClient) -> None:
        with pytest.raises(EngineError, match=r"SGLang server S \(log: L\) broke off at /generate"):
            await client.generate(body())

    asyncio.run(with_server(break_off, scenario))


def test_an_update_that_names_another_version_is_an_engine_error() -> None:
    async def answer(http: web.Request) -> web.StreamResponse:
        if http.path == "/model_info":
            return web.json_response({"weight_version": "3"})
        return web.json_response({"success": True, "message": "fine"})

    async def scenario(client: SGLangClient) -> None:
        with pytest.raises(EngineError, match="given version 4 and says that it holds '3'"):
            await client.update_weights(Path("/w"), 4, flush_cache=True, timeout_s=5)

    asyncio.run(with_server(answer, scenario))


def test_an_answer_that_is_not_understood_is_an_engine_error() -> None:
    async def answer(_http: web.Request) -> web.StreamResponse:
        return web.json_response({"meta": "physical"})

    async def scenario(client: SGLangClient) -> None:
        with pytest.raises(EngineError, match="what is not understood"):
            await client.generate(body())

    asyncio.run(with_server(answer, scenario))


def test_closing_a_client_ends_its_calls() -> None:
    async def hang(_http: web.Request) -> web.StreamResponse:
        await asyncio.Event().wait()
        return web.Response()

    async def scenario(client: SGLangClient) -> None:
        call = asyncio.create_task(client.generate(body()))
        await asyncio.sleep(0.1)
        await client.close()
        with pytest.raises(EngineError, match="broke off"):
            await asyncio.wait_for(call, 5)
        with pytest.raises(EngineError, match="broke off"):
            await client.model_info()

    asyncio.run(with_server(hang, scenario))


# an engine without servers


def test_an_engine_that_was_not_started_says_so() -> None:
    async def scenario() -> None:
        engine = SGLangEngine(device="cpu")
        assert engine.version == -1
        for use in (engine.generate(request("q")), engine.pause(PauseMode.KEEP), engine.load_weights(Path("/w"), 1)):
            with pytest.raises(EngineError, match="not started"):
                await use
        await engine.close()

    asyncio.run(scenario())


def test_a_server_that_cannot_start_is_reported_with_its_last_words(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, embed=(8, 4))

    async def scenario() -> None:
        engine = SGLangEngine(python="/bin/false", device="cpu", log_path=tmp_path / "logs" / "server.log")
        with pytest.raises(EngineError, match=r"server\.log.*did not start: exit code 1"):
            await engine.start(tmp_path, 0)
        assert engine.version == -1

    asyncio.run(scenario())


def test_a_directory_that_is_no_model_is_refused_before_anything_starts(tmp_path: Path) -> None:
    engine = SGLangEngine(device="cpu", log_path=tmp_path / "server.log")
    with pytest.raises(ValueError, match=r"config\.json"):
        asyncio.run(engine.start(tmp_path, 0))
    assert not (tmp_path / "server.log").exists()


def test_finish_reasons_are_those_of_the_protocol() -> None:
    for reason in FinishReason:
        meta = GenerateMeta(Finish(reason.value), [(-0.5, 3, None)], [VersionSpan("1", 0, 1)])
        made = generation(meta, 1, set())
        assert made.finish_reason is reason and made.tokens.tolist() == [3]
        assert (made.tokens.dtype, made.logprobs.dtype, made.versions.dtype) == (np.int32, np.float32, np.int32)
