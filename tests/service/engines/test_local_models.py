"""Our forward and transformers' modules over paged memory, against transformers alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import byte_level_tokenizer
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AttentionInterface,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from service.engines.base import EngineError
from service.engines.local import ops
from service.engines.local.decoder import Decoder, is_ours
from service.engines.local.expert import Loading, read
from service.engines.local.forward import Model, Segment, Step
from service.engines.local.graphs import Graphs, Inputs, Recorded
from service.engines.local.hosted import ATTENTION, Hosted, near
from service.engines.local.memory import Memory
from service.engines.local.ops import PAGE
from service.engines.local.weights import Shared, Weights

CPU = torch.device("cpu")
BASE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
STRETCHED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CONFIGS = {
    "llama": LlamaConfig(**BASE),
    "llama, tied, biased, stretched": LlamaConfig(
        **BASE,
        tie_word_embeddings=True,
        attention_bias=True,
        mlp_bias=True,
        rope_parameters=STRETCHED | {"original_max_position_embeddings": 64, "rope_theta": 1e4},
    ),
    "llama of wide heads": LlamaConfig(**BASE, head_dim=32),
    "mistral of a window": MistralConfig(**BASE, sliding_window=8),
    "qwen2": Qwen2Config(**BASE),
    "qwen2 of a window": Qwen2Config(**BASE, use_sliding_window=True, sliding_window=8, max_window_layers=1),
    "qwen3": Qwen3Config(**BASE, head_dim=16),
    "gemma2": Gemma2Config(**BASE, head_dim=16, sliding_window=8),
    "gemma3": Gemma3TextConfig(**BASE, head_dim=16, sliding_window=8),
    "phi3": Phi3Config(**BASE),
    "gpt2": GPT2Config(vocab_size=300, n_embd=64, n_layer=2, n_head=4, n_positions=256, initializer_range=0.3),
}
MIXED = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
WHOLE = BASE | {"num_key_value_heads": None}
HALF = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
GPT = {"vocab_size": 300, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.3}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "first_k_dense_replace": 2,
}
OTHERS: dict[str, dict[str, Any]] = {
    "apertus": BASE,
    "arcee": BASE,
    "codegen": GPT | {"rotary_dim": 16},
    "cohere": BASE,
    "cohere2": BASE | HALF,
    "exaone4": BASE | HALF,
    "gemma3": {"text_config": BASE | HALF | {"head_dim": 16}, "vision_config": {"num_hidden_layers": 1}},
    "glm4": BASE | {"head_dim": 16},
    "gpt_bigcode": GPT,
    "gpt_neox": WHOLE,
    "gpt_oss": BASE | HALF | MIXED | {"head_dim": 16},
    "gptj": GPT | {"rotary_dim": 16},
    "granite": BASE,
    "mixtral": BASE | MIXED,
    "nemotron": BASE | {"head_dim": 16},
    "olmo2": BASE,
    "olmo3": BASE | HALF,
    "opt": WHOLE | {"ffn_dim": 96, "word_embed_proj_dim": 64, "init_std": 0.3},
    "phi": BASE,
    "phimoe": BASE | MIXED | {"sliding_window": 256},
    "qwen3_moe": BASE | MIXED | {"head_dim": 16},
    "seed_oss": BASE | {"head_dim": 16},
    "smollm3": BASE,
    "starcoder2": BASE | {"sliding_window": 8},
    "vaultgemma": BASE | HALF | {"head_dim": 16},
}
"""By kind of model, all of them run by transformers' modules."""
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bloom": (BASE, "its class does not provide for it"),
    "deepseek_v3": (BASE | LATENT, r"layer 0 has keys of shape \(1, 1, "),
    "diffllama": (BASE, "other keys and values than those that a layer has just kept"),
    "doge": (BASE, "DogeAttention asks for attention with attention_mask"),
    "dory": (BASE | HALF | {"n_input_layers": 0, "n_output_layers": 0, "n_recurrent_layers": 2}, "it keeps layer 2"),
    "falcon": ({"vocab_size": 300, "hidden_size": 64, "num_attention_heads": 4}, "its class does not provide for it"),
    "gemma3n_text": (
        BASE | {"num_hidden_layers": 4, "layer_types": HALF["layer_types"] * 2, "num_kv_shared_layers": 2}
        | {"head_dim": 16, "vocab_size_per_layer_input": 300, "activation_sparsity_pattern": [0.0] * 4},
        "other keys and values than those that a layer has just kept",
    ),
    "granitemoehybrid": (BASE | {"layer_types": ["mamba", "attention"]}, "layers of linear_attention"),
    "jetmoe": (BASE | {"num_key_value_heads": 4, "kv_channels": 16}, "other keys and values than those"),
    "lfm2": (BASE | {"layer_types": ["conv", "full_attention"]}, "layers of conv"),
    "llama4_text": (BASE | {"attention_chunk_size": 8}, "layers of chunked_attention"),
    "mamba": ({"vocab_size": 300, "hidden_size": 64}, "its class does not provide for it"),
    "qwen2_moe": (BASE | MIXED | HALF | {"use_sliding_window": True}, "layer 0 sees all tokens, its config says 8"),
    "roberta": (WHOLE | {"is_decoder": True}, r"its logits are off by 0\.\d+ of their spread"),
    "t5": ({}, "its class does not provide for it"),
}  # fmt: skip
OURS = [name for name, config in CONFIGS.items() if is_ours(config)]


