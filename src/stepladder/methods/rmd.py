"""RMD: Cross-Resolution Distribution Matching Distillation (Algorithm 1), configuration and objective together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from stepladder.conditioning import Conditioning
from stepladder.errors import UserError
from stepladder.ladder import Ladder
from stepladder.losses.matching import HUBER, fake_score_loss, matching_loss
from stepladder.prediction import Prediction
from stepladder.processes import Process
from stepladder.renoise import renoise
from stepladder.resample import ResampleMode, resize
from stepladder.roles import Role, Roles
from stepladder.sampling import cascade, initial_noise

Share = Annotated[float, Field(ge=0, le=1)]


class RMDConfig(BaseModel):
    """Settings of RMD; the defaults are the paper's for images (section 4.1, appendix B)."""

    model_config = ConfigDict(extra="forbid")

    name: Literal["rmd"] = "rmd"
    alpha: Share = Field(0.2, description="share of predicted noise in the loss, Eq. 10: 0.2 for images, 0.5 for Wan")
    inference_alpha: Share = Field(1.0, description="the same in the sampler where resolution grows: 1.0, Wan 0.9")
    guidance_scale: float = Field(4.5, ge=1, description="classifier-free guidance on the real score")
    warmup_steps: int = Field(50, ge=0, description="updates on the noisy half of the stages only")
    fake_updates: int = Field(1, ge=1, description="fake-score updates for each student update")
    snr_cap: float = Field(5.0, gt=0, description="upper bound of the SNR weight of Eq. 9")
    huber: float = Field(HUBER, gt=0, description="Pseudo-Huber constant: C = huber sqrt(d)")
    stage_weights: list[float] | None = Field(None, description="lambda of Eq. 6, one a stage; all 1 by default")
    resample: ResampleMode = Field("bilinear", description="kernel of U")
    preserve_variance: bool = Field(False, description="undo U's loss of variance on predicted noise (not in the paper)")


@dataclass(frozen=True)
class Sample:
    """What one roll-out yields: the student's state projected to full resolution, with its graph.

    x: (B, C, H, W), x_t of Eq. 10 · timestep: (B,), t on the teacher's clock · x0: (B, C, H, W), U(x0) of the student.
    """

    x: Tensor
    timestep: Tensor
    x0: Tensor
    stage: int
    conditioning: Conditioning


class RMD:
    """The objective: roll out through the cascade, project to full resolution, match the teacher there."""

    Config = RMDConfig

    def __init__(self, config: RMDConfig, ladder: Ladder, process: Process, channels: int) -> None:
        if config.stage_weights is not None and len(config.stage_weights) != ladder.stages:
            raise UserError(f"method.stage_weights needs {ladder.stages} numbers, one a stage, not {len(config.stage_weights)}")
        self.config = config
        self.ladder = ladder
        self.process = process
        self.channels = channels

    def sampler_options(self) -> dict[str, object]:
        """What `cascade` needs to sample as in training."""
        config = self.config
        return {"mix": config.inference_alpha, "mode": config.resample, "preserve_variance": config.preserve_variance}

    def stages_at(self, update: int) -> int:
        """RMD Algorithm 1 line 13: floor(K/2) noisy stages, at least one, while warming up; then all K."""
        warming = update < self.config.warmup_steps
        return max(1, self.ladder.stages // 2) if warming else self.ladder.stages

    def roll_out(self, roles: Roles, conditioning: Conditioning, update: int, generator: torch.Generator) -> Sample:
        """RMD Algorithm 1 lines 8-16, no further down the cascade than the sampled step.

        A stage and one of its steps are drawn for the batch, and t uniformly over the stage's interval for each sample.
        """
        stage = int(torch.randint(self.stages_at(update), (), generator=generator))
        choices = self.ladder.steps_of(stage)
        index = choices[int(torch.randint(len(choices), (), generator=generator))]
        batch, like = len(conditioning), next(iter(conditioning.tensors.values()))
        noise = initial_noise(self.ladder, batch, self.channels, generator, like)
        with torch.no_grad():
            student = _bind(roles.student, conditioning)
            state = cascade(student, self.process, self.ladder, noise, generator, until=index, **self.sampler_options())  # type: ignore[arg-type]
        clock = torch.tensor(self.ladder.steps[index].timestep, device=state.device)
        prediction = roles.student(state, clock, conditioning)
        start, end = self.ladder.boundaries[stage], self.ladder.boundaries[stage + 1]
        # RMD Eq. 6
        timestep = end + (start - end) * torch.rand(batch, generator=generator).to(state.device)
        return self._project(prediction, timestep, stage, conditioning, generator)

    def _project(
        self, prediction: Prediction, timestep: Tensor, stage: int, conditioning: Conditioning, generator: torch.Generator
    ) -> Sample:
        config, size = self.config, self.ladder.size
        # RMD Eq. 10
        x = renoise(self.process, prediction, timestep, size, config.alpha, generator, config.resample, config.preserve_variance)
        return Sample(x, timestep, resize(prediction.x0, size, config.resample), stage, conditioning)

    def fake_score_loss(self, roles: Roles, sample: Sample) -> Tensor:
        """RMD Eq. 9, mean over the batch: the fake score learns where the student's samples are."""
        prediction = roles.fake_score(sample.x.detach(), sample.timestep, sample.conditioning)
        logsnr = self.process.logsnr(sample.timestep)
        return fake_score_loss(prediction.x0, sample.x0, logsnr, self.config.snr_cap).mean()

    def student_loss(self, roles: Roles, sample: Sample, unconditional: Conditioning) -> Tensor:
        """RMD Eq. 8, mean over the batch: the student moves from the fake score towards the guided teacher."""
        x = sample.x.detach()
        with torch.no_grad():
            fake = roles.fake_score(x, sample.timestep, sample.conditioning)
            real = roles.teacher.guided(x, sample.timestep, sample.conditioning, unconditional, self.config.guidance_scale)
        weights = self.config.stage_weights
        weight = weights[sample.stage] if weights else 1.0
        return weight * matching_loss(sample.x, fake.eps, real.eps, self.config.huber).mean()


def _bind(role: Role, conditioning: Conditioning):  # type: ignore[no-untyped-def]
    return lambda x, timestep: role(x, timestep, conditioning)
