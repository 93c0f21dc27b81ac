"""Imports tokenizers of Chameleon and other public checkpoints into a tokenizers folder of ours.

``import_text`` and ``import_vq`` write the tokenizers, ``import_vocabulary`` the layout of ids that
the checkpoint's embedding rows have; ``with_sentinels_of`` adapts a model's vocabulary to its text
tokenizer. Each import returns False where the source has none, raises ``ValueError`` with the
reason where it cannot be taken over exactly, and writes a whole file or nothing.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from earlyfuse.data.atomic import atomic_write_json
from earlyfuse.data.json_files import JsonObject, read_json
from earlyfuse.data.media import MEDIA
from earlyfuse.data.tokenizers import VOCABULARY_FILE
from earlyfuse.data.tokenizers.image_chameleon import ChameleonTokenizer, shape_of
from earlyfuse.data.tokenizers.text import TextTokenizer
from earlyfuse.data.tokenizers.text_json import LARGEST_ID, id_table, image_code_ids, token_ids
from earlyfuse.data.tokenizers.tokenizer_file import LARGEST_CODEBOOK
from earlyfuse.data.tokenizers.vq_files import (
    REMEDY,
    find_vq,
    read_config,
    tokenizer_folders,
    vq_config,
)
from earlyfuse.data.tokenizers.vqgan import VQGAN
from earlyfuse.models.vocabulary import MediaCodes, Modality, Vocabulary

# a fast tokenizer.json is what Hugging Face itself prefers over the sentencepiece file beside it
_TEXT_FILES = ("tokenizer.json", "text_tokenizer.json", "tokenizer.model")
# names of the sentinels in Chameleon's map
_SENTINELS = {"bos": "<s>", "pad": "<pad>", "eos": "</s>"}
_BEGIN, _END = "<racm3:break>", "<eoss>"
_LANCZOS = 1
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SIDES = ("height", "width")
_LONGEST_REASON = 2000  # characters
_MOST_LEVELS, _MOST_BLOCKS = 12, 64  # of a VQ-GAN; the released one has 5 levels of 2 blocks


def import_text(source: Path, destination: Path) -> bool:
    """Write ``text.json`` or ``text.model`` from the source's text tokenizer."""
    path = text_path(source)
    if path is None:
        return False
    text = TextTokenizer.load(path)
    destination.mkdir(parents=True, exist_ok=True)
    text.save(destination / text.file_name)
    return True


def import_vq(source: Path, destination: Path) -> bool:
    """Write ``image.safetensors`` from the source's VQ-GAN, in float32.

    Codes are numbered by the order of their tokens where the source has a vocabulary map, so that
    id = first id + code. Raises ``ValueError`` listing missing, unexpected and mis-shaped tensors.
    """
    found = find_vq(source)
    if found is None:
        return False
    origin, tensors = found
    settings = _settings(source, decoder=any(name.startswith("decoder.") for name in tensors))
    net = _network(origin, tensors, settings)
    rank = list(range(settings["codes"]))
    tokens = _vocabulary_map(source)
    if tokens is not None and image_code_ids(tokens):
        _, rank = _code_range(tokens, settings["codes"])
    tokenizer = ChameleonTokenizer(net, torch.tensor(rank), settings)
    destination.mkdir(parents=True, exist_ok=True)
    tokenizer.save(destination / MEDIA[Modality.IMAGE.label].file)
    return True


def import_vocabulary(source: Path, destination: Path) -> bool:
    """Write ``vocabulary.json`` from the source's map of image codes, or for a text model from its
    text tokenizer and the ``vocab_size`` of its config.

    All ids of the checkpoint count, also rows of its embedding that no token uses.
    """
    tokens = _vocabulary_map(source)
    if tokens is not None and image_code_ids(tokens):
        vocabulary = _mixed_vocabulary(source, tokens)
    elif (rows := _rows(read_config(source))) and (path := text_path(source)) is not None:
        vocabulary = with_sentinels_of(TextTokenizer.load(path), Vocabulary(rows, 0, 0, 0))
    else:
        return False
    save_vocabulary(vocabulary, destination)
    return True


def save_vocabulary(vocabulary: Vocabulary, destination: Path) -> None:
    """Write ``vocabulary.json`` into the folder ``destination``."""
    destination.mkdir(parents=True, exist_ok=True)
    atomic_write_json(destination / VOCABULARY_FILE, vocabulary.to_dict())


