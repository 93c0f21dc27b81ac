"""Archives of ``torch.save``, parsed as data and checked before they are trusted.

``torch.load`` with ``weights_only`` runs no code, but creates objects of any size that a file asks
for, decompresses, and trusts lengths. An archive is a zip file with ``data.pkl`` (the values, see
``plain_pickle``) and one file for the bytes of each tensor.
"""

import math
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

import torch

from earlyfuse.parallel.checkpoint.files.plain_pickle import Made, Named, Stored, parse, plain

_MOST_PICKLE = 64 << 20  # bytes of data.pkl
_BUFFER = 1 << 20
_TENSOR = Named("torch._utils", "_rebuild_tensor_v2")
_STORAGES = {
    Named("torch", f"{name}Storage"): dtype
    for name, dtype in {
        "Double": torch.float64,
        "Float": torch.float32,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
    }.items()
}
_TENSOR_NAMES = {
    *(_TENSOR, *_STORAGES),
    *(Named("torch._utils", f"_rebuild_{name}") for name in ("tensor_v3", "parameter")),
    *(Named("torch", name) for name in ("Size", "device")),
    Named("torch.storage", "UntypedStorage"),
    Named("collections", "OrderedDict"),
}


def read_value(file: IO[bytes]) -> Any:
    """Returns the plain value (numbers, text, lists, dicts) in an archive; else ``ValueError``."""
    with _opened(file, lambda named: False) as archive:
        return plain(archive.root)


def read_tensor(file: IO[bytes]) -> torch.Tensor:
    """Returns the only tensor in an archive, on the CPU; else ``ValueError``."""
    with _opened(file, _is_tensor_name) as archive:
        root = archive.root
        if not isinstance(root, Made) or root.of != _TENSOR or len(root.arguments) < 4:
            raise ValueError("it is no tensor")
        stored, offset, size, stride = root.arguments[:4]
        key = stored.key if isinstance(stored, Stored) else None
        if not isinstance(key, tuple) or len(key) != 5 or not isinstance(key[1], Named):
            raise ValueError("it is a tensor without values")
        _, storage, name, _, length = key
        if storage not in _STORAGES:
            raise ValueError(f"its values are of {storage.module}.{storage.name}")
        _check_region(offset, size, stride, length)
        dtype = _STORAGES[storage]
        content = archive.content(f"data/{name}", length * dtype.itemsize)
        if not length:
            return torch.empty(size, dtype=dtype)
        return torch.frombuffer(content, dtype=dtype).as_strided(size, stride, offset)


def check_tensors_only(file: IO[bytes]) -> None:
    """``ForeignName`` if an archive names anything but tensors and their parts; ``ValueError`` if
    it is damaged.
    """
    with _opened(file, _is_tensor_name):
        pass


def dtype_named(named: Named) -> torch.dtype | None:
    """Returns the torch dtype called ``named``; None for another name."""
    found = vars(torch).get(named.name) if named.module == "torch" else None
    return found if isinstance(found, torch.dtype) else None


def _is_tensor_name(named: Named) -> bool:
    return named in _TENSOR_NAMES or dtype_named(named) is not None


class _Archive:
    """A zip file of ``torch.save``; ``root``: its pickle, parsed."""

    def __init__(self, archive: zipfile.ZipFile, known: Callable[[Named], bool]):
        self.zip = archive
        members = archive.infolist()
        self.members = {member.filename.partition("/")[2]: member for member in members}
        if len(self.members) != len(members):
            raise ValueError("it has a file twice")
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("it is compressed, which torch.save never does")
        self.root = parse(bytes(self.content("data.pkl", _MOST_PICKLE, exactly=False)), known)

    def content(self, name: str, size: int, exactly: bool = True) -> bytearray:
        """Returns a file of the archive of (at most) ``size`` bytes; verifies its checksum."""
        member = self.members.get(name)
        if member is None:
            raise ValueError(f"it has no {name}")
        if member.file_size > size or (exactly and member.file_size != size):
            raise ValueError(f"its {name} has {member.file_size} bytes instead of {size}")
        content = bytearray(member.file_size)
        view = memoryview(content)
        with self.zip.open(member) as file:
            for begin in range(0, len(content), _BUFFER):
                read = file.read(min(_BUFFER, len(content) - begin))
                view[begin : begin + _BUFFER] = read
            if file.read(1):  # the end of the file, where zipfile compares the checksum
                raise ValueError(f"its {name} is longer than it says")
        return content


@contextmanager
def _opened(file: IO[bytes], known: Callable[[Named], bool]) -> Iterator[_Archive]:
    try:
        with zipfile.ZipFile(file) as archive:
            yield _Archive(archive, known)
    except (zipfile.BadZipFile, NotImplementedError, EOFError, RuntimeError) as error:
        raise ValueError(f"it is no archive of torch.save, or damaged ({error})") from error


def _check_region(offset: Any, size: Any, stride: Any, length: Any) -> None:
    """``ValueError`` unless a strided region lies within ``length`` values."""
    tuples = isinstance(size, tuple) and isinstance(stride, tuple)
    same_length = tuples and len(size) == len(stride) <= 16
    numbers = (offset, length, *size, *stride) if same_length else ()
    if not numbers or not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
        raise ValueError("it has no valid shape")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) and last >= length:
        raise ValueError("some of its values are missing")
