"""test_run_equalities.py: settings that must not change the numbers do not change a bit of the final weights."""
import json

import pytest
from program import losses, same_state, tensors

OPTIMIZERS = {
    "flora": ["--optimizer", "flora", "--rank", 16],
    "adamw": ["--optimizer", "adamw"],
    "adafactor": ["--optimizer", "adafactor"],
    "sgd": ["--optimizer", "sgd", "--beta1", 0.9],
}
DTYPES = {
    "fp32": [],
    "bf16": ["--dtype", "bf16"],
    "int8": ["--state-dtype", "int8"],
    "master": ["--dtype", "bf16", "--master-weights", "fp32"],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_fused_is_dense(train, optimizer, dtype):
    flags = [*OPTIMIZERS[optimizer], *DTYPES[dtype], "--clip-norm", 0]
    dense = train("dense", *flags, "--gradients", "dense")
    fused = train("fused", *flags, "--gradients", "fused")
    assert same_state(dense, fused) and losses(dense) == losses(fused)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_recompute_levels_agree(train, optimizer, dtype):
    flags = [*OPTIMIZERS[optimizer], *DTYPES[dtype], "--gradients", "fused", "--tokens-per-step", 128]
    reference = train("none", *flags, steps=6)
    for level in ("gelu", "norms+gelu", "attention", "block"):
        assert same_state(reference, train(level, *flags, "--recompute", level, steps=6)), level


@pytest.mark.parametrize("optimizer", ["flora", "adamw"])
def test_several_micro_batches_fused_is_dense(train, optimizer):
    flags = [*OPTIMIZERS[optimizer], "--tokens-per-step", 192, "--clip-norm", 0]
    dense = train("dense", *flags, "--gradients", "dense")
    assert same_state(dense, train("fused", *flags, "--gradients", "fused"))


def close(run_a, run_b, tolerance):
    a, b = losses(run_a), losses(run_b)
    return all(abs(a[t] - b[t]) <= tolerance * a[t] for t in a)


def test_clipping_by_a_second_pass_is_that_of_kept_gradients(train):
    """Both clip by the exact global norm, summed in another order."""
    flags = ["--optimizer", "sgd", "--lr", 0.5, "--clip-norm", 0.5, "--tokens-per-step", 128, "--dtype", "fp32"]
    dense = train("dense", *flags, "--gradients", "dense")
    fused = train("fused", *flags, "--gradients", "fused")
    assert close(dense, fused, 1e-4)
    assert not close(dense, train("unclipped", *flags[:4], "--clip-norm", 0, *flags[6:], "--gradients", "dense"), 1e-4)


def test_micro_batches_are_only_a_matter_of_rounding(train):
    flags = ["--optimizer", "adamw", "--tokens-per-step", 256]
    small, large = train("small", *flags), train("large", *flags, "--micro-batch", 8)
    assert close(small, large, 1e-4) and tensors(small / "latest") != tensors(large / "latest")


def test_chunks_of_the_head_are_only_a_matter_of_rounding(train):
    assert close(train("whole", "--rank", 16), train("parts", "--rank", 16, "--head-chunk", 7), 1e-4)


@pytest.mark.parametrize("optimizer", ["flora", "adafactor"])
def test_accumulation_at_nearly_full_rank_loses_little(train, optimizer):
    """A projection to 120 of 128 dimensions drops a small part of the gradient, at random."""
    flags = [*OPTIMIZERS[optimizer], "--tokens-per-step", 128, "--lr", 2e-3]
    exact = ["--projection", "cosine"] if optimizer == "flora" else []
    plain = losses(train("plain", *flags, *exact, "--gradients", "fused", steps=30))
    nearly, half = (losses(train(rank, *flags, "--projection", "cosine", "--gradients", "compressed",
                                 "--accumulation-rank", rank, steps=30)) for rank in ("120", "40"))
    assert nearly[30] == pytest.approx(plain[30], rel=0.04)
    assert half[30] > nearly[30] + 0.05


def test_bf16_learns_like_fp32(train):
    single, half = (train(dtype, "--rank", 16, "--lr", 2e-3, "--dtype", dtype, steps=100) for dtype in ("fp32", "bf16"))
    assert losses(half)[100] == pytest.approx(losses(single)[100], rel=0.1)
    assert len(tensors(half / "latest")) < 0.6 * len(tensors(single / "latest"))


@pytest.mark.parametrize("shape", [(128, 1, 2, 5000), (64, 2, 4, 257), (128, 1, 2, 40000)])
@pytest.mark.parametrize("optimizer", ["flora", "adamw"])
def test_an_untied_head_fused_is_dense(train, tmp_path, optimizer, shape):
    """The head's own weight is updated while most activations are alive; the losses show whether memory is shared."""
    channels, layers, heads, vocabulary = shape
    config = tmp_path / "untied.json"
    config.write_text(json.dumps({"vocab_size": vocabulary, "n_positions": 64, "n_embd": channels, "n_layer": layers,
                                  "n_head": heads, "tie_word_embeddings": False}))
    flags = [*OPTIMIZERS[optimizer], "--model", config, "--clip-norm", 0]
    dense = train("dense", *flags, "--gradients", "dense", steps=3)
    fused = train("fused", *flags, "--gradients", "fused", steps=3)
    assert same_state(dense, fused) and losses(dense) == losses(fused)
