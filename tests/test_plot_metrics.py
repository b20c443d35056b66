"""test_plot_metrics.py: the script that draws runs, as a user runs it, and the reader of metrics.jsonl behind it."""
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))

import plot_metrics  # noqa: E402
from metrics_file import MetricsError, read_metrics  # noqa: E402


def run(script, *arguments):
    command = [sys.executable, str(SCRIPTS / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def write_run(folder, steps=50, offset=0.0):
    folder.mkdir()
    lines = [{"version": "1", "device": "cpu", "options": {"optimizer": "flora"}}]
    for step in range(1, steps + 1):
        row = {"step": step, "tokens": step * 512, "loss": 3 + offset + math.exp(-step / 20), "lr": 1e-3 * step / steps}
        if step % 10 == 0:
            row["val_loss"] = row["loss"] + 0.1
        lines.append(row)
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("x", ["step", "tokens"])
def test_several_runs_become_one_picture(tmp_path, x):
    pytest.importorskip("matplotlib")
    first, second = write_run(tmp_path / "a"), write_run(tmp_path / "b", offset=0.2)
    with open(first, "a") as file:
        file.write('{"step": 51, "lo')  # a run that was killed while it wrote
    out = tmp_path / "plot.png"
    result = run("plot_metrics.py", f"flora={first}", second.parent, "-o", out, "--x", x, "--smooth", 5)
    assert result.returncode == 0, result.stderr
    assert out.read_bytes().startswith(b"\x89PNG") and out.stat().st_size > 10_000


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "no such file"),
        ('{"options": {}}\n', "holds no step yet"),
        ('{"options": {}}\nnonsense\n{"step": 1, "loss": 2}\n', "not JSON"),
    ],
)
@pytest.mark.parametrize("script", [("plot_metrics.py",), ("export_metrics.py", "csv")])
def test_mistakes_end_with_one_line(tmp_path, script, content, message):
    pytest.importorskip("matplotlib")
    path = tmp_path / "metrics.jsonl"
    if content is not None:
        path.write_text(content)
    result = run(*script, path)
    assert result.returncode == 1
    assert message in result.stderr and str(path) in result.stderr and result.stderr.count("\n") == 1


def test_odd_lines_are_read_or_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"options": {"out": "a\u2028b\x85c\x1d"}}, {"step": 1, "loss": 10**400, "lr": "x"}, {"step": 2, "loss": 2.5}]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    run = read_metrics(str(path))
    assert run.options == rows[0] and run.rows == [{"step": 1}, {"step": 2, "loss": 2.5}]
    path.write_text("[" * 100_000 + '\n{"step": 1, "loss": 2}\n')
    with pytest.raises(MetricsError, match="metrics.jsonl:1: not JSON"):
        read_metrics(str(path))


def test_the_suffix_says_the_format_of_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    path = write_run(tmp_path / "a", steps=3)
    result = run("plot_metrics.py", path, "-o", tmp_path / "plot.xyz")
    assert result.returncode == 2 and "plot.xyz: no format for a picture is named '.xyz'" in result.stderr
    assert result.stderr.count("\n") == 1
    from matplotlib.figure import Figure

    assert [plot_metrics.picture_format(f"a.b/{name}", Figure()) for name in ("x.SVG", "plot")] == ["svg", "png"]


def test_a_missing_package_is_named(tmp_path):
    path = write_run(tmp_path / "a")
    script = str(SCRIPTS / "plot_metrics.py")
    code = f"""
import runpy, sys
sys.modules["matplotlib"] = None  # importing it fails
sys.argv = [{script!r}, {str(path)!r}]
sys.path.insert(0, {str(SCRIPTS)!r})
runpy.run_path({script!r}, run_name="__main__")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 1 and "matplotlib is not installed" in result.stderr
    assert "Traceback" not in result.stderr
