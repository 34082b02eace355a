"""A loaded model: text in, text out."""

from __future__ import annotations

import os
import weakref
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from pronk.checkpoint.base import Checkpoint
from pronk.checkpoint.open import open_checkpoint
from pronk.checkpoint.tokenizer import Tokenizer
from pronk.engine.engine import Engine
from pronk.engine.packing import Weights, identity
from pronk.engine.request import Event
from pronk.engine.runner import ExpertReads, Recording, Runner, magnitudes
from pronk.errors import PronkError, RequestError
from pronk.graph.program import Program
from pronk.model.values import Piece, Speculation
from pronk.spec import MemoryPlan, ModelSpec, SamplingParams

if TYPE_CHECKING:
    from pronk.engine.service import Service

__all__ = ["Model"]


class Model:
    """A model ready to run. Not thread-safe: one thread drives it.

    Use `load` to make one.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        tokenizer: Tokenizer,
        runner: Runner,
        weights: Weights,
        memory: MemoryPlan,
        speculate: bool = True,
        target_tpot: float | None = None,
    ) -> None:
        self.path: Path = checkpoint.path
        self.spec: ModelSpec = runner.program.spec
        self.tokenizer = tokenizer
        self.conversions = weights.conversions
        self._weights = weights
        self.memory = memory
        self._runner: Runner | None = runner
        self._engine = Engine(
            runner, tokenizer.eos_ids, speculate=speculate, target_tpot=target_tpot
        )
        self._service: Service | None = None
        self._events: dict[int, deque[Event]] = {}  # not yet taken, by request

    @property
    def context(self) -> int:
        """Most tokens of one sequence."""
        self._open()
        return self._engine.context

    @property
    def threads(self) -> int:
        """Threads that run a step."""
        return self._open().executor.threads

    @property
    def isa(self) -> str:
        """Vector instruction set of the kernels in use."""
        return self._open().executor.isa

    @property
    def program(self) -> Program:
        """What the executor runs: graph, layout and limits."""
        return self._open().program

    @property
    def speculate(self) -> bool:
        """Whether tokens are drafted from earlier text; may be set at any time."""
        self._open()
        return self._engine.speculate

    @speculate.setter
    def speculate(self, on: bool) -> None:
        self._open()
        self._engine.speculate = on

    @property
    def speculation(self) -> Speculation:
        """What drafting has done since the model was loaded."""
        self._open()
        speculator = self._engine.speculator
        return Speculation(speculator.drafted, speculator.accepted) if speculator else Speculation()

    @property
    def has_chat_template(self) -> bool:
        """Whether the checkpoint carries a chat template."""
        return self.tokenizer.chat_template is not None

    @property
    def packed_cache(self) -> str:
        """What became of the packed cache, for people; waits for what is being written."""
        return self._weights.wait()

    def _open(self) -> Runner:
        if self._runner is None:
            raise RequestError("the model is closed")
        return self._runner

    def _drive(self) -> Runner:
        """The runner, where this thread may use it."""
        if self._service is not None and not self._service.closed:
            raise RequestError("the model is being served: submit to its service, or close that")
        return self._open()

    def service(self) -> Service:
        """Give the engine a thread of its own that any thread may submit requests to.

        Until the service is closed, the model itself generates nothing.

        Raises
        ------
        RequestError
            If it is being served already, or answers of `generate` are not taken yet.
        """
        from pronk.engine.service import Service

        self._drive()
        if self._engine.busy:
            raise RequestError("the model is generating: take or drop its answers first")
        self._service = Service(self._engine)
        return self._service

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of a text as it stands, with the special tokens the model wants around it.

        Raises
        ------
        RequestError
            If the prompt is empty.
        """
        if isinstance(prompt, str):
            if not prompt:
                raise RequestError("the prompt is empty: give some text")
            return self.tokenizer.encode(prompt)
        return [int(token) for token in prompt]

    def render(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation through the chat template, up to the assistant's turn.

        Raises
        ------
        RequestError
            If there is no template, a message is empty, or the template refuses.
        """
        from pronk.serve.chat import render

        if self.tokenizer.chat_template is None:
            raise RequestError("this model has no chat template: use raw text (--raw)")
        if not messages or not str(messages[-1].get("content", "")).strip():
            raise RequestError("the prompt is empty: give some text")
        text = render(
            self.tokenizer.chat_template,
            messages,
            bos_token=self.tokenizer.bos_token,
            eos_token=self.tokenizer.eos_token,
        )
        # The template writes the special tokens itself.
        return self.tokenizer.encode(text, add_special=False)

    def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        session: str | None = None,
    ) -> Generator[Piece]:
        """Generate from a text or token ids, one piece per token.

        Several may be under way: they share the steps, whichever of them is asked for a piece.
        One that is dropped ends its request.

        Parameters
        ----------
        prompt : str or sequence of int
            No chat template is applied; see `chat`.
        params : SamplingParams, optional
            Greedy until the end of the context unless given.
        session : str, optional
            Keep keys and values under this name, and reuse those the prompt shares with the
            session's last prompt and output.

        Yields
        ------
        Piece

        Raises
        ------
        RequestError
            If the prompt is empty, too long, or holds an unknown id.
        """
        self._drive()
        params = params or SamplingParams()
        request = self._engine.add(self.encode(prompt), params, session)
        self._events[request] = deque()
        pieces = self._pieces(request, params)
        # The `finally` of a generator that was never begun does not run.
        weakref.finalize(pieces, self._end, request).atexit = False
        return pieces

    def _end(self, request: int) -> None:
        if self._events.pop(request, None) is not None and self._runner is not None:
            self._engine.abort(request)

    def _next_event(self, request: int) -> Event:
        """A request's next token; what the steps give other requests waits for them."""
        events = self._events[request]
        while not events:
            self._open()
            for event in self._engine.step():
                self._events[event.request_id].append(event)
        return events.popleft()

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        session: str | None = None,
    ) -> Generator[Piece]:
        """Generate the assistant's next turn of a conversation (see `generate`)."""
        return self.generate(self.render(messages), params, session=session)

    def _pieces(self, request: int, params: SamplingParams) -> Generator[Piece]:
        from pronk.serve.stream import TextStream

        stream = TextStream(self.tokenizer.token_bytes, params.stop)
        reason = None
        try:
            while reason is None:
                event = self._next_event(request)
                if event.sample is None:
                    raise event.error or PronkError("the request ended without a token")
                sample, reason = event.sample, event.finish_reason
                ended = reason == "stop"  # an end token is no text
                text = "" if ended else stream.push(sample.token)
                if stream.stopped:
                    reason = "stop"
                elif reason:
                    text += stream.flush()
                yield Piece(sample.token, text, sample.logprob, sample.top_logprobs, reason)
        finally:
            self._end(request)

    def embed(self, prompt: str | Sequence[int]) -> NDArray[np.float32]:
        """The mean of the tokens' last hidden states, after the final norm.

        Returns
        -------
        ndarray, float32 [hidden size]

        Raises
        ------
        RequestError
            If the prompt is empty, too long, or holds an unknown id.
        """
        self._drive()
        request = self._engine.embedding_request(self.encode(prompt))
        self._engine.enqueue(request)
        self._events[request.id] = deque()
        try:
            event = self._next_event(request.id)
        finally:
            self._end(request.id)
        if event.embedding is None:
            raise event.error or PronkError("the request ended without an embedding")
        return event.embedding

    def _identity(self) -> str:
        with open_checkpoint(self.path) as checkpoint:
            return identity(checkpoint, self._open())

    def save_session(
        self,
        session: str,
        path: str | os.PathLike[str],
        about: Mapping[str, Any] | None = None,
    ) -> int:
        """Write what a session keeps (tokens, keys, values) to a file; gives its bytes.

        Parameters
        ----------
        session : str
        path : path
        about : mapping, optional
            What `session_about` is to find there, such as the messages; must be JSON.

        Raises
        ------
        RequestError
            If no session of the name is kept.
        PronkError
            If the file cannot be written.
        """
        self._drive()
        return self._engine.save_session(session, Path(path), self._identity(), about)

    def session_about(self, path: str | os.PathLike[str]) -> dict[str, Any]:
        """What a session was saved with; that the file is whole, `restore_session` tells.

        Raises
        ------
        CheckpointError
            If the file cannot be read, or is no session.
        """
        from pronk.engine.session_file import read_about

        return read_about(Path(path))

    def restore_session(self, session: str, path: str | os.PathLike[str]) -> int:
        """Keep a session that `save_session` wrote, in place of any of this name.

        Returns
        -------
        int
            Its tokens: a prompt that begins with them starts behind them.

        Raises
        ------
        CheckpointError
            If the file is damaged, or was written by another model or with other options.
        RequestError
            If the cache has no room for it.
        """
        self._drive()
        return self._engine.restore_session(session, Path(path), self._identity())

    def logits(self, ids: Sequence[int], *, last: int | None = None) -> NDArray[np.float32]:
        """Next-token logits at every position, or at the last ones.

        Parameters
        ----------
        ids : sequence of int
            At most the context's length.
        last : int, optional
            How many positions; all unless given.

        Returns
        -------
        ndarray, float32 [tokens, vocabulary]
            Row i is the prediction after ``ids[: i + 1]``, if all are asked for.

        Raises
        ------
        RequestError
            If there are no tokens, more than the context holds, or fewer than `last`.
        """
        self._drive()
        tokens = self.encode(ids)
        count = len(tokens) if last is None else last
        # Checked before anything of their size is allocated.
        parts = self._engine.logits(tokens, len(tokens) - count)
        if not 1 <= count <= len(tokens):
            raise RequestError(f"last must be in [1, {len(tokens)}], not {last}")
        out = np.empty((count, self.spec.vocab_size), np.float32)
        done = 0
        for part in parts:
            out[done : done + len(part)] = part
            done += len(part)
        return out

    def logit_parts(
        self,
        ids: Sequence[int],
        first: int = 0,
        endings: Iterable[Sequence[int]] | None = None,
    ) -> Iterator[NDArray[np.float32]]:
        """Next-token logits in parts, so that those of a long text need not be held at once.

        Parameters
        ----------
        ids : sequence of int
            At most the context's length.
        first : int
            The first position whose logits are wanted.
        endings : iterable of sequence of int
            What else may follow the ids, each taken when the one before it is done; short, and
            the ids are run once for all of them.

        Yields
        ------
        ndarray, float32 [tokens, vocabulary]
            Rows of the positions from `first` on, in their order; then one array an ending, its
            row i being the prediction after the ids and ``ending[: i + 1]``.
        """
        self._drive()
        return self._engine.logits(self.encode(ids), first, endings)

    def expert_counts(self) -> NDArray[np.uint64]:
        """How often each expert was chosen since loading, uint64 [layers with experts, experts]."""
        return self._open().expert_counts()

    def experts_per_token(self) -> float:
        """Mean number of experts that a token went to in a layer; 0 where there are none."""
        return self._open().experts_per_token()

    def expert_reads(self) -> ExpertReads:
        """How often experts were in memory since loading, and what was read of the others."""
        return self._open().expert_reads()

    def set_thresholds(self, thresholds: Sequence[float]) -> None:
        """Below which magnitude each MLP's activations are zero from now on.

        Parameters
        ----------
        thresholds : sequence of float
            One for each MLP that is not of experts.
        """
        try:
            self._open().set_thresholds(thresholds)
        except ValueError as error:
            raise RequestError(str(error)) from None

    def watch(self, on: bool = True) -> None:
        """Count the activations of MLPs from now on, from zero; or no longer."""
        self._open().watch(on)

    def activity(self) -> NDArray[np.uint64]:
        """The counts since `watch` (see `Runner.activity`), uint64 [MLPs, magnitudes + 2]."""
        return self._open().activity()

    def magnitudes(self) -> NDArray[np.float32]:
        """The least magnitude of each bin that `activity` counts, float32 [magnitudes]."""
        return magnitudes()

    def record(self, on: bool = True) -> None:
        """Keep the times of ops from now on, from nothing; or no longer."""
        self._open().record(on)

    def recording(self) -> Recording:
        """The steps and the times of ops since `record`."""
        return self._open().recording()

    def close(self) -> None:
        """Free the weights and the cache."""
        if self._runner is not None:
            if self._service is not None:
                self._service.close()
            self._weights.wait()
            self._runner = None
            del self._engine

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
