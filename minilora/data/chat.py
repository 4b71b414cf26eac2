r"""A conversation as token ids, and a mask of the tokens that are learned: the assistant's answers.

    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]

    <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n
                                                           ~~~~~~~~~~~~~~~   learned: the answer and its end

A Jinja template writes the text: the tokenizer's own, or one of `minilora.data.templates`. Its variables and
its text are those of transformers' `apply_chat_template`. There are four steps:

    escape      special tokens that a person typed, so that they stay text
    render      the messages as one text
    locate      the characters [start, end) of every answer in that text; `ChatTemplate` says how
    tokenize    the whole text; a token is learned if one of its characters belongs to an answer

Special tokens are those that the template writes. The tokenizer adds no BOS to them.
"""

import re
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import cached_property
from os.path import commonprefix
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minilora.data.jinja_sandbox import TemplateError, compile_template, render
from minilora.data.markers import (
    Span,
    back,
    front,
    remove_markers,
    spans_of_tokens,
    unused_characters,
)
from minilora.data.messages import Message, is_learned, lost_thoughts, thoughts_of
from minilora.data.template_process import check_apart, render_apart
from minilora.data.templates import MISTRAL_V1, TEMPLATES
from minilora.data.tokenizer import Tokenizer
from minilora.system.errors import UserError, suggestion

TOKENIZER_TEMPLATE = "tokenizer"  # the name of the template in the tokenizer's own files
# Without blocks, a conversation of n answers takes up to 8 n renderings of all its messages.
_MOST_ANSWERS = 500


# ---- choosing a template ----


def load_chat_template(
    name: str | None, tokenizer: Tokenizer, now: Callable[[], datetime] = datetime.now
) -> "ChatTemplate | None":
    """Return the template of this name.

    "tokenizer" is the tokenizer's own template. None is that template too, or no template if the tokenizer
    has none. `now` is the clock for templates that print the date. Raises UserError for an unknown name, and
    for a template that needs a token which the tokenizer lacks.
    """
    if name in (None, TOKENIZER_TEMPLATE):
        if tokenizer.chat_template is not None:
            return ChatTemplate(TOKENIZER_TEMPLATE, tokenizer.chat_template, tokenizer, now)
        if name is None:
            return None
        names = ", ".join(TEMPLATES)
        raise UserError(f"template = {name}, but the tokenizer has no chat_template; choose from {names}")
    if name not in TEMPLATES:
        nearest = suggestion(name, [*TEMPLATES, TOKENIZER_TEMPLATE])
        raise UserError(f"template = {name!r} is not known{nearest}")
    return ChatTemplate(name, _adapted_source(name, tokenizer), tokenizer, now, trusted=True)


def training_clock() -> datetime:
    """Return one fixed date for templates that print the date.

    With today's date, tokens would change overnight, and a resumed run would not be exact.
    """
    return datetime(2024, 7, 26)


def answer_end(tokenizer: Tokenizer) -> int | None:
    """Return the id that ends an answer in the tokenizer's own template, or None if it is not known."""
    try:
        template = load_chat_template(None, tokenizer)
        return template and template.end_id
    except UserError:  # the template refuses the test conversation; it may still accept real ones
        return None


def _adapted_source(name: str, tokenizer: Tokenizer) -> str:
    """Return the source of a named template, adapted to the special tokens of this tokenizer."""
    source = TEMPLATES[name]
    if name == "mistral" and tokenizer.token_id("[INST]") is None:
        source = MISTRAL_V1
    for token in re.findall(r"<[|｜][\w▁]+[|｜]>", source):
        if tokenizer.token_id(token) is None:
            raise UserError(
                f"template = {name} needs the token {token}, which the tokenizer lacks; "
                "plain and alpaca need no such token"
            )
    if "eos_token" in source and tokenizer.eos_id is None:
        raise UserError(
            f"template = {name} ends answers with EOS, but the tokenizer names none; "
            "set eos_token in tokenizer_config.json"
        )
    if not tokenizer.puts_bos:
        source = "{%- set bos_token = '' %}" + source
    space = "" if _restarts_after_special_token(tokenizer) else " "
    return "{%- set space = '" + space + "' %}" + source


def _restarts_after_special_token(tokenizer: Tokenizer) -> bool:
    """Whether text behind a special token gets the ids of a text that stands alone, "▁" in front included."""
    special = next(iter(tokenizer.special_tokens.values()), None)
    if special is None:
        return True
    ids_behind = tokenizer.encode_with_offsets(special + "a")[0][1:]
    return ids_behind == tokenizer.encode("a", bos=False)


