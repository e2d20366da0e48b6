"""`pid decode`: pictures or latents in, pictures out, each with a JSON to reproduce it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from pid_lightning.commands.devices import find_device
from pid_lightning.decoding.arguments import check_options
from pid_lightning.decoding.decoder import PiDDecoder
from pid_lightning.decoding.input_files import _comparison, _decode_file, _read
from pid_lightning.encoders.text import LanguageModelText
from pid_lightning.files import models as weights
from pid_lightning.files.atomic import make_folder
from pid_lightning.files.hub import BUNDLED_MODELS
from pid_lightning.pictures.inputs import find_inputs

if TYPE_CHECKING:
    from pid_lightning.decoding.settings import DecodeSettings


def decode_files(
    inputs: Sequence[str], model: str | None, folder: Path, settings: DecodeSettings
) -> list[Path]:
    """Decode pictures and latents one by one.

    Args:
        inputs: files and folders, see `pictures.find_inputs`.
        model: see `PiDDecoder.from_pretrained`; None is the bundled model.
        folder: for the results, created if missing; they are named after their inputs.
        settings: options of `pid decode`.

    Returns:
        The pictures written, in order; each is complete before the next one starts.

    Raises:
        FileNotFoundError: no such input or model.
        FileExistsError: a result exists already.
        OSError: `folder` cannot be made.
        ValueError: an input or setting does not fit the model, or an input would be overwritten.
    """
    model = next(iter(BUNDLED_MODELS)) if model is None else model
    files = find_inputs(inputs)
    paths = [folder / f"{file.stem}.{settings.format}" for file in files]
    comparisons = [_comparison(path) for path in paths] if settings.compare else []
    results = [*paths, *comparisons]
    taken = [p for path in results for p in (path, path.with_suffix(".json")) if p.exists()]
    if taken and not settings.overwrite:
        raise FileExistsError(f"{taken[0]} exists already: give another --output, or --overwrite.")
    own = {file.resolve() for file in files}
    for path in paths:
        if path.resolve() in own:
            raise ValueError(f"{path} would overwrite the input: give another --output.")
        if settings.compare and _comparison(path) in paths:
            raise ValueError(
                f"{_comparison(path)} would be both a result and a comparison: rename an input, or "
                "leave out --compare."
            )
    decoder = open_decoder(model, settings)
    described = describe(decoder, model, settings)  # before its weights are converted
    if decoder.info.student_times is not None:
        decoder.fix_times()
    if settings.int8:
        decoder.quantise()
    decoder.attend_in_windows(settings.window)
    if settings.compile:
        decoder.compile(freeze=decoder.device.type == "cpu")
    for file in files:  # find a bad last file now, not after hours
        _read(decoder, file)
    make_folder("output", folder)
    with tqdm(zip(files, paths, strict=True), total=len(files), unit="picture") as bar:
        for file, path in bar:
            bar.set_description(file.name)
            _decode_file(decoder, file, path, settings, described)
    print(f"{len(files)} pictures in {folder}")
    return paths


def open_decoder(model: str, settings: DecodeSettings) -> PiDDecoder:
    """Load the decoder onto its device, encode the prompt and free the language model.

    Raises:
        ValueError: one of the settings does not fit the model.
    """
    device = find_device(settings.device)
    dtype = None if settings.dtype is None else weights.DTYPES[settings.dtype]
    decoder = PiDDecoder.from_pretrained(model, dtype).to(device)
    check_options(decoder, settings.steps, settings.tile, settings.prompt, settings.guidance_scale)
    if (settings.compare or settings.match_colour) and not decoder.encoder.has_decoder:
        raise ValueError(
            f"compare and match_colour need a native decoder, which {decoder.latent_space} latents "
            "lack; leave them out."
        )
    if settings.prompt is not None:
        if settings.text_model is not None:
            decoder.text_encoder = LanguageModelText(
                settings.text_model,
                settings.text_prefix,
                length=decoder.info.config.text_length,
                text_width=decoder.info.config.text_width,
            )
        guided = settings.guidance_scale != 1 and not decoder.info.config.learned_null
        prompts = [settings.prompt, ""] if guided else settings.prompt
        decoder.encode_prompt(prompts, settings.text_cache)
        decoder.text_encoder = None
    return decoder


def describe(decoder: PiDDecoder, model: str, settings: DecodeSettings) -> dict[str, Any]:
    """Everything that a decode depends on besides its input, as plain values."""
    info = decoder.info
    return {
        "model": model,
        "fingerprint": weights.fingerprint(decoder.denoiser),
        "family": info.family,
        "latent_space": info.latent_space,
        "scale": info.geometry.scale,
        "student_times": info.student_times,
        "settings": asdict(settings),
        "computed_in": str(decoder.dtype).removeprefix("torch."),
        "device": str(decoder.device),
    }
