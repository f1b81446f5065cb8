"""Where a response ends that is to stop at a string."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from flowrl.rollout.stop_strings import ends_in_stop, first_stop

PIECES = ["a", "b", "ab", "ba", "é", "<", "</", "x>"]


def decode(tokens: Sequence[int]) -> str:
    return "".join(PIECES[token] for token in tokens)


@given(
    st.lists(st.integers(0, len(PIECES) - 1), max_size=40),
    st.lists(st.text("abé</x>", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_asked_token_by_token_or_at_the_end_the_response_ends_at_the_same_token(
    tokens: list[int], stops: list[str]
) -> None:
    expected = next(
        (count for count in range(1, len(tokens) + 1) if any(stop in decode(tokens[:count]) for stop in stops)), None
    )
    assert first_stop(tokens, stops, decode) == expected
    asked = (count for count in range(1, len(tokens) + 1) if ends_in_stop(tokens[:count], stops, decode))
    assert next(asked, None) == expected


def test_a_character_of_several_tokens_completes_a_stop_only_when_it_is_whole() -> None:
    def of_bytes(tokens: Sequence[int]) -> str:
        return bytes(tokens).decode(errors="replace")

    tokens = list("so €".encode())
    assert first_stop(tokens, ["€"], of_bytes) == len(tokens)
    assert not ends_in_stop(tokens[:-1], ["€"], of_bytes) and ends_in_stop(tokens, ["€"], of_bytes)


def test_response_without_a_stop_string_has_none() -> None:
    assert first_stop([0, 1], ["x>"], decode) is None
    assert first_stop([], ["x>"], decode) is None
