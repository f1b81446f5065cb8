"""Rows of a batch as packed micro-batches: one sequence of tokens, no padding. numpy in, tensors out; no model.

Shapes: B rows; N packed tokens; R trained tokens, those of a response whose mask is 1; T the most of them in a row.

The last token of a row is packed as a target only: nothing attends to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from flowrl.trainer.attention import PackedLayout
from transfer_queue.rows import RowKey, Rows


@dataclass(frozen=True, slots=True)
class Demonstration:
    """What supervised training sees: the response is to be imitated after the prompt."""

    prompt_tokens: np.ndarray
    response_tokens: np.ndarray


@dataclass(frozen=True, slots=True)
class Sample:
    """A row of the queue, as the policy update sees it. Arrays are views of the columns."""

    key: RowKey
    prompt_tokens: np.ndarray
    response_tokens: np.ndarray
    response_mask: np.ndarray
    rollout_logprobs: np.ndarray
    advantage: float

    @property
    def num_trained_tokens(self) -> int:
        return int(np.count_nonzero(self.response_mask))


@dataclass(frozen=True, slots=True)
class Packed:
    """token_1N, position_1N: what the model reads. source_R: the packed token whose hidden state predicts target_R.
    cell_R: where a trained token stands in a (B, T) table, rows flush left, as the losses take it."""

    token_1N: torch.Tensor
    position_1N: torch.Tensor
    source_R: torch.Tensor
    target_R: torch.Tensor
    cell_R: torch.Tensor
    num_rows: int
    num_columns: int
    layout: PackedLayout

    def table(self, x_R: torch.Tensor) -> torch.Tensor:
        """x_R -> x_BT, 0 where no trained token stands."""
        empty = x_R.new_zeros(self.num_rows * self.num_columns)
        return empty.index_copy(0, self.cell_R, x_R).view(self.num_rows, self.num_columns)

    def mask_BT(self) -> torch.Tensor:
        return self.table(torch.ones_like(self.cell_R, dtype=torch.float32))


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """A packed part of the batch, with what the policy loss needs beside it. advantage_B1: one for a row."""

    packed: Packed
    rollout_logprob_R: torch.Tensor
    advantage_B1: torch.Tensor
    keys: tuple[RowKey, ...]


def samples_from_rows(rows: Rows) -> list[Sample]:
    """Raises ValueError for a row whose columns do not fit each other, naming it."""
    columns = [
        rows[name] for name in ("prompt_tokens", "response_tokens", "response_mask", "rollout_logprobs", "advantage")
    ]
    samples = []
    for key, prompt, response, mask, logprobs, advantage in zip(rows.keys, *columns, strict=True):
        if len(prompt) == 0:
            raise ValueError(f"prompt_tokens: row {key} has none; a response needs a token to follow")
        if not len(response) == len(mask) == len(logprobs):
            lengths = f"{len(response)}, {len(mask)} and {len(logprobs)}"
            raise ValueError(f"response_tokens: row {key} has {lengths} tokens, mask entries, log-probs; must be equal")
        samples.append(Sample(key, prompt, response, mask, logprobs, float(advantage[0])))
    return samples


def split_by_tokens(length_B: Sequence[int], budget: int) -> list[list[int]]:
    """Row indices of each micro-batch: longest rows first, neighbours alike in length, at most `budget` tokens each.

    A row longer than the budget is a micro-batch of its own. Equal lengths keep their order.
    """
    if budget < 1:
        raise ValueError(f"train.micro_batch_tokens: {budget}; must be at least 1")
    parts: list[list[int]] = []
    room = 0
    for index in sorted(range(len(length_B)), key=lambda index: -length_B[index]):
        if not parts or length_B[index] > room:
            parts.append([])
            room = budget
        parts[-1].append(index)
        room -= length_B[index]
    return parts


def pack(
    prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray], masks: Sequence[np.ndarray], device: torch.device
) -> Packed:
    """One sequence of all rows; positions start anew with each row."""
    prompt_length_B = np.array([len(prompt) for prompt in prompts])
    response_length_B = np.array([len(response) for response in responses])
    length_B = prompt_length_B + response_length_B - 1
    cu_length = np.concatenate([[0], np.cumsum(length_B)])
    pairs = zip(prompts, responses, strict=True)
    token_N = np.concatenate([part for prompt, response in pairs for part in (prompt, response[:-1])])
    position_N = np.arange(cu_length[-1]) - np.repeat(cu_length[:-1], length_B)
    response_start_B = np.cumsum(response_length_B) - response_length_B
    source = np.arange(response_length_B.sum()) + np.repeat(
        cu_length[:-1] + prompt_length_B - 1 - response_start_B, response_length_B
    )
    trained = np.concatenate(masks).astype(bool)
    trained_length_B = np.array([np.count_nonzero(mask) for mask in masks])
    num_columns = int(trained_length_B.max())
    trained_start_B = np.cumsum(trained_length_B) - trained_length_B
    cell = np.arange(trained_length_B.sum()) + np.repeat(
        np.arange(len(masks)) * num_columns - trained_start_B, trained_length_B
    )

    def tensor(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values.astype(np.int64)).to(device)

    return Packed(
        token_1N=tensor(token_N)[None],
        position_1N=tensor(position_N)[None],
        source_R=tensor(source[trained]),
        target_R=tensor(np.concatenate(responses)[trained]),
        cell_R=tensor(cell),
        num_rows=len(prompts),
        num_columns=num_columns,
        layout=PackedLayout(length_B, device),
    )


def pack_samples(samples: Sequence[Sample], device: torch.device) -> MicroBatch:
    packed = pack(
        [sample.prompt_tokens for sample in samples],
        [sample.response_tokens for sample in samples],
        [sample.response_mask for sample in samples],
        device,
    )
    trained = np.concatenate([sample.response_mask for sample in samples]).astype(bool)
    logprob_R = np.concatenate([sample.rollout_logprobs for sample in samples])[trained].astype(np.float32)
    advantage_B = torch.tensor([sample.advantage for sample in samples], dtype=torch.float32)
    return MicroBatch(
        packed=packed,
        rollout_logprob_R=torch.from_numpy(logprob_R).to(device),
        advantage_B1=advantage_B[:, None].to(device),
        keys=tuple(sample.key for sample in samples),
    )
