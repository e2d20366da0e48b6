"""`pid fit|validate|test|predict`: the LightningCLI of this package."""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import jsonargparse
import lightning
from jsonargparse import ArgumentError
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from lightning.pytorch.utilities.model_helpers import is_overridden

from pid_lightning.checks import check_at_least
from pid_lightning.commands.parsing import PACKAGE, parser_sentence, raised_here, raised_in
from pid_lightning.decoding.memory import keep_freed_memory
from pid_lightning.files.atomic import make_folder
from pid_lightning.files.hub import find_last_checkpoint
from pid_lightning.files.tensors import read_torch_file
from pid_lightning.training.callbacks.check_monitors import CheckMonitors
from pid_lightning.training.callbacks.dmd2 import DMD2
from pid_lightning.training.callbacks.ema import EMA
from pid_lightning.training.callbacks.images import PictureGrids
from pid_lightning.training.callbacks.last_checkpoint import LastCheckpoint, check_place
from pid_lightning.training.checkpoints import AtomicCheckpointIO, read_run
from pid_lightning.training.modules.base import PiDModule
from pid_lightning.training.strategies import check_strategy

# jsonargparse resolves short class names in configs only for classes that were imported.
for _module in ("callbacks", "data.latent_crops", "modules", "modules.autoencoder"):
    import_module(f"pid_lightning.training.{_module}")

CALLBACKS = Path(lightning.pytorch.callbacks.__file__).parent

# Warnings that Lightning gives in every run, of what is intended.
EXPECTED = (
    "Found .* in eval mode at the start of training",  # the frozen encoder
    "Precision bf16-mixed is not supported by the model summary",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # between Lightning and torch
)


