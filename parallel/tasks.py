"""Task checks: does the right word follow a held-out image?

``validation/tasks.json`` of a data folder lists tasks; each item is an image and the word that
should follow it. The model reads begin-of-document, the image and the task's prefix, and picks
among the candidate words by the next token, again and again where several candidates begin alike.
The answer is never in the input, so look-ahead in routing cannot give it away.
"""

import base64
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from earlyfuse.data.tokenizers.image import load_image_tokenizer
from earlyfuse.data.tokenizers.pixels import image_pixels
from earlyfuse.data.tokenizers.text import TextTokenizer
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.modality import Modality, Vocabulary


@dataclass(frozen=True)
class Task:
    """``prompts``: token ids of each item; ``candidates``: token ids of each word; ``answers``:
    index of the right one.
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

    def accuracy(self, model: Decoder, seq_len: int, rows: int) -> float:
        """Share of items whose word the model picks. Rows of ``seq_len`` are packed, ``rows`` at a
        time.
        """
        chosen: list[tuple[int, ...]] = [() for _ in self.prompts]
        while True:
            open_items = [i for i, words in enumerate(chosen) if words not in self.candidates]
            if not open_items:
                break
            prompts = [self.prompts[i] + list(chosen[i]) for i in open_items]
            for item, logits_V in zip(
                open_items, self._last_logits(model, prompts, seq_len, rows), strict=True
            ):
                begun = chosen[item]
                options = {
                    word[len(begun)] for word in self.candidates if word[: len(begun)] == begun
                }
                chosen[item] = (
                    *begun,
                    max(sorted(options), key=lambda token: float(logits_V[token])),
                )
        right = [
            self.candidates[answer] == word
            for answer, word in zip(self.answers, chosen, strict=True)
        ]
        return sum(right) / len(right)

    def _last_logits(
        self, model: Decoder, prompts: list[list[int]], seq_len: int, rows: int
    ) -> list[torch.Tensor]:
        """Logits (V,) after each prompt; prompts are packed whole, each a document of its own."""
        device = next(model.parameters()).device
        per_row = seq_len // max(len(prompt) for prompt in prompts)
        results: list[torch.Tensor] = []
        for start in range(0, len(prompts), per_row * rows):
            part = prompts[start : start + per_row * rows]
            tokens_BS = torch.full((rows, seq_len), self.vocabulary.pad, dtype=torch.int64)
            positions_BS = torch.zeros(rows, seq_len, dtype=torch.int64)
            ends: list[tuple[int, int]] = []
            for number, prompt in enumerate(part):
                row, place = divmod(number, per_row)
                begin = ends[-1][1] + 1 if place else 0
                stop = begin + len(prompt)
                tokens_BS[row, begin:stop] = torch.tensor(prompt)
                positions_BS[row, begin:stop] = torch.arange(len(prompt))
                ends.append((row, stop - 1))
            modality_BS = self.vocabulary.modality_of(tokens_BS)
            logits_BSV = model(
                tokens_BS.to(device), modality_BS.to(device), positions_BS.to(device)
            )
            results += [logits_BSV[row, end] for row, end in ends]
        return results


def load_tasks(folder: Path) -> list[Task]:
    """Tasks of a prepared data folder, tokenised; none if it brings none."""
    path = folder / "validation" / "tasks.json"
    if not path.exists():
        return []
    tokenizers = folder / "tokenizers"
    text = TextTokenizer((tokenizers / "text.model").read_bytes())
    images = load_image_tokenizer(tokenizers / "image.safetensors")
    vocabulary = Vocabulary.from_dict(json.loads((tokenizers / "vocabulary.json").read_text()))
    medium = vocabulary.medium(Modality.IMAGE)
    tasks = []
    for fields in json.loads(path.read_text())["tasks"]:
        prefix, candidates = _split_prefix(
            [text.encode(fields["prefix"] + w) for w in fields["candidates"]]
        )
        encoded = [base64.b64decode(item["image"]) for item in fields["items"]]
        pixels = np.stack([image_pixels(image, images.image_size) for image in encoded])
        prompts = [
            [vocabulary.bos, medium.begin, *(codes + medium.start).tolist(), medium.end, *prefix]
            for codes in images.encode(pixels)
        ]
        answers = [fields["candidates"].index(item["answer"]) for item in fields["items"]]
        tasks.append(Task(fields["name"], prompts, candidates, answers, vocabulary))
    return tasks


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
