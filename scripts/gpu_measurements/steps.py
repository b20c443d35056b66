"""steps.py: parts `steps-<model>`: tokens per second, share of the matmul peak and memory of training steps, beside
PyTorch and llm.c in the same run, and where a step's time goes, kernel by kernel."""
import re
import shutil

from . import peers, training
from .session import Item, OutOfMemory

SMALL, LARGE = "16K", "0.5M"  # tokens per step: one micro-batch, and many

CONFIGURATIONS = {  # name: (title, flags, kinds of step)
    "adamw": ("AdamW, dense", ["--optimizer", "adamw", "--gradients", "dense"], (SMALL, LARGE)),
    "adamw-fp32": ("AdamW, dense, fp32 states and master weights",
                   ["--optimizer", "adamw", "--gradients", "dense", "--state-dtype", "fp32", "--master-weights",
                    "fp32"], (SMALL,)),
    "flora": ("Flora, fused", ["--optimizer", "flora", "--gradients", "fused"], (SMALL, LARGE)),
    "flora-block": ("Flora, fused, recompute block",
                    ["--optimizer", "flora", "--gradients", "fused", "--recompute", "block"], (SMALL, LARGE)),
    "compressed": ("Flora, compressed accumulation", ["--optimizer", "flora", "--gradients", "compressed"], (LARGE,)),
    "compressed-block": ("Flora, compressed accumulation, recompute block",
                         ["--optimizer", "flora", "--gradients", "compressed", "--recompute", "block"], (LARGE,)),
}
PROFILE_ROW = re.compile(r"^(\S.*?) +(\d*) +([\d.]+)s +([\d.]+)%(?: +([\d.]+|inf|-?nan) +([\d.]+|inf|-?nan))?$")


def step_flags(session, model, name, tokens, micro_batch):
    rank = ["--rank", session.sizes.rank] if "flora" in CONFIGURATIONS[name][1] else []
    return ["--model", model.preset, "--dtype", "bf16", "--seq-len", model.seq_len, "--micro-batch", micro_batch,
            "--tokens-per-step", tokens, *CONFIGURATIONS[name][1], *rank]


def fitting(session, model, name, tokens, run):
    """run(flags) at the micro-batch of 16K tokens, or at half of it and so on where the device is too small."""
    micro_batch, free = session.sizes.micro_tokens // model.seq_len, session.device_memory()
    while True:
        flags = step_flags(session, model, name, tokens, micro_batch)
        planned = training.plan(session, flags)
        smallest = micro_batch == 1
        if not free or planned <= free or smallest:
            try:
                return {**run(flags), "micro_batch": micro_batch, "planned_bytes": planned, "tokens_per_step": tokens}
            except OutOfMemory:
                if smallest:
                    raise
        micro_batch //= 2


def profile_rows(output):
    """The program's table of operations: [{"operation", "calls", "seconds", "percent", "gflops", "gb_per_second"}]."""
    rows = []
    for line in output[output.find("\noperation ") + 1:].splitlines()[1:]:
        match = PROFILE_ROW.match(line)
        if not match:
            break
        name, calls, seconds, percent, gflops, bandwidth = match.groups()
        rows.append({"operation": name, "calls": int(calls or 0), "seconds": float(seconds), "percent": float(percent),
                     "gflops": float(gflops) if gflops else None,
                     "gb_per_second": float(bandwidth) if bandwidth else None})
    return rows


def profile(session, model, name):
    """The time of every operation of whole steps, every kernel launched and waited for by itself. The run is resumed
    for it: its first step would count what choosing matmul algorithms takes."""
    def run(flags):
        warm = training.train(session, "profile", flags, 1)
        done = session.execute([
            training.command(session, [])[0], "--resume", warm.folder, "--steps", 1 + session.sizes.profile_steps,
            "--profile", "--device", "cuda"]).require("train_gpt2 --profile")
        shutil.rmtree(warm.folder)
        rows = profile_rows(done.output)
        return {"rows": rows, **({} if rows else {"failed": "train_gpt2 --profile printed no table"})}
    return fitting(session, model, name, session.sizes.micro_tokens, run)


def kinds(sizes):
    return {SMALL: (sizes.micro_tokens, sizes.micro_steps), LARGE: (sizes.large_tokens, sizes.large_steps)}


def items(session, model):
    sizes = session.sizes

    def seconds(kind, start=sizes.start_seconds):
        tokens, steps = kinds(sizes)[kind]
        return start + sum(steps) * tokens / model.rate

    def ours(name, kind):
        tokens, steps = kinds(sizes)[kind]

        def run(flags):
            return training.speed(training.train_without_end(session, flags, sum(steps)), steps[0])
        return Item(f"{name} {kind}", seconds(kind), lambda: fitting(session, model, name, tokens, run))

    def llmc(kind):
        tokens, steps = kinds(sizes)[kind]
        return Item(f"llm.c {kind}", seconds(kind, 3 * sizes.start_seconds) if session.llmc else 0,
                    lambda: peers.llmc(session, model, tokens, steps))

    def pytorch(precision):
        tokens, steps = zip(*kinds(sizes).values())
        return Item(f"pytorch {precision}", seconds(SMALL, sizes.peer_start_seconds) + seconds(LARGE, 0),
                    lambda: peers.pytorch(session, model, precision, tokens, steps))

    def wanted(kind):
        return [name for name, (_, _, its_kinds) in CONFIGURATIONS.items()
                if kind in its_kinds and (model.adamw or "adamw" not in name)]

    found = [ours(name, SMALL) for name in wanted(SMALL)]
    found += [Item(f"profile {name}", 2 * seconds(SMALL), lambda name=name: profile(session, model, name))
              for name in model.profile]
    if model.adamw:
        found += [pytorch("bf16"), llmc(SMALL)]
    found += [ours(name, LARGE) for name in wanted(LARGE)]
    if model.adamw:
        found += [llmc(LARGE), pytorch("autocast")]
    return found
