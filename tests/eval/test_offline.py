"""Batched answers against each prompt alone, decoded by whole passes without any cache."""

import random

import pytest
import torch

from echokv_vllm.eval import offline
from echokv_vllm.eval.attention import Window
from echokv_vllm.eval.offline import OfflineBackend
from echokv_vllm.eval.tasks import TaskPrompt

WINDOW = Window(3, 8)
OFFSET_MAX, SEED = 1000, 5
# Prompt lengths around the window's edges, and answers of several lengths.
SIZES = ((1, 12), (4, 25), (11, 9), (12, 14), (30, 3), (60, 20), (59, 1), (37, 18))


def make_prompts():
    rng = random.Random(8)
    return [
        TaskPrompt(f"t{length}", "".join(chr(rng.randrange(33, 127)) for _ in range(length)),
                   ("no such answer",), new_tokens)
        for length, new_tokens in SIZES
    ]  # fmt: skip


def backend_of(subject, **options):
    rebuilders = {"compressed": subject.rebuilder}
    options = {"offset_max": OFFSET_MAX, "seed": SEED} | options
    return OfflineBackend(subject.model, subject.tokenizer, rebuilders, WINDOW, **options)


def decode_alone(subject, prompts, mode, every_query=False, ends=()):
    """Greedy answers [tokens] by one whole pass per token and prompt."""
    generator = torch.Generator().manual_seed(SEED)
    offsets = torch.randint(OFFSET_MAX + 1, (len(prompts),), generator=generator)
    answers = []
    for prompt, offset in zip(prompts, offsets, strict=True):
        ids = subject.tokenizer(prompt.text)["input_ids"]
        first_query = 0 if every_query else len(ids) - 1
        answer = []
        while len(answer) < prompt.max_new_tokens:
            row = torch.tensor([ids + answer])
            if mode == "full":
                with torch.inference_mode():
                    logits = subject.model(input_ids=row, use_cache=False).logits
            else:
                logits = subject.compressed_logits(row, offset[None], WINDOW, first_query)
            token = int(logits[0, -1].argmax())
            if token in ends:
                break
            answer.append(token)
        answers.append(answer)
    return answers


def texts(subject, answers):
    return [subject.tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]


@pytest.mark.parametrize("every_query", [False, True])
def test_a_ragged_batch_equals_each_prompt_alone(subject, every_query):
    prompts = make_prompts()
    found = backend_of(subject, every_query=every_query).complete(prompts)
    assert list(found) == ["full", "compressed"]
    for mode in found:
        ends = {subject.tokenizer.eos_token_id}
        expected = decode_alone(subject, prompts, mode, every_query, ends)
        assert found[mode] == texts(subject, expected)
    assert found["full"] != found["compressed"]


def test_plans_with_anchors_sources_elsewhere_and_other_rotations(make_subject):
    prompts = make_prompts()
    subject = make_subject(
        {"architecture": "Qwen3"}, {"plan": "paper-0.7", "rotation_block": 16, "bias": True}
    )
    found = backend_of(subject).complete(prompts, ("compressed",))
    ends = {subject.tokenizer.eos_token_id}
    expected = decode_alone(subject, prompts, "compressed", ends=ends)
    assert found == {"compressed": texts(subject, expected)}


def test_rows_that_end_early_leave_the_others_alone(subject, monkeypatch):
    """Ends by an end token, by the limit, and by a settled score, all in one batch."""
    prompts = make_prompts()
    free = decode_alone(subject, prompts, "compressed")
    ends = {free[3][2], free[5][11]}
    monkeypatch.setattr(subject.model.generation_config, "eos_token_id", sorted(ends))
    expected = decode_alone(subject, prompts, "compressed", ends=ends)
    assert len({len(answer) for answer in expected}) > 3
    settled = max(range(len(prompts)), key=lambda index: len(expected[index]))
    first = subject.tokenizer.decode(expected[settled][:3], skip_special_tokens=True)
    prompts[settled] = TaskPrompt("t", prompts[settled].text, (first,), 50)
    expected[settled] = expected[settled][:8]
    for share in (0.01, 0.2, 1.0):
        monkeypatch.setattr(offline, "_FINISHED_SHARE", share)
        found = backend_of(subject).complete(prompts, ("compressed",))["compressed"]
        assert found == texts(subject, expected)


def test_memory_and_pass_size_change_nothing(subject, monkeypatch):
    prompts = make_prompts()
    whole = backend_of(subject).complete(prompts)
    seen = []

    def progress(steps):
        seen.append(list(steps))
        return seen[-1]

    # 4 layers, keys and values, 4 heads of 32 in float32, exact and compressed: 8 KiB per slot
    backend = backend_of(subject, cache_bytes=8192 * 170, progress=progress)
    assert backend.complete(prompts) == whole and len(seen[-1]) == 3
    backend = backend_of(subject, cache_bytes=1, progress=progress)
    assert backend.complete(prompts) == whole and len(seen[-1]) == len(prompts)
    monkeypatch.setattr(offline, "_PREFILL_TOKENS", 100)
    monkeypatch.setattr("echokv_vllm.eval.ragged._REBUILD_TOKENS", 100)
    assert backend_of(subject).complete(prompts) == whole
    # Finished rows stay to the end of the batch and have no slots for further tokens.
    monkeypatch.setattr(offline, "_FINISHED_SHARE", 1.0)
    assert backend_of(subject).complete(prompts) == whole


def test_several_caches_share_one_prefill(subject):
    """Each mode starts from the exact context, whatever came before it."""
    prompts = make_prompts()
    other = type(subject.checkpoint)(
        **{
            **vars(subject.checkpoint),
            "maps": {
                layer: type(maps)(**{name: -part for name, part in maps.named().items()})
                for layer, maps in subject.checkpoint.maps.items()
            },
        }
    )
    caches = {"one": subject.rebuilder, "two": subject.rebuilder_of(other)}
    backend = OfflineBackend(subject.model, subject.tokenizer, caches, WINDOW)
    together = backend.complete(prompts)
    assert list(together) == ["full", "one", "two"]
    for mode in reversed(backend.modes):
        assert backend.complete(prompts, (mode,)) == {mode: together[mode]}
    assert len({tuple(answers) for answers in together.values()}) == 3


def test_a_quantised_cache_is_read_as_it_returns_its_heads(subject):
    """Every stored head passes through the format, rebuilt tokens through maps of those."""

    class Halved(type(subject.rebuilder)):
        def cached(self, x):
            return x.half().float() * 0.5

    rebuilder = subject.rebuilder_of(subject.checkpoint)
    rebuilder.__class__ = Halved
    prompts = make_prompts()
    backend = OfflineBackend(
        subject.model, subject.tokenizer, {"halved": rebuilder}, WINDOW, every_query=True,
        offset_max=OFFSET_MAX, seed=SEED,
    )  # fmt: skip
    found = backend.complete(prompts, ("halved",))["halved"]
    plain, subject.rebuilder = subject.rebuilder, rebuilder
    try:
        expected = decode_alone(subject, prompts, "halved", True, {subject.tokenizer.eos_token_id})
    finally:
        subject.rebuilder = plain
    assert found == texts(subject, expected)


def test_without_maps_there_is_the_full_cache_only(subject):
    backend = OfflineBackend(subject.model, subject.tokenizer, {}, Window(4, 8))
    assert backend.modes == ("full",) and list(backend.complete(make_prompts()[:1])) == ["full"]
