"""Configurations of the kernels of ``triton_kernels.py``, and the tiles that follow from them.

A configuration has the blocks of a tile (BLOCK_M × BLOCK_N of the result, BLOCK_K of the inner
dimension), programs per processor, warps and stages. This module needs Triton.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from earlyfuse.kernels.triton_support import tuned

BAND = 8  # row blocks; see triton_kernels.py


def tiles(arguments: Mapping[str, Any]) -> dict[str, list[int]]:
    """Shape of a tile of each operand that may come by TMA, for the blocks in ``arguments``."""
    m, n, k = (arguments[f"BLOCK_{axis}"] for axis in "MNK")
    a, b = [m, k], [1, n, k] if arguments.get("TRANSPOSED") else [1, k, n]
    return {
        "a_ptr": a, "b_ptr": b, "a2_ptr": a, "b2_ptr": b,
        "w1_ptr": [1, n, k], "w3_ptr": [1, n, k], "w2_ptr": [1, k, n],
        "p_ptr": [1, 1, k, m], "q_ptr": [1, 1, k, n],
    }  # fmt: skip


def _set_tiles(arguments: dict[str, Any]) -> None:
    """Before a launch: descriptors get the tiles of the configuration that is launched."""
    for name, tile in tiles(arguments).items():
        if isinstance(operand := arguments.get(name), TensorDescriptor):
            operand.block_shape = tile


def _config(m: int, n: int, k: int, warps: int, stages: int, per_sm: int = 1) -> triton.Config:
    blocks = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "PER_SM": per_sm}
    return triton.Config(blocks, num_warps=warps, num_stages=stages, pre_hook=_set_tiles)


# None of these spills on sm_80, sm_90 or sm_100 (test_kernels_compiled.py); half precision:
HALF = (
    _config(128, 128, 64, 8, 3),
    _config(256, 128, 64, 8, 3),
    _config(64, 128, 64, 4, 4, 2),
)
HALF_BACKWARD = (
    _config(128, 128, 64, 8, 3),
    _config(128, 64, 64, 8, 3, 2),
    _config(64, 128, 64, 8, 3, 2),
)
# two accumulators
HALF_GATE_UP = (
    _config(128, 64, 64, 8, 3, 2),
    _config(64, 128, 64, 8, 3, 2),
    _config(64, 64, 64, 4, 4, 2),
)
# weight gradients load row ids, then rows: five stages make three buffers of these, three only two
# (on sm_80 two and one), and then no tile is on its way while another is waited for
HALF_SUMS = (
    _config(128, 128, 64, 8, 5),
    _config(256, 128, 64, 8, 5),
    _config(64, 128, 64, 4, 5, 2),
)
ONE_PRODUCT = (HALF[1],)  # two spill, unless TMA saves the registers of addresses
FROM_SM_90 = (_config(128, 128, 64, 8, 3),)  # of gate and up: registers of sm_80 do not suffice
SINGLE = (_config(64, 64, 32, 8, 2, 2),)  # fp32 without tensor cores


def _suitable(configs: list[triton.Config], arguments: dict, **flags: Any) -> list[triton.Config]:
    """Configurations for the dtype of the tensors, for their device, and for two products."""
    # the first operand or, if all come by TMA, which is never used for fp32, the route
    first = next(value for value in arguments.values() if isinstance(value, torch.Tensor))
    single = first.dtype == torch.float32
    old = torch.cuda.get_device_capability(first.device) < (9, 0)
    return [
        config
        for config in configs
        if (config in SINGLE) == single
        and not (old and config in FROM_SM_90)
        and not (flags.get("TWO") and config in ONE_PRODUCT and not flags["TMA"])
    ]


def tuned_for(
    half: tuple[triton.Config, ...], key: list[str], **options: Any
) -> Callable[[Any], Any]:
    """Autotuning over ``half``, or over ``SINGLE`` for fp32."""
    prune = {"early_config_prune": _suitable}
    return tuned([*half, *SINGLE], key=key, prune_configs_by=prune, **options)
