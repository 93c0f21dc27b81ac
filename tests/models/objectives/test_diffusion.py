"""Diffusion: schedules, targets and steps of samplers equal those of diffusers, conversions between
targets are exact, and a perfect model recovers its image by every sampler.
"""

import itertools

import pytest
import torch

from earlyfuse.models.generate.denoising import Denoising, denoise, noise
from earlyfuse.models.objectives.diffusion import METHODS, Diffusion

SCHEDULES = (
    {"schedule": "cosine"},
    {"schedule": "flow"},
    {"schedule": "flow", "shift": 3.0},
)
TARGETS = ("epsilon", "v", "x")
KINDS = [s | {"predicts": target} for s, target in itertools.product(SCHEDULES, TARGETS)]
SHAPE = (2, 3, 5)


def built(**fields) -> Diffusion:
    return Diffusion.Config(**fields).build()


def normal(seed: int = 0, shape=SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def at(time: float) -> torch.Tensor:
    return torch.full(SHAPE[:-1], time)


def close(found, expected, atol=1e-5):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=atol)


# ---------------------------------------------------------------- diffusers


def theirs(name: str, **options):
    schedulers = pytest.importorskip("diffusers.schedulers")
    return getattr(schedulers, name)(**options)


COSINE = {"beta_schedule": "squaredcos_cap_v2"}
THEIR_TARGETS = {"epsilon": "epsilon", "v": "v_prediction", "x": "sample"}


