"""Evaluation tasks: scores are right, and the answer is never in the input."""

import base64
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from batches import batch_of
from tiny_pairs import make_pairs, pixels, png
from toy import VOCABULARY

from earlyfuse.data.tokenizers import Tokenizers
from earlyfuse.models.batch import MixedBatch, places_in_documents
from earlyfuse.models.vocabulary import MediaCodes, Modality, Vocabulary
from earlyfuse.parallel.evaluation.eval_tasks import Ranks, Task, load_tasks

WORDS = [(10,), (11, 12), (11, 13, 14)]  # two of them begin alike


def prompts(number: int) -> list[list[int]]:
    return [[0, 3, *(32 + (i + j) % 16 for j in range(4)), 4, 20 + i] for i in range(number)]


def batches(rows: int = 2, seq_len: int = 40) -> list[MixedBatch]:
    tokens = torch.randint(5, 32, (rows, seq_len), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(seq_len).expand(rows, seq_len) % 15
    return [batch_of(tokens, VOCABULARY.modality_of(tokens), positions)] * 2


class Oracle(torch.nn.Module):
    """Knows the right word of every prompt, from the document around the position alone."""

    def __init__(self, words: list[tuple[int, ...]]):
        super().__init__()
        self.words, self.weight = words, torch.nn.Parameter(torch.zeros(1))
        self.seen: list[MixedBatch] = []

    def forward(self, batch, settings):
        self.seen.append(batch)
        logits = torch.zeros(*batch.tokens_BS.shape, VOCABULARY.size)
        place_BS = places_in_documents(batch.document_BS)
        assert torch.equal(place_BS, batch.positions_BS)
        for row, tokens in enumerate(batch.tokens_BS.tolist()):
            for place in range(len(tokens)):
                start = place - int(place_BS[row, place])
                document = tokens[start : place + 1]
                for number, prompt in enumerate(prompts(len(self.words))):
                    rest = tuple(document[len(prompt) :])
                    word = self.words[number]
                    if document[: len(prompt)] == prompt and word[: len(rest)] == rest != word:
                        logits[row, place, word[len(rest)]] = 1
        return logits


def task(answers: list[int]) -> Task:
    return Task("toy", prompts(len(answers)), WORDS, answers, VOCABULARY)


def test_a_model_that_knows_scores_one_and_one_that_errs_scores_its_share():
    answers = [0, 1, 2, 2, 1, 0, 2]
    assert task(answers).accuracy(Oracle([WORDS[a] for a in answers]), batches(), Ranks()) == 1
    wrong = [WORDS[a] for a in answers]
    wrong[1], wrong[3] = WORDS[2], WORDS[0]
    assert task(answers).accuracy(Oracle(wrong), batches(), Ranks()) == pytest.approx(5 / 7)
    assert task(answers).chance == pytest.approx(3 / 7)


def test_the_answer_is_never_in_the_input():
    answers = [0, 0, 0, 0]
    model = Oracle([WORDS[0]] * 4)
    task(answers).accuracy(model, batches(), Ranks())
    for batch in model.seen:
        for row, tokens in enumerate(batch.tokens_BS.tolist()):
            for place in range(1, len(tokens)):
                after_a_prompt = tokens[place - 1] >= 20 and tokens[place - 2] == 4
                assert not (after_a_prompt and batch.positions_BS[row, place] > 0), (
                    "a document goes on"
                )


def test_prompts_lie_among_untouched_held_out_data():
    model = Oracle([WORDS[0]] * 4)
    task([0, 0, 0, 0]).accuracy(model, batches(), Ranks())
    seen, original = model.seen[0], batches()[0]
    assert torch.equal(seen.tokens_BS[:, 8:], original.tokens_BS[:, 8:])
    assert seen.positions_BS[0, 8:15].tolist() == list(range(7)), (
        "the rest of a document begins anew"
    )
    assert torch.equal(seen.positions_BS[:, 15:], original.positions_BS[:, 15:])
    assert torch.equal(seen.modality_BS, VOCABULARY.modality_of(seen.tokens_BS))


def test_prompts_bring_their_vectors_and_leave_those_of_the_rest(seq_len=60, width=3):
    images = MediaCodes(Modality.IMAGE, 48, 1, begin=3, end=4)
    vocabulary = Vocabulary(49, bos=0, eos=1, pad=2, media=(images,))
    # documents of an image and its clean copy: their positions and spans are not those of tokens
    document = [0, 3, *[48] * 16, 4, 9, 10, 1]
    tokens = torch.tensor([(document * 3)[:seq_len]] * 2)
    modality = vocabulary.modality_of(tokens)
    places = torch.tensor([*range(10), *range(2, 14)]).repeat(3)[:seq_len].repeat(2, 1)
    at = torch.arange(seq_len)
    span = modality.int() * (at // 22 * 2 + 1 + (at % 22 > 9))
    batch = batch_of(tokens, modality, places)
    batch = replace(
        batch,
        span_BS=span.int(),
        has_vector_BS=modality == 1,
        vectors_BSP=torch.randn(2, seq_len, width) * modality[..., None],
    )
    before = {name: tensor.clone() for name, tensor in batch.tensors().items()}
    prompts = [[0, 3, 48, 48, 48, 48, 4, 20 + i] for i in range(4)]
    vectors = [np.full((4, width), i + 1, np.float32) for i in range(4)]
    seen = []

    def model(batch, settings):
        seen.append(batch)
        return torch.zeros(*batch.tokens_BS.shape, vocabulary.size)

    module = torch.nn.Linear(1, 1)
    module.forward = model
    Task("toy", prompts, [(10,), (11,)], [0] * 4, vocabulary, vectors).accuracy(
        module, [batch], Ranks()
    )
    length = len(prompts[0])
    assert len(seen) == 4 / 2, "a quarter of each row"
    for number, found in enumerate(seen):
        assert torch.equal(found.has_vector_BS, found.tokens_BS == 48) and found.time_BS is None
        assert not found.vectors_BSP[~found.has_vector_BS].any()
        for row in range(2):
            assert found.tokens_BS[row, :length].tolist() == prompts[2 * number + row]
            assert (found.vectors_BSP[row, 2:6] == 1 + 2 * number + row).all()
            assert found.span_BS[row, :length].tolist() == [0, 0, 1, 1, 1, 1, 0, 0]
        for name in ("tokens_BS", "vectors_BSP", "has_vector_BS", "labels_BS", "modality_BS"):
            assert torch.equal(getattr(found, name)[:, length:], before[name][:, length:]), name
        # the copies that lie behind the prompt keep their distances, and spans of their own
        moved = before["positions_BS"] - found.positions_BS
        assert (moved[:, length:22] == moved[:, length : length + 1]).all()
        assert torch.equal(found.positions_BS[:, 22:], before["positions_BS"][:, 22:])
        rest, was = found.span_BS[:, length:], before["span_BS"][:, length:]
        assert torch.equal(rest != 0, was != 0) and 1 not in rest
        assert torch.equal(rest[:, :, None] == rest[:, None], was[:, :, None] == was[:, None])
    assert all(torch.equal(before[name], tensor) for name, tensor in batch.tensors().items())


def test_tasks_of_a_folder_are_tokenised_as_training_data_is(tmp_path):
    folder = make_pairs(tmp_path / "data")
    assert load_tasks(folder) == []
    shades, words = (0, 3), ("silver", "coal")
    items = [
        {"image": base64.b64encode(png(shade)).decode(), "answer": word}
        for shade, word in zip(shades, reversed(words), strict=True)
    ]
    fields = {"name": "shade", "prefix": "shade ", "candidates": list(words), "items": items}

    def tasks() -> list[Task]:
        (folder / "validation" / "tasks.json").write_text(json.dumps({"tasks": [fields]}))
        return load_tasks(folder)

    (loaded,) = tasks()
    assert loaded.answers == [1, 0] and loaded.chance == 0.5
    tokenizers = Tokenizers.load(folder / "tokenizers")
    text, images = tokenizers.text, tokenizers.image
    for prompt, shade in zip(loaded.prompts, shades, strict=True):
        codes = images.encode(pixels(shade)[None])[0] + text.size
        assert prompt[:2] == [text.bos, text.begin["image"]]
        assert prompt[2 : 2 + images.block] == codes.tolist()
        for candidate, word in zip(loaded.candidates, words, strict=True):
            assert prompt[3 + images.block :] + list(candidate) == text.encode("shade " + word)
    fields["candidates"] = ["coal", "coal and iron"]
    with pytest.raises(ValueError, match="beginning of another"):
        tasks()
