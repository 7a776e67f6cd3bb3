"""The losses of both stages: they are what they claim to be, and their gradients are right."""

from __future__ import annotations

import math

import pytest
import torch

from echokv_vllm.checkpoint import EchoCheckpoint, LayerMaps
from echokv_vllm.eval.attention import Window, install
from echokv_vllm.eval.divergence import measure_divergence
from echokv_vllm.eval.rebuild import HeadRebuilder
from echokv_vllm.fingerprint import ModelFingerprint
from echokv_vllm.plan import EchoPlan, LayerPlan, Source
from echokv_vllm.presets import preset_plan
from echokv_vllm.rope import rotary_from_config
from echokv_vllm.train.attention import CacheSetup
from echokv_vllm.train.distillation import Distillation
from echokv_vllm.train.layerwise import KeyValueError, LayerwiseAttention
from echokv_vllm.train.options import TrainOptions
from echokv_vllm.train.parameters import MapParameters, Whitening
from echokv_vllm.train.stages import fit_and_measure

HEAD_DIM, LENGTH = 8, 48
WINDOW = Window(sink_tokens=2, recent_tokens=5)
CPU = torch.device("cpu")


def _sequences(count=3, length=LENGTH, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, length), generator=generator)


def _maps(plan, bias=False, seed=8):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return 0.2 * torch.randn(*shape, generator=generator)

    maps = {}
    for layer in range(plan.num_layers):
        count = len(plan.discarded(layer))
        if count:
            size = len(plan.source_heads(layer, shard=0)) * HEAD_DIM
            biases = [random(count, HEAD_DIM) if bias else None for _ in range(2)]
            maps[layer] = LayerMaps(
                random(count, size, HEAD_DIM), random(count, size, HEAD_DIM), *biases
            )
    return maps


def _neighbour_plan():
    """Unordered heads, and sources in an earlier layer."""
    return EchoPlan(
        "neighbours",
        4,
        (
            LayerPlan((3, 0), (Source(0, (0, 3)),)),
            LayerPlan((0, 1, 2, 3)),
            LayerPlan((2,), (Source(1, (3, 0)), Source(2, (2,)))),
        ),
    )


def _setup(model, plan, **changes):
    settings = dict(rotation_block=16, window=WINDOW)
    settings.update(changes)
    return CacheSetup(plan=plan, rotary=rotary_from_config(model.config), **settings)


PLANS = [
    preset_plan("local-0.5", 3, 4, shards=2),
    preset_plan("paper-0.5", 3, 4),
    _neighbour_plan(),
]


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("format", "residual_bits"), [("auto", 0), ("int4", 0), ("fp8", 0), ("auto", 2)]
)
def test_kl_is_what_the_evaluation_measures(tiny_model, plan, bias, format, residual_bits):
    """Same maps, tokens and offsets: the loss is the KL of `echokv eval`."""
    model = tiny_model()
    maps, ids, offsets = _maps(plan, bias), _sequences(), torch.tensor([0, 7, 1001])
    setup = _setup(model, plan, format=format, residual_bits=residual_bits)
    objective = Distillation(model, setup, MapParameters(plan, maps, CPU))
    loss = objective.losses(ids, offsets, torch.Generator(), learn=False)["model"].item()

    model.config.architectures = ["LlamaForCausalLM"]
    checkpoint = EchoCheckpoint(plan, 16, maps, ModelFingerprint.from_config(model.config))
    rebuilder = HeadRebuilder(
        checkpoint, setup.rotary, CPU, cache_format=format, residual_bits=residual_bits
    )
    install(model)
    # The evaluation leaves out the last token, which has no next one; so does this comparison.
    scored = measure_divergence(
        model, rebuilder, torch.cat((ids, ids[:, :1]), 1), offsets, WINDOW,
        skip_tokens=setup.first_query(),
    )  # fmt: skip
    assert scored.num_tokens == 3 * (LENGTH - setup.first_query())
    # A number at the edge of two codes may fall to either side.
    coded = format != "auto" or residual_bits
    assert loss == pytest.approx(scored.kl.value, rel=1e-3 if coded else 1e-4)
    assert loss > 1e-3


def _objective(name, model, plan, parameters, **changes):
    setup = _setup(model, plan, **changes)
    if name == "kl":
        return Distillation(model, setup, parameters)
    if name == "kv-mse":
        return KeyValueError(model, setup, parameters)
    return LayerwiseAttention(name, model, setup, parameters, num_queries=20)


