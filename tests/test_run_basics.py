"""test_run_basics.py: what a user does first: the default command, --help, a configuration file, seeds, samples."""
import json
import os
import re
from pathlib import Path

import pytest
from program import ROOT, TINY, losses, metrics, same_state, samples, start, steps_saved, succeed, tensors

METRIC_KEYS = {"step", "tokens", "loss", "lr", "grad_norm", "step_ms", "tokens_per_second", "mfu", "device_bytes"}


@pytest.mark.slow
def test_the_command_of_the_readme_works_in_an_empty_folder(data, tmp_path):
    text = succeed("--optimizer", "flora", "--rank", 256, "--steps", 2, cwd=tmp_path, timeout=300)
    for word in ("device", "model", "data", "memory", "output", "update      flora of rank 256, kappa 200", "step 1/2", "step 2/2",
                 "checkpoint: "):
        assert word in text, text
    assert "nothing is compressed" not in text
    # Only what was given or chosen for the device and the model: everything else is in metrics.jsonl.
    (settings,) = [line for line in text.splitlines() if line.startswith("settings ")]
    assert "dtype=fp32" in settings and "warmup_steps=1" in settings and "eps1" not in settings
    made = sorted(path.name for path in (tmp_path / "data").iterdir())
    assert "system_text_train_000000.bin" in made and "system_text_val_000000.bin" in made
    (run,) = (tmp_path / "runs").iterdir()
    assert steps_saved(run) == [2]
    assert {path.name for path in (run / "latest").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "optimizer.safetensors", "trainer_state.json",
        "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"}
    header, steps = metrics(run)
    assert header["options"]["rank"] == 256 and header["options"]["model"] == "small"
    assert header["version"].startswith("train_gpt2") and header["device"]
    assert [line["step"] for line in steps] == [1, 2]
    assert set(steps[0]) == METRIC_KEYS and set(steps[1]) == METRIC_KEYS | {"val_loss", "val_bits_per_byte"}
    assert 4 < steps[0]["loss"] < 7


def test_metrics_say_what_happened(train):
    run = train("a", "--eval-every", 5, "--eval-batches", 3, "--warmup-steps", 4, "--lr", 1e-3, "--final-lr", 0.5,
                "--tokens-per-step", 128)
    header, steps = metrics(run)
    assert None not in header["options"].values() and header["options"]["tokens_per_step"] == 128
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert [line["tokens"] for line in steps] == [128 * t for t in range(1, 13)]
    assert [line["step"] for line in steps if "val_loss" in line] == [5, 10, 12]
    rates = [line["lr"] for line in steps]
    assert rates[:4] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3], rel=1e-5) and rates[-1] == pytest.approx(5e-4)
    for line in steps:
        assert line["grad_norm"] > 0 and line["step_ms"] > 0 and line["device_bytes"] == steps[0]["device_bytes"]
        assert line["tokens_per_second"] == pytest.approx(128 / line["step_ms"] * 1e3)
        flops = 6 * header["parameters"] + 6 * 2 * 128 * 32  # per token: 6 N + 6 L C T
        assert line["mfu"] == pytest.approx(line["tokens_per_second"] * flops / 0.2e12)


@pytest.mark.parametrize("optimizer", ["flora", "adamw", "adafactor", "sgd"])
def test_every_optimizer_learns(train, optimizer):
    rank = ["--rank", 16] if optimizer == "flora" else []
    rate = 0.1 if optimizer == "sgd" else 2e-3
    values = losses(train(optimizer, "--optimizer", optimizer, *rank, "--lr", rate, steps=150))
    assert values[1] == pytest.approx(5.6, abs=0.6)  # log(257), untrained
    last = sum(values[t] for t in range(141, 151)) / 10
    assert last < values[1] - 1, last


def test_the_seed_decides_and_nothing_else(train):
    a, b, c = train("a", "--rank", 16), train("b", "--rank", 16), train("c", "--rank", 16, "--seed", 2)
    assert same_state(a, b) and losses(a) == losses(b)
    assert tensors(a / "latest") != tensors(c / "latest")


def test_evaluation_samples_and_logging_change_nothing(train):
    a = train("a", "--rank", 16)
    b = train("b", "--rank", 16, "--eval-every", 2, "--sample-every", 3, "--sample-tokens", 5, "--log-every", 7,
              "--checkpoint-every", 1)
    assert same_state(a, b) and losses(a) == losses(b)


def test_checkpoints_are_kept_as_asked(train):
    assert steps_saved(train("a", "--checkpoint-every", 3, "--keep-checkpoints", 2)) == [9, 12]
    assert steps_saved(train("b", "--checkpoint-every", 5, "--keep-checkpoints", 0)) == [5, 10, 12]
    assert steps_saved(train("c", "--checkpoint-every", 0)) == [12]


