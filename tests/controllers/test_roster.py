"""Nodes that would not run the same are named before anything starts."""

from __future__ import annotations

import msgspec
import pytest

from controllers.roster import Card, installed_versions, refuse_difference

MINE = Card(node=0, host="ada", address="127.0.0.1", plan="p1", versions=installed_versions() | {"code": "c1"})


def other(**changes: object) -> Card:
    return msgspec.structs.replace(MINE, node=1, host="bob", **changes)


def test_equal_nodes_pass() -> None:
    refuse_difference(MINE, other())


def test_another_recipe_is_named_by_its_node() -> None:
    with pytest.raises(ValueError, match=r"node 1 \(bob\) has another recipe or placement than node 0 \(ada\)"):
        refuse_difference(MINE, other(plan="p2"))


@pytest.mark.parametrize("name", ["python", "platform", "torch", "flowrl", "code"])
def test_another_version_is_named_by_node_and_package(name: str) -> None:
    with pytest.raises(ValueError, match=rf"node 1 \(bob\) has {name} 0\.0; node 0 \(ada\) has "):
        refuse_difference(MINE, other(versions=MINE.versions | {name: "0.0"}))


def test_a_package_that_a_node_lacks_is_named() -> None:
    lacking = {name: version for name, version in MINE.versions.items() if name != "code"}
    with pytest.raises(ValueError, match="has code none"):
        refuse_difference(MINE, other(versions=lacking))
