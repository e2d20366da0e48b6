"""The kinds of work that are measured: calls on networks that are kept between them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pid_lightning.commands.bench.settings import LEARNING
from pid_lightning.decoding.latents import decode_latents
from pid_lightning.decoding.memory_estimate import num_bytes, weight_bytes
from pid_lightning.decoding.plan import Plan
from pid_lightning.diffusion.sampling import STUDENT_TIMES
from pid_lightning.files.models import ModelInfo
from pid_lightning.nn import Discriminator, PiD
from pid_lightning.nn.compilation import compile_for_inference
from pid_lightning.nn.freezing import freeze_unused
from pid_lightning.training.callbacks.turns import resting
from pid_lightning.training.distillation import Distillation
from pid_lightning.training.objective import FlowMatching
from pid_lightning.training.optimizers import make_optimizer
from pid_lightning.training.sample import Sample
from pid_lightning.training.settings import DistillationSettings, Training

CLIP = 0.1  # gradient norm limit of the published recipe


@dataclass(frozen=True)
class Mode:
    """How networks run.

    Attributes:
        way: op by op, compiled by torch, or as the plain transcription of the method.
        recomputes: whether training recomputes its blocks in the backward pass.
    """

    way: Literal["eager", "compiled", "plain"] = "eager"
    recomputes: bool = False

    def __str__(self) -> str:
        return f"{self.way} recomputed" if self.recomputes else self.way


@dataclass
class Work:
    """One kind of work, with everything that persists between its calls; absent parts are None.

    Attributes:
        name: ``"forward"``, ``"decode"``, ``"train"`` or ``"dmd2"``.
        info: describes the denoiser.
        dtype: what is computed in; what is trained has weights in fp32, under autocast.
        denoiser: the evaluated or trained network.
        average: its exponential moving average.
        distillation: the networks beside a student.
        optimizers: of the denoiser, then of a distillation's critics.
    """

    name: str
    info: ModelInfo
    dtype: torch.dtype
    denoiser: nn.Module
    average: nn.Module | None = None
    distillation: Distillation | None = None
    optimizers: tuple[torch.optim.Optimizer, ...] = ()

    @classmethod
    def of(cls, name: str, denoiser: nn.Module, info: ModelInfo, dtype: torch.dtype) -> Work:
        """Work on a network whose weights are in `weights_dtype`."""
        if name not in LEARNING:
            return cls(name, info, dtype, denoiser.eval().requires_grad_(False))
        if name == "dmd2" and isinstance(denoiser, PiD):  # the plain one has no unused weights
            freeze_unused(denoiser)
        average = duplicate(denoiser, torch.float32)
        # The published recipe's optimiser, with a negligible learning rate.
        optimizer = make_optimizer(denoiser, Training(learning_rate=1e-6), fused=True)
        if name == "train":
            return cls(name, info, dtype, denoiser, average, optimizers=(optimizer,))
        # One tap halfway up, as published, and always the longest rollout, so that the largest cost
        # is measured, whatever is drawn.
        taps = (info.config.num_blocks // 2,)
        settings = DistillationSettings(taps=taps, student_steps="last")
        teacher = duplicate(denoiser, getattr(torch, settings.teacher_dtype))
        fake_score = duplicate(denoiser, torch.float32, learns=True)
        with next(denoiser.parameters()).device:
            discriminator = Discriminator(info.config.width, len(taps))
        distillation = Distillation(settings, teacher, fake_score, discriminator)
        optimizers = (optimizer, distillation.make_critics_optimizer())
        return cls(name, info, dtype, denoiser, average, distillation, optimizers)

    def in_mode(self, mode: Mode) -> Work:
        """The same weights and optimisers, run in a mode."""

        def twin(network: nn.Module) -> nn.Module:
            made = copy.copy(network)  # shares its parameters
            made.activation_checkpointing = mode.recomputes
            if mode.way == "compiled" and self.optimizers:
                made.compile(dynamic=False, fullgraph=True)
            elif mode.way == "compiled":
                on_cpu = next(network.parameters()).device.type == "cpu"
                compile_for_inference(made, freeze=on_cpu)
            return made

        dmd2 = self.distillation
        if dmd2 is not None:
            networks = (twin(dmd2.teacher), twin(dmd2.fake_score), dmd2.discriminator)
            dmd2 = Distillation(dmd2.settings, *networks)
        return replace(self, denoiser=twin(self.denoiser), distillation=dmd2)

    def calls(self, sample: Sample) -> dict[str, Callable[[], object]]:
        """What to measure on a batch, by name."""
        denoiser, dmd2 = self.denoiser, self.distillation
        if self.name == "forward":
            return {"forward": partial(forward, denoiser, sample)}
        if self.name == "decode":
            return {"decode": partial(decode, denoiser, sample, self.info)}
        if self.name == "train":
            loss = partial(FlowMatching(denoiser, Training()).losses, sample, "train")
            return {"train": partial(self._step, 0, loss)}
        student = partial(dmd2.student_loss, denoiser, sample, turn=0, num_updates=0)
        critics = partial(dmd2.critic_loss, denoiser, sample, turn=0)
        return {
            "dmd2 student": partial(self._step, 0, student),
            "dmd2 critics": partial(self._step, 1, critics),
        }

    def held_bytes(self, sample: Sample) -> int:
        """Bytes in use before and after each call: weights, optimiser states, which are there after
        a first step, and the tensors of the batch that are read."""
        networks = [part for part in vars(self).values() if isinstance(part, nn.Module)]
        states = [state for one in self.optimizers for state in one.state.values()]
        tensors = [value for state in states for value in state.values()]
        tensors += [sample.latents, sample.latent_sigma, sample.text]
        tensors += [] if self.name == "decode" else [sample.x0]
        held = num_bytes(tensor for tensor in tensors if isinstance(tensor, Tensor))
        return held + sum(map(weight_bytes, networks))

    def _step(self, index: int, loss: Callable[[], tuple[Tensor, Any]]) -> None:
        """One step of one optimiser, while what the other one trains rests."""
        optimizer = self.optimizers[index]
        learning = [p for group in optimizer.param_groups for p in group["params"]]
        others = (self.distillation, self.denoiser)[index]
        # As Lightning sets it, without a cache of casts.
        autocast = torch.autocast(
            learning[0].device.type,
            self.dtype,
            enabled=self.dtype != torch.float32,
            cache_enabled=False,
        )
        with resting(*filter(None, [others])):
            with autocast:
                total, _ = loss()
            total.backward()
        nn.utils.clip_grad_norm_(learning, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if index == 0:
            weights = [p.detach() for p in self.denoiser.parameters()]
            with torch.no_grad():
                torch._foreach_lerp_(list(self.average.parameters()), weights, 1e-3)


@torch.no_grad()
def forward(denoiser: nn.Module, sample: Sample) -> Tensor:
    """Compute the condition and evaluate the network once, on x0 as if it were noisy."""
    condition = denoiser.condition(sample.latents, sample.latent_sigma, sample.text)
    return denoiser(sample.x0, sample.latent_sigma, condition)


def decode(denoiser: nn.Module, sample: Sample, info: ModelInfo) -> Tensor:
    """Decode with the student's own steps, or the published 4."""
    times = info.student_times or STUDENT_TIMES
    return decode_latents(
        denoiser,
        Plan.of(denoiser, sample.latents, student_times=times),
        sample.latents,
        sample.latent_sigma,
        sample.text,
        generator=torch.Generator(sample.latents.device).manual_seed(0),
    )


def weights_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """Dtype of the denoiser's weights: fp32 for training, else what is computed in."""
    return torch.float32 if name in LEARNING else dtype


def duplicate(network: nn.Module, dtype: torch.dtype, learns: bool = False) -> nn.Module:
    """A copy with weights in another dtype; also works with fake tensors."""
    # Passed as the memo: `deepcopy` would move fake tensors to another fake mode.
    copies = {
        id(p): nn.Parameter(p.detach().to(dtype, copy=True), learns and p.requires_grad)
        for p in network.parameters()
    }
    return copy.deepcopy(network, copies)
