"""Compares the logits of two folders on random tokens; public formats by code independent of ours.
Of models with vectors also the predictions of random vectors.

Hugging Face and ``mamba_ssm`` (whose own code needs a GPU) by transformers; Meta by a forward that
rotates neighbouring pairs, straight from the shards; ours by ``load_model``. In fp32, one model in
memory at a time.

B rows, S positions, T = B·S, V vocabulary, P numbers in a vector, D width, H width of a head.
"""

from math import lcm
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from earlyfuse.data.json_files import read_json
from earlyfuse.models.batch import MixedBatch
from earlyfuse.models.blocks.linear import NORM_EPS
from earlyfuse.models.blocks.vector_adapters import VectorAdapters
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.routing.expert_choice import ExpertChoice
from earlyfuse.models.state_dicts import huggingface_mamba, meta
from earlyfuse.models.state_dicts.config_json import CONFIG, REMEDY
from earlyfuse.models.state_dicts.mamba import HEAD
from earlyfuse.models.state_dicts.plain_decoder import mamba_mixer
from earlyfuse.parallel.checkpoint.files.safetensors import open_folder
from earlyfuse.parallel.checkpoint.files.torch_save import PYTORCH_MODEL, MetaShards, TorchFiles
from earlyfuse.parallel.checkpoint.open_checkpoint import (
    OpenModel,
    Weights,
    as_module,
    open_model,
)

SEQ_LEN = 64
LARGEST_ERROR = 1e-5  # of predictions of vectors, relative
LARGEST_KL = 1e-6  # nats per token, without --dtype; another order of fp32 sums gives 1e-9


def compare(left: Path, right: Path, *, exact: bool, weights: Weights) -> None:
    """Prints the largest difference of logits and the mean KL, and that of predictions of vectors;
    ``ValueError`` if ``exact`` and one exceeds rounding. ``weights``: those of ``left`` that
    ``right`` was made from.
    """
    opened = open_model(left, weights)
    routers = opened.config.traverse(ExpertChoice.Config)
    rows = lcm(2, *(router.routing_rows for _, router, _, _ in routers))
    random = torch.Generator().manual_seed(0)
    vectors = opened.config.vectors
    seq_len = SEQ_LEN + (0 if vectors is None else vectors.block)
    tokens_BS = torch.randint(opened.vocabulary.size, (rows, seq_len), generator=random)
    outputs = [outputs_of(model, tokens_BS) for model in (opened, open_model(right))]
    logits, predicted = zip(*outputs, strict=True)
    if not logits[0].isfinite().all():
        raise ValueError(
            f"{left} itself has logits that are no numbers: some weights are NaN, infinite or "
            "damaged; take another checkpoint, or drop --verify"
        )
    difference = (logits[0] - logits[1]).abs().max().item()
    first, second = (values.double().log_softmax(-1) for values in logits)
    kl = (first.exp() * (first - second)).sum(-1).mean().item()
    spread = logits[0].std().item()
    print(
        f"verified on {tokens_BS.numel()} random tokens: largest difference of logits "
        f"{difference:.2e} (their spread {spread:.2e}), KL {kl:.2e} nats per token"
    )
    if vectors is not None:
        error = ((predicted[0] - predicted[1]).norm() / predicted[0].norm().clamp(min=1e-9)).item()
        print(f"and on random vectors: relative error of predictions {error:.2e}")
        if not error <= (LARGEST_ERROR if exact else float("inf")):
            raise ValueError(
                f"the converted model has other predictions of vectors (relative error {error:.2e},"
                f" at most {LARGEST_ERROR:.0e}); nothing was kept; report this with both configs"
            )
    if not kl <= (LARGEST_KL if exact else float("inf")):
        raise ValueError(
            f"the converted model has other logits (KL {kl:.2e}, at most {LARGEST_KL:.0e}); "
            "nothing was kept; report this with both configs"
        )


