"""Evaluation tasks: which of several words follows a held-out image or utterance?

``validation/tasks.json`` of a data folder lists tasks; each item is a media item, or a video as a
list of its ``frames``, and the word that should follow it. The model reads begin-of-document, the
item and the task's prefix, and chooses among the candidate words by their next token, repeatedly
where several begin alike. The answer is never in the input, so routing that looks ahead cannot
reveal it.
"""

import base64
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from operator import eq
from pathlib import Path

import numpy as np
import torch

from earlyfuse.data.json_files import JsonObject, read_json
from earlyfuse.data.media import MEDIA, MediaTokenizer
from earlyfuse.data.tokenizers import Tokenizers
from earlyfuse.data.tokenizers.animation import MOST_FRAMES
from earlyfuse.models.batch import PADDING, MixedBatch, spans
from earlyfuse.models.context import ForwardSettings
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.generate.constrained import Prompt
from earlyfuse.models.vocabulary import Vocabulary
from earlyfuse.parallel.strategies.pipeline import Pipeline

# largest share of a row that prompts take; the rest is held-out data, so that routers that choose
# among the tokens of a batch see the mixture they were trained on
PROMPT_SHARE = 0.25
FRAMES = "frames"  # field of an item with a video: its frames, in order


@dataclass(frozen=True)
class Ranks:
    """This data rank among those that share the rows of a batch.

    ``sum`` sums a host tensor over data, context-parallel and pipeline ranks; ``positions`` of each
    row are on this rank.
    """

    rank: int = 0
    count: int = 1
    sum: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor
    positions: slice = field(default_factory=lambda: slice(None))


@dataclass(frozen=True)
class Task:
    """A task: token ids of each item's prompt, token ids of each candidate word, and the index of
    the right word of each item.

    ``vectors``: of each prompt, float32 (n, P) of its placeholders in turn, where the medium is
    continuous; else none. The model reads them as clean data.
    """

    name: str
    prompts: list[list[int]]
    candidates: list[tuple[int, ...]]
    answers: list[int]
    vocabulary: Vocabulary
    vectors: list[np.ndarray] = field(default_factory=list)

    @property
    def chance(self) -> float:
        """Accuracy of always choosing the most frequent answer."""
        return max(self.answers.count(i) for i in set(self.answers)) / len(self.answers)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt, with all but the last token of a word."""
        return max(map(len, self.prompts)) + max(map(len, self.candidates)) - 1

    def accuracy(
        self,
        model: Decoder | Pipeline,
        batches: list[MixedBatch],
        ranks: Ranks,
        settings: ForwardSettings | None = None,
    ) -> float:
        """Share of items for which the model chooses the right word.

        Prompts are put into the rows of ``batches``, each rank's into its own rows, so that the
        result does not depend on the number of ranks.
        """
        chosen: list[tuple[int, ...]] = [() for _ in self.prompts]
        while undecided := [i for i, word in enumerate(chosen) if word not in self.candidates]:
            prompts = [
                Prompt(
                    self.prompts[i] + list(chosen[i]),
                    torch.from_numpy(self.vectors[i]) if self.vectors else None,
                )
                for i in undecided
            ]
            picked = torch.zeros(len(prompts), dtype=torch.int64)
            for at, logits_V in self._last_logits(model, prompts, batches, ranks, settings):
                begun = chosen[undecided[at]]
                options = {w[len(begun)] for w in self.candidates if w[: len(begun)] == begun}
                picked[at] = max(sorted(options), key=lambda token: float(logits_V[token]))
            for item, token in zip(undecided, ranks.sum(picked).tolist(), strict=True):
                chosen[item] = (*chosen[item], token)
        words = [self.candidates[answer] for answer in self.answers]
        return sum(map(eq, words, chosen)) / len(words)

    def _last_logits(
        self,
        model: Decoder | Pipeline,
        prompts: list[Prompt],
        batches: list[MixedBatch],
        ranks: Ranks,
        settings: ForwardSettings | None,
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Index of each prompt that ends on this rank, and the logits (V,) after it.

        Pipeline ranks without the head yield none.
        """
        device = next(model.parameters()).device
        rows, seq_len = batches[0].tokens_BS.shape
        longest = max(len(prompt.tokens) for prompt in prompts)
        per_row = max(1, int(PROMPT_SHARE * seq_len / longest))
        own = per_row * rows
        here = range(seq_len)[ranks.positions]
        for number, start in enumerate(range(0, len(prompts), own * ranks.count)):
            first = start + ranks.rank * own
            batch, ends = self._overlay(
                prompts[first : first + own], batches[number % len(batches)], per_row
            )
            batch = batch.part(ranks.positions).to(device)
            logits_BSV = model(batch, settings)
            for at, (row, end) in enumerate(ends if logits_BSV is not None else (), start=first):
                if end in here:
                    yield at, logits_BSV[row, end - here.start]

    def _overlay(
        self, prompts: list[Prompt], batch: MixedBatch, per_row: int
    ) -> tuple[MixedBatch, list[tuple[int, int]]]:
        """``batch`` with ``per_row`` prompts at the start of each row; row and end of each."""
        batch = replace(batch, **{name: t.clone() for name, t in batch.tensors().items()})
        ends: list[tuple[int, int]] = []
        for row, first in enumerate(range(0, len(prompts), per_row)):
            stop = 0
            for number, prompt in enumerate(prompts[first : first + per_row], start=1):
                begin, stop = stop, stop + len(prompt.tokens)
                self._put(batch, row, begin, prompt)
                batch.document_BS[row, begin:stop] = number
                ends.append((row, stop - 1))
            batch.span_BS[row, :stop] = spans(batch.modality_BS[row : row + 1, :stop])
            rest, rest_span = batch.document_BS[row, stop:], batch.span_BS[row, stop:]
            # the rest of the document under the last prompt becomes a document of its own
            tail = (rest == rest[:1]) & (rest != PADDING)
            positions = batch.positions_BS[row, stop:]
            positions[tail] -= positions[:1]
            # numbers distinct from those of prompts
            rest[rest != PADDING] += per_row
            rest_span[rest_span != 0] += stop
        return batch, ends

    def _put(self, batch: MixedBatch, row: int, begin: int, prompt: Prompt) -> None:
        """Write tokens, modalities, positions and vectors of ``prompt`` into ``batch``."""
        here = slice(begin, begin + len(prompt.tokens))
        tokens = torch.tensor(prompt.tokens)
        batch.tokens_BS[row, here] = tokens
        batch.modality_BS[row, here] = self.vocabulary.modality_of(tokens)
        batch.positions_BS[row, here] = torch.arange(len(tokens))
        if batch.vectors_BSP is None or batch.has_vector_BS is None:
            assert prompt.vectors is None, "the tokenizers of the batch made the prompts"
            return
        has_vector = self.vocabulary.holds_vector(tokens)
        batch.has_vector_BS[row, here] = has_vector
        batch.vectors_BSP[row, here] = 0
        if prompt.vectors is not None:
            batch.vectors_BSP[row, here][has_vector] = prompt.vectors


