"""One long run in which everything is killed, again and again; what it leaves must be what an undisturbed run leaves.

    python benchmarks/kill_rounds.py [--rounds 100] [--minutes M] [--nodes 1] [--seed 0] [--out RESULT.md]

A round kills one process with SIGKILL, at a moment of chance after the last was overcome: an engine, the stages, the
evaluation, a trainer rank, a shard of the queue, a controller (with which its workers die), and on two nodes a relay
or an engine of either. The run goes on by its own means, after the death of a lone controller by `--resume`. Rows are
scored slowly, so that kills do not wait for the trainer. After so many rounds or minutes the run goes to its end
and is judged:

- every update holds its number of rows, and no row is trained twice, in none of the lives that count;
- no token is older than the bound, by the event log alone (`flowrl.report.staleness_check`);
- no kill undoes more updates than lie between two checkpoints, those being written or begun included;
- the reward of every tenth of the run is that of another run of as many updates which nobody disturbs.

Exit code 1 if one of these does not hold.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
GROUP, BATCH, BOUND = 4, 32, 2
CHECKPOINT_EVERY = 2
UNDONE_UPDATES = 2 * CHECKPOINT_EVERY + BOUND
"""By one kill, at most: since the last checkpoint, while another is being written behind the trainer's back."""
UPDATES_AFTER = BOUND + 2
"""Until all is as before: more than can lie sampled in the queue."""
PATIENCE_S = 600.0
TOLERANCE = 0.05
TENTHS = 10
VICTIMS = (
    "rollout", "stages", "train", "evaluate", "rollout", "queue", "stages", "evaluate", "rollout", "controller",
)  # fmt: skip
LAST_UPDATES = 20


def share_of_vowels(data_source: str, solution_str: str, ground_truth: Any, extra_info: Any = None) -> float:
    """A reward that an untrained model gets some of."""
    return sum(letter in "aeiou" for letter in solution_str) / max(1, len(solution_str))


def share_of_vowels_slowly(data_source: str, solution_str: str, ground_truth: Any, extra_info: Any = None) -> float:
    time.sleep(0.012)
    return share_of_vowels(data_source, solution_str, ground_truth)


