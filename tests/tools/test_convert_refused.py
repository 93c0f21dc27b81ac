"""Models that cannot be converted are refused with the reason, and nothing is written."""

import contextlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from exported_models import change_json, change_state, change_tensors, export
from public_chameleons import chameleon, write_meta
from public_mambas import hugging_face, write_mamba_ssm
from tiny_runs import MAMBA_SHAPE, MAMBAS, MODELS, SHAPE

from earlyfuse.configs import decoders, mamba_decoders
from earlyfuse.parallel.checkpoint.open_checkpoint import load_model
from earlyfuse.tools.convert import convert, main


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """One good folder of each format."""
    root = tmp_path_factory.mktemp("sources")
    theirs = chameleon(kv_heads=2, shards=2)
    theirs.save_pretrained(root / "hf")
    theirs.save_pretrained(root / "sharded", max_shard_size="60KB")
    write_meta(root / "meta", theirs, 2)
    hugging_face().save_pretrained(root / "mamba")
    write_mamba_ssm(root / "ssm", hugging_face())
    export(decoders.dense(SHAPE), root / "ours")
    convert(root / "ours", root / "dcp", "dcp")
    return root


@pytest.fixture
def copy(sources, tmp_path) -> Callable[[str], Path]:
    """A copy of a source in the test's folder, by its name."""
    return lambda name: Path(shutil.copytree(sources / name, tmp_path / name))


class Code:
    def __reduce__(self):
        return (os.mkdir, ("code was run",))


Harm = Callable[[Path], None]
QUERY = "model.layers.0.self_attn.q_norm.weight"
FIRST = "model-00001-of-00001.safetensors"
INDEX = "model.safetensors.index.json"
DEEP = "[" * 100_000 + "]" * 100_000
MAMBA_2 = "rate of decay for all channels and states of a head"
MIXER = "backbone.layers.{}.mixer."


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def text(content: str) -> Harm:
    return lambda path: path.write_text(content)


def fields(**changes) -> Harm:
    """Set fields of a JSON file; a field set to None goes."""
    return lambda path: change_json(path, **changes)


def model_fields(**changes) -> Harm:
    """Set fields of the model in Meta's ``params.json``."""
    return lambda path: change_json(path, model=json.loads(path.read_text())["model"] | changes)


def tensors(**named) -> Harm:
    """Set tensors of a safetensors file or values of ``torch.save``; one set to None goes."""

    def change(state: dict) -> None:
        state.update(named)
        for name in [name for name, value in state.items() if value is None]:
            del state[name]

    def harm(path: Path) -> None:
        (change_tensors if path.suffix == ".safetensors" else change_state)(path, change)

    return harm


def deepen(path: Path) -> None:
    """A model of ours with 20,000 layers."""
    model = json.loads(path.read_text())["model"]
    change_json(path, model=model | {"layers": model["layers"] * 10_000})


def beside(path: Path) -> None:
    path.with_name("model.safetensors").write_bytes(b"")


def far_shard(path: Path) -> None:
    shutil.copy(path, path.with_name("consolidated.99999999.pth"))


def save_code(path: Path) -> None:
    torch.save({"extra": Code()}, path)


