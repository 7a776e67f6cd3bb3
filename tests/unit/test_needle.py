"""The needle generator: reproducible, one answer per context, spread depths, lengths as asked."""

import random
import re

import pytest

from echokv_vllm import needle as nd


def prompts_of_all_kinds():
    return [
        nd.make_prompt(length, num_needles, seed, kind=kind)
        for length, num_needles in ((200, 1), (400, 4), (1000, 16), (2000, 40))
        for kind in (*nd.KINDS, "mixed")
        for seed in range(5)
    ]


def context_of(prompt):
    """The prompt without its question."""
    assert prompt.text.endswith(prompt.needle.question)
    return prompt.text[: -len(prompt.needle.question)]


def test_same_seed_same_prompt_and_other_seed_other_prompt():
    assert nd.make_prompt(500, 4, 7) == nd.make_prompt(500, 4, 7)
    texts = {nd.make_prompt(500, 4, seed).text for seed in range(50)}
    assert len(texts) == 50


def test_text_is_pinned():
    # The committed tiny model was trained on this wording: a change here needs new weights.
    prompt = nd.make_prompt(60, 1, 0, kind="number", depth=0.0)
    value = prompt.answer
    assert re.fullmatch(r"\d{6}", value)
    key = prompt.needle.key
    assert prompt.text.startswith(
        f"Remember the secrets hidden in this text. The secret number of {key} is {value}."
    )
    assert prompt.text.endswith(
        f".\nQuestion: What is the secret number of {key}?\nAnswer: The secret number of {key} is"
    )


def test_answer_and_key_stand_once_in_the_context():
    for prompt in prompts_of_all_kinds():
        context = context_of(prompt)
        assert context.count(prompt.answer) == 1, prompt
        assert len(re.findall(rf"\b{prompt.needle.key}\b", context)) == 1, prompt
        for needle in prompt.needles:
            assert context.count(needle.sentence) == 1, needle


def test_keys_and_values_of_one_prompt_are_distinct():
    for prompt in prompts_of_all_kinds():
        num_needles = len(prompt.needles)
        assert prompt.needle in prompt.needles
        assert len({needle.key for needle in prompt.needles}) == num_needles
        assert len({needle.value for needle in prompt.needles}) == num_needles


def test_needles_are_listed_in_the_order_of_the_text():
    for prompt in prompts_of_all_kinds():
        places = [prompt.text.index(needle.sentence) for needle in prompt.needles]
        assert places == sorted(places)


def test_kind_is_kept():
    words = nd.make_prompt(1000, 8, 1, kind="word")
    assert all(needle.value in nd.VALUE_WORDS for needle in words.needles)
    numbers = nd.make_prompt(1000, 8, 1, kind="number", value_digits=4)
    assert all(re.fullmatch(r"[1-9]\d{3}", needle.value) for needle in numbers.needles)
    mixed = nd.make_prompt(2000, 40, 1)
    assert {needle.kind for needle in mixed.needles} == set(nd.KINDS)


def test_haystack_never_holds_key_words_value_words_or_long_numbers():
    rng = random.Random(0)
    hay = "".join(nd.haystack_sentence(rng) for _ in range(5000))
    words = set(re.findall(r"\w+", hay))
    assert not words & {*nd.VALUE_WORDS, *nd.KEY_ADJECTIVES, *nd.KEY_NOUNS}
    assert not re.search(rf"\d{{{nd.MIN_VALUE_DIGITS},}}", hay)


def test_no_value_word_hides_in_other_text():
    # "Exactly once" is meant as a string: "ember" would also be found in "Remember".
    rng = random.Random(1)
    frame = nd.INTRO + nd.NEEDLE_TEMPLATE + nd.QUESTION_TEMPLATE + nd.ANSWER_TEMPLATE
    others = "".join(nd.haystack_sentence(rng) for _ in range(5000)) + frame
    others += " ".join((*nd.KEY_ADJECTIVES, *nd.KEY_NOUNS))
    assert not [word for word in nd.VALUE_WORDS if word in others.lower()]
    joined = " ".join(nd.VALUE_WORDS)
    assert not [word for word in nd.VALUE_WORDS if joined.count(word) != 1]


