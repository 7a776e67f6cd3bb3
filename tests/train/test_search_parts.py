"""The parts of the plan search, each against plain arithmetic."""

from __future__ import annotations

import itertools

import pytest
import torch

from echokv_vllm.rope import rotary_from_config
from echokv_vllm.train.search.budget import spread
from echokv_vllm.train.search.choose import shortlist
from echokv_vllm.train.search.covariance import HeadMoments, collect
from echokv_vllm.train.search.criterion import Elimination, output_metrics, output_moments
from echokv_vllm.train.search.neighbours import extra_sources
from echokv_vllm.train.search.options import SearchOptions, head_budget
from echokv_vllm.train.search.probe import take_probe
from echokv_vllm.train.search.score import Scorer, solve_maps

BLOCK, LENGTH, DIM, HEADS, GROUP = 8, 48, 8, 4, 2
SINKS, RECENT = 2, 5


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model().double()


@pytest.fixture(scope="module")
def observed(model):
    """Sequences, offsets, rotary, moments and probe of a tiny model."""
    generator = torch.Generator().manual_seed(3)
    sequences = torch.randint(0, 256, (6, LENGTH), generator=generator).int()
    offsets = torch.randint(0, 1000, (6,), generator=generator)
    rotary = rotary_from_config(model.config)
    moments = HeadMoments(rotary, BLOCK, neighbours=1)
    collect(model, sequences, offsets, 4, moments, iter)
    probe = take_probe(model, sequences[:2], offsets[:2], 7, SINKS, RECENT, seed=1)
    return sequences, offsets, rotary, moments, probe


def _heads(model, sequences, offsets, rotary):
    """Block-rotated keys and values of every layer, [batch, len, heads, dim], from HF's cache."""
    with torch.inference_mode():
        cache = model(sequences.long(), use_cache=True).past_key_values.layers
    at = torch.arange(sequences.shape[1])
    shift = (at + offsets[:, None]) % BLOCK - at
    keys = [rotary.rotate(layer.keys.transpose(1, 2).float(), shift) for layer in cache]
    return keys, [layer.values.transpose(1, 2) for layer in cache], shift


def test_moments_are_mean_products_in_map_space(model, observed):
    sequences, offsets, rotary, moments, _ = observed
    keys, values, _ = _heads(model, sequences, offsets, rotary)
    rows, columns = [(0, 2), (1, 3), (1, 0)], [(1, 1), (0, 0)]
    for found, heads in zip(moments.between(rows, columns), (keys, values), strict=True):
        left, right = (
            torch.cat([heads[layer][:, :, head].flatten(0, 1) for layer, head in pairs], 1).double()
            for pairs in (rows, columns)
        )
        torch.testing.assert_close(found, left.T @ right / len(left), rtol=1e-4, atol=1e-5)
    everything = [(1, head) for head in range(HEADS)]
    for whole, part in zip(moments.layer(1), moments.between(everything, everything), strict=True):
        assert torch.equal(whole, part)


def test_sensitivity_is_the_slope_of_the_likelihood(model, observed):
    """Push one query's output a little: the likelihood of the drawn labels moves by g . e."""
    sequences, offsets, *_ = observed
    ids = sequences[:1].long()
    probe = take_probe(model, sequences[:1], offsets[:1], 9, SINKS, RECENT, seed=6)
    position = int(probe.seen[0, 4].sum()) - 1
    head = model.get_output_embeddings()

    def log_likelihood(push):
        def add(module, inputs):
            moved = inputs[0].clone()
            moved[0, position] += push
            return (moved,)

        hook = model.get_decoder().layers[1].self_attn.o_proj.register_forward_pre_hook(add)
        with torch.no_grad():
            logits = head(model.get_decoder()(input_ids=ids).last_hidden_state)[0]
        hook.remove()
        return logits.log_softmax(-1)

    with torch.no_grad():
        exact = log_likelihood(torch.zeros(HEADS * GROUP * DIM).double())
        generator = torch.Generator().manual_seed(6)
        labels = torch.multinomial(exact.float().exp(), 1, replacement=True, generator=generator)
        push = torch.randn(HEADS, GROUP, DIM, generator=generator).double()
        step = 3e-3  # the norms of the model compute in float32
        above, below = (
            log_likelihood(sign * step * push.flatten()).gather(-1, labels).sum()
            for sign in (1, -1)
        )
    expected = (above - below) / (2 * step)
    found = (probe.layers[1].gradient[0, :, :, 4] * push).sum()
    assert found.item() == pytest.approx(expected.item(), rel=5e-3)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_probe_masks(observed):
    probe = observed[-1]
    for seen, rebuilt in zip(probe.seen.flatten(0, 1), probe.rebuilt.flatten(0, 1), strict=True):
        query = int(seen.sum()) - 1
        assert seen[: query + 1].all() and query >= SINKS + RECENT
        assert rebuilt.nonzero().flatten().tolist() == list(range(SINKS, query - RECENT + 1))
    with pytest.raises(ValueError, match="sequence_len=3"):
        take_probe(None, torch.zeros(1, 3), torch.zeros(1), 1, 4, 128, 0)


