"""`plan="auto"`: planted structure is found, constraints hold, and mistakes are explained."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from echokv_vllm.checkpoint import EchoCheckpoint
from echokv_vllm.cli import main as cli
from echokv_vllm.plan import EchoPlan, Source
from echokv_vllm.rope import rotary_from_config
from echokv_vllm.train import TrainOptions, train
from echokv_vllm.train import run as train_run
from echokv_vllm.train.search import SearchOptions
from echokv_vllm.train.search.search import search_plan

HEADS, DIM, GROUP, LAYERS = 4, 8, 2, 3


@pytest.fixture(scope="module")
def sequences():
    return torch.randint(0, 256, (12, 64), generator=torch.Generator().manual_seed(2)).int()


@pytest.fixture
def options():
    return SearchOptions(
        ratio=0.5, rotation_block=8, max_position=512, recent_tokens=8, num_queries=16
    )


def _search(model, sequences, options, **changes) -> EchoPlan:
    return search_plan(
        model, sequences, dataclasses.replace(options, **changes), rotary_from_config(model.config)
    )


def _copy_head(model, layer, head, onto):
    """Makes KV head `onto` of a layer a copy of `head`."""
    attention = model.get_decoder().layers[layer].self_attn
    with torch.no_grad():
        for name in ("k_proj", "v_proj"):
            weight = getattr(attention, name).weight.view(-1, DIM, 32)
            weight[onto] = weight[head]


def _mute_head(model, layer, head):
    """Nothing of what a KV head's queries read reaches the output."""
    with torch.no_grad():
        weight = model.get_decoder().layers[layer].self_attn.o_proj.weight
        weight.view(32, -1, GROUP * DIM)[:, head] = 0


def _repeat_first_layer(model, shift=0):
    """Layer 1 sees what layer 0 saw and projects alike; its head h + shift is head h there."""
    first, second = model.get_decoder().layers[:2]
    with torch.no_grad():
        first.self_attn.o_proj.weight.zero_()
        first.mlp.down_proj.weight.zero_()
        for name in ("k_proj", "v_proj"):
            theirs, own = (getattr(layer.self_attn, name).weight for layer in (first, second))
            own.copy_(theirs.roll(shift * DIM, 0))


def test_a_copy_of_a_retained_head_is_dropped(tiny_model, sequences, options):
    model = tiny_model()
    pairs = [(0, 2), (1, 3), (0, 1)]
    for layer, pair in enumerate(pairs):
        _copy_head(model, layer, *pair)
    plan = _search(model, sequences, options, ratio=0.75, uniform=True)
    for layer, pair in enumerate(pairs):
        assert len(plan.layers[layer].retained) == 3
        assert plan.discarded(layer)[0] in pair
    assert plan.name == "auto-0.75"


def test_heads_that_nobody_listens_to_are_dropped(tiny_model, sequences, options):
    model = tiny_model()
    for layer, head in enumerate((2, 0, 3)):
        _mute_head(model, layer, head)
    plan = _search(model, sequences, options, ratio=0.75, uniform=True)
    assert [plan.discarded(layer) for layer in range(LAYERS)] == [(2,), (0,), (3,)]


@pytest.mark.parametrize("ridge", [0.0, 1e-4])
@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize(
    ("layers", "heads", "parts"),
    [
        ((0, 1, 2), (0,), ("k_proj", "v_proj")),
        ((0, 1, 2), (0,), ("v_proj",)),
        ((0, 1, 2), (0,), ("k_proj",)),
        ((1,), (0, 1, 2, 3), ("v_proj",)),
        ((0, 1, 2), (0, 1, 2, 3), ("k_proj", "v_proj")),
    ],
)
def test_pruned_heads_are_searched(
    tiny_model, sequences, options, layers, heads, parts, uniform, ridge
):
    """Heads of zeros make second moments singular; no set of them may end the search."""
    model = tiny_model()
    for layer in layers:
        attention = model.get_decoder().layers[layer].self_attn
        with torch.no_grad():
            for name in parts:
                getattr(attention, name).weight.view(-1, DIM, 32)[list(heads)] = 0
    plan = _search(model, sequences, options, ratio=0.25, uniform=uniform, ridge=ridge)
    if len(heads) == 1 and uniform:
        assert all(0 not in layer.retained for layer in plan.layers)


