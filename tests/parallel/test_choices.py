"""Random draws and routing on several ranks: dropout masks, experts under FSDP in bf16."""

from itertools import combinations
from pathlib import Path

import choice_ranks
import pytest
import torch
from choice_ranks import LAYOUTS, ROUTED
from ranks import forked, output_of
from toy import make_data


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Results of ``choice_ranks.py`` on each of two ranks, launched once."""
    folder = tmp_path_factory.mktemp("choices")
    make_data(folder / "data")
    output_of(forked(2, Path(choice_ranks.__file__), str(folder)))
    return [torch.load(folder / f"choices-{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_of_other_rows_or_positions_drop_other_places(ranks, layout):
    first, second = (rank["dropped"][layout] for rank in ranks)
    assert first.shape == second.shape and 0.4 < first.float().mean() < 0.6
    if layout == "tensors":  # the same activations on both
        assert torch.equal(first, second)
    else:
        assert 0.4 < (first != second).float().mean() < 0.6
    for one, other in combinations(first, 2):  # micro-batches, blocks, branches
        assert (one != other).float().mean() > 0.4


@pytest.mark.parametrize("model", ROUTED)
def test_routers_choose_under_fsdp_in_bf16_as_they_do_in_fp32(ranks, model):
    for rank in ranks:
        assert len(rank["chosen"][model]) > 2
        for name, found, expected, logits, types in rank["chosen"][model]:
            assert types == {torch.float32}, name
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=name)
            if model == "moma_causal":
                torch.testing.assert_close(*logits, rtol=1e-6, atol=1e-6, msg=name)
