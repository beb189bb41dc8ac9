"""The built-in model must look thousands of tokens back; the compressed cache must let it."""

import os
from pathlib import Path

import pytest
import torch

from spectral_kernels.cache import PRESETS

transformers = pytest.importorskip("transformers")

from perf.tiny_model.recall import RecallContext, make_recall_contexts  # noqa: E402
from spectral_kernels.hf import enable  # noqa: E402

MODEL = Path(__file__).parent.parent / "perf" / "tiny_model"
CONTEXTS, QUESTIONS = 2, 25


@pytest.fixture(scope="module")
def contexts() -> list[RecallContext]:
    return make_recall_contexts(CONTEXTS, QUESTIONS, distance=(2000, 4000), seed=11)


@pytest.fixture(scope="module")
def model() -> transformers.PreTrainedModel:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).to(device).eval()


@torch.no_grad()
def recalled(model: transformers.PreTrainedModel, contexts: list[RecallContext], preset: str) -> tuple[int, float]:
    """Questions answered right (each context is prefilled once), and the cache's bytes as a share of dense float32."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    config = model.config
    right, held, dense = 0, 0, 0
    with enable(model, preset=preset) as handle:
        for context in contexts:
            cache = handle.new_cache()
            prompt = tokenizer(context.text, return_tensors="pt").input_ids.to(model.device)
            model(input_ids=prompt, past_key_values=cache, logits_to_keep=1)
            held += cache.nbytes
            width = config.num_hidden_layers * config.num_key_value_heads * config.head_dim
            dense += prompt.shape[1] * width * 2 * 4
            # All questions at once: as many rows as questions, which share the context's pages.
            assert all(2000 <= question.distance <= 4000 for question in context.questions)
            cache.batch_repeat_interleave(len(context.questions))
            texts = [question.text for question in context.questions]
            ids = tokenizer(texts, return_tensors="pt", add_special_tokens=False).input_ids.to(model.device)
            answers = model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1).tolist()
            right += sum(
                tokenizer.decode(answer) == question.answer
                for answer, question in zip(answers, context.questions, strict=True)
            )
    return right, held / dense


def test_model_is_small() -> None:
    assert sum(os.path.getsize(path) for path in MODEL.iterdir() if path.is_file()) <= 8 * 2**20


def test_recall_through_the_cache(model: transformers.PreTrainedModel, contexts: list[RecallContext]) -> None:
    """Exact: at least 95 %. Quality: at most 2 points less. And the cold cache was really used."""
    asked = CONTEXTS * QUESTIONS
    exact, _ = recalled(model, contexts, "exact")
    assert exact >= 0.95 * asked
    quality, share = recalled(model, contexts, "quality")
    assert quality >= exact - 0.02 * asked
    assert share < 0.2


def test_recall_needs_the_cold_tokens(model: transformers.PreTrainedModel, contexts: list[RecallContext]) -> None:
    """The check above can fail: without what lies 2,000 tokens back the model does no better than chance allows."""
    assert set(PRESETS) == {"exact", "quality", "balanced", "small"}
    near = [RecallContext(context.text[len(context.text) // 2 :], context.questions) for context in contexts[:1]]
    lost = [q for q in near[0].questions if f"{q.text.split()[-1]} {q.answer}" not in near[0].text]
    assert len(lost) >= 10
    right, _ = recalled(model, [RecallContext(near[0].text, tuple(lost))], "exact")
    assert right <= 0.2 * len(lost)
