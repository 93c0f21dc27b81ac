"""The training step that estimates describe: a model and how it is laid out over ranks."""

from dataclasses import dataclass

import torch
from torchtitan.config import TORCH_DTYPE_MAP, ParallelismConfig, TrainingConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.activation_checkpoint import ActivationCheckpointing

from earlyfuse.models.blocks.branch import Microbatch
from earlyfuse.models.decoder import Decoder
from earlyfuse.parallel.strategies.pipeline import microbatch, rank_stages, stage_blocks
from earlyfuse.parallel.trainer import Trainer, check
from earlyfuse.parallel.training.config_checks import accumulation_steps


@dataclass(frozen=True)
class Step:
    """An optimizer step of ``model`` on the ranks of ``dims``."""

    model: Decoder.Config
    dims: ParallelDims
    training: TrainingConfig
    parallelism: ParallelismConfig
    recompute: ActivationCheckpointing.Config | None
    averages: bool = False  # of the parameters

    @classmethod
    def of(cls, config: Trainer.Config, ranks: int) -> "Step":
        """The step of ``config`` on ``ranks`` ranks; ``ValueError`` if it cannot run there."""
        model = check(config, ranks)
        dims = ParallelDims.from_config(config.parallelism, ranks)
        averages, recompute = config.ema.decay > 0, config.activation_checkpoint
        return cls(model, dims, config.training, config.parallelism, recompute, averages)

    @property
    def param_dtype(self) -> torch.dtype:
        """Dtype of computation and of gathered parameters."""
        return TORCH_DTYPE_MAP[self.training.mixed_precision_param]

    @property
    def data_ranks(self) -> int:
        """Ranks, or groups of ranks, that read different rows."""
        return self.dims.dp_replicate * self.dims.dp_shard

    @property
    def microbatches(self) -> int:
        """Micro-batches of a step; ``ValueError`` if they do not make up the global batch."""
        return accumulation_steps(self.training, self.data_ranks)

    @property
    def rows(self) -> int:
        """Rows of the global batch."""
        return self.microbatches * self.training.local_batch_size * self.data_ranks

    @property
    def parts(self) -> int:
        """Parts of a micro-batch that pass a pipeline one by one; 1 without a pipeline."""
        return self.training.local_batch_size // self.local_batch.rows

    @property
    def local_batch(self) -> Microbatch:
        """The part of a micro-batch that branches compute, and the ranks that share it."""
        part = microbatch(self.parallelism, self.training)
        return Microbatch(
            rows=part.local_batch_size,
            seq_len=part.seq_len,
            itemsize=self.param_dtype.itemsize,
            tensor_ranks=self.dims.tp,
            context_ranks=self.dims.cp,
            expert_ranks=self.dims.ep,
        )

    def stages(self, pipeline_rank: int) -> list[range]:
        """Blocks of each stage of a pipeline rank; of all blocks without a pipeline."""
        stages = stage_blocks(self.parallelism, len(self.model.layers))
        return [stages[index] for index in rank_stages(self.parallelism, pipeline_rank)]

    def axis_ranks(self, axis: str) -> int:
        """Ranks along a mesh axis."""
        sharded = self.dims.dp_shard * self.dims.cp
        if axis == "efsdp":
            return sharded * self.dims.tp // self.dims.ep
        return sharded if axis == "fsdp" else int(getattr(self.dims, axis))
