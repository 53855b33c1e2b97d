"""Students leave the house: stock diffusers, ComfyUI's names and merged folders all draw what our own loop draws."""

from __future__ import annotations

import json
import shutil

import diffusers
import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from conftest import method_recipe
from stepladder.backbones import backbones, load_backbone
from stepladder.backbones.sd3 import SD3
from stepladder.distillation import export_run
from stepladder.errors import UserError
from stepladder.export import (
    COMFY_FILE,
    LORA_FILE,
    export_comfyui,
    export_merged,
    load_student,
    lora_layers,
    read_card,
    read_scheduler,
    read_weights,
)
from stepladder.packing import pack
from stepladder.pipeline import LadderPipeline
from stepladder.roles import Role
from stepladder.samplers import Sampler, sample
from stepladder.scheduler import LadderScheduler
from stepladder.training.trainer import Run, train_update


def distilled(folder, name, method="rmd"):
    """A tiny pipeline on disk, and a LoRA student of it after a few large updates: run, model folder, student folder."""
    backbone, model = backbones()[name].tiny(), folder / "model"
    backbone.pipeline.save_pretrained(str(model))
    recipe = method_recipe(method, backbone, folder, {"inference_alpha": 0.5} if method == "rmd" else {})
    recipe.training.student_learning_rate = 2e-2
    recipe.model.path = str(model)
    if method == "swd":
        video = len(backbone.default_size) == 3
        sizes = [(5, 16, 16), (9, 16, 16), (9, 32, 32)] if video else [(16, 16), (24, 24), (32, 32)]
        recipe.ladder.sizes, recipe.ladder.thresholds = sizes, []
        recipe.ladder.allocation, recipe.ladder.shift = [1, 1, 2], "none"
    run = Run.start(recipe, load_backbone(model, backbone.max_sequence_length))
    for _ in range(2):
        train_update(run)
    return run, model, export_run(run, folder / "student")


@pytest.fixture
def exported(tmp_path):
    """The student of a tiny SD3."""
    return distilled(tmp_path, "sd3")


CALL = {"height": 16, "width": 16, "num_inference_steps": 4, "guidance_scale": 1, "max_sequence_length": 4, "output_type": "pt"}
SPATIAL = [name for name in sorted(backbones()) if not backbones()[name].tiny().rung_by_rung]


def stock_pipeline(model, folder, backbone):
    """What the exported README tells users to write."""
    pipe = getattr(diffusers, backbone.pipeline_class).from_pretrained(str(model))
    pipe.set_progress_bar_config(disable=True)
    if backbone.loads_lora:
        pipe.load_lora_weights(str(folder))
    else:
        setattr(pipe, backbone.denoiser, PeftModel.from_pretrained(getattr(pipe, backbone.denoiser), str(folder)))
    pipe.scheduler = LadderScheduler.from_pretrained(str(folder))
    return pipe


def own_latents(student, sampler, seed, prompt="a red circle"):
    """Our own loop's latents."""
    size = student.backbone.pixel_size(student.ladder.size)
    conditioning, unconditional = student.backbone.encode([prompt], size), student.backbone.unconditional("", size)
    return sample(sampler, student.backbone, conditioning, unconditional, [seed], precision="fp32")


def users_noise(student, seed):
    """The first rung's noise as `torch.randn` gives it."""
    size = student.ladder.steps[0].size
    return torch.randn((1, student.backbone.latent_channels, *size), generator=torch.Generator().manual_seed(seed))


def assert_close_relative(got, expected, tolerance):
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("name", SPATIAL)
def test_stock_diffusers_draws_the_students_latents(tmp_path, name):
    run, model, folder = distilled(tmp_path, name)
    draws_the_same(model, folder, "rmd")


@pytest.mark.parametrize("method", ["swd", "dmd2"])
def test_stock_diffusers_draws_students_that_take_fresh_noise_at_every_step(tmp_path, method):
    _, model, folder = distilled(tmp_path, "sd3", method)
    draws_the_same(model, folder, method)