@pytest.mark.parametrize("sources", [[(1, 0), (1, 3)], [(0, 2), (1, 3)]])
def test_change_is_that_of_attention_over_rebuilt_heads(model, observed, sources):
    sequences, offsets, rotary, moments, probe = observed
    keys, values, shift = _heads(model, sequences[:2], offsets[:2], rotary)
    targets = [(1, 1), (1, 2)]
    rebuilt = []
    grams, products = moments.between(sources, sources), moments.between(sources, targets)
    for heads, gram, product in zip((keys, values), grams, products, strict=True):
        maps = torch.linalg.solve(gram + 0.01 * gram.diagonal().mean() * torch.eye(16), product)
        features = torch.cat([heads[layer][:, :, head] for layer, head in sources], -1)
        rebuilt.append((features.double() @ maps).unflatten(-1, (2, DIM)))
    key_hat = rotary.rotate(rebuilt[0].float(), -shift)
    of_layer = probe.layers[1]
    expected = torch.zeros(2, 7)
    for sequence, query, place, member in itertools.product(range(2), range(7), range(2), (0, 1)):
        head = targets[place][1]
        vector = of_layer.query[sequence, head, member, query].float()
        length = int(probe.seen[sequence, query].sum())
        key = of_layer.key[sequence, head, :length].float().clone()
        value = of_layer.value[sequence, head, :length].clone()
        exact = ((key @ vector) / DIM**0.5).softmax(0).double() @ value
        inside = slice(SINKS, length - RECENT)
        key[inside] = key_hat[sequence, inside, place]
        value[inside] = rebuilt[1][sequence, inside, place]
        found = ((key @ vector) / DIM**0.5).softmax(0).double() @ value
        gradient = of_layer.gradient[sequence, head, member, query]
        expected[sequence, query] += ((found - exact) * gradient).sum()
    scorer = Scorer(probe, moments, rotary, BLOCK, ridge=0.01)
    change = scorer.change(1, [1, 2], sources)
    torch.testing.assert_close(change, expected, rtol=2e-3, atol=2e-4)
    assert scorer.cost(1, [1, 2], sources).item() == pytest.approx(
        change.square().mean().item(), rel=1e-5
    )


def test_metrics_weigh_errors_as_attention_does(model, observed):
    """`trace(A f f')` is the mean over queries of `sum_t p_t^2 (g . f)^2`, likewise for keys."""
    _, offsets, rotary, _, probe = observed
    for_keys, for_values = output_metrics(probe, 2, rotary, BLOCK)
    generator = torch.Generator().manual_seed(8)
    error = torch.randn(DIM, generator=generator)
    of_layer, head = probe.layers[2], 3
    at = torch.arange(LENGTH)
    from_keys = from_values = 0.0
    for sequence, query, member in itertools.product(range(2), range(7), range(GROUP)):
        vector = of_layer.query[sequence, head, member, query].float()
        gradient = of_layer.gradient[sequence, head, member, query].float()
        length = int(probe.seen[sequence, query].sum())
        key = of_layer.key[sequence, head, :length].float()
        value = of_layer.value[sequence, head, :length].float()
        attended = ((key @ vector) / DIM**0.5).softmax(0)
        output = attended @ value
        turn = at - (at + offsets[sequence]) % BLOCK
        errors = rotary.rotate(error.expand(LENGTH, 1, DIM), turn)[:, 0]
        for token in range(SINKS, length - RECENT):
            weight = attended[token] ** 2
            from_values += weight * (gradient @ error) ** 2
            effect = gradient @ (value[token] - output) * (errors[token] @ vector) / DIM**0.5
            from_keys += weight * effect**2
    for found, expected in ((for_keys, from_keys), (for_values, from_values)):
        assert (error.double() @ found[head] @ error.double()).item() == pytest.approx(
            float(expected) / 14, rel=1e-3
        )


