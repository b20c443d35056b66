"""test_run_interop.py: models go to and come from Hugging Face's transformers and llm.c, and mean the same there.

What is compared is the loss on the same windows: `eval` walks over a shard's windows of seq-len + 1 tokens in order.
"""
import json

import numpy as np
import pytest
from program import VOCABULARY, fail, language, succeed, validation_loss, with_defaults, write_shard

torch = pytest.importorskip("torch", "1.13.0a0", reason="PyTorch 1.13 or later is not installed (python3-torch)")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

SEQUENCE, BATCH, WINDOWS = 32, 2, 6
TOKENS = language(SEQUENCE * WINDOWS + 1, seed=5)


@pytest.fixture
def evaluate(data, tmp_path):
    """evaluate(model, *flags): the loss that ./train_gpt2 eval prints on TOKENS."""
    shard = write_shard(tmp_path / "windows.bin", TOKENS)

    def call(model, *flags):
        text = succeed("eval", "--model", model, "--val-data", shard, "--seq-len", SEQUENCE, "--micro-batch", BATCH,
                       "--threads", 1, *with_defaults(flags, ["--dtype", "fp32"]))
        loss, tokens = validation_loss(text)
        assert tokens == SEQUENCE * WINDOWS, text
        return loss

    return call


def windows():
    starts = range(0, SEQUENCE * WINDOWS, SEQUENCE)
    return torch.tensor(np.stack([TOKENS[s: s + SEQUENCE + 1] for s in starts]), dtype=torch.long)


def their_loss(model):
    with torch.no_grad():
        logits = model.float().eval()(windows()[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), windows()[:, 1:].reshape(-1)).item()


def random_model(tied=True, seed=3):
    """A GPT-2 of theirs with random parameters of every kind. The width of a head is 24, the vocabulary ours."""
    torch.manual_seed(seed)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=40, n_embd=72, n_layer=2, n_head=3, tie_word_embeddings=tied,
        attn_implementation="eager"))
    for name, parameter in model.named_parameters():
        scale = 1.0 if name.endswith("weight") and ".ln_" in name else 0.0
        parameter.data = scale + 0.1 * torch.randn_like(parameter)
    model.tie_weights()
    return model


@pytest.mark.parametrize("flags", [["--rank", 16], ["--optimizer", "adamw", "--dtype", "bf16"]])
def test_transformers_loads_our_checkpoint(train, evaluate, flags):
    checkpoint = train("run", *flags, "--lr", 2e-3, steps=40) / "latest"
    model, report = transformers.GPT2LMHeadModel.from_pretrained(checkpoint, output_loading_info=True,
                                                                 torch_dtype=torch.float32)
    assert not report["unexpected_keys"] and not report["mismatched_keys"]
    assert set(report["missing_keys"]) <= {"lm_head.weight"}
    assert model.config.vocab_size == VOCABULARY and model.lm_head.weight is model.transformer.wte.weight
    ours = evaluate(checkpoint, "--dtype", "fp32")
    assert ours == pytest.approx(their_loss(model), rel=1e-4)
    assert ours < 5


def test_a_model_of_theirs_saved_in_shards(evaluate, tmp_path):
    model = random_model()
    model.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 2
    assert evaluate(tmp_path / "model") == pytest.approx(their_loss(model), rel=1e-4)


@pytest.mark.parametrize("prefix", ["transformer.", ""])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_we_load_a_model_of_theirs(evaluate, tmp_path, dtype, prefix):
    model = random_model().to(dtype)
    model.config.to_json_file(tmp_path / "config.json")
    weights = {name.replace("transformer.", prefix, 1): tensor.contiguous() for name, tensor in
               model.state_dict().items() if name != "lm_head.weight"}
    if prefix:  # as in older files: buffers among the weights
        weights["transformer.h.0.attn.bias"] = torch.ones(1, 1, 40, 40)
    safetensors.save_file(weights, tmp_path / "model.safetensors")
    assert evaluate(tmp_path) == pytest.approx(their_loss(model), rel=1e-4)
    # The same in bf16 arithmetic is near, and is another number.
    assert evaluate(tmp_path, "--dtype", "bf16") == pytest.approx(their_loss(model), rel=1e-2)


