"""Chat templates: the same text as transformers, and no harm from hostile ones."""

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from templates import FAMILIES

from pronk.checkpoint.open import open_checkpoint
from pronk.errors import RequestError
from pronk.serve.chat import render

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}"
    "{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)
LLAMA3 = """\
{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{#- This block extracts the system message. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if message.role == "ipython" or message.role == 'tool' %}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- endif %}
    {%- elif 'tool_calls' in message %}
        {%- for arg_name, arg_val in message.tool_calls[0].function.arguments | items %}
            {{- arg_name + '="' + arg_val + '"' }}
            {%- if not loop.last %}{{- ", " }}{%- endif %}
        {%- endfor %}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ \
message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
MISTRAL = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or message.get("tool_calls") is not none) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("roles must alternate") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] " + (tools | map(attribute='function') | list | tojson) }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- endif %}
{%- endfor %}
"""
ODDS = """\
{% macro turn(role, text='', n=2) %}
[{{ role | upper ~ ':' ~ n }}] {{ text }}
{% endmacro %}
{% for m in messages[::-1] %}
    {% if m.role == 'system' %}{% continue %}{% endif %}
    {% generation %}{{ turn(m.role, m.content.split(' ')[-1]) }}{% endgeneration %}
    {% if loop.index > 5 %}{% break %}{% endif %}
{% endfor %}
{% set kinds = ['a', ('b', 1), {'c': [1, 2.5, none, true]}] %}
{{ kinds }}{{ kinds | tojson }}{{ {'é': '<b>'} | tojson }}{{ [1] | tojson(separators=(',', ':')) }}
{% set block %}x{{ messages | length }}{% endset %}{{ block * 3 }}
{{ '%s-%05.1f' % ('a', 2) }}{{ '{:>4}|{}'.format('r', 3) }}{{ 'a\\nb' | indent(2) }}
{% for k, v in messages[0].items() %}{{ k }}={{ v | replace('e', 'EE') }};{% endfor %}
{{ 7 // 2 }}{{ 7 / 2 }}{{ 2 ** 5 }}{{ -7 % 3 }}{{ missing }}{{ missing is defined }}
{{ ', '.join(messages | map(attribute='role')) }}{{ messages | map(attribute='role') | join('+') }}
{{ messages | groupby('role') | map('first') | list }}{{ [3, 1, 2] | sort | sum }}
{{ '<&>' | e ~ '"' }}{{ 'x' if messages else 'y' }}{{ dict(a=1, **{'b': 2}) | dictsort }}
"""
TEMPLATES = {"chatml": CHATML, "llama2": LLAMA2, "llama3": LLAMA3, "mistral": MISTRAL, "odds": ODDS}
SYSTEM = {"role": "system", "content": "  Be brief. "}
TURNS = [
    {"role": "user", "content": " Who wrote <Faust>? 你好 🙂\n"},
    {"role": "assistant", "content": "Goethe & co."},
    {"role": "user", "content": "{{ 7 * 7 }} {% raw %}"},
]
TOOLS = [
    {"type": "function", "function": {"name": "f", "parameters": {"é": ["<x>", 1, None, True]}}}
]


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no-tools", "tools"])
@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("messages", [TURNS, [SYSTEM, *TURNS]], ids=["plain", "system"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_renders_what_transformers_renders(
    name: str, messages: list[dict[str, str]], prompt: bool, tools: Any
):
    from transformers.utils import chat_template_utils as utils

    (expected,), _ = utils.render_jinja_template(
        [messages],
        tools=tools,
        chat_template=TEMPLATES[name],
        add_generation_prompt=prompt,
        bos_token="<s>",
        eos_token="</s>",
    )
    ours = render(
        TEMPLATES[name],
        messages,
        bos_token="<s>",
        eos_token="</s>",
        add_generation_prompt=prompt,
        tools=tools,
    )
    assert ours == expected


PARTS = {
    "role": "user",
    "content": [{"type": "image"}, {"type": "text", "text": " What is <this>? \n"}],
}
CALL = {"name": "f", "arguments": {"é": "x'y", "n": 2.5, "deep": {"list": [1, None, True]}}}
CALLS = [
    *TURNS,
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "abcdefghi", "type": "function", "function": CALL}],
    },
    {"role": "tool", "content": '{"temperature": 3}', "tool_call_id": "abcdefghi"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nIt is 3 degrees.\n"},
    {"role": "user", "content": "Thanks."},
]
TYPED_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": 'Say "how" it is.',
            "parameters": {
                "type": "object",
                "properties": {
                    "place": {"type": "string", "description": "where"},
                    "days": {"type": "array", "items": {"type": "integer"}, "nullable": True},
                    "unit": {"enum": ["°C", "°F"], "default": "°C"},
                    "more": {"type": "object", "properties": {"x": {"type": "blob"}}},
                },
                "required": ["place"],
            },
            "return": {"type": "string"},
        },
    },
    *TOOLS,
]
CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "turns": (TURNS, {}),
    "system": ([SYSTEM, *TURNS], {"add_generation_prompt": True}),
    "one": ([TURNS[0]], {"add_generation_prompt": True}),
    "parts": ([SYSTEM, PARTS], {"add_generation_prompt": True}),
    "parts of the system": ([{"role": "system", "content": PARTS["content"][1:]}, PARTS], {}),
    "calls": ([SYSTEM, *CALLS], {"tools": TYPED_TOOLS, "add_generation_prompt": True}),
    "calls only": (CALLS[:-1], {"tools": TYPED_TOOLS}),
    "tools": ([TURNS[0]], {"tools": TYPED_TOOLS, "add_generation_prompt": True}),
    "switches": (
        [{"role": "system", "content": "Short. /no_think"}, *TURNS],
        {
            "add_generation_prompt": True,
            "enable_thinking": False,
            "builtin_tools": ["search", "code_interpreter"],
            "controls": {"length": "short"},
            "documents": [{"title": "a", "text": "A <b>"}, {"title": "c", "text": "C"}],
            "date_string": "1 May 2025",
            "python_tools": ["print"],
        },
    ),
    "out of turn": (TURNS[1:], {}),
    "strange role": ([*TURNS[:2], {"role": "critic", "content": "no"}], {}),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_families_render_as_with_transformers(name: str):
    from jinja2.exceptions import TemplateError
    from transformers.utils import chat_template_utils as utils

    rendered = 0
    for which, (messages, options) in CONVERSATIONS.items():
        day = time.strftime("%x")
        try:
            (expected,), _ = utils.render_jinja_template(
                [copy.deepcopy(messages)],
                chat_template=FAMILIES[name],
                bos_token="<s>",
                eos_token="</s>",
                **options,
            )
        except (TemplateError, TypeError) as error:
            # A refusal of the template's own, or words added to a list.
            with pytest.raises(RequestError) as caught:
                render_as_given(name, messages, options)
            assert " ".join(str(error).split())[:100] in str(caught.value), which
            continue
        if day != time.strftime("%x"):  # midnight passed in between
            continue
        assert render_as_given(name, messages, options) == expected, which
        rendered += 1
    assert rendered >= (3 if name == "mixtral" else 5)  # which knows no system


