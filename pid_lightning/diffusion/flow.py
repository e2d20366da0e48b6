"""The time convention for pixels: `t` runs from 0 (clean image) to 1 (noise), and velocity points
from the image to the noise.

All formulas are those of the straight (rectified) flow, arXiv 2209.03003, in fp32 at least.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# At smaller times, dividing by t would blow up errors in x0 (arXiv 2511.13720, section 4).
SMALLEST_DIVISOR = 0.05


def widest(device: torch.device) -> torch.dtype:
    """The widest floating point that a device has: fp64, but for Apple's GPUs."""
    return torch.float32 if device.type == "mps" else torch.float64


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Reshape (B,) to (B, 1, 1, ...), with the dimensions of `like`, in fp32 at least."""
    dtype = torch.promote_types(values.dtype, torch.float32)
    return values.to(like.device, dtype).view(-1, *[1] * (like.ndim - 1))


def add_noise(x0: Tensor, eps: Tensor, t: Tensor, out: Tensor | None = None) -> Tensor:
    """`x_t = (1-t) x0 + t eps`, in fp32 at least.

    Args:
        x0: images (B, 3, H, W) in [-1, 1].
        eps: standard normal noise like `x0`.
        t: pixel times (B,) in [0, 1].
        out: tensor of the result's dtype to write it to; may be `x0` itself.
    """
    t = per_sample(t, x0)
    dtype = torch.promote_types(t.dtype, x0.dtype)
    return torch.lerp(x0.to(dtype), eps.to(dtype), t.to(dtype), out=out)


def velocity_of(x0: Tensor, eps: Tensor) -> Tensor:
    """The velocity `eps - x0` along the straight path from image to noise."""
    return eps - x0


def x0_from_velocity(x_t: Tensor, velocity: Tensor, t: Tensor, out: Tensor | None = None) -> Tensor:
    """`x0 = x_t - t velocity`, in fp32 at least, written to `out`, which may be `x_t` itself."""
    t = per_sample(t, x_t)
    dtype = torch.promote_types(t.dtype, x_t.dtype)
    return torch.addcmul(x_t.to(dtype), t.to(dtype), velocity.to(dtype), value=-1, out=out)


def velocity_from_x0(x_t: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """`(x_t - x0) / max(t, 0.05)`: the velocity for a network that predicts the image."""
    t = per_sample(t, x_t)
    return (x_t - x0) / t.clamp(min=SMALLEST_DIVISOR)


def shift_time(t: Tensor, shift: float) -> Tensor:
    """`t' = k t / (1 + (k-1) t)`: moves times towards noise for k > 1 (SD3, arXiv 2403.03206,
    equation 23)."""
    return shift * t / (1 + (shift - 1) * t)


def resolution_shift(height: int, width: int) -> float:
    """The shift k for an output of height x width pixels: 6 at 2048 x 2048, less if smaller."""
    return 6.0 * math.sqrt(math.sqrt(height * width) / 2048)


def sample_times(
    batch_size: int,
    shift: float = 1.0,
    std: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Training times (B,): logit-normal(0, std), then shifted (arXiv 2403.03206, section 3.1).
    Drawn on the generator's device, or on the CPU without one."""
    device = generator.device if generator is not None else "cpu"
    logits = std * torch.randn(batch_size, generator=generator, dtype=torch.float32, device=device)
    return shift_time(logits.sigmoid(), shift)