class Parser(LightningArgumentParser):
    """A parser, also of each class's arguments, that takes no abbreviated option."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)


class SaveConfig(SaveConfigCallback):
    """Saves the configuration of a new run beside it, and as text in TensorBoard."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save once: resuming, testing and predicting keep the existing file."""
        folder = trainer.log_dir
        if stage != "fit" or not folder or trainer.fast_dev_run:
            return
        # Rank 0 decides for all ranks, since it may write before the others have looked.
        if not trainer.strategy.broadcast((Path(folder) / self.config_filename).exists()):
            super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Log the configuration as text; Lightning writes `config.yaml` itself."""
        if isinstance(trainer.logger, TensorBoardLogger):
            text = self.parser.dump(self.config, skip_none=False)
            trainer.logger.experiment.add_text("config", f"```yaml\n{text}\n```")


class PiDCLI(LightningCLI):
    """A LightningCLI whose runs are never overwritten and are found by `--ckpt_path last`."""

    def add_arguments_to_parser(self, parser: Any) -> None:
        """Add the options that belong to neither model, data nor trainer."""
        parser.add_argument(
            "--test_after_fit", type=bool, default=False, help="Run the test when the fit ends."
        )
        parser.add_argument(
            "--baseline",
            type=str | None,
            help="Short for --model.evaluation.baseline: upscaler weights for test to compare.",
        )

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Parse, then check what Lightning does not check or not clearly."""
        try:
            super().parse_arguments(parser, args)
        except UnicodeDecodeError as error:
            raise ValueError(f"config: not a text file ({error}); give a YAML file.") from error
        subcommand = self.config.get("subcommand")
        if subcommand is None:
            return
        config = self.config[subcommand]
        config.ckpt_path = config.ckpt_path and os.path.expanduser(config.ckpt_path)
        if config.ckpt_path is not None and Path(config.ckpt_path).is_file():
            if Path(config.ckpt_path).suffix == ".safetensors":
                raise ValueError(
                    f"ckpt_path: {config.ckpt_path} is a model file, not a run's checkpoint; a "
                    "PiD takes it as --model.init_from."
                )
            read_torch_file(config.ckpt_path)
        if not isinstance(config.seed_everything, bool):
            check_at_least("seed_everything", config.seed_everything, 0)
            if config.seed_everything >= 2**32:
                raise ValueError(f"seed_everything: {config.seed_everything} must be below 2^32.")
        for name, least in (
            ("accumulate_grad_batches", 1),
            ("gradient_clip_val", 0),
            ("check_val_every_n_epoch", 1),
        ):
            if config.trainer[name] is not None:
                check_at_least(f"trainer.{name}", config.trainer[name], least)
        interval = config.trainer.val_check_interval
        if interval == 0:
            raise ValueError(
                "trainer.val_check_interval: 0 must be above 0; to validate never, set "
                "trainer.limit_val_batches to 0."
            )
        if isinstance(interval, float) and config.trainer.check_val_every_n_epoch is None:
            raise ValueError(
                f"trainer.val_check_interval: {interval} is a fraction of an epoch, which needs "
                "trainer.check_val_every_n_epoch 1; set it, or give a number of batches."
            )

    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning would replace what was given by a checkpoint's class and arguments."""

    def before_instantiate_classes(self) -> None:
        """Resolve `--ckpt_path last`, and continue in the folder of the checkpoint's run."""
        if self.subcommand is None:  # instantiated from Python without a subcommand
            return
        config = self.config[self.subcommand]
        _move_baseline(config)
        logger = config.trainer.logger
        folder = None
        if hasattr(logger, "init_args") and "save_dir" in logger.init_args:
            logger.init_args.save_dir = os.path.expanduser(logger.init_args.save_dir)
            folder = Path(logger.init_args.save_dir)
            folder /= logger.init_args.get("name") or ""
        if config.ckpt_path == "last":
            found = find_last_checkpoint(folder) if folder is not None else None
            if found is None:
                where = f"no checkpoint under {folder}" if folder else "no trainer.logger.save_dir"
                raise FileNotFoundError(
                    f"ckpt_path: last: {where}; fit first, or name a checkpoint."
                )
            config.ckpt_path = str(found)
        if (
            config.ckpt_path is None
            and self.subcommand != "fit"
            and not config.model.init_args.get("init_from")
        ):
            raise ValueError(
                f"pid {self.subcommand} needs a trained network: give --ckpt_path FILE, "
                "--ckpt_path last for this config's newest run, or --model.init_from FILE."
            )
        if folder is not None:
            make_folder("trainer.logger.save_dir", Path(logger.init_args.save_dir))
        if config.ckpt_path is None:
            return
        given = Path(config.ckpt_path)
        is_run = given.is_dir() and given.suffix != ".ckpt"  # a sharded checkpoint is a folder too
        path = find_last_checkpoint(given) if is_run else given
        if not config.ckpt_path or path is None or not path.exists():
            raise FileNotFoundError(
                f"ckpt_path: {config.ckpt_path!r} is no checkpoint and no folder of a run; check "
                "the path."
            )
        config.ckpt_path = str(path)
        version = path.parent.parent
        if folder is not None and version.parent.resolve() == folder.resolve():
            logger.init_args.version = version.name

    def instantiate_classes(self) -> None:
        """Build everything, then make every check that needs no data."""
        super().instantiate_classes()
        if self.subcommand is None:
            return
        if not isinstance(self.model, PiDModule):
            check_not_pid(self.subcommand, self.model, self.trainer.callbacks)
            if self.subcommand == "fit" and self.config.fit.test_after_fit:
                check_not_pid("test", self.model, ())
            return
        check_strategy(self.trainer.strategy)
        path = self.config[self.subcommand].ckpt_path
        if path is not None and Path(path).is_file():
            read_run(self.model.info, read_torch_file(path))
        self.model.prepare(self.datamodule, self.subcommand)
        if self.subcommand == "fit":
            for callback in self.trainer.callbacks:
                if isinstance(callback, DMD2):  # its setup opens it again; mistakes surface now
                    callback.open_teacher(self.model)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add `CheckMonitors`, `LastCheckpoint` (Ctrl-C too) and atomic checkpoint writing."""
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, RuntimeError, TypeError, ValueError) as error:
            if not raised_in(error, Path(lightning.__file__).parent):
                raise
            raise ValueError(f"trainer: {error}") from error
        trainer.callbacks.insert(0, CheckMonitors())  # first, before others read their metrics
        trainer.callbacks.append(LastCheckpoint())  # last, so that EMA has followed the step
        if type(trainer.strategy.checkpoint_io).__name__ == "TorchCheckpointIO":
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        return trainer

    def before_fit(self) -> None:
        """Find now what would fail later, or have replaced files by then: the place of checkpoints,
        and the pictures of a test after the fit."""
        requeued = self.trainer._checkpoint_connector._hpc_resume_path  # taken before any other
        check_place(self.trainer, requeued or self.config.fit.ckpt_path)
        if self.config.fit.test_after_fit and self.datamodule is not None:
            self.datamodule.setup("test")

    def after_fit(self) -> None:
        """Run the test where `test_after_fit` asks for it."""
        if self.config.fit.test_after_fit:
            self.trainer.test(self.model, self.datamodule, verbose=False)
            print(f"run      {self.trainer.log_dir}")
            print(f"curves   tensorboard --logdir {Path(self.trainer.log_dir).parent}")


def check_not_pid(subcommand: str, model: LightningModule, callbacks: Sequence[Callback]) -> None:
    """Raise ValueError for what a model lacks that is no PiD."""
    name = type(model).__name__
    if subcommand in ("test", "predict") and not is_overridden(f"{subcommand}_step", model):
        raise ValueError(f"pid {subcommand}: {name} has no {subcommand}_step; use pid validate.")
    for callback in callbacks:
        if isinstance(callback, (DMD2, EMA, PictureGrids)):
            raise ValueError(
                f"trainer.callbacks: {type(callback).__name__} needs a PiD, not {name}; leave it "
                "out."
            )


def _move_baseline(config: Any) -> None:
    """Move ``--baseline`` to the model's settings, so that a saved config holds it once.

    Raises:
        ValueError: the model has no evaluation settings.
    """
    if config.baseline is None:
        return
    if "evaluation" not in config.model.init_args:
        raise ValueError(
            f"baseline: {config.model.class_path} decodes no latents that could be compared; leave "
            "it out."
        )
    config.model.init_args.evaluation.baseline = config.baseline
    config.baseline = None


def _building_error(error: BaseException | None) -> BaseException | None:
    """What a class said of its arguments when jsonargparse failed to build it; None if it said
    nothing or it is a bug."""
    if not str(error).startswith("Does not validate against any of the Union subtypes"):
        return None
    while error is not None and raised_in(error, Path(jsonargparse.__file__).parent):
        error = error.__cause__ or error.__context__
    told = (ValueError, OSError, ModuleNotFoundError, MisconfigurationException)
    is_bug = error is None or raised_in(error, PACKAGE)  # else `raised_here` had found it
    return error if isinstance(error, told) and not is_bug else None


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a user's mistake is one sentence and exit status 2."""
    keep_freed_memory()
    for message in EXPECTED:
        warnings.filterwarnings("ignore", message)
    advertises = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    advertises.addFilter(lambda record: "Tip: " not in record.getMessage())
    try:
        PiDCLI(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_callback=SaveConfig,
            seed_everything_default=0,
            args=arguments,
            parser_class=Parser,
            parser_kwargs={"exit_on_error": False}
            | {name: {"exit_on_error": False} for name in PiDCLI.subcommands()},
        )
    except SIGTERMException:  # outside training, where `LastCheckpoint` handles it
        sys.exit(128 + signal.SIGTERM)
    except RuntimeError as error:
        if not raised_in(error, CALLBACKS):  # of a metric that is not logged
            raise
        print(f"pid: {error}", file=sys.stderr)
        sys.exit(2)
    except (ArgumentError, MisconfigurationException, ValueError, OSError) as error:
        mistake = raised_here(error) or _building_error(error)
        if mistake is None and not isinstance(error, (ArgumentError, MisconfigurationException)):
            raise  # a bug
        told = str(mistake or parser_sentence(str(error)))
        hint = "; --config FILE gives them" if "arguments are required" in told else ""
        print(f"pid: {told}{hint}", file=sys.stderr)
        sys.exit(2)
