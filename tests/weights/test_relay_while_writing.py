"""Versions on their way to other nodes while the trainer's ranks still write them."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flowrl.weights import held as held_module
from flowrl.weights import relay as relay_module
from flowrl.weights.buffers import Buffer
from flowrl.weights.held import HeldVersions
from flowrl.weights.progress import Progress, ProgressReader
from flowrl.weights.slices import Holdings, Slice
from flowrl.weights.store import WeightStore, reading
from tests.weights.cluster import NUM_BYTES, PARTS, SLICE, WHOLE, Node, cluster, publish, random_bytes, wait_for

HALF = 10 * SLICE


def arrived(node: Node) -> int:
    """Bytes of the version that is on its way."""
    transfer = node.relay._transfer
    return 0 if transfer is None else transfer.num_received_bytes


def wait_until_arrived(node: Node, num_bytes: int) -> None:
    deadline = time.monotonic() + 30
    while arrived(node) < num_bytes:
        assert node.error is None, node.error
        assert time.monotonic() < deadline, f"{arrived(node)} bytes of {num_bytes} have come"
        time.sleep(0.002)


def commit(node: Node, buffer: Buffer, version: int) -> None:
    assert node.pool is not None
    node.pool.commit(buffer, version, "")


@pytest.mark.parametrize("delta", [False, True])
def test_slices_are_given_as_they_are_written_and_shown_when_all_ranks_have_agreed(delta: bool, tmp_path: Path) -> None:
    with cluster(tmp_path, WHOLE, 3, delta=delta) as nodes:
        for version in range(4):
            data = random_bytes()
            buffer = nodes[0].begin(version)
            nodes[0].write_up_to(buffer, data, 0, HALF)
            wait_until_arrived(nodes[1], HALF)
            time.sleep(0.02)
            assert [arrived(node) for node in nodes[1:]] == [HALF, HALF]
            nodes[0].write_up_to(buffer, data, HALF, NUM_BYTES)
            for node in nodes[1:]:
                wait_until_arrived(node, NUM_BYTES)
            time.sleep(0.02)
            assert not any(version in node.shown for node in nodes)
            commit(nodes[0], buffer, version)
            wait_for(nodes[1:], version)
            assert [node.read(version) for node in nodes[1:]] == [data.tobytes()] * 2
        assert nodes[0].relay.sent_bytes == 4 * NUM_BYTES


def test_version_that_a_rank_fails_to_write_is_never_shown_and_the_next_one_is(tmp_path: Path) -> None:
    with cluster(tmp_path, WHOLE, 2) as nodes:
        publish(nodes, 0, random_bytes())
        wait_for(nodes[1:], 0)
        for version, written in ((1, HALF), (2, NUM_BYTES)):
            buffer = nodes[0].begin(version)
            nodes[0].write_up_to(buffer, random_bytes(), 0, written)
            wait_until_arrived(nodes[1], written)
            nodes[0].fail(buffer, version)
        data = random_bytes()
        buffer = nodes[0].begin(3)
        nodes[0].write_up_to(buffer, data, 0, NUM_BYTES)
        commit(nodes[0], buffer, 3)
        wait_for(nodes[1:], 3)
        assert nodes[1].shown == [0, 3] and nodes[1].read(3) == data.tobytes()


def test_nodes_that_write_parts_complete_each_other_while_they_write(tmp_path: Path) -> None:
    with cluster(tmp_path, PARTS, 3) as nodes:
        for version in range(3):
            data = random_bytes()
            buffers = [node.begin(version) for node in nodes[:2]]
            for first, last in ((0, HALF), (HALF, NUM_BYTES)):
                for node, buffer in zip(nodes, buffers, strict=False):
                    node.write_up_to(buffer, data, first, last)
                time.sleep(0.01)
            commit(nodes[0], buffers[0], version)
            time.sleep(0.02)
            assert not any(version in node.shown for node in nodes), "node 1 has not said so"
            commit(nodes[1], buffers[1], version)
            wait_for(nodes, version)
            assert {node.read(version) for node in nodes} == {data.tobytes()}


@pytest.mark.parametrize("has_come", [HALF, NUM_BYTES])
def test_version_that_is_written_over_before_it_was_shown_makes_way(has_come: int, tmp_path: Path) -> None:
    """Readers hold so much that it has to wait, and a newer one takes its buffer."""
    with cluster(tmp_path, WHOLE, 2) as nodes:
        pool = nodes[0].pool
        assert pool is not None
        for version in range(3):
            publish(nodes, version, random_bytes())
            wait_for(nodes[1:], version)
        with reading(nodes[0].store.path(0)), reading(nodes[0].store.path(1)):
            waiting, newer = random_bytes(), random_bytes()
            buffer = nodes[0].begin(3)
            nodes[0].write_up_to(buffer, waiting, 0, has_come)
            wait_until_arrived(nodes[1], has_come)
            nodes[0].write_up_to(buffer, waiting, has_come, NUM_BYTES)
            commit(nodes[0], buffer, 3)
            assert 3 not in nodes[0].store.versions(), "it waits for a reader"
            assert nodes[0].begin(4) is buffer
            nodes[0].write_up_to(buffer, newer, 0, NUM_BYTES)
        commit(nodes[0], buffer, 4)
        wait_for(nodes[1:], 4)
        assert nodes[1].read(4) == newer.tobytes()
        if 3 in nodes[1].shown:  # it was whole, and all of it had come
            assert nodes[1].read(3) == waiting.tobytes()


def test_own_part_that_is_written_over_is_given_up(tmp_path: Path) -> None:
    """As above, where the node needs the other's part and has not yet taken its own."""
    with cluster(tmp_path, PARTS, 2) as nodes:
        buffers = [node.begin(0) for node in nodes]
        for node, buffer in zip(nodes, buffers, strict=True):
            node.write_up_to(buffer, random_bytes(), 0, HALF)
        time.sleep(0.05)
        data = random_bytes()
        for node in nodes:  # version 0 is never heard of again
            assert node.pool is not None
            node.pool.abandon(buffers[node.number])
        buffers = [node.begin(1) for node in nodes]
        for node, buffer in zip(nodes, buffers, strict=True):
            node.write_up_to(buffer, data, 0, NUM_BYTES)
            commit(node, buffer, 1)
        wait_for(nodes, 1)
        assert [node.read(1) for node in nodes] == [data.tobytes()] * 2 and all(node.shown == [1] for node in nodes)


