"""LongBench v1 (arXiv 2308.14508): its sixteen English and code tasks.

The rules are the benchmark's own: greedy answers; a prompt that is too long loses its middle; a
chat template where the tokenizer has one, but not on few-shot and code tasks; only the first line
of a few-shot answer counts. Prompts keep its wording, so that scores mean the same.
"""

from echokv_vllm.eval.longbench.data import Example, LongBenchError, load_longbench
from echokv_vllm.eval.longbench.prompts import longbench_prompts
from echokv_vllm.eval.longbench.tasks import LONGBENCH_TASKS, resolve_longbench

__all__ = [
    "LONGBENCH_TASKS",
    "Example",
    "LongBenchError",
    "load_longbench",
    "longbench_prompts",
    "resolve_longbench",
]
