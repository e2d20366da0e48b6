"""DMD2: gradients, alternation, resumption, refusals and distribution matching."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from torch import Tensor

from pid_lightning import DMD2, EMA, DistillationGrids, Training
from pid_lightning.decoding.latents import decode_latents
from pid_lightning.diffusion import flow, losses, sampling
from pid_lightning.diffusion.randomness import sample_generators
from pid_lightning.diffusion.sampling import STUDENT_TIMES
from pid_lightning.files import models as weights
from pid_lightning.nn import Discriminator
from pid_lightning.training.callbacks.turns import Turns, resting
from pid_lightning.training.sample import Sample


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of a short training run."""
    folder = tmp_path_factory.mktemp("teacher")
    tiny.fit(folder, 3)
    return folder / "last.ckpt"


def distillation(teacher: Path, **changes) -> DMD2:
    settings = {"student_every": 2, "taps": (0, 1), "learning_rate": 1e-3}
    return DMD2(str(teacher), **(settings | changes))


@pytest.fixture(scope="module")
def run(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of 6 uninterrupted steps of distillation."""
    folder = tmp_path_factory.mktemp("student")
    tiny.fit(folder, 6, distillation(teacher), EMA())
    return folder / "last.ckpt"


class Watch(tiny.pl.Callback):
    """Records which networks each batch updates, and what is counted and logged."""

    def __init__(self) -> None:
        self.moved: list[set[str]] = []
        self.steps: list[tuple[int, int]] = []
        self.logged: set[str] = set()

    def _state(self, module) -> dict[str, Tensor]:
        names = ("denoiser", "fake_score", "discriminator", "teacher", "denoiser_ema")
        return {
            name: torch.cat([p.detach().flatten().float() for p in network.parameters()])
            for name in names
            if (network := getattr(module, name)) is not None
        }

    def on_train_batch_start(self, trainer, pl_module, *_) -> None:
        self.before = self._state(pl_module)

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        after = self._state(pl_module)
        self.moved.append({k for k in after if not torch.equal(after[k], self.before[k])})
        objective = pl_module.objective
        self.steps.append((trainer.global_step, objective.num_student_updates))
        self.logged |= trainer.callback_metrics.keys()
        assert all(p.grad is None for p in pl_module.parameters())  # no leftover gradients


@pytest.mark.parametrize("student_input", ["rollout", "noised_data"])
def test_one_batch_is_one_step_of_one_side(
    student_input: str, teacher: Path, tmp_path: Path
) -> None:
    watch, dmd2 = Watch(), distillation(teacher, student_every=3, student_input=student_input)
    fitted = tiny.fit(tmp_path, 6, dmd2, EMA(), watch)
    critics, student = {"fake_score", "discriminator"}, {"denoiser", "denoiser_ema"}
    assert watch.moved == [critics, critics, student] * 2
    assert watch.steps == [(1, 0), (2, 0), (3, 1), (4, 1), (5, 1), (6, 2)]
    source, _ = weights.load_model(teacher)
    tiny.assert_equal_states(
        fitted.teacher.float().state_dict(), source.bfloat16().float().state_dict()
    )
    assert fitted.student_times == dmd2.student_times
    parts = "dmd_loss generator_loss dmd_gradient_norm fake_score_loss discriminator_loss r1_loss"
    assert {f"train/{part}" for part in parts.split()} <= watch.logged
    assert {"train/real_logit", "train/fake_logit"} <= watch.logged
    assert {"train/gradient_norm", "train/critics_gradient_norm"} <= watch.logged


def test_three_and_three_steps_are_six(run: Path, teacher: Path, tmp_path: Path) -> None:
    tiny.fit(tmp_path, 3, distillation(teacher), EMA())
    last = tmp_path / "last.ckpt"
    tiny.fit(tmp_path, 6, distillation(teacher), EMA(), resume=last)
    once, twice = (torch.load(path, weights_only=True) for path in (run, last))
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "pid", "global_step"):
        tiny.assert_equal_states(once[part], twice[part], part)
    networks = {name.split(".")[0] for name in once["state_dict"]}
    assert networks == {"denoiser", "denoiser_ema", "fake_score", "discriminator"}
    assert len(once["optimizer_states"]) == 2


def test_the_students_learning_rate_is_logged_at_its_steps(teacher: Path, tmp_path: Path) -> None:
    rates = {}

    class Logger(tiny.pl.loggers.CSVLogger):
        def log_metrics(self, metrics, step=None) -> None:
            if "lr-AdamW" in metrics:
                rates[step] = metrics["lr-AdamW"]

    logger, monitor = Logger(tmp_path), tiny.pl.callbacks.LearningRateMonitor()
    callbacks = (distillation(teacher), EMA(), monitor)
    tiny.fit(tmp_path, 6, *callbacks, logger=logger, log_every_n_steps=1)
    # Two steps of warm-up, one every other batch.
    assert rates == {0: 5e-4, 1: 5e-4, 2: 1e-3, 3: 1e-3, 4: 1e-3, 5: 1e-3}


@pytest.mark.parametrize("with_callback", [True, False])
def test_student_is_tested_with_its_own_steps(
    with_callback: bool, run: Path, teacher: Path, tmp_path: Path
) -> None:
    fitted = tiny.module()
    callbacks = (distillation(teacher), EMA()) if with_callback else ()
    tiny.trainer(tmp_path, 1, *callbacks).test(fitted, tiny.data(), ckpt_path=run, verbose=False)
    assert fitted.student_times == (0.999, 0.866, 0.634, 0.342)
    _, info = weights.load_model(run)
    assert info.student_times == fitted.student_times


def test_resuming_without_the_callback_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="add the DMD2 callback"):
        tiny.fit(tmp_path, 7, EMA(), resume=run)


def test_resuming_a_plain_run_as_distillation_is_refused(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not from DMD2"):
        tiny.fit(tmp_path, 7, distillation(teacher), EMA(), resume=teacher)


def test_resuming_with_another_teacher_is_refused(run: Path, tmp_path: Path) -> None:
    tiny.fit(tmp_path / "other", 4)
    other = distillation(tmp_path / "other" / "last.ckpt")
    with pytest.raises(ValueError, match="not the teacher"):
        tiny.fit(tmp_path, 7, other, EMA(), resume=run)


def test_a_student_is_no_teacher(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="itself a distilled student"):
        tiny.fit(tmp_path, 1, distillation(run), EMA())


def test_teacher_of_another_size_is_refused(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="width: 32, here 64"):
        tiny.fit(tmp_path, 1, distillation(teacher), EMA(), fitted=tiny.module(width=64))


def test_two_accumulated_batches_are_one_of_twice_the_size(teacher: Path, tmp_path: Path) -> None:
    def grown(batch_size: int, accumulate: int) -> dict[str, Tensor]:
        # Every loss is a mean over samples, so the gradients of halves add up.
        fitted = tiny.fit(
            tmp_path / str(batch_size),
            3,
            distillation(teacher),
            EMA(),
            batch_size=batch_size,
            accumulate_grad_batches=accumulate,
        )
        assert fitted.trainer.global_step == 3
        return fitted.state_dict()

    whole, halves = grown(4, 1), grown(2, 2)
    for name, value in whole.items():
        torch.testing.assert_close(halves[name], value, rtol=2e-3, atol=2e-4, msg=name)


def test_clipping_bounds_the_step(teacher: Path, tmp_path: Path) -> None:
    norms = []

    class Norms(tiny.pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
            grads = [p.grad for g in optimizer.param_groups for p in g["params"]]
            norms.append(torch.nn.utils.get_total_norm([g for g in grads if g is not None]).item())

    tiny.fit(tmp_path, 4, distillation(teacher), EMA(), Norms(), gradient_clip_val=1e-3)
    assert len(norms) == 4
    assert max(norms) <= 1e-3 * 1.01


def test_all_of_the_student_learns_in_mixed_bf16(teacher: Path, tmp_path: Path) -> None:
    """Also after a rollout without gradient in the same autocast."""
    without_gradient = []

    class Watch(tiny.pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
            if objective.turns.is_student(trainer.global_step):
                learning = pl_module.denoiser.named_parameters()
                lacking = [n for n, p in learning if p.requires_grad and p.grad is None]
                without_gradient.append(lacking)

    objective = distillation(teacher, student_steps="last")
    fitted = tiny.fit(tmp_path, 4, objective, EMA(), Watch(), precision="bf16-mixed")
    assert without_gradient == [[], []]
    assert all(torch.isfinite(p).all() for p in fitted.parameters())


def test_resting_networks_take_no_gradient() -> None:
    active, rests = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    rests.bias.requires_grad_(False)
    with resting(rests):
        rests(active(torch.ones(1, 2))).sum().backward()
    assert rests.weight.grad is None
    assert active.weight.grad is not None
    assert rests.weight.requires_grad
    assert not rests.bias.requires_grad  # what was frozen before stays frozen


def test_student_mean_moves_to_the_teachers() -> None:
    """With a Gaussian student N(m, 1) and exact Gaussian scores, the student's mean must converge
    to the teacher's."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.nn.Parameter(torch.full((1, 3, 1, 1), -1.0))
    optimizer = torch.optim.Adam([mean], lr=0.02)

    def denoised(x_t: Tensor, t: Tensor, centre: Tensor) -> Tensor:
        t = flow.per_sample(t, x_t)  # E[x0 | x_t] for x0 ~ N(centre, 1)
        return centre + (1 - t) / ((1 - t) ** 2 + t**2) * (x_t - (1 - t) * centre)

    for _ in range(400):
        student = mean + torch.randn(64, 3, 1, 1, generator=generator)
        t = flow.sample_times(64, generator=generator).clamp(0.02, 0.99)
        x_t = flow.add_noise(student, torch.randn(student.shape, generator=generator), t).detach()
        teacher_x0 = denoised(x_t, t, torch.full_like(mean, 2.0)).detach()
        fake_x0 = denoised(x_t, t, mean).detach()
        optimizer.zero_grad()
        losses.dmd_loss(student, teacher_x0, fake_x0).backward()
        optimizer.step()
    assert (mean - 2).abs().max() < 0.1


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"student_every": 1}, r"student_every: 1 must be at least 2"),
        ({"student_input": "noise"}, r"'noise' is not one of rollout, noised_data\.$"),
        ({"student_steps": "first"}, r"student_steps: 'first' is not one of all, last\.$"),
        ({"student_times": (0.9, 0.9)}, r"student_times: \(0\.9, 0\.9\) must decrease"),
        ({"teacher_dtype": "bf16"}, r"'bf16' is not one of bfloat16, float32\.$"),
        ({"student_times": (0.5, 0.9)}, r"student_times: \(0\.5, 0\.9\) must decrease"),
        ({"time_clamp": (0.9, 0.1)}, r"time_clamp: \(0\.9, 0\.1\) must be two rising times"),
        ({"discriminator_depth": 0}, r"discriminator_depth: 0 must be at least 1\.$"),
        ({"guidance_scale": -2.0}, r"guidance_scale: -2\.0 must be at least 0\.$"),
        ({"betas": (1.5, 0.9)}, r"betas: \(1\.5, 0\.9\) must lie in \[0, 1\)\.$"),
        ({"r1_weight": -1.0}, r"r1_weight: -1\.0 must be at least 0\.$"),
    ],
)
def test_settings_out_of_range_are_one_sentence(changes: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        DMD2("teacher.ckpt", **changes)


def test_a_discriminator_deeper_than_the_picture_is_refused(teacher: Path) -> None:
    module = tiny.module()
    module.image_size = tiny.IMAGE_SIZE  # 4 patches a side, halved to 2, to 1, to none
    assert distillation(teacher, discriminator_depth=2).open_teacher(module)
    with pytest.raises(ValueError, match="depth: 3 halves 4 patches a side to none; use at most 2"):
        distillation(teacher, discriminator_depth=3).open_teacher(module)


def test_every_layer_of_a_discriminator_halves_sides_and_channels() -> None:
    discriminator = Discriminator(64, 2, depth=2)
    (first, *_, last) = [m for m in discriminator.heads[1] if isinstance(m, torch.nn.Conv2d)]
    assert (first.weight.shape, last.weight.shape) == ((32, 64, 4, 4), (1, 16, 1, 1))
    features = [torch.randn(3, 64, 8, 4) for _ in range(2)]
    assert discriminator.heads[0](features[0]).shape == (3, 1, 2, 1)
    assert discriminator(features).shape == (3, 2)


@pytest.mark.parametrize("width", [4, 12, 36, 100, 1536])
def test_channels_of_any_number_are_grouped(width: int) -> None:
    features = [torch.randn(2, width, 8, 8)]
    assert Discriminator(width, 1, depth=2)(features).isfinite().all()
    published = {36: 3, 1536: 32}  # of 18 and 768 channels: the largest divisors within the rule
    if width in published:
        assert Discriminator(width, 1).heads[0][1].num_groups == published[width]


def test_logits_keep_their_precision_under_autocast() -> None:
    discriminator = Discriminator(32, 2)
    features = [torch.randn(3, 32, 8, 8) for _ in range(2)]
    exact = discriminator(features)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(discriminator(features), exact)


def test_a_start_of_its_own_is_refused(teacher: Path, tmp_path: Path) -> None:
    fitted = tiny.module()
    fitted.init_from = str(teacher)
    with pytest.raises(ValueError, match=r"^init_from: .* is not used, since DMD2 starts"):
        tiny.fit(tmp_path, 1, distillation(teacher), fitted=fitted)


def test_resuming_with_another_learning_rate_is_refused(
    run: Path, teacher: Path, tmp_path: Path
) -> None:
    other = distillation(teacher, learning_rate=0.5)
    with pytest.raises(ValueError, match=r"^DMD2 learning_rate: 0\.5, but .* in the run that is"):
        tiny.fit(tmp_path, 7, other, EMA(), resume=run)


def test_resuming_with_other_times_is_refused(run: Path, teacher: Path, tmp_path: Path) -> None:
    other = distillation(teacher, student_times=(0.9, 0.5))
    with pytest.raises(ValueError, match=r"times \(0\.999, .* here \(0\.9, 0\.5\); give it"):
        tiny.fit(tmp_path, 7, other, EMA(), resume=run)


def test_a_second_fit_clips_as_the_first(teacher: Path, tmp_path: Path) -> None:
    fitted, dmd2 = tiny.module(), distillation(teacher)
    trainer = tiny.trainer(tmp_path, 2, dmd2, gradient_clip_val=0.5, accumulate_grad_batches=2)
    for _ in range(2):
        trainer.fit(fitted, tiny.data())
        assert (dmd2.turns._clip, dmd2.turns._accumulate) == (0.5, 2)
    fake_score = fitted.fake_score
    tiny.trainer(tmp_path, 2, dmd2).fit(fitted, tiny.data())
    assert (dmd2.turns._clip, dmd2.turns._accumulate) == (None, 1)
    assert dmd2.num_student_updates == 1
    assert fitted.fake_score is fake_score


def test_a_fit_without_the_callback_is_a_teachers(teacher: Path, tmp_path: Path) -> None:
    fitted, dmd2 = tiny.module(), distillation(teacher)
    tiny.fit(tmp_path, 2, dmd2, fitted=fitted)
    tiny.trainer(tmp_path, 0).test(fitted, tiny.data(), ckpt_path=teacher, verbose=False)
    assert fitted.student_times is None
    tiny.fit(tmp_path, 2, dmd2, fitted=fitted)
    assert fitted.student_times == dmd2.student_times
    fitted.denoiser.adapter.stem.requires_grad_(False)  # as DMD2 freezes the RGB head
    tiny.fit(tmp_path, 2, EMA(), fitted=fitted)
    assert fitted.student_times is None
    learning, new = (
        {name for name, p in network.named_parameters() if p.requires_grad}
        for network in (fitted.denoiser, tiny.module().denoiser)
    )
    assert learning == new
    assert not any(name.startswith("fake_score.") for name in fitted.state_dict())
    assert dmd2.num_student_updates == 1


def test_more_steps_than_the_student_has_are_refused_at_once(teacher: Path) -> None:
    module = tiny.module()  # its evaluation takes 2 steps
    assert distillation(teacher, student_times=(0.9, 0.5)).open_teacher(module)
    with pytest.raises(ValueError, match="steps: 2 must lie between 1 and 1"):
        distillation(teacher, student_times=(0.9,)).open_teacher(module)


def test_grids_show_the_steps_that_the_student_has(teacher: Path, tmp_path: Path) -> None:
    fitted, grids = tiny.module(), DistillationGrids()
    dmd2 = distillation(teacher, student_times=(0.9, 0.5))
    tiny.fit(tmp_path, 1, dmd2, grids, fitted=fitted)
    columns = grids.columns(fitted, torch.zeros(1, 16, 2, 2), None, [0])
    assert list(columns) == ["teacher 25", "teacher 4", "student 2", "student 1"]
    with pytest.raises(ValueError, match="DistillationGrids: this fit has no teacher"):
        tiny.fit(tmp_path, 1, grids)


@pytest.mark.parametrize("learned_null", [True, False])
@torch.no_grad()
def test_the_teacher_is_guided_away_from_no_caption(learned_null: bool, tmp_path: Path) -> None:
    module = tiny.module(text=tiny.Text(), learned_null=learned_null)
    module.teacher, text = module.denoiser, module.text_encoder
    for parameter in module.teacher.parameters():
        parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(2, 3, 64, 64, generator=generator)
    latents, sigma = torch.randn(2, 16, 2, 2, generator=generator), torch.zeros(2)
    t = torch.tensor([0.3, 0.8])
    sample = Sample(x_t, x_t, latents, sigma, text.encode(["a", "b"]), None, None, numbers=[0, 1])
    condition = sample.condition(module.teacher)
    null = None if learned_null else text.encode(["", ""])
    with_text = module.teacher(x_t, t, condition)
    without = module.teacher(x_t, t, module.teacher.condition(latents, sigma, null))
    guided = without + 3 * (with_text - without)
    x0 = distillation(tmp_path)._teacher_x0(module, x_t, t, condition, sample)
    torch.testing.assert_close(x0, flow.x0_from_velocity(x_t, guided, t))
    assert not torch.allclose(x0, flow.x0_from_velocity(x_t, with_text, t), atol=1e-3)


def test_what_passes_gradients_recomputes_where_the_run_does(teacher: Path, tmp_path: Path) -> None:
    training = Training(learning_rate=1e-3, warmup_steps=2, activation_checkpointing=True)
    fitted = tiny.fit(tmp_path, 2, distillation(teacher), fitted=tiny.module(training))
    networks = (fitted.denoiser, fitted.fake_score, fitted.teacher)
    assert all(network.activation_checkpointing for network in networks)


def test_scaled_gradients_are_refused(teacher: Path) -> None:
    trainer = SimpleNamespace(precision="16-mixed")
    with pytest.raises(ValueError, match=r"trainer\.precision: DMD2 clips gradients itself"):
        Turns(2).take_over(trainer)


def test_times_stay_within_the_clamp(teacher: Path) -> None:
    module = tiny.module()
    sample = Sample(torch.zeros(64, 3, 2, 2), *[None] * 6, numbers=list(range(64)))
    free, clamped = (
        distillation(teacher, time_clamp=clamp)._times(module, sample, "student")
        for clamp in ((1e-6, 1.0), (0.4, 0.6))
    )
    assert free.min() < 0.4 < 0.6 < free.max()
    assert torch.equal(clamped, free.clamp(0.4, 0.6))


def attached(dmd2: DMD2) -> tuple[tiny.VAEPiD, Sample]:
    """A module with random networks as `dmd2` attaches them, and a sample."""
    module = tiny.module()
    module.trainer = SimpleNamespace(global_step=0)
    module.fake_score, module.teacher = tiny.module().denoiser, tiny.module().denoiser
    module.discriminator = Discriminator(32, 2)
    for seed, name in enumerate(("denoiser", "fake_score", "teacher", "discriminator")):
        tiny.randomise(getattr(module, name), seed)
    x0 = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(4)) * 2 - 1
    latents = torch.ones(2, 16, 2, 2)
    return module, Sample(x0, x0, latents, torch.zeros(2), None, None, None, [0, 1])


