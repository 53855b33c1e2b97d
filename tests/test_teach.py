"""Teaching: a phase that is interrupted ends where an undisturbed one ends, and teach makes a whole pipeline."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stepladder.backbones import load_backbone
from stepladder.errors import UserError
from stepladder.world import phase as phases
from stepladder.world.phase import Phase, run_phase, taught_seconds, warm_then_decay
from stepladder.world.teach import Lessons, teach


def lesson(steps, stop_at=None):
    """A small regression; raises like an interruption when asked to."""
    torch.manual_seed(0)
    module = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)

    def loss(step, generator):
        if step == stop_at:
            raise KeyboardInterrupt
        x = torch.randn(8, 4, generator=generator)
        return (module(x) - x.flip(1)).square().mean()

    return module, Phase("lesson", {"m": module}, [optimizer], steps, loss, warm_then_decay(5, steps), average=0.9)


def test_an_interrupted_phase_ends_bit_for_bit_like_an_undisturbed_one(tmp_path, monkeypatch):
    monkeypatch.setattr(phases, "CHECKPOINT_SECONDS", 0.0)
    whole, phase = lesson(30)
    run_phase(phase, tmp_path / "whole", 1)
    _, phase = lesson(30, stop_at=17)
    with pytest.raises(KeyboardInterrupt):
        run_phase(phase, tmp_path / "parts", 1)
    resumed, phase = lesson(30)
    run_phase(phase, tmp_path / "parts", 1)
    assert torch.equal(whole.weight, resumed.weight)
    loaded, phase = lesson(30)
    run_phase(phase, tmp_path / "parts", 1)
    assert torch.equal(whole.weight, loaded.weight)
    assert taught_seconds(tmp_path / "parts")["lesson"] > 0


def test_a_loss_that_is_not_finite_stops_the_phase(tmp_path):
    _, phase = lesson(5)
    phase.loss = lambda step, generator: torch.tensor(float("inf"), requires_grad=True)
    with pytest.raises(UserError, match="loss became inf at step 0"):
        run_phase(phase, tmp_path, 0)


def test_the_rate_warms_up_then_falls_to_zero():
    rate = warm_then_decay(10, 100, decay_from=0.5)
    assert rate(0) == pytest.approx(0.1)
    assert rate(30) == 1.0
    assert rate(75) == pytest.approx(0.5)
    assert rate(99) < 0.01


def test_teach_makes_a_pipeline_and_refuses_other_numbers_in_its_folder(tmp_path):
    lessons = Lessons(judge=2, autoencoder=2, text=2, scenes=64, low=2, full=2, polish=2)
    teach(tmp_path / "work", tmp_path / "out", lessons, seed=3)
    backbone = load_backbone(tmp_path / "out" / "teacher", 1)
    assert backbone.default_size == (128, 128)
    assert (tmp_path / "out" / "judge.safetensors").is_file()
    assert "stepladder teach --seed 3" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    with pytest.raises(UserError, match="begun with something else"):
        teach(tmp_path / "work", tmp_path / "out", lessons, seed=4)
