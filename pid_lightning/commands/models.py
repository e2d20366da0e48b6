"""`pid export` and `pid import`: model files from runs and from published weights."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pid_lightning.checks import Mistake, check_at_least
from pid_lightning.commands.parsing import run

Family = Literal["flux", "sd3", "flux2", "sdxl", "qwen", "dinov2", "siglip"]


def export(arguments: Sequence[str]) -> None:
    """`pid export`: options are those of `export_run`."""
    run(export_run, "export", arguments)


def export_run(
    run: str,
    out: str,
    *,
    layout: Literal["own", "published"] = "own",
    dtype: Literal["bf16", "fp32"] = "bf16",
    description: str = "",
) -> None:
    """Write a run's network, its average where there is one, as one model file.

    Args:
        run: a run's folder (its newest checkpoint), a .ckpt or a model's .safetensors.
        out: the .safetensors to write; in the published layout also a .pth.
        layout: own describes itself; published is the authors', which programs with PiD read.
        dtype: of the weights.
        description: text to store in the file; the published layout has no place for it.
    """
    from pid_lightning.files.atomic import make_folder
    from pid_lightning.files.hub import find_model
    from pid_lightning.files.models import DTYPES, check_model_path, load_model, save_model
    from pid_lightning.files.published import export_published

    is_published = layout == "published"
    if is_published and description:
        raise Mistake("description", "the published layout holds none; leave it out.")
    if not is_published:
        check_model_path(out)
    _check_unused(out)
    if not os.path.exists(os.path.expanduser(run)):
        raise Mistake("run", f"{run} does not exist; name a run's folder or a .ckpt.")
    path = find_model(run)
    make_folder("out", Path(out).parent)
    denoiser, info = load_model(path)
    kind = f"{info.family} on {info.latent_space} latents"
    if is_published:
        kind = " ".join(export_published(denoiser, info, out, DTYPES[dtype]))
    else:
        save_model(denoiser, info, out, DTYPES[dtype], description)
    print(f"{out}: the {'teacher' if info.student_times is None else 'student'} of {path}, {kind}")


def import_(arguments: Sequence[str]) -> None:
    """`pid import`: options are those of `import_weights`."""
    run(import_weights, "import", arguments)


def import_weights(
    published: str,
    out: str,
    *,
    family: Family,
    version: Literal["v1", "v1.5"],
    ema: bool = False,
    teacher: bool = False,
    image_size: int = 2048,
) -> None:
    """Convert published weights to one self-describing model file.

    Args:
        published: the published .pth or .safetensors; of PixelDiT's text-to-image weights, which
            have no adapter, the model is one to start from, by init_from.
        out: the .safetensors to write.
        family: of the latents.
        version: of the weights.
        ema: take net_ema. instead of net.
        teacher: these weights are not distilled.
        image_size: side of the training outputs in pixels.
    """
    from pid_lightning.diffusion.sampling import STUDENT_TIMES
    from pid_lightning.files.published import import_published

    check_at_least("image_size", image_size, 1)
    _check_unused(out)
    info = import_published(
        os.path.expanduser(published),
        out,
        family,
        version,
        ema=ema,
        image_size=image_size,
        student_times=None if teacher else STUDENT_TIMES,
    )
    print(
        f"{out}: {family} {version}, {info.geometry.latent_channels} channels, "
        f"{info.geometry.scale}x; such weights are licensed for non-commercial use"
    )


def _check_unused(path: str) -> None:
    if os.path.exists(os.path.expanduser(path)):
        raise Mistake("out", f"{path} exists already; give another name, or move it away.")
