"""Task checks: does the right word follow a held-out image?

``validation/tasks.json`` of a data folder lists tasks; each item is an image and the word that
should follow it. The model reads begin-of-document, the image and the task's prefix, and picks
among the candidate words by the next token, again and again where several candidates begin alike.
The answer is never in the input, so look-ahead in routing cannot give it away.
"""

import base64
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from operator import eq
from pathlib import Path

import numpy as np
import torch

from earlyfuse.data.json_files import JsonObject, read_json
from earlyfuse.data.tokenizers import Tokenizers
from earlyfuse.models.batch import PADDING, MixedBatch
from earlyfuse.models.context import ForwardSettings
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.vocabulary import Modality, Vocabulary
from earlyfuse.parallel.strategies.pipeline import Pipeline

# prompts take at most this share of a row: the rest is ordinary held-out data, so that routers that
# choose among the tokens of a batch meet the mix that they were trained on
PROMPT_SHARE = 0.25


@dataclass(frozen=True)
class Ranks:
    """Data ranks that share the rows of a batch; ``sum`` adds a host tensor up over them, over the
    ranks that have other positions of these rows, and over the stages of a pipeline, of which the
    last alone has answers. ``positions``: those of each row that are here.
    """

    rank: int = 0
    count: int = 1
    sum: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor
    positions: slice = field(default_factory=lambda: slice(None))


@dataclass(frozen=True)
class Task:
    """One check.

    ``prompts``: token ids of each item; ``candidates``: token ids of each word; ``answers``: index
    of the right word of each item.
    """

    name: str
    prompts: list[list[int]]
    candidates: list[tuple[int, ...]]
    answers: list[int]
    vocabulary: Vocabulary

    @property
    def chance(self) -> float:
        """Accuracy of always naming the most frequent answer."""
        return max(self.answers.count(i) for i in set(self.answers)) / len(self.answers)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt that is ever read: with all but the last of a word."""
        return max(map(len, self.prompts)) + max(map(len, self.candidates)) - 1

    def accuracy(
        self,
        model: Decoder | Pipeline,
        batches: list[MixedBatch],
        ranks: Ranks,
        settings: ForwardSettings | None = None,
    ) -> float:
        """Share of items whose word the model picks; ``batches`` give the rows around them.

        Every rank fills its own rows of the batches with prompts, so that the answer does not
        depend on how many there are.
        """
        chosen: list[tuple[int, ...]] = [() for _ in self.prompts]
        while True:
            undecided = [i for i, word in enumerate(chosen) if word not in self.candidates]
            if not undecided:
                break
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
        """Number of each prompt that ends in this rank's part of its rows, and the logits (V,)
        after it; none where the last stage is not.
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
        """``batch`` with ``per_row`` prompts at the start of each row; where each prompt ends."""
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
            # what is left of the document below the last prompt becomes a document of its own
            cut = (rest == rest[:1]) & (rest != PADDING)
            positions_BS[row, stop:][cut] = torch.arange(int(cut.sum()))
            rest[rest != PADDING] += per_row  # its number and those behind it are not a prompt's
        modality_BS = self.vocabulary.modality_of(tokens_BS)
        overlaid = replace(
            batch,
            tokens_BS=tokens_BS,
            modality_BS=modality_BS,
            document_BS=document_BS,
            positions_BS=positions_BS,
        )
        return overlaid, ends


def load_tasks(folder: Path) -> list[Task]:
    """Tasks of a prepared data folder, tokenised; none if it brings none.

    ``ValueError`` names the file and the field of what is no task.
    """
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
        raise fields.wrong("candidates", "must be different words, at least one")
    try:
        whole = [text.encode(fields.field("prefix", str) + word) for word in words]
        prefix, candidates = _split_prefix(whole)
    except ValueError as error:  # UnicodeEncodeError too
        raise fields.wrong("candidates", f"must be words that differ: {error}") from error
    items = fields.objects("items")
    if not items:
        raise fields.wrong("items", "must hold at least one")
    answers = [words.index(item.field("answer", str, choices=words)) for item in items]
    medium_of = _utterances if any("speech" in item for item in items) else _images
    prompts = [[vocabulary.bos, *block, *prefix] for block in medium_of(items, tokenizers)]
    return Task(name, prompts, candidates, answers, vocabulary)


def _images(items: list[JsonObject], tokenizers: Tokenizers) -> list[list[int]]:
    """Tokens of the items' images, sentinels included."""
    images = tokenizers.image
    if images is None:
        raise ValueError(
            f"{items[0].where} asks for words after images, but the data folder has no image "
            "tokenizer; remove the file or prepare with images"
        )
    medium = tokenizers.vocabulary.medium(Modality.IMAGE)
    pixels = np.stack([decoded(item, "image", images.features) for item in items])
    return [
        [medium.begin, *(codes + medium.start).tolist(), medium.end]
        for codes in images.encode(pixels)
    ]


def _utterances(items: list[JsonObject], tokenizers: Tokenizers) -> list[list[int]]:
    """Tokens of the items' utterances, sentinels included."""
    speech = tokenizers.speech
    if speech is None:
        raise ValueError(
            f"{items[0].where} asks for words after speech, but the data folder has no speech "
            "tokenizer; remove the file or prepare with speech"
        )
    medium = tokenizers.vocabulary.medium(Modality.SPEECH)
    features = [decoded(item, "speech", speech.features) for item in items]
    return [
        [medium.begin, *(speech.encode(frames) + medium.start).tolist(), medium.end]
        for frames in features
    ]


def decoded(fields: JsonObject, name: str, decode: Callable[[bytes], np.ndarray]) -> np.ndarray:
    """The base64 in field ``name``, through ``decode``; ``ValueError`` for what is none."""
    encoded = fields.field(name, str)
    try:
        return decode(base64.b64decode(encoded, validate=True))
    except ValueError as error:  # BadSample and binascii.Error too
        raise fields.wrong(
            name, f"must be base64 of {'an image' if name == 'image' else 'a sound'}: {error}"
        ) from error


def _split_prefix(texts: list[list[int]]) -> tuple[list[int], list[tuple[int, ...]]]:
    """Common beginning of all token lists, and what follows it in each."""
    length = 0
    while all(length < len(text) and text[length] == texts[0][length] for text in texts):
        length += 1
    rests = [tuple(text[length:]) for text in texts]
    for i, rest in enumerate(rests):
        if any(j != i and other[: len(rest)] == rest for j, other in enumerate(rests)):
            raise ValueError(
                f"candidate {i} of a task is the beginning of another one: they must differ"
            )
    return texts[0][:length], rests
