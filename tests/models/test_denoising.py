"""Documents with vectors: denoised items are those of a full reading, in the document's own noise,
and later tokens see them clean.
"""

import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from tiny_runs import DEPTHS, MAMBAS, MODELS, SHAPE, THRESHOLDS
from torch import nn

from earlyfuse.configs import decoders
from earlyfuse.models.batch import MixedBatch
from earlyfuse.models.blocks.cache import DecodeCache
from earlyfuse.models.blocks.vector_adapters import VectorAdapters
from earlyfuse.models.context import ForwardSettings
from earlyfuse.models.generate.constrained import Draft, Prompt
from earlyfuse.models.generate.denoising import Denoising, noise
from earlyfuse.models.generate.session import Sampling, generate, write_documents
from earlyfuse.models.objectives.diffusion import METHODS, Diffusion
from earlyfuse.models.routing.causal_router import CausalRouter
from earlyfuse.models.routing.router import inference_rule
from earlyfuse.models.routing.running_threshold import running_thresholds
from earlyfuse.models.vocabulary import MediaCodes, Modality, Vocabulary

BOS, EOS, PAD, BEGIN, END, PATCH, BLOCK, WIDTH = 0, 1, 2, 3, 4, 40, 4, 6
IMAGE = MediaCodes(Modality.IMAGE, start=PATCH, count=1, begin=BEGIN, end=END, block=BLOCK)
SPEECH = MediaCodes(Modality.SPEECH, start=41, count=5, begin=46, end=47)  # codes, any number
VOCABULARY = Vocabulary(48, BOS, EOS, PAD, (IMAGE, SPEECH))
FLOW = Diffusion.Config(schedule="flow", predicts="v")
QUICK = Denoising(steps=3)


def vectors(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


PROMPTS = [
    Prompt([BOS, 5, 6, 7]),
    Prompt([BOS]),
    Prompt([BOS, 9, *[BEGIN, *[PATCH] * BLOCK, END], 8, 7], vectors(BLOCK)),
    Prompt([BOS, 5, 6, BEGIN]),
]


def with_causal_routers(form):
    return decoders.with_routers(form(), causal=CausalRouter.Config())


NEEDING_CACHE = ("gamma_mod", "videollm_mod")
FORMS = (
    {name: MODELS[name] for name in ("dense", "mot", "moma_causal")}
    | {"moma": partial(with_causal_routers, MODELS["moma"])}
    | MAMBAS
    | THRESHOLDS
    | {name: DEPTHS[name] for name in ("mod", "depth_threshold", *NEEDING_CACHE)}
)


def built(name: str = "dense", diffusion: Diffusion.Config = FLOW, **adapters) -> nn.Module:
    """A model whose outputs differ by more than rounding, with thresholds that decide."""
    config = replace(FORMS[name](), modalities=(0, 1), vectors=None)
    config.vectors = VectorAdapters.Config(width=WIDTH, diffusion=diffusion, **adapters)
    model = config.build()
    model.init_states()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.3, generator=generator)
        for number, (_, threshold) in enumerate(running_thresholds(model)):
            threshold.threshold_E.fill_(0.1 * number)
            threshold.weight_E.fill_(1.0)
    return model.eval()


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    return built()


def written(model, prompts=PROMPTS, mode="image", **options):
    options = {"new_tokens": 18 if mode == "interleaved" else 12, "denoising": QUICK} | options
    return write_documents(model, VOCABULARY, prompts, mode=mode, **options)


def same(ones, others, atol=2e-4):
    assert [one.written for one in ones] == [other.written for other in others]
    for one, other in zip(ones, others, strict=True):
        assert (one.vectors is None) == (other.vectors is None)
        if one.vectors is not None:
            torch.testing.assert_close(one.vectors, other.vectors, rtol=1e-3, atol=atol)


# ---------------------------------------------------------------- cache


@pytest.mark.parametrize("name", [name for name in FORMS if name not in NEEDING_CACHE])
def test_cached_sampling_writes_what_reading_anew_writes(name):
    model = built(name)
    for mode, guidance in (("image", 1.0), ("interleaved", 2.0)):
        options = {"mode": mode, "sampling": Sampling(guidance=guidance)}
        cached = written(model, **options)
        assert any(draft.vectors is not None for draft in cached)
        same(cached, written(model, **options, cache=False))