HARM: dict[tuple[str, str], list[tuple[Harm, str]]] = {
    ("hf", "model.safetensors"): [
        (truncate, "is truncated or no safetensors file"),
        (Path.unlink, "must hold model.safetensors or"),
        (tensors(**{QUERY: None}), f"missing    {QUERY}"),
        (tensors(**{"model.layers.9.extra": torch.ones(2)}), r"unexpected model.layers.9.extra"),
        (tensors(**{QUERY: torch.ones(16)}), rf"mis-shaped {QUERY}: \(16,\) instead of \(4, 16\)"),
        (tensors(**{QUERY: torch.ones(4, 16, dtype=torch.int8)}), "mis-typed .*int8"),
        (tensors(**{QUERY: torch.ones(4, 16).to(torch.float8_e4m3fn)}), "mis-typed .*float8"),
    ],
    ("hf", "config.json"): [
        (text("[]"), "must hold a JSON object"),
        (text("{"), "config.json is not valid JSON"),
        (text('{"a": ' + DEEP + "}"), "config.json is nested more than 100 levels deep"),
        (fields(model_type="mamba"), "missing    backbone.embeddings.weight"),
        (fields(model_type="llama"), "'llama'. must be 'chameleon' or 'mamba'.*norms on queries"),
        (fields(model_type="mamba2"), f"'mamba2'. must be .*{MAMBA_2}"),
        (fields(model_type="falcon_mamba"), "FalconMamba norms step sizes, B and C"),
        (fields(attention_bias=True), "attention_bias .True. must be False"),
        (fields(mlp_bias=True), "mlp_bias .True. must be False"),
        (fields(hidden_act="gelu"), "hidden_act .'gelu'. must be 'silu'"),
        (fields(rms_norm_eps=1e-6), "rms_norm_eps"),
        (fields(quantization_config={"bits": 4}), "quantization_config"),
        (fields(rope_parameters={"rope_type": "yarn", "factor": 4.0}), "rope_type .'yarn'. must"),
        (fields(rope_parameters=None, rope_scaling={"type": "linear"}), "rope_type .'linear'."),
        (fields(rope_parameters={"rope_theta": -1.0}), "rope_theta .-1.0."),
        (fields(hidden_size="64"), "hidden_size .'64'. must be a whole"),
        (fields(num_attention_heads=0), "num_attention_heads .0. must lie in"),
        (fields(num_hidden_layers=10**9), "num_hidden_layers .* is more than the 2 layers"),
        (fields(vq_config="x"), "vq_config .'x'. must be an object"),
        (fields(vocabulary_map={"<s>": 1.5}), "<s> .1.5. must be a whole number"),
        (fields(eos_token_id=99, vocabulary_map={}), "eos_token_id .99."),
    ],
    ("mamba", "model.safetensors"): [
        (Path.unlink, "must hold model.safetensors"),
        (
            tensors(**{MIXER.format(n) + "A_log": torch.ones(4) for n in range(2)}),
            f"holds a Mamba-2: .*{MAMBA_2}",
        ),
    ],
    ("mamba", "config.json"): [
        (fields(use_bias=True), "use_bias .True. must be False"),
        (fields(hidden_act="gelu"), "hidden_act .'gelu'. must be 'silu'"),
        (fields(layer_norm_epsilon=1e-6), "layer_norm_epsilon"),
        (fields(quantization_config={"bits": 4}), "quantization_config"),
        (fields(conv_kernel=6), "conv_width .6. must be 2, 3 or 4"),
        (fields(hidden_size="32"), "hidden_size .'32'. must be a whole number"),
        (fields(state_size=8), "mis-shaped backbone.layers.0.mixer.A_log"),
        (fields(num_hidden_layers=3), "num_hidden_layers .3. is more than the 2 layers in the f"),
        (fields(tie_word_embeddings=False), "missing    lm_head.weight"),
        (fields(use_conv_bias=False), "unexpected backbone.layers.0.mixer.conv1d.bias"),
    ],
    ("ssm", "pytorch_model.bin"): [
        (truncate, "is truncated or was not written by torch.save"),
        (Path.unlink, "must hold"),
        (save_code, "would run code in it"),
        (
            tensors(**{MIXER.format(1) + "D": None, "extra": torch.ones(2)}),
            r"missing    .*1.mixer.D \(64,\)\n  unexpected extra",
        ),
    ],
    ("ssm", "config.json"): [
        (fields(ssm_cfg={"layer": "Mamba2"}), f"ssm_cfg: layer .'Mamba2'. .*{MAMBA_2}"),
        (fields(ssm_cfg={"layer": "Mamba3"}), "'Mamba3'. must be 'Mamba1'"),
        (fields(ssm_cfg={"headdim": 64}), "unknown field 'headdim'"),
        (fields(ssm_cfg={"bias": True}), "ssm_cfg.bias"),
        (fields(rms_norm=False), "rms_norm .False. must be True: LayerNorm"),
        (fields(attn_layer_idx=[1]), "attn_layer_idx"),
        (fields(d_intermediate=64), "d_intermediate .64. must be 0"),
        (fields(d_model=2.5), "d_model .2.5. must be a whole number"),
    ],
    ("sharded", "model-00002-of-*.safetensors"): [
        (Path.unlink, "names .*00002.* are not in its folder"),
        (truncate, "00002.* is truncated"),
    ],
    ("sharded", INDEX): [
        (text("{"), "index.json is not valid JSON"),
        (text(DEEP), "index.json is nested more than"),
        (fields(weight_map={"a": "../b"}), "lie outside"),
        (fields(weight_map={"a": "b" * 5000}), "lie outside"),
        (beside, "holds model.safetensors and .*index.json, which names other files: two models"),
    ],
    ("meta", "consolidated.00.pth"): [(Path.unlink, "lacks .*consolidated.00.pth")],
    ("meta", "consolidated.01.pth"): [
        (truncate, "is truncated or was not written by torch.save"),
        (Path.unlink, r"model_parallel_size .2. must .* files .1.; copy"),
        (far_shard, "consolidated.99999999.pth, but shard numbers must be below 1000"),
        (save_code, "would run code in it"),
        (tensors(note="x"), "must hold tensors"),
        (lambda path: change_state(path, lambda t: t.update({1: torch.ones(2)})), "must hold"),
        (tensors(**{"layers.1.attention.wo.weight": None}), "missing    01/layers.1.attention.wo"),
    ],
    ("meta", "params.json"): [
        (text(DEEP), "params.json is nested more than 100 levels deep"),
        (fields(model={"n_heads": 4}), "lacks .'dim', 'n_layers'."),
        (fields(model="x"), "model .'x'. must be an object"),
        (model_fields(qk_normalization=False), "qk_normalization .False. must be True"),
        (model_fields(n_layers=1.5), "params.json: n_layers .1.5. must be"),
        (model_fields(n_layers=9_999), "n_layers .9,999. is more than the 2"),
        (model_fields(rope_theta=float("nan")), "rope_theta .nan. must be"),
    ],
    ("meta", "text_tokenizer.json"): [
        (text(DEEP), "text_tokenizer.json is nested more than 100"),
        (text("{}"), "tokenizer.json has no field 'model'"),
    ],
    ("ours", FIRST): [
        (truncate, "is truncated or no safetensors file"),
        (tensors(**{"norm.weight": None}), "disagree on 1 tensors"),
    ],
    ("ours", "config.json"): [
        (text(DEEP), "config.json is nested more than 100 levels deep"),
        (deepen, "layers .20,000. is more than the 2 layers in the files"),
        (fields(version=2), "version .2. must be 1"),
        (fields(vocabulary=None), "no field 'vocabulary'"),
        (fields(vocabulary={"media": [{"modality": 1}]}), "no field 'size'"),
    ],
    ("dcp", "__0_0.distcp"): [
        (truncate, "__0_0.distcp has .* bytes instead of"),
        (Path.unlink, "__0_0.distcp is missing"),
    ],
    ("dcp", "config.json"): [(Path.unlink, "config.json is missing|without config.json")],
}
CASES = [(*place, *case) for place, cases in HARM.items() for case in cases]


