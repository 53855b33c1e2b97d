"""A study's page: its table, the paper's orderings, pictures, and how it was made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape

from stepladder.images import png_address
from stepladder.reporting.figures import curves_figure, png_of
from stepladder.storage import write_text

HEADINGS = {
    "prompt_accuracy": "prompts right",
    "reward": "reward",
    "trained_judge": "by the rewarding judge",
    "shape_accuracy": "shape",
    "fid": "FID",
    "diversity": "diversity",
}
DIGITS = {"fid": 2}


def columns(result: dict[str, Any]) -> list[str]:
    """The figures that some row has."""
    return [name for name in HEADINGS if any(name in row for row in result["rows"])]


def headings(result: dict[str, Any]) -> list[str]:
    """Column titles after the row's name."""
    return [*(HEADINGS[name] for name in columns(result)), "passes", "ms / image"]


def cells(row: dict[str, Any], names: Sequence[str]) -> list[tuple[str, str]]:
    """Mean and deviation of each figure as text, then passes, and network milliseconds where they were measured."""
    texts = []
    for name in names:
        digits = DIGITS.get(name, 3)
        found = row.get(name)
        texts.append((f"{found['mean']:.{digits}f}", f"{found['spread']:.{digits}f}") if found else ("", ""))
    seconds = row.get("seconds_an_image")
    passes = str(row["runs"][0]["nfe"]) if row["runs"] else ""
    return [*texts, (passes, ""), (f"{1000 * seconds:.1f}" if seconds else "", "")]


def write_page(result: dict[str, Any], pictures: dict[str, Path], captions: Sequence[str], path: Path) -> None:
    """Write a study's page as one HTML file that opens offline.

    Args:
        pictures: a strip of images a row, for the same captions and seed.
    """
    environment = Environment(loader=PackageLoader("stepladder", "reporting"), autoescape=select_autoescape(["html"]))
    names = columns(result)
    page = environment.get_template("study.html").render(
        result=result,
        note=f"Mean over {len(result['seeds'])} seeds of {result['captions_a_seed']} held-out captions each.",
        headings=headings(result),
        rows=[(row["name"], cells(row, names)) for row in result["rows"]],
        claims=[{**claim, "said": _said(claim), "figure": HEADINGS[claim["figure"]]} for claim in result["claims"]],
        curves=png_address(png_of(curves_figure(result, HEADINGS))) if result.get("drawn") else "",
        pictures=[(name, png_address(file.read_bytes())) for name, file in pictures.items()],
        captions=" · ".join(captions),
        made=f"{result['updates']} updates of {result['batch_size']} a row and seed; seeds {', '.join(map(str, result['seeds']))}; "
        f"{result['seconds'] / 60:.0f} min in all on {result['machine']}. Milliseconds are the network's, batch 64, median of "
        "rounds that go over all rows in turn.",
    )
    write_text(path, page)


def _said(claim: dict[str, Any]) -> str:
    digits = DIGITS.get(claim["figure"], 3)
    return f"{claim['difference']:+.{digits}f} ± {claim['standard_error']:.{digits}f}"
