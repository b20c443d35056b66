"""torch_kernel_cases.py: the operations of bench/kernels.cpp that PyTorch has, too, under the same names and shapes; what
bench_torch_kernels.py times. Bytes and FLOPs are those that PyTorch's own dtypes need."""
import contextlib
from collections import namedtuple

import torch
import torch.nn.functional as F

try:
    from torch.nn.attention import SDPBackend, sdpa_kernel
except ImportError:  # before 2.3
    sdpa_kernel = None

# The same as in bench/kernel_cases.cpp.
Model = namedtuple("Model", "name batch sequence channels heads wide_heads vocabulary padded rank sequences chunks")
MODELS = {
    "124M": Model("124M", 16, 1024, 768, 12, 6, 50257, 50304, 256, (1024, 2048, 4096), (512, 4096)),
    "1558M": Model("1558M", 16, 1024, 1600, 25, 12, 50257, 50304, 256, (1024, 2048, 4096), (512, 4096)),
    "toy": Model("toy", 4, 16, 128, 2, 1, 257, 384, 16, (16, 32), (16, 64)),
}
BF16, FP32 = torch.bfloat16, torch.float32

# run() is the operation on one set of inputs; `tensors` are read or written once each, those twice that change in place.
Call = namedtuple("Call", "run tensors flops", defaults=(0,))
Case = namedtuple("Case", "operation model shape prepare")


