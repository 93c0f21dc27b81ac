"""Context parallelism equals whole rows: outputs, gradients, and the bytes it sends.

The ranks are in ``sequence_ranks.py``. Whole runs are among the layouts of ``test_ranks.py``.
"""

from pathlib import Path

import pytest
import sequence_ranks
import torch
from ranks import forked, output_of
from sequence_ranks import LENGTHS, NAMES, RANKS
from tiny_runs import MAMBA_SHAPE, MAMBAS, loud

from earlyfuse.models.batch import MixedBatch
from earlyfuse.models.blocks.cache import DecodeCache
from earlyfuse.models.context import ForwardContext, ForwardSettings
from earlyfuse.models.masks import attention_mask

TOLERANCE = 1e-11  # in fp64, in the whole model, with a scan made to matter; measured: 3e-14


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Results of ``sequence_ranks.py``, launched once."""
    folder = tmp_path_factory.mktemp("sequence")
    output_of(forked(RANKS, Path(sequence_ranks.__file__), str(folder)))
    return torch.load(folder / "compared.pt"), torch.load(folder / "sent.pt")


@pytest.mark.parametrize("name", NAMES)
def test_parts_of_a_row_compute_what_the_whole_row_does(ranks, name):
    errors = {case: error for case, error in ranks[0].items() if case.startswith(f"{name},")}
    assert len(errors) == 2 * len(LENGTHS)
    assert {case: error for case, error in errors.items() if not error < TOLERANCE} == {}


def test_what_a_scan_and_its_convolution_send_does_not_grow_with_the_row(ranks):
    _, sent = ranks
    short, long = sent["mixture_of_mamba"][24], sent["mixture_of_mamba"][96]
    assert short == long
    inner, blocks = 2 * MAMBA_SHAPE.dim, 2
    halo, state = (RANKS * inner * n * 4 for n in (MAMBA_SHAPE.conv_width - 1, MAMBA_SHAPE.states))
    forward, backward = halo + 2 * state, halo + state
    assert sum(size for _, _, size in long) == blocks * (forward + backward)


def test_attention_sends_keys_and_values_of_its_row_once_each_way(ranks):
    _, sent = ranks
    for length, calls in sent["dense"].items():
        keys_and_values = length * 2 * 32 * 4
        assert [size for _, _, size in calls] == [keys_and_values] * 4  # two layers
        assert [kind for kind, _, _ in calls] == ["all_gather"] * 2 + ["reduce_scatter"] * 2


class Elsewhere:
    """The second half of a row; fetching from the first half fails."""

    index, parts = 1, 2


def test_documents_are_written_whole_on_every_rank():
    model = MAMBAS["hybrid"]().build()
    model.init_states()
    loud(model)
    inputs = MixedBatch.of(torch.arange(12).view(2, 6))
    expected = model(inputs)[:, -1:]
    decoding = DecodeCache(2, slots=6)
    decoding.start_step(torch.tensor([6, 6]), 6)
    found = model(inputs, ForwardSettings(sequence_shard=Elsewhere()), cache=decoding)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_token_keeps_its_place_in_the_global_batch():
    batch = MixedBatch.of(torch.zeros(2, 8, dtype=torch.int64))

    def places(part: slice, **options) -> torch.Tensor:
        settings = ForwardSettings(first_row=5, **options)
        context = ForwardContext.build(
            batch.part(part), settings, modalities=(0, 1), head_dim=0, rope_theta=1e4
        )
        return context.row_place_T.view(2, -1)

    assert places(slice(4, 8), sequence_shard=Elsewhere()).equal(places(slice(0, 8))[:, 4:])


def test_the_mask_of_a_part_is_its_rows_of_the_whole_mask():
    documents = torch.tensor([[1, 1, 1, 1, 2, 2, 2, 3], [1, 2, 2, 2, 2, 2, 2, 2]])
    whole = attention_mask(documents)
    for first in (0, 2, 4, 6):
        part = attention_mask(documents[:, : first + 2], first)
        assert part.equal(whole[:, :, first : first + 2, : first + 2])
        assert not whole[:, :, first : first + 2, first + 2 :].any()


def test_a_later_part_of_a_row_of_one_document_has_a_mask():
    documents = torch.ones(2, 8)
    assert attention_mask(documents) is None, "plain causal attention says the same"
    assert attention_mask(documents, 4).sum() == 2 * (5 + 6 + 7 + 8)
