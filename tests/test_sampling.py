"""The cascade against answers known in closed form: Gaussian and mixture data, whose exact denoiser can be written down."""

from __future__ import annotations

import pytest
import torch

from stepladder.ladder import build_ladder, full_resolution, spaced_timesteps
from stepladder.prediction import Prediction
from stepladder.processes import FlowProcess, VariancePreservingProcess
from stepladder.sampling import cascade, derived_generators, initial_noise

PROCESSES = [FlowProcess(), VariancePreservingProcess.linear()]


def gaussian_denoiser(process, mean, deviation):
    """E[x0 | x_t] for x0 ~ N(mean, deviation²), elementwise, and the noise that goes with it."""

    def denoise(x, timestep):
        alpha, sigma = process.alpha(timestep).to(x.dtype), process.sigma(timestep).to(x.dtype)
        x0 = mean + alpha * deviation**2 / (alpha**2 * deviation**2 + sigma**2) * (x - alpha * mean)
        return Prediction(x0, (x - alpha * x0) / sigma)

    return denoise


def mixture_denoiser(process, centres, deviation):
    """E[x0 | x_t] for an even mixture of N(centre, deviation²)."""

    def denoise(x, timestep):
        alpha, sigma = process.alpha(timestep).to(x.dtype), process.sigma(timestep).to(x.dtype)
        variance = alpha**2 * deviation**2 + sigma**2
        mu = torch.tensor(centres, dtype=x.dtype)
        gap = x[..., None] - alpha * mu
        weight = torch.softmax(-(gap**2) / (2 * variance), dim=-1)
        x0 = (weight * (mu + alpha * deviation**2 / variance * gap)).sum(-1)
        return Prediction(x0, (x - alpha * x0) / sigma)

    return denoise


