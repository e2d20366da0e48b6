"""`pid fit|validate|test|predict`: the LightningCLI of this package."""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Sequence
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from pid_lightning.checks import Mistake, check_at_least, check_between
from pid_lightning.commands.parsing import find_cause
from pid_lightning.commands.run_folder import claim_version, hold
from pid_lightning.commands.yaml_limits import limit_yaml
from pid_lightning.decoding.memory import keep_freed_memory
from pid_lightning.files.atomic import make_folder
from pid_lightning.files.hub import find_last_checkpoint
from pid_lightning.files.tensors import read_torch_file
from pid_lightning.training.callbacks.check_monitors import CheckMonitors
from pid_lightning.training.callbacks.dmd2 import DMD2
from pid_lightning.training.callbacks.last_checkpoint import LastCheckpoint, check_place
from pid_lightning.training.checkpoints import read_run
from pid_lightning.training.modules.base import PiDModule
from pid_lightning.training.strategies import check_strategy

# jsonargparse resolves short class names in configs only for classes that were imported.
for _module in ("callbacks", "data.latent_crops", "modules"):
    import_module(f"pid_lightning.training.{_module}")

# Of Lightning's own options, whose wrong values it takes silently or stumbles over late.
LEAST = {"accumulate_grad_batches": 1, "gradient_clip_val": 0, "check_val_every_n_epoch": 1}

# Warnings that Lightning gives in every run, of what is intended.
EXPECTED = (
    "Found .* in eval mode at the start of training",  # the frozen encoder
    "Precision bf16-mixed is not supported by the model summary",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # between Lightning and torch
)


