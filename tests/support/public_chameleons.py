"""Tiny random Chameleons as their own projects write them: for tests of conversion.

Meta's files are made here from a Hugging Face model by the published facts alone, element by
element, with nothing of our converter.
"""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

VOCABULARY_MAP = {
    "<s>": 0,
    "<pad>": 1,
    "</s>": 2,
    "<image>": 3,
    "<eoss>": 4,
    "<racm3:break>": 5,
    # not in the order of the codes, as in general
    **{f"IMGIMG{letter}Z": number for letter, number in zip("ABCD", (10, 8, 11, 9), strict=True)},
}


def chameleon(swin_norm: bool = False, kv_heads: int = 4, shards: int | None = None) -> nn.Module:
    """A random model of transformers. ``shards``: heads of one share their qk-norm row; None: none
    does."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ChameleonConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        swin_norm=swin_norm,
        vocabulary_map=VOCABULARY_MAP,
        vq_config={
            "embed_dim": 32,
            "num_embeddings": 4,
            "latent_channels": 32,
            "resolution": 32,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "attn_resolutions": [],
        },
    )
    torch.manual_seed(0)
    model = transformers.ChameleonForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:  # no norm is the identity
            nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.3)
        elif parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.15)
        if shards and ("q_norm" in name or "k_norm" in name):
            rows = parameter.data.unflatten(0, (shards, -1))
            rows.copy_(rows[:, :1].expand_as(rows).clone())
    return model


@torch.no_grad()
def logits(model: nn.Module, tokens_BS: torch.Tensor) -> torch.Tensor:
    """Before transformers' mask on image ids, which would hide part of the vocabulary."""
    return model.lm_head(model.model(input_ids=tokens_BS).last_hidden_state)


def in_pairs(halves: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows (0, h/2, 1, h/2 + 1, …) of each head: Meta's order from Hugging Face's."""
    half = head_dim // 2
    rows = []
    for head in range(len(halves) // head_dim):
        for i in range(half):
            rows += [halves[head * head_dim + i], halves[head * head_dim + half + i]]
    return torch.stack(rows)


def meta_shard(model: nn.Module, shard: int, shards: int) -> dict[str, torch.Tensor]:
    """Shard of a Hugging Face model on one of Meta's model-parallel ranks."""
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    config = model.config
    head_dim = config.hidden_size // config.num_attention_heads

    def part(name: str, dim: int) -> torch.Tensor:
        return state[name].chunk(shards, dim)[shard].clone()

    held = {
        "tok_embeddings.weight": part("model.embed_tokens.weight", 1),
        "output.weight": part("lm_head.weight", 0),
        "norm.weight": state["model.norm.weight"].clone(),
        "rope.freqs": torch.ones(head_dim // 2),
    }
    for number in range(config.num_hidden_layers):
        theirs, ours = f"model.layers.{number}.", f"layers.{number}."
        for which in "qkv":
            weight = part(f"{theirs}self_attn.{which}_proj.weight", 0)
            rotary = which != "v"
            held[f"{ours}attention.w{which}.weight"] = (
                in_pairs(weight, head_dim) if rotary else weight
            )
            for leaf in ("weight", "bias") if rotary else ():
                rows = part(f"{theirs}self_attn.{which}_norm.{leaf}", 0)
                assert all(torch.equal(row, rows[0]) for row in rows), "one row for a shard"
                held[f"{ours}attention.{which}_normalization.{leaf}"] = in_pairs(rows[0], head_dim)
        held[f"{ours}attention.wo.weight"] = part(f"{theirs}self_attn.o_proj.weight", 1)
        for w, name, dim in ((1, "gate", 0), (3, "up", 0), (2, "down", 1)):
            held[f"{ours}feed_forward.w{w}.weight"] = part(f"{theirs}mlp.{name}_proj.weight", dim)
        held[f"{ours}attention_norm.weight"] = state[f"{theirs}input_layernorm.weight"].clone()
        held[f"{ours}ffn_norm.weight"] = state[f"{theirs}post_attention_layernorm.weight"].clone()
    return held


def write_meta(folder: Path, model: nn.Module, shards: int) -> Path:
    """Meta's folder of a Hugging Face model."""
    folder.mkdir()
    config = model.config
    parameters = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_parameters["rope_theta"],
        "swin_norm": config.swin_norm,
        "qk_normalization": True,
    }
    (folder / "params.json").write_text(
        json.dumps({"model_parallel_size": 16, "model": parameters})
    )
    (folder / "consolidate_params.json").write_text(json.dumps({"model_parallel_size": shards}))
    for shard in range(shards):
        name = f"consolidated.{shard:02d}.pth" if shards > 1 else "consolidated.pth"
        torch.save(meta_shard(model, shard, shards), folder / name)
    vocabulary = {"model": {"vocab": VOCABULARY_MAP}, "added_tokens": []}
    (folder / "text_tokenizer.json").write_text(json.dumps(vocabulary))
    return folder
