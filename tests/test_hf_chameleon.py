"""Our dense decoder against transformers' Chameleon, weights copied key by key."""

import pytest
import torch
from torch import nn

from earlyfuse.configs import decoders

KEYS = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "lm_head",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "feed_forward_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "self_attn.q_norm": "attention.q_norm",
    "self_attn.k_norm": "attention.k_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
}


def our_key(theirs: str) -> str:
    prefix, name = "", theirs
    if theirs.startswith("model.layers."):
        _, layers, number, name = theirs.split(".", 3)
        prefix = f"{layers}.{number}."
    module, _, leaf = name.rpartition(".")
    ours = prefix + KEYS[module]
    return ours if "feed_forward.w" in ours else f"{ours}.{leaf}"


def chameleon(swin_norm: bool, kv_heads: int) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.ChameleonConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        max_position_embeddings=64,
        swin_norm=swin_norm,
        vocabulary_map={
            "<image>": 4,
            **{f"IMGIMG{letter}Z": 8 + i for i, letter in enumerate("ABCD")},
        },
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
        if "norm" in name:  # unequal rows per head, and no norm is the identity
            nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.3)
        elif parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.15)
    return model


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("swin_norm", [False, True])
def test_logits_equal_those_of_transformers(swin_norm, kv_heads):
    theirs = chameleon(swin_norm, kv_heads)
    shape = decoders.Shape(
        dim=64,
        layers=3,
        heads=4,
        kv_heads=kv_heads,
        hidden_dim=80,
        vocab_size=96,
        norm_order="swin" if swin_norm else "pre",
    )
    ours = decoders.dense(shape).build()
    weights = {our_key(k): v for k, v in theirs.state_dict().items() if "vqmodel" not in k}
    ours.load_state_dict(weights, strict=True)
    ours.eval()
    tokens = torch.randint(0, 96, (2, 33), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        # before transformers' mask on image ids, which would hide half of the vocabulary
        expected = theirs.lm_head(theirs.model(input_ids=tokens).last_hidden_state)
        torch.testing.assert_close(ours(tokens), expected, rtol=0, atol=2e-5)
        assert expected.std() > 0.5, "a comparison of zeros would prove nothing"
