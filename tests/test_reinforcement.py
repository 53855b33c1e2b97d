"""Reinforcement learning: losses by hand and in closed form, terms that raise the reward, and what they leave alone."""

from __future__ import annotations

import math

import diffusers
import pytest
import torch

from conftest import method_recipe
from stepladder.backbones import backbones
from stepladder.conditioning import Conditioning
from stepladder.errors import UserError
from stepladder.ladder import build_ladder, full_resolution
from stepladder.losses.reinforcement import dpo_loss, group_advantages, grpo_loss, log_probability, refl_loss
from stepladder.methods.reinforcement import RLTerm, dpo_term, grpo_term, transition
from stepladder.methods.terms import Ground
from stepladder.prediction import Prediction
from stepladder.processes import FlowProcess
from stepladder.renoise import renoise
from stepladder.roles import FAKE_SCORE, REFERENCE, STUDENT
from stepladder.training.rewarding import Rewarder, cropped
from stepladder.training.trainer import Run, backward_both, begin, latest_state, train, train_update

FLOW = FlowProcess()
BRIGHT = {"name": "function", "function": "test_reinforcement:brightness", "differentiable": True}


def brightness(images, prompts):
    return images.clamp(-1, 1).mean((1, 2, 3))


def test_refl_and_dpo_by_hand():
    assert refl_loss(torch.tensor([1.0, 3.0])).item() == -2.0
    errors = [torch.tensor([value]) for value in (0.5, 0.9, 0.6, 0.7)]
    # margin (0.5 - 0.6) - (0.9 - 0.7) = -0.3
    assert dpo_loss(*errors, beta=10.0).item() == pytest.approx(math.log1p(math.exp(-3.0)))


def test_dpo_of_the_reference_itself_is_log_two_and_pulls_towards_the_chosen():
    chosen, rejected = torch.tensor([0.4], requires_grad=True), torch.tensor([0.8], requires_grad=True)
    loss = dpo_loss(chosen, rejected, chosen.detach(), rejected.detach(), beta=5.0)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert chosen.grad.item() == pytest.approx(2.5)
    assert rejected.grad.item() == pytest.approx(-2.5)


def test_advantages_are_normalised_in_their_group():
    advantages = group_advantages(torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]]))
    assert advantages[0].tolist() == pytest.approx([-math.sqrt(1.5), 0.0, math.sqrt(1.5)], rel=1e-4)
    assert advantages[1].tolist() == [0.0, 0.0, 0.0]


def test_log_probability_is_the_normal_distributions(generator):
    x, mean = torch.randn(3, 2, 4, 4, generator=generator), torch.randn(3, 2, 4, 4, generator=generator)
    expected = torch.distributions.Normal(mean, 0.3).log_prob(x).flatten(1).mean(1)
    torch.testing.assert_close(log_probability(x, mean, torch.tensor(0.3)), expected)


def test_grpo_clips_ratios_by_hand():
    old = torch.zeros(4)
    new = torch.log(torch.tensor([1.5, 0.5, 1.5, 0.5]))
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0])
    # min(1.5, 1.2), min(0.5, 0.8), min(-1.5, -1.2), min(-0.5, -0.8)
    assert grpo_loss(new, old, advantages, 0.2).item() == pytest.approx(-(1.2 + 0.5 - 1.5 - 0.8) / 4)


def test_on_policy_grpos_gradient_is_the_policy_gradient():
    new = torch.tensor([0.3, -0.2], requires_grad=True)
    grpo_loss(new, new.detach(), torch.tensor([2.0, -1.0]), 0.2).backward()
    assert new.grad.tolist() == pytest.approx([-1.0, 0.5])


@pytest.mark.parametrize("size", [(4, 4), (8, 8)])
def test_a_transitions_mean_and_deviation_are_those_of_the_samplers_renoise(size, generator):
    """Within a resolution and across one."""
    ladder = build_ladder(
        FLOW, (1000.0, 600.0), [(4, 4), size] if size != (4, 4) else [size], allocation=[1, 1] if size != (4, 4) else [2]
    )
    after = ladder.steps[1]
    prediction = Prediction(torch.randn(1, 1, 4, 4, generator=generator), torch.randn(1, 1, 4, 4, generator=generator))
    mean, deviation = transition(FLOW, prediction, after, 0.6, "bilinear")
    many = Prediction(*(value.expand(4000, -1, -1, -1) for value in (prediction.x0, prediction.eps)))
    drawn = renoise(FLOW, many, torch.tensor(after.timestep), size, 0.6, generator)
    torch.testing.assert_close(drawn.mean(0, keepdim=True), mean, rtol=0, atol=0.05)
    assert drawn.std(0).mean().item() == pytest.approx(deviation.item(), rel=0.02)


