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

In the code: s_x, K_1 and s_y, K_2 are Latents(acts, idx), (B, k) each; a latent is a row of W_enc and
W_dec (n_latents, d_model); W_1, W_2, W_g, phi are W_in, W_out, W_gate, act; J (B, k, k) is J[b, i, j]
= d s_y,i / d s_x,j; R is expansion_factor, lambda jacobian_coef. The README has all readings."""

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import sys
import time
from collections import Counter, namedtuple
from contextlib import suppress
from functools import partial
from itertools import groupby, islice, permutations, product, repeat
from pathlib import Path
from typing import Literal, get_args
from zlib import crc32

import datasets
import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from datasets.distributed import split_dataset_by_node
from huggingface_hub import snapshot_download
from torch import autograd, distributed, nn
from tqdm import tqdm
from transformers.hf_argparser import HfArg, HfArgumentParser

HERE = Path(__file__).resolve().parent
RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))  # torchrun's
KINDS = {".txt": "text", ".jsonl": "json", ".zst": "json", ".parquet": "parquet", ".arrow": "arrow"}
CHUNK = {"cpu": 2**23}  # bytes that fit the cache; 2^29, which keep it busy, on any other device
DEMO = {"model": "assets/tiny-pythia", "layer": 2, "dataset": "stdlib", "context_size": 256}
DEMO |= {"tokens": 1_200_000, "batch_size": 2048, "lr": 3e-3, "k": 16, "expansion_factor": 4}
Latents = namedtuple("Latents", "acts idx")  # (..., k): what TopK kept; not active if acts is 0
weighted_rows = lambda w, W, idx: F.embedding_bag(idx, W, per_sample_weights=w, mode="sum")


class InputError(ValueError):
    """What was given, what was expected, what to do: one line."""


def check(fine, message):
    if not fine:
        raise InputError(message)


@dataclasses.dataclass(frozen=True)
class Config:
    """A run's settings, saved with it. The defaults are the paper's for Pythia-70m, layer 3."""

    model: str = HfArg(default="EleutherAI/pythia-70m", help="hub id or folder of a causal LM")
    layer: int = HfArg(default=3, help="layer whose MLP is decomposed, counted from 0")
    dataset: str = HfArg(default="monology/pile-uncopyrighted", help="NAME[:CONFIG], path, stdlib")
    split: str = HfArg(default="train", help="split of a hub data set")
    tokens: int = HfArg(default=300_000_000, help="training tokens, rounded down to whole batches")
    k: int = HfArg(default=32, help="active latents per token, in both SAEs")
    expansion_factor: int = HfArg(default=32, help="R: latents of an SAE per dimension of x")
    jacobian_coef: float = HfArg(default=1.0, help="lambda; 0 trains traditional SAEs")
    jacobian_penalty: Literal["l1", "l1_over_l2"] = HfArg(default="l1", help="mean |J|, or / rms J")
    jacobian_fraction: float = HfArg(default=1.0, help="share of tokens in the Jacobian term")
    lr: float = HfArg(default=5e-4, help="Adam's learning rate")
    batch_size: int = HfArg(default=4096, help="tokens per training step")
    context_size: int = HfArg(default=2048, help="tokens per context, at most the model's")
    buffer_batches: int = HfArg(default=32, help="batches of activations shuffled together")
    keep_first_token: bool = HfArg(default=False, help="do not leave out contexts' first token")
    randomize_weights: Literal["none", "init", "shuffle"] = HfArg(default="none", help="control")
    seed: int = HfArg(default=0, help="of the SAEs, the shuffling and the random control")
    device: str = HfArg(default="auto", help="auto, cpu, cuda, cuda:1, ...")
    dtype: Literal["auto", "float32", "bfloat16"] = HfArg(default="auto", help="large products")
    output_dir: str = HfArg(default="", help="the run's folder; default: in runs/, by settings")
    overwrite: bool = HfArg(default=False, help="replace the run in the folder, and all in it")
    resume: bool = HfArg(default=False, help="go on with the run that the folder holds")
    checkpoint_minutes: float = HfArg(default=10.0, help="time from one checkpoint to the next")

    def __post_init__(self):
        least = {"layer": 0, "seed": 0, "context_size": 2, "lr": 1e-9, "jacobian_fraction": 1e-9}
        for name, kind in Config.__annotations__.items():
            value, words, low = getattr(self, name), get_args(kind), least.get(name, kind is int)
            high = {"jacobian_fraction": 1, "seed": 2**31}.get(name, 1e15)
            fine = low <= value <= high if kind in (int, float) else not words or value in words
            expected = words or f"{kind.__name__} from {low:g} to {high:g}"
            check(fine, f"--{name.replace('_', '-')} is {value!r}; expected {expected}")
        if not self.output_dir:  # named after the settings that studies vary
            sizes = f"L{self.layer}-R{self.expansion_factor}-k{self.k}-lambda{self.jacobian_coef:g}"
            parts = Path(self.model).name, sizes, self.jacobian_penalty, self.randomize_weights
            name = "-".join(p for p in (*parts, f"seed{self.seed}") if p not in ("l1", "none"))
            object.__setattr__(self, "output_dir", f"runs/{name}")  # the class is frozen


class TopKSAE(nn.Module):
    """A k-sparse autoencoder (Eq. 1, 2): W_enc, W_dec (n_latents, d_model), b_enc (n_latents,) and
    b_dec (d_model,), not subtracted from x. Decoder rows start at norm 1, W_enc as their copy."""

    def __init__(self, d_model: int, n_latents: int, k: int):
        super().__init__()
        check(1 <= k <= n_latents, f"k is {k}; expected 1 to {n_latents}, the number of latents")
        self.d_model, self.n_latents, self.k = d_model, n_latents, k
        self.W_dec = nn.Parameter(F.normalize(torch.randn(n_latents, d_model)))
        self.W_enc = nn.Parameter(self.W_dec.detach().clone())
        self.b_enc = nn.Parameter(torch.zeros(n_latents))
        self.b_dec = nn.Parameter(torch.zeros(d_model))

    def encode(self, x):  # (..., d_model) -> Latents (..., k). Eq. 1
        values, idx = F.linear(x, self.W_enc, self.b_enc).topk(self.k)
        return Latents(F.relu(values), idx)

    def decode(self, latents):  # (..., k) -> x_hat (..., d_model). Eq. 2
        return (latents.acts.unsqueeze(-2) @ self.W_dec[latents.idx]).squeeze(-2) + self.b_dec

    def forward(self, x):
        return self.decode(self.encode(x))


LINEAR = (nn.Linear, transformers.Conv1D)
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
tanh_gelu, C = partial(F.gelu, approximate="tanh"), (8 / torch.pi) ** 0.5
swish_grad = lambda z, u, du: torch.sigmoid(u) * (1 + z * torch.sigmoid(-u) * du)  # (z sigmoid(u))'
ACTIVATIONS = (  # (phi, phi')
    (F.gelu, lambda z: torch.special.ndtr(z) + z * torch.exp(-0.5 * z * z) / (2 * torch.pi) ** 0.5),
    (tanh_gelu, lambda z: swish_grad(z, C * (z + 0.044715 * z**3), C * (1 + 0.134145 * z * z))),
    (lambda z: z * torch.sigmoid(1.702 * z), lambda z: swish_grad(z, 1.702 * z, 1.702)),
    (F.silu, lambda z: swish_grad(z, z, 1)),
    (F.relu, lambda z: (z > 0).to(z.dtype)),
    (lambda z: F.relu(z) ** 2, lambda z: 2 * F.relu(z)),
)


def with_derivative(act):
    """(phi, phi') of an elementwise function: by hand if among ACTIVATIONS, else by autodiff."""
    device = next((p.device for p in getattr(act, "parameters", list)()), "cpu")
    grid = torch.linspace(-8, 8, 1601, device=device)
    check(torch.allclose(act(grid)[::7], act(grid[::7]), atol=1e-6), f"{act} is not elementwise")
    for known, derivative in ACTIVATIONS:
        if torch.allclose(act(grid), known(grid), rtol=0, atol=1e-5):
            return known, derivative
    return partial(act), lambda z: torch.func.vjp(act, z)[1](torch.ones_like(z))[0]


class MLP(nn.Module):
    """The frozen weights of one transformer MLP, biases or None. W_gate is None in a plain one.
    plain: y = W_out phi(W_in x + b_in) + b_out                                              (Eq. 8)
    gated: y = W_out (phi(W_gate x + b_gate) * (W_in x + b_in)) + b_out                (Eq. 17 - 21)
    sites (from_model): the model's maps that read x, in order of execution, then the one to y."""

    def __init__(self, W_in, b_in, W_out, b_out, W_gate=None, b_gate=None, act=F.gelu):
        super().__init__()
        names = ("W_in", "b_in", "W_out", "b_out", "W_gate", "b_gate")
        self.sites, own = (), torch.promote_types(W_in.dtype, torch.float32)
        for name, t in zip(names, (W_in, b_in, W_out, b_out, W_gate, b_gate)):
            self.register_buffer(name, t if t is None else t.detach().to(own).contiguous().clone())
        self.act, self.act_grad = with_derivative(act)

    def forward(self, x):
        return self.linearize(x, slice(0))[0]

    def linearize(self, x, t=slice(None)):
        """x (..., d_model) -> (y, [(c, W), ...]); at x[t], df/dx = W_out . sum of diag(c) W.
        Plain: phi'(z), W_in (Eq. 12). Gated: h phi'(g), W_gate and phi(g), W_in (Eq. 22 to 28)."""
        h = F.linear(x, self.W_in, self.b_in)  # (..., d_mlp), like c
        if self.W_gate is None:
            return F.linear(self.act(h), self.W_out, self.b_out), [(self.act_grad(h[t]), self.W_in)]
        g = F.linear(x, self.W_gate, self.b_gate)
        s = self.act(g)
        gated = [(h[t] * self.act_grad(g[t]), self.W_gate), (s[t], self.W_in)]
        return F.linear(h * s, self.W_out, self.b_out), gated

    @classmethod
    def from_model(cls, model, layer: int) -> "MLP":
        """The MLP of one layer of a transformers causal LM. ValueError if it has no dense one."""
        n_layers = model.config.get_text_config(decoder=True).num_hidden_layers
        lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers]
        fine, where = lists and 0 <= layer < n_layers, f"layer {layer} of {type(model).__name__}"
        check(fine, f"there is no {where}; --layer takes 0 to {n_layers - 1}")
        ids = model.dummy_inputs["input_ids"].to(model.device)
        return find_mlp(lists[0][layer], partial(model, input_ids=ids, use_cache=False), where)

    @classmethod
    def from_module(cls, module) -> "MLP":
        """The MLP that module(x) computes. ValueError if it is not one dense MLP."""
        maps = [m for m in module.modules() if isinstance(m, LINEAR)]
        check(maps, f"{type(module).__name__} has no linear map; expected a dense MLP")
        W = maps[0].weight.T if isinstance(maps[0], nn.Linear) else maps[0].weight  # (in, out)
        x = torch.randn(2, 16, len(W), generator=torch.Generator().manual_seed(0)).to(W)
        return find_mlp(module, partial(module, x), type(module).__name__)