def saved(folder: Path, config: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # else biases are zero and norms one, and nobody would miss them
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model


def ours(folder: Path, config: Any, dtype: torch.dtype = torch.float32) -> Decoder:
    with Weights(folder, dtype, CPU, None, Shared()) as weights:
        return Decoder(config, weights)


def hosted(folder: Path) -> Hosted:
    return Hosted(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=ATTENTION))


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> Model:
    byte_level_tokenizer().save_pretrained(folder)
    return read("it", folder, Loading(dtype, CPU)).load()


class Texts:
    """Sequences in a memory full of NaN, given to a model piece by piece."""

    def __init__(self, model: Model, texts: Sequence[Sequence[int]]) -> None:
        self._model, self._texts = model, texts
        self._memory = Memory(16, 8 * model.shape.page, torch.float32, CPU)
        self._memory.data.fill_(torch.nan)
        shelf = self._memory.shelf(model.shape.page)
        self._tables = [[page.offset for _ in range(0, 80, PAGE) if (page := shelf.take())] for _ in texts]
        self._done = [0] * len(texts)

    def segments(self, *parts: tuple[int, int, int]) -> list[Segment]:
        found = []
        for text, count, rows in parts:
            start = self._done[text]
            found.append(Segment(self._texts[text][start : start + count], start, self._tables[text], rows))
            self._done[text] += count
        return found

    def give(self, *parts: tuple[int, int, int]) -> list[Tensor]:
        """The logits of (text, its next so many tokens, of so many the logits)."""
        logits_RV = self._model.forward(self.segments(*parts), self._memory.data)
        assert len(logits_RV) == sum(rows for _, _, rows in parts)
        return list(torch.split(logits_RV, [rows for _, _, rows in parts]))


def random_texts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 300, (length,), generator=generator).tolist() for length in (60, 20, 47)]


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, "ours") for name in OURS), *((name, "hosted") for name in CONFIGS)]
)
def test_logits_are_those_of_transformers_however_texts_are_cut_and_put_together(
    name: str, kind: str, tmp_path: Path
) -> None:
    reference = saved(tmp_path, CONFIGS[name])
    model: Model = ours(tmp_path, reference.config) if kind == "ours" else hosted(tmp_path)
    assert_equal(model, reference)


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_loaded_has_the_logits_of_transformers(kind: str, tmp_path: Path) -> None:
    reference = saved(tmp_path, CONFIG_MAPPING[kind](**OTHERS[kind]))
    assert_equal(loaded(tmp_path), reference)


