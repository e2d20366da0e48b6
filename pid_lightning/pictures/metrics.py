"""What `pid test` reports: fidelity, consistency, time and memory, per method and sigma."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pid_lightning.checks import Mistake, check_at_least
from pid_lightning.files.atomic import replaced_file
from pid_lightning.pictures.lpips import LPIPS, SMALLEST_SIDE
from pid_lightning.pictures.resizing import reduce_picture

if TYPE_CHECKING:
    from torchmetrics import Metric

# (row key, column heading, value format)
_COLUMNS = (
    ("method", "method", "{:.20}"),
    ("latent_sigma", "sigma", "{:.3g}"),
    ("psnr", "PSNR dB", "{:.2f}"),
    ("ssim", "SSIM", "{:.4f}"),
    ("lpips", "LPIPS", "{:.4f}"),
    ("consistency", "cons. dB", "{:.2f}"),
    ("seconds", "s/picture", "{:.3f}"),
    ("peak_mebibytes", "peak MiB", "{:.0f}"),
    ("num_pictures", "pictures", "{:d}"),
)


class PictureMetrics:
    """Means of every measure over pictures, separately for each row: (method, latent_sigma).

    torchmetrics accumulates and reduces over processes.

    Args:
        lpips: the network from `lpips_network`.
        device: where pictures are measured.
    """

    def __init__(self, lpips: LPIPS, device: torch.device | str = "cpu") -> None:
        self._lpips = lpips.to(device)
        self._device = device
        self._rows: dict[tuple[str, float], dict[str, Metric]] = {}

    @torch.no_grad()
    def update(
        self,
        row: tuple[str, float],
        prediction: Tensor,
        target: Tensor,
        low_resolution: Tensor,
        scale: int,
        seconds: float,
        peak_bytes: int,
    ) -> None:
        """Add a batch of pictures to a row, measured in fp32 regardless of autocast.

        Args:
            row: (method, latent_sigma), e.g. ``("PiD", 0.2)``.
            prediction: (B, 3, H, W); clamped to [-1, 1], as a written picture is.
            target: (B, 3, H, W) in [-1, 1].
            low_resolution: (B, 3, H/scale, W/scale) in [-1, 1], what the encoder saw.
            scale: side of the output over the side of `low_resolution`.
            seconds: time of the whole batch, divided evenly among its pictures.
            peak_bytes: peak memory of the batch; a row reports its maximum.

        Raises:
            Mistake: sides that are too small to measure, or a prediction that is not finite.
        """
        row = (row[0], float(row[1]))
        check_at_least("data.image_size", min(prediction.shape[-2:]), SMALLEST_SIDE)
        if not prediction.isfinite().all():
            raise Mistake(
                row[0],
                f"predicted pixels are not finite at latent_sigma {row[1]:g}; check the weights, "
                "and test in bf16 or fp32 instead of fp16.",
            )
        with torch.autocast(prediction.device.type, enabled=False):
            prediction = prediction.float().clamp(-1, 1)
            target = target.float().clamp(-1, 1)
            measures = self._measure(prediction, target, low_resolution.float(), scale)
        metrics = self._row(row)
        for name, values in measures.items():
            metrics[name].update(values)
        metrics["seconds"].update(seconds / len(prediction), weight=len(prediction))
        metrics["peak_mebibytes"].update(peak_bytes / 2**20)
        metrics["num_pictures"].update(len(prediction))

    def _measure(
        self, prediction: Tensor, target: Tensor, low_resolution: Tensor, scale: int
    ) -> dict[str, Tensor]:
        from torchmetrics.functional.image import structural_similarity_index_measure

        return {
            "psnr": psnr(prediction, target),
            # Of [0, 1], as is usual: its luminance term depends on where 0 lies.
            "ssim": structural_similarity_index_measure(
                (prediction + 1) / 2, (target + 1) / 2, data_range=1.0, reduction="none"
            ),
            "lpips": self._lpips(prediction, target),
            "consistency": psnr(reduce_picture(prediction, scale), low_resolution),
        }

    def _row(self, row: tuple[str, float]) -> dict[str, Metric]:
        from torchmetrics import MaxMetric, MeanMetric, SumMetric

        if row not in self._rows:
            means = ("psnr", "ssim", "lpips", "consistency", "seconds")
            kinds = dict.fromkeys(means, MeanMetric)
            kinds |= {"peak_mebibytes": MaxMetric, "num_pictures": SumMetric}
            self._rows[row] = {
                name: kind(nan_strategy="error").to(self._device) for name, kind in kinds.items()
            }
        return self._rows[row]

    def _all_rows(self) -> list[tuple[str, float]]:
        """Rows of all processes in a common order, which the reduction relies on."""
        known = [list(self._rows)]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            known = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(known, list(self._rows))
        return sorted({row for rows in known for row in rows}, key=lambda row: (row[1], row[0]))

    def compute(self) -> list[dict[str, str | float | int]]:
        """One dict per row, ordered by latent_sigma, then method; every process must call it.

        Keys: method, latent_sigma, psnr and consistency (dB), ssim, lpips, seconds (per picture),
        peak_mebibytes, num_pictures. Identical pictures have an infinite PSNR, which makes the mean
        infinite.
        """
        rows = []
        for row in self._all_rows():
            unseen = row not in self._rows  # measured on another process only: joins with weight 0
            metrics = self._row(row)
            for name, metric in metrics.items() if unseen else ():
                sums = name in ("peak_mebibytes", "num_pictures")
                metric.update(0.0) if sums else metric.update(0.0, weight=0.0)
            values = {name: metric.compute().item() for name, metric in metrics.items()}
            values["num_pictures"] = round(values["num_pictures"])
            values["method"], values["latent_sigma"] = row
            rows.append({key: values[key] for key, _, _ in _COLUMNS})
        return rows


def psnr(images: Tensor, others: Tensor) -> Tensor:
    """PSNR (B,) in dB between images (B, 3, H, W) in [-1, 1]."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    return peak_signal_noise_ratio(images, others, data_range=2.0, reduction="none", dim=(1, 2, 3))


def format_table(rows: Sequence[dict[str, str | float | int]]) -> str:
    """`PictureMetrics.compute()` as aligned plain text of at most 100 columns."""
    lines = [[heading for _, heading, _ in _COLUMNS]]
    lines += [[form.format(row[key]) for key, _, form in _COLUMNS] for row in rows]
    return align(lines)


def align(lines: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the first one of headings, as text: the first column to the left, the others
    to the right."""
    first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
    text = ["  ".join([row[0].ljust(first), *map(str.rjust, row[1:], others)]) for row in lines]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def write_csv(rows: Sequence[dict[str, str | float | int]], path: str | Path) -> None:
    """Write `PictureMetrics.compute()` as a CSV file with a header, atomically.

    Raises:
        OSError: the file cannot be written; an existing one stays intact.
    """
    with replaced_file(path) as part, part.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [key for key, _, _ in _COLUMNS])
        writer.writeheader()
        writer.writerows(rows)
