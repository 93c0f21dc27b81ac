"""Samples of a run whose images are vectors of pixels, and what ``tools.generate`` does with it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pairs import SHADES, make_pairs, pixels, png
from tiny_runs import changed, run, tiny_config

from earlyfuse.configs import decoders
from earlyfuse.configs.transfusion import JIT, paper_loss, with_vectors
from earlyfuse.data.tokenizers import Tokenizers
from earlyfuse.models.generate.denoising import Denoising
from earlyfuse.models.generate.session import Sampling
from earlyfuse.parallel.evaluation import sample_generation
from earlyfuse.parallel.evaluation.sample_generation import images_from_captions, load_pairs
from earlyfuse.tools.generate import main

SHAPE = decoders.Shape(dim=48, layers=2, heads=2, hidden_dim=96, vocab_size=331, norm_order="pre")
CLOSE = 18  # of 255, the mean over an image; two shades are 37 apart


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_pairs(tmp_path_factory.mktemp("vectors") / "data", pixels_as_vectors=True)


def config_of(folder: Path, data: Path, steps: int, **fields):
    model = with_vectors(decoders.dense(SHAPE), 48, JIT, block=4)
    config = tiny_config(folder, data, model, steps)
    # the loss on x: learned in fewer steps
    config.loss = paper_loss(drop_condition=0.05, cap_before_caption=0.1)
    ours = {"data.shares": {"pairs": 1.0}, "dataloader.media_share": None}
    ours |= {"sampler.denoising_steps": 10, "sampler.temperature": 0.0, "sampler.guidance": 1.0}
    return changed(config, ours | fields)


@pytest.fixture(scope="module")
def learned(tmp_path_factory, data):
    """A run that has memorised the five pairs, and what it wrote at its end."""
    folder, found = tmp_path_factory.mktemp("learned") / "run", []
    rare = dict.fromkeys(("validator.freq", "checkpoint.interval", "metrics.log_freq"), 1000)
    fields = {"training.global_batch_size": 4, "lr_scheduler.warmup_steps": 10}
    write = sample_generation.Sampler.write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sample_generation.Sampler,
            "write",
            lambda *given: found.append(write(*given)) or found[-1],
        )
        trainer = run(config_of(folder, data, 400, **fields, **rare))
    return folder, found[-1], trainer


def distance(image: np.ndarray, shade: int) -> float:
    return float(np.abs(image.astype(float) - pixels(shade)).mean())


@pytest.mark.slow
def test_a_run_that_has_learned_writes_what_it_was_shown(learned):
    folder, samples, _ = learned
    assert (folder / "samples.png").exists()
    for shade, sample in enumerate(samples):
        assert distance(sample.image, shade) < CLOSE, (shade, distance(sample.image, shade))
    assert [sample.caption for sample in samples] == SHADES


@pytest.mark.slow
def test_images_from_captions_come_in_batches(learned, data):
    tokenizers = Tokenizers.load(data / "tokenizers")
    model, captions = learned[2].model, [SHADES[4], SHADES[0], SHADES[2]]
    options = {"sampling": Sampling(guidance=1.5), "denoising": Denoising(6, "heun")}
    together = images_from_captions(model, tokenizers, captions, **options)
    assert together.shape == (3, 8, 8, 3) and together.dtype == np.uint8
    for image, shade in zip(together, (4, 0, 2), strict=True):
        assert distance(image, shade) < CLOSE
    batched = images_from_captions(model, tokenizers, captions, **options, batch_size=2)
    assert np.abs(batched.astype(int) - together).max() <= 1
    others = images_from_captions(model, tokenizers, captions, **options, first_seed=9)
    assert not np.array_equal(others, together)


@pytest.mark.slow
def test_a_diverged_model_writes_no_samples_and_says_so(learned, data, monkeypatch):
    told: list[str] = []
    monkeypatch.setattr(sample_generation.rank_log, "tell", told.append)
    monkeypatch.setattr(sample_generation.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(sample_generation.dist, "get_world_size", lambda: 1)
    model = learned[2].model
    config = sample_generation.Sampler.Config(data_folder=str(data), denoising_steps=2)
    sampler = config.build(model=model, seq_len=32)
    bias = model.vector_output.net.bias
    before = bias.detach().clone()
    with torch.no_grad():
        bias.fill_(torch.nan)
        assert sampler.write(model, sampler.tokenizers.vocabulary, 32) == []
        bias.copy_(before)
    assert "not finite" in told[0]


def test_more_denoising_steps_than_the_schedule_has_are_refused_at_the_start(tmp_path, data):
    with pytest.raises(ValueError, match=r"denoising steps \(100001\) must lie in"):
        config_of(tmp_path, data, 4, **{"sampler.denoising_steps": 100_001}).build()


def test_one_image_cannot_be_checked(tmp_path, data):
    with pytest.raises(ValueError, match=r"sampler.checked_images \(1\) must be at least 2"):
        config_of(tmp_path, data, 4, **{"sampler.checked_images": 1}).build()


def test_prompts_hold_the_vectors_of_their_images(data):
    tokenizers = Tokenizers.load(data / "tokenizers")
    pairs = load_pairs(data / "validation" / "prompts.json", tokenizers)
    for shade, pair in enumerate(pairs):
        decoded = tokenizers.image.decode(pair.image_vectors[None])[0]
        assert np.array_equal(decoded, pixels(shade))


@pytest.mark.slow
def test_the_tool_writes_images_captions_and_both(learned, tmp_path, capsys):
    def generated(name: str, *arguments: str) -> list[dict]:
        words = [str(learned[0]), *arguments, "--out", str(tmp_path / name)]
        assert main([*words, "--denoising-steps", "10"]) == 0, capsys.readouterr().err
        lines = (tmp_path / name / "results.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    greedy = ("--temperature", "0")
    prompt = ("--mode", "image", "--prompt", SHADES[3])
    lines = generated("images", *prompt, *greedy, "--samples", "2", "--denoising-method", "heun")
    images = [np.asarray(Image.open(tmp_path / "images" / f"00000{0}-{n}-0.png")) for n in (0, 1)]
    assert all(distance(image, 3) < CLOSE for image in images)
    assert not np.array_equal(*images), "samples differ by their noise"
    assert lines[0]["denoising_method"] == "heun" and lines[0]["ended"]

    (tmp_path / "iron.png").write_bytes(png(1))
    (line,) = generated("captions", "--image", str(tmp_path / "iron.png"), *greedy)
    assert line["written"] == [{"text": SHADES[1]}] and line["ended"]
    (line,) = generated("mixed", "--prompt", SHADES[2], *greedy)
    (segment,) = line["written"]
    image = np.asarray(Image.open(tmp_path / "mixed" / segment["image"]))
    assert distance(image, 2) < CLOSE and line["ended"]


@pytest.mark.slow
def test_what_the_tool_cannot_do_is_said(learned, tmp_path, capsys):
    for options, words in (
        (("--denoising-steps", "0"), "--denoising-steps (0) must lie in"),
        (("--denoising-steps", "200000"), "denoising steps (200000) must lie in [1, 100000]"),
        (("--mode", "text", "--temperature", "0", "--samples", "2"), "another temperature"),
    ):
        assert main([str(learned[0]), "--out", str(tmp_path / "out"), *options]) == 2
        assert words in capsys.readouterr().err
        assert not (tmp_path / "out" / "results.jsonl").exists()
