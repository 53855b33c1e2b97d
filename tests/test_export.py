"""Students leave the house: stock diffusers loads them, the drop-in scheduler draws what our own loop draws."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file

from conftest import tiny_recipe
from stepladder.backbones import backbones, load_backbone
from stepladder.backbones.sd3 import SD3
from stepladder.distillation import export_run
from stepladder.errors import UserError
from stepladder.export import LORA_FILE, load_student
from stepladder.roles import Role
from stepladder.samplers import Sampler, sample
from stepladder.scheduler import LadderScheduler
from stepladder.training.trainer import Run, train_update


@pytest.fixture
def exported(tmp_path):
    """A tiny pipeline on disk, and a LoRA student of it after a few large updates."""
    model = tmp_path / "model"
    SD3.tiny().pipeline.save_pretrained(str(model))
    recipe = tiny_recipe(tmp_path, student_learning_rate=2e-2)
    recipe.model.path = str(model)
    run = Run.start(recipe, load_backbone(model, 4))
    for _ in range(3):
        train_update(run)
    return run, model, export_run(run, tmp_path / "student")


CALL = {
    "height": 16,
    "width": 16,
    "num_inference_steps": 4,
    "guidance_scale": 1,
    "max_sequence_length": 4,
    "output_type": "pt",
}


def stock_pipeline(model, folder, lora):
    """What the README tells users to write."""
    pipe = StableDiffusion3Pipeline.from_pretrained(str(model))
    pipe.set_progress_bar_config(disable=True)
    if lora:
        pipe.load_lora_weights(str(folder))
    pipe.scheduler = LadderScheduler.from_pretrained(str(folder))
    return pipe


def test_stock_diffusers_draws_the_students_image(exported):
    run, model, folder = exported
    student = load_student(folder, device="cpu")
    noise_seed = 7
    sampler = Sampler(student.student, student.ladder, 1.0, student.options)
    conditioning = student.backbone.encode(["a red circle"])
    latents = sample(sampler, student.backbone, conditioning, student.backbone.encode([""]), [noise_seed], precision="fp32")
    ours = student.backbone.decode(latents)

    start = student.ladder.steps[0].size
    noise = torch.randn((1, 4, *start), generator=torch.Generator().manual_seed(noise_seed))
    with_lora, without = (
        stock_pipeline(model, folder, lora)("a red circle", latents=noise, **CALL).images for lora in (True, False)
    )
    torch.testing.assert_close(with_lora * 2 - 1, ours, rtol=0, atol=1e-4)
    assert (without - with_lora).abs().max() > 1e-3


def test_no_key_is_lost_on_the_way(exported):
    run, model, folder = exported
    pipe = StableDiffusion3Pipeline.from_pretrained(str(model))
    pipe.load_lora_weights(str(folder), adapter_name="s")
    loaded = {n.replace(".s.", "."): p for n, p in pipe.transformer.named_parameters() if "lora_" in n}
    assert loaded.keys() == run.average.keys()
    for name, tensor in run.average.items():
        torch.testing.assert_close(loaded[name].data, tensor)
    scales = {layer.scaling["s"] for layer in pipe.transformer.modules() if hasattr(layer, "scaling") and layer.scaling}
    assert scales == {1.0}


def test_the_drop_in_scheduler_repeats_itself_from_the_users_seed(exported):
    _, model, folder = exported
    pipe = stock_pipeline(model, folder, lora=True)
    pipe.scheduler.register_to_config(mix=0.2)
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
    assert "load_lora_weights" in (folder / "README.md").read_text(encoding="utf-8")


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


@pytest.mark.parametrize("damage", ["no folder", "not json", "unknown class", "truncated weights", "pickled weights"])
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
