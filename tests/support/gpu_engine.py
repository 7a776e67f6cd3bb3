"""One engine on a GPU, in a process of its own: python gpu_engine.py JOB.json -> JOB.json.out

The job: model, checkpoint (null: stock), backend (stock only), runner ("v1" or "v2"), portable
(true forces the portable path), echokv options, engine options, and either prompts with modes
and max_tokens, or traffic (seeds, num_requests) with the shadow of ``shadow.py`` on every rank.
Workers may be processes of their own, so whatever looks into one is sent there.
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from typing import Any


def start(job: dict[str, Any]) -> Any:
    """The engine, in this process."""
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_NO_USAGE_STATS="1",
        HF_HUB_OFFLINE="1",
        VLLM_USE_V2_MODEL_RUNNER="1" if job["runner"] == "v2" else "0",
    )
    from vllm import LLM

    if job.get("portable"):
        from echokv_vllm import compat

        compat.has_gpu_kernels = lambda *_: False
    options = dict(
        dtype="bfloat16", max_model_len=1024, max_num_batched_tokens=512, max_num_seqs=16,
        kv_cache_memory_bytes=1 << 30, disable_log_stats=True, seed=0,
        # The cache's size stands above; other processes may have memory of the GPU.
        gpu_memory_utilization=0.3,
    )  # fmt: skip
    options |= job["options"]
    if job["checkpoint"] is None:
        options["attention_backend"] = job.get("backend", "FLASH_ATTN")
    else:
        echokv = {"checkpoint": job["checkpoint"], **job.get("echokv", {})}
        options |= {"attention_backend": "echokv", "additional_config": {"echokv": echokv}}
    return LLM(job["model"], **options)


def generate(llm: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Greedy tokens and the two best log-probabilities of every position."""
    from vllm import SamplingParams

    params = [
        SamplingParams(
            max_tokens=job["max_tokens"], temperature=0, ignore_eos=True, logprobs=2,
            extra_args=None if mode is None else {"echokv": mode}, detokenize=False,
        )
        for mode in job["modes"]
    ]  # fmt: skip
    inputs = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    outputs = llm.generate(inputs, params, use_tqdm=False)
    return {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "logprobs": [
            [
                {token: entry.logprob for token, entry in top.items()}
                for top in o.outputs[0].logprobs
            ]
            for o in outputs
        ],
    }


def echo_worker(worker: Any) -> Any:
    """The EchoWorker of a vLLM worker."""
    runner = worker.worker.model_runner
    context = runner.vllm_config.compilation_config.static_forward_context
    return next(layer.impl.worker for layer in context.values() if hasattr(layer, "impl"))


def begin_shadow(worker: Any) -> None:
    """Puts a vLLM worker under the shadow."""
    from shadow import StepShadow

    worker.step_shadow = StepShadow(echo_worker(worker))


def read_shadow(worker: Any) -> dict[str, int]:
    """What the shadow of a vLLM worker has seen."""
    shadow = worker.step_shadow
    return {
        "accepted": shadow.num_accepted, "stale": shadow.num_stale,
        "foreign": shadow.num_foreign, "steps": shadow.num_steps,
    }  # fmt: skip


def describe_worker(worker: Any, is_echo: bool) -> dict[str, Any]:
    """What vLLM really used on one rank."""
    found = {"runner": type(worker.worker.model_runner).__module__}
    return found | ({"paired": echo_worker(worker).steps.paired} if is_echo else {})


def play(llm: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Random traffic with aborts under the shadow; what was left behind."""
    from engines import residual_manager, scheduler_of
    from vllm import SamplingParams

    llm.collective_rpc(begin_shadow)
    core = llm.llm_engine
    preemptions = 0
    scheduler = scheduler_of(llm)
    preempt = scheduler._preempt_request

    def count(*args: Any, **options: Any) -> Any:
        nonlocal preemptions
        preemptions += 1
        return preempt(*args, **options)

    scheduler._preempt_request = count
    lost = finished = aborted = 0
    for seed in job["seeds"]:
        source = random.Random(seed)
        prefixes = [[source.randrange(255) for _ in range(160)] for _ in range(3)]
        alive: dict[str, int] = {}
        arrived = 0
        while arrived < job["num_requests"] or alive:
            while arrived < job["num_requests"] and source.random() < 0.6:
                prompt = source.choice(prefixes)[: source.randint(1, 160)]
                prompt = prompt + [source.randrange(255) for _ in range(source.randint(1, 60))]
                mode = source.choice((None, None, "auto", "full", "compressed"))
                max_tokens = source.choice((1, 12, 36, 60))
                params = SamplingParams(
                    max_tokens=max_tokens, temperature=0, ignore_eos=True,
                    extra_args=None if mode is None else {"echokv": mode},
                )  # fmt: skip
                core.add_request(f"{seed}-{arrived}", {"prompt_token_ids": prompt}, params)
                alive[f"{seed}-{arrived}"] = max_tokens
                arrived += 1
            if alive and source.random() < 0.02:
                name = source.choice(sorted(alive))
                core.abort_request([name])
                alive.pop(name)
                aborted += 1
            for output in core.step():
                if output.finished and output.request_id in alive:
                    lost += len(output.outputs[0].token_ids) != alive.pop(output.request_id)
                    finished += 1
            if arrived == job["num_requests"] and not core.has_unfinished_requests():
                lost += len(alive)
                break
    manager = residual_manager(llm)
    return {
        "lost": lost, "finished": finished, "aborted": aborted, "preemptions": preemptions,
        "ranks": llm.collective_rpc(read_shadow),
        "free": manager.block_pool.get_num_free_blocks() == manager.num_usable_blocks,
        "pages_dropped": manager.counters.pages_dropped,
        "admitted_compressed": manager.counters.admitted_compressed,
    }  # fmt: skip


def describe(llm: Any, is_echo: bool) -> dict[str, Any]:
    """What vLLM really used."""
    config = llm.llm_engine.vllm_config
    return {
        "graphs": str(config.compilation_config.cudagraph_mode),
        "async": bool(config.scheduler_config.async_scheduling),
        "ranks": llm.collective_rpc(describe_worker, args=(is_echo,)),
    }


def main() -> None:
    """Reads the job, runs it, writes the answer."""
    path = Path(sys.argv[1])
    job = json.loads(path.read_text())
    llm = start(job)
    answer = play(llm, job) if "seeds" in job else generate(llm, job)
    answer["engine"] = describe(llm, job["checkpoint"] is not None and not job.get("portable"))
    Path(f"{path}.out").write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