@torch.no_grad()
def find_mlp(block, run, where) -> MLP:
    """The MLP in `block`: two or three linear maps, children of one module, that run() calls. Every
    reading (which one, or half, is which map; phi) is tried: it must reproduce y, up to TOLERANCE."""
    names = " ".join(f"{name} {type(m).__name__}" for name, m in block.named_modules()).lower()
    check("moe" not in names and "expert" not in names, f"{where} is a mixture of experts")
    seen, inside, acts = {}, list(block.modules()), {}

    def observe(module, args, output):  # copies, because models may add to x and y in place
        if module in inside and isinstance(module, LINEAR):
            W = module.weight if isinstance(module, nn.Linear) else module.weight.T  # (out, in)
            seen[module] = W, module.bias, args[0].clone(), output.clone()

    with nn.modules.module.register_module_forward_hook(observe):
        run()
    for f in [f for m in inside for f in (m, *vars(m).values())] + [phi for phi, _ in ACTIVATIONS]:
        with suppress(TypeError, ValueError, RuntimeError, AttributeError, LookupError):
            acts[with_derivative(f)[0]] = None  # f is an elementwise function of one tensor
    for act, parent in product(acts, inside):
        maps = [m for m in seen if m in parent.children()]  # in order of execution
        for down in maps if len(maps) in (2, 3) else ():
            (W_out, b_out, _, y), readers = seen[down], [m for m in maps if m is not down]
            parts, d = [], W_out.shape[1]  # (W, b) of W_in, or W_in and W_gate, maybe of one map
            for W, b, *_ in (seen[m] for m in readers):
                parts += zip(W.split(d), repeat(None) if b is None else b.split(d))
            for up, *gate in permutations(parts) if len(parts) in (1, 2) else ():
                if all(W.T.shape == W_out.shape for W, _ in (up, *gate)):
                    mlp = MLP(*up, W_out, b_out, *(gate[0] if gate else ()), act=act)
                    mlp.sites, x = (*readers, down), seen[readers[0]][2]
                    if (mlp(x.to(mlp.W_in.dtype)) - y).norm() <= TOLERANCE[y.dtype] * y.norm():
                        return mlp
    raise InputError(f"{where} has no single dense MLP, plain or gated, that can be reproduced")


