"""`pid bench`: its counts, its comparisons and its refusals."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import pytest
import torch
from plain import published_arguments
from published import build_from_arguments
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pid_lightning.__main__ import main
from pid_lightning.commands.bench import (
    attention,
    baseline,
    estimate,
    measure,
    networks,
    report,
    rows,
    work,
)
from pid_lightning.commands.bench.pieces import assemble, forward, gather
from pid_lightning.commands.bench.rates import Rates
from pid_lightning.decoding.memory_estimate import estimate_working_memory, peak_bytes, weight_bytes
from pid_lightning.diffusion.sampling import STUDENT_TIMES
from pid_lightning.files.models import ModelInfo, save_model
from pid_lightning.nn import AdapterConfig, Discriminator, PiDConfig
from pid_lightning.nn.attention import attend

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
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
    config = dataclasses.replace(TINY, **changes)
    return dataclasses.replace(networks.named("small"), config=config)


def pieces(name: str, spec: ModelInfo, batch_size: int = 1) -> dict[str, work.Work]:
    denoiser = networks.build_random(spec, torch.Generator().manual_seed(0))
    inputs = networks.draw_inputs(spec, 64, batch_size, CPU)
    gathered = gather(name, denoiser, spec)
    return assemble(name, gathered, inputs, spec, torch.float32)


@functools.cache
def estimated(name: str) -> dict[str, tuple[int, int]]:
    return estimate.estimate_peaks(name, info(), 64, 1, torch.float32, False)


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


def test_windows_save_the_scores_of_other_windows() -> None:
    spec = info(text_length=0)
    whole, parts = (
        estimate.count_flops("forward", spec, 96, 2, window)["forward"] for window in (None, 48)
    )
    # Of 6 x 6 patches: sides of 3 and 3 in the first block, shifted to 1, 3 and 2 in the second.
    pairs = 2 * 36**2 - (3**2 + 3**2) ** 2 - (1 + 3**2 + 2**2) ** 2
    assert whole - parts == 2 * 4 * spec.config.width * pairs


@pytest.mark.parametrize("changes", [{"gate": "none"}, {"head_norm": True}])
def test_what_the_plain_transcription_lacks_is_refused(changes: dict) -> None:
    spec = info(adapter=AdapterConfig(**changes))
    with pytest.raises(ValueError, match=r"support adapter\.(gate: none|head_norm: true); use"):
        baseline.check_published(spec.config)


def test_operations_agree_with_torchs_counter() -> None:
    (forward,) = pieces("forward", info()).values()
    # On a CPU the counter of the oldest torch versions only knows this attention kernel.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        forward.run()
    assert estimate.count_flops("forward", info(), 64, 1) == {"forward": counter.get_total_flops()}


def test_a_step_costs_its_evaluations() -> None:
    """A student step: 4 evaluations and 1 backward of the student, two branches of the teacher,
    the fake score, and the teacher's features with a backward."""
    _, evaluation = forward_flops(info(), 64)
    pairs = {**pieces("train", info()), **pieces("dmd2", info())}
    counted = {row: estimate.count_operations(piece.run) for row, piece in pairs.items()}
    assert 2.5 * evaluation < counted["train"] < 3.5 * evaluation
    assert 9 * evaluation < counted["dmd2 student"] < 13 * evaluation
    assert counted["dmd2 critics"] > 4 * evaluation + 2.5 * evaluation


def test_the_floor_is_the_larger_of_its_two_terms() -> None:
    rates = Rates(flops_per_second=100.0, bytes_per_second=10.0)
    assert rates.floor_seconds(500, 20) == 5.0
    assert rates.floor_seconds(100, 20) == 2.0


def test_traffic_counts_weights_inputs_and_what_learns() -> None:
    spec = info()
    (forward,), (train,) = (pieces(name, spec).values() for name in ("forward", "train"))
    train.run()
    num = sum(p.numel() for p in spec.build().parameters())
    learned = sum(p.numel() for p in spec.build().parameters() if p.requires_grad)
    picture = 3 * 64 * 64
    seen = picture + 1 + 16 * 2 * 2 + 1 + 5 * 6  # noise, time, latents, their level, text
    assert forward.traffic_bytes() == 4 * (num + seen + picture)
    num_tensors = sum(p.requires_grad for p in spec.build().parameters())
    # read, written; both moments and the step count read and written; the average likewise
    states = 2 * (2 * learned + num_tensors)
    assert train.traffic_bytes() == 4 * (
        num + learned + states + 2 * num + seen + 2 * picture + 3 * 16 * 16
    )


