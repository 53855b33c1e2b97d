"""The training loop: one method, one backbone, two optimisers, and checkpoints that resume bit for bit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stepladder.backbones.base import Backbone
from stepladder.data.prompts import PromptCache, encode_prompts, read_prompts
from stepladder.data.shards import ImageShards
from stepladder.errors import UserError
from stepladder.fingerprint import fingerprint
from stepladder.images import save_grid, still
from stepladder.ladder import Ladder
from stepladder.methods import methods
from stepladder.methods.base import Batch, Method, Setting
from stepladder.methods.reinforcement import RLTerm
from stepladder.precision import autocast, pick_device
from stepladder.progress import console, progress_bar
from stepladder.resample import shrink
from stepladder.roles import FAKE_SCORE, REFERENCE, STUDENT, TRAINED, AdapterRoles, CopyRoles, Roles, load_parameters, load_tensors
from stepladder.samplers import Sampler, sample
from stepladder.storage import load_tree, save_tree
from stepladder.training.logs import MetricLog
from stepladder.training.recipe import Recipe, load_recipe
from stepladder.training.rewarding import Rewarder

RECIPE_FILE = "recipe.yaml"
# raised whenever a checkpoint holds something else than before
STATE_FORMAT = 2
GRID_PROMPTS = 8
BALANCE_DECAY = 0.95


def build_method(recipe: Recipe, backbone: Backbone, ladder: Ladder) -> Method:
    """The recipe's method; the start of a discriminator's head depends on the recipe's seed alone."""
    config = recipe.method_config()
    torch.manual_seed(recipe.training.seed)
    width = backbone.feature_width(ladder.steps[0].size) if config.gan is not None else 0
    setting = Setting(ladder, backbone.process, backbone.latent_channels, width)
    method: Method = methods()[recipe.method["name"]](config, setting)
    if method.head is not None:
        method.head.to(next(backbone.network.parameters()).device)
    return method


def build_roles(backbone: Backbone, recipe: Recipe, kept: Sequence[str] = TRAINED) -> Roles:
    """Roles as the recipe keeps them; the adapters' start depends on the recipe's seed alone."""
    torch.manual_seed(recipe.training.seed)
    if recipe.roles.mode == "lora":
        return AdapterRoles(backbone, recipe.roles.lora_rank, recipe.roles.gradient_checkpointing, kept)
    return CopyRoles(backbone, recipe.roles.gradient_checkpointing, kept)


