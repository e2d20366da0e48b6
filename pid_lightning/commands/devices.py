"""Choosing the device to compute on."""

from __future__ import annotations

import torch


def find_device(name: str | None) -> torch.device:
    """The named device, or the first GPU where there is one and else the CPU.

    Raises:
        ValueError: this machine has no such device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=name).cpu()  # torch.device alone takes devices that are absent
    except (RuntimeError, AssertionError, ImportError) as error:  # it depends on the device
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(
            f"device: {name!r} is not available on this machine ({reason}); use cpu, or leave it "
            "out."
        ) from error
    return torch.device(name)