def test_the_budget_goes_to_the_layer_that_matters(tiny_model, sequences, options):
    model = tiny_model()
    for layer in (0, 2):
        with torch.no_grad():
            model.get_decoder().layers[layer].self_attn.o_proj.weight.mul_(1e-3)
    plan = _search(model, sequences, options)
    assert [len(layer.retained) for layer in plan.layers] == [1, 4, 1]
    assert plan.layers[1].sources == () and plan.ratio == 0.5
    even = _search(model, sequences, options, uniform=True)
    assert [len(layer.retained) for layer in even.layers] == [2, 2, 2]


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("shards", [1, 2])
def test_constraints(tiny_model, sequences, options, shards, uniform):
    plan = _search(
        tiny_model("Qwen3", num_kv_heads=8), sequences, options, shards=shards, uniform=uniform
    )
    # EchoPlan itself refuses unequal shards and sources that are not retained.
    assert (plan.shards, plan.num_kv_heads, plan.ratio, plan.name) == (shards, 8, 0.5, "auto-0.5")
    for index, layer in enumerate(plan.layers):
        assert len(layer.retained) == 4 or not uniform
        assert layer.retained == tuple(sorted(layer.retained))
        discards = len(layer.retained) < 8
        assert layer.sources == ((Source(index, layer.retained),) if discards else ())


