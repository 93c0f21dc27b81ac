"""Tokenizers of Chameleon and other public checkpoints → a tokenizers folder of ours.

``import_text`` and ``import_vq`` write the tokenizers, ``import_vocabulary`` the layout of ids that
the checkpoint's embedding rows have; ``with_sentinels_of`` agrees a model's vocabulary with its
text tokenizer. Each import says whether the source had any, raises ``ValueError``
with the reason where it cannot be taken over exactly, and writes a whole file or nothing. Their
readers are vq_files.py, text_json.py and vocabulary_map.py.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from earlyfuse.data.atomic import atomic_write_json
from earlyfuse.data.json_files import JsonObject, read_json
from earlyfuse.data.media import MEDIA
from earlyfuse.data.tokenizers import VOCABULARY_FILE
from earlyfuse.data.tokenizers.image import save_image_tokenizer
from earlyfuse.data.tokenizers.image_chameleon import ChameleonTokenizer, shape_of
from earlyfuse.data.tokenizers.image_tokenizer import LARGEST_CODEBOOK
from earlyfuse.data.tokenizers.text import TextTokenizer
from earlyfuse.data.tokenizers.text_json import LARGEST_ID, token_ids
from earlyfuse.data.tokenizers.vocabulary_map import code_range, image_code_ids
from earlyfuse.data.tokenizers.vq_files import (
    REMEDY,
    VQFiles,
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
_SHOWN = 5
_MOST_LEVELS, _MOST_BLOCKS = 12, 64  # of a VQ-GAN; the released one has 5 levels of 2 blocks


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
    save_image_tokenizer(tokenizer, destination / MEDIA[Modality.IMAGE.label].file)
    return True


def import_vocabulary(source: Path, destination: Path) -> bool:
    """Write ``vocabulary.json`` from the source's map of image codes, or for a model of text alone
    from its text tokenizer and the ``vocab_size`` of its config; false where there is neither.

    All ids of the checkpoint count, also rows of its embedding that no token uses.
    """
    tokens = vocabulary_map(source)
    if tokens is not None and image_code_ids(tokens):
        vocabulary = _mixed_vocabulary(source, tokens)
    elif (rows := _rows(read_config(source))) and (path := _text_path(source)) is not None:
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

    What it does not name stays, unless ``text`` uses that id for text: then the end of a document
    also begins and pads it. Raises ``ValueError`` where nothing names the end.
    """
    named = {
        name: token
        for name, token in (("bos", text.bos), ("eos", text.eos), ("pad", text.pad))
        if token < text.pieces  # else an id of ours behind the pieces, which has no trained row
    }
    for name in ("eos", "bos", "pad"):
        if name not in named:
            stays = getattr(vocabulary, name)
            spelled = stays < text.pieces and stays not in text.reserved
            if spelled and name == "eos":
                raise ValueError(
                    "the text tokenizer names no end of a document, and that of the model's "
                    f"config, eos_token_id ({stays}), is a piece of text; add eos_token to the "
                    "tokenizer_config.json beside it"
                )
            named[name] = named["eos"] if spelled else stays
    return replace(vocabulary, bos=named["bos"], eos=named["eos"], pad=named["pad"])


def _rows(config: JsonObject) -> int:
    """Rows of the embedding as config.json says, ``mamba_ssm``'s padding included; 0 if it does
    not.
    """
    size = config.field("vocab_size", int, default=0, least=0, most=LARGEST_ID)
    padded = 8 if "d_model" in config and "model_type" not in config else 1
    multiple = config.field("pad_vocab_size_multiple", int, default=padded, least=1)
    return -(-size // multiple) * multiple


def _mixed_vocabulary(source: Path, tokens: dict[str, int]) -> Vocabulary:
    """That of a vocabulary map with image codes."""
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
    size = _rows(read_config(source)) or max(tokens.values()) + 1
    sentinels = {field: tokens[name] for field, name in _SENTINELS.items()}
    return Vocabulary(size=size, media=(medium,), **sentinels)


def vocabulary_map(source: Path) -> dict[str, int] | None:
    """Token → id: ``vocabulary_map`` of config.json, else what the text tokenizer's JSON holds."""
    config = read_config(source)
    if config.field("vocabulary_map", dict, default={}):
        told = config.object("vocabulary_map")
        return {name: told.field(name, int, least=0, most=LARGEST_ID) for name in told.values}
    path = _text_path(source)
    if path is None or path.suffix != ".json":
        return None
    return token_ids(read_json(path, REMEDY))


def _text_path(source: Path) -> Path | None:
    places = [folder / name for folder in tokenizer_folders(source) for name in _TEXT_FILES]
    return next((path for path in places if path.exists()), None)


def _settings(source: Path, config: JsonObject, decoder: bool) -> dict[str, Any]:
    """Settings of ``ChameleonTokenizer``. ``ValueError`` on what Chameleon's VQ-GAN cannot be."""

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
    """How images become the network's input: as preprocessor_config.json says, else as Meta's."""
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
            f"{fields.where} must resize the shorter side by Lanczos (resample {_LANCZOS}) to what "
            f"it crops to, and scale; it has size {sorted(short)}, crop_size {sorted(crop)}, "
            f"resample {resample}. Other preparations are not offered"
        )
    std = _of_all_channels(fields, "image_std")
    if std == 0:
        raise fields.wrong("image_std", "must not be 0")
    return {
        "image_size": short.pop(),
        # the default there, as is 512 above
        "scale": fields.field("rescale_factor", float, default=0.0078),
        "mean": _of_all_channels(fields, "image_mean"),
        "std": std,
        "long_side": "floor",
    }


def _sides(fields: JsonObject, name: str, keys: tuple[str, ...]) -> set[int]:
    """The different sides that ``name`` states: a number, or an object with ``keys``."""
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
