"""What all backbones share: loading a pipeline safely, sketching one without weights, and toy parts for `tiny()`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from transformers.utils import logging as transformers_logging

from stepladder.errors import UserError

# component -> (class name in diffusers or transformers, configuration)
Blueprint = Mapping[str, tuple[str, Mapping[str, Any]]]

CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "projection_dim": 768}
CLIP_G = {
    **{"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20},
    **{"projection_dim": 1280, "hidden_act": "gelu"},
}
T5_XXL = {
    **{"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64},
    **{"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}


def kl_vae(channels: int, scaling: float, shift: float | None = None, quant: bool = True) -> tuple[str, dict[str, Any]]:
    """The image VAE of the Stable Diffusion family, eight times down."""
    return "AutoencoderKL", {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "latent_channels": channels,
        "scaling_factor": scaling,
        "shift_factor": shift,
        "use_quant_conv": quant,
        "use_post_quant_conv": quant,
    }


def load_pipeline(kind: str, path: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """`from_pretrained` with safetensors only and every network frozen in evaluation mode.

    SD3's T5 may be absent although `model_index.json` names it, as people do with large text encoders.

    Raises:
        UserError: weights are missing, truncated or pickled, or the folder's files do not fit together.
    """
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    folder = Path(path)
    without_t5 = kind == "StableDiffusion3Pipeline" and folder.is_dir() and not (folder / "text_encoder_3").is_dir()
    absent = {"text_encoder_3": None, "tokenizer_3": None} if without_t5 else {}
    weights = list(folder.glob("*/*.safetensors")) if folder.is_dir() else []
    # folders saved with a variant hold model.fp16.safetensors and no plain file
    variant = {"variant": "fp16"} if weights and all(".fp16." in file.name for file in weights) else {}
    try:
        pipeline = getattr(diffusers, kind).from_pretrained(str(path), use_safetensors=True, dtype=dtype, **absent, **variant)
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path} cannot be loaded as {kind}: {first}; weights must be complete and safetensors") from error
    pipeline.set_progress_bar_config(disable=True)
    return frozen(pipeline)


def read_single_file(network: Any, weights: Path, base: Path, part: str, dtype: torch.dtype) -> Any:
    """A network of `network`'s class with the weights of one safetensors file, in diffusers' names or in the original ones.

    Raises:
        UserError: the file is missing, truncated, pickled, or another model's.
    """
    if weights.suffix != ".safetensors":
        raise UserError(f"{weights} is no safetensors file; convert it, pickled weights are never loaded")
    try:
        tensors = load_file(str(weights))
        if set(tensors) == set(network.state_dict()):
            network.load_state_dict(tensors)
            return network
        found = type(network).from_single_file(str(weights), config=str(base), subfolder=part, dtype=dtype)
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{weights} does not fit a {type(network).__name__}: {first}; give the fine-tune's own base model"
        ) from error
    return found.eval().requires_grad_(False)


def frozen(pipeline: Any) -> Any:
    """The pipeline with every network in evaluation mode and no gradient."""
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
    return pipeline


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a model's folder."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable JSON ({error}); download the model again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object; download the model again")
    return content


def is_hub_id(path: str) -> bool:
    """Whether a string could name a model on the hub: `owner/name`, and nothing that starts a path."""
    return path.count("/") == 1 and not path.startswith((".", "/", "~")) and not path.endswith("/")


def locate(path: str | Path) -> Path:
    """The folder with a model's configurations: a local one, or those of a hub id, fetched without weights.

    Raises:
        UserError: neither a folder with a pipeline nor a hub id that can be reached.
    """
    folder = Path(path)
    if folder.is_dir() or not is_hub_id(str(path)):
        if not (folder / "model_index.json").is_file():
            if folder.is_file():
                raise UserError(
                    f"{path} is one file and no pipeline's folder: name it as model.weights beside its base, or make a folder "
                    "of it with diffusers' from_single_file and save_pretrained"
                )
            why = "it has no model_index.json" if folder.exists() else "there is nothing of that name"
            raise UserError(f"{path} is no diffusers pipeline ({why}); point at a pipeline's folder")
        return folder
    try:
        return Path(snapshot_download(str(path), allow_patterns=["*.json", "*/*.json"]))
    except Exception as error:
        raise UserError(
            f"{path} is neither a folder here nor a model the hub would give ({type(error).__name__}); check the name, or download "
            "the model and give its folder"
        ) from error


def read_blueprint(folder: Path) -> tuple[str, Blueprint]:
    """The pipeline class of a folder and the configurations of its parts; no weights are read."""
    index = read_json(folder / "model_index.json")
    blueprint = {}
    for name, entry in index.items():
        if not (isinstance(entry, list) and len(entry) == 2 and entry[0] in ("diffusers", "transformers")):
            continue
        for file in ("config.json", "scheduler_config.json"):
            if (folder / name / file).is_file() and "okenizer" not in str(entry[1]):
                blueprint[name] = (str(entry[1]), read_json(folder / name / file))
    return str(index.get("_class_name")), blueprint


def sketch_pipeline(
    kind: str, blueprint: Blueprint, device: torch.device | str = "meta", dtype: torch.dtype = torch.float32
) -> Any:
    """A pipeline built from configurations alone: on the meta device only shapes, elsewhere with random weights.

    Raises:
        UserError: a part is of no class that diffusers or transformers has.
    """
    parts: dict[str, Any] = {}
    before = torch.get_default_dtype()
    for name, (part, config) in blueprint.items():
        if not (hasattr(diffusers, part) or hasattr(transformers, part)):
            raise UserError(f"part {name} is a {part}, which neither diffusers nor transformers has; update them")
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device if "cheduler" not in name else "cpu"):
                if hasattr(diffusers, part):
                    parts[name] = getattr(diffusers, part).from_config(dict(config))
                else:
                    known = getattr(transformers, part)
                    parts[name] = known(known.config_class(**config))
        finally:
            torch.set_default_dtype(before)
    pipeline_class = getattr(diffusers, kind)
    names = pipeline_class._get_signature_keys(pipeline_class)[0]
    return frozen(pipeline_class(**dict.fromkeys(names) | parts))


def tiny_vae(channels: int = 4, **options: Any) -> diffusers.AutoencoderKL:
    """A four-times-down image VAE with random weights."""
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=channels,
        norm_num_groups=4,
        **{"scaling_factor": 0.8, **options},
    )


def tiny_clip(width: int, projected: bool = True) -> tuple[Any, Any]:
    """A byte-level CLIP tokenizer and a two-layer text encoder with random weights, built offline."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=16)
    config = transformers.CLIPTextConfig(
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
    return tokenizer, (transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel)(config)


def tiny_t5(width: int, multilingual: bool = False) -> tuple[Any, Any]:
    """A T5 tokenizer that knows letters only, and a one-layer encoder with random weights, built offline."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -2.0), *((chr(97 + i), -3.0 - 0.01 * i) for i in range(26))]
    tokenizer = transformers.T5Tokenizer(vocab=pieces, extra_ids=0)
    sizes = {"vocab_size": len(pieces), "d_model": width, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    if multilingual:
        return tokenizer, transformers.UMT5EncoderModel(transformers.UMT5Config(**sizes))
    return tokenizer, transformers.T5EncoderModel(transformers.T5Config(**sizes))
