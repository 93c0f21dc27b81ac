"""Members of a tar, one header at a time: v7, ustar, GNU and pax archives, also concatenated.

Header blocks are parsed by ``tarfile``; its reader is not used because it does not distinguish a
truncated header, a file that ends between members, and a proper end of archive. Headers that
describe the next member (long names, pax records, sparse maps) are applied to it. A member that
cannot be used has a ``problem`` and is skipped by its size; ``BrokenArchive`` is raised only where
the position of the next header is lost.
"""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field

from earlyfuse.data.documents import BadSample
from earlyfuse.data.raw.archive_stream import ArchiveStream, BrokenArchive

_BLOCK = 512
_MOST_EXTENDED = 16 << 20  # bytes of a pax header or long name; real ones reach some 100 KB
# zeros behind an archive: tapes pad to a MiB; a preallocated, unfinished download has more
_MOST_PADDING = 2 << 20
_EXTENDED = (
    *(tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)
_PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_LINKS = (*(tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE),)
# directories, also with GNU's list of their files; volume labels
_NO_MEMBERS = (tarfile.DIRTYPE, b"D", b"V")


@dataclass(frozen=True)
class Member:
    """One entry, whose ``size`` bytes are next in the stream; those that are not read are skipped.

    ``name`` is none where the header that states it cannot be read. ``problem``: why the member
    must not be used.
    """

    name: str | None
    size: int
    problem: BadSample | None = None


def read_members(stream: ArchiveStream) -> Iterator[Member | None]:
    """Files, links and devices in order; ``None`` at an end-of-archive block.

    Concatenated archives are read on; anything else behind an end is padding, unless a header
    follows in it. Raises ``BrokenArchive``.
    """
    global_records: dict[str, str] = {}
    extension = _Extension()
    ended_at: int | None = None
    while True:
        at = stream.offset
        block = stream.read(_BLOCK)
        if len(block) < _BLOCK:
            if ended_at is None:
                raise _truncated(stream)
            return
        if not extension.found and not block.strip(b"\0"):
            if ended_at is None:
                yield None
                ended_at = at
            elif at - ended_at > _MOST_PADDING:
                what = f"nothing but zeros follow byte {ended_at:,}, far past padding"
                raise BrokenArchive("truncated", what)
            continue
        header = _parsed(block)
        if isinstance(header, tarfile.HeaderError):
            if ended_at is None or _header_follows(stream):
                what = f"there is no tar header at byte {at:,} ({header})"
                raise BrokenArchive("corrupt-tar", what)
            return
        ended_at = None
        if header.type == tarfile.XGLTYPE:  # an archive may end behind a global header
            _read_extension(header, stream, global_records, extension)
        elif header.type in _EXTENDED:
            extension.found = True
            _read_extension(header, stream, extension.records, extension)
        else:
            if header.type == tarfile.GNUTYPE_SPARSE:
                _skip_sparse_map(block, stream)
            extension.records = global_records | extension.records
            yield from _member(header, extension, stream)
            extension = _Extension()


@dataclass
class _Extension:
    """Fields of the headers before a member."""

    records: dict[str, str] = field(default_factory=dict)
    long_name: str = ""
    unreadable: str = ""  # what could not be read in them
    found: bool = False


def _parsed(block: bytes) -> tarfile.TarInfo | tarfile.HeaderError:
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
    except tarfile.HeaderError as error:
        return error
    return header if header.size >= 0 else tarfile.HeaderError("negative size")


def _header_follows(stream: ArchiveStream) -> bool:
    """True if the archive continues behind this block, which then was a header, now damaged."""
    while len(block := stream.read(_BLOCK)) == _BLOCK:
        if block[257:262] == b"ustar" and isinstance(_parsed(block), tarfile.TarInfo):
            return True
    return False


def _member(
    header: tarfile.TarInfo, extension: _Extension, stream: ArchiveStream
) -> Iterator[Member]:
    """Yield the member that ``header`` begins, none for directories, and skip its data."""
    records = extension.records
    sparse = header.type == tarfile.GNUTYPE_SPARSE
    sparse = sparse or any(name.startswith("GNU.sparse.") for name in records)
    name: str | None = (
        records.get("GNU.sparse.name") or records.get("path") or extension.long_name or header.name
    )
    size, unreadable = header.size, extension.unreadable
    if digits := records.get("size"):
        if digits.isascii() and digits.isdigit() and len(digits) < 20:
            size = int(digits)
        else:
            unreadable = f"a pax size of {digits[:20]!r}"
    holds_data = header.type not in tarfile.SUPPORTED_TYPES or header.isreg()
    end = _end_of_data(stream, size if holds_data else 0)
    if stream.size is not None and end > stream.size:
        early = _truncated(stream)
        yield Member(name, 0, BadSample(early.cause, str(early)))  # ends the sample before it
        raise early
    if header.type not in _NO_MEMBERS:
        problem = _problem(header.type, sparse, name, unreadable)
        yield Member(None if unreadable else name, size if holds_data else 0, problem)
    stream.skip(end - stream.offset)
    if stream.offset < end:
        raise _truncated(stream)


def _problem(kind: bytes, sparse: bool, name: str | None, unreadable: str) -> BadSample | None:
    if unreadable:
        return BadSample("corrupt-header", f"the headers before member {name!r} hold {unreadable}")
    if kind in _LINKS:
        return BadSample("unsafe-member", f"member {name!r} is a link or device, not a file")
    if kind in _PLAIN and not sparse:
        return None
    what = f"of tar type {kind!r}"
    if sparse or kind == b"M":
        what = "sparse" if sparse else "a part of a file of several volumes"
    return BadSample("unsupported-member", f"member {name!r} is {what}; write it as a plain file")


def _skip_sparse_map(block: bytes, stream: ArchiveStream) -> None:
    """Skip the blocks that continue the map of an old GNU sparse header (``block``)."""
    more = block[482]
    while more:
        block = stream.read(_BLOCK)
        if len(block) < _BLOCK:
            raise _truncated(stream)
        more = block[504]


def _read_extension(
    header: tarfile.TarInfo, stream: ArchiveStream, records: dict[str, str], extension: _Extension
) -> None:
    """Add an extended header, whose content is next in the stream, to ``records`` or a name."""
    end = _end_of_data(stream, header.size)
    if stream.size is not None and end > stream.size:
        raise _truncated(stream)
    if header.size > _MOST_EXTENDED:
        extension.unreadable = f"{header.size:,} bytes of pax records or name, above 16 MiB"
    else:
        content = stream.read(header.size)
        if len(content) < header.size:
            raise _truncated(stream)
        if header.type == tarfile.GNUTYPE_LONGNAME:
            extension.long_name = _text(content.split(b"\0", 1)[0])
        elif header.type != tarfile.GNUTYPE_LONGLINK:
            try:
                records.update(_pax_records(content))
            except ValueError:
                extension.unreadable = "pax records that cannot be parsed"
    stream.skip(end - stream.offset)


def _pax_records(content: bytes) -> dict[str, str]:
    """Parse ``<length> <key>=<value>\\n`` records that place a member: path, size, sparse map.

    An empty value revokes that of a global header. Raises ``ValueError``.
    """
    records: dict[str, str] = {}
    at = 0
    while at < len(content) and content[at] != 0:
        space = content.index(b" ", at, at + 20)
        digits = content[at:space]
        length = int(digits) if digits.isdigit() else 0
        end = at + length
        if not space + 2 < end <= len(content) or content[end - 1] != 0x0A:
            raise ValueError("a record of another length than it states")
        equals = content.index(b"=", space, end)
        key = content[space + 1 : equals]
        if key in (b"path", b"size") or key.startswith(b"GNU.sparse."):
            records[_text(key)] = _text(content[equals + 1 : end - 1])
        at = end
    return records


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")


def _end_of_data(stream: ArchiveStream, size: int) -> int:
    """Offset of the block behind ``size`` bytes that are next in the stream."""
    return stream.offset - (-size // _BLOCK) * _BLOCK


def _truncated(stream: ArchiveStream) -> BrokenArchive:
    at = stream.offset if stream.size is None else stream.size
    return BrokenArchive("truncated", f"it ends at byte {at:,}, before its archive does")
