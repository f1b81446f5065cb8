"""Each policy loss, in value and gradient, against float64 loops and finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import slow_float64 as slow
import torch

from flowrl.algorithms import losses
from flowrl.algorithms.losses import PolicyLoss
from flowrl.algorithms.registry import LOSSES

CASES: list[tuple[str, Callable[..., Any], dict[str, Any]]] = [
    ("ppo", slow.ppo, {}),
    ("ppo", slow.ppo, {"lo": 0.1, "hi": 0.3, "c": 1.5}),
    ("ppo", slow.ppo, {"c": None}),
    ("dapo", slow.dapo, {}),
    ("gspo", slow.gspo, {}),
    ("gspo", slow.gspo, {"lo": 0.2, "hi": 0.2}),
    ("cispo", slow.cispo, {}),
    ("cispo", slow.cispo, {"lo": None}),
    ("topr", slow.topr, {}),
    ("dppo_tv", slow.dppo_tv, {}),
    ("dppo_tv", slow.dppo_tv, {"lo": 0.05, "hi": 0.02, "c": 1.2}),
    ("sapo", slow.sapo, {}),
    ("sapo", slow.sapo, {"tau_pos": 2.0, "tau_neg": 0.5}),
    ("geo_mean", slow.geo_mean, {}),
    ("geo_mean", slow.geo_mean, {"lo": 0.1, "hi": 0.2}),
]
PLAIN = sorted({name for name, _, _ in CASES})


def tokens(seed: int, rows: int = 4, width: int = 6, spread: float = 0.5) -> dict[str, np.ndarray]:
    """Log-probs with holes in the mask, values that float32 holds exactly; A is of both signs, one for each row."""
    rng = np.random.default_rng(seed)
    x = -rng.exponential(0.8, (rows, width)).astype(np.float32).astype(np.float64)
    old = np.minimum(x + rng.normal(0, spread, x.shape), -1e-3).astype(np.float32).astype(np.float64)
    adv = np.repeat(rng.normal(0, 1, (rows, 1)), width, axis=1).astype(np.float32).astype(np.float64)
    mask = (rng.random(x.shape) > 0.3).astype(np.float64)
    return {"x": x, "old": old, "adv": adv, "mask": mask}


def run(name: str, case: dict[str, np.ndarray], **settings: Any) -> tuple[PolicyLoss, torch.Tensor]:
    x_BT = torch.tensor(case["x"], dtype=torch.float32, requires_grad=True)
    old_BT, adv_BT, mask_BT = (torch.tensor(case[key], dtype=torch.float32) for key in ("old", "adv", "mask"))
    return LOSSES[name](x_BT, old_BT, adv_BT, mask_BT, **settings), x_BT


def three_policies(case: dict[str, np.ndarray], seed: int) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(seed + 100)
    shape = case["x"].shape
    return {
        key: torch.tensor(case["old"] + rng.normal(0, 0.8, shape), dtype=torch.float32) for key in ("behave", "segment")
    }


@pytest.mark.parametrize(("name", "reference", "settings"), CASES)
def test_value_and_gradient_agree_with_float64(name: str, reference: Callable[..., Any], settings: dict) -> None:
    for seed in range(3):
        case = tokens(seed)
        loss, x_BT = run(name, case, **settings)
        expected = reference(case["x"], case["x"], case["old"], case["adv"], case["mask"], **settings)
        np.testing.assert_allclose(loss.loss_BT.detach().numpy(), expected, rtol=2e-5, atol=2e-6)

        cotangent = np.random.default_rng(seed + 7).normal(size=expected.shape)
        loss.loss_BT.backward(torch.tensor(cotangent, dtype=torch.float32))

        def slow_loss(x: np.ndarray, frozen: np.ndarray, case: dict = case) -> np.ndarray:
            return reference(x, frozen, case["old"], case["adv"], case["mask"], **settings)

        slope = slow.gradient(slow_loss, case["x"], case["mask"], cotangent)
        np.testing.assert_allclose(x_BT.grad.numpy(), slope, rtol=2e-4, atol=2e-5)


def test_topr_token_level_weighs_each_token() -> None:
    case = tokens(5)
    loss, _ = run("topr", case, level="token")
    expected = slow.topr_token(case["x"], case["x"], case["old"], case["adv"], case["mask"])
    np.testing.assert_allclose(loss.loss_BT.detach().numpy(), expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", ["decoupled_ppo", "segment_ppo"])
def test_three_policy_losses_agree_with_float64(name: str) -> None:
    for seed in range(3):
        case = tokens(seed)
        extra = three_policies(case, seed)
        given = {"behave_logprob_BT": extra["behave"]}
        numerator = case["old"]
        if name == "segment_ppo":
            given["segment_proximal_logprob_BT"] = extra["segment"]
            numerator = extra["segment"].double().numpy()
        loss, x_BT = run(name, case, **given, floor=0.4, cap=2.0, c=3.0)

        def slow_loss(x, _frozen=None, case=case, numerator=numerator, extra=extra):
            behave = extra["behave"].double().numpy()
            return slow.weighted_ppo(x, case["old"], case["adv"], case["mask"], numerator, behave, 0.4, 2.0, c=3.0)

        np.testing.assert_allclose(loss.loss_BT.detach().numpy(), slow_loss(case["x"]), rtol=2e-5, atol=2e-6)
        loss.loss_BT.sum().backward()
        slope = slow.gradient(slow_loss, case["x"], case["mask"], np.ones(case["x"].shape))
        np.testing.assert_allclose(x_BT.grad.numpy(), slope, rtol=2e-4, atol=2e-5)


def test_the_decoupled_weight_stays_when_no_correction_is_chosen() -> None:
    case = tokens(2)
    behave_BT = torch.tensor(case["old"] - 3.0, dtype=torch.float32)
    kept, _ = run("decoupled_ppo", case, behave_logprob_BT=behave_BT, correction="none")
    bare, _ = run("ppo", case, c=None)
    torch.testing.assert_close(kept.loss_BT, bare.loss_BT * math.exp(3.0), rtol=1e-4, atol=1e-5)
    masked, _ = run("decoupled_ppo", case, behave_logprob_BT=behave_BT)
    assert masked.loss_BT.abs().max() == 0 and masked.metrics["rollout_corr/masked_fraction"] == 1


def test_a_given_proximal_replaces_old() -> None:
    case = tokens(3)
    proximal_BT, behave_BT = torch.tensor(case["old"]).float(), torch.tensor(case["old"] - 0.1).float()
    direct, _ = run("decoupled_ppo", case, behave_logprob_BT=behave_BT)
    case["old"] = case["old"] + 9.0
    replaced, _ = run("decoupled_ppo", case, behave_logprob_BT=behave_BT, proximal_logprob_BT=proximal_BT)
    assert torch.equal(direct.loss_BT, replaced.loss_BT)


def test_an_absent_segment_value_means_the_sampling_logprob() -> None:
    case = tokens(4)
    extra = three_policies(case, 4)
    behave_BT, segment_BT = extra["behave"], extra["segment"].clone()
    segment_BT[0] = torch.nan
    filled_BT = segment_BT.clone()
    filled_BT[0] = behave_BT[0]
    with_nan, x_BT = run("segment_ppo", case, behave_logprob_BT=behave_BT, segment_proximal_logprob_BT=segment_BT)
    filled, _ = run("segment_ppo", case, behave_logprob_BT=behave_BT, segment_proximal_logprob_BT=filled_BT)
    assert torch.equal(with_nan.loss_BT, filled.loss_BT)
    with_nan.loss_BT.sum().backward()
    assert x_BT.grad.isfinite().all()
    none_at_all, _ = run("segment_ppo", case, behave_logprob_BT=behave_BT)
    bare, _ = run("ppo", case, c=None)
    torch.testing.assert_close(none_at_all.loss_BT, bare.loss_BT)


def one(logratio: float, advantage: float) -> dict[str, np.ndarray]:
    cell = np.ones((1, 1))
    return {"x": -1.0 * cell, "old": (-1.0 - logratio) * cell, "adv": advantage * cell, "mask": cell}


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [(1.5, 1.0, -1.2), (0.5, 1.0, -0.5), (1.5, -1.0, 1.5), (0.5, -1.0, 0.8), (5.0, -1.0, 3.0), (5.0, 1.0, -1.2)],
)
def test_ppo_by_hand(ratio: float, advantage: float, expected: float) -> None:
    loss, _ = run("ppo", one(math.log(ratio), advantage))
    assert loss.loss_BT.item() == pytest.approx(expected, rel=1e-5)


def test_dual_clip_bounds_the_loss_and_stops_the_gradient() -> None:
    dual, x_BT = run("ppo", one(math.log(8.0), -2.0))
    dual.loss_BT.sum().backward()
    assert dual.loss_BT.item() == pytest.approx(6.0) and x_BT.grad.item() == 0
    assert dual.metrics["actor/pg_clipfrac_lower"] == 1
    single, x_BT = run("ppo", one(math.log(8.0), -2.0), c=None)
    single.loss_BT.sum().backward()
    assert single.loss_BT.item() == pytest.approx(16.0, rel=1e-5) and x_BT.grad.item() == pytest.approx(16.0, rel=1e-5)


def test_gspo_gives_each_token_the_sequence_ratio_and_its_own_gradient() -> None:
    case = tokens(1, rows=1, width=4)
    case["mask"][:] = 1
    loss, x_BT = run("gspo", case, lo=10.0, hi=10.0)
    ratio = math.exp((case["x"] - case["old"]).mean())
    expected = -case["adv"] * ratio
    np.testing.assert_allclose(loss.loss_BT.detach().numpy(), expected, rtol=1e-5)
    loss.loss_BT[0, 2].backward()
    assert x_BT.grad[0].tolist() == pytest.approx([0, 0, expected[0, 2], 0], rel=1e-5)


def test_cispo_still_teaches_a_clipped_token() -> None:
    loss, x_BT = run("cispo", one(math.log(3.0), 1.0))
    loss.loss_BT.sum().backward()
    assert x_BT.grad.item() == pytest.approx(-1.28, rel=1e-5) and loss.metrics["actor/pg_clipfrac"] == 1
    open_below, x_BT = run("cispo", one(math.log(0.25), 1.0), lo=None)
    open_below.loss_BT.sum().backward()
    assert x_BT.grad.item() == pytest.approx(-0.25, rel=1e-5)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_all_masked_is_legal(name: str) -> None:
    case = tokens(0)
    case["mask"][:] = 0
    extra = {"behave_logprob_BT": torch.zeros(4, 6)} if name in ("decoupled_ppo", "segment_ppo") else {}
    loss, x_BT = run(name, case, **extra)
    losses.aggregate(loss.loss_BT, torch.zeros(4, 6), "token-mean").backward()
    assert torch.equal(loss.loss_BT, torch.zeros(4, 6)) and torch.equal(x_BT.grad, torch.zeros(4, 6))
    assert all(torch.as_tensor(value).isfinite() for value in loss.metrics.values())


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_what_is_masked_has_no_effect(name: str) -> None:
    case = tokens(6)
    extra = {}
    if name in ("decoupled_ppo", "segment_ppo"):
        extra = {"behave_logprob_BT": torch.tensor(case["old"] - 0.2, dtype=torch.float32)}
    clean, clean_x = run(name, case, **extra)
    off = case["mask"] == 0
    dirty_case = {key: np.where(off, np.nan, value) if key != "mask" else value for key, value in case.items()}
    dirty_extra = {key: value.masked_fill(torch.tensor(off), torch.inf) for key, value in extra.items()}
    dirty, dirty_x = run(name, dirty_case, **dirty_extra)
    clean.loss_BT.sum().backward()
    dirty.loss_BT.sum().backward()
    assert torch.equal(clean.loss_BT, dirty.loss_BT) and torch.equal(clean_x.grad, dirty_x.grad)
    assert clean.metrics == dirty.metrics


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_huge_logratios_stay_finite(name: str) -> None:
    case = tokens(7)
    case["old"] = case["x"] + np.where(np.arange(6) % 2, 900.0, -900.0)
    extra = {}
    if name in ("decoupled_ppo", "segment_ppo"):
        extra = {"behave_logprob_BT": torch.tensor(case["x"] - 500.0, dtype=torch.float32)}
    if name == "dppo_tv":
        case["old"] = np.minimum(case["old"], 0)
    loss, x_BT = run(name, case, **extra)
    loss.loss_BT.sum().backward()
    assert loss.loss_BT.isfinite().all() and x_BT.grad.isfinite().all()
    assert all(torch.as_tensor(value).isfinite() for value in loss.metrics.values())


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_losses_scale_with_the_advantage(name: str) -> None:
    """Positively homogeneous in A: why Lite PPO's deviation can be divided out of the gradient at the end."""
    case = tokens(8)
    extra = {}
    if name in ("decoupled_ppo", "segment_ppo"):
        extra = {"behave_logprob_BT": torch.tensor(case["old"] - 0.2, dtype=torch.float32)}
    plain, plain_x = run(name, case, **extra)
    scaled, scaled_x = run(name, {**case, "adv": case["adv"] * 4.0}, **extra)
    plain.loss_BT.sum().backward()
    scaled.loss_BT.sum().backward()
    torch.testing.assert_close(scaled.loss_BT, 4 * plain.loss_BT)
    torch.testing.assert_close(scaled_x.grad, 4 * plain_x.grad)