def publish_to_a_slow_node(nodes: list[Node]) -> None:
    """Version 0; node 1 has half of it, and hears of nothing for a while."""
    data = random_bytes()
    buffer = nodes[0].begin(0)
    nodes[0].write_up_to(buffer, data, 0, HALF)
    wait_until_arrived(nodes[1], HALF)
    nodes[1].relay._mailbox.post(lambda: time.sleep(0.2))
    nodes[0].write_up_to(buffer, data, HALF, NUM_BYTES)
    commit(nodes[0], buffer, 0)


def test_newer_version_is_begun_as_soon_as_the_one_before_has_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay_module, "_TICK_S", 1000.0)
    with cluster(tmp_path, WHOLE, 2) as nodes:
        second = random_bytes()
        publish_to_a_slow_node(nodes)
        publish(nodes, 1, second)
        wait_for(nodes[1:], 1)
        assert nodes[1].read(1) == second.tobytes()


@pytest.mark.parametrize("delta", [False, True])
def test_version_that_waits_for_what_a_slow_node_holds_is_shown_once_it_has_come_there(
    delta: bool, tmp_path: Path
) -> None:
    """With the fewest buffers: the node's base is the one that the version needs to be shown at all."""
    with cluster(tmp_path, WHOLE, 2, buffers=2, delta=delta) as nodes:
        last = random_bytes()
        publish_to_a_slow_node(nodes)
        publish(nodes, 1, random_bytes())
        buffer = nodes[0].begin(2)
        nodes[0].write_up_to(buffer, last, 0, NUM_BYTES)
        commit(nodes[0], buffer, 2)
        assert 2 not in nodes[0].store.versions(), "the relay has version 0 open"
        wait_for(nodes[1:], 2)
        assert 2 in nodes[0].store.versions() and nodes[1].read(2) == last.tobytes()


def test_node_falls_back_on_what_is_whole_where_a_newer_one_cannot_be_had(tmp_path: Path) -> None:
    """The newer one was begun, and the trainer has gone on or ended without showing it."""
    with cluster(tmp_path, WHOLE, 2) as nodes:
        publish(nodes, 0, random_bytes())
        wait_for(nodes[1:], 0)
        buffer = nodes[0].begin(1)
        nodes[0].write_up_to(buffer, random_bytes(), 0, HALF)
        wait_until_arrived(nodes[1], HALF)
        others, nodes[0].all = nodes[0].all, []
        assert nodes[0].pool is not None
        nodes[0].pool.abandon(buffer)  # of which nobody hears
        data = random_bytes()
        nodes[0].write(2, data)
        for node in others:
            node.relay.written(0, 2)
            node.relay.begun(0, 3, tmp_path / "nowhere")
        wait_for(nodes[1:], 2)
        assert nodes[1].read(2) == data.tobytes()


ENDS = st.sampled_from(["shown", "shown", "shown", "failed", "unheard"])


