#!/usr/bin/env python3
"""learning_study.py: which update rule learns most from the same tokens, each at its own best learning rate.

    scripts/learning_study.py data --shards 'DIR/*.bin' --bpe DIR --out data/study
    scripts/learning_study.py run --data data/study --csv docs/results/learning.csv
    scripts/learning_study.py report --csv docs/results/learning.csv --out docs/learning_table.md --plot docs/learning.png

`run` trains ./train_gpt2 once per line of the table and appends a line to the CSV as soon as a run ends. What is in the
CSV is never run again, a run that was cut goes on from its checkpoint, so it may be stopped at any moment and started
again. For each setting the learning rate is swept by factors of 2 with the first seed, until the best one has a worse
neighbour on both sides; the other seeds run at the best one.

`data` rewrites shards in GPT-2's BPE with the first merges only (--vocabulary tokens, the last one being end-of-text): a
model of some million parameters has no use for 50,257 tokens. `report` needs matplotlib for the plot."""
import argparse
import csv
import fnmatch
import glob
import json
import math
import re
import shutil
import statistics
import struct
import subprocess
import sys
from array import array
from fractions import Fraction
from pathlib import Path

FIELDS = ["size", "setting", "lr", "seed", "tokens", "tokens_per_step", "validation_loss", "state_bytes", "step_ms",
          "flags", "commit", "machine"]
GPT2_END_OF_TEXT = 50256

# name: layers, channels, heads, sequence length
SIZES = {"1m": (5, 128, 4, 128), "3m": (4, 256, 4, 128), "10m": (8, 320, 5, 128)}

def flora(projection, fraction, kappa, *more, matrix_lr=""):
    """Rank as a fraction of the width; what the defaults would choose is said. matrix_lr: as in 1/10."""
    name = f"flora {projection} C/{fraction} kappa {kappa}" + "".join(" " + flag.lstrip("-") for flag in more)
    flags = ["--optimizer", "flora", "--rank", f"C/{fraction}", "--projection", projection, "--kappa", str(kappa), *more]
    flags += [default for default in ("--residual=false", "--embedding-momentum")
              if not any(flag.startswith(default.split("=")[0]) for flag in more)]
    flags += ["--matrix-lr-scale", str(float(Fraction(matrix_lr or 1)))]
    return name + (f" matrix lr {matrix_lr}" if matrix_lr else ""), flags