def with_sentinels_of(text: TextTokenizer, vocabulary: Vocabulary) -> Vocabulary:
    """``vocabulary`` with begin, end and padding of documents as the tokenizer ``text`` names them.

    Unnamed ones keep their id unless ``text`` uses it for text; the end of a document then also
    begins and pads it. Raises ``ValueError`` where nothing names the end.
    """
    named = {
        name: token
        for name, token in (("bos", text.bos), ("eos", text.eos), ("pad", text.pad))
        if token < text.pieces  # ids of ours behind the pieces have no trained row
    }
    for name in ("eos", "bos", "pad"):
        if name in named:
            continue
        named[name] = getattr(vocabulary, name)
        if named[name] < text.pieces and named[name] not in text.reserved:
            if name == "eos":
                raise ValueError(
                    "the text tokenizer names no end of a document, and that of the model's "
                    f"config, eos_token_id ({named[name]}), is a piece of text; add eos_token to "
                    "the tokenizer_config.json beside it"
                )
            named[name] = named["eos"]
    return replace(vocabulary, bos=named["bos"], eos=named["eos"], pad=named["pad"])


def _rows(config: JsonObject) -> int:
    """Rows of the embedding by config.json, ``mamba_ssm``'s padding included; 0 if not stated."""
    size = config.field("vocab_size", int, default=0, least=0, most=LARGEST_ID)
    padded = 8 if "d_model" in config and "model_type" not in config else 1
    multiple = config.field("pad_vocab_size_multiple", int, default=padded, least=1)
    return -(-size // multiple) * multiple


def _mixed_vocabulary(source: Path, tokens: dict[str, int]) -> Vocabulary:
    """The layout of a vocabulary map with image codes."""
    missing = [name for name in (*_SENTINELS.values(), _BEGIN, _END) if name not in tokens]
    if missing:
        raise ValueError(
            f"vocabulary_map of {source} has no {', '.join(missing)}, which mark documents and "
            "image blocks; add their ids to the map"
        )
    settings = _settings(source, decoder=False)
    codes = len(image_code_ids(tokens))
    start, _ = _code_range(tokens, codes)
    block = (settings["image_size"] // shape_of(settings).factor) ** 2
    medium = MediaCodes(Modality.IMAGE, start, codes, tokens[_BEGIN], tokens[_END], block)
    size = _rows(read_config(source)) or max(tokens.values()) + 1
    sentinels = {field: tokens[name] for field, name in _SENTINELS.items()}
    return Vocabulary(size=size, media=(medium,), **sentinels)


def _code_range(tokens: Mapping[str, int], codes: int) -> tuple[int, list[int]]:
    """(first id of the image codes, place of each code among them: id = first + place).

    Raises ``ValueError`` unless ``tokens`` name exactly the codes ``0 … codes − 1`` and their ids
    are a range without gaps, in any order: our vocabulary keeps a medium's codes in one range.
    """
    ids = image_code_ids(tokens)
    missing = [code for code in range(codes) if code not in ids]
    foreign = sorted(code for code in ids if code >= codes)
    if missing or foreign:
        raise ValueError(
            f"vocabulary_map names {len(ids)} image codes, the codebook has {codes}: "
            f"{len(missing)} have no name {missing[:3]}, {len(foreign)} names have no code "
            f"{foreign[:3]}; take the map and the codebook from one checkpoint"
        )
    used = sorted(ids.values())
    start = used[0]
    gap = next((token for token, found in enumerate(used, start) if token != found), None)
    if gap is not None:
        raise ValueError(
            f"vocabulary_map has the {codes} image codes over the ids {start} … {used[-1]}, "
            f"and id {gap} is not one of them or stands for two; they must be one range of ids: "
            "renumber the tokens (and rows) of the source first"
        )
    return start, [ids[code] - start for code in range(codes)]


def _vocabulary_map(source: Path) -> dict[str, int] | None:
    """Token → id: ``vocabulary_map`` of config.json, else the text tokenizer's JSON."""
    config = read_config(source)
    if config.field("vocabulary_map", dict, default={}):
        return id_table(config, "vocabulary_map")
    path = text_path(source)
    if path is None or path.suffix != ".json":
        return None
    return token_ids(read_json(path, REMEDY))


def text_path(source: Path) -> Path | None:
    """The text tokenizer in the public folder ``source``."""
    places = [folder / name for folder in tokenizer_folders(source) for name in _TEXT_FILES]
    return next((path for path in places if path.exists()), None)


def _settings(source: Path, decoder: bool) -> dict[str, Any]:
    """Settings of ``ChameleonTokenizer``. ``ValueError`` on what Chameleon's VQ-GAN cannot be."""
    config = vq_config(source)

    def size(name: str, most: int = 1 << 14) -> int:
        return config.field(name, int, least=1, most=most)

    config.field("double_latent", bool, choices=(False,))
    config.field("in_channels", int, choices=(3,))
    multipliers = config.items("channel_multiplier", int)
    if not 1 <= len(multipliers) <= _MOST_LEVELS or not all(0 < m < 1 << 10 for m in multipliers):
        raise config.wrong("channel_multiplier", f"must be 1 to {_MOST_LEVELS} small numbers")
    attends = config.field("attn_type", str) == "vanilla"
    resolution = size("resolution")
    listed = config.items("attn_resolutions", int) if config.values["attn_resolutions"] else []
    attention = [
        level for level in range(len(multipliers)) if attends and resolution // 2**level in listed
    ]
    return {
        "codes": size("num_embeddings", LARGEST_CODEBOOK),
        "embed": size("embed_dim"),
        "latent": size("latent_channels"),
        "width": size("base_channels"),
        "multipliers": multipliers,
        "blocks": size("num_res_blocks", most=_MOST_BLOCKS),
        "attention": attention,
        "middle_attention": attends,
        "decoder": decoder,
        **_pixel_settings(source, resolution),
    }


def _pixel_settings(source: Path, resolution: int) -> dict[str, Any]:
    """Preprocessing of pixels: preprocessor_config.json, else as in Meta's code."""
    fields: JsonObject | None = None
    if (source / "preprocessor_config.json").exists():
        fields = read_json(source / "preprocessor_config.json", REMEDY)
    elif (source / "processor_config.json").exists():
        whole = read_json(source / "processor_config.json", REMEDY)
        fields = whole.object("image_processor") if whole.values.get("image_processor") else None
    if fields is None:
        scaled = {"scale": 2 / 255, "mean": 1.0, "std": 1.0}
        return {"image_size": resolution, **scaled, "long_side": "round"}
    short, crop = _sides(fields, "size", ("shortest_edge",)), _sides(fields, "crop_size", _SIDES)
    steps = [f"do_{step}" for step in ("resize", "center_crop", "rescale", "normalize")]
    usual = all(fields.field(step, bool, default=True) for step in steps)
    resample = fields.field("resample", int, default=_LANCZOS)
    if len(short) != 1 or crop != short or not usual or resample != _LANCZOS:
        raise ValueError(
            f"{fields.where} must resize the shorter side by Lanczos (resample {_LANCZOS}) to the "
            f"size that it crops, and scale; it has size {sorted(short)}, crop_size "
            f"{sorted(crop)}, resample {resample}. Other preparations are not supported"
        )
    std = _of_all_channels(fields, "image_std")
    if std == 0:
        raise fields.wrong("image_std", "must not be 0")
    return {
        "image_size": short.pop(),
        # transformers' default, as are 512 and 1.0 below
        "scale": fields.field("rescale_factor", float, default=0.0078),
        "mean": _of_all_channels(fields, "image_mean"),
        "std": std,
        "long_side": "floor",
    }


def _sides(fields: JsonObject, name: str, keys: tuple[str, ...]) -> set[int]:
    """The different sides in ``name``: a number, or an object with ``keys``."""
    if not isinstance(fields.values.get(name), dict):
        return {fields.field(name, int, default=512, least=1, most=1 << 14)}
    sides = fields.object(name)
    sides.check_names(keys)
    return {sides.field(side, int, least=1, most=1 << 14) for side in keys}


def _of_all_channels(fields: JsonObject, name: str) -> float:
    if isinstance(fields.values.get(name), list):
        values = set(fields.items(name, float))
        if len(values) == 1:
            return float(values.pop())
        raise fields.wrong(name, "must be equal in all channels")
    return fields.field(name, float, default=1.0)


def _network(origin: Path, tensors: dict[str, torch.Tensor], settings: dict[str, Any]) -> VQGAN:
    """The network with these tensors, in float32."""
    with torch.device("meta"):
        net = VQGAN(shape_of(settings)).requires_grad_(False)
    try:
        net.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:_LONGEST_REASON]
        raise ValueError(
            f"the VQ-GAN of {origin} does not fit its config: {reason} Complete the files, or "
            "correct vq_config (vqgan.yaml beside vqgan.ckpt)"
        ) from error
    for name, tensor in net.state_dict().items():
        if tensor.dtype not in _FLOATS or not tensor.isfinite().all():
            raise ValueError(
                f"the VQ-GAN of {origin} must hold finite values in float16, bfloat16, float32 or "
                f"float64; {name} does not: damaged or quantised files"
            )
    return net.float()
