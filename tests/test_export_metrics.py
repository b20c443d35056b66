"""test_export_metrics.py: the export script, run as a user runs it. Event files are read back here byte by byte (records
with CRC-32C around protocol buffers), not by the library that wrote them; the services are stand-ins that write down
what they are given.
"""
import csv
import json
import math
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = {"optimizer": "flora", "lr": 1e-3, "data": "a|b*.bin"}


def run(*arguments, **environment):
    command = [sys.executable, str(ROOT / "scripts/export_metrics.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **environment})


def succeed(*arguments, **environment):
    result = run(*arguments, **environment)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    return result.stdout


def fails(code, *arguments, **environment):
    result = run(*arguments, **environment)
    assert result.returncode == code, (result.returncode, result.stderr)
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("export_metrics: "), result.stderr
    return result.stderr


# What a run of four steps leaves that was resumed by an earlier version, which wrote step 2 twice, and then killed.
LINES = [
    {"options": OPTIONS, "version": "1.0", "device": "cpu"},
    {"step": 1, "tokens": 64, "loss": 3.5, "lr": 1e-4, "step_ms": 2000.0},
    {"step": 2, "tokens": 128, "loss": 9.0, "lr": 2e-4, "step_ms": 1000.0},
    {"step": 2, "tokens": 128, "loss": 3.25, "lr": 2e-4, "step_ms": 1000.0, "val_loss": 3.375, "val_bits_per_byte": 4.5},
    {"step": 2, "sample": "It was\n*the* caf\u00e9 | \u2028"},
    {"step": 3, "tokens": 192, "loss": None, "lr": 3e-4, "step_ms": 500.0, "grad_norm": None},
    {"step": 4, "tokens": 256, "loss": 3.0, "lr": 4e-4, "step_ms": 500.0},
]
EXPECTED = {  # tag: {step: value}
    "tokens": {1: 64, 2: 128, 3: 192, 4: 256}, "loss": {1: 3.5, 2: 3.25, 3: math.nan, 4: 3.0},
    "lr": {1: 1e-4, 2: 2e-4, 3: 3e-4, 4: 4e-4}, "step_ms": {1: 2000, 2: 1000, 3: 500, 4: 500},
    "val_loss": {2: 3.375}, "val_bits_per_byte": {2: 4.5}, "grad_norm": {3: math.nan}}


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "a"
    path.mkdir()
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES) + '{"step": 5, "lo')
    os.utime(path / "metrics.jsonl", (1_700_000_000, 1_700_000_000))
    return path


# ---- TensorBoard


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked_crc(data):
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def records(content):
    """The payloads of a TFRecord file, every checksum verified."""
    assert crc32c(b"123456789") == 0xE3069283  # the known answer
    at = 0
    while at < len(content):
        (length,), (crc,) = struct.unpack_from("<Q", content, at), struct.unpack_from("<I", content, at + 8)
        assert crc == masked_crc(content[at : at + 8])
        data = content[at + 12 : at + 12 + length]
        assert len(data) == length and struct.unpack_from("<I", content, at + 12 + length)[0] == masked_crc(data)
        yield data
        at += 16 + length


def fields(message):
    """{number: [values]} of a protocol buffer: integers, or bytes of what is not one."""
    found, at = {}, 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        key = varint()
        kind = key & 7
        value = varint() if kind == 0 else None
        size = {0: 0, 1: 8, 5: 4}.get(kind)
        size = varint() if size is None else size
        found.setdefault(key >> 3, []).append(message[at : at + size] if value is None else value)
        at += size
    return found


def read_events(folder):
    """({tag: {step: value}}, {tag: {step: text}}, {step: time}) of the only event file in a folder."""
    (path,) = folder.iterdir()
    assert path.name.startswith("events.out.tfevents.")
    events = [fields(data) for data in records(path.read_bytes())]
    assert events[0][3] == [b"brain.Event:2"]
    scalars, texts, times = {}, {}, {}
    for event in events[1:]:
        step, (time,) = event.get(2, [0])[0], struct.unpack("<d", event[1][0])
        for value in fields(event.get(5, [b""])[0]).get(1, []):
            value = fields(value)
            tag = value[1][0].decode()
            if 2 in value:
                assert step not in scalars.setdefault(tag, {})
                scalars[tag][step], times[step] = struct.unpack("<f", value[2][0])[0], time
            else:
                assert fields(fields(value[9][0])[1][0])[1] == [b"text"]  # the plugin that shows it
                texts.setdefault(tag.removesuffix("/text_summary"), {})[step] = fields(value[8][0])[8][0].decode()
    return scalars, texts, times


def same(found, expected):
    assert found.keys() == expected.keys()
    for tag, values in expected.items():
        assert found[tag] == pytest.approx(values, rel=1e-6, nan_ok=True), tag


def test_tensorboard(folder, tmp_path):
    pytest.importorskip("tensorboardX")
    out = tmp_path / "logs"
    assert succeed("tensorboard", folder, "--out", out) == f"wrote {out}/a: 4 steps\n"
    scalars, texts, times = read_events(out / "a")
    same(scalars, EXPECTED)
    assert texts["sample"] == {2: "    It was\n    *the* caf\u00e9 | \u2028\n"}
    table = texts["configuration"][0]
    assert table.startswith("| option | value |\n| --- | --- |\n") and '| optimizer | "flora" |\n' in table
    assert r'| data | "a\|b*.bin" |' in table and '| version | "1.0" |' in table
    # The time spent in steps, the last one at the time of the file.
    assert [times[step] - 1_700_000_000 for step in (1, 2, 3, 4)] == pytest.approx([-2, -1, -0.5, 0])


