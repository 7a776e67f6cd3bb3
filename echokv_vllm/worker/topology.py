"""One worker's layers: who stores what where, and which maps rebuild the rest.

The checkpoint is read when the first attention layer is built; the layers get their roles after
the model is loaded and before vLLM asks for KV cache specs. A layer that keeps some of its heads
owns R pages itself and gets a second, invisible cache layer for its D pages; a layer that keeps
all heads has R pages only; one that keeps none has D pages only.
"""

from __future__ import annotations

import logging
import weakref
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.utils import extract_layer_index

from echokv_kernels.layout import PlanLayout
from echokv_kernels.reconstruct import EchoMaps, FeatureSource
from echokv_vllm import compat
from echokv_vllm.checkpoint import EchoCheckpoint
from echokv_vllm.config import EchoConfig, SchedulerSettings
from echokv_vllm.fingerprint import ModelFingerprint
from echokv_vllm.rope import rotary_from_config
from echokv_vllm.specs import EchoResidualSpec
from echokv_vllm.worker.rank_plan import RankLayer, rank_layers
from echokv_vllm.worker.refusals import UnsupportedModelError
from echokv_vllm.worker.step import StepBuilder

if TYPE_CHECKING:
    from echokv_kernels.gpu.heads import EchoedHeads
    from echokv_vllm.worker.gpu.step import GpuStepBuilder
    from echokv_vllm.worker.gpu.worker import GpuWorker
    from echokv_vllm.worker.impl import EchoKVImpl

logger = logging.getLogger("vllm.echokv")

RESIDUAL_SUFFIX = ".echokv_residual"


class ResidualCacheLayer(AttentionLayerBase):
    """Owns the D pages of one layer. vLLM sees a layer with a KV cache; nothing calls it."""

    def __init__(self, worker: EchoWorker, layer: Any, num_heads: int) -> None:
        self.worker = worker
        self.impl = layer.impl
        self.num_heads = num_heads
        self.head_size = layer.head_size
        self.dtype = layer.kv_cache_torch_dtype
        self.kv_cache = torch.empty(0)

    def get_attn_backend(self) -> Any:
        """The plain backend: the spec below is already EchoKV's."""
        from echokv_vllm.worker.backend import EchoKVBackend

        return EchoKVBackend

    def get_kv_cache_spec(self, vllm_config: Any) -> EchoResidualSpec:
        """The D group's spec for this layer."""
        return EchoResidualSpec(
            block_size=self.worker.steps.residual_block_size,
            num_kv_heads=self.num_heads,
            head_size=self.head_size,
            dtype=self.dtype,
            echo_settings=self.worker.settings.to_json(),
        )


class EchoGroupMaps:
    """Maps and feature sources of one echo group, on the worker's device.

    Attributes:
        maps: For the group's discarded heads.
        places: Places of those heads among the layer's discarded heads.
        query_heads: Query heads among the layer's discarded query heads, int64.
        own: (retained KV head, place among the sources) of the layer's own source heads.
    """

    def __init__(
        self,
        maps: EchoMaps,
        places: tuple[int, ...],
        query_heads: torch.Tensor,
        own: list[tuple[int, int]],
        sources: list[tuple[Any, torch.Tensor]],
    ) -> None:
        self.maps = maps
        self.places = places
        self.query_heads = query_heads
        self.own = own
        self._sources = sources

    def features(self) -> FeatureSource:
        """The source pages as they are bound now."""
        return FeatureSource(
            [layer.kv_cache for layer, _ in self._sources], [heads for _, heads in self._sources]
        )

    def echoed(self, discarded: tuple[int, ...], group: int, *, bound: bool = True) -> EchoedHeads:
        """The group as decode kernels take it.

        Args:
            discarded: The layer's discarded KV heads, in the order of its D pages.
            group: Query heads per KV head.
            bound: Whether the caches are bound; otherwise the result serves for sizes only.
        """
        from echokv_kernels.gpu.heads import EchoedHeads

        return EchoedHeads.of(
            self.features() if bound else self._unbound_features(),
            self.maps,
            [(discarded[place], place) for place in self.places],
            self.own,
            group,
        )

    def _unbound_features(self) -> FeatureSource:
        """Sources of the right shape before any cache is bound; for sizes only."""
        num_heads = max(int(heads.max()) + 1 for _, heads in self._sources)
        cache = self.maps.key.new_empty((1, num_heads, 16, 2 * self.maps.head_dim))
        return FeatureSource([cache for _ in self._sources], [heads for _, heads in self._sources])


