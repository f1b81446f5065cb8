"""What the doctor says of a recipe: right where the arithmetic is exact, and by name where something will not fit."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import safe_open

from flowrl import pipeline
from flowrl.cli.main import main
from flowrl.config import load
from flowrl.doctor import examine as examination
from flowrl.doctor.estimate import disk_in_all, worker_memory
from flowrl.doctor.examine import ports
from flowrl.doctor.machine import Machine
from flowrl.doctor.shape import VOCABULARY_GUESS, shape_of
from flowrl.model_init import create_model
from flowrl.pipeline import Pipeline

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "quickstart.yaml"
MACHINE = Machine(cores=4, memory=8 << 30, shared_free=4 << 30, disk_free=50 << 30, open_files=65536, gpus=())


def built(folder: Path, *overrides: str, num_nodes: int = 1) -> Pipeline:
    recipe = load(RECIPE, [f"model.path={folder}/model", f"run.dir={folder}/runs", *overrides])
    return pipeline.build(recipe, num_nodes)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine whose size is known; what is judged here is the judgement."""
    monkeypatch.setattr(examination, "look", lambda root, run_dir: MACHINE)
    return MACHINE


def test_the_size_of_a_model_to_be_made_is_that_of_the_model_made(tmp_path: Path) -> None:
    pipe = built(tmp_path)
    guess = shape_of(pipe.recipe)
    assert guess.is_guessed and pipe.recipe.model.init is not None
    create_model(tmp_path / "model", pipe.recipe.model.init, ["abc", "xyz"])
    made = shape_of(pipe.recipe)
    with safe_open(tmp_path / "model" / "model.safetensors", "np") as file:
        sizes = {name: math.prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert made.parameters == sum(sizes.values())
    vocabulary = guess.hidden * (VOCABULARY_GUESS - made.vocabulary)
    assert guess.parameters - made.parameters in (vocabulary, 2 * vocabulary), "all but the vocabulary is exact"
    assert replace(guess, parameters=0, vocabulary=0, is_guessed=False) == replace(made, parameters=0, vocabulary=0)


def test_what_is_sharded_shrinks_with_the_ranks_and_what_is_gathered_does_not(tmp_path: Path) -> None:
    def amounts(num_nodes: int) -> dict[str, int]:
        pipe = built(tmp_path, "train.compute_dtype=bfloat16", num_nodes=num_nodes)
        train = next(plan for plan in pipe.workers if plan.worker == "train")
        needs = worker_memory(train, pipe.recipe, shape_of(pipe.recipe))
        return {need.what.split(",")[0].split(" ")[0]: need.amount for need in needs}

    one, two = amounts(1), amounts(2)
    assert one["masters"] == 2 * two["masters"]
    assert one["parameters"] == two["parameters"]


def test_what_is_not_trained_needs_neither_gradients_nor_moments_nor_room_in_checkpoints(tmp_path: Path) -> None:
    pipe = built(tmp_path, "model.lora={rank: 4, targets: [q_proj, down_proj]}", "warm_start=null")
    guess = shape_of(pipe.recipe)
    assert pipe.recipe.model.init is not None
    create_model(tmp_path / "model", pipe.recipe.model.init, ["abc", "xyz"])
    made = shape_of(pipe.recipe)
    assert guess.adapters == made.adapters == 2 * 4 * ((128 + 128) + (384 + 128))
    train = next(plan for plan in pipe.workers if plan.worker == "train")
    assert worker_memory(train, pipe.recipe, made)[0].amount == 4 * made.parameters + 12 * made.adapters
    (checkpoints,) = (need for need in disk_in_all(pipe.recipe, made) if "checkpoints" in need.what)
    assert checkpoints.amount == 3 * 12 * made.adapters


def test_a_critic_and_a_reference_are_counted(tmp_path: Path) -> None:
    def memory_and_disk(*overrides: str) -> tuple[int, int]:
        pipe = built(tmp_path, "warm_start=null", *overrides)
        train, shape = next(plan for plan in pipe.workers if plan.worker == "train"), shape_of(pipe.recipe)
        memory = worker_memory(train, pipe.recipe, shape)
        held = sum(need.amount for need in memory if not need.in_turn)
        return held // shape.parameters, sum(
            need.amount for need in disk_in_all(pipe.recipe, shape) if "checkpoint" in need.what or "state" in need.what
        ) // shape.parameters

    assert memory_and_disk() == (16, 3 * 12)
    assert memory_and_disk("algorithm.kl={coef: 0.1}") == (16 + 4, 3 * 12)
    assert memory_and_disk("algorithm.name=ppo") == (16 + 16, (3 + 1) * 24), "with the state that a replay begins from"