def test_a_model_of_theirs_trains_here_and_goes_back(train, evaluate, tmp_path):
    model = random_model()
    model.save_pretrained(tmp_path / "model")
    before = evaluate(tmp_path / "model")
    checkpoint = train("run", "--model", tmp_path / "model", "--rank", 16, "--lr", 1e-2, steps=40) / "latest"
    after = evaluate(checkpoint)
    assert after < before - 0.5
    assert after == pytest.approx(their_loss(transformers.GPT2LMHeadModel.from_pretrained(checkpoint)), rel=1e-4)


def test_special_tokens_survive(train, tmp_path):
    model = random_model()
    model.config.bos_token_id, model.config.eos_token_id = 3, 9
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model/generation_config.json").write_text('{"eos_token_id": [9, 11], "repetition_penalty": 1.5}')
    checkpoint = train("run", "--model", tmp_path / "model", "--rank", 16, steps=1) / "latest"
    again = transformers.GPT2LMHeadModel.from_pretrained(checkpoint)
    assert (again.config.bos_token_id, again.config.eos_token_id) == (3, 9)
    assert again.generation_config.eos_token_id == [9, 11] and again.generation_config.repetition_penalty == 1.5


def test_the_tokenizer_goes_with_a_checkpoint(train, tmp_path):
    checkpoint = train("run", "--rank", 16, steps=1) / "latest"
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    text = "it's a caf\u00e9\n\n  \u65e5\u672c"
    assert tokenizer(text)["input_ids"] == list(text.encode()) and tokenizer.decode(list(text.encode())) == text
    assert tokenizer.eos_token_id == 256 == tokenizer("<|endoftext|>")["input_ids"][0]
    assert transformers.GenerationConfig.from_pretrained(checkpoint).eos_token_id == 256


@pytest.mark.parametrize("kind", ["vocab.json", "tokenizer.json"])
def test_prompts_use_a_tokenizer_of_theirs(train, tmp_path, kind):
    """A byte-level BPE of 290 tokens that their library learned; what it makes of a prompt decides the sample."""
    tokenizers = pytest.importorskip("tokenizers")
    learned = tokenizers.ByteLevelBPETokenizer()
    learned.train_from_iterator(["the thing in the inn, nothing else than that"] * 5, vocab_size=290, min_frequency=1,
                                special_tokens=["<|endoftext|>"], show_progress=False)
    model = tmp_path / "model"
    config = transformers.GPT2Config(vocab_size=290, n_positions=40, n_embd=72, n_layer=2, n_head=3)
    torch.manual_seed(1)
    transformers.GPT2LMHeadModel(config).save_pretrained(model)
    if kind == "vocab.json":
        learned.save_model(str(model))
    else:
        learned.save(str(model / "tokenizer.json"))
    text = succeed("generate", "--model", model, "--prompt", "the thing in", "--sample-tokens", 6, "--temperature", 0,
                   "--threads", 1)
    theirs, ids = transformers.GPT2LMHeadModel.from_pretrained(model).eval(), learned.encode("the thing in").ids
    with torch.no_grad():
        for _ in range(6):
            ids.append(theirs(torch.tensor([ids])).logits[0, -1].argmax().item())
    assert 0 not in ids and text.rstrip("\n") == learned.decode(ids).rstrip("\n")
    shard = write_shard(tmp_path / "t_train_0.bin", np.arange(200) % 290, vocabulary=290)
    checkpoint = train("run", "--model", model, "--data", shard, "--rank", 16, steps=1) / "latest"
    assert (checkpoint / kind).read_bytes() == (model / kind).read_bytes()


def test_an_untied_head(train, evaluate, tmp_path):
    model = random_model(tied=False)
    model.save_pretrained(tmp_path / "model")
    assert json.loads((tmp_path / "model/config.json").read_text())["tie_word_embeddings"] is False
    assert evaluate(tmp_path / "model") == pytest.approx(their_loss(model), rel=1e-4)
    checkpoint = train("run", "--model", tmp_path / "model", "--rank", 16, steps=5) / "latest"
    trained = transformers.GPT2LMHeadModel.from_pretrained(checkpoint)
    assert evaluate(checkpoint) == pytest.approx(their_loss(trained), rel=1e-4)
    weights = safetensors.load_file(checkpoint / "model.safetensors")
    assert not torch.equal(weights["lm_head.weight"], weights["transformer.wte.weight"])


