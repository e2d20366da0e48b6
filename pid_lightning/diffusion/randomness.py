"""Random numbers as a pure function of (seed, purpose, sample), so that runs resume exactly.

Nothing here touches torch's global random state. A sample's numbers depend neither on its batch
nor on the process that handles it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from pid_lightning.checks import Mistake


def sample_generators(
    seed: int, purpose: str, samples: Iterable[int], device: torch.device | str = "cpu"
) -> list[torch.Generator]:
    """Create one generator per sample.

    Args:
        seed: seed of the run.
        purpose: what the numbers are for; different purposes never share numbers.
        samples: a number that identifies each sample, e.g. its index in the whole run.
        device: device of the generators.
    """
    generators = []
    for sample in samples:
        digest = hashlib.blake2b(f"{seed} {purpose} {sample}".encode(), digest_size=8).digest()
        generator = torch.Generator(device)
        generator.manual_seed(int.from_bytes(digest, "little") >> 1)
        generators.append(generator)
    return generators


Generators = torch.Generator | Sequence[torch.Generator] | None


def draw_noise(shape: Sequence[int], generator: Generators, device: torch.device | str) -> Tensor:
    """Standard normal noise in fp32.

    Args:
        shape: (B, ...).
        generator: one for the batch, or one per sample, so that a sample's noise does not depend
            on its batch; None uses torch's global generator.
        device: device of the result; the noise is drawn on the generator's device.

    Raises:
        Mistake: the numbers of generators and samples differ.
    """
    if isinstance(generator, Sequence):
        if len(generator) != shape[0]:
            raise Mistake(
                "generator",
                f"{len(generator)} generators for a batch of {shape[0]}; give one per sample.",
            )
        return torch.cat([draw_noise((1, *shape[1:]), g, device) for g in generator])
    drawn_on = generator.device if generator is not None else device
    noise = torch.randn(tuple(shape), generator=generator, dtype=torch.float32, device=drawn_on)
    if noise.device.type == "cpu" and torch.device(device).type == "cuda":
        # From pinned memory the copy does not make the CPU wait for the GPU's previous step.
        return noise.pin_memory().to(device, non_blocking=True)
    return noise.to(device)
