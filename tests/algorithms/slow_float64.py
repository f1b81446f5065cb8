"""The algorithms once more, slowly: float64, plain loops over tokens, written from the papers and not from the product.

A loss takes `x` (log-probs under differentiation) and `frozen` (the same numbers, held still): a stop-gradient reads
`frozen`, so that finite differences in `x` see exactly the gradient the product must have.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np


def rows(mask):
    """For each row, the positions that count."""
    return [[t for t in range(mask.shape[1]) if mask[b, t] > 0] for b in range(mask.shape[0])]


def bounded_exp(d):
    return math.exp(min(max(d, -20.0), 20.0))


def clip(value, low, high):
    return min(max(value, low), high)


# advantages


def members(group, b):
    return [i for i in range(len(group)) if group[i] == group[b]]


def std(values):
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else 0.0


def grpo(score, group, eps=1e-6, divide_by_std=True):
    out = np.zeros(len(score))
    for b in range(len(score)):
        mine = [float(score[i]) for i in members(group, b)]
        if len(mine) == 1:
            mean, spread = 0.0, 1.0
        elif max(mine) == min(mine):
            continue
        else:
            mean, spread = sum(mine) / len(mine), std(mine)
        out[b] = (float(score[b]) - mean) / ((spread + eps) if divide_by_std else 1.0)
    return out


def rloo(score, group):
    out = np.zeros(len(score))
    for b in range(len(score)):
        others = [float(score[i]) for i in members(group, b) if i != b]
        out[b] = float(score[b]) - sum(others) / len(others) if others else 0.0
    return out


def opo(score, length, group):
    out = np.zeros(len(score))
    for b in range(len(score)):
        mine = members(group, b)
        baseline = sum(float(length[i]) * float(score[i]) for i in mine) / sum(float(length[i]) for i in mine)
        out[b] = float(score[b]) - baseline
    return out


def lite_ppo(score, group, eps=1e-6):
    spread = std([float(s) for s in score])
    out = np.zeros(len(score))
    for b in range(len(score)):
        mine = [float(score[i]) for i in members(group, b)]
        out[b] = (float(score[b]) - sum(mine) / len(mine)) / (spread + eps)
    return out


def passk(score, group):
    out = np.zeros(len(score))
    for b in range(len(score)):
        others = sorted((float(score[i]) for i in members(group, b) if i != b), reverse=True)
        out[b] = max(float(score[b]) - others[0], 0.0)
    return out


def whiten(x, mask, shift_mean=True):
    values = [float(x[b, t]) for b, ts in enumerate(rows(mask)) for t in ts]
    mean, variance = sum(values) / len(values), std(values) ** 2
    out = np.zeros(x.shape)
    for b, ts in enumerate(rows(mask)):
        for t in ts:
            out[b, t] = (float(x[b, t]) - mean) / math.sqrt(variance + 1e-8) + (0.0 if shift_mean else mean)
    return out


def gae(reward, value, mask, gamma, lam):
    """As the sum of discounted errors over the tokens that count, not as a recursion."""
    adv, ret = np.zeros(mask.shape), np.zeros(mask.shape)
    for b, ts in enumerate(rows(mask)):
        values = [float(value[b, t]) for t in ts] + [0.0]
        deltas = [float(reward[b, t]) + gamma * values[k + 1] - values[k] for k, t in enumerate(ts)]
        for k, t in enumerate(ts):
            adv[b, t] = sum((gamma * lam) ** j * delta for j, delta in enumerate(deltas[k:]))
            ret[b, t] = adv[b, t] + values[k]
    return adv, ret


# policy losses: f(x, frozen, old, advantage, mask) -> loss for each token


def per_token(formula: Callable) -> Callable:
    def loss(x, frozen, old, adv, mask, **settings):
        out = np.zeros(mask.shape)
        for b, ts in enumerate(rows(mask)):
            for t in ts:
                out[b, t] = formula(x[b, t], frozen[b, t], old[b, t], adv[b, t], **settings)
        return out

    return loss


def clipped_surrogate(ratio, a, lo, hi, c):
    value = max(-a * ratio, -a * clip(ratio, 1 - lo, 1 + hi))
    return min(value, -c * a) if c is not None and a < 0 else value


@per_token
def ppo(x, frozen, old, a, lo=0.2, hi=0.2, c=3.0):
    return clipped_surrogate(bounded_exp(x - old), a, lo, hi, c)


@per_token
def dapo(x, frozen, old, a, lo=0.2, hi=0.28, c=3.0):
    return clipped_surrogate(bounded_exp(x - old), a, lo, hi, c)


@per_token
def cispo(x, frozen, old, a, lo=0.2, hi=0.28):
    ratio = bounded_exp(frozen - old)
    return -clip(ratio, -math.inf if lo is None else 1 - lo, math.inf if hi is None else 1 + hi) * a * x


@per_token
def topr_token(x, frozen, old, a):
    return -a * x if a > 0 else -clip(bounded_exp(frozen - old), 0, 1) * a * x


@per_token
def dppo_tv(x, frozen, old, a, lo=0.2, hi=0.2, c=20.0):
    step = math.exp(frozen) - math.exp(old)
    if (a > 0 and step > hi) or (a < 0 and step < -lo):
        return 0.0
    return -a * min(bounded_exp(frozen - old), c) * x


@per_token
def sapo(x, frozen, old, a, tau_pos=1.0, tau_neg=1.05):
    tau = tau_pos if a > 0 else tau_neg
    return -a * 4 / tau / (1 + math.exp(-tau * (bounded_exp(x - old) - 1)))


def topr(x, frozen, old, adv, mask):
    out = np.zeros(mask.shape)
    for b, ts in enumerate(rows(mask)):
        whole = clip(bounded_exp(sum(frozen[b, t] - old[b, t] for t in ts)), 0, 1)
        for t in ts:
            out[b, t] = -(1.0 if adv[b, t] > 0 else whole) * adv[b, t] * x[b, t]
    return out


def gspo(x, frozen, old, adv, mask, lo=3e-4, hi=4e-4):
    out = np.zeros(mask.shape)
    for b, ts in enumerate(rows(mask)):
        mean = sum(frozen[b, t] - old[b, t] for t in ts) / max(len(ts), 1)
        for t in ts:
            ratio = bounded_exp(mean) * math.exp(x[b, t] - frozen[b, t])
            out[b, t] = clipped_surrogate(ratio, adv[b, t], lo, hi, None)
    return out


def geo_mean(x, frozen, old, adv, mask, lo=0.4, hi=0.4):
    out = np.zeros(mask.shape)
    for b, ts in enumerate(rows(mask)):
        total = 0.0
        for t in ts:
            d = x[b, t] - old[b, t]
            total += min(d, clip(d, -lo, hi)) if adv[b, t] >= 0 else max(d, clip(d, -lo, hi))
        a = sum(adv[b, t] for t in ts) / max(len(ts), 1)
        for t in ts:
            out[b, t] = -a * bounded_exp(total / len(ts))
    return out


def weighted_ppo(x, old, adv, mask, numerator, behave, floor, cap, lo=0.2, hi=0.2, c=None):
    """Both three-policy losses: `numerator` is the proximal policy or the segment's."""
    out = np.zeros(mask.shape)
    for b, ts in enumerate(rows(mask)):
        for t in ts:
            w = bounded_exp(numerator[b, t] - behave[b, t])
            if floor <= w <= cap:
                out[b, t] = w * clipped_surrogate(bounded_exp(x[b, t] - old[b, t]), adv[b, t], lo, hi, c)
    return out


