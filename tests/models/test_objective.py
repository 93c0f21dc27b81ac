"""Chameleon's objective: sums by label modality, z-loss on shifted labels."""

import pytest
import torch
import torch.nn.functional as F
from batches import batch_of
from toy import VOCABULARY

from earlyfuse.models.objectives.next_token import ChameleonObjective
from earlyfuse.models.objectives.sums import label_counts
from earlyfuse.models.vocabulary import Modality

B, S, D, V = 2, 10, 6, VOCABULARY.size


def case():
    """Hidden states (B·S, D), a head (V, D), labels (B, S)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B * S, D, generator=generator, requires_grad=True)
    w = torch.randn(V, D, generator=generator, requires_grad=True)
    labels = torch.randint(0, V, (B, S), generator=generator)
    labels[0, :3] = -100
    return x, w, labels


def sums_of(x, w, labels, **config):
    modality = VOCABULARY.modality_of(labels)
    batch = batch_of(labels, labels_BS=labels, label_modality_BS=modality)
    return ChameleonObjective.Config(**config).build().loss_of(batch)(x, w)


def test_loss_is_cross_entropy_plus_z_loss_over_counted_labels():
    x, w, labels = case()
    counted = labels.flatten() != -100
    total = sums_of(x, w, labels, z_loss=0.1).total / counted.sum()
    logits = F.linear(x, w)
    z = logits.logsumexp(-1)[counted].square().mean()
    expected = F.cross_entropy(logits, labels.flatten(), ignore_index=-100) + 0.1 * z
    torch.testing.assert_close(total, expected)
    for found, wanted in zip(
        *(torch.autograd.grad(loss, (x, w)) for loss in (total, expected)), strict=True
    ):
        torch.testing.assert_close(found, wanted)


def test_sums_are_split_by_the_modality_of_the_label():
    x, w, labels = case()
    (nll_M,) = sums_of(x, w, labels).sums["loss"]
    nll = F.cross_entropy(F.linear(x, w), labels.flatten(), ignore_index=-100, reduction="none")
    image = labels.flatten() >= 32
    expected = [nll[~image].sum(), nll[image].sum(), torch.zeros(())]
    torch.testing.assert_close(nll_M, torch.stack(expected).detach())


def test_a_modality_registered_at_run_time_has_a_loss(monkeypatch):
    monkeypatch.setattr(Modality, "LABELS", [*Modality.LABELS])
    depth = Modality.register("depth")
    x, w, labels = case()
    modality = torch.full_like(labels, depth, dtype=torch.uint8)
    batch = batch_of(labels, labels_BS=labels, label_modality_BS=modality)
    losses = ChameleonObjective.Config(z_loss=0.0).build().loss_of(batch)(x, w)
    assert losses.sums["loss"].tolist() == [[0, 0, 0, pytest.approx(losses.total.item())]]
    assert label_counts(batch, 1).tolist() == [[0, 0, 0, 2 * S - 3]]


def test_a_batch_without_labels_costs_nothing_and_has_a_gradient():
    x, w, labels = case()
    total = sums_of(x, w, torch.full_like(labels, -100)).total / 7
    total.backward()
    assert total == 0 and (x.grad == 0).all() and (w.grad == 0).all()


def test_two_micro_batches_over_the_global_count_equal_one_batch():
    x, w, labels = case()
    count = int((labels != -100).sum())
    whole = sums_of(x, w, labels).total / count
    parts = [sums_of(x[i * S :][:S], w, labels[i : i + 1]).total / count for i in range(B)]
    torch.testing.assert_close(whole, sum(parts))


def test_negative_z_loss_is_refused():
    with pytest.raises(ValueError, match=r"z_loss \(-1.0\) must not be negative"):
        ChameleonObjective.Config(z_loss=-1.0)
