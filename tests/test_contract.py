"""Every method on every backbone: found by import, run at toy size."""

from __future__ import annotations

import copy

import pytest
import torch

from conftest import tiny_recipe
from stepladder.backbones import backbones
from stepladder.ladder import build_ladder, spaced_timesteps
from stepladder.methods import methods
from stepladder.processes import spread
from stepladder.roles import FAKE_SCORE, STUDENT
from stepladder.samplers import Sampler, sample
from stepladder.training.trainer import Run, train_update

PAIRS = [(method, backbone) for method in sorted(methods()) for backbone in sorted(backbones())]


def start(tmp_path, method, backbone, **changes):
    recipe = tiny_recipe(tmp_path)
    recipe.method = methods()[method].Config(name=method).model_dump(mode="json")
    for name, value in changes.items():
        setattr(recipe.roles, name, value)
    return Run.start(recipe, backbones()[backbone].tiny())


def test_methods_and_backbones_are_found():
    assert "rmd" in methods()
    assert "sd3" in backbones()


@pytest.mark.parametrize("name", sorted(backbones()))
def test_predictions_rebuild_the_state(name, generator):
    backbone = backbones()[name].tiny()
    x = torch.randn(2, backbone.latent_channels, 8, 8, generator=generator)
    t = torch.tensor([900.0, 300.0])
    with torch.no_grad():
        prediction = backbone.denoise(backbone.network, x, t, backbone.encode(["one", "two"]))
    rebuilt = spread(backbone.process.alpha(t), x) * prediction.x0 + spread(backbone.process.sigma(t), x) * prediction.eps
    torch.testing.assert_close(rebuilt, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("method", "backbone"), PAIRS)
def test_gradient_belongs_to_one_role_at_a_time(tmp_path, method, backbone):
    run = start(tmp_path, method, backbone)
    conditioning = run.prompts.batch(0, 2)
    sample_ = run.method.roll_out(run.roles, conditioning, 5, run.generator)
    fake = run.method.fake_score_loss(run.roles, sample_)
    fake.backward()
    assert fake.isfinite()
    assert all(p.grad is None for p in run.roles.parameters(STUDENT).values())
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in run.roles.parameters(FAKE_SCORE).values())
    run.optimizers[FAKE_SCORE].step()
    run.optimizers[FAKE_SCORE].zero_grad()
    loss = run.method.student_loss(run.roles, sample_, run.prompts.unconditional.expand(2))
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None for p in run.roles.parameters(FAKE_SCORE).values())
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in run.roles.parameters(STUDENT).values())


@pytest.mark.parametrize(("method", "backbone"), PAIRS)
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_an_update_moves_the_student_and_never_the_base(tmp_path, method, backbone, mode):
    run = start(tmp_path, method, backbone, mode=mode)
    student = copy.deepcopy({name: p.detach() for name, p in run.roles.parameters(STUDENT).items()})
    base = copy.deepcopy({name: p.detach() for name, p in run.backbone.network.named_parameters() if "lora_" not in name})
    for _ in range(2):
        figures = train_update(run)
    assert figures["student_grad_norm"] > 0
    assert any(not torch.equal(p, student[name]) for name, p in run.roles.parameters(STUDENT).items())
    for name, p in run.backbone.network.named_parameters():
        if "lora_" not in name:
            assert torch.equal(p, base[name]), name


@pytest.mark.parametrize("backbone", sorted(backbones()))
@pytest.mark.parametrize(
    ("sizes", "thresholds"),
    [([(16, 16), (32, 32)], [-2.5]), ([(8, 16), (16, 32)], [-2.5]), ([(8, 8), (16, 16), (32, 32)], [-2.5, -0.5])],
)
def test_cascades_of_two_and_three_rungs_also_oblong(backbone, sizes, thresholds):
    model = backbones()[backbone].tiny()
    ladder = build_ladder(model.process, spaced_timesteps(4, 3.0), [model.latent_size(size) for size in sizes], thresholds)
    from stepladder.roles import CopyRoles

    sampler = Sampler(CopyRoles(model).student, ladder, 1.0, {"mix": 0.2})
    conditioning = model.encode(["a", "b"])
    latents = sample(sampler, model, conditioning, model.encode([""]), [3, 4])
    assert tuple(latents.shape[2:]) == model.latent_size(sizes[-1])
    assert model.decode(latents).shape[-2:] == sizes[-1]
    alone = sample(sampler, model, conditioning.rows([1]), model.encode([""]), [4])
    torch.testing.assert_close(latents[1:], alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("backbone", sorted(backbones()))
def test_the_roll_out_goes_no_further_than_the_sampled_step(tmp_path, backbone):
    run = start(tmp_path, "rmd", backbone)
    calls = []
    inner = run.roles.student.backbone.denoise
    run.roles.student.backbone.denoise = lambda network, x, t, c: calls.append(t[0].item()) or inner(network, x, t, c)
    for update in range(12):
        calls.clear()
        run.method.roll_out(run.roles, run.prompts.batch(update, 2), 99, run.generator)
        expected = [step.timestep for step in run.ladder.steps[: len(calls)]]
        assert calls == pytest.approx(expected)


def test_warm_up_keeps_to_the_noisy_half(tmp_path):
    run = start(tmp_path, "rmd", "sd3")
    run.method.config.warmup_steps = 10
    stages = {run.method.roll_out(run.roles, run.prompts.batch(0, 2), update, run.generator).stage for update in range(10)}
    assert stages == {0}
    stages = {run.method.roll_out(run.roles, run.prompts.batch(0, 2), 10, run.generator).stage for _ in range(20)}
    assert stages == {0, 1}


def test_timesteps_are_uniform_over_the_stages_interval(tmp_path):
    run = start(tmp_path, "rmd", "sd3")
    seen = {0: [], 1: []}
    for _ in range(60):
        sample_ = run.method.roll_out(run.roles, run.prompts.batch(0, 2), 99, run.generator)
        seen[sample_.stage] += sample_.timestep.tolist()
    for stage, values in seen.items():
        start_, end = run.ladder.boundaries[stage], run.ladder.boundaries[stage + 1]
        assert all(end <= value <= start_ for value in values)
        assert sum(values) / len(values) == pytest.approx((start_ + end) / 2, abs=0.2 * (start_ - end))
