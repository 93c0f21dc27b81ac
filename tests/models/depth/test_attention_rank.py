"""Ranks of attention maps equal those of maps computed in plain torch, a document at a time."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from batches import built, random_batch
from tiny_runs import MAMBAS, MODELS

from earlyfuse.configs import decoders
from earlyfuse.models.batch import MixedBatch
from earlyfuse.models.context import ForwardContext
from earlyfuse.models.depth.attention_rank import (
    Sample,
    attention_ranks,
    attentions,
    check_comparable,
    samples_in,
)

DOCUMENTS = torch.tensor([[1] * 13 + [2] * 8 + [0] * 3, [1] * 3 + [2] * 21], dtype=torch.int32)
GROUPED = {
    "dense": lambda: decoders.dense(
        decoders.Shape(dim=48, layers=2, heads=4, kv_heads=2, hidden_dim=48, vocab_size=48)
    ),
    "mot": MODELS["mot"],
}


def context_of(model, batch: MixedBatch) -> ForwardContext:
    config = model.config
    return ForwardContext.build(
        batch,
        modalities=config.modalities,
        head_dim=config.head_dim,
        rope_theta=config.rope_theta,
    )


def plain_ranks(attention, x_SD: torch.Tensor, modality_S: torch.Tensor) -> list[int]:
    """Ranks of the maps of a document: no code of ours but the parameters."""
    config, size = attention.config, len(x_SD)

    def of_token(parameter):
        """(S, …): the set of each token's modality, or the shared one."""
        if config.groups > 1:
            return parameter[modality_S.long()]
        return parameter.expand(size, *parameter.shape)

    def turned(linear, norm):
        y = torch.einsum("sd,sfd->sf", x_SD, of_token(linear.weight))
        y = y.unflatten(1, (-1, config.head_dim))
        y = F.layer_norm(y, (config.head_dim,), eps=1e-5)
        y = y * of_token(norm.weight) + of_token(norm.bias)
        half = config.head_dim // 2
        rate = 10_000.0 ** (-torch.arange(half) / half)
        turn = torch.polar(torch.ones(()), torch.arange(size)[:, None] * rate)[:, None]
        y = torch.complex(y[..., :half], y[..., half:]) * turn
        return torch.cat([y.real, y.imag], -1)

    q, k = turned(attention.wq, attention.q_norm), turned(attention.wk, attention.k_norm)
    ranks = []
    for head in range(config.heads):
        key = k[:, head * config.kv_heads // config.heads]
        score = q[:, head] @ key.T / math.sqrt(config.head_dim)
        later = torch.arange(size) > torch.arange(size)[:, None]
        weights = torch.where(later, -torch.inf, score).softmax(-1).tril(-1)
        values = torch.linalg.svd(weights)[1]
        ranks.append(int((values > size * torch.finfo(torch.float32).eps * values[0]).sum()))
    return ranks


def sharpened(config):
    """A random model whose attention is so sharp that ranks differ and are not full."""
    model = built(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_norm.weight" in name:
                parameter *= 12
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", GROUPED)
def test_ranks_equal_those_of_plain_code_on_each_document_alone(name):
    model = sharpened(GROUPED[name]())
    batch = random_batch(document_BS=DOCUMENTS)
    samples = samples_in(batch, shortest=4, longest=16)
    assert samples == [Sample(0, 0, 13), Sample(0, 13, 21), Sample(1, 3, 19)]
    found_LP = attention_ranks(model, batch, samples)
    distinct = set()
    for column, (row, start, stop) in enumerate(samples):
        place = slice(start, stop)
        modality = batch.modality_BS[row : row + 1, place]
        alone = MixedBatch.of(batch.tokens_BS[row : row + 1, place], modality)
        context, x_SD = context_of(model, alone), model.tok_embeddings(alone.tokens_BS[0])
        for index, layer in model.layers.items():
            heads = plain_ranks(layer.attention, x_SD, modality[0])
            assert found_LP[int(index), column] == sum(heads) / len(heads), (name, index, column)
            distinct |= {stop - start - 1 - rank for rank in heads}
            x_SD = layer(x_SD, context)
    assert len(distinct) > 2  # else full rank everywhere would pass


def maps_of(model, logit_S: torch.Tensor) -> torch.Tensor:
    """Ranks (L,) of a document where every query gives key s the logit ``logit_S[s]``."""
    for layer in model.layers.values():
        attention = layer.attention
        heads, width = attention.config.heads, attention.config.head_dim
        q_1SNH = torch.zeros(1, len(logit_S), heads, width)
        q_1SNH[..., 0] = width**0.5
        k_1SNH = torch.zeros_like(q_1SNH)
        k_1SNH[..., 0] = logit_S[None, :, None]
        attention.queries_and_keys = lambda x, c, q=q_1SNH, k=k_1SNH: (q, k)
    batch = random_batch(rows=1, seq_len=len(logit_S))
    return attention_ranks(model, batch, [Sample(0, 0, len(logit_S))])[:, 0]


@pytest.mark.parametrize(
    ("logits", "rank"),
    [
        ([0.0] * 9, 8),  # uniform: the triangle below the diagonal, of full rank
        ([200.0] + [0.0] * 8, 1),  # all weight on the first token
        ([0.0] * 3 + [-200.0] * 6, 3),  # the same on each of the first three
        ([200.0 * s for s in range(9)], 0),  # on the token itself
    ],
)
def test_maps_of_known_rank(logits, rank):
    assert maps_of(built(MODELS["dense"]()), torch.tensor(logits)).tolist() == [rank, rank]


@torch.no_grad()
def test_the_maps_are_those_that_attention_uses(monkeypatch):
    """Their product with the values, through ``wo``, is the output of attention."""
    from earlyfuse.models.depth import attention_rank

    maps, model = [], built(GROUPED["dense"]())
    kept = attention_rank.attention_map
    monkeypatch.setattr(
        attention_rank, "attention_map", lambda *given: maps.append(kept(*given)) or maps[-1]
    )
    batch = random_batch(rows=1)
    attention, outputs = model.layers["0"].attention, []
    attention.register_forward_hook(lambda _, given, out: outputs.append((given[0], out)))
    attention_ranks(model, batch, [Sample(0, 0, 24)])
    ((x_SD, expected_SD),) = outputs
    v_SKH = attention.wv(x_SD, context_of(model, batch)).unflatten(-1, (2, -1))
    heads = [one @ v_SKH[:, head // 2] for head, one in enumerate(maps[:4])]
    torch.testing.assert_close(torch.cat(heads, -1) @ attention.wo.weight.T, expected_SD)


def test_measuring_leaves_the_model_as_it_was_and_layers_without_attention_without_rank():
    model, batch = built(MAMBAS["hybrid"]()), random_batch()
    before = model(batch)
    ranks_LP = attention_ranks(model, batch, samples_in(batch, shortest=2, longest=24))
    assert ranks_LP.isnan().all(1).tolist() == [False, True, True]
    assert list(attentions(model)) == [0]
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(batch), before)


def test_models_whose_maps_say_nothing_are_refused():
    config = SimpleNamespace(layers=[SimpleNamespace(depth=None), SimpleNamespace(depth=object())])
    with pytest.raises(ValueError, match=r"layers\[1\] is depth-routed"):
        check_comparable(config)
    model = built(MODELS["dense"]())
    model.layers["1"].attention.wq.weight.data[0] = math.nan
    with pytest.raises(ValueError, match=r"layers\[1\] has queries or keys that are no numbers"):
        attention_ranks(model, random_batch(), [Sample(0, 0, 8)])
