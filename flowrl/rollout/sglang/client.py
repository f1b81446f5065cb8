"""The calls to one SGLang server, typed. Knows addresses and JSON; knows no policy: what to call when is `engine.py`'s.

aiohttp, because one loop holds hundreds of requests open at once, and its client spends a fraction of httpx's time on
each. Field names are SGLang's; tests run against the release named in tests/sglang_cpu.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import msgspec

from flowrl.rollout.engine import EngineError

_CALL_TIMEOUT_S = 60.0
_CONNECT_TIMEOUT_S = 10.0
# The server drops a connection that was idle for 5 s. One that it drops while a request is on its way is an error that
# cannot be told from a crash, so the client drops idle ones first.
_KEEPALIVE_S = 2.0


class SamplingBody(msgspec.Struct, frozen=True, kw_only=True):
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool
    sampling_seed: int | None
    stream_interval: int | None = None


class GenerateBody(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """extra_key: requests share cached prefixes only with those of the same key. logprob_start_len -1: none of the
    prompt's."""

    rid: str
    input_ids: tuple[int, ...]
    sampling_params: SamplingBody
    extra_key: str
    return_logprob: bool
    logprob_start_len: int = -1
    stream: bool = False
    return_routed_experts: bool = False


class VersionSpan(msgspec.Struct, frozen=True):
    """Tokens [start, end) of the response were sampled by `version`, so the server says."""

    version: str
    start: int
    end: int


class Finish(msgspec.Struct, frozen=True):
    type: str


Entry = tuple[float | None, int, str | None]


class GenerateMeta(msgspec.Struct, frozen=True):
    """finish_reason: None of a part that others follow. output_token_logprobs: (log-prob, token, text) of every token
    of the part; the server writes NaN as null. completion_tokens: all up to the part's end. weight_versions: there at
    the end alone. routed_experts: base64 of int32 (tokens, layers, experts)."""

    finish_reason: Finish | None
    output_token_logprobs: list[Entry] = []
    weight_versions: list[VersionSpan] = []
    completion_tokens: int = 0
    routed_experts: str | None = None


class GenerateAnswer(msgspec.Struct, frozen=True):
    meta_info: GenerateMeta


class _Refusal(msgspec.Struct, frozen=True):
    message: str


class _Event(msgspec.Struct, frozen=True):
    """One of a stream: a part, or why there is none."""

    meta_info: GenerateMeta | None = None
    error: _Refusal | None = None


class UpdateAnswer(msgspec.Struct, frozen=True):
    success: bool
    message: str


class ModelInfo(msgspec.Struct, frozen=True):
    weight_version: str


class ServerInfo(msgspec.Struct, frozen=True):
    """max_req_input_len: no prompt may be as long. disable_overlap_schedule: no decode step is prepared ahead.
    enable_memory_saver: memory can be given back, on a GPU; enable_weights_cpu_backup: that of the weights too."""

    max_req_input_len: int
    device: str
    disable_overlap_schedule: bool
    enable_deterministic_inference: bool
    enable_return_routed_experts: bool
    enable_memory_saver: bool
    enable_weights_cpu_backup: bool


Answer = TypeVar("Answer")

_GENERATE = msgspec.json.Decoder(GenerateAnswer)
_EVENT = msgspec.json.Decoder(_Event)
_UPDATE = msgspec.json.Decoder(UpdateAnswer)
_MODEL_INFO = msgspec.json.Decoder(ModelInfo)
_SERVER_INFO = msgspec.json.Decoder(ServerInfo)


class ServerGone(EngineError):
    """A call broke off. The server ended, cannot be reached, or was cut off by who holds the client."""


