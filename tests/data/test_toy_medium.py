"""A medium is one row: two toys defined here go from raw tar to ``MixedBatch``.

"Dice" is discrete, a file's bytes being codes; "tracks" is continuous, a file holding float32
vectors of three numbers.
"""

import base64
import hashlib
import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from raw_shards import contents, quiet, write_tar

from earlyfuse.configs import embedded
from earlyfuse.data.documents import BadSample
from earlyfuse.data.media import MEDIA, Medium, Sampling, VectorType
from earlyfuse.data.prepare import PrepareSpec, prepare
from earlyfuse.data.prepare.report import describe
from earlyfuse.data.shards.manifest import read_manifest
from earlyfuse.data.shards.source import TokenSource
from earlyfuse.data.stream.batches import validation_batches
from earlyfuse.data.stream.loader import LaneLoader
from earlyfuse.data.stream.mixture import Mixture
from earlyfuse.data.tokenizers import Tokenizers
from earlyfuse.models.batch import IGNORE_LABEL
from earlyfuse.models.blocks.vector_adapters import VectorAdapters
from earlyfuse.models.vocabulary import Modality
from earlyfuse.parallel.evaluation.eval_tasks import load_tasks
from earlyfuse.parallel.training.data_config import DataSet

SEQ_LEN, WIDTH, SIDES = 64, 3, 6
SENTENCES = [f"thrown {n} times on table {n % 7}, and {n * 3} more" for n in range(60)]


class ToyTokenizer:
    """Reads bytes as codes, or as float32 vectors where ``vectors``."""

    kind, decodes, block, batch = "toy", False, 0, 8

    def __init__(self, vectors):
        self.vectors, self.codes = vectors, 1 if vectors else SIDES
        self.settings = {"vectors": bool(vectors)}
        self.sha256 = hashlib.sha256(self.to_bytes()).hexdigest()

    def features(self, payload):
        if self.vectors:
            return np.frombuffer(payload, np.float32).reshape(-1, WIDTH)
        if max(payload) >= SIDES:
            raise BadSample("corrupt-dice", f"{max(payload)} is on no side")
        return np.frombuffer(payload, np.uint8).astype(np.int64)

    def encode_items(self, items):
        return items

    def error(self, items, codes, measured):
        return 0, 0

    def to_bytes(self):
        return json.dumps(self.settings).encode()


class ToyModule:
    """The module that a row imports. The toy tokenizer learns nothing."""

    QUALITY = "error"

    def __init__(self, vectors):
        self.vectors = vectors

    def load(self, path):
        return ToyTokenizer(self.vectors)

    def check(self, spec):
        pass

    def settings(self, spec):
        return {"vectors": bool(self.vectors)}

    def limits(self, spec):
        return {}

    def sampling(self, spec):
        return Sampling(10, ToyTokenizer(self.vectors).features, len)

    def train(self, items, spec, progress):
        return ToyTokenizer(self.vectors), f"{len(items)} items seen"

    def quality(self, mean_squared_error):
        return mean_squared_error


MODULES = {"dice": ToyModule(None), "track": ToyModule(VectorType(WIDTH, "float16"))}


def dice_module():
    return MODULES["dice"]


def track_module():
    return MODULES["track"]


def row(label, module):
    return Medium(
        modality=Modality.register(label),
        payload=label,
        item=f"item of {label}",
        suffixes=(label,),
        list_name=f"{label}s",
        caption_fields=("caption",),
        sentinels=(f"<{label}>", f"</{label}>"),
        module=module,
        kinds=("toy",),
        default="none",
        written=label,
        colour="#000000",
    )


