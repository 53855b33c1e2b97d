"""Rewards: weights converted from their own names give known outputs, pictures are prepared as described, with gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from stepladder.backbones.loading import tiny_clip
from stepladder.errors import UserError
from stepladder.methods.reinforcement import RLTerm
from stepladder.rewards import build_reward, rewards
from stepladder.rewards.base import RewardSpec
from stepladder.rewards.clip import Aesthetic, ClipScore, HPSv2, PickScore, from_open_clip, score_head
from stepladder.rewards.function import Function
from stepladder.rewards.imagereward import DEVIATION, MEAN, Blip, ImageReward, from_original
from stepladder.rewards.preprocess import CLIP_MEAN, CLIP_STD, cropped, letterboxed
from stepladder.world.captions import captions, read_caption
from stepladder.world.render import render
from stepladder.world.scenes import draw_scenes

CPU = torch.device("cpu")


def tiny_model(act="quick_gelu"):
    torch.manual_seed(0)
    tokenizer, _ = tiny_clip(16)
    common = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": act}
    text = {**common, "vocab_size": len(tokenizer), "max_position_embeddings": 16, "eos_token_id": tokenizer.eos_token_id}
    vision = {**common, "image_size": 32, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
    return model.eval().requires_grad_(False), tokenizer


def pictures(height=40, width=56, count=2):
    draw = torch.Generator().manual_seed(0)
    rough = torch.rand(count, 3, 9, 9, generator=draw) * 2 - 1
    return F.interpolate(rough, (height, width), mode="bilinear").clamp(-1, 1)


def as_pil(image):
    return Image.fromarray(((image.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy())


def test_cropping_is_clips_own_preprocessing():
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    for size in ((40, 56), (56, 40), (32, 32), (20, 24), (128, 128)):
        images = pictures(*size)
        theirs = processor([as_pil(image) for image in images], return_tensors="pt")["pixel_values"]
        assert (cropped(images, 32) - theirs).abs().max() < 3 / 255 / min(CLIP_STD)


def test_letterboxing_is_hpsv2s_own_preprocessing():
    """Longest side to 224 by bicubic, black bars that are added before normalising, as HPSv2's description has it."""
    images = pictures(40, 56)
    scaled = as_pil(images[0]).resize((32, round(40 * 32 / 56)), Image.Resampling.BICUBIC)
    canvas = np.zeros((32, 32, 3), dtype=np.float32)
    top = (32 - scaled.height) // 2
    canvas[top : top + scaled.height] = np.asarray(scaled, dtype=np.float32) / 255
    expected = (torch.from_numpy(canvas) - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
    assert (letterboxed(images, 32)[0].permute(1, 2, 0) - expected).abs().max() < 3 / 255 / min(CLIP_STD)


@pytest.mark.parametrize("prepare", [cropped, letterboxed])
def test_gradients_pass_through_the_preparation(prepare):
    images = pictures().requires_grad_(True)
    prepare(images, 32).square().sum().backward()
    assert (images.grad.abs() > 0).float().mean() > 0.5


class OpenClipBlock(nn.Module):
    """A residual block as open_clip has it, written from its description."""

    def __init__(self, width, heads):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 2 * width), "c_proj": nn.Linear(2 * width, width)})

    def forward(self, x, mask=None):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))


