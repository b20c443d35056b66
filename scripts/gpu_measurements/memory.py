"""memory.py: part `memory`: what is planned, what is allocated and what the driver says is used, per optimizer and
model; the largest model that completes two optimizer steps; then what each technique saves and costs
(techniques.py)."""
import json

from . import techniques, training
from .session import Item, ItemFailed, OutOfMemory

OPTIMIZERS = ("adamw", "adafactor", "sgd", "flora")
STEPS = 2
SEARCHES = {  # name: flags of the smallest step there is with this optimizer, and of the usual one
    "largest flora": ["--optimizer", "flora", "--gradients", "fused", "--recompute", "block", "--state-dtype", "int8"],
    "largest adamw": ["--optimizer", "adamw", "--gradients", "dense", "--recompute", "block"],
}


def optimizer_flags(session, optimizer):
    return ["--optimizer", optimizer, *(["--rank", session.sizes.rank] if optimizer == "flora" else [])]


def one(session, model, optimizer):
    """Two steps at the optimizer's default gradients, with block recompute."""
    flags = ["--model", model.preset, "--dtype", "bf16", "--recompute", "block", "--no-autotune",
             *session.sizes.memory_batch, *optimizer_flags(session, optimizer)]
    planned = training.whole_plan(session, flags)
    return training.memory_values(planned, *training.train_beside_driver(session, flags, STEPS))


def largest(session, name):
    """GPT-3's proportions (as many layers as heads of 128 channels): the widest model whose plan fits, then the deepest
    of that width; then real runs, a little less deep each time one finds too little memory."""
    sizes = session.sizes
    free = sizes.search_memory or session.device_memory()
    if not free:
        raise ItemFailed("nvidia-smi does not say how much memory is free")
    batch = dict(training.pairs(sizes.memory_batch))
    smaller = ["--dtype", "bf16", "--micro-batch", 1, "--seq-len", batch["--seq-len"], "--no-autotune",
               "--no-update-overlap", *SEARCHES[name], *(["--rank", sizes.rank] if "flora" in name else [])]

    def config(heads, layers):
        path = session.folder / f"{layers}x{heads * sizes.head_channels}.json"
        path.write_text(json.dumps({
            "vocab_size": sizes.vocabulary, "n_positions": int(batch["--seq-len"]), "n_layer": layers,
            "n_head": heads, "n_embd": heads * sizes.head_channels}))
        return path

    def fits(heads, layers):
        return training.plan(session, ["--model", config(heads, layers), *smaller]) <= free

    heads = last_that(lambda heads: fits(heads, heads), *sizes.search_channels)
    if not heads:
        raise ItemFailed(f"not even {sizes.search_channels[0]} layers of as many heads fit into {free} bytes")
    layers = last_that(lambda layers: fits(heads, layers), heads, 2 * heads)
    tried = []
    while layers > 0:
        path = config(heads, layers)
        session.commands = [f"echo {path.read_text()!r} >/tmp/{path.name}"]
        try:
            run = training.train_without_end(session, ["--model", path, *smaller], STEPS,
                                             environment=sizes.search_environment)
        except OutOfMemory:
            tried.append(layers)
            layers -= max(1, layers // 50)
            continue
        return {"parameters": run.header["parameters"], "layers": layers, "channels": heads * sizes.head_channels,
                "allocated_bytes": run.rows[-1]["device_bytes"], "free_bytes": free, "too_deep": tried,
                "step_seconds": run.rows[-1]["step_ms"] / 1e3, "losses": list(run.losses().values())}
    raise OutOfMemory(f"no depth at {heads * sizes.head_channels} channels completed {STEPS} steps")


def last_that(holds, low, high):
    """The largest number from low to high for which holds(number), which is true up to some number; 0: none."""
    if not holds(low):
        return 0
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def items(session):
    sizes = session.sizes
    found = [Item(f"{optimizer} {model.name}", sizes.start_seconds, lambda o=optimizer, m=model: one(session, m, o))
             for model in sizes.memory_models for optimizer in OPTIMIZERS]
    found += [Item(name, 3 * sizes.start_seconds, lambda name=name: largest(session, name)) for name in SEARCHES]
    return found + techniques.items(session)
