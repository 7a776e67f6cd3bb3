"""The two stages of a training run, from a model and token sequences to maps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from echokv_vllm.checkpoint import LayerMaps
from echokv_vllm.eval.attention import Window
from echokv_vllm.plan import EchoPlan
from echokv_vllm.rope import rotary_from_config
from echokv_vllm.train.attention import CacheSetup
from echokv_vllm.train.curves import Curves
from echokv_vllm.train.descent import Objective, Settings, Training
from echokv_vllm.train.distillation import Distillation
from echokv_vllm.train.layerwise import KeyValueError, LayerwiseAttention
from echokv_vllm.train.options import Descent, LayerErrors, TrainOptions
from echokv_vllm.train.parameters import MapParameters, Whitening
from echokv_vllm.train.stage1 import Fit, LayerStream, choose_ridges, stream
from echokv_vllm.train.state import SavedState

SaveState = Callable[[dict[str, torch.Tensor], dict[str, Any]], None]
Progress = Callable[[Iterable[int], str, str], Any]
"""Wraps an iteration, given a title and what is counted."""


@dataclass(frozen=True)
class Material:
    """What the stages work on.

    Attributes:
        model: Supported Hugging Face causal LM in eval mode.
        plan: Echo plan for that model.
        fit_sequences: [num_sequences, sequence_len] token ids on the CPU.
        heldout_sequences: Likewise; they choose and measure, nothing is fitted to them.
        options: All settings but the paths.
        max_position: Positions are spread over [0, max_position).
    """

    model: Any
    plan: EchoPlan
    fit_sequences: torch.Tensor
    heldout_sequences: torch.Tensor
    options: TrainOptions
    max_position: int


@dataclass(frozen=True)
class Trained:
    """Maps and how they came to be.

    Attributes:
        maps: Float32, on the CPU.
        errors: Held-out errors of these maps, beside the fit's own after stage I.
        ridges: Ridge for K and V of every layer; empty after `stage1="sgd"`.
        descents: Runs of gradient descent.
    """

    maps: dict[int, LayerMaps]
    errors: dict[int, LayerErrors]
    ridges: dict[int, tuple[float, float]]
    descents: tuple[Descent, ...]


def fit_and_measure(
    model: Any,
    plan: EchoPlan,
    fit_sequences: torch.Tensor,
    heldout_sequences: torch.Tensor,
    options: TrainOptions,
    max_position: int,
    progress: Progress = lambda steps, title, unit: steps,
) -> tuple[dict[int, LayerMaps], dict[int, LayerErrors]]:
    """Closed-form stage I alone; arguments as the attributes of `Material`."""
    material = Material(model, plan, fit_sequences, heldout_sequences, options, max_position)
    stages = Stages(material, Curves(), progress=progress)
    stages.fit_sums()
    maps = stages.closed_form()
    return maps, stages.errors(maps)


@dataclass
class _Carried:
    """Results of finished stages that a saved state carries along."""

    fit_errors: dict[int, tuple[float, float]] = field(default_factory=dict)
    ridges: dict[int, tuple[float, float]] = field(default_factory=dict)
    descents: list[Descent] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {
            "fit_errors": {str(layer): list(pair) for layer, pair in self.fit_errors.items()},
            "ridges": {str(layer): list(pair) for layer, pair in self.ridges.items()},
            "descents": [asdict(descent) for descent in self.descents],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> _Carried:
        return cls(
            fit_errors={int(layer): (k, v) for layer, (k, v) in data["fit_errors"].items()},
            ridges={int(layer): (k, v) for layer, (k, v) in data["ridges"].items()},
            descents=[Descent(**descent) for descent in data["descents"]],
        )


class Stages:
    """Runs the stages of one training run.

    Every sequence gets random position offsets, so that positions cover [0, max_position); exact
    attention does not depend on them, but block-rotated keys do.

    Args:
        material: What to work on.
        curves: Gets the losses of gradient descent.
        save: Gets the state of gradient descent every so many steps.
        progress: Shows how far it is.
        saved: State to continue from.
    """

    def __init__(
        self,
        material: Material,
        curves: Curves,
        save: SaveState = lambda tensors, record: None,
        progress: Progress = lambda steps, title, unit: steps,
        saved: SavedState | None = None,
    ) -> None:
        self._material = material
        self._curves = curves
        self._save_state = save
        self._progress = progress
        self._saved = saved
        self._device = material.model.device
        self._rotary = rotary_from_config(material.model.config).to(self._device)
        self._carried = _Carried()
        options = material.options
        generator = torch.Generator().manual_seed(options.seed)
        highest = material.max_position - material.fit_sequences.shape[1]
        # Both drawn here, so that the held-out ones are the same whether the fit is done or not.
        self._fit_offsets, self._heldout_offsets = (
            torch.randint(0, highest + 1, (len(sequences),), generator=generator)
            for sequences in (material.fit_sequences, material.heldout_sequences)
        )
        self._fit: Fit | None = None
        self._heldout: Fit | None = None

    def train(self, stage2: str) -> Trained:
        """All stages.

        Args:
            stage2: `none`, `o-mse`, `qk-kl` or `kl`.
        """
        options, saved = self._material.options, self._saved
        in_stage2 = saved is not None and saved.record["stage"] == "II"
        parameters: MapParameters | None = None
        if saved is not None and in_stage2:
            self._carried = _Carried.from_dict(saved.record["carried"])
            parameters = self._parameters(self._zero_maps(), _whitening_of(saved, self._device))
            maps: dict[int, LayerMaps] = {}
        else:
            self.fit_sums()
            maps = self._sgd(saved) if options.stage1 == "sgd" else self.closed_form()
        if stage2 != "none":
            if parameters is None:
                parameters = self._parameters(maps, self._whitening())
            objective = self._objective(stage2, parameters)
            maps = self._descend("II", objective, parameters, saved if in_stage2 else None)
        return Trained(maps, self.errors(maps), self._carried.ridges, tuple(self._carried.descents))

    def fit_sums(self) -> None:
        """Sum up the least-squares systems of the fit."""
        self._fit = self._sums("fit", self._material.fit_sequences, self._fit_offsets)

    def closed_form(self) -> dict[int, LayerMaps]:
        """Stage I by least squares."""
        assert self._fit is not None, "fit_sums comes first"
        ridge = self._material.options.ridge
        if ridge is None:
            ridges = choose_ridges(self._fit, self._heldout_sums())
        else:
            ridges = dict.fromkeys(self._fit.layers, (ridge, ridge))
        maps, self._carried.fit_errors = self._fit.solve(ridges)
        self._carried.ridges = ridges
        return maps

    def errors(self, maps: dict[int, LayerMaps]) -> dict[int, LayerErrors]:
        """Held-out errors of some maps."""
        return {
            layer: LayerErrors(key, value, *self._carried.fit_errors[layer])
            for layer, (key, value) in self._heldout_sums().errors(maps).items()
        }

    def _sgd(self, saved: SavedState | None) -> dict[int, LayerMaps]:
        """Stage I by gradient descent, from maps that are all zero."""
        assert self._fit is not None
        parameters = self._parameters(self._zero_maps(), None)
        objective = KeyValueError(self._material.model, self._setup(), parameters)
        maps = self._descend("I", objective, parameters, saved)
        self._carried.fit_errors = self._fit.errors(maps)
        return maps

    def _descend(
        self,
        stage: str,
        objective: Objective,
        parameters: MapParameters,
        saved: SavedState | None,
    ) -> dict[int, LayerMaps]:
        material, options = self._material, self._material.options
        settings = Settings(
            stage=stage,
            steps=options.stage1_steps if stage == "I" else options.stage2_steps,
            learning_rate=options.learning_rate,
            step_size=options.step_size,
            max_position=material.max_position,
            seed=options.seed,
            save_every=options.save_every,
        )
        training = Training(
            objective, parameters, material.fit_sequences, material.heldout_sequences, settings,
            self._curves, self._device,
        )  # fmt: skip

        def save(tensors: dict[str, torch.Tensor], record: dict[str, Any]) -> None:
            if parameters.whitening is not None:
                for name, factor in parameters.whitening.factors.items():
                    tensors[f"whitening.{name}"] = factor
            self._save_state(
                tensors, {**record, "stage": stage, "carried": self._carried.to_dict()}
            )

        self._material.model.requires_grad_(False)
        with tensor_cores(stage == "II" and self._device.type == "cuda"):
            maps, descent = training.run(save, self._progress, saved)
        self._carried.descents.append(descent)
        return maps

    def _objective(self, loss: str, parameters: MapParameters) -> Objective:
        model, options = self._material.model, self._material.options
        if loss == "kl":
            recompute = options.checkpoint_activations
            return Distillation(model, self._setup(), parameters, recompute)
        return LayerwiseAttention(loss, model, self._setup(), parameters, options.num_queries)

    def _setup(self) -> CacheSetup:
        options = self._material.options
        return CacheSetup(
            plan=self._material.plan,
            rotary=self._rotary,
            rotation_block=options.rotation_block,
            window=Window(options.sink_tokens, options.recent_tokens),
            format=options.kv_cache_dtype,
            residual_bits=options.residual_bits,
        )

    def _parameters(self, maps: dict[int, LayerMaps], whitening: Whitening | None) -> MapParameters:
        return MapParameters(self._material.plan, maps, self._device, whitening)

    def _whitening(self) -> Whitening | None:
        options = self._material.options
        if not options.whiten or options.stage1 == "sgd":
            return None
        assert self._fit is not None
        return Whitening.of(self._fit, self._material.plan)

    def _zero_maps(self) -> dict[int, LayerMaps]:
        plan, head_dim = self._material.plan, self._rotary.head_dim
        maps = {}
        for layer in range(plan.num_layers):
            count = len(plan.discarded(layer))
            if count:
                size = len(plan.source_heads(layer, shard=0)) * head_dim
                whole, constant = (count, size, head_dim), (count, head_dim)
                bias = self._material.options.bias
                maps[layer] = LayerMaps(
                    torch.zeros(whole),
                    torch.zeros(whole),
                    torch.zeros(constant) if bias else None,
                    torch.zeros(constant) if bias else None,
                )
        return maps

    def _heldout_sums(self) -> Fit:
        if self._heldout is None:
            self._heldout = self._sums(
                "held-out errors", self._material.heldout_sequences, self._heldout_offsets
            )
        return self._heldout

    def _sums(self, name: str, sequences: torch.Tensor, offsets: torch.Tensor) -> Fit:
        material, options = self._material, self._material.options
        fit = Fit(material.plan, self._rotary.head_dim, self._device, options.bias)
        layers = LayerStream(
            material.plan, self._rotary, options.rotation_block, fit, options.kv_cache_dtype
        )
        stream(
            material.model, sequences, offsets, options.batch_size, layers,
            lambda batches: self._progress(batches, name, "batch"),
        )  # fmt: skip
        return fit


@contextmanager
def tensor_cores(wanted: bool) -> Iterator[None]:
    """Products of float32 matrices in TF32 where `wanted`, for as long as the context lasts.

    Its 10 bits of mantissa are more than the 7 that maps keep in a bfloat16 cache, and gradients
    are noisier than that; a closed form is not, so it stays in float32.
    """
    before = torch.get_float32_matmul_precision()
    if wanted:
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _whitening_of(saved: SavedState, device: torch.device) -> Whitening | None:
    factors = {
        name.removeprefix("whitening."): tensor.to(device)
        for name, tensor in saved.tensors.items()
        if name.startswith("whitening.")
    }
    return Whitening(factors) if factors else None