# name -> flags and the learning rate that the sweep begins at; the order is that of the runs.
HALF_LIFE = ["--half-life", "7100000"]
SETTINGS = {
    "adamw": (["--optimizer", "adamw"], 2e-3),
    "adafactor no momentum": (["--optimizer", "adafactor", "--beta1", "0", "--gradients", "fused"], 2e-3),
}
SETTINGS |= {name: (flags, 2e-3) for name, flags in [
    flora("gaussian", 4, 1000),
    flora("cosine", 4, 200),
    flora("cosine", 4, 200, "--residual"),
    flora("cosine", 4, 50, "--residual"),
    flora("cosine", 4, 1000, "--residual"),
    flora("cosine", 8, 200, "--residual"),
    flora("cosine", 16, 200, "--residual"),
    flora("cosine", 4, 50),
    flora("cosine", 4, 1000),
    flora("cosine", 8, 200),
    flora("cosine", 16, 200),
    flora("cosine", 4, 200, "--compress-embeddings"),
    flora("gaussian", 4, 200),
    flora("gaussian", 4, 50),
    flora("gaussian", 8, 200),
    flora("gaussian", 16, 200),
    flora("cosine", 4, 50, "--residual", "--transfer=restart"),
    flora("cosine", 4, 50, "--residual", "--transfer=rescale"),
    flora("cosine", 4, 50, "--residual", "--transfer=unbiased"),
]}
SETTINGS |= {
    "adamw half-life": (["--optimizer", "adamw", *HALF_LIFE], 2e-3),
    "adafactor no momentum half-life": (
        ["--optimizer", "adafactor", "--beta1", "0", "--gradients", "fused", *HALF_LIFE], 2e-3),
    "adafactor": (["--optimizer", "adafactor", "--gradients", "fused"], 2e-3),
    "adafactor int8 momentum": (["--optimizer", "adafactor", "--gradients", "fused", "--state-dtype", "int8"], 2e-3),
    "sgd": (["--optimizer", "sgd"], 0.2),
    "adamw matrix lr 1/3": (["--optimizer", "adamw", "--matrix-lr-scale", "0.333"], 4e-3),
    "adamw matrix lr 1/10": (["--optimizer", "adamw", "--matrix-lr-scale", "0.1"], 4e-3),
    "adafactor no momentum matrix lr 1/3": (
        ["--optimizer", "adafactor", "--beta1", "0", "--gradients", "fused", "--matrix-lr-scale", "0.333"], 4e-3),
    "adafactor no momentum matrix lr 1/10": (
        ["--optimizer", "adafactor", "--beta1", "0", "--gradients", "fused", "--matrix-lr-scale", "0.1"], 8e-3),
    "adamw half-life matrix lr 1/10": (["--optimizer", "adamw", *HALF_LIFE, "--matrix-lr-scale", "0.1"], 8e-3),
}
SETTINGS |= {name: (flags, 8e-3) for name, flags in [
    flora("cosine", 4, 200, "--residual", matrix_lr="1/10"),
    flora("cosine", 16, 200, "--residual", matrix_lr="1/10"),
    flora("cosine", 4, 200, "--residual", matrix_lr="1/5"),
    flora("cosine", 4, 200, "--residual", "--embedding-momentum=false", matrix_lr="1/10"),
    flora("cosine", 4, 50, "--residual", "--embedding-momentum=false", matrix_lr="1/10"),
    flora("cosine", 4, 1000, "--residual", "--embedding-momentum=false", matrix_lr="1/10"),
    flora("cosine", 8, 200, "--residual", "--embedding-momentum=false", matrix_lr="1/10"),
    flora("cosine", 16, 200, "--residual", "--embedding-momentum=false", matrix_lr="1/10"),
    flora("cosine", 4, 200, "--residual", "--compress-embeddings", matrix_lr="1/10"),
    flora("cosine", 8, 200, "--residual", "--compress-embeddings", matrix_lr="1/10"),
    flora("cosine", 16, 200, "--residual", "--compress-embeddings", matrix_lr="1/10"),
    flora("cosine", 4, 200, matrix_lr="3"),
]}
SETTINGS |= {
    "adafactor matrix lr 1/10": (
        ["--optimizer", "adafactor", "--gradients", "fused", "--matrix-lr-scale", "0.1"], 8e-3),
    "adafactor int8 momentum matrix lr 1/10": (
        ["--optimizer", "adafactor", "--gradients", "fused", "--state-dtype", "int8", "--matrix-lr-scale", "0.1"], 8e-3),
    "adafactor embedding-momentum=false matrix lr 1/10": (
        ["--optimizer", "adafactor", "--gradients", "fused", "--embedding-momentum=false", "--matrix-lr-scale", "0.1"],
        8e-3),
    "adafactor int8 momentum embedding-momentum=false matrix lr 1/10": (
        ["--optimizer", "adafactor", "--gradients", "fused", "--state-dtype", "int8", "--embedding-momentum=false",
         "--matrix-lr-scale", "0.1"], 8e-3),
}


class StudyError(Exception):
    pass


# ---- data


def short_tokens(bpe, vocabulary):
    """For each token of GPT-2 what it is in the first `vocabulary - 1` tokens: a merged token is its two parts, until
    they are there; end-of-text is the last token."""
    encoder = json.loads((bpe / "encoder.json").read_text(encoding="utf-8"))
    parts = {}
    for line in (bpe / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:]:
        if line:
            left, right = line.split(" ")
            parts[encoder[left + right]] = (encoder[left], encoder[right])
    table = {}
    for token in encoder.values():
        short = [token]
        while max(short) >= vocabulary - 1 and token != GPT2_END_OF_TEXT:
            short = [p for t in short for p in (parts[t] if t >= vocabulary - 1 else (t,))]
        table[token] = short if token != GPT2_END_OF_TEXT else [vocabulary - 1]
    return table


