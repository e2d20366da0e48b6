"""Training: exact resumption, averages, what checkpoints hold and bring, and refusals."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor

from pid_lightning import (
    DMD2,
    EMA,
    AdapterConfig,
    Evaluation,
    LanguageModelText,
    PictureGrids,
    Training,
    VAEPiD,
)
from pid_lightning.diffusion import flow, noising, sampling
from pid_lightning.encoders.text import NoText
from pid_lightning.encoders.text_cache import CachedText
from pid_lightning.files import models as weights
from pid_lightning.training import checkpoints
from pid_lightning.training.checkpoints import check_resumes, read_run, read_start
from pid_lightning.training.sample import Sample, draw_sample
from pid_lightning.training.strategies import check_strategy

HEAD = AdapterConfig(width=16, num_res_blocks=1, rgb_head=True)


def draw(module: VAEPiD, batch: dict[str, Any]) -> Sample:
    networks = (module.encoder, module.text_encoder, module.denoiser)
    return draw_sample(batch, "train", *networks, module.training_settings)


def test_(folder: Path, module: VAEPiD, *callbacks: tiny.pl.Callback, **options: Any) -> None:
    """Test on one batch."""
    trainer = tiny.trainer(folder, 0, *callbacks, limit_test_batches=1)
    trainer.test(module, tiny.data(), verbose=False, **options)


test_.__test__ = False


def refused(option: str) -> Any:
    return pytest.raises(ValueError, match=rf"^{re.escape(option)}: ")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of 4 uninterrupted steps."""
    folder = tmp_path_factory.mktemp("run")
    tiny.fit(folder, 4)
    return folder / "last.ckpt"


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def test_two_and_two_steps_are_four(run: Path, tmp_path: Path) -> None:
    tiny.fit(tmp_path / "half", 2)
    tiny.fit(tmp_path, 4, resume=tmp_path / "half" / "last.ckpt")
    once, twice = load(run), load(tmp_path / "last.ckpt")
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "pid", "global_step"):
        tiny.assert_equal_states(once[part], twice[part], part)
    assert any(name.startswith("denoiser_ema.") for name in once["state_dict"])


def test_a_checkpoint_holds_no_frozen_network(run: Path) -> None:
    state = load(run)["state_dict"]
    assert {name.split(".")[0] for name in state} == {"denoiser", "denoiser_ema"}
    assert all(v.dtype == torch.float32 for k, v in state.items() if k.startswith("denoiser_ema"))


@pytest.mark.parametrize(
    ("student_every", "changes", "num_updates"),
    [(None, {}, 4), (None, {"accumulate_grad_batches": 2}, 4), (2, {}, 2)],
)
def test_average_follows_the_power_profile(
    student_every: int | None, changes: dict, num_updates: int, run: Path, tmp_path: Path
) -> None:
    """Over the denoiser's own updates, whatever else a batch trains."""

    class Record(tiny.pl.Callback):
        def __init__(self) -> None:
            self.seen = []

        def on_train_batch_end(self, trainer, pl_module, *_) -> None:
            if pl_module.num_denoiser_updates > len(self.seen):
                self.seen.append(pl_module.denoiser.out.weight.detach().clone())

    record, power = Record(), 3.0
    callbacks, start = [EMA(power), record], tiny.module().denoiser
    if student_every is not None:
        dmd2 = DMD2(str(run), student_every=student_every, taps=(0,), learning_rate=1e-3)
        callbacks, (start, _) = [dmd2, *callbacks], weights.load_model(run)
    fitted = tiny.fit(tmp_path, 4, *callbacks, **changes)
    assert len(record.seen) == num_updates
    expected = start.out.weight.detach()
    for n, seen in enumerate(record.seen, start=1):
        keep = (1 - 1 / n) ** (power + 1)
        expected = keep * expected + (1 - keep) * seen
    torch.testing.assert_close(fitted.denoiser_ema.out.weight, expected, rtol=1e-6, atol=1e-8)
    assert fitted.averaged_denoiser is fitted.denoiser_ema


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_a_run_in_another_precision_resumes_exactly(precision: str, tmp_path: Path) -> None:
    """Which Lightning sets after it restores weights: neither they nor the average pass through
    fp32 or bf16, and the average stays in fp32 at least."""
    last = tmp_path / "half" / "last.ckpt"
    for folder, steps, resume in (("whole", 2, None), ("half", 1, None), ("parts", 2, last)):
        fitted = tiny.fit(tmp_path / folder, steps, precision=precision, resume=resume)
    states = [load(tmp_path / folder / "last.ckpt")["state_dict"] for folder in ("whole", "parts")]
    tiny.assert_equal_states(*states)
    if precision == "bf16-true":
        assert fitted.denoiser.dtype == torch.bfloat16
        assert fitted.denoiser_ema.dtype == torch.float32


