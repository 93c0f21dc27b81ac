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
from tiny_runs import changed, run, tiny_config

from earlyfuse.configs import decoders
from earlyfuse.data.tokenizers import Tokenizers
from earlyfuse.parallel.evaluation import sample_generation
from earlyfuse.parallel.evaluation.sample_generation import Pair, Sample, load_pairs
from earlyfuse.parallel.reporting.sample_grid import draw_samples
from earlyfuse.parallel.trainer import Trainer
from earlyfuse.tools.documents import read_prompts
from earlyfuse.tools.generate import main

SHAPE = decoders.Shape(dim=48, layers=2, heads=2, hidden_dim=96, vocab_size=337, norm_order="pre")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_pairs(tmp_path_factory.mktemp("pairs") / "data")


def config_of(folder: Path, data: Path, dropout: float = 0.0, **fields) -> Trainer.Config:
    config = tiny_config(folder, data, decoders.moe_1t1i(SHAPE), steps=4)
    for layer in config.model_spec.model.layers:
        layer.dropout = dropout  # a model left in evaluation mode would show
    ours = {"data.shares": {"pairs": 1.0}, "dataloader.media_share": None}
    return changed(config, ours | {"validator.freq": 2, "checkpoint.interval": 2} | fields)


@pytest.fixture(scope="module")
def learned(tmp_path_factory, data) -> Path:
    """A run that has memorised the five pairs."""
    folder = tmp_path_factory.mktemp("learned") / "run"
    rare = dict.fromkeys(("validator.freq", "checkpoint.interval", "metrics.log_freq"), 1000)
    fields = {"training.steps": 160, "training.global_batch_size": 2}
    fields |= {"lr_scheduler.warmup_steps": 10, "sampler.temperature": 0.0, "sampler.guidance": 1.0}
    run(config_of(folder, data, **fields, **rare))
    return folder


def pairs_of(data: Path) -> tuple[list[Pair], Tokenizers]:
    tokenizers = Tokenizers.load(data / "tokenizers")
    return load_pairs(data / "validation" / "prompts.json", tokenizers), tokenizers


# ---------------------------------------------------------------- samples of a run


def test_a_run_that_has_learned_writes_what_it_was_shown(learned, data):
    picture = np.asarray(Image.open(learned / "samples.png").convert("RGB"))
    pairs, tokenizers = pairs_of(data)
    codes = np.array([pair.image_tokens[1:-1] for pair in pairs]) - tokenizers.text.size
    shown = tokenizers.image.decode(codes)
    expected = [Sample(p, image, p.caption) for p, image in zip(pairs, shown, strict=True)]
    assert np.array_equal(picture, draw_samples(expected, 160))
    wrong = [replace(expected[0], image=shown[4]), *expected[1:]]
    assert not np.array_equal(picture, draw_samples(wrong, 160)), "the picture tells them apart"


def test_samples_are_written_at_each_validation_and_do_not_change_a_run(tmp_path, data):
    def parameters(name: str, stop_after: int | None = None, **fields) -> dict[str, torch.Tensor]:
        config = config_of(tmp_path / name, data, 0.2, **fields)
        return run(config, stop_after).model.state_dict()

    unbroken = parameters("unbroken")
    without = parameters("without", **{"sampler.enable": False})
    parameters("resumed", stop_after=3)
    for other in (without, parameters("resumed")):
        assert [name for name, p in unbroken.items() if not torch.equal(p, other[name])] == []
    pictures = [tmp_path / name / "samples.png" for name in ("unbroken", "resumed", "without")]
    assert pictures[0].read_bytes() == pictures[1].read_bytes() and not pictures[2].exists()
    events = EventAccumulator(str(tmp_path / "unbroken" / "tb"))
    events.Reload()
    assert [event.step for event in events.Images("samples")] == [1, 2, 4]
    (text,) = [tag for tag in events.Tags()["tensors"] if tag.startswith("samples")]
    table = events.Tensors(text)[-1].tensor_proto.string_val[0].decode()
    assert all(caption in table for caption in SHADES)


def test_prompts_that_do_not_fit_a_row_are_left_out(data, monkeypatch):
    told: list[str] = []
    monkeypatch.setattr(sample_generation.rank_log, "tell", told.append)
    monkeypatch.setattr(sample_generation.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(sample_generation.dist, "get_world_size", lambda: 1)
    pairs, _ = pairs_of(data)
    lengths = sorted(len(pair.caption_tokens) + len(pair.image_tokens) + 2 for pair in pairs)
    config = sample_generation.Sampler.Config(data_folder=str(data), number=4)
    model = decoders.dense(SHAPE).build()

    def number(seq_len):
        return len(config.build(model=model, seq_len=seq_len).pairs)

    assert number(lengths[-1]) == 4 and lengths[0] < lengths[-1]
    assert number(lengths[0]) == min(4, lengths.count(lengths[0]))
    assert number(lengths[0] - 1) == 0
    assert told == [f"no samples are generated: no prompt fits training.seq_len ({lengths[0] - 1})"]


def test_wrong_prompts_are_refused_by_name(tmp_path, data):
    _, tokenizers = pairs_of(data)
    path = tmp_path / "prompts.json"
    for content in ("[]", '{"prompts": [{"caption": "x"}]}', "no json"):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"prompts.json.* remove it"):
            load_pairs(path, tokenizers)
    with pytest.raises(ValueError, match="no image tokenizer"):
        load_pairs(path, replace(tokenizers, media={}))


# ---------------------------------------------------------------- the tool


def results(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_the_tool_writes_images_captions_and_both(learned, data, tmp_path, capsys):
    tokenizer = Tokenizers.load(data / "tokenizers").image

    def generated(name: str, *arguments: str) -> list[dict]:
        words = [str(learned), *arguments, "--temperature", "0", "--out", str(tmp_path / name)]
        assert main(words) == 0
        return results(tmp_path / name)

    def is_image(name: str, line: dict, shade: int) -> bool:
        (written,) = line["written"]
        image = np.asarray(Image.open(tmp_path / name / written["image"]))
        expected = tokenizer.decode(tokenizer.encode(pixels(shade)[None]))[0]
        return np.array_equal(image, expected)

    (line,) = generated("images", "--mode", "image", "--prompt", SHADES[2])
    assert line["prompt"] == [{"text": SHADES[2]}] and line["ended"] and line["tokens"] == 6
    assert is_image("images", line, 2)

    (tmp_path / "iron.png").write_bytes(png(2))
    lines = [[{"image": "iron.png"}], [], [{"text": SHADES[3]}]]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    prompts = ["--prompts", str(tmp_path / "prompts.jsonl"), "--batch-size", "2"]
    after_image, _, after_text = generated("mixed", *prompts)
    assert after_image["written"] == [{"text": SHADES[2]}] and after_image["ended"]
    assert is_image("mixed", after_text, 3)
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

    by_default, by_rule = written("plain"), written("by_rule", "--rule", "threshold")
    assert by_default == by_rule, "no expert of this model is chosen"
    rules = [results(tmp_path / name)[0]["rule"] for name in ("plain", "by_rule")]
    assert rules == ["causal", "threshold"]
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
    refused(["guidance (-1.0) must be at least 0"], "--guidance", "-1")
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
