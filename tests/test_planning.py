"""Plans: the papers' speedups follow from the architectures, and memory is what tensors take."""

from __future__ import annotations

import json
import time

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from stepladder.backbones import backbones, releases, sketch_backbone
from stepladder.cli.main import _register, app
from stepladder.cli.plan import ladder_of
from stepladder.errors import UserError
from stepladder.ladder import build_ladder, spaced_timesteps
from stepladder.planning import (
    TrainingSetup,
    fused_attention,
    network_flops,
    peak_bytes,
    plan_ladder,
    plan_memory,
    search_ladders,
    stored,
)

# notes.md section 5 and the cards of the models themselves
PARAMETERS = {
    "sdxl": 2.567e9,
    "pixart": 0.611e9,
    "sd35-large": 8.06e9,
    "flux": 11.9e9,
    "wan-1.3b": 1.42e9,
    "wan-14b": 14.29e9,
    "z-image": 6.15e9,
}
TERAFLOPS = {
    "sdxl": {(512, 512): 1.589, (1024, 1024): 6.761},
    "pixart": {(512, 512): 1.236, (1024, 1024): 6.510},
    "sd35-medium": {(512, 512): 2.443, (1024, 1024): 11.250},
    "wan-14b": {(81, 480, 832): 1678, (81, 720, 1280): 6523},
}
PAPER_SPEEDUPS = {"sdxl": 33.4, "pixart": 21.0, "sd35-medium": 32.0, "wan-14b": 25.6}


def planned(name, **changes):
    backbone, release = sketch_backbone(name), releases()[name][1]
    part = ladder_of(release).model_copy(update=changes)
    return plan_ladder(backbone, part.build(backbone), release.teacher_steps)


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_parameters_are_those_of_the_published_models(name):
    network = sketch_backbone(name).network
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(PARAMETERS[name], rel=5e-3)
    assert {p.device.type for p in network.parameters()} == {"meta"}


def test_the_weights_of_sd35_medium_hold_its_table_of_positions():
    assert stored(sketch_backbone("sd35-medium").network) == pytest.approx(2.47e9, rel=2e-3)


@pytest.mark.parametrize("name", sorted(TERAFLOPS))
def test_operations_are_those_of_the_notes(name):
    backbone = sketch_backbone(name)
    for size, expected in TERAFLOPS[name].items():
        assert network_flops(backbone, backbone.latent_size(size)) / 1e12 == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", sorted(PAPER_SPEEDUPS))
def test_speedups_of_rmd_tables_1_and_2(name):
    assert planned(name).speedup_over_teacher == pytest.approx(PAPER_SPEEDUPS[name], rel=0.05)


@pytest.mark.parametrize(
    ("name", "sizes", "logsnr", "allocation", "expected"),
    [
        ("pixart", [512, 1024], [-6.0], "1+3", 1.25),
        ("pixart", [512, 1024], [-2.5], "2+2", 1.68),
        ("pixart", [512, 1024], [0.0], "3+1", 2.54),
        ("sdxl", [256, 512, 1024], [-2.5, 0.0], "2+1+1", 2.90),
        ("sdxl", [256, 512, 1024], [-4.0, -1.5], "1+1+2", 1.73),
        ("sdxl", [256, 512, 1024], [-4.0, 0.0], "1+2+1", 2.54),
    ],
)
def test_speedups_of_rmd_tables_4_and_5(name, sizes, logsnr, allocation, expected):
    backbone = sketch_backbone(name)
    latents = [backbone.latent_size((side, side)) for side in sizes]
    ladder = build_ladder(backbone.process, spaced_timesteps(4), latents, logsnr)
    assert ladder.allocation() == allocation
    assert plan_ladder(backbone, ladder, 40).speedup_over_full_resolution == pytest.approx(expected, rel=0.08)


def test_peak_bytes_counts_what_lives_at_once_and_neither_views_nor_what_was_there():
    before = torch.empty(1000, device="meta")

    def work():
        a = torch.empty(250, device="meta")
        b = a.view(50, 5) + 1
        del a
        c = b.t()[:1] * before.view(-1)[0]
        return c.sum()

    assert peak_bytes(work) == 4 * (250 + 250)


def test_peak_bytes_of_a_training_step_is_its_activations_and_gradients():
    with torch.device("meta"):
        network = nn.Sequential(nn.Linear(64, 64, bias=False), nn.ReLU(), nn.Linear(64, 64, bias=False))
    x = torch.empty(8, 64, device="meta")
    activation, gradient = 8 * 64 * 4, 64 * 64 * 4
    peak = peak_bytes(lambda: network(x).sum().backward())
    assert 2 * gradient + activation <= peak <= 2 * gradient + 6 * activation


def test_attention_on_paper_holds_no_matrix():
    query = torch.empty(1, 2, 512, 16, device="meta")
    call = lambda: nn.functional.scaled_dot_product_attention(query, query, query)
    assert peak_bytes(call) < 512 * 512 * 4
    with fused_attention():
        assert call().shape == query.shape
    assert "flash" not in nn.functional.scaled_dot_product_attention.__name__


