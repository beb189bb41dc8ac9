"""Documents that hide facts in filler text and ask for them later: what the tiny model learns and
is tested on.

A document is a run of sentences of a small grammar. Most are filler ("the patient librarian copied
the maps ."), some state a fact ("note : belen 217 .") and some ask for one stated earlier ("recall
: belen 217 ."). Which name gets which value is drawn anew for each document, so only the document
itself can answer a question. Every word is one token; the id of a word is its index in
`VOCABULARY` (`IDS`); those of its sentences' topics are in topics.txt.

Training:  tests/train_tiny_model.py  (`write_document`)
Tests:     `make_recall_contexts`, `make_recall_prompts`  (text; the same for the same seed)
"""

import random
from dataclasses import dataclass
from pathlib import Path

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
PAD, BOS, EOS, UNK = range(4)

NAMES = tuple(
    first + last
    for first in "al be ca do el fi ga ha jo ka lu ma ne or pa ru".split()
    for last in "ba bo da den la len ma mo na nor ra ric sa ta vin wyn".split()
)
VALUES = tuple(str(number) for number in range(100, 356))

_TIMES = {
    "DAY": "morning evening night day week summer".split(),
    "HOUR": "noon dawn dusk midnight sunrise sunset".split(),
}
_CLASSES = ("PERSON", "ADJECTIVE", "VERB", "OBJECT", "PLACE")
_TOPICS = [  # a line a class; neighbouring sentences mostly share their topic
    dict(zip(_CLASSES, (line.split() for line in topic.splitlines()), strict=True))
    for topic in Path(__file__).with_name("topics.txt").read_text().split("\n\n")
]
_FILLER = (
    "the ADJECTIVE PERSON VERB the OBJECT .",
    "one PERSON VERB ADJECTIVE OBJECT by the PLACE .",
    "near the PLACE , the PERSON VERB the OBJECT .",
    "every DAY the PERSON walked to the PLACE .",
    "the OBJECT by the PLACE were ADJECTIVE .",
    "the PERSON and the PERSON VERB ADJECTIVE OBJECT at HOUR .",
    "at HOUR the PLACE was ADJECTIVE and ADJECTIVE .",
    "nobody near the PLACE VERB the OBJECT .",
)
_PLAIN = [word for word in " ".join(_FILLER).split() if word not in (*_CLASSES, *_TIMES)]
_CHOSEN = [word for topic in (_TIMES, *_TOPICS) for words in topic.values() for word in words]
_WORDS = (*SPECIAL, *NAMES, *VALUES, *_PLAIN, "note", ":", "recall", *_CHOSEN)
VOCABULARY = tuple(dict.fromkeys(_WORDS))
IDS = {word: i for i, word in enumerate(VOCABULARY)}


def write_document(rng: random.Random, length: int, facts: int, ask: bool = True) -> list[str]:
    """`length` words that state so many facts, at most 256 and length / 20; a few late ones may
    fall off the end. ask: follow each fact by one question about it. In half of the documents it
    comes anywhere later, in the other half after all facts, in another order than these."""
    spots = rng.sample(range(length // 8 + 1), facts * (1 + ask))  # among the sentences
    early, late = spots[:facts], spots[facts:]
    if ask and rng.random() < 0.5:
        spots.sort()
        early, late = rng.sample(spots[:facts], facts), spots[facts:]
    elif ask:
        pairs = [sorted(pair) for pair in zip(early, late, strict=True)]
        early, late = [a for a, _ in pairs], [b for _, b in pairs]
    names, values = rng.sample(NAMES, facts), rng.choices(VALUES, k=facts)
    given = {spot: f"note : {x} {y} ." for spot, x, y in zip(early, names, values, strict=True)}
    for spot, x, y in zip(late, names, values, strict=ask):
        given[spot] = f"recall : {x} {y} ."
    words: list[str] = []
    number, topic = 0, rng.choice(_TOPICS)
    while len(words) < length:
        if rng.random() < 0.25:
            topic = rng.choice(_TOPICS)
        if number in given:
            words += given[number].split()
        else:
            choices = _TIMES | topic
            words += [rng.choice(choices.get(x, (x,))) for x in rng.choice(_FILLER).split()]
        number += 1
    return words[:length]


@dataclass(frozen=True)
class RecallQuestion:
    """What continues a context, and the answer."""

    text: str  # after a space
    answer: str  # the one word that should follow
    distance: int  # tokens that it lies behind the place where the context states it


@dataclass(frozen=True)
class RecallContext:
    """A text that states facts: prefill once, ask many."""

    text: str
    questions: tuple[RecallQuestion, ...]  # each continues the text on its own


def make_recall_contexts(
    n: int, questions: int, *, distance: tuple[int, int] = (2000, 4000), seed: int = 0
) -> list[RecallContext]:
    """Make n contexts, each with `questions` different questions whose answers lie within
    `distance` tokens: least and most between the statement of a fact and the answer. A context is a
    little longer than the most, and states a fact in about 40 tokens, or more where the questions
    need them. ValueError: so many questions do not fit into that range of distances."""
    near, far = distance
    length, rng = far + 22, random.Random(seed)
    facts = max(length // 40, 1 + 3 * questions * length // (2 * max(far - near, 1)))
    facts = min(facts, length // 20, len(NAMES))
    contexts = []
    for _ in range(n):
        words = write_document(rng, length, facts, ask=False)
        while words[-1] != ".":
            words.pop()
        end = len(words) + len("recall : NAME".split())  # where an answer is
        stated = [i for i, word in enumerate(words) if word.isdigit() and near <= end - i <= far]
        if questions > (most := len(stated)):
            raise ValueError(f"questions: expected at most {most} for {distance}, got {questions}")
        chosen = rng.sample(stated, questions)
        asked = (RecallQuestion(f"recall : {words[i - 1]}", words[i], end - i) for i in chosen)
        contexts.append(RecallContext(" ".join(words), tuple(asked)))
    return contexts


def make_recall_prompts(
    n: int, *, distance: tuple[int, int] = (2000, 4000), seed: int = 0
) -> list[tuple[str, str]]:
    """n prompts, each a context of its own that ends in a question, and the words that answer."""
    contexts = make_recall_contexts(n, 1, distance=distance, seed=seed)
    return [(f"{x.text} {x.questions[0].text}", x.questions[0].answer) for x in contexts]
