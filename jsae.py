# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "transformers>=4.56", "datasets>=3.0", "numpy", "zstandard"]
# ///
"""Jacobian Sparse Autoencoders (JSAEs): the reference implementation, in one file.

Farnik et al.: Jacobian Sparse Autoencoders: Sparsify Computations, Not Just Activations. ICML 2025,
arXiv 2502.18147. Two TopK autoencoders, on the input x and the output y of a transformer's MLP f,
are trained so that their latents are sparse and so is the Jacobian J of the map f_s between them.

    s_x ---d_x---> x_hat       y_hat <---d_y--- s_y
     ^               ~           ~               ^         f_s = e_y . f . d_x . tau_k      (Eq. 3)
     '-----e_x------ x ---f----> y -----e_y------'

    s = tau_k(W_enc x + b_enc), x_hat = W_dec^T s + b_dec; tau_k: TopK, then ReLU         (Eq. 1, 2)
    L = MSE(x, x_hat) + MSE(y, y_hat) + jacobian_coef / k^2 sum |J|                          (Eq. 5)
    J = (W_enc_y[K_2] W_out) diag(phi'(z)) (W_in W_dec_x[K_1]^T), k x k for each token      (Eq. 16)

    paper                 code
    s_x, K_1; s_y, K_2    s_x, s_y: Latents(acts, idx), (B, k) each
    W^enc, W^dec          W_enc, W_dec (n_latents, d_model): a latent is a row of both
    W_1, W_2, W_g, phi    W_in (d_mlp, d_model), W_out (d_model, d_mlp), W_gate, act
    J^(active)            J (B, k, k), J[b, i, j] = d s_y,i / d s_x,j
    R, lambda             expansion_factor = n_latents / d_model, jacobian_coef

Readings: phi' is taken at the true x (the stable setup, D.1), a batch is 4096 tokens, decoder rows
keep unit norm, the first token of a context is left out. The README gives them all, with reasons.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import os
import shutil
import sys
import sysconfig
import time
import zlib
from functools import partial
from pathlib import Path
from typing import NamedTuple

import datasets
import huggingface_hub
import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

HERE = Path(__file__).resolve().parent


class InputError(ValueError):
    """What was given cannot be used. One line: what was given, what was expected, what to do."""


# ---- Configuration -------------------------------------------------------------------------------
def option(default, help, allowed=lambda value: True, expected=""):
    meta = {"help": help, "allowed": allowed, "expected": expected}
    return dataclasses.field(default=default, metadata=meta)


COUNT = (lambda v: isinstance(v, int) and v >= 1, "a positive whole number")
INDEX = (lambda v: isinstance(v, int) and v >= 0, "a whole number from 0 up")
CONTEXT = (lambda v: isinstance(v, int) and v >= 2, "2 or more: the first token is left out")
RATE = (lambda v: math.isfinite(v) and v > 0, "a finite number above 0")
COEFFICIENT = (lambda v: math.isfinite(v) and v >= 0, "a finite number, 0 or more")
SHARE = (lambda v: 0 < v <= 1, "a number above 0, at most 1")
CONTROL = (("none", "init", "shuffle").__contains__, "none, init or shuffle")
DTYPE = (("auto", "float32", "bfloat16").__contains__, "auto, float32 or bfloat16")


@dataclasses.dataclass(frozen=True)
class Config:
    """A run's settings, saved with it. The defaults are the paper's for Pythia-70m, layer 3."""

    model: str = option("EleutherAI/pythia-70m", "Hugging Face id or folder of a causal LM")
    layer: int = option(3, "layer whose MLP is decomposed, counted from 0", *INDEX)
    dataset: str = option("monology/pile-uncopyrighted", "hub NAME[:CONFIG], path, or stdlib")
    split: str = option("train", "split of a hub data set")
    tokens: int = option(300_000_000, "training tokens, rounded down to whole batches", *COUNT)
    k: int = option(32, "active latents per token, in both SAEs", *COUNT)
    expansion_factor: int = option(32, "R: latents of an SAE per dimension of x", *COUNT)
    jacobian_coef: float = option(1.0, "lambda; 0 trains traditional SAEs", *COEFFICIENT)
    jacobian_fraction: float = option(1.0, "share of tokens in the Jacobian term", *SHARE)
    lr: float = option(5e-4, "Adam's learning rate", *RATE)
    batch_size: int = option(4096, "tokens per training step", *COUNT)
    context_size: int = option(2048, "tokens per context, at most the model's", *CONTEXT)
    buffer_batches: int = option(32, "batches of activations shuffled together", *COUNT)
    keep_first_token: bool = option(False, "do not leave out the first token of a context")
    randomize_weights: str = option("none", "random control: none, init or shuffle", *CONTROL)
    seed: int = option(0, "of the SAEs, the shuffling and the random control", *INDEX)
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")
    dtype: str = option("auto", "of large products; auto: bfloat16 on CUDA, else float32", *DTYPE)
    output_dir: str = option("", "the run's folder; default: in runs/, named by the settings")
    overwrite: bool = option(False, "replace the run that the folder holds")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, meta = getattr(self, field.name), field.metadata
            if not meta["allowed"](value):
                flag = "--" + field.name.replace("_", "-")
                raise InputError(f"{flag} is {value!r}; expected {meta['expected']}")

    @property
    def run_dir(self) -> Path:
        """output_dir, or a folder in runs/ named after the settings that studies vary."""
        control = "" if self.randomize_weights == "none" else f"-{self.randomize_weights}"
        name = f"{Path(self.model).name}-L{self.layer}-R{self.expansion_factor}-k{self.k}"
        name += f"-lambda{self.jacobian_coef:g}{control}-seed{self.seed}"
        return Path(self.output_dir or Path("runs") / name)


# Without --model: two to three minutes on two cores. Any flag given still wins.
DEMO = {"model": "assets/tiny-pythia", "layer": 1, "dataset": "stdlib", "context_size": 256}
DEMO |= {"tokens": 3_000_000, "k": 16, "expansion_factor": 8}


# ---- Sparse autoencoders (section 3.1) -----------------------------------------------------------
class Latents(NamedTuple):
    """The k latents that TopK kept; one whose value is 0 after ReLU is not active."""

    acts: torch.Tensor  # (..., k) values
    idx: torch.Tensor  # (..., k) which latents they are


class TopKSAE(nn.Module):
    """A k-sparse autoencoder (Eq. 1, 2): W_enc, W_dec (n_latents, d_model), b_enc (n_latents,) and
    b_dec (d_model,), not subtracted from x. Decoder rows start at norm 1, W_enc as their copy."""

    def __init__(self, d_model: int, n_latents: int, k: int):
        super().__init__()
        if not 1 <= k <= n_latents:
            raise InputError(f"k is {k}; expected 1 to {n_latents}, the number of latents")
        self.d_model, self.n_latents, self.k = d_model, n_latents, k
        self.W_dec = nn.Parameter(F.normalize(torch.randn(n_latents, d_model)))
        self.W_enc = nn.Parameter(self.W_dec.detach().clone())
        self.b_enc = nn.Parameter(torch.zeros(n_latents))
        self.b_dec = nn.Parameter(torch.zeros(d_model))

    def encode(self, x) -> Latents:
        """x (..., d_model) -> Latents (..., k). Eq. 1."""
        values, idx = F.linear(x, self.W_enc, self.b_enc).topk(self.k)
        return Latents(F.relu(values), idx)

    def decode(self, latents):
        """Latents (..., k) -> x_hat (..., d_model). Eq. 2."""
        acts, idx = latents
        return (acts.unsqueeze(-2) @ self.W_dec[idx]).squeeze(-2) + self.b_dec

    def forward(self, x):
        return self.decode(self.encode(x))


# ---- The MLP and its derivative ------------------------------------------------------------------
def tanh_gelu_grad(z):  # gelu(z) = z sigmoid(u)
    c = math.sqrt(8 / math.pi)
    u = c * (z + 0.044715 * z**3)
    return torch.sigmoid(u) * (1 + z * torch.sigmoid(-u) * c * (1 + 3 * 0.044715 * z * z))


sig = torch.sigmoid
ACTIVATIONS = (  # (phi, phi')
    (F.gelu, lambda z: torch.special.ndtr(z) + z * torch.exp(-0.5 * z * z) / math.sqrt(math.tau)),
    (partial(F.gelu, approximate="tanh"), tanh_gelu_grad),
    (lambda z: z * sig(1.702 * z), lambda z: sig(1.702 * z) * (1 + 1.702 * z * sig(-1.702 * z))),
    (F.silu, lambda z: sig(z) * (1 + z * sig(-z))),
    (F.relu, lambda z: (z > 0).to(z.dtype)),
    (lambda z: F.relu(z) ** 2, lambda z: 2 * F.relu(z)),
)


def with_derivative(act):
    """(phi, phi') of an elementwise function: by hand if among ACTIVATIONS, else by autodiff."""
    device = next((p.device for p in getattr(act, "parameters", list)()), "cpu")
    grid = torch.linspace(-8, 8, 1601, device=device)
    values = act(grid)
    if not torch.allclose(values[::7], act(grid[::7]), atol=1e-6):
        raise InputError(f"the activation {act} is not an elementwise function")
    for known, derivative in ACTIVATIONS:
        if torch.allclose(values, known(grid), rtol=0, atol=1e-5):
            return known, derivative
    return partial(act), lambda z: torch.func.vjp(act, z)[1](torch.ones_like(z))[0]


# Largest relative error at which a model's own MLP counts as reproduced.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
LINEAR = (nn.Linear, Conv1D)


class MLP(nn.Module):
    """The frozen weights of one transformer MLP, biases or None. W_gate is None in a plain one.

    plain: y = W_out phi(W_in x + b_in) + b_out                                              (Eq. 8)
    gated: y = W_out (phi(W_gate x + b_gate) * (W_in x + b_in)) + b_out                (Eq. 17 - 21)

    `sites` (filled by from_model): the language model's own linear maps, those that read x in the
    order of execution, then the one that writes y.
    """

    def __init__(self, W_in, b_in, W_out, b_out, W_gate=None, b_gate=None, act=F.gelu):
        super().__init__()
        names = ("W_in", "b_in", "W_out", "b_out", "W_gate", "b_gate")
        own = torch.promote_types(W_in.dtype, torch.float32)
        for name, t in zip(names, (W_in, b_in, W_out, b_out, W_gate, b_gate)):
            self.register_buffer(name, None if t is None else t.detach().to(own).clone())
        self.act, self.act_grad = with_derivative(act)
        self.sites = ()

    def forward(self, x):
        return self.linearize(x)[0]

    def linearize(self, x):
        """x (..., d_model) -> (y, [(c, W), ...]): df/dx = W_out . sum of diag(c) W, c (..., d_mlp).

        Plain: phi'(z), W_in (Eq. 12). Gated: h phi'(g), W_gate and phi(g), W_in (Eq. 22 to 28).
        """
        h = F.linear(x, self.W_in, self.b_in)  # (..., d_mlp)
        if self.W_gate is None:
            return F.linear(self.act(h), self.W_out, self.b_out), [(self.act_grad(h), self.W_in)]
        g = F.linear(x, self.W_gate, self.b_gate)
        s = self.act(g)
        y = F.linear(h * s, self.W_out, self.b_out)
        return y, [(h * self.act_grad(g), self.W_gate), (s, self.W_in)]

    @classmethod
    def from_model(cls, model, layer: int) -> "MLP":
        """The MLP of one layer of a transformers causal LM. ValueError if it has no dense one."""
        n_layers = model.config.get_text_config(decoder=True).num_hidden_layers
        lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers]
        name, vocabulary = type(model).__name__, model.get_input_embeddings().weight.shape[0]
        if not lists or not 0 <= layer < n_layers:
            raise InputError(f"--layer is {layer}; {name} has layers 0 to {n_layers - 1}")
        ids = torch.randint(vocabulary, (2, 16), generator=torch.Generator().manual_seed(0))
        run = partial(model, input_ids=ids.to(model.device), use_cache=False)
        return find_mlp(lists[0][layer], run, f"layer {layer} of {name}")

    @classmethod
    def from_module(cls, module) -> "MLP":
        """The MLP that module(x) computes. ValueError if it is not one dense MLP."""
        W = [weight_of(m) for m in module.modules() if isinstance(m, LINEAR)] or [torch.ones(1, 1)]
        x = torch.randn(2, 16, W[0].shape[1], generator=torch.Generator().manual_seed(0)).to(W[0])
        return find_mlp(module, partial(module, x), type(module).__name__)


