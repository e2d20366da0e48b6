"""The networks, in plain torch."""

from pid_lightning.nn.adapter import LatentAdapter, SigmaGate
from pid_lightning.nn.condition import Condition
from pid_lightning.nn.config import AdapterConfig, PiDConfig
from pid_lightning.nn.denoiser import PiD
from pid_lightning.nn.discriminator import Discriminator

__all__ = [
    "AdapterConfig",
    "Condition",
    "Discriminator",
    "LatentAdapter",
    "PiD",
    "PiDConfig",
    "SigmaGate",
]
