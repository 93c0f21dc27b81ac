"""Checkpoints between earlyfuse, Hugging Face's Chameleon and Mamba, ``mamba_ssm``, Meta's files
and DCP.

``python -m earlyfuse.tools.convert SRC DST [--to FORMAT] [--dtype TYPE] [--max-shard-size SIZE]
[--upcycle FORM] [--verify]``. What SRC is, is recognised. DST is made whole or not at all.
docs/conversion.md describes formats and what is refused.
"""

import argparse
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from earlyfuse.configs import decoders, mamba_decoders
from earlyfuse.data.atomic import sha256_file
from earlyfuse.data.console import printable
from earlyfuse.data.json_files import JsonObject, read_json
from earlyfuse.data.tokenizers import Tokenizers, imports, text_file
from earlyfuse.data.tokenizers.text import TextTokenizer
from earlyfuse.models.init_weights import init_weights
from earlyfuse.models.state_dicts import huggingface, huggingface_mamba, mamba_ssm, meta
from earlyfuse.models.state_dicts.chameleon import Sizes
from earlyfuse.models.state_dicts.config_json import (
    CONFIG,
    HUGGINGFACE,
    REMEDY,
    TOKENIZERS,
    VQ_FILE,
    describe,
)
from earlyfuse.models.state_dicts.tensor_map import (
    Cast,
    Made,
    Recipe,
    Tensors,
    Together,
    common_dtype,
)
from earlyfuse.models.upcycle import upcycle as upcycle_origins
from earlyfuse.models.vocabulary import Modality, Vocabulary
from earlyfuse.parallel.checkpoint import folder as checkpoint_folder
from earlyfuse.parallel.checkpoint.files.dcp import write_dcp
from earlyfuse.parallel.checkpoint.files.meta_shards import write_shards
from earlyfuse.parallel.checkpoint.files.safetensors import (
    SINGLE,
    assign_files,
    write_file,
    write_folder,
)
from earlyfuse.parallel.checkpoint.files.torch_save import write_torch_file
from earlyfuse.parallel.checkpoint.folder import Writer, damage, write_manifest
from earlyfuse.parallel.checkpoint.manifest import MANIFEST, WEIGHTS, Manifest, read_manifest
from earlyfuse.parallel.checkpoint.open_checkpoint import (
    CONSOLIDATE_PARAMS,
    PARAMS,
    RUN,
    Opened,
    open_model,
)
from earlyfuse.tools.command import run_command

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_SHARD_SIZE = "5GB"
_NEWLINE = "\n"
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Target:
    """A checked conversion, ready to be written: ``write`` fills a new folder."""

    write: Callable[[Path], None]
    remarks: list[str]


def convert(
    source: Path,
    destination: Path,
    to: str = "earlyfuse",
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
    upcycle: str | None = None,
    verify: bool = False,
) -> list[str]:
    """Convert; returns remarks on what the target format does not hold.

    ``dtype`` None keeps the types of the source. ``upcycle``: "1t1i", "mot", "8x", "4t4i" …, what
    a dense source becomes (``decoders.grown``), or "mixture_of_mamba" (``mamba_decoders.grown``);
    its logits are another model's, so not verified.
    Raises ``ValueError`` before anything is written if SRC is damaged, foreign or not what its
    config says, if the target format cannot express the model, or ``destination`` is there; and
    after, with nothing left, if ``verify`` finds other logits.
    """
    if destination.exists() or destination.is_symlink():
        raise ValueError(f"{destination} is there already; give another DST, or remove it")
    if upcycle is not None and verify:
        raise ValueError("--verify compares the same model, and --upcycle makes another; drop one")
    opened = open_model(source)
    _check_undamaged(opened)
    if upcycle is not None:
        opened = _upcycled(opened, upcycle)
    tensors = Cast(opened.tensors, dtype)
    target = TARGETS[to](opened, tensors, max_shard_bytes)
    with _new_folder(destination) as folder:
        target.write(folder)
        if verify:
            from earlyfuse.tools.compare_logits import compare

            compare(opened.folder, folder, exact=dtype is None)
    return ([opened.remark] if opened.remark else []) + target.remarks


# ---------------------------------------------------------------- targets


def _to_earlyfuse(opened: Opened, tensors: Tensors, max_shard_bytes: int) -> Target:
    files = assign_files(tensors.entries, max_shard_bytes)
    tokenizers, remarks = _tokenizers(opened)

    def write(folder: Path) -> None:
        write_folder(folder, tensors, files)
        _write_beside(folder, opened, tokenizers, remarks)

    return Target(write, remarks)


