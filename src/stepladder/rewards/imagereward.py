"""ImageReward: BLIP reads prompt and picture together, a head without activations scores its first token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, BlipTextConfig, BlipVisionConfig, BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from stepladder.rewards.base import Reward, RewardSpec
from stepladder.rewards.clip import loaded, put, read_weights, score_head
from stepladder.rewards.preprocess import cropped

MEAN, DEVIATION = 0.16717362830052426, 1.0333394966054072
TOKENS = 35

# ViT-L/16 and BERT-base with cross-attention, as ImageReward-v1.0 was trained
VISION = {
    **{"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    **{"image_size": 224, "patch_size": 16, "layer_norm_eps": 1e-6},
}
TEXT = {
    **{"vocab_size": 30524, "hidden_size": 768, "encoder_hidden_size": 1024, "intermediate_size": 3072, "is_decoder": True},
    # BlipTextConfig's own default is 8 heads, with which the weights would fit and mean nothing
    **{"num_hidden_layers": 12, "num_attention_heads": 12},
}


class Blip(nn.Module):
    """The three parts under one roof."""

    def __init__(self, vision: dict[str, Any], text: dict[str, Any]) -> None:
        super().__init__()
        self.vision = BlipVisionModel(BlipVisionConfig(**vision))
        # a decoder has the cross-attention; it is called as an encoder
        self.text = BlipTextModel(BlipTextConfig(**text), add_pooling_layer=False)
        self.head = score_head(text["hidden_size"])


class ImageReward(Reward):
    """`path` holds bert-base-uncased's tokenizer, `weights` ImageReward's own file as safetensors."""

    name = "imagereward"
    needs = ("path", "weights")

    def __init__(self, blip: Blip, tokenizer: Any) -> None:
        self.blip = blip
        self.tokenizer = tokenizer

    @classmethod
    def build(cls, spec: RewardSpec, device: torch.device) -> Reward:
        """BLIP at ImageReward's size with its weights."""
        path = spec.path or ""
        assert spec.weights is not None
        blip = Blip(VISION, TEXT)
        put(blip, from_original(read_weights(spec.weights)), spec.weights)
        tokenizer = loaded(lambda: AutoTokenizer.from_pretrained(path), path)
        return cls(blip.to(device).eval().requires_grad_(False), tokenizer)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,), of mean 0 and deviation 1 over ImageReward's own training set."""
        pictures = cropped(images, self.blip.vision.config.image_size)
        seen = self.blip.vision(pixel_values=pictures).last_hidden_state
        tokens = self.tokenizer(list(prompts), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
        read = self.blip.text(
            input_ids=tokens.input_ids.to(seen.device),
            attention_mask=tokens.attention_mask.to(seen.device),
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device),
        )
        return (self.blip.head(read.last_hidden_state[:, 0])[:, 0] - MEAN) / DEVIATION


VISUAL = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "blocks.": "encoder.layers.",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "norm1.": "layer_norm1.",
    "norm2.": "layer_norm2.",
}


def from_original(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """ImageReward's tensors from its own names to `Blip`'s; what it kept from BLIP's training is left out."""
    found = {}
    for name, value in tensors.items():
        if name.startswith("mlp.layers."):
            found[f"head.{name.removeprefix('mlp.layers.')}"] = value
        elif name.startswith("blip.text_encoder.") and not name.endswith("position_ids"):
            found[f"text.{name.removeprefix('blip.text_encoder.')}"] = value
        elif name.startswith("blip.visual_encoder."):
            own = name.removeprefix("blip.visual_encoder.")
            if own.startswith("norm."):
                own = own.replace("norm.", "post_layernorm.")
            for theirs, ours in VISUAL.items():
                own = own.replace(theirs, ours)
            found[f"vision.{own}"] = value
    return found
