"""The bundled teacher: a complete StableDiffusion3Pipeline at toy size, taught from scratch on the world."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from stepladder.ladder import shift_sigma
from stepladder.precision import autocast, pick_device
from stepladder.progress import progress_bar
from stepladder.renoise import gaussian
from stepladder.storage import load_tree, save_tree
from stepladder.world.autoencoder import LATENT_CHANNELS, encode_images
from stepladder.world.captions import describe
from stepladder.world.phase import Phase, run_phase, warm_then_decay
from stepladder.world.render import render
from stepladder.world.scenes import Scene, draw_scene
from stepladder.world.text import ENCODER_WIDTHS, build_silent_t5, encode_tokens, tokenize

SIZES = (64, 128)
SHIFT = 3.0
TRAINING_SHIFT = 2.0
UNCONDITIONAL = 0.1
STOCK_EXTRA_TOKENS = 256
STOCK_SHARE = 0.06


def build_transformer() -> SD3Transformer2DModel:
    """An untrained MMDiT: five joint blocks of width 192."""
    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=5,
        attention_head_dim=32,
        num_attention_heads=6,
        joint_attention_dim=sum(ENCODER_WIDTHS),
        caption_projection_dim=192,
        pooled_projection_dim=sum(ENCODER_WIDTHS),
        pos_embed_max_size=16,
    )


def scene_of(seed: int, index: int) -> Scene:
    """The scene behind row `index` of the training set."""
    return draw_scene(random.Random(f"latents/{seed}/{index}"))


def make_latents(folder: Path, vae: AutoencoderTiny, scenes: list[Scene], seed: int) -> dict[int, Tensor]:
    """Render and encode scenes at both sizes, once; later calls load the file.

    Returns:
        for each size (N, C, size/8, size/8) in half precision.
    """
    path = folder / "latents.safetensors"
    if not path.exists():
        device = pick_device("auto")
        vae.to(device)
        rows: dict[int, list[Tensor]] = {size: [] for size in SIZES}
        with progress_bar() as bar:
            task = bar.add_task("latents", total=len(scenes), note="")
            for start in range(0, len(scenes), 64):
                some = scenes[start : start + 64]
                for size in SIZES:
                    images = render(some, size, torch.Generator().manual_seed(seed + start)).to(device)
                    with autocast(device, "auto"):
                        rows[size].append(encode_images(vae, images).half().cpu())
                bar.update(task, completed=start + len(some))
        vae.to("cpu")
        save_tree(path, {str(size): torch.cat(parts) for size, parts in rows.items()})
    tree = load_tree(path)
    return {size: tree[str(size)] for size in SIZES}


def draw_sigmas(count: int, generator: torch.Generator) -> Tensor:
    """Noise levels for training: logit-normal, a fifth uniform so that both ends are seen, shifted towards noise."""
    bell = torch.sigmoid(1.2 * torch.randn(count, generator=generator))
    flat = torch.rand(count, generator=generator)
    sigma = torch.where(torch.rand(count, generator=generator) < 0.2, flat, bell)
    return shift_sigma(sigma, TRAINING_SHIFT)


def flow_loss(
    transformer: SD3Transformer2DModel, latents: Tensor, text: tuple[Tensor, Tensor], generator: torch.Generator
) -> Tensor:
    """Rectified-flow matching: the velocity eps - x0 regressed at a random noise level."""
    sigma = draw_sigmas(len(latents), generator).to(latents.device)
    noise = gaussian(tuple(latents.shape), generator, latents)
    mix = sigma[:, None, None, None]
    noisy = (1 - mix) * latents + mix * noise
    with autocast(latents.device, "auto"):
        velocity = transformer(noisy, encoder_hidden_states=text[0], pooled_projections=text[1], timestep=1000 * sigma).sample
    return (velocity.float() - (noise - latents)).square().mean()


def make_captions(
    tokenizer: CLIPTokenizer, encoders: list[CLIPTextModelWithProjection], scenes: list[Scene], seed: int
) -> tuple[Tensor, Tensor]:
    """Two paraphrases of every scene, and last the empty prompt, through the text encoders.

    Returns:
        (2 N + 1, MAX_TOKENS, D) and (2 N + 1, D) in half precision; scene i has rows 2 i and 2 i + 1.
    """
    rng = random.Random(f"captions/{seed}")
    prompts = [describe(scene, rng) for scene in scenes for _ in range(2)] + [""]
    hidden, pooled = [], []
    with progress_bar() as bar, torch.no_grad(), autocast(torch.device("cpu"), "auto"):
        task = bar.add_task("captions", total=len(prompts), note="")
        for start in range(0, len(prompts), 256):
            both = encode_tokens(encoders, tokenize(tokenizer, prompts[start : start + 256]))
            hidden.append(both[0].half())
            pooled.append(both[1].half())
            bar.advance(task, len(both[0]))
    return torch.cat(hidden), torch.cat(pooled)


def train_transformer(
    folder: Path,
    phase: str,
    size_of: Callable[[random.Random], int],
    steps: int,
    rate: float,
    transformer: SD3Transformer2DModel,
    text: tuple[Tensor, Tensor],
    latents: dict[int, Tensor],
    seed: int,
    batch: int = 64,
    favoured: Sequence[int] = (),
) -> None:
    """One phase of the transformer's training.

    Over the last third of a phase some steps also see the 256 zero tokens that a stock call of the pipeline appends from
    the silent T5, so that the teacher does not mind them.

    Args:
        size_of: draws the picture size of a step.
        text: what `make_captions` returns.
        latents: what `make_latents` returns.
        favoured: rows from which half of every batch is drawn, where there are any.
    """
    device = pick_device("auto")
    transformer.to(device)
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    hidden, pooled = text
    empty = len(pooled) - 1

    def loss(step: int, generator: torch.Generator) -> Tensor:
        rng = random.Random(f"{phase}/{seed}/{step}")
        source = latents[size_of(rng)]
        rows = [rng.choice(favoured) if favoured and rng.random() < 0.5 else rng.randrange(len(source)) for _ in range(batch)]
        said = [empty if rng.random() < UNCONDITIONAL else 2 * row + rng.randrange(2) for row in rows]
        stock = rng.random() < STOCK_SHARE and step > 2 * steps // 3
        embeds = torch.nn.functional.pad(hidden[said].float(), (0, 0, 0, STOCK_EXTRA_TOKENS if stock else 0))
        said_so = (embeds.to(device), pooled[said].float().to(device))
        return flow_loss(transformer, source[rows].float().to(device), said_so, generator)

    schedule = warm_then_decay(100, steps, decay_from=0.4)
    run_phase(Phase(phase, {"transformer": transformer}, [optimizer], steps, loss, schedule, average=0.998), folder, seed)
    transformer.to("cpu")


def build_pipeline(
    vae: AutoencoderTiny,
    tokenizer: CLIPTokenizer,
    encoders: list[CLIPTextModelWithProjection],
    transformer: SD3Transformer2DModel,
) -> StableDiffusion3Pipeline:
    """Put the parts together as stock diffusers knows them."""
    tokenizer_3, silent = build_silent_t5()
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae,
        text_encoder=encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizer,
        text_encoder_3=silent,
        tokenizer_3=tokenizer_3,
    )
