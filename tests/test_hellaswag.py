"""test_hellaswag.py: data/hellaswag.py as a user runs it: the file that it writes, word by word, from what it is given."""
import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

np = pytest.importorskip("numpy")

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = [
    {"ind": 24, "activity_label": "Roofing", "ctx_a": "A man.", "ctx_b": "he", "ctx": "A man. he", "label": 3,
     "endings": ["a", "bc", "caf\u00e9", "[title] d"], "split": "val"},
    {"ind": 7, "ctx": "x", "label": "0", "endings": ["1", "2", "3", "4"]},  # Hugging Face has the label as text
]


def run(*arguments):
    command = [sys.executable, str(ROOT / "data/hellaswag.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def fails(code, *arguments):
    result = run(*arguments)
    assert result.returncode == code, (result.returncode, result.stderr)
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("hellaswag.py: "), result.stderr
    return result.stderr


def lines(examples):
    return "".join(json.dumps(example) + "\n" for example in examples).encode()


def expected_words():
    """llm.c's layout by hand, in bytes."""
    words = []
    for index, (context, endings, right) in enumerate((("A man. he", [" a", " bc", " caf\u00e9", " [title] d"], 3),
                                                       ("x", [" 1", " 2", " 3", " 4"], 0))):
        body = [index, right, 4]
        for text in (context, *endings):
            body += [len(text.encode()), *text.encode()]
        words += [65535, 2 * (len(body) + 2), *body]
    return words


@pytest.mark.parametrize("name", ["questions.jsonl", "questions.jsonl.gz"])
def test_the_file_is_llm_cs(tmp_path, name):
    content = lines(EXAMPLES)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    result = run("--input", tmp_path / name, "--out", tmp_path / "out", "--tokenizer", "bytes")
    assert result.returncode == 0, result.stderr
    file = tmp_path / "out/hellaswag_val.bin"
    assert result.stderr == f"{file}: 2 questions (bytes); ./train_gpt2 eval --model DIR --hellaswag {file}\n"
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    header = np.fromfile(file, np.int32, 256)
    words = np.fromfile(file, np.uint16, offset=1024)
    assert words.tolist() == expected_words()
    longest = max(words[1], words[words[1] // 2 + 1])
    assert header.tolist() == [20240522, 1, 2, longest, 257, *[0] * 251]


def test_gpt2_tokens(tmp_path):
    tiktoken = pytest.importorskip("tiktoken")
    vocabulary = ROOT.parent / "shared/data/gpt2"
    if not (vocabulary / "encoder.json").exists():
        pytest.skip("GPT-2's vocabulary is not here")
    (tmp_path / "a.jsonl").write_bytes(lines(EXAMPLES))
    result = run("--input", tmp_path / "a.jsonl", "--out", tmp_path, "--vocab-dir", vocabulary)
    assert result.returncode == 0 and "(gpt2)" in result.stderr, result.stderr
    assert tiktoken
    assert np.fromfile(tmp_path / "hellaswag_val.bin", np.int32, 5)[4] == 50257
    words = np.fromfile(tmp_path / "hellaswag_val.bin", np.uint16, offset=1024).tolist()
    assert words[5:9] == [4, 32, 582, 13]  # "A", " man", "." and " he"


def test_it_is_downloaded_once(tmp_path):
    (tmp_path / "source.jsonl").write_bytes(lines(EXAMPLES))
    flags = ["--url", (tmp_path / "source.jsonl").as_uri(), "--out", tmp_path / "out", "--tokenizer", "bytes"]
    assert run(*flags).returncode == 0
    assert (tmp_path / "out/hellaswag_val.jsonl").read_bytes() == lines(EXAMPLES)
    (tmp_path / "source.jsonl").unlink()
    (tmp_path / "out/hellaswag_val.bin").unlink()
    assert run(*flags).returncode == 0 and (tmp_path / "out/hellaswag_val.bin").exists()


@pytest.mark.parametrize("content, message", [
    (b"", "holds no question"),
    (b"\n\n", "holds no question"),
    (lines(EXAMPLES) + b'{"ctx": "a"', ":3: not a question of HellaSwag"),
    (b"\xff\xfe\n", ":1: not a question of HellaSwag"),
    (b"[" * 100_000, ":1: not a question of HellaSwag"),
    (lines([{**EXAMPLES[0], "label": 4}]), ":1: not a question of HellaSwag"),
    (lines([{**EXAMPLES[0], "label": None}]), "the test set's answers are not public"),
    (lines([{**EXAMPLES[0], "endings": ["a", "", "b", "c"]}]), ":1: not a question of HellaSwag"),
    (lines([{**EXAMPLES[0], "endings": ["a"], "label": 0}]), ":1: not a question of HellaSwag"),
    (lines([{**EXAMPLES[0], "ctx": "a" * 40_000}]), "question 0 has 40,0"),
])
def test_bad_input_is_one_line_and_leaves_no_file(tmp_path, content, message):
    path = tmp_path / "in.jsonl"
    path.write_bytes(content)
    line = fails(1, "--input", path, "--out", tmp_path / "out", "--tokenizer", "bytes")
    assert message in line
    assert not list((tmp_path / "out").iterdir())


def test_wrong_calls(tmp_path):
    assert "no such file" in fails(2, "--input", tmp_path / "none", "--out", tmp_path, "--tokenizer", "bytes")
    assert "not a regular file" in fails(1, "--input", tmp_path, "--out", tmp_path, "--tokenizer", "bytes")
    assert "uses none; drop one" in fails(2, "--tokenizer", "bytes", "--vocab-dir", tmp_path)
    absent = (tmp_path / "absent").as_uri()
    assert "cannot be reached" in fails(1, "--url", absent, "--out", tmp_path, "--tokenizer", "bytes")
