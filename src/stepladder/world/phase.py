"""A phase of teaching: one resumable loop that trains some modules on one loss."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stepladder.errors import UserError
from stepladder.progress import console, progress_bar
from stepladder.storage import load_tree, save_tree

CHECKPOINT_SECONDS = 120


@dataclass
class Phase:
    """What one phase trains, on what, and for how long.

    Modules are already where they train. `loss(step, generator)` returns a scalar, its generator is a CPU one;
    `rate(step)` scales the learning rate; `average` keeps an exponential
    moving average of the trained weights, which is what the phase leaves behind when it ends.
    """

    name: str
    modules: dict[str, nn.Module]
    optimizers: list[torch.optim.Optimizer]
    steps: int
    loss: Callable[[int, torch.Generator], Tensor]
    rate: Callable[[int], float]
    average: float = 0.0
    clip: float = 1.0


def warm_then_decay(warmup: int, steps: int, decay_from: float = 0.5) -> Callable[[int], float]:
    """A learning-rate factor: linear warm-up, flat, then a cosine to zero over the last `1 - decay_from` of the phase."""

    def rate(step: int) -> float:
        start = int(steps * decay_from)
        down = 0.5 * (1 + math.cos(math.pi * max(0, step - start) / max(1, steps - start)))
        return min(1.0, (step + 1) / max(1, warmup)) * down

    return rate


@dataclass
class Standing:
    """How far a phase has come: its checkpoint beside the modules' and optimisers' own states."""

    generator: torch.Generator
    averages: list[Tensor]
    step: int = 0
    seconds: float = 0.0


def run_phase(phase: Phase, folder: Path, seed: int) -> None:
    """Train a phase to its end, resuming from `folder` where an earlier run stopped; a finished phase only loads.

    Raises:
        UserError: the loss became NaN or infinite.
    """
    path = folder / f"{phase.name}.safetensors"
    parameters = [parameter for module in phase.modules.values() for parameter in module.parameters()]
    standing = Standing(torch.Generator().manual_seed(seed), [parameter.detach().clone() for parameter in parameters])
    base_rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in phase.optimizers]
    if path.exists():
        _restore(phase, standing, load_tree(path))
    if standing.step >= phase.steps:
        return
    clock = saved_at = time.monotonic()
    smooth = None
    with progress_bar() as bar:
        task = bar.add_task(phase.name, total=phase.steps, completed=standing.step, note="")
        while standing.step < phase.steps:
            value = _update(phase, standing, parameters, base_rates)
            smooth = value if smooth is None else 0.98 * smooth + 0.02 * value
            now = time.monotonic()
            standing.seconds, clock = standing.seconds + now - clock, now
            bar.update(task, completed=standing.step, note=f"loss {smooth:.4f}")
            if standing.step % 100 == 0 and not console.is_terminal:
                console.print(f"{phase.name} {standing.step}/{phase.steps} loss {smooth:.4f}")
            if standing.step < phase.steps and now - saved_at > CHECKPOINT_SECONDS:
                _save(phase, standing, path)
                saved_at = now
    if phase.average:
        with torch.no_grad():
            torch._foreach_copy_(list[Tensor](parameters), standing.averages)
    _save(phase, standing, path)


def _update(phase: Phase, standing: Standing, parameters: list[nn.Parameter], base_rates: list[list[float]]) -> float:
    factor = phase.rate(standing.step)
    for optimizer, rates in zip(phase.optimizers, base_rates, strict=True):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
    loss = phase.loss(standing.step, standing.generator)
    value = loss.item()
    if not math.isfinite(value):
        raise UserError(f"loss became {value} at step {standing.step} of phase {phase.name}; start again with another --seed")
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(parameters, phase.clip)
    for optimizer in phase.optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if phase.average:
        torch._foreach_lerp_(standing.averages, [parameter.detach() for parameter in parameters], 1 - phase.average)
    standing.step += 1
    return value


def _save(phase: Phase, standing: Standing, path: Path) -> None:
    done = standing.step >= phase.steps
    save_tree(
        path,
        {
            "step": standing.step,
            "seconds": standing.seconds,
            "modules": {name: module.state_dict() for name, module in phase.modules.items()},
            "optimizers": [] if done else [optimizer.state_dict() for optimizer in phase.optimizers],
            "averages": [] if done else standing.averages,
            "generator": standing.generator.get_state(),
        },
    )


def _restore(phase: Phase, standing: Standing, state: dict[str, Any]) -> None:
    standing.step, standing.seconds = state["step"], state.get("seconds", 0.0)
    for name, module in phase.modules.items():
        module.load_state_dict(state["modules"][name])
    if standing.step < phase.steps:
        for optimizer, saved in zip(phase.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        standing.generator.set_state(state["generator"])
        standing.averages = [tensor.to(average) for tensor, average in zip(state["averages"], standing.averages, strict=True)]


def taught_seconds(folder: Path) -> dict[str, float]:
    """Seconds that each finished or begun phase of a folder has trained for, over all its calls."""
    return {
        path.stem: load_tree(path).get("seconds", 0.0) for path in sorted(folder.glob("*.safetensors")) if path.stem != "latents"
    }
