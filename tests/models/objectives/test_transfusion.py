"""Transfusion's objective and the adapters of vectors."""

from dataclasses import replace

import pytest
import torch
from tiny_runs import MODELS, SHAPE, VECTORS, with_vectors
from toy import VECTOR_VOCABULARY as VOCABULARY
from toy import WIDTH

from earlyfuse.configs import decoders
from earlyfuse.configs.transfusion import JIT, PAPER
from earlyfuse.models.batch import (
    IGNORE_LABEL,
    MixedBatch,
    places_in_documents,
    vector_spans,
    with_shared_positions,
    without_clean_copies,
)
from earlyfuse.models.blocks.vector_adapters import Grid, VectorAdapters, VectorInput, VectorOutput
from earlyfuse.models.blocks.vector_layers import Last, LastConv, patched, unpatched
from earlyfuse.models.context import ForwardSettings
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.flops import count_parameters, forward_flops
from earlyfuse.models.hashed_noise import key_of, normal, uniform
from earlyfuse.models.init_weights import constant
from earlyfuse.models.init_weights import normal as normal_draw
from earlyfuse.models.objectives.diffusion import Diffusion
from earlyfuse.models.objectives.next_token import ChameleonObjective
from earlyfuse.models.objectives.sums import LABELS
from earlyfuse.models.objectives.transfusion import VECTORS as COUNTED
from earlyfuse.models.objectives.transfusion import TransfusionObjective
from earlyfuse.models.state_dicts.decoder_config import from_dict, to_dict

P = 47  # the placeholder
IMAGE = [3, P, P, P, P, 4]
CAPTIONED = [0, 9, 8, *IMAGE, 10, 1]  # an image after text, then text
ALONE = [0, *IMAGE, 11, 12, 1]  # no text before the image
TWO = [0, 9, *IMAGE, *IMAGE, 7, 1]


def batch_of(*rows: list[list[int]], seed: int = 0) -> MixedBatch:
    """A row for each list of documents, padded; vectors are random."""
    length = max(sum(map(len, documents)) for documents in rows)
    tokens_BS = torch.full((len(rows), length), VOCABULARY.pad)
    document_BS = torch.zeros(len(rows), length, dtype=torch.int32)
    for row, documents in enumerate(rows):
        begin = 0
        for number, tokens in enumerate(documents, start=1):
            tokens_BS[row, begin : begin + len(tokens)] = torch.tensor(tokens)
            document_BS[row, begin : begin + len(tokens)] = number
            begin += len(tokens)
    has_vector_BS = tokens_BS == P
    labels_BS = torch.full_like(tokens_BS, IGNORE_LABEL)
    labels_BS[:, :-1] = tokens_BS[:, 1:]
    same_BS = document_BS[:, 1:] == document_BS[:, :-1]
    labels_BS[:, :-1][~same_BS | (document_BS[:, 1:] == 0)] = IGNORE_LABEL
    labels_BS[has_vector_BS | (labels_BS == P)] = IGNORE_LABEL
    vectors_BSP = torch.randn(
        *tokens_BS.shape, WIDTH, generator=torch.Generator().manual_seed(seed)
    )
    return MixedBatch.of(
        tokens_BS,
        VOCABULARY.modality_of(tokens_BS),
        document_BS,
        labels_BS=labels_BS,
        vectors_BSP=vectors_BSP * has_vector_BS[..., None],
        has_vector_BS=has_vector_BS,
    )


def built(config: Decoder.Config) -> Decoder:
    """A model whose predictions are not zero."""
    model = config.build()
    with pytest.MonkeyPatch.context() as patch:
        for last in (Last, LastConv):
            patch.setattr(last, "draws", lambda _: {"weight": normal_draw(), "bias": constant(0.1)})
        model.init_states()
    return model


def objective_of(config: Decoder.Config, **fields) -> TransfusionObjective:
    return TransfusionObjective.Config(**fields).build().for_model(config)


def settings(step: int = 1, first_row: int = 0) -> ForwardSettings:
    return ForwardSettings(step=step, first_row=first_row)


DENSE = VECTORS["tf_dense"]()


# ---------------------------------------------------------------- noise, times, conditions


