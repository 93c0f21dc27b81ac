"""Counts the collectives that run, and the reads of device values on the host.

    with CollectiveCounter() as counter:
        trainer.train_step(batches)
    counter.seen  # [Seen("all_gather", ranks=2, size=4096), …]

Sees all that passes the dispatcher, forward and backward: FSDP2's collectives, functional ones,
plain ``torch.distributed``, and those inside the head's operator. Sizes are those of
``parallel/estimates/communication.py``.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils._python_dispatch import TorchDispatchMode

from earlyfuse.kernels.linear_cross_entropy import op
from earlyfuse.models.blocks.branch import Kind

# operator → kind, position of the whole tensor (or list of tensors), position of the group
_PLAIN: dict[str, tuple[Kind, int, int]] = {
    "c10d::_allgather_base_": ("all_gather", 0, 2),
    "c10d::allgather_": ("all_gather", 0, 2),
    "c10d::_reduce_scatter_base_": ("reduce_scatter", 1, 2),
    "c10d::allreduce_": ("all_reduce", 0, 1),
    "c10d::alltoall_base_": ("all_to_all", 1, 2),
    "c10d::recv_": ("receive", 0, 1),
}
_FUNCTIONAL: dict[str, Kind] = {
    "_c10d_functional::all_gather_into_tensor": "all_gather",
    "_c10d_functional::reduce_scatter_tensor": "reduce_scatter",
    "_c10d_functional::all_reduce": "all_reduce",
    "_c10d_functional::all_to_all_single": "all_to_all",
}
# reading a value, or a size that depends on values
_HOST_READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::unique")


class Seen(NamedTuple):
    """One collective that ran; ``size``: bytes of the whole tensor."""

    kind: Kind
    ranks: int
    size: int


class CollectiveCounter(TorchDispatchMode):
    """Lists collectives in ``seen`` and counts reads of device values in ``host_reads``."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Seen] = []
        self.host_reads = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = func.name().partition(".")[0]
        if name in _PLAIN:
            kind, tensor, group = _PLAIN[name]
            self.seen.append(
                Seen(kind, ProcessGroup.unbox(args[group]).size(), _bytes(args[tensor]))
            )
        elif name in _FUNCTIONAL:
            kind = _FUNCTIONAL[name]
            ranks = _resolve_process_group(args[-1]).size()
            size = _bytes(args[0]) * (ranks if kind == "all_gather" else 1)
            self.seen.append(Seen(kind, ranks, size))
        elif name in _HOST_READS:
            self.host_reads += 1
        elif func is torch.ops.earlyfuse.linear_cross_entropy.default:
            with self:  # what an operator does inside passes its maker only
                return op.compute(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.nbytes
    return sum(map(_bytes, value))