class OpenClip(nn.Module):
    """open_clip's ViT and text tower at toy size, with its parameters' names and layouts."""

    def __init__(self, vocabulary, width=16, out=12, side=32, patch=8, length=16):
        super().__init__()
        self.visual = nn.Module()
        self.visual.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.visual.class_embedding = nn.Parameter(torch.randn(width))
        self.visual.positional_embedding = nn.Parameter(torch.randn((side // patch) ** 2 + 1, width))
        self.visual.ln_pre, self.visual.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.visual.transformer = nn.Module()
        self.visual.transformer.resblocks = nn.ModuleList(OpenClipBlock(width, 2) for _ in range(2))
        self.visual.proj = nn.Parameter(torch.randn(width, out))
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(OpenClipBlock(width, 2) for _ in range(2))
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.randn(length, width))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, out))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(100.0)))

    def image(self, x):
        x = self.visual.conv1(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.visual.class_embedding.expand(len(x), 1, -1), x], 1) + self.visual.positional_embedding
        x = self.visual.ln_pre(x)
        for block in self.visual.transformer.resblocks:
            x = block(x)
        return F.normalize(self.visual.ln_post(x[:, 0]) @ self.visual.proj, dim=1)

    def text(self, tokens):
        x = self.token_embedding(tokens) + self.positional_embedding
        mask = torch.full((len(self.positional_embedding),) * 2, float("-inf")).triu(1)
        for block in self.transformer.resblocks:
            x = block(x, mask)
        # the end token has the highest number
        return F.normalize(self.ln_final(x)[range(len(x)), tokens.argmax(1)] @ self.text_projection, dim=1)


