"""sizes.py: everything that differs between a real report and a dry run, and the aims that a report is read against.

A dry run is the same report at toy size: the CUDA backend compiled for the CPU (tests/cuda_on_cpu) in the place of the
GPU, models of milliseconds, PyTorch on the CPU.
"""
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Model:
    """A model whose training step is measured. `rate`: tokens per second to expect at least, for the estimates of what
    still fits into the time; peers get the same."""
    name: str
    preset: str
    layers: int
    channels: int
    heads: int
    seq_len: int
    rate: float
    adamw: bool = True  # AdamW fits, and with it the peers, which have nothing else
    profile: tuple = ()  # configurations of a step whose kernels are timed one by one


@dataclass(frozen=True)
class Sizes:
    program: str  # relative to the repository's root
    device: str  # of peers in PyTorch
    kernels: tuple  # bench/kernels and its flags
    torch_kernels: tuple
    kernel_seconds: int  # after which bench/kernels starts no further operation
    tests: tuple  # flags of tests/run.py
    sanitizer: tuple
    common: tuple  # flags of every training run
    vocabulary: int
    shard_tokens: int
    rank: int
    start_seconds: float  # what a run takes before its first step, at most
    peer_start_seconds: float  # the same of PyTorch, torch.compile included
    # right
    right_model: tuple
    right_batch: tuple
    right_loss_batch: tuple  # small: the CPU takes part
    right_rank: int
    right_dtypes: tuple
    right_steps: int
    loss_steps: int
    loss_tolerance: float
    # steps; a pair is (steps not counted, steps counted)
    models: tuple
    micro_tokens: int
    large_tokens: int
    micro_steps: tuple
    large_steps: tuple
    profile_steps: int
    # memory
    memory_models: tuple
    memory_batch: tuple
    search_channels: tuple  # smallest and largest number of heads; a head is head_channels wide
    head_channels: int
    search_memory: int  # bytes of the device; 0: what it says itself
    search_environment: dict = field(default_factory=dict)
    # techniques (part memory) and part streaming, of one model; pairs of steps as above
    streaming_model: tuple = ()  # without the micro-batch
    streaming_start_seconds: float = 0  # as start_seconds
    technique_steps: tuple = (0, 0)
    overlap_micro_batches: tuple = ()
    overlap_steps: tuple = (0, 0)
    budgets: tuple = ()
    budget_flags: tuple = ()
    budget_steps: tuple = (0, 0)
    # learning
    learning_model: tuple = ()
    learning_tokens: int = 0  # per step
    learning_probe_steps: int = 0
    learning_longest_steps: int = 0  # 0: what the time allows


_GPT2 = {
    "124M": Model("124M", "d12", 12, 768, 12, 1024, 250e3, profile=("adamw", "flora")),
    "355M": Model("355M", "d24", 24, 1024, 16, 1024, 90e3),
    "774M": Model("774M", "d36", 36, 1280, 20, 1024, 45e3),
    "1558M": Model("1558M", "d48", 48, 1600, 25, 1024, 25e3, profile=("flora",)),
}

REAL = Sizes(
    program="train_gpt2", device="cuda",
    kernels=("build/bench/kernels", "--device", "cuda", "--models", "124M,1558M"),
    torch_kernels=("--device", "cuda"), kernel_seconds=320,
    tests=("--suite", "gpu"), sanitizer=("--suite", "gpu", "--compute-sanitizer", "--fast"),
    common=(), vocabulary=50257, shard_tokens=2_000_000, rank=256, start_seconds=12, peer_start_seconds=90,
    right_model=("--model", "small"), right_batch=("--seq-len", "256", "--micro-batch", "4"),
    right_loss_batch=("--seq-len", "128", "--micro-batch", "2"), right_rank=64,
    right_dtypes=("bf16", "fp32"), right_steps=8, loss_steps=20, loss_tolerance=1e-4,
    models=(*_GPT2.values(), Model("6.7B", "gpt3:c4096", 32, 4096, 32, 2048, 5e3, adamw=False)),
    micro_tokens=16384, large_tokens=524288, micro_steps=(3, 10), large_steps=(1, 2), profile_steps=20,
    memory_models=tuple(_GPT2.values()), memory_batch=("--micro-batch", "4", "--seq-len", "1024"),
    search_channels=(24, 128), head_channels=128, search_memory=0,
    streaming_model=("--model", "gpt3:c4096", "--seq-len", "1024"), streaming_start_seconds=20, technique_steps=(2, 2),
    overlap_micro_batches=(1, 4, 16), overlap_steps=(2, 3),
    budgets=("8GiB", "16GiB", "24GiB"), budget_steps=(1, 3),
    learning_model=("--model", "d12", "--micro-batch", "32", "--seq-len", "1024"), learning_tokens=131072,
    learning_probe_steps=8,
)

