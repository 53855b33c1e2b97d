"""The ladder: which timestep is taken at which resolution (RMD Eq. 1, Eq. 2, Table 6)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch

from stepladder.errors import UserError
from stepladder.processes import TIMESTEPS, FlowProcess, Process

ResolutionShift = Literal["flow", "exact", "printed", "none"]
Boundary = Literal["teacher", "rung"]


@dataclass(frozen=True)
class Step:
    """One network call: `teacher_timestep` on the teacher's clock, `timestep` on the rung's own, at latent `size`."""

    stage: int
    teacher_timestep: float
    timestep: float
    size: tuple[int, ...]


@dataclass(frozen=True)
class Ladder:
    """Steps in the order they are taken, and the boundaries T_0 = 1000 > T_1 > … > T_K = 0 between its K stages."""

    steps: tuple[Step, ...]
    boundaries: tuple[float, ...]

    @property
    def size(self) -> tuple[int, ...]:
        """The final latent size."""
        return self.steps[-1].size

    @property
    def stages(self) -> int:
        """K, the number of resolutions."""
        return len(self.boundaries) - 1

    def steps_of(self, stage: int) -> list[int]:
        """Indices of the steps taken in a stage."""
        return [index for index, step in enumerate(self.steps) if step.stage == stage]

    def allocation(self) -> str:
        """Steps per stage, as the paper writes it: "2+2"."""
        return "+".join(str(len(self.steps_of(stage))) for stage in range(self.stages))


Number = TypeVar("Number", float, torch.Tensor)


def shift_sigma(sigma: Number, scale: float) -> Number:
    """k s / (1 + (k - 1) s): lowers logSNR by 2 log k on the flow's clock."""
    return scale * sigma / (1 + (scale - 1) * sigma)


def spaced_timesteps(steps: int, shift: float = 1.0, sigma_min: float = 0.0) -> tuple[float, ...]:
    """The teacher's N timesteps: uniform from 1000 down to, without, sigma_min; then shifted as SD3 (3) and Wan (5) are.

    RMD section 3.2: t_j = T_0 - j T_0 / N.
    """
    if steps < 1:
        raise UserError(f"a ladder needs at least one step, not {steps}")
    return tuple(TIMESTEPS * shift_sigma(1 - (1 - sigma_min) * j / steps, shift) for j in range(steps))


def rung_timestep(timestep: float, scale: float, process: Process, shift: ResolutionShift = "flow") -> float:
    """RMD Eq. 2: the timestep that a rung `scale` = r_K / r_i times smaller uses for the teacher's `timestep`.

    "flow" is what Table 6 ran (logSNR - 2 log scale by the flow's formula on t / 1000, for every model); "exact" shifts
    the process's own logSNR; "printed" has the sign of Eq. 2 as printed; "none" leaves the timestep alone.
    """
    # RMD Eq. 2
    if shift == "flow":
        return TIMESTEPS * shift_sigma(timestep / TIMESTEPS, scale)
    if shift == "printed":
        return TIMESTEPS * shift_sigma(timestep / TIMESTEPS, 1 / scale)
    if shift == "exact":
        t = torch.tensor(timestep, dtype=torch.float64)
        return process.timestep(process.logsnr(t) - 2 * math.log(scale)).item() if scale != 1 else timestep
    return timestep


def stage_boundaries(process: Process, thresholds: Sequence[float]) -> tuple[float, ...]:
    """RMD Eq. 1: logSNR thresholds, rising, to T_0 = 1000 > T_1 > … > T_K = 0 on the teacher's clock.

    Raises:
        UserError: thresholds do not rise, or the schedule never reaches one of them.
    """
    # RMD Eq. 1
    low, high = process.logsnr_range()
    for threshold in thresholds:
        if not low < threshold < high:
            raise UserError(
                f"logSNR threshold {threshold:g} is outside what this schedule reaches ({low:.2f} to {high:.2f}): that stage "
                "would be empty; choose a threshold inside the range"
            )
    if any(after <= before for before, after in zip(thresholds, thresholds[1:], strict=False)):
        raise UserError(f"logSNR thresholds must rise from stage to stage, not {list(thresholds)}")
    inner = [process.timestep(torch.tensor(value, dtype=torch.float64)).item() for value in thresholds]
    return (TIMESTEPS, *inner, 0.0)


