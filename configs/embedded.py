"""Runs on the embedded corpus: minutes on two CPU cores, the same code as anywhere.

All variants share shape, data, optimizer and schedule, so their losses are comparable.
"""

from dataclasses import replace

from earlyfuse.configs import decoders, depth, mamba_decoders, stages
from earlyfuse.configs.base import base_config
from earlyfuse.configs.transfusion import JIT, PAPER, jit_loss, paper_loss, with_vectors
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.objectives.diffusion import Diffusion
from earlyfuse.models.routing.causal_router import CausalRouter
from earlyfuse.models.routing.running_threshold import RunningThreshold
from earlyfuse.models.vocabulary import Modality
from earlyfuse.parallel.checkpoint.manager import Checkpoints
from earlyfuse.parallel.trainer import Trainer
from earlyfuse.parallel.training.lr_schedule import LearningRate

IMAGE_SHARE = 0.5
SHARES = {Modality.TEXT: 1 - IMAGE_SHARE, Modality.IMAGE: IMAGE_SHARE}
# Pre-norm learns faster than MoMa's Swin order at this size: 3.27 against 3.39 nats at 300 steps.
SHAPE = decoders.Shape(
    dim=192, layers=4, heads=4, hidden_dim=384, vocab_size=2560, norm_order="pre"
)
THREE = (Modality.TEXT, Modality.IMAGE, Modality.SPEECH)
_MEASURED = RunningThreshold.Config(half_life=4096)
_CHOOSING = replace(_MEASURED, chooses=True)
# Smaller, since scans are slow on a CPU: 6 minutes, not 20. Comparable with one another only.
MAMBA_SHAPE = mamba_decoders.MambaShape(dim=128, layers=2, vocab_size=SHAPE.vocab_size)
# 16 x 16 pixels in 16 patches
VECTOR_WIDTH, VECTOR_VOCABULARY = 4 * 4 * 3, 2048
VECTOR_SHAPE = replace(SHAPE, vocab_size=VECTOR_VOCABULARY)
VECTOR_MAMBA_SHAPE = replace(MAMBA_SHAPE, vocab_size=VECTOR_VOCABULARY)
PAPER_PIXELS = replace(PAPER, data_range=1.0)
SPEECH_SHAPE = replace(MAMBA_SHAPE, vocab_size=2816, modalities=THREE)


def moma_4t4i(shape: decoders.Shape = SHAPE) -> Trainer.Config:
    """MoMa with four text and four image experts: the default"""
    return _run("moma_4t4i", decoders.with_routers(_moma_4t4i(shape), causal=CausalRouter.Config()))


def moma_4t4i_threshold(shape: decoders.Shape = SHAPE) -> Trainer.Config:
    """MoMa whose experts choose by running thresholds, in training and inference"""
    return _run(
        "moma_4t4i_threshold", decoders.with_routers(_moma_4t4i(shape), threshold=_CHOOSING)
    )


def moma_4t4i_upcycled() -> Trainer.Config:
    """moma_4t4i grown out of runs/moe_1t1i, with noise in its choice for 300 steps"""
    return stages.upcycled(_run("moma_4t4i_upcycled", _upcycled_4t4i()), "runs/moe_1t1i", 300)


def moma_4t4i_stage2() -> Trainer.Config:
    """causal routers alone, on the finished model of runs/moma_4t4i_upcycled"""
    config = _run("moma_4t4i_stage2", _upcycled_4t4i())
    return stages.causal_routers_only(
        config,
        "runs/moma_4t4i_upcycled",
        lr=4e-3,
        end_lr=4e-5,
        warmup_steps=30,
        steps=300,
    )


def dense(shape: decoders.Shape = SHAPE) -> Trainer.Config:
    """dense Chameleon of the same FLOPs per token"""
    return _run("dense", decoders.dense(shape))


def moe_8x() -> Trainer.Config:
    """eight experts that choose among all tokens"""
    model = decoders.moe(SHAPE, experts=8, routing_rows=4)
    return _run("moe_8x", decoders.with_routers(model, causal=CausalRouter.Config()))


def moe_1t1i() -> Trainer.Config:
    """one feed-forward per modality"""
    return _run("moe_1t1i", decoders.moe_1t1i(SHAPE))


