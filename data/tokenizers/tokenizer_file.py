"""The file of a media tokenizer: safetensors, with format, kind and settings in its metadata."""

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from earlyfuse.data.json_files import JsonObject, load_json, shown

LARGEST_SIDE = 1 << 13  # pixels of an image
_REMEDY = "copy the file again, make it with prepare, or name a kind"


def pack(
    file_format: str, kind: str, settings: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> bytes:
    """A tokenizer's file. One metadata entry: several would come out in random order."""
    about = json.dumps({"format": file_format, "kind": kind, "settings": settings}, sort_keys=True)
    return save_tensors(tensors, metadata={"earlyfuse": about})


class _Hashed(Protocol):
    sha256: str


Loaded = TypeVar("Loaded", bound=_Hashed)


def load_tokenizer(
    label: str,
    file_format: str,
    path: Path,
    kinds: "Mapping[str, Callable[[TokenizerFile], Loaded]]",
) -> Loaded:
    """The tokenizer in ``path``, made by the function of its kind.

    ``sha256`` is that of the file: a newer writer of safetensors may order bytes differently.
    Raises ``ValueError`` naming file and field where it is damaged or something else.
    """
    file = TokenizerFile.read(label, file_format, path, kinds)
    try:
        tokenizer = kinds[file.kind](file)
    except ValueError as error:
        raise file.refusal(error) from error
    tokenizer.sha256 = hashlib.sha256(file.content).hexdigest()
    return tokenizer


@dataclass(frozen=True)
class TokenizerFile:
    """A file that was read: the medium's ``label``, and what its metadata say.

    Raises ``ValueError`` naming file and field where it is damaged or something else.
    """

    label: str
    path: Path
    content: bytes
    kind: str
    settings: JsonObject

    @classmethod
    def read(
        cls, label: str, file_format: str, path: Path, kinds: Collection[str]
    ) -> "TokenizerFile":
        """Read the file and its metadata, which must state ``file_format`` and one of ``kinds``."""
        where = f"{label} tokenizer ({path})"
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise ValueError(f"{where} cannot be read ({error.strerror}); {_REMEDY}") from error
        about = _metadata(content, where)
        if about is None or about.values.get("format") != file_format:
            raise ValueError(
                f"{where} must be a safetensors file of format {file_format}; {_REMEDY}"
            )
        kind = about.field("kind", str, choices=sorted(kinds))
        return cls(label, path, content, kind, about.object("settings"))

    def tensors(self, expected: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The file's tensors, which have the names, shapes and dtypes of ``expected``; finite."""
        try:
            tensors = load_tensors(self.content)
        except SafetensorError as error:
            raise self.refusal(f"is damaged or cut short: {error}; {_REMEDY}") from error
        if odd := sorted(tensors.keys() ^ expected.keys()):
            what = "lacks the tensor" if odd[0] in expected else "holds the unknown tensor"
            raise self.refusal(f"{what} {shown(odd[0])} for its settings; {_REMEDY}")
        for name, tensor in tensors.items():
            wanted = expected[name]
            if (tensor.shape, tensor.dtype) != (wanted.shape, wanted.dtype):
                raise self.refusal(
                    f"tensor {name} ({_type_of(tensor)}) must be {_type_of(wanted)} for its "
                    f"settings; {_REMEDY}"
                )
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise self.refusal(f"tensor {name} holds values that are not finite; {_REMEDY}")
        return tensors

    def refusal(self, what: object) -> ValueError:
        """An error that names the file, which ``what`` may do already."""
        named = str(self.path) in str(what)
        return ValueError(what if named else f"{self.label} tokenizer ({self.path}) {what}")


def _metadata(content: bytes, where: str) -> JsonObject | None:
    """Our entry of the safetensors header; none where there is no such thing."""
    length = int.from_bytes(content[:8], "little")  # the header: its length, then JSON
    try:
        header = load_json(content[8 : 8 + length], where, _REMEDY)
        about = load_json(header["__metadata__"]["earlyfuse"], where, _REMEDY)
        return JsonObject.of(about, where, _REMEDY)
    except (ValueError, KeyError, TypeError):
        return None


def _type_of(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
