"""Generation: the cache changes nothing, documents are whole, and each is independent."""

import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from public_chameleons import chameleon
from tiny_runs import MAMBAS, MODELS, SHAPE, THRESHOLDS
from torch import nn
from toy import VOCABULARY

from earlyfuse.configs import decoders
from earlyfuse.models.batch import MixedBatch
from earlyfuse.models.blocks.cache import DecodeCache
from earlyfuse.models.context import ForwardSettings
from earlyfuse.models.generate.constrained import Draft
from earlyfuse.models.generate.session import Sampling, choose, generate
from earlyfuse.models.routing.causal_router import CausalRouter
from earlyfuse.models.routing.router import CAUSAL_RULES as RULES
from earlyfuse.models.routing.running_threshold import running_thresholds
from earlyfuse.models.vocabulary import MediaCodes, Modality, Vocabulary
from earlyfuse.parallel.checkpoint.open_checkpoint import load_model

BOS, EOS, PAD, BEGIN, END, BLOCK = 0, 1, 2, 3, 4, 4
CODES = range(32, 48)
GREEDY = Sampling(temperature=0)
PROMPTS = [
    [BOS, 5, 6],
    [BOS],
    [BOS, BEGIN, 32, 33],  # in the midst of an image
    [BOS, BEGIN, 32, 33, 34, 35, END, 6, 7, 8, 9, 10, 11],
]


def with_causal_routers(form):
    return decoders.with_routers(form(), causal=CausalRouter.Config())


SPARSE = ("moe_8x", "moma", "shared")
FORMS = (
    {name: form for name, form in MODELS.items() if name not in SPARSE}
    | {f"{name}, causal routers": partial(with_causal_routers, MODELS[name]) for name in SPARSE}
    | MAMBAS
    | THRESHOLDS
    | {
        "grouped heads": lambda: decoders.dense(replace(SHAPE, kv_heads=1)),
        "moe_1t1i, pre-norm": lambda: decoders.moe_1t1i(replace(SHAPE, norm_order="pre")),
    }
)


def built(name: str) -> nn.Module:
    """A model whose logits differ by more than rounding, with thresholds that decide."""
    model = FORMS[name]().build()
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
def mot() -> nn.Module:
    return built("mot")


# ---------------------------------------------------------------- the cache


@pytest.mark.parametrize("name", FORMS)
def test_logits_with_the_cache_equal_those_of_a_full_forward(name):
    model = built(name)
    by_rule = ForwardSettings(rule="threshold" if name in THRESHOLDS else "causal")
    rows, steps = [list(prompt) for prompt in PROMPTS], 6
    decoding = DecodeCache(len(rows), max(map(len, rows)) + steps)
    follow = torch.randint(5, 48, (steps, len(rows)), generator=torch.Generator().manual_seed(1))
    longest = max(map(len, rows))
    tokens = torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])
    positions = torch.arange(longest).expand_as(tokens)
    lengths = torch.tensor([len(row) for row in rows])
    with torch.no_grad():
        for step in range(steps):
            decoding.start_step(lengths, max(map(len, rows)))
            kind = VOCABULARY.modality_of(tokens)
            inputs = MixedBatch.of(tokens, kind, positions_BS=positions)
            cached = model(inputs, by_rule, cache=decoding)
            assert cached.shape == (len(rows), 1, VOCABULARY.size)
            for row, found in zip(rows, cached, strict=True):
                whole = torch.tensor([row])
                whole = MixedBatch.of(whole, VOCABULARY.modality_of(whole))
                expected = model(whole, by_rule)[0, -1]
                assert expected.std() > 0.1, "a comparison of zeros would prove nothing"
                torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-5)
            for row, token in zip(rows, follow[step].tolist(), strict=True):
                row.append(token)
            tokens = follow[step].unsqueeze(1)
            positions = torch.tensor([[len(row) - 1] for row in rows])
            lengths = torch.ones(len(rows), dtype=torch.int64)


@pytest.mark.parametrize("name", FORMS)
def test_cached_decoding_writes_what_reading_anew_writes(name):
    model = built(name)
    guided = Sampling(guidance=2.0, top_p=0.9)
    for mode, sampling in (("text", GREEDY), ("interleaved", guided), ("image", Sampling())):
        options = {"new_tokens": 14, "mode": mode, "sampling": sampling}
        cached = generate(model, VOCABULARY, PROMPTS, **options)
        assert cached == generate(model, VOCABULARY, PROMPTS, **options, cache=False)