@pytest.mark.parametrize("name", PLAIN)
def test_on_policy_gradient_is_that_of_reinforce(name: str) -> None:
    """At logprob = old every loss must push each token by -A (a sequence loss: spread over the sequence)."""
    case = tokens(9)
    case["old"] = case["x"].copy()
    loss, x_BT = run(name, case)
    loss.loss_BT.sum().backward()
    np.testing.assert_allclose(x_BT.grad.numpy(), -case["adv"] * case["mask"], rtol=2e-5, atol=1e-6)


def test_advantages_may_be_one_a_row_but_nothing_else() -> None:
    case = tokens(10)
    row = {**case, "adv": case["adv"][:, :1]}
    assert torch.equal(run("ppo", row)[0].loss_BT, run("ppo", case)[0].loss_BT)
    with pytest.raises(ValueError, match="advantage_BT"):
        run("ppo", {**case, "adv": case["adv"][0]})


def test_bounds_that_clip_the_wrong_way_are_refused() -> None:
    for settings in ({"lo": -0.1}, {"hi": -0.1}, {"c": 1.0}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            run("ppo", tokens(0), **settings)
    with pytest.raises(ValueError, match="level"):
        run("topr", tokens(0), level="sample")
    with pytest.raises(ValueError, match="tau_pos"):
        run("sapo", tokens(0), tau_pos=0.0)