def load_tasks(folder: Path) -> list[Task]:
    """The tasks of a prepared data folder, tokenised; ``ValueError`` naming file and field."""
    path = folder / "validation" / "tasks.json"
    if not path.exists():
        return []
    described = read_json(path, "copy it again, remove it, or turn tasks off: --validator.no-tasks")
    tokenizers = Tokenizers.load(folder / "tokenizers")
    return [_task(fields, tokenizers) for fields in described.objects("tasks")]


def _task(fields: JsonObject, tokenizers: Tokenizers) -> Task:
    text, vocabulary = tokenizers.text, tokenizers.vocabulary
    name, words = fields.field("name", str), fields.items("candidates", str)
    if not name.isprintable() or not name:
        raise fields.wrong("name", "must be a name")
    if not words or len(set(words)) < len(words):
        raise fields.wrong("candidates", "must be one or more different words")
    try:
        whole = [text.encode(fields.field("prefix", str) + word) for word in words]
        prefix, candidates = _split_prefix(whole)
    except ValueError as error:  # UnicodeEncodeError too
        raise fields.wrong("candidates", f"must be distinct words: {error}") from error
    items = fields.objects("items")
    if not items:
        raise fields.wrong("items", "must not be empty")
    answers = [words.index(item.field("answer", str, choices=words)) for item in items]
    if any(FRAMES in item for item in items):
        blocks = [_video(item, tokenizers) for item in items]
    else:
        label = next((name for name in MEDIA if any(name in item for item in items)), "image")
        tokenizer = media_tokenizer(label, tokenizers, items[0].where)
        blocks = [
            tokenizers.block_of(label, decoded(item, label, tokenizer.features)) for item in items
        ]
    prompts = [[vocabulary.bos, *block, *prefix] for block, _ in blocks]
    vectors = [found for _, found in blocks if found is not None]
    return Task(name, prompts, candidates, answers, vocabulary, vectors)


def media_tokenizer(label: str, tokenizers: Tokenizers, where: str) -> MediaTokenizer:
    """The tokenizer of medium ``label``; ``ValueError`` naming the file ``where`` it is needed."""
    if label not in tokenizers.media:
        raise ValueError(
            f"{where} has {MEDIA[label].list_name}, but the data folder has no {label} tokenizer; "
            "remove the file, or prepare with one"
        )
    return tokenizers.media[label]


def _video(item: JsonObject, tokenizers: Tokenizers) -> tuple[list[int], np.ndarray | None]:
    """``Tokenizers.block_of`` the item's frames."""
    tokenizer = media_tokenizer("image", tokenizers, item.where)
    medium = tokenizers.vocabulary.medium(MEDIA["image"].modality)
    frames = [JsonObject({"image": f}, item.where, item.remedy) for f in item.items(FRAMES, str)]
    if not 1 <= len(frames) <= (1 if medium.separator is None else MOST_FRAMES):
        raise item.wrong(FRAMES, "must be one or more images; several need a frame separator")
    pixels = [decoded(frame, "image", tokenizer.features) for frame in frames]
    return tokenizers.block_of("image", *pixels)


def decoded(fields: JsonObject, label: str, decode: Callable[[bytes], np.ndarray]) -> np.ndarray:
    """Features of the base64 file in field ``label``; ``ValueError`` if it is damaged."""
    encoded = fields.field(label, str)
    try:
        return decode(base64.b64decode(encoded, validate=True))
    except ValueError as error:  # BadSample and binascii.Error too
        item = MEDIA[label].item
        raise fields.wrong(label, f"must be base64 of an {item} file: {error}") from error


def _split_prefix(texts: list[list[int]]) -> tuple[list[int], list[tuple[int, ...]]]:
    """The common prefix of all token lists, and the rest of each."""
    length = 0
    while all(length < len(text) and text[length] == texts[0][length] for text in texts):
        length += 1
    rests = [tuple(text[length:]) for text in texts]
    for i, rest in enumerate(rests):
        if any(j != i and other[: len(rest)] == rest for j, other in enumerate(rests)):
            raise ValueError(f"candidate {i} is the beginning of another one")
    return texts[0][:length], rests