def test_the_rule_of_experts_is_chosen_or_the_first_that_the_model_has():
    model, options = built("moma_both"), {"new_tokens": 14, "mode": "text"}
    first = generate(model, VOCABULARY, PROMPTS, **options)
    by_rule = {rule: generate(model, VOCABULARY, PROMPTS, **options, rule=rule) for rule in RULES}
    assert first == by_rule["causal"] != by_rule["threshold"]
    with pytest.raises(ValueError, match="cannot route by thresholds"):
        generate(built("moma_causal"), VOCABULARY, PROMPTS, **options, rule="threshold")
    assert by_rule["threshold"] == generate(
        model, VOCABULARY, PROMPTS, **options, rule="threshold", cache=False
    )


def test_a_document_too_long_for_its_session_is_refused():
    with pytest.raises(ValueError, match="9 tokens does not fit into the 8 slots"):
        DecodeCache(1, 8).start_step(torch.ones(1), 9)


# ---------------------------------------------------------------- transformers


@pytest.mark.parametrize("swin_norm, kv_heads", [(False, 4), (False, 2), (True, 4)])
def test_greedy_text_equals_that_of_transformers(swin_norm, kv_heads, tmp_path):
    theirs = chameleon(swin_norm, kv_heads)
    theirs.save_pretrained(tmp_path)
    ours, vocabulary = load_model(tmp_path)
    images = replace(vocabulary.medium(Modality.IMAGE), block=4)
    vocabulary = replace(vocabulary, media=(images,))
    prompts = [[0, 20, 21, 22], [0], [0, 5, 8, 9, 10, 11, 4, 40], [0, 70]]
    written = generate(ours, vocabulary, prompts, new_tokens=20, mode="text", sampling=GREEDY)
    for prompt, tokens in zip(prompts, written, strict=True):
        expected = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=2,
            pad_token_id=1,
            suppress_tokens=[0, 1, 4, 5],  # their forward masks image codes itself
        )
        assert tokens == expected[0, len(prompt) :].tolist()
    assert len({tuple(tokens) for tokens in written}) == len(prompts)


# ---------------------------------------------------------------- grammar

SPEECH = MediaCodes(Modality.SPEECH, start=48, count=5, begin=53, end=54)  # blocks of any length
SPOKEN = replace(VOCABULARY, size=55, media=(*VOCABULARY.media, SPEECH))


class Adversary(nn.Module):
    """Prefers whatever its seed says, above all what makes no document; some of it is no number."""

    config = decoders.dense(SHAPE)

    def __init__(self, vocabulary: Vocabulary, seed: int):
        super().__init__()
        self.weight, self.size = nn.Parameter(torch.zeros(1)), vocabulary.size
        self.generator = torch.Generator().manual_seed(seed)
        self.rows: list[int] = []

    def forward(self, batch, settings, cache=None):
        rows, length = batch.tokens_BS.shape if cache is None else (len(batch.tokens_BS), 1)
        self.rows.append(rows)
        logits = torch.randn(rows, length, self.size, generator=self.generator) * 30
        wild = torch.randint(0, 40, logits.shape, generator=self.generator)
        for place, value in enumerate((torch.nan, torch.inf, -torch.inf)):
            logits[wild == place] = value
        return logits


def spelled(tokens: list[int]) -> str:
    """A letter for each token: t text, b bos, e eos, p pad; < c > image, ( s ) speech."""
    letters = {BOS: "b", EOS: "e", PAD: "p", BEGIN: "<", END: ">", 53: "(", 54: ")"}
    letters |= dict.fromkeys(CODES, "c") | dict.fromkeys(range(48, 53), "s")
    return "".join(letters.get(token, "t") for token in tokens)


WHOLE = re.compile(r"b(t|<cccc>|\(s+\))*e?")


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32),
    room=st.integers(0, 30),
    temperature=st.sampled_from([0.0, 0.01, 1.0, 50.0]),
    top_p=st.sampled_from([0.05, 1.0]),
    guidance=st.sampled_from([1.0, 4.0]),
    cache=st.booleans(),
)
def test_whatever_the_logits_say_documents_are_whole(
    seed, room, temperature, top_p, guidance, cache
):
    prompts = [[BOS], [BOS, 7, BEGIN, 32, 33, 34, 35, END, 8], [BOS, 53, 48, 54]]
    written = generate(
        Adversary(SPOKEN, seed),
        SPOKEN,
        prompts,
        new_tokens=room,
        sampling=Sampling(temperature, top_p, guidance=guidance),
        seeds=[seed, seed + 1, seed + 2],
        cache=cache,
    )
    for prompt, tokens in zip(prompts, written, strict=True):
        assert WHOLE.fullmatch(spelled(prompt + tokens)), spelled(prompt + tokens)
        assert len(tokens) == room or tokens[-1] == EOS


