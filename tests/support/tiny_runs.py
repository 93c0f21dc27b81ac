"""Tiny training runs on the toy data, for tests."""

import json
from dataclasses import replace
from functools import reduce
from pathlib import Path

import torch
from torch import nn

from earlyfuse.configs import decoders, depth, embedded, mamba_decoders, transfusion
from earlyfuse.configs.transfusion import JIT, PAPER, jit_loss, paper_loss
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.routing.causal_router import CausalRouter
from earlyfuse.models.routing.gumbel_noise import RouterNoise
from earlyfuse.models.routing.running_threshold import RunningThreshold
from earlyfuse.models.routing.token_choice import TokenChoice
from earlyfuse.models.vocabulary import Modality
from earlyfuse.parallel.trainer import Trainer

SHAPE = decoders.Shape(dim=32, layers=2, heads=2, hidden_dim=48, vocab_size=48)
SHARES = {Modality.TEXT: 0.7, Modality.IMAGE: 0.3}


def moma(shape: decoders.Shape = SHAPE, **options) -> Decoder.Config:
    return decoders.moma(
        shape, {Modality.TEXT: 2, Modality.IMAGE: 2}, SHARES, routing_rows=2, **options
    )


def token_choice(shape: decoders.Shape = SHAPE, **router) -> Decoder.Config:
    options = {"top_k": 2, "normalise": True, "scale": 1.5, "bias_rate": 0.05} | router
    return decoders.token_choice(
        shape,
        {Modality.TEXT: 4, Modality.IMAGE: 2},
        shared=decoders.Shared(everyone=3 - options["top_k"]),
        router=TokenChoice.Config(**options),
    )


MODELS = {
    "dense": lambda: decoders.dense(SHAPE),
    "moe_8x": lambda: decoders.moe(SHAPE, experts=4, routing_rows=2),
    "moma": moma,
    "shared": lambda: moma(shared=decoders.Shared(everyone=1, by_modality=1)),
    "token_choice": token_choice,
    "mot": lambda: decoders.mixture_of_transformers(SHAPE),
    "moma_causal": lambda: decoders.with_routers(
        moma(),
        causal=CausalRouter.Config(at_least_one=True),
        noise=RouterNoise.Config(end_step=20),
        weights="normalised",
        init="centred",
        init_gain=20.0,
    ),
}
THRESHOLDS = {
    "moma_threshold": lambda: decoders.with_routers(
        moma(), threshold=RunningThreshold.Config(half_life=1000.0, chooses=True)
    ),
    # beside causal routers, for inference alone
    "moma_both": lambda: decoders.with_routers(
        MODELS["moma_causal"](), threshold=RunningThreshold.Config(half_life=1000.0)
    ),
}

# two of their two or three blocks are depth-routed
DEPTHS = {
    "mod": lambda: depth.mod(decoders.dense(replace(SHAPE, layers=3)), 0.5, start=0),
    "moma_mod": lambda: depth.moma_mod(
        decoders.with_routers(moma(), causal=CausalRouter.Config()), 0.5, every=1, routing_rows=2
    ),
    "p_mod": lambda: depth.p_mod(
        MODELS["moma_causal"](), (0.6, 0.4), media_share=0.3, init="normal"
    ),
    "gamma_mod": lambda: depth.gamma_mod(
        decoders.mixture_of_transformers(replace(SHAPE, norm_order="pre")), (0, 1), media_share=0.3
    ),
    "videollm_mod": lambda: depth.videollm_mod(
        decoders.moe_1t1i(SHAPE), 0.5, every=1, start=0, media_share=0.3
    ),
    "depth_threshold": lambda: depth.moma_mod(
        THRESHOLDS["moma_threshold"](),
        0.5,
        every=1,
        routing_rows=2,
        causal="threshold",
        threshold=RunningThreshold.Config(half_life=1000.0, chooses=True),
    ),
    "static": lambda: depth.p_mod(
        moma(), (0.5, 0.5), media_share=0.3, init="normal", budget="static"
    ),
}

