"""What a recipe's parts come to in the trainer's loss: each composition against the slow float64 versions."""

from __future__ import annotations

import dataclasses
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import slow_float64 as slow
import torch

from flowrl.algorithms.declarations import ALGORITHMS
from flowrl.config.presets import configured
from flowrl.trainer.objective import Objective
from flowrl.trainer.packing import Sample, pack_samples
from transfer_queue.rows import RowKey

VERSION = 7


def make_samples(seed: int = 0, num_rows: int = 6, width: int = 5) -> list[Sample]:
    """Every row as long as the table is wide, so that a packed token stands where it stands in the response."""
    draw = np.random.default_rng(seed)

    def logprobs() -> np.ndarray:
        return (-draw.exponential(0.8, width)).astype(np.float32)

    samples = []
    for row in range(num_rows):
        behave = logprobs()
        near = {name: (behave + draw.normal(0, 0.4, width)).astype(np.float32) for name in ("old", "reference")}
        segment = (behave + draw.normal(0, 0.4, width)).astype(np.float32)
        segment[1] = np.nan
        version = draw.integers(VERSION - 3, VERSION + 1, width)
        keep = (draw.random(width) < 0.7).astype(np.float32)
        samples.append(
            Sample(
                key=RowKey("train", row // 2, row % 2),
                prompt_tokens=np.ones(2, np.int32),
                response_tokens=np.ones(width, np.int32),
                response_mask=np.ones(width, np.uint8),
                rollout_logprobs=behave,
                advantage=float(draw.normal()),
                per_token={**near, "segment": segment, "version": version, "keep": keep},
            )
        )
    return samples


def column(samples: list[Sample], name: str) -> np.ndarray:
    return np.stack([sample.per_token[name] for sample in samples]).astype(np.float64)


def behaved(samples: list[Sample]) -> np.ndarray:
    return np.stack([sample.rollout_logprobs for sample in samples]).astype(np.float64)


def advantages_of(samples: list[Sample]) -> np.ndarray:
    return np.repeat([[np.float32(sample.advantage)] for sample in samples], 5, axis=1).astype(np.float64)


def found(
    samples: list[Sample], name: str, *, has_old: bool = False, **given: Any
) -> tuple[np.ndarray, np.ndarray, dict[str, torch.Tensor], np.ndarray]:
    """(losses, gradient of their sum, metrics, log-probs) of the product, log-probs near the rollout's."""
    objective = Objective(configured(name, **given), max_response_tokens=16, has_old=has_old)
    batch = pack_samples(samples, torch.device("cpu"), objective.columns)
    noise = np.random.default_rng(9).normal(0, 0.3, (len(samples), 5))
    x = (behaved(samples) + noise).astype(np.float32)
    logprob_R = torch.from_numpy(x.reshape(-1)).requires_grad_()
    loss_BT, metrics = objective.token_losses(batch, logprob_R, torch.full((x.size,), 1.5), VERSION)
    loss_BT.sum().backward()
    assert logprob_R.grad is not None
    return loss_BT.detach().numpy(), logprob_R.grad.numpy().reshape(x.shape), metrics, x.astype(np.float64)


SLOW_LOSSES = {
    "grpo": lambda *a: slow.ppo(*a, hi=0.28),
    "dr_grpo": slow.ppo,
    "dapo": slow.dapo,
    "gspo": slow.gspo,
    "cispo": slow.cispo,
    "topr": slow.topr,
    "dppo_tv": slow.dppo_tv,
    "sapo": slow.sapo,
    "gmpo": slow.geo_mean,
    "lite_ppo": lambda *a: slow.ppo(*a, c=None),
    "ppo": slow.ppo,
}


@pytest.mark.parametrize("name", sorted(SLOW_LOSSES))
def test_a_preset_has_its_loss_and_gradient(name: str) -> None:
    samples = make_samples()
    losses, gradient, _, x = found(samples, name)
    mask, old, adv = np.ones(x.shape), behaved(samples), advantages_of(samples)
    formula = SLOW_LOSSES[name]
    np.testing.assert_allclose(losses, formula(x, x, old, adv, mask), rtol=1e-4, atol=1e-5)
    expected = slow.gradient(lambda up, still: formula(up, still, old, adv, mask), x, mask, mask)
    np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mode", ["truncate", "clip", "mask"])
def test_a_correction_weighs_by_old_over_rollout(mode: str) -> None:
    samples = make_samples()
    given = {"mode": mode, "level": "geometric", "low": 0.8, "high": 1.2} if mode != "truncate" else {"mode": mode}
    losses, _, metrics, x = found(samples, "cispo", has_old=True, old="recomputed", correction=given)
    mask, old = np.ones(x.shape), column(samples, "old")
    plain = slow.cispo(x, x, old, advantages_of(samples), mask)
    bounds = (0.8, 1.2) if mode != "truncate" else (0.0, 2.0)
    w = slow.weights(old, behaved(samples), mask, given.get("level", "token"), mode, *bounds)
    np.testing.assert_allclose(losses, plain * w, rtol=1e-4, atol=1e-5)
    assert {"rollout_corr/ess", "rollout_corr/masked_fraction"} <= set(metrics)


def test_without_a_recomputing_pass_the_old_policy_is_the_current_one() -> None:
    samples = make_samples()
    losses, gradient, _, x = found(samples, "decoupled_ppo")
    w = slow.weights(x, behaved(samples), np.ones(x.shape), "token", "mask", 0.0, 5.0)
    np.testing.assert_allclose(losses, -w * advantages_of(samples), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gradient, -w * advantages_of(samples), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("correction", [None, {"mode": "mask", "low": 0.7, "high": 1.3}])
def test_decoupled_ppo_never_drops_its_weight(correction: dict[str, Any] | None) -> None:
    samples = make_samples()
    losses, _, _, x = found(samples, "decoupled_ppo", has_old=True, correction=correction)
    low, high = (0.0, np.inf) if correction is None else (0.7, 1.3)
    old, mask, adv = column(samples, "old"), np.ones(x.shape), advantages_of(samples)
    expected = slow.weighted_ppo(x, old, adv, mask, old, behaved(samples), low, high)
    np.testing.assert_allclose(losses, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(losses - slow.ppo(x, x, old, adv, mask, c=None)).max() > 0.01


def test_a_segment_is_the_stages_value_or_the_old_policys_or_the_tokens_own() -> None:
    """By age: at the current version its own; one update old, what the trainer has itself; older, what the stage wrote
    or, where that is absent, its own."""
    samples = make_samples()
    losses, _, metrics, x = found(samples, "segment_ppo", has_old=True)
    old, own, segment, version = (
        column(samples, "old"), behaved(samples), column(samples, "segment"), column(samples, "version"),
    )  # fmt: skip
    numerator = np.where(version == VERSION - 1, old, np.where(np.isnan(segment), own, segment))
    numerator = np.where(version == VERSION, own, numerator)
    mask = np.ones(x.shape)
    expected = slow.weighted_ppo(x, old, advantages_of(samples), mask, numerator, own, 0.0, 5.0)
    np.testing.assert_allclose(losses, expected, rtol=1e-4, atol=1e-5)
    absent = np.isnan(segment) & (version < VERSION - 1)
    assert float(metrics["actor/segment_absent"]) == pytest.approx(absent.mean())


def test_loglinear_lies_between_the_rollout_and_the_current_policy() -> None:
    samples = make_samples()
    losses, _, _, x = found(samples, "ppo", old="loglinear")
    own, version = behaved(samples), column(samples, "version")
    lag = VERSION - version
    alpha = np.where(lag > 0, np.clip((lag - 1) / np.maximum(lag, 1), 0, 1), 0.0)
    expected = slow.ppo(x, x, own + alpha * (x - own), advantages_of(samples), np.ones(x.shape))
    np.testing.assert_allclose(losses, expected, rtol=1e-4, atol=1e-5)


def test_opsm_leaves_out_rows_that_have_drifted_below_zero() -> None:
    samples = make_samples()
    losses, _, metrics, x = found(samples, "grpo", opsm=1e-4)
    drift = (behaved(samples) - x).mean(axis=1)
    dropped = (advantages_of(samples)[:, 0] < 0) & (drift > 1e-4)
    assert 0 < dropped.sum() < len(samples)
    assert not losses[dropped].any() and losses[~dropped].all()
    assert float(metrics["actor/opsm_dropped"]) == pytest.approx(dropped.mean())


def test_m2po_leaves_out_the_tokens_that_the_batch_chose() -> None:
    samples = make_samples()
    losses, _, _, _ = found(samples, "decoupled_ppo", has_old=True, m2po=0.04)
    plain, _, _, _ = found(samples, "decoupled_ppo", has_old=True)
    np.testing.assert_allclose(losses, plain * column(samples, "keep"), rtol=1e-6)


def test_kl_and_entropy_are_added_unclipped() -> None:
    samples = make_samples()
    kl = {"coef": 0.1, "estimator": "k2"}
    losses, _, metrics, x = found(samples, "grpo", kl=kl, entropy_coef=0.01)
    plain, _, _, _ = found(samples, "grpo")
    distance = (x - column(samples, "reference")) ** 2 / 2
    np.testing.assert_allclose(losses, plain + 0.1 * distance - 0.01 * 1.5, rtol=1e-4, atol=1e-5)
    assert float(metrics["actor/kl"]) == pytest.approx(distance.mean(), rel=1e-4)


def test_a_loss_of_the_users_own_gets_its_settings(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        textwrap.dedent("""
            def weighted(logprob_BT, old_logprob_BT, advantage_BT, mask_BT, *, scale, hi=None):
                assert hi == 0.3
                return -scale * advantage_BT * logprob_BT * mask_BT
        """)
    )
    samples = make_samples()
    losses, _, metrics, x = found(
        samples, "grpo", loss=f"{tmp_path}/mine.py:weighted", loss_settings={"scale": 2.0}, clip_high=0.3
    )
    np.testing.assert_allclose(losses, -2 * advantages_of(samples) * x, rtol=1e-5)
    assert metrics == {}


def needed(name: str) -> dict[str, Any]:
    return {"advantage_settings": {"weights": {"score": 1.0}}} if name == "gdpo" else {}


@pytest.mark.parametrize("name", sorted(set(ALGORITHMS) - {"dppo_tv", "decoupled_ppo", "segment_ppo"}))
def test_off_policy_options_scale_any_presets_losses(name: str) -> None:
    """Each by its own factor, token by token; together by the product."""
    samples = make_samples()
    plain, _, _, x = found(samples, name, has_old=True, old="recomputed", **needed(name))
    own, old, mask = behaved(samples), column(samples, "old"), np.ones((len(samples), 5))
    drifted = (advantages_of(samples)[:, :1] < 0) & ((own - x).mean(axis=1, keepdims=True) > 1e-4)
    tis = slow.weights(old, own, mask, "token", "truncate", 0.0, 2.0)
    icepop = slow.weights(old, own, mask, "token", "mask", 0.8, 1.2)
    options: list[tuple[dict[str, Any], np.ndarray]] = [
        ({"correction": {"mode": "truncate", "high": 2.0}}, tis),
        ({"correction": {"mode": "mask", "low": 0.8, "high": 1.2}}, icepop),
        ({"m2po": 0.04}, column(samples, "keep")),
        ({"opsm": 1e-4}, np.where(drifted, 0.0, 1.0)),
        (
            {"correction": {"mode": "truncate"}, "m2po": 0.04, "opsm": 1e-4},
            tis * column(samples, "keep") * np.where(drifted, 0.0, 1.0),
        ),
    ]
    for given, factor in options:
        losses, _, _, _ = found(samples, name, has_old=True, old="recomputed", **needed(name), **given)
        np.testing.assert_allclose(losses, plain * factor, rtol=1e-4, atol=1e-6)


def test_every_preset_makes_an_objective() -> None:
    for name in ALGORITHMS:
        given = needed(name)
        config = configured(name, **given)
        losses, _, _, _ = found(make_samples(), name, has_old=config.old == "recomputed", **given)
        assert np.isfinite(losses).all()


def test_a_segment_that_no_row_came_with_is_absent() -> None:
    samples = make_samples()
    bare = [
        dataclasses.replace(
            sample, per_token={name: row for name, row in sample.per_token.items() if name != "segment"}
        )
        for sample in samples
    ]
    _, _, metrics, _ = found(bare, "segment_ppo", has_old=True)
    assert float(metrics["actor/segment_absent"]) == pytest.approx((column(samples, "version") < VERSION - 1).mean())
