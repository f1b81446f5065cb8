"""What becomes of requests and servers when one of several is lost: on servers that can be broken at will."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from flowrl.rollout.engine import EngineError, FinishReason, PauseMode
from flowrl.rollout.sglang.engine import SGLangEngine
from tests.rollout.conformance import request
from tests.rollout.fake_sglang import FakeServer

Scenario = Callable[[SGLangEngine, list[FakeServer], list[str]], Awaitable[None]]


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"vocab_size": 100}')
    save_file({"embed": np.zeros((4, 4), np.float32)}, tmp_path / "model.safetensors")
    return tmp_path


def with_two_servers(weights: Path, scenario: Scenario, health_every_s: float = 30.0) -> None:
    async def run() -> None:
        servers, told = [FakeServer(), FakeServer()], []
        for server in servers:
            await server.open()
        urls = [server.url for server in servers]
        engine = SGLangEngine(urls=urls, health_every_s=health_every_s, health_timeout_s=0.2, log=told.append)
        try:
            await engine.start(weights, 1)
            await asyncio.wait_for(scenario(engine, servers, told), 30)
        finally:
            await engine.close()
            for server in servers:
                await server.close()

    asyncio.run(run())


async def wait_until(is_so: Callable[[], bool]) -> None:
    while not is_so():
        await asyncio.sleep(0.02)


def test_requests_of_a_lost_server_go_to_another_and_it_returns_with_the_newest_weights(weights: Path) -> None:
    async def scenario(engine: SGLangEngine, servers: list[FakeServer], told: list[str]) -> None:
        running = [asyncio.create_task(engine.generate(request(f"r{i}", (i,), 60))) for i in range(8)]
        await wait_until(lambda: all(server.num_requests == 4 for server in servers))
        await servers[1].close()
        results = await asyncio.gather(*running)
        assert [(len(one.tokens), set(one.versions.tolist())) for one in results] == [(60, {1})] * 8
        assert servers[0].num_requests == 8 and "1 of 2 servers go on" in told[0]

        await engine.load_weights(weights, 2, PauseMode.KEEP)
        await engine.pause(PauseMode.KEEP)  # it is to come back into a pause
        servers[1].orders.clear()
        await servers[1].open()
        await wait_until(lambda: any("serves again, version 2" in line for line in told))
        assert servers[1].version == "2"
        assert servers[1].orders == ["pause_generation", "update_weights_from_disk", "pause_generation"]
        await engine.resume()
        before = servers[1].num_requests
        results = await asyncio.gather(*(engine.generate(request(f"s{i}", (50 + i,), 3)) for i in range(4)))
        assert {version for one in results for version in one.versions.tolist()} == {2}
        assert servers[1].num_requests == before + 2

    with_two_servers(weights, scenario)


def test_a_server_that_does_not_follow_an_order_serves_no_more(weights: Path) -> None:
    async def scenario(engine: SGLangEngine, servers: list[FakeServer], told: list[str]) -> None:
        servers[0].refuses = "update_weights_from_disk"
        await engine.load_weights(weights, 2, PauseMode.RECOMPUTE)
        assert engine.version == 2 and (servers[0].version, servers[1].version) == ("1", "2")
        results = await asyncio.gather(*(engine.generate(request(f"r{i}", (i,), 3)) for i in range(6)))
        assert {version for one in results for version in one.versions.tolist()} == {2}
        servers[1].refuses = "update_weights_from_disk"
        with pytest.raises(EngineError, match="must be restarted"):
            await engine.load_weights(weights, 3, PauseMode.RECOMPUTE)
        with pytest.raises(EngineError, match="must be restarted"):
            await engine.generate(request("late", (1,), 3))

    with_two_servers(weights, scenario)


def test_a_server_that_hangs_is_found_and_its_requests_are_answered_by_another(weights: Path) -> None:
    async def scenario(engine: SGLangEngine, servers: list[FakeServer], told: list[str]) -> None:
        servers[0].is_hanging = True
        results = await asyncio.gather(*(engine.generate(request(f"r{i}", (i,), 3)) for i in range(6)))
        assert [len(one.tokens) for one in results] == [3] * 6
        assert "generates nothing" in told[0]

    with_two_servers(weights, scenario, health_every_s=0.1)


def test_a_request_aborted_while_its_server_is_lost_ends_as_aborted(weights: Path) -> None:
    async def scenario(engine: SGLangEngine, servers: list[FakeServer], told: list[str]) -> None:
        await engine.pause(PauseMode.RECOMPUTE)
        await engine.resume()
        running = [asyncio.create_task(engine.generate(request(f"r{i}", (i,), 500))) for i in range(2)]
        await wait_until(lambda: all(server.num_requests == 1 for server in servers))
        await engine.pause(PauseMode.KEEP)
        await engine.abort("r1")
        await servers[1].close()
        assert (await running[1]).finish_reason is FinishReason.ABORT
        await engine.resume()
        assert len((await running[0]).tokens) == 500

    with_two_servers(weights, scenario)


def test_a_streamed_response_ends_at_its_stop_string(weights: Path) -> None:
    async def scenario(engine: SGLangEngine, servers: list[FakeServer], told: list[str]) -> None:
        engine._dispatch._decode = lambda tokens: "x" * len(tokens)
        made = await engine.generate(request("r", (1,), 5000, stop_strings=("xxxxxxx",)))
        assert made.finish_reason is FinishReason.STOP and len(made.tokens) == 7
        assert "abort_request" in servers[0].orders

    with_two_servers(weights, scenario)
