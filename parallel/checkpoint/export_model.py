"""Writes an open model in any format: the counterpart of ``open_checkpoint``.

A format's writer checks that it can express the model and returns an ``Export``, which fills a new
folder: nothing is written before all checks have passed.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from earlyfuse.data.json_files import JsonObject
from earlyfuse.models.state_dicts import (
    config_json,
    huggingface,
    huggingface_mamba,
    mamba_ssm,
    meta,
)
from earlyfuse.models.state_dicts.config_json import CONFIG, REMEDY, TOKENIZERS
from earlyfuse.models.state_dicts.public_config import Exported
from earlyfuse.models.state_dicts.tensor_map import Merged, Tensors
from earlyfuse.parallel.checkpoint.file_layout import HUGGINGFACE, VQ_FILE
from earlyfuse.parallel.checkpoint.files.dcp import write_dcp
from earlyfuse.parallel.checkpoint.files.safetensors import (
    SINGLE,
    assign_files,
    write_file,
    write_folder,
)
from earlyfuse.parallel.checkpoint.files.torch_save import (
    PYTORCH_MODEL,
    write_shards,
    write_torch_file,
)
from earlyfuse.parallel.checkpoint.huggingface_files import files_beside
from earlyfuse.parallel.checkpoint.manifest import WEIGHTS, Manifest, describe
from earlyfuse.parallel.checkpoint.open_checkpoint import OpenModel
from earlyfuse.parallel.checkpoint.tokenizers import find_tokenizers, import_tokenizers


@dataclass(frozen=True)
class Export:
    """A checked export: ``write`` fills a new folder. ``remarks``: what the format leaves out."""

    write: Callable[[Path], None]
    remarks: list[str] = field(default_factory=list)


def to_earlyfuse(opened: OpenModel, tensors: Tensors, max_shard_bytes: int) -> Export:
    """Safetensors with our ``config.json``."""
    files = assign_files(tensors.entries, max_shard_bytes)
    tokenizers, remarks = find_tokenizers(opened)

    def write(folder: Path) -> None:
        write_folder(folder, tensors, files)
        _write_beside(folder, opened, tokenizers, remarks)

    return Export(write, remarks)


def to_dcp(opened: OpenModel, tensors: Tensors, max_shard_bytes: int) -> Export:
    """DCP checkpoint of weights, to start a run from."""
    tokenizers, remarks = find_tokenizers(opened)

    def write(folder: Path) -> None:
        write_dcp(folder, tensors)
        _write_beside(folder, opened, tokenizers, remarks)
        step = opened.source.get("step") or 0
        Manifest(step, WEIGHTS, 1, describe(folder, 0)).write(folder)

    return Export(write, remarks)


def to_huggingface(opened: OpenModel, tensors: Tensors, max_shard_bytes: int) -> Export:
    """``MambaForCausalLM`` if any layer has a Mamba, else ``ChameleonForConditionalGeneration``."""
    has_mamba = any(layer.mamba is not None for layer in opened.config.layers)
    export = huggingface_mamba.export_model if has_mamba else huggingface.export_model
    exported = _exported(opened, tensors, "huggingface", export)
    theirs, (tokenizers, remarks) = exported.tensors, find_tokenizers(opened)
    beside = files_beside(opened, tokenizers, images=not has_mamba)
    if beside.vq is not None:
        theirs = Merged(theirs, beside.vq)
    exported.files[CONFIG].update(beside.config)
    files = assign_files(theirs.entries, max_shard_bytes)

    def write(folder: Path) -> None:
        if len(files) == 1:
            write_file(folder / SINGLE, theirs, list(theirs.entries))
        else:
            write_folder(folder, theirs, files)
        _copy(opened.files, folder)
        for name, content in (exported.files | beside.files).items():
            _write_json(folder / name, content)

    return Export(write, remarks + beside.remarks)


def to_mamba_ssm(opened: OpenModel, tensors: Tensors, max_shard_bytes: int) -> Export:
    """``pytorch_model.bin`` with ``mamba_ssm``'s config."""
    exported = _exported(opened, tensors, "mamba_ssm", mamba_ssm.export_model)

    def write(folder: Path) -> None:
        write_torch_file(folder / PYTORCH_MODEL, exported.tensors, exported.aliases)
        _copy(opened.files, folder)
        _write_jsons(folder, exported)

    return Export(write)


def to_meta(opened: OpenModel, tensors: Tensors, max_shard_bytes: int) -> Export:
    """``consolidated.NN.pth`` with ``params.json``."""
    exported = _exported(opened, tensors, "meta", meta.export_model)

    def write(folder: Path) -> None:
        write_shards(folder, exported.tensors, exported.shards)
        _write_jsons(folder, exported)

    remarks = [] if opened.vq is None else ["the format has no place for the image tokenizer"]
    return Export(write, remarks)


TARGETS: dict[str, Callable[[OpenModel, Tensors, int], Export]] = {
    "earlyfuse": to_earlyfuse,
    "hf": to_huggingface,
    "mamba_ssm": to_mamba_ssm,
    "meta": to_meta,
    "dcp": to_dcp,
}


def _write_beside(
    folder: Path, opened: OpenModel, tokenizers: Path | None, remarks: list[str]
) -> None:
    """Writes our ``config.json``, tokenizers and carried files; adds to ``remarks``."""
    if opened.vq is not None:
        write_file(folder / VQ_FILE, opened.vq, list(opened.vq.entries))
    if opened.files:
        (folder / HUGGINGFACE).mkdir()
        _copy(opened.files, folder / HUGGINGFACE)
    vocabulary = opened.vocabulary
    if tokenizers is not None:
        shutil.copytree(tokenizers, folder / TOKENIZERS)
    elif opened.format in ("huggingface", "meta", "mamba_ssm"):
        vocabulary, found = import_tokenizers(opened, folder / TOKENIZERS)
        remarks += found
    content = config_json.describe(opened.config, vocabulary, opened.source)
    if opened.carried:
        content["carried"] = opened.carried
    _write_json(folder / CONFIG, content)


def _exported(
    opened: OpenModel, tensors: Tensors, kind: str, export: Callable[..., Exported]
) -> Exported:
    """Exports to a public format, with the config of that format that the model came with."""
    carried = None
    if kind in opened.carried:
        where = f"{opened.folder / CONFIG}: carried: {kind}"
        carried = JsonObject.of(opened.carried[kind], where, REMEDY)
    return export(opened.config, opened.vocabulary, tensors, carried)


def _write_jsons(folder: Path, exported: Exported) -> None:
    for name, content in exported.files.items():
        _write_json(folder / name, content)


def _write_json(path: Path, content: object) -> None:
    # as transformers writes its configs
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _copy(files: Sequence[Path], folder: Path) -> None:
    for path in files:
        shutil.copyfile(path, folder / path.name)
