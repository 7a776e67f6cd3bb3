"""`kl`: the next-token distribution of the compressed model is drawn to that of the full cache.

Both run over the same tokens. In the compressed run every layer discards heads and every query sees
rebuilt ones, so errors of one layer reach the next, as they do in use; the gradient flows back
through the frozen model into all maps at once. The scores of long sequences are held for a tile of
queries at a time and computed again in the backward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from echokv_vllm.plan import EchoPlan
from echokv_vllm.train.attention import (
    CacheSetup,
    KeyValue,
    Rebuilder,
    Visibility,
    echo_output,
    echo_scores,
    pick,
)
from echokv_vllm.train.capture import check_scores
from echokv_vllm.train.parameters import MapParameters

_NAME = "echokv_train"
_CONTEXT = "echokv_training_run"

# Scores per query head that are held at once: 1,024 queries of 1,024 tokens.
_TILE_SCORES = 1 << 20
# Logits of so many tokens are held at once; a vocabulary of 128,000 makes them large.
_LOGIT_TOKENS = 512


def check_order(plan: EchoPlan) -> None:
    """Refuse plans that one pass through the model cannot follow.

    Raises:
        ValueError: If a layer has sources in a later layer.
    """
    for layer, entry in enumerate(plan.layers):
        last = max((source.layer for source in entry.sources), default=layer)
        if last > layer:
            raise ValueError(
                f"plan {plan.name!r} rebuilds layer {layer} from layer {last}, which a pass "
                "through the model has not reached yet; use stage2=o-mse, or a plan with sources "
                "in the same or earlier layers"
            )


class Distillation:
    """Mean KL(full || compressed) over the predictions made with rebuilt context.

    Args:
        model: Supported Hugging Face causal LM in eval mode.
        setup: The cache.
        parameters: The maps.
        checkpoint_layers: Recompute whole model layers in the backward pass.

    Raises:
        ValueError: If a layer has sources in a later layer.
    """

    loss = "kl"

    def __init__(
        self,
        model: Any,
        setup: CacheSetup,
        parameters: MapParameters,
        checkpoint_layers: bool = False,
    ) -> None:
        check_order(setup.plan)
        self.groups = {
            "model": tuple(name for layer in parameters.layers for name in parameters.names(layer))
        }
        self._model = model
        self._setup = setup
        self._parameters = parameters
        self._checkpoint_layers = checkpoint_layers

    def losses(
        self, ids: torch.Tensor, offsets: torch.Tensor, generator: torch.Generator, learn: bool
    ) -> dict[str, torch.Tensor]:
        """See `Objective`.

        Raises:
            ActivationError: If the model's own scores are not finite.
        """
        decoder = self._model.get_decoder()
        run = _Run(self._setup, self._parameters, offsets, ids.shape[1])
        first = self._setup.first_query()
        with _attention_of_runs(self._model):
            with torch.no_grad():
                full = decoder(input_ids=ids, use_cache=False).last_hidden_state
            with torch.set_grad_enabled(learn):
                with _checkpointed(decoder, learn and self._checkpoint_layers):
                    echo = decoder(
                        input_ids=ids, use_cache=False, **{_CONTEXT: run}
                    ).last_hidden_state
                loss = self._divergence(full[:, first:], echo[:, first:])
                if learn:
                    loss.backward()
            if not loss.isfinite():
                # No learning rate helps where the full cache's own scores are to blame.
                self._check_full(full[:, first:])
        return {"model": loss.detach()}

    def _check_full(self, full: torch.Tensor) -> None:
        head = self._model.get_output_embeddings()
        with torch.no_grad():
            for part in full.split(_LOGIT_TOKENS, 1):
                check_scores(head(part).float().log_softmax(-1), part.dtype)

    def _divergence(self, full: torch.Tensor, echo: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), device=full.device)
        for start in range(0, full.shape[1], _LOGIT_TOKENS):
            part = slice(start, start + _LOGIT_TOKENS)
            total = total + checkpoint(
                _sum_of_divergences,
                self._model.get_output_embeddings(), full[:, part], echo[:, part],
                use_reentrant=False, preserve_rng_state=False,
            )  # fmt: skip
        return total / (full.shape[0] * full.shape[1])


class _Run:
    """Attention of one compressed forward pass."""

    def __init__(
        self,
        setup: CacheSetup,
        parameters: MapParameters,
        offsets: torch.Tensor,
        sequence_len: int,
    ) -> None:
        self._setup = setup
        self._rebuilder = Rebuilder(setup, parameters, offsets, sequence_len)
        self._sources = {source.layer for layer in setup.plan.layers for source in layer.sources}
        self._cached: dict[int, KeyValue] = {}
        # (first query, end) -> of a tile
        self._visibility: dict[tuple[int, int], Visibility] = {}

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        """Attention output of a layer, [batch, len, num_heads, head_dim]."""
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        plan = self._setup.plan
        written, group_size = (key, value), query.shape[1] // key.shape[1]
        key, value = self._setup.cached(key), self._setup.cached(value)
        if layer in self._sources:
            self._cached[layer] = (key, value)
        discarded = plan.discarded(layer)
        if not discarded:
            return _plain(module, query, key, value, kwargs)
        rows = self._setup.query_rows(layer, group_size)
        parts = []
        retained = tuple(sorted(plan.layers[layer].retained))
        others = tuple(row for row in range(query.shape[1]) if row not in rows)
        if retained:
            parts.append(
                _plain(
                    module, pick(query, others), pick(key, retained), pick(value, retained), kwargs
                )
            )
        key_hat, value_hat = self._rebuilder.rebuild(layer, self._cached.__getitem__, written)
        parts.append(
            self._echo(
                pick(query, rows).unflatten(1, (len(discarded), group_size)),
                (pick(key, discarded), pick(value, discarded)),
                (key_hat, value_hat),
                kwargs["scaling"],
            )
        )
        where = {row: place for place, row in enumerate((*others, *rows))}
        return pick(torch.cat(parts, 2), tuple(where[row] for row in sorted(where)), dim=2)

    def _echo(
        self, query: torch.Tensor, kept: KeyValue, rebuilt: KeyValue, scaling: float
    ) -> torch.Tensor:
        """[batch, len, num_discarded * group_size, head_dim]"""
        length = query.shape[3]
        tile = max(_TILE_SCORES // length, 16)
        if tile >= length:
            return self._tile(0, query, *kept, *rebuilt, scaling).flatten(1, 2).transpose(1, 2)
        outputs = []
        for start in range(0, length, tile):
            stop = min(start + tile, length)
            outputs.append(
                checkpoint(
                    self._tile, start, query[..., start:stop, :],
                    *(part[:, :, :stop] for part in (*kept, *rebuilt)), scaling,
                    use_reentrant=False, preserve_rng_state=False,
                )
            )  # fmt: skip
        return torch.cat(outputs, 3).flatten(1, 2).transpose(1, 2)

    def _tile(
        self,
        start: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_hat: torch.Tensor,
        value_hat: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        stop = key.shape[2]
        if (start, stop) not in self._visibility:
            positions = torch.arange(start, stop, device=key.device)
            self._visibility[start, stop] = Visibility.of(positions, stop, self._setup.window)
        visibility = self._visibility[start, stop]
        _, scores = echo_scores(query, (key, key), key_hat, visibility, scaling)
        return echo_output(scores.softmax(-1), visibility.rebuilt, value, value_hat)


def _plain(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kwargs: dict[str, Any],
) -> torch.Tensor:
    from transformers import AttentionInterface

    return AttentionInterface()["sdpa"](module, query, key, value, None, **kwargs)[0]


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention function of the registry; same arguments and result as transformers' SDPA."""
    run: _Run | None = kwargs.pop(_CONTEXT, None)
    assert attention_mask is None, "calibration sequences are neither padded nor packed"
    if run is None:
        return _plain(module, query, key, value, kwargs), None
    return run.attend(module, query, key, value, kwargs), None


@contextmanager
def _attention_of_runs(model: Any) -> Iterator[None]:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(_NAME, _attention)
    # Without padding the attention is causal and needs no mask.
    AttentionMaskInterface.register(_NAME, lambda *_, **__: None)
    previous = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(previous)


@contextmanager
def _checkpointed(decoder: Any, active: bool) -> Iterator[None]:
    """Let the decoder's layers keep their inputs only, for the backward pass to run them again."""
    layers = list(decoder.layers) if active else []
    for layer in layers:
        layer.forward = functools.partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
        )
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _sum_of_divergences(head: nn.Module, full: torch.Tensor, echo: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        log_full = head(full).float().log_softmax(-1)
    log_echo = head(echo).float().log_softmax(-1)
    return (log_full.exp() * (log_full - log_echo)).sum()
