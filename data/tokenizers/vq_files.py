"""Where the VQ-GAN of a Chameleon checkpoint lies, and its tensors, from files of others.

- ``vqgan.ckpt``, the original: read as data only (``weights_only``), with
  ``vqgan.yaml`` beside it for its sizes. It alone has the decoder, so it is preferred.
- Hugging Face: ``model.vqmodel.*`` in ``model.safetensors`` or in its shards, sizes from
  ``vq_config`` in config.json; or a folder of the VQ-GAN alone, as ``ChameleonVQVAE`` saves it.
"""

import json
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open

CHECKPOINT = "vqgan.ckpt"
_ALONE = "chameleon_vqgan"
_PREFIXES = ("model.vqmodel.", "vqmodel.")
# of training: losses with their discriminator, moving averages, counters
_OF_TRAINING = ("loss.", "model_ema.", "ema.", "colorize")
# what Hugging Face's config.json leaves out when it has these values: those of the released models
_RELEASED: dict[str, Any] = {
    "embed_dim": 256,
    "num_embeddings": 8192,
    "double_latent": False,
    "latent_channels": 256,
    "resolution": 512,
    "in_channels": 3,
    "base_channels": 128,
    "channel_multiplier": [1, 1, 2, 2, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [],
    "attn_type": "vanilla",
}
_YAML_NAMES = {
    "n_embed": "num_embeddings",
    "double_z": "double_latent",
    "z_channels": "latent_channels",
    "ch": "base_channels",
    "ch_mult": "channel_multiplier",
}


@dataclass(frozen=True)
class VQFiles:
    """``tensors`` by their names inside the VQ-GAN, ``origin`` the file or folder they are from."""

    origin: Path
    tensors: dict[str, torch.Tensor]
    config: dict[str, Any]


def find_vq(source: Path) -> VQFiles | None:
    """The VQ-GAN of ``source``, or none. ``ValueError`` names files that are damaged or pickled."""
    config = vq_config(source)
    checkpoint = _checkpoint(source)
    if checkpoint is not None:
        return VQFiles(checkpoint, _checkpoint_tensors(checkpoint), config)
    tensors = _safetensors(source, alone=read_config(source).get("model_type") == _ALONE)
    return VQFiles(source, tensors, config) if tensors else None


def vq_config(source: Path) -> dict[str, Any]:
    """Sizes under Hugging Face's names, from vqgan.yaml or config.json; else the released ones."""
    checkpoint = _checkpoint(source)
    if checkpoint is not None and checkpoint.with_suffix(".yaml").exists():
        return {**_RELEASED, **_read_yaml(checkpoint.with_suffix(".yaml"))}
    config = read_config(source)
    told = config if config.get("model_type") == _ALONE else config.get("vq_config") or {}
    return {**_RELEASED, **told}


def tokenizer_folders(source: Path) -> list[Path]:
    """Where ``source`` keeps tokenizers: itself, ``tokenizer/`` in it and, for one of Meta's model
    folders (``data/models/7b``), ``data/tokenizer``.
    """
    folders = [source, source / "tokenizer"]
    if (source / "params.json").exists():
        above = source.resolve().parents
        folders += [folder / "tokenizer" for folder in above[:2]]
    return folders


def _checkpoint(source: Path) -> Path | None:
    places = [folder / CHECKPOINT for folder in tokenizer_folders(source)]
    return next((path for path in places if path.exists()), None)


def _checkpoint_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        # old files are no archives, and cannot be mapped
        mapped = zipfile.is_zipfile(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{path} cannot be read as a checkpoint of tensors alone ({reason}): it is damaged, "
            "cut short, or holds objects that would run code. Copy it again; if you trust its "
            "origin, save its state_dict alone with torch.save({'state_dict': …}) and use that file"
        ) from error
    tensors = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(tensors, dict) or not all(map(torch.is_tensor, tensors.values())):
        raise ValueError(f"{path} must hold a state_dict of tensors; it is another kind of file")
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(_OF_TRAINING)}


def _safetensors(source: Path, alone: bool) -> dict[str, torch.Tensor]:
    """Tensors below the VQ-GAN's prefix; only the files that hold some are opened."""
    index, single = source / "model.safetensors.index.json", source / "model.safetensors"
    if index.exists():
        files = read_json(index).get("weight_map")
        if not isinstance(files, dict):
            raise ValueError(f"{index} must hold a weight_map; it is damaged")
    elif single.exists():
        files = dict.fromkeys(_open(single).keys(), single.name)
    else:
        pickled = sorted(p.name for p in source.glob("pytorch_model*.bin"))
        if pickled:
            raise ValueError(
                f"{source / pickled[0]} is a pickle, which is not read: save the model as "
                "safetensors first (save_pretrained does)"
            )
        return {}
    prefixes = ("",) if alone else _PREFIXES
    inside = {
        name: next(name.removeprefix(p) for p in prefixes if name.startswith(p))
        for name in files
        if name.startswith(prefixes)
    }
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted({files[name] for name in inside}):
        if Path(file).name != file or not (source / file).exists():
            raise ValueError(f"{index} names the file {file!r}, which is not in {source}")
        reader = _open(source / file)
        for name in reader.keys():  # noqa: SIM118
            if name in inside:
                tensors[inside[name]] = reader.get_tensor(name)
    return tensors


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is no whole safetensors file ({error}): it is damaged or cut short; copy it "
            "again"
        ) from error


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        params = yaml.safe_load(path.read_bytes())["model"]["params"]
        fields = {key: params[key] for key in ("embed_dim", "n_embed")} | params["ddconfig"]
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} must hold model.params with embed_dim, n_embed and ddconfig: {error!r}"
        ) from error
    return {_YAML_NAMES.get(name, name): value for name, value in fields.items()}


def read_json(path: Path) -> dict[str, Any]:
    """An object. ``ValueError`` names a file that holds none."""
    try:
        fields = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}; it is damaged or cut short") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(fields).__name__}")
    return fields


def read_config(source: Path) -> dict[str, Any]:
    """config.json of ``source``; empty where there is none."""
    path = source / "config.json"
    return read_json(path) if path.exists() else {}