def weight_of(linear):  # (out, in); transformers' Conv1D stores the transpose
    return linear.weight.T if isinstance(linear, Conv1D) else linear.weight


def activations_of(modules):
    """(phi, phi') of the elementwise functions among modules and their attributes; ACTIVATIONS."""
    for function in [*modules, *(a for m in modules for a in vars(m).values() if callable(a))]:
        try:
            yield with_derivative(function)
        except (TypeError, ValueError, RuntimeError, AttributeError, LookupError):
            continue  # something else than a function of one tensor
    yield from ACTIVATIONS


@torch.no_grad()
def find_mlp(block, run, where) -> MLP:
    """The MLP in `block`: two or three linear maps, children of one module, that run() calls.

    Every reading (which map, or half of one, is which; which function is phi) is tried on what
    entered and left the maps; the one that reproduces it is returned.
    """
    names = " ".join(f"{name} {type(m).__name__}" for name, m in block.named_modules()).lower()
    if "expert" in names or "moe" in names:
        raise InputError(f"{where} is a mixture of experts; expected one dense MLP")
    seen, inside, training = {}, list(block.modules()), block.training

    def observe(module, args, output):
        if module in inside and isinstance(module, LINEAR):  # models may add to these in place
            seen[module] = args[0].clone(), output.clone()

    handle = nn.modules.module.register_module_forward_hook(observe)
    try:
        block.eval()
        run()
    finally:
        block.train(training)
        handle.remove()
    others = [m for m in inside if m not in seen]
    for (act, _), parent in itertools.product(dict.fromkeys(activations_of(others)), others):
        maps = [m for m in parent.children() if m in seen]
        for *readers, down in itertools.permutations(maps) if len(maps) in (2, 3) else ():
            W_out, orders = weight_of(down), [[(weight_of(m), m.bias) for m in readers]]
            (W, b), *_ = orders[0]
            if len(W) == 2 * W_out.shape[1]:  # W_in and W_gate, in either order, in one map
                halves = list(zip(W.chunk(2), (None, None) if b is None else b.chunk(2)))
                orders = [halves, halves[::-1]]
            for up, *gate in orders:
                if all(W.T.shape == W_out.shape for W, _ in (up, *gate)):
                    mlp = MLP(*up, W_out, down.bias, *(gate[0] if gate else ()), act=act)
                    mlp.sites = (*sorted(readers, key=list(seen).index), down)
                    x, y = seen[readers[0]][0].to(mlp.W_in.dtype), seen[down][1]
                    if (mlp(x) - y).norm() <= TOLERANCE[y.dtype] * y.norm():
                        return mlp
    raise InputError(f"{where} has no single dense MLP, plain or gated, that can be reproduced")


