"""Context parallelism: the positions of each row, sharded in order over the ``cp`` mesh.

Layers on single tokens need no communication. Attention all-gathers keys and values of the row; a
convolution gets the last inputs of the previous rank. A scan is affine in its initial state: ranks
all-gather their final state from zero and their decay, two (B, I, N), and compose their initial
state from those of earlier ranks (kernels/selective_scan/README.md, "Over ranks"). Backward
reduce-scatters the gradients of keys, values and inputs, and passes those of states backwards.

Every rank takes part in every collective, forward and backward, whether it needs the result or not.

B rows, S positions of a part, W ranks, K key/value heads, H width of a head, I channels, N states.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.distributed._functional_collectives import all_gather_single, reduce_scatter_single
from torch.distributed.device_mesh import DeviceMesh
from torchtitan.config import ParallelismConfig, TrainingConfig
from torchtitan.distributed import ParallelDims

from earlyfuse.kernels.selective_scan import backend_for, op, segment_decay
from earlyfuse.models.blocks.sequence_shard import FullSequence, SequenceShard
from earlyfuse.models.decoder import Decoder


def sequence_shard(parallel_dims: ParallelDims) -> SequenceShard:
    """This rank's part of each row, for ``ForwardSettings``."""
    mesh = parallel_dims.get_optional_mesh("cp")
    return FullSequence() if mesh is None else ContextParallelShard(mesh)


def positions_here(shard: SequenceShard, seq_len: int) -> slice:
    """Positions of ``shard`` in rows of ``seq_len``."""
    size = seq_len // shard.parts
    return slice(shard.index * size, (shard.index + 1) * size)


class ContextParallelShard:
    """A ``SequenceShard`` of rows sharded in order over the ranks of ``mesh``."""

    def __init__(self, mesh: DeviceMesh):
        self.mesh, self.index, self.parts = mesh, mesh.get_local_rank(), mesh.size()

    def keys_and_values(
        self, k_BSKH: torch.Tensor, v_BSKH: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Both in one all-gather, up to the last position here."""
        seq_len, heads = k_BSKH.shape[1:3]
        whole = _Gather.apply(torch.cat([k_BSKH, v_BSKH], 2), self.mesh)
        k, v = whole[:, : (self.index + 1) * seq_len].split(heads, 2)
        return k, v

    def inputs_before(self, x_BSI: torch.Tensor, count: int) -> torch.Tensor:
        """From several ranks if a part is shorter than ``count``."""
        each = min(count, x_BSI.shape[1])
        lasts = _Gather.apply(x_BSI[:, -each:], self.mesh)
        return F.pad(lasts, (0, 0, count, 0))[:, self.index * each :][:, :count]

    def scan(self, *inputs: torch.Tensor | None) -> torch.Tensor:
        """Scans twice: for the final state from zero, then from the composed initial state."""
        return _Scan.apply(self.mesh, torch.is_grad_enabled(), *inputs)


class _Gather(torch.autograd.Function):
    """All-gathers (B, S, …) along the positions; backward reduce-scatters."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
        ctx.mesh = mesh
        return all_gather_single(x.contiguous(), 1, mesh)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: torch.Tensor) -> tuple[torch.Tensor, None]:
        return reduce_scatter_single(dx.contiguous(), "sum", 1, ctx.mesh), None  # mesh


class _Scan(torch.autograd.Function):
    """``selective_scan`` over the parts of all ranks, without its states.

    Backward all-gathers the gradients of initial states, composes that of the final state here from
    those of later ranks, and then computes all gradients.
    """

    @staticmethod
    def forward(
        ctx: Any, mesh: DeviceMesh, keep: bool, *inputs: torch.Tensor | None
    ) -> torch.Tensor:
        u, delta, A, B, C, _, _, bias, group, reset = inputs
        assert u is not None and delta is not None and A is not None
        assert B is not None and C is not None
        rank, backend = mesh.get_local_rank(), backend_for("auto", A, u)
        # only the state: neither skip nor gate
        _, final_BIN, _ = op.selective_scan(
            *(u, delta, A, B, C, None, None, bias, group, reset, None), False, backend
        )
        decay_BIN = segment_decay(delta, A, bias, group, reset)
        finals, decays = all_gather_single(
            torch.stack([final_BIN, decay_BIN]).unsqueeze(0), 0, mesh
        ).unbind(1)
        start_BIN = torch.zeros_like(final_BIN)
        for before in range(rank):
            start_BIN = torch.addcmul(finals[before], decays[before], start_BIN)
        y_BSI, _, starts = op.selective_scan(*inputs, start_BIN, keep, backend)
        if keep:
            ctx.mesh, ctx.backend = mesh, backend
            ctx.save_for_backward(*inputs, start_BIN, starts, decays[rank + 1 :].clone())
        return y_BSI

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BSI: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *inputs, starts, decays = ctx.saved_tensors
        rank = ctx.mesh.get_local_rank()

        def gradients(dfinal_BIN: torch.Tensor | None, need: list[bool]) -> list[torch.Tensor]:
            return op.selective_scan_backward(
                dy_BSI, dfinal_BIN, starts, *inputs, need, ctx.backend
            )

        dstart_BIN = gradients(None, [False] * 10 + [True])[10]
        dstarts = all_gather_single(dstart_BIN.unsqueeze(0), 0, ctx.mesh)[rank + 1 :]
        dfinal_BIN = torch.zeros_like(dstart_BIN)
        for dstart_BIN, decay_BIN in zip(dstarts.flip(0), decays.flip(0), strict=True):
            dfinal_BIN = torch.addcmul(dstart_BIN, decay_BIN, dfinal_BIN)
        need = list(ctx.needs_input_grad[2:12])
        found = gradients(dfinal_BIN, [*need, False])
        wanted = [g if n else None for g, n in zip(found[:10], need, strict=True)]
        return (None, None, *wanted)  # mesh, keep


def check_context_parallel(
    parallelism: ParallelismConfig, training: TrainingConfig, model: Decoder.Config
) -> None:
    """``ValueError`` unless rows can be sharded and all branches support it."""
    degree = parallelism.context_parallel_degree
    if degree == 1:
        return
    field = f"parallelism.context_parallel_degree ({degree})"
    if training.seq_len % (2 * degree):
        raise ValueError(
            f"{field} must split training.seq_len ({training.seq_len}) into equal parts of even "
            f"length; make seq_len a multiple of {2 * degree}, or change the degree"
        )
    for name in ("tensor_parallel_degree", "expert_parallel_degree", "pipeline_parallel_degree"):
        if getattr(parallelism, name) > 1:
            raise ValueError(
                f"{field} must be 1 together with {name} ({getattr(parallelism, name)}): they are "
                "not supported together; use one of them, and FSDP for the rest"
            )
    model.check_use("context_parallel", f"{field} must be 1")
