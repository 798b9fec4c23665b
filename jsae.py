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

phi' is taken at the true x (D.1). The README has all readings of the paper, with reasons.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import sys
import time
import zlib
from contextlib import suppress
from functools import partial
from itertools import count, groupby, islice, permutations, product
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
from transformers.hf_argparser import HfArg, HfArgumentParser


class InputError(ValueError):
    """What was given cannot be used. One line: what was given, what was expected, what to do."""


# ---- Configuration -------------------------------------------------------------------------------
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
    jacobian_fraction: float = HfArg(default=1.0, help="share of tokens in the Jacobian term")
    lr: float = HfArg(default=5e-4, help="Adam's learning rate")
    batch_size: int = HfArg(default=4096, help="tokens per training step")
    context_size: int = HfArg(default=2048, help="tokens per context, at most the model's")
    buffer_batches: int = HfArg(default=32, help="batches of activations shuffled together")
    keep_first_token: bool = HfArg(default=False, help="do not leave out contexts' first token")
    randomize_weights: str = HfArg(default="none", help="random control: none, init or shuffle")
    seed: int = HfArg(default=0, help="of the SAEs, the shuffling and the random control")
    device: str = HfArg(default="auto", help="auto, cpu, cuda, cuda:1, ...")
    dtype: str = HfArg(default="auto", help="large products; auto: bfloat16 on CUDA, else float32")
    output_dir: str = HfArg(default="", help="the run's folder; default: in runs/, by settings")
    overwrite: bool = HfArg(default=False, help="replace the run that the folder holds")

    def __post_init__(self):
        least, control = {"layer": 0, "seed": 0, "context_size": 2}, self.randomize_weights
        rules = {
            "lr": (0 < self.lr < torch.inf, "a finite number above 0"),
            "jacobian_coef": (0 <= self.jacobian_coef < torch.inf, "a finite number, 0 or more"),
            "jacobian_fraction": (0 < self.jacobian_fraction <= 1, "a number above 0, at most 1"),
            "randomize_weights": (control in ("none", "init", "shuffle"), "none, init or shuffle"),
            "dtype": (self.dtype in ("auto", "float32", "bfloat16"), "auto, float32 or bfloat16"),
        }
        for name, kind in Config.__annotations__.items():
            value, low = getattr(self, name), least.get(name, 1)
            whole = isinstance(value, int) and value >= low, f"a whole number, {low} or more"
            fine, expected = whole if kind is int else rules.get(name, (True, ""))
            if not fine:
                raise InputError(f"--{name.replace('_', '-')} is {value!r}; expected {expected}")

    @property
    def run_dir(self) -> Path:
        """output_dir, or a folder in runs/ named after the settings that studies vary."""
        name = f"{Path(self.model).name}-L{self.layer}-R{self.expansion_factor}-k{self.k}"
        end = f"{self.randomize_weights}-seed{self.seed}".removeprefix("none-")
        return Path(self.output_dir or f"runs/{name}-lambda{self.jacobian_coef:g}-{end}")


HERE = Path(__file__).resolve().parent
# Without --model: about two minutes on two cores. Any flag given still wins.
DEMO = {"model": "assets/tiny-pythia", "layer": 2, "dataset": "stdlib", "context_size": 256}
DEMO |= {"tokens": 1_200_000, "batch_size": 2048, "lr": 3e-3, "k": 16, "expansion_factor": 4}


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
        return (latents.acts.unsqueeze(-2) @ self.W_dec[latents.idx]).squeeze(-2) + self.b_dec

    def forward(self, x):
        return self.decode(self.encode(x))


# ---- The MLP and its derivative ------------------------------------------------------------------
LINEAR = (nn.Linear, transformers.Conv1D)
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
tanh_gelu, C = partial(F.gelu, approximate="tanh"), (8 / torch.pi) ** 0.5
ACTIVATIONS = (  # (phi, phi')
    (F.gelu, lambda z: torch.special.ndtr(z) + z * torch.exp(-0.5 * z * z) / (2 * torch.pi) ** 0.5),
    (tanh_gelu, lambda z: swish_grad(z, C * (z + 0.044715 * z**3), C * (1 + 0.134145 * z * z))),
    (lambda z: z * torch.sigmoid(1.702 * z), lambda z: swish_grad(z, 1.702 * z, 1.702)),
    (F.silu, lambda z: swish_grad(z, z, 1)),
    (F.relu, lambda z: (z > 0).to(z.dtype)),
    (lambda z: F.relu(z) ** 2, lambda z: 2 * F.relu(z)),
)