def draws_the_same(model, folder, method):
    student = load_student(folder, device="cpu")
    expected = own_latents(student, student.samplers(4)[method], 7)
    naive = own_latents(student, student.samplers(4)["naive"], 7)
    pipe = stock_pipeline(model, folder, student.backbone)
    first = student.backbone.pixel_size(student.ladder.steps[0].size)
    call = student.backbone.call_options(student.backbone.pixel_size(student.ladder.size))
    if len(first) == 3:
        call["num_frames"] = first[0]
    call |= {"height": first[-2], "width": first[-1], "num_inference_steps": 4, "output_type": "latent", "return_dict": False}
    drawn = pipe("a red circle", latents=users_noise(student, 7), **call)[0]
    assert_close_relative(drawn, expected, 1e-5)
    assert (naive - expected).abs().max() > 1e-2


@pytest.mark.parametrize(("name", "method"), [*((name, "rmd") for name in sorted(backbones())), ("flux", "swd"), ("wan", "swd")])
def test_the_ladder_pipeline_draws_the_students_picture_and_needs_no_telling(tmp_path, name, method):
    _, model, folder = distilled(tmp_path, name, method)
    student = load_student(folder, device="cpu")
    ours = student.backbone.decode(own_latents(student, student.samplers(4)[method], 7))
    pipe = LadderPipeline.from_pretrained(model, student=folder)
    pipe.set_progress_bar_config(disable=True)
    noise = users_noise(student, 7)
    result = pipe("a red circle", latents=pack(noise) if student.backbone.packs_latents else noise, output_type="pt")
    picture = result.frames.transpose(1, 2) if hasattr(result, "frames") else result.images
    torch.testing.assert_close(picture * 2 - 1, ours, rtol=0, atol=1e-4)
    again = [
        pipe(["x", "y"], generator=torch.Generator().manual_seed(1), output_type="latent", return_dict=False)[0] for _ in range(2)
    ]
    assert torch.equal(*again)
    assert len(again[0]) == 2
    with pytest.raises(UserError, match="leave out height and width"):
        pipe("a", height=8)
    with pytest.raises(UserError, match="belongs to the student's ladder"):
        pipe("a", num_inference_steps=28)


@pytest.mark.parametrize("name", [name for name in sorted(backbones()) if backbones()[name].loads_lora])
def test_no_key_is_lost_on_the_way(tmp_path, name):
    run, model, folder = distilled(tmp_path, name)
    pipe = getattr(diffusers, run.backbone.pipeline_class).from_pretrained(str(model))
    pipe.load_lora_weights(str(folder), adapter_name="s")
    network = getattr(pipe, run.backbone.denoiser)
    loaded = {n.replace(".s.", "."): p for n, p in network.named_parameters() if "lora_" in n}
    assert loaded.keys() == run.average.keys()
    for key, tensor in run.average.items():
        torch.testing.assert_close(loaded[key].data, tensor)
    assert {layer.scaling["s"] for layer in network.modules() if getattr(layer, "scaling", None)} == {1.0}


@pytest.mark.parametrize("name", sorted(backbones()))
def test_comfyui_gets_its_names_alphas_and_the_ladder(tmp_path, name):
    run, _, folder = distilled(tmp_path, name)
    card = read_card(folder)
    export_comfyui(run.backbone, read_weights(folder, card, run.backbone), read_scheduler(folder), card, tmp_path / "comfyui")
    path = tmp_path / "comfyui" / COMFY_FILE
    content = load_file(str(path))
    layers = lora_layers(run.average)
    assert len(content) == 3 * len(layers)
    for layer in layers:
        key = run.backbone.comfy_key(layer)
        assert content[f"{key}.alpha"] == content[f"{key}.lora_down.weight"].shape[0]
        torch.testing.assert_close(content[f"{key}.lora_up.weight"], run.average[f"{layer}.lora_B.weight"])
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["latent_sizes"]) == [list(step.size) for step in run.ladder.steps]
    sigmas = json.loads(metadata["sigmas"])
    assert len(sigmas) == len(run.ladder.steps) + 1
    assert sigmas[-1] == 0
    assert sigmas[0] == pytest.approx({"sdxl": 14.61, "pixart": 157.41}.get(name, 1.0), rel=1e-3)