def test_help_shows_every_flag_with_its_group_and_unit(data):
    text = succeed("--help")
    source = (ROOT / "train" / "options.h").read_text()
    flags = re.findall(r'\bv\([\w.]+, "([\w-]+)", "([^"]*)"', source)
    groups = re.findall(r'v\.group\("(\w+)"\)', source)
    assert len(flags) > 60 and len(groups) == 7
    for flag, unit in flags:
        assert re.search(rf"--{flag}\b.*{re.escape(unit)}", text), f"--{flag} {unit}"
    for group in groups:
        assert f"{group}:" in text, group
    for word in ("plan", "generate", "eval", "--config", "--version"):
        assert word in text
    assert "\x1b" not in text and max(map(len, text.splitlines())) < 200
    assert succeed("--version").startswith("train_gpt2 ")


SUBCOMMAND_FLAGS = {
    "generate": (["model", "prompt", "sample-tokens", "temperature", "top-k", "top-p", "tokenizer", "seed"], ["rank", "lr", "out"]),
    "eval": (["model", "val-data", "seq-len", "eval-batches", "micro-batch", "device"], ["rank", "prompt", "steps"]),
    "plan": (["model", "memory-budget", "json", "recompute", "rank", "micro-batch"], ["resume", "prompt", "out"]),
}


@pytest.mark.parametrize("subcommand", SUBCOMMAND_FLAGS)
def test_help_of_a_subcommand_shows_its_flags(subcommand):
    shown, hidden = SUBCOMMAND_FLAGS[subcommand]
    for command in ([subcommand, "--help"], ["--help", subcommand]):
        flags = set(re.findall(r"^  --([\w-]+)", succeed(*command), re.MULTILINE))
        assert flags >= {*shown, "config"} and not flags & set(hidden)


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "config").glob("*.toml")))
def test_the_settings_by_name_train(data, tmp_path, name):
    succeed("--config", ROOT / f"config/{name}.toml", "--data", data / "text_train_*.bin", *TINY, "--steps", 2,
            *(["--rank", 16] if "flora" in name else []), "--out", tmp_path)
    options = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["options"]
    said = {  # flora-opt's defaults, and what the others are named after
        "flora_as_published": {"optimizer": "flora", "projection": "gaussian", "transfer": "reencode", "kappa": 1000,
                               "decay_rate": -0.8, "eps1": 1e-30, "eps2": 1e-3, "update_clip": 1, "weight_decay": 0,
                               "scale_parameter": True, "relative_step": False, "half_life": 0, "residual": False},
        "adafactor_int8": {"optimizer": "adafactor", "state_dtype": "int8", "beta1": 0.9, "embedding_momentum": False},
        "adafactor_no_momentum": {"optimizer": "adafactor", "beta1": 0, "half_life": 7_100_000},
    }[name]
    assert {key: options[key] for key in said} == pytest.approx(said)


@pytest.mark.parametrize("flags,residual,embedding_momentum,lr,matrix_lr_scale", [
    ([], True, False, 1 / 128, 0.1),
    (["--rank", 16, "--residual=false"], False, True, 0.5 / 128, 1),
    (["--rank", 16, "--projection", "gaussian"], False, True, 5e-4, 1),
    (["--matrix-lr-scale", 1, "--lr", 2e-3, "--embedding-momentum"], True, True, 2e-3, 1),
    (["--rank", 16, "--compress-embeddings"], True, True, 1 / 128, 0.1),
    (["--rank", 16, "--scale-parameter"], True, False, 0.5 / 128, 1),
    (["--optimizer", "adafactor"], False, True, 1 / 128, 0.1),
    (["--optimizer", "adafactor", "--scale-parameter"], False, True, 5e-4, 1),
    (["--optimizer", "adamw"], False, True, 6e-4, 1),
    (["--optimizer", "sgd"], False, True, 0.1, 1),
])
def test_what_an_update_rule_does_unless_told(data, tmp_path, flags, residual, embedding_momentum, lr, matrix_lr_scale):
    """docs/learning.md says where Flora's are from; tiny has 128 channels."""
    succeed("--data", data / "text_train_*.bin", *TINY, *flags, "--steps", 1, "--out", tmp_path)
    options = metrics(tmp_path)[0]["options"]
    assert (options["residual"], options["embedding_momentum"]) == (residual, embedding_momentum)
    assert (options["lr"], options["matrix_lr_scale"]) == pytest.approx((lr, matrix_lr_scale))


