"""As much of Slurm as a batch script of ours asks for, on hosts that are network namespaces.

`srun` starts a command on one host (-w) or, told which it is, on every one of the job; `scontrol show hostnames` lists
them. What a job allocates, and when, is not imitated.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.integration.hosts import Host
from tests.integration.runs import ROOT

SRUN = """#!/bin/bash
only=
while [[ $1 == -* ]]; do
  if [[ $1 == -w ]]; then only=$2; shift; fi
  shift
done
if [[ $only ]]; then exec ip netns exec "$only" "$@"; fi
number=0
for host in $SLURM_JOB_NODELIST; do
  (cd "$HOMES/host$number" && SLURM_NODEID=$number exec ip netns exec "$host" "$@") &
  number=$((number + 1))
done
code=0
for task in $(jobs -p); do wait "$task" || code=$?; done
exit $code
"""
SCONTROL = """#!/bin/bash
[[ $1 == show && $2 == hostnames ]] && printf '%s\\n' $3
"""


@contextlib.contextmanager
def batch_job(script: str, machines: Sequence[Host], homes: Path) -> Iterator[subprocess.Popen[str]]:
    """`sbatch`: the script in a process of its own, outputs together. A task's working directory is host0, host1, … in
    `homes`. All processes of all hosts are killed on the way out."""
    tools = homes / "slurm"
    tools.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "job": script}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PATH": f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOMES": str(homes),
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NODELIST": " ".join(host.namespace for host in machines),
        "SLURM_JOB_NUM_NODES": str(len(machines)),
    }
    process = subprocess.Popen(
        [str(tools / "job")], cwd=homes, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        for host in machines:
            host.lose_power()
        process.wait(10)
        assert process.stdout is not None
        process.stdout.close()
