"""Samples of a WebDataset tar: members grouped by key, and only groups known to be complete.

Python's ``tarfile`` takes a cut header, a cut at a member boundary and a proper end for the same
thing, and ``webdataset`` then hands on a last sample that lacks members. Here a sample is handed on
only when the header of another sample, or the block of zeros that ends an archive, has been read
after it; whatever ends otherwise ends with one ``BadSample``. Headers are parsed by ``tarfile``.

Left out: random access, sparse members, compression other than gzip, and unpacking to disk.
"""

import gzip
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from earlyfuse.data.documents import BadSample
from earlyfuse.data.raw.safety import unsafe_reason

_BLOCK = 512
_CHUNK = 1 << 20
_LONGEST_NAME_RECORD = 1 << 16  # bytes of an extended header; real ones hold a path
_NAME_RECORDS = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME)
_SKIPPED_RECORDS = (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK)


@dataclass(frozen=True)
class Member:
    """One entry: ``data`` holds all its bytes; ``plain`` is false for links and devices."""

    name: str
    data: bytes
    plain: bool


@dataclass
class Sample:
    """Members with one key: ``members`` maps what follows a file name's first dot to the bytes.

    ``problem`` is set when the sample must not be used, whatever its layout.
    """

    key: str
    members: dict[str, bytes] = field(default_factory=dict)
    problem: BadSample | None = None


def read_samples(shard: Path) -> Iterator[Sample | BadSample]:
    """Samples in file order, and one ``BadSample`` at the end for what lies behind a break.

    Causes: ``truncated`` (the file ends before the archive does) and ``corrupt-tar``. A sample with
    a name that means code, a link in place of a file or a key used before carries its ``problem``
    (``unsafe-member``, ``duplicate-key``) instead of being merged or left out in silence.
    """
    finished: set[str] = set()
    sample: Sample | None = None
    try:
        with _open(shard) as stream:
            for member in _members(stream, shard):
                key, name = _split_name(member.name) if member is not None else (None, "")
                if sample is not None and (member is None or key not in (None, sample.key)):
                    yield sample
                    finished.add(sample.key)
                    sample = None
                if member is None or key is None:
                    continue
                if sample is None:
                    sample = Sample(key)
                    if key in finished:
                        sample.problem = _duplicate(shard, f"key {key!r} occurs again")
                _add(sample, name, member, shard)
    except BadSample as broken:
        yield broken  # the open sample may have more members behind the break: it is not handed on


def _add(sample: Sample, name: str, member: Member, shard: Path) -> None:
    where = f"{shard}: member {member.name!r}"
    if not name:
        sample.problem = sample.problem or BadSample(
            "foreign-layout", f"{where} has no extension, so it belongs to no sample"
        )
    elif name in sample.members:
        sample.problem = _duplicate(shard, f"member {member.name!r} occurs twice")
    elif not member.plain:
        sample.problem = BadSample("unsafe-member", f"{where} is a link or device, not a file")
    elif reason := unsafe_reason(name, member.data):
        sample.problem = BadSample("unsafe-member", f"{where} {reason}; remove it from the shard")
    sample.members[name] = member.data


def _duplicate(shard: Path, what: str) -> BadSample:
    return BadSample(
        "duplicate-key",
        f"{shard}: {what}; members of one sample must follow one another, and samples must not be "
        "mixed: sort the tar by name, or rename one of them",
    )


def _split_name(path: str) -> tuple[str | None, str]:
    """Key and member name, cut at the file's first dot; no key for hidden or ``__meta__`` files.

    Names of members are in lower case, as webdataset reads them: ``JPG`` is ``jpg``.
    """
    folder, slash, file = path.rpartition("/")
    stem, _, name = file.partition(".")
    if not stem or (stem.startswith("__") and stem.endswith("__")):
        return None, name
    return folder + slash + stem, name.lower()


