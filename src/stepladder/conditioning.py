"""What prompts become once the text encoders have read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """Named tensors, each (B, …), that a network takes beside the noisy state."""

    tensors: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    @property
    def like(self) -> Tensor:
        """Nothing, in float32, where the conditioning lies: what states are made like, whatever the embeddings' own precision."""
        return torch.empty(0, device=next(iter(self.tensors.values())).device)

    def rows(self, index: Sequence[int] | slice) -> Conditioning:
        """The conditioning of some prompts."""
        return Conditioning({name: tensor[index] for name, tensor in self.tensors.items()})

    def expand(self, count: int) -> Conditioning:
        """One prompt's conditioning for `count` samples."""
        return Conditioning({name: tensor.expand(count, *tensor.shape[1:]) for name, tensor in self.tensors.items()})

    def to(self, device: torch.device | str) -> Conditioning:
        """The same on another device."""
        return Conditioning({name: tensor.to(device) for name, tensor in self.tensors.items()})

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Stack conditionings of several batches."""
        return Conditioning({name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors})
