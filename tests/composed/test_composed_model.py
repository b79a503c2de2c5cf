from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from composing import CONFIGS, SHAPE, assert_close, compose, expert, padded, prompts
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from composed import ComposedForCausalLM

SAMPLE = ("ffn", "block", "model")
TRUNKS = (0, 1, 3)
KINDS = [("ffn", "token"), *((level, "sample") for level in SAMPLE)]


@torch.inference_mode()
def logits(model: Any, **inputs: Any) -> Tensor:
    result: Tensor = model(**inputs).logits
    return result


def one(length: int = 9, seed: int = 0) -> dict[str, Tensor]:
    return {"input_ids": padded(prompts(length, seed=seed))["input_ids"]}


class MeanOf(nn.Module):
    """In the place of a layer or an MLP: the mean of several."""

    def __init__(self, parts: list[Any]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return torch.stack([part(*args, **kwargs) for part in self.parts]).mean(0)


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("trunk", TRUNKS)
@pytest.mark.parametrize("level", SAMPLE)
def test_identical_experts_are_the_expert_bit_by_bit(level: str, trunk: int, architecture: str) -> None:
    same = expert(architecture=architecture)
    composed = compose([same] * 3, level, trunk_layers=trunk)
    for inputs in (one(), padded(prompts(9))):
        assert torch.equal(logits(composed, **inputs), logits(same, **inputs))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("gate", ["linear", "mlp"])
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize(("level", "routing"), KINDS)
def test_identical_experts_are_the_expert_to_rounding(
    level: str, routing: str, k: int, gate: str, attention: str
) -> None:
    same = expert(attn_implementation=attention)
    choices = {"routing": routing, "experts_per_token": k, "gate": gate, "attn_implementation": attention}
    composed = compose([same] * 3, level, gate_scale=0.3, **choices)
    inputs = padded(prompts(9, 4, 7))
    expected = logits(same, **inputs, position_ids=(inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0))
    if level == "model" and k > 1:
        expected = expected.log_softmax(-1)
    real = inputs["attention_mask"].bool()
    assert composed.config.inner._attn_implementation == attention
    assert_close(logits(composed, **inputs)[real], expected[real])


@pytest.mark.parametrize("trunk", [0, 1])
@pytest.mark.parametrize("level", ["ffn-token", "ffn", "block"])
def test_all_experts_with_even_weights_are_their_mean(level: str, trunk: int) -> None:
    models = [expert(seed) for seed in range(3)]
    choices = {"level": level.removesuffix("-token"), "routing": "token" if "token" in level else "sample"}
    composed = compose(models, **choices, experts_per_token=3, gate_scale=0, trunk_layers=trunk)
    reference = expert(0)
    for number in range(trunk, 3):
        layers = [model.model.layers[number] for model in models]
        if level == "block":
            reference.model.layers[number] = MeanOf(layers)
        else:
            reference.model.layers[number].mlp = MeanOf([layer.mlp for layer in layers])
    got, expected = logits(composed, **one(), use_cache=False), logits(reference, **one(), use_cache=False)
    assert_close(got, expected)


def test_all_models_with_even_weights_are_their_mean_distribution() -> None:
    models = [expert(seed) for seed in range(3)]
    composed = compose(models, "model", experts_per_token=3, gate_scale=0)
    mean = torch.stack([logits(model, **one()).softmax(-1) for model in models]).mean(0)
    torch.testing.assert_close(logits(composed, **one()).exp(), mean, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_model_level_is_the_chosen_expert_alone_bit_by_bit(architecture: str, tied: bool) -> None:
    models = [expert(seed, architecture, tie_word_embeddings=tied) for seed in range(3)]
    composed = compose(models, "model")
    chosen = []
    for seed in range(12):
        chosen.append(int(composed.route(**one(seed=seed)).experts))
        assert torch.equal(logits(composed, **one(seed=seed)), logits(models[chosen[-1]], **one(seed=seed)))
    assert len(set(chosen)) > 1


@pytest.mark.parametrize("trunk", [0, 1])
@pytest.mark.parametrize("level", ["ffn", "block"])
def test_a_model_of_the_chosen_parts_is_the_same_bit_by_bit(level: str, trunk: int) -> None:
    models = [expert(seed) for seed in range(3)]
    composed = compose(models, level, trunk_layers=trunk, gate_scale=8)
    route = composed.route(**one()).experts[0, :, 0].tolist()
    reference = expert(0)
    for number, chosen in enumerate(route, start=trunk):
        part = models[chosen].model.layers[number]
        if level == "block":
            reference.model.layers[number] = part
        else:
            reference.model.layers[number].mlp = part.mlp
    assert len(set(route)) > 1
    assert torch.equal(logits(composed, **one()), logits(reference, **one()))


@pytest.mark.parametrize("gate", ["linear", "mlp"])
@pytest.mark.parametrize("trunk", [0, 1])
@pytest.mark.parametrize("level", SAMPLE)
def test_the_weights_are_those_of_the_contract_in_numpy(level: str, trunk: int, gate: str) -> None:
    same = expert()
    composed = compose([same] * 4, level, trunk_layers=trunk, gate=gate, experts_per_token=2, gate_scale=0.3)
    features: list[np.ndarray] = []
    if level == "ffn":
        norms = [layer.post_attention_layernorm for layer in same.model.layers[trunk:]]
        hooks = [norm.register_forward_hook(lambda _m, _i, out: features.append(out[0].numpy())) for norm in norms]
        logits(same, **one())
        for hook in hooks:
            hook.remove()
    else:
        with torch.inference_mode():
            inputs = same(**one(), output_hidden_states=True).hidden_states[trunk:3]
        features = [each[0].numpy() for each in inputs[: 1 if level == "model" else None]]
    state = {name: tensor.numpy() for name, tensor in composed.state_dict().items()}
    place = {"ffn": "model.layers.{}.mlp.gate", "block": "model.layers.{}.gate", "model": "model.gate"}[level]
    route = composed.route(**one())
    for number, feature in enumerate(features):
        name = place.format(number + trunk)
        centred = feature.astype(np.float64).mean(0) - state[f"{name}.mean"]
        if gate == "linear":
            scores = state[f"{name}.weight"] @ centred + state[f"{name}.bias"]
        else:
            inside = np.maximum(state[f"{name}.up.weight"] @ centred + state[f"{name}.up.bias"], 0)
            scores = state[f"{name}.down.weight"] @ inside + state[f"{name}.down.bias"]
        order = np.argsort(-scores, kind="stable")[:2]
        weights = np.exp(scores - scores.max())
        expected = np.zeros(4)
        expected[order] = weights[order] / weights[order].sum()
        np.testing.assert_allclose(route.weights[0, number].numpy(), expected, atol=1e-4)
        assert route.experts[0, number].tolist() == order.tolist()
    assert len(features) == route.weights.shape[1] == composed.config.gates


@pytest.mark.parametrize("k", [1, 2, 3])
def test_token_routing_is_mixtrals(k: int) -> None:
    models = [expert(seed) for seed in range(3)]
    composed = compose(models, "ffn", routing="token", experts_per_token=k, gate_scale=0.3)
    config = MixtralConfig(
        **{**SHAPE, "eos_token_id": None}, num_local_experts=3, num_experts_per_tok=k, sliding_window=None,
        rms_norm_eps=models[0].config.rms_norm_eps, rope_parameters=models[0].config.rope_parameters,
    )  # fmt: skip
    mixtral = MixtralForCausalLM(config).eval()
    with torch.no_grad():
        for name, tensor in mixtral.state_dict().items():
            if "mlp" not in name:
                tensor.copy_(models[0].state_dict()[name])
        for number, layer in enumerate(mixtral.model.layers):
            ours = composed.model.layers[number].mlp
            ours.gate.mean.zero_()
            ours.gate.bias.zero_()
            layer.mlp.gate.weight.copy_(ours.gate.weight)
            for place, model in enumerate(models):
                mlp = model.model.layers[number].mlp
                layer.mlp.experts.gate_up_proj[place].copy_(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
                layer.mlp.experts.down_proj[place].copy_(mlp.down_proj.weight)
    assert_close(logits(composed, **one(40)), logits(mixtral, **one(40)))


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("architecture", ["llama", "sliding"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("level", "routing"), KINDS)
def test_padding_and_neighbours_change_neither_route_nor_logits(
    level: str, routing: str, side: str, architecture: str, k: int
) -> None:
    kind = {"architecture": "mistral", "sliding_window": 5} if architecture == "sliding" else {}
    models = [expert(seed, **kind) for seed in range(3)]
    composed = compose(models, level, routing=routing, experts_per_token=k, trunk_layers=1)
    rows = prompts(9, 4, 17, 2, 6, 9)
    together, batch = padded(rows, side), composed.route(**padded(rows, side))
    whole, real = logits(composed, **together), together["attention_mask"].bool()
    for place, row in enumerate(rows):
        alone = {"input_ids": torch.tensor([row])}
        route = composed.route(**alone)
        got = batch.experts[place][real[place]] if routing == "token" else batch.experts[place]
        assert torch.equal(got, route.experts[0])
        assert_close(whole[place][real[place]], logits(composed, **alone)[0])
    if level == "model":
        assert len({tuple(row) for row in batch.experts.flatten(1).tolist()}) > 1


def test_an_embedded_prompt_has_one_route_to_the_last_bit_in_any_padding() -> None:
    composed = compose([expert(seed) for seed in range(3)], "model")
    rows = prompts(*range(3, 60, 4))
    alone = torch.cat([composed.route(torch.tensor([row])).weights for row in rows])
    for side in ("left", "right"):
        assert torch.equal(composed.route(**padded(rows, side)).weights, alone)


@pytest.mark.parametrize(("level", "routing"), KINDS)
def test_an_expert_that_nobody_chose_does_no_work(level: str, routing: str) -> None:
    composed = compose([expert(seed) for seed in range(4)], level, routing=routing)
    ran: Counter[str] = Counter()
    for name, module in composed.named_modules():
        if name.rpartition(".")[0].endswith("experts") and level != "model":
            module.register_forward_hook(lambda *_, name=name: ran.update([name]))
        elif level == "model" and name.endswith("lm_head"):
            module.register_forward_hook(lambda *_, name=name: ran.update([name.removesuffix(".lm_head")]))
    inputs = padded(prompts(4, 3))
    route = composed.route(**inputs).experts.transpose(-1, -2).flatten(0, -2)
    ran.clear()
    logits(composed, **inputs)
    prefix = {"ffn": "model.layers.{}.mlp.experts.{}", "block": "model.layers.{}.experts.{}"}.get(
        level, "model.experts.{1}"
    )
    chosen = {prefix.format(gate, e) for gate in range(route.shape[-1]) for e in route[:, gate].tolist()}
    assert set(ran) == chosen
    assert max(ran.values()) == 1


def test_ties_go_to_the_lower_index() -> None:
    composed = compose([expert(seed) for seed in range(40)], "model", gate_scale=0, experts_per_token=3)
    assert composed.route(**one()).experts.tolist() == [[[0, 1, 2]]]


def test_logits_are_only_made_for_the_positions_asked() -> None:
    for level in SAMPLE:
        for k in (1, 2):
            composed = compose([expert(seed) for seed in range(3)], level, experts_per_token=k)
            inputs = padded(prompts(9, 4))
            whole = logits(composed, **inputs)
            for keep, places in ((1, [8]), (3, [6, 7, 8]), (torch.tensor([0, 5]), [0, 5])):
                some = logits(composed, **inputs, logits_to_keep=keep)
                assert_close(some, whole[:, places])


def test_labels_give_the_loss_of_any_causal_model() -> None:
    models = [expert(seed) for seed in range(2)]
    ids = one()["input_ids"]
    for level in SAMPLE:
        same = compose([models[0]] * 2, level)
        assert torch.equal(same(ids, labels=ids).loss, models[0](ids, labels=ids).loss)
    trained = compose(models, "ffn", experts_per_token=2)
    trained(ids, labels=ids).loss.backward()
    assert trained.model.layers[0].mlp.gate.weight.grad.abs().sum() > 0


def test_embeddings_may_be_given_where_they_are_shared() -> None:
    models = [expert(seed) for seed in range(2)]
    for level, trunk in (("ffn", 0), ("block", 0), ("model", 1)):
        composed = compose(models, level, trunk_layers=trunk)
        embedded = composed.get_input_embeddings()(one()["input_ids"])
        assert torch.equal(logits(composed, inputs_embeds=embedded), logits(composed, **one()))
    with pytest.raises(ValueError, match="every expert has embeddings of its own"):
        logits(compose(models, "model"), inputs_embeds=embedded)


def refusing(level: str = "block", **choices: Any) -> ComposedForCausalLM:
    return compose([expert(seed) for seed in range(2)], level, **choices)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output_attentions": True}, "neither attentions nor hidden states"),
        ({"output_hidden_states": True}, "neither attentions nor hidden states"),
        ({"routes": torch.ones(1, 2, 2)}, r"routes of shape \(1, 2, 2\), expected \(1, 3, 2\)"),
        ({"attention_mask": torch.zeros(1, 1, 9, 9)}, "doesn't tell what is padding"),
        ({"inputs_embeds": torch.zeros(1, 9, 64)}, "either input_ids or inputs_embeds"),
    ],
)
def test_what_cannot_be_done_is_refused_in_words(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        logits(refusing(), **one(), **arguments)


def test_token_routing_takes_no_routes_and_vocabularies_are_not_resized() -> None:
    with pytest.raises(ValueError, match="takes no routes"):
        logits(refusing("ffn", routing="token"), **one(), routes=torch.ones(1, 3, 2))
    with pytest.raises(ValueError, match="resize the experts' vocabularies"):
        refusing().resize_token_embeddings(400)
