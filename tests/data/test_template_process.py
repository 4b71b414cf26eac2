"""Templates of strangers: the same text as in this process, and no way to hang it, fill it or outlive it."""

import os
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.project import ROOT

from minilora.data import jinja_sandbox, template_process
from minilora.data.jinja_sandbox import TemplateError, render
from minilora.data.template_process import check_apart, render_apart
from minilora.data.templates import TEMPLATES

NOW = datetime(2024, 7, 26)
HI = [{"role": "user", "content": "Hi"}]
needs_limits = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits and /proc of Linux")


def process() -> subprocess.Popen | None:
    return template_process._renderer(os.getpid())._process


texts = st.text() | st.text(alphabet='\ud83d\ude00\n\r\u2028\x00"\\é')
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner) | st.dictionaries(texts, inner),
    max_leaves=8,
)


@given(
    st.lists(st.fixed_dictionaries({"role": texts, "content": texts}, optional={"more": values}), max_size=3)
)
@settings(max_examples=150, deadline=None)
def test_the_text_is_the_one_of_this_process_whatever_the_messages_hold(messages):
    source = (
        "{% for m in messages %}{{ m.role + m.content }}{{ m.more }}{{ m.more is mapping }}{{ m | tojson }}"
        "{% endfor %}{{ strftime_now('%d %b %Y %H:%M:%S.%f') }}{% generation %}{{ bos_token }}{% endgeneration %}"
    )
    now = datetime(2023, 1, 2, 3, 4, 5, 678)
    variables = {"bos_token": "<s>", "generation_markers": ["\ufdd0", "\ufdd1"]}
    here = render(source, {"messages": messages, "strftime_now": now.strftime, **variables})
    assert render_apart(source, messages, now, **variables) == here


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_named_template_renders_the_same_text_apart(name):
    messages = [*HI, {"role": "assistant", "content": "Hello\n"}] * 2
    variables = dict(bos_token="<s>", eos_token="</s>", space=" ", add_generation_prompt=False)
    here = render(TEMPLATES[name], {"messages": messages, **variables})
    assert render_apart(TEMPLATES[name], messages, NOW, **variables) == here


def test_what_jinja_imports_late_is_there():
    source = (
        "{{ 'a b' | wordwrap(1) }}{{ messages | pprint }}{{ 'http://a.de' | urlize }}{{ 'é\\n\\x41' | e }}"
        "{{ [1, 2] | random }}{{ 'é'.encode('utf-8') }}{% macro f(a) %}{{ a }}{% endmacro %}{{ f(1) }}{{ lipsum(1) }}"
    )
    assert "A" in render_apart(source, HI, NOW)


GROWING = [
    "{{ 'a' * 10**10 }}",
    "{% set n = messages | length * 10**10 %}{{ 'a' * n }}",
    "{{ 'a' | center(messages | length * 10**10) }}",
    "{{ '%10000000000s' | format(messages[0].content) }}",
    "{{ '{:>9999999999}'.format(messages[0].content) }}",
    "{{ messages[0].content.ljust(10**10) }}",
    "{{ [0] * (messages | length * 10**10) }}",
    "{% set n = namespace(a=messages[0].content) %}{% for i in range(99) %}{% set n.a = n.a + n.a %}{% endfor %}{{ n.a }}",
    "{% set n = namespace(a='aa') %}{% for i in range(99) %}{% set n.a = n.a | replace('a', n.a) %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(999) %}{{ messages[0].content }}{% endfor %}{% endfor %}",
    "{{ raise_exception('a' * 10**8) }}",
]


@needs_limits
@pytest.mark.parametrize("source", GROWING)
def test_a_template_that_grows_without_end_is_one_short_line(source):
    with pytest.raises(TemplateError) as error:
        check_apart(source)
        render_apart(source, HI, NOW)
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)
    assert render_apart("{{ messages[0].content }}", HI, NOW) == "Hi"


ENDLESS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 10 ** (10 ** 9) }}",  # Jinja computes it while it compiles the template, in one call of a C function
]


