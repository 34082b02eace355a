"""What an engine has done, and how full it is."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from pronk.engine.scheduler import Scheduler
from pronk.engine.speculate import Speculator
from pronk.graph.pack import KV_BLOCK

__all__ = ["Counters", "PoolStats", "Stats", "stats_of"]


@dataclass(frozen=True, slots=True)
class PoolStats:
    """Blocks of one KV pool.

    Parameters
    ----------
    attention : {"global", "window", "chunked"}
    blocks : int
        All of them; each has 32 positions.
    held : int
        Those that a request or a session holds.
    cached : int
        Those that nobody holds and whose keys and values are still there, for a later prompt.
    free : int
        The rest. A request can have what is free or cached.
    """

    attention: str
    blocks: int
    held: int
    cached: int
    free: int

    @property
    def usage(self) -> float:
        """The held share."""
        return self.held / self.blocks if self.blocks else 0.0


@dataclass(frozen=True, slots=True)
class Stats:
    """Figures of an engine; those not said to be of now are counted since it began.

    Parameters
    ----------
    waiting, running : int
        Requests of now.
    pools : tuple of PoolStats
        Now, one for each kind of attention.
    fragmentation : float
        Now: the share of positions in held blocks that hold nothing.
    prefix_queries, prefix_hits : int
        Tokens of prompts, and those of them whose keys and values were there.
    prompt_tokens, generated_tokens : int
        Tokens of prompts that were computed (again, after a preemption), and tokens drawn.
    drafted_tokens, accepted_tokens : int
        Tokens drafted, and those of them that stood.
    steps : int
    step_seconds : float
        What all steps took, by the clock.
    last_step_seconds : float
    last_step_tokens : int
    budget : int
        Most tokens of a step now; see ``target_tpot``.
    preemptions : int
        How often a running request gave its blocks to another.
    """

    waiting: int = 0
    running: int = 0
    pools: tuple[PoolStats, ...] = ()
    fragmentation: float = 0.0
    prefix_queries: int = 0
    prefix_hits: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    steps: int = 0
    step_seconds: float = 0.0
    last_step_seconds: float = 0.0
    last_step_tokens: int = 0
    budget: int = 0
    preemptions: int = 0


@dataclass(slots=True)
class Counters:
    """What an engine counts as it goes; see `Stats`."""

    prefix_queries: int = 0
    prefix_hits: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    step_seconds: float = 0.0
    last_step_seconds: float = 0.0
    last_step_tokens: int = 0

    def observe(self, tokens: int, seconds: float) -> None:
        """Count one step."""
        self.steps += 1
        self.step_seconds += seconds
        self.last_step_seconds = seconds
        self.last_step_tokens = tokens


def stats_of(counters: Counters, scheduler: Scheduler, speculator: Speculator) -> Stats:
    """The figures of an engine. Safe beside its thread: what it changes is copied first."""
    running = scheduler.running[:]
    pools = []
    for manager in scheduler.kv.managers:
        pool = manager.pool
        free, cached, blocks = pool.free, pool.cached, pool.num_blocks
        pools.append(
            PoolStats(manager.group.attention, blocks, blocks - free, cached, free - cached)
        )
    places = sum(KV_BLOCK * max(map(len, r.holding.blocks)) for r in running)
    used = sum(r.computed for r in running)
    return Stats(
        **asdict(counters),
        waiting=len(scheduler.waiting),
        running=len(running),
        pools=tuple(pools),
        fragmentation=max(0.0, 1 - used / places) if places else 0.0,
        drafted_tokens=speculator.drafted,
        accepted_tokens=speculator.accepted,
        budget=scheduler.budget,
        preemptions=scheduler.preemptions,
    )
