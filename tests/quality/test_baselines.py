"""Every baseline with everything kept is the full cache, and gets worse with fewer bytes."""

import dataclasses
from itertools import pairwise

import pytest
import torch

from echokv_vllm.eval.attention import Window
from echokv_vllm.eval.rebuild import HeadRebuilder, QuantizedCache

LAYERS, HEADS, DIM = 4, 4, 32


@pytest.fixture(scope="module")
def make(bench):
    """name -> cache with a share of the full cache's numbers."""
    from eviction import EvictingCache
    from head_copy import copy_checkpoint
    from low_rank import LowRankCache
    from pruned_keys import PromptPrunedKeys, PrunedKeys

    def channels(ratio):
        return round(DIM * (2 * ratio - 1))

    makers = {
        "low rank, uniform": lambda r: LowRankCache(
            bench.moments, bench.rotary, r, HEADS, "uniform"
        ),
        "low rank, energy": lambda r: LowRankCache(bench.moments, bench.rotary, r, HEADS, "energy"),
        "low rank, groups": lambda r: LowRankCache(bench.moments, bench.rotary, r, 2),
        "eviction": lambda r: EvictingCache(r),
        "eviction, shared": lambda r: EvictingCache(r, shared_budget=True),
        "ThinK, calibrated": lambda r: PrunedKeys.calibrated(bench.moments, channels(r)),
        "ThinK, prompt": lambda r: PromptPrunedKeys(LAYERS, HEADS, channels(r), 64),
        "copy": lambda r: HeadRebuilder(
            copy_checkpoint(bench.moments, bench.fingerprint, round(r * HEADS)), bench.rotary, "cpu"
        ),
    }
    return makers


