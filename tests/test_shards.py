"""Teacher samples as shards: whole or not there, the same however many processes made them, readable by webdataset."""

from __future__ import annotations

import json
import shutil
import tarfile
import threading

import pytest
import torch
import webdataset

from conftest import method_recipe, some_shards
from stepladder.backbones import backbones
from stepladder.data.shards import ImageShards, write_shard
from stepladder.errors import UserError
from stepladder.images import png_bytes
from stepladder.resample import shrink
from stepladder.synthesis import FACTS_FILE, Synthesis, _claim, process_device, synthesize
from stepladder.training.trainer import Run, latest_state, train

PROMPTS = ["a red circle", "a blue square", "a green star", "a ring", "a cross"]
WANTED = Synthesis(steps=2, guidance_scale=2.0, size=(32, 32), shard_size=2)


def content(folder):
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            found |= {member.name: archive.extractfile(member).read() for member in archive}
    return found


def test_shards_do_not_depend_on_how_many_processes_made_them_or_on_a_pause(tmp_path):
    backbone = backbones()["sd3"].tiny()
    assert synthesize(backbone, PROMPTS, tmp_path / "one", WANTED, batch=3) == 5
    for rank in (1, 0):
        synthesize(backbone, PROMPTS, tmp_path / "two", WANTED, batch=1, rank=rank, world_size=2)
    assert content(tmp_path / "one").keys() == content(tmp_path / "two").keys()
    for name, data in content(tmp_path / "one").items():
        if not name.endswith(".png"):
            assert data == content(tmp_path / "two")[name]
    pictures = [ImageShards(tmp_path / name).load(range(5), (32, 32)) for name in ("one", "two")]
    torch.testing.assert_close(*pictures, rtol=0, atol=2.1 / 127.5)
    (tmp_path / "one" / "000001.tar").unlink()
    before = (tmp_path / "one" / "000000.tar").stat().st_mtime_ns
    assert synthesize(backbone, PROMPTS, tmp_path / "one", WANTED, batch=3) == 2
    assert (tmp_path / "one" / "000000.tar").stat().st_mtime_ns == before
    assert len(ImageShards(tmp_path / "one")) == 5


def test_other_settings_prompts_or_folders_are_refused(tmp_path):
    backbone = backbones()["sd3"].tiny()
    synthesize(backbone, PROMPTS[:2], tmp_path, WANTED)
    with pytest.raises(UserError, match="another steps"):
        synthesize(backbone, PROMPTS[:2], tmp_path, Synthesis(3, 2.0, (32, 32), shard_size=2))
    with pytest.raises(UserError, match="another prompts"):
        synthesize(backbone, PROMPTS[1:3], tmp_path, WANTED)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        synthesize(backbone, PROMPTS[:2], tmp_path / "other", WANTED)


def test_an_interrupted_synthesis_leaves_no_half_shard(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="No space left"):
        write_shard(tmp_path / "000000.tar", [("0", {"txt": b"a"})])
    assert list(tmp_path.iterdir()) == []


