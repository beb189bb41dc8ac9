"""Which families of transformers the adapter serves: a table by `python -m tests.families`.

A family is a tiny random model of its own config class. With two rows (the shorter one padded on
the left), prompts of 40 and of 700 tokens and 24 new ones: preset exact gives the dense model's
tokens; lossy presets, calibrated on random tokens, run with finite logits; afterwards the model is
as it was. Or `enable` refuses, with a message that says what to do. With --device cuda both ways to
run a step are tried, replayed from a CUDA graph and eager: the same tokens are asked of them. The
last column says so, or why no step was captured.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from spectral_kernels import calibrate
from spectral_kernels.hf import CACHE, enable
from spectral_kernels.layout import PageLayout
from tests import cases

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
VOCAB, PROMPTS, NEW = 512, (40, 700), 24
LOSSY = tuple(calibrate.PRESETS)
BASE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 256, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "max_position_embeddings": 1024,
    "initializer_range": 0.1,  # large enough that no two logits are nearly equal
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "tie_word_embeddings": False,  # Gemma's scaled embeddings would repeat one token for ever
}  # fmt: skip
MOE = {
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
}  # fmt: skip
FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
MIXED = {"layer_types": [SLIDING, FULL, SLIDING, FULL], "num_hidden_layers": 4}
WINDOW = {**MIXED, "sliding_window": 64}
LONGROPE = {
    "rope_type": "longrope", "short_factor": [1.0] * 32, "long_factor": [4.0] * 32, "factor": 4.0,
    "original_max_position_embeddings": 48,
}  # fmt: skip
MHA = {"num_key_value_heads": 4}
MAMBA = {
    "mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16,
    "mamba_n_groups": 1, "mamba_expand": 1, "mamba_d_conv": 4,
}  # fmt: skip
DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32,
    "linear_value_head_dim": 32, "layer_types": [LINEAR, FULL, LINEAR, FULL],
    "num_hidden_layers": 4,
}  # fmt: skip
MLA = {
    **MHA, "head_dim": 16, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
    "kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 48,
    "v_head_dim": 64,
}  # fmt: skip


def rope(**parameters: Any) -> dict[str, Any]:
    """A config's entry for RoPE, by the release."""
    if VERSION >= (5, 0):
        return {"rope_parameters": {"rope_theta": 10000.0, **parameters}}
    if parameters["rope_type"] == "default":
        return {}
    if parameters["rope_type"] == "longrope":  # Phi-3 takes no other names
        names = ("short_factor", "long_factor")
        parameters = {"type": "longrope", **{name: parameters[name] for name in names}}
    return {"rope_scaling": parameters}


