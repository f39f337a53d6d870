"""Training-free scores of a run: which candidates get them, the file that records them, and their trend columns.

Decisions depend on the recorded scores, so once a search has asked for a trial, nothing more is scored.
"""

from __future__ import annotations

import json
import math
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from engine.config import Budget, Plan
from engine.fleet.drain import POLL_S
from engine.fleet.fleet import TaskLost, submit
from engine.fleet.supervisor import TimedOut, WorkerDied
from engine.search.journal import read_journal
from engine.search.line_file import LineFile
from engine.search.methods.propose import USE_TRENDS, lacks
from engine.search.methods.scores import find_rows
from engine.search.run_context import RunContext
from engine.space import PROXY, Candidates
from engine.tasks import PROXIES, ProxyScores, ProxyTask, task_from_json, task_to_json
from engine.trial import Architecture, Drained, EnvironmentUnusable

Scores = Mapping[Architecture, ProxyScores]

# Scoring takes about as long as training on this many images: 21 to 34 on a CPU core, over the built-in spaces at 16 to
# 112 pixels (docs/search.md). So all scores together cost at most about one full training.
IMAGES_PER_SCORE = 30
# The most candidates that are scored (all of NAS-Bench-201 is less), and the fewest in a large space.
MOST, LEAST = 10_000, 64
# A space whose networks take long to build ends the scoring earlier: after this many worker seconds, or this share of
# --gpu-hours or --wall-time.
MOST_SECONDS, BUDGET_SHARE = 1800.0, 0.1
CHUNK = 16  # architectures that a worker scores at a time


def add_proxies(context: RunContext, plan: Plan, images: int, candidates: Candidates) -> Candidates:
    """The candidates with a trend column for each training-free score, scored now or recorded by an earlier call.

    `images` is the number of training images. Raises EnvironmentUnusable if a search that has begun has lost scores.
    """
    folder = context.folder
    recorded = read_scores(folder.proxies)
    if read_journal(folder.journal).asked:
        if len(recorded) < _count_at_start(folder.run_file):
            raise EnvironmentUnusable(
                f"{folder.proxies} is missing or incomplete; decisions depend on it: restore it from a copy"
            )
        return with_trends(candidates, recorded)
    wanted = to_score(context, plan, images, candidates)
    waiting = [architecture for architecture in wanted if architecture not in recorded]
    if waiting:
        recorded = _score(context, waiting, recorded)
    if wanted:
        context.display.say(f"proxies: {summary(recorded)}")
    return with_trends(candidates, recorded)


def to_score(context: RunContext, plan: Plan, images: int, candidates: Candidates) -> list[Architecture]:
    """The candidates that a search scores, in order; none if it cannot use scores."""
    has_use = context.config.proxies == "auto" and plan.method in USE_TRENDS and context.space.inherit is None
    return pool(candidates, plan, images) if has_use else []


def pool(candidates: Candidates, plan: Plan, images: int) -> list[Architecture]:
    """The candidates to score, in random order: all, or as many as one full training pays for, spread over MACs.

    None, if a search trains all candidates in full anyway, or can only score so few that they say little of the space,
    unless its method cannot do without scores.
    """
    affordable = int(images * plan.high.cost() / IMAGES_PER_SCORE)
    size = min(len(candidates), MOST, max(affordable, LEAST))
    needed = bool(lacks(plan.method, [low.name for low in plan.lows], ()))
    if not needed and (len(candidates) <= plan.max_high or affordable < size):
        return []
    rng = np.random.default_rng([plan.seed, 0x9207])
    rows = candidates.spread_by_macs(size, rng)
    return [candidates.architecture(row) for row in rng.permutation(rows)]


def with_trends(candidates: Candidates, recorded: Scores) -> Candidates:
    """The candidates with a column for each training-free score, nan for those without it."""
    rows = find_rows(candidates, list(recorded))
    columns = {name: np.full(len(candidates), np.nan) for name in names(recorded)}
    for row, known in zip(rows, recorded.values(), strict=True):
        for name, value in known.scores.items() if row >= 0 else ():
            columns[name][row] = value
    found = {PROXY + name: column for name, column in columns.items() if not np.isnan(column).all()}
    return replace(candidates, trends=candidates.trends | found)


def names(recorded: Scores) -> list[str]:
    """The scores that at least one architecture has."""
    return sorted({name for known in recorded.values() for name in known.scores})


