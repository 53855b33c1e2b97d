"""Export: a student as files that stock diffusers, ComfyUI and `stepladder generate` load, and the way back."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stepladder.backbones import load_backbone
from stepladder.backbones.base import Backbone
from stepladder.errors import UserError
from stepladder.fingerprint import fingerprint
from stepladder.ladder import Ladder, full_resolution
from stepladder.precision import pick_device
from stepladder.processes import FlowProcess
from stepladder.roles import Role, load_tensors
from stepladder.samplers import Sampler
from stepladder.scheduler import LadderScheduler
from stepladder.storage import check_replaceable, replace_folder, write_text
from stepladder.world.paths import resolve_model

CARD_FILE = "stepladder.json"
LORA_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE = "adapter_model.safetensors"
FULL_FILE = "diffusion_pytorch_model.safetensors"
COMFY_FILE = "comfyui_lora.safetensors"
FACTS = {"model", "mode", "tensors", "method", "fingerprint", "max_sequence_length", "guidance_scale"}


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


def write_folder(folder: Path, ours: str, fill: Callable[[Path], None]) -> None:
    """Let `fill` write a folder beside and rename it, so that it is whole or not there.

    Raises:
        UserError: the disk is full, or `folder` holds something else than a folder of ours, known by its file `ours`.
    """
    folder = folder.resolve()
    check_replaceable(folder, ours)
    beside = folder.with_name(folder.name + ".tmp")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        fill(beside)
        replace_folder(beside, folder, ours)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise UserError(f"cannot write {folder}: {error}; free some space or choose another folder") from error


def export_student(
    backbone: Backbone, tensors: dict[str, Tensor], mode: str, scheduler: LadderScheduler, card: dict[str, Any], folder: Path
) -> None:
    """Write a student's folder for diffusers.

    `lora` gives `pytorch_lora_weights.safetensors` with alpha = rank, as stock `load_lora_weights` reads it, or peft's own
    layout for pipelines that load no LoRA themselves; `full` gives the whole network's folder. `scheduler_config.json`
    holds the ladder, `stepladder.json` what it belongs to.

    Args:
        tensors: the student's weights by parameter name.
        mode: "lora" or "full".
        card: facts to keep: model path, recipe, figures.
    """

    def fill(beside: Path) -> None:
        scheduler.save_pretrained(str(beside))
        facts = {"mode": mode, "tensors": len(tensors), "pipeline": backbone.pipeline_class, "denoiser": backbone.denoiser, **card}
        if mode == "lora":
            _write_lora(backbone, tensors, beside)
        else:
            part = beside / backbone.denoiser
            part.mkdir()
            (part / "config.json").write_text(backbone.network.to_json_string(), encoding="utf-8")
            save_file(_plain(tensors), str(part / FULL_FILE), metadata={"format": "pt"})
        write_text(beside / CARD_FILE, json.dumps(facts, indent=2))
        write_text(beside / "README.md", model_card(backbone, facts, scheduler))

    write_folder(folder, CARD_FILE, fill)


def weights_place(backbone: Backbone, mode: str) -> tuple[str, str]:
    """Where an exported student's weights lie in its folder, and what stands before each parameter's name."""
    if mode == "full":
        return f"{backbone.denoiser}/{FULL_FILE}", ""
    return (LORA_FILE, f"{backbone.denoiser}.") if backbone.loads_lora else (PEFT_FILE, "base_model.model.")


def _plain(tensors: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    return {prefix + name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}


def _write_lora(backbone: Backbone, tensors: dict[str, Tensor], folder: Path) -> None:
    if not backbone.loads_lora:
        rank = next(tensor.shape[0] for name, tensor in tensors.items() if ".lora_A." in name)
        LoraConfig(r=rank, lora_alpha=rank, target_modules=lora_layers(tensors)).save_pretrained(str(folder))
    file, prefix = weights_place(backbone, "lora")
    save_file(_plain(tensors, prefix), str(folder / file), metadata={"format": "pt"})


def lora_layers(tensors: dict[str, Tensor]) -> list[str]:
    """Names of the layers that a LoRA's tensors adapt."""
    return sorted({name.split(".lora_")[0] for name in tensors})


