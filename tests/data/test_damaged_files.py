"""JSON beside prepared data, damaged in every field: refused by file, field and remedy."""

import base64
import json
import shutil

import pytest
from tiny_pairs import SHADES, make_pairs, png

from earlyfuse.data.prepare.report import describe
from earlyfuse.data.tokenizers import Tokenizers
from earlyfuse.parallel.evaluation.eval_tasks import load_tasks
from earlyfuse.parallel.evaluation.sample_generation import load_pairs
from earlyfuse.tools import prepare as command

GONE = object()
DAMAGES = [GONE, None, True, -1, 7, 10**30, 0.5, float("nan"), "x\x1b[2J\ud800", "", [], {}, [[]]]
WHOLE_FILES = [b"", b"[]", b"null", b"{", b"{}", b"\xff\xfe", b"[" * 100_000, b'{"tasks": {}}']


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = make_pairs(tmp_path_factory.mktemp("damaged") / "data")
    items = [
        {"image": base64.b64encode(png(shade)).decode(), "answer": name.split()[1]}
        for shade, name in enumerate(SHADES[:3])
    ]
    words = [item["answer"] for item in items]
    task = {"name": "shade", "prefix": "shade ", "candidates": words, "items": items}
    (folder / "validation" / "tasks.json").write_text(json.dumps({"tasks": [task]}))
    return folder


@pytest.fixture
def data(pairs, tmp_path):
    shutil.copytree(pairs, tmp_path / "data")
    return tmp_path / "data"


def places(value, path=()):
    items = value.items() if isinstance(value, dict) else enumerate(value[:1])
    for key, inner in items:
        yield (*path, key)
        if isinstance(inner, dict | list):
            yield from places(inner, (*path, key))


def damaged(content: bytes):
    """Contents of a JSON file, each with another fault; the first of a list stands for all."""
    yield from WHOLE_FILES
    for place in places(json.loads(content)):
        for damage in DAMAGES:
            value = json.loads(content)
            *before, last = place
            inner = value
            for key in before:
                inner = inner[key]
            if damage is GONE:
                del inner[last]
            else:
                inner[last] = damage
            if json.dumps(value) != json.dumps(json.loads(content)):
                yield json.dumps(value).encode()


@pytest.mark.parametrize(
    ("file", "allowed"),
    [
        # "name", "prefix" and a first candidate that is no answer may be any other words; an empty
        # list of tasks, or one item less, is a file of its own
        ("validation/tasks.json", 5),
        ("validation/prompts.json", 3),
        ("train/pairs/manifest.json", 1),  # as before manifests had the hash of all
        ("tokenizers/vocabulary.json", 0),
    ],
)
def test_json_is_refused_by_file_and_remedy(data, file, allowed):
    """Every damage, but for ``allowed`` ones that are as good as the whole file."""
    path = data / file
    readers = {
        "tasks.json": lambda: load_tasks(data),
        "prompts.json": lambda: load_pairs(path, Tokenizers.load(data / "tokenizers")),
    }
    read = readers.get(path.name, lambda: describe(data))
    read()
    taken = []
    for content in damaged(path.read_bytes()):
        path.write_bytes(content)
        try:
            read()
            taken.append(content[:200])
        except ValueError as error:
            said = str(error)
            assert path.name in said and str(path.parent) in said, (content[:200], said)
            assert "\x1b" not in said and "\ud800" not in said and len(said) < 1000, said
            assert "again" in said or "remove" in said or "another" in said, said
    assert len(taken) <= allowed, taken


@pytest.mark.parametrize("suffix", [".tar", ".index.npy", ".crc.npy"])
def test_inspect_on_damaged_shards_is_one_line(data, suffix, capsys):
    path = data / "train" / "pairs" / f"shard-000000{suffix}"
    for content in (b"", path.read_bytes()[:-3], b"x" * path.stat().st_size, None):
        path.unlink() if content is None else path.write_bytes(content)
        status = command.main(["inspect", str(data)])
        if suffix == ".tar" and content and content[:2] == b"xx":
            continue  # documents are compared with their checksums when they are trained on
        assert status == 2
        said = capsys.readouterr().err
        assert len(said.splitlines()) == 1 and path.name in said and "again" in said
