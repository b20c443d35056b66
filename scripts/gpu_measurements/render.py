"""render.py: the page made from a result file: a table per part, aims beside what was measured, and below each table
the commands that reproduce its rows."""
from types import SimpleNamespace

from . import correctness, learning as learning_runs, parallel as parallel_runs, steps, techniques, training
from .sizes import (AIM_ATTENTION, AIM_COPY_PERCENT, AIM_DEVICE, AIM_FLORA_TIME, AIM_TOKENS_PER_SECOND)

NONE = "not measured"
DRY_RUN = "**DRY RUN: toy sizes on a CPU, no figure of a GPU.**"


class Table:
    """Rows of one part; a row's last cell refers to the command below the table."""

    def __init__(self, entries, dry_run, columns):
        self.entries, self.dry_run, self.columns = entries, dry_run, columns
        self.rows, self.commands, self.notes = [], [], []

    def add(self, item, cells, title=None):
        """A row of an item: `cells(values)` where it has values, else its status or "not measured"."""
        entry, title = self.entries.get(item), title or item
        values = entry["values"] if entry else {}
        try:
            row = cells(values) if values else None
        except (KeyError, TypeError, IndexError):  # values of another version of this script
            row = None
        if entry is None or row is None:
            row = [NONE] + [""] * (len(self.columns) - 2)
        if entry and entry["status"] != "ok":
            self.notes.append(f"{title}: {entry['status']}")
        self.rows.append([title, *row, self.reference(entry)])

    def reference(self, entry):
        if not entry or not entry["command"]:
            return ""
        if entry["command"] not in [command for command, _ in self.commands]:
            origin = f"{entry['date'].split()[0]}, commit {entry['commit']}, {entry['machine']}"
            self.commands.append((entry["command"], origin))
        return f"[{[command for command, _ in self.commands].index(entry['command']) + 1}]"

    def text(self):
        lines = [DRY_RUN, ""] if self.dry_run else []
        lines += ["| " + " | ".join([*self.columns, "command"]) + " |", "|" + " --- |" * (len(self.columns) + 1)]
        lines += ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in self.rows]
        lines += [""] + [f"* {note}" for note in self.notes] + ([""] if self.notes else [])
        origin = ""
        for i, (command, its_origin) in enumerate(self.commands, 1):
            lines.append(f"    [{i}] {command}")
            if its_origin != origin:
                origin = its_origin
                lines.append(f"        ({origin})")
        lines += [""] if self.commands else []
        return "\n".join(lines)


