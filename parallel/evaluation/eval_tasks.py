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
    """

    name: str
    prompts: list[list[int]]
    candidates: list[tuple[int, ...]]
    answers: list[int]
    vocabulary: Vocabulary

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
            prompts = [self.prompts[i] + list(chosen[i]) for i in undecided]
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
        prompts: list[list[int]],
        batches: list[MixedBatch],
        ranks: Ranks,
        settings: ForwardSettings | None,
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Index of each prompt that ends on this rank, and the logits (V,) after it.

        Pipeline ranks without the head yield none.
        """
        device = next(model.parameters()).device
        rows, seq_len = batches[0].tokens_BS.shape
        longest = max(map(len, prompts))
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
        self, prompts: list[list[int]], batch: MixedBatch, per_row: int
    ) -> tuple[MixedBatch, list[tuple[int, int]]]:
        """``batch`` with ``per_row`` prompts at the start of each row; row and end of each."""
        tokens_BS, positions_BS = batch.tokens_BS.clone(), batch.positions_BS.clone()
        document_BS = batch.document_BS.clone()
        ends: list[tuple[int, int]] = []
        for row, first in enumerate(range(0, len(prompts), per_row)):
            stop = 0
            for number, prompt in enumerate(prompts[first : first + per_row], start=1):
                begin, stop = stop, stop + len(prompt)
                tokens_BS[row, begin:stop] = torch.tensor(prompt)
                document_BS[row, begin:stop] = number
                positions_BS[row, begin:stop] = torch.arange(len(prompt))
                ends.append((row, stop - 1))
            rest = document_BS[row, stop:]
            # the rest of the document under the last prompt becomes a document of its own
            tail = (rest == rest[:1]) & (rest != PADDING)
            positions_BS[row, stop:][tail] = torch.arange(int(tail.sum()))
            rest[rest != PADDING] += per_row  # distinct from the numbers of prompts
        modality_BS = self.vocabulary.modality_of(tokens_BS)
        overlaid = replace(
            batch,
            tokens_BS=tokens_BS,
            modality_BS=modality_BS,
            span_BS=spans(modality_BS),
            document_BS=document_BS,
            positions_BS=positions_BS,
        )
        return overlaid, ends


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
        features = [decoded(item, label, tokenizer.features) for item in items]
        blocks = media_tokens(label, features, tokenizers)
    prompts = [[vocabulary.bos, *block, *prefix] for block in blocks]
    return Task(name, prompts, candidates, answers, vocabulary)


def media_tokenizer(label: str, tokenizers: Tokenizers, where: str) -> MediaTokenizer:
    """The tokenizer of medium ``label``; ``ValueError`` naming the file ``where`` it is needed."""
    if label not in tokenizers.media:
        raise ValueError(
            f"{where} has {MEDIA[label].list_name}, but the data folder has no {label} tokenizer; "
            "remove the file, or prepare with one"
        )
    return tokenizers.media[label]


def media_tokens(label: str, features: list[np.ndarray], tokenizers: Tokenizers) -> list[list[int]]:
    """Token ids of items of medium ``label``, sentinels included."""
    medium = tokenizers.vocabulary.medium(MEDIA[label].modality)
    encoded = tokenizers.media[label].encode_items(features)
    return [medium.block_of([(codes + medium.start).tolist()]) for codes in encoded]


def _video(item: JsonObject, tokenizers: Tokenizers) -> list[int]:
    """Token ids of the item's frames as a video, sentinels included."""
    tokenizer = media_tokenizer("image", tokenizers, item.where)
    medium = tokenizers.vocabulary.medium(MEDIA["image"].modality)
    frames = [JsonObject({"image": f}, item.where, item.remedy) for f in item.items(FRAMES, str)]
    if not 1 <= len(frames) <= (1 if medium.separator is None else MOST_FRAMES):
        raise item.wrong(FRAMES, "must be one or more images; several need a frame separator")
    encoded = tokenizer.encode_items([decoded(f, "image", tokenizer.features) for f in frames])
    return medium.block_of([(codes + medium.start).tolist() for codes in encoded])


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
