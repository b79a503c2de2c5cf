"""Between text and tokens: prompts in, answers out as they grow."""

from __future__ import annotations

import hashlib
import json
import re
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from service.engines.base import Message, PromptError

if TYPE_CHECKING:
    from service.engines.local.expert import Expert

BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
HALF = "\ufffd"
"""What decoders write for bytes that are no whole character, or not yet."""


def encode(expert: Expert, prompt: str | tuple[Message, ...], *, within: int | None = None) -> tuple[int, ...]:
    """The prompt as the expert's tokens: text with the tokenizer's own marks, a chat in the template.

    Raises PromptError for a chat without a template, or for a text of far more than `within` tokens.
    """
    text = prompt if isinstance(prompt, str) else _chat(expert, prompt)
    marks = isinstance(prompt, str)  # a template writes its own
    # A megabyte takes a second, only to be refused: look at its head first. A word that the cut breaks may cost a few
    # tokens more than the whole.
    head = text if within is None else text[: 8 * within]
    if within is not None and len(head) < len(text) and len(_ids(expert, head, marks)) > within + 64:
        raise PromptError(f"a prompt of {len(text)} characters is over {expert.name}'s window of {within} tokens")
    ids = _ids(expert, text, marks)
    if ids:
        return ids
    for first in (expert.tokenizer.bos_token_id, expert.tokenizer.eos_token_id):
        if first is not None:
            return (first,)
    raise PromptError(f"the prompt is empty, and {expert.name} has no token to begin with")


class Alphabet:
    """The bytes of single tokens, as log-probabilities are told with.

    digest: of all tokens and their numbers; experts with the same can be mixed.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)
        decoder = json.loads(tokenizer.backend_tokenizer.to_str())["decoder"] or {}
        kinds = {each["type"] for each in decoder.get("decoders", [decoder]) if each}
        self._bytes = {char: byte for byte, char in enumerate(_byte_characters())} if "ByteLevel" in kinds else None
        # Here and not when it is asked for, in the event loop: of a large vocabulary it takes a tenth of a second.
        self.digest = hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()

    def raw(self, id_: int) -> bytes:
        """What a token stands for; a special one for its name, one that is none for nothing."""
        token = self._tokenizer.convert_ids_to_tokens(id_)
        if token is None:
            return b""
        if id_ in self._special:
            return str(token).encode()
        if self._bytes is not None and all(char in self._bytes for char in token):
            return bytes(self._bytes[char] for char in token)
        if byte := BYTE.fullmatch(token):
            return bytes([int(byte[1], 16)])
        return str(token).replace("\u2581", " ").encode()


class Detokenizer:
    """The text of one answer as its tokens come; never half a character, never a special token.

    All that `add` and `rest` return together is the tokenizer's decode of all tokens. The exception: with Llama 2's
    kind of byte tokens, bytes that are no text make decode take back good ones before them; what is out stays out.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # The tokens since the last whole character, after the stretch before them: some decoders drop a leading
        # space. Of their text, the first `_sent` characters are out.
        self._tokens: list[int] = []
        self._fresh = 0
        self._sent = 0

    def add(self, token: int) -> str:
        """The text that this token makes certain."""
        self._tokens.append(token)
        text = self._decode(self._tokens)
        piece = text.rstrip(HALF)[self._sent :]
        self._sent += len(piece)
        if piece and not text.endswith(HALF):
            self._tokens = self._tokens[self._fresh :]
            self._fresh = len(self._tokens)
            self._sent = len(self._decode(self._tokens))
        return piece

    def rest(self) -> str:
        """What was held back, when the answer is over."""
        return self._decode(self._tokens)[self._sent :]

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def _byte_characters() -> list[str]:
    """The characters that stand for the bytes 0 to 255 in byte-level vocabularies: printable ones for themselves."""
    plain = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


def _chat(expert: Expert, messages: tuple[Message, ...]) -> str:
    if not expert.tokenizer.chat_template:
        raise PromptError(f"{expert.name} has no chat template: send the prompt as text")
    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        text: str = expert.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    except TemplateError as exc:
        raise PromptError(f"{expert.name}'s chat template refuses these messages: {exc}") from exc
    return text


def _ids(expert: Expert, text: str, marks: bool) -> tuple[int, ...]:
    return tuple(expert.tokenizer(text, add_special_tokens=marks, verbose=False)["input_ids"])