def _loss(objective, learn=False):
    found = objective.losses(
        _sequences(2), torch.tensor([3, 90]), torch.Generator().manual_seed(1), learn
    )
    assert sorted(found) == sorted(objective.groups)
    return sum(value.double().item() for value in found.values())


@pytest.mark.parametrize("name", ["kv-mse", "o-mse", "qk-kl", "kl"])
@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
def test_gradients_are_those_of_finite_differences(tiny_model, name, plan):
    model = tiny_model().double().requires_grad_(False)
    parameters = MapParameters(plan, _maps(plan, bias=True), CPU)
    objective = _objective(name, model, plan, parameters)
    _loss(objective, learn=True)
    generator = torch.Generator().manual_seed(2)
    expected = found = 0.0
    ways = {
        k: torch.randn(leaf.shape, generator=generator) for k, leaf in parameters.leaves.items()
    }
    for leaf_name, leaf in parameters.leaves.items():
        if leaf.grad is None:
            assert name == "qk-kl" and "value" in leaf_name
            continue
        expected += (leaf.grad * ways[leaf_name]).sum().item()
    step = 1e-3
    for sign in (1, -1):
        with torch.no_grad():
            for leaf_name, leaf in parameters.leaves.items():
                leaf += sign * step * ways[leaf_name]
            found += sign * _loss(objective) / (2 * step)
            for leaf_name, leaf in parameters.leaves.items():
                leaf -= sign * step * ways[leaf_name]
    assert found == pytest.approx(expected, rel=2e-2)
    assert abs(expected) > 1e-4


@pytest.mark.parametrize("name", ["kl", "o-mse"])
def test_layer_checkpoints_and_tiles_change_nothing(tiny_model, monkeypatch, name):
    from echokv_vllm.train import distillation

    plan = preset_plan("paper-0.7", 3, 4)
    grads = []
    for tiled in (False, True):
        model = tiny_model().requires_grad_(False)
        parameters = MapParameters(plan, _maps(plan), CPU)
        objective = _objective(name, model, plan, parameters)
        if tiled and name == "kl":
            monkeypatch.setattr(distillation, "_TILE_SCORES", 16 * LENGTH)
            monkeypatch.setattr(distillation, "_LOGIT_TOKENS", 9)
            objective = Distillation(model, _setup(model, plan), parameters, checkpoint_layers=True)
        _loss(objective, learn=True)
        grads.append(parameters.leaves["layers.1.key"].grad)
        assert model.config._attn_implementation == "sdpa"
        assert "forward" not in vars(model.model.layers[0])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["kv-mse", "o-mse", "qk-kl", "kl"])
def test_exact_maps_have_no_loss(tiny_model, name):
    """Discarded heads that are copies of retained ones."""
    model = tiny_model()
    plan = preset_plan("local-0.5", 3, 4)
    for block in model.model.layers:
        for projection in ("k_proj", "v_proj"):
            weight = getattr(block.self_attn, projection).weight.data.view(4, HEAD_DIM, 32)
            weight[2:] = weight[:2]
    copy = torch.eye(2 * HEAD_DIM).view(2 * HEAD_DIM, 2, HEAD_DIM).transpose(0, 1)
    maps = {layer: LayerMaps(copy.clone(), copy.clone()) for layer in range(3)}
    objective = _objective(name, model, plan, MapParameters(plan, maps, CPU))
    assert abs(_loss(objective)) < 1e-5


