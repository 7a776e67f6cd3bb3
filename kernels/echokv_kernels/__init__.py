"""Attention over paged KV caches that keep only some heads exactly.

The package knows torch and Triton only. Import the module that holds what you need; this file
stays empty so that `import echokv_kernels` costs nothing. The modules here are plain PyTorch:
the portable path, and the references of the Triton kernels in `gpu`.

rotary        rotary position embedding, forwards and backwards
layout        bytes of slots, pages and plans; the only place that computes them
tiles         query tokens and context positions cut into rows and spans
store         writing pages, reading pages, stamping pages with their owner
softmax       online softmax and log-sum-exp merging
attention     attention over exact keys and values
reconstruct   attention over rebuilt keys and values
decode        the same attention without rebuilding anything (absorbed queries)
rebuild       rebuilt, exact and fresh heads of a context, materialised in a workspace
step_plan     what all layers of a step need to know about its requests
gpu           Triton kernels
"""