def _to_dcp(opened: Opened, tensors: Tensors, max_shard_bytes: int) -> Target:
    tokenizers, remarks = _tokenizers(opened)

    def write(folder: Path) -> None:
        # DCP keeps the tensors of a file until it is complete
        write_dcp(Writer(folder, single_file_per_rank=False), tensors)
        _write_beside(folder, opened, tokenizers, remarks)
        step = opened.source.get("step") or 0
        write_manifest(folder, Manifest(step, WEIGHTS, 1, checkpoint_folder.describe(folder, 0)))

    return Target(write, remarks)


def _to_huggingface(opened: Opened, tensors: Tensors, max_shard_bytes: int) -> Target:
    if any(layer.mamba is not None for layer in opened.config.layers):
        return _to_huggingface_mamba(opened, tensors, max_shard_bytes)
    sizes = Sizes.of(opened.config, "Hugging Face's Chameleon")
    theirs: Tensors = Made(huggingface.export_recipes(sizes), tensors)
    carried = _carried(opened, "huggingface")
    config = huggingface.write_config(
        sizes, opened.config, opened.vocabulary, carried, common_dtype(theirs)
    )
    remarks = []
    if opened.vq is None:
        remarks.append("no image tokenizer in it: transformers will make one of random weights")
    else:
        theirs = Together(theirs, opened.vq)
    return Target(_huggingface_writer(opened, theirs, config, max_shard_bytes), remarks)


def _to_huggingface_mamba(opened: Opened, tensors: Tensors, max_shard_bytes: int) -> Target:
    carried = _carried(opened, "huggingface")
    theirs, config = huggingface_mamba.export(opened.config, opened.vocabulary, tensors, carried)
    return Target(_huggingface_writer(opened, theirs, config, max_shard_bytes), [])


def _huggingface_writer(
    opened: Opened, theirs: Tensors, config: dict[str, Any], max_shard_bytes: int
) -> Callable[[Path], None]:
    files = assign_files(theirs.entries, max_shard_bytes)

    def write(folder: Path) -> None:
        if len(files) == 1:
            write_file(folder / SINGLE, theirs, list(theirs.entries))
        else:
            write_folder(folder, theirs, files)
        _copy(opened.files, folder)
        _write_json(folder / CONFIG, config)

    return write


def _carried(opened: Opened, name: str) -> JsonObject | None:
    """The config of another format that the model came with, None if it did not."""
    if name not in opened.carried:
        return None
    where = f"{opened.folder / CONFIG}: carried: {name}"
    return JsonObject.of(opened.carried[name], where, REMEDY)


def _to_mamba_ssm(opened: Opened, tensors: Tensors, max_shard_bytes: int) -> Target:
    carried = _carried(opened, "mamba_ssm")
    theirs, config, same = mamba_ssm.export(opened.config, tensors, carried)

    def write(folder: Path) -> None:
        write_torch_file(folder / mamba_ssm.WEIGHTS, theirs, same)
        _copy(opened.files, folder)
        _write_json(folder / CONFIG, config)
        if carried is None:
            ours = describe(opened.config, opened.vocabulary, {})
            _write_json(folder / mamba_ssm.OURS, ours)

    return Target(write, [])


def _to_meta(opened: Opened, tensors: Tensors, max_shard_bytes: int) -> Target:
    sizes = Sizes.of(opened.config, "Meta's Chameleon")
    came_in = _carried(opened, "meta")
    preferred = 1 if came_in is None else came_in.field("shards", int, default=1, least=1)
    shards = meta.shards_that_hold(sizes, tensors, preferred)
    theirs = Made(meta.export_recipes(sizes, shards), tensors)
    params, consolidated = meta.write_params(sizes, opened.config, opened.vocabulary, shards)

    def write(folder: Path) -> None:
        write_shards(folder, theirs, shards)
        _write_json(folder / PARAMS, params)
        _write_json(folder / CONSOLIDATE_PARAMS, consolidated)

    remarks = [] if opened.vq is None else ["the image tokenizer is no part of this format"]
    return Target(write, remarks)


TARGETS: dict[str, Callable[[Opened, Tensors, int], Target]] = {
    "earlyfuse": _to_earlyfuse,
    "hf": _to_huggingface,
    "mamba_ssm": _to_mamba_ssm,
    "meta": _to_meta,
    "dcp": _to_dcp,
}