@dataclass
class Run:
    """One run in a directory of its own. process: of its present start."""

    folder: Path
    sessions: Path
    name: str
    nodes: int
    reward: str
    process: subprocess.Popen[bytes] | None = None
    _read: int = 0
    _updates: int = 0

    @property
    def directory(self) -> Path:
        return self.folder / "runs" / self.name

    def start(self, steps: int, resume: bool = False) -> None:
        launcher = ["-m", "flowrl"]
        if self.nodes > 1:
            elastic = [f"--nproc-per-node={self.nodes}", "--max-restarts=1000000", "--standalone"]
            launcher = ["-m", "torch.distributed.run", *elastic, "-m", "flowrl"]
        command = [
            sys.executable, *launcher, "run", str(ROOT / "recipes" / "quickstart.yaml"), f"run.name={self.name}",
            f"run.dir={self.folder}/runs", f"model.path={self.folder}/model", f"run.session_dir={self.sessions}",
            "data.size=60000", "data.held_out=20", "data.dev=0", "warm_start=null", "eval={every: 2, limit: 20}",
            "reward.name=null", f"reward.path={__file__}:{self.reward}", f"staleness.max={BOUND}",
            f"train.batch_groups={BATCH // GROUP}", f"rollout.group_size={GROUP}", f"train.steps={steps}",
            "train.learning_rate=2e-5", "train.warmup_steps=0", "train.schedule=constant", "train.decay_steps=null",
            f"run.checkpoint_every={CHECKPOINT_EVERY}", "run.restarts=1000000", "run.record=false",
            *(["--resume"] if resume else []),
        ]  # fmt: skip
        with (self.folder / f"{self.name}.out").open("ab") as output:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            )  # fmt: skip

    def workers(self) -> dict[str, int]:
        """Worker, or controller.N, -> pid."""
        assert self.process is not None, "the run has not been started"
        found = {"controller.0": self.process.pid} if self.nodes == 1 else {}
        with suppress(psutil.Error):  # gone meanwhile
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with suppress(psutil.Error):  # gone meanwhile
                    line = " ".join(child.cmdline())
                    match = re.search(r"-m controllers\.worker (\S+)", line)
                    if match:
                        found[match.group(1)] = child.pid
                    elif self.nodes > 1 and re.search(r"-m flowrl run|/flowrl/__main__\.py run", line):
                        rank = child.environ().get("RANK")  # torchrun itself has none
                        if rank is not None:
                            # A child of a controller looks like it until it has become what it is to be.
                            found.setdefault(f"controller.{rank}", child.pid)
        return found

    def lives(self) -> int:
        path = self.directory / "lives.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def trained(self) -> int:
        """How many of the updates of the log have been trained, whether they count or not."""
        path = self.directory / "events.jsonl"
        if path.exists():
            with path.open("rb") as file:
                file.seek(self._read)
                whole, end, _ = file.read().rpartition(b"\n")
            self._read += len(whole) + len(end)
            self._updates += sum(b'"kind":"published"' in line for line in whole.splitlines())
        return self._updates

    def has_checkpoint(self) -> bool:
        return any(self.directory.glob("checkpoints/step_*"))

    def tail(self) -> str:
        return (self.folder / f"{self.name}.out").read_text(errors="replace")[-3000:]

    def wait_until(self, condition: Any, what: str) -> None:
        assert self.process is not None, "the run has not been started"
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            if self.process.poll() is not None:
                raise RuntimeError(f"the run ended, with {self.process.returncode}, before {what}:\n{self.tail()}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"waited {PATIENCE_S:.0f} s for {what}:\n{self.tail()}")
            time.sleep(0.05)

    def finish(self) -> None:
        assert self.process is not None, "the run has not been started"
        if self.process.wait(3 * PATIENCE_S):
            raise RuntimeError(f"the run ended with {self.process.returncode}:\n{self.tail()}")

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait(10)


@dataclass
class Tally:
    """What was killed, and how long until all was as before, in seconds, by kind."""

    kills: Counter[str] = field(default_factory=Counter)
    overcome_s: dict[str, list[float]] = field(default_factory=dict)

    def add(self, kind: str, seconds: float) -> None:
        self.kills[kind] += 1
        self.overcome_s.setdefault(kind, []).append(seconds)

    def table(self) -> str:
        lines = [
            f"| killed | times | until it was back and {UPDATES_AFTER} updates were trained, median (longest) |",
            "|---|---|---|",
        ]
        for kind, seconds in sorted(self.overcome_s.items()):
            lines.append(f"| {kind} | {self.kills[kind]} | {statistics.median(seconds):.1f} s ({max(seconds):.1f} s) |")
        return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    given = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that nothing is left running
    sys.path[0] = str(ROOT)  # some benchmarks in this folder have the names of packages
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory(dir="/dev/shm") as sessions:
        run = Run(Path(folder), Path(sessions), "killed", given.nodes, "share_of_vowels_slowly")
        calm = Run(Path(folder), Path(sessions), "calm", given.nodes, "share_of_vowels")
        try:
            tally, steps = disturb(run, given.rounds, given.minutes, random.Random(given.seed))
            calm.start(steps)
            calm.finish()
            failures, lines = judge(run, calm, steps, tally)
        finally:
            run.stop()
            calm.stop()
        left = sorted(path.name for path in Path(sessions).iterdir())
        failures += [f"left behind in the session directory: {left}"] if left else []
    minutes = (time.monotonic() - began) / 60
    command = f"python benchmarks/kill_rounds.py --rounds {given.rounds} --nodes {given.nodes} --seed {given.seed}"
    command += "" if given.minutes is None else f" --minutes {given.minutes:g}"
    head = f"`{command}`, {time.strftime('%Y-%m-%d')}, {platform.machine()}, {len(os.sched_getaffinity(0))} cores, "
    head += f"load average at the end {os.getloadavg()[2]:.0f}, {tally.kills.total()} rounds, "
    verdict = "; ".join(failures) if failures else "everything held"
    text = "\n\n".join([f"{head}{minutes:.1f} minutes.", tally.table(), "\n".join(lines), f"Verdict: {verdict}."])
    print(text)
    if given.out is not None:
        given.out.write_text(f"# Kill rounds\n\n{text}\n", encoding="utf-8")
    return 1 if failures else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--minutes", type=float, help="after which no further round begins")
    parser.add_argument("--nodes", type=int, default=1, choices=(1, 2))
    parser.add_argument("--seed", type=int, default=0, help="of whom and when")
    parser.add_argument("--out", type=Path, help="where the result goes, as a page")
    return parser.parse_args(arguments)


def disturb(run: Run, rounds: int, minutes: float | None, chance: random.Random) -> tuple[Tally, int]:
    """The kills, and then the run to its end; of how many updates it was."""
    tally = Tally()
    endless = 1_000_000
    run.start(endless)
    run.wait_until(run.has_checkpoint, "the first checkpoint")
    until = time.monotonic() + 60 * (minutes or 1e6)
    for number in range(rounds):
        if time.monotonic() > until:
            break
        kind = VICTIMS[number % len(VICTIMS)]
        if run.nodes > 1 and number % len(VICTIMS) in (3, 8):
            kind = "relay"
        seconds = kill(run, kind, chance, endless)
        tally.add(kind, seconds)
        print(f"round {number + 1}: {kind}, {seconds:.1f} s", file=sys.stderr, flush=True)
    run.stop()
    steps = newest_step(run) + LAST_UPDATES
    run.start(steps, resume=True)
    run.finish()
    return tally, steps


def kill(run: Run, kind: str, chance: random.Random, endless: int) -> float:
    """One round: a moment of chance, the kill, and everything as before. How long it took from the kill on."""
    time.sleep(chance.uniform(0.0, 1.0))
    living = run.workers()
    victim = chance.choice(sorted(name for name in living if name.startswith(f"{kind}.")))
    lives, pid = run.lives(), living[victim]
    began = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    if kind == "controller" and run.nodes == 1:
        assert run.process is not None, "it was killed"
        run.process.wait(10)
        wait_for_end(set(living.values()) - {pid})
        run.start(endless, resume=True)
    run.wait_until(lambda: run.workers().get(victim, pid) != pid, f"{victim} to come back")
    if kind in ("controller", "train", "queue"):
        run.wait_until(lambda: run.lives() > lives, "another life")
    trained = run.trained()
    run.wait_until(lambda: run.trained() > trained + UPDATES_AFTER, f"updates after the death of {victim}")
    return time.monotonic() - began


def wait_for_end(pids: set[int]) -> None:
    deadline = time.monotonic() + 10
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids):
        if time.monotonic() > deadline:
            raise RuntimeError("workers outlive their controller by 10 s")
        time.sleep(0.02)


