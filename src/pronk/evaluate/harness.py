"""Pronk as a model of lm-evaluation-harness, for any task that it has the data of.

    python -m pronk.evaluate.harness run --model pronk --model_args path=MODEL --tasks ...

takes the harness's own command line; importing this module registers the model, so that
``lm_eval.simple_evaluate(model="pronk", model_args={"path": ...})`` finds it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from pronk.errors import PronkError, RequestError
from pronk.evaluate.tasks import likelihoods, split
from pronk.model import load
from pronk.spec import SamplingParams

try:
    from lm_eval import utils
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError as error:
    raise RequestError(
        f"lm-evaluation-harness is not installed ({error}): pip install 'pronk[tasks]'"
    ) from None

__all__ = ["PronkLM", "main"]

_TOGETHER = 16  # generations under way; they share the steps of the engine
_MOST_TOKENS = 256  # of an answer, where the task does not say


@register_model("pronk")
class PronkLM(LM):  # type: ignore[misc]  # lm_eval has no types
    """A model that Pronk runs.

    Parameters
    ----------
    path : str
        What `pronk.load` takes.
    threads, context : int, optional
        See `pronk.load`.
    kv : {"bf16", "int8", "int4"}
    batch_size, max_batch_size, device
        The harness's own; batches are the engine's affair, and so they are not used.
    """

    def __init__(
        self,
        path: str,
        threads: int | None = None,
        context: int | None = None,
        kv: str = "bf16",
        batch_size: object = None,
        max_batch_size: object = None,
        device: object = None,
    ) -> None:
        super().__init__()
        threads = None if threads is None else int(threads)
        self.model = load(path, threads, None if context is None else int(context), kv_dtype=kv)
        words = self.model.tokenizer
        first = words.bos_id if words.bos_id is not None else min(words.eos_ids, default=None)
        if first is None:
            raise RequestError(f"{path} has no token that a text begins or ends with")
        self._first = first

    @property
    def tokenizer_name(self) -> str:
        """Names the chat template in the harness's cache of requests."""
        return str(self.model.path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The model's own template, if the harness is to apply one."""
        return self.model.tokenizer.chat_template if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation, up to the assistant's turn."""
        if not add_generation_prompt:
            raise RequestError("a turn that goes on in the assistant's words is not supported")
        words = self.model.tokenizer
        return words.decode(self.model.render(chat_history), skip_special=False)

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each ending, and whether it is what greedy decoding gives.

        Endings of one context that come together share its keys and values.
        """
        pairs = []
        for context, ending in (request.args for request in requests):
            before, after = split(self.model.tokenizer, context, ending)
            pairs.append((before or [self._first], after))
        found: list[tuple[float, bool]] = []
        for before, group in groupby(pairs, key=lambda pair: pair[0]):
            found += likelihoods(self.model, before, [after for _, after in group])
        for request, result in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, result)
        return found

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of whole texts, each from its own start, in disjoint windows."""
        found = []
        for (text,) in (request.args for request in requests):
            ids = self.model.tokenizer.encode(text, add_special=False, parse_special=False)
            parts = utils.get_rolling_token_windows(
                token_list=ids,
                prefix_token=self._first,
                max_seq_len=self.model.context - 1,
                context_len=1,
            )
            total = 0.0
            for before, after in map(utils.make_disjoint_window, parts):
                total += likelihoods(self.model, before, [after])[0][0]
            found.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers; those that are under way together share the steps of the engine."""
        found: list[str] = []
        for start in range(0, len(requests), _TOGETHER):
            part = [request.args for request in requests[start : start + _TOGETHER]]
            running = [self._start(context, dict(options)) for context, options in part]
            texts = [""] * len(running)
            going = dict(enumerate(running))
            while going:
                for i, pieces in list(going.items()):
                    text = next(pieces, None)
                    if text is None:
                        del going[i]
                    else:
                        texts[i] += text
            for args, text in zip(part, texts, strict=True):
                self.cache_hook.add_partial("generate_until", args, text)
            found += texts
        return found

    def _start(self, context: str, options: dict[str, Any]) -> Iterator[str]:
        """Begin an answer; gives its text piece by piece."""
        until = options.get("until") or []
        most = int(options.get("max_gen_toks") or options.get("max_tokens") or _MOST_TOKENS)
        most = min(most, self.model.context - 1)
        sampled = bool(options.get("do_sample"))
        params = SamplingParams(
            temperature=float(options.get("temperature", 1.0)) if sampled else 0.0,
            top_p=float(options.get("top_p", 1.0)),
            top_k=int(options.get("top_k", 0)),
            max_tokens=most,
            stop=tuple([until] if isinstance(until, str) else until),
        )
        ids = self.model.tokenizer.encode(context) or [self._first]
        # The end of what is asked is what the answer goes on from.
        pieces = self.model.generate(ids[-(self.model.context - most) :], params)
        return (piece.text for piece in pieces)


def main() -> int:
    """The harness's command line, in which ``--model pronk`` is known."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except PronkError as error:
        print(f"pronk: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
