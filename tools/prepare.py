"""Raw WebDataset shards → tokenised shards.

``python -m earlyfuse.tools.prepare build | corpus | inspect``, each with ``--help``.

A call that was interrupted goes on where it ended. docs/data.md describes layouts and files.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from earlyfuse.data.media import MEDIA
from earlyfuse.tools.command import run_command

_EXAMPLE = """example:
  python -m earlyfuse.tools.prepare build --out prepared \\
      --train text=raw/books 'pairs=raw/cc12m/*.tar' --validation pairs=raw/held_out
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 when it succeeded, 2 with one line on what to change when it could not."""

    def command() -> int:
        options = vars(_parser().parse_args(arguments))
        return int(options.pop("command")(**options))

    kept = "stopped; the same command goes on from here"
    return run_command("prepare", command, interrupted=kept, also=(RuntimeError,))


# the heavy imports stand in the commands, so that --help and worker processes do not pay for them


def build(out: Path, train: list[str], validation: list[str], **options: Any) -> int:
    """Prepare the user's shards."""
    from earlyfuse.data.prepare import PrepareSpec, prepare
    from earlyfuse.data.prepare.report import describe

    spec = PrepareSpec(out, _by_source(train), _by_source(validation), **_given(options))
    prepare(spec)
    print(describe(out))
    return 0


def corpus(out: Path, scale: float, speech: bool, **options: Any) -> int:
    """Build the embedded corpus and prepare it."""
    from earlyfuse.data.prepare.embedded import prepare_corpus
    from earlyfuse.data.prepare.report import describe

    prepare_corpus(out, scale=scale, speech=speech, **_given(options))
    print(describe(out))
    return 0


def inspect(out: Path) -> int:
    """Print what a prepared folder holds."""
    from earlyfuse.data.prepare.report import describe

    print(describe(out))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prepare", description="Raw WebDataset shards to tokenised shards.", allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True, metavar="{build,corpus,inspect}")
    builder = commands.add_parser(
        "build",
        help="tokenise your shards",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    builder.set_defaults(command=build)
    builder.add_argument(
        "--out", type=Path, required=True, help="folder to write, or to go on with"
    )
    shards: dict[str, Any] = {"nargs": "+", "action": "extend", "metavar": "NAME=SHARDS"}
    builder.add_argument(
        "--train",
        required=True,
        help="sources: file, folder of tars or pattern (*, {000..127})",
        **shards,
    )
    builder.add_argument("--validation", default=[], help="held-out sources, likewise", **shards)
    builder.add_argument(
        "--layout", help="pairs, interleaved, mmc4, text (auto: each sample's own)"
    )
    builder.add_argument(
        "--image-first",
        type=float,
        help="share of pairs with the image or utterance before its text (0.5)",
    )
    builder.add_argument(
        "--on-bad",
        metavar="POLICY",
        help="skip: count bad samples, end at a shard that cannot be read to its end; skip-shards: "
        "count what such a shard loses too; stop: end at the first (skip)",
    )
    builder.add_argument(
        "--max-bad-rate", type=float, help="end above this share of bad samples (0.01)"
    )
    builder.add_argument(
        "--replace",
        action="store_true",
        help="make anew sources that are there already, of other raw shards (off: refuse)",
    )
    _add_tokenizer_options(builder)
    embedded = commands.add_parser(
        "corpus", help="build and tokenise the embedded corpus", allow_abbrev=False
    )
    embedded.set_defaults(command=corpus)
    embedded.add_argument("out", type=Path, help="folder to write, or to go on with")
    embedded.add_argument(
        "--scale", type=float, default=1.0, help="share of the corpus to build (1.0)"
    )
    embedded.add_argument(
        "--speech",
        action="store_true",
        help="with digits and names spoken by espeak-ng, which must be installed; 256 codes (off)",
    )
    _add_tokenizer_options(embedded)
    viewer = commands.add_parser(
        "inspect", help="documents, tokens, drops, tokenizers of a prepared folder"
    )
    viewer.set_defaults(command=inspect)
    viewer.add_argument("out", type=Path)
    return parser


def _add_tokenizer_options(parser: argparse.ArgumentParser) -> None:
    """Options of both commands. None has a default here: they are those of ``PrepareSpec``."""
    add = parser.add_argument
    add(
        "--tokenizers",
        type=Path,
        metavar="FOLDER",
        help="ready ones with their vocabulary: of prepared data, or imported (make them)",
    )
    add(
        "--text-tokenizer",
        type=Path,
        metavar="FILE",
        help="ready sentencepiece .model or Hugging Face tokenizer.json (learn one)",
    )
    add("--text-vocab", type=int, metavar="N", help="pieces to learn (2048)")
    for label, medium in MEDIA.items():
        kinds = ", ".join((*medium.kinds, "none"))
        add(
            f"--{label}-tokenizer",
            metavar="KIND",
            help=f"{kinds}, or a ready .safetensors ({medium.default})",
        )
    add("--image-size", type=int, metavar="PX", help="images become squares of this side (16)")
    add("--patch", type=int, metavar="PX", help="side of the square that one code stands for (4)")
    add("--codes", type=int, metavar="N", help="image codes to learn (512)")
    add("--vq-steps", type=int, metavar="N", help="training steps of a vqvae (1500)")
    add("--speech-codes", type=int, metavar="N", help="speech codes to learn (500)")
    add(
        "--speech-frame-ms",
        type=int,
        metavar="MS",
        help="speech that one code stands for; 40 is 25 codes a second (40)",
    )
    add(
        "--speech-seconds",
        type=float,
        metavar="S",
        help="longest utterance; a longer one is a bad sample (30.0)",
    )
    add("--workers", type=int, metavar="N", help="processes (one a core, at most 8)")
    add("--seed", type=int, help="of tokenizer training (0)")


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """The fields of ``PrepareSpec`` that were given."""
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
    """``name=path`` strings → paths by name; a name may come several times."""
    sources: dict[str, list[str | Path]] = {}
    for pair in pairs:
        name, equals, path = pair.partition("=")
        if not (name and equals and path):
            raise ValueError(f"source ({pair}) must be NAME=SHARDS, as in text=raw/books")
        sources.setdefault(name, []).append(path)
    return sources


if __name__ == "__main__":
    sys.exit(main())
