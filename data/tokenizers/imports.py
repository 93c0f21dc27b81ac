"""Tokenizers of Chameleon and other public checkpoints → a tokenizers folder of ours.

``import_text`` and ``import_vq`` write the tokenizers, ``import_vocabulary`` the layout of ids that
the checkpoint's embedding rows have. Each says whether the source had any, raises ``ValueError``
with the reason where it cannot be taken over exactly, and writes a whole file or nothing. Their
readers are vq_files.py, text_json.py and vocabulary_map.py.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from earlyfuse.data.atomic import atomic_write_json
from earlyfuse.data.tokenizers import IMAGE_FILE, VOCABULARY_FILE
from earlyfuse.data.tokenizers.image import save_image_tokenizer
from earlyfuse.data.tokenizers.image_chameleon import ChameleonTokenizer, shape_of
from earlyfuse.data.tokenizers.text import TextTokenizer
from earlyfuse.data.tokenizers.text_json import token_ids
from earlyfuse.data.tokenizers.vocabulary_map import code_range, image_code_ids
from earlyfuse.data.tokenizers.vq_files import (
    VQFiles,
    find_vq,
    read_config,
    read_json,
    tokenizer_folders,
    vq_config,
)
from earlyfuse.data.tokenizers.vqgan import VQGAN
from earlyfuse.models.modality import MediaCodes, Modality, Vocabulary

# a fast tokenizer.json is what Hugging Face itself prefers over the sentencepiece file beside it
_TEXT_FILES = ("tokenizer.json", "text_tokenizer.json", "tokenizer.model")
# names of the sentinels in Chameleon's map
_SENTINELS = {"bos": "<s>", "pad": "<pad>", "eos": "</s>"}
_BEGIN, _END = "<racm3:break>", "<eoss>"
_LANCZOS = 1
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SHOWN = 5


def import_text(source: Path, destination: Path) -> bool:
    """Write ``text.json`` or ``text.model`` from the source's text tokenizer; false without one."""
    path = _text_path(source)
    if path is None:
        return False
    text = TextTokenizer.load(path)
    destination.mkdir(parents=True, exist_ok=True)
    text.save(destination / text.file_name)
    return True


def import_vq(source: Path, destination: Path) -> bool:
    """Write ``image.safetensors`` from the source's VQ-GAN, in float32; false if it has none.

    Codes are numbered by the order of their tokens where the source has a vocabulary map, so that
    id = first id + code. Raises ``ValueError`` listing missing, unexpected and mis-shaped tensors.
    """
    found = find_vq(source)
    if found is None:
        return False
    settings = _settings(source, found.config, any(n.startswith("decoder.") for n in found.tensors))
    with torch.device("meta"):
        net = VQGAN(shape_of(settings))
    net.load_state_dict(_checked(found, net), assign=True)
    rank = list(range(settings["codes"]))
    tokens = vocabulary_map(source)
    if tokens is not None and image_code_ids(tokens):
        _, rank = code_range(tokens, settings["codes"])
    tokenizer = ChameleonTokenizer(net, torch.tensor(rank), settings)
    destination.mkdir(parents=True, exist_ok=True)
    save_image_tokenizer(tokenizer, destination / IMAGE_FILE)
    return True


