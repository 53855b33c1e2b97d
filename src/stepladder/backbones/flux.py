"""FLUX.1: a flow on packed latents, with positions told and guidance embedded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import diffusers
import torch
from torch import Tensor, nn

from stepladder.backbones.base import Backbone, Release, Size, inputs_for
from stepladder.backbones.loading import CLIP_L, T5_XXL, frozen, kl_vae, tiny_clip, tiny_t5, tiny_vae
from stepladder.conditioning import Conditioning
from stepladder.packing import PACK, pack, unpack
from stepladder.prediction import Prediction

STOCK_GUIDANCE = 3.5


class Flux(Backbone):
    """`FluxPipeline`. Above this file latents are spatial, (B, 16, H, W); they are packed on the way into the network."""

    name = "flux"
    pipeline_class = "FluxPipeline"
    lora_targets = (
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out"),
        *("norm1.linear", "norm1_context.linear", "norm.linear"),
    )
    max_sequence_length = 512
    embeds_guidance = True
    packs_latents = True
    releases: ClassVar[Mapping[str, Release]] = {
        "flux": Release(
            "black-forest-labs/FLUX.1-dev",
            {
                "transformer": ("FluxTransformer2DModel", {"guidance_embeds": True}),
                "vae": kl_vae(16, 0.3611, 0.1159, quant=False),
                "text_encoder": ("CLIPTextModel", CLIP_L),
                "text_encoder_2": ("T5EncoderModel", T5_XXL),
                "scheduler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "use_dynamic_shifting": True}),
            },
            size=(1024, 1024),
            teacher_steps=28,
            guidance_scale=STOCK_GUIDANCE,
            preset="sd35",
        )
    }

    @classmethod
    def tiny(cls) -> Flux:
        """One double and one single block on 4-channel latents, with random weights."""
        torch.manual_seed(0)
        tokenizer, encoder = tiny_clip(width=32, projected=False)
        t5_tokenizer, t5 = tiny_t5(width=32)
        transformer = diffusers.FluxTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=True,
        )
        pipeline = diffusers.FluxPipeline(
            transformer=transformer,
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=tiny_vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
            text_encoder=encoder,
            tokenizer=tokenizer,
            text_encoder_2=t5,
            tokenizer_2=t5_tokenizer,
        )
        return cls(frozen(pipeline), "tiny-flux", max_sequence_length=8)

    @property
    def latent_channels(self) -> int:
        """Channels before packing."""
        return self.network.config.in_channels // PACK**2

    @property
    def rung_by_rung(self) -> bool:
        """Positions are told once a call."""
        return True

    @property
    def patch_size(self) -> int:
        """Packing makes one token of 2 × 2 latent pixels."""
        return PACK

    @property
    def default_size(self) -> Size:
        """FLUX's configuration names no size; its pipeline's is 128 latent pixels."""
        side = self.pipeline.default_sample_size * self.pipeline.vae_scale_factor
        return side, side

    def encode(self, prompts: Sequence[str], size: Size | None = None) -> Conditioning:
        """CLIP's pooled embedding and T5's tokens."""
        with torch.no_grad():
            embeds, pooled, _ = self.pipeline.encode_prompt(list(prompts), None, max_sequence_length=self.max_sequence_length)
        return Conditioning({"encoder_hidden_states": embeds, "pooled_projections": pooled})

    def blank_conditioning(self, batch: int, device: torch.device | str) -> Conditioning:
        """T5's tokens and the pooled embedding."""
        config = self.network.config
        return Conditioning(
            {
                "encoder_hidden_states": torch.zeros(batch, self.max_sequence_length, config.joint_attention_dim, device=device),
                "pooled_projections": torch.zeros(batch, config.pooled_projection_dim, device=device),
            }
        )

    def denoise(
        self, network: Any, x: Tensor, timestep: Tensor, conditioning: Conditioning, guidance_scale: float | None = None
    ) -> Prediction:
        """One pass: pack, predict the velocity, unpack. Where no guidance is given the stock pipeline's 3.5 is embedded."""
        state, given = inputs_for(network, x, conditioning)
        height, width = state.shape[2] // PACK, state.shape[3] // PACK
        scale = STOCK_GUIDANCE if guidance_scale is None else guidance_scale
        embeds = network.config.guidance_embeds
        velocity = network(
            hidden_states=pack(state),
            timestep=self.process.network_timestep(timestep) / 1000,
            guidance=torch.full((len(x),), scale, device=x.device) if embeds else None,
            txt_ids=torch.zeros(given["encoder_hidden_states"].shape[1], 3, device=x.device, dtype=state.dtype),
            img_ids=_positions(height, width, state),
            **given,
        ).sample
        return self.process.predict(x, unpack(velocity, tuple(x.shape[2:])), timestep)

    def middle(self, network: Any) -> nn.Module:
        """The middle double block; its image tokens are the second output."""
        return network.transformer_blocks[len(network.transformer_blocks) // 2]

    def teacher_timesteps(self, steps: int) -> list[float]:
        """The stock pipeline's, whose shift grows with the picture; here for the default size."""
        scheduler = self.pipeline.scheduler
        config = scheduler.config
        tokens = (self.default_size[0] // (self.pipeline.vae_scale_factor * PACK)) ** 2
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        own = type(scheduler).from_config(config)
        sigmas = torch.linspace(1.0, 1 / steps, steps).tolist()
        own.set_timesteps(sigmas=sigmas, mu=config.base_shift + slope * (tokens - config.base_image_seq_len))
        return [t.item() for t in own.timesteps]

    def call_options(self, size: Size) -> dict[str, Any]:
        """The guidance that students are trained with is the embedded one."""
        return super().call_options(size) | {"guidance_scale": STOCK_GUIDANCE}


def _positions(height: int, width: int, like: Tensor) -> Tensor:
    """(height × width, 3): zero, row and column of every token."""
    rows = torch.arange(height, device=like.device, dtype=like.dtype)
    columns = torch.arange(width, device=like.device, dtype=like.dtype)
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)
    return torch.nn.functional.pad(grid, (1, 0))
