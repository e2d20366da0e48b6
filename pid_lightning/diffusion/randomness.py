"""Random numbers as a pure function of (seed, purpose, sample), so that runs resume exactly.

Nothing here touches torch's global random state. A sample's numbers depend neither on its batch
nor on the process that handles it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch


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