def test_the_real_templates_render_as_with_transformers(smollm2: Path):
    from transformers.utils import chat_template_utils as utils

    with open_checkpoint(smollm2) as checkpoint:
        template = checkpoint.load_tokenizer().chat_template
    assert template is not None
    for prompt in (False, True):
        for messages in ([SYSTEM, *TURNS], TURNS, TURNS[:1]):
            (expected,), _ = utils.render_jinja_template(
                [messages], chat_template=template, add_generation_prompt=prompt
            )
            assert render(template, messages, add_generation_prompt=prompt) == expected


def render_as_given(name: str, messages: list[dict[str, Any]], options: dict[str, Any]) -> str:
    options = {"add_generation_prompt": False, **options}
    return render(FAMILIES[name], messages, bos_token="<s>", eos_token="</s>", **options)


def test_a_refusal_is_a_sentence():
    with pytest.raises(RequestError, match="refused the conversation: Conversation roles must"):
        render(LLAMA2, [{"role": "assistant", "content": "?"}])


def test_invalid_templates_name_the_line():
    with pytest.raises(RequestError, match="invalid at line 2"):
        render("\n{% if %}", [])


def test_the_date_is_there():
    assert render("{{ strftime_now('%Y') }}", []) == time.strftime("%Y")


def test_a_long_conversation_is_within_the_limits():
    messages = [{"role": "user", "content": "word " * 1000}, {"role": "assistant", "content": "é"}]
    text = render(LLAMA2, messages * 100)
    assert text.count("word") == 100_000


