"""Recipes: one YAML file a run, validated to the last key, with overrides from the command line."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from stepladder.backbones.base import Backbone
from stepladder.backbones.loading import is_hub_id
from stepladder.errors import UserError
from stepladder.ladder import PRESETS, Boundary, Ladder, ResolutionShift, build_ladder, spaced_timesteps
from stepladder.methods import methods

FILES = (("data", "prompts"), ("data", "images"), ("model", "weights"), ("training", "start_from"))
FREE_KEYS = (
    *("start_from", "updates", "checkpoint_every", "keep_checkpoints", "sample_every"),
    *("student_learning_rate", "fake_score_learning_rate"),
)


Beta = Annotated[float, Field(ge=0, lt=1)]


class Part(BaseModel):
    """A section of a recipe: no key that it does not know."""

    model_config = ConfigDict(extra="forbid", validate_default=True)


class ModelPart(Part):
    """The pretrained model."""

    path: str = Field("bundled", description="a diffusers folder, a hub id, or `bundled` for the teacher in this package")
    weights: Path | None = Field(
        None, description="a fine-tune's denoiser in one safetensors file, put in the place of the pipeline's own"
    )
    max_sequence_length: int | None = Field(
        None,
        ge=1,
        description="tokens of the long text encoder; the pipeline's own by default, 1 for the bundled teacher's silent T5",
    )
    dtype: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="of weights that are not trained; auto is bf16 for adapters on a GPU, else fp32"
    )


class LadderPart(Part):
    """The ladder: sizes in pixels, steps, and where the resolution changes."""

    preset: str | None = Field(None, description=f"start from a published schedule: {', '.join(PRESETS)}")
    sizes: list[tuple[int, int] | tuple[int, int, int]] = Field(
        description="(height, width) of each rung, growing; (frames, height, width) for video"
    )
    steps: int = Field(4, ge=1, description="network calls in all")
    spacing: float = Field(1.0, gt=0, description="shift of the teacher's timesteps: 3 for SD3.5, 5 for Wan, 1 for uniform")
    sigma_min: float = Field(0.0, ge=0, lt=1, description="where the uniform spacing ends, without it")
    thresholds: list[float] = Field(default_factory=list, description="logSNR where a rung ends, one fewer than sizes")
    timesteps: list[float] | None = Field(None, description="the teacher's timesteps themselves, instead of steps and spacing")
    shift: ResolutionShift = Field("flow", description="how a low rung's timestep follows from the teacher's (Eq. 2)")
    boundary: Boundary = Field("teacher", description="clock on which thresholds are compared; `rung` gives Wan's 3+3")
    allocation: list[int] = Field(default_factory=list, description="steps of each size, instead of thresholds")

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, value: Any) -> Any:
        name = value.get("preset") if isinstance(value, dict) else None
        if name is None:
            return value
        if not isinstance(name, str) or name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; known presets: {', '.join(PRESETS)}")
        preset = asdict(PRESETS[name])
        given = [key for key in ("steps", "spacing", "sigma_min") if key in value]
        if preset["timesteps"] is not None and given and "timesteps" not in value:
            raise ValueError(f"preset {name} names its timesteps, beside which {given[0]} means nothing; set timesteps or drop it")
        return {**preset, **value}

    def build(self, backbone: Backbone) -> Ladder:
        """The ladder for a backbone."""
        timesteps = self.timesteps or spaced_timesteps(self.steps, self.spacing, self.sigma_min)
        sizes = [backbone.latent_size(size) for size in self.sizes]
        return build_ladder(backbone.process, timesteps, sizes, self.thresholds, self.shift, self.boundary, self.allocation)


class RolesPart(Part):
    """How student and fake score are kept."""

    mode: Literal["lora", "full"] = Field("lora", description="adapters on one frozen base, or whole copies")
    lora_rank: int = Field(64, ge=1)
    gradient_checkpointing: bool = False


class DataPart(Part):
    """Prompts, or images with their prompts."""

    prompts: Path | None = Field(None, description="TXT, JSONL or CSV; relative to the recipe")
    images: Path | None = Field(
        None, description="a folder of webdataset shards, as `stepladder synthesize` writes them, with the prompts to use"
    )
    negative_prompt: str = Field("", description="what guidance on the real score leads away from")

    @model_validator(mode="after")
    def _one_source(self) -> DataPart:
        if (self.prompts is None) == (self.images is None):
            if self.images is not None:
                raise ValueError("images bring their own prompts, and prompts are given too: drop those (data.prompts=null)")
            raise ValueError("give prompts, a text file, or images, a folder of shards that hold prompts too")
        return self


class TrainingPart(Part):
    """The loop; the defaults are the paper's for images."""

    start_from: Path | None = Field(
        None,
        description="the folder of another run on the same model: its newest checkpoint is the beginning, instead of the teacher's "
        "weights, and its updates count",
    )
    updates: int = Field(1000, ge=1, description="student updates")
    batch_size: int = Field(32, ge=1)
    student_learning_rate: float = Field(4e-6, gt=0)
    fake_score_learning_rate: float = Field(2e-5, gt=0)
    betas: tuple[Beta, Beta] = (0.0, 0.999)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    ema_decay: float = Field(0.99, ge=0, lt=1, description="of the student's weights that are sampled and exported")
    seed: int = 0
    device: str = Field("auto", description="auto, cpu, cuda")
    precision: Literal["auto", "bf16", "fp32"] = Field("auto", description="bf16 autocast where the device has it")
    checkpoint_every: int = Field(100, ge=1, description="updates between checkpoints")
    keep_checkpoints: int = Field(2, ge=1)
    sample_every: int = Field(100, ge=0, description="updates between sample grids; 0 draws none and frees the VAE")


