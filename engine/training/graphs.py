"""Students side by side on a CUDA device: each on a stream of its own, its whole step one CUDA graph.

At 64 images a student's step is some 600 kernels of a few microseconds, and starting them one by one takes longer than
running them. A graph starts them all at once; graphs on several streams fill the device. The calls into CUDA are in
`Lane`; what is decided, and what is put back after a trial step, are functions of plain numbers and tensors.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from engine.config import Execution
from engine.training.lean import LeanForward
from engine.training.student import (
    Inputs,
    ProcessLost,
    Student,
    fatal,
    reseed,
    status_of,
    take_step,
    update_average,
)

WARM_UP = 3  # steps before a capture: cuDNN chooses, Triton compiles, autograd and the optimiser allocate
# A capture costs the warm-up (3 steps of about 6 ms), the recording (10 to 20 ms) and its instantiation (some ms):
# 40 to 50 ms. A replay saves about 4 ms a step, 5 to 6 ms launched one by one against 1.5. Estimates, not measured.
LEAST_STEPS = 20
# cuDNN's trying of algorithms costs some ms per shape of convolution, a second per network of the larger spaces, for
# perhaps half a millisecond per step.
BENCHMARK_STEPS = 2000
SLOTS = 3  # steps whose inputs are held: how far students that step fast may be ahead of a slow one
ROOM = 1.1  # of what the largest student took: free memory that another one is let in with
# Before 2.12 a capture that fails is under way for ever to the allocator, which then refuses to free anything
# (pytorch/pytorch#180395).
FAILURES_STAY = torch.__version__ < "2.12"  # a TorchVersion: by number


def reason_for_eager(execution: Execution, device: torch.device, steps: int) -> str:
    """Why a training of so many steps runs without graphs; empty where it has them."""
    if execution == "eager":
        return "asked for"
    if device.type != "cuda":
        return "no CUDA device"
    if execution == "auto" and steps < LEAST_STEPS:
        return f"{steps} steps do not pay for a capture"
    return ""


def has_room(free: int, taken: Sequence[int]) -> bool:
    """Whether another student fits into `free` bytes beside those that took `taken`; the first one always may try."""
    return not taken or free >= ROOM * max(taken)


def waits_for_device(step: Callable[[], None]) -> str:
    """Does a step; says so where it makes the host wait for the device, at which point it ends.

    No graph can record that, and a capture must not meet it: one that fails keeps its memory, and before torch 2.12
    costs the process. The mode is the whole process's: no other thread of ours calls CUDA through torch.
    """
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        if "synchronizing CUDA operation" not in str(error):
            raise
        return f"it waits for the device in each step ({error})"
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    return ""


def why_not_recorded(error: RuntimeError) -> str:
    """Why a capture failed. Raises out of memory, and `ProcessLost` where this version of torch cannot go on."""
    cause = error.__context__ or error  # ending a broken capture raises once more
    if status_of(error) == "oom":
        raise error
    if FAILURES_STAY:
        raise ProcessLost(f"torch {torch.__version__} cannot go on after a capture that failed: {cause}") from error
    if status_of(cause) == "oom":
        raise cause
    return f"{type(cause).__name__}: {cause}"


@torch.no_grad()
def without_trace(member: Student, trial: Callable[[], None]) -> None:
    """Runs `trial` steps, then puts the student back into the state it was in, in place: a graph knows the memory."""
    saved = [(tensor, tensor.clone()) for tensor in member.state()]
    try:
        with torch.enable_grad():
            trial()
    finally:
        for tensor, copy in saved:
            tensor.copy_(copy)


class Slot:
    """Inputs of one step, until every lane has copied them: `written` on the current stream, read on the lanes'."""

    def __init__(self, example: Inputs) -> None:
        self.inputs = example.held()
        self.written = torch.cuda.Event()
        self.reads: list[torch.cuda.Event] = []

    def write(self, inputs: Inputs) -> None:
        """Puts a step's inputs here when the lanes are done with the last ones. The host does not wait."""
        stream = torch.cuda.current_stream()
        for read in self.reads:
            stream.wait_event(read)
        self.reads.clear()
        self.inputs.take(inputs)
        self.written.record(stream)

    def read_by(self, stream: torch.cuda.Stream) -> None:
        """The lane on this stream has been given its copy."""
        event = torch.cuda.Event()
        event.record(stream)
        self.reads.append(event)