def active_jacobian(sae_x, sae_y, mlp, x, s_x, s_y):
    """J[..., i, j] = d s_y,i / d s_x,j, (..., k, k), 0 for latents that ReLU switched off. Eq. 16, 29.
    The MLP is linearised at x (..., d_model): the true input (D.1), or x_hat as in Eq. 3."""
    left = sae_y.W_enc[s_y.idx] @ mlp.W_out  # (..., k, d_mlp)
    right = sum(c.unsqueeze(-2) * (sae_x.W_dec[s_x.idx] @ W.T) for c, W in mlp.linearize(x)[1])
    return left @ right.mT * (s_y.acts > 0).unsqueeze(-1) * (s_x.acts > 0).unsqueeze(-2)


class Products(autograd.Function):
    """z[b, i] = x[b] . W[idx[b, i]] is the derivative in w of x . weighted_rows, the sum of w[b, i]
    W[idx[b, i]]. W gets from z the gradient of weighted_rows with z's gradient as weights."""

    @staticmethod
    def forward(ctx, x, W, idx):
        ctx.save_for_backward(x, W, idx)
        w = torch.zeros_like(idx, dtype=W.dtype)
        return autograd.functional.vjp(lambda w: weighted_rows(w, W, idx), w, x)[1]

    @staticmethod
    def backward(ctx, grad):
        x, W, idx = ctx.saved_tensors
        return None, autograd.functional.vjp(lambda W: weighted_rows(grad, W, idx), W, x)[1], None


