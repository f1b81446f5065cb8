"""A server that speaks as much of SGLang's HTTP API as an engine asks of it, and can die, hang and refuse. It generates
its version's number, a token every millisecond. For what engines do about servers; what servers do is tested on real
ones."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from aiohttp import web


class FakeServer:
    """Use it in one asyncio loop. `orders`: what it was told, in order. `refuses`: a route that answers with 500."""

    def __init__(self) -> None:
        self.version = "unset"
        self.orders: list[str] = []
        self.refuses = ""
        self.is_hanging = False
        self.num_requests = 0
        self._runs = asyncio.Event()
        self._runs.set()
        self._aborted: set[str] = set()
        self._port = 0
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    async def open(self) -> None:
        """On the port that it had before, if it had one."""
        app = web.Application()
        app.router.add_route("*", "/{route:.*}", self._answer)
        self._runner = web.AppRunner(app, shutdown_timeout=0.01)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port, reuse_address=True)
        await site.start()
        assert site._server is not None
        self._port = site._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Calls underway break off."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _answer(self, http: web.Request) -> web.StreamResponse:
        route = http.path.removeprefix("/")
        body: dict[str, Any] = json.loads(await http.read() or b"{}")
        if self.is_hanging:
            await asyncio.Event().wait()
        if route == self.refuses:
            return web.Response(status=500, text="no")
        if route == "generate":
            return await self._generate(http, body)
        if route == "health_generate":
            return web.Response(status=200 if self._runs.is_set() else 503)
        if route == "server_info":
            return web.json_response(_INFO)
        if route == "model_info":
            return web.json_response({"weight_version": self.version})
        self.orders.append(route)
        return self._obey(route, body)

    def _obey(self, route: str, body: dict[str, Any]) -> web.Response:
        if route == "pause_generation":
            self._runs.clear()
        elif route == "continue_generation":
            self._runs.set()
        elif route == "abort_request":
            self._aborted.add(body.get("rid", "all"))
        elif route == "update_weights_from_disk":
            assert not self._runs.is_set() and Path(body["model_path"]).exists()
            self.version = body["weight_version"]
            return web.json_response({"success": True, "message": ""})
        return web.json_response({})

    async def _generate(self, http: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        self.num_requests += 1
        tokens: list[int] = []
        reason = "length"
        response = web.StreamResponse()
        if body.get("stream"):
            await response.prepare(http)
        while len(tokens) < body["sampling_params"]["max_new_tokens"]:
            await self._runs.wait()
            await asyncio.sleep(0.001)
            if self._aborted & {body["rid"], "all"}:
                reason = "abort"
                break
            tokens.append(int(self.version))
            if body.get("stream"):
                await response.write(b"data: " + json.dumps(_part(tokens, 1, None, self.version)).encode() + b"\n\n")
        whole = _part(tokens, 0 if body.get("stream") else len(tokens), {"type": reason}, self.version)
        if not body.get("stream"):
            return web.json_response(whole)
        await response.write(b"data: " + json.dumps(whole).encode() + b"\n\ndata: [DONE]\n\n")
        return response


def _part(tokens: list[int], num_new: int, reason: dict[str, str] | None, version: str) -> dict[str, Any]:
    """Incremental: only the newest tokens, and how many there are in all."""
    entries = [(-0.5, token, None) for token in tokens[len(tokens) - num_new :]]
    spans = [{"version": version, "start": 0, "end": len(tokens)}]
    meta = {"finish_reason": reason, "output_token_logprobs": entries, "completion_tokens": len(tokens)}
    return {"meta_info": {**meta, "weight_versions": spans} if reason else meta}


_INFO = {
    "max_req_input_len": 10000,
    "device": "cpu",
    "disable_overlap_schedule": True,
    "enable_deterministic_inference": False,
    "enable_return_routed_experts": False,
    "enable_memory_saver": False,
    "enable_weights_cpu_backup": False,
}