def gradient(loss: Callable, x, mask, cotangent, step=1e-6):
    """Central differences of Σ cotangent·loss(x, frozen) in x, `frozen` held still."""
    out = np.zeros(x.shape)
    for b, ts in enumerate(rows(mask)):
        for t in ts:
            up, down = x.copy(), x.copy()
            up[b, t] += step
            down[b, t] -= step
            out[b, t] = ((loss(up, x) - loss(down, x)) * cotangent).sum() / (2 * step)
    return out


# from tokens to one number


def aggregate(loss, mask, mode, horizon=None):
    per_row = [[loss[b, t] for t in ts] for b, ts in enumerate(rows(mask)) if ts]
    num_tokens, num_rows = sum(map(len, per_row)), len(per_row)
    if not per_row:
        return 0.0
    return {
        "token-mean": sum(map(sum, per_row)) / num_tokens,
        "token-sum": sum(map(sum, per_row)),
        "seq-mean-token-sum": sum(map(sum, per_row)) / num_rows,
        "seq-mean-token-mean": sum(sum(row) / len(row) for row in per_row) / num_rows,
        "seq-mean-token-sum-norm": sum(map(sum, per_row)) / (horizon or 1) / num_rows,
    }[mode]


# corrections


def weights(train, rollout, mask, level, mode, low, high):
    out = np.zeros(mask.shape)
    for b, ts in enumerate(rows(mask)):
        d = {t: float(train[b, t]) - float(rollout[b, t]) for t in ts}
        whole = sum(d.values()) if level == "sequence" else sum(d.values()) / max(len(ts), 1)
        for t in ts:
            w = bounded_exp(d[t] if level == "token" else whole)
            if mode == "truncate":
                w = min(w, high)
            elif mode == "clip":
                w = clip(w, low, high)
            elif mode == "mask":
                w = w if low <= w <= high else 0.0
            out[b, t] = w
    return out


def m2po(behave, proximal, mask, tau):
    """Drop the largest, one by one."""
    left = {(b, t): (float(behave[b, t]) - float(proximal[b, t])) ** 2 for b, ts in enumerate(rows(mask)) for t in ts}
    while left and sum(left.values()) / len(left) >= tau:
        del left[max(left, key=left.__getitem__)]
    return np.array([[1.0 if (b, t) in left else 0.0 for t in range(mask.shape[1])] for b in range(mask.shape[0])])
