"""Batched answers after eviction against whole passes over each prompt alone."""

import random

import pytest
import torch
import transformers

from echokv_vllm.eval.attention import CONTEXT, Window
from echokv_vllm.eval.tasks import TaskPrompt

WINDOW = Window(3, 8)
SIZES = ((2, 6), (12, 9), (45, 12), (70, 5), (61, 8))


class WholePass:
    """Plain loops: what each head keeps of a prompt, and attention of the answer's queries."""

    def __init__(self, prefill_len, ratio):
        self.prefill_len, self.ratio = prefill_len, ratio

    def attention(self, layer, query, key, value, scaling, plain):
        out, n = plain(key, value), self.prefill_len
        group = query.shape[1] // key.shape[1]
        for head in range(key.shape[1]):
            kept = self.kept(query[0], key[0, head], head, group, scaling)
            for at in range(n, key.shape[2]):
                seen = [t for t in range(at + 1) if t >= n - 7 or t < 3 or t in kept]
                for member in range(group):
                    scores = key[0, head, seen] @ query[0, head * group + member, at] * scaling
                    out[0, at, head * group + member] = scores.softmax(0) @ value[0, head, seen]
        return out

    def kept(self, query, key, head, group, scaling):
        """The prompt's tokens that leave the window of 8 before its last token: [3, n + 1 - 8)."""
        n = self.prefill_len
        votes = torch.zeros(max(n, 1))
        for at in range(max(0, n - 32), n):
            for member in range(group):
                row = (key[: at + 1] @ query[head * group + member, at] * scaling).softmax(0)
                votes[: at + 1] += row
        # Means over five neighbours, as zeros beyond the ends.
        smooth = [votes[max(0, t - 2) : t + 3].sum().item() / 5 for t in range(n)]
        outside = range(3, n - 7)
        best = sorted(outside, key=lambda t: -smooth[t])
        return set(best[: round(self.ratio * len(outside))])


@pytest.fixture(scope="module")
def prompts():
    rng = random.Random(9)
    return [
        TaskPrompt("t", "".join(chr(rng.randrange(33, 127)) for _ in range(size)), ("none",), new)
        for size, new in SIZES
    ]


def answer_alone(bench, tokenizer, prompt, ratio):
    ids = tokenizer(prompt.text)["input_ids"]
    answer = []
    while len(answer) < prompt.max_new_tokens:
        context = WholePass(len(ids) - 1, ratio)
        with torch.inference_mode():
            logits = bench.model(
                input_ids=torch.tensor([ids + answer]), use_cache=False, **{CONTEXT: context}
            ).logits
        token = int(logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        answer.append(token)
    return tokenizer.decode(answer, skip_special_tokens=True)


def test_answers_equal_those_of_plain_loops(bench, prompts):
    from evicting_backend import EvictingBackend
    from eviction import EvictingCache

    tokenizer = transformers.AutoTokenizer.from_pretrained(bench.folder)
    caches = {"all": EvictingCache(1.0), "half": EvictingCache(0.5), "few": EvictingCache(0.1)}
    backend = EvictingBackend(bench.model, tokenizer, caches, WINDOW)
    found = backend.complete(prompts)
    assert list(found) == ["full", *caches]
    assert found["all"] == found["full"]
    for mode, ratio in (("half", 0.5), ("few", 0.1)):
        assert found[mode] == [answer_alone(bench, tokenizer, p, ratio) for p in prompts]
        assert found[mode] != found["full"]
    assert found["half"] != found["few"]
    shared = EvictingCache(0.5, shared_budget=True)
    again = EvictingBackend(bench.model, tokenizer, {"shared": shared}, WINDOW).complete(prompts)
    assert again["full"] == found["full"] and again["shared"] != found["half"]
