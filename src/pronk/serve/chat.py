"""From messages to a prompt, by the chat template that came with a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from pronk.errors import RequestError

__all__ = ["render"]

# The longest templates in use are below 30,000 characters.
_MOST_TEMPLATE = 64 * 1024
_MOST_OUTPUT = 4 * 1024 * 1024
_MOST_BYTES = 32 * 1024 * 1024
_MOST_SECONDS = 1.0


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    bos_token: str = "",
    eos_token: str = "",
    add_generation_prompt: bool = True,
    **extra: Any,
) -> str:
    """Render a conversation with a Jinja chat template, as transformers does.

    The template is not trusted: it runs in an immutable sandbox, on a copy of the messages,
    with limits on what it makes and how long it takes.

    Parameters
    ----------
    template : str
        The template's source.
    messages : sequence of mappings
        The conversation, each with a ``role`` and a ``content``.
    bos_token, eos_token : str
        The tokenizer's special tokens, for the template to write.
    add_generation_prompt : bool
        Whether to end with what starts the assistant's turn.
    **extra
        Further variables of the template, such as ``tools``.

    Returns
    -------
    str
        The prompt.

    Raises
    ------
    RequestError
        If the template is invalid, refuses the conversation, or exceeds a limit.
    """
    import jinja2

    from pronk.serve.meter import LimitError, Meter, RefusalError

    if len(template) > _MOST_TEMPLATE:
        raise RequestError(
            f"the model's chat template is {len(template)} characters long; "
            f"at most {_MOST_TEMPLATE} are allowed"
        )
    try:
        variables = {
            "tools": None,
            "documents": None,
            **_plain(extra),
            "messages": _plain(messages),
            "bos_token": bos_token,
            "eos_token": eos_token,
            "add_generation_prompt": add_generation_prompt,
        }
        with Meter(_MOST_BYTES, _MOST_SECONDS):
            pieces, size = [], 0
            for piece in _compiled(template).generate(variables):
                size += len(piece)
                if size > _MOST_OUTPUT:
                    raise LimitError(f"its output is longer than {_MOST_OUTPUT} characters")
                pieces.append(piece)
        return "".join(pieces)
    except jinja2.TemplateSyntaxError as error:
        raise RequestError(
            f"the model's chat template is invalid at line {error.lineno}: {_sentence(error)}"
        ) from error
    except jinja2.exceptions.SecurityError as error:
        raise RequestError(
            f"the model's chat template does what is not allowed: {_sentence(error)}"
        ) from error
    except LimitError as error:
        raise RequestError(f"the model's chat template was stopped: {error}") from error
    except RefusalError as error:
        raise RequestError(
            f"the model's chat template refused the conversation: {_sentence(error)}"
        ) from error
    # A template can provoke any of Python's errors; all of them are the template's.
    except Exception as error:
        raise RequestError(
            f"the model's chat template failed: {type(error).__name__}: {_sentence(error)}"
        ) from error


@lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    from pronk.serve.sandbox import MeteredEnvironment

    return MeteredEnvironment().from_string(template)


def _plain(value: Any) -> Any:
    """A copy made of plain data alone, so that a template sees no methods of other classes."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    if isinstance(value, Sequence):
        return [_plain(item) for item in value]
    raise TypeError(f"a message may hold text, numbers, lists and dicts, not {type(value)}")


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."
