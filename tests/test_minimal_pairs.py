import random
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from morphlib import minimal_pairs
from morphlib.errors import InputError
from morphlib.minimal_pairs import LEVELS, make, misspelled, unseen

ITEMS = make(2000)
NUMBER = {form: number for noun in minimal_pairs._words()["noun"] for number, form in enumerate(noun[:2])}


def test_levels_and_numbers_are_balanced_and_no_sentence_comes_twice():
    for n, seed in ((10, 0), (2000, 0), (2000, 7), (5000, 1)):
        items = make(n, seed)
        assert len({(item["context"], *item["choices"]) for item in items}) == len(items) == n
        assert set(Counter((item["category"], item["gold"]) for item in items).values()) == {n // (2 * len(LEVELS))}
        assert {item["category"] for item in items[:10]} == set(LEVELS)


def test_the_seed_decides():
    assert make(100, 3) == make(100, 3) != make(100, 4)


def test_the_two_sentences_differ_in_the_verb_alone():
    for item in ITEMS:
        right, wrong = (f"{item['context']} {choice}".split() for choice in item["choices"])
        assert [a == b for a, b in zip(right, wrong, strict=True)].count(False) == 1


def test_the_verb_agrees_with_the_first_noun_and_the_others_have_the_other_number():
    n_others = {"simple": 0, "modified": 0, "one_distractor": 1, "two_distractors": 2, "relative_clause": 1}
    for item in ITEMS:
        subject, *others = (NUMBER[word] for word in item["context"].split() if word in NUMBER)
        assert item["gold"] == subject
        assert others == [1 - subject] * n_others[item["category"]]


def test_the_sentences_are_what_they_look_like():
    item = next(item for item in ITEMS if item["category"] == "relative_clause" and item["gold"] == 0)
    words = item["context"].split()
    clause = {verb[1] for verb in minimal_pairs._words()["transitive"]}
    assert words[0] == "The" and words[2:4] == ["that", "the"] and words[-1] in clause


@pytest.mark.parametrize("n", [0, -10, 7, 2005, 5010])
def test_a_number_that_cannot_be_shared_is_refused(n):
    with pytest.raises(InputError, match="multiple of 10"):
        make(n)


@given(st.sets(st.integers(0, len(ITEMS) - 1), max_size=5), st.sampled_from([str.upper, str.title, lambda text: f"«{text}»,"]))
def test_what_the_training_text_has_is_left_out(planted, written):
    texts = [
        f"They say: {written(ITEMS[i]['context'] + ' ' + ITEMS[i]['choices'][ITEMS[i]['gold']])} So it goes." for i in planted
    ]
    kept, _ = unseen(ITEMS, texts)
    left_out = {" ".join(minimal_pairs._spelled(ITEMS[i])) for i in planted}
    assert [item for item in ITEMS if " ".join(minimal_pairs._spelled(item)) not in left_out] == kept


def test_words_that_the_text_does_not_have_are_named():
    kept, strange = unseen(ITEMS[:10], ["The kings, the king; is are."])
    assert len(kept) == 10 and "king" not in strange and "that" in strange
    assert unseen(ITEMS[:10], [])[0] == ITEMS[:10]


SPELT = ["bander", "binder", "bonder", "castle", "garden", "orange", "winter"]


def made_up_texts():
    """Ten texts of twenty sentences; three of the words differ in one vowel."""
    rng = random.Random(0)
    sentence = lambda: " ".join(rng.choice([*SPELT, "to", "of", "it"]) for _ in range(10)) + "."  # noqa: E731
    return [" ".join(sentence() for _ in range(20)) for _ in range(10)]


def test_a_misspelled_word_is_unknown_and_differs_in_one_vowel_but_the_first_letter():
    texts = made_up_texts()
    sentences = [sentence for text in texts for sentence in re.split(r"(?<=\.) ", text)]
    with_long = [*texts, *["of it to it " + 40 * "garden " + "end."] * 100]
    items = misspelled(with_long, 100)
    assert len(items) == 100 and items == misspelled(with_long, 100)
    taken = set()
    for item in items:
        right, wrong = item["choices"][item["gold"]].split(), item["choices"][1 - item["gold"]].split()
        assert right[1:] == wrong[1:] and len(right) == 2 and right[0] in SPELT and wrong[0] not in SPELT
        (place,) = [i for i, (a, b) in enumerate(zip(right[0], wrong[0], strict=True)) if a != b]
        assert place > 0 and {right[0][place], wrong[0][place]} <= set(minimal_pairs.VOWELS)
        assert len(item["context"].split()) >= 4
        begun = [i for i, sentence in enumerate(sentences) if sentence.startswith(f"{item['context']} {' '.join(right)}")]
        assert begun  # the long sentences are none of them
        taken.add(begun[0])
    # each sentence once, of all texts, and either answer as often: four standard deviations of a hundred throws
    assert len(taken) > 95 and max(taken) > 150 and abs(sum(item["gold"] for item in items) - 50) <= 20
    assert len(misspelled(texts, 10_000)) <= len(sentences)


def test_words_at_the_edge_of_what_a_text_has_are_found():
    items = minimal_pairs.make(10)
    words = [minimal_pairs._spelled(item) for item in items]
    for planted in words:  # nothing but the sentence, as far as the verb
        kept, strange = minimal_pairs.unseen(items, [" ".join(planted)])
        assert kept == [item for item, spelled in zip(items, words, strict=True) if spelled != planted]
        assert not set(strange) & set(planted)
