"""What a run needs of memory, shared memory and disk, from its recipe and the model's shape. Pure arithmetic.

Exact where the code allocates so much (masters, optimizer, published versions, the queue's limit), rough where it
depends on the data (activations, prompts, rows). Each figure says which.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from controllers.placement import HOST_DEVICE, WorkerPlan, backing_device
from flowrl.config import Recipe
from flowrl.doctor.shape import ModelShape
from flowrl.weights.place import publishes_adapters

ITEM_BYTES = {"float32": 4, "bfloat16": 2}
PROCESS_BYTES = {"torch": 450 << 20, "light": 60 << 20}
"""A worker's own, before it holds anything: interpreter and libraries, measured on a CPU build of torch."""
ACTIVATIONS_PER_LAYER = 10
"""Tensors of tokens x hidden that a layer keeps for its backward, besides those of tokens x intermediate."""
INTERMEDIATE_TENSORS = 4
LOGITS_BYTES = 256 << 20
"""Log-probabilities are computed in pieces of the vocabulary's rows: at most about so much at once."""
EVALUATION_BATCH = 256
EVENTS_PER_ROW = 5
EVENT_BYTES = 92
METRICS_BYTES = 1500
SAMPLE_BYTES = 600
RECORDED_ROW_BYTES = 32
RECORDED_TOKEN_BYTES = 13
USUAL_PROMPT_TOKENS = 32


@dataclass(frozen=True)
class Need:
    """amount: bytes. is_exact: the code allocates just that. in_turn: given back when the worker yields its device.
    on_host: in main memory, whatever its device."""

    what: str
    amount: int
    is_exact: bool
    in_turn: bool = False
    on_host: bool = False


def worker_memory(plan: WorkerPlan, recipe: Recipe, shape: ModelShape) -> list[Need]:
    """Of one worker, on its device if that is no CPU, else in main memory. Empty where nothing is known of it."""
    is_gpu = backing_device(plan.devices[0]) != HOST_DEVICE
    if plan.worker == "train":
        return trainer_memory(plan, recipe, shape, is_offloaded=is_gpu and recipe.train.offload == "all")
    rollout = recipe.producer(plan.worker).rollout
    if plan.worker in recipe.rollout_stages and rollout.engine == "sglang":
        what = "weights in the server (its KV cache: server_args.mem_fraction_static)"
        is_freed = is_gpu and bool(rollout.server_args.get("enable_memory_saver"))
        return [Need(what, _serving(recipe, shape), False, in_turn=is_freed)]
    if plan.worker in recipe.rollout_stages:
        return engine_memory(recipe, shape, _running_rows(recipe.producer(plan.worker)), is_parked=is_gpu)
    if plan.worker == "evaluate":
        return engine_memory(recipe, shape, EVALUATION_BATCH)
    return []


