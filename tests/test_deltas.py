"""From the engine's events to what a stream sends: when the loop is woken, what goes together."""

from __future__ import annotations

import asyncio
import json
from contextlib import aclosing
from types import SimpleNamespace

import pytest

from pronk.engine.request import Event
from pronk.engine.sampler import Sample
from pronk.engine.stats import Stats
from pronk.errors import PronkError
from pronk.serve.config import ServeLimits
from pronk.serve.errors import ApiError
from pronk.serve.generate import Delta, Job, Tally, generate
from pronk.serve.guard.watch import Watch
from pronk.serve.hosted import Arrivals, Mailbox
from pronk.serve.http.answer import Answer, Chunked
from pronk.serve.http.sse import Chunks, data
from pronk.serve.line import Line
from pronk.serve.metrics import Metrics, ModelMetrics
from pronk.spec import SamplingParams


def token(id: int, reason: str | None = None) -> Event:
    return Event(0, Sample(id), reason)


class Post:
    """A mailbox whose clock is set, and what it did to the loop."""

    def __init__(self) -> None:
        self.line, self.now, self.calls, self.got = Line(), 0.0, [], []
        loop = SimpleNamespace(call_soon_threadsafe=self.calls.append)
        self.box = Mailbox(loop, self.line, lambda: self.now)

    def put(self, now: float, event: Event) -> int:
        """How often the loop was woken when this came."""
        self.now = now
        before = len(self.calls)
        self.box.put(lambda index, event: self.got.append(event), 0, event)
        woken = len(self.calls) - before
        for call in self.calls[before:]:
            call()
        return woken


def test_what_comes_soon_after_a_wake_up_goes_with_the_next():
    post = Post()
    times, events = (0, 0.002, 0.004, 0.006, 0.02), [token(at) for at in range(5)]
    woken = [post.put(now, one) for now, one in zip(times, events, strict=True)]
    assert woken == [1, 0, 0, 1, 1]
    assert post.got == events


def test_the_last_event_of_a_request_waits_for_nothing():
    post = Post()
    assert [post.put(0, token(1)), post.put(0.001, token(2))] == [1, 0]
    last = token(3, "length")
    assert post.put(0.002, last) == 1
    assert post.got[-1] is last and len(post.got) == 3
    assert post.put(0.003, Event(0, None, "error", PronkError("broken"))) == 1


def test_nothing_waits_while_somebody_waits_for_a_first_token():
    post = Post()
    post.put(0, token(1))
    post.line.enter(10)
    assert post.put(0.001, token(2)) == 1
    post.line.leave(10, served=True)
    assert post.put(0.002, token(3)) == 0


def test_a_loop_that_is_closed_is_no_error():
    def closed(call: object) -> None:
        raise RuntimeError("the loop is closed")

    box = Mailbox(SimpleNamespace(call_soon_threadsafe=closed), Line(), lambda: 0.0)
    for at in range(3):
        box.put(lambda index, event: None, 0, token(at, "length"))
    assert not box._items  # nothing is kept for nobody


class Hosting:
    """A model whose events the test makes."""

    name, context = "it", 64
    limits, memory = ServeLimits(), SimpleNamespace(to_dict=dict)
    tokenizer = SimpleNamespace(token_bytes=lambda id: b"<%d>" % id)

    def __init__(self) -> None:
        self.line, self.arrivals, self.cancelled = Line(), [], []
        self.engine = SimpleNamespace(cancel=self.cancelled.append, stats=Stats)

    def submit(self, prompt, params, arrivals: Arrivals, index: int, constraint) -> int:
        self.arrivals.append(arrivals)
        return index


def run(script, count: int = 1, stop: tuple[str, ...] = ()) -> tuple[list, Tally, Metrics]:
    """Deltas of a generation, whose events come as a script says: those of one list at once."""
    model, tally = Hosting(), Tally()
    metrics = Metrics([model], lambda: 0)
    jobs = [Job([1, 2], SamplingParams(stop=stop)) for _ in range(count)]

    async def all_of_it() -> list:
        watch, out = Watch(None, metrics.guarded), []
        async with aclosing(generate(model, jobs, metrics, tally, watch)) as deltas:
            steps = iter(script)
            while True:
                pending = asyncio.ensure_future(anext(deltas, None))
                await asyncio.sleep(0)
                if not pending.done():
                    for index, event in next(steps):
                        model.arrivals[0].put(index, event)
                try:
                    delta = await pending
                except ApiError as error:
                    return [*out, error]
                if delta is None:
                    return out
                out.append(delta)

    return asyncio.run(all_of_it()), tally, metrics


