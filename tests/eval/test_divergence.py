"""Perplexity, agreement and KL against independent sums, and their two controls."""

import dataclasses

import pytest
import torch

from echokv_vllm.eval.attention import Window
from echokv_vllm.eval.divergence import draw_sequences, measure_divergence


@pytest.fixture(scope="module")
def sequences():
    return torch.randint(256, (5, 48), generator=torch.Generator().manual_seed(8)).int()


def measure(subject, sequences, rebuilder, recent=8, **options):
    settings = dict(skip_tokens=10, batch_size=2, seed=1) | options
    offsets = torch.arange(len(sequences)) * 3
    return measure_divergence(
        subject.model, rebuilder, sequences, offsets, Window(3, recent), **settings
    )


def test_values_are_those_of_the_two_distributions(subject, sequences):
    found = measure(subject, sequences, subject.rebuilder)
    offsets = torch.arange(5) * 3
    scored = slice(10, 47)
    target = sequences[:, 11:].long()
    with torch.inference_mode():
        full = subject.model(input_ids=sequences.long()).logits[:, scored]
    echo = subject.compressed_logits(sequences.long(), offsets, Window(3, 8))[:, scored]
    p = full.softmax(-1)
    kl = (p * (p.log() - echo.softmax(-1).log())).sum(-1).mean().item()
    loss = [torch.nn.functional.cross_entropy(x.flatten(0, 1), target.flatten()) for x in
            (full, echo)]  # fmt: skip
    assert found.num_tokens == target.numel()
    assert found.kl.value == pytest.approx(kl, rel=1e-3) and kl > 0.01
    assert found.top1_agreement.value == pytest.approx(
        (full.argmax(-1) == echo.argmax(-1)).float().mean().item()
    )
    assert found.perplexity_full.value == pytest.approx(loss[0].exp().item(), rel=1e-4)
    assert found.perplexity.value == pytest.approx(loss[1].exp().item(), rel=1e-4)
    assert found.perplexity_increase.value == pytest.approx(
        (loss[1] - loss[0]).expm1().item(), rel=1e-3
    )
    for estimate in (found.kl, found.perplexity, found.top1_agreement):
        assert estimate.low < estimate.value < estimate.high


def test_a_window_that_covers_everything_is_the_identity(subject, sequences):
    found = measure(subject, sequences, subject.rebuilder, recent=48)
    assert (found.kl.value, found.top1_agreement.value) == (0.0, 1.0)
    assert found.perplexity == found.perplexity_full
    assert measure(subject, sequences, subject.rebuilder, recent=36).kl.value > 0


def test_one_changed_number_of_a_map_changes_the_kl(subject, sequences):
    before = measure(subject, sequences, subject.rebuilder).kl.value
    for name in ("key", "value"):
        maps = dict(subject.checkpoint.maps)
        changed = getattr(maps[3], name).clone()
        changed[1, 5, 7] += 1.0
        maps[3] = dataclasses.replace(maps[3], **{name: changed})
        mutant = dataclasses.replace(subject.checkpoint, maps=maps)
        after = measure(subject, sequences, subject.rebuilder_of(mutant)).kl.value
        assert abs(after - before) > 1e-6, name


def test_batches_and_logit_tiles_change_nothing(subject, sequences, monkeypatch):
    one = measure(subject, sequences, subject.rebuilder, batch_size=5)
    monkeypatch.setattr("echokv_vllm.eval.divergence._LOGIT_TOKENS", 9)
    two = measure(subject, sequences, subject.rebuilder, batch_size=1)
    assert two.kl.value == pytest.approx(one.kl.value, rel=1e-4)
    assert two.perplexity.value == pytest.approx(one.perplexity.value, rel=1e-5)


def test_exact_queries_before_the_scored_ones(subject, sequences):
    every = measure(subject, sequences, subject.rebuilder, skip_tokens=20)
    some = measure(subject, sequences, subject.rebuilder, skip_tokens=20, every_query=False)
    assert some.perplexity_full == every.perplexity_full and some.kl.value != every.kl.value


def test_without_maps_only_the_full_cache_is_measured(subject, sequences):
    found = measure(subject, sequences, None)
    assert found.kl is None and found.perplexity is None
    assert found.perplexity_full == measure(subject, sequences, subject.rebuilder).perplexity_full


def test_logits_that_are_not_finite_are_refused(make_subject, sequences):
    broken = make_subject({}, {})
    with torch.no_grad():
        broken.model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        measure(broken, sequences, broken.rebuilder)


def test_sequences_are_seeded_and_spread(subject, corpus):
    def draw(seed, count=6):
        return draw_sequences(corpus, subject.tokenizer, count, 32, seed)

    first, again, other = draw(0), draw(0), draw(1)
    assert first.shape == (6, 32) and (first == again).all() and not (first == other).all()
    assert len({tuple(row) for row in draw(0, 100).tolist()}) == 100


def test_short_text_is_refused(subject, corpus):
    with pytest.raises(ValueError, match="samples=500; give more text"):
        draw_sequences(corpus, subject.tokenizer, 500, 32, 0)
    with pytest.raises(ValueError, match=r"held-out text .*sequence_len=5000"):
        draw_sequences(corpus, subject.tokenizer, 2, 5000, 0)
    with pytest.raises(ValueError, match="does not exist"):
        draw_sequences("nowhere.txt", subject.tokenizer, 2, 32, 0)
