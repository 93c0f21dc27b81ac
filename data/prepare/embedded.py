"""Builds the embedded corpus and prepares it."""

from pathlib import Path
from typing import Any

from earlyfuse.data.atomic import atomic_write_bytes
from earlyfuse.data.console import printable
from earlyfuse.data.embedded.builder import (
    CLIPS,
    CORPUS_FILE,
    SPEECH,
    CorpusPaths,
    build_corpus,
    sources_of,
)
from earlyfuse.data.embedded.compose import IMAGE_FIRST
from earlyfuse.data.prepare import prepare
from earlyfuse.data.prepare.progress import Progress
from earlyfuse.data.prepare.spec import SPLITS, PrepareSpec

VECTORS = "vectors"
# speech: an hour of two dozen synthetic voices. Clips: as many ids as the corpus without, which has
# no frame separator. Vectors: 2,048 ids, the last of them the placeholder
OPTIONS: dict[str, dict[str, Any]] = {
    SPEECH: {"speech_tokenizer": "kmeans", "speech_codes": 256},
    CLIPS: {"text_vocab": PrepareSpec.text_vocab - 1, "video_frames": 8},
    VECTORS: {"text_vocab": PrepareSpec.text_vocab - 1, "image_tokenizer": "pixels"},
}
# Transfusion (arXiv 2408.11039): in 80 % captions come first, so that images depend on them
_IMAGE_FIRST = {VECTORS: 0.2}


def prepare_corpus(
    out: Path,
    *,
    scale: float = 1.0,
    extra: str | None = None,
    image_first: float | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> CorpusPaths:
    """Build raw shards in ``<out>/raw`` and prepare ``out``; quick if that is done already.

    ``scale``: share of the corpus to build; ``extra``: with the source "speech" or "clips", or
    images as "vectors", tokenised as ``OPTIONS`` says. ``image_first``: share of captioned
    documents that begin with their media, by default 0.7, of vectors 0.2. ``options``: fields of
    ``PrepareSpec``, which go before these. Returns the raw corpus, for its task checks and prompts.

    Raises ``ValueError``, before anything is written, for a folder that holds anything else, and
    what ``build_corpus`` and ``prepare`` raise.
    """
    _check_own(out)
    source = None if extra == VECTORS else extra
    if image_first is None:
        image_first = _IMAGE_FIRST.get(extra or "", IMAGE_FIRST)
    own = OPTIONS.get(extra or "", {})
    if "tokenizers" in options:  # brings text pieces and codes
        own = {name: value for name, value in own.items() if name == "video_frames"}
    options = own | options
    progress = progress or Progress()
    if not (out / "raw" / CORPUS_FILE).exists():
        progress.tell(f"building the embedded corpus in {out} (once; some minutes)")
    paths = build_corpus(
        out / "raw",
        seed=options.get("seed", PrepareSpec.seed),
        scale=scale,
        image_size=options.get("image_size", PrepareSpec.image_size),
        extra=source,
        image_first=image_first,
        few_glyphs=extra == VECTORS,
        progress=progress.file.isatty(),
    )
    splits: dict[str, Any] = {
        split: {name: paths.shards(split, name) for name in sources_of(source)} for split in SPLITS
    }
    # of runs that start together and need the same corpus, one makes it
    prepare(PrepareSpec(out=out, **splits, **options), progress, wait=True)
    # the trainer expects task checks, labelled images and prompts beside the validation sources;
    # older corpora lack some of them
    for path in (paths.tasks, paths.labelled, paths.prompts):
        if path.exists() and not (out / "validation" / path.name).exists():
            atomic_write_bytes(out / "validation" / path.name, path.read_bytes())
    return paths


def _check_own(out: Path) -> None:
    """Raise ``ValueError`` unless ``out`` is the corpus, finished or not, or is empty."""
    if not out.exists() or (out / "raw" / CORPUS_FILE).is_file():
        return
    if not out.is_dir():
        raise ValueError(f"out ({out}) must be a folder; it is a file")
    # a corpus whose building was interrupted leaves .raw-*
    others = [path.name for path in out.iterdir() if not path.name.startswith(".raw-")]
    if others:
        raise ValueError(
            f"out ({out}) holds {printable(min(others))} and no raw/{CORPUS_FILE}, so it is not "
            "the embedded corpus; give a new or an empty one"
        )
