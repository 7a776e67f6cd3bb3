"""Keys or values alone echoed, the others exact: which of the two is harder to rebuild?"""

from __future__ import annotations

import torch

from echokv_kernels.rotary import Rotary
from echokv_vllm.checkpoint import EchoCheckpoint
from echokv_vllm.eval.rebuild import HeadRebuilder, KeyValue, LayerHeads

KEYS, VALUES = "keys", "values"


class OneSided(HeadRebuilder):
    """Takes one part from a checkpoint's maps and the other from the model.

    Args:
        checkpoint: The maps and the plan.
        rotary: Rotary embedding of the model.
        device: Where the model runs.
        part: `keys` or `values`: what is echoed.
    """

    def __init__(
        self, checkpoint: EchoCheckpoint, rotary: Rotary, device: torch.device | str, part: str
    ) -> None:
        assert part in (KEYS, VALUES), part
        super().__init__(checkpoint, rotary, device)
        self._part = part

    def rebuild(
        self,
        layer: int,
        heads: LayerHeads,
        positions: torch.Tensor,
        offsets: torch.Tensor,
        written: KeyValue,
    ) -> KeyValue:
        """See `Rebuilder`."""
        key, value = super().rebuild(layer, heads, positions, offsets, written)
        lost = list(self.rebuilt_heads(layer))
        if self._part == KEYS:
            return key, written[1][:, lost].float()
        return written[0][:, lost].float(), value
