"""Training without a teacher: losses at a student's few times, and latents of whole photographs."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors.torch import save_file

from pid_lightning import AdapterConfig, LatentCrops, Regression, Training, VAEPiD
from pid_lightning.checks import Mistake
from pid_lightning.diffusion import flow
from pid_lightning.diffusion.losses import latent_loss
from pid_lightning.nn.geometry import Geometry
from pid_lightning.pictures.lpips import lpips_vgg_network
from pid_lightning.pictures.resizing import reduce_picture
from pid_lightning.training.data.latent_crops import WholePictures
from pid_lightning.training.objective import FlowMatching
from pid_lightning.training.regression import RegressionObjective, RegressionSettings
from pid_lightning.training.sample import Sample

NATIVE = AdapterConfig(
    width=16, num_res_blocks=1, unpack=2, native="taef2", denoise_width=8, denoise_blocks=1
)


class Denoiser:
    """Predicts a constant picture and records what it is shown."""

    def __init__(self, picture: torch.Tensor) -> None:
        self.picture, self.shown = picture, []
        self.geometry = Geometry(4, 16, 4)

    def adapt(self, latents, latent_sigma):
        return SimpleNamespace(latents=latents, base=torch.zeros_like(self.picture))

    def condition_on(self, *_):
        return None

    def __call__(self, x_t, t, condition):
        self.shown.append((x_t, t[0].item()))
        return flow.velocity_from_x0(x_t, self.picture, t)


def run(settings: RegressionSettings, denoiser: Denoiser, x0: torch.Tensor, turn: int = 0) -> dict:
    objective = RegressionObjective(denoiser, Training(seed=1), settings)
    latents = torch.zeros(len(x0), 4, 1, 1)
    sample = Sample(x0, x0, latents, torch.zeros(len(x0)), None, None, None, [0, 1], latents + 2)
    loss, parts = objective.training_step(SimpleNamespace(global_step=turn), sample)
    assert parts["loss"] == loss
    return parts


def test_each_loss_has_its_weight():
    x0, picture = torch.zeros(2, 3, 64, 64), torch.full((2, 3, 64, 64), 0.5)
    plain = run(RegressionSettings(pixel_weight=3.0), Denoiser(picture), x0)
    assert plain["pixel_loss"] == pytest.approx(0.5)
    assert plain["loss"] == pytest.approx(1.5)
    more = run(RegressionSettings(alex_weight=0.5, latent_weight=0.1), Denoiser(picture), x0)
    assert more["alex_loss"] > 0
    expected = 2 * 0.5 + 0.5 * more["alex_loss"] + 0.1 * more["latent_loss"]
    assert more["loss"] == pytest.approx(expected.item())


def test_later_steps_see_the_picture_of_the_first_noised_anew():
    x0, picture = torch.zeros(2, 3, 64, 64), torch.full((2, 3, 64, 64), 0.5)
    settings = RegressionSettings(student_times=(0.9, 0.5, 0.1), last_share=0.5)
    shown = []
    for turn in range(200):
        denoiser = Denoiser(picture)
        run(settings, denoiser, x0, turn)
        shown.append(denoiser.shown)
    times = [[time for _, time in one] for one in shown]
    counts = {
        time: sum(one[-1] == pytest.approx(time) for one in times) for time in (0.9, 0.5, 0.1)
    }
    assert counts[0.1] == pytest.approx(100, abs=25)
    assert counts[0.9] == pytest.approx(50, abs=22)
    first = next(one for one, told in zip(shown, times, strict=True) if len(told) == 1)
    assert first[0][0].std().item() == pytest.approx(1, abs=0.05)  # noise, whatever the time
    twice = next(one for one in shown if len(one) == 2 and one[1][1] == pytest.approx(0.1))
    rest = twice[1][0] - 0.9 * picture
    assert rest.std().item() == pytest.approx(0.1, abs=0.01)
    assert abs(rest.mean()) < 0.01


def test_the_latent_loss_is_one_for_the_best_linear_guess():
    generator = torch.Generator().manual_seed(0)
    z, eps = torch.randn(2, 3, 8, 64, 64, generator=generator)
    for sigma in (0.1, 0.5, 0.8):
        guess = (1 - sigma) / ((1 - sigma) ** 2 + sigma**2) * ((1 - sigma) * z + sigma * eps)
        loss = latent_loss(guess, z, torch.full((3,), sigma))
        assert loss.item() == pytest.approx(1, abs=0.02)
    assert latent_loss(z, z, torch.zeros(3)) == 0


def test_lpips_with_vgg_is_the_one_of_torchmetrics(tmp_path):
    from torchmetrics.functional.image.lpips import _LPIPS

    theirs = _LPIPS(pretrained=False, net="vgg", pnet_rand=True)
    convolutions = [m for m in theirs.net.modules() if isinstance(m, torch.nn.Conv2d)]
    state = {}
    for i, convolution in enumerate(convolutions):
        state |= {f"conv{i}.{name}": value for name, value in convolution.state_dict().items()}
    for i in range(5):
        head = theirs.get_submodule(f"lin{i}").model[-1].weight
        state[f"lin{i}.weight"] = head.data.abs_().flatten()
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "vgg.safetensors")
    ours = lpips_vgg_network(tmp_path / "vgg.safetensors")
    a, b = torch.rand(2, 2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.testing.assert_close(ours(a, b), theirs(a, b).flatten(), rtol=1e-4, atol=1e-6)


def whole_pictures(margin: int, sizes: list[tuple[int, int]]) -> WholePictures:
    """Photographs and "latents" whose values tell their own position."""
    photographs, latents = [], []
    for height, width in sizes:
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        pixels = torch.stack((rows // 4, columns // 4, rows * 0)).to(torch.uint8)
        photographs.append([pixels])
        both = torch.stack((pixels, pixels.flip(-1))).float()
        latents.append([both[:, :, ::16, ::16]])  # the top left pixel of every cell
    return WholePictures(photographs, latents, 32, 16, margin, seed=3)


@pytest.mark.parametrize("margin", [0, 1, 2])
def test_crops_of_latents_are_those_of_the_pixels(margin):
    pictures = whole_pictures(margin, [(96, 128), (32, 96)])
    offsets = []
    for draw in range(60):
        sample = pictures[draw % 2, draw]
        pixels = (sample["image"] + 1) * 127.5
        row, column = sample["offset"].tolist()
        own = sample["latents"][:, row : row + 2, column : column + 2]
        torch.testing.assert_close(own, pixels[:, ::16, ::16])
        offsets.append((draw % 2, row, column))
        assert sample["latents"].shape[1:] == (2 if draw % 2 else 2 + 2 * margin, 2 + 2 * margin)
    assert {row for which, row, _ in offsets if which} == {0}  # no room above or below
    assert {column for which, _, column in offsets if not which} == {*range(2 * margin + 1)}


def test_a_run_keeps_latents_of_whole_photographs_and_learns_from_them(tmp_path):
    def fit(*callbacks, train="all"):
        config = tiny.config(
            patch_size=8, prediction="x0", residual=True, refiner_width=8, adapter=NATIVE
        )
        training = Training(learning_rate=1e-3, warmup_steps=1, train=train)
        module = VAEPiD(vae="taef2", denoiser=config, training=training)
        data = LatentCrops(
            "bundled",
            image_size=64,
            batch_size=2,
            shorter_sides=(128,),
            latents_file=str(tmp_path / "latents.safetensors"),
            seed=0,
        )
        before = {name: value.clone() for name, value in module.denoiser.state_dict().items()}
        options = {"max_steps": 2, "limit_val_batches": 0, "callbacks": [*callbacks]}
        tiny.quiet_trainer(tmp_path, **options).fit(module, data)
        after = module.denoiser.state_dict()
        changed = {name for name, value in after.items() if not value.equal(before[name])}
        return module, data, changed

    module, data, changed = fit(Regression(latent_weight=1.0))
    assert module.student_times == (0.999, 0.8, 0.5, 0.2)
    assert type(module.objective) is FlowMatching  # again
    decoder = module.denoiser.adapter.native.decoder.state_dict()
    for name, value in module.encoder.network["decoder"].state_dict().items():
        assert value.equal(decoder[name])  # read when the fit began, and as it was since
    assert {"out.weight", "refiner.last.weight"} <= changed
    assert any(name.startswith("adapter.native.denoise.") for name in changed)
    pictures = data._pictures["train"]
    image = torch.stack([pictures.photographs[0][0], pictures.photographs[0][0].flip(-1)])
    expected = module.encoder.encode(reduce_picture(image / 127.5 - 1, 4)).half()
    torch.testing.assert_close(pictures.latents[0][0], expected)

    written = (tmp_path / "latents.safetensors").stat().st_mtime_ns
    _, again, changed = fit(train="latents")
    assert (tmp_path / "latents.safetensors").stat().st_mtime_ns == written
    assert again._pictures["train"].latents[3][0].equal(pictures.latents[3][0])
    changed = {name for name in changed if ".decoder." not in name}
    assert changed
    assert all(name.startswith("adapter.native.denoise.") for name in changed)


def test_a_run_that_began_with_another_resumes_exactly(tmp_path):
    def fit(folder, steps, resume=None, start=None):
        adapter = dataclasses.replace(NATIVE, denoise_width=0)
        config = tiny.config(
            patch_size=8, prediction="x0", residual=True, refiner_width=8, adapter=adapter
        )
        training = Training(learning_rate=1e-3, warmup_steps=1, optimizer="muon")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = VAEPiD(vae="taef2", denoiser=config, training=training, init_from=start)
            trainer = tiny.trainer(folder, steps, Regression(alex_weight=0.1))
            trainer.fit(module, tiny.data(2), ckpt_path=resume)
        return folder / "last.ckpt"

    start = str(fit(tmp_path / "start", 1))
    whole = fit(tmp_path / "whole", 3, start=start)
    fit(tmp_path / "parts", 2, start=start)
    resumed = fit(tmp_path / "parts", 3, tmp_path / "parts/last.ckpt", start)
    once, twice = (torch.load(path, weights_only=True) for path in (whole, resumed))
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        tiny.assert_equal_states(once[part], twice[part], part)


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        ({"student_times": (0.5, 0.9)}, "student_times"),
        ({"last_share": 1.5}, "last_share"),
        ({"pixel_weight": -1.0}, "pixel_weight"),
        ({"vgg_weight": 1.0}, "vgg"),
    ],
)
def test_mistakes_are_named(arguments, option):
    with pytest.raises(Mistake) as mistake:
        Regression(**arguments)
    assert mistake.value.option == f"Regression {option}"
