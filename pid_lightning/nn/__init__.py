"""The networks, in plain torch."""

from pid_lightning.nn.adapter import LatentAdapter, SigmaGate
from pid_lightning.nn.condition import Condition
from pid_lightning.nn.config import AdapterConfig, PiDConfig
from pid_lightning.nn.denoiser import PiD
from pid_lightning.nn.discriminator import Discriminator
from pid_lightning.nn.geometry import Geometry

__all__ = [
    "AdapterConfig",
    "Condition",
    "Discriminator",
    "Geometry",
    "LatentAdapter",
    "PiD",
    "PiDConfig",
    "SigmaGate",
]
