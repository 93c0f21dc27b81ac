"""Building a sharded model takes host memory for the shard, not for the model."""

import subprocess
import sys
from pathlib import Path

import pytest
from places import SUPPORT

RANKS = 64
PROGRAM = SUPPORT / "memory_ranks.py"
MIB = 1 << 20


@pytest.fixture(scope="module")
def measured():
    """(model, shard, peak) in bytes, for a model and one four times as large."""
    command = [sys.executable, str(PROGRAM), str(RANKS), "512", "1024"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [tuple(map(int, line.split())) for line in done.stdout.splitlines()[-2:]]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_building_a_sharded_model_takes_the_memory_of_a_shard(measured):
    (small, _, small_peak), (large, large_shard, large_peak) = measured
    assert large > 3.5 * small and large > 200 * MIB  # or else nothing is shown
    assert large_shard == pytest.approx(large / RANKS, rel=0.1)
    # the shard, and one block of rows that values are drawn in
    assert large_peak < 2 * large_shard + 16 * MIB
    assert large_peak - small_peak < (large - small) / 16
