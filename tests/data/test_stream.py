"""The stream of rows: order, packing, mixing and quota, over tiny sources of prepare's writer."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_sources import (
    BEGIN,
    BLOCK,
    BOS,
    CODES,
    END,
    EOS,
    PAD,
    image,
    loader,
    steps,
    write_source,
)  # fmt: skip

from earlyfuse.data.shards.source import TokenSource
from earlyfuse.data.stream.batches import assemble, validation_batches
from earlyfuse.data.stream.lanes import Lane
from earlyfuse.data.stream.mixture import Mixture, Shuffle
from earlyfuse.models.batch import IGNORE_LABEL


def mixture_of(folders, shares, **options) -> Mixture:
    return Mixture(tuple(map(TokenSource, folders)), tuple(shares), **options)


def rows_of(folder, number, seq_len):
    """Pieces of the first rows of one source in stored order, and their batch."""
    mixture = mixture_of([folder], [1.0])
    lane = Lane(mixture, mixture.stored(), seq_len)
    rows = [lane.row() for _ in range(number)]
    return rows, assemble(rows, seq_len, mixture)


# ---- order -------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 700), st.integers(0, 2**63), st.integers(0, 50))
def test_every_epoch_is_a_permutation(documents, seed, epoch):
    order = Shuffle(documents, seed, "a")(np.arange(documents) + epoch * documents)
    assert sorted(order.tolist()) == list(range(documents))


def test_order_depends_on_seed_epoch_and_name_only():
    def order(seed=1, epoch=0, name="a"):
        return Shuffle(1000, seed, name)(np.arange(1000) + 1000 * epoch).tolist()

    assert order() == order()
    others = [order(seed=2), order(epoch=1), order(name="b")]
    assert all(sum(x == y for x, y in zip(order(), o, strict=True)) < 20 for o in others)
    shuffle = Shuffle(1000, 1, "a")
    singly = [int(shuffle(np.array([q]))[0]) for q in range(0, 3000, 7)]
    assert singly == shuffle(np.arange(0, 3000, 7)).tolist(), "whatever is asked with it"


@pytest.mark.parametrize("documents", [3, 5, 8, 13])
def test_every_document_is_equally_likely_at_every_position(documents):
    epochs = 6000
    order = Shuffle(documents, 0, "a")(np.arange(documents * epochs)).reshape(epochs, documents)
    counts = np.stack([np.bincount(order[:, p], minlength=documents) for p in range(documents)])
    assert np.abs(counts - epochs / documents).max() < 6 * (epochs / documents) ** 0.5


def test_lanes_together_take_each_document_exactly_once_an_epoch(three):
    mixture = mixture_of(three, three.values())
    for lanes in (1, 3, 8):
        of_lanes = [mixture.shuffled(0, lane, lanes) for lane in range(lanes)]
        for source, *orders in zip(mixture.sources, *of_lanes, strict=True):
            n = len(source)
            stream = np.stack([order(np.arange(2 * n)) for order in orders], axis=1).ravel()
            for epoch in range(2):
                assert sorted(stream[epoch * n : (epoch + 1) * n].tolist()) == list(range(n))


# ---- rows --------------------------------------------------------------------------------------


def test_fields_of_a_row_by_hand(tmp_path):
    prose = write_source(tmp_path / "prose", [[BOS, 10, 11, 12, 13, EOS]], shards=1)
    pairs = write_source(tmp_path / "pairs", [[BOS, *image(), 9, *image(4), EOS]], shards=1)
    mixture = mixture_of((pairs, prose), (0.5, 0.5))
    lane = Lane(mixture, mixture.stored(), 13)
    batch = assemble([lane.row(), lane.row()], 13, mixture)
    a, b, x = image()[1:-1], image(4)[1:-1], IGNORE_LABEL
    # Row 0: pairs is split before its second image, prose fills the room and is split. Row 1:
    # tails, prose first for it has drawn less, then padding.
    expected = {
        "tokens_BS": (
            torch.int64,
            [BOS, BEGIN, *a, END, 9, BOS, 10, 11, 12, 13],
            [EOS, BEGIN, *b, END, EOS, *[PAD] * 5],
        ),
        "labels_BS": (
            torch.int64,
            [BEGIN, *a, END, 9, BEGIN, 10, 11, 12, 13, EOS],
            [x, *b, END, EOS, x, *[x] * 5],
        ),
        "positions_BS": (torch.int64, [*range(8), *range(5)], [0, *range(7), *[0] * 5]),
        "modality_BS": (torch.uint8, [0, 0, *[1] * 4, *[0] * 7], [0, 0, *[1] * 4, *[0] * 7]),
        "span_BS": (torch.int32, [0, 0, *[1] * 4, *[0] * 7], [0, 0, *[1] * 4, *[0] * 7]),
        "label_modality_BS": (torch.uint8, [0, *[1] * 4, *[0] * 8], [0, *[1] * 4, *[0] * 8]),
        "document_BS": (torch.int32, [1] * 8 + [2] * 5, [1] + [2] * 7 + [0] * 5),
        "source_BS": (torch.uint8, [0] * 8 + [1] * 5, [1] + [0] * 12),
    }
    found = batch.tensors()
    assert found.keys() == expected.keys()
    for name, (dtype, *rows) in expected.items():
        assert (found[name].dtype, found[name].tolist()) == (dtype, rows), name


def test_span_numbers_the_images_of_a_row(tmp_path):
    pairs = write_source(tmp_path / "pairs", [[BOS, *image(), *image(3), EOS]] * 2, shards=1)
    _, batch = rows_of(pairs, 1, 28)
    runs = [[0, 0], [1] * 4, [0, 0], [2] * 4, [0] * 4, [3] * 4, [0, 0], [4] * 4, [0, 0]]
    assert batch.span_BS[0].tolist() == sum(runs, [])


def test_an_image_that_just_fits_is_not_put_off(tmp_path):
    pairs = write_source(tmp_path / "pairs", [[BOS, *image(), 9, EOS]], shards=1)
    lengths = {room: len(rows_of(pairs, 1, room)[0][0][0].tokens) for room in (6, 7, 8)}
    assert lengths == {6: 1, 7: 7, 8: 8}


def test_empty_documents_are_passed_over(tmp_path):
    odd = write_source(tmp_path / "odd", [[], [BOS, 9, EOS], [], []], shards=1)
    (batch,) = steps([loader({odd: 1.0}, seq_len=6)], 1)
    assert batch["tokens_BS"].tolist() == [[BOS, 9, EOS] * 2] * 8


@pytest.mark.parametrize("media_share", [None, 0.3])
def test_a_lane_gives_its_documents_whole_and_in_order_and_no_image_split(three, media_share):
    mixture = mixture_of(three, three.values(), media_share=media_share)
    for number in range(3):
        orders = mixture.shuffled(0, number, 3)
        lane = Lane(mixture, orders, 24)
        pieces = list(itertools.chain(*(lane.row() for _ in range(140))))
        for place, (source, order) in enumerate(zip(mixture.sources, orders, strict=True)):
            mine = [piece for piece in pieces if piece.source == place]
            for piece, following in itertools.pairwise(mine):
                tokens = piece.tokens.tolist()
                assert piece.label_after in (IGNORE_LABEL, following.tokens[0])
                for at in [at for at, token in enumerate(tokens) if token == BEGIN]:
                    codes, end = tokens[at + 1 : at + 1 + BLOCK], tokens[at + 1 + BLOCK]
                    assert all(code in CODES for code in codes) and end == END
            ends = sum(piece.label_after == IGNORE_LABEL for piece in mine)
            wanted = [source.document(n)[0] for n in order(np.arange(ends + 1)).tolist()]
            stream = np.concatenate([piece.tokens for piece in mine])
            assert len(stream) >= sum(map(len, wanted[:-1])) and ends > 10
            assert np.array_equal(stream, np.concatenate(wanted)[: len(stream)])


def test_text_fills_the_room_an_image_leaves(folders):
    """With a text source there is never padding; without one only where a block did not fit."""
    filled = steps([loader({folders["prose"]: 0.2, folders["mixed"]: 0.8}, local=8)], 20)
    assert not any((batch["tokens_BS"] == PAD).any() for batch in filled)
    alone = loader({folders["mixed"]: 1.0}, local=8)
    padded = sum(int((batch["document_BS"] == 0).sum()) for batch in steps([alone], 20))
    assert 0 < padded <= 20 * 8 * (BLOCK + 1)
    assert alone.progress()["padding"] == pytest.approx(padded / (20 * 8 * 24))


# ---- mixing ------------------------------------------------------------------------------------


def test_token_shares_are_kept_within_a_row_per_source(three):
    one = loader(three, local=8)
    for _ in range(60):
        steps([one], 1)
        drawn = one.lanes[:, 6:9].double()
        expected = drawn.sum(1, keepdim=True) * torch.tensor([0.3, 0.2, 0.5])
        assert (drawn - expected).abs().max() <= 3 * 24
    mixed = one.progress()["source_tokens"]["mixed"] / (60 * 8 * 24)
    assert mixed == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("quota", [0.15, 0.4])
def test_media_quota_is_kept_within_a_row(folders, quota):
    sources = {folders["prose"]: 0.6, folders["pairs"]: 0.2, folders["mixed"]: 0.2}
    quoted = loader(sources, local=8, media_share=quota)
    for _ in range(60):
        steps([quoted], 1)
        lanes = quoted.lanes.double()
        total, codes = lanes[:, 6:9].sum(1), lanes[:, 9]
        assert (codes - quota * total).abs().max() <= 24
    progress = quoted.progress()["tokens"]
    assert progress["image"] / sum(progress.values()) == pytest.approx(quota, abs=0.01)
    shares = quoted.mixture.effective_shares()
    fractions = [quoted.mixture.media_fraction(source) for source in quoted.mixture.sources]
    assert sum(s * f for s, f in zip(shares, fractions, strict=True)) == pytest.approx(quota)
    assert shares[1] == pytest.approx(shares[2]), "equal shares on one side of the quota stay equal"


def test_progress_counts_the_yielded_batches(three):
    ranks = [loader(three, r, 2, local=4, media_share=0.3) for r in range(2)]
    batches = steps(ranks, 10)
    both = [rank.progress() for rank in ranks]
    modality = torch.cat([batch["modality_BS"] for batch in batches])
    padding = sum(int((batch["document_BS"] == 0).sum()) for batch in batches)
    assert sum(p["tokens"]["image"] for p in both) == int((modality == 1).sum())
    assert sum(p["tokens"]["text"] for p in both) == int((modality == 0).sum()) - padding
    assert sum(p["rows"] for p in both) == 80


# ---- validation --------------------------------------------------------------------------------


def test_validation_holds_every_document_once_whatever_the_ranks(three):
    mixture = mixture_of(three, three.values())
    whole = validation_batches(mixture, 24, rows=8)
    tokens = torch.cat([batch.tokens_BS for batch in whole])
    assert all(batch.tokens_BS.shape == (8, 24) for batch in whole)
    sources = mixture.sources
    assert int((tokens != PAD).sum()) == sum(sum(source.tokens.values()) for source in sources)
    assert int((tokens == BOS).sum()) == sum(len(source) for source in sources)
    for ranks in (2, 4):
        parts = [validation_batches(mixture, 24, rows=8, rank=r, ranks=ranks) for r in range(ranks)]
        for number, batch in enumerate(whole):
            for name, tensor in batch.tensors().items():
                assert torch.equal(tensor, torch.cat([p[number].tensors()[name] for p in parts]))
    few = validation_batches(mixture, 24, rows=8, max_batches=2)
    assert len(few) == 2 and torch.equal(few[1].tokens_BS, whole[1].tokens_BS)
    blank = whole[-1].tokens_BS.eq(PAD).all(1)
    assert blank.any() and whole[-1].labels_BS[blank].eq(IGNORE_LABEL).all()
