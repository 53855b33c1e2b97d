"""What all backbones share: loading a pipeline safely, and the toy text encoders of their `tiny()`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer
from transformers.utils import logging as transformers_logging

from stepladder.errors import UserError


def load_pipeline(kind: type[DiffusionPipeline], path: str | Path, **options: Any) -> DiffusionPipeline:
    """`from_pretrained` with safetensors only and every network frozen in evaluation mode.

    Raises:
        UserError: weights are missing, truncated or pickled, or the folder's files do not fit together.
    """
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        pipeline = kind.from_pretrained(str(path), use_safetensors=True, torch_dtype=torch.float32, **options)
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path} cannot be loaded as {kind.__name__}: {first}; weights must be complete and safetensors") from error
    pipeline.set_progress_bar_config(disable=True)
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
    return pipeline


def tiny_clip(width: int) -> tuple[CLIPTokenizer, CLIPTextModelWithProjection]:
    """A byte-level CLIP tokenizer and a two-layer text encoder with random weights, built offline."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=[], model_max_length=16)
    config = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=width,
        intermediate_size=width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer, CLIPTextModelWithProjection(config)


def tiny_t5(width: int) -> tuple[T5Tokenizer, T5EncoderModel]:
    """A T5 tokenizer that knows special tokens only, and a one-layer encoder with random weights, built offline."""
    config = T5Config(vocab_size=8, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return T5Tokenizer(extra_ids=0), T5EncoderModel(config)
