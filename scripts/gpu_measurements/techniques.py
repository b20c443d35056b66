"""techniques.py: the techniques that save memory, one added at a time on one model, in part `memory`: what each takes,
planned, allocated, on the host and as the driver says; what it costs in time; and what it does to the losses.

Those that only move bytes between device and host must not change a bit of the losses; gradients in blocks round sums
in another order, and 8-bit weights and states round more, so that their distance is reported.
"""
from dataclasses import dataclass

from . import training
from .session import Item

FIRST = "technique flora"  # whose time and losses the others are compared with
FLORA = ["--optimizer", "flora", "--gradients", "fused"]
ALL_BLOCKS = [*FLORA, "--gradient-blocks", "all"]
EIGHT_BIT = ["--weight-dtype", "int8", "--state-dtype", "int8"]
STREAMING = ["--offload", "weights,activations"]


@dataclass(frozen=True)
class Technique:
    title: str
    flags: list
    same_bits: str = ""  # the item whose losses these must be, bit for bit
    near: bool = False  # losses near those of FIRST: the distance is reported


TECHNIQUES = {
    "technique adamw": Technique("AdamW, dense, recompute block",
                                 ["--optimizer", "adamw", "--gradients", "dense"]),
    FIRST: Technique("Flora, fused, recompute block", FLORA),
    "technique embedding blocks": Technique("+ gradient blocks: embedding", [*FLORA, "--gradient-blocks", "embedding"],
                                            near=True),
    "technique all blocks": Technique("+ gradient blocks: all", ALL_BLOCKS, near=True),
    "technique 8-bit": Technique("+ 8-bit weights and states", [*ALL_BLOCKS, *EIGHT_BIT], near=True),
    "technique offload activations": Technique(
        "bf16, gradient blocks: all, + offload activations", [*ALL_BLOCKS, "--offload", "activations"],
        same_bits="technique all blocks"),
    "technique offload state": Technique(
        "bf16, gradient blocks: all, + offload state", [*ALL_BLOCKS, "--offload", "state"],
        same_bits="technique all blocks"),
    "technique streaming": Technique(
        "bf16, gradient blocks: all, + offload weights,activations (states, too)", [*ALL_BLOCKS, *STREAMING],
        same_bits="technique all blocks"),
    "technique 8-bit streaming": Technique(
        "8 bits, gradient blocks: all, + offload weights,activations (states, too)",
        [*ALL_BLOCKS, *EIGHT_BIT, *STREAMING], same_bits="technique 8-bit"),
}


def model_flags(session, optimizer_flags):
    """The model of techniques and streaming with block recompute in bf16; matmul algorithms by rule and not by time, so
    that the same step has the same bits. The first step has the full learning rate already."""
    rank = ["--rank", session.sizes.rank] if "flora" in optimizer_flags else []
    return [*session.sizes.streaming_model, "--dtype", "bf16", "--recompute", "block", "--no-autotune",
            "--warmup-steps", 1, *optimizer_flags, *rank]


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


def one(session, name):
    technique, (warmup, counted) = TECHNIQUES[name], session.sizes.technique_steps
    flags = [*model_flags(session, technique.flags), "--micro-batch", 1]
    planned = training.fitting_plan(session, flags)
    run, driver = training.train_beside_driver(session, flags, warmup + counted)
    values = training.memory_values(planned, run, driver)
    losses, seconds = list(run.losses().values()), training.speed(run, warmup)["step_seconds"]
    first = measured_before(session, FIRST)
    values.update(step_seconds=seconds, losses=losses, equal=None, relative_difference=None,
                  time_ratio=seconds / first["step_seconds"] if first else None)
    if name == FIRST:
        values["time_ratio"] = 1.0
    if technique.near and first:
        values["relative_difference"] = max(abs(a / b - 1) for a, b in zip(losses, first["losses"]))
    expected = technique.same_bits and measured_before(session, technique.same_bits)
    if expected:
        difference = first_difference(losses, expected["losses"])
        values["equal"] = not difference
        if difference:
            values.setdefault("failed", f"the losses are not those of {technique.same_bits}: {difference}")
    return values


def items(session):
    names = sorted(TECHNIQUES, key=lambda name: name != FIRST)
    return [Item(name, session.sizes.streaming_start_seconds, lambda name=name: one(session, name)) for name in names]
