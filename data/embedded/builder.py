"""Builds the embedded corpus: its documents, and its folder, whole or not at all."""

import json
import platform
import random
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import soundfile
from tqdm import tqdm

from earlyfuse.data.embedded import clips, compose, digits, glyphs, prose, speech
from earlyfuse.data.embedded.compose import Parts
from earlyfuse.data.embedded.shards import write_shards
from earlyfuse.data.embedded.tasks import clip_task, labelled, prompts, spoken_task, tasks
from earlyfuse.data.json_files import read_json, shown

FORMAT = "earlyfuse-corpus/1"
CORPUS_FILE = "corpus.json"  # identifies a folder as a corpus
SOURCES = ("text", "glyphs", "digits", "interleaved")
SPEECH, CLIPS = "speech", "clips"
EXTRAS = (SPEECH, CLIPS)  # sources of corpora of their own
SPLITS = ("train", "validation")

_SAMPLES_PER_SHARD = 2500
_DIGIT_PASSES = {"train": 3, "validation": 1}
_FACES = {"train": glyphs.TRAIN_FACES, "validation": glyphs.HELD_OUT_FACES}
_INTERLEAVED = {"train": 3000, "validation": 300}
_SPOKEN = {"train": 4000, "validation": 300}
_SPOKEN_TASK = 15  # of each digit
_CLIPS = {"train": 3000, "validation": 300}
_CLIP_TASK = 15  # of each motion
_GLYPHS_PER_WORD = {"train": 40, "validation": 25}  # of one script word in one face
_HELD_OUT_TEXT = 0.05
_SPELLED_WORDS = 400

_README = """# The embedded corpus

Made by earlyfuse from packages that are installed; images are small and black on white.
`corpus.json` has the versions and counts.

| part | source | licence |
|---|---|---|
| text | Python's language reference (`pydoc_data`) and its library's docstrings | PSF License |
| digits | E. Alpaydin, C. Kaynak: Handwritten Digits (UCI), from scikit-learn | CC BY 4.0 |
| glyphs | DejaVu and STIX typefaces, from matplotlib | Bitstream Vera, DejaVu, STIX Font License |
| glyph names | Unicode Character Database, from Python's `unicodedata` | Unicode License |
| interleaved | composed of the above | as above |
"""
_SPEECH_README = (
    "| speech | digits and glyph names spoken by espeak-ng, composed with the above "
    "| the program is GPL-3.0-or-later |\n"
)
_CLIPS_README = "| clips | digits and glyphs in motion, described in words | as above |\n"


def sources_of(extra: str | None) -> tuple[str, ...]:
    """Names of the sources of the corpus."""
    return SOURCES if extra is None else (*SOURCES, extra)


@dataclass(frozen=True)
class CorpusPaths:
    """Paths in a finished corpus."""

    folder: Path

    def shards(self, split: str, source: str) -> list[Path]:
        """Tars of ``train`` or ``validation``, of one of ``sources_of``, in order."""
        return sorted((self.folder / split / source).glob("*.tar"))

    @property
    def tasks(self) -> Path:
        return self.folder / "validation" / "tasks.json"

    @property
    def labelled(self) -> Path:
        return self.folder / "validation" / "labelled.json"

    @property
    def prompts(self) -> Path:
        return self.folder / "validation" / "prompts.json"


