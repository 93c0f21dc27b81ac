"""Finds the VQ-GAN of a Chameleon checkpoint, and reads its sizes and tensors.

- ``vqgan.ckpt``, the original: read as data only (``weights_only``), with sizes from ``vqgan.yaml``
  beside it. Preferred, as only it has the decoder.
- Hugging Face: ``model.vqmodel.*`` in ``model.safetensors`` or its shards, sizes from ``vq_config``
  in config.json; or a folder of the VQ-GAN alone, as ``ChameleonVQVAE`` saves it.
"""

import zipfile
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open

from earlyfuse.data.json_files import JsonObject, read_json, shown

CHECKPOINT = "vqgan.ckpt"
REMEDY = "correct it, or copy it again"
_LONGEST_YAML = 1 << 16  # bytes; that of the released models has about 700
_ALONE = "chameleon_vqgan"
_PREFIXES = ("model.vqmodel.", "vqmodel.")
# of training: losses with their discriminator, moving averages, counters
_OF_TRAINING = ("loss.", "model_ema.", "ema.", "colorize")
# defaults of Hugging Face's config.json: the released models
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


def find_vq(source: Path) -> tuple[Path, dict[str, torch.Tensor]] | None:
    """File or folder of the VQ-GAN of ``source`` and its tensors by their names in it, or None.

    ``ValueError`` names files that are damaged or pickled.
    """
    checkpoint = _checkpoint(source)
    if checkpoint is not None:
        return checkpoint, _checkpoint_tensors(checkpoint)
    tensors = _safetensors(source, alone=_is_alone(read_config(source)))
    return (source, tensors) if tensors else None


def vq_config(source: Path) -> JsonObject:
    """Sizes under Hugging Face's names, from vqgan.yaml or config.json; else the released ones."""
    checkpoint = _checkpoint(source)
    if checkpoint is not None and checkpoint.with_suffix(".yaml").exists():
        path = checkpoint.with_suffix(".yaml")
        return JsonObject(_RELEASED | _read_yaml(path), str(path), REMEDY)
    config = read_config(source)
    given = config if _is_alone(config) else config.object("vq_config", default={})
    return JsonObject(_RELEASED | _without_null(given.values), given.where, REMEDY)


def read_config(source: Path) -> JsonObject:
    """config.json of ``source``, without fields that are null; empty where there is none."""
    path = source / "config.json"
    fields = read_json(path, REMEDY).values if path.exists() else {}
    return JsonObject(_without_null(fields), str(path), REMEDY)


def tokenizer_folders(source: Path) -> list[Path]:
    """Folders of ``source`` that may hold tokenizers: itself, its ``tokenizer/`` and, for a model
    folder of Meta's (``data/models/7b``), ``data/tokenizer``.
    """
    folders = [source, source / "tokenizer"]
    if (source / "params.json").exists():
        folders += [folder / "tokenizer" for folder in source.resolve().parents[:2]]
    return folders


def _without_null(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _is_alone(config: JsonObject) -> bool:
    """True for the folder of a VQ-GAN without its model."""
    return config.values.get("model_type") == _ALONE


def _checkpoint(source: Path) -> Path | None:
    places = [folder / CHECKPOINT for folder in tokenizer_folders(source)]
    return next((path for path in places if path.exists()), None)


def _checkpoint_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        # files of old torch are no archives, and cannot be mapped
        mapped = zipfile.is_zipfile(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # damage makes the unpickler raise anything
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{path} cannot be read as a checkpoint of tensors alone ({reason}): it is damaged, "
            "truncated, or holds objects that would run code. Copy it again; if you trust its "
            "origin, save its state_dict alone with torch.save({'state_dict': …})"
        ) from error
    tensors = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and torch.is_tensor(tensor) for name, tensor in tensors.items()
    ):
        raise ValueError(f"{path} must hold a state_dict of tensors; give another file")
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(_OF_TRAINING)}


def _safetensors(source: Path, alone: bool) -> dict[str, torch.Tensor]:
    """Tensors below the VQ-GAN's prefix; only files that hold some are opened."""
    index, single = source / "model.safetensors.index.json", source / "model.safetensors"
    if index.exists():
        files = read_json(index, REMEDY).mapping("weight_map", str)
        if single.exists() and set(files.values()) != {single.name}:
            raise ValueError(
                f"{source} holds {single.name} and {index.name}, which names other files; remove "
                "the one that is not the model"
            )
    elif single.exists():
        files = dict.fromkeys(_open(single).keys(), single.name)
    else:
        pickled = sorted(source.glob("pytorch_model*.bin"))
        if pickled:
            raise ValueError(
                f"{pickled[0]} is a pickle, which is not read: save the model as safetensors "
                "first (save_pretrained does)"
            )
        return {}
    prefixes = ("",) if alone else _PREFIXES
    inside = {n: n.removeprefix(p) for n in files for p in prefixes if n.startswith(p)}
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted({files[name] for name in inside}):
        if Path(file).name != file or not (source / file).exists():
            raise ValueError(
                f"{index}: weight_map names the file {shown(file)}, which is not in its folder; "
                "copy it there"
            )
        reader = _open(source / file)
        stored = inside.keys() & set(reader.keys())
        tensors |= {inside[name]: reader.get_tensor(name) for name in stored}
    return tensors


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is no whole safetensors file ({error}): it is damaged or truncated; copy it "
            "again"
        ) from error


class _PlainYaml(yaml.SafeLoader):
    """Plain values without aliases, which let a small file make large values."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has aliases")
        return super().compose_node(parent, index)


def _read_yaml(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        content = file.read(_LONGEST_YAML + 1)
    try:
        if len(content) > _LONGEST_YAML:
            raise ValueError(f"it is larger than {_LONGEST_YAML:,} bytes")
        params = yaml.load(content, _PlainYaml)["model"]["params"]
        fields = {key: params[key] for key in ("embed_dim", "n_embed")} | params["ddconfig"]
        return {_YAML_NAMES.get(name, name): value for name, value in fields.items()}
    except (yaml.YAMLError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = shown(" ".join(str(error).split()))
        raise ValueError(
            f"{path} must hold model.params with embed_dim, n_embed and ddconfig "
            f"({type(error).__name__}: {reason}); {REMEDY}"
        ) from error
