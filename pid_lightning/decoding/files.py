"""Files decoded one by one: each read, sampled, compared and written."""

from __future__ import annotations

import copy
import json
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pid_lightning.checks import Mistake
from pid_lightning.decoding.arguments import check_options
from pid_lightning.decoding.decoder import PiDDecoder
from pid_lightning.decoding.plan import check_deterministic
from pid_lightning.decoding.settings import DecodeSettings
from pid_lightning.diffusion.noising import add_latent_noise
from pid_lightning.diffusion.randomness import draw_noise, sample_generators
from pid_lightning.files.models import fingerprint
from pid_lightning.pictures.colour import colour_shift, match_colour
from pid_lightning.pictures.files import read_picture, write_picture
from pid_lightning.pictures.grids import picture_grid
from pid_lightning.pictures.inputs import LATENTS_SUFFIX, read_latents
from pid_lightning.pictures.resizing import enlarge_picture, pad_picture


class FileDecoder:
    """Decodes files with one model and one set of settings.

    A picture depends on the content of its file, the model and the settings, which hold the seed of
    all noise: not on the file's name, nor on other files. Captions are encoded once, here.

    Args:
        decoder: the model.
        settings: how to decode; its dtype, device, format and overwrite are the caller's.
        description: plain values stored beside each picture, as from `describe`.
        progress: whether to show a progress bar per file.
        captions: of files, in place of the settings' prompt for all.

    Raises:
        Mistake: one of the settings does not fit the model.
        ValueError: no `text_encoder` for the prompt.
    """

    def __init__(
        self,
        decoder: PiDDecoder,
        settings: DecodeSettings,
        description: dict[str, Any],
        progress: bool = True,
        captions: Mapping[Path, str] | None = None,
    ) -> None:
        config, guided = decoder.info.config, settings.guidance_scale != 1
        student_times = decoder.info.student_times
        prompt = settings.prompt if captions is None else ""
        options = (settings.steps, settings.tile, prompt, settings.guidance_scale)
        check_options(decoder.denoiser, student_times, *options)
        check_deterministic(student_times, settings.deterministic)
        if (settings.compare or settings.match_colour) and not decoder.encoder.has_decoder:
            raise Mistake(
                "compare and match_colour",
                f"need a native decoder, which {decoder.latent_space} latents lack; leave them "
                "out.",
            )
        self.decoder = decoder
        self.settings = settings
        self.progress = progress
        self.description = description
        self._captions, self._cache = captions, settings.text_cache
        self._prompt = self._negative_prompt = None
        if captions is not None and self._cache is None:  # those of many files are large
            self._temporary = tempfile.TemporaryDirectory()
            self._cache = self._temporary.name
        for caption in sorted({*(captions or {}).values()}):
            decoder.encode_prompt(caption, self._cache)
        if settings.prompt is not None:
            self._prompt = decoder.encode_prompt(settings.prompt, self._cache)
        if prompt is not None and guided and not config.learned_null:
            self._negative_prompt = decoder.encode_prompt("", self._cache)

    def at(self, sigma: float) -> FileDecoder:
        """The same at one noise level, such as one of several in the settings."""
        other = copy.copy(self)
        other.settings = replace(self.settings, sigma=sigma)
        return other

    def decode(self, file: Path, path: Path) -> None:
        """Decode one file; write its picture, its JSON and, if asked for, the comparison.

        Args:
            file: a picture, or latents in .safetensors.
            path: of the new picture.
        """
        decoder, settings = self.decoder, self.settings
        source, size = read_input(decoder, file)
        is_latents = _holds_latents(file)
        latents = source.to(decoder.device) if is_latents else self._encode(source)
        text = self._prompt
        if self._captions is not None:
            text = decoder.encode_prompt(self._captions[file], self._cache)
        tile = decoder.choose_tile(*decoder.output_size(latents), settings.tile)
        with warnings.catch_warnings():  # `choose_tile` has warned already
            warnings.filterwarnings("ignore", "The network sees")
            picture = decoder.decode(
                latents,
                settings.sigma,
                text,
                settings.steps,
                seed=settings.seed,
                tile=tile,
                progress=self.progress,
                guidance_scale=settings.guidance_scale,
                negative_prompt=self._negative_prompt,
                deterministic=settings.deterministic,
            )[0]
        height, width = (side * decoder.scale for side in size)
        metadata = {**self._describe(file), "tile": tile, "size": [height, width]}
        if settings.compare or settings.match_colour:
            native = decoder.encoder.decode(latents.float())[0]
            shift = colour_shift(picture, native)
            tqdm.write(f"{file.name}: {shift}")
            metadata["colour_shift"] = asdict(shift)
            if settings.match_colour:
                picture = match_colour(picture, native)
            if settings.compare:
                enlarged = enlarge_picture(native[None], decoder.scale)[0]
                pair = [side[:, :height, :width] for side in (enlarged, picture)]
                grid = picture_grid([pair], ["native", "PiD"]) * 2 - 1
                write_picture(grid, comparison(path), metadata)
        write_picture(picture[:, :height, :width], path, metadata)

    def describes(self, file: Path, path: Path) -> bool:
        """Whether the JSON beside a result tells that it is what `decode` makes of a file."""
        try:
            told = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        ours = json.loads(json.dumps(self._describe(file)))
        return isinstance(told, dict) and told | ours == told

    def _describe(self, file: Path) -> dict[str, Any]:
        """What made a picture, whether alone or among others."""
        caption = self.settings.prompt if self._captions is None else self._captions[file]
        alone = {"prompt": caption, "captions": False, "overwrite": False}
        settings = asdict(self.settings) | alone
        return {"input": str(file), **self.description, "settings": settings}

    def _encode(self, image: Tensor) -> Tensor:
        """Latents of a picture, noised from a random stream of its own."""
        latents, settings = self.decoder.encode(image), self.settings
        if settings.sigma == 0:
            return latents
        generators = sample_generators(settings.seed, "latents", [0])
        eps = draw_noise(latents.shape, generators, latents.device)
        sigma = torch.full((1,), settings.sigma)
        return add_latent_noise(latents, eps, sigma, self.decoder.info.noise_frame)


