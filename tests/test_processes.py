"""Forward processes: inverses, identities, and the logSNR figures of the papers."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st

from stepladder.errors import UserError
from stepladder.processes import (
    FlowProcess,
    VariancePreservingProcess,
    predict_from_noise,
    predict_from_velocity,
    process_from,
)

PROCESSES = [FlowProcess(), VariancePreservingProcess.linear(), VariancePreservingProcess.scaled_linear()]
timesteps = st.floats(1.0, 998.0)


@pytest.mark.parametrize("process", PROCESSES, ids=["flow", "linear", "scaled_linear"])
@given(t=timesteps)
def test_timestep_inverts_logsnr(process, t):
    value = torch.tensor(t, dtype=torch.float64)
    assert process.timestep(process.logsnr(value)).item() == pytest.approx(t, abs=1e-6)


@pytest.mark.parametrize("process", PROCESSES, ids=["flow", "linear", "scaled_linear"])
@given(t=timesteps)
def test_alpha_and_sigma_give_logsnr(process, t):
    value = torch.tensor(t, dtype=torch.float64)
    ratio = process.alpha(value) ** 2 / process.sigma(value) ** 2
    assert torch.log(ratio).item() == pytest.approx(process.logsnr(value).item(), abs=1e-6)


@pytest.mark.parametrize("process", PROCESSES, ids=["flow", "linear", "scaled_linear"])
def test_logsnr_falls_with_time(process):
    values = process.logsnr(torch.linspace(1, 998, 4000, dtype=torch.float64))
    assert (values.diff() < 0).all()


@pytest.mark.parametrize("process", PROCESSES[1:], ids=["linear", "scaled_linear"])
def test_variance_is_preserved(process):
    t = torch.linspace(0, 1000, 777, dtype=torch.float64)
    torch.testing.assert_close(process.alpha(t) ** 2 + process.sigma(t) ** 2, torch.ones_like(t))


@pytest.mark.parametrize(
    ("process", "betas"),
    [
        (PROCESSES[1], {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 2e-2}),
        (PROCESSES[2], {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}),
    ],
)
def test_tables_are_those_of_diffusers(process, betas):
    abar = DDPMScheduler(**betas).alphas_cumprod.double()
    torch.testing.assert_close(torch.sigmoid(process.table), abar, rtol=1e-3, atol=1e-6)
    t = torch.arange(1000)
    torch.testing.assert_close(process.alpha(t.double()) ** 2, abar, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("process", "logsnr", "t"),
    [(PROCESSES[1], -2.5, 502), (PROCESSES[2], -2.5, 711), (PROCESSES[1], -6.0, 769), (PROCESSES[0], -2.5, 777)],
)
def test_thresholds_of_the_paper(process, logsnr, t):
    assert process.timestep(torch.tensor(logsnr, dtype=torch.float64)).item() == pytest.approx(t, abs=0.5)


def test_scaled_linear_ends_at_the_logsnr_of_notes():
    assert VariancePreservingProcess.scaled_linear().logsnr_range()[0] == pytest.approx(-5.36, abs=0.01)


@given(t=st.floats(10.0, 990.0), seed=st.integers(0, 100))
def test_predictions_rebuild_the_state(t, seed):
    draw = torch.Generator().manual_seed(seed)
    x0, eps = (torch.randn(2, 3, 4, 4, generator=draw, dtype=torch.float64) for _ in range(2))
    when = torch.tensor([t, t], dtype=torch.float64)
    flow, vp = PROCESSES[0], PROCESSES[1]
    s = (t / 1000) * torch.ones(2, dtype=torch.float64)
    x = (1 - t / 1000) * x0 + t / 1000 * eps
    got = predict_from_velocity(x, eps - x0, s)
    torch.testing.assert_close(got.x0, x0)
    torch.testing.assert_close(got.eps, eps)
    alpha, sigma = vp.alpha(when), vp.sigma(when)
    x = alpha[:, None, None, None] * x0 + sigma[:, None, None, None] * eps
    torch.testing.assert_close(predict_from_noise(x, eps, alpha, sigma).x0, x0, rtol=1e-4, atol=1e-4)
    assert flow.sigma(when).tolist() == pytest.approx([t / 1000] * 2)


@given(t=st.floats(10.0, 990.0), seed=st.integers(0, 100))
def test_v_predictions_rebuild_image_and_noise(t, seed):
    draw = torch.Generator().manual_seed(seed)
    x0, eps = (torch.randn(2, 3, 4, 4, generator=draw, dtype=torch.float64) for _ in range(2))
    process = VariancePreservingProcess(0.00085, 0.012, "scaled_linear", prediction_type="v_prediction")
    when = torch.tensor(t, dtype=torch.float64)
    alpha, sigma = process.alpha(when), process.sigma(when)
    got = process.predict(alpha * x0 + sigma * eps, alpha * eps - sigma * x0, when)
    torch.testing.assert_close(got.x0, x0, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got.eps, eps, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda process: type(process).__name__)
def test_a_process_is_rebuilt_from_its_configuration(process):
    assert process_from(process.config()) == process


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"beta_schedule": "squaredcos_cap_v2"}, "beta schedule"),
        ({"prediction_type": "sample"}, "prediction type"),
        ({"rescale_betas_zero_snr": True}, "zero terminal SNR"),
    ],
)
def test_schedules_that_no_backbone_was_made_for_are_refused(config, message):
    with pytest.raises(UserError, match=message):
        process_from(config)
