"""Documents that hide facts in filler text and ask for them later: what the tiny model learns and
is tested on.

A document is a run of sentences of a small grammar. Most are filler ("the patient librarian copied
the maps ."), some state a fact ("note : belen 217 .") and some ask for one stated earlier ("recall
: belen 217 ."). Which name gets which value is drawn anew for each document, so only the document
itself can answer a question. Every word is one token; the id of a word is its index in
`VOCABULARY`.

Training:  perf/tiny_model/train.py  (`sample_documents`, on the GPU)
Tests:     `make_recall_contexts`, `make_recall_prompts`  (text; the same for the same seed)
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
PAD, BOS, EOS, UNK = range(4)

NAMES = tuple(
    first + last
    for first in "al be ca do el fi ga ha jo ka lu ma ne or pa ru".split()
    for last in "ba bo da den la len ma mo na nor ra ric sa ta vin wyn".split()
)
VALUES = tuple(str(number) for number in range(100, 356))

_CLASSES = ("PERSON", "ADJECTIVE", "VERB", "OBJECT", "PLACE", "DAY", "HOUR")
_DAYS, _HOURS = "morning evening night day week summer", "noon dawn dusk midnight sunrise sunset"
# One row a topic, one column a class; neighbouring sentences mostly share their topic.
_TOPICS = (
    (
        "farmer shepherd miller gardener beekeeper dairymaid",
        "muddy golden ripe wooden sunny dusty",
        "planted watered gathered carried fed counted",
        "apples sheep pumpkins hens turnips sunflowers",
        "field barn orchard meadow stable mill",
    ),
    (
        "sailor captain fisherman pilot diver admiral",
        "salty stormy silver wet deep calm",
        "hauled steered mended caught painted anchored",
        "nets sails oars ropes lanterns barrels",
        "harbour pier island lighthouse beach reef",
    ),
    (
        "teacher pupil librarian scholar headmaster student",
        "clever careful curious patient quiet neat",
        "read copied explained studied wrote corrected",
        "books letters maps poems lessons riddles",
        "classroom library hall courtyard museum academy",
    ),
    (
        "cook baker waiter butcher grocer innkeeper",
        "warm sweet spicy fresh crisp hungry",
        "baked tasted stirred served sliced cooled",
        "loaves soups pies cakes onions dumplings",
        "kitchen tavern cellar pantry bakery inn",
    ),
    (
        "hunter ranger woodcutter hermit trapper wanderer",
        "green mossy shady wild ancient tall",
        "followed tracked chopped found hid watched",
        "foxes owls logs mushrooms footprints badgers",
        "forest clearing cave valley cabin stream",
    ),
    (
        "mayor merchant driver porter watchman banker",
        "busy narrow crowded noisy bright famous",
        "sold bought crossed opened guarded rented",
        "wagons coins houses carpets windows bridges",
        "market square station tower avenue gate",
    ),
    (
        "singer drummer fiddler dancer composer piper",
        "gentle loud merry slow cheerful solemn",
        "played sang hummed practised tuned rehearsed",
        "songs drums flutes waltzes tunes violins",
        "theatre stage ballroom garden festival chapel",
    ),
    (
        "smith carpenter potter weaver tailor clockmaker",
        "sharp heavy polished iron broken tiny",
        "repaired forged carved sewed sharpened measured",
        "clocks hammers chairs pots coats locks",
        "workshop forge shed attic loft yard",
    ),
)
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
_FACT = "note : NAME VALUE ."
_QUESTION = "recall : NAME"
_TEMPLATES = tuple(text.split() for text in (*_FILLER, _FACT, f"{_QUESTION} VALUE ."))
_FACT_ID, _QUESTION_ID = len(_FILLER), len(_FILLER) + 1
_LONGEST = max(map(len, _TEMPLATES))


def _vocabulary() -> tuple[str, ...]:
    literals = [
        w for template in _TEMPLATES for w in template if w not in (*_CLASSES, "NAME", "VALUE")
    ]
    classes = [word for topic in _TOPICS for words in topic for word in words.split()]
    return tuple(
        dict.fromkeys(
            (*SPECIAL, *NAMES, *VALUES, *literals, *_DAYS.split(), *_HOURS.split(), *classes)
        )
    )


VOCABULARY = _vocabulary()
_ID = {word: index for index, word in enumerate(VOCABULARY)}

# What a token is to the trainer: it follows the grammar, nothing foretells it, the document tells
# it, it is padding.
FILLER, RANDOM, ANSWER, PADDING = range(4)


class Documents(NamedTuple):
    """A batch of documents; all int64 [rows, length].

    tokens:    ids, <s> first.
    kinds:     FILLER, RANDOM (names, and values where they are stated), ANSWER or PADDING.
    distances: at an answer, how many tokens back the document states it; elsewhere 0.
    """

    tokens: Tensor
    kinds: Tensor
    distances: Tensor


def _tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Words [slot, topic, choice], and for each template its slots and kinds [template, place].

    A slot is a class (the topic and chance choose among its words), NAME, VALUE or a literal word.
    """
    slots = [
        "",
        *_CLASSES,
        "NAME",
        "VALUE",
        *dict.fromkeys(w for t in _TEMPLATES for w in t if w in _ID),
    ]
    columns = {
        name: [(*topic, _DAYS, _HOURS)[i].split() for topic in _TOPICS]
        for i, name in enumerate(_CLASSES)
    }
    words = [
        [[_ID[w] for w in topic] for topic in columns[slot]]
        if slot in columns
        else [[_ID.get(slot, PAD)] * 6] * 8
        for slot in slots
    ]
    places, kinds = [], []
    for number, template in enumerate(_TEMPLATES):
        fill = _LONGEST - len(template)
        value = ANSWER if number == _QUESTION_ID else RANDOM
        places.append([slots.index(word) for word in template] + [0] * fill)
        kinds.append(
            [{"NAME": RANDOM, "VALUE": value}.get(word, FILLER) for word in template]
            + [PADDING] * fill
        )
    return tuple(torch.tensor(table, device=device) for table in (words, places, kinds))  # type: ignore[return-value]


