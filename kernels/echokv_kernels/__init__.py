"""Attention over paged KV caches that keep only some heads exactly.

The package knows torch only (and Triton, once its kernels are here). Import the module that
holds what you need; this file stays empty so that `import echokv_kernels` costs nothing.

rotary        rotary position embedding, forwards and backwards
layout        bytes of slots, pages and plans; the only place that computes them
tiles         query tokens and context positions cut into rows and spans
store         writing pages, reading pages, stamping pages with their owner
softmax       online softmax and log-sum-exp merging
attention     attention over exact keys and values
reconstruct   attention over rebuilt keys and values
decode        the same attention without rebuilding anything (absorbed queries)
"""