class Parser(LightningArgumentParser):
    """A parser, also of each class's arguments, that takes no abbreviated option and raises."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **(kwargs | {"exit_on_error": False}))


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

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with ExitStack() as self._held:
            super().__init__(*args, **kwargs)

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
            raise Mistake("config", f"not a text file ({error}); give a YAML file.") from error
        except ArgumentError as error:
            if not str(error).startswith("the following arguments are required"):
                raise
            raise Mistake("config", f"{error}; --config FILE gives them.") from error
        if self.config.get("subcommand") is None:  # from Python
            return
        config = self.config[self.config.subcommand]
        check_between("seed_everything", config.seed_everything, 0, 2**32 - 1)
        for name, least in LEAST.items():
            if config.trainer[name] is not None:
                check_at_least(f"trainer.{name}", config.trainer[name], least)
        if config.trainer.val_check_interval == 0:
            raise Mistake(
                "trainer.val_check_interval",
                "0 must be above 0; to validate never, set trainer.limit_val_batches to 0.",
            )

    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning would replace what was given by a checkpoint's class and arguments."""

    def before_instantiate_classes(self) -> None:
        """Find the checkpoint, and continue in the folder of its run."""
        if self.subcommand is None:
            return
        config = self.config[self.subcommand]
        _move_baseline(config)
        if not isinstance(config.trainer.callbacks, list | None):
            # Of what fails to be built, jsonargparse keeps the cause for the first type: lists.
            config.trainer.callbacks = [config.trainer.callbacks]
        logger = config.trainer.logger
        folder = None
        if hasattr(logger, "init_args") and "save_dir" in logger.init_args:
            logger.init_args.save_dir = os.path.expanduser(logger.init_args.save_dir)
            folder = Path(logger.init_args.save_dir, logger.init_args.get("name") or "")
        if config.ckpt_path is not None:
            path = find_checkpoint(config.ckpt_path, folder)
            config.ckpt_path = str(path)
            for version in path.parents:
                if folder is not None and version.parent.resolve() == folder.resolve():
                    logger.init_args.version = version.name
        elif self.subcommand != "fit" and not config.model.init_args.get("init_from"):
            raise Mistake(
                "ckpt_path",
                f"pid {self.subcommand} needs a trained network; give --ckpt_path FILE, "
                "--ckpt_path last for this config's newest run, or --model.init_from FILE.",
            )
        if folder is not None:
            make_folder("trainer.logger.save_dir", Path(logger.init_args.save_dir))

    def instantiate_classes(self) -> None:
        """Build everything, then make every check that needs no data."""
        super().instantiate_classes()
        if self.subcommand is None:
            return
        check_strategy(self.trainer.strategy)
        path = self.config[self.subcommand].ckpt_path
        if path is not None and Path(path).is_file():
            try:
                read_run(self.model.info, read_torch_file(path))
            except Mistake as error:
                raise Mistake("ckpt_path", error.sentence) from error
        self.model.prepare(self.datamodule, self.subcommand)
        if self.subcommand == "fit":
            for callback in self.trainer.callbacks:
                if isinstance(callback, DMD2):  # its setup opens it again; mistakes surface now
                    callback.open_teacher(self.model)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add `CheckMonitors` and `LastCheckpoint` (Ctrl-C too)."""
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (RuntimeError, TypeError, ValueError) as error:  # of options that do not go together
            raise Mistake("trainer", str(error)) from error
        trainer.callbacks.insert(0, CheckMonitors())  # first, before others read their metrics
        trainer.callbacks.append(LastCheckpoint())  # last, so that EMA has followed the step
        return trainer

    def before_fit(self) -> None:
        """Find now what would fail later, or have replaced files by then: the place of checkpoints,
        and the pictures of a test after the fit."""
        claim_version(self.trainer)
        requeued = self.trainer._checkpoint_connector._hpc_resume_path  # taken before any other
        check_place(self.trainer, requeued or self.config.fit.ckpt_path)
        hold(self.trainer, self._held)
        if self.config.fit.test_after_fit and self.datamodule is not None:
            self.datamodule.setup("test")

    def before_validate(self) -> None:
        """Claim a folder for what is logged."""
        claim_version(self.trainer)

    before_test = before_predict = before_validate

    def after_fit(self) -> None:
        """Run the test where `test_after_fit` asks for it."""
        if self.config.fit.test_after_fit:
            self.trainer.test(self.model, self.datamodule, verbose=False)
            print(f"run      {self.trainer.log_dir}")
            print(f"curves   tensorboard --logdir {Path(self.trainer.log_dir).parent}")


def find_checkpoint(name: str, folder: Path | None) -> Path:
    """Find the checkpoint that `--ckpt_path` names.

    Args:
        name: a checkpoint, the folder of a run (its newest), or ``last``, the newest in `folder`.
        folder: where this config's runs are, if they are saved.

    Raises:
        Mistake: there is none.
    """
    path = Path(os.path.expanduser(name))
    if path.suffix == ".safetensors":
        raise Mistake(
            "ckpt_path",
            f"{name} is a model file, not a run's checkpoint; a PiD takes it as --model.init_from.",
        )
    if name == "last":
        path = folder or path
    # A sharded checkpoint is a folder too.
    is_run = bool(name) and path.is_dir() and path.suffix != ".ckpt"
    found = find_last_checkpoint(path) if is_run else path
    if not name or found is None or not found.exists():
        where = path if name == "last" else repr(name)
        raise Mistake("ckpt_path", f"there is no checkpoint at {where}; fit first, or name one.")
    return found


def _move_baseline(config: Any) -> None:
    """Move ``--baseline`` to the model's settings, so that a saved config holds it once."""
    if config.baseline is None:
        return
    config.model.init_args.evaluation.baseline = config.baseline
    config.baseline = None


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    keep_freed_memory()
    limit_yaml()
    for message in EXPECTED:
        warnings.filterwarnings("ignore", message)
    advertises = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    advertises.addFilter(lambda record: "Tip: " not in record.getMessage())
    try:
        PiDCLI(
            PiDModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_callback=SaveConfig,
            seed_everything_default=0,
            args=arguments,
            parser_class=Parser,
        )
    except SIGTERMException:  # outside training, where `LastCheckpoint` handles it
        sys.exit(128 + signal.SIGTERM)
    except Exception as error:
        told = find_cause(error, MisconfigurationException)
        if told is None and "conditioned on metric" not in str(error):  # so begins EarlyStopping's
            raise
        raise Mistake("trainer", str(told or error)) from error