def size(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def dimensions(*shape):
    return "x".join(map(str, shape))


class Inputs:
    """Random tensors of one set; keeps them, so that their bytes can be counted."""

    def __init__(self, device):
        self.device, self.tensors = device, []

    def keep(self, tensor):
        self.tensors.append(tensor)
        return tensor

    def normal(self, *shape, dtype=BF16, mean=0.0, stddev=1.0):
        return self.keep((torch.randn(shape, device=self.device) * stddev + mean).to(dtype))

    def tokens(self, *shape, vocabulary):
        """The k-th most frequent token has a probability of about 1/k, as in text."""
        rank = (vocabulary + 1) ** torch.rand(shape, dtype=torch.float64)
        tokens = (rank.long() - 1).clamp(0, vocabulary - 1) * 7919 % vocabulary
        return self.keep(tokens.to(self.device))


@contextlib.contextmanager
def flash_attention(device):
    """FlashAttention and nothing else on a GPU."""
    if not hasattr(F, "scaled_dot_product_attention"):
        raise NotImplementedError("this PyTorch has no scaled_dot_product_attention")
    if device != "cuda":
        yield
    elif sdpa_kernel:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            yield
    else:
        with torch.backends.cuda.sdp_kernel(enable_flash=True, enable_math=False, enable_mem_efficient=False):
            yield


class Cases:
    """The operations of one model that PyTorch has, too."""

    def __init__(self, model):
        self.model, self.cases = model, []

    def add(self, operation, shape, prepare):
        self.cases.append(Case(operation, self.model.name, shape, prepare))

    def all(self):
        m = self.model
        self.matmuls()
        self.attention()
        self.norms_and_activations()
        self.embedding_and_head()
        self.elementwise()
        for rows, cols in ((m.channels, 3 * m.channels), (m.channels, 4 * m.channels)):
            self.updates(rows, cols, BF16)
            self.flora(rows, cols)
        self.flora(4 * m.channels, m.channels)
        self.updates(m.vocabulary, m.channels, FP32)
        self.projections()
        return self.cases

    def matmul(self, name, m, n, k, shape_a, shape_b, product, extra=lambda inputs: (), in_place=False):
        """product(out, a, b, *extra) gives [m, n]."""

        def prepare(inputs):
            a, b, out = inputs.normal(*shape_a), inputs.normal(*shape_b), inputs.normal(m, n)
            others = extra(inputs)
            tensors = [a, b, out] + ([out] if in_place else []) + list(others)
            return Call(lambda: product(out, a, b, *others), tensors, 2 * m * n * k)

        self.add("matmul " + name, dimensions(m, n, k) + " bf16", prepare)

    def linear(self, name, inputs, outputs):
        N = self.model.batch * self.model.sequence
        self.matmul(name + " forward", N, outputs, inputs, (N, inputs), (inputs, outputs),
                    lambda out, x, w, bias: torch.addmm(bias, x, w, out=out), lambda i: (i.normal(outputs),))
        self.matmul(name + " input_gradient", N, inputs, outputs, (N, outputs), (inputs, outputs),
                    lambda out, d, w: torch.mm(d, w.t(), out=out))
        self.matmul(name + " weight_gradient", inputs, outputs, N, (N, inputs), (N, outputs),
                    lambda out, x, d: torch.mm(x.t(), d, out=out))

    def matmuls(self):
        C, P, r = self.model.channels, self.model.padded, self.model.rank
        N = self.model.batch * self.model.sequence
        self.linear("qkv", C, 3 * C)
        self.linear("proj", C, C)
        self.linear("fc", C, 4 * C)
        self.linear("mlp_proj", 4 * C, C)
        self.matmul("fc weight_gradient_accumulated", C, 4 * C, N, (N, C), (N, 4 * C),
                    lambda out, x, d: out.addmm_(x.t(), d), in_place=True)
        for n in self.model.chunks:
            self.matmul("head forward", n, P, C, (n, C), (P, C), lambda out, x, w: torch.mm(x, w.t(), out=out))
            self.matmul("head input_gradient", n, C, P, (n, P), (P, C), lambda out, d, w: torch.mm(d, w, out=out))
            self.matmul("head weight_gradient", P, C, n, (n, P), (n, C), lambda out, d, x: out.addmm_(d.t(), x),
                        in_place=True)
        self.matmul("transfer_square", r, r, C, (r, C), (r, C), lambda out, p, q: torch.mm(p, q.t(), out=out))

    def attention(self):
        m = self.model
        head_dim = m.channels // m.heads
        for NH, HD in ((m.heads, head_dim), (m.wide_heads, 2 * head_dim)):
            for T in m.sequences:
                B = m.batch * m.sequence // T
                product = B * T * (T + 1) * NH * HD  # FLOPs of one causal product
                for backward in (False, True):
                    def prepare(inputs, backward=backward, B=B, T=T, NH=NH, HD=HD, product=product):
                        qkv = inputs.normal(B, T, 3, NH, HD)
                        q, k, v = (qkv[:, :, i].transpose(1, 2).detach().requires_grad_(backward) for i in range(3))

                        def forward():
                            with flash_attention(inputs.device):
                                return F.scaled_dot_product_attention(q, k, v, is_causal=True)

                        if not backward:
                            return Call(forward, [qkv, q], 2 * product)
                        out = forward()
                        inputs.keep(out)
                        dout = inputs.normal(B, T, NH, HD).transpose(1, 2)

                        def gradients():
                            d = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
                            return d, [x.sum((0, 2)) for x in d]

                        return Call(gradients, [qkv, qkv, out, dout], 5 * product)

                    self.add("attention_backward" if backward else "attention_forward",
                             f"B{B} T{T} NH{NH} HD{HD} bf16", prepare)

                def decode(inputs, T=T, NH=NH, HD=HD):
                    qkv = inputs.normal(T, 3, 1, NH, HD)
                    q, k, v = (qkv[:, i].permute(1, 2, 0, 3) for i in range(3))
                    q = q[:, :, -1:]
                    return Call(lambda: F.scaled_dot_product_attention(q, k, v), [k, v, q, q], 4 * T * NH * HD)

                self.add("attention_decode", f"T{T} NH{NH} HD{HD} bf16", decode)

    def norms_and_activations(self):
        C, N = self.model.channels, self.model.batch * self.model.sequence
        narrow, wide = dimensions(N, C) + " bf16", dimensions(N, 4 * C) + " bf16"

        def parameters(inputs):
            return inputs.normal(C, mean=1.0, stddev=0.1), inputs.normal(C)

        def forward(inputs):
            x, (w, b) = inputs.normal(N, C), parameters(inputs)
            return Call(lambda: F.layer_norm(x, (C,), w, b), [x, x])

        def residual_forward(inputs):
            x, y, (w, b) = inputs.normal(N, C), inputs.normal(N, C), parameters(inputs)

            def run():
                residual = x + y
                return residual, F.layer_norm(residual, (C,), w, b)

            return Call(run, [x, y, x, y])

        def backward(inputs):
            x, dout, din, (w, b) = inputs.normal(N, C), inputs.normal(N, C), inputs.normal(N, C), parameters(inputs)
            _, mean, rstd = torch.ops.aten.native_layer_norm(x, (C,), w, b, 1e-5)

            def run():
                dx, dw, db = torch.ops.aten.native_layer_norm_backward(dout, x, (C,), mean, rstd, w, b, [True] * 3)
                return din.add_(dx), dw, db

            return Call(run, [x, dout, din, din])

        def gelu(inputs):
            x = inputs.normal(N, 4 * C)
            return Call(lambda: F.gelu(x, approximate="tanh"), [x, x])

        def gelu_backward(inputs):
            x, d = inputs.normal(N, 4 * C), inputs.normal(N, 4 * C)
            return Call(lambda: torch.ops.aten.gelu_backward(d, x, approximate="tanh").sum(0), [x, d, d])

        self.add("layernorm_forward", narrow, forward)
        self.add("residual_layernorm_forward", narrow, residual_forward)
        self.add("layernorm_backward", narrow, backward)
        self.add("gelu_forward", wide, gelu)
        self.add("gelu_backward", wide, gelu_backward)
        for cols in (C, 3 * C, 4 * C):
            def bias(inputs, cols=cols):
                d = inputs.normal(N, cols)
                return Call(lambda: d.sum(0), [d])

            self.add("bias_backward", dimensions(N, cols) + " bf16", bias)

    def embedding_and_head(self):
        m = self.model
        B, T, C, V, P = m.batch, m.sequence, m.channels, m.vocabulary, m.padded
        shape = dimensions(B * T, C) + " bf16"

        def forward(inputs):
            tokens, wte, wpe = inputs.tokens(B, T, vocabulary=V), inputs.normal(P, C), inputs.normal(T, C)
            rows = wte[:tokens.unique().numel()]
            out = inputs.normal(B, T, C)
            return Call(lambda: torch.add(F.embedding(tokens, wte), wpe, out=out), [rows, wpe, out])

        def backward(inputs):
            tokens, dout = inputs.tokens(B, T, vocabulary=V), inputs.normal(B, T, C)
            dwte = inputs.normal(V, C)

            def run():
                return torch.ops.aten.embedding_dense_backward(dout, tokens, V, -1, False), dout.sum(0)

            return Call(run, [dout, dwte, dout[0]])

        self.add("embedding_forward", shape, forward)
        self.add("embedding_backward", shape, backward)
        for n in m.chunks:
            def loss(inputs, n=n):
                logits, targets = inputs.normal(n, P), inputs.tokens(n, vocabulary=V)
                return Call(lambda: F.cross_entropy(logits, targets, reduction="none"), [logits])

            def loss_and_gradient(inputs, n=n):
                logits, targets = inputs.normal(n, P).requires_grad_(), inputs.tokens(n, vocabulary=V)
                return Call(lambda: torch.autograd.grad(F.cross_entropy(logits, targets), logits), [logits, logits])

            self.add("classifier loss", dimensions(n, P) + " bf16", loss)
            self.add("classifier loss_and_gradient", dimensions(n, P) + " bf16", loss_and_gradient)

    def elementwise(self):
        C, N = self.model.channels, self.model.batch * self.model.sequence

        def simple(operation, run, dtypes):
            """run(*tensors) on tensors of these dtypes."""
            def prepare(inputs):
                tensors = [inputs.normal(N, C, dtype=dtype) for dtype in dtypes]
                return Call(lambda: run(*tensors), tensors)

            self.add(operation, dimensions(N, C) + (" fp32" if dtypes[-1] == FP32 else " bf16"), prepare)

        simple("copy", lambda y, x: y.copy_(x), (BF16, BF16))
        simple("fill", lambda y: y.zero_(), (BF16,))
        simple("convert to_bf16", lambda y, x: y.copy_(x), (BF16, FP32))
        simple("convert to_fp32", lambda y, x: y.copy_(x), (FP32, BF16))
        simple("fill_constant", lambda y: y.fill_(1.5), (BF16,))
        simple("fill_normal", lambda y: y.normal_(), (BF16,))

        def losses(inputs):
            x = inputs.normal(N, dtype=FP32)
            return Call(lambda: x.sum(), [x])

        self.add("sum losses", dimensions(N) + " fp32", losses)

    def updates(self, rows, cols, gradient):
        shape = dimensions(rows, cols) + " bf16"

        def accumulate(dtype):
            def prepare(inputs):
                total, g = inputs.normal(rows, cols, dtype=dtype), inputs.normal(rows, cols)
                return Call(lambda: total.add_(g), [total, total, g])

            return prepare

        def scale(inputs):
            x, factor = inputs.normal(rows, cols, dtype=gradient), inputs.normal(1, dtype=FP32, mean=-1.0, stddev=0.0)
            return Call(lambda: x.mul_(factor), [x, x])

        def sum_squares(inputs):
            x = inputs.normal(rows, cols, dtype=gradient)
            return Call(lambda: torch.linalg.vector_norm(x, dtype=FP32), [x])

        def total(inputs):
            x = inputs.normal(rows, cols, dtype=gradient)
            return Call(lambda: x.sum(dtype=FP32), [x])

        def optimizer(make, states):
            def prepare(inputs):
                w, g = inputs.normal(rows, cols, stddev=0.02), inputs.normal(rows, cols)
                w.grad = g
                chosen = make([w], {"capturable": True} if inputs.device == "cuda" else {})
                chosen.step()  # makes its states
                return Call(chosen.step, [w, w, g] + [w, w] * states)

            return prepare

        self.add("accumulate fp32", shape, accumulate(FP32))
        self.add("accumulate bf16", shape, accumulate(BF16))
        self.add("scale", shape, scale)
        self.add("sum_squares", shape, sum_squares)
        self.add("sum", shape, total)
        self.add("adamw_update bf16", shape, optimizer(
            lambda w, graphs: torch.optim.AdamW(w, lr=1e-7, weight_decay=0.1, fused=True, **graphs), 2))
        self.add("sgd_update", shape, optimizer(
            lambda w, _: torch.optim.SGD(w, lr=1e-7, weight_decay=0.1, fused=True), 0))
        self.add("sgd_update momentum", shape, optimizer(
            lambda w, _: torch.optim.SGD(w, lr=1e-7, momentum=0.9, weight_decay=0.1, fused=True), 1))

    def flora(self, n, m):
        r = self.model.rank
        if n < m:
            self.matmul("down", r, m, n, (r, n), (n, m), lambda out, p, g: torch.mm(p, g, out=out))
            self.matmul("up", n, m, r, (r, n), (r, m), lambda out, p, s: out.addmm_(p.t(), s, alpha=1e-3),
                        in_place=True)
        else:
            self.matmul("down", n, r, m, (n, m), (r, m), lambda out, g, p: torch.mm(g, p.t(), out=out))
            self.matmul("up", n, m, r, (n, r), (r, m), lambda out, s, p: out.addmm_(s, p, alpha=1e-3), in_place=True)

    def projections(self):
        r, C = self.model.rank, self.model.channels
        shape = dimensions(r, C) + " bf16"

        def gaussian(inputs):
            p = inputs.normal(r, C)
            return Call(lambda: p.normal_(0.0, r ** -0.5), [p])

        self.add("generate_projection gaussian", shape, gaussian)