@pytest.mark.parametrize(
    "adapters",
    [
        {"rotary": "shared"},
        {"rotary": "shared", "bidirectional": False},
        {"bidirectional": False},
        {"later_see": "clean"},
    ],
    ids=str,
)
def test_cached_sampling_is_exact_with_other_positions_and_masks(adapters):
    model = built(**adapters)
    options = {"mode": "interleaved", "sampling": Sampling(guidance=1.5)}
    same(written(model, **options), written(model, **options, cache=False))


@pytest.mark.parametrize("method", METHODS)
def test_cached_sampling_is_exact_by_each_method(dense, method):
    options = {"denoising": Denoising(4, method), "sampling": Sampling(guidance=2.0)}
    same(written(dense, **options), written(dense, **options, cache=False))


def test_a_unet_sees_the_image_alone():
    shape = {"channels": 6, "block": BLOCK, "features": 8}
    model = built(adapter="unet", **shape)
    options = {"mode": "interleaved", "sampling": Sampling(guidance=2.0)}
    same(written(model, **options), written(model, **options, cache=False))


@pytest.mark.parametrize("name", FORMS)
def test_a_call_that_is_not_kept_leaves_the_cache_as_it_was(name):
    """Tokens read after it, and calls repeated after it, find what they would without it."""
    model = built(name)
    settings = ForwardSettings(rule=inference_rule(model, None))
    prefix, after = torch.randint(5, 40, (2, 3, 7), generator=torch.Generator().manual_seed(0))
    z = torch.randn(3, BLOCK, WIDTH)
    patches = torch.full((3, BLOCK), PATCH)

    def run(calls):
        cache, read, outputs = DecodeCache(3, 40), 0, []
        for kept in calls:
            tokens = patches if not kept else after if read else prefix
            length = tokens.shape[1]
            cache.start_step(torch.full((3,), length), read + length, kept=kept)
            batch = MixedBatch.of(
                tokens,
                VOCABULARY.modality_of(tokens),
                positions_BS=read + torch.arange(length).expand_as(tokens),
                vectors_BSP=None if kept else z,
                has_vector_BS=None if kept else tokens == PATCH,
            )
            loss = None if kept else lambda *_, predicted_TP: predicted_TP
            outputs.append(model(batch, settings, cache=cache, loss=loss))
            read += length if kept else 0
        return outputs

    with torch.no_grad():
        _, once, again, with_steps = run([True, False, False, True])
        without = run([True, True])[1]
    assert once.std() > 0.01 and with_steps.std() > 0.01
    torch.testing.assert_close(once, again, rtol=0, atol=0)
    torch.testing.assert_close(with_steps, without, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- what is denoised, and seen


def predictions(model, tokens, found, time, document=None):
    """Of the last item of a row whose vectors are ``found``; the others are clean."""
    row = torch.tensor([tokens])
    there = row == PATCH
    at = torch.zeros(row.shape + (WIDTH,))
    at[there] = found
    times = torch.zeros(row.shape)
    times[:, -BLOCK:] = time
    number = None if document is None else torch.tensor([document], dtype=torch.int32)
    batch = MixedBatch.of(
        row, VOCABULARY.modality_of(row), number, vectors_BSP=at, has_vector_BS=there, time_BS=times
    )
    return model(batch, loss=lambda *_, predicted_TP: predicted_TP)[-BLOCK:]


def by_hand(model, prompt, seed, number, scale, guided_until=1.0, steps=3):
    """Euler on the flow, of full forwards; dropped conditions as in the objective: the block is a
    document of its own.
    """
    tokens = [*prompt.tokens, *([] if prompt.tokens[-1] == BEGIN else [BEGIN]), *[PATCH] * BLOCK]
    z = noise([seed], [number], (BLOCK, WIDTH), torch.device("cpu"))[0]
    before = torch.zeros(0, WIDTH) if prompt.vectors is None else prompt.vectors
    alone = [1] * (len(tokens) - BLOCK - 1) + [2] * (BLOCK + 1)
    for step in range(steps):
        time = 1 - step / steps
        found = torch.cat([before, z])
        c = predictions(model, tokens, found, time)
        if scale != 1 and time <= guided_until:
            u = predictions(model, tokens, found, time, alone)
            c = u + scale * (c - u)
        z = z - c / steps
    return z


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_items_are_those_of_full_forwards_by_hand(dense, scale):
    seeds, sampling = [3, 4, 5, 6], Sampling(guidance=scale)
    drafts = written(dense, seeds=seeds, sampling=sampling)
    with torch.no_grad():
        for prompt, seed, draft in zip(PROMPTS, seeds, drafts, strict=True):
            number = int(prompt.vectors is not None)
            expected = by_hand(dense, prompt, seed, number, scale)
            torch.testing.assert_close(draft.vectors, expected, rtol=1e-3, atol=2e-4)
    block = [PATCH] * BLOCK + [END]
    assert [draft.written for draft in drafts] == [*[[BEGIN, *block]] * 3, block]


def test_guidance_may_be_limited_to_some_times(dense):
    denoising, sampling = replace(QUICK, guided_until=0.9), Sampling(guidance=2.5)
    (draft,) = written(dense, PROMPTS[:1], sampling=sampling, denoising=denoising)
    with torch.no_grad():
        expected = by_hand(dense, PROMPTS[0], 0, 0, 2.5, guided_until=0.9)
        everywhere = by_hand(dense, PROMPTS[0], 0, 0, 2.5)
    torch.testing.assert_close(draft.vectors, expected, rtol=1e-3, atol=2e-4)
    assert (draft.vectors - everywhere).abs().max() > 0.01


def test_text_after_an_item_sees_it_clean(dense):
    """Greedy tokens are the most likely ones of a full forward over the clean item."""
    greedy = Sampling(temperature=0)
    options = {"mode": "interleaved", "sampling": greedy, "new_tokens": 20, "unused": [EOS]}
    (draft,) = written(dense, PROMPTS[3:], **options)
    row = torch.tensor([draft.tokens])
    there = row == PATCH
    at = torch.zeros(row.shape + (WIDTH,))
    at[there] = torch.cat([item.vectors for item in draft.items])
    inputs = {"vectors_BSP": at, "has_vector_BS": there}
    is_text = VOCABULARY.modality_of(torch.arange(48)) == 0
    is_text[[BOS, EOS, PAD, END, 46, 47, BEGIN]] = False

    def follows(**fields):
        batch = MixedBatch.of(row, VOCABULARY.modality_of(row), **inputs, **fields)
        with torch.no_grad():
            logits = dense(batch)[0].masked_fill(~is_text, -torch.inf)
        start = draft.tokens.index(END)
        expected = logits[start:-1].argmax(-1).tolist()
        places = [n for n, t in enumerate(draft.tokens[start + 1 :]) if is_text[t]]
        return [(expected[n], draft.tokens[start + 1 + n]) for n in places]

    clean = follows()
    assert len(clean) > 3 and all(one == other for one, other in clean)
    assert any(one != other for one, other in follows(time_BS=there * 0.5))


# ---------------------------------------------------------------- independence


@pytest.mark.parametrize("name", ["dense", "hybrid", "moma_causal"])
def test_a_document_alone_is_as_in_a_batch(name):
    model, seeds = built(name), [7, 8, 9, 10]
    options = {"mode": "interleaved", "sampling": Sampling(guidance=1.5)}
    together = written(model, seeds=seeds, **options)
    for prompt, seed, draft in zip(PROMPTS, seeds, together, strict=True):
        same(written(model, [prompt], seeds=[seed], **options), [draft])
    same(written(model, PROMPTS[::-1], seeds=seeds[::-1], **options), together[::-1])


def test_a_seed_decides(dense):
    one, again, other = (written(dense, seeds=seeds) for seeds in ([1] * 4, [1] * 4, [2] * 4))
    same(one, again, atol=0)
    assert all((a.vectors - b.vectors).abs().max() > 0.1 for a, b in zip(one, other, strict=True))
    words = [EOS, 46, *range(6, 40)]  # but for one
    options = {"mode": "interleaved", "new_tokens": 60, "unused": words}
    options["sampling"] = Sampling(temperature=100.0)
    (twice,) = written(dense, [Prompt([BOS, BEGIN])], **options)
    items = [item.vectors for item in twice.items]
    assert len(items) > 1 and not torch.equal(*items[:2]), "items of one document differ"


def test_ranks_agree_about_tokens_and_vectors(dense):
    def agree(values):
        return torch.full_like(values, 0.25) if values.is_floating_point() else values

    (draft,) = written(dense, PROMPTS[:1], agree=agree)
    assert (draft.vectors == 0.25).all()


# ---------------------------------------------------------------- documents


class Wild(nn.Module):
    """Prefers whatever its seed says, and predicts anything."""

    def __init__(self, vocabulary: Vocabulary, seed: int):
        super().__init__()
        media = tuple(m.modality for m in vocabulary.media if m.continuous)
        vectors = VectorAdapters.Config(width=WIDTH, modalities=media)
        self.config = replace(decoders.dense(SHAPE), modalities=(0, *media), vectors=vectors)
        self.weight, self.size = nn.Parameter(torch.zeros(1)), vocabulary.size
        self.generator = torch.Generator().manual_seed(seed)

    def forward(self, batch, settings, cache=None, loss=None):
        rows, length = batch.tokens_BS.shape
        if loss is not None:
            return torch.randn(rows * length, WIDTH, generator=self.generator)
        shape = rows, length if cache is None else 1, self.size
        return torch.randn(*shape, generator=self.generator)


@pytest.fixture
def both(monkeypatch):
    """A vocabulary with two continuous media and one of codes."""
    monkeypatch.setattr(Modality, "LABELS", [*Modality.LABELS])
    track = Modality.register("track")
    medium = MediaCodes(track, start=48, count=1, begin=49, end=50, block=2)
    return Vocabulary(51, BOS, EOS, PAD, (IMAGE, SPEECH, medium))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("cache", [True, False])
def test_documents_of_codes_and_vectors_are_whole(both, seed, cache):
    letters = {BOS: "b", EOS: "e", PAD: "?", BEGIN: "<", END: ">", 46: "(", 47: ")"}
    letters |= {PATCH: "p", 48: "q", 49: "[", 50: "]"} | dict.fromkeys(range(41, 46), "s")
    options = {"new_tokens": 60, "denoising": Denoising(1), "cache": cache}
    options |= {"sampling": Sampling(temperature=0.01, guidance=2.0), "unused": [EOS]}
    drafts = write_documents(Wild(both, seed), both, PROMPTS, **options)
    whole = re.compile(r"b(t|<pppp>|\(s+\)|\[qq\])*")
    spelled = ["".join(letters.get(token, "t") for token in draft.tokens) for draft in drafts]
    for text, draft in zip(spelled, drafts, strict=True):
        assert whole.fullmatch(text), text
        places = [place for place, letter in enumerate(text) if letter in "pq"]
        kept = [item.start + n for item in draft.items for n in range(len(item.vectors))]
        assert kept == places and len(draft.written) == 60
    assert {"p", "q", "s"} <= set("".join(spelled))


class Knowing(nn.Module):
    """Knows the image of each word, and of no word another; predicts x."""

    def __init__(self, images, nothing):
        super().__init__()
        vectors = VectorAdapters.Config(
            width=WIDTH, diffusion=replace(FLOW, predicts="x", data_range=2.0)
        )
        self.config = replace(decoders.dense(SHAPE), vectors=vectors)
        self.weight, self.images, self.nothing = nn.Parameter(torch.zeros(1)), images, nothing

    def forward(self, batch, settings, loss=None):
        if loss is None:
            return torch.zeros(*batch.tokens_BS.shape, VOCABULARY.size)
        found = torch.zeros(*batch.tokens_BS.shape, WIDTH)
        for row, tokens in enumerate(batch.tokens_BS.tolist()):
            word = [self.images[token] for token in tokens if token in self.images]
            found[row, batch.has_vector_BS[row]] = word[0] if word else self.nothing
        return found.flatten(0, 1)


@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_a_model_that_knows_its_images_writes_them(guidance):
    images = {5: vectors(4, 1).clamp(-1, 1), 6: vectors(4, 2).clamp(-1, 1)}
    nothing = vectors(4, 3).clamp(-1, 1)
    model, prompts = Knowing(images, nothing), [Prompt([BOS, 5]), Prompt([BOS, 6])]
    sampling = Sampling(guidance=guidance)
    drafts = written(model, prompts, sampling=sampling, cache=False)
    for word, draft in zip(images, drafts, strict=True):
        expected = (nothing + guidance * (images[word] - nothing)).clamp(-2, 2)
        torch.testing.assert_close(draft.vectors, expected)


def test_tokens_alone_come_from_generate(dense):
    prompts = [[BOS, 5, 6, 7], [BOS]]
    expected = written(dense, [Prompt(p) for p in prompts], mode="text")
    found = generate(dense, VOCABULARY, prompts, mode="text", new_tokens=12)
    assert found == [draft.written for draft in expected]


WHOLE = [BOS, BEGIN, *[PATCH] * BLOCK, END]
VARYING = replace(VOCABULARY, media=(replace(IMAGE, block=0), SPEECH))


@pytest.mark.parametrize(
    ("prompt", "options", "rule"),
    [
        (Prompt(WHOLE), {}, r"vectors \(0\) of a prompt must be as many as its placeholders \(4\)"),
        (Prompt([BOS, 5], vectors(2)), {}, r"vectors \(2\) .* placeholders \(0\)"),
        (Prompt(WHOLE, vectors(4) / 0), {}, "must be a finite array"),
        (Prompt(WHOLE, vectors(4)[:, :5]), {}, r"vectors \(4, 5\) of prompt 0 must have width 6"),
        (Prompt(WHOLE[:4], vectors(2)), {}, "inside an item of image with 2 of 4 vectors"),
        (Prompt([BOS]), {"mode": "image", "new_tokens": 5}, r"new_tokens \(5\) must be at least 6"),
        (Prompt([BOS]), {"denoising": Denoising(200_000)}, r"steps \(200000\) must lie in"),
        (Prompt([BOS]), {"vocabulary": VARYING, "mode": "image"}, "image cannot be written"),
        (Prompt([BOS, BEGIN]), {"vocabulary": VARYING}, "image cannot be written"),
    ],
)
def test_impossible_requests_are_refused(dense, prompt, options, rule):
    options = {"vocabulary": VOCABULARY, "new_tokens": 12} | options
    with pytest.raises(ValueError, match=rule):
        write_documents(dense, prompts=[prompt], **options)


def test_a_prompt_may_hold_items_of_any_length_that_are_not_written(dense):
    prompt = Prompt([BOS, BEGIN, *[PATCH] * 7, END, 5], vectors(7))
    (draft,) = write_documents(dense, VARYING, [prompt], new_tokens=12)
    assert BEGIN not in draft.written and draft.vectors is None


def test_a_prompt_may_end_with_an_item(dense):
    prompt = Prompt(WHOLE[:-1], vectors(4))
    (draft,) = written(dense, [prompt], mode="interleaved")
    assert draft.written[0] == END


def test_a_model_and_a_vocabulary_with_vectors_of_other_media_are_refused(dense):
    plain = decoders.dense(SHAPE).build()
    with pytest.raises(ValueError, match="vectors of image in the vocabulary, and of no medium in"):
        write_documents(plain, VOCABULARY, [Prompt([BOS])], new_tokens=4)
    codes = replace(VOCABULARY, media=(replace(IMAGE, count=1, modality=SPEECH.modality),))
    with pytest.raises(ValueError, match="vectors of speech in the vocabulary, and of image in"):
        write_documents(dense, codes, [Prompt([BOS])], new_tokens=4)


def test_vectors_that_are_not_finite_are_refused(dense):
    model = built()
    with torch.no_grad():
        model.vector_output.net.bias.fill_(torch.inf)
    with pytest.raises(ValueError, match="vectors of image that are not finite"):
        written(model)


def test_a_draft_keeps_what_was_given_apart():
    prompt = Prompt(PROMPTS[2].tokens, PROMPTS[2].vectors)
    draft = Draft(VOCABULARY, prompt, "image", 6)
    draft.write_vectors(vectors(4, 5))
    assert draft.done and torch.equal(draft.vectors, vectors(4, 5))
    assert [item.start for item in draft.items] == [3, 11]