def test_cheap_cost_is_the_residual_of_least_squares_in_the_metric(observed):
    _, _, rotary, moments, probe = observed
    scaled = output_moments(probe, moments, 1, rotary, BLOCK, ridge=1e-6)
    state = Elimination(scaled, DIM)
    kept, rest = [0, 3], [(1, 1), (1, 2)]
    sources = [(1, head) for head in kept]
    expected = 0.0
    metrics = output_metrics(probe, 1, rotary, BLOCK)
    products = moments.between(sources, rest)
    grams, own = moments.between(sources, sources), moments.between(rest, rest)
    for metric, gram, product, target in zip(metrics, grams, products, own, strict=True):
        residual = target - product.T @ solve_maps(gram, product, 1e-6)
        for place, (_, head) in enumerate(rest):
            block = residual[place * DIM : (place + 1) * DIM, place * DIM : (place + 1) * DIM]
            expected += (metric[head] @ block).trace().item()
    assert state.retain(0).retain(3).cost() == pytest.approx(expected, rel=1e-3)
    assert state.cost() - state.gain(0) == pytest.approx(state.retain(0).cost())


def _random_state(num_heads: int, dim: int = 2, seed: int = 0) -> Elimination:
    generator = torch.Generator().manual_seed(seed)
    rank = num_heads * dim // 3
    matrices = []
    for _ in range(2):
        low = torch.randn(num_heads * dim, rank, generator=generator).double()
        matrices.append(low @ low.T + 0.05 * torch.eye(num_heads * dim).double())
    return Elimination(tuple(matrices), dim)


def _brute_force(state: Elimination, num_heads: int, size: int) -> list[tuple[int, ...]]:
    def cost(heads):
        rest = state
        for head in heads:
            rest = rest.retain(head)
        return rest.cost()

    return sorted(itertools.combinations(range(num_heads), size), key=cost)


def test_few_heads_are_searched_exhaustively():
    state = _random_state(6)
    found = shortlist(state, 6, [2, 4, 5], count=4)
    assert found == {size: _brute_force(state, 6, size)[:4] for size in (2, 4, 5)}


