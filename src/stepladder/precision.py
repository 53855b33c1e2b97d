"""Devices and autocast: bf16 where the hardware computes in it, never silently elsewhere."""

from __future__ import annotations

import contextlib
import platform
from importlib.metadata import version

import torch

from stepladder.errors import UserError


def pick_device(name: str) -> torch.device:
    """`auto` takes a GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"unknown device {name!r}; use auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("this PyTorch sees no GPU; use device cpu or install a CUDA build")
    return device


def has_fast_bf16(device: torch.device) -> bool:
    """Whether matrix products in bf16 are faster than in fp32 there."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def weight_dtype(name: str, device: torch.device) -> torch.dtype:
    """The precision of weights that are not trained: `bf16`, `fp32`, or `auto`, which is bf16 on a GPU."""
    half = name == "bf16" or (name == "auto" and device.type == "cuda")
    return torch.bfloat16 if half else torch.float32


def machine(device: torch.device) -> str:
    """A device in words: the card, or the processor and how many of its threads are used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def describe(device: torch.device) -> str:
    """The machine and the versions that a figure of time was measured with, in words."""
    return ", ".join([machine(device), *(f"{name} {version(name).split('+')[0]}" for name in ("torch", "diffusers", "peft"))])


def synchronize(device: torch.device) -> None:
    """Wait for a GPU, so that a clock read next measures what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[object]:
    """bf16 autocast for `bf16`, and for `auto` where the hardware has it; no autocast for `fp32`."""
    if precision == "bf16" or (precision == "auto" and has_fast_bf16(device)):
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()
