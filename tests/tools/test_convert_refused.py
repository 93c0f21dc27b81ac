"""What cannot be converted is refused with the reason, and nothing is written."""

import contextlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from exported_models import export
from public_chameleons import chameleon, write_meta
from safetensors.torch import load_file, save_file
from tiny_runs import MODELS, SHAPE

from earlyfuse.configs import decoders
from earlyfuse.parallel.checkpoint.open_checkpoint import load_model
from earlyfuse.tools.convert import convert, main


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """One good folder of each format: hf, sharded, meta, ours, dcp."""
    root = tmp_path_factory.mktemp("sources")
    theirs = chameleon(kv_heads=2, shards=2)
    theirs.save_pretrained(root / "hf")
    theirs.save_pretrained(root / "sharded", max_shard_size="60KB")
    write_meta(root / "meta", theirs, 2)
    export(decoders.dense(SHAPE), root / "ours")
    convert(root / "ours", root / "dcp", "dcp")
    return root


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def change_json(**changes) -> Callable[[Path], None]:
    """Set fields of a JSON file; a field set to None goes."""

    def change(path: Path) -> None:
        fields = json.loads(path.read_text()) | changes
        kept = {name: value for name, value in fields.items() if value is not None}
        path.write_text(json.dumps(kept))

    return change


def change_model(**changes) -> Callable[[Path], None]:
    """Set fields of the model in Meta's ``params.json``."""
    return lambda path: change_json(model=json.loads(path.read_text())["model"] | changes)(path)


def change_tensors(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        tensors = load_file(path)
        change(tensors)
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, str(path) + "2")
        os.replace(str(path) + "2", path)

    return write


