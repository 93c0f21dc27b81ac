"""Members of a tar, one header at a time: v7, ustar, GNU and pax archives, also end to end.

Header blocks are parsed by ``tarfile``; its reader is not used because it takes a truncated header,
an end at a member's boundary and a proper end for the same thing. What precedes a member (long
names, pax records, sparse maps) is applied to it. A member that cannot be used has a ``problem``
and is passed over by its size; ``BrokenArchive`` is left for what loses the place in the file.
"""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field

from earlyfuse.data.documents import BadSample
from earlyfuse.data.raw.archive_stream import ArchiveStream, BrokenArchive

_BLOCK = 512
_MOST_EXTENDED = 16 << 20  # bytes of a pax header or long name; real ones reach some 100 KB
# zeros behind an archive: tapes pad to a MiB, a download that never came to the end has more
_MOST_PADDING = 2 << 20
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_EXTENDED = (*_PAX, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_LINKS = (*(tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE),)
# directories, with GNU's list of their files; volume labels
_NO_MEMBERS = (tarfile.DIRTYPE, b"D", b"V")


@dataclass(frozen=True)
class Member:
    """One entry, its ``size`` bytes next in the stream; what is not read of them is skipped.

    ``name`` is none where the header that states it cannot be read. ``problem``: why the member
    must not be used.
    """

    name: str | None
    size: int
    problem: BadSample | None = None


@dataclass
class _Extension:
    """What the headers before a member state about it."""

    records: dict[str, str] = field(default_factory=dict)
    long_name: str = ""
    unreadable: str = ""  # why one of them gave nothing
    found: bool = False


def read_members(stream: ArchiveStream) -> Iterator[Member | None]:
    """Files, links and devices in order; ``None`` where an end-of-archive block lies.

    Archives put end to end are read on; what else is behind an end is padding, unless a header
    follows in it. Raises ``BrokenArchive``.
    """
    everywhere: dict[str, str] = {}  # records of global pax headers
    extension = _Extension()
    ended_at: int | None = None
    while True:
        at = stream.offset
        block = stream.read(_BLOCK)
        if len(block) < _BLOCK:
            if ended_at is None:
                raise _ends_early(stream)
            return
        if not extension.found and not block.strip(b"\0"):
            if ended_at is None:
                yield None
                ended_at = at
            elif at - ended_at > _MOST_PADDING:
                raise BrokenArchive(
                    "truncated", f"nothing but zeros follow byte {ended_at:,}, far past padding"
                )
            continue
        header = _parsed(block)
        if isinstance(header, tarfile.HeaderError):
            if ended_at is None or _header_follows(stream):
                raise BrokenArchive(
                    "corrupt-tar", f"there is no tar header at byte {at:,} ({header})"
                )
            return
        ended_at = None
        if header.type in _EXTENDED:
            _extend(extension, everywhere, header, stream)
            continue
        yield from _member(header, block, extension, everywhere, stream)
        extension = _Extension()


def _parsed(block: bytes) -> tarfile.TarInfo | tarfile.HeaderError:
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
    except tarfile.HeaderError as error:
        return error
    return header if header.size >= 0 else tarfile.HeaderError("negative size")


def _header_follows(stream: ArchiveStream) -> bool:
    """Whether an archive goes on behind this block: then it was a header, now damaged."""
    while len(block := stream.read(_BLOCK)) == _BLOCK:
        if block[257:262] == b"ustar" and isinstance(_parsed(block), tarfile.TarInfo):
            return True
    return False


def _member(
    header: tarfile.TarInfo,
    block: bytes,
    extension: _Extension,
    everywhere: dict[str, str],
    stream: ArchiveStream,
) -> Iterator[Member]:
    """The member that ``header`` begins, then the way past its data; none for directories."""
    records = {**everywhere, **extension.records}
    sparse = header.type == tarfile.GNUTYPE_SPARSE
    if sparse:
        _skip_sparse_map(block, stream)
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
    size = size if holds_data else 0
    end = stream.offset - (-size // _BLOCK) * _BLOCK
    if stream.size is not None and end > stream.size:
        early = _ends_early(stream)
        yield Member(name, 0, BadSample(early.cause, str(early)))  # ends the sample before it
        raise early
    if header.type not in _NO_MEMBERS:
        problem = _problem(header.type, sparse, name, unreadable)
        yield Member(None if unreadable else name, size, problem)
    stream.skip(end - stream.offset)
    if stream.offset < end:
        raise _ends_early(stream)


def _problem(kind: bytes, sparse: bool, name: str | None, unreadable: str) -> BadSample | None:
    if unreadable:
        return BadSample("corrupt-header", f"the headers before member {name!r} hold {unreadable}")
    if sparse:
        return BadSample(
            "unsupported-member", f"member {name!r} is sparse; write it as a plain file"
        )
    if kind in _LINKS:
        return BadSample("unsafe-member", f"member {name!r} is a link or device, not a file")
    if kind not in _PLAIN:
        what = "a part of a file of several volumes" if kind == b"M" else f"of tar type {kind!r}"
        return BadSample("unsupported-member", f"member {name!r} is {what}, not a plain file")
    return None


def _skip_sparse_map(block: bytes, stream: ArchiveStream) -> None:
    """Pass over what an old GNU sparse header (``block``) has no room for."""
    more = block[482]
    while more:
        block = stream.read(_BLOCK)
        if len(block) < _BLOCK:
            raise _ends_early(stream)
        more = block[504]


def _extend(
    extension: _Extension,
    everywhere: dict[str, str],
    header: tarfile.TarInfo,
    stream: ArchiveStream,
) -> None:
    """Take up an extended header, whose content is next in the stream."""
    records = everywhere if header.type == tarfile.XGLTYPE else extension.records
    extension.found |= header.type != tarfile.XGLTYPE  # an archive may end behind a global one
    end = stream.offset - (-header.size // _BLOCK) * _BLOCK
    if stream.size is not None and end > stream.size:
        raise _ends_early(stream)
    if header.size > _MOST_EXTENDED:
        extension.unreadable = f"{header.size:,} bytes of pax records or name, above 16 MiB"
    else:
        content = stream.read(header.size)
        if len(content) < header.size:
            raise _ends_early(stream)
        if header.type == tarfile.GNUTYPE_LONGNAME:
            extension.long_name = _text(content.split(b"\0", 1)[0])
        elif header.type != tarfile.GNUTYPE_LONGLINK:
            try:
                records = _pax_records(content)
            except ValueError:
                extension.unreadable = "pax records that cannot be parsed"
            else:
                (everywhere if header.type == tarfile.XGLTYPE else extension.records).update(
                    records
                )
    stream.skip(end - stream.offset)


def _pax_records(content: bytes) -> dict[str, str]:
    """``<length> <key>=<value>\\n``, those that place a member: its path, size and sparse map.

    An empty value takes back what a global header said. Raises ``ValueError``.
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


def _ends_early(stream: ArchiveStream) -> BrokenArchive:
    at = stream.offset if stream.size is None else stream.size
    return BrokenArchive("truncated", f"it ends at byte {at:,}, before its archive does")
