"""DMD2, TDM and SwD against the formulas of notes.md section 7: by hand, on analytic Gaussians, and against diffusers."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import FlowMatchLCMScheduler

from conftest import method_recipe
from stepladder.backbones import backbones
from stepladder.errors import UserError
from stepladder.ladder import PRESETS, build_ladder, full_resolution
from stepladder.losses.adversarial import Discriminator, discriminator_loss, generator_loss
from stepladder.losses.discrepancy import pooled, squared_mmd
from stepladder.losses.matching import importance_weight, normalised_matching_loss, trajectory_matching_loss
from stepladder.methods import methods
from stepladder.methods.base import Setting
from stepladder.methods.cold_start import ColdStart, biased
from stepladder.methods.swd import GRID
from stepladder.methods.terms import noised_alike
from stepladder.prediction import Prediction
from stepladder.processes import FlowProcess, VariancePreservingProcess
from stepladder.renoise import combine, mixed_noise, renoise
from stepladder.roles import FAKE_SCORE, STUDENT
from stepladder.sampling import cascade, derived_generators
from stepladder.scheduler import LadderScheduler
from stepladder.training.recipe import parse_recipe
from stepladder.training.trainer import Run, train_update

FLOW = FlowProcess()


def column(*values: float) -> torch.Tensor:
    """One sample a value, each of two equal elements."""
    return torch.tensor(values)[:, None, None, None].expand(-1, 1, 1, 2).contiguous()


def test_the_students_gradient_is_g_over_w_by_hand():
    x0 = column(1.0, 4.0).requires_grad_(True)
    fake, real = column(3.0, 2.0), column(0.0, 3.0)
    loss = normalised_matching_loss(x0, fake, real)
    # g = (3, -1), w = (1, 1); the loss is half g² / w², its gradient g / w over two elements
    assert loss.tolist() == pytest.approx([4.5, 0.5])
    loss.sum().backward()
    torch.testing.assert_close(x0.grad, column(1.5, -0.5))


def test_the_gradient_does_not_grow_with_how_far_the_teacher_is():
    for distance in (0.1, 1.0, 10.0):
        x0 = column(0.0).requires_grad_(True)
        normalised_matching_loss(x0, column(0.0), column(-distance)).sum().backward()
        torch.testing.assert_close(x0.grad, column(0.5))


def test_tdms_loss_is_an_elementwise_pseudo_huber_over_w_by_hand():
    x0 = torch.tensor([[[[1.0, 1.0]]]], requires_grad=True)
    fake, real = torch.tensor([[[[3.0, 1.0]]]]), torch.tensor([[[[0.0, 3.0]]]])
    c = 1e-3
    # g = (3, -2), w = mean(|1 - 0|, |1 - 3|) = 1.5
    expected = (math.sqrt(9 + c * c) - c + math.sqrt(4 + c * c) - c) / 2 / 1.5
    loss = trajectory_matching_loss(x0, fake, real, c)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    loss.sum().backward()
    torch.testing.assert_close(x0.grad, torch.tensor([[[[0.5, -0.5]]]]) / 1.5, rtol=1e-5, atol=1e-6)


def test_importance_weight_by_hand():
    mixed, fresh = column(1.0, 2.0), column(2.0, 1.0)
    assert importance_weight(mixed, fresh).tolist() == pytest.approx([math.exp(1.5), math.exp(-1.5)])


@pytest.mark.parametrize("loss", [normalised_matching_loss, trajectory_matching_loss])
@pytest.mark.parametrize("start", [-1.0, 2.0])
def test_a_students_mean_descends_to_the_teachers(loss, start):
    """x0 of student and teacher are Gaussian with means m and 1; both scores' posterior means are known in closed form."""
    alpha, sigma, spread, goal = 0.4, 0.6, 0.3, 1.0
    mean = torch.tensor(start, requires_grad=True)
    optimizer = torch.optim.SGD([mean], lr=0.02)
    draw = torch.Generator().manual_seed(0)
    gain = alpha * spread**2 / (alpha**2 * spread**2 + sigma**2)
    for _ in range(800):
        x0 = mean + spread * torch.randn(64, 1, 2, 2, generator=draw)
        x = (alpha * x0 + sigma * torch.randn(64, 1, 2, 2, generator=draw)).detach()
        fake = mean.detach() + gain * (x - alpha * mean.detach())
        real = goal + gain * (x - alpha * goal)
        optimizer.zero_grad()
        loss(x0, fake, real).mean().backward()
        optimizer.step()
    assert mean.item() == pytest.approx(goal, abs=0.1)


