"""Zoo files: every mistake is refused with its place and the nearest known word; the shipped ones are the paper's."""

from __future__ import annotations

from pathlib import Path

import pytest

from builder.config import Model, Zoo, load_zoo, zoo_names
from builder.errors import ZooError

PAPER = (
    "migtissera/Synthia-7B-v1.2",
    "neuralmagic/Llama-2-7b-evolcodealpaca",
    "teknium/OpenHermes-7B",
    "PygmalionAI/pygmalion-2-7b",
    "meta-llama/Llama-2-7b-chat-hf",
    "Severus27/BeingWell_llama2_7b",
    "meta-math/MetaMath-7B-V1.0",
    "lmsys/vicuna-7b-v1.5",
    "garage-bAInd/Platypus2-7B",
    "GOAT-AI/GOAT-7B-Community",
    "stanford-oval/Llama-2-7b-WikiChat-fused",
    "cognitivecomputations/dolphin-llama2-7b",
    "meta-math/MetaMath-Llemma-7B",
    "codellama/CodeLlama-7b-Instruct-hf",
    "ise-uiuc/Magicoder-S-CL-7B",
    "LLM360/CrystalChat",
)
"""The models of Which16, in the paper's order."""

GOOD = """
name = "mine"

[[bases]]
id = "llama2"
source = "meta-llama/Llama-2-7b-hf"

[[models]]
id = "vicuna"
source = "lmsys/vicuna-7b-v1.5"
base = "llama2"
subject = "chat"

[subjects]
chat = ["chat"]

[proxy]
tasks = ["tinyMMLU"]

[router]
features = "vicuna"
"""


def mistakes(tmp_path: Path, text: str) -> list[str]:
    """The lines of what load_zoo says of a file, without the file's name."""
    file = tmp_path / "mine.toml"
    file.write_text(text, "utf-8")
    with pytest.raises(ZooError) as caught:
        load_zoo(str(file))
    return [line.removeprefix(f"{file}: ") for line in str(caught.value).splitlines()]


def loaded(folder: Path, text: str) -> Zoo:
    (folder / "mine.toml").write_text(text, "utf-8")
    return load_zoo(str(folder / "mine.toml"))


@pytest.mark.parametrize(
    ("right", "wrong", "sentence"),
    [
        ('name = "mine"', 'name = "mine"\nexpert = 3', "unknown key expert (did you mean 'experts'?)"),
        ('source = "lmsys', 'sorce = "lmsys', "unknown key models.0.sorce (did you mean 'source'?)"),
        ('tasks = ["tinyMMLU"]', 'tasks = ["a"]\nlimits = 3', "unknown key proxy.limits (did you mean 'limit'?)"),
        ("features =", "feature =", "unknown key router.feature (did you mean 'features'?)"),
    ],
)
def test_a_misspelt_key_is_refused_with_its_place_and_the_nearest(
    tmp_path: Path, right: str, wrong: str, sentence: str
) -> None:
    assert mistakes(tmp_path, GOOD.replace(right, wrong))[-1].startswith(sentence)


def test_all_misspelt_keys_are_named_at_once(tmp_path: Path) -> None:
    text = GOOD.replace("subject =", "subjct =").replace("[proxy]", "[proxi]").replace("chat = [", "chat = 3 #")

    lines = "\n".join(mistakes(tmp_path, text))

    assert "models.0.subjct" in lines
    assert "did you mean 'proxy'" in lines
    assert "subjects.chat" in lines


def test_all_names_that_lead_nowhere_are_named_at_once(tmp_path: Path) -> None:
    text = GOOD.replace('base = "llama2"', 'base = "lama2"').replace('subject = "chat"', 'subject = "chats"')
    text = text.replace('features = "vicuna"', 'features = "vicunia"')

    assert mistakes(tmp_path, text) == [
        "model 'vicuna' has the base 'lama2', which [[bases]] does not list (did you mean 'llama2'?)",
        "model 'vicuna' has the subject 'chats', which [subjects] does not list (did you mean 'chat'?)",
        "router.features is 'vicunia', which [[bases]] and [[models]] does not list (did you mean 'vicuna'?)",
    ]


def test_a_zoo_without_models_is_refused(tmp_path: Path) -> None:
    head, _, rest = GOOD.partition("[[models]]")
    text = f"models = []\n{head}{rest[rest.index('[subjects]') :]}"

    assert "a zoo needs at least one model" in mistakes(tmp_path, text)


def test_two_models_of_one_name_are_refused(tmp_path: Path) -> None:
    assert "two models are called 'llama2'" in mistakes(tmp_path, GOOD.replace('id = "vicuna"', 'id = "llama2"'))


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ('adapter = "./lora"', "models.0: an adapter needs a base"),
        ("", "models.0: give either source or adapter"),
        ('source = "a/b"\nadapter = "./lora"', "models.0: give either source or adapter"),
    ],
)
def test_a_model_has_a_source_or_an_adapter_with_a_base(tmp_path: Path, source: str, sentence: str) -> None:
    text = GOOD.replace('source = "lmsys/vicuna-7b-v1.5"\nbase = "llama2"', source)

    assert mistakes(tmp_path, text) == [sentence]


def test_a_tiny_model_is_of_a_known_domain_and_has_its_base(tmp_path: Path) -> None:
    assert mistakes(tmp_path, GOOD.replace("lmsys/vicuna-7b-v1.5", "tiny:mat")) == [
        "'vicuna' trains on 'mat', which the tiny corpus does not list (did you mean 'math'?)",
        "tiny models are branches of the base called 'base', which [[bases]] does not list",
    ]


