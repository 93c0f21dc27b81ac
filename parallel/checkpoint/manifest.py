"""The manifest of a checkpoint: size and SHA-256 of every file, and of the manifest itself."""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from earlyfuse.data.atomic import atomic_write, sha256_file
from earlyfuse.data.json_files import JsonObject, read_json
from earlyfuse.parallel.checkpoint.file_layout import step_of

MANIFEST = "manifest.json"
EVERYTHING, WEIGHTS = "everything", "weights"
_COPY = "copy the checkpoint again"


@dataclass(frozen=True)
class FileRecord:
    """Size and checksum of a file as it was written."""

    bytes: int
    sha256: str


Files = dict[str, FileRecord]  # by path in the checkpoint's folder


@dataclass(frozen=True)
class Manifest:
    """A complete checkpoint; ``holds`` is "everything" (a run can resume) or "weights"."""

    step: int
    holds: str
    ranks: int
    files: Files

    def to_json(self) -> bytes:
        """Returns the content of the file, with the SHA-256 of all fields."""
        content = asdict(self)
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        return json.dumps({"sha256": digest, **content}, indent=1).encode() + b"\n"

    def write(self, folder: Path) -> None:
        """Writes the file into a checkpoint's folder."""
        with atomic_write(folder / MANIFEST) as file:
            file.write(self.to_json())


def read_manifest(folder: Path) -> Manifest:
    """Reads the manifest of a checkpoint; ``ValueError`` if it was changed, or its step is not that
    in the folder's name.
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
    if path.read_bytes() != manifest.to_json():
        raise ValueError(f"{path} was changed: its SHA-256 differs; {_COPY}")
    named = step_of(folder.name)
    if manifest.holds == EVERYTHING and named not in (None, manifest.step):
        raise ValueError(
            f"{folder} holds step {manifest.step} ({MANIFEST}), so it was renamed; name it "
            f"step-{manifest.step} again"
        )
    return manifest


def _record(files: JsonObject, name: str) -> FileRecord:
    place = Path(name)
    if not name or place.is_absolute() or ".." in place.parts:
        raise files.wrong(name, "must be a file in the folder of the checkpoint")
    record = files.object(name)
    record.check_names(("bytes", "sha256"))
    return FileRecord(record.field("bytes", int, least=0), record.field("sha256", str))


def describe(folder: Path, rank: int) -> Files:
    """Describes the files that ``rank`` wrote; rank 0 also those of no rank."""
    files: Files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        writer = re.match(r"__(\d+)_", path.name)
        if rank == (int(writer[1]) if writer else 0):
            name = path.relative_to(folder).as_posix()
            files[name] = FileRecord(path.stat().st_size, sha256_file(path))
    return files


def damage(
    folder: Path, files: Files, hashed: Callable[[str], bool] = lambda name: True
) -> list[str]:
    """Lists a line for each of ``files`` that has changed; reads contents where ``hashed``."""
    found = []
    for name, record in files.items():
        path = folder / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif (size := path.stat().st_size) != record.bytes:
            found.append(f"{name} has {size} bytes instead of {record.bytes}")
        elif hashed(name) and sha256_file(path) != record.sha256:
            found.append(f"{name} has another SHA-256 than was written")
    return found