def _open(shard: Path) -> BinaryIO:
    with open(shard, "rb") as head:
        packed = head.read(2) == b"\x1f\x8b"
    return gzip.open(shard, "rb") if packed else open(shard, "rb")  # type: ignore[return-value]


def _members(stream: BinaryIO, shard: Path) -> Iterator[Member | None]:
    """Files, links and devices in order; ``None`` where an end-of-archive block lies.

    Archives put end to end are read on; anything else behind an end is padding.
    Raises ``BadSample``.
    """
    ended = False
    name: str | None = None  # from an extended header, for the member that follows it
    while True:
        block = _read(stream, _BLOCK, shard)
        if not block.strip(b"\0"):
            if len(block) == _BLOCK and name is None:
                if not ended:
                    yield None
                ended = True
                continue
            if ended:
                return
        if len(block) < _BLOCK:
            raise _truncated(shard)
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
        except tarfile.HeaderError as error:
            if ended:
                return
            raise BadSample(
                "corrupt-tar", f"{shard}: no tar header where one must be ({error}); write it again"
            ) from error
        ended = False
        if header.type in _NAME_RECORDS or header.type in _SKIPPED_RECORDS:
            record = _record(stream, header, shard)
            if header.type in _NAME_RECORDS:
                name = _record_name(header, record, shard) or name
            continue
        plain = header.type in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
        if header.type == tarfile.GNUTYPE_SPARSE or header.size < 0:
            raise BadSample(
                "corrupt-tar",
                f"{shard}: {header.name!r} is sparse or of no size; write it as a plain file",
            )
        data = _payload(stream, header.size, shard) if plain else b""
        if not header.isdir():
            yield Member(name or header.name, data, plain)
        name = None


def _record(stream: BinaryIO, header: tarfile.TarInfo, shard: Path) -> bytes:
    if not 0 <= header.size <= _LONGEST_NAME_RECORD:
        raise BadSample(
            "corrupt-tar",
            f"{shard}: an extended header of {header.size} bytes, which no name needs",
        )
    return _payload(stream, header.size, shard)


def _record_name(header: tarfile.TarInfo, record: bytes, shard: Path) -> str | None:
    """The member name that an extended header gives, if it gives one."""
    if header.type == tarfile.GNUTYPE_LONGNAME:
        return record.rstrip(b"\0").decode("utf-8", "backslashreplace")
    name = None
    while record.strip(b"\0"):  # POSIX records: "<length> <key>=<value>\n"
        digits, _, rest = record.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) < 8 else 0
        if not len(digits) + 2 < length <= len(record):
            raise BadSample("corrupt-tar", f"{shard}: an extended header that cannot be parsed")
        key, _, value = rest[: length - len(digits) - 2].partition(b"=")
        if key == b"path":
            name = value.decode("utf-8", "backslashreplace")
        elif key == b"size" or key.startswith(b"GNU.sparse"):
            raise BadSample(
                "corrupt-tar", f"{shard}: members that are sparse or above 8 GiB are not read"
            )
        record = record[length:]
    return name


def _payload(stream: BinaryIO, size: int, shard: Path) -> bytes:
    """``size`` bytes and the padding to the next block, all of it there."""
    padded = -(-size // _BLOCK) * _BLOCK
    data = _read(stream, padded, shard)
    if len(data) < padded:
        raise _truncated(shard)
    return data[:size]


def _read(stream: BinaryIO, size: int, shard: Path) -> bytes:
    """Up to ``size`` bytes, fewer only at the end of the file; a false size asks for no memory."""
    parts: list[bytes] = []
    try:
        while size > 0 and (part := stream.read(min(size, _CHUNK))):
            parts.append(part)
            size -= len(part)
    except EOFError as error:
        raise _truncated(shard) from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise BadSample("corrupt-tar", f"{shard}: the gzip stream is damaged ({error})") from error
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _truncated(shard: Path) -> BadSample:
    return BadSample(
        "truncated",
        f"{shard}: the file ends before the archive does; its last sample and what followed are "
        "lost: fetch or write the shard again",
    )