# ---- from a conversation to ids ----


class Encoded(NamedTuple):
    """A conversation of T tokens."""

    input_ids: np.ndarray  # int32 (T,)
    loss_mask: np.ndarray  # bool (T,): True where a token is learned
    answers: np.ndarray  # int32 (T,): 1, 2, ... for the tokens of the first answer, the second, ...; else 0
    lost_thoughts: int  # answers whose thoughts the template leaves out


class ChatTemplate:
    """A chat template and the tokenizer it writes for. Made by `load_chat_template`.

    There are three ways to locate the answers in the rendered text:

    1. By blocks: `_render_with_blocks`. A template may put {% generation %} blocks around its answers. Each
       block prints a marker before and behind its text, a character that occurs nowhere else. The markers are
       removed.
    2. By the prompt: `_start_by_prompt`. An answer starts where its prompt ends. The prompt is
       render(messages before the answer, add_generation_prompt=True), and the whole text must begin with it.
    3. By markers in the messages: `_locate_markers`. A marker in front of an answer comes out where the
       answer starts, a marker behind it where it ends. Without the markers, the text must be the original.

    Blocks decide if there are any. Without blocks, the prompt gives the start of an answer, or else a marker
    does; a marker gives its end, and a special token that follows is its end token. An answer that none of
    the three ways can locate is refused.
    """

    def __init__(
        self,
        name: str,
        source: str,
        tokenizer: Tokenizer,
        now: Callable[[], datetime] = datetime.now,
        trusted: bool = False,  # one of `minilora.data.templates`, which needs no process of its own
    ):
        self.name, self.source = name, source
        self._tokenizer, self._now, self._trusted = tokenizer, now, trusted
        try:  # here, not at the first conversation
            compile_template(source) if trusted else check_apart(source)
        except TemplateError as error:
            raise UserError(f"the chat template {error}") from error

    def encode(
        self, messages: Sequence[Message], mask_history: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of a conversation, int32 (T,), and its loss mask, bool (T,); see `encode_all`."""
        return self.encode_all(messages, mask_history)[:2]

    def encode_all(self, messages: Sequence[Message], mask_history: bool = False) -> Encoded:
        """Return a conversation as tokens.

        All answers are learned but those with `train: False`; with `mask_history` only the last one. Raises
        UserError if the template refuses the conversation, with the template's own message.
        """
        escape, *markers = unused_characters(messages, 3)
        messages = self._escape(messages, escape)
        text, spans = self._render_with_blocks(messages, markers)
        ids, offsets = self._tokenizer.encode_with_offsets(text, escape)
        if not spans:
            answers = self._locate_answers(messages, text)
            spans = [(start, self._include_end_token(text, end, ids, offsets)) for start, end in answers]
        learned = self._learned(messages, spans)
        if mask_history:
            # The last answer may have several blocks. If the end of the history is unknown, only the last
            # block is learned.
            history_end = self._locate_history_end(messages, text)
            last = [i for i, span in enumerate(spans) if span[0] >= history_end] or [len(spans) - 1]
            learned = [i for i in last if i in learned]
        numbers = spans_of_tokens(offsets, spans)
        loss_mask = np.isin(numbers, [i + 1 for i in learned])
        return Encoded(np.array(ids, dtype=np.int32), loss_mask, numbers, lost_thoughts(messages, text))

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of a conversation up to the start of the assistant's next answer."""
        (escape,) = unused_characters(messages, 1)
        text = self._render(self._escape(messages, escape), add_generation_prompt=True)
        return self._tokenizer.encode_with_offsets(text, escape)[0]

    def prompt_mismatch(self, messages: Sequence[Message]) -> tuple[str, str] | None:
        """Return how the prompt of the last answer ends in generation, and how in training, if they differ.

        Then the model is asked for answers in a way in which it never learned to give them. A template does
        this that opens a thought in its generation prompt, for rows without thoughts; and one that puts words
        between its prompt and the answer, which nobody learns to write.
        """
        encoded, before = self.encode_all(messages), messages[:-1]
        try:
            prompt = self.encode_prompt(before)
            asked, trained = self._render(before, add_generation_prompt=True), self._render(messages)
        except UserError:  # a template may refuse a conversation that ends before the answer
            return None
        behind = encoded.input_ids[len(prompt) :]
        if encoded.input_ids[: len(prompt)].tolist() == prompt:
            between = behind[: int(np.argmax(encoded.answers[len(prompt) :] > 0))]
            if not any(self._tokenizer.is_special(int(i)) for i in between) and (
                not self._tokenizer.decode(between).strip()
            ):
                return None
        elif trained.startswith(asked):  # a token reaches from the prompt into the answer
            return None
        same = len(commonprefix([asked, trained]))
        shown = max(0, same - 20)
        return asked[shown:], trained[shown : same + 20]

    @cached_property
    def end_id(self) -> int | None:
        """The id of the token that ends an answer; None if answers end with text, as in no good template.

        Raises UserError for a template that refuses the simplest conversation.
        """
        conversation = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        input_ids, loss_mask = self.encode(conversation)
        last = int(input_ids[loss_mask][-1])
        return last if self._tokenizer.is_special(last) else None

    def save(self, directory: str | Path) -> None:
        """Write chat_template.jinja, the first file that servers and `load_tokenizer` look for.

        {% generation %} becomes {% if true %}, since few programs know it.
        """
        source = re.sub(r"\{%(-?)\s*generation\s*(-?)%\}", r"{%\1 if true \2%}", self.source)
        source = re.sub(r"\{%(-?)\s*endgeneration\s*(-?)%\}", r"{%\1 endif \2%}", source)
        (Path(directory) / "chat_template.jinja").write_text(source, encoding="utf-8")

    # ---- escape and render ----

    def _escape(self, messages: Sequence[Message], mark: str) -> list[Message]:
        """Return the messages with special tokens in their texts broken up by `mark`; roles stay."""

        def escaped(key: str, value: object) -> object:
            is_typed = isinstance(value, str) and key != "role"
            return self._tokenizer.escape(value, mark) if is_typed else value

        return [{key: escaped(key, value) for key, value in message.items()} for message in messages]

    def _render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        generation_markers: Sequence[str] = ("", ""),
    ) -> str:
        variables = {
            **self._tokenizer.special_tokens,
            "generation_markers": generation_markers,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            if not self._trusted:
                return render_apart(self.source, messages, self._now(), **variables)
            return render(self.source, {"messages": messages, **variables})
        except TemplateError as error:
            raise UserError(f"the chat template {self.name} {error}") from error

    # ---- locate: way 1, generation blocks ----

    def _render_with_blocks(
        self, messages: Sequence[Message], markers: Sequence[str]
    ) -> tuple[str, list[Span]]:
        """Return the rendered text, and the span of each {% generation %} block in it."""
        marked_text = self._render(messages, generation_markers=markers)
        text, removed, positions = remove_markers(marked_text, markers)
        if removed != [*markers] * (len(removed) // 2):  # start, end, start, end, ...
            raise UserError(
                f"the chat template {self.name} cuts or nests a {{% generation %}} block; "
                "it must print every block whole, and none inside another"
            )
        return text, list(zip(positions[::2], positions[1::2], strict=True))

    # ---- locate: ways 2 and 3, a template without blocks ----

    def _locate_answers(self, messages: list[Message], text: str) -> list[Span]:
        """Return the span of every answer, each without its end token."""
        answers = {i: m["content"] for i, m in enumerate(messages) if m["role"] == "assistant"}
        if not answers:
            return []
        if len(answers) > _MOST_ANSWERS:
            raise UserError(
                f"the conversation has {len(answers):,} answers, and the chat template {self.name} does not "
                f"mark them; at most {_MOST_ANSWERS} can be located; split the conversation, or put "
                "{% generation %} and {% endgeneration %} around answers in the template"
            )
        markers = unused_characters(messages, len(answers))
        fronts = {i: front(content) for i, content in answers.items()}
        backs = {i: back(content) for i, content in answers.items()}
        starts = self._locate_markers(messages, fronts, text, markers)
        ends = self._locate_markers(messages, backs, text, markers)
        spans = []
        for i, start, end in zip(answers, starts, ends, strict=True):
            prompt_end = self._start_by_prompt(messages[:i], text, start)
            if prompt_end is not None:
                start = prompt_end
            if start is None or end is None or start > end:
                raise UserError(self._unlocated(len(spans) + 1, messages[i]))
            spans.append((start, end))
        return spans

    def _unlocated(self, number: int, answer: Message) -> str:
        """Return the error for an answer that is not in the text as it was given, and what helps."""
        said = f"the chat template {self.name} changes answer {number} so that it cannot be found in the text"
        if thoughts_of(answer):
            marks = {"<｜Assistant｜>": "deepseekr1", "<|im_start|>": "qwen3_all"}
            named = [name for mark, name in marks.items() if self._tokenizer.token_id(mark) is not None]
            keeps = f"--template {named[0]} keeps them" if named else "choose another with --template"
            return f"{said}, since it has thoughts; {keeps}, or leave the thoughts out of the rows"
        return f"{said}; put {{% generation %}} and {{% endgeneration %}} around answers in the template"

    def _start_by_prompt(self, before: list[Message], text: str, marked_start: int | None) -> int | None:
        """Return where the prompt of an answer ends, or None if this says nothing about the answer.

        `before` are the messages before the answer; `marked_start` is its start by a marker.
        """
        try:
            prompt = self._render(before, add_generation_prompt=True)
            if not text.startswith(prompt):
                return None
            if marked_start is not None and not text[len(prompt) : marked_start].strip():
                return len(prompt)  # only blanks lie between the prompt and the answer
            # A template that ignores add_generation_prompt ends its prompt before the answer's header.
            knows_generation_prompt = prompt != self._render(before)
            return len(prompt) if knows_generation_prompt else None
        except UserError:  # a template may refuse a conversation that ends before the answer
            return None

    def _locate_markers(
        self,
        messages: list[Message],
        positions: dict[int, tuple[int, int]],
        text: str,
        markers: Sequence[str],
    ) -> list[int | None]:
        """Return for every marker the character of `text` where it comes out, or None.

        `positions` maps the index of a message to two positions in it: the second one lies inside of the
        message's outer blanks, since templates may strip them.

        All markers are tried at once, which takes one rendering for the whole conversation. If that fails,
        each half of them is tried. A marker that fails alone is tried at its second position.
        """
        if len(positions) == 1:
            ((i, choices),) = positions.items()
            for position in choices:
                located = self._try_markers(messages, {i: position}, text, markers)
                if located is not None:
                    return located
            return [None]
        first_positions = {i: first for i, (first, _) in positions.items()}
        located = self._try_markers(messages, first_positions, text, markers)
        if located is not None:
            return located
        half, items = len(positions) // 2, list(positions.items())
        return [
            *self._locate_markers(messages, dict(items[:half]), text, markers[:half]),
            *self._locate_markers(messages, dict(items[half:]), text, markers[half:]),
        ]

    def _try_markers(
        self, messages: list[Message], positions: dict[int, int], text: str, markers: Sequence[str]
    ) -> list[int] | None:
        """Return where the markers come out, or None if one is lost or the text without them differs."""
        marked = list(messages)
        for (i, position), marker in zip(positions.items(), markers, strict=True):
            content = messages[i]["content"]
            marked[i] = messages[i] | {"content": content[:position] + marker + content[position:]}
        unmarked_text, removed, located = remove_markers(self._render(marked), markers)
        return located if unmarked_text == text and removed == list(markers) else None

    def _include_end_token(self, text: str, end: int, ids: Sequence[int], offsets: np.ndarray) -> int:
        """Return the end of an answer with its end token: the next non-blank token, if it is special."""
        for i in range(int(np.searchsorted(offsets[:, 0], end)), len(ids)):
            token_start, token_end = offsets[i].tolist()
            if token_start < token_end and not text[token_start:token_end].isspace():
                return token_end if self._tokenizer.is_special(ids[i]) else end
        return end

    # ---- which of the located answers are learned ----

    def _learned(self, messages: Sequence[Message], spans: Sequence[Span]) -> list[int]:
        """Return the indices of the spans whose answers are learned."""
        learned = [is_learned(m) for m in messages if m["role"] == "assistant"]
        if all(learned):
            return [*range(len(spans))]
        if len(learned) != len(spans):
            raise UserError(
                f"the chat template {self.name} marks {len(spans)} parts as learned, and there are "
                f"{len(learned)} answers: which part is the one not to learn is unknown; leave the row out"
            )
        return [i for i, wanted in enumerate(learned) if wanted]

    def _locate_history_end(self, messages: list[Message], text: str) -> int:
        """Return the end of the message before the last answer, or len(text) if it cannot be located."""
        last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=0)
        if last == 0:
            return 0
        position = {last - 1: back(messages[last - 1]["content"])}
        (end,) = self._locate_markers(messages, position, text, unused_characters(messages, 1))
        return len(text) if end is None else end
