"""Chat templates: the built-in ones write their public prompt formats, auto takes the most common, others are named."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from builder.errors import MergeError
from builder.merge import chat

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And 3 + 3?"},
]

# From the models' cards; Alpaca's from tatsu-lab/stanford_alpaca, with the system message for its preamble.
FORMATS = {
    "alpaca": (
        "Be brief.\n\n### Instruction:\nWhat is 2 + 2?\n\n### Response:\n4\n\n### Instruction:\nAnd 3 + 3?\n\n"
        "### Response:\n"
    ),
    "chatml": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n"
        "<|im_start|>assistant\n4<|im_end|>\n<|im_start|>user\nAnd 3 + 3?<|im_end|>\n<|im_start|>assistant\n"
    ),
    "exaone": (
        "[|system|]Be brief.[|endofturn|]\n[|user|]What is 2 + 2?\n[|assistant|]4[|endofturn|]\n"
        "[|user|]And 3 + 3?\n[|assistant|]"
    ),
    "llama3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhat is 2 + 2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n4<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nAnd 3 + 3?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "mistral": "<s> [INST] Be brief.\n\nWhat is 2 + 2? [/INST] 4</s> [INST] And 3 + 3? [/INST]",
}

WITHOUT_SYSTEM = {
    "alpaca": "### Instruction:\nWhat is 2 + 2?",
    "chatml": "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n",
    "exaone": "[|system|][|endofturn|]\n[|user|]What is 2 + 2?\n",
    "llama3": "<s><|start_header_id|>user<|end_header_id|>\n\nWhat is 2 + 2?<|eot_id|>",
    "mistral": "<s> [INST] What is 2 + 2? [/INST]",
}


def render(text: str, messages: Sequence[dict[str, str]], *, prompt: bool, trim: bool = True) -> str:
    """As transformers renders it; without `trim` as jinja2 does on its own."""

    def refuse(sentence: str) -> None:
        raise TemplateError(sentence)

    environment = ImmutableSandboxedEnvironment(trim_blocks=trim, lstrip_blocks=trim)
    environment.globals["raise_exception"] = refuse
    return environment.from_string(text).render(
        messages=messages, add_generation_prompt=prompt, bos_token="<s>", eos_token="</s>"
    )


def built_in(name: str) -> str:
    text = chat.template(name, [])
    assert text is not None
    return text


@pytest.mark.parametrize("trim", [True, False])
@pytest.mark.parametrize("name", chat.NAMES)
def test_a_built_in_writes_its_format(name: str, trim: bool) -> None:
    assert render(built_in(name), CONVERSATION, prompt=True, trim=trim) == FORMATS[name]


@pytest.mark.parametrize("name", chat.NAMES)
def test_a_built_in_needs_no_system_message(name: str) -> None:
    assert render(built_in(name), CONVERSATION[1:2], prompt=False) == WITHOUT_SYSTEM[name]


def test_mistral_refuses_turns_that_do_not_alternate() -> None:
    with pytest.raises(TemplateError, match="take turns"):
        render(built_in("mistral"), [CONVERSATION[1], CONVERSATION[3]], prompt=True)


def test_transformers_renders_a_built_in_alike(micro_zoo: dict[str, Path]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(micro_zoo["math"])
    for name in ("alpaca", "chatml", "exaone"):
        text = tokenizer.apply_chat_template(
            CONVERSATION, chat_template=built_in(name), add_generation_prompt=True, tokenize=False
        )
        assert text == FORMATS[name]


def folder(path: Path, said: Any = None, file: str | None = None) -> Path:
    """A model folder whose tokenizer_config.json says this template, and whose chat_template.jinja that."""
    path.mkdir()
    (path / "tokenizer_config.json").write_text(json.dumps({} if said is None else {"chat_template": said}), "utf-8")
    if file is not None:
        (path / "chat_template.jinja").write_text(file, "utf-8")
    return path


def test_auto_is_the_most_common_template(tmp_path: Path) -> None:
    folders = [folder(tmp_path / str(i), text) for i, text in enumerate(["{{ a }}", "{{ b }}\n", None, "{{ b }}"])]

    assert chat.template("auto", folders) == "{{ b }}\n"


def test_of_equally_common_templates_auto_is_the_first(tmp_path: Path) -> None:
    folders = [folder(tmp_path / str(i), text) for i, text in enumerate(["{{ c }}", "{{ a }}", "{{ b }}"])]

    assert chat.template("auto", folders) == "{{ c }}"


@pytest.mark.parametrize(
    ("said", "file", "expected"),
    [
        ("{{ config }}", "{{ file }}", "{{ file }}"),
        ({"default": "{{ default }}", "tool_use": "{{ tools }}"}, None, "{{ default }}"),
        ([{"name": "tool_use", "template": "{{ t }}"}, {"name": "default", "template": "{{ d }}"}], None, "{{ d }}"),
        ({"tool_use": "{{ tools }}"}, None, None),
        (None, None, None),
    ],
)
def test_a_template_is_found_wherever_a_model_has_it(
    tmp_path: Path, said: Any, file: str | None, expected: str | None
) -> None:
    assert chat.template("auto", [folder(tmp_path / "model", said, file)]) == expected


def test_auto_without_any_template_is_none(tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()

    assert chat.template("auto", [tmp_path / "bare"]) is None


@pytest.mark.parametrize("text", ["no json", "[]", '{"chat_template": [{"name": "default"}]}'])
def test_a_damaged_template_is_named(tmp_path: Path, text: str) -> None:
    model = folder(tmp_path / "model")
    (model / "tokenizer_config.json").write_text(text, "utf-8")

    with pytest.raises(MergeError, match=r"chat template of .*/model cannot be read .*fetch the model again"):
        chat.template("auto", [model])


def test_a_template_of_the_recipes_own_is_taken_as_it_is() -> None:
    assert chat.template("{{ messages[0].content }}", []) == "{{ messages[0].content }}"


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(MergeError, match="'chatlm' is none of auto, alpaca, chatml, exaone, llama3, mistral"):
        chat.template("chatlm", [])
