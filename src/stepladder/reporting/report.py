"""Fills the report's page from figures, images and training curves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape
from torch import Tensor

from stepladder.conditioning import Conditioning
from stepladder.evaluation.tables import cells, headings
from stepladder.evaluation.world import Exam
from stepladder.export import Student
from stepladder.images import png_address, png_bytes
from stepladder.prediction import Prediction
from stepladder.reporting.charts import line_chart
from stepladder.samplers import sample
from stepladder.storage import write_text

LABELS = {"teacher": "Teacher", "naive": "Naive cascade", "swd": "SwD"}
ROWS, STRIPS = 8, 2
CURVES = {
    "student_loss": "student loss (Eq. 8)",
    "fake_score_loss": "fake-score loss (Eq. 9)",
    "student_grad_norm": "student gradient norm before clipping",
    "latent_std": "deviation of the student's latents",
}


@dataclass
class Material:
    """What a report shows."""

    student: Student
    figures: dict[str, dict[str, Any]]
    images: dict[str, Tensor]
    exam: Exam
    metrics: list[dict[str, float]]
    recipe: str
    planned_speedup: float
    facts: list[tuple[str, str]]


def embed(image: Tensor) -> str:
    """An image (3, H, W) as a data address."""
    return png_address(png_bytes(image))


def write_report(material: Material, path: Path) -> None:
    """Write the report as one HTML file that opens offline."""
    environment = Environment(loader=PackageLoader("stepladder", "reporting"), autoescape=select_autoescape(["html"]))
    figures, card = material.figures, material.student.card
    method = card["method"]
    teacher, student = figures["teacher"], figures[method]
    allocation = material.student.ladder.allocation()
    page = environment.get_template("report.html").render(
        title=f"{method.upper()} {allocation} beside its teacher",
        subtitle=f"{student['nfe']} network calls against {teacher['nfe']}, climbing from "
        f"{card['first_size'][0]} px to {card['size'][0]} px; every figure measured on this machine.",
        headline=_headline(material, teacher, student),
        names=[{"label": _label(name), "note": f"{row['nfe']} passes"} for name, row in figures.items()],
        rows=[
            {"prompt": material.exam.prompts[index], "images": [embed(images[index]) for images in material.images.values()]}
            for index in range(ROWS)
        ],
        ladder=allocation,
        cascade=[_strip(material, index) for index in range(STRIPS)],
        headings=headings(),
        table=[(_label(name), cells(row, teacher)) for name, row in figures.items()],
        figures_note=_note(teacher, student),
        charts=[line_chart(title, [row[key] for row in material.metrics if key in row]) for key, title in CURVES.items()],
        facts=material.facts,
        recipe=material.recipe,
    )
    write_text(path, page)


def _note(teacher: dict[str, Any], student: dict[str, Any]) -> str:
    decoding = 1000 * student["decode_seconds_per_image"]
    return (
        f"{teacher['samples']} held-out captions a sampler, seed {teacher['seed']}. Prompt accuracy: share of images that show "
        "every attribute of their caption at once. FID on the judge's features against held-out renders. Milliseconds are the "
        f"network's and the sampler's, median over batches; decoding adds {decoding:.1f} ms to each."
    )


def _label(name: str) -> str:
    return LABELS.get(name, name.upper())


def _headline(material: Material, teacher: dict[str, Any], student: dict[str, Any]) -> list[tuple[str, str]]:
    speedup = teacher["seconds_per_image"] / student["seconds_per_image"]
    gap = material.figures["naive"]["fid"] - teacher["fid"]
    closed = (material.figures["naive"]["fid"] - student["fid"]) / gap if gap > 0 else float("nan")
    return [
        (f"{speedup:.1f}×", f"faster than the teacher ({material.planned_speedup:.1f}× by operations)"),
        (f"{100 * student['prompt_accuracy']:.1f} %", f"prompts right; teacher {100 * teacher['prompt_accuracy']:.1f} %"),
        (f"{student['fid']:.2f}", f"FID; teacher {teacher['fid']:.2f}, naive {material.figures['naive']['fid']:.2f}"),
        (f"{100 * closed:.0f} %", "of the naive cascade's FID gap closed"),
    ]


def _strip(material: Material, index: int) -> dict[str, Any]:
    """The states and predictions of one image's way up the ladder."""
    student, exam = material.student, material.exam
    sampler = student.samplers(1)[student.card["method"]]
    states: list[dict[str, Any]] = []
    top = student.ladder.size[-1]

    def watch(number: int, x: Tensor, prediction: Prediction) -> None:
        step = student.ladder.steps[number]
        states.append(
            {
                "noisy": embed(student.backbone.decode(x.float())[0]),
                "clean": embed(student.backbone.decode(prediction.x0.float())[0]),
                "width": round(100 * step.size[-1] / top),
                "label": f"t = {step.timestep:.0f}",
            }
        )

    row: Conditioning = exam.conditioning.rows([index])
    latents = sample(sampler, student.backbone, row, exam.unconditional, [exam.seed * 1_000_000 + index], watch=watch)
    return {"states": states, "final": embed(student.backbone.decode(latents)[0]), "prompt": exam.prompts[index]}
