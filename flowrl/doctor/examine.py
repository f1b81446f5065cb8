"""Lays what a run needs beside what the machine has, device by device, and says what does not fit."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from controllers.lifecycle import default_root
from controllers.placement import HOST_DEVICE, WorkerPlan, backing_device, sharing
from flowrl.doctor import estimate
from flowrl.doctor.estimate import Need
from flowrl.doctor.machine import Machine, look, package_versions, sglang_version
from flowrl.doctor.shape import ModelShape, shape_of
from flowrl.pipeline import Pipeline

MIN_OPEN_FILES = 4096
FILES_PER_ENGINE = 512


@dataclass
class Diagnosis:
    """sections: (title, lines). problems: what will not work. doubts: what may be slow or short."""

    sections: list[tuple[str, list[str]]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)


def examine(built: Pipeline, node: int, num_nodes: int, nodes_on_host: int) -> Diagnosis:
    """Of the workers that this node would have, times the nodes on this host. Raises ValueError for a model directory
    that is none."""
    recipe = built.recipe
    shape = shape_of(recipe)
    root = Path(recipe.run.session_dir) if recipe.run.session_dir is not None else default_root()
    machine = look(root, Path(recipe.run.dir))
    plans = [plan for plan in built.workers if plan.node == node]
    found = Diagnosis()
    _environment(found, built, machine)
    _memory(found, built, plans, shape, machine, nodes_on_host)
    _place(found, f"Shared memory ({root})", estimate.shared_memory(recipe, shape), machine.shared_free, nodes_on_host)
    per_update = estimate.disk_per_update(recipe)
    found.sections.append(("Disk, an update", _lines(per_update)))
    _place(found, f"Disk ({recipe.run.dir})", estimate.disk_in_all(recipe, shape), machine.disk_free, 1)
    found.sections.append(("Ports", ports(built, num_nodes, is_on_one_host=nodes_on_host == num_nodes)))
    return found


def _environment(found: Diagnosis, built: Pipeline, machine: Machine) -> None:
    recipe = built.recipe
    versions = package_versions()
    lines = [
        f"python {sys.version.split()[0]}, {', '.join(f'{name} {text}' for name, text in versions.items() if text)}"
    ]
    found.problems += [f"{name} is not installed" for name, text in versions.items() if not text]
    lines.append(f"{machine.cores} cores, {size(machine.memory)} of memory, {len(machine.gpus)} GPUs")
    for name in recipe.rollout_stages:
        rollout = recipe.producer(name).rollout
        if rollout.engine != "sglang":
            continue
        python = rollout.python or sys.executable
        version = sglang_version(python)
        lines.append(f"sglang {version or 'missing'} in {python}")
        if not version:
            field = "rollout" if name == "rollout" else f"producers.{name}"
            found.problems.append(f"{field}.python: {python!r} has no sglang, and its engine is sglang")
    engines = sum(plan.worker in recipe.rollout_stages for plan in built.workers)
    wanted = max(MIN_OPEN_FILES, FILES_PER_ENGINE * engines)
    lines.append(f"open files: at most {machine.open_files} a process")
    if machine.open_files < wanted:
        found.doubts.append(
            f"open files: {machine.open_files}; many connections may need {wanted} (ulimit -n {wanted})"
        )
    found.sections.append(("Environment", lines))


def _memory(
    found: Diagnosis,
    built: Pipeline,
    plans: Sequence[WorkerPlan],
    shape: ModelShape,
    machine: Machine,
    nodes_on_host: int,
) -> None:
    """By device: what its workers need, together, beside what it has. Of those that take turns at it, one at a time has
    what it gives back."""
    guess = " (a guess: it is yet to be made)" if shape.is_guessed else ""
    lines = [f"model: {shape.parameters:,} parameters, {shape.layers} layers{guess}"]
    totals: dict[str, int] = defaultdict(int)
    turn_takers = sharing(plans, "rollout", "train")
    in_turn: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for plan in plans:
        device = backing_device(plan.devices[0])
        needs = estimate.worker_memory(plan, built.recipe, shape)
        totals[HOST_DEVICE] += estimate.process_bytes(plan)
        for need in needs:
            if need.in_turn and plan.name in turn_takers:
                in_turn[plan.devices[0]][plan.name] += need.amount
            else:
                totals[HOST_DEVICE if need.on_host else device] += need.amount
        lines.append(f"{plan.name} on {device}: {size(sum(need.amount for need in needs))}")
        lines += [f"  {line}" for line in _lines(needs)]
    for shared, amounts in in_turn.items():
        totals[backing_device(shared)] += max(amounts.values())
        lines.append(f"{' and '.join(sorted(amounts))} take turns at {shared}: only the larger share counts")
    totals[HOST_DEVICE] += estimate.PROCESS_BYTES["light"] * 2  # the controller and the queue's shard
    for device, total in sorted(totals.items()):
        times = nodes_on_host if device == HOST_DEVICE else 1
        has = _device_bytes(device, machine, found)
        if has is not None:
            lines.append(f"{device}: {size(total * times)} of {size(has)}" + (f" ({times} nodes)" if times > 1 else ""))
            if total * times > has:
                found.problems.append(f"memory of {device}: {size(total * times)} needed, {size(has)} there")
    threads = (
        sum(plan.threads for plan in plans if plan.worker in ("train", *built.recipe.rollout_stages)) * nodes_on_host
    )
    if threads > machine.cores:
        found.doubts.append(f"threads: {threads} for rollout and training, and {machine.cores} cores (pools.*.threads)")
    found.sections.append(("Memory by device", lines))


def _device_bytes(device: str, machine: Machine, found: Diagnosis) -> int | None:
    if device == HOST_DEVICE:
        return machine.memory
    kind, _, number = device.partition(":")
    if kind == "cuda" and int(number or 0) < len(machine.gpus):
        return machine.gpus[int(number or 0)]
    found.problems.append(f"device {device}: this machine has {len(machine.gpus)} GPUs")
    return None


def _place(found: Diagnosis, title: str, needs: Sequence[Need], free: int, times: int) -> None:
    total = sum(need.amount for need in needs) * times
    nodes = f" for {times} nodes" if times > 1 else ""
    found.sections.append((title, [*_lines(needs), f"{size(total)}{nodes} of {size(free)} free"]))
    if total > free:
        found.problems.append(f"{title}: {size(total)} needed, {size(free)} free")


def ports(built: Pipeline, num_nodes: int, *, is_on_one_host: bool) -> list[str]:
    """Which the run listens on, on which interface, and who must reach them."""
    lines = []
    network = built.recipe.network.interface
    stages = built.recipe.rollout_stages
    if any(built.recipe.producer(name).rollout.engine == "sglang" for name in stages):
        lines.append("loopback: one for each SGLang server, free ones, reached by its own worker only")
    if num_nodes == 1:
        return lines or ["none: one node's workers speak through sockets in its session directory"]
    lines.append("MASTER_ADDR:MASTER_PORT (torchrun's store), all interfaces of node 0, reached by all nodes")
    lines.append(f"{network}: torch RPC between controllers and gloo or NCCL between ranks, free ones, on every node")
    if not is_on_one_host:
        lines.append(f"{network}: one for each node's shard of the queue (ZeroMQ, CURVE), a free one")
    return lines


def size(amount: int) -> str:
    for unit, step in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if amount >= 1 << step:
            return f"{amount / (1 << step):.1f} {unit}"
    return f"{amount} B"


def _lines(needs: Sequence[Need]) -> list[str]:
    return [f"{'' if need.is_exact else 'about '}{size(need.amount)}  {need.what}" for need in needs]