def method_of(name, ladder, process=FLOW, **settings):
    config = methods()[name].Config.model_validate({"name": name, **settings})
    return methods()[name](config, Setting(ladder, process, 1, 8))


@pytest.mark.parametrize("process", [FLOW, VariancePreservingProcess.linear()])
def test_tdm_renoises_as_the_forward_process_from_the_segments_end(process):
    """x_t = alpha_t x0 + sigma_t (mix eps + …) has the mean and the variance of q(x_t | x_s), x_s on the student's ODE."""
    ladder = build_ladder(process, (1000.0, 750.0, 500.0, 250.0), [(2, 2)])
    method, step = method_of("tdm", ladder, process), ladder.steps[1]
    t = torch.tensor([700.0, 550.0], dtype=torch.float64)
    mix = method.kept_share(step, t)
    x0, eps = torch.tensor(0.7), torch.tensor(-1.3)
    alpha_t, sigma_t = process.alpha(t), process.sigma(t)
    s = torch.tensor(step.end, dtype=torch.float64)
    x_s = process.alpha(s) * x0 + process.sigma(s) * eps
    ratio = alpha_t / process.alpha(s)
    torch.testing.assert_close(alpha_t * x0 + sigma_t * mix * eps, ratio * x_s)
    torch.testing.assert_close(sigma_t**2 * (1 - mix**2), sigma_t**2 - ratio**2 * process.sigma(s) ** 2)


def test_tdms_last_segment_ends_at_the_image_and_keeps_no_noise():
    ladder = full_resolution((1000.0, 500.0), (2, 2))
    assert method_of("tdm", ladder).kept_share(ladder.steps[1], torch.tensor([100.0, 400.0])).tolist() == [0.0, 0.0]


def test_mixed_noise_says_what_is_fresh(generator):
    eps = torch.randn(3, 1, 4, 4, generator=generator)
    mix = torch.tensor([0.0, 0.6, 1.0])
    mixed, fresh = mixed_noise(eps, (4, 4), mix, generator)
    torch.testing.assert_close(mixed[0], fresh[0])
    torch.testing.assert_close(mixed[1], 0.6 * eps[1] + 0.8 * fresh[1])
    torch.testing.assert_close(mixed[2], eps[2])


def rolled_out(name, backbone, tmp_path, count, **settings):
    run = Run.start(method_recipe(name, backbone, tmp_path, settings), backbone)
    return run, [run.method.roll_out(run.roles, run.batch(update), 99, run.generator) for update in range(count)]


def test_dmd2_renoises_between_2_and_98_percent_whatever_the_step(tmp_path):
    _, samples = rolled_out("dmd2", backbones()["sd3"].tiny(), tmp_path, 60)
    times = torch.cat([sample.timestep for sample in samples])
    assert times.min() >= 20
    assert times.max() <= 980
    assert times.mean() == pytest.approx(500, abs=100)
    assert {sample.stage for sample in samples} == {0, 1}


def test_tdm_stays_inside_the_sampled_segment(tmp_path):
    run, samples = rolled_out("tdm", backbones()["sd3"].tiny(), tmp_path, 60)
    segments = [(step.end, step.timestep) for step in run.ladder.steps]
    for sample in samples:
        inside = [
            (low, high) for low, high in segments if max(low, 20) <= sample.timestep.min() and sample.timestep.max() <= high - 10
        ]
        assert inside
        assert sample.x0.shape[2:] == run.ladder.steps[run.ladder.steps_of(sample.stage)[0]].size


def test_swd_renoises_to_the_grids_cleaner_part(tmp_path):
    _, samples = rolled_out("swd", backbones()["sd3"].tiny(), tmp_path, 40)
    assert GRID[12] == pytest.approx(800)
    assert {round(t, 2) for sample in samples for t in sample.timestep.tolist()} <= {round(t, 2) for t in GRID[12:]}


