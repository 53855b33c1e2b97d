"""`stepladder reproduce`: a paper's table at the bundled teacher's size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from stepladder.errors import UserError
from stepladder.reporting.study import HEADINGS, cells, columns, headings, write_page
from stepladder.reproduction.runner import PICTURES, Bench, reproduce
from stepladder.reproduction.studies import STUDIES

LIST = "; ".join(f"{name} ({study.source})" for name, study in STUDIES.items())


def command(
    name: Annotated[str, typer.Argument(help=f"the table: {LIST}")],
    out: Annotated[Path, typer.Option(help="folder of NAME.json and NAME.html")] = Path("runs/reproduce"),
    work: Annotated[Path, typer.Option(help="folder of trainings and pictures, shared by all tables")] = Path(
        "runs/reproduce/work"
    ),
    seeds: Annotated[str, typer.Option(help="seeds, with commas between")] = "0,1,2",
    count: Annotated[int, typer.Option(min=16, help="held-out captions a row and seed")] = 512,
    updates: Annotated[int | None, typer.Option(min=1, help="updates a row, instead of the table's own number")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of tables")] = False,
) -> None:
    """Regenerate a table: train each row with each seed, measure on held-out captions, check the paper's orderings.

    What is done already in --work, or for the same recipes in --out, is kept: run the same command again to continue.

    Example: stepladder reproduce methods --out runs/reproduce
    """
    if name not in STUDIES:
        raise UserError(f"there is no table {name!r}; choose one of {', '.join(STUDIES)}")
    study, bench = STUDIES[name], Bench(work, count, updates)
    options = f" --updates {updates}" if updates is not None else ""
    said = f"stepladder reproduce {name} --seeds {seeds} --count {count}{options}"
    result = reproduce(name, study, bench, _numbers(seeds), out, said)
    pictures = {row["name"]: work / "figures" / f"{row['runs'][0]['key']}.png" for row in result["rows"] if row["runs"]}
    captions = bench.exam(_numbers(seeds)[0]).prompts[:PICTURES]
    page = out / f"{name}.html"
    write_page(result, {row: file for row, file in pictures.items() if file.exists()}, captions, page)
    if as_json:
        typer.echo(json.dumps(result, indent=1))
        return
    console = Console()
    console.print(_table(result))
    for claim in result["claims"]:
        console.print(f"{claim['verdict']}: {claim['better']} before {claim['worse']} in {HEADINGS[claim['figure']]}")
    console.print(f"page: {page}   figures: {out / f'{name}.json'}")


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"--seeds takes whole numbers with commas between them, not {text!r}") from error
    if len(set(numbers)) != len(numbers):
        raise UserError(f"--seeds names a seed twice: {text}; a spread needs different ones")
    return numbers


def _table(result: dict[str, Any]) -> Table:
    names = columns(result)
    table = Table(title=f"{result['title']} ({result['source']}), {len(result['seeds'])} seeds")
    table.add_column("")
    for heading in headings(result):
        table.add_column(heading, justify="right")
    for row in result["rows"]:
        texts = [f"{value} ± {spread}" if spread else value for value, spread in cells(row, names)]
        table.add_row(row["name"], *texts)
    return table
