"""The world's words: a CLIP tokenizer that knows them whole, and two small CLIP text encoders taught what they mean."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from stepladder.precision import autocast, pick_device
from stepladder.world.captions import VOCABULARY, describe
from stepladder.world.judge import answer_loss, answers, head_sizes
from stepladder.world.phase import Phase, run_phase, warm_then_decay
from stepladder.world.scenes import draw_scene

MAX_TOKENS = 30
ENCODER_WIDTHS = (128, 64)
END_OF_WORD = "</w>"


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent pair first, until every word is one token."""
    splits = {word: [*word[:-1], word[-1] + END_OF_WORD] for word in words}
    merges = []
    while any(len(parts) > 1 for parts in splits.values()):
        pairs = Counter(pair for parts in splits.values() for pair in zip(parts, parts[1:], strict=False))
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for word, parts in splits.items():
            merged: list[str] = []
            for part in parts:
                if merged and (merged[-1], part) == best:
                    merged[-1] += part
                else:
                    merged.append(part)
            splits[word] = merged
    return merges


def build_tokenizer() -> CLIPTokenizer:
    """A CLIPTokenizer in which each word of the world is one token and any other text is spelt in bytes."""
    merges = learn_merges(VOCABULARY)
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(letter + END_OF_WORD for letter in alphabet), *("".join(pair) for pair in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)


def tokenize(tokenizer: CLIPTokenizer, prompts: list[str]) -> Tensor:
    """Token ids, (B, MAX_TOKENS), padded as the stock pipeline pads them."""
    options = {"padding": "max_length", "max_length": MAX_TOKENS, "truncation": True, "return_tensors": "pt"}
    return tokenizer(prompts, **options).input_ids


def build_text_encoder(tokenizer: CLIPTokenizer, width: int) -> CLIPTextModelWithProjection:
    """An untrained CLIP text encoder of three layers."""
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=width,
            num_hidden_layers=3,
            num_attention_heads=width // 32,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_silent_t5() -> tuple[T5Tokenizer, T5EncoderModel]:
    """A T5 whose output is zero: what StableDiffusion3Pipeline itself puts in the place of a T5 that was left out.

    Stock `from_pretrained` insists on all three text encoders unless told otherwise; with this one it needs no telling.
    """
    config = T5Config(vocab_size=8, d_model=sum(ENCODER_WIDTHS), d_kv=8, d_ff=8, num_layers=1, num_heads=1)
    encoder = T5EncoderModel(config).eval().requires_grad_(False)
    encoder.encoder.final_layer_norm.weight.zero_()
    return T5Tokenizer(extra_ids=0), encoder


def encode_tokens(encoders: list[CLIPTextModelWithProjection], ids: Tensor, extra: int = 0) -> tuple[Tensor, Tensor]:
    """What StableDiffusion3Pipeline makes of its two CLIP encoders: `prompt_embeds` and `pooled_prompt_embeds`.

    Args:
        encoders: the two encoders.
        ids: (B, MAX_TOKENS).
        extra: zero tokens from the silent T5 (`max_sequence_length` of the stock call).

    Returns:
        (B, MAX_TOKENS + extra, sum of widths) and (B, sum of widths).
    """
    outputs = [encoder(ids, output_hidden_states=True) for encoder in encoders]
    hidden = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    hidden = torch.nn.functional.pad(hidden, (0, 0, 0, extra))
    return hidden, torch.cat([output.text_embeds for output in outputs], dim=-1)


def train_text_encoders(folder: Path, steps: int, seed: int) -> tuple[CLIPTokenizer, list[CLIPTextModelWithProjection]]:
    """Teach both encoders to read a caption: linear heads on the pooled embedding must tell every attribute."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    encoders = [build_text_encoder(tokenizer, width) for width in ENCODER_WIDTHS]
    device = pick_device("auto")
    heads = nn.ModuleList([nn.Linear(width, sum(head_sizes())) for width in ENCODER_WIDTHS])
    modules = nn.ModuleList([*encoders, heads]).to(device)
    optimizer = torch.optim.AdamW(modules.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=1e-3)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        rng = random.Random(f"text/{seed}/{step}")
        scenes = [draw_scene(rng) for _ in range(128)]
        ids = tokenize(tokenizer, [describe(scene, rng) for scene in scenes]).to(device)
        truth = answers(scenes).to(device)
        with autocast(device, "auto"):
            logits = [head(encoder(ids).text_embeds) for head, encoder in zip(heads, encoders, strict=True)]
        return torch.stack([answer_loss(item.float(), truth) for item in logits]).sum()

    run_phase(Phase("text", {"all": modules}, [optimizer], steps, loss, warm_then_decay(50, steps)), folder, seed)
    return tokenizer, [encoder.to("cpu").eval().requires_grad_(False) for encoder in encoders]