def import_vocabulary(source: Path, destination: Path) -> bool:
    """Write ``vocabulary.json`` from the source's map; false if it names no image codes.

    All ids of the checkpoint count, also rows of its embedding that no token uses.
    """
    tokens = vocabulary_map(source)
    if tokens is None or not image_code_ids(tokens):
        return False
    missing = [name for name in (*_SENTINELS.values(), _BEGIN, _END) if name not in tokens]
    if missing:
        raise ValueError(
            f"vocabulary_map of {source} has no {', '.join(missing)}; documents and image blocks "
            "cannot be marked without: add their ids to the map"
        )
    settings = _settings(source, vq_config(source), decoder=False)
    codes = len(image_code_ids(tokens))
    start, _ = code_range(tokens, codes)
    block = (settings["image_size"] // shape_of(settings).factor) ** 2
    medium = MediaCodes(Modality.IMAGE, start, codes, tokens[_BEGIN], tokens[_END], block)
    size = read_config(source).get("vocab_size", max(tokens.values()) + 1)
    sentinels = {field: tokens[name] for field, name in _SENTINELS.items()}
    vocabulary = Vocabulary(size=size, media=(medium,), **sentinels)
    destination.mkdir(parents=True, exist_ok=True)
    atomic_write_json(destination / VOCABULARY_FILE, vocabulary.to_dict())
    return True


def vocabulary_map(source: Path) -> dict[str, int] | None:
    """Token → id: ``vocabulary_map`` of config.json, else what the text tokenizer's JSON holds."""
    told = read_config(source).get("vocabulary_map")
    if told:
        return told
    path = _text_path(source)
    if path is None or path.suffix != ".json":
        return None
    try:
        return token_ids(read_json(path))
    except ValueError as error:
        raise ValueError(f"{path} is no Hugging Face tokenizer.json: {error}") from error


def _text_path(source: Path) -> Path | None:
    places = [folder / name for folder in tokenizer_folders(source) for name in _TEXT_FILES]
    return next((path for path in places if path.exists()), None)


def _settings(source: Path, config: dict[str, Any], decoder: bool) -> dict[str, Any]:
    """Settings of ``ChameleonTokenizer``. ``ValueError`` on what Chameleon's VQ-GAN cannot be."""
    if config["double_latent"] or config["in_channels"] != 3:
        raise ValueError(
            f"vq_config of {source}: double_latent ({config['double_latent']}) must be false and "
            f"in_channels ({config['in_channels']}) 3; this is another kind of autoencoder"
        )
    attends = config["attn_type"] == "vanilla"
    levels = range(len(config["channel_multiplier"]))
    attention = [
        level
        for level in levels
        if attends and config["resolution"] // 2**level in (config["attn_resolutions"] or ())
    ]
    return {
        "codes": config["num_embeddings"],
        "embed": config["embed_dim"],
        "latent": config["latent_channels"],
        "width": config["base_channels"],
        "multipliers": list(config["channel_multiplier"]),
        "blocks": config["num_res_blocks"],
        "attention": attention,
        "middle_attention": attends,
        "decoder": decoder,
        **_pixel_settings(source, config["resolution"]),
    }


def _pixel_settings(source: Path, resolution: int) -> dict[str, Any]:
    """How images become the network's input: as preprocessor_config.json says, else as Meta's."""
    path, fields = source / "preprocessor_config.json", None
    if path.exists():
        fields = read_json(path)
    elif (source / "processor_config.json").exists():
        path = source / "processor_config.json"
        fields = read_json(path).get("image_processor")
    if fields is None:
        scaled = {"scale": 2 / 255, "mean": 1.0, "std": 1.0}
        return {"image_size": resolution, **scaled, "long_side": "round"}
    crop, size = fields.get("crop_size", 512), fields.get("size", 512)
    sides = set(crop.values()) if isinstance(crop, dict) else {crop}
    short = size.get("shortest_edge") if isinstance(size, dict) else size
    mean, std = (np.unique(fields.get(f"image_{name}", 1.0)) for name in ("mean", "std"))
    steps = [f"do_{step}" for step in ("resize", "center_crop", "rescale", "normalize")]
    usual = all(fields.get(step, True) for step in steps)
    if sides != {short} or not usual or fields.get("resample", _LANCZOS) != _LANCZOS:
        raise ValueError(
            f"{path} must resize the shorter side by Lanczos (resample {_LANCZOS}) to what it "
            f"crops to, and scale; it has size {size}, crop_size {crop}, resample "
            f"{fields.get('resample')}. Other preparations are not offered"
        )
    if len(mean) != 1 or len(std) != 1:
        raise ValueError(f"{path}: image_mean and image_std must be equal in all channels")
    return {
        "image_size": short,
        "scale": fields.get("rescale_factor", 0.0078),  # the default there, as is 512 above
        "mean": float(mean[0]),
        "std": float(std[0]),
        "long_side": "floor",
    }


def _checked(found: VQFiles, net: VQGAN) -> dict[str, torch.Tensor]:
    """The tensors that ``net`` wants, in float32."""
    wanted = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in found.tensors.items()}
    reshaped = [
        f"{name} {list(given[name])} for {list(shape)}"
        for name, shape in wanted.items()
        if name in given and given[name] != shape
    ]
    report = {
        "missing": sorted(wanted.keys() - given.keys()),
        "unexpected": sorted(given.keys() - wanted.keys()),
        "mis-shaped": reshaped,
    }
    if any(report.values()):
        parts = [
            f"{len(names)} {kind}: {', '.join(names[:_SHOWN])}{' …' if names[_SHOWN:] else ''}"
            for kind, names in report.items()
            if names
        ]
        raise ValueError(
            f"the VQ-GAN of {found.origin} does not fit its config; {'; '.join(parts)}. Complete "
            "the files, or correct vq_config (vqgan.yaml beside vqgan.ckpt)"
        )
    tensors = {name: found.tensors[name].to(torch.float32).contiguous() for name in wanted}
    damaged = [
        name
        for name, tensor in tensors.items()
        if found.tensors[name].dtype not in _FLOATS or not tensor.isfinite().all()
    ]
    if damaged:
        raise ValueError(
            f"the VQ-GAN of {found.origin} must hold finite values in float16, bfloat16, float32 "
            f"or float64; {', '.join(damaged[:_SHOWN])} does not: damaged or quantised files"
        )
    return tensors
