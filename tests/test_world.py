"""The world: captions, split, renderer and judge."""

from __future__ import annotations

import random

import pytest
import torch

from stepladder.evaluation.metrics import diversity, frechet_distance, prompt_accuracy
from stepladder.evaluation.world import load_judge
from stepladder.world.captions import VOCABULARY, captions, describe
from stepladder.world.judge import answers, head_sizes, judge_scenes
from stepladder.world.render import render
from stepladder.world.scenes import (
    COLOURS,
    HELD_OUT_TRIPLES,
    SHAPES,
    SIZES,
    TRAIN_TRIPLES,
    Scene,
    Thing,
    draw_scenes,
    holds_out,
)
from stepladder.world.text import MAX_TOKENS, build_tokenizer, learn_merges, tokenize


def test_the_split_is_by_combination():
    assert len(TRAIN_TRIPLES) == 60
    assert len(HELD_OUT_TRIPLES) == 12
    assert not any(holds_out(scene) for scene in draw_scenes(2000, 0))
    assert all(holds_out(scene) for scene in draw_scenes(2000, 0, held_out=True))
    for pair in {(size, colour) for size in SIZES for colour in COLOURS}:
        assert any(triple[:2] == pair for triple in TRAIN_TRIPLES)
    for pair in {(colour, shape) for colour in COLOURS for shape in SHAPES}:
        assert any(triple[1:] == pair for triple in TRAIN_TRIPLES)


def test_scenes_and_captions_follow_from_their_seed():
    assert draw_scenes(50, 3) == draw_scenes(50, 3)
    assert draw_scenes(50, 3) != draw_scenes(50, 4)
    assert captions(draw_scenes(50, 3), 1) == captions(draw_scenes(50, 3), 1)


def test_captions_name_every_thing_and_vary():
    scene = Scene((Thing("star", "red", "large", "top left"), Thing("ring", "blue", "small", "bottom right")), "gray")
    rng = random.Random(0)
    said = {describe(scene, rng) for _ in range(300)}
    assert len(said) > 100
    for text in said:
        assert "red" in text
        assert "star" in text
        assert "blue" in text
        assert "ring" in text or "hoop" in text
        assert "gray" in text
        assert set(text.replace(",", "").split()) <= set(VOCABULARY)


def test_every_word_is_one_token_and_no_caption_is_cut():
    tokenizer = build_tokenizer()
    assert learn_merges(["ab", "abc"])
    for word in VOCABULARY:
        assert len(tokenizer.tokenize(word)) == 1
    said = captions(draw_scenes(3000, 0), 0)
    assert max(len(ids) for ids in tokenizer(said).input_ids) <= MAX_TOKENS
    assert tokenizer.eos_token_id not in tokenizer("zebra", add_special_tokens=False).input_ids
    assert tokenize(tokenizer, ["a"]).shape == (1, MAX_TOKENS)


def test_renders_are_the_same_picture_at_every_resolution():
    scenes = draw_scenes(8, 1)
    small = render(scenes, 64, torch.Generator().manual_seed(3))
    large = render(scenes, 128, torch.Generator().manual_seed(3))
    assert small.shape == (8, 3, 64, 64)
    assert render(scenes, (32, 64), torch.Generator().manual_seed(3)).shape == (8, 3, 32, 64)
    reduced = torch.nn.functional.interpolate(large, 64, mode="area")
    assert (small - reduced).abs().mean() < 0.02
    other = render(scenes, 64, torch.Generator().manual_seed(4))
    assert (small - other).abs().mean() > 0.02


def exam(count=400):
    scenes = draw_scenes(count, 11, held_out=True)
    generator = torch.Generator().manual_seed(5)
    return scenes, torch.cat([render(scenes[start : start + 100], 128, generator) for start in range(0, count, 100)])


def test_the_judge_reads_held_out_renders():
    scenes, images = exam()
    assert prompt_accuracy(load_judge(), images, scenes)["prompt_accuracy"] >= 0.99


def test_blank_noise_and_shuffled_pictures_score_at_chance():
    scenes, images = exam(200)
    judge = load_judge()
    noise = torch.randn(200, 3, 128, 128, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    assert prompt_accuracy(judge, torch.zeros(200, 3, 128, 128), scenes)["prompt_accuracy"] <= 0.01
    assert prompt_accuracy(judge, noise, scenes)["prompt_accuracy"] <= 0.01
    shuffled = prompt_accuracy(judge, images.roll(1, dims=0), scenes)
    assert shuffled["prompt_accuracy"] <= 0.01
    assert shuffled["ground_accuracy"] == pytest.approx(0.25, abs=0.1)


def test_a_verdict_by_hand():
    scene = Scene((Thing("star", "red", "large", "top left"),), "gray")
    logits = torch.zeros(1, sum(head_sizes()))
    parts = logits.split(head_sizes(), dim=-1)
    truth = answers([scene])[0]
    for part, right in zip(parts, truth, strict=True):
        if right >= 0:
            part[0, right] = 1
    assert judge_scenes(logits, [scene]).right.item() == 1
    parts[1][0] = torch.nn.functional.one_hot(torch.tensor(1), 6)
    verdict = judge_scenes(logits, [scene])
    assert (verdict.right.item(), verdict.colour.item(), verdict.shape.item()) == (0, 0, 1)
    parts[3][0, 2] = 5
    assert judge_scenes(logits, [scene]).count.item() == 0


def test_fid_is_small_between_equals_and_grows_with_blur():
    _, images = exam(600)
    judge = load_judge()
    far = torch.nn.functional.interpolate(torch.nn.functional.interpolate(images, 8, mode="area"), 128)
    near = torch.nn.functional.interpolate(torch.nn.functional.interpolate(images, 16, mode="area"), 128)
    same, blurred, coarse = (frechet_distance(judge, each[:300], images[300:]) for each in (images, near, far))
    assert 2 * same < blurred
    assert 2 * blurred < coarse


def test_diversity_is_zero_without_any_and_positive_with():
    _, images = exam(12)
    judge = load_judge()
    assert diversity(judge, images[:3, None].expand(3, 4, 3, 128, 128)) == pytest.approx(0, abs=1e-2)
    assert diversity(judge, images.unflatten(0, (3, 4))) > 0.1
