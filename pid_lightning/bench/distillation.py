"""DMD2's two steps as measured work: the callback's own losses, without a trainer."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from pid_lightning import flow
from pid_lightning.bench.networks import Inputs
from pid_lightning.bench.work import (
    Networks,
    Work,
    adamw,
    autocast,
    duplicate,
    learn,
    move_average,
)
from pid_lightning.callbacks.dmd2 import DMD2, freeze_unused
from pid_lightning.memory import num_bytes
from pid_lightning.modules.objective import Sample
from pid_lightning.modules.settings import Training
from pid_lightning.nn import Discriminator
from pid_lightning.weights import ModelInfo


class LongestRollOut(DMD2):
    """DMD2 whose student always starts from its own longest roll-out, where training draws its
    length: a figure shall not depend on a draw, and the longest is the one to plan for."""

    def _student_x0(self, module: SimpleNamespace, sample: Sample) -> Tensor:
        condition = sample.condition(module.denoiser)
        noise = self._noise(module, sample, "student input")
        last = len(self.student_times) - 1
        x_t = self._roll_out(module, sample, condition, noise, last)
        t = x_t.new_full((len(x_t),), self.student_times[last])
        return flow.x0_from_velocity(x_t, module.denoiser(x_t, t, condition), t)


def distillation_of(info: ModelInfo) -> DMD2:
    """The callback with its defaults; its one tap is the published one, halfway up."""
    return LongestRollOut(teacher="", taps=(info.config.num_blocks // 2,))


def gather_distillation(denoiser: nn.Module, info: ModelInfo) -> Networks:
    """Student, its average, fake score, frozen teacher and discriminator, and both optimisers."""
    dmd2 = distillation_of(info)
    if hasattr(denoiser, "adapter"):  # the plain transcription holds nothing that is not used
        freeze_unused(denoiser)
    with next(denoiser.parameters()).device:
        discriminator = Discriminator(info.config.width, len(dmd2.taps))
    networks = Networks(
        denoiser,
        average=duplicate(denoiser, torch.float32, learns=False),
        fake_score=duplicate(denoiser, torch.float32, learns=True),
        teacher=duplicate(denoiser, dmd2.teacher_dtype, learns=False),
        discriminator=discriminator,
    )
    module = stand_in(networks)
    (networks.optimizer, networks.critics_optimizer), _ = dmd2.configure_optimizers(module)
    return networks


def assemble_distillation(
    networks: Networks, inputs: Inputs, info: ModelInfo, dtype: torch.dtype
) -> dict[str, Work]:
    """The student's step and the critics'."""
    dmd2, module = distillation_of(info), stand_in(networks)
    batch_size = len(inputs.x0)
    kept = torch.ones(batch_size, dtype=torch.bool, device=inputs.x0.device)
    sample = Sample(
        inputs.x0,
        inputs.low_resolution,
        inputs.latents,
        inputs.latent_sigma,
        inputs.text,
        kept,
        kept,
        list(range(batch_size)),
    )
    student = (networks.denoiser,)
    critics = (networks.fake_score, networks.discriminator)

    def student_step() -> None:
        # The optimiser inside, as under Lightning's manual optimisation: autocast's own copies of
        # the weights live until the step is over.
        with dmd2.turns.only(student, critics), autocast(inputs.x0.device, dtype):
            learn(dmd2._student_loss(module, sample)[0], networks.optimizer)
        move_average(networks)

    def critics_step() -> None:
        with dmd2.turns.only(critics, student), autocast(inputs.x0.device, dtype):
            learn(dmd2._critic_loss(module, sample)[0], networks.critics_optimizer)

    held = (networks, inputs.tensors(), num_bytes([inputs.x0]))
    return {
        "dmd2 student": Work(student_step, *held, networks.optimizer, moves_average=True),
        "dmd2 critics": Work(critics_step, *held, networks.critics_optimizer),
    }


def stand_in(networks: Networks) -> SimpleNamespace:
    """What DMD2 asks of its module."""
    return SimpleNamespace(
        **vars(networks),
        training_settings=Training(),
        trainer=SimpleNamespace(global_step=0, precision="bf16-mixed"),
        make_optimizer=lambda: adamw(networks.denoiser),
        make_schedule=lambda optimizer: None,
    )
