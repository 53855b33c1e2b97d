"""The ladder: the papers' tables number by number, and what every ladder must hold."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from stepladder.errors import UserError
from stepladder.ladder import PRESETS, build_ladder, full_resolution, rung_timestep, spaced_timesteps
from stepladder.processes import FlowProcess, VariancePreservingProcess

FLOW = FlowProcess()
LINEAR = VariancePreservingProcess.linear()
SCALED = VariancePreservingProcess.scaled_linear()
QUARTERS = spaced_timesteps(4)


def preset_ladder(name, process):
    preset = PRESETS[name]
    sizes = [(height // 8, width // 8) for height, width in preset.sizes]
    return build_ladder(process, preset.teacher_timesteps(), sizes, preset.thresholds, boundary=preset.boundary)


@pytest.mark.parametrize(
    ("name", "process", "table", "sides"),
    [
        ("sdxl", SCALED, [1000, 857, 500, 250], [64, 64, 128, 128]),
        ("sdxl", LINEAR, [1000, 857, 500, 250], [64, 64, 128, 128]),
        ("pixart", LINEAR, [1000, 857, 500, 250], [64, 64, 128, 128]),
        ("sd35", FLOW, [1000, 947, 750, 500], [64, 64, 128, 128]),
        ("wan", FLOW, [1000, 974, 937, 834, 716, 505], [60, 60, 60, 90, 90, 90]),
    ],
)
def test_table_6(name, process, table, sides):
    ladder = preset_ladder(name, process)
    # the paper rounds 937.8 down and 504.5 up
    assert [step.timestep for step in ladder.steps] == pytest.approx(table, abs=0.85)
    assert [step.size[0] for step in ladder.steps] == sides


@pytest.mark.parametrize(("threshold", "allocation"), [(-6.0, "1+3"), (-2.5, "2+2"), (0.0, "3+1")])
def test_table_4(threshold, allocation):
    assert build_ladder(LINEAR, QUARTERS, [(64, 64), (128, 128)], [threshold]).allocation() == allocation


@pytest.mark.parametrize(("thresholds", "allocation"), [((-6.0, -2.5), "1+1+2"), ((-6.0, 0.0), "1+2+1"), ((-2.5, 0.0), "2+1+1")])
def test_table_5(thresholds, allocation):
    assert build_ladder(LINEAR, QUARTERS, [(32, 32), (64, 64), (128, 128)], thresholds).allocation() == allocation


def test_wan_needs_the_rungs_clock():
    preset = PRESETS["wan"]
    sizes = [(60, 104), (90, 160)]
    assert build_ladder(FLOW, preset.teacher_timesteps(), sizes, preset.thresholds, boundary="rung").allocation() == "3+3"
    assert build_ladder(FLOW, preset.teacher_timesteps(), sizes, preset.thresholds, boundary="teacher").allocation() == "4+2"


def test_the_rungs_clock_contradicts_table_5():
    sizes = [(32, 32), (64, 64), (128, 128)]
    assert build_ladder(LINEAR, QUARTERS, sizes, (-2.5, 0.0), boundary="rung").allocation() == "1+2+1"


def test_sdxl_own_schedule_never_reaches_minus_six():
    with pytest.raises(UserError, match="outside what this schedule reaches"):
        build_ladder(SCALED, QUARTERS, [(64, 64), (128, 128)], [-6.0])


def test_printed_sign_of_eq_2_raises_logsnr():
    assert rung_timestep(750, 2.0, FLOW, "printed") == pytest.approx(600)
    assert rung_timestep(750, 2.0, FLOW, "flow") == pytest.approx(857.14, abs=0.01)
    assert rung_timestep(750, 2.0, FLOW, "none") == 750


@given(t=st.floats(1, 999), scale=st.floats(1.0, 8.0))
def test_flow_shift_lowers_logsnr_by_two_log_scale(t, scale):
    shifted = rung_timestep(t, scale, FLOW, "flow")
    drop = FLOW.logsnr(torch.tensor(t, dtype=torch.float64)) - FLOW.logsnr(torch.tensor(shifted, dtype=torch.float64))
    assert drop.item() == pytest.approx(2 * torch.tensor(scale).log().item(), abs=1e-5)
    assert shifted == pytest.approx(rung_timestep(t, scale, FLOW, "exact"), abs=1e-6)
    assert rung_timestep(shifted, scale, FLOW, "printed") == pytest.approx(t, rel=1e-9)


@given(t=st.floats(5, 700), scale=st.floats(1.0, 3.0))
def test_exact_shift_of_a_variance_preserving_process(t, scale):
    shifted = rung_timestep(t, scale, LINEAR, "exact")
    drop = LINEAR.logsnr(torch.tensor(t, dtype=torch.float64)) - LINEAR.logsnr(torch.tensor(shifted, dtype=torch.float64))
    assert drop.item() == pytest.approx(2 * torch.tensor(scale, dtype=torch.float64).log().item(), abs=1e-6)


@given(
    steps=st.integers(1, 12),
    spacing=st.floats(0.5, 8),
    sides=st.lists(st.integers(4, 128), min_size=1, max_size=4, unique=True),
    thresholds=st.lists(st.floats(-8, 4), min_size=0, max_size=3, unique=True),
)
def test_any_ladder_falls_in_time_and_grows_in_size(steps, spacing, sides, thresholds):
    sides, thresholds = sorted(sides), sorted(thresholds)
    assume(len(thresholds) == len(sides) - 1)
    try:
        ladder = build_ladder(FLOW, spaced_timesteps(steps, spacing), [(side, side) for side in sides], thresholds)
    except UserError as error:
        assert "has no step" in str(error)
        return
    assert len(ladder.steps) == steps
    assert sum(len(ladder.steps_of(stage)) for stage in range(ladder.stages)) == steps
    for before, after in zip(ladder.steps, ladder.steps[1:], strict=False):
        assert after.teacher_timestep < before.teacher_timestep
        assert after.size[0] >= before.size[0]
        assert after.stage >= before.stage
    for step in ladder.steps:
        assert ladder.boundaries[step.stage] >= step.teacher_timestep > ladder.boundaries[step.stage + 1]
        assert step.timestep >= step.teacher_timestep - 1e-9


@pytest.mark.parametrize(
    ("sizes", "thresholds", "timesteps", "message"),
    [
        ([(16, 16), (8, 8)], [-2.5], QUARTERS, "must grow"),
        ([(8, 8), (8, 8)], [-2.5], QUARTERS, "must grow"),
        ([(8, 8), (16, 16)], [], QUARTERS, "need 1 logSNR threshold"),
        ([(8, 8), (12, 12), (16, 16)], [0.0, -1.0], QUARTERS, "must rise"),
        ([(8, 8)], [], (500.0, 750.0), "must fall"),
        ([(8, 8)], [], (1200.0,), "must lie in"),
        ([], [], QUARTERS, "at least one size"),
        ([(8, 8), (16, 16)], [5.9], QUARTERS, "has no step"),
    ],
)
def test_impossible_ladders_are_refused(sizes, thresholds, timesteps, message):
    with pytest.raises(UserError, match=message):
        build_ladder(FLOW, timesteps, sizes, thresholds)


def test_full_resolution_is_a_ladder_of_one_rung():
    ladder = full_resolution((1000.0, 500.0), (8, 8))
    assert ladder.stages == 1
    assert [step.timestep for step in ladder.steps] == [1000.0, 500.0]
