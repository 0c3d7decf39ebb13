"""What each family makes of its network's output, against the definition of the output and against diffusers."""

from __future__ import annotations

import pytest
import torch
from analytic import SHAPE, levels_of, perfect_of, small_of, vp_levels
from diffusers import CMStochasticIterativeScheduler
from torch import Tensor, nn

from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.families.consistency import ConsistencyModel
from diffdefend_core.diffusion.families.flow import RectifiedFlow
from diffdefend_core.diffusion.families.ldm import LatentDiffusion
from diffdefend_core.diffusion.families.ncsn import NCSN
from diffdefend_core.diffusion.levels import Levels, karras_sigmas

T = torch.tensor([0, 40, 80, 99])


def rows(seed: int = 0, shape: tuple[int, int, int] = SHAPE) -> tuple[Tensor, Tensor]:
    """Return known clean data and noise for four rows, in float64."""
    x0, eps = torch.randn(2, 4, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x0, eps


class Answers(nn.Module):
    """Answers what it was told, and remembers what it was given."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = nn.Parameter(answer)
        self.given: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.given.append((x, t))
        return self.answer


def test_a_score_becomes_noise() -> None:
    levels = levels_of("ve")
    x0, eps = rows()
    _, sigma = levels.at(T, x0)
    denoiser = NCSN(Answers(-eps / sigma), levels, shape=SHAPE)
    x = denoiser.diffuse(x0, T, eps)
    torch.testing.assert_close(denoiser.noise(x, T), eps)
    torch.testing.assert_close(denoiser.x0(x, T), x0)
    assert torch.equal(denoiser.network.given[0][0], x)
    assert (denoiser.family, denoiser.process, denoiser.value_range) == ("ncsn", "ve", (0.0, 1.0))


def test_the_error_of_a_score_is_the_same_at_every_noise() -> None:
    levels = levels_of("ve")
    x0, eps = rows()
    _, sigma = levels.at(T, x0)
    denoiser = NCSN(Answers(-(eps + 0.3) / sigma), levels, shape=SHAPE)
    error = denoiser.error(denoiser.diffuse(x0, T, eps), T, eps, x0)
    torch.testing.assert_close(error, torch.full_like(error, 0.3))


def test_a_velocity_becomes_noise_and_clean_data_also_where_nothing_is_left_of_the_data() -> None:
    levels = levels_of("flow")
    assert levels.alpha[99] == 0 and levels.sigma[99] == 1
    x0, eps = rows()
    denoiser = RectifiedFlow(Answers(eps - x0), levels, shape=SHAPE)
    x = denoiser.diffuse(x0, T, eps)
    torch.testing.assert_close(x[3], eps[3])
    torch.testing.assert_close(denoiser.noise(x, T), eps)
    torch.testing.assert_close(denoiser.x0(x, T), x0)
    assert (denoiser.family, denoiser.process) == ("flow", "flow")


def test_the_error_of_a_velocity_sees_the_clean_data_where_the_noise_does_not() -> None:
    x0, eps = rows()
    denoiser = RectifiedFlow(Answers(eps - x0 - 0.5), levels_of("flow"), shape=SHAPE)
    x = denoiser.diffuse(x0, T, eps)
    torch.testing.assert_close(denoiser.error(x, T, eps, x0), torch.full_like(x0, -0.5))
    torch.testing.assert_close(denoiser.noise(x, T)[3], eps[3])


def consistency(sigma_data: float) -> ConsistencyModel:
    levels = Levels.variance_exploding(karras_sigmas(40))
    return ConsistencyModel(Answers(rows(1)[0]), levels, shape=SHAPE, sigma_data=sigma_data)


@pytest.mark.parametrize("sigma_data", [0.5, 0.7])
def test_a_consistency_model_scales_as_that_of_diffusers(sigma_data: float) -> None:
    denoiser, t = consistency(sigma_data), torch.tensor([0, 10, 25, 39])
    scheduler = CMStochasticIterativeScheduler(num_train_timesteps=40, sigma_data=sigma_data)
    sigma = denoiser.levels.sigma[t]
    skip, out = scheduler.get_scalings_for_boundary_condition(sigma)
    x = 20 * rows()[0]
    expected = skip.view(-1, 1, 1, 1) * x + out.view(-1, 1, 1, 1) * denoiser.network.answer
    torch.testing.assert_close(denoiser.x0(x, t), expected)
    scheduler.set_timesteps(num_inference_steps=40)  # from the noisiest down
    for row, level in enumerate(t.tolist()):
        timestep = scheduler.timesteps[39 - level]
        scheduler._step_index = None
        torch.testing.assert_close(
            denoiser.network.given[0][0][row],
            scheduler.scale_model_input(x[row], timestep).double(),
            rtol=1e-5,
            atol=1e-6,
        )


def test_a_consistency_model_leaves_the_first_level_as_it_is_and_nothing_above() -> None:
    denoiser, x = consistency(0.5), rows()[0]
    assert torch.equal(denoiser.x0(x, torch.zeros(4, dtype=torch.int64)), x)
    assert not denoiser.noise(x, torch.zeros(4, dtype=torch.int64)).any()
    assert not torch.allclose(denoiser.x0(x, torch.full((4,), 5)), x, atol=1e-3)
    assert (denoiser.family, denoiser.process, denoiser.levels.kind) == ("consistency", "consistency", "ve")


def test_the_noise_of_a_consistency_model_is_what_its_end_leaves() -> None:
    denoiser, x, t = consistency(0.5), rows()[0], torch.tensor([3, 10, 25, 39])
    _, sigma = denoiser.levels.at(t, x)
    torch.testing.assert_close(denoiser.x0(x, t) + sigma * denoiser.noise(x, t), x)


def test_the_error_of_a_consistency_model_is_that_of_its_network() -> None:
    # the weight of EDM: with the network off by .1 the error is .1, where the boundary condition does not bind
    x0, eps = rows()
    denoiser, t = consistency(0.5), torch.tensor([20, 25, 30, 39])
    right = denoiser.error(denoiser.diffuse(x0, t, eps), t, eps, x0)
    with torch.no_grad():
        denoiser.network.answer += 0.1
    moved = denoiser.error(denoiser.diffuse(x0, t, eps), t, eps, x0) - right
    torch.testing.assert_close(moved, torch.full_like(moved, 0.1), rtol=0.02, atol=0)


class Rearranges:
    """An exact autoencoder: every 2 x 2 pixels become 4 channels, times `gain`."""

    def __init__(self, gain: float) -> None:
        self.gain = gain

    def encode(self, pictures: Tensor) -> Tensor:
        return nn.functional.pixel_unshuffle(pictures, 2) * self.gain

    def decode(self, latents: Tensor) -> Tensor:
        return nn.functional.pixel_shuffle(latents / self.gain, 2)


def latent(scale: float, gain: float = 8.0) -> LatentDiffusion:
    network = Answers(torch.zeros(4, 4, 4, 4))
    return LatentDiffusion(
        network, vp_levels(), Rearranges(gain), shape=(4, 4, 4), picture_shape=(1, 8, 8), scaling_factor=scale
    )


def test_latents_are_encoded_times_the_scale_and_decoded_without() -> None:
    denoiser, pictures = latent(0.125), rows()[0].clamp(-1, 1)
    latents = denoiser.encode(pictures)
    torch.testing.assert_close(latents, nn.functional.pixel_unshuffle(pictures, 2))
    torch.testing.assert_close(denoiser.decode(latents), pictures)
    torch.testing.assert_close(denoiser.pictures(latents), (pictures + 1) / 2)
    assert not torch.allclose(latent(0.25).decode(latents), pictures)


def test_a_latent_model_has_pictures_of_another_shape_and_no_bounds() -> None:
    denoiser = latent(1.0)
    assert (denoiser.shape, denoiser.picture_shape, denoiser.clean_range) == ((4, 4, 4), (1, 8, 8), None)
    assert (denoiser.family, denoiser.process) == ("ldm", "vp")
    pixels = small_of("vp")
    assert (pixels.picture_shape, pixels.clean_range) == (pixels.shape, pixels.value_range)


def test_a_clone_of_a_latent_model_trains_the_network_alone() -> None:
    denoiser = latent(1.0)
    twin = denoiser.clone()
    assert twin.autoencoder is denoiser.autoencoder and twin.network is not denoiser.network
    assert not any(parameter.requires_grad for parameter in twin.freeze().network.parameters())
    assert all(parameter.requires_grad for parameter in denoiser.network.parameters())


@pytest.mark.parametrize("process", ["vp", "ve", "flow"])
def test_the_perfect_network_of_a_family_answers_the_mean_of_the_clean_data(process: str) -> None:
    # E[x0 | x_t] of N(.2, .25) data: the mean, plus the covariance times what is above the mean
    denoiser: Denoiser = perfect_of(process, mean=0.2)
    x = denoiser.diffuse(*(part.float() for part in (rows()[0],)), T, rows()[1].float())
    alpha, sigma = denoiser.levels.at(T, x)
    expected = 0.2 + alpha * 0.25 / (alpha**2 * 0.25 + sigma**2) * (x - alpha * 0.2)
    torch.testing.assert_close(denoiser.x0(x, T), expected, rtol=1e-3, atol=2e-3)