@dataclass
class Run:
    """All that a training update touches; `state` and `restore` carry it through a checkpoint.

    norms: running mean squares of the norms of the distillation's and the rewards' gradients, (2,).
    """

    recipe: Recipe
    backbone: Backbone
    roles: Roles
    method: Method
    ladder: Ladder
    prompts: PromptCache
    images: ImageShards | None
    rewarder: Rewarder | None
    optimizers: dict[str, torch.optim.Optimizer]
    average: dict[str, Tensor]
    generator: torch.Generator
    device: torch.device
    base: str
    norms: Tensor = field(default_factory=lambda: torch.zeros(2))
    update: int = 0

    @classmethod
    def start(cls, recipe: Recipe, backbone: Backbone) -> Run:
        """A run at its first update."""
        training = recipe.training
        device = pick_device(training.device)
        ladder = recipe.ladder.build(backbone)
        backbone.to(device)
        base = fingerprint(backbone.network)
        images = ImageShards(recipe.data.images) if recipe.data.images is not None else None
        prompts = read_and_encode(recipe, backbone, images)
        method = build_method(recipe, backbone, ladder)
        rates = {STUDENT: training.student_learning_rate}
        if method.trains_fake_score:
            rates[FAKE_SCORE] = training.fake_score_learning_rate
        rl = method.config.rl
        references = (REFERENCE,) if rl is not None and rl.algorithm == "dpo" else ()
        roles = build_roles(backbone, recipe, (*rates, *references))
        rewarder = Rewarder.of(rl, backbone, device) if rl is not None else None
        optimizers: dict[str, torch.optim.Optimizer] = {
            role: torch.optim.AdamW(
                learning(roles, method, role), lr=rate, betas=training.betas, weight_decay=training.weight_decay, fused=True
            )
            for role, rate in rates.items()
        }
        average = {name: parameter.detach().clone() for name, parameter in roles.parameters(STUDENT).items()}
        generator = torch.Generator().manual_seed(training.seed)
        return cls(recipe, backbone, roles, method, ladder, prompts, images, rewarder, optimizers, average, generator, device, base)

    def batch(self, number: int) -> Batch:
        """The prompts of a batch and, where the run has images, what belongs to them."""
        size = self.recipe.training.batch_size
        rows = self.prompts.rows(number, size)
        unconditional = self.prompts.unconditional.to(self.device).expand(size)
        encoded = self._encoded(rows) if self.images is not None else None
        score = self.rewarder.scoring([self.prompts.texts[row] for row in rows], self.generator) if self.rewarder else None
        return Batch(self.prompts.conditioning.rows(rows).to(self.device), unconditional, encoded, score)

    def _encoded(self, rows: list[int]) -> Callable[[tuple[int, ...]], Tensor]:
        """Latents of the images `rows` at a latent size: shrunk in pixel space, then encoded (SwD section 4.1)."""
        assert self.images is not None
        full = self.images.load(rows, self.backbone.pixel_size(self.ladder.size)).to(self.device)

        @cache
        def at(size: tuple[int, ...]) -> Tensor:
            return self.backbone.encode_images(shrink(full, self.backbone.pixel_size(size)))

        return at

    @property
    def images_digest(self) -> str:
        """Which images the run has; empty without any."""
        return self.images.digest if self.images is not None else ""

    def state(self) -> dict[str, Any]:
        """Everything the next update depends on."""
        return {
            "format": STATE_FORMAT,
            "update": self.update,
            "identity": self.recipe.identity(),
            "base": self.base,
            "prompts": self.prompts.digest,
            "images": self.images_digest,
            "weights": {role: dict(self.roles.parameters(role)) for role in (*self.optimizers, REFERENCE)},
            "head": dict(self.method.head.named_parameters()) if self.method.head is not None else {},
            "average": self.average,
            "optimizers": {role: optimizer.state_dict() for role, optimizer in self.optimizers.items()},
            "generator": self.generator.get_state(),
            "norms": self.norms,
        }

    def restore(self, state: dict[str, Any], path: Path) -> None:
        """Continue from a checkpoint's state.

        Raises:
            UserError: the checkpoint was written by another recipe, for another model or from other prompts.
        """
        own = (
            ("format", STATE_FORMAT, "version of Stepladder"),
            ("identity", self.recipe.identity(), "recipe"),
            ("base", self.base, "model"),
            ("prompts", self.prompts.digest, "prompts"),
            ("images", self.images_digest, "images"),
        )
        for key, value, name in own:
            if state.get(key) != value:
                raise UserError(f"{path} belongs to another {name}; resume with its own {name} or start in a new folder")
        if self.method.head is not None:
            load_tensors(dict(self.method.head.named_parameters()), state["head"])
        load_parameters(self.roles, REFERENCE, state["weights"][REFERENCE])
        self.norms = state["norms"]
        self._take_over(state, list(self.optimizers))

    def go_on_from(self, state: dict[str, Any], path: Path) -> None:
        """Begin where another recipe's run was: its student and, where both train one, its fake score.

        The references of reinforcement learning are that student; a discriminator's head begins anew.

        Raises:
            UserError: the checkpoint's model or adapters are not this recipe's.
        """
        for key, value, name in (("format", STATE_FORMAT, "version of Stepladder"), ("base", self.base, "model")):
            if state.get(key) != value:
                raise UserError(f"{path} belongs to another {name}; start from a run of this {name}")
        load_parameters(self.roles, REFERENCE, state["weights"][STUDENT] if self.roles.parameters(REFERENCE) else {})
        self._take_over(state, [role for role in self.optimizers if role in state["weights"]])

    def _take_over(self, state: dict[str, Any], roles: Sequence[str]) -> None:
        """Weights of roles, their optimisers' moments where the same parameters learn, average, generator and update."""
        for role in roles:
            load_parameters(self.roles, role, state["weights"][role])
            saved, groups = state["optimizers"][role], self.optimizers[role].param_groups
            if [len(group["params"]) for group in groups] == [len(group["params"]) for group in saved["param_groups"]]:
                # the moments are the run's of before; rates, betas and decay this recipe's
                options = [{key: value for key, value in group.items() if key != "params"} for group in groups]
                self.optimizers[role].load_state_dict(saved)
                for group, own in zip(self.optimizers[role].param_groups, options, strict=True):
                    group.update(own)
        self.average = {name: tensor.to(self.device) for name, tensor in state["average"].items()}
        self.generator.set_state(state["generator"])
        self.update = state["update"]


