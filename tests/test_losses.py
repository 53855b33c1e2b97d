"""Losses against hand-computed tensors and analytic Gaussians."""

from __future__ import annotations

import math

import pytest
import torch

from stepladder.losses.matching import HUBER, fake_score_loss, matching_loss, pseudo_huber


def test_pseudo_huber_by_hand():
    difference = torch.tensor([[[[3.0, 4.0]]], [[[0.0, 0.0]]]])
    c = HUBER * math.sqrt(2)
    assert pseudo_huber(difference).tolist() == pytest.approx([math.sqrt(25 + c * c) - c, 0.0], abs=1e-6)


def test_fake_score_weight_is_snr_capped():
    prediction, target = torch.ones(3, 1, 2, 2), torch.zeros(3, 1, 2, 2)
    logsnr = torch.log(torch.tensor([0.5, 4.0, 100.0]))
    assert fake_score_loss(prediction, target, logsnr, cap=5.0).tolist() == pytest.approx([0.5, 4.0, 5.0])


def test_fake_score_target_carries_no_gradient():
    prediction, target = torch.ones(1, 1, 2, 2, requires_grad=True), torch.zeros(1, 1, 2, 2, requires_grad=True)
    fake_score_loss(prediction, target, torch.zeros(1)).sum().backward()
    assert target.grad is None
    assert prediction.grad is not None


def test_student_gradient_is_the_unit_vector_from_real_to_fake_noise():
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    fake, real = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    matching_loss(x, fake, real).sum().backward()
    expected = real - fake
    expected = expected / expected.flatten(1).norm(dim=1)[:, None, None, None]
    torch.testing.assert_close(x.grad, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("student_mean", [-1.0, 0.5, 2.0])
def test_a_student_descends_to_the_teachers_gaussian(student_mean):
    """x0 of student and teacher are Gaussian; exact scores of both at sigma; the step must move towards the teacher."""
    sigma, alpha, teacher_mean = 0.6, 0.4, 1.0
    mean = torch.tensor(student_mean, requires_grad=True)
    optimizer = torch.optim.SGD([mean], lr=0.02)
    draw = torch.Generator().manual_seed(0)
    for _ in range(600):
        x0 = mean + 0.3 * torch.randn(64, 1, 2, 2, generator=draw)
        x = alpha * x0 + sigma * torch.randn(64, 1, 2, 2, generator=draw)
        variance = alpha**2 * 0.3**2 + sigma**2
        fake = sigma * (x - alpha * mean).detach() / variance
        real = sigma * (x - alpha * teacher_mean).detach() / variance
        optimizer.zero_grad()
        matching_loss(x, fake, real).mean().backward()
        optimizer.step()
    assert mean.item() == pytest.approx(teacher_mean, abs=0.1)


def test_the_best_fake_score_of_gaussians_is_the_posterior_mean():
    """Minimising Eq. 9 over linear predictors recovers E[x0 | x_t] in closed form."""
    draw = torch.Generator().manual_seed(0)
    alpha, sigma = 0.7, 0.3
    x0 = 0.5 + 0.4 * torch.randn(20000, 1, 1, 1, generator=draw)
    x = alpha * x0 + sigma * torch.randn(x0.shape, generator=draw)
    slope, offset = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.LBFGS([slope, offset], max_iter=50)

    def closure():
        optimizer.zero_grad()
        loss = fake_score_loss(slope * x + offset, x0, torch.full((20000,), math.log(alpha**2 / sigma**2))).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    gain = alpha * 0.16 / (alpha**2 * 0.16 + sigma**2)
    assert slope.item() == pytest.approx(gain, rel=0.03)
    assert offset.item() == pytest.approx(0.5 - gain * alpha * 0.5, abs=0.02)
