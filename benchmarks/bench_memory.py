"""What a training step keeps in memory: AdamW on everything, LongAct and LoRA, side by side.

    python benchmarks/bench_memory.py                # SmolLM2-135M's shape, 2 minutes on 2 cores
    python benchmarks/bench_memory.py --model 1b --tokens 128 --rounds 1
    python benchmarks/bench_memory.py --device cuda --dtype bfloat16 --gradient-checkpointing
    python benchmarks/bench_memory.py --json bench.json --plot bench.png

AdamW       torch.optim.AdamW(fused=True) on every parameter
full        longact.apply and FusedMaskedAdam: salient rows of q_proj and k_proj, all else dense
compact     the same with state="compact"
sparse      longact.apply(..., others="freeze"): salient rows of q_proj and k_proj, and nothing else
LoRA        peft on q_proj and k_proj, where longact trains (more usual are q_proj and v_proj)

Models are random Llamas of public shapes: memory does not depend on the values of weights. Every
run of a variant has a process of its own, so that no peak is another variant's.

Memory: weights, gradients (after the backward, where there are most) and optimizer state are
counted tensor by tensor; activations are what a forward leaves for its backward. The peak, over
forward, backward and update, is the allocator's own: the running sum of all that torch allocates
and frees on the CPU, torch.cuda.max_memory_allocated on a GPU.
Time: in other processes, without that; the variants take turns, each round in another order, and
figures are medians over the steps of all rounds.

Each variant's memory run begins with two steps on a short batch, which are checked: losses are
finite, and the first equal in all variants; of the weights that changed which a variant says it
trains, bit by bit; the tensors counted are what the allocator holds; with others="freeze" nothing
of the size of a whole q or k weight is allocated. If a check fails, the run ends with exit code 1
and prints no figure.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import multiprocessing
import os
import resource
import sys
import time
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch
from bench_update import LR, PAPER_KEEP, WEIGHT_DECAY, CheckFailed, Goal, machine, positive
from bench_update import progress as say
from shapes import MODELS, ModelShape
from timing import Timing
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

import longact

SHAPES = {
    # name, layers, hidden, intermediate, heads, kv_heads, head_dim, vocab
    "tiny": ModelShape("tiny", 2, 64, 96, 4, 2, 16, 256, tied=True, qk_norm=False),
    "smollm2": MODELS["smollm2-135m"],
    "125m": ModelShape("mobilellm-125m", 30, 576, 1536, 9, 3, 64, 32000, tied=True, qk_norm=False),
    "350m": ModelShape("mobilellm-350m", 32, 960, 2560, 15, 5, 64, 32000, tied=True, qk_norm=False),
    "1b": ModelShape("llama-3.2-1b", 16, 2048, 8192, 32, 8, 64, 128256, tied=True, qk_norm=False),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DEFAULT_TOKENS = {"cpu": 256, "cuda": 4096}
SPARSE_KEEPS = (PAPER_KEEP, 0.1)
LORA_RANKS = (16, 64)
TARGETS = ("q_proj", "k_proj")
GOAL = 0.032  # gradients and optimizer state of sparse at keep 0.3, of AdamW's

# Of the checked steps. A prime that divides no dimension of a model, so that no activation has the
# size of a weight.
CHECK_TOKENS = 61
LOSS_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
UNCOUNTED = (0.01, 1 << 20)  # share and bytes that the allocator may hold beyond what is counted
SPARE = 1 << 30  # bytes of free memory that are left to others
SIGKILL = -9
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc")


class DoesNotFit(Exception):
    """A variant needs more memory than there is."""


# ---- variants ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spec:
    """What one line of the tables trains, and how."""

    kind: Literal["adamw", "full", "compact", "sparse", "lora"]
    keep: float | None = None
    rank: int | None = None

    @property
    def label(self) -> str:
        if self.kind == "adamw":
            return "AdamW"
        if self.kind == "lora":
            return f"LoRA r {self.rank}"
        return f"longact {self.keep:g} {self.kind}"

    @property
    def trains_all(self) -> bool:
        """Whether parameters other than those of q_proj and k_proj are trained."""
        return self.kind in ("adamw", "full", "compact")


def all_specs() -> list[Spec]:
    return [
        Spec("adamw"),
        Spec("full", PAPER_KEEP),
        Spec("compact", PAPER_KEEP),
        *(Spec("sparse", keep) for keep in SPARSE_KEEPS),
        *(Spec("lora", rank=rank) for rank in LORA_RANKS),
    ]


@dataclass(frozen=True)
class Job:
    """A variant and what it is measured on."""

    spec: Spec
    shape: ModelShape
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    batch: int = 1
    tokens: int = 256
    checkpointing: bool = False
    threads: int | None = None
    steps: int = 3  # that are timed
    memory: int | None = None  # bytes that there are for it

    @property
    def trained(self) -> int:
        """Elements that a step updates."""
        spec = self.spec
        masked = [p for p in self.shape.parameters() if p.masked]
        if spec.rank is not None:
            return sum(spec.rank * sum(p.shape) for p in masked)
        if spec.keep is None:
            return self.shape.numel
        rows = [max(1, int(spec.keep * p.shape[0] + 0.5)) for p in masked]
        salient = sum(n * p.shape[1] for n, p in zip(rows, masked, strict=True))
        others = self.shape.numel - sum(p.numel for p in masked)
        return salient + others if spec.trains_all else salient

    @property
    def least_bytes(self) -> int:
        """Of weights, gradients and optimizer state: needed whatever the variant is trained on."""
        kind, size, elements = self.spec.kind, self.dtype.itemsize, self.shape.numel
        own = 4 if kind == "lora" else size  # of what is trained: peft's adapters are float32
        # Gradients; beside a frozen model's weights the trained parameters as well.
        trained = own * elements if self.spec.trains_all else 2 * own * self.trained
        # torch's moments are of the parameter's dtype; longact has float32 masters of bfloat16.
        state = 2 * own if self.spec.keep is None else 8 + (4 if size < 4 else 0)
        return size * elements + trained + state * (elements if kind == "full" else self.trained)


def make_model(job: Job) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    shape = job.shape
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=max(job.tokens, 2048),
        use_cache=False,
    )
    torch.manual_seed(0)
    with torch.device(job.device):
        model = AutoModelForCausalLM.from_config(config, dtype=job.dtype)
    return model.train()


class Training:
    """A model and what trains it."""

    def __init__(self, job: Job) -> None:
        spec = job.spec
        model = make_model(job)
        self.model = model
        self.handle: longact.LongAct | None = None
        if spec.rank is not None:
            from peft import LoraConfig, get_peft_model

            lora = LoraConfig(r=spec.rank, lora_alpha=spec.rank, target_modules=list(TARGETS))
            self.model = get_peft_model(model, lora)
        elif spec.keep is not None:
            others: Literal["train", "freeze"] = "train" if spec.trains_all else "freeze"
            self.handle = longact.apply(model, spec.keep, others=others)
        if job.checkpointing:
            name = "activation_checkpointing_enable"  # transformers renamed it
            enable = getattr(model, name, None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})

        params = self.model.parameters()
        self.optimizer: torch.optim.Optimizer
        if self.handle is None:
            self.optimizer = torch.optim.AdamW(params, LR, weight_decay=WEIGHT_DECAY, fused=True)
        else:
            self.optimizer = longact.FusedMaskedAdam(
                params, LR, weight_decay=WEIGHT_DECAY,
                state="compact" if spec.kind == "compact" else "full",
                master_weights=job.dtype == torch.bfloat16,
            )  # fmt: skip
        self.device = torch.device(job.device)
        generator = torch.Generator().manual_seed(0)
        size = (job.batch, job.tokens)
        self.ids = torch.randint(job.shape.vocab, size, generator=generator).to(self.device)
        self.check_ids = torch.randint(job.shape.vocab, (1, CHECK_TOKENS), generator=generator)

    def forward(self, ids: Tensor) -> Tensor:
        loss: Tensor = self.model(input_ids=ids, labels=ids).loss
        return loss

    def step(self, ids: Tensor) -> float:
        loss = self.forward(ids)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


# ---- counting tensors ----------------------------------------------------------------------------


def bytes_of(tensors: Iterable[Tensor | None]) -> int:
    """Of the memory that they lie in, none of it counted twice."""
    storages = [t.untyped_storage() for t in tensors if t is not None]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def state_of(training: Training) -> dict[str, list[Tensor]]:
    """The optimizer's tensors and what longact keeps beside them, by what they are."""
    found: dict[str, list[Tensor]] = {"moments": [], "masters": [], "bookkeeping": []}
    for state in training.optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, Tensor):
                kind = {"exp_avg": "moments", "exp_avg_sq": "moments", "master": "masters"}
                found[kind.get(key, "bookkeeping")].append(value)
    if training.handle is not None:
        for layer in training.handle.projections.values():
            kept = vars(layer.selection).values()
            found["bookkeeping"] += [value for value in kept if isinstance(value, Tensor)]
    return found


