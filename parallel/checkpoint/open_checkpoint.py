"""What a folder holds, recognised and opened: every format as tensors under our names.

===============================  ==================================================================
format                           recognised by
===============================  ==================================================================
``run``                          ``run.json`` (its checkpoint completed last is opened)
``checkpoint``                   ``.metadata`` of DCP, with our ``config.json``
``earlyfuse``                    ``config.json`` with ``format`` "earlyfuse"
``huggingface``                  ``config.json`` with ``model_type`` "chameleon" or "mamba"
``mamba_ssm``                    ``config.json`` with ``d_model`` and ``n_layer``
``meta``                         ``params.json`` and ``consolidated*.pth``
===============================  ==================================================================
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torchtitan.protocols.module import Module

from earlyfuse.data.json_files import JsonObject, read_json, shown
from earlyfuse.models.blocks.wide import wide_type
from earlyfuse.models.context import ForwardSettings
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.precision import fp32_parameters
from earlyfuse.models.routing.causal import causal_routers
from earlyfuse.models.state_dicts import (
    huggingface,
    huggingface_mamba,
    mamba,
    mamba_ssm,
    meta,
    vocabulary_map,
)
from earlyfuse.models.state_dicts.chameleon import function_differences, tensor_shapes
from earlyfuse.models.state_dicts.config_json import (
    CONFIG,
    FORMAT,
    HUGGINGFACE,
    REMEDY,
    VQ_FILE,
    read_decoder,
    read_description,
    read_vocabulary,
)
from earlyfuse.models.state_dicts.tensor_map import (
    Made,
    Recipes,
    Tensors,
    check,
    check_layers,
    renamed,
)
from earlyfuse.models.vocabulary import Vocabulary
from earlyfuse.parallel.checkpoint.files.dcp import DcpFolder
from earlyfuse.parallel.checkpoint.files.dcp_metadata import METADATA
from earlyfuse.parallel.checkpoint.files.meta_shards import MetaShards, shard_files
from earlyfuse.parallel.checkpoint.files.safetensors import SafetensorsFiles, open_folder
from earlyfuse.parallel.checkpoint.files.torch_save import TorchFiles
from earlyfuse.parallel.checkpoint.manifest import MANIFEST, latest_checkpoint, read_manifest

RUN, PARAMS, CONSOLIDATE_PARAMS = "run.json", "params.json", "consolidate_params.json"
_LONGEST_NAME = 256  # bytes, of a checkpoint
_TEXT_TOKENIZER = "text_tokenizer.json"  # Meta's: in the model's folder, or tokenizer/ beside it
HUGGINGFACE_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class Opened:
    """A model in a folder, whatever its format.

    ``tensors`` are named as the decoder's parameters. ``carried`` are descriptions of other formats
    that the model came with; ``vq``: tensors of an image tokenizer under Hugging Face's names;
    ``files``: Hugging Face's others. ``remark``: what a user should know of the vocabulary, or "".
    """

    format: str
    folder: Path
    config: Decoder.Config
    vocabulary: Vocabulary
    tensors: Tensors
    source: dict[str, Any]
    carried: dict[str, Any] = field(default_factory=dict)
    vq: Tensors | None = None
    files: list[Path] = field(default_factory=list)
    remark: str = ""


def open_model(folder: str | Path) -> Opened:
    """Recognise and open ``folder``; all its keys and shapes are checked, no tensor is read.

    ``ValueError`` says what is wrong with it, key by key where keys are.
    """
    folder = Path(folder)
    if (folder / RUN).is_file():
        folder = last_checkpoint(folder)
    if (folder / METADATA).is_file():
        return _checkpoint(folder)
    if (folder / CONFIG).is_file():
        raw = read_json(folder / CONFIG, REMEDY)
        if raw.values.get("format") == FORMAT:
            return _exported(folder, raw)
        if mamba_ssm.is_config(raw):
            return _mamba_ssm(folder, raw)
        if raw.values.get("model_type") == huggingface_mamba.MODEL_TYPE:
            return _huggingface_mamba(folder, raw)
        return _huggingface(folder, raw)
    if (folder / PARAMS).is_file():
        return _meta(folder)
    names = sorted(path.name for path in folder.iterdir())[:8] if folder.is_dir() else "no folder"
    raise ValueError(
        f"{folder} ({names}) must hold a model: config.json with safetensors (ours, or Hugging "
        f"Face's) or {mamba_ssm.WEIGHTS} (mamba_ssm's), {PARAMS} with consolidated.*.pth (Meta's), "
        f"a run ({RUN}) or a checkpoint of it"
    )


@contextmanager
def _values_of(path: Path) -> Iterator[None]:
    """Says of which file a value is that no model could have."""
    try:
        yield
    except ValueError as error:
        if path.name in str(error):
            raise
        raise ValueError(f"{path}: {error}") from error
    except (
        TypeError,
        AttributeError,
        KeyError,
        IndexError,
        ArithmeticError,
        RuntimeError,
    ) as error:
        reason = shown(str(error))
        raise ValueError(
            f"{path} has sizes of which no model can be made ({type(error).__name__}: {reason}); "
            f"{REMEDY}"
        ) from error


def last_checkpoint(run: Path) -> Path:
    """The checkpoint of a run that was completed last; ``ValueError`` if there is none."""
    settings = read_json(run / RUN, REMEDY).object("config").object("checkpoint")
    return latest_checkpoint(run / settings.field("folder", str))


def _checkpoint(folder: Path) -> Opened:
    if not (folder / CONFIG).is_file():
        raise ValueError(
            f"{folder} is a checkpoint without {CONFIG}, which says what model it is of; copy it "
            "from another checkpoint of the same run"
        )
    opened = _described(folder, read_json(folder / CONFIG, REMEDY), DcpFolder(folder))
    if (folder / MANIFEST).is_file() and opened.source.get("format") == "checkpoint":
        opened.source["step"] = read_manifest(folder).step
    return replace(opened, format="checkpoint")


def _exported(folder: Path, raw: JsonObject) -> Opened:
    return _described(folder, raw, open_folder(folder))


def _described(folder: Path, raw: JsonObject, tensors: Tensors) -> Opened:
    layers = raw.object("model").field("layers", list)
    check_layers(len(layers), f"{raw.where}: layers", tensors.entries)
    with _values_of(folder / CONFIG):
        config, vocabulary, source = read_description(raw)
        same = {name: renamed(name, shape) for name, shape in tensor_shapes(config).items()}
    check(same, tensors.entries, str(folder))
    beside = folder / HUGGINGFACE
    return Opened(
        format=FORMAT,
        folder=folder,
        config=config,
        vocabulary=vocabulary,
        tensors=Made(same, tensors),
        source=source,
        carried=dict(raw.object("carried", default={}).values),
        vq=SafetensorsFiles([folder / VQ_FILE]) if (folder / VQ_FILE).is_file() else None,
        files=sorted(beside.iterdir()) if beside.is_dir() else [],
    )


def _huggingface(folder: Path, raw: JsonObject) -> Opened:
    huggingface.refuse_unknown(raw)
    found = open_folder(folder)
    _check_layers(raw, "num_hidden_layers", found)
    with _values_of(folder / CONFIG):
        config, vocabulary, remark = huggingface.read_config(raw)
        recipes = huggingface.import_recipes(config, raw, found.entries)
    of_vq = [name for name in found.entries if name.startswith(huggingface.VQ_PREFIX)]
    unused = [name for name in found.entries if name.endswith(huggingface.ROPE)]
    check(recipes, found.entries, str(folder), ignored=of_vq + unused)
    vq = {name: renamed(name, found.entries[name].shape) for name in of_vq}
    carried = {} if huggingface.OURS in raw else {"huggingface": raw.values}
    return Opened(
        format="huggingface",
        folder=folder,
        config=config,
        vocabulary=vocabulary,
        tensors=Made(recipes, found),
        source={"format": "huggingface"},
        carried=carried,
        vq=Made(vq, found) if vq else None,
        files=[folder / name for name in HUGGINGFACE_FILES if (folder / name).is_file()],
        remark=remark,
    )


def _huggingface_mamba(folder: Path, raw: JsonObject) -> Opened:
    found = open_folder(folder)
    _check_layers(raw, "num_hidden_layers", found)
    with _values_of(folder / CONFIG):
        config, vocabulary = huggingface_mamba.read_config(raw)
    names = (huggingface_mamba.EMBEDDINGS, huggingface_mamba.OLD_EMBEDDINGS)
    old = mamba.name_of(mamba.EMBEDDING, names[1]) in found.entries
    return _mamba(
        "huggingface",
        folder,
        raw,
        found,
        config,
        vocabulary,
        embedding=names[old],
        tied=huggingface_mamba.is_tied(raw),
        conv_bias=huggingface_mamba.has_conv_bias(raw),
        ours=huggingface_mamba.OURS in raw,
    )


def _mamba_ssm(folder: Path, raw: JsonObject) -> Opened:
    path = folder / mamba_ssm.WEIGHTS
    found: Tensors = TorchFiles({"": path}) if path.is_file() else open_folder(folder)
    _check_layers(raw, "n_layer", found)
    with _values_of(folder / CONFIG):
        config, vocabulary, remark = mamba_ssm.read_config(raw)
    beside = folder / mamba_ssm.OURS
    if beside.is_file():
        written, vocabulary, _ = read_description(read_json(beside, REMEDY))
        config, remark = mamba.agreed(written, config, str(folder / CONFIG)), ""
    opened = _mamba(
        "mamba_ssm",
        folder,
        raw,
        found,
        config,
        vocabulary,
        embedding=mamba_ssm.EMBEDDING,
        tied=mamba_ssm.is_tied(raw),
        conv_bias=mamba_ssm.has_conv_bias(raw),
        ours=beside.is_file(),
    )
    return replace(opened, remark=remark)


def _mamba(
    kind: str,
    folder: Path,
    raw: JsonObject,
    found: Tensors,
    config: Decoder.Config,
    vocabulary: Vocabulary,
    *,
    embedding: str,
    tied: bool,
    conv_bias: bool,
    ours: bool,
) -> Opened:
    mamba.refuse_mamba_2(found.entries, str(folder))
    recipes = mamba.import_recipes(
        config, found.entries, embedding=embedding, tied=tied, conv_bias=conv_bias
    )
    check(recipes, found.entries, str(folder))
    return Opened(
        format=kind,
        folder=folder,
        config=config,
        vocabulary=vocabulary,
        tensors=Made(recipes, found),
        source={"format": kind},
        carried={} if ours else {kind: raw.values},
        files=[folder / name for name in HUGGINGFACE_FILES if (folder / name).is_file()],
    )


def _meta(folder: Path) -> Opened:
    files = shard_files(folder)
    if not files:
        raise ValueError(f"{folder} has {PARAMS}, but no consolidated.*.pth")
    params = read_json(folder / PARAMS, REMEDY)
    if (folder / CONSOLIDATE_PARAMS).is_file():
        consolidated = read_json(folder / CONSOLIDATE_PARAMS, REMEDY)
        told = consolidated.values.get("model_parallel_size", len(files))
        if told != len(files):
            raise ValueError(
                f"{folder}: {CONSOLIDATE_PARAMS} says model_parallel_size ({shown(told)}), which "
                f"must be the number of consolidated files ({len(files)}); copy the missing ones"
            )
        params.values.update(consolidated.values)
    found = MetaShards(files)
    with _values_of(folder / PARAMS):
        sizes = meta.read_sizes(params, found.entries, len(files))
        config = sizes.decoder()
        recipes: Recipes = meta.import_recipes(sizes, len(files))
    check(recipes, found.entries, str(folder))
    vocabulary, remark = _meta_vocabulary(folder, params, sizes.vocab_size)
    if meta.OURS in params:
        written = read_decoder(params.object(meta.OURS).object("model"))
        if wrong := function_differences(written, config):
            raise ValueError(f"{folder / PARAMS} contradicts its part {meta.OURS!r}: {wrong[0]}")
        config = written
    carried = {"shards": len(files), "params": params.values}
    return Opened(
        format="meta",
        folder=folder,
        config=config,
        vocabulary=vocabulary,
        tensors=Made(recipes, found),
        source={"format": "meta"},
        carried={"meta": carried},
        remark=remark,
    )


def _meta_vocabulary(folder: Path, params: JsonObject, size: int) -> tuple[Vocabulary, str]:
    if meta.OURS in params:
        return read_vocabulary(params.object(meta.OURS).object("vocabulary")), ""
    rows = JsonObject({"vocab_size": size}, str(folder / PARAMS), REMEDY)
    places = (folder, folder / "tokenizer", folder.parent / "tokenizer")
    for place in (*places, folder.parent.parent / "tokenizer"):
        if (place / _TEXT_TOKENIZER).is_file():
            tokens = read_json(place / _TEXT_TOKENIZER, REMEDY).object("model").object("vocab")
            return vocabulary_map.to_vocabulary(tokens, rows, vocabulary_map.RELEASED_BLOCK)
    if size == vocabulary_map.RELEASED_SIZE:
        return vocabulary_map.released(), "ids are those of the released models"
    text_only = JsonObject(dict(vocabulary_map.TEXT_ONLY), "the released vocabulary", REMEDY)
    found, _ = vocabulary_map.to_vocabulary(text_only, rows, 1)
    return found, f"no {_TEXT_TOKENIZER} was found"


def _check_layers(raw: JsonObject, field: str, found: Tensors) -> None:
    count = raw.values.get(field)
    if type(count) is int:  # anything else is refused with the other fields
        check_layers(count, f"{raw.where}: {field}", found.entries)


def load_model(
    folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> tuple[Decoder, Vocabulary]:
    """The model of an exported folder, run, checkpoint, or folder of Hugging Face's, Meta's or
    ``mamba_ssm``'s.

    Returns it in evaluation mode, and its vocabulary. ``model(MixedBatch.of(tokens_BS,
    vocabulary.modality_of(tokens_BS)))`` gives logits (B, S, V).
    ``dtype`` None keeps that of the files; of a narrower one scans and routers stay in fp32, as in
    training (``models/precision.py``). No launcher, no process group; ``ValueError`` says what
    is wrong with the folder. Experts are chosen by the causal rule where the model has causal
    routers; else by batch, with budgets from the actual counts, as in validation; other
    ``ForwardSettings`` may be given with the batch.
    """
    opened = open_model(folder)
    with torch.device("meta"):
        model = opened.config.build()
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.zeros_like(buffer, device=device))
        if isinstance(module, Module):
            module._init_self_buffers(buffer_device=torch.device(device))
    in_fp32 = fp32_parameters(model)
    for name, entry in opened.tensors.entries.items():
        values = opened.tensors.read(name)
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if leaf in module._buffers:  # what a router balances with is as it was
            getattr(module, leaf).copy_(values)
            continue
        kept = dtype or entry.dtype
        if dtype is not None and name in in_fp32:
            kept = wide_type(dtype)
        values = values.to(device=device, dtype=kept, copy=True)
        module.register_parameter(leaf, nn.Parameter(values))
    rule: Literal["batch", "causal"] = "causal" if causal_routers(model) else "batch"
    model.default_settings = ForwardSettings(rule=rule, budgets="exact")
    return model.eval(), opened.vocabulary
