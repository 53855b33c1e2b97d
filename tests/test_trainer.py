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

from conftest import method_recipe, tiny_recipe
from stepladder.backbones import backbones
from stepladder.distillation import export_run
from stepladder.errors import UserError
from stepladder.methods import methods
from stepladder.roles import STUDENT
from stepladder.storage import load_tree, replace_folder, save_tree, write_text
from stepladder.training.logs import read_metrics
from stepladder.training.trainer import RECIPE_FILE, Run, check_folder, checkpoints, latest_state, train, train_update


def start(folder: Path, **training) -> Run:
    return Run.start(tiny_recipe(folder, **training), backbones()["sd3"].tiny())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state, _ = latest_state(folder)
    return {f"{role}/{name}": tensor for role, own in state["weights"].items() for name, tensor in own.items()} | state["average"]


def distill_command(recipe: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "stepladder.cli.main", "distill", str(recipe), "--out", str(out), *more]


def newest(folder: Path) -> str:
    return max((path.name for path in folder.glob("checkpoints/*.safetensors")), default="")


def test_sigkill_at_random_moments_then_resume_is_bit_for_bit(tmp_path):
    model, recipe_file = tmp_path / "model", tmp_path / "recipe.yaml"
    backbones()["sd3"].tiny().pipeline.save_pretrained(str(model))
    recipe = tiny_recipe(tmp_path, updates=60, checkpoint_every=4, sample_every=1000)
    recipe.model.path = str(model)
    recipe_file.write_text(recipe.to_yaml(), encoding="utf-8")
    quiet, killed = tmp_path / "quiet", tmp_path / "killed"
    options = {"env": {**os.environ, "OMP_NUM_THREADS": "1"}, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run(distill_command(recipe_file, quiet), check=True, timeout=300, **options)
    moments, killed_at = random.Random(0), []
    for round_ in range(2):
        process = subprocess.Popen(distill_command(recipe_file, killed, *(["--resume"] if round_ else [])), **options)
        before, deadline = newest(killed), time.monotonic() + 120
        while process.poll() is None and newest(killed) == before and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(moments.uniform(0.0, 0.15))
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed_at.append(latest_state(killed)[0]["update"])
    assert all(0 < update < 60 for update in killed_at), killed_at
    subprocess.run(distill_command(recipe_file, killed, "--resume"), check=True, timeout=300, **options)
    expected, got = weights(quiet), weights(killed)
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, got[name]), name
    assert [row["update"] for row in read_metrics(killed)] == list(range(1, 61))
    for path in (quiet / "student").rglob("*.safetensors"):
        assert path.read_bytes() == (killed / "student" / path.relative_to(quiet / "student")).read_bytes()


TRAJECTORIES = Path(__file__).parent / "trajectories.json"
PAIRS = [f"{method}/{backbone}" for method in sorted(methods()) for backbone in sorted(backbones())]


@pytest.mark.parametrize("pair", PAIRS)
def test_trajectory_is_the_committed_one(tmp_path, pair):
    """A refactoring that changes numbers is seen here; regenerate with `python tests/test_trainer.py`."""
    committed = json.loads(TRAJECTORIES.read_text(encoding="utf-8"))
    assert pair in committed, "commit this pair's trajectory: python tests/test_trainer.py"
    assert trajectory(tmp_path, pair) == pytest.approx(committed[pair], rel=2e-3)


def trajectory(folder: Path, pair: str) -> list[float]:
    torch.set_num_threads(1)
    method, backbone = pair.split("/")
    model = backbones()[backbone].tiny()
    run = Run.start(method_recipe(method, model, folder), model)
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


def test_a_checkpoint_of_another_recipe_model_or_prompts_is_refused(tmp_path):
    train(start(tmp_path, updates=1), tmp_path)
    state, path = latest_state(tmp_path)
    with pytest.raises(UserError, match="another recipe"):
        start(tmp_path, updates=1, max_grad_norm=2.0).restore(state, path)
    with pytest.raises(UserError, match="another model"):
        start(tmp_path, updates=1).restore({**state, "base": "0"}, path)
    with pytest.raises(UserError, match="another prompts"):
        start(tmp_path, updates=1).restore({**state, "prompts": "0"}, path)
    name = next(iter(state["weights"][STUDENT]))
    broken = {**state, "weights": {**state["weights"], STUDENT: {**state["weights"][STUDENT], name: torch.zeros(1)}}}
    with pytest.raises(UserError, match="another model or rank"):
        start(tmp_path, updates=1).restore(broken, path)


