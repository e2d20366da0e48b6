"""What a decode will do, decided before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pid_lightning.checks import Mistake, check_at_least
from pid_lightning.diffusion import flow
from pid_lightning.diffusion.randomness import Generators, draw_noise
from pid_lightning.diffusion.sampling import (
    Velocity,
    few_step_times,
    sample_few_steps,
    sample_solver,
)
from pid_lightning.diffusion.tiling import Tiles
from pid_lightning.nn import PiD

TEACHER_STEPS = 25


@dataclass(frozen=True)
class Plan:
    """The size, tiles and sampler of a decode.

    Attributes:
        height, width: size of the pictures in pixels.
        tiles: what covers the pictures; None where the network sees them whole.
        student_times: times of a distilled student, sampled in few steps; None for a teacher.
        shift: of the times of the teacher's solver.
        steps: sampling steps.
        guidance_scale: strength of the text guidance; 1 turns it off.
        deterministic: whether a student's steps add no fresh noise.
    """

    height: int
    width: int
    tiles: Tiles | None
    student_times: Sequence[float] | None
    shift: float
    steps: int
    guidance_scale: float
    deterministic: bool

    @classmethod
    def of(
        cls,
        denoiser: PiD,
        latents: Tensor,
        *,
        student_times: Sequence[float] | None,
        time_shift: float | None = None,
        steps: int | None = None,
        tile: int | None = None,
        guidance_scale: float = 1.0,
        deterministic: bool = False,
    ) -> Plan:
        """Plan a decode.

        Args:
            denoiser: the network.
            latents: (B, C, h, w); only their shape is read.
            student_times: as above.
            time_shift: shift of the teacher's solver, as in its training; None follows the size
                that the network sees.
            steps: None is all of a student's times, or 25 for a teacher.
            tile: side of the tiles in output pixels, see `tiling.Tiles`; None is no tiles.
            guidance_scale, deterministic: as above.

        Raises:
            Mistake: the size, the tile, the steps or the sampler do not fit the network.
        """
        check_deterministic(student_times, deterministic)
        height, width = denoiser.geometry.output_size(latents)
        denoiser.check_size(height, width)
        tiles = None if tile is None else Tiles(height, width, tile, denoiser.alignment)
        if tiles is not None and len(tiles) == 1:
            tiles = None
        seen = (height, width) if tiles is None else tiles.shape
        shift = flow.resolution_shift(*seen) if time_shift is None else time_shift
        steps = num_sampling_steps(student_times, steps)
        sampler = (student_times, shift, steps, guidance_scale, deterministic)
        return cls(height, width, tiles, *sampler)

    @property
    def seen(self) -> tuple[int, int]:
        """(height, width) of what the network sees at a time."""
        return (self.height, self.width) if self.tiles is None else self.tiles.shape

    @property
    def num_forwards(self) -> int:
        """Forward passes of the network: one per step, tile and branch of guidance."""
        num_tiles = 1 if self.tiles is None else len(self.tiles)
        return self.steps * num_tiles * (1 if self.guidance_scale == 1.0 else 2)

    def __str__(self) -> str:
        size = f"{self.width} x {self.height}"
        if self.tiles is None:
            return size
        return f"{size} in {len(self.tiles)} tiles of {max(self.tiles.shape)}"

    def sample(
        self,
        velocity: Velocity,
        batch_size: int,
        generator: Generators,
        device: torch.device | str,
    ) -> Tensor:
        """Run the sampler from noise.

        Args:
            velocity: of the whole picture, `velocity(x_t, t)`.
            batch_size: B.
            generator: one, or one per sample; the only source of randomness.
            device: where to sample.

        Returns:
            x0 (B, 3, height, width) in fp32, near [-1, 1] and not yet clamped to it.
        """
        shape = (batch_size, 3, self.height, self.width)
        # Noise is drawn in the call, so that the sampler alone holds it and frees it.
        if self.student_times is None:
            return sample_solver(
                velocity, draw_noise(shape, generator, device), self.steps, shift=self.shift
            )
        return sample_few_steps(
            velocity,
            draw_noise(shape, generator, device),
            self.steps,
            generator,
            student_times=self.student_times,
            stochastic=not self.deterministic,
        )


def check_deterministic(student_times: Sequence[float] | None, deterministic: bool) -> None:
    """Raise `Mistake` if a teacher is asked for what its solver is anyway."""
    if deterministic and student_times is None:
        raise Mistake(
            "deterministic", "a teacher's solver adds no noise in any case; leave it out."
        )


def num_sampling_steps(student_times: Sequence[float] | None, steps: int | None) -> int:
    """The steps asked for, else as many as a student was trained for, or 25 of a teacher.

    Raises:
        Mistake: fewer than one step, or more than a student was trained for.
    """
    if steps is None:
        return TEACHER_STEPS if student_times is None else len(student_times)
    check_at_least("steps", steps, 1)
    return steps if student_times is None else len(few_step_times(student_times, steps))
