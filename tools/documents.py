"""Converts documents between files of a user and tokens of a model.

A document is a list of segments: ``{"text": …}``, or ``{"image": path}`` and so on for each medium,
or ``{"frames": [path, …]}``, the images of a video.
The tokenizers must be those that the model was trained with: its checkpoint has their hashes.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch

from earlyfuse.data.atomic import atomic_write_bytes
from earlyfuse.data.documents import BadSample
from earlyfuse.data.json_files import MOST_BYTES, load_json, read_json, shown
from earlyfuse.data.media import MEDIA, medium_of
from earlyfuse.data.tokenizers import TEXT_FILES, Tokenizers, text_file
from earlyfuse.data.tokenizers.animation import MOST_FRAMES
from earlyfuse.models.generate.constrained import Prompt
from earlyfuse.models.state_dicts.config_json import CONFIG, FORMAT, TOKENIZERS
from earlyfuse.models.vocabulary import Modality, Vocabulary
from earlyfuse.parallel.checkpoint.file_layout import (
    checkpoints_of,
    is_run,
    latest_checkpoint,
    run_of,
)
from earlyfuse.parallel.checkpoint.files.dcp_metadata import METADATA
from earlyfuse.parallel.checkpoint.files.dcp_reader import DcpReader
from earlyfuse.parallel.checkpoint.identity import data_identity
from earlyfuse.parallel.reporting.run_folder import read_config

Segment = dict[str, str | list[str]]
FRAMES = "frames"
_REMEDY = "copy it again"


@dataclass(frozen=True)
class ModelFolder:
    """Training data of the model in a run, checkpoint or exported folder.

    ``seq_len``: positions of the training rows, and ``data``, the folder of the data: None without
    a run. ``hashes``: those of the tokenizers that the model was trained with, {} if unknown.
    """

    folder: Path
    seq_len: int | None
    data: Path | None
    hashes: dict[str, str]

    @classmethod
    def read(cls, folder: Path) -> "ModelFolder":
        """Reads ``folder``; of a checkpoint, also its run."""
        is_checkpoint = (folder / METADATA).exists()
        run_folder = run_of(folder) if is_checkpoint else folder
        if not is_run(run_folder):
            return cls(folder, None, None, _recorded_hashes(folder))
        config = read_config(run_folder)
        checkpoint = folder if is_checkpoint else latest_checkpoint(checkpoints_of(folder))
        seq_len = config.object("training").field("seq_len", int, least=1)
        data = Path(config.object("data").field("folder", str))
        return cls(folder, seq_len, data, _recorded_hashes(checkpoint))

    def tokenizers(self, vocabulary: Vocabulary, given: Path | None) -> Tokenizers:
        """Loads the model's tokenizers: ``given``, else beside it, else in the data of its run.

        ``ValueError`` if there are none, or they are not those that the model was trained with.
        """
        places = [given] if given is not None else [self.folder / TOKENIZERS]
        if given is None and self.data is not None:
            places.append(self.data / TOKENIZERS)
        found = [place for place in places if text_file(place).is_file()]
        if not found:
            raise ValueError(
                f"no tokenizers ({' or '.join(TEXT_FILES)}) in {' or '.join(map(str, places))}; "
                "give the folder of the model's tokenizers with --tokenizers, and convert a public "
                "model first: that imports its own"
            )
        tokenizers = Tokenizers.load(found[0])
        for kind in sorted(self.hashes.keys() | tokenizers.hashes.keys() if self.hashes else ()):
            here, trained = tokenizers.hashes.get(kind), self.hashes.get(kind)
            if here != trained:
                raise ValueError(
                    f"the {kind} tokenizer in {found[0]} ({here}) is not the one that the model "
                    f"was trained with ({trained}); give the folder that has it with --tokenizers"
                )
        theirs = asdict(tokenizers.vocabulary)
        for name, value in asdict(vocabulary).items():
            if theirs[name] != value:
                raise ValueError(
                    f"the vocabulary of the tokenizers in {found[0]} is not the model's: {name} is "
                    f"{shown(theirs[name])} instead of {shown(value)}; give the folder of the "
                    "model's tokenizers with --tokenizers"
                )
        return tokenizers


def _recorded_hashes(checkpoint: Path) -> dict[str, str]:
    """Reads modality label → SHA-256 of the tokenizers from a checkpoint or exported folder."""
    if (checkpoint / CONFIG).is_file():
        config = read_json(checkpoint / CONFIG, _REMEDY)
        if config.values.get("format") != FORMAT:
            return {}
        about = config.object("source")
    elif (checkpoint / METADATA).is_file():
        about = data_identity(DcpReader(checkpoint))
    else:
        return {}
    recorded = about.object("tokenizers", default={})
    return {label: recorded.field(label, str) for label in recorded.values}


# ---------------------------------------------------------------- prompts


def read_prompts(path: Path) -> list[list[Segment]]:
    """Reads one JSON list of segments per line; paths of media are relative to the file."""
    documents = []
    with open(path, "rb") as file:
        encoded = file.read(MOST_BYTES + 1)
    if len(encoded) > MOST_BYTES:
        raise ValueError(f"{path} is larger than {MOST_BYTES:,} bytes; split it")
    try:
        content = encoded.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8: {error}; save it as UTF-8") from error
    # not splitlines: it would also split at U+2028, which JSON texts may contain
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            documents.append(_segments(line, f"{path}, line {number}", path.parent))
    if not documents:
        raise ValueError(f"{path} holds no prompts; write one JSON list of segments per line")
    return documents


def _segments(line: str, where: str, folder: Path) -> list[Segment]:
    """Parses a line of prompts; paths of media are relative to ``folder``."""
    segments = load_json(line, where, "correct that line")
    right = isinstance(segments, list) and all(
        isinstance(s, dict)
        and len(s) == 1
        and s.keys() <= {"text", *MEDIA, FRAMES}
        and all(map(_is_value, s, s.values()))
        for s in segments
    )
    if not right:
        raise ValueError(
            f'{where} must be a list of {{"text": …}}'
            + "".join(f' and {{"{label}": path}}' for label in MEDIA)
            + f' and {{"{FRAMES}": [path, …]}}'
            + f", not {shown(segments)}; correct that line"
        )
    return [
        {
            kind: [str(folder / path) for path in value]
            if kind == FRAMES
            else value
            if kind == "text"
            else str(folder / value)
        }
        for segment in segments
        for kind, value in segment.items()
    ]


def _is_value(kind: str, value: object) -> bool:
    if kind != FRAMES:
        return isinstance(value, str)
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value)


def to_prompt(segments: Sequence[Segment], tokenizers: Tokenizers) -> Prompt:
    """Tokenises begin-of-document and the segments, as in training data."""
    tokens, vectors = [tokenizers.vocabulary.bos], []
    for segment in segments:
        ((kind, value),) = segment.items()
        if kind == "text":
            tokens += tokenizers.text.encode(str(value))
            continue
        label = "image" if kind == FRAMES else kind
        paths = value if isinstance(value, list) else [value]
        _check_medium(label, paths[0], tokenizers)
        if len(paths) > MOST_FRAMES:
            raise ValueError(f"frames ({len(paths)}) must be at most {MOST_FRAMES}; give fewer")
        items = [_features(label, path, tokenizers) for path in paths]
        block, found_nP = tokenizers.block_of(label, *items)
        tokens += block
        vectors += [] if found_nP is None else [torch.from_numpy(found_nP)]
    return Prompt(tokens, torch.cat(vectors) if vectors else None)


def _check_medium(kind: str, path: str, tokenizers: Tokenizers) -> None:
    known = [m.label for m in tokenizers.vocabulary.modalities if m.label in tokenizers.hashes]
    if kind not in known:
        trained = "text alone" if known == ["text"] else " and ".join(known)
        raise ValueError(
            f"{kind} {path} cannot be read: the model was trained on {trained} and "
            f"has no {kind} tokenizer; give {' and '.join(known)} only"
        )


def _features(kind: str, path: str, tokenizers: Tokenizers) -> np.ndarray:
    """Reads what the tokenizer of a medium encodes from a file."""
    try:
        return tokenizers.media[kind].features(Path(path).read_bytes())
    except (OSError, BadSample) as error:
        raise ValueError(f"{kind} {path} cannot be read: {error}") from error


# ---------------------------------------------------------------- results


def to_segments(
    tokens: Sequence[int],
    tokenizers: Tokenizers,
    folder: Path,
    stem: str,
    vectors: torch.Tensor | None = None,
) -> list[Segment]:
    """Decodes generated tokens, and ``vectors`` of their placeholders; media are written to
    ``folder``/``stem``-0.png, -1.wav …, each frame of a video to a file of its own.
    """
    vocabulary = tokenizers.vocabulary
    tokens = [token for token in tokens if token not in (vocabulary.bos, vocabulary.eos)]
    modality_T = vocabulary.modality_of(torch.tensor(tokens, dtype=torch.int64)).tolist()
    separators = {medium.separator for medium in vocabulary.media}
    segments: list[Segment] = []
    media = used = 0
    continues = False
    for modality, run in groupby(zip(modality_T, tokens, strict=True), key=lambda pair: pair[0]):
        ids = [token for _, token in run]
        if modality == Modality.TEXT:
            continues = ids[-1] in separators
            # begin and end of media decode to nothing
            text = tokenizers.text.decode([token for token in ids if token not in separators])
            segments += [{"text": text}] if text else []
            continue
        medium = medium_of(modality)
        codes = np.array(ids) - vocabulary.medium(medium.modality).start
        if vectors is not None and vocabulary.medium(medium.modality).continuous:
            codes, used = vectors[used : used + len(ids)].numpy(), used + len(ids)
        name = f"{stem}-{media}.{medium.written}"
        atomic_write_bytes(folder / name, tokenizers.media[medium.label].to_file(codes))
        media += 1
        if continues:  # the segment before is its first frames, if the prompt has not
            (earlier,) = segments.pop().values() if segments else ([],)
            frames = earlier if isinstance(earlier, list) else [earlier]
            segments.append({FRAMES: [*frames, name]})
        else:
            segments.append({medium.label: name})
    return segments