@pytest.mark.parametrize("seed", range(5))
def test_each_mode_writes_what_it_says(seed):
    model, options = Adversary(SPOKEN, seed), {"new_tokens": 12}
    begun = [BOS, BEGIN, 40]
    images = generate(model, SPOKEN, [[BOS, 5], begun], mode="image", **options)
    assert [spelled(tokens) for tokens in images] == ["<cccc>", "ccc>"]
    texts = generate(model, SPOKEN, [[BOS, 5], begun], mode="text", **options)
    assert re.fullmatch(r"t{12}|t*e", spelled(texts[0]))
    assert re.fullmatch(r"ccc>(t{8}|t*e)", spelled(texts[1]))


@pytest.mark.parametrize(
    ("prompt", "options", "rule"),
    [
        ([], {}, "begin with begin-of-document .0., not with nothing"),
        ([5, 6], {}, "begin with begin-of-document .0., not with 5"),
        ([BOS, 5, BOS], {}, r"token 2 of the prompt \(0\) is not allowed there: text or"),
        ([BOS, 33], {}, r"token 1 of the prompt \(33\)"),
        ([BOS, END], {}, r"token 1 of the prompt \(4\)"),
        ([BOS, 48], {}, r"token 1 of the prompt \(48\)"),
        ([BOS, BEGIN, 33, 7], {}, "it is in a block of image with 1 codes of 4 so far"),
        ([BOS, 5, EOS, 6], {}, "the document has ended"),
        ([BOS, 5, EOS], {}, "has ended with eos"),
        ([BOS], {"mode": "image", "new_tokens": 5}, r"new_tokens \(5\) must be at least 6"),
        ([BOS, BEGIN, 33, 34], {"new_tokens": 2}, r"new_tokens \(2\) must be at least 3"),
        ([BOS], {"mode": "film"}, r"mode \('film'\) must be one of text, interleaved, image"),
        ([BOS], {"mode": "speech"}, "needs a vocabulary with speech codes"),
        ([BOS], {"seeds": [0, 1]}, r"seeds \(2\) must be as many as prompts \(1\)"),
    ],
)
def test_impossible_requests_are_refused(mot, prompt, options, rule):
    with pytest.raises(ValueError, match=rule):
        generate(mot, VOCABULARY, [prompt], **{"new_tokens": 12} | options)


@pytest.mark.parametrize("field", ["temperature", "top_p", "top_k", "guidance"])
def test_impossible_sampling_is_refused(field):
    with pytest.raises(ValueError, match=rf"{field} \(-1\)"):
        Sampling(**{field: -1})


def test_a_block_of_any_length_may_be_finished_at_once_but_not_left_empty():
    for prompt, room, expected in (([BOS, 53, 48], 1, r"\)"), ([BOS, 53], 2, r"s\)")):
        for seed in range(5):
            (tokens,) = generate(Adversary(SPOKEN, seed), SPOKEN, [prompt], new_tokens=room)
            assert re.fullmatch(expected, spelled(tokens))
    with pytest.raises(ValueError, match="at least 2"):
        Draft(SPOKEN, [BOS, 53], "interleaved", 1)


# ---------------------------------------------------------------- drawing


def test_tokens_are_drawn_as_often_as_they_are_likely():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0, 9.0]])
    allowed = torch.tensor([[True, True, True, True, False]])
    count = 4000
    draws = (torch.arange(count, dtype=torch.float64) + 0.5) / count

    def shares(sampling):
        chosen = choose(logits.expand(count, -1), allowed.expand(count, -1), draws, sampling)
        return torch.bincount(chosen, minlength=5) / count

    whole = logits[0, :4].softmax(0)
    torch.testing.assert_close(shares(Sampling())[:4], whole, rtol=0, atol=1e-3)
    cold = (logits[0, :4] / 0.5).softmax(0)
    torch.testing.assert_close(shares(Sampling(temperature=0.5))[:4], cold, rtol=0, atol=1e-3)
    # 0.644, 0.237, 0.087, 0.032: the fewest that have 0.8 are two
    two = torch.tensor([0, 0, *(whole[2:] / whole[2:].sum())])
    torch.testing.assert_close(shares(Sampling(top_p=0.8))[:4], two, rtol=0, atol=1e-3)
    torch.testing.assert_close(shares(Sampling(top_k=2))[:4], two, rtol=0, atol=1e-3)
    for sure in (GREEDY, Sampling(top_k=1), Sampling(top_p=0.01), Sampling(temperature=1e-6)):
        assert shares(sure).tolist() == [0, 0, 0, 1, 0]


