"""The embedded model must look thousands of tokens back; the compressed cache must let it."""

import random
from pathlib import Path

import pytest
import torch

from tests.cases import DEVICE

transformers = pytest.importorskip("transformers")

from perf.tiny_model import recall  # noqa: E402
from perf.tiny_model.recall import RecallContext, make_recall_contexts  # noqa: E402
from spectral_kernels.hf import CACHE, enable  # noqa: E402
from tests import train_tiny_model as train  # noqa: E402
from tests.test_hf import single_thread  # noqa: E402, F401

MODEL = Path(__file__).parent.parent / "perf" / "tiny_model"
CONTEXTS, QUESTIONS = 2, 25


@pytest.fixture(scope="module")
def contexts() -> list[RecallContext]:
    return make_recall_contexts(CONTEXTS, QUESTIONS, distance=(2000, 4000), seed=11)


@pytest.fixture(scope="module")
def model() -> transformers.PreTrainedModel:
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    return model.to(DEVICE).eval()


@torch.no_grad()
def recalled(
    model: transformers.PreTrainedModel, contexts: list[RecallContext], preset: str
) -> tuple[int, float]:
    """Questions answered right; the cache's bytes without its codec as a share of dense float32.

    A context is a prompt; a question is a step after it, forgotten afterwards.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    config = model.config
    width = config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    right, held, dense = 0, 0, 0
    with enable(model, preset, codec=MODEL / f"codec-{preset}.safetensors") as handle:
        for context in contexts:
            ids = tokenizer(context.text, return_tensors="pt").input_ids.to(DEVICE)
            cache = handle.new_cache(max_tokens=ids.shape[1] + 64)
            model(ids, **{CACHE: cache}, logits_to_keep=1)
            held += cache.nbytes - cache.spectral.codec.nbytes
            dense += ids.shape[1] * width * 2 * 4
            for question in context.questions:
                assert 2000 <= question.distance <= 4000
                asked = tokenizer(question.text, return_tensors="pt", add_special_tokens=False)
                asked = asked.input_ids.to(DEVICE)
                assert cache.is_step(asked.shape[1])
                logits = model(asked, **{CACHE: cache}, logits_to_keep=1).logits
                right += tokenizer.decode(int(logits[0, -1].argmax())) == question.answer
                cache.crop(-asked.shape[1])
    return right, held / dense


def test_model_is_small() -> None:
    files = [path for path in MODEL.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8 * 2**20


def test_more_questions_than_facts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"questions: expected at most \d+ for .*, got 3000"):
        make_recall_contexts(1, 3000, distance=(384, 4256))


def test_recall_through_the_cache(
    model: transformers.PreTrainedModel, contexts: list[RecallContext]
) -> None:
    """Exact: at least 95 %. Quality: at most 2 points less. Balanced: at most 6."""
    asked = CONTEXTS * QUESTIONS
    exact, _ = recalled(model, contexts, "exact")
    assert exact >= 0.95 * asked
    quality, share = recalled(model, contexts, "quality")
    assert quality >= exact - 0.02 * asked
    assert share < 1 / 6
    balanced, share = recalled(model, contexts[:1], "balanced")
    assert balanced >= (0.95 - 0.06) * QUESTIONS
    assert share < 1 / 9


def test_recall_needs_the_old_tokens(
    model: transformers.PreTrainedModel, contexts: list[RecallContext]
) -> None:
    """The check above can fail: without what lies 2,000 tokens back there is only chance."""
    near = RecallContext(contexts[0].text[len(contexts[0].text) // 2 :], contexts[0].questions)
    lost = [q for q in near.questions if f"{q.text.split()[-1]} {q.answer}" not in near.text]
    assert len(lost) >= 10
    right, _ = recalled(model, [RecallContext(near.text, tuple(lost))], "exact")
    assert right <= 0.2 * len(lost)


# How it was made


def test_documents_answer_what_they_ask() -> None:
    """Questions follow their facts, each has the stated value, and about half of the documents
    state all facts first."""
    rng, first = random.Random(5), 0
    for _ in range(40):
        words = recall.write_document(rng, 600, 12)
        assert len(words) == 600 and {*words} <= {*recall.VOCABULARY}
        stated: dict[str, str] = {}
        asked: list[int] = []
        notes = [i for i, word in enumerate(words) if word == "note"]
        for i, word in enumerate(words[:-3]):
            if word == "note":
                stated[words[i + 2]] = words[i + 3]
            if word == "recall":
                asked.append(i)
                assert stated[words[i + 2]] == words[i + 3]
        assert 8 <= len(stated) <= 12 and len(asked) >= 5
        first += max(notes) < min(asked)
    assert 10 <= first <= 30


@torch.no_grad()
def test_training_counts_answers_and_writes_what_is_here(tmp_path: Path) -> None:
    """The model of a training step is right about its answers; what is written is what is here."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    mine = load(MODEL, dtype=torch.float32)
    documents = iter(train.Documents(512))
    tokens = torch.stack([next(documents) for _ in range(4)])
    loss, (right, asked) = train.loss_of(mine, tokens)
    questions = (tokens[:, :-3] == train.IDS["recall"]).sum()
    assert asked == questions > 20 and right >= 0.95 * asked and loss < 1
    answers = tokens.clone()  # another value as the answer of one question
    row, place = (tokens[:, :-3] == train.IDS["recall"]).nonzero()[0].tolist()
    answers[row, place + 3] = train.IDS["100"] + train.IDS["355"] - tokens[row, place + 3]
    assert train.loss_of(mine, answers)[1].tolist() == [right - 1, asked]
    train.export(mine, tmp_path)
    text = "note : belen 217 . unheard recall : belen"
    tokenizers = [transformers.AutoTokenizer.from_pretrained(x) for x in (MODEL, tmp_path)]
    ids, again = (x(text, return_tensors="pt").input_ids for x in tokenizers)
    assert torch.equal(ids, again) and ids[0, 6] == recall.UNK
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab() == train.IDS
    here, written = (load(x, dtype=torch.float32)(ids).logits for x in (MODEL, tmp_path))
    assert torch.equal(here, written)
