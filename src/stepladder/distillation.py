"""A whole distillation: load, train, export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stepladder.backbones import load_backbone
from stepladder.backbones.base import Backbone
from stepladder.data.prompts import read_prompts
from stepladder.export import export_student
from stepladder.planning import plan_ladder
from stepladder.scheduler import LadderScheduler
from stepladder.storage import write_text
from stepladder.training.recipe import Recipe
from stepladder.training.trainer import RECIPE_FILE, Run, check_folder, checkpoints, latest_state, train
from stepladder.world.paths import resolve_model


def load_model(recipe: Recipe) -> Backbone:
    """The recipe's backbone."""
    return load_backbone(resolve_model(recipe.model.path), recipe.model.max_sequence_length)


def distill(recipe: Recipe, folder: Path, resume: bool = False) -> Path:
    """Train a recipe in `folder` and export the averaged student to `folder/student`, whose path is returned.

    Nothing is written before model, ladder and prompts have proven usable.
    """
    check_folder(folder, recipe, resume)
    run = Run.start(recipe, load_model(recipe))
    if checkpoints(folder):
        run.restore(*latest_state(folder))
    write_text(folder / RECIPE_FILE, recipe.to_yaml())
    train(run, folder)
    return export_run(run, folder / "student")


def export_run(run: Run, folder: Path) -> Path:
    """Export a run's averaged student."""
    recipe, ladder = run.recipe, run.ladder
    options: dict[str, Any] = run.method.sampler_options()
    scheduler = LadderScheduler.of(ladder, **options)
    card = {
        "model": recipe.model.path,
        "fingerprint": run.base,
        "max_sequence_length": recipe.model.max_sequence_length,
        "lora_rank": recipe.roles.lora_rank,
        "method": recipe.method["name"],
        "guidance_scale": run.method.config.guidance_scale,
        "first_size": recipe.ladder.sizes[0],
        "size": recipe.ladder.sizes[-1],
        "updates": run.update,
        "recipe": recipe.model_dump(mode="json", exclude={"data"}),
    }
    export_student(run.backbone, run.average, recipe.roles.mode, scheduler, card, folder)
    return folder


def dry_run(recipe: Recipe) -> list[str]:
    """What a recipe would do and need, after loading the model and building the ladder; nothing is written."""
    backbone = load_model(recipe)
    ladder = recipe.ladder.build(backbone)
    plan = plan_ladder(backbone, ladder, 28, lora_rank=recipe.roles.lora_rank)
    prompts = read_prompts(recipe.data.prompts)
    training = recipe.training
    memory = plan.memory["train_lora" if recipe.roles.mode == "lora" else "train_full"]
    return [
        f"model: {recipe.model.path} ({backbone.pipeline_class}, {plan.parameters / 1e6:.1f} M parameters)",
        f"ladder: {ladder.allocation()}, " + ", ".join(f"t={s.timestep:.0f} at {s.size[0]}x{s.size[1]}" for s in ladder.steps),
        f"method: {recipe.method['name']}, roles: {recipe.roles.mode}",
        f"data: {len(prompts)} prompts, {training.updates} updates of {training.batch_size}",
        f"memory for weights and optimiser: {memory / 2**20:.0f} MiB",
        f"speed: {plan.speedup_over_teacher:.1f} × the teacher's speed (28 steps, guided)",
    ]
