"""The same operations as Triton kernels for NVIDIA GPUs: no host synchronisation, capturable.

Each module has its reference of the same name one level up. Triton itself is imported, never an
engine's wrapper, so that `TRITON_INTERPRET=1` runs every kernel on a CPU.

Step (once for all layers):
stamp         page owners of what a step writes
step_plan     exact pages, block-table rows and work items

Layer:
store         keys and values into retained and residual pages
decode        launching echoed decode, in four kernels, a fifth where nobody decodes in full mode:
  absorb        queries through the key maps, per rotation block
  fused         one loop over keys and values, for features that fit the registers
  absorbed      two loops, for wider ones
  unrotated     keys rebuilt on tensor cores, for rotation block 1
  reduce        work items to one mean per row
  combine       value maps, merge with what is exact
  exact         attention over exact residual pages
rebuild       discarded heads materialised for prompt chunks; merge adds up rounds

Parts:
rotation      cosines and sines of any position from two small tables; pairs of elements
features      where the source heads of a layer lie, as one pointer and a list of offsets
tiles         loading tiles of paged features
softmax       online softmax over tiles of scores
projection    features times maps on tensor cores; plain un-rotates features first
launch        tile sizes and warps, with the command that chose them
overlap       kernels that begin while the one before them ends
"""
