"""Export: a student as a folder that stock diffusers loads and that `stepladder generate` needs nothing else for."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stepladder.backbones import load_backbone
from stepladder.backbones.base import Backbone
from stepladder.errors import UserError
from stepladder.fingerprint import fingerprint
from stepladder.ladder import Ladder, full_resolution
from stepladder.precision import pick_device
from stepladder.roles import Role, load_tensors
from stepladder.samplers import Sampler
from stepladder.scheduler import LadderScheduler
from stepladder.storage import check_replaceable, replace_folder, write_text
from stepladder.world.paths import resolve_model

CARD_FILE = "stepladder.json"
LORA_FILE = "pytorch_lora_weights.safetensors"
FULL_FILE = "diffusion_pytorch_model.safetensors"


@dataclass
class Student:
    """A student ready to sample, its teacher beside it where wanted, its ladder and the sampler's options."""

    backbone: Backbone
    student: Role
    teacher: Role | None
    ladder: Ladder
    options: dict[str, Any]
    card: dict[str, Any]

    def samplers(self, teacher_steps: int) -> dict[str, Sampler]:
        """`teacher`, `naive` (its weights through the student's ladder) and the student, which is alone if loaded so."""
        alone = {self.card["method"]: Sampler(self.student, self.ladder, 1.0, self.options)}
        if self.teacher is None:
            return alone
        scale = self.card["guidance_scale"]
        full = full_resolution(self.backbone.teacher_timesteps(teacher_steps), self.ladder.size)
        return {
            "teacher": Sampler(self.teacher, full, scale),
            "naive": Sampler(self.teacher, self.ladder, scale, self.options),
            **alone,
        }


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
    folder = folder.resolve()
    check_replaceable(folder, CARD_FILE)
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
        facts = {"mode": mode, "tensors": len(content), "pipeline": backbone.pipeline_class, **card}
        write_text(beside / CARD_FILE, json.dumps(facts, indent=2))
        write_text(beside / "README.md", model_card(facts, scheduler))
        replace_folder(beside, folder, CARD_FILE)
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


def read_card(folder: Path) -> dict[str, Any]:
    """The facts of an exported student.

    Raises:
        UserError: the folder is no export, or its facts are damaged.
    """
    path = folder / CARD_FILE
    if not path.is_file():
        raise UserError(f"{folder} is no exported student (it has no {CARD_FILE}); point at a run's student folder")
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
        missing = {"model", "mode", "tensors", "method", "fingerprint", "max_sequence_length", "guidance_scale"} - set(card)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); export the student again") from error
    if missing:
        raise UserError(f"{path} lacks {', '.join(sorted(missing))}; export the student again")
    return card


def load_student(folder: Path, with_teacher: bool = True, device: str = "auto") -> Student:
    """Load an exported student, its adapters merged into the weights, so that it runs as fast as its base.

    Args:
        folder: what `export_student` wrote.
        with_teacher: keep the base beside the student, at the price of a second network in memory.

    Raises:
        UserError: the folder is no export, its base is missing or another, or its weights are truncated or do not fit.
    """
    card = read_card(folder)
    backbone = load_backbone(resolve_model(card["model"]), card["max_sequence_length"])
    actual = fingerprint(backbone.network)
    if actual != card["fingerprint"]:
        wanted = card["fingerprint"]
        raise UserError(f"this student was distilled from base {wanted}, but {card['model']} is {actual}; use its own base")
    weights = folder / (LORA_FILE if card["mode"] == "lora" else f"transformer/{FULL_FILE}")
    try:
        tensors = load_file(str(weights))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{weights} is missing or truncated ({error}); export the student again") from error
    if len(tensors) != card["tensors"]:
        raise UserError(
            f"{weights} has {len(tensors)} tensors, not the {card['tensors']} that were exported; export the student again"
        )
    backbone.to(pick_device(device))
    network = copy.deepcopy(backbone.network) if with_teacher else backbone.network
    if card["mode"] == "lora":
        merge_lora(network, {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()})
    else:
        load_tensors(dict(network.named_parameters()), tensors)
    try:
        scheduler = LadderScheduler.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"the ladder in {folder}/scheduler_config.json is missing or damaged; export the student again") from error
    teacher = Role(backbone, backbone.network) if with_teacher else None
    return Student(backbone, Role(backbone, network), teacher, scheduler.ladder(), scheduler.options(), card)


def merge_lora(network: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Add B A to every weight that has an adapter; alpha equals rank, so its scale is 1.

    Raises:
        UserError: a matrix has no weight to go to, or none of its shape.
    """
    own = dict(network.named_parameters())
    with torch.no_grad():
        for name in sorted({key.split(".lora_")[0] for key in tensors}):
            down, up, weight = (
                tensors.get(f"{name}.lora_A.weight"),
                tensors.get(f"{name}.lora_B.weight"),
                own.get(f"{name}.weight"),
            )
            if down is None or up is None or weight is None or weight.shape != (up.shape[0], down.shape[1]):
                raise UserError(f"this LoRA does not fit its base at {name}; it belongs to another model")
            weight.add_((up @ down).to(weight.device, weight.dtype))


def student_folder(path: Path) -> Path:
    """The student of a run, or the export itself."""
    return path / "student" if (path / "student" / CARD_FILE).is_file() else path
