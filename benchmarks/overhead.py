"""Our own work beside the network's: sampler and training step, each as a ratio measured within one run.

    python benchmarks/overhead.py            # prints a table and writes benchmarks/results/overhead.json

Sampler: time of a whole cascade against bare calls of the same network on the same shapes. Training: time of an update
against the bare forward and backward passes it is made of; optimisers, clipping and averaging count as the update's own work.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch

from stepladder.backbones.base import Backbone
from stepladder.distillation import load_model
from stepladder.ladder import Ladder
from stepladder.precision import autocast, synchronize
from stepladder.roles import FAKE_SCORE, STUDENT, Role
from stepladder.samplers import Sampler, sample
from stepladder.training.recipe import load_recipe
from stepladder.training.trainer import Run, train_update

ROOT = Path(__file__).parent.parent


def sampler_overhead(backbone: Backbone, ladder: Ladder, batch: int, rounds: int) -> dict[str, float]:
    """The sampler's own share: seconds outside the network while it samples, over all seconds; no adapters, as when exported."""
    conditioning, unconditional = backbone.encode(["a small red star top left on gray"] * batch), backbone.unconditional()
    network = backbone.network
    sampler = Sampler(Role(backbone, network), ladder, 1.0, {"mix": 0.5})
    device = next(network.parameters()).device
    inside: list[float] = []
    inner = network.forward

    def timed(*arguments: object, **options: object) -> object:
        began = time.perf_counter()
        try:
            return inner(*arguments, **options)
        finally:
            synchronize(device)
            inside.append(time.perf_counter() - began)

    network.forward = timed  # type: ignore[method-assign]
    shares, totals = [], []
    for _ in range(rounds):
        inside.clear()
        began = time.perf_counter()
        sample(sampler, backbone, conditioning, unconditional, list(range(batch)))
        synchronize(device)
        total = time.perf_counter() - began
        shares.append(1 - sum(inside) / total)
        totals.append(total)
    network.forward = inner  # type: ignore[method-assign]
    return {"batch": batch, "seconds": statistics.median(totals), "own_share": statistics.median(shares)}


def training_overhead(run: Run, rounds: int) -> dict[str, float]:
    """An update against its own passes: same networks, same shapes, same order, no method and no bookkeeping."""
    training = run.recipe.training
    conditioning = run.prompts.batch(0, training.batch_size).to(run.device)
    empty = run.prompts.unconditional.to(run.device).expand(training.batch_size)
    roles, ladder = run.roles, run.ladder
    state = torch.Generator()
    shapes = {
        step.size: torch.randn(training.batch_size, run.backbone.latent_channels, *step.size, device=run.device)
        for step in ladder.steps
    }
    parameters = {role: list(roles.parameters(role).values()) for role in (STUDENT, FAKE_SCORE)}

    def passes(update: int) -> None:
        state.manual_seed(update)
        stage = int(torch.randint(run.method.stages_at(10**9), (), generator=state))
        choices = ladder.steps_of(stage)
        index = choices[int(torch.randint(len(choices), (), generator=state))]
        t = torch.tensor(500.0, device=run.device)
        with autocast(run.device, training.precision):
            with torch.no_grad():
                for step in ladder.steps[:index]:
                    roles.student(shapes[step.size], t, conditioning)
            student = roles.student(shapes[ladder.steps[index].size], t, conditioning)
            full = shapes[ladder.size]
            fake = roles.fake_score(full, t, conditioning)
        fake.x0.float().mean().backward()
        with torch.no_grad(), autocast(run.device, training.precision):
            roles.fake_score(full, t, conditioning)
            roles.teacher.guided(full, t, conditioning, empty, 4.0)
        student.x0.float().mean().backward()
        for own in parameters.values():
            for parameter in own:
                parameter.grad = None

    bare, whole = [], []
    for update in range(-1, rounds):
        began = time.perf_counter()
        passes(update)
        synchronize(run.device)
        middle = time.perf_counter()
        run.generator.manual_seed(update)
        run.update = 10**6 + update
        train_update(run)
        synchronize(run.device)
        if update >= 0:
            bare.append(middle - began)
            whole.append(time.perf_counter() - middle)
    return {"passes_seconds": sum(bare) / rounds, "update_seconds": sum(whole) / rounds, "ratio": sum(whole) / sum(bare)}


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--batch", type=int, default=32)
    options = parser.parse_args()
    recipe = load_recipe(ROOT / "recipes" / "bundled-rmd.yaml", [f"training.batch_size={options.batch}"])
    backbone = load_model(recipe)
    ladder = recipe.ladder.build(backbone)
    result = {
        "command": f"python benchmarks/overhead.py --rounds {options.rounds} --batch {options.batch}",
        "sampler": [sampler_overhead(backbone, ladder, batch, options.rounds) for batch in (1, 64)],
        "training": training_overhead(Run.start(recipe, backbone), options.rounds),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__.split('+')[0]}",
    }
    target = ROOT / "benchmarks" / "results" / "overhead.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
