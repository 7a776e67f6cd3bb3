"""Task scores of several caches side by side."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
import transformers

from echokv_vllm.eval.attention import Window
from echokv_vllm.eval.rebuild import QuantizedCache
from echokv_vllm.eval.tasks import TaskPrompt


def unanswered(task, length, index):
    return TaskPrompt(task, f"{task} {length} {index} " * 4, ("no such answer",), 6)


def test_caches_are_compared_prompt_by_prompt(bench, monkeypatch):
    import answers
    from eviction import EvictingCache

    tokenizer = transformers.AutoTokenizer.from_pretrained(bench.folder)
    backend = answers.OfflineBackend(bench.model, tokenizer, {}, Window(2, 8))

    def prompts_of(task, num_prompts, length, material, seed):
        """What the full cache answers is right for every prompt but the first."""
        prompts = [unanswered(task, length, index) for index in range(num_prompts)]
        texts = backend.complete(prompts)["full"]
        return prompts[:1] + [
            dataclasses.replace(prompt, references=(text,))
            for prompt, text in zip(prompts[1:], texts[1:], strict=True)
        ]

    monkeypatch.setattr(answers, "make_prompts", prompts_of)
    monkeypatch.setattr(answers, "RULER_TASKS", ("one", "two"))
    monkeypatch.setattr(answers, "_GROUP_SIZE", 2)
    subject = SimpleNamespace(
        model=bench.model, tokenizer=tokenizer, window=Window(2, 8), offsets=torch.tensor([5])
    )
    caches = {
        "same": QuantizedCache("auto"), "half": EvictingCache(0.5), "fp8": QuantizedCache("fp8"),
        "all": EvictingCache(1.0), "int1": QuantizedCache("int1"),
    }  # fmt: skip
    steps = list(answers.measure_tasks(subject, caches, None, [30, 40], 4, seed=0))
    assert [list(step["rows"]) for step in steps] == [
        ["full", "same", "fp8"],
        ["full", "same", "fp8", "int1"],
        ["full", "same", "fp8", "int1", "half", "all"],
    ]
    rows = steps[-1]["rows"]
    for name in ("full", "same", "all"):
        assert rows[name]["difference"] == {"value": 0, "low": 0, "high": 0}
        assert rows[name]["tasks"] == rows["full"]["tasks"]
        assert rows[name]["share_of_full"] == 1
    assert list(rows["full"]["tasks"]) == ["one 30", "two 30", "one 40", "two 40"]
    mean = rows["full"]["mean"]["value"]
    assert mean == pytest.approx(sum(rows["full"]["tasks"].values()) / 4) and 0 < mean < 1
    assert rows["int1"]["difference"]["value"] == pytest.approx(
        rows["int1"]["mean"]["value"] - mean
    )
    assert rows["int1"]["tasks"] != rows["full"]["tasks"]
