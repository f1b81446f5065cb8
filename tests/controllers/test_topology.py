"""torchrun's environment is read in one place, whole or not at all, and is kept from workers."""

from __future__ import annotations

import pytest

from controllers.topology import Topology, without_torchrun

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_RESTART_COUNT": "2",
}


def test_without_torchrun_a_process_is_alone() -> None:
    alone = Topology.from_environment({"PATH": "/bin"})
    assert (alone.node, alone.num_nodes, alone.is_on_one_host) == (0, 1, True)
    assert alone.run_id.startswith("pid")


def test_torchrun_says_which_node_this_is() -> None:
    topology = Topology.from_environment(TORCHRUN)
    assert (topology.node, topology.num_nodes, topology.local_node, topology.nodes_on_host) == (3, 4, 1, 2)
    assert (topology.master_addr, topology.master_port, topology.restart) == ("10.0.0.1", 29500, 2)
    assert topology.run_id == "port29500"
    assert not topology.is_on_one_host
    assert Topology.from_environment({**TORCHRUN, "TORCHELASTIC_RUN_ID": "x7"}).run_id == "x7"


@pytest.mark.parametrize("change", [{"RANK": "4"}, {"LOCAL_RANK": "2"}, {"WORLD_SIZE": "many"}, {"RANK": ""}])
def test_nonsense_is_refused_by_name(change: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=rf"^{next(iter(change))}: "):
        Topology.from_environment({**TORCHRUN, **change})


def test_workers_see_nothing_of_torchrun() -> None:
    assert without_torchrun({**TORCHRUN, "HOME": "/root"}) == {"HOME": "/root"}