def swish_grad(z, u, du):  # d/dz of z sigmoid(u), where du = du/dz
    return torch.sigmoid(u) * (1 + z * torch.sigmoid(-u) * du)


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
        where = f"layer {layer} of {type(model).__name__}"
        if not lists or not 0 <= layer < n_layers:
            raise InputError(f"there is no {where}; --layer takes 0 to {n_layers - 1}")
        ids = model.dummy_inputs["input_ids"].to(model.device)
        return find_mlp(lists[0][layer], partial(model, input_ids=ids, use_cache=False), where)

    @classmethod
    def from_module(cls, module) -> "MLP":
        """The MLP that module(x) computes. ValueError if it is not one dense MLP."""
        maps = [m for m in module.modules() if isinstance(m, LINEAR)]
        if not maps:
            raise InputError(f"{type(module).__name__} has no linear map; expected a dense MLP")
        W = maps[0].weight.T if isinstance(maps[0], nn.Linear) else maps[0].weight  # (in, out)
        x = torch.randn(2, 16, len(W), generator=torch.Generator().manual_seed(0)).to(W)
        return find_mlp(module, partial(module, x), type(module).__name__)


@torch.no_grad()
def find_mlp(block, run, where) -> MLP:
    """The MLP in `block`: two or three linear maps, children of one module, that run() calls. Every
    reading (which map, or half of one, is which; which function is phi) is tried on what entered
    and left the maps; the one that reproduces it, up to TOLERANCE, is returned."""
    names = " ".join(f"{name} {type(m).__name__}" for name, m in block.named_modules()).lower()
    if "expert" in names or "moe" in names:
        raise InputError(f"{where} is a mixture of experts; expected one dense MLP")
    seen, inside = {}, list(block.modules())

    def observe(module, args, output):  # copies, because models may add to x and y in place
        if module in inside and isinstance(module, LINEAR):
            W = module.weight if isinstance(module, nn.Linear) else module.weight.T  # (out, in)
            seen[module] = W, module.bias, args[0].clone(), output.clone()

    with nn.modules.module.register_module_forward_hook(observe):
        run()
    others, acts = [m for m in inside if m not in seen], {}
    for f in [f for m in others for f in (m, *vars(m).values())] + [phi for phi, _ in ACTIVATIONS]:
        with suppress(TypeError, ValueError, RuntimeError, AttributeError, LookupError):
            acts[with_derivative(f)[0]] = None  # f is an elementwise function of one tensor
    for act, parent in product(acts, others):
        maps = [m for m in parent.children() if m in seen]
        for *readers, down in permutations(maps) if len(maps) in (2, 3) else ():
            (W_out, b_out, _, y), whole = seen[down], [seen[m][:2] for m in readers]
            (W, b), *_ = whole  # may hold W_in and W_gate, in either order
            halves = list(zip(W.chunk(2), (None, None) if b is None else b.chunk(2)))
            for up, *gate in (whole, halves, halves[::-1]):
                if all(W.T.shape == W_out.shape for W, _ in (up, *gate)):
                    mlp = MLP(*up, W_out, b_out, *(gate[0] if gate else ()), act=act)
                    mlp.sites = (*sorted(readers, key=list(seen).index), down)
                    x = seen[readers[0]][2].to(mlp.W_in.dtype)
                    if (mlp(x) - y).norm() <= TOLERANCE[y.dtype] * y.norm():
                        return mlp
    raise InputError(f"{where} has no single dense MLP, plain or gated, that can be reproduced")


# ---- The Jacobian (section 4.2, appendix A) ------------------------------------------------------
def active_jacobian(sae_x, sae_y, mlp, x, s_x, s_y):
    """J[..., i, j] = d s_y,i / d s_x,j of the active latents (..., k, k). Eq. 16; Eq. 29 if gated.
    The MLP is linearised at x (..., d_model): the true input in the stable setup (D.1), x_hat in
    the paper's literal f_s. Rows and columns of latents that ReLU switched off are 0."""
    left = sae_y.W_enc[s_y.idx] @ mlp.W_out  # (..., k, d_mlp)
    right = sum(c.unsqueeze(-2) * (sae_x.W_dec[s_x.idx] @ W.T) for c, W in mlp.linearize(x)[1])
    return left @ right.mT * (s_y.acts > 0).unsqueeze(-1) * (s_x.acts > 0).unsqueeze(-2)


