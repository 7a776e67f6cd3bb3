"""Task prompts: they fit their length, hold their answers, and are scored as RULER does."""

import lzma
import random
import re
from collections import Counter

import pytest

from echokv_vllm import needle
from echokv_vllm.eval.tasks import (
    RULER_TASKS,
    TASKS,
    Material,
    TaskError,
    TaskPrompt,
    make_prompts,
    resolve_tasks,
    string_match_all,
    whole_words,
)
from echokv_vllm.eval.tasks.haystack import NOISE, load_essays, place

UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
FACT = re.compile(r"One of the special magic (\w+) for (\S+) is: (\S+)\.(?= |\n)")


def count_tokens(text):
    """A beginning-of-sequence token, then words, digits and marks, like the tiny model's."""
    return 1 + needle.estimate_tokens(text)


ESSAYS = tuple(f"Essay sentence number {index} says little." for index in range(50))
MATERIAL = Material(count_tokens, ESSAYS)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [1000, 3000])
def test_prompts_fit_and_hold_their_references(task, length):
    prompts = make_prompts(task, 3, length, MATERIAL, seed=4)
    for prompt in prompts:
        used = count_tokens(prompt.text) + prompt.max_new_tokens
        assert length - 60 <= used <= length
        assert len(set(prompt.references)) == len(prompt.references)
        for reference in prompt.references:
            assert reference in prompt.text
        assert prompt.score(" " + ", ".join(prompt.references)) == 1
        assert prompt.score("nothing of that kind") == 0
    assert prompts == make_prompts(task, 3, length, MATERIAL, seed=4)
    assert len({prompt.text for prompt in prompts}) == 3
    assert prompts[0].text != make_prompts(task, 1, length, MATERIAL, seed=5)[0].text


@pytest.mark.parametrize(
    ("task", "hay", "num_facts", "num_answers", "key", "value"),
    [
        ("niah_single_1", NOISE, 1, 1, "word", "number"),
        ("niah_single_2", "Essay", 1, 1, "word", "number"),
        ("niah_single_3", "Essay", 1, 1, "word", "uuid"),
        ("niah_multikey_1", "Essay", 4, 1, "word", "number"),
        ("niah_multikey_2", "One of", None, 1, "word", "number"),
        ("niah_multikey_3", "One of", None, 1, "uuid", "uuid"),
        ("niah_multivalue", "Essay", 4, 4, "word", "number"),
        ("niah_multiquery", "Essay", 4, 4, "word", "number"),
    ],
)
def test_needles(task, hay, num_facts, num_answers, key, value):
    (prompt,) = make_prompts(task, 1, 1200, MATERIAL)
    opening, body, question = prompt.text.split("\n")
    facts = [match.groups() for match in FACT.finditer(body + "\n")]
    assert len(facts) == num_facts if num_facts else len(facts) > 6
    if num_facts:
        assert hay in body
    values = [fact[2] for fact in facts]
    assert len(set(values)) == len(values)
    for kind, fact_key, fact_value in facts:
        assert bool(UUID.fullmatch(fact_key)) == (key == "uuid")
        assert bool(UUID.fullmatch(fact_value)) == (value == "uuid")
        assert value == "uuid" or re.fullmatch(r"\d{7}", fact_value)
        assert kind[:-1] in opening
    assert len(prompt.references) == num_answers
    by_value = {fact[2]: fact[1] for fact in facts}
    for reference in prompt.references:
        assert question.count(by_value[reference]) == 2
    plural = "are" if num_answers > 1 else "is"
    assert question.endswith(f"mentioned in the provided text {plural}")
    assert opening.startswith("Some" if num_answers > 1 else "A ")
    asked = {by_value[reference] for reference in prompt.references}
    assert len(asked) == (4 if task == "niah_multiquery" else 1)


def test_needle_places_are_spread_over_the_haystack():
    places = [
        prompt.text.index(prompt.references[0]) / len(prompt.text)
        for prompt in make_prompts("niah_single_2", 40, 1200, MATERIAL)
    ]
    assert min(places) < 0.2 and max(places) > 0.8


def test_place_keeps_order_and_depth():
    hay = ["a", "b", "c", "d"]
    assert place(hay, ["N", "M"], [1.0, 0.0]) == "M a b c d N"
    assert place(hay, ["N", "M"], [0.5, 0.5]) == "a b N M c d"
    assert place([], ["N"], [0.3]) == "N"


