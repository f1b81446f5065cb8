"""A recipe's mistakes are refused with field, value and rule."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowrl import pipeline
from flowrl.config import load, to_yaml
from flowrl.record.lives import Life
from flowrl.simulate.of_run import setting_of_recipe

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "recipes" / "quickstart.yaml"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("staleness.mx=3", "staleness.mx: 3; no such field (did you mean staleness.max?)"),
        ("traim.steps=3", "did you mean train?"),
        ("train.steps=many", "train.steps: Value 'many' of type 'str' could not be converted to Integer"),
        ("train.steps=0", "train.steps: 0; must be at least 1"),
        ("train.learning_rate=-1", "train.learning_rate: -1.0; must be above 0"),
        (
            "train.schedule=cosin",
            "train.schedule: 'cosin'; must be one of constant, linear, cosine (did you mean 'cosine'?)",
        ),
        ("staleness.late=dorp", "staleness.late: 'dorp'"),
        ("weights.timeout_s=0", "weights.timeout_s: 0.0; must be above 0"),
        ("staleness=3", "staleness: 3; must be a mapping"),
        ("staleness.max=-1", "staleness.max: -1; must be at least 0"),
        ("data.source=auto", "data.path: missing"),
        ("data.task=null", "data.task: missing"),
        ("data.dev=0", "data.dev: 0; warm_start needs a development set"),
        ("data.held_out=0", "eval.path: missing"),
        ("eval.path=/nowhere.jsonl", "eval.path: '/nowhere.jsonl'; no such file or directory"),
        ("eval.samples=4", "eval.samples: 4; greedy samples are all alike"),
        ("reward.name=null", "reward: name=None, path=None; exactly one of the two"),
        ("reward.path=a.py:f", "reward: name='reasoning_gym_exact', path='a.py:f'; exactly one of the two"),
        ("rollout.engine=vllm", "rollout.engine: 'vllm'; must be one of embedded, sglang"),
        ("rollout.temperature=0", "rollout.temperature: 0.0; must be above 0"),
        ("rollout.episode=nothing", "rollout.episode: 'nothing'; must be one of"),
        ("model.init.heads=3", "model.init.heads: 3; must divide model.init.hidden_size=128"),
        ("pools.rollout.thread=2", "pools.rollout.thread: 2; no such field (did you mean pools.rollout.threads?)"),
        ("stages.mine.reads=[reward]", "stages.mine.run: missing"),
        ("weights.transport=disk", "weights.dir: None"),
        ("network.interface=eth0", "network.trusted: false"),
        ("algorithm.dual_clip=0.5", "algorithm.dual_clip: 0.5; must be above 1, or null"),
        ("pools.rollout.devices=[cuda]", "pools.*.devices: 'cuda'; must read 'cpu', or with a number"),
        ("producers.more.engine=vllm", "producers.more.engine: 'vllm'; must be one of"),
        ("producers.more.servers=2", "producers.more.servers: 2; only rollout.engine=sglang has that"),
        ("producers={queue: {}}", "producers.queue: there is a worker or a stage of that name"),
        ("producers={a/b: {}}", "producers.a/b: a name has letters, digits, '_' and '-'"),
        ("producers.more.temperature=2", "producers.more.temperature: 2; no such field"),
        ("producers.rollout.concurrency=2", "producers.rollout: there is a worker or a stage of that name"),
        ("rollout.max_tokens=64", "rollout.max_tokens: 64; the model takes 64 tokens, of prompt and response"),
        ("network.meet_s=0", "network.meet_s: 0.0; must be above 0"),
        ("network.meet_s=9", "network.meet_s: 9.0; must be above network.peer_s=10.0"),
        ("network.peer_s=1", "network.peer_s: 1.0; nodes speak once a second, so more than 2"),
        ("run.name=a/b", "run.name: 'a/b'; must be a directory name"),
    ],
)
def test_a_mistake_is_refused_with_field_value_and_rule(override: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        load(QUICKSTART, [override])
    assert message in str(error.value)


@pytest.mark.parametrize("reader", ["rollout.engine=sglang", "algorithm.name=segment_ppo"])
def test_readers_of_directories_are_refused_where_weights_lie_in_none(reader: str) -> None:
    with pytest.raises(ValueError, match=rf"^weights\.transport: 'collective'; .*{reader.partition('.')[0]}"):
        load(QUICKSTART, ["weights.transport=collective", reader])


def test_a_missing_model_without_init_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model.path: '/nowhere'; no such file"):
        load(QUICKSTART, ["model.path=/nowhere", "model.init=null"])


def test_an_override_without_a_value_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must read field\.name=value"):
        load(QUICKSTART, ["staleness.max"])


@pytest.mark.parametrize("content", ["- a list", "a: [", "a: 1\na: 2"])
def test_what_is_no_recipe_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match="recipe"):
        load(path)


def test_the_resolved_recipe_reads_back_equal(tmp_path: Path) -> None:
    recipe = load(QUICKSTART, ["staleness.max=7", "pools.rollout.threads=2", "data.options.max_word_len=4"])
    path = tmp_path / "resolved.yaml"
    path.write_text(to_yaml(recipe))
    assert load(path) == recipe
    assert recipe.staleness.max == 7
    assert recipe.pools["rollout"].threads == 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["staleness.max=1"], "rollout.in_flight: 'keep'; pools.rollout and pools.train share devices"),
        (
            ["staleness.max=1", "rollout.in_flight=recompute", "rollout.handover=batch"],
            "rollout.handover: 'batch'; pools.rollout and pools.train share devices",
        ),
        (["staleness.max=0"], ""),
        (["staleness.max=2", "rollout.in_flight=abort"], ""),
    ],
)
def test_what_an_engine_that_takes_turns_cannot_keep_is_refused(overrides: list[str], message: str) -> None:
    one_device = "pools={rollout: {devices: [cpu:0]}, train: {devices: [cpu:0]}}"
    recipe = load(QUICKSTART, [one_device, *overrides])
    if not message:
        pipeline.build(recipe, 1)
        return
    with pytest.raises(ValueError) as error:
        pipeline.build(recipe, 1)
    assert message in str(error.value)


def test_a_producer_is_as_rollout_but_for_what_it_says_and_what_belongs_to_another_engine() -> None:
    overrides = ["rollout.engine=sglang", "rollout.servers=2", "rollout.server_args={tp_size: 2}", "rollout.python=py"]
    producers = ["producers={same: {concurrency: 3}, other: {engine: embedded, pool: cpu}}"]
    recipe = load(QUICKSTART, [*overrides, *producers])
    same, other = (recipe.producer(name).rollout for name in ("same", "other"))
    assert (same.engine, same.servers, same.server_args, same.concurrency) == ("sglang", 2, {"tp_size": 2}, 3)
    assert (other.engine, other.servers, other.server_args, other.python) == ("embedded", 1, {}, None)
    assert other.concurrency == recipe.rollout.concurrency and recipe.producer("rollout") is recipe


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("producers={more: {}}", "rollout.handover=batch"), "producers: ['more']; rollout.handover=batch and"),
        (("producers={more: {}}", "run.determinism=strict", "staleness.max=0"), "producers: ['more']; rollout"),
        (("producers={reward: {pool: cpu}}",), "producers.reward: there is a worker or a stage of that name"),
        (("producers={more: {}}",), "producers.more.pool: 'more'; the pools are"),
        (
            (
                "producers={more: {}}", "pools.more.devices=['cpu:0']",
                "pools.train.devices=['cpu:0']", "pools.rollout.devices=['cpu:1']",
            ),
            "producers.more.pool: ['more.0.0', 'train.0.0'] share devices; only rollout's engines take turns",
        ),
        (
            ("rollout.engine=sglang", "rollout.urls=['http://a:1','http://b:1']", "producers={more: {}}"),
            "producers.more.urls: ['http://a:1', 'http://b:1']; another rollout stage has these servers",
        ),
    ],
)  # fmt: skip
def test_producers_that_cannot_stand_beside_rollout_are_refused(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError) as error:
        pipeline.build(load(QUICKSTART, overrides), 1)
    assert message in str(error.value)


def test_how_long_nodes_wait_for_each_other_is_the_recipes_to_say(tmp_path: Path) -> None:
    recipe = load(QUICKSTART, ["network.meet_s=30", "network.peer_s=5"])
    settings = pipeline.controller_settings(pipeline.build(recipe, 1), tmp_path, Life(number=0))
    assert (settings.start_s, settings.peer_s) == (30.0, 5.0)


def test_the_trainer_waits_for_the_filter_of_tied_groups_whoever_makes_the_advantages() -> None:
    mine = "stages.advantage={run: 'flowrl.stages.tied:TiedGroups', unit: batch, reads: [reward], writes: [advantage]}"
    built = pipeline.build(load(QUICKSTART, ["rollout.filter_tied=true", mine]), 1)
    assert "is_untied" in built.graph.consumers()["train"].reads
    assert "advantage" not in built.graph.consumers()["train"].reads


def test_a_stage_of_batches_takes_no_pool() -> None:
    mine = "stages.advantage={run: 'flowrl.stages.tied:TiedGroups', unit: batch, writes: [advantage], pool: rollout}"
    with pytest.raises(
        ValueError, match=r"stages\.advantage\.pool: 'rollout'; a stage with unit 'batch' runs in train's"
    ):
        pipeline.build(load(QUICKSTART, [mine]), 1)


def test_engines_of_several_sizes_are_not_simulated_as_if_they_were_alike() -> None:
    with pytest.raises(ValueError, match=r"producers\.more\.concurrency: 2; engines are simulated alike"):
        setting_of_recipe(load(QUICKSTART, ["producers={more: {concurrency: 2, pool: rollout}}"]))
