"""Every method on every backbone: found by import, run at toy size."""

from __future__ import annotations

import copy

import pytest
import torch

from conftest import method_recipe, rungs, some_state
from stepladder.backbones import backbones
from stepladder.errors import UserError
from stepladder.ladder import build_ladder, spaced_timesteps
from stepladder.methods import methods
from stepladder.processes import spread
from stepladder.roles import FAKE_SCORE, STUDENT, CopyRoles
from stepladder.samplers import Sampler, sample
from stepladder.training.trainer import Run, learning, train_update

PAIRS = [(method, backbone) for method in sorted(methods()) for backbone in sorted(backbones())]


def start(tmp_path, method, backbone, **changes):
    model = backbones()[backbone].tiny()
    recipe = method_recipe(method, model, tmp_path)
    for name, value in changes.items():
        setattr(recipe.roles, name, value)
    return Run.start(recipe, model)


def test_methods_and_backbones_are_found():
    assert "rmd" in methods()
    assert set(backbones()) == {"flux", "pixart", "sd3", "sdxl", "wan", "z_image"}


@pytest.mark.parametrize("name", sorted(backbones()))
def test_predictions_rebuild_the_state(name, generator):
    backbone = backbones()[name].tiny()
    x = some_state(backbone, generator)
    t = torch.tensor([900.0, 300.0])
    with torch.no_grad():
        prediction = backbone.denoise(backbone.network, x, t, backbone.encode(["one", "two"]))
    rebuilt = spread(backbone.process.alpha(t), x) * prediction.x0 + spread(backbone.process.sigma(t), x) * prediction.eps
    torch.testing.assert_close(rebuilt, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("method", "backbone"), PAIRS)
def test_gradient_belongs_to_one_role_at_a_time(tmp_path, method, backbone):
    run = start(tmp_path, method, backbone)
    batch = run.batch(0)
    sample_ = run.method.roll_out(run.roles, batch, 5, run.generator)
    fake = run.method.fake_score_loss(run.roles, sample_, batch, run.generator)
    fake.backward()
    assert fake.isfinite()
    assert all(p.grad is None for p in run.roles.parameters(STUDENT).values())
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in run.roles.parameters(FAKE_SCORE).values())
    run.optimizers[FAKE_SCORE].step()
    run.optimizers[FAKE_SCORE].zero_grad()
    loss = run.method.student_loss(run.roles, sample_, batch, run.generator)
    loss.backward(inputs=learning(run.roles, run.method, STUDENT))
    assert loss.isfinite()
    assert all(p.grad is None for p in run.roles.parameters(FAKE_SCORE).values())
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in run.roles.parameters(STUDENT).values())
    assert all(p.grad is None for name, p in run.backbone.network.named_parameters() if "lora_" not in name)


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


@pytest.mark.parametrize("name", sorted(backbones()))
def test_predictions_depend_on_prompt_time_and_sample_alone(name, generator):
    backbone = backbones()[name].tiny()
    x, t = some_state(backbone, generator), torch.tensor([900.0, 300.0])
    conditioning = backbone.encode(["a red circle", "two"])
    with torch.no_grad():
        both = backbone.denoise(backbone.network, x, t, conditioning)
        alone = backbone.denoise(backbone.network, x[1:], t[1:], conditioning.rows([1]))
        other = backbone.denoise(backbone.network, x, t, conditioning.rows([1, 0]))
        later = backbone.denoise(backbone.network, x, t - 200, conditioning)
    torch.testing.assert_close(both.x0[1:], alone.x0, rtol=1e-3, atol=1e-4)
    assert (other.x0 - both.x0).abs().max() > 1e-3
    assert (later.eps - both.eps).abs().max() > 1e-3


@pytest.mark.parametrize("name", sorted(backbones()))
def test_the_middle_blocks_features_have_one_row_a_token_and_a_graph(name, generator):
    backbone = backbones()[name].tiny()
    x = some_state(backbone, generator).requires_grad_(True)
    features = backbone.features(backbone.network, x, torch.tensor([900.0, 300.0]), backbone.encode(["one", "two"]))
    assert features.ndim == 3
    assert len(features) == 2
    features.square().sum().backward()
    assert x.grad.abs().max() > 0


@pytest.mark.parametrize("name", sorted(backbones()))
def test_sizes_there_and_back(name):
    backbone = backbones()[name].tiny()
    for size in rungs(backbone, (16, 32), (64, 48)):
        assert backbone.pixel_size(backbone.latent_size(size)) == size
    for wrong in rungs(backbone, (17, 32), (0, 16)):
        with pytest.raises(UserError, match="cannot be divided"):
            backbone.latent_size(wrong)


@pytest.mark.parametrize("name", sorted(backbones()))
def test_blank_conditioning_has_the_shapes_of_real_one(name):
    backbone = backbones()[name].tiny()
    real, blank = backbone.encode(["a", "b"]).tensors, backbone.blank_conditioning(2, "cpu").tensors
    for key, tensor in blank.items():
        assert tensor.shape == real[key].shape, key


@pytest.mark.parametrize("name", sorted(backbones()))
def test_teachers_begin_at_noise_and_fall(name):
    timesteps = backbones()[name].tiny().teacher_timesteps(6)
    assert timesteps[0] >= 998
    assert all(before > after > 0 for before, after in zip(timesteps, timesteps[1:], strict=False))


