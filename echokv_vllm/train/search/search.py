"""Plan search: which heads each layer retains, for the least change of the model's predictions.

1. Second moments of all heads, streamed (`covariance`).
2. Sampled queries with the gradient of the model's likelihood (`probe`).
3. For every layer, sets of heads ranked by a cheap cost (`criterion`, `choose`), the best of them
   by the exact change of the attention output (`score`).
4. One budget of heads spread over the layers by those costs (`budget`).
5. Where asked, the sets again with what earlier layers retain in view, and extra sources from
   those layers (`neighbours`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from echokv_vllm.plan import EchoPlan, LayerPlan, Source
from echokv_vllm.train.search.budget import spread
from echokv_vllm.train.search.choose import Heads, shortlist
from echokv_vllm.train.search.covariance import HeadAt, HeadMoments, collect
from echokv_vllm.train.search.criterion import Elimination, output_moments
from echokv_vllm.train.search.neighbours import extra_sources, heads_in_reach
from echokv_vllm.train.search.options import SearchOptions, check_max_sources, head_budget
from echokv_vllm.train.search.probe import Probe, take_probe
from echokv_vllm.train.search.score import Scorer

if TYPE_CHECKING:
    from echokv_kernels.rotary import Rotary

_SEQUENCES_PER_PROBE = 4
_MIN_PROBES = 4

Progress = Callable[[range, str, str], Iterable[int]]
"""Wraps an iteration, given what is done and the unit of a step."""


@dataclass(frozen=True)
class Choice:
    """What one layer retains if it may retain so many heads.

    Attributes:
        cost: Mean squared change of the likelihood per sampled query.
        retained: KV heads, ascending; of all shards.
        shortlists: For every shard, the sets that were scored.
    """

    cost: float
    retained: Heads
    shortlists: tuple[tuple[Heads, ...], ...] = ()


def search_plan(
    model: Any,
    sequences: torch.Tensor,
    options: SearchOptions,
    rotary: Rotary,
    progress: Progress = lambda steps, title, unit: steps,
) -> EchoPlan:
    """Search a plan for a model.

    Args:
        model: Supported Hugging Face causal LM in eval mode.
        sequences: [num_sequences, sequence_len] token ids on the CPU.
        options: What to search for.
        rotary: Rotary embedding of the model, on the model's device.
        progress: Shows what is going on.

    Returns:
        A plan named `auto-R`, R being its ratio.

    Raises:
        ValueError: If the ratio cannot be reached, a layer retains more than `max_sources`, or the
            sequences are too short.
    """
    num_layers = model.config.num_hidden_layers
    num_heads = model.config.num_key_value_heads
    budget = head_budget(
        options.ratio, num_layers, num_heads, options.shards, options.uniform, options.max_sources
    )
    moments, probe = _observe(model, sequences, options, rotary, progress)
    scorer = Scorer(probe, moments, rotary, options.rotation_block, options.ridge)
    sizes = _sizes(budget, num_layers, num_heads // options.shards, options.uniform)
    with torch.inference_mode():
        choices = [
            _choices(layer, sizes, moments, probe, scorer, options, rotary)
            for layer in progress(range(num_layers), "plan: heads", "layer")
        ]
        costs = [{size: choice.cost for size, choice in of.items()} for of in choices]
        chosen = spread(costs, budget)
        sets = [of[size] for of, size in zip(choices, chosen, strict=True)]
        retained = [choice.retained for choice in sets]
        extra: list[list[HeadAt]] = [[] for _ in retained]
        if options.neighbours:
            check_max_sources(options.max_sources, max(map(len, retained)))
            retained = _choose_again(scorer, sets, num_heads // options.shards, options.neighbours)
            extra = extra_sources(
                scorer, retained, num_heads, options.shards, options.neighbours,
                options.max_sources or num_heads,
            )  # fmt: skip
    ratio = budget * options.shards / (num_layers * num_heads)
    layers = tuple(
        _layer_plan(layer, heads, extra[layer], num_heads) for layer, heads in enumerate(retained)
    )
    return EchoPlan(f"auto-{ratio:.4g}", num_heads, layers, options.shards)


def _observe(
    model: Any, sequences: torch.Tensor, options: SearchOptions, rotary: Rotary, progress: Progress
) -> tuple[HeadMoments, Probe]:
    """Moments and probe, from sequences spread evenly over those at hand."""
    length = sequences.shape[1]
    generator = torch.Generator().manual_seed(options.seed)
    highest = max(options.max_position - length, 0)
    offsets = torch.randint(0, highest + 1, (len(sequences),), generator=generator)
    chosen = _evenly(len(sequences), max(options.max_tokens // length, 1))
    moments = HeadMoments(rotary, options.rotation_block, options.neighbours)
    collect(
        model, sequences[chosen], offsets[chosen], options.batch_size, moments,
        lambda steps: progress(steps, "plan: moments", "batch"),
    )  # fmt: skip
    # Little data is to mean little work: gradients cost three times as much as moments.
    most = max(len(sequences) // _SEQUENCES_PER_PROBE, _MIN_PROBES)
    chosen = _evenly(len(sequences), min(options.num_probes, most))
    probe = take_probe(
        model, sequences[chosen], offsets[chosen], options.num_queries, options.sink_tokens,
        options.recent_tokens, options.seed,
        lambda steps: progress(steps, "plan: sensitivities", "sequence"),
    )  # fmt: skip
    return moments, probe


def _evenly(available: int, wanted: int) -> torch.Tensor:
    """Indices of at most `wanted` items."""
    return torch.linspace(0, available - 1, min(available, wanted)).round().long()


def _sizes(budget: int, num_layers: int, num_heads: int, uniform: bool) -> list[int]:
    """How many heads of a shard a layer may retain."""
    if uniform:
        return [budget // num_layers]
    # With many heads, layers far from the mean are not worth the search.
    mean = budget / num_layers
    low, high = (1, num_heads) if num_heads <= 8 else (int(mean / 2), round(2 * mean))
    return list(range(max(low, 1), min(high, num_heads) + 1))


def _choices(
    layer: int,
    sizes: list[int],
    moments: HeadMoments,
    probe: Probe,
    scorer: Scorer,
    options: SearchOptions,
    rotary: Rotary,
) -> dict[int, Choice]:
    """The best set of a layer for every number of retained heads per shard."""
    head_dim = moments.head_dim
    scaled = output_moments(probe, moments, layer, rotary, options.rotation_block, options.ridge)
    num_heads = len(scaled[0]) // head_dim // options.shards
    found = {size: Choice(0.0, ()) for size in sizes}
    for shard in range(options.shards):
        first = shard * num_heads
        rows = slice(first * head_dim, (first + num_heads) * head_dim)
        everything = Elimination(tuple(matrix[rows, rows] for matrix in scaled), head_dim)
        searched = [size for size in sizes if size < num_heads]
        count = options.shortlist if options.uniform else -(-options.shortlist // 2)
        sets = shortlist(everything, num_heads, searched, count)
        sets[num_heads] = [tuple(range(num_heads))]
        for size in sizes:
            shifted = [tuple(first + head for head in heads) for heads in sets[size]]
            cost, best = _best_set(scorer, layer, range(first, first + num_heads), shifted)
            before = found[size]
            found[size] = Choice(
                before.cost + cost, before.retained + best, (*before.shortlists, tuple(shifted))
            )
    return found


def _best_set(
    scorer: Scorer,
    layer: int,
    heads: range,
    sets: Sequence[Heads],
    earlier: Sequence[HeadAt] = (),
) -> tuple[float, Heads]:
    """The set of least exact cost, and the cost; the heads outside it are rebuilt.

    From the set, that is, and from heads of `earlier` layers.
    """
    if len(sets[0]) == len(heads):
        return 0.0, sets[0]
    costs = torch.stack(
        [
            scorer.cost(
                layer,
                [head for head in heads if head not in retained],
                [*earlier, *((layer, head) for head in retained)],
            )
            for retained in sets
        ]
    ).tolist()
    return min(zip(costs, sets, strict=True))


def _choose_again(
    scorer: Scorer, choices: list[Choice], shard_heads: int, reach: int
) -> list[Heads]:
    """Retained heads, layer by layer: best beside all that earlier layers in reach retain."""
    retained: list[Heads] = []
    for layer, choice in enumerate(choices):
        found: Heads = ()
        for shard, sets in enumerate(choice.shortlists):
            heads = range(shard * shard_heads, (shard + 1) * shard_heads)
            earlier = heads_in_reach(retained, layer, heads, reach)
            found += _best_set(scorer, layer, heads, sets, earlier)[1]
        retained.append(found)
    return retained


def _layer_plan(layer: int, retained: Heads, extra: list[HeadAt], num_heads: int) -> LayerPlan:
    if len(retained) == num_heads:
        return LayerPlan(retained)
    earlier = sorted({at for at, _ in extra})
    sources = [Source(at, tuple(head for where, head in extra if where == at)) for at in earlier]
    return LayerPlan(retained, (*sources, Source(layer, retained)))
