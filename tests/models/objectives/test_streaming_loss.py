"""VideoLLM-online's streaming loss: the decision after each frame has a weight of its own."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from toy import VOCABULARY

from earlyfuse.models.batch import MixedBatch
from earlyfuse.models.objectives.next_token import ChameleonObjective, frame_ends

D, V, TAU = 6, VOCABULARY.size + 1, 2.5
IMAGES = replace(VOCABULARY.media[0], separator=VOCABULARY.size)
FRAME = [32, 33, 34, 35]
# two frames, a word, an image, a word; then a video that goes on behind the end of the row
ROWS = [
    [0, *IMAGES.block_of([FRAME, FRAME]), 9, *IMAGES.block_of([FRAME]), 8, 1],
    [0, 7, 6, 5, 9, 8, *IMAGES.block_of([FRAME, FRAME, FRAME])[:-1]],
]


def batch_of_videos():
    tokens = torch.tensor(ROWS)
    after = torch.tensor([[-100], [IMAGES.separator]])
    labels = torch.cat([tokens[:, 1:], after], 1)
    return MixedBatch.of(
        tokens,
        VOCABULARY.modality_of(tokens),
        labels_BS=labels,
        label_modality_BS=VOCABULARY.modality_of(labels),
    )


def case():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 * len(ROWS[0]), D, generator=generator, requires_grad=True)
    w = torch.randn(V, D, generator=generator, requires_grad=True)
    return x, w, batch_of_videos()


def losses_of(x, w, batch, **config):
    return ChameleonObjective.Config(**config).build().loss_of(batch)(x, w)


def test_the_decision_is_at_the_last_token_of_each_frame():
    batch = batch_of_videos()
    ends = frame_ends(batch)
    assert ends[0].nonzero().flatten().tolist() == [5, 10, 17]
    assert ends[1].nonzero().flatten().tolist() == [10, 15, 20]
    silent, speak = IMAGES.separator, IMAGES.end
    assert batch.labels_BS[ends].tolist() == [silent, speak, speak, silent, silent, silent]
    assert batch.span_BS[1].tolist() == [0] * 7 + [1] * 4 + [0] + [2] * 4 + [0] + [3] * 4


def test_weighted_terms_are_divided_by_the_number_of_labels():
    x, w, batch = case()
    labels = batch.labels_BS.flatten()
    count = (labels != -100).sum()
    total = losses_of(x, w, batch, z_loss=0.0, stream_loss_weight=TAU).total / count
    weight = torch.ones(labels.shape).masked_fill(frame_ends(batch).flatten(), TAU)
    each = F.cross_entropy(F.linear(x, w), labels, reduction="none")
    expected = (each * weight).sum() / count
    torch.testing.assert_close(total, expected)
    for found, wanted in zip(
        *(torch.autograd.grad(loss, (x, w)) for loss in (total, expected)), strict=True
    ):
        torch.testing.assert_close(found, wanted)


def test_logged_losses_are_without_the_weight():
    x, w, batch = case()
    plain, weighted = (losses_of(x, w, batch, stream_loss_weight=t).sums for t in (1.0, TAU))
    assert plain.keys() == weighted.keys()
    assert all(torch.equal(plain[name], weighted[name]) for name in plain)


def test_a_weight_of_one_changes_no_bit():
    x, w, batch = case()
    found = []
    for config in ({}, {"stream_loss_weight": 1.0}):
        total = losses_of(x, w, batch, **config).total
        found.append((total, *torch.autograd.grad(total, (x, w))))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("weight", [-1.0, float("inf"), float("nan")])
def test_a_weight_out_of_range_is_refused(weight):
    with pytest.raises(ValueError, match=r"stream_loss_weight .* must not be negative"):
        ChameleonObjective.Config(stream_loss_weight=weight)