def test_losses_are_the_weighted_sums_of_their_parts(teacher: Path) -> None:
    dmd2 = distillation(teacher, generator_weight=0.3, generator_warmup=4, r1_weight=7.0)
    module, sample = attached(dmd2)
    for num_updates, warm in ((0, 0.25), (2, 0.75), (9, 1.0)):
        dmd2.num_student_updates = num_updates
        loss, parts = dmd2._student_loss(module, sample)
        expected = parts["dmd_loss"] + 0.3 * warm * parts["generator_loss"]
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss, parts = dmd2._critic_loss(module, sample)
    expected = parts["fake_score_loss"] + parts["discriminator_loss"] + 7 * parts["r1_loss"]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert parts["r1_loss"] > 0
    dmd2.r1_noise = 0.0
    assert dmd2._critic_loss(module, sample)[1]["r1_loss"] == 0


def test_the_rollout_is_the_students_own_sampler(teacher: Path) -> None:
    dmd2 = distillation(teacher)
    module, sample = attached(dmd2)
    condition, start = sample.condition(module.denoiser), torch.ones(2, 3, 64, 64)
    x, seed = start, module.training_settings.seed
    with torch.no_grad():
        for i, (now, after) in enumerate(itertools.pairwise(dmd2.student_times)):
            velocity = module.denoiser(x, torch.full((2,), now), condition)
            generators = sample_generators(seed, f"rollout {i}", sample.numbers)
            eps = sampling.draw_noise(x.shape, generators, "cpu")
            x = (1 - after) * (x - now * velocity) + after * eps
    torch.testing.assert_close(dmd2._roll_out(module, sample, condition, start, 3), x)


