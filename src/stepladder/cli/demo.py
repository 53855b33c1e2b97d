"""`stepladder demo`: distil the bundled teacher, measure, and write a report."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

from stepladder.distillation import distill
from stepladder.errors import UserError
from stepladder.evaluation.tables import table
from stepladder.evaluation.world import examine_all
from stepladder.export import load_student
from stepladder.planning import plan_ladder
from stepladder.precision import describe, pick_device
from stepladder.progress import console
from stepladder.reporting.report import Material, write_report
from stepladder.storage import write_text
from stepladder.training.logs import read_metrics
from stepladder.training.recipe import load_recipe
from stepladder.training.trainer import RECIPE_FILE
from stepladder.world.captions import captions
from stepladder.world.paths import BUNDLED
from stepladder.world.scenes import draw_scenes

RECIPE = BUNDLED.parent / "rmd.yaml"
PROMPTS = 4000


def command(
    out: Annotated[Path, typer.Option(help="folder for the run, metrics.json and report.html")] = Path("runs/demo"),
    count: Annotated[int, typer.Option(min=16, help="held-out captions to measure on, one image each")] = 512,
    seed: Annotated[int, typer.Option(help="seed of captions and noise of the measurement")] = 0,
    teacher_steps: Annotated[int, typer.Option(min=1, help="steps of the teacher")] = 28,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="override the recipe, e.g. training.updates=2000")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue a demo that was interrupted")] = False,
) -> None:
    """Distil the bundled teacher on this machine and see the student beside it.

    Example: stepladder demo --out runs/demo
    """
    began = time.monotonic()
    run = out / "run"
    if (out / "report.html").exists():
        raise UserError(f"{out} already holds a finished demo; choose another folder with --out")
    if out.is_dir() and any(out.iterdir()) and not resume:
        raise UserError(f"{out} is not empty; add --resume to continue a demo there or choose another folder with --out")
    prompts = out / "prompts.txt"
    recipe = load_recipe(RECIPE, overrides or [])
    write_text(prompts, "\n".join(captions(draw_scenes(PROMPTS, 1), 1)) + "\n")
    recipe.data.prompts = prompts.resolve()
    console.print(f"distilling the bundled teacher: {recipe.training.updates} updates")
    folder = distill(recipe, run, resume and (run / RECIPE_FILE).exists())
    trained = time.monotonic()
    student = load_student(folder, device=recipe.training.device)
    figures, images, exam = examine_all(student.samplers(teacher_steps), student.backbone, count, seed)
    finished = time.monotonic()
    write_text(out / "metrics.json", json.dumps({"samplers": figures, "seconds": {"train": trained - began}}, indent=2))
    plan = plan_ladder(student.backbone, student.ladder, teacher_steps)
    facts = _facts(trained - began, finished - trained, len(images) * count, recipe.training.updates)
    text = yaml.safe_dump(recipe.model_dump(mode="json", exclude={"data"}), sort_keys=False)
    metrics = read_metrics(run)
    write_report(Material(student, figures, images, exam, metrics, text, plan.speedup_over_teacher, facts), out / "report.html")
    Console().print(table(figures))
    Console().print(f"report: {out / 'report.html'}   figures: {out / 'metrics.json'}   {finished - began:.0f} s in all")


def _facts(training: float, measuring: float, images: int, updates: int) -> list[tuple[str, Any]]:
    return [
        ("training", f"{updates} updates in {training:.0f} s, loading included"),
        ("measuring", f"{images} images in {measuring:.0f} s"),
        ("machine", describe(pick_device("auto"))),
    ]
