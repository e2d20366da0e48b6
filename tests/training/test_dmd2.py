"""DMD2: what a distillation computes, whose turn a batch is, resumption and refusals."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from decoders import decode_by
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from pid_lightning import DMD2, EMA, AdapterConfig, DistillationGrids, Training
from pid_lightning.checks import Mistake
from pid_lightning.diffusion import flow, losses, sampling
from pid_lightning.diffusion.randomness import sample_generators
from pid_lightning.diffusion.sampling import STUDENT_TIMES
from pid_lightning.files import models as weights
from pid_lightning.nn import Discriminator
from pid_lightning.training.callbacks.turns import resting
from pid_lightning.training.distillation import Distillation
from pid_lightning.training.sample import Sample
from pid_lightning.training.settings import DistillationSettings
from pid_lightning.training.strategies import check_alternates

NETWORKS = ("denoiser", "denoiser_ema", "fake_score", "discriminator", "teacher")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of a short training run."""
    folder = tmp_path_factory.mktemp("teacher")
    tiny.fit(folder, 2)
    return folder / "last.ckpt"


def callback(teacher: Path | str, **changes: Any) -> DMD2:
    settings = {"student_every": 3, "taps": (0, 1), "learning_rate": 1e-3}
    return DMD2(str(teacher), **(settings | changes))


class Watch(tiny.pl.Callback):
    """Records which networks each batch updates, and what is counted and logged."""

    def __init__(self) -> None:
        self.moved: list[set[str]] = []
        self.steps: list[tuple[int, int]] = []
        self.logged: set[str] = set()

    def _state(self, module: tiny.VAEPiD) -> dict[str, Tensor]:
        found = {}
        for name in NETWORKS:
            beside = module if name.startswith("denoiser") else module.distillation
            weights = getattr(beside, name).parameters()
            found[name] = torch.cat([p.detach().flatten().float() for p in weights])
        return found

    def on_train_batch_start(self, trainer, pl_module, *_) -> None:
        self.before = self._state(pl_module)

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        after = self._state(pl_module)
        self.moved.append({k for k in after if not torch.equal(after[k], self.before[k])})
        self.steps.append((trainer.global_step, pl_module.num_denoiser_updates))
        self.logged |= trainer.callback_metrics.keys()
        assert all(p.grad is None for p in pl_module.parameters())  # no leftover gradients


class Rates(tiny.pl.loggers.CSVLogger):
    """Records the learning rates that are logged."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if "lr-AdamW" in metrics:
            self.rates = {**getattr(self, "rates", {}), step: metrics["lr-AdamW"]}


@pytest.fixture(scope="module")
def run(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Six uninterrupted steps of distillation, watched."""
    folder = tmp_path_factory.mktemp("student")
    watch, logger, dmd2 = Watch(), Rates(folder), callback(teacher)
    monitor = tiny.pl.callbacks.LearningRateMonitor()
    callbacks, logs = (dmd2, EMA(), watch, monitor), {"logger": logger, "log_every_n_steps": 1}
    fitted = tiny.fit(folder, 6, *callbacks, **logs)
    path = folder / "last.ckpt"
    return SimpleNamespace(path=path, watch=watch, rates=logger.rates, fitted=fitted, dmd2=dmd2)


def test_one_batch_is_one_step_of_one_side(run: SimpleNamespace, teacher: Path) -> None:
    critics, student = {"fake_score", "discriminator"}, {"denoiser", "denoiser_ema"}
    assert run.watch.moved == [critics, critics, student] * 2
    assert run.watch.steps == [(1, 0), (2, 0), (3, 1), (4, 1), (5, 1), (6, 2)]
    source, _ = weights.load_model(teacher)
    tiny.assert_equal_states(
        run.fitted.distillation.teacher.float().state_dict(),
        source.bfloat16().float().state_dict(),
    )
    assert run.fitted.student_times == run.dmd2.settings.student_times == STUDENT_TIMES
    parts = "dmd_loss generator_loss dmd_gradient_norm fake_score_loss discriminator_loss r1_loss"
    parts += " real_logit fake_logit gradient_norm critics_gradient_norm time_share/teacher"
    assert {f"train/{part}" for part in parts.split()} <= run.watch.logged


def test_the_students_learning_rate_is_logged_at_its_steps(run: SimpleNamespace) -> None:
    # Two steps of warm-up, one every third batch.
    assert run.rates == dict(enumerate([5e-4] * 3 + [1e-3] * 3))


