"""Precomputes the modulations of a student's few fixed times, to drop the weights that make them.

More than a quarter of the published network's weights only turn the time into the shifts, scales
and gates of the patch blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pid_lightning.checks import Mistake
from pid_lightning.nn.changes import check_allowed
from pid_lightning.nn.denoiser import PiD

TOLERANCE = 0.02  # of the largest embedding value: above two bf16 roundings, far below other times


class ChosenTime(nn.Module):
    """Maps a time embedding to a one-hot vector over a few fixed times.

    Args:
        embeddings: embeddings (T, D) of the fixed times.
    """

    def __init__(self, embeddings: Tensor) -> None:
        super().__init__()
        self.register_buffer("embeddings", embeddings, persistent=False)

    def forward(self, t_emb: Tensor) -> Tensor:
        """(B, 1, D) to (B, 1, T), NaN for other times, since a compiled graph cannot raise."""
        distances = (t_emb - self.embeddings).abs().amax(dim=-1)  # (B, T)
        nearest, index = distances.min(dim=-1, keepdim=True)
        one_hot = index == torch.arange(len(self.embeddings), device=index.device)
        known = nearest <= TOLERANCE * self.embeddings.abs().max()
        return torch.where(known, one_hot.to(t_emb.dtype), torch.nan)[:, None]


def fix_times(denoiser: PiD, times: Sequence[float] | None) -> None:
    """Replace the patch blocks' modulation layers, in place, by their outputs at a few times.

    Velocities at these times stay the same, bit by bit except for batches in fp32, whose matmuls
    may round differently; at other times they are NaN.

    Args:
        denoiser: the network, in the dtype to compute in.
        times: a student's pixel times in [0, 1]; None for a teacher, which is refused.

    Raises:
        Mistake: a teacher, or a change that rules it out (see `changes`).
    """
    check_allowed(denoiser.changes, "fix_times")
    if times is None:
        raise Mistake(
            "fix_times",
            "this network is a teacher, sampled at arbitrary times; use a distilled student.",
        )
    device, dtype = denoiser.out.weight.device, denoiser.dtype
    with torch.no_grad():
        t = torch.tensor(times, dtype=torch.float32, device=device)
        # One by one, as when sampling: a matmul over several rows may round differently.
        embeddings = [denoiser.time_embedding(one).to(dtype) for one in t.split(1)]
        for block in denoiser.patch_blocks:
            for stream in filter(None, (block.image, block.text)):
                rows = [stream.modulation(denoiser.time_activation(one)) for one in embeddings]
                stream.modulation = _table(torch.cat(rows)[:, 0])
    denoiser.time_activation = ChosenTime(torch.cat(embeddings)[:, 0])
    denoiser.changes += ("fix_times",)


def _table(values: Tensor) -> nn.Linear:
    """A linear layer that maps a one-hot (..., T) to a row of the values (T, M)."""
    table = nn.utils.skip_init(nn.Linear, *values.shape, bias=False)
    table.weight = nn.Parameter(values.T.contiguous(), requires_grad=False)
    return table
