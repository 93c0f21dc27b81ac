"""``benchmarks/mixture_of_depths.py``: the rivals compute the same; caches follow the schedules."""

import sys
from dataclasses import replace

import pytest
import torch
from places import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import mixture_of_depths as benchmark

from harness import verify


@pytest.mark.parametrize("competing", ["all", "image"])
def test_masks_and_the_public_way_reproduce_outputs_and_gradients(monkeypatch, competing):
    setting = benchmark.Setting(
        "dense", 64, rows=2, seq_len=128, documents=2, group="document", competing=competing
    )
    monkeypatch.setattr(benchmark, "WITH_RIVALS", (setting,))
    rivals = benchmark.Problem(setting).rivals()
    assert sum(rival.same_as is not None for rival in rivals) == 2
    verify(rivals, benchmark.TOLERANCE)


def test_flops_are_those_of_the_kept_rows():
    setting = benchmark.Setting("dense", 64, rows=2, seq_len=128, documents=2)
    half = replace(setting, seq_len=64)
    router = 6 * 2 * 128 * 64
    assert setting.flops(setting.selection(0.5)) == half.flops() + router
    group = replace(setting, group="routing_group")
    assert group.flops(group.selection(0.5)) == half.flops() + router


@pytest.mark.parametrize(
    ("system", "share"),
    [
        ("MoD, every other layer keeps 0.125", (1 + 0.125) / 2),
        ("p-MoD, shifted cosine over media", (64 + 0.5375 * 576) / 640),
        ("VideoLLM-MoD, every other layer keeps 0.2 of a frame", (1 + (64 + 4 * 28) / 640) / 2),
    ],
)
def test_caches_hold_what_is_kept(system, share):
    dense = 2 * benchmark.LAYERS * 640 * 64 * torch.float32.itemsize
    assert benchmark.cache_bytes("dense") == dense
    assert benchmark.cache_bytes(system) / dense == pytest.approx(share, abs=2e-3)