VERSIONS = st.lists(st.tuples(st.lists(st.integers(1, NUM_BYTES - 1), max_size=3), ENDS), min_size=1, max_size=8)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=VERSIONS, data=st.data())
def test_what_is_shown_is_what_was_agreed_upon(
    plan: list[tuple[list[int], str]], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever becomes of each version, and at whatever pace it is written: nothing that failed is ever shown, nothing
    torn, and the last one that was agreed upon arrives."""
    holdings = data.draw(st.sampled_from([WHOLE, PARTS]))
    wanted: dict[int, bytes] = {}
    with cluster(tmp_path_factory.mktemp("r"), holdings, 3) as nodes:
        writers = [node for node in nodes if node.ranges]
        for version, (stops, end) in enumerate([*plan, ([], "shown")]):
            content = np.full(NUM_BYTES, version + 1, np.uint8)
            buffers = [node.begin(version) for node in writers]
            for first, last in zip([0, *sorted(stops)], [*sorted(stops), NUM_BYTES], strict=True):
                for node, buffer in zip(writers, buffers, strict=True):
                    node.write_up_to(buffer, content, first, last)
                time.sleep(data.draw(st.sampled_from([0.0, 0.001, 0.01])))
            if end == "shown":
                wanted[version] = content.tobytes()
            for node, buffer in zip(writers, buffers, strict=True):
                assert node.pool is not None
                if end == "shown":
                    commit(node, buffer, version)
                elif end == "failed":
                    node.fail(buffer, version)
                else:  # as one that waits for a reader, and is then replaced
                    node.pool.abandon(buffer)
                    wanted[version] = content.tobytes()
        receivers = nodes if holdings is PARTS else nodes[1:]
        wait_for(receivers, version)
        for node in receivers:
            assert set(node.shown) <= wanted.keys()
            for shown in node.store.versions():
                assert node.read(shown) == wanted[shown]


def test_record_that_is_met_half_written_counts_as_one_of_a_version_to_come(tmp_path: Path) -> None:
    reader = ProgressReader(tmp_path)
    assert (reader.before(0), reader.newest()) == (0, -1)
    one, other = Progress(tmp_path, 0), Progress(tmp_path, 1)
    for progress in (one, other):
        progress.begin(7)
    one.reach(100)
    assert (reader.before(7), reader.newest()) == (0, 7)
    other.reach(60)
    assert (reader.before(7), reader.before(6), reader.newest()) == (60, 0, 7)
    path = tmp_path / ".progress"
    whole = path.read_bytes()
    path.write_bytes(whole[:8] + (61).to_bytes(8, "little") + whole[16:])
    assert reader.before(7) == 0 and reader.newest() > 7
    for end in (one, other, reader):
        end.close()


def test_records_race_with_their_reader(tmp_path: Path) -> None:
    """What is read is never further than what was said, and only falls when a version begins."""
    progress, reader = Progress(tmp_path, 0), ProgressReader(tmp_path)
    said = [0, 0]
    ends = threading.Event()

    def write() -> None:
        for version in range(200):
            said[:] = [version, 0]
            progress.begin(version)
            for offset in range(0, 2000, 7):
                said[1] = offset
                progress.reach(offset)
        ends.set()

    thread = threading.Thread(target=write)
    thread.start()
    looks = 0
    while not ends.is_set():
        version = said[0]
        found = reader.before(version)
        assert said[0] > version or found <= said[1]
        looks += 1
    thread.join()
    assert looks > 100
    progress.close()
    reader.close()


def test_directory_that_another_version_may_have_taken_is_not_held(tmp_path: Path) -> None:
    """A relay that is far behind: what it was told of has been shown, taken back, and is being written over."""
    store = WeightStore(tmp_path, 2)
    directory = tmp_path / ".buffer-0"
    directory.mkdir()
    (directory / "model.safetensors").write_bytes(bytes(100))
    part = Slice(0, ((0, 50),))
    progress = Progress(tmp_path, 0)
    progress.begin(4)
    held = HeldVersions(store, keeps_base=True)
    held.begun(4, directory)
    assert held.hold(4, 1) and held.bytes_of(4, part) is None
    progress.reach(50)
    assert held.bytes_of(4, part) is not None and held.bytes_of(4, Slice(0, ((0, 20), (40, 51)))) is None
    progress.begin(9)
    assert held.is_there(4) and held.bytes_of(4, part) is None
    held.begun(5, directory)
    assert not held.is_there(4)
    assert not held.hold(5, 1) and held.bytes_of(5, part) is None
    held.close()
    progress.close()


def test_slice_that_is_written_over_while_it_is_copied_is_not_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / ".buffer-0"
    directory.mkdir()
    (directory / "model.safetensors").write_bytes(bytes(100))
    progress = Progress(tmp_path, 0)
    progress.begin(4)
    progress.reach(100)
    held = HeldVersions(WeightStore(tmp_path, 2), keeps_base=True)
    held.begun(4, directory)
    part = Slice(0, ((0, 50),))
    assert held.hold(4, 1) and held.bytes_of(4, part) is not None
    gathered = held_module.gathered

    def slowly(data: np.ndarray, part: Slice) -> np.ndarray:
        progress.begin(5)
        return gathered(data, part)

    monkeypatch.setattr(held_module, "gathered", slowly)
    assert held.bytes_of(4, part) is None
    held.close()
    progress.close()


def test_holdings_are_cut_in_the_order_in_which_ranks_write() -> None:
    for holdings in (WHOLE, PARTS):
        for owner in holdings.ranges:
            ends = [part.ranges[-1][1] for part in Holdings.slices(holdings, SLICE) if part.owner == owner]
            assert ends == sorted(ends)
