"""Our own work beside the network's: sampler and training step, each as a ratio measured within one run.

    python benchmarks/overhead.py            # prints a table and writes benchmarks/results/overhead.json

Sampler: time of a whole cascade against bare calls of the same network on the same shapes. Training: for each method, time of
an update against the very forward and backward passes it made; all else counts as the update's own work.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepladder.backbones.base import Backbone
from stepladder.data.shards import write_shard
from stepladder.distillation import load_model
from stepladder.images import png_bytes
from stepladder.ladder import Ladder
from stepladder.precision import autocast, describe, pick_device, synchronize
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


@dataclass
class Pass:
    """One call of a role in an update: which, on what, and whether gradients were wanted and also of the state."""

    role: Role
    verb: str
    x: Tensor
    arguments: tuple[Any, ...]
    grad: bool
    through: bool


@contextlib.contextmanager
def recording(backbone: Backbone) -> Iterator[list[Any]]:
    """All passes that are made meanwhile, and the encodings of images, in their order."""
    made: list[Any] = []
    call, features, encode = Role._call, Role.features, backbone.encode_images

    def noted(verb: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        def run(role: Role, x: Tensor, *arguments: Any) -> Any:
            grad = torch.is_grad_enabled()
            made.append(Pass(role, verb, x.detach(), arguments, grad, grad and x.requires_grad))
            return inner(role, x, *arguments)

        return run

    def encoded(images: Tensor) -> Tensor:
        made.append(images)
        return encode(images)

    Role._call, Role.features = noted("_call", call), noted("features", features)  # type: ignore[method-assign]
    backbone.encode_images = encoded  # type: ignore[method-assign]
    try:
        yield made
    finally:
        Role._call, Role.features = call, features  # type: ignore[method-assign]
        del backbone.encode_images


def replay(run: Run, made: list[Any]) -> None:
    """The same passes forward and, where gradients were wanted, backward; nothing else of the update."""
    for item in made:
        if isinstance(item, Tensor):
            run.backbone.encode_images(item)
            continue
        x = item.x.clone().requires_grad_(item.through)
        with torch.set_grad_enabled(item.grad), autocast(run.device, run.recipe.training.precision):
            made_of = getattr(item.role, item.verb)(x, *item.arguments)
        if item.grad:
            value = made_of if isinstance(made_of, Tensor) else made_of.x0
            name = STUDENT if item.role is run.roles.student else FAKE_SCORE
            inputs = [x] if item.through else list(run.roles.parameters(name).values())
            value.float().mean().backward(inputs=inputs)  # type: ignore[no-untyped-call]
    for role in run.optimizers:
        for parameter in run.roles.parameters(role).values():
            parameter.grad = None


def training_overhead(run: Run, rounds: int) -> dict[str, float]:
    """Updates against their own passes: optimisers, clipping, renoising, losses and averaging count as the update's own."""
    bare, whole = [], []
    for update in range(-1, rounds):
        run.generator.manual_seed(update)
        run.update = 10**6 + update
        began = time.perf_counter()
        with recording(run.backbone) as made:
            train_update(run)
        synchronize(run.device)
        middle = time.perf_counter()
        replay(run, made)
        synchronize(run.device)
        if update >= 0:
            whole.append(middle - began)
            bare.append(time.perf_counter() - middle)
    return {"passes_seconds": sum(bare) / rounds, "update_seconds": sum(whole) / rounds, "ratio": sum(whole) / sum(bare)}


FULL = "ladder={sizes: [[128, 128]], steps: 4, spacing: 3.0}"
SWD = "ladder={sizes: [[64, 64], [80, 80], [96, 96], [128, 128]], timesteps: [1000, 896, 737, 602], allocation: [1, 1, 1, 1]}"
CASES = {
    "rmd 2+2": [],
    "tdm, full size": ["method={name: tdm, guidance_scale: 4.0}", FULL],
    "dmd2, full size": ["method={name: dmd2, guidance_scale: 4.0}", FULL],
    "swd": ["method={name: swd, guidance_scale: 4.0}", SWD],
    "swd, MMD alone": ["method={name: swd, matching_weight: 0, gan: null}", SWD],
}


def cases(batch: int, rounds: int, folder: Path) -> dict[str, dict[str, float]]:
    """Every method's training step beside its own passes, and beside each other."""
    samples = [(str(index), {"png": png_bytes(torch.rand(3, 128, 128) * 2 - 1), "txt": b"a red star"}) for index in range(batch)]
    write_shard(folder / "0.tar", samples)
    found = {}
    for name, overrides in CASES.items():
        data = [f"data={{images: {folder}}}"] if name.startswith("swd") else []
        more = [f"training.batch_size={batch}", "training.sample_every=0", *overrides, *data]
        recipe = load_recipe(ROOT / "recipes" / "bundled-rmd.yaml", more)
        found[name] = training_overhead(Run.start(recipe, load_model(recipe)), rounds)
    return found


def compared(found: dict[str, dict[str, float]], one: str, other: str) -> dict[str, float]:
    """How much longer `one`'s update takes than `other`'s, and how much longer its passes do."""
    first, second = found[one], found[other]
    return {key: first[key] / second[key] for key in ("update_seconds", "passes_seconds")}


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--batch", type=int, default=32)
    options = parser.parse_args()
    recipe = load_recipe(ROOT / "recipes" / "bundled-rmd.yaml")
    backbone = load_model(recipe)
    ladder = recipe.ladder.build(backbone)
    with tempfile.TemporaryDirectory() as folder:
        training = cases(options.batch, options.rounds, Path(folder))
    result = {
        "command": f"python benchmarks/overhead.py --rounds {options.rounds} --batch {options.batch}",
        "sampler": [sampler_overhead(backbone, ladder, batch, options.rounds) for batch in (1, 64)],
        "training": training,
        "rmd_over_tdm": compared(training, "rmd 2+2", "tdm, full size"),
        "mmd_alone_over_swd": compared(training, "swd, MMD alone", "swd"),
        "machine": describe(pick_device("auto")),
    }
    target = ROOT / "benchmarks" / "results" / "overhead.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
