"""Write text, images and speech with a trained model.

``python -m earlyfuse.tools.generate FOLDER --out DIR [--prompt TEXT] [--image FILE] [--speech FILE]
…``; FOLDER is a run, a checkpoint or an exported model. docs/generation.md describes prompts and
results.
"""

import argparse
import json
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from earlyfuse.data.console import printable
from earlyfuse.data.media import MEDIA
from earlyfuse.tools.command import (
    Parser,
    add_code_option,
    add_weights_option,
    check_device,
    import_code,
    run_command,
)

_EXAMPLES = """examples:
  an image:       … FOLDER --mode image --prompt "glyph: greek small letter alpha" --out samples
  a caption:      … FOLDER --mode text --image alpha.png --out captions
  both, mixed:    … FOLDER --image 3.png --prompt plus --image 4.png --out sums
  speech:         … FOLDER --mode speech --prompt "spoken: seven" --out said
  its words:      … FOLDER --mode text --speech seven.wav --out heard
  many prompts:   … FOLDER --mode image --prompts captions.jsonl --samples 4 --out samples
"""
LONGEST = 256  # tokens to write where nothing else says
MOST = 1 << 20  # tokens, samples, documents at once: more is a slip, and would be reserved
RESULTS = "results.jsonl"
_NEWLINE = "\n"


@dataclass(frozen=True)
class Work:
    """One document to write; ``prompt``: a ``Prompt``. ``stem``: how its files begin."""

    segments: list[dict[str, str | list[str]]]
    prompt: Any
    sample: int
    seed: int
    room: int
    stem: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 when it succeeded, 2 with one line on what to change when it could not."""
    return run_command(
        "generate",
        lambda: write(_parser().parse_args(arguments)),
        interrupted="stopped; no results were kept",
    )


def write(options: argparse.Namespace) -> None:
    """Write all documents that ``options`` ask for, into ``options.out``."""
    # heavy imports stand here, so that --help does not pay for them
    import torch

    from earlyfuse.data.atomic import atomic_write
    from earlyfuse.models.generate.denoising import Denoising
    from earlyfuse.models.generate.session import Sampling, write_documents
    from earlyfuse.parallel.checkpoint.open_checkpoint import as_module, open_model
    from earlyfuse.tools.documents import ModelFolder, to_segments

    sampling = Sampling(options.temperature, options.top_p, options.top_k, options.guidance)
    _check(options)
    denoising = Denoising(options.denoising_steps, options.denoising_method, options.guided_until)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    import_code(options.code)
    opened = open_model(options.folder, options.weights)
    model, vocabulary = as_module(opened, device=device), opened.vocabulary
    options.weights = opened.weights
    about = ModelFolder.read(options.folder)
    tokenizers = about.tokenizers(vocabulary, options.tokenizers)
    _check_mode(options.mode, tokenizers)
    _check_samples(options, model, vocabulary)
    rule = _rule(model, options.rule)
    works = _works(options, tokenizers, about.seq_len)
    options.out.mkdir(parents=True, exist_ok=True)
    with atomic_write(options.out / RESULTS) as file:
        todo = iter(works)
        while batch := list(islice(todo, options.batch_size)):
            drafts = write_documents(
                model,
                vocabulary,
                [work.prompt for work in batch],
                new_tokens=[work.room for work in batch],
                mode=options.mode,
                sampling=sampling,
                denoising=denoising,
                seeds=[work.seed for work in batch],
                rule=rule,
                unused=tokenizers.unused,
            )
            for work, draft in zip(batch, drafts, strict=True):
                tokens = draft.written
                segments = to_segments(tokens, tokenizers, options.out, work.stem, draft.vectors)
                whole = tokens[-1:] == [vocabulary.eos] or options.mode in MEDIA
                file.write(_line(options, rule, work, segments, len(tokens), whole))
                shown = f"{work.stem}: {_shown(segments)}{'' if whole else ' …'}"
                print(printable(shown), flush=True)
    by = " by the averaged weights" if opened.weights == "ema" else ""
    print(printable(f"{len(works)} documents{by} in {options.out / RESULTS}"))


def _check(options: argparse.Namespace) -> None:
    """Raises ``ValueError`` for what is wrong before anything is loaded."""
    for name in ("batch_size", "samples", "new_tokens", "denoising_steps"):
        value = getattr(options, name)
        if value is not None and not 1 <= value <= MOST:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} ({value}) must lie in [1, {MOST}]; give another number")
    if options.segments and options.prompts:
        raise ValueError(
            f"--prompts and --prompt or {_options()} were given; give one or the other"
        )
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"--out ({options.out}) must be a folder; it is a file")
    if (options.out / RESULTS).exists():
        raise ValueError(f"--out ({options.out}) has {RESULTS} already; give another folder")
    if not options.folder.is_dir():
        raise ValueError(f"{options.folder} is no folder; give a run, a checkpoint or an export")


def _check_mode(mode: str, tokenizers: Any) -> None:
    """Raises ``ValueError`` where what is written could not be turned into files."""
    media = {medium.modality.label for medium in tokenizers.vocabulary.media}
    for label in sorted(media if mode == "interleaved" else media & {mode}):
        tokenizer = tokenizers.media.get(label)
        if tokenizer is None:
            raise ValueError(
                f"--mode {mode} writes {label} codes, and there is no {label} tokenizer to turn "
                "them into files; write --mode text"
            )
        if not tokenizer.decodes:
            raise ValueError(
                f"--mode {mode} writes {MEDIA[label].item}s, and the {label} tokenizer has no "
                "decoder: import one that has (vqgan.ckpt, docs/data.md), or write --mode text"
            )


def _check_samples(options: argparse.Namespace, model: Any, vocabulary: Any) -> None:
    """Raises ``ValueError`` for equal samples, and for steps that the model's schedule has not."""
    media = [m for m in vocabulary.media if options.mode in ("interleaved", m.modality.label)]
    draws_vectors = any(medium.continuous for medium in media)
    if options.temperature == 0 and options.samples > 1 and not draws_vectors:
        raise ValueError(
            f"--temperature 0 writes the same in each of --samples {options.samples}; give another "
            "temperature, or one sample"
        )
    if draws_vectors and (vectors := model.config.vectors) is not None:
        diffusion = vectors.diffusion.build()
        diffusion.check_method(options.denoising_method, options.denoising_steps)


