"""What all methods share: a batch, a roll-out's sample, and the terms that any of them can add."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from stepladder.conditioning import Conditioning
from stepladder.errors import UserError
from stepladder.ladder import Ladder
from stepladder.losses.adversarial import Discriminator
from stepladder.methods.cold_start import ColdStart, biased
from stepladder.methods.reinforcement import RLTerm, dpo_term, grpo_term, refl_term
from stepladder.methods.terms import GANTerm, Ground, MMDTerm, discriminator_term, generator_term, mmd_term
from stepladder.prediction import Prediction
from stepladder.processes import Process
from stepladder.resample import resize
from stepladder.roles import Roles, bound
from stepladder.sampling import cascade, initial_noise


@dataclass(frozen=True)
class Setting:
    """What a method knows of the model: its ladder and process, channels of latents, width of the middle block's features."""

    ladder: Ladder
    process: Process
    channels: int
    feature_width: int


@dataclass(frozen=True)
class Batch:
    """Prompts of one update, B of them, and the images that belong to them.

    images: a latent size, (H, W) or (T, H, W), to latents (B, C, *size) of the images shrunk in pixel space and encoded;
    None where a run has no images · score: final latents (k B, C, …) of the prompts, k times over, to rewards (k B,), with
    their graph; None where a run has no rewards.
    """

    conditioning: Conditioning
    unconditional: Conditioning
    images: Callable[[tuple[int, ...]], Tensor] | None = None
    score: Callable[[Tensor], Tensor] | None = None

    @property
    def device(self) -> torch.device:
        """Where the batch lies."""
        return self.conditioning.like.device

    def real(self, size: tuple[int, ...]) -> Tensor:
        """Latents of the batch's images at a latent size."""
        if self.images is None:
            raise UserError("this method needs images: make some with stepladder synthesize and set data.images")
        return self.images(size)


@dataclass(frozen=True)
class Sample:
    """What one roll-out yields.

    x0: (B, C, …), the student's clean sample, with its graph, at the size it is matched at · x: the same renoised to
    `timestep`, (B,), with its graph · stage: of the ladder · update: of the student, at which it was drawn · weight: (B,),
    importance of each sample to the fake score.
    """

    x0: Tensor
    x: Tensor
    timestep: Tensor
    stage: int
    conditioning: Conditioning
    update: int
    weight: Tensor | None = None


class MethodConfig(BaseModel):
    """Settings that every method has."""

    model_config = ConfigDict(extra="forbid")

    guidance_scale: float = Field(4.5, ge=1, description="classifier-free guidance on the real score")
    fake_updates: int = Field(1, ge=1, description="fake-score updates for each student update")
    matching_weight: float = Field(1.0, ge=0, description="weight of distribution matching; 0 leaves the other terms alone")
    gan: GANTerm | None = Field(None, description="adversarial term on the fake score's features; needs data.images")
    mmd: MMDTerm | None = Field(None, description="MMD term on the frozen teacher's features; needs data.images")
    cold_start: ColdStart | None = Field(None, description="DMDR's cold start: a real score that leans, biased renoise times")
    rl: RLTerm | None = Field(None, description="reinforcement learning beside the distillation, or alone (DMDR)")

    @model_validator(mode="after")
    def _some_term(self) -> MethodConfig:
        if not self.matching_weight and self.gan is None and self.mmd is None and self.rl is None:
            raise ValueError("matching_weight is 0 and there is neither gan, mmd nor rl: nothing would be learned; add a term")
        if not self.matching_weight and self.gan is None and self.mmd is None and self.cold_start is not None:
            raise ValueError(
                "matching_weight is 0 and rewards begin after the cold start: nothing is learned until then; drop cold_start"
            )
        return self

    def sampler_options(self) -> dict[str, Any]:
        """What `cascade` needs to sample as in training."""
        raise NotImplementedError

    @property
    def rl_begins(self) -> int:
        """The update at which reinforcement learning begins: the cold start's end."""
        return self.cold_start.updates if self.cold_start is not None else 0