def mot() -> Trainer.Config:
    """Mixture-of-Transformers: attention projections, norms and feed-forward per modality"""
    return _run("mot", decoders.mixture_of_transformers(SHAPE))


def mamba() -> Trainer.Config:
    """dense Mamba, smaller than the transformers: four blocks of 128"""
    return _run("mamba", mamba_decoders.mamba(MAMBA_SHAPE))


def mixture_of_mamba() -> Trainer.Config:
    """the same with all projections per modality: Mixture-of-Mamba"""
    return _run("mixture_of_mamba", mamba_decoders.mixture_of_mamba(MAMBA_SHAPE))


def mamba_speech() -> Trainer.Config:
    """dense Mamba over text, images and speech (needs espeak-ng once)"""
    return _with_speech(_run("mamba_speech", mamba_decoders.mamba(SPEECH_SHAPE)))


def mixture_of_mamba_speech() -> Trainer.Config:
    """the same with all projections per modality, three sets of them"""
    model = mamba_decoders.mixture_of_mamba(SPEECH_SHAPE)
    return _with_speech(_run("mixture_of_mamba_speech", model))


def mamba_moma_hybrid() -> Trainer.Config:
    """MoMa 4t4i with Mixture-of-Mamba in place of attention in three of four layers"""
    return _run("mamba_moma_hybrid", mamba_decoders.hybrid(_moma_4t4i(), "mmma"))


def _moma_4t4i(shape: decoders.Shape = SHAPE) -> Decoder.Config:
    experts = {Modality.TEXT: 4, Modality.IMAGE: 4}
    return decoders.moma(shape, experts, SHARES, routing_rows=4)


def _upcycled_4t4i() -> Decoder.Config:
    """Routers with the smallest jump of the loss at step 0 (docs/moma.md)."""
    return decoders.with_routers(_moma_4t4i(), init="centred", weights="normalised")


def moma_4t4i_shared() -> Trainer.Config:
    """MoMa 4t4i beside experts for all tokens and for all of a modality, a third as wide"""
    experts = {Modality.TEXT: 4, Modality.IMAGE: 4}
    shared = decoders.Shared(everyone=1, by_modality=1)
    model = decoders.moma(SHAPE, experts, SHARES, routing_rows=4, shared=shared)
    return _run("moma_4t4i_shared", model)


def moma_4t4i_token_choice() -> Trainer.Config:
    """four text and four image experts; each token takes one of its modality"""
    experts = {Modality.TEXT: 4, Modality.IMAGE: 4}
    return _run("moma_4t4i_token_choice", decoders.token_choice(SHAPE, experts))


def token_choice_8x() -> Trainer.Config:
    """eight experts; each token takes one, whatever its modality"""
    return _run("token_choice_8x", decoders.token_choice(SHAPE, 8))


def mod(shape: decoders.Shape = SHAPE) -> Trainer.Config:
    """Mixture-of-Depths: an eighth of each row in every other of seven blocks"""
    return _run(
        "mod", depth.mod(decoders.dense(replace(shape, layers=7)), start=0, threshold=_MEASURED)
    )


def moma_4t4i_mod(shape: decoders.Shape = SHAPE) -> Trainer.Config:
    """MoMa 4t4i, a quarter of the tokens in every other of seven blocks"""
    model = decoders.with_routers(
        _moma_4t4i(replace(shape, layers=7)), causal=CausalRouter.Config()
    )
    return _run("moma_4t4i_mod", depth.moma_mod(model, routing_rows=4))


def moma_4t4i_mod_threshold(shape: decoders.Shape = SHAPE) -> Trainer.Config:
    """the same, both by running thresholds, in training and inference"""
    model = decoders.with_routers(_moma_4t4i(replace(shape, layers=7)), threshold=_CHOOSING)
    model = depth.moma_mod(model, routing_rows=4, causal="threshold", threshold=_CHOOSING)
    return _run("moma_4t4i_mod_threshold", model)


def p_mod(shape: decoders.Shape = SHAPE) -> Trainer.Config:
    """p-MoD: fewer image tokens the deeper the block"""
    model = decoders.dense(replace(shape, layers=5))
    return _run(
        "p_mod", depth.p_mod(model, media_share=IMAGE_SHARE, init="normal", threshold=_MEASURED)
    )


