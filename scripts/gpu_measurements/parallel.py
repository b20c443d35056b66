"""parallel.py: part `parallel`: two ranks against one process that computes the same micro-batches, for each kind of
gradient. Where there is one GPU, both are on it, which NCCL allows from 2.30 on; where it does not, or is missing or too
old, the item says so. With one GPU the times say nothing of the speed of two.
"""
import re

from . import techniques, training
from .session import Item, ItemFailed, ItemSkipped

KINDS = {"fused": ("--gradients", "fused"), "compressed": ("--gradients", "compressed"),
         "dense": ("--optimizer", "adamw", "--gradients", "dense"), "sharded": ("--gradients", "fused", "--shard", "weights")}
TOLERANCE = 2e-3  # of losses in bf16: sums over ranks have another order
ENVIRONMENT = {"NCCL_MULTI_RANK_GPU_ENABLE": "1"}


def one(session, kind):
    sizes = session.sizes
    flags = [*sizes.right_model, *sizes.right_batch, "--no-autotune", *KINDS[kind]]
    if "adamw" not in flags:
        flags += ["--rank", sizes.right_rank]
    single = [flag for flag in flags if flag not in ("--shard", "weights")]
    batch = dict(training.pairs(flags))
    tokens = 2 * int(batch["--micro-batch"]) * int(batch["--seq-len"])
    alone = training.train(session, "alone", [*single, "--tokens-per-step", tokens], sizes.right_steps)
    try:
        ranks = training.train(session, "ranks", [*flags, "--tokens-per-step", tokens, "--devices", 2], sizes.right_steps,
                               environment=ENVIRONMENT)
    except ItemFailed as reason:
        if "NCCL" in str(reason) or "--devices" in str(reason):
            raise ItemSkipped(str(reason)) from reason
        raise
    sent = re.search(r"each sent ([\d.]+) MB a step", ranks.output)
    values = {"alone_ms": 1e3 * training.speed(alone, 1)["step_seconds"],
              "ranks_ms": 1e3 * training.speed(ranks, 1)["step_seconds"], "sent_mb": float(sent[1]) if sent else None,
              "largest_difference": max(abs(ranks.losses()[step] / loss - 1) for step, loss in alone.losses().items())}
    if values["largest_difference"] > TOLERANCE:
        difference = techniques.first_difference(list(ranks.losses().values()), list(alone.losses().values()))
        values["failed"] = f"losses of two ranks and of one process differ: {difference}"
    return values


def items(session):
    return [Item(kind, 2 * session.sizes.start_seconds, lambda kind=kind: one(session, kind)) for kind in KINDS]
