"""Which workers a node has, how each is to be started, and when it may be: what follows from graph, placement and
settings. No processes here: those are `supervisor.py`'s, and what becomes of the run is `node.py`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from controllers.graph import Graph
from controllers.placement import WorkerPlan, joined
from controllers.settings import WorkerSettings, refuse_unknown_workers, worker_settings_of
from controllers.stage import Kind


class Crew:
    """plans: the placement of all nodes; given: settings by the name of a worker or of its kind. finished: workers of
    all nodes that have done their work."""

    def __init__(
        self, node: int, graph: Graph, plans: Sequence[WorkerPlan], given: Mapping[str, WorkerSettings]
    ) -> None:
        refuse_unknown_workers(plans, given)
        self.finished: set[str] = set()
        self._node = node
        self._graph = graph
        self._all = tuple(plans)
        self._given = given
        self._plans: dict[str, WorkerPlan] = {}
        self._settings: dict[str, WorkerSettings] = {}
        for plan in plans:
            if plan.node == node:
                self.add(plan, worker_settings_of(plan, graph, given))
        self._drivers = {plan.name for plan in plans if graph.stage(plan.stages[0]).kind is Kind.DRIVER}

    def __iter__(self) -> Iterator[str]:
        """The names of this node's workers."""
        return iter(self._plans)

    def add(self, plan: WorkerPlan, settings: WorkerSettings) -> None:
        self._plans[plan.name] = plan
        self._settings[plan.name] = settings

    def plan(self, name: str) -> WorkerPlan:
        return self._plans[name]

    def settings(self, name: str) -> WorkerSettings:
        return self._settings[name]

    def may_start(self, name: str) -> bool:
        """Whether its stages wait for no other stage's end any more."""
        stages = self._plans[name].stages
        earlier = {other for stage in stages for other in self._graph.stage(stage).after} - set(stages)
        return {plan.name for plan in self._all if earlier.intersection(plan.stages)} <= self.finished

    @property
    def has_finished(self) -> bool:
        """All drivers of all nodes have."""
        return bool(self._drivers) and self._drivers <= self.finished

    def resize(self, kind: str, count: int) -> tuple[list[str], list[str]]:
        """(names of those that are to be there, of those that are to leave), for so many workers of the kind on this
        node, as far as its settings allow. Who was not there before is there now."""
        present = sum(plan.worker == kind for plan in self._plans.values())
        most = self._settings[self._name(kind, 0)].get("most", 0) if present else 0
        if not most:
            return [], []
        wanted = min(count, most)
        for index in range(present, wanted):
            plan = joined(self._all, kind, self._node, index)
            self.add(plan, worker_settings_of(plan, self._graph, self._given))
        names = [self._name(kind, index) for index in range(max(present, wanted))]
        return names[:wanted], names[wanted:]

    def _name(self, kind: str, index: int) -> str:
        return f"{kind}.{self._node}.{index}"
