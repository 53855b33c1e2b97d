"""What a backbone offers: the only place where a method's tensors meet a particular diffusers model."""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from stepladder.backbones.loading import Blueprint, load_pipeline, sketch_pipeline
from stepladder.conditioning import Conditioning
from stepladder.errors import UserError
from stepladder.ladder import spaced_timesteps
from stepladder.prediction import Prediction
from stepladder.processes import FlowProcess, Process, VariancePreservingProcess

Size = tuple[int, ...]
CLIP_TOKENS = 77
TEXT_PARTS = ("text_encoder", "text_encoder_2", "text_encoder_3")


@dataclass(frozen=True)
class Release:
    """A published model, known without its weights: the configurations of its parts and how its teacher is run.

    size: pixels (height, width), or (frames, height, width) · preset: of `ladder.PRESETS` · rungs: pixel sizes of the
    ladder where they are not the preset's.
    """

    hub_id: str
    blueprint: Blueprint
    size: Size
    teacher_steps: int
    guidance_scale: float
    preset: str
    rungs: tuple[Size, ...] = ()


class _MiddleReachedError(Exception):
    """Ends a pass at the middle block."""


class Backbone(ABC):
    """A diffusers pipeline behind a few verbs: encode, denoise, features, decode, and `tiny` for tests.

    A subclass names its pipeline and says what differs; what is common to all stands here.

    denoiser: the network's name in the pipeline · embeds_guidance: guidance is an input, not a second pass ·
    packs_latents: the stock loop packs latents · loads_lora: the stock pipeline has `load_lora_weights`.
    """

    name: ClassVar[str]
    pipeline_class: ClassVar[str]
    denoiser: ClassVar[str] = "transformer"
    lora_targets: ClassVar[tuple[str, ...]]
    max_sequence_length: int = 256
    embeds_guidance: ClassVar[bool] = False
    packs_latents: ClassVar[bool] = False
    loads_lora: ClassVar[bool] = True
    releases: ClassVar[Mapping[str, Release]] = {}

    def __init__(self, pipeline: Any, source: str, max_sequence_length: int | None = None) -> None:
        self.pipeline = pipeline
        self.source = source
        if max_sequence_length is not None:
            self.max_sequence_length = max_sequence_length
        self.process = self.forward_process()
        encoder = getattr(getattr(pipeline, "text_encoder", None), "config", None)
        self.clip_tokens: int = getattr(encoder, "max_position_embeddings", CLIP_TOKENS)

    @classmethod
    def load(cls, path: str | Path, max_sequence_length: int | None = None, dtype: torch.dtype = torch.float32) -> Backbone:
        """Load a diffusers directory or hub id (safetensors only)."""
        return cls(load_pipeline(cls.pipeline_class, path, dtype), str(path), max_sequence_length)

    @classmethod
    def sketch(
        cls,
        blueprint: Blueprint,
        source: str,
        max_sequence_length: int | None = None,
        device: torch.device | str = "meta",
        dtype: torch.dtype = torch.float32,
    ) -> Backbone:
        """The model from its configurations, without tokenizers: every shape on the meta device, or random weights elsewhere."""
        return cls(sketch_pipeline(cls.pipeline_class, blueprint, device, dtype), source, max_sequence_length)

    @classmethod
    @abstractmethod
    def tiny(cls) -> Backbone:
        """The same classes at toy size with random weights, built offline."""

    @abstractmethod
    def encode(self, prompts: Sequence[str], size: Size | None = None) -> Conditioning:
        """Run the text encoders.

        Args:
            prompts: B prompts.
            size: pixels of the final picture, for models that are told; `default_size` if not given.
        """

    @abstractmethod
    def blank_conditioning(self, batch: int, device: torch.device | str) -> Conditioning:
        """Conditioning of the right shapes without running a text encoder, for counting and timing."""

    def denoise(
        self, network: Any, x: Tensor, timestep: Tensor, conditioning: Conditioning, guidance_scale: float | None = None
    ) -> Prediction:
        """One pass of `network`, which has this backbone's architecture; here of one that takes its conditioning by name.

        Args:
            x: (B, C, H, W), or (B, C, T, H, W).
            timestep: (B,), on the clock of x's resolution.
            guidance_scale: for networks that embed it (`embeds_guidance`); ignored by the others.
        """
        state, given = inputs_for(network, x, conditioning)
        output = network(hidden_states=state, timestep=self.process.network_timestep(timestep), **given).sample
        return self.process.predict(x, output, timestep)

    @abstractmethod
    def middle(self, network: Any) -> nn.Module:
        """The block in the middle of the network, whose output `features` returns."""

    def unconditional(self, prompt: str = "", size: Size | None = None) -> Conditioning:
        """What guidance leads away from: a negative prompt, or the empty one, (1, …)."""
        return self.encode([prompt], size)

    def features(self, network: Any, x: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """Hidden states of the middle block, (B, tokens, D), with their graph; the blocks after it are not run."""
        caught: list[Tensor] = []

        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            hidden = output[-1] if isinstance(output, tuple) else output
            caught.append(hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden)
            raise _MiddleReachedError

        handle = self.middle(network).register_forward_hook(keep)
        try:
            self.denoise(network, x, timestep, conditioning)
        except _MiddleReachedError:
            pass
        finally:
            handle.remove()
        return caught[0]

    def feature_width(self, size: Size) -> int:
        """Width of the middle block's features, found by one pass at a latent size."""
        device = next(self.network.parameters()).device
        x = torch.zeros(1, self.latent_channels, *size, device=device)
        with torch.no_grad():
            return self.features(self.network, x, torch.zeros(1, device=device), self.blank_conditioning(1, device)).shape[-1]

    @property
    def network(self) -> Any:
        """The denoiser."""
        return getattr(self.pipeline, self.denoiser)

    @network.setter
    def network(self, network: Any) -> None:
        """Put another denoiser into the pipeline."""
        setattr(self.pipeline, self.denoiser, network)

    def forward_process(self) -> Process:
        """The forward process of the pipeline's scheduler."""
        return FlowProcess()

    def to(self, device: torch.device) -> None:
        """Move network, text encoders and VAE."""
        self.pipeline.to(device)

    def drop_text_encoders(self) -> None:
        """Free the text encoders, once all prompts are encoded."""
        self._drop(*TEXT_PARTS)

    def drop_vae(self) -> None:
        """Free the VAE, where nothing will be decoded."""
        self._drop("vae")

    def _drop(self, *parts: str) -> None:
        for part in parts:
            if getattr(self.pipeline, part, None) is not None:
                setattr(self.pipeline, part, None)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @property
    def rung_by_rung(self) -> bool:
        """Whether the stock loop fixes something by size before its first step, so that only `LadderPipeline` climbs rightly."""
        return False

    @property
    def text_encoders(self) -> list[nn.Module]:
        """Those that are loaded."""
        return [part for name in TEXT_PARTS if (part := getattr(self.pipeline, name, None)) is not None]

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return self.network.config.in_channels

    @property
    def patch_size(self) -> int:
        """Latent pixels that make one token's side, or what a network's own downsampling must be able to divide."""
        return self.network.config.patch_size

    @property
    def default_size(self) -> Size:
        """The pixel size, (height, width) or (frames, height, width), that the model was trained for."""
        side = self.network.config.sample_size * self.pipeline.vae_scale_factor
        return side, side

    def latent_size(self, size: Size) -> Size:
        """Latent (H, W) of a pixel (height, width).

        Raises:
            UserError: VAE or patches cannot divide the size.
        """
        if len(size) != 2:
            raise UserError(f"{self.pipeline_class} makes images: give sizes as [height, width], not {list(size)}")
        check_divisible(size, self.pipeline.vae_scale_factor * self.patch_size)
        return size[0] // self.pipeline.vae_scale_factor, size[1] // self.pipeline.vae_scale_factor

    def pixel_size(self, size: Size) -> Size:
        """The inverse of `latent_size`."""
        return size[0] * self.pipeline.vae_scale_factor, size[1] * self.pipeline.vae_scale_factor

    def unscale(self, latents: Tensor) -> Tensor:
        """From the network's latents to the VAE's."""
        config = self.pipeline.vae.config
        return latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)

    def encode_images(self, images: Tensor) -> Tensor:
        """Images (B, 3, height, width), or video (B, 3, T, height, width), in [-1, 1] to latents; the inverse of `decode`."""
        vae = self.pipeline.vae
        if vae is None:
            raise UserError("the VAE was dropped from memory; load the model again to encode images")
        with torch.no_grad():
            coded = vae.encode(images.to(vae.dtype))
        latents = (coded.latent_dist.mode() if hasattr(coded, "latent_dist") else coded.latents).float()
        # `unscale` is affine in each channel, so two values of it give its inverse
        offset = self.unscale(torch.zeros_like(latents))
        return (latents - offset) / (self.unscale(torch.ones_like(latents)) - offset)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, H, W) to images (B, 3, height, width) in [-1, 1]; video keeps its frames, (B, 3, T, height, width)."""
        with torch.no_grad():
            return self.decode_with_graph(latents).clamp(-1, 1)

    def decode_with_graph(self, latents: Tensor) -> Tensor:
        """As `decode`, with the gradient back to the latents, and unclipped."""
        vae = self.pipeline.vae
        if vae is None:
            raise UserError("the VAE was dropped from memory; load the model again to decode")
        images: Tensor = vae.decode(self.unscale(latents).to(vae.dtype)).sample
        return images.float()

    def teacher_timesteps(self, steps: int) -> list[float]:
        """The timesteps of the model's own sampler; for variance-preserving models uniform from 1000, as few-step papers count."""
        if isinstance(self.process, VariancePreservingProcess):
            return list(spaced_timesteps(steps))
        config = dict(self.pipeline.scheduler.config)
        scheduler = type(self.pipeline.scheduler).from_config({**config, "use_dynamic_shifting": False})
        scheduler.set_timesteps(steps)
        return [t.item() for t in scheduler.timesteps]

    def call_options(self, size: Size) -> dict[str, Any]:
        """What a stock call must be told beside the first rung's size, for a final pixel `size`.

        Guidance is off, and the long text encoder has as many tokens as in training.
        """
        return {"guidance_scale": 1.0, "max_sequence_length": self.max_sequence_length}

    @staticmethod
    def comfy_key(name: str) -> str:
        """The name ComfyUI's loader knows an adapted layer by."""
        return f"transformer.{name}"