def number(value, digits=3):
    """Four digits or so; whole above a thousand."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def gib(value):
    if value is None:
        return "-"
    return f"{value / 2**30:.2f} GiB" if abs(value) >= 2**30 / 10 else f"{value / 2**20:.2f} MiB"


def percent(value):
    return "-" if value is None else f"{value:.1f}%"


def tests(entries, dry_run, _):
    table = Table(entries, dry_run, ["tests", "passed", "failed", "skipped", "seconds"])
    for item in entries or ["tests/run.py --suite gpu"]:
        table.add(item, lambda v, item=item: [v["passed"], v["failed_tests"], v["skipped"], entries[item]["seconds"]])
    return table.text()


def right(entries, dry_run, sizes):
    table = Table(entries, dry_run, ["property", "holds", "figures", "seconds"])
    names = [item.name for item in correctness.right(SimpleNamespace(sizes=sizes))]
    for item in [*names, *(name for name in entries if name not in names)]:
        def cells(v, item=item):
            figures = f"{v['steps']} steps, last loss {number(v['last_loss'], 6)}" if "steps" in v else \
                f"{len(v['cuda'])} losses, largest relative difference {v['largest_relative_difference']:.1e}"
            return ["yes" if entries[item]["status"] == "ok" else "no", figures, entries[item]["seconds"]]
        table.add(item, cells)
        if entries.get(item, {}).get("status", "").startswith("failed"):
            table.rows[-1][1] = "no, or not known"
    return table.text()


def kernel_aim(row):
    operation, shape = row["operation"], str(row.get("shape", ""))
    for direction, aim in AIM_ATTENTION.items():
        if "attention" in operation and direction in operation:
            return aim if "T1024 " in shape and "HD64" in shape else ""
    return f"{AIM_COPY_PERCENT}%" if row.get("bound") == "memory" else ""


def kernels(entries, dry_run, _):
    ours, torch = (entries.get(item, {}).get("values", {}) for item in ("ours", "pytorch"))
    peers = {(row["operation"], row.get("model"), row.get("shape")): row for row in torch.get("rows", [])}
    table = Table(entries, dry_run, ["operation", "shape", "ms", "GB/s", "TFLOP/s", "of bound", "bound",
                                     f"aim ({AIM_DEVICE})", "PyTorch ms", "PyTorch / ours"])
    device = ours.get("device", {})
    if device:
        table.notes.append(f"{device.get('device')}: copies {number(device.get('copy_gb_per_second'))} GB/s, bf16 "
                           f"matmul {number(device.get('matmul_tflops'))} TFLOP/s")
    for item in ("ours", "pytorch"):
        reference, entry = table.reference(entries.get(item)), entries.get(item)
        status = entry["status"] if entry else NONE
        table.notes.append(f"{item}: {status} {reference}")
    for row in ours.get("rows", []):
        seconds, peer = row["milliseconds"] / 1e3, peers.get((row["operation"], row.get("model"), row.get("shape")))
        theirs = peer.get("milliseconds") if peer else None
        table.rows.append([
            f"{row['operation']} ({row.get('model', '')})", row.get("shape", ""), number(row["milliseconds"]),
            number(row.get("gigabytes", 0) / seconds), number(row.get("tflop", 0) / seconds),
            percent(row.get("percent")), row.get("bound", ""), kernel_aim(row), number(theirs),
            "-" if theirs is None else f"{theirs / row['milliseconds']:.2f}", table.reference(entries.get("ours"))])
    if not ours.get("rows"):
        table.rows.append([NONE] + [""] * 10)
    return table.text()


def steps_of(model):
    def part(entries, dry_run, sizes):
        table = Table(entries, dry_run, ["configuration", "tokens/step", "micro-batch", "tokens/s", "aim",
                                         "s/step", "MFU", "time / AdamW", "aim", "allocated", "planned"])
        peak, per_token = None, None
        for entry in entries.values():
            peak = entry["values"].get("peak_tflops", peak)
            per_token = entry["values"].get("flops_per_token", per_token)

        def mfu(rate):
            return percent(100 * rate * per_token / (peak * 1e12)) if peak and per_token else "-"

        for kind in (steps.SMALL, steps.LARGE):
            base = entries.get(f"adamw {kind}", {}).get("values", {}).get("step_seconds")
            for name, (title, _, kinds) in steps.CONFIGURATIONS.items():
                if kind not in kinds or ("adamw" in name and not model.adamw):
                    continue
                aim = AIM_TOKENS_PER_SECOND.get((model.name, name), "")

                def cells(v, name=name, aim=aim, kind=kind, base=base):
                    ratio = f"{v['step_seconds'] / base:.3f}" if base else "-"
                    return [number(v["tokens_per_step"]), v["micro_batch"], number(v["tokens_per_second"]), aim,
                            number(v["step_seconds"]), percent(100 * v["mfu"]), ratio,
                            AIM_FLORA_TIME[kind] if name == "flora" else "", gib(v["allocated_bytes"]),
                            gib(v["planned_bytes"])]
                table.add(f"{name} {kind}", cells, f"{title}, {kind}")
            if not model.adamw:
                continue
            for precision in ("bf16", "autocast"):
                def cells(v, kind=kind, base=base):
                    row = v["rows"][0 if kind == steps.SMALL else 1]
                    ratio = f"{row['step_seconds'] / base:.3f}" if base else "-"
                    return [number(row["tokens_per_step"]), row["micro_batch"], number(row["tokens_per_second"]), "",
                            number(row["step_seconds"]), mfu(row["tokens_per_second"]), ratio, "",
                            gib(row["peak_bytes"]), ""]
                rows = entries.get(f"pytorch {precision}", {}).get("values", {}).get("rows") or [{}]
                how = "" if "torch" not in rows[0] else \
                    f" {rows[0]['torch']}" + ("" if rows[0]["compiled"] else " without torch.compile") + \
                    ("" if rows[0]["fused_attention"] else " without fused attention")
                table.add(f"pytorch {precision}", cells, f"PyTorch{how}, {precision}, AdamW, {kind}")

            def cells(v, base=base):
                ratio = f"{v['step_seconds'] / base:.3f}" if base else "-"
                return [number(v["tokens_per_step"]), v["micro_batch"], number(v["tokens_per_second"]), "",
                        number(v["step_seconds"]), mfu(v["tokens_per_second"]), ratio, "", gib(v["driver_bytes"]), ""]
            table.add(f"llm.c {kind}", cells, f"llm.c, AdamW, fp32 states, {kind}")
        text = table.text()
        for name in model.profile:
            profile = Table(entries, dry_run, ["operation", "calls", "seconds", "share", "GFLOP/s", "GB/s"])
            rows = entries.get(f"profile {name}", {}).get("values", {}).get("rows")
            if rows:
                profile.rows = [[row["operation"], row["calls"], row["seconds"], percent(row["percent"]),
                                 number(row["gflops"]), number(row["gb_per_second"]), "[1]"] for row in rows]
                profile.reference(entries[f"profile {name}"])
            else:
                profile.add(f"profile {name}", lambda v: None)
            text += f"\n### {model.name}, {steps.CONFIGURATIONS[name][0]}: where the time goes\n\n" + profile.text()
        return text
    return part


def memory(entries, dry_run, sizes):
    table = Table(entries, dry_run, ["run", "planned", "allocated", "driver", "driver - planned"])
    for model in sizes.memory_models:
        for optimizer in ("adamw", "adafactor", "sgd", "flora"):
            def cells(v):
                extra = None if v["driver_bytes"] is None else v["driver_bytes"] - v["planned_bytes"]
                return [gib(v["planned_bytes"]), gib(v["allocated_bytes"]), gib(v["driver_bytes"]), gib(extra)]
            table.add(f"{optimizer} {model.name}", cells)
    searched = Table(entries, dry_run, ["largest model of two steps", "parameters", "layers x channels", "allocated",
                                        "free before", "s/step", "losses"])
    for item in ("largest flora", "largest adamw"):
        searched.add(item, lambda v: [
            f"{v['parameters'] / 1e9:.4g}B", f"{v['layers']} x {v['channels']}", gib(v["allocated_bytes"]),
            gib(v["free_bytes"]), number(v["step_seconds"]), ", ".join(f"{loss:.4f}" for loss in v["losses"])])
    return "\n".join([table.text(), searched.text(), techniques_table(entries, dry_run, sizes).text()])


def ratio(value, digits=2):
    return "-" if value is None else f"{value:.{digits}f}"


def yes_or_no(value):
    return "-" if value is None else "yes" if value else "no"


def beside_plan(values):
    return None if values["driver_bytes"] is None else values["driver_bytes"] - values["planned_bytes"]


def model_of(flags):
    return ", ".join(value if flag == "--model" else f"{flag[2:]} {value}" for flag, value in training.pairs(flags))


def techniques_table(entries, dry_run, sizes):
    """Techniques that save memory, each with those above it. Time is compared with Flora's row, losses with those of the
    same gradient blocks and dtypes (the same bits) or with Flora's row (relative difference)."""
    table = Table(entries, dry_run, [f"technique ({model_of(sizes.streaming_model)}, micro-batch 1)", "planned",
                                     "allocated", "host", "driver - planned", "s/step", "time / Flora",
                                     "losses the same bits", "losses, relative difference"])
    rows = {item: entry for item, entry in entries.items() if item.startswith(techniques.PREFIX)}
    first = next((entry["values"]["step_seconds"] for entry in rows.values() if entry["values"].get("first")), None)
    for item in rows:
        def cells(v):
            distance = v["relative_difference"]
            return [gib(v["planned_bytes"]), gib(v["allocated_bytes"]), gib(v["host_bytes"]), gib(beside_plan(v)),
                    number(v["step_seconds"]), ratio(first and v["step_seconds"] / first), yes_or_no(v["equal"]),
                    "-" if distance is None else f"{distance:.1e}"]
        table.add(item, cells, item.removeprefix(techniques.PREFIX))
    return table