def test_weights_that_do_not_fit_the_configuration(data, tmp_path):
    model = random_model()
    model.save_pretrained(tmp_path)
    shard = write_shard(tmp_path / "windows.bin", TOKENS)
    weights = {name: t.clone() for name, t in safetensors.load_file(tmp_path / "model.safetensors").items()}
    call = ["eval", "--model", tmp_path, "--val-data", shard, "--seq-len", SEQUENCE, "--micro-batch", BATCH]

    missing = {name: t for name, t in weights.items() if "h.1.mlp.c_fc.weight" not in name}
    safetensors.save_file(missing, tmp_path / "model.safetensors")
    assert "h.1.mlp.c_fc.weight" in fail(*call, code=1)

    wrong = {name: t.T.contiguous() if "h.1.mlp.c_fc.weight" in name else t for name, t in weights.items()}
    safetensors.save_file(wrong, tmp_path / "model.safetensors")
    line = fail(*call, code=1)
    assert "h.1.mlp.c_fc.weight" in line and "288 x 72" in line and "72 x 288" in line

    integers = {name: t.int() if "ln_f.bias" in name else t for name, t in weights.items()}
    safetensors.save_file(integers, tmp_path / "model.safetensors")
    assert "I32" in fail(*call, code=1)

    safetensors.save_file(weights, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    for cut in (0, 7, 100, len(whole) - 4):
        (tmp_path / "model.safetensors").write_bytes(whole[:cut])
        assert "model.safetensors" in fail(*call, code=1)


def llmc_file(path, model, version):
    """The model as llm.c's train_gpt2.py writes it: one tensor per role, layers stacked, linear weights [out, in]."""
    config, weights = model.config, model.transformer.state_dict()
    padded = (config.vocab_size + 127) // 128 * 128
    header = np.zeros(256, np.int32)
    header[:8] = (20240326, version, config.n_positions, config.vocab_size, config.n_layer, config.n_head,
                  config.n_embd, padded)
    wte = torch.cat([weights["wte.weight"], torch.full((padded - config.vocab_size, config.n_embd), 9.0)])
    tensors = [wte, weights["wpe.weight"]]
    for role in ("ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight",
                 "attn.c_proj.bias", "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias",
                 "mlp.c_proj.weight", "mlp.c_proj.bias"):
        for layer in range(config.n_layer):
            tensor = weights[f"h.{layer}.{role}"]
            tensors.append(tensor.T if tensor.dim() == 2 else tensor)
    tensors += [weights["ln_f.weight"], weights["ln_f.bias"]]
    with open(path, "wb") as file:
        file.write(header.tobytes())
        for tensor in tensors:
            tensor = tensor.detach().contiguous()
            file.write(tensor.numpy().tobytes() if version == 3 else
                       tensor.to(torch.bfloat16).view(torch.int16).numpy().tobytes())
    return path


@pytest.mark.parametrize("version", [3, 5])
def test_a_model_of_llmc(evaluate, tmp_path, version):
    model = random_model()
    if version == 5:
        model = model.to(torch.bfloat16).float()
    path = llmc_file(tmp_path / "gpt2.bin", model, version)
    model.save_pretrained(tmp_path / "model")
    assert evaluate(path) == evaluate(tmp_path / "model") == pytest.approx(their_loss(model), rel=1e-4)
    path.write_bytes(path.read_bytes()[:-2])
    assert "truncated" in fail("eval", "--model", path, "--val-data", tmp_path / "windows.bin", "--seq-len", SEQUENCE,
                               code=1)


def test_eval_batches_limits_the_evaluation(data, tmp_path, evaluate):
    random_model().save_pretrained(tmp_path / "model")
    text = succeed("eval", "--model", tmp_path / "model", "--val-data", tmp_path / "windows.bin", "--seq-len", SEQUENCE,
                   "--micro-batch", BATCH, "--eval-batches", 1)
    assert validation_loss(text)[1] == SEQUENCE * BATCH
