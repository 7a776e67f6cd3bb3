"""RULER's two QA tasks: SQuAD and HotpotQA in the forms of their releases and of the hub."""

import json
import re
import sys
import types

import pytest

from echokv_vllm import needle
from echokv_vllm.eval.options import EvalOptions
from echokv_vllm.eval.questions import available_qa, skipped_tasks
from echokv_vllm.eval.tasks import QA_TASKS, Material, TaskError, make_prompts, resolve_tasks
from echokv_vllm.eval.tasks.qa import load_hotpotqa, load_squad


def paragraph(article, number):
    return f"Paragraph {number} of {article}: " + f"word{number} " * 12


def squad_file():
    return {
        "data": [
            {
                "title": article,
                "paragraphs": [
                    {
                        "context": paragraph(article, number),
                        "qas": [
                            {"question": f"Q{article}{number}?", "is_impossible": False,
                             "answers": [{"text": f"word{number}"}, {"text": f"word{number}"},
                                         {"text": f"Paragraph {number}"}]},
                            {"question": "unanswerable", "is_impossible": True, "answers": []},
                        ],
                    }
                    for number in range(4)
                ],
            }
            for article in ("A", "B", "C")
        ]
    }  # fmt: skip


def squad_rows():
    for article in squad_file()["data"]:
        for part in article["paragraphs"]:
            for asked in part["qas"]:
                yield {
                    "title": article["title"], "context": part["context"],
                    "question": asked["question"],
                    "answers": {"text": [answer["text"] for answer in asked["answers"]]},
                }  # fmt: skip


def hotpotqa_file():
    return [
        {
            "question": f"Who is {number}?",
            "answer": f"Person {number}",
            "context": [[f"T{number}-{part}", [f"Person {number}. ", "x " * 20]]
                        for part in range(3)] + [["Shared", ["Everyone."]]],
        }
        for number in range(5)
    ]  # fmt: skip


def hotpotqa_rows():
    for row in hotpotqa_file():
        titles, sentences = zip(*row["context"], strict=True)
        yield {**row, "context": {"title": list(titles), "sentences": list(sentences)}}


def write(path, content):
    path.write_text(json.dumps(content))
    return str(path)


@pytest.fixture
def hub(monkeypatch):
    """A module `datasets` whose hub holds both data sets."""
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        if name not in ("rajpurkar/squad_v2", "hotpotqa/hotpot_qa"):
            raise ValueError(f"no dataset {name}")
        return list(squad_rows() if "squad" in name else hotpotqa_rows())

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return asked


def test_squad_from_a_file_and_from_the_hub(tmp_path, hub):
    data = load_squad(write(tmp_path / "dev-v2.0.json", squad_file()))
    assert len(data.documents) == 12 and len(data.questions) == 12
    question = data.questions[5]
    assert question.answers == ("word1", "Paragraph 1") and question.text == "QB1?"
    assert [data.documents[index] for index in question.holding] == [paragraph("B", 1)]
    near = {data.documents[index] for index in question.near}
    assert near == {paragraph("B", number) for number in (0, 2, 3)}
    assert load_squad("rajpurkar/squad_v2") == data
    assert hub == [("rajpurkar/squad_v2", None, "validation")]


def test_hotpotqa_from_a_file_and_from_the_hub(tmp_path, hub):
    data = load_hotpotqa(write(tmp_path / "hotpot.json", hotpotqa_file()))
    assert len(data.documents) == 16 and len(data.questions) == 5
    question = data.questions[2]
    assert question.answers == ("Person 2",) and len(question.holding) == 4
    assert data.documents[question.holding[0]] == "T2-0\nPerson 2. " + "x " * 20
    assert load_hotpotqa("hotpotqa/hotpot_qa:distractor") == data
    assert hub == [("hotpotqa/hotpot_qa", "distractor", "validation")]


def count_tokens(text):
    return 1 + needle.estimate_tokens(text)


@pytest.mark.parametrize("length", [400, 600])
def test_prompts_fit_hold_the_answer_and_fill_up_with_other_documents(tmp_path, length):
    data = {
        "qa_1": load_squad(write(tmp_path / "s.json", squad_file())),
        "qa_2": load_hotpotqa(write(tmp_path / "h.json", hotpotqa_file())),
    }
    material = Material(count_tokens, qa=data)
    for task in QA_TASKS:
        prompts = make_prompts(task, 4, length, material, seed=1)
        assert prompts == make_prompts(task, 4, length, material, seed=1)
        assert len({prompt.text.rsplit("Question: ", 1)[1] for prompt in prompts}) == 4
        for prompt in prompts:
            assert length - 80 <= count_tokens(prompt.text) + 32 <= length
            assert any(answer in prompt.text for answer in prompt.references)
            numbers = re.findall(r"^Document (\d+):$", prompt.text, re.M)
            assert numbers == [str(1 + index) for index in range(len(numbers))] and len(numbers) > 3
            assert prompt.text.endswith("? Answer:")
            assert prompt.score(f"it is {prompt.references[0].lower()}!") == 1
            assert prompt.score("unknown") == 0


def test_few_documents_end_before_a_long_prompt_does(tmp_path):
    data = load_squad(write(tmp_path / "s.json", squad_file()))
    material = Material(count_tokens, qa={"qa_1": data})
    (prompt,) = make_prompts("qa_1", 1, 100_000, material)
    assert prompt.text.count("Document ") == 12
    assert len(make_prompts("qa_1", 20, 2000, material)) == 20, "questions start over"
    with pytest.raises(TaskError, match=r"'qa_1' needs at least \d+ prompt tokens"):
        make_prompts("qa_1", 1, 100, material)


def test_ruler_leaves_out_what_has_no_data():
    options = EvalOptions("m", tasks=("ruler",), squad="dev.json")
    assert available_qa(options) == ("qa_1",)
    assert resolve_tasks(("ruler",), available_qa(options))[-1] == "qa_1"
    (skipped,) = skipped_tasks(options).items()
    assert skipped[0] == "qa_2" and "--hotpotqa" in skipped[1]
    assert skipped_tasks(EvalOptions("m", tasks=("vt",))) == {}
    with pytest.raises(TaskError, match=r"'qa_2' needs data .* --hotpotqa"):
        resolve_tasks(("qa_2",), ("qa_1",))


def test_bad_data_is_refused(tmp_path, hub, monkeypatch):
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    for source, words in (
        (str(broken), "not in the form"),
        (write(tmp_path / "list.json", [1]), "not in the form"),
        (write(tmp_path / "none.json", {"data": []}), "no answerable question"),
        (str(tmp_path / "missing.json"), "does not exist"),
        ("nobody/nothing", "could not be read from the Hugging Face hub"),
    ):
        with pytest.raises(TaskError, match=words):
            load_squad(source)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TaskError, match="pip install datasets"):
        load_squad("rajpurkar/squad_v2")
