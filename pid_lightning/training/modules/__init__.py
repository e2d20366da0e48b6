"""The LightningModules, one per latent family."""

from pid_lightning.training.modules.dinov2 import DINOv2PiD
from pid_lightning.training.modules.siglip import SigLIPPiD
from pid_lightning.training.modules.vae import VAEPiD
from pid_lightning.training.settings import Evaluation, Training

__all__ = ["DINOv2PiD", "Evaluation", "SigLIPPiD", "Training", "VAEPiD"]
