"""`pid`: Lightning's command line for these modules."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from pid_lightning.callbacks.dmd2 import DMD2
from pid_lightning.callbacks.last_checkpoint import LastCheckpoint
from pid_lightning.checkpointing import AtomicCheckpointIO, find_last_checkpoint, read_checkpoint
from pid_lightning.freed_memory import keep_freed_memory
from pid_lightning.modules.base import PiDModule

PACKAGE = Path(__file__).parent

# Classes that have been imported are known to configs by their short names.
for _module in ("callbacks", "data", "modules", "modules.autoencoder"):
    import_module(f"pid_lightning.{_module}")


class SaveConfig(SaveConfigCallback):
    """Keeps a fit's first configuration beside the run, and as text in TensorBoard."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save once: resuming, testing and predicting leave what stands there."""
        folder = trainer.log_dir
        if stage != "fit" or not folder:
            return
        # What the first process finds holds for all: it may write before the others have looked.
        if not trainer.strategy.broadcast((Path(folder) / self.config_filename).exists()):
            super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Log the configuration; Lightning itself writes it to `config.yaml`."""
        if isinstance(trainer.logger, TensorBoardLogger):
            text = self.parser.dump(self.config, skip_none=False)
            trainer.logger.experiment.add_text("config", f"```yaml\n{text}\n```")


class PiDCLI(LightningCLI):
    """`pid {fit,validate,test,predict}` with runs that are found again and never overwritten."""

    def add_arguments_to_parser(self, parser: Any) -> None:
        """Add what is not the model's, the data's or the trainer's."""
        parser.add_argument(
            "--test_after_fit", type=bool, default=False, help="Test the run when its fit ends."
        )
        parser.add_argument(
            "--baseline",
            type=str | None,
            help="Short for --model.evaluation.baseline: Real-ESRGAN's file, for test to compare.",
        )

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Parse, then read the checkpoint's start: Lightning opens it next, and tells no cure."""
        super().parse_arguments(parser, args)
        subcommand = self.config.get("subcommand")
        path = self.config[subcommand].ckpt_path if subcommand else None
        if path is not None and Path(path).is_file():
            read_checkpoint(path, mapped=True)

    def before_instantiate_classes(self) -> None:
        """Find the checkpoint to go on from, and go on in its folder."""
        if self.subcommand is None:  # built from Python, nothing is run
            return
        config = self.config[self.subcommand]
        _move_baseline(config)
        logger = config.trainer.logger
        folder = None
        if logger and not isinstance(logger, list) and "save_dir" in logger.init_args:
            folder = Path(logger.init_args.save_dir) / (logger.init_args.get("name") or "")
        if config.ckpt_path == "last":
            found = find_last_checkpoint(folder) if folder is not None else None
            if found is None:
                raise FileNotFoundError(
                    f"ckpt_path: last: no version_*/checkpoints/*.ckpt under {folder}; "
                    "fit first, or name a checkpoint."
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
        if config.ckpt_path is None:
            return
        path = Path(config.ckpt_path)
        if not path.exists():
            raise FileNotFoundError(f"ckpt_path: {path} does not exist.")
        version = path.parent.parent
        if folder is not None and version.parent.resolve() == folder.resolve():
            logger.init_args.version = version.name

    def instantiate_classes(self) -> None:
        """Build everything, then check what can be before data is opened."""
        super().instantiate_classes()
        if self.subcommand is None or not isinstance(self.model, PiDModule):
            return
        path = self.config[self.subcommand].ckpt_path
        if path is not None and Path(path).is_file():
            self.model.check_checkpoint(read_checkpoint(path, mapped=True))
        self.model.prepare(self.datamodule, self.subcommand)
        if self.subcommand == "fit":
            for callback in self.trainer.callbacks:
                if isinstance(callback, DMD2):  # opened again by its setup: once to be told now
                    callback.open_teacher(self.model)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add a last checkpoint, Ctrl-C included, and checkpoints that are written whole."""
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError) as error:
            raise ValueError(f"trainer: {error}") from error
        trainer.callbacks.append(LastCheckpoint())  # last: after the average has followed a step
        if type(trainer.strategy.checkpoint_io).__name__ == "TorchCheckpointIO":
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        return trainer

    def after_fit(self) -> None:
        """Test what was trained, where asked."""
        if self.config.fit.test_after_fit:
            self.trainer.test(self.model, self.datamodule, verbose=False)
            print(f"run      {self.trainer.log_dir}")
            print(f"curves   tensorboard --logdir {Path(self.trainer.log_dir).parent}")


def _move_baseline(config: Any) -> None:
    """Put ``--baseline`` where the model looks, so that a saved config says it once.

    Raises:
        ValueError: the model has no evaluation.
    """
    if config.baseline is None:
        return
    if "evaluation" not in config.model.init_args:
        raise ValueError(
            f"baseline: {config.model.class_path} decodes no latents to compare with it; leave it "
            "out."
        )
    config.model.init_args.evaluation.baseline = config.baseline
    config.baseline = None


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a mistake of the user's is one sentence and exit status 2."""
    keep_freed_memory()
    try:
        PiDCLI(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=SaveConfig,
            seed_everything_default=0,
            args=arguments,
            parser_kwargs={"exit_on_error": False}
            | {name: {"exit_on_error": False} for name in PiDCLI.subcommands()},
        )
    except (ArgumentError, MisconfigurationException, ValueError, OSError) as error:
        told = _told_by_this_package(error)
        if told is None and not isinstance(error, (ArgumentError, MisconfigurationException)):
            raise  # a fault, to show in full
        print(f"pid: {told or parser_sentence(str(error))}", file=sys.stderr)
        sys.exit(2)


def parser_sentence(message: str) -> str:
    """One line of what jsonargparse tells in many: without the types that the value is not of.

    Args:
        message: e.g. of a misspelt key, with an error for each type that the value could have.
    """
    noise = (
        r"(- )?(Does not validate|Subtypes:|Errors:|Subclass types|a class path|a dict|Given value)"
    )
    lines = [line.strip() for line in message.splitlines()]
    lines = [line for line in lines if line and not re.match(noise, line)]
    told = [line for line in lines if not line.startswith("- Expected a ")]
    if len(told) < 2:  # nothing else is told than what was expected
        told = lines
    return " ".join(told).replace(": - ", ": ").replace(" - ", "; ")


def _told_by_this_package(error: BaseException | None) -> BaseException | None:
    """The error, among this one and its causes, that a raise statement of this package made."""
    while error is not None:
        frames = traceback.extract_tb(error.__traceback__)
        if frames and PACKAGE in Path(frames[-1].filename).parents:
            return error
        error = error.__cause__ or error.__context__
    return None