def export_comfyui(
    backbone: Backbone, tensors: dict[str, Tensor], scheduler: LadderScheduler, card: dict[str, Any], folder: Path
) -> None:
    """Write a LoRA for ComfyUI's own loader: its names, `.alpha` tensors, and the ladder in the file's metadata.

    ComfyUI has no node that changes the resolution between steps; the metadata keys `sigmas` and `latent_sizes` say what
    such a node needs. Sigmas are noise over image: t / 1000 for flows, sqrt((1 - abar) / abar) for variance-preserving models.
    """

    def fill(beside: Path) -> None:
        content: dict[str, Tensor] = {}
        for layer in lora_layers(tensors):
            down, up = tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"]
            name = backbone.comfy_key(layer)
            content |= _plain({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up})
            content[f"{name}.alpha"] = torch.tensor(float(down.shape[0]))
        steps = scheduler.ladder().steps
        metadata = {
            "format": "pt",
            "base_model": str(card["model"]),
            "sigmas": json.dumps([*(round(sigma, 6) for sigma in comfy_sigmas(scheduler)), 0.0]),
            "timesteps": json.dumps([step.timestep for step in steps]),
            "latent_sizes": json.dumps([list(step.size) for step in steps]),
            "alpha_of_noise": json.dumps(scheduler.config.mix),
        }
        save_file(content, str(beside / COMFY_FILE), metadata=metadata)
        write_text(beside / "README.md", comfy_card(card, scheduler))

    write_folder(folder, COMFY_FILE, fill)


def comfy_sigmas(scheduler: LadderScheduler) -> list[float]:
    """The ladder's noise levels as ComfyUI counts them."""
    process, timesteps = scheduler.process, torch.tensor(scheduler.config.timesteps, dtype=torch.float64)
    if isinstance(process, FlowProcess):
        return process.sigma(timesteps).tolist()
    return (process.sigma(timesteps) / process.alpha(timesteps)).tolist()


def export_merged(student: Student, scheduler: LadderScheduler, folder: Path) -> None:
    """Write the student as a complete pipeline directory, its adapters merged and its ladder the pipeline's scheduler."""

    def fill(beside: Path) -> None:
        pipeline = student.backbone.pipeline
        pipeline.scheduler = scheduler
        pipeline.save_pretrained(str(beside), safe_serialization=True)
        write_text(beside / CARD_FILE, json.dumps({**student.card, "mode": "merged"}, indent=2))
        write_text(beside / "README.md", model_card(student.backbone, {**student.card, "mode": "merged"}, scheduler))

    write_folder(folder, CARD_FILE, fill)


def _ladder_rows(scheduler: LadderScheduler) -> str:
    return "\n".join(f"| {step.timestep:.1f} | {' × '.join(map(str, step.size))} |" for step in scheduler.ladder().steps)


def model_card(backbone: Backbone, facts: dict[str, Any], scheduler: LadderScheduler) -> str:
    """The README of an exported student: how to load it, its ladder, and where it comes from."""
    ladder = scheduler.ladder()
    size = tuple(facts["first_size"])
    options = {
        **({"num_frames": backbone.pixel_size(ladder.steps[0].size)[0]} if len(ladder.size) == 3 else {}),
        **{"height": size[-2], "width": size[-1], "num_inference_steps": len(ladder.steps)},
        **backbone.call_options(tuple(facts["size"])),
    }
    said = ", ".join(f"{name}={value!r}" for name, value in options.items())
    network = type(backbone.network).__name__
    weights = {
        "lora": 'pipe.load_lora_weights(".")'
        if backbone.loads_lora
        else f'pipe.{backbone.denoiser} = PeftModel.from_pretrained(pipe.{backbone.denoiser}, ".")  # from peft',
        "full": f'pipe.{backbone.denoiser} = {network}.from_pretrained(".", subfolder="{backbone.denoiser}")',
        "merged": "",
    }[facts["mode"]]
    merged = facts["mode"] == "merged"
    base = '"."' if merged else f'"{facts["model"]}"'
    stock = f"""pipe = {facts["pipeline"]}.from_pretrained({base})  # fingerprint of the base: {facts["fingerprint"]}
{weights}
pipe.scheduler = LadderScheduler.from_pretrained("{"scheduler" if merged else "."}")  # from stepladder.scheduler
result = pipe(prompt, {said})"""
    drop_in = (
        ""
        if backbone.rung_by_rung
        else f"In the stock pipeline, which starts at the first rung's size:\n\n```python\n{stock}\n```\n"
    )
    simple = (
        ""
        if merged
        else f"""```python
from stepladder.pipeline import LadderPipeline

pipe = LadderPipeline.from_pretrained("{facts["model"]}", student=".")
result = pipe(prompt)
```
"""
    )
    return f"""# {facts["method"].upper()} {ladder.allocation()} student of {facts["model"]}

A few-step student that climbs resolutions, distilled by Stepladder in {facts.get("updates", "?")} updates. Use it at strength 1.0;
there is no alpha to know about. Its licence is that of the model it was distilled from: read the licence of {facts["model"]} before
you share or sell what it makes.

{simple}
{drop_in}
| timestep | latent size |
|---|---|
{_ladder_rows(scheduler)}

{_figures(facts)}
The whole recipe stands in `{CARD_FILE}`.
"""


def _figures(facts: dict[str, Any]) -> str:
    if not facts.get("figures"):
        return "No figures were measured before this export."
    rows = "\n".join(
        f"| {name} | {row['nfe']} | {row['prompt_accuracy']:.3f} | {row['fid']:.2f} | {row['samples']} |"
        for name, row in facts["figures"].items()
    )
    return f"""On held-out captions of the bundled world, seed {next(iter(facts["figures"].values()))["seed"]}:

| sampler | passes | prompts right | FID | samples |
|---|---|---|---|---|
{rows}
"""