DOUBLING = "{% set ns = namespace(x='aaaaaaaaaaaaaaaa') %}{% for i in range(99) %}"
SHARED = "{% set a = [1, 1] %}" + "{% set a = [a, a] %}" * 60
SHARED_TWICE = SHARED + SHARED.replace("a", "b").replace("bnd", "and").replace("sbt", "sat")
HOSTILE = {
    # out of the sandbox
    "class": "{{ 'x'.__class__ }}",
    "mro": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "item": "{{ messages['__class__'] }}",
    "globals": "{{ raise_exception.__globals__ }}",
    "namespace": "{{ namespace.__init__.__globals__ }}",
    "namespace-set": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "attr-filter": "{{ ''|attr('__class__') }}",
    "map-attr": "{{ messages|map('attr', '__class__')|list }}",
    "method-self": "{{ messages[0].items.__self__ }}",
    "format-attribute": "{{ '{0.__class__}'.format(1) }}",
    "format-map": "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "context": "{{ self._TemplateReference__context }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
    "cycler": "{{ cycler.__init__.__globals__ }}",
    # changing the messages
    "append": "{{ messages.append(1) }}",
    "update": "{{ messages[0].update(role='system') }}",
    "pop": "{{ messages[0].pop('role') }}",
    # one operation that fills memory
    "times": "{{ 'a' * 10**10 }}",
    "times-left": "{{ 10**10 * 'a' }}",
    "list-times": "{{ [0] * 10**9 }}",
    "power": "{{ 10**(10**10) }}",
    "power-chain": "{{ 10**10**10**10**10 }}",
    "percent": "{{ '%1000000000s' % 1 }}",
    "percent-star": "{{ '%*s' % (1000000000, 1) }}",
    "percent-filter": "{{ '%(a)1000000000s'|format(a=1) }}",
    "format": "{{ '{:1000000000}'.format(1) }}",
    "format-nested": "{{ '{:{}}'.format(1, 10**9) }}",
    "center": "{{ 'x'|center(10**9) }}",
    "ljust": "{{ 'x'.ljust(10**9) }}",
    "zfill": "{{ 'x'.zfill(10**9) }}",
    "expandtabs": "{{ '\t'.expandtabs(10**9) }}",
    "to-bytes": "{{ (5).to_bytes(10**9, 'big') }}",
    "indent": "{{ 'x'|indent(10**9, first=true) }}",
    "indent-lines": "{{ ('\n' * 999999)|indent(999) }}",
    "tojson-indent": "{{ [1]|tojson(indent=10**9) }}",
    "batch": "{{ [1]|batch(10**9, 'x')|list }}",
    "slice": "{{ [1]|slice(10**9)|list }}",
    "round": "{{ 1|round(10**9, 'ceil') }}",
    "range": "{{ range(10**12)|list }}",
    "fromkeys": "{{ dict.fromkeys(range(99999), 'a' * 999) }}",
    "strftime": "{{ strftime_now('%999999999Y') }}",
    "sum-lists": "{{ ([[1]] * 90000)|sum(start=[]) }}",
    # doubling
    "concat": DOUBLING + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "plus": DOUBLING + "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "set-block": DOUBLING + "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}",
    "replace": DOUBLING + "{% set ns.x = ns.x.replace('a', 'aaaaaaaaaaaaaaaa') %}{% endfor %}",
    "replace-filter": DOUBLING + "{% set ns.x = ns.x|replace('a', 'aaaaaaaa') %}{% endfor %}",
    "join": DOUBLING + "{% set ns.x = ns.x.join(ns.x) %}{% endfor %}",
    "join-filter": DOUBLING + "{% set ns.x = ns.x|join(ns.x) %}{% endfor %}",
    "square": "{% set ns = namespace(x=9) %}{% for i in range(99) %}"
    "{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "slices": "{% set s = 'a' * 4000000 %}" + "{% set b = s[1:] %}" * 2000,
    "macro": "{% set x = 'a' * 999999 %}{% macro m() %}" + "{{ x }}" * 5000 + "{% endmacro %}"
    "{{ m() }}",
    "shared-print": SHARED + "{{ a }}",
    "shared-json": SHARED + "{{ a|tojson }}",
    "shared-equal": SHARED_TWICE + "{{ a == b }}",
    # loops
    "text-loop": "{% for i in range(99999) %}" + "x" * 9999 + "{% endfor %}",
    "text-set": "{% set q %}{% for i in range(99999) %}" + "x" * 9999 + "{% endfor %}{% endset %}",
    "silent-loops": "{% for i in range(99999) %}{% for j in range(99999) %}"
    "{% endfor %}{% endfor %}",
    "filtered-loops": "{% for i in range(99999) %}{% for j in range(99999) if false %}"
    "{% endfor %}{% endfor %}",
    "string-loops": "{% for i in s %}{% for j in s %}{% for k in s %}{% endfor %}{% endfor %}"
    "{% endfor %}".replace(" s ", f" '{'x' * 9000}' "),
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "tree": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}"
    "{{ m(60) }}",
    "recursive-loop": "{% for a in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "sorting": "{% set l = ['a' * 99] * 9999 %}{% for i in range(99999) %}"
    "{% if l|sort %}{% endif %}{% endfor %}",
    "silent-filter": "{% set r = range(90000)|list %}{{ r|reject('in', r)|first }}",
    "rfind": "{% set s = 'a' * 2000000 %}{{ s.rfind('ab' + s[1000000:]) }}",
    "rsplit": "{% set s = 'a' * 2000000 %}{{ s.rsplit(sep='ab' + s[1000000:]) }}",
    "hexadecimal": "{% set n = ('f' * 4000000)|int(base=16) %}{{ n is divisibleby(n // 3) }}",
    "colons": "{{ (':' * 1000000).format(1) }}",
    "trim": "{% set s = 'a' * 2000000 %}{{ s|trim(s[1000000:] ~ 'b') }}",
    # the compiler
    "parentheses": "{{ " + "(" * 9000 + "1" + ")" * 9000 + " }}",
    "sums": "{{ 1" + "+1" * 30000 + " }}",
    "nesting": "{% if 1 %}" * 1000 + "{% endif %}" * 1000,
    "filters": "{{ 1" + "|string" * 9000 + " }}",
    "attributes": "{{ x" + ".x" * 20000 + " }}",
    "long": " " * 70_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_are_refused_in_time(name: str):
    messages = [{"role": "user", "content": "hi"}]
    before = copy.deepcopy(messages)
    start = time.thread_time()
    with pytest.raises(RequestError, match="chat template"):
        render(HOSTILE[name], messages)
    assert time.thread_time() - start < 2
    assert messages == before


def test_hostile_templates_stay_within_memory():
    """All that multiply data, in one process that may grow by little more than the budget."""
    script = """
        import resource, sys
        from pronk.errors import RequestError
        from pronk.serve.chat import render
        render("{{ messages }}", [])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for template in eval(sys.stdin.read()):
            try:
                render(template, [])
            except RequestError:  # what others test: here, only memory counts
                pass
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    names = list(HOSTILE)[list(HOSTILE).index("times") : list(HOSTILE).index("silent-loops")]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        input=repr([HOSTILE[name] for name in names]),
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    kib = int(done.stdout) // (1024 if sys.platform == "darwin" else 1)
    assert kib < 200 * 1024
