"""Versions reach nodes that do not write them, byte for byte, and no node sends a byte twice."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from flowrl.weights import relay as relay_module
from flowrl.weights import transfer as transfer_module
from flowrl.weights.delta import Encoding, decode, digest, encode, goes_whole
from flowrl.weights.relay_wire import NO_BASE, Given, Opened
from flowrl.weights.relay_wire import encode as wire
from flowrl.weights.slices import Holdings, Slice, giver
from flowrl.weights.store import reading
from flowrl.weights.transfer import Transfer, TransferFailed
from tests.weights.cluster import (
    NUM_BYTES,
    PARTS,
    RNG,
    WHOLE,
    cluster,
    publish,
    random_bytes,
    slightly_changed,
    wait_for,
)


def test_node_without_trainer_ranks_gets_every_byte(tmp_path: Path) -> None:
    with cluster(tmp_path, WHOLE, 2) as nodes:
        for version in range(6):
            data = random_bytes()
            publish(nodes, version, data)
            wait_for(nodes[1:], version)
            assert nodes[1].read(version) == data.tobytes()
        assert nodes[0].shown == []


def test_a_node_that_is_told_last_answers_when_it_has_been_told(tmp_path: Path) -> None:
    with cluster(tmp_path, WHOLE, 3, late=(1,)) as nodes:
        data = random_bytes()
        publish(nodes, 0, data)
        deadline = time.monotonic() + 30
        while not nodes[1].relay._router.poll(0):
            assert time.monotonic() < deadline, "node 2 asks it for its share"
            time.sleep(0.01)
        nodes[1].relay.hold(WHOLE)
        wait_for(nodes[1:], 0)
        assert [node.read(0) for node in nodes[1:]] == [data.tobytes()] * 2


@pytest.mark.parametrize("opens", [False, True])
def test_a_node_does_not_wait_for_a_relay_that_was_started_anew(tmp_path: Path, opens: bool) -> None:
    """Killed before it has opened a version, or after; its successor has another endpoint and knows of neither."""
    router = zmq.Context.instance().socket(zmq.ROUTER)
    router.setsockopt(zmq.LINGER, 0)
    router.bind(f"ipc://{tmp_path}/killed")
    try:
        with cluster(tmp_path, WHOLE, 2) as nodes:
            nodes[1].relay.connect(0, f"ipc://{tmp_path}/killed")
            data = random_bytes()
            time.sleep(0.1)  # until then node 1 speaks with the successor already
            publish(nodes, 0, data)
            assert router.poll(10_000), "node 1 asks the one that is about to be killed"
            identity, _ = router.recv_multipart()
            if opens:
                router.send_multipart([identity, wire(Opened(0, True))])
                assert router.poll(10_000), "and then for slices"
            started = time.monotonic()
            nodes[1].relay.connect(0, nodes[0].relay.endpoint)
            wait_for(nodes[1:], 0)
            assert nodes[1].read(0) == data.tobytes()
            assert time.monotonic() - started < 20, "a node that is silent is given up on after 60 s"
    finally:
        router.close()


def test_what_lies_beside_a_version_arrives_with_it(tmp_path: Path) -> None:
    """As a directory of adapters needs it."""
    named = msgspec.structs.replace(WHOLE, file_name="adapter_model.safetensors", texts={"adapter_config.json": "{}"})
    with cluster(tmp_path, named, 2) as nodes:
        data = random_bytes()
        publish(nodes, 0, data)
        wait_for(nodes[1:], 0)
        path = nodes[1].store.path(0)
        assert sorted(file.name for file in path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
        assert (path / "adapter_model.safetensors").read_bytes() == data.tobytes()
        assert (path / "adapter_config.json").read_text() == "{}"


def test_source_sends_each_byte_once_to_any_number_of_nodes(tmp_path: Path) -> None:
    with cluster(tmp_path, WHOLE, 4, delta=False) as nodes:
        data = random_bytes()
        publish(nodes, 0, data)
        wait_for(nodes[1:], 0)
        for node in nodes[1:]:
            assert node.read(0) == data.tobytes()
        assert nodes[0].relay.sent_bytes == NUM_BYTES
        assert sum(node.relay.sent_bytes for node in nodes) == 3 * NUM_BYTES


def test_nodes_that_write_parts_complete_each_other(tmp_path: Path) -> None:
    with cluster(tmp_path, PARTS, 3) as nodes:
        data = random_bytes()
        for version in range(4):
            data = slightly_changed(data)
            publish(nodes, version, data)
            wait_for(nodes, version)
            assert {node.read(version) for node in nodes} == {data.tobytes()}


def set_times(monkeypatch: pytest.MonkeyPatch, whole_s: float, changes_s: float) -> None:
    """What transfers are found to take, however busy this machine is."""
    monkeypatch.setattr(Transfer, "seconds", lambda self: changes_s if self.has_base else whole_s)


@given(st.integers(2, 30), st.floats(0.01, 9.0), st.floats(0.01, 9.0))
def test_of_so_many_transfers_one_is_whole_and_one_by_changes_and_the_others_as_is_faster(
    anchor_every: int, whole_s: float, changes_s: float
) -> None:
    ways = [goes_whole(turn, anchor_every, whole_s, changes_s) for turn in range(anchor_every)]
    assert ways[:2] == [True, False]
    assert ways[2:] == [whole_s < changes_s] * (anchor_every - 2)
    assert goes_whole(anchor_every, anchor_every, whole_s, changes_s)


def bytes_sent(root: Path, anchor_every: int) -> list[int]:
    """By one node for two others, for each of seven versions, of which each differs a little from the one before."""
    with cluster(root, WHOLE, 3, anchor_every=anchor_every) as nodes:
        data, sent = random_bytes(), []
        for version in range(7):
            before = nodes[0].relay.sent_bytes
            publish(nodes, version, data)
            wait_for(nodes[1:], version)
            sent.append(nodes[0].relay.sent_bytes - before)
            assert {node.read(version) for node in nodes} == {data.tobytes()}
            data = slightly_changed(data)
        return sent


def test_changes_are_few_bytes_and_anchors_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_times(monkeypatch, whole_s=2.0, changes_s=1.0)
    sent = bytes_sent(tmp_path, anchor_every=3)
    assert [count == NUM_BYTES for count in sent] == [True, False, False, True, False, False, True]
    assert max(sent[index] for index in (1, 2, 4, 5)) < NUM_BYTES // 20


def test_versions_go_whole_where_comparing_takes_longer_and_changes_are_tried_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_times(monkeypatch, whole_s=1.0, changes_s=2.0)
    sent = bytes_sent(tmp_path, anchor_every=4)
    assert [count == NUM_BYTES for count in sent] == [True, False, True, True, True, False, True]


def test_unchanged_version_costs_no_payload(tmp_path: Path) -> None:
    with cluster(tmp_path, WHOLE, 2) as nodes:
        data = random_bytes()
        for version in range(2):
            publish(nodes, version, data)
            wait_for(nodes[1:], version)
        assert nodes[0].relay.sent_bytes == NUM_BYTES
        assert nodes[1].read(1) == data.tobytes()


def test_newest_version_arrives_while_engines_hold_old_ones(tmp_path: Path) -> None:
    with cluster(tmp_path, WHOLE, 2) as nodes:
        data = random_bytes()
        publish(nodes, 0, data)
        wait_for(nodes[1:], 0)
        with reading(nodes[1].store.path(0)):
            for version in range(1, 12):
                data = slightly_changed(data)
                publish(nodes, version, data)
            wait_for(nodes[1:], 11)
            assert nodes[1].read(11) == data.tobytes()


def test_word_of_a_version_that_was_overtaken_does_not_hide_the_newer_one(tmp_path: Path) -> None:
    """Node 0 has announced version 2 while its answer to a question for version 1, which is gone, was on its way."""
    with cluster(tmp_path, WHOLE, 2) as nodes:
        data = random_bytes()
        publish(nodes, 0, data)
        wait_for(nodes[1:], 0)
        relay, nodes[0].all = nodes[1].relay, nodes[:1]
        nodes[0].write(2, slightly_changed(data))  # of which node 1 hears in what follows

        def cross() -> None:
            relay._opening = (1, {0}, time.monotonic() + 30)
            relay._newest[0] = relay._whole_at[0] = 2
            relay._hear_opened(0, Opened(version=1, is_there=False))

        relay._mailbox.post(cross)
        wait_for(nodes[1:], 2)


def test_relay_speaks_curve_with_those_who_know_the_secret(tmp_path: Path) -> None:
    with cluster(tmp_path, WHOLE, 2, secret="one for all") as nodes:
        data = random_bytes()
        publish(nodes, 0, data)
        wait_for(nodes[1:], 0)
        assert nodes[1].read(0) == data.tobytes()


def test_holder_that_never_answers_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_module, "_OPEN_TIMEOUT_S", 0.5)
    with cluster(tmp_path, WHOLE, 2) as nodes:
        nodes[0].relay.stop()
        nodes[0].thread.join(20)
        nodes[1].relay.written(0, 0)
        nodes[1].thread.join(20)
        assert isinstance(nodes[1].error, TransferFailed)
        assert "nodes [0] have not opened version 0" in str(nodes[1].error)


def slices_of(data: np.ndarray) -> list[Slice]:
    return [Slice(0, ((begin, min(begin + 100, len(data))),)) for begin in range(0, len(data), 100)]


def given_of(data: np.ndarray, index: int, payload: np.ndarray) -> tuple[Given, bytes]:
    whole = data[index * 100 : index * 100 + 100]
    return Given(1, index, Encoding.WHOLE, NO_BASE, digest(whole)), payload.tobytes()


def test_broken_slice_is_asked_for_again_and_a_second_time_it_fails() -> None:
    data = RNG.integers(0, 256, 300, dtype=np.uint8)
    into = np.zeros_like(data)
    transfer = Transfer(1, slices_of(data), 1, [1], None, into)
    assert [(wanted.giver, wanted.ask.index) for wanted in transfer.asks()] == [(0, 0), (0, 1), (0, 2)]
    broken = data[:100] ^ 1
    (again,) = transfer.given(*given_of(data, 0, broken))
    assert again.ask.index == 0 and not transfer.has(0)
    assert transfer.given(*given_of(data, 0, data[:100])) == [] and transfer.has(0)
    transfer.given(*given_of(data, 1, data[100:150]))
    with pytest.raises(TransferFailed, match="node 0 gave slice 1 of version 1 broken, twice"):
        transfer.given(*given_of(data, 1, data[100:150]))


def test_owner_is_asked_when_a_fellow_is_late_or_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer_module, "FELLOW_TIMEOUT_S", 0.0)
    data = RNG.integers(0, 256, 400, dtype=np.uint8)
    transfer = Transfer(1, slices_of(data), 1, [1, 2], None, np.zeros_like(data))
    givers = {wanted.ask.index: wanted.giver for wanted in transfer.asks()}
    assert givers == {0: 0, 1: 2, 2: 0, 3: 2}
    assert {wanted.giver for wanted in transfer.gone(1)} == {0}
    assert transfer.overdue() == [], "the first to ask knows that it has been written"
    time.sleep(0.01)
    assert [(wanted.giver, wanted.ask.index) for wanted in transfer.overdue()] == [(0, 3)]
    with pytest.raises(TransferFailed, match="node 0 has version 1 no longer"):
        transfer.gone(0)


def test_answers_to_a_transfer_that_was_given_up_are_ignored_by_the_next_of_the_same_version() -> None:
    data = RNG.integers(0, 256, 3000, dtype=np.uint8)
    into = np.zeros_like(data)
    transfer = Transfer(1, slices_of(data), 1, [1], None, into)
    asked = {wanted.ask.index for wanted in transfer.asks()}
    late = max(asked) + 1
    assert transfer.given(*given_of(data, late, data[late * 100 :][:100])) == [] and not transfer.has(late)
    assert transfer.gone(late) == []
    while not transfer.is_complete:
        for index in asked:
            assert transfer.given(*given_of(data, index, data[index * 100 :][:100])) == []
        asked = {wanted.ask.index for wanted in transfer.asks()}
    assert (into == data).all()


@pytest.mark.parametrize("length", [0, 1, 3, 4, 5, 4096, 4099])
def test_changes_unpack_to_the_new_bytes_and_are_never_longer(length: int) -> None:
    base = RNG.integers(0, 256, length, dtype=np.uint8)
    few = base.copy()
    few[: length // 50] ^= 3
    for new in (base, few, RNG.integers(0, 256, length, dtype=np.uint8)):
        encoding, payload = encode(new, base)
        assert len(payload) <= length
        assert (decode(encoding, bytes(payload), base, length) == new).all()


@pytest.mark.parametrize("payload", [b"", b"nonsense", encode(np.ones(50, np.uint8), np.zeros(50, np.uint8))[1]])
def test_changes_that_cannot_be_are_refused(payload: bytes) -> None:
    with pytest.raises(ValueError, match="changes"):
        decode(Encoding.CHANGES, payload, np.zeros(4096, np.uint8), 4096)


def test_each_receiver_has_one_first_giver_and_the_owner_gives_once() -> None:
    for needy in ([1, 2, 3], [0, 1, 2], [5]):
        for index in range(12):
            owner = 0
            receivers = [node for node in needy if node != owner]
            from_owner = [node for node in receivers if giver(index, owner, needy, node) == owner]
            assert len(from_owner) == 1
            assert {giver(index, owner, needy, node) for node in receivers} <= {owner, from_owner[0]}


def test_holdings_with_a_gap_or_an_overlap_are_refused() -> None:
    with pytest.raises(ValueError, match="byte 10 of a version is held by no node"):
        Holdings.of([0, 1], [[(0, 10)], [(20, 30)]], 30).slices()
    with pytest.raises(ValueError, match="byte 5 of a version is held by two nodes"):
        Holdings.of([0, 1], [[(0, 10)], [(5, 30)]], 30).slices()
    with pytest.raises(ValueError, match="hold 10 bytes of a version that has 30"):
        Holdings.of([0], [[(0, 10)]], 30).slices()