def test_no_draw_takes_what_has_no_share():
    logits = torch.zeros(2, 3)
    allowed = torch.tensor([[True, True, False], [False, True, True]])
    for draw in (0.0, 1 - 2**-53):
        draws = torch.full((2,), draw, dtype=torch.float64)
        for sampling in (Sampling(), Sampling(top_p=0.999), Sampling(top_k=3)):
            for place, token in enumerate(choose(logits, allowed, draws, sampling).tolist()):
                assert allowed[place, token]


def test_a_seed_decides_and_neighbours_do_not(mot):
    options = {"new_tokens": 14, "sampling": Sampling(guidance=1.5)}
    together = generate(mot, VOCABULARY, PROMPTS, seeds=[7, 8, 9, 10], **options)
    assert together == generate(mot, VOCABULARY, PROMPTS, seeds=[7, 8, 9, 10], **options)
    assert together != generate(mot, VOCABULARY, PROMPTS, seeds=[8, 7, 10, 9], **options)
    for prompt, seed, tokens in zip(PROMPTS, [7, 8, 9, 10], together, strict=True):
        assert generate(mot, VOCABULARY, [prompt], seeds=[seed], **options) == [tokens]
    backwards = generate(mot, VOCABULARY, PROMPTS[::-1], seeds=[10, 9, 8, 7], **options)
    assert backwards == together[::-1]


def test_more_room_only_adds(mot):
    # of text: a block is not begun where it would not fit
    short, long = (
        generate(mot, VOCABULARY, PROMPTS, new_tokens=count, mode="text") for count in (9, 20)
    )
    assert [tokens[:9] for tokens in long] == short


def test_generation_leaves_the_random_state_and_the_mode_of_the_model(mot):
    torch.manual_seed(3)
    expected = torch.rand(3)
    for training in (True, False):
        torch.manual_seed(3)
        mot.train(training)
        generate(mot, VOCABULARY, [[BOS]], new_tokens=5)
        assert torch.equal(torch.rand(3), expected) and mot.training is training


class Counted(nn.Module):
    """Counts the rows of each call."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.config, self.rows = model, model.config, []

    def forward(self, batch, *rest, **options):
        self.rows.append(len(batch.tokens_BS))
        return self.model(batch, *rest, **options)


@pytest.mark.parametrize(("guidance", "rows"), [(1.0, [2, 2, 2, 1, 1]), (2.0, [4, 4, 4, 2, 2])])
def test_finished_documents_leave_the_batch(mot, guidance, rows):
    counted, prompts = Counted(mot), [[BOS], [BOS, BEGIN, 32, 33]]
    sampling = Sampling(guidance=guidance)
    generate(counted, VOCABULARY, prompts, new_tokens=6, mode="image", sampling=sampling)
    assert counted.rows == rows


# ---------------------------------------------------------------- guidance


def test_guidance_weighs_the_prompt_against_an_image_of_nothing(mot):
    prompt, scale = [BOS, 9, 10, 11], 2.5
    options = {"new_tokens": 6, "mode": "image"}
    guided = Sampling(temperature=0, guidance=scale)
    (tokens,) = generate(mot, VOCABULARY, [prompt], sampling=guided, **options)
    plain = generate(mot, VOCABULARY, [prompt], sampling=GREEDY, **options)
    assert [tokens] != plain, "a scale that changes nothing would prove nothing"

    def logits(row):
        row_BS = torch.tensor([row])
        batch = MixedBatch.of(row_BS, VOCABULARY.modality_of(row_BS))
        return mot(batch)[0, -1, CODES.start : CODES.stop]

    block = [BEGIN]
    with torch.no_grad():
        for _ in range(BLOCK):
            with_prompt, without = logits(prompt + block), logits([BOS, *block])
            block.append(CODES.start + int((without + scale * (with_prompt - without)).argmax()))
    assert tokens == [*block, END]


def test_guidance_leaves_text_alone(mot):
    """Text documents whole, interleaved ones up to the first image."""

    def written(prompts, mode):
        for scale in (1.0, 3.0):
            sampling = Sampling(guidance=scale)
            yield generate(mot, VOCABULARY, prompts, new_tokens=20, mode=mode, sampling=sampling)

    plain, guided = written(PROMPTS, "text")
    assert plain == guided
    plain, guided = written([[BOS]] * 8, "interleaved")
    for one, other in zip(plain, guided, strict=True):
        until = one.index(BEGIN) if BEGIN in one else len(one)
        assert one[:until] == other[:until]
    assert plain != guided
