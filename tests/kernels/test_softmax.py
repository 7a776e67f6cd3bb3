"""Softmax in pieces against softmax in one go."""

import pytest
import torch

from echokv_kernels.softmax import OnlineSoftmax, merge_attention


def whole(scores, values):
    """out and lse in float64; 0 and -inf where all scores are -inf."""
    scores, values = scores.double(), values.double()
    lse = scores.logsumexp(-1)
    weights = torch.where(lse[..., None] > float("-inf"), scores.softmax(-1), 0)
    return weights @ values, lse


def masked_scores(generator, *shape):
    """Large spread, random masks, rows and whole pieces that see nothing."""
    scores = 30 * torch.randn(*shape, generator=generator)
    scores[torch.rand(*shape, generator=generator) < 0.4] = float("-inf")
    scores[0, 0] = float("-inf")
    scores[1, :, :64] = float("-inf")
    scores[2, :, 64:] = float("-inf")
    return scores


@pytest.mark.parametrize("cuts", [[200], [64, 136], [1, 63, 1, 135], [64, 64, 72]])
def test_pieces_give_the_whole(kit, cuts):
    generator = torch.Generator().manual_seed(0)
    scores = masked_scores(generator, 4, 3, 200)
    values = torch.randn(4, 200, 8, generator=generator)
    softmax = OnlineSoftmax((4, 3), 8)
    parts = []
    for piece, weights in zip(scores.split(cuts, -1), values.split(cuts, 1), strict=True):
        softmax.update(piece.clone(), weights)
        alone = OnlineSoftmax((4, 3), 8)
        alone.update(piece.clone(), weights)
        parts.append(alone.finish())
    want = whole(scores, values)
    kit.assert_same(softmax.finish(), want)
    kit.assert_same(merge_attention(parts), want)
    assert bool((softmax.finish()[0][0, 0] == 0).all())


def test_rows_are_updated_alone(kit):
    generator = torch.Generator().manual_seed(1)
    scores = masked_scores(generator, 4, 3, 100)
    values = torch.randn(4, 100, 8, generator=generator)
    softmax = OnlineSoftmax((4, 3), 8)
    softmax.update(scores[..., :60].clone(), values[:, :60])
    rows = torch.tensor([3, 1])
    softmax.update(scores[rows, :, 60:], values[rows, 60:], rows)
    for row, length in enumerate([60, 100, 60, 100]):
        want = whole(scores[row, :, :length], values[row, :length])
        kit.assert_same([part[row] for part in softmax.finish()], want)


def test_no_update_sees_nothing():
    out, lse = OnlineSoftmax((2, 3), 4).finish()
    assert bool((out == 0).all()) and bool((lse == float("-inf")).all())
    out, lse = merge_attention([(out, lse), (out, lse)])
    assert bool((out == 0).all()) and bool((lse == float("-inf")).all())


def test_merge_is_float32_and_keeps_its_inputs():
    parts = [(torch.ones(2, 4, dtype=torch.bfloat16), torch.tensor([0.0, 1.0])) for _ in range(2)]
    out, lse = merge_attention(parts)
    assert out.dtype == lse.dtype == torch.float32
    torch.testing.assert_close(out, torch.ones(2, 4))
    torch.testing.assert_close(lse, torch.tensor([2.0, 2.0]).log() + torch.tensor([0.0, 1.0]))
    assert bool((parts[0][0] == 1).all())
