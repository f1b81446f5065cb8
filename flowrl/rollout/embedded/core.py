"""The synchronous heart of the embedded engine: requests in, one decode step at a time, finished requests out.

Owns the model, the running requests and their random streams. Knows no threads, futures or pauses: who calls `step`
decides when. Not thread-safe.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flowrl.rollout.embedded import selfcheck, weights
from flowrl.rollout.embedded.parking import ParkedWeights
from flowrl.rollout.embedded.runner import Runner
from flowrl.rollout.embedded.sampling import penalise, sample, stream_keys, uniforms
from flowrl.rollout.embedded.slots import SlotTable
from flowrl.rollout.embedded.waiting import Sequence, WaitingQueue
from flowrl.rollout.engine import Fill, FinishReason, GenerateRequest, Generation, PauseMode
from flowrl.rollout.stop_strings import Decode, ends_in_stop, load_decode
from flowrl.weights.loading import Loader

Finished = tuple[str, Generation]

_NO_INTS = np.empty(0, dtype=np.int32)
_NO_FLOATS = np.empty(0, dtype=np.float32)


class EmbeddedCore:
    """`max_batch`: requests that decode at once, the rest wait. `max_model_tokens`: prompt and response together, the
    model's own bound if None. `prefill_tokens`: prompt tokens a step. Raises EngineError for a directory that is no
    whole model, ValueError for an architecture that cannot be served."""

    def __init__(
        self,
        path: Path,
        version: int,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        max_batch: int = 256,
        max_model_tokens: int | None = None,
        prefill_tokens: int = 1024,
    ) -> None:
        self.version = version
        self._path = Path(path)
        self._model = weights.load_model(Path(path), device, getattr(torch, dtype))
        config = self._model.config.get_text_config()
        bound = config.max_position_embeddings
        self.max_model_tokens = bound if max_model_tokens is None else max_model_tokens
        if not 1 < self.max_model_tokens <= bound:
            raise ValueError(f"max_model_tokens: {max_model_tokens}; the model of {path} takes from 2 to {bound}")
        self._vocab_size = config.vocab_size
        self._max_batch = max_batch
        self._prefill_tokens = prefill_tokens
        self._runner = Runner(self._model, max_batch, self.max_model_tokens, prefill_tokens)
        self._state = self._model.state_dict(keep_vars=True)
        self._loader = Loader(self._state)
        self._slots = SlotTable(max_batch)
        self._waiting = WaitingQueue()
        self._fresh_seeds = np.random.default_rng()
        self._parked: ParkedWeights | None = None
        probe = selfcheck.probe(self._vocab_size, self.max_model_tokens)
        selfcheck.check(self._model, probe, self.generate_all([probe])[0])

    @property
    def has_work(self) -> bool:
        return self._slots.num_active > 0 or len(self._waiting) > 0

    def check(self, request: GenerateRequest) -> None:
        """ValueError for a request that can never be served."""
        length, params = len(request.tokens), request.sampling
        if not length:
            raise ValueError("tokens: empty; a prompt has at least one token")
        if length + params.max_tokens > self.max_model_tokens:
            raise ValueError(
                f"tokens, max_tokens: {length} + {params.max_tokens}; together at most {self.max_model_tokens}"
            )
        if min(request.tokens) < 0 or max(request.tokens) >= self._vocab_size:
            raise ValueError(f"tokens: token ids must be in [0, {self._vocab_size})")
        if params.stop_strings:
            _ = self._decode  # refused now if there is no tokenizer

    def submit(self, requests: Iterable[GenerateRequest]) -> None:
        """Queues checked requests."""
        requests = list(requests)
        seeds = [request.sampling.seed for request in requests]
        fresh = self._fresh_seeds.integers(1 << 62, size=len(seeds)).tolist()
        streams = stream_keys([new if seed is None else seed for seed, new in zip(seeds, fresh, strict=True)])
        for request, stream in zip(requests, streams, strict=True):
            self._waiting.add(Sequence(request, stream, _NO_INTS, _NO_FLOATS, _NO_INTS))

    @torch.inference_mode()
    def step(self) -> list[Finished]:
        """Computes one token for every decoding request and some prompts; what finished by it."""
        slots = self._slots
        n = slots.num_active
        chunks = self._waiting.plan(self._prefill_tokens, self._max_batch - n)
        logits = self._runner.forward(slots.last_token[:n], slots.position[:n], chunks)
        for chunk in chunks:
            slots.add(self._waiting.finish(chunk))
        n = slots.num_active
        if not n:
            return []
        logits = penalise(logits, slots.repetition_penalty[:n], slots.tokens, slots.count[:n])
        drawn = sample(logits, slots.sampling, uniforms(slots.stream[:n], slots.count[:n]))
        has_ended, has_stopped = slots.record(*drawn, self.version)
        self._read_for_stops(has_ended, has_stopped)
        ended = np.flatnonzero(has_ended)
        if not len(ended):
            return []
        reasons = [FinishReason.STOP if stopped else FinishReason.LENGTH for stopped in has_stopped[ended].tolist()]
        return [_finished(*one) for one in zip(self._leave(ended), reasons, strict=True)]

    @torch.inference_mode()
    def abort(self, request_id: str | None = None) -> list[Finished]:
        """Ends one request, or all, with what they have; nothing if there is none of that name."""
        rows = [
            row
            for row, sequence in enumerate(self._slots.sequences)
            if request_id is None or sequence.request.request_id == request_id
        ]
        aborted = self._leave(np.array(rows, dtype=np.int64)) + self._waiting.remove(request_id)
        return [_finished(sequence, FinishReason.ABORT) for sequence in aborted]

    def recompute(self) -> None:
        """Drops the KV of running requests: it is rebuilt, under the weights then in force, before their next token."""
        everyone = np.arange(self._slots.num_active)
        self._waiting.put_back(self._slots.remove(everyone)[0])

    def load(self, source: Path | Fill | Mapping[str, Tensor], version: int, mode: PauseMode) -> list[Finished]:
        """Replaces the weights, by a directory's, by a function's, or by tensors named as in the model's state. ABORT:
        what was ended by it. EngineError, with nothing changed, if they do not fit the model; a function's own errors.
        """
        if isinstance(source, Mapping):
            weights.replace(self._model, source, "the state given")
        elif callable(source):
            source(self._state)
        else:
            weights.replace_from_directory(self._model, source, self._loader)
        self.version = version
        self._waiting.forget_progress()
        if mode is PauseMode.RECOMPUTE:
            self.recompute()
        return self.abort() if mode is PauseMode.ABORT else []

    def release_memory(self) -> None:
        """Frees the KV cache, and a GPU's copy of the weights. Nothing else may be asked until `resume_memory`, but to
        submit and to abort."""
        self.recompute()
        self._runner.release()
        if self._model.device.type != "cpu":  # there, a copy in host memory frees nothing
            self._parked = ParkedWeights(self._model)
            torch.cuda.empty_cache()

    def resume_memory(self) -> None:
        if self._parked is not None:
            self._parked.restore()
            self._parked = None

    def generate_all(self, requests: Iterable[GenerateRequest]) -> list[Generation]:
        """Generates for all `requests` and returns in their order. For callers that drive the core alone."""
        assert not self.has_work, "generate_all needs the core to itself"
        requests = list(requests)
        for request in requests:
            self.check(request)
        self.submit(requests)
        results: dict[str, Generation] = {}
        while self.has_work:
            results.update(self.step())
        return [results[request.request_id] for request in requests]

    def _read_for_stops(self, has_ended: np.ndarray, has_stopped: np.ndarray) -> None:
        """Marks the slots whose newest token completes one of their stop strings."""
        for row, sequence in enumerate(self._slots.sequences):
            stops = sequence.request.sampling.stop_strings
            if stops and not has_stopped[row]:
                tokens = self._slots.tokens[row, : self._slots.count[row]].tolist()
                if ends_in_stop(tokens, stops, self._decode):
                    has_ended[row] = has_stopped[row] = True

    @cached_property
    def _decode(self) -> Decode:
        return load_decode(self._path)

    def _leave(self, rows: np.ndarray) -> list[Sequence]:
        longest = int(self._slots.position[: self._slots.num_active].max(initial=0))
        removed, source, target = self._slots.remove(rows)
        if len(source):
            self._runner.move(source, target, longest)
        return removed


def _finished(sequence: Sequence, reason: FinishReason) -> Finished:
    generation = Generation(
        tokens=sequence.tokens, logprobs=sequence.logprobs, versions=sequence.versions, finish_reason=reason
    )
    return sequence.request.request_id, generation
