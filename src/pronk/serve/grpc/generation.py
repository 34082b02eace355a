"""``pronk.v1.Generation``: text, embeddings and tokens over gRPC."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from pronk.engine.sampler import Sample
from pronk.errors import RequestError
from pronk.serve.generate import Delta, Job, Tally, admit, embed, generate, make_way, whole
from pronk.serve.grpc import generation_pb2 as pb
from pronk.serve.grpc.calls import Record
from pronk.serve.guard.watch import Watch
from pronk.serve.hosted import Hosted
from pronk.serve.http.context import Context
from pronk.spec import SamplingParams

__all__ = ["Generation", "sampling_params"]


def sampling_params(given: pb.Sampling) -> SamplingParams:
    """What a message says of sampling; fields that are left out have their defaults.

    Raises
    ------
    RequestError
        If a value is out of its range.
    """
    fields: dict[str, Any] = {}
    for field, value in given.ListFields():
        fields[field.name] = tuple(value) if field.name == "stop" else value
    return SamplingParams(**fields)


def _token(sample: Sample) -> pb.Token:
    top = [pb.Logprob(token=token, logprob=value) for token, value in sample.top_logprobs]
    return pb.Token(id=sample.token, logprob=sample.logprob, top=top)


def _usage(tally: Tally) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=tally.prompt, completion_tokens=tally.completion, cached_tokens=tally.cached
    )


class Generation:
    """The service's methods, each from a message to a message."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def _model(self, name: str, record: Record) -> Hosted:
        model = self._context.model(name or None)
        record["model"] = model.name
        return model

    async def _job(self, request: pb.GenerateRequest, record: Record) -> tuple[Hosted, Job, Watch]:
        model = self._model(request.model, record)
        make_way(model, 1, 0, self._context.config.limits)
        watch = self._context.watch(record)
        watch.refuse_logprobs(request.sampling.HasField("logprobs"))
        kind = request.WhichOneof("prompt")
        if kind == "text":
            prompt = await model.encode(await watch.prompt(model, request.text))
        elif kind == "tokens":
            prompt = await model.encode(await watch.prompt(model, list(request.tokens.ids)))
        elif kind == "chat":
            turns = [{"role": m.role, "content": m.content} for m in request.chat.messages]
            prompt = await model.render(await watch.messages(model, turns))
        else:
            raise RequestError("the request has no prompt: give text, tokens or chat")
        admit(model, [prompt], 1, self._context.config.limits)
        return model, Job(prompt, sampling_params(request.sampling)), watch

    async def generate(self, request: pb.GenerateRequest, record: Record) -> pb.GenerateResponse:
        """The whole answer."""
        model, job, watch = await self._job(request, record)
        tally = record["tokens"] = Tally()
        [done] = await whole(generate(model, [job], self._context.metrics, tally, watch), 1)
        return pb.GenerateResponse(
            text=done.text,
            tokens=map(_token, done.samples),
            finish_reason=done.finish_reason,
            usage=_usage(tally),
        )

    async def generate_stream(
        self, request: pb.GenerateRequest, record: Record
    ) -> AsyncGenerator[pb.GeneratePart]:
        """The answer as it comes."""
        model, job, watch = await self._job(request, record)
        tally = record["tokens"] = Tally()
        delta: Delta
        source = generate(model, [job], self._context.metrics, tally, watch)
        async with aclosing(source) as deltas:
            async for delta in deltas:
                part = pb.GeneratePart(text=delta.text, tokens=map(_token, delta.samples))
                if delta.finish_reason:
                    part.finish_reason = delta.finish_reason
                    part.usage.CopyFrom(_usage(tally))
                yield part

    async def embed(self, request: pb.EmbedRequest, record: Record) -> pb.EmbedResponse:
        """The mean of each text's last hidden states."""
        model = self._model(request.model, record)
        most = self._context.config.limits.completions
        if not 1 <= len(request.texts) <= most:
            raise RequestError(f"texts must be 1 to {most}, not {len(request.texts)}")
        limits = self._context.config.limits
        make_way(model, len(request.texts), 0, limits)
        watch = self._context.watch(record)
        texts = [await watch.prompt(model, text) for text in request.texts]
        inputs = [await model.encode(text) for text in texts]
        vectors = await embed(model, inputs, limits)
        return pb.EmbedResponse(
            embeddings=[pb.Embedding(values=vector) for vector in vectors],
            prompt_tokens=sum(map(len, inputs)),
        )

    async def tokenize(self, request: pb.TokenizeRequest, record: Record) -> pb.TokenizeResponse:
        """Token ids of a text."""
        model = self._model(request.model, record)
        return pb.TokenizeResponse(
            ids=await model.encode(request.text, not request.without_special)
        )

    async def detokenize(
        self, request: pb.DetokenizeRequest, record: Record
    ) -> pb.DetokenizeResponse:
        """Text of token ids."""
        model = self._model(request.model, record)
        ids = list(request.ids)
        beyond = next((one for one in ids if one >= model.spec.vocab_size), None)
        if beyond is not None:
            raise RequestError(f"token id {beyond} is not in the vocabulary")
        return pb.DetokenizeResponse(text=await model.aside(model.tokenizer.decode, ids, False))