def streaming(entries, dry_run, sizes):
    table = Table(entries, dry_run, [f"{model_of(sizes.streaming_model)}, weights and activations streamed",
                                     "planned, resident", "planned, streamed", "on the host", "s/step, resident",
                                     "s/step, streamed", "streamed / resident", "copies hidden",
                                     "GB moved per step", "GB/s of the extra time", "losses the same bits"])
    for micro_batch in sizes.overlap_micro_batches:
        def cells(v):
            resident, streamed = v["resident"] or {}, v["streamed"]
            return [gib(resident.get("planned_bytes")), gib(streamed["planned_bytes"]), gib(streamed["host_bytes"]),
                    number(resident.get("step_seconds")), number(streamed["step_seconds"]), ratio(v["time_ratio"]),
                    yes_or_no(v["hidden"]), number(v["moved_bytes"] / 1e9), number(v["extra_gb_per_second"]),
                    yes_or_no(v["equal"])]
        table.add(f"overlap {micro_batch}", cells, f"micro-batch {micro_batch}")
        why = entries.get(f"overlap {micro_batch}", {}).get("values", {}).get("resident_skipped")
        if why:
            table.notes.append(f"micro-batch {micro_batch}, resident: skipped: {why}")
    return table.text() + "\n" + budgets_table(entries, dry_run, sizes).text()