# ---- what the allocator says ---------------------------------------------------------------------


@dataclass
class Phase:
    """Bytes in use while something ran."""

    peak: int
    live: int  # when it had ended
    sizes: Counter[int] = field(default_factory=Counter)  # of its allocations; none from a GPU


class CpuMeter:
    """Every byte that torch allocates on the CPU between `start` and `stop`, to the byte.

    What was allocated before is not seen, nor when it is freed.
    """

    _prefix = "bench_memory: "

    def __init__(self) -> None:
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    def start(self) -> None:
        self._profile.start()

    def mark(self, name: str) -> None:
        """Here a phase of that name ends."""
        with record_function(self._prefix + name):
            pass

    def stop(self) -> dict[str, Phase]:
        self._profile.stop()
        profiler: Any = self._profile.profiler
        phases: dict[str, Phase] = {}
        live = 0
        phase = Phase(0, 0)
        for event in sorted(profiler.kineto_results.events(), key=lambda e: e.start_ns()):
            name = event.name()
            if name == "[memory]":
                size = event.nbytes()
                live += size
                phase.peak = max(phase.peak, live)
                if size > 0:
                    phase.sizes[size] += 1
            elif name.startswith(self._prefix):
                phase.live = live
                phases[name.removeprefix(self._prefix)] = phase
                phase = Phase(live, live)
        return phases


