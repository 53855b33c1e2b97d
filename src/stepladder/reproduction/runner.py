"""Trains, samples and measures a study's rows, seed by seed, and keeps what is done."""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from stepladder.backbones.base import Backbone
from stepladder.conditioning import Conditioning
from stepladder.distillation import BUNDLED_STEPS, load_model
from stepladder.evaluation.metrics import prompt_accuracy
from stepladder.evaluation.world import Exam, examine, measure, set_exam
from stepladder.fingerprint import fingerprint
from stepladder.images import grid, save_image
from stepladder.ladder import Ladder, full_resolution
from stepladder.precision import autocast, describe, pick_device, synchronize
from stepladder.prediction import Prediction
from stepladder.progress import console
from stepladder.renoise import combine, gaussian
from stepladder.reproduction.studies import Claim, Row, Study
from stepladder.resample import resize, shrink
from stepladder.rewards.judge import JudgeReward
from stepladder.roles import STUDENT, Role, load_parameters
from stepladder.samplers import Sampler, sample
from stepladder.sampling import cascade
from stepladder.storage import save_tensors, write_text
from stepladder.synthesis import Synthesis, synthesize
from stepladder.training.recipe import Recipe, parse_recipe
from stepladder.training.trainer import RECIPE_FILE, Run, begin, checkpoints, latest_state, train
from stepladder.world.captions import captions
from stepladder.world.judge import Judge, load_judge, train_judge
from stepladder.world.paths import BUNDLED
from stepladder.world.render import render
from stepladder.world.scenes import draw_scenes
from stepladder.world.teach import remember

BASE = BUNDLED.parent / "rmd.yaml"
PROMPTS, IMAGES = 4000, 1024
BATCH = 16
PICTURES = 6
FIGURES = ("prompt_accuracy", "reward", "trained_judge", "shape_accuracy", "fid", "diversity")
SECOND_JUDGE_UPDATES = 700
LOWER_IS_BETTER = ("fid",)


@dataclass
class Bench:
    """Where a study works: its folder, its base model, and what is made there once for all rows.

    count: held-out captions a row and seed · updates: instead of the study's own number.
    """

    folder: Path
    count: int
    updates: int | None = None
    exams: dict[int, Exam] = field(default_factory=dict)

    @cached_property
    def backbone(self) -> Backbone:
        """The bundled teacher, with its text encoders and VAE."""
        backbone = load_model(self.recipe(Row("base"), 0, 1))
        backbone.to(pick_device("auto"))
        return backbone

    @cached_property
    def teacher(self) -> str:
        """What all figures are of."""
        return fingerprint(self.backbone.network)

    @cached_property
    def prompts(self) -> Path:
        """The training captions, as `stepladder demo` draws them."""
        path = self.folder / "prompts.txt"
        write_text(path, "\n".join(captions(draw_scenes(PROMPTS, 1), 1)) + "\n")
        return path

    @cached_property
    def images(self) -> Path:
        """The teacher's pictures of the first training captions."""
        folder, texts = self.folder / "images", self.prompts.read_text(encoding="utf-8").splitlines()[:IMAGES]
        wanted = Synthesis(BUNDLED_STEPS, 4.0, self.backbone.default_size, shard_size=128)
        synthesize(self.backbone, texts, folder, wanted, batch=64)
        return folder

    @cached_property
    def second_judge(self) -> Judge:
        """A judge that no training sees, taught from another start with other scenes."""
        path = self.folder / "second-judge.safetensors"
        if not path.exists():
            tell = train_judge(self.folder / "second-judge", SECOND_JUDGE_UPDATES, seed=1, name="second-judge")
            save_tensors(path, dict(tell.state_dict()))
        return load_judge(path)

    def exam(self, seed: int, unseen: bool = False) -> Exam:
        """Held-out captions of a seed, drawn once; judged by the bundled judge, or by one that no training sees."""
        if seed not in self.exams:
            self.exams[seed] = set_exam(self.backbone, self.count, seed)
        return replace(self.exams[seed], judge=self.second_judge) if unseen else self.exams[seed]

    def recipe(self, row: Row, seed: int, updates: int) -> Recipe:
        """The bundled recipe with a row's changes, a seed, and the size of all rows' training."""
        tree = yaml.safe_load(BASE.read_text(encoding="utf-8"))
        for section, change in row.changes.items():
            tree[section] = dict(change) if section == "method" else {**tree.get(section, {}), **change}
        wants_images = tree["data"].get("images") is not None
        tree["data"] = {"images": str(self.images.resolve())} if wants_images else {"prompts": str(self.prompts.resolve())}
        size = {"updates": max(1, updates), "batch_size": BATCH, "seed": seed, "sample_every": 0, "checkpoint_every": 50}
        tree["training"] = {**tree["training"], **size}
        if row.begin is not None:
            tree["training"]["start_from"] = str(self.run_folder(row.begin, self.beginning(row.begin, seed)).resolve())
        return parse_recipe(tree)

    def length(self, row: Row, study: Study) -> int:
        """Updates of a student's row, with those of the row that it begins with."""
        if self.updates is None:
            return row.updates or study.updates
        return self.updates * (2 if row.begin is not None else 1)

    def beginning(self, row: Row, seed: int) -> Recipe:
        """The recipe of a row that others begin with."""
        assert row.updates is not None
        return self.recipe(row, seed, self.updates or row.updates)

    def course(self, row: Row, recipe: Recipe) -> str:
        """What a row's training depends on but its length: its recipe, and that of the row that it begins with."""
        if row.begin is None:
            return recipe.identity()
        before = self.beginning(row.begin, recipe.training.seed)
        return f"{recipe.identity()}-after-{before.identity()}-{before.training.updates}"

    def run_folder(self, row: Row, recipe: Recipe) -> Path:
        """Where a row is trained; rows that differ in length only are one run."""
        length = f"of-{self.updates}" if self.updates is not None else ""
        return self.folder / "runs" / length / self.course(row, recipe)


