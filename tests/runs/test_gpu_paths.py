"""A GPU's code paths on tensors without data: a wrong device or dtype there fails here."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import tiny
import torch
from decoders import decode_by
from torch import Tensor
from torch._inductor import config as inductor
from torch._subclasses.fake_tensor import FakeTensorMode

from pid_lightning import EMA, AdapterConfig, Training, VAEPiD
from pid_lightning.diffusion import losses
from pid_lightning.diffusion.sampling import STUDENT_TIMES
from pid_lightning.nn import Geometry, PiD, PiDConfig
from pid_lightning.nn.compilation import compile_for_inference
from pid_lightning.nn.layers import RMSNorm
from pid_lightning.nn.quantisation import quantise
from pid_lightning.training.callbacks.turns import Turns
from pid_lightning.training.distillation import Distillation
from pid_lightning.training.sample import draw_sample
from pid_lightning.training.settings import DistillationSettings

GPU = torch.device("cuda")


def fakes_work() -> bool:
    """Whether this torch computes on fake CUDA tensors without a driver; 2.6 does not."""
    try:
        with FakeTensorMode():
            torch.randn(2, 2).to(GPU) @ torch.empty(2, 2, device=GPU)
    except RuntimeError:
        return False
    return True


pytestmark = pytest.mark.skipif(not fakes_work(), reason="torch needs a driver for fake CUDA")
CONFIG = tiny.config(
    text_length=3,
    text_width=6,
    rope_reference=(64, 64),
    adapter=AdapterConfig(width=16, num_res_blocks=1, inject_pixels=True, rgb_head=True),
)


@pytest.fixture
def meta_network() -> PiD:
    """Built before fake tensors are in force, which cannot initialise weights."""
    with torch.device("meta"):
        return PiD(CONFIG, Geometry(16, 8, 4))


@contextmanager
def on_gpu(network: PiD) -> Iterator[PiD]:
    """The network on fake CUDA tensors; everything made inside is fake too."""
    shapes = {name: weight.shape for name, weight in network.state_dict().items()}
    with FakeTensorMode():
        state = {name: torch.empty(shape, device=GPU) for name, shape in shapes.items()}
        network.load_state_dict(state, assign=True)
        yield network


def normal(*shape: int) -> Tensor:
    return torch.empty(shape, device=GPU)


@pytest.mark.parametrize(
    ("tile", "window"), [pytest.param(64, None, marks=pytest.mark.slow), (None, 32)]
)
def test_decoding_stays_on_the_gpu(
    meta_network: PiD, tile: int | None, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tensor, "pin_memory", lambda noise: noise)  # fakes cannot be pinned
    generator = torch.Generator().manual_seed(0)
    with on_gpu(meta_network.requires_grad_(False)) as network:
        network.attend_in_windows(window)
        picture = decode_by(
            network,
            normal(2, 16, 3, 4),
            normal(2),
            student_times=STUDENT_TIMES,
            steps=2,
            text=normal(2, 3, 6),
            guidance_scale=3.0,
            generator=generator,
            tile=tile,
        )
        assert picture.shape == (2, 3, 96, 128)
        assert (picture.device.type, picture.dtype) == ("cuda", torch.float32)


def test_training_losses_stay_on_the_gpu(meta_network: PiD) -> None:
    with on_gpu(meta_network) as network:
        x0, eps, low = normal(2, 3, 64, 64), normal(2, 3, 64, 64), normal(2, 3, 16, 16)
        sigma, kept = normal(2), torch.ones(2, dtype=torch.bool, device=GPU)
        condition = network.condition(
            normal(2, 16, 2, 2),
            sigma,
            normal(2, 3, 6),
            keep_latents=kept,
            keep_text=kept,
            with_rgb=True,
        )
        velocity = network(x0, normal(2), condition)
        for loss in (
            losses.flow_matching_loss(velocity, x0, eps),
            losses.rgb_alignment_loss(condition.rgb, low, sigma),
            losses.dmd_loss(velocity, x0, eps),
        ):
            assert loss.device.type == "cuda"


class TextOnGPU(tiny.Text):
    def encode(self, captions: list[str]) -> Tensor:
        return normal(len(captions), 3, 6)


def module_on_gpu(module: VAEPiD) -> VAEPiD:
    """In a fit's first step, with fake tensors for its weights."""
    module._apply(lambda weight: torch.empty(weight.shape, dtype=weight.dtype, device=GPU))
    module._device = GPU
    module._trainer = SimpleNamespace(global_step=0, precision="bf16-mixed")
    return module


