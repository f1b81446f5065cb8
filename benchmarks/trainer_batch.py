"""The batch and the model that the trainer's benchmark gives to every contestant. Needs numpy alone, but for the model.

Lengths of responses are log-normal, as they are in reinforcement learning: most are short, a few are very long, and
rows come in no order. `old` are log-probs that the sampler would have reported.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

LEARNING_RATE = 1e-5
CLIP_LOW, CLIP_HIGH = 0.2, 0.28
GRAD_CLIP = 1.0


@dataclass(frozen=True)
class Batch:
    prompts: list[np.ndarray]
    responses: list[np.ndarray]
    old: list[np.ndarray]
    advantages: np.ndarray

    @property
    def num_tokens(self) -> int:
        """Of prompts and responses, without padding: what tokens/s counts for everybody."""
        return sum(map(len, self.prompts)) + sum(map(len, self.responses))

    @property
    def padded_share(self) -> float:
        """Padding in a rectangle of all rows, as a share of it."""
        longest = max(map(len, self.prompts)) + max(map(len, self.responses))
        return 1 - self.num_tokens / (len(self.prompts) * longest)


def make_batch(rows: int, median: int, sigma: float, longest: int, vocabulary: int, seed: int) -> Batch:
    """median, sigma, longest: of response lengths, in tokens. Prompts have 16 to 48 tokens."""
    draw = np.random.default_rng(seed)
    lengths = np.minimum(longest, np.maximum(1, np.exp(draw.normal(np.log(median), sigma, rows)))).astype(int)
    responses = [draw.integers(3, vocabulary, length) for length in lengths]
    return Batch(
        prompts=[draw.integers(3, vocabulary, length) for length in draw.integers(16, 49, rows)],
        responses=responses,
        old=[(0.1 * draw.normal(size=length) - np.log(vocabulary)).astype(np.float32) for length in lengths],
        advantages=draw.normal(size=rows).astype(np.float32),
    )


def save_batch(batch: Batch, path: Path) -> None:
    lengths = np.array(
        [[len(prompt), len(response)] for prompt, response in zip(batch.prompts, batch.responses, strict=True)]
    )
    np.savez(
        path,
        lengths=lengths,
        prompts=np.concatenate(batch.prompts),
        responses=np.concatenate(batch.responses),
        old=np.concatenate(batch.old),
        advantages=batch.advantages,
    )


def load_batch(path: Path) -> Batch:
    archive = np.load(path)
    prompt_ends, response_ends = np.cumsum(archive["lengths"], axis=0)[:-1].T
    return Batch(
        prompts=np.split(archive["prompts"], prompt_ends),
        responses=np.split(archive["responses"], response_ends),
        old=np.split(archive["old"], response_ends),
        advantages=archive["advantages"],
    )


def make_model(path: Path, vocabulary: int, hidden: int, layers: int) -> None:
    """A Qwen3 of random weights, and a tokenizer that TRL insists on and nobody uses."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 128),
        head_dim=64,
        intermediate_size=3 * hidden,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    Qwen3ForCausalLM(config).save_pretrained(path)
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {f"w{number}": number for number in range(3, vocabulary)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")), pad_token="<pad>", eos_token="<eos>"
    )
    tokenizer.save_pretrained(path)