def test_copies_in_another_shard_are_of_no_use(tiny_model, sequences, options):
    """Heads 0 and 2 are equal, and so are 1 and 3, but shards are (0, 1) and (2, 3)."""
    model = tiny_model(num_layers=1)
    _copy_head(model, 0, 0, 2)
    _copy_head(model, 0, 1, 3)
    alone = _search(model, sequences, options, uniform=True)
    assert {head % 2 for head in alone.layers[0].retained} == {0, 1}
    sharded = _search(model, sequences, options, uniform=True, shards=2)
    assert sorted(head // 2 for head in sharded.layers[0].retained) == [0, 1]


def test_neighbours_are_retained_heads_of_earlier_layers(tiny_model, sequences, options):
    model = tiny_model()
    _repeat_first_layer(model, shift=1)
    plan = _search(model, sequences, options, uniform=True, neighbours=1, max_sources=3)
    (extra, own) = plan.layers[1].sources
    assert extra.layer == 0 and len(extra.heads) == 1 and own == Source(1, own.heads)
    # Head h of layer 0 is head h + 1 of layer 1: a discarded one is chosen, never a retained one.
    assert (extra.heads[0] + 1) % HEADS in plan.discarded(1)
    assert len(plan.layers[0].sources) == 1


def test_retained_heads_are_chosen_beside_those_of_earlier_layers(tiny_model, sequences, options):
    model = tiny_model()
    _repeat_first_layer(model)
    alone = _search(model, sequences, options, uniform=True)
    plan = _search(model, sequences, options, uniform=True, neighbours=1)
    # Layer 1 sees what layer 0 saw: together they retain every head, so nothing is lost.
    assert plan.layers[0].retained == alone.layers[0].retained
    assert {*plan.layers[0].retained, *plan.layers[1].retained} == set(range(HEADS))
    assert plan.layers[1].sources[0] == Source(0, plan.layers[0].retained)
    assert sum(len(source.heads) for source in plan.layers[2].sources) == HEADS


def test_same_seed_same_plan(tiny_model, sequences, options):
    model = tiny_model(num_kv_heads=8)
    first, again, other = (_search(model, sequences, options, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert first.ratio == other.ratio


def _train_options(model_folder, corpus, tmp_path, **changes):
    return TrainOptions(
        model=model_folder, data=corpus, out=str(tmp_path / "out"), rotation_block=16,
        sequence_len=64, max_position=256, device="cpu", progress=False, plan="auto",
        **{"ratio": 0.5, "stage2": "none", **changes},
    )  # fmt: skip


def test_the_plan_is_searched_unless_named(model_folder, corpus, tmp_path):
    result = train(
        TrainOptions(
            model_folder, corpus, str(tmp_path / "out"), sequence_len=64, max_position=256,
            device="cpu", progress=False,
        )
    )  # fmt: skip
    assert result.checkpoint.plan.name == "auto-0.5"
    assert [len(layer.retained) for layer in result.checkpoint.plan.layers] == [2, 2, 2]


def test_training_with_a_searched_plan(model_folder, corpus, tmp_path):
    result = train(_train_options(model_folder, corpus, tmp_path, shards=2, uniform=True))
    loaded = EchoCheckpoint.load(tmp_path / "out")
    assert (loaded.plan.name, loaded.plan.shards, loaded.plan.ratio) == ("auto-0.5", 2, 0.5)
    assert loaded.provenance["options"]["ratio"] == 0.5
    assert set(loaded.maps) == {0, 1, 2} and "auto-0.5" in result.report
    assert "(0.500 of the bytes kept, 0.500 read by compressed decode)" in result.report


def test_a_resumed_run_keeps_its_plan(model_folder, corpus, tmp_path, monkeypatch):
    """A search on other hardware may end differently, and then the saved maps would not fit."""
    options = _train_options(
        model_folder, corpus, tmp_path, stage2="o-mse", stage2_steps=6, save_every=2,
        recent_tokens=4, num_tokens=2000,
    )  # fmt: skip
    whole = train(dataclasses.replace(options, out=str(tmp_path / "whole")))

    saves = []
    save = train_run.StateFile.save

    def save_and_stop(self, identity, tensors, record):
        save(self, identity, tensors, record)
        saves.append(record)
        if len(saves) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_run.StateFile, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train(options)

    def no_search(*arguments):
        raise AssertionError("searched again")

    monkeypatch.setattr("echokv_vllm.train.search.search.search_plan", no_search)
    resumed = train(dataclasses.replace(options, resume=True))
    assert resumed.checkpoint.plan == whole.checkpoint.plan
    for layer, maps in whole.checkpoint.maps.items():
        assert torch.equal(resumed.checkpoint.maps[layer].key, maps.key)


def test_command_line(model_folder, corpus, tmp_path, capsys):
    arguments = [
        "train", model_folder, "--data", corpus, "--out", str(tmp_path / "out"), "--device", "cpu",
        "--sequence-len", "64", "--stage2", "none", "--plan", "auto", "--ratio", "0.75",
        "--uniform",
    ]  # fmt: skip
    assert cli.main(arguments) == 0
    printed = capsys.readouterr()
    assert "plan: heads" in printed.err and "auto-0.75" in printed.out
    plan = EchoCheckpoint.load(tmp_path / "out").plan
    assert [len(layer.retained) for layer in plan.layers] == [3, 3, 3]

    more = ["--overwrite", "--quiet", "--ratio", "0.5", "--tp", "2", "--neighbours", "1"]
    more += ["--max-sources", "3"]
    assert cli.main([*arguments, *more]) == 0
    assert "plan:" not in capsys.readouterr().err
    assert EchoCheckpoint.load(tmp_path / "out").plan.shards == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ratio": 1.5}, ["ratio=1.5", "between 0 and 1"]),
        ({"ratio": float("nan")}, ["ratio=nan", "between 0 and 1"]),
        ({"plan": "local-0.5"}, ["ratio=0.5", "'local-0.5'", "plan=auto"]),
        ({"plan": "local-0.5", "ratio": None, "uniform": True}, ["uniform=True", "plan=auto"]),
        ({"plan": "local-0.5", "ratio": None, "uniform": False}, ["uniform=False", "plan=auto"]),
        ({"plan": "local-0.5", "ratio": None, "neighbours": 2}, ["neighbours=2"]),
        ({"neighbours": -1}, ["neighbours=-1"]),
        ({"max_sources": 8}, ["max_sources=8", "neighbours=0", "name both"]),
        ({"neighbours": 1, "max_sources": 0}, ["max_sources=0", "at least 1"]),
        ({"neighbours": 1, "max_sources": 1}, ["max_sources=1", "below the", "lower ratio"]),
        ({"plan": "local-0.5", "ratio": None, "max_sources": 8}, ["max_sources=8", "plan=auto"]),
        ({"ratio": 0.4}, ["ratio=0.4", "0.25 and 0.5", "--no-uniform"]),
        ({"ratio": 0.1, "uniform": False}, ["ratio=0.1", "0.25 to 0.9167"]),
        ({"shards": 4}, ["shards=4", "one KV head"]),
    ],
)
def test_mistakes_are_explained(model_folder, corpus, tmp_path, changes, words):
    changes = {"plan": "auto", "ratio": 0.5, "progress": False, **changes}
    files = {"model": model_folder, "data": corpus, "out": str(tmp_path / "out")}
    with pytest.raises(ValueError) as caught:
        train(TrainOptions(**files, sequence_len=64, device="cpu", **changes))
    for word in words:
        assert word in str(caught.value)
    assert not any(tmp_path.iterdir())