def test_relative_paths_count_from_the_folder_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    text = GOOD.replace("meta-llama/Llama-2-7b-hf", "gguf:base.gguf").replace("lmsys/vicuna-7b-v1.5", "../vicuna")
    text += '[[models]]\nid = "lora"\nadapter = "adapters/x"\nbase = "llama2"\nsubject = "chat"\n'
    (tmp_path / "zoos").mkdir()
    zoo = loaded(tmp_path / "zoos", text)
    monkeypatch.chdir(elsewhere)

    lora = zoo.entry("lora")
    assert zoo.entry("llama2").source == f"gguf:{tmp_path}/zoos/base.gguf"
    assert zoo.entry("vicuna").source == f"{tmp_path}/vicuna"
    assert isinstance(lora, Model)
    assert lora.adapter == f"{tmp_path}/zoos/adapters/x"


def test_hub_ids_and_packaged_adapters_are_no_paths(tmp_path: Path) -> None:
    zoo = loaded(tmp_path, GOOD.replace('source = "lmsys/vicuna-7b-v1.5"', 'adapter = "demo:math"'))
    model = zoo.models[0]

    assert zoo.bases[0].source == "meta-llama/Llama-2-7b-hf"
    assert model.adapter == "demo:math"


def test_a_model_takes_what_it_does_not_say_from_its_base_and_its_zoo(tmp_path: Path) -> None:
    text = GOOD.replace('name = "mine"', 'name = "mine"\nrevision = "main"')
    text = text.replace('id = "llama2"', 'id = "llama2"\nfamily = "llama-2"\nparameters = 7\nrevision = "v2"')
    zoo = loaded(tmp_path, text)

    assert (zoo.models[0].family, zoo.models[0].parameters, zoo.models[0].revision) == ("llama-2", 7, "main")
    assert zoo.bases[0].revision == "v2"


def test_a_zoo_cannot_be_changed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        loaded(tmp_path, GOOD).seed = 1


def test_an_unknown_zoo_suggests_the_nearest() -> None:
    with pytest.raises(ZooError, match=r"no zoo 'wich16' \(did you mean 'which16'\?\)"):
        load_zoo("wich16")


@pytest.mark.parametrize("content", [b"name = ", b"\xff\xfe\x00"])
def test_a_file_that_is_not_toml_says_so(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.toml").write_bytes(content)

    with pytest.raises(ZooError, match="is not TOML"):
        load_zoo(str(tmp_path / "x.toml"))


@pytest.mark.parametrize("name", zoo_names())
def test_every_shipped_zoo_loads(name: str) -> None:
    assert load_zoo(name).name == name


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("which2", (5, 8)),
        ("which4", (1, 2, 4, 7)),
        ("which4-chat", (1, 3, 5, 8)),
        ("which8", (1, 2, 3, 4, 5, 7, 8, 9)),
        ("which12", range(1, 13)),
        ("which16", range(1, 17)),
    ],
)
def test_the_papers_zoos_hold_the_papers_models_in_its_order(name: str, numbers: tuple[int, ...]) -> None:
    zoo = load_zoo(name)

    assert [model.source for model in zoo.models] == [PAPER[number - 1] for number in numbers]
    assert {model.family for model in zoo.models} <= {"llama-2", "codellama", "llemma", "crystal"}
    assert all(model.parameters and model.revision for model in zoo.models)


@pytest.mark.parametrize("name", ["which2", "which4", "which4-chat", "which8", "which12", "which16"])
def test_only_a_model_of_custom_code_may_run_its_code(name: str) -> None:
    trusted = [model.id for model in load_zoo(name).models if model.trust_remote_code]

    assert trusted == (["crystalchat"] if name == "which16" else [])


def test_a_models_subject_is_the_one_it_has_in_that_zoo() -> None:
    subjects = {zoo: {m.id: m.subject for m in load_zoo(zoo).models} for zoo in ("which2", "which4-chat", "which16")}

    assert subjects["which2"] == {"llama2-chat": "chat", "vicuna": "code"}
    assert subjects["which4-chat"] == {
        "synthia": "chat",
        "openhermes": "code",
        "llama2-chat": "story",
        "vicuna": "math",
    }
    assert subjects["which16"]["vicuna"] == "chat"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('name = "mine"', 'name = "mine"\nseed = -1', "seed: Input should be greater than or equal to 0"),
        ('chat = ["chat"]', 'chat = [" "]', "subjects.chat.0"),
        ('["tinyMMLU"]', '["tinyMMLU", "tinyMMLU"]', "proxy.tasks names tinyMMLU twice"),
        ('"vicuna"', '"auto"', "no model may be called 'auto'"),
        ('"vicuna"', '"x.partial"', "no model may be called 'x.partial'"),
    ],
)
def test_values_that_would_fail_later_are_refused_at_once(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert any(said in line for line in mistakes(tmp_path, GOOD.replace(old, new)))


def test_an_experts_public_source_holds_no_folder_of_this_machine(tmp_path: Path) -> None:
    from builder.experts import public_source

    folder = tmp_path / "Jane Doe" / "chat"
    sources = {
        str(folder): "chat",
        f"gguf:{folder}.gguf": "gguf:chat.gguf",
        "org/name": "org/name",
        "pypi:a==1/b.gguf": "pypi:a==1/b.gguf",
    }
    for source, public in sources.items():
        assert public_source(Model(id="m", source=source, subject="s")) == public
    assert public_source(Model(id="m", base="b", adapter=str(folder), subject="s")) == "b + chat"