def test_grids_show_what_their_columns_say(teacher: Path) -> None:
    module, sample = attached(distillation(teacher))
    module.student_times = (0.9, 0.5)
    clean = sample.latents[:1]
    columns = DistillationGrids().columns(module, clean, None, [0])

    def decoded(network: torch.nn.Module, times: tuple[float, ...] | None, steps: int) -> Tensor:
        generators = sample_generators(module.training_settings.seed, "test pixels", [0])
        options = {"student_times": times, "steps": steps, "generator": generators}
        return decode_latents(network, clean, torch.zeros(1), **options)

    assert torch.equal(columns["teacher 4"], decoded(module.teacher, None, 4))
    assert torch.equal(columns["student 1"], decoded(module.denoiser, (0.9, 0.5), 1))


@pytest.mark.parametrize("student_input", ["rollout", "noised_data"])
def test_all_steps_learn_or_the_last(student_input: str, teacher: Path) -> None:
    denoiser, seen = tiny.module().denoiser, []
    denoiser.register_forward_hook(lambda _, inputs, __: seen.append(inputs[1][0].item()))
    keep = torch.ones(1, dtype=torch.bool)
    images, latents = torch.zeros(1, 3, 64, 64), torch.zeros(1, 16, 2, 2)
    sample = Sample(images, images, latents, torch.zeros(1), None, keep, keep, numbers=[0])

    def learning_times(student_steps: str) -> list[float]:
        dmd2 = distillation(teacher, student_input=student_input, student_steps=student_steps)
        learning = []
        for turn in range(30):
            trainer = SimpleNamespace(global_step=turn)
            module = SimpleNamespace(
                denoiser=denoiser, training_settings=Training(), trainer=trainer
            )
            dmd2._student_x0(module, sample)
            learning.append(round(seen[-1], 3))
        return learning

    assert set(learning_times("all")) == set(STUDENT_TIMES)
    assert set(learning_times("last")) == {STUDENT_TIMES[-1]}