def comfy_card(facts: dict[str, Any], scheduler: LadderScheduler) -> str:
    """The README beside a ComfyUI LoRA."""
    return f"""# {facts["method"].upper()} student of {facts["model"]}, for ComfyUI

Put `{COMFY_FILE}` into `models/loras` and load it with LoraLoaderModelOnly at strength 1.0; guidance (cfg) is 1. The student climbs
resolutions, and ComfyUI has no node of its own that does: sample these steps with one that resizes the latent between them. The
file's metadata holds what it needs (`sigmas` as ComfyUI counts them, `latent_sizes`, `alpha_of_noise`). Its licence is that of
{facts["model"]}.

| timestep | latent size |
|---|---|
{_ladder_rows(scheduler)}
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
        missing = FACTS - set(card)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); export the student again") from error
    if missing:
        raise UserError(f"{path} lacks {', '.join(sorted(missing))}; export the student again")
    if card["mode"] not in ("lora", "full"):
        raise UserError(f"{folder} is a {card['mode']} export, which its own program loads; point at the run's student folder")
    return card


def read_weights(folder: Path, card: dict[str, Any], backbone: Backbone) -> dict[str, Tensor]:
    """An exported student's tensors, by parameter name.

    Raises:
        UserError: the file is missing, truncated, or holds another number of tensors than were exported.
    """
    file, prefix = weights_place(backbone, card["mode"])
    weights = folder / file
    try:
        tensors = load_file(str(weights))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{weights} is missing or truncated ({error}); export the student again") from error
    if len(tensors) != card["tensors"]:
        raise UserError(
            f"{weights} has {len(tensors)} tensors, not the {card['tensors']} that were exported; export the student again"
        )
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def read_scheduler(folder: Path) -> LadderScheduler:
    """The ladder of an exported student."""
    try:
        return LadderScheduler.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"the ladder in {folder}/scheduler_config.json is missing or damaged; export the student again") from error


def load_student(
    folder: Path,
    with_teacher: bool = True,
    device: str = "auto",
    model: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
) -> Student:
    """Load an exported student, its adapters merged into the weights, so that it runs as fast as its base.

    Args:
        folder: what `export_student` wrote.
        with_teacher: keep the base beside the student, at the price of a second network in memory.
        model: where the base lies now, if not where the student was distilled.
        dtype: of all weights.

    Raises:
        UserError: the folder is no export, its base is missing or another, or its weights are truncated or do not fit.
    """
    card = read_card(folder)
    base = str(model) if model is not None else card["model"]
    weights = card.get("weights") if model is None else None
    backbone = load_backbone(resolve_model(base), card["max_sequence_length"], dtype, weights)
    actual, wanted = fingerprint(backbone.network), card["fingerprint"]
    if actual != wanted:
        raise UserError(
            f"this student was distilled from base {wanted} ({card['model']}), but {base} is {actual}; use its own base"
        )
    if backbone.pipeline_class != card.get("pipeline", backbone.pipeline_class):
        raise UserError(f"this student is for a {card['pipeline']}, but {base} is a {backbone.pipeline_class}; use its own base")
    tensors = read_weights(folder, card, backbone)
    backbone.to(pick_device(device))
    network = copy.deepcopy(backbone.network) if with_teacher else backbone.network
    if card["mode"] == "lora":
        merge_lora(network, tensors)
    else:
        load_tensors(dict(network.named_parameters()), tensors)
    scheduler = read_scheduler(folder)
    teacher = Role(backbone, backbone.network) if with_teacher else None
    return Student(backbone, Role(backbone, network), teacher, scheduler.ladder(), scheduler.options(), card)


def merge_lora(network: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Add B A to every weight, of a matrix or a convolution, that has an adapter; alpha equals rank, so its scale is 1.

    Raises:
        UserError: a matrix has no weight to go to, or none of its shape.
    """
    own = dict(network.named_parameters())
    with torch.no_grad():
        for name in lora_layers(tensors):
            parts = (tensors.get(f"{name}.lora_A.weight"), tensors.get(f"{name}.lora_B.weight"), own.get(f"{name}.weight"))
            down, up, weight = parts
            if down is None or up is None or weight is None or (up.shape[0], *down.shape[1:]) != tuple(weight.shape):
                raise UserError(f"this LoRA does not fit its base at {name}; it belongs to another model")
            change = (up.flatten(1).float() @ down.flatten(1).float()).view(weight.shape)
            weight.copy_((weight.float() + change.to(weight.device)).to(weight.dtype))


def student_folder(path: Path) -> Path:
    """The student of a run, or the export itself."""
    return path / "student" if (path / "student" / CARD_FILE).is_file() else path