def test_a_checkpoint_holds_what_learns(run: SimpleNamespace) -> None:
    saved = torch.load(run.path, weights_only=True)
    names = [name.split(".") for name in saved["state_dict"]]
    assert {first for first, *_ in names} == {"denoiser", "denoiser_ema", "distillation"}
    beside = {second for first, second, *_ in names if first == "distillation"}
    assert beside == {"fake_score", "discriminator"}
    assert len(saved["optimizer_states"]) == 2
    assert weights.load_model(run.path)[1].student_times == STUDENT_TIMES


@pytest.fixture(scope="module")
def half(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint after three of the six steps."""
    folder = tmp_path_factory.mktemp("half")
    tiny.fit(folder, 3, callback(teacher), EMA())
    return folder / "last.ckpt"


@pytest.mark.parametrize("is_old", [False, True])
def test_three_and_three_steps_are_six(
    is_old: bool, run: SimpleNamespace, half: Path, teacher: Path, tmp_path: Path
) -> None:
    """Also from a checkpoint of version 0.1.0, where the critics stood beside the denoiser."""
    if is_old:
        saved = torch.load(half, weights_only=True)
        state = saved["state_dict"]
        saved["state_dict"] = {k.removeprefix("distillation."): v for k, v in state.items()}
        assert saved["state_dict"].keys() != state.keys()
        half = tmp_path / "old.ckpt"
        torch.save(saved, half)
    tiny.fit(tmp_path, 6, callback(teacher), EMA(), resume=half)
    once, twice = (torch.load(p, weights_only=True) for p in (run.path, tmp_path / "last.ckpt"))
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "pid", "global_step"):
        tiny.assert_equal_states(once[part], twice[part], part)


@pytest.mark.parametrize("with_callback", [True, False])
def test_a_student_is_tested_with_its_own_steps(
    with_callback: bool, run: SimpleNamespace, teacher: Path, tmp_path: Path
) -> None:
    fitted = tiny.module()
    callbacks = (callback(teacher), EMA()) if with_callback else ()
    trainer = tiny.trainer(tmp_path, 1, *callbacks, limit_test_batches=1)
    trainer.test(fitted, tiny.data(), ckpt_path=run.path, verbose=False)
    assert fitted.student_times == STUDENT_TIMES
    source, _ = weights.load_model(run.path)
    tiny.assert_equal_states(fitted.averaged_denoiser.state_dict(), source.state_dict())
    assert fitted.distillation is None


def test_two_accumulated_batches_are_one_of_twice_the_size(teacher: Path, tmp_path: Path) -> None:
    def grown(batch_size: int, accumulate: int) -> dict[str, Tensor]:
        # Every loss is a mean over samples, so the gradients of halves add up.
        fitted = tiny.fit(
            tmp_path / str(batch_size),
            2,
            callback(teacher, student_every=2),
            batch_size=batch_size,
            accumulate_grad_batches=accumulate,
        )
        assert fitted.trainer.global_step == 2
        return fitted.state_dict()

    whole, halves = grown(4, 1), grown(2, 2)
    for name, value in whole.items():
        torch.testing.assert_close(halves[name], value, rtol=2e-3, atol=2e-4, msg=name)


def test_fits_of_one_module_clip_and_count_as_they_are_told(teacher: Path, tmp_path: Path) -> None:
    norms = []

    class Norms(tiny.pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
            grads = [p.grad for g in optimizer.param_groups for p in g["params"]]
            norms.append(torch.nn.utils.get_total_norm([g for g in grads if g is not None]).item())

    fitted, dmd2 = tiny.module(), callback(teacher, student_every=2)
    trainer = tiny.trainer(tmp_path, 2, dmd2, Norms(), gradient_clip_val=1e-3)
    for _ in range(2):
        trainer.fit(fitted, tiny.data())
        trainer.fit_loop.epoch_loop.max_steps = 4
    assert len(norms) == 4
    assert max(norms) <= 1e-3 * 1.01
    assert dmd2.turns.num_student_updates == 2
    fake_score = fitted.distillation.fake_score
    tiny.trainer(tmp_path, 2, dmd2, Norms()).fit(fitted, tiny.data())
    assert min(norms[4:]) > 1e-3
    assert dmd2.turns.num_student_updates == 1
    assert fitted.distillation.fake_score is fake_score
    # And without the callback it learns as a teacher again.
    tiny.fit(tmp_path, 1, EMA(), fitted=fitted)
    assert fitted.student_times is fitted.distillation is None
    learning, new = (
        {name for name, p in network.named_parameters() if p.requires_grad}
        for network in (fitted.denoiser, tiny.module().denoiser)
    )
    assert learning == new
    assert not any(name.startswith("distillation.") for name in fitted.state_dict())


# What a distillation computes, without a trainer.


def distillation(**changes: Any) -> tuple[Distillation, torch.nn.Module, Sample]:
    """A distillation of random networks, its student and a sample."""
    settings = DistillationSettings(**({"taps": (0, 1)} | changes))
    student, fake_score, teacher = (tiny.module().denoiser for _ in range(3))
    made = Distillation(settings, teacher, fake_score, Discriminator(32, len(settings.taps)))
    for seed, network in enumerate((student, fake_score, teacher, made.discriminator)):
        tiny.randomise(network, seed)
    x0 = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(4)) * 2 - 1
    latents = torch.ones(2, 128, 1, 1)
    return made, student, Sample(x0, x0, latents, torch.zeros(2), None, None, None, [0, 1])


def test_losses_are_the_weighted_sums_of_their_parts() -> None:
    weights = {"generator_weight": 0.3, "generator_warmup": 4, "r1_weight": 7.0}
    made, student, sample = distillation(**weights)
    for num_updates, warm in ((0, 0.25), (2, 0.75), (9, 1.0)):
        loss, parts = made.student_loss(student, sample, 0, num_updates)
        expected = parts["dmd_loss"] + 0.3 * warm * parts["generator_loss"]
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss, parts = made.critic_loss(student, sample, 0)
    expected = parts["fake_score_loss"] + parts["discriminator_loss"] + 7 * parts["r1_loss"]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert parts["r1_loss"] > 0
    still, *_ = distillation(r1_noise=0.0)
    assert still.critic_loss(student, sample, 0)[1]["r1_loss"] == 0


@pytest.mark.parametrize("student_input", ["rollout", "noised_data"])
def test_all_of_the_student_learns_in_mixed_bf16(student_input: str) -> None:
    """Also after a rollout without gradient in the same autocast; the critics do not."""
    made, student, sample = distillation(student_steps="last", student_input=student_input)
    with resting(made), torch.autocast("cpu", torch.bfloat16):
        made.student_loss(student, sample, 0, 0)[0].backward()
    learning = [p for p in student.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in learning)
    assert all(p.grad is None for p in made.parameters())
    with resting(student), torch.autocast("cpu", torch.bfloat16):
        made.critic_loss(student, sample, 0)[0].backward()
    critics = [*made.fake_score.parameters(), *made.discriminator.parameters()]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in critics if p.requires_grad)


def test_resting_networks_take_no_gradient() -> None:
    active, rests = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    rests.bias.requires_grad_(False)
    with resting(rests):
        rests(active(torch.ones(1, 2))).sum().backward()
    assert rests.weight.grad is None
    assert active.weight.grad is not None
    assert rests.weight.requires_grad
    assert not rests.bias.requires_grad  # what was frozen before stays frozen


def test_all_begin_as_the_teacher() -> None:
    source = tiny.randomise(tiny.module().denoiser)
    student = tiny.module(Training(activation_checkpointing=True)).denoiser
    begun, again = (
        Distillation.begin(DistillationSettings(taps=(0,)), copy.deepcopy(source), student, seed=3)
        for _ in range(2)
    )
    tiny.assert_equal_states(student.state_dict(), source.state_dict())
    tiny.assert_equal_states(begun.fake_score.state_dict(), source.state_dict())
    assert begun.teacher.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in begun.teacher.parameters())
    # Those that pass gradients on recompute where the student does.
    networks = (student, begun.fake_score, begun.teacher)
    assert all(network.activation_checkpointing for network in networks)
    tiny.assert_equal_states(begun.discriminator.state_dict(), again.discriminator.state_dict())


def test_critics_learn_as_configured() -> None:
    settings = {"learning_rate": 2e-5, "betas": (0.3, 0.8), "fake_score_weight_decay": 0.02}
    made, *_ = distillation(**settings)
    groups = made.make_critics_optimizer().param_groups
    told = [(g["lr"], g["betas"], g["weight_decay"]) for g in groups]
    assert told == [(2e-5, (0.3, 0.8), 0.02), (2e-5, (0.3, 0.8), 0.0)]
    ids = [{id(p) for p in group["params"]} for group in groups]
    critics = (made.fake_score, made.discriminator)
    assert ids == [{id(p) for p in network.parameters() if p.requires_grad} for network in critics]


@pytest.mark.parametrize("learned_null", [True, False])
@torch.no_grad()
def test_the_teacher_is_guided_away_from_no_caption(learned_null: bool) -> None:
    module = tiny.module(text=tiny.Text(), learned_null=learned_null)
    network, text = tiny.randomise(module.denoiser, std=0.2), module.text_encoder
    made = Distillation(DistillationSettings(), network, None, None, null_text=module.null_text(1))
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(2, 3, 64, 64, generator=generator)
    latents, sigma = torch.randn(2, 128, 1, 1, generator=generator), torch.zeros(2)
    t = torch.tensor([0.3, 0.8])
    condition = network.condition(latents, sigma, text.encode(["a", "b"]))
    null = None if learned_null else text.encode(["", ""])
    with_text = network(x_t, t, condition)
    without = network(x_t, t, network.condition(latents, sigma, null))
    guided = without + 3 * (with_text - without)
    for is_guided, velocity in ((True, guided), (False, with_text)):
        x0 = made._teacher_x0(x_t, t, condition, is_guided)
        torch.testing.assert_close(x0, flow.x0_from_velocity(x_t, velocity, t))
    assert not torch.allclose(guided, with_text, atol=1e-3)


def test_times_stay_within_the_clamp() -> None:
    sample = Sample(torch.zeros(64, 3, 2, 2), *[None] * 6, numbers=list(range(64)))
    free, clamped = (
        distillation(time_clamp=clamp)[0]._times(sample, "student")
        for clamp in ((1e-6, 1.0), (0.4, 0.6))
    )
    assert free.min() < 0.4 < 0.6 < free.max()
    assert torch.equal(clamped, free.clamp(0.4, 0.6))


def test_the_rollout_is_the_students_own_sampler() -> None:
    made, student, sample = distillation()
    condition, start = sample.condition(student), torch.ones(2, 3, 64, 64)
    x = start
    with torch.no_grad():
        for i, (now, after) in enumerate(itertools.pairwise(STUDENT_TIMES)):
            velocity = student(x, torch.full((2,), now), condition)
            generators = sample_generators(made.seed, f"rollout {i}", sample.numbers)
            eps = sampling.draw_noise(x.shape, generators, "cpu")
            x = (1 - after) * (x - now * velocity) + after * eps
    torch.testing.assert_close(made._roll_out(student, sample, condition, start, 3), x)


@pytest.mark.parametrize("student_input", ["rollout", "noised_data"])
def test_all_steps_learn_or_the_last(student_input: str) -> None:
    seen = []

    class Student:
        def condition(self, *_: object, **__: object) -> None: ...

        def __call__(self, x_t: Tensor, t: Tensor, condition: None) -> Tensor:
            seen.append(round(t[0].item(), 3))
            return x_t

    sample = Sample(torch.zeros(1, 3, 4, 4), *[None] * 6, numbers=[0])

    def learning_times(student_steps: str) -> list[float]:
        made, *_ = distillation(student_input=student_input, student_steps=student_steps)
        return [(made._student_x0(Student(), sample, turn), seen[-1])[1] for turn in range(30)]

    assert set(learning_times("all")) == set(STUDENT_TIMES)
    assert set(learning_times("last")) == {STUDENT_TIMES[-1]}


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


# The discriminator.


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


# Grids.


def test_grids_show_what_their_columns_say() -> None:
    module = tiny.module()
    made, student, sample = distillation()
    module.denoiser.load_state_dict(student.state_dict())
    module.distillation, module.student_times = made, (0.9, 0.5)
    clean = sample.latents[:1]
    columns = DistillationGrids().columns(module, clean, None, [0])
    assert list(columns) == ["teacher 25", "teacher 4", "student 2", "student 1"]

    def decoded(network: torch.nn.Module, times: tuple[float, ...] | None, steps: int) -> Tensor:
        generators = sample_generators(module.training_settings.seed, "test pixels", [0])
        options = {"student_times": times, "steps": steps, "generator": generators}
        return decode_by(network, clean, torch.zeros(1), **options)

    assert torch.equal(columns["teacher 4"], decoded(made.teacher, None, 4))
    assert torch.equal(columns["student 1"], decoded(module.denoiser, (0.9, 0.5), 1))


# Refusals.


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("student_every", 1),
        ("student_input", "noise"),
        ("student_steps", "first"),
        ("student_times", (0.9, 0.9)),
        ("student_times", (0.5, 0.9)),
        ("student_times", ()),
        ("teacher_dtype", "bf16"),
        ("time_clamp", (0.9, 0.1)),
        ("discriminator_depth", 0),
        ("guidance_scale", -2.0),
        ("betas", (1.5, 0.9)),
        ("r1_weight", -1.0),
    ],
)
def test_settings_out_of_range_are_refused(name: str, value: object) -> None:
    with pytest.raises(Mistake) as told:
        DMD2("teacher.ckpt", **{name: value})
    assert told.value.option == f"DMD2 {name}"


def set_(module: tiny.VAEPiD, **values: object) -> tiny.VAEPiD:
    vars(module).update(values)
    return module


@pytest.mark.parametrize(
    ("option", "changes", "module"),
    [
        ("DMD2 teacher", {}, lambda: tiny.module(width=64)),
        ("DMD2 taps", {"taps": (0, 2)}, tiny.module),
        ("steps", {"student_times": (0.9,)}, tiny.module),  # its evaluation takes 2
        (  # 4 patches a side, halved to 2, to 1, to none
            "DMD2 discriminator_depth",
            {"discriminator_depth": 3},
            lambda: set_(tiny.module(), image_size=64),
        ),
        ("model.init_from", {}, lambda: set_(tiny.module(), init_from="another.safetensors")),
        (
            "model.training.train",
            {},
            lambda: tiny.module(
                Training(train="rgb_head"),
                adapter=AdapterConfig(width=16, num_res_blocks=1, rgb_head=True),
            ),
        ),
    ],
)
def test_what_does_not_fit_the_teacher_is_refused(
    option: str, changes: dict, module: Callable[[], tiny.VAEPiD], teacher: Path
) -> None:
    assert callback(teacher, discriminator_depth=2).open_teacher(set_(tiny.module(), image_size=64))
    with pytest.raises(ValueError, match=f"^{option}: "):
        callback(teacher, **changes).open_teacher(module())


def test_a_student_or_nothing_is_no_teacher(run: SimpleNamespace, tmp_path: Path) -> None:
    for path in (run.path, tmp_path / "none.ckpt"):
        with pytest.raises(Mistake) as told:
            callback(path).open_teacher(tiny.module())
        assert told.value.option == "DMD2 teacher"


@pytest.mark.parametrize(
    ("option", "changes"),
    [
        ("ckpt_path", None),  # without the callback
        ("ckpt_path", {"student_times": (0.9, 0.5)}),
        ("DMD2 learning_rate", {"learning_rate": 0.5}),
    ],
)
def test_a_run_is_not_resumed_as_another(
    option: str, changes: dict | None, half: Path, teacher: Path, tmp_path: Path
) -> None:
    callbacks = [EMA()] if changes is None else [callback(teacher, **changes), EMA()]
    with pytest.raises(Mistake) as told:
        tiny.fit(tmp_path, 7, *callbacks, resume=half)
    assert told.value.option == option


def test_a_plain_run_is_not_resumed_as_a_distillation(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(Mistake) as told:
        tiny.fit(tmp_path, 7, callback(teacher), EMA(), resume=teacher)
    assert told.value.option == "ckpt_path"


def test_a_run_is_not_resumed_with_another_teacher(run: SimpleNamespace) -> None:
    saved = run.dmd2.state_dict()
    run.dmd2.load_state_dict(saved)
    with pytest.raises(Mistake) as told:
        run.dmd2.load_state_dict(saved | {"teacher": "0123456789abcdef"})
    assert told.value.option == "DMD2 teacher"


def test_what_cannot_alternate_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Mistake) as told:
        check_alternates(SimpleNamespace(precision="16-mixed"))
    assert told.value.option == "trainer.precision"
    finds = DDPStrategy(find_unused_parameters=True)
    check_alternates(SimpleNamespace(precision="32-true", strategy=finds))
    with pytest.raises(Mistake) as told:
        check_alternates(SimpleNamespace(precision="32-true", strategy=DDPStrategy()))
    assert told.value.option == "trainer.strategy"
    with pytest.raises(Mistake) as told:
        tiny.fit(tmp_path, 1, DistillationGrids())
    assert told.value.option == "trainer.callbacks"