def test_a_small_recipe_fits(tmp_path: Path, machine: Machine) -> None:
    found = examination.examine(built(tmp_path), 0, 1, 1)
    assert not found.problems


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rollout.group_size=2000000", "memory of cpu"),
        ("queue.byte_limit_mb=100000", "Shared memory"),
        ("weights.buffers=5000000", "Shared memory"),
        ("train.steps=2000000000", "Disk"),
        ("pools.train.devices=[cuda:0]", "device cuda:0: this machine has 0 GPUs"),
    ],
)
def test_what_will_not_fit_is_named(tmp_path: Path, machine: Machine, override: str, words: str) -> None:
    found = examination.examine(built(tmp_path, override), 0, 1, 1)
    assert any(words in problem for problem in found.problems), found.problems


def test_of_workers_that_take_turns_the_larger_share_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that has room for either of the two, offloaded, and not for both at once."""
    turns = ["pools.rollout.devices=[cuda:0]", "pools.train.devices=[cuda:0]", "rollout.in_flight=recompute"]
    turns += ["rollout.concurrency=20000", "train.micro_batch_tokens=800000", "train.compute_dtype=bfloat16"]
    pipe = built(tmp_path, *turns)
    shape = shape_of(pipe.recipe)
    given_back = {
        plan.worker: sum(need.amount for need in worker_memory(plan, pipe.recipe, shape) if need.in_turn)
        for plan in pipe.workers
    }
    larger, smaller = sorted((given_back["rollout"], given_back["train"]), reverse=True)[:2]
    masters = 16 * shape.parameters
    assert smaller > 2 * masters, "the case tells the two ways of counting apart"

    def problems(gpu: int, *overrides: str) -> list[str]:
        monkeypatch.setattr(examination, "look", lambda root, run_dir: replace(MACHINE, gpus=(gpu,)))
        return examination.examine(built(tmp_path, *turns, *overrides), 0, 1, 1).problems

    assert not problems(larger + masters)
    assert problems(larger + masters - 1)
    assert not problems(larger, "train.offload=all")
    assert problems(larger - 1, "train.offload=all")
    split = examination.examine(built(tmp_path, *turns[3:]), 0, 1, 1)
    assert not any("take turns" in line for _, lines in split.sections for line in lines)


def test_more_threads_than_cores_is_a_doubt(tmp_path: Path, machine: Machine) -> None:
    found = examination.examine(built(tmp_path, "pools.train.threads=4"), 0, 1, 1)
    assert any("threads: 5" in doubt for doubt in found.doubts)
    assert not found.problems


def test_ports_are_those_that_a_run_listens_on(tmp_path: Path) -> None:
    assert ports(built(tmp_path), 1, is_on_one_host=True)[0].startswith("none")
    several = ports(built(tmp_path, "network={interface: eth0, trusted: true}"), 2, is_on_one_host=False)
    assert "MASTER_PORT" in several[0]
    assert all("eth0" in line for line in several[1:])


def test_the_command_prints_it_and_a_directory_that_is_no_model_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["doctor", str(RECIPE), f"run.dir={tmp_path}/runs", f"model.path={tmp_path}/model"]
    main(arguments)
    said = capsys.readouterr().out
    for words in (
        "# Environment",
        "# Memory by device",
        "# Shared memory",
        "# Disk, an update",
        "record, for",
        "# Ports",
        "torch 2",
    ):
        assert words in said
    (tmp_path / "model").mkdir()
    assert main(arguments) == 2
    assert "has no config.json" in capsys.readouterr().err
    (tmp_path / "model" / "config.json").write_text(json.dumps({"hidden_size": 8}))
    assert main(arguments) == 2
    assert "has no *.safetensors" in capsys.readouterr().err
