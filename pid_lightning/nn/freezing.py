"""Which parts of a denoiser learn."""

from __future__ import annotations

from pid_lightning.checks import check_choice
from pid_lightning.nn.denoiser import PiD


def freeze_untrained(denoiser: PiD, train: str, reads_null: bool) -> None:
    """Freeze all parts except those that `Training.train` names, whatever was frozen before.

    Args:
        denoiser: the network.
        train: ``"all"``, ``"adapter"``, ``"rgb_head"`` or ``"latents"``.
        reads_null: whether some samples have no caption, so that a learned null learns.

    Raises:
        Mistake: the network has no such part.
    """
    adapter = denoiser.adapter
    denoise = None if adapter.native is None else adapter.native.denoise
    parts = ["all", "adapter"]
    parts += ["rgb_head"] * (adapter.rgb_head is not None) + ["latents"] * (denoise is not None)
    check_choice("model.training.train", train, parts)
    if train == "all":
        denoiser.requires_grad_(True)
        for block in denoiser.patch_blocks:
            block.freeze_unread()
        text = denoiser.text_embedding
        if text is not None and text.null is not None:
            text.null.requires_grad_(reads_null)  # DDP waits for every gradient it expects
        freeze_native(denoiser)
        return
    denoiser.requires_grad_(False)
    if train == "latents":
        denoise.requires_grad_(True)
        return
    adapter.requires_grad_(True)
    freeze_native(denoiser)
    if train == "adapter":
        denoiser.gates.requires_grad_(True)
    else:
        unread = [adapter.heads, adapter.head_norm]
        if adapter.rgb_head_block is not None:
            unread += adapter.res_blocks[adapter.rgb_head_block :]
        for module in unread:
            module.requires_grad_(False)


def freeze_native(denoiser: PiD) -> None:
    """Freeze the adapter's native decoder, which is another autoencoder's, and its estimate of the
    clean latents, which no loss of pictures reaches."""
    if denoiser.adapter.native is not None:
        denoiser.adapter.native.requires_grad_(False)


def freeze_unused(network: PiD) -> None:
    """Freeze what distillation does not train: the RGB head, the native decoder, and the last
    block's unused text weights."""
    freeze_native(network)
    if network.adapter.rgb_head is not None:
        network.adapter.rgb_head.requires_grad_(False)
    for block in network.patch_blocks:
        block.freeze_unread()