def learning(roles: Roles, method: Method, role: str) -> list[nn.Parameter]:
    """What learns with a role: its own parameters and, with the fake score's, the discriminator's head."""
    head = list(method.head.parameters()) if role == FAKE_SCORE and method.head is not None else []
    return [*roles.parameters(role).values(), *head]


def read_and_encode(recipe: Recipe, backbone: Backbone, images: ImageShards | None) -> PromptCache:
    """Encode the recipe's prompts; then the text encoders, and a VAE that has nothing to do, leave the memory."""
    size = recipe.ladder.sizes[-1]
    texts = images.prompts if images is not None else read_prompts(recipe.data.prompts)  # type: ignore[arg-type]
    unconditional = backbone.unconditional(recipe.data.negative_prompt, size).to("cpu")
    prompts = PromptCache(encode_prompts(backbone, texts, size), unconditional, recipe.training.seed, texts)
    backbone.drop_text_encoders()
    if not recipe.training.sample_every and images is None and recipe.method_config().rl is None:
        backbone.drop_vae()
    return prompts


def train_update(run: Run) -> dict[str, float]:
    """One update of Algorithm 1: fake score first, then the student.

    Raises:
        UserError: a loss or gradient is NaN or infinite; nothing has been changed by the update's last step.
    """
    training, method = run.recipe.training, run.method
    figures: dict[str, float] = {}
    if run.update == method.config.rl_begins and run.roles.parameters(REFERENCE):
        load_parameters(run.roles, REFERENCE, dict(run.roles.parameters(STUDENT)))
    follows = method.trains_fake_score and method.distils_at(run.update)
    count = method.config.fake_updates if follows else 1
    for index in range(count):
        batch = run.batch(run.update * method.config.fake_updates + index)
        # only the last sample also teaches the student
        with torch.set_grad_enabled(index == count - 1), autocast(run.device, training.precision):
            drawn = method.roll_out(run.roles, batch, run.update, run.generator)
        if follows:
            with autocast(run.device, training.precision):
                loss = method.fake_score_loss(run.roles, drawn, batch, run.generator)
            figures.update(_descend(run, FAKE_SCORE, loss))
    with autocast(run.device, training.precision):
        loss = method.student_loss(run.roles, drawn, batch, run.generator)
        wanted = method.reinforcement_loss(run.roles, drawn, batch, run.generator)
    figures.update(_descend(run, STUDENT, loss, wanted))
    with torch.no_grad():
        own = run.roles.parameters(STUDENT)
        torch._foreach_lerp_([run.average[name] for name in own], list(own.values()), 1 - training.ema_decay)
    run.update += 1
    return figures | {"stage": float(drawn.stage), "latent_std": drawn.x0.detach().float().std().item()}


