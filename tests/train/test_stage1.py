"""Closed-form stage I: schedule, key space, and recovery of relations that hold exactly."""

from __future__ import annotations

import pytest
import torch

from echokv_vllm.plan import EchoPlan, LayerPlan, Source
from echokv_vllm.presets import preset_plan
from echokv_vllm.quantization import as_cached
from echokv_vllm.rope import rotary_from_config
from echokv_vllm.train.options import TrainOptions
from echokv_vllm.train.stage1 import LayerSchedule, LayerStream, Samples, block_shift, stream
from echokv_vllm.train.stages import fit_and_measure

HEAD_DIM = 8


def _sequences(num_sequences=24, length=48, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_sequences, length), generator=generator, dtype=torch.int32)


def _options(**changes):
    settings = dict(model="", data="", out="", ridge=1e-13, batch_size=5, progress=False)
    return TrainOptions(**{**settings, **changes})


def _fit(model, plan, max_position=100_000, num_sequences=24, **changes):
    sequences = _sequences(num_sequences + 4)
    return fit_and_measure(
        model,
        plan,
        sequences[:num_sequences],
        sequences[num_sequences:],
        _options(**changes),
        max_position,
    )


def _rotation_scaling(generator):
    """Random [HEAD_DIM, HEAD_DIM] map that commutes with every rotation: one complex number per
    frequency, in the half-split layout."""
    real, imaginary = torch.randn(2, HEAD_DIM // 2, generator=generator)
    real, imaginary = torch.diag(real), torch.diag(imaginary)
    return torch.cat([torch.cat([real, -imaginary], 1), torch.cat([imaginary, real], 1)])


def _tie_heads(model, plan, commuting=True):
    """Make the discarded K and V projections linear in the retained ones of the same shard."""
    generator = torch.Generator().manual_seed(9)
    for index, block in enumerate(model.model.layers):
        for name in ("k_proj", "v_proj"):
            weight = getattr(block.self_attn, name).weight.data.view(-1, HEAD_DIM, 32)
            for head in plan.discarded(index):
                weight[head] = 0
                for _, source in plan.source_heads(index, plan.shard_of(head)):
                    mix = torch.randn(HEAD_DIM, HEAD_DIM, generator=generator)
                    if commuting:
                        mix = _rotation_scaling(generator)
                    weight[head] += mix @ weight[source]


@pytest.mark.parametrize("rotation_block", [0, 1, 16, 64])
@pytest.mark.parametrize(("architecture", "shards"), [("Llama", 1), ("Mistral", 2)])
def test_relations_that_commute_with_rotation_are_found_in_every_key_space(
    tiny_model, architecture, shards, rotation_block
):
    model = tiny_model(architecture)
    plan = preset_plan("local-0.5", 3, 4, shards)
    _tie_heads(model, plan)
    maps, errors = _fit(model, plan, rotation_block=rotation_block)
    for layer in range(3):
        assert max(errors[layer].key, errors[layer].key_fit) < 1e-8
        assert max(errors[layer].value, errors[layer].value_fit) < 1e-8
        assert maps[layer].key.shape == (2, 2 * HEAD_DIM // shards, HEAD_DIM)


def test_other_linear_relations_hold_for_unrotated_keys_only(tiny_model):
    model = tiny_model()
    plan = preset_plan("local-0.5", 3, 4)
    _tie_heads(model, plan, commuting=False)
    _, unrotated = _fit(model, plan, rotation_block=1)
    _, short_blocks = _fit(model, plan, rotation_block=16)
    _, absolute = _fit(model, plan, rotation_block=0)
    for layer in range(3):
        assert unrotated[layer].key < 1e-8 and unrotated[layer].value < 1e-8
        assert short_blocks[layer].value < 1e-8, "values do not depend on the key space"
        assert 1e-3 < short_blocks[layer].key < absolute[layer].key


def test_offsets_spread_positions_over_the_asked_range(tiny_model):
    """Absolute rotation looks better than it is when calibration sees short positions only."""
    model = tiny_model()
    plan = preset_plan("local-0.5", 3, 4)
    _tie_heads(model, plan, commuting=False)
    _, near = _fit(model, plan, rotation_block=0, max_position=48)
    _, far = _fit(model, plan, rotation_block=0, max_position=100_000)
    assert all(near[layer].key < far[layer].key for layer in range(3))


def test_random_heads_are_not_rebuilt(tiny_model):
    _, errors = _fit(tiny_model(), preset_plan("local-0.5", 3, 4), rotation_block=64)
    assert min(found.key for found in errors.values()) > 0.02
    assert min(found.value for found in errors.values()) > 0.02


def test_bias_rebuilds_constant_parts(tiny_model):
    model = tiny_model("Qwen2")
    plan = preset_plan("local-0.5", 3, 4)
    _tie_heads(model, plan)
    for block in model.model.layers:
        block.self_attn.v_proj.bias.data.normal_(0, 2.0)
    maps, without = _fit(model, plan)
    assert maps[0].value_bias is None and maps[0].key_bias is None
    maps, with_bias = _fit(model, plan, bias=True)
    assert maps[0].value_bias.shape == (2, HEAD_DIM)
    for layer in range(3):
        assert with_bias[layer].value < 1e-8 < 1e-3 < without[layer].value


def _cross_layer_plan():
    """Layer 0 reads a later layer, layer 2 both neighbours; heads out of order on purpose."""
    return EchoPlan(
        "cross",
        4,
        (
            LayerPlan((3, 0), (Source(2, (1,)), Source(0, (0,)))),
            LayerPlan((0, 1, 2, 3)),
            LayerPlan((2, 1), (Source(1, (3, 0)), Source(2, (1,)))),
            LayerPlan((0, 1, 2, 3)),
        ),
    )


def test_schedule_visits_when_all_is_there_and_drops_at_once():
    schedule = LayerSchedule(_cross_layer_plan())
    assert schedule.visit_after == [[], [], [0, 2], []]
    assert schedule.drop_after == [[], [], [0, 1, 2], []]
    assert schedule.needed == {0, 1, 2}
    groups = LayerSchedule(preset_plan("paper-0.3", 7, 8))
    assert groups.visit_after == [[], [1], [2], [3], [4], [], [6]]
    assert groups.drop_after == [[], [1], [2], [3], [0, 4], [], [5, 6]]


class _Recorder:
    def __init__(self):
        self.samples: dict[tuple[int, int], list[Samples]] = {}
        self.most_held = 0
        self.stream: LayerStream | None = None

    def __call__(self, layer, shard, samples):
        self.samples.setdefault((layer, shard), []).append(samples)
        self.most_held = max(self.most_held, self.stream.num_held)


def _record(model, plan, sequences, offsets, rotation_block, batch_size=3):
    recorder = _Recorder()
    rotary = rotary_from_config(model.config)
    recorder.stream = LayerStream(plan, rotary, rotation_block, recorder)
    stream(model, sequences, offsets, batch_size, recorder.stream, lambda batches: batches)
    assert recorder.stream.num_held == 0
    return recorder


@pytest.mark.parametrize("rotation_block", [0, 1, 16])
def test_samples_are_the_keys_a_server_would_see(tiny_model, rotation_block):
    """Keys of positions shifted by the offset, rotated back to the start of their block."""
    model = tiny_model(num_layers=4)
    plan = _cross_layer_plan()
    sequences = _sequences(num_sequences=4, length=37)
    offsets = torch.tensor([0, 5, 777, 90_001])
    found = _record(model, plan, sequences, offsets, rotation_block)
    assert found.most_held == 3
    rotary = rotary_from_config(model.config)
    for first in (0, 3):
        rows = slice(first, first + 3)
        positions = torch.arange(37) + offsets[rows, None]
        with torch.inference_mode():
            cache = model(
                sequences[rows].long(), position_ids=positions, use_cache=True
            ).past_key_values.layers
        starts = positions - positions % rotation_block if rotation_block else 0 * positions

        def heads(tensor, pick):
            tensor = tensor.transpose(1, 2).flatten(0, 1)
            return torch.cat([tensor[:, head] for head in pick], 1)

        def keys(layer, pick, starts=starts, cache=cache):
            back = rotary.rotate(cache[layer].keys.transpose(1, 2), -starts)
            return heads(back.transpose(1, 2), pick)

        batch = first // 3
        zero, two = found.samples[0, 0][batch], found.samples[2, 0][batch]
        # float32 angles of the model limit the agreement at far positions.
        close = dict(rtol=0, atol=0.05)
        torch.testing.assert_close(
            zero.key_inputs, torch.cat([keys(2, [1]), keys(0, [0])], 1), **close
        )
        torch.testing.assert_close(zero.key_targets, keys(0, [1, 2]), **close)
        torch.testing.assert_close(
            two.key_inputs, torch.cat([keys(1, [3, 0]), keys(2, [1])], 1), **close
        )
        torch.testing.assert_close(
            two.value_inputs,
            torch.cat([heads(cache[1].values, [3, 0]), heads(cache[2].values, [1])], 1),
            **close,
        )
        torch.testing.assert_close(two.value_targets, heads(cache[2].values, [0, 3]), **close)


@pytest.mark.parametrize("cache_format", ["fp8", "int4"])
def test_inputs_are_as_cached_and_targets_exact(tiny_model, cache_format):
    """Keys are coded after RoPE, as they lie in the cache, and only then rotated back."""
    model = tiny_model()
    plan = preset_plan("local-0.5", 3, 4)
    sequences, offsets = _sequences(2, 20), torch.tensor([0, 0])
    rotary = rotary_from_config(model.config)
    exact = _record(model, plan, sequences, offsets, 1).samples[1, 0][0]
    found = []
    layers = LayerStream(plan, rotary, 1, lambda *sample: found.append(sample), cache_format)
    stream(model, sequences, offsets, 2, layers, lambda batches: batches)
    coded = next(samples for layer, _, samples in found if layer == 1)
    assert torch.equal(coded.key_targets, exact.key_targets)
    assert torch.equal(coded.value_targets, exact.value_targets)

    def heads(flat):
        return flat.view(2, 20, 2, HEAD_DIM)

    assert torch.equal(
        heads(coded.value_inputs), as_cached(heads(exact.value_inputs), cache_format)
    )
    at = torch.arange(20)
    cached = as_cached(rotary.rotate(heads(exact.key_inputs), at), cache_format)
    difference = heads(coded.key_inputs) - rotary.rotate(cached, -at)
    assert difference.abs().mean() < 1e-3 < (coded.key_inputs - exact.key_inputs).abs().mean()


def test_shards_see_their_own_heads_in_order(tiny_model):
    model = tiny_model()
    sequences, offsets = _sequences(2, 20), torch.tensor([3, 40])
    sharded = preset_plan("local-0.5", 3, 4, shards=2)
    whole = EchoPlan("whole", 4, sharded.layers)
    parts = _record(model, sharded, sequences, offsets, 16).samples
    full = _record(model, whole, sequences, offsets, 16).samples
    assert sorted(parts) == [(layer, shard) for layer in range(3) for shard in range(2)]
    for layer in range(3):
        for name in ("key_inputs", "key_targets", "value_inputs", "value_targets"):
            halves = [getattr(parts[layer, shard][0], name) for shard in range(2)]
            assert torch.equal(torch.cat(halves, 1), getattr(full[layer, 0][0], name))


def test_only_layers_in_use_are_held(tiny_model):
    model = tiny_model(num_layers=6)
    plan = preset_plan("paper-0.5", 6, 4)
    found = _record(model, plan, _sequences(4, 16), torch.zeros(4, dtype=torch.int64), 16)
    assert found.most_held == 2, "an anchor and the layer it feeds"


def test_block_shift():
    positions, offsets = torch.arange(6), torch.tensor([0, 5])
    assert block_shift(positions, offsets, 4).tolist() == [
        [0, 0, 0, 0, -4, -4],
        [1, 1, 1, -3, -3, -3],
    ]
    assert (block_shift(positions, offsets, 1) == -positions).all()
    assert block_shift(positions, offsets, 0).tolist() == [[0] * 6, [5] * 6]


def test_batch_size_does_not_change_the_maps(tiny_model):
    model = tiny_model()
    plan = preset_plan("paper-0.7", 3, 4)
    one, _ = _fit(model, plan, batch_size=1, ridge=1e-4)
    many, _ = _fit(model, plan, batch_size=24, ridge=1e-4)
    torch.testing.assert_close(one[1].key, many[1].key, rtol=1e-3, atol=1e-4)


def test_singular_systems_name_the_layer(tiny_model):
    model = tiny_model()
    values = model.model.layers[1].self_attn.v_proj.weight.data
    values[0] = values[1]  # of head 0, from which others are rebuilt
    with pytest.raises(ValueError, match=r"layer 1: .* ridge=0\.0 .* raise the ridge"):
        _fit(model, preset_plan("local-0.5", 3, 4), ridge=0.0)