class JacobianPenalty(autograd.Function):
    """Sum of |J|, or of |J| / its token's rms J, and its exact gradients: one pass over chunks, so that
    nothing of size B x n_latents or B x k x d_mlp is there. J = a d^T, where left = W_enc_y W_out, a =
    left[K_2], right = W_dec_x W^T, d = sum of c * right[K_1] (Eq. 16, 29). S, the gradient in J, gives
    left[K_2] S d and right[K_1] c * (S^T a). Tables may be bfloat16, sums have the mask's dtype."""

    @staticmethod
    def forward(ctx, penalty, mask, i_y, i_x, cs, left, *rights):
        k, d_mlp, dtype, total = i_y.shape[1], left.shape[1], mask.dtype, mask.new_zeros(())
        grads = [torch.zeros_like(table, dtype=dtype) for table in (left, *rights)]
        size = max(1, CHUNK.get(left.device.type, 2**29) // (k * d_mlp * dtype.itemsize))
        for i, j, m, *c in zip(*(t.split(size) for t in (i_y, i_x, mask, *cs))):
            i, j = i.flatten(), j.flatten()
            a = left.index_select(0, i).view(-1, k, d_mlp)  # (chunk, k, d_mlp)
            d, *gated = (right.index_select(0, j).view(-1, k, d_mlp) for right in rights)
            d = sum((f.to(d.dtype) * r for f, r in zip(c[1:], gated)), d.mul_(c[0].to(d.dtype)))
            J = a @ d.mT * m  # (chunk, k, k)
            S, absolute = J.sign(), J.abs()
            if {"l1": False, "l1_over_l2": True}[penalty]:
                l, r = absolute.mean((1, 2), True), J.square().mean((1, 2), True).sqrt()
                r += r == 0  # where no pair is active the penalty is 0
                S, absolute = (S - l / r**2 * J) / r, absolute / r  # dr/dJ = J / (k^2 r)
            total, back = total + absolute.sum(), S.mT @ a.to(dtype)
            grads[0].index_add_(0, i, (S @ d.to(dtype)).flatten(0, 1))
            for grad, factor in zip(grads[1:], c):
                grad.index_add_(0, j, (factor * back).flatten(0, 1))
        ctx.save_for_backward(*(grad.to(left.dtype) for grad in grads))
        return total

    @staticmethod
    def backward(ctx, grad):
        return *(None,) * 5, *(grad.to(g.dtype) * g for g in ctx.saved_tensors)


def jsae_loss(sae_x, sae_y, mlp, x, jacobian_coef, jacobian_fraction=1.0, jacobian_penalty="l1"):
    """Eq. 5 in the stable setup of D.1: y = f(x), phi' at the true x, s_y = e_y(y). x (B, d_model).
    -> (loss, parts). parts, detached: mse_x, mse_y (means over all elements), Latents s_x, s_y, and
    the penalty, without coefficient (absent at 0) and over a random share of the tokens: jacobian_l1,
    mean |J| over k x k, or jacobian_l1_over_l2, mean |J| / rms J of each token, the same for any scale
    of J: 1/k (one element) to 1 (all equal; 0: no pair). torch.autocast rules the large products."""
    x, loss, parts, device = x.detach().to(sae_x.W_enc.dtype), 0.0, {}, x.device.type
    low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    n = max(1, round(jacobian_fraction * len(x))) if jacobian_coef else 0
    t = torch.randperm(len(x), device=x.device)[:n] if 0 < n < len(x) else slice(n)
    y, derivative = mlp.linearize(x, t)
    with torch.autocast(device, enabled=False):
        for name, sae, v in (("x", sae_x, x), ("y", sae_y, y.to(x.dtype))):
            W, b = sae.W_enc.detach().to(low), sae.b_enc.detach().to(low)  # to choose the latents
            some = v.to(low).split(max(1, CHUNK.get(device, 2**29) // (len(W) * low.itemsize)))
            idx = torch.cat([F.linear(rows, W, b).topk(sae.k).indices for rows in some])
            acts = F.relu(Products.apply(v, sae.W_enc, idx) + sae.b_enc[idx])
            mse = F.mse_loss(weighted_rows(acts, sae.W_dec, idx) + sae.b_dec, v)
            loss = loss + mse
            parts |= {f"mse_{name}": mse.detach(), f"s_{name}": Latents(acts.detach(), idx)}
        if n:
            (acts_x, idx_x), (acts_y, idx_y) = ((v[t] for v in parts[s]) for s in ("s_x", "s_y"))
            mask = (acts_y > 0).unsqueeze(2) & (acts_x > 0).unsqueeze(1)  # (n, k, k)
            (rows_x, i_x), (rows_y, i_y) = (i.unique(return_inverse=True) for i in (idx_x, idx_y))
            left = sae_y.W_enc.index_select(0, rows_y).to(low) @ mlp.W_out.to(low)
            rows = sae_x.W_dec.index_select(0, rows_x).to(low)  # (latents in use, d_model)
            rights = [rows @ W.T.to(low) for _, W in derivative]  # (latents in use, d_mlp)
            cs = [c.unsqueeze(1).to(x.dtype) for c, _ in derivative]  # (n, 1, d_mlp)
            args = jacobian_penalty, mask.to(x.dtype), i_y, i_x, cs, left, *rights
            mean = JacobianPenalty.apply(*args) / mask.numel()
            loss, parts[f"jacobian_{jacobian_penalty}"] = loss + jacobian_coef * mean, mean.detach()
    return loss, parts


def load_language_model(config):
    """-> (model in float32, frozen; tokenizer or None). The control of section 5.3, from the seed:
    init re-draws every parameter as the model's own initialiser does, shuffle permutes each."""
    device = config.device.replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" else device
    places, load = (Path(config.model), HERE / config.model), transformers.AutoModelForCausalLM
    name, tokenizer = next((str(p) for p in places if p.exists()), config.model), None
    try:
        model = load.from_pretrained(name, dtype=torch.float32).to(device)
    except Exception as error:
        raise InputError(f"--model {config.model}, --device {config.device}: {error}") from error
    with suppress(OSError, ValueError, KeyError, ImportError):  # for text that comes as token ids
        found = transformers.AutoTokenizer.from_pretrained(name)  # which may know no words
        tokenizer = found if found("a", add_special_tokens=False).input_ids else None
    torch.manual_seed(config.seed)
    if config.randomize_weights == "init":
        model = load.from_config(model.config, dtype=torch.float32)
    for p in model.parameters() if config.randomize_weights == "shuffle" else ():
        p.data = p.data.flatten()[torch.randperm(p.numel())].view_as(p)
    return model.eval().requires_grad_(False).to(device), tokenizer


def load_documents(dataset, split):  # -> datasets.IterableDataset, whether it is local
    path, root = Path(dataset), Path(os.__file__).parent
    if dataset == "stdlib":  # but for what pip or the system installed; mixed, for its subjects
        names = [p.relative_to(root).as_posix() for p in root.rglob("*.py")]
        names = sorted((n for n in names if "-packages/" not in n), key=lambda n: crc32(n.encode()))
        text = {"stdlib": names, "text": [(root / n).read_text("utf-8", "replace") for n in names]}
        return datasets.Dataset.from_dict(text).to_iterable_dataset(), True
    if not path.exists() and path.suffix not in KINDS:
        return datasets.load_dataset(*dataset.split(":", 1), split=split, streaming=True), False
    files = [str(p) for p in (path, *sorted(path.rglob("*"))) if p.suffix in KINDS]
    found = {KINDS[Path(f).suffix] for f in files}
    check(len(found) == 1, f"expected files of one kind that end in {', '.join(KINDS)}")
    utf8 = {"encoding": "utf8", "encoding_errors": "replace"}  # "utf-8" would leave JSON undecoded
    options = {"text": utf8 | {"sample_by": "document"}, "json": utf8}.get(*found, {})
    return datasets.load_dataset(*found, data_files=files, streaming=True, **options)["train"], True


def token_contexts(config, model, tokenizer, held_out=False, skip=0, odd=None):
    """Yield contexts (context_size,) of token ids: BOS, then documents joined by end-of-text: held
    out or, but for the first `skip` contexts, to train on, which local text repeats; a process of
    torchrun has its share. Local text holds out the documents with crc32 (of a stdlib file's path,
    else of the text) 0 modulo 20, or the last 5 % of the contexts where that leaves one side empty.
    odd counts a pass's documents that are empty, long (cut up), not UTF-8 (U+FFFD)."""
    special, vocabulary = tokenizer or model.config, model.get_input_embeddings().weight.shape[0]
    bos, end = ([] if i is None else [i] for i in (special.bos_token_id, special.eos_token_id))
    odd, width = Counter() if odd is None else odd, config.context_size - len(bos or end)
    key = lambda d: d.get("stdlib") or d.get("text") or str(d.get("input_ids"))
    is_held_out = lambda d: crc32(key(d).encode("utf-8", "replace")) % 20 == 0

    def pack(documents, long=2**20):  # characters or tokens
        stream = np.int64([])
        while batch := list(islice(documents, 64)):
            column = "text" if tokenizer is not None and "text" in batch[0] else "input_ids"
            check(column in batch[0], f"{[*batch[0]]}: no input_ids, and no text with a tokenizer")
            ids = [document[column] or "" for document in batch]
            for v in ids:
                odd.update(empty=+(not v), long=+(len(v) > long), not_utf8=+("\ufffd" in v))
            ids = [v[i : i + long] for v in ids for i in range(0, len(v) or 1, long)]
            if column == "text":
                ids = tokenizer(ids, add_special_tokens=False, verbose=False).input_ids
            stream = np.concatenate([stream, *(np.int64([*i, *end]) for i in ids)])
            low, top = stream.min(initial=0), stream.max(initial=0)
            check(0 <= low <= top < vocabulary, f"ids {low} to {top}; expected < {vocabulary}")
            rows, stream = np.split(stream, [len(stream) // width * width])
            yield from (np.int64([*(bos or end), *row]) for row in rows.reshape(-1, width))

    try:
        documents, local = load_documents(config.dataset, config.split)
        whole = not local or len([*islice(groupby(documents, is_held_out), 2)]) < 2
        documents = documents if local and whole else split_dataset_by_node(documents, RANK, WORLD)
        while True:
            odd.clear()
            contexts, n = pack(d for d in documents if whole or is_held_out(d) == held_out), 0
            if local and whole:
                cut = -max(1, len(contexts := list(contexts)) // 20)
                contexts = contexts[cut:] if held_out else contexts[RANK:cut:WORLD]
            for n, context in enumerate(contexts, 1):
                if n > skip:
                    yield context
            if held_out or not local:
                return
            check(n * width * WORLD >= config.batch_size, f"{n} contexts are less than one batch")
            skip = max(0, skip - n) % n  # all passes are alike
            tqdm.write(f"{config.dataset} begins again after {n:,} contexts", sys.stderr)
    except Exception as error:  # of any library that reads text
        raise InputError(f"--dataset {config.dataset}: {str(error) or repr(error)}") from error


@torch.no_grad()
def mlp_inputs(model, mlp, ids):  # (contexts, T) -> x (contexts, T, d_model)
    def leave(_, args):  # the forward pass, at the MLP
        raise StopIteration(args[0])

    with mlp.sites[0].register_forward_pre_hook(leave):
        try:
            model(input_ids=ids, use_cache=False)
        except StopIteration as stop:
            return stop.value.reshape(*ids.shape, -1)


def activation_batches(config, model, mlp, tokenizer, autocast, done=0, odd=None, stop=()):
    """Yield the batches x (batch_size / processes, d_model) from number `done` on, shuffled in a
    buffer that is filled, used up, and filled anew; until the text ends or `stop` has a signal."""
    first, most = 0 if config.keep_first_token else 1, config.buffer_batches
    batch, steps = config.batch_size // WORLD, config.tokens // config.batch_size
    width = config.context_size - first
    n = [-(-batch * min(left, most) // width) for left in range(steps, 0, -most)]  # contexts each
    contexts = token_contexts(config, model, tokenizer, skip=sum(n[: done // most]), odd=odd)
    buffer = torch.empty(n[0], width, mlp.W_in.shape[1], device=model.device)
    for filling in range(done // most, len(n)):
        ids = [*islice(contexts, n[filling])]
        for i in range(0, len(ids), 16):
            if stop:
                return
            some = torch.tensor(np.stack(ids[i : i + 16]), device=model.device)
            with autocast():
                buffer[i : i + len(some)] = mlp_inputs(model, mlp, some)[:, first:]
        rows = buffer[: len(ids)].flatten(0, 1)[: batch * most]
        check(rows.isfinite().all(), f"NaN or Inf among the inputs x of layer {config.layer}'s MLP")
        order = np.random.default_rng([config.seed, RANK, filling]).permutation(len(rows))
        for some in torch.from_numpy(order).split(batch)[done % most : len(rows) // batch]:
            yield rows[some.to(rows.device)]
            done += 1


@torch.no_grad()
def measure(sae_x, sae_y, mlp, x):  # -> a row of metrics.jsonl, of 512 tokens
    x, y, row = x[:512], mlp(x[:512]), {}
    for s, sae, v in (("x", sae_x, x), ("y", sae_y, y)):
        row[f"mse_{s}"] = F.mse_loss(sae(v), v).item()
        row[f"ev_{s}"] = 1 - row[f"mse_{s}"] / (v.var(0, correction=0).mean().item() + 1e-30)
    J = active_jacobian(sae_x, sae_y, mlp, x, sae_x.encode(x), sae_y.encode(y)).abs()
    l, r = J.mean((1, 2)), J.square().mean((1, 2)).sqrt() + 1e-30
    row |= {"jacobian_l1": l.mean().item(), "jacobian_l1_over_l2": (l / r).mean().item()}
    return row | {"jacobian_above_0.01": (J > 0.01).sum().item() / len(J)}  # per token


def train(config: Config, graceful=False) -> Path:
    """Train a pair -> the run's folder. lr warms up over 1 % of the steps, lambda over 5 %; lr falls
    to 0 over the last 20 %. InputError if a setting, the text or a number breaks, KeyboardInterrupt
    (status, line) after a signal if graceful; both leave a checkpoint if there was a step."""
    out, batch = Path(config.output_dir), config.batch_size
    steps, fine = config.tokens // batch, config.tokens >= batch and batch % WORLD == 0
    check(fine, f"--tokens {config.tokens}, --batch-size {batch}: no batch for {WORLD} processes")
    model, tokenizer = load_language_model(config)
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    width = min(longest or config.context_size, config.context_size)
    config = dataclasses.replace(config, context_size=width)
    mlp, odd, stop = MLP.from_model(model, config.layer), Counter(), []
    info = open_run(config, mlp)
    if config.resume and (out / "sae_y").exists():  # the last to be written
        return out
    low = config.dtype == "bfloat16" or (config.dtype == "auto" and model.device.type == "cuda")
    autocast = partial(torch.autocast, model.device.type, torch.bfloat16, enabled=low)
    torch.manual_seed(config.seed)
    d_model, n_latents = mlp.W_in.shape[1], config.expansion_factor * mlp.W_in.shape[1]
    saes = nn.ModuleDict({s: TopKSAE(d_model, n_latents, config.k) for s in "xy"})
    saes.register_buffer("seen_at", torch.zeros(2, n_latents, dtype=torch.long))  # tokens
    pair, adam = saes.to(model.device).values(), torch.optim.Adam(saes.parameters(), fused=True)
    saes.forward = partial(jsae_loss, *pair)  # what DistributedDataParallel calls
    loss_of = nn.parallel.DistributedDataParallel(saes) if WORLD > 1 else saes
    done = load_checkpoint(out, saes, adam) if config.resume else 0
    start = saved = time.time()
    batches = activation_batches(config, model, mlp, tokenizer, autocast, done, odd, stop)
    for number in (signal.SIGINT, signal.SIGTERM) if graceful else ():
        signal.signal(number, lambda n, _: stop.append(128 + n) or signal.signal(n, signal.SIG_DFL))
    for step in (bar := tqdm(range(done + 1, steps + 1), initial=done, total=steps, disable=RANK)):
        try:
            x, why = next(batches, None), f"{config.dataset} ended, or another process stopped"
        except InputError as error:
            x, why = None, str(error)
        code = torch.tensor(max([int(x is None), *stop]))  # 0: go on, 1: no batch, 128 + a signal
        for t in (code, saes.seen_at) if WORLD > 1 else ():
            distributed.all_reduce(t, distributed.ReduceOp.MAX)
        if code or time.time() > saved + 60 * config.checkpoint_minutes:
            save_checkpoint(out, saes, adam, step - 1)
            saved = time.time()
        if code:
            bar.close()
            line = f"stopped at step {step - 1}" if code > 1 else f"step {step}: {why}"
            line += "; --resume goes on" * (step > 1)
            raise KeyboardInterrupt(int(code), line) if code > 1 else InputError(line)
        if step == 1 and RANK == 0:  # not before it is known that the data can be read
            for path in [p for p in out.glob("*") if p.name != "config.json"]:  # an earlier run
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            write_file(out / "config.json", json.dumps(info, indent=2).encode())
            write_file(out / "metrics.jsonl", b"")
        lr = config.lr * min(1, step / (0.01 * steps), (steps - step + 1) / (0.2 * steps))
        coef, tokens = config.jacobian_coef * min(1, step / (0.05 * steps)), step * batch
        adam.param_groups[0]["lr"] = lr
        torch.manual_seed((config.seed * steps + step) * WORLD + RANK)  # for jacobian_fraction
        with autocast():
            loss, parts = loss_of(mlp, x, coef, config.jacobian_fraction, config.jacobian_penalty)
        adam.zero_grad()
        loss.backward()
        norm = nn.utils.get_total_norm([p.grad for p in saes.parameters()])
        if not (loss + norm).isfinite():
            save_checkpoint(out, saes, adam, step - 1)
            bar.close()
            bad = [name for name, p in saes.named_parameters() if not p.grad.isfinite().all()]
            raise InputError(f"step {step}: loss {loss.item()}, NaN or Inf in gradients of {bad}")
        nn.utils.clip_grads_with_norm_(saes.parameters(), 1.0, norm)
        adam.step()
        for sae, seen_at, (acts, idx) in zip(pair, saes.seen_at, (parts["s_x"], parts["s_y"])):
            sae.W_dec.data = F.normalize(sae.W_dec.data)
            seen_at[idx[acts > 0]] = tokens
        if RANK == 0 and (step % max(1, min(50, steps // 10)) == 0 or step == steps):
            row, seconds = measure(*pair, mlp, x), time.time() - start
            bar.set_postfix(row)
            row["dead_x"], row["dead_y"] = (saes.seen_at <= max(0, tokens - 10**7)).sum(1).tolist()
            row |= {"step": step, "tokens": tokens, "lr": lr, "coef": coef, "seconds": seconds}
            row |= {"grad_norm": norm.item(), "tokens_per_second": (step - done) * batch / seconds}
            with open(out / "metrics.jsonl", "a") as log:
                log.write(json.dumps(row | {"odd_documents": odd}) + "\n")
    if RANK == 0:
        names = {module: name for name, module in model.named_modules()}
        save_pair(out, pair, config, [names[site] for site in mlp.sites])
        shutil.rmtree(out / "checkpoint", ignore_errors=True)
    return out


def open_run(config, mlp):
    """-> what config.json is to hold. InputError if the folder is taken, or has no such run."""
    out, saved = Path(config.output_dir), {}
    info = {"config": dataclasses.asdict(config), "processes": WORLD}
    info["mlp_sha256"] = hashlib.sha256(safetensors.torch.save(mlp.state_dict())).hexdigest()
    info["versions"] = {m.__name__: m.__version__ for m in (torch, transformers, datasets, np)}
    with suppress(OSError, ValueError, TypeError, LookupError):
        saved = {**(found := json.loads((out / "config.json").read_text())), **found["config"]}
    ours, held = "mlp_sha256" in saved, [p for p in out.glob("*") if p.suffix != ".tmp"]
    check(ours or not config.resume, f"--resume: {out} holds no run (no config.json)")
    free = (ours and (config.resume or config.overwrite)) or not (held or out.is_file())
    check(free, f"--output-dir {out} is taken; --overwrite replaces a run, and only a run")
    ignored = ("config", "versions", "resume", "overwrite", "output_dir", "checkpoint_minutes")
    for name, value in (info | info["config"]).items() if config.resume else ():
        before = saved.get(name, getattr(Config, name, None))
        check(name in ignored or before == value, f"--resume: {name} was {before!r}, now {value!r}")
    return info


def save_checkpoint(folder, saes, adam, step):  # and keep only the newest two
    if RANK == 0 < step:
        tensors = saes.state_dict()
        for name, p in saes.named_parameters():
            tensors |= {f"{name}.{key}": t for key, t in adam.state[p].items()}
        data = safetensors.torch.save(tensors)
        name = f"{step:09}-{hashlib.sha256(data).hexdigest()}.safetensors"
        write_file(folder / "checkpoint" / name, data)
        newest = sorted(folder.glob("checkpoint/*.safetensors"))[-2:]
        for path in {*folder.glob("checkpoint/*")} - {*newest}:
            path.unlink()


def load_checkpoint(folder, saes, adam):
    """Load the newest whole checkpoint, cut metrics.jsonl back to it -> its step; 0 without one."""
    for path in (paths := sorted(folder.glob("checkpoint/[0-9]*-*.safetensors"), reverse=True)):
        (step, sha256), data = path.stem.split("-"), path.read_bytes()
        if hashlib.sha256(data).hexdigest() == sha256:
            tensors = safetensors.torch.load(data)
            for name, p in saes.named_parameters():
                keys = ("step", "exp_avg", "exp_avg_sq")
                adam.state[p] = {key: tensors.pop(f"{name}.{key}").to(p.device) for key in keys}
            saes.load_state_dict(tensors)
            rows = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
            rows = [r for r in rows if r.endswith("}\n") and json.loads(r)["step"] <= int(step)]
            if RANK == 0:
                write_file(folder / "metrics.jsonl", "".join(rows).encode())
            return int(step)
        tqdm.write(f"{path} is damaged and left out", sys.stderr)
    check(not paths, f"no whole checkpoint in {folder / 'checkpoint'}; --overwrite starts anew")
    return 0


def write_file(path, data):  # whole, or what was there stays
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(path.name + ".tmp"), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)


def save_pair(folder, pair, config, sites):  # in the format of SAELens 6, each whole or not at all
    metadata = {"sae_lens_version": "6.0.0", "model_name": config.model, "prepend_bos": True}
    for s, sae, site in zip("xy", pair, (sites[0], sites[-1])):
        cfg = {"architecture": "topk", "d_in": sae.d_model, "d_sae": sae.n_latents, "k": sae.k}
        cfg |= {"apply_b_dec_to_input": False, "dtype": "float32", "device": "cpu"}
        cfg["metadata"] = metadata | {"hook_name": site, "context_size": config.context_size}
        tensors = sae.state_dict() | {"W_enc": sae.W_enc.detach().T.contiguous()}  # (d_in, d_sae)
        target, part = folder / f"sae_{s}", folder / f"sae_{s}.tmp"
        write_file(part / "cfg.json", json.dumps(cfg, indent=2).encode())
        write_file(part / "sae_weights.safetensors", safetensors.torch.save(tensors))
        shutil.rmtree(target, ignore_errors=True)
        os.replace(part, target)


def load_run(path_or_hub_id):
    """-> (sae_x, sae_y, config) of a finished run: a folder, or the id of a hub repository."""
    path, saes = Path(path_or_hub_id), []
    try:
        folder = path if path.is_dir() else Path(snapshot_download(path.as_posix()))
        config = Config(**json.loads((folder / "config.json").read_text())["config"])
        for s in "xy":
            tensors = safetensors.torch.load_file(folder / f"sae_{s}" / "sae_weights.safetensors")
            saes.append(TopKSAE(*tensors["W_enc"].shape, config.k))
            saes[-1].load_state_dict(tensors | {"W_enc": tensors["W_enc"].T})
    except Exception as error:
        raise InputError(f"{path_or_hub_id} is not a finished run ({error})") from error
    return *saes, config


def status_of(error, program):  # the exit status, after one line about it
    if isinstance(error, SystemExit):
        return error.code or 0
    stopped = error.args or (130, "interrupted")
    status, line = stopped if isinstance(error, KeyboardInterrupt) else (2, f"error: {error}")
    print(f"{program}:", " ".join(line.split()), file=sys.stderr)
    return status


def main(argv=None) -> int:
    """-> exit status: 0, 2 after one line about what was given, 130 or 143 after a signal."""
    argv = sys.argv[1:] if argv is None else argv
    parser = HfArgumentParser(Config, prog="jsae.py", allow_abbrev=False)
    parser.print_usage = lambda file: None  # an error is one line
    demo = not any(a.split("=")[0] in ("--model", "--help", "-h") for a in argv)
    parser.set_defaults(**(DEMO if demo else {}))
    try:
        config = Config(**vars(parser.parse_args(argv)))
        fine = not demo or (HERE / config.model).is_dir()
        check(fine, f"no {config.model} here; try --model EleutherAI/pythia-70m --layer 3")
        distributed.init_process_group() if WORLD > 1 else None
        if RANK == 0:
            print("settings:", ", ".join(f"{name} {getattr(config, name)}" for name in DEMO))
        run_dir = train(config, graceful=True)
    except (InputError, OSError, torch.OutOfMemoryError, KeyboardInterrupt, SystemExit) as error:
        return status_of(error, "jsae.py")
    if RANK == 0:
        last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
        for name in ("ev_x", "ev_y", "jacobian_l1", "jacobian_above_0.01", "tokens_per_second"):
            print(f"{name:22} {last[name]:,.4g}")
        print(f"{'evaluate it with':22} python {HERE / 'evaluate.py'} {run_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