def test_swds_student_starts_from_the_lower_scale_enlarged_and_noised(tmp_path):
    backbone = backbones()["sd3"].tiny()
    run = Run.start(method_recipe("swd", backbone, tmp_path), backbone)
    seen = []
    inner = backbone.denoise
    backbone.denoise = lambda network, x, t, c, g=None: seen.append((x, t[0].item())) or inner(network, x, t, c, g)
    for update in range(12):
        seen.clear()
        batch, state = run.batch(update), run.generator.get_state()
        run.method.roll_out(run.roles, batch, 99, run.generator)
        replay = torch.Generator()
        replay.set_state(state)
        index = int(torch.randint(len(run.ladder.steps), (), generator=replay))
        step, before = run.ladder.steps[index], run.ladder.steps[max(0, index - 1)]
        low = batch.real(before.size)
        clock = torch.tensor(step.timestep)
        expected = renoise(FLOW, Prediction(low, torch.zeros_like(low)), clock, step.size, 0.0, replay, "bicubic")
        assert seen[0][1] == pytest.approx(step.timestep)
        torch.testing.assert_close(seen[0][0], expected)


def test_dmd2s_fake_score_learns_noise_or_velocity_and_swds_the_image(tmp_path):
    """With a role that answers nothing, the losses are the mean squares of what each should have said."""
    for name, kind in (("dmd2", "sd3"), ("dmd2", "sdxl"), ("swd", "sd3")):
        backbone, folder = backbones()[kind].tiny(), f"{name}-{kind}"
        run, (sample,) = rolled_out(name, backbone, tmp_path / folder, 1) if (tmp_path / folder).mkdir() is None else None
        states = []

        class Known:
            def fake_score(self, x, t, conditioning, states=states):
                states.append((x, t))
                return Prediction(torch.zeros_like(x), torch.zeros_like(x))

        loss = run.method.fake_score_matching(Known(), sample, torch.Generator().manual_seed(1))
        x, t = states[0]
        alpha, sigma = (part(t)[:, None, None, None] for part in (backbone.process.alpha, backbone.process.sigma))
        noise = (x - alpha * sample.x0) / sigma
        wanted = sample.x0 if name == "swd" else noise - sample.x0 if kind == "sd3" else noise
        assert loss.item() == pytest.approx(wanted.square().mean().item(), rel=1e-3)


def test_gan_losses_by_hand_and_their_direction():
    real, fake = torch.tensor([2.0]), torch.tensor([-1.0])
    assert discriminator_loss(real, fake).item() == pytest.approx(math.log1p(math.exp(-2)) + math.log1p(math.exp(-1)))
    assert generator_loss(fake).item() == pytest.approx(math.log1p(math.exp(1)))
    head = Discriminator(8)
    assert head(torch.randn(3, 5, 8)).shape == (3,)


def test_the_linear_kernels_mmd_is_the_distance_of_token_means():
    draw = torch.Generator().manual_seed(0)
    real, fake = torch.randn(2, 6, 4, generator=draw), torch.randn(2, 6, 4, generator=draw)

    def mean_kernel(a, b):
        return torch.einsum("nid,njd->nij", a, b).mean((1, 2))

    expected = mean_kernel(real, real) + mean_kernel(fake, fake) - 2 * mean_kernel(real, fake)
    torch.testing.assert_close(squared_mmd(real, fake), expected / 4)


def test_the_rbf_kernels_mmd_is_unbiased_and_sees_more_than_means():
    draw = torch.Generator().manual_seed(0)
    same = [
        squared_mmd(torch.randn(1, 40, 3, generator=draw), torch.randn(1, 40, 3, generator=draw), "rbf", 1.0) for _ in range(200)
    ]
    assert torch.stack(same).mean().item() == pytest.approx(0.0, abs=2e-3)
    # of two tokens each, by hand: own pairs leave out the diagonal
    real, fake = torch.tensor([[[0.0], [1.0]]]), torch.tensor([[[0.0], [3.0]]])
    k = lambda distance: math.exp(-distance * distance / 2)
    expected = k(1) + k(3) - 2 * (k(0) + k(3) + k(1) + k(2)) / 4
    assert squared_mmd(real, fake, "rbf", 1.0).item() == pytest.approx(expected, rel=1e-5)
    wide = 3 * torch.randn(1, 400, 3, generator=draw)
    wide, narrow = wide - wide.mean(1, keepdim=True), torch.randn(1, 400, 3, generator=draw)
    narrow = narrow - narrow.mean(1, keepdim=True)
    assert squared_mmd(wide, narrow).item() == pytest.approx(0.0, abs=1e-6)
    assert squared_mmd(wide, narrow, "rbf", 1.0).item() > 0.015
    # a bandwidth far beyond the distances makes it the linear kernel
    moved = narrow + 2.0
    assert squared_mmd(narrow, moved, "rbf", 300.0).item() == pytest.approx(squared_mmd(narrow, moved).item(), rel=0.02)