# ---- The Jacobian (section 4.2, appendix A) ------------------------------------------------------
def active_jacobian(sae_x, sae_y, mlp, x, s_x, s_y):
    """J[..., i, j] = d s_y,i / d s_x,j of the active latents (..., k, k). Eq. 16; Eq. 29 if gated.

    The MLP is linearised at x (..., d_model): the true input in the stable setup (D.1), x_hat in
    the paper's literal f_s. Rows and columns of latents that ReLU switched off are 0.
    """
    left = sae_y.W_enc[s_y.idx] @ mlp.W_out  # (..., k, d_mlp)
    right = sum(c.unsqueeze(-2) * (sae_x.W_dec[s_x.idx] @ W.T) for c, W in mlp.linearize(x)[1])
    return left @ right.mT * (s_y.acts > 0).unsqueeze(-1) * (s_x.acts > 0).unsqueeze(-2)


# The same at the speed of the hardware: equal values and gradients (given TopK's indices), but
# nothing of size B x n_latents or B x k x d_mlp is kept for the backward pass.


def weighted_rows(w, W, idx):  # sum_i w[b, i] W[idx[b, i]]: (B, d)
    return F.embedding_bag(idx, W, per_sample_weights=w, mode="sum")


class Encode(torch.autograd.Function):
    """TopKSAE.encode for constant x, with a backward pass that touches k rows per token.

    z[b, i] = x[b] . W[idx[b, i]] is the derivative of x . weighted_rows(w, W, idx) in w, and the
    gradient that W gets from z is that of weighted_rows with the gradient of z as weights.
    """

    @staticmethod
    @torch.enable_grad()
    def forward(ctx, x, W, b, k):
        W, b = W.detach(), b.detach()
        idx = F.linear(x, W, b).topk(k).indices  # autocast, if on, rules this product alone
        w = torch.zeros_like(idx, dtype=W.dtype, requires_grad=True)
        acts = F.relu(torch.autograd.grad(weighted_rows(w, W, idx), w, x)[0] + b[idx])
        ctx.save_for_backward(x, W, acts, idx)
        ctx.mark_non_differentiable(idx)
        return acts, idx

    @staticmethod
    @torch.enable_grad()
    def backward(ctx, grad, _):
        x, W, acts, idx = ctx.saved_tensors
        grad, W = (grad * (acts > 0)).detach(), W.detach().requires_grad_()
        grad_b = grad.new_zeros(len(W)).index_add_(0, idx.flatten(), grad.flatten())
        return None, torch.autograd.grad(weighted_rows(grad, W, idx), W, x)[0], grad_b, None