class Toy:
    """Roles of a student whose first step predicts `theta` and whose last keeps what it is given."""

    def __init__(self, theta, first):
        def student(x, t, conditioning):
            x0 = theta.expand_as(x) if float(t) == first else x
            return Prediction(x0, torch.zeros_like(x))

        self.student = student
        self.reference = lambda x, t, c: Prediction(torch.zeros_like(x), torch.zeros_like(x))


def test_grpo_moves_a_gaussian_policy_towards_the_reward():
    """The state after the first step is N(0.9 theta, …); the reward wants it at 0.5. No gradient passes the reward."""
    theta = torch.zeros(1, requires_grad=True)
    ladder = full_resolution((1000.0, 100.0), (2, 2))
    prompts = Conditioning({"c": torch.zeros(8, 1)})
    term = RLTerm(algorithm="grpo", rewards=[BRIGHT], group=8, exploration=0.0)
    optimizer, draw = torch.optim.SGD([theta], lr=0.02), torch.Generator().manual_seed(0)
    score = lambda latents: -(latents.mean((1, 2, 3)) - 0.5).square()
    for _ in range(150):
        optimizer.zero_grad()
        grpo_term(term, Ground(Toy(theta, 1000.0), FLOW, ladder, 1, prompts, draw), score, "bilinear", 1.0).backward()
        optimizer.step()
    assert theta.item() == pytest.approx(0.5 / 0.9, abs=0.15)


def test_dpo_ranks_pairs_and_noises_them_alike():
    """Errors of a reference that predicts nothing are those of the noise alone: the same for both images of a pair."""
    theta = torch.zeros(1, requires_grad=True)
    ladder = full_resolution((1000.0, 100.0), (2, 2))
    term, seen = RLTerm(algorithm="dpo", rewards=[BRIGHT]), []
    roles = Toy(theta, 1000.0)
    inner = roles.reference
    roles.reference = lambda x, t, c: seen.append(x) or inner(x, t, c)
    scores = lambda latents: latents.mean((1, 2, 3))
    prompts = Conditioning({"c": torch.zeros(4, 1)})
    dpo_term(term, Ground(roles, FLOW, ladder, 1, prompts, torch.Generator().manual_seed(3)), scores, {"mix_within": 0.0})
    chosen, rejected = seen[0].chunk(2)
    # the noise is the same, so what differs is (1 - sigma) times the images: the chosen ones are the brighter
    assert ((chosen - rejected).mean((1, 2, 3)) >= -1e-6).all()


def test_dpo_teaches_at_pure_noise_too_and_nothing_where_two_images_are_as_good():
    """On a flow an error of the noise is (1 - sigma) times that of the velocity, and so nothing at the first step."""
    ladder, term = full_resolution((1000.0,), (2, 2)), RLTerm(algorithm="dpo", rewards=[BRIGHT], beta=10.0)
    prompts, gradients = Conditioning({"c": torch.zeros(4, 1)}), []
    drawn = iter(torch.randn(2, 8, 1, 2, 2, generator=torch.Generator().manual_seed(2)))
    for score in (lambda latents: latents.mean((1, 2, 3)), lambda latents: torch.ones(len(latents))):
        theta = torch.zeros(1, requires_grad=True)
        roles, images = Toy(theta, 1000.0), next(drawn)
        student = roles.student
        # the pair is what the student draws without gradient; with it, it predicts theta
        roles.student = lambda x, t, c, student=student, images=images: (
            student(x, t, c) if torch.is_grad_enabled() else Prediction(images, torch.zeros_like(images))
        )
        draw = torch.Generator().manual_seed(3)
        dpo_term(term, Ground(roles, FLOW, ladder, 1, prompts, draw), score, {"mix_within": 0.0}).backward()
        gradients.append(theta.grad.item())
    assert abs(gradients[0]) > 0.1
    assert gradients[1] == pytest.approx(0.0, abs=1e-6)


def test_rewards_see_what_a_picture_can_hold(tmp_path):
    run = start(tmp_path, rl={"rewards": [BRIGHT]})
    seen = []
    rewarder = Rewarder(lambda latents: 3 * latents, lambda images, prompts: seen.append(images) or images.mean((1, 2, 3)))
    rewarder.scoring(["a"], run.generator)(torch.tensor([-1.0, 0.1, 1.0]).reshape(1, 3, 1, 1))
    assert seen[0].flatten().tolist() == pytest.approx([-1.0, 0.3, 1.0])


