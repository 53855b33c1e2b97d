"""`stepladder export`: a student from a run's checkpoint, for diffusers, for ComfyUI, or merged into its base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from stepladder.backbones import sketch_backbone
from stepladder.backbones.loading import read_json
from stepladder.distillation import export_run, load_model
from stepladder.errors import UserError
from stepladder.export import export_comfyui, export_merged, load_student, read_card, read_scheduler, read_weights
from stepladder.progress import console
from stepladder.training.recipe import load_recipe
from stepladder.training.trainer import RECIPE_FILE, Run, latest_state
from stepladder.world.paths import resolve_model


def command(
    run: Annotated[Path, typer.Argument(help="a run's folder")],
    out: Annotated[Path | None, typer.Option(help="where to write; RUN/student, RUN/comfyui or RUN/merged by default")] = None,
    format: Annotated[Literal["diffusers", "comfyui", "merged"], typer.Option(help="who will load it")] = "diffusers",
) -> None:
    """Export the averaged student of a run's newest checkpoint: weights and ladder.

    diffusers: LoRA (or the whole network) and a scheduler configuration, also what `generate` loads. comfyui: one LoRA file.
    merged: a complete pipeline folder. What `evaluate` measured of this student goes into the card.

    Example: stepladder export runs/rmd --format comfyui
    """
    recipe = load_recipe(run / RECIPE_FILE)
    if format == "comfyui" and recipe.roles.mode != "lora":
        raise UserError("this run trained whole networks, and ComfyUI's format is for LoRAs; use --format merged")
    state, path = latest_state(run)
    loaded = Run.start(recipe, load_model(recipe))
    loaded.restore(state, path)
    measured = run / "evaluation" / "metrics.json"
    found = read_json(measured) if measured.exists() else {}
    # what was measured of an earlier student is not this one's
    figures = found["samplers"] if found.get("updates") == loaded.update else None
    student = export_run(loaded, out if out is not None and format == "diffusers" else run / "student", figures)
    target = student if format == "diffusers" else out or run / format
    if format == "comfyui":
        card = read_card(student)
        sketch = sketch_backbone(resolve_model(card["model"]))
        export_comfyui(sketch, read_weights(student, card, sketch), read_scheduler(student), card, target)
    if format == "merged":
        export_merged(load_student(student, with_teacher=False, device="cpu"), read_scheduler(student), target)
    console.print(f"exported update {loaded.update} to {target}")
