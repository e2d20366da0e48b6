"""One file decoded: read, sampled, compared, written."""

from __future__ import annotations

import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pid_lightning.decoding.decoder import PiDDecoder
from pid_lightning.decoding.settings import DecodeSettings
from pid_lightning.diffusion.noising import add_latent_noise
from pid_lightning.diffusion.randomness import draw_noise, sample_generators
from pid_lightning.pictures.colour import colour_shift, match_colour
from pid_lightning.pictures.files import read_picture, write_picture
from pid_lightning.pictures.grids import picture_grid
from pid_lightning.pictures.inputs import LATENTS_SUFFIX, check_channels, read_latents
from pid_lightning.pictures.resizing import enlarge_picture, pad_picture


def _decode_file(
    decoder: PiDDecoder,
    file: Path,
    path: Path,
    settings: DecodeSettings,
    described: dict[str, Any],
) -> None:
    """Decode one file; write its picture, its JSON and, if asked for, the comparison."""
    source, size = _read(decoder, file)
    is_latents = file.suffix.lower() == LATENTS_SUFFIX
    if is_latents:
        latents = source[None].to(decoder.device)
    else:
        latents = _add_noise(decoder, decoder.encode(source[None]), settings)
    tile = decoder.choose_tile(*decoder.output_size(latents), settings.tile)
    with warnings.catch_warnings():  # `choose_tile` has warned already
        warnings.filterwarnings("ignore", "The network sees")
        picture = decoder.decode(
            latents,
            settings.sigma,
            settings.prompt,
            settings.steps,
            seed=settings.seed,
            tile=tile,
            guidance_scale=settings.guidance_scale,
        )[0]
    height, width = (side * decoder.scale for side in size)
    metadata = {"input": str(file), **described, "tile": tile}
    metadata["size"] = [height, width]
    if settings.compare or settings.match_colour:
        native = decoder.encoder.decode(latents.float())[0]
        shift = colour_shift(picture, native)
        tqdm.write(f"{file.name}: {shift}")
        metadata["colour_shift"] = asdict(shift)
        if settings.match_colour:
            picture = match_colour(picture, native)
        if settings.compare:
            enlarged = enlarge_picture(native[None], decoder.scale)[0]
            pair = [side[:, :height, :width].cpu() for side in (enlarged, picture)]
            grid = picture_grid([pair], ["native", "PiD"]) * 2 - 1
            write_picture(grid, _comparison(path), metadata)
    write_picture(picture[:, :height, :width], path, metadata)


def _comparison(path: Path) -> Path:
    return path.with_stem(f"{path.stem}_compare")


def _read(decoder: PiDDecoder, file: Path) -> tuple[Tensor, tuple[int, int]]:
    """Read latents (C, h, w) or a padded picture, and its unpadded (height, width) at scale 1."""
    if file.suffix.lower() == LATENTS_SUFFIX:
        latents = read_latents(file)
        check_channels(file, latents.shape, decoder.latent_space, decoder.latent_channels)
        decoder.denoiser.check_size(*decoder.output_size(latents))
        return latents, tuple(side * decoder.latent_stride for side in latents.shape[-2:])
    image = read_picture(file)
    # Whole cells for the encoder, whole patches for the output.
    multiple = decoder.denoiser.alignment // decoder.scale
    return pad_picture(image[None], multiple)[0], tuple(image.shape[-2:])


def _add_noise(decoder: PiDDecoder, latents: Tensor, settings: DecodeSettings) -> Tensor:
    """Noise clean latents to the level passed to the network, from a random stream of its own."""
    if settings.sigma == 0:
        return latents
    generators = sample_generators(settings.seed, "latents", [0])
    eps = draw_noise(latents.shape, generators, latents.device)
    sigma = torch.full((1,), settings.sigma)
    return add_latent_noise(latents, eps, sigma, decoder.info.noise_frame)