def build_corpus(
    folder: Path,
    *,
    seed: int = 0,
    scale: float = 1.0,
    image_size: int = 16,
    extra: str | None = None,
    image_first: float = compose.IMAGE_FIRST,
    few_glyphs: bool = False,
    progress: bool = False,
) -> CorpusPaths:
    """Build the corpus in ``folder``, unless it is there; ``progress`` shows a bar.

    ``scale`` in (0, 1] is the share of documents to make, ``image_size`` a multiple of 8 pixels.
    ``extra`` ("speech" or "clips") adds the source of this name; the others are the same with and
    without it. ``image_first``: share of captioned documents whose media come before their words;
    it decides the order of parts alone. ``few_glyphs``: the source "glyphs" has Basic Latin and
    Greek alone, so that a short run sees each character often. The corpus is built in another
    folder and renamed at the end, so an existing one is complete.
    Raises ``ValueError`` for values out of range, for a folder that holds something else, and for
    speech without espeak-ng.
    """
    if not 0 < scale <= 1:
        raise ValueError(f"scale ({scale}) must lie in (0, 1]")
    if image_size < 8 or image_size % 8:
        raise ValueError(
            f"image_size ({image_size}) must be a multiple of 8, the size of a digit scan"
        )
    if not 0 <= image_first <= 1:
        raise ValueError(f"image_first ({image_first}) must lie in [0, 1]")
    folder = Path(folder)
    spec: dict[str, Any] = {"seed": seed, "scale": scale, "image_size": image_size}
    if extra is not None:
        if extra not in EXTRAS:
            raise ValueError(f"extra ({extra!r}) must be one of {', '.join(EXTRAS)}, or None")
        spec[extra] = True
    if image_first != compose.IMAGE_FIRST:
        spec["image_first"] = image_first
    if few_glyphs:
        spec["few_glyphs"] = True
    if _is_built(folder, spec):
        return CorpusPaths(folder)
    synthesiser = speech.espeak_version() if extra == SPEECH else None
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as beside:
        made = Path(beside) / "corpus"
        _write(made, spec, synthesiser, progress)
        try:
            made.rename(folder)  # replaces an empty folder, but no other
        except OSError:  # another process built it first
            if not _is_built(folder, spec):
                raise
    return CorpusPaths(folder)