class CudaMeter:
    """The same of a GPU, as far as torch's caching allocator tells."""

    def __init__(self) -> None:
        self._phases: dict[str, Phase] = {}

    def start(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def mark(self, name: str) -> None:
        torch.cuda.synchronize()
        peak, live = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
        self._phases[name] = Phase(peak, live)
        torch.cuda.reset_peak_memory_stats()

    def stop(self) -> dict[str, Phase]:
        return self._phases


def process_bytes(key: Literal["VmRSS", "VmHWM", "VmData"]) -> int:
    """Of this process, as Linux counts: resident now, at most so far, and what it may write to."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) << 10
    raise OSError(f"/proc/self/status has no {key}")


def forget_peak() -> None:
    """VmHWM starts anew from what is resident: a model takes more while it is made."""
    with suppress(OSError):  # some containers forbid it: then it has the making in it
        Path("/proc/self/clear_refs").write_text("5")


# ---- correctness ---------------------------------------------------------------------------------


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().view(torch.int16 if tensor.element_size() == 2 else torch.int32)


def is_target(name: str) -> bool:
    return name.endswith(tuple(f"{target}.weight" for target in TARGETS))


def weights_of(training: Training) -> dict[str, Tensor]:
    """All weights; what the sparse variant trains is in those of q_proj and k_proj as well."""
    named = training.model.named_parameters()
    return {name: param for name, param in named if "salient_" not in name}


def snapshot(training: Training) -> dict[str, Tensor | int]:
    """What is needed to see which weights change: the bits of q and k, a checksum of the others."""
    found: dict[str, Tensor | int] = {}
    for name, weight in weights_of(training).items():
        own = bits(weight)
        found[name] = own.clone() if is_target(name) else zlib.crc32(own.cpu().numpy().data)
    return found


def check_update(
    training: Training, spec: Spec, before: dict[str, Tensor | int], rows: dict[str, Tensor]
) -> None:
    """That a step changed what it should and nothing else; `rows`: those that were selected."""
    after = snapshot(training)
    for name, weight in weights_of(training).items():
        old, new = before[name], after[name]
        where = f"{spec.label}: {name}"
        if isinstance(old, Tensor) and isinstance(new, Tensor):
            changed = (old != new).any(1).nonzero().squeeze(1)
            every = torch.arange(weight.shape[0], device=weight.device)
            wanted = every if spec.kind == "adamw" else rows.get(name, every[:0])
            if not torch.equal(changed, wanted.long()):
                raise CheckFailed(
                    f"{where}: a step changed {changed.numel()} rows, not the {wanted.numel()} "
                    "that it trains"
                )
        else:
            trains = spec.trains_all or "lora_" in name
            # A norm of bfloat16 ones is too coarse for a step's change.
            if old != new and not trains:
                raise CheckFailed(f"{where}: changed, and is not trained")
            if old == new and trains and weight.dim() > 1:
                raise CheckFailed(f"{where}: is trained, and did not change")


def check_allocations(job: Job, phases: dict[str, Phase]) -> None:
    """That the checked step never makes a whole q or k where only rows of them are trained."""
    sizes = phases["checked"].sizes
    masked = [p.numel for p in job.shape.parameters() if p.masked]
    item = job.dtype.itemsize
    found = {n: sizes[n * item] + (sizes[n * 4] if item != 4 else 0) for n in set(masked)}
    if job.spec.kind == "sparse" and any(found.values()):
        raise CheckFailed(
            f"{job.spec.label}: allocated {sum(found.values())} tensors of the size of a whole q "
            "or k weight"
        )
    if job.spec.kind == "adamw" and any(n < job.shape.layers for n in found.values()):
        raise CheckFailed("AdamW: the gradients of q and k are not among the allocations")


def check_counted(label: str, counted: int, live: int) -> None:
    """That the tensors which are counted are what the allocator holds."""
    share, constant = UNCOUNTED
    if not 0 <= live - counted <= share * counted + constant:
        raise CheckFailed(
            f"{label}: between steps the allocator holds {live} bytes, and the tensors that are "
            f"counted have {counted}"
        )


# ---- runs, each in a process of its own ----------------------------------------------------------


@dataclass
class Memory:
    """Of one step, in bytes."""

    trained: int  # elements
    weights: int
    gradients: int
    moments: int
    masters: int
    bookkeeping: int  # ages, steps, rows and what is counted of the channels
    activations: int  # what the forward left
    peak: int
    peak_in: str  # "forward", "backward" or "update"
    loss: float  # the first one

    @property
    def optimizer(self) -> int:
        return self.moments + self.masters + self.bookkeeping

    @property
    def rest(self) -> int:
        """Of the peak, what is none of the others: activations, and what passes."""
        return self.peak - self.weights - self.gradients - self.optimizer


@dataclass
class Times:
    """Seconds of each step's parts, and the bytes by which the process then exceeded its start."""

    forward: list[float]
    backward: list[float]
    update: list[float]
    resident: int


def measure_memory(job: Job) -> Memory:
    """Checks two steps, measures a third.

    Raises:
        CheckFailed: a step did other than it should.
    """
    label = job.spec.label
    meter = CudaMeter() if job.device == "cuda" else CpuMeter()
    meter.start()
    training = Training(job)
    check_ids = training.check_ids.to(training.device)
    losses = [training.step(check_ids)]  # makes the optimizer's state
    before = snapshot(training)
    handle = training.handle
    rows = {}
    if handle is not None:
        rows = {f"{name}.weight": r.clone() for name, r in handle.rows.items() if r is not None}
    meter.mark("first")
    losses.append(training.step(check_ids))
    meter.mark("checked")
    check_update(training, job.spec, before, rows)
    del before, rows, check_ids

    params = list(training.model.parameters())
    state = state_of(training)
    counted = [*params, *training.model.buffers(), training.ids, training.check_ids]
    for tensors in state.values():
        counted += tensors
    counted_bytes = bytes_of(counted)
    del state, counted
    meter.mark("rest")
    loss = training.forward(training.ids)
    meter.mark("forward")
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = bytes_of(param.grad for param in params)
    meter.mark("backward")
    training.optimizer.step()
    state = state_of(training)
    meter.mark("update")
    losses.append(float(loss.detach()))
    phases = meter.stop()

    if not all(map(math.isfinite, losses)):
        raise CheckFailed(f"{label}: losses {losses}")
    if job.device == "cpu":
        check_allocations(job, phases)
    check_counted(label, counted_bytes, phases["rest"].live)
    peak_in = max(("forward", "backward", "update"), key=lambda name: phases[name].peak)
    return Memory(
        trained=job.trained,
        weights=bytes_of(params),
        gradients=gradients,
        **{kind: bytes_of(tensors) for kind, tensors in state.items()},
        activations=phases["forward"].live - phases["rest"].live,
        peak=phases[peak_in].peak,
        peak_in=peak_in,
        loss=losses[0],
    )


def measure_time(job: Job) -> Times:
    start = process_bytes("VmRSS")
    training = Training(job)
    training.step(training.ids)  # makes the optimizer's state
    forget_peak()
    times = Times([], [], [], 0)
    for _ in range(job.steps):
        training.synchronize()
        clock = [time.perf_counter()]
        loss = training.forward(training.ids)
        training.synchronize()
        clock.append(time.perf_counter())
        loss.backward()  # type: ignore[no-untyped-call]
        training.synchronize()
        clock.append(time.perf_counter())
        training.optimizer.step()
        training.synchronize()
        clock.append(time.perf_counter())
        training.optimizer.zero_grad()
        parts = (times.forward, times.backward, times.update)
        for part, begin, end in zip(parts, clock[:-1], clock[1:], strict=True):
            part.append(end - begin)
        del loss
    times.resident = process_bytes("VmHWM") - start
    return times


Measure = Literal["memory", "time"]


def work(job: Job, measure: Measure, answer: Connection) -> None:
    """What a process of its own does."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # between peft and transformers
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    if job.memory is not None and job.device == "cpu":
        # torch then says that it is short of memory, before the system ends a process for it.
        limit = process_bytes("VmData") + job.memory
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        answer.send(measure_memory(job) if measure == "memory" else measure_time(job))
    except CheckFailed as error:
        answer.send(error)
    except (RuntimeError, MemoryError) as error:
        text = str(error)
        if isinstance(error, MemoryError) or any(part in text for part in OUT_OF_MEMORY):
            answer.send(DoesNotFit(f"ran out of memory ({in_gb(job.memory)} were there)"))
        else:
            answer.send(RuntimeError(traceback.format_exc()))
    except Exception:
        answer.send(RuntimeError(traceback.format_exc()))


def run(job: Job, measure: Measure) -> Any:
    """Measures in a process of its own, which a server forks that has imported everything.

    Raises:
        CheckFailed: a step did other than it should.
        DoesNotFit: there is not enough memory.
        RuntimeError: anything else.
    """
    if job.memory is not None and job.least_bytes > job.memory:
        raise DoesNotFit(
            f"needs {in_gb(job.least_bytes)} for weights, gradients and optimizer state alone, "
            f"and there are {in_gb(job.memory)}"
        )
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["bench_memory", "transformers.models.llama.modeling_llama", "peft"]
    )
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(job, measure, sender), daemon=True)
    process.start()
    sender.close()
    try:
        answer = receiver.recv()
    except EOFError:
        answer = None
    process.join()
    if answer is None and process.exitcode == SIGKILL:
        answer = DoesNotFit("its process was killed, most likely for want of memory")
    if answer is None:
        answer = RuntimeError(f"{job.spec.label}: its process ended with {process.exitcode}")
    if isinstance(answer, Exception):
        raise answer
    return answer


# ---- all variants --------------------------------------------------------------------------------


@dataclass
class Line:
    """One variant's figures."""

    spec: Spec
    memory: Memory
    step: Timing
    forward: Timing
    backward: Timing
    update: Timing
    fastest: float  # step, in ms: what other processes disturbed least
    resident: int

    @classmethod
    def of(cls, spec: Spec, memory: Memory, rounds: Sequence[Times]) -> Line:
        forward, backward, update = (
            [s for times in rounds for s in getattr(times, part)]
            for part in ("forward", "backward", "update")
        )
        steps = [sum(parts) for parts in zip(forward, backward, update, strict=True)]
        return cls(
            spec,
            memory,
            step=Timing.of(steps),
            forward=Timing.of(forward),
            backward=Timing.of(backward),
            update=Timing.of(update),
            fastest=1e3 * min(steps),
            resident=max(times.resident for times in rounds),
        )

    @property
    def trained_state(self) -> int:
        """Gradients and optimizer state."""
        return self.memory.gradients + self.memory.optimizer


def check_losses(memory: dict[Spec, Memory], dtype: torch.dtype) -> None:
    """That all variants begin with the same model and the same text."""
    first = next(iter(memory))
    for spec, found in memory.items():
        want = memory[first].loss
        if not abs(found.loss - want) <= LOSS_TOLERANCE[dtype] * abs(want):
            raise CheckFailed(
                f"{spec.label}: the first loss is {found.loss}, of {first.label} {want}"
            )


def run_all(
    jobs: Sequence[Job], rounds: int, skipped: dict[str, str]
) -> tuple[list[Line], dict[str, str]]:
    """Memory of every variant, then times in turns; also why a variant has no figures."""
    skipped = dict(skipped)
    memory: dict[Spec, Memory] = {}
    for job in jobs:
        say(f"memory: {job.spec.label}")
        try:
            memory[job.spec] = run(job, "memory")
        except DoesNotFit as error:
            skipped[job.spec.label] = str(error)
    if memory:
        check_losses(memory, jobs[0].dtype)
    times: dict[Spec, list[Times]] = {spec: [] for spec in memory}
    for number in range(rounds):
        turn = [job for job in jobs if job.spec in times]
        shift = number * max(1, len(turn) // rounds)
        for job in turn[shift:] + turn[:shift]:
            say(f"time, round {number + 1} of {rounds}: {job.spec.label}")
            try:
                times[job.spec].append(run(job, "time"))
            except DoesNotFit as error:
                skipped[job.spec.label] = str(error)
                del times[job.spec]
    return [Line.of(spec, memory[spec], found) for spec, found in times.items()], skipped


# ---- output --------------------------------------------------------------------------------------


def in_gb(size: int | None) -> str:
    return "?" if size is None else f"{size / 1e9:.1f} GB"


def compare(ours: Line, other: Line) -> dict[str, float]:
    """What longact needs, of what the other needs."""
    pairs = {
        "gradients + optimizer": (ours.trained_state, other.trained_state),
        "weights": (ours.memory.weights, other.memory.weights),
        "activations": (ours.memory.activations, other.memory.activations),
        "peak": (ours.memory.peak, other.memory.peak),
        "forward": (ours.forward.median, other.forward.median),
        "step": (ours.step.median, other.step.median),
    }
    return {what: mine / theirs for what, (mine, theirs) in pairs.items()}


def comparisons(lines: Sequence[Line]) -> list[tuple[Line, Line]]:
    """Which of longact's variants is set beside which other: AdamW, and where one fits, LoRA."""
    others = [line for line in lines if line.spec.keep is None]
    return [
        (ours, other)
        for ours in lines
        if ours.spec.keep is not None
        for other in others
        if other.spec.kind == "adamw" or ours.spec.kind == "sparse"
    ]


def find_goals(args: argparse.Namespace, lines: Sequence[Line]) -> list[Goal]:
    by_spec = {line.spec: line for line in lines}
    sparse, adamw = by_spec.get(Spec("sparse", PAPER_KEEP)), by_spec.get(Spec("adamw"))
    if args.model != "smollm2" or args.dtype != "float32" or sparse is None or adamw is None:
        return []
    text = f"others='freeze' at keep {PAPER_KEEP:g}: gradients and optimizer state, of AdamW's"
    ratio = sparse.trained_state / adamw.trained_state
    return [Goal(text, ratio, GOAL, at_least=False, unit=" %")]


def print_header(args: argparse.Namespace, info: dict[str, Any], job: Job) -> None:
    shape = job.shape
    print(f"longact {info['longact']}, torch {info['torch']}, Python {info['python']}")
    print(f"{info['device']}, {job.threads or info['threads']} threads, {args.dtype}")
    print(
        f"{shape.name}'s shape, random weights: {shape.numel / 1e6:.1f} M elements; {args.batch} x "
        f"{args.tokens} tokens"
        + (", gradient checkpointing" if args.gradient_checkpointing else "")
    )
    busy = info["load_average"] > (info["cpus"] or 1)
    print(
        f"load average {info['load_average']:.1f} on {info['cpus']} CPUs at the start"
        + (": times are of a busy machine" if busy else "")
    )
    if args.dtype == "bfloat16":
        print(
            "torch's AdamW keeps bfloat16 moments and no masters, longact float32 moments and "
            "masters;\npeft keeps its adapters, and so their gradients and moments, in float32."
        )


def print_memory(lines: Sequence[Line], skipped: dict[str, str]) -> None:
    print("\nMemory, MB (rest: of the peak, what is not one of the three before it; activations:")
    print("after the forward; process: what it grew by, up to the most during the timed steps)")
    heads = (
        "trained, M", "weights", "gradients", "optimizer", "rest", "peak", "activations", "process",
    )  # fmt: skip
    print(f"   {'':20}" + "".join(f"{head:>12}" for head in heads) + "  peak in")
    for line in lines:
        m = line.memory
        sizes = (
            m.trained, m.weights, m.gradients, m.optimizer, m.rest, m.peak, m.activations,
            line.resident,
        )  # fmt: skip
        figures = "".join(f"{size / 1e6:12,.1f}" for size in sizes)
        print(f"   {line.spec.label:20}{figures}  {m.peak_in}")
    for label, reason in skipped.items():
        print(f"   {label:20} not measured: {reason}")


def print_times(lines: Sequence[Line], args: argparse.Namespace) -> None:
    steps = args.rounds * args.steps
    print(f"\nTime, ms: medians of {steps} steps in {args.rounds} rounds (spread: interquartile)")
    heads = ("step", "spread", "fastest", "forward", "backward", "update")
    print(f"   {'':20}" + "".join(f"{head:>10}" for head in heads))
    for line in lines:
        print(
            f"   {line.spec.label:20}{line.step.median:10,.0f}{line.step.spread:10.0%}"
            f"{line.fastest:10,.0f}{line.forward.median:10,.0f}{line.backward.median:10,.0f}{line.update.median:10,.0f}"
        )


def print_comparisons(lines: Sequence[Line]) -> None:
    pairs = comparisons(lines)
    if not pairs:
        return
    print("\nlongact's share of what others need (* where longact needs more)")
    heads = list(compare(*pairs[0]))
    print(f"   {'':36}" + "".join(f"{head:>{max(11, len(head) + 2)}}" for head in heads))
    for ours, other in pairs:
        text = f"   {ours.spec.label} / {other.spec.label}".ljust(39)
        for head, ratio in compare(ours, other).items():
            text += f"{ratio:.3f}{'*' if ratio >= 1.0005 else ' '}".rjust(max(11, len(head) + 2))
        print(text)


def plot(path: Path, lines: Sequence[Line], title: str) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    parts = {
        "weights": "#b8b8b8",
        "gradients": "#d98c3f",
        "optimizer": "#1b5e8a",
        "rest": "#9fc9e3",
    }
    figure, axes = plt.subplots(figsize=(8, 3.8), layout="constrained")
    labels = [line.spec.label for line in lines]
    left = [0.0] * len(lines)
    for part, color in parts.items():
        sizes = [getattr(line.memory, part) / 1e9 for line in lines]
        label = {"optimizer": "optimizer state", "rest": "activations and the rest"}.get(part, part)
        axes.barh(labels, sizes, left=left, height=0.65, color=color, label=label)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    for at, (line, end) in enumerate(zip(lines, left, strict=True)):
        text = f" {end:.2f} GB, {line.memory.trained / 1e6:.1f} M trained"
        axes.text(end, at, text, va="center", fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.3 * max(left))
    axes.set_xlabel("peak memory of a training step, GB")
    axes.set_title(title, fontsize=10)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


# ---- command line --------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", choices=SHAPES, default="smollm2", help="default: %(default)s")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--dtype", choices=DTYPES, default="float32",
        help="of weights and activations; in bfloat16 longact keeps float32 masters")  # fmt: skip
    add("--batch", type=positive, default=1, help="sequences (default: %(default)s)")
    add("--tokens", type=positive,
        help="of each (default: {cpu}, on a GPU {cuda})".format(**DEFAULT_TOKENS))  # fmt: skip
    add("--gradient-checkpointing", action="store_true")
    add("--steps", type=positive, default=3, help="timed in each round (default: %(default)s)")
    add("--rounds", type=positive, default=2, help="of timing (default: %(default)s)")
    add("--threads", type=positive, help="default: torch's own choice")
    add("--memory", type=float, metavar="GB",
        help="leave out variants that need more (default: what is free, less 1 GiB)")  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="write everything there")
    add("--plot", type=Path, metavar="FILE.png", help="draw the memory (needs matplotlib)")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} finds no CUDA device here")
    if importlib.util.find_spec("transformers") is None:
        parser.error("the models need transformers: pip install 'longact[transformers]'")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install 'longact[plot]'")
    if args.memory is not None and not args.memory > 0:
        parser.error(f"--memory {args.memory:g}: must be more than 0")
    for path in (args.json, args.plot):
        if path and not path.absolute().parent.is_dir():
            parser.error(f"{path}: there is no directory {path.absolute().parent}")
    args.tokens = args.tokens or DEFAULT_TOKENS[args.device]
    return args


