"""Pipeline parallelism: each rank of the ``pp`` mesh holds some of the blocks, as one stage or two.

The rows of a batch go through the stages in micro-batches of ``pipeline_parallel_microbatch_size``
rows, by one of torch's schedules; activations travel forward, their gradients backward. Every rank
of a pipeline reads the same rows: a stage works out masks, angles and routes from the modalities
and positions itself, so nothing else travels. Only the rank of the last stage has losses.

T tokens of a micro-batch, D width.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, get_schedule_class
from torchtitan.config import TORCH_DTYPE_MAP, ParallelismConfig, TrainingConfig
from torchtitan.distributed import ParallelDims

from earlyfuse.models.batch import MixedBatch
from earlyfuse.models.blocks.experts import ExpertPool
from earlyfuse.models.context import ForwardSettings
from earlyfuse.models.decoder import Decoder, Loss
from earlyfuse.parallel import compat

# the schedules that are tested against one rank, and the stages that each rank has
SCHEDULES = {"1F1B": 1, "GPipe": 1, "Interleaved1F1B": 2}
_OWN_CUTS = (
    "module_fqns_per_model_part",
    "pipeline_parallel_layers_per_stage",
    "pipeline_parallel_schedule_csv",
)


class Pipeline(nn.Module):
    """The stages that this rank holds: called, they evaluate a batch; ``step`` trains."""

    def __init__(
        self, parts: list[Decoder], stages: list[PipelineStage], schedule: Any, dtype: torch.dtype
    ):
        super().__init__()
        self.parts, self.config = nn.ModuleList(parts), parts[0].config
        self.stages, self.schedule, self.dtype = stages, schedule, dtype

    def step(self, microbatches: list[dict[str, Any]]) -> None:
        """Forward and backward of all micro-batches; adds up gradients.

        ``microbatches``: arguments of ``Decoder.forward``; their ``loss`` returns what to minimise,
        and is called on the ranks of the last stage alone.
        """
        tokens = [(arguments["batch"].tokens_BS,) for arguments in microbatches]
        self.schedule.step(
            arg_mbs=tokens if self.stages[0].is_first else None,
            kwarg_mbs=microbatches,
            target_mbs=[None] * len(microbatches),
            return_outputs=False,
        )

    @torch.no_grad()
    def forward(
        self,
        batch: MixedBatch,
        settings: ForwardSettings | None = None,
        *,
        loss: Loss | None = None,
    ) -> Any:
        """``Decoder.forward`` of any number of rows without gradients; None except from the last
        stage.
        """
        for stage in self.stages:
            ranks, index = dist.get_world_size(stage.group), stage.stage_index
            x = tokens_BS = batch.tokens_BS
            if not stage.is_first:
                x = torch.empty(
                    tokens_BS.numel(), self.config.dim, dtype=self.dtype, device=tokens_BS.device
                )
                dist.recv(x, group=stage.group, group_src=(index - 1) % ranks)
            # (T, D), except from the last stage
            x = stage.submod(x, batch=batch, settings=settings, loss=loss)
            if stage.is_last:
                return x
            dist.send(x, group=stage.group, group_dst=(index + 1) % ranks)
        return None


def pipeline(
    model: Decoder,
    *,
    parallel_dims: ParallelDims,
    training: TrainingConfig,
    parallelism: ParallelismConfig,
    device: torch.device,
    model_config: Decoder.Config,
    parallelize_fn: Callable[..., Decoder],
    loss_fn: Any,  # each micro-batch of ``Pipeline.step`` brings its own
    **settings: Any,
) -> tuple[Pipeline, list[Decoder], bool, bool]:
    """torchtitan's ``pipelining_fn``: this rank's stages of ``model`` (on the meta device), each
    spread over its ranks by ``parallelize_fn``, and whether the first and the last are among them.
    """
    mesh = parallel_dims.get_mesh("pp")
    blocks = stage_blocks(parallelism, len(model_config.layers))
    dtype = TORCH_DTYPE_MAP[training.mixed_precision_param]
    rows, seq_len = parallelism.pipeline_parallel_microbatch_size, training.seq_len
    # what enters and leaves a stage is known: nothing has to be tried out in the first step
    tokens_BS = torch.empty(rows, seq_len, dtype=torch.int64, device="meta")
    activations_TD = torch.empty(
        rows * seq_len, model_config.dim, dtype=dtype, device="meta", requires_grad=True
    )
    settings |= {"parallel_dims": parallel_dims, "training": training, "parallelism": parallelism}
    parts, stages = [], []
    for index in rank_stages(parallelism, mesh.get_local_rank()):
        part = deepcopy(model)
        part.keep(blocks[index])
        part.register_forward_pre_hook(_take_activations, with_kwargs=True)
        parts.append(parallelize_fn(part, **settings))
        stages.append(
            PipelineStage(
                parts[-1],
                index,
                len(blocks),
                device,
                input_args=activations_TD if index else tokens_BS,
                output_args=activations_TD,  # losses do not travel
                group=mesh.get_group(),
            )
        )
    schedule_class = get_schedule_class(parallelism.pipeline_parallel_schedule)
    schedule = schedule_class(
        stages if issubclass(schedule_class, PipelineScheduleMulti) else stages[0],
        n_microbatches=training.local_batch_size // rows,
        loss_fn=lambda loss, target: loss,  # the head has made it
        scale_grads=False,
    )
    whole = Pipeline(parts, stages, schedule, dtype)
    return whole, parts, stages[0].is_first, stages[-1].is_last


def _take_activations(
    part: nn.Module, inputs: tuple[torch.Tensor], arguments: dict[str, Any]
) -> tuple[tuple[()], dict[str, Any]]:
    """A schedule hands over what travels as the first argument; a ``Decoder`` has it last."""
    return (), arguments | {"x_TD": inputs[0]}


# ---------------------------------------------------------------- who holds what


def stage_blocks(parallelism: ParallelismConfig, layers: int) -> list[range]:
    """The blocks of each stage: equal parts, the first ones larger where it does not come out even.

    Embedding and head count as ``pipeline_parallel_first_stage_less_layers`` and ``…_last_…``
    blocks. One stage without pipeline parallelism.
    """
    if parallelism.pipeline_parallel_degree == 1:
        return [range(layers)]
    stages = parallelism.pipeline_parallel_degree
    stages *= SCHEDULES[parallelism.pipeline_parallel_schedule]
    first = parallelism.pipeline_parallel_first_stage_less_layers
    last = parallelism.pipeline_parallel_last_stage_less_layers
    size, more = divmod(layers + first + last, stages)
    sizes = [size + (stage < more) for stage in range(stages)]
    sizes[0] -= first
    sizes[-1] -= last
    return [range(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]


def rank_stages(parallelism: ParallelismConfig, rank: int) -> range:
    """Stages on the ``rank``-th rank of a pipeline: every so many, from its own number on."""
    degree = parallelism.pipeline_parallel_degree
    stages = 1 if degree == 1 else SCHEDULES[parallelism.pipeline_parallel_schedule]
    return range(rank, degree * stages, degree)


def microbatch(parallelism: ParallelismConfig, training: TrainingConfig) -> TrainingConfig:
    """``training`` with what a rank takes at once: the rows that a stage does as its local batch,
    the positions of a row that it has as the sequence length.
    """
    rows = training.local_batch_size
    if parallelism.pipeline_parallel_degree > 1:
        rows = parallelism.pipeline_parallel_microbatch_size
    positions = training.seq_len // parallelism.context_parallel_degree
    return replace(training, local_batch_size=rows, seq_len=positions)


# ---------------------------------------------------------------- what cannot be split


def check_pipeline(
    parallelism: ParallelismConfig, training: TrainingConfig, model: Decoder.Config
) -> None:
    """``ValueError`` for what cannot be split into stages, or was not compared with one rank."""
    degree, schedule = parallelism.pipeline_parallel_degree, parallelism.pipeline_parallel_schedule
    if degree == 1:
        return
    if not compat.can_pipeline():
        raise ValueError(
            f"parallelism.pipeline_parallel_degree ({degree}) must be 1: torchtitan 0.3's pipeline "
            "schedules need torch 2.14, the pinned torch is 2.13; spread by FSDP "
            "(data_parallel_shard_degree) and tensor_parallel_degree instead"
        )
    if schedule not in SCHEDULES:
        raise ValueError(
            f"parallelism.pipeline_parallel_schedule ({schedule}) must be one of "
            f"{', '.join(SCHEDULES)}: the others have not been compared with one rank"
        )
    for field in _OWN_CUTS:
        if getattr(parallelism, field):
            raise ValueError(
                f"parallelism.{field} ({getattr(parallelism, field)}) must not be set: blocks are "
                "shared out evenly; move some by pipeline_parallel_first_stage_less_layers and "
                "pipeline_parallel_last_stage_less_layers"
            )
    if parallelism.fsdp_reshard_after_forward == "always":
        raise ValueError(
            "parallelism.fsdp_reshard_after_forward (always) must be default or never with "
            "pipeline parallelism: a stage stays gathered for all micro-batches of the schedule"
        )
    _check_stages(parallelism, len(model.layers))
    _check_microbatches(parallelism, training, model)


def _check_stages(parallelism: ParallelismConfig, layers: int) -> None:
    blocks = stage_blocks(parallelism, layers)
    if min(map(len, blocks)) < 1:
        first = parallelism.pipeline_parallel_first_stage_less_layers
        last = parallelism.pipeline_parallel_last_stage_less_layers
        raise ValueError(
            f"parallelism.pipeline_parallel_degree ({parallelism.pipeline_parallel_degree}) makes "
            f"{len(blocks)} stages by {parallelism.pipeline_parallel_schedule}, and each must have "
            f"one of the {layers} layers at least, but they get {list(map(len, blocks))}; lower "
            f"it, pipeline_parallel_first_stage_less_layers ({first}) or "
            f"pipeline_parallel_last_stage_less_layers ({last}), or take more layers"
        )


def _check_microbatches(
    parallelism: ParallelismConfig, training: TrainingConfig, model: Decoder.Config
) -> None:
    degree, schedule = parallelism.pipeline_parallel_degree, parallelism.pipeline_parallel_schedule
    rows, size = training.local_batch_size, parallelism.pipeline_parallel_microbatch_size
    field = f"parallelism.pipeline_parallel_microbatch_size ({size})"
    if size < 1 or rows % size:
        raise ValueError(
            f"{field} must divide training.local_batch_size ({rows}); change one of them"
        )
    for name, pool, _, _ in model.traverse(ExpertPool.Config):
        if size % pool.router.routing_rows:
            raise ValueError(
                f"{field} must be a multiple of routing_rows ({pool.router.routing_rows}) of "
                f"{name}, within which a choice of experts is made; change one of them"
            )
    count = rows // size
    made = f"training.local_batch_size ({rows}) makes {count} micro-batches of {field}"
    if schedule != "GPipe" and count < degree:
        raise ValueError(
            f"{made}, and {schedule} needs as many as pipeline_parallel_degree ({degree}); raise "
            "the first or lower one of the others"
        )
    if schedule == "Interleaved1F1B" and count % (count // degree):
        raise ValueError(
            f"{made}, which {schedule} cannot share out into {count // degree} equal rounds; make "
            f"them a multiple of pipeline_parallel_degree ({degree})"
        )