_TOY = ("--seq-len", "16", "--micro-batch", "2")

DRY = Sizes(
    program="build/cuda_on_cpu/train_gpt2", device="cpu",
    kernels=("build/cuda_on_cpu/bench_kernels", "--device", "cuda", "--models", "toy",
             "--seconds-per-operation", "0"),
    torch_kernels=("--device", "cpu", "--toy", "--seconds-per-operation", "0"), kernel_seconds=12,
    tests=("--suite", "cuda-on-cpu", "--fast", "--filter", "Philox"),
    sanitizer=("--suite", "cuda-on-cpu", "--fast", "--filter", "Philox"),
    common=("--threads", "1", "--peak-tflops", "0.2", "--no-autotune"),
    vocabulary=257, shard_tokens=4096, rank=16, start_seconds=1, peer_start_seconds=5,
    right_model=("--model", "tiny"), right_batch=_TOY, right_loss_batch=_TOY, right_rank=16,
    right_dtypes=("bf16",), right_steps=2, loss_steps=3, loss_tolerance=1e-4,
    models=(Model("124M", "tiny", 2, 128, 2, 16, 200, profile=("adamw", "flora")),
            Model("6.7B", "tiny", 2, 128, 2, 16, 200, adamw=False)),
    micro_tokens=32, large_tokens=64, micro_steps=(1, 1), large_steps=(1, 1), profile_steps=2,
    memory_models=(Model("124M", "tiny", 2, 128, 2, 16, 200),), memory_batch=_TOY,
    search_channels=(1, 4), head_channels=64, search_memory=40 << 20,
    search_environment={"CUDA_ON_CPU_MEMORY": str(40 << 20)},
    streaming_model=("--model", "tiny", "--seq-len", "16"), streaming_start_seconds=1, technique_steps=(1, 1),
    overlap_micro_batches=(1, 2), overlap_steps=(1, 1),
    budgets=("165600KiB", "1GiB"), budget_flags=("--tokens-per-step", "32"), budget_steps=(1, 1),
    learning_model=("--model", "tiny", *_TOY), learning_tokens=64, learning_probe_steps=2, learning_longest_steps=4,
)

# Of issue 4, on an H200 (790 TFLOP/s of bf16 matmul, copies of 4.3 TB/s).
AIM_DEVICE = "H200"
AIM_TOKENS_PER_SECOND = {  # (model, configuration)
    ("124M", "adamw"): "500,000", ("124M", "flora"): "500,000",
    ("1558M", "adamw"): "50,000, then 55,000", ("1558M", "flora"): "50,000, then 55,000",
    ("6.7B", "flora"): "12,500", ("6.7B", "flora-block"): "10,000",
}
AIM_FLORA_TIME = {"16K": "1.05", "0.5M": "1.01"}  # step of Flora, fused / step of AdamW, equal recompute
AIM_COPY_PERCENT = 85  # of memory-bound kernels
AIM_ATTENTION = {"forward": "220, then 265 TFLOP/s", "backward": "130, then 200 TFLOP/s"}  # heads of 64, T = 1024
