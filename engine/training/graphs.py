"""Students side by side on a CUDA device: each has its own stream and runs its whole step as one CUDA graph.

At 64 images a student's step has some 600 kernels of a few microseconds, and launching them one by one takes longer
than running them. A graph launches them all at once, and graphs on several streams fill the device. `GraphedStudent`
makes the calls into CUDA; decisions, and restoring state after trial steps, are functions of plain numbers and tensors.
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
    update_ema,
)

WARM_UP = 3  # steps before a capture: cuDNN chooses algorithms, Triton compiles, autograd and the optimiser allocate
# A capture costs 40 to 50 ms: the warm-up (3 steps of about 6 ms), the recording (10 to 20 ms) and the instantiation (a
# few ms). A replay saves about 4 ms per step: 1.5 ms instead of 5 to 6 ms. These are estimates, not measurements.
MIN_STEPS = 20
# cuDNN's benchmark mode costs a few ms per convolution shape, a second per network of the larger spaces, and saves
# perhaps half a millisecond per step.
BENCHMARK_STEPS = 2000
SLOTS = 3  # steps whose inputs are kept, so the number of steps that a fast student may run ahead of a slow one
HEADROOM = 1.1  # another student is admitted if this many times the largest student's memory is free
# Before torch 2.12 the allocator believes that a failed capture is still under way, and then refuses to free memory
# (pytorch/pytorch#180395).
CAPTURE_FAILURE_IS_FATAL = torch.__version__ < "2.12"  # a TorchVersion, compared by number


def reason_for_eager(execution: Execution, device: torch.device, steps: int) -> str:
    """Why a training of this many steps runs without graphs; empty if it uses them."""
    if execution == "eager":
        return "asked for"
    if device.type != "cuda":
        return "no CUDA device"
    if execution == "auto" and steps < MIN_STEPS:
        return f"{steps} steps do not pay for a capture"
    return ""


def has_room(free: int, taken: Sequence[int]) -> bool:
    """Whether a student fits into `free` bytes beside those that have `taken` bytes each. The first may always try."""
    return not taken or free >= HEADROOM * max(taken)


def find_host_sync(step: Callable[[], None]) -> str:
    """Runs a step and returns "", or, if the step makes the host wait for the device, stops there and says where.

    A graph cannot record such a wait, and a capture must not reach one: a failed capture keeps its memory and, before
    torch 2.12, makes the process unusable. The debug mode applies to the whole process, but no other thread of the
    worker calls CUDA through torch.
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


def capture_failure(error: RuntimeError) -> str:
    """Why a capture failed. Raises if memory ran out, and raises `ProcessLost` if this torch cannot recover."""
    cause = error.__context__ or error  # ending a broken capture raises a second error
    if status_of(error) == "oom":
        raise error
    if CAPTURE_FAILURE_IS_FATAL:
        raise ProcessLost(f"torch {torch.__version__} cannot go on after a failed capture: {cause}") from error
    if status_of(cause) == "oom":
        raise cause
    return f"{type(cause).__name__}: {cause}"


@torch.no_grad()
def run_and_restore(student: Student, steps: Callable[[], None]) -> None:
    """Runs trial `steps`, then restores the student's state in place: a graph refers to that memory."""
    saved = [(tensor, tensor.clone()) for tensor in student.state()]
    try:
        with torch.enable_grad():
            steps()
    finally:
        for tensor, copy in saved:
            tensor.copy_(copy)


class Slot:
    """Inputs of one step, until every student has copied them; written on the current stream, read on the students'."""

    def __init__(self, example: Inputs) -> None:
        self.inputs = example.static_copy()
        self.written = torch.cuda.Event()
        self.reads: list[torch.cuda.Event] = []

    def write(self, inputs: Inputs) -> None:
        """Copies a step's inputs here once all students have read the previous ones. The host does not wait."""
        stream = torch.cuda.current_stream()
        for read in self.reads:
            stream.wait_event(read)
        self.reads.clear()
        self.inputs.copy_from(inputs)
        self.written.record(stream)

    def read_by(self, stream: torch.cuda.Stream) -> None:
        """Records that the student on this stream has its copy."""
        event = torch.cuda.Event()
        event.record(stream)
        self.reads.append(event)


