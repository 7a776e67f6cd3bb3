"""The rows of the comparison: which caches are measured, and the maps they need.

Checkpoints are made by `echokv_vllm.train.train`; `Maps` holds the options that differ from the
run's own (model, data, seed). Plans that are searched are found once, by the closed-form checkpoint
of their ratio, and used again by the checkpoints that name it in `plan_of`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from one_sided import KEYS, VALUES

from echokv_vllm.plan import EchoPlan, LayerPlan, Source

STAGE_II = "kl"
BLOCKS = (1, 16, 64, 256, 1024, 0)
AUTO_RATIOS = (0.5, 0.375, 0.25)


@dataclass(frozen=True)
class Maps:
    """A checkpoint to train.

    Attributes:
        name: Of its folder.
        options: Of `TrainOptions`.
        plan_of: Name of the maps whose plan is used instead of a preset.
    """

    name: str
    options: dict[str, Any]
    plan_of: str | None = None


@dataclass(frozen=True)
class Row:
    """One cache to measure.

    Attributes:
        table: Heading it is listed under.
        name: What the row is called.
        method: `echo`, `one-sided`, `quantised`, `low-rank`, `eviction`, `copy`, `think` or
            `hybrid`.
        arguments: Of the method.
        maps: Checkpoint of an `echo`, `one-sided` or `hybrid` row.
        tasks: Whether the tasks are measured too.
    """

    table: str
    name: str
    method: str
    arguments: dict[str, Any] = field(default_factory=dict)
    maps: Maps | None = None
    tasks: bool = False


def all_rows(stage2_steps: int, num_layers: int, num_kv_heads: int) -> list[Row]:
    """Every row for a model shape, in the order of the report."""
    return [
        *_blocks(stage2_steps),
        *_presets(stage2_steps),
        *_ablations(num_layers, num_kv_heads, stage2_steps),
        *_auto(stage2_steps),
        *_composition(stage2_steps),
        *_residuals(stage2_steps),
        *_hybrids(),
        *_baselines(),
    ]


def _maps(name: str, steps: int, plan_of: str | None = None, **options: Any) -> Maps:
    """Closed form for 0 steps, else stage II after it."""
    stage = {"stage2": STAGE_II, "stage2_steps": steps} if steps else {"stage2": "none"}
    suffix = "stage2" if steps else "closed"
    return Maps(f"{name}-{suffix}", {**stage, **options}, plan_of)


def _both(steps: int) -> Iterator[tuple[int, str]]:
    yield 0, "closed form"
    yield steps, "stage II"


def _blocks(steps: int) -> Iterator[Row]:
    for block in BLOCKS:
        space = {0: "absolute", 1: "un-rotated"}.get(block, f"B = {block}")
        for count, stage in _both(steps):
            options = {"plan": "local-0.5", "rotation_block": block}
            yield Row(
                "Rotation blocks",
                f"local-0.5, {space}, {stage}",
                "echo",
                maps=_maps(f"local-0.5-b{block}", count, **options),
                tasks=block == 64,
            )


def _presets(steps: int) -> Iterator[Row]:
    for plan in ("paper-0.7", "paper-0.5", "paper-0.3"):
        yield from (rows := list(_paper(f"{plan}, un-rotated", plan, steps)))
        for row in (rows[0], rows[-1]):
            for part in (KEYS, VALUES):
                yield replace(
                    row,
                    table="Keys or values alone echoed",
                    name=f"{row.name}, {part} alone",
                    method="one-sided",
                    arguments={"part": part},
                )
    for plan in ("local-0.375", "local-0.25"):
        for count, stage in _both(steps):
            yield Row(
                "Fixed plans",
                f"{plan}, B = 64, {stage}",
                "echo",
                maps=_maps(f"{plan}-b64", count, plan=plan, rotation_block=64),
                tasks=plan == "local-0.25",
            )


def _paper(name: str, plan: str | EchoPlan, steps: int) -> Iterator[Row]:
    """Un-rotated keys, in closed form and by the paper's two stages."""
    label = plan if isinstance(plan, str) else plan.name
    for options, stage in (
        ({"stage2": "none"}, "closed form"),
        ({"stage1": "sgd", "stage2": "none"}, "KV-MSE by AdamW"),
        ({"stage1": "sgd", "whiten": False, "stage2": "o-mse", "stage2_steps": steps}, "+ O-MSE"),
    ):
        suffix = stage.replace(" ", "").replace("+", "").lower()
        maps = Maps(f"{label}-b1-{suffix}", {"plan": plan, "rotation_block": 1, **options})
        yield Row("Fixed plans", f"{name}, {stage}", "echo", maps=maps)


