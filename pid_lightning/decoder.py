"""PiDDecoder: latents to pictures for people who never train; no Lightning."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from pid_lightning.encoders.base import Encoder
from pid_lightning.nn import PiD
from pid_lightning.text import TextEncoder
from pid_lightning.weights import ModelInfo


class PiDDecoder:
    """Skeleton; bodies follow.

    Attributes:
        denoiser, info: network and what it is.
        text_encoder: makes features of prompts; None until one is set.
    """

    def __init__(self, denoiser: PiD, info: ModelInfo, encoder: Encoder | None = None) -> None:
        self.denoiser = denoiser.eval().requires_grad_(False)
        self.info = info
        self._encoder = encoder
        self.text_encoder: TextEncoder | None = None

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        dtype: torch.dtype | None = None,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> PiDDecoder:
        raise NotImplementedError

    def save_pretrained(self, folder: str | Path) -> None:
        raise NotImplementedError

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload a PiD decoder",
    ) -> str:
        raise NotImplementedError

    scale: int = property(lambda self: self.info.scale)  # type: ignore[assignment]
    latent_stride: int = property(lambda self: self.info.latent_stride)  # type: ignore
    latent_channels: int = property(lambda self: self.info.latent_channels)  # type: ignore
    latent_space: str = property(lambda self: self.info.latent_space)  # type: ignore
    device = property(lambda self: self.denoiser.out.weight.device)
    dtype = property(lambda self: self.denoiser.dtype)

    @property
    def encoder(self) -> Encoder:
        """The frozen encoder, built and loaded from `info` at first use."""
        raise NotImplementedError

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] to normalised latents."""
        raise NotImplementedError

    def encode_prompt(self, prompt: str | list[str], cache: str | Path | None = None) -> Tensor:
        """(B, L, D_text)."""
        raise NotImplementedError

    def decode(
        self,
        latents: Tensor,  # (B, C, h, w) normalised
        latent_sigma: float | Sequence[float] | Tensor = 0.0,
        prompt: str | list[str] | Tensor | None = None,
        steps: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        seed: int | None = None,
        tile: int | Literal["auto"] | None = None,
        progress: bool = True,
        guidance_scale: float = 1.0,
    ) -> Tensor:
        """(B, 3, H, W) in [-1, 1], fp32."""
        raise NotImplementedError

    def estimate_memory(self, height: int, width: int, tile: int | str | None = None) -> int:
        raise NotImplementedError

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> PiDDecoder:
        raise NotImplementedError

    def compile(self) -> PiDDecoder:
        raise NotImplementedError

    def release(self) -> None:
        raise NotImplementedError
