"""Tiny Chameleon sources as users have them: Hugging Face's folder and the original files."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from earlyfuse.data.tokenizers.imports import import_text, import_vocabulary, import_vq

transformers = pytest.importorskip("transformers")

SIDE, CODES, START = 32, 24, 4
SPECIALS = ["<eoss>", "<racm3:break>", "<reserved08706>", "<image>"]
CORPUS = ["a small red disc on grey", "the disc is red; the field, grey.\n", "42 discs é 日本"] * 9


def code_name(code: int) -> str:
    return "IMGIMG" + "".join("ABCDEFGHIJ"[int(digit)] for digit in str(code)) + "Z"


def order(seed: int = 1) -> list[int]:
    """Code → place of its token: not the identity."""
    return np.random.default_rng(seed).permutation(CODES).tolist()


def vq_fields(**changes):
    return {
        "embed_dim": 8, "num_embeddings": CODES, "latent_channels": 12, "resolution": SIDE,
        "base_channels": 32, "channel_multiplier": [1, 2, 1], "num_res_blocks": 1,
        "attn_resolutions": [16], **changes,
    }  # fmt: skip


def fast_tokenizer(places: list[int]) -> Tokenizer:
    """Byte-level BPE laid out as Chameleon's: sentinels, image codes, more sentinels, text."""
    learnt = Tokenizer(models.BPE())
    learnt.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=290, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    learnt.train_from_iterator(CORPUS, trainer)
    fields = json.loads(learnt.to_str())["model"]
    tokens = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
    tokens |= {code_name(code): START + place for code, place in enumerate(places)}
    for name in (*SPECIALS, *fields["vocab"]):
        tokens[name] = len(tokens)
    built = Tokenizer(models.BPE(tokens, [tuple(pair) for pair in fields["merges"]]))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens(
        [AddedToken(n, normalized=False) for n in ["<s>", "<pad>", "</s>", "<unk>", *SPECIALS]]
    )
    return built


def chameleon(places: list[int], seed: int = 0, **vq_changes):
    """A tiny random model; weights and codebook spread so that many codes are used."""
    tokens = fast_tokenizer(places).get_vocab()
    config = transformers.ChameleonConfig(
        vocab_size=len(tokens) + 5, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, vocabulary_map=tokens,
        vq_config=vq_fields(**vq_changes),
    )  # fmt: skip
    torch.manual_seed(seed)
    model = transformers.ChameleonForConditionalGeneration(config).eval()
    for name, parameter in model.model.vqmodel.named_parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim > 1 else 0.5)
        if name.endswith(("norm1.weight", "norm2.weight", "norm.weight", "norm_out.weight")):
            parameter.data += 1
    spread = model.model.vqmodel.encode(pixel_values(pictures(8))).last_hidden_state
    z = model.model.vqmodel.quant_conv(spread).permute(0, 2, 3, 1).flatten(0, 2)
    picked = torch.randint(len(z), (CODES,))
    model.model.vqmodel.quantize.embedding.weight.data = z[picked] + 0.01 * torch.randn(CODES, 8)
    return model


def pictures(count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    waves = np.sin(6 * (x * rng.normal(size=(count, 1, 1)) + y * rng.normal(size=(count, 1, 1))))
    colour = waves[..., None] * rng.random((count, 1, 1, 3)) * 100 + 128
    return (colour + rng.normal(0, 9, (count, SIDE, SIDE, 3))).clip(0, 255).astype(np.uint8)


def pixel_values(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def processor(places: list[int]):
    """Hugging Face's processor on their own image backend without torchvision."""
    from transformers.models.chameleon.image_processing_pil_chameleon import (
        ChameleonImageProcessorPil,
    )

    images = ChameleonImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
    text = transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast_tokenizer(places), bos_token="<s>", eos_token="</s>",
        pad_token="<pad>", unk_token="<unk>", sep_token="<reserved08706>",
    )  # fmt: skip
    return transformers.ChameleonProcessor(images, text, image_seq_length=(SIDE // 4) ** 2)


def save_hugging_face(model, folder: Path) -> Path:
    """A user's folder: sharded weights, config, tokenizer.json and the processors' settings."""
    model.save_pretrained(folder, max_shard_size="200KB")
    processor(order()).save_pretrained(folder)
    assert (folder / "model.safetensors.index.json").exists()
    return folder


def import_all(source: Path, folder: Path) -> Path:
    assert import_vq(source, folder) and import_text(source, folder)
    assert import_vocabulary(source, folder)
    return folder


def copied(source, target, *names):
    """The named files of ``source`` in a new folder."""
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        (target / name).write_bytes((source / name).read_bytes())
    return target


def janus():
    """transformers' Janus VQ-GAN: the same network with its decoder, levels stored coarse first."""
    config = transformers.models.janus.configuration_janus.JanusVQVAEConfig(
        embed_dim=8, num_embeddings=CODES, latent_channels=12, base_channels=32,
        channel_multiplier=[1, 2, 1], num_res_blocks=1, num_patches=SIDE // 4,
    )  # fmt: skip
    torch.manual_seed(5)
    net = transformers.JanusVQVAE(config).eval()
    for name, parameter in net.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1 if "embedding" not in name else 1.0)
    return net


def taming(net) -> dict[str, torch.Tensor]:
    """The state dict of ``net`` under the names of the original files."""
    named = {}
    for name, tensor in net.state_dict().items():
        parts = name.split(".")
        if parts[:2] == ["decoder", "up"]:
            parts[2] = str(2 - int(parts[2]))
        named[".".join(parts)] = tensor
    return named


VQGAN_YAML = """
model:
  target: taming.models.vqgan.VQModel
  params:
    embed_dim: 8
    n_embed: 24
    ckpt_path: somewhere
    lossconfig: {target: taming.modules.losses.DummyLoss}
    ddconfig: {double_z: false, z_channels: 12, resolution: 32, in_channels: 3, out_ch: 3, ch: 32,
      ch_mult: [1, 2, 1], num_res_blocks: 1, attn_resolutions: [8], dropout: 0.0}
"""


def write_meta(folder, tensors):
    """The original layout: tokenizer/vqgan.{ckpt,yaml} and text_tokenizer.json."""
    (folder / "tokenizer").mkdir(parents=True)
    extra = {"loss.discriminator.main.0.weight": torch.ones(3), "model_ema.decay": torch.ones(())}
    torch.save({"state_dict": {**tensors, **extra}, "epoch": 3}, folder / "tokenizer/vqgan.ckpt")
    (folder / "tokenizer/vqgan.yaml").write_text(VQGAN_YAML)
    fast_tokenizer(order()).save(str(folder / "tokenizer/text_tokenizer.json"))
    return folder


def with_map(source, target, change):
    """The source with another vocabulary map."""
    folder = copied(source, target, *(path.name for path in source.iterdir()))
    config = json.loads((folder / "config.json").read_bytes())
    change(config["vocabulary_map"])
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def rewritten(source, target, change):
    """The source as one file whose tensors ``change`` has altered."""
    folder = copied(source, target, "config.json")
    tensors = {}
    for path in source.glob("*.safetensors"):
        tensors |= load_file(path)
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder
