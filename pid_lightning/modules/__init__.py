"""The LightningModules, one per latent family."""

from pid_lightning.modules.dinov2 import DINOv2PiD
from pid_lightning.modules.settings import Evaluation, Training
from pid_lightning.modules.siglip import SigLIPPiD
from pid_lightning.modules.vae import VAEPiD

__all__ = ["DINOv2PiD", "Evaluation", "SigLIPPiD", "Training", "VAEPiD"]