class JacobianL1(torch.autograd.Function):
    """Sum of |J| and its exact gradients, from one pass over chunks of tokens.

    With left = W_enc_y W_out and right = W_dec_x W^T, a token's J is a d^T: a = left[K_2], d = sum
    of c * right[K_1] (Eq. 16, 29). The gradient of sum |J| is the matrix of signs, S: it adds S d
    to the gradient of left[K_2] and c * (S^T a) to that of right[K_1].
    """

    @staticmethod
    def forward(ctx, mask, i_y, i_x, cs, left, *rights):
        (B, k), d_mlp = i_y.shape, left.shape[1]
        total = left.new_zeros((), dtype=mask.dtype)
        grads = [torch.zeros_like(m, dtype=mask.dtype) for m in (left, *rights)]
        chunk = max(1, 2 ** (28 if left.is_cuda else 21) // (k * d_mlp * left.element_size()))
        for t in (slice(i, i + chunk) for i in range(0, B, chunk)):
            a = left[i_y[t]]  # (chunk, k, d_mlp)
            d = sum(c[t] * right[i_x[t]] for c, right in zip(cs, rights))  # (chunk, k, d_mlp)
            J = a @ d.mT * mask[t]  # (chunk, k, k)
            total += J.abs().sum()
            S = J.sign().to(left.dtype)
            back = S.mT @ a
            updates = [(i_y[t], S @ d), *((i_x[t], c[t] * back) for c in cs)]
            for grad, (i, rows) in zip(grads, updates):
                grad.index_add_(0, i.flatten(), rows.flatten(0, 1).to(grad.dtype))
        ctx.save_for_backward(*(grad.to(left.dtype) for grad in grads))
        return total

    @staticmethod
    def backward(ctx, grad):
        return None, None, None, None, *(grad.to(g.dtype) * g for g in ctx.saved_tensors)


def jsae_loss(sae_x, sae_y, mlp, x, jacobian_coef, jacobian_fraction=1.0):
    """Eq. 5 in the stable setup of D.1: y = f(x), phi' at the true x, s_y = e_y(y). x (B, d_model).

    -> (loss, parts). parts, detached: mse_x, mse_y (means over all elements), Latents s_x, s_y, and
    jacobian_l1: mean |J| over k x k and a random share jacobian_fraction of the tokens, without the
    coefficient (absent at 0). Under torch.autocast its dtype serves the large products only.
    """
    x, loss, parts = x.detach().to(sae_x.W_enc.dtype), 0.0, {}
    with torch.no_grad():
        y, derivative = mlp.linearize(x)
    for name, sae, v in (("x", sae_x, x), ("y", sae_y, y.to(x.dtype))):
        acts, idx = Encode.apply(v, sae.W_enc, sae.b_enc, sae.k)
        mse = F.mse_loss(weighted_rows(acts, sae.W_dec, idx) + sae.b_dec, v)
        loss = loss + mse
        parts |= {f"mse_{name}": mse.detach(), f"s_{name}": Latents(acts.detach(), idx)}
    if jacobian_coef:
        n = max(1, round(jacobian_fraction * len(x)))
        t = torch.randperm(len(x), device=x.device)[:n] if n < len(x) else slice(None)
        (acts_x, idx_x), (acts_y, idx_y) = ((v[t] for v in parts[s]) for s in ("s_x", "s_y"))
        on = (acts_y > 0).unsqueeze(2) & (acts_x > 0).unsqueeze(1)  # (B, k, k)
        rows_y, i_y = idx_y.unique(return_inverse=True)  # only the rows active in this batch
        rows_x, i_x = idx_x.unique(return_inverse=True)
        left = F.linear(sae_y.W_enc.index_select(0, rows_y), mlp.W_out.T)  # (active, d_mlp)
        rights = [F.linear(sae_x.W_dec.index_select(0, rows_x), W) for _, W in derivative]
        cs = [c[t].to(left.dtype).unsqueeze(1) for c, _ in derivative]  # (B, 1, d_mlp)
        total = JacobianL1.apply(on.to(x.dtype), i_y, i_x, cs, left, *rights)
        parts["jacobian_l1"] = total.detach() / on.numel()
        loss = loss + jacobian_coef / on.numel() * total
    return loss, parts


# ---- Language model and text ---------------------------------------------------------------------
def load_language_model(config, device):
    """-> (model in float32, frozen; tokenizer or None). The control of section 5.3, from the seed:
    init re-draws every parameter as the model's own initialiser does, shuffle permutes each."""
    beside, load = HERE / config.model, transformers.AutoModelForCausalLM
    folder = str(beside if beside.exists() and not Path(config.model).exists() else config.model)
    try:
        model = load.from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(f"--model {config.model} is no causal LM that loads ({error})") from error
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, ImportError):
        tokenizer = None  # enough for text that comes as token ids
    torch.manual_seed(config.seed)
    if config.randomize_weights == "init":
        model = load.from_config(model.config, dtype=torch.float32)
    for p in model.parameters() if config.randomize_weights == "shuffle" else ():
        p.data = p.data.flatten()[torch.randperm(p.numel())].view_as(p)
    return model.eval().requires_grad_(False).to(device), tokenizer


