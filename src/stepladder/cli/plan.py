"""`stepladder plan`: what a ladder costs and saves, before any training and without weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from stepladder.backbones import releases, sketch_backbone
from stepladder.backbones.base import Backbone, Release
from stepladder.distillation import teacher_steps_of
from stepladder.errors import UserError
from stepladder.ladder import PRESETS
from stepladder.planning import Plan, TrainingSetup, plan_ladder, plan_memory, search_ladders
from stepladder.training.recipe import LadderPart, load_recipe
from stepladder.world.paths import resolve_model

GIB = 2**30


def command(
    name: Annotated[
        str, typer.Argument(help="sdxl, flux, wan-14b …, `bundled`, a diffusers folder, a hub id, or a recipe")
    ] = "bundled",
    sizes: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH of each rung, or one side: 512,1024")] = None,
    timesteps: Annotated[str | None, typer.Option(help="the teacher's timesteps, falling: 1000,750,500,250")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="steps of the ladder")] = None,
    logsnr: Annotated[str | None, typer.Option(help="thresholds between rungs, rising: -6,-2.5")] = None,
    shift: Annotated[
        Literal["flow", "exact", "printed", "none"] | None, typer.Option(help="how a rung's timestep follows (Eq. 2)")
    ] = None,
    spacing: Annotated[float | None, typer.Option(min=0.01, help="shift of the teacher's timesteps: 3 SD3.5, 5 Wan")] = None,
    teacher_steps: Annotated[int | None, typer.Option(min=1, help="steps of the teacher's own sampler")] = None,
    lora_rank: Annotated[int | None, typer.Option(min=1, help="rank of the adapters, for memory; 64")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="training batch, for memory; 1")] = None,
    checkpointing: Annotated[bool | None, typer.Option(help="gradient checkpointing, for memory; on")] = None,
    gpus: Annotated[int, typer.Option(min=1, help="for memory: as if training were sharded over so many, which it is not yet")] = 1,
    speedup: Annotated[float | None, typer.Option(help="list ladders that reach this speedup over the teacher")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Show a ladder's schedule, operations, speedup and memory, from the model's architecture alone.

    Example: stepladder plan sdxl --sizes 256,512,1024 --logsnr=-2.5,0
    """
    backbone, part = subject(name)
    setup = _setup(name, {"lora_rank": lora_rank, "batch_size": batch, "gradient_checkpointing": checkpointing, "gpus": gpus})
    changes: dict[str, Any] = {"shift": shift, "spacing": spacing, "steps": steps}
    if timesteps is not None:
        changes["timesteps"] = _numbers(timesteps, "--timesteps")
    elif steps is not None or spacing is not None:
        part = part.model_copy(update={"timesteps": None})
    if sizes is not None:
        changes["sizes"] = [_size(text) for text in sizes.split(",")]
    if logsnr is not None:
        changes["thresholds"] = _numbers(logsnr, "--logsnr")
    part = part.model_copy(update={key: value for key, value in changes.items() if value is not None})
    count = teacher_steps or teacher_steps_of(backbone)
    if speedup is not None:
        found = search_ladders(backbone, tuple(part.sizes[-1]), count, part.spacing, speedup, part.shift)
        if not found:
            raise UserError(f"no ladder of two to eight steps makes {name} {speedup:g} × faster; ask for less")
        typer.echo(json.dumps({"ladders": found}, indent=2)) if as_json else _print_search(found, name, speedup)
        return
    ladder = part.build(backbone)
    plan = plan_ladder(backbone, ladder, count)
    memory = plan_memory(backbone, ladder.size, setup)
    if as_json:
        typer.echo(json.dumps({**plan.as_json(), "memory": memory}, indent=2))
    else:
        words = f"batch {setup.batch_size}, rank {setup.lora_rank}" + ("" if setup.gradient_checkpointing else ", no checkpointing")
        _print(plan, memory, name, words + (f", each of {gpus} GPUs if sharded" if gpus > 1 else ""))


def _setup(name: str, said: dict[str, Any]) -> TrainingSetup:
    """What the options say, else what a recipe says, else the defaults."""
    own: dict[str, Any] = {}
    if name.endswith((".yaml", ".yml")):
        recipe = load_recipe(Path(name))
        own = {
            "lora_rank": recipe.roles.lora_rank,
            "batch_size": recipe.training.batch_size,
            "gradient_checkpointing": recipe.roles.gradient_checkpointing,
        }
    return TrainingSetup(**own | {key: value for key, value in said.items() if value is not None})