def run_row(bench: Bench, study: Study, row: Row, seed: int) -> dict[str, Any]:
    """A row's figures with one seed: of its training, of the captions and of all noise."""
    updates = bench.length(row, study) if row.kind == "student" else 1
    recipe = bench.recipe(row, seed, updates)
    key = _key(bench, study, row, recipe)
    done = bench.folder / "figures" / f"{key}.json"
    if done.exists():
        found: dict[str, Any] = json.loads(done.read_text(encoding="utf-8"))
        return found
    began = time.monotonic()
    if row.kind == "noised":
        figures, images = _finish_noised(bench, row, seed)
    else:
        role = _train(bench, row, recipe) if row.kind == "student" else _base_role(bench)
        exam = bench.exam(seed, study.unseen)
        figures, images = examine(sampler_of(bench, row, recipe, role), bench.backbone, exam)
        if study.unseen:
            figures["trained_judge"] = prompt_accuracy(load_judge(), images, exam.scenes)["prompt_accuracy"]
            with torch.no_grad():
                figures["reward"] = JudgeReward(load_judge())(images, exam.prompts).mean().item()
    figures |= {"key": key, "seed": seed, "seconds": time.monotonic() - began}
    save_image(grid(images[:PICTURES], columns=PICTURES), bench.folder / "figures" / f"{key}.png")
    write_text(done, json.dumps(figures, indent=1))
    return figures


def _key(bench: Bench, study: Study, row: Row, recipe: Recipe) -> str:
    words = (f"-{row.strategy}{row.timestep:.0f}" if row.kind == "noised" else "") + ("-unseen" if study.unseen else "")
    return f"{row.kind}{words}-{bench.course(row, recipe)}-{recipe.training.updates}-{bench.count}"


def _base_role(bench: Bench) -> Role:
    return Role(bench.backbone, bench.backbone.network)


def _train(bench: Bench, row: Row, recipe: Recipe) -> Role:
    """Train a row, after the row that it begins with; what was trained already, but for less long, is continued."""
    folder = bench.run_folder(row, recipe)
    if checkpoints(folder) and latest_state(folder)[0]["update"] > recipe.training.updates:
        shutil.rmtree(folder)
    if row.begin is not None and not checkpoints(folder):
        _train(bench, row.begin, bench.beginning(row.begin, recipe.training.seed))
    run = Run.start(recipe, load_model(recipe))
    begin(run, folder)
    write_text(folder / RECIPE_FILE, recipe.to_yaml())
    if run.update < recipe.training.updates:
        train(run, folder)
    load_parameters(run.roles, STUDENT, run.average)
    return run.roles.student


