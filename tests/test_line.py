"""How long a request would wait: foretold from what waits and how fast first tokens come."""

from __future__ import annotations

import random

import pytest

from pronk.serve.line import Line


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def serve(line: Line, clock: Clock, seconds: float, tokens: int) -> None:
    line.enter(tokens)
    clock.now += seconds
    line.leave(tokens, served=True)


def test_nothing_is_foretold_before_it_is_known():
    clock = Clock()
    line = Line(clock)
    for _ in range(9):
        assert line.wait(1, 10) is None
        serve(line, clock, 0.1, 10)
    for _ in range(9):
        serve(line, clock, 0.1, 10)
    assert line.wait(1, 10) == pytest.approx(0.1)


def test_idle_hours_do_not_make_it_slow():
    clock = Clock()
    line = Line(clock)
    for _ in range(50):
        serve(line, clock, 0.5, 100)
        clock.now += 3600
    assert line.wait(1, 100) == pytest.approx(0.5)
    assert line.wait(4, 400) == pytest.approx(2)
    assert line.wait(1, 800) == pytest.approx(4)  # a prompt eight times as long


def test_it_foretells_what_a_queue_waits():
    """One server, first in first out: the wait is known, and what is foretold is near it."""
    clock, rng = Clock(), random.Random(0)
    line = Line(clock)
    queue: list[tuple[int, float | None, float]] = []  # tokens, foretold, since
    ratios = []
    ready = clock.now + 1
    arrivals = sorted(clock.now + rng.uniform(0, 400) for _ in range(600))
    while arrivals or queue:
        if arrivals and (arrivals[0] < ready or not queue):
            clock.now = arrivals.pop(0)
            tokens = rng.randint(50, 400)
            foretold = line.wait(1, tokens)
            line.enter(tokens)
            queue.append((tokens, foretold, clock.now))
            if len(queue) == 1:
                ready = clock.now + tokens / 250
        else:
            clock.now = ready
            tokens, foretold, since = queue.pop(0)
            line.leave(tokens, served=True)
            if foretold is not None and clock.now - since > 3:
                ratios.append(foretold / (clock.now - since))
            if queue:
                ready = clock.now + queue[0][0] / 250
    ratios.sort()
    assert len(ratios) > 300
    assert ratios[len(ratios) // 20] > 0.7 and ratios[-len(ratios) // 20] < 1.5


def test_one_that_gives_up_frees_its_place_and_a_standstill_counts():
    clock = Clock()
    line = Line(clock)
    for _ in range(20):
        serve(line, clock, 1.0, 10)
    for _ in range(3):
        line.enter(10)
    assert line.wait(1, 10) == pytest.approx(4)
    line.leave(10, served=False)
    assert line.waiting == 2 and line.wait(1, 10) == pytest.approx(3)
    clock.now += 60
    assert line.wait(1, 10) > 10
