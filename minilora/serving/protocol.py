"""The bodies that OpenAI's API takes: from JSON to prompts, settings and stop strings.

A field that would change the answer and is not implemented is refused by its name, unless its value asks for
nothing. Fields that only concern OpenAI's bookkeeping are ignored. Any other field is an error: a misspelt
setting would silently be the default. What a request leaves out is as the server was started with.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

from minilora.data.messages import Message
from minilora.inference.assistant import GenerationSettings, encode_question
from minilora.serving.models import Served
from minilora.system.errors import UserError, one_line, suggestion
from minilora.system.files import parse_json

# Values that ask for nothing. Without one, a field is refused whatever it says.
REFUSED = {
    "n": (1,), "best_of": (1,), "echo": (False,), "suffix": ("",), "logprobs": (False,), "top_logprobs": (0,),
    "logit_bias": ({},), "presence_penalty": (0,), "frequency_penalty": (0,), "min_p": (0,),
    "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": (), "prediction": (),
    "reasoning_effort": (), "verbosity": (), "web_search_options": (), "ignore_eos": (False,),
    "min_tokens": (0,),
}  # fmt: skip
IGNORED = (
    "user metadata store service_tier parallel_tool_calls prompt_cache_key prompt_cache_retention "
    "safety_identifier"
).split()
SETTINGS = {  # field -> setting
    "temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "seed": "seed",
    "repetition_penalty": "repetition_penalty", "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
}  # fmt: skip
OWN = {"model", "stream", "stream_options", "stop"}
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
MOST_PROMPTS, MOST_STOPS, LONGEST_STOP = 64, 16, 256


class ApiError(Exception):
    """An error that a client reads: a status, and OpenAI's error object."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def body(self) -> dict:
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": dict(message=one_line(str(self)), type=kind, param=self.param, code=self.code)}


@dataclass(frozen=True)
class Asked:
    """A body that was understood: one prompt or more, and how to answer them."""

    is_chat: bool
    served: Served
    prompts: list[list[int]]
    settings: GenerationSettings
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool


def parse_body(raw: bytes) -> dict:
    """Return the object in a body. Raises ApiError."""
    try:
        body = parse_json(raw.decode("utf-8"))
    except (UnicodeDecodeError, UserError, RecursionError) as error:
        raise ApiError(400, f"the body is no JSON: {error}") from error
    if not isinstance(body, dict):
        raise ApiError(400, f"the body is {type(body).__name__}, not an object")
    return {name: value for name, value in body.items() if value is not None}


def understand(
    body: dict, served: Served, defaults: GenerationSettings, is_chat: bool, max_length: int, vocab_size: int
) -> Asked:
    """Return what a body asks of a model. Raises ApiError that names the field.

    max_length: of prompt and answer together. vocab_size: of the model, beyond which there is no token.
    """
    _refuse_fields(body, OWN | {"messages" if is_chat else "prompt"})
    settings, stop = _settings(body, defaults), _stop(body.get("stop", []))
    stream = _typed(body, "stream", bool, False)
    options = _typed(body, "stream_options", dict, {})
    if options and not stream:
        _refuse("stream_options", "is only for stream: true")
    _refuse_fields(options, {"include_usage", "include_obfuscation"}, "stream_options.")
    usage = _typed(options, "include_usage", bool, False)
    if is_chat:
        prompts = [_chat_prompt(body, served, vocab_size)]
    else:
        prompts = [_ids(prompt, served, vocab_size) for prompt in _prompts(body)]
    for prompt in prompts:
        _check_length(prompt, max_length, "messages" if is_chat else "prompt")
    return Asked(is_chat, served, prompts, settings, stop, stream, usage)


def model_of(body: dict) -> str:
    """Return the name of the model that a body asks for. Raises ApiError."""
    name = _typed(body, "model", str, "")
    return name or _refuse("model", "is missing: GET /v1/models lists the names")


# ---- fields ------------------------------------------------------------------------------------------------


def _refuse(param: str, problem: str, code: str | None = None) -> NoReturn:
    raise ApiError(400, f"{param} {problem}", param, code)


def _typed(body: dict, name: str, kind: type, default: object) -> object:
    value = body.get(name, default)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        names = {
            bool: "true or false",
            dict: "an object",
            str: "a text",
            int: "a whole number",
            float: "a number",
        }
        _refuse(name, f"must be {names[kind]}, not {value!r}")
    return value