def _ablations(num_layers: int, num_kv_heads: int, steps: int) -> Iterator[Row]:
    """The paper's Table 4: local and global input, or one of them, at 0.75 of the bytes."""
    heads = tuple(range(num_kv_heads))
    half, most = heads[: num_kv_heads // 2], heads[: num_kv_heads * 3 // 4]
    both, global_only = [], []
    for layer in range(num_layers):
        anchor = LayerPlan(heads)
        group = layer - layer % 2
        both.append(
            anchor
            if layer == group
            else LayerPlan(half, (Source(group, heads), Source(layer, half)))
        )
        # Every fourth layer keeps nothing.
        global_only.append(anchor if layer % 4 != 3 else LayerPlan((), (Source(layer - 1, heads),)))
    local_only = [LayerPlan(most, (Source(layer, most),)) for layer in range(num_layers)]
    for label, layers in (
        ("local and global", both), ("global only", global_only), ("local only", local_only)
    ):  # fmt: skip
        plan = EchoPlan(label.replace(" ", "-"), num_kv_heads, tuple(layers))
        for row in _paper(f"{label} 0.75", plan, steps):
            yield replace(row, table="Local and global input, un-rotated keys")


def _searched(ratio: float) -> Maps:
    """The checkpoint that fixes a ratio's plan."""
    options = {"plan": "auto", "ratio": ratio, "uniform": True, "rotation_block": 64}
    return _maps(f"auto-{ratio}", 0, **options)


def _on_searched(ratio: float, steps: int, suffix: str = "", **options: Any) -> Maps:
    if not steps and not suffix:
        return _searched(ratio)
    return _maps(
        f"auto-{ratio}{suffix}", steps, _searched(ratio).name, rotation_block=64, **options
    )


def _auto(steps: int) -> Iterator[Row]:
    for ratio in AUTO_RATIOS:
        for count, stage in _both(steps):
            yield Row(
                "Searched plans, uniform pages, B = 64",
                f"auto-{ratio}, {stage}",
                "echo",
                maps=_on_searched(ratio, count),
                tasks=count > 0,
            )


def _composition(steps: int) -> Iterator[Row]:
    """On a cache that is quantised as a whole, and with a window that is not (`method.md` §5)."""
    for exact_window in (False, True):
        table = "On quantised caches" + (", exact window" if exact_window else "")
        for cache_format in ("fp8", "int4"):
            quantised = {"kv_cache_dtype": cache_format, "exact_window": exact_window}
            tasks = not exact_window
            name = f"full cache, {cache_format}" + (", exact window" if exact_window else "")
            yield Row(table, name, "quantised", quantised, tasks=tasks)
        for cache_format, ratio in (("fp8", 0.5), ("fp8", 0.375), ("int4", 0.5), ("int4", 0.375)):
            quantised = {"kv_cache_dtype": cache_format, "exact_window": exact_window}
            for count, stage in _both(steps):
                name = f"auto-{ratio} on {cache_format}, {stage}"
                yield Row(
                    table,
                    name + (", exact window" if exact_window else ""),
                    "echo",
                    quantised,
                    _on_searched(ratio, count, f"-{cache_format}", kv_cache_dtype=cache_format),
                    tasks=count > 0 and ratio == 0.5 and not exact_window,
                )


def _residuals(steps: int) -> Iterator[Row]:
    for ratio in AUTO_RATIOS:
        for cache_format in ("auto", "fp8"):
            shown = "bf16" if cache_format == "auto" else cache_format
            cache = {"kv_cache_dtype": cache_format, "residual_bits": 2}
            # Least squares does not know of residuals: the closed form is the plain one.
            closed = _searched(ratio)
            if cache_format != "auto":
                closed = _on_searched(ratio, 0, f"-{shown}", kv_cache_dtype=cache_format)
            tuned = _on_searched(ratio, steps, f"-{shown}-residual", **cache)
            for maps, stage in ((closed, "closed form"), (tuned, "stage II")):
                yield Row(
                    "With 2-bit residuals",
                    f"auto-{ratio} on {shown} + residual, {stage}",
                    "echo",
                    cache,
                    maps,
                    tasks=maps is tuned and cache_format == "fp8",
                )


def _hybrids() -> Iterator[Row]:
    """Keys with a share of their channels, values echoed by `local-R`: mean of both ratios."""
    for ratio in (0.5, 0.25):
        for tuned in (False, True):
            yield Row(
                "Hybrid: pruned keys, echoed values",
                f"hybrid-{ratio}, " + ("O-MSE" if tuned else "closed form"),
                "hybrid",
                {"ratio": ratio, "tuned": tuned},
                _maps(f"local-{ratio}-b64", 0, plan=f"local-{ratio}", rotation_block=64),
            )


def _baselines() -> Iterator[Row]:
    table = "Other ways to spend the same bytes"
    for ratio in (0.5, 0.25):
        for groups, allocation in ((1, "energy"), (1, "uniform"), (2, "energy")):
            arguments = {"ratio": ratio, "num_groups": groups, "allocation": allocation}
            shown = "all heads together" if groups == 1 else f"{groups} groups of heads"
            name = f"low rank {ratio}, {shown}, {allocation} ranks"
            yield Row(table, name, "low-rank", arguments, tasks=allocation == "energy")
        for shared in (False, True):
            arguments = {"ratio": ratio, "shared_budget": shared}
            name = f"eviction {ratio}" + (", shared budgets" if shared else "")
            yield Row(table, name, "eviction", arguments, tasks=True)
        for scaled in (True, False):
            arguments = {"ratio": ratio, "scaled": scaled}
            name = f"nearest head {ratio}" + (", scaled" if scaled else "")
            yield Row(table, name, "copy", arguments, tasks=scaled)
    for ratio in (0.75, 0.625):
        for prompt in (False, True):
            chosen = "each prompt" if prompt else "calibration"
            arguments = {"ratio": ratio, "prompt": prompt}
            name = f"ThinK keys {ratio}, channels by {chosen}"
            yield Row(table, name, "think", arguments, tasks=not prompt)
