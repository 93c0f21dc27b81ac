"""Decoding through depth-routed layers: caches hold the kept tokens of each row alone."""

import pytest
import torch
from tiny_runs import MAMBAS, MODELS, loud

from earlyfuse.models.batch import MixedBatch
from earlyfuse.models.blocks.cache import DecodeCache
from earlyfuse.models.context import ForwardSettings
from earlyfuse.models.depth.depth_router import DepthRouter
from earlyfuse.models.depth.mixture_of_depths import MixtureOfDepths
from earlyfuse.models.depth.selection import Selection
from earlyfuse.models.routing.causal_router import CausalRouter

FORMS = MODELS | MAMBAS
ROUTERS = {
    "logit": DepthRouter.Config(inference="logit", bce=0.01),
    "predictor": DepthRouter.Config(inference="predictor", predictor=CausalRouter.Config()),
}
CAUSAL = ForwardSettings(rule="causal")


def built(name: str, router: DepthRouter.Config, **selection) -> torch.nn.Module:
    config = FORMS[name]()
    config.init_std = 0.2
    for layer in config.layers:
        layer.depth = MixtureOfDepths.Config(
            router=router, selection=Selection(capacity=0.5, **selection)
        )
    model = config.build()
    model.init_states()
    loud(model)
    return model.eval()


def rows() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 48, (n,), generator=generator).tolist() for n in (9, 5, 12)]


def modality(tokens: torch.Tensor) -> torch.Tensor:
    return (tokens >= 24).to(torch.uint8)


def decoded(model, rows, prompt: int) -> list[torch.Tensor]:
    """Next-token logits of each row after ``prompt`` tokens and each further one."""
    cache, found = DecodeCache(len(rows), 12), [[] for _ in rows]
    done = [0] * len(rows)
    alive = list(range(len(rows)))
    while alive:
        new = [rows[r][done[r] : (prompt - r) if not done[r] else done[r] + 1] for r in alive]
        longest = max(map(len, new))
        tokens = torch.tensor([one + [0] * (longest - len(one)) for one in new])
        start = torch.tensor([done[r] for r in alive])
        positions = start[:, None] + torch.arange(longest)
        cache.start_step(
            torch.tensor([len(one) for one in new]),
            max(done[r] + len(one) for r, one in zip(alive, new, strict=True)),
            start == 0,
        )
        batch = MixedBatch.of(tokens, modality(tokens), positions_BS=positions)
        logits = model(batch, CAUSAL, cache=cache)
        for place, r in enumerate(alive):
            found[r].append(logits[place, 0])
            done[r] += len(new[place])
        kept = [i for i, r in enumerate(alive) if done[r] < len(rows[r])]
        if len(kept) < len(alive) and kept:
            cache.select(torch.tensor(kept))
        alive = [alive[i] for i in kept]
    return [torch.stack(one) for one in found]


@torch.no_grad()
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("name", ["dense", "mot", "moma_causal", *MAMBAS])
def test_prompt_and_decoding_are_the_whole_forward(name, router):
    model = built(name, ROUTERS[router])
    found = decoded(model, rows(), prompt=4)
    ahead = 0.0
    for r, row in enumerate(rows()):
        tokens = torch.tensor([row])
        whole = model(MixedBatch.of(tokens, modality(tokens)), CAUSAL)[0, 4 - r - 1 :]
        torch.testing.assert_close(found[r], whole, rtol=1e-4, atol=1e-4)
        twice = tokens.repeat(2, 1)  # experts of some models choose among two rows
        batch_rule = model(MixedBatch.of(twice, modality(twice)))[0, 4 - r - 1 :]
        ahead = max(ahead, (batch_rule - whole).abs().max().item())
    assert ahead > 0.01, "the choice of a whole row would not pass"


@torch.no_grad()
def test_skipped_tokens_write_no_keys():
    model = built("dense", ROUTERS["logit"])
    states = {}
    cache = DecodeCache(1, 12)
    tokens = torch.tensor([rows()[2]])
    cache.start_step(torch.tensor([12]), 12)
    model(MixedBatch.of(tokens, modality(tokens)), CAUSAL, cache=cache)
    for layer in model.layers.values():
        inner = cache.state(layer.depth, None).cache
        states[layer] = int(inner.read_B + inner.real_B)
    assert all(0 < kept < 12 for kept in states.values())


@torch.no_grad()
def test_a_selection_routes_the_prompt_and_leaves_what_is_written_alone():
    router = DepthRouter.Config(inference="selection", decoding="all")
    model = built("dense", router, competing=(1,), competing_share=0.5, group="document")
    counts = []
    cache = DecodeCache(1, 12)
    row = torch.tensor([[1, 30, 31, 32, 33, 2, 3, 40, 41, 42]])
    for start, stop in ((0, 7), (7, 8), (8, 9), (9, 10)):
        cache.start_step(torch.tensor([stop - start]), stop)
        tokens, positions = row[:, start:stop], torch.arange(start, stop)[None]
        model(MixedBatch.of(tokens, modality(tokens), positions_BS=positions), CAUSAL, cache=cache)
        inner = cache.state(model.layers["0"].depth, None).cache
        counts.append(int(inner.read_B + inner.real_B))
    assert counts == [3 + 2, 6, 7, 8]


@torch.no_grad()
def test_bytes_follow_the_kept_tokens():
    """A layer that keeps half of a prompt allocates half of it, then grows with what is written."""
    router = DepthRouter.Config(inference="selection", decoding="all")
    model = built("dense", router, competing=(1,), group="document")
    tokens = torch.tensor([list(range(24, 48))])  # an image alone
    cache, slots, allocated = DecodeCache(1, 40), [], []
    for start, stop in ((0, 24), *((place, place + 1) for place in range(24, 36))):
        cache.start_step(torch.tensor([stop - start]), stop)
        part = tokens[:, :24] if start == 0 else tokens[:, :1]
        batch = MixedBatch.of(part, modality(part), positions_BS=torch.arange(start, stop)[None])
        model(batch, CAUSAL, cache=cache)
        config = model.config.layers[0].attention
        per_slot = 2 * config.kv_heads * config.head_dim * 4 * len(model.layers)
        allocated.append(cache.nbytes // per_slot)
        slots.append(12 + stop - 24)
    assert allocated[0] == 12, "half of the prompt, not the 40 slots of a document"
    assert all(need <= found <= 1.25 * need for need, found in zip(slots, allocated, strict=True))
    cache.select(torch.tensor([0, 0]))
    assert cache.nbytes == 2 * allocated[-1] * per_slot
