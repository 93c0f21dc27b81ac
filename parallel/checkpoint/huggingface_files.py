"""Files of a Hugging Face folder beside its tensors and config: tokenizer, generation, processor.

What a model came with goes along unchanged; the rest is made from the tokenizers of its data.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from earlyfuse.data.media import MEDIA
from earlyfuse.data.tokenizers import text_file
from earlyfuse.data.tokenizers.huggingface import CONFIG_FILE, FILE, tokenizer_files
from earlyfuse.data.tokenizers.image_chameleon import ChameleonTokenizer
from earlyfuse.data.tokenizers.text import TextTokenizer
from earlyfuse.data.tokenizers.text_json import token_table
from earlyfuse.models.state_dicts.tensor_map import StateDict, Tensors
from earlyfuse.models.state_dicts.vocabulary_map import PLACEHOLDER, special_tokens
from earlyfuse.models.vocabulary import Modality, Vocabulary
from earlyfuse.parallel.checkpoint.open_checkpoint import OpenModel

GENERATION = "generation_config.json"
_PREPROCESSOR, _PROCESSOR = "preprocessor_config.json", "processor_config.json"
_VQ_PREFIX = "model.vqmodel."
_NOT_IN_ENCODER = ("decoder.",)  # transformers has no decoder of images
_SEPARATOR = "<reserved08706>"  # ends a turn in Chameleon's chats


@dataclass
class Beside:
    """JSON files by name, fields that they add to ``config.json``, an image tokenizer, remarks."""

    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    vq: Tensors | None = None
    remarks: list[str] = field(default_factory=list)


def files_beside(opened: OpenModel, tokenizers: Path | None, images: bool) -> Beside:
    """The files that belong into the folder of ``opened``, whose data have these ``tokenizers``.

    ``images``: the class has an image encoder (Chameleon).
    """
    beside, vocabulary = Beside(vq=opened.vq if images else None), opened.vocabulary
    if "huggingface" in opened.carried:
        return beside  # a folder of theirs goes back as it came
    carried = {path.name for path in opened.files}
    if GENERATION not in carried:
        beside.files[GENERATION] = _generation(vocabulary)
    text = None
    if tokenizers is not None and text_file(tokenizers).is_file() and FILE not in carried:
        try:
            text = TextTokenizer.load(text_file(tokenizers))
            beside.files |= tokenizer_files(text, vocabulary, special_tokens(vocabulary))
        except ValueError as error:
            beside.remarks.append(f"no tokenizer was written: {error}")
            text = None
    elif FILE not in carried:
        beside.remarks.append("no tokenizer was written: none is known")
    if images and beside.vq is None:
        _add_images(beside, vocabulary, tokenizers, text)
    return beside


def _generation(vocabulary: Vocabulary) -> dict[str, Any]:
    ids = {"bos": vocabulary.bos, "eos": vocabulary.eos, "pad": vocabulary.pad}
    return {f"{name}_token_id": token for name, token in ids.items()}


def _add_images(
    beside: Beside, vocabulary: Vocabulary, tokenizers: Path | None, text: TextTokenizer | None
) -> None:
    """Image encoder and processor, if the image tokenizer is Chameleon's."""
    path = None if tokenizers is None else tokenizers / MEDIA[Modality.IMAGE.label].file
    tokenizer = None
    if path is not None and path.is_file():
        tokenizer = MEDIA[Modality.IMAGE.label].module().load(path)
    if not isinstance(tokenizer, ChameleonTokenizer):
        kind = "none is known" if tokenizer is None else f"its own is of kind {tokenizer.kind}"
        beside.remarks.append(
            "no image encoder or processor was written, as transformers has only Chameleon's and "
            f"{kind}: it will make one of random weights; generate images with tools.generate"
        )
        return
    net = tokenizer.net.state_dict()
    names = token_table(text.model) if text is not None and text.image_codes else None
    if names is None:  # codes are numbered by the order of their ids
        codebook = "quantize.embedding.weight"
        net[codebook] = net[codebook][tokenizer.row_K]
    else:
        beside.config["vocabulary_map"] = names
    beside.vq = StateDict(
        {
            f"{_VQ_PREFIX}{name}": tensor.contiguous()
            for name, tensor in net.items()
            if not name.startswith(_NOT_IN_ENCODER)
        }
    )
    beside.config["vq_config"] = _vq_config(tokenizer.settings)
    if names is None or PLACEHOLDER not in names:
        beside.remarks.append("no processor was written: the tokenizer has no token <image>")
        return
    if _SEPARATOR in names:
        beside.files[CONFIG_FILE]["sep_token"] = _SEPARATOR
    block = vocabulary.medium(Modality.IMAGE).block
    beside.files[_PREPROCESSOR] = _preprocessor(tokenizer.settings)
    beside.files[_PROCESSOR] = {
        "processor_class": "ChameleonProcessor",
        "image_seq_length": block,
        "image_token": PLACEHOLDER,
    }


def _vq_config(settings: dict[str, Any]) -> dict[str, Any]:
    size = settings["image_size"]
    return {
        "num_embeddings": settings["codes"],
        "embed_dim": settings["embed"],
        "latent_channels": settings["latent"],
        "base_channels": settings["width"],
        "channel_multiplier": list(settings["multipliers"]),
        "num_res_blocks": settings["blocks"],
        "resolution": size,
        "attn_resolutions": [size // 2**level for level in settings["attention"]],
        "attn_type": "vanilla" if settings["middle_attention"] else "none",
        "double_latent": False,
        "in_channels": 3,
    }


def _preprocessor(settings: dict[str, Any]) -> dict[str, Any]:
    size = settings["image_size"]
    return {
        "image_processor_type": "ChameleonImageProcessor",
        "processor_class": "ChameleonProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 1,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": settings["scale"],
        "do_normalize": True,
        "image_mean": [settings["mean"]] * 3,
        "image_std": [settings["std"]] * 3,
    }