def make_data(arguments):
    table = short_tokens(Path(arguments.bpe), arguments.vocabulary)
    shards = sorted(glob.glob(arguments.shards))
    if not shards:
        raise StudyError(f"no shards match {arguments.shards}")
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    for shard in shards:
        raw = Path(shard).read_bytes()
        header = struct.unpack("<256i", raw[:1024])
        if header[:2] != (20240520, 1):
            raise StudyError(f"{shard} is no llm.c shard of GPT-2 tokens")
        tokens = array("H")
        for token in array("H", raw[1024 : 1024 + 2 * header[2]]):
            tokens.extend(table[token])
        with open(out / Path(shard).name, "wb") as file:
            file.write(struct.pack("<256i", 20240520, 1, len(tokens), arguments.vocabulary, *[0] * 252))
            tokens.tofile(file)
        print(f"{out / Path(shard).name}: {header[2]} tokens became {len(tokens)}")


# ---- runs


def read_csv(path):
    if not Path(path).exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def output_of(command):
    finished = subprocess.run(command, capture_output=True, text=True)
    return finished.stdout.strip() if finished.returncode == 0 else ""


def machine():
    """The processor's name and what tells one of the same name from another."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    found = dict(re.findall(r"^(model name|cpu family|model)\s*:\s*(.*)$", text, re.MULTILINE))
    return f"{found.get('model name', 'unknown')}, family {found.get('cpu family')} model {found.get('model')}"


def commit():
    return output_of(["git", "rev-parse", "--short", "HEAD"]) + (
        "+" if output_of(["git", "status", "--porcelain", "-uno", "--", "*.cpp", "*.h"]) else "")


class Study:
    def __init__(self, arguments):
        self.arguments, self.rows = arguments, read_csv(arguments.csv)
        self.folder = Path(arguments.out)
        self.commit, self.machine = commit(), machine()

    def known(self, **what):
        """The first row of the CSV with these fields."""
        for row in self.rows:
            if all(str(row[key]) == str(value) for key, value in what.items()):
                return row
        return None

    def loss(self, size, setting, lr, seed):
        """Validation loss of one run, trained now if it is not in the CSV; infinite where it broke down."""
        tokens, per_step = self.arguments.tokens, self.arguments.tokens_per_step
        key = dict(size=size, setting=setting, lr=f"{lr:.4g}", seed=seed, tokens=tokens, tokens_per_step=per_step)
        row = self.known(**key)
        if row is None:
            row = key | self.train(size, setting, lr, seed)
            new = not Path(self.arguments.csv).exists()
            Path(self.arguments.csv).parent.mkdir(parents=True, exist_ok=True)
            with open(self.arguments.csv, "a", newline="") as file:
                writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
                if new:
                    writer.writeheader()
                writer.writerow(row)
            self.rows.append(row)
            print(f"{size} {setting} lr {key['lr']} seed {seed}: {row['validation_loss']}", flush=True)
        return float(row["validation_loss"])

    def train(self, size, setting, lr, seed):
        layers, channels, heads, length = SIZES[size]
        batch = self.arguments.tokens_per_step // length  # one micro-batch a step, as fused updates need
        name = re.sub("[^a-z0-9]+", "_", f"{size} {setting} {lr:.4g} {seed} {self.arguments.tokens} "
                                         f"{self.arguments.tokens_per_step}")
        out = self.folder / name
        self.folder.mkdir(parents=True, exist_ok=True)
        model = self.folder / f"{size}.json"
        model.write_text(json.dumps({
            "model_type": "gpt2", "n_layer": layers, "n_embd": channels, "n_head": heads, "n_positions": length,
            "n_ctx": length, "vocab_size": self.vocabulary(), "layer_norm_epsilon": 1e-5,
            "activation_function": "gelu_new"}))
        flags = [str(channels // int(flag[2:])) if re.fullmatch(r"C/\d+", flag) else flag
                 for flag in SETTINGS[setting][0]]
        steps = self.arguments.tokens // self.arguments.tokens_per_step
        shared = ["--model", model, "--seq-len", length, "--micro-batch", batch, "--tokens-per-step",
                  self.arguments.tokens_per_step, "--threads", self.arguments.threads, "--device", "cpu", "--dtype",
                  "fp32", *flags]
        command = [self.arguments.program, "--data", f"{self.arguments.data}/*_train_*.bin", "--val-data",
                   f"{self.arguments.data}/*_val_*.bin", *shared, "--steps", steps, "--lr", f"{lr:.4g}", "--schedule",
                   "cosine", "--final-lr", "0.1", "--seed", seed, "--eval-every", steps, "--eval-batches",
                   max(1, self.arguments.validation_tokens // (length * batch)), "--checkpoint-every", max(1, steps // 4),
                   "--keep-checkpoints", 1, "--log-every", 100, "--out", out]
        if (out / "latest").exists():
            command = [self.arguments.program, "--resume", out]
        elif out.exists():
            shutil.rmtree(out)
        finished = subprocess.run([str(word) for word in command], capture_output=True, text=True)
        if finished.returncode != 0 and "not finite" not in finished.stderr:
            raise StudyError(f"{' '.join(map(str, command))}: {finished.stderr.strip()}")
        with open(out / "metrics.jsonl") as file:
            lines = [json.loads(line) for line in file]
        plan = json.loads(output_of([self.arguments.program, "plan", "--json", *map(str, shared)]))
        loss = lines[-1].get("val_loss") if finished.returncode == 0 else None
        shutil.rmtree(out)
        return dict(
            validation_loss=f"{loss:.5f}" if loss is not None else "inf",
            state_bytes=plan["categories"]["optimizer state"],
            step_ms=f"{statistics.median(line['step_ms'] for line in lines if 'step_ms' in line):.1f}",
            flags=" ".join(flags), commit=self.commit, machine=self.machine)

    def vocabulary(self):
        shard = sorted(glob.glob(f"{self.arguments.data}/*_train_*.bin"))
        if not shard:
            raise StudyError(f"no {self.arguments.data}/*_train_*.bin; the data command makes them")
        with open(shard[0], "rb") as file:
            return struct.unpack("<4i", file.read(16))[3]

    def best_rate(self, size, setting):
        """The learning rate with the lowest loss of the first seed, not at the edge of what was tried."""
        seed, start = self.arguments.seeds[0], SETTINGS[setting][1]
        losses = {}
        for power in (0, 1, -1):
            losses[power] = self.loss(size, setting, start * 2.0**power, seed)
        while True:
            best = min(losses, key=losses.get)
            missing = [power for power in (best - 1, best + 1) if power not in losses]
            if not missing or len(losses) > 9:
                return start * 2.0**best
            losses[missing[0]] = self.loss(size, setting, start * 2.0 ** missing[0], seed)


def run(arguments):
    study = Study(arguments)
    for size in arguments.sizes:
        for setting in SETTINGS:
            if not any(fnmatch.fnmatch(setting, pattern) for pattern in arguments.settings):
                continue
            rate = study.best_rate(size, setting)
            for seed in arguments.seeds[1:]:
                study.loss(size, setting, rate, seed)


# ---- the report


def summaries(rows):
    """One line per size, tokens, tokens per step and setting: the best of the learning rates with most seeds, with their mean
    and spread."""
    groups = {}
    for row in rows:
        group = groups.setdefault((row["size"], int(row["tokens"]), int(row["tokens_per_step"]), row["setting"]), {})
        group.setdefault(float(row["lr"]), []).append(row)
    for (size, tokens, per_step, setting), rates in groups.items():
        best = min(rates, key=lambda lr: (-len(rates[lr]), statistics.mean(float(row["validation_loss"]) for row in rates[lr])))
        losses = [float(row["validation_loss"]) for row in rates[best]]
        yield dict(size=size, tokens=tokens, tokens_per_step=per_step, setting=setting, lr=best,
                   edge=best in (min(rates), max(rates)), seeds=len(losses), loss=statistics.mean(losses),
                   spread=statistics.stdev(losses) if len(losses) > 1 else None,
                   state_bytes=int(rates[best][0]["state_bytes"]), step_ms=float(rates[best][0]["step_ms"]))


def report(arguments):
    lines = sorted(summaries(read_csv(arguments.csv)), key=lambda s: (s["size"], s["tokens"], s["tokens_per_step"], s["loss"]))
    if not lines:
        raise StudyError(f"{arguments.csv} has no runs")
    text, group = [], None
    adamw = {(s["size"], s["tokens"], s["tokens_per_step"]): s for s in lines if s["setting"] == "adamw"}
    for s in lines:
        key = (s["size"], s["tokens"], s["tokens_per_step"])
        if key != group:
            group = key
            text += ["", f"Model {s['size']}, {s['tokens']:,} tokens, {s['tokens_per_step']:,} a step:", "",
                     "| setting | best lr | validation loss | seeds | against AdamW | states, bytes | of AdamW's | ms/step |",
                     "| --- | --- | --- | --- | --- | --- | --- | --- |"]
        base = adamw.get(key)
        spread = f" +- {s['spread']:.4f}" if s["spread"] is not None else ""
        text.append(
            f"| {s['setting']} | {s['lr']:.4g}{' (edge)' if s['edge'] else ''} | {s['loss']:.4f}{spread} | {s['seeds']} | "
            + (f"{100 * (s['loss'] / base['loss'] - 1):+.2f}% | {s['state_bytes']:,} | "
               + (f"1/{base['state_bytes'] / s['state_bytes']:.1f}" if s["state_bytes"] else "none") + " | " if base and math.isfinite(s["loss"]) else
               f"| {s['state_bytes']:,} | | ") + f"{s['step_ms']:.0f} |")
    table = "\n".join(text).strip() + "\n"
    if arguments.out:
        Path(arguments.out).write_text(table)
    else:
        print(table, end="")
    if arguments.plot:
        draw(lines, arguments.plot)


def draw(lines, path):
    """Loss against bytes of states, a panel for each size and number of tokens; bars are one standard deviation."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = {}
    for s in lines:
        if math.isfinite(s["loss"]) and s["state_bytes"] > 0:  # SGD has no place on an axis of logarithms
            groups.setdefault((s["size"], s["tokens"], s["tokens_per_step"]), []).append(s)
    groups = {key: group for key, group in groups.items() if len(group) > 1}
    if not groups:
        raise StudyError("no two settings to compare in a plot")
    columns = min(3, len(groups))
    rows = math.ceil(len(groups) / columns)
    figure, panels = plt.subplots(rows, columns, figsize=(6 * columns, 5 * rows), squeeze=False, layout="constrained")
    for axes in panels.flat[len(groups):]:
        axes.remove()
    for axes, ((size, tokens, per_step), group) in zip(panels.flat, groups.items()):
        for s in group:
            axes.errorbar(s["state_bytes"] / 2**20, s["loss"], yerr=s["spread"], fmt="o", markersize=4, capsize=3)
            axes.annotate(s["setting"], (s["state_bytes"] / 2**20, s["loss"]), fontsize=6,
                          xytext=(4, 2), textcoords="offset points")
        axes.set(xscale="log", xlabel="optimizer states, MiB", ylabel="validation loss, nats per token",
                 title=f"{size}, {tokens / 1e6:g}M tokens, {per_step:,} a step")
        axes.grid(alpha=0.25)
        left, right = axes.get_xlim()
        axes.set_xlim(left, right * 8)  # room for the names
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser("data", help="shards in GPT-2's BPE, rewritten with a smaller vocabulary")
    data.add_argument("--shards", required=True, help="llm.c shards, a glob; names keep their _train_ and _val_")
    data.add_argument("--bpe", required=True, help="folder with GPT-2's encoder.json and vocab.bpe")
    data.add_argument("--vocabulary", type=int, default=4096)
    data.add_argument("--out", required=True)
    train = commands.add_parser("run", help="trains what is not in the CSV yet")
    train.add_argument("--data", required=True, help="folder with *_train_*.bin and *_val_*.bin")
    train.add_argument("--csv", required=True)
    train.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    train.add_argument("--settings", nargs="+", default=["*"], help="shell patterns of names")
    train.add_argument("--tokens", type=int, default=10_240_000, help="of a run")
    train.add_argument("--tokens-per-step", type=int, default=1024)
    train.add_argument("--validation-tokens", type=int, default=1 << 17)
    train.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    train.add_argument("--program", default="./train_gpt2")
    train.add_argument("--threads", type=int, default=1)
    train.add_argument("--out", default="runs/learning_study", help="folder of the runs in progress")
    table = commands.add_parser("report", help="Markdown table and plot")
    table.add_argument("--csv", required=True)
    table.add_argument("--out", help="Markdown file; default: printed")
    table.add_argument("--plot", help="picture of loss against state bytes")
    arguments = parser.parse_args()
    {"data": make_data, "run": run, "report": report}[arguments.command](arguments)


if __name__ == "__main__":
    try:
        main()
    except (StudyError, OSError) as error:
        sys.exit(f"learning_study: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