def test_diffusers_own_converter_reads_wans_comfyui_names_back(tmp_path):
    run, model, folder = distilled(tmp_path, "wan")
    card = read_card(folder)
    export_comfyui(run.backbone, read_weights(folder, card, run.backbone), read_scheduler(folder), card, tmp_path / "comfyui")
    pipe = diffusers.WanPipeline.from_pretrained(str(model))
    pipe.load_lora_weights(str(tmp_path / "comfyui"), weight_name=COMFY_FILE, adapter_name="s")
    loaded = {n.replace(".s.", "."): p for n, p in pipe.transformer.named_parameters() if "lora_" in n}
    assert loaded.keys() == run.average.keys()
    for key, tensor in run.average.items():
        torch.testing.assert_close(loaded[key].data, tensor)


@pytest.mark.parametrize("name", sorted(backbones()))
def test_a_merged_student_is_a_complete_pipeline(tmp_path, name):
    run, model, folder = distilled(tmp_path, name)
    student = load_student(folder, device="cpu")
    expected = own_latents(student, student.samplers(4)["rmd"], 7)
    export_merged(load_student(folder, with_teacher=False, device="cpu"), read_scheduler(folder), tmp_path / "merged")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(str(tmp_path / "merged"))
    assert isinstance(pipeline.scheduler, LadderScheduler)
    again = backbones()[name](pipeline, "merged", student.backbone.max_sequence_length)
    sampler = Sampler(Role(again, again.network), student.ladder, 1.0, student.options)
    conditioning = student.backbone.encode(["a red circle"], student.backbone.pixel_size(student.ladder.size))
    drawn = sample(sampler, again, conditioning, conditioning, [7], precision="fp32")
    assert_close_relative(drawn, expected, 1e-5)
    with pytest.raises(UserError, match="merged export"):
        load_student(tmp_path / "merged", device="cpu")