def _descend(run: Run, role: str, loss: Tensor, wanted: Tensor | None = None) -> dict[str, float]:
    """One step of a role's optimiser down `loss`; `wanted` is the loss of reinforcement learning beside it."""
    parameters = learning(run.roles, run.method, role)
    more: dict[str, float] = {}
    if wanted is not None:
        more = backward_both(run.method.config.rl, parameters, loss, wanted, run.norms, run.recipe.training.max_grad_norm)
    else:
        # an adversarial student loss passes through the fake score, which must not learn from it
        loss.backward(inputs=parameters)  # type: ignore[no-untyped-call]
    norm = torch.nn.utils.clip_grad_norm_(parameters, run.recipe.training.max_grad_norm)
    value, size = loss.item(), norm.item()
    if not (math.isfinite(value) and math.isfinite(size)):
        raise UserError(
            f"the {role} loss became {value} (gradient norm {size}) at update {run.update + 1}; the last good checkpoint is kept: "
            "resume from it with a lower learning rate"
        )
    run.optimizers[role].step()
    run.optimizers[role].zero_grad(set_to_none=True)
    return {f"{role}_loss": value, f"{role}_grad_norm": size} | more


def backward_both(
    term: RLTerm, parameters: list[nn.Parameter], loss: Tensor, wanted: Tensor, norms: Tensor, limit: float
) -> dict[str, float]:
    """Leave the gradient of DMDR Eq. 2, `loss` plus a coefficient times `wanted`, in the parameters.

    Where both have a gradient and the term balances, the coefficient brings their running norms, kept in `norms`, to the term's
    ratio. Running ones: a batch that has all it is rewarded for shall not be driven as hard as one that has not. The rewards' share
    is clipped to `limit` by itself, lest a steep one shrink the distillation's beside it.
    """
    distils = loss.requires_grad
    own = torch.autograd.grad(wanted, parameters, retain_graph=distils, allow_unused=True)
    size = torch.nn.utils.get_total_norm([gradient for gradient in own if gradient is not None])
    coefficient = torch.tensor(term.weight, device=size.device)
    distilled = torch.autograd.grad(loss, parameters, allow_unused=True) if distils else (None,) * len(parameters)
    if distils and term.balance:
        norm = torch.nn.utils.get_total_norm([gradient for gradient in distilled if gradient is not None])
        norms.lerp_(torch.stack([norm.square(), size.square()]).to(norms), 1 - BALANCE_DECAY)
        coefficient = term.weight * (norms[0] / norms[1].clamp(min=1e-24)).sqrt().to(size)
    coefficient = torch.minimum(coefficient, limit / size.clamp(min=1e-12))
    # DMDR Eq. 2
    for parameter, first, second in zip(parameters, distilled, own, strict=True):
        parts = [part for part in (first, None if second is None else coefficient * second) if part is not None]
        parameter.grad = sum(parts[1:], parts[0]) if parts else None
    return {"reinforcement_loss": wanted.item(), "reinforcement_grad_norm": size.item()}


def checkpoints(folder: Path) -> list[Path]:
    """A run's checkpoints, oldest first."""
    return sorted((folder / "checkpoints").glob("update-*.safetensors"))


def save_checkpoint(run: Run, folder: Path) -> Path:
    """Write a checkpoint atomically and drop the oldest beyond the number to keep."""
    path = folder / "checkpoints" / f"update-{run.update:07d}.safetensors"
    save_tree(path, run.state())
    for old in checkpoints(folder)[: -run.recipe.training.keep_checkpoints]:
        old.unlink()
    return path