def read_input(decoder: PiDDecoder, file: Path) -> tuple[Tensor, tuple[int, int]]:
    """Read latents (1, C, h, w) or a padded picture (1, 3, H, W), and the (height, width) of the
    native picture without padding.

    Raises:
        Mistake: the file is damaged, or its latents do not fit the model.
    """
    if _holds_latents(file):
        channels = decoder.info.geometry.latent_channels
        latents = read_latents(file, decoder.latent_space, channels)[None]
        height, width = decoder.output_size(latents)
        decoder.denoiser.check_size(height, width)
        return latents, (height // decoder.scale, width // decoder.scale)
    image = read_picture(file)[None]
    # Whole cells for the encoder, whole patches for the output.
    multiple = decoder.denoiser.alignment // decoder.scale
    return pad_picture(image, multiple), tuple(image.shape[-2:])


def comparison(path: Path) -> Path:
    """Path of the comparison that is written beside a picture."""
    return path.with_stem(f"{path.stem}_compare")


def describe(decoder: PiDDecoder, model: str | None) -> dict[str, Any]:
    """What tells a model apart, as plain values; of weights that are not in 8 bits yet."""
    info = decoder.info
    return {
        "model": model,
        "fingerprint": fingerprint(decoder.denoiser),
        "family": info.family,
        "latent_space": info.latent_space,
        "scale": decoder.scale,
        "student_times": info.student_times,
        "computed_in": str(decoder.dtype).removeprefix("torch."),
        "device": str(decoder.device),
    }


def _holds_latents(file: Path) -> bool:
    return file.suffix.lower() == LATENTS_SUFFIX