def read_scores(path: Path) -> dict[Architecture, ProxyScores]:
    """The recorded scores; none if there is no file. Raises EnvironmentUnusable, naming the line, for a broken one."""
    found: dict[Architecture, ProxyScores] = {}
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True) if path.exists() else (), 1):
        if not line.endswith(b"\n"):
            break  # cut short by a crash, or being written
        try:
            known = task_from_json(ProxyScores, json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise EnvironmentUnusable(
                f"{path}, line {number}: not a line that this program wrote ({error}); restore the file from a copy"
            ) from error
        found.setdefault(Architecture(known.choices), known)
    return found


def _count_at_start(run_file: Path) -> int:
    """How many scores the run had when it began; 0 for a run of an earlier version."""
    try:
        facts: dict[str, Any] = json.loads(run_file.read_text())
    except (OSError, ValueError):
        return 0
    return int(facts.get("proxies", 0))


def seconds(recorded: Scores) -> float:
    """Worker seconds that scoring took."""
    return sum(known.seconds for known in recorded.values())


def summary(recorded: Scores) -> str:
    """What was scored, for people."""
    text = f"{len(recorded):,} candidates scored without training in {seconds(recorded):,.0f} worker seconds"
    reasons = Counter(next(iter(known.missing.items())) for known in recorded.values() if known.missing)
    if reasons:
        (name, why), _ = reasons.most_common(1)[0]
        text += f"; {reasons.total():,} of them without some score, mostly {name}: {why}"
    return text


def ranks(recorded: Scores) -> dict[Architecture, dict[str, int]]:
    """The rank of each architecture by each of its scores, 1 for the greatest; equal scores share the better rank."""
    found: dict[Architecture, dict[str, int]] = {architecture: {} for architecture in recorded}
    for name in names(recorded):
        own = {a: known.scores[name] for a, known in recorded.items() if name in known.scores}
        values = np.array(list(own.values()))
        above = len(values) - np.searchsorted(np.sort(values), values, "right")
        for architecture, count in zip(own, above.tolist(), strict=True):
            found[architecture][name] = 1 + count
    return found


def standing(recorded: Scores) -> dict[Architecture, float]:
    """The mean rank of each architecture over its scores, as a share: 1 for the best by all of them, 0 for the worst.

    Architectures without any score are left out.
    """
    counts = {name: sum(name in known.scores for known in recorded.values()) for name in names(recorded)}
    return {
        architecture: float(np.mean([1 - (rank - 1) / max(1, counts[name] - 1) for name, rank in own.items()]))
        for architecture, own in ranks(recorded).items()
        if own
    }


def _allowance(budget: Budget, workers: int) -> float:
    """Worker seconds that scoring may take."""
    hours = min(budget.gpu_hours, budget.wall_time * workers)
    return min(MOST_SECONDS, BUDGET_SHARE * hours * 3600) if math.isfinite(hours) else MOST_SECONDS


def _score(context: RunContext, waiting: Sequence[Architecture], recorded: Scores) -> dict[Architecture, ProxyScores]:
    """Scores architectures on all workers; returns all scores, also written to the run folder as they arrive.

    Raises Drained, with everything that has arrived recorded, if the user asks the run to stop.
    """
    teacher = context.folder.teacher_weights(context.config) if context.config.low.kd_loss != "none" else None
    with LineFile(context.folder.proxies) as file:
        chunks = deque(tuple(waiting[start : start + CHUNK]) for start in range(0, len(waiting), CHUNK))
        scoring = _Scoring(context, teacher, chunks, dict(recorded))
        for found in scoring.run():
            file.append(*map(task_to_json, found))
    if context.drain.asked:
        raise context.drain.drained()
    return scoring.recorded


@dataclass
class _Scoring:
    """Chunks of architectures that wait to be scored, and those that workers have. `recorded` grows as they arrive."""

    context: RunContext
    teacher: Path | None
    waiting: deque[tuple[Architecture, ...]]
    recorded: dict[Architecture, ProxyScores]
    open: dict[Future[Any], tuple[Architecture, ...]] = field(default_factory=dict)

    def run(self) -> Iterator[list[ProxyScores]]:
        """The scores of each chunk as it arrives, until all is scored, time is up, or the user wants to stop."""
        allowed = _allowance(self.context.budget, self.context.fleet.capacity)
        total, spent = len(self.recorded) + sum(map(len, self.waiting)), seconds(self.recorded)
        self.context.display.say(f"proxies: scoring {total - len(self.recorded):,} candidates without training")
        self.context.display.expect("proxies", total)
        while True:
            while self.waiting and spent < allowed and self._has_room():
                chunk = self.waiting.popleft()
                limit = self.context.resources.trial_timeout * len(chunk)
                task = ProxyTask(self.context.worker, chunk, self.teacher, limit)
                self.open[submit(self.context.fleet, task)] = chunk
            if not self.open:
                return
            done, _ = wait(self.open, POLL_S, FIRST_COMPLETED)
            for future in done:
                found = self._outcome(future, self.open.pop(future))
                self.recorded |= {Architecture(known.choices): known for known in found}
                spent += sum(known.seconds for known in found)
                self.context.display.advance("proxies", len(self.recorded))
                yield found

    def _has_room(self) -> bool:
        """Whether to send another chunk: one more than each worker has keeps it busy."""
        return len(self.open) < 2 * self.context.fleet.capacity and not self.context.drain.asked

    def _outcome(self, future: Future[Any], chunk: tuple[Architecture, ...]) -> list[ProxyScores]:
        """The scores of a chunk. If its worker died, its members are tried one by one, to find the one that kills it;
        that one has no scores."""
        try:
            return [task_from_json(ProxyScores, known) for known in future.result()]
        except Drained:
            if not self.context.drain.asked:
                raise
            return []
        except (WorkerDied, TimedOut, TaskLost) as error:
            if len(chunk) > 1:
                self.waiting.extendleft((one,) for one in chunk)
                return []
            return [ProxyScores(chunk[0].choices, {}, dict.fromkeys(PROXIES, str(error)[:500]))]


