"""Tensors to PNG files, and video to mp4."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stepladder.storage import written_beside


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] to 0 … 255."""
    return ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def to_pil(image: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] to an RGB picture."""
    return Image.fromarray(np.ascontiguousarray(to_uint8(image).permute(1, 2, 0).cpu().numpy()))


def grid(images: Tensor, columns: int, gap: int = 2) -> Tensor:
    """Lay (B, 3, H, W) out in rows of `columns` with white gaps: (3, rows (H + gap) - gap, …)."""
    batch, _, height, width = images.shape
    rows = -(-batch // columns)
    sheet = images.new_ones(3, rows * (height + gap) - gap, columns * (width + gap) - gap)
    for index, image in enumerate(images):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        sheet[:, top : top + height, left : left + width] = image
    return sheet


def still(images: Tensor) -> Tensor:
    """Images as they are; of video, (B, 3, T, H, W), the middle frame."""
    return images[:, :, images.shape[2] // 2] if images.ndim == 5 else images


def save_video(video: Tensor, path: Path, frames_per_second: int = 16) -> None:
    """Write one video, (3, T, H, W) in [-1, 1], as H.264 in mp4; UserError where it cannot be written."""
    frames = to_uint8(video).permute(1, 2, 3, 0).cpu().numpy()
    with written_beside(path, av.error.FFmpegError) as beside, av.open(str(beside), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=frames_per_second)
        stream.height, stream.width = frames.shape[1], frames.shape[2]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "18"}
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def save_image(image: Tensor, path: Path) -> None:
    """Write one PNG; UserError where it cannot be written."""
    with written_beside(path) as beside:
        to_pil(image).save(beside, format="PNG")


def save_grid(images: Tensor, path: Path, columns: int) -> None:
    """Write a grid of images as one PNG."""
    save_image(grid(images, columns), path)


def png_bytes(image: Tensor) -> bytes:
    """One image as PNG bytes."""
    buffer = io.BytesIO()
    to_pil(image).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def png_address(content: bytes) -> str:
    """PNG bytes as a data address, for pages that open offline."""
    return "data:image/png;base64," + base64.b64encode(content).decode()
