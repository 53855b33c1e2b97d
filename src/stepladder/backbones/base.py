"""What a backbone offers: the only place where a method's tensors meet a particular diffusers model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from stepladder.conditioning import Conditioning
from stepladder.prediction import Prediction
from stepladder.processes import Process


class Backbone(Protocol):
    """A pretrained model behind four verbs: encode, denoise, decode, and tiny for tests."""

    name: ClassVar[str]
    pipeline_class: ClassVar[str]
    lora_targets: ClassVar[tuple[str, ...]]
    process: Process
    network: nn.Module
    source: str

    @classmethod
    def load(cls, path: str | Path, max_sequence_length: int) -> Backbone:
        """Load a diffusers directory (safetensors only)."""

    @classmethod
    def tiny(cls) -> Backbone:
        """The same classes at toy size with random weights, built offline."""

    def to(self, device: torch.device) -> None:
        """Move network, text encoders and VAE."""

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""

    @property
    def default_size(self) -> tuple[int, int]:
        """The (height, width) in pixels that the model was trained for."""

    def latent_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Latent (H, W) of a pixel (height, width); UserError where VAE or patches cannot divide it."""

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Run the text encoders."""

    def denoise(self, network: nn.Module, x: Tensor, timestep: Tensor, conditioning: Conditioning) -> Prediction:
        """One pass of `network`, which has this backbone's architecture, at (B,) timesteps."""

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, H, W) to images (B, 3, height, width) in [-1, 1]."""

    def teacher_timesteps(self, steps: int) -> list[float]:
        """The timesteps of the model's own scheduler."""