def test_hashed_numbers_are_uniform_and_normal_and_depend_on_key_and_index_alone():
    index = torch.arange(200_000)
    u, z = uniform(5, index), normal(5, index)
    assert float(u.mean()) == pytest.approx(0.5, abs=3e-3) and u.min() > 0 and u.max() < 1
    assert float(z.mean()) == pytest.approx(0, abs=1e-2)
    assert float(z.std()) == pytest.approx(1, abs=1e-2)
    assert float((z.abs() < 1).float().mean()) == pytest.approx(0.6827, abs=5e-3)
    assert float((z[1:] * z[:-1]).mean()) == pytest.approx(0, abs=1e-2)
    assert torch.equal(normal(5, index[777:780]), z[777:780])
    assert float((normal(6, index) == z).float().mean()) < 1e-4
    assert key_of("a", 1) != key_of("a", 2)


@pytest.mark.parametrize("diffusion", [PAPER, JIT], ids=["paper", "jit"])
def test_vectors_are_noised_with_one_time_per_image_and_a_fresh_one_each_step(diffusion):
    config = with_vectors(decoders.dense(SHAPE), diffusion=diffusion)
    objective, batch = objective_of(config), batch_of([TWO, CAPTIONED])
    noised = objective.prepare(batch, settings())
    spans = vector_spans(batch)
    times = [noised.time_BS[spans == number].unique() for number in (1, 2, 3)]
    assert [len(time) for time in times] == [1, 1, 1] and len(torch.cat(times).unique()) == 3
    assert (noised.time_BS[~batch.has_vector_BS] == 0).all()
    again = objective.prepare(batch, settings())
    assert torch.equal(noised.vectors_BSP, again.vectors_BSP)
    assert not torch.equal(noised.vectors_BSP, objective.prepare(batch, settings(2)).vectors_BSP)
    # z = α x + σ ε with the ε of the target
    model_diffusion = diffusion.build()
    found = model_diffusion.values(noised.target_BSP, noised.vectors_BSP, noised.time_BS)
    has = batch.has_vector_BS & (noised.time_BS < 0.95)
    torch.testing.assert_close(found.x[has], batch.vectors_BSP[has], atol=1e-3, rtol=1e-3)


def test_noise_belongs_to_the_place_in_the_global_batch():
    """Two micro-batches of a row each are noised as one of two rows."""
    objective = objective_of(DENSE, drop_condition=0.5)
    rows = batch_of([TWO], [CAPTIONED, ALONE])
    together = objective.prepare(rows, settings())
    for row in range(2):
        part = MixedBatch(**{name: t[row : row + 1] for name, t in rows.tensors().items()})
        alone = objective.prepare(part, settings(first_row=row))
        for name, tensor in alone.tensors().items():
            assert torch.equal(tensor, together.tensors()[name][row : row + 1]), name


def test_an_image_before_its_caption_is_noised_up_to_the_cap():
    objective = objective_of(with_vectors(decoders.dense(SHAPE), diffusion=PAPER))
    batch = batch_of([ALONE, CAPTIONED])
    first, second = (vector_spans(batch) == number for number in (1, 2))
    times = [objective.prepare(batch, settings(step)).time_BS for step in range(1, 200)]
    capped = torch.stack([time[first][0] for time in times])
    free = torch.stack([time[second][0] for time in times])
    assert capped.max() <= 0.5 and free.max() > 0.9
    assert float(capped.mean()) == pytest.approx(0.25, abs=0.03)
    assert float(free.mean()) == pytest.approx(0.5, abs=0.06)


def test_all_images_before_their_caption_are_capped():
    objective = objective_of(with_vectors(decoders.dense(SHAPE), diffusion=PAPER))
    several = [0, *IMAGE, *IMAGE, *IMAGE, 7, *IMAGE, 1]
    batch = batch_of([CAPTIONED, several])
    times = [objective.prepare(batch, settings(step)).time_BS[0] for step in range(1, 60)]
    spans = vector_spans(batch)[0]
    largest = [max(float(time[spans == number].max()) for time in times) for number in range(1, 6)]
    assert [time <= 0.5 for time in largest] == [False, True, True, True, False]