def _write_beside(
    folder: Path, opened: Opened, tokenizers: Path | None, remarks: list[str]
) -> None:
    """Our description, and all that is no tensor of the decoder; adds to ``remarks``."""
    if opened.vq is not None:
        write_file(folder / VQ_FILE, opened.vq, list(opened.vq.entries))
    if opened.files:
        (folder / HUGGINGFACE).mkdir()
        _copy(opened.files, folder / HUGGINGFACE)
    vocabulary = opened.vocabulary
    if tokenizers is not None:
        shutil.copytree(tokenizers, folder / TOKENIZERS)
    elif opened.format in ("huggingface", "meta", "mamba_ssm"):
        vocabulary, said = _import_tokenizers(opened, folder / TOKENIZERS)
        remarks += said
    content = describe(opened.config, vocabulary, opened.source)
    if opened.carried:
        content["carried"] = opened.carried
    _write_json(folder / CONFIG, content)


def _import_tokenizers(opened: Opened, folder: Path) -> tuple[Vocabulary, list[str]]:
    """Write those that lie beside a public model as ours into ``folder``, with the model's
    vocabulary; a remark if they could not be taken over.

    Returns the vocabulary with begin, end and padding of documents as the text tokenizer names
    them: configs often leave them at their defaults.
    """
    ours = opened.vocabulary
    try:
        if not imports.import_text(opened.folder, folder):
            slow = (opened.folder / "vocab.json").is_file()
            advice = "; of vocab.json, save_pretrained of its fast tokenizer makes a tokenizer.json"
            return ours, [
                "no text tokenizer lies beside the model: tokenizers/ was not written"
                + (advice if slow else "")
            ]
        if Modality.IMAGE in ours.modalities:
            imports.import_vq(opened.folder, folder)
        text = TextTokenizer.load(text_file(folder))
        vocabulary = imports.with_sentinels_of(text, ours)
        imports.save_vocabulary(vocabulary, folder)
        Tokenizers.load(folder)  # do they fit?
    except ValueError as error:
        shutil.rmtree(folder, ignore_errors=True)
        return ours, [f"tokenizers/ was not written: {str(error).removeprefix(f'{folder}: ')}"]
    if vocabulary == ours:
        return ours, []
    ids = f"{vocabulary.bos}, {vocabulary.eos} and {vocabulary.pad}"
    return vocabulary, [f"begin, end and padding of documents are {ids}, by the text tokenizer"]


def _upcycled(opened: Opened, form: str) -> Opened:
    """The model that ``opened`` is upcycled to, made of its tensors one by one."""
    parent = opened.config
    there = opened.vocabulary.modalities
    missing = [m.label for m in map(Modality, parent.modalities) if m not in there]
    if missing:
        raise ValueError(
            f"--upcycle {form} unties modalities, and the vocabulary of {opened.folder} has no "
            f"{' and '.join(missing)} codes"
        )
    untied = form == mamba_decoders.FORM
    child = mamba_decoders.grown(parent) if untied else decoders.grown(parent, form)
    origins = upcycle_origins(parent, child)
    with torch.device("meta"):
        fresh = child.build()
    named = [name for name, origin in origins.items() if origin is None]
    for name in named:
        owner, _, leaf = name.rpartition(".")
        module = fresh.get_submodule(owner)
        empty = torch.empty_like(getattr(module, leaf), device="cpu")
        module.register_parameter(leaf, torch.nn.Parameter(empty, requires_grad=False))
    init_weights(
        fresh, std=child.init_std, branches=child.branch_count, seed=child.seed, only=named
    )
    recipes = {
        name: Recipe(tuple(fresh.get_parameter(name).shape), (), partial(fresh.get_parameter, name))
        if origin is None
        else Recipe(
            tuple(fresh.get_parameter(name).shape), ((origin.name, origin.shape),), origin.make
        )
        for name, origin in origins.items()
    }
    source = opened.source | {"upcycled_to": form}
    return replace(opened, config=child, tensors=Made(recipes, opened.tensors), source=source)


def _write_json(path: Path, content: object) -> None:
    # as transformers writes its configs
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _copy(files: Sequence[Path], folder: Path) -> None:
    for path in files:
        shutil.copyfile(path, folder / path.name)


# ---------------------------------------------------------------- sources


