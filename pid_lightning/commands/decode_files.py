"""`pid decode`: pictures or latents in, pictures out, each with a JSON to reproduce it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tqdm.auto import tqdm

from pid_lightning.checks import Mistake
from pid_lightning.decoding.decoder import PiDDecoder
from pid_lightning.decoding.failures import find_unreadable
from pid_lightning.decoding.files import FileDecoder, comparison, describe
from pid_lightning.decoding.settings import DecodeSettings
from pid_lightning.encoders.text import LanguageModelText
from pid_lightning.files.atomic import claimed, make_folder
from pid_lightning.files.hub import DEFAULT_MODEL
from pid_lightning.files.models import DTYPES
from pid_lightning.pictures.inputs import find_inputs, output_stem
from pid_lightning.training.data.captions import captions_beside


def decode_files(
    inputs: Sequence[str],
    model: str | None,
    folder: Path,
    settings: DecodeSettings,
    goes_on: bool = False,
) -> list[Path]:
    """Decode pictures and latents one by one. What cannot be decoded is told, and the rest done.

    Of several processes that decode into one folder, each has pictures of its own, or is refused.

    Args:
        inputs: files and folders, see `pictures.find_inputs`.
        model: see `PiDDecoder.from_pretrained`; None is the bundled model.
        folder: for the results, created if missing; they are named after their inputs.
        settings: options of `pid decode`.
        goes_on: leave out results that exist, made from the same file with the same settings, and
            those that another process is making.

    Returns:
        The pictures written, in order; each is complete before the next one starts.

    Raises:
        Mistake: an input or setting does not fit the model, or a result exists already or would
            overwrite another file: before the work, for files of a folder after it. Or another
            process is making it.
        OSError: no such model, or `folder` cannot be written to.
    """
    files = find_inputs(inputs)
    paths = {
        (file, sigma): folder / f"{output_stem(file)}{end}.{settings.format}"
        for file in files
        for sigma, end in _endings(settings).items()
    }
    _check_paths(files, list(paths.values()), settings.compare)
    if not goes_on:
        for path in paths.values():
            _check_new(_results(path, settings), settings)
    captions = dict(zip(files, captions_beside(files), strict=True)) if settings.captions else None
    of_files = open_model(DEFAULT_MODEL if model is None else model, settings, captions)
    named = {Path(os.path.expanduser(name)) for name in inputs}
    due = [work for work in paths if _is_due(of_files.at(work[1]), work[0], paths[work], goes_on)]
    files = list(dict.fromkeys(file for file, _ in due))
    failures = find_unreadable(of_files.decoder, files, named)
    make_folder("output", folder)
    written = []
    readable = [work for work in due if work[0] not in failures.reasons]
    with tqdm(readable, unit="picture") as bar:
        for file, sigma in bar:
            if file in failures.reasons:  # at another noise level
                continue
            bar.set_description(file.name)
            path, at_level = paths[file, sigma], of_files.at(sigma)
            with claimed(path.with_suffix(".json")) as is_ours:
                if not is_ours and not goes_on:
                    told = f"another process is making {path}; give another folder, or "
                    raise Mistake("output", f"{told}--continue to share its work.")
                # Another process may have made it since.
                if not is_ours or not _is_due(at_level, file, path, goes_on):
                    continue
                with failures.of(file):
                    at_level.decode(file, path)
                    written.append(path)
    print(f"{len(written)} pictures in {folder}")
    failures.tell()
    return written


def _endings(settings: DecodeSettings) -> dict[float, str]:
    """How the names of results end at each noise level."""
    several = len(settings.sigmas) > 1
    return {sigma: f"_sigma{sigma:g}" if several else "" for sigma in settings.sigmas}


def _is_due(of_files: FileDecoder, file: Path, path: Path, goes_on: bool) -> bool:
    """Whether a file is to be decoded yet; refuses to write over other results."""
    results = _results(path, of_files.settings)
    own = [result for result in results if goes_on and of_files.describes(file, result)]
    if own == results and all(result.exists() for result in results):
        return False
    _check_new([result for result in results if result not in own], of_files.settings)
    return True


def _results(path: Path, settings: DecodeSettings) -> list[Path]:
    return [path, comparison(path)] if settings.compare else [path]


def _check_new(results: list[Path], settings: DecodeSettings) -> None:
    """Refuse to write over existing results."""
    taken = [p for path in results for p in (path, path.with_suffix(".json")) if p.exists()]
    if taken and not settings.overwrite:
        raise Mistake(
            "output",
            f"{taken[0]} exists already; give another folder, --overwrite, or --continue for what "
            "the same settings have left to do.",
        )


def _check_paths(files: list[Path], paths: list[Path], compare: bool) -> None:
    """Refuse to write over inputs or comparisons."""
    comparisons = [comparison(path) for path in paths] if compare else []
    results = [*paths, *comparisons]
    own = {path.resolve() for path in results} & {file.resolve() for file in files}
    if own:
        raise Mistake("output", f"{own.pop()} would overwrite an input; give another folder.")
    if len(set(paths)) < len(paths):
        raise Mistake("sigma", "two results would have one name; rename an input, or give others.")
    twice = set(paths) & set(comparisons)
    if twice:
        raise Mistake(
            "compare",
            f"{twice.pop()} would be both a result and a comparison; rename an input, or leave it "
            "out.",
        )


def open_model(
    model: str, settings: DecodeSettings, captions: Mapping[Path, str] | None = None
) -> FileDecoder:
    """Load the model onto its device, encode the prompt or captions, free the language model, and
    change the weights as asked for.

    Raises:
        Mistake: one of the settings does not fit the model.
        OSError: no such model.
    """
    device = find_device(settings.device)
    dtype = None if settings.dtype is None else DTYPES[settings.dtype]
    decoder = PiDDecoder.from_pretrained(model, dtype).to(device)
    if settings.text_model is not None and decoder.denoiser.text_embedding is not None:
        decoder.text_encoder = LanguageModelText(
            settings.text_model,
            settings.text_prefix,
            length=decoder.info.config.text_length,
            text_width=decoder.info.config.text_width,
        )
    of_files = FileDecoder(decoder, settings, describe(decoder, model), captions=captions)
    decoder.text_encoder = None
    if decoder.info.student_times is not None:
        decoder.fix_times()
    if settings.int8:
        decoder.quantise()
    decoder.attend_in_windows(settings.window)
    if settings.compile:
        decoder.compile(freeze=decoder.device.type == "cpu")
    return of_files


def find_device(name: str | None) -> torch.device:
    """The named device, or the first GPU where there is one and else the CPU.

    Raises:
        Mistake: this machine has no such device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=name).cpu()  # torch.device alone takes devices that are absent
    except (RuntimeError, AssertionError, ImportError) as error:  # it depends on the device
        reason = str(error).splitlines()[0].rstrip(".")
        raise Mistake(
            "device", f"{name!r} is not available on this machine ({reason}); use cpu, or none."
        ) from error
    return torch.device(name)
