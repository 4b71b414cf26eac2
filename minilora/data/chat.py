r"""A conversation as token ids, and which of them are learned.

    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]

    <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n
                                                           ~~~~~~~~~~~~~~~     learned: what the assistant writes, and its end token

The wording is a Jinja template, the tokenizer's own or one of `minilora.data.templates`; it comes from a
model's files, so it runs in a sandbox, which knows no files and no Python. What it sees and what comes out
are as in transformers' `apply_chat_template`.

The text is tokenized as a whole, and special tokens are those that the template writes: no BOS is added to
its own. A token is learned if one of its characters is. Which characters are, nobody searches for. A template
with {% generation %} blocks says it, by marks that the blocks put around their text and that are taken out
again. For any other template

    the start of an answer   is the end of its prompt, render(messages before it, add_generation_prompt=True), where that is how
                             the whole text begins; else where a mark put in front of the answer comes out
    its end                  is where a mark put behind it comes out, plus the special token that follows, if there is one

and a mark counts only if the text without it is the text. A template that changes an answer beyond
recognition is refused.
"""

import json
import re
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import cached_property, lru_cache
from itertools import accumulate, chain
from pathlib import Path

import jinja2
import numpy as np
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from minilora.data.templates import MISTRAL_V1, TEMPLATES
from minilora.data.tokenizer import Tokenizer
from minilora.system.errors import UserError, suggestion

Message = dict[
    str, object
]  # {"role": "user", "content": "Hi"}; what else is in it is for the template to read
TOKENIZER_TEMPLATE = "tokenizer"  # the name of the template that the tokenizer's files hold


def training_clock() -> datetime:
    """What templates that print the date are told: with today's, tokens would change overnight, and no
    resumed run be exact.
    """
    return datetime(2024, 7, 26)


def load_chat_template(
    name: str | None, tokenizer: Tokenizer, now: Callable[[], datetime] = datetime.now
) -> "ChatTemplate | None":
    """A template by its name; `tokenizer`: the tokenizer's own; None: its own if it has one, else None.

    `now` is the clock of templates that tell the model the date. Raises UserError for a name that is not
    known, and for a template that the tokenizer lacks a token for.
    """
    if name in (None, TOKENIZER_TEMPLATE):
        if tokenizer.chat_template is None:
            if name is None:
                return None
            raise UserError(
                f"template = {TOKENIZER_TEMPLATE}, but the tokenizer has no chat_template; choose from {', '.join(TEMPLATES)}"
            )
        return ChatTemplate(TOKENIZER_TEMPLATE, tokenizer.chat_template, tokenizer, now)
    if name not in TEMPLATES:
        raise UserError(
            f"template = {name!r} is not known{suggestion(name, [*TEMPLATES, TOKENIZER_TEMPLATE])}"
        )
    source = MISTRAL_V1 if name == "mistral" and tokenizer.token_id("[INST]") is None else TEMPLATES[name]
    for token in re.findall(r"<\|\w+\|>", source):
        if tokenizer.token_id(token) is None:
            raise UserError(
                f"template = {name} needs the token {token}, which the tokenizer lacks; plain and alpaca need none"
            )
    if "eos_token" in source and tokenizer.eos_id is None:
        raise UserError(
            f"template = {name} ends answers with EOS, and the tokenizer names none; set eos_token in its config"
        )
    if not tokenizer.puts_bos:
        source = "{%- set bos_token = '' %}" + source
    space = "" if _is_text_of_its_own(tokenizer) else " "
    return ChatTemplate(name, "{%- set space = '" + space + "' %}" + source, tokenizer, now)


def answer_end(tokenizer: Tokenizer) -> int | None:
    """The token that answers end with under the tokenizer's own template; None if there is no template, or
    none that says.
    """
    try:
        template = load_chat_template(None, tokenizer)
        return template and template.end_id
    except UserError:  # it takes no such conversation: who uses it finds out where one is given
        return None


