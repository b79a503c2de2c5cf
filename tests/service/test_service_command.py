"""The command line: what it says when it cannot serve, and that it serves and stops."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ROOT, read_until, service_process
from tokenizers import Tokenizer

from routers.prompt import PromptRouter
from service.__main__ import answer_all
from service.engines.echo import EchoEngine
from service.server import address, listen

COMMAND = (sys.executable, "-m", "service")


def test_a_missing_bundle_is_a_sentence(tmp_path: Path) -> None:
    ran = run("--bundle", str(tmp_path / "nowhere"))
    assert ran.returncode == 1
    assert ran.stderr.startswith("error: no manifest.json in ")
    assert ran.stderr.count("\n") == 1


def test_a_port_in_use_is_a_sentence_that_names_it(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        ran = run("--bundle", str(folder), "--port", str(port))
    assert ran.returncode == 1
    assert ran.stderr.startswith(f"error: port {port} of 127.0.0.1 is in use: ")
    assert "--port" in ran.stderr
    assert ran.stderr.count("\n") == 1


def test_a_host_that_is_not_ours_is_a_sentence(folder: Path) -> None:
    ran = run("--bundle", str(folder), "--host", "192.0.2.1")
    assert ran.returncode == 1
    assert ran.stderr.startswith("error: port 8000 of 192.0.2.1 cannot be opened")


def test_answers_do_not_wait_for_the_clients_acknowledgement() -> None:
    with listen("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize(
    ("host", "shown"), [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "localhost"), ("::1", "[::1]"), ("::", "localhost")]
)
def test_the_address_is_one_that_a_browser_opens(host: str, shown: str) -> None:
    with listen(host, 0) as listening:
        assert address(host, listening) == f"http://{shown}:{listening.getsockname()[1]}/"


def test_what_is_asked_is_answered_with_its_expert_and_why(
    router: PromptRouter, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = EchoEngine(router.experts, window=100)
    asyncio.run(answer_all(["python loop [class]", "one " * 99, "the owl"], router, engine))
    first, second, third = capsys.readouterr().out.strip().split("\n\n")
    asked, reason, answer = first.splitlines()
    assert asked == "> python loop [class]"
    assert reason.startswith("code (top_score): score 0.")
    assert "margin" in reason
    assert "words: " in reason
    assert "python +" in reason
    assert answer == "python loop [class]"
    assert "error: 99 tokens" in second
    assert third.endswith("the owl")


@pytest.mark.slow  # loads torch
@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
def test_serves_a_bundle_and_stops_when_told(folder: Path, tokenizer: Tokenizer, ending: signal.Signals) -> None:
    import transformers

    for name in ("math", "code"):  # `story` has no files, and the others serve all the same
        config = transformers.LlamaConfig(
            vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=128, bos_token_id=None, eos_token_id=0,
        )  # fmt: skip
        transformers.LlamaForCausalLM(config).save_pretrained(folder / "experts" / name)
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
        fast.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
        fast.save_pretrained(folder / "experts" / name)

    with service_process([*COMMAND, "--bundle", folder, "--port", 0, "--ask", "python loop"]) as service:
        body = {"prompt": "python loop", "max_tokens": 3, "temperature": 0}
        answer = service.client.post("/v1/completions", json=body)
        assert answer.json()["model"] == "code"
        failed = service.client.post("/v1/completions", json={"prompt": "owl", "model": "story"})
        assert failed.status_code == 503
        assert "> python loop\ncode (top_score): score " in read_until("code (", service.process)
        service.process.send_signal(ending)
        assert service.process.wait(60) == 0


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)
