"""LadderPipeline: a stock pipeline that knows its student, its ladder, its sizes and its guidance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from stepladder.backbones.base import Backbone
from stepladder.errors import UserError
from stepladder.export import load_student
from stepladder.scheduler import LadderScheduler

FIXED = ("num_inference_steps", "timesteps", "sigmas")


class LadderPipeline:
    """Wraps a stock diffusers pipeline; what it does not know itself (devices, offloading, LoRAs) is the pipeline's.

    A call takes what the stock pipeline takes and returns what it returns. Sizes, number of steps and guidance need not be
    given; the picture has the ladder's final size.

    Example:
        pipe = LadderPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", student="runs/flux/student")
        image = pipe("a red circle", generator=torch.Generator().manual_seed(0)).images[0]
    """

    def __init__(self, backbone: Backbone, scheduler: LadderScheduler) -> None:
        self.backbone = backbone
        self.pipeline = backbone.pipeline
        self.pipeline.scheduler = scheduler

    @classmethod
    def from_pretrained(
        cls, model: str | Path | None = None, student: str | Path = "", dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> LadderPipeline:
        """Load a base model and the student of it.

        Args:
            model: folder or hub id of the base; by default the one that the student names.
            student: the exported student's folder.

        Raises:
            UserError: the student is none, or belongs to another base.
        """
        if not student:
            raise UserError("LadderPipeline needs a student: pass student=, the folder that stepladder export or distill wrote")
        loaded = load_student(Path(student), with_teacher=False, device=device, model=model, dtype=dtype)
        return cls(loaded.backbone, LadderScheduler.from_pretrained(str(student)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["pipeline"], name)

    def to(self, *arguments: Any, **options: Any) -> LadderPipeline:
        """Move the pipeline."""
        self.pipeline.to(*arguments, **options)
        return self

    def __call__(self, *arguments: Any, output_type: str = "pil", return_dict: bool = True, **options: Any) -> Any:
        """One stock call a rung, each given the state that the one before left.

        Raises:
            UserError: a size or a schedule is asked for that is not the student's.
        """
        scheduler = self.pipeline.scheduler
        ladder = scheduler.ladder()
        final = self.backbone.pixel_size(ladder.size)
        self._check(final, options)
        given = {**self.backbone.call_options(final), **options}
        try:
            for stage in range(ladder.stages):
                steps = ladder.steps_of(stage)
                size = self.backbone.pixel_size(ladder.steps[steps[0]].size)
                frames = {"num_frames": size[0]} if len(size) == 3 else {}
                last = stage == ladder.stages - 1
                scheduler.keep_to(stage)
                own = {**given, **frames, "height": size[-2], "width": size[-1], "num_inference_steps": len(steps)}
                kind = {"output_type": output_type if last else "latent", "return_dict": return_dict if last else False}
                result = self.pipeline(*arguments, **own, **kind)
                given["latents"] = None if last else result[0]
        finally:
            scheduler.keep_to(None)
        return result

    def _check(self, final: tuple[int, ...], options: dict[str, Any]) -> None:
        for name in FIXED:
            if options.pop(name, None) is not None:
                raise UserError(f"{name} belongs to the student's ladder; leave it out")
        for name, value in zip(("height", "width"), final[-2:], strict=True):
            if options.pop(name, value) != value:
                raise UserError(f"this student makes pictures of {final[-2]}x{final[-1]}; leave out height and width")
        if len(final) == 3 and options.pop("num_frames", final[0]) != final[0]:
            raise UserError(f"this student makes videos of {final[0]} frames; leave out num_frames")