def start(tmp_path, method="dmd2", mode="lora", **settings):
    backbone = backbones()["sd3"].tiny()
    recipe = method_recipe(method, backbone, tmp_path, settings)
    recipe.roles.mode = mode
    return Run.start(recipe, backbone)


def test_refl_alone_raises_the_reward(tmp_path):
    run = start(tmp_path, matching_weight=0.0, rl={"rewards": [BRIGHT], "weight": 1.0})
    run.optimizers[STUDENT].param_groups[0]["lr"] = 2e-2
    losses = [train_update(run)["reinforcement_loss"] for _ in range(16)]
    assert set(run.optimizers) == {STUDENT}
    assert sum(losses[-4:]) < sum(losses[:4]) - 0.05


@pytest.mark.parametrize("algorithm", ["refl", "dpo", "grpo"])
@pytest.mark.parametrize("method", ["rmd", "dmd2"])
def test_every_algorithm_beside_a_distillation(tmp_path, method, algorithm):
    run = start(tmp_path, method, rl={"algorithm": algorithm, "rewards": [BRIGHT], "group": 2})
    fake = {name: p.detach().clone() for name, p in run.roles.parameters(FAKE_SCORE).items()}
    for _ in range(2):
        figures = train_update(run)
    assert math.isfinite(figures["reinforcement_loss"])
    assert any(not torch.equal(p, fake[name]) for name, p in run.roles.parameters(FAKE_SCORE).items())


def test_reinforcement_waits_for_the_cold_start(tmp_path):
    run = start(tmp_path, rl={"rewards": [BRIGHT]}, cold_start={"updates": 2})
    found = ["reinforcement_loss" in train_update(run) for _ in range(4)]
    assert found == [False, False, True, True]


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_the_reference_is_the_student_at_the_terms_start_and_survives_a_pause(tmp_path, mode):
    settings = {"rl": {"algorithm": "dpo", "rewards": [BRIGHT]}, "cold_start": {"updates": 2, "real_scale": 0.0}}
    run = start(tmp_path, mode=mode, **settings)
    train_update(run)
    train_update(run)
    then = {name: p.detach().clone() for name, p in run.roles.parameters(STUDENT).items()}
    run.recipe.training.updates = 4
    train(run, tmp_path / "run")
    for name, parameter in run.roles.parameters(REFERENCE).items():
        assert torch.equal(parameter, then[name])
        assert not parameter.requires_grad
    assert any(not torch.equal(p, then[name]) for name, p in run.roles.parameters(STUDENT).items())
    again = start(tmp_path, mode=mode, **settings)
    again.restore(*latest_state(tmp_path / "run"))
    for name, parameter in again.roles.parameters(REFERENCE).items():
        assert torch.equal(parameter, then[name])


def test_the_two_gradients_are_brought_to_the_terms_ratio():
    a, b = torch.nn.Parameter(torch.tensor([1.0, 2.0])), torch.nn.Parameter(torch.tensor([3.0]))
    term, norms = RLTerm(rewards=[BRIGHT], weight=0.5), torch.zeros(2)
    backward_both(term, [a, b], 3 * a.sum(), 100 * b.sum(), norms, 1e6)
    assert a.grad.tolist() == [3.0, 3.0]
    assert b.grad.item() == pytest.approx(0.5 * math.sqrt(18))
    # a batch with hardly anything left to win is not driven like the one before
    backward_both(term, [a, b], 3 * a.sum(), b.sum(), norms, 1e6)
    assert b.grad.item() == pytest.approx(0.5 * math.sqrt(18) / math.sqrt((0.95 * 100**2 + 1) / 1.95), rel=1e-4)
    backward_both(term.model_copy(update={"balance": False}), [a, b], 3 * a.sum(), 100 * b.sum(), norms, 1e6)
    assert b.grad.item() == 50.0
    backward_both(term, [a, b], torch.zeros(()), 100 * b.sum(), norms, 1e6)
    assert a.grad is None
    assert b.grad.item() == 50.0
    # a steep reward is clipped by itself, and leaves the distillation's gradient as it is
    backward_both(term.model_copy(update={"balance": False}), [a, b], 3 * a.sum(), 100 * b.sum(), norms, 2.0)
    assert a.grad.tolist() == [3.0, 3.0]
    assert b.grad.item() == pytest.approx(2.0)


