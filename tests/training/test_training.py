"""Training: exact resumption, averages, checkpoint contents and refusals."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
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
from pid_lightning.training.sample import Sample, draw_sample


def draw(module: VAEPiD, batch: dict) -> Sample:
    networks = (module.encoder, module.text_encoder, module.denoiser)
    return draw_sample(batch, "train", *networks, module.training_settings)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of 6 uninterrupted steps."""
    folder = tmp_path_factory.mktemp("run")
    tiny.fit(folder, 6)
    return folder / "last.ckpt"


def test_three_and_three_steps_are_six(run: Path, tmp_path: Path) -> None:
    tiny.fit(tmp_path, 3)
    tiny.fit(tmp_path, 6, resume=tmp_path / "last.ckpt")
    once, twice = (torch.load(p, weights_only=True) for p in (run, tmp_path / "last.ckpt"))
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "pid", "global_step"):
        tiny.assert_equal_states(once[part], twice[part], part)
    assert any(name.startswith("denoiser_ema.") for name in once["state_dict"])


def test_a_checkpoint_holds_no_frozen_network(run: Path) -> None:
    state = torch.load(run, weights_only=True)["state_dict"]
    assert {name.split(".")[0] for name in state} == {"denoiser", "denoiser_ema"}
    assert all(v.dtype == torch.float32 for k, v in state.items() if k.startswith("denoiser_ema"))


