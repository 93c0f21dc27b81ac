"""The data loader: exact resume on any ranks, prefetching, and refusals by name."""

import gc
import itertools
import json
import threading
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from tiny_sources import BEGIN, BOS, EOS, HASHES, image, loader, steps, write_source
from torch.distributed.device_mesh import init_device_mesh

from earlyfuse.data.shards.source import TokenSource
from earlyfuse.data.stream.batches import Prefetcher, validation_batches
from earlyfuse.models.batch import MixedBatch


def assert_same(left, right) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        for name in one:
            assert torch.equal(one[name], other[name]), name


# ---- ranks and resume --------------------------------------------------------------------------


@pytest.mark.parametrize("before, after, prefetch", [(1, 4, 0), (4, 1, 2), (2, 4, 2), (2, 2, 0)])
def test_any_ranks_see_the_same_rows_before_and_after_a_resume(three, prefetch, before, after):
    options = {"media_share": 0.3, "prefetch": prefetch}
    unbroken = steps([loader(three, media_share=0.3, prefetch=0)], 9)
    for stop in (0, 1, 5):
        first = [loader(three, r, before, **options) for r in range(before)]
        assert_same(steps(first, stop), unbroken[:stop])
        lanes = torch.cat([rank.lanes for rank in first])
        state = {"lanes": lanes, "identity": json.dumps(first[0].identity())}
        second = [loader(three, r, after, local=1, **options) for r in range(after)]
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


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_moves_between_one_rank_and_two(three, tmp_path):
    unbroken, last = loader(three, local=8), loader(three, local=4)
    steps([unbroken], 3)
    dcp.save({"dataloader": unbroken}, checkpoint_id=tmp_path / "one", no_dist=True)
    # the identity alone can be read first, where lanes of another shape could not
    saved = {"dataloader": {"identity": ""}}
    dcp.load(saved, checkpoint_id=tmp_path / "one", no_dist=True)
    with pytest.raises(ValueError, match=r"global_batch_size of the data \(4\) must be .* \(8\)"):
        loader(three, batch=4).check_identity(saved["dataloader"]["identity"])
    torch.multiprocessing.spawn(one_of_two_ranks, (three, tmp_path), nprocs=2)
    dcp.load({"dataloader": last}, checkpoint_id=tmp_path / "two", no_dist=True)
    steps([unbroken], 2)
    assert torch.equal(last.lanes, unbroken.lanes) and int(last.lanes[0, -1]) == 5
    assert_same(steps([last], 3), steps([unbroken], 3))


@pytest.mark.parametrize("quota", [None, 0.3])
def test_a_checkpoint_keeps_its_order_of_the_sources(three, quota):
    """Whatever order the config has: the checkpoint's columns are of its own sources."""
    first = loader(three, media_share=quota)
    steps([first], 5)
    state = first.state_dict()
    expected = steps([first], 7)
    drawn = first.progress()["source_tokens"]
    for names in itertools.permutations(three):
        order = sorted(folder.name for folder in three) if names[0].name == "mixed" else []
        resumed = loader({f: three[f] for f in names}, media_share=quota, order=order)
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


def test_a_checkpoint_without_an_order_has_that_of_the_config(three):
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


def test_resume_refuses_other_data_by_name(three, tmp_path):
    state = loader(three).state_dict()
    prose, pairs, mixed = three
    changed = write_source(tmp_path / "mixed", [[BOS, *image(), EOS]] * 4)
    hashes, few = HASHES | {"text": "cc"}, [[BOS, *image(), EOS]] * 3
    other_text = [write_source(tmp_path / "t" / f.name, few, hashes=hashes) for f in three]
    cases = {
        "seed": loader(three, seed=1),
        "global_batch_size": loader(three, batch=4),
        "data": loader({prose: 0.3, pairs: 0.2, changed: 0.5}),
        "shares": loader({prose: 0.2, pairs: 0.3, mixed: 0.5}),
        "media_share": loader(three, media_share=0.3),
        "tokenizers": loader(dict(zip(other_text, three.values(), strict=True))),
    }
    for field, other in cases.items():
        with pytest.raises(ValueError, match=f"^{field} of the data"):
            other.load_state_dict(state)
    loader(three, local=1).load_state_dict(state)
    # counts by which a quota draws, edited with every hash put right
    fields = json.loads(state["identity"])
    fields["tokens"]["mixed"]["image"] += 1
    for content in (json.dumps(fields), "", "[]", "{}", "[" * 10_000):
        with pytest.raises(ValueError, match="checkpoint"):
            loader(three).check_identity(content)


# ---- prefetch ----------------------------------------------------------------------------------


