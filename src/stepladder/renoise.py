"""The one operation of all four papers: put a prediction back to a noise level, at any resolution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stepladder.prediction import Prediction
from stepladder.processes import Process, spread
from stepladder.resample import ResampleMode, noise_gain, resize

Randomness = torch.Generator | Sequence[torch.Generator] | None


def renoise(
    process: Process,
    prediction: Prediction,
    timestep: Tensor,
    size: tuple[int, ...],
    mix: float | Tensor,
    generator: Randomness = None,
    mode: ResampleMode = "bilinear",
    preserve_variance: bool = False,
) -> Tensor:
    """x_t = alpha_t U(x0) + sigma_t (mix U(eps) + sqrt(1 - mix²) xi), xi ~ N(0, I).

    RMD Eq. 4 is `mix = 0`, RMD Eq. 10 is `mix = alpha`, an Euler (DDIM) step is `mix = 1` at unchanged size.

    Args:
        process: gives alpha_t and sigma_t.
        prediction: x0 and eps of shape (B, C, …).
        timestep: where to renoise to; a scalar or (B,), in the timesteps of resolution `size`.
        size: latent size wanted, (H, W) or (T, H, W).
        mix: share of predicted noise, in [0, 1]; a number or (B,).
        generator: source of xi, one or one a sample; drawn only where some `mix` is below 1.
        mode: kernel of U.
        preserve_variance: divide U(eps) by the root of its known loss of variance, which the paper does not do.

    Returns:
        (B, C, *size), differentiable in the prediction.
    """
    # RMD Eq. 10
    x0 = prediction.x0
    noise, _ = mixed_noise(prediction.eps, size, mix, generator, mode, preserve_variance)
    return combine(process, resize(x0, size, mode), noise, timestep)


def combine(process: Process, x0: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    """The forward process: alpha_t x0 + sigma_t noise, at a scalar or (B,) timestep."""
    t = timestep.to(x0.device)
    return spread(process.alpha(t).to(x0.dtype), x0) * x0 + spread(process.sigma(t).to(x0.dtype), x0) * noise


def mixed_noise(
    eps: Tensor,
    size: tuple[int, ...],
    mix: float | Tensor,
    generator: Randomness = None,
    mode: ResampleMode = "bilinear",
    preserve_variance: bool = False,
) -> tuple[Tensor, Tensor]:
    """The noise of `renoise`, mix U(eps) + sqrt(1 - mix²) xi, and its fresh share xi (0 where every `mix` is 1)."""
    weight = torch.as_tensor(mix, dtype=eps.dtype)
    noise = fresh = torch.zeros((), dtype=eps.dtype, device=eps.device)
    if bool((weight > 0).any()):
        noise = spread(weight, eps).to(eps.device) * resize(eps, size, mode)
        if preserve_variance and tuple(eps.shape[2:]) != tuple(size):
            noise = noise / noise_gain(tuple(eps.shape[2:]), tuple(size), mode) ** 0.5
    if bool((weight < 1).any()):
        fresh = gaussian((*eps.shape[:2], *size), generator, eps)
        noise = noise + spread((1 - weight**2).sqrt(), eps).to(eps.device) * fresh
    return noise, fresh


def gaussian(shape: tuple[int, ...], generator: Randomness, like: Tensor) -> Tensor:
    """Standard normal noise of `shape` (B, …), drawn on the generator's device and moved to `like`'s.

    A sequence of B generators draws each sample from its own, so that a sample does not depend on its batch.
    """
    if generator is None or isinstance(generator, torch.Generator):
        device = generator.device if generator is not None else like.device
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(like.device, like.dtype)
    parts = [torch.randn(shape[1:], generator=each, device=each.device, dtype=torch.float32) for each in generator]
    return torch.stack(parts).to(like.device, like.dtype)
