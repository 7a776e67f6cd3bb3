"""LongBench: data in all its forms, prompts that fit, metrics by hand, and a whole run."""

import importlib.util
import json
import sys
import types
import zipfile

import huggingface_hub
import pytest
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from echokv_vllm.cli import main as cli
from echokv_vllm.eval.longbench import (
    LONGBENCH_TASKS,
    Example,
    LongBenchError,
    load_longbench,
    longbench_prompts,
    resolve_longbench,
)
from echokv_vllm.eval.longbench import metrics as m

NEEDS_ROUGE = pytest.mark.skipif(
    not importlib.util.find_spec("rouge"), reason="package rouge is not there"
)
NEEDS_RAPIDFUZZ = pytest.mark.skipif(
    not importlib.util.find_spec("rapidfuzz"), reason="package rapidfuzz is not there"
)


def rows(task, count=3):
    return [
        {
            "input": f"question {index}?", "context": f"context {{input}} {index} " * 9,
            "answers": [f"answer {index}", "other"], "all_classes": None, "dataset": task,
        }
        for index in range(count)
    ]  # fmt: skip


def lines(task, count=3):
    return "".join(json.dumps(row) + "\n" for row in rows(task, count))


@pytest.fixture
def archive(tmp_path):
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as opened:
        for task in ("qasper", "hotpotqa"):
            opened.writestr(f"data/{task}.jsonl", lines(task))
    return tmp_path / "data.zip"


EXPECTED = tuple(
    Example(row["input"], row["context"], tuple(row["answers"])) for row in rows("qasper")
)


def test_examples_from_files(tmp_path, archive):
    flat, nested = tmp_path / "flat", tmp_path / "nested" / "data"
    for folder in (flat, nested):
        folder.mkdir(parents=True)
        (folder / "qasper.jsonl").write_text(lines("qasper"))
    for source in (flat, nested.parent, archive, tmp_path):
        assert load_longbench(str(source), "qasper") == EXPECTED


def test_examples_from_the_hub(archive, monkeypatch):
    asked = []

    def download(repo_id, filename, repo_type):
        asked.append((repo_id, filename, repo_type))
        if repo_id == "zai-org/LongBench":
            return str(archive)
        if repo_id == "some/tables":
            raise EntryNotFoundError("no data.zip")
        raise LocalEntryNotFoundError("no connection")

    def load_dataset(name, config, split):
        assert (name, config, split) == ("some/tables", "qasper", "test")
        return [
            {"question": row["input"], "context": row["context"], "answers": row["answers"]}
            for row in rows("qasper")
        ]

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert load_longbench("zai-org/LongBench", "qasper") == EXPECTED
    assert load_longbench("some/tables", "qasper") == EXPECTED
    assert asked[0] == ("zai-org/LongBench", "data.zip", "dataset")
    with pytest.raises(LongBenchError, match=r"no connection.*fetch data.zip"):
        load_longbench("some/other", "qasper")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(LongBenchError, match="pip install datasets"):
        load_longbench("some/tables", "qasper")


def test_bad_files_are_refused(tmp_path, archive):
    (tmp_path / "trec.jsonl").write_text('{"input": 3}\n')
    (tmp_path / "lcc.jsonl").write_text("\n")
    (tmp_path / "broken.zip").write_bytes(b"PK")
    for source, task, words in (
        (tmp_path, "trec", "not in the form"),
        (tmp_path, "lcc", "no example"),
        (archive, "samsum", "holds no samsum.jsonl"),
        (tmp_path / "broken.zip", "qasper", "damaged"),
        (tmp_path / "missing.zip", "qasper", "does not exist"),
    ):
        with pytest.raises(LongBenchError, match=words):
            load_longbench(str(source), task)
    (tmp_path / "empty").mkdir()
    with pytest.raises(LongBenchError, match=r"neither qasper.jsonl nor data.zip"):
        load_longbench(str(tmp_path / "empty"), "qasper")


