"""SDXL: a UNet that predicts the noise of a variance-preserving process, told the picture's size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import diffusers
import torch
from torch import Tensor, nn

from stepladder.backbones.base import Backbone, Release, Size, inputs_for
from stepladder.backbones.loading import CLIP_G, CLIP_L, frozen, kl_vae, tiny_clip, tiny_vae
from stepladder.conditioning import Conditioning
from stepladder.prediction import Prediction
from stepladder.processes import Process, process_from

UNET = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


class SDXL(Backbone):
    """`StableDiffusionXLPipeline`."""

    name = "sdxl"
    pipeline_class = "StableDiffusionXLPipeline"
    denoiser = "unet"
    lora_targets = (
        *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
        *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
    )
    releases: ClassVar[Mapping[str, Release]] = {
        "sdxl": Release(
            "stabilityai/stable-diffusion-xl-base-1.0",
            {
                "unet": ("UNet2DConditionModel", UNET),
                "vae": kl_vae(4, 0.13025),
                "text_encoder": ("CLIPTextModel", CLIP_L),
                "text_encoder_2": ("CLIPTextModelWithProjection", CLIP_G),
                "scheduler": ("EulerDiscreteScheduler", BETAS),
            },
            size=(1024, 1024),
            teacher_steps=40,
            guidance_scale=7.5,
            preset="sdxl",
        )
    }

    @classmethod
    def tiny(cls) -> SDXL:
        """A two-level UNet on latents of a four-times-down VAE, with random weights."""
        torch.manual_seed(0)
        tokenizer, encoder = tiny_clip(width=32, projected=False)
        unet = diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 1),
            attention_head_dim=(2, 4),
            cross_attention_dim=64,
            norm_num_groups=8,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=32 + 6 * 8,
        )
        pipeline = diffusers.StableDiffusionXLPipeline(
            unet=unet,
            scheduler=diffusers.EulerDiscreteScheduler(**BETAS),
            vae=tiny_vae(),
            text_encoder=encoder,
            tokenizer=tokenizer,
            text_encoder_2=tiny_clip(width=32)[1],
            tokenizer_2=tokenizer,
            add_watermarker=False,
        )
        return cls(frozen(pipeline), "tiny-sdxl")

    def forward_process(self) -> Process:
        """The scheduler's betas."""
        return process_from(self.pipeline.scheduler.config)

    @property
    def patch_size(self) -> int:
        """The UNet halves its input between levels, so many times."""
        return 2 ** (len(self.network.config.block_out_channels) - 1)

    def encode(self, prompts: Sequence[str], size: Size | None = None) -> Conditioning:
        """Both CLIP encoders, and the final picture's size as the network is told it at every rung."""
        with torch.no_grad():
            embeds, _, pooled, _ = self.pipeline.encode_prompt(list(prompts), do_classifier_free_guidance=False)
        return Conditioning({"encoder_hidden_states": embeds, "text_embeds": pooled, "time_ids": self._time_ids(pooled, size)})

    def unconditional(self, prompt: str = "", size: Size | None = None) -> Conditioning:
        """Zeros for the empty prompt where the pipeline says so, as SDXL's does."""
        given = self.encode([prompt], size)
        if prompt or not self.pipeline.config.force_zeros_for_empty_prompt:
            return given
        blank = {
            name: given.tensors[name] if name == "time_ids" else torch.zeros_like(given.tensors[name]) for name in given.tensors
        }
        return Conditioning(blank)

    def _time_ids(self, like: Tensor, size: Size | None) -> Tensor:
        height, width = size or self.default_size
        return like.new_tensor([[height, width, 0, 0, height, width]]).expand(len(like), -1)

    def blank_conditioning(self, batch: int, device: torch.device | str) -> Conditioning:
        """CLIP's tokens, the pooled embedding and the size."""
        config = self.network.config
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        return Conditioning(
            {
                "encoder_hidden_states": torch.zeros(batch, self.clip_tokens, config.cross_attention_dim, device=device),
                "text_embeds": torch.zeros(batch, pooled, device=device),
                "time_ids": torch.ones(batch, 6, device=device),
            }
        )

    def denoise(
        self, network: Any, x: Tensor, timestep: Tensor, conditioning: Conditioning, guidance_scale: float | None = None
    ) -> Prediction:
        """One pass: noise to x0 and eps."""
        state, given = inputs_for(network, x, conditioning)
        added = {"text_embeds": given["text_embeds"], "time_ids": given["time_ids"]}
        clock = self.process.network_timestep(timestep)
        noise = network(state, clock, encoder_hidden_states=given["encoder_hidden_states"], added_cond_kwargs=added).sample
        return self.process.predict(x, noise, timestep)

    def middle(self, network: Any) -> nn.Module:
        """The UNet's bottom."""
        return network.mid_block

    def unscale(self, latents: Tensor) -> Tensor:
        """From the network's latents to the VAE's; some fine-tunes have means and deviations."""
        config = self.pipeline.vae.config
        if getattr(config, "latents_mean", None) is None or getattr(config, "latents_std", None) is None:
            return super().unscale(latents)
        mean, std = (latents.new_tensor(values).view(1, -1, 1, 1) for values in (config.latents_mean, config.latents_std))
        return latents * std / config.scaling_factor + mean

    def call_options(self, size: Size) -> dict[str, Any]:
        """The final size at every rung."""
        return {"guidance_scale": 1.0, "original_size": size, "target_size": size}

    @staticmethod
    def comfy_key(name: str) -> str:
        """kohya's names, which ComfyUI maps from diffusers' UNet."""
        return "lora_unet_" + name.replace(".", "_")
