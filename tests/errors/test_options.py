"""Error table, options of ``--additional-config``: the value, what is allowed, the way out."""

import pytest

from echokv_vllm.config import EchoConfig, EchoConfigError
from echokv_vllm.plan import PlanError
from echokv_vllm.presets import preset_plan
from echokv_vllm.worker.rank_plan import rank_layers

ROWS = [
    # echokv section, fragments of the message
    ({"recent": 3}, ["'recent'", "recent_tokens", "docs/configuration.md"]),
    ({"Mode": "full", "x": 1}, ["'Mode', 'x'", "allowed are checkpoint, revision, mode"]),
    ({"checkpoint": 7}, ["echokv.checkpoint is 7", "type str"]),
    ({"revision": 2}, ["echokv.revision is 2", "type str"]),
    ({"mode": "fast"}, ["'fast'", "'auto', 'full' and 'compressed'", "Leave it out"]),
    ({"mode": None}, ["None", "'auto', 'full' and 'compressed'"]),
    ({"recent_tokens": -1}, ["recent_tokens is -1", "0 or more"]),
    ({"recent_tokens": 1.5}, ["recent_tokens is 1.5", "type int"]),
    ({"recent_tokens": True}, ["recent_tokens is True", "type int"]),
    ({"admit_full_below": 1.01}, ["admit_full_below is 1.01", "[0, 1]"]),
    ({"admit_full_below": "0.5"}, ["admit_full_below is '0.5'", "int or float"]),
    ({"restore_below": -0.1}, ["restore_below is -0.1", "[0, 1]"]),
    ({"restore_below": float("nan")}, ["restore_below is nan", "[0, 1]"]),
    ({"restore_below": 0.95}, ["0.95", "admit_full_below (0.9)", "Lower restore_below"]),
    ({"restore_steps": 0}, ["restore_steps is 0", "1 or more"]),
    ({"restore_steps": "64"}, ["restore_steps is '64'", "type int"]),
    ({"step_kinds": "no"}, ["step_kinds is 'no'", "type bool"]),
    ({"strict_prefix_caching": 1}, ["strict_prefix_caching is 1", "type bool"]),
]


@pytest.mark.parametrize(("section", "fragments"), ROWS)
def test_option(section, fragments):
    with pytest.raises(EchoConfigError) as caught:
        EchoConfig.parse({"echokv": {"checkpoint": "folder", **section}})
    for fragment in fragments:
        assert fragment in str(caught.value)


@pytest.mark.parametrize(
    ("additional_config", "fragments"),
    [
        ({}, ["--additional-config", '{"echokv": {"checkpoint"', "echokv train"]),
        (None, ["--additional-config", "echokv train"]),
        ({"echo": {"checkpoint": "x"}}, ["--additional-config"]),
        ({"echokv": "folder"}, ["'folder'", "must be an object"]),
        ({"echokv": {"mode": "full"}}, ["echokv.checkpoint is missing", "echokv train"]),
    ],
)
def test_section(additional_config, fragments):
    with pytest.raises(EchoConfigError) as caught:
        EchoConfig.parse(additional_config)
    for fragment in fragments:
        assert fragment in str(caught.value)


@pytest.mark.parametrize(("shards", "tp_size"), [(1, 2), (2, 4)])
def test_plan_whose_shards_do_not_fit_the_tensor_parallel_size(shards, tp_size):
    plan = preset_plan("local-0.5", 2, 8, shards)
    with pytest.raises(ValueError) as caught:
        rank_layers(plan, 0, tp_size)
    message = str(caught.value)
    assert f"'local-0.5' has {shards} head shard(s)" in message
    assert f"--tensor-parallel-size {tp_size}" in message
    assert f"train with --shards {tp_size}" in message


@pytest.mark.parametrize("tp_size", [3, 16])
def test_ranks_that_cannot_share_the_heads_at_all(tp_size):
    """No training helps: heads are whole, and a rank without any of its own would copy others'."""
    with pytest.raises(ValueError) as caught:
        rank_layers(preset_plan("local-0.5", 2, 8, 2), 0, tp_size)
    message = str(caught.value)
    assert f"--tensor-parallel-size {tp_size}" in message and "8 KV heads" in message
    assert "divides 2" in message and "--shards" not in message


@pytest.mark.parametrize(
    ("name", "num_kv_heads", "shards", "fragments"),
    [
        ("local-0.5", 8, 3, ["4 of 8 KV heads", "shards=3", "choose a shard count"]),
        ("local-0.25", 8, 4, ["2 of 8 KV heads", "shards=4"]),
        ("local-0.5", 1, 1, ["of 1 KV heads", "choose R"]),
        ("half", 8, 1, ["'half'", "local-R", "JSON file"]),
    ],
)
def test_plan_that_does_not_divide_the_heads(name, num_kv_heads, shards, fragments):
    with pytest.raises(PlanError) as caught:
        preset_plan(name, 2, num_kv_heads, shards)
    for fragment in fragments:
        assert fragment in str(caught.value)
