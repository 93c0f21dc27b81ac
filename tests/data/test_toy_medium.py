"""A medium is one row: two toys defined here go from raw tar to ``MixedBatch``.

"Dice" is discrete, a file's bytes being codes; "tracks" is continuous, a file holding float32
vectors of three numbers.
"""

import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
from raw_shards import contents, quiet, write_tar

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
from earlyfuse.models.vocabulary import Modality
from earlyfuse.parallel.trainer import Trainer
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


def loader(out, **options):
    shares = {"pairs": 0.3, "mixed": 0.4, "text": 0.3}
    config = LaneLoader.Config(
        sources={str(out / "train" / name): share for name, share in shares.items()},
        global_batch_size=4,
        **options,
    )
    return LaneLoader(config, dp_world_size=1, dp_rank=0, seq_len=SEQ_LEN, local_batch_size=2)


def test_a_run_on_vectors_that_no_model_reads_is_refused(prepared):
    data = DataSet(DataSet.Config(folder=str(prepared[0])))
    with pytest.raises(ValueError, match=r"has continuous vectors \(track\), which no model reads"):
        data.resolve(Trainer.Config(), 1)


def test_a_resumed_stream_goes_on_with_the_same_codes_and_vectors(prepared):
    out, _, _ = prepared
    unbroken = loader(out)
    batches = iter(unbroken)
    for _ in range(6):
        next(batches)
    state = unbroken.state_dict()
    resumed = loader(out, prefetch=0)
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