def test_the_sixteen_tasks():
    assert len(LONGBENCH_TASKS) == 16 and resolve_longbench(()) == tuple(LONGBENCH_TASKS)
    no_chat = {name for name, rules in LONGBENCH_TASKS.items() if not rules.chat}
    assert no_chat == {"trec", "triviaqa", "samsum", "lcc", "repobench-p"}
    first_line = {name for name, rules in LONGBENCH_TASKS.items() if rules.first_line}
    assert first_line == {"trec", "triviaqa", "samsum"}
    for rules in LONGBENCH_TASKS.values():
        assert rules.template.count("{context}") == 1
    assert resolve_longbench(("lcc", "lcc")) == ("lcc",)
    with pytest.raises(LongBenchError, match="unknown LongBench task 'vcsum'; allowed are narr"):
        resolve_longbench(("vcsum",))


def test_prompts_hold_the_example_and_nothing_is_filled_into_its_text(subject):
    example = Example("what? {context}", "text {input} end", ("a",))
    (prompt,) = longbench_prompts("hotpotqa", [example], subject.tokenizer, 2000)
    assert "passages.\ntext {input} end\n\nAnswer" in prompt.text
    assert prompt.text.endswith("Question: what? {context}\nAnswer:")
    assert (prompt.max_new_tokens, prompt.references) == (32, ("a",)) and prompt.special_tokens


@pytest.mark.parametrize("chat", [False, True])
def test_a_long_prompt_loses_its_middle(subject, monkeypatch, chat):
    tokenizer = subject.tokenizer
    if chat:
        template = "<s>{% for m in messages %}[{{ m['content'] }}]{% endfor %}>"
        monkeypatch.setattr(tokenizer, "chat_template", template)
    context = "".join(f"{number:04d}" for number in range(600))
    example = Example("what?", context, ("a",))
    (prompt,) = longbench_prompts("qasper", [example], tokenizer, 1400)
    ids = tokenizer(prompt.text, add_special_tokens=prompt.special_tokens)["input_ids"]
    assert 1400 - 128 - 2 <= len(ids) <= 1400 - 128
    assert "Article: 000000010002" in prompt.text and "05980599\n\n" in prompt.text
    assert context not in prompt.text
    assert prompt.text.startswith("<s>[You are" if chat else "You are")
    assert prompt.text.endswith("Answer:]>" if chat else "Answer:")
    assert prompt.special_tokens is not chat
    if chat:
        (plain,) = longbench_prompts("qasper", [example], tokenizer, 1400, chat_template=False)
        assert plain.text.startswith("You are")
        (few_shot,) = longbench_prompts("triviaqa", [example], tokenizer, 1400)
        assert few_shot.text.startswith("Answer the question"), "no template on few-shot tasks"
    with pytest.raises(LongBenchError, match=r"'qasper' has no room .* raise"):
        longbench_prompts("qasper", [example], tokenizer, 500)


def test_a_long_input_is_cut_like_the_context(subject):
    """RepoBench's input is the file so far: the line to be completed stands at its end."""
    example = Example("".join(f"{number:04d}" for number in range(900)), "context", ("a",))
    (prompt,) = longbench_prompts("repobench-p", [example], subject.tokenizer, 1400)
    ids = subject.tokenizer(prompt.text)["input_ids"]
    assert 1400 - 64 - 2 <= len(ids) <= 1400 - 64
    assert prompt.text.startswith("Please complete the code given below. \ncontext00000001")
    assert prompt.text.endswith("08980899Next line of code:\n")