# Name in the table: (model type, changes to BASE).
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, 3.1 rope": ("llama", rope(
        rope_type="llama3", factor=4.0, original_max_position_embeddings=64, low_freq_factor=1.0,
        high_freq_factor=4.0,
    )),
    "llama, dynamic rope": ("llama", {
        **rope(rope_type="dynamic", factor=4.0), "max_position_embeddings": 48,
    }),
    "llama, yarn": ("llama", rope(
        rope_type="yarn", factor=4.0, original_max_position_embeddings=64
    )),
    "mistral": ("mistral", {"sliding_window": None}),
    "ministral": ("ministral", WINDOW),
    "ministral3": ("ministral3", rope(
        rope_type="yarn", factor=4.0, original_max_position_embeddings=64, beta_fast=32.0,
        beta_slow=1.0, llama_4_scaling_beta=0.1, mscale=1.0, mscale_all_dim=1.0,
    )),
    "mixtral": ("mixtral", {**MOE, "sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2, windows": ("qwen2", {**WINDOW, "use_sliding_window": True}),
    "qwen2_moe": ("qwen2_moe", {**MOE, "shared_expert_intermediate_size": 64}),
    "qwen3": ("qwen3", {}),
    "qwen3_moe": ("qwen3_moe", MOE),
    "qwen3_next": ("qwen3_next", {**MOE, **DELTA, "shared_expert_intermediate_size": 64}),
    "qwen3_5": ("qwen3_5_text", DELTA),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {"layer_types": [SLIDING, FULL], "sliding_window": 64}),
    "gemma3": ("gemma3_text", WINDOW),
    "gemma3n": ("gemma3n_text", {
        **WINDOW, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": VOCAB, "intermediate_size": [128] * 4, "altup_num_inputs": 2,
        "laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 4,
    }),
    "gemma4": ("gemma4_text", {
        **WINDOW, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": VOCAB, "global_head_dim": 64,
    }),
    "vaultgemma": ("vaultgemma", {**WINDOW, "attn_logit_softcapping": None}),
    "phi": ("phi", {**MHA, "partial_rotary_factor": 0.5}),
    "phi3": ("phi3", {}),
    "phi3, windows": ("phi3", {"sliding_window": 64}),
    "phi4, partial rotary": ("phi3", {
        "partial_rotary_factor": 0.75, **rope(rope_type="default", partial_rotary_factor=0.75)
    }),
    "phi3, longrope": ("phi3", {
        **rope(**LONGROPE), "original_max_position_embeddings": 48,
    }),
    "phimoe": ("phimoe", {**MOE, **rope(rope_type="default"), "sliding_window": None}),
    "granite": ("granite", {}),
    "granitemoe": ("granitemoe", MOE),
    "granitemoeshared": ("granitemoeshared", {**MOE, "shared_intermediate_size": 64}),
    "granitemoehybrid": ("granitemoehybrid", {
        **MOE, **MAMBA, "shared_intermediate_size": 64, "mamba_n_heads": 16,
        "layer_types": [LINEAR, FULL] * 2, "num_hidden_layers": 4,
    }),
    "cohere": ("cohere", {}),
    "cohere2": ("cohere2", {**WINDOW, "sliding_window_pattern": 2}),
    "olmo": ("olmo", {}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", WINDOW),
    "olmoe": ("olmoe", MOE),
    "flex_olmo": ("flex_olmo", MOE),
    "olmo_hybrid": ("olmo_hybrid", DELTA),
    "starcoder2": ("starcoder2", {"sliding_window": None}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "glm": ("glm", {}),
    "glm4": ("glm4", {}),
    "glm4_moe": ("glm4_moe", {**MOE, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}),
    "stablelm": ("stablelm", {}),
    "gpt_neox": ("gpt_neox", MHA),
    "nemotron": ("nemotron", {}),
    "nemotron_h": ("nemotron_h", {
        **MAMBA, "hybrid_override_pattern": "M*-M*", "num_hidden_layers": 5,
        "layers_block_type": [LINEAR, FULL, "mlp", LINEAR, FULL],
        "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 1,
    }),
    "exaone4": ("exaone4", {**WINDOW, "sliding_window_pattern": 2}),
    "ernie4_5": ("ernie4_5", {}),
    "ernie4_5_moe": ("ernie4_5_moe", {**MOE, "moe_num_experts": 4, "moe_k": 2}),
    "seed_oss": ("seed_oss", {}),
    "arcee": ("arcee", {}),
    "apertus": ("apertus", {}),
    "helium": ("helium", {}),
    "bitnet": ("bitnet", {}),
    "dots1": ("dots1", {
        **MOE, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
    }),
    "hunyuan": ("hunyuan_v1_dense", {}),
    "minimax_m2": ("minimax_m2", MOE),
    "gpt_oss": ("gpt_oss", {**WINDOW, **MOE}),
    "llama4": ("llama4_text", {
        **MOE, "layer_types": ["chunked_attention", FULL] * 2, "num_hidden_layers": 4,
        "attention_chunk_size": 64, "no_rope_layers": [1, 0, 1, 0], "interleave_moe_layer_step": 1,
        "intermediate_size_mlp": 64,
    }),
    "lfm2": ("lfm2", {
        "layer_types": ["conv", FULL, "conv", FULL], "num_hidden_layers": 4, "block_ff_dim": 128,
        "conv_L_cache": 3,
    }),
    "lfm2_moe": ("lfm2_moe", {
        **MOE, "layer_types": ["conv", FULL] * 2, "num_hidden_layers": 4, "conv_L_cache": 3,
        "num_dense_layers": 1,
    }),
    "jamba": ("jamba", {
        **MOE, "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1,
        "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 16,
        "use_mamba_kernels": False,
    }),
    "bamba": ("bamba", {
        **MAMBA, "mamba_n_heads": 16, "attn_layer_indices": [1, 3], "num_hidden_layers": 4,
    }),
    "falcon_h1": ("falcon_h1", MAMBA),
    "gpt2": ("gpt2", {**MHA, "n_positions": 1024}),
    "gpt_bigcode": ("gpt_bigcode", {"n_positions": 1024}),
    "gptj": ("gptj", {**MHA, "n_positions": 1024, "rotary_dim": 32}),
    "opt": ("opt", {**MHA, "word_embed_proj_dim": 256, "ffn_dim": 128}),
    "biogpt": ("biogpt", MHA),
    "persimmon": ("persimmon", MHA),
    "bloom": ("bloom", {"n_head": 4}),
    "mpt": ("mpt", {"d_model": 256, "n_heads": 4, "n_layers": 2, "expansion_ratio": 1}),
    "deepseek_v2": ("deepseek_v2", {**MOE, **MLA}),
    "deepseek_v3": ("deepseek_v3", {**MOE, **MLA}),
    "minicpm3": ("minicpm3", MLA),
    "diffllama": ("diffllama", {}),
    "mamba2": ("mamba2", {"num_heads": 8, "head_dim": 64, "state_size": 16, "n_groups": 1}),
    "mistral, windows": ("mistral", {"sliding_window": 64}),
}  # fmt: skip


@dataclass
class Row:
    """What was found of a family: `why` it is refused or `broke`, or what is true of it."""

    name: str
    ours: int = 0
    layers: int = 0
    equal: bool = False
    asked: int = len(LOSSY)
    lossy: int = 0
    restored: bool = False
    steps: str = ""  # on a GPU
    why: str = ""
    broke: str = ""
    seconds: float = 0.0

    @property
    def works(self) -> bool:
        whole = self.equal and self.restored and self.lossy == self.asked
        return whole and "differ" not in self.steps

    def __str__(self) -> str:
        if self.why or self.broke:
            return f"{self.name:22} {self.why or self.broke}"
        marks = ["no", "yes"]
        return (
            f"{self.name:22} {self.ours:3} of {self.layers:<3} {marks[self.equal]:6} "
            f"{self.lossy} of {self.asked}  {marks[self.restored]:8} {self.seconds:4.1f} s"
            f"  {self.steps}".rstrip()
        )


def build(name: str, **changes: Any) -> Any:
    """The tiny random model of a family, always the same; eager if it has no other attention."""
    kind, settings = FAMILIES[name]
    config = AutoConfig.for_model(kind, **{**BASE, **settings, **changes})
    torch.manual_seed(0)
    try:
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    except ValueError:
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for _, parameter in model.named_parameters():
        if not parameter.isfinite().all():  # torch.empty, which a checkpoint would fill
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def prompt(
    tokens: int, *, rows: int = 1, padding: tuple[int, ...] = (), seed: int = 0
) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask [rows, tokens]; `padding` is the left padding of the rows."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    for row, count in enumerate(padding):
        ids[row, :count], mask[row, :count] = 0, 0
    return {"input_ids": ids.to(cases.DEVICE), "attention_mask": mask.to(cases.DEVICE)}


def generate(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> Any:
    torch.manual_seed(1)
    defaults = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    return model.generate(**inputs, **{**defaults, **options})


def state(model: Any) -> Any:
    """What `disable` must give back."""
    names = [(name, sorted(vars(module))) for name, module in model.named_modules()]
    return names, model.config._attn_implementation, copy.deepcopy(model.config.to_dict())


def shared_layout(preset: str) -> PageLayout:
    """The largest that the preset's bytes allow: kernels are compiled once for all families."""
    dim, menus = BASE["head_dim"], calibrate.menus(BASE["head_dim"])
    every = [PageLayout(k, v, dim, calibrate.FRAME) for k in menus["k"] for v in menus["v"]]
    room = 4 * dim / calibrate.PRESETS[preset].ratio
    return max((x for x in every if x.token_bytes <= room), key=lambda x: x.token_bytes)


def examine(name: str, lossy: Sequence[str] = LOSSY, device: str = "cpu") -> Row:
    """Build a family's model and see what holds; on a GPU for replayed and for eager steps."""
    row, start = Row(name, asked=len(lossy)), time.perf_counter()
    try:
        model = build(name).to(device)
    except (KeyError, ValueError) as error:
        if "recognized" not in str(error) and not isinstance(error, KeyError):
            raise
        row.why = f"not in transformers {transformers.__version__}"
        return row
    two = [prompt(tokens, rows=2, padding=(11, 0), seed=tokens) for tokens in PROMPTS]
    inputs = [{k: x.to(device) for k, x in some.items()} for some in two]
    whole = {"max_new_tokens": NEW, "min_new_tokens": NEW}
    dense = [generate(model, x, **whole) for x in inputs]
    for found in (tokens for x in dense for tokens in x[:, -NEW:].tolist()):
        assert len(set(found)) > 4, f"{name} repeats {set(found)}, which shows nothing"
    before = state(model)  # rope of some families keeps what it computed
    try:
        row.equal, ways = True, (False,) if device == "cpu" else (False, True)
        asked: dict[str, Any] = {"return_dict_in_generate": True, "output_logits": True, **whole}
        asked["disable_compile"] = True
        replayed, same, said = len(ways) > 1, True, ""
        for graph in ways:
            with warnings.catch_warnings(record=True) as texts:
                warnings.simplefilter("always")
                with enable(model, "exact", graph=graph) as handle:
                    row.ours, row.layers = len(handle.links), model.config.num_hidden_layers
                    ours = [generate(model, x, **asked) for x in inputs]
            row.equal &= all(map(torch.equal, dense, (out.sequences for out in ours)))
            if graph:
                replayed &= all(out[CACHE].graph is not None for out in ours)
                own = [str(x.message) for x in texts if "spectral_kernels" in str(x.message)]
                said = own[-1].rpartition("spectral_kernels: ")[2] if own else ""
        stats = calibrate.read(model, [inputs[1]["input_ids"][1].cpu()], progress=False)
        for preset in lossy:
            layouts = calibrate.plan(stats, preset)
            if device != "cpu":
                layouts = [shared_layout(preset)] * len(layouts)
            codec, found = calibrate.fit_codec(stats, layouts, preset), []
            for graph in ways:
                with enable(model, codec=codec, graph=graph):
                    out = generate(model, inputs[1], **asked)
                found.append(out.sequences)
                finite = all(bool(x.isfinite().all()) for x in out.logits)
                finite &= out[CACHE].spectral.codec.preset == preset
            replayed &= out[CACHE].graph is not None
            row.lossy += finite
            same &= torch.equal(found[0], found[-1])
        if len(ways) > 1:
            done = "replayed = eager" if replayed else f"eager: {said or 'no step was captured'}"
            row.steps = done if same else f"differ ({done})"
    except (NotImplementedError, ValueError) as error:
        row.why = f"refused: {error}"
    again = generate(model, inputs[0], **whole)
    row.restored = state(model) == before and torch.equal(again, dense[0])
    row.seconds = time.perf_counter() - start
    return row


def attempt(name: str, lossy: Sequence[str], device: str) -> Row:
    """`examine`; what breaks it is a row too."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    try:
        return examine(name, lossy, device)
    except Exception as error:
        text = (str(error).splitlines() or [""])[0]
        return Row(name, broke=f"broke: {type(error).__name__}: {text}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.families", description=__doc__)
    parser.add_argument("names", nargs="*", help="families (default: all)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    add = parser.add_argument
    add("--presets", nargs="*", choices=LOSSY, default=list(LOSSY), help="lossy ones (all)")
    add("--jobs", type=int, default=1, help="processes (default 1)")
    args = parser.parse_args(argv)
    names = args.names or list(FAMILIES)
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    print(f"{'family':22} {'ours of all':11}{'equal':7}lossy   restored time")
    rows, one = [], partial(attempt, lossy=args.presets, device=args.device)
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        for row in pool.map(one, names) if args.jobs > 1 else map(one, names):
            rows.append(row)
            print(row, flush=True)
    refused = sum(bool(row.why) for row in rows)
    works = sum(row.works for row in rows)
    print(f"{works} work, {refused} refused, {len(rows) - works - refused} fail")
    return int(works + refused < len(rows))


if __name__ == "__main__":
    sys.exit(main())