def test_pooling_over_the_batch_forgets_which_image_is_which():
    features = torch.randn(2, 3, 4)
    other = features.flip(0)
    assert squared_mmd(features, other).mean() > 0.01
    assert squared_mmd(pooled(features), pooled(other)).item() == pytest.approx(0.0, abs=1e-10)


def test_real_and_generated_images_get_the_same_noise(generator):
    a, b = torch.zeros(4, 1, 3, 3), torch.ones(4, 1, 3, 3)
    (x, y), t = noised_alike(FLOW, [a, b], (0.0, 600.0), generator)
    assert t.max() <= 600
    torch.testing.assert_close(y - x, FLOW.alpha(t)[:, None, None, None].expand_as(a))
    (x, y), t = noised_alike(FLOW, [a, b], (0.0, 0.0), generator)
    assert torch.equal(x, a)


@pytest.mark.parametrize("base", ["rmd", "dmd2", "tdm"])
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_any_method_takes_a_gan_and_mmd(tmp_path, base, mode):
    backbone = backbones()["sd3"].tiny()
    recipe = method_recipe(base, backbone, tmp_path, {"gan": {}, "mmd": {"kernel": "rbf", "bandwidth": 2.0}})
    recipe.roles.mode = mode
    run = Run.start(recipe, backbone)
    head = {name: p.detach().clone() for name, p in run.method.head.named_parameters()}
    for _ in range(2):
        train_update(run)
    assert any(not torch.equal(p, head[name]) for name, p in run.method.head.named_parameters())


def test_the_students_adversarial_loss_teaches_neither_fake_score_nor_head(tmp_path):
    backbone = backbones()["sd3"].tiny()
    recipe = method_recipe("tdm", backbone, tmp_path, {"gan": {"weight": 1.0}, "matching_weight": 1.0})
    recipe.roles.gradient_checkpointing = True
    run = Run.start(recipe, backbone)
    run.optimizers[FAKE_SCORE].param_groups[0]["lr"] = 0.0
    before = {name: p.detach().clone() for name, p in run.roles.parameters(FAKE_SCORE).items()}
    student = {name: p.detach().clone() for name, p in run.roles.parameters(STUDENT).items()}
    train_update(run)
    assert all(torch.equal(p, before[name]) for name, p in run.roles.parameters(FAKE_SCORE).items())
    assert all(p.grad is None for p in [*run.roles.parameters(FAKE_SCORE).values(), *run.method.head.parameters()])
    assert any(not torch.equal(p, student[name]) for name, p in run.roles.parameters(STUDENT).items())


def test_the_gan_moves_the_student_towards_what_the_head_takes_for_real(tmp_path):
    """Nothing but the GAN term: with a fixed head the student's logit rises."""
    backbone = backbones()["sd3"].tiny()
    settings = {"gan": {"weight": 1.0}, "matching_weight": 0.0, "fake_updates": 1}
    run = Run.start(method_recipe("dmd2", backbone, tmp_path, settings), backbone)
    run.optimizers[FAKE_SCORE].param_groups[0]["lr"] = 0.0
    losses = [train_update(run)["student_loss"] for _ in range(40)]
    assert sum(losses[-8:]) / 8 < sum(losses[:8]) / 8 - 0.01


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_mmd_alone_trains_no_fake_score(tmp_path, mode):
    backbone = backbones()["sd3"].tiny()
    recipe = method_recipe("swd", backbone, tmp_path, {"matching_weight": 0.0, "gan": None})
    recipe.roles.mode = mode
    run = Run.start(recipe, backbone)
    assert set(run.optimizers) == {STUDENT}
    assert run.roles.parameters(FAKE_SCORE) == {}
    figures = train_update(run)
    assert "fake_score_loss" not in figures
    assert figures["student_grad_norm"] > 0


