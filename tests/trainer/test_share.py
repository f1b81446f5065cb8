"""What ranks took of a batch becomes shares that do not depend on who took what, and are about equal."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.trainer.ladder import SIZES, Ladder
from tests.trainer.ladder_process import group_rows

pytestmark = pytest.mark.timeout(240)


def shares(ladder: Ladder, size: int) -> list[dict[str, Any]]:
    return [json.loads((ladder.rung(size) / f"share-{rank}.json").read_text()) for rank in range(size)]


@pytest.mark.parametrize("size", SIZES)
def test_every_row_is_in_one_share_beside_its_group_in_the_order_of_keys(size: int, ladder: Ladder) -> None:
    keys = [share["evenly"]["keys"] for share in shares(ladder, size)]
    assert all(part == sorted(part) for part in keys)
    assert sorted(key for part in keys for key in part) == [[group, index] for group in range(30) for index in range(3)]
    groups = [{group for group, _ in part} for part in keys]
    assert sum(map(len, groups)) == 30


@pytest.mark.parametrize("size", SIZES)
def test_shares_do_not_depend_on_who_took_what(size: int, ladder: Ladder) -> None:
    assert all(share["mostly one"] == share["evenly"] for share in shares(ladder, size))


@pytest.mark.parametrize("size", SIZES)
def test_ranks_get_about_the_same_number_of_tokens(size: int, ladder: Ladder) -> None:
    tokens = [share["evenly"]["tokens"] for share in shares(ladder, size)]
    assert sum(tokens) == sum(
        len(group_rows(group)[name].values) for group in range(30) for name in ("prompt_tokens", "response_tokens")
    )
    assert max(tokens) < 1.05 * sum(tokens) / size