def _check_undamaged(opened: Opened) -> None:
    """``ValueError`` if a file of a checkpoint is not as it was written."""
    if (opened.folder / MANIFEST).is_file():
        found = damage(opened.folder, read_manifest(opened.folder).files)
        if found:
            raise ValueError(f"{opened.folder} is damaged: {'; '.join(found[:4])}; copy it again")


def _tokenizers(opened: Opened) -> tuple[Path | None, list[str]]:
    """The folder of the model's tokenizers, as far as it is known; a remark if it is not as it was.

    In an exported folder they lie beside the model; those of a run in its data folder.
    """
    beside = opened.folder / TOKENIZERS
    if beside.is_dir():
        return beside, []
    run = opened.folder.absolute().parent.parent / RUN
    source = JsonObject(opened.source, str(opened.folder / CONFIG), REMEDY)
    wanted = source.object("tokenizers", default={}).values
    if not wanted or not run.is_file():
        return None, []
    config = read_json(run, REMEDY).object("config", default={})
    data = config.object("data", default={}).field("folder", str, default="")
    folder = Path(data) / TOKENIZERS
    if not data or not folder.is_dir():
        return None, [f"{folder}: the tokenizers of the data are not there and were not copied"]
    here = {sha256_file(path) for path in folder.iterdir() if path.is_file()}
    other = [name for name, digest in wanted.items() if digest not in here]
    if other:
        return None, [f"{folder}: the {other} tokenizers are not the run's and were not copied"]
    return folder, []


@contextmanager
def _new_folder(destination: Path) -> Iterator[Path]:
    """A folder under a temporary name that becomes ``destination`` when the block ends well."""
    temporary = destination.with_name(f"{destination.name}.part")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    except OSError as error:
        if not temporary.is_dir():
            raise _unwritten(destination, error) from error
        raise ValueError(
            f"{temporary} is there: another conversion writes it, or one was killed; remove it"
        ) from None
    try:
        yield temporary
        descriptor = os.open(temporary, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
        temporary.rename(destination)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise _unwritten(destination, error) from error
        raise


def _unwritten(destination: Path, error: OSError) -> OSError:
    return OSError(
        f"{destination} could not be written, and nothing of it was kept: {error}; free some "
        "space, or give another DST"
    )


# ---------------------------------------------------------------- command line


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 when it succeeded, 2 with what to change when it could not."""
    return run_command(
        "convert", lambda: _convert(arguments), interrupted="stopped; nothing was written"
    )


def _convert(arguments: Sequence[str] | None) -> None:
    options = _parser().parse_args(arguments)
    begin = time.perf_counter()
    remarks = convert(
        options.source,
        options.destination,
        options.to,
        dtype=DTYPES.get(options.dtype),
        upcycle=options.upcycle,
        max_shard_bytes=shard_bytes(options.max_shard_size),
        verify=options.verify,
    )
    for remark in remarks:
        print(f"note: {printable(remark)}")
    size = sum(path.stat().st_size for path in options.destination.rglob("*") if path.is_file())
    seconds = time.perf_counter() - begin
    done = f"{options.destination}: {options.to}, {size / 1e6:.1f} MB in {seconds:.1f} s"
    print(printable(done))


def shard_bytes(text: str) -> int:
    """Bytes of ``5GB``, ``200MB``, ``2GiB`` or a plain number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", text.strip().upper())
    size = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if size <= 0:
        raise ValueError(f"--max-shard-size ({text!r}) must be a size such as {MAX_SHARD_SIZE}")
    return size


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="convert",
        description="Checkpoints of earlyfuse, Hugging Face's Chameleon and Mamba, mamba_ssm, "
        "Meta's files and DCP.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("source", type=Path, metavar="SRC", help="folder, recognised: also a run or its step-N")
    add("destination", type=Path, metavar="DST", help="folder to make; must not be there")
    add("--to", choices=list(TARGETS), default="earlyfuse", help="format of DST (earlyfuse)")
    add("--dtype", choices=list(DTYPES), help="type of the decoder's tensors (as they are)")
    add("--max-shard-size", default=MAX_SHARD_SIZE, help=f"of safetensors ({MAX_SHARD_SIZE})")
    add(
        "--upcycle",
        metavar="FORM",
        help="make a dense SRC sparse: 1t1i, mot, 8x, 4t4i …, mixture_of_mamba",
    )
    add("--verify", action="store_true", help="compare logits of both on random tokens")
    return parser


if __name__ == "__main__":
    sys.exit(main())
