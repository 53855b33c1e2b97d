"""`stepladder export`: a student from a run's checkpoint, or from an export to another folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stepladder.distillation import export_run, load_model
from stepladder.progress import console
from stepladder.training.recipe import load_recipe
from stepladder.training.trainer import RECIPE_FILE, Run, latest_state


def command(
    run: Annotated[Path, typer.Argument(help="a run's folder")],
    out: Annotated[Path | None, typer.Option(help="where to write; RUN/student by default")] = None,
) -> None:
    """Export the averaged student of a run's newest checkpoint: weights and ladder, for diffusers and `generate`.

    Example: stepladder export runs/rmd --out my-student
    """
    recipe = load_recipe(run / RECIPE_FILE)
    state, path = latest_state(run)
    loaded = Run.start(recipe, load_model(recipe))
    loaded.restore(state, path)
    target = export_run(loaded, out or run / "student")
    console.print(f"exported update {loaded.update} to {target}")
