"""A forward for the common dense decoders (Llama, Qwen2, Qwen3) in few, large operations.

At decode a small model spends its time in the interpreter and in operations too small for a core. So projections of
the same input become one (their parameters become views of one tensor: weights are replaced in place as before),
heads of queries and keys are normalised and rotated together, and nothing is called that computes nothing.
Architectures that are not listed here run as transformers writes them. Before it serves, `selfcheck.py` compares either
with the model's own forward.

Shapes: T packed tokens, W wanted ones, E hidden size, H query heads, K key-value heads, D head size, I intermediate
size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm, silu
from transformers import PreTrainedModel

from flowrl.rollout.embedded.attention import Step, attend

_ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


def is_dense(model: PreTrainedModel) -> bool:
    """Whether `DenseForward` computes this model."""
    return type(model).__name__ in _ARCHITECTURES and bool(model.config.hidden_act == "silu")


@dataclass(frozen=True, eq=False)
class _Projection:
    """Linear layers of one input as one. weight (O, E), bias (O,) or None."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, parts: Sequence[nn.Linear]) -> _Projection:
        """The parameters of `parts` become views of the whole."""
        weight = _joined([part.weight for part in parts])
        biases = [part.bias for part in parts if part.bias is not None]
        assert len(biases) in (0, len(parts)), "either all of them have a bias or none"
        return cls(weight, _joined(biases) if biases else None)

    def __call__(self, states: Tensor) -> Tensor:
        return linear(states, self.weight, self.bias)


@dataclass(frozen=True, eq=False)
class _Layer:
    """norms: weight and epsilon before attention and before the MLP; head_norms: weights (D,) of queries and keys, or
    None where the architecture has none."""

    index: int
    attention_norm: Any
    mlp_norm: Any
    head_norms: tuple[Any, Any] | None
    qkv: _Projection
    out: nn.Linear
    gate_up: _Projection
    down: nn.Linear
    scaling: float
    window: int | None


class DenseForward:
    """Called like the part of a model that a step needs: packed tokens in, logits of the wanted ones out."""

    def __init__(self, model: PreTrainedModel) -> None:
        config: Any = model.config
        body: Any = model.model
        self._embed, self._rotary, self._norm = body.embed_tokens, body.rotary_emb, body.norm
        self._head: Any = model.lm_head
        self._layers = [_layer(index, one) for index, one in enumerate(body.layers)]
        self._heads, self._kv_heads = config.num_attention_heads, config.num_key_value_heads

    def __call__(self, tokens_T: Tensor, wanted_W: Tensor, step: Step) -> Tensor:
        """Logits (W, V) of the packed tokens `wanted_W`."""
        states_TE = self._embed(tokens_T[None])[0]
        cos_1TD, sin_1TD = self._rotary(states_TE, step.positions_T[None])
        half = sin_1TD.shape[2] // 2
        # Rotating by halves is x·cos + roll(x)·sin with the sign of the first half turned.
        turned_1TD = torch.cat((-sin_1TD[..., :half], sin_1TD[..., half:]), dim=-1)
        rotation = cos_1TD[0, :, None], turned_1TD[0, :, None]
        for layer in self._layers:
            states_TE = self._attend(layer, states_TE, rotation, step)
            gate_up = layer.gate_up(_normed(states_TE, layer.mlp_norm))
            gate_TI, up_TI = gate_up.chunk(2, dim=1)
            states_TE = states_TE + layer.down(silu(gate_TI).mul_(up_TI))
        logits: Tensor = self._head(_normed(states_TE[wanted_W], self._norm))
        return logits

    def _attend(self, layer: _Layer, states_TE: Tensor, rotation: tuple[Tensor, Tensor], step: Step) -> Tensor:
        heads, kv_heads = self._heads, self._kv_heads
        qkv_THD = layer.qkv(_normed(states_TE, layer.attention_norm)).unflatten(1, (heads + 2 * kv_heads, -1))
        qk_THD, value_TKD = qkv_THD[:, : heads + kv_heads], qkv_THD[:, heads + kv_heads :]
        if layer.head_norms is not None:
            query_norm, key_norm = layer.head_norms
            weight_HD = torch.cat((query_norm.weight.expand(heads, -1), key_norm.weight.expand(kv_heads, -1)))
            qk_THD = rms_norm(qk_THD, qk_THD.shape[2:], None, query_norm.variance_epsilon) * weight_HD
        cos_T1D, turned_T1D = rotation
        qk_THD = torch.addcmul(qk_THD * cos_T1D, qk_THD.roll(qk_THD.shape[2] // 2, -1), turned_T1D)
        output_THD = attend(
            layer.index, qk_THD[:, :heads], qk_THD[:, heads:], value_TKD, step, layer.scaling, layer.window
        )
        return states_TE + layer.out(output_THD.flatten(1))


def _layer(index: int, module: Any) -> _Layer:
    attention, mlp = module.self_attn, module.mlp
    return _Layer(
        index=index,
        attention_norm=module.input_layernorm,
        mlp_norm=module.post_attention_layernorm,
        head_norms=(attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else None,
        qkv=_Projection.of((attention.q_proj, attention.k_proj, attention.v_proj)),
        out=attention.o_proj,
        gate_up=_Projection.of((mlp.gate_proj, mlp.up_proj)),
        down=mlp.down_proj,
        scaling=attention.scaling,
        window=getattr(attention, "sliding_window", None),
    )


def _joined(parameters: Sequence[Tensor]) -> Tensor:
    """One tensor of all rows; each parameter becomes the view of its own."""
    whole = torch.cat([parameter.detach() for parameter in parameters])
    for parameter, part in zip(parameters, whole.split([len(one) for one in parameters]), strict=True):
        parameter.data = part
    return whole


def _normed(states: Tensor, norm: Any) -> Tensor:
    return rms_norm(states, norm.weight.shape, norm.weight, norm.variance_epsilon)
