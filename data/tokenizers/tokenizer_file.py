"""The file of a tokenizer of images or speech: safetensors, and what it is in its metadata."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors


def pack(
    file_format: str, kind: str, settings: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> bytes:
    """A tokenizer's file. One metadata entry: several would come out in random order."""
    about = json.dumps({"format": file_format, "kind": kind, "settings": settings}, sort_keys=True)
    return save_tensors(tensors, metadata={"earlyfuse": about})


@dataclass(frozen=True)
class TokenizerFile:
    """A file that was read: ``label`` image or speech, and what its metadata say.

    Raises ``ValueError`` naming the file where it is damaged or something else.
    """

    label: str
    path: Path
    content: bytes
    kind: str
    settings: dict[str, Any]

    @classmethod
    def read(cls, label: str, file_format: str, path: Path) -> "TokenizerFile":
        """Read the file and its metadata, which must state ``file_format``."""
        content = Path(path).read_bytes()
        # the safetensors header: its length in eight bytes, then JSON
        try:
            length = int.from_bytes(content[:8], "little")
            header = json.loads(content[8 : 8 + length])
            about = json.loads(header["__metadata__"]["earlyfuse"])
            if about["format"] != file_format:
                raise KeyError(about["format"])
            return cls(label, path, content, about["kind"], about["settings"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{label} tokenizer ({path}) must be a safetensors file of format {file_format}; "
                "make one with prepare, or name a kind"
            ) from error

    def check_kind(self, known: Iterable[str]) -> None:
        """Refuse a kind that is not ``known``."""
        if self.kind not in known:
            raise ValueError(
                f"{self.label} tokenizer ({self.path}) has kind ({self.kind!r}), known are "
                f"{sorted(known)}"
            )

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors of the file."""
        try:
            return load_tensors(self.content)
        except SafetensorError as error:
            raise ValueError(
                f"{self.label} tokenizer ({self.path}) is damaged or cut short: {error}; copy or "
                "make it again"
            ) from error
