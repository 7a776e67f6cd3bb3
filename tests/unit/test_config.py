"""Options and the settings derived from them; messages are tested in tests/errors."""

import dataclasses
import json

import pytest

from echokv_vllm.config import EchoConfig, SchedulerSettings, check_mode


def parse(**section):
    return EchoConfig.parse({"echokv": {"checkpoint": "folder", **section}})


def test_only_the_checkpoint_is_needed():
    config = parse()
    assert config.checkpoint == "folder"
    assert config.mode == "auto"
    assert config.restore_below < config.admit_full_below


def test_every_option_is_taken_over():
    section = dict(
        checkpoint="owner/name", revision="v1", mode="compressed", recent_tokens=0,
        admit_full_below=1, restore_below=0.0, restore_steps=1, strict_prefix_caching=True,
        look_ahead=False, step_kinds=False,
    )  # fmt: skip
    assert set(section) == {field.name for field in dataclasses.fields(EchoConfig)}
    assert dataclasses.asdict(EchoConfig.parse({"echokv": section, "other": 1})) == section


@pytest.mark.parametrize(
    ("mode", "given", "strict"),
    [
        ("auto", None, True),
        ("full", None, True),
        ("compressed", None, False),
        ("compressed", True, True),
        ("auto", False, False),
    ],
)
def test_prefix_caching_is_strict_unless_the_server_always_compresses(mode, given, strict):
    assert parse(mode=mode, strict_prefix_caching=given).strict is strict


@pytest.mark.parametrize("mode", ["auto", "full", "compressed"])
def test_the_three_modes_pass(mode):
    assert check_mode(mode, "x") == mode


def settings(**changes):
    values = dict(
        mode="auto", recent_tokens=128, admit_full_below=0.9, restore_below=0.7, restore_steps=64,
        strict=True, look_ahead=True, watermark=0.0, retained_block_size=16, residual_block_size=16,
        plan="local-0.5", ratio=0.5,
    )  # fmt: skip
    return SchedulerSettings(**{**values, **changes})


def test_settings_survive_the_journey_inside_a_spec():
    before = settings(watermark=0.01)
    text = before.to_json()
    assert SchedulerSettings.from_json(text) == before
    assert json.loads(text)["watermark"] == 0.01
    assert hash(text) == hash(before.to_json())


def simulated_floor(num_tokens, recent_tokens, block_size):
    """Most D pages held while tokens arrive one by one and the window lags one step."""
    worst = 0
    for length in range(1, num_tokens + 1):
        oldest = max(0, length - 1 - recent_tokens) // block_size
        pages = {0} | set(range(oldest, -(-length // block_size)))
        worst = max(worst, len(pages))
    return worst


@pytest.mark.parametrize("recent_tokens", [0, 1, 16, 100, 128])
@pytest.mark.parametrize("block_size", [16, 48])
def test_floor_covers_what_a_decoding_compressed_request_holds(recent_tokens, block_size):
    sizes = settings(recent_tokens=recent_tokens, residual_block_size=block_size)
    for num_tokens in (1, block_size, block_size + 1, 700):
        floor = sizes.floor_pages(num_tokens)
        assert floor >= simulated_floor(num_tokens, recent_tokens, block_size)
        assert floor <= -(-num_tokens // block_size), "more pages than a full request"
    assert sizes.floor_pages(10**6) == sizes.floor_pages(10**5), "the floor must not grow"
