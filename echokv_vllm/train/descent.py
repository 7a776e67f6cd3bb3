"""Training by AdamW with a cosine, the same for every loss.

What a step does depends on the seed and the number of the step alone, so that a run continued from
a saved state takes the same steps as one that was never interrupted. Held-out loss decides which
maps are kept: those of the best measurement, the starting point included.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from echokv_vllm.checkpoint import LayerMaps
from echokv_vllm.train.curves import Curves, Point
from echokv_vllm.train.options import Descent
from echokv_vllm.train.parameters import MapParameters
from echokv_vllm.train.state import SavedState

# Held-out sequences of one measurement; measurements per run, and the least steps between two.
_NUM_HELDOUT = 16
_NUM_MEASUREMENTS = 10
_MIN_STEPS = 20


class DivergenceError(ValueError):
    """A loss that is not finite."""


class Objective(Protocol):
    """A loss that maps are trained on.

    Attributes:
        loss: Its name.
        groups: Leaves by group; every group has a loss of its own and is judged by itself.
    """

    loss: str
    groups: dict[str, tuple[str, ...]]

    def losses(
        self, ids: torch.Tensor, offsets: torch.Tensor, generator: torch.Generator, learn: bool
    ) -> dict[str, torch.Tensor]:
        """Losses of one batch, scalar tensors by group.

        Args:
            ids: [batch, len] int64 on the model's device.
            offsets: [batch] int64 position offsets, there as well.
            generator: For anything random, on the CPU.
            learn: Add the gradients to the leaves.
        """


@dataclass(frozen=True)
class Settings:
    """How to descend.

    Attributes:
        stage: `I` or `II`, for the records.
        steps: Number of steps.
        learning_rate: Of the first step.
        step_size: Sequences per step.
        max_position: Positions are spread over [0, max_position).
        seed: Seed of order, offsets and whatever the objective draws.
        save_every: Steps between two saves.
    """

    stage: str
    steps: int
    learning_rate: float
    step_size: int
    max_position: int
    seed: int
    save_every: int


class Training:
    """One run of gradient descent.

    Args:
        objective: The loss.
        parameters: The maps.
        fit_sequences: [num_sequences, len] int32 token ids on the CPU.
        heldout_sequences: Likewise; the first ones judge.
        settings: How to descend.
        curves: Gets all losses.
        device: Where the model is.
    """

    def __init__(
        self,
        objective: Objective,
        parameters: MapParameters,
        fit_sequences: torch.Tensor,
        heldout_sequences: torch.Tensor,
        settings: Settings,
        curves: Curves,
        device: torch.device,
    ) -> None:
        self._objective = objective
        self._parameters = parameters
        self._fit_sequences = fit_sequences
        self._heldout_sequences = heldout_sequences[:_NUM_HELDOUT]
        self._settings = settings
        self._curves = curves
        self._device = device
        # Maps start as a least-squares solution or at 0 and need no pull towards 0.
        self._optimizer = torch.optim.AdamW(
            list(parameters.leaves.values()),
            lr=settings.learning_rate,
            weight_decay=0.0,
            fused=device.type == "cuda",
        )
        self._step = 0
        self._initial: dict[str, float] = {}
        self._best: dict[str, float] = {}
        self._best_step: dict[str, int] = {}
        self._kept: dict[str, torch.Tensor] = {}

    def run(
        self,
        save: Callable[[dict[str, torch.Tensor], dict[str, Any]], None],
        progress: Callable[[Iterable[int], str, str], Any],
        saved: SavedState | None = None,
    ) -> tuple[dict[int, LayerMaps], Descent]:
        """Take all steps.

        Args:
            save: Gets the tensors and the record of the state to save.
            progress: Wraps the iteration over the steps, given a title and what is counted; may
                offer `set_postfix_str`.
            saved: State to continue from.

        Returns:
            The maps of least held-out loss, on the CPU, and what happened.

        Raises:
            DivergenceError: If a loss is not finite.
        """
        settings = self._settings
        if saved is not None:
            self._restore(saved)
        else:
            self._measure()
            save(*self._state())
        every = max(settings.steps // _NUM_MEASUREMENTS, _MIN_STEPS)
        title = f"stage {settings.stage}, {self._objective.loss}"
        steps = progress(range(self._step, settings.steps), title, "step")
        for step in steps:
            loss = self._take(step)
            self._step = step + 1
            if self._step % every == 0 or self._step == settings.steps:
                self._measure()
            if hasattr(steps, "set_postfix_str"):
                best = sum(self._best.values()) / len(self._best)
                steps.set_postfix_str(f"loss {loss:.4g}, held out {best:.4g}", refresh=False)
            if self._step % settings.save_every == 0:
                save(*self._state())
        return self._parameters.maps(self._kept), self._summary()

    def _summary(self) -> Descent:
        return Descent(
            loss=self._objective.loss,
            steps=self._step,
            initial=self._initial,
            final=self._best,
            best_step=self._best_step,
        )

    def _take(self, step: int) -> float:
        """One step; the mean training loss before it."""
        settings = self._settings
        rate = settings.learning_rate * (1 + math.cos(math.pi * step / settings.steps)) / 2
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad(set_to_none=True)
        generator = _generator(settings.seed, settings.stage, "step", step)
        sequences = self._fit_sequences[self._indices(step)]
        losses = self._losses(sequences, generator, learn=True)
        loss = sum(losses.values()) / len(losses)
        self._optimizer.step()
        self._point(step, "training", "mean", loss, rate)
        return loss

    def _indices(self, step: int) -> torch.Tensor:
        """Sequences of a step: a new random order whenever all have been seen."""
        count, settings = len(self._fit_sequences), self._settings
        wanted = range(step * settings.step_size, (step + 1) * settings.step_size)
        orders = {
            epoch: torch.randperm(
                count, generator=_generator(settings.seed, settings.stage, "order", epoch)
            )
            for epoch in {index // count for index in wanted}
        }
        return torch.stack([orders[index // count][index % count] for index in wanted])

    def _losses(
        self, sequences: torch.Tensor, generator: torch.Generator, learn: bool
    ) -> dict[str, float]:
        highest = self._settings.max_position - sequences.shape[1]
        offsets = torch.randint(0, highest + 1, (len(sequences),), generator=generator)
        found = self._objective.losses(
            sequences.to(self._device, torch.int64), offsets.to(self._device), generator, learn
        )
        assert sorted(found) == sorted(self._objective.groups), "a group has no loss"
        # One copy from the device for all of them.
        values = torch.stack([value.float() for value in found.values()]).tolist()
        for group, value in zip(found, values, strict=True):
            if not math.isfinite(value):
                raise DivergenceError(
                    f"stage {self._settings.stage} diverged: {self._objective.loss} of the "
                    f"{group} is {value} after {self._step} steps; lower "
                    f"learning_rate={self._settings.learning_rate}, or use dtype float32"
                )
        return dict(zip(found, values, strict=True))

    def _measure(self) -> None:
        """Held-out losses; keep the leaves of the groups that are better than ever before."""
        sums = dict.fromkeys(self._objective.groups, 0.0)
        for index, sequence in enumerate(self._heldout_sequences):
            # The same offsets and queries every time: only the maps may make a difference.
            generator = _generator(self._settings.seed, self._settings.stage, "held-out", index)
            for group, value in self._losses(sequence[None], generator, learn=False).items():
                sums[group] += value
        means = {group: value / len(self._heldout_sequences) for group, value in sums.items()}
        if not self._initial:
            self._initial = means
        for group, value in means.items():
            self._point(self._step, "held-out", group, value)
            if group not in self._best or value < self._best[group]:
                self._best[group] = value
                self._best_step[group] = self._step
                self._kept.update(self._parameters.snapshot(self._objective.groups[group]))
        if len(means) > 1:
            self._point(self._step, "held-out", "mean", sum(means.values()) / len(means))

    def _point(self, step: int, tokens: str, group: str, value: float, rate: float = 0.0) -> None:
        settings = self._settings
        self._curves.add(
            Point(settings.stage, self._objective.loss, step, tokens, group, value, rate)
        )

    def _state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        tensors = {}
        for name, leaf in self._parameters.leaves.items():
            tensors[f"now.{name}"] = leaf
            tensors[f"best.{name}"] = self._kept[name]
            for moment in ("exp_avg", "exp_avg_sq"):
                if leaf in self._optimizer.state:
                    tensors[f"{moment}.{name}"] = self._optimizer.state[leaf][moment]
        points = [list(point.row()) for point in self._curves.points]
        record = {
            "step": self._step,
            "initial": self._initial,
            "best": self._best,
            "best_step": self._best_step,
            "points": points,
        }
        return tensors, record

    def _restore(self, saved: SavedState) -> None:
        tensors, record = saved.tensors, saved.record
        self._step = record["step"]
        self._initial, self._best = record["initial"], record["best"]
        self._best_step = record["best_step"]
        self._curves.restore(record["points"])
        names = list(self._parameters.leaves)
        self._parameters.load({name: tensors[f"now.{name}"] for name in names})
        self._kept = {name: tensors[f"best.{name}"].to(self._device) for name in names}
        for name, leaf in self._parameters.leaves.items():
            if f"exp_avg.{name}" in tensors:
                self._optimizer.state[leaf] = {
                    "step": torch.tensor(
                        float(self._step),
                        device=self._device if self._device.type == "cuda" else None,
                    ),
                    **{
                        moment: tensors[f"{moment}.{name}"].to(self._device)
                        for moment in ("exp_avg", "exp_avg_sq")
                    },
                }


def _generator(*parts: int | str) -> torch.Generator:
    """Generator of its own for every purpose."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