def test_hpsv2s_weights_in_open_clips_names_give_open_clips_scores(tmp_path):
    model, tokenizer = tiny_model("gelu")
    original = OpenClip(len(tokenizer))
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    weights = tmp_path / "hps.safetensors"
    save_file({name: value.detach().clone() for name, value in original.state_dict().items()}, str(weights))
    folder = tmp_path / "clip"
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    reward = build_reward([RewardSpec(name="hpsv2", path=str(folder), weights=weights)], CPU)
    prompts, images = ["a cat", "dog"], pictures()
    tokens = tokenizer(prompts, padding="max_length", truncation=True, max_length=16, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = 100 * (original.image(letterboxed(images, 32)) * original.text(tokens)).sum(1)
        torch.testing.assert_close(reward(images, prompts), expected, rtol=1e-4, atol=1e-3)
    assert set(from_open_clip(dict(original.state_dict()))) == set(dict(model.named_parameters()))
    # a picture of the encoder's own size needs neither bars nor cropping: CLIP score takes other weights the same way
    other, square = build_reward([RewardSpec(name="clip", path=str(folder), weights=weights)], CPU), pictures(32, 32)
    torch.testing.assert_close(other(square, prompts), reward(square, prompts))


def test_clip_score_and_pick_score_are_the_models_own_cosines():
    model, tokenizer = tiny_model()
    images, prompts = pictures(), ["a cat", "dog"]
    tokens = tokenizer(prompts, padding="max_length", truncation=True, max_length=16, return_tensors="pt")
    logits = model(pixel_values=cropped(images, 32), **tokens).logits_per_image.diagonal()
    torch.testing.assert_close(PickScore(model, tokenizer)(images, prompts), logits)
    torch.testing.assert_close(ClipScore(model, tokenizer)(images, prompts), 100 * logits / model.logit_scale.exp())


def test_the_aesthetic_head_is_linear_in_the_unit_embedding(tmp_path):
    model, tokenizer = tiny_model()
    head = score_head(12)
    named = {f"layers.{name}": value.detach().clone() for name, value in head.state_dict().items()}
    assert sorted(named)[:4] == ["layers.0.bias", "layers.0.weight", "layers.2.bias", "layers.2.weight"]
    save_file(named, str(tmp_path / "head.safetensors"))
    model.save_pretrained(str(tmp_path))
    tokenizer.save_pretrained(str(tmp_path))
    spec = RewardSpec(name="aesthetic", path=str(tmp_path), weights=tmp_path / "head.safetensors")
    images = pictures()
    unit = F.normalize(model.get_image_features(pixel_values=cropped(images, 32)).pooler_output, dim=1)
    for index in (0, 2, 4, 6, 7):
        unit = unit @ named[f"layers.{index}.weight"].T + named[f"layers.{index}.bias"]
    torch.testing.assert_close(Aesthetic.build(spec, CPU)(images, ["", ""]), unit[:, 0], rtol=1e-4, atol=1e-5)


def blip_parts():
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32}
    text = {"vocab_size": 300, "hidden_size": 16, "encoder_hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    return {**vision, "patch_size": 8, "layer_norm_eps": 1e-6}, {**text, "num_attention_heads": 2, "is_decoder": True}


def vit(tensors, x, depth=2, heads=2):
    """BLIP's own vision tower, timm's ViT, from tensors in its names."""
    t = {name.removeprefix("blip.visual_encoder."): value for name, value in tensors.items()}
    x = F.conv2d(x, t["patch_embed.proj.weight"], t["patch_embed.proj.bias"], stride=8).flatten(2).transpose(1, 2)
    x = torch.cat([t["cls_token"].expand(len(x), -1, -1), x], 1) + t["pos_embed"]
    norm = lambda x, name: F.layer_norm(x, x.shape[-1:], t[f"{name}.weight"], t[f"{name}.bias"], 1e-6)
    linear = lambda x, name: F.linear(x, t[f"{name}.weight"], t[f"{name}.bias"])
    for index in range(depth):
        block = f"blocks.{index}"
        qkv = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv").unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2)
        x = x + linear(mixed, f"{block}.attn.proj")
        x = x + linear(F.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
    return norm(x, "norm")


def original_names(blip):
    """A tiny Blip's tensors under ImageReward's own names, with what it kept from BLIP's training beside them."""
    back = {
        "embeddings.class_embedding": "cls_token",
        "embeddings.position_embedding": "pos_embed",
        "embeddings.patch_embedding": "patch_embed.proj",
        "encoder.layers.": "blocks.",
        "self_attn.qkv": "attn.qkv",
        "self_attn.projection": "attn.proj",
        "layer_norm1": "norm1",
        "layer_norm2": "norm2",
        "post_layernorm": "norm",
    }
    found = {"blip.text_proj.weight": torch.zeros(1), "blip.text_encoder.embeddings.position_ids": torch.zeros(1)}
    for name, value in blip.named_parameters():
        part, _, own = name.partition(".")
        if part == "vision":
            for ours, theirs in back.items():
                own = own.replace(ours, theirs)
        prefix = {"vision": "blip.visual_encoder.", "text": "blip.text_encoder.", "head": "mlp.layers."}[part]
        found[prefix + own] = value.detach().clone()
    return found


def test_imagerewards_weights_come_through_and_its_vision_tower_is_blips_own():
    torch.manual_seed(0)
    blip = Blip(*blip_parts()).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in blip.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    named = original_names(blip)
    converted = from_original(named)
    assert set(converted) == set(dict(blip.named_parameters()))
    for name, parameter in blip.named_parameters():
        assert torch.equal(converted[name], parameter)
    x = cropped(pictures(), 32)
    visual = {name: value for name, value in named.items() if "visual_encoder" in name}
    torch.testing.assert_close(blip.vision(pixel_values=x).last_hidden_state, vit(visual, x), rtol=1e-4, atol=1e-5)


class Letters:
    """A tokenizer for a toy vocabulary."""

    def __call__(self, texts, max_length, **_):
        rows = [[1, *(ord(letter) for letter in text[: max_length - 1])] for text in texts]
        ids = torch.tensor([row + [0] * (max_length - len(row)) for row in rows])
        return type("Tokens", (), {"input_ids": ids, "attention_mask": (ids > 0).long()})()


def test_imagereward_reads_prompt_and_picture_and_normalises():
    torch.manual_seed(0)
    blip = Blip(*blip_parts()).eval().requires_grad_(False)
    reward, images = ImageReward(blip, Letters()), pictures().requires_grad_(True)
    scores = reward(images, ["a cat", "dog"])
    scores.sum().backward()
    assert images.grad.abs().max() > 0
    other = reward(images, ["a cat", "bird"])
    assert other[0] == scores[0]
    assert other[1] != scores[1]
    tokens = Letters()(["a cat"], 35)
    seen = blip.vision(pixel_values=cropped(images[:1], 32)).last_hidden_state
    hidden = blip.text(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, encoder_hidden_states=seen)
    raw = blip.head(hidden.last_hidden_state[:, 0])[:, 0]
    torch.testing.assert_close(scores[:1], (raw - MEAN) / DEVIATION)


def test_captions_are_read_back():
    scenes = draw_scenes(300, 5) + draw_scenes(100, 6, held_out=True)
    for scene, caption in zip(scenes, captions(scenes, 3), strict=True):
        read = read_caption(caption)
        assert read.ground == scene.ground
        assert set(read.things) == set(scene.things), caption
    with pytest.raises(UserError, match="cannot read"):
        read_caption("a photo of a cat")


def test_the_judge_rewards_what_the_caption_asks_for():
    scenes = draw_scenes(24, 0)
    images = render(scenes, (128, 128), torch.Generator().manual_seed(0)).requires_grad_(True)
    reward = build_reward([RewardSpec(name="judge")], CPU)
    prompts = captions(scenes, 0)
    right, wrong = reward(images, prompts), reward(images, prompts[1:] + prompts[:1])
    assert right.max() <= 0
    assert right.mean() > wrong.mean() + 1
    right.sum().backward()
    assert images.grad.abs().max() > 0


def brightness(images, prompts):
    return images.mean((1, 2, 3))


def test_a_function_of_ones_own_and_a_weighted_sum():
    specs = [
        RewardSpec(name="function", function="test_rewards:brightness", weight=weight, differentiable=True) for weight in (2.0, 0.5)
    ]
    reward, images = build_reward(specs, CPU), pictures()
    torch.testing.assert_close(reward(images, ["", ""]), 2.5 * images.mean((1, 2, 3)))
    assert reward.differentiable
    assert not build_reward([RewardSpec(name="function", function="test_rewards:brightness")], CPU).differentiable


def test_rewards_are_found():
    assert set(rewards()) == {"aesthetic", "clip", "function", "hpsv2", "imagereward", "judge", "pickscore"}
    assert rewards()["hpsv2"] is HPSv2


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"name": "clip", "path": "./nowhere"}, "cannot be loaded"),
        ({"name": "imagereward", "path": "./x", "weights": "a.pt"}, "pickled weights are not loaded"),
        ({"name": "function", "function": "nothing:here"}, "cannot be imported"),
        ({"name": "judge", "path": "./nowhere"}, "there is no judge at"),
    ],
)
def test_rewards_that_cannot_be_had_say_why(spec, words):
    with pytest.raises(UserError, match=words):
        build_reward([RewardSpec(**spec)], CPU)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"name": "beauty"}, "unknown reward"),
        ({"name": "clip"}, "clip reward needs path: the model's folder"),
        ({"name": "hpsv2", "path": "./nowhere"}, "hpsv2 reward needs weights"),
        ({"name": "aesthetic", "path": "./nowhere"}, "aesthetic reward needs weights"),
        ({"name": "imagereward", "path": "./nowhere"}, "imagereward reward needs weights"),
        ({"name": "function"}, "function reward needs function: of your own"),
    ],
)
def test_rewards_that_lack_something_are_refused_with_the_recipe(spec, words):
    with pytest.raises(ValueError, match=words):
        RLTerm(rewards=[spec])


def test_functions_that_keep_no_promise_are_told_so():
    images = torch.zeros(2, 3, 4, 4, requires_grad=True)
    with pytest.raises(UserError, match="passes no gradient"):
        Function(lambda images, prompts: images.detach().mean((1, 2, 3)), True)(images, ["a", "b"])
    with pytest.raises(UserError, match="gave list where a tensor"):
        Function(lambda images, prompts: [0.0, 0.0], False)(images, ["a", "b"])
