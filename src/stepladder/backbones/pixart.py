"""PixArt-alpha: a DiT that predicts noise, and its variance, which sampling by ODE does not use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import diffusers
import torch
from torch import Tensor, nn

from stepladder.backbones.base import Backbone, Release, Size, inputs_for
from stepladder.backbones.loading import T5_XXL, frozen, kl_vae, tiny_t5, tiny_vae
from stepladder.conditioning import Conditioning
from stepladder.prediction import Prediction
from stepladder.processes import Process, process_from

BETAS = {"beta_start": 1e-4, "beta_end": 2e-2, "beta_schedule": "linear"}
NETWORK = {
    **{"sample_size": 128, "attention_head_dim": 72, "num_attention_heads": 16, "in_channels": 4, "out_channels": 8},
    **{"num_layers": 28, "cross_attention_dim": 1152, "caption_channels": 4096, "patch_size": 2},
}


class PixArt(Backbone):
    """`PixArtAlphaPipeline`."""

    name = "pixart"
    pipeline_class = "PixArtAlphaPipeline"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "adaln_single.linear", "proj_out")
    max_sequence_length = 120
    loads_lora = False
    releases: ClassVar[Mapping[str, Release]] = {
        "pixart": Release(
            "PixArt-alpha/PixArt-XL-2-1024-MS",
            {
                "transformer": ("PixArtTransformer2DModel", NETWORK),
                "vae": kl_vae(4, 0.18215),
                "text_encoder": ("T5EncoderModel", T5_XXL),
                "scheduler": ("DPMSolverMultistepScheduler", BETAS),
            },
            size=(1024, 1024),
            teacher_steps=25,
            guidance_scale=3.5,
            preset="pixart",
        )
    }

    @classmethod
    def tiny(cls) -> PixArt:
        """A two-block DiT with learned variance, with random weights."""
        torch.manual_seed(0)
        tokenizer, encoder = tiny_t5(width=32)
        transformer = diffusers.PixArtTransformer2DModel(
            sample_size=8,
            num_layers=2,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=3,
            caption_channels=32,
            in_channels=4,
            out_channels=8,
            cross_attention_dim=24,
        )
        pipeline = diffusers.PixArtAlphaPipeline(
            transformer=transformer,
            scheduler=diffusers.DPMSolverMultistepScheduler(**BETAS),
            vae=tiny_vae(),
            text_encoder=encoder,
            tokenizer=tokenizer,
        )
        return cls(frozen(pipeline), "tiny-pixart", max_sequence_length=8)

    @property
    def rung_by_rung(self) -> bool:
        """The 1024 px model is told its resolution once a call."""
        return bool(self.network.use_additional_conditions)

    def forward_process(self) -> Process:
        """The scheduler's betas."""
        return process_from(self.pipeline.scheduler.config)

    def encode(self, prompts: Sequence[str], size: Size | None = None) -> Conditioning:
        """T5 and its mask."""
        with torch.no_grad():
            embeds, mask, _, _ = self.pipeline.encode_prompt(
                list(prompts), do_classifier_free_guidance=False, max_sequence_length=self.max_sequence_length
            )
        return Conditioning({"encoder_hidden_states": embeds, "encoder_attention_mask": mask.to(embeds.dtype)})

    def blank_conditioning(self, batch: int, device: torch.device | str) -> Conditioning:
        """T5's tokens, all of them said."""
        tokens = self.max_sequence_length
        return Conditioning(
            {
                "encoder_hidden_states": torch.zeros(batch, tokens, self.network.config.caption_channels, device=device),
                "encoder_attention_mask": torch.ones(batch, tokens, device=device),
            }
        )

    def denoise(
        self, network: Any, x: Tensor, timestep: Tensor, conditioning: Conditioning, guidance_scale: float | None = None
    ) -> Prediction:
        """One pass: the noise half of the output to x0 and eps.

        Where the network is told a resolution (the 1024 px model), it is told that of the state it sees, as it was trained.
        """
        state, given = inputs_for(network, x, conditioning)
        clock = self.process.network_timestep(timestep)
        noise = network(state, timestep=clock, added_cond_kwargs=self._resolution(network, state), **given).sample
        return self.process.predict(x, noise[:, : x.shape[1]], timestep)

    def _resolution(self, network: Any, state: Tensor) -> dict[str, Tensor | None]:
        if not network.use_additional_conditions:
            return {"resolution": None, "aspect_ratio": None}
        height, width = self.pixel_size(tuple(state.shape[2:]))
        return {
            "resolution": state.new_tensor([[height, width]]).expand(len(state), -1),
            "aspect_ratio": state.new_tensor([[height / width]]).expand(len(state), -1),
        }

    def middle(self, network: Any) -> nn.Module:
        """The middle block."""
        return network.transformer_blocks[len(network.transformer_blocks) // 2]

    def call_options(self, size: Size) -> dict[str, Any]:
        """Guidance off, sizes as they are, and as many T5 tokens as in training."""
        return super().call_options(size) | {"use_resolution_binning": False}
