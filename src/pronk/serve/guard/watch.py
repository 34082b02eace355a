"""The guard of one request: over what it asks and what it is answered, and what the audit says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pronk.errors import RequestError
from pronk.serve.errors import ApiError
from pronk.serve.guard.filters import Chain, Guard
from pronk.serve.guard.stages import Action, Direction
from pronk.serve.hosted import Hosted

__all__ = ["Watch"]

_PIECE = 4096  # characters of a long text that are searched at a time: the time stays linear
_MOST_KEPT, _MOST_TEXTS = 8192, 64  # characters of a text, and texts, in the log
_NAMES = frozenset({"role", "type", "id", "tool_call_id", "name", "required", "$ref"})
_SYSTEM = frozenset({"system", "developer"})


@dataclass(slots=True)
class Watch:
    """What is asked passes it before templates and the tokenizer, what is answered before clients.

    Parameters
    ----------
    guard : Guard or None
    count : callable
        Told of each action: filter, action, direction.
    keep : bool
        Whether texts are kept for the audit log.
    """

    guard: Guard | None
    count: Callable[[str, Action, Direction], None]
    keep: bool = False
    actions: Counter[tuple[str, Action, Direction]] = field(default_factory=Counter)
    asked: list[str] = field(default_factory=list)
    said: dict[int, list[str]] = field(default_factory=dict)

    def _tell(self, name: str, action: Action, direction: Direction) -> None:
        self.actions[name, action, direction] += 1
        self.count(name, action, direction)

    async def prompt(self, model: Hosted, prompt: str | list[int]) -> str | list[int]:
        """A text, or token ids as the text that they stand for; the ids, if nothing changes it.

        Raises
        ------
        ApiError
            400, if a filter blocks it.
        """
        if self.guard is None and not self.keep:
            return prompt
        if isinstance(prompt, str):
            return await model.aside(self._text, prompt)
        if any(not 0 <= token < model.spec.vocab_size for token in prompt):
            return prompt  # the engine refuses it
        text = await model.aside(model.tokenizer.decode, prompt, False)
        checked = await model.aside(self._text, text)
        # The text has the special tokens that the ids had.
        return prompt if checked == text else await model.encode(checked, add_special=False)

    async def messages(
        self, model: Hosted, messages: Sequence[Mapping[str, Any]]
    ) -> list[dict[str, Any]]:
        """A conversation as its template will see it: every text of it.

        Raises
        ------
        ApiError
            400, if a filter blocks one.
        """
        if self.guard is None and not self.keep:
            return [dict(message) for message in messages]

        def checked() -> list[dict[str, Any]]:
            out = []
            for message in messages:
                system = message.get("role") in _SYSTEM
                one: dict[str, Any] = self._each(message, system)
                if "name" in message:
                    one["name"] = self._text(message["name"], system)
                out.append(one)
            return out

        return await model.aside(checked)

    async def values(self, model: Hosted, values: Any) -> Any:
        """Other data that templates write, such as the tools there are."""
        if self.guard is None and not self.keep:
            return values
        return await model.aside(self._each, values, True)

    def _each(self, value: Any, system: bool) -> Any:
        if isinstance(value, str):
            return self._text(value, system)
        if isinstance(value, Mapping):
            return {key: item if key in _NAMES else self._each(item, system)
                    for key, item in value.items()}  # fmt: skip
        if isinstance(value, list):
            return [self._each(item, system) for item in value]
        return value

    def _text(self, text: str, system: bool = False) -> str:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise RequestError("the text holds a lone surrogate: it is not Unicode") from None
        if self.guard is not None:
            chain = self.guard.chain("input", self._tell, system)
            pieces = [chain.push(text[at : at + _PIECE]) for at in range(0, len(text), _PIECE)]
            pieces.append(chain.push("", final=True))
            if chain.blocked:
                if self.keep:
                    self.asked.append(text)
                raise ApiError(
                    400, f"the guard's filter {self._blocked('input')} refuses this request",
                    "content_filter",
                )  # fmt: skip
            text = "".join(pieces)
        if self.keep:
            self.asked.append(text)
        return text

    def _blocked(self, direction: Direction) -> str:
        return next(name for name, action, where in reversed(self.actions)
                    if action == "block" and where == direction)  # fmt: skip

    def answer(self) -> Chain | None:
        """What a new answer passes.

        Where it may be changed, token ids and log-probabilities would tell what was: those are not
        given (`hides_tokens`).
        """
        if self.guard is None or not self.guard.watches_output:
            return None
        return self.guard.chain("output", self._tell)

    @property
    def hides_tokens(self) -> bool:
        """Whether answers come without the tokens behind them."""
        return self.guard is not None and self.guard.changes_output

    def refuse_logprobs(self, wanted: bool) -> None:
        """Refuse log-probabilities where they are not given.

        Raises
        ------
        ApiError
            400.
        """
        if wanted and self.hides_tokens:
            raise ApiError(
                400, "the guard may change answers, so their log-probabilities are not given",
                "content_filter", "logprobs",
            )  # fmt: skip

    def heard(self, index: int, text: str) -> None:
        """Keep what a client is given."""
        if self.keep and text:
            self.said.setdefault(index, []).append(text)

    def entry(self) -> dict[str, Any]:
        """What the audit log says of it; texts without the personal data that is found."""
        out: dict[str, Any] = {}
        if self.actions:
            out["guard"] = [
                {"filter": name, "action": action, "direction": direction, "count": count}
                for (name, action, direction), count in self.actions.items()
            ]
        if self.keep:
            from pronk.serve.guard.pii import redacted

            answers = ["".join(self.said[index]) for index in sorted(self.said)]
            for key, texts in (("asked", self.asked), ("answered", answers)):
                out[key] = [redacted(text)[:_MOST_KEPT] for text in texts[-_MOST_TEXTS:]]
        return out