@pytest.mark.parametrize("seed", range(3))
def test_many_heads_are_searched_by_exchange(seed):
    """12 heads are too many for all sets: greedy choice and exchange come close to the best."""
    state = _random_state(12, seed=seed)
    found = shortlist(state, 12, [2, 8], count=5)
    for size in (2, 8):
        assert len(found[size]) == 5 == len(set(found[size]))
        best = _brute_force(state, 12, size)
        assert found[size][0] in best[: max(4, len(best) // 100)]


def test_exchange_leaves_what_greedy_choice_took_first():
    """Head 0 is the best single head, but a head of either kind together make it superfluous."""
    rows = torch.zeros(12, 16, dtype=torch.float64)
    rows[0, :3] = torch.tensor([1.0, 1.0, 0.3])
    rows[1:4, 0] = rows[4:7, 1] = 1
    rows[:, 4:] += 0.01 * torch.eye(12)
    state = Elimination((rows @ rows.T,), 1)
    assert max(range(12), key=state.gain) == 0
    best = _brute_force(state, 12, 2)[0]
    assert best[0] in (1, 2, 3) and best[1] in (4, 5, 6)
    (found,) = shortlist(state, 12, [2, 8], count=1)[2]
    assert found[0] in (1, 2, 3) and found[1] in (4, 5, 6)


def test_moments_that_rounding_left_indefinite_are_refused():
    """As float32 sums of large constant keys are with hardly any ridge."""
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[2, 3] = matrix[3, 2] = 1 + 1e-7
    with pytest.raises(ValueError, match=r"KV head 1 .* linearly dependent .* leave ridge out"):
        shortlist(Elimination((matrix, torch.eye(4).double()), 2), 2, [1], count=1)


def test_budget_is_spread_at_least_cost():
    generator = torch.Generator().manual_seed(2)
    costs = [
        {size: torch.rand((), generator=generator).item() for size in (1, 2, 4)} for _ in range(4)
    ]
    for budget in (4, 8, 9, 16):
        found = spread(costs, budget)
        assert sum(found) == budget
        totals = [
            sum(of[size] for of, size in zip(costs, sizes, strict=True))
            for sizes in itertools.product((1, 2, 4), repeat=4)
            if sum(sizes) == budget
        ]
        assert sum(of[size] for of, size in zip(costs, found, strict=True)) == min(totals)
    with pytest.raises(ValueError, match="add up to 3"):
        spread(costs, 3)


class _FakeScorer:
    """Layer 2 needs head 1 of layer 0; nothing else helps anybody."""

    def cost(self, layer, heads, sources):
        helped = layer == 2 and (0, 1) in sources
        return torch.tensor(0.1 if helped else 1.0) * len(heads) * (1.0 if layer else 1e-3)


def test_neighbours_are_added_only_where_they_help():
    retained = [(0, 1, 2), (0, 2, 3), (1, 2), (0, 1, 2, 3)]
    assert extra_sources(_FakeScorer(), retained, 4, 1, 2, 4) == [[], [], [(0, 1)], []]
    assert extra_sources(_FakeScorer(), retained, 4, 1, 1, 4) == [[]] * 4
    # Shards read equally many heads: the second one gets its best head too.
    retained = [(0, 1, 4, 5)] * 3
    found = extra_sources(_FakeScorer(), retained, 8, 2, 2, 6)
    assert found[:2] == [[], []] and (0, 1) in found[2]
    assert [head // 4 for _, head in sorted(found[2], key=lambda at: at[1])] == [0, 1]


def test_neighbours_are_all_taken_where_there_is_room():
    retained = [(0, 1, 2), (0, 2, 3), (1, 2), (0, 1, 2, 3)]
    first, second = ([(layer, head) for head in retained[layer]] for layer in (0, 1))
    found = extra_sources(_FakeScorer(), retained, 4, 1, 2, 8)
    assert found == [[], first, [*first, *second], []], "not where nothing is lost"
    assert extra_sources(_FakeScorer(), retained, 4, 1, 2, 2) == [[]] * 4, "own heads fill it"


def test_reachable_ratios():
    assert head_budget(0.5, 12, 8) == 48
    assert head_budget(0.34, 12, 8) == 33, "rounded to whole heads"
    assert head_budget(0.375, 12, 8, uniform=True) == 36
    assert head_budget(0.37, 12, 8, uniform=True) == 36
    assert head_budget(0.5, 12, 8, shards=4) == 12
    for arguments, words in [
        ((0.4, 12, 8, 1, True), ["ratio=0.4", "0.375 and 0.5", "--no-uniform"]),
        ((0.05, 12, 8, 1, False), ["ratio=0.05", "0.125 to 0.9896"]),
        ((0.25, 12, 8, 4, False), ["ratio=0.25", "0.5 to"]),
        ((0.5, 12, 8, 8, False), ["shards=8", "one KV head per shard"]),
        ((0.5, 12, 8, 3, False), ["shards=3", "divide"]),
        ((1.0, 12, 8, 1, False), ["ratio=1.0", "between 0 and 1"]),
        ((0.5, 12, 8, 1, True, 3), ["max_sources=3", "below the 4 heads", "use 4 or more"]),
    ]:
        with pytest.raises(ValueError) as caught:
            head_budget(*arguments)
        for word in words:
            assert word in str(caught.value)


@pytest.mark.parametrize("bad", [{"ratio": 0.0}, {"shards": 0}, {"neighbours": -1}])
def test_bad_search_options_are_named(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))}="):
        SearchOptions(**{"ratio": 0.5, **bad})