def test_text_before_an_image_is_counted_apart_from_the_separators_of_videos():
    """Two words after a video of four frames precede the next image, which is not capped."""
    frame, words = [P, P, 5], [12, 13]
    video = [3, *frame, *frame, *frame, P, P, 4]
    cut = [5, P, P]  # the end of a row's part of a video: the next document begins behind it
    batch = batch_of([[0, *video, *words, 3, P, P, 4]], [cut, [0, 9, 3, P, P, 4]])
    objective = objective_of(DENSE, cap_before_caption=1e-3)
    time_BS = objective.prepare(batch, settings()).time_BS
    assert time_BS[0, 1:13].max() <= 1e-3 < time_BS[0, 17]
    assert time_BS[1, :3].max() <= 1e-3 < time_BS[1, 6]


def test_the_cap_bounds_shifted_times_too():
    shifted = Diffusion.Config(schedule="flow", shift=3.0)
    objective = objective_of(with_vectors(decoders.dense(SHAPE), diffusion=shifted))
    batch = batch_of([ALONE])
    times = [objective.prepare(batch, settings(step)).time_BS.max() for step in range(1, 50)]
    assert 0.4 < max(times) <= 0.5


def test_a_dropped_condition_begins_a_document_at_the_begin_sentinel():
    longer = [TWO, CAPTIONED, ALONE]  # so that the first row ends with padding
    objective, batch = objective_of(DENSE, drop_condition=0.3), batch_of([TWO, CAPTIONED], longer)
    dropped = torch.zeros(3)
    begins = [2, 8, len(TWO) + 3]  # of the three blocks
    for step in range(1, 300):
        noised = objective.prepare(batch, settings(step))
        place = places_in_documents(noised.document_BS)[0]
        for number, begin in enumerate(begins):
            dropped[number] += place[begin] == 0
        real = batch.document_BS[0] != 0
        assert (noised.document_BS[0][~real] == 0).all()
        # otherwise documents begin where they did
        starts = {0, len(TWO)} | {b for b in begins if place[b] == 0}
        assert {i for i in range(int(real.sum())) if place[i] == 0} == starts
    assert torch.allclose(dropped / 299, torch.full((3,), 0.3), atol=0.08)


# ---------------------------------------------------------------- losses


def test_each_loss_is_divided_by_its_own_count():
    objective, batch = objective_of(DENSE, drop_condition=0.0), batch_of([CAPTIONED, TWO, ALONE])
    model = built(DENSE)
    noised = objective.prepare(batch, settings())
    counts = objective.counts(batch)
    assert counts[COUNTED][0, :3].tolist() == [0, 16, 0] and counts[COUNTED].sum() == 16
    # no label is a vector or stands at one
    texts = sum(len(d) for d in (CAPTIONED, TWO, ALONE)) - 3 - 4 * 4 - 4
    assert counts[LABELS].sum() == texts and counts[LABELS][0, 1] == 0
    losses = model(noised, loss=objective.loss_of(noised))
    predicted = model(noised, loss=lambda x, w, *, predicted_TP, **_: predicted_TP)
    values = [
        DENSE.vectors.diffusion.build().values(p, noised.vectors_BSP.flatten(0, 1), t)
        for p, t in (
            (predicted, noised.time_BS.flatten()),
            (noised.target_BSP.flatten(0, 1), noised.time_BS.flatten()),
        )
    ]
    jit = objective_of(DENSE, drop_condition=0.0, loss_in="v")
    in_v = model(noised, loss=jit.loss_of(noised)).sums["diffusion_loss"].sum()
    has = batch.has_vector_BS.flatten()
    error = (values[0].v - values[1].v).square().mean(-1)[has].sum()
    torch.testing.assert_close(in_v, error.detach(), rtol=1e-5, atol=1e-5)
    error = (predicted - noised.target_BSP.flatten(0, 1)).square().mean(-1)[has].sum()
    torch.testing.assert_close(losses.sums["diffusion_loss"].sum(), error.detach())
    expected = losses.sums["loss"].sum() / texts + 5 * error / 16
    torch.testing.assert_close(losses.mean(counts), expected)
    minimised = objective.minimised(losses.sums, counts)
    torch.testing.assert_close(minimised.float(), expected.detach())


def test_a_perfect_prediction_has_no_error_in_any_space():
    batch = batch_of([CAPTIONED, TWO])
    for diffusion in (PAPER, JIT, Diffusion.Config(schedule="flow", predicts="v")):
        config = with_vectors(decoders.dense(SHAPE), diffusion=diffusion)
        for space in ("epsilon", "v", "x"):
            objective = objective_of(config, loss_in=space)
            noised = objective.prepare(batch, settings())
            loss = objective.loss_of(noised)
            head = torch.zeros(batch.tokens_BS.numel(), 4), torch.zeros(48, 4)
            found = loss(*head, predicted_TP=noised.target_BSP.flatten(0, 1))
            assert found.sums["diffusion_loss"].sum() == 0


