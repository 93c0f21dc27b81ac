"""Where the VQ-GAN of a Chameleon checkpoint lies, and its tensors, from files of others.

- ``vqgan.ckpt``, the original: read as data only (``weights_only``), with
  ``vqgan.yaml`` beside it for its sizes. It alone has the decoder, so it is preferred.
- Hugging Face: ``model.vqmodel.*`` in ``model.safetensors`` or in its shards, sizes from
  ``vq_config`` in config.json; or a folder of the VQ-GAN alone, as ``ChameleonVQVAE`` saves it.
"""

import zipfile
from dataclasses import dataclass
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
    config: JsonObject


def find_vq(source: Path) -> VQFiles | None:
    """The VQ-GAN of ``source``, or none. ``ValueError`` names files that are damaged or pickled."""
    config = vq_config(source)
    checkpoint = _checkpoint(source)
    if checkpoint is not None:
        return VQFiles(checkpoint, _checkpoint_tensors(checkpoint), config)
    tensors = _safetensors(source, alone=_is_alone(read_config(source)))
    return VQFiles(source, tensors, config) if tensors else None


def vq_config(source: Path) -> JsonObject:
    """Sizes under Hugging Face's names, from vqgan.yaml or config.json; else the released ones."""
    checkpoint = _checkpoint(source)
    if checkpoint is not None and checkpoint.with_suffix(".yaml").exists():
        path = checkpoint.with_suffix(".yaml")
        return JsonObject(_RELEASED | _read_yaml(path), str(path), REMEDY)
    config = read_config(source)
    told = config if _is_alone(config) else config.object("vq_config", default={})
    given = {name: value for name, value in told.values.items() if value is not None}
    return JsonObject(_RELEASED | given, told.where, REMEDY)


def _is_alone(config: JsonObject) -> bool:
    """Whether the folder is of a VQ-GAN by itself."""
    return config.values.get("model_type") == _ALONE


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
    except Exception as error:  # damage makes the unpickler raise anything
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{path} cannot be read as a checkpoint of tensors alone ({reason}): it is damaged, "
            "cut short, or holds objects that would run code. Copy it again; if you trust its "
            "origin, save its state_dict alone with torch.save({'state_dict': …}) and use that file"
        ) from error
    tensors = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and torch.is_tensor(tensor) for name, tensor in tensors.items()
    ):
        raise ValueError(f"{path} must hold a state_dict of tensors; it is another kind of file")
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(_OF_TRAINING)}


def _safetensors(source: Path, alone: bool) -> dict[str, torch.Tensor]:
    """Tensors below the VQ-GAN's prefix; only the files that hold some are opened."""
    index, single = source / "model.safetensors.index.json", source / "model.safetensors"
    if index.exists():
        places = read_json(index, REMEDY).object("weight_map")
        files = {name: places.field(name, str) for name in places.values}
        if single.exists() and set(files.values()) != {single.name}:
            raise ValueError(
                f"{source} holds {single.name} and {index.name}, which names other files; remove "
                "the one that is not the model"
            )
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
            raise ValueError(
                f"{index}: weight_map names the file {shown(file)}, which is not in its folder; "
                "copy it there"
            )
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


class _PlainYaml(yaml.SafeLoader):
    """Plain values without aliases, of which a small file could make large values."""

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


def read_config(source: Path) -> JsonObject:
    """config.json of ``source``, without fields that are null; empty where there is none."""
    path = source / "config.json"
    fields = read_json(path, REMEDY).values if path.exists() else {}
    return JsonObject(
        {name: value for name, value in fields.items() if value is not None}, str(path), REMEDY
    )