def check_divisible(size: Sequence[int], step: int, limit: int | None = None) -> None:
    """UserError where a (height, width) is no multiple of `step` or beyond `limit`."""
    if any(side <= 0 or side % step for side in size):
        raise UserError(f"size {size[0]}x{size[1]} cannot be divided by {step} (VAE times patch size); choose multiples of {step}")
    if limit is not None and max(size) > limit:
        raise UserError(f"size {size[0]}x{size[1]} is beyond this model's {limit} px; choose a smaller one")


_dtypes: WeakKeyDictionary[nn.Module, tuple[torch.dtype, torch.dtype]] = WeakKeyDictionary()


def network_dtype(network: Any) -> torch.dtype:
    """The network's precision as diffusers finds it, by a search that costs as much as a small network's whole pass.

    So it is kept, until the network's first parameter has another precision.
    """
    first = next(network.parameters()).dtype
    known = _dtypes.get(network)
    if known is None or known[0] != first:
        known = _dtypes[network] = (first, network.dtype)
    return known[1]


def inputs_for(network: Any, x: Tensor, conditioning: Conditioning) -> tuple[Tensor, dict[str, Tensor]]:
    """State and conditioning in the network's own precision."""
    dtype = network_dtype(network)
    return x.to(dtype), {name: tensor.to(dtype) for name, tensor in conditioning.tensors.items()}
