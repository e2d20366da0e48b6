"""DecodeSettings: how files are decoded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pid_lightning.checks import Mistake, check_between


@dataclass(frozen=True)
class DecodeSettings:
    """How files are decoded.

    Args:
        sigma: noise level of the latents; added to encoded pictures, assumed for latent files. Of a
            list, as [0,0.2,0.4], each gives a picture, NAME_sigma0.2 and so on.
        steps: sampling steps; null takes as many as the model was trained for.
        seed: of all noise; a file's result does not depend on the other files.
        prompt: caption of every picture; null is none.
        captions: take each file's caption from a NAME.txt beside it, where there is one, as
            pid predict does.
        text_model: language model that encodes captions, the one used in training.
        text_prefix: text in front of captions, as in training.
        text_cache: folder that caches their features.
        guidance_scale: of a teacher's text guidance; 1 is none.
        deterministic: a student adds no fresh noise between its steps.
        tile: side of the tiles in output pixels, auto (tiles of the trained size where the picture
            is larger), or null to decode it whole.
        device: null takes the GPU where there is one.
        dtype: of the weights; null keeps the stored one.
        int8: keep linear layers in 8 bits, half the memory of bf16 (needs torchao).
        window: restrict the patch blocks' attention to windows of at most this many pixels a side.
        format: of the pictures; WebP is lossless.
        compile: compile the network, once per size it sees; with tiles that is once in all.
        compare: also write NAME_compare, the native decode beside PiD's.
        match_colour: take low frequencies from the native decode.
        overwrite: replace existing results.
    """

    sigma: float | list[float] = 0.0
    steps: int | None = None
    seed: int = 0
    prompt: str | None = None
    captions: bool = False
    text_model: str | None = None
    text_prefix: str = ""
    text_cache: str | None = None
    guidance_scale: float = 1.0
    deterministic: bool = False
    tile: int | Literal["auto"] | None = "auto"
    device: str | None = None
    dtype: Literal["bf16", "fp16", "fp32"] | None = None
    int8: bool = False
    window: int | None = None
    format: Literal["png", "webp"] = "png"
    compile: bool = False
    compare: bool = False
    match_colour: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        for sigma in self.sigmas:
            check_between("sigma", sigma, 0, 1)
        if isinstance(self.sigma, list) and not self.sigma:
            raise Mistake("sigma", "an empty list; give at least one noise level.")
        if self.captions and self.prompt is not None:
            raise Mistake("captions", "not together with a prompt for every picture; give one.")
        if any("\ud800" <= letter <= "\udfff" for letter in self.prompt or ""):
            raise Mistake("prompt", f"{self.prompt!a} is not UTF-8 text; give it in UTF-8.")
        for name in ("text_model", "text_prefix", "text_cache"):
            if getattr(self, name) and self.prompt is None and not self.captions:
                raise Mistake(
                    name, "only used with a prompt or captions; give one, or leave it out."
                )

    @property
    def sigmas(self) -> list[float]:
        """The noise levels, one or several."""
        return self.sigma if isinstance(self.sigma, list) else [self.sigma]