NAMES = [
    "low rank, uniform", "low rank, energy", "low rank, groups", "eviction", "eviction, shared",
    "ThinK, calibrated", "ThinK, prompt",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_everything_kept_is_the_full_cache(bench, make, name):
    torch.testing.assert_close(
        bench.logits(make[name](1.0)), bench.logits(None), rtol=1e-3, atol=2e-3
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_window_over_everything_is_the_full_cache(bench, make, name):
    found = bench.logits(make[name](0.75), Window(3, 96))
    torch.testing.assert_close(found, bench.logits(None), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [*NAMES, "copy"])
def test_fewer_bytes_are_worse(bench, make, name):
    ratios = (1.0, 0.9, 0.75, 0.55) if name != "copy" else (0.75, 0.5, 0.25)
    errors = [bench.error(make[name](ratio)) for ratio in ratios]
    assert errors == sorted(errors) and errors[-1] > 0.05
    if name != "copy":
        assert errors[0] < 1e-4 < errors[1]


@pytest.mark.parametrize("name", NAMES)
def test_queries_before_the_first_compressed_one_are_exact(bench, make, name):
    found, full = bench.logits(make[name](0.6), first_query=70), bench.logits(None)
    torch.testing.assert_close(found[:, :70], full[:, :70], rtol=1e-4, atol=1e-4)
    assert (found[:, 70:] - full[:, 70:]).abs().max() > 0.1


def test_moments_are_those_of_the_model(bench):
    """Layer 0's keys and values straight from the weights, without attention."""
    model = bench.model.model
    hidden = model.layers[0].input_layernorm(model.embed_tokens(bench.calibration.long()))
    with torch.inference_mode():
        for projection, moment in (("k_proj", bench.moments.key), ("v_proj", bench.moments.value)):
            rows = getattr(model.layers[0].self_attn, projection)(hidden).flatten(0, 1).double()
            torch.testing.assert_close(moment[0], rows.T @ rows, rtol=1e-4, atol=1e-2)
    # Rotation keeps the length of a key.
    trace = bench.moments.key[2].diagonal().sum()
    torch.testing.assert_close(bench.moments.key_square[2].sum(), trace, rtol=1e-5, atol=1e-5)


def test_low_rank_is_the_best_projection(bench):
    """No other projection of the rank leaves less of the calibration's own keys."""
    from low_rank import LowRankCache

    cache = LowRankCache(bench.moments, bench.rotary, 0.5, HEADS, "uniform")
    assert cache.num_cached == LAYERS * 2 * HEADS * DIM // 2
    moment = bench.moments.key[1]
    width = HEADS * DIM

    def lost(basis):
        basis = basis.double()
        return (moment.diagonal().sum() - (basis.T @ moment @ basis).diagonal().sum()).item()

    best = torch.linalg.eigvalsh(moment)[: width // 2].sum().item()
    assert lost(cache._keys[1]) == pytest.approx(best, rel=1e-3)
    random, _ = torch.linalg.qr(torch.randn(width, width // 2, generator=torch.manual_seed(1)))
    assert lost(random) > 1.2 * best


def test_groups_of_heads_know_nothing_of_each_other(bench):
    from low_rank import LowRankCache

    cache = LowRankCache(bench.moments, bench.rotary, 0.5, 2, "uniform")
    written = [torch.zeros(1, HEADS, 3, DIM) for _ in range(2)]
    for part in written:
        part[:, 3] = 1.0
    args = (0, None, torch.arange(3), torch.zeros(1).long(), tuple(written))
    for heads in cache.rebuild(*args):
        assert heads[:, :2].abs().max() == 0 and heads[:, 2:].abs().min() > 0


def test_energy_moves_ranks_to_where_they_count(bench):
    from low_rank import LowRankCache

    uniform, energy = (
        LowRankCache(bench.moments, bench.rotary, 0.5, HEADS, a) for a in ("uniform", "energy")
    )
    assert energy.num_cached == uniform.num_cached

    def error(cache):
        total = 0.0
        for bases, moments in (
            (cache._keys, bench.moments.key),
            (cache._values, bench.moments.value),
        ):
            for basis, moment in zip(bases, moments, strict=True):
                kept = (basis.double().T @ moment @ basis.double()).diagonal().sum()
                total += 1 - (kept / moment.diagonal().sum()).item()
        return total

    assert error(energy) < error(uniform)


def test_copies_are_the_nearest_heads(bench):
    """Against a search with plain loops on layer 0's values."""
    from head_copy import copy_checkpoint

    checkpoint = copy_checkpoint(bench.moments, bench.fingerprint, 2)
    retained = checkpoint.plan.layers[0].retained
    blocks = bench.moments.value[0].view(HEADS, DIM, HEADS, DIM)

    def trace(a, b):
        return sum(blocks[a, i, b, i].item() for i in range(DIM))

    for row, head in enumerate(checkpoint.plan.discarded(0)):
        errors = [trace(head, head) - trace(head, r) ** 2 / trace(r, r) for r in retained]
        nearest = retained[errors.index(min(errors))]
        weights = checkpoint.maps[0].value[row].view(2, DIM, DIM)
        expected = torch.zeros(2, DIM, DIM)
        factor = trace(head, nearest) / trace(nearest, nearest)
        expected[retained.index(nearest)] = factor * torch.eye(DIM)
        torch.testing.assert_close(weights, expected)
    plain = copy_checkpoint(bench.moments, bench.fingerprint, 2, scaled=False)
    assert {plain.maps[0].key.max().item(), plain.maps[0].key.min().item()} == {1.0, 0.0}


def test_a_head_that_repeats_another_is_copied_without_loss(bench):
    from head_copy import _pairs

    twin = bench.moments.value[0].clone().view(HEADS, DIM, HEADS, DIM)
    # Head 3 becomes -0.5 times head 1.
    twin[3] = -0.5 * twin[1]
    twin[:, :, 3] = -0.5 * twin[:, :, 1]
    errors, factors = _pairs(twin.view(HEADS * DIM, -1), HEADS, True)
    assert errors[3, 1] == pytest.approx(0, abs=1e-9) and factors[3, 1] == pytest.approx(-0.5)
    assert errors[3, 0] > 0.1


def test_evicted_tokens_do_not_come_back_and_budgets_hold(bench, monkeypatch):
    import eviction

    kept = []
    keep = eviction.EvictingCache.keep

    def spy(self, votes, candidates, budget):
        result = keep(self, votes, candidates, budget)
        kept.append((result, budget))
        return result

    monkeypatch.setattr(eviction.EvictingCache, "keep", spy)
    monkeypatch.setattr(eviction, "_CHUNK", 8)
    bench.logits(eviction.EvictingCache(0.5))
    # Sequences of 96 tokens, a window of 16 and 3 sinks: decisions from the third chunk on.
    decisions = [kept[start : start + 10] for start in range(0, len(kept), 10)]
    assert len(kept) == 10 * LAYERS
    for layer in decisions:
        for chunk, ((before, _), (after, budget)) in enumerate(pairwise(layer)):
            # Tokens that left the window since: behind the end of the decision before.
            end = 24 + 8 * chunk - 16
            assert not (after & ~before)[..., :end].any(), "evicted tokens came back"
            assert (after.sum(-1) == budget).all() and budget == round(0.5 * (end + 8 - 3))
            assert not after[..., end + 8 :].any() and not after[..., :3].any()
        assert (layer[0][0] & ~layer[-1][0]).any(), "something is evicted later"


def test_votes_follow_the_attention(bench):
    """Keys of which one draws all attention of one head."""
    from eviction import EvictingCache, attention_weights, smoothed

    key = torch.zeros(1, 2, 20, 4)
    key[0, 1, 7, 0] = 50.0
    query = torch.ones(1, 4, 3, 4)
    votes = attention_weights(query, key, torch.zeros(1, 1, 3, 20, dtype=torch.bool), 1.0)
    assert votes[0, 1, 7] == pytest.approx(6) and votes[0, 0, 7] == pytest.approx(6 / 20)
    assert smoothed(votes)[0, 1].argmax().item() in range(5, 10)
    candidates = torch.ones(1, 2, 20, dtype=torch.bool)
    candidates[0, 1, 7] = False
    kept = EvictingCache(0.5).keep(votes, candidates, torch.tensor([4]))
    assert kept[0].sum(-1).tolist() == [4, 4] and not kept[0, 1, 7]
    sharing = EvictingCache(0.5, shared_budget=True)
    shared = sharing.keep(votes, torch.ones_like(candidates), torch.tensor([5]))
    # One token each, then the largest votes: 20 equal ones of head 0, one large one of head 1.
    assert shared[0].sum(-1).tolist() == [9, 1] and shared[0, 1, 7]


def test_channels_are_chosen_by_query_and_key(bench):
    from pruned_keys import PromptPrunedKeys, PrunedKeys

    query, key = torch.ones(1, 2, 40, 4) * 0.1, torch.ones(1, 1, 40, 4) * 0.1
    query[:, 1, 30:, 2] = 5.0  # observed: the last 32 of 40 tokens
    key[..., 0] = 3.0
    query[:, 0, :4, 3] = 100.0  # too early to be observed
    mask = PromptPrunedKeys(1, 1, 2, 40).choose(query, key)
    assert mask.tolist() == [[[True, False, True, False]]]
    for layer, mask in PrunedKeys.calibrated(bench.moments, 8).masks.items():
        assert mask.shape == (1, HEADS, DIM) and (mask.sum(-1) == 8).all(), layer


@pytest.mark.parametrize("echoed", [False, True])
def test_an_exact_window_leaves_the_quantised_rest(bench, echoed):
    """Everything outside the window is what the inner cache returns, everything inside exact."""
    from exact_window import ExactWindow
    from head_copy import copy_checkpoint

    inner = QuantizedCache("int4")
    if echoed:
        checkpoint = copy_checkpoint(bench.moments, bench.fingerprint, 2)
        inner = HeadRebuilder(checkpoint, bench.rotary, "cpu", "int4")
    cache = ExactWindow(inner, LAYERS, HEADS)
    written = tuple(
        torch.randn(2, HEADS, 9, DIM, generator=torch.Generator().manual_seed(s)) for s in (1, 2)
    )
    stored = tuple(map(inner.cached, written))
    where = torch.arange(9), torch.zeros(2).long(), written
    heads = cache.rebuild(2, lambda layer: tuple(map(cache.cached, written)), *where)
    lost = list(inner.rebuilt_heads(2))
    kept = [head for head in range(HEADS) if head not in lost]
    assert len(lost) == (2 if echoed else 0)
    for part in range(2):
        assert torch.equal(heads[part][:, kept], stored[part][:, kept])
        if lost:
            rebuilt = inner.rebuild(2, lambda layer: stored, *where)[part]
            assert torch.equal(heads[part][:, lost], rebuilt)
    assert 0 < bench.error(cache) < bench.error(inner)
    found = bench.logits(cache, Window(3, 96))
    torch.testing.assert_close(found, bench.logits(None), rtol=1e-4, atol=1e-4)


def test_hybrid_prunes_keys_and_echoes_values(bench):
    from head_copy import copy_checkpoint
    from pruned_keys import HybridCache, PrunedKeys

    echo = HeadRebuilder(copy_checkpoint(bench.moments, bench.fingerprint, 2), bench.rotary, "cpu")
    keys = PrunedKeys.calibrated(bench.moments, 20)
    written = tuple(
        torch.randn(2, HEADS, 10, DIM, generator=torch.Generator().manual_seed(s)) for s in (1, 2)
    )
    args = (1, lambda layer: written, torch.arange(10), torch.zeros(2).long(), written)
    key, value = HybridCache(keys, echo).rebuild(*args)
    assert torch.equal(key, written[0] * keys.masks[1][:, :, None])
    lost = list(echo.rebuilt_heads(1))
    assert torch.equal(value[:, lost], echo.rebuild(*args)[1])
    kept = [head for head in range(HEADS) if head not in lost]
    assert torch.equal(value[:, kept], written[1][:, kept])
    # Both losses count.
    both = bench.error(HybridCache(keys, echo))
    assert both > bench.error(keys) > 0 and both > bench.error(QuantizedCache("fp8"))


def output_error(bench, keys, checkpoint, layer, head, window):
    """Sum of squares of one head's output error in both query heads, query by query."""
    from echokv_vllm.train.capture import captured_attention

    seen = {}

    def see(at, query, key, value):
        if at == layer:
            seen.update(query=query, key=key, value=value)

    with torch.inference_mode(), captured_attention(bench.model, see):
        bench.model(input_ids=bench.calibration.long(), use_cache=False)
    mask = keys.masks[layer][0, head]
    row = checkpoint.plan.discarded(layer).index(head)
    error = 0.0
    for key, value, queries in zip(seen["key"], seen["value"], seen["query"], strict=True):
        sources = [value[h] for _, h in checkpoint.plan.source_heads(layer)]
        echoed = torch.cat(sources, -1) @ checkpoint.maps[layer].value[row]
        for query in queries[2 * head : 2 * head + 2]:
            first = window.sink_tokens + window.recent_tokens
            for at in range(first, len(query)):
                exact = (key[head, : at + 1] @ query[at] / DIM**0.5).softmax(0)
                old = torch.zeros(at + 1, dtype=torch.bool)
                old[window.sink_tokens : at + 1 - window.recent_tokens] = True
                k = torch.where(old[:, None], key[head, : at + 1] * mask, key[head, : at + 1])
                v = torch.where(old[:, None], echoed[: at + 1], value[head, : at + 1])
                rough = (k @ query[at] / DIM**0.5).softmax(0)
                error += (exact @ value[head, : at + 1] - rough @ v).square().sum().item()
    return error


def test_tuned_values_have_the_least_output_error(bench):
    from head_copy import copy_checkpoint
    from hybrid_values import tune_values
    from pruned_keys import PrunedKeys

    window = Window(2, 30)
    keys = PrunedKeys.calibrated(bench.moments, 16)
    before = copy_checkpoint(bench.moments, bench.fingerprint, 2)
    tuned = tune_values(bench.model, before, keys, bench.calibration, window, ridge=1e-6)
    assert torch.equal(tuned.maps[1].key, before.maps[1].key)
    head = before.plan.discarded(1)[1]
    errors = [output_error(bench, keys, c, 1, head, window) for c in (before, tuned)]
    assert errors[1] < 0.8 * errors[0]
    # A step in any direction makes it worse.
    for seed in range(2):
        step = torch.randn(tuned.maps[1].value.shape, generator=torch.Generator().manual_seed(seed))
        for sign in (-0.02, 0.02):
            maps = dataclasses.replace(tuned.maps[1], value=tuned.maps[1].value + sign * step)
            other = dataclasses.replace(tuned, maps={**tuned.maps, 1: maps})
            assert output_error(bench, keys, other, 1, head, window) > errors[1]


def test_one_side_is_rebuilt_and_the_other_exact(bench):
    from head_copy import copy_checkpoint
    from one_sided import KEYS, VALUES, OneSided

    checkpoint = copy_checkpoint(bench.moments, bench.fingerprint, HEADS // 2)
    both = HeadRebuilder(checkpoint, bench.rotary, "cpu")
    keys, values = (OneSided(checkpoint, bench.rotary, "cpu", part) for part in (KEYS, VALUES))
    generator = torch.Generator().manual_seed(5)
    shape = 2, 3, HEADS, 5, DIM
    heads = [torch.randn(shape, generator=generator).unbind(0) for _ in range(LAYERS)]
    lost = list(both.rebuilt_heads(1))
    arguments = (1, heads.__getitem__, torch.arange(5), torch.zeros(3, dtype=torch.int64), heads[1])
    whole, of_keys, of_values = (c.rebuild(*arguments) for c in (both, keys, values))
    torch.testing.assert_close(of_keys[0], whole[0])
    torch.testing.assert_close(of_values[1], whole[1])
    torch.testing.assert_close(of_keys[1], heads[1][1][:, lost])
    torch.testing.assert_close(of_values[0], heads[1][0][:, lost])
    assert bench.error(keys) > 0 and bench.error(values) > 0
    assert keys.source_layers == both.source_layers
