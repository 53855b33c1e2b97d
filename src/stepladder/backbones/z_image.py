"""Z-Image: a single-stream flow transformer that takes lists of samples, with time and sign turned round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import diffusers
import torch
import transformers
from torch import Tensor, nn

from stepladder.backbones.base import Backbone, Release, Size, network_dtype
from stepladder.backbones.loading import frozen, kl_vae, tiny_vae
from stepladder.conditioning import Conditioning
from stepladder.prediction import Prediction

QWEN3_4B = {
    **{"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
    **{"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True},
}
CHAT = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


class ZImage(Backbone):
    """`ZImagePipeline`. Prompts have as many tokens as they need; here they are padded, and a mask says which count."""

    name = "z_image"
    pipeline_class = "ZImagePipeline"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
    max_sequence_length = 512
    releases: ClassVar[Mapping[str, Release]] = {
        "z-image": Release(
            "Tongyi-MAI/Z-Image",
            {
                "transformer": ("ZImageTransformer2DModel", {}),
                "vae": kl_vae(16, 0.3611, 0.1159, quant=False),
                "text_encoder": ("Qwen3Model", QWEN3_4B),
                "scheduler": ("FlowMatchEulerDiscreteScheduler", {"shift": 6.0}),
            },
            size=(1024, 1024),
            teacher_steps=50,
            guidance_scale=5.0,  # in this pipeline's own words 4
            preset="sd35",
        )
    }

    @classmethod
    def tiny(cls) -> ZImage:
        """Two blocks and one refiner each way, with random weights."""
        torch.manual_seed(0)
        from tokenizers.pre_tokenizers import ByteLevel

        tokens = [*sorted(ByteLevel.alphabet()), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        tokenizer = transformers.Qwen2Tokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=[])
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        tokenizer.chat_template = CHAT
        encoder = transformers.Qwen3Model(
            transformers.Qwen3Config(
                vocab_size=len(tokens),
                hidden_size=32,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
                head_dim=16,
            )
        )
        transformer = diffusers.ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=32,
            axes_dims=[4, 6, 6],
            axes_lens=[128, 64, 64],
        )
        pipeline = diffusers.ZImagePipeline(
            transformer=transformer,
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=tiny_vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
            text_encoder=encoder,
            tokenizer=tokenizer,
        )
        nn.init.normal_(transformer.cap_pad_token, std=0.02)
        nn.init.normal_(transformer.x_pad_token, std=0.02)
        return cls(frozen(pipeline), "tiny-z-image", max_sequence_length=48)

    @property
    def patch_size(self) -> int:
        """The network's only patch size."""
        return self.network.config.all_patch_size[0]

    @property
    def default_size(self) -> Size:
        """The configuration names no size; the pipeline's is 1024 px."""
        return 1024, 1024

    def encode(self, prompts: Sequence[str], size: Size | None = None) -> Conditioning:
        """The chat template and Qwen's last hidden states but one, padded to `max_sequence_length`."""
        with torch.no_grad():
            # the stock pipeline writes the chat template into the list it is given
            said, _ = self.pipeline.encode_prompt(
                list(prompts), do_classifier_free_guidance=False, max_sequence_length=self.max_sequence_length
            )
        embeds = said[0].new_zeros(len(said), self.max_sequence_length, said[0].shape[-1])
        mask = said[0].new_zeros(len(said), self.max_sequence_length)
        for row, tokens in enumerate(said):
            embeds[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
        return Conditioning({"cap_feats": embeds, "mask": mask})

    def blank_conditioning(self, batch: int, device: torch.device | str) -> Conditioning:
        """All tokens said; without a mask, whose values the meta device does not know."""
        return Conditioning(
            {"cap_feats": torch.zeros(batch, self.max_sequence_length, self.network.config.cap_feat_dim, device=device)}
        )

    def denoise(
        self, network: Any, x: Tensor, timestep: Tensor, conditioning: Conditioning, guidance_scale: float | None = None
    ) -> Prediction:
        """One pass: the network's clock runs from noise 0 to image 1, and its output points towards the image."""
        dtype = network_dtype(network)
        captions = conditioning.tensors["cap_feats"].to(dtype)
        mask = conditioning.tensors.get("mask")
        said = list(captions) if mask is None else [each[kept.bool()] for each, kept in zip(captions, mask, strict=True)]
        clock = (1000 - self.process.network_timestep(timestep)) / 1000
        output = network(list(x.to(dtype).unsqueeze(2)), clock, said).sample
        velocity = -torch.stack([each.float() for each in output]).squeeze(2)
        return self.process.predict(x, velocity, timestep)

    def middle(self, network: Any) -> nn.Module:
        """The middle block; image tokens stand before the caption's."""
        return network.layers[len(network.layers) // 2]

    def call_options(self, size: Size) -> dict[str, Any]:
        """As many tokens as in training, and guidance off, which is 0 here: this pipeline adds s (c - u) to c, not to u."""
        return super().call_options(size) | {"guidance_scale": 0.0}
