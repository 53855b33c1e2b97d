"""The three networks of distribution matching: student, fake score and teacher.

`AdapterRoles` keeps one frozen base and gives student and fake score a LoRA adapter each; the teacher is the base with
adapters off. `CopyRoles` keeps three whole networks. Nothing outside this file knows which of the two it has.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from stepladder.backbones.base import Backbone
from stepladder.conditioning import Conditioning
from stepladder.errors import UserError
from stepladder.prediction import Prediction

STUDENT, FAKE_SCORE, TEACHER, REFERENCE = "student", "fake_score", "teacher", "reference"
TRAINED = (STUDENT, FAKE_SCORE)


class Role:
    """A network in one of its roles: the only way in which methods call networks."""

    def __init__(self, backbone: Backbone, network: nn.Module, enter: Callable[[], None] | None = None) -> None:
        self.backbone = backbone
        self.network = network
        self.enter = enter

    def __call__(self, x: Tensor, timestep: Tensor, conditioning: Conditioning) -> Prediction:
        """Predict x0 and eps of `x`, (B, C, …), at a scalar or (B,) timestep on the clock of x's resolution."""
        return self._call(x, timestep, conditioning, None)

    def _call(self, x: Tensor, timestep: Tensor, conditioning: Conditioning, guidance_scale: float | None) -> Prediction:
        if self.enter is not None:
            self.enter()
        return self.backbone.denoise(self.network, x, timestep.expand(len(x)), conditioning, guidance_scale)

    def features(self, x: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """Hidden states of the middle block at `x`, (B, tokens, D), with their graph."""
        if self.enter is not None:
            self.enter()
        return self.backbone.features(self.network, x, timestep.expand(len(x)), conditioning)

    def passes(self, guidance_scale: float) -> int:
        """Network passes of a guided prediction for one sample."""
        return 1 if guidance_scale == 1 or self.backbone.embeds_guidance else 2

    def guided(
        self, x: Tensor, timestep: Tensor, conditioning: Conditioning, unconditional: Conditioning, guidance_scale: float
    ) -> Prediction:
        """Classifier-free guidance u + s (c - u), both passes in one batch.

        One pass where the scale is 1, or where the network embeds it as FLUX.1-dev does.
        """
        if guidance_scale == 1:
            return self(x, timestep, conditioning)
        if self.backbone.embeds_guidance:
            return self._call(x, timestep, conditioning, guidance_scale)
        both = self(torch.cat([x, x]), timestep.expand(len(x)).repeat(2), Conditioning.cat([unconditional, conditioning]))
        x0, eps = both.x0.chunk(2), both.eps.chunk(2)
        return Prediction(torch.lerp(x0[0], x0[1], guidance_scale), torch.lerp(eps[0], eps[1], guidance_scale))


def bound(role: Role, conditioning: Conditioning) -> Callable[[Tensor, Tensor], Prediction]:
    """A role with its prompts, as `cascade` calls it."""
    return lambda x, timestep: role(x, timestep, conditioning)


class Roles(Protocol):
    """Student, fake score and teacher, and the parameters of the two that learn; the student as it was, where one is kept."""

    student: Role
    fake_score: Role
    teacher: Role
    reference: Role

    def real_score(self, scale: float) -> Role:
        """The teacher, leaning towards the fake score by `scale`: DynaDG of DMDR section 3.3; the teacher itself at 0."""

    def parameters(self, role: str) -> dict[str, nn.Parameter]:
        """The trainable parameters of `student` or `fake_score`, by name."""


class AdapterRoles:
    """One frozen base; student and fake score are LoRA adapters on it (alpha = rank, so that no reader can misread it).

    `kept` names the roles that have an adapter of their own: those that learn, and the reference where one is wanted.

    Roles are switched by peft's private flags: its public `set_adapter` and `disable_adapters` also flip
    `requires_grad`, and a switch between a forward and its backward would then leave the gradient at zero, silently.
    """

    def __init__(self, backbone: Backbone, rank: int, gradient_checkpointing: bool = False, kept: Sequence[str] = TRAINED) -> None:
        self.network = backbone.network.requires_grad_(False)
        self.current = ("", 1.0)
        for name in kept:
            config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(backbone.lora_targets))
            # peft's own entrance: not every diffusers network (PixArt's) has `add_adapter`
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Already found a `peft_config`")
                inject_adapter_in_model(config, self.network, adapter_name=name)
        self.layers = [module for module in self.network.modules() if isinstance(module, BaseTunerLayer)]
        # found once: a walk over a large network takes longer than one would think, and optimisers ask at every step
        self.adapters = {name: self._adapter(name) for name in kept}
        for name in kept:
            for parameter in self.parameters(name).values():
                parameter.requires_grad_(name in TRAINED)
                # adapters learn in full precision also on a base that is kept in half
                parameter.data = parameter.data.float()
        self.student, self.fake_score, self.teacher, self.reference = (
            Role(backbone, self.network, self._entrance(name)) for name in (STUDENT, FAKE_SCORE, TEACHER, REFERENCE)
        )
        if gradient_checkpointing:
            self.network.enable_gradient_checkpointing(self._checkpoint)  # type: ignore[operator]

    def _entrance(self, name: str, scale: float = 1.0) -> Callable[[], None]:
        return lambda: self._enter(name, scale)

    def _enter(self, name: str, scale: float = 1.0) -> None:
        if (name, scale) == self.current:
            return
        for layer in self.layers:
            layer._disable_adapters = name == TEACHER
            layer._active_adapter = [name] if name != TEACHER else [STUDENT]
            if name != TEACHER:
                layer.scaling[name] = scale
        self.current = (name, scale)

    def real_score(self, scale: float) -> Role:
        """The base with the fake score's adapter at a smaller scale: DynaDG of DMDR section 3.3; the teacher itself at 0."""
        return Role(self.teacher.backbone, self.network, self._entrance(FAKE_SCORE, scale)) if scale else self.teacher

    def _checkpoint(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """Gradient checkpointing that recomputes with the adapter of the forward, whatever role is current by then."""
        then = self.current

        def run(*arguments: Any) -> Any:
            before = self.current
            self._enter(*then)
            try:
                return function(*arguments)
            finally:
                self._enter(*before)

        return torch.utils.checkpoint.checkpoint(run, *inputs, use_reentrant=False)

    def parameters(self, role: str) -> dict[str, nn.Parameter]:
        """The adapter's LoRA matrices, by their name without the adapter's."""
        return self.adapters.get(role, {})

    def _adapter(self, role: str) -> dict[str, nn.Parameter]:
        mark = f".{role}."
        return {name.replace(mark, "."): p for name, p in self.network.named_parameters() if "lora_" in name and mark in name}


class CopyRoles:
    """Three whole networks, as the papers' full fine-tuning has them."""

    def __init__(self, backbone: Backbone, gradient_checkpointing: bool = False, kept: Sequence[str] = TRAINED) -> None:
        self.networks = {TEACHER: backbone.network.requires_grad_(False)}
        for name in kept:
            network = copy.deepcopy(backbone.network).requires_grad_(name in TRAINED)
            if gradient_checkpointing:
                network.enable_gradient_checkpointing()  # type: ignore[operator]
            self.networks[name] = network
        self.student, self.fake_score, self.teacher, self.reference = (
            Role(backbone, self.networks.get(name, backbone.network)) for name in (STUDENT, FAKE_SCORE, TEACHER, REFERENCE)
        )

    def real_score(self, scale: float) -> Role:
        """The teacher; copies have no adapter to lean with.

        Raises:
            UserError: `scale` is not 0.
        """
        if scale:
            raise UserError("a real score that leans needs adapters: set roles.mode to lora, or method.cold_start.real_scale to 0")
        return self.teacher

    def parameters(self, role: str) -> dict[str, nn.Parameter]:
        """All parameters of the role's own network."""
        return dict(self.networks[role].named_parameters()) if role in self.networks else {}


def load_parameters(roles: Roles, role: str, tensors: dict[str, Tensor]) -> None:
    """Copy saved tensors into a role's parameters; UserError where they do not fit."""
    load_tensors(roles.parameters(role), tensors)


def load_tensors(own: dict[str, nn.Parameter], tensors: dict[str, Tensor]) -> None:
    """Copy tensors into parameters of the same names.

    Raises:
        UserError: names or shapes belong to another model or another rank.
    """
    wrong = set(own) ^ set(tensors) or {name for name in own if own[name].shape != tensors[name].shape}
    if wrong:
        raise UserError(
            f"these weights belong to another model or rank ({len(wrong)} tensors differ, first {min(wrong)}); check the recipe"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])