# The same at the speed of the hardware, with nothing of size B x n_latents or B x k x d_mlp.
def chunks(B, bytes_per_token, x):
    """Slices of range(B), of tokens whose work fits the cache of a CPU or keeps a GPU busy."""
    size = max(1, 2 ** (29 if x.is_cuda else 23) // bytes_per_token)
    return [slice(i, i + size) for i in range(0, B, size)]


def top_k(z, k):
    """Indices of the k largest of each row, (B, n) -> (B, k), in two stages: they lie in those k
    columns of the row's (groups, n / groups) table that have the largest maxima."""
    groups = 32 if z.shape[1] % 32 == 0 and z.shape[1] >= 32 * k else 1
    table = z.unflatten(1, (groups, -1))
    column = table.amax(1).topk(k).indices  # (B, k)
    i = table.gather(2, column.unsqueeze(1).expand(-1, groups, -1)).flatten(1).topk(k).indices
    return i // k * table.shape[2] + column.gather(1, i % k)


def weighted_rows(w, W, idx):  # sum_i w[b, i] W[idx[b, i]]: (B, d)
    return F.embedding_bag(idx, W, per_sample_weights=w, mode="sum")


class Encode(torch.autograd.Function):
    """TopKSAE.encode for constant x, with a backward pass that touches k rows per token.
    z[b, i] = x[b] . W[idx[b, i]] is the derivative of x . weighted_rows(w, W, idx) in w, and the
    gradient that W gets from z is that of weighted_rows with the gradient of z as weights."""

    @staticmethod
    @torch.enable_grad()
    def forward(ctx, x, W, b, k, low):
        W, b = W.detach(), b.detach()
        rows, low_W, low_b = x.to(low), W.to(low), b.to(low)  # for the choice of latents alone
        slices = chunks(len(x), len(W) * low.itemsize, x)
        idx = torch.cat([top_k(F.linear(rows[t], low_W, low_b), k) for t in slices])
        w = torch.zeros_like(idx, dtype=W.dtype, requires_grad=True)
        acts = F.relu(torch.autograd.grad(weighted_rows(w, W, idx), w, x)[0] + b[idx])
        ctx.save_for_backward(x, W, acts, idx)
        return acts, idx

    @staticmethod
    @torch.enable_grad()
    def backward(ctx, grad, _):
        x, W, acts, idx = ctx.saved_tensors
        grad, W = (grad * (acts > 0)).detach(), W.detach().requires_grad_()
        grad_b = grad.new_zeros(len(W)).index_add_(0, idx.flatten(), grad.flatten())
        return None, torch.autograd.grad(weighted_rows(grad, W, idx), W, x)[0], grad_b, None, None


class JacobianL1(torch.autograd.Function):
    """Sum of |J| and its exact gradients, from one pass over chunks of tokens. With left = W_enc_y
    W_out and right = W_dec_x W^T, a token's J is a d^T: a = left[K_2], d = sum of c * right[K_1]
    (Eq. 16, 29). The gradient of sum |J| is S, its signs: left[K_2] gets S d, right[K_1] gets
    c * (S^T a). J has the dtype of the tables; sums and gradients have that of the mask."""

    @staticmethod
    def forward(ctx, mask, i_y, i_x, cs, left, *rights):
        (B, k), d_mlp, dtype, total = i_y.shape, left.shape[1], mask.dtype, mask.new_zeros(())
        grads = [torch.zeros_like(table, dtype=dtype) for table in (left, *rights)]
        for t in chunks(B, k * d_mlp * dtype.itemsize, left):
            i, j, c = i_y[t].flatten(), i_x[t].flatten(), [c[t] for c in cs]
            a = left.index_select(0, i).view(-1, k, d_mlp)  # (chunk, k, d_mlp)
            d, *gated = (right.index_select(0, j).view(-1, k, d_mlp) for right in rights)
            d = sum((f.to(d.dtype) * r for f, r in zip(c[1:], gated)), d.mul_(c[0].to(d.dtype)))
            J = a @ d.mT * mask[t]  # (chunk, k, k)
            total, S = total + J.abs().sum(), J.sign()
            back = S.mT @ a.to(dtype)
            grads[0].index_add_(0, i, (S @ d.to(dtype)).flatten(0, 1))
            for grad, factor in zip(grads[1:], c):
                grad.index_add_(0, j, (factor * back).flatten(0, 1))
        ctx.save_for_backward(*(grad.to(left.dtype) for grad in grads))
        return total

    @staticmethod
    def backward(ctx, grad):
        return None, None, None, None, *(grad.to(g.dtype) * g for g in ctx.saved_tensors)


def jsae_loss(sae_x, sae_y, mlp, x, jacobian_coef, jacobian_fraction=1.0):
    """Eq. 5 in the stable setup of D.1: y = f(x), phi' at the true x, s_y = e_y(y). x (B, d_model).
    -> (loss, parts). parts, detached: mse_x, mse_y (means over all elements), Latents s_x, s_y, and
    jacobian_l1: mean |J| over k x k and a random share jacobian_fraction of the tokens, without the
    coefficient (absent at 0). Under torch.autocast its dtype serves the large products only."""
    x, loss, parts = x.detach().to(sae_x.W_enc.dtype), 0.0, {}
    device = x.device.type
    low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    n = max(1, round(jacobian_fraction * len(x))) if jacobian_coef else 0
    t = torch.randperm(len(x), device=x.device)[:n] if 0 < n < len(x) else slice(n)
    y, derivative = mlp.linearize(x, t)
    with torch.autocast(device, enabled=False):
        for name, sae, v in (("x", sae_x, x), ("y", sae_y, y.to(x.dtype))):
            acts, idx = Encode.apply(v, sae.W_enc, sae.b_enc, sae.k, low)
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
            mean = JacobianL1.apply(mask.to(x.dtype), i_y, i_x, cs, left, *rights) / mask.numel()
            loss, parts["jacobian_l1"] = loss + jacobian_coef * mean, mean.detach()
    return loss, parts


# ---- Language model, text, activations -----------------------------------------------------------
def load_language_model(config):
    """-> (model in float32, frozen; tokenizer or None). The control of section 5.3, from the seed:
    init re-draws every parameter as the model's own initialiser does, shuffle permutes each."""
    device = config.device.replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if device not in ["cpu", *["cuda"][: len(gpus)], *gpus]:
        raise InputError(f"--device {device} is not available here; expected cpu or cuda")
    places, load = (Path(config.model), HERE / config.model), transformers.AutoModelForCausalLM
    name, tokenizer = next((str(p) for p in places if p.exists()), config.model), None
    try:
        model = load.from_pretrained(name, dtype=torch.float32)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(f"--model {config.model} is no causal LM that loads ({error})") from error
    with suppress(OSError, ValueError, KeyError, ImportError):  # for text that comes as token ids
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    torch.manual_seed(config.seed)
    if config.randomize_weights == "init":
        model = load.from_config(model.config, dtype=torch.float32)
    for p in model.parameters() if config.randomize_weights == "shuffle" else ():
        p.data = p.data.flatten()[torch.randperm(p.numel())].view_as(p)
    return model.eval().requires_grad_(False).to(device), tokenizer


def load_documents(dataset, split):
    """-> (documents, local): dicts with "text" or "input_ids", to be iterated over repeatedly."""
    path, root = Path(dataset), Path(os.__file__).parent
    kinds = {"txt": "text", "jsonl": "json", "zst": "json", "parquet": "parquet", "arrow": "arrow"}
    if dataset == "stdlib":
        names = [p.relative_to(root).as_posix() for p in root.rglob("*.py")]
        names = [n for n in names if "-packages/" not in n]  # what pip or the system installed
        names.sort(key=lambda n: zlib.crc32(n.encode()))  # mixes the subjects
        return [{"path": n, "text": (root / n).read_text("utf-8", "replace")} for n in names], True
    if not path.exists() and path.suffix[1:] not in kinds:
        return datasets.load_dataset(*dataset.split(":", 1), split=split, streaming=True), False
    files = [str(p) for p in (path, *sorted(path.rglob("*"))) if p.suffix[1:] in kinds]
    found = {kinds[Path(f).suffix[1:]] for f in files}
    if len(found) != 1:
        raise InputError(f"expected files of one kind that end in .{', .'.join(kinds)}")
    options = {"data_files": files, "split": "train", "streaming": True}
    options |= {"sample_by": "document", "encoding_errors": "replace"} if "text" in found else {}
    return datasets.load_dataset(*found, **options), True


def pack(documents, tokenizer, model, context_size):
    """Yield contexts (context_size,) of token ids: BOS, then documents joined by end-of-text."""
    special, vocabulary = tokenizer or model.config, model.get_input_embeddings().weight.shape[0]
    bos, end = ([] if i is None else [i] for i in (special.bos_token_id, special.eos_token_id))
    stream, width, documents = np.int64([]), context_size - len(bos or end), iter(documents)
    while batch := list(islice(documents, 64)):
        text = tokenizer is not None and "text" in batch[0]
        if not text and "input_ids" not in batch[0]:
            raise InputError(f"columns {[*batch[0]]}; expected input_ids, or text and a tokenizer")
        ids = [document["text" if text else "input_ids"] or "" for document in batch]
        ids = tokenizer(ids, add_special_tokens=False, verbose=False).input_ids if text else ids
        stream = np.concatenate([stream, *(np.array([*i, *end], dtype=np.int64) for i in ids)])
        if len(stream) and not 0 <= stream.min() <= stream.max() < vocabulary:
            raise InputError(f"token ids up to {stream.max()}; expected 0 to {vocabulary - 1}")
        rows, stream = np.split(stream, [len(stream) // width * width])
        yield from (np.int64([*(bos or end), *row]) for row in rows.reshape(-1, width))


def token_contexts(config, model, tokenizer, context_size, held_out=False):
    """Yield the contexts of the training text or of the held-out text; local training text repeats.
    Local text holds out the documents whose crc32 (of the path in stdlib, else of the text) is 0
    modulo 20, or the last 5 % of the contexts where that leaves one side empty."""

    def is_held_out(document):
        key = document.get("path") or document.get("text") or str(document.get("input_ids"))
        return zlib.crc32(key.encode("utf-8", "replace")) % 20 == 0

    try:
        documents, local = load_documents(config.dataset, config.split)
        by_document = local and len([*islice(groupby(documents, is_held_out), 2)]) == 2
        for _ in count() if local and not held_out else range(1):
            chosen = (d for d in documents if not by_document or is_held_out(d) == held_out)
            contexts, n = pack(chosen, tokenizer, model, context_size), 0
            if local and not by_document:
                cut = -max(1, len(contexts := list(contexts)) // 20)
                contexts = contexts[cut:] if held_out else contexts[:cut]
            for n, context in enumerate(contexts, 1):
                yield context
            if not held_out and n * context_size < config.batch_size:
                raise InputError(f"{n * context_size} tokens; one batch needs {config.batch_size}")
            tqdm.write(f"{config.dataset} ended after {n:,} contexts", sys.stderr)
    except Exception as error:  # of any library that reads text
        raise InputError(f"--dataset {config.dataset}: {error}") from error


@torch.no_grad()
def mlp_inputs(model, mlp, ids):
    """Token ids (contexts, T) -> x (contexts, T, d_model). Leaves the forward pass at the MLP."""

    def leave(_, args):
        raise StopIteration(args[0])

    with mlp.sites[0].register_forward_pre_hook(leave):
        try:
            model(input_ids=ids, use_cache=False)
        except StopIteration as stop:
            return stop.value.reshape(*ids.shape, -1)


def activation_batches(config, model, mlp, contexts, steps, autocast):
    """Yield up to `steps` batches x (batch_size, d_model), shuffled in a buffer that is used up."""
    shuffle, skip = torch.Generator().manual_seed(config.seed), 0 if config.keep_first_token else 1
    batch, most, width = config.batch_size, config.buffer_batches, config.context_size - skip
    buffer = torch.empty(batch * min(steps, most), mlp.W_in.shape[1], device=model.device)
    for left in range(steps, 0, -most):
        size, filled = batch * min(left, most), 0
        while filled < size and (some := [*islice(contexts, min(16, -((filled - size) // width)))]):
            with autocast():
                x = mlp_inputs(model, mlp, torch.tensor(np.stack(some), device=model.device))
            x = x[:, skip:].flatten(0, 1)[: size - filled]
            buffer[filled : filled + len(x)] = x
            filled += len(x)
        if not buffer[:filled].isfinite().all():
            raise InputError(f"NaN or Inf among the inputs of the MLP in layer {config.layer}")
        for rows in torch.randperm(filled, generator=shuffle).split(batch)[: filled // batch]:
            yield buffer[rows.to(buffer.device)]


# ---- Training (appendix D) -----------------------------------------------------------------------
@torch.no_grad()
def measure(sae_x, sae_y, mlp, x, parts):
    """Reconstruction on a batch; mean |J| and the number of |J| > 0.01 per token on 512 of it."""
    s_x, s_y = (Latents(*(v[:512] for v in parts[s])) for s in ("s_x", "s_y"))
    J = active_jacobian(sae_x, sae_y, mlp, x[:512], s_x, s_y).abs()
    row = {"jacobian_l1": J.mean().item(), "jacobian_above_0.01": (J > 0.01).sum().item() / len(J)}
    for s, v in (("x", x), ("y", mlp(x))):
        row[f"mse_{s}"] = parts[f"mse_{s}"].item()
        row[f"ev_{s}"] = 1 - row[f"mse_{s}"] / (v - v.mean(0)).square().mean().item()
    return row


def train(config: Config) -> Path:
    """Train a pair, write and return the run's folder. Warm-up: lr 1 % of the steps, lambda 5 %; lr
    falls to 0 over the last 20 %. InputError if a setting cannot be used, the text ends or a number
    breaks: checkpoint/ has what was trained."""
    out, held = config.run_dir, {path.name for path in config.run_dir.glob("*")}
    replaceable = config.overwrite and {"config.json", "metrics.jsonl"} <= held
    if out.is_file() or (held and not replaceable):
        raise InputError(f"--output-dir {out} is taken; --overwrite replaces a run, and only a run")
    model, tokenizer = load_language_model(config)
    low = config.dtype == "bfloat16" or (config.dtype == "auto" and model.device.type == "cuda")
    autocast = partial(torch.autocast, model.device.type, torch.bfloat16, enabled=low)
    mlp = MLP.from_model(model, config.layer)
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    context_size = min(config.context_size, longest or config.context_size)
    if context_size < config.context_size:
        tqdm.write(f"contexts are clamped to {longest} tokens, the model's maximum", sys.stderr)
    contexts = token_contexts(config, model, tokenizer, context_size)
    batch, steps, step = config.batch_size, config.tokens // config.batch_size, 0
    batches = activation_batches(config, model, mlp, contexts, steps, autocast)
    torch.manual_seed(config.seed)
    d_model, n_latents = mlp.W_in.shape[1], config.expansion_factor * mlp.W_in.shape[1]
    saes = nn.ModuleList(TopKSAE(d_model, n_latents, config.k) for _ in "xy").to(model.device)
    adam = torch.optim.Adam(saes.parameters(), fused=True)
    seen_at = torch.zeros(2, n_latents, dtype=torch.long, device=model.device)  # tokens
    bar, start = tqdm(total=steps * batch, unit="tok", unit_scale=True, mininterval=1), time.time()
    try:
        for step, x in enumerate(batches, 1):
            if step == 1:  # nothing is written before it is known that the data can be read
                info = start_run(config, model, mlp, tokenizer, context_size)
            tokens, coef = step * batch, config.jacobian_coef * min(1, step / (0.05 * steps))
            lr = config.lr * min(1, step / (0.01 * steps), (steps - step + 1) / (0.2 * steps))
            adam.param_groups[0]["lr"] = lr
            with autocast():
                loss, parts = jsae_loss(*saes, mlp, x, coef, config.jacobian_fraction)
            adam.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(saes.parameters(), 1.0)
            if not (loss + norm).isfinite():
                raise InputError(f"the loss is {loss.item()}, the gradients' norm {norm.item()}")
            adam.step()
            for sae, at, (acts, idx) in zip(saes, seen_at, (parts["s_x"], parts["s_y"])):
                sae.W_dec.data = F.normalize(sae.W_dec.data)
                at[idx[acts > 0]] = tokens
            bar.update(batch)
            if step % max(1, min(50, steps // 10)) == 0 or step == steps:
                row, seconds = measure(*saes, mlp, x, parts), time.time() - start
                row["dead_x"], row["dead_y"] = (seen_at <= max(0, tokens - 10**7)).sum(1).tolist()
                bar.set_postfix(row)
                row |= {"step": step, "tokens": tokens, "seconds": seconds, "lr": lr, "coef": coef}
                row |= {"grad_norm": norm.item(), "tokens_per_second": tokens / seconds}
                with open(out / "metrics.jsonl", "a") as log:
                    log.write(json.dumps(row) + "\n")
        if step < max(1, steps):
            raise InputError(f"{config.dataset} and --tokens {config.tokens} give {step} batches")
    except InputError as error:
        if step == 0:
            raise
        save_pair(out / "checkpoint", saes, info)
        raise InputError(f"step {step}: {error} (last good weights: checkpoint/)") from error
    finally:
        bar.close()
    save_pair(out, saes, info)
    return out


# ---- Run directories -----------------------------------------------------------------------------
def start_run(config, model, mlp, tokenizer, context_size):
    """Empty the run's folder, start config.json and metrics.jsonl, return what the first says."""
    shutil.rmtree(config.run_dir, ignore_errors=True)
    names = {module: name for name, module in model.named_modules()}
    info = {"config": dataclasses.asdict(config), "context_size": context_size}
    info["mlp_sha256"] = hashlib.sha256(safetensors.torch.save(mlp.state_dict())).hexdigest()
    info["sites"] = {"x": names[mlp.sites[0]], "y": names[mlp.sites[-1]]}  # x enters, y leaves
    info["prepend_bos"] = tokenizer is not None and tokenizer.bos_token_id is not None
    info["versions"] = {m.__name__: m.__version__ for m in (torch, transformers, datasets, np)}
    write_file(config.run_dir / "config.json", json.dumps(info, indent=2).encode())
    write_file(config.run_dir / "metrics.jsonl", b"")
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
        tensors = sae.state_dict() | {"W_enc": sae.W_enc.detach().T.contiguous()}  # (d_in, d_sae)
        cfg = {"architecture": "topk", "d_in": sae.d_model, "d_sae": sae.n_latents, "k": sae.k}
        cfg |= {"normalize_activations": "none", "reshape_activations": "none", "device": "cpu"}
        cfg |= dict.fromkeys(("rescale_acts_by_decoder_norm", "apply_b_dec_to_input"), False)
        cfg |= {"dtype": "float32", "metadata": metadata | {"hook_name": info["sites"][s]}}
        target, temporary = folder / f"sae_{s}", folder / f"sae_{s}.tmp"
        write_file(temporary / "cfg.json", json.dumps(cfg, indent=2).encode())
        write_file(temporary / "sae_weights.safetensors", safetensors.torch.save(tensors))
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)


def load_run(path_or_hub_id):
    """-> (sae_x, sae_y, config) of a finished run: a folder, or the id of a hub repository."""
    root, saes = Path(path_or_hub_id), []
    try:
        folder = root if root.is_dir() else Path(huggingface_hub.snapshot_download(root.as_posix()))
        config = Config(**json.loads((folder / "config.json").read_text())["config"])
        for s in "xy":
            tensors = safetensors.torch.load_file(folder / f"sae_{s}" / "sae_weights.safetensors")
            saes.append(TopKSAE(*tensors["W_enc"].shape, config.k))
            saes[-1].load_state_dict(tensors | {"W_enc": tensors["W_enc"].T})
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        RuntimeError,
        safetensors.SafetensorError,
    ) as error:
        raise InputError(f"{path_or_hub_id} is not a finished run ({error})") from error
    return *saes, config


# ---- Command line --------------------------------------------------------------------------------
def main(argv=None) -> int:
    """-> exit status: 0, 2 after one line about what was given, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    parser = HfArgumentParser(Config, prog="jsae.py", allow_abbrev=False)
    parser.print_usage = lambda file: None  # an error is one line
    demo = not any(argument.split("=")[0] == "--model" for argument in argv)
    parser.set_defaults(**(DEMO if demo else {}))
    try:
        config = Config(**vars(parser.parse_args(argv)))
        if demo and not (HERE / config.model).is_dir():
            raise InputError(f"no {config.model} here; try --model EleutherAI/pythia-70m --layer 3")
        if demo:
            print("demo settings:", ", ".join(f"{name} {getattr(config, name)}" for name in DEMO))
        run_dir = train(config)
    except (InputError, OSError) as error:
        print("jsae.py: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except SystemExit as stop:  # argparse's, after --help or an error
        return stop.code or 0
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    print(f"explained variance     x {last['ev_x']:.4f}, y {last['ev_y']:.4f}")
    print(f"|J|                    mean {last['jacobian_l1']:.4f}")
    print(f"|J| > 0.01 per token   {last['jacobian_above_0.01']:.1f} of {config.k**2}")
    print(f"tokens per second      {last['tokens_per_second']:,.0f}")
    print(f"written to             {run_dir}")
    if (HERE / "evaluate.py").exists():
        print(f"evaluate it with       python {HERE / 'evaluate.py'} {run_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
