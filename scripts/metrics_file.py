"""metrics_file.py: reads metrics.jsonl, for the scripts that plot and export it."""
import json
from dataclasses import dataclass
from pathlib import Path


class MetricsError(Exception):
    """A message for the user, one line."""


@dataclass
class Run:
    label: str
    options: dict  # the first line: every resolved option, the version and the device
    rows: list  # one dictionary per step


def read_metrics(argument):
    """`argument` is [LABEL=]PATH, PATH a metrics.jsonl or the folder that holds one; the label defaults to the folder's
    name. A last line that a killed run left half written is ignored. After a resume a step may occur twice: the later
    one counts."""
    label, separator, path = argument.partition("=")
    if not separator or Path(argument).exists():
        label, path = "", argument
    path = Path(path)
    if path.is_dir():
        path = path / "metrics.jsonl"
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        raise MetricsError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise MetricsError(f"{path}: cannot be read ({error})") from None
    options, rows = {}, {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise MetricsError(f"{path}:{number}: not JSON ({error.msg})") from None
        if not isinstance(entry, dict):
            raise MetricsError(f"{path}:{number}: not a JSON object")
        if isinstance(entry.get("step"), int) and ("loss" in entry or "val_loss" in entry):
            rows.setdefault(entry["step"], {}).update(entry)
        elif not options:
            options = entry
    if not rows:
        raise MetricsError(f"{path}: holds no step yet")
    return Run(label or path.resolve().parent.name or path.stem, options, [rows[step] for step in sorted(rows)])
