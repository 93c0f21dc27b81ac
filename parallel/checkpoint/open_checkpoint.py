"""Opens a model in any format: its config, vocabulary, and tensors under our names.

===============================  ==================================================================
format                           recognised by
===============================  ==================================================================
``run``                          ``run.json`` (opens its latest checkpoint)
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
from typing import Any, Literal, get_args

import torch
from torch import nn
from torchtitan.protocols.module import Module

from earlyfuse.data.json_files import JsonObject, read_json, shown
from earlyfuse.models.context import ForwardSettings, Rule
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.precision import fp32_parameters, wide_type
from earlyfuse.models.routing.router import usable_rules
from earlyfuse.models.state_dicts import huggingface, huggingface_mamba, mamba_ssm, meta
from earlyfuse.models.state_dicts.config_json import CONFIG, FORMAT, REMEDY, read_description
from earlyfuse.models.state_dicts.plain_decoder import tensor_shapes
from earlyfuse.models.state_dicts.public_config import Imported
from earlyfuse.models.state_dicts.tensor_map import (
    Mapped,
    Tensors,
    check_keys,
    check_layers,
    renamed,
)
from earlyfuse.models.vocabulary import Vocabulary
from earlyfuse.parallel.checkpoint.file_layout import (
    HUGGINGFACE,
    VQ_FILE,
    checkpoints_of,
    is_run,
    latest_checkpoint,
)
from earlyfuse.parallel.checkpoint.files.dcp import DcpFolder
from earlyfuse.parallel.checkpoint.files.dcp_metadata import METADATA
from earlyfuse.parallel.checkpoint.files.safetensors import SafetensorsFiles, open_folder
from earlyfuse.parallel.checkpoint.files.torch_save import PYTORCH_MODEL, MetaShards, TorchFiles
from earlyfuse.parallel.checkpoint.manifest import MANIFEST, read_manifest

_AVERAGED = "these are the averaged weights; --weights trained takes the others"
_CARRIED_FILES = (
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


Weights = Literal["trained", "ema"]


@dataclass(frozen=True)
class OpenModel:
    """A model in a folder of any format; ``tensors`` have our names.

    ``carried``: configs of other formats that the model came with, by format. ``vq``: tensors of an
    image tokenizer under Hugging Face's names; ``files``: further files of Hugging Face.
    ``remark``: a note for the user, or "".
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

    @property
    def weights(self) -> Weights:
        """The kind of weights: as trained, or their averages over the steps."""
        return self.source.get("weights", "trained")


def open_model(folder: str | Path, weights: Weights | None = None) -> OpenModel:
    """Recognises and opens ``folder``: checks all keys and shapes, reads no tensor.

    ``weights``: "ema" for the averages that a run with ``ema.decay`` keeps in its checkpoints,
    "trained" for the others, None for the averages if there are any. ``ValueError`` says what is
    wrong with the folder, listing all wrong keys, or that it does not have these weights.
    """
    opened = _recognised(Path(folder), weights)
    if weights not in (None, opened.weights):
        raise ValueError(
            f"weights ({weights}): {opened.folder} has only {opened.weights} ones; leave the "
            f"option out, or give {opened.weights}"
        )
    return opened


