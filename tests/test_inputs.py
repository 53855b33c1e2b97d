"""Bad input: exit code 2 and one clear sentence, through the command line as a user meets it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import av
import pytest
import torch
import yaml
from safetensors.torch import save_file

from conftest import tiny_recipe
from stepladder.backbones import load_backbone, releases, sketch_backbone
from stepladder.backbones.loading import locate
from stepladder.backbones.sd3 import SD3
from stepladder.cli.main import _register, app, main
from stepladder.data.prompts import PromptCache, read_prompts
from stepladder.distillation import dry_run
from stepladder.errors import UserError
from stepladder.images import save_video
from stepladder.training.recipe import load_recipe
from stepladder.world.paths import resolve_model

RECIPES = Path(__file__).parent.parent / "recipes"


def recipe_file(folder: Path, **changes: object) -> Path:
    """A tiny recipe on disk with some dotted keys changed."""
    tree = tiny_recipe(folder).model_dump(mode="json")
    for key, value in changes.items():
        *parents, last = key.split("__")
        node = tree
        for parent in parents:
            node = node[parent]
        node[last] = value
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training__updats": 3}, "unknown key training.updats; did you mean updates?"),
        ({"methd": {}}, "unknown key methd; did you mean method?"),
        ({"method": {"name": "rmd", "alfa": 0.1}}, "unknown key method.alfa; did you mean alpha?"),
        ({"method": {"name": "rdm"}}, "unknown method 'rdm'; known methods: dmd2, rmd, swd, tdm"),
        ({"training__updates": "many"}, "training.updates"),
        ({"training__batch_size": 0}, "training.batch_size"),
        ({"method": {"name": "rmd", "alpha": 1.5}}, "method.alpha: Input should be less than or equal to 1"),
        ({"ladder__sizes": None}, "ladder.sizes"),
        ({"roles__mode": "loras"}, "roles.mode"),
        ({"method": {"name": "rmd", "rl": {"rewards": [{"name": "judge"}], "algoritm": "dpo"}}}, "did you mean algorithm?"),
        ({"method": {"name": "rmd", "rl": {"rewards": [{"name": "hpsv3"}]}}}, "unknown reward 'hpsv3'"),
        (
            {"method": {"name": "rmd", "matching_weight": 0, "cold_start": {}, "rl": {"rewards": [{"name": "judge"}]}}},
            "nothing is learned until then",
        ),
        ({"method": {"name": "rmd", "mmd": {"timesteps": [900.0, 100.0]}}}, "does not fall"),
        ({"method": {"name": ["rmd"]}}, "unknown method ['rmd']"),
        ({"training__betas": [1.0, 0.999]}, "less than 1"),
        ({"ladder": {"preset": ["sd35"]}}, "unknown preset ['sd35']"),
        ({"ladder": {"preset": "swd-flux", "steps": 8}}, "names its timesteps, beside which steps means nothing"),
        ({"data__images": "shards"}, "images bring their own prompts"),
    ],
)
def test_wrong_recipes(tmp_path, changes, message):
    with pytest.raises(UserError) as caught:
        load_recipe(recipe_file(tmp_path, **changes))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["a: [", "just words", "- list", ""])
def test_recipes_that_are_no_mapping(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="recipe"):
        load_recipe(path)


def test_a_missing_recipe(tmp_path):
    with pytest.raises(UserError, match="cannot read recipe"):
        load_recipe(tmp_path / "none.yaml")


def test_overrides(tmp_path):
    recipe = load_recipe(recipe_file(tmp_path), ["training.updates=7", "method.alpha=0.5", "ladder.thresholds=[-1.0]"])
    assert (recipe.training.updates, recipe.method["alpha"], recipe.ladder.thresholds) == (7, 0.5, [-1.0])
    with pytest.raises(UserError, match="must look like"):
        load_recipe(recipe_file(tmp_path), ["training.updates"])
    with pytest.raises(UserError, match="did you mean updates"):
        load_recipe(recipe_file(tmp_path), ["training.update=7"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"\n \n", "holds no prompts"),
        ("binary.txt", b"\xff\xfe\x00\x01", "is not text"),
        ("null.txt", b"a\x00b", "is not text"),
        ("bad.jsonl", b'{"prompt": "a"}\n{"prompt"', "line 2 is not JSON"),
        ("columns.jsonl", b'{"words": "a"}\n', "rename the prompt column"),
        ("columns.csv", b"words\na\n", "rename the prompt column"),
    ],
)
def test_wrong_prompt_files(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_prompts(path)
    with pytest.raises(UserError, match="cannot read prompts"):
        read_prompts(tmp_path / "nothing.txt")


def test_prompt_files_of_every_kind(tmp_path):
    for name, content in (("a.txt", "one\n\ntwo\n"), ("a.jsonl", '{"caption": "one"}\n"two"\n'), ("a.csv", "text\none\ntwo\n")):
        path = tmp_path / name
        path.write_text(content, encoding="utf-8")
        assert read_prompts(path) == ["one", "two"]


def test_prompt_files_as_spreadsheets_write_them(tmp_path):
    """With a byte order mark, and with a line break inside a cell."""
    for name, content in (("a.csv", '\ufeffprompt,n\r\n"a red\r\ncircle",1\r\n'), ("a.txt", "\ufeffa red circle\n")):
        path = tmp_path / name
        path.write_bytes(content.encode("utf-8"))
        assert read_prompts(path) == ["a red circle"]
    (tmp_path / "long.csv").write_text("prompt\n" + "a" * 200_000 + "\n", encoding="utf-8")
    with pytest.raises(UserError, match="is not a CSV table"):
        read_prompts(tmp_path / "long.csv")


def test_every_prompt_is_seen_once_an_epoch():
    backbone = SD3.tiny()
    cache = PromptCache(backbone.encode(["a", "b", "c", "d"]), backbone.unconditional(), seed=3)
    rows = [cache.conditioning.rows(cache.rows(update, 2)).tensors["pooled_projections"] for update in range(4)]
    for epoch in (rows[:2], rows[2:]):
        seen = sorted(tuple(row.tolist()) for part in epoch for row in part)
        assert seen == sorted(tuple(row.tolist()) for row in cache.conditioning.tensors["pooled_projections"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ladder__sizes": [[32, 32], [16, 16]]}, "must grow"),
        ({"ladder__sizes": [[12, 12], [32, 32]]}, "cannot be divided by 8"),
        ({"ladder__sizes": [[16, 16], [512, 512]]}, "beyond this model's"),
        ({"ladder__thresholds": [9.0]}, "has no step"),
        ({"ladder__thresholds": [float("inf")]}, "outside what this schedule reaches"),
        ({"ladder__thresholds": []}, "need 1 logSNR threshold"),
    ],
)
def test_impossible_ladders(tmp_path, changes, message):
    recipe = load_recipe(recipe_file(tmp_path, **changes))
    with pytest.raises(UserError, match=message):
        recipe.ladder.build(SD3.tiny())


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "stepladder.cli.main", *arguments], capture_output=True, text=True, timeout=300)


def test_the_command_line_says_one_sentence_and_exits_with_2(tmp_path):
    done = run_command("distill", str(recipe_file(tmp_path, training__updats=3)), "--out", str(tmp_path / "run"))
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == ["stepladder: unknown key training.updats; did you mean updates?"]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["distill", "RECIPE", "--out", "OCCUPIED"],
        ["distill", "RECIPE", "--out", "FILE/run"],
        ["distill", "RECIPE", "--out", "NEW", "--resume"],
        ["distill", "RECIPE", "--out", "NEW", "--set", "ladder.sizes=[[32,32],[16,16]]"],
        ["distill", "RECIPE", "--out", "NEW", "--set", "ladder.thresholds=[9.0]"],
        ["distill", "RECIPE", "--out", "NEW", "--set", "data.prompts=empty.txt"],
        ["distill", "RECIPE", "--out", "NEW", "--set", "training.updates=many"],
        ["generate", "NEW", "--prompt", "a"],
        ["generate", "NEW"],
        ["evaluate", "NEW"],
        ["export", "NEW"],
        ["demo", "--out", "OCCUPIED"],
        ["plan", "NEW"],
        ["bench", "latency", "NEW"],
        ["export", "NEW", "--format", "comfyui"],
        ["teach", "--work", "NEW", "--out", "OCCUPIED"],
    ],
    ids=" ".join,
)
def test_every_command_answers_bad_input_with_one_sentence_and_2(tmp_path, monkeypatch, capsys, arguments):
    model = tmp_path / "model"
    SD3.tiny().pipeline.save_pretrained(str(model))
    recipe = recipe_file(tmp_path, model__path=str(model))
    (tmp_path / "empty.txt").write_text("", encoding="utf-8")
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "thesis.txt").write_text("mine", encoding="utf-8")
    (tmp_path / "file").write_text("x", encoding="utf-8")
    places = {"RECIPE": recipe, "OCCUPIED": tmp_path / "occupied", "NEW": tmp_path / "new"}
    line = [str(places.get(item, item)).replace("FILE", str(tmp_path / "file")) for item in arguments]
    monkeypatch.setattr(sys, "argv", ["stepladder", *line])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main()
    said = [text for text in capsys.readouterr().err.splitlines() if text.startswith("stepladder:")]
    assert stopped.value.code == 2
    assert len(said) == 1
    assert [path.name for path in (tmp_path / "occupied").iterdir()] == ["thesis.txt"]
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["demo", "plan", "distill", "generate", "evaluate", "export", "teach", "bench latency"])
def test_every_command_has_help_with_an_example(name):
    from typer.testing import CliRunner

    _register()
    shown = CliRunner().invoke(app, [*name.split(), "--help"])
    assert shown.exit_code == 0
    assert "Example: stepladder" in shown.stdout


def test_paths_are_found_beside_the_recipe_and_those_of_overrides_in_the_current_folder(tmp_path, monkeypatch):
    there, here = tmp_path / "there", tmp_path / "here"
    for folder in (there, here):
        (folder / "clip").mkdir(parents=True)
    rewards = [{"name": "hpsv2", "path": "clip", "weights": "hps.safetensors"}, {"name": "clip", "path": "apple/DFN"}]
    path = recipe_file(there, method={"name": "rmd", "rl": {"rewards": rewards}}, data__prompts="a.txt", model__path="tiny")
    monkeypatch.chdir(here)
    recipe = load_recipe(path)
    named = recipe.method["rl"]["rewards"]
    assert (recipe.data.prompts, recipe.model.path) == (there / "a.txt", str(there / "tiny"))
    assert (named[0]["path"], named[0]["weights"]) == (str(there / "clip"), str(there / "hps.safetensors"))
    assert named[1]["path"] == "apple/DFN"
    recipe = load_recipe(path, ["data.prompts=b.txt", "training.start_from=runs/a", "method.rl.rewards=[{name: clip, path: clip}]"])
    assert (recipe.data.prompts, recipe.training.start_from) == (here / "b.txt", here / "runs" / "a")
    assert recipe.method["rl"]["rewards"][0]["path"] == str(here / "clip")
    assert recipe.model.path == str(there / "tiny")


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_in_the_repository_are_valid(path):
    recipe = load_recipe(path)
    backbone = sketch_backbone(resolve_model(recipe.model.path))
    ladder = recipe.ladder.build(backbone)
    if recipe.method["name"] == "rmd":
        assert ladder.allocation() == ("3+3" if backbone.name == "wan" else "2+2")
    else:
        assert len(ladder.steps) >= 4


def test_every_release_has_a_recipe_of_its_name_and_model():
    for name, (_, release) in releases().items():
        recipe = load_recipe(RECIPES / f"{name}.yaml")
        assert recipe.model.path == release.hub_id
        assert recipe.method["guidance_scale"] == release.guidance_scale


def test_a_dry_run_says_what_a_real_model_needs_without_its_weights():
    lines = "\n".join(dry_run(load_recipe(RECIPES / "pixart.yaml")))
    assert "611.3 M parameters" in lines
    assert "2+2, t=1000 at 64x64, t=857 at 64x64, t=500 at 128x128" in lines
    assert "prompts.txt is still missing" in lines
    assert "21.0 × the teacher's (25 steps, guided)" in lines


def test_hub_ids_that_cannot_be_reached_say_so():
    with pytest.raises(UserError, match="neither a folder here nor a model the hub would give"):
        load_backbone("nobody/nothing-of-that-name")


def test_an_mp4_that_cannot_be_written(tmp_path):
    video = torch.zeros(3, 2, 16, 16)
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(UserError, match="cannot write"):
        save_video(video, tmp_path / "file" / "a.mp4")
    with pytest.raises(UserError, match="cannot write"):
        save_video(torch.zeros(3, 2, 15, 15), tmp_path / "odd.mp4")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_video_is_written_whole(tmp_path):
    ramp = torch.linspace(-1, 1, 8)[None, :, None, None].expand(3, 8, 32, 48)
    save_video(ramp, tmp_path / "a.mp4", frames_per_second=8)
    with av.open(str(tmp_path / "a.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 8
    assert frames[0].shape == (32, 48, 3)
    means = [frame.mean() for frame in frames]
    assert means == sorted(means)
    assert means[0] < 8
    assert means[-1] > 247


@pytest.mark.parametrize("content", ["diffusers", "other", "truncated", "pickled"])
def test_fine_tunes_in_one_file(tmp_path, content):
    model, weights = tmp_path / "model", tmp_path / ("tune.ckpt" if content == "pickled" else "tune.safetensors")
    backbone = SD3.tiny()
    backbone.pipeline.save_pretrained(str(model))
    own = {name: tensor + 0.5 for name, tensor in backbone.network.state_dict().items()}
    save_file(own if content == "diffusers" else {"a.weight": torch.zeros(1)}, str(weights))
    if content == "truncated":
        weights.write_bytes(weights.read_bytes()[:9])
    if content != "diffusers":
        with pytest.raises(UserError, match="tune"):
            load_backbone(model, weights=weights)
        return
    loaded = load_backbone(model, weights=weights).network.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in own.items())


def test_a_dry_run_names_terms_missing_weights_and_what_only_a_ladder_shows():
    lines = "\n".join(dry_run(load_recipe(RECIPES / "dmdr-sdxl.yaml", ["training.start_from=nowhere"])))
    assert "with cold_start; refl with clip, hpsv2" in lines
    assert "missing: " in lines
    assert "HPS_v2.1_compressed.safetensors" in lines
    assert "which has no checkpoint yet" in lines
    assert "come on top, uncounted" in lines
    one_step = ["ladder.preset=null", "ladder.sizes=[[1024,1024]]", "ladder.steps=1", "method.rl.algorithm=grpo"]
    with pytest.raises(UserError, match="at least two steps"):
        dry_run(load_recipe(RECIPES / "dmdr-sdxl.yaml", one_step))


def test_a_model_in_one_file_is_told_where_it_belongs(tmp_path):
    (tmp_path / "tune.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"name it as model\.weights beside its base"):
        locate(tmp_path / "tune.safetensors")
    with pytest.raises(UserError, match="nothing of that name"):
        locate(tmp_path / "tune")
