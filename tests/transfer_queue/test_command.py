"""`transfer-queue`, as a user runs it: real processes, real sockets."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from transfer_queue.cli import main
from transfer_queue.client import QueueClient
from transfer_queue.rows import Column
from transfer_queue.saved import SavedQueue

ROOT = Path(__file__).resolve().parents[2]
Start = Callable[..., subprocess.Popen[str]]
CONSUMERS = ("--consumer", "reward=tokens", "--consumer", "train=tokens,reward:training")
CLOCK = ("--batch-rows", "4", "--max-staleness", "1")


@pytest.fixture
def start() -> Iterator[Start]:
    with ExitStack() as stack:

        def run(*arguments: str) -> subprocess.Popen[str]:
            process = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-m", "transfer_queue.cli", *arguments],
                    stdout=subprocess.PIPE,
                    text=True,
                    cwd=ROOT,
                    env=os.environ | {"OMP_NUM_THREADS": "1"},
                )
            )
            stack.callback(process.kill)
            return process

        yield run


@pytest.fixture
def endpoint(start: Start, tmp_path: Path) -> str:
    """Of a shard with four rows that `reward` has not read yet."""
    address = f"ipc://{tmp_path}/shard"
    limits = ("--byte-limit", str(1 << 20), "--save-dir", str(tmp_path))
    process = start("serve", "--endpoint", address, *limits, *CONSUMERS, *CLOCK)
    assert line_of(process) == f"serving {address}"
    with QueueClient(address) as client:
        client.announce("p", 0)
        for group in client.reserve("p", 2, 2, row_bytes=64):
            client.put(group.keys, {"tokens": Column.ragged([[1, 2, 3], [4]], "int32")}, versions=[0, 0])
    return address


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_served_shard_is_inspected_drained_and_ended(
    endpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", endpoint]) == 0
    said = capsys.readouterr().out
    assert "version 0 (incarnation 0), 0 of 4 rows in its update, staleness at most 1" in said
    assert "4 rows, 0.0 MiB stored" in said and "of 1.0 MiB" in said
    assert "partition train: 2 groups" in said and "outstanding 4 due 1" in said
    assert [line.split() for line in said.splitlines() if "reward" in line] == [["reward", "0", "4", "0", "0", "0"]]
    file = tmp_path / "rows.jsonl"
    assert main(["drain", endpoint, "--consumer", "reward", "--to", str(file)]) == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["key"] for row in rows] == [["train", group, index, 0] for group in (0, 1) for index in (0, 1)]
    assert rows[0] == {"key": ["train", 0, 0, 0], "version": 0, "columns": {"tokens": [1, 2, 3]}}
    assert main(["drain", endpoint, "--consumer", "reward", "--discard"]) == 0
    assert "4 rows of reward written to" in capsys.readouterr().out
    assert main(["inspect", endpoint, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)[endpoint]
    assert report["consumers"]["reward"]["done"] == 4


def test_inspecting_consumes_nothing(endpoint: str) -> None:
    for form in ([], ["--json"], ["--metrics"]):
        assert main(["inspect", endpoint, *form]) == 0
    with QueueClient(endpoint) as client:
        assert len(client.take("reward", 9).rows) == 4


def test_saved_rows_are_there_for_a_later_shard(
    endpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["save", endpoint, "--to", str(tmp_path / "saved")]) == 0
    assert capsys.readouterr().out.startswith("4 rows saved to")
    assert len(SavedQueue(tmp_path / "saved").groups()) == 2


def test_health_tells_the_shard_that_does_not_answer(
    endpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["health", endpoint]) == 0
    assert capsys.readouterr().out.startswith(f"ok {endpoint}: answered in ")
    nobody = f"ipc://{tmp_path}/nobody"
    assert main(["health", endpoint, nobody, "--timeout", "0.3"]) == 1
    assert f"FAILED {nobody}: " in capsys.readouterr().out


def test_who_must_not_be_drained_is_refused_by_name(endpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["drain", endpoint, "--consumer", "train", "--discard"]) == 1
    assert "a training take names its update" in capsys.readouterr().err
    assert main(["drain", endpoint, "--consumer", "nobody", "--discard"]) == 1
    assert "consumer: 'nobody'" in capsys.readouterr().err


def test_metrics_page_is_prometheus_text_on_loopback(start: Start, tmp_path: Path) -> None:
    process = start("serve", "--endpoint", f"ipc://{tmp_path}/shard", "--consumer", "reader=x:group",
                    "--byte-limit", str(1 << 20), "--metrics-port", "0")  # fmt: skip
    line_of(process)
    page = line_of(process).removeprefix("metrics at ")
    assert page.startswith("http://127.0.0.1:")
    with urllib.request.urlopen(page, timeout=10) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        lines = answer.read().decode().splitlines()
    assert f'transfer_queue_stored_rows{{shard="ipc://{tmp_path}/shard"}} 0' in lines
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(page.replace("metrics", "other"), timeout=10)
    refused.value.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_the_shard_in_order(start: Start, tmp_path: Path, number: signal.Signals) -> None:
    segments = tmp_path / "segments"
    segments.mkdir()
    settings = {"consumers": {"reader": {"columns": ["x"]}}, "byte_limit": 1 << 20, "segment_dir": str(segments)}
    file = tmp_path / "queue.json"
    file.write_text(json.dumps(settings))
    process = start("serve", "--endpoint", f"ipc://{tmp_path}/shard", "--config", str(file))
    assert line_of(process).startswith("serving ")
    process.send_signal(number)
    assert process.wait(20) == 0
    assert list(segments.iterdir()) == [], "nothing is left behind"


def test_off_loopback_a_secret_is_needed_and_read_from_its_file(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    everywhere = ["--endpoint", "tcp://0.0.0.0:*", "--consumer", "reader=x", "--byte-limit", str(1 << 20)]
    assert main(["serve", *everywhere]) == 2
    assert "secret: empty" in capsys.readouterr().err
    secret = tmp_path / "secret"
    secret.write_text("between us\n")
    process = start("serve", *everywhere, "--secret-file", str(secret))
    endpoint = line_of(process).removeprefix("serving ").replace("0.0.0.0", "127.0.0.1")
    assert main(["health", endpoint, "--secret-file", str(secret)]) == 0
    assert main(["health", endpoint, "--timeout", "0.5"]) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--consumer", "a=x"], "endpoint: missing; say --endpoint"),
        (["--endpoint", "ipc:///tmp/x"], "consumers: missing; say --consumer"),
        (["--endpoint", "ipc:///tmp/x", "--consumer", "reward"], "consumer: 'reward'; must read NAME=COLUMN"),
        (["--endpoint", "ipc:///tmp/x", "--consumer", "a=x:sometimes"], "consumer: 'a=x:sometimes'"),
        (["--endpoint", "ipc:///tmp/x", "--consumer", "a=x:training"], "batch_rows, max_staleness: {}"),
        (["--endpoint", "file:///tmp/x", "--consumer", "a=x"], "endpoint: 'file:///tmp/x'"),
        (["--config", "/nowhere.json"], "config: '/nowhere.json'; there is no such file"),
    ],
)
def test_mistake_is_refused_before_anything_starts(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", *arguments]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1]", "is no JSON object"),
        ('{"endpont": "ipc:///tmp/x"}', "has ['endpont']; known are"),
        ('{"endpoint": "ipc:///tmp/x", "consumers": {"a": {"columns": "x"}}}', "config: Expected"),
    ],
)
def test_bad_config_file_is_named(tmp_path: Path, text: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "queue.json"
    file.write_text(text)
    assert main(["serve", "--config", str(file)]) == 2
    assert words in capsys.readouterr().err
