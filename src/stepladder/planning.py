"""What a ladder costs, computed from the network's architecture on the meta device, where shapes are known and nothing runs."""

from __future__ import annotations

import contextlib
import copy
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from stepladder.backbones.base import Backbone, Size
from stepladder.errors import UserError
from stepladder.ladder import Ladder, ResolutionShift, build_ladder, spaced_timesteps
from stepladder.roles import AdapterRoles, CopyRoles, Roles

FP32, BF16 = 4, 2
ADAM_STATES = 2
# memory of common cards in GiB, as sold; a tenth is left for the driver, fragments and kernels' workspaces
CARDS = {"RTX 4090": 24, "RTX 5090": 32, "A100 40": 40, "L40S": 48, "H100": 80, "H200": 141, "B200": 180}
USABLE = 0.9
SEARCH_SCALES = ((1.0,), (0.75, 1.0), (0.5, 1.0), (0.25, 1.0), (0.5, 0.75, 1.0), (0.25, 0.5, 1.0))


def on_paper(backbone: Backbone) -> Backbone:
    """The same backbone with its network on the meta device; the original is left as it is."""
    twin = copy.copy(backbone)
    twin.pipeline = copy.copy(backbone.pipeline)
    with torch.device("meta"):
        twin.network = type(backbone.network).from_config(backbone.network.config).eval()
    return twin


def _inputs(backbone: Backbone, size: Size, batch: int = 1) -> tuple[Tensor, Tensor, Any]:
    x = torch.empty(batch, backbone.latent_channels, *size, device="meta")
    return x, torch.full((batch,), 500.0, device="meta"), backbone.blank_conditioning(batch, "meta")


def network_flops(backbone: Backbone, size: Size) -> int:
    """Floating-point operations of one network pass on one sample at a latent size, (H, W) or (T, H, W)."""
    paper = backbone if next(backbone.network.parameters()).is_meta else on_paper(backbone)
    with torch.no_grad(), fused_attention(), FlopCounterMode(display=False) as counter:
        paper.denoise(paper.network, *_inputs(paper, size))
    return counter.get_total_flops()


@contextlib.contextmanager
def fused_attention() -> Iterator[None]:
    """Attention as the fused kernels do it: on the meta device PyTorch would write out the whole matrix.

    The function itself is replaced, not a mode pushed: a mode is off while backward runs, where checkpoints recompute.
    Masks cost next to nothing and are left out.
    """

    def flash(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]

    before = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = flash  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = before


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors made and not yet freed inside the block: `now`, and `peak` of it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count the storages of its results; those of its inputs were there before."""
        self._count((args, kwargs), there_before=True)
        result = func(*args, **(kwargs or {}))
        self._count(result, there_before=False)
        return result

    def _count(self, tree: Any, there_before: bool) -> None:
        for leaf in tree_leaves(tree):
            storage = leaf.untyped_storage() if isinstance(leaf, Tensor) else None
            if storage is not None and storage._cdata not in self.known:
                self.known[storage._cdata] = 0 if there_before else storage.nbytes()
                self.now += self.known[storage._cdata]
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._forget, storage._cdata)

    def _forget(self, key: int) -> None:
        self.now -= self.known.pop(key, 0)


def peak_bytes(work: Callable[[], Any]) -> int:
    """The most memory that `work`, done on the meta device, would hold at once beside what existed before."""
    with fused_attention(), LiveBytes() as live:
        work()
    return live.peak


@dataclass(frozen=True)
class Plan:
    """A ladder's cost: operations per step, and what they save."""

    steps: list[dict[str, Any]]
    speedup_over_teacher: float
    speedup_over_full_resolution: float
    parameters: int

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return dict(vars(self))


def plan_ladder(backbone: Backbone, ladder: Ladder, teacher_steps: int) -> Plan:
    """Cost of a ladder against the teacher's own sampler, guided: two passes a step unless the network embeds guidance."""
    flops = {size: network_flops(backbone, size) for size in {step.size for step in ladder.steps}}
    steps = []
    for step in ladder.steps:
        frames, (height, width) = _split(backbone.pixel_size(step.size))
        steps.append(
            {
                "teacher_timestep": round(step.teacher_timestep, 1),
                "timestep": round(step.timestep, 1),
                **{"height": height, "width": width, "frames": frames},
                "tflops": flops[step.size] / 1e12,
            }
        )
    full, total = flops[ladder.size], sum(flops[step.size] for step in ladder.steps)
    teacher = teacher_steps * (1 if backbone.embeds_guidance else 2) * full
    return Plan(steps, teacher / total, len(ladder.steps) * full / total, count(backbone.network))


def _split(size: Size) -> tuple[int, Size]:
    return (size[0], size[1:]) if len(size) == 3 else (1, size)


def count(network: nn.Module) -> int:
    """Parameters of a network."""
    return sum(parameter.numel() for parameter in network.parameters())


def stored(network: nn.Module) -> int:
    """Numbers a network's weights file holds: parameters, and tables such as SD3.5's positions."""
    return sum(tensor.numel() for tensor in network.state_dict().values())


@dataclass(frozen=True)
class TrainingSetup:
    """What memory depends on beside the model."""

    lora_rank: int = 64
    batch_size: int = 1
    gradient_checkpointing: bool = True
    gpus: int = 1