@pytest.mark.parametrize("folder, file, harm, says", CASES)
def test_damaged_and_foreign_folders_are_refused(
    copy, tmp_path, monkeypatch, folder, file, harm, says
):
    monkeypatch.chdir(tmp_path)
    (found,) = copy(folder).glob(file)
    harm(found)
    for read in (lambda: convert(tmp_path / folder, tmp_path / "new"), lambda: load_model(folder)):
        with pytest.raises(ValueError, match=says):
            read()
    assert [path.name for path in tmp_path.iterdir()] == [folder], "nothing written, no code run"


def test_the_report_names_every_key_at_once(copy, tmp_path):
    named = {QUERY: None, "lm_head.weight": None, "other": torch.ones(1)}
    tensors(**named)(copy("hf") / "model.safetensors")
    with pytest.raises(ValueError) as raised:
        convert(tmp_path / "hf", tmp_path / "new")
    lines = str(raised.value).splitlines()
    assert "3 of its keys are wrong" in lines[0] and len(lines) == 5
    assert {line.split()[1] for line in lines[1:4]} == {*named}


def test_names_behind_a_wrapper_are_refused_with_its_prefix(copy):
    def wrap(state: dict) -> None:
        for name in list(state):
            state["module._orig_mod." + name] = state.pop(name)

    folder = copy("hf")
    change_tensors(folder / "model.safetensors", wrap)
    with pytest.raises(ValueError, match=r"All names begin with 'module\._orig_mod\.'"):
        load_model(folder)


