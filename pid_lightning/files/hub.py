"""Find and publish models: files, folders, runs, bundled names and the Hugging Face hub."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from pid_lightning.files import ASSETS
from pid_lightning.files.atomic import make_folder, replaced_file
from pid_lightning.files.card import HUB_ID, model_card
from pid_lightning.files.models import ModelInfo, save_model
from pid_lightning.nn import PiD

MODEL_FILE, CONFIG_FILE, CARD_FILE = "model.safetensors", "config.json", "README.md"
MODEL_SUFFIXES = (".safetensors", ".ckpt")

# Models shipped with the package, and which `pid decode` and `PiDDecoder.from_pretrained` take.
DEFAULT_MODEL = "pid-small-flux2-4x"
BUNDLED_MODELS: dict[str, Path] = {DEFAULT_MODEL: ASSETS / f"{DEFAULT_MODEL}.safetensors"}


def find_model(
    name: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """Path of a model's file.

    Args:
        name: a ``.safetensors`` model, a run's ``.ckpt``, a folder that `save_folder` wrote, a
            run's folder (its newest checkpoint), a bundled name, or a hub id ``owner/name``.
        revision, token, cache_dir, local_files_only: options of `hf_hub_download`.

    Raises:
        FileNotFoundError: no local model has that name.
        OSError: the hub cannot provide it.
    """
    if str(name) in BUNDLED_MODELS:
        return BUNDLED_MODELS[str(name)]
    path = Path(os.path.expanduser(name))
    if path.is_file():
        return path
    if path.is_dir() and str(name):
        file = path / MODEL_FILE
        file = file if file.is_file() else find_last_checkpoint(path)
        if file is not None:
            return file
    is_hub_id = HUB_ID.fullmatch(str(name)) and not path.is_dir()
    if not is_hub_id or path.suffix in MODEL_SUFFIXES:
        raise FileNotFoundError(
            f"model {str(name)!r} was not found: give a {' or '.join(MODEL_SUFFIXES)} file, a "
            f"folder with {MODEL_FILE} or of a run with checkpoints, a hub id owner/name, or a "
            f"bundled name ({', '.join(BUNDLED_MODELS)})."
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        file = hf_hub_download(
            str(name),
            MODEL_FILE,
            library_name="pid_lightning",
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        # Below the hub's status stands what it means: no such repository, no such file, gated.
        told = [part.strip() for part in str(error).split("\n\n") if part.strip()]
        status, *meaning = told or [type(error).__name__]
        reason = (meaning or [status])[0].splitlines()[0]
        raise OSError(
            f"model {str(name)!r} is no local file or folder, and the hub does not provide its "
            f"{MODEL_FILE} ({reason.rstrip('.')}): check the name and the connection."
        ) from error
    return Path(file)


def find_last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in the folder of a run, or of all versions of a run.

    Normally that is a `last.ckpt`; after a kill it may be the last periodic checkpoint, in a folder
    of its own where its name holds a metric with a slash.
    """
    places = ("", "checkpoints/**/", "version_*/checkpoints/**/")
    found = {path for place in places for path in folder.glob(f"{place}*.ckpt")}
    return max(found, key=lambda path: (path.stat().st_mtime, path.name), default=None)


def save_folder(
    denoiser: PiD,
    info: ModelInfo,
    folder: str | Path,
    dtype: torch.dtype,
    license: str = "other",
    source: Path | None = None,
) -> None:
    """Write the model file, its metadata as ``config.json``, and a model card; see `model_card`.

    Raises:
        OSError: the folder cannot be made or written to.
        Mistake: see `save_model`.
    """
    make_folder("folder", folder)
    folder = Path(os.path.expanduser(folder))
    save_model(denoiser, info, folder / MODEL_FILE, dtype)
    with replaced_file(folder / CONFIG_FILE) as temporary:
        temporary.write_text(json.dumps(info.to_plain(), indent=2) + "\n", encoding="utf-8")
    with replaced_file(folder / CARD_FILE) as temporary:
        temporary.write_text(model_card(denoiser, info, license, source), encoding="utf-8")


def upload_folder(
    folder: str | Path, repo_id: str, private: bool | None, token: str | bool | None, message: str
) -> str:
    """Upload a folder to ``owner/name``, created if missing; returns the URL of the commit."""
    from huggingface_hub import HfApi

    api = HfApi(token=token, library_name="pid_lightning")
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message))