MAMBA_SHAPE = mamba_decoders.MambaShape(dim=32, layers=1, vocab_size=48)
MAMBAS = {
    "mamba": lambda: mamba_decoders.mamba(MAMBA_SHAPE),
    "mixture_of_mamba": lambda: mamba_decoders.mixture_of_mamba(MAMBA_SHAPE),
    "hybrid": lambda: mamba_decoders.hybrid(
        decoders.mixture_of_transformers(replace(SHAPE, layers=3)), "ams"
    ),
}


def with_vectors(model: Decoder.Config, **adapters) -> Decoder.Config:
    """``model`` for the toy data with images as vectors."""
    adapters = {"diffusion": JIT, "block": 4, "channels": 3, "features": 16} | adapters
    return transfusion.with_vectors(model, 12, **adapters)


VECTORS = {
    "tf_dense": lambda: with_vectors(decoders.dense(SHAPE), place_embedding=True),
    "tf_paper": lambda: with_vectors(decoders.dense(SHAPE), diffusion=PAPER, rotary="shared"),
    "tf_unet": lambda: with_vectors(decoders.dense(SHAPE), adapter="unet", diffusion=PAPER),
    "tf_mot": lambda: with_vectors(MODELS["mot"](), bottleneck=8),
    "tf_moma": lambda: with_vectors(MODELS["moma_causal"]()),
    "tf_clean": lambda: with_vectors(decoders.moe_1t1i(SHAPE), later_see="clean"),
    "tf_mixture_of_mamba": lambda: with_vectors(MAMBAS["mixture_of_mamba"]()),
    "tf_hybrid": lambda: with_vectors(MAMBAS["hybrid"]()),
    "tf_mod": lambda: with_vectors(DEPTHS["mod"]()),
    "tf_p_mod": lambda: with_vectors(DEPTHS["p_mod"]()),
}


def tiny_config(
    folder: Path, data: Path, model: Decoder.Config | None = None, steps: int = 6
) -> Trainer.Config:
    config = embedded.moma_4t4i()
    config.model_spec = replace(config.model_spec, model=model or moma())
    shares = {"text": 0.5, "pairs": 0.5}
    if model is not None and model.vectors is not None:
        config.loss = jit_loss() if model.vectors.diffusion == JIT else paper_loss()
    config.data = replace(config.data, folder=str(data), embedded=False, shares=shares)
    fields = {
        "dump_folder": str(folder),
        "dataloader.media_share": 0.3,
        "training.steps": steps,
        "training.seq_len": 32,
        "training.local_batch_size": 2,
        "training.global_batch_size": 4,
        "lr_scheduler.warmup_steps": 2,
        "checkpoint.interval": 3,
        "metrics.log_freq": 1,
        "validator.freq": 3,
        "validator.batch_rows": 2,
    }
    return changed(config, fields)


def changed(config, fields: dict):
    """``config`` with other values of ``fields``, in place: {"training.steps": 3}."""
    for field, value in fields.items():
        *sections, name = field.split(".")
        setattr(reduce(getattr, sections, config), name, value)
    return config


TIMES = {"tokens_per_second", "data_wait", "memory_gib", "mfu"}
TIMES |= {"first_step_seconds", "step_seconds", "tflops_per_rank"}
TIMES |= {"rank_seconds/max", "rank_seconds/min", "slowest_rank", "slowest_host"}


def run(config, stop_after: int | None = None) -> Trainer:
    trainer = config.build()
    if stop_after:
        trainer.should_continue_training = lambda: trainer.step < stop_after
    trainer.train()
    trainer.close()
    return trainer


def metrics(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def state(trainer: Trainer) -> dict[str, torch.Tensor]:
    flat = {f"model.{k}": v for k, v in trainer.model.state_dict().items()}
    optimizer = trainer.optimizers.state_dict()
    flat |= {f"optimizer.{k}": v for k, v in optimizer.items() if torch.is_tensor(v)}
    flat["lanes"], flat["tokens"] = trainer.dataloader.lanes, trainer.tokens_M
    return flat


@torch.no_grad()
def loud(model: nn.Module) -> None:
    """Scale up what makes the scan matter: input, rates of decay and steps."""
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            parameter -= 1.5  # slower decay: what was read long ago is still there
        elif name.endswith("dt_bias"):
            parameter += 3.0
        elif "_proj" in name:
            parameter *= 3.0
