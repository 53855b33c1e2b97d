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
    """One network call: `teacher_timestep` on the teacher's clock, `timestep` on the rung's own, at latent `size`.

    `end` is where the next step begins, on this step's rung's clock; 0 for the last.
    """

    stage: int
    teacher_timestep: float
    timestep: float
    size: tuple[int, ...]
    end: float


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
    allocation: Sequence[int] = (),
) -> Ladder:
    """Divide the teacher's timesteps among K resolutions, at logSNR thresholds or by number.

    Args:
        process: the forward process.
        timesteps: the teacher's N timesteps, falling, in (0, 1000].
        sizes: K latent sizes, growing; the last is the teacher's.
        thresholds: K - 1 logSNR values, rising.
        shift: how a rung's timestep follows from the teacher's (see `rung_timestep`).
        boundary: the clock on which steps are compared with a stage's end. "teacher" gives the allocations of Tables 4
            and 5; "rung" moves the end by the rung's own shift, the only reading that gives Wan's 3+3 of Table 6.
        allocation: instead of thresholds, the number of steps of each size (SwD section 4.1: one each); a stage then ends
            where the next one's first step begins.

    Raises:
        UserError: sizes that shrink, thresholds out of reach, timesteps out of order, or a stage without a step.
    """
    _check_sizes(sizes)
    if any(after >= before for before, after in zip(timesteps, timesteps[1:], strict=False)):
        raise UserError(f"timesteps must fall from step to step, not {[round(t, 1) for t in timesteps]}")
    if not timesteps or timesteps[0] > TIMESTEPS or timesteps[-1] <= 0:
        raise UserError("timesteps must lie in (0, 1000]")
    top = sizes[-1][-2]
    scales = [top / size[-2] for size in sizes]

    def on_rung(timestep: float, stage: int) -> float:
        return rung_timestep(timestep, scales[stage], process, shift)

    if allocation:
        bounds, stages = _counted(timesteps, sizes, thresholds, allocation)
    else:
        bounds = _bounds(process, sizes, thresholds)
        ends = [end if boundary == "teacher" else on_rung(end, stage) for stage, end in enumerate(bounds[1:])]
        stages = [next(index for index, end in enumerate(ends) if timestep > end) for timestep in timesteps]
        _check_stages(stages, timesteps, sizes, ends)
    steps = [
        Step(stage, timestep, on_rung(timestep, stage), tuple(sizes[stage]), on_rung(after, stage))
        for stage, timestep, after in zip(stages, timesteps, [*timesteps[1:], 0.0], strict=True)
    ]
    return Ladder(tuple(steps), bounds)


def _bounds(process: Process, sizes: Sequence[tuple[int, ...]], thresholds: Sequence[float]) -> tuple[float, ...]:
    if len(thresholds) != len(sizes) - 1:
        raise UserError(f"{len(sizes)} sizes need {len(sizes) - 1} logSNR thresholds between them, not {len(thresholds)}")
    return stage_boundaries(process, thresholds)


def _counted(
    timesteps: Sequence[float], sizes: Sequence[tuple[int, ...]], thresholds: Sequence[float], allocation: Sequence[int]
) -> tuple[tuple[float, ...], list[int]]:
    """Boundaries and each step's stage from the number of steps of each size."""
    if thresholds:
        raise UserError("a ladder is divided by logSNR thresholds or by an allocation, not by both; remove one of them")
    if len(allocation) != len(sizes) or min(allocation) < 1 or sum(allocation) != len(timesteps):
        raise UserError(
            f"allocation {list(allocation)} must give each of {len(sizes)} sizes one step or more, {len(timesteps)} in all"
        )
    stages = [stage for stage, count in enumerate(allocation) for _ in range(count)]
    firsts = [timesteps[stages.index(stage)] for stage in range(1, len(sizes))]
    return (TIMESTEPS, *firsts, 0.0), stages


def _check_stages(
    stages: Sequence[int], timesteps: Sequence[float], sizes: Sequence[tuple[int, ...]], ends: Sequence[float]
) -> None:
    for stage in range(len(sizes)):
        if stage not in stages:
            raise UserError(
                f"stage {stage + 1} at latent size {sizes[stage]} has no step: none of {[round(t) for t in timesteps]} lies above "
                f"its end at t = {ends[stage]:.0f} and below the stage before; move a threshold or add steps"
            )


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
    """A published schedule on pixel `sizes`, (height, width) or (frames, height, width).

    RMD's: N steps spaced with `spacing`, split at `thresholds`. SwD's: `timesteps` themselves, one for each size.
    """

    sizes: tuple[tuple[int, ...], ...]
    steps: int
    spacing: float = 1.0
    thresholds: tuple[float, ...] = ()
    sigma_min: float = 0.0
    boundary: Boundary = "teacher"
    timesteps: tuple[float, ...] | None = None
    allocation: tuple[int, ...] = ()
    shift: ResolutionShift = "flow"

    def teacher_timesteps(self) -> tuple[float, ...]:
        """The teacher's timesteps."""
        return self.timesteps or spaced_timesteps(self.steps, self.spacing, self.sigma_min)


def _scale_wise(timesteps: tuple[float, ...], sizes: tuple[tuple[int, ...], ...]) -> Preset:
    """SwD appendix D: a size a step, and the teacher's own clock on all of them."""
    return Preset(sizes, len(timesteps), timesteps=timesteps, allocation=(1,) * len(sizes), shift="none")


def _square(*sides: int) -> tuple[tuple[int, ...], ...]:
    return tuple((side, side) for side in sides)


# RMD Table 6, SwD appendix D
PRESETS = {
    "sdxl": Preset(_square(512, 1024), 4, 1.0, (-2.5,)),
    "pixart": Preset(_square(512, 1024), 4, 1.0, (-2.5,)),
    "sd35": Preset(_square(512, 1024), 4, 3.0, (-2.5,)),
    "wan": Preset(((480, 832), (720, 1280)), 6, 5.0, (-2.5,), sigma_min=0.003 / 1.002, boundary="rung"),
    "swd-sd35-medium": _scale_wise((1000.0, 945.0, 896.0, 790.0, 737.0, 602.0), _square(256, 384, 512, 640, 768, 1024)),
    "swd-sd35-large": _scale_wise((1000.0, 896.0, 737.0, 602.0), _square(512, 640, 768, 1024)),
    "swd-flux": _scale_wise((1000.0, 945.0, 790.0, 602.0), _square(256, 512, 768, 1024)),
    "swd-wan-1.3b": _scale_wise((1000.0, 896.0, 737.0, 602.0), ((21, 160, 272), (41, 240, 416), (61, 320, 560), (81, 480, 832))),
    "swd-released": _scale_wise((1000.0, 895.9, 737.1, 602.2), _square(512, 640, 768, 1024)),
}