def test_with_lambda_0_a_batch_of_text_gives_what_the_text_model_gives():
    """Outputs, losses and gradients, to the bit."""
    plain = decoders.dense(SHAPE)
    with_adapters = built(with_vectors(plain))
    text = plain.build()
    text.load_state_dict(
        {n: t for n, t in with_adapters.state_dict().items() if not n.startswith("vector_")}
    )
    batch = batch_of([[0, *range(5, 30), 1], [0, 9, 8, 7, 1]])
    chameleon = ChameleonObjective.Config(z_loss=0.0).build()
    objective = objective_of(with_adapters.config, diffusion_weight=0.0)
    counts = objective.counts(batch)
    noised = objective.prepare(batch, settings())
    with_adapters(noised, loss=objective.loss_of(noised)).mean(counts).backward()
    without = MixedBatch(
        **{n: t for n, t in batch.tensors().items() if n not in ("vectors_BSP", "has_vector_BS")}
    )
    text(without, loss=chameleon.loss_of(without)).mean(counts).backward()
    found = dict(with_adapters.named_parameters())
    for name, parameter in text.named_parameters():
        assert torch.equal(parameter.grad, found[name].grad), name
    assert all(p.grad is not None for p in found.values())


def test_lambda_0_leaves_only_the_language_model_s_gradients():
    """Also with images in the batch."""
    model, batch = built(DENSE), batch_of([CAPTIONED, TWO])
    objective = objective_of(DENSE, diffusion_weight=0.0)
    noised, counts = objective.prepare(batch, settings()), objective.counts(batch)
    losses = model(noised, loss=objective.loss_of(noised))
    losses.mean(counts).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    losses = model(noised, loss=objective.loss_of(noised))
    (losses.totals[LABELS] / counts[LABELS].sum()).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert torch.equal(parameter.grad, found[name]), name
        else:
            assert name.startswith("vector_output") and (found[name] == 0).all()


def test_discrete_and_continuous_media_in_one_vocabulary():
    """Utterances are codes, images are vectors: each has its own loss alone."""
    config = replace(
        with_vectors(decoders.moe_1t1i(replace(SHAPE, modalities=(0, 1, 2)))), modalities=(0, 1, 2)
    )
    model, objective = built(config), objective_of(config, drop_condition=0.0)
    codes = [0, 9, 5, *range(32, 40), 6, *IMAGE, 7, 1]
    batch = batch_of([codes])
    speech = (batch.tokens_BS >= 32) & (batch.tokens_BS < 40)
    batch.modality_BS[speech] = 2
    spoken = (batch.labels_BS >= 32) & (batch.labels_BS < 40)
    batch = replace(batch, label_modality_BS=spoken.to(torch.uint8) * 2)
    noised = objective.prepare(batch, settings())
    losses, counts = model(noised, loss=objective.loss_of(noised)), objective.counts(batch)
    # other tests may have registered more media
    assert counts[LABELS][0, :3].tolist() == [len(codes) - 1 - 5 - 8, 0, 8]
    assert counts[COUNTED][0, :3].tolist() == [0, 4, 0]
    assert (losses.sums["loss"][0, :3] > 0).tolist() == [True, False, True]
    assert (losses.sums["diffusion_loss"][0, :3] > 0).tolist() == [False, True, False]
    assert (noised.vectors_BSP[~batch.has_vector_BS] == 0).all()


# ---------------------------------------------------------------- who sees whom


