"""Rows of a batch as packed micro-batches: one sequence of tokens, no padding. numpy in, tensors out; no model.

Shapes: B rows; N packed tokens; R trained tokens, those of a response whose mask is 1; T the most of them in a row.

The last token of a row is packed as a target only: nothing attends to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from flowrl.trainer.attention import PackedLayout
from transfer_queue.rows import RowKey, Rows

# Columns of the queue that hold one number a response token -> their names in a sample.
ROW_COLUMNS = {"token_versions": "version", "segment_proximal_logprobs": "segment"}

# Those that hold numbers of the row, or of its group.
ROW_NUMBERS = ("baseline", "scores")

# advantage; version: of the weights that sampled it; old, reference: log-probs under the policy before the update and
# under the reference; segment: under the version after its own, NaN where absent; keep: 0 where a correction leaves it
# out.
PER_TOKEN = ("advantage", "version", "old", "reference", "segment", "keep")


@dataclass(frozen=True, slots=True)
class Demonstration:
    """What supervised training sees: the response is to be imitated after the prompt."""

    prompt_tokens: np.ndarray
    response_tokens: np.ndarray


@dataclass(frozen=True, slots=True)
class Sample:
    """A row of the queue, as the policy update sees it. Arrays are views of the columns.

    advantage: of every token of the row, unless `per_token` has its own. per_token: what else an algorithm needs, one
    number a response token, by the names of `PER_TOKEN`. per_row: what an advantage is made of beside the reward, by
    the names of `ROW_NUMBERS`."""

    key: RowKey
    prompt_tokens: np.ndarray
    response_tokens: np.ndarray
    response_mask: np.ndarray
    rollout_logprobs: np.ndarray
    advantage: float
    reward: float = 0.0
    per_token: Mapping[str, np.ndarray] = field(default_factory=dict)
    per_row: Mapping[str, np.ndarray] = field(default_factory=dict)

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
    """A packed part of the batch, with what the policy loss needs beside it. advantage_BT: (B, 1) where one is for the
    whole row. columns_R: what else was asked for of the samples' `per_token`."""

    packed: Packed
    rollout_logprob_R: torch.Tensor
    advantage_BT: torch.Tensor
    columns_R: dict[str, torch.Tensor]
    keys: tuple[RowKey, ...]


def samples_from_rows(rows: Rows) -> list[Sample]:
    """A column `advantage` need not be there: then it is the trainer that computes it.

    Raises ValueError for a row whose columns do not fit each other, naming it.
    """
    columns = [rows[name] for name in ("prompt_tokens", "response_tokens", "response_mask", "rollout_logprobs")]
    scalars = [rows[name].values if name in rows else np.zeros(len(rows)) for name in ("advantage", "reward")]
    more = {per_token: rows[column] for column, per_token in ROW_COLUMNS.items() if column in rows}
    numbers = {name: rows[name] for name in ROW_NUMBERS if name in rows}
    samples = []
    for place, (key, prompt, response, mask, logprobs) in enumerate(zip(rows.keys, *columns, strict=True)):
        if len(prompt) == 0:
            raise ValueError(f"prompt_tokens: row {key} has none; a response needs a token to follow")
        if not len(response) == len(mask) == len(logprobs):
            lengths = f"{len(response)}, {len(mask)} and {len(logprobs)}"
            raise ValueError(f"response_tokens: row {key} has {lengths} tokens, mask entries, log-probs; must be equal")
        per_token = {name: _whole(column[place], len(response)) for name, column in more.items()}
        advantage, reward = (float(values[place]) for values in scalars)
        per_row = {name: column[place] for name, column in numbers.items()}
        samples.append(Sample(key, prompt, response, mask, logprobs, advantage, reward, per_token, per_row))
    return samples


def _whole(values: np.ndarray, length: int) -> np.ndarray:
    """Of an optional column: NaN for a row that came without it."""
    return values if len(values) else np.full(length, np.nan, np.float32)


def _per_token(sample: Sample, name: str) -> np.ndarray:
    """The optional one is NaN where no row of a batch came with it."""
    if name == "segment" and name not in sample.per_token:
        return np.full(len(sample.response_tokens), np.nan, np.float32)
    return sample.per_token[name]


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


def pack_samples(samples: Sequence[Sample], device: torch.device, columns: Sequence[str] = ()) -> MicroBatch:
    """columns: names of `per_token` that every sample has."""
    packed = pack(
        [sample.prompt_tokens for sample in samples],
        [sample.response_tokens for sample in samples],
        [sample.response_mask for sample in samples],
        device,
    )
    trained = np.concatenate([sample.response_mask for sample in samples]).astype(bool)

    def trained_values(rows: Sequence[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(rows)[trained].astype(np.float32)).to(device)

    if "advantage" in samples[0].per_token:
        advantage_BT = packed.table(trained_values([sample.per_token["advantage"] for sample in samples]))
    else:
        advantage_B = torch.tensor([sample.advantage for sample in samples], dtype=torch.float32)
        advantage_BT = advantage_B[:, None].to(device)
    return MicroBatch(
        packed=packed,
        rollout_logprob_R=trained_values([sample.rollout_logprobs for sample in samples]),
        advantage_BT=advantage_BT,
        columns_R={name: trained_values([_per_token(sample, name) for sample in samples]) for name in columns},
        keys=tuple(sample.key for sample in samples),
    )
