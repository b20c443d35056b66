"""streaming.py: part `streaming`: does streaming hide its copies behind the computation, and does --memory-budget
predict and choose well?

Overlap: a step moves 3 W + 2 S + 2 A bytes between host and device: the weights of the blocks W come in twice (forward,
backward) and go out once, the states S and the residual stream A go in and out once each (less what the layers in
flight keep at the turn). Prediction for gpt3:c4096 on PCIe 5 at 50 GB/s: 41 GB take 0.8 s, 1 x 1024 tokens about 0.15 s
of computation at 400 TFLOP/s, so a streamed step takes some 5 times a resident one at micro-batch 1, 1.5 times at 4,
and the copies are hidden at 16 (a ratio of 1.02 or less).

Budgets: the program runs with the settings that it chose for a budget, then with its runner-up's. The driver's figure
must stay within the budget; predicted times, and whether the choice was the faster one, are reported.
"""
import re

from . import techniques, training
from .session import Item, ItemFailed, ItemSkipped, OutOfMemory

HIDDEN = 1.02  # streamed / resident, up to which the copies count as hidden
SETTINGS = re.compile(r"^(chosen|runner-up) +(--.*?): .*?(?:, predicted ([0-9.e+-]+) ms per step.*)?$", re.M)


def moved_bytes(planned):
    """Bytes between host and device per step of one micro-batch, from the layers that the plan keeps on the host."""
    times = {"weights": 3, "optimizer state": 2, "activations": 2}
    return sum(times[entry["category"]] * entry["bytes"] for entry in planned["allocations"]
               if entry["host"] and entry["name"].endswith(".host"))


def timed(session, flags, steps):
    planned = training.fitting_plan(session, flags)
    run, driver = training.train_beside_driver(session, flags, sum(steps))
    values = training.memory_values(planned, run, driver)
    values.update(step_seconds=training.speed(run, steps[0])["step_seconds"], losses=list(run.losses().values()))
    return planned, values


def overlap(session, micro_batch):
    """Resident against streamed at one micro-batch. GB/s are those of all copies over the time that they add: more than
    the link has where some of them are hidden."""
    steps = session.sizes.overlap_steps
    flags = [*techniques.model_flags(session, techniques.FLORA), "--micro-batch", micro_batch]
    planned, streamed = timed(session, [*flags, *techniques.STREAMING], steps)
    values = {"streamed": streamed, "resident": None, "moved_bytes": moved_bytes(planned), "time_ratio": None,
              "extra_gb_per_second": None, "hidden": None, "equal": None}
    failures = [streamed.pop("failed", "")]
    try:
        _, resident = timed(session, [*flags, "--offload", "none"], steps)
    except (ItemSkipped, OutOfMemory) as reason:
        values["resident_skipped"] = str(reason)
    else:
        failures.append(resident.pop("failed", ""))
        difference = techniques.first_difference(streamed["losses"], resident["losses"])
        failures.append(difference and f"streamed and resident losses differ: {difference}")
        ratio = streamed["step_seconds"] / resident["step_seconds"]
        values.update(resident=resident, time_ratio=ratio, hidden=ratio <= HIDDEN, equal=not difference)
        if ratio > HIDDEN:
            values["extra_gb_per_second"] = \
                values["moved_bytes"] / (streamed["step_seconds"] - resident["step_seconds"]) / 1e9
    return with_failures(values, failures)


def with_failures(values, failures):
    text = "; ".join(filter(None, failures))
    return {**values, "failed": text} if text else values


def settings_in(output):
    """{"chosen": (flags, predicted ms), "runner-up": ...} of the lines that a run with a budget begins with; without a
    runner-up where nothing else fits, and None for a time where the device was not measured."""
    return {name: (flags, float(predicted) if predicted else None)
            for name, flags, predicted in SETTINGS.findall(output)}


def budget(session, size):
    """The choice, and the runner-up by its flags."""
    sizes, common = session.sizes, ["--optimizer", "flora", "--gradients", "fused", "--rank", session.sizes.rank]
    flags = [*sizes.streaming_model, "--dtype", "bf16", *common, *sizes.budget_flags]
    asked = training.whole_plan(session, [*flags, "--memory-budget", size])["budget"]["bytes"]
    warmup, counted = sizes.budget_steps

    def measured(its_flags, predicted, run, driver):
        planned = training.whole_plan(session, [*flags, *its_flags.split()])
        speed = training.speed(run, warmup)
        return {"flags": its_flags, "predicted_ms": predicted, "step_ms": 1e3 * speed["step_seconds"],
                "tokens_per_second": speed["tokens_per_second"], **training.memory_values(planned, run, driver)}

    run, driver = training.train_beside_driver(session, [*flags, "--memory-budget", size], warmup + counted)
    found = settings_in(run.output)
    if "chosen" not in found:
        raise ItemFailed("train_gpt2 did not say what it chose")
    chosen = measured(*found["chosen"], run, driver)
    failures = [chosen.pop("failed", "")]
    if chosen["planned_bytes"] > asked:
        failures.append(f"plans {chosen['planned_bytes']} bytes, the budget is {asked}")
    if driver is not None and driver > asked:
        failures.append(f"the driver counts {driver} bytes, the budget is {asked}")
    values = {"budget_bytes": asked, "chosen": chosen, "runner_up": None, "choice_was_faster": None}
    if "runner-up" in found:
        other = measured(*found["runner-up"], *training.train_beside_driver(
            session, [*flags, *found["runner-up"][0].split()], warmup + counted))
        failures.append(other.pop("failed", ""))
        values.update(runner_up=other,
                      choice_was_faster=chosen["tokens_per_second"] > other["tokens_per_second"])
    return with_failures(values, failures)


def items(session):
    sizes = session.sizes
    found = [Item(f"overlap {n}", 2 * sizes.streaming_start_seconds, lambda n=n: overlap(session, n))
             for n in sizes.overlap_micro_batches]
    return found + [Item(f"budget {size}", 3 * sizes.streaming_start_seconds, lambda size=size: budget(session, size))
                    for size in sizes.budgets]
