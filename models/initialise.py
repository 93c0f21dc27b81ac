"""Initial values of every parameter, in one place.

=====================================  ==========================================================
parameter                              initial value
=====================================  ==========================================================
embedding                              normal(0, 1), cut at ±3: with a small one, Adam's steps
                                       are as large as the rows themselves and learning is slow
head, wq, wk, wv, w1, w3               normal(0, std), cut at ±3 std
wo, w2 (write into the residual)       normal(0, std / sqrt(2 · layers)), cut likewise
router                                 normal(0, std), cut likewise
norm weights                           1
norm biases                            0
=====================================  ==========================================================

Each parameter draws from a generator of its own, seeded by the model's seed and the parameter's
name: values do not depend on the order of construction, on other parameters, or on how many ranks
there are.
"""

import zlib

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

RESIDUAL_WRITERS = ("wo", "w2")


@torch.no_grad()
def initialise(model: nn.Module, *, std: float, layers: int, seed: int) -> None:
    """Fill all parameters of ``model`` in place, whole or sharded, by the table above."""
    for name, parameter in model.named_parameters():
        for wrapper in ("_checkpoint_wrapped_module.", "_orig_mod."):
            name = name.replace(wrapper, "")
        leaf = name.removesuffix(".weight").rpartition(".")[2]
        if leaf == "bias":
            parameter.zero_()
        elif leaf.endswith("norm"):
            parameter.fill_(1.0)
        else:
            scale = std
            if leaf == "tok_embeddings":
                scale = 1.0
            elif leaf in RESIDUAL_WRITERS:
                scale = std / (2 * layers) ** 0.5
            _fill_normal(parameter, scale, seed=zlib.crc32(f"{seed}:{name}".encode()))


def _fill_normal(parameter: torch.Tensor, std: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.empty(parameter.shape, dtype=torch.float32)
    torch.nn.init.trunc_normal_(values, std=std, a=-3 * std, b=3 * std, generator=generator)
    if isinstance(parameter, DTensor):
        values = values.to(parameter.device_mesh.device_type)
        values = distribute_tensor(
            values, parameter.device_mesh, parameter.placements, src_data_rank=None
        )
    parameter.copy_(values)
