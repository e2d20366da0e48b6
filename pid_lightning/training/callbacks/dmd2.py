"""DMD2: turns `fit` of any family into distillation of its teacher to a few steps."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_info

from pid_lightning.checks import Mistake
from pid_lightning.decoding.arguments import check_steps
from pid_lightning.diffusion.sampling import STUDENT_TIMES
from pid_lightning.files import models as weights
from pid_lightning.files.hub import find_model
from pid_lightning.nn import PiD
from pid_lightning.training.callbacks.turns import Turns
from pid_lightning.training.distillation import Distillation
from pid_lightning.training.modules.base import PiDModule
from pid_lightning.training.settings import (
    DistillationSettings,
    StudentInput,
    StudentSteps,
    TeacherDtype,
)
from pid_lightning.training.strategies import check_alternates

CRITIC_SETTINGS = ("learning_rate", "betas", "fake_score_weight_decay")  # their optimiser's


class DMD2(Callback):
    """Distribution matching distillation (DMD2, arXiv 2405.14867) as the module's objective.

    The student is `module.denoiser`. Student, frozen teacher and fake score start from the same
    weights. One of `student_every` batches trains the student; the others train the fake score on
    the student's outputs and a discriminator on the teacher's features. One batch is one
    `global_step`; `training.learning_rate`, its schedule and `EMA` apply to the student and count
    its steps.

    Args:
        teacher: a run with the same config (a checkpoint, or the folder, for its newest one), a
            model file, a bundled name or a hub id.
        student_times: pixel times of the student's steps, from noise to clean.
        student_every: batches from one student step to the next.
        student_input: ``"rollout"``, the student's own steps from noise without gradient, or
            ``"noised_data"``, noised real images.
        student_steps: ``"all"`` trains a random step of the student each time, ``"last"`` only the
            final one. All steps share one fake score: if the first ones stay blurred, as with a
            small student, it drives the last one to overcompensate.
        guidance_scale: text guidance of the teacher; it has no effect without text.
        generator_weight: weight of the adversarial loss in the student's loss.
        generator_warmup: student steps over which that weight rises linearly.
        r1_weight: weight of the approximate R1 penalty.
        r1_noise: standard deviation of the noise that R1 adds.
        time_clamp: smallest and largest time at which scores are compared and trained.
        taps: teacher blocks (0-based) whose features the discriminator sees.
        discriminator_depth: number of strided convolutions in the discriminator.
        learning_rate: of fake score and discriminator.
        betas: of their AdamW.
        fake_score_weight_decay: of the fake score.
        teacher_dtype: dtype of the frozen teacher's weights.

    Raises:
        Mistake: settings out of range; in `setup`, a teacher that does not match the config or was
            itself distilled.
    """

    attaches: tuple[str, ...] = ("distillation",)

    def __init__(
        self,
        teacher: str,
        student_times: tuple[float, ...] = STUDENT_TIMES,
        student_every: int = 6,
        student_input: StudentInput = "rollout",
        student_steps: StudentSteps = "all",
        guidance_scale: float = 3.0,
        generator_weight: float = 0.05,
        generator_warmup: int = 100,
        r1_weight: float = 200.0,
        r1_noise: float = 0.1,
        time_clamp: tuple[float, float] = (0.02, 0.99),
        taps: tuple[int, ...] = (7,),
        discriminator_depth: int = 1,
        learning_rate: float = 1e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        fake_score_weight_decay: float = 1e-3,
        teacher_dtype: TeacherDtype = "bfloat16",
    ) -> None:
        self.teacher = teacher
        self.settings: DistillationSettings = DistillationSettings(
            student_times=tuple(student_times),
            student_every=student_every,
            student_input=student_input,
            student_steps=student_steps,
            guidance_scale=guidance_scale,
            generator_weight=generator_weight,
            generator_warmup=generator_warmup,
            r1_weight=r1_weight,
            r1_noise=r1_noise,
            time_clamp=tuple(time_clamp),
            taps=tuple(taps),
            discriminator_depth=discriminator_depth,
            learning_rate=learning_rate,
            betas=tuple(betas),
            fake_score_weight_decay=fake_score_weight_decay,
            teacher_dtype=teacher_dtype,
        )
        self.turns: Turns | None = None  # from `setup` of a fit on
        self._fingerprint = ""

    def setup(self, trainer: Trainer, pl_module: PiDModule, stage: str) -> None:
        """Attach the networks before Lightning wraps, moves, saves and restores the module."""
        if stage != "fit":
            return
        check_alternates(trainer)
        if self.turns is None or pl_module.objective is not self.turns:
            pl_module.prepare(trainer.datamodule, stage)  # tells the size of the pictures
            teacher = self.open_teacher(pl_module)
            rank_zero_info(f"DMD2 teacher: {find_model(self.teacher)}")
            self._fingerprint = weights.fingerprint(teacher)
            training, student = pl_module.training_settings, pl_module.denoiser
            null_text = None
            if self.settings.guidance_scale != 1.0:
                null_text = pl_module.null_text(1)
            distillation = Distillation.begin(
                self.settings, teacher, student, training.seed, null_text
            )
            self.turns = Turns(student, distillation, training)
        self.turns.take_over(trainer)
        if trainer.global_step == 0:  # else the trainer goes on; a resumed run restores it
            self.turns.num_student_updates = 0
        pl_module.begin_distillation(self.turns.distillation, self.turns)

    def open_teacher(self, module: PiDModule) -> PiD:
        """Load the teacher and check it against a module.

        Raises:
            Mistake: the teacher is not there, is another model, is itself distilled or lacks a
                tapped block, the discriminator is too deep, the student has fewer than
                `evaluation.steps`, or the module makes no pictures or has an `init_from`.
        """
        train = module.training_settings.train
        if train in ("rgb_head", "latents"):
            raise Mistake(
                "model.training.train", f"{train} makes no pictures to distil; set it to all."
            )
        if module.init_from is not None and not module.has_own_weights:
            raise Mistake(
                "model.init_from",
                f"{module.init_from} is not used, since DMD2 starts the student from its teacher "
                f"({self.teacher}); leave it out.",
            )
        try:
            teacher, info = weights.load_model(find_model(self.teacher))
        except OSError as error:
            raise Mistake("DMD2 teacher", str(error)) from error
        differences = module.info.differences(info)
        if differences:
            raise Mistake(
                "DMD2 teacher",
                f"{self.teacher} does not match this config ({'; '.join(differences)}); give a "
                "teacher trained with it.",
            )
        if info.student_times is not None:
            raise Mistake(
                "DMD2 teacher", f"{self.teacher} is itself a distilled student; give its teacher."
            )
        check_steps(self.settings.student_times, module.evaluation.steps)
        self.settings.check_networks(info.config, module.image_size)
        return teacher

    def on_fit_start(self, trainer: Trainer, pl_module: PiDModule) -> None:
        """Compile fake score and teacher if the student is compiled."""
        if pl_module.training_settings.compile:
            for network in (pl_module.distillation.fake_score, pl_module.distillation.teacher):
                network.compile(dynamic=False, fullgraph=True)

    def state_dict(self) -> dict[str, Any]:
        """The student's step count, the teacher's fingerprint and the critics' settings."""
        if self.turns is None:
            return {}
        return {
            "num_student_updates": self.turns.num_student_updates,
            "teacher": self._fingerprint,
            "critics": {name: getattr(self.settings, name) for name in CRITIC_SETTINGS},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the step count; a resumed fit must have the same teacher, a test has none.

        Raises:
            Mistake: another teacher, or settings that the critics' optimiser would not take.
        """
        if self.turns is None:
            return
        if state_dict["teacher"] != self._fingerprint:
            raise Mistake(
                "DMD2 teacher",
                f"{self.teacher} is not the teacher that this checkpoint was distilled from; give "
                "the same one to resume.",
            )
        for name, stored in state_dict.get("critics", {}).items():
            ours = getattr(self.settings, name)
            if ours != stored:
                raise Mistake(
                    f"DMD2 {name}",
                    f"{ours}, but {stored} in the run that is resumed, whose optimiser keeps it; "
                    "give that.",
                )
        self.turns.num_student_updates = state_dict["num_student_updates"]
