"""Estimates the memory of a decode by a run without data that tracks live tensors."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pid_lightning.decoding.latents import adapt_tile, is_adapted_whole, part_of
from pid_lightning.decoding.plan import Plan
from pid_lightning.diffusion.sampling import Velocity
from pid_lightning.diffusion.tiling import Tile, Tiles
from pid_lightning.files.models import ModelInfo
from pid_lightning.nn.condition import Adapted
from pid_lightning.nn.quantisation import is_quantised


def estimate_working_memory(
    info: ModelInfo,
    height: int,
    width: int,
    tile: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    batch_size: int = 1,
) -> int:
    """Estimate the peak bytes of decoding one batch, without the weights of the denoiser.

    Attention counts as one operation, as on a GPU. Not counted: a chunk of scores in bf16 on a CPU,
    1 KiB per token and thread (16 MiB a thread at 2048 x 2048); guidance, which holds one more
    picture; allocator overhead and workspaces of libraries.

    Args:
        info: the model.
        height, width: size of the output in pixels.
        tile: side of the tiles; None decodes without tiles.
        dtype: dtype of the weights.
        batch_size: pictures decoded together.

    Raises:
        ValueError: the size or the tile does not fit the model.
    """
    dtype = counted_dtype(dtype)
    return _estimate(json.dumps(info.to_plain()), height, width, tile, dtype, batch_size)


def counted_dtype(dtype: torch.dtype) -> torch.dtype:
    """A dtype of the same size whose attention on a CPU is torch's own operation, as on a GPU, and
    is known to torch's counter."""
    return torch.float16 if dtype == torch.bfloat16 else dtype


@lru_cache(maxsize=64)  # a run without data takes a second for a large network
@torch.no_grad()
def _estimate(
    plain: str, height: int, width: int, tile: int | None, dtype: torch.dtype, batch_size: int
) -> int:
    info = ModelInfo.from_plain(json.loads(plain))
    with torch.device("meta"):
        denoiser = info.build().eval()
    denoiser.check_size(height, width)
    cells = (side // info.geometry.cell for side in (height, width))
    shape = (batch_size, info.geometry.latent_channels, *cells)
    times = {"student_times": info.student_times, "time_shift": info.time_shift}
    plan = Plan.of(denoiser, torch.empty(shape, device="meta"), tile=tile, **times)
    tiles = plan.tiles
    place = None if tiles is None else max(tiles, key=lambda tile: _seen_area(tile, tiles))
    at_once = tiles is None or is_adapted_whole(denoiser)
    shapes = {name: weight.shape for name, weight in denoiser.state_dict().items()}
    with FakeTensorMode():
        state = {name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}
        denoiser.load_state_dict(state, assign=True)
        latents = torch.empty(shape)
        t = torch.empty(batch_size)
        text = None
        if denoiser.text_embedding is not None:
            config = info.config
            text = torch.empty(batch_size, config.text_length, config.text_width, dtype=dtype)
        x = torch.empty(batch_size, 3, *plan.seen)

        def adapt() -> Adapted:
            if at_once:
                return denoiser.adapt(latents, t)
            return adapt_tile(denoiser, latents, t, tiles, place)

        adapted = adapt()
        kept = num_bytes(filter(_is_tensor, tree_leaves(adapted)))
        adapting, cutting = peak_bytes(adapt), 0
        if at_once and tiles is not None:
            adapted = part_of(adapted, place, batch_size, info.config.patch_size)
            cutting = num_bytes(filter(_is_tensor, tree_leaves(adapted)))
        condition = denoiser.condition_on(adapted, t, text)
        conditioning = peak_bytes(lambda: denoiser.condition_on(adapted, t, text))
        held = num_bytes(filter(_is_tensor, tree_leaves(condition)))
        running = peak_bytes(lambda: denoiser(x, t, condition))

    def sampling(velocity: Velocity) -> int:
        return peak_bytes(lambda: plan.sample(velocity, batch_size, None, "meta"))

    if tiles is None:

        def velocity(x_t: Tensor, t: Tensor) -> Tensor:
            torch.empty(running, dtype=torch.uint8, device="meta")
            return torch.empty_like(x_t)

        making = max(adapting, kept + conditioning)
        return max(making, held + sampling(velocity))

    making = cutting + max(conditioning, held + running)
    if not at_once:
        making = max(making, adapting)

    def sum_of_tiles(x_t: Tensor, t: Tensor) -> Tensor:
        total = torch.empty_like(x_t)
        cut = x_t.new_empty(batch_size, 3, *plan.seen)  # what the tile sees of x_t
        torch.empty(making, dtype=torch.uint8, device="meta")
        del cut
        return total

    if at_once:
        return max(adapting, kept + sampling(sum_of_tiles))
    return len(tiles) * kept + sampling(sum_of_tiles)


def _seen_area(tile: Tile, tiles: Tiles) -> int:
    rows, columns = tile.widened(tiles.step, tiles.height, tiles.width)
    return (rows.stop - rows.start) * (columns.stop - columns.start)


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the elements; a tensor that occurs twice counts once."""
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())


def weight_bytes(network: nn.Module) -> int:
    """Bytes of a network's weights as stored, including 8-bit ones."""
    parts = []
    for weight in network.parameters():
        names = weight.data.__tensor_flatten__()[0] if is_quantised(weight) else ["data"]
        parts += [getattr(weight, name) for name in names]
    return num_bytes(parts)


def peak_bytes(compute: Callable[[], object]) -> int:
    """Peak bytes of the tensors that `compute` allocates."""
    with _LiveBytes() as live:
        compute()
    return live.peak


class _LiveBytes(TorchDispatchMode):
    """Tracks the storages that operations allocate, and the peak bytes alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        given = {a.untyped_storage()._cdata for a in tree_leaves(arguments) if _is_tensor(a)}
        result = function(*arguments, **(options or {}))
        for tensor in filter(_is_tensor, tree_leaves(result)):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self.sizes and key not in given:
                self.sizes[key] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._forget, key)
        return result

    def _forget(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)