def test_the_drop_in_scheduler_repeats_itself_from_the_users_seed(exported):
    run, model, folder = exported
    pipe = stock_pipeline(model, folder, run.backbone)
    first, second, other = (pipe("x", generator=torch.Generator().manual_seed(seed), **CALL).images for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert first.shape[-1] == 32


def test_a_wrong_number_of_steps_or_size_is_refused(exported):
    _, _, folder = exported
    scheduler = LadderScheduler.from_pretrained(str(folder))
    with pytest.raises(UserError, match="num_inference_steps=4"):
        scheduler.set_timesteps(28)
    scheduler.set_timesteps(4)
    with pytest.raises(UserError, match="first rung"):
        scheduler.step(torch.zeros(1, 4, 8, 8), scheduler.timesteps[0], torch.zeros(1, 4, 8, 8))


def test_the_export_remembers_ladder_and_weights(exported):
    run, _, folder = exported
    student = load_student(folder, device="cpu")
    assert [step.size for step in student.ladder.steps] == [step.size for step in run.ladder.steps]
    assert [step.timestep for step in student.ladder.steps] == pytest.approx([step.timestep for step in run.ladder.steps])
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "load_lora_weights" in card
    assert "height=16, width=16, num_inference_steps=4" in card


def test_the_card_holds_what_was_measured(exported, tmp_path):
    run, _, folder = exported
    assert "No figures were measured" in (folder / "README.md").read_text(encoding="utf-8")
    figures = {"rmd": {"nfe": 4, "prompt_accuracy": 0.8125, "fid": 0.51, "samples": 64, "seed": 3}}
    card = (export_run(run, tmp_path / "again", figures) / "README.md").read_text(encoding="utf-8")
    assert "seed 3" in card
    assert "| rmd | 4 | 0.812 | 0.51 | 64 |" in card


def test_the_student_alone_draws_the_same_with_half_the_memory(exported):
    _, _, folder = exported
    both, alone = load_student(folder, device="cpu"), load_student(folder, with_teacher=False, device="cpu")
    assert alone.teacher is None
    x, t = torch.randn(1, 4, 8, 8), torch.tensor(500.0)
    conditioning = both.backbone.encode(["a"])
    with torch.no_grad():
        torch.testing.assert_close(both.student(x, t, conditioning).x0, alone.student(x, t, conditioning).x0)
        assert not torch.equal(both.student(x, t, conditioning).x0, both.teacher(x, t, conditioning).x0)


def test_a_student_of_another_base_is_refused(exported):
    _, model, folder = exported
    other = SD3.tiny()
    with torch.no_grad():
        for parameter in other.network.parameters():
            parameter.add_(0.1)
    other.pipeline.save_pretrained(str(model))
    with pytest.raises(UserError, match="use its own base"):
        load_student(folder, device="cpu")


def test_truncated_missing_and_foreign_students_are_refused(exported, tmp_path):
    _, _, folder = exported
    weights = folder / LORA_FILE
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="truncated"):
        load_student(folder, device="cpu")
    weights.write_bytes(data)
    other = load_file(str(weights))
    name = next(iter(other))
    save_file({name.replace("transformer_blocks", "blocks"): tensor for name, tensor in other.items()}, str(weights))
    with pytest.raises(UserError, match="does not fit its base"):
        load_student(folder, device="cpu")
    save_file({name: other[name]}, str(weights))
    with pytest.raises(UserError, match="tensors, not the"):
        load_student(folder, device="cpu")
    (folder / "stepladder.json").write_text('{"model": "bundled"}', encoding="utf-8")
    with pytest.raises(UserError, match="lacks fingerprint"):
        load_student(folder, device="cpu")
    (folder / "stepladder.json").write_text('{"model"', encoding="utf-8")
    with pytest.raises(UserError, match="damaged"):
        load_student(folder, device="cpu")
    with pytest.raises(UserError, match="no exported student"):
        load_student(tmp_path, device="cpu")


def test_a_pipeline_without_its_t5_loads(tmp_path):
    model = tmp_path / "model"
    SD3.tiny().pipeline.save_pretrained(str(model))
    for part in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(model / part)
    embeds = load_backbone(model, 4).encode(["a"]).tensors["encoder_hidden_states"]
    assert embeds.shape[1] == 16 + 4
    assert (embeds[:, 16:] == 0).all()


@pytest.mark.parametrize(
    "damage", ["no folder", "not json", "unknown class", "missing part", "truncated weights", "pickled weights"]
)
def test_damaged_pipelines_are_refused(tmp_path, damage):
    model = tmp_path / "model"
    SD3.tiny().pipeline.save_pretrained(str(model))
    index, weights = model / "model_index.json", model / "transformer" / "diffusion_pytorch_model.safetensors"
    if damage == "no folder":
        model = tmp_path / "nothing"
    elif damage == "not json":
        index.write_text("{", encoding="utf-8")
    elif damage == "unknown class":
        index.write_text(json.dumps({"_class_name": "OtherPipeline"}), encoding="utf-8")
    elif damage == "missing part":
        shutil.rmtree(weights.parent)
    elif damage == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    else:
        torch.save({}, model / "transformer" / "diffusion_pytorch_model.bin")
        weights.unlink()
    with pytest.raises(UserError, match=str(model)):
        load_backbone(model, 4)


def test_a_role_is_the_only_caller_of_a_network():
    backbone = backbones()["sd3"].tiny()
    role = Role(backbone, backbone.network)
    assert role(torch.zeros(1, 4, 8, 8), torch.tensor(500.0), backbone.encode(["a"])).x0.shape == (1, 4, 8, 8)
