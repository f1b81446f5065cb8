"""A preset fills what the recipe leaves out; what does not go together is refused, with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flowrl import pipeline
from flowrl.algorithms.declarations import ALGORITHMS, LOSSES, Streaming
from flowrl.config import load, to_yaml
from flowrl.config.presets import configured

QUICKSTART = Path(__file__).resolve().parents[2] / "recipes" / "quickstart.yaml"


# Which scores it is to weigh, nobody can know for the user.
NEEDED = {"gdpo": {"advantage_settings": {"weights": {"score": 1.0, "acc": 0.5}}}}


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_a_name_alone_makes_a_whole_recipe_that_reads_back_equal(name: str, tmp_path: Path) -> None:
    more = ["algorithm.advantage_settings.weights={score: 1.0, acc: 0.5}"] if name in NEEDED else []
    recipe = load(QUICKSTART, [f"algorithm.name={name}", *more])
    assert (recipe.algorithm.advantage, recipe.algorithm.loss) == (ALGORITHMS[name].advantage, ALGORITHMS[name].loss)
    (tmp_path / "resolved.yaml").write_text(to_yaml(recipe))
    assert load(tmp_path / "resolved.yaml") == recipe
    stages = {stage.name for stage in pipeline.build(recipe, 1).graph}
    assert ("advantage" in stages) != recipe.algorithm.estimates_in_trainer


def test_another_loss_brings_its_own_clips_and_aggregation() -> None:
    mixed = configured("grpo", loss="gspo")
    assert (mixed.clip_low, mixed.clip_high, mixed.dual_clip) == (3e-4, 4e-4, None)
    assert mixed.aggregate == "seq-mean-token-mean"
    assert configured("grpo", loss="decoupled_ppo").old == "recomputed"
    assert configured("lite_ppo").dual_clip is None and configured("lite_ppo", loss="dapo").dual_clip == 3.0


def test_another_advantage_leaves_the_settings_of_the_first_behind() -> None:
    assert configured("dr_grpo").advantage_settings == {"divide_by_std": False}
    assert configured("dr_grpo", advantage="rloo").advantage_settings == {}


def test_what_the_recipe_says_wins() -> None:
    recipe = load(QUICKSTART, ["algorithm.name=cispo", "algorithm.clip_low=null", "algorithm.aggregate=token-sum"])
    assert recipe.algorithm.clip_low is None and recipe.algorithm.clip_high == 0.28
    assert recipe.algorithm.aggregate == "token-sum"


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_clips_of_a_preset_are_the_losss_own_unless_it_says_otherwise(name: str) -> None:
    algorithm, config = ALGORITHMS[name], configured(name, **NEEDED.get(name, {}))
    clips = {"lo": None, "hi": None, "c": None} | LOSSES[algorithm.loss].clips | algorithm.loss_settings
    assert (config.clip_low, config.clip_high, config.dual_clip) == (clips["lo"], clips["hi"], clips["c"])


def test_what_waits_for_the_batch_and_what_streams() -> None:
    found = {name: configured(name, **NEEDED.get(name, {})).streaming()[0] for name in ALGORITHMS}
    streams = {name for name in found if found[name] is Streaming.STREAMS}
    waits = {name for name in found if found[name] is Streaming.WAITS}
    assert waits == {"ppo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "gdpo"}
    assert set(ALGORITHMS) - streams - waits == {"lite_ppo"}
    assert configured("lite_ppo", entropy_coef=0.1).streaming()[0] is Streaming.WAITS
    assert configured("grpo").streaming(num_minibatches=2)[0] is Streaming.WAITS
    assert configured("grpo", kl={"place": "loss"}).streaming()[0] is Streaming.STREAMS
    assert configured("grpo", kl={"place": "reward"}).streaming()[0] is Streaming.WAITS


GDPO = ("algorithm.name=gdpo", "algorithm.advantage_settings.weights={score: 1.0, acc: 0.5}")
# TIS, IcePop, M2PO, OPSM, as options of any preset. What weighs by itself takes the first two as bounds of that weight.
OPTIONS: dict[str, dict[str, Any]] = {
    "tis": {"correction": {"mode": "truncate", "high": 2.0}},
    "icepop": {"correction": {"mode": "mask", "low": 0.5, "high": 5.0}},
    "m2po": {"m2po": 0.04},
    "opsm": {"opsm": 1e-4},
}
REFUSED = {
    ("dppo_tv", "tis"): "it compares with the sampler",
    ("dppo_tv", "icepop"): "it compares with the sampler",
    ("dppo_tv", "m2po"): "it compares with the sampler",
    ("segment_ppo", "tis"): "segment_ppo masks its weight token by token",
}


@pytest.mark.parametrize("option", sorted(OPTIONS))
@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_each_preset_takes_each_off_policy_option_or_says_why_not(name: str, option: str) -> None:
    given = {**NEEDED.get(name, {}), **OPTIONS[option], **({} if option == "opsm" else {"old": "recomputed"})}
    if (name, option) in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name, option]):
            configured(name, **given)
        return
    config = configured(name, **given)
    assert (config.correction is None) == (option not in ("tis", "icepop") and not config.has_weight_in_loss)
    assert (config.m2po, config.opsm) == (OPTIONS[option].get("m2po"), OPTIONS[option].get("opsm"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["algorithm.name=grop"], "algorithm.name: 'grop'; must be one of"),
        (["algorithm.name=gdpo"], "algorithm.advantage_settings.weights: None; gdpo needs the names"),
        ([*GDPO, "algorithm.advantage_settings.weights.acc=0"], "algorithm.advantage_settings.weights.acc: 0; must be"),
        ([*GDPO, "algorithm.kl={place: reward}"], "algorithm.kl.place: comes off the reward, and gdpo normalises"),
        ([*GDPO, "algorithm.overlong_buffer=2"], "algorithm.overlong_buffer: comes off the reward, and gdpo"),
        ([*GDPO, "rollout.filter_tied=true"], "rollout.filter_tied: True; algorithm.advantage=gdpo compares several"),
        ([*GDPO, "rollout.group_size=1"], "rollout.group_size: 1; algorithm.advantage=gdpo compares"),
        (
            [*GDPO, "reward.name=episode", "rollout.episode=mine.py:scored", "warm_start=null"],
            "reward.name: 'episode'; an episode gives one score, and algorithm.advantage=gdpo weighs several",
        ),
        (
            ["algorithm.name=remax", "rollout.filter_tied=true"],
            "rollout.filter_tied: True; algorithm.advantage=remax compares the greedy sample's",
        ),
        (["algorithm.name=remax", "algorithm.correction={mode: truncate}"], "the ratio already corrects"),
        (["algorithm.loss=mine.py"], "algorithm.loss: 'mine.py'; must be one of"),
        (["algorithm.loss=mine.py:1f"], "algorithm.loss: 'mine.py:1f'; must read"),
        (["algorithm.advantage_settings={gama: 1}"], "algorithm.advantage_settings.gama: 1; grpo takes eps"),
        (["algorithm.name=sapo", "algorithm.loss_settings={tau: 1}"], "algorithm.loss_settings.tau: 1; sapo takes"),
        (["algorithm.name=topr", "algorithm.clip_low=0.2"], "algorithm.clip_low: 0.2; topr has no such clip"),
        (["algorithm.name=gspo", "algorithm.dual_clip=3"], "algorithm.dual_clip: 3.0; gspo has no such clip"),
        (
            ["algorithm.name=gspo", "algorithm.aggregate=token-mean"],
            "algorithm.aggregate: aggregation: 'token-mean'; gspo",
        ),
        (["algorithm.correction={mode: truncate}"], "the ratio already corrects, a weight would count twice"),
        (["algorithm.name=dppo_tv", "algorithm.old=recomputed"], "it compares with the sampler"),
        (["algorithm.name=decoupled_ppo", "algorithm.old=rollout"], "its w compares them with the rollout's"),
        (["algorithm.correction={mode: clip, low: 3, high: 2}"], "algorithm.correction.low: 3.0; must not exceed"),
        (["algorithm.correction={low: 0.5}"], "algorithm.correction.low: 0.5; truncate has no lower bound"),
        (
            ["algorithm.name=segment_ppo", "algorithm.correction.mode=clip"],
            "segment_ppo masks its weight token by token",
        ),
        (["algorithm.m2po=0.04"], "algorithm.m2po: 0.04; it compares the rollout's log-probs with the trainer's"),
        (["algorithm.kl={estimator: k1}"], "algorithm.kl.estimator: 'k1'; in the loss its gradient is 0"),
        (["algorithm.kl={coef: 0}"], "algorithm.kl.coef: 0.0; must be above 0"),
        (["algorithm.overlong_buffer=9"], "algorithm.overlong_buffer: 9; must not exceed rollout.max_tokens=8"),
        (["algorithm.name=rloo", "rollout.group_size=1"], "rollout.group_size: 1; algorithm.advantage=rloo compares"),
        (["train.minibatches=33"], "train.minibatches: 33; at most one a group, batch_groups=32"),
        (["train.stop_kl=0.1"], "train.stop_kl: 0.1; an update of one step cannot stop early"),
        (
            [
                "algorithm.name=ppo",
                "stages.advantage={run: 'mine.py:A', unit: group, reads: [reward], writes: [advantage]}",
            ],
            "stages.advantage: 'mine.py:A'; the trainer computes advantages here, because gae whitens",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_with_its_reason(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError) as error:
        load(QUICKSTART, overrides)
    assert message in str(error.value)
