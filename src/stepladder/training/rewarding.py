"""From latents to rewards: a decoder, perhaps a tiny one, and the recipe's rewards on what it shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import diffusers
import torch
from torch import Tensor

from stepladder.backbones.base import Backbone
from stepladder.errors import UserError
from stepladder.images import still
from stepladder.methods.reinforcement import RLTerm
from stepladder.rewards import build_reward
from stepladder.rewards.base import Reward


@dataclass(frozen=True)
class Rewarder:
    """Decodes latents and scores the pictures; of video, the middle frame.

    decode: latents (B, C, …) to pictures (B, 3, …), with a graph · crop: side in latent pixels of the square that is decoded.
    """

    decode: Callable[[Tensor], Tensor]
    reward: Reward
    crop: int | None = None

    @classmethod
    def of(cls, term: RLTerm, backbone: Backbone, device: torch.device) -> Rewarder:
        """As a recipe's term says.

        Raises:
            UserError: ReFL with a reward that passes no gradient, or a decoder or a reward that cannot be loaded.
        """
        reward = build_reward(term.rewards, device)
        if term.algorithm == "refl" and not reward.differentiable:
            raise UserError("refl follows the reward's gradient, and one of these rewards has none; use dpo or grpo with it")
        decode = tiny_decoder(term.decoder, device) if term.decoder is not None else backbone.decode_with_graph
        return cls(decode, reward, term.crop)

    def scoring(self, prompts: Sequence[str], generator: torch.Generator) -> Callable[[Tensor], Tensor]:
        """Latents (k B, C, …) of B prompts, k times over, to rewards (k B,); activations are not kept, but made again."""

        def score(latents: Tensor) -> Tensor:
            cut = cropped(latents.float(), self.crop, generator)
            texts = list(prompts) * (len(latents) // len(prompts))
            if not torch.is_grad_enabled():
                return self._seen(cut, texts)
            return torch.utils.checkpoint.checkpoint(self._seen, cut, texts, use_reentrant=False)  # type: ignore[no-any-return]

        return score

    def _seen(self, latents: Tensor, texts: Sequence[str]) -> Tensor:
        # what no picture can hold must not be rewarded
        pictures = still(self.decode(latents)).clamp(-1, 1)
        return self.reward(pictures, texts).float()


def cropped(latents: Tensor, side: int | None, generator: torch.Generator) -> Tensor:
    """A random square of `side` latent pixels, the same in the whole batch; everything where the latents are no larger."""
    height, width = latents.shape[-2:]
    if side is None or side >= min(height, width):
        return latents
    top, left = (int(torch.randint(length - side + 1, (), generator=generator)) for length in (height, width))
    return latents[..., top : top + side, left : left + side]


def tiny_decoder(path: str, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The decoder of an AutoencoderTiny, which takes the network's latents as they are.

    Raises:
        UserError: nothing of that kind loads from there.
    """
    try:
        vae = diffusers.AutoencoderTiny.from_pretrained(path, use_safetensors=True)
    except Exception as error:
        raise UserError(f"decoder {path} cannot be loaded as AutoencoderTiny: {str(error).splitlines()[0]}") from error
    vae = vae.to(device).eval().requires_grad_(False)
    return lambda latents: vae.decode(latents.to(vae.dtype)).sample.float()