def test_mixed_precision_keeps_the_encoder_in_bf16(tmp_path: Path) -> None:
    exact = tiny.module()
    exact.encoder.load()
    fitted = tiny.fit(
        tmp_path, 1, precision="bf16-mixed", limit_val_batches=1, val_check_interval=1
    )
    assert torch.isfinite(fitted.trainer.callback_metrics["validate/loss"])
    assert {p.dtype for p in fitted.encoder.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in fitted.denoiser.parameters()} == {torch.float32}
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    ours, theirs = fitted.encoder.encode(images), exact.encoder.encode(images)
    assert ours.dtype == torch.float32
    assert (ours - theirs).std() < 0.02 * theirs.std()


def test_draws_are_in_fp32_whatever_the_default() -> None:
    """As in bf16-true, where Lightning changes the default: a bf16 time near 1 has 8 bits."""

    def drawn() -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        return [
            flow.sample_times(3, generator=generator),
            noising.sample_latent_sigma(3, generator=generator),
            sampling.draw_noise((1, 3, 2, 2), generator, "cpu"),
        ]

    usual = drawn()
    torch.set_default_dtype(torch.bfloat16)
    try:
        other = drawn()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, other, usual))


# What learns.


def test_a_null_that_no_sample_reads_is_frozen() -> None:
    """Or DDP would wait for its gradient."""
    text = CachedText("cache", text_width=8)
    for dropout, learns in ((0.0, False), (0.1, True)):
        fitted = tiny.module(Training(caption_dropout=dropout), text)
        assert fitted.denoiser.text_embedding.null.requires_grad == learns
    silent = tiny.module(Training(caption_dropout=0.0), text_width=8, text_length=3)
    assert silent.denoiser.text_embedding.null.requires_grad


def moved_in_a_fit(folder: Path, fitted: VAEPiD) -> set[str]:
    """The names of the denoiser's weights that two steps move."""
    before = {name: p.detach().clone() for name, p in fitted.denoiser.named_parameters()}
    tiny.fit(folder, 2, fitted=fitted)
    after = dict(fitted.denoiser.named_parameters())
    return {name for name in after if not torch.equal(after[name], before[name])}


def test_only_adapter_and_gates_move(tmp_path: Path) -> None:
    fitted = tiny.module(Training(train="adapter", learning_rate=1e-2, warmup_steps=1))
    tiny.randomise(fitted.denoiser)  # a zero output would pass no gradient
    moved = moved_in_a_fit(tmp_path, fitted)
    assert {name.split(".")[0] for name in moved} == {"adapter", "gates"}
    learning = {n for n, p in fitted.denoiser.named_parameters() if p.requires_grad}
    assert moved <= learning
    assert {name.split(".")[0] for name in learning} == {"adapter", "gates"}


def test_rgb_head_stage_moves_what_the_rgb_head_reads_alone(tmp_path: Path) -> None:
    adapter = dataclasses.replace(HEAD, num_res_blocks=2, rgb_head_block=1, head_norm=True)
    training = Training(train="rgb_head", learning_rate=1e-2, warmup_steps=1)
    fitted = tiny.module(training, adapter=adapter)
    moved = moved_in_a_fit(tmp_path, fitted)
    unread = ("adapter.heads.", "adapter.head_norm.", "adapter.res_blocks.1.")
    parameters = dict(fitted.denoiser.named_parameters())
    own = {n for n in parameters if n.startswith("adapter.") and not n.startswith(unread)}
    assert moved == own
    # DDP waits for the gradient of everything that requires one.
    assert moved == {n for n, p in parameters.items() if p.requires_grad}