def gamma_mod(shape: decoders.Shape = SHAPE) -> Trainer.Config:
    """γ-MoD: one router for all blocks between the first and the last"""
    model = decoders.dense(replace(shape, layers=5))
    return _run("gamma_mod", depth.gamma_mod(model, range(1, 4), media_share=IMAGE_SHARE))


def videollm_mod(shape: decoders.Shape = SHAPE) -> Trainer.Config:
    """VideoLLM-MoD on clips: a fifth of each frame in every other of five blocks"""
    model = decoders.dense(replace(shape, layers=5))
    model = depth.videollm_mod(model, media_share=IMAGE_SHARE, threshold=_MEASURED)
    return with_clips(_run("videollm_mod", model))


def dense_clips(shape: decoders.Shape = SHAPE) -> Trainer.Config:
    """dense Chameleon on clips in motion"""
    return with_clips(_run("dense_clips", decoders.dense(shape)))


def transfusion(shape: decoders.Shape = VECTOR_SHAPE) -> Trainer.Config:
    """Transfusion: text, and diffusion on patches of pixels (x-prediction, loss on v)"""
    return _on_vectors("transfusion", decoders.dense(shape))


def transfusion_epsilon(shape: decoders.Shape = VECTOR_SHAPE) -> Trainer.Config:
    """the same with the paper's diffusion: noise is predicted, cosine schedule"""
    config = _on_vectors("transfusion_epsilon", decoders.dense(shape), PAPER_PIXELS)
    config.loss = paper_loss()
    return config


def transfusion_mot(shape: decoders.Shape = VECTOR_SHAPE) -> Trainer.Config:
    """Transfusion, all parameters of a block by modality"""
    return _on_vectors("transfusion_mot", decoders.mixture_of_transformers(shape))


def transfusion_moma(shape: decoders.Shape = VECTOR_SHAPE) -> Trainer.Config:
    """Transfusion, four text and four image experts"""
    model = decoders.with_routers(_moma_4t4i(shape), causal=CausalRouter.Config())
    return _on_vectors("transfusion_moma", model)


def transfusion_mamba(shape: mamba_decoders.MambaShape = VECTOR_MAMBA_SHAPE) -> Trainer.Config:
    """Transfusion, dense Mamba: vectors of an image in raster order"""
    return _on_vectors("transfusion_mamba", mamba_decoders.mamba(shape))


def transfusion_mom(
    shape: mamba_decoders.MambaShape = VECTOR_MAMBA_SHAPE,
) -> Trainer.Config:
    """the same with all projections per modality"""
    return _on_vectors("transfusion_mom", mamba_decoders.mixture_of_mamba(shape))


def _on_vectors(
    name: str, model: Decoder.Config, diffusion: Diffusion.Config = JIT
) -> Trainer.Config:
    """A run of ``model`` on the corpus whose images are vectors, runs/data_vectors."""
    model = with_vectors(model, VECTOR_WIDTH, diffusion, block=16, place_embedding=True)
    config = _run(name, model)
    config.loss = jit_loss()
    config.data.vectors = True
    config.ema.decay = 0.99
    config.training.steps, config.validator.freq, config.checkpoint.interval = 1400, 350, 350
    sampler = config.sampler
    sampler.guidance, sampler.denoising_steps = 4.0, 25
    sampler.checked_images = 100
    return config


def _with_speech(config: Trainer.Config) -> Trainer.Config:
    """The same run on the corpus with spoken words and digits."""
    config.data.speech = True
    return config


def with_clips(config: Trainer.Config) -> Trainer.Config:
    """The same run on the corpus with clips, runs/data_clips; its vocabulary is as large."""
    config.data.clips = True
    return config


def _run(name: str, model: Decoder.Config) -> Trainer.Config:
    config = base_config(name, model, lr=4e-3)
    config.data.embedded = True
    config.lr_scheduler = LearningRate.Config(
        warmup_steps=60, decay_type="cosine", min_lr_factor=0.05
    )
    training = config.training
    training.local_batch_size, training.seq_len, training.steps = 4, 256, 900
    training.mixed_precision_param = "float32"
    config.checkpoint = Checkpoints.Config(interval=300, keep_latest_k=2)
    config.metrics.log_freq = 25
    config.validator.freq = 300
    config.dataloader.media_share = IMAGE_SHARE
    return config