def subject(name: str) -> tuple[Backbone, LadderPart]:
    """The model that a name, a folder, a hub id or a recipe means, without weights, and the ladder it is planned with."""
    if name.endswith((".yaml", ".yml")):
        recipe = load_recipe(Path(name))
        return sketch_backbone(resolve_model(recipe.model.path), recipe.model.max_sequence_length), recipe.ladder
    known = releases()
    if name not in known and name != "bundled" and "/" not in name and not Path(name).exists():
        raise UserError(
            f"{name} is neither a known model ({', '.join(sorted(known))}, bundled), nor a folder, a hub id or a recipe"
        )
    backbone = sketch_backbone(resolve_model(name), 1 if name == "bundled" else None)
    for short, (_, release) in known.items():
        if short == name or release.hub_id == backbone.source:
            return backbone, ladder_of(release)
    size = backbone.default_size
    half = (*size[:-2], *(side // 2 for side in size[-2:]))
    preset = next((release.preset for release in backbone.releases.values()), "sd35")
    return backbone, LadderPart(preset=preset, sizes=[half, size])  # type: ignore[arg-type]


def ladder_of(release: Release) -> LadderPart:
    """The ladder a release is planned with."""
    sizes = release.rungs or PRESETS[release.preset].sizes
    return LadderPart(preset=release.preset, sizes=[tuple(size) for size in sizes])  # type: ignore[arg-type, misc]


def _numbers(text: str, option: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"{option} takes numbers with commas between them, not {text!r}") from error


def _size(text: str) -> tuple[int, ...]:
    try:
        sides = tuple(int(part) for part in text.lower().split("x"))
    except ValueError as error:
        raise UserError(f"--sizes takes 512,1024 or HEIGHTxWIDTH such as 480x832,720x1280, not {text!r}") from error
    return sides * 2 if len(sides) == 1 else sides


def _print(plan: Plan, memory: dict[str, Any], name: str, setup: str) -> None:
    table = Table(title=f"The ladder of {name}")
    small = max(step["tflops"] for step in plan.steps) < 0.1
    for column in ("step", "teacher t", "rung t", "width × height", "GFLOPs" if small else "TFLOPs"):
        table.add_column(column, justify="right")
    for number, step in enumerate(plan.steps, start=1):
        size = f"{step['width']} × {step['height']}" + (f" × {step['frames']}" if step["frames"] > 1 else "")
        work = f"{step['tflops'] * (1000 if small else 1):.2f}"
        table.add_row(str(number), f"{step['teacher_timestep']:.0f}", f"{step['timestep']:.0f}", size, work)
    console = Console()
    console.print(table)
    console.print(
        f"{plan.speedup_over_teacher:.1f} × the teacher's speed, {plan.speedup_over_full_resolution:.2f} × that of as many "
        f"full-size steps (network operations)\n{_amount(plan.parameters)} parameters"
    )
    cards = Table(title=f"Memory ({setup})")
    unit, unit_bytes = ("GiB", GIB) if memory["generate"] >= 0.1 * GIB else ("MiB", GIB // 1024)
    for column in ("to", unit, "fits"):
        cards.add_column(column, justify="right" if column == unit else "left")
    words = {
        "generate": "generate, prompts encoded",
        "generate_with_text_encoders": "generate, text encoders kept",
        "train_lora": "train adapters",
        "train_full": "train whole copies",
    }
    for key, word in words.items():
        cards.add_row(word, f"{memory[key] / unit_bytes:.1f}", ", ".join(memory["fits"][key]) or "none of the common cards")
    console.print(cards)


def _amount(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


def _print_search(found: list[dict[str, Any]], name: str, speedup: float) -> None:
    table = Table(title=f"Ladders that make {name} at least {speedup:g} × faster, the closest first")
    for column in ("speedup", "steps", "sizes", "--logsnr", "rung timesteps"):
        table.add_column(column)
    for each in found[:20]:
        table.add_row(
            f"{each['speedup_over_teacher']:.1f}",
            each["allocation"],
            " → ".join("×".join(map(str, size)) for size in each["sizes"]),
            ", ".join(f"{value:g}" for value in each["thresholds"]),
            ", ".join(f"{value:.0f}" for value in each["timesteps"]),
        )
    Console().print(table)
