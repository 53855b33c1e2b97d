"""Rewards on a CLIP: CLIP score, PickScore, HPSv2.1 and the LAION aesthetic predictor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPModel

from stepladder.errors import UserError
from stepladder.rewards.base import Reward, RewardSpec
from stepladder.rewards.preprocess import cropped, letterboxed


class ClipScore(Reward):
    """A hundred times the cosine of a picture's and its prompt's embeddings; any CLIP will do, DFN's too.

    `path` is a CLIP in transformers' layout; `weights`, where given, are put in its place: those of a CLIP of the same
    shape and activation, in open_clip's names.
    """

    name = "clip"
    needs: ClassVar[tuple[str, ...]] = ("path",)

    def __init__(self, model: CLIPModel, tokenizer: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer

    @classmethod
    def build(cls, spec: RewardSpec, device: torch.device) -> Reward:
        """The CLIP at `path`, perhaps with other weights in it; UserError if it cannot be loaded."""
        model, tokenizer = load_clip(spec, device)
        if spec.weights is not None:
            put(model, from_open_clip(read_weights(spec.weights)), spec.weights)
        return cls(model, tokenizer)

    def prepared(self, images: Tensor) -> Tensor:
        """Pictures as the vision encoder takes them."""
        return cropped(images, self.model.config.vision_config.image_size)

    def cosine(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosine of picture and prompt, (B,)."""
        return (embed_images(self.model, self.prepared(images)) * embed_texts(self.model, self.tokenizer, prompts)).sum(1)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,)."""
        return 100 * self.cosine(images, prompts)


class PickScore(ClipScore):
    """PickScore_v1: the cosine times the model's own learned scale."""

    name = "pickscore"

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,)."""
        return self.model.logit_scale.exp() * self.cosine(images, prompts)


class HPSv2(ClipScore):
    """HPSv2.1: a hundred times the cosine of a ViT-H/14 trained on preferences; pictures are letterboxed.

    `path` is the CLIP it was trained from (laion/CLIP-ViT-H-14-laion2B-s32B-b79K), `weights` its own file in open_clip's names.
    """

    name = "hpsv2"
    needs = ("path", "weights")

    def prepared(self, images: Tensor) -> Tensor:
        """Pictures as HPSv2's vision encoder takes them."""
        return letterboxed(images, self.model.config.vision_config.image_size)


class Aesthetic(Reward):
    """The LAION aesthetic predictor, 1 to 10: a head without activations on CLIP ViT-L/14's normalised picture embedding."""

    name = "aesthetic"
    needs = ("path", "weights")

    def __init__(self, model: CLIPModel, head: nn.Module) -> None:
        self.model = model
        self.head = head

    @classmethod
    def build(cls, spec: RewardSpec, device: torch.device) -> Reward:
        """The CLIP at `path` and the head in `weights`."""
        assert spec.weights is not None
        model, _ = load_clip(spec, device)
        head = score_head(model.config.projection_dim).to(device)
        put(head, {name.removeprefix("layers."): value for name, value in read_weights(spec.weights).items()}, spec.weights)
        return cls(model, head)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,); the prompts do not matter."""
        pictures = cropped(images, self.model.config.vision_config.image_size)
        return self.head(embed_images(self.model, pictures))[:, 0]


def score_head(width: int) -> nn.Sequential:
    """Width to 1024, 128, 64, 16 and one score, with nothing between; the places of dropout, which is off, are kept."""
    return nn.Sequential(
        nn.Linear(width, 1024),
        nn.Identity(),
        nn.Linear(1024, 128),
        nn.Identity(),
        nn.Linear(128, 64),
        nn.Identity(),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    )


def embed_images(model: CLIPModel, pictures: Tensor) -> Tensor:
    """Unit embeddings (B, D) of prepared pictures."""
    return _unit(model.get_image_features(pixel_values=pictures.to(model.dtype)))


def embed_texts(model: CLIPModel, tokenizer: Any, prompts: Sequence[str]) -> Tensor:
    """Unit embeddings (B, D) of prompts, cut at the model's length."""
    length = model.config.text_config.max_position_embeddings
    tokens = tokenizer(list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt").to(
        model.device
    )
    with torch.no_grad():
        return _unit(model.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask))


def _unit(found: Any) -> Tensor:
    # transformers 5 returns an object, 4 returned the tensor itself
    features = getattr(found, "pooler_output", found).float()
    return features / features.norm(dim=1, keepdim=True)


def load_clip(spec: RewardSpec, device: torch.device) -> tuple[CLIPModel, Any]:
    """A frozen CLIP and its tokenizer.

    Raises:
        UserError: nothing loads from its path.
    """
    path = spec.path or ""
    model = loaded(lambda: CLIPModel.from_pretrained(path, use_safetensors=True), path)
    return model.to(device).eval().requires_grad_(False), loaded(lambda: AutoTokenizer.from_pretrained(path), path)


def loaded(load: Callable[[], Any], path: str) -> Any:
    """What `load` gives, or a sentence that says what could not be loaded."""
    try:
        return load()
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"the reward model {path} cannot be loaded: {first}; give a complete folder with safetensors") from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file; pickled files are refused.

    Raises:
        UserError: the file is no safetensors file, or cannot be read.
    """
    if path.suffix != ".safetensors":
        raise UserError(f"{path} is no safetensors file: pickled weights are not loaded here; convert it where you trust it")
    try:
        return load_file(str(path))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}); download it again") from error


def put(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Load tensors into a model, all of its parameters.

    Raises:
        UserError: names or shapes are another model's.
    """
    own = dict(model.named_parameters())
    wrong = set(own) ^ set(tensors) or {name for name in own if own[name].shape != tensors[name].shape}
    if wrong:
        raise UserError(f"{path} is not for this model: {len(wrong)} tensors differ, first {min(wrong)}; check path and weights")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])


BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
SINGLE = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
}


def from_open_clip(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A CLIP's tensors from open_clip's names and layouts to those of transformers."""
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if name in SINGLE:
            found[SINGLE[name]] = value
        elif name in ("visual.proj", "text_projection"):
            found["visual_projection.weight" if name == "visual.proj" else "text_projection.weight"] = value.T.contiguous()
        elif "resblocks." in name:
            found |= _block(name, value)
    return found


def _block(name: str, value: Tensor) -> dict[str, Tensor]:
    tower = "vision_model" if name.startswith("visual.") else "text_model"
    number, _, rest = name.split("resblocks.")[1].partition(".")
    place = f"{tower}.encoder.layers.{number}"
    if rest in ("attn.in_proj_weight", "attn.in_proj_bias"):
        kind = rest.rsplit("_", 1)[1]
        return {f"{place}.self_attn.{key}_proj.{kind}": part for key, part in zip("qkv", value.chunk(3), strict=True)}
    layer, kind = rest.rsplit(".", 1)
    return {f"{place}.{BLOCK[layer]}.{kind}": value}
