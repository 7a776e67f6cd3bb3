"""Echo plans by name: the paper's groups of layers with an anchor, and plans without anchors.

They keep the first heads of a layer, whatever the model; `--plan auto` searches better ones.
"""

from __future__ import annotations

from echokv_vllm.plan import EchoPlan, LayerPlan, PlanError, Source

PRESETS: dict[str, str] = {
    "local-R": (
        "no anchors: every layer keeps its first round(R*H) KV heads (0 < R < 1) and rebuilds the "
        "others from those; local-0.5 stores half of the bytes"
    ),
    "paper-0.7": (
        "groups of 2 layers: the first keeps all heads, the second 3 of 8 (0.69 of the bytes)"
    ),
    "paper-0.5": "groups of 2 layers: the first keeps all heads, the second none (0.50)",
    "paper-0.3": "groups of 5 layers: the first keeps all heads, the others 1 of 8 (0.30)",
}
"""Every preset name with what it means; `R` stands for a number."""

# Group length S and heads kept by a non-anchor layer, in eighths of the KV heads.
_PAPER_GROUPS: dict[str, tuple[int, int]] = {
    "paper-0.7": (2, 3),
    "paper-0.5": (2, 0),
    "paper-0.3": (5, 1),
}


def preset_plan(name: str, num_layers: int, num_kv_heads: int, shards: int = 1) -> EchoPlan:
    """Build one of `PRESETS` for a model shape.

    Head counts of the `paper-*` presets are given for H=8 and scale with H (at least one head
    where the paper keeps some). `round` is Python's: halves go to the even number.

    Raises:
        PlanError: If the name is unknown or the preset does not fit the shape.
    """
    if num_layers < 1 or num_kv_heads < 1 or shards < 1:
        raise PlanError(
            f"num_layers={num_layers}, num_kv_heads={num_kv_heads} and shards={shards} must "
            "all be at least 1"
        )
    if name in _PAPER_GROUPS:
        group_len, eighths = _PAPER_GROUPS[name]
        num_retained = max(round(eighths * num_kv_heads / 8), 1) if eighths else 0
    elif name.startswith("local-"):
        group_len = 1
        num_retained = round(_local_ratio(name) * num_kv_heads)
        if not 1 <= num_retained < num_kv_heads:
            raise PlanError(
                f"preset {name!r} would keep {num_retained} of {num_kv_heads} KV heads; choose "
                f"R so that round(R*{num_kv_heads}) lies in 1..{num_kv_heads - 1}"
            )
    else:
        raise PlanError(
            f"unknown plan {name!r}; allowed are {', '.join(PRESETS)} (R is a number between 0 "
            "and 1, as in local-0.5) or a JSON file with a plan"
        )
    if num_kv_heads % shards or num_retained % shards:
        raise PlanError(
            f"preset {name!r} keeps {num_retained} of {num_kv_heads} KV heads, which does not "
            f"divide into shards={shards} equal parts; choose a shard count that divides both, "
            "or another plan"
        )
    retained = _first_heads_per_shard(num_retained, num_kv_heads, shards)
    layers = tuple(
        _preset_layer(index, group_len, retained, num_kv_heads) for index in range(num_layers)
    )
    return EchoPlan(name=name, num_kv_heads=num_kv_heads, layers=layers, shards=shards)


def load_plan(name_or_file: str, num_layers: int, num_kv_heads: int, shards: int = 1) -> EchoPlan:
    """Resolve a preset name or a JSON plan file for a model shape.

    Args:
        name_or_file: Preset name (see `PRESETS`), or the path of a file ending in `.json`.
        num_layers: Layers of the model.
        num_kv_heads: KV heads per layer of the model.
        shards: Shard count for a preset; a file names its own, which must agree unless this is 1.

    Raises:
        PlanError: If there is no such plan or it does not fit the model.
    """
    if not name_or_file.endswith(".json"):
        return preset_plan(name_or_file, num_layers, num_kv_heads, shards)
    plan = EchoPlan.from_json_file(name_or_file)
    if (plan.num_layers, plan.num_kv_heads) != (num_layers, num_kv_heads):
        raise PlanError(
            f"plan file {name_or_file!r} is for {plan.num_layers} layers of {plan.num_kv_heads} KV "
            f"heads, but the model has {num_layers} layers of {num_kv_heads}; use a plan made for "
            "this model"
        )
    if shards not in (1, plan.shards):
        raise PlanError(
            f"shards={shards} was asked for, but plan file {name_or_file!r} has "
            f"shards={plan.shards}; drop the option or change the file"
        )
    return plan


def _local_ratio(name: str) -> float:
    text = name.removeprefix("local-")
    try:
        ratio = float(text)
    except ValueError:
        ratio = -1.0
    if not 0 < ratio < 1:
        raise PlanError(
            f"plan {name!r}: {text!r} is not a number between 0 and 1; write for example local-0.5"
        )
    return ratio


def _first_heads_per_shard(num_retained: int, num_kv_heads: int, shards: int) -> tuple[int, ...]:
    shard_heads = num_kv_heads // shards
    return tuple(
        shard * shard_heads + head
        for shard in range(shards)
        for head in range(num_retained // shards)
    )


def _preset_layer(
    index: int, group_len: int, retained: tuple[int, ...], num_kv_heads: int
) -> LayerPlan:
    """Layer `index` of a preset; `group_len=1` means that there are no anchors."""
    all_heads = tuple(range(num_kv_heads))
    own = (Source(index, retained),) if retained else ()
    if group_len == 1:
        return LayerPlan(retained, own)
    anchor = index - index % group_len
    if index == anchor:
        return LayerPlan(all_heads)
    return LayerPlan(retained, (Source(anchor, all_heads), *own))
