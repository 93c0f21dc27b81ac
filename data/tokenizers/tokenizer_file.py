"""The file of media tokenizers: safetensors with format, kind and settings in its metadata."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from earlyfuse.data.atomic import atomic_write_bytes
from earlyfuse.data.json_files import JsonObject, load_json, shown

LARGEST_SIDE = 1 << 13  # pixels of an image
LARGEST_CODEBOOK = 1 << 20
_REMEDY = "copy the file again, make it with prepare, or name a kind"


class FileTokenizer(ABC):
    """Base of our ``MediaTokenizer`` classes (``data/media.py``): settings, tensors, one file."""

    file_format: str
    kind: str

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self._sha256: str | None = None

    @classmethod
    @abstractmethod
    def from_file(cls, file: "TokenizerFile") -> Self:
        """Inverse of ``to_bytes``."""

    @abstractmethod
    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of its file."""

    def to_bytes(self) -> bytes:
        """The tokenizer's file."""
        about = {"format": self.file_format, "kind": self.kind, "settings": self.settings}
        # one metadata entry: several would come out in random order
        metadata = {"earlyfuse": json.dumps(about, sort_keys=True)}
        return save_tensors(self.tensors(), metadata=metadata)

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        atomic_write_bytes(path, self.to_bytes())

    @property
    def sha256(self) -> str:
        """Hash of the file; set by the loader, as another safetensors may order bytes otherwise."""
        if self._sha256 is None:
            self._sha256 = hashlib.sha256(self.to_bytes()).hexdigest()
        return self._sha256

    @sha256.setter
    def sha256(self, value: str) -> None:
        self._sha256 = value


Loaded = TypeVar("Loaded", bound=FileTokenizer)


def load_tokenizer(label: str, path: Path, kinds: Sequence[type[Loaded]]) -> Loaded:
    """The tokenizer in ``path``, of one of ``kinds``, which share a file format.

    Raises ``ValueError`` naming file and field where it is damaged or something else.
    """
    where = f"{label} tokenizer ({path})"
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{where} cannot be read ({error.strerror}); {_REMEDY}") from error
    about, file_format = _metadata(content, where), kinds[0].file_format
    if about is None or about.values.get("format") != file_format:
        raise ValueError(f"{where} must be a safetensors file of format {file_format}; {_REMEDY}")
    by_kind = {kind.kind: kind for kind in kinds}
    kind = by_kind[about.field("kind", str, choices=sorted(by_kind))]
    file = TokenizerFile(where, content, about.object("settings"))
    try:
        tokenizer = kind.from_file(file)
    except ValueError as error:
        raise error if str(path) in str(error) else ValueError(f"{where} {error}") from error
    tokenizer.sha256 = hashlib.sha256(content).hexdigest()
    return tokenizer


@dataclass(frozen=True)
class TokenizerFile:
    """The content of a file and its settings; ``where`` names it in errors."""

    where: str
    content: bytes
    settings: JsonObject

    def tensors(self, expected: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The file's tensors. ``ValueError`` unless they are those ``expected``."""
        try:
            tensors = load_tensors(self.content)
        except SafetensorError as error:
            what = f"{self.where} is damaged or truncated: {error}; {_REMEDY}"
            raise ValueError(what) from error
        check_tensors(self.where, tensors, expected)
        return tensors


def check_tensors(
    where: str, tensors: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> None:
    """``ValueError`` with ``where`` unless ``tensors`` are finite and have the names, shapes and
    dtypes of ``expected``.
    """

    def wrong(what: str) -> ValueError:
        return ValueError(f"{where} {what}; {_REMEDY}")

    if odd := sorted(tensors.keys() ^ expected.keys()):
        what = "lacks the tensor" if odd[0] in expected else "holds the unknown tensor"
        raise wrong(f"{what} {shown(odd[0])} for its settings")
    for name, tensor in tensors.items():
        found, wanted = _type_of(tensor), _type_of(expected[name])
        if found != wanted:
            raise wrong(f"tensor {name} ({found}) must be {wanted} for its settings")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise wrong(f"tensor {name} holds values that are not finite")


def check_codes(option: str, codes: int) -> None:
    """``ValueError`` unless ``codes`` is a possible size of a codebook."""
    if not 2 <= codes <= LARGEST_CODEBOOK:
        raise ValueError(
            f"{option} ({codes}) must lie in [2, {LARGEST_CODEBOOK}]; choose another number"
        )


def code_usage(counts: np.ndarray) -> tuple[int, float]:
    """(codes that occur, perplexity) from the number of occurrences of each code."""
    shares = counts[counts > 0] / max(1, counts.sum())
    return len(shares), float(np.exp(-np.sum(shares * np.log(shares))))


def _metadata(content: bytes, where: str) -> JsonObject | None:
    """Our entry of the safetensors header; None where there is no such thing."""
    length = int.from_bytes(content[:8], "little")  # the header: its length, then JSON
    try:
        header = load_json(content[8 : 8 + length], where, _REMEDY)
        about = load_json(header["__metadata__"]["earlyfuse"], where, _REMEDY)
        return JsonObject.of(about, where, _REMEDY)
    except (ValueError, KeyError, TypeError):
        return None


def _type_of(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
