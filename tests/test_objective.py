"""Chameleon's objective: sums by label modality, z-loss on shifted labels."""

import pytest
import torch
import torch.nn.functional as F
from toy import VOCABULARY

from earlyfuse.models.objectives.chameleon import ChameleonObjective

B, S, V = 2, 10, VOCABULARY.size


def case():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(B, S, V, generator=generator, requires_grad=True)
    labels = torch.randint(0, V, (B, S), generator=generator)
    labels[0, :3] = -100
    return logits, labels, VOCABULARY.modality_of(labels)


def test_loss_is_cross_entropy_plus_z_loss_over_counted_labels():
    logits, labels, modality = case()
    objective = ChameleonObjective.Config(z_loss=0.1).build()
    counted = labels != -100
    total = objective.total(objective.sums(logits, labels, modality), int(counted.sum()))
    z = logits.logsumexp(-1)[counted].square().mean()
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100) + 0.1 * z
    torch.testing.assert_close(total, expected)
    gradients = [
        torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (total, expected)
    ]
    torch.testing.assert_close(*gradients)


def test_sums_are_split_by_the_modality_of_the_label():
    logits, labels, modality = case()
    sums = ChameleonObjective.Config().build().sums(logits, labels, modality)
    nll = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none"
    ).view(B, S)
    image = (labels >= 32) & (labels != -100)
    assert sums.count_M.tolist() == [
        int(((labels < 32) & (labels >= 0)).sum()),
        int(image.sum()),
        0,
    ]
    torch.testing.assert_close(sums.nll_M[1], nll[image].sum())
    torch.testing.assert_close(sums.nll_M.sum(), nll.sum())


def test_a_batch_without_labels_costs_nothing_and_has_a_gradient():
    logits, labels, _ = case()
    labels = torch.full_like(labels, -100)
    objective = ChameleonObjective.Config().build()
    total = objective.total(objective.sums(logits, labels, VOCABULARY.modality_of(labels)), 7)
    total.backward()
    assert total == 0 and (logits.grad == 0).all()


def test_two_micro_batches_over_the_global_count_equal_one_batch():
    logits, labels, modality = case()
    objective = ChameleonObjective.Config().build()
    count = int((labels != -100).sum())
    whole = objective.total(objective.sums(logits, labels, modality), count)
    parts = [
        objective.total(
            objective.sums(logits[i : i + 1], labels[i : i + 1], modality[i : i + 1]), count
        )
        for i in range(B)
    ]
    torch.testing.assert_close(whole, sum(parts))


def test_negative_z_loss_is_refused():
    with pytest.raises(ValueError, match=r"z_loss \(-1.0\) must not be negative"):
        ChameleonObjective.Config(z_loss=-1.0)