def test_decoding_under_gradient_is_the_same_with_activations_made_again(tmp_path):
    run = start(tmp_path, rl={"rewards": [BRIGHT]})
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    run.rewarder.scoring(["a", "b"], run.generator)(latents).sum().backward()
    plain = latents.detach().clone().requires_grad_(True)
    brightness(run.backbone.decode_with_graph(plain), ["a", "b"]).sum().backward()
    torch.testing.assert_close(latents.grad, plain.grad)
    assert latents.grad.abs().max() > 0


def test_decoding_may_be_cropped_or_tiny(tmp_path, generator):
    latents = torch.arange(64.0).reshape(1, 1, 8, 8)
    cut = cropped(latents, 4, generator)
    assert cut.shape == (1, 1, 4, 4)
    assert (cut[0, 0, 1:] - cut[0, 0, :-1] == 8).all()
    assert cropped(latents, 8, generator) is latents
    tiny = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)
    )
    tiny.save_pretrained(str(tmp_path / "tiny"))
    run = start(tmp_path, rl={"rewards": [BRIGHT], "decoder": str(tmp_path / "tiny"), "crop": 8})
    assert train_update(run)["reinforcement_grad_norm"] > 0


def test_what_reinforcement_cannot_do_is_refused(tmp_path):
    blind = {**BRIGHT, "differentiable": False}
    with pytest.raises(UserError, match="one of these rewards has none; use dpo or grpo"):
        start(tmp_path, rl={"rewards": [blind]})
    with pytest.raises(UserError, match="cannot be loaded as AutoencoderTiny"):
        start(tmp_path, rl={"rewards": [BRIGHT], "decoder": str(tmp_path)})
    assert Rewarder.of(RLTerm(algorithm="grpo", rewards=[blind]), backbones()["sd3"].tiny(), torch.device("cpu"))


@pytest.mark.parametrize("algorithm", ["refl", "dpo"])
def test_rewards_that_start_from_another_run_are_rewards_after_a_cold_start(tmp_path, algorithm):
    """Two recipes for the same thing: one run with a cold start, or a distillation and a second run that goes on from it."""
    wanted = {"rl": {"algorithm": algorithm, "rewards": [BRIGHT]}}
    neutral = {"updates": 2, "real_scale": 0.0, "renoise_bias": 1.0}
    whole = start(tmp_path, **wanted, cold_start=neutral)
    for _ in range(4):
        train_update(whole)
    first = start(tmp_path)
    first.recipe.training.updates = 2
    train(first, tmp_path / "first")
    second = start(tmp_path, **wanted)
    second.recipe.training.start_from = tmp_path / "first"
    second.recipe.training.updates = 4
    begin(second, tmp_path / "second")
    assert second.update == 2
    train(second, tmp_path / "second")
    for role in (STUDENT, FAKE_SCORE, REFERENCE):
        for name, parameter in second.roles.parameters(role).items():
            assert torch.equal(parameter, whole.roles.parameters(role)[name])
    assert all(torch.equal(tensor, whole.average[name]) for name, tensor in second.average.items())


def test_a_start_must_fit_and_leave_something_to_do(tmp_path):
    first = start(tmp_path)
    first.recipe.training.updates = 1
    train(first, tmp_path / "first")
    second = start(tmp_path)
    second.recipe.training.start_from = tmp_path / "first"
    second.recipe.training.updates = 1
    with pytest.raises(UserError, match="has 1 updates already"):
        begin(second, tmp_path / "second")
    second.base = "another"
    with pytest.raises(UserError, match="belongs to another model"):
        begin(second, tmp_path / "second")
    second.recipe.training.start_from = tmp_path / "nowhere"
    with pytest.raises(UserError, match="no checkpoint"):
        begin(second, tmp_path / "second")


def test_a_start_without_a_fake_score_leaves_the_new_one_at_the_teacher(tmp_path):
    first = start(tmp_path, matching_weight=0.0, rl={"rewards": [BRIGHT]})
    first.recipe.training.updates = 1
    train(first, tmp_path / "first")
    second = start(tmp_path)
    second.recipe.training.start_from = tmp_path / "first"
    second.recipe.training.updates = 2
    before = {name: p.detach().clone() for name, p in second.roles.parameters(FAKE_SCORE).items()}
    begin(second, tmp_path / "second")
    assert all(torch.equal(p, before[name]) for name, p in second.roles.parameters(FAKE_SCORE).items())
    assert math.isfinite(train_update(second)["fake_score_loss"])
