"""LadderScheduler: the cascade's step as a diffusers scheduler, for stock pipelines."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from torch import Tensor

from stepladder.errors import UserError
from stepladder.ladder import Ladder, Step
from stepladder.packing import PACK, pack, unpack
from stepladder.processes import TIMESTEPS, Process, process_from
from stepladder.sampling import advance, derived_generators


class LadderScheduler(SchedulerMixin, ConfigMixin):
    """Climbs a ladder inside a stock pipeline: start it at the first rung's size, the picture has the last one's.

    Args:
        timesteps: the rung timesteps, one a step.
        sizes: the latent size of each step, (H, W) or (T, H, W).
        mix: alpha of RMD Eq. 10 where the resolution grows.
        resample: kernel of U.
        preserve_variance: undo U's loss of variance.
        mix_within: alpha where the resolution stays: 1 is the ODE, 0 fresh noise at every step (DMD2, SwD).
        packed: latents come packed, as FLUX's pipeline keeps them; growth then needs `LadderPipeline`, because the
            stock loop fixes positions before its first step.
        prediction_type: "flow_prediction", "epsilon" or "v_prediction".
        beta_start, beta_end, beta_schedule: of variance-preserving models.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        timesteps: tuple[float, ...] = (1000.0, 750.0, 500.0, 250.0),
        sizes: tuple[tuple[int, ...], ...] = ((64, 64), (64, 64), (128, 128), (128, 128)),
        mix: float = 1.0,
        resample: str = "bilinear",
        preserve_variance: bool = False,
        packed: bool = False,
        prediction_type: str = "flow_prediction",
        beta_start: float = 1e-4,
        beta_end: float = 2e-2,
        beta_schedule: str = "linear",
        num_train_timesteps: int = 1000,
        mix_within: float = 1.0,
    ) -> None:
        self.process: Process = process_from(self.config)
        self.init_noise_sigma = 1.0
        self.generators: list[torch.Generator] = []
        self.kept: tuple[int, int] | None = None
        self._announce("cpu")

    @classmethod
    def of(cls, ladder: Ladder, process: Process, packed: bool = False, **options: Any) -> LadderScheduler:
        """The scheduler of a ladder; `options` are those of `cascade`: mix, mode, preserve_variance, mix_within."""
        timesteps = tuple(step.timestep for step in ladder.steps)
        sizes = tuple(step.size for step in ladder.steps)
        options["resample"] = options.pop("mode", "bilinear")
        return cls(timesteps, sizes, packed=packed, **options, **process.config())

    def ladder(self) -> Ladder:
        """The ladder, with stages counted by change of size; teacher timesteps are not kept beyond training."""
        steps: list[Step] = []
        ends_of_steps = [*self.config.timesteps[1:], 0.0]
        for timestep, end, size in zip(self.config.timesteps, ends_of_steps, self.config.sizes, strict=True):
            stage = steps[-1].stage + (tuple(size) != steps[-1].size) if steps else 0
            steps.append(Step(int(stage), timestep, timestep, tuple(size), end))
        ends = [after.timestep for before, after in zip(steps, steps[1:], strict=False) if after.stage != before.stage]
        return Ladder(tuple(steps), (TIMESTEPS, *ends, 0.0))

    def options(self) -> dict[str, Any]:
        """The options of `cascade` that this scheduler was made with."""
        config = self.config
        return {
            "mix": config.mix,
            "mode": config.resample,
            "preserve_variance": config.preserve_variance,
            "mix_within": config.mix_within,
        }

    def keep_to(self, stage: int | None) -> None:
        """Let the next calls take one stage's steps only, as `LadderPipeline` does; None is the whole ladder again."""
        steps = self.ladder().steps_of(stage) if stage is not None else []
        self.kept = (steps[0], steps[-1] + 1) if steps else None

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Any = None,
        **_: Any,
    ) -> None:
        """Accept the ladder's own number of steps only: the schedule belongs to the weights.

        `sigmas`, `mu` and the like, which some pipelines compute for their own schedulers, are not used.
        """
        first, last = self.kept or (0, len(self.config.timesteps))
        wanted = num_inference_steps if num_inference_steps is not None else len(sigmas) if sigmas is not None else None
        if wanted is not None and wanted != last - first:
            raise UserError(f"this student takes {last - first} steps, not {wanted}; pass num_inference_steps={last - first}")
        if first == 0:
            self.generators = []
        self._announce(device)

    def _announce(self, device: str | torch.device | None) -> None:
        first, last = self.kept or (0, len(self.config.timesteps))
        own = torch.tensor(self.config.timesteps, dtype=torch.float32)
        self.timesteps = self.process.network_timestep(own)[first:last].to(device)
        self.sigmas = self.process.sigma(own)[first:last]
        self.index = first

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Pipelines say that they begin at the beginning; the ladder knows."""

    def scale_model_input(self, sample: Tensor, timestep: Tensor | None = None) -> Tensor:
        """Networks of both processes take the state as it is."""
        return sample

    def step(
        self, model_output: Tensor, timestep: Tensor, sample: Tensor, return_dict: bool = True, **_: Any
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """One step of RMD Algorithm 2 from the network's output, (B, C, H, W), (B, C, T, H, W) or packed."""
        steps = self.ladder().steps
        here = steps[self.index]
        after = steps[self.index + 1] if self.index + 1 < len(steps) else None
        state, output = self._spatial(sample, here), self._spatial(model_output, here)
        if self.index == 0:
            self.generators = derived_generators(state)
        clock = torch.tensor(here.timestep, device=sample.device)
        prediction = self.process.predict(state, output, clock)
        result = advance(self.process, prediction, here, after, self.generators, **self.options())
        self.index += 1
        result, x0 = (self._as_given(each).to(model_output.dtype) for each in (result, prediction.x0))
        return SchedulerOutput(prev_sample=result) if return_dict else (result, x0)

    def _spatial(self, value: Tensor, here: Step) -> Tensor:
        value = value.float()
        if self.config.packed:
            fits = value.ndim == 3 and value.shape[1] * PACK**2 == here.size[0] * here.size[1]
        else:
            fits = tuple(value.shape[2:]) == here.size
        if not fits:
            raise UserError(
                f"step {self.index + 1} expects latents of {'x'.join(map(str, here.size))}, got shape {tuple(value.shape)}: pass "
                "the first rung's size to the pipeline, or use LadderPipeline, which does"
            )
        return unpack(value, here.size) if self.config.packed else value

    def _as_given(self, value: Tensor) -> Tensor:
        return pack(value) if self.config.packed else value
