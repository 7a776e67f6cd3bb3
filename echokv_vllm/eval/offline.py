"""Answers of a Hugging Face model whose context is compressed while it answers. Runs on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from echokv_vllm.eval.attention import CONTEXT, AttentionContext, EchoContext, Window
from echokv_vllm.eval.ragged import RaggedCache, RaggedDecode, RaggedPrefill
from echokv_vllm.eval.rebuild import Rebuilder
from echokv_vllm.eval.tasks import TaskPrompt

FULL = "full"

# Tokens between two looks at whether the score of an answer can still change.
_CHECK_EVERY = 8
# Prompt tokens, padding included, of one forward pass.
_PREFILL_TOKENS = 1 << 15
# Finished rows stay in the batch until they are this share of it: copying the rest costs time.
_FINISHED_SHARE = 0.2
# Share of the free memory of a GPU that the keys and values may take.
_CACHE_SHARE = 0.7
_CPU_CACHE_BYTES = 1 << 30


@dataclass(frozen=True)
class _Chunk:
    """Prompts that are answered together.

    Attributes:
        prompts: The prompts.
        ids: Their tokens.
        offsets: [rows] int64 on the device of the model.
    """

    prompts: list[TaskPrompt]
    ids: list[list[int]]
    offsets: torch.Tensor

    @property
    def capacity(self) -> int:
        """Slots of a row."""
        pairs = zip(self.prompts, self.ids, strict=True)
        return max(len(ids) + prompt.max_new_tokens for prompt, ids in pairs)


class OfflineBackend:
    """Greedy decoding with the full cache and with compressed ones, many prompts at a time.

    Compressed: the prompt but for its last token is prefilled exactly; from the last prompt token
    on, and so for the whole answer, every query sees rebuilt heads outside the window. With
    `every_query` the prompt's queries do as well. An exact prefill is shared by all modes.

    Args:
        model: Causal LM in eval mode with `attention.install`ed attention.
        tokenizer: Its tokenizer.
        rebuilders: The compressed caches by mode name, beside mode `full`.
        window: Tokens that stay exact.
        every_query: See above.
        offset_max: Positions are assumed to be shifted by a random offset up to this.
        seed: Seed of the offsets.
        cache_bytes: Most bytes of keys and values at a time; None takes most of the free memory of
            a GPU, or 1 GiB on a CPU. A prompt too long for it is answered alone.
        progress: Wraps the iteration over batches of prompts.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        rebuilders: Mapping[str, Rebuilder],
        window: Window,
        *,
        every_query: bool = False,
        offset_max: int = 0,
        seed: int = 0,
        cache_bytes: int | None = None,
        progress: Callable[[Iterable[int]], Iterable[int]] = iter,
    ) -> None:
        assert FULL not in rebuilders, f"mode {FULL!r} is there without a rebuilder"
        self._model = model
        self._tokenizer = tokenizer
        self._rebuilders: dict[str, Rebuilder | None] = {FULL: None, **rebuilders}
        self._window = window
        self._every_query = every_query
        self._offset_max = offset_max
        self._seed = seed
        self._cache_bytes = cache_bytes
        self._progress = progress
        # A config may name one end token, several, or none.
        ends = model.generation_config.eos_token_id
        if ends is None:
            ends = tokenizer.eos_token_id
        self._ends = set(ends) if isinstance(ends, list) else {ends}

    @property
    def modes(self) -> tuple[str, ...]:
        """What to compare, the full cache first."""
        return tuple(self._rebuilders)

    @torch.inference_mode()
    def complete(
        self, prompts: Sequence[TaskPrompt], modes: Sequence[str] | None = None
    ) -> dict[str, list[str]]:
        """Completions of the prompts, in order; they end early where the score is settled.

        Args:
            prompts: Of any tasks and lengths.
            modes: Some of `modes`; None takes all.

        Returns:
            Mode to completions.
        """
        modes = self.modes if modes is None else modes
        unknown = [mode for mode in modes if mode not in self._rebuilders]
        assert not unknown, f"modes {unknown} are none of {self.modes}"
        generator = torch.Generator().manual_seed(self._seed)
        offsets = torch.randint(self._offset_max + 1, (len(prompts),), generator=generator)
        ids = self._encode(prompts)
        answers = {mode: [""] * len(prompts) for mode in modes}
        chunks = self._split([len(i) + p.max_new_tokens for i, p in zip(ids, prompts, strict=True)])
        for index in self._progress(range(len(chunks))):
            members = chunks[index]
            chunk = _Chunk(
                [prompts[member] for member in members],
                [ids[member] for member in members],
                offsets[members].to(self._model.device),
            )
            for mode, texts in self._answer(chunk, modes):
                for member, text in zip(members, texts, strict=True):
                    answers[mode][member] = text
        return answers

    def _encode(self, prompts: Sequence[TaskPrompt]) -> list[list[int]]:
        """Tokens of the prompts; in batches, which a tokenizer works on in parallel."""
        ids: list[list[int]] = [[] for _ in prompts]
        for special_tokens in (True, False):
            group = [i for i, p in enumerate(prompts) if p.special_tokens is special_tokens]
            if group:
                encoded = self._tokenizer(
                    [prompts[index].text for index in group],
                    add_special_tokens=special_tokens,
                    verbose=False,
                )["input_ids"]
                for index, row in zip(group, encoded, strict=True):
                    ids[index] = row
        return ids

    def _split(self, capacities: list[int]) -> list[list[int]]:
        """Indices of prompts of like length, as many together as the memory holds."""
        budget = self._budget()
        per_slot = self._slot_bytes() * (2 if len(self._rebuilders) > 1 else 1)
        chunks: list[list[int]] = []
        longest = 0
        for index in sorted(range(len(capacities)), key=lambda i: -capacities[i]):
            if not chunks or (len(chunks[-1]) + 1) * longest * per_slot > budget:
                chunks.append([])
                longest = capacities[index]
            chunks[-1].append(index)
        return chunks

    def _budget(self) -> int:
        if self._cache_bytes is not None:
            return self._cache_bytes
        device = self._model.device
        if device.type != "cuda":
            return _CPU_CACHE_BYTES
        free, _ = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free * _CACHE_SHARE)

    def _slot_bytes(self) -> int:
        num_layers, num_kv_heads, head_dim = self._cache_shape()
        return 2 * num_layers * num_kv_heads * head_dim * self._model.dtype.itemsize

    def _cache_shape(self) -> tuple[int, int, int]:
        config = self._model.config
        head_dim = getattr(config, "head_dim", None)
        if head_dim is None:
            head_dim = config.hidden_size // config.num_attention_heads
        return config.num_hidden_layers, config.num_key_value_heads, head_dim

    def _answer(self, chunk: _Chunk, modes: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
        num_layers, num_kv_heads, head_dim = self._cache_shape()
        device, dtype = self._model.device, self._model.dtype
        cache = RaggedCache(
            num_layers, (len(chunk.ids), num_kv_heads, chunk.capacity, head_dim), dtype, device
        )
        lengths = torch.tensor([len(ids) - 1 for ids in chunk.ids], device=device)
        prefilled = False
        for mode in modes:
            rebuilder = self._rebuilders[mode]
            if self._every_query or not prefilled:
                self._prefill(chunk, cache, rebuilder if self._every_query else None)
                prefilled = True
            steps = RaggedDecode(cache, lengths, rebuilder, self._window, chunk.offsets)
            yield mode, self._decode(chunk, steps)

    def _prefill(self, chunk: _Chunk, cache: RaggedCache, rebuilder: Rebuilder | None) -> None:
        """Fill the cache with all tokens of the prompts but the last."""
        decoder, device = self._model.get_decoder(), self._model.device
        longest = max(len(ids) for ids in chunk.ids) - 1
        num_rows = max(1, _PREFILL_TOKENS // max(longest, 1))
        for first in range(0, len(chunk.ids), num_rows):
            rows = [ids[:-1] for ids in chunk.ids[first : first + num_rows]]
            width = max(map(len, rows))
            if width == 0:  # prompts of a single token
                continue
            # Any token does as padding: nothing that is read comes after it.
            padded = [ids + [0] * (width - len(ids)) for ids in rows]
            inner: AttentionContext | None = None
            if rebuilder is not None:
                inner = EchoContext(
                    rebuilder, self._window, chunk.offsets[first : first + num_rows]
                )
            decoder(
                input_ids=torch.tensor(padded, device=device),
                use_cache=False,
                **{CONTEXT: RaggedPrefill(cache, first, inner)},
            )

    def _decode(self, chunk: _Chunk, steps: RaggedDecode) -> list[str]:
        decoder, head = self._model.get_decoder(), self._model.get_output_embeddings()
        device = self._model.device
        answers: list[list[int]] = [[] for _ in chunk.ids]
        # Row of the chunk that each row of the batch answers; None once it has finished.
        rows: list[int | None] = list(range(len(chunk.ids)))
        tokens = torch.tensor([ids[-1] for ids in chunk.ids], device=device)
        while True:
            out = decoder(
                input_ids=tokens[:, None], position_ids=steps.positions, use_cache=False,
                **{CONTEXT: steps},
            )  # fmt: skip
            tokens = head(out.last_hidden_state[:, -1]).argmax(-1)
            for place, token in enumerate(tokens.tolist()):
                row = rows[place]
                if row is not None and self._is_last(chunk.prompts[row], answers[row], token):
                    rows[place] = None
            active = [place for place, row in enumerate(rows) if row is not None]
            if not active:
                return [self._text(answer) for answer in answers]
            going_on = torch.tensor([row is not None for row in rows], device=device)
            steps.advance(going_on)
            if len(active) <= (1 - _FINISHED_SHARE) * len(rows):
                kept = torch.tensor(active, device=device)
                steps.keep(kept)
                tokens, rows = tokens[kept], [rows[place] for place in active]

    def _is_last(self, prompt: TaskPrompt, answer: list[int], token: int) -> bool:
        """Append the token unless it ends the answer; whether the answer is complete."""
        if token in self._ends:
            return True
        answer.append(token)
        if len(answer) == prompt.max_new_tokens:
            return True
        return len(answer) % _CHECK_EVERY == 0 and prompt.is_settled(self._text(answer))

    def _text(self, answer: list[int]) -> str:
        return str(self._tokenizer.decode(answer, skip_special_tokens=True))