def test_mixes_that_mean_nothing_are_refused(tmp_path):
    tree = method_recipe("rmd", backbones()["sd3"].tiny(), tmp_path).model_dump(mode="json")

    def refused(words, **sections):
        with pytest.raises(UserError, match=words):
            parse_recipe({**tree, **sections})

    refused("needs images.*synthesize", method={"name": "swd"})
    refused("needs images.*synthesize", method={"name": "rmd", "mmd": {}})
    refused("nothing would be learned", method={"name": "rmd", "matching_weight": 0})
    refused("give prompts, a text file, or images", data={})
    refused("images bring their own prompts", data={**tree["data"], "images": "here"})
    refused("unknown preset 'sdx'", ladder={"preset": "sdx", "sizes": [[16, 16]]})
    refused("unknown key method.alpha", method={"name": "tdm", "alpha": 0.2})
    recipe = parse_recipe({**tree, "ladder": {**tree["ladder"], "allocation": [2, 2]}})
    with pytest.raises(UserError, match="not by both"):
        recipe.ladder.build(backbones()["sd3"].tiny())


def test_rmd_climbs_swds_scales_one_step_each(tmp_path):
    """K = N: as many resolutions as steps."""
    backbone = backbones()["sd3"].tiny()
    recipe = method_recipe("rmd", backbone, tmp_path, {"warmup_steps": 2})
    recipe.ladder.sizes, recipe.ladder.thresholds = [(16, 16), (24, 24), (32, 32), (40, 40)], []
    recipe.ladder.allocation = [1, 1, 1, 1]
    run = Run.start(recipe, backbone)
    assert run.ladder.allocation() == "1+1+1+1"
    assert run.ladder.boundaries == (1000.0, *[step.teacher_timestep for step in run.ladder.steps[1:]], 0.0)
    stages = {train_update(run)["stage"] for _ in range(12)}
    assert len(stages) >= 3