@pytest.mark.parametrize("name", sorted(backbones()))
def test_memory_orders_as_it_must(name):
    backbone = backbones()[name].tiny()
    size = backbone.latent_size((5, 64, 64) if name == "wan" else (64, 64))
    plain = plan_memory(backbone, size, TrainingSetup(lora_rank=4, gradient_checkpointing=False))
    checkpointed = plan_memory(backbone, size, TrainingSetup(lora_rank=4))
    doubled = plan_memory(backbone, size, TrainingSetup(lora_rank=4, batch_size=2, gradient_checkpointing=False))
    shared = plan_memory(backbone, size, TrainingSetup(lora_rank=4, batch_size=2, gradient_checkpointing=False, gpus=2))
    assert plain["generate"] < plain["generate_with_text_encoders"]
    assert plain["generate"] < plain["train_lora"] < plain["train_full"]
    assert checkpointed["train_lora"] < plain["train_lora"] < doubled["train_lora"]
    assert shared["train_lora"] < doubled["train_lora"]
    assert {p.device.type for p in backbone.network.parameters()} == {"cpu"}
    assert not [key for key, _ in backbone.network.named_parameters() if "lora" in key]


def test_search_finds_ladders_that_keep_what_they_promise():
    backbone = sketch_backbone("pixart")
    found = search_ladders(backbone, (1024, 1024), 25, 1.0, 20.0)
    assert found
    for each in found[:5]:
        latents = [backbone.latent_size(tuple(size)) for size in each["sizes"]]
        steps = sum(int(part) for part in each["allocation"].split("+"))
        ladder = build_ladder(backbone.process, spaced_timesteps(steps), latents, each["thresholds"])
        assert ladder.allocation() == each["allocation"]
        assert plan_ladder(backbone, ladder, 25).speedup_over_teacher == pytest.approx(each["speedup_over_teacher"])
        assert each["speedup_over_teacher"] >= 20
    assert any(each["allocation"] == "2+2" for each in found)


def run(*arguments):
    _register()
    return CliRunner().invoke(app, list(arguments))


def test_the_command_prints_the_promised_keys_within_half_a_minute():
    began = time.monotonic()
    shown = run(
        "plan", "pixart", "--sizes", "256,1024", "--steps", "5", "--logsnr=-4", "--spacing", "2", "--shift", "exact", "--json"
    )
    assert shown.exit_code == 0, shown.output
    assert time.monotonic() - began < 30
    plan = json.loads(shown.stdout)
    assert {"steps", "speedup_over_teacher", "speedup_over_full_resolution", "parameters", "memory"} <= set(plan)
    assert set(plan["steps"][0]) == {"teacher_timestep", "timestep", "height", "width", "frames", "tflops"}
    assert [step["height"] for step in plan["steps"]] == [256, 256, 256, 1024, 1024]


def test_the_command_plans_video_folders_and_recipes(tmp_path):
    model = tmp_path / "model"
    backbones()["wan"].tiny().pipeline.save_pretrained(str(model))
    shown = run("plan", str(model), "--sizes", "5x16x16,9x32x32", "--steps", "4", "--json")
    assert shown.exit_code == 0, shown.output
    assert [(s["frames"], s["height"]) for s in json.loads(shown.stdout)["steps"]][::3] == [(5, 16), (9, 32)]
    assert "RTX 4090" in run("plan", "bundled").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plan", "sdxl2"), "neither a known model"),
        (("plan", "sdxl", "--sizes", "512,big"), "--sizes takes"),
        (("plan", "sdxl", "--timesteps", "1000,x"), "--timesteps takes numbers"),
        (("plan", "sdxl", "--logsnr=-6"), "outside what this schedule reaches"),
        (("plan", "sdxl", "--sizes", "500,1024"), "cannot be divided"),
        (("plan", "pixart", "--speedup", "9999"), "ask for less"),
        (("bench", "latency", "nothing"), "neither a known model"),
    ],
)
def test_wrong_questions(arguments, message):
    shown = run(*arguments)
    assert isinstance(shown.exception, UserError)
    assert message in str(shown.exception)


def test_latency_times_all_parts_of_a_tiny_model(tmp_path):
    model, out = tmp_path / "model", tmp_path / "latency.json"
    backbones()["sdxl"].tiny().pipeline.save_pretrained(str(model))
    shown = run(
        "bench",
        "latency",
        str(model),
        "--batch",
        "1",
        "--rounds",
        "2",
        "--teacher-steps",
        "6",
        "--device",
        "cpu",
        "--tiny-vae",
        "--out",
        str(out),
    )
    assert shown.exit_code == 0, shown.output
    figures = json.loads(out.read_text(encoding="utf-8"))
    row = figures["rows"][0]
    for part in ("teacher", "full", "ladder", "text_encoders", "decode"):
        assert 0 < row[part]["min"] <= row[part]["median"] <= row[part]["max"]
    assert figures["allocation"] == "2+2"
    assert figures["versions"]["torch"]
