"""Echo plans: presets, bookkeeping, strict parsing and validation."""

import json

import pytest

from echokv_vllm.plan import EchoPlan, LayerPlan, PlanError, Source
from echokv_vllm.presets import load_plan, preset_plan


@pytest.mark.parametrize(
    ("name", "num_layers", "num_kv_heads", "shards", "ratio"),
    [
        ("local-0.5", 32, 8, 1, 0.5),
        ("local-0.5", 32, 8, 4, 0.5),
        ("local-0.25", 3, 8, 2, 0.25),
        ("local-0.75", 3, 4, 1, 0.75),
        ("paper-0.5", 32, 8, 1, 0.5),
        ("paper-0.5", 32, 8, 8, 0.5),
        ("paper-0.7", 32, 8, 1, (8 + 3) / 16),
        ("paper-0.3", 30, 8, 1, (8 + 4 * 1) / 40),
        # 32 layers leave a last group of two.
        ("paper-0.3", 32, 8, 1, (7 * 8 + 25) / 256),
        ("paper-0.7", 32, 2, 1, 3 / 4),
        ("paper-0.7", 32, 16, 2, (16 + 6) / 32),
    ],
)
def test_preset_ratio(name, num_layers, num_kv_heads, shards, ratio):
    plan = preset_plan(name, num_layers, num_kv_heads, shards)
    assert plan.ratio == pytest.approx(ratio)
    assert plan.num_layers == num_layers


@pytest.mark.parametrize(
    ("name", "read"), [("local-0.5", 0.5), ("paper-0.5", 1.0), ("paper-0.7", (8 + 11) / 16)]
)
def test_heads_read_by_decode(name, read):
    assert preset_plan(name, 4, 8).read_ratio == pytest.approx(read)


def test_a_retained_head_that_is_no_source_is_read_too():
    layers = LayerPlan((0, 1), (Source(0, (1,)),)), LayerPlan((2,), (Source(0, (0,)),))
    assert _plan(*layers).read_ratio == (2 + 2) / 8


def test_local_preset_interleaves_shards():
    plan = preset_plan("local-0.5", 2, 8, shards=2)
    assert plan.layers[1].retained == (0, 1, 4, 5)
    assert plan.discarded(1) == (2, 3, 6, 7)
    assert plan.source_heads(1) == [(1, 0), (1, 1), (1, 4), (1, 5)]
    assert plan.source_heads(1, shard=1) == [(1, 4), (1, 5)]
    assert [plan.shard_of(head) for head in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]


def test_paper_preset_reads_the_anchor_first_then_its_own_heads():
    plan = preset_plan("paper-0.7", 4, 8)
    assert plan.discarded(2) == () and plan.layers[2].sources == ()
    assert plan.layers[3].sources == (Source(2, tuple(range(8))), Source(3, (0, 1, 2)))
    assert preset_plan("paper-0.5", 2, 8).layers[1].sources == (Source(0, tuple(range(8))),)


def test_dict_round_trip_survives_json():
    for plan in (preset_plan("paper-0.3", 7, 8), preset_plan("local-0.5", 2, 8, 4)):
        assert EchoPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def _plan(*layers, heads=4, **settings):
    return EchoPlan("test", heads, tuple(layers), **settings)


_FULL = LayerPlan((0, 1, 2, 3))
_HALF = LayerPlan((0, 1), (Source(0, (0, 1)),))


