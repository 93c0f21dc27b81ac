"""Tiny random Mambas as their own projects write them: for tests of conversion.

``mamba_ssm``'s files are made here from a Hugging Face model by the published facts alone, with
nothing of our converter.
"""

import json
from pathlib import Path

import pytest
import torch
from torch import nn


@torch.no_grad()
def hugging_face(tied: bool = True, **fields) -> nn.Module:
    """A random model of transformers in which the scan matters."""
    transformers = pytest.importorskip("transformers")
    config = transformers.MambaConfig(
        **{"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 2} | fields,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    model = transformers.MambaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            parameter += 0.3 * torch.randn_like(parameter) - 1.5
        elif name.endswith("dt_proj.bias"):
            parameter += 3.0
        elif name.endswith(("norm.weight", "norm_f.weight", "mixer.D", "conv1d.bias")):
            parameter += 0.3 * torch.randn_like(parameter)
        elif "_proj" in name:
            parameter *= 2.0
        elif "embed" in name or "lm_head" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


@torch.no_grad()
def logits(model: nn.Module, tokens_BS: torch.Tensor) -> torch.Tensor:
    return model(tokens_BS, use_cache=False).logits


def mamba_ssm_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict that ``MambaLMHeadModel`` has: the tied head under both names."""
    return {
        name.replace("backbone.embeddings.", "backbone.embedding."): tensor
        for name, tensor in model.state_dict().items()
    }


def sizes_of(model: nn.Module) -> dict:
    """``ssm_cfg`` of a model whose sizes are not the defaults."""
    config = model.config
    return {
        "d_state": config.state_size,
        "d_conv": config.conv_kernel,
        "expand": config.intermediate_size / config.hidden_size,
        "dt_rank": config.time_step_rank,
        "conv_bias": config.use_conv_bias,
    }


def write_mamba_ssm(folder: Path, model: nn.Module, **fields) -> Path:
    """Files as ``MambaLMHeadModel.save_pretrained`` wrote the first released models."""
    config = model.config
    folder.mkdir()
    description = {
        "d_model": config.hidden_size,
        "n_layer": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "ssm_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 8,
    }
    (folder / "config.json").write_text(json.dumps(description | fields))
    torch.save(mamba_ssm_state(model), folder / "pytorch_model.bin")
    return folder
