"""Chameleon sources that cannot be taken over exactly are refused with the reason."""

import json
import pickle

import pytest
import torch
from chameleon_files import (
    CODES,
    chameleon,
    code_name,
    copied,
    import_all,
    janus,
    order,
    rewritten,
    save_hugging_face,
    taming,
    with_map,
    write_meta,
)
from safetensors.torch import load_file

from earlyfuse.data.prepare import PrepareSpec
from earlyfuse.data.tokenizers import Tokenizers, image
from earlyfuse.data.tokenizers.imports import import_text, import_vocabulary, import_vq


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_hugging_face(chameleon(order()), tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def imported(source, tmp_path_factory):
    return import_all(source, tmp_path_factory.mktemp("imported"))


def test_keys_that_do_not_fit_are_all_reported(source, tmp_path):
    inside = "model.vqmodel.encoder."

    def change(tensors):
        del tensors[inside + "conv_in.bias"]
        tensors[inside + "strange.weight"] = torch.ones(2)
        tensors["model.vqmodel.quantize.embedding.weight"] = torch.ones(CODES, 9)

    message = (
        r'Missing.* "encoder\.conv_in\.bias"\. Unexpected.* "encoder\.strange\.weight"\. '
        r"size mismatch for quantize\.embedding\.weight: .*\[24, 9\].*\[24, 8\]"
    )
    with pytest.raises(ValueError, match=message):
        import_vq(rewritten(source, tmp_path / "hf", change), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_values_that_are_no_numbers_are_refused(source, tmp_path):
    def change(tensors):
        tensors["model.vqmodel.quant_conv.weight"][0, 0] = float("nan")

    with pytest.raises(ValueError, match=r"finite values.*quant_conv\.weight"):
        import_vq(rewritten(source, tmp_path / "hf", change), tmp_path / "out")


def test_a_source_without_tokenizers_says_so(source, tmp_path):
    def change(tensors):
        for name in [name for name in tensors if ".vqmodel." in name]:
            del tensors[name]

    folder = rewritten(source, tmp_path / "hf", change)
    assert not import_vq(folder, tmp_path / "out") and not import_text(folder, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    for take in (import_vq, import_text, import_vocabulary):
        assert not take(tmp_path / "empty", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_truncated_pickled_and_missing_files_are_refused(source, tmp_path):
    names = [path.name for path in source.iterdir()]
    for shard in source.glob("*.safetensors"):
        folder = copied(source, tmp_path / f"cut-{shard.stem}", *names)
        (folder / shard.name).write_bytes(shard.read_bytes()[:-10])
        if any(".vqmodel." in name for name in load_file(shard)):
            with pytest.raises(ValueError, match=r"is no whole safetensors file.*truncated"):
                import_vq(folder, tmp_path / "out")
            (folder / shard.name).unlink()
            with pytest.raises(ValueError, match=rf"names the file '{shard.name}', which is not"):
                import_vq(folder, tmp_path / "out")
    folder = copied(source, tmp_path / "bin", "config.json")
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is a pickle"):
        import_vq(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Evil:
    def __reduce__(self):
        return (print, ("code ran",))


def test_an_original_checkpoint_that_is_cut_or_holds_code_is_refused(tmp_path, capsys):
    folder = write_meta(tmp_path / "meta", taming(janus()))
    path = folder / "tokenizer" / "vqgan.ckpt"
    whole = path.read_bytes()
    impossible = {
        "cut": whole[: len(whole) // 2],
        "empty": b"",
        "pickle": pickle.dumps(Evil(), protocol=2),
        "text": b"version https://git-lfs.github.com/spec/v1\n",
    }
    for name, content in impossible.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"vqgan\.ckpt cannot be read as a checkpoint"):
            import_vq(folder, tmp_path / name)
    torch.save({"state_dict": Evil()}, path)
    with pytest.raises(ValueError, match="would run code"):
        import_vq(folder, tmp_path / "out")
    torch.save({"state_dict": [1, 2]}, path)
    with pytest.raises(ValueError, match="must hold a state_dict of tensors"):
        import_vq(folder, tmp_path / "out")
    assert "code ran" not in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_damaged_image_file_of_ours_is_refused(imported, tmp_path):
    whole = (imported / "image.safetensors").read_bytes()
    (tmp_path / "image.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"image\.safetensors\) is damaged or truncated"):
        image.load(tmp_path / "image.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resample": 3}, r"must resize the shorter side by Lanczos"),
        ({"crop_size": {"height": 32, "width": 16}}, r"must resize the shorter side"),
        ({"do_normalize": False}, r"must resize the shorter side"),
        ({"image_mean": [1.0, 0.5, 1.0]}, r"must be equal in all channels"),
    ],
)
def test_other_ways_of_preparing_pixels_are_refused(source, tmp_path, change, message):
    folder = copied(source, tmp_path / "hf", *(path.name for path in source.iterdir()))
    fields = json.loads((folder / "processor_config.json").read_bytes())
    fields["image_processor"].update(change)
    (folder / "processor_config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=message):
        import_vq(folder, tmp_path / "out")


def test_codes_that_are_not_one_range_of_ids_are_refused(source, tmp_path):
    last = code_name(order().index(CODES - 1))
    folder = with_map(source, tmp_path / "hf", lambda tokens: tokens.update({last: 400}))
    for take in (import_vq, import_vocabulary):
        with pytest.raises(ValueError, match=r"over the ids 4 … 400, and id 27 is not one of them"):
            take(folder, tmp_path / "out")
    folder = with_map(source, tmp_path / "less", lambda tokens: tokens.pop(code_name(7)))
    with pytest.raises(ValueError, match=r"23 image codes, the codebook has 24: 1 have no name"):
        import_vq(folder, tmp_path / "out")
    folder = with_map(source, tmp_path / "bare", lambda tokens: tokens.pop("<eoss>"))
    with pytest.raises(ValueError, match=r"has no <eoss>"):
        import_vocabulary(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v["media"][0].update(count=CODES - 1), r"23 image codes in blocks of 64"),
        (lambda v: v["media"][0].update(block=9), r"24 image codes in blocks of 9"),
        (lambda v: v["media"][0].update(start=60), r"id 60 to image.* uses it for text"),
        (lambda v: v["media"][0].update(begin=70), r"id 70 to image.* uses it for text"),
        (lambda v: v.update(size=100), r"has 322 ids, the vocabulary 100"),
        (lambda v: v.update(media=[]), r"the vocabulary has 0 image codes"),
        (lambda v: v.pop("bos"), r"vocabulary\.json has no field 'bos'"),
    ],
)
def test_tokenizers_and_vocabulary_that_do_not_belong_together_are_refused(
    imported, tmp_path, change, message
):
    folder = copied(imported, tmp_path / "t", "text.json", "image.safetensors", "vocabulary.json")
    fields = json.loads((folder / "vocabulary.json").read_bytes())
    change(fields)
    (folder / "vocabulary.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=message):
        Tokenizers.load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizers": "gone"}, r"must be a folder with text\.model or text\.json"),
        ({"image_tokenizer": "vqvae"}, r"names all tokenizers; leave out"),
        ({"text_tokenizer": "text.json"}, r"names all tokenizers; leave out"),
    ],
)
def test_a_spec_with_two_sources_of_tokenizers_is_refused(imported, tmp_path, changes, message):
    fields = {"tokenizers": imported, **changes}
    for name in ("tokenizers", "text_tokenizer"):
        if isinstance(fields.get(name), str):
            fields[name] = imported / fields[name]
    with pytest.raises(ValueError, match=message):
        PrepareSpec(tmp_path, {"pairs": tmp_path}, **fields)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("a: &a 8\nmodel: {params: {embed_dim: *a, n_embed: 24, ddconfig: {}}}", "it has aliases"),
        ("[" * 5000, "must hold model.params"),
        ("x" * 70_000, "larger than 65,536 bytes"),
        ("model: {params: 3}", "must hold model.params"),
        ("model: {params: {embed_dim: [8], n_embed: 24, ddconfig: {}}}", r"embed_dim \(\[8\]\)"),
        (
            "model: {params: {embed_dim: 8, n_embed: 24, ddconfig: {num_res_blocks: 1000000000}}}",
            r"num_res_blocks \(1000000000\) must lie in \[1, 64\]",
        ),
    ],
    ids=["aliases", "deep", "large", "kind", "type", "size"],
)
def test_a_hostile_description_of_the_original_is_refused(tmp_path, content, says):
    folder = write_meta(tmp_path / "meta", {})
    (folder / "tokenizer" / "vqgan.yaml").write_text(content)
    with pytest.raises(ValueError, match=rf"vqgan\.yaml.*{says}"):
        import_vq(folder, tmp_path / "new")