class EchoWorker:
    """State of one worker process.

    Attributes:
        config: The server's options.
        checkpoint: Plan and maps, on the CPU.
        settings: What the scheduler needs, for the specs.
        steps: Per-step metadata and page stamps.
        layer_names: This rank's attention layers in model order; empty before the model is loaded.
        retained_lead: The layer whose metadata opens a step.
        residual_lead: The layer whose metadata completes it.
        rotary: The model's rotary embedding, on the worker's device.
        gpu: What the GPU path keeps; None where attention is portable.
    """

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        """Reads the options and the checkpoint; the model may not be loaded yet.

        Raises:
            ValueError: An option, the checkpoint or the plan does not fit this server.
        """
        model_config = vllm_config.model_config
        self.device = device
        self.context = vllm_config.compilation_config.static_forward_context
        self.layer_names: list[str] = []
        self.retained_lead = self.residual_lead = ""
        self._pool: tuple[int, int] | None = None
        # vLLM builds models with the accelerator as default device.
        with torch.device("cpu"):
            self.config = EchoConfig.parse(vllm_config.additional_config)
            self.checkpoint = EchoCheckpoint.load(self.config.checkpoint, self.config.revision)
            self.checkpoint.check_model(
                ModelFingerprint.from_config(
                    model_config.hf_text_config, model_config.model, model_config.revision
                )
            )
            self.rotary = rotary_from_config(model_config.hf_text_config).to(device)
        plan = self.checkpoint.plan
        self.rank_layers = rank_layers(
            plan, get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        )
        # From the whole plan, not from this rank's layers: pipeline ranks must agree.
        layout = PlanLayout(
            tuple(len(layer.retained) for layer in self.rank_layers),
            len(self.rank_layers[0].retained) + len(self.rank_layers[0].discarded),
            self.rotary.head_dim,
            model_config.dtype.itemsize,
        )
        sizes = layout.block_sizes()
        self.settings = _scheduler_settings(vllm_config, self.config, self.checkpoint, sizes)
        self.gpu: GpuWorker | None = None
        self.steps: StepBuilder | GpuStepBuilder = StepBuilder(sizes.retained, sizes.residual)
        if compat.has_gpu_kernels(device, model_config.dtype, self.rotary.head_dim):
            from echokv_vllm.worker.gpu.worker import GpuWorker

            self.gpu = GpuWorker(
                vllm_config, device, sizes, self.rotary, self.checkpoint, self.config.step_kinds
            )
            self.steps = self.gpu.steps
        elif device.type == "cuda":
            _warn_of_portable_path(model_config.dtype, self.rotary.head_dim)

    def adopt_layers(self) -> None:
        """Gives every attention layer its role, once the model is loaded. May be called again.

        Raises:
            UnsupportedModelError: The model's layers cannot be served.
        """
        if self.layer_names:
            return
        self.layer_names = self._find_layers()
        for name in self.layer_names:
            self._add_layer(name, self.device)
        self.retained_lead, self.residual_lead = self._leads()
        self._list_retained_first()
        if self.gpu is not None:
            self.gpu.adopt([self.context[name] for name in self.layer_names])

    def _list_retained_first(self) -> None:
        """Moves leading layers that retain nothing behind the others.

        vLLM makes its groups in the order in which it finds the layers' specs here, and asks the
        groups in that order for pages and metadata: R must come first.
        """
        for name in self.layer_names:
            if name == self.retained_lead:
                return
            self.context[name] = self.context.pop(name)

    def _bound_pool(self) -> tuple[int, int]:
        cache = self.context[self.residual_lead].kv_cache
        return cache.data_ptr(), cache.shape[0]

    def release_pool(self) -> None:
        """Lets go of a cache that vLLM has unbound, so that its memory is free for the next one.

        Without one, or while it is still bound, nothing happens: captured graphs may use it.
        """
        if self._pool is None or self._pool == self._bound_pool():
            return
        self._pool = None
        if self.gpu is not None:
            self.gpu.release()

    def bind_pool(self) -> None:
        """Takes over the cache vLLM has bound; it may do so again (graph memory profiling)."""
        pool = self._bound_pool()
        if pool == self._pool:
            return
        self._pool = pool
        cache = self.context[self.residual_lead].kv_cache
        if self.gpu is not None:
            self.gpu.bind()
        self.steps.bind_pool(cache.shape[0], cache.device)

    def _find_layers(self) -> list[str]:
        from echokv_vllm.worker.impl import EchoKVImpl

        layers = {n: x for n, x in self.context.items() if isinstance(x, AttentionLayerBase)}
        own = [n for n, x in layers.items() if isinstance(getattr(x, "impl", None), EchoKVImpl)]
        foreign = sorted(set(layers) - set(own))
        if foreign:
            raise UnsupportedModelError(
                "EchoKV does not support layers with other KV caches beside it, found "
                f"{', '.join(foreign[:3])}: they would write pages without stamping them. Use "
                "another --attention-backend."
            )
        return sorted(own, key=extract_layer_index)

    def layer_at(self, index: int, needed_by: int) -> Any:
        """The attention layer with this number in the model, on this rank.

        Raises:
            UnsupportedModelError: It lives on another pipeline rank.
        """
        for name in self.layer_names:
            if extract_layer_index(name) == index:
                return self.context[name]
        raise UnsupportedModelError(
            f"Layer {needed_by} is rebuilt from layer {index}, which is on another pipeline rank. "
            "Use a plan without sources in other layers (local-R), or a --pipeline-parallel-size "
            "that keeps the groups of the plan together."
        )

    def _add_layer(self, name: str, device: torch.device) -> None:
        from echokv_vllm.worker.backend import residual_backend, retained_backend

        layer = self.context[name]
        if layer.head_size != self.rotary.head_dim:
            # Seen with Qwen2 configs that name a head_dim vLLM's model does not read.
            raise UnsupportedModelError(
                f"vLLM built layer {name} with heads of {layer.head_size} elements, but the "
                f"model's config and the checkpoint say {self.rotary.head_dim}. Remove head_dim "
                "from the config, or use another --attention-backend."
            )
        rank_layer = self.rank_layers[extract_layer_index(name)]
        layer.impl.bind(layer, rank_layer, self._groups(layer, name, rank_layer, device))
        if not rank_layer.retained:
            layer.attn_backend = residual_backend(len(rank_layer.discarded), self.settings)
            layer.impl.residual_layer = layer
            return
        layer.attn_backend = retained_backend(len(rank_layer.retained), self.settings)
        if rank_layer.discarded:
            residual = ResidualCacheLayer(self, layer, len(rank_layer.discarded))
            self.context[name + RESIDUAL_SUFFIX] = residual
            layer.impl.residual_layer = residual

    def _groups(
        self, layer: Any, name: str, rank_layer: RankLayer, device: torch.device
    ) -> list[EchoGroupMaps]:
        index = extract_layer_index(name)
        groups = []
        for group in rank_layer.groups:
            stored = self.checkpoint.maps[index]
            rows = list(group.map_rows)
            maps = EchoMaps(
                stored.key[rows],
                stored.value[rows],
                None if stored.key_bias is None else stored.key_bias[rows],
                None if stored.value_bias is None else stored.value_bias[rows],
            ).to(device=device, dtype=layer.kv_cache_torch_dtype)
            sources = [
                (self.layer_at(source, index), torch.tensor(places, device=device))
                for source, places in group.sources
            ]
            flat = [(source, place) for source, places in group.sources for place in places]
            own = [
                (rank_layer.retained[place], number)
                for number, (source, place) in enumerate(flat)
                if source == index
            ]
            heads = query_heads(group.discarded, layer.num_heads // layer.num_kv_heads)
            groups.append(EchoGroupMaps(maps, group.discarded, heads.to(device), own, sources))
        return groups

    def _leads(self) -> tuple[str, str]:
        """The layer whose metadata opens a step, and the one whose metadata completes it."""
        retained = [n for n in self.layer_names if self.context[n].impl.rank_layer.retained]
        residual = [
            n if not self.context[n].impl.rank_layer.retained else n + RESIDUAL_SUFFIX
            for n in self.layer_names
            if self.context[n].impl.rank_layer.discarded
        ]
        if not retained or not residual:
            raise UnsupportedModelError(
                "A pipeline rank's layers "
                f"{self.layer_names} have no {'retained' if not retained else 'discarded'} heads "
                f"under plan {self.checkpoint.plan.name!r}. Use a smaller "
                "--pipeline-parallel-size or a local-R plan."
            )
        return retained[0], residual[0]


def query_heads(kv_heads: tuple[int, ...], group: int) -> torch.Tensor:
    """[len(kv_heads) * group] int64: the query heads that read some KV heads, in order."""
    return (torch.tensor(kv_heads)[:, None] * group + torch.arange(group)).flatten()


def _warn_of_portable_path(dtype: torch.dtype, head_dim: int) -> None:
    from echokv_kernels.gpu.launch import HEAD_DIM_MULTIPLE
    from echokv_vllm.worker.gpu.flash import SERVED_VERSIONS, flash_version

    logger.warning(
        "EchoKV: %s with heads of %d elements runs on the portable path, without CUDA graphs and "
        "several times slower; the GPU path needs float16 or bfloat16, heads of a multiple of %d "
        "elements and vLLM's FlashAttention in version %s, and vLLM has version %s for this GPU "
        "(--attention-config.flash_attn_version asks for another)",
        dtype, head_dim, HEAD_DIM_MULTIPLE, " or ".join(map(str, SERVED_VERSIONS)),
        flash_version(head_dim),
    )  # fmt: skip


def _scheduler_settings(
    vllm_config: Any, config: EchoConfig, checkpoint: EchoCheckpoint, sizes: Any
) -> SchedulerSettings:
    recent = config.recent_tokens
    return SchedulerSettings(
        mode=config.mode,
        recent_tokens=checkpoint.recent_tokens if recent is None else recent,
        admit_full_below=float(config.admit_full_below),
        restore_below=float(config.restore_below),
        restore_steps=config.restore_steps,
        strict=config.strict,
        look_ahead=config.looks_ahead,
        watermark=float(getattr(vllm_config.scheduler_config, "watermark", 0.0)),
        retained_block_size=sizes.retained,
        residual_block_size=sizes.residual,
        plan=checkpoint.plan.name,
        ratio=checkpoint.plan.ratio,
    )


# Weak: the layers keep their worker alive, and a process may start several engines in turn.
_WORKERS: weakref.WeakValueDictionary[int, EchoWorker] = weakref.WeakValueDictionary()


def worker_of(impl: EchoKVImpl) -> EchoWorker:
    """The worker an attention implementation belongs to, made on first use.

    Keyed by the model's forward context, which the worker keeps alive, so that several
    models in one process (tests) do not meet.
    """
    context = impl.vllm_config.compilation_config.static_forward_context
    worker = _WORKERS.get(id(context))
    if worker is None:
        worker = _WORKERS[id(context)] = EchoWorker(impl.vllm_config, impl.device)
    return worker