def _recognised(folder: Path, weights: Weights | None) -> OpenModel:
    if is_run(folder):
        folder = latest_checkpoint(checkpoints_of(folder))
    if (folder / METADATA).is_file():
        return _checkpoint(folder, weights)
    if (folder / CONFIG).is_file():
        raw = read_json(folder / CONFIG, REMEDY)
        if raw.values.get("format") == FORMAT:
            return _ours(folder, raw, open_folder(folder))
        return _mamba_ssm(folder, raw) if mamba_ssm.is_config(raw) else _huggingface(folder, raw)
    if (folder / meta.PARAMS).is_file():
        return _meta(folder)
    names = sorted(path.name for path in folder.iterdir())[:8] if folder.is_dir() else "no folder"
    raise ValueError(
        f"{folder} ({names}) must hold a model: config.json with safetensors (ours or Hugging "
        f"Face's) or {PYTORCH_MODEL} (mamba_ssm), {meta.PARAMS} with consolidated.*.pth (Meta), a "
        "run (run.json) or one of its checkpoints"
    )


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Names the file ``path`` in errors about values that no model has."""
    try:
        yield
    except ValueError as error:
        if path.name in str(error) or f"{path.parent}/" in str(error):
            raise
        raise ValueError(f"{path}: {error}") from error
    except (TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError) as error:
        raise ValueError(
            f"{path} has sizes of which no model can be built ({type(error).__name__}: "
            f"{shown(str(error))}); {REMEDY}"
        ) from error


# ---------------------------------------------------------------- ours


def _checkpoint(folder: Path, weights: Weights | None) -> OpenModel:
    if not (folder / CONFIG).is_file():
        raise ValueError(
            f"{folder} is a checkpoint without {CONFIG}, which describes its model; copy it from "
            "another checkpoint of the same run"
        )
    tensors = DcpFolder(folder, averaged=weights != "trained")
    opened = _ours(folder, read_json(folder / CONFIG, REMEDY), tensors)
    if tensors.averages and weights != "trained":
        with torch.device("meta"):
            parameters = {name for name, _ in opened.config.build().named_parameters()}
        if missing := sorted(parameters - tensors.averages.keys()):
            raise ValueError(f"{folder} has no average of {missing[0]}; copy it again")
        opened.source["weights"] = "ema"
        if weights is None:
            opened = replace(opened, remark=_AVERAGED)
    if (folder / MANIFEST).is_file() and opened.source.get("format") == "checkpoint":
        opened.source["step"] = read_manifest(folder).step
    return replace(opened, format="checkpoint")


def _ours(folder: Path, raw: JsonObject, tensors: Tensors) -> OpenModel:
    layers = raw.object("model").field("layers", list)
    check_layers(len(layers), f"{raw.where}: layers", tensors.entries)
    with _naming(folder / CONFIG):
        config, vocabulary, source = read_description(raw)
        same = {name: renamed(name, shape) for name, shape in tensor_shapes(config).items()}
    raw.object("source").field("weights", str, default="trained", choices=get_args(Weights))
    check_keys(same, tensors.entries, str(folder))
    beside = folder / HUGGINGFACE
    return OpenModel(
        format=FORMAT,
        folder=folder,
        config=config,
        vocabulary=vocabulary,
        tensors=Mapped(same, tensors),
        source=source,
        carried=dict(raw.object("carried", default={}).values),
        vq=SafetensorsFiles([folder / VQ_FILE]) if (folder / VQ_FILE).is_file() else None,
        files=sorted(beside.iterdir()) if beside.is_dir() else [],
    )


# ---------------------------------------------------------------- of other projects


def _huggingface(folder: Path, raw: JsonObject) -> OpenModel:
    found = open_folder(folder)
    check_layers(raw.values.get(name := "num_hidden_layers"), f"{raw.where}: {name}", found.entries)
    is_mamba = raw.values.get("model_type") == huggingface_mamba.MODEL_TYPE
    import_model = huggingface_mamba.import_model if is_mamba else huggingface.import_model
    with _naming(folder / CONFIG):
        imported = import_model(raw, found.entries)
    return _public("huggingface", folder, found, imported)


def _mamba_ssm(folder: Path, raw: JsonObject) -> OpenModel:
    path, beside = folder / PYTORCH_MODEL, folder / mamba_ssm.OUR_FILE
    found: Tensors = TorchFiles({"": path}) if path.is_file() else open_folder(folder)
    check_layers(raw.values.get("n_layer"), f"{raw.where}: n_layer", found.entries)
    with _naming(folder / CONFIG):
        ours = read_json(beside, REMEDY) if beside.is_file() else None
        imported = mamba_ssm.import_model(raw, found.entries, ours)
    return _public("mamba_ssm", folder, found, imported)


def _meta(folder: Path) -> OpenModel:
    params = read_json(folder / meta.PARAMS, REMEDY)
    found = MetaShards(folder)
    if (folder / meta.CONSOLIDATE_PARAMS).is_file():
        consolidated = read_json(folder / meta.CONSOLIDATE_PARAMS, REMEDY)
        stated = consolidated.values.get("model_parallel_size", found.count)
        if stated != found.count:
            raise ValueError(
                f"{folder / meta.CONSOLIDATE_PARAMS}: model_parallel_size ({shown(stated)}) must "
                f"be the number of consolidated files ({found.count}); copy the missing files"
            )
        params.values.update(consolidated.values)
    with _naming(folder / meta.PARAMS):
        tokens = None if meta.OURS in params else _meta_tokens(folder)
        imported = meta.import_model(params, found.entries, found.count, tokens)
    return replace(_public("meta", folder, found, imported), files=[])


def _meta_tokens(folder: Path) -> JsonObject | None:
    """Reads token → id of Meta's text tokenizer, in the model's folder or ``tokenizer/`` beside."""
    places = [folder, *(place / "tokenizer" for place in (folder, *folder.parents[:2]))]
    for path in (place / meta.TEXT_TOKENIZER for place in places):
        if path.is_file():
            return read_json(path, REMEDY).object("model").object("vocab")
    return None


def _public(kind: str, folder: Path, found: Tensors, imported: Imported) -> OpenModel:
    vq = imported.image_tokenizer
    check_keys(imported.maps, found.entries, str(folder), ignored=[*vq, *imported.unused])
    return OpenModel(
        format=kind,
        folder=folder,
        config=imported.config,
        vocabulary=imported.vocabulary,
        tensors=Mapped(imported.maps, found),
        source={"format": kind},
        carried={kind: imported.carried} if imported.carried else {},
        vq=Mapped(vq, found) if vq else None,
        files=[folder / name for name in _CARRIED_FILES if (folder / name).is_file()],
        remark=imported.remark,
    )


# ---------------------------------------------------------------- as a module


def load_model(
    folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    weights: Weights | None = None,
) -> tuple[Decoder, Vocabulary]:
    """Loads a model of any format: a module in evaluation mode, and its vocabulary.

    ``model(MixedBatch.of(tokens_BS, vocabulary.modality_of(tokens_BS)))`` returns logits (B, S, V).
    ``dtype`` None keeps the dtypes of the files; with a narrower one scans and routers stay in
    fp32, as in training (``models/precision.py``). Needs no launcher or process group. Models
    route by the first causal rule that they have (causal routers, thresholds), others by batch with
    exact budgets, as in validation; override it by ``ForwardSettings`` with the batch. ``weights``
    as of ``open_model``. ``ValueError`` says what is wrong with the folder.
    """
    opened = open_model(folder, weights)
    return as_module(opened, device=device, dtype=dtype), opened.vocabulary


def as_module(
    opened: OpenModel, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> Decoder:
    """The module of ``load_model``."""
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
        if leaf in module._buffers:  # biases of token-choice routers are state, not parameters
            getattr(module, leaf).copy_(values)
            continue
        target = dtype or entry.dtype
        if dtype is not None and name in in_fp32:
            target = wide_type(dtype)
        values = values.to(device=device, dtype=target, copy=True)
        module.register_parameter(leaf, nn.Parameter(values))
    rule: Rule = next(iter(usable_rules(model)), "batch")
    model.default_settings = ForwardSettings(rule=rule, budgets="exact")
    return model.eval()
