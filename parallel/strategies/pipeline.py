"""Pipeline parallelism: each rank of the ``pp`` mesh holds one or two stages of blocks.

The rows of a batch pass the stages in micro-batches of ``pipeline_parallel_microbatch_size`` rows,
by one of torch's schedules. Only activations and their gradients are sent: every rank of a pipeline
reads the same rows and derives masks, angles and routes itself. The last stage has the losses.

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
from earlyfuse.models.context import ForwardSettings
from earlyfuse.models.decoder import Decoder, Loss
from earlyfuse.parallel import compat

# schedules that are tested against one rank → stages per rank
SCHEDULES = {"1F1B": 1, "GPipe": 1, "Interleaved1F1B": 2}


class Pipeline(nn.Module):
    """This rank's stages: ``forward`` evaluates a batch, ``step`` trains."""

    def __init__(
        self, parts: list[Decoder], stages: list[PipelineStage], schedule: Any, dtype: torch.dtype
    ):
        super().__init__()
        self.parts, self.config = nn.ModuleList(parts), parts[0].config
        self.stages, self.schedule, self.dtype = stages, schedule, dtype

    def step(self, microbatches: list[dict[str, Any]]) -> None:
        """Forward and backward of all micro-batches; accumulates gradients.

        ``microbatches``: arguments of ``Decoder.forward``; the last stage calls their ``loss``.
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
        """``Decoder.forward`` of any rows, without gradients; None before the last stage."""
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
    parallelized by ``parallelize_fn``; True if the first, and if the last is among them.
    """
    mesh = parallel_dims.get_mesh("pp")
    blocks = stage_blocks(parallelism, len(model_config.layers))
    dtype = TORCH_DTYPE_MAP[training.mixed_precision_param]
    rows, seq_len = parallelism.pipeline_parallel_microbatch_size, training.seq_len
    # given shapes, so that torch need not infer them in the first step
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
    """Pass activations by name, which schedules pass as the first argument."""
    return (), arguments | {"x_TD": inputs[0]}


def stage_blocks(parallelism: ParallelismConfig, layers: int) -> list[range]:
    """Blocks of each stage: equal parts, the first ones larger if uneven.

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
    """Stages on the ``rank``-th rank of a pipeline: rank, rank + degree …"""
    degree = parallelism.pipeline_parallel_degree
    stages = 1 if degree == 1 else SCHEDULES[parallelism.pipeline_parallel_schedule]
    return range(rank, degree * stages, degree)


def microbatch(parallelism: ParallelismConfig, training: TrainingConfig) -> TrainingConfig:
    """``training`` with the rows of a stage's micro-batch as local batch, and the positions of a
    context-parallel rank as sequence length.
    """
    rows = training.local_batch_size
    if parallelism.pipeline_parallel_degree > 1:
        rows = parallelism.pipeline_parallel_microbatch_size
    positions = training.seq_len // parallelism.context_parallel_degree
    return replace(training, local_batch_size=rows, seq_len=positions)


def check_pipeline(
    parallelism: ParallelismConfig, training: TrainingConfig, model: Decoder.Config
) -> None:
    """``ValueError`` for pipelines that cannot work or are not tested against one rank."""
    degree, schedule = parallelism.pipeline_parallel_degree, parallelism.pipeline_parallel_schedule
    if degree == 1:
        return
    if not compat.can_pipeline():
        raise ValueError(
            f"parallelism.pipeline_parallel_degree ({degree}) must be 1: torchtitan 0.3's pipeline "
            "schedules need torch 2.14, the pinned torch is 2.13; use FSDP "
            "(data_parallel_shard_degree) and tensor_parallel_degree instead"
        )
    if schedule not in SCHEDULES:
        raise ValueError(
            f"parallelism.pipeline_parallel_schedule ({schedule}) must be one of "
            f"{', '.join(SCHEDULES)}: others are not supported; choose one of them"
        )
    if parallelism.fsdp_reshard_after_forward == "always":
        raise ValueError(
            "parallelism.fsdp_reshard_after_forward (always) must be default or never with "
            "pipeline parallelism: stages stay gathered for all micro-batches"
        )
    if model.shared_depth_routers():
        raise ValueError(
            f"parallelism.pipeline_parallel_degree ({degree}) must be 1 with a depth router that "
            "layers of several stages share; use data_parallel_shard_degree, or routers of their "
            "own (shared False)"
        )
    if model.vectors is not None and model.vectors.adapter == "unet":
        raise ValueError(
            f"parallelism.pipeline_parallel_degree ({degree}) must be 1 with a U-Net as vectors."
            "adapter, whose skip connections reach from the first stage to the last; use "
            'data_parallel_shard_degree, or the adapter "linear"'
        )
    _check_stages(parallelism, len(model.layers))
    _check_microbatches(parallelism, training, model)


def _check_stages(parallelism: ParallelismConfig, layers: int) -> None:
    blocks = [len(stage) for stage in stage_blocks(parallelism, layers)]
    if min(blocks) < 1:
        raise ValueError(
            f"parallelism.pipeline_parallel_degree ({parallelism.pipeline_parallel_degree}) makes "
            f"{len(blocks)} stages by {parallelism.pipeline_parallel_schedule}, each of which must "
            f"have one of the {layers} layers, but they get {blocks}; lower it, "
            "pipeline_parallel_first_stage_less_layers or pipeline_parallel_last_stage_less_layers"
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
    for index, layer in enumerate(model.layers):
        if size % layer.routing_rows:
            raise ValueError(
                f"{field} must be a multiple of routing_rows ({layer.routing_rows}) of "
                f"layers[{index}]; change one of them"
            )
    count = rows // size
    made = f"training.local_batch_size ({rows}) makes {count} micro-batches of {field}"
    if schedule != "GPipe" and count < degree:
        raise ValueError(
            f"{made}; {schedule} needs at least pipeline_parallel_degree ({degree}); raise the "
            "first or lower one of the others"
        )
    if schedule == "Interleaved1F1B" and count % (count // degree):
        raise ValueError(
            f"{made}; {schedule} needs {count // degree} equal rounds of them; make them a "
            f"multiple of pipeline_parallel_degree ({degree})"
        )