def test_retained_order_and_later_source_layers_are_free():
    plan = _plan(LayerPlan((3, 1), (Source(1, (2, 0)), Source(0, (1,)))), _FULL)
    assert plan.discarded(0) == (0, 2)
    assert plan.source_heads(0) == [(1, 2), (1, 0), (0, 1)]


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: _plan(), ["no layers"]),
        (lambda: _plan(_FULL), ["discards no head", "retain fewer than 4"]),
        (lambda: _plan(_HALF, shards=3), ["shards=3", "divide", "num_kv_heads=4"]),
        (lambda: _plan(_HALF, shards=0), ["shards=0"]),
        (lambda: _plan(_HALF, residual_bits=2), ["residual_bits=2", "only allowed value is 0"]),
        (lambda: _plan(_HALF, shards=2), ["layer 0 retained", "[2, 0]", "equally many"]),
        (lambda: _plan(LayerPlan((0, 4), (Source(0, (0,)),))), ["layer 0", "head 4", "0..3"]),
        (lambda: _plan(LayerPlan((0, -1), (Source(0, (0,)),))), ["head -1"]),
        (lambda: _plan(LayerPlan((1, 1), (Source(0, (1,)),))), ["layer 0 retained", "twice"]),
        (lambda: _plan(LayerPlan((0,))), ["layer 0", "[1, 2, 3]", "no source"]),
        (lambda: _plan(_HALF, LayerPlan((0, 1, 2, 3), (Source(0, (0,)),))), ["layer 1", "nothing"]),
        (
            lambda: _plan(LayerPlan((0, 1), (Source(0, (2,)),))),
            ["head 2", "not retained", "[0, 1]"],
        ),
        (lambda: _plan(LayerPlan((0, 1), (Source(1, (0,)),))), ["source layer 1", "0..0"]),
        (lambda: _plan(LayerPlan((0, 1), (Source(0, ()),))), ["names no heads"]),
        (
            lambda: _plan(LayerPlan((0, 1), (Source(0, (0,)), Source(0, (0, 1))))),
            ["layer 0 sources", "twice"],
        ),
        (
            lambda: _plan(LayerPlan((0, 2), (Source(0, (0,)),)), shards=2),
            ["layer 0 sources", "[1, 0]"],
        ),
        (lambda: preset_plan("local-0.5", 2, 1), ["would keep 0 of 1"]),
        (lambda: preset_plan("local-0.99", 2, 8), ["would keep 8 of 8", "1..7"]),
        (lambda: preset_plan("local-1.5", 2, 8), ["'1.5'", "between 0 and 1"]),
        (lambda: preset_plan("local-half", 2, 8), ["'half'"]),
        (lambda: preset_plan("paper-0.6", 2, 8), ["paper-0.6", "paper-0.5", "local-R"]),
        (lambda: preset_plan("paper-0.7", 2, 8, 2), ["3 of 8", "shards=2", "divide"]),
        (lambda: preset_plan("local-0.5", 2, 6, 4), ["shards=4"]),
        (lambda: preset_plan("paper-0.5", 1, 8), ["discards no head"]),
        (lambda: preset_plan("local-0.5", 0, 8), ["num_layers=0"]),
    ],
)
def test_invalid_plans_name_the_problem(build, words):
    with pytest.raises(PlanError) as caught:
        build()
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(colour="red"), ["unknown keys ['colour']"]),
        (lambda d: d.pop("layers"), ["missing keys ['layers']"]),
        (lambda d: d.update(num_kv_heads="8"), ["num_kv_heads", "'8'"]),
        (lambda d: d.update(num_kv_heads=True), ["num_kv_heads", "True"]),
        (lambda d: d.update(name=3), ["name", "3"]),
        (lambda d: d.update(layers={}), ["layers must be a list"]),
        (lambda d: d["layers"][0].update(kept=[0]), ["layer 0", "unknown keys ['kept']"]),
        (lambda d: d["layers"][0].update(retained=[0.0]), ["layer 0 retained", "0.0"]),
        (lambda d: d["layers"][0]["sources"][0].pop("heads"), ["missing keys ['heads']"]),
    ],
)
def test_from_dict_is_strict(change, words):
    data = preset_plan("local-0.5", 2, 4).to_dict()
    change(data)
    with pytest.raises(PlanError) as caught:
        EchoPlan.from_dict(data)
    for word in words:
        assert word in str(caught.value)


def test_from_dict_wants_an_object():
    with pytest.raises(PlanError, match="JSON object"):
        EchoPlan.from_dict([])  # type: ignore[arg-type]


def test_load_plan_reads_presets_and_files(tmp_path):
    assert load_plan("local-0.5", 2, 4).name == "local-0.5"
    plan = preset_plan("local-0.5", 2, 4, shards=2)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan.to_dict()))
    assert load_plan(str(path), 2, 4) == load_plan(str(path), 2, 4, shards=2) == plan
    with pytest.raises(PlanError, match="3 layers of 4"):
        load_plan(str(path), 3, 4)
    with pytest.raises(PlanError, match=r"shards=4 .* shards=2"):
        load_plan(str(path), 2, 4, shards=4)
    path.write_text("{")
    with pytest.raises(PlanError, match="not valid JSON"):
        load_plan(str(path), 2, 4)
    with pytest.raises(PlanError, match="does not exist"):
        load_plan(str(tmp_path / "absent.json"), 2, 4)
