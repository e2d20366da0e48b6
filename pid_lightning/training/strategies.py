"""Which of Lightning's strategies and precisions can train a PiD."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, Strategy

from pid_lightning.checks import Mistake


def check_strategy(strategy: Strategy) -> None:
    """Check that a strategy keeps network and average whole.

    Raises:
        Mistake: FSDP, which does not.
    """
    if isinstance(strategy, FSDPStrategy):
        raise Mistake(
            "trainer.strategy",
            "FSDP is not supported, since it would cut the network and its average at different "
            "places, and takes no frozen encoder in bf16; use ddp, with "
            "model.training.activation_checkpointing if memory is short.",
        )


def check_alternates(trainer: Trainer) -> None:
    """Check that a trainer can train some networks while others rest.

    Raises:
        Mistake: it scales gradients, or its strategy would wait for those of resting networks.
    """
    if trainer.precision == "16-mixed":
        raise Mistake(
            "trainer.precision",
            "DMD2 clips gradients itself, but 16-mixed scales them; use bf16-mixed or 32-true.",
        )
    waits = isinstance(trainer.strategy, DDPStrategy)
    if waits and not trainer.strategy._ddp_kwargs.get("find_unused_parameters"):
        raise Mistake(
            "trainer.strategy",
            "DMD2 alternates networks; with several processes, set it to "
            "ddp_find_unused_parameters_true.",
        )
