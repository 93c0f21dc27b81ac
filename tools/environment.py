"""Checks what a run needs of this machine: versions, device, run folder, data and memory."""

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import metadata
from math import ceil
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement

from earlyfuse.data.console import error_text
from earlyfuse.data.shards.source import TokenSource
from earlyfuse.data.stream.mixture import Mixture, positions_of
from earlyfuse.data.tokenizers import VOCABULARY_FILE
from earlyfuse.models.flops import count_parameters
from earlyfuse.parallel.estimates.memory import rank_memory
from earlyfuse.parallel.estimates.step import Step
from earlyfuse.parallel.reporting.opening import count, quantity
from earlyfuse.parallel.training.data_config import DataSet, data_folder

PINS = Path(__file__).resolve().parent.parent / "constraints.txt"
PROBE = 64 << 20  # bytes written to measure a disk
READ = 64  # documents of a source that are read


@dataclass(frozen=True)
class Finding:
    """The result of a check; ``remedy``: what to do, if it failed."""

    name: str
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        state, end = ("FAILED", f". Remedy: {self.remedy}") if self.remedy else ("ok", "")
        return f"{state:<8}{self.name:<10}{self.text}{end}"


def check_versions() -> Iterator[Finding]:
    """Python and packages against the requirements of this project, and the pins beside it."""
    install = "pip install -c constraints.txt -e . in the environment of the source tree"
    try:
        requirements = [Requirement(line) for line in metadata.requires("earlyfuse") or ()]
    except metadata.PackageNotFoundError:
        yield Finding("versions", "earlyfuse is not installed", install)
        return
    pins = _pins()
    good, unpinned = [f"Python {sys.version.split()[0]}"], []
    for requirement in requirements:
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        name = requirement.name
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            found = ""
        if not requirement.specifier.contains(found or "0", prereleases=True) or not found:
            wanted = f"{name}{requirement.specifier}"
            yield Finding("versions", f"{name} is {found or 'missing'}, needs {wanted}", install)
        elif name in ("torch", "torchtitan"):
            good.append(f"{name} {found}")
        if found and found.partition("+")[0] != pins.get(name, found).partition("+")[0]:
            unpinned.append(f"{name} {found} (tested: {pins[name]})")
    beside = f"; other than the pins: {', '.join(unpinned)}" if unpinned else ""
    yield Finding("versions", f"{', '.join(good)}{beside}")


def _pins() -> dict[str, str]:
    """Package → version in constraints.txt; {} where only the package is installed."""
    if not PINS.is_file():
        return {}
    lines = PINS.read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line and line[0] != "#")


def check_device() -> Iterator[Finding]:
    """GPUs, and that torch can use them."""
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
        kinds = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
        yield Finding("device", f"{kinds}; CUDA {torch.version.cuda}, NCCL {_nccl()}")
    elif shutil.which("nvidia-smi") or Path("/proc/driver/nvidia/version").exists():
        build = torch.version.cuda or "none: a CPU build"
        yield Finding(
            "device",
            f"an NVIDIA driver, but torch {torch.__version__} sees no GPU (its CUDA: {build})",
            "install a CUDA build of torch that the driver supports (nvidia-smi shows up to which "
            "CUDA), and let the job see GPUs (CUDA_VISIBLE_DEVICES, the scheduler's --gpus)",
        )
    else:
        yield Finding("device", f"no GPU: runs use {count(os.cpu_count() or 1, 'core')} and gloo")


def _nccl() -> str:
    return ".".join(map(str, torch.cuda.nccl.version()))


def check_folder(folder: Path, config: Any = None) -> Iterator[Finding]:
    """The disk of the run ``folder`` is writable, and has room and speed for the checkpoints of
    ``config``. Creates no folder, and leaves nothing.
    """
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    other = f"choose another with {'--dump_folder' if config else '--folder'}"
    try:
        free, speed = shutil.disk_usage(place).free, _write_speed(place)
    except OSError as error:
        text = f"{place} cannot be written: {error.strerror or error_text(error)}"
        yield Finding("folder", text, f"make room or change permissions there, or {other}")
        return
    text = f"{place}: {quantity(free)}B free, written at {quantity(speed)}B/s"
    if config is None or not config.checkpoint.enable:
        yield Finding("folder", text)
        return
    size = _checkpoint_bytes(config)
    # the newest is complete before the oldest goes
    needed = size * (max(config.checkpoint.keep_latest_k, 1) + 1)
    seconds, longest = size / speed, config.watchdog.slow_timeout_seconds
    text += f"; a checkpoint is {quantity(size)}B, {seconds:.3g} s from one host"
    if needed > free:
        keep = config.checkpoint.keep_latest_k
        yield Finding(
            "folder",
            f"{text}; checkpoints need {quantity(needed)}B (checkpoint.keep_latest_k {keep}, and "
            "one being written)",
            f"make room, lower --checkpoint.keep_latest_k, or {other}",
        )
    elif seconds > longest:
        yield Finding(
            "folder",
            f"{text}, longer than watchdog.slow_timeout_seconds ({longest:g})",
            f"raise --watchdog.slow_timeout_seconds, or {other}, on a faster disk",
        )
    else:
        yield Finding("folder", text)


