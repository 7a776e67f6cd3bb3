"""The worker on NVIDIA GPUs: Triton kernels for what is echoed, FlashAttention for what is exact.

step         metadata of one engine step, in persistent buffers
prefill      prompt chunks over compressed context, cut into rounds
flash        vLLM's FlashAttention over packed pages
memory       buffers that all layers of a worker share
attention    one layer
"""
