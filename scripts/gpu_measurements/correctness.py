"""correctness.py: parts `tests`, `sanitizer` and `right`: is what runs on the GPU right?

Tests are the repository's own. `right` runs the program itself: the losses of a small model against the CPU's, and the
pairs of runs that must not differ in a bit, compared by loss and by checkpoint file.
"""
import re
import shutil
import sys

from . import training
from .session import Item, ItemFailed

FILES = ("model.safetensors", "optimizer.safetensors")
COUNTS = r"(\d+) passed, (\d+) failed(?:, (\d+) skipped)?"


def tests(session, flags):
    """One item: tests/run.py, with the counts of its last line, or where time ran out, of the lines so far."""
    def measure():
        python = session.python_with("pytest", "numpy") or sys.executable
        finished = session.execute([python, "tests/run.py", *flags, "--timeout", int(max(1, session.left() - 10))])
        whole = re.findall(rf"^{COUNTS}$", finished.output, re.M)
        so_far = re.findall(rf"^(?:ok  |FAIL)  .*?{COUNTS}", finished.output, re.M)
        counted = whole[-1:] or so_far
        passed, failed, skipped = (sum(int(row[i] or 0) for row in counted) for i in range(3))
        values = {"passed": passed, "failed_tests": failed, "skipped": skipped,
                  "failures": re.findall(r"^failed: (.*)$", finished.output, re.M)[:50]}
        if finished.expired:
            values["failed"] = f"time was over after {passed} passed, {failed} failed"
        elif not whole:
            values["failed"] = f"tests/run.py: {finished.last_line()}"
        elif failed or finished.code:
            first = values["failures"][0] if values["failures"] else finished.last_line()
            values["failed"] = f"{passed} passed, {failed} failed; the first: {first}"
        return values

    return [Item("tests/run.py " + " ".join(flags), 3, measure)]


def same_bits(a, b, what):
    """Throws where two runs differ in a loss they both have or in a checkpoint's file."""
    losses_a, losses_b = a.losses(), b.losses()
    for step in sorted(losses_a.keys() & losses_b.keys()):
        if losses_a[step] != losses_b[step]:
            raise ItemFailed(f"{what}: the losses differ from step {step} on ({losses_a[step]} and {losses_b[step]})")
    for file in FILES:
        if a.checkpoint(file) != b.checkpoint(file):
            raise ItemFailed(f"{what}: {file} differs")


def against_cpu(session):
    """Losses in fp32 on both devices, and their largest relative difference."""
    sizes = session.sizes
    flags = [*sizes.right_model, *sizes.right_loss_batch, "--rank", sizes.right_rank, "--dtype", "fp32",
             "--no-autotune"]
    runs = {device: training.train(session, device, [*flags, "--device", device], sizes.loss_steps)
            for device in ("cuda", "cpu")}
    cuda, cpu = runs["cuda"].losses(), runs["cpu"].losses()
    worst = max(abs(cuda[step] / cpu[step] - 1) for step in cpu)
    values = {"cuda": list(cuda.values()), "cpu": list(cpu.values()), "largest_relative_difference": worst}
    if not worst <= sizes.loss_tolerance:
        values["failed"] = f"losses differ by up to {worst:.1e}, more than {sizes.loss_tolerance:.0e}"
    return values


def right(session):
    sizes = session.sizes
    runs_seconds = sizes.start_seconds / 2 + 1
    flora = ["--optimizer", "flora", "--rank", sizes.right_rank]

    def pair(dtype, what, common, variants):
        """An item: the first variant against each of the others."""
        def measure():
            flags = [*sizes.right_model, *sizes.right_batch, "--dtype", dtype, "--no-autotune", *common]
            names = list(variants)
            runs = [training.train(session, f"run{i}", [*flags, *variants[name]], sizes.right_steps)
                    for i, name in enumerate(names)]
            for name, run in zip(names[1:], runs[1:]):
                same_bits(runs[0], run, f"{names[0]} and {name}")
            return {"runs": names, "steps": sizes.right_steps, "last_loss": runs[0].rows[-1]["loss"]}
        return Item(f"{what}, {dtype}", runs_seconds * len(variants), measure)

    def resume(dtype):
        def measure():
            n = sizes.right_steps
            flags = [*sizes.right_model, *sizes.right_batch, *flora, "--dtype", dtype, "--no-autotune"]
            whole = training.train(session, "whole", [*flags, "--checkpoint-every", n, "--keep-checkpoints", 0], 2 * n)
            rest = session.folder / "rest"
            shutil.rmtree(rest, ignore_errors=True)
            start = whole.folder / f"step_{n:08d}"
            session.execute([training.command(session, [])[0], "--resume", start, "--out", rest, "--device", "cuda",
                             "--no-autotune"]).require("train_gpt2 --resume")
            header, rows = training.read_metrics(rest)
            same_bits(whole, training.Training(rest, header, rows, ""), "the whole run and the resumed one")
            return {"steps": 2 * n, "resumed_at": n, "last_loss": rows[-1]["loss"]}
        return Item(f"resumed == whole, {dtype}", 2 * runs_seconds, measure)

    items = [Item("losses: CUDA against CPU, fp32", 2 * runs_seconds, lambda: against_cpu(session))]
    levels = ("none", "gelu", "norms+gelu", "attention", "block")
    for dtype in sizes.right_dtypes:
        items += [
            pair(dtype, "two runs agree", flora, {"one run": [], "another": []}),
            pair(dtype, "CUDA graphs on == off", flora, {"graphs": [], "no graphs": ["--no-cuda-graph"]}),
            pair(dtype, "updates beside the backward pass == in turn", flora, {"beside": [], "in turn": ["--no-update-overlap"]}),
            pair(dtype, "fused == dense, Flora", [*flora, "--clip-norm", 0],
                 {how: ["--gradients", how] for how in ("dense", "fused")}),
            pair(dtype, "fused == dense, AdamW", ["--optimizer", "adamw", "--clip-norm", 0],
                 {how: ["--gradients", how] for how in ("dense", "fused")}),
            pair(dtype, "recompute levels agree", flora, {level: ["--recompute", level] for level in levels}),
            resume(dtype),
        ]
    return items
