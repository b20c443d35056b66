"""learning.py: part `learning`: a model from scratch on real text for a few minutes, at the same number of tokens with
AdamW, with Flora, and with Flora in 8 bits (weights and states), whose loss must be near that in bf16; and a picture of
the losses."""
from pathlib import Path

from . import machine, training
from .session import Item, ItemFailed, ItemSkipped

RUNS = {
    "adamw": ["--optimizer", "adamw"], "flora": ["--optimizer", "flora"],
    "flora 8-bit": ["--optimizer", "flora", "--weight-dtype", "int8", "--state-dtype", "int8"],
}
REFERENCE = {"flora 8-bit": "flora"}  # a run: the one whose final loss it must reach
LOSS_TOLERANCE = 0.02  # how far the two may be apart, relative
POINTS = 200  # of a curve in the result file
COLORS = {"adamw": "#c44e52", "flora": "#4c72b0", "flora 8-bit": "#55a868"}


def shards(session):
    """The glob of the training shards: DATA itself, or the shards in the folder DATA."""
    if not session.data:
        if session.dry_run:
            return training.shard(session)
        raise ItemSkipped("DATA names no shards")
    path = Path(session.data)
    if not path.is_dir():
        return session.data
    pattern = "*train*.bin" if any(path.glob("*train*.bin")) else "*.bin"
    if not any(path.glob(pattern)):
        raise ItemFailed(f"{path} holds no .bin shard")
    return path / pattern


def thinned(rows):
    """At most POINTS points (tokens, mean loss since the point before)."""
    width = max(1, -(-len(rows) // POINTS))
    chunks = [rows[i:i + width] for i in range(0, len(rows), width)]
    return [[chunk[-1]["tokens"], sum(row["loss"] for row in chunk) / len(chunk)] for chunk in chunks]


class Learning:
    """What the items share: the number of steps, chosen once so that all runs fit into what is left of the part."""

    def __init__(self, session):
        self.session, self.steps = session, None
        self.final_losses = {}

    def flags(self, name):
        sizes = self.session.sizes
        rank = ["--rank", sizes.rank] if "flora" in RUNS[name] else []
        return [*sizes.learning_model, "--dtype", "bf16", "--tokens-per-step", sizes.learning_tokens, *RUNS[name],
                *rank]

    def folder(self, name):
        return "learning_" + name.replace(" ", "_")

    def choose_steps(self):
        """From the slowest run's measured speed; 15% are left for evaluations, checkpoints and the start."""
        session, data = self.session, shards(self.session)
        rates = {}
        for name in RUNS:
            probe = training.train_without_end(session, self.flags(name), session.sizes.learning_probe_steps,
                                               data=data)
            rates[name] = training.speed(probe, 1)["step_seconds"]
        seconds = 0.85 * (session.left() - len(RUNS) * session.sizes.start_seconds) / len(RUNS)
        self.steps = int(seconds / max(rates.values()))
        if session.sizes.learning_longest_steps:
            self.steps = min(self.steps, session.sizes.learning_longest_steps)
        if self.steps < 2:
            raise ItemSkipped(f"{session.left():.0f} s are left, too few for two steps of each run")
        return {"steps": self.steps, "step_seconds": rates}

    def run(self, name):
        session, data = self.session, shards(self.session)
        if self.steps is None:
            raise ItemSkipped("the number of steps is not known")
        run = training.train(session, self.folder(name), [
            *self.flags(name), "--eval-every", max(1, self.steps // 10), "--eval-batches", 10], self.steps, data=data)
        validation = [[row["tokens"], row["val_loss"]] for row in run.rows if row.get("val_loss") is not None]
        final = self.final_losses[name] = thinned(run.rows)[-1][1]
        return {"steps": len(run.rows), "tokens": run.rows[-1]["tokens"], "final_loss": final,
                "final_val_loss": validation[-1][1] if validation else None, "curve": thinned(run.rows),
                "validation": validation, "lr": run.header["options"]["lr"],
                "tokens_per_second": training.speed(run, min(2, len(run.rows) - 1))["tokens_per_second"],
                **self.compared(name, final)}

    def compared(self, name, final):
        """The final loss over that of the run that it must be near, from the same seed; nothing where there is none."""
        if name not in REFERENCE:
            return {}
        if REFERENCE[name] not in self.final_losses:
            return {"failed": f"there is no run {REFERENCE[name]} to compare the loss with"}
        ratio = final / self.final_losses[REFERENCE[name]]
        values = {"loss_ratio": ratio}
        if not abs(ratio - 1) <= LOSS_TOLERANCE:
            values["failed"] = f"the final loss is {ratio:.4f} of that of {REFERENCE[name]}"
        return values

    def picture(self):
        session = self.session
        runs = {name: session.folder / self.folder(name) for name in RUNS}
        runs = {name: path for name, path in runs.items() if training.read_metrics(path)[1]}
        if not runs:
            raise ItemSkipped("there is no run to draw")
        stem = session.results.path.with_name(session.results.path.stem + "-learning")
        python = session.python_with("matplotlib")
        if python:
            path = stem.with_suffix(".png")
            session.execute([python, machine.ROOT / "scripts/plot_metrics.py",
                             *[f"{name}={run}" for name, run in runs.items()], "-o", path, "--x", "tokens",
                             "--smooth", 10]).require("plot_metrics.py")
        else:
            path = stem.with_suffix(".svg")
            path.write_text(svg({name: thinned(training.read_metrics(run)[1]) for name, run in runs.items()}))
        return {"file": path.name}


def svg(curves):
    """Loss over tokens, one line per curve, drawn by hand."""
    width, height, margin = 720, 420, 55
    points = [point for curve in curves.values() for point in curve]
    most = max(tokens for tokens, _ in points)
    low, high = min(loss for _, loss in points), max(loss for _, loss in points)
    high = max(high, low + 1e-6)

    def x(tokens):
        return margin + (width - 2 * margin) * tokens / most

    def y(loss):
        return height - margin - (height - 2 * margin) * (loss - low) / (high - low)

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
             f'font-size="12"><rect width="{width}" height="{height}" fill="white"/>']
    for i in range(5):
        loss, tokens = low + (high - low) * i / 4, most * i / 4
        parts.append(f'<line x1="{margin}" x2="{width - margin}" y1="{y(loss):.1f}" y2="{y(loss):.1f}" stroke="#ddd"/>'
                     f'<text x="{margin - 6}" y="{y(loss) + 4:.1f}" text-anchor="end">{loss:.2f}</text>'
                     f'<text x="{x(tokens):.1f}" y="{height - margin + 18}" text-anchor="middle">{tokens:.3g}</text>')
    for i, (name, curve) in enumerate(curves.items()):
        line = " ".join(f"{x(tokens):.1f},{y(loss):.1f}" for tokens, loss in curve)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{COLORS[name]}" stroke-width="1.5"/>'
                     f'<text x="{width - margin - 60}" y="{margin + 16 * i}" fill="{COLORS[name]}">{name}</text>')
    parts.append(f'<text x="{width / 2}" y="{height - 12}" text-anchor="middle">tokens</text>'
                 f'<text x="{margin}" y="{margin - 15}">loss (nats per token)</text></svg>')
    return "\n".join(parts) + "\n"


def items(session):
    learning, start = Learning(session), session.sizes.start_seconds
    return [Item("speed", 2 * len(RUNS) * start, learning.choose_steps),
            *[Item(name, 0, lambda name=name: learning.run(name)) for name in RUNS],
            Item("picture", 0, learning.picture)]
