"""A whole distillation: load, train, export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stepladder.backbones import load_backbone, sketch_backbone
from stepladder.backbones.base import Backbone
from stepladder.data.prompts import read_prompts
from stepladder.data.shards import ImageShards
from stepladder.export import export_student
from stepladder.methods.base import MethodConfig
from stepladder.planning import TrainingSetup, plan_ladder, plan_memory
from stepladder.precision import pick_device, weight_dtype
from stepladder.scheduler import LadderScheduler
from stepladder.storage import write_text
from stepladder.training.recipe import Recipe
from stepladder.training.trainer import RECIPE_FILE, Run, begin, build_method, check_folder, checkpoints, train
from stepladder.world.paths import resolve_model

BUNDLED_STEPS = 28


def load_model(recipe: Recipe) -> Backbone:
    """The recipe's backbone, its weights in the recipe's precision."""
    model = recipe.model
    # copies of an fp32 base are trained themselves; adapters are in fp32 whatever their base
    choice = "fp32" if model.dtype == "auto" and recipe.roles.mode == "full" else model.dtype
    dtype = weight_dtype(choice, pick_device(recipe.training.device))
    return load_backbone(resolve_model(model.path), model.max_sequence_length, dtype, model.weights)


def distill(recipe: Recipe, folder: Path, resume: bool = False) -> Path:
    """Train a recipe in `folder` and export the averaged student to `folder/student`, whose path is returned.

    Nothing is written before model, ladder and prompts have proven usable.
    """
    check_folder(folder, recipe, resume)
    run = Run.start(recipe, load_model(recipe))
    begin(run, folder)
    write_text(folder / RECIPE_FILE, recipe.to_yaml())
    train(run, folder)
    return export_run(run, folder / "student")


def export_run(run: Run, folder: Path, figures: dict[str, Any] | None = None) -> Path:
    """Export a run's averaged student; `figures`, what `evaluate` measured, go into its card."""
    recipe, ladder = run.recipe, run.ladder
    options: dict[str, Any] = run.method.config.sampler_options()
    scheduler = LadderScheduler.of(ladder, run.backbone.process, run.backbone.packs_latents, **options)
    card = {
        "model": recipe.model.path,
        "weights": str(recipe.model.weights) if recipe.model.weights is not None else None,
        "fingerprint": run.base,
        "max_sequence_length": recipe.model.max_sequence_length,
        "lora_rank": recipe.roles.lora_rank,
        "method": recipe.method["name"],
        "guidance_scale": run.method.config.guidance_scale,
        "first_size": run.backbone.pixel_size(ladder.steps[0].size),
        "size": run.backbone.pixel_size(ladder.size),
        "updates": run.update,
        "figures": figures,
        "recipe": recipe.model_dump(mode="json", exclude={"data"}),
    }
    export_student(run.backbone, run.average, recipe.roles.mode, scheduler, card, folder)
    return folder


def dry_run(recipe: Recipe) -> list[str]:
    """What a recipe would do and need, from the model's configuration alone; nothing is loaded or written."""
    backbone = sketch_backbone(resolve_model(recipe.model.path), recipe.model.max_sequence_length)
    ladder = recipe.ladder.build(backbone)
    # what a method refuses of its ladder, it refuses here
    config = build_method(recipe, backbone, ladder).config
    training, steps = recipe.training, teacher_steps_of(backbone)
    plan = plan_ladder(backbone, ladder, steps)
    setup = TrainingSetup(recipe.roles.lora_rank, training.batch_size, recipe.roles.gradient_checkpointing)
    memory = plan_memory(backbone, ladder.size, setup)
    mode = f"train_{recipe.roles.mode}"
    cards = ", ".join(memory["fits"][mode]) or "no single common card"
    return [
        f"model: {recipe.model.path} ({backbone.pipeline_class}, {plan.parameters / 1e6:.1f} M parameters)",
        f"ladder: {ladder.allocation()}, " + ", ".join(f"t={s.timestep:.0f} at {'x'.join(map(str, s.size))}" for s in ladder.steps),
        f"method: {recipe.method['name']}, roles: {recipe.roles.mode}" + _terms(config),
        f"data: {_prompts(recipe)}",
        f"training: {training.updates} updates of {training.batch_size}" + _start(recipe),
        *(f"missing: {path}" for path in _missing(recipe)),
        f"memory to train at this batch: about {memory[mode] / 2**30:.1f} GiB; fits {cards}"
        + ("; rewards, GAN and MMD come on top, uncounted" if config.rl or config.gan or config.mmd else ""),
        f"speed: {plan.speedup_over_teacher:.1f} × the teacher's ({steps} steps{'' if backbone.embeds_guidance else ', guided'})",
    ]


def _terms(config: MethodConfig) -> str:
    """The terms beside a method's own, in words."""
    words = [name for name in ("cold_start", "gan", "mmd") if getattr(config, name) is not None]
    if config.rl is not None:
        words.append(f"{config.rl.algorithm} with {', '.join(reward.name for reward in config.rl.rewards)}")
    return f", with {'; '.join(words)}" if words else ""


def _start(recipe: Recipe) -> str:
    start = recipe.training.start_from
    if start is None:
        return ""
    return f", counting those of {start}, where it starts" + ("" if checkpoints(start) else ", which has no checkpoint yet")


def _missing(recipe: Recipe) -> list[Path]:
    """Files of weights that a recipe names and that are not there."""
    rewards = (recipe.method.get("rl") or {}).get("rewards", [])
    named = [recipe.model.weights, *(reward["weights"] for reward in rewards)]
    return [Path(path) for path in named if path is not None and not Path(path).exists()]


def _prompts(recipe: Recipe) -> str:
    if recipe.data.images is not None:
        images = recipe.data.images
        return f"{len(ImageShards(images))} images with prompts" if images.exists() else f"{images} is still missing: synthesize it"
    path = recipe.data.prompts
    assert path is not None
    return f"{len(read_prompts(path))} prompts" if path.exists() else f"{path} is still missing: write one prompt a line there"


def teacher_steps_of(backbone: Backbone) -> int:
    """Steps of the teacher's own sampler: 28 of the bundled one, a release's, or those of the releases with its pipeline."""
    if backbone.source == resolve_model("bundled"):
        return BUNDLED_STEPS
    steps = {release.hub_id: release.teacher_steps for release in backbone.releases.values()}
    return steps.get(backbone.source, next(iter(steps.values()), BUNDLED_STEPS))
