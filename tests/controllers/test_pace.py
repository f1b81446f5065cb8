"""A node speaks to the clock so often for each version, whatever there is to say."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from controllers.pace import Pace


def messages(pace: Pace, requests: list[float]) -> list[float]:
    """When messages go, if these are the times of requests; one message takes all that waits."""
    sent: list[float] = []
    for request in sorted(requests):
        if sent and request <= sent[-1]:
            continue  # it went with the last one
        sent.append(request + pace.wait_s(request))
        pace.sent(sent[-1])
    return sent


def after_versions(version_s: float) -> Pace:
    pace = Pace(a_version=16, at_once=8)
    for version in range(10):
        pace.heard(version, version * version_s)
    return pace


@example([9.0 + place / 500 for place in range(2000)])
@given(st.lists(st.floats(9.0, 13.0), min_size=1, max_size=2000))
def test_messages_of_a_version_are_bounded_however_many_requests_there_are(requests: list[float]) -> None:
    sent = messages(after_versions(1.0), requests)
    for start in sent:
        assert sum(start <= moment < start + 1.0 for moment in sent) <= 16 + 8
    assert sent == sorted(sent)


def test_a_node_with_little_to_say_never_waits() -> None:
    pace = after_versions(1.0)
    sent = messages(pace, [9.0 + place / 16 for place in range(64)])
    assert sent == [9.0 + place / 16 for place in range(64)]


def test_the_longest_wait_does_not_grow_with_a_version() -> None:
    pace = after_versions(3600.0)
    for _ in range(8):
        pace.sent(40_000.0)
    assert pace.wait_s(40_000.0) == 0.25


def test_nothing_waits_before_the_time_of_a_version_is_known() -> None:
    pace = Pace()
    for moment in range(100):
        assert pace.wait_s(moment * 1e-4) == 0.0
        pace.sent(moment * 1e-4)
