"""What tells one base model from another."""

from __future__ import annotations

import hashlib

from torch import nn

FINGERPRINT_VALUES = 64


def fingerprint(network: nn.Module) -> str:
    """A hash of a network's architecture and the first values of each of its own tensors; adapters do not count.

    Values are rounded to bf16 first, so that the precision in which a model is loaded does not count either.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        if "lora_" not in name:
            digest.update(f"{name.replace('.base_layer', '')} {tuple(tensor.shape)}".encode())
            digest.update(tensor.flatten()[:FINGERPRINT_VALUES].bfloat16().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
