"""Every model family runs on CUDA tensors without mixing devices and without the host waiting.

There is no GPU here: forward, loss and backward are traced on fake CUDA tensors, so that a first
run on a GPU meets neither. Numbers are other tests' business.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_cuda_trace import FAMILIES
from places import SUPPORT

TRAINING = [
    *FAMILIES,
    "dense:bfloat16",
    "mod:bfloat16",
    "moma:bfloat16",
    "mixture_of_mamba:bfloat16",
    "tf_unet:bfloat16",
    "dense:spans",
    "mod:spans",
]
# routed by actual counts, or from a token alone: the host must know how many rows there are
MEANT = {
    "moma_exact": "_exact",
    "moma:validation": "_exact",
    "moe_8x:validation": "_exact",
    "moma_causal:causal": "taken_routes",
    "p_mod": "_fit",
    "videollm_mod": "_fit",
    "mod:validation": "_fit",
    "mod:causal": "_fit",
    "moma_threshold:threshold": "taken_routes",
}
STATIC = ["dense:validation", "token_choice:validation", "mixture_of_mamba:validation"]


pytestmark = pytest.mark.slow  # compiles a library, then traces all families


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    """Case → problems, of all cases in one process."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler to build the device guard of fake CUDA tensors")
    library = tmp_path_factory.mktemp("fake_cuda") / "fake_cuda.so"
    torch_folder = Path(torch.__file__).parent
    libraries = torch_folder / "lib"
    subprocess.run(
        [
            *(compiler, "-std=c++20", "-O0", "-shared", "-fPIC", SUPPORT / "fake_cuda.cpp"),
            *(f"-I{torch_folder / 'include'}", f"-L{libraries}", "-lc10", "-ltorch_cpu"),
            *(f"-Wl,-rpath,{libraries}", "-o", library),
        ],
        check=True,
    )
    ran = subprocess.run(
        [sys.executable, SUPPORT / "fake_cuda_trace.py", library, *TRAINING, *STATIC, *MEANT],
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", [c for c in (*TRAINING, *STATIC) if c not in MEANT])
def test_the_host_neither_waits_for_the_device_nor_copies(problems, case):
    assert problems[case] == []


@pytest.mark.parametrize("case", MEANT)
def test_counted_budgets_wait_where_they_are_meant_to(problems, case):
    (found,) = problems[case]
    assert found.startswith("the host waits") and found.endswith(MEANT[case])