def change_shard(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        held = torch.load(path, weights_only=True)
        change(held)
        torch.save(held, path)

    return write


class Code:
    def __reduce__(self):
        return (os.mkdir, ("code was run",))


def pickled(path: Path) -> None:
    torch.save({"output.weight": torch.ones(2), "extra": Code()}, path)


def text(content: str) -> Callable[[Path], None]:
    return lambda path: path.write_text(content)


QUERY = "model.layers.0.self_attn.q_norm.weight"
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
FIRST = "model-00001-of-00001.safetensors"

DEEP = "[" * 100_000 + "]" * 100_000


def deepen(path: Path) -> None:
    """A model of ours with 20,000 layers."""
    fields = json.loads(path.read_text())
    fields["model"]["layers"] *= 10_000
    path.write_text(json.dumps(fields))


HARM = [
    # files
    ("hf", "model.safetensors", truncate, "is truncated or no safetensors file"),
    ("hf", "model.safetensors", text("not tensors"), "is truncated or no safetensors file"),
    ("hf", "model.safetensors", Path.unlink, "must hold model.safetensors or"),
    (
        "sharded",
        "model-00002-of-*.safetensors",
        Path.unlink,
        "names .*00002.* are not in its folder",
    ),
    ("sharded", "model-00002-of-*.safetensors", truncate, "00002.* is truncated"),
    ("sharded", "model.safetensors.index.json", text("{"), "index.json is not valid JSON"),
    (
        "sharded",
        "model.safetensors.index.json",
        change_json(weight_map={"a": "../b"}),
        "lie outside",
    ),
    ("ours", FIRST, truncate, "is truncated or no safetensors file"),
    ("meta", "consolidated.01.pth", truncate, "is truncated or was not written by torch.save"),
    ("meta", "consolidated.01.pth", pickled, "would run code of its own"),
    ("meta", "consolidated.00.pth", Path.unlink, "lacks .*consolidated.00.pth"),
    ("meta", "consolidated.01.pth", Path.unlink, r"model_parallel_size .2., .* files .1.; copy"),
    ("dcp", "__0_0.distcp", truncate, "__0_0.distcp has .* bytes instead of"),
    ("dcp", "__0_0.distcp", Path.unlink, "__0_0.distcp is missing"),
    ("dcp", "config.json", Path.unlink, "config.json is missing|without config.json"),
    (
        "sharded",
        "model.safetensors.index.json",
        lambda path: path.with_name("model.safetensors").write_bytes(b""),
        "holds model.safetensors and .*index.json, which names other files: two models",
    ),
    ("sharded", "model.safetensors.index.json", text(DEEP), "index.json is nested more than"),
    (
        "sharded",
        "model.safetensors.index.json",
        change_json(weight_map={"a": "b" * 5000}),
        "lie outside",
    ),
    (
        "meta",
        "consolidated.01.pth",
        lambda path: shutil.copy(path, path.with_name("consolidated.99999999.pth")),
        "consolidated.99999999.pth, and shards are numbered below 1000",
    ),
    (
        "meta",
        "consolidated.01.pth",
        change_shard(lambda t: t.update({1: torch.ones(2)})),
        "must hold tensors",
    ),
    # keys
    ("hf", "model.safetensors", change_tensors(lambda t: t.pop(QUERY)), f"missing    {QUERY}"),
    (
        "hf",
        "model.safetensors",
        change_tensors(lambda t: t.update({"model.layers.9.extra": torch.ones(2)})),
        r"unexpected model.layers.9.extra \(2,\)",
    ),
    (
        "hf",
        "model.safetensors",
        change_tensors(lambda t: t.update({QUERY: torch.ones(16)})),
        rf"mis-shaped {QUERY}: \(16,\) instead of \(4, 16\)",
    ),
    (
        "hf",
        "model.safetensors",
        change_tensors(lambda t: t.update({QUERY: torch.ones(4, 16, dtype=torch.int8)})),
        "mis-typed .*int8",
    ),
    ("ours", FIRST, change_tensors(lambda t: t.pop("norm.weight")), "disagree on 1 tensors"),
    (
        "meta",
        "consolidated.01.pth",
        change_shard(lambda t: t.pop("layers.1.attention.wo.weight")),
        "missing    01/layers.1.attention.wo.weight",
    ),
    (
        "meta",
        "consolidated.01.pth",
        change_shard(lambda t: t.update(note="x")),
        "must hold tensors",
    ),
    (
        "hf",
        "model.safetensors",
        change_tensors(lambda t: t.update({QUERY: t[QUERY].to(torch.float8_e4m3fn)})),
        "mis-typed .*float8",
    ),
    # configs
    ("hf", "config.json", text(DEEP), "config.json is nested more than 100 levels deep"),
    ("hf", "config.json", text('{"a": ' + DEEP + "}"), "nested more than 100 levels deep"),
    ("hf", "config.json", change_json(num_hidden_layers=20_000), "more than the 2 layers"),
    ("hf", "config.json", change_json(eos_token_id=99, vocabulary_map={}), "eos_token_id .99."),
    ("meta", "params.json", text(DEEP), "params.json is nested more than 100 levels deep"),
    ("meta", "params.json", change_model(n_layers=9_999), "n_layers .9,999. is more than the 2"),
    ("meta", "text_tokenizer.json", text(DEEP), "text_tokenizer.json is nested more than 100"),
    ("ours", "config.json", text(DEEP), "config.json is nested more than 100 levels deep"),
    ("ours", "config.json", deepen, "layers .20,000. is more than the 2 layers in the files"),
    ("hf", "config.json", change_json(model_type="mamba"), "missing    backbone.embeddings.weight"),
    ("hf", "config.json", change_json(model_type="llama"), "norms on queries and keys"),
    ("hf", "config.json", change_json(model_type=None), "model_type .None. must be 'chameleon'"),
    ("hf", "config.json", change_json(attention_bias=True), "attention_bias .True. must be False"),
    ("hf", "config.json", change_json(mlp_bias=True), "mlp_bias .True. must be False"),
    ("hf", "config.json", change_json(hidden_act="gelu"), "hidden_act .'gelu'. must be 'silu'"),
    ("hf", "config.json", change_json(rms_norm_eps=1e-6), "rms_norm_eps"),
    (
        "hf",
        "config.json",
        change_json(rope_parameters=YARN),
        "rope_type .'yarn'. must be 'default'",
    ),
    (
        "hf",
        "config.json",
        change_json(rope_parameters=None, rope_scaling={"type": "linear", "factor": 2.0}),
        "rope_type .'linear'. must be 'default'",
    ),
    ("hf", "config.json", change_json(quantization_config={"bits": 4}), "quantization_config"),
    (
        "hf",
        "config.json",
        change_json(num_hidden_layers=3),
        "num_hidden_layers .3. is more than the 2 l",
    ),
    ("hf", "config.json", change_json(hidden_size="64"), "hidden_size .'64'. must be a whole"),
    (
        "hf",
        "config.json",
        change_json(num_attention_heads=0),
        "num_attention_heads .0. must lie in",
    ),
    (
        "hf",
        "config.json",
        change_json(num_hidden_layers=10**9),
        "num_hidden_layers .* is more than the 2",
    ),
    ("hf", "config.json", change_json(rope_parameters={"rope_theta": -1.0}), "rope_theta .-1.0."),
    ("hf", "config.json", change_json(vq_config="x"), "vq_config .'x'. must be an object"),
    (
        "hf",
        "config.json",
        change_json(vocabulary_map={"<s>": 1.5}),
        "<s> .1.5. must be a whole number",
    ),
    ("hf", "config.json", text("[]"), "must hold a JSON object"),
    ("hf", "config.json", text("{"), "config.json is not valid JSON"),
    ("meta", "params.json", change_json(model={"n_heads": 4}), "lacks .'dim', 'n_layers'."),
    ("meta", "params.json", change_json(model="x"), "model .'x'. must be an object"),
    ("meta", "params.json", change_model(n_layers=1.5), "params.json: n_layers .1.5. must be"),
    ("meta", "params.json", change_model(rope_theta=float("nan")), "rope_theta .nan. must be"),
    ("meta", "text_tokenizer.json", text("{}"), "tokenizer.json has no field 'model'"),
    ("meta", "params.json", change_json(qk_normalization=False, model=None), "lacks|qk_norm"),
    ("ours", "config.json", change_json(version=2), "version .2. must be 1"),
    ("ours", "config.json", change_json(vocabulary=None), "no field 'vocabulary'"),
    (
        "ours",
        "config.json",
        change_json(vocabulary={"media": [{"modality": 1}]}),
        "no field 'size'",
    ),
]


@pytest.mark.parametrize("folder, file, harm, says", HARM)
def test_damaged_and_foreign_folders_are_refused(
    sources, tmp_path, monkeypatch, folder, file, harm, says
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(sources / folder, tmp_path / "source")
    (found,) = (tmp_path / "source").glob(file)
    harm(found)
    for read in (
        lambda: convert(tmp_path / "source", tmp_path / "new"),
        lambda: load_model("source"),
    ):
        with pytest.raises(ValueError, match=says):
            read()
    assert [path.name for path in tmp_path.iterdir()] == ["source"], "nothing written, no code run"


def test_the_report_names_every_key_at_once(sources, tmp_path):
    shutil.copytree(sources / "hf", tmp_path / "hf")

    def change(tensors: dict) -> None:
        del tensors[QUERY], tensors["lm_head.weight"]
        tensors["other"] = torch.ones(1)

    change_tensors(change)(tmp_path / "hf" / "model.safetensors")
    with pytest.raises(ValueError) as raised:
        convert(tmp_path / "hf", tmp_path / "new")
    lines = str(raised.value).splitlines()
    assert "3 of its keys are wrong" in lines[0] and len(lines) == 5
    assert lines[1:4] == [
        f"  missing    {QUERY} (4, 16)",
        "  missing    lm_head.weight (96, 64)",
        "  unexpected other (1,)",
    ] or sorted(line.split()[1] for line in lines[1:4]) == sorted(
        [QUERY, "lm_head.weight", "other"]
    )


def test_a_damaged_byte_of_a_checkpoint_is_found_before_it_is_converted(sources, tmp_path):
    shutil.copytree(sources / "dcp", tmp_path / "dcp")
    path = tmp_path / "dcp" / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="another SHA-256"):
        convert(tmp_path / "dcp", tmp_path / "new")


@pytest.mark.parametrize("prefix", ["module.", "module._orig_mod."])
def test_names_behind_a_wrapper_are_refused_with_its_prefix(sources, tmp_path, prefix):
    shutil.copytree(sources / "hf", tmp_path / "hf")

    def wrap(tensors: dict) -> None:
        for name in list(tensors):
            tensors[prefix + name] = tensors.pop(name)

    change_tensors(wrap)(tmp_path / "hf" / "model.safetensors")
    with pytest.raises(ValueError, match=f"All names have '{prefix}' before them"):
        load_model(tmp_path / "hf")


@pytest.mark.parametrize("manifest", [True, False])
def test_any_damage_to_the_notes_of_dcp_is_said(sources, tmp_path, manifest):
    shutil.copytree(sources / "dcp", tmp_path / "dcp")
    if not manifest:
        (tmp_path / "dcp" / "manifest.json").unlink()
    path = tmp_path / "dcp" / ".metadata"
    content = path.read_bytes()
    for place in range(2, len(content), 1 + len(content) // 60):
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        try:
            load_model(tmp_path / "dcp")
            assert not manifest, f"byte {place} is another, and nobody said so"
        except ValueError as error:
            assert str(tmp_path / "dcp") in str(error)


def test_any_damage_to_a_torch_file_is_said_or_harmless(sources, tmp_path):
    shutil.copytree(sources / "meta", tmp_path / "meta")
    path = tmp_path / "meta" / "consolidated.01.pth"
    content = path.read_bytes()
    for place in range(60, 3000, 97):  # torch's notes on its tensors
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        with contextlib.suppress(ValueError):
            load_model(tmp_path / "meta")


def test_a_type_that_cannot_hold_the_values_is_refused(sources, tmp_path):
    shutil.copytree(sources / "hf", tmp_path / "hf")
    change = change_tensors(lambda t: t["lm_head.weight"].mul_(1e6))
    change(tmp_path / "hf" / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head.weight has values up to .* above 6.55e\+04"):
        convert(tmp_path / "hf", tmp_path / "new", dtype=torch.float16)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_verification_of_weights_that_are_no_numbers_says_so(sources, tmp_path):
    shutil.copytree(sources / "ours", tmp_path / "ours")
    change_tensors(lambda t: t["norm.weight"].fill_(torch.nan))(tmp_path / "ours" / FIRST)
    with pytest.raises(ValueError, match="itself has logits that are no numbers"):
        convert(tmp_path / "ours", tmp_path / "new", verify=True)
    convert(tmp_path / "ours", tmp_path / "copy")  # bit for bit, as it is


@pytest.mark.parametrize("to", ["earlyfuse", "dcp", "meta"])
def test_a_full_disk_is_said_and_nothing_is_kept(sources, tmp_path, monkeypatch, capsys, to):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert main([str(sources / "meta"), str(tmp_path / "new"), "--to", to]) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path / 'new'} could not be written" in said and "No space left" in said
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_leads_nowhere_is_no_destination(sources, tmp_path):
    (tmp_path / "new").symlink_to("nowhere")
    with pytest.raises(ValueError, match="is there already"):
        convert(sources / "ours", tmp_path / "new")


@pytest.mark.parametrize("content", [pickle.dumps(Code()), b"", b"junk", pickle.dumps({"a": 1})])
def test_notes_of_dcp_run_no_code(sources, tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(sources / "dcp", tmp_path / "dcp")
    (tmp_path / "dcp" / "manifest.json").unlink()
    (tmp_path / "dcp" / ".metadata").write_bytes(content)
    with pytest.raises(ValueError, match=r"\.metadata is damaged or not of a DCP checkpoint"):
        load_model(tmp_path / "dcp")
    assert not (tmp_path / "code was run").exists()


def test_only_pickled_weights_are_refused_by_name(sources, tmp_path):
    shutil.copytree(sources / "hf", tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").rename(tmp_path / "hf" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"only pytorch_model.bin, a pickle that may run code"):
        load_model(tmp_path / "hf")


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind != "dense"])
@pytest.mark.parametrize("to", ["hf", "meta"])
def test_sparse_and_untied_models_are_no_chameleons(tmp_path, kind, to):
    export(MODELS[kind](), tmp_path / "ours")
    with pytest.raises(ValueError, match=r"Chameleon cannot express this model: .* is "):
        convert(tmp_path / "ours", tmp_path / "new", to)
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_norms_that_differ_between_heads_have_no_place_in_metas_shards(tmp_path):
    chameleon(kv_heads=2).save_pretrained(tmp_path / "hf")
    with pytest.raises(ValueError, match="qk-norms differ between heads"):
        convert(tmp_path / "hf", tmp_path / "new", "meta")


def test_folders_that_hold_no_model_are_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ValueError, match="must hold a model"):
            load_model(folder)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ValueError, match=r"run\.json has no field 'config'"):
        load_model(tmp_path)
    (tmp_path / "run.json").write_text('{"config": {"checkpoint": {"folder": "checkpoint"}}}')
    with pytest.raises(ValueError, match="has no complete checkpoint"):
        load_model(tmp_path)


def test_what_is_there_is_not_overwritten_and_leftovers_are_named(sources, tmp_path, capsys):
    (tmp_path / "new").mkdir()
    assert main([str(sources / "ours"), str(tmp_path / "new")]) == 2
    assert "is there already" in capsys.readouterr().err
    (tmp_path / "other.part").mkdir()
    assert main([str(sources / "ours"), str(tmp_path / "other")]) == 2
    assert "another conversion writes it, or one was killed" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "other.part"]
