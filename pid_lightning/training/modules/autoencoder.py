"""Training of the small autoencoder, starting from principal components."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn import functional as F

from pid_lightning.checks import Mistake, check_at_least
from pid_lightning.diffusion.randomness import draw_noise, sample_generators
from pid_lightning.encoders.small_autoencoder import SmallAutoencoder, block_moments
from pid_lightning.encoders.small_vae import save_autoencoder
from pid_lightning.files.atomic import make_folder
from pid_lightning.pictures.metrics import psnr
from pid_lightning.training.optimizers import make_schedule


class AutoencoderModule(pl.LightningModule):
    """Trains a `SmallAutoencoder` on batches with an ``"image"`` (B, 3, H, W) in [-1, 1] and its
    ``"number"`` (B,).

    It is a KL autoencoder with a fixed posterior width: latents are normalised by running
    statistics (mean 0, variance 1 per channel), then decoded with Gaussian noise of
    `posterior_std`. The divergence from N(0, 1) is thus constant and needs no loss term; the
    noise alone keeps the decoder smooth. The decoder undoes the normalisation, so drifting
    statistics do no harm.

    Args:
        width, num_encoder_blocks, num_decoder_blocks, refine_width: see `SmallAutoencoder`.
        posterior_std: standard deviation of the noise on normalised latents during training.
        num_init_batches: training batches used to compute the principal components.
        learning_rate: peak learning rate of Adam.
        warmup_steps: of linear warm-up, before a cosine that ends at 0 with the last step.
        seed: of the noise.
        export_path: file for `VAEPiD(vae=...)`, written when training ends.

    Raises:
        Mistake: a value is out of range, or `export_path` does not end in .safetensors.
    """

    def __init__(
        self,
        width: int = 160,
        num_encoder_blocks: int = 3,
        num_decoder_blocks: int = 4,
        refine_width: int = 32,
        posterior_std: float = 0.03,
        num_init_batches: int = 64,
        learning_rate: float = 1.5e-3,
        warmup_steps: int = 200,
        seed: int = 0,
        export_path: str | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("posterior_std", posterior_std, 0),
            ("num_init_batches", num_init_batches, 1),
            ("learning_rate", learning_rate, 0),
            ("warmup_steps", warmup_steps, 1),
        ):
            check_at_least(f"model.{name}", value, least)
        if export_path is not None and not export_path.endswith(".safetensors"):
            raise Mistake("model.export_path", f"{export_path} must end in .safetensors.")
        self.save_hyperparameters()
        self.network: SmallAutoencoder = SmallAutoencoder(
            width=width,
            num_encoder_blocks=num_encoder_blocks,
            num_decoder_blocks=num_decoder_blocks,
            refine_width=refine_width,
        ).to(memory_format=torch.channels_last)  # an eighth faster to train on a CPU

    def forward(self, images: Tensor) -> Tensor:
        """Encode and decode images (B, 3, H, W) in [-1, 1], without noise."""
        return self.network(images)

    def setup(self, stage: str) -> None:
        """Check that `export_path` can be written."""
        if stage == "fit" and self.hparams.export_path is not None:
            make_folder("model.export_path", Path(self.hparams.export_path).parent)

    def on_train_start(self) -> None:
        """Initialise a new run with the principal components of its first training batches."""
        if self.global_step > 0:  # a resumed run has its weights
            return
        batches = islice(self.trainer.train_dataloader, self.hparams.num_init_batches)
        images = (batch["image"] for batch in batches)
        moments = block_moments(images, self.network.latent_stride)
        # Summed over processes, so that all of them start from the same components.
        moments = self.trainer.strategy.reduce(moments.to(self.device), reduce_op="sum").cpu()
        self.network.init_principal_components(moments)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        images = batch["image"]
        raw = self.network.encode_raw(images)
        self.update_statistics(raw)
        latents = (raw - self.network.latent_mean) / self.network.latent_std
        # By sample, so that runs resume exactly.
        generators = sample_generators(
            self.hparams.seed, "posterior", batch["number"].tolist(), self.device
        )
        eps = draw_noise(latents.shape, generators, self.device)
        latents = latents + self.hparams.posterior_std * eps
        loss = reconstruction_loss(self.network.decode(latents), images)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    @torch.no_grad()
    def update_statistics(self, raw: Tensor, momentum: float = 0.002) -> None:
        """Move the network's latent statistics slowly towards those of the batch."""
        mean, std = self.network.latent_mean, self.network.latent_std
        deviation = raw.float() - mean
        mean += momentum * deviation.mean((0, 2, 3)).view_as(mean)
        variance = deviation.square().mean((0, 2, 3)).view_as(std)
        std.copy_(std.square().lerp(variance, momentum).sqrt())

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        images = batch["image"]
        value = psnr(self(images).float().clamp(-1, 1), images).mean()
        self.log("val/psnr", value, prog_bar=True, batch_size=len(images), sync_dist=True)

    def on_train_end(self) -> None:
        """Write `export_path`."""
        if self.hparams.export_path is None or not self.trainer.is_global_zero:
            return
        path = Path(self.hparams.export_path)
        score = self.trainer.callback_metrics.get("val/psnr")
        measured = "" if score is None else f", last validation {score:.2f} dB PSNR"
        save_autoencoder(self.network, path, f"{self.global_step} steps{measured}")

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.Adam(
            self.parameters(), lr=self.hparams.learning_rate, betas=(0.9, 0.99)
        )
        num_steps = self.trainer.estimated_stepping_batches
        schedule = make_schedule(optimizer, self.hparams.warmup_steps, num_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def reconstruction_loss(output: Tensor, images: Tensor) -> Tensor:
    """Root mean square error per picture (B, 3, H, W), averaged over pictures.

    A compromise between mean squared error, dominated by the hardest pictures, and mean PSNR,
    dominated by the easiest.
    """
    error = F.mse_loss(output.float(), images, reduction="none").mean((1, 2, 3))
    return error.clamp_min(1e-10).sqrt().mean()
