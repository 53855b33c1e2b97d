"""Cascaded inference (RMD Algorithm 2): one flat function that sampling and the training roll-out both run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from stepladder.ladder import Ladder, Step
from stepladder.prediction import Prediction
from stepladder.processes import Process
from stepladder.renoise import Randomness, gaussian, renoise
from stepladder.resample import ResampleMode

Denoise = Callable[[Tensor, Tensor], Prediction]


def initial_noise(ladder: Ladder, batch: int, channels: int, generator: Randomness, like: Tensor) -> Tensor:
    """Gaussian noise at the ladder's first size, (B, C, …); a list of generators draws each sample from its own."""
    return gaussian((batch, channels, *ladder.steps[0].size), generator, like)


def derived_generators(noise: Tensor) -> list[torch.Generator]:
    """One generator a sample, seeded by the sample's own initial noise.

    Stock pipelines hand no generator to their scheduler's `step`; so seeded, the noise re-injected on the way follows from
    the user's seed there as it does here, and a sample does not depend on its batch.
    """
    digests = [hashlib.sha256(row.numpy().tobytes()).digest() for row in noise.detach().float().cpu().contiguous()]
    return [torch.Generator().manual_seed(int.from_bytes(digest[:7], "little")) for digest in digests]


def advance(
    process: Process,
    prediction: Prediction,
    step: Step,
    after: Step | None,
    generator: Randomness,
    mix: float = 1.0,
    mode: ResampleMode = "bilinear",
    preserve_variance: bool = False,
    mix_within: float = 1.0,
) -> Tensor:
    """From one step's prediction to the next step's state; x0 itself after the last.

    Where the resolution stays the share of predicted noise is `mix_within`: 1 is the ODE's step (RMD Algorithm 2 line 9),
    0 the stochastic multistep of DMD2 and SwD. Where it grows the share is `mix` (line 12, with alpha of appendix B).
    """
    if after is None:
        return prediction.x0
    share = mix_within if after.size == step.size else mix
    timestep = torch.tensor(after.timestep, device=prediction.x0.device)
    return renoise(process, prediction, timestep, after.size, share, generator, mode, preserve_variance)


def cascade(
    denoise: Denoise,
    process: Process,
    ladder: Ladder,
    noise: Tensor,
    generator: Randomness = None,
    mix: float = 1.0,
    mode: ResampleMode = "bilinear",
    preserve_variance: bool = False,
    mix_within: float = 1.0,
    until: int | None = None,
    watch: Callable[[int, Tensor, Prediction], None] | None = None,
) -> Tensor:
    """Climb the ladder from noise.

    Args:
        denoise: `(x, timestep) -> Prediction`, the network with its prompts and guidance bound.
        process: the forward process.
        ladder: the steps.
        noise: (B, C, *first size).
        generator: source of the noise re-injected where the resolution grows.
        mix: alpha of RMD Eq. 10 across a change of resolution (appendix B: 1.0 for images, 0.9 for Wan; 0 is Algorithm 2 as
            printed).
        mix_within: the same where the resolution stays: 1 is the ODE, 0 fresh noise at every step (DMD2, SwD).
        until: stop before this step and return the state that it would be given.
        watch: called with the index, the state and the prediction of every step taken.

    Returns:
        x0 at the ladder's final size, or with `until` the noisy state at that step's size.
    """
    # RMD Algorithm 2
    x = noise
    for index, step in enumerate(ladder.steps):
        if index == until:
            return x
        prediction = denoise(x, torch.tensor(step.timestep, device=x.device))
        if watch is not None:
            watch(index, x, prediction)
        after = ladder.steps[index + 1] if index + 1 < len(ladder.steps) else None
        x = advance(process, prediction, step, after, generator, mix, mode, preserve_variance, mix_within)
    return x