def budgets_table(entries, dry_run, sizes):
    """Two rows for each budget: what was chosen and the runner-up."""
    table = Table(entries, dry_run, [f"--memory-budget ({model_of(sizes.streaming_model)})", "settings", "planned",
                                     "on the host", "driver", "predicted, ms", "measured, ms", "predicted / measured",
                                     "tokens/s", "faster than the runner-up"])
    for size in sizes.budgets:
        def cells(v, which="chosen"):
            row = v[which]
            predicted, faster = row["predicted_ms"], v["choice_was_faster"] if which == "chosen" else None
            return [f"`{row['flags']}`", gib(row["planned_bytes"]), gib(row["host_bytes"]), gib(row["driver_bytes"]),
                    number(predicted), number(row["step_ms"]), ratio(predicted and predicted / row["step_ms"]),
                    number(row["tokens_per_second"]), yes_or_no(faster)]
        table.add(f"budget {size}", cells, size)
        if entries.get(f"budget {size}", {}).get("values", {}).get("runner_up"):
            table.add(f"budget {size}", lambda v: cells(v, "runner_up"), f"{size}, runner-up")
    return table


def parallel(entries, dry_run, _):
    table = Table(entries, dry_run, ["gradients", "ms/step, one process", "ms/step, two ranks", "MB sent a step, each",
                                     "largest relative difference of a loss"])
    for kind in parallel_runs.KINDS:
        table.add(kind, lambda v: [number(v["alone_ms"]), number(v["ranks_ms"]), number(v["sent_mb"]),
                                   f"{v['largest_difference']:.1e}"])
    return table.text()


def learning(entries, dry_run, _):
    table = Table(entries, dry_run, ["run", "steps", "tokens", "tokens/s", "peak lr", "last training loss",
                                     "last validation loss", "training loss / Flora in bf16"])
    for item in learning_runs.RUNS:
        table.add(item, lambda v: [v["steps"], number(v["tokens"]), number(v["tokens_per_second"]), f"{v['lr']:.1e}",
                                   f"{v['final_loss']:.4f}",
                                   "-" if v["final_val_loss"] is None else f"{v['final_val_loss']:.4f}",
                                   ratio(v.get("loss_ratio"), 4)])
    for item in ("speed", "picture"):
        if entries.get(item, {}).get("status", "ok") != "ok":
            table.notes.append(f"{item}: {entries[item]['status']}")
    picture = entries.get("picture", {}).get("values", {}).get("file")
    return table.text() + (f"\n![loss over tokens]({picture})\n" if picture else "")


def summary(parts, names):
    """What became of the items of each part."""
    lines = ["| part | ok | failed | skipped |", "| --- | --- | --- | --- |"]
    for name in names:
        states = [entry["status"].split(":")[0] for entry in parts.get(name, {}).values()]
        counts = [str(states.count(state)) for state in ("ok", "failed", "skipped")]
        lines.append(f"| {name} | " + " | ".join(counts if states else [NONE, "", ""]) + " |")
    return lines


def page(content, sizes, name):
    """The whole page of one result file. `name`: of the file, without its ending."""
    machine, dry_run = content["machine"], content.get("dry_run", False)
    sections = [("tests", "Tests", tests), ("sanitizer", "Tests under compute-sanitizer", tests),
                ("right", "Right", right), ("kernels", "Kernels", kernels)]
    sections += [(f"steps-{model.name}", f"Steps: {model.name}", steps_of(model)) for model in sizes.models]
    sections += [("memory", "Memory", memory), ("streaming", "Streaming and memory budgets", streaming),
                 ("parallel", "Two ranks", parallel), ("learning", "Learning", learning)]
    title = machine["gpu"] + (": DRY RUN" if dry_run else "")
    lines = [f"# {title}", "",
             f"Made by scripts/gpu_report.py from {name}.json; `make gpu-report` measures, `scripts/gpu_report.py "
             "--render` makes this page anew.", "",
             "Machine of the last run: " + ", ".join(f"{key} {value}" for key, value in machine.items() if value) + ".",
             f"Aims are those for an {AIM_DEVICE}. /tmp/random.bin in a command: `python3 scripts/gpu_report.py "
             f"{'--dry-run ' if dry_run else ''}--write-shard /tmp/random.bin`. Runs that write no checkpoint were "
             "killed after the last step that counts.", ""]
    if dry_run:
        lines += [DRY_RUN, ""]
    lines += [*summary(content["parts"], [part for part, _, _ in sections]), ""]
    for part, heading, section in sections:
        if part == "sanitizer" and part not in content["parts"]:
            continue
        lines += [f"## {heading}", "", section(content["parts"].get(part, {}), dry_run, sizes)]
    return "\n".join(lines)
