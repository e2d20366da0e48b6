"""The small autoencoder: what it promises, where it starts, and that it learns."""

from __future__ import annotations

import csv

import lightning.pytorch as pl
import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader

from pid_lightning import PiDConfig, VAEPiD
from pid_lightning.checks import Mistake
from pid_lightning.encoders.small_autoencoder import SmallAutoencoder, block_moments
from pid_lightning.encoders.small_vae import BUNDLED, SmallVAE, save_autoencoder
from pid_lightning.pictures.metrics import psnr
from pid_lightning.training.modules.autoencoder import AutoencoderModule, reconstruction_loss

PHOTOS = BUNDLED.parent / "photos"
TINY = {"width": 16, "num_encoder_blocks": 1, "num_decoder_blocks": 1, "refine_width": 4}


def photographs(split: str, size: int | None = None) -> list[torch.Tensor]:
    """The bundled photographs (1, 3, H, W) in [-1, 1], or their central squares of `size`."""
    pictures = []
    for path in sorted((PHOTOS / split).glob("*.jpg")):
        with Image.open(path) as picture:
            image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
        height, width = ((size or side) // 8 * 8 for side in image.shape[-2:])
        top, left = (image.shape[-2] - height) // 2, (image.shape[-1] - width) // 2
        pictures.append(image[..., top : top + height, left : left + width])
    return pictures


@pytest.fixture(scope="module")
def crops() -> torch.Tensor:
    return torch.cat(photographs("train", 128))  # (18, 3, 128, 128)


@pytest.fixture(scope="module")
def bundled() -> SmallAutoencoder:
    encoder = SmallVAE()
    encoder.load()
    return encoder.network


def test_shapes_and_stride(bundled):
    latents = bundled.encode(torch.zeros(2, 3, 32, 48))
    assert latents.shape == (2, bundled.latent_channels, 4, 6) == (2, 16, 4, 6)
    assert bundled.latent_stride == 8
    assert bundled.decode(latents).shape == (2, 3, 32, 48)


def test_sides_must_fit_the_stride(bundled):
    for refuse in (bundled.encode, lambda images: block_moments([images], 8)):
        with pytest.raises(Mistake) as told:
            refuse(torch.zeros(1, 3, 32, 44))
        assert told.value.option == "images"


def test_bundled_is_frozen_and_small(bundled):
    assert not bundled.training
    assert not any(p.requires_grad for p in bundled.parameters())
    assert BUNDLED.stat().st_size <= 6_000_000


def test_bundled_beats_the_linear_code_on_photographs_kept_aside(bundled, crops):
    linear = SmallAutoencoder()
    linear.init_principal_components(block_moments([crops], 8))
    with torch.no_grad():
        scores = torch.tensor(
            [
                [psnr(net(image), image) for net in (bundled, linear)]
                for image in photographs("test")
            ]
        ).mean(0)
    assert scores[0] > 29.5  # 30.29
    assert scores[0] > scores[1] + 1.5


def test_bundled_latents_are_normalised(bundled):
    with torch.no_grad():
        latents = [
            bundled.encode(image).flatten(2)[0]
            for split in ("train", "test")
            for image in photographs(split)
        ]
    latents = torch.cat(latents, 1)  # (16, all cells)
    assert latents.mean(1).abs().max() < 0.3
    assert latents.std(1).min() > 0.7
    assert latents.std(1).max() < 1.4


def test_bundled_tolerates_a_little_noise(bundled, crops):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        latents = bundled.encode(crops)
        noise = torch.randn(latents.shape, generator=generator)
        clean, noisy = (psnr(bundled.decode(latents + s * noise), crops) for s in (0, 0.03))
    assert (clean - noisy).mean() < 1


def test_start_is_the_projection_on_principal_components(crops):
    network = SmallAutoencoder(**TINY)
    network.init_principal_components(block_moments([crops], 8))
    # The same by hand: blocks as rows, about the mean colour, singular vectors.
    blocks = F.unfold(crops.double(), 8, stride=8)  # (B, 3*8*8, N), colour outermost
    colour = crops.double().mean((0, 2, 3))
    centre = colour.repeat_interleave(64)[:, None]
    rows = (blocks - centre).transpose(1, 2).flatten(0, 1)
    basis = torch.linalg.svd(rows, full_matrices=False).Vh[:16]
    expected = basis.T @ (basis @ (blocks - centre)) + centre
    expected = F.fold(expected, crops.shape[-2:], 8, stride=8).float()
    with torch.no_grad():
        torch.testing.assert_close(network(crops), expected, atol=2e-4, rtol=0)
        latents = network.encode(crops).transpose(0, 1).flatten(1)
    # About the mean colour, so its mean is small and its second moment 1, uncorrelated.
    torch.testing.assert_close(
        latents @ latents.T / latents.shape[1], torch.eye(16), atol=1e-3, rtol=0
    )


def test_moments_add_up(crops):
    parts = block_moments([crops[:5]], 8) + block_moments([crops[5:]], 8)
    torch.testing.assert_close(parts, block_moments([crops], 8))
    with pytest.raises(Mistake) as told:
        block_moments([], 8)
    assert told.value.option == "batches"


def test_normalisation_leaves_the_reconstruction_alone(crops):
    torch.manual_seed(0)
    network = SmallAutoencoder(**TINY)
    before = network(crops[:2])
    network.latent_mean.normal_()
    network.latent_std.uniform_(0.5, 2)
    torch.testing.assert_close(network(crops[:2]), before, atol=1e-4, rtol=1e-4)


def test_statistics_converge_to_those_of_the_latents(crops):
    torch.manual_seed(0)
    module = AutoencoderModule(**TINY)
    raw = 3 + 2 * torch.randn(4, 16, 32, 32)
    for _ in range(400):
        module.update_statistics(raw, momentum=0.05)
    network = module.network
    torch.testing.assert_close(network.latent_mean.flatten(), raw.mean((0, 2, 3)))
    torch.testing.assert_close(
        network.latent_std.flatten(), raw.transpose(0, 1).flatten(1).std(1), rtol=1e-3, atol=0
    )


def test_loss_is_the_mean_of_root_mean_squares():
    output = torch.zeros(2, 3, 4, 4)
    images = torch.stack([torch.full((3, 4, 4), 0.5), torch.full((3, 4, 4), 0.1)])
    assert reconstruction_loss(output, images).item() == pytest.approx(0.3)
    torch.testing.assert_close(psnr(output, images), 20 * torch.log10(2 / torch.tensor([0.5, 0.1])))


def test_a_place_that_cannot_be_written_to_is_told_before_training():
    module = AutoencoderModule(**TINY, export_path="/proc/none/small.safetensors")
    with pytest.raises(OSError, match=r"^model.export_path: cannot write to folder /proc/none"):
        module.setup("fit")


def numbered(crops):
    samples = [{"image": image, "number": i} for i, image in enumerate(crops)]
    return DataLoader(samples, batch_size=6)


def test_runs_resume_exactly(crops, tmp_path):
    class StopAfterAnEpoch(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = True

    def fit(*callbacks, resume=None):
        torch.manual_seed(0)  # as the command line does, for the initial weights
        module = AutoencoderModule(**TINY, warmup_steps=1)
        trainer = tiny.quiet_trainer(tmp_path, max_epochs=2, callbacks=[*callbacks])
        trainer.fit(module, numbered(crops[:, :, :64, :64]), ckpt_path=resume)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return module.state_dict()

    whole = fit()
    fit(StopAfterAnEpoch())
    tiny.assert_equal_states(fit(resume=tmp_path / "last.ckpt"), whole)


def test_fit_starts_from_components_learns_and_exports(crops, tmp_path):
    torch.manual_seed(0)
    loader = numbered(crops[:, :, :64, :64])
    path = tmp_path / "new" / "small.safetensors"
    module = AutoencoderModule(**TINY, warmup_steps=1, export_path=str(path))
    losses = []

    class Record(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            losses.append(outputs["loss"].item())

    trainer = tiny.quiet_trainer(tmp_path, max_epochs=10, callbacks=[Record()])
    trainer.fit(module, loader, loader)
    losses = torch.tensor(losses).view(10, 3).mean(1)  # by epoch
    assert losses.isfinite().all()
    assert losses[-1] < losses[0] < 0.2  # a random linear path would give about 0.5
    exported = VAEPiD(vae=str(path), denoiser=PiDConfig(num_blocks=1)).encoder
    exported.load()
    torch.testing.assert_close(
        exported.decode(exported.encode(crops[:2])),
        module.network(crops[:2]).detach(),
        atol=1e-2,
        rtol=0,
    )


def test_files_are_loaded_strictly(tmp_path):
    network = SmallAutoencoder(**TINY)
    path = tmp_path / "small.safetensors"
    save_autoencoder(network, path, "a test")
    encoder = SmallVAE(path)
    assert encoder.network.config == network.config
    assert encoder.latent_space != SmallVAE().latent_space
    network.config = {**network.config, "width": 8}
    save_autoencoder(network, path, "a test")
    with pytest.raises(ValueError, match="of another shape"):
        SmallVAE(path).load()
    with pytest.raises(FileNotFoundError, match="missing"):
        SmallVAE(tmp_path / "missing.safetensors")
    for content in (b"not weights", path.read_bytes()[:100]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is no autoencoder of this package"):
            SmallVAE(path)


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="warmup_steps: 0"):
        AutoencoderModule(warmup_steps=0)
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        AutoencoderModule(export_path="small.pt")


def test_photographs_are_listed_free_and_large_enough():
    with open(PHOTOS / "MANIFEST.tsv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    files = {path.relative_to(PHOTOS).as_posix() for path in PHOTOS.rglob("*.jpg")}
    assert {row["file"] for row in rows} == files
    assert 16 <= len(files) <= 24
    assert sum((PHOTOS / name).stat().st_size for name in files) <= 3_000_000
    for row in rows:
        assert row["licence"] == "CC0-1.0" or row["licence"].startswith("Public domain")
        assert row["author"]
        assert row["source"]
        with Image.open(PHOTOS / row["file"]) as picture:
            assert picture.size == (int(row["width"]), int(row["height"]))
            assert min(picture.size) >= 256