def _refuse_fields(body: dict, own: set[str], place: str = "") -> None:
    """Raise ApiError for a field that is not known, or that asks for something that is not implemented."""
    known = own if place else {*own, *SETTINGS, *IGNORED, *REFUSED}
    for name, value in body.items():
        if name not in known:
            _refuse(f"{place}{name}"[:80], f"is not known here{suggestion(name, known)}")
        neutral = None if place else REFUSED.get(name)
        if neutral is not None and not any(_is_same(value, other) for other in neutral):
            _refuse(name, f"= {value!r} is not implemented; leave it out")


def _is_same(value: object, other: object) -> bool:
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _settings(body: dict, defaults: GenerationSettings) -> GenerationSettings:
    changes = {}
    for field, name in SETTINGS.items():
        if field in body:
            value = body[field]
            if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63:
                kind = type(getattr(defaults, name))
                changes[name] = kind(value)
            else:
                changes[name] = _typed(body, field, type(getattr(defaults, name)), None)
    try:
        return replace(defaults, **changes)
    except UserError as error:
        word = str(error).partition(" ")[0]
        param = next((field for field in body if SETTINGS.get(field) == word), None)
        message = str(error).replace(word, param, 1) if param else str(error)
        raise ApiError(400, message, param) from error


def _stop(value: object) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    good = isinstance(texts, list) and all(isinstance(s, str) and 0 < len(s) <= LONGEST_STOP for s in texts)
    if not good or len(texts) > MOST_STOPS:
        limits = f"at most {MOST_STOPS}, of 1 to {LONGEST_STOP} characters each"
        _refuse("stop", f"must be a text or a list of texts, {limits}")
    return tuple(texts)


# ---- prompts -----------------------------------------------------------------------------------------------


def _chat_prompt(body: dict, served: Served, vocab_size: int) -> list[int]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        _refuse("messages", "must be a list of at least one message")
    read = [_message(message, f"messages.{i}") for i, message in enumerate(messages)]
    if served.template is None and (len(read) > 1 or read[0]["role"] != "user"):
        raise ApiError(
            400,
            f"{served.name} has no chat template, so it reads one user message and nothing else; start the "
            "server with --template, or use /v1/completions",
            "messages",
        )
    try:
        return encode_question(read, served.tokenizer, served.template, vocab_size)
    except UserError as error:
        raise ApiError(400, str(error), "messages") from error


def _message(message: object, place: str) -> Message:
    if not isinstance(message, dict):
        _refuse(place, "must be an object with role and content")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in ROLES:
        _refuse(f"{place}.role", f"= {role!r} is not one of {', '.join(ROLES)}")
    for name, value in message.items():
        if name not in ("role", "content", "name") and value not in (None, [], {}):
            _refuse(f"{place}.{name}"[:80], "is not implemented; leave it out")
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
        if len(parts) == len(content) and all(isinstance(part.get("text"), str) for part in parts):
            content = "\n".join(part["text"] for part in parts)
    if not isinstance(content, str):
        _refuse(f"{place}.content", "must be a text, or a list of parts of type text")
    return {"role": ROLES[role], "content": content}


def _prompts(body: dict) -> list[str | list]:
    """Return each prompt of a completion: a text, or a list that should hold token ids."""
    prompt = body.get("prompt")
    if isinstance(prompt, list) and prompt and all(isinstance(p, str | list) for p in prompt):
        if len(prompt) > MOST_PROMPTS:
            _refuse("prompt", f"holds {len(prompt)} prompts; at most {MOST_PROMPTS} go into one request")
        return prompt
    if not isinstance(prompt, str | list):
        _refuse("prompt", "must be a text, a list of texts, or token ids")
    return [prompt]


def _ids(prompt: str | list, served: Served, vocab_size: int) -> list[int]:
    ids = served.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    for i in ids:
        if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < vocab_size:
            _refuse("prompt", f"holds {i!r}; a token is a whole number from 0 to {vocab_size - 1}")
    return ids


def _check_length(prompt: Sequence[int], max_length: int, param: str) -> None:
    if not prompt:
        _refuse(param, "holds no token")
    if len(prompt) >= max_length:
        message = f"{len(prompt)} tokens leave no room for an answer: a text may have {max_length} tokens"
        raise ApiError(400, message, param, "context_length_exceeded")
