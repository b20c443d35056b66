"""techniques.py: the techniques that save memory, one added at a time on one model, in part `memory`: what each takes,
planned, allocated, on the host and as the driver says; what it costs in time; and what it does to the losses. The
ladder is the program's (`plan --json`); three rows more have one kind of offload each.

Those that only move bytes between device and host must not change a bit of the losses; gradients in blocks round sums
in another order, and 8-bit weights and states round more, so that their distance is reported.
"""
from dataclasses import dataclass

from . import training
from .session import Item, ItemFailed

PREFIX = "technique "
FLORA = ["--optimizer", "flora", "--gradients", "fused"]
STREAMING = ["--offload", "weights,activations"]
STEP = ["--micro-batch", 1, "--no-update-overlap"]  # no memory that only makes it faster


@dataclass(frozen=True)
class Technique:
    name: str  # of its item
    flags: list
    first: bool = False  # Flora alone, whose time and losses the others are compared with
    same_bits: str = ""  # the item whose losses these must be, bit for bit
    near: bool = False  # losses near those of the first: the distance is reported


def ladder(rows):
    """The rows of a plan's techniques: which adds Flora, what must keep the bits of the row above."""
    found, after_flora = [], False
    for row in rows:
        name, adds, flags = PREFIX + row["name"], row["adds"].split(), row["flags"].split()
        same = found[-1].name if found and adds[0] == "--offload" else ""
        first = not after_flora and "flora" in adds
        found.append(Technique(name, flags, first, same, near=after_flora and not same))
        after_flora = after_flora or first
    return found


def with_single_offloads(found):
    """Behind the ladder: what it has before 8-bit weights, with each kind of offload by itself."""
    base = [row for row in found if "int8" not in row.flags][-1]
    return found + [Technique(f"{base.name}, + offload {what}", [*base.flags, "--offload", what], same_bits=base.name)
                    for what in ("activations", "state", "weights,activations")]


def model_flags(session, optimizer_flags):
    """The model of techniques and streaming with block recompute in bf16; matmul algorithms by rule and not by time, so
    that the same step has the same bits. The first step has the full learning rate already."""
    return [*session.sizes.streaming_model, "--dtype", "bf16", "--recompute", "block", "--no-autotune",
            "--warmup-steps", 1, *optimizer_flags, "--rank", session.sizes.rank]


def measured_before(session, item):
    """The values of another item, of this commit; empty where it has none."""
    entry = session.results.get("memory", item)
    return entry["values"] if entry and entry["commit"] == session.commit else {}


def first_difference(losses, expected):
    """Why two lists of losses are not the same, or an empty text."""
    for step, (loss, other) in enumerate(zip(losses, expected), 1):
        if loss != other:
            return f"step {step}: {loss!r} and {other!r}"
    return ""


def one(session, technique, first):
    warmup, counted = session.sizes.technique_steps
    flags = [*session.sizes.streaming_model, *STEP, "--no-autotune", "--warmup-steps", 1, *technique.flags]
    planned = training.fitting_plan(session, flags)
    run, driver = training.train_beside_driver(session, flags, warmup + counted)
    values = training.memory_values(planned, run, driver)
    losses, seconds = list(run.losses().values()), training.speed(run, warmup)["step_seconds"]
    reference = measured_before(session, first)
    values.update(step_seconds=seconds, losses=losses, first=technique.first, equal=None, relative_difference=None)
    if technique.near and reference:
        values["relative_difference"] = max(abs(a / b - 1) for a, b in zip(losses, reference["losses"]))
    expected = technique.same_bits and measured_before(session, technique.same_bits)
    if expected:
        difference = first_difference(losses, expected["losses"])
        values["equal"] = not difference
        if difference:
            values.setdefault("failed", f"the losses are not those of {technique.same_bits}: {difference}")
    return values


def all_of(session):
    flags = [*session.sizes.streaming_model, *STEP, "--rank", session.sizes.rank]
    return with_single_offloads(ladder(training.whole_plan(session, flags)["techniques"]))


def items(session):
    try:
        found = all_of(session)
    except ItemFailed as reason:
        def fail(why=str(reason)):
            raise ItemFailed(why)
        return [Item(f"{PREFIX}ladder", 0, fail)]
    first = next(row.name for row in found if row.first)
    return [Item(row.name, session.sizes.streaming_start_seconds, lambda row=row: one(session, row, first))
            for row in found]
