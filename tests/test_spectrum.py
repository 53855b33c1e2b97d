"""Spectra against closed forms."""

from __future__ import annotations

import json
import math

import pytest
import torch
from typer.testing import CliRunner

from stepladder.cli.main import _register, app
from stepladder.data.shards import write_shard
from stepladder.images import png_bytes
from stepladder.processes import FlowProcess, VariancePreservingProcess
from stepladder.spectrum import Spectrum, propose, radial_spectrum, temporal_spectrum
from stepladder.training.recipe import parse_recipe
from stepladder.world.render import render
from stepladder.world.scenes import draw_scenes

FLOW = FlowProcess()


def test_white_noise_has_power_one_everywhere(generator):
    spectrum = radial_spectrum(torch.randn(64, 4, 32, 32, generator=generator))
    assert all(power == pytest.approx(1.0, abs=0.15) for power in spectrum.power)
    over_time = temporal_spectrum(torch.randn(16, 4, 12, 16, 16, generator=generator))
    assert all(power == pytest.approx(1.0, abs=0.05) for power in over_time.power)


def test_a_wave_has_its_power_at_its_frequency():
    x = torch.cos(2 * math.pi * 5 * torch.arange(32) / 32)
    spectrum = radial_spectrum(x.expand(1, 1, 32, 32))
    assert spectrum.power.index(max(spectrum.power)) == 5
    assert spectrum.frequencies[5] == 5 / 32
    assert sum(power > 1e-9 for power in spectrum.power) == 1


@pytest.mark.parametrize("process", [FLOW, VariancePreservingProcess.linear()])
def test_noised_spectra_are_those_of_noised_latents(process, generator):
    clean = torch.randn(200, 1, 16, 16, generator=generator).cumsum(2).cumsum(3) / 8
    t = torch.tensor(600.0)
    noised = process.alpha(t) * clean + process.sigma(t) * torch.randn(clean.shape, generator=generator)
    expected = radial_spectrum(clean).noised(process, 600.0)
    assert radial_spectrum(noised).power == pytest.approx(expected, rel=0.1)


def test_the_safe_scale_by_hand():
    """P = 1 below frequency 0.25 and 0.01 above: the upper half is masked where 0.01 SNR <= 0.1, so at SNR 10."""
    frequencies = tuple(index / 32 for index in range(17))
    spectrum = Spectrum(frequencies, tuple(1.0 if f < 0.25 else 0.01 for f in frequencies))
    at = lambda snr: FLOW.timestep(torch.tensor(math.log(snr), dtype=torch.float64)).item()
    assert spectrum.safe_scale(FLOW, at(9.0)) == pytest.approx(0.5, abs=1 / 16)
    assert spectrum.safe_scale(FLOW, at(11.0)) == 1.0
    assert spectrum.safe_scale(FLOW, at(0.09)) == 0.0
    assert spectrum.safe_scale(FLOW, at(0.11)) == pytest.approx(0.5, abs=1 / 16)


def test_proposed_sizes_grow_divide_and_end_at_the_full_size():
    frequencies = tuple(index / 32 for index in range(17))
    falling = Spectrum(frequencies, tuple(30 / (1 + (40 * f) ** 3) for f in frequencies))
    steps = propose(falling, falling, FLOW, (1000.0, 900.0, 700.0, 400.0, 100.0), (9, 32, 48), 2)
    sizes = [step.size for step in steps]
    assert sizes[-1] == (9, 32, 48)
    assert all(all(b >= a for a, b in zip(x, y, strict=True)) for x, y in zip(sizes, sizes[1:], strict=False))
    assert len(set(sizes)) >= 3
    assert sizes[0] == (3, 8, 12)
    assert all(height % 2 == 0 and width % 2 == 0 and height * 48 == width * 32 for _, height, width in sizes)


def test_the_command_draws_and_proposes_a_ladder_that_builds(tmp_path):
    scenes = draw_scenes(6, 0)
    images = render(scenes, (128, 128), torch.Generator().manual_seed(0))
    write_shard(tmp_path / "images" / "0.tar", [(str(i), {"png": png_bytes(image), "txt": b"a"}) for i, image in enumerate(images)])
    tree = {
        "model": {"path": "bundled", "max_sequence_length": 1},
        "ladder": {"sizes": [[128, 128]], "steps": 4, "spacing": 3.0},
        "data": {"images": "images"},
        "training": {"device": "cpu"},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(tree))
    _register()
    result = CliRunner().invoke(app, ["spectrum", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "out"), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out" / "spectrum.json").read_text())
    assert (tmp_path / "out" / "spectrum.png").read_bytes()[:4] == b"\x89PNG"
    assert found["images"] == 6
    proposed = parse_recipe({**tree, "ladder": found["ladder"]}).ladder
    assert len(proposed.sizes) >= 2
    assert tuple(proposed.sizes[-1]) == (128, 128)
    assert sum(proposed.allocation) == 4
