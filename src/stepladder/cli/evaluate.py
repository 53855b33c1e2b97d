"""`stepladder evaluate`: a student against its teacher and the naive cascade."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from stepladder.errors import UserError
from stepladder.evaluation.tables import table
from stepladder.evaluation.world import examine_all
from stepladder.export import load_student, student_folder
from stepladder.images import save_grid
from stepladder.storage import write_text


def command(
    run: Annotated[Path, typer.Argument(help="a run's folder or an exported student")],
    count: Annotated[int, typer.Option(min=16, help="held-out captions, one image each")] = 512,
    seed: Annotated[int, typer.Option(help="seed of captions and noise")] = 0,
    teacher_steps: Annotated[int, typer.Option(min=1, help="steps of the teacher")] = 28,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a table")] = False,
) -> None:
    """Measure prompt accuracy, FID, diversity and time on held-out captions of the bundled world.

    Example: stepladder evaluate runs/rmd --count 512 --json
    """
    folder = student_folder(run)
    student = load_student(folder, device=device)
    if student.card["model"] != "bundled":
        raise UserError("evaluate reads images with the world's judge, which knows the bundled teacher's pictures only")
    figures, images, _ = examine_all(student.samplers(teacher_steps), student.backbone, count, seed)
    target = run / "evaluation"
    found = json.dumps({"updates": student.card["updates"], "samplers": figures}, indent=2)
    write_text(target / "metrics.json", found)
    save_grid(torch.cat([each[:8] for each in images.values()]), target / "samples.png", columns=8)
    if as_json:
        typer.echo(found)
    else:
        Console().print(table(figures))
        Console().print(f"pictures and figures in {target}")
