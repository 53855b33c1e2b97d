"""`stepladder`: the commands, and the one place where errors become exit codes."""

from __future__ import annotations

import logging
import os
import sys
import warnings

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import typer

from stepladder.errors import UserError

app = typer.Typer(
    name="stepladder",
    help="Few steps, climbing resolutions: distil diffusion models into fast cascaded generators.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _register() -> None:
    if app.registered_commands:
        return
    from stepladder.cli import bench, demo, distill, evaluate, export, generate, plan, reproduce, spectrum, synthesize, teach

    for module in (demo, plan, distill, generate, evaluate, export, synthesize, spectrum, reproduce, teach):
        app.command(name=module.__name__.rsplit(".", 1)[-1])(module.command)
    app.add_typer(bench.app, name="bench")


def main() -> None:
    """Run a command; bad input ends with one sentence and exit code 2."""
    warnings.filterwarnings("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    _register()
    try:
        app()
    except UserError as error:
        typer.echo(f"stepladder: {error}", err=True)
        sys.exit(2)
    except OSError as error:
        typer.echo(f"stepladder: {error}; check that the disk has room and the folder may be written", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
