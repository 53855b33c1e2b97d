"""The demo from end to end, at the smallest size that still runs every part."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from conftest import tiny_recipe
from stepladder.backbones import backbones
from stepladder.training.trainer import Run, train_update


def command(*arguments):
    line = [sys.executable, "-m", "stepladder.cli.main", *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=600)


def test_demo_then_generate_evaluate_export(tmp_path):
    out = tmp_path / "demo"
    small = ["--set", "training.updates=2", "--set", "training.batch_size=4", "--set", "training.checkpoint_every=1"]
    done = command("demo", "--out", str(out), "--count", "16", "--teacher-steps", "2", *small)
    assert done.returncode == 0, done.stderr
    figures = json.loads((out / "metrics.json").read_text(encoding="utf-8"))["samplers"]
    assert list(figures) == ["teacher", "naive", "rmd"]
    for row in figures.values():
        assert {"nfe", "seconds_per_image", "prompt_accuracy", "fid", "diversity", "samples", "seed"} <= set(row)
    assert [row["nfe"] for row in figures.values()] == [4, 8, 4]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("<img") >= 3 * 8 + 2 * 9
    assert page.count("<svg") == 4
    assert "http" not in page.replace("http://www.w3.org", "")

    again = command("demo", "--out", str(out), "--count", "16", *small)
    assert again.returncode == 2
    assert "finished demo" in again.stderr

    done = command("evaluate", str(out / "run"), "--count", "16", "--teacher-steps", "2", "--json")
    assert json.loads(done.stdout) == json.loads((out / "run" / "evaluation" / "metrics.json").read_text(encoding="utf-8"))
    assert json.loads(done.stdout)["samplers"]["rmd"]["prompt_accuracy"] == figures["rmd"]["prompt_accuracy"]

    exported = tmp_path / "elsewhere"
    assert command("export", str(out / "run"), "--out", str(exported)).returncode == 0
    done = command(
        "generate", str(exported), "--prompt", "a red star top left on gray", "--sampler", "both", "--out", str(tmp_path / "images")
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["0000-0.png"]


def test_plan_prints_what_it_computes():
    plan = json.loads(command("plan", "bundled", "--json").stdout)
    assert [step["height"] for step in plan["steps"]] == [64, 64, 128, 128]
    assert [round(step["timestep"]) for step in plan["steps"]] == [1000, 947, 750, 500]
    low, full = plan["steps"][0]["tflops"], plan["steps"][-1]["tflops"]
    assert plan["speedup_over_teacher"] == pytest.approx(56 * full / (2 * low + 2 * full))
    assert plan["speedup_over_full_resolution"] == pytest.approx(4 * full / (2 * low + 2 * full))


@pytest.mark.gpu
def test_an_update_on_a_gpu(tmp_path):
    run = Run.start(tiny_recipe(tmp_path, device="cuda", precision="bf16"), backbones()["sd3"].tiny())
    figures = [train_update(run) for _ in range(3)]
    assert all(torch.tensor(list(row.values())).isfinite().all() for row in figures)
