"""Every column of the queue, once: its type, how long it is, what it means. Stages and recipes name columns."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ColumnSpec:
    """`per`: 'row' is one value a row, otherwise a vector as long as what it names."""

    name: str
    dtype: str
    per: str
    meaning: str


COLUMNS = {
    spec.name: spec
    for spec in (
        ColumnSpec("data_index", "int64", "row", "row of the data set that the prompt came from"),
        ColumnSpec("prompt_tokens", "int32", "prompt token", "the prompt as the engine saw it"),
        ColumnSpec("response_tokens", "int32", "response token", "what came after, tool output included"),
        ColumnSpec("response_mask", "uint8", "response token", "1 where the model wrote the token"),
        ColumnSpec("rollout_logprobs", "float32", "response token", "log-prob at sampling, by the engine"),
        ColumnSpec("token_versions", "int32", "response token", "weights that sampled the token, by the engine"),
        ColumnSpec("finish_reason", "uint8", "row", "0 stop, 1 length, 2 abort"),
        ColumnSpec("episode_reward", "float32", "row", "the episode's own score; only with reward.name=episode"),
        ColumnSpec(
            "greedy_tokens",
            "int32",
            "greedy response token",
            "the prompt's greedy answer, on the first row of a group, empty on the others; only with remax",
        ),
        ColumnSpec(
            "routed_experts",
            "int16",
            "layer and expert of a token",
            "of all tokens but the last, prompt first; -1 unknown; only with rollout.routed_experts",
        ),
        ColumnSpec("reward", "float32", "row", "score of the trajectory"),
        ColumnSpec(
            "baseline",
            "float32",
            "greedy response",
            "score of the greedy answer, on the first row of a group, empty on the others; only with remax",
        ),
        ColumnSpec("scores", "float32", "name in `weights`", "the scores that gdpo weighs; only with gdpo"),
        ColumnSpec("is_untied", "uint8", "row", "1: its group's rewards differ; only with rollout.filter_tied"),
        ColumnSpec(
            "segment_proximal_logprobs",
            "float32",
            "response token",
            "log-prob under the version after the one that sampled it; NaN where absent",
        ),
        ColumnSpec("advantage", "float32", "row", "advantage, equal for all tokens of the row"),
    )
}