@pytest.mark.parametrize("manifest", [True, False])
def test_any_damage_to_the_metadata_of_dcp_is_reported(copy, manifest):
    folder = copy("dcp")
    if not manifest:
        (folder / "manifest.json").unlink()
    content = (folder / ".metadata").read_bytes()
    for place in range(2, len(content), 1 + len(content) // 60):
        flipped = content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]
        (folder / ".metadata").write_bytes(flipped)
        try:
            load_model(folder)
            assert not manifest, f"byte {place} is another, and nobody said so"
        except ValueError as error:
            assert str(folder) in str(error)


def test_any_damage_to_a_torch_file_is_reported_or_harmless(copy):
    path = copy("meta") / "consolidated.01.pth"
    content, read = path.read_bytes(), 0
    for place in range(60, 3000, 97):  # torch's notes on its tensors
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        with contextlib.suppress(ValueError):
            load_model(path.parent)
            read += 1
    assert read < 30, "any other error fails, and most damage is seen"


def test_a_type_that_cannot_hold_the_values_is_refused(copy, tmp_path):
    change_tensors(copy("hf") / "model.safetensors", lambda t: t["lm_head.weight"].mul_(1e6))
    with pytest.raises(ValueError, match=r"lm_head.weight has values up to .* 6.55e\+04 of torch"):
        convert(tmp_path / "hf", tmp_path / "new", dtype=torch.float16)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_verification_of_weights_that_are_no_numbers_says_so(copy, tmp_path):
    change_tensors(copy("ours") / FIRST, lambda t: t["norm.weight"].fill_(torch.nan))
    with pytest.raises(ValueError, match="itself has logits that are no numbers"):
        convert(tmp_path / "ours", tmp_path / "new", verify=True)
    convert(tmp_path / "ours", tmp_path / "copy")  # bit for bit, as it is


@pytest.mark.parametrize("to", ["earlyfuse", "dcp", "meta"])
def test_a_full_disk_is_reported_and_nothing_is_kept(sources, tmp_path, monkeypatch, capsys, to):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert main([str(sources / "meta"), str(tmp_path / "new"), "--to", to]) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path / 'new'} could not be written" in said and "No space left" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [pickle.dumps(Code()), b"", b"junk", pickle.dumps({"a": 1})])
def test_metadata_of_dcp_runs_no_code(copy, tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    (copy("dcp") / "manifest.json").unlink()
    (tmp_path / "dcp" / ".metadata").write_bytes(content)
    with pytest.raises(ValueError, match=r"\.metadata is damaged or not of a DCP checkpoint"):
        load_model(tmp_path / "dcp")
    assert not (tmp_path / "code was run").exists()


def test_only_pickled_weights_are_refused_by_name(copy):
    folder = copy("hf")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"only pytorch_model.bin, a pickle that may run code"):
        load_model(folder)


KINDS = {name: (make, "is ") for name, make in MODELS.items() if name != "dense"} | {
    "mixture_of_mamba": (MAMBAS["mixture_of_mamba"], "in_proj_groups is 2"),
    "hybrid": (MAMBAS["hybrid"], r"layers\[0\] is made of att"),
    "norm behind": (
        lambda: mamba_decoders.mamba(replace(MAMBA_SHAPE, norm_order="swin")),
        "norm_order is 'swin'",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_sparse_untied_and_hybrid_models_are_no_public_ones(tmp_path, kind):
    make, reason = KINDS[kind]
    export(make(), tmp_path / "ours")
    formats = ("hf", "meta") if kind in MODELS else ("hf", "mamba_ssm", "meta")
    for to in formats:
        says = f"cannot express this model: .*{'' if to == 'meta' else reason}"
        with pytest.raises(ValueError, match=says):
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
    (tmp_path / "run.json").write_text('{"config": {"checkpoint": {"folder": "checkpoint"}}}')
    with pytest.raises(ValueError, match="has no complete checkpoint"):
        load_model(tmp_path)


def test_an_existing_destination_is_not_overwritten_and_leftovers_are_named(
    sources, tmp_path, capsys
):
    (tmp_path / "new").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "other.part").mkdir()
    for name, says in (
        ("new", "exists already"),
        ("link", "exists already"),
        ("other", "another conversion writes it, or one was killed"),
    ):
        assert main([str(sources / "ours"), str(tmp_path / name)]) == 2
        assert says in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "new", "other.part"]
