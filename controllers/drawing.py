"""Draws a graph and a placement: as text for a terminal, as Mermaid for a page. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from controllers.graph import Edge, Graph
from controllers.placement import WorkerPlan, placement, shared_devices


def graph_text(graph: Graph) -> str:
    """A line a stage, then a line for each of its edges."""
    lines = []
    for stage in graph:
        lines.append(f"{stage.name}  ({stage.kind.value}, by {stage.unit.value}, pool {stage.pool})")
        lines += [f"  -> {edge.target}: {_label(edge)}" for edge in graph.edges if edge.source == stage.name]
    return "\n".join(lines)


def graph_mermaid(graph: Graph) -> str:
    lines = ["flowchart LR"]
    numbers = {stage.name: f"s{index}" for index, stage in enumerate(graph)}
    for stage in graph:
        lines.append(f'    {numbers[stage.name]}["{stage.name}<br/>{stage.kind.value}, {stage.pool}"]')
    for edge in graph.edges:
        arrow = "-.->" if edge.is_optional or not edge.columns else "-->"
        lines.append(f'    {numbers[edge.source]} {arrow}|"{_label(edge)}"| {numbers[edge.target]}')
    return "\n".join(lines)


def plan_table(plans: Sequence[WorkerPlan]) -> str:
    header = ("worker", "node", "rank", "pool", "threads", "devices", "stages")
    rows = [
        (
            plan.name,
            str(plan.node),
            f"{plan.rank}/{plan.world_size}",
            plan.pool,
            str(plan.threads),
            ",".join(plan.devices),
            ",".join(plan.stages),
        )
        for plan in plans
    ]
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    )


def placement_text(plans: Sequence[WorkerPlan], one: str, other: str) -> str:
    """The table, under how these two kinds of worker stand to each other."""
    lines = [f"{one} and {other}: {placement(plans, one, other).value}"]
    for plan in plans:
        for their in plans:
            if (plan.worker, their.worker) == (one, other) and (devices := shared_devices(plan, their)):
                lines.append(f"  node {plan.node}: {plan.name} and {their.name} take turns at {', '.join(devices)}")
    return "\n".join([*lines, "", plan_table(plans)])


def _label(edge: Edge) -> str:
    if not edge.columns:
        return "after"
    return ", ".join(edge.columns) + (" (optional)" if edge.is_optional else "")
