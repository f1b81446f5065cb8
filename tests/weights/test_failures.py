"""What goes wrong with weights in whole runs: an engine that cannot load, and too little shared memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import textwrap
from pathlib import Path

import pytest

from flowrl.config import load
from flowrl.pipeline import build, published_bytes
from flowrl.weights.place import Route
from tests.integration.runs import ROOT, command, events, run_to_end, small_run

ONE_NODE = Route((0,), (0,))
QUICKSTART = ROOT / "recipes" / "quickstart.yaml"


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_engine_that_cannot_load_is_named_and_its_work_goes_to_the_others(tmp_path: Path) -> None:
    """One of two engines, once, when it follows: from code of the user's, which the engine's process imports."""
    (tmp_path / "broken.py").write_text(
        textwrap.dedent("""
            import os
            from flowrl.rollout.embedded import weights
            from flowrl.rollout.engine import EngineError
            from flowrl.rollout.episodes import single_turn

            replace = weights.replace_from_directory

            def failing(model, path, loader=None):
                if path.name.startswith("v") and int(path.name[1:]) >= 2:
                    try:
                        os.close(os.open("broken", os.O_CREAT | os.O_EXCL))
                    except FileExistsError:
                        pass
                    else:
                        raise EngineError("the memory of this engine is broken")
                replace(model, path, loader)

            weights.replace_from_directory = failing
            episode = single_turn
        """)
    )
    code, output = run_to_end(
        small_run(
            tmp_path, "eval=null", "pools.rollout.workers=2", "rollout.episode=broken.py:episode",
            "rollout.in_flight=keep", steps=240,
        ),
        timeout_s=200,
        cwd=tmp_path,
    )  # fmt: skip
    assert code == 0, output
    lines = [line for line in output.splitlines() if "the memory of this engine is broken" in line]
    assert len(lines) == 1 and "rollout.0." in lines[0] and "restart 1" in lines[0], output
    log = events(tmp_path / "runs" / "small")
    trained = [tuple(event["key"]) for event in log if event["kind"] == "trained"]
    assert len(trained) == len(set(trained)) == 240 * 64


def test_version_that_cannot_be_written_ends_the_wait_for_its_rows(tmp_path: Path) -> None:
    """No engine ever gets it, so under a bound of 0 nothing would be sampled for the next update. From code of the
    user's, which the trainer's process imports; one rank of two fails, and the other says which."""
    (tmp_path / "broken.py").write_text(
        textwrap.dedent("""
            from flowrl.weights.writing import PooledWriter
            from transfer_queue.rows import Column

            class Passed:
                def __init__(self, context, settings):
                    write = PooledWriter.write
                    self.updates = 0

                    def failing(writer, tensors):
                        if self.updates == 2:
                            raise OSError("the memory of this rank is broken")
                        write(writer, tensors)

                    PooledWriter.write = failing

                def process(self, rows):
                    self.updates += 1
                    return {"advantage": Column.scalars(rows["reward"].values, "float32")}
        """)
    )
    stage = "stages.advantage={run: 'broken.py:Passed', unit: batch, reads: [reward], writes: [advantage]}"
    arguments = small_run(tmp_path, stage, "staleness.max=0", "eval=null", "pools.train.workers=2", "run.restarts=0")
    code, output = run_to_end(arguments, timeout_s=90, cwd=tmp_path)
    assert code != 0
    assert "version 2: ranks [0] could not; see their logs" in output or "the memory of this rank" in output, output
    assert "the memory of this rank is broken" in (tmp_path / "runs" / "small" / "logs" / "train.0.0.log").read_text()
    log = events(tmp_path / "runs" / "small")
    assert max(event["version"] for event in log if event["kind"] == "published") == 1
    assert max(event["update"] for event in log if event["kind"] == "trained") == 1


NOT_TAKEN = {
    "shared_memory": """
        from flowrl.rollout.embedded import weights

        replace = weights.replace_from_directory

        def without_one(model, path, loader=None):
            kept = {name: tensor.clone() for name, tensor in model.state_dict().items() if "layers.1.mlp.down" in name}
            replace(model, path, loader)
            for name, tensor in model.state_dict().items():
                if name in kept:
                    tensor.copy_(kept[name])

        weights.replace_from_directory = without_one
    """,
    "collective": """
        from flowrl.weights.collective import receiver

        land = receiver._land

        def without_one(landing, given):
            if "layers.1.mlp.down" not in landing.name:
                land(landing, given)

        receiver._land = without_one
    """,
}


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("transport", ["shared_memory", "collective"])
@pytest.mark.parametrize("checks", [True, False])
def test_an_engine_that_leaves_a_tensor_out_does_not_serve_unless_the_recipe_forgoes_the_check(
    transport: str, checks: bool, tmp_path: Path
) -> None:
    (tmp_path / "broken.py").write_text(
        "from flowrl.rollout.episodes import single_turn as episode\n" + textwrap.dedent(NOT_TAKEN[transport])
    )
    switch = f"weights.check_first_sync={str(checks).lower()}"
    arguments = (f"weights.transport={transport}", switch, "eval=null", "rollout.episode=broken.py:episode")
    code, output = run_to_end(small_run(tmp_path, *arguments, steps=4), timeout_s=200, cwd=tmp_path)
    said = [line for line in output.splitlines() if "weights.check_first_sync: " in line]
    assert (code != 0) == checks == bool(said), output
    log = events(tmp_path / "runs" / "small")
    assert any(event["kind"] == "sampled" for event in log) != checks


def test_too_little_shared_memory_is_said_before_the_start_with_size_and_settings(tmp_path: Path) -> None:
    """On a real file system of 12 MB, in a mount namespace of the run's own, under a path that is short enough for
    sockets."""
    if os.geteuid() or not shutil.which("unshare"):
        pytest.skip("needs root, to mount a small file system")
    memory = Path(tempfile.mkdtemp(prefix="small-", dir="/tmp"))
    arguments = command(f"run.dir={tmp_path}/runs", f"model.path={tmp_path}/model", f"run.session_dir={memory}")
    script = 'mount -t tmpfs -o size=12m small "$0" && exec "$@"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, str(memory), *arguments],
        capture_output=True, text=True, timeout=60, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    memory.rmdir()
    said = done.stdout + done.stderr
    assert done.returncode != 0
    needed = published_bytes(load(QUICKSTART, [f"model.path={tmp_path}/model"]), ONE_NODE) + (16 << 20)
    assert f"{memory} has 12 MiB free, and the run needs {needed / 2**20:.0f} MiB" in said
    assert "run.session_dir" in said and "weights.buffers" in said and "queue.byte_limit_mb" in said
    assert not (tmp_path / "runs" / "quickstart" / "checkpoints").exists()


def test_room_for_versions_is_counted_by_where_they_lie(model_dir: Path, tmp_path: Path) -> None:
    """Five at three buffers: one is being written, one pinned. Of ranks on several nodes, their parts too."""

    def needed(*overrides: str, route: Route = ONE_NODE) -> int:
        return published_bytes(load(QUICKSTART, [f"model.path={model_dir}", *overrides]), route)

    one = (model_dir / "model.safetensors").stat().st_size
    assert needed() == pytest.approx(5 * one, rel=0.1)
    assert needed("model.dtype=bfloat16", "weights.buffers=2") == pytest.approx(4 * one / 2, rel=0.1)
    assert needed(route=Route((0, 1), (0,))) == pytest.approx(9 * one, rel=0.1)
    assert needed("weights.transport=disk", f"weights.dir={tmp_path}") == 0
    assert needed("weights.transport=collective", "eval=null") == 0
    assert needed("weights.transport=collective") == needed()


def test_evaluation_elsewhere_is_refused_where_versions_lie_nowhere() -> None:
    recipe = load(QUICKSTART, ["weights.transport=collective", "pools.train={nodes: [1]}"])
    with pytest.raises(ValueError, match=r"^weights\.transport: 'collective'; evaluation reads .* on nodes \[0, 1\]"):
        build(recipe, 2)
    build(load(QUICKSTART, ["weights.transport=collective", "pools.train={nodes: [1]}", "eval=null"]), 2)