class Method(ABC):
    """An objective: how the student is rolled out, and what it and the fake score then learn from the sample."""

    Config: ClassVar[type[MethodConfig]]

    def __init__(self, config: Any, setting: Setting) -> None:
        self.config = config
        self.ladder = setting.ladder
        self.process = setting.process
        self.channels = setting.channels
        self.head = Discriminator(setting.feature_width) if config.gan is not None else None
        if config.rl is not None and config.rl.algorithm == "grpo" and len(self.ladder.steps) < 2:
            raise UserError("grpo makes steps more or less probable, and the last has no noise: give the ladder at least two steps")

    @classmethod
    def wants_images(cls, config: MethodConfig) -> bool:
        """Whether the method's terms need real or teacher-made images."""
        return config.gan is not None or config.mmd is not None

    @property
    def trains_fake_score(self) -> bool:
        """Whether some term needs a fake score; MMD alone does not."""
        return self.config.matching_weight > 0 or self.config.gan is not None

    def distils_at(self, update: int) -> bool:
        """Whether the student still learns from the teacher, which it does not once rewards are alone."""
        term = self.config.rl
        return term is None or not term.alone or update < self.config.rl_begins

    @abstractmethod
    def roll_out(self, roles: Roles, batch: Batch, update: int, generator: torch.Generator) -> Sample:
        """Let the student make the sample that this update learns from."""

    @abstractmethod
    def fake_score_matching(self, roles: Roles, sample: Sample, generator: torch.Generator) -> Tensor:
        """How well the fake score knows the student's samples; a scalar."""

    @abstractmethod
    def student_matching(self, sample: Sample, fake: Prediction, real: Prediction) -> Tensor:
        """What moves the student's distribution towards the teacher's, from both scores at the renoised sample; a scalar."""

    def fake_score_loss(self, roles: Roles, sample: Sample, batch: Batch, generator: torch.Generator) -> Tensor:
        """All that the fake score (and the discriminator's head) learns from."""
        loss = self.fake_score_matching(roles, sample, generator)
        if self.head is not None:
            ground, real = self._ground(roles, batch, generator), batch.real(tuple(sample.x0.shape[2:]))
            loss = loss + discriminator_term(self.config.gan, self.head, ground, sample.x0.detach(), real)
        return loss

    def _ground(self, roles: Roles, batch: Batch, generator: torch.Generator) -> Ground:
        return Ground(roles, self.process, self.ladder, self.channels, batch.conditioning, generator)

    def student_loss(self, roles: Roles, sample: Sample, batch: Batch, generator: torch.Generator) -> Tensor:
        """All that the student learns from."""
        loss = torch.zeros((), device=sample.x0.device)
        if not self.distils_at(sample.update):
            return loss
        if self.config.matching_weight:
            loss = self.config.matching_weight * self.student_matching(sample, *self.scores(roles, sample, batch.unconditional))
        ground = self._ground(roles, batch, generator)
        if self.head is not None:
            loss = loss + generator_term(self.config.gan, self.head, ground, sample.x0)
        if self.config.mmd is not None:
            loss = loss + mmd_term(self.config.mmd, ground, sample.x0, batch.real(tuple(sample.x0.shape[2:])))
        return loss

    def scores(self, roles: Roles, sample: Sample, unconditional: Conditioning) -> tuple[Prediction, Prediction]:
        """What fake score and guided real score predict at the renoised sample, without gradient."""
        x, scale = sample.x.detach(), self.config.guidance_scale
        cold_start = self.config.cold_start
        real_score = roles.real_score(cold_start.real_scale_at(sample.update) if cold_start else 0.0)
        with torch.no_grad():
            fake = roles.fake_score(x, sample.timestep, sample.conditioning)
            real = real_score.guided(x, sample.timestep, sample.conditioning, unconditional, scale)
        return fake, real

    def renoise_times(self, low: float, high: float, update: int, batch: Batch, generator: torch.Generator) -> Tensor:
        """(B,) timesteps in [low, high]: uniform, or biased to high noise while a cold start says so."""
        cold_start = self.config.cold_start
        shares = biased(cold_start.renoise_bias_at(update) if cold_start else 1.0, len(batch.conditioning), generator)
        return (low + (high - low) * shares).to(batch.device)

    def reinforcement_loss(self, roles: Roles, sample: Sample, batch: Batch, generator: torch.Generator) -> Tensor | None:
        """What the student learns from rewards; nothing before the cold start is over."""
        term = self.config.rl
        if term is None or sample.update < self.config.rl_begins:
            return None
        assert batch.score is not None
        ground, options = self._ground(roles, batch, generator), self.config.sampler_options()
        if term.algorithm == "refl":
            return refl_term(resize(sample.x0, self.ladder.size), batch.score)
        if term.algorithm == "dpo":
            return dpo_term(term, ground, batch.score, options)
        return grpo_term(term, ground, batch.score, options["mode"], options.get("mix_within", 1.0))

    def predict_at(self, roles: Roles, conditioning: Conditioning, index: int, generator: torch.Generator) -> Prediction:
        """Backward simulation: the steps before `index` without gradient, as in sampling; then the student with it."""
        noise = initial_noise(self.ladder, len(conditioning), self.channels, generator, conditioning.like)
        with torch.no_grad():
            student = bound(roles.student, conditioning)
            state = cascade(student, self.process, self.ladder, noise, generator, until=index, **self.config.sampler_options())
        clock = torch.tensor(self.ladder.steps[index].timestep, device=state.device)
        return roles.student(state, clock, conditioning)


def drawn(count: int, generator: torch.Generator) -> int:
    """A number below `count`, all alike probable."""
    return int(torch.randint(count, (), generator=generator))
