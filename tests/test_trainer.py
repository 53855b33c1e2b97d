"""The trainer: runs that are killed resume bit for bit, and bad luck loses nothing."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from conftest import tiny_recipe
from stepladder.backbones import backbones
from stepladder.distillation import export_run
from stepladder.errors import UserError
from stepladder.export import fingerprint
from stepladder.roles import STUDENT
from stepladder.storage import load_tree, save_tree
from stepladder.training.logs import read_metrics
from stepladder.training.trainer import Run, checkpoints, latest_state, open_folder, train, train_update

SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from conftest import tiny_recipe
from stepladder.backbones import backbones
from stepladder.training.trainer import Run, checkpoints, latest_state, train
folder = Path(sys.argv[1])
recipe = tiny_recipe(folder, updates=40, checkpoint_every=3, batch_size=2, sample_every=1000)
run = Run.start(recipe, backbones()["sd3"].tiny())
if checkpoints(folder):
    run.restore(*latest_state(folder))
train(run, folder)
"""


def start(folder: Path, **training) -> Run:
    return Run.start(tiny_recipe(folder, **training), backbones()["sd3"].tiny())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state, _ = latest_state(folder)
    return {f"{role}/{name}": tensor for role, own in state["weights"].items() for name, tensor in own.items()} | state["average"]


def test_sigkill_at_random_moments_then_resume_is_bit_for_bit(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)), encoding="utf-8")
    quiet, killed = tmp_path / "quiet", tmp_path / "killed"
    quiet.mkdir()
    killed.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, str(script), str(quiet)], check=True, capture_output=True, env=environment, timeout=300)
    moments = random.Random(0)
    kills = 0
    for _ in range(3):
        process = subprocess.Popen([sys.executable, str(script), str(killed)], stderr=subprocess.DEVNULL, env=environment)
        before = len(list(killed.glob("checkpoints/*")))
        deadline = time.monotonic() + 120
        while process.poll() is None and len(list(killed.glob("checkpoints/*"))) == before < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(moments.uniform(0.0, 0.6))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    subprocess.run([sys.executable, str(script), str(killed)], check=True, capture_output=True, env=environment, timeout=300)
    assert kills > 0
    expected, got = weights(quiet), weights(killed)
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, got[name]), name
    updates = [row["update"] for row in read_metrics(killed)]
    assert updates == list(range(1, 41))


def test_trajectory_is_the_committed_one(tmp_path):
    """A refactoring that changes numbers is seen here; regenerate with `python tests/test_trainer.py`."""
    committed = json.loads((Path(__file__).parent / "trajectories.json").read_text(encoding="utf-8"))
    assert trajectory(tmp_path) == pytest.approx(committed["rmd/sd3"], rel=2e-3)


def trajectory(folder: Path) -> list[float]:
    torch.set_num_threads(1)
    run = start(folder, updates=6)
    values = []
    for _ in range(6):
        figures = train_update(run)
        values += [figures["fake_score_loss"], figures["student_loss"]]
    return values


def test_only_the_wanted_number_of_checkpoints_is_kept(tmp_path):
    run = start(tmp_path, updates=8, checkpoint_every=2, keep_checkpoints=2)
    train(run, tmp_path)
    assert [path.stem for path in checkpoints(tmp_path)] == ["update-0000006", "update-0000008"]
    assert len(read_metrics(tmp_path)) == 8
    assert list((tmp_path / "samples").glob("*.png"))
    assert list((tmp_path / "tensorboard").iterdir())


def test_nan_stops_with_the_update_and_keeps_the_last_good_checkpoint(tmp_path):
    run = start(tmp_path, updates=4, checkpoint_every=1)
    train_once = {"n": 0}
    original = run.method.student_loss

    def spoiled(*arguments):
        train_once["n"] += 1
        return original(*arguments) * (float("nan") if train_once["n"] == 3 else 1.0)

    run.method.student_loss = spoiled
    with pytest.raises(UserError, match=r"student loss became nan.*update 3"):
        train(run, tmp_path)
    state, _ = latest_state(tmp_path)
    assert state["update"] == 2
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path).values())


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path):
    train(start(tmp_path, updates=1), tmp_path)
    state, path = latest_state(tmp_path)
    with pytest.raises(UserError, match="another recipe"):
        start(tmp_path, updates=1, student_learning_rate=5e-4).restore(state, path)
    start(tmp_path, updates=9).restore(state, path)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    train(start(tmp_path, updates=1), tmp_path)
    state, path = latest_state(tmp_path)
    name = next(iter(state["weights"][STUDENT]))
    state["weights"][STUDENT][name] = torch.zeros(1)
    with pytest.raises(UserError, match="another model or rank"):
        start(tmp_path, updates=1).restore(state, path)


def test_folders_that_hold_something_else_are_refused(tmp_path):
    recipe = tiny_recipe(tmp_path)
    run = tmp_path / "run"
    open_folder(run, recipe, resume=False)
    with pytest.raises(UserError, match="already holds a run"):
        open_folder(run, recipe, resume=False)
    open_folder(run, recipe, resume=True)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="holds no run"):
        open_folder(other, recipe, resume=False)
    with pytest.raises(UserError, match="another recipe"):
        open_folder(run, tiny_recipe(tmp_path, seed=5), resume=True)
    with pytest.raises(UserError, match="no run to resume"):
        open_folder(tmp_path / "new", recipe, resume=True)
    with pytest.raises(UserError, match="no checkpoint"):
        latest_state(run)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(UserError, match="cannot write"):
        open_folder(tmp_path / "file" / "run", tiny_recipe(tmp_path), resume=False)


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "state.safetensors"
    save_tree(path, {"a": torch.ones(3)})

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("stepladder.storage.save_file", full)
    with pytest.raises(UserError, match="No space left"):
        save_tree(path, {"a": torch.zeros(3)})
    assert torch.equal(load_tree(path)["a"], torch.ones(3))
    assert [item.name for item in tmp_path.iterdir()] == ["state.safetensors"]


def test_truncated_and_foreign_checkpoints_are_refused(tmp_path):
    path = tmp_path / "state.safetensors"
    save_tree(path, {"a": torch.ones(300), "b": [1, {"c": None}], 3: "x"})
    assert load_tree(path)[3] == "x"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="truncated"):
        load_tree(path)
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, str(path))
    with pytest.raises(UserError, match="not a Stepladder checkpoint"):
        load_tree(path)


def test_an_exported_full_student_holds_the_whole_network(tmp_path):
    recipe = tiny_recipe(tmp_path)
    recipe.roles.mode = "full"
    backbone = backbones()["sd3"].tiny()
    base = fingerprint(backbone.network)
    run = Run.start(recipe, backbone)
    train_update(run)
    folder = export_run(run, base, tmp_path / "student")
    from diffusers import SD3Transformer2DModel

    network = SD3Transformer2DModel.from_pretrained(str(folder), subfolder="transformer")
    for name, tensor in network.named_parameters():
        torch.testing.assert_close(tensor.data, run.average[name])


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        values = {"rmd/sd3": [round(value, 6) for value in trajectory(Path(scratch))]}
    (Path(__file__).parent / "trajectories.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
