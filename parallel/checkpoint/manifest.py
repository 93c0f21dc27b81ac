"""The manifest of a checkpoint: which files it has, as they were written, vouched for by itself."""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from earlyfuse.data.json_files import JsonObject, read_json, shown

MANIFEST, LATEST = "manifest.json", "latest"
EVERYTHING, WEIGHTS = "everything", "weights"
_COPY = "copy the checkpoint again"
_MOST_LATEST = 100  # bytes


@dataclass(frozen=True)
class FileRecord:
    """A file as it was written."""

    bytes: int
    sha256: str


Files = dict[str, FileRecord]  # by path in the checkpoint's folder


@dataclass(frozen=True)
class Manifest:
    """What a complete checkpoint is: ``holds`` is "everything" (a run continues) or "weights"."""

    step: int
    holds: str
    ranks: int
    files: Files

    def written(self) -> bytes:
        """The content of its file, with the SHA-256 of all that it says."""
        content = asdict(self)
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        return json.dumps({"sha256": digest, **content}, indent=1).encode() + b"\n"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint; ``ValueError`` if it is not as it was written, or is that of
    another step than its folder is named after.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{path} is missing; {_COPY}")
    fields = read_json(path, _COPY)
    fields.field("sha256", str)
    fields.check_names(("sha256", "step", "holds", "ranks", "files"))
    manifest = Manifest(
        fields.field("step", int, least=0),
        fields.field("holds", str, choices=(EVERYTHING, WEIGHTS)),
        fields.field("ranks", int, least=1),
        {name: _record(fields.object("files"), name) for name in fields.field("files", dict)},
    )
    if path.read_bytes() != manifest.written():
        raise ValueError(f"{path} is not as it was written: its SHA-256 is another; {_COPY}")
    named = step_of(folder.name)
    if manifest.holds == EVERYTHING and named not in (None, manifest.step):
        raise ValueError(
            f"{folder} holds step {manifest.step}, as its {MANIFEST} says, so it was renamed; give "
            f"it the name step-{manifest.step} again"
        )
    return manifest


def _record(files: JsonObject, name: str) -> FileRecord:
    place = Path(name)
    if not name or place.is_absolute() or ".." in place.parts:
        raise files.wrong(name, "must be a file in the folder of the checkpoint")
    record = files.object(name)
    record.check_names(("bytes", "sha256"))
    return FileRecord(record.field("bytes", int, least=0), record.field("sha256", str))


def step_of(name: str) -> int | None:
    """The step of a checkpoint's folder, by its name; None for any other name."""
    match = re.fullmatch(r"step-(0|[1-9]\d{0,17})", name, re.ASCII)
    return int(match[1]) if match else None


def steps_in(root: Path) -> list[int]:
    """Steps of the checkpoints in the folder of a run's checkpoints, ascending."""
    if not root.is_dir():
        return []
    try:
        found = [step_of(path.name) for path in root.iterdir() if path.is_dir()]
    except OSError as error:
        raise ValueError(
            f"{root} cannot be read ({error.strerror}); let this user read it"
        ) from error
    return sorted(step for step in found if step is not None)


def read_latest(root: Path) -> int | None:
    """The step that ``latest`` names, None without one; ``ValueError`` if it is not as it was
    written.
    """
    path = root / LATEST
    if not path.exists():
        return None
    remedy = (
        f"write the name of the newest good checkpoint into it (there: {named(steps_in(root))})"
    )
    try:
        with open(path, "rb") as file:
            content = file.read(_MOST_LATEST + 1)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); {remedy}") from error
    step = step_of(content.decode("ascii", "replace").removesuffix("\n"))
    if step is None:
        raise ValueError(
            f"{path} ({shown(content)}) must name the checkpoint completed last, step-N; {remedy}"
        )
    return step


def latest_checkpoint(root: Path) -> Path:
    """The checkpoint completed last in ``root``; ``ValueError`` if it is not there."""
    step, steps = read_latest(root), steps_in(root)
    if step is None and not steps:
        raise ValueError(f"{root} has no complete checkpoint yet; give a folder that has one")
    if step is None:
        step = steps[-1]  # killed before ``latest`` was written for the first time
    if step not in steps:
        raise ValueError(
            f"{root / LATEST} names step-{step}, which is not there (there: {named(steps)}); "
            "restore its folder, or give another one by its name"
        )
    return root / f"step-{step}"


def named(steps: list[int]) -> str:
    """The names of checkpoints, for messages."""
    return ", ".join(f"step-{step}" for step in steps) or "none"