def _write_speed(folder: Path) -> float:
    """Bytes per second of one file, synced to the disk."""
    block = os.urandom(1 << 20)
    with tempfile.TemporaryFile(dir=folder) as file:
        began = time.perf_counter()
        for _ in range(PROBE // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return PROBE / (time.perf_counter() - began)


def _checkpoint_bytes(config: Any) -> int:
    """Parameters, two moments and averages in the dtypes that a run keeps."""
    parameters = count_parameters(config.model_spec.model).total
    width = 4 if config.training.dtype == "float32" else 2
    return parameters * (3 * width + 4 * (config.ema.decay > 0))


def check_data(config: Any, ranks: int, most_epochs: float) -> Iterator[Finding]:
    """Sources of ``config`` fit the model, are readable, and suffice for its steps."""
    folder = data_folder(config.data)
    if folder is None:
        remedy = "prepare data (docs/data.md) and pass the folder with --data.folder"
        yield Finding("data", "the config brings none", remedy)
        return
    own = not config.data.folder
    if own and not (folder / "tokenizers" / VOCABULARY_FILE).exists():
        yield Finding("data", f"{folder}: the embedded corpus, made at the first start")
        return
    try:
        data = DataSet(replace(config.data, folder=str(folder)))
        resolved = data.resolve(config, ranks)
        sources = tuple(TokenSource(folder / "train" / name) for name in data.shares)
        for source in sources:
            _read(source)
    except (ValueError, OSError) as error:
        text, _, remedy = error_text(error).partition("; ")
        yield Finding("data", text, remedy or "restore the file, or prepare the source again")
        return
    loader, training = resolved.dataloader, resolved.training
    mixture = Mixture(sources, tuple(data.shares.values()), loader.media_share, loader.clean_copies)
    tokens = training.steps * training.global_batch_size * training.seq_len
    for source, share in zip(sources, mixture.effective_shares(), strict=True):
        size = sum(positions_of(source, loader.clean_copies).values())
        epochs = tokens * share / size
        text = (
            f"{source.name}: {len(source):,} documents readable, {quantity(size)} tokens; the run "
            f"reads {epochs:.3g} epochs"
        )
        remedy = ""
        if epochs > most_epochs and not own:
            text += f", more than {most_epochs:g}"
            remedy = (
                "add documents, lower --training.steps or its share in --data.shares, or accept it "
                f"with --most-epochs {ceil(epochs)}"
            )
        elif len(source) < training.global_batch_size:
            text += f", and its {training.global_batch_size} lanes need a document each"
            remedy = "add documents, or lower --training.global_batch_size"
        yield Finding("data", text, remedy)


def _read(source: TokenSource) -> None:
    """Check the index of every shard, and the checksums of some documents all over the source."""
    for _ in source.runs():
        pass
    for number in range(0, len(source), max(1, len(source) // READ)):
        source.document(number)


def check_memory(config: Any, ranks: int) -> Iterator[Finding]:
    """The estimate for a rank of ``config`` fits its device."""
    try:
        needed = rank_memory(Step.of(config, ranks)).total
    except ValueError as error:
        text, _, remedy = str(error).partition("; ")
        yield Finding("memory", text, remedy or "change the field")
        return
    here, what = _memory_of_a_rank(ranks)
    text = f"about {quantity(needed)}B per rank of {ranks}, of {quantity(here)}B {what}"
    remedy = (
        "more ranks, fewer rows (--training.local_batch_size), recomputation "
        "(activation-checkpoint:full-ac), or context or tensor parallelism (docs/parallelism.md)"
    )
    yield Finding("memory", text, remedy if needed > here else "")


def _memory_of_a_rank(ranks: int) -> tuple[int, str]:
    """Bytes that a rank can have on this host, and what they are."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0], f"free on {torch.cuda.get_device_name()}"
    here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    pages = os.sysconf("SC_AVPHYS_PAGES")
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024 // here, "available on this host"
    return pages * os.sysconf("SC_PAGE_SIZE") // here, "free on this host"


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:  # not Linux
        return []
