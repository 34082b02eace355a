"""The Open Inference Protocol (KServe's v2 data plane): health, metadata, and text to text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pronk import __version__
from pronk.errors import RequestError
from pronk.serve.generate import Job, Tally, admit, generate, make_way, whole
from pronk.serve.grpc import generation_pb2
from pronk.serve.grpc import open_inference_pb2 as pb
from pronk.serve.grpc.calls import Record
from pronk.serve.grpc.generation import sampling_params
from pronk.serve.http.context import Context

__all__ = ["Inference"]

_INPUT = "text_input"
_OUTPUTS = ("text_output", "finish_reason")


class Inference:
    """The protocol's methods, each from a message to a message."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def server_live(
        self, request: pb.ServerLiveRequest, record: Record
    ) -> pb.ServerLiveResponse:
        """Whether the process lives."""
        return pb.ServerLiveResponse(live=True)

    async def server_ready(
        self, request: pb.ServerReadyRequest, record: Record
    ) -> pb.ServerReadyResponse:
        """Whether all models are warm."""
        return pb.ServerReadyResponse(ready=all(m.warm for m in self._context.models.values()))

    async def model_ready(
        self, request: pb.ModelReadyRequest, record: Record
    ) -> pb.ModelReadyResponse:
        """Whether a model is warm."""
        return pb.ModelReadyResponse(ready=self._context.model(request.name).warm)

    async def server_metadata(
        self, request: pb.ServerMetadataRequest, record: Record
    ) -> pb.ServerMetadataResponse:
        """What serves."""
        return pb.ServerMetadataResponse(name="pronk", version=__version__)

    async def model_metadata(
        self, request: pb.ModelMetadataRequest, record: Record
    ) -> pb.ModelMetadataResponse:
        """What a model takes and gives."""
        model = self._context.model(request.name)
        tensor = pb.ModelMetadataResponse.TensorMetadata
        return pb.ModelMetadataResponse(
            name=model.name,
            platform="pronk",
            inputs=[tensor(name=_INPUT, datatype="BYTES", shape=[-1])],
            outputs=[tensor(name=name, datatype="BYTES", shape=[-1]) for name in _OUTPUTS],
        )

    async def model_infer(
        self, request: pb.ModelInferRequest, record: Record
    ) -> pb.ModelInferResponse:
        """The answers to some texts, run side by side."""
        model = self._context.model(request.model_name)
        record["model"] = model.name
        watch = self._context.watch(record)
        params = sampling_params(_sampling(request.parameters))
        texts = _texts(request)
        make_way(model, len(texts), 0, self._context.config.limits)
        checked = [await watch.prompt(model, text) for text in texts]
        prompts = [await model.encode(text) for text in checked]
        admit(model, prompts, 1, self._context.config.limits)
        tally = record["tokens"] = Tally()
        jobs = [Job(prompt, params) for prompt in prompts]
        deltas = generate(model, jobs, self._context.metrics, tally, watch)
        done = await whole(deltas, len(jobs))
        values = (
            [delta.text.encode() for delta in done],
            [(delta.finish_reason or "").encode() for delta in done],
        )
        return pb.ModelInferResponse(
            model_name=model.name,
            id=request.id,
            outputs=[
                pb.ModelInferResponse.InferOutputTensor(
                    name=name, datatype="BYTES", shape=[len(done)],
                    contents=pb.InferTensorContents(bytes_contents=texts),
                )
                for name, texts in zip(_OUTPUTS, values, strict=True)
            ],
        )  # fmt: skip


def _sampling(parameters: Mapping[str, pb.InferParameter]) -> generation_pb2.Sampling:
    """The request's parameters as the fields of the same names."""
    sampling = generation_pb2.Sampling()
    for name, given in parameters.items():
        kind = given.WhichOneof("parameter_choice")
        value: Any = getattr(given, kind) if kind else None
        try:
            if name == "stop":
                sampling.stop.append(value)
            else:
                setattr(sampling, name, value)
        except AttributeError:
            known = ", ".join(field.name for field in sampling.DESCRIPTOR.fields)
            raise RequestError(
                f"there is no parameter {name[:80]!r}: choose from {known}"
            ) from None
        except (TypeError, ValueError):
            raise RequestError(f"the parameter {name} cannot be {value!r}") from None
    return sampling


def _texts(request: pb.ModelInferRequest) -> Sequence[str]:
    """The one input, from where the protocol may have it."""
    if len(request.inputs) != 1 or request.inputs[0].name != _INPUT:
        raise RequestError(f"the request must have one input, {_INPUT}")
    tensor = request.inputs[0]
    if tensor.datatype != "BYTES":
        raise RequestError(f"{_INPUT} must be of datatype BYTES, not {tensor.datatype[:20]!r}")
    raw = request.raw_input_contents
    given = _unpacked(raw[0]) if raw else list(tensor.contents.bytes_contents)
    wanted = 1
    for size in tensor.shape:
        wanted *= size
    if not given or wanted != len(given):
        raise RequestError(f"{_INPUT} has {len(given)} texts where its shape says {wanted}")
    try:
        return [text.decode("utf-8") for text in given]
    except UnicodeDecodeError:
        raise RequestError(f"{_INPUT} is not UTF-8 text") from None


def _unpacked(raw: bytes) -> list[bytes]:
    """Elements of a raw BYTES tensor: each behind its length, four bytes, little-endian."""
    found, at = [], 0
    while at < len(raw):
        end = at + 4 + int.from_bytes(raw[at : at + 4], "little")
        if at + 4 > len(raw) or end > len(raw):
            raise RequestError(f"{_INPUT} is cut short")
        found.append(raw[at + 4 : end])
        at = end
    return found