def build_ladder(
    process: Process,
    timesteps: Sequence[float],
    sizes: Sequence[tuple[int, ...]],
    thresholds: Sequence[float] = (),
    shift: ResolutionShift = "flow",
    boundary: Boundary = "teacher",
) -> Ladder:
    """Divide the teacher's timesteps among K resolutions.

    Args:
        process: the forward process.
        timesteps: the teacher's N timesteps, falling, in (0, 1000].
        sizes: K latent sizes, growing; the last is the teacher's.
        thresholds: K - 1 logSNR values, rising.
        shift: how a rung's timestep follows from the teacher's (see `rung_timestep`).
        boundary: the clock on which steps are compared with a stage's end. "teacher" gives the allocations of Tables 4
            and 5; "rung" moves the end by the rung's own shift, the only reading that gives Wan's 3+3 of Table 6.

    Raises:
        UserError: sizes that shrink, thresholds out of reach, timesteps out of order, or a stage without a step.
    """
    _check_sizes(sizes)
    if len(thresholds) != len(sizes) - 1:
        raise UserError(f"{len(sizes)} sizes need {len(sizes) - 1} logSNR thresholds between them, not {len(thresholds)}")
    if any(after >= before for before, after in zip(timesteps, timesteps[1:], strict=False)):
        raise UserError(f"timesteps must fall from step to step, not {[round(t, 1) for t in timesteps]}")
    if not timesteps or timesteps[0] > TIMESTEPS or timesteps[-1] <= 0:
        raise UserError("timesteps must lie in (0, 1000]")
    bounds = stage_boundaries(process, thresholds)
    top = sizes[-1][-2]
    scales = [top / size[-2] for size in sizes]
    ends = [
        end if boundary == "teacher" else rung_timestep(end, scale, process, shift)
        for end, scale in zip(bounds[1:], scales, strict=True)
    ]
    steps = []
    for timestep in timesteps:
        stage = next(index for index, end in enumerate(ends) if timestep > end)
        steps.append(Step(stage, timestep, rung_timestep(timestep, scales[stage], process, shift), tuple(sizes[stage])))
    for stage in range(len(sizes)):
        if not any(step.stage == stage for step in steps):
            raise UserError(
                f"stage {stage + 1} at latent size {sizes[stage]} has no step: none of {[round(t) for t in timesteps]} lies above "
                f"its end at t = {ends[stage]:.0f} and below the stage before; move a threshold or add steps"
            )
    return Ladder(tuple(steps), bounds)


def full_resolution(timesteps: Sequence[float], size: tuple[int, ...]) -> Ladder:
    """A ladder of one rung: ordinary few- or many-step sampling."""
    return build_ladder(FlowProcess(), timesteps, [size])


def _check_sizes(sizes: Sequence[tuple[int, ...]]) -> None:
    if not sizes:
        raise UserError("a ladder needs at least one size")
    for before, after in zip(sizes, sizes[1:], strict=False):
        if len(after) != len(before) or any(b > a for b, a in zip(before, after, strict=True)) or before == after:
            raise UserError(f"a ladder must grow from rung to rung: {tuple(after)} does not grow from {tuple(before)}")


@dataclass(frozen=True)
class Preset:
    """A published schedule: N steps spaced with `spacing`, on pixel `sizes` (height, width), split at `thresholds`."""

    steps: int
    spacing: float
    sizes: tuple[tuple[int, int], ...]
    thresholds: tuple[float, ...]
    sigma_min: float = 0.0
    boundary: Boundary = "teacher"

    def timesteps(self) -> tuple[float, ...]:
        """The teacher's timesteps."""
        return spaced_timesteps(self.steps, self.spacing, self.sigma_min)


# RMD Table 6
PRESETS = {
    "sdxl": Preset(4, 1.0, ((512, 512), (1024, 1024)), (-2.5,)),
    "pixart": Preset(4, 1.0, ((512, 512), (1024, 1024)), (-2.5,)),
    "sd35": Preset(4, 3.0, ((512, 512), (1024, 1024)), (-2.5,)),
    "wan": Preset(6, 5.0, ((480, 832), (720, 1280)), (-2.5,), sigma_min=0.003 / 1.002, boundary="rung"),
}
