"""A phase of teaching: one resumable loop that trains some modules on one loss."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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


def run_phase(phase: Phase, folder: Path, seed: int) -> None:
    """Train a phase to its end, resuming from `folder` where an earlier run stopped; a finished phase only loads.

    Raises:
        UserError: the loss became NaN or infinite.
    """
    path = folder / f"{phase.name}.safetensors"
    generator = torch.Generator().manual_seed(seed)
    parameters = [parameter for module in phase.modules.values() for parameter in module.parameters()]
    averages = [parameter.detach().clone() for parameter in parameters]
    device = parameters[0].device
    base_rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in phase.optimizers]
    step = 0
    if path.exists():
        state = load_tree(path)
        step = state["step"]
        for name, module in phase.modules.items():
            module.load_state_dict(state["modules"][name])
        if step < phase.steps:
            for optimizer, saved in zip(phase.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            generator.set_state(state["generator"])
            averages = [tensor.to(device) for tensor in state["averages"]]

    def save() -> None:
        done = step >= phase.steps
        save_tree(
            path,
            {
                "step": step,
                "modules": {name: module.state_dict() for name, module in phase.modules.items()},
                "optimizers": [] if done else [optimizer.state_dict() for optimizer in phase.optimizers],
                "averages": [] if done else averages,
                "generator": generator.get_state(),
            },
        )

    if step >= phase.steps:
        return
    saved_at, smooth = time.monotonic(), None
    with progress_bar() as bar:
        task = bar.add_task(phase.name, total=phase.steps, completed=step, note="")
        while step < phase.steps:
            for optimizer, rates in zip(phase.optimizers, base_rates, strict=True):
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * phase.rate(step)
            loss = phase.loss(step, generator)
            value = loss.item()
            if not math.isfinite(value):
                raise UserError(f"loss became {value} at step {step} of phase {phase.name}; start again with another --seed")
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, phase.clip)
            for optimizer in phase.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            if phase.average:
                torch._foreach_lerp_(averages, [parameter.detach() for parameter in parameters], 1 - phase.average)
            step += 1
            smooth = value if smooth is None else 0.98 * smooth + 0.02 * value
            bar.update(task, completed=step, note=f"loss {smooth:.4f}")
            if step % 100 == 0 and not console.is_terminal:
                console.print(f"{phase.name} {step}/{phase.steps} loss {smooth:.4f}")
            if step < phase.steps and time.monotonic() - saved_at > CHECKPOINT_SECONDS:
                save()
                saved_at = time.monotonic()
    if phase.average:
        with torch.no_grad():
            torch._foreach_copy_(list[Tensor](parameters), averages)
    save()
