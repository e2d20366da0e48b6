"""`pid`: Lightning's command line for these modules."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger

from pid_lightning.callbacks.last_checkpoint import LastCheckpoint
from pid_lightning.checkpointing import AtomicCheckpointIO, find_last_checkpoint

PACKAGE = Path(__file__).parent

# Classes that have been imported are known to configs by their short names.
for _module in ("callbacks", "data", "modules", "modules.autoencoder"):
    import_module(f"pid_lightning.{_module}")


class SaveConfig(SaveConfigCallback):
    """Keeps a fit's first configuration beside the run, and as text in TensorBoard."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save once: resuming, testing and predicting leave what stands there."""
        folder = trainer.log_dir
        if stage == "fit" and folder and not (Path(folder) / self.config_filename).exists():
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

    def before_instantiate_classes(self) -> None:
        """Find the checkpoint to go on from, and go on in its folder."""
        if self.subcommand is None:  # built from Python, nothing is run
            return
        config = self.config[self.subcommand]
        logger = config.trainer.logger
        folder = None
        if logger and not isinstance(logger, list) and "save_dir" in logger.init_args:
            folder = Path(logger.init_args.save_dir) / (logger.init_args.get("name") or "")
        if config.ckpt_path == "last":
            found = find_last_checkpoint(folder) if folder is not None else None
            if found is None:
                raise FileNotFoundError(
                    f"ckpt_path: last: no version_*/checkpoints/last.ckpt under {folder}; "
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
        if not path.is_file():
            raise FileNotFoundError(f"ckpt_path: {path} does not exist.")
        version = path.parent.parent
        if folder is not None and version.parent.resolve() == folder.resolve():
            logger.init_args.version = version.name

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add a last checkpoint, Ctrl-C included, and checkpoints that are written whole."""
        extra = kwargs.pop("callbacks", None) or []
        trainer = super().instantiate_trainer(**kwargs, callbacks=[*extra, LastCheckpoint()])
        if type(trainer.strategy.checkpoint_io).__name__ == "TorchCheckpointIO":
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        return trainer

    def after_fit(self) -> None:
        """Test what was trained, where asked."""
        if self.config.fit.test_after_fit:
            self.trainer.test(self.model, self.datamodule, verbose=False)
            print(f"run      {self.trainer.log_dir}")
            print(f"curves   tensorboard --logdir {Path(self.trainer.log_dir).parent}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a mistake of the user's is one sentence and exit status 2."""
    try:
        PiDCLI(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=SaveConfig,
            seed_everything_default=0,
            args=arguments,
        )
    except (ValueError, OSError) as error:
        if not _raised_by_this_package(error):
            raise
        print(f"pid: {error}", file=sys.stderr)
        sys.exit(2)


def _raised_by_this_package(error: BaseException) -> bool:
    """Whether a raise statement here made the error; any other one is a fault to show in full."""
    frames = traceback.extract_tb(error.__traceback__)
    return PACKAGE in Path(frames[-1].filename).parents
