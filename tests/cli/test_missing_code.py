"""Code that a recipe names is looked for before anything starts, and is not run for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowrl import config
from flowrl.cli.main import main

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
MINE = """
raise RuntimeError("was run")
import os.path as paths
from json import dumps
limit, (low, high) = 1, (2, 3)
if limit:
    def late(): inside = 1
    annotated: int = 4
with open(__file__) as opened:
    try:
        class Length:
            def process(self): ...
    except ValueError: ...
"""


@pytest.fixture()
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path


def load_with_stage(run: str) -> None:
    config.load(RECIPES / "quickstart.yaml", [f"stages.mine={{run: {run!r}, writes: [mine]}}"])


@pytest.mark.parametrize("name", ["paths", "dumps", "limit", "high", "late", "annotated", "opened", "Length"])
def test_whatever_a_module_binds_is_there(name: str, mine: Path) -> None:
    load_with_stage(f"mine.py:{name}")


@pytest.mark.parametrize(
    ("run", "said"),
    [
        ("mine.py:Lenght", "has no 'Lenght' .did you mean 'Length'"),
        ("mine.py:inside", "has no 'inside'"),
        ("mine.py:process", "has no 'process'"),
        ("yours.py:Length", "no such file as"),
        ("no_such_package.part:Length", "no module named 'no_such_package'"),
        ("json.no_such_part:Length", "no module named 'json.no_such_part'"),
        ("json.decoder:JSONDecode", "has no 'JSONDecode' .did you mean 'JSONDecode"),
    ],
)
def test_what_is_not_there_is_refused_by_field_and_rule(run: str, said: str, mine: Path) -> None:
    with pytest.raises(ValueError, match=rf"stages\.mine\.run: '{run}'; .*{said}"):
        load_with_stage(run)


STAGES = """
class Whole:
    def __init__(self, context, settings, more=1, *, other=2): ...
    def process(self, rows): ...
class Any:
    def __init__(self, *given): ...
    process = len
class Inherits(Whole): ...
class Twice: ...
class Twice(Whole): ...
class Stores:
    def __init__(self, context, settings):
        self.process = len
class Delegates:
    def __init__(self, context, settings): ...
    def __getattr__(self, name): ...
class Assigned:
    __init__ = made
    def process(self, rows): ...
class Makes:
    def __new__(cls, context, settings): ...
    def process(self, rows): ...
class Processes:
    def __init__(self, context, settings): ...
    def proces(self, rows): ...
class Bare:
    def process(self, rows): ...
class Few:
    def __init__(self, settings): ...
    def process(self, rows): ...
class Many:
    def __init__(self, context, settings, more): ...
    def process(self, rows): ...
class Named:
    def __init__(self, context, settings, *, more): ...
    def process(self, rows): ...
def made(context, settings): ...
"""


@pytest.mark.parametrize(
    "name", ["Whole", "Any", "Inherits", "Twice", "Stores", "Delegates", "Assigned", "Makes", "made"]
)
def test_what_can_be_a_stage_is_taken(name: str, mine: Path) -> None:
    (mine / "stages.py").write_text(STAGES)
    load_with_stage(f"stages.py:{name}")


@pytest.mark.parametrize(
    ("name", "said"),
    [("Processes", r"no process\(self, rows\), so it is no stage")]
    + [
        (name, r"a stage's class has an __init__\(self, context, settings\)")
        for name in ("Bare", "Few", "Many", "Named")
    ],
)
def test_a_class_that_is_no_stage_is_refused_by_field_and_rule(name: str, said: str, mine: Path) -> None:
    (mine / "stages.py").write_text(STAGES)
    with pytest.raises(ValueError, match=rf"stages\.mine\.run: 'stages\.py:{name}'; .*{said}"):
        load_with_stage(f"stages.py:{name}")


def test_a_module_that_may_bind_anything_is_believed(mine: Path) -> None:
    (mine / "open.py").write_text("from json import *\n")
    (mine / "lazy.py").write_text("def __getattr__(name): ...\n")
    (mine / "wrong.py").write_text("def (:\n")
    for file in ("open.py", "lazy.py"):
        load_with_stage(f"{file}:whatever")
    with pytest.raises(ValueError, match=r"line 1 of wrong\.py is no Python"):
        load_with_stage("wrong.py:whatever")


def test_a_dry_run_says_it(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", str(RECIPES / "quickstart.yaml"), "--dry-run", "reward.name=null", "reward.path=mine.py:scores"]
    assert main(arguments) == 2
    assert "reward.path: 'mine.py:scores'; mine.py has no 'scores'" in capsys.readouterr().err