@dataclass
class Lane:
    """A student, its stream, and the graph of its step once that is captured. Each graph has a memory pool of its own:
    graphs that run at the same time must not share one."""

    member: Student
    stream: torch.cuda.Stream
    inputs: Inputs
    graph: torch.cuda.CUDAGraph | None = None

    def advance(self, slot: Slot, step: int, decay: float) -> None:
        """One step on the inputs of a slot, which the lane copies to where its graph reads them."""
        self.stream.wait_event(slot.written)
        with torch.cuda.stream(self.stream):
            self.inputs.take(slot.inputs)
            slot.read_by(self.stream)
            if self.graph is not None:
                self.graph.replay()
            else:
                reseed(self.member, step)
                take_step(self.member, self.inputs)
            update_average(self.member, step, decay)

    def capture(self) -> str:
        """Records the student's step on the lane's inputs; returns why that could not be done, or nothing.

        Raises what the step itself raises, out of memory, and the loss of the device.
        """
        inputs = self.inputs
        before = _random_state(self.stream.device)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(WARM_UP - 1):
                take_step(self.member, inputs)
            reason = waits_for_device(partial(take_step, self.member, inputs))
        self.stream.synchronize()
        if reason:
            self.member.optimiser.zero_grad(set_to_none=True)
            return reason
        if before != _random_state(self.stream.device):
            # Graphs that run side by side share one generator: what each draws would depend on the others.
            return "its layers draw random numbers"
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: the loader's threads may go on calling CUDA. The stream around it: some versions of torch
            # leave the graph's current when the capture fails.
            with (
                torch.cuda.stream(self.stream),
                torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"),
            ):
                take_step(self.member, inputs)
        except RuntimeError as error:
            torch.cuda.synchronize()  # raises again where more was lost than the capture
            self.member.optimiser.zero_grad(set_to_none=True)
            return why_not_recorded(error)
        self.graph = graph
        return ""

    def join(self) -> None:
        """What the current stream does next comes after all that this lane was given."""
        torch.cuda.current_stream().wait_stream(self.stream)

    def close(self) -> None:
        """Gives the graph's memory back."""
        self.join()
        self.stream.synchronize()
        if self.graph is not None:
            self.graph.reset()
            self.graph = None


class Lanes:
    """The students of a cohort in their lanes. A step's inputs go to one of a few slots, and from there to each lane,
    whose graph reads them where they stay. So a fast student is up to SLOTS steps ahead of a slow one, while the loader
    and the teacher are already at the next."""

    def __init__(
        self, cohort: Sequence[Student], example: Inputs, execution: Execution, steps: int, decay: float
    ) -> None:
        """Captures the students' steps one after the other; who finds no room leaves as "oom", for another cohort.

        `example` has the shapes, types and layouts of the inputs to come.
        """
        self.slots, self.decay = [Slot(example) for _ in range(SLOTS)], decay
        device = example.images.device
        self._benchmark = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = steps >= BENCHMARK_STEPS
        eager = reason_for_eager(execution, device, steps)
        self.lanes: list[Lane] = []
        taken: list[int] = []
        for member in cohort:
            free = _free_memory(device)
            if not has_room(free, taken):
                member.leave("oom", f"{free:,} bytes free beside {len(taken)} students are not enough")
                continue
            lane = Lane(member, torch.cuda.Stream(device), example.held())
            self.lanes.append(lane)
            reason = eager or self._capture(lane)
            member.execution = f"eager: {reason}" if reason else "graph"
            if reason and isinstance(member.forward, LeanForward):
                member.forward = member.network  # the host takes longer to start a Triton kernel than one of PyTorch's
            if reason and execution == "graph" and member.status == "ok":
                member.leave("error", f"no graph: {reason}")
            taken.append(free - _free_memory(device))

    def _capture(self, lane: Lane) -> str:
        reasons: list[str] = []
        guarded(lane.member, partial(without_trace, lane.member, lambda: reasons.append(lane.capture())))
        return reasons[0] if reasons else lane.member.error

    def advance(self, inputs: Inputs, step: int) -> None:
        """The step of every student that is still in the cohort."""
        slot = self.slots[step % SLOTS]
        slot.write(inputs)
        for lane in self.lanes:
            if lane.member.status == "ok":
                guarded(lane.member, partial(lane.advance, slot, step, self.decay))

    def join(self) -> None:
        for lane in self.lanes:
            lane.join()

    def close(self) -> None:
        for lane in self.lanes:
            lane.close()
        torch.backends.cudnn.benchmark = self._benchmark  # latencies are measured without


class Line:
    """The students of a cohort one after the other, as a CPU has them. `Lanes` without the lanes."""

    def __init__(self, cohort: Sequence[Student], decay: float) -> None:
        self.cohort, self.decay = cohort, decay

    def advance(self, inputs: Inputs, step: int) -> None:
        """The step of every student that is still in the cohort."""
        for member in self.cohort:
            if member.status == "ok":
                guarded(member, partial(self._one, member, inputs, step))

    def _one(self, member: Student, inputs: Inputs, step: int) -> None:
        reseed(member, step)
        take_step(member, inputs)
        update_average(member, step, self.decay)

    def join(self) -> None:
        """Nothing is under way."""

    def close(self) -> None:
        """Nothing is held."""


def guarded(member: Student, work: Callable[[], None]) -> None:
    """Does a student's work; what that raises makes it leave with its status. Raises only where the device is lost."""
    try:
        work()
    except Exception as error:  # of a user's network it may be any
        if fatal(error):
            raise
        member.leave(status_of(error), f"{type(error).__name__}: {error}")


def _free_memory(device: torch.device) -> int:
    """Bytes that the device has left, without what the allocator keeps for itself."""
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def _random_state(device: torch.device) -> tuple[bytes, bytes]:
    states: Iterable[Tensor] = (torch.get_rng_state(), torch.cuda.get_rng_state(device))
    one, other = (state.numpy().tobytes() for state in states)
    return one, other
