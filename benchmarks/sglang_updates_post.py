"""How `sglang_updates.py` and its sender speak to the server, each in its own environment."""

from __future__ import annotations

import json
import random
import urllib.error
import urllib.request
from typing import Any

import torch


def post(url: str, call: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        f"{url}/{call}", json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            said = json.loads(answer.read())
    except urllib.error.HTTPError as error:
        raise SystemExit(f"sglang_updates: {call}: {error.code} {error.read()[:300]!r}") from error
    if isinstance(said, dict) and said.get("success") is False:
        raise SystemExit(f"sglang_updates: {call}: {said}")
    return said


def check(url: str, model: Any) -> None:
    """The server's most likely next token, and its log-prob, are those of the Hugging Face model. The prompt is a new
    one each time: what the server remembers of an old one is of other weights."""
    prompt = random.SystemRandom().choices(range(1000), k=12)
    body = {
        "input_ids": prompt,
        "sampling_params": {"temperature": 0.0, "max_new_tokens": 1, "ignore_eos": True},
        "return_logprob": True,
    }
    ((found, token, _),) = post(url, "generate", body)["meta_info"]["output_token_logprobs"]
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([prompt])).logits[0, -1].float().log_softmax(-1)
    if abs(expected[token].item() - found) > 1e-3 or expected.max().item() - found > 1e-3:
        raise SystemExit(f"sglang_updates: the server gives {found} to token {token}, the model {expected[token]:.5f}")