def test_what_came_together_is_one_delta_of_each_choice():
    found, tally, metrics = run([
        [(0, token(1)), (1, token(2))],
        [(0, token(3)), (1, token(4)), (0, token(5)), (0, token(6, "length"))],
        [(1, token(7, "length"))],
    ], count=2)  # fmt: skip
    assert [(d.index, d.text, d.finish_reason) for d in found] == [
        (0, "<1>", None), (1, "<2>", None), (0, "<3><5><6>", "length"), (1, "<4>", None),
        (1, "<7>", "length"),
    ]  # fmt: skip
    assert [sample.token for sample in found[2].samples] == [3, 5, 6]
    assert (tally.completion, tally.reasons) == (7, {0: "length", 1: "length"})
    text = metrics.text().decode()
    assert 'pronk:generation_tokens_total{model_name="it"} 7.0' in text
    assert 'pronk:inter_token_latency_seconds_count{model_name="it"} 5.0' in text
    assert 'pronk:time_to_first_token_seconds_count{model_name="it"} 2.0' in text


def test_what_came_behind_a_stop_string_is_not_told():
    (first, found), tally, _ = run(
        [[(0, token(1))], [(0, token(2)), (0, token(3)), (0, token(4))]], stop=("<3>",)
    )
    assert (first.text, found.text, found.finish_reason) == ("<1>", "<2>", "stop")
    assert tally.completion == 3


def test_what_came_before_an_error_is_told_first():
    broken = Event(0, None, "error", PronkError("it broke"))
    first, found, error = run([[(0, token(1))], [(0, token(2)), (0, broken)]])[0]
    assert (first.text, found.text) == ("<1>", "<2>")
    assert isinstance(error, ApiError) and error.status == 500


class Few(Chunked):
    """An answer whose choices are its texts."""

    async def whole(self):
        return {}

    def pieces(self, delta: Delta):
        return [self.chunk([{"text": delta.text}])]


@pytest.mark.parametrize(
    ("usage", "told"), [(None, ["none"] * 2), ("last", [None, None, 7]), ("each", [7, 7, 7])]
)
def test_which_chunks_tell_the_usage(usage, told):
    async def source():
        yield Delta(0, "a")
        yield Delta(0, "b", [], "stop")

    async def all_of_it() -> bytes:
        answer = Few(source(), 1, {"id": "x"}, Tally(completion=7), usage)
        return b"".join([piece async for piece, _ in answer.stream(pytest.fail)])

    *chunks, end, rest = asyncio.run(all_of_it()).split(b"\n\n")
    assert (end, rest) == (b"data: [DONE]", b"")
    chunks = [json.loads(chunk.removeprefix(b"data: ")) for chunk in chunks]
    usages = [chunk.get("usage", "none") for chunk in chunks]
    assert [u["completion_tokens"] if isinstance(u, dict) else u for u in usages] == told
    assert [c["text"] for chunk in chunks for c in chunk["choices"]] == ["a", "b"]


class Plain(Answer):
    """An answer whose pieces are its texts."""

    async def whole(self):
        return {}

    def pieces(self, delta: Delta):
        return [delta.text.encode()] if delta.text else []

    def ending(self):
        return [b"usage", b"end"]


def sent(deltas, count: int, failed=pytest.fail) -> list[tuple[bytes, bool]]:
    async def source():
        for delta in deltas:
            if isinstance(delta, Exception):
                raise delta
            yield delta

    async def all_of_it() -> list[tuple[bytes, bool]]:
        return [piece async for piece in Plain(source(), count).stream(failed)]

    return asyncio.run(all_of_it())


def test_the_end_of_a_stream_goes_with_its_last_piece():
    deltas = [Delta(0, "a"), Delta(1, ""), Delta(0, "b", [], "stop"), Delta(1, "c", [], "length")]
    assert sent(deltas, 2) == [(b"a", True), (b"b", True), (b"cusageend", False)]
    assert sent([Delta(0, "", [], "stop")], 1) == [(b"usageend", False)]


def test_an_error_ends_a_stream_that_has_begun():
    error, told = ApiError(500, "it broke", "engine_error"), []
    (first, failed) = sent([Delta(0, "a"), error], 1, told.append)
    assert first == (b"a", True) and told == [error]
    assert failed[1] is False and b'"code":"engine_error"' in failed[0]
    with pytest.raises(ApiError):
        sent([error], 1)


@pytest.mark.parametrize("head", [{"id": "x", "model": 'a"b'}, {"id": "x", "usage": None}])
def test_a_chunk_is_its_head_with_the_choices(head):
    choices = [{"index": 0, "text": "\u2028 é\n"}]
    found = Chunks(head).of(choices)
    assert found.startswith(b"data: {") and found.endswith(b"}\n\n") and found.isascii()
    assert json.loads(found[6:]) == {**head, "choices": choices}
    assert json.loads(data({**head, "choices": choices})[6:]) == json.loads(found[6:])


def test_tokens_that_came_together_are_one_value_to_the_detector() -> None:
    metrics = ModelMetrics(Metrics([], lambda: 0), "it")
    for _ in range(100):
        metrics.next_tokens(1, 0.01)
        metrics.next_tokens(3, 0)  # with the first: nothing was waited for
    metrics.next_tokens(20, 20 * 0.2)  # one wait, of twenty
    assert dict(metrics.anomalies.series) == {"inter_token": None}
    for _ in range(20):
        metrics.next_tokens(1, 0.2)
    alarm = dict(metrics.anomalies.series)["inter_token"]
    assert alarm is not None and alarm.usual == pytest.approx(0.01, rel=0.1)