def test_a_resumed_run_may_train_longer_at_another_rate(tmp_path):
    train(start(tmp_path, updates=1), tmp_path)
    run = start(tmp_path, updates=9, student_learning_rate=5e-4)
    run.restore(*latest_state(tmp_path))
    assert run.update == 1
    assert run.optimizers[STUDENT].param_groups[0]["lr"] == 5e-4


def test_an_unreadable_newest_checkpoint_falls_back_to_the_one_before(tmp_path):
    train(start(tmp_path, updates=4, checkpoint_every=2), tmp_path)
    newest = checkpoints(tmp_path)[-1]
    newest.write_bytes(newest.read_bytes()[:500])
    state, path = latest_state(tmp_path)
    assert (state["update"], path) == (2, checkpoints(tmp_path)[0])


def test_every_extra_fake_score_update_sees_fresh_samples(tmp_path):
    run = start(tmp_path)
    run.method.config.fake_updates = 3
    seen = []
    inner = run.method.fake_score_loss
    run.method.fake_score_loss = lambda roles, sample, *more: seen.append(sample) or inner(roles, sample, *more)
    train_update(run)
    assert len(seen) == 3
    assert len({tuple(sample.timestep.tolist()) for sample in seen}) == 3


def test_folders_that_hold_something_else_are_refused(tmp_path):
    recipe = tiny_recipe(tmp_path)
    run = tmp_path / "run"
    check_folder(run, recipe, resume=False)
    write_text(run / RECIPE_FILE, recipe.to_yaml())
    with pytest.raises(UserError, match="already holds a run"):
        check_folder(run, recipe, resume=False)
    check_folder(run, recipe, resume=True)
    check_folder(run, tiny_recipe(tmp_path, updates=99, student_learning_rate=1e-5), resume=True)
    with pytest.raises(UserError, match="another recipe"):
        check_folder(run, tiny_recipe(tmp_path, seed=5), resume=True)
    with pytest.raises(UserError, match="no run to resume"):
        check_folder(tmp_path / "new", recipe, resume=True)
    with pytest.raises(UserError, match="no checkpoint"):
        latest_state(run)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="holds no run"):
        check_folder(other, recipe, resume=False)
    with pytest.raises(UserError, match="holds something else"):
        replace_folder(run, other, RECIPE_FILE)
    assert (other / "thesis.txt").exists()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(UserError, match="cannot write"):
        write_text(tmp_path / "file" / "run" / RECIPE_FILE, "x")
    with pytest.raises(UserError, match="choose another folder"):
        check_folder(tmp_path / "file", tiny_recipe(tmp_path), resume=False)


def test_a_replaced_folder_is_whole(tmp_path):
    old, new = tmp_path / "student", tmp_path / "student.tmp"
    for folder, text in ((old, "old"), (new, "new")):
        folder.mkdir()
        (folder / "card").write_text(text, encoding="utf-8")
    # somebody's own backup
    (tmp_path / "student.old").mkdir()
    (tmp_path / "student.old" / "card").write_text("kept", encoding="utf-8")
    replace_folder(new, old, "card")
    assert (old / "card").read_text(encoding="utf-8") == "new"
    assert (tmp_path / "student.old" / "card").read_text(encoding="utf-8") == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student", "student.old"]


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
    run = Run.start(recipe, backbones()["sd3"].tiny())
    train_update(run)
    folder = export_run(run, tmp_path / "student")
    from diffusers import SD3Transformer2DModel

    network = SD3Transformer2DModel.from_pretrained(str(folder), subfolder="transformer")
    for name, tensor in network.named_parameters():
        torch.testing.assert_close(tensor.data, run.average[name])


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        values = {pair: [round(value, 6) for value in trajectory(Path(scratch), pair)] for pair in PAIRS}
    TRAJECTORIES.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
