"""SD3 and SD3.5: an MMDiT that predicts the velocity of a rectified flow on spatial latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import diffusers
import torch
from diffusers.utils import logging
from torch import nn

from stepladder.backbones.base import Backbone, Release, Size, check_divisible
from stepladder.backbones.loading import CLIP_G, CLIP_L, T5_XXL, frozen, kl_vae, tiny_clip, tiny_t5, tiny_vae
from stepladder.conditioning import Conditioning


def _release(hub_id: str, **network: Any) -> Release:
    config = {
        **{"sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "attention_head_dim": 64},
        **{"joint_attention_dim": 4096, "pooled_projection_dim": 2048, "qk_norm": "rms_norm"},
        **network,
    }
    blueprint = {
        "transformer": ("SD3Transformer2DModel", config),
        "vae": kl_vae(16, 1.5305, 0.0609, quant=False),
        "text_encoder": ("CLIPTextModelWithProjection", CLIP_L),
        "text_encoder_2": ("CLIPTextModelWithProjection", CLIP_G),
        "text_encoder_3": ("T5EncoderModel", T5_XXL),
        "scheduler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    }
    return Release(hub_id, blueprint, (1024, 1024), 40, 4.5, "sd35")


class SD3(Backbone):
    """`StableDiffusion3Pipeline`, with or without its T5 encoder."""

    name = "sd3"
    pipeline_class = "StableDiffusion3Pipeline"
    lora_targets = (
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
        *("norm1.linear", "norm1_context.linear", "norm_out.linear", "proj_out"),
    )
    releases: ClassVar[Mapping[str, Release]] = {
        "sd35-medium": _release(
            "stabilityai/stable-diffusion-3.5-medium",
            **{"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 384},
            dual_attention_layers=tuple(range(13)),
        ),
        "sd35-large": _release(
            "stabilityai/stable-diffusion-3.5-large",
            **{"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192},
        ),
    }

    @classmethod
    def tiny(cls) -> SD3:
        """A two-block MMDiT on 4-channel latents of a four-times-down VAE, with random weights."""
        torch.manual_seed(0)
        tokenizer, encoder = tiny_clip(width=32)
        t5_tokenizer, t5 = tiny_t5(width=64)
        transformer = diffusers.SD3Transformer2DModel(
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
        pipeline = diffusers.StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=tiny_vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
            text_encoder=encoder,
            tokenizer=tokenizer,
            text_encoder_2=tiny_clip(width=32)[1],
            tokenizer_2=tokenizer,
            text_encoder_3=t5,
            tokenizer_3=t5_tokenizer,
        )
        return cls(frozen(pipeline), "tiny-sd3", max_sequence_length=4)

    def latent_size(self, size: Size) -> Size:
        """Latent (H, W) of a pixel (height, width), within the positions the network knows."""
        step = self.pipeline.vae_scale_factor * self.patch_size
        check_divisible(size[-2:], step, self.network.config.pos_embed_max_size * step)
        return super().latent_size(size)

    def encode(self, prompts: Sequence[str], size: Size | None = None) -> Conditioning:
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

    def blank_conditioning(self, batch: int, device: torch.device | str) -> Conditioning:
        """CLIP's tokens and T5's, and the pooled ones."""
        config = self.network.config
        tokens = self.clip_tokens + self.max_sequence_length
        return Conditioning(
            {
                "encoder_hidden_states": torch.zeros(batch, tokens, config.joint_attention_dim, device=device),
                "pooled_projections": torch.zeros(batch, config.pooled_projection_dim, device=device),
            }
        )

    def middle(self, network: Any) -> nn.Module:
        """The middle joint block; its image tokens are the second output."""
        return network.transformer_blocks[len(network.transformer_blocks) // 2 - 1]