KINDS = {".txt": "text", ".jsonl": "json", ".zst": "json", ".parquet": "parquet", ".arrow": "arrow"}


def load_documents(dataset, split):
    """-> (documents, local): dicts with "text" or "input_ids", to be iterated over repeatedly."""
    path = Path(dataset)
    if dataset == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        names = [p.relative_to(root).as_posix() for p in root.rglob("*.py")]
        names = [n for n in names if not {"site-packages", "dist-packages"} & set(n.split("/"))]
        names.sort(key=lambda n: zlib.crc32(n.encode()))  # mixes the subjects
        return [{"path": n, "text": (root / n).read_text("utf-8", "replace")} for n in names], True
    if not path.exists() and path.suffix not in KINDS:
        name, _, subset = dataset.partition(":")
        return datasets.load_dataset(name, subset or None, split=split, streaming=True), False
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    files = [str(p) for p in files if p.suffix in KINDS]
    kinds = {KINDS[Path(f).suffix] for f in files}
    if len(kinds) != 1:
        raise InputError(f"expected files that end in one of {', '.join(KINDS)}")
    options = {"data_files": files, "split": "train", "streaming": True}
    options |= {"sample_by": "document", "encoding_errors": "replace"} if "text" in kinds else {}
    return datasets.load_dataset(*kinds, **options), True


