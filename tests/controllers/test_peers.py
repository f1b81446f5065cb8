"""Nodes that do not come are not waited for without end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ALONE = """
import os, time
from controllers.peers import TorchPeers
from controllers.topology import Topology
topology = Topology.from_environment()
if topology.node == 1:
    peers = TorchPeers(topology, "lo", start_s=2.0, timeout_s=2.0, on_lost=lambda node, reason: None)
    try:
        peers.start()
    except TimeoutError as error:
        print(f"said: {error}", flush=True)
    os._exit(0)
"""


def test_a_node_whose_peer_never_comes_says_so_in_time(tmp_path: Path) -> None:
    script = tmp_path / "alone.py"
    script.write_text(ALONE)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launcher, capture_output=True, text=True, timeout=60, env=environment, check=False)
    assert "said: node 1: the 2 nodes have not met in 2 s" in done.stdout, done.stdout + done.stderr
