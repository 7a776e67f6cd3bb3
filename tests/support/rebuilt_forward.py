"""Reference of compressed attention: a Hugging Face model, fed step by step like the engine.

Nothing of ``echokv_kernels`` or of the worker is used. The model runs with an attention function
of its own, which keeps every head of every token and, for discarded heads, replaces the context
tokens that had no exact page in the recorded step by

    t0 = 0 (B = 0), t (B = 1), t // B * B (else)       B: rotation block of the checkpoint
    K_hat(t) = R(t0) (concat over sources of R(-t0) k_rot(t)) Wk + bk) ,  V_hat(t) = x_V Wv + bv

Tokens computed from rebuilt heads differ from exact ones, and so do the keys and values that
later tokens see. That is why the reference follows the engine's chunks instead of running a
sequence at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from recording import RecordedRow, RecordedStep
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM

from echokv_vllm.checkpoint import EchoCheckpoint

ATTENTION = "echokv_test_reference"


@dataclass
class TokenStore:
    """Keys (as rotated by the model) and values of one request, [tokens, H, d] per layer."""

    keys: dict[int, torch.Tensor] = field(default_factory=dict)
    values: dict[int, torch.Tensor] = field(default_factory=dict)

    def append(self, layer: int, context_len: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Puts a chunk behind the first ``context_len`` tokens; what came after is forgotten."""
        for store, new in ((self.keys, key), (self.values, value)):
            old = store.get(layer, new[:0])
            assert len(old) >= context_len, f"the step continues at {context_len} of {len(old)}"
            store[layer] = torch.cat((old[:context_len], new))

    def prefix(self, num_tokens: int) -> TokenStore:
        """A store with the first tokens of this one, for a request that adopts its pages."""
        return TokenStore(
            {layer: key[:num_tokens] for layer, key in self.keys.items()},
            {layer: value[:num_tokens] for layer, value in self.values.items()},
        )


@dataclass
class _Chunk:
    """What the attention function needs to know about the running chunk."""

    store: TokenStore
    context_len: int
    exact: torch.Tensor  # [context_len] bool


class RebuiltForward:
    """The reference model.

    Args:
        model: Model folder.
        checkpoint: The checkpoint whose maps rebuild.
    """

    def __init__(self, model: Path, checkpoint: EchoCheckpoint) -> None:
        AttentionInterface.register(ATTENTION, _attention)
        AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)
        self.model = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, attn_implementation=ATTENTION
        ).eval()
        self.checkpoint = checkpoint
        self.stores: dict[str, TokenStore] = {}

    @torch.no_grad()
    def logits(self, step: RecordedStep) -> torch.Tensor:
        """Logits [num_tokens, vocabulary] of all tokens of a step, in the engine's order."""
        return torch.cat([self._row(row) for row in step.rows])

    def _row(self, row: RecordedRow) -> torch.Tensor:
        store = self.stores.get(row.request_id)
        if store is None:
            donor = self.stores[row.donor].prefix(row.context_len) if row.donor else TokenStore()
            store = self.stores[row.request_id] = donor
        positions = torch.arange(row.context_len, row.context_len + len(row.token_ids))
        out = self.model(
            input_ids=row.token_ids[None],
            position_ids=positions[None],
            use_cache=False,
            echo_chunk=_Chunk(store, row.context_len, row.exact),
            echo_reference=self,
        )
        return out.logits[0]

    def rebuilt(self, layer: int, head: int, store: TokenStore, num_tokens: int) -> Any:
        """K_hat, V_hat [num_tokens, d] of one discarded head's first tokens."""
        plan, block = self.checkpoint.plan, self.checkpoint.rotation_block
        maps, row = self.checkpoint.maps[layer], plan.discarded(layer).index(head)
        position = torch.arange(num_tokens)
        start = position * 0 if block == 0 else position // block * block
        sources = plan.source_heads(layer, plan.shard_of(head))
        x_key = [self._turn(store.keys[at][:num_tokens, h], start, -1) for at, h in sources]
        x_value = [store.values[at][:num_tokens, h] for at, h in sources]
        key = torch.cat(x_key, dim=1) @ maps.key[row]
        value = torch.cat(x_value, dim=1) @ maps.value[row]
        if maps.key_bias is not None:
            key = key + maps.key_bias[row]
        if maps.value_bias is not None:
            value = value + maps.value_bias[row]
        return self._turn(key, start, 1), value

    def _turn(self, x: torch.Tensor, position: torch.Tensor, sign: int) -> torch.Tensor:
        """R(position) x for sign 1, R(-position) x for sign -1; x [tokens, d], half-split."""
        rotary = self.model.model.rotary_emb
        cos, sin = (part[0] / rotary.attention_scaling for part in rotary(x, position[None]))
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin * sign


def _attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: Any, scaling: float, echo_chunk: _Chunk, echo_reference: RebuiltForward,
    **ignored: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Attention of one chunk: query [1, heads, T, d], key and value [1, H, T, d]."""
    chunk, layer, context_len = echo_chunk, module.layer_idx, echo_chunk.context_len
    chunk.store.append(layer, context_len, key[0].transpose(0, 1), value[0].transpose(0, 1))
    keys, values = chunk.store.keys[layer], chunk.store.values[layer]
    num_new = query.shape[2]
    hidden = torch.ones(num_new, context_len + num_new, dtype=torch.bool).triu(context_len + 1)
    group = query.shape[1] // key.shape[1]
    discarded = echo_reference.checkpoint.plan.discarded(layer)
    outputs = []
    for head in range(key.shape[1]):
        k, v = keys[:, head].clone(), values[:, head].clone()
        if head in discarded and not bool(chunk.exact.all()):
            k_hat, v_hat = echo_reference.rebuilt(layer, head, chunk.store, context_len)
            lost = (~chunk.exact).nonzero().squeeze(1)
            k[lost], v[lost] = k_hat[lost], v_hat[lost]
        scores = query[0, head * group : (head + 1) * group] @ k.T * scaling
        outputs.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v)
    return torch.cat(outputs).transpose(0, 1)[None], None