def pack(documents, tokenizer, model, context_size):
    """Yield contexts (context_size,) of token ids: BOS, then documents joined by end-of-text."""
    special, vocabulary = tokenizer or model.config, model.get_input_embeddings().weight.shape[0]
    bos, end = ([] if i is None else [i] for i in (special.bos_token_id, special.eos_token_id))
    bos, stream, documents = bos or end, np.empty(0, dtype=np.int64), iter(documents)
    while batch := list(itertools.islice(documents, 64)):
        column = "text" if tokenizer and "text" in batch[0] else "input_ids"
        if column not in batch[0]:
            raise InputError(f"columns {[*batch[0]]}; expected input_ids, or text and a tokenizer")
        ids = [document[column] or "" for document in batch]
        if column == "text":
            ids = tokenizer(ids, add_special_tokens=False, verbose=False).input_ids
        stream = np.concatenate([stream, *(np.array([*i, *end], dtype=np.int64) for i in ids)])
        if len(stream) and not 0 <= stream.min() <= stream.max() < vocabulary:
            raise InputError(f"token ids up to {stream.max()}; expected 0 to {vocabulary - 1}")
        rows = stream[: len(stream) - len(stream) % (context_size - len(bos))]
        stream = stream[len(rows) :]
        yield from (np.int64([*bos, *row]) for row in rows.reshape(-1, context_size - len(bos)))