def check_folder(folder: Path, recipe: Recipe, resume: bool) -> None:
    """Accept a new folder for a run, or one with this recipe's run to resume.

    Raises:
        UserError: the folder holds another run, none to resume, or something else.
    """
    saved = folder / RECIPE_FILE
    if resume:
        if not saved.exists():
            raise UserError(f"{folder} holds no run to resume; start it without --resume")
        if load_recipe(saved).identity() != recipe.identity():
            raise UserError(f"{folder} was started with another recipe; resume with that one or start in a new folder")
    elif saved.exists():
        raise UserError(f"{folder} already holds a run; add --resume to continue it or choose another folder")
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not empty and holds no run; choose another folder")


def sample_grid(run: Run, path: Path) -> None:
    """A grid of the averaged student's images, same prompts and seeds every time, so that progress can be seen."""
    trained = {name: parameter.detach().clone() for name, parameter in run.roles.parameters(STUDENT).items()}
    load_parameters(run.roles, STUDENT, run.average)
    seeds = list(range(min(GRID_PROMPTS, len(run.prompts.conditioning))))
    conditioning = run.prompts.conditioning.rows(seeds).to(run.device)
    sampler = Sampler(run.roles.student, run.ladder, 1.0, run.method.config.sampler_options())
    unconditional = run.prompts.unconditional.to(run.device)
    latents = sample(sampler, run.backbone, conditioning, unconditional, seeds, run.recipe.training.precision)
    load_parameters(run.roles, STUDENT, trained)
    # one by one: eight full-size pictures at once are more than the training itself may have left room for
    save_grid(torch.cat([still(run.backbone.decode(latent[None])) for latent in latents]), path, columns=4)


def train(run: Run, folder: Path) -> None:
    """Train to the recipe's last update, writing metrics, grids and checkpoints; the averaged student is in `run.average`.

    Raises:
        UserError: the loss is not finite, or the disk is full; checkpoints written before stay.
    """
    training = run.recipe.training
    log = MetricLog(folder, run.update)
    started, first = time.monotonic(), run.update
    with progress_bar() as bar:
        task = bar.add_task(run.recipe.method["name"], total=training.updates, completed=run.update, note="")
        while run.update < training.updates:
            figures = train_update(run)
            speed = (run.update - first) / (time.monotonic() - started)
            log.write(run.update, figures | {"updates_per_second": speed})
            losses = " ".join(f"{role} {figures[f'{role}_loss']:.3f}" for role in run.optimizers if f"{role}_loss" in figures)
            note = f"{losses} {speed:.2f} updates/s"
            bar.update(task, completed=run.update, note=note)
            if not console.is_terminal and run.update % 20 == 0:
                left = (training.updates - run.update) / speed
                console.print(f"update {run.update}/{training.updates} {note}, {left:.0f} s left")
            last = run.update == training.updates
            if run.update % training.checkpoint_every == 0 or last:
                log.flush()
                save_checkpoint(run, folder)
            if training.sample_every and (run.update % training.sample_every == 0 or last):
                sample_grid(run, folder / "samples" / f"update-{run.update:07d}.png")
    log.close()


def begin(run: Run, folder: Path) -> None:
    """Bring a new run to where it begins: its own newest checkpoint, the run that its recipe starts from, or nothing.

    Raises:
        UserError: a checkpoint belongs to something else, or the run to start from has gone as far as this one shall go.
    """
    start = run.recipe.training.start_from
    if checkpoints(folder):
        run.restore(*latest_state(folder))
    elif start is not None:
        run.go_on_from(*latest_state(start))
        if run.update >= run.recipe.training.updates:
            raise UserError(
                f"{start} has {run.update} updates already, and training.updates, {run.recipe.training.updates}, counts them too; "
                "set it higher"
            )


def latest_state(folder: Path) -> tuple[dict[str, Any], Path]:
    """The newest checkpoint of a run that can be read.

    Raises:
        UserError: there is none.
    """
    for path in reversed(checkpoints(folder)):
        try:
            return load_tree(path), path
        except UserError as error:
            console.print(f"skipping a checkpoint: {error}")
    raise UserError(f"{folder} has no checkpoint that can be read; start anew, or name the folder of a run that has some")