def sample_documents(
    rows: int, length: int, generator: torch.Generator, *, facts: tuple[int, int], ask: bool = True
) -> Documents:
    """Draw documents of `length` tokens on the generator's device.

    Args:
        facts: the least and the most facts a document may state, the most being at most 256 and
            length / 20. A few late ones may fall off the end.
        ask: follow each fact by one question about it. In half of the documents it comes anywhere
            later, in the other half all facts come first and the questions after them, in another
            order.
    """
    device = generator.device
    words, places, template_kinds = _tables(device)
    lengths = torch.tensor([len(template) for template in _TEMPLATES], device=device)
    sentences, most = length // 8 + 1, facts[1]
    if not 0 < facts[0] <= most <= min(len(NAMES), sentences // 2):
        raise ValueError(
            f"facts: expected 0 < least <= most <= {min(len(NAMES), sentences // 2)}, got {facts}"
        )

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator, device=device)

    def permutations(n: int) -> Tensor:
        return torch.rand(rows, n, generator=generator, device=device).argsort(1)

    # Sentences: filler everywhere, a topic that lasts a while, then facts and questions over some
    # of them.
    places_in_text = torch.arange(sentences, device=device).expand(rows, -1)
    last_change = torch.where(integers(4, rows, sentences) == 0, places_in_text, 0).cummax(1).values
    topic = integers(len(_TOPICS), rows, sentences).gather(1, last_change)  # [rows, sentences]

    spots = permutations(sentences)[:, : 2 * most]
    early, late = spots[:, :most], spots[:, most:]
    if ask:
        ordered = spots.sort(1).values
        first_half = ordered[:, :most].gather(1, permutations(most))
        facts_first = integers(2, rows, 1) == 0
        early, late = (
            torch.where(facts_first, first_half, torch.minimum(early, late)),
            torch.where(facts_first, ordered[:, most:], torch.maximum(early, late)),
        )
    count = facts[0] + integers(facts[1] - facts[0] + 1, rows, 1)
    dropped = torch.arange(most, device=device) >= count  # [rows, most]
    early, late = (
        early.masked_fill(dropped, sentences),
        late.masked_fill(dropped | (not ask), sentences),
    )
    template = integers(len(_FILLER), rows, sentences + 1)  # the last column takes what is dropped
    template.scatter_(1, early, _FACT_ID).scatter_(1, late, _QUESTION_ID)
    name = torch.zeros_like(template)
    value = torch.zeros_like(template)
    drawn_names = len(SPECIAL) + permutations(len(NAMES))[:, :most]
    drawn_values = len(SPECIAL) + len(NAMES) + integers(len(VALUES), rows, most)
    for spot in (early, late):
        name.scatter_(1, spot, drawn_names)
        value.scatter_(1, spot, drawn_values)
    template, name, value = template[:, :sentences], name[:, :sentences], value[:, :sentences]

    # Words, then all sentences pushed together behind <s>.
    slot = places[template]  # [rows, sentences, _LONGEST]
    word = words[slot, topic[..., None], integers(words.shape[-1], *slot.shape)]
    word = torch.where(slot == 1 + len(_CLASSES), name[..., None], word)
    word = torch.where(slot == 2 + len(_CLASSES), value[..., None], word)
    start = 1 + lengths[template].cumsum(1) - lengths[template]  # [rows, sentences]
    place = torch.arange(_LONGEST, device=device)
    target = start[..., None] + place
    target = torch.where(
        (place < lengths[template][..., None]) & (target < length), target, length
    ).flatten(1)

    def lay_out(source: Tensor, fill: int) -> Tensor:
        text = torch.full((rows, length + 1), fill, device=device).scatter_(
            1, target, source.flatten(1)
        )
        return text[:, :length]

    tokens, kinds = lay_out(word, PAD), lay_out(template_kinds[template], PADDING)
    tokens[:, 0], kinds[:, 0] = BOS, FILLER
    ends = torch.cat((start, start.new_full((rows, 1), length)), 1)
    stated = ends.gather(1, early) + _TEMPLATES[_FACT_ID].index("VALUE")
    asked = (ends.gather(1, late) + _TEMPLATES[_QUESTION_ID].index("VALUE")).clamp(max=length)
    distances = tokens.new_zeros(rows, length + 1).scatter_(1, asked, asked - stated)[:, :length]
    return Documents(tokens, kinds, distances)


