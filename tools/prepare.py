"""Raw data → tokenised shards.

``python -m earlyfuse.tools.prepare build | corpus | inspect | show``, each with ``--help``.

An interrupted command resumes when it is repeated. docs/data.md describes layouts and files.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from earlyfuse.data.media import MEDIA
from earlyfuse.tools.command import Parser, run_command

_EXAMPLE = """example:
  python -m earlyfuse.tools.prepare build --out prepared \\
      --train text=raw/books 'pairs=raw/cc12m/*.tar' --validation pairs=raw/held_out
"""
# option, type, metavar, help with the default of ``PrepareSpec``
_TOKENIZER_OPTIONS: tuple[tuple[str, type, str | None, str], ...] = (
    ("image-size", int, "PX", "images become squares of this side (16)"),
    ("patch", int, "PX", "side of the square of one code or vector (4)"),
    ("codes", int, "N", "image codes to learn (512)"),
    ("vq-steps", int, "N", "training steps of a vqvae (1500)"),
    ("vae-factor", int, "PX", "side of the square of one latent of a vae, a power of two (2)"),
    ("vae-channels", int, "N", "channels of the latents of a vae (4)"),
    ("vae-steps", int, "N", "training steps of a vae (1500)"),
    ("vae-kl", float, "X", "weight of the KL term of a vae beside the pixels' error (0.001)"),
    ("speech-codes", int, "N", "speech codes to learn (500)"),
    ("speech-frame-ms", int, "MS", "speech per code; 40 is 25 codes a second (40)"),
    ("speech-seconds", float, "S", "longest utterance; a longer one is a bad sample (30.0)"),
    ("workers", int, "N", "processes (one per core, at most 8)"),
    ("seed", int, None, "of tokenizer training (0)"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 on success, 2 with one line on what to change for a refusal."""

    def command() -> int:
        options = vars(_parser().parse_args(arguments))
        return int(options.pop("command")(**options))

    resume = "stopped; repeat the command to resume"
    return run_command("prepare", command, interrupted=resume, also=(RuntimeError,))


# heavy imports are inside the commands, so that --help and worker processes do without them


def build(
    out: Path, train: list[str], validation: list[str], columns: list[str] | None, **options: Any
) -> int:
    """Prepare the user's shards."""
    from earlyfuse.data.prepare import PrepareSpec, prepare
    from earlyfuse.data.prepare.progress import Progress
    from earlyfuse.data.prepare.prompts import make_prompts

    sources = _by_source(train), _by_source(validation)
    spec = PrepareSpec(out, *sources, columns=_by_role(columns or []), **_given(options))
    prepare(spec)
    make_prompts(spec, Progress())
    return inspect(out)


def corpus(
    out: Path, scale: float, extra: str | None, image_first: float | None, **options: Any
) -> int:
    """Build the embedded corpus and prepare it."""
    from earlyfuse.data.prepare.embedded import prepare_corpus

    prepare_corpus(out, scale=scale, extra=extra, image_first=image_first, **_given(options))
    return inspect(out)


def inspect(out: Path) -> int:
    """Print the description of a prepared folder."""
    from earlyfuse.data.prepare.report import describe

    print(describe(out))
    return 0


