"""LatentCrops: random crops of photographs, with crops of the whole photographs' latents."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset

from pid_lightning.checks import check_at_least
from pid_lightning.diffusion.randomness import sample_generators
from pid_lightning.encoders.base import Encoder
from pid_lightning.files.atomic import replaced_file
from pid_lightning.files.tensors import opened_safetensors
from pid_lightning.pictures.resizing import reduce_picture
from pid_lightning.training.data.image_data import ImageData
from pid_lightning.training.data.rows import decode
from pid_lightning.training.data.samples import Pictures, centre_crop_to


class LatentCrops(ImageData):
    """`ImageData` whose training latents are cut from those of whole photographs.

    An encoder that sees the whole picture gives a crop other latents than the photograph has there,
    and decoding begins with a whole picture's. So every training photograph is resized to a few
    sizes and encoded once, with its mirror image, and a sample is a crop of the pixels with the
    same part of the latents and a margin of their surroundings, as a tile has in decoding. The
    photographs have to fit in memory.

    Training batches also hold "latents" (B, C, w, w), clean, and "offset" (B, 2): the row and
    column in cells where the crop begins in them, which is `margin` but for crops near a
    photograph's border; w is the crop in cells and two margins.

    Args:
        path: a folder (see `ImageData`), or "bundled".
        image_size: side of the crops in pixels, in whole latent cells.
        batch_size, test_path, num_val, samples_per_epoch, cache_bytes, seed, inputs: see
            `ImageData`.
        shorter_sides: shorter sides in pixels that photographs are reduced to, never enlarged.
        margin: cells of latents around a crop.
        latents_file: ``.safetensors`` file to keep the latents in from run to run; null encodes at
            every start.
    """

    def __init__(
        self,
        path: str,
        image_size: int,
        batch_size: int,
        shorter_sides: tuple[int, ...] = (512, 768),
        margin: int = 1,
        latents_file: str | None = None,
        test_path: str | None = None,
        num_val: int = 8,
        samples_per_epoch: int | None = None,
        cache_bytes: int = 2**30,
        seed: int | None = None,
        inputs: str | list[str] | None = None,
    ) -> None:
        super().__init__(
            path,
            image_size,
            batch_size,
            test_path=test_path,
            num_val=num_val,
            samples_per_epoch=samples_per_epoch,
            cache_bytes=cache_bytes,
            seed=seed,
            inputs=inputs,
        )
        check_at_least("data.margin", margin, 0)
        self.shorter_sides = shorter_sides
        self.margin = margin
        self.latents_file = latents_file

    def setup(self, stage: str | None = None) -> None:
        """Open the pictures, and encode the training photographs for a fit."""
        super().setup(stage)
        pictures = self._pictures.get("train")
        if stage == "fit" and isinstance(pictures, Pictures):
            module = self.trainer.lightning_module
            module.encoder.load()
            step = module.denoiser.alignment
            photographs = resized_photographs(pictures, self.shorter_sides, step)
            latents = self._latents(photographs, module.encoder, module.denoiser.geometry.scale)
            self._pictures["train"] = WholePictures(
                photographs, latents, self.image_size, step, self.margin, pictures.seed
            )

    def _latents(
        self, photographs: list[list[Tensor]], encoder: Encoder, scale: int
    ) -> list[list[Tensor]]:
        """Latents (2, C, h, w) of each size of each photograph and of its mirror image."""
        path, told = self.latents_file, fingerprint(photographs, encoder.latent_space, scale)
        names = [[f"{i}.{j}" for j in range(len(sizes))] for i, sizes in enumerate(photographs)]
        if path is not None and Path(path).is_file():
            with opened_safetensors(path) as file:
                if (file.metadata() or {}).get("fingerprint") == told:
                    return [[file.get_tensor(name) for name in row] for row in names]
        rank_zero_info(f"Encoding {len(photographs)} photographs, at {len(names[0])} sizes")
        latents = []
        for sizes in photographs:
            both = [torch.stack((pixels, pixels.flip(-1))) / 127.5 - 1 for pixels in sizes]
            latents.append([encoder.encode(reduce_picture(one, scale)).half() for one in both])
        if path is not None and self.trainer.is_global_zero:
            tensors = {
                name: tensor
                for row, kept in zip(names, latents, strict=True)
                for name, tensor in zip(row, kept, strict=True)
            }
            with replaced_file(path) as temporary:
                save_file(tensors, temporary, metadata={"fingerprint": told})
        return latents


class WholePictures(Dataset[dict[str, Any]]):
    """Random crops of photographs and of their latents, see `LatentCrops`.

    Args:
        photographs: uint8 pixels (3, H, W) of each photograph in a few sizes.
        latents: of each of them and of its mirror image, (2, C, h, w).
        image_size: side of a crop in pixels, a multiple of `step`.
        step: pixels per latent cell.
        margin: cells around a crop.
        seed: of the crops.
    """

    train = True

    def __init__(
        self,
        photographs: list[list[Tensor]],
        latents: list[list[Tensor]],
        image_size: int,
        step: int,
        margin: int,
        seed: int,
    ) -> None:
        self.photographs = photographs
        self.latents = latents
        self.num_cells: int = image_size // step
        self.step = step
        self.margin = margin
        self.seed = seed

    def __len__(self) -> int:
        return len(self.photographs)

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        index, draw = item
        (generator,) = sample_generators(self.seed, "crop", [draw])
        size, mirror, *place = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        sizes = self.photographs[index]
        # In proportion to the pixels, so that every crop is equally likely.
        shares = torch.tensor([float(pixels[0].numel()) for pixels in sizes]).cumsum(0)
        number, is_mirrored = int((shares <= size * shares[-1]).sum()), mirror < 0.5
        pixels, latents = sizes[number], self.latents[index][number][int(is_mirrored)]
        if is_mirrored:
            pixels = pixels.flip(-1)
        crop, window, offset = [], [], []
        for position, length in zip(place, latents.shape[1:], strict=True):
            first = int(position * (length - self.num_cells + 1))
            wide = min(self.num_cells + 2 * self.margin, length)
            start = min(max(first - self.margin, 0), length - wide)
            crop.append(slice(first * self.step, (first + self.num_cells) * self.step))
            window.append(slice(start, start + wide))
            offset.append(first - start)
        return {
            "image": pixels[(slice(None), *crop)] / 127.5 - 1,
            "latents": latents[(slice(None), *window)].float(),
            "offset": torch.tensor(offset),
            "caption": "",
            "name": f"{index:06d}",
            "number": draw,
        }


def resized_photographs(
    pictures: Pictures, shorter_sides: tuple[int, ...], step: int
) -> list[list[Tensor]]:
    """Every photograph in every size, (3, H, W), in whole cells of `step` pixels; a size that it
    does not reach is its own."""
    photographs = []
    for index in range(len(pictures)):
        cached = pictures.split.pixels
        if cached is None:
            pixels = decode(pictures.split.rows[index], pictures.image_size)
        else:
            pixels = cached[index]
        sides = sorted({min(side, *pixels.shape[1:]) for side in shorter_sides})
        photographs.append([_resized(pixels, side, step) for side in sides])
    return photographs


def fingerprint(photographs: list[list[Tensor]], latent_space: str, scale: int) -> str:
    """Tells whether latents are those of these photographs."""
    hashed = hashlib.sha256(f"{latent_space} {scale}".encode())
    for pixels in (pixels for sizes in photographs for pixels in sizes):
        hashed.update(f"{tuple(pixels.shape)}".encode())
        hashed.update(pixels[:, ::16, ::16].contiguous().numpy().tobytes())
    return hashed.hexdigest()


def _resized(pixels: Tensor, shorter_side: int, step: int) -> Tensor:
    from torchvision.transforms.v2 import InterpolationMode, functional

    factor = shorter_side / min(pixels.shape[1:])
    if factor < 1:
        size = [round(side * factor) for side in pixels.shape[1:]]
        bicubic = InterpolationMode.BICUBIC
        pixels = functional.resize(pixels, size, interpolation=bicubic, antialias=True)
    return centre_crop_to(pixels, *(side // step * step for side in pixels.shape[1:])).contiguous()
