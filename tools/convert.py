"""Conversion of models between earlyfuse, Hugging Face, ``mamba_ssm``, Meta's files and DCP.

``python -m earlyfuse.tools.convert SRC DST [--to FORMAT] [--dtype TYPE] [--max-shard-size SIZE]
[--weights WHICH] [--upcycle FORM] [--verify]``. The format of SRC is detected; DST is written whole
or not at all. docs/conversion.md describes the formats and what is refused.
"""

import argparse
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from earlyfuse.data.console import printable
from earlyfuse.tools.command import (
    Parser,
    add_code_option,
    add_weights_option,
    import_code,
    run_command,
)

if TYPE_CHECKING:  # --help does not pay for torch
    import torch

    from earlyfuse.parallel.checkpoint.open_checkpoint import OpenModel, Weights

FORMATS = ("earlyfuse", "hf", "mamba_ssm", "meta", "dcp")  # of export_model.TARGETS
DTYPES = ("float32", "bfloat16", "float16")
MAX_SHARD_SIZE = "5GB"
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def convert(
    source: Path,
    destination: Path,
    to: str = "earlyfuse",
    *,
    dtype: "torch.dtype | None" = None,
    max_shard_bytes: int = 5 * 10**9,
    upcycle: str | None = None,
    verify: bool = False,
    weights: "Weights | None" = None,
) -> list[str]:
    """Converts a folder; returns remarks on what the target format leaves out.

    ``weights`` as of ``open_model``: by default averages, if the source has any.
    ``dtype`` None keeps the dtypes of the source. ``upcycle``: the sparse form of a dense source,
    "1t1i", "mot", "8x", "4t4i" … or "mixture_of_mamba"; its logits differ, so it is not verified.
    ``ValueError`` before anything is written if the source is damaged, foreign or not what its
    config says, if the target format cannot express the model, or if ``destination`` exists; and
    after, with nothing left, if ``verify`` finds other logits.
    """
    from earlyfuse.models.state_dicts.tensor_map import Cast
    from earlyfuse.parallel.checkpoint.export_model import TARGETS
    from earlyfuse.parallel.checkpoint.manifest import MANIFEST, damage, read_manifest
    from earlyfuse.parallel.checkpoint.open_checkpoint import open_model

    if destination.exists() or destination.is_symlink():
        raise ValueError(f"{destination} exists already; give another DST, or remove it")
    if upcycle is not None and verify:
        raise ValueError("--verify needs equal logits, and --upcycle changes them; drop one")
    opened = open_model(source, weights)
    manifest = opened.folder / MANIFEST
    if manifest.is_file() and (found := damage(opened.folder, read_manifest(opened.folder).files)):
        raise ValueError(f"{opened.folder} is damaged: {'; '.join(found[:4])}; copy it again")
    if upcycle is not None:
        opened = _upcycled(opened, upcycle)
    export = TARGETS[to](opened, Cast(opened.tensors, dtype), max_shard_bytes)
    with _new_folder(destination) as folder:
        export.write(folder)
        if verify:
            from earlyfuse.tools.compare_logits import compare

            compare(opened.folder, folder, exact=dtype is None, weights=opened.weights)
    return ([opened.remark] if opened.remark else []) + export.remarks


