"""Step changes are found at once, and noise is not."""

from __future__ import annotations

import random

import pytest

from pronk.serve.anomaly import Anomalies


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def noise(rng: random.Random, middle: float) -> float:
    return middle * rng.lognormvariate(0, 0.25)


@pytest.mark.parametrize("factor", [2.0, 5.0])
@pytest.mark.parametrize("rate", [4, 50])  # values a second
def test_a_step_is_found_within_two_seconds(factor: float, rate: int) -> None:
    rng, clock = random.Random(1), Clock()
    found = Anomalies(clock)
    for _ in range(600):
        clock.now += 1 / rate
        assert found.latency("ttft", noise(rng, 0.1)) is None
    start, alarm = clock.now, None
    while alarm is None and clock.now < start + 10:
        clock.now += 1 / rate
        alarm = found.latency("ttft", noise(rng, 0.1 * factor))
    assert alarm is not None and clock.now - start <= 2
    assert alarm.series == "ttft" and alarm.since == clock.now
    assert alarm.usual == pytest.approx(0.1, rel=0.1) and alarm.now > 0.12
    assert dict(found.series)["ttft"] == alarm


def test_noise_and_lone_values_raise_nothing() -> None:
    rng, found = random.Random(2), Anomalies()
    for i in range(50_000):
        value = noise(rng, 0.02) * (50 if i % 97 == 0 else 1)
        assert found.latency("step", value) is None
    assert dict(found.series) == {"step": None}


def test_an_alarm_ends_with_its_cause() -> None:
    rng, found = random.Random(3), Anomalies()
    for middle, alarmed in ((0.1, False), (0.4, True), (0.1, False)):
        for _ in range(200):
            found.latency("ttft", noise(rng, middle))
        assert (dict(found.series)["ttft"] is not None) == alarmed


def test_a_lasting_change_becomes_the_usual() -> None:
    rng, clock = random.Random(4), Clock()
    found = Anomalies(clock)
    raised = 0
    for i in range(4000):
        clock.now += 0.1
        raised += found.latency("ttft", noise(rng, 0.1 if i < 500 else 0.5)) is not None
    assert raised == 1
    assert dict(found.series)["ttft"] is None


def test_errors() -> None:
    rng, clock = random.Random(5), Clock()
    found = Anomalies(clock)
    for _ in range(2000):
        assert found.outcome("errors", rng.random() < 0.01) is None
    start = clock.now
    alarms = 0
    for _ in range(20):  # ten requests a second, half of them failing
        clock.now += 0.1
        alarm = found.outcome("errors", rng.random() < 0.5)
        if alarm is not None:
            alarms += 1
            assert clock.now - start <= 2
    assert alarms == 1
    for _ in range(200):
        found.outcome("errors", False)
    assert dict(found.series)["errors"] is None


def test_a_server_that_always_fails_a_little_is_as_usual() -> None:
    rng, found = random.Random(6), Anomalies()
    for _ in range(20_000):
        assert found.outcome("errors", rng.random() < 0.1) is None