def test_an_error_in_the_background_surfaces_after_the_good_items():
    def items():
        yield from (1, 2)
        raise ZeroDivisionError("in the thread")

    ahead = Prefetcher(items(), 1)
    assert [next(ahead), next(ahead)] == [1, 2]
    for _ in range(2):
        with pytest.raises(ZeroDivisionError, match="in the thread"):
            next(ahead)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_broken_document_is_named_and_the_state_stays_whole(folders, tmp_path, prefetch):
    broken = [BOS, BEGIN, 50, 51, EOS, *[9] * 30]
    odd = write_source(tmp_path / "odd", [[BOS, 9, EOS]] * 9 + [broken], shards=1)
    one = loader({folders["prose"]: 0.5, odd: 0.5}, local=8, prefetch=prefetch)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"document 9 of .*odd: 2 image codes at 2 must be 4"):
            steps([one], 20)
        assert len(set(one.lanes[:, -1].tolist())) == 1


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_passing_error_loses_and_repeats_nothing(three, prefetch, monkeypatch):
    def tokens(source, number=None):
        return (fields["batch"].tokens_BS for fields, _ in itertools.islice(source, number))

    expected = list(tokens(loader(three), 40))
    read, reads = TokenSource.document, itertools.count()

    def fails_once(source, number):
        if next(reads) == 30:
            raise OSError("the disk is away")
        return read(source, number)

    monkeypatch.setattr(TokenSource, "document", fails_once)
    one, handed = loader(three, prefetch=prefetch), []
    with pytest.raises(OSError, match="the disk is away"):
        handed.extend(tokens(one))
    assert handed, "the error must come after some good batches"
    handed.extend(tokens(one, 40 - len(handed)))
    assert all(torch.equal(a, b) for a, b in zip(handed, expected, strict=True))


def test_abandoned_loaders_leave_no_thread(three):
    def prefetch_threads() -> int:
        return sum("earlyfuse-prefetch" in thread.name for thread in threading.enumerate())

    gc.collect()
    before = prefetch_threads()
    one = loader(three, prefetch=1)
    next(iter(one))
    assert prefetch_threads() == before + 1
    gone = weakref.ref(one)
    del one
    gc.collect()
    assert gone() is None and prefetch_threads() == before


def test_batches_are_pinned_where_there_is_a_gpu(three, monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(MixedBatch, "pin_memory", lambda batch: pinned.append(batch) or batch)
    for prefetch in (0, 2):
        inputs, _ = next(iter(loader(three, prefetch=prefetch)))
        assert any(inputs["batch"] is batch for batch in pinned)


# ---- refusals ----------------------------------------------------------------------------------


def test_configs_that_cannot_work_are_refused_by_name(three):
    prose, pairs, mixed = three
    loader(three, seq_len=6)
    for shares, options, message in (
        ({prose: 0.4, mixed: 0.5}, {}, r"shares of sources .* must sum to 1, not 0.9"),
        ({prose: 1.0, mixed: 0.0}, {}, r"share of source 'mixed' \(0.0\) must be above 0"),
        ({}, {}, "0 sources with 0 shares"),
        ({prose: 1.0}, {"media_share": 0.5}, r"media_share \(0.5\) .*\{'prose': 0.0\}"),
        (
            {prose: 0.5, pairs: 0.5},
            {"media_share": 0.9},
            r"\(0.9\) must lie .*'pairs': 0.5",
        ),
        (three, {"seq_len": 5}, r"seq_len \(5\) must be at least 6: each image block has 4 codes"),
        (three, {"seq_len": 0}, r"seq_len \(0\) must be at least 1"),
        (three, {"ranks": 3}, r"global_batch_size \(8\) must be a positive multiple .* \(3\)"),
        (three, {"ranks": 2, "local": 3}, r"local_batch_size \(3\) must divide the 4 rows"),
        (three, {"prefetch": -1}, r"prefetch \(-1\) must be at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            loader(shares, **options)
    with pytest.raises(ValueError, match=r"rows of a validation batch \(3\)"):
        validation_batches(loader(three).mixture, 24, rows=3, ranks=2)


def test_a_state_that_cannot_be_saved_or_loaded_is_refused(three):
    with pytest.raises(ValueError, match="loader of 2 data-parallel ranks needs their mesh"):
        loader(three, 0, 2).state_dict()
    one = loader(three)
    next(iter(one))
    with pytest.raises(ValueError, match="drawn 0 to 1 rows"):
        loader(three).load_state_dict(one.state_dict())


def test_an_id_outside_the_vocabulary_is_refused(tmp_path):
    odd = write_source(tmp_path / "odd", [[BOS, 66, EOS]] * 2)
    with pytest.raises(ValueError, match="token id 66 lies outside the vocabulary of 66"):
        next(iter(loader({odd: 1.0}, prefetch=0)))
