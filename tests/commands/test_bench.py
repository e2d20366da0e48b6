"""`pid bench`: its counts, its comparisons and its refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pid_lightning.__main__ import main
from pid_lightning.checks import Mistake
from pid_lightning.commands.bench import command, estimate, measure, networks, settings
from pid_lightning.commands.bench.work import Mode, Work, forward
from pid_lightning.decoding.memory_estimate import estimate_working_memory, peak_bytes, weight_bytes
from pid_lightning.diffusion.sampling import STUDENT_TIMES
from pid_lightning.files.models import ModelInfo
from pid_lightning.nn import AdapterConfig, Discriminator, PiDConfig

CPU = torch.device("cpu")
TINY = PiDConfig(
    width=16,
    num_heads=2,
    num_blocks=2,
    num_pixel_blocks=1,
    pixel_width=4,
    pixel_attention_width=32,
    pixel_num_heads=2,
    text_width=6,
    text_length=5,
    rope_reference=(64, 48),
    adapter=AdapterConfig(width=8, num_res_blocks=1),
)
V15 = AdapterConfig(
    width=8,
    num_res_blocks=2,
    interval=1,
    gate="token",
    padding="replicate",
    inject_pixels=True,
    rgb_head=True,
    rgb_head_block=1,
    unpack=2,
)


def info(**changes) -> ModelInfo:
    return replace(networks.NETWORKS["small"], config=replace(TINY, **changes))


def work(name: str) -> Work:
    denoiser = networks.build_random(info(), torch.Generator().manual_seed(0))
    return Work.of(name, denoiser, info(), torch.float32)


def sample(size: int = 64):
    return networks.random_sample(info(), size, 1, CPU)


# ------------------------------------------------------------------- operations


def forward_flops(spec: ModelInfo, size: int) -> tuple[int, int]:
    """Hand-computed operations of the condition and of one evaluation; v1, one picture."""
    config, side = spec.config, spec.config.patch_size
    n, length, d = (size // side) ** 2, config.text_length, config.width
    num_gates = -(-config.num_blocks // config.adapter.interval)
    adapter = config.adapter.width
    convs = spec.geometry.latent_channels + (1 + 2 * config.adapter.num_res_blocks) * adapter
    condition = 9 * convs * adapter * n + n * adapter * num_gates * d  # convolutions, heads
    condition += num_gates * n * d * d + length * config.text_width * d  # gates' halves, text

    hidden, total = int(2 * 4 * d / 3), n * 3 * side**2 * d + (256 + d) * d
    for i in range(config.num_blocks):
        both = n + length
        tokens = n if i == config.num_blocks - 1 else both  # the last block's text is unused
        total += 2 * 6 * d * d + both * 3 * d * d + 2 * tokens * both * d
        total += tokens * (d * d + 3 * d * hidden)
    total += num_gates * n * d * d
    c, a, pixels = config.pixel_width, config.pixel_attention_width, side**2
    block = d * 6 * pixels * c + 2 * pixels * c * a + 4 * a * a + 2 * n * a + pixels * 8 * c * c
    total += config.num_pixel_blocks * n * block + 2 * n * pixels * 3 * c
    return 2 * condition, 2 * total


@pytest.mark.parametrize("changes", [{}, {"num_blocks": 3, "num_pixel_blocks": 2, "width": 24}])
def test_operations_are_those_of_the_method(changes: dict) -> None:
    spec = info(**changes)
    condition, evaluation = forward_flops(spec, 96)
    assert estimate.count_flops("forward", spec, 96, 1) == {"forward": condition + evaluation}
    assert estimate.count_flops("decode", spec, 96, 3) == {
        "decode": 3 * (condition + 4 * evaluation)
    }


def test_operations_agree_with_torchs_counter() -> None:
    call = work("forward").calls(sample())["forward"]
    # On a CPU the counter of the oldest torch versions only knows this attention kernel.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    assert estimate.count_flops("forward", info(), 64, 1) == {"forward": counter.get_total_flops()}


def test_a_step_costs_its_evaluations() -> None:
    """A student step: 4 evaluations and 1 backward of the student, two branches of the teacher,
    the fake score, and the teacher's features with a backward."""
    _, evaluation = forward_flops(info(), 64)
    counted = {}
    for name in ("train", "dmd2"):
        for row, call in work(name).calls(sample()).items():
            with estimate.Operations() as operations, sdpa_kernel(SDPBackend.MATH):
                call()
            counted[row] = operations.flops
    train, student, critics = counted.values()
    assert 2.5 * evaluation < train < 3.5 * evaluation
    assert 9 * evaluation < student < 13 * evaluation
    assert critics > 4 * evaluation + 2.5 * evaluation


