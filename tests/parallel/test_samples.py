"""Sample generation during a run and ``tools.generate``: a trained model reproduces its data, and
sampling changes nothing else in the run.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_pairs import SHADES, make_pairs, pixels, png
from tiny_runs import run, tiny_config

from earlyfuse.configs import decoders
from earlyfuse.data.tokenizers import Tokenizers
from earlyfuse.parallel.evaluation import sample_generation
from earlyfuse.parallel.evaluation.sample_generation import Sample, load_pairs
from earlyfuse.parallel.reporting.sample_grid import draw_samples
from earlyfuse.parallel.trainer import Trainer
from earlyfuse.tools.documents import read_prompts
from earlyfuse.tools.generate import main

SHAPE = decoders.Shape(dim=48, layers=2, heads=2, hidden_dim=96, vocab_size=337, norm_order="pre")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_pairs(tmp_path_factory.mktemp("pairs") / "data")


def config_of(folder: Path, data: Path, steps: int = 4) -> Trainer.Config:
    config = tiny_config(folder, data, decoders.moe_1t1i(SHAPE), steps)
    config.data = replace(config.data, shares={"pairs": 1.0})
    config.dataloader.media_share = None
    config.validator.freq = 2
    config.checkpoint.interval = 2
    return config


@pytest.fixture(scope="module")
def learned(tmp_path_factory, data) -> Path:
    """A run that has memorised the five pairs."""
    folder = tmp_path_factory.mktemp("learned") / "run"
    config = config_of(folder, data, steps=160)
    config.training.global_batch_size = 2
    config.lr_scheduler.warmup_steps = 10
    config.validator.freq = config.checkpoint.interval = config.metrics.log_freq = 1000
    config.sampler.temperature, config.sampler.guidance = 0.0, 1.0
    run(config)
    return folder


# ---------------------------------------------------------------- samples of a run


def test_a_run_that_has_learned_writes_what_it_was_shown(learned, data):
    picture = np.asarray(Image.open(learned / "samples.png").convert("RGB"))
    tokenizers = Tokenizers.load(data / "tokenizers")
    pairs = load_pairs(data / "validation" / "prompts.json", tokenizers)
    shown = [
        tokenizers.image.decode(np.array([pair.image_tokens[1:-1]]) - tokenizers.text.size)[0]
        for pair in pairs
    ]
    expected = [Sample(p, image, p.caption) for p, image in zip(pairs, shown, strict=True)]
    assert np.array_equal(picture, draw_samples(expected, 160))
    wrong = [replace(expected[0], image=shown[4]), *expected[1:]]
    assert not np.array_equal(picture, draw_samples(wrong, 160)), "the picture tells them apart"


def dropping(folder: Path, data: Path) -> Trainer.Config:
    config = config_of(folder, data)
    for layer in config.model_spec.model.layers:
        layer.dropout = 0.2  # a model left in evaluation mode would show
    return config


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, data) -> tuple[Path, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("unbroken")
    return folder, run(dropping(folder, data)).model.state_dict()


def test_samples_are_in_tensorboard_at_each_validation(unbroken):
    events = EventAccumulator(str(unbroken[0] / "tb"))
    events.Reload()
    assert [event.step for event in events.Images("samples")] == [1, 2, 4]
    (text,) = [tag for tag in events.Tags()["tensors"] if tag.startswith("samples")]
    table = events.Tensors(text)[-1].tensor_proto.string_val[0].decode()
    assert all(caption in table for caption in SHADES)


def test_samples_do_not_change_a_run(unbroken, tmp_path, data):
    without = dropping(tmp_path, data)
    without.sampler.enable = False
    other = run(without).model.state_dict()
    assert [
        name for name, value in unbroken[1].items() if not torch.equal(value, other[name])
    ] == []
    assert not (tmp_path / "samples.png").exists()


def test_a_resumed_run_writes_the_same_samples(unbroken, tmp_path, data):
    run(dropping(tmp_path, data), stop_after=3)
    other = run(dropping(tmp_path, data)).model.state_dict()
    assert [
        name for name, value in unbroken[1].items() if not torch.equal(value, other[name])
    ] == []
    expected = (unbroken[0] / "samples.png").read_bytes()
    assert (tmp_path / "samples.png").read_bytes() == expected


def test_prompts_that_do_not_fit_a_row_are_left_out(tmp_path, data, monkeypatch):
    told: list[str] = []
    monkeypatch.setattr(sample_generation.rank_log, "tell", told.append)
    lengths = sorted(
        len(pair.caption_tokens) + len(pair.image_tokens) + 2
        for pair in load_pairs(
            data / "validation" / "prompts.json", Tokenizers.load(data / "tokenizers")
        )
    )
    config = sample_generation.Sampler.Config(data_folder=str(data), number=4)
    monkeypatch.setattr(sample_generation, "_rank", lambda: 0)
    monkeypatch.setattr(sample_generation.dist, "get_world_size", lambda: 1)

    model = decoders.dense(SHAPE).build()

    def pairs(seq_len):
        return config.build(model=model, seq_len=seq_len).pairs

    assert len(pairs(lengths[-1])) == 4
    assert lengths[0] < lengths[-1]
    assert len(pairs(lengths[0])) == min(4, lengths.count(lengths[0]))
    assert pairs(lengths[0] - 1) == []
    assert told == [f"no samples are written: no prompt fits training.seq_len ({lengths[0] - 1})"]


def test_wrong_prompts_and_settings_are_refused_by_name(tmp_path, data):
    tokenizers = Tokenizers.load(data / "tokenizers")
    path = tmp_path / "prompts.json"
    for content in ("[]", '{"prompts": [{"caption": "x"}]}', "no json"):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"prompts.json.* remove it"):
            load_pairs(path, tokenizers)
    with pytest.raises(ValueError, match="no image tokenizer"):
        load_pairs(path, replace(tokenizers, media={}))
    with pytest.raises(ValueError, match=r"sampler.number \(0\) must be at least 1"):
        sample_generation.Sampler.Config(number=0)
    with pytest.raises(ValueError, match=r"temperature \(-1\)"):
        sample_generation.Sampler.Config(temperature=-1)


# ---------------------------------------------------------------- the tool


def results(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_the_tool_writes_images_captions_and_both(learned, data, tmp_path, capsys):
    out = tmp_path / "images"
    greedy = ["--temperature", "0"]
    assert (
        main([str(learned), "--mode", "image", "--prompt", SHADES[2], "--out", str(out)] + greedy)
        == 0
    )
    (line,) = results(out)
    assert line["prompt"] == [{"text": SHADES[2]}] and line["ended"] and line["tokens"] == 6
    image = np.asarray(Image.open(out / line["written"][0]["image"]))
    tokenizer = Tokenizers.load(data / "tokenizers").image
    assert np.array_equal(image, tokenizer.decode(tokenizer.encode(pixels(2)[None]))[0])

    (tmp_path / "iron.png").write_bytes(png(2))
    lines = [[{"image": "iron.png"}], [], [{"text": SHADES[3]}]]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    prompts = ["--prompts", str(tmp_path / "prompts.jsonl"), "--batch-size", "2"]
    out = tmp_path / "mixed"
    assert main([str(learned), *prompts, *greedy, "--out", str(out)]) == 0
    after_image, _, after_text = results(out)
    assert after_image["written"] == [{"text": SHADES[2]}] and after_image["ended"]
    (written,) = after_text["written"]
    image = np.asarray(Image.open(out / written["image"]))
    assert np.array_equal(image, tokenizer.decode(tokenizer.encode(pixels(3)[None]))[0])
    assert SHADES[2] in capsys.readouterr().out


def test_what_a_model_wrote_cannot_move_the_cursor(learned, tmp_path, capsys, monkeypatch):
    written = [{"text": "\x1b[2J\rcaf\u00e9"}]
    monkeypatch.setattr("earlyfuse.tools.documents.to_segments", lambda *_: written)
    assert main([str(learned), "--mode", "text", "--out", str(tmp_path / "out")]) == 0
    assert "000000-0: \\x1b[2J\\rcaf\u00e9" in capsys.readouterr().out
    (line,) = results(tmp_path / "out")
    assert line["written"] == written, "the file has it as it is"


def test_samples_of_the_tool_depend_on_their_seed_alone(learned, tmp_path):
    def written(name, *options):
        arguments = [str(learned), "--prompt", "shade", "--out", str(tmp_path / name)]
        assert main([*arguments, "--temperature", "3", *options]) == 0
        return [(line["seed"], line["written"]) for line in results(tmp_path / name)]

    four = written("four", "--samples", "4")
    assert len({json.dumps(w) for _, w in four}) > 1
    assert written("again", "--samples", "4", "--batch-size", "3") == four
    assert written("two", "--samples", "2") == four[:2]
    assert written("other", "--samples", "4", "--seed", "1") != four


def test_what_the_tool_cannot_do_is_said(learned, data, tmp_path, capsys):
    def refused(words, *arguments, folder=learned, out=tmp_path / "out"):
        assert main([str(folder), "--out", str(out), *arguments]) == 2
        message = capsys.readouterr().err
        assert all(word in message for word in words), message
        assert not (out / "results.jsonl").exists()

    refused(["nowhere", "is no folder"], folder=tmp_path / "nowhere")
    refused(["must hold a model"], folder=data)
    refused(["--samples 3", "another temperature"], "--temperature", "0", "--samples", "3")
    refused(["guidance (-1.0) must not be negative"], "--guidance", "-1")
    refused(["--prompts and --prompt"], "--prompts", "x", "--prompt", "y")
    refused(["image none.png cannot be read"], "--image", "none.png")
    (tmp_path / "cut.png").write_bytes(png(1)[:40])
    refused(["cut.png cannot be read", "corrupt-image"], "--image", str(tmp_path / "cut.png"))
    refused(["prompt 0 of", "32 positions that the model was trained on"], "--prompt", "x" * 99)
    refused(["longer than the 32 positions"], "--new-tokens", "33")
    refused(["none/text.model", "--tokenizers"][1:], "--tokenizers", str(tmp_path / "none"))
    other = tmp_path / "other"
    shutil.copytree(data / "tokenizers", other)
    (other / "image.safetensors").unlink()
    refused(["the image tokenizer", "(None) is not the one"], "--tokenizers", str(other))
    for line in ("{", "[3]", '[{"film": "x"}]'):
        (tmp_path / "bad.jsonl").write_text('[{"text": "fine"}]\n' + line)
        refused(["bad.jsonl, line 2"], "--prompts", str(tmp_path / "bad.jsonl"))
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "results.jsonl").write_text("mine")
    assert main([str(learned), "--out", str(tmp_path / "done")]) == 2
    assert (tmp_path / "done" / "results.jsonl").read_text() == "mine"
    assert "has results.jsonl already" in capsys.readouterr().err


def test_lines_of_prompts_end_with_a_newline_alone(tmp_path):
    """U+2028 and the like may stand in JSON texts; editors of Windows begin files with a mark."""
    path, said = tmp_path / "p.jsonl", "one\u2028two\x85three"
    line = json.dumps([{"text": said}], ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf" + f"{line}\r\n\r\n{line}".encode())
    assert read_prompts(path) == [[{"text": said}]] * 2
    path.write_bytes(line.encode("utf-16"))
    with pytest.raises(ValueError, match=r"p\.jsonl must be UTF-8"):
        read_prompts(path)


def test_a_model_of_text_alone_refuses_images(tmp_path, capsys):
    data = make_pairs(tmp_path / "data", image_tokenizer=False)
    vocabulary = json.loads((data / "tokenizers" / "vocabulary.json").read_text())
    shape = replace(SHAPE, vocab_size=vocabulary["size"])
    config = config_of(tmp_path / "run", data)
    config.model_spec = replace(config.model_spec, model=decoders.dense(shape))
    run(config)
    (tmp_path / "black.png").write_bytes(png(0))
    here = [str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    assert main([*here, "--image", str(tmp_path / "black.png")]) == 2
    assert "trained on text alone and has no image tokenizer" in capsys.readouterr().err
    assert main([*here, "--mode", "image"]) == 2
    assert "needs a vocabulary with image codes" in capsys.readouterr().err
    assert main([*here, "--prompt", "shade"]) == 0
    assert results(tmp_path / "out")[0]["written"]
