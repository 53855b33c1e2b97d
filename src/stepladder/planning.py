"""What a ladder costs, computed from the network's architecture on the meta device, where no arithmetic is done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from stepladder.backbones.base import Backbone
from stepladder.conditioning import Conditioning
from stepladder.ladder import Ladder

FP32, BF16 = 4, 2
ADAM_STATES = 2


def network_flops(backbone: Backbone, size: tuple[int, ...]) -> int:
    """Floating-point operations of one network pass on one sample at a latent size (H, W)."""
    with torch.device("meta"):
        network = type(backbone.network).from_config(backbone.network.config)  # type: ignore[attr-defined]
    x = torch.empty(1, backbone.latent_channels, *size, device="meta")
    timestep = torch.full((1,), 500.0, device="meta")
    conditioning = Conditioning({name: tensor[:1].to("meta") for name, tensor in backbone.encode(["a"]).tensors.items()})
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        backbone.denoise(network, x, timestep, conditioning)
    return counter.get_total_flops()


@dataclass(frozen=True)
class Plan:
    """A ladder's cost: operations per step, and what they save."""

    steps: list[dict[str, Any]]
    speedup_over_teacher: float
    speedup_over_full_resolution: float
    parameters: int
    memory: dict[str, int]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return dict(vars(self))


def plan_ladder(backbone: Backbone, ladder: Ladder, teacher_steps: int, guided: bool = True, lora_rank: int = 64) -> Plan:
    """Cost of a ladder against the teacher's own sampler (two passes a step under guidance)."""
    flops = {size: network_flops(backbone, size) for size in {step.size for step in ladder.steps}}
    scale = backbone.default_size[0] // backbone.latent_size(backbone.default_size)[0]
    steps = [
        {
            "teacher_timestep": round(step.teacher_timestep, 1),
            "timestep": round(step.timestep, 1),
            "height": step.size[-2] * scale,
            "width": step.size[-1] * scale,
            "tflops": flops[step.size] / 1e12,
        }
        for step in ladder.steps
    ]
    full, total = flops[ladder.size], sum(flops[step.size] for step in ladder.steps)
    parameters = sum(parameter.numel() for parameter in backbone.network.parameters())
    return Plan(
        steps,
        teacher_steps * (2 if guided else 1) * full / total,
        len(ladder.steps) * full / total,
        parameters,
        training_memory(backbone.network, parameters, lora_parameters(backbone, lora_rank)),
    )


def lora_parameters(backbone: Backbone, rank: int) -> int:
    """Parameters of one adapter."""
    layers = [
        module
        for name, module in backbone.network.named_modules()
        if isinstance(module, nn.Linear) and any(name == target or name.endswith("." + target) for target in backbone.lora_targets)
    ]
    return sum(rank * (layer.in_features + layer.out_features) for layer in layers)


def training_memory(network: nn.Module, parameters: int, adapter: int) -> dict[str, int]:
    """Bytes of weights, gradients, optimiser states and moving average; activations are not counted.

    `generate_bf16`: one network in bf16. `train_lora`: one base and two adapters. `train_full`: three networks.
    """
    trained = FP32 * (2 * (2 + ADAM_STATES) + 1)
    return {
        "generate_bf16": BF16 * parameters,
        "train_lora": FP32 * parameters + trained * adapter,
        "train_full": FP32 * parameters + trained * parameters,
    }
