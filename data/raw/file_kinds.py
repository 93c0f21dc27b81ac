"""Names the format of a file that was given as a shard and is no tar, from its content."""

import re
import tarfile
import zlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from earlyfuse.data.raw.archive_stream import GZIP_MAGIC, ZSTD_MAGIC, zstd_module

_HEAD = 1 << 16
_BLOCK = 512
_PACK_IT = "write its records as JSON lines or samples of a .tar; docs/data.md lists the layouts"
_NAME_IT = "a file of that kind is read under its own ending, {}: rename it"
_ONE_PER_LINE = "write an object a line (jq -c '.[]' FILE > FILE.jsonl)"
_UNPACK_IT = "only gzip is read: unpack it, or compress the tar with gzip"
_COLLECT = "a shard is a .tar of such files, each with its text under the same name"
_FETCH_AGAIN = "fetch the shard again"
_PULL = "run git lfs pull"
_NEVER_OPENED = "it can run code and is not opened: write a .tar"
_FAILED = (_FETCH_AGAIN, _PULL)

# offset, bytes there, format, remedy; the first match is taken
_MAGIC = (
    (0, b"PAR1", "a parquet file", _NAME_IT.format(".parquet")),
    (0, b"PARE", "an encrypted parquet file", _PACK_IT),
    (0, b"ARROW1", "an Arrow or Feather file", _PACK_IT),
    (0, b"FEA1", "a Feather file", _PACK_IT),
    (0, b"\xff\xff\xff\xff", "an Arrow stream", _PACK_IT),
    (0, b"Obj\x01", "an Avro file", _PACK_IT),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file", _PACK_IT),
    (0, b"SQLite format 3\0", "an SQLite database", _PACK_IT),
    (0, b"\x93NUMPY", "a numpy array", _PACK_IT),
    (0, b"\xff\xfe", "text in UTF-16", _PACK_IT),
    (0, b"\xfe\xff", "text in UTF-16", _PACK_IT),
    (0, b"\x28\xb5\x2f\xfd", "compressed with zstd", _UNPACK_IT),
    (4, b"1AY&SY", "compressed with bzip2", _UNPACK_IT),
    (0, b"\xfd7zXZ\0", "compressed with xz", _UNPACK_IT),
    (0, b"\x04\x22\x4d\x18", "compressed with lz4", _UNPACK_IT),
    (0, b"\x1f\x9d", "compressed with compress (.Z)", _UNPACK_IT),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK_IT),
    (0, b"Rar!", "a rar archive", _UNPACK_IT),
    (0, b"PK\5\6", "an empty zip archive", _UNPACK_IT),
    (0, b"\x89PNG", "a PNG image", _COLLECT),
    (0, b"\xff\xd8\xff", "a JPEG image", _COLLECT),
    (0, b"GIF8", "a GIF image", _COLLECT),
    (0, b"II*\0", "a TIFF image", _COLLECT),
    (0, b"MM\0*", "a TIFF image", _COLLECT),
    (8, b"WEBP", "a WebP image", _COLLECT),
    (8, b"WAVE", "a WAV file", _COLLECT),
    (0, b"RIFF", "a RIFF file", _COLLECT),
    (0, b"fLaC", "a FLAC file", _COLLECT),
    (0, b"OggS", "an Ogg file", _COLLECT),
    (0, b"ID3\x03", "an MP3 file", _COLLECT),
    (4, b"ftyp", "an MP4 file", _COLLECT),
    (0, b"\x1a\x45\xdf\xa3", "a Matroska or WebM file", _COLLECT),
    (0, b"%PDF", "a PDF document", _COLLECT),
    (5, b'\0\0\0{"', "a safetensors file", "give it to the option it belongs to"),
    (0, b"\x80\x02", "a Python pickle", _NEVER_OPENED),
    (0, b"\x80\x04", "a Python pickle", _NEVER_OPENED),
    (0, b"version https://git-lfs", "a git-lfs pointer, not the data", _PULL),
)
_CONTROLS = re.compile(r"[\0-\x08\x0e-\x1a\x1c-\x1f]")


def is_gzip(path: Path) -> bool:
    """True if the file begins with gzip's magic bytes."""
    with open(path, "rb") as file:
        return file.read(len(GZIP_MAGIC)) == GZIP_MAGIC


