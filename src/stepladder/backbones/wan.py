"""Wan2.1, text to video: a flow on latents with a time axis, (B, 16, T, H, W)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import diffusers
import torch
from torch import Tensor, nn

from stepladder.backbones.base import Backbone, Release, Size, check_divisible
from stepladder.backbones.loading import T5_XXL, frozen, tiny_t5
from stepladder.conditioning import Conditioning
from stepladder.errors import UserError

FRAMES = 81


def _release(hub_id: str, size: Size, rungs: tuple[Size, ...] = (), **network: Any) -> Release:
    blueprint = {
        "transformer": ("WanTransformer3DModel", network),
        "vae": ("AutoencoderKLWan", {}),
        "text_encoder": ("UMT5EncoderModel", {**T5_XXL, "vocab_size": 256384}),
        "scheduler": ("UniPCMultistepScheduler", _scheduler(5.0)),
    }
    return Release(hub_id, blueprint, (FRAMES, *size), 50, 5.0, "wan", rungs)


def _scheduler(shift: float) -> dict[str, Any]:
    return {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}


class Wan(Backbone):
    """`WanPipeline`. Sizes are (frames, height, width); (height, width) alone means the usual 81 frames."""

    name = "wan"
    pipeline_class = "WanPipeline"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
    max_sequence_length = 512
    releases: ClassVar[Mapping[str, Release]] = {
        "wan-1.3b": _release(
            "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
            (480, 832),
            rungs=((240, 416), (480, 832)),
            **{"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
        ),
        "wan-14b": _release("Wan-AI/Wan2.1-T2V-14B-Diffusers", (720, 1280)),
    }

    @classmethod
    def tiny(cls) -> Wan:
        """A two-block transformer on the 16-channel latents of a small causal video VAE, with random weights."""
        torch.manual_seed(0)
        tokenizer, encoder = tiny_t5(width=32, multilingual=True)
        transformer = diffusers.WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=16,
            out_channels=16,
            text_dim=32,
            freq_dim=16,
            ffn_dim=32,
            num_layers=2,
            rope_max_seq_len=32,
        )
        vae = diffusers.AutoencoderKLWan(
            base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        )
        pipeline = diffusers.WanPipeline(
            transformer=transformer,
            scheduler=diffusers.UniPCMultistepScheduler(**_scheduler(5.0)),
            vae=vae,
            text_encoder=encoder,
            tokenizer=tokenizer,
        )
        return cls(frozen(pipeline), "tiny-wan", max_sequence_length=8)

    @property
    def patch_size(self) -> int:
        """In space; time is not patched."""
        return self.network.config.patch_size[1]

    @property
    def default_size(self) -> Size:
        """Wan's configuration names no size: 480p for the small network, 720p for the large."""
        return FRAMES, *((480, 832) if self.network.config.num_layers <= 30 else (720, 1280))

    def latent_size(self, size: Size) -> Size:
        """Latent (T, H, W) of (frames, height, width); (height, width) means 81 frames."""
        frames, height, width = (FRAMES, *size) if len(size) == 2 else size
        space, time = self.pipeline.vae_scale_factor_spatial, self.pipeline.vae_scale_factor_temporal
        check_divisible((height, width), space * self.patch_size)
        if frames < 1 or (frames - 1) % time:
            raise UserError(f"{frames} frames cannot be coded: the VAE takes 1 + a multiple of {time}; choose such a number")
        return 1 + (frames - 1) // time, height // space, width // space

    def pixel_size(self, size: Size) -> Size:
        """The inverse of `latent_size`."""
        space, time = self.pipeline.vae_scale_factor_spatial, self.pipeline.vae_scale_factor_temporal
        return 1 + (size[0] - 1) * time, size[1] * space, size[2] * space

    def encode(self, prompts: Sequence[str], size: Size | None = None) -> Conditioning:
        """UMT5's tokens."""
        with torch.no_grad():
            embeds, _ = self.pipeline.encode_prompt(
                list(prompts), do_classifier_free_guidance=False, max_sequence_length=self.max_sequence_length
            )
        return Conditioning({"encoder_hidden_states": embeds})

    def blank_conditioning(self, batch: int, device: torch.device | str) -> Conditioning:
        """UMT5's tokens."""
        embeds = torch.zeros(batch, self.max_sequence_length, self.network.config.text_dim, device=device)
        return Conditioning({"encoder_hidden_states": embeds})

    def middle(self, network: Any) -> nn.Module:
        """The middle block."""
        return network.blocks[len(network.blocks) // 2]

    def unscale(self, latents: Tensor) -> Tensor:
        """Latents are normalised channel by channel."""
        config = self.pipeline.vae.config
        mean, std = (latents.new_tensor(values).view(1, -1, 1, 1, 1) for values in (config.latents_mean, config.latents_std))
        return latents * std + mean

    @staticmethod
    def comfy_key(name: str) -> str:
        """Wan's own names, which ComfyUI keeps."""
        for theirs, own in (
            *(("attn1.to_out.0", "self_attn.o"), ("attn2.to_out.0", "cross_attn.o"), ("attn1.to_", "self_attn.")),
            *(("attn2.to_", "cross_attn."), ("ffn.net.0.proj", "ffn.0"), ("ffn.net.2", "ffn.2")),
        ):
            name = name.replace(theirs, own)
        return f"diffusion_model.{name}"
