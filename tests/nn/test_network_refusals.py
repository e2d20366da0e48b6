"""Every mistake that the networks refuse, by the option it names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import networks
import pytest
import torch

from pid_lightning.checks import Mistake
from pid_lightning.nn import AdapterConfig, Geometry, PiD, PiDConfig
from pid_lightning.nn.changes import CONSEQUENCES, check_allowed
from pid_lightning.nn.compilation import compile_for_inference
from pid_lightning.nn.fixed_times import fix_times
from pid_lightning.nn.freezing import freeze_untrained

RGB = AdapterConfig(width=16, rgb_head=True)
SIGMA = torch.zeros(1)


def network(geometry: tuple[int, int, int] = (4, 8, 4), unpack: int = 1, **changes: object) -> PiD:
    adapter = AdapterConfig(width=16, num_res_blocks=1, unpack=unpack)
    config = networks.config(**({"adapter": adapter, "learned_null": False} | changes))
    with torch.device("meta"):
        return PiD(config, Geometry(*geometry))


def condition(denoiser: PiD, size: tuple[int, int] = (2, 2), **options: object) -> object:
    return denoiser.condition(torch.zeros(1, 4, *size, device="meta"), SIGMA.to("meta"), **options)


def text(length: int) -> torch.Tensor:
    return torch.zeros(1, length, 2304, device="meta")


def call_at_another_size() -> None:
    denoiser = networks.random_network()
    denoiser(torch.zeros(1, 3, 64, 32), SIGMA, denoiser.condition(torch.zeros(1, 16, 2, 2), SIGMA))


REFUSALS: list[tuple[str, Callable[[], object]]] = [
    ("prediction", lambda: PiDConfig(prediction="eps")),
    ("text_length", lambda: PiDConfig(text_length=-1)),
    ("num_blocks", lambda: PiDConfig(num_blocks=0)),
    ("width", lambda: PiDConfig(width=36, num_heads=2)),
    ("pixel_attention_width", lambda: PiDConfig(pixel_attention_width=20, pixel_num_heads=2)),
    ("pixel_width", lambda: PiDConfig(pixel_width=6)),
    ("adapter.gate", lambda: AdapterConfig(gate="sigma")),
    ("adapter.padding", lambda: AdapterConfig(padding="reflect")),
    ("adapter.upsampling", lambda: AdapterConfig(upsampling="bilinear")),
    ("adapter.native", lambda: AdapterConfig(native="flux2")),
    ("adapter.width", lambda: AdapterConfig(width=10)),
    ("adapter.rgb_head_block", lambda: AdapterConfig(num_res_blocks=2, rgb_head_block=3)),
    ("adapter.interval", lambda: AdapterConfig(interval=0)),
    ("adapter.unpack", lambda: AdapterConfig(unpack=0)),
    ("adapter.unpack", lambda: network((6, 16, 4), unpack=2)),  # channels are no multiple of 4
    ("adapter.unpack", lambda: network((9, 8, 4), unpack=3)),  # nor is the stride one of 3
    ("scale", lambda: network((4, 8, 0))),
    ("scale", lambda: network((4, 8, 3))),  # 24 pixels a cell, 16 a patch
    ("patch_size", lambda: network((4, 16, 3), adapter=RGB)),
    ("size", lambda: network().check_size(64, 80)),
    ("size", lambda: network().check_size(-32, 32)),
    ("size", lambda: network().check_size(0, 32)),
    ("size", lambda: condition(network((4, 2, 4)), (3, 4))),  # half a patch
    ("x_t", call_at_another_size),
    ("text", lambda: condition(network(), text=text(3))),
    ("text", lambda: condition(network(text_length=3))),
    ("text", lambda: condition(network(text_length=3, learned_null=True), text=text(2),
                               keep_text=torch.ones(1, dtype=torch.bool))),
    *(("window", lambda size=size: network().attend_in_windows(size)) for size in (100, 16, 0, -8)),
    ("window", lambda: network().attend_in_windows(64.0)),
    ("fix_times", lambda: fix_times(network(), None)),
    ("cuda_graphs", lambda: compile_for_inference(network(), cuda_graphs=True)),
    ("model.training.train", lambda: freeze_untrained(network(), "rgb_head", True)),
    ("model.training.train", lambda: freeze_untrained(network(), "gates", True)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("option", "mistake"), REFUSALS, ids=[f"{i}_{option}" for i, (option, _) in enumerate(REFUSALS)]
)
def test_a_mistake_names_its_option(option: str, mistake: Callable[[], object]) -> None:
    with pytest.raises(Mistake) as told:
        mistake()
    assert told.value.option == option


def test_a_mend_that_is_offered_is_accepted() -> None:
    for size in (100, 16, 0, -8):
        with pytest.raises(Mistake) as told:
            network().attend_in_windows(size)
        network().attend_in_windows(int(told.value.sentence.split()[-1].rstrip(".")))


@pytest.mark.parametrize("asked", ["fix_times", "quantise", "compile", "freeze", "dtype", "save"])
@pytest.mark.parametrize("change", CONSEQUENCES)
def test_what_a_change_rules_out(change: str, asked: str) -> None:
    """What is gone or in 8 bits is not saved, and what graphs hold does not change."""
    lost = change in ("fix_times", "quantise") and asked in (change, "save")
    stored_otherwise = change == "quantise" and asked == "dtype"
    unseen = change == "freeze" and asked in ("fix_times", "quantise", "dtype")
    if lost or stored_otherwise or unseen:
        with pytest.raises(Mistake) as told:
            check_allowed(("compile", change), asked)
        assert told.value.option == asked
    else:
        check_allowed(("compile", change), asked)


def test_changes_are_written_on_the_network_and_its_copies_apart() -> None:
    import copy

    denoiser = networks.random_network()
    twin = copy.copy(denoiser)
    fix_times(twin, (0.9, 0.5))
    compile_for_inference(twin)
    assert twin.changes == ("fix_times", "compile")
    compile_for_inference(twin, freeze=True)
    assert twin.changes == ("fix_times", "freeze")
    assert denoiser.changes == ()


def test_replacing_a_config_checks_it_again() -> None:
    with pytest.raises(Mistake) as told:
        dataclasses.replace(networks.config(), pixel_width=5)
    assert told.value.option == "pixel_width"
