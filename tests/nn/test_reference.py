"""Every `out.*` of the reference vectors, which come from the authors' public network.

`pytest tests/test_reference.py --vectors DIR -s` checks another folder and prints every error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from published import build_from_arguments
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from pid_lightning.diffusion import flow, losses, sampling
from pid_lightning.files.published_layout import from_published
from pid_lightning.nn import Discriminator, PiD

TOLERANCE, GUIDED_TOLERANCE = 1e-4, 2e-3


class Vectors:
    """One file: its inputs, parameters, expected outputs and metadata."""

    def __init__(self, file: Path) -> None:
        tensors = load_file(file)
        with safe_open(file, "pt") as opened:
            self.metadata = opened.metadata() or {}
        self.file = file
        self.inputs = self._group(tensors, "in.")
        self.outputs = self._group(tensors, "out.")
        self.parameters = self._group(tensors, "param.")

    @staticmethod
    def _group(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    def network(self) -> PiD:
        """The network of the file, or of the file that its metadata names as `uses`."""
        if "uses" in self.metadata:
            return Vectors(self.file.parent / self.metadata["uses"]).network()
        denoiser = build_from_arguments(json.loads(self.metadata["config"])).eval()
        denoiser.load_state_dict(from_published(self.parameters, denoiser))
        return denoiser


def test_every_output_agrees(
    vector_file: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = Vectors(vector_file)
    if "latent" not in vectors.inputs:
        computed = _losses(vectors)
    elif "uses" in vectors.metadata:
        computed = _samples(vectors, monkeypatch)
    else:
        computed = _network(vectors)
    assert computed.keys() == vectors.outputs.keys()

    errors = {name: _relative_error(computed[name], vectors.outputs[name]) for name in computed}
    with capsys.disabled():
        print(f"\n{vector_file.name}")
        for name, error in errors.items():
            print(f"  out.{name:<36} relative error {error:.1e}")
    failed = {name: e for name, e in errors.items() if not e <= _tolerance(name)}
    assert not failed


def _tolerance(name: str) -> float:
    guided = re.fullmatch(r"dpm2m_.*_cfg(?!1$).*", name)
    return GUIDED_TOLERANCE if guided else TOLERANCE


def _relative_error(computed: Tensor, expected: Tensor) -> float:
    assert computed.numel() == expected.numel()
    difference = computed.detach().double().flatten() - expected.double().flatten()
    return float(difference.norm() / expected.double().norm())


@torch.no_grad()
def _network(vectors: Vectors) -> dict[str, Tensor]:
    """Velocity, adapter features, single gates, tokens after blocks, RGB head."""
    inputs, denoiser = vectors.inputs, vectors.network()
    with_rgb = "aux_rgb" in vectors.outputs
    condition = denoiser.condition(
        inputs["latent"], inputs["sigma"], inputs["text"], with_rgb=with_rgb
    )
    computed = {"velocity": denoiser(inputs["x"], inputs["t"], condition)}
    for i, feature in enumerate(condition.features):
        computed[f"adapter.{i}"] = feature
    for name in vectors.outputs:
        if name.startswith("gate."):
            i = int(name.removeprefix("gate."))
            feature, shared = condition.features[i], condition.shared_logits[i]
            computed[name] = denoiser.gates[i](inputs["gate_tokens"], feature, shared)
    blocks = json.loads(vectors.metadata.get("feature_blocks", "[]"))
    if blocks:
        tapped = denoiser.features(inputs["x"], inputs["t"], condition, blocks)
        computed |= {f"features.{i}": f for i, f in zip(blocks, tapped, strict=True)}
    if with_rgb:
        computed["aux_rgb"] = condition.rgb
    return computed


@torch.no_grad()
def _samples(vectors: Vectors, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """`sdeN` and `odeN`: N student steps; `dpm2m_N_shiftK_cfgG`: N solver steps."""
    inputs, denoiser = vectors.inputs, vectors.network()
    with_text = denoiser.condition(inputs["latent"], inputs["sigma"], inputs["text"])
    without = denoiser.without_text(with_text, inputs["null_text"])
    student_times = [t for t in json.loads(vectors.metadata["t_schedule"]) if t > 0]

    def velocity(x_t: Tensor, t: Tensor) -> Tensor:
        return denoiser(x_t, t, with_text)

    def null_velocity(x_t: Tensor, t: Tensor) -> Tensor:
        return denoiser(x_t, t, without)

    computed = {}
    for name in vectors.outputs:
        if match := re.fullmatch(r"(sde|ode)(\d+)", name):
            states = []

            def recorded(x_t: Tensor, t: Tensor, states: list[Tensor] = states) -> Tensor:
                states.append(x_t.clone())
                return velocity(x_t, t)

            monkeypatch.setattr(sampling, "draw_noise", _recorded(inputs))
            last = sampling.sample_few_steps(
                recorded,
                inputs["noise"],
                int(match[2]),
                student_times=student_times,
                stochastic=match[1] == "sde",
            )
            computed[name] = last
            computed |= {
                f"{name}.state.{i}": x
                for i, x in enumerate([*states[1:], last])
                if f"{name}.state.{i}" in vectors.outputs
            }
        elif match := re.fullmatch(r"dpm2m_(\d+)_shift([\d.]+)_cfg([\d.]+)", name):
            computed[name] = sampling.sample_solver(
                sampling.guided(velocity, null_velocity, float(match[3])),
                inputs["noise"],
                int(match[1]),
                shift=float(match[2]),
            )
    return computed


def _recorded(inputs: dict[str, Tensor]) -> Callable[..., Tensor]:
    """Replacement for `sampling.draw_noise` that returns the file's noises in order."""
    noises = iter(inputs[key] for key in sorted(inputs) if key.startswith("eps."))
    return lambda *_: next(noises)


def _losses(vectors: Vectors) -> dict[str, Tensor]:
    """DMD2's losses, the flow-matching loss and the discriminator."""
    inputs = vectors.inputs
    student = inputs["generated"].clone().requires_grad_()
    dmd = losses.dmd_loss(student, inputs["teacher_x0"], inputs["fake_x0"])
    (dmd_gradient,) = torch.autograd.grad(dmd, student)

    features = [inputs[key] for key in sorted(inputs) if key.startswith("disc_features.")]
    discriminator = Discriminator(features[0].shape[1], len(features))
    discriminator.load_state_dict(
        {k.replace("cls_pred_heads", "heads"): v for k, v in vectors.parameters.items()}
    )
    logits = discriminator(features)

    x0, eps, t = inputs["generated"], inputs["fm_noise"], inputs["fm_t"]
    x_t = flow.add_noise(x0, eps, t)
    velocity = 0.3 * x_t + 0.1 * t.view(-1, 1, 1, 1)
    flow_matching = losses.flow_matching_loss(velocity, x0, eps)
    return {
        "vsd_loss": dmd,
        "vsd_grad": dmd_gradient,
        "disc_logits": logits,
        "gan_generator_loss": losses.generator_loss(logits),
        "gan_discriminator_loss": losses.discriminator_loss(inputs["real_logits"], logits),
        "fm_x_t": x_t,
        "fm_x0": flow.x0_from_velocity(x_t, velocity, t),
        "fm_loss_for_velocity_0.3x+0.1t": flow_matching,
        "dsm_loss": losses.fake_score_loss(eps - inputs["teacher_x0"], x0, eps),
    }
