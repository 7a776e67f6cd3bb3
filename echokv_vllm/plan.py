"""Echo plans: which KV heads every layer keeps, and what the others are rebuilt from.

A plan is pure bookkeeping over whole heads; it knows neither the model's weights nor the maps
that do the rebuilding. Terms follow the EchoKV paper (arXiv 2603.22910): a *retained* head stays
in the cache, a *discarded* one is rebuilt from *source* heads, an *anchor* layer keeps everything.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class PlanError(ValueError):
    """An echo plan that cannot be built, parsed or applied to the model at hand."""


@dataclass(frozen=True)
class Source:
    """Cached heads of one layer that feed the reconstruction of some layer.

    Attributes:
        layer: Index of the layer that holds the heads; may be the rebuilt layer itself.
        heads: KV head indices, each retained in `layer`; their order is the feature order.
    """

    layer: int
    heads: tuple[int, ...]


@dataclass(frozen=True)
class LayerPlan:
    """What one layer keeps and what it rebuilds the rest from.

    Attributes:
        retained: KV heads that stay in the cache, in storage order.
        sources: Where the features come from, in feature order; empty iff nothing is discarded.
    """

    retained: tuple[int, ...]
    sources: tuple[Source, ...] = ()


@dataclass(frozen=True)
class EchoPlan:
    """A validated echo plan for one model shape.

    With `shards=N` the heads form N contiguous equal shards, one per tensor-parallel rank. A rank
    sees its own heads only, so a discarded head is rebuilt from source heads of its own shard, and
    every shard keeps and reads equally many heads so that all ranks have the same page layout.

    Attributes:
        name: Preset name, or any label for a plan found otherwise.
        num_kv_heads: KV heads per layer of the model, H.
        layers: One entry per layer of the model.
        shards: Number of head shards.
        residual_bits: Bits per number of a coded residual; only 0 (none) is supported.

    Raises:
        PlanError: If the plan is inconsistent; the message names the layer and the remedy.
    """

    name: str
    num_kv_heads: int
    layers: tuple[LayerPlan, ...]
    shards: int = 1
    residual_bits: int = 0

    def __post_init__(self) -> None:
        _check_shape(self)
        for index in range(len(self.layers)):
            _check_retained(self, index)
        for index in range(len(self.layers)):
            _check_sources(self, index)
        if all(len(layer.retained) == self.num_kv_heads for layer in self.layers):
            raise PlanError(
                f"plan {self.name!r} discards no head in any of its {len(self.layers)} layers, so "
                "it saves nothing; let at least one layer retain fewer than "
                f"{self.num_kv_heads} heads, or serve the model without EchoKV"
            )

    @property
    def num_layers(self) -> int:
        """Layers of the model the plan is for."""
        return len(self.layers)

    @property
    def ratio(self) -> float:
        """Bytes of the retained heads over bytes of all heads (windows and maps not counted)."""
        retained = sum(len(layer.retained) for layer in self.layers)
        return retained / (self.num_kv_heads * self.num_layers)

    @property
    def read_ratio(self) -> float:
        """Heads that compressed decode reads of a token, over those of a full cache.

        Retained heads and sources, each once per layer: above `ratio` where layers read others.
        """
        read = sum(
            len({*self.source_heads(index), *((index, head) for head in layer.retained)})
            for index, layer in enumerate(self.layers)
        )
        return read / (self.num_kv_heads * self.num_layers)

    @property
    def heads_per_shard(self) -> int:
        """KV heads of one shard."""
        return self.num_kv_heads // self.shards

    def discarded(self, layer: int) -> tuple[int, ...]:
        """KV heads that `layer` does not keep, ascending."""
        retained = set(self.layers[layer].retained)
        return tuple(head for head in range(self.num_kv_heads) if head not in retained)

    def shard_of(self, head: int) -> int:
        """Shard that owns KV head `head`."""
        return head // self.heads_per_shard

    def source_heads(self, layer: int, shard: int | None = None) -> list[tuple[int, int]]:
        """Flatten the sources of `layer` to `(source layer, head)` pairs in feature order.

        Args:
            layer: The layer that is rebuilt.
            shard: Only the heads of this shard; all shards when None.
        """
        return [
            (source.layer, head)
            for source in self.layers[layer].sources
            for head in source.heads
            if shard is None or self.shard_of(head) == shard
        ]

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-able data; `from_dict` reads it back."""
        return {
            "name": self.name,
            "num_kv_heads": self.num_kv_heads,
            "shards": self.shards,
            "residual_bits": self.residual_bits,
            "layers": [
                {
                    "retained": list(layer.retained),
                    "sources": [
                        {"layer": source.layer, "heads": list(source.heads)}
                        for source in layer.sources
                    ],
                }
                for layer in self.layers
            ],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> EchoPlan:
        """Parse what `to_dict` wrote.

        Raises:
            PlanError: If a key is missing or unknown, a type is wrong, or the plan is invalid.
        """
        _check_keys(
            data,
            "plan",
            required=("name", "num_kv_heads", "layers"),
            optional=("shards", "residual_bits"),
        )
        name = data["name"]
        if not isinstance(name, str):
            raise PlanError(f"plan name must be a string, got {name!r}")
        layers = tuple(
            _parse_layer(entry, index)
            for index, entry in enumerate(_as_list(data["layers"], "layers"))
        )
        return cls(
            name=name,
            num_kv_heads=_as_int(data["num_kv_heads"], "num_kv_heads"),
            layers=layers,
            shards=_as_int(data.get("shards", 1), "shards"),
            residual_bits=_as_int(data.get("residual_bits", 0), "residual_bits"),
        )

    @classmethod
    def from_json_file(cls, path: str | Path) -> EchoPlan:
        """Read a plan from a JSON file in the form of `to_dict`.

        Raises:
            PlanError: If the file is missing, is not JSON, or holds no valid plan.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise PlanError(f"plan file {str(path)!r} does not exist") from error
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise PlanError(f"plan file {str(path)!r} is not valid JSON: {error}") from error
        return cls.from_dict(data)


def _check_shape(plan: EchoPlan) -> None:
    if plan.num_kv_heads < 1:
        raise PlanError(f"num_kv_heads={plan.num_kv_heads} must be at least 1")
    if not plan.layers:
        raise PlanError(f"plan {plan.name!r} has no layers; give one entry per model layer")
    if plan.shards < 1 or plan.num_kv_heads % plan.shards:
        raise PlanError(
            f"shards={plan.shards} does not divide num_kv_heads={plan.num_kv_heads}; choose a "
            "divisor of it"
        )
    if plan.residual_bits != 0:
        raise PlanError(
            f"residual_bits={plan.residual_bits} is not supported yet; the only allowed value is 0"
        )


def _check_heads(plan: EchoPlan, where: str, heads: tuple[int, ...]) -> None:
    """Range, repetition and an equal number of heads per shard."""
    for head in heads:
        if not 0 <= head < plan.num_kv_heads:
            raise PlanError(
                f"{where}: head {head} is out of range; allowed are 0..{plan.num_kv_heads - 1}"
            )
    if len(set(heads)) != len(heads):
        raise PlanError(f"{where}: heads {list(heads)} name a head twice; name each once")


def _check_balance(plan: EchoPlan, where: str, heads: list[int]) -> None:
    counts = [0] * plan.shards
    for head in heads:
        counts[plan.shard_of(head)] += 1
    if len(set(counts)) > 1:
        raise PlanError(
            f"{where}: {counts} heads lie in the {plan.shards} shards of {plan.heads_per_shard} "
            "heads, but every shard must have equally many; change the heads or the shard count"
        )


def _check_retained(plan: EchoPlan, index: int) -> None:
    retained = plan.layers[index].retained
    _check_heads(plan, f"layer {index} retained", retained)
    _check_balance(plan, f"layer {index} retained", list(retained))


def _check_sources(plan: EchoPlan, index: int) -> None:
    layer = plan.layers[index]
    where = f"layer {index} sources"
    if len(layer.retained) == plan.num_kv_heads:
        if layer.sources:
            raise PlanError(f"{where}: the layer discards nothing, so it must have no sources")
        return
    if not layer.sources:
        raise PlanError(
            f"{where}: heads {list(plan.discarded(index))} are discarded but there is no source to "
            "rebuild them from; add sources or retain all heads"
        )
    for source in layer.sources:
        if not 0 <= source.layer < plan.num_layers:
            raise PlanError(
                f"{where}: source layer {source.layer} is out of range; allowed are "
                f"0..{plan.num_layers - 1}"
            )
        if not source.heads:
            raise PlanError(f"{where}: source layer {source.layer} names no heads; leave it out")
        _check_heads(plan, f"{where}, source layer {source.layer}", source.heads)
        kept = plan.layers[source.layer].retained
        for head in source.heads:
            if head not in kept:
                raise PlanError(
                    f"{where}: head {head} of layer {source.layer} is not retained there; retained "
                    f"are {sorted(kept)}"
                )
    pairs = plan.source_heads(index)
    if len(set(pairs)) != len(pairs):
        raise PlanError(f"{where}: a (layer, head) pair appears twice; name each once")
    _check_balance(plan, where, [head for _, head in pairs])


def _parse_layer(entry: Any, index: int) -> LayerPlan:
    where = f"layer {index}"
    _check_keys(entry, where, required=("retained",), optional=("sources",))
    sources = []
    for item in _as_list(entry.get("sources", []), f"{where} sources"):
        _check_keys(item, f"{where} source", required=("layer", "heads"))
        sources.append(
            Source(
                layer=_as_int(item["layer"], f"{where} source layer"),
                heads=_as_heads(item["heads"], f"{where} source heads"),
            )
        )
    return LayerPlan(_as_heads(entry["retained"], f"{where} retained"), tuple(sources))


def _check_keys(
    data: Any, where: str, required: tuple[str, ...], optional: tuple[str, ...] = ()
) -> None:
    if not isinstance(data, Mapping):
        raise PlanError(f"{where} must be a JSON object, got {type(data).__name__}")
    missing = [key for key in required if key not in data]
    unknown = sorted(str(key) for key in data if key not in required + optional)
    if missing or unknown:
        raise PlanError(
            f"{where}: missing keys {missing}, unknown keys {unknown}; allowed are "
            f"{list(required + optional)}"
        )


def _as_list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise PlanError(f"{where} must be a list, got {value!r}")
    return value


def _as_int(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise PlanError(f"{where} must be a whole number, got {value!r}")
    return value


def _as_heads(value: Any, where: str) -> tuple[int, ...]:
    return tuple(_as_int(head, where) for head in _as_list(value, where))