@pytest.mark.parametrize("name", sorted(VECTORS.keys() - {"tf_p_mod", "tf_mod", "tf_moma"}))
def test_a_document_is_computed_alone_as_in_a_packed_row(name):
    config = VECTORS[name]()
    model = built(config).eval()
    read = {"loss": lambda x, w, *, predicted_TP, **_: (x, predicted_TP)}
    packed = batch_of([ALONE, TWO, CAPTIONED])
    packed.time_BS = packed.has_vector_BS * 0.3
    hidden, predicted = model(packed, **read)
    begin = len(ALONE)
    there = slice(begin, begin + len(TWO))
    part = {n: t[:, there] for n, t in packed.tensors().items()}
    alone = model(MixedBatch(**part), **read)
    torch.testing.assert_close(alone[0], hidden[there], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(alone[1], predicted[there], rtol=1e-4, atol=1e-5)


def test_changing_a_vector_moves_its_own_image_and_what_follows_alone():
    model = built(DENSE).eval()
    batch = batch_of([TWO])
    batch.time_BS = batch.has_vector_BS * 0.3
    read = {"loss": lambda x, w, **_: x}
    before = model(batch, **read)
    last = 2 + 4  # the last vector of the first image
    batch.vectors_BSP[0, last] += 1.0
    moved = (model(batch, **read) - before).abs().amax(-1) > 1e-6
    assert moved.tolist() == [False] * 3 + [True] * (len(TWO) - 3)
    batch.vectors_BSP[0, last] -= 1.0
    batch.vectors_BSP[0, 2 + 6 + 4] += 1.0  # of the second image
    moved = (model(batch, **read) - before).abs().amax(-1) > 1e-6
    assert moved.tolist() == [False] * 9 + [True] * (len(TWO) - 9)


def test_a_causal_model_sees_no_later_vector():
    config = with_vectors(decoders.dense(SHAPE), bidirectional=False)
    model = built(config).eval()
    batch = batch_of([CAPTIONED])
    read = {"loss": lambda x, w, **_: x}
    before = model(batch, **read)
    batch.vectors_BSP[0, 7] += 1.0
    moved = (model(batch, **read) - before).abs().amax(-1) > 1e-6
    assert moved.tolist() == [False] * 7 + [True] * (len(CAPTIONED) - 7)


def test_clean_copies_are_seen_in_place_of_noised_vectors():
    config = with_vectors(decoders.dense(SHAPE), later_see="clean")
    model, objective = built(config).eval(), objective_of(config, drop_condition=0.0)
    doubled = [0, 9, 8, 3, *[P] * 8, 4, 10, 1]
    batch = batch_of([doubled])
    batch.vectors_BSP[0, 8:12] = batch.vectors_BSP[0, 4:8]
    batch.span_BS[0, 8:12] = 2
    assert without_clean_copies(vector_spans(batch))[0].tolist() == [0] * 4 + [1] * 4 + [0] * 7
    noised = objective.prepare(batch, settings())
    assert torch.equal(noised.vectors_BSP[0, 8:12], batch.vectors_BSP[0, 8:12])
    assert not torch.isclose(noised.vectors_BSP[0, 4:8], batch.vectors_BSP[0, 4:8]).all()
    assert objective.counts(batch)[COUNTED].sum() == 4
    read = {"loss": lambda x, w, **_: x}
    before = model(noised, **read)
    noised.vectors_BSP[0, 5] += 1.0
    moved = (model(noised, **read) - before).abs().amax(-1) > 1e-6
    assert moved.tolist() == [False] * 4 + [True] * 4 + [False] * 7


# ---------------------------------------------------------------- adapters


def test_shared_positions_count_an_image_once():
    batch = batch_of([TWO, CAPTIONED])
    shared = with_shared_positions(batch).positions_BS[0].tolist()
    assert shared[: len(TWO)] == [0, 1, 2, 3, 3, 3, 3, 4, 5, 6, 6, 6, 6, 7, 8, 9]
    assert shared[len(TWO) :] == [0, 1, 2, 3, 4, 4, 4, 4, 5, 6, 7]


def test_patches_there_and_back():
    x = torch.randn(2, 3, 8, 8)
    grid = patched(x, 4)
    assert torch.equal(unpatched(grid, 4), x)
    # a patch is its rows of pixels, channels last
    assert torch.equal(grid[0, :, 0, 1], x[0, :, :4, 4:].permute(1, 2, 0).flatten())


def test_the_grid_puts_each_vector_into_its_image():
    batch = batch_of([TWO], [CAPTIONED])
    grid = Grid.build(batch, 4)
    vectors = batch.vectors_BSP.flatten(0, 1)
    images = grid.images(vectors)
    assert torch.equal(grid.tokens(images), vectors)
    first = batch.vectors_BSP[0, 3:7].T.reshape(WIDTH, 2, 2)
    assert any(torch.equal(image, first) for image in images)
    filled = images.flatten(1).abs().sum(1) > 0
    assert filled.sum() == 3
    # decoding text computes no image
    text = replace(batch, vectors_BSP=None, has_vector_BS=None)
    assert len(Grid.build(text, 4).images(vectors)) == 0


@pytest.mark.parametrize("name", sorted(VECTORS))
def test_parameters_config_and_gradients(name):
    config = VECTORS[name]()
    assert from_dict(to_dict(config)) == config
    model = built(config)
    assert count_parameters(config).total == sum(p.numel() for p in model.parameters())
    for rows in ([CAPTIONED, TWO], [[0, *range(5, 25), 1]]):  # with images, and without
        batch = batch_of(rows, rows)
        objective = objective_of(config)
        noised = objective.prepare(batch, settings())
        model.zero_grad()
        losses = model(noised, settings(), loss=objective.loss_of(noised))
        losses.mean(objective.counts(batch)).backward()
        missing = [n for n, p in model.named_parameters() if p.grad is None]
        assert missing == [] and losses.totals[LABELS] > 0


@pytest.mark.parametrize("name", ["tf_dense", "tf_paper", "tf_clean"])
def test_stages_of_a_pipeline_compute_what_the_whole_model_does(name):
    config = VECTORS[name]()
    objective = objective_of(config)
    noised = objective.prepare(batch_of([CAPTIONED, TWO], [ALONE]), settings())
    loss = objective.loss_of(noised)
    model, first, last = (built(config) for _ in range(3))
    blocks = len(config.layers)
    first.keep(range(1))
    last.keep(range(1, blocks))
    found = last(noised, loss=loss, x_TD=first(noised)).totals
    for count, total in model(noised, loss=loss).totals.items():
        assert torch.equal(found[count], total), count


def test_vectors_cost_what_the_adapters_compute():
    from torch.utils.flop_counter import FlopCounterMode

    batch = batch_of([CAPTIONED])
    # all different: equal times are embedded once
    batch.time_BS = torch.linspace(0, 1, batch.tokens_BS.numel()).view(batch.tokens_BS.shape)
    for adapter in ("linear", "unet"):
        config = with_vectors(decoders.dense(SHAPE), adapter=adapter)
        pair = VectorInput(config.vectors, SHAPE.dim), VectorOutput(config.vectors, SHAPE.dim)
        for module in pair:
            module.to_empty(device="cpu")
        with FlopCounterMode(display=False) as counter:
            x, skips = pair[0](torch.zeros(batch.tokens_BS.numel(), SHAPE.dim), batch)
            pair[1](x, skips)
        room = batch.tokens_BS.shape[1] // 4 + 1
        vectors = batch.tokens_BS.numel() if adapter == "linear" else room * 4
        counted = counter.get_total_flops() / vectors
        expected = config.vectors.flops(SHAPE.dim).forward
        # beside the formula: a U-Net's projections of the time, and the time at all positions
        least, most = (0.999, 1.001) if adapter == "linear" else (0.9, 1.6)
        assert least * expected <= counted <= most * expected
    text, image = forward_flops(config, 32)
    assert image - text == pytest.approx(config.vectors.flops(SHAPE.dim).forward)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"adapter": "unet", "block": 5}, "block"),
        ({"adapter": "unet", "channels": 5}, "channels"),
        ({"adapter": "unet", "bottleneck": 4}, "bottleneck"),
        ({"adapter": "unet", "features": 12}, "features"),
        ({"place_embedding": True, "block": 0}, "block"),
        ({"rotary": "none"}, "rotary"),
        ({"later_see": "both"}, "later_see"),
    ],
)
def test_adapters_refuse_what_cannot_be_by_name(fields, named):
    with pytest.raises(ValueError, match=named):
        VectorAdapters.Config(**{"width": 12, "block": 4, "channels": 3} | fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"diffusion_weight": -1.0},
        {"loss_in": "z"},
        {"times": "normal"},
        {"cap_before_caption": 0.0},
        {"drop_condition": 1.0},
        {"times_std": -1.0},
        {"times_mean": 0.8},
    ],
)
def test_the_objective_refuses_values_out_of_range_by_name(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        TransfusionObjective.Config(**fields)


def test_objective_and_model_must_agree():
    with pytest.raises(ValueError, match="TransfusionObjective"):
        ChameleonObjective.Config().build().for_model(DENSE)
    with pytest.raises(ValueError, match="vectors"):
        TransfusionObjective.Config().build().for_model(MODELS["dense"]())