def newest_step(run: Run) -> int:
    return max(int(path.name.removeprefix("step_")) for path in run.directory.glob("checkpoints/step_*"))


def judge(run: Run, calm: Run, steps: int, tally: Tally) -> tuple[list[str], list[str]]:
    """What does not hold, and lines for people."""
    from flowrl.report.staleness_check import check_run

    findings = check_run(run.directory)
    trained = findings.total("trained") - findings.undone
    hard = findings.lives - 1
    failures = []
    if trained != steps * BATCH or findings.last_update != steps - 1:
        failures.append(f"{trained} rows in updates up to {findings.last_update}, not {steps * BATCH} in {steps}")
    if not findings.is_clean:
        failures.append(
            f"{len(findings.violations)} violations of the bound, {len(findings.trained_twice)} rows trained twice, "
            f"{len(findings.repeated)} by several attempts, {len(findings.split_groups)} groups split"
        )
    if findings.undone > hard * UNDONE_UPDATES * BATCH:
        failures.append(f"{findings.undone / BATCH:.0f} updates undone by {hard} restarts")
    rewards, others = rewards_by_tenth(run, steps), rewards_by_tenth(calm, steps)
    means, calm_means = ([statistics.fmean(tenth) for tenth in curve] for curve in (rewards, others))
    difference = max(abs(one - other) for one, other in zip(means, calm_means, strict=True))
    allowed = max(TOLERANCE, noise(others))
    if difference > allowed:
        failures.append(f"the reward of a tenth differs by {difference:.3f}, more than {allowed:.3f}")
    stale = ", ".join(f"{lag}: {rows}" for lag, rows in sorted(findings.rows_by_staleness.items()))
    lines = [
        f"- {steps} updates, {trained} rows trained that count, {steps * BATCH} wanted; lives: {findings.lives}",
        f"- updates undone, in all: {findings.undone / BATCH:.1f}, {findings.undone / BATCH / max(1, hard):.1f} a life",
        f"- rows by staleness (bound {BOUND}): {stale}; violations: {len(findings.violations)}",
        f"- rows lost with their engines and sampled anew: {findings.total('lost')}",
        "- reward by tenths: " + ", ".join(f"{reward:.3f}" for reward in means),
        "- undisturbed:      " + ", ".join(f"{reward:.3f}" for reward in calm_means),
        f"- largest difference: {difference:.3f} (allowed: {allowed:.3f}, the larger of {TOLERANCE} and of chance)",
    ]
    return failures, lines


def rewards_by_tenth(run: Run, steps: int) -> list[list[float]]:
    """The mean reward of every update."""
    from flowrl.report.record import RunRecord

    series = RunRecord.read(run.directory).series("critic/score/mean")
    by_step = dict(zip(series.step.astype(int).tolist(), series.value.tolist(), strict=True))
    if sorted(by_step) != list(range(1, steps + 1)):
        raise RuntimeError(f"{run.name}: metrics.jsonl tells of {len(by_step)} updates, not of {steps}")
    edges = [1 + tenth * steps // TENTHS for tenth in range(TENTHS + 1)]
    return [[by_step[step] for step in range(first, end)] for first, end in itertools.pairwise(edges)]


def noise(rewards: list[list[float]]) -> float:
    """By how much the means of a tenth of two runs may differ by chance: four standard errors."""
    return 4 * max(statistics.pstdev(tenth) * (2 / len(tenth)) ** 0.5 for tenth in rewards)


if __name__ == "__main__":
    sys.exit(main())