def plan_memory(backbone: Backbone, size: Size, setup: TrainingSetup) -> dict[str, Any]:
    """Bytes a GPU to generate one sample and to train, and the cards that have them.

    Weights that are not trained lie in bf16, what is trained in fp32 with its gradient, AdamW's two states and the moving
    average; activations are those of one update's worst moment, found by running it on the meta device. With several GPUs
    weights and states are taken as sharded evenly and every GPU as working on its share of the batch.

    Args:
        size: the final latent size.
    """
    encoders = sum(stored(part) for part in backbone.text_encoders)
    vae = stored(backbone.pipeline.vae) if backbone.pipeline.vae is not None else 0
    network = stored(backbone.network)
    twin = on_paper(backbone)
    twin.network.to(torch.bfloat16)
    working = peak_bytes(lambda: _generate(twin, size))
    memory: dict[str, Any] = {
        "weights": {"network": BF16 * network, "text_encoders": BF16 * encoders, "vae": BF16 * vae},
        "generate": BF16 * (network + vae) + working,
        "generate_with_text_encoders": BF16 * (network + vae + encoders) + working,
    }
    share = -(-setup.batch_size // setup.gpus)
    for mode in ("lora", "full"):
        roles = _roles(backbone, mode, setup)
        trained = sum(parameter.numel() for parameter in roles.parameters("student").values())
        # gradients are among what the update on the meta device makes, there in bf16
        states = 2 * trained * (FP32 * (1 + ADAM_STATES) + FP32 - BF16) + FP32 * trained
        held = BF16 * network + states
        activations = share * peak_bytes(lambda roles=roles: _update(backbone, roles, size))  # type: ignore[misc]
        memory[f"train_{mode}"] = held // setup.gpus + activations
    memory["fits"] = {
        name: [card for card, gib in CARDS.items() if memory[name] <= USABLE * gib * 2**30]
        for name in ("generate", "generate_with_text_encoders", "train_lora", "train_full")
    }
    return memory


def _generate(backbone: Backbone, size: Size) -> None:
    with torch.no_grad():
        backbone.denoise(backbone.network, *_inputs(backbone, size))


def _roles(backbone: Backbone, mode: str, setup: TrainingSetup) -> Roles:
    twin = on_paper(backbone)
    with torch.device("meta"):
        lora = mode == "lora"
        roles: Roles = (
            AdapterRoles(twin, setup.lora_rank, setup.gradient_checkpointing)
            if lora
            else CopyRoles(twin, setup.gradient_checkpointing)
        )
    for role in (roles.student, roles.fake_score, roles.teacher):
        role.network.to(torch.bfloat16)
    return roles


def _update(backbone: Backbone, roles: Roles, size: Size) -> None:
    """The passes of one update: the student's graph is held while the fake score learns and the guided teacher looks."""
    x, timestep, conditioning = _inputs(backbone, size)
    student = roles.student(x, timestep, conditioning)
    roles.fake_score(student.x0.detach(), timestep, conditioning).x0.sum().backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        roles.teacher.guided(x, timestep, conditioning, conditioning, 4.0)
    student.x0.sum().backward()  # type: ignore[no-untyped-call]


def search_ladders(
    backbone: Backbone, size: Size, teacher_steps: int, spacing: float, speedup: float, shift: ResolutionShift = "flow"
) -> list[dict[str, Any]]:
    """Ladders of two to eight steps that reach a speedup over the teacher, the closest first.

    Args:
        size: pixels of the final picture.
        spacing: shift of the teacher's timesteps.

    Returns:
        for each: allocation, pixel sizes, logSNR thresholds, timesteps and speedup.
    """
    flops: dict[Size, int] = {}
    teacher = teacher_steps * (1 if backbone.embeds_guidance else 2)
    found = []
    for scales, steps in itertools.product(SEARCH_SCALES, range(2, 9)):
        rungs = [scaled for scale in scales if (scaled := _scaled(backbone, size, scale)) is not None]
        if len(rungs) < len(scales):
            continue
        latents = [backbone.latent_size(rung) for rung in rungs]
        flops.update({latent: network_flops(backbone, latent) for latent in latents if latent not in flops})
        timesteps = spaced_timesteps(steps, spacing)
        for allocation in _compositions(steps, len(scales)):
            cost = sum(number * flops[latent] for number, latent in zip(allocation, latents, strict=True))
            reached = teacher * flops[latents[-1]] / cost
            if reached >= speedup:
                thresholds = _thresholds(backbone, timesteps, allocation)
                ladder = build_ladder(backbone.process, timesteps, latents, thresholds, shift)
                found.append(
                    {
                        "allocation": ladder.allocation(),
                        "sizes": [list(rung) for rung in rungs],
                        "thresholds": thresholds,
                        "timesteps": [round(step.timestep, 1) for step in ladder.steps],
                        "speedup_over_teacher": reached,
                    }
                )
    return sorted(found, key=lambda each: each["speedup_over_teacher"])


def _scaled(backbone: Backbone, size: Size, scale: float) -> Size | None:
    """The size times `scale`, rounded to what the model can take; None where that is no such size."""
    frames, space = (size[:1], size[1:]) if len(size) == 3 else ((), size)
    unit = 32
    scaled = (*frames, *(round(side * scale / unit) * unit for side in space)) if scale != 1 else size
    try:
        backbone.latent_size(scaled)
    except UserError:
        return None
    return scaled


def _compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    for cuts in itertools.combinations(range(1, total), parts - 1):
        yield tuple(after - before for before, after in itertools.pairwise((0, *cuts, total)))


def _thresholds(backbone: Backbone, timesteps: Sequence[float], allocation: tuple[int, ...]) -> list[float]:
    """logSNR half way between the last step of a rung and the first of the next."""
    cuts = list(itertools.accumulate(allocation))[:-1]
    logsnr = [backbone.process.logsnr(torch.tensor(t, dtype=torch.float64)).item() for t in timesteps]
    low = backbone.process.logsnr_range()[0]
    return [round((max(logsnr[cut - 1], low, logsnr[cut] - 4) + logsnr[cut]) / 2, 3) for cut in cuts]
