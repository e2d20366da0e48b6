"""A student's few times, known beforehand: modulations in place of the weights that make them.

More than a quarter of the published network's weights do nothing but turn the time into the shifts,
scales and gates of the patch blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pid_lightning.compilation import check_not_frozen
from pid_lightning.nn import PiD

TOLERANCE = 0.02  # of an embedding's largest value: two bf16 roundings, far below another time's


class ChosenTime(nn.Module):
    """Which of a few times an embedding is of, as one-hot.

    Args:
        embeddings: of the times (T, D).
    """

    def __init__(self, embeddings: Tensor) -> None:
        super().__init__()
        self.register_buffer("embeddings", embeddings, persistent=False)

    def forward(self, t_emb: Tensor) -> Tensor:
        """(B, 1, D) to (B, 1, T), NaN where the time is none of them: a graph cannot raise."""
        distances = (t_emb - self.embeddings).abs().amax(dim=-1)  # (B, T)
        nearest, index = distances.min(dim=-1, keepdim=True)
        one_hot = index == torch.arange(len(self.embeddings), device=index.device)
        known = nearest <= TOLERANCE * self.embeddings.abs().max()
        return torch.where(known, one_hot.to(t_emb.dtype), torch.nan)[:, None]


def fix_times(denoiser: PiD, times: Sequence[float] | None) -> None:
    """Replace, in place, the patch blocks' modulations by what they make of a few times.

    Velocities at these times stay the same bit by bit; at others they are NaN.

    Args:
        denoiser: the network, in the type to compute in.
        times: pixel times in [0, 1], those of a student; None is a teacher's.

    Raises:
        ValueError: a teacher, or it was done before, or compiled graphs hold the weights.
    """
    check_not_frozen(denoiser, "fix_times")
    if has_fixed_times(denoiser):
        raise ValueError("fix_times: this network's times are fixed already.")
    if times is None:
        raise ValueError("fix_times: this network is a teacher, which any time may be asked of.")
    device, dtype = denoiser.out.weight.device, denoiser.dtype
    with torch.no_grad():
        t = torch.tensor(times, dtype=torch.float32, device=device)
        # One by one, as they are sampled: a product of several rows may round otherwise.
        embeddings = [denoiser.time_embedding(one).to(dtype) for one in t.split(1)]
        for block in denoiser.patch_blocks:
            for stream in filter(None, (block.image, block.text)):
                rows = [stream.modulation(denoiser.block_condition(one)) for one in embeddings]
                stream.modulation = _table(torch.cat(rows)[:, 0])
    denoiser.block_condition = ChosenTime(torch.cat(embeddings)[:, 0])


def has_fixed_times(denoiser: PiD) -> bool:
    """Whether `fix_times` was there."""
    return isinstance(denoiser.block_condition, ChosenTime)


def _table(values: Tensor) -> nn.Linear:
    """The layer that takes a one-hot (..., T) to a row of the values (T, M)."""
    table = nn.utils.skip_init(nn.Linear, *values.shape, bias=False)
    table.weight = nn.Parameter(values.T.contiguous(), requires_grad=False)
    return table