# ------------------------------------------------------------------- memory


@pytest.mark.slow
def test_what_a_step_keeps_is_counted_exactly() -> None:
    spec = info()
    weights = list(spec.build().parameters())
    num = sum(p.numel() for p in weights)
    learned = sum(p.numel() for p in weights if p.requires_grad)
    num_tensors = sum(p.requires_grad for p in weights)
    inputs = 4 * sum(t.numel() for t in networks.draw_inputs(spec, 64, 1, CPU).tensors())
    moments = 4 * (2 * learned + num_tensors)
    assert estimated("train")["train"][0] == 4 * 2 * num + moments + inputs
    critic = list(Discriminator(spec.config.width, 1).parameters())
    size = sum(p.numel() for p in critic)
    expected = 4 * 3 * num + 2 * num + 4 * size  # student, average, fake score; teacher; critic
    expected += 2 * moments + 4 * (2 * size + len(critic)) + inputs
    for held, _ in estimated("dmd2").values():
        assert held == expected


def test_the_peak_grows_with_the_batch_and_falls_with_checkpointing() -> None:
    spec = info()

    def peak(batch_size: int, recomputes: bool) -> int:
        options = (spec, 64, batch_size, torch.bfloat16, recomputes)
        return estimate.estimate_peaks("train", *options)["train"][1]

    assert peak(1, False) < peak(8, True) < peak(8, False)


@pytest.mark.parametrize("name", ["forward", "train", "dmd2"])
def test_an_estimate_is_what_a_run_holds(name: str) -> None:
    run = pieces(name, info())
    for piece in run.values():
        piece.run()
    for row, piece in run.items():
        held, peak = estimated(name)[row]
        assert piece.held_bytes() == held
        assert piece.held_bytes() + peak_bytes(piece.run) == pytest.approx(peak, rel=0.02)


def test_a_decode_is_estimated_as_the_decoder_does() -> None:
    spec = dataclasses.replace(info(), student_times=STUDENT_TIMES)
    ((_, peak),) = estimate.estimate_peaks("decode", spec, 128, 2, torch.bfloat16, False).values()
    working = estimate_working_memory(spec, 128, 128, None, batch_size=2)
    weights = weight_bytes(networks.build_meta(spec).bfloat16())
    assert peak == pytest.approx(weights + working, rel=0.1)


@pytest.mark.parametrize(("size", "gigabytes"), [(2048, 6), (4096, 12)])
@pytest.mark.parametrize("network", ["full", "full_v15"])
def test_the_published_size_decodes_untiled_within(network: str, size: int, gigabytes: int) -> None:
    spec = networks.named(network)
    weights = weight_bytes(networks.build_meta(spec).bfloat16())
    assert weights + estimate_working_memory(spec, size, size) < gigabytes * 1e9


# ------------------------------------------------------------------- the baseline