def _is_built(folder: Path, spec: dict[str, Any]) -> bool:
    """True if ``folder`` is this corpus. ``ValueError`` if it holds something else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not (folder / CORPUS_FILE).exists():
        raise ValueError(f"corpus folder {folder} holds something else; give a new or empty folder")
    found = read_json(folder / CORPUS_FILE, "copy it again, or give a new or empty folder")
    found.field("format", str, choices=(FORMAT,))
    if found.field("spec", dict) != spec:
        raise ValueError(
            f"corpus folder {folder} was built with {shown(found.values['spec'])}, asked for is "
            f"{spec}; give another folder, or remove this one"
        )
    return True


def _write(folder: Path, spec: dict[str, Any], synthesiser: str | None, progress: bool) -> None:
    """Write all files of the corpus, ``corpus.json`` last. ``synthesiser``: version of espeak-ng
    for a corpus with speech.
    """
    seed, scale, size = spec["seed"], spec["scale"], spec["image_size"]
    image_first = spec.get("image_first", compose.IMAGE_FIRST)
    sources = sources_of(next((extra for extra in EXTRAS if extra in spec), None))
    total = 1 + len(SPLITS) * len(sources)
    with tqdm(total=total, desc="embedded corpus", unit="step", disable=not progress) as bar:
        text = _text(seed, scale)
        words = prose.frequent_words([str(parts[0]) for parts in text["train"]], _SPELLED_WORDS)
        bar.update()
        drawn = _glyphs(seed, scale, size, "few_glyphs" in spec)
        scans = dict(zip(SPLITS, digits.load(size, seed, scale), strict=True))
        counts: dict[str, dict[str, int]] = {}
        for split in SPLITS:
            documents = _documents(split, spec, text[split], drawn[split], scans[split], words)
            if synthesiser is not None:
                documents[SPEECH] = _speech(
                    split, seed, scale, scans[split], drawn[split], image_first
                )
            if CLIPS in sources:
                documents[CLIPS] = clips.clip_documents(
                    max(1, round(_CLIPS[split] * scale)),
                    clips.subjects(scans[split], drawn[split]),
                    random.Random(f"{seed}/clips/{split}"),
                    image_first,
                )
            counts[split] = {source: len(documents[source]) for source in sources}
            for source in sources:
                write_shards(folder / split / source, documents[source], _SAMPLES_PER_SHARD)
                bar.update()
    held_out = scans["validation"], drawn["validation"], seed
    checks = tasks(*held_out)
    about = _description(spec, counts, drawn["train"])
    readme = _README
    if synthesiser is not None:
        checks["tasks"].append(_spoken_task(seed, scale))
        readme += _SPEECH_README
        about["versions"][speech.PROGRAM] = synthesiser
        about["versions"]["libsndfile"] = soundfile.__libsndfile_version__
        about["held_out_timbres"] = list(speech.HELD_OUT_TIMBRES)
    if CLIPS in sources:
        subjects = clips.subjects(scans["validation"], drawn["validation"])
        each = max(1, round(_CLIP_TASK * scale))
        rng = random.Random(f"{seed}/clips/task")
        checks["tasks"].append(clip_task(clips.moving(each, subjects, rng)))
        readme += _CLIPS_README
    _write_json(folder / "validation" / "tasks.json", checks)
    _write_json(
        folder / "validation" / "labelled.json", labelled(scans["train"], scans["validation"])
    )
    _write_json(folder / "validation" / "prompts.json", prompts(*held_out))
    (folder / "README.md").write_text(readme, encoding="utf-8")
    _write_json(folder / CORPUS_FILE, about)


def _documents(
    split: str,
    spec: dict[str, Any],
    text: list[Parts],
    drawn: Sequence[tuple[str, bytes]],
    scans: Sequence[digits.Digit],
    words: Sequence[str],
) -> dict[str, list[Parts]]:
    """Shuffled documents of ``SOURCES``. ``words``: to be spelled in glyphs."""
    rng = random.Random(f"{spec['seed']}/{split}")
    image_first = spec.get("image_first", compose.IMAGE_FIRST)
    documents: dict[str, list[Parts]] = {
        "text": text,
        "glyphs": [compose.glyph_document(png, c, rng, image_first) for c, png in drawn],
        "digits": compose.digit_documents(scans, _DIGIT_PASSES[split], rng, image_first),
        "interleaved": compose.interleaved_documents(
            max(1, round(_INTERLEAVED[split] * spec["scale"])),
            scans,
            _FACES[split],
            words,
            spec["image_size"],
            rng,
            image_first,
        ),
    }
    for source in SOURCES:
        rng.shuffle(documents[source])
    return documents


def _text(seed: int, scale: float) -> dict[str, list[Parts]]:
    """Documents by split; all of one work (a topic, a docstring) are in the same split."""
    documents = prose.documents(scale)
    works = sorted({name for name, _ in documents})
    held_out = set(
        random.Random(f"{seed}/text").sample(works, max(1, round(_HELD_OUT_TEXT * len(works))))
    )
    split: dict[str, list[Parts]] = {name: [] for name in SPLITS}
    for work, text in documents:
        split["validation" if work in held_out else "train"].append([text])
    return split


def _glyphs(seed: int, scale: float, size: int, few: bool) -> dict[str, list[tuple[str, bytes]]]:
    """(character, PNG) by split, without repeated images: slanted faces draw many signs upright."""
    characters = glyphs.characters(glyphs.FEW_BLOCKS if few else glyphs.BLOCKS)
    seen: set[bytes] = set()
    drawn: dict[str, list[tuple[str, bytes]]] = {name: [] for name in SPLITS}
    for split, faces in _FACES.items():
        for face in faces:
            rng = random.Random(f"{seed}/glyphs/{face}")
            chosen = glyphs.choose(face, characters, _GLYPHS_PER_WORD[split], rng)
            for character in rng.sample(chosen, max(1, round(len(chosen) * scale))):
                pixels = glyphs.glyph_pixels(face, character, size)
                if pixels.tobytes() not in seen:
                    seen.add(pixels.tobytes())
                    drawn[split].append((character, glyphs.encode_png(pixels)))
    return drawn


def _speech(
    split: str,
    seed: int,
    scale: float,
    scans: Sequence[digits.Digit],
    drawn: Sequence[tuple[str, bytes]],
    image_first: float,
) -> list[Parts]:
    timbres = speech.TIMBRES if split == "train" else speech.HELD_OUT_TIMBRES
    count = max(1, round(_SPOKEN[split] * scale))
    rng = random.Random(f"{seed}/speech/{split}")
    return speech.speech_documents(count, scans, drawn, timbres, rng, image_first)


def _spoken_task(seed: int, scale: float) -> dict[str, Any]:
    rng = random.Random(f"{seed}/speech/task")
    each = max(1, round(_SPOKEN_TASK * scale))
    return spoken_task(speech.spoken_digits(each, speech.HELD_OUT_TIMBRES, rng))


def _description(
    spec: dict[str, Any], counts: dict[str, dict[str, int]], drawn: Sequence[tuple[str, bytes]]
) -> dict[str, Any]:
    words = Counter(glyphs.script_word(character) for character, _ in drawn)
    return {
        "format": FORMAT,
        "spec": spec,
        "documents": counts,
        "script_words": dict(sorted(words.items(), key=lambda item: (-item[1], item[0]))),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("matplotlib", "pillow", "scikit-learn")},
        },
        "held_out_faces": list(glyphs.HELD_OUT_FACES),
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    content = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    path.write_text(content, encoding="utf-8", newline="\n")
