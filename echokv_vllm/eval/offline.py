"""Answers of a Hugging Face model whose context is compressed while it answers. Runs on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from echokv_vllm.eval.attention import CONTEXT, EchoContext, Window
from echokv_vllm.eval.rebuild import HeadRebuilder
from echokv_vllm.eval.tasks import TaskPrompt

# Tokens between two looks at whether the score of an answer can still change.
_CHECK_EVERY = 8


class OfflineBackend:
    """Greedy decoding in mode `full` or `compressed`.

    Compressed: the prompt but for its last token is prefilled exactly; from the last prompt token
    on, and so for the whole answer, every query sees rebuilt heads outside the window. With
    `every_query` the prompt's queries do as well.

    Args:
        model: Causal LM in eval mode with `attention.install`ed attention.
        tokenizer: Its tokenizer.
        rebuilder: The maps; None allows mode `full` only.
        window: Tokens that stay exact.
        every_query: See above.
        offset_max: Positions are assumed to be shifted by a random offset up to this.
        seed: Seed of the offsets.
        progress: Wraps the iteration over prompts.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        rebuilder: HeadRebuilder | None,
        window: Window,
        *,
        every_query: bool = False,
        offset_max: int = 0,
        seed: int = 0,
        progress: Callable[[Iterable[int]], Iterable[int]] = iter,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._rebuilder = rebuilder
        self._window = window
        self._every_query = every_query
        self._offset_max = offset_max
        self._seed = seed
        self._progress = progress
        # A config may name one end token, several, or none.
        ends = model.generation_config.eos_token_id
        if ends is None:
            ends = tokenizer.eos_token_id
        self._ends = set(ends) if isinstance(ends, list) else {ends}

    @property
    def modes(self) -> tuple[str, ...]:
        """What to compare, the full cache first."""
        return ("full",) if self._rebuilder is None else ("full", "compressed")

    def complete(self, prompts: Sequence[TaskPrompt], mode: str) -> list[str]:
        """Completions of the prompts, in order; they end early where the score is settled."""
        assert mode in self.modes, f"mode {mode} is none of {self.modes}"
        generator = torch.Generator().manual_seed(self._seed)
        offsets = torch.randint(self._offset_max + 1, (len(prompts),), generator=generator)
        return [
            self._answer(prompts[index], mode, offsets[index : index + 1])
            for index in self._progress(range(len(prompts)))
        ]

    @torch.inference_mode()
    def _answer(self, prompt: TaskPrompt, mode: str, offset: torch.Tensor) -> str:
        from transformers import DynamicCache

        ids = self._tokenizer(prompt.text, return_tensors="pt", verbose=False)["input_ids"]
        ids = ids.to(self._model.device)
        prefill_len = ids.shape[1] - 1
        extra = {}
        if mode == "compressed":
            assert self._rebuilder is not None, "checked with the mode"
            first_query = 0 if self._every_query else prefill_len
            extra[CONTEXT] = EchoContext(
                self._rebuilder, self._window, offset.to(ids.device), first_query
            )
        decoder, head = self._model.get_decoder(), self._model.get_output_embeddings()
        cache = DynamicCache(config=self._model.config)
        if prefill_len:
            decoder(input_ids=ids[:, :prefill_len], past_key_values=cache, use_cache=True, **extra)
        token = ids[:, prefill_len:]
        answer: list[int] = []
        while len(answer) < prompt.max_new_tokens:
            out = decoder(input_ids=token, past_key_values=cache, use_cache=True, **extra)
            token = head(out.last_hidden_state[:, -1:]).argmax(-1)
            if token.item() in self._ends:
                break
            answer.append(token.item())
            if len(answer) % _CHECK_EVERY == 0 and prompt.is_settled(self._text(answer)):
                break
        return self._text(answer)

    def _text(self, answer: list[int]) -> str:
        return str(self._tokenizer.decode(answer, skip_special_tokens=True))
