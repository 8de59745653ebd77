"""Compute the memory of each way to run a distillation from measures of one device.

Sizes are bytes. The overhead of engines is taken from their documentation and defaults;
docs/scaling.md compares some of it with measured peaks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

# DeepSpeed 0.19's defaults, in elements: the bucket for gradients of ZeRO, and what ZeRO-3 keeps
# gathered for reuse.
BUCKET, LIVE = 5e8, 1e9


@dataclass(frozen=True)
class Measures:
    """Sizes and times of one micro-batch on one device.

    libraries: the process before any model; weights, gradients, optimizer: the student's
    trained, student_dtype: number of trained parameters, bytes of one
    engine_dtype: bytes of one parameter under DeepSpeed, which casts to bf16 or fp16 itself
    teacher, teacher_ends, teacher_layer: all of its weights; those outside its layers; one layer
    activations: everything else in memory at the peak; head: a chunk of logits in the fused head
    seconds, tokens: of the micro-batch; accumulation: micro-batches of a step on each device
    spread: of the seconds of the trial's steps, (largest - smallest) / median
    writing: seconds of generation for a micro-batch, with texts of `max_new_tokens`
    """

    libraries: float
    weights: float
    gradients: float
    optimizer: float
    trained: float
    student_dtype: int
    engine_dtype: int
    teacher: float
    teacher_ends: float
    teacher_layer: float
    activations: float
    head: float
    seconds: float
    tokens: int
    accumulation: int
    spread: float = 0.0
    writing: float = 0.0


@dataclass(frozen=True)
class Configuration:
    """One way to run: an engine and a placement of the teacher."""

    name: str
    file: str | None
    placement: str
    zero: int = 0
    several: bool = True
    offload: bool = False
    recorded: bool = False


CONFIGURATIONS = (
    Configuration("one device", None, "replicated", several=False),
    Configuration("one device, teacher on the CPU", None, "offloaded", several=False),
    Configuration("one device, recorded teacher", None, "", several=False, recorded=True),
    Configuration("DDP", "ddp.yaml", "replicated"),
    Configuration("ZeRO-2", "zero2.yaml", "replicated", zero=2),
    Configuration("ZeRO-2, teacher sharded", "zero2.yaml", "sharded", zero=2),
    Configuration("ZeRO-3, teacher sharded", "zero3.yaml", "sharded", zero=3),
    Configuration("ZeRO-3, recorded teacher", "zero3.yaml", "", zero=3, recorded=True),
    Configuration(
        "ZeRO-3 offloaded, teacher sharded", "zero3_offload.yaml", "sharded", zero=3, offload=True
    ),
)
PARTS = ("student", "gradients", "optimizer", "teacher", "activations", "head", "libraries")


def parts(measures: Measures, how: Configuration, devices: int, *, cpu: bool) -> dict[str, float]:
    """Bytes on each device at the peak, by part (`PARTS`).

    cpu: whether the devices are CPUs, where a buffer takes memory only for what is written to it
    """
    m, n = measures, devices if how.several else 1
    each = m.engine_dtype if how.zero else m.student_dtype
    whole, gradients, optimizer = m.weights, m.gradients, m.optimizer
    if how.zero:
        whole, gradients = whole * each / m.student_dtype, gradients * each / m.student_dtype
        bucket = min(BUCKET * each, gradients) if cpu else BUCKET * each
        # Its moments, and its own copy of what is trained, are in float32.
        optimizer = (optimizer * 4 / m.student_dtype + 4 * m.trained) / n
        gradients = gradients / n + bucket
    elif n > 1:
        gradients *= 2  # DDP reduces them in buckets of their own
    student = whole
    if how.zero == 3:
        student = whole / n + min(whole, LIVE * each)
    if how.offload:
        student -= whole / n
        optimizer = 0.0
    teacher = m.teacher
    if how.placement == "sharded" and n > 1:
        teacher = m.teacher / n + m.teacher_ends + 2 * m.teacher_layer
    if how.placement == "offloaded":
        teacher = m.teacher if cpu else m.teacher_ends + m.teacher_layer
    if how.recorded:
        teacher = 0.0
    values = (student, gradients, optimizer, teacher, m.activations, m.head, m.libraries)
    return dict(zip(PARTS, values, strict=True))


def possible(
    devices: int, *, recorded: bool = False, cpu: bool = False, writes: bool = False
) -> list[Configuration]:
    """The ways to run on so many devices, the fastest first.

    recorded: only those with a recorded teacher; cpu: none that offload to the CPU
    writes: only those in which the student is whole on its device and has a live teacher
    """
    ways = [
        how for how in CONFIGURATIONS if how.several == (devices > 1) and not (cpu and how.offload)
    ]
    if writes:
        return [how for how in ways if not how.recorded and how.zero < 3]
    if not recorded:
        return ways
    engines = {how.file: how for how in reversed(ways)}  # one of each: the first
    return [
        replace(
            how, name=f"{how.name.split(',')[0]}, recorded teacher", placement="", recorded=True
        )
        for how in reversed(engines.values())
    ]


def extrapolated(
    one: Measures, two: Measures, other: Measures, student: int, teacher: int
) -> Measures:
    """Measures of whole models from trials with few layers.

    one: a layer each; two: two layers of the student; other: two of the teacher
    student, teacher: layers of the whole models, by which time and activations grow
    """
    of_student, of_teacher = two.seconds - one.seconds, other.seconds - one.seconds
    seconds = one.seconds + max(0, of_student) * (student - 1) + max(0, of_teacher) * (teacher - 1)
    layer = max(0.0, two.activations - one.activations)
    writing = one.writing + max(0.0, two.writing - one.writing) * (student - 1)
    activations = one.activations + layer * (student - 1)
    return replace(one, seconds=seconds, writing=writing, activations=activations)
