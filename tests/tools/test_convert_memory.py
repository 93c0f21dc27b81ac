"""A conversion holds a tensor at a time, in every direction."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from exported_models import write

from earlyfuse.configs import decoders
from earlyfuse.models.state_dicts import config_json
from earlyfuse.models.state_dicts.plain_decoder import tensor_shapes
from earlyfuse.models.vocabulary import Vocabulary

SHARD = 120 * 10**6
SHAPE = decoders.Shape(
    dim=1024, layers=4, heads=8, kv_heads=4, hidden_dim=2816, vocab_size=8192, norm_order="swin"
)
# Imports and the first use of each library do not count: they do not grow with the checkpoint. The
# peak is that of the kernel's own account; ru_maxrss would be that of the parent at the fork.
MEASURED = """
import re, sys
from pathlib import Path
from earlyfuse.tools.convert import convert

root, small, shard = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])

def memory(field):
    status = Path("/proc/self/status").read_text()
    return int(re.search(field + r":\\s+(\\d+) kB", status)[1]) * 1024

def through(folder):
    for source, target, to in (("ours", "hf", "hf"), ("hf", "meta", "meta"), ("meta", "dcp", "dcp"),
                               ("dcp", "back", "earlyfuse")):
        convert(folder / source, folder / target, to, max_shard_bytes=shard)

through(small)
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = memory("VmRSS")
through(root)
print(memory("VmHWM") - before)
"""


def exported_model(folder: Path, shape: decoders.Shape) -> int:
    """A model of ours with plain qk-norms; returns its bytes."""
    config = decoders.dense(shape)
    tensors = {
        name: torch.ones(size) if "norm" in name else torch.rand(size)
        for name, size in tensor_shapes(config).items()
    }
    folder.mkdir(parents=True)
    write(folder, tensors, SHARD)
    vocabulary = Vocabulary(shape.vocab_size, 0, 2, 1)
    description = config_json.describe(config, vocabulary, {})
    (folder / "config.json").write_text(json.dumps(description))
    return sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_peak_memory_stays_below_the_largest_shard_whatever_the_model(tmp_path):
    small = replace(SHAPE, dim=64, hidden_dim=96, vocab_size=128)
    exported_model(tmp_path / "small" / "ours", small)
    total = exported_model(tmp_path / "large" / "ours", SHAPE)
    arguments = [str(tmp_path / "large"), str(tmp_path / "small"), str(SHARD)]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *arguments], check=True, capture_output=True, text=True
    )
    assert total > 2 * SHARD

    assert int(done.stdout) < 1.3 * SHARD
    assert sorted(p.name for p in (tmp_path / "large" / "back").glob("model-*")) == sorted(
        p.name for p in (tmp_path / "large" / "ours").glob("model-*")
    )
    for path in (tmp_path / "large" / "ours").glob("model-*"):
        assert (tmp_path / "large" / "back" / path.name).read_bytes() == path.read_bytes()
