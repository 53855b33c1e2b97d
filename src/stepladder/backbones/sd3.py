"""SD3 and SD3.5: an MMDiT that predicts the velocity of a rectified flow on spatial latents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.utils import logging
from torch import Tensor, nn

from stepladder.backbones.loading import load_pipeline, tiny_clip, tiny_t5
from stepladder.conditioning import Conditioning
from stepladder.errors import UserError
from stepladder.prediction import Prediction
from stepladder.processes import FlowProcess, predict_from_velocity


class SD3:
    """`StableDiffusion3Pipeline`, with or without its T5 encoder."""

    name: ClassVar[str] = "sd3"
    pipeline_class: ClassVar[str] = "StableDiffusion3Pipeline"
    lora_targets: ClassVar[tuple[str, ...]] = (
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
        *("norm1.linear", "norm1_context.linear", "norm_out.linear", "proj_out"),
    )

    def __init__(self, pipeline: StableDiffusion3Pipeline, source: str, max_sequence_length: int = 256) -> None:
        self.pipeline = pipeline
        self.source = source
        self.max_sequence_length = max_sequence_length
        self.process = FlowProcess()
        self.network: Any = pipeline.transformer

    @classmethod
    def load(cls, path: str | Path, max_sequence_length: int = 256) -> SD3:
        """Load a diffusers directory, with or without its T5; weights other than safetensors are refused."""
        without_t5 = {} if (Path(path) / "text_encoder_3").is_dir() else {"text_encoder_3": None, "tokenizer_3": None}
        return cls(load_pipeline(StableDiffusion3Pipeline, path, **without_t5), str(path), max_sequence_length)

    @classmethod
    def tiny(cls) -> SD3:
        """A two-block MMDiT on 4-channel latents of a four-times-down VAE, with random weights."""
        torch.manual_seed(0)
        tokenizer, encoder = tiny_clip(width=32)
        t5_tokenizer, t5 = tiny_t5(width=64)
        transformer = SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=64,
            caption_projection_dim=32,
            pooled_projection_dim=64,
            pos_embed_max_size=16,
            qk_norm="rms_norm",
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            latent_channels=4,
            norm_num_groups=4,
            scaling_factor=1.0,
            shift_factor=0.0,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        pipeline = StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=vae,
            text_encoder=encoder,
            tokenizer=tokenizer,
            text_encoder_2=tiny_clip(width=32)[1],
            tokenizer_2=tokenizer,
            text_encoder_3=t5,
            tokenizer_3=t5_tokenizer,
        )
        for module in (transformer, vae, pipeline.text_encoder, pipeline.text_encoder_2, t5):
            module.eval().requires_grad_(False)
        return cls(pipeline, "tiny-sd3", max_sequence_length=4)

    def to(self, device: torch.device) -> None:
        """Move network, text encoders and VAE."""
        self.pipeline.to(device)

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return self.network.config.in_channels

    @property
    def default_size(self) -> tuple[int, int]:
        """The (height, width) in pixels that the model was trained for."""
        side = self.network.config.sample_size * self.pipeline.vae_scale_factor
        return side, side

    def latent_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Latent (H, W) of a pixel (height, width)."""
        config = self.network.config
        step = self.pipeline.vae_scale_factor * config.patch_size
        limit = config.pos_embed_max_size * step
        if any(side <= 0 or side % step for side in size):
            raise UserError(
                f"size {size[0]}x{size[1]} cannot be divided by {step} (VAE times patch size); choose multiples of {step}"
            )
        if max(size) > limit:
            raise UserError(f"size {size[0]}x{size[1]} is beyond this model's {limit} px; choose a smaller one")
        return size[0] // self.pipeline.vae_scale_factor, size[1] // self.pipeline.vae_scale_factor

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Run the text encoders as the stock pipeline does."""
        prompts = list(prompts)
        verbosity = logging.get_verbosity()
        if self.max_sequence_length == 1:
            # asked for nothing from T5, so that its warning about every cut prompt would say nothing
            logging.set_verbosity_error()
        with torch.no_grad():
            embeds, _, pooled, _ = self.pipeline.encode_prompt(
                prompts, prompts, prompts, do_classifier_free_guidance=False, max_sequence_length=self.max_sequence_length
            )
        logging.set_verbosity(verbosity)
        return Conditioning({"encoder_hidden_states": embeds, "pooled_projections": pooled})

    def denoise(self, network: nn.Module, x: Tensor, timestep: Tensor, conditioning: Conditioning) -> Prediction:
        """One pass: velocity to x0 and eps."""
        velocity = network(hidden_states=x, timestep=self.process.network_timestep(timestep), **conditioning.tensors).sample
        return predict_from_velocity(x, velocity.to(x.dtype), self.process.sigma(timestep))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to images in [-1, 1]."""
        vae = self.pipeline.vae
        with torch.no_grad():
            images = vae.decode((latents / vae.config.scaling_factor + vae.config.shift_factor).to(vae.dtype)).sample
        return images.float().clamp(-1, 1)

    def teacher_timesteps(self, steps: int) -> list[float]:
        """The timesteps of the pipeline's own scheduler."""
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.pipeline.scheduler.config)
        scheduler.set_timesteps(steps)
        return [t.item() for t in scheduler.timesteps]
