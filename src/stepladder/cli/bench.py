"""`stepladder bench`: how long things take on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console
from rich.table import Table

from stepladder.backbones import releases, sketch_backbone
from stepladder.cli.plan import subject
from stepladder.distillation import teacher_steps_of
from stepladder.latency import LatencySetup, measure, medians
from stepladder.planning import plan_ladder
from stepladder.precision import pick_device, weight_dtype
from stepladder.storage import write_text

app = typer.Typer(help="Measure time on this machine.", no_args_is_help=True)
PARTS = ("teacher", "full", "ladder", "text_encoders", "decode")


@app.callback()
def group() -> None:
    """Measure time on this machine."""


@app.command("latency")
def latency(
    name: Annotated[
        str, typer.Argument(help="what stepladder plan takes: sdxl, wan-14b, bundled, a folder, a recipe …")
    ] = "bundled",
    batch: Annotated[list[int] | None, typer.Option(min=1, help="batch size; may be given several times")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="runs of which the median is taken")] = 5,
    warmup: Annotated[int, typer.Option(min=0, help="runs before them")] = 1,
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile the network")] = False,
    tiny_vae: Annotated[bool, typer.Option("--tiny-vae", help="time a TAESD-sized decoder instead of the VAE")] = False,
    dtype: Annotated[Literal["auto", "bf16", "fp32"], typer.Option(help="of weights; auto is bf16 on a GPU")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    teacher_steps: Annotated[int | None, typer.Option(min=1, help="steps of the teacher's own sampler")] = None,
    out: Annotated[Path | None, typer.Option(help="write the figures as JSON here too")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Time teacher, full-resolution few-step and ladder side by side on random weights, which cost what trained ones cost.

    Text encoders and decoder are timed apart. No weights are downloaded.

    Example: stepladder bench latency sdxl --batch 1 --batch 8 --out benchmarks/results/latency-sdxl.json
    """
    sketch, part = subject(name)
    where = pick_device(device)
    weights = weight_dtype(dtype, where)
    real = sketch_backbone(sketch.source, sketch.max_sequence_length, where, weights)
    ladder = part.build(real)
    steps = teacher_steps or teacher_steps_of(real)
    guidance = next((release.guidance_scale for _, release in releases().values() if release.hub_id == real.source), 4.0)
    setup = LatencySetup(tuple(batch or (1, 8)), rounds, warmup, compile, tiny_vae, "fp32" if weights == torch.bfloat16 else "auto")
    figures = {"model": name, **measure(real, ladder, steps, guidance, setup)}
    figures["planned_speedup"] = plan_ladder(sketch, ladder, steps).speedup_over_teacher
    if out is not None:
        write_text(out, json.dumps(figures, indent=2) + "\n")
    if as_json:
        typer.echo(json.dumps(figures, indent=2))
        return
    table = Table(title=f"{name}, {figures['allocation']}, {figures['device']}: milliseconds a batch")
    for column in ("batch", f"teacher ({steps})", "full steps", "ladder", "text", "decode", "over teacher", "planned"):
        table.add_column(column, justify="right")
    for row in figures["rows"]:
        speedups = (f"{row['speedup_over_teacher']:.1f} ×", f"{figures['planned_speedup']:.1f} ×")
        table.add_row(str(row["batch"]), *medians(row, PARTS), *speedups)
    Console().print(table)