def assert_equal(model: Model, reference: Any) -> None:
    texts = random_texts()
    with torch.inference_mode():
        expected = [reference(torch.tensor([text])).logits[0] for text in texts]
    given = Texts(model, texts)
    found = [
        *given.give((0, 40, 1), (1, 17, 17)),
        *given.give((0, 1, 1), (1, 1, 1), (2, 30, 0)),
        *given.give((0, 1, 1), (0 + 2, 17, 5)),
        *given.give((1, 1, 1), (0, 18, 2)),
    ]
    wanted = [
        (0, slice(39, 40)),
        (1, slice(0, 17)),
        (0, slice(40, 41)),
        (1, slice(17, 18)),
        (2, slice(0, 0)),
        (0, slice(41, 42)),
        (2, slice(42, 47)),
        (1, slice(18, 19)),
        (0, slice(58, 60)),
    ]
    for logits_RV, (text, rows) in zip(found, wanted, strict=True):
        torch.testing.assert_close(logits_RV, expected[text][rows], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", [kind for kind in REFUSED if kind in CONFIG_MAPPING])
def test_what_would_have_other_logits_is_refused_when_it_is_loaded(kind: str, tmp_path: Path) -> None:
    settings, reason = REFUSED[kind]
    config = CONFIG_MAPPING[kind](**settings)
    if "does not provide" in reason:
        config.save_pretrained(tmp_path)
    else:
        saved(tmp_path, config)
    sentence = r" is a \w+, whose attention cannot be exchanged: serve it elsewhere, with --expert NAME=URL \(.*"
    with pytest.raises(EngineError, match=re.escape(str(tmp_path)) + sentence + reason):
        loaded(tmp_path)


@pytest.mark.parametrize("kind", ["gpt_oss", "mixtral", "olmo3", "smollm3"])
def test_rounding_refuses_nobody(kind: str, tmp_path: Path) -> None:
    saved(tmp_path, CONFIG_MAPPING[kind](**OTHERS[kind]))
    assert loaded(tmp_path, torch.bfloat16)


def test_rounding_excuses_nobody(tmp_path: Path) -> None:
    settings, reason = REFUSED["roberta"]
    saved(tmp_path, CONFIG_MAPPING["roberta"](**settings))
    with pytest.raises(EngineError, match=reason):
        loaded(tmp_path, torch.bfloat16)


@pytest.mark.parametrize(
    "asked", [{"position_bias": torch.zeros(1)}, {"is_causal": False}, {"block_indices": [0]}], ids=str
)
def test_attention_that_we_have_not_is_refused_by_name(asked: dict[str, Any]) -> None:
    attention, states = AttentionInterface()[ATTENTION], torch.zeros(1, 1, 1, 1)
    with pytest.raises(EngineError, match=f"Identity asks for attention with {next(iter(asked))}"):
        attention(torch.nn.Identity(), states, states, states, None, **asked)


def test_a_row_has_the_same_bits_whoever_is_beside_it(tmp_path: Path) -> None:
    reference = saved(tmp_path, CONFIGS["llama"])
    texts = random_texts()
    model = ours(tmp_path, reference.config)
    alone = Texts(model, texts)
    alone.give((0, 40, 1))
    first = alone.give((0, 1, 1))[0]
    beside = Texts(model, texts)
    beside.give((0, 40, 1))
    beside.give((1, 18, 0), (2, 30, 0))
    assert torch.equal(beside.give((0, 1, 1), (1, 1, 1), (2, 1, 1))[0], first)


def test_a_text_has_the_same_bits_whole_and_in_parts(tmp_path: Path) -> None:
    if ops.library() is None:
        pytest.skip("torch promises no such thing")
    reference = saved(tmp_path, CONFIGS["llama of wide heads"])
    texts = random_texts()
    model = ours(tmp_path, reference.config)
    whole = Texts(model, texts).give((0, 60, 60))[0]
    parts = Texts(model, texts)
    found = [parts.give((0, count, count))[0] for count in (1, 17, 1, 20, 21)]
    assert torch.equal(torch.cat(found), whole)


def test_a_step_that_is_padded_to_a_recorded_shape_has_the_same_logits(tmp_path: Path) -> None:
    """As on CUDA, with a recorder that computes again at every replay."""
    reference = saved(tmp_path, CONFIGS["qwen3"])
    model = ours(tmp_path, reference.config)
    recorded: list[tuple[int, int]] = []

    def record(compute: Any, inputs: Inputs) -> Recorded:
        kept = Inputs(*(each.clone() for each in inputs))
        logits_BV = compute(kept)
        recorded.append(tuple(kept.tables_BP.shape))
        return Recorded(kept, lambda: logits_BV.copy_(compute(kept)), logits_BV)

    texts = random_texts()
    plain, padded = Texts(model, texts), Texts(model, texts)
    for each in (plain, padded):
        each.give((0, 40, 1), (1, 10, 1), (2, 30, 1))
    memory = padded._memory.data
    graphs = Graphs(partial(model.compute, memory), len(memory) - model.shape.page, record)
    for parts in (((0, 1, 1), (1, 1, 1), (2, 1, 1)), ((1, 1, 1),), ((0, 1, 1), (2, 1, 1), (1, 1, 1))):
        expected = plain.give(*parts)
        found = graphs.run(Step(padded.segments(*parts), model.shape.width, CPU))
        torch.testing.assert_close(found, torch.cat(expected), atol=1e-5, rtol=1e-5)
    assert recorded == [(4, 8), (1, 8)]


def test_in_bf16_it_is_as_near_to_fp32_as_transformers_is(tmp_path: Path) -> None:
    reference = saved(tmp_path, CONFIGS["llama"])
    texts = [random_texts()[0]]
    tokens = torch.tensor(texts)
    with torch.inference_mode():
        exact = reference(tokens).logits[0]
        theirs = reference.to(torch.bfloat16)(tokens).logits[0].float()
    model = ours(tmp_path, reference.config, torch.bfloat16)
    memory = Memory(16, 8 * model.shape.page, torch.bfloat16, CPU)
    shelf = memory.shelf(model.shape.page)
    table = [page.offset for _ in range(4) if (page := shelf.take())]
    found = model.forward([Segment(texts[0], 0, table, 60)], memory.data).float()
    assert (found - exact).abs().mean() < 1.1 * (theirs - exact).abs().mean()


def test_what_two_checkpoints_have_in_common_is_loaded_once(tmp_path: Path) -> None:
    reference = saved(tmp_path / "one", CONFIGS["llama"])
    with torch.no_grad():
        reference.model.layers[1].mlp.down_proj.weight[0, 0] += 1
    reference.save_pretrained(tmp_path / "two")
    shared: Shared[Any] = Shared()
    loaded = []
    for name in ("one", "two"):
        with Weights(tmp_path / name, torch.float32, CPU, None, shared) as weights:
            loaded.append(Decoder(reference.config, weights))
    one, two = (model._layers[1] for model in loaded)
    assert one.qkv is two.qkv
    assert one.before_H is two.before_H
    assert one.down is not two.down


def test_a_tensor_that_lacks_or_does_not_fit_is_named(tmp_path: Path) -> None:
    reference = saved(tmp_path, CONFIGS["llama"])
    reference.config.intermediate_size = 95
    with pytest.raises(EngineError, match=r"model\.layers\.0\.mlp\.gate_proj\.weight in .* is \[96, 64\]"):
        ours(tmp_path, reference.config)
    reference.config.num_hidden_layers = 3
    reference.config.intermediate_size = 96
    with pytest.raises(EngineError, match=r"no tensor model\.layers\.2"):
        ours(tmp_path, reference.config)


@pytest.mark.parametrize(
    ("kind", "dtype", "expected"),
    [
        (LlamaConfig, torch.bfloat16, 0.2),
        (MixtralConfig, torch.bfloat16, 0.5),
        (MixtralConfig, torch.float16, 0.125),
        (MixtralConfig, torch.float32, 0.01),
    ],
)
def test_rounding_may_send_a_token_to_other_experts_of_a_layer(kind: Any, dtype: torch.dtype, expected: float) -> None:
    assert near(kind(), dtype) == pytest.approx(expected)
