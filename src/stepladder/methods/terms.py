"""Terms that any method can add: a GAN on the fake score's features, MMD on the frozen teacher's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from torch import Tensor

from stepladder.conditioning import Conditioning
from stepladder.ladder import Ladder
from stepladder.losses.adversarial import Discriminator, discriminator_loss, generator_loss
from stepladder.losses.discrepancy import Kernel, pooled, squared_mmd
from stepladder.processes import TIMESTEPS, Process
from stepladder.renoise import combine, gaussian
from stepladder.roles import Roles


def _interval(value: tuple[float, float]) -> tuple[float, float]:
    low, high = value
    if not 0 <= low <= high <= TIMESTEPS:
        raise ValueError(f"an interval of timesteps lies between 0 and {TIMESTEPS:.0f} and does not fall")
    return value


Timesteps = Annotated[tuple[float, float], AfterValidator(_interval)]


class GANTerm(BaseModel):
    """DMD2's adversarial term; the weights are those of the released code."""

    model_config = ConfigDict(extra="forbid")

    weight: float = Field(5e-3, gt=0, description="of the student's adversarial loss")
    discriminator_weight: float = Field(1e-2, gt=0, description="of the discriminator's loss, beside the fake score's own")
    timesteps: Timesteps = Field((0.0, 1000.0), description="images are noised to a timestep in this interval before features")


class MMDTerm(BaseModel):
    """SwD's term: MMD between features of generated and of real images, of the same prompt and the same noise."""

    model_config = ConfigDict(extra="forbid")

    weight: float = Field(1.0, gt=0)
    kernel: Kernel = "linear"
    bandwidth: float = Field(100.0, gt=0, description="of the rbf kernel")
    pool: Literal["image", "batch"] = Field("image", description="compare image by image, or the batch as one")
    timesteps: Timesteps = Field((0.0, 600.0), description="images are noised to a timestep in this interval; [0, 0] is none")


@dataclass(frozen=True)
class Ground:
    """What every term stands on: the networks, the model's process, ladder and channels, a batch's prompts, randomness."""

    roles: Roles
    process: Process
    ladder: Ladder
    channels: int
    conditioning: Conditioning
    generator: torch.Generator


def uniform(low: float, high: float, batch: int, generator: torch.Generator, like: Tensor) -> Tensor:
    """(B,) timesteps uniform in [low, high]."""
    return (low + (high - low) * torch.rand(batch, generator=generator)).to(like.device)


def noised_alike(
    process: Process, images: list[Tensor], timesteps: Timesteps, generator: torch.Generator
) -> tuple[list[Tensor], Tensor]:
    """Latents (B, C, …) of several kinds noised to the same random timesteps (B,) with the same noise."""
    first = images[0]
    timestep = uniform(*timesteps, len(first), generator, first)
    noise = gaussian(tuple(first.shape), generator, first)
    return [combine(process, each, noise, timestep) for each in images], timestep


def discriminator_term(term: GANTerm, head: Discriminator, ground: Ground, fake: Tensor, real: Tensor) -> Tensor:
    """What head and fake score learn: to tell the student's samples, (B, C, …), from images."""
    (real, fake), timestep = noised_alike(ground.process, [real, fake], term.timesteps, ground.generator)
    prompts = Conditioning.cat([ground.conditioning] * 2)
    both = ground.roles.fake_score.features(torch.cat([real, fake]), timestep.repeat(2), prompts)
    return term.discriminator_weight * discriminator_loss(*head(both).chunk(2))


def generator_term(term: GANTerm, head: Discriminator, ground: Ground, fake: Tensor) -> Tensor:
    """What the student learns from the discriminator; the gradient passes through the fake score and its head."""
    (state,), timestep = noised_alike(ground.process, [fake], term.timesteps, ground.generator)
    return term.weight * generator_loss(head(ground.roles.fake_score.features(state, timestep, ground.conditioning)))


def mmd_term(term: MMDTerm, ground: Ground, fake: Tensor, real: Tensor) -> Tensor:
    """SwD's L_MMD on the middle block of the frozen teacher; the gradient passes through the teacher to the sample."""
    (fake, real), timestep = noised_alike(ground.process, [fake, real], term.timesteps, ground.generator)
    seen = ground.roles.teacher.features(fake, timestep, ground.conditioning)
    with torch.no_grad():
        wanted = ground.roles.teacher.features(real, timestep, ground.conditioning)
    if term.pool == "batch":
        seen, wanted = pooled(seen), pooled(wanted)
    return term.weight * squared_mmd(wanted, seen, term.kernel, term.bandwidth).mean()