@pytest.mark.parametrize(
    "changes", [{}, {"adapter": V15, "num_blocks": 3}, {"rope_reference": None}]
)
def test_baseline_and_ours_are_one_function(changes: dict) -> None:
    spec = info(**changes)
    rebuilt = build_from_arguments(published_arguments(spec))
    assert rebuilt.config == dataclasses.replace(spec.config, learned_null=False)
    denoiser = networks.build_random(spec, torch.Generator().manual_seed(1))
    pair = baseline.build_pair(denoiser, spec, torch.Generator().manual_seed(2))
    inputs = networks.draw_inputs(spec, 64, 2, CPU)
    ours, plain = (forward(network, inputs) for network in pair)
    assert measure.relative_error(plain, measure.exact_velocity(pair[0], inputs)) < 1e-3
    assert measure.relative_error(ours, plain.double()) < 1e-3
    x_t, t = inputs.eps, inputs.t
    features = [
        network.features(
            x_t, t, network.condition(inputs.latents, inputs.latent_sigma, inputs.text), (0, 1)
        )
        for network in pair
    ]
    for mine, theirs in zip(*features, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_critics_and_student_move_their_own_weights() -> None:
    run = pieces("dmd2", info())
    held = run["dmd2 student"].networks
    moved = {}
    for row, piece in run.items():
        names = ("denoiser", "average", "fake_score", "discriminator", "teacher")
        before = {n: [p.clone() for p in getattr(held, n).parameters()] for n in names}
        piece.run()
        moved[row] = {
            n for n in names if not all(map(torch.equal, before[n], getattr(held, n).parameters()))
        }
    assert moved == {
        "dmd2 student": {"denoiser", "average"},
        "dmd2 critics": {"fake_score", "discriminator"},
    }


# ------------------------------------------------------------------- the command


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.safetensors"
    denoiser = networks.build_random(info(), torch.Generator().manual_seed(0))
    save_model(denoiser, info(), path, torch.float32)
    return path


def test_table_and_json_hold_the_same_rows(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "pid_lightning.commands.bench.rates.measure_rates",
        lambda device, dtype: Rates(1e9, 1e9),
    )
    out = tmp_path / "bench.json"
    options = "--work forward train --sizes 64 --dtype float32 --device cpu --repeat 1"
    arguments = [*options.split(), "--baseline", "--check", "--json", str(out)]
    main(["bench", "--model", str(model), *arguments])
    saved = json.loads(out.read_text())
    assert saved["parameters"] == sum(p.numel() for p in info().build().parameters())
    assert saved["machine"]["rates"]["float32"]["flops_per_second"] == 1e9
    rows = saved["rows"]
    assert [(row["work"], row["mode"]) for row in rows] == [
        (name, mode) for name in ("forward", "train") for mode in ("eager", "plain")
    ]
    assert report.format_table(rows) in capsys.readouterr().out
    for row in rows:
        assert row["floor_share"] == pytest.approx(row["floor_seconds"] / row["seconds"])
        assert row["peak_mebibytes"] > row["held_mebibytes"] > 0
    assert [row["ratio_to_plain"] for row in rows[1::2]] == [1, 1]
    assert all(row["relative_error"] < 1e-4 for row in rows[:2])


def test_rows_are_saved_before_memory_runs_out(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "pid_lightning.commands.bench.rates.measure_rates",
        lambda device, dtype: Rates(1e9, 1e9),
    )

    def draw_small_inputs(info: ModelInfo, size: int, *others: object) -> networks.Inputs:
        if size == 128:
            raise torch.OutOfMemoryError
        return draw_inputs(info, size, *others)

    draw_inputs = networks.draw_inputs
    monkeypatch.setattr(rows, "draw_inputs", draw_small_inputs)
    out = tmp_path / "bench.json"
    options = "--work forward --sizes 64 128 32 --dtype float32 --device cpu --repeat 1 --json"
    main(["bench", "--model", str(model), *options.split(), str(out)])
    assert [row["size"] for row in json.loads(out.read_text())["rows"]] == [64, 32]
    assert "out of memory: no rows of this size" in capsys.readouterr().err

    def exact_velocity(*others: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(measure, "exact_velocity", exact_velocity)
    main(["bench", "--model", str(model), *options.split(), str(out), "--check"])
    assert [row["relative_error"] for row in json.loads(out.read_text())["rows"]] == [None, None]
    assert "out of memory in fp64: no errors of this size" in capsys.readouterr().err


def test_work_whose_networks_do_not_fit_is_left_out(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gather_small(name: str, *others: object) -> work.Networks:
        if name == "forward":
            raise torch.OutOfMemoryError
        return gather(name, *others)

    monkeypatch.setattr(rows, "gather", gather_small)
    monkeypatch.setattr(
        "pid_lightning.commands.bench.rates.measure_rates",
        lambda device, dtype: Rates(1e9, 1e9),
    )
    out = tmp_path / "bench.json"
    options = "--work forward decode --sizes 64 --dtype float32 --device cpu --repeat 1 --json"
    main(["bench", "--model", str(model), *options.split(), str(out)])
    assert [row["work"] for row in json.loads(out.read_text())["rows"]] == ["decode"]


def test_eight_bits_and_windows_are_rows_beside_the_exact_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchao", reason="8-bit weights need the extra int8")
    monkeypatch.setattr(
        "pid_lightning.commands.bench.rates.measure_rates",
        lambda device, dtype: Rates(1e9, 1e9),
    )
    out = tmp_path / "bench.json"
    options = "--work decode --sizes 64 --dtype float32 --device cpu --repeat 1 --check"
    int8 = ["--int8", "weights", "products", "--window", "32"]
    main(["bench", "--model", "pid-small-vae-4x", *options.split(), *int8, "--json", str(out)])
    eager, *rounded, windows = json.loads(out.read_text())["rows"]
    assert [row["mode"] for row in rounded] == ["eager int8 weights", "eager int8 products"]
    assert eager["psnr"] is None
    assert windows["mode"] == "eager in windows"
    assert 20 < windows["psnr"] < 60
    assert windows["gflop"] < eager["gflop"]
    assert [row["floor_seconds"] is None for row in rounded] == [False, True]
    for row in rounded:
        assert 40 < row["psnr"] < 80
        assert row["held_mebibytes"] < 0.7 * eager["held_mebibytes"]


def test_attention_is_the_same_by_every_kernel() -> None:
    """Heads of size 8 padded to 16, and heads of size 16 unpadded."""
    drawn = attention.draw_heads(info(), 96, 2, torch.float32, CPU)
    modes = {"patch attention": {"flash", "flash padded to 16"}, "pixel attention": {"flash"}}
    for piece, heads in drawn.items():
        kernels = dict(attention.kernels_for(heads))
        assert kernels.keys() == modes[piece]
        for call in kernels.values():
            assert torch.allclose(call(), attend(*heads), rtol=0, atol=1e-5)


def test_attention_rows_are_asked_for(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "pid_lightning.commands.bench.rates.measure_rates",
        lambda device, dtype: Rates(1e9, 1e9),
    )
    out = tmp_path / "bench.json"
    options = "--work attention --sizes 64 --dtype float32 --device cpu --repeat 1 --json"
    main(["bench", "--model", str(model), *options.split(), str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert {row["work"] for row in rows} == {"patch attention", "pixel attention"}
    assert {"eager", "flash"} <= {row["mode"] for row in rows}
    patches = 16
    tokens = patches + TINY.text_length
    flops = {row["work"]: row["gflop"] * 1e9 for row in rows}
    assert flops["patch attention"] == pytest.approx(4 * tokens**2 * TINY.width)
    assert flops["pixel attention"] == pytest.approx(4 * patches**2 * TINY.pixel_attention_width)


def test_an_estimate_needs_no_measurement(model: Path, capsys: pytest.CaptureFixture) -> None:
    options = "--estimate --work forward --sizes 64"
    main(["bench", "--model", str(model), *options.split()])
    table = capsys.readouterr().out
    assert "seconds" not in table
    assert "peak MiB" in table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--sizes 100", "size: 100 x 100 is not a multiple of"),
        ("--sizes 0", "sizes: 0 must be at least 1"),
        ("--repeat 0", "--repeat: 0 must be at least 1"),
        ("--estimate --baseline", "leave out --baseline or --estimate"),
        ("--check --work train", "add one of them to --work"),
        ("--int8 weights --work dmd2", "add one of them to --work"),
        ("--freeze --work train", "add one of them to --work"),
        ("--cuda_graphs --work attention", "add one of them to --work"),
        ("--cuda_graphs --device cpu", "leave it out on a CPU"),
        ("--window 100", "use 96"),
        ("--window 64 --work train", "add one of them to --work"),
        ("--compile --work attention", "adds no rows for attention"),
        ("--activation_checkpointing on --work decode", "only for train and dmd2"),
        ("--estimate --work attention", "attention can only be measured"),
        ("--model pid-small-vae-4x --baseline", "use --network full or small"),
        ("--json .", "--json: . is a folder; name a file"),
        ("--json /proc/none/rows.json", "--json: cannot write to folder /proc/none"),
        ("--model no_such_model.safetensors", "was not found"),
        ("--device cuda", "device: 'cuda' is not available on this machine"),
    ],
)
def test_mistakes_are_one_sentence(
    arguments: str, message: str, capsys: pytest.CaptureFixture
) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(SystemExit) as stopped:
        main(["bench", *arguments.split()])
    captured = capsys.readouterr()
    assert stopped.value.code == 2
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_without_the_tests_folder_there_is_no_baseline(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="run from a clone"):
        baseline.load_plain(tmp_path / "tests" / "plain.py")