@dataclass(frozen=True)
class OtherKind:
    """Format of a file that is no tar. ``text``: the end of a sentence, with a remedy; ``failed``:
    True for what a failed download leaves in place of a shard.
    """

    text: str
    failed: bool


def is_tar(path: Path) -> bool:
    """True if the file begins as a tar or a gzip of one."""
    with open(path, "rb") as file:
        head = file.read(_BLOCK)
        if head.startswith(GZIP_MAGIC):
            head = _inflated(head + file.read(_HEAD))
    return _is_tar(head)


def other_kind(path: Path) -> OtherKind | None:
    """The format of ``path``; none for a tar, and for content that is not recognised."""
    with open(path, "rb") as file:
        head = file.read(_BLOCK)
        if _is_tar(head):
            return None
        head += file.read(_HEAD - len(head))
    packed = ""
    if head.startswith(GZIP_MAGIC):
        packed, head = "gzip of ", _inflated(head)
        if len(head) < _BLOCK or _is_tar(head):
            return None
    what, remedy = _described(head)
    if not what:
        return None
    return OtherKind(f"{packed}{what}, not a tar: {remedy}", remedy in _FAILED)


def other_than(path: Path, wanted: str, known: Collection[str]) -> OtherKind | None:
    """The format of ``path`` if it is recognised and not among ``known``; compressed files are
    known by their content.
    """
    with open(path, "rb") as file:
        head = file.read(_HEAD)
    if head.startswith(ZSTD_MAGIC):
        try:
            zstd_module()
        except ValueError as error:
            return OtherKind(str(error), failed=False)
        return None
    packed = "gzip of " if head.startswith(GZIP_MAGIC) else ""
    if packed and not (head := _inflated(head)):
        return None  # damaged: the reader says how
    what, remedy = ("a tar", _NAME_IT.format(".tar")) if _is_tar(head) else _described(head)
    if not what or what in known:
        return None
    return OtherKind(f"{packed}{what}, not {wanted}: {remedy}", remedy in _FAILED)


def _described(head: bytes) -> tuple[str, str]:
    """Format of a file that begins with ``head``, and a remedy; empty if not recognised."""
    if not head:
        return "an empty file", _FETCH_AGAIN
    if head.startswith(b"PK\3\4"):
        for mark, what in ((b".npy", "an .npz file"), (b"xl/", "an .xlsx table")):
            if mark in head:
                return what, _PACK_IT
        return "a zip archive", _UNPACK_IT
    for at, magic, what, remedy in _MAGIC:
        if head.startswith(magic, at):
            return what, remedy
    text = _as_text(head)
    if text is None:
        return "", ""
    start = text.lstrip("\ufeff \t\r\n").lower()
    if start.startswith(("<!doctype html", "<html", "<head")):
        return "an HTML page, as servers send in place of a file", _FETCH_AGAIN
    if start.startswith(("<?xml", "<error")):
        return "an XML document, as servers send in place of a file", _FETCH_AGAIN
    if start.startswith(("{", "[")):
        lines = start.splitlines()
        if len(lines) > 1 and lines[0].rstrip().endswith(("}", "]")):
            return "JSON lines", _NAME_IT.format(".jsonl")
        return ("a JSON object" if start[0] == "{" else "a JSON file"), _ONE_PER_LINE
    return "plain text", _NAME_IT.format(".txt")


def _is_tar(block: bytes) -> bool:
    """True for a tar header, and for the zeros of an empty archive."""
    if len(block) < _BLOCK:
        return False
    try:
        tarfile.TarInfo.frombuf(block[:_BLOCK], "utf-8", "backslashreplace")
    except tarfile.HeaderError:
        return not block[:_BLOCK].strip(b"\0")
    return True


def _inflated(head: bytes) -> bytes:
    """The first inflated bytes of a gzip file, empty if they are damaged."""
    try:
        return zlib.decompressobj(31).decompress(head, _HEAD)
    except zlib.error:
        return b""


def _as_text(head: bytes) -> str | None:
    if len(head) == _HEAD:  # a character may be incomplete
        head = head[:-4] + head[-4:].rstrip(bytes(range(0x80, 0x100)))
    try:
        text = head.decode()
    except UnicodeDecodeError:
        return None
    return None if _CONTROLS.search(text) else text