def trainer_memory(plan: WorkerPlan, recipe: Recipe, shape: ModelShape, *, is_offloaded: bool = False) -> list[Need]:
    """Sharded over the ranks: masters, and of what is trained gradients and Adam's two moments. Whole on each rank
    during an update: parameters in the compute dtype and the gradients that are accumulated."""
    train, ranks = recipe.train, plan.world_size
    compute = ITEM_BYTES[train.compute_dtype]
    is_sharded = ranks > 1 or train.compute_dtype != "float32"
    gathered = shape.parameters * compute + 4 * _trained(shape) if is_sharded else 0
    with_critic = 2 if recipe.algorithm.has_critic else 1
    tokens = min(train.micro_batch_tokens, _update_rows(recipe) * _longest_row(recipe, shape))
    is_collective, staged = recipe.weights.transport == "collective", -(-_serving(recipe, shape) // ranks)
    width = ACTIVATIONS_PER_LAYER * shape.hidden + INTERMEDIATE_TENSORS * shape.intermediate
    masters = 4 * shape.parameters + 12 * _trained(shape)
    return [
        Need("masters, gradients and Adam's moments, float32", -(-masters // ranks), True, on_host=is_offloaded),
        *([Need("parameters and gradients, gathered for an update", gathered, True, in_turn=True)] if gathered else []),
        *_companions(recipe, shape, ranks, is_sharded=is_sharded, is_offloaded=is_offloaded),
        Need(
            f"activations of a micro-batch of {tokens} tokens",
            with_critic * tokens * shape.layers * width * compute,
            False,
            in_turn=True,
        ),
        Need("logits, in pieces", min(LOGITS_BYTES, 2 * tokens * shape.vocabulary * 4), False, in_turn=True),
        *([Need("two versions of its shard, for engines", 2 * staged, True)] if is_collective else []),
    ]


def _companions(
    recipe: Recipe, shape: ModelShape, ranks: int, *, is_sharded: bool, is_offloaded: bool
) -> Iterator[Need]:
    """The models beside the policy, taken to be of its size."""
    compute, share = ITEM_BYTES[recipe.train.compute_dtype], -(-shape.parameters // ranks)
    if recipe.algorithm.has_critic:
        yield Need("the critic's masters, gradients and moments, float32", 16 * share, False, on_host=is_offloaded)
        if is_sharded:
            yield Need("the critic, gathered for an update", shape.parameters * (compute + 4), False, in_turn=True)
    is_base = recipe.model.lora is not None and recipe.reference.path is None and recipe.warm_start is None
    if recipe.algorithm.kl is not None and not is_base:
        yield Need("the reference", compute * share, False, on_host=recipe.reference.offload == "all")


def engine_memory(recipe: Recipe, shape: ModelShape, batch: int, *, is_parked: bool = False) -> list[Need]:
    """The embedded engine's: its KV cache has room for every response at its longest. is_parked: its weights leave the
    device between its turns."""
    item = ITEM_BYTES[recipe.model.dtype]
    tokens = _longest_row(recipe, shape)
    return [
        Need("weights", _serving(recipe, shape), True, in_turn=is_parked),
        Need(
            f"KV cache, at most {batch} responses of {tokens} tokens (prompts may be shorter)",
            batch * tokens * shape.kv_elements_per_token * item,
            False,
            in_turn=True,
        ),
    ]


def shared_memory(recipe: Recipe, shape: ModelShape) -> list[Need]:
    """Of a node: what lies in its session directory, and the rows of its shard."""
    versions = recipe.weights.buffers + 2
    what = "adapters" if publishes_adapters(recipe) else "weights"
    published = [Need(f"{versions} published versions of the {what}", versions * _version(recipe, shape), True)]
    rows = Need("rows of the queue's shard, at most (queue.byte_limit_mb)", recipe.queue.byte_limit_mb << 20, True)
    return [*(published if recipe.weights.transport == "shared_memory" else []), rows]


def disk_per_update(recipe: Recipe) -> list[Need]:
    """What every update adds to the run's directory."""
    rows = _update_rows(recipe)
    samples = 2 * recipe.train.batch_groups / recipe.run.samples_every
    return [
        Need("events.jsonl", rows * EVENTS_PER_ROW * EVENT_BYTES, False),
        Need("metrics.jsonl", METRICS_BYTES, False),
        Need("samples.jsonl", round(samples * (SAMPLE_BYTES + 4 * recipe.rollout.max_tokens)), False),
        *([Need("record, for flowrl replay", rows * _recorded_row(recipe), False)] if recipe.run.record else []),
    ]


def _recorded_row(recipe: Recipe) -> int:
    """Its prompt at a usual length, its response at the longest."""
    return RECORDED_ROW_BYTES + 4 * USUAL_PROMPT_TOKENS + RECORDED_TOKEN_BYTES * recipe.rollout.max_tokens


def disk_in_all(recipe: Recipe, shape: ModelShape) -> list[Need]:
    """At the run's end."""
    every = recipe.run.checkpoint_every
    checkpoints = 1 + (min(recipe.run.checkpoints_kept, recipe.train.steps // every) if every else 0)
    has_first_state = recipe.run.record and (recipe.warm_start is not None or recipe.algorithm.has_critic)
    checkpoint = 12 * (_trained(shape) + (shape.parameters if recipe.algorithm.has_critic else 0))
    exports = 2 if recipe.warm_start is not None else 1
    per_update = sum(need.amount for need in disk_per_update(recipe))
    needs = [
        Need(f"logs of {recipe.train.steps} updates", recipe.train.steps * per_update, False),
        Need(f"{checkpoints} checkpoints, with the one being written", checkpoints * checkpoint, True),
        *([Need("the state before the first update, for flowrl replay", checkpoint, True)] if has_first_state else []),
        Need(f"{exports} exported models", exports * _serving(recipe, shape), True),
    ]
    if recipe.weights.transport == "disk":
        versions = recipe.weights.buffers + 2
        needs.append(Need(f"{versions} published versions (weights.dir)", versions * _version(recipe, shape), True))
    return needs


def process_bytes(plan: WorkerPlan) -> int:
    return PROCESS_BYTES["light" if plan.worker == "queue" else "torch"]


def _trained(shape: ModelShape) -> int:
    return shape.adapters or shape.parameters


def _update_rows(recipe: Recipe) -> int:
    return recipe.train.batch_groups * recipe.rollout.group_size


def _longest_row(recipe: Recipe, shape: ModelShape) -> int:
    return min(shape.context, recipe.data.max_prompt_tokens + recipe.rollout.max_tokens)


def _running_rows(recipe: Recipe) -> int:
    """At most, in one engine: what it has places for, or what the bound on staleness admits."""
    groups = (recipe.staleness.max + 1) * recipe.train.batch_groups + recipe.rollout.oversampling
    return min(recipe.rollout.concurrency, groups) * recipe.rollout.group_size


def _version(recipe: Recipe, shape: ModelShape) -> int:
    """Of one published version."""
    return 4 * shape.adapters if publishes_adapters(recipe) else _serving(recipe, shape)


def _serving(recipe: Recipe, shape: ModelShape) -> int:
    return shape.parameters * ITEM_BYTES[recipe.model.dtype]