def test_variables_form_one_chain_in_reading_order():
    (prompt,) = make_prompts("vt", 1, 900, MATERIAL)
    links = re.findall(r"VAR (\w{5}) = (?:VAR )?(\w+)\.", prompt.text)
    assert [link[0] for link in links] == list(prompt.references) and len(links) == 5
    assert links[0][1] in prompt.text.rsplit("Question", 1)[1]
    assert all(link[1] == before[0] for link, before in zip(links[1:], links, strict=False))


def test_common_words_are_the_most_common():
    for length, often, seldom in ((8000, 30, 3), (1000, 10, 1), (500, 5, 1)):
        (prompt,) = make_prompts("cwe", 1, length, MATERIAL)
        listed = re.findall(r"(\d+)\. (\w+)", prompt.text.split("\n")[1])
        assert [int(number) for number, _ in listed] == list(range(1, len(listed) + 1))
        counts = Counter(word for _, word in listed)
        assert {word for word, count in counts.items() if count == often} == set(prompt.references)
        assert set(counts.values()) == {often, seldom}


def test_no_word_is_part_of_another():
    """A substring would count as an answer that was not given."""
    (prompt,) = make_prompts("cwe", 1, 60_000, MATERIAL)
    words = set(re.findall(r"\d+\. (\w+)", prompt.text.split("\n")[1]))
    assert len(words) > 2500
    for reference in prompt.references:
        assert [word for word in words if reference in word] == [reference]


def test_frequent_words_are_ranks_two_to_four():
    (prompt,) = make_prompts("fwe", 1, 1000, MATERIAL)
    text = prompt.text.split("\n")[0].split("coded words. ")[1]
    ranked = Counter(text.split()).most_common(5)
    assert ranked[0][0] == "...." and tuple(word for word, _ in ranked[1:4]) == prompt.references
    assert ranked[3][1] > ranked[4][1], "no tie for the last place"


def test_string_match_all_is_the_share_of_references_found():
    assert string_match_all("the ANSWERS are abc, def", ("ABC", "xyz", "Def", "1")) == 0.5
    prompt = TaskPrompt("needle", "", ("123",), 5, whole_words)
    assert [prompt.score(text) for text in (" 123.", " 1234", "5\n123")] == [1, 0, 0]
    assert not prompt.is_settled(" 123"), "a further digit would make it wrong"
    ruler = TaskPrompt("vt", "", ("AB", "CD"), 5)
    assert ruler.is_settled("CD, AB and so on") and not ruler.is_settled("AB")


def test_names_and_lengths_are_checked():
    assert resolve_tasks(("ruler", "vt", "needle")) == (*RULER_TASKS, "needle")
    assert len(RULER_TASKS) == 11
    with pytest.raises(TaskError, match=r"unknown task 'qa_3'; allowed are niah_single_1, .*ruler"):
        resolve_tasks(("vt", "qa_3"))
    for task in TASKS:
        with pytest.raises(TaskError, match=rf"task '{task}'.*raise"):
            make_prompts(task, 1, 60, MATERIAL)


def test_haystacks_from_a_file_and_generated(tmp_path):
    path = tmp_path / "essays.txt.xz"
    with lzma.open(path, "wt", encoding="utf-8") as file:
        file.write("One  sentence. Two!\nFour\x1eFive?  Six")
    sentences = load_essays(str(path))
    assert sentences == ("One sentence.", "Two!", "Four Five?", "Six")
    material = Material(count_tokens, sentences)
    drawn = material.essay_sentences(random.Random(3), 9)
    start = sentences.index(drawn[0])
    assert drawn == [sentences[(start + index) % 4] for index in range(9)]
    assert material.haystack_name == "essays"
    assert Material(count_tokens).haystack_name == "generated sentences"
    generated = Material(count_tokens).essay_sentences(random.Random(3), 9)
    assert len(generated) == 9 and generated[0][0].isupper()


def test_bad_essay_files_are_refused(tmp_path):
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.write_text(" \n")
    binary.write_bytes(b"\xff\xfe\x00")
    broken = tmp_path / "broken.txt.xz"
    broken.write_bytes(b"no archive")
    for path, words in (
        (empty, "no text"), (binary, "UTF-8"), (broken, "sound"), (tmp_path / "x", "not exist"),
    ):  # fmt: skip
        with pytest.raises(TaskError, match=words):
            load_essays(str(path))
