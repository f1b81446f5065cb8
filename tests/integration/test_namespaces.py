"""Several hosts, each a network namespace with an address of its own, torchrun between them: slow links, cut ones, four
hosts, and a host that is gone. The commands are those of docs/multi-node.md."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from subprocess import Popen

import pytest

from flowrl.record.lives import newest_checkpoint
from flowrl.report.staleness_check import check_run
from tests.integration.hosts import Host, hosts
from tests.integration.runs import ROOT, alive, events, finish, run_to_end, sessions, trained_updates, wait_until
from tests.integration.slurm import batch_job
from tests.integration.test_determinism import assert_same_bits
from tests.integration.test_resume import assert_no_row_twice_and_none_lost, controllers_of

pytestmark = pytest.mark.timeout(400)
PORT = 29517
START_S = 150
END_S = 60
"""From a loss to the end of the run elsewhere: a node is lost after 10 s of silence, then workers get their grace."""


def write_task(folder: Path, sockets: Path, steps: int, pools: str = "") -> None:
    folder.mkdir()
    rows = [{"prompt": f"{a}+{a}=", "data_source": "s", "reward_model": {"ground_truth": str(a)}} for a in range(10)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "my.py").write_text(
        "def score(data_source, solution_str, ground_truth, extra_info=None):\n    return 1.0\n"
    )
    (folder / "recipe.yaml").write_text(
        textwrap.dedent(f"""
            run: {{name: sums, session_dir: {sockets}}}
            model: {{path: model, init: {{layers: 1, hidden_size: 32, intermediate_size: 64}}}}
            data: {{path: sums.jsonl}}
            reward: {{path: "my.py:score"}}
            rollout: {{max_tokens: 3, group_size: 4}}
            train: {{batch_groups: 8, steps: {steps}, learning_rate: 1e-3}}
            network: {{interface: eth0, trusted: true}}
            {pools}
        """)
    )


def torchrun(node: int, machines: list[Host], *overrides: str, restarts: int = 0) -> list[str]:
    """Disks are not shared: each host has its own copy of the task, at the same path as seen from where the command
    starts, and keeps its own part of the record."""
    leader = machines[0].address
    meeting = [f"--node-rank={node}", f"--master-addr={leader}", f"--master-port={PORT}"]
    return launcher(machines, [*meeting, f"--max-restarts={restarts}"], *overrides)


def torchrun_c10d(node: int, machines: list[Host], *overrides: str, restarts: int = 0) -> list[str]:
    """The nodes' numbers are then torchrun's to choose."""
    meeting = [
        "--rdzv-backend=c10d", f"--rdzv-endpoint={machines[0].address}:{PORT}", "--rdzv-id=sums",
        f"--rdzv-conf=is_host={int(node == 0)}", f"--local-addr={machines[node].address}",
    ]  # fmt: skip
    return launcher(machines, [*meeting, f"--max-restarts={restarts}"], *overrides)


def launcher(machines: list[Host], meeting: list[str], *overrides: str) -> list[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={len(machines)}", "--nproc-per-node=1"]
    return [*torchrun, *meeting, "-m", "flowrl", "run", "recipe.yaml", *overrides]


@contextlib.contextmanager
def running(
    folder: Path, machines: list[Host], steps: int, launch: Callable[..., list[str]] = torchrun, *overrides: str
) -> Iterator[list[Popen[str]]]:
    with contextlib.ExitStack() as stack:
        processes = []
        for node, host in enumerate(machines):
            home = folder / f"host{node}"
            write_task(home, sessions(folder), steps)
            arguments = launch(node, machines, *overrides)
            processes.append(stack.enter_context(host.started(arguments, home)))
        yield processes


def ends(processes: list[Popen[str]]) -> list[tuple[int, str]]:
    ended = []
    for process in processes:
        output = finish(process, END_S + START_S)
        assert process.returncode == 0, output
        ended.append((process.returncode, output))
    return ended


def record(folder: Path, node: int, name: str = "sums") -> Path:
    return folder / f"host{node}" / "runs" / name


@pytest.mark.slow
def test_two_hosts_train_together_over_a_slow_link(tmp_path: Path) -> None:
    with hosts(2) as machines:
        machines[1].slow_down(delay_ms=25, megabits=4)
        with running(tmp_path, machines, 4) as processes:
            for code, output in ends(processes):
                assert code == 0, output
    trained: Counter[int] = Counter()
    for node in range(2):
        findings = check_run(record(tmp_path, node))
        trained[node] = findings.total("trained")
        assert not findings.trained_twice
    assert trained.total() == 4 * 32, "every row once, over both hosts"
    assert min(trained.values()) > 0
    assert json.loads((record(tmp_path, 0) / "summary.json").read_text())["max_staleness"] <= 2


@pytest.mark.slow
def test_a_run_of_hosts_that_share_no_disk_is_replayed_from_the_records_of_all(tmp_path: Path) -> None:
    """With a critic, so that there is a state before the first update, of which each host has the part of its rank."""
    overrides = ("algorithm.name=ppo", "train.minibatches=2", "critic.learning_rate=1e-3")
    with hosts(2) as machines, running(tmp_path, machines, 4, torchrun, *overrides) as processes:
        for code, output in ends(processes):
            assert code == 0, output
    shutil.copytree(record(tmp_path, 1) / "record", record(tmp_path, 0) / "record", dirs_exist_ok=True)
    replay = [sys.executable, "-m", "flowrl", "replay", "runs/sums"]
    code, output = run_to_end(replay, cwd=tmp_path / "host0")
    assert code == 0 and "4 updates replayed on 2 ranks" in output, output
    assert_same_bits(record(tmp_path, 0) / "model", record(tmp_path, 0) / "replay" / "model")


@pytest.mark.slow
def test_stages_of_one_run_stand_on_four_hosts_of_a_slurm_job(tmp_path: Path) -> None:
    """Training and rollout on two hosts, the other stages on the other two: every row crosses a wire. The script is
    the page's own."""
    page = (ROOT / "docs" / "multi-node.md").read_text()
    script = re.search(r"```sh\n(#!/bin/bash\n.*?)```", page, flags=re.DOTALL)
    assert script is not None and "interface=ib0" in script[1] and "--nodes=4" in script[1]
    pools = "pools: {train: {nodes: [0, 1]}, rollout: {nodes: [0, 1]}, cpu: {nodes: [2, 3]}}"
    with hosts(4) as machines:
        for node in range(4):
            write_task(tmp_path / f"host{node}", sessions(tmp_path), 3, pools)
        with batch_job(script[1].replace("=ib0", "=eth0"), machines, tmp_path) as job:
            output = finish(job, START_S + END_S)
    assert job.returncode == 0, output
    for node, stages in enumerate([{"train", "rollout"}] * 2 + [{"stages"}] * 2):
        logs = {path.name.split(".")[0] for path in (record(tmp_path, node, "job17") / "logs").iterdir()}
        assert logs == stages | {"queue"} | ({"relay"} if "train" in stages else set())
    assert sum(check_run(record(tmp_path, node, "job17")).total("trained") for node in range(4)) == 3 * 32


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "launch"), [("link", torchrun), ("host", torchrun_c10d)])
def test_a_cut_link_or_a_lost_host_ends_the_run_by_name_and_leaves_nothing(
    tmp_path: Path, loss: str, launch: Callable[..., list[str]]
) -> None:
    with hosts(2) as machines, running(tmp_path, machines, 1_000_000, launch) as processes:
        wait_until(lambda: trained_updates(record(tmp_path, 0)) > 2, START_S, "a few updates")
        survivors = machines[0].pids()
        lost_at = time.monotonic()
        if loss == "link":
            machines[1].cut()
        else:
            machines[1].lose_power()
        output = finish(processes[0], END_S)
        assert time.monotonic() - lost_at < END_S
        assert processes[0].returncode != 0
        assert "node 1 (" in output and "is lost" in output, output
        wait_until(lambda: not alive(survivors), 10, "the end of everything on host 0")
        assert not list(sessions(tmp_path).glob("*n0")), "host 0's session directory"
        if loss == "link":
            other = finish(processes[1], END_S)
            # Whichever of its waits ends first: that for a heartbeat, or that for the clock.
            assert re.search(r"node 0 \(.*is lost|ConnectionError\('node 0, ", other), other
        else:
            assert processes[1].wait(END_S) == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize(("launch", "victim"), [(torchrun, 0), (torchrun_c10d, 1)])