@pytest.mark.parametrize(
    ("student_every", "changes", "num_updates"),
    [(None, {}, 5), (None, {"accumulate_grad_batches": 2}, 5), (2, {}, 2)],
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
    fitted = tiny.fit(tmp_path, 5, *callbacks, **changes)
    assert len(record.seen) == num_updates
    expected = start.out.weight.detach()
    for n, seen in enumerate(record.seen, start=1):
        keep = (1 - 1 / n) ** (power + 1)
        expected = keep * expected + (1 - keep) * seen
    torch.testing.assert_close(fitted.denoiser_ema.out.weight, expected, rtol=1e-6, atol=1e-8)
    assert fitted.averaged_denoiser is fitted.denoiser_ema


def test_average_stays_in_fp32_where_the_module_is_bf16(tmp_path: Path) -> None:
    fitted = tiny.fit(tmp_path, 2, EMA(), precision="bf16-true")
    assert fitted.denoiser.dtype == torch.bfloat16
    assert fitted.denoiser_ema.dtype == torch.float32


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_a_run_in_another_precision_resumes_exactly(precision: str, tmp_path: Path) -> None:
    """Which Lightning sets after it restores weights: neither they nor the average pass through
    fp32 or bf16."""
    for folder, stops in (("whole", [4]), ("parts", [2, 4])):
        last = None
        for steps in stops:
            tiny.fit(tmp_path / folder, steps, EMA(), precision=precision, resume=last)
            last = tmp_path / folder / "last.ckpt"
    states = [torch.load(tmp_path / f / "last.ckpt", weights_only=True) for f in ("whole", "parts")]
    tiny.assert_equal_states(*(state["state_dict"] for state in states))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_trains_and_validates_in_bf16(precision: str, tmp_path: Path) -> None:
    fitted = tiny.module()
    trainer = tiny.trainer(
        tmp_path, 2, EMA(), precision=precision, limit_val_batches=1, val_check_interval=1
    )
    trainer.fit(fitted, tiny.data())
    assert torch.isfinite(trainer.callback_metrics["validate/loss"])


def test_draws_are_in_fp32_whatever_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in bf16-true, where Lightning changes the default: a bf16 time near 1 has 8 bits."""

    def draw() -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        return [
            flow.sample_times(3, generator=generator),
            noising.sample_latent_sigma(3, generator=generator),
            sampling.draw_noise((1, 3, 2, 2), generator, "cpu"),
        ]

    usual = draw()
    torch.set_default_dtype(torch.bfloat16)
    try:
        drawn = draw()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, drawn, usual))


def test_fsdp_is_refused(tmp_path: Path) -> None:
    fitted, strategy = tiny.module(), object.__new__(FSDPStrategy)
    fitted._trainer = SimpleNamespace(strategy=strategy)
    with pytest.raises(ValueError, match=r"trainer\.strategy: FSDP is not supported"):
        fitted.setup("fit")


def test_a_null_that_no_sample_reads_is_frozen() -> None:
    """Or DDP would wait for its gradient."""
    text = CachedText("cache", text_width=8)
    for dropout, learns in ((0.0, False), (0.1, True)):
        fitted = tiny.module(Training(caption_dropout=dropout), text)
        assert fitted.denoiser.text_embedding.null.requires_grad == learns
    silent = tiny.module(Training(caption_dropout=0.0), text_width=8, text_length=3)
    assert silent.denoiser.text_embedding.null.requires_grad


def test_only_adapter_and_gates_move(tmp_path: Path) -> None:
    start = tiny.module().denoiser.state_dict()
    settings = Training(train="adapter", learning_rate=1e-2, warmup_steps=1)
    fitted = tiny.fit(tmp_path, 3, fitted=tiny.module(settings))
    moved = {k for k, v in fitted.denoiser.state_dict().items() if not torch.equal(v, start[k])}
    # The zero-initialised output is frozen here, so all gradients are zero.
    assert moved <= {k for k in start if k.startswith(("adapter.", "gates."))}
    learning = {k for k, p in fitted.denoiser.named_parameters() if p.requires_grad}
    assert learning == {k for k in start if k.startswith(("adapter.", "gates."))}


def test_init_from_same_family_takes_everything(run: Path, tmp_path: Path) -> None:
    fitted = tiny.module()
    fitted.init_from = str(run)
    trainer = tiny.trainer(tmp_path, 0)
    trainer.fit(fitted, tiny.data())
    source, _ = weights.load_model(run)
    tiny.assert_equal_states(fitted.denoiser.state_dict(), source.state_dict())


def test_init_from_another_scale_takes_the_backbone(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(checkpoints, "rank_zero_info", said.append)
    fitted = VAEPiD(scale=2, denoiser=tiny.config(), init_from=str(run))
    fresh = fitted.denoiser.state_dict()
    fresh = {k: v.clone() for k, v in fresh.items()}
    tiny.trainer(tmp_path, 0).fit(fitted, tiny.data())
    source = weights.load_model(run)[0].state_dict()
    for name, value in fitted.denoiser.state_dict().items():
        kept = fresh if name.startswith(("adapter.", "gates.")) else source
        assert torch.equal(value, kept[name]), name
    num_new = sum(name.startswith(("adapter.", "gates.")) for name in fresh)
    (sentence,) = said
    assert (
        f"loaded {len(fresh) - num_new} tensors (backbone), {num_new} tensors are new" in sentence
    )


def test_init_from_another_network_is_refused(run: Path, tmp_path: Path) -> None:
    fitted = tiny.module(width=64)
    fitted.init_from = str(run)
    with pytest.raises(ValueError, match="width: 32, here 64"):
        tiny.trainer(tmp_path, 0).fit(fitted, tiny.data())


def test_checkpoint_of_another_model_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_blocks: 2, here 3"):
        tiny.fit(tmp_path, 7, fitted=tiny.module(num_blocks=3), resume=run)


def test_resuming_without_the_average_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="add the EMA callback"):
        tiny.fit(tmp_path, 7, tiny.pl.Callback(), resume=run)


def test_test_uses_the_average_with_or_without_the_callback(run: Path, tmp_path: Path) -> None:
    def score(*callbacks: tiny.pl.Callback) -> tuple[list[str], str]:
        fitted = tiny.module()
        trainer = tiny.trainer(tmp_path, 1, *callbacks)
        trainer.test(fitted, tiny.data(), ckpt_path=run, verbose=False)
        source, _ = weights.load_model(run)
        tiny.assert_equal_states(fitted.averaged_denoiser.state_dict(), source.state_dict())
        rows = (tmp_path / "test_metrics.csv").read_text().splitlines()
        return [",".join(row.split(",")[:4]) for row in rows], rows[0]

    with_callback, header = score(EMA())
    without, _ = score()
    assert with_callback == without
    assert header.startswith("method,latent_sigma,psnr")
    assert len(with_callback) == 1 + 2 * 2  # header, two methods at two sigmas
    assert (tmp_path / "test_grid.png").is_file()


def test_dropouts_and_noise_have_their_shares() -> None:
    settings = Training(latent_dropout=0.25, caption_dropout=0.5)
    denoiser = tiny.module(settings, tiny.Text()).denoiser
    image = torch.zeros(1, 3, 8, 8).expand(2000, -1, -1, -1)
    batch = {"image": image, "caption": [""] * 2000, "number": torch.arange(2000)}
    encoder = SimpleNamespace(encode=lambda images: torch.zeros(2000, 1, 1, 1))
    text = SimpleNamespace(encode=lambda captions: torch.zeros(2000, 3, 6))
    sample = draw_sample(batch, "train", encoder, text, denoiser, settings)
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


def test_published_weights_can_be_trained_with_captions_only(tmp_path: Path) -> None:
    published = tiny.module(text=tiny.Text(), learned_null=False)
    weights.save_model(
        published.denoiser, published.info, tmp_path / "p.safetensors", torch.float32
    )
    training = Training(learning_rate=1e-3, warmup_steps=1, train="adapter", caption_dropout=0.5)
    fitted = tiny.module(training, tiny.Text(), learned_null=False)
    fitted.init_from = str(tmp_path / "p.safetensors")
    tiny.fit(tmp_path, 2, fitted=fitted)
    moved = {
        name.split(".")[0]
        for (name, after), before in zip(
            fitted.denoiser.state_dict().items(),
            published.denoiser.state_dict().values(),
            strict=True,
        )
        if not torch.equal(after, before)
    }
    assert moved == {"adapter", "gates"}
    for text in (None, NoText()):
        with pytest.raises(ValueError, match="without a learned null, as in the published weights"):
            tiny.module(text=text, text_length=3, learned_null=False)
    assert tiny.module(text=NoText(), text_length=3).text_encoder.encode(["a fox"]) is None


def test_a_sample_depends_on_its_number_alone() -> None:
    fitted = tiny.module()
    fitted.encoder.load()
    images = torch.rand(4, 3, 64, 64) * 2 - 1
    batch = {"image": images, "caption": [""] * 4, "number": torch.tensor([3, 1, 4, 15])}
    alone = {"image": images[2:3], "caption": [""], "number": torch.tensor([4])}
    together, single = draw(fitted, batch), draw(fitted, alone)
    assert torch.equal(together.latent_sigma[2:3], single.latent_sigma)
    torch.testing.assert_close(together.latents[2:3], single.latents)


def test_rgb_head_learns_the_low_resolution_image(tmp_path: Path) -> None:
    adapter = AdapterConfig(width=16, num_res_blocks=1, rgb_head=True, inject_pixels=True)
    fitted = tiny.module(Training(learning_rate=1e-2, warmup_steps=1), adapter=adapter)
    losses = []

    class Record(tiny.pl.Callback):
        def on_train_batch_end(self, trainer, *_) -> None:
            losses.append(trainer.callback_metrics["train/rgb_loss"].item())

    tiny.fit(tmp_path, 30, EMA(), Record(), fitted=fitted)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_mixed_precision_keeps_the_encoder_in_bf16(tmp_path: Path) -> None:
    exact = tiny.module()
    exact.encoder.load()
    fitted = tiny.fit(tmp_path, 1, precision="bf16-mixed")
    assert {p.dtype for p in fitted.encoder.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in fitted.denoiser.parameters()} == {torch.float32}
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    ours, theirs = fitted.encoder.encode(images), exact.encoder.encode(images)
    assert ours.dtype == torch.float32
    assert (ours - theirs).std() < 0.02 * theirs.std()


def test_rgb_head_stage_moves_what_the_rgb_head_reads_alone(tmp_path: Path) -> None:
    adapter = AdapterConfig(
        width=16, num_res_blocks=2, rgb_head=True, rgb_head_block=1, head_norm=True
    )
    training = Training(train="rgb_head", learning_rate=1e-2, warmup_steps=1)
    fitted = tiny.module(training, adapter=adapter)
    before = {name: p.detach().clone() for name, p in fitted.denoiser.named_parameters()}
    tiny.fit(tmp_path, 2, fitted=fitted)
    moved = {n for n, p in fitted.denoiser.named_parameters() if not torch.equal(p, before[n])}
    unread = ("adapter.heads.", "adapter.head_norm.", "adapter.res_blocks.1.")
    own = {n for n in before if n.startswith("adapter.") and not n.startswith(unread)}
    assert moved == own
    # DDP waits for the gradient of everything that requires one.
    assert moved == {n for n, p in fitted.denoiser.named_parameters() if p.requires_grad}


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


def test_rgb_head_stage_needs_an_rgb_head() -> None:
    with pytest.raises(ValueError, match="rgb_head needs an adapter with an RGB head; set model"):
        tiny.module(Training(train="rgb_head"))


def test_init_from_is_what_is_tested_with_the_average_in_the_config(
    run: Path, tmp_path: Path
) -> None:
    fitted = tiny.module()
    fitted.init_from = str(run)
    tiny.trainer(tmp_path, 1, EMA()).test(fitted, tiny.data(), verbose=False)
    expected, _ = weights.load_model(run)
    tiny.assert_equal_states(
        dict(fitted.averaged_denoiser.state_dict()), dict(expected.state_dict()), "denoiser"
    )


def test_output_size_that_is_no_whole_number_of_latents_is_refused(tmp_path: Path) -> None:
    data = tiny.data()
    data.image_size = 100
    with pytest.raises(ValueError, match="100 x 100 is not a multiple of 32"):
        tiny.trainer(tmp_path, 1).fit(tiny.module(), data)


def test_what_shapes_do_not_show_is_told(run: Path, tmp_path: Path) -> None:
    fitted = tiny.module(prediction="x0")
    fitted.init_from = str(run)
    with pytest.warns(UserWarning, match="another prediction: velocity, here x0"):
        tiny.trainer(tmp_path, 0).fit(fitted, tiny.data())
    assert fitted.student_times is None


def test_noise_frame_and_padding_of_a_model_are_told_too(run: Path, tmp_path: Path) -> None:
    denoiser, info = weights.load_model(run)
    config = dataclasses.replace(info.config, adapter=AdapterConfig(16, 1, padding="replicate"))
    other = dataclasses.replace(info, noise_frame="variance_preserving", config=config)
    weights.save_model(denoiser, other, tmp_path / "other.safetensors", torch.float32)
    fitted = tiny.module()
    fitted.init_from = str(tmp_path / "other.safetensors")
    expected = "noise_frame: variance_preserving, here flow; adapter.padding: replicate, here zeros"
    with pytest.warns(UserWarning, match=expected):
        tiny.trainer(tmp_path, 0).fit(fitted, tiny.data())


@pytest.fixture
def student(run: Path, tmp_path: Path) -> str:
    """The network of `run`, as a file that calls it a student."""
    denoiser, info = weights.load_model(run)
    info = dataclasses.replace(info, student_times=(0.9, 0.5))
    weights.save_model(denoiser, info, tmp_path / "student.safetensors", torch.float32)
    return str(tmp_path / "student.safetensors")


def test_a_student_given_as_init_from_is_judged_with_its_own_steps(
    student: str, tmp_path: Path
) -> None:
    judged = tiny.module()
    judged.init_from = student
    tiny.trainer(tmp_path, 0).test(judged, tiny.data(), verbose=False)
    assert judged.student_times == (0.9, 0.5)
    tiny.fit(tmp_path, 1, fitted=judged)
    assert judged.student_times is None  # it learns as a teacher


def test_what_follows_a_fit_is_of_the_trained_weights(student: str, tmp_path: Path) -> None:
    fitted = tiny.module()
    fitted.init_from = student
    trainer = tiny.trainer(tmp_path, 3, limit_val_batches=1)
    trainer.fit(fitted, tiny.data())
    trained = {name: value.clone() for name, value in fitted.denoiser.state_dict().items()}
    trainer.validate(fitted, tiny.data(), verbose=False)
    tiny.assert_equal_states(dict(fitted.denoiser.state_dict()), trained)
    assert fitted.student_times is None
    source, _ = weights.load_model(student)
    assert not torch.equal(source.out.weight, trained["out.weight"])


def test_a_second_fit_averages_from_its_start(tmp_path: Path) -> None:
    fitted, ema = tiny.module(), EMA()
    tiny.fit(tmp_path, 5, ema, fitted=fitted)
    tiny.fit(tmp_path, 1, ema, fitted=fitted)
    # The first step's average is the network itself.
    tiny.assert_equal_states(
        dict(fitted.denoiser_ema.state_dict()), dict(fitted.denoiser.state_dict())
    )


def test_a_trainer_that_goes_on_keeps_its_average(tmp_path: Path) -> None:
    fitted, ema = tiny.module(), EMA()
    trainer = tiny.trainer(tmp_path, 4, ema)
    trainer.fit(fitted, tiny.data())
    before = fitted.denoiser_ema.out.weight.clone()
    trainer.fit_loop.epoch_loop.max_steps = 5
    trainer.fit(fitted, tiny.data())
    expected = before.lerp(fitted.denoiser.out.weight.detach(), 1 - (1 - 1 / 5) ** (ema.power + 1))
    torch.testing.assert_close(fitted.denoiser_ema.out.weight, expected, rtol=1e-6, atol=1e-8)


def test_a_fit_without_the_callback_has_no_average(run: Path, tmp_path: Path) -> None:
    fitted = tiny.fit(tmp_path, 2)
    tiny.fit(
        tmp_path / "plain", 2, LearningRateMonitor(), fitted=fitted, logger=CSVLogger(tmp_path)
    )
    assert fitted.denoiser_ema is None
    saved, _ = weights.load_model(tmp_path / "plain" / "last.ckpt")
    tiny.assert_equal_states(dict(saved.state_dict()), dict(fitted.denoiser.state_dict()))


def test_captions_without_dropout_may_be_shorter_than_a_null(tmp_path: Path) -> None:
    training = Training(learning_rate=1e-3, warmup_steps=2, caption_dropout=0.0)
    tiny.fit(tmp_path, 1, fitted=tiny.module(training, text=tiny.Text(), text_length=8))


def test_clipping_by_value_bounds_every_gradient(tmp_path: Path) -> None:
    class Watch(tiny.pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_) -> None:
            gradients = [p.grad for p in pl_module.denoiser.parameters() if p.grad is not None]
            self.largest = max(gradient.abs().max().item() for gradient in gradients)

    watch = Watch()
    changes = {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"}
    tiny.fit(tmp_path, 2, watch, precision="bf16-mixed", **changes)  # a fused optimiser
    assert watch.largest == pytest.approx(1e-3)


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
    tiny.trainer(tmp_path, 0).test(loaded, tiny.data(), verbose=False)
    assert loaded.student_times is None
    expected, _ = weights.load_model(run)
    tiny.assert_equal_states(
        dict(loaded.averaged_denoiser.state_dict()), dict(expected.state_dict())
    )


def test_captions_shorter_than_the_learned_null_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"captions of 3 tokens, .* text_length 8; set"):
        tiny.fit(tmp_path, 1, fitted=tiny.module(text=tiny.Text(), text_length=8))
    with pytest.raises(ValueError, match=r"text: 5 tokens a caption, .*text_length to 5"):
        tiny.module(text=LanguageModelText("none", length=5, text_width=6), text_length=8)


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