class ChatTemplate:
    """A template and the tokenizer it writes for. Made by `load_chat_template`."""

    def __init__(
        self, name: str, source: str, tokenizer: Tokenizer, now: Callable[[], datetime] = datetime.now
    ):
        self.name, self.source = name, source
        self._tokenizer, self._now = tokenizer, now
        _compile(source)  # a template that is no Jinja is told at once

    def encode(
        self, messages: Sequence[Message], mask_history: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """The ids of a conversation, int32 (T,), and which of them are learned, bool (T,): all answers, or the
        last one only.

        Raises UserError for what the template refuses, in the template's own words.
        """
        escape, *generation = _unused_characters(messages, 3)
        messages = self._escape(messages, escape)
        text, spans = self._find_blocks(messages, generation)
        tokens, places = self._tokenizer.encode_with_offsets(text, escape)
        if not spans:
            found = self._find_answers(messages, text)
            spans = [(start, self._with_end_token(text, end, tokens, places)) for start, end in found]
        if mask_history:  # an answer may have several blocks
            history = self._find_end_of_history(messages, text)
            spans = [span for span in spans if span[0] >= history] or spans[-1:]
        loss_mask = np.zeros(len(tokens), dtype=bool)
        begins, ends = (
            places[:, 0],
            np.maximum(places[:, 1], places[:, 0] + 1),
        )  # what stands for no character goes with the next
        for start, end in spans:
            loss_mask |= (start < end) & (begins < end) & (ends > start)
        return np.array(tokens, dtype=np.int32), loss_mask

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """The ids of a conversation up to where the assistant goes on."""
        (escape,) = _unused_characters(messages, 1)
        text = self._render(self._escape(messages, escape), add_generation_prompt=True)
        return self._tokenizer.encode_with_offsets(text, escape)[0]

    @cached_property
    def end_id(self) -> int | None:
        """The token that an answer ends with; None if it ends with text, as no good template lets it.

        Raises UserError for a template that refuses the simplest conversation.
        """
        input_ids, loss_mask = self.encode(
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        )
        last = int(input_ids[loss_mask][-1])
        return last if self._tokenizer.is_special(last) else None

    def save(self, directory: str | Path) -> None:
        """Write chat_template.jinja, where servers and `load_tokenizer` look first. {% generation %} is left
        out: few know it.
        """
        source = re.sub(r"\{%(-?)\s*generation\s*(-?)%\}", r"{%\1 if true \2%}", self.source)
        source = re.sub(r"\{%(-?)\s*endgeneration\s*(-?)%\}", r"{%\1 endif \2%}", source)
        (Path(directory) / "chat_template.jinja").write_text(source, encoding="utf-8")

    def _render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        generation: Sequence[str] = ("", ""),
    ) -> str:
        variables = dict(self._tokenizer.special_tokens, strftime_now=lambda form: self._now().strftime(form))
        variables |= dict(generation_marks=generation, add_generation_prompt=add_generation_prompt)
        try:
            return render(self.source, messages, **variables)
        except UserError as error:
            raise UserError(f"the chat template {self.name} says: {error}") from error

    def _escape(self, messages: Sequence[Message], mark: str) -> list[Message]:
        """What people wrote, so that special tokens in it can be told from the template's."""
        escape = self._tokenizer.escape
        return [
            {
                key: escape(value, mark) if isinstance(value, str) and key != "role" else value
                for key, value in message.items()
            }
            for message in messages
        ]

    def _find_blocks(
        self, messages: Sequence[Message], marks: Sequence[str]
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text, and the characters [start, end) of its {% generation %} blocks."""
        text, found = _take_out(marks, self._render(messages, generation=marks))
        if [mark for mark, _ in found] != [*marks] * (len(found) // 2):
            raise UserError(
                f"the chat template {self.name} cuts a {{% generation %}} block, or puts one into another; let it print each whole"
            )
        places = [place for _, place in found]
        return text, list(zip(places[::2], places[1::2], strict=True))

    def _find_end_of_history(self, messages: list[Message], text: str) -> int:
        """The character behind the message before the last answer; behind the text, if that message cannot be
        found in it.
        """
        last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=0)
        if last == 0:
            return 0
        words = messages[last - 1]["content"]
        places = {last - 1: (len(words), len(words.rstrip()))}
        (end,) = self._find_marks(messages, places, text, _unused_characters(messages, 1))
        return len(text) if end is None else end

    def _find_answers(self, messages: list[Message], text: str) -> list[tuple[int, int]]:
        """The characters [start, end) of every answer in the text; see the module's docstring."""
        answers = {
            i: message["content"] for i, message in enumerate(messages) if message["role"] == "assistant"
        }
        if not answers:
            return []
        marks = _unused_characters(messages, len(answers))
        starts = self._find_marks(
            messages, {i: (0, len(words) - len(words.lstrip())) for i, words in answers.items()}, text, marks
        )
        ends = self._find_marks(
            messages, {i: (len(words), len(words.rstrip())) for i, words in answers.items()}, text, marks
        )
        spans = []
        for i, start, end in zip(answers, starts, ends, strict=True):
            if (prompt_end := self._find_prompt_end(messages[:i], text, start)) is not None:
                start = prompt_end
            if start is None or end is None or start > end:
                raise UserError(
                    f"the chat template {self.name} changes answer {len(spans) + 1} so that it cannot be found in the text; "
                    "put {% generation %} and {% endgeneration %} around answers in the template"
                )
            spans.append((start, end))
        return spans

    def _find_marks(
        self, messages: list[Message], places: dict[int, tuple[int, int]], text: str, marks: Sequence[str]
    ) -> list[int | None]:
        """Where marks come out that are put into messages, {message: (place, place inside of its blanks)}, if
        at all.

        All at once where that works, else one half and the other. Templates may strip messages: for a mark
        that is alone and does not come out of the first place, there is the second.
        """
        for choice in range(2 if len(places) == 1 else 1):
            marked = list(messages)
            for (i, choices), mark in zip(places.items(), marks, strict=True):
                words, place = messages[i]["content"], choices[choice]
                marked[i] = messages[i] | {"content": words[:place] + mark + words[place:]}
            plain, found = _take_out(marks, self._render(marked))
            if plain == text and [mark for mark, _ in found] == list(marks):
                return [place for _, place in found]
        if len(places) == 1:
            return [None]
        half, items = len(places) // 2, list(places.items())
        return [
            *self._find_marks(messages, dict(items[:half]), text, marks[:half]),
            *self._find_marks(messages, dict(items[half:]), text, marks[half:]),
        ]

    def _find_prompt_end(self, messages: list[Message], text: str, answer_start: int | None) -> int | None:
        """Where the prompt ends that the model will be given. Not every template has a prompt that calls for
        an answer.
        """
        try:
            prompt = self._render(messages, add_generation_prompt=True)
            if not text.startswith(prompt):
                return None
            is_call = answer_start is not None and not text[len(prompt) : answer_start].strip()
            return len(prompt) if is_call or prompt != self._render(messages) else None
        except UserError:
            return None

    def _with_end_token(self, text: str, end: int, tokens: Sequence[int], places: np.ndarray) -> int:
        """The end of an answer with its end token: the next token but for blanks, if it is special."""
        for i in range(int(np.searchsorted(places[:, 0], end)), len(tokens)):
            begin, stop = places[i].tolist()
            if begin < stop and not text[begin:stop].isspace():
                return stop if self._tokenizer.is_special(tokens[i]) else end
        return end


def render(source: str, messages: Sequence[Message], **variables: object) -> str:
    """The text that a template makes of a conversation. Raises UserError with what the template says against
    it.
    """
    try:
        return _compile(source).render(messages=messages, tools=None, documents=None, **variables)
    except Exception as error:  # a template is a program, and can fail in every way
        raise UserError(" ".join(str(error).split()) or type(error).__name__) from error


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %}: the text between, inside the two marks that are given as
    generation_marks.
    """

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.CallBlock:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    @jinja2.pass_context
    def _mark(self, context: jinja2.runtime.Context, caller: Callable[[], str]) -> str:
        start, end = context.get("generation_marks", ("", ""))
        return start + caller() + end


@lru_cache
def _compile(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise_exception,
        "dict": lambda *items, **named: dict(*items, **named),
    }
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(
            f"the chat template is not valid Jinja, line {error.lineno}: {error.message}"
        ) from error
    except (
        Exception
    ) as error:  # nested too deeply, numbers that are too long, names that Python keeps for itself
        raise UserError(
            f"the chat template cannot be compiled: {' '.join(str(error).split()) or type(error).__name__}"
        ) from error


def _to_json(value: object, ensure_ascii: bool = False, **options: object) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, **options
    )  # Jinja's own filter writes <, > and & for HTML


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _unused_characters(messages: Sequence[Message], count: int) -> list[str]:
    """Characters that no text of the conversation holds. Unicode keeps 32 for such a use: they never stand
    for anything.
    """
    used = set(json.dumps(messages, ensure_ascii=False, default=str))
    candidates = chain(range(0xFDD0, 0xFDF0), range(0xF0000, 0xFFFFE))
    found = (chr(i) for i in candidates if chr(i) not in used)
    return [next(found) for _ in range(count)]


def _take_out(marks: Sequence[str], text: str) -> tuple[str, list[tuple[str, int]]]:
    """The text without the marks; and the marks that were in it, with their places in the text without."""
    parts = re.split("([" + "".join(marks) + "])", text)  # text, mark, text, ..., text
    return "".join(parts[::2]), list(zip(parts[1::2], accumulate(map(len, parts[::2])), strict=False))


def _is_text_of_its_own(tokenizer: Tokenizer) -> bool:
    """Whether what follows a special token has the tokens of a text that stands alone, "▁" in front and all."""
    special = next(iter(tokenizer.special_tokens.values()), None)
    if special is None:
        return True
    after = tokenizer.encode_with_offsets(special + "a")[0][1:]
    return after == tokenizer.encode("a", bos=False)
