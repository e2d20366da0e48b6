"""Processes that start fast, forked from a server that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

TINY = """
seed_everything: 0
model:
  class_path: VAEPiD
  init_args:
    vae: taef2
    scale: 4
    denoiser:
      width: 32
      num_heads: 2
      num_blocks: 2
      patch_size: 16
      pixel_width: 4
      pixel_attention_width: 16
      pixel_num_heads: 2
      num_pixel_blocks: 1
      text_length: 0
      rope_reference: null
      adapter: {width: 16, num_res_blocks: 1}
    training: {learning_rate: 1.0e-3, warmup_steps: 2}
    evaluation: {latent_sigmas: [0.0, 0.8], steps: 2}
data:
  class_path: ImageData
  init_args: {path: FOLDER, image_size: 64, batch_size: 2, num_val: 4}
trainer:
  max_steps: 4
  accelerator: cpu
  devices: 1
  enable_progress_bar: false
  enable_model_summary: false
  log_every_n_steps: 1
  val_check_interval: 2
  num_sanity_val_steps: 0
  limit_val_batches: 1
  logger:
    class_path: TensorBoardLogger
    init_args: {save_dir: runs, name: tiny}
  callbacks:
    - class_path: EMA
    - class_path: PictureGrids
      init_args: {num_pictures: 1, latent_sigmas: [0.8], steps: 1}
    - class_path: LearningRateMonitor
    - class_path: ModelCheckpoint
      init_args: {save_last: true, every_n_train_steps: 2}
"""
DMD2 = """
    - class_path: DMD2
      init_args: {teacher: TEACHER, student_every: 2, taps: [0, 1], learning_rate: 1.0e-3}
"""


def write_config(folder: Path, teacher: Path | None = None) -> Path:
    """Write a full experiment on 9 noise pictures, 5 of them for training, so that an epoch ends
    with a partial batch.

    With a teacher it is a distillation.
    """
    import torch

    from pid_lightning.pictures.files import write_picture

    pictures = folder / "pictures"
    for i in range(9):
        noise = torch.rand(3, 80, 80, generator=torch.Generator().manual_seed(i)) * 2 - 1
        pictures.mkdir(exist_ok=True)
        write_picture(noise, pictures / f"{i}.png", {})
    text = TINY.replace("FOLDER", str(pictures))
    if teacher is not None:
        text += DMD2.replace("TEACHER", str(teacher)).lstrip("\n")
    config = folder / ("distil.yaml" if teacher else "tiny.yaml")
    config.write_text(text)
    return config


def start(log: Path, target: Callable[..., None], *arguments: Any, **variables: str) -> BaseProcess:
    """Run `target(*arguments)` in a fresh process with environment variables, printing to `log`."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["pid_lightning.commands.fit", "datasets", "tensorboard"])
    process = server.Process(target=_run, args=(log, variables, target, arguments), daemon=True)
    process.start()
    return process


def _run(
    log: Path, variables: dict[str, str], target: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    import torch

    with open(log, "a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", 1, closefd=False) for n in (1, 2))
    os.environ.update(variables)
    torch.set_num_threads(1)
    target(*arguments)


def run_pid(folder: Path, *arguments: str) -> None:
    """Run `pid` in a folder."""
    from pid_lightning.__main__ import main

    os.chdir(folder)
    main([*arguments])


def finish(process: BaseProcess, log: Path, seconds: float = 120) -> None:
    """Wait for a process and raise if it fails."""
    process.join(seconds)
    if process.exitcode != 0:
        process.kill()
        raise AssertionError(f"exit code {process.exitcode}: {log.read_text()[-3000:]}")


def run_ranks(log: Path, target: Callable[..., None], *arguments: Any) -> None:
    """Run `target(*arguments)` in two processes, as ranks 0 and 1 of one job, to their end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0"}
    logs = [log.with_suffix(f".{rank}.log") for rank in range(2)]
    ranks = [start(logs[r], target, *arguments, LOCAL_RANK=str(r), **where) for r in range(2)]
    until = time.monotonic() + 120
    while any(rank.is_alive() for rank in ranks) and time.monotonic() < until:
        if any(rank.exitcode for rank in ranks):
            break  # the other one would wait for it forever
        time.sleep(0.02)
    for rank, file in zip(ranks, logs, strict=True):
        finish(rank, file, seconds=1)
