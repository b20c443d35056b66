"""test_run_selftest.py: ./train_gpt2 selftest on the CPU; the GPU's is in test_run_cuda.py."""
from program import call, fail, succeed

SMALL = ["--device", "cpu", "--model", "tiny", "--seq-len", 33, "--micro-batch", 2, "--threads", 1]


def test_the_cpu_computes_what_it_should():
    lines = succeed("selftest", *SMALL).splitlines()
    assert lines[0].startswith("device      ")
    rows = lines[2:-1]
    assert len(rows) > 300 and all(row.endswith("  ok") for row in rows)
    assert lines[-1].startswith(f"{len(rows)} checks, 0 wrong")
    operations = {row.split()[0] for row in rows}
    assert {"matmul", "attention_forward", "attention_backward", "layernorm_backward", "classifier", "adamw_update",
            "generate_projection", "embedding_backward", "gelu_backward", "bias_backward"} <= operations
    assert {"cosine_down", "cosine_up"} <= operations
    assert any("[2,33,128] fp32 2 heads" in row for row in rows)  # the model's shapes
    assert any("bf16" in row for row in rows)


def test_help_and_mistakes():
    text = succeed("selftest", "--help")
    assert "--model" in text and "--device" in text and "--steps" not in text
    assert "selftest" in succeed("--help")
    fail("selftest", *SMALL, "--micro-batch", 0, code=2)
    result = call("selftest", "plan")
    assert result.returncode == 2 and "one subcommand too many" in result.stderr
