"""`stepladder generate`: images from an exported student, its teacher, or both side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import torch
import typer

from stepladder.data.prompts import encode_prompts, read_prompts
from stepladder.distillation import teacher_steps_of
from stepladder.errors import UserError
from stepladder.export import load_student, student_folder
from stepladder.images import grid, save_image, save_video
from stepladder.precision import pick_device, weight_dtype
from stepladder.progress import console, progress_bar
from stepladder.samplers import sample


def command(
    run: Annotated[Path, typer.Argument(help="a run's folder or an exported student")],
    prompt: Annotated[list[str] | None, typer.Option(help="a prompt; may be given several times")] = None,
    prompts: Annotated[Path | None, typer.Option(help="a file of prompts")] = None,
    out: Annotated[Path, typer.Option(help="folder for the pictures")] = Path("images"),
    sampler: Annotated[Literal["student", "teacher", "both"], typer.Option(help="who draws")] = "student",
    negative_prompt: Annotated[str, typer.Option(help="what the teacher's guidance leads away from")] = "",
    seed: Annotated[int, typer.Option(help="seed of the first image; the next ones count up")] = 0,
    count: Annotated[int, typer.Option(min=1, help="pictures a prompt")] = 1,
    teacher_steps: Annotated[int | None, typer.Option(min=1, help="steps of the teacher; its usual number by default")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
) -> None:
    """Draw images as PNG, or videos as mp4.

    Example: stepladder generate runs/rmd --prompt "a large red star top left on gray" --sampler both
    """
    texts = [*(prompt or []), *(read_prompts(prompts) if prompts else [])]
    if not texts:
        raise UserError("give at least one --prompt, or a file with --prompts")
    where = pick_device(device)
    student = load_student(student_folder(run), sampler != "student", device, dtype=weight_dtype("auto", where))
    names = {"student": [student.card["method"]], "teacher": ["teacher"], "both": ["teacher", student.card["method"]]}[sampler]
    samplers = student.samplers(teacher_steps or teacher_steps_of(student.backbone))
    size = student.backbone.pixel_size(student.ladder.size)
    conditioning = encode_prompts(student.backbone, texts, size).to(where)
    unconditional = student.backbone.unconditional(negative_prompt, size)
    with progress_bar() as bar:
        task = bar.add_task("generate", total=len(texts) * count, note="")
        for index in range(len(texts)):
            seeds = [seed + offset for offset in range(count)]
            rows = conditioning.rows([index] * count)
            drawn = [sample(samplers[name], student.backbone, rows, unconditional, seeds) for name in names]
            images = [student.backbone.decode(latents) for latents in drawn]
            for offset in range(count):
                save([each[offset] for each in images], out / f"{index:04d}-{seeds[offset]}")
            bar.advance(task, count)
    console.print(f"{len(texts) * count} pictures in {out}" + (" (teacher left, student right)" if sampler == "both" else ""))


def save(pictures: list[torch.Tensor], path: Path) -> None:
    """Pictures side by side, each (3, H, W) or a video (3, T, H, W), with the ending that fits."""
    if pictures[0].ndim == 4:
        save_video(torch.cat(pictures, dim=-1), path.with_suffix(".mp4"))
    else:
        save_image(grid(torch.stack(pictures), columns=len(pictures)), path.with_suffix(".png"))