def test_haystack_is_no_loop():
    rng = random.Random(0)
    sentences = [nd.haystack_sentence(rng) for _ in range(1000)]
    assert len(set(sentences)) > 900


@pytest.mark.parametrize("target_len", [150, 1024, 2048])
def test_length_is_close_below_the_target(target_len):
    for seed in range(10):
        prompt = nd.make_prompt(target_len, 4, seed)
        # Short by less than the sentence that did not fit any more.
        assert target_len - 25 < nd.estimate_tokens(prompt.text) <= target_len
        assert prompt.target_len == target_len


def test_length_follows_the_given_tokenizer():
    prompt = nd.make_prompt(3000, 4, 0, count_tokens=len)
    assert 3000 - 120 < len(prompt.text) <= 3000


def test_random_depths_are_spread_and_true():
    prompts = [nd.make_prompt(1000, 4, seed) for seed in range(300)]
    for third in range(3):
        inside = [p for p in prompts if third / 3 <= p.depth <= (third + 1) / 3]
        assert len(inside) > 60
    for prompt in prompts:
        context = context_of(prompt)
        assert abs(context.index(prompt.needle.sentence) / len(context) - prompt.depth) < 0.15


def test_depth_can_be_chosen():
    first = nd.make_prompt(600, 8, 3, depth=0.0)
    last = nd.make_prompt(600, 8, 3, depth=1.0)
    assert first.text.startswith(nd.INTRO + first.needle.sentence)
    assert context_of(last).endswith(last.needle.sentence)


def test_prompt_set_cycles_counts_and_sets_are_disjoint():
    prompts = nd.make_prompts(8, 500, (1, 4), seed=2)
    assert [len(p.needles) for p in prompts] == [1, 4] * 4
    other = nd.make_prompts(8, 500, (1, 4), seed=3)
    assert not {p.text for p in prompts} & {p.text for p in other}


@pytest.mark.parametrize(
    ("output", "correct"),
    [
        (" 481273.", True),
        ("481273", True),
        ("\n 481273.\nQuestion: ...", True),
        (" the number 481273, I think", True),
        (" 4812734.", False),
        (" 1481273.", False),
        (" 48127.", False),
        (" 111111.\nAnswer: 481273", False),
        ("", False),
    ],
)
def test_scoring_takes_the_whole_value_in_the_first_line(output, correct):
    assert nd.contains_answer(output, "481273") is correct


def test_word_answers_are_whole_words():
    assert nd.contains_answer(" olive.", "olive")
    assert not nd.contains_answer(" olives.", "olive")


def test_accuracy():
    prompts = nd.make_prompts(4, 300, (2,))
    outputs = [f" {p.answer}." for p in prompts]
    assert nd.accuracy(outputs, prompts) == 1.0
    assert nd.accuracy([*outputs[:3], " nothing"], prompts) == 0.75
    assert nd.accuracy(outputs[1:] + outputs[:1], prompts) == 0.0
    with pytest.raises(ValueError, match="3 outputs and 4 prompts"):
        nd.accuracy(outputs[:3], prompts)
    with pytest.raises(ValueError, match="at least one prompt"):
        nd.accuracy([], [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_len": 50, "num_needles": 8}, "too short for 8 needles"),
        ({"target_len": 500, "num_needles": 0}, "num_needles=0"),
        ({"target_len": 5000, "num_needles": 51, "kind": "word"}, "num_needles=51 must be 1 to 50"),
        ({"target_len": 500, "kind": "letter"}, "kind='letter'"),
        ({"target_len": 500, "depth": 1.5}, "depth=1.5"),
        ({"target_len": 500, "value_digits": 3}, "value_digits=3"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        nd.make_prompt(**options)


def test_empty_needle_counts_are_refused():
    with pytest.raises(ValueError, match="num_needles is empty"):
        nd.make_prompts(2, 500, ())