def test_a_model_that_thinks_is_asked_not_to(subject, monkeypatch):
    template = (
        "{% for m in messages %}<user>{{ m['content'] }}{% endfor %}<assistant>"
        "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    )
    monkeypatch.setattr(subject.tokenizer, "chat_template", template)
    (prompt,) = longbench_prompts("qasper", [EXPECTED[0]], subject.tokenizer, 2000)
    assert prompt.text.endswith("Answer:<assistant><think></think>")


def test_qa_f1():
    assert m.qa_f1("The Cat, sat!", ["a cat sat"]) == 1
    assert m.qa_f1("big cat", ["cat", "a dog"]) == pytest.approx(2 / 3)
    assert m.qa_f1("", ["cat"]) == 0
    assert m.qa_f1("cat cat", ["cat"]) == pytest.approx(2 / 3), "a word counts as often as it comes"


def test_counts_and_paragraphs():
    assert m.count_share("7, no: 8", ["8"]) == 0.5 and m.count_share("none", ["8"]) == 0
    assert m.retrieval_share("Paragraph 12", ["Paragraph 12"]) == 1
    assert m.retrieval_share("Paragraph 1 or 12", ["Paragraph 12"]) == 0.5
    assert m.retrieval_share("12", ["no number"]) == 0


def test_classification_shares_the_point_among_the_labels_named():
    score = m.classification(("City", "Country", "Other City", "Date"))
    assert score("City", ["City"]) == 1 and score("Date", ["City"]) == 0
    assert score("City or Date", ["City"]) == 0.5
    assert score("Other City", ["Other City"]) == 1, "its part `City` does not count as named"
    assert score("Other City", ["City"]) == 0.5


@NEEDS_ROUGE
def test_rouge_l():
    assert m.rouge_l("the cat sat", ["the cat sat"]) == pytest.approx(1)
    # Longest common subsequence "the sat": precision 2/2, recall 2/3.
    assert m.rouge_l("the sat", ["the cat sat"]) == pytest.approx(0.8)
    assert m.rouge_l("", ["x"]) == m.rouge_l(" . ", ["x"]) == 0
    endless = " ".join(f"word{number}" for number in range(1200))
    assert m.rouge_l(endless, ["x y", endless[::-1]]) == 0, "no full stop: as in LongBench"


@NEEDS_RAPIDFUZZ
def test_edit_similarity_of_the_first_line_of_code():
    assert m.edit_similarity("\n# comment\n```\nx = 1\ny", ["x = 1"]) == 1
    # 9 of 10 characters in common, twice, over 20
    assert m.edit_similarity("value = 1;", ["value = 2;"]) == 0.9
    assert m.edit_similarity("# only", ["x"]) == 0


def test_few_shot_answers_are_scored_by_their_first_line(subject):
    example = Example("q", "c", ("Date",), ("City", "Date"))
    (prompt,) = longbench_prompts("trec", [example], subject.tokenizer, 2000)
    assert prompt.score("\nDate\nCity") == 1 and prompt.score("City\nDate") == 0
    assert prompt.is_settled("\nDate\n") and not prompt.is_settled("\nDate")


def test_a_scorer_that_is_not_installed_is_named_before_the_work(subject, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    example = Example("q", "c", ("a",))
    for task, package in (("samsum", "rouge"), ("lcc", "rapidfuzz")):
        with pytest.raises(LongBenchError, match=rf"pip install {package}"):
            longbench_prompts(task, [example], subject.tokenizer, 2000)


def test_a_run_from_the_command_line(subject, archive, tmp_path):
    code = cli.main(
        ["eval", str(subject.model_folder), "--checkpoint", str(subject.checkpoint_folder),
         "--quiet", "--device", "cpu", "--longbench", str(archive), "--longbench-tasks",
         "hotpotqa,qasper", "--longbench-samples", "2", "--longbench-length", "1500",
         "--out", str(tmp_path / "out")]
    )  # fmt: skip
    assert code == 0
    report = json.loads((tmp_path / "out" / "eval.json").read_text())
    measures = [(row["measure"], row["samples"], row["length"]) for row in report["rows"]]
    assert measures == [
        ("LongBench hotpotqa", 2, 1500), ("LongBench qasper", 2, 1500),
        ("LongBench mean of 2 tasks", 4, 1500),
    ]  # fmt: skip
    assert all(row["full"] is not None for row in report["rows"])
    assert report["settings"]["LongBench"] == str(archive)