class SGLangClient:
    """name: what errors call the server, log file included. Open it inside the loop that uses it."""

    def __init__(self, url: str, name: str) -> None:
        self.url = url.rstrip("/")
        self.name = name
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S),
            headers={"Content-Type": "application/json"},
        )

    async def close(self) -> None:
        """Calls underway end with EngineError."""
        await self._session.close()

    async def generate(self, body: GenerateBody) -> GenerateAnswer:
        """Waits as long as it takes. ValueError if the server refuses the request itself."""
        status, content = await self._call("POST", "/generate", body, timeout_s=None)
        if status == 400:
            raise ValueError(f"{self.name} refuses request {body.rid!r}: {_excerpt(content)}")
        return self._decode("/generate", status, content, _GENERATE)

    async def stream(self, body: GenerateBody) -> AsyncIterator[GenerateMeta]:
        """As `generate`, in parts as they come. With `incremental_streaming_output` a part has only what is new;
        without it, all so far."""
        assert body.stream, "the body must ask for a stream"
        async with self._request("POST", "/generate", body, timeout_s=None) as response:
            if response.status != 200:
                content = await response.read()
                raise ValueError(f"{self.name} refuses request {body.rid!r}: {_excerpt(content)}")
            async for line in _lines(response.content):
                data = line.removeprefix(b"data: ")
                if data in (b"", b"[DONE]"):
                    continue
                event = self._decode("/generate", 200, data, _EVENT)
                if event.meta_info is None:
                    raise ValueError(f"{self.name} refuses request {body.rid!r}: {event.error}")
                yield event.meta_info

    async def abort(self, rid: str) -> None:
        """Ends every request whose id *starts* with `rid`; one that the server has not read yet goes on."""
        await self._command("/abort_request", {"rid": rid})

    async def abort_all(self) -> None:
        await self._command("/abort_request", {"abort_all": True})

    async def pause(self, mode: str) -> None:
        """mode: in_place or retract."""
        await self._command("/pause_generation", {"mode": mode})

    async def resume(self) -> None:
        await self._command("/continue_generation", {})

    async def release_memory(self, tags: Sequence[str]) -> None:
        """tags: kv_cache, weights. Call it paused by `retract`, once: a server that runs requests dies of it."""
        await self._command("/release_memory_occupation", {"tags": tags})

    async def resume_memory(self, tags: Sequence[str]) -> None:
        """tags: those that were released; a server dies of others."""
        await self._command("/resume_memory_occupation", {"tags": tags})

    async def update_weights(self, path: Path, version: int, *, flush_cache: bool, timeout_s: float) -> None:
        """Call it paused. After an error the server may hold a mixture of old and new weights."""
        body = {
            "model_path": str(path.absolute()),
            "weight_version": str(version),
            "flush_cache": flush_cache,
            "abort_all_requests": False,
        }
        route = "/update_weights_from_disk"
        status, content = await self._call("POST", route, body, timeout_s)
        answer = self._decode(route, 200 if status == 400 else status, content, _UPDATE)
        if not answer.success:
            raise EngineError(f"{self.name} did not load {path}: {answer.message}")
        held = (await self.model_info()).weight_version
        if held != str(version):
            raise EngineError(f"{self.name} was given version {version} and says that it holds {held!r}")

    async def model_info(self) -> ModelInfo:
        status, content = await self._call("GET", "/model_info", None, _CALL_TIMEOUT_S)
        return self._decode("/model_info", status, content, _MODEL_INFO)

    async def server_info(self) -> ServerInfo:
        status, content = await self._call("GET", "/server_info", None, _CALL_TIMEOUT_S)
        return self._decode("/server_info", status, content, _SERVER_INFO)

    async def generates(self, timeout_s: float) -> bool:
        """Whether the server produces tokens: it answers from its running requests, or makes one of its own. False
        while it starts, and while it is paused. EngineError if it cannot be reached."""
        status, _ = await self._call("GET", "/health_generate", None, timeout_s)
        return status == 200

    async def _command(self, route: str, body: dict[str, Any]) -> None:
        status, content = await self._call("POST", route, body, _CALL_TIMEOUT_S)
        if status != 200:
            raise EngineError(f"{self.name} answered {route} with {status}: {_excerpt(content)}")

    async def _call(self, method: str, route: str, body: Any, timeout_s: float | None) -> tuple[int, bytes]:
        async with self._request(method, route, body, timeout_s) as response:
            return response.status, await response.read()

    @asynccontextmanager
    async def _request(
        self, method: str, route: str, body: Any, timeout_s: float | None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=_CONNECT_TIMEOUT_S)
        data = None if body is None else msgspec.json.encode(body)
        try:
            async with self._session.request(method, self.url + route, data=data, timeout=timeout) as response:
                yield response
        except TimeoutError as error:
            raise EngineError(f"{self.name} did not answer {route} within {timeout_s} s") from error
        except aiohttp.ClientError as error:
            raise ServerGone(f"{self.name} broke off at {route}: {error or type(error).__name__}") from error
        except RuntimeError as error:
            if not self._session.closed:
                raise
            raise ServerGone(f"{self.name} broke off at {route}: {error}") from error

    def _decode(self, route: str, status: int, content: bytes, decoder: msgspec.json.Decoder[Answer]) -> Answer:
        if status != 200:
            raise EngineError(f"{self.name} answered {route} with {status}: {_excerpt(content)}")
        try:
            return decoder.decode(content)
        except msgspec.DecodeError as error:
            raise EngineError(f"{self.name} answered {route} with what is not understood: {error}") from error


def _excerpt(content: bytes) -> str:
    return content[:500].decode(errors="replace")


async def _lines(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """Of any length, without their ends; the reader's own are bounded."""
    rest = b""
    async for piece in content.iter_any():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield line
