"""Where a share of the compressed decodes' tokens lies. Host side: `echokv_kernels.step_plan`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def own_share(token_end_ptr, share_len_ptr, num_requests):
    """Begin and end of this program's share on the axis; an empty one ends no later than it begins.

    `token_end_ptr` is [num_requests] int64, `share_len_ptr` [1] int64.
    """
    num_tokens = tl.load(token_end_ptr + num_requests - 1)
    share_len = tl.load(share_len_ptr)
    position = tl.program_id(0).to(tl.int64) * share_len
    return position, tl.minimum(position + share_len, num_tokens)


@triton.jit
def find_request(
    token_end_ptr,  # [n] int64
    line_end_ptr,  # [n] int32
    seq_lens_ptr,  # [n] int32
    query_start_loc_ptr,  # [n + 1] int32
    position,
    num_requests,
    NUM_REQUESTS: tl.constexpr,
):
    """The request at a position of the axis, and where it begins and ends there.

    Then its first line, its tokens and its query token; all of them garbage behind the axis' end.
    Everything is loaded for all requests at once: one wait for memory instead of two. NUM_REQUESTS
    is a power of two, no less than the requests.
    """
    FAR: tl.constexpr = 9223372036854775807
    index = tl.arange(0, NUM_REQUESTS)
    known = index < num_requests
    end = tl.load(token_end_ptr + index, mask=known, other=FAR)
    line_end = tl.load(line_end_ptr + index, mask=known, other=0)
    seq_len = tl.load(seq_lens_ptr + index, mask=known, other=0)
    token = tl.load(query_start_loc_ptr + index, mask=known, other=0)
    behind = end > position
    request = tl.sum((~behind).to(tl.int32))
    before = tl.max(tl.where(behind, 0, end))
    first_line = tl.max(tl.where(behind, 0, line_end))
    seq_len = tl.sum(tl.where(index == request, seq_len, 0))
    token = tl.sum(tl.where(index == request, token, 0)).to(tl.int64)
    return request, before, tl.min(tl.where(behind, end, FAR)), first_line, seq_len, token
