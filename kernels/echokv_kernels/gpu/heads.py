"""The heads of a layer that one set of maps rebuilds, as the decode kernels take them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from echokv_kernels.gpu.features import PagedFeatures
from echokv_kernels.reconstruct import EchoMaps, FeatureSource


@dataclass(frozen=True, eq=False)
class EchoedHeads:
    """One echo group of one layer as the decode kernels take it. Rows are query heads.

    Attributes:
        features: where the source heads lie.
        maps: contiguous, in the cache's dtype.
        row_query: [rows] int32, query head of each row: echoed heads first, in the maps' order,
            then retained heads that are sources.
        row_source: [rows] int32, the retained row's place among the sources, -1 for echoed rows.
        row_exact: [nd * G] int32, row of each echoed query head in the exact part's output.
        head_kv: [nd] int32, KV head of each echoed head.
        group: G, query heads per KV head.
    """

    features: PagedFeatures
    maps: EchoMaps
    row_query: torch.Tensor
    row_source: torch.Tensor
    row_exact: torch.Tensor
    head_kv: torch.Tensor
    group: int

    @classmethod
    def of(
        cls,
        source: FeatureSource,
        maps: EchoMaps,
        echoed: list[tuple[int, int]],
        retained: list[tuple[int, int]],
        group: int,
    ) -> EchoedHeads:
        """Copies a few numbers to the device: not while serving.

        Args:
            source: the features.
            maps: for the echoed heads.
            echoed: (KV head, place among the layer's discarded heads), in the maps' order.
            retained: (KV head, place among the sources) of the layer's own heads to attend to in
                the same pass.
            group: G.
        """
        features = PagedFeatures.of(source)
        device = features.pool.device

        def ints(values: list[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        def queries(heads: list[int]) -> list[int]:
            return [head * group + g for head in heads for g in range(group)]

        bias = None if maps.key_bias is None else maps.key_bias.contiguous()
        value_bias = None if maps.value_bias is None else maps.value_bias.contiguous()
        return cls(
            features=features,
            maps=EchoMaps(maps.key.contiguous(), maps.value.contiguous(), bias, value_bias),
            row_query=ints(queries([head for head, _ in echoed + retained])),
            row_source=ints(
                [-1] * len(echoed) * group + [s for _, s in retained for _ in range(group)]
            ),
            row_exact=ints(queries([place for _, place in echoed])),
            head_kv=ints([head for head, _ in echoed]),
            group=group,
        )

    @property
    def num_rows(self) -> int:
        return self.row_query.shape[0]

    @property
    def num_echoed(self) -> int:
        return self.maps.num_heads

    @property
    def num_retained(self) -> int:
        """Retained heads whose rows are attended to in the same pass."""
        return self.num_rows // self.group - self.num_echoed

    @property
    def row_pad(self) -> int:
        return max(16, triton.next_power_of_2(self.num_rows))

    @property
    def echo_pad(self) -> int:
        """Echoed rows, as tensor cores want them."""
        return max(16, triton.next_power_of_2(self.num_echoed * self.group))

    @property
    def own_pad(self) -> int:
        """Rows of retained heads, as tensor cores want them."""
        return max(16, triton.next_power_of_2(self.num_retained * self.group))

    @property
    def dim_pad(self) -> int:
        return max(16, triton.next_power_of_2(self.maps.head_dim))

    @property
    def feature_size(self) -> tuple[int, int]:
        """Features of one token, padded, and bytes of each."""
        return self.features.num_heads * self.dim_pad, self.maps.key.element_size()

    @property
    def group_pad(self) -> int:
        return triton.next_power_of_2(self.group)

    @property
    def counts(self) -> dict[str, int]:
        """What every decode kernel is compiled for."""
        return {
            "NUM_ECHOED": self.num_echoed,
            "GROUP": self.group,
            "NUM_SOURCES": self.features.num_heads,
            "HEAD_DIM": self.maps.head_dim,
        }
