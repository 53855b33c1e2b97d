"""Export: a student as a folder that stock diffusers loads and that `stepladder generate` needs nothing else for."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stepladder.backbones import load_backbone
from stepladder.backbones.base import Backbone
from stepladder.errors import UserError
from stepladder.ladder import Ladder
from stepladder.roles import STUDENT, AdapterRoles, CopyRoles, Roles, load_parameters
from stepladder.scheduler import LadderScheduler
from stepladder.storage import write_text
from stepladder.world.paths import resolve_model

CARD_FILE = "stepladder.json"
LORA_FILE = "pytorch_lora_weights.safetensors"
FULL_FILE = "diffusion_pytorch_model.safetensors"
FINGERPRINT_VALUES = 64


def fingerprint(network: nn.Module) -> str:
    """A hash of a network's architecture and the first values of each of its own tensors; adapters do not count."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        if "lora_" not in name:
            digest.update(f"{name.replace('.base_layer', '')} {tuple(tensor.shape)}".encode())
            digest.update(tensor.flatten()[:FINGERPRINT_VALUES].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


@dataclass
class Student:
    """A student ready to sample: the backbone it belongs to, its roles, its ladder and the sampler's options."""

    backbone: Backbone
    roles: Roles
    ladder: Ladder
    options: dict[str, Any]
    card: dict[str, Any]


def export_student(
    backbone: Backbone, tensors: dict[str, Tensor], mode: str, scheduler: LadderScheduler, card: dict[str, Any], folder: Path
) -> None:
    """Write a student's folder beside and rename it.

    `lora` gives `pytorch_lora_weights.safetensors` with alpha = rank, as stock `load_lora_weights` reads it; `full` gives the
    whole network's folder. `scheduler_config.json` holds the ladder, `stepladder.json` what it belongs to.

    Args:
        tensors: the student's weights by parameter name.
        mode: "lora" or "full".
        card: facts to keep: model path, recipe, figures.
    """
    beside = folder.with_name(folder.name + ".tmp")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        scheduler.save_pretrained(str(beside))
        if mode == "lora":
            content = {f"transformer.{name}": tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(content, str(beside / LORA_FILE), metadata={"format": "pt"})
        else:
            part = beside / "transformer"
            part.mkdir()
            (part / "config.json").write_text(backbone.network.to_json_string(), encoding="utf-8")  # type: ignore[operator]
            content = {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(content, str(part / FULL_FILE), metadata={"format": "pt"})
        facts = {"mode": mode, "pipeline": backbone.pipeline_class, **card}
        write_text(beside / CARD_FILE, json.dumps(facts, indent=2))
        write_text(beside / "README.md", model_card(facts, scheduler))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(beside, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise UserError(f"cannot write {folder}: {error}; free some space or choose another folder") from error


def model_card(facts: dict[str, Any], scheduler: LadderScheduler) -> str:
    """The README of an exported student: how to load it, its ladder, and where it comes from."""
    ladder = scheduler.ladder()
    rows = "\n".join(f"| {step.timestep:.1f} | {step.size[0]} × {step.size[1]} |" for step in ladder.steps)
    height, width = facts["first_size"]
    weights = (
        'pipe.load_lora_weights(".")'
        if facts["mode"] == "lora"
        else ('pipe.transformer = SD3Transformer2DModel.from_pretrained(".", subfolder="transformer")')
    )
    return f"""# {facts["method"].upper()} {ladder.allocation()} student of {facts["model"]}

A few-step student that climbs resolutions, distilled by Stepladder. Its licence is that of the model it was distilled from.

```python
pipe = {facts["pipeline"]}.from_pretrained(...)  # the base model, fingerprint {facts["fingerprint"]}
{weights}
pipe.scheduler = LadderScheduler.from_pretrained(".")
image = pipe(prompt, height={height}, width={width}, num_inference_steps={len(ladder.steps)}, guidance_scale=1,
             max_sequence_length={facts["max_sequence_length"]}).images[0]
```

| timestep | latent size |
|---|---|
{rows}
"""


def load_student(folder: Path) -> Student:
    """Load an exported student with its base model.

    Raises:
        UserError: the folder is no export, its base is missing or another, or its weights are truncated or do not fit.
    """
    path = folder / CARD_FILE
    if not path.is_file():
        raise UserError(f"{folder} is no exported student (it has no {CARD_FILE}); point at a run's student folder")
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
        model, mode = card["model"], card["mode"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); export the student again") from error
    backbone = load_backbone(resolve_model(model), card["max_sequence_length"])
    actual = fingerprint(backbone.network)
    if actual != card["fingerprint"]:
        raise UserError(f"this student was distilled from base {card['fingerprint']}, but {model} is {actual}; use its own base")
    weights = folder / (LORA_FILE if mode == "lora" else f"transformer/{FULL_FILE}")
    try:
        tensors = load_file(str(weights))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{weights} is missing or truncated ({error}); export the student again") from error
    roles: Roles = AdapterRoles(backbone, card["lora_rank"]) if mode == "lora" else CopyRoles(backbone)
    load_parameters(
        roles, STUDENT, {name.removeprefix("transformer.") if mode == "lora" else name: t for name, t in tensors.items()}
    )
    scheduler = LadderScheduler.from_pretrained(str(folder))
    return Student(backbone, roles, scheduler.ladder(), scheduler.options(), card)


def student_folder(path: Path) -> Path:
    """The student of a run, or the export itself."""
    return path / "student" if (path / "student" / CARD_FILE).is_file() else path