def sampler_of(bench: Bench, row: Row, recipe: Recipe, role: Role) -> Sampler:
    """How a row is sampled: a student unguided, the base network guided."""
    backbone, ladder = bench.backbone, recipe.ladder.build(bench.backbone)
    config = recipe.method_config()
    guidance = config.guidance_scale
    if row.kind == "teacher":
        return Sampler(role, full_resolution(backbone.teacher_timesteps(BUNDLED_STEPS), ladder.size), guidance)
    return Sampler(role, ladder, guidance if row.kind == "naive" else 1.0, config.sampler_options())


def _finish_noised(bench: Bench, row: Row, seed: int) -> tuple[dict[str, Any], Tensor]:
    """SwD Table 1: real latents noised to a timestep in one of three ways, and drawn on from there by the teacher."""
    backbone, exam = bench.backbone, bench.exam(seed)
    pixels = backbone.default_size
    draw = torch.Generator().manual_seed(seed + 2)
    device = exam.unconditional.like.device
    renders = render(exam.scenes, (pixels[-2], pixels[-1]), draw).to(device)
    full, half = backbone.latent_size(pixels), backbone.latent_size(tuple(side // 2 for side in pixels))
    clock = torch.tensor(row.timestep, device=device)
    after = [t for t in backbone.teacher_timesteps(BUNDLED_STEPS) if t < row.timestep]
    ladder = full_resolution([row.timestep, *after], full)
    guidance = bench.recipe(row, seed, 1).method_config().guidance_scale

    def state(images: Tensor) -> Tensor:
        x0 = backbone.encode_images(images if row.strategy == "A" else shrink(images, backbone.pixel_size(half)))
        if row.strategy == "B":
            x0 = resize(x0, full, "bicubic")
        noised = combine(backbone.process, x0, gaussian(tuple(x0.shape), draw, x0), clock)
        return resize(noised, full, "bicubic")

    teacher, parts = _base_role(bench), []
    for start in range(0, len(renders), 64):
        rows = slice(start, start + 64)
        x = state(renders[rows])
        conditioning, empty = exam.conditioning.rows(rows), exam.unconditional.expand(len(x))
        latents = _draw_on(teacher, ladder, guidance, x, conditioning, empty, backbone)
        parts.append(backbone.decode(latents))
    images = torch.cat(parts).cpu()
    return {**measure(images, exam), "nfe": 2 * len(ladder.steps)}, images


def _draw_on(
    role: Role, ladder: Ladder, guidance: float, x: Tensor, conditioning: Conditioning, empty: Conditioning, backbone: Backbone
) -> Tensor:
    def denoise(state: Tensor, timestep: Tensor) -> Prediction:
        return role.guided(state, timestep, conditioning, empty, guidance)

    with torch.no_grad(), autocast(x.device, "auto"):
        return cascade(denoise, backbone.process, ladder, x).float()


def seconds_an_image(bench: Bench, study: Study, rounds: int = 3, batch: int = 64) -> dict[str, float]:
    """Network seconds for an image of each row, by untrained samplers of the same shape; rounds go over all rows in turn.

    So a machine that becomes slower meanwhile slows all rows alike. Median over rounds.
    """
    kinds: dict[str, Sampler] = {}
    for row in study.rows:
        if row.kind != "noised":
            kinds[row.name] = sampler_of(bench, row, bench.recipe(row, 0, 1), _base_role(bench))
    exam = bench.exam(0)
    conditioning = exam.conditioning.rows([index % len(exam.prompts) for index in range(batch)])
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(rounds):
        known: dict[str, float] = {}
        for name, sampler in kinds.items():
            shape = json.dumps([asdict(step) for step in sampler.ladder.steps]) + str(sampler.nfe)
            if shape not in known:
                began = time.perf_counter()
                latents = sample(sampler, bench.backbone, conditioning, exam.unconditional, list(range(batch)))
                synchronize(latents.device)
                known[shape] = (time.perf_counter() - began) / batch
            seconds[name].append(known[shape])
    return {name: statistics.median(values) for name, values in seconds.items()}


def judge_claim(claim: Claim, rows: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Whether an ordering holds: the mean difference against the spread of the two rows' means over seeds."""
    better, worse = ([run[claim.figure] for run in rows[name]] for name in (claim.better, claim.worse))
    sign = -1 if claim.figure in LOWER_IS_BETTER else 1
    difference = sign * (statistics.mean(better) - statistics.mean(worse))
    spread = sum(statistics.variance(values) / len(values) for values in (better, worse)) ** 0.5 if len(better) > 1 else 0.0
    verdict = "holds" if difference > 2 * spread else "does not hold" if difference < -2 * spread else "not told apart"
    verdict = verdict if len(better) > 1 else "one seed tells nothing"
    return {**asdict(claim), "difference": difference, "standard_error": spread, "verdict": verdict}


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean and sample deviation over seeds of each figure."""
    found = {name: [run[name] for run in runs] for name in FIGURES if runs and all(name in run for run in runs)}
    return {
        name: {"mean": statistics.mean(values), "spread": statistics.stdev(values) if len(values) > 1 else 0.0}
        for name, values in found.items()
    }


def reproduce(
    name: str,
    study: Study,
    bench: Bench,
    seeds: Sequence[int],
    out: Path,
    command: str,
    tell: Callable[[str], None] = console.print,
) -> dict[str, Any]:
    """Run what is missing of a study and write `out/name.json`, again after every row, so that nothing done is lost.

    Figures that the file holds already for the very same recipe, seed and captions are taken from it.
    """
    path = out / f"{name}.json"
    remember(bench.folder / "work.json", {"teacher": bench.teacher})
    _adopt(bench, path)
    rows: dict[str, list[dict[str, Any]]] = {row.name: [] for row in study.rows}
    for seed in seeds:
        for row in study.rows:
            figures = run_row(bench, study, row, seed)
            rows[row.name].append(figures)
            shown = " ".join(f"{key} {figures[key]:.3f}" for key in ("prompt_accuracy", "fid"))
            tell(f"{name}, seed {seed}: {row.name}: {shown} ({figures['seconds']:.0f} s)")
            write_text(path, json.dumps(_result(name, study, rows, seeds, bench, command), indent=1) + "\n")
    result = _result(name, study, rows, seeds, bench, command)
    times = seconds_an_image(bench, study)
    for entry in result["rows"]:
        entry["seconds_an_image"] = times.get(entry["name"])
    result["claims"] = [judge_claim(claim, rows) for claim in study.claims]
    write_text(path, json.dumps(result, indent=1) + "\n")
    return result


def _result(
    name: str, study: Study, rows: dict[str, list[dict[str, Any]]], seeds: Sequence[int], bench: Bench, command: str
) -> dict[str, Any]:
    done = [run for runs in rows.values() for run in runs]
    return {
        "study": name,
        "title": study.title,
        "source": study.source,
        "note": study.note,
        "command": command,
        "teacher": bench.teacher,
        "machine": describe(pick_device("auto")),
        "seeds": list(seeds),
        "captions_a_seed": bench.count,
        "updates": bench.updates or study.updates,
        "batch_size": BATCH,
        "seconds": sum(run["seconds"] for run in done),
        "rows": [
            {
                "name": row.name,
                "series": row.series,
                "after": bench.length(row, study),
                **summary(rows[row.name]),
                "runs": rows[row.name],
            }
            for row in study.rows
        ],
        "drawn": list(study.drawn),
        "claims": [],
    }


def _adopt(bench: Bench, path: Path) -> None:
    """Let a study's earlier file stand for the work folder it was made in."""
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if found.get("teacher") == bench.teacher:
        for row in found["rows"]:
            for run in row["runs"]:
                target = bench.folder / "figures" / f"{run['key']}.json"
                if not target.exists():
                    write_text(target, json.dumps(run, indent=1))
