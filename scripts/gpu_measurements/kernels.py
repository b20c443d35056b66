"""kernels.py: part `kernels`: every operation by itself (bench/kernels), and PyTorch's kernel for it
(scripts/bench_torch_kernels.py), as percentages of what the device measured in the same run."""
import json

from . import machine
from .session import Item, ItemFailed


def read_lines(path):
    """The entries of a benchmark's JSON lines by kind: (device, rows, rest); a last line that was cut off is left
    out. `rest` says which operations were skipped for lack of time and which failed."""
    device, rows, rest = {}, [], {}
    try:
        lines = path.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            break
        if "operation" in entry:
            rows.append(entry)
        elif "device" in entry:
            device = entry
        else:
            rest = entry
    return device, rows, rest


def measured(session, command, path):
    path.unlink(missing_ok=True)
    finished = session.execute(command)
    device, rows, rest = read_lines(path)
    values = {"device": device, "rows": rows, "not_measured": rest}
    failures, skipped = rest.get("failed") or [], rest.get("skipped") or []
    if finished.expired:
        values["failed"] = f"time was over after {len(rows)} operations"
    elif failures:
        values["failed"] = f"{len(failures)} operations failed: {json.dumps(failures)[:200]}"
    elif finished.code:
        values["failed"] = f"exit code {finished.code} after {len(rows)} operations: {finished.last_line()}"
    elif not rows:
        raise ItemFailed(f"no operation was measured: {finished.last_line()}")
    elif skipped:
        values["failed"] = f"no time for {len(skipped)} operations after {len(rows)}"
    return values


def items(session):
    def ours():
        path = session.folder / "kernels.json"
        limit = max(1, min(session.sizes.kernel_seconds, int(0.6 * session.left())))
        program, *flags = session.sizes.kernels
        return measured(session, [program, *flags, "--json", path, "--time-limit", limit], path)

    def torch():
        path, python = session.folder / "torch_kernels.json", session.python_with_torch()
        script = machine.ROOT / "scripts/bench_torch_kernels.py"
        if not script.exists():
            raise ItemFailed("scripts/bench_torch_kernels.py is missing")
        return measured(session, [python, script, *session.sizes.torch_kernels, "--json", path, "--time-limit",
                                  max(1, int(session.left() - 10))], path)

    return [Item("ours", session.sizes.start_seconds, ours), Item("pytorch", session.sizes.start_seconds, torch)]
