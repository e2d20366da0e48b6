"""The losses in cases computed by hand, and their invariants."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pid_lightning.diffusion import losses
from pid_lightning.diffusion.flow import widest


def pictures(seed: int = 0, batch_size: int = 3) -> Tensor:
    return torch.randn(batch_size, 3, 4, 6, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_rgb_alignment_is_in_fp32_whatever_the_default_dtype(dtype: torch.dtype) -> None:
    rgb, low = (torch.rand(2, 3, 4, 4, dtype=torch.float32) for _ in range(2))
    sigma = torch.tensor([0.0, 0.5])
    expected = losses.rgb_alignment_loss(rgb, low, sigma)
    torch.set_default_dtype(dtype)  # as under Lightning's bf16-true and 64-true
    try:
        assert torch.equal(losses.rgb_alignment_loss(rgb, low, sigma), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_flow_matching_is_zero_at_the_velocity_and_one_beside_it() -> None:
    x0, eps = pictures(), pictures(1)
    assert losses.flow_matching_loss(eps - x0, x0, eps) == 0
    assert losses.flow_matching_loss(eps - x0 + 1, x0, eps) == pytest.approx(1, rel=1e-5)


def test_fake_score_follows_the_student_without_teaching_it() -> None:
    student = pictures().requires_grad_()
    velocity = pictures(2).requires_grad_()
    loss = losses.fake_score_loss(velocity, student, pictures(1))
    expected = losses.flow_matching_loss(velocity, student.detach(), pictures(1))
    assert torch.equal(loss, expected)
    loss.backward()
    assert student.grad is None
    assert velocity.grad.any()


# -------------------------------------------------------------------------- DMD


def test_dmd_gradient_of_constants() -> None:
    """Student 0, teacher c, fake d: g = (d - c) / |c| per sample."""
    ones = torch.ones(3, 3, 4, 6)
    teacher = ones * torch.tensor([2.0, -0.5, 1.0]).view(3, 1, 1, 1)
    fake = ones * torch.tensor([3.0, 1.0, 1.0]).view(3, 1, 1, 1)
    gradient = losses.dmd_gradient(0 * ones, teacher, fake)
    expected = torch.tensor([0.5, 3.0, 0.0], dtype=torch.float64)
    assert gradient.dtype == torch.float64
    assert torch.equal(gradient, expected.view(3, 1, 1, 1).expand(3, 3, 4, 6))


def test_student_steps_along_g_over_the_number_of_elements() -> None:
    student, teacher, fake = pictures().requires_grad_(), pictures(1), pictures(2)
    loss = losses.dmd_loss(student, teacher, fake)
    loss.backward()
    gradient = losses.dmd_gradient(student.detach(), teacher, fake)
    assert torch.allclose(student.grad.double(), gradient / student.numel(), rtol=1e-5, atol=0)
    assert float(loss.detach()) == pytest.approx(0.5 * float(gradient.square().mean()), rel=1e-6)


def test_dmd_teaches_neither_teacher_nor_fake_score() -> None:
    student, teacher, fake = (pictures(i).requires_grad_() for i in range(3))
    losses.dmd_loss(student, teacher, fake).backward()
    assert teacher.grad is None
    assert fake.grad is None


def test_dmd_rests_where_fake_and_teacher_agree() -> None:
    student, teacher = pictures().requires_grad_(), pictures(1)
    loss = losses.dmd_loss(student, teacher, teacher.clone())
    loss.backward()
    assert loss == 0
    assert not student.grad.any()


def test_dmd_gradient_is_normalised_per_sample() -> None:
    student, teacher, fake = pictures(), pictures(1), pictures(2)
    gradient = losses.dmd_gradient(student, teacher, fake)
    scaled = losses.dmd_gradient(7 * student, 7 * teacher, 7 * fake)
    assert torch.allclose(scaled, gradient, rtol=1e-5, atol=1e-6)
    alone = losses.dmd_gradient(student[1:2], teacher[1:2], fake[1:2])
    assert torch.allclose(alone, gradient[1:2], rtol=1e-12, atol=0)


def test_dmd_survives_a_student_that_is_the_teacher() -> None:
    student = pictures().requires_grad_()
    losses.dmd_loss(student, student.detach(), student.detach()).backward()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_sample_that_is_not_finite_teaches_nothing(value: float) -> None:
    student, teacher, fake = pictures().requires_grad_(), pictures(1), pictures(2)
    clean = losses.dmd_gradient(student.detach(), teacher, fake)
    fake[1, 0, 0, 0] = value
    loss = losses.dmd_loss(student, teacher, fake)
    loss.backward()
    assert loss.isfinite()
    assert not student.grad[1].any()
    expected = (clean / student.numel()).float()
    assert torch.allclose(student.grad[[0, 2]], expected[[0, 2]], rtol=1e-5, atol=0)


# --------------------------------------------------------------------- adversarial


def test_adversarial_losses_at_indifference() -> None:
    logits = torch.zeros(4, 2)
    assert float(losses.generator_loss(logits)) == pytest.approx(math.log(2))
    assert float(losses.discriminator_loss(logits, logits)) == pytest.approx(2 * math.log(2))


def test_adversarial_losses_pull_opposite_ways() -> None:
    real, fake = torch.zeros(4, 2, requires_grad=True), torch.zeros(4, 2, requires_grad=True)
    losses.discriminator_loss(real, fake).backward()
    assert (real.grad < 0).all()  # gradient descent raises them
    assert (fake.grad > 0).all()
    logits = torch.zeros(4, 2, requires_grad=True)
    losses.generator_loss(logits).backward()
    assert torch.equal(logits.grad, -fake.grad)


def test_adversarial_losses_do_not_overflow() -> None:
    logits = torch.tensor([[-1e4], [1e4]])
    assert losses.generator_loss(logits).isfinite()
    assert float(losses.generator_loss(logits)) == pytest.approx(5e3)


def test_approximate_r1_is_the_mean_square_of_the_change() -> None:
    logits = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    assert losses.approximate_r1_loss(logits, logits) == 0
    assert float(losses.approximate_r1_loss(logits, logits + 0.5)) == pytest.approx(0.25)


# -------------------------------------------------------------------- RGB alignment


def test_rgb_alignment_of_equal_pictures_is_its_eps() -> None:
    loss = losses.rgb_alignment_loss(pictures(), pictures(), torch.zeros(3))
    assert float(loss) == pytest.approx(1e-3 * (0.25 + 1 + 1) / 3, rel=1e-5)


def test_rgb_alignment_weighs_luma_a_quarter_of_chroma() -> None:
    """Grey differs in luma only, blue mostly in Cb (factor 0.5)."""
    low, sigma = pictures(), torch.zeros(3)
    grey = losses.rgb_alignment_loss(low + 0.4, low, sigma)
    assert float(grey) == pytest.approx((0.25 * 0.4 + 2e-3) / 3, rel=1e-3)
    blue = losses.rgb_alignment_loss(low + torch.tensor([0, 0, 0.4]).view(3, 1, 1), low, sigma)
    expected = 0.4 * (0.25 * 0.114 + 0.5 + 0.081312) / 3
    assert float(blue) == pytest.approx(expected, rel=1e-2)


def test_rgb_alignment_fades_with_the_latents_noise() -> None:
    rgb, low = pictures(), pictures(1)
    whole = losses.rgb_alignment_loss(rgb, low, torch.zeros(3))
    assert losses.rgb_alignment_loss(rgb, low, torch.ones(3)) == 0
    half = losses.rgb_alignment_loss(rgb, low, torch.full((3,), 0.5))
    assert torch.allclose(half, whole / 2)
    first = losses.rgb_alignment_loss(rgb, low, torch.tensor([0.0, 1.0, 1.0]))
    alone = losses.rgb_alignment_loss(rgb[:1], low[:1], torch.zeros(1))
    assert torch.allclose(first * 3, alone)


# ------------------------------------------------------------ invariants of all losses

LOSSES = {
    "flow_matching": lambda a, b, c: losses.flow_matching_loss(a, b, c),
    "dmd": lambda a, b, c: losses.dmd_loss(a, b, c),
    "fake_score": lambda a, b, c: losses.fake_score_loss(a, b, c),
    "generator": lambda a, b, c: losses.generator_loss(a),
    "discriminator": lambda a, b, c: losses.discriminator_loss(a, b),
    "approximate_r1": lambda a, b, c: losses.approximate_r1_loss(a, b),
    "rgb_alignment": lambda a, b, c: losses.rgb_alignment_loss(a, b, torch.zeros(len(a))),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_order_of_samples_changes_nothing(name: str) -> None:
    inputs, order = [pictures(i) for i in range(3)], [2, 0, 1]
    loss = LOSSES[name](*inputs)
    assert loss.shape == ()
    assert torch.allclose(LOSSES[name](*(x[order] for x in inputs)), loss, rtol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_computed_in_fp32_at_least(name: str) -> None:
    inputs = [pictures(i).bfloat16() for i in range(3)]
    exact = LOSSES[name](*(x.float() for x in inputs))
    loss = LOSSES[name](*inputs)
    assert loss.dtype in (torch.float32, torch.float64)
    assert torch.allclose(loss, exact, rtol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_autocast_does_not_round_a_loss(name: str) -> None:
    inputs = [pictures(i) for i in range(3)]
    exact = LOSSES[name](*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        loss = LOSSES[name](*inputs)
    assert loss.dtype == exact.dtype
    assert torch.allclose(loss, exact, rtol=1e-6)


def test_the_widest_type_is_one_that_the_device_has() -> None:
    assert widest(torch.device("cpu")) == widest(torch.device("cuda")) == torch.float64
    assert widest(torch.device("mps")) == torch.float32
