"""One engine configuration in this process: start it, run the scenarios, print and write JSON.

    python benchmarks/engine/run_one.py --model DIR --backend FLASH_ATTN \
        --scenario decode:32x8192 --scenario prefill:64x1024 --out stock.json
    python benchmarks/engine/run_one.py --model DIR --backend echokv --checkpoint DIR \
        --mode compressed --scenario decode:32x8192 --out compressed.json

The file is rewritten after every scenario, so what was measured survives a later failure.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from scenarios import Scenario, measure_decode, measure_prefill

# Read when vLLM is imported. The engine lives in this process so that steps can be timed; the
# other values keep out libraries that an offline host may lack, on both sides alike.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_USE_DEEP_GEMM": "0",
    "HF_HUB_OFFLINE": "1",
}
MAX_NUM_SEQS = 256


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder written by models.py")
    parser.add_argument("--backend", required=True, help="FLASH_ATTN, TRITON_ATTN, ..., or echokv")
    parser.add_argument("--checkpoint", help="EchoKV checkpoint, for --backend echokv")
    parser.add_argument("--mode", default="auto", choices=("auto", "full", "compressed"))
    parser.add_argument(
        "--scenario", type=Scenario.parse, action="append", required=True, dest="scenarios",
        metavar="KIND:BATCHxPROMPT_LEN", help="decode:32x8192, prefill:64x1024, ...; repeatable",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--runner", default="auto", choices=("auto", "v1", "v2"))
    parser.add_argument("--eager", action="store_true", help="neither torch.compile nor graphs")
    parser.add_argument(
        "--no-compile", action="store_true", help="no torch.compile, CUDA graphs for decoding only"
    )
    parser.add_argument("--async-scheduling", default="auto", choices=("auto", "on", "off"))
    parser.add_argument("--steps", type=int, default=48, help="decode steps measured")
    parser.add_argument("--repeats", type=int, default=3, help="prefill runs after the warm-up")
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192)
    parser.add_argument("--max-model-len", type=int, help="default: what the scenarios need")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    parser.add_argument("--block-size", type=int, help="of a stock backend; default: vLLM's")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.backend == "echokv" and not args.checkpoint:
        parser.error("--backend echokv needs --checkpoint")
    # Found by the statistics otherwise, when all is measured.
    if args.steps < 2:
        parser.error(f"--steps {args.steps} has no percentiles; measure at least 2")
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats} measures nothing; at least 1 is needed")
    too_many = [str(s) for s in args.scenarios if s.kind == "decode" and s.batch > MAX_NUM_SEQS]
    if too_many:
        parser.error(f"{too_many[0]} has more requests than the engine's {MAX_NUM_SEQS} sequences")
    return args


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of ``vllm.LLM``, the same for every backend except what names the backend."""
    budget = args.max_num_batched_tokens
    longest = max(s.prompt_len + s.max_tokens(args.steps, budget) for s in args.scenarios)
    options: dict[str, Any] = dict(
        load_format="dummy", dtype="bfloat16", seed=args.seed, enable_prefix_caching=False,
        max_num_seqs=MAX_NUM_SEQS, max_num_batched_tokens=budget,
        max_model_len=args.max_model_len or -(-longest // 64) * 64,
        gpu_memory_utilization=args.gpu_memory_utilization, attention_backend=args.backend,
    )  # fmt: skip
    if args.eager:
        options["enforce_eager"] = True
    else:
        # Graphs for the batches in use only: capturing vLLM's default list takes most of a start.
        sizes = {1, 2} | {s.batch for s in args.scenarios if s.kind == "decode"}
        options["compilation_config"] = {"cudagraph_capture_sizes": sorted(sizes)}
        if args.no_compile:
            options["compilation_config"] |= {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    if args.async_scheduling != "auto":
        options["async_scheduling"] = args.async_scheduling == "on"
    if args.backend == "echokv":
        settings = {"checkpoint": args.checkpoint, "mode": args.mode}
        options["additional_config"] = {"echokv": settings}
    elif args.block_size:
        options["block_size"] = args.block_size
    return options


def machine() -> dict[str, Any]:
    """What the figures were measured on, and with which versions."""
    import torch
    import transformers
    import vllm

    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    has_gpu = torch.cuda.is_available()
    driver = None
    if has_gpu and shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, check=False)
        driver = answer.stdout.split("\n")[0].strip() or None
    return {
        "gpu": torch.cuda.get_device_name() if has_gpu else None,
        "driver": driver,
        "cuda": torch.version.cuda,
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "vllm": vllm.__version__,
        "transformers": transformers.__version__,
    }


def engine_facts(engine: Any, start_s: float) -> dict[str, Any]:
    """What vLLM made of the options; a fallback shows here and not only in the log."""
    config = engine.vllm_config
    layers = list(config.compilation_config.static_forward_context.values())
    attention = next(layer for layer in layers if hasattr(layer, "impl"))
    backend = attention.get_attn_backend()
    cache = config.cache_config
    capacity = {"kv_tokens": getattr(cache, "kv_cache_size_tokens", None)}
    if config.additional_config.get("echokv"):
        from echokv_vllm.limits import full_mode_limit

        limit = full_mode_limit(config)
        capacity = {
            "kv_tokens": limit.max_tokens,
            "kv_tokens_compressed": limit.num_pages * limit.retained_block_size,
        }
    return {
        "start_s": round(start_s, 1),
        "attention": backend.__name__,
        "flash_attention": getattr(attention.impl, "vllm_flash_attn_version", None),
        "runner": "v2" if config.use_v2_model_runner else "v1",
        "async_scheduling": config.scheduler_config.async_scheduling,
        "cudagraph_mode": config.compilation_config.cudagraph_mode.name,
        "capture_sizes": config.compilation_config.cudagraph_capture_sizes,
        "compile_mode": config.compilation_config.mode.name,
        **capacity,
        "num_blocks": cache.num_gpu_blocks,
        "block_size": cache.block_size,
        "max_model_len": config.model_config.max_model_len,
    }


def run(engine: Any, args: argparse.Namespace, report: dict[str, Any]) -> None:
    """Runs every scenario and adds its result to the report."""
    budget = args.max_num_batched_tokens
    # Short prompts first: allocations and kernels of small steps, whatever the scenarios are.
    measure_decode(engine, Scenario("decode", 2, 64), 4, budget, seed=args.seed - 1)
    for scenario in args.scenarios:
        begin = time.perf_counter()
        if scenario.kind == "decode":
            result = measure_decode(engine, scenario, args.steps, budget, args.seed)
        else:
            result = measure_prefill(engine, scenario, args.repeats, args.seed)
        result["wall_s"] = round(time.perf_counter() - begin, 1)
        if args.backend == "echokv":
            from echokv_vllm.metrics import read_totals

            result["counters"] = read_totals()
        report["scenarios"][str(scenario)] = result
        write(report, args.out)
        short = {key: value for key, value in result.items() if key not in ("steps_ms", "runs_s")}
        print(f"{scenario} {json.dumps(short)}", flush=True)


def write(report: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    args = parse_args()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if args.runner != "auto":
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1" if args.runner == "v2" else "0"
    begin = time.perf_counter()
    from vllm import LLM

    if args.backend == "echokv":
        # Where EchoKV is importable but not installed, vLLM finds no entry point.
        from echokv_vllm.plugin import register

        register()
    options = engine_options(args)
    llm = LLM(args.model, **options)
    engine = llm.llm_engine
    report: dict[str, Any] = {
        "machine": machine(),
        "options": {**options, "mode": args.mode if args.backend == "echokv" else None},
        "engine": engine_facts(engine, time.perf_counter() - begin),
        "scenarios": {},
    }
    write(report, args.out)
    print(json.dumps(report["engine"]), flush=True)
    try:
        run(engine, args, report)
    finally:
        engine.engine_core.shutdown()
    if args.out is None:
        print(json.dumps(report))


if __name__ == "__main__":
    main()
