"""A step's metadata: the retained group's first, then the residual group's, in every step."""

from types import SimpleNamespace

import pytest
import torch

from echokv_vllm.worker.step import StepBuilder


def tables(pages: list[int], slots: list[int]) -> SimpleNamespace:
    return SimpleNamespace(
        num_reqs=1,
        num_actual_tokens=2,
        query_start_loc=torch.tensor([0, 2]),
        query_start_loc_cpu=torch.tensor([0, 2]),
        seq_lens=torch.tensor([2]),
        max_seq_len=2,
        block_table_tensor=torch.tensor([pages]),
        slot_mapping=torch.tensor(slots),
    )


def test_a_residual_group_that_comes_first_is_noticed_in_any_step() -> None:
    builder = StepBuilder(16, 16)
    builder.bind_pool(4, torch.device("cpu"))
    retained, residual = tables([1], [16, 17]), tables([2], [32, 33])
    with pytest.raises(AssertionError, match="residual group's metadata first"):
        builder.complete(residual)
    builder.open(retained)
    step = builder.complete(residual)
    assert step.residual_table.tolist() == [[2]] and bool(step.exact.all())
    # A step later, the older step's tables must not be planned again.
    with pytest.raises(AssertionError, match="residual group's metadata first"):
        builder.complete(residual)
