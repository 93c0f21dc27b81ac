"""Image checks: true images score as the classifier does, others by what they show."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from earlyfuse.data.embedded import digits
from earlyfuse.data.embedded.tasks import labelled
from earlyfuse.parallel.evaluation.image_checks import LABELLED, ImageChecks, frechet_distance


@pytest.fixture(scope="module")
def scans():
    return digits.load(16, seed=0)


@pytest.fixture(scope="module")
def folder(scans, tmp_path_factory):
    """A data folder with the embedded corpus's labelled digits."""
    folder = tmp_path_factory.mktemp("data")
    (folder / LABELLED).parent.mkdir()
    (folder / LABELLED).write_text(json.dumps(labelled(*scans)))
    return folder


@pytest.fixture(scope="module")
def checks(folder):
    return ImageChecks.load(folder)


def pixels(digit, size=16):
    image = Image.open(io.BytesIO(digit.png)).convert("RGB")
    return np.asarray(image.resize((size, size), Image.Resampling.NEAREST))


@pytest.fixture(scope="module")
def held_out(scans):
    """Captions and images of the digits that training does not show."""
    captions = [f"handwritten digit {digit.word}" for digit in scans[1]]
    return captions, np.stack([pixels(digit) for digit in scans[1]])


def scores(checks, captions, images):
    return {name.partition("/")[0]: v for name, v in checks.score(captions, images).items()}


def test_held_out_digits_score_as_the_classifier_and_are_nearer_than_the_floor(checks, held_out):
    found = checks.score(*held_out)
    assert {name.partition("/")[2] for name in found} == {"digit label"}
    found = scores(checks, *held_out)
    assert found["generated_accuracy"] == found["true_accuracy"] > 0.98
    assert found["generated_fd"] == pytest.approx(0, abs=1e-6)
    assert 0 < found["true_fd"] < 1.5 and found["generated_chance"] == pytest.approx(0.1, abs=0.01)


def test_training_digits_are_as_far_as_the_floor(checks, scans):
    some = scans[0][::7]
    captions = [f"handwritten digit {digit.word}" for digit in some]
    found = scores(checks, captions, np.stack([pixels(digit) for digit in some]))
    assert found["generated_fd"] == pytest.approx(found["true_fd"], rel=0.5)


def test_captions_of_other_digits_score_chance(checks, held_out):
    captions, images = held_out
    shuffled = np.random.default_rng(0).permutation(captions).tolist()
    found = scores(checks, shuffled, images)
    assert found["generated_accuracy"] == pytest.approx(found["generated_chance"], abs=0.06)


def test_noise_and_a_single_digit_are_far_from_true_digits(checks, held_out):
    captions, images = held_out
    floor = scores(checks, captions, images)["true_fd"]
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, images.shape, np.uint8)
    grain = (images + rng.normal(0, 60, images.shape)).clip(0, 255).astype(np.uint8)
    ones = images[[caption.endswith("one") for caption in captions]]
    collapsed = ones[rng.integers(0, len(ones), len(images))]
    for other, least in ((noise, 100), (collapsed, 8), (grain, 2)):
        assert scores(checks, captions, other)["generated_fd"] > least * floor
    assert scores(checks, captions, noise)["generated_accuracy"] < 0.25


def test_larger_images_are_judged_as_small_ones(checks, scans, held_out):
    captions, images = held_out
    larger = np.stack([pixels(digit, 48) for digit in scans[1]])
    found = scores(checks, captions, larger)
    assert found["generated_accuracy"] > 0.98
    assert found["generated_fd"] < scores(checks, captions, images)["true_fd"]


def test_captions_are_balanced_and_follow_from_the_seed(checks):
    captions = checks.captions(25, seed=3)
    counts = {caption: captions.count(caption) for caption in captions}
    assert len(counts) == 10 and set(counts.values()) == {2, 3}
    assert captions == checks.captions(25, seed=3) != checks.captions(25, seed=4)
    assert all(caption.startswith("handwritten digit ") for caption in captions)


def test_frechet_distance_is_that_of_scipy():
    from scipy.linalg import sqrtm

    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, (50, 4)), rng.normal(0.3, 2, (70, 4)) @ rng.normal(0, 1, (4, 4))
    covariances = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    shift = a.mean(0) - b.mean(0)
    expected = shift @ shift + np.trace(sum(covariances) - 2 * sqrtm(np.matmul(*covariances)).real)
    assert frechet_distance(a, b) == pytest.approx(expected)


def test_other_captions_and_images_are_refused(checks, held_out):
    captions, images = held_out
    for given, shown, said in (
        (["a seven"] * 2, images[:2], r"caption \('a seven'\) must be 'handwritten digit ' and"),
        (["handwritten digit ten"] * 2, images[:2], "must be 'handwritten digit ' and one of"),
        (captions[:3], images[:2], r"as many as captions \(3\)"),
        (captions[:1], images[:1], "two or more"),
        (captions[:2], images[:2] / 255, "must be uint8"),
    ):
        with pytest.raises(ValueError, match=said):
            checks.score(given, shown)


def test_a_damaged_file_is_refused_by_name_and_none_is_none(folder, tmp_path):
    assert ImageChecks.load(tmp_path) is None
    path = tmp_path / LABELLED
    path.parent.mkdir()
    whole = json.loads((folder / LABELLED).read_text())
    whole |= {split: whole[split][::150] for split in ("train", "held_out")}
    image = whole["train"][0]
    other = {"image": image["image"], "label": "ten"}
    cut = {"image": base64.b64encode(base64.b64decode(image["image"])[:40]).decode()}
    for damaged in (
        "", "[]", "{", "[" * 9999,
        *(whole | {name: value} for name in whole
          for value in (None, 3, "", [], {}, [[]], [1], [image])),
        *({k: v for k, v in whole.items() if k != name} for name in whole),
        whole | {"more": 1},
        whole | {"held_out": [other, image]},
        *(whole | {"train": [image, image | change]} for change in (
            cut, {"image": 3}, {"image": "?"}, {"label": 3}, {"label": ""}, {"label": "\x1b[2J"},
            {"more": 1})),
    ):  # fmt: skip
        content = damaged if isinstance(damaged, str) else json.dumps(damaged)
        if damaged == whole | {"prefix": ""}:
            continue  # captions may be labels alone
        path.write_text(content)
        with pytest.raises(ValueError, match=r"labelled\.json") as caught:
            ImageChecks.load(tmp_path)
        assert "\x1b" not in str(caught.value) and "copy it again" in str(caught.value)