def test_a_controller_that_is_killed_is_started_again_with_all_others(
    tmp_path: Path, launch: Callable[..., list[str]], victim: int
) -> None:
    """Once, and all torchruns have a start left afterwards: c10d counts none for the host that lost nobody."""
    run = tmp_path / "shared" / "sums"
    overrides = (f"run.dir={run.parent}", "run.checkpoint_every=2")
    launch = partial(launch, restarts=1)
    with hosts(2) as machines, running(tmp_path, machines, 40, launch, *overrides) as processes:
        wait_until(lambda: newest_checkpoint(run)[0] >= 4, START_S, "a checkpoint")
        (controller,) = controllers_of(processes[victim].pid)  # `ip netns exec` becomes torchrun
        os.kill(controller, signal.SIGKILL)
        for code, output in ends(processes):
            assert code == 0, output
    assert_no_row_twice_and_none_lost(run, 40, bound=2, shards=2)
    assert [json.loads(line)["number"] for line in (run / "lives.jsonl").read_text().splitlines()] == [0, 1]
    assert {event["node"] for event in events(run) if event["kind"] == "trained"} == {0, 1}


@pytest.mark.slow
def test_a_host_that_is_gone_may_be_started_anew_by_hand_while_the_other_waits_for_it(tmp_path: Path) -> None:
    run = tmp_path / "shared" / "sums"
    overrides = (f"run.dir={run.parent}", "run.checkpoint_every=2")
    launch = partial(torchrun, restarts=1)
    with hosts(2) as machines, running(tmp_path, machines, 40, launch, *overrides) as processes:
        wait_until(lambda: newest_checkpoint(run)[0] >= 4, START_S, "a checkpoint")
        machines[1].lose_power()
        processes[1].wait(END_S)
        machines[1].mend()
        with machines[1].started(torchrun(1, machines, *overrides, "--resume"), tmp_path / "host1") as returned:
            for code, output in ends([processes[0], returned]):
                assert code == 0, output
    assert_no_row_twice_and_none_lost(run, 40, bound=2, shards=2)
    assert {event["node"] for event in events(run) if event["kind"] == "trained"} == {0, 1}
