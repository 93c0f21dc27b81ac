"""The stream: rows, order, mixing, quota, resume. Data sets are tiny and written by prepare's own
writer."""

import gc
import itertools
import json
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_sources import (
    BEGIN,
    BLOCK,
    BOS,
    CODES,
    END,
    EOS,
    HASHES,
    PAD,
    image,
    image_document,
    mixed_document,
    text_document,
    write_source,
)
from torch.distributed.device_mesh import init_device_mesh

from earlyfuse.data.shards.source import TokenSource
from earlyfuse.data.stream.batches import Prefetcher, assemble, validation_batches
from earlyfuse.data.stream.lanes import Blend, Lane, Shuffle
from earlyfuse.data.stream.loader import LaneLoader
from earlyfuse.models.batch import IGNORE_LABEL, MixedBatch


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root, rng = tmp_path_factory.mktemp("prepared"), np.random.default_rng(0)
    kinds = {"prose": text_document, "pairs": image_document, "mixed": mixed_document}
    return {
        kind: write_source(root / kind, [make(rng) for _ in range(n)])
        for (kind, make), n in zip(kinds.items(), (23, 17, 31), strict=True)
    }


def loader(sources, rank=0, ranks=1, local=2, seq_len=24, batch=8, **options) -> LaneLoader:
    config = LaneLoader.Config(
        sources={str(folder): share for folder, share in sources.items()},
        global_batch_size=batch,
        **options,
    )
    return config.build(
        dp_world_size=ranks,
        dp_rank=rank,
        tokenizer=None,
        seq_len=seq_len,
        local_batch_size=local,
        snapshot_every_n_steps=1,
    )


@pytest.fixture
def three(folders) -> dict[Path, float]:
    return {folders["prose"]: 0.3, folders["pairs"]: 0.2, folders["mixed"]: 0.5}