def token_contexts(config, model, tokenizer, context_size, held_out=False):
    """Yield the contexts of the training text or of the held-out text; local training text repeats.

    Local text holds out the documents whose crc32 (of the path in stdlib, else of the text) is 0
    modulo 20, or the last 5 % of the contexts where that leaves one side empty.
    """

    def is_held_out(document):
        key = document.get("path") or document.get("text") or str(document.get("input_ids"))
        return zlib.crc32(key.encode("utf-8", "replace")) % 20 == 0

    n, sides = None, set()
    try:
        documents, local = load_documents(config.dataset, config.split)
        by_document = local and any(sides.add(is_held_out(d)) or len(sides) == 2 for d in documents)
        while n is None or (local and not held_out):
            chosen = (d for d in documents if not by_document or is_held_out(d) == held_out)
            contexts, n = pack(chosen, tokenizer, model, context_size), 0
            if local and not by_document:
                contexts = list(contexts)
                cut = len(contexts) - max(1, len(contexts) // 20)
                contexts = contexts[cut:] if held_out else contexts[:cut]
            for n, context in enumerate(contexts, 1):
                yield context
            if not held_out and n * context_size < config.batch_size:
                raise InputError(f"{n * context_size} tokens; one batch needs {config.batch_size}")
            tqdm.write(f"{config.dataset} ended after {n:,} contexts", sys.stderr)
    except Exception as error:  # of any library that reads text
        raise InputError(f"--dataset {config.dataset}: {error}") from error


# ---- Activations ---------------------------------------------------------------------------------
@torch.no_grad()
def mlp_inputs(model, mlp, ids):
    """Token ids (contexts, T) -> x (contexts, T, d_model). Leaves the forward pass at the MLP."""

    def leave(_, args):
        raise StopIteration(args[0])

    handle = mlp.sites[0].register_forward_pre_hook(leave)
    try:
        model(input_ids=ids, use_cache=False)
    except StopIteration as stop:
        return stop.value.reshape(*ids.shape, -1)
    finally:
        handle.remove()


def activation_batches(config, model, mlp, contexts, steps, autocast):
    """Yield `steps` batches x (batch_size, d_model), fewer if the contexts end.

    A buffer of buffer_batches is filled, shuffled and used up, with nothing carried over.
    """
    shuffle, skip = torch.Generator().manual_seed(config.seed), 0 if config.keep_first_token else 1
    batch, filled, size = config.batch_size, 0, 0
    while filled == size and steps > 0:
        size, filled, buffer = batch * min(steps, config.buffer_batches), 0, None
        while filled < size and (some := list(itertools.islice(contexts, 16))):
            with autocast():
                x = mlp_inputs(model, mlp, torch.from_numpy(np.stack(some)).to(model.device))
            x = x[:, skip:].flatten(0, 1)[: size - filled].float()
            buffer = x.new_empty(size, x.shape[1]) if buffer is None else buffer
            buffer[filled : filled + len(x)] = x
            filled += len(x)
        if filled and not buffer[:filled].isfinite().all():
            raise InputError(f"NaN or Inf among the inputs of the MLP in layer {config.layer}")
        for rows in torch.randperm(filled, generator=shuffle).split(batch)[: filled // batch]:
            steps -= 1
            yield buffer[rows.to(buffer.device)]


# ---- Training (appendix D) -----------------------------------------------------------------------
@torch.no_grad()
def measure(sae_x, sae_y, mlp, x, parts):
    """Reconstruction on a batch; mean |J| and the number of |J| > 0.01 per token on 512 of it."""
    s_x, s_y = (Latents(*(v[:512] for v in parts[s])) for s in ("s_x", "s_y"))
    J = active_jacobian(sae_x, sae_y, mlp, x[:512], s_x, s_y).abs()
    above = (J > 0.01).sum((1, 2)).float()
    row = {"jacobian_l1": J.mean().item(), "jacobian_above_0.01": above.mean().item()}
    for s, v in (("x", x), ("y", mlp(x))):
        row[f"mse_{s}"] = parts[f"mse_{s}"].item()
        row[f"ev_{s}"] = 1 - row[f"mse_{s}"] / (v - v.mean(0)).square().mean().item()
    return row


def train(config: Config) -> Path:
    """Train a pair of SAEs and write the run directory, whose path is returned.

    lr is warmed up over 1 % of the steps and brought to 0 over the last 20 %, lambda warmed up over
    5 %. InputError if a setting cannot be used, the text ends or a number breaks; what was trained
    until then is saved in checkpoint/.
    """
    check_run_dir(config.run_dir, config.overwrite)
    device = config.device.replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
    if device != "cpu" and not (device.startswith("cuda") and torch.cuda.is_available()):
        raise InputError(f"--device {device} is not available here; expected cpu or cuda")
    low = config.dtype == "bfloat16" or (config.dtype == "auto" and device.startswith("cuda"))
    autocast = partial(torch.autocast, device.split(":")[0], torch.bfloat16, enabled=low)
    model, tokenizer = load_language_model(config, device)
    mlp = MLP.from_model(model, config.layer)
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    context_size = min(config.context_size, longest or config.context_size)
    if context_size < config.context_size:
        tqdm.write(f"contexts are clamped to {longest} tokens, the model's maximum", sys.stderr)
    contexts = token_contexts(config, model, tokenizer, context_size)
    batch, steps, step = config.batch_size, config.tokens // config.batch_size, 0
    batches = activation_batches(config, model, mlp, contexts, steps, autocast)

    torch.manual_seed(config.seed)
    sizes = mlp.W_in.shape[1], config.expansion_factor * mlp.W_in.shape[1], config.k
    saes = TopKSAE(*sizes).to(device), TopKSAE(*sizes).to(device)
    parameters = [p for sae in saes for p in sae.parameters()]
    adam = torch.optim.Adam(parameters, fused=True)
    seen_at = torch.zeros(2, sizes[1], dtype=torch.long, device=device)  # tokens, per latent
    bar = tqdm(total=steps * batch, unit="tok", unit_scale=True)
    try:
        for step, x in enumerate(batches, 1):
            if step == 1:  # nothing is written before it is known that the data can be read
                info, start = start_run(config, model, mlp, tokenizer, context_size), time.time()
            coef = config.jacobian_coef * min(1, step / (0.05 * steps))
            lr = config.lr * min(1, step / (0.01 * steps), (steps - step + 1) / (0.2 * steps))
            adam.param_groups[0]["lr"] = lr
            with autocast():
                loss, parts = jsae_loss(*saes, mlp, x, coef, config.jacobian_fraction)
            adam.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            if not (loss + norm).isfinite():
                raise InputError(f"the loss is {loss.item()}, the gradients' norm {norm.item()}")
            adam.step()
            for sae, at, (acts, idx) in zip(saes, seen_at, (parts["s_x"], parts["s_y"])):
                sae.W_dec.data = F.normalize(sae.W_dec.data)
                at[idx[acts > 0]] = step * batch
            bar.update(batch)
            if step % max(1, min(50, steps // 20)) == 0 or step == steps:
                row = measure(*saes, mlp, x, parts)
                dead = (seen_at <= max(0, step * batch - 10_000_000)).sum(1).tolist()
                row |= dict(zip(("dead_x", "dead_y"), dead))
                bar.set_postfix({name: f"{value:.3g}" for name, value in row.items()})
                row |= {"step": step, "tokens": step * batch, "lr": lr, "coef": coef}
                row |= {"seconds": time.time() - start, "grad_norm": norm.item()}
                row["tokens_per_second"] = row["tokens"] / row["seconds"]
                with open(config.run_dir / "metrics.jsonl", "a") as log:
                    log.write(json.dumps(row) + "\n")
        if step < max(1, steps):
            raise InputError(f"{config.dataset} gave {step} of {config.tokens / batch:g} batches")
    except InputError as error:
        if step:
            save_pair(config.run_dir / "checkpoint", saes, info)
        raise InputError(f"step {step}: {error} (last good weights: checkpoint/)") from error
    finally:
        bar.close()
    save_pair(config.run_dir, saes, info)
    return config.run_dir


# ---- Run directories -----------------------------------------------------------------------------
def check_run_dir(folder, overwrite):
    """InputError unless a run may be written to the folder."""
    held = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if folder.is_file() or (held and not {"config.json", "metrics.jsonl"} <= held):
        raise InputError(f"--output-dir {folder} is a file or holds other files than a run's")
    if held and not overwrite:
        raise InputError(f"{folder} holds a run; --overwrite replaces it, --output-dir moves")


def start_run(config, model, mlp, tokenizer, context_size):
    """Empty the run's folder, write config.json and return what it says."""
    shutil.rmtree(config.run_dir, ignore_errors=True)
    names = {module: name for name, module in model.named_modules()}
    info = {"config": dataclasses.asdict(config), "context_size": context_size}
    info["mlp_sha256"] = hashlib.sha256(safetensors.torch.save(mlp.state_dict())).hexdigest()
    info["sites"] = {"x": names[mlp.sites[0]], "y": names[mlp.sites[-1]]}  # x enters, y leaves
    info["prepend_bos"] = tokenizer is not None and tokenizer.bos_token_id is not None
    info["versions"] = {m.__name__: m.__version__ for m in (torch, transformers, datasets, np)}
    write_file(config.run_dir / "config.json", json.dumps(info, indent=2).encode())
    return info


def write_file(path, data):
    """Write bytes so that `path` holds all of them or what it held before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save_pair(folder, saes, info):
    """Write folder/sae_x and folder/sae_y, each whole or not at all, in the format of SAELens 6."""
    metadata = {"sae_lens_version": "6.0.0", "model_class_name": "AutoModelForCausalLM"}
    metadata |= {"model_name": info["config"]["model"], "dataset_path": info["config"]["dataset"]}
    metadata |= {name: info[name] for name in ("context_size", "prepend_bos")}
    for s, sae in zip("xy", saes):
        tensors = {name: p.detach().cpu() for name, p in sae.named_parameters()}
        tensors["W_enc"] = tensors["W_enc"].T.contiguous()  # SAELens keeps it as (d_in, d_sae)
        cfg = {"architecture": "topk", "d_in": sae.d_model, "d_sae": sae.n_latents, "k": sae.k}
        cfg |= {"normalize_activations": "none", "reshape_activations": "none", "device": "cpu"}
        cfg |= dict.fromkeys(("rescale_acts_by_decoder_norm", "apply_b_dec_to_input"), False)
        cfg |= {"dtype": "float32", "metadata": metadata | {"hook_name": info["sites"][s]}}
        target, temporary = folder / f"sae_{s}", folder / f"sae_{s}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        write_file(temporary / "cfg.json", json.dumps(cfg, indent=2).encode())
        write_file(temporary / "sae_weights.safetensors", safetensors.torch.save(tensors))
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)


def load_run(path_or_hub_id):
    """-> (sae_x, sae_y, config) of a finished run: a folder, or the id of a hub repository."""
    folder, saes = Path(path_or_hub_id), []
    try:
        if not folder.is_dir():
            folder = Path(huggingface_hub.snapshot_download(str(path_or_hub_id)))
        config = Config(**json.loads((folder / "config.json").read_text())["config"])
        for s in "xy":
            tensors = safetensors.torch.load_file(folder / f"sae_{s}" / "sae_weights.safetensors")
            saes.append(TopKSAE(*tensors["W_enc"].shape, config.k))
            saes[-1].load_state_dict(tensors | {"W_enc": tensors["W_enc"].T})
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise InputError(f"{path_or_hub_id} is not a finished run ({error})") from error
    return *saes, config


# ---- Command line --------------------------------------------------------------------------------
def main(argv=None) -> int:
    """-> exit status: 0, 2 after one line about what was given, 130 after Ctrl-C."""

    def refuse(message):
        raise InputError(message)

    argv = sys.argv[1:] if argv is None else argv
    parser = transformers.HfArgumentParser(Config, prog="jsae.py", allow_abbrev=False)
    parser.error = refuse
    try:
        if not any(argument.split("=")[0] == "--model" for argument in argv):
            if not (HERE / DEMO["model"]).is_dir():
                example = "--model EleutherAI/pythia-70m --layer 3"
                refuse(f"{DEMO['model']} is not beside jsae.py; name a model, as in {example}")
            print("demo settings:", ", ".join(f"{name} {value}" for name, value in DEMO.items()))
            parser.set_defaults(**DEMO)
        config = Config(**vars(parser.parse_args(argv)))
        run_dir = train(config)
    except (InputError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except SystemExit as stop:  # argparse's, after --help
        return stop.code or 0
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    print(f"explained variance     x {last['ev_x']:.4f}, y {last['ev_y']:.4f}")
    print(f"|J| > 0.01 per token   {last['jacobian_above_0.01']:.1f} of {config.k**2}")
    print(f"tokens per second      {last['tokens_per_second']:,.0f}")
    print(f"written to             {run_dir}")
    if (HERE / "evaluate.py").exists():
        print(f"evaluate it with       python {HERE / 'evaluate.py'} {run_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