@pytest.mark.parametrize("process", PROCESSES, ids=["flow", "vp"])
def test_many_ode_steps_give_the_data_distribution(process):
    mean, deviation = 0.7, 0.4
    noise = torch.randn(4000, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ladder = full_resolution(spaced_timesteps(400), (2, 2))
    x = cascade(gaussian_denoiser(process, mean, deviation), process, ladder, noise)
    assert x.mean().item() == pytest.approx(mean, abs=0.02)
    assert x.std().item() == pytest.approx(deviation, rel=0.03)


@pytest.mark.parametrize("process", PROCESSES, ids=["flow", "vp"])
def test_the_ode_maps_each_noise_to_its_quantile(process):
    """For one-dimensional data the probability-flow ODE is the monotone map between noise and data."""
    noise = torch.tensor([-1.5, -0.5, 0.0, 0.5, 1.5], dtype=torch.float64).reshape(5, 1, 1, 1)
    ladder = full_resolution(spaced_timesteps(800), (1, 1))
    x = cascade(gaussian_denoiser(process, 0.7, 0.4), process, ladder, noise)
    torch.testing.assert_close(x, 0.7 + 0.4 * noise, atol=2e-2, rtol=0)


@pytest.mark.parametrize("process", PROCESSES, ids=["flow", "vp"])
def test_the_ode_keeps_the_weights_of_a_mixture(process):
    noise = torch.randn(4000, 1, 1, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = cascade(mixture_denoiser(process, [-1.0, 1.0], 0.1), process, full_resolution(spaced_timesteps(300), (1, 1)), noise)
    assert (x > 0).double().mean().item() == pytest.approx(0.5, abs=0.03)
    assert (x.abs() - 1).abs().mean().item() == pytest.approx(0.1 * (2 / torch.pi) ** 0.5, abs=0.03)


@pytest.mark.parametrize("process", PROCESSES, ids=["flow", "vp"])
@pytest.mark.parametrize("mix", [0.0, 0.5, 1.0])
def test_two_steps_of_a_cascade_in_closed_form(process, mix):
    """Across the change of resolution the state has mean alpha U(x0) and the variance that renoise promises."""
    mean, deviation = 0.5, 0.3
    denoise = gaussian_denoiser(process, mean, deviation)
    ladder = build_ladder(process, (999.0, 400.0), [(4, 4), (8, 8)], [-2.5])
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(6000, 1, 4, 4, generator=generator)
    state = cascade(denoise, process, ladder, noise, generator, mix=mix, preserve_variance=True, until=1)
    first = denoise(noise, torch.tensor(ladder.steps[0].timestep))
    t = torch.tensor(400.0)
    assert state.shape[-2:] == (8, 8)
    assert state.mean().item() == pytest.approx((process.alpha(t) * first.x0.mean()).item(), abs=0.02)
    expected = process.sigma(t).item()
    assert state.std().item() == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("shift", ["none", "exact"])
@pytest.mark.parametrize("process", PROCESSES, ids=["flow", "vp"])
def test_the_law_after_a_change_of_resolution_in_closed_form(process, shift):
    """Pictures of one random constant L ~ N(0.7, 0.4²): U keeps constants, so the final law follows with pen and paper.

    At the change the state becomes alpha E[L | y] + sigma xi; the fine ODE then maps quantiles to quantiles.
    """

    def level_law(timestep, pixels):
        t = torch.tensor(timestep, dtype=torch.float64)
        return process.alpha(t).item() ** 2, process.sigma(t).item() ** 2 / pixels

    def denoise(x, timestep):
        alpha, sigma = process.alpha(timestep).to(x.dtype), process.sigma(timestep).to(x.dtype)
        level = x.mean(dim=(1, 2, 3), keepdim=True)
        gain = alpha * 0.16 / (alpha**2 * 0.16 + sigma**2 / x[0].numel())
        x0 = (0.7 + gain * (level - alpha * 0.7)).expand_as(x)
        return Prediction(x0, (x - alpha * x0) / sigma)

    ladder = build_ladder(process, spaced_timesteps(300), [(2, 2), (4, 4)], [-1.0], shift=shift)
    last, first = ladder.steps[ladder.steps_of(0)[-1]], ladder.steps[ladder.steps_of(1)[0]]
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(6000, 1, 2, 2, generator=generator, dtype=torch.float64)
    x = cascade(denoise, process, ladder, noise, generator, mix=0.0)
    signal, floor = level_law(last.timestep, 4)
    known = signal * 0.16**2 / (signal * 0.16 + floor)
    signal, floor = level_law(first.timestep, 16)
    expected = 0.4 * ((signal * known + floor) / (signal * 0.16 + floor)) ** 0.5
    assert x.shape[-1] == 4
    assert x.mean().item() == pytest.approx(0.7, abs=0.03)
    assert x.mean(dim=(1, 2, 3)).std().item() == pytest.approx(expected, rel=0.04)
    assert expected < 0.39


def test_until_gives_the_state_the_step_would_see():
    process = FlowProcess()
    denoise = gaussian_denoiser(process, 0.0, 1.0)
    ladder = build_ladder(process, spaced_timesteps(4, 3.0), [(4, 4), (8, 8)], [-2.5])
    noise = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    seen = []
    cascade(denoise, process, ladder, noise, torch.Generator().manual_seed(9), mix=0.3, watch=lambda i, x, p: seen.append(x))
    for index in range(4):
        state = cascade(denoise, process, ladder, noise, torch.Generator().manual_seed(9), mix=0.3, until=index)
        torch.testing.assert_close(state, seen[index])


def test_a_sample_does_not_depend_on_its_batch():
    process = FlowProcess()
    denoise = gaussian_denoiser(process, 0.0, 1.0)
    ladder = build_ladder(process, spaced_timesteps(4, 3.0), [(4, 4), (8, 8)], [-2.5])
    seeds = [torch.Generator().manual_seed(seed) for seed in (5, 6, 7)]
    noise = initial_noise(ladder, 3, 1, seeds, torch.zeros(1))
    together = cascade(denoise, process, ladder, noise, derived_generators(noise), mix=0.2)
    alone = cascade(denoise, process, ladder, noise[1:2], derived_generators(noise[1:2]), mix=0.2)
    torch.testing.assert_close(together[1:2], alone)
