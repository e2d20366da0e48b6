"""Losses as pure functions of network outputs, computed in fp32 (DMD: fp64, where the
device has it) for any input dtype.

`x0`, `velocity` and pictures are (B, 3, H, W); logits (B, taps); every loss is a scalar mean.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pid_lightning.diffusion.flow import per_sample, velocity_of, widest


def flow_matching_loss(velocity: Tensor, x0: Tensor, eps: Tensor) -> Tensor:
    """`mean ||velocity - (eps - x0)||^2` (arXiv 2210.02747)."""
    return F.mse_loss(velocity.float(), velocity_of(x0.float(), eps.float()))


def dmd_gradient(student_x0: Tensor, teacher_x0: Tensor, fake_x0: Tensor) -> Tensor:
    """`g = (x0_fake - x0_teacher) / mean|x0_student - x0_teacher|` per sample, in fp64 (DMD,
    arXiv 2311.18828, equations 7 and 8)."""
    dtype = widest(student_x0.device)
    student, teacher, fake = student_x0.to(dtype), teacher_x0.to(dtype), fake_x0.to(dtype)
    distance = (student - teacher).abs().flatten(1).mean(1)
    return (fake - teacher) / per_sample(distance.clamp(min=1e-12), student)


def dmd_loss(student_x0: Tensor, teacher_x0: Tensor, fake_x0: Tensor) -> Tensor:
    """`0.5 ||x0_student - stopgrad(x0_student - g)||^2`, whose gradient is g over the number of
    elements; a sample whose g is not finite contributes none."""
    with torch.no_grad():
        gradient = dmd_gradient(student_x0, teacher_x0, fake_x0)
        finite = gradient.flatten(1).isfinite().all(1)
        gradient = torch.where(per_sample(finite, gradient).bool(), gradient, 0.0)
        target = student_x0.to(gradient.dtype) - gradient
    return 0.5 * F.mse_loss(student_x0.to(target.dtype), target)


def fake_score_loss(fake_velocity: Tensor, student_x0: Tensor, eps: Tensor) -> Tensor:
    """`mean ||v_fake - (eps - x0_student)||^2`: trains the fake score on the student's outputs."""
    return flow_matching_loss(fake_velocity, student_x0.detach(), eps)


def generator_loss(fake_logits: Tensor) -> Tensor:
    """`mean softplus(-fake)`: rewards student pictures that are classified as real."""
    return F.softplus(-fake_logits.float()).mean()


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """`mean softplus(fake) + mean softplus(-real)`."""
    return F.softplus(fake_logits.float()).mean() + F.softplus(-real_logits.float()).mean()


def approximate_r1_loss(real_logits: Tensor, perturbed_logits: Tensor) -> Tensor:
    """MSE between the logits of real features and of the same input with a little extra noise:
    R1 without second derivatives (APT, arXiv 2501.08316, section 3.3)."""
    return F.mse_loss(perturbed_logits.float(), real_logits.float())


def latent_loss(estimate: Tensor, clean: Tensor, latent_sigma: Tensor) -> Tensor:
    """Squared error of estimated latents (B, C, h, w) over that of the best linear guess for ones
    of variance 1, `s^2 / ((1-s)^2 + s^2)`, so that all noise levels (B,) count alike, but those
    below 0.05 less."""
    sigma = latent_sigma.float()
    guess = sigma.square() / ((1 - sigma).square() + sigma.square())
    error = (estimate.float() - clean.float()).square().flatten(1).mean(1)
    return (error / guess.clamp_min(0.05**2)).mean()


# ITU-R BT.601: the weights of R, G, B in luma and in the two chroma differences.
_YCBCR = (
    (0.299, 0.587, 0.114),
    (-0.168736, -0.331264, 0.5),
    (0.5, -0.418688, -0.081312),
)
_YCBCR_WEIGHTS = (0.25, 1.0, 1.0)


def rgb_alignment_loss(rgb: Tensor, low_resolution: Tensor, latent_sigma: Tensor) -> Tensor:
    """Charbonnier loss (eps 1e-3) between the RGB head and the low-resolution image in YCbCr,
    luma x 0.25 and chroma x 1, each sample weighted by `1 - latent_sigma`.

    Args:
        rgb: predicted low-resolution image (B, 3, h, w) in [-1, 1].
        low_resolution: the image that the encoder saw, like `rgb`.
        latent_sigma: (B,).
    """
    # non_blocking, so that the CPU does not wait for the GPU.
    to_ycbcr, weights = (
        torch.tensor(values, dtype=torch.float32).to(rgb.device, non_blocking=True)
        for values in (_YCBCR, _YCBCR_WEIGHTS)
    )
    with torch.autocast(rgb.device.type, enabled=False):
        difference = rgb.float() - low_resolution.float()
        difference = torch.einsum("yc,bchw->byhw", to_ycbcr, difference)
    charbonnier = (difference.square() + 1e-3**2).sqrt()
    per_picture = (charbonnier * weights.view(1, 3, 1, 1)).flatten(1).mean(1)
    return (per_picture * (1 - latent_sigma.float())).mean()
