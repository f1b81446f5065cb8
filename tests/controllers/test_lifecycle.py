"""A session directory lives as long as its owner, and not a moment longer than until the next start."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from controllers.lifecycle import Session
from controllers.reaper import remove_if_dead
from controllers.topology import Topology

_OWNER = """
import sys
from pathlib import Path
from controllers.lifecycle import Session
from controllers.topology import Topology
with Session(Path(sys.argv[1]), Topology(run_id="other")):
    print("open", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def root() -> Iterator[Path]:
    path = Path("/dev/shm") / f"flowrl-test-{uuid.uuid4().hex[:8]}"
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def owner(root: Path) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, "-c", _OWNER, str(root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent.parent)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"open\n"
    with process:
        yield process
        process.kill()


def test_directory_is_private_and_gone_at_the_end(root: Path) -> None:
    with Session(root, Topology(run_id="mine")) as session:
        assert session.path == root / "mine-n0"
        assert session.path.stat().st_mode & 0o777 == 0o700
        assert session.endpoint("queue") == f"ipc://{root}/mine-n0/queue"
    assert not list(root.iterdir())


def test_a_late_reaper_leaves_alone_what_its_successor_has_made(root: Path, owner: subprocess.Popen[bytes]) -> None:
    assert not remove_if_dead(str(root), str(root / "other-n0"))
    assert (root / "other-n0" / "owner").exists()
    owner.kill()
    owner.wait()
    assert remove_if_dead(str(root), str(root / "other-n0"))
    assert not list(root.iterdir())
    assert remove_if_dead(str(root), str(root / "other-n0")), "it is gone already"


def test_living_neighbour_is_left_alone(root: Path, owner: subprocess.Popen[bytes]) -> None:
    with Session(root, Topology(run_id="mine")):
        assert (root / "other-n0").exists()


def test_dead_neighbour_is_removed_at_the_next_start(root: Path, owner: subprocess.Popen[bytes]) -> None:
    owner.kill()
    owner.wait()
    (root / "other-n0" / "weights").mkdir()
    with Session(root, Topology(run_id="mine")):
        assert [path.name for path in root.iterdir()] == ["mine-n0"]


def test_name_of_a_living_run_is_refused(root: Path, owner: subprocess.Popen[bytes]) -> None:
    with (
        pytest.raises(ValueError, match="other-n0 belongs to a run that is alive"),
        Session(root, Topology(run_id="other")),
    ):
        raise AssertionError("entered another's session")
    assert (root / "other-n0").exists()


def test_too_little_space_is_refused_by_size_and_setting(root: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"^run.session_dir: .* free, and the run needs 1073741824 MiB"),
        Session(root, Topology(run_id="mine"), needed_bytes=1 << 50),
    ):
        raise AssertionError("entered without space")


def test_path_too_long_for_a_socket_is_refused(root: Path) -> None:
    with pytest.raises(ValueError, match=r"^run.session_dir: .*longer than 100 bytes"):
        Session(root / ("d" * 60), Topology(run_id="mine"))
