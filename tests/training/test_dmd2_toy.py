"""DMD2's few-step students match the teacher on a known toy distribution."""

from __future__ import annotations

import copy
import itertools
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import pid_lightning.training.distillation as distillation_module
from pid_lightning.diffusion import flow, losses, sampling
from pid_lightning.nn import Discriminator
from pid_lightning.training.callbacks.turns import resting
from pid_lightning.training.distillation import Distillation
from pid_lightning.training.sample import Sample
from pid_lightning.training.settings import DistillationSettings

WIDTH = 32
CENTRES = torch.tensor([[1.5, 0.0, 0.5], [-1.0, 1.0, -0.5], [-0.5, -1.5, 0.0]])


class ToyDenoiser(nn.Module):
    """An MLP on points (B, 3, 1, 1) with the `PiD` interface that DMD2 uses."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(3 + 8, WIDTH)
        self.hidden = nn.Sequential(
            nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU()
        )
        self.out = nn.Linear(WIDTH, 3)

    def condition(self, *_: object, **__: object) -> None:
        return None

    def _tokens(self, x_t: Tensor, t: Tensor) -> Tensor:
        angles = t[:, None] * torch.tensor([1.0, 2.0, 4.0, 8.0])
        return self.hidden(self.into(torch.cat((x_t.flatten(1), angles.sin(), angles.cos()), 1)))

    def forward(self, x_t: Tensor, t: Tensor, condition: None) -> Tensor:
        return self.out(self._tokens(x_t, t))[:, :, None, None]

    def features(self, x_t: Tensor, t: Tensor, condition: None, taps: tuple[int]) -> list[Tensor]:
        return [self._tokens(x_t, t)[:, :, None, None].expand(-1, -1, 2, 2)]


def draw_points(num: int, generator: torch.Generator) -> Tensor:
    """Three narrow Gaussians."""
    which = torch.randint(len(CENTRES), (num,), generator=generator)
    points = CENTRES[which] + 0.2 * torch.randn(num, 3, generator=generator)
    return points[:, :, None, None]


def energy_distance(a: Tensor, b: Tensor) -> float:
    """`2 E|a-b| - E|a-a'| - E|b-b'|`, which is 0 for equal distributions."""
    a, b = a.flatten(1), b.flatten(1)

    def spread(c: Tensor) -> Tensor:
        return torch.cdist(c, c).sum() / (len(c) * (len(c) - 1))

    return (2 * torch.cdist(a, b).mean() - spread(a) - spread(b)).item()


def train_teacher(generator: torch.Generator) -> ToyDenoiser:
    teacher = ToyDenoiser()
    optimizer = torch.optim.Adam(teacher.parameters(), 3e-3)
    for _ in range(1000):
        x0 = draw_points(256, generator)
        eps = torch.randn(x0.shape, generator=generator)
        t = torch.rand(256, generator=generator)
        optimizer.zero_grad()
        velocity = teacher(flow.add_noise(x0, eps, t), t, None)
        losses.flow_matching_loss(velocity, x0, eps).backward()
        optimizer.step()
    return teacher


@torch.no_grad()
def sample_finely(network: ToyDenoiser, noise: Tensor, num_steps: int = 200) -> Tensor:
    """Integrate the network's flow from noise in many small steps."""
    x, times = noise, torch.linspace(1, 0, num_steps + 1)
    for now, after in itertools.pairwise(times):
        x = x + (after - now) * network(x, now.expand(len(x)), None)
    return x


@pytest.mark.parametrize(
    ("student_input", "num_batches", "student_every", "largest_shares"),
    [
        ("rollout", 600, 4, {1: 0.5}),
        pytest.param("rollout", 6000, 10, {1: 0.05, 2: 0.15, 4: 0.5}, marks=pytest.mark.slow),
        # Sampling never sees such inputs: a single step is learned, four steps hardly improve.
        pytest.param("noised_data", 6000, 10, {1: 0.15, 2: 0.2}, marks=pytest.mark.slow),
    ],
)
def test_students_match_the_teachers_distribution(
    student_input: str,
    num_batches: int,
    student_every: int,
    largest_shares: dict[int, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Compares energy distances to the teacher's distribution with those of the undistilled
    network at the same number of steps."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        teacher = train_teacher(generator)
        discriminator = Discriminator(WIDTH, 1)
    student, fake_score = copy.deepcopy(teacher), copy.deepcopy(teacher)
    settings = DistillationSettings(
        student_every=student_every, student_input=student_input, taps=(0,), r1_weight=1.0
    )
    distillation = Distillation(settings, teacher, fake_score, discriminator)
    critics = [*fake_score.parameters(), *discriminator.parameters()]
    optimizers = torch.optim.Adam(student.parameters(), 2e-3), torch.optim.Adam(critics, 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizers[0], num_batches // student_every
    )
    batch_size = 64
    # One generator for all draws: one per sample, as in a run, would take most of the time.
    draw = partial(torch.randn, (batch_size, 3, 1, 1), generator=generator)
    monkeypatch.setattr(distillation, "_noise", lambda *_: draw())
    monkeypatch.setattr(
        distillation,
        "_times",
        lambda *_: flow.sample_times(batch_size, generator=generator).clamp(0.02, 0.99),
    )
    monkeypatch.setattr(
        distillation_module,
        "sample_generators",
        lambda seed, purpose, samples, device="cpu": [generator] * len(samples),
    )
    num_updates = 0
    for turn in range(num_batches):
        x0 = draw_points(batch_size, generator)
        numbers = list(range(batch_size))
        sample = Sample(x0, x0, x0, torch.zeros(batch_size), None, None, None, numbers)
        is_student = turn % student_every == student_every - 1
        with resting(distillation if is_student else student):
            optimizers[not is_student].zero_grad()
            if is_student:
                loss, _ = distillation.student_loss(student, sample, turn, num_updates)
            else:
                loss, _ = distillation.critic_loss(student, sample, turn)
            loss.backward()
            optimizers[not is_student].step()
        if is_student:
            schedule.step()
            num_updates += 1

    noise, other_noise = torch.randn(2, 3000, 3, 1, 1, generator=generator)
    target = sample_finely(teacher, noise)
    for steps, largest_share in largest_shares.items():
        with torch.no_grad():
            before, after = (
                energy_distance(
                    target,
                    sampling.sample_few_steps(
                        lambda x, t, network=network: network(x, t, None),
                        other_noise,
                        steps,
                        torch.Generator().manual_seed(1),
                    ),
                )
                for network in (teacher, student)
            )
        print(f"{student_input} {steps} steps: {before:.4f} undistilled, {after:.4f} distilled")
        assert after < largest_share * before