def test_a_run_that_went_on_replaces_its_events(folder, tmp_path):
    pytest.importorskip("tensorboardX")
    succeed("tensorboard", folder, "--out", tmp_path / "logs")
    metrics = (folder / "metrics.jsonl").read_text().rsplit("\n", 1)[0]
    (folder / "metrics.jsonl").write_text(metrics + '\n{"step": 5, "loss": 2.5}\n')
    succeed("tensorboard", folder, "--out", tmp_path / "logs")
    assert read_events(tmp_path / "logs/a")[0]["loss"] == pytest.approx({**EXPECTED["loss"], 5: 2.5}, nan_ok=True)


def test_other_files_beside_the_events_stay(folder, tmp_path):
    pytest.importorskip("tensorboardX")
    other = tmp_path / "logs/a/events.out.tfevents.1.host"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"another program's")
    for _ in range(2):
        succeed("tensorboard", folder, "--out", tmp_path / "logs")
    assert other.read_bytes() == b"another program's" and len(list(other.parent.iterdir())) == 2


# ---- files


def test_several_runs_at_once_as_csv(folder, tmp_path):
    out = tmp_path / "out"
    assert succeed("csv", f"first={folder}", f"second={folder}/metrics.jsonl", "--out", out) == (
        f"wrote {out}/first.csv: 4 steps\nwrote {out}/second.csv: 4 steps\n")
    with open(out / "first.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["step", "tokens", "loss", "lr", "step_ms", "val_loss", "val_bits_per_byte", "grad_norm"]
    found = {}
    for row in rows:
        for key, text in row.items():
            if key != "step" and text != "":
                found.setdefault(key, {})[int(row["step"])] = float(text)
    same(found, EXPECTED)
    assert (out / "second.csv").read_bytes() == (out / "first.csv").read_bytes()


def test_json(folder, tmp_path):
    succeed("json", folder, "--out", tmp_path)
    whole = json.loads((tmp_path / "a.json").read_text(), parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))
    assert whole["name"] == "a" and whole["config"] == {"version": "1.0", "device": "cpu", **OPTIONS}
    assert whole["samples"] == [{"step": 2, "sample": LINES[4]["sample"]}]
    assert [row["step"] for row in whole["history"]] == [1, 2, 3, 4]
    assert whole["history"][1] == LINES[3] and whole["history"][2] == LINES[5]


# ---- services

STAND_IN = """
import json
def init(**settings):
    return Run(settings)
class Run:
    def __init__(self, settings):
        self.calls = [["init", settings]]
    def log(self, values, step):
        self.calls.append(["log", step, values])
    def finish(self):
        with open("calls.jsonl", "a") as file:
            file.write(json.dumps(self.calls) + "\\n")
"""


@pytest.mark.parametrize("service, flags, settings", [("wandb", [], {}), ("wandb", ["--offline"], {"mode": "offline"}),
                                                      ("trackio", [], {})])
def test_services_get_everything(folder, tmp_path, service, flags, settings):
    (tmp_path / "modules").mkdir()
    (tmp_path / f"modules/{service}.py").write_text(STAND_IN.replace("calls.jsonl", str(tmp_path / "calls.jsonl")))
    succeed(service, folder, f"b={folder}", "--project", "p", *flags, PYTHONPATH=str(tmp_path / "modules"))
    calls = [json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]
    assert [call[0][1]["name"] for call in calls] == ["a", "b"]
    for (_, given), *logs in calls:
        assert given == {"project": "p", "name": given["name"], "config": {"version": "1.0", "device": "cpu", **OPTIONS},
                         **settings}
        assert [step for _, step, _ in logs] == [1, 2, 3, 4]
        assert logs[1][2].pop("sample") == LINES[4]["sample"]
        found = {}
        for _, step, values in logs:
            for key, value in values.items():
                found.setdefault(key, {})[step] = value
        same(found, EXPECTED)


# ---- mistakes


@pytest.mark.parametrize("target", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_is_named(folder, tmp_path, target):
    name = "tensorboardX" if target == "tensorboard" else target
    (tmp_path / f"{name}.py").write_text("raise ImportError")
    line = fails(1, target, folder, PYTHONPATH=str(tmp_path))
    assert f"{name} is not installed; install it: .venv/bin/pip install {name}" in line


def test_wrong_calls(folder, tmp_path):
    assert "two runs are called 'a'" in fails(2, "csv", folder, folder, "--out", tmp_path / "out")
    assert "'x/y' cannot name a file" in fails(2, "csv", f"x/y={folder}", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert "cannot be written" in fails(1, "json", folder, "--out", folder / "metrics.jsonl/x")
    (tmp_path / "a.json").mkdir()
    assert "a.json: cannot be written" in fails(1, "json", folder, "--out", tmp_path)
    assert "no such file" in fails(1, "json", tmp_path / "none")


def test_a_real_run_with_samples(data, tmp_path):
    pytest.importorskip("tensorboardX")
    import program

    text = program.succeed("--data", data / "text_train_*.bin", *program.TINY, "--steps", 4, "--sample-every", 2,
                           "--sample-tokens", 8, "--prompt", "hello", "--eval-every", 2, "--eval-batches", 1, "--out",
                           tmp_path / "run")
    samples = program.samples(tmp_path / "run")
    assert list(samples) == [0, 2, 4] and all(f"\n{sample}\n----" in text for sample in samples.values())
    assert all(sample.startswith("hello") for sample in samples.values())
    succeed("tensorboard", tmp_path / "run", "--out", tmp_path / "logs")
    scalars, texts, _ = read_events(tmp_path / "logs/run")
    assert list(scalars["loss"]) == [1, 2, 3, 4] and list(scalars["val_bits_per_byte"]) == [2, 4]
    assert list(texts["sample"]) == [0, 2, 4] and "| steps | 4 |" in texts["configuration"][0]