class Recipe(Part):
    """A run."""

    model: ModelPart = Field(default_factory=ModelPart)
    ladder: LadderPart
    method: dict[str, Any] = Field(default_factory=lambda: {"name": "rmd"})
    roles: RolesPart = Field(default_factory=RolesPart)
    data: DataPart
    training: TrainingPart = Field(default_factory=TrainingPart)

    @field_validator("method")
    @classmethod
    def _known_method(cls, value: dict[str, Any]) -> dict[str, Any]:
        name = value.get("name")
        if not isinstance(name, str) or name not in methods():
            raise ValueError(f"unknown method {name!r}; known methods: {', '.join(sorted(methods()))}")
        return methods()[name].Config.model_validate(value).model_dump(mode="json")

    @model_validator(mode="after")
    def _has_images(self) -> Recipe:
        if self.data.images is None and methods()[self.method["name"]].wants_images(self.method_config()):
            raise ValueError(
                f"method {self.method['name']} with these terms needs images: make some with stepladder synthesize and set "
                "data.images to their folder instead of data.prompts"
            )
        return self

    def method_config(self) -> Any:
        """The method's own configuration."""
        return methods()[self.method["name"]].Config.model_validate(self.method)

    def identity(self) -> str:
        """A hash of what a checkpoint's next update depends on.

        Left out: learning rates, where training began and how long it shall last, and what is written when.
        """
        # prompts and images are known by their digests, wherever they lie
        content = self.model_dump(mode="json", exclude={"data": {"prompts", "images"}})
        for free in FREE_KEYS:
            content["training"].pop(free)
        return hashlib.sha256(json.dumps(_said(content), sort_keys=True).encode()).hexdigest()[:16]

    def to_yaml(self) -> str:
        """The resolved recipe."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def _said(tree: Any) -> Any:
    """A tree without what is None, so that a setting added later, and not set, leaves identities alone."""
    if isinstance(tree, dict):
        return {key: _said(value) for key, value in tree.items() if value is not None}
    return tree


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override (`a.b=value`) and validate a recipe.

    Relative paths are looked up beside the recipe, those of overrides in the current folder.

    Raises:
        UserError: the file is missing or no YAML mapping, a key is unknown (the nearest is named), a value has a wrong type.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read recipe {path}: {error}; give the path of a YAML file") from error
    except yaml.YAMLError as error:
        raise UserError(f"recipe {path} is not YAML: {' '.join(str(error).split())}; mend it there") from error
    if not isinstance(tree, dict):
        raise UserError(f"recipe {path} must be a mapping with sections such as model, ladder, method; see recipes/")
    for override in overrides:
        _apply(tree, override)
    recipe = parse_recipe(tree)
    given = [override.partition("=")[0] for override in overrides]
    _locate(recipe, lambda key: Path.cwd() if any(f"{key}.".startswith(f"{name}.") for name in given) else path.parent)
    return recipe


def _locate(recipe: Recipe, home: Callable[[str], Path]) -> None:
    """Make a recipe's relative paths absolute; `home` says what a key's are relative to."""
    for section, key in FILES:
        part = getattr(recipe, section)
        if getattr(part, key) is not None:
            setattr(part, key, (home(f"{section}.{key}") / getattr(part, key).expanduser()).resolve())
    recipe.model.path = _folder_or_hub_id(recipe.model.path, home("model.path"))
    term = recipe.method.get("rl")
    if term is None:
        return
    if term["decoder"] is not None:
        term["decoder"] = _folder_or_hub_id(term["decoder"], home("method.rl.decoder"))
    where = home("method.rl.rewards")
    for reward in term["rewards"]:
        if reward["path"] is not None:
            reward["path"] = _folder_or_hub_id(reward["path"], where)
        if reward["weights"] is not None:
            reward["weights"] = str((where / Path(reward["weights"]).expanduser()).resolve())


def _folder_or_hub_id(name: str, home: Path) -> str:
    there = (home / Path(name).expanduser()).resolve()
    return str(there) if name != "bundled" and (there.exists() or not is_hub_id(name)) else name


def parse_recipe(tree: dict[str, Any]) -> Recipe:
    """Validate a recipe that is already a mapping."""
    method = tree.get("method")
    if isinstance(method, dict) and isinstance(method.get("name"), str) and method["name"] in methods():
        config = methods()[method["name"]].Config
        try:
            config.model_validate(method)
        except ValidationError as error:
            raise UserError(_explain(error, "method.", _keys(config))) from error
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise UserError(_explain(error)) from error


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r} must look like training.updates=200")
    *parents, last = key.split(".")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise UserError(f"override {override!r}: {parent} is not a section")
    try:
        node[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"override {override!r} has a value that is not YAML; quote it") from error


def _keys(model: type[BaseModel]) -> set[str]:
    """Keys of a model and of all models inside it."""
    found = set(model.model_fields)
    for field in model.model_fields.values():
        inside = [field.annotation, *get_args(field.annotation)]
        inside += [argument for kind in inside for argument in get_args(kind)]
        for kind in inside:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                found |= _keys(kind)
    return found


def _explain(error: ValidationError, prefix: str = "", known: set[str] | None = None) -> str:
    first = error.errors()[0]
    where = prefix + ".".join(str(item) for item in first["loc"])
    if first["type"] == "extra_forbidden":
        keys = known or _keys(Recipe)
        near = difflib.get_close_matches(str(first["loc"][-1]), keys, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(sorted(keys))}"
        return f"unknown key {where}; {hint}"
    if first["type"] == "missing":
        return f"{where} is missing; add it to the recipe"
    message = first["msg"].removeprefix("Value error, ")
    given = first.get("input")
    got = "" if isinstance(given, (dict, BaseModel)) else f" (got {given!r}); correct it in the recipe"
    return f"{where}: {message}{got}" if where.strip(".") else f"{message}{got}"