@dataclass
class GraphedStudent:
    """A student, its stream, and the graph of its step once captured. Each graph has its own memory pool, because
    graphs that run concurrently must not share one."""

    student: Student
    stream: torch.cuda.Stream
    inputs: Inputs
    graph: torch.cuda.CUDAGraph | None = None

    def advance(self, slot: Slot, step: int, decay: float) -> None:
        """One step on the inputs of a slot, which are first copied to where the graph reads them."""
        self.stream.wait_event(slot.written)
        with torch.cuda.stream(self.stream):
            self.inputs.copy_from(slot.inputs)
            slot.read_by(self.stream)
            if self.graph is not None:
                self.graph.replay()
            else:
                reseed(self.student, step)
                take_step(self.student, self.inputs)
            update_ema(self.student, step, decay)

    def capture(self) -> str:
        """Captures the student's step on its inputs and returns "", or the reason why it cannot be captured.

        Raises errors of the step itself, out-of-memory errors, and errors that lose the device.
        """
        inputs = self.inputs
        before = _random_state(self.stream.device)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(WARM_UP - 1):
                take_step(self.student, inputs)
            reason = find_host_sync(partial(take_step, self.student, inputs))
        self.stream.synchronize()
        if reason:
            self.student.optimiser.zero_grad(set_to_none=True)
            return reason
        if before != _random_state(self.stream.device):
            # Graphs that run side by side share one generator, so each one's numbers would depend on the others.
            return "its layers draw random numbers"
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local lets the loader's threads call CUDA during the capture. The outer stream context is needed
            # because some versions of torch leave the graph's stream current when a capture fails.
            with (
                torch.cuda.stream(self.stream),
                torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"),
            ):
                take_step(self.student, inputs)
        except RuntimeError as error:
            torch.cuda.synchronize()  # raises again if more than the capture was lost
            self.student.optimiser.zero_grad(set_to_none=True)
            return capture_failure(error)
        self.graph = graph
        return ""

    def join(self) -> None:
        """Makes the current stream wait for all steps of this student."""
        torch.cuda.current_stream().wait_stream(self.stream)

    def close(self) -> None:
        """Frees the graph's memory."""
        self.join()
        self.stream.synchronize()
        if self.graph is not None:
            self.graph.reset()
            self.graph = None


class StreamRunner:
    """Runs the students of a cohort side by side, each on its stream.

    The inputs of a step go to one of a few slots, and from there to each student, whose graph reads them at a fixed
    address. So a fast student can run up to SLOTS steps ahead of a slow one, and the loader and the teacher can already
    work on the next step.
    """

    def __init__(
        self, cohort: Sequence[Student], example: Inputs, execution: Execution, steps: int, decay: float
    ) -> None:
        """Captures the students' steps one after another. A student that does not fit into memory is dropped as "oom",
        and retried in another cohort. `example` has the shapes, types and layouts of the inputs to come.
        """
        self.slots, self.decay = [Slot(example) for _ in range(SLOTS)], decay
        device = example.images.device
        self._benchmark = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = steps >= BENCHMARK_STEPS
        eager = reason_for_eager(execution, device, steps)
        self.admitted: list[GraphedStudent] = []
        taken: list[int] = []
        for student in cohort:
            free = _free_memory(device)
            if not has_room(free, taken):
                student.drop("oom", f"{free:,} bytes free beside {len(taken)} students are not enough")
                continue
            graphed = GraphedStudent(student, torch.cuda.Stream(device), example.static_copy())
            self.admitted.append(graphed)
            reason = eager or self._capture(graphed)
            student.execution = f"eager: {reason}" if reason else "graph"
            if reason and isinstance(student.forward, LeanForward):
                # Launching a Triton kernel from the host takes longer than launching one of PyTorch's.
                student.forward = student.network
            if reason and execution == "graph" and student.status == "ok":
                student.drop("error", f"no graph: {reason}")
            taken.append(free - _free_memory(device))

    def _capture(self, graphed: GraphedStudent) -> str:
        reasons: list[str] = []
        student = graphed.student
        guarded(student, partial(run_and_restore, student, lambda: reasons.append(graphed.capture())))
        return reasons[0] if reasons else student.error

    def advance(self, inputs: Inputs, step: int) -> None:
        """One step of every student that is still in the cohort."""
        slot = self.slots[step % SLOTS]
        slot.write(inputs)
        for graphed in self.admitted:
            if graphed.student.status == "ok":
                guarded(graphed.student, partial(graphed.advance, slot, step, self.decay))

    def join(self) -> None:
        for graphed in self.admitted:
            graphed.join()

    def close(self) -> None:
        for graphed in self.admitted:
            graphed.close()
        torch.backends.cudnn.benchmark = self._benchmark  # latency is measured without it


class SequentialRunner:
    """Runs the students of a cohort one after another (CPU)."""

    def __init__(self, cohort: Sequence[Student], decay: float) -> None:
        self.cohort, self.decay = cohort, decay

    def advance(self, inputs: Inputs, step: int) -> None:
        """One step of every student that is still in the cohort."""
        for student in self.cohort:
            if student.status == "ok":
                guarded(student, partial(self._advance_one, student, inputs, step))

    def _advance_one(self, student: Student, inputs: Inputs, step: int) -> None:
        reseed(student, step)
        take_step(student, inputs)
        update_ema(student, step, self.decay)

    def join(self) -> None:
        """Nothing runs in the background."""

    def close(self) -> None:
        """There is nothing to free."""


def guarded(student: Student, work: Callable[[], None]) -> None:
    """Runs `work` for a student. An exception drops the student with a status, unless the device is lost."""
    try:
        work()
    except Exception as error:  # a user's network may raise anything
        if fatal(error):
            raise
        student.drop(status_of(error), f"{type(error).__name__}: {error}")


def _free_memory(device: torch.device) -> int:
    """Free bytes of the device, after the allocator has returned its cache."""
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def _random_state(device: torch.device) -> tuple[bytes, bytes]:
    states: Iterable[Tensor] = (torch.get_rng_state(), torch.cuda.get_rng_state(device))
    host, on_device = (state.numpy().tobytes() for state in states)
    return host, on_device