def show(
    out: Path,
    raw: list[str],
    source: str,
    number: int,
    key: str,
    picture: Path | None,
    columns: list[str] | None,
    **options: Any,
) -> int:
    """Print a document of a prepared folder and draw its media."""
    from earlyfuse.data.prepare.shard_files import find_shards
    from earlyfuse.data.prepare.show import show as lines
    from earlyfuse.data.raw.shard import ReadOptions

    given = {name: value for name, value in options.items() if value is not None}
    reading = ReadOptions(columns=tuple(_by_role(columns or []).items()), **given)
    shards = find_shards("--raw", raw, reading) if raw else ()
    for line in lines(out, source, number, key, shards, reading, picture):
        print(line)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="prepare", description="Raw data to tokenised shards.", allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="{build,corpus,inspect,show}")
    builder = commands.add_parser(
        "build",
        help="tokenise your shards",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    builder.set_defaults(command=build)
    add = builder.add_argument
    add("--out", type=Path, required=True, help="folder to write, or to resume in")
    shards: dict[str, Any] = {"nargs": "+", "action": "extend", "metavar": "NAME=SHARDS"}
    files = "file, folder or pattern (*, {00..12}): .tar, .parquet, .jsonl, .csv, .tsv, media, .txt"
    add("--train", required=True, help=f"training sources: {files}", **shards)
    add("--validation", default=[], help=f"held-out sources: {files}", **shards)
    _add_reading_options(builder)
    image_first = "share of pairs with the image or utterance before its text (0.5)"
    add("--image-first", type=float, help=image_first)
    on_bad = (
        "skip: count bad samples, stop at a shard that cannot be read to its end; skip-shards: "
        "count what such a shard loses too; stop: stop at the first (skip)"
    )
    add("--on-bad", metavar="POLICY", help=on_bad)
    add("--max-bad-rate", type=float, help="stop above this share of bad samples (0.01)")
    replace = "rebuild existing sources that were made from other raw shards (off: refuse)"
    add("--replace", action="store_true", help=replace)
    frames = "most frames of a video: a list of frames, an animated GIF or WebP (0: no videos)"
    add("--video-frames", type=int, metavar="N", help=frames)
    add("--frame-stride", type=int, metavar="N", help="take every N-th frame of a video (1)")
    long_video = (
        "of a video with more frames: even, take some at equal distances; first, take the first; "
        "drop, count the sample as bad (even)"
    )
    add("--long-video", metavar="POLICY", help=long_video)
    _add_tokenizer_options(builder)

    embedded = commands.add_parser(
        "corpus", help="build and tokenise the embedded corpus", allow_abbrev=False
    )
    embedded.set_defaults(command=corpus)
    add = embedded.add_argument
    add("out", type=Path, help="folder to write, or to resume in")
    add("--scale", type=float, default=1.0, help="share of the corpus to build (1.0)")
    speech = "with digits and names spoken by espeak-ng, which must be installed; 256 codes (off)"
    vectors = "with images as vectors of raw pixels, most of them after their captions (off)"
    clips = "with short clips of digits and glyphs in motion, described in words (off)"
    choice = embedded.add_mutually_exclusive_group()
    kind: dict[str, Any] = {"dest": "extra", "action": "store_const"}
    choice.add_argument("--speech", const="speech", help=speech, **kind)
    choice.add_argument("--clips", const="clips", help=clips, **kind)
    choice.add_argument("--vectors", const="vectors", help=vectors, **kind)
    first = "share of captioned documents that begin with their media (0.7; with --vectors 0.2)"
    add("--image-first", type=float, metavar="SHARE", help=first)
    _add_tokenizer_options(embedded)

    viewer = commands.add_parser(
        "inspect", help="documents, tokens, drops, tokenizers of a prepared folder"
    )
    viewer.set_defaults(command=inspect)
    viewer.add_argument("out", type=Path)
    _add_show(commands)
    return parser


def _add_show(commands: Any) -> None:
    shower = commands.add_parser(
        "show",
        help="a document of a prepared folder, decoded, and its pictures",
        allow_abbrev=False,
    )
    shower.set_defaults(command=show)
    add = shower.add_argument
    add("out", type=Path, help="prepared folder")
    add("--source", default="", help="NAME, or SPLIT/NAME (the first of train)")
    which = shower.add_mutually_exclusive_group()
    number = "its number in the source (0)"
    which.add_argument("--sample", dest="number", type=int, default=0, metavar="N", help=number)
    which.add_argument("--key", default="", help="the key of its raw sample; needs --raw")
    raw = "the raw shards of the source, as given to build: shows originals and keys"
    add("--raw", nargs="+", default=[], metavar="SHARDS", help=raw)
    _add_reading_options(shower)
    add("--out", dest="picture", type=Path, metavar="FILE", help="picture (NAME-N.png, here)")


def _add_reading_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of reading raw shards."""
    add = parser.add_argument
    add("--layout", help="pairs, interleaved, mmc4, turns, text (auto: by each sample)")
    columns = (
        "columns of parquet files, as in text=caption images=image_bytes; roles: text, "
        f"{', '.join(medium.list_name for medium in MEDIA.values())}; SOURCE:ROLE=COLUMN for one "
        "source (recognised from the schema)"
    )
    roles: dict[str, Any] = {"nargs": "+", "action": "extend", "metavar": "ROLE=COLUMN"}
    add("--columns", help=columns, **roles)
    root = (
        "folder of the files that JSON lines, tables and parquet rows name; of a URL the file "
        "named by its SHA-256; nothing is fetched (of JSON lines and tables, that of the file)"
    )
    add("--media-root", type=Path, metavar="FOLDER", help=root)
    unit = "document of a plain text file: file, paragraph, line (file)"
    add("--text-unit", metavar="UNIT", help=unit)


def _add_tokenizer_options(parser: argparse.ArgumentParser) -> None:
    """Options of both commands; their defaults are those of ``PrepareSpec``."""
    add = parser.add_argument
    ready = "folder of ready tokenizers with their vocabulary, prepared or imported (train them)"
    add("--tokenizers", type=Path, metavar="FOLDER", help=ready)
    text = "ready sentencepiece .model or Hugging Face tokenizer.json (train one)"
    add("--text-tokenizer", type=Path, metavar="FILE", help=text)
    add("--text-vocab", type=int, metavar="N", help="pieces to learn (2048)")
    for label, medium in MEDIA.items():
        kinds = ", ".join((*medium.kinds, "none"))
        foreign = f", the {medium.foreign}" if medium.foreign else ""
        kind = f"{kinds}, a ready .safetensors{foreign} ({medium.default})"
        add(f"--{label}-tokenizer", metavar="KIND", help=kind)
    for name, kind_of, metavar, about in _TOKENIZER_OPTIONS:
        add(f"--{name}", type=kind_of, metavar=metavar, help=about)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """Fields of ``PrepareSpec`` that were given."""
    from earlyfuse.data.prepare import PrepareSpec

    given = {name: value for name, value in options.items() if value is not None}
    known = PrepareSpec.__dataclass_fields__
    others = {label: f"{label}_tokenizer" for label in MEDIA}
    given["media_tokenizers"] = {
        label: given.pop(name)
        for label, name in others.items()
        if name in given and name not in known
    }
    return given


def _by_source(pairs: list[str]) -> dict[str, list[str | Path]]:
    """``name=path`` strings → paths by name; a name may occur several times."""
    sources: dict[str, list[str | Path]] = {}
    for pair in pairs:
        name, equals, path = pair.partition("=")
        if not (name and equals and path):
            raise ValueError(f"source ({pair}) must be NAME=SHARDS, as in text=raw/books")
        sources.setdefault(name, []).append(path)
    return sources


def _by_role(pairs: list[str]) -> dict[str, str]:
    """``role=column`` strings → column by role."""
    columns: dict[str, str] = {}
    for pair in pairs:
        role, equals, column = pair.partition("=")
        if not (role and equals and column) or role in columns:
            raise ValueError(f"columns ({pair}) must be ROLE=COLUMN, as in text=caption, each once")
        columns[role] = column
    return columns


if __name__ == "__main__":
    sys.exit(main())