# ------------------------------------------------------------------- memory


def test_what_training_keeps_is_counted_exactly() -> None:
    weights = list(info().build().parameters())
    num = sum(p.numel() for p in weights)
    learned = sum(p.numel() for p in weights if p.requires_grad)
    num_tensors = sum(p.requires_grad for p in weights)
    critic = list(Discriminator(TINY.width, 1).parameters())
    size = sum(p.numel() for p in critic)
    batch = sample()
    read = (batch.x0, batch.latents, batch.latent_sigma, batch.text)
    inputs = 4 * sum(tensor.numel() for tensor in read)
    moments = 4 * (2 * learned + num_tensors)
    assert held("train") == 4 * 2 * num + moments + inputs
    expected = 4 * 3 * num + 2 * num + 4 * size  # student, average, fake score; teacher; critic
    expected += 2 * moments + 4 * (2 * size + len(critic)) + inputs
    assert held("dmd2") == expected


def held(name: str) -> int:
    run = work(name)
    for call in run.calls(sample()).values():
        call()
    return run.held_bytes(sample())


def peaks(name: str, recomputes: bool = False) -> dict[str, dict[str, float]]:
    mode = Mode("eager", recomputes)
    return estimate.estimate_peaks(name, info(), 64, 8, torch.float32, mode)


@pytest.mark.parametrize("name", ["forward", pytest.param("train", marks=pytest.mark.slow)])
def test_an_estimate_is_what_a_run_holds(name: str) -> None:
    run, batch = work(name), networks.random_sample(info(), 64, 8, CPU)
    ((row, call),) = run.calls(batch).items()
    call()
    estimated, mebibyte = peaks(name)[row], 2**20
    assert run.held_bytes(batch) == estimated["held_mib"] * mebibyte
    measured = estimated["held_mib"] + peak_bytes(call) / mebibyte
    assert measured == pytest.approx(estimated["peak_mib"], rel=0.02)
    if name == "train":  # less with recomputation
        assert peaks(name, recomputes=True)[row]["peak_mib"] < estimated["peak_mib"]


@pytest.mark.slow
def test_a_decode_is_estimated_as_the_decoder_does() -> None:
    spec = replace(info(), student_times=STUDENT_TIMES)
    (peaks,) = estimate.estimate_peaks("decode", spec, 128, 2, torch.bfloat16, Mode()).values()
    working = estimate_working_memory(spec, 128, 128, None, batch_size=2)
    weights = weight_bytes(networks.build_meta(spec).bfloat16())
    assert peaks["peak_mib"] * 2**20 == pytest.approx(weights + working, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "gigabytes"), [(2048, 6), (4096, 12)])
@pytest.mark.parametrize("network", ["full", "full_v15"])
def test_the_published_size_decodes_untiled_within(network: str, size: int, gigabytes: int) -> None:
    spec = networks.NETWORKS[network]
    weights = weight_bytes(networks.build_meta(spec).bfloat16())
    assert weights + estimate_working_memory(spec, size, size) < gigabytes * 1e9


# ------------------------------------------------------------------- networks and steps


@pytest.mark.parametrize("changes", [{}, {"adapter": V15, "num_blocks": 3}])
def test_baseline_and_ours_are_one_function(changes: dict) -> None:
    spec = info(**changes)
    pair = networks.build(spec, with_plain=True)
    batch = networks.random_sample(spec, 64, 2, CPU)
    exact = measure.exact_velocity(pair["eager"], batch)
    for network in pair.values():
        assert measure.relative_error(forward(network, batch), exact) < 1e-3


