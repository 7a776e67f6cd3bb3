"""What a worker keeps for its layers on a GPU: one step builder, one memory, one kind of call."""

from __future__ import annotations

import logging
from typing import Any

import torch

from echokv_kernels.gpu.heads import EchoedHeads
from echokv_kernels.gpu.launch import DECODE
from echokv_kernels.layout import BlockSizes
from echokv_kernels.rotary import Rotary
from echokv_vllm import compat, hooks
from echokv_vllm.checkpoint import EchoCheckpoint
from echokv_vllm.worker.gpu.attention import GpuAttention
from echokv_vllm.worker.gpu.flash import SERVED_VERSIONS, FlashDecodeSchedule, flash_version
from echokv_vllm.worker.gpu.memory import GpuMemory
from echokv_vllm.worker.gpu.step import DISCARDED, PAIRED, GpuStepBuilder

logger = logging.getLogger("vllm.echokv")


class GpuWorker:
    """The GPU side of an ``EchoWorker``.

    Args:
        vllm_config: The server's configuration.
        device: Where.
        sizes: Tokens per page of both groups.
        rotary: The model's rotary embedding, on the device.
        checkpoint: For its rotation block.
        step_kinds: The option of this name.
    """

    def __init__(
        self,
        vllm_config: Any,
        device: torch.device,
        sizes: BlockSizes,
        rotary: Rotary,
        checkpoint: EchoCheckpoint,
        step_kinds: bool,
    ) -> None:
        version = flash_version(rotary.head_dim)
        assert version is not None and version in SERVED_VERSIONS, (
            f"echokv: GPU path with FlashAttention {version}"
        )
        self.version = version
        self.vllm_config, self.device, self.rotary = vllm_config, device, rotary
        self.rotation_block = checkpoint.rotation_block
        self.steps = GpuStepBuilder(sizes.retained, sizes.residual, vllm_config, device, step_kinds)
        if step_kinds:
            self._patch_vllm()
        self.layers: list[GpuAttention] = []
        self._is_warm = False

    def _patch_vllm(self) -> None:
        missing = hooks.missing_hooks(hooks.GRAPH_HOOKS)
        if missing:
            logger.warning(
                "EchoKV: vLLM %s lacks %s; one graph serves full and compressed steps, which are "
                "1 to 3 %% slower for it",
                hooks.vllm_version(),
                ", ".join(missing),
            )
            return
        if not compat.executor_hands_on_steps(self.vllm_config.parallel_config):
            logger.warning(
                "EchoKV: Ray's compiled graphs go past vLLM's workers; one graph serves full and "
                "compressed steps, which are 1 to 3 %% slower for it. Leave "
                "VLLM_USE_RAY_V2_EXECUTOR_BACKEND at 1, or use another executor"
            )
            return
        compat.patch_worker()
        if self.device.type == "cuda":
            from echokv_vllm.worker.gpu.graphs import patch_graph_manager

            patch_graph_manager()

    def adopt(self, layers: list[Any]) -> None:
        """Makes buffers and schedules for the worker's layers, and each one's attention."""
        impls = [layer.impl for layer in layers]
        groups = [
            group.echoed(
                impl.rank_layer.discarded, impl.num_heads // impl.num_kv_heads, bound=False
            )
            for impl in impls
            for group in impl.groups
        ]
        self.memory = self._allocate(groups, impls)
        for layer in layers:
            layer.impl.attention = GpuAttention(
                layer,
                layer.impl.rank_layer,
                layer.impl.groups,
                self.steps,
                self.memory,
                self.version,
                self.rotation_block,
            )
        self.layers = [impl.attention for impl in impls]
        self._configure(self._same_pages(impls))

    def _allocate(self, groups: list[EchoedHeads], impls: list[Any]) -> GpuMemory:
        memory = GpuMemory.allocate(
            groups,
            max(len(impl.rank_layer.discarded) for impl in impls),
            self.rotary,
            self.rotation_block,
            self.vllm_config,
            self.steps.max_reqs,
        )
        logger.info("EchoKV: %.0f MiB of buffers for echoed attention", memory.num_bytes / 2**20)
        return memory

    def _same_pages(self, impls: list[Any]) -> bool:
        """Whether R and D pages of every layer have one shape."""
        if self.steps.retained_block_size != self.steps.residual_block_size:
            return False
        return all(
            len(impl.rank_layer.retained) == len(impl.rank_layer.discarded)
            and impl.attention.covers_retained
            for impl in impls
        )

    def _configure(self, paired: bool) -> None:
        schedules: dict[tuple[int, int], FlashDecodeSchedule] = {}
        for layer in self.layers:
            retained, discarded = layer.rank_layer.retained, layer.rank_layer.discarded
            kinds = {(layer.retained_part, len(retained)), (DISCARDED, len(discarded))}
            if paired:
                kinds = {(PAIRED, len(retained))}
            for part, heads in kinds:
                if heads and (part, heads) not in schedules:
                    schedules[part, heads] = self._schedule(layer, part, heads)
        self.steps.configure(
            schedules,
            paired=paired,
            shares=self.memory.shape.shares(self.memory.scratch.num_programs, DECODE),
            num_tiles=self.memory.num_tiles,
        )

    def _schedule(self, layer: GpuAttention, part: int, heads: int) -> FlashDecodeSchedule:
        steps = self.steps
        return FlashDecodeSchedule(
            self.version,
            layer.group,
            heads,
            layer.head_dim,
            self.vllm_config.model_config.dtype,
            steps.residual_block_size if part == DISCARDED else steps.retained_block_size,
            steps.max_reqs * (2 if part == PAIRED else 1),
            self.device,
        )

    def release(self) -> None:
        """Forgets the pages of a cache that vLLM has unbound, and frees them."""
        for layer in self.layers:
            layer.release()
        if self.device.type == "cuda":
            # vLLM's own clean-up emptied it too early: the pages were still held.
            torch.cuda.empty_cache()

    def bind(self) -> None:
        """Looks up the pages of all layers in a cache that vLLM has just bound."""
        for layer in self.layers:
            layer.bind()
        if self.steps.paired and not all(layer.has_paired_pages() for layer in self.layers):
            logger.warning(
                "EchoKV: vLLM did not lay R and D pages over each other; stock attention runs "
                "once per group and decode steps of full requests are slower"
            )
            self._configure(paired=False)
        if not self._is_warm:
            self._is_warm = True
            kinds = {
                (
                    len(layer.rank_layer.retained),
                    len(layer.rank_layer.discarded),
                    tuple(heads.maps.width for heads in layer.echoed),
                ): layer
                for layer in self.layers
            }
            for layer in kinds.values():
                layer.warm_up(self.steps.max_model_len)
