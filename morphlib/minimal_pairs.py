"""Minimal pairs: two sentences that differ in one word, of which one is English. For models too small for public benchmarks.

`misspelled` takes a word of held-out text and changes one vowel of it: models of a hundred thousand parameters tell some of
these apart. `make` makes pairs of number agreement, which ask for grammar. Their levels go from a verb beside its subject to
nouns of the other number in between, in the manner of BLiMP (arXiv 1912.00582) and of BIG-bench's subject_verb_agreement
(arXiv 2206.04615); grammar and words (``data/agreement_words.csv``) are our own. Each draw of words gives two items, one with
a singular subject and one with a plural, so that a model which always prefers one number scores one half at every level.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import Any

import pandas as pd

from morphlib.errors import InputError

Item = dict[str, Any]
LEVELS = {  # N is the subject; M and O are nouns of the other number, and T a verb of M
    "simple": "The {N}",
    "modified": "The {A} {N} {D}",
    "one_distractor": "The {N} {P} the {M}",
    "two_distractors": "The {N} {P} the {M} {Q} the {O}",
    "relative_clause": "The {N} that the {M} {T}",
}
VOWELS = "aeiou"
LONGEST = 220  # characters of a sentence, so that the context of the smallest models holds it
MOST = 5000  # items: the simplest level has 1280 different ones


def misspelled(texts: Iterable[str], n: int, seed: int = 0) -> list[Item]:
    """``n`` items, or fewer where the texts have no more: how a sentence of the texts goes on, and the same with another vowel.

    The misspelled word is none that stands between two spaces in the texts. Of each sentence at most one word is taken, after
    the first four.
    """
    rng = random.Random(seed)
    sentences = [sentence.split() for text in texts for sentence in re.split(r"(?<=[.!?])\s+", text)]
    known = {word for words in sentences for word in words}
    rng.shuffle(sentences)
    items: list[Item] = []
    for words in sentences:
        places = [i for i in range(4, len(words)) if re.fullmatch("[a-z]{5,}", words[i])]
        if len(items) == n:
            break
        if not places or len(" ".join(words)) > LONGEST:
            continue
        at = rng.choice(places)
        right, vowels = words[at], [i for i, letter in enumerate(words[at]) if letter in VOWELS and i]
        if not vowels:
            continue
        i, gold = rng.choice(vowels), rng.randrange(2)
        wrong = right[:i] + rng.choice(VOWELS.replace(right[i], "")) + right[i + 1 :]
        if wrong not in known:
            choices = [" ".join([word, *words[at + 1 : at + 2]]) for word in (right, wrong)]
            items.append({"context": " ".join(words[:at]), "choices": choices[:: 1 - 2 * gold], "gold": gold})
    return items


def _words() -> dict[str, list[tuple[str, str, str]]]:
    """Singular, plural and what follows, by kind."""
    table = pd.read_csv(str(resources.files("morphlib") / "data/agreement_words.csv"), keep_default_na=False)
    return {str(kind): list(zip(of["singular"], of["plural"], of["rest"], strict=True)) for kind, of in table.groupby("kind")}


def make(n: int = 4000, seed: int = 0) -> list[Item]:
    """``n`` different items, the levels in turn: ``context``, ``choices``, ``gold`` and ``category``, the level.

    Raises ``InputError`` for a number that the levels and both numbers cannot share equally, and for more than ``MOST``.
    """
    if n < 1 or n % (2 * len(LEVELS)) or n > MOST:
        raise InputError(f"{n} minimal pairs cannot be made; give a multiple of {2 * len(LEVELS)} up to {MOST}")
    rng, words, used = random.Random(seed), _words(), set()
    items: list[Item] = []
    while len(items) < n:
        for level, pattern in LEVELS.items():
            pair: list[Item] = []
            while not pair:
                nouns, (p, q) = rng.sample(words["noun"], 3), rng.sample(words["preposition"], 2)
                verb, clause, a, d = (rng.choice(words[kind]) for kind in ("predicate", "transitive", "adjective", "adverb"))
                for number in (0, 1):
                    other = {"M": nouns[1][1 - number], "O": nouns[2][1 - number], "T": clause[1 - number]}
                    context = pattern.format(N=nouns[0][number], A=a[0], D=d[0], P=p[0], Q=q[0], **other)
                    choices = [f"{form} {verb[2]}." for form in verb[:2]]
                    pair.append({"context": context, "choices": choices, "gold": number, "category": level})
                if (pair[0]["context"], verb) in used:
                    pair = []
            used.add((pair[0]["context"], verb))
            items += pair
    return items


def _spelled(item: Item) -> tuple[str, ...]:
    """The words of the right sentence as far as the verb."""
    return (*item["context"].casefold().split(), item["choices"][item["gold"]].split()[0])


def unseen(items: Sequence[Item], texts: Iterable[str]) -> tuple[list[Item], list[str]]:
    """The items whose right sentence, as far as the verb, is nowhere in the texts; and the words that are nowhere there.

    Case and punctuation do not count.
    """
    wanted = {_spelled(item) for item in items}
    words = {
        word for item in items for text in (item["context"], *item["choices"]) for word in re.findall(r"\w+", text.casefold())
    }
    lengths, found, counts = {len(sentence) for sentence in wanted}, set(), Counter[str]()
    for text in texts:
        run: list[str] = []
        for word in [*re.findall(r"\w+", text.casefold()), ""]:
            if word in words:
                run.append(word)
                continue
            counts.update(run)
            for length in lengths if len(run) >= min(lengths) else ():
                found |= wanted & set(zip(*(run[i:] for i in range(length)), strict=False))
            run = []
    return [item for item in items if _spelled(item) not in found], sorted(words - set(counts))