def test_critics_and_student_move_their_own_weights() -> None:
    run = work("dmd2")
    parts = {"denoiser": run.denoiser, "average": run.average}
    parts |= dict(run.distillation.named_children())
    moved = {}
    for row, call in run.calls(sample()).items():
        before = {name: [p.clone() for p in part.parameters()] for name, part in parts.items()}
        call()
        moved[row] = {
            name
            for name, part in parts.items()
            if not all(map(torch.equal, before[name], part.parameters()))
        }
    assert moved == {
        "dmd2 student": {"denoiser", "average"},
        "dmd2 critics": {"fake_score", "discriminator"},
    }


def test_modes_share_weights_and_compile_all_networks() -> None:
    run = work("dmd2")
    compiled = run.in_mode(Mode("compiled", recomputes=True))
    pairs = [(run.denoiser, compiled.denoiser)]
    for name in ("teacher", "fake_score"):
        pairs.append((getattr(run.distillation, name), getattr(compiled.distillation, name)))
    for ours, theirs in pairs:
        assert all(p is q for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))
        assert theirs._compiled_call_impl is not None
        assert ours._compiled_call_impl is None
        assert theirs.activation_checkpointing
        assert not ours.activation_checkpointing


# ------------------------------------------------------------------- the command


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--network small` is tiny, and this machine's rate is known."""
    monkeypatch.setitem(networks.NETWORKS, "small", info())
    monkeypatch.setattr(measure, "measure_rate", lambda device, dtype: 1e9)


def rows_of(tmp_path: Path, options: str) -> list[dict]:
    out = tmp_path / "bench.json"
    common = f"--dtype float32 --device cpu --repeat 1 --json {out}"
    main(["bench", *options.split(), *common.split()])
    return json.loads(out.read_text())["rows"]


@pytest.mark.slow
def test_table_and_json_hold_the_same_rows(
    small: None, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rows = rows_of(tmp_path, "--work forward train --sizes 64 --baseline --check")
    assert [(row["work"], row["mode"]) for row in rows] == [
        (name, mode) for name in ("forward", "train") for mode in ("eager", "plain")
    ]
    assert command.format_table(rows) in capsys.readouterr().out
    for row in rows:
        assert row["floor_share"] == pytest.approx(row["gflop"] / row["seconds"])
        assert row["peak_mib"] > row["held_mib"] > 0
    assert [row["of_plain"] for row in rows[1::2]] == [1, 1]
    assert all(row["error"] < 1e-4 for row in rows[:2])


@pytest.mark.slow
def test_rows_are_saved_before_memory_runs_out(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_sample = networks.random_sample

    def small_sample(info: ModelInfo, size: int, *others: object):
        if size == 128:
            raise torch.OutOfMemoryError
        return random_sample(info, size, *others)

    monkeypatch.setattr(networks, "random_sample", small_sample)
    rows = rows_of(tmp_path, "--work forward --sizes 64 128 32")
    assert [row["size"] for row in rows] == [64, 32]


def test_an_estimate_needs_no_measurement(small: None, tmp_path: Path) -> None:
    (row,) = rows_of(tmp_path, "--estimate --work forward --sizes 64")
    assert "seconds" not in row
    assert row["peak_mib"] > row["held_mib"] > 0


@pytest.mark.parametrize(
    ("changes", "option"),
    [
        ({"sizes": (64, 0)}, "sizes"),
        ({"batch_size": (0,)}, "batch_size"),
        ({"repeat": 0}, "repeat"),
        ({"estimate": True, "baseline": True}, "baseline"),
        ({"estimate": True, "check": True}, "check"),
        ({"check": True, "work": ("train",)}, "check"),
        ({"activation_checkpointing": True, "work": ("decode",)}, "activation_checkpointing"),
        ({"json": "."}, "json"),
    ],
)
def test_settings_that_do_not_fit_are_told_by_name(changes: dict, option: str) -> None:
    with pytest.raises(Mistake) as told:
        settings.BenchSettings(**changes)
    assert told.value.option == option


@pytest.mark.parametrize("arguments", ["--sizes 100", "--sizes a", "--work all", "--compil"])
def test_a_wrong_command_line_ends_in_one_sentence(
    arguments: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["bench", *arguments.split()])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("pid: ")
    assert said.count("\n") == 1


def test_without_the_tests_folder_there_is_no_baseline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(networks, "PLAIN", tmp_path / "plain.py")
    with pytest.raises(Mistake) as told:
        networks.build(info(), with_plain=True)
    assert told.value.option == "baseline"
