"""RMD: Cross-Resolution Distribution Matching Distillation (Algorithm 1), configuration and objective together."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from stepladder.errors import UserError
from stepladder.losses.matching import HUBER, fake_score_loss, matching_loss
from stepladder.methods.base import Batch, Method, MethodConfig, Sample, Setting, drawn
from stepladder.prediction import Prediction
from stepladder.renoise import renoise
from stepladder.resample import ResampleMode, resize
from stepladder.roles import Roles

Share = Annotated[float, Field(ge=0, le=1)]


class RMDConfig(MethodConfig):
    """Settings of RMD; the defaults are the paper's for images (section 4.1, appendix B)."""

    name: Literal["rmd"] = "rmd"
    alpha: Share = Field(0.2, description="share of predicted noise in the loss, Eq. 10: 0.2 for images, 0.5 for Wan")
    inference_alpha: Share = Field(1.0, description="the same in the sampler where resolution grows: 1.0, Wan 0.9")
    warmup_steps: int = Field(50, ge=0, description="updates on the noisy half of the stages only")
    snr_cap: float = Field(5.0, gt=0, description="upper bound of the SNR weight of Eq. 9")
    huber: float = Field(HUBER, gt=0, description="Pseudo-Huber constant: C = huber sqrt(d)")
    stage_weights: list[float] | None = Field(None, description="lambda of Eq. 6, one a stage; all 1 by default")
    resample: ResampleMode = Field("bilinear", description="kernel of U")
    preserve_variance: bool = Field(False, description="undo U's loss of variance on predicted noise (not in the paper)")

    def sampler_options(self) -> dict[str, Any]:
        """The ODE within a resolution, `inference_alpha` where it grows."""
        return {"mix": self.inference_alpha, "mode": self.resample, "preserve_variance": self.preserve_variance}


class RMD(Method):
    """Roll out through the cascade, project to full resolution, match the teacher there."""

    Config = RMDConfig

    def __init__(self, config: RMDConfig, setting: Setting) -> None:
        super().__init__(config, setting)
        if config.stage_weights is not None and len(config.stage_weights) != self.ladder.stages:
            wanted = self.ladder.stages
            raise UserError(f"method.stage_weights needs {wanted} numbers, one a stage, not {len(config.stage_weights)}")

    def stages_at(self, update: int) -> int:
        """RMD Algorithm 1 line 13: floor(K/2) noisy stages, at least one, while warming up; then all K."""
        warming = update < self.config.warmup_steps
        return max(1, self.ladder.stages // 2) if warming else self.ladder.stages

    def roll_out(self, roles: Roles, batch: Batch, update: int, generator: torch.Generator) -> Sample:
        """RMD Algorithm 1 lines 8-16, no further down the cascade than the sampled step.

        A stage and one of its steps are drawn for the batch, and t uniformly over the stage's interval for each sample.
        """
        stage = drawn(self.stages_at(update), generator)
        choices = self.ladder.steps_of(stage)
        index = choices[drawn(len(choices), generator)]
        prediction = self.predict_at(roles, batch.conditioning, index, generator)
        start, end = self.ladder.boundaries[stage], self.ladder.boundaries[stage + 1]
        # RMD Eq. 6
        timestep = self.renoise_times(end, start, update, batch, generator)
        x = self._project(prediction, timestep, generator)
        x0 = resize(prediction.x0, self.ladder.size, self.config.resample)
        return Sample(x0, x, timestep, stage, batch.conditioning, update)

    def _project(self, prediction: Prediction, timestep: Tensor, generator: torch.Generator) -> Tensor:
        config, size = self.config, self.ladder.size
        # RMD Eq. 10
        return renoise(self.process, prediction, timestep, size, config.alpha, generator, config.resample, config.preserve_variance)

    def fake_score_matching(self, roles: Roles, sample: Sample, generator: torch.Generator) -> Tensor:
        """RMD Eq. 9, mean over the batch: the fake score learns where the student's samples are."""
        prediction = roles.fake_score(sample.x.detach(), sample.timestep, sample.conditioning)
        logsnr = self.process.logsnr(sample.timestep)
        return fake_score_loss(prediction.x0, sample.x0, logsnr, self.config.snr_cap).mean()

    def student_matching(self, sample: Sample, fake: Prediction, real: Prediction) -> Tensor:
        """RMD Eq. 8, mean over the batch: the student moves from the fake score towards the guided teacher."""
        weights = self.config.stage_weights
        weight = weights[sample.stage] if weights else 1.0
        return weight * matching_loss(sample.x, fake.eps, real.eps, self.config.huber).mean()
