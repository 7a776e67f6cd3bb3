"""Where the source heads of one layer lie, in the form kernels take it.

All layers' pages are views of one pool, so a source head of any layer is an offset from one
pointer: element e of the key of slot s of source head h in block b lies at

    pointer + b * block_stride + offsets[h] + s * 2 * head_dim + e          (its value: + head_dim)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from echokv_kernels.reconstruct import FeatureSource


@dataclass(frozen=True, eq=False)
class PagedFeatures:
    """A `FeatureSource` as one pointer and a list of offsets.

    Attributes:
        pool: any view of the pool; its data pointer is what the offsets count from.
        offsets: [num_heads] int64, elements from the pointer to the first slot of each source head
            in block 0, on the pool's device.
        num_heads: source heads.
        head_dim: elements of one key or value.
        block_size: tokens per page.
        block_stride: elements from one block to the next.
    """

    pool: torch.Tensor
    offsets: torch.Tensor
    num_heads: int
    head_dim: int
    block_size: int
    block_stride: int

    @classmethod
    def of(cls, source: FeatureSource) -> PagedFeatures:
        """Translates a feature source. Copies a few numbers to the device: not while serving.

        Raises:
            ValueError: the sources' views do not belong to one pool, or their slots are not
                contiguous.
        """
        first = source.caches[0]
        offsets = []
        for cache, heads in zip(source.caches, source.heads, strict=True):
            if (
                cache.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
                or cache.dtype != first.dtype
                or cache.stride(0) != first.stride(0)
                or cache.stride()[2:] != (cache.shape[3], 1)
            ):
                raise ValueError(
                    f"a source cache with strides {cache.stride()} and dtype {cache.dtype} does "
                    f"not lie in the pool of one with strides {first.stride()} and dtype "
                    f"{first.dtype}; pass views of one packed pool (BLHNC)"
                )
            places = range(cache.shape[1]) if heads is None else heads.tolist()
            start = cache.storage_offset() - first.storage_offset()
            offsets += [start + place * cache.stride(1) for place in places]
        return cls(
            pool=first,
            offsets=torch.tensor(offsets, dtype=torch.int64, device=first.device),
            num_heads=len(offsets),
            head_dim=source.head_dim,
            block_size=source.block_size,
            block_stride=first.stride(0),
        )
