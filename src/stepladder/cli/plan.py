"""`stepladder plan`: what a ladder costs and saves, before any training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from stepladder.backbones import load_backbone
from stepladder.planning import Plan, plan_ladder
from stepladder.training.recipe import LadderPart, load_recipe
from stepladder.world.paths import resolve_model


def command(
    name: Annotated[str, typer.Argument(help="`bundled`, a diffusers folder, or a recipe")] = "bundled",
    teacher_steps: Annotated[int, typer.Option(min=1, help="steps of the teacher's own sampler")] = 28,
    logsnr: Annotated[float, typer.Option(help="threshold between two rungs (not used with a recipe)")] = -2.5,
    steps: Annotated[int, typer.Option(min=1, help="steps of the ladder (not used with a recipe)")] = 4,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Show a ladder's schedule, operations, speedup and memory.

    Example: stepladder plan bundled --json
    """
    if name.endswith((".yaml", ".yml")):
        recipe = load_recipe(Path(name))
        backbone = load_backbone(resolve_model(recipe.model.path), recipe.model.max_sequence_length)
        part, rank = recipe.ladder, recipe.roles.lora_rank
    else:
        backbone = load_backbone(resolve_model(name), 1 if name == "bundled" else 256)
        height, width = backbone.default_size
        part = LadderPart(sizes=[(height // 2, width // 2), (height, width)], steps=steps, spacing=3.0, thresholds=[logsnr])
        rank = 64
    plan = plan_ladder(backbone, part.build(backbone), teacher_steps, lora_rank=rank)
    if as_json:
        typer.echo(json.dumps(plan.as_json(), indent=2))
    else:
        _print(plan, name)


def _print(plan: Plan, name: str) -> None:
    table = Table(title=f"The ladder of {name}")
    for column in ("step", "teacher t", "rung t", "size", "GFLOPs"):
        table.add_column(column, justify="right")
    for number, step in enumerate(plan.steps, start=1):
        size = f"{step['width']} × {step['height']}"
        table.add_row(
            str(number), f"{step['teacher_timestep']:.0f}", f"{step['timestep']:.0f}", size, f"{step['tflops'] * 1000:.2f}"
        )
    console = Console()
    console.print(table)
    console.print(
        f"{plan.speedup_over_teacher:.1f} × the teacher's speed, {plan.speedup_over_full_resolution:.2f} × that of as many "
        f"full-size steps (network operations)\n{plan.parameters / 1e6:.1f} M parameters; weights and optimiser to train: "
        f"{plan.memory['train_lora'] / 2**20:.0f} MiB with adapters, {plan.memory['train_full'] / 2**20:.0f} MiB with copies"
    )
