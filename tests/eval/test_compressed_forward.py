"""Compressed attention against the independent reference, which computes token by token."""

import pytest
import torch
from rebuilt_forward import RebuiltForward
from recording import RecordedRow, RecordedStep

from echokv_kernels.rotary import Rotary
from echokv_vllm.eval.attention import Window
from echokv_vllm.eval.rebuild import HeadRebuilder
from echokv_vllm.plan import EchoPlan, LayerPlan, Source
from echokv_vllm.train.stage1 import block_shift

SINK, RECENT, LENGTH = 3, 8, 40

MIXED = EchoPlan(
    "mixed", 4,
    (
        LayerPlan((2, 0), (Source(0, (2, 0)),)),
        LayerPlan((0, 1, 2, 3)),
        LayerPlan((3,), (Source(0, (0,)), Source(2, (3,)), Source(1, (1, 2)))),
        LayerPlan((), (Source(1, (3,)), Source(2, (3,)))),
    ),
)  # fmt: skip

CASES = {
    "llama": ({}, {"rotation_block": 8}),
    "mistral anchors": ({"architecture": "Mistral", "sliding_window": None},
                        {"plan": "paper-0.5", "rotation_block": 1}),
    "qwen2 any plan": ({"architecture": "Qwen2"}, {"plan": MIXED, "rotation_block": 16}),
    "qwen3 absolute, bias": ({"architecture": "Qwen3"}, {"rotation_block": 0, "bias": True}),
    "shards": ({}, {"plan": "local-0.5", "shards": 2, "rotation_block": 4}),
    "group of 4": ({"num_attention_heads": 16}, {"plan": "paper-0.7"}),
}  # fmt: skip


def reference_logits(subject, ids, first_query=0):
    """Logits [len, vocabulary], one token per step; queries before `first_query` exact."""
    reference = RebuiltForward(subject.model_folder, subject.checkpoint)
    rows = []
    for query in range(len(ids)):
        token = torch.arange(query)
        exact = (token < SINK) | (token > query - RECENT) | (query < first_query)
        row = RecordedRow("r", query, ids[query : query + 1], exact)
        rows.append(reference.logits(RecordedStep([row])))
    return torch.cat(rows)


def compressed_logits(subject, ids, offsets, first_query=0):
    return subject.compressed_logits(ids, offsets, Window(SINK, RECENT), first_query)


@pytest.mark.parametrize("case", CASES)
def test_one_pass_equals_the_token_by_token_reference(make_subject, case):
    subject = make_subject(*CASES[case])
    if case.startswith("qwen2"):
        assert subject.model.model.layers[0].self_attn.k_proj.bias is not None
    ids = torch.randint(256, (2, LENGTH), generator=torch.Generator().manual_seed(2))
    found = compressed_logits(subject, ids, torch.zeros(2, dtype=torch.int64))
    expected = torch.stack([reference_logits(subject, row) for row in ids])
    full = subject.model(input_ids=ids).logits
    assert (expected - full).abs().max() > 0.1, "the maps must matter"
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_queries_before_the_first_compressed_one_are_exact(subject):
    ids = torch.randint(256, (1, LENGTH), generator=torch.Generator().manual_seed(3))
    found = compressed_logits(subject, ids, torch.zeros(1, dtype=torch.int64), first_query=30)
    expected = reference_logits(subject, ids[0], first_query=30)
    torch.testing.assert_close(found[0], expected, rtol=1e-3, atol=1e-3)
    full = subject.model(input_ids=ids).logits
    torch.testing.assert_close(found[0, :30], full[0, :30], rtol=1e-4, atol=1e-4)
    assert (found[0, 30:] - full[0, 30:]).abs().max() > 0.1


def test_tiles_of_queries_change_nothing(subject, monkeypatch):
    ids = torch.randint(256, (1, LENGTH), generator=torch.Generator().manual_seed(4))
    offsets = torch.tensor([5])
    whole = compressed_logits(subject, ids, offsets)
    monkeypatch.setattr("echokv_vllm.eval.attention._QUERY_TILE", 7)
    tiled = compressed_logits(subject, ids, offsets)
    torch.testing.assert_close(tiled, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("block", "same"), [(1, True), (8, False), (0, False)])
def test_offsets_change_the_key_space_only(make_subject, block, same):
    """Whole blocks shift nothing, and un-rotated keys do not know where they stand."""
    subject = make_subject({}, {"rotation_block": block})
    ids = torch.randint(256, (1, LENGTH), generator=torch.Generator().manual_seed(5))
    still = compressed_logits(subject, ids, torch.tensor([0]))
    moved = compressed_logits(subject, ids, torch.tensor([131]))
    assert torch.allclose(moved, still, atol=2e-3) is same
    if block:
        blocks_on = compressed_logits(subject, ids, torch.tensor([16 * block]))
        torch.testing.assert_close(blocks_on, still)


@pytest.mark.parametrize("block", [0, 1, 8])
def test_rebuilding_at_an_offset_equals_the_formula(subject, block):
    """K_hat(t) = R(t0) (R(delta) k) W, with t counted from the offset, seen from the offset."""
    checkpoint = type(subject.checkpoint)(**{**vars(subject.checkpoint), "rotation_block": block})
    rotary = Rotary(torch.tensor([10.0**-i for i in range(16)]), 32)
    offset = 37
    plain = torch.randn(1, 4, 20, 32, generator=torch.Generator().manual_seed(6))
    token = torch.arange(20)
    cached = rotary.rotate(plain.transpose(1, 2), token).transpose(1, 2)
    found, _ = HeadRebuilder(checkpoint, rotary, "cpu").rebuild(
        0, lambda layer: (cached, plain), torch.arange(20), torch.tensor([offset]), (cached, plain)
    )
    position = token + offset
    start = {0: position * 0, 1: position}.get(block, position // max(block, 1) * block)
    delta = position - start
    sources = rotary.rotate(plain[0, :2].transpose(0, 1), delta).flatten(1)
    for row, weights in enumerate(checkpoint.maps[0].key):
        expected = rotary.rotate((sources @ weights)[:, None], start - offset)[:, 0]
        torch.testing.assert_close(found[0, row], expected, rtol=1e-4, atol=1e-4)
    assert (block_shift(token, torch.tensor([offset]), block) == delta - token).all()


def test_sources_in_a_later_layer_are_refused(make_subject):
    plan = EchoPlan(
        "late", 4,
        (
            LayerPlan((0,), (Source(1, (0,)),)),
            *(LayerPlan((0, 1, 2, 3)) for _ in range(3)),
        ),
    )  # fmt: skip
    with pytest.raises(ValueError, match="rebuilds layer 0 from layer 1"):
        make_subject({}, {"plan": plan})