def free_bytes(device: str) -> int:
    """What there is for a variant."""
    if device == "cuda":
        free, _ = torch.cuda.mem_get_info()
        return free
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    return free - SPARE


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler else says when it starts
    info = machine(torch.device(args.device))
    memory = free_bytes(args.device) if args.memory is None else int(1e9 * args.memory)
    job = Job(
        Spec("adamw"), SHAPES[args.model], DTYPES[args.dtype], args.device, args.batch, args.tokens,
        args.gradient_checkpointing, args.threads, args.steps, memory,
    )  # fmt: skip
    specs, skipped = all_specs(), {}
    if importlib.util.find_spec("peft") is None:
        skipped = {s.label: "needs peft: pip install peft" for s in specs if s.kind == "lora"}
        specs = [s for s in specs if s.kind != "lora"]
    try:
        lines, skipped = run_all([replace(job, spec=spec) for spec in specs], args.rounds, skipped)
    except CheckFailed as error:
        print(f"FAILED, no figures: {error}", file=sys.stderr)
        return 1
    goals = find_goals(args, lines)

    print_header(args, info, job)
    print_memory(lines, skipped)
    print_times(lines, args)
    print_comparisons(lines)
    print("\nGoals" if goals else "\nGoals are set for smollm2 in float32.")
    for goal in goals:
        print(goal.line())

    if args.json:
        report = {
            "machine": info,
            "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
            "model": asdict(job.shape),
            "lines": [
                {"variant": line.spec.label, **asdict(line), "rest": line.memory.rest}
                for line in lines
            ],
            "not_measured": skipped,
            "comparisons": [
                {"ours": a.spec.label, "other": b.spec.label, **compare(a, b)}
                for a, b in comparisons(lines)
            ],
            "goals": [asdict(goal) | {"reached": goal.reached} for goal in goals],
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if args.plot and lines:
        title = f"{job.shape.name}'s shape, {args.dtype}, {args.batch} x {args.tokens} tokens"
        plot(args.plot, lines, title)
    return 0


if __name__ == "__main__":
    sys.exit(main())