def test_webdataset_reads_our_shards(tmp_path):
    folder = some_shards(backbones()["sd3"].tiny(), tmp_path)
    samples = list(webdataset.WebDataset(str(folder / "000000.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == ["000000", "000001", "000002"]
    assert samples[1]["txt"] == b"a thing number 1"
    assert samples[1]["png"][:4] == b"\x89PNG"


def test_pictures_come_back_and_are_fitted(tmp_path):
    image = torch.linspace(-1, 1, 3 * 8 * 12).reshape(3, 8, 12)
    write_shard(tmp_path / "0.tar", [("a", {"png": png_bytes(image), "txt": "ä".encode()})])
    shards = ImageShards(tmp_path)
    assert shards.prompts == ["ä"]
    torch.testing.assert_close(shards.load([0], (8, 12))[0], image, rtol=0, atol=1.01 / 127.5)
    assert shards.load([0, 0], (4, 4)).shape == (2, 3, 4, 4)


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([("a", {"png": b"not a picture", "txt": b"x"})], "cannot be read"),
        ([("a", {"txt": b"x"})], "needs both"),
        ([("a", {"png": b"x"})], "needs both"),
        ([], "hold no pictures"),
        ([("a", {"json": json.dumps({}).encode()})], "hold no pictures"),
    ],
)
def test_bad_shards_are_named(tmp_path, members, words):
    write_shard(tmp_path / "0.tar", members)
    with pytest.raises(UserError, match=words):
        ImageShards(tmp_path).load([0], (8, 8))


def test_damaged_and_missing_shards_are_named(tmp_path):
    with pytest.raises(UserError, match=r"no \.tar shards"):
        ImageShards(tmp_path)
    folder = some_shards(backbones()["sd3"].tiny(), tmp_path / "images")
    whole = (folder / "000000.tar").read_bytes()
    (folder / "000000.tar").write_bytes(whole[:700])
    with pytest.raises(UserError, match=r"damaged|needs both"):
        ImageShards(folder)


@pytest.mark.parametrize("name", sorted(backbones()))
def test_encoding_is_the_inverse_of_what_decoding_expects(name, generator):
    backbone = backbones()[name].tiny()
    video = len(backbone.default_size) == 3
    images = torch.rand(2, 3, *((5,) if video else ()), 32, 32, generator=generator) * 2 - 1
    latents = backbone.encode_images(images)
    assert tuple(latents.shape[2:]) == backbone.latent_size((5, 32, 32) if video else (32, 32))
    own = backbone.pipeline.vae.encode(images).latent_dist.mode()
    torch.testing.assert_close(backbone.unscale(latents), own, rtol=1e-4, atol=1e-4)
    backbone.drop_vae()
    with pytest.raises(UserError, match="VAE was dropped"):
        backbone.encode_images(images)


def test_a_batchs_images_are_shrunk_in_pixels_and_belong_to_its_prompts(tmp_path):
    backbone = backbones()["sd3"].tiny()
    run = Run.start(method_recipe("swd", backbone, tmp_path), backbone)
    rows = run.prompts.rows(0, 2)
    small, large = (step.size for step in (run.ladder.steps[0], run.ladder.steps[-1]))
    pixels = run.images.load(rows, (32, 32))
    batch = run.batch(0)
    torch.testing.assert_close(batch.real(large), backbone.encode_images(pixels))
    torch.testing.assert_close(batch.real(small), backbone.encode_images(shrink(pixels, (16, 16))))
    assert shrink(pixels, (16, 16))[0, 0, 0, 0].item() == pytest.approx(pixels[0, 0, :2, :2].mean().item(), abs=1e-6)


def test_a_run_on_images_resumes_bit_for_bit_head_and_all_and_refuses_other_images(tmp_path):
    backbone = backbones()["sd3"]

    def start(images, updates):
        model = backbone.tiny()
        recipe = method_recipe("swd", model, tmp_path)
        recipe.data.images, recipe.training.updates = images, updates
        return Run.start(recipe, model)

    images = some_shards(backbone.tiny(), tmp_path / "a")
    whole, first = start(images, 4), start(images, 2)
    train(whole, tmp_path / "whole")
    train(first, tmp_path / "parts")
    second = start(images, 4)
    second.restore(*latest_state(tmp_path / "parts"))
    train(second, tmp_path / "parts")
    for one, other in zip(whole.method.head.parameters(), second.method.head.parameters(), strict=True):
        assert torch.equal(one, other)
    for name, tensor in whole.average.items():
        assert torch.equal(tensor, second.average[name])
    other = some_shards(backbone.tiny(), tmp_path / "b", count=4)
    with pytest.raises(UserError, match=r"another (prompts|images)"):
        start(other, 4).restore(*latest_state(tmp_path / "parts"))


def test_processes_that_start_together_agree_on_the_folder(tmp_path):
    backbone, failed = backbones()["sd3"].tiny(), []

    def claim():
        try:
            _claim(tmp_path / "images", backbone, PROMPTS, WANTED)
        except UserError as error:
            failed.append(error)

    for _ in range(20):
        shutil.rmtree(tmp_path / "images", ignore_errors=True)
        threads = [threading.Thread(target=claim) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [path.name for path in (tmp_path / "images").iterdir()] == [FACTS_FILE]
    assert not failed


def test_each_process_takes_the_card_that_torchrun_gives_it(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr("stepladder.synthesis.pick_device", lambda choice: torch.device(choice))
    assert process_device("cuda") == torch.device("cuda", 3)
    assert process_device("cuda:1") == torch.device("cuda", 1)
    assert process_device("cpu") == torch.device("cpu")


def test_shards_of_tar_with_a_leading_dot_are_read(tmp_path):
    some = some_shards(backbones()["sd3"].tiny(), tmp_path / "made")
    (tmp_path / "dotted").mkdir()
    with tarfile.open(next(some.glob("*.tar"))) as source, tarfile.open(tmp_path / "dotted" / "0.tar", "w") as target:
        for member in source:
            content = source.extractfile(member)
            member.name = f"./{member.name}"
            target.addfile(member, content)
    assert ImageShards(tmp_path / "dotted").prompts == ImageShards(some).prompts
