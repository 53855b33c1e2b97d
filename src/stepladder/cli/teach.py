"""`stepladder teach`: remake the bundled teacher and its judge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stepladder.progress import console
from stepladder.world.paths import BUNDLED
from stepladder.world.teach import Lessons, teach

DEFAULT = Lessons()


def command(
    work: Annotated[Path, typer.Option(help="folder of checkpoints; call again to resume")] = Path("runs/teach"),
    out: Annotated[Path, typer.Option(help="where the finished teacher and judge go")] = BUNDLED,
    seed: Annotated[int, typer.Option(help="seed of everything")] = 0,
    judge: Annotated[int, typer.Option(min=1, help="updates of the judge")] = DEFAULT.judge,
    autoencoder: Annotated[int, typer.Option(min=1, help="updates of the autoencoder")] = DEFAULT.autoencoder,
    text: Annotated[int, typer.Option(min=1, help="updates of the text encoders")] = DEFAULT.text,
    scenes: Annotated[int, typer.Option(min=64, help="renders the transformer learns from")] = DEFAULT.scenes,
    low: Annotated[int, typer.Option(min=1, help="updates of the transformer at 64 px")] = DEFAULT.low,
    full: Annotated[int, typer.Option(min=1, help="updates of the transformer at 128 px")] = DEFAULT.full,
    polish: Annotated[int, typer.Option(min=1, help="last updates, with more of the hardest shape")] = DEFAULT.polish,
) -> None:
    """Teach the world's judge and teacher from nothing; resumable.

    Example: stepladder teach --work runs/teach --out runs/teacher
    """
    teach(work, out, Lessons(judge, autoencoder, text, scenes, low, full, polish), seed)
    console.print(f"teacher and judge written to {out}")