def test_a_configuration_file_sets_flags(data, tmp_path):
    (tmp_path / "run.toml").write_text(
        f'data = "{data}/text_train_*.bin"\nmodel = "tiny"\nseq-len = 32\nmicro-batch = 2\nlr = 3e-3\n'
        'optimizer = "adamw"\nsteps = 9\npeak-tflops = 0.2\nskip-nonfinite = true\n')
    succeed("--config", tmp_path / "run.toml", "--steps", 2, "--out", tmp_path / "run")
    options = metrics(tmp_path / "run")[0]["options"]
    assert options["lr"] == 3e-3 and options["optimizer"] == "adamw" and options["skip_nonfinite"] is True
    assert options["steps"] == 2  # the command line goes first
    assert options["seq_len"] == 32 and options["micro_batch"] == 2


def test_generate_continues_a_prompt(train):
    checkpoint = train("a", "--rank", 16, steps=30) / "latest"
    call = ["generate", "--model", checkpoint, "--prompt", "abc", "--threads", 1]
    text = succeed(*call, "--sample-tokens", 40)
    assert text.startswith("abc") and 4 < len(text) <= 3 + 4 * 40 + 1
    assert succeed(*call, "--sample-tokens", 40) == text
    assert succeed(*call, "--sample-tokens", 40, "--seed", 5) != text
    greedy = [succeed(*call, "--sample-tokens", 10, *flags) for flags in (["--temperature", 0], ["--top-k", 1], ["--top-p", 1e-6])]
    assert greedy[0] == greedy[1] == greedy[2]
    assert succeed(*call, "--sample-tokens", 40, "--top-p", 1) == text
    assert succeed(*call, "--sample-tokens", 40, "--top-p", 0.5) != text


def test_samples_are_printed_while_training(data, tmp_path):
    flags = ["--sample-every", 2, "--sample-tokens", 8, "--prompt", "hello"]
    text = succeed("--data", data / "text_train_*.bin", *TINY, "--steps", 5, *flags, "--out", tmp_path / "run")
    assert re.findall(r"^---- sample at step (\d+)\nhello", text, re.MULTILINE) == ["0", "2", "4", "5"]
    assert text.index("sample at step 0") < text.index("step 1/5")
    text = succeed("--resume", tmp_path / "run", "--steps", 6, *flags)
    assert re.findall(r"^---- sample at step (\d+)", text, re.MULTILINE) == ["6"]  # nothing before: it goes on
    assert list(samples(tmp_path / "run")) == [0, 2, 4, 5, 6]


def test_a_profile_names_the_operations(data, tmp_path):
    text = succeed("--data", data / "text_train_*.bin", *TINY, "--steps", 2, "--profile", "--out", tmp_path / "run")
    for operation in ("matmul", "attention_backward", "layernorm_backward"):
        assert operation in text


@pytest.mark.parametrize("given, expected", [
    ({}, {"GOMP_SPINCOUNT=1000", "GLIBC_TUNABLES=glibc.malloc.tcache_count=0"}),
    ({"OMP_WAIT_POLICY": "passive", "GLIBC_TUNABLES": "glibc.malloc.perturb=1"},
     {"OMP_WAIT_POLICY=passive", "GLIBC_TUNABLES=glibc.malloc.perturb=1:glibc.malloc.tcache_count=0"}),
    ({"GOMP_SPINCOUNT": "5", "GLIBC_TUNABLES": "glibc.malloc.tcache_count=2"},
     {"GOMP_SPINCOUNT=5", "GLIBC_TUNABLES=glibc.malloc.tcache_count=2"}),
])
def test_libraries_get_the_settings_that_the_user_has_not_made(data, tmp_path, given, expected):
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "GLIBC_TUNABLES")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    process = start("--data", data / "text_train_*.bin", *TINY, "--steps", 100000, "--eval-every", 0, "--out",
                    tmp_path / "run", until="step 1/", env={**environment, **given})
    text = Path(f"/proc/{process.pid}/environ").read_text()
    settings = text.replace("\0glibc.", ":glibc.").split("\0")  # glibc ends every value where it stands
    process.kill()
    process.communicate()
    assert {line for line in settings if line.startswith(names)} == expected


def device_line(data, out, **environment):
    flags = [part for part in TINY if part not in ("--threads", "1")]
    text = succeed("--data", data / "text_train_*.bin", *flags, "--device", "cpu", "--steps", 1, "--out", out,
                   env={**os.environ, **environment})
    return next(line for line in text.splitlines() if line.startswith("device "))


def test_the_number_of_threads_is_that_of_openmp_programs(data, tmp_path):
    for threads in (1, 3):
        assert f", {threads} thread" in device_line(data, tmp_path / str(threads), OMP_NUM_THREADS=str(threads))
