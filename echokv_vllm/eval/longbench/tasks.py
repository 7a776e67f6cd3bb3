"""The tasks of LongBench: prompts in the benchmark's wording, answer lengths and metrics."""

from __future__ import annotations

from dataclasses import dataclass

from echokv_vllm.eval.longbench.data import LongBenchError
from echokv_vllm.eval.longbench.metrics import (
    count_share,
    edit_similarity,
    qa_f1,
    retrieval_share,
    rouge_l,
)
from echokv_vllm.eval.tasks.prompt import Metric


@dataclass(frozen=True)
class LongBenchTask:
    """One task.

    Attributes:
        template: Prompt; `{context}` and `{input}` stand for parts of the example.
        max_new_tokens: Tokens of the answer.
        metric: None is classification, whose labels come with the data.
        chat: Whether a chat template is used if there is one.
        first_line: Only the first line of the answer counts.
    """

    template: str
    max_new_tokens: int
    metric: Metric | None
    chat: bool = True
    first_line: bool = False


_BRIEFLY = (
    "as concisely as you can, using a single phrase if possible. Do not provide any explanation."
)
_UNANSWERABLE = (
    "as concisely as you can, using a single phrase or sentence if possible. If the question "
    'cannot be answered based on the information in the article, write "unanswerable". If the '
    'question is a yes/no question, answer "yes", "no", or "unanswerable". Do not provide any '
    "explanation."
)
_ONLY_ANSWER = "Only give me the answer and do not output any other words."

_PASSAGES = (
    f"Answer the question based on the given passages. {_ONLY_ANSWER}\n\nThe following are given "
    "passages.\n{context}\n\n"
    f"Answer the question based on the given passages. {_ONLY_ANSWER}\n\n"
    "Question: {input}\nAnswer:"
)

LONGBENCH_TASKS: dict[str, LongBenchTask] = {
    "narrativeqa": LongBenchTask(
        "You are given a story, which can be either a novel or a movie script, and a question. "
        f"Answer the question {_BRIEFLY}\n\n"
        "Story: {context}\n\n"
        f"Now, answer the question based on the story {_BRIEFLY}\n\n"
        "Question: {input}\n\nAnswer:",
        128, qa_f1,
    ),
    "qasper": LongBenchTask(
        "You are given a scientific article and a question. "
        f"Answer the question {_UNANSWERABLE}\n\n"
        "Article: {context}\n\n"
        f" Answer the question based on the above article {_UNANSWERABLE}\n\n"
        "Question: {input}\n\nAnswer:",
        128, qa_f1,
    ),
    "multifieldqa_en": LongBenchTask(
        "Read the following text and answer briefly.\n\n{context}\n\nNow, answer the following "
        "question based on the above text, only give me the answer and do not output any other "
        "words.\n\nQuestion: {input}\nAnswer:",
        64, qa_f1,
    ),
    "hotpotqa": LongBenchTask(_PASSAGES, 32, qa_f1),
    "2wikimqa": LongBenchTask(_PASSAGES, 32, qa_f1),
    "musique": LongBenchTask(_PASSAGES, 32, qa_f1),
    "gov_report": LongBenchTask(
        "You are given a report by a government agency. Write a one-page summary of the report."
        "\n\nReport:\n{context}\n\nNow, write a one-page summary of the report.\n\nSummary:",
        512, rouge_l,
    ),
    "qmsum": LongBenchTask(
        "You are given a meeting transcript and a query containing a question or instruction. "
        "Answer the query in one or more sentences.\n\nTranscript:\n{context}\n\nNow, answer the "
        "query based on the above meeting transcript in one or more sentences.\n\nQuery: {input}\n"
        "Answer:",
        512, rouge_l,
    ),
    "multi_news": LongBenchTask(
        "You are given several news passages. Write a one-page summary of all news. \n\nNews:\n"
        "{context}\n\nNow, write a one-page summary of all the news.\n\nSummary:",
        512, rouge_l,
    ),
    "trec": LongBenchTask(
        "Please determine the type of the question below. Here are some examples of questions."
        "\n\n{context}\n{input}",
        64, None, chat=False, first_line=True,
    ),
    "triviaqa": LongBenchTask(
        f"Answer the question based on the given passage. {_ONLY_ANSWER} The following are some "
        "examples.\n\n{context}\n\n{input}",
        32, qa_f1, chat=False, first_line=True,
    ),
    "samsum": LongBenchTask(
        "Summarize the dialogue into a few short sentences. The following are some examples.\n\n"
        "{context}\n\n{input}",
        128, rouge_l, chat=False, first_line=True,
    ),
    "passage_count": LongBenchTask(
        "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. "
        "Please carefully read these paragraphs and determine how many unique paragraphs there are "
        "after removing duplicates. In other words, how many non-repeating paragraphs are there in "
        "total?\n\n{context}\n\nPlease enter the final count of unique paragraphs after removing "
        "duplicates. The output format should only contain the number, such as 1, 2, 3, and so on."
        "\n\nThe final answer is: ",
        32, count_share,
    ),
    "passage_retrieval_en": LongBenchTask(
        "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which "
        "paragraph the abstract is from.\n\n{context}\n\nThe following is an abstract.\n\n{input}"
        "\n\nPlease enter the number of the paragraph that the abstract is from. The answer format "
        "must be like \"Paragraph 1\", \"Paragraph 2\", etc.\n\nThe answer is: ",
        32, retrieval_share,
    ),
    "lcc": LongBenchTask(
        "Please complete the code given below. \n{context}Next line of code:\n",
        64, edit_similarity, chat=False,
    ),
    "repobench-p": LongBenchTask(
        "Please complete the code given below. \n{context}{input}Next line of code:\n",
        64, edit_similarity, chat=False,
    ),
}  # fmt: skip


def resolve_longbench(names: tuple[str, ...]) -> tuple[str, ...]:
    """Names of tasks, each once; none means all sixteen.

    Raises:
        LongBenchError: If a name is unknown.
    """
    for name in names:
        if name not in LONGBENCH_TASKS:
            raise LongBenchError(
                f"unknown LongBench task {name!r}; allowed are {', '.join(LONGBENCH_TASKS)}"
            )
    return tuple(dict.fromkeys(names)) or tuple(LONGBENCH_TASKS)