def test_o_mse_is_the_error_that_reaches_the_residual_stream(tiny_model):
    """By hand for one layer: all queries, one full softmax over mixed keys."""
    model = tiny_model()
    plan = preset_plan("local-0.5", 3, 4)
    maps, ids = _maps(plan), _sequences(1)
    setup = _setup(model, plan, rotation_block=1)
    parameters = MapParameters(plan, maps, CPU)
    objective = LayerwiseAttention("o-mse", model, setup, parameters, num_queries=LENGTH)
    loss = objective.losses(ids, torch.zeros(1, dtype=torch.int64), torch.Generator(), False)

    from echokv_vllm.train.capture import captured_attention

    seen = {}
    with torch.no_grad(), captured_attention(model, lambda i, q, k, v: seen.update({i: (q, k, v)})):
        model(ids)
    query, key, value = (part[0] for part in seen[1])
    back = -torch.arange(LENGTH)[None]
    flat = setup.rotary.rotate(key.transpose(0, 1)[None], back)[0]  # [len, heads, head_dim]
    wrong = total = 0.0
    weight = model.model.layers[1].self_attn.o_proj.weight.data
    for q in range(setup.first_query(), LENGTH):
        difference, true = torch.zeros(2, 32)
        for head in (2, 3):
            features = flat[:, :2].flatten(1)
            key_hat = setup.rotary.rotate((features @ maps[1].key[head - 2])[None, :, None], -back)
            value_hat = value[:2].transpose(0, 1).flatten(1) @ maps[1].value[head - 2]
            token = torch.arange(q + 1)
            rebuilt = ((token >= 2) & (token <= q - 5))[:, None]
            keys = torch.where(rebuilt, key_hat[0, : q + 1, 0], key[head, : q + 1])
            values = torch.where(rebuilt, value_hat[: q + 1], value[head, : q + 1])
            for row in (2 * head, 2 * head + 1):
                outs = [
                    (query[row, q] @ k.T / math.sqrt(HEAD_DIM)).softmax(-1) @ v
                    for k, v in ((keys, values), (key[head, : q + 1], value[head, : q + 1]))
                ]
                columns = weight[:, row * HEAD_DIM : (row + 1) * HEAD_DIM]
                difference += columns @ (outs[0] - outs[1])
                true += columns @ outs[1]
        wrong += difference.square().sum().item()
        total += true.square().sum().item()
    assert loss["layer 1"].item() == pytest.approx(wrong / total, rel=1e-4)


def test_kv_mse_is_the_error_of_the_report(tiny_model):
    model = tiny_model()
    plan = preset_plan("local-0.5", 3, 4, shards=1)
    ids = _sequences(6).int()
    options = TrainOptions("", "", "", sequence_len=LENGTH, ridge=1e-6, batch_size=2, seed=1)
    maps, errors = fit_and_measure(model, plan, ids, ids, options, LENGTH)
    setup = _setup(model, plan, rotation_block=64)
    objective = KeyValueError(model, setup, MapParameters(plan, maps, CPU))
    zero = torch.zeros(6, dtype=torch.int64)
    found = objective.losses(ids.long(), zero, torch.Generator(), False)
    for layer in range(3):
        expected = errors[layer].key + errors[layer].value
        assert found[f"layer {layer}"].item() == pytest.approx(expected, rel=1e-4)


def test_sources_in_later_layers(tiny_model):
    """Possible layer by layer, not in a compressed pass."""
    model = tiny_model(num_layers=2)
    plan = EchoPlan("late", 4, (LayerPlan((), (Source(1, (0, 1)),)), LayerPlan((0, 1, 2, 3))))
    parameters = MapParameters(plan, _maps(plan), CPU)
    assert _loss(_objective("o-mse", model, plan, parameters)) > 0
    with pytest.raises(ValueError, match=r"layer 0 from layer 1.*stage2=o-mse"):
        _objective("kl", model, plan, parameters)


def test_whitening_changes_coordinates_not_maps(tiny_model):
    from echokv_vllm.train.stage1 import Fit, LayerStream, stream

    model = tiny_model("Qwen2")
    plan = preset_plan("local-0.5", 3, 4, shards=2)
    rotary = rotary_from_config(model.config)
    fit = Fit(plan, HEAD_DIM, CPU, bias=True)
    stream(
        model, _sequences(40).int(), torch.zeros(40, dtype=torch.int64), 8,
        LayerStream(plan, rotary, 16, fit), lambda batches: batches,
    )  # fmt: skip
    whitening = Whitening.of(fit, plan)
    maps = _maps(plan, bias=True)
    parameters = MapParameters(plan, maps, CPU, whitening)
    assert not torch.allclose(parameters.leaves["layers.0.key"], maps[0].key, atol=1e-2)
    for layer, back in parameters.maps(parameters.leaves).items():
        for name, tensor in back.named().items():
            torch.testing.assert_close(tensor, maps[layer].named()[name], rtol=1e-4, atol=1e-5)
    system = fit.systems(1, 1)[0]
    factor = whitening.factors[Whitening.name(1, 0, "value")].double()
    moments = factor @ (system.xx[:-1, :-1] / system.xx[:-1, :-1].diagonal().mean()) @ factor
    assert torch.linalg.eigvalsh(moments).min() > 0.3, "the floor keeps small directions small"
    assert torch.linalg.eigvalsh(moments).max() < 1.001