@pytest.mark.parametrize("steps", [2, 10, 1000])
def test_alphas_of_the_cosine_schedule_are_theirs(steps):
    alphas = theirs("DDIMScheduler", num_train_timesteps=steps, **COSINE).alphas_cumprod
    alpha, sigma, _, _ = built(steps=steps).coefficients(torch.arange(steps + 1) / steps)
    assert (alpha[0], sigma[0]) == (1, 0)
    torch.testing.assert_close(alpha[1:], alphas.sqrt(), rtol=2e-3, atol=1e-6)
    torch.testing.assert_close(sigma[1:], (1 - alphas).sqrt(), rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("clips", [0.0, 0.5])
@pytest.mark.parametrize("step", [980, 500, 20])
def test_a_step_of_ddim_is_theirs(target, clips, step):
    options = {"clip_sample": bool(clips), "clip_sample_range": clips} | COSINE
    scheduler = theirs("DDIMScheduler", prediction_type=THEIR_TARGETS[target], **options)
    scheduler.set_timesteps(50)  # strides of 20 steps; theirs count from 0
    predicted, z = normal(1), normal(2)
    theirs_z, theirs_x = scheduler.step(
        predicted, step - 1, z, use_clipped_model_output=True, return_dict=False
    )
    ours = built(predicts=target, data_range=clips)
    time, to = torch.tensor(step / 1000), torch.tensor((step - 20) / 1000)
    values = ours.clipped(ours.values(predicted, z, at(step / 1000)), z, at(step / 1000))
    close(values.x, theirs_x, atol=1e-4)
    for method in ("ddim", "euler"):
        close(ours.step(values, z, time, to, method), theirs_z, atol=1e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_times_and_steps_of_flow_are_theirs(shift):
    ours, count = built(schedule="flow", predicts="v", shift=shift), 7
    grid = ours.grid(count, "euler")
    euler = theirs("FlowMatchEulerDiscreteScheduler", shift=shift)
    euler.set_timesteps(sigmas=[1 - n / count for n in range(count)])
    close(grid, euler.sigmas)
    z = mine = normal(1)
    for number, time in enumerate(euler.timesteps):
        predicted = normal(number + 5)
        z = euler.step(predicted, time, z, return_dict=False)[0]
        values = ours.values(predicted, mine, at(float(grid[number])))
        mine = ours.step(values, mine, *grid[number : number + 2], "euler")
        close(mine, z)


def test_a_step_of_heun_on_flow_is_theirs():
    ours, count = built(schedule="flow", predicts="v"), 5
    heun = theirs("FlowMatchHeunDiscreteScheduler")
    heun.set_timesteps(count)
    z, first, second = normal(1), normal(2), normal(3)
    moved = heun.step(first, heun.timesteps[0], z, return_dict=False)[0]
    expected = heun.step(second, heun.timesteps[1], moved, return_dict=False)[0]
    time, to = heun.sigmas[0], heun.sigmas[1]
    ours_moved = ours.step(ours.values(first, z, at(float(time))), z, time, to, "heun")
    close(ours_moved, moved)
    again = ours.values(second, ours_moved, at(float(to)))
    close((ours_moved + ours.step(again, z, time, to, "heun")) / 2, expected)


def test_steps_of_euler_and_heun_on_the_cosine_schedule_are_theirs():
    """In their space a sample is z / α and its noise σ / α."""
    ours, z, first, second = built(), normal(1), normal(2), normal(3)
    time, to = torch.tensor(0.7), torch.tensor(0.4)
    (alpha, sigma, _, _), (alpha_to, sigma_to, _, _) = map(ours.coefficients, (time, to))
    moved = ours.step(ours.values(first, z, at(0.7)), z, time, to, "heun")
    again = ours.values(second, moved, at(0.4))
    found = (moved + ours.step(again, z, time, to, "heun")) / 2

    def begun(name):
        scheduler = theirs(name, **COSINE)
        scheduler.set_timesteps(2)
        return scheduler, sigma / alpha, sigma_to / alpha_to

    euler, before, after = begun("EulerDiscreteScheduler")
    euler.sigmas = torch.stack([before, after, torch.tensor(0.0)])
    stepped = euler.step(first, euler.timesteps[0], z / alpha, return_dict=False)[0]
    close(moved / alpha_to, stepped)
    heun, _, _ = begun("HeunDiscreteScheduler")
    heun.sigmas = torch.stack([before, after, after, torch.tensor(0.0)])
    stepped = heun.step(first, heun.timesteps[0], z / alpha, return_dict=False)[0]
    stepped = heun.step(second, heun.timesteps[1], stepped, return_dict=False)[0]
    close(found / alpha_to, stepped)


def test_noised_vectors_and_velocities_are_theirs():
    scheduler, x, epsilon = theirs("DDPMScheduler", **COSINE), normal(1), normal(2)
    for step in (1, 500, 1000):
        number, time = torch.full(SHAPE[:1], step - 1), at(step / 1000)
        close(built().noised(x, epsilon, time), scheduler.add_noise(x, epsilon, number))
        velocity = scheduler.get_velocity(x, epsilon, number)
        close(built(predicts="v").target(x, epsilon, time), velocity)


# ---------------------------------------------------------------- targets


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("time", [0.02, 0.3, 0.6, 0.95])
def test_each_target_follows_from_each_other(kind, time):
    diffusion, x, epsilon = built(**kind), normal(1), normal(2)
    z = diffusion.noised(x, epsilon, at(time))
    values = diffusion.values(diffusion.target(x, epsilon, at(time)), z, at(time))
    close(values.x, x, atol=1e-4)
    close(values.epsilon, epsilon, atol=1e-4)
    others = [built(**kind | {"predicts": target}) for target in TARGETS]
    targets = [other.target(x, epsilon, at(time)) for other in others]
    for found, expected in zip((values.epsilon, values.v, values.x), targets, strict=True):
        close(found, expected, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_both_ends_of_time_are_finite(kind):
    diffusion = built(**kind)
    for time in (0.0, 1.0):
        values = diffusion.values(normal(1), normal(2), at(time))
        assert all(value.isfinite().all() for value in values)


def test_predicting_x_with_the_loss_on_v_is_jits_formula():
    """v = (x - z) / max(1 - t, 0.05), t from noise to data (arXiv 2511.13720)."""
    diffusion = built(schedule="flow", predicts="x", min_denominator=0.05)
    predicted, z = normal(1), normal(2)
    for time in (0.0, 0.01, 0.05, 0.3, 1.0):
        theirs_v = (predicted - z) / max(time, 0.05)
        close(-diffusion.values(predicted, z, at(time)).v, theirs_v)


def test_times_of_training_are_steps_or_shifted():
    uniform = torch.tensor([1e-6, 0.25, 0.5, 1 - 1e-7])
    assert built(steps=4).times(uniform).tolist() == [0.25, 0.5, 0.75, 1.0]
    shifted = built(schedule="flow", shift=3.0).times(uniform)
    close(shifted, 3 * uniform / (1 + 2 * uniform))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_times_of_a_sampler_descend_from_noise_to_the_data(kind, method):
    diffusion = built(**kind)
    grid = diffusion.grid(10, method)
    assert grid.shape == (11,) and grid[-1] == 0 and (grid.diff() < 0).all()
    divides = kind["predicts"] == "epsilon" or (kind["schedule"], method) == ("cosine", "heun")
    assert grid[0] == pytest.approx(0.98 if divides else 1.0)
    if kind["schedule"] == "cosine":
        close(grid * 1000, (grid * 1000).round())


# ---------------------------------------------------------------- samplers


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("steps", [1, 2, 20])
def test_a_perfect_model_recovers_its_image_whatever_it_predicts(method, steps):
    image = normal(3)

    def sampled(kind):
        diffusion = built(**kind)

        def predict(z, time):
            # what noise must have been added to the image
            alpha, sigma, _, _ = diffusion.coefficients(time)
            return diffusion.target(image, (z - alpha * image) / sigma, at(float(time)))

        return denoise(predict, normal(4), diffusion, Denoising(steps, method))

    for kind in KINDS:
        close(sampled(kind), image, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_targets_of_one_model_give_one_sample(method):
    """A model that does not know the image, but what it believes does not depend on the target."""

    def sampled(kind, steps):
        diffusion = built(**kind)

        def predict(z, time):
            alpha, sigma, _, _ = diffusion.coefficients(time)
            x = (0.5 * z).tanh()
            return diffusion.target(x, (z - alpha * x) / sigma, at(float(time)))

        return denoise(predict, normal(4), diffusion, Denoising(steps, method))

    for schedule in SCHEDULES:
        by_v, by_x = (sampled(schedule | {"predicts": target}, 20) for target in ("v", "x"))
        close(by_v, by_x, atol=1e-4)
        by_epsilon = sampled(schedule | {"predicts": "epsilon"}, 400)
        close(by_epsilon, sampled(schedule | {"predicts": "x"}, 400), atol=0.05)


def test_heun_is_of_second_order():
    """Of data from a normal distribution of standard deviation s the exact result is s · noise."""
    s, diffusion = 0.5, built(schedule="flow", predicts="v")

    def predict(z, time):
        alpha, sigma, _, _ = diffusion.coefficients(time)
        x = z * alpha * s**2 / (alpha**2 * s**2 + sigma**2)
        return (z - x) / sigma if sigma else -x

    def error(method, steps):
        found = denoise(predict, normal(4), diffusion, Denoising(steps, method))
        return float((found - s * normal(4)).abs().mean())

    assert error("heun", 20) < 0.2 * error("euler", 20)
    assert error("euler", 40) < 0.6 * error("euler", 20)


def test_predictions_are_clipped_to_the_range_of_data():
    diffusion = built(schedule="flow", predicts="x", data_range=1.0)
    found = denoise(lambda z, time: 3 * z, normal(4), diffusion, Denoising(5))
    assert found.abs().max() == 1


def test_noise_is_a_function_of_seed_and_number():
    shape, device = (40, 50), torch.device("cpu")
    both = noise([7, 8], [0, 1], shape, device)
    assert torch.equal(both[1:], noise([8], [1], shape, device))
    others = torch.cat([both, noise([7, 8], [1, 0], shape, device)])
    assert len({float(one.sum()) for one in others}) == 4
    assert others.mean().abs() < 0.05 and (others.std() - 1).abs() < 0.05


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"steps": 0}, r"steps \(0\) of denoising must be at least 1"),
        ({"method": "magic"}, r"method \('magic'\) must be"),
        ({"guided_until": 1.5}, r"guided_until \(1.5\)"),
    ],
)
def test_impossible_denoising_is_refused(fields, rule):
    with pytest.raises(ValueError, match=rule):
        Denoising(**fields)


def test_options_of_the_other_schedule_are_refused():
    with pytest.raises(ValueError, match=r'steps \(500\) needs schedule "cosine"'):
        built(schedule="flow", steps=500)
    with pytest.raises(ValueError, match=r'shift \(2.0\) needs schedule "flow"'):
        built(schedule="cosine", shift=2.0)


def test_more_steps_than_the_schedule_has_are_refused():
    built(steps=100, predicts="v").grid(100, "ddim")
    for fields, most in (({"predicts": "v"}, 100), ({"predicts": "epsilon"}, 98)):
        with pytest.raises(ValueError, match=rf"steps \(101\) must lie in \[1, {most}\]"):
            built(steps=100, **fields).grid(101, "ddim")