def test_rgb_head_learns_the_low_resolution_image() -> None:
    fitted = tiny.module(Training(train="rgb_head"), adapter=HEAD)
    fitted.encoder.load()
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    sample = draw(fitted, {"image": images, "caption": ["", ""], "number": torch.arange(2)})
    learning = [p for p in fitted.denoiser.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.Adam(learning, 1e-2), []
    for _ in range(20):
        loss, _ = fitted.objective.losses(sample, "train")
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


def test_published_weights_can_be_trained_with_captions_only(tmp_path: Path) -> None:
    training = Training(learning_rate=1e-3, warmup_steps=1, train="adapter", caption_dropout=0.5)
    fitted = tiny.module(training, tiny.Text(), learned_null=False)
    tiny.randomise(fitted.denoiser)
    moved = moved_in_a_fit(tmp_path, fitted)
    assert {name.split(".")[0] for name in moved} == {"adapter", "gates"}
    for text in (None, NoText()):
        with refused("text"):
            tiny.module(text=text, text_length=3, learned_null=False)
    assert tiny.module(text=NoText(), text_length=3).text_encoder.encode(["a fox"]) is None


def test_clipping_by_value_bounds_every_gradient(tmp_path: Path) -> None:
    class Watch(tiny.pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_) -> None:
            gradients = [p.grad for p in pl_module.denoiser.parameters() if p.grad is not None]
            self.largest = max(gradient.abs().max().item() for gradient in gradients)

    watch = Watch()
    changes = {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"}
    tiny.fit(tmp_path, 1, watch, precision="bf16-mixed", **changes)  # a fused optimiser
    assert watch.largest == pytest.approx(1e-3)


# Samples.


class Encoder:
    """Encodes pictures and captions to nothing."""

    def encode(self, inputs: Tensor | list[str]) -> Tensor:
        num = len(inputs)
        return torch.zeros(num, 3, 6) if isinstance(inputs, list) else torch.zeros(num, 1, 1, 1)


def test_dropouts_and_noise_have_their_shares() -> None:
    settings = Training(latent_dropout=0.25, caption_dropout=0.5)
    denoiser = tiny.module(settings, tiny.Text()).denoiser
    image = torch.zeros(1, 3, 8, 8).expand(2000, -1, -1, -1)
    batch = {"image": image, "caption": [""] * 2000, "number": torch.arange(2000)}
    sample = draw_sample(batch, "train", Encoder(), Encoder(), denoiser, settings)
    share = lambda mask: mask.float().mean().item()  # noqa: E731
    assert abs(share(sample.keep_latents) - 0.75) < 0.03
    assert abs(share(sample.keep_text) - 0.5) < 0.03
    assert abs(share(sample.latent_sigma == 0) - 0.25) < 0.03
    assert sample.latent_sigma.max() <= 0.8
    # Zero latents become pure noise, of the level given to the gate.
    noisy = sample.latent_sigma > 0
    spread = (sample.latents.flatten()[noisy] / sample.latent_sigma[noisy]).std()
    assert abs(spread - 1) < 0.06


def test_without_a_learned_null_a_dropped_caption_is_an_empty_one() -> None:
    captions = [f"photograph {i}" for i in range(12)]
    images = torch.zeros(12, 3, 64, 64)
    batch = {"image": images, "caption": captions, "number": torch.arange(12)}
    samples, captions_seen = [], []
    for learned_null in (True, False):
        training = Training(caption_dropout=0.5)
        fitted = tiny.module(training, tiny.Text(), learned_null=learned_null)
        fitted.encoder.load()
        samples.append(draw(fitted, batch))
        captions_seen.append([*fitted.text_encoder.asked])
        assert (fitted.null_text(2) is None) == learned_null
    kept = samples[0].keep_text
    assert 0 < kept.sum() < 12
    assert captions_seen[0] == captions
    assert captions_seen[1] == [c if keep else "" for c, keep in zip(captions, kept, strict=True)]
    assert samples[1].keep_text is None
    samples[1].condition(fitted.denoiser)  # does not ask for the null


def test_a_sample_depends_on_its_number_alone() -> None:
    fitted = tiny.module()
    fitted.encoder.load()
    images = torch.rand(4, 3, 64, 64) * 2 - 1
    batch = {"image": images, "caption": [""] * 4, "number": torch.tensor([3, 1, 4, 15])}
    alone = {"image": images[2:3], "caption": [""], "number": torch.tensor([4])}
    together, single = draw(fitted, batch), draw(fitted, alone)
    assert torch.equal(together.latent_sigma[2:3], single.latent_sigma)
    torch.testing.assert_close(together.latents[2:3], single.latents)


def test_captions_shorter_than_the_learned_null_need_to_be_without_dropout() -> None:
    image, number = torch.zeros(2, 3, 64, 64), torch.arange(2)
    batch = {"image": image, "caption": ["a", "b"], "number": number}
    for dropout in (0.0, 0.5):
        fitted = tiny.module(Training(caption_dropout=dropout), tiny.Text(), text_length=8)
        fitted.encoder.load()
        sample = draw(fitted, batch)
        if dropout == 0:
            assert sample.condition(fitted.denoiser).text.shape[1] == 3
        else:
            with refused("text"):
                sample.condition(fitted.denoiser)
    with refused("text"):
        tiny.module(text=LanguageModelText("none", length=5, text_width=6), text_length=8)


def test_gates_of_a_compiled_network_are_seen() -> None:
    fitted = tiny.module()
    fitted.encoder.load()
    x0 = torch.zeros(1, 3, 64, 64)
    clean, _ = fitted.encode(torch.zeros(1, 3, 16, 16), [""])
    seen = []
    for compiles in (False, True):
        if compiles:
            fitted.denoiser.compile(backend="eager", fullgraph=True, dynamic=False)
            fitted.denoiser(x0, torch.zeros(1), fitted.denoiser.condition(clean, torch.zeros(1)))
        seen.append(PictureGrids().scalars(fitted, x0, clean, None, [0]))
    assert len(seen[0]) == 3 * len(fitted.denoiser.gates)
    assert seen[1] == pytest.approx(seen[0])


# What another model brings.


def test_a_start_at_another_scale_takes_the_backbone(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(checkpoints, "rank_zero_info", said.append)
    ours = VAEPiD(scale=2, denoiser=tiny.config())
    source, names = weights.load_model(run)[0].state_dict(), ours.denoiser.state_dict().keys()
    found = read_start(str(run), ours.info, ours.denoiser, fits=True)
    kept = {name for name in names if name.startswith(("adapter.", "gates."))}
    tiny.assert_equal_states(found.state, {k: v for k, v in source.items() if k not in kept})
    (sentence,) = said
    assert f"loaded {len(names) - len(kept)} tensors (backbone), {len(kept)} tensors" in sentence
    with refused("model.init_from"):  # nothing would train the rest
        read_start(str(run), ours.info, ours.denoiser, fits=False)


@pytest.mark.parametrize(
    ("theirs", "told"),
    [
        ({"prediction": "x0"}, "another prediction: x0, here velocity"),
        ({"noise_frame": "variance_preserving"}, "noise_frame: variance_preserving, here flow"),
        (
            {"adapter": AdapterConfig(16, 1, padding="replicate")},
            "adapter.padding: replicate, here zeros",
        ),
    ],
)
def test_what_shapes_do_not_show_is_told(
    theirs: dict[str, Any], told: str, run: Path, tmp_path: Path
) -> None:
    denoiser, info = weights.load_model(run)
    if "noise_frame" in theirs:
        other = dataclasses.replace(info, **theirs)
    else:
        other = dataclasses.replace(info, config=dataclasses.replace(info.config, **theirs))
    path = tmp_path / "other.safetensors"
    weights.save_model(denoiser, other, path, torch.float32)
    ours = tiny.module()
    with pytest.warns(UserWarning, match=re.escape(told)):
        read_start(str(path), ours.info, ours.denoiser, fits=True)


@pytest.fixture(scope="module")
def student(run: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The network of `run`, as a file that calls it a student."""
    denoiser, info = weights.load_model(run)
    info = dataclasses.replace(info, student_times=(0.9, 0.5))
    path = tmp_path_factory.mktemp("student") / "student.safetensors"
    weights.save_model(denoiser, info, path, torch.float32)
    return str(path)


def test_a_student_given_as_init_from_is_judged_with_its_own_steps(
    student: str, tmp_path: Path
) -> None:
    judged = tiny.module()
    judged.init_from = student
    test_(tmp_path, judged, EMA())  # there is no average of it
    assert judged.student_times == (0.9, 0.5)
    source, _ = weights.load_model(student)
    tiny.assert_equal_states(judged.averaged_denoiser.state_dict(), source.state_dict())
    tiny.fit(tmp_path, 0, fitted=judged)
    assert judged.student_times is None  # it learns as a teacher
    tiny.assert_equal_states(judged.denoiser.state_dict(), source.state_dict())


def test_what_follows_a_fit_is_of_the_trained_weights(student: str, tmp_path: Path) -> None:
    fitted = tiny.module()
    fitted.init_from = student
    trainer = tiny.trainer(tmp_path, 2, limit_val_batches=1)
    trainer.fit(fitted, tiny.data())
    trained = {name: value.clone() for name, value in fitted.denoiser.state_dict().items()}
    trainer.validate(fitted, tiny.data(), verbose=False)
    tiny.assert_equal_states(dict(fitted.denoiser.state_dict()), trained)
    assert fitted.student_times is None
    source, _ = weights.load_model(student)
    assert not torch.equal(source.out.weight, trained["out.weight"])


def test_a_checkpoint_loads_without_a_trainer_and_is_then_tested(
    run: Path, student: str, tmp_path: Path
) -> None:
    loaded = VAEPiD.load_from_checkpoint(
        run,
        denoiser=tiny.config(),
        text=None,
        training=Training(),
        evaluation=Evaluation(latent_sigmas=[0.0], steps=1),
        init_from=student,
    )
    test_(tmp_path, loaded)
    assert loaded.student_times is None
    expected, _ = weights.load_model(run)
    tiny.assert_equal_states(loaded.averaged_denoiser.state_dict(), expected.state_dict())


# The average, and fits that follow one another.


def test_test_uses_the_average_with_or_without_the_callback(run: Path, tmp_path: Path) -> None:
    def score(*callbacks: tiny.pl.Callback) -> list[str]:
        fitted = tiny.module()
        test_(tmp_path, fitted, *callbacks, ckpt_path=run)
        source, _ = weights.load_model(run)
        tiny.assert_equal_states(fitted.averaged_denoiser.state_dict(), source.state_dict())
        rows = (tmp_path / "test_metrics.csv").read_text().splitlines()
        return [",".join(row.split(",")[:4]) for row in rows]

    with_callback = score(EMA())
    assert with_callback == score()
    assert with_callback[0].startswith("method,latent_sigma,psnr")
    assert len(with_callback) == 1 + 2 * 2  # header, two methods at two sigmas
    assert (tmp_path / "test_grid.png").is_file()


def test_a_second_fit_averages_from_its_start_and_a_third_not_at_all(tmp_path: Path) -> None:
    fitted, ema = tiny.module(), EMA()
    tiny.fit(tmp_path, 2, ema, fitted=fitted)
    tiny.fit(tmp_path, 1, ema, fitted=fitted)
    # The first step's average is the network itself.
    tiny.assert_equal_states(fitted.denoiser_ema.state_dict(), fitted.denoiser.state_dict())
    tiny.fit(tmp_path / "plain", 1, tiny.pl.Callback(), fitted=fitted)
    assert fitted.denoiser_ema is None
    saved, _ = weights.load_model(tmp_path / "plain" / "last.ckpt")
    tiny.assert_equal_states(saved.state_dict(), fitted.denoiser.state_dict())


def test_a_trainer_that_goes_on_keeps_its_average(tmp_path: Path) -> None:
    fitted, ema = tiny.module(), EMA()
    trainer = tiny.trainer(tmp_path, 2, ema)
    trainer.fit(fitted, tiny.data())
    before = fitted.denoiser_ema.out.weight.clone()
    trainer.fit_loop.epoch_loop.max_steps = 3
    trainer.fit(fitted, tiny.data())
    expected = before.lerp(fitted.denoiser.out.weight.detach(), 1 - (1 - 1 / 3) ** (ema.power + 1))
    torch.testing.assert_close(fitted.denoiser_ema.out.weight, expected, rtol=1e-6, atol=1e-8)


def test_a_report_keeps_no_more_than_its_grid_shows(tmp_path: Path) -> None:
    tested = tiny.module()
    trainer = tiny.trainer(tmp_path, 0, limit_test_batches=2)
    trainer.test(tested, tiny.data(batch_size=3), verbose=False)
    assert len(tested.report.grid_rows) == 4
    for row in tested.report.grid_rows:
        assert len(row) == len(tested.report.labels())
        assert all(p.untyped_storage().nbytes() <= 4 * 3 * p.numel() for p in row)
    # Only one picture of the second batch is shown; a view would keep all three.
    assert all(p.untyped_storage().nbytes() == 4 * p.numel() for p in tested.report.grid_rows[3])


# Refusals.


@pytest.mark.parametrize(
    ("option", "make"),
    [
        ("model.training.train", lambda: Training(train="head")),
        ("model.training.optimizer", lambda: Training(optimizer="lion")),
        ("model.training.time_std", lambda: Training(time_std=0.0)),
        ("model.training.caption_dropout", lambda: Training(caption_dropout=1.5)),
        ("model.training.decay_steps", lambda: Training(warmup_steps=5, decay_steps=5)),
        ("model.training.compile", lambda: Training(compile=True, train="rgb_head")),
        ("model.training.train", lambda: tiny.module(Training(train="rgb_head"))),  # without a head
        ("model.evaluation.latent_sigmas", lambda: Evaluation(latent_sigmas=[])),
        ("model.evaluation.steps", lambda: Evaluation(steps=0)),
        ("EMA power", lambda: EMA(power=0.0)),
        ("model.init_from", lambda: VAEPiD(denoiser=tiny.config(), init_from="")),
        ("trainer.strategy", lambda: check_strategy(object.__new__(FSDPStrategy))),
    ],
)
def test_settings_that_cannot_be_are_refused(option: str, make: Any) -> None:
    with refused(option):
        make()


def test_what_a_network_cannot_do_is_refused_before_data_is_read() -> None:
    data, module = tiny.data(), tiny.module()
    data.image_size = 100
    with pytest.raises(ValueError, match="100 x 100 is not a multiple of 64"):
        module.prepare(data, "fit")
    module.evaluation = Evaluation(guidance_scale=2.0)
    with refused("model.evaluation.guidance_scale"):
        module.prepare(None, "test")


def test_another_network_is_refused(run: Path) -> None:
    other = tiny.module(num_blocks=3)
    with refused("ckpt_path"):
        read_run(other.info, load(run))
    with refused("ckpt_path"):
        read_run(tiny.module().info, {"state_dict": {}})
    wider = tiny.module(width=64)
    with refused("model.init_from"):
        read_start(str(run), wider.info, wider.denoiser, fits=True)


def test_a_run_is_not_resumed_as_another(run: Path, tmp_path: Path) -> None:
    found, settings = read_run(tiny.module().info, load(run)), tiny.module().training_settings
    check_resumes(found, settings, None, averages=True)
    with refused("ckpt_path"):
        check_resumes(found, settings, None, averages=False)
    with refused("ckpt_path"):
        check_resumes(found, settings, (0.9, 0.5), averages=True)
    for name, value in {"learning_rate": 0.5, "optimizer": "muon"}.items():
        changed = dataclasses.replace(settings, **{name: value})
        with refused("ckpt_path"):
            check_resumes(found, changed, None, averages=True)
    with refused("ckpt_path"):
        tiny.fit(tmp_path, 7, tiny.pl.Callback(), resume=run)