def step_and_average(module: VAEPiD, optimizer: torch.optim.Optimizer) -> None:
    """What follows the backward pass, which needs a driver."""
    for group in optimizer.param_groups:
        for weight in group["params"]:
            weight.grad = torch.empty_like(weight)
    optimizer.step()
    EMA()._blend(module, 0.1)


@pytest.fixture
def drawn_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Generators of a GPU need its driver, and fakes cannot be pinned."""
    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": generator())
    monkeypatch.setattr(Tensor, "pin_memory", lambda noise: noise)


@pytest.mark.parametrize(("optimizer", "distils"), [("muon", False), ("adamw", True)])
@pytest.mark.usefixtures("drawn_on_the_cpu")
def test_a_training_step_stays_on_the_gpu(optimizer: str, distils: bool) -> None:
    module = tiny.module(Training(optimizer=optimizer, caption_dropout=0.1), TextOnGPU())
    module.encoder.load()
    module.denoiser_ema = copy.deepcopy(module.denoiser).requires_grad_(False)
    if distils:
        settings, network = DistillationSettings(taps=(0, 1), student_steps="last"), module.denoiser
        distillation = Distillation.begin(settings, copy.deepcopy(network), network)
        turns = Turns(network, distillation, module.training_settings)
        module.begin_distillation(distillation, turns)
    numbers = torch.tensor([0, 1])
    with FakeTensorMode(allow_non_fake_inputs=True):
        module = module_on_gpu(module)
        batch = {"image": normal(2, 3, 64, 64), "number": numbers, "caption": ["a", "b"]}
        networks = (module.encoder, module.text_encoder, module.denoiser)
        sample = draw_sample(batch, "train", *networks, module.training_settings)
        assert all(x.device.type == "cuda" for x in sample if isinstance(x, Tensor))
        if not distils:
            loss, parts = module.objective.losses(sample, "train")
            step_and_average(module, module.configure_optimizers()["optimizer"])
        else:
            (student, critics), _ = module.configure_optimizers()
            loss, parts = distillation.student_loss(network, sample, 0, 0)
            step_and_average(module, student)
            critic_loss, critic_parts = distillation.critic_loss(network, sample, 0)
            step_and_average(module, critics)
            parts |= {"critic_loss": critic_loss} | critic_parts
        for value in (loss, *parts.values()):
            assert value.device.type == "cuda"


def test_norms_stay_in_bf16_under_autocast() -> None:
    """CUDA's autocast runs `rms_norm` in fp32, which would double what a training step saves."""
    norm = RMSNorm(8)
    was_enabled, was_dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    with FakeTensorMode(allow_non_fake_inputs=True):
        x, shift = (torch.empty(2, 3, 8, device=GPU, dtype=torch.bfloat16) for _ in range(2))
        norm.weight = torch.nn.Parameter(torch.empty(8, device=GPU))
        # torch.autocast itself turns off where there is no GPU.
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        try:
            if torch.rms_norm(x, (8,)).dtype == torch.bfloat16:
                pytest.skip("this torch's autocast leaves rms_norm alone")
            assert norm(x).dtype == torch.bfloat16
            assert norm.modulated(x, shift, shift).dtype == torch.bfloat16
        finally:
            torch.set_autocast_enabled("cuda", was_enabled)
            torch.set_autocast_dtype("cuda", was_dtype)


@pytest.mark.parametrize("eight_bits", [False, True])
def test_eight_bits_are_not_compiled_to_the_slow_kernel(
    eight_bits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchao")
    matched = []

    def compiled(*_: object, **__: object) -> Callable[..., None]:
        return lambda *_: matched.append(inductor.pattern_matcher)

    monkeypatch.setattr(torch, "compile", compiled)
    with torch.device("meta"):
        network = PiD(PiDConfig(num_blocks=1), Geometry(16, 8, 4))
    with on_gpu(network.requires_grad_(False)) as network:
        if eight_bits:
            quantise(network)
        compile_for_inference(network)
        network.velocity_function(network, normal(1, 3, 16, 16), normal(1), None)
    assert matched == [not eight_bits]


def test_published_sizes_have_the_same_code_paths() -> None:
    """Head sizes 64 and 72, with text: the configuration that GPUs are for."""
    with torch.device("meta"):
        network = PiD(PiDConfig(num_blocks=2), Geometry(16, 8, 4))
    with on_gpu(network.requires_grad_(False)) as network, torch.no_grad():
        condition = network.condition(normal(1, 16, 16, 16), normal(1), normal(1, 300, 2304))
        velocity = network(normal(1, 3, 512, 512), normal(1), condition)
        assert (velocity.shape, velocity.device.type) == ((1, 3, 512, 512), "cuda")
