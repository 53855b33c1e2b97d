"""The bundled teacher: small, loaded by stock diffusers alone, and good."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from safetensors import safe_open

from stepladder.backbones import load_backbone
from stepladder.evaluation.world import examine, load_judge, set_exam
from stepladder.images import to_pil
from stepladder.ladder import full_resolution
from stepladder.roles import CopyRoles
from stepladder.samplers import Sampler, sample
from stepladder.world.judge import judge_scenes
from stepladder.world.paths import BUNDLED, TEACHER

STOCK = """
import sys
from diffusers import StableDiffusion3Pipeline
assert "stepladder" not in sys.modules
pipe = StableDiffusion3Pipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
image = pipe("a large red circle top left on gray", guidance_scale=4.0, num_inference_steps=2).images[0]
assert image.size == (128, 128), image.size
assert not any(name.startswith("stepladder") for name in sys.modules)
"""


def test_weights_are_under_16_mb():
    files = list(BUNDLED.rglob("*.safetensors"))
    assert len(files) >= 5
    assert sum(path.stat().st_size for path in files) < 16_000_000
    assert not [path for path in BUNDLED.rglob("*") if path.suffix in {".bin", ".pt", ".ckpt", ".pkl"}]
    for path in files:
        with safe_open(str(path), framework="pt") as file:
            assert all(file.get_tensor(name).isfinite().all() for name in file.keys())  # noqa: SIM118


def test_stock_diffusers_loads_and_draws_without_our_code():
    done = subprocess.run([sys.executable, "-c", STOCK, str(TEACHER)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_our_sampler_is_the_stock_pipelines():
    """Same noise, same steps, same guidance: FlowMatchEuler's image and ours."""
    backbone = load_backbone(TEACHER, 1)
    prompt = "a large red circle top left on gray"
    noise = torch.randn(1, backbone.latent_channels, 16, 16, generator=torch.Generator().manual_seed(5))
    stock = backbone.pipeline(
        prompt, latents=noise, guidance_scale=4.0, num_inference_steps=6, max_sequence_length=1, output_type="pt"
    ).images
    ladder = full_resolution(backbone.teacher_timesteps(6), (16, 16))
    sampler = Sampler(CopyRoles(backbone).teacher, ladder, 4.0)
    ours = backbone.decode(sample(sampler, backbone, backbone.encode([prompt]), backbone.unconditional(), [5], precision="fp32"))
    torch.testing.assert_close(stock * 2 - 1, ours, atol=2e-3, rtol=0)
    assert to_pil(ours[0]).size == (128, 128)


@pytest.mark.parametrize("length", [1, 256])
def test_the_teacher_draws_what_held_out_captions_say(length):
    """A small sample; the README's figures are measured on 512. With 256 it is what a stock call computes."""
    backbone = load_backbone(TEACHER, length)
    exam = set_exam(backbone, 32, seed=77)
    ladder = full_resolution(backbone.teacher_timesteps(20), (16, 16))
    sampler = Sampler(CopyRoles(backbone).teacher, ladder, 4.0)
    latents = sample(sampler, backbone, exam.conditioning, exam.unconditional, list(range(32)))
    verdict = judge_scenes(load_judge()(backbone.decode(latents))[0], exam.scenes)
    assert verdict.right.mean() >= 0.7
    assert verdict.colour.mean() >= 0.85


@pytest.mark.slow
def test_the_teacher_reaches_nine_in_ten_on_held_out_captions():
    backbone = load_backbone(TEACHER, 1)
    exam = set_exam(backbone, 512, seed=0)
    ladder = full_resolution(backbone.teacher_timesteps(28), (16, 16))
    figures, _ = examine(Sampler(CopyRoles(backbone).teacher, ladder, 4.0), backbone, exam)
    assert figures["prompt_accuracy"] >= 0.90