@dataclass(frozen=True)
class RecallQuestion:
    """`text` continues a context (after a space); `answer` is the one word that should follow.

    distance: how many tokens the answer lies behind the place where the context states it.
    """

    text: str
    answer: str
    distance: int


@dataclass(frozen=True)
class RecallContext:
    """A text that states facts, and questions that each continue it on their own: prefill once, ask
    many."""

    text: str
    questions: tuple[RecallQuestion, ...]


def make_recall_contexts(
    n: int,
    questions: int,
    *,
    distance: tuple[int, int] = (2000, 4000),
    facts: int | None = None,
    seed: int = 0,
) -> list[RecallContext]:
    """Make n contexts, each with `questions` different questions whose answers lie within
    `distance` tokens.

    Args:
        distance: least and most tokens between the statement of a fact and the answer. A context is
            a little longer than the most.
        facts: how many a context states; by default about one in 40 tokens, and at least enough for
            the questions.

    Raises:
        ValueError: so many questions do not fit into that range of distances.
    """
    near, far = distance
    length = far + 2 * _LONGEST
    if facts is None:
        facts = max(length // 40, 1 + 3 * questions * length // (2 * max(far - near, 1)))
    generator = torch.Generator().manual_seed(seed)
    documents = sample_documents(n, length, generator, facts=(facts, facts), ask=False)
    pick = torch.rand(n, length, generator=generator)
    asking = _QUESTION.split()
    contexts = []
    for row in range(n):
        words = [VOCABULARY[token] for token in documents.tokens[row].tolist()]
        end = max(place for place, word in enumerate(words) if word == ".") + 1
        # The answer of a question is the token at end + len(asking).
        stated = (documents.kinds[row] == RANDOM).nonzero().flatten().tolist()
        values = [
            i
            for i in stated
            if words[i] in VALUES and near <= end + len(asking) - i <= far and i + 1 < end
        ]
        if len(values) < questions:
            raise ValueError(
                f"questions: expected at most {len(values)} for {distance}, got {questions}"
            )
        values.sort(key=pick[row].tolist().__getitem__)
        asked = tuple(
            RecallQuestion(_QUESTION.replace("NAME", words[i - 1]), words[i], end + len(asking) - i)
            for i in values[:questions]
        )
        contexts.append(RecallContext(" ".join(words[1:end]), asked))
    return contexts


def make_recall_prompts(
    n: int, *, distance: tuple[int, int] = (2000, 4000), seed: int = 0
) -> list[tuple[str, str]]:
    """Make n prompts, each a context of its own that ends in a question, with the word that answers
    it."""
    contexts = make_recall_contexts(n, 1, distance=distance, seed=seed)
    return [
        (f"{context.text} {context.questions[0].text}", context.questions[0].answer)
        for context in contexts
    ]
