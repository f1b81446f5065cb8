"""Weights between a GPU and the host: whole pages are registered, once; what is published and loaded is the same."""

from __future__ import annotations

import itertools
import mmap
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from flowrl.weights.devices import copy_to_host, page_ranges
from flowrl.weights.loading import load_in_place
from flowrl.weights.publish import Publisher
from flowrl.weights.store import WeightStore

PAGE = mmap.PAGESIZE


@given(st.lists(st.tuples(st.integers(0, 40 * PAGE), st.integers(0, 3 * PAGE)), max_size=20))
def test_page_ranges_cover_just_the_pages_touched(spans: list[tuple[int, int]]) -> None:
    touched = {page for at, count in spans if count for page in range(at // PAGE, (at + count - 1) // PAGE + 1)}
    found = page_ranges(spans)
    pages = [page for begin, end in found for page in range(begin // PAGE, end // PAGE)]
    assert pages == sorted(touched)
    assert all(begin % PAGE == end % PAGE == 0 for begin, end in found)
    assert all(end < begin for (_, end), (begin, _) in itertools.pairwise(found)), "neighbours are one"


def test_copy_to_host_casts() -> None:
    source = torch.randn(5, 7)
    target = torch.empty(5, 7, dtype=torch.bfloat16)
    copy_to_host([(target, source)])
    assert torch.equal(target, source.bfloat16())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize(("is_pooled", "parent"), [(True, "/dev/shm"), (True, None), (False, None)])
def test_versions_off_a_gpu_and_back_onto_it(is_pooled: bool, parent: str | None, model_dir: Path) -> None:
    """More versions than there are buffers, so that buffers are written to again; from shared memory and from a disk,
    whose pages CUDA may refuse."""
    trained = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).cuda()
    served = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).cuda()
    state = served.state_dict(keep_vars=True)
    with tempfile.TemporaryDirectory(dir=parent) as root:
        publisher = Publisher(trained, model_dir, WeightStore(Path(root), 2), "bfloat16", is_pooled=is_pooled)
        for version in range(6):
            with torch.no_grad():
                for parameter in trained.parameters():
                    parameter.normal_()
            path = publisher.publish(version)
            assert path is not None
            load_in_place(state, path)
            for name, parameter in trained.state_dict().items():
                assert torch.equal(state[name], parameter.bfloat16()), f"{name} of version {version}"
        publisher.close()