@torch.no_grad()
def outputs_of(opened: OpenModel, tokens_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns fp32 logits (B, S, V), each row one document, by the code of the folder's project,
    and predictions (T, P) of a model with vectors, else (0,).
    """
    folder, none = opened.folder, torch.zeros(0)
    if opened.format == "huggingface":
        return _by_transformers(folder, tokens_BS), none
    if opened.format == "mamba_ssm":
        return _by_transformers_from_mamba_ssm(opened, tokens_BS), none
    if opened.format == "meta":
        return _by_pairs(opened.config, MetaShards(folder), tokens_BS), none
    model = as_module(opened, dtype=torch.float32)
    batch = MixedBatch.of(tokens_BS, opened.vocabulary.modality_of(tokens_BS))
    logits_BSV = model(batch)
    if opened.config.vectors is None:
        return logits_BSV, none
    batch = _with_vectors(batch, opened.config.vectors)
    return logits_BSV, model(batch, loss=lambda *_, predicted_TP: predicted_TP)


def _with_vectors(batch: MixedBatch, vectors: VectorAdapters.Config) -> MixedBatch:
    """``batch`` with an item of random vectors in each row, after its first token."""
    shape, random = batch.tokens_BS.shape, torch.Generator().manual_seed(1)
    has_vector_BS = torch.zeros(shape, dtype=torch.bool)
    has_vector_BS[:, 1 : 1 + (vectors.block or SEQ_LEN // 2)] = True
    return MixedBatch.of(
        batch.tokens_BS,
        batch.modality_BS.masked_fill(has_vector_BS, int(vectors.modalities[0])),
        vectors_BSP=torch.randn(*shape, vectors.width, generator=random),
        has_vector_BS=has_vector_BS,
        time_BS=has_vector_BS * torch.rand(shape[0], 1, generator=random),
    )


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            "--verify of a Hugging Face or mamba_ssm folder needs transformers: pip install "
            "transformers"
        ) from error
    # it warns of missing kernels and of the unused image encoder
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def _by_transformers(folder: Path, tokens_BS: torch.Tensor) -> torch.Tensor:
    transformers = _transformers()
    if read_json(folder / CONFIG, REMEDY).field("model_type", str) == huggingface_mamba.MODEL_TYPE:
        mamba = transformers.MambaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        return mamba(tokens_BS, use_cache=False).logits
    model = transformers.ChameleonForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    # not model(…): that masks all image ids
    return model.lm_head(model.model(input_ids=tokens_BS).last_hidden_state)


def _by_transformers_from_mamba_ssm(opened: OpenModel, tokens_BS: torch.Tensor) -> torch.Tensor:
    """Computes logits by transformers: the same function, with ``mamba_ssm``'s names."""
    transformers = _transformers()
    config = opened.config
    mixer = mamba_mixer(config, "mamba_ssm")
    weights = opened.folder / PYTORCH_MODEL
    found = TorchFiles({"": weights}) if weights.is_file() else open_folder(opened.folder)
    tensors = {name: found.read(name).float() for name in found.entries}
    biased = any(name.endswith("conv1d.bias") for name in tensors)
    theirs = transformers.MambaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.dim,
        intermediate_size=mixer.inner_dim,
        num_hidden_layers=len(config.layers),
        state_size=mixer.states,
        conv_kernel=mixer.conv_width,
        time_step_rank=mixer.dt_rank,
        use_conv_bias=biased,
        tie_word_embeddings=HEAD not in tensors,
    )
    model = transformers.MambaForCausalLM(theirs).eval()
    model.load_state_dict(tensors, strict=HEAD in tensors)
    return model(tokens_BS, use_cache=False).logits


def _by_pairs(config: Decoder.Config, shards: MetaShards, tokens_BS: torch.Tensor) -> torch.Tensor:
    """Computes logits straight from Meta's layout: shard by shard, rotating neighbours."""
    count, head_dim = shards.count, config.head_dim

    def read(shard: int, name: str) -> torch.Tensor:
        return shards.read(meta.shard_name(shard, name)).float()

    def rms_norm(x_BSD: torch.Tensor, name: str) -> torch.Tensor:
        weight_D = torch.stack([read(s, f"{name}.weight") for s in range(count)]).mean(0)
        return F.rms_norm(x_BSD, (config.dim,), weight_D, NORM_EPS)

    frequency_P = config.rope_theta ** (-torch.arange(0, head_dim, 2) / head_dim)
    angle_SP = torch.arange(tokens_BS.shape[1])[:, None] * frequency_P
    turn_S1P = torch.polar(torch.ones_like(angle_SP), angle_SP)[:, None]

    def heads(x_BSD: torch.Tensor, shard: int, layer: str, which: str) -> torch.Tensor:
        x_BSNH = (x_BSD @ read(shard, f"{layer}.attention.w{which}.weight").T).unflatten(
            -1, (-1, head_dim)
        )
        if which == "v":
            return x_BSNH.transpose(1, 2)
        weight_H, bias_H = (
            read(shard, f"{layer}.attention.{which}_normalization.{leaf}")
            for leaf in ("weight", "bias")
        )
        normed = F.layer_norm(x_BSNH, (head_dim,), weight_H, bias_H, NORM_EPS)
        turned = torch.view_as_complex(normed.unflatten(-1, (-1, 2)).contiguous()) * turn_S1P
        return torch.view_as_real(turned).flatten(-2).transpose(1, 2)

    def attention(x_BSD: torch.Tensor, layer: str) -> torch.Tensor:
        out_BSD = torch.zeros_like(x_BSD)
        for s in range(count):
            q, k, v = (heads(x_BSD, s, layer, which) for which in "qkv")
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            flat = mixed.transpose(1, 2).flatten(2)
            out_BSD = out_BSD + flat @ read(s, f"{layer}.attention.wo.weight").T
        return out_BSD

    def feed_forward(x_BSD: torch.Tensor, layer: str) -> torch.Tensor:
        out_BSD = torch.zeros_like(x_BSD)
        for s in range(count):
            w1, w2, w3 = (read(s, f"{layer}.feed_forward.w{i}.weight") for i in (1, 2, 3))
            out_BSD = out_BSD + (F.silu(x_BSD @ w1.T) * (x_BSD @ w3.T)) @ w2.T
        return out_BSD

    x_BSD = torch.cat([read(s, "tok_embeddings.weight")[tokens_BS] for s in range(count)], -1)
    for number in range(len(config.layers)):
        layer = f"layers.{number}"
        for branch, norm in ((attention, "attention_norm"), (feed_forward, "ffn_norm")):
            if config.layers[0].norm_order == "pre":
                x_BSD = x_BSD + branch(rms_norm(x_BSD, f"{layer}.{norm}"), layer)
            else:
                x_BSD = x_BSD + rms_norm(branch(x_BSD, layer), f"{layer}.{norm}")
    x_BSD = rms_norm(x_BSD, "norm")
    return torch.cat([x_BSD @ read(s, "output.weight").T for s in range(count)], -1)
