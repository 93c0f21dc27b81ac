"""The five systems against their papers' formulas, written out for one document.

h input, a attention, r = h + a, m feed-forward of r: a dense block gives r + m.
"""

import math
from dataclasses import replace

import pytest
import torch
from tiny_runs import SHAPE

from earlyfuse.configs import decoders, depth
from earlyfuse.models.batch import MixedBatch
from earlyfuse.models.context import ForwardContext, ForwardSettings
from earlyfuse.models.depth.capacity import in_layers

S = 20
PRE = replace(SHAPE, norm_order="pre")
IMAGE_S = torch.tensor([0, *[1] * 5, 0, 0, *[1] * 5, *[0] * 7], dtype=torch.uint8)
FRAMES = (range(1, 6), range(8, 13))


def parts(block, h_SD, kept, positions):
    """r and m of the kept tokens, computed as a document of their own."""
    tokens = torch.zeros(1, len(kept), dtype=torch.int64)
    batch = MixedBatch.of(tokens, IMAGE_S[kept][None], positions_BS=positions[None])
    context = context_of(batch, block)
    x_KD = h_SD[kept]
    r_KD = x_KD + block.attention(block.attention_norm(x_KD, context), context)
    return r_KD, block.feed_forward(block.feed_forward_norm(r_KD, context), context)


def context_of(batch, block, **settings) -> ForwardContext:
    return ForwardContext.build(
        batch,
        ForwardSettings(**settings),
        modalities=(0, 1),
        head_dim=SHAPE.dim // SHAPE.heads,
        rope_theta=1e4,
    )


def highest(score, among, count):
    """The ``count`` best of ``among``, lower index first in ties."""
    return sorted(among, key=lambda i: (-float(score[i]), i))[:count]


def mod(h_SD, z_S, p_S, block):
    kept = sorted(highest(z_S, range(S), int(0.25 * S)))
    r_KD, m_KD = parts(block, h_SD, kept, torch.tensor(kept))
    out_SD = h_SD.clone()
    out_SD[kept] = h_SD[kept] + z_S[kept, None] * (r_KD + m_KD - h_SD[kept])
    return out_SD


def moma_mod(h_SD, z_S, p_S, block):
    return mod(h_SD, z_S.sigmoid(), p_S, block)  # a monotonic map keeps the order


def p_mod(h_SD, z_S, p_S, block):
    image = IMAGE_S.nonzero().flatten().tolist()
    chosen = highest(z_S, image, math.trunc(0.45 * len(image)))
    kept = sorted(chosen + [i for i in range(S) if i not in image])
    weight_S = 1 + 0.2 * torch.tanh(z_S)
    r_KD, m_KD = parts(block, h_SD, kept, torch.tensor(kept))
    scale_S = torch.where(IMAGE_S > 0, weight_S, 1.0)
    out_SD = scale_S[:, None] * h_SD  # dropped
    out_SD[kept] = scale_S[kept, None] * m_KD + r_KD
    return out_SD


def gamma_mod(h_SD, z_S, p_S, block):
    skipped = 0.5 * (IMAGE_S > 0).float().mean().item()
    score_S = p_S + (IMAGE_S == 0)
    kept = sorted(highest(score_S, range(S), math.ceil(S - skipped * S)))
    r_KD, m_KD = parts(block, h_SD, kept, torch.arange(len(kept)))  # places in what is kept
    out_SD = h_SD.clone()
    out_SD[kept] = r_KD + p_S[kept, None] * m_KD
    return out_SD


def videollm_mod(h_SD, z_S, p_S, block):
    chosen = [i for frame in FRAMES for i in highest(z_S, frame, int(0.4 * len(frame)))]
    kept = sorted(chosen + (IMAGE_S == 0).nonzero().flatten().tolist())
    weight_S = torch.where(IMAGE_S > 0, z_S, 1.0)
    r_KD, m_KD = parts(block, h_SD, kept, torch.tensor(kept))
    out_SD = h_SD.clone()
    out_SD[kept] = h_SD[kept] + weight_S[kept, None] * (r_KD + m_KD - h_SD[kept])
    return out_SD


DENSE = decoders.dense(PRE)
SYSTEMS = {
    mod: depth.mod(DENSE, 0.25, every=1, start=0),
    moma_mod: depth.moma_mod(DENSE, 0.25, every=1),
    p_mod: depth.p_mod(DENSE, in_layers(2, 0.45, [0]), media_share=0.5, init="normal"),
    gamma_mod: depth.gamma_mod(DENSE, [0], media_share=0.5),
    videollm_mod: depth.videollm_mod(DENSE, 0.4, every=1, start=0, media_share=0.5),
}


@torch.no_grad()
@pytest.mark.parametrize("formula", SYSTEMS, ids=lambda formula: formula.__name__)
def test_a_system_is_its_paper_s_formula(formula):
    config = SYSTEMS[formula]
    config.init_std = 0.3
    model = config.build()
    model.init_states()
    block = model.layers["0"].eval()
    h_SD = torch.randn(S, SHAPE.dim, generator=torch.Generator().manual_seed(0))
    batch = MixedBatch.of(torch.zeros(1, S, dtype=torch.int64), IMAGE_S[None])
    context = context_of(batch, block, budgets="exact")
    if model.depth_projection is None:
        projection = block.depth.router.projection
        bias = 0.0 if projection.bias is None else projection.bias
        z_S, p_S = (h_SD @ projection.weight.T + bias)[:, 0], None
    else:
        context.depth_weights = model.depth_projection()
        logits = block.first_norm(h_SD, context) @ model.depth_projection.weight.T
        z_S, p_S = None, logits.softmax(-1)[:, 1]
    expected = formula(h_SD, z_S, p_S, block)
    found = block(h_SD, context)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, h_SD, atol=0.1)
