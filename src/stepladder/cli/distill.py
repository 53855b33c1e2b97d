"""`stepladder distill`: train a student from a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stepladder.distillation import distill, dry_run
from stepladder.progress import console
from stepladder.training.recipe import load_recipe


def command(
    recipe: Annotated[Path, typer.Argument(help="a YAML recipe, see recipes/")],
    out: Annotated[Path, typer.Option(help="the run's folder")] = Path("runs/rmd"),
    overrides: Annotated[list[str] | None, typer.Option("--set", help="override a key, e.g. training.updates=500")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue where the run in --out stopped, bit for bit")] = False,
    dry: Annotated[bool, typer.Option("--dry-run", help="validate everything and say what would be done")] = False,
) -> None:
    """Distil a student.

    Example: stepladder distill recipes/bundled-rmd.yaml --out runs/rmd --set training.updates=500
    """
    loaded = load_recipe(recipe, overrides or [])
    if dry:
        for line in dry_run(loaded):
            console.print(line)
        return
    student = distill(loaded, out, resume)
    console.print(f"student written to {student}; look at it with: stepladder generate {out} --prompt '…'")