def _rule(model: Any, rule: Any) -> Any:
    """The rule by which experts are chosen; raises ``ValueError`` if the model lacks it."""
    from earlyfuse.models.routing.router import inference_rule

    try:
        return inference_rule(model, rule)
    except ValueError as error:
        raise ValueError(f"--rule ({rule}): {error}" if rule else str(error)) from error


def _works(options: argparse.Namespace, tokenizers: Any, seq_len: int | None) -> list[Work]:
    """All documents to write; raises ``ValueError`` for prompts that cannot be read or continued.

    A seed follows from ``--seed``, the prompt's number and the sample's alone.
    """
    from earlyfuse.tools.documents import read_prompts, to_prompt

    documents = read_prompts(options.prompts) if options.prompts else [options.segments or []]
    works = []
    for number, segments in enumerate(documents):
        try:
            prompt = to_prompt(segments, tokenizers)
        except ValueError as error:
            raise ValueError(f"prompt {number}: {error}") from error
        room = _room(options, tokenizers.vocabulary, number, len(prompt.tokens), seq_len)
        for sample in range(options.samples):
            seed = zlib.crc32(f"{options.seed}:{number}:{sample}".encode())
            works.append(Work(segments, prompt, sample, seed, room, f"{number:06d}-{sample}"))
    return works


def _room(
    options: argparse.Namespace, vocabulary: Any, number: int, length: int, seq_len: int | None
) -> int:
    """Tokens that may be written behind prompt ``number`` of ``length`` tokens."""
    left = LONGEST if seq_len is None else seq_len - length
    block = next((m.block for m in vocabulary.media if m.modality.label == options.mode), 0)
    wanted = block + 2 if block else options.new_tokens or max(1, min(LONGEST, left))
    if seq_len is not None and wanted > left:
        raise ValueError(
            f"prompt {number} of {length} tokens and {wanted} to write are longer than the "
            f"{seq_len} positions that the model was trained on; shorten the prompt"
            + ("" if block else " or lower --new-tokens")
        )
    return wanted