def _upcycled(opened: "OpenModel", form: str) -> "OpenModel":
    """Upcycles ``opened``; tensors are computed one by one when they are read."""
    import torch

    from earlyfuse.configs.forms import in_form
    from earlyfuse.models.init_weights import init_weights
    from earlyfuse.models.state_dicts.tensor_map import Mapped, TensorMap
    from earlyfuse.models.upcycle import upcycle as upcycle_origins
    from earlyfuse.models.vocabulary import Modality

    parent = opened.config
    there = opened.vocabulary.modalities
    missing = [m.label for m in map(Modality, parent.modalities) if m not in there]
    if missing:
        raise ValueError(
            f"--upcycle {form} unties modalities, but the vocabulary of {opened.folder} has no "
            f"{' and '.join(missing)} codes; convert a model that has them"
        )
    child = in_form(parent, form)
    origins = upcycle_origins(parent, child)
    with torch.device("meta"):
        fresh = child.build()
    named = [name for name, origin in origins.items() if origin is None]
    for name in named:
        owner, _, leaf = name.rpartition(".")
        module = fresh.get_submodule(owner)
        empty = torch.empty_like(getattr(module, leaf), device="cpu")
        module.register_parameter(leaf, torch.nn.Parameter(empty, requires_grad=False))
    std, branches = child.init_std, child.branch_count
    init_weights(fresh, std=std, branches=branches, seed=child.seed, only=named)
    maps = {}
    for name, origin in origins.items():
        shape = tuple(fresh.get_parameter(name).shape)
        if origin is None:
            maps[name] = TensorMap(shape, (), partial(fresh.get_parameter, name))
        else:
            maps[name] = TensorMap(shape, ((origin.name, origin.shape),), origin.make)
    source = opened.source | {"upcycled_to": form}
    return replace(opened, config=child, tensors=Mapped(maps, opened.tensors), source=source)


@contextmanager
def _new_folder(destination: Path) -> Iterator[Path]:
    """Yields a temporary folder, renamed to ``destination`` when the block succeeds."""
    temporary = destination.with_name(f"{destination.name}.part")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    except OSError as error:
        if not temporary.is_dir():
            raise _unwritten(destination, error) from error
        raise ValueError(
            f"{temporary} exists: another conversion writes it, or one was killed; remove it"
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
        f"{destination} could not be written, and nothing was kept: {error}; free some space, or "
        "give another DST"
    )


# ---------------------------------------------------------------- command line


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0, or 2 with what to change on stderr."""
    return run_command(
        "convert", lambda: _convert(arguments), interrupted="stopped; nothing was written"
    )


def _convert(arguments: Sequence[str] | None) -> None:
    options = _parser().parse_args(arguments)
    begin = time.perf_counter()
    import torch

    import_code(options.code)
    remarks = convert(
        options.source,
        options.destination,
        options.to,
        dtype=options.dtype and getattr(torch, options.dtype),
        upcycle=options.upcycle,
        max_shard_bytes=shard_bytes(options.max_shard_size),
        verify=options.verify,
        weights=options.weights,
    )
    for remark in remarks:
        print(f"note: {printable(remark)}")
    size = sum(path.stat().st_size for path in options.destination.rglob("*") if path.is_file())
    seconds = time.perf_counter() - begin
    done = f"{options.destination}: {options.to}, {size / 1e6:.1f} MB in {seconds:.1f} s"
    print(printable(done))


def shard_bytes(text: str) -> int:
    """Returns the bytes of ``5GB``, ``200MB``, ``2GiB`` or a plain number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", text.strip().upper())
    size = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if size <= 0:
        raise ValueError(f"--max-shard-size ({text!r}) must be a size such as {MAX_SHARD_SIZE}")
    return size


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="convert",
        description="Converts models between earlyfuse, Hugging Face's Chameleon and Mamba, "
        "mamba_ssm, Meta's files and DCP checkpoints.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("source", type=Path, metavar="SRC", help="folder of a model, a run or one of its step-N")
    add("destination", type=Path, metavar="DST", help="folder to create; must not exist")
    add("--to", choices=FORMATS, default="earlyfuse", help="format of DST (earlyfuse)")
    add("--dtype", choices=DTYPES, help="dtype of the decoder's tensors (unchanged)")
    add("--max-shard-size", default=MAX_SHARD_SIZE, help=f"of safetensors ({MAX_SHARD_SIZE})")
    add(
        "--upcycle",
        metavar="FORM",
        help="make a dense SRC sparse: 1t1i, mot, 8x, 4t4i …, mixture_of_mamba",
    )
    add_weights_option(parser)
    add("--verify", action="store_true", help="compare logits of both on random tokens")
    add_code_option(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