@pytest.fixture(scope="module")
def toys():
    """Registered at run time, as a user's own script does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Modality, "LABELS", [*Modality.LABELS])
        for medium in (row("dice", dice_module), row("track", track_module)):
            patch.setitem(MEDIA, medium.label, medium)
        yield


def dice(rng):
    return rng.integers(0, SIDES, rng.integers(2, 9)).astype(np.uint8)


def track(rng):
    # whole numbers: exact in the shards' float16
    return rng.integers(-99, 99, (rng.integers(2, 9), WIDTH)).astype(np.float32)


def toy_spec(out, *shards, **changes):
    tokenizers = {"image_tokenizer": "none", "media_tokenizers": {"dice": "toy", "track": "toy"}}
    fields = {"text_vocab": 330, "max_bad_rate": 0.1, "workers": 1, **tokenizers, **changes}
    return PrepareSpec(out, {shard.stem: shard for shard in shards}, **fields)


@pytest.fixture(scope="module")
def prepared(toys, tmp_path_factory):
    """Sources of dice (pairs), of both media (interleaved), and of text alone; what was written."""
    folder = tmp_path_factory.mktemp("toys")
    rng = np.random.default_rng(0)
    thrown = [dice(rng) for _ in SENTENCES]
    paths = [track(rng) for _ in SENTENCES]
    pairs, mixed = [("bad.dice", bytes([SIDES])), ("bad.txt", b"no such side")], []
    # two tracks: a row may end between them
    names = {"dices": [None, None, "a.dice", None], "tracks": ["b.track", None, None, "c.track"]}
    for n, text in enumerate(SENTENCES):
        sides, path = thrown[n].tobytes(), paths[n]
        pairs += [(f"{n}.dice", sides), (f"{n}.txt", text.encode())]
        lists = {"texts": [None, text, None, None], **names}
        mixed += [(f"{n}.json", json.dumps(lists).encode()), (f"{n}.a.dice", sides)]
        mixed += [(f"{n}.b.track", path.tobytes()), (f"{n}.c.track", path[::-1].tobytes())]
    texts = [(f"{n}.txt", s.encode()) for n, s in enumerate(SENTENCES)]
    samples = {"pairs": pairs, "mixed": mixed, "text": texts}
    shards = [write_tar(folder / f"{name}.tar", members) for name, members in samples.items()]
    prepare(toy_spec(folder / "out", *shards), quiet())
    return folder / "out", thrown, paths


def test_worker_processes_know_a_medium_registered_at_run_time(prepared, tmp_path):
    out, _, _ = prepared
    shards = [out.parent / f"{name}.tar" for name in ("pairs", "mixed", "text")]
    prepare(toy_spec(tmp_path / "out", *shards, workers=2), quiet())
    assert contents(tmp_path / "out") == contents(out)


def test_a_medium_that_workers_cannot_import_is_refused_by_name(prepared, tmp_path, monkeypatch):
    shard = prepared[0].parent / "text.tar"
    spec = toy_spec(tmp_path / "out", shard, workers=2)
    monkeypatch.setitem(MEDIA, "dice", row("dice", lambda: MODULES["dice"]))
    with pytest.raises(ValueError, match=r"medium 'dice' cannot be sent .*workers to 1"):
        prepare(spec, quiet())


def test_documents_hold_the_items_codes_and_vectors(prepared):
    out, thrown, paths = prepared
    source = TokenSource(out / "train" / "mixed")
    source.verify()
    vocabulary = Tokenizers.load(out / "tokenizers").vocabulary
    dice, track = (vocabulary.medium(Modality[label]) for label in ("dice", "track"))
    assert (dice.count, track.count) == (SIDES, 1)
    for number, (sides, path) in enumerate(zip(thrown, paths, strict=True)):
        ids, counts = source.document(number)
        modality = vocabulary.modality_of(torch.from_numpy(ids.astype(np.int64))).numpy()
        assert (ids[modality == dice.modality] - dice.start).tolist() == sides.tolist()
        assert (ids[modality == track.modality] == track.start).all()
        assert counts[1:] == [len(sides), 2 * len(path)]
        assert np.array_equal(source.document_vectors(number), np.concatenate([path, path[::-1]]))


def test_manifest_and_report_count_the_new_modalities(prepared):
    out, thrown, paths = prepared
    manifest = read_manifest(out / "train" / "mixed")
    assert manifest["tokens"]["dice"] == sum(map(len, thrown))
    assert manifest["tokens"]["track"] == 2 * sum(map(len, paths))
    assert manifest["longest"]["track"] == max(map(len, paths))
    assert manifest["format"] == "earlyfuse-tokens/2" and manifest["vectors"]["width"] == WIDTH
    assert read_manifest(out / "train" / "pairs")["drops"] == {"corrupt-dice": 1}
    assert "dice tokens" in describe(out) and "track tokens" in describe(out)


def test_batches_have_the_vectors_at_the_placeholders_and_zeros_elsewhere(prepared):
    out, _, paths = prepared
    mixture = Mixture((TokenSource(out / "train" / "mixed"),), (1.0,))
    batches = validation_batches(mixture, SEQ_LEN, 4)
    there = [batch.modality_BS == Modality["track"] for batch in batches]
    vectors = [batch.vectors_BSP[mask] for batch, mask in zip(batches, there, strict=True)]
    twice = np.concatenate([track for path in paths for track in (path, path[::-1])])
    assert torch.equal(torch.cat(vectors), torch.from_numpy(twice))
    assert batches[0].vectors_BSP.dtype == torch.float32
    for batch, mask in zip(batches, there, strict=True):
        assert not batch.vectors_BSP[~mask].any()
        assert (batch.span_BS[mask] > 0).all()
        assert torch.equal(batch.has_vector_BS, mask) and batch.time_BS is None
        assert torch.equal(batch.part(slice(5, 20)).has_vector_BS, mask[:, 5:20])


def test_text_and_codes_are_labels_and_vectors_and_what_follows_them_are_not(prepared):
    out, _, _ = prepared
    mixture = Mixture((TokenSource(out / "train" / "mixed"),), (1.0,))
    track = mixture.vocabulary.medium(Modality["track"])
    unlabelled = set()
    for batch in validation_batches(mixture, SEQ_LEN, 4):
        same_BS = batch.document_BS[:, 1:] == batch.document_BS[:, :-1]
        same_BS &= batch.document_BS[:, 1:] > 0
        here_BS, next_BS = batch.tokens_BS[:, :-1], batch.tokens_BS[:, 1:]
        vector_BS = (here_BS == track.start) | (next_BS == track.start)
        labels_BS = batch.labels_BS[:, :-1]
        labelled_BS = same_BS & ~vector_BS
        assert torch.equal(labels_BS[labelled_BS], next_BS[labelled_BS])
        assert (labels_BS[same_BS & vector_BS] == IGNORE_LABEL).all()
        pairs = zip(here_BS[vector_BS].tolist(), next_BS[vector_BS].tolist(), strict=True)
        unlabelled |= set(pairs)
        assert not (batch.label_modality_BS == track.modality).any()
        assert (batch.label_modality_BS[batch.labels_BS == IGNORE_LABEL] == 0).all()
    p = track.start
    assert unlabelled >= {(track.begin, p), (p, p), (p, track.end)}


def loader(out, **options):
    shares = {"pairs": 0.3, "mixed": 0.4, "text": 0.3}
    config = LaneLoader.Config(
        sources={str(out / "train" / name): share for name, share in shares.items()},
        global_batch_size=4,
        **options,
    )
    return LaneLoader(config, dp_world_size=1, dp_rank=0, seq_len=SEQ_LEN, local_batch_size=2)


def run_on(folder, vectors):
    """The resolved config of a run on ``folder``, of a model with ``vectors``."""
    config = embedded.dense()
    config.data.folder, config.validator.enable = str(folder), False
    config.dataloader.media_share = None
    model = config.model_spec.model
    model.vocab_size, model.modalities = 330 + SIDES + 1, tuple(Modality)
    model.vectors = vectors
    return DataSet(config.data).resolve(config, 1)


def adapters(width=WIDTH, media=("track",), **fields):
    modalities = tuple(Modality[label] for label in media)
    return VectorAdapters.Config(width=width, modalities=modalities, **fields)


def test_a_model_and_its_data_agree_about_vectors(prepared, tmp_path):
    out, _, _ = prepared
    for later_see in ("noised", "clean"):
        found = run_on(out, adapters(later_see=later_see))
        copies = later_see == "clean"
        assert found.dataloader.clean_copies == found.validator.clean_copies == copies
    # their shape is that of the data, whatever the config's
    other = run_on(out, adapters(width=4, channels=1)).model_spec.model.vectors
    assert (other.width, other.channels) == (WIDTH, WIDTH)
    spec = toy_spec(tmp_path, out.parent / "pairs.tar", media_tokenizers={"dice": "toy"})
    prepare(spec, quiet())
    for folder, vectors, said in (
        (out, None, r"has continuous vectors \(track\), which a model without vectors"),
        (tmp_path, adapters(), r"vectors \(of width 3\) need data with .*pairs has none"),
        (out, adapters(media=("image",)), r"modalities \(image\) must be .*mixed \(track\)"),
        (out, adapters(media=("image", "track")), r"modalities \(image, track\) must be"),
        (out, adapters(block=4), r"vectors.block \(4\) needs items of one size.*mixed have any"),
    ):
        with pytest.raises(ValueError, match=said):
            run_on(folder, vectors)


def test_default_shares_count_clean_copies(prepared):
    shares = [
        run_on(prepared[0], adapters(later_see=later_see)).dataloader.sources
        for later_see in ("noised", "clean")
    ]
    for copies, found in enumerate(shares):
        sources = [TokenSource(folder) for folder in found]
        sizes = [sum(s.tokens.values()) + copies * s.tokens["track"] for s in sources]
        assert list(found.values()) == [size / sum(sizes) for size in sizes]
    assert shares[0] != shares[1]


def test_a_block_of_an_item_is_that_of_prepared_documents(prepared):
    out, thrown, paths = prepared
    source, tokenizers = TokenSource(out / "train" / "mixed"), Tokenizers.load(out / "tokenizers")
    (ids, _), vectors = source.document(0), source.document_vectors(0)
    tracks = [tokenizers.block_of("track", path) for path in (paths[0], paths[0][::-1])]
    dice, none = tokenizers.block_of("dice", thrown[0].astype(np.int64))
    assert none is None and [t.dtype for _, t in tracks] == [np.float32] * 2
    assert np.array_equal(np.concatenate([found for _, found in tracks]), vectors)
    text = str(ids.tolist())
    assert all(str(block)[1:-1] in text for block in (dice, tracks[0][0], tracks[1][0]))
    third = np.full((1, WIDTH), 1 / 3, np.float32)
    assert (tokenizers.block_of("track", third)[1] == np.float16(1 / 3)).all(), "as stored"


def test_a_task_of_vectors_is_read_and_answered(prepared, tmp_path):
    out, _, paths = prepared
    shutil.copytree(out / "tokenizers", tmp_path / "tokenizers")
    items = [{"track": base64.b64encode(path.tobytes()).decode(), "answer": "table"}
             for path in paths[:5]]  # fmt: skip
    task = {"name": "place", "prefix": "on ", "candidates": ["table", "floor"], "items": items}
    (tmp_path / "validation").mkdir()
    (tmp_path / "validation" / "tasks.json").write_text(json.dumps({"tasks": [task]}))
    (loaded,) = load_tasks(tmp_path)
    assert all(np.array_equal(*pair) for pair in zip(loaded.vectors, paths[:5], strict=True))
    track = loaded.vocabulary.medium(Modality["track"]).start
    assert [p.count(track) for p in loaded.prompts] == [len(path) for path in paths[:5]]


@pytest.mark.parametrize("copies", [False, True])
def test_a_resumed_stream_goes_on_with_the_same_codes_and_vectors(prepared, copies):
    out, _, _ = prepared
    unbroken = loader(out, clean_copies=copies)
    batches = iter(unbroken)
    for _ in range(6):
        next(batches)
    state = unbroken.state_dict()
    resumed = loader(out, prefetch=0, clean_copies=copies)
    resumed.load_state_dict(state)
    seen = set()
    for expected, found in zip(range(20), resumed, strict=False):
        (expected, labels), (fields, found_labels) = next(batches), found
        assert torch.equal(labels, found_labels)
        flat = [batch.get("batch", batch) for batch in (expected, fields)]
        flat = [batch.tensors() if hasattr(batch, "tensors") else batch for batch in flat]
        assert flat[0].keys() == flat[1].keys() and "vectors_BSP" in flat[0]
        assert all(torch.equal(flat[0][name], flat[1][name]) for name in flat[0])
        seen |= set(flat[0]["modality_BS"].unique().tolist())
    assert {Modality["dice"], Modality["track"]} <= seen
    unbroken.close()


def noised(batch):
    """Positions of the first half of each run of vectors."""
    first_BS = torch.zeros_like(batch.has_vector_BS)
    for row, has_vector in enumerate(batch.has_vector_BS.tolist()):
        at = 0
        for inside, run in itertools.groupby(has_vector):
            length = len(list(run))
            first_BS[row, at : at + length // 2] = inside
            at += length
    return first_BS


def whole_documents(batches, dropped):
    """Tokens and vectors of each document that no row divides → its other fields, without the
    positions ``dropped`` of each batch.
    """
    found = {}
    for batch, drop_BS in zip(batches, dropped, strict=True):
        for row, documents in enumerate(batch.document_BS):
            for number in documents.unique().tolist():
                here = (documents == number) & ~drop_BS[row]
                fields = {name: t[row][here].tolist() for name, t in batch.tensors().items()}
                del fields["span_BS"], fields["document_BS"]
                key = str([fields.pop("tokens_BS"), fields.pop("vectors_BSP")])
                if number and key.startswith("[[1, ") and fields["labels_BS"][-1] == IGNORE_LABEL:
                    found[key] = fields
    return found


def test_clean_copies_follow_their_items_and_change_nothing_else(prepared):
    sources = (TokenSource(prepared[0] / "train" / "mixed"),)
    plain, copied = (
        validation_batches(Mixture(sources, (1.0,), clean_copies=copies), 256, 4)
        for copies in (False, True)
    )
    first = [noised(batch) for batch in copied]
    nothing = [torch.zeros_like(batch.has_vector_BS) for batch in plain]
    one, other = whole_documents(plain, nothing), whole_documents(copied, first)
    shared = one.keys() & other.keys()
    assert len(shared) > 30 and all(one[key] == other[key] for key in shared)
    for batch, noised_BS in zip(copied, first, strict=True):
        clean_BS = batch.has_vector_BS & ~noised_BS
        for name in ("tokens_BS", "positions_BS", "vectors_BSP", "document_BS"):
            tensor = getattr(batch, name)
            assert torch.equal(tensor[noised_BS], tensor[clean_BS]), name
        assert torch.equal(batch.span_BS[noised_BS] + 1, batch.span_BS[clean_BS])
        assert (batch.labels_BS[batch.has_vector_BS] == IGNORE_LABEL).all()
        for row in batch.span_BS:
            numbers = row.unique_consecutive()
            numbers = numbers[numbers > 0].tolist()
            assert numbers == list(range(1, 1 + len(numbers))), "each span has a number of its own"


def test_quota_and_progress_count_clean_copies(prepared):
    one = loader(prepared[0], clean_copies=True, media_share=0.4, prefetch=0)
    seen = torch.zeros(len(Modality), dtype=torch.int64)
    stream = iter(one)
    for _ in range(60):
        batch = next(stream)[0]["batch"]
        real = batch.modality_BS[batch.document_BS > 0].long()
        seen += torch.bincount(real, minlength=len(Modality))
    counted = one.progress()["tokens"]
    assert {label: int(seen[Modality[label]]) for label in counted} == counted
    codes = counted["dice"] + counted["track"]
    assert codes / sum(counted.values()) == pytest.approx(0.4, abs=0.02)
    mixed = TokenSource(prepared[0] / "train" / "mixed")
    text, dice, track = (mixed.tokens[label] for label in ("text", "dice", "track"))
    fraction = (dice + 2 * track) / (text + dice + 2 * track)
    assert one.mixture.media_fraction(mixed) == pytest.approx(fraction)


def test_rows_must_hold_an_item_and_its_clean_copy(prepared):
    source = TokenSource(prepared[0] / "train" / "mixed")
    longest = source.longest["track"]
    assert source.longest["dice"] < 2 * longest
    for length in (2 * longest + 1, 2 * longest + 2):
        mixture = Mixture((source,), (1.0,), clean_copies=True)
        if length < 2 * longest + 2:
            with pytest.raises(ValueError, match=rf"at least {2 * longest + 2}: .* clean copy"):
                validation_batches(mixture, length, 1)
        else:
            validation_batches(mixture, length, 1)
    shards = TokenSource(prepared[0] / "train" / "pairs")
    shards.vectors = None
    with pytest.raises(ValueError, match=r"clean_copies \(True\) needs a source with continuous"):
        Mixture((shards,), (1.0,), clean_copies=True)


def test_a_run_with_clean_copies_does_not_resume_without(prepared):
    plain, copied = loader(prepared[0]), loader(prepared[0], clean_copies=True)
    for one, other in ((plain, copied), (copied, plain)):
        with pytest.raises(ValueError, match=r"clean_copies of the data .* later_see"):
            one.load_state_dict(other.state_dict())


def test_damaged_vectors_are_refused_by_document(prepared, tmp_path):
    folder = shutil.copytree(prepared[0] / "train" / "mixed", tmp_path / "mixed")
    path = folder / "shard-000000.vectors.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    source = TokenSource(folder)
    with pytest.raises(ValueError, match="checksum"):
        source.document(len(source) - 1)
    with pytest.raises(ValueError, match=r"vectors\.npy: SHA-256"):
        source.verify()
    path.write_bytes(content[:-2])
    with pytest.raises(ValueError, match=r"vectors\.npy is truncated"):
        TokenSource(folder)


def test_without_a_continuous_medium_shards_are_of_format_1(prepared, tmp_path):
    spec = toy_spec(tmp_path, prepared[0].parent / "pairs.tar", media_tokenizers={"dice": "toy"})
    manifest = prepare(spec, quiet())["train/pairs"]
    assert manifest["format"] == "earlyfuse-tokens/1" and "vectors" not in manifest
    assert not list(tmp_path.rglob("*.vectors.npy"))
