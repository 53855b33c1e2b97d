"""U and renoise: the variance of what is re-injected, and the special cases of the papers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stepladder.prediction import Prediction
from stepladder.processes import FlowProcess, VariancePreservingProcess
from stepladder.renoise import gaussian, renoise
from stepladder.resample import noise_gain, resize

PROCESSES = [FlowProcess(), VariancePreservingProcess.linear()]


def draws(size=(8, 8), batch=512, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 4, *size, generator=draw), draw


@pytest.mark.parametrize("mode", ["bilinear", "bicubic", "area"])
@pytest.mark.parametrize("sizes", [((8, 8), (16, 16)), ((8, 12), (12, 20)), ((8, 8), (8, 8)), ((3, 8, 8), (5, 16, 16))])
def test_noise_gain_is_the_variance_of_resized_noise(mode, sizes):
    before, after = sizes
    noise = torch.randn(400, 3, *before, generator=torch.Generator().manual_seed(0))
    assert resize(noise, after, mode).var().item() == pytest.approx(noise_gain(before, after, mode), rel=0.03)


def test_bilinear_doubling_leaves_the_variance_of_notes():
    assert noise_gain((512, 512), (1024, 1024)) == pytest.approx(0.39, abs=0.005)


def test_resize_keeps_what_does_not_change():
    x = torch.randn(2, 4, 8, 8)
    assert resize(x, (8, 8)) is x
    constant = torch.full((1, 4, 5, 6, 6), 0.7)
    torch.testing.assert_close(resize(constant, (9, 12, 12)), torch.full((1, 4, 9, 12, 12), 0.7))


@pytest.mark.parametrize("process", PROCESSES, ids=["flow", "vp"])
@given(mix=st.floats(0, 1), t=st.floats(50, 950))
def test_variance_of_a_renoised_state(process, mix, t):
    eps, draw = draws()
    zero = torch.zeros_like(eps)
    when = torch.tensor(t)
    x = renoise(process, Prediction(zero, eps), when, (16, 16), mix, draw, preserve_variance=True)
    assert x.std().item() == pytest.approx(process.sigma(when).item(), rel=0.03)
    x = renoise(process, Prediction(zero, eps), when, (16, 16), mix, draw)
    expected = mix**2 * noise_gain((8, 8), (16, 16)) + 1 - mix**2
    assert x.var().item() == pytest.approx(process.sigma(when).item() ** 2 * expected, rel=0.05)


@given(mix=st.floats(0, 1))
def test_predicted_noise_keeps_its_share(mix):
    eps, draw = draws()
    x = renoise(FlowProcess(), Prediction(torch.zeros_like(eps), eps), torch.tensor(1000.0), (8, 8), mix, draw)
    assert (x * eps).mean().item() == pytest.approx(mix, abs=0.02)


def test_mix_one_is_the_euler_step():
    x, draw = draws(batch=4)
    velocity = torch.randn(x.shape, generator=draw)
    s, after = 0.8, 0.3
    prediction = Prediction(x - s * velocity, x + (1 - s) * velocity)
    got = renoise(FlowProcess(), prediction, torch.tensor(1000 * after), (8, 8), 1.0)
    torch.testing.assert_close(got, x + (after - s) * velocity)


def test_mix_zero_is_eq_4():
    x0, draw = draws(batch=4)
    state = draw.get_state()
    got = renoise(FlowProcess(), Prediction(x0, x0), torch.tensor(400.0), (16, 16), 0.0, draw)
    draw.set_state(state)
    expected = 0.6 * resize(x0, (16, 16)) + 0.4 * torch.randn(4, 4, 16, 16, generator=draw)
    torch.testing.assert_close(got, expected)


def test_times_may_differ_within_a_batch():
    x0, draw = draws(batch=2)
    got = renoise(FlowProcess(), Prediction(x0, torch.zeros_like(x0)), torch.tensor([0.0, 500.0]), (8, 8), 1.0)
    torch.testing.assert_close(got[0], x0[0])
    torch.testing.assert_close(got[1], x0[1] / 2)


def test_renoise_is_differentiable_in_both_predictions():
    x0, draw = draws(batch=2)
    x0, eps = x0.clone().requires_grad_(), torch.randn(x0.shape, generator=draw).requires_grad_()
    renoise(FlowProcess(), Prediction(x0, eps), torch.tensor(300.0), (16, 16), 0.5, draw).sum().backward()
    torch.testing.assert_close(x0.grad.sum().item(), 0.7 * 2 * 4 * 256, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(eps.grad.sum().item(), 0.5 * 0.3 * 2 * 4 * 256, rtol=1e-4, atol=1e-2)


def test_one_generator_a_sample_does_not_depend_on_the_batch():
    like = torch.zeros(1)
    both = gaussian((2, 3), [torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)], like)
    alone = gaussian((1, 3), [torch.Generator().manual_seed(2)], like)
    torch.testing.assert_close(both[1], alone[0])