@pytest.mark.parametrize("name", sorted(backbones()))
def test_text_encoders_and_vae_can_be_dropped(name):
    backbone = backbones()[name].tiny()
    conditioning = backbone.encode(["a"])
    backbone.drop_text_encoders()
    assert backbone.text_encoders == []
    latents = torch.zeros(1, backbone.latent_channels, *backbone.latent_size(rungs(backbone, (32, 32))[0]))
    backbone.denoise(backbone.network, latents, torch.tensor([500.0]), conditioning)
    backbone.decode(latents)
    backbone.drop_vae()
    with pytest.raises(UserError, match="VAE was dropped"):
        backbone.decode(latents)


@pytest.mark.parametrize("backbone", sorted(backbones()))
@pytest.mark.parametrize(
    ("sizes", "thresholds"),
    [
        ([(16, 16), (32, 32)], [-2.5]),
        ([(16, 32), (32, 64)], [-2.5]),
        ([(16, 16), (32, 32), (64, 64)], [-2.5, -0.5]),
    ],
)
def test_cascades_of_two_and_three_rungs_also_oblong(backbone, sizes, thresholds):
    model = backbones()[backbone].tiny()
    sizes = rungs(model, *sizes)
    ladder = build_ladder(model.process, spaced_timesteps(4), [model.latent_size(size) for size in sizes], thresholds)
    sampler = Sampler(CopyRoles(model).student, ladder, 1.0, {"mix": 0.2})
    conditioning = model.encode(["a", "b"], sizes[-1])
    latents = sample(sampler, model, conditioning, model.unconditional(), [3, 4], precision="fp32")
    assert tuple(latents.shape[2:]) == model.latent_size(sizes[-1])
    assert model.decode(latents).shape[2:] == sizes[-1]
    alone = sample(sampler, model, conditioning.rows([1]), model.unconditional(), [4], precision="fp32")
    torch.testing.assert_close(latents[1:], alone, rtol=1e-3, atol=1e-3 * latents.abs().max().item())


def test_video_may_grow_in_time_too():
    model = backbones()["wan"].tiny()
    latents = [model.latent_size(size) for size in ((5, 16, 16), (9, 32, 32))]
    ladder = build_ladder(model.process, spaced_timesteps(4), latents, [-2.5])
    sampler = Sampler(CopyRoles(model).student, ladder, 1.0, {"mix": 0.2})
    drawn = sample(sampler, model, model.encode(["a"]), model.unconditional(), [3], precision="fp32")
    assert model.decode(drawn).shape[2:] == (9, 32, 32)


@pytest.mark.parametrize("backbone", sorted(backbones()))
def test_guidance_is_two_passes_or_embedded(backbone, generator):
    model = backbones()[backbone].tiny()
    role = CopyRoles(model).teacher
    x, t = some_state(model, generator, 1), torch.tensor(800.0)
    conditioning, unconditional = model.encode(["a red circle"]), model.unconditional("blue")
    with torch.no_grad():
        guided, plain, empty = (
            role.guided(x, t, conditioning, unconditional, 4.0),
            role(x, t, conditioning),
            role(x, t, unconditional),
        )
    if model.embeds_guidance:
        assert role.passes(4.0) == 1
        assert (guided.x0 - plain.x0).abs().max() > 1e-4
    else:
        assert role.passes(4.0) == 2
        expected = empty.x0 + 4 * (plain.x0 - empty.x0)
        torch.testing.assert_close(guided.x0, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


@pytest.mark.parametrize("backbone", sorted(backbones()))
def test_the_roll_out_goes_no_further_than_the_sampled_step(tmp_path, backbone):
    run = start(tmp_path, "rmd", backbone)
    calls = []
    inner = run.roles.student.backbone.denoise
    run.roles.student.backbone.denoise = lambda network, x, t, c, g: calls.append(t[0].item()) or inner(network, x, t, c, g)
    for update in range(12):
        calls.clear()
        run.method.roll_out(run.roles, run.batch(update), 99, run.generator)
        expected = [step.timestep for step in run.ladder.steps[: len(calls)]]
        assert calls == pytest.approx(expected)


def test_warm_up_keeps_to_the_noisy_half(tmp_path):
    run = start(tmp_path, "rmd", "sd3")
    run.method.config.warmup_steps = 10
    stages = {run.method.roll_out(run.roles, run.batch(0), update, run.generator).stage for update in range(10)}
    assert stages == {0}
    stages = {run.method.roll_out(run.roles, run.batch(0), 10, run.generator).stage for _ in range(20)}
    assert stages == {0, 1}


def test_timesteps_are_uniform_over_the_stages_interval(tmp_path):
    run = start(tmp_path, "rmd", "sd3")
    seen = {0: [], 1: []}
    for _ in range(60):
        sample_ = run.method.roll_out(run.roles, run.batch(0), 99, run.generator)
        seen[sample_.stage] += sample_.timestep.tolist()
    for stage, values in seen.items():
        start_, end = run.ladder.boundaries[stage], run.ladder.boundaries[stage + 1]
        assert all(end <= value <= start_ for value in values)
        assert sum(values) / len(values) == pytest.approx((start_ + end) / 2, abs=0.2 * (start_ - end))
