"""metrics_file.py: reads metrics.jsonl, for the scripts that plot and export it."""
import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path


class MetricsError(Exception):
    """A message for the user, one line, and the exit code: 2 where the call is wrong."""

    def __init__(self, message, exit_code=1):
        super().__init__(message)
        self.exit_code = exit_code


def run_script(name, main):
    """Calls main() and exits; whatever it raises becomes one line and an exit code."""
    try:
        main()
        sys.stdout.flush()
        sys.exit(0)
    except MetricsError as error:
        message, code = str(error), error.exit_code
    except BrokenPipeError:  # nobody reads: nothing more to say, at the interpreter's own flush either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    except Exception as error:  # what nobody foresaw, of the libraries most likely
        message, code = f"{type(error).__name__}: {error}", 1
    print(f"{name}: {' '.join(message.splitlines())}", file=sys.stderr)
    sys.exit(code)


@dataclass
class Run:
    label: str
    options: dict  # the first line: every resolved option, the version and the device
    rows: list  # one dictionary per step; None for a number that was not finite
    samples: dict  # text by step
    written: float  # when the file was last written, in seconds since 1970


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
    if path.exists() and not path.is_file():
        raise MetricsError(f"{path}: not a regular file")
    try:
        lines = path.read_text(encoding="utf-8").rstrip().split("\n")  # JSON strings may hold the other line ends
    except FileNotFoundError:
        raise MetricsError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise MetricsError(f"{path}: cannot be read ({error})") from None
    options, rows, samples = {}, {}, {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                break
            raise MetricsError(f"{path}:{number}: not JSON ({error})") from None
        if not isinstance(entry, dict):
            raise MetricsError(f"{path}:{number}: not a JSON object")
        numbers = _numbers(entry)
        step = numbers.get("step")
        if isinstance(step, int) and isinstance(entry.get("sample"), str):
            samples[step] = entry["sample"]
        elif isinstance(step, int) and ("loss" in entry or "val_loss" in entry):
            rows.setdefault(step, {}).update(numbers)
        elif not options:
            options = entry
    if not rows:
        raise MetricsError(f"{path}: holds no step yet")
    return Run(label or path.resolve().parent.name or path.stem, options, [rows[step] for step in sorted(rows)],
               dict(sorted(samples.items())), path.stat().st_mtime)


def _numbers(entry):
    """The numbers of a line, None where one is not finite (in JSON null, or as some write it NaN); without what is no
    number, or is too large for a curve."""
    numbers = {}
    for key, value in entry.items():
        try:
            if value is None or isinstance(value, (int, float)):
                numbers[key] = value if value is not None and math.isfinite(value) else None
        except OverflowError:
            pass
    return numbers