def steps(ranks: list[LaneLoader], number: int) -> list[dict[str, torch.Tensor]]:
    """``number`` global batches, their rows in lane order, from simulated ranks."""
    iterators = [iter(rank) for rank in ranks]
    batches = []
    for _ in range(number):
        parts = [
            next(iterator)
            for rank, iterator in zip(ranks, iterators, strict=True)
            for _ in range(len(rank.lanes) // rank.rows)
        ]
        fields = [inputs["batch"].tensors() for inputs, _ in parts]
        batches.append({name: torch.cat([f[name] for f in fields]) for name in fields[0]})
    return batches


def assert_same(left, right) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        for name in one:
            assert torch.equal(one[name], other[name]), name


def pieces(batch, row: int):
    """(positions of a piece, its tokens, its labels), padding left out: a row as its positions
    divide it."""
    tokens, labels = batch["tokens_BS"][row].tolist(), batch["labels_BS"][row].tolist()
    starts = [i for i, p in enumerate(batch["positions_BS"][row].tolist()) if p == 0]
    for start, stop in zip(starts, [*starts[1:], len(tokens)], strict=True):
        if tokens[start] != PAD:
            yield range(start, stop), tokens[start:stop], labels[start:stop]


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
    assert [int(shuffle(np.array([q]))[0]) for q in range(0, 3000, 7)] == (
        shuffle(np.arange(0, 3000, 7)).tolist()
    ), "a position's document must not depend on what is asked with it"


@pytest.mark.parametrize("documents", [3, 5, 8, 13])
def test_every_document_is_equally_likely_at_every_position(documents):
    epochs = 6000
    order = Shuffle(documents, 0, "a")(np.arange(documents * epochs)).reshape(epochs, documents)
    counts = np.stack([np.bincount(order[:, p], minlength=documents) for p in range(documents)])
    expected = epochs / documents
    assert np.abs(counts - expected).max() < 6 * expected**0.5


# ---- rows --------------------------------------------------------------------------------------


def test_fields_of_a_row_by_hand(tmp_path):
    prose = write_source(tmp_path / "prose", [[BOS, 10, 11, 12, 13, EOS]], shards=1)
    pairs = write_source(tmp_path / "pairs", [[BOS, *image(), 9, *image(4), EOS]], shards=1)
    blend = Blend((TokenSource(pairs), TokenSource(prose)), (0.5, 0.5))
    lane = Lane(blend, blend.stored(), 13)
    batch = assemble([lane.row(), lane.row()], 13, blend)
    a, b = image()[1:-1], image(4)[1:-1]
    # Row 0: pairs is cut before its second image, prose fills the room and is cut. Row 1: tails,
    # prose first for it has drawn less, then padding.
    assert batch.tokens_BS.tolist() == [
        [BOS, BEGIN, *a, END, 9, BOS, 10, 11, 12, 13],
        [EOS, BEGIN, *b, END, EOS, *[PAD] * 5],
    ]
    x = IGNORE_LABEL
    assert batch.labels_BS.tolist() == [
        [BEGIN, *a, END, 9, BEGIN, 10, 11, 12, 13, EOS],
        [x, *b, END, EOS, x, *[x] * 5],
    ]
    assert batch.positions_BS.tolist() == [
        [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4],
        [0, 0, 1, 2, 3, 4, 5, 6, *[0] * 5],
    ]
    assert batch.modality_BS.tolist() == [
        [0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 1, 1, 1, 1, 0, 0, *[0] * 5],
    ]
    assert batch.span_BS.tolist() == batch.modality_BS.tolist()
    assert batch.label_modality_BS.tolist() == [
        [0, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0],
        [0, 1, 1, 1, 1, 0, 0, *[0] * 6],
    ]
    assert batch.document_BS.tolist() == [[1] * 8 + [2] * 5, [1] + [2] * 7 + [0] * 5]
    ints, bytes_ = (torch.int64,), (torch.uint8,)
    types = (*ints * 2, *bytes_ * 2, torch.int32, torch.int64, torch.int32, torch.uint8)
    assert tuple(field.dtype for field in batch.tensors().values()) == types


def test_span_numbers_the_images_of_a_row(tmp_path):
    pairs = write_source(tmp_path / "pairs", [[BOS, *image(), *image(3), EOS]] * 2, shards=1)
    blend = Blend((TokenSource(pairs),), (1.0,))
    batch = assemble([Lane(blend, blend.stored(), 28).row()] * 2, 28, blend)
    for row in range(2):
        runs = [[0, 0], [1] * 4, [0, 0], [2] * 4, [0] * 4, [3] * 4, [0, 0], [4] * 4, [0, 0]]
        assert batch.span_BS[row].tolist() == [n for run in runs for n in run]


def test_an_image_that_just_fits_is_not_put_off(tmp_path):
    pairs = write_source(tmp_path / "pairs", [[BOS, *image(), 9, EOS]], shards=1)
    blend = Blend((TokenSource(pairs),), (1.0,))
    rows = {room: Lane(blend, blend.stored(), room).row()[0] for room in (6, 7, 8)}
    assert {room: len(piece.tokens) for room, piece in rows.items()} == {6: 1, 7: 7, 8: 8}


@pytest.mark.parametrize("media_share", [None, 0.3])
def test_every_document_once_an_epoch_and_no_image_cut(three, media_share):
    """Documents put together again from the pieces of each lane, by following labels and
    positions."""
    ranks = [loader(three, local=8, media_share=media_share)]
    documents = {folder.name: [t.tolist() for t in tokens_of(folder)] for folder in three}
    seen = {name: [] for name in documents}
    batches = steps(ranks, 140)
    for lane in range(8):
        waiting: list[list[int]] = []  # document so far + the label that must come next
        for batch in batches:
            used = 0
            for _, tokens, labels in pieces(batch, lane):
                used += len(tokens)
                assert labels[:-1] == tokens[1:]
                assert tokens.count(BEGIN) == tokens.count(END)
                for at in [i for i, t in enumerate(tokens) if t == BEGIN]:
                    block = tokens[at + 1 : at + 1 + BLOCK]
                    assert all(t in CODES for t in block) and tokens[at + 1 + BLOCK] == END
                if tokens[0] == BOS:
                    so_far = []
                else:  # a tail: of a document whose label after the cut says so
                    tails = [w for w in waiting if continues(documents, w, tokens)]
                    so_far = tails[0][:-1]
                    waiting.remove(tails[0])
                if labels[-1] == IGNORE_LABEL:
                    whole = so_far + tokens
                    (name,) = {n for n, ds in documents.items() if whole in ds}
                    seen[name].append(whole)
                else:
                    waiting.append([*so_far, *tokens, labels[-1]])
            assert used + batch["tokens_BS"][lane].tolist().count(PAD) == 24
        assert len(waiting) <= len(documents)
    for name, taken in seen.items():
        epochs = len(taken) // len(documents[name])
        assert epochs >= 3
        for document in documents[name]:
            # lanes run at their own pace, so the newest epochs are incomplete
            assert taken.count(document) >= documents[name].count(document) * (epochs - 2)


def continues(documents, so_far, tail) -> bool:
    if so_far[-1] != tail[0]:
        return False
    start = so_far[:-1] + tail
    return any(d[: len(start)] == start for ds in documents.values() for d in ds)


def tokens_of(folder):
    source = TokenSource(folder)
    return [source.document(i)[0] for i in range(len(source))]


def test_lanes_together_take_each_document_exactly_once_an_epoch(three):
    blend = loader(three).blend
    for lanes in (1, 3, 8):
        for source, *orders in zip(
            blend.sources, *(blend.shuffled(0, lane, lanes) for lane in range(lanes)), strict=True
        ):
            n = len(source)
            taken = [order(np.arange(2 * n)) for order in orders]
            stream = np.stack(taken, axis=1).ravel()
            for epoch in range(2):
                assert sorted(stream[epoch * n : (epoch + 1) * n].tolist()) == list(range(n))


def test_text_fills_the_room_an_image_leaves(folders):
    """With a text source there is never padding; without one only where a block did not fit."""
    filled = steps([loader({folders["prose"]: 0.2, folders["mixed"]: 0.8}, local=8)], 20)
    assert not any((batch["tokens_BS"] == PAD).any() for batch in filled)
    alone = loader({folders["mixed"]: 1.0}, local=8)
    batches = steps([alone], 20)
    padded = sum(int((batch["tokens_BS"] == PAD).sum()) for batch in batches)
    assert 0 < padded <= 20 * 8 * (BLOCK + 1)
    assert alone.progress()["padding"] == pytest.approx(padded / (20 * 8 * 24))
    for batch in batches:
        pad = batch["tokens_BS"] == PAD
        assert (batch["labels_BS"][pad] == IGNORE_LABEL).all() and not batch["positions_BS"][
            pad
        ].any()


# ---- mixing ------------------------------------------------------------------------------------


def test_token_shares_are_kept_within_a_row_per_source(three):
    ranks = loader(three, local=8)
    for _ in range(60):
        steps([ranks], 1)
        drawn = ranks.lanes[:, 6:9].double()
        expected = drawn.sum(1, keepdim=True) * torch.tensor([0.3, 0.2, 0.5])
        assert (drawn - expected).abs().max() <= 3 * 24
    assert ranks.progress()["source_tokens"]["mixed"] / (60 * 8 * 24) == pytest.approx(
        0.5, abs=0.03
    )


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
    shares = quoted.blend.effective_shares()
    fractions = [source.media_fraction for source in quoted.blend.sources]
    assert sum(s * f for s, f in zip(shares, fractions, strict=True)) == pytest.approx(quota)
    assert shares[1] == pytest.approx(shares[2]), "equal shares on one side of the quota stay equal"


def test_progress_counts_what_was_handed_out(three):
    ranks = [loader(three, r, 2, local=4, media_share=0.3) for r in range(2)]
    batches = steps(ranks, 10)
    both = [rank.progress() for rank in ranks]
    modality = torch.cat([batch["modality_BS"] for batch in batches])
    padding = sum(int((batch["tokens_BS"] == PAD).sum()) for batch in batches)
    assert sum(p["tokens"]["image"] for p in both) == int((modality == 1).sum())
    assert sum(p["tokens"]["text"] for p in both) == int((modality == 0).sum()) - padding
    assert sum(p["rows"] for p in both) == 80


# ---- ranks and resume --------------------------------------------------------------------------


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("before, after", [(1, 4), (4, 1), (2, 4), (2, 2)])
def test_any_ranks_see_the_same_rows_before_and_after_a_resume(three, prefetch, before, after):
    unbroken = steps([loader(three, local=2, prefetch=0, media_share=0.3)], 9)
    for stop in (0, 1, 5):
        first = [
            loader(three, r, before, prefetch=prefetch, media_share=0.3) for r in range(before)
        ]
        assert_same(steps(first, stop), unbroken[:stop])
        lanes = torch.cat([rank.lanes for rank in first])
        state = {"lanes": lanes, "identity": json.dumps(first[0].identity())}
        second = [
            loader(three, r, after, local=1, prefetch=prefetch, media_share=0.3)
            for r in range(after)
        ]
        for rank in second:
            rank.load_state_dict(state)
        assert_same(steps(second, 9 - stop), unbroken[stop:])


@pytest.mark.parametrize("prefetch", [0, 3])
def test_a_running_iterator_continues_from_a_loaded_state(three, prefetch):
    one = loader(three, prefetch=prefetch, local=8)
    steps([one], 3)
    saved, copy = one.state_dict(), one.state_dict()["lanes"].clone()
    running = iter(one)
    expected = [next(running)[0]["batch"].tokens_BS for _ in range(4)]
    assert torch.equal(saved["lanes"], copy), "a state must not change after it was taken"
    one.load_state_dict(saved)
    assert all(torch.equal(next(running)[0]["batch"].tokens_BS, tokens) for tokens in expected)


def test_dcp_restores_the_loader(three, tmp_path):
    one, other = loader(three, local=8), loader(three, local=4)
    steps([one], 4)
    dcp.save({"dataloader": one}, checkpoint_id=tmp_path / "step", no_dist=True)
    dcp.load({"dataloader": other}, checkpoint_id=tmp_path / "step", no_dist=True)
    assert torch.equal(one.lanes, other.lanes) and int(one.lanes[0, -1]) == 4
    assert_same(steps([other], 3), steps([one], 3))
    # the identity alone can be read first, where lanes of another shape could not
    fewer = loader(three, batch=4)
    saved = {"dataloader": {"identity": ""}}
    dcp.load(saved, checkpoint_id=tmp_path / "step", no_dist=True)
    with pytest.raises(ValueError, match=r"global_batch_size of the data \(4\) must be .* \(8\)"):
        fewer.check_identity(saved["dataloader"]["identity"])


def one_of_two_ranks(rank: int, three, folder: Path) -> None:
    """Continue a checkpoint of one rank for two steps and save again, as one of two processes."""
    store = f"file://{folder / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    one = loader(three, rank, 2)
    one.mesh = init_device_mesh("cpu", (2,))
    dcp.load({"dataloader": one}, checkpoint_id=folder / "one")
    steps([one], 2)
    dcp.save({"dataloader": one}, checkpoint_id=folder / "two")
    torch.distributed.destroy_process_group()


def test_a_checkpoint_moves_between_one_rank_and_two(three, tmp_path):
    unbroken, last = loader(three, local=8), loader(three, local=8)
    steps([unbroken], 3)
    dcp.save({"dataloader": unbroken}, checkpoint_id=tmp_path / "one", no_dist=True)
    torch.multiprocessing.spawn(one_of_two_ranks, (three, tmp_path), nprocs=2)
    dcp.load({"dataloader": last}, checkpoint_id=tmp_path / "two", no_dist=True)
    steps([unbroken], 2)
    assert torch.equal(last.lanes, unbroken.lanes)


def test_resume_refuses_other_data_by_name(three, folders, tmp_path):
    state = loader(three).state_dict()
    names = list(three)
    changed = write_source(tmp_path / "mixed", [[BOS, *image(), EOS]] * 4)
    other_text = [
        write_source(
            tmp_path / "t" / f.name, [[BOS, *image(), EOS]] * 3, hashes=HASHES | {"text": "cc"}
        )
        for f in names
    ]
    cases = {
        "seed": loader(three, seed=1),
        "global_batch_size": loader(three, batch=4),
        "data": loader({names[0]: 0.3, names[1]: 0.2, changed: 0.5}),
        "shares": loader({names[0]: 0.2, names[1]: 0.3, names[2]: 0.5}),
        "media_share": loader(three, media_share=0.3),
        "tokenizers": loader(dict(zip(other_text, (0.3, 0.2, 0.5), strict=True))),
    }
    for field, other in cases.items():
        with pytest.raises(ValueError, match=f"^{field} of the data"):
            other.load_state_dict(state)
    loader(three, local=1).load_state_dict(state)


def test_a_state_within_a_step_is_refused(three):
    one = loader(three, local=2)
    next(iter(one))
    with pytest.raises(ValueError, match="drawn 0 to 1 rows"):
        loader(three).load_state_dict(one.state_dict())


def test_empty_documents_are_passed_over(tmp_path):
    odd = write_source(tmp_path / "odd", [[], [BOS, 9, EOS], [], []], shards=1)
    (batch,) = steps([loader({odd: 1.0}, seq_len=6)], 1)
    assert batch["tokens_BS"].tolist() == [[BOS, 9, EOS] * 2] * 8


def test_several_ranks_need_a_mesh_to_save(three):
    with pytest.raises(ValueError, match="loader of 2 data-parallel ranks must know their mesh"):
        loader(three, 0, 2).state_dict()


# ---- prefetch ----------------------------------------------------------------------------------


def prefetch_threads() -> int:
    return sum(thread.name == "earlyfuse-prefetch" for thread in threading.enumerate())


def test_an_error_in_the_background_surfaces_after_the_good_items():
    def items():
        yield 1
        yield 2
        raise ZeroDivisionError("in the thread")

    ahead = Prefetcher(items(), 1)
    assert [next(ahead), next(ahead)] == [1, 2]
    for _ in range(2):
        with pytest.raises(ZeroDivisionError, match="in the thread"):
            next(ahead)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_broken_document_is_named_and_the_state_stays_whole(folders, tmp_path, prefetch):
    broken = write_source(
        tmp_path / "odd", [[BOS, 9, EOS]] * 9 + [[BOS, BEGIN, 50, 51, EOS, *[9] * 30]], shards=1
    )
    one = loader({folders["prose"]: 0.5, broken: 0.5}, local=8, prefetch=prefetch)
    with pytest.raises(
        ValueError, match=r"document 9 of .*odd: 2 image codes at 2 must be 4 codes"
    ):
        steps([one], 20)
    assert len(set(one.lanes[:, -1].tolist())) == 1
    with pytest.raises(ValueError, match="document 9 of"):
        steps([one], 20)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_passing_error_loses_and_repeats_nothing(three, prefetch, monkeypatch):
    expected = [fields["batch"].tokens_BS for fields, _ in itertools.islice(loader(three), 40)]
    read, reads = TokenSource.document, itertools.count()

    def fails_once(source, number):
        if next(reads) == 30:
            raise OSError("the disk is away")
        return read(source, number)

    monkeypatch.setattr(TokenSource, "document", fails_once)
    one, handed = loader(three, prefetch=prefetch), []
    with pytest.raises(OSError, match="the disk is away"):
        handed.extend(fields["batch"].tokens_BS for fields, _ in one)
    assert handed, "the error must come after some good batches"
    handed.extend(
        fields["batch"].tokens_BS for fields, _ in itertools.islice(one, 40 - len(handed))
    )
    assert all(torch.equal(a, b) for a, b in zip(handed, expected, strict=True))


def test_abandoned_loaders_leave_no_thread(three):
    gc.collect()
    before = prefetch_threads()
    one = loader(three, prefetch=1)
    next(iter(one))
    assert prefetch_threads() == before + 1
    gone = weakref.ref(one)
    del one
    gc.collect()
    assert gone() is None and prefetch_threads() == before


# ---- validation --------------------------------------------------------------------------------


def test_validation_holds_every_document_once_whatever_the_ranks(three):
    sources = tuple(TokenSource(folder) for folder in three)
    blend = Blend(sources, tuple(three.values()))
    whole = validation_batches(blend, 24, rows=4)
    tokens = torch.cat([batch.tokens_BS for batch in whole])
    assert all(batch.tokens_BS.shape == (4, 24) for batch in whole)
    assert int((tokens != PAD).sum()) == sum(sum(source.tokens.values()) for source in sources)
    assert int((tokens == BOS).sum()) == sum(len(source) for source in sources)
    for ranks in (2, 4):
        parts = [validation_batches(blend, 24, rows=4, rank=r, ranks=ranks) for r in range(ranks)]
        for number, batch in enumerate(whole):
            for name, tensor in batch.tensors().items():
                assert torch.equal(tensor, torch.cat([p[number].tensors()[name] for p in parts]))
    few = validation_batches(blend, 24, rows=4, max_batches=2)
    assert len(few) == 2 and torch.equal(few[1].tokens_BS, whole[1].tokens_BS)
    blank = whole[-1].tokens_BS.eq(PAD).all(1)
    assert whole[-1].labels_BS[blank].eq(IGNORE_LABEL).all()


# ---- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("quota", [None, 0.3])
def test_a_checkpoint_keeps_its_order_of_the_sources(three, quota):
    """Whatever order the shares are given in: the checkpoint's columns are of its own sources."""
    first = loader(three, media_share=quota)
    steps([first], 5)
    state = first.state_dict()
    expected = steps([first], 7)
    drawn = first.progress()["source_tokens"]
    for names in itertools.permutations(three):
        given = {folder: three[folder] for folder in names}
        for order in ([], sorted(folder.name for folder in three)):
            resumed = loader(given, media_share=quota, order=order)
            resumed.load_state_dict(state)
            assert_same(steps([resumed], 7), expected)
            assert resumed.progress()["source_tokens"] == drawn
            assert json.loads(resumed.state_dict()["identity"])["order"] == list(drawn)


def test_a_new_run_takes_its_sources_in_the_order_it_is_told(three):
    order = sorted(folder.name for folder in three)
    given = [{f: three[f] for f in names} for names in itertools.permutations(three)]
    expected = steps([loader(given[0], order=order)], 6)
    for shares in given[1:]:
        assert_same(steps([loader(shares, order=order)], 6), expected)


def test_a_checkpoint_of_before_the_order_was_written_is_as_the_config_has_it(three):
    first = loader(three)
    steps([first], 5)
    state = first.state_dict()
    identity = json.loads(state["identity"])
    del identity["order"], identity["tokens"]
    old = loader(three, order=sorted(folder.name for folder in three))
    old.load_state_dict(state | {"identity": json.dumps(identity)})
    assert_same(steps([old], 7), steps([first], 7))
    for order in ([1], ["prose"], ["prose"] * 3, "prose"):
        damaged = state | {"identity": json.dumps(identity | {"order": order})}
        with pytest.raises(ValueError, match=r"order"):
            loader(three).load_state_dict(damaged)


def test_what_a_quota_draws_by_is_part_of_the_identity(folders, tmp_path):
    """Token counts edited in manifest and index alike, with every hash put right."""
    saved = loader({folders["mixed"]: 1.0}).state_dict()["identity"]
    fields = json.loads(saved)
    fields["tokens"]["mixed"]["image"] += 1
    with pytest.raises(ValueError, match=r"tokens of the data .* must be that of the checkpoint"):
        loader({folders["mixed"]: 1.0}).check_identity(json.dumps(fields))
    for content in ("", "[]", "{}", "[" * 10_000):
        with pytest.raises(ValueError, match="checkpoint"):
            loader({folders["mixed"]: 1.0}).check_identity(content)


def test_shares_are_checked(folders):
    prose, mixed = folders["prose"], folders["mixed"]
    with pytest.raises(ValueError, match=r"shares of sources .* must sum to 1, not 0.9"):
        loader({prose: 0.4, mixed: 0.5})
    with pytest.raises(ValueError, match=r"share of source 'mixed' \(0.0\) must be above 0"):
        loader({prose: 1.0, mixed: 0.0})
    with pytest.raises(ValueError, match="0 sources with 0 shares"):
        loader({})


def test_quota_out_of_reach_is_refused_with_numbers(folders):
    with pytest.raises(ValueError, match=r"media_share \(0.5\) .*\{'prose': 0.0\}"):
        loader({folders["prose"]: 1.0}, media_share=0.5)
    with pytest.raises(ValueError, match=r"media_share \(0.9\) must lie between .*'pairs': 0.5"):
        loader({folders["prose"]: 0.5, folders["pairs"]: 0.5}, media_share=0.9)


def test_row_lengths_and_batch_sizes_are_checked(three):
    with pytest.raises(ValueError, match=r"seq_len \(5\) must be at least 6: a block of 4 image"):
        loader(three, seq_len=5)
    loader(three, seq_len=6)
    with pytest.raises(
        ValueError, match=r"global_batch_size \(8\) must be a positive multiple .* \(3\)"
    ):
        loader(three, ranks=3)
    with pytest.raises(ValueError, match=r"local_batch_size \(3\) must divide the 4 rows"):
        loader(three, ranks=2, local=3)
    blend = loader(three).blend
    with pytest.raises(ValueError, match=r"rows of a validation batch \(3\)"):
        validation_batches(blend, 24, rows=3, ranks=2)


def test_an_id_outside_the_vocabulary_is_refused(tmp_path):
    odd = write_source(tmp_path / "odd", [[BOS, 66, EOS]] * 2)
    with pytest.raises(ValueError, match="token id 66 lies outside the vocabulary of 66"):
        next(iter(loader({odd: 1.0}, prefetch=0)))


def test_batches_are_pinned_where_there_is_a_gpu(three, monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(MixedBatch, "pin_memory", lambda batch: pinned.append(batch) or batch)
    for prefetch in (0, 2):
        inputs, _ = next(iter(loader(three, prefetch=prefetch)))
        assert any(inputs["batch"] is batch for batch in pinned)