@needs_limits
@pytest.mark.parametrize("source", ENDLESS)
def test_a_template_that_never_ends_is_stopped_and_not_tried_again(source):
    for _ in range(2):
        with pytest.raises(TemplateError, match="^computes for more than 5 seconds; choose another"):
            check_apart(source)
            render_apart(source, HI, NOW)
        assert process() is None  # the second time, none was started
    assert render_apart("{{ messages[0].content }}", HI, NOW) == "Hi"


@needs_limits
def test_a_template_that_is_slow_every_time_is_stopped_too():
    source = "{% for a in range(100) %}{% for b in range(9999) %}{% endfor %}{% endfor %}"
    with pytest.raises(TemplateError, match="computes for more than 5 seconds"):
        for _ in range(2000):  # minutes, if each of them could take what it needs
            render_apart(source, HI, NOW)


def test_a_text_much_longer_than_the_conversation_is_refused_with_its_length():
    with pytest.raises(TemplateError, match="^writes 9,999,999 characters, more than 26"):
        render_apart("{{ 'a' * 9999999 }}", HI, NOW)


@needs_limits
def test_the_process_opens_no_file_no_connection_and_no_process_and_sees_no_variable(monkeypatch):
    code = (
        "import sys, socket, os; sys.path += sys.argv[1:]; import jinja_sandbox as j; j._give_up_powers()\n"
        "for call in (lambda: open('/etc/hostname'), socket.socket, lambda: os.pipe(), lambda: bytearray(2**31)):\n"
        "    try: call()\n"
        "    except (OSError, MemoryError): print('no')\n"
    )
    packages = Path(jinja_sandbox.jinja2.__file__).parents[1]
    words = [sys.executable, "-I", "-S", "-c", code, str(ROOT / "minilora" / "data"), str(packages)]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == "no\n" * 4
    monkeypatch.setenv("HF_TOKEN", "secret")
    template_process._renderer(os.getpid()).stop()
    render_apart("", HI, NOW)
    assert b"secret" not in Path(f"/proc/{process().pid}/environ").read_bytes()
    assert os.getsid(process().pid) != os.getsid(0)  # no Ctrl-C of this terminal


@needs_limits
def test_a_fork_has_a_process_of_its_own_and_leaves_its_parents_alone():
    render_apart("", HI, NOW)
    parents = process().pid
    child = os.fork()
    if child == 0:
        same = render_apart("{{ messages[0].content }}", HI, NOW) == "Hi" and process().pid != parents
        template_process._renderer(os.getpid()).stop()
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert render_apart("{{ messages | length }}", HI, NOW) == "1" and process().pid == parents


@needs_limits
@pytest.mark.parametrize("end", ["os.kill(os.getpid(), 9)", "sys.exit()"])
def test_the_process_ends_with_its_parent_in_whatever_way_that_ends(end):
    code = (
        "import os, sys; from datetime import datetime; from minilora.data import template_process as t\n"
        "t.render_apart('', [], datetime(2024, 1, 1)); print(t._renderer(os.getpid())._process.pid, flush=True)\n"
    )
    words = [sys.executable, "-W", "error", "-c", code + end]
    run = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    pid, waited = int(run.stdout), time.monotonic()
    assert "ResourceWarning" not in run.stderr
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]:
        assert time.monotonic() - waited < 30
        time.sleep(0.05)


def test_an_interrupted_request_is_not_answered_to_the_next_one(monkeypatch):
    def interrupt(line):
        raise KeyboardInterrupt

    monkeypatch.setattr(template_process, "decode", interrupt)
    with pytest.raises(KeyboardInterrupt):
        render_apart("first", HI, NOW)
    monkeypatch.undo()
    assert render_apart("second", HI, NOW) == "second"


@needs_limits
def test_a_killed_process_is_replaced_and_no_template_blamed():
    assert render_apart("a", HI, NOW) == "a"
    killed = process()
    os.kill(killed.pid, signal.SIGKILL)
    os.waitid(os.P_PID, killed.pid, os.WEXITED | os.WNOWAIT)
    assert render_apart("a", HI, NOW) == "a" and process().pid != killed.pid


def test_a_process_that_cannot_start_is_one_line(monkeypatch):
    template_process._renderer(os.getpid()).stop()
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(TemplateError, match="needs a process of its own, which cannot start: No such file"):
        render_apart("a", HI, NOW)