def _line(
    options: argparse.Namespace,
    rule: str,
    work: Work,
    segments: list[dict[str, str | list[str]]],
    tokens: int,
    whole: bool,
) -> bytes:
    fields = {
        "prompt": work.segments,
        "written": segments,
        "sample": work.sample,
        "mode": options.mode,
        "seed": work.seed,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "top_k": options.top_k,
        "guidance": options.guidance,
        "guided_until": options.guided_until,
        "denoising_steps": options.denoising_steps,
        "denoising_method": options.denoising_method,
        "rule": rule,
        "weights": options.weights,
        "tokens": tokens,
        "ended": whole,
    }
    # names of files may hold bytes that are no UTF-8
    return json.dumps(fields, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"


def _shown(segments: list[dict[str, str | list[str]]]) -> str:
    return " ".join(
        str(value)
        if kind == "text"
        else f"[{value if isinstance(value, str) else ' '.join(value)}]"
        for segment in segments
        for kind, value in segment.items()
    )


class _Segment(argparse.Action):
    """Collects ``--prompt`` and the options of media in the order in which they are given."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        kind = str(option).removeprefix("--").replace("prompt", "text")
        namespace.segments = [*(namespace.segments or []), {kind: values}]


def _options() -> str:
    return " or ".join(f"--{label}" for label in MEDIA)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="generate",
        description="Write text, images and speech with a trained model.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("folder", type=Path, help="a run, a checkpoint or an exported model")
    add("--out", type=Path, required=True, help=f"folder for {RESULTS}, images and speech")
    segment: dict[str, Any] = {"dest": "segments", "action": _Segment}
    add(
        "--prompt",
        metavar="TEXT",
        help=f"text of the prompt; may come again, with {_options()}",
        **segment,
    )
    for label, medium in MEDIA.items():
        files = ", ".join(medium.suffixes)
        what = f"{medium.item} of the prompt ({files}), in its place"
        add(f"--{label}", metavar="FILE", help=what, **segment)
    add("--prompts", type=Path, metavar="FILE", help="many prompts, one JSON list a line")
    add(
        "--mode",
        choices=("text", "interleaved", *MEDIA),
        default="interleaved",
        help="what to write (interleaved)",
    )
    add("--samples", type=int, default=1, metavar="N", help="documents for each prompt (1)")
    add("--batch-size", type=int, default=16, metavar="N", help="documents written at once (16)")
    add("--new-tokens", type=int, metavar="N", help=f"tokens to write at most ({LONGEST})")
    add("--temperature", type=float, default=1.0, help="0: the most likely tokens (1.0)")
    add("--top-p", type=float, default=1.0, help="draw from this much of the probability (1.0)")
    add("--top-k", type=int, default=0, help="draw from so many tokens; 0: all (0)")
    guided = "of codes and vectors by the prompt; 1: off (1.0)"
    add("--guidance", "--cfg", type=float, default=1.0, help=guided)
    until = "time up to which vectors are guided, from 0, the data, to 1, noise; JiT: 0.9 (1.0)"
    add("--guided-until", type=float, default=1.0, metavar="T", help=until)
    steps = "steps that turn noise into images of vectors (50)"
    add("--denoising-steps", type=int, default=50, metavar="N", help=steps)
    add(
        "--denoising-method",
        choices=("ddim", "euler", "heun"),
        default="ddim",
        help="of these steps; heun reads the model twice in each (ddim)",
    )
    add(
        "--rule",
        choices=("causal", "threshold"),
        help="how experts are chosen: by causal routers or by thresholds (the first it has)",
    )
    add("--seed", type=int, default=0, help="of all samples (0)")
    add("--tokenizers", type=Path, metavar="DIR", help="tokenizers of the model's data, if moved")
    add_weights_option(parser)
    add("--device", help="cpu, cuda … (a GPU if there is one)")
    add_code_option(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