@pytest.mark.parametrize("name", ["swd-sd35-medium", "swd-sd35-large", "swd-flux", "swd-wan-1.3b"])
def test_swds_schedules_are_the_papers(name):
    preset = PRESETS[name]
    sizes = {
        "swd-sd35-medium": [32, 48, 64, 80, 96, 128],
        "swd-sd35-large": [64, 80, 96, 128],
        "swd-flux": [32, 64, 96, 128],
        "swd-wan-1.3b": [20, 30, 40, 60],
    }[name]
    latents = [(*(((size[0] - 1) // 4 + 1,) if len(size) == 3 else ()), size[-2] // 8, size[-1] // 8) for size in preset.sizes]
    assert [latent[-2] for latent in latents] == sizes
    if "wan" in name:
        assert latents == [(6, 20, 34), (11, 30, 52), (16, 40, 70), (21, 60, 104)]
    ladder = build_ladder(
        FLOW, preset.teacher_timesteps(), latents, preset.thresholds, preset.shift, preset.boundary, preset.allocation
    )
    assert ladder.allocation() == "+".join("1" * len(sizes))
    assert [step.timestep for step in ladder.steps] == list(preset.timesteps)


def test_the_ladder_scheduler_agrees_with_diffusers_flow_match_lcm_scheduler(generator):
    sigmas, sides = [1.0, 0.8959, 0.7371, 0.6022], [16, 20, 24, 32]
    theirs = FlowMatchLCMScheduler(shift=1.0, scale_factors=[side / sides[0] for side in sides[1:]], upscale_mode="bicubic")
    theirs.set_timesteps(sigmas=sigmas, device="cpu")
    ladder = build_ladder(FLOW, [1000 * s for s in sigmas], [(s, s) for s in sides], shift="none", allocation=[1, 1, 1, 1])
    ours = LadderScheduler.of(ladder, FLOW, mix=0.0, mix_within=0.0, mode="bicubic")
    ours.set_timesteps(4)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps)
    noise = torch.randn(2, 4, 16, 16, generator=generator)
    # the same noise: their scheduler is handed the generators that ours derives from the first state
    generators = derived_generators(noise)
    mine, other = noise, noise
    for t in theirs.timesteps:
        output = torch.sin(3 * other) + other.mean()
        mine = ours.step(torch.sin(3 * mine) + mine.mean(), t, mine).prev_sample
        other = theirs.step(output, t, other, generator=generators).prev_sample
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    assert mine.shape[-1] == 32


def test_stochastic_multistep_is_the_cascade_without_kept_noise(generator):
    """With a perfect denoiser every step's state is alpha_t x0 + sigma_t xi, xi fresh."""
    ladder = full_resolution((1000.0, 600.0, 300.0), (8, 8))
    x0 = torch.full((1, 1, 8, 8), 0.5)
    seen = []

    def denoise(x, t):
        seen.append(x)
        return Prediction(x0, torch.full_like(x, 7.0))

    noise = torch.randn(1, 1, 8, 8, generator=generator)
    state = generator.get_state()
    cascade(denoise, FLOW, ladder, noise, generator, mix=0.0, mix_within=0.0)
    generator.set_state(state)
    for t, x in zip((600.0, 300.0), seen[1:], strict=True):
        expected = combine(FLOW, x0, torch.randn(1, 1, 8, 8, generator=generator), torch.tensor(t))
        torch.testing.assert_close(x, expected)


def test_renoise_times_are_biased_to_high_noise_and_become_uniform(generator):
    cold = ColdStart(updates=100, renoise_bias=3.0)
    assert [cold.renoise_bias_at(update) for update in (0, 50, 100, 500)] == [3.0, 2.0, 1.0, 1.0]
    assert ColdStart(updates=100, renoise_bias=3.0, renoise_bias_dynamic=False).renoise_bias_at(500) == 3.0
    # the mean of density b u^(b - 1) is b / (b + 1)
    assert biased(3.0, 20000, generator).mean().item() == pytest.approx(0.75, abs=0.01)
    assert biased(1.0, 20000, generator).mean().item() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("name", sorted(methods()))
def test_a_cold_start_biases_every_method_within_its_own_interval(tmp_path, name):
    cold = {"updates": 10**6, "renoise_bias": 8.0, "real_scale": 0.0}
    means = []
    for settings in ({}, {"cold_start": cold}):
        folder = tmp_path / str(len(means))
        folder.mkdir()
        _, samples = rolled_out(name, backbones()["sd3"].tiny(), folder, 16, **settings)
        means.append(torch.cat([sample.timestep for sample in samples]).mean().item())
    assert means[1] > means[0] + 30


def test_the_leaning_real_score_is_the_base_plus_a_share_of_the_fake_scores_adapter(tmp_path, generator):
    backbone = backbones()["sd3"].tiny()
    run = Run.start(method_recipe("dmd2", backbone, tmp_path), backbone)
    for _ in range(3):
        train_update(run)
    x, t = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor(600.0)
    conditioning = run.batch(0).conditioning
    with torch.no_grad():
        teacher, fake = run.roles.teacher(x, t, conditioning).x0, run.roles.fake_score(x, t, conditioning).x0
        leaning = run.roles.real_score(0.5)(x, t, conditioning).x0
        assert torch.equal(run.roles.real_score(0.0)(x, t, conditioning).x0, teacher)
        torch.testing.assert_close(run.roles.real_score(1.0)(x, t, conditioning).x0, fake)
        # the same network with the adapter's second matrix halved
        for name, parameter in run.roles.parameters(FAKE_SCORE).items():
            if "lora_B" in name:
                parameter.mul_(0.5)
        torch.testing.assert_close(run.roles.fake_score(x, t, conditioning).x0, leaning)
    assert not torch.allclose(leaning, teacher)
    assert not torch.allclose(leaning, fake)


def test_dyna_dg_falls_to_the_teacher_and_needs_adapters(tmp_path):
    cold = ColdStart(updates=10, real_scale=0.4)
    assert [cold.real_scale_at(update) for update in (0, 5, 10)] == pytest.approx([0.4, 0.2, 0.0])
    backbone = backbones()["sd3"].tiny()
    recipe = method_recipe("dmd2", backbone, tmp_path, {"cold_start": {"updates": 1, "real_scale": 0.4}})
    run = Run.start(recipe, backbone)
    asked = []
    inner = run.roles.real_score
    run.roles.real_score = lambda scale: asked.append(scale) or inner(scale)
    train_update(run)
    train_update(run)
    assert asked == pytest.approx([0.4, 0.0])
    recipe.roles.mode = "full"
    with pytest.raises(UserError, match=r"roles\.mode to lora"):
        train_update(Run.start(recipe, backbones()["sd3"].tiny()))
