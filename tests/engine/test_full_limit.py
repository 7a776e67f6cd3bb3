"""A request pinned to full mode that the pool can never hold is refused when it arrives."""

import pytest
from engines import engine, generate

from echokv_vllm.config import EchoConfigError

pytestmark = pytest.mark.slow

# 53 usable pages of 16 tokens: 26 pairs of R and D pages, 416 tokens in full mode.
POOL = dict(num_gpu_blocks_override=54, max_model_len=512)


def test_too_long_for_full_mode_is_refused_and_the_server_goes_on(
    model_of, checkpoint_of, prompt_of
):
    model = model_of(num_layers=2)
    with engine(model, checkpoint_of(model), **POOL) as llm:
        for length, max_tokens in ((480, 8), (300, 200)):
            with pytest.raises(EchoConfigError, match="holds 416 tokens in full mode"):
                generate(llm, [prompt_of(length)], "full", max_tokens=max_tokens)
        longest = generate(llm, [prompt_of(400)], "full", max_tokens=16)
        compressed = generate(llm, [prompt_of(480)], "auto", max_tokens=8)
    assert len(longest[0].outputs[0].token_ids) == 16
    assert len(compressed[0].outputs[0].token_ids) == 8
