# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "transformers>=4.56", "datasets>=3.0", "numpy", "zstandard"]
# ///
"""Jacobian Sparse Autoencoders (JSAEs) in one file: the method, its training, the command line.

Farnik, Lawson, Houghton, Aitchison: "Jacobian Sparse Autoencoders: Sparsify Computations, Not Just
Activations", ICML 2025, arXiv 2502.18147. Two TopK autoencoders are trained on the input x and the
output y of one transformer MLP f, and with them the map f_s from the latents of x to those of y:

    s_x ---d_x---> x_hat       y_hat <---d_y--- s_y
     ^               ~           ~               ^
     '-----e_x------ x ---f----> y -----e_y------'       f_s = e_y . f . d_x . tau_k      (Eq. 3)

Its Jacobian J has at most k x k non-zero elements per token. TopK makes s_x and s_y sparse, and a
penalty makes J sparse, so that few input latents compute each output latent. The loss is the mean
over tokens of

    L = MSE(x, x_hat) + MSE(y, y_hat) + lambda / k^2 * sum_ij |J_ij|                      (Eq. 5)

In the stable setup (D.1), used here, f and its derivative are taken at x, not at x_hat. The paper's
symbols and the names in this file; a latent is a row of W_enc and a row of W_dec:

    x, y             x, y                 (B, d_model)          input and output of the MLP
    s_x, K_1         s_x.acts, s_x.idx    (B, k)                active latents of x: values, indices
    s_y, K_2         s_y.acts, s_y.idx    (B, k)                active latents of y
    W^enc, W^dec^T   W_enc, W_dec         (n_latents, d_model)  n_latents = R d_model
    W_1, W_g         W_in, W_gate         (d_mlp, d_model)
    W_2              W_out                (d_model, d_mlp)
    phi, phi'        act, act_grad        elementwise
    J                J                    (B, k, k)             active latents only
    R, lambda        expansion_factor, jacobian_coef

J[b, i, j] is the derivative of output latent s_y.idx[b, i] in input latent s_x.idx[b, j].

    python jsae.py                                             a small bundled model, two minutes
    python jsae.py --model EleutherAI/pythia-70m --layer 3     the paper's setting
    python jsae.py --help                                      every setting

Sections 1 to 3 are the method and can be copied, with the imports, as one block (MLP.from_model
and MLP.from_module call section 9). Section 4 is the same loss in less time and memory.
Sections 5 to 10 are what a training run needs: settings, activations, training, the run folder,
finding the MLP, the command line. test_active_jacobian_equals_torch_func_jacrev in test_jsae.py
compares J with autodiff: taken at x_hat, it is the derivative of f_s as Eq. 3 has it; taken at x
(stable setup), of e_y . f . (d_x + constant) . tau_k, where the constant is x - x_hat.
"""

import argparse
import copy
import dataclasses
import hashlib
import itertools
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
import types
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import snapshot_download
from torch import Tensor, distributed, nn
from tqdm import tqdm

# ---- 1. Sparse autoencoders (Eq. 1, 2) -----------------------------------------------------------


class Latents(NamedTuple):
    """What TopK kept of each token: values (0 where ReLU cut one off), indices. Both (..., k)."""

    acts: Tensor
    idx: Tensor


class TopKSAE(nn.Module):
    """A k-sparse autoencoder: s = tau_k(W_enc x + b_enc), x_hat = W_dec^T s + b_dec.

    tau_k keeps the k largest pre-activations and applies ReLU to them. Rows of W_dec start at norm
    1, and training sets them back to it after every step: otherwise W_dec of x, or W_enc of y,
    could shrink while the other matrix of that SAE grows, which lowers the penalty and changes
    nothing else. W_enc starts as a copy of W_dec, the biases at 0; b_dec is not subtracted from x.
    ValueError unless 1 <= k <= n_latents.
    """

    def __init__(self, d_model: int, n_latents: int, k: int):
        super().__init__()
        if not 1 <= k <= n_latents:
            raise ValueError(f"k is {k}; expected 1 to {n_latents}, the number of latents")
        self.k = k
        self.W_dec = nn.Parameter(torch.randn(n_latents, d_model))
        self.set_decoder_norm_to_one()
        self.W_enc = nn.Parameter(self.W_dec.detach().clone())
        self.b_enc = nn.Parameter(torch.zeros(n_latents))
        self.b_dec = nn.Parameter(torch.zeros(d_model))

    def encode(self, x: Tensor) -> Latents:
        """x (..., d_model) -> Latents (..., k). Eq. 1."""
        values, idx = F.linear(x, self.W_enc, self.b_enc).topk(self.k)
        return Latents(F.relu(values), idx)

    def decode(self, s: Latents) -> Tensor:
        """Latents (..., k) -> x_hat (..., d_model). Eq. 2."""
        rows = self.W_dec[s.idx]  # (..., k, d_model)
        return (s.acts.unsqueeze(-2) @ rows).squeeze(-2) + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d_model) -> x_hat (..., d_model)."""
        return self.decode(self.encode(x))

    @torch.no_grad()
    def set_decoder_norm_to_one(self):
        self.W_dec.copy_(F.normalize(self.W_dec, dim=1))


# ---- 2. The MLP and its derivative (Eq. 8, 12, 17 to 28) -----------------------------------------


def gelu_grad(z):
    """phi(z) = z Phi(z), Phi the standard normal distribution: phi'(z) = Phi(z) + z Phi'(z)."""
    density = torch.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    return torch.special.ndtr(z) + z * density


def tanh_gelu(z):
    return F.gelu(z, approximate="tanh")


def tanh_gelu_grad(z):
    """phi(z) = z (1 + tanh(a)) / 2 with a = c (z + 0.044715 z^3), c = sqrt(2 / pi)."""
    c = math.sqrt(2 / math.pi)
    tanh = torch.tanh(c * (z + 0.044715 * z**3))
    da = c * (1 + 3 * 0.044715 * z**2)
    return 0.5 * (1 + tanh) + 0.5 * z * (1 - tanh**2) * da


def silu_grad(z):
    """phi(z) = z sigmoid(z): phi'(z) = sigmoid(z) + z sigmoid(z) (1 - sigmoid(z))."""
    gate = torch.sigmoid(z)
    return gate + z * gate * (1 - gate)


def relu_grad(z):
    return (z > 0).to(z.dtype)


ACT_GRADS = {F.gelu: gelu_grad, tanh_gelu: tanh_gelu_grad, F.silu: silu_grad, F.relu: relu_grad}


def grad_by_autodiff(act):
    """phi' of any other elementwise phi: the gradient of its sum, element by element."""
    return torch.func.grad(lambda z: act(z).sum())


def is_elementwise(act):
    """Whether act treats every number alone: then act(z)[::7] equals act(z[::7])."""
    parameters = act.parameters() if isinstance(act, nn.Module) else []
    device = next((p.device for p in parameters), "cpu")
    z = torch.linspace(-8, 8, 1601, device=device)
    values = act(z)
    return values.shape == z.shape and torch.allclose(values[::7], act(z[::7]), atol=1e-6)


def frozen_copy(weight):
    """A contiguous copy without gradient, in float32 if the model has less."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return weight.detach().to(dtype).contiguous().clone()


class MLP(nn.Module):
    """The frozen weights of one transformer MLP. W_gate is None in a plain MLP; biases may be None.

    plain:  y = W_out phi(W_in x + b_in) + b_out                                          (Eq. 8)
    gated:  y = W_out (phi(W_gate x + b_gate) * (W_in x + b_in)) + b_out           (Eq. 17 to 21)

    act is phi, any elementwise function; ValueError if it is not elementwise.
    """

    # Set by from_model and from_module: the language model's modules that receive x, in order of
    # execution, and the one that returns y. They stay modules of that model, not of this one.
    readers = ()
    writer = None

    def __init__(self, W_in, b_in, W_out, b_out, W_gate=None, b_gate=None, act=F.gelu):
        super().__init__()
        names = ("W_in", "b_in", "W_out", "b_out", "W_gate", "b_gate")
        for name, weight in zip(names, (W_in, b_in, W_out, b_out, W_gate, b_gate)):
            self.register_buffer(name, weight if weight is None else frozen_copy(weight))
        if isinstance(act, nn.Module):  # it may have parameters
            act = copy.deepcopy(act).requires_grad_(False)
        if act not in ACT_GRADS and not is_elementwise(act):
            raise ValueError(f"{act} is not elementwise; expected phi of an MLP")
        self.act = act
        self.act_grad = ACT_GRADS.get(act) or grad_by_autodiff(act)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d_model) -> y (..., d_model)."""
        h = F.linear(x, self.W_in, self.b_in)  # (..., d_mlp)
        if self.W_gate is None:
            return F.linear(self.act(h), self.W_out, self.b_out)
        g = F.linear(x, self.W_gate, self.b_gate)
        return F.linear(self.act(g) * h, self.W_out, self.b_out)

    def derivative(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """df/dx at x as [(c, W), ...]: df/dx = W_out (sum of diag(c) W), with c (..., d_mlp).

        plain:  phi'(h) with W_in                                                        (Eq. 12)
        gated:  h * phi'(g) with W_gate, and phi(g) with W_in                      (Eq. 22 to 28)
        """
        h = F.linear(x, self.W_in, self.b_in)
        if self.W_gate is None:
            return [(self.act_grad(h), self.W_in)]
        g = F.linear(x, self.W_gate, self.b_gate)
        return [(h * self.act_grad(g), self.W_gate), (self.act(g), self.W_in)]

    @classmethod
    def from_model(cls, model, layer: int) -> "MLP":
        """The MLP of one layer of a transformers causal LM. ValueError if it has no dense one."""
        return mlp_of_model(model, layer)

    @classmethod
    def from_module(cls, module) -> "MLP":
        """The MLP inside a module that takes x, from its readers' input to its writer's output.

        What the module does outside it, such as adding x, is not part of it. ValueError if there is
        no single dense one.
        """
        return mlp_of_module(module)


# ---- 3. The Jacobian and the loss (Eq. 5, 16, 29) ------------------------------------------------


def active_jacobian(sae_x, sae_y, mlp, x, s_x, s_y):
    """J[..., i, j] = d s_y,i / d s_x,j for the active latents, (..., k, k). Eq. 16; gated: Eq. 29.

    x (..., d_model) is where the MLP is linearised: its true input in the stable setup (D.1), x_hat
    in Eq. 3 as it stands. s_x, s_y (..., k) hold the latents that TopK chose. A latent is active if
    its value is above 0: rows and columns of those that ReLU cut off are 0 (the paper's K_1 and K_2
    are all that TopK chose).
    """
    decoded = sae_x.W_dec[s_x.idx]  # (..., k, d_model), what each input latent adds to x
    moved = 0  # (..., k, d_mlp), what each input latent adds to the hidden layer
    for c, W in mlp.derivative(x):
        moved = moved + c.unsqueeze(-2) * (decoded @ W.T)
    read = sae_y.W_enc[s_y.idx] @ mlp.W_out  # (..., k, d_mlp), what each output latent takes of it
    J = read @ moved.mT  # (..., k, k)
    return J * (s_y.acts > 0).unsqueeze(-1) * (s_x.acts > 0).unsqueeze(-2)


def plain_jsae_loss(sae_x, sae_y, mlp, x, jacobian_coef):
    """Eq. 5 in the stable setup of D.1, term by term: what is trained. x (B, d_model) -> scalar."""
    y = mlp(x)
    s_x = sae_x.encode(x)
    s_y = sae_y.encode(y)  # e_y(x) in Eq. 33 is a misprint
    J = active_jacobian(sae_x, sae_y, mlp, x, s_x, s_y)
    mse_x = F.mse_loss(sae_x.decode(s_x), x)
    mse_y = F.mse_loss(sae_y.decode(s_y), y)
    return mse_x + mse_y + jacobian_coef * J.abs().mean()


# ---- 4. The same loss, fast ----------------------------------------------------------------------
#
# plain_jsae_loss makes (B, n_latents) pre-activations with their gradients, and keeps (B, k, d_mlp)
# products for its backward pass: gigabytes for a batch of 4096 tokens. Three facts save most of
# that, and change nothing beyond rounding:
#
# 1. Only k of a token's n_latents pre-activations have a gradient. All are needed once, for TopK to
#    choose; after that, products with the k chosen rows.
# 2. W_enc_y W_out and W_dec_x W_in^T (and W_dec_x W_gate^T) are the same for every token: tables,
#    made once a step, of which a token takes k rows each.
# 3. The penalty's derivative in J is known as soon as J is: for the mean of |J|, sign(J) / k^2. So
#    value and gradients come out of one pass over chunks of tokens, and nothing of size
#    (B, k, d_mlp) is ever made.
#
# A surrounding torch.autocast sets the dtype of the large products only: those that choose latents,
# the MLP's, the tables and J. Rows are taken by index_select and embedding_bag instead of W[idx],
# whose gradient is slower and on a CPU not the same to the last bit in every run.


def dtype_of_large_products(x):
    """The dtype that a surrounding torch.autocast asks for, else that of x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def chunk_size(device, bytes_per_token):
    """Tokens in a chunk: a tensor of 8 MiB on a CPU (near its cache), 512 MiB on other devices."""
    return max(1, (2**23 if device.type == "cpu" else 2**29) // bytes_per_token)


def weighted_rows(w, W, idx):
    """The sum of w[b, i] W[idx[b, i]] over i: (B, k), (n, d), (B, k) -> (B, d)."""
    return F.embedding_bag(idx, W, per_sample_weights=w, mode="sum")


class ChosenProducts(torch.autograd.Function):
    """z[b, i] = x[b] . W[idx[b, i]], (B, k), with a gradient for W; (B, k, d) is never gathered.

    Let r = weighted_rows(w, W, idx). Backpropagating x, as if it were dr, through r gives

        dw[b, i] = x[b] . W[idx[b, i]], which is z (for any w, as r is linear in w);
        dW[n] = the sum of w[b, i] x[b] over all b, i with idx[b, i] = n, which for w = dz is the
        gradient that z passes on to W.

    PyTorch has fast kernels for both.
    """

    @staticmethod
    def forward(ctx, x, W, idx):
        ctx.save_for_backward(x, W, idx)
        any_w = torch.zeros_like(idx, dtype=W.dtype)
        return torch.autograd.functional.vjp(lambda w: weighted_rows(w, W, idx), any_w, x)[1]

    @staticmethod
    def backward(ctx, dz):
        x, W, idx = ctx.saved_tensors
        dW = torch.autograd.functional.vjp(lambda rows: weighted_rows(dz, rows, idx), W, x)[1]
        return None, dW, None


def mse_and_latents(sae, x):
    """x (B, d_model), a constant -> (MSE(x, x_hat), Latents (B, k)), with gradients for the SAE.

    The k chosen pre-activations are computed again in the dtype of x: under torch.autocast, the low
    dtype decides only which latents are active.
    """
    dtype = dtype_of_large_products(x)
    with torch.autocast(x.device.type, enabled=False):
        W_enc = sae.W_enc.detach().to(dtype)
        b_enc = sae.b_enc.detach().to(dtype)
        chunks = x.to(dtype).split(chunk_size(x.device, len(W_enc) * dtype.itemsize))
        idx = torch.cat([F.linear(chunk, W_enc, b_enc).topk(sae.k).indices for chunk in chunks])
        b_of_chosen = sae.b_enc.index_select(0, idx.flatten()).view_as(idx)
        acts = F.relu(ChosenProducts.apply(x, sae.W_enc, idx) + b_of_chosen)  # (B, k)
        x_hat = weighted_rows(acts, sae.W_dec, idx) + sae.b_dec
        return F.mse_loss(x_hat, x), Latents(acts, idx)


def l1(J):
    """The paper's penalty: the mean of |J| over k x k elements. J (tokens, k, k) -> (tokens,)."""
    return J.abs().mean((1, 2))


class PenaltySum(torch.autograd.Function):
    """The sum of penalty(J) over tokens, with its gradients in the tables T_y and T_x.

    T_y = W_enc_y W_out, and T_x = W_dec_x W^T for each (c, W) of the MLP's derivative, both
    (latents in use, d_mlp); c (B, d_mlp). rows_y and rows_x (B, k) are the table rows of a token's
    chosen latents; active (B, k_y, k_x) is True where both values are above 0. For each token

        A = T_y[rows_y] (k_y, d_mlp),  D = sum of c * T_x[rows_x] (k_x, d_mlp),
        J = A D^T                      (Eq. 16, 29)
        dA = S D,  dD = S^T A          with S = d penalty(J) / dJ (k_y, k_x).

    dA is added to the rows rows_y of dT_y, c * dD to the rows rows_x of dT_x. S comes from
    autograd, as J is small: penalty may be any function of one token's J. All this is done in the
    forward pass, a chunk of tokens at a time; the backward pass only scales dT_y and dT_x.
    """

    @staticmethod
    def forward(ctx, penalty, active, rows_y, rows_x, cs, T_y, *T_xs):
        B, k_y, k_x = active.shape
        d_mlp = T_y.shape[1]
        dtype = torch.promote_types(T_y.dtype, torch.float32)  # of J, S and all sums
        total = torch.zeros((), dtype=dtype, device=T_y.device)
        dTs = [torch.zeros_like(T, dtype=dtype) for T in (T_y, *T_xs)]
        size = chunk_size(T_y.device, max(k_x, k_y) * d_mlp * dtype.itemsize)

        for start in range(0, B, size):
            chunk = slice(start, start + size)
            i_y = rows_y[chunk].flatten()
            i_x = rows_x[chunk].flatten()
            chunk_cs = [c[chunk].unsqueeze(1) for c in cs]  # (chunk, 1, d_mlp)
            A = T_y.index_select(0, i_y).view(-1, k_y, d_mlp)
            D = None
            for c, T_x in zip(chunk_cs, T_xs):
                term = T_x.index_select(0, i_x).view(-1, k_x, d_mlp)
                term.mul_(c)  # in place, as all this is bound by memory
                D = term if D is None else D.add_(term)  # (chunk, k_x, d_mlp)

            J = (A @ D.mT).to(dtype).requires_grad_()  # (chunk, k_y, k_x)
            with torch.enable_grad():
                value = penalty(J * active[chunk]).sum()
            S = torch.autograd.grad(value, J)[0]
            total += value.detach()

            dA = S @ D.to(dtype)  # (chunk, k_y, d_mlp)
            dD = S.mT @ A.to(dtype)  # (chunk, k_x, d_mlp)
            dTs[0].index_add_(0, i_y, dA.flatten(0, 1))
            for c, dT_x in zip(chunk_cs, dTs[1:]):
                dT_x.index_add_(0, i_x, (c * dD).flatten(0, 1))

        for i in range(len(dTs)):  # under autocast: free each float32 sum before the next is copied
            dTs[i] = dTs[i].to(T_y.dtype)
        ctx.save_for_backward(*dTs)
        return total

    @staticmethod
    def backward(ctx, dtotal):
        return None, None, None, None, None, *[dtotal * dT for dT in ctx.saved_tensors]


def fast_penalty(sae_x, sae_y, mlp, x, s_x, s_y, penalty=l1, dtype=None):
    """penalty(active_jacobian(...)).mean(), fast, with gradients in sae_x.W_dec and sae_y.W_enc.

    sae_x needs only W_dec, sae_y only W_enc, (n_latents, d_model). x (B, d_model), in the dtype of
    the MLP, counts as a constant: none of the gradient goes through phi'(x). Latents (B, k).
    penalty: a function of J (tokens, k, k) -> (tokens,). dtype: of the tables and of the product J;
    by default what a surrounding torch.autocast asks for, else the dtype of x.
    """
    dtype = dtype or dtype_of_large_products(x)
    active = (s_y.acts > 0).unsqueeze(2) & (s_x.acts > 0).unsqueeze(1)  # (B, k, k)
    used_x, rows_x = s_x.idx.unique(return_inverse=True)  # the tables hold latents in use only
    used_y, rows_y = s_y.idx.unique(return_inverse=True)
    cs, Ws = zip(*mlp.derivative(x.detach()))
    with torch.autocast(x.device.type, enabled=False):
        cs = [c.to(dtype) for c in cs]
        T_y = sae_y.W_enc.index_select(0, used_y).to(dtype) @ mlp.W_out.to(dtype)
        decoded = sae_x.W_dec.index_select(0, used_x).to(dtype)  # (latents in use, d_model)
        T_xs = [decoded @ W.T.to(dtype) for W in Ws]  # (latents in use, d_mlp)
        total = PenaltySum.apply(penalty, active, rows_y, rows_x, cs, T_y, *T_xs)
    return total / len(x)


def jsae_loss(sae_x, sae_y, mlp, x, jacobian_coef, jacobian_fraction=1.0, penalty=l1):
    """plain_jsae_loss in a fraction of its time and memory. x (B, d_model) -> (loss, parts).

    parts, all detached: mse_x, mse_y, the Latents s_x and s_y and, unless jacobian_coef is 0,
    "penalty": the mean of penalty(J) over a random share jacobian_fraction of the tokens, which is
    an unbiased estimate of the mean over all.
    """
    x = x.detach().to(sae_x.W_enc.dtype)
    y = mlp(x).to(x.dtype)
    mse_x, s_x = mse_and_latents(sae_x, x)
    mse_y, s_y = mse_and_latents(sae_y, y)
    loss = mse_x + mse_y
    s_x = Latents(s_x.acts.detach(), s_x.idx)  # from here on, only which are active matters
    s_y = Latents(s_y.acts.detach(), s_y.idx)
    parts = {"mse_x": mse_x.detach(), "mse_y": mse_y.detach(), "s_x": s_x, "s_y": s_y}
    if jacobian_coef:
        n = max(1, round(jacobian_fraction * len(x)))
        if n < len(x):
            chosen = torch.randperm(len(x), device=x.device)[:n]
            x = x[chosen]
            s_x = Latents(s_x.acts[chosen], s_x.idx[chosen])
            s_y = Latents(s_y.acts[chosen], s_y.idx[chosen])
        value = fast_penalty(sae_x, sae_y, mlp, x, s_x, s_y, penalty)
        loss = loss + jacobian_coef * value
        parts["penalty"] = value.detach()
    return loss, parts


# ---- 5. Settings ---------------------------------------------------------------------------------

HERE = Path(__file__).resolve().parent


class InputError(ValueError):
    """What was given, what was expected, what to do: one line."""


def setting(default, group, text, choices=None, least=1, most=1e15):
    """A field of Config. Numbers lie between least and most (1e15: any finite one makes sense).

    group and text are for the help page.
    """
    about = {"group": group, "text": text, "choices": choices, "least": least, "most": most}
    return dataclasses.field(default=default, metadata=about)


@dataclasses.dataclass
class Config:
    """A run's settings, saved with it. The defaults are the paper's for Pythia-70m, layer 3.

    batch_size counts tokens, as the authors' code does (Appendix D says sequences).

    randomize_weights is the control of section 5.3. init: every parameter is drawn anew as by the
    model's own initialiser; shuffle: the entries of every parameter are permuted; paper, what the
    authors' code does: every parameter of two or more dimensions is normal with std
    0.8 / sqrt(d_model), the rest is kept.

    InputError if a value is not one of its choices, or a number is out of its bounds.
    """

    model: str = setting("EleutherAI/pythia-70m", "model", "hub id or folder of a causal LM")
    layer: int = setting(3, "model", "layer whose MLP is decomposed, from 0", least=0)
    randomize_weights: str = setting(
        "none", "model", "random control", choices=("none", "init", "shuffle", "paper")
    )
    dataset: str = setting(
        "monology/pile-uncopyrighted",
        "text",
        "hub data set NAME or NAME:CONFIG, streamed; stdlib: the sources of Python's own library; "
        "or a file or folder of .txt, .jsonl, .jsonl.zst, .parquet, .arrow with text or input_ids",
    )
    split: str = setting("train", "text", "split of a hub data set")
    context_size: int = setting(2048, "text", "tokens per context, at most the model's", least=2)
    k: int = setting(32, "SAEs", "active latents per token, in both SAEs")
    expansion_factor: int = setting(32, "SAEs", "R: latents of an SAE per dimension of x")
    jacobian_coef: float = setting(1.0, "Jacobian", "lambda; 0: traditional SAEs", least=0)
    jacobian_fraction: float = setting(
        1.0,
        "Jacobian",
        "random share of the tokens that the penalty is taken of",
        least=1e-9,
        most=1,
    )
    tokens: int = setting(300_000_000, "training", "rounded down to whole batches")
    lr: float = setting(5e-4, "training", "Adam's learning rate", least=1e-9)
    batch_size: int = setting(4096, "training", "tokens per step")
    buffer_batches: int = setting(32, "training", "batches of activations shuffled together")
    seed: int = setting(0, "training", "of SAEs, order and random control", least=0, most=2**31)
    device: str = setting("auto", "training", "auto, cpu, cuda, cuda:1, ...")
    dtype: str = setting(
        "auto",
        "training",
        "of large products; auto: bfloat16 on a GPU that has it, else float32",
        choices=("auto", "float32", "bfloat16"),
    )
    output_dir: str = setting("", "run", "the run's folder; default: in runs/, by settings")
    overwrite: bool = setting(False, "run", "replace the run in the folder, and all in it")
    resume: bool = setting(
        False, "run", "go on with the run in the folder, which all machines of a run must share"
    )
    checkpoint_minutes: float = setting(10.0, "run", "from one checkpoint to the next", least=0)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            check_setting(field, getattr(self, field.name))
        if not self.output_dir:
            name = f"{Path(self.model).name}-L{self.layer}-R{self.expansion_factor}-k{self.k}"
            name += f"-lambda{self.jacobian_coef:g}-{self.tokens / 1e6:g}M-seed{self.seed}"
            if self.randomize_weights != "none":
                name += f"-{self.randomize_weights}"
            self.output_dir = f"runs/{name}"


DEMO = {  # in place of the defaults above when no --model is given
    "model": "assets/tiny-pythia",
    "layer": 0,
    "jacobian_coef": 0.3,
    "dataset": "stdlib",
    "context_size": 256,
    "k": 16,
    "expansion_factor": 4,
    "tokens": 1_200_000,
    "lr": 3e-3,
    "batch_size": 2048,
}


def flag(name):
    return "--" + name.replace("_", "-")


def check_setting(field, value):
    """InputError unless the value is one of the field's choices, or a number within its bounds."""
    choices = field.metadata["choices"]
    least = field.metadata["least"]
    most = field.metadata["most"]
    expected = None
    if choices and value not in choices:
        expected = ", ".join(choices)
    if field.type in (int, float):
        kinds = int if field.type is int else (int, float)
        if not (isinstance(value, kinds) and least <= value <= most):  # NaN is not
            expected = f"{field.type.__name__} from {least:g} to {most:g}"
    if expected:
        raise InputError(f"{flag(field.name)} is {value!r}; expected {expected}")


# ---- 6. Activations ------------------------------------------------------------------------------

KINDS = {".txt": "text", ".jsonl": "json", ".zst": "json", ".parquet": "parquet", ".arrow": "arrow"}
PIECE_LENGTH = 2**16  # characters, or token ids: longer documents are cut into pieces
PIECES_AT_A_TIME = 128  # that are tokenized together


def local_path(name):
    """The file or folder of that name, here or beside jsae.py; None if the name is a hub id.

    InputError, and no request to the hub, if a missing name looks like a path: its first part is a
    folder here, or it ends like a data file.
    """
    for path in (Path(name), HERE / name):
        if path.exists():
            return path.resolve()
    first = Path(name).parts[0]
    if Path(name).suffix in KINDS:
        raise InputError(f"there is no file or folder {name}")
    if first != name and Path(first).is_dir():
        raise InputError(f"there is no file or folder {name}, though there is a folder {first}")
    return None


def choose_device(name):
    """auto: cuda if there is a GPU, else cpu. cuda: the GPU that torchrun gives this process."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    try:
        torch.empty(0, device=name)
    except Exception as error:  # whatever a backend raises
        raise InputError(f"--device {name}: {error}") from error
    return torch.device(name)


def load_language_model(config):
    """-> the causal LM of the settings or its random control, frozen, in float32."""
    device = choose_device(config.device)
    try:
        name = local_path(config.model) or config.model
        model = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, use_safetensors=True
        )
    except Exception as error:  # whatever transformers, safetensors or the hub raises
        raise InputError(f"--model {config.model}: {error}") from error
    model = randomized(model, config.randomize_weights, config.seed)
    return model.eval().requires_grad_(False).to(device)


@torch.no_grad()
def randomized(model, how, seed):
    """The random control (5.3) of Config.randomize_weights, drawn on the CPU from the seed."""
    torch.manual_seed(seed)
    if how == "init":
        return transformers.AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    if how == "shuffle":
        for p in model.parameters():
            p.copy_(p.flatten()[torch.randperm(p.numel())].view_as(p))
    if how == "paper":
        d_model = model.get_input_embeddings().weight.shape[1]
        for p in model.parameters():
            if p.ndim >= 2:
                p.normal_(std=0.8 / math.sqrt(d_model))
    return model


def load_tokenizer(config):
    """-> the model's tokenizer. InputError, with the cause, if there is none that knows words."""
    try:
        name = local_path(config.model) or config.model
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        words = tokenizer("a", add_special_tokens=False).input_ids
    except Exception as error:  # whatever transformers or the hub raises
        raise InputError(f"no tokenizer of {config.model}: {error}") from error
    if not words:  # transformers makes an empty one for a folder without its files
        raise InputError(f"no tokenizer of {config.model}: it knows no words")
    return tokenizer


def special_id(name, tokenizer, model):
    """The tokenizer's id of that name or, if tokenizer is None, the one in the model's settings.

    name: bos_token_id or eos_token_id. None if there is no such id.
    """
    if tokenizer is not None:
        return getattr(tokenizer, name)
    found = getattr(model.config.get_text_config(decoder=True), name, None)
    return found[0] if isinstance(found, list) else found


def stdlib_files():
    """-> (folder of Python's own library, its files' names in an order that mixes subjects)."""
    root = Path(os.__file__).parent
    names = [path.relative_to(root).as_posix() for path in root.rglob("*.py")]
    names = [name for name in names if "-packages/" not in name]  # not what pip installed
    return root, sorted(names, key=lambda name: zlib.crc32(name.encode()))


def local_files(path):
    """-> the files of known kinds at or below a path, sorted. InputError unless of one kind."""
    files = [path, *sorted(path.rglob("*"))]
    files = [file for file in files if file.suffix in KINDS and file.is_file()]
    if len({KINDS[file.suffix] for file in files}) != 1:
        raise InputError(f"{path}: expected files of one kind that end in {', '.join(KINDS)}")
    return files


def load_documents(dataset, split):
    """-> the documents of a hub data set or of local files: an iterable of dicts."""
    path = local_path(dataset)
    if path is None:
        return datasets.load_dataset(*dataset.split(":", 1), split=split, streaming=True)
    files = local_files(path)
    kind = KINDS[files[0].suffix]
    options = {}
    if kind in ("text", "json"):  # not "utf-8", at which datasets ignores encoding_errors for JSON
        options = {"encoding": "utf8", "encoding_errors": "replace"}
    if kind == "text":
        options["sample_by"] = "document"
    names = [str(file) for file in files]
    return datasets.load_dataset(kind, data_files=names, split="train", streaming=True, **options)


def pieces_of(documents, tokenizer):
    """Yield the texts, or lists of token ids, of the documents, cut into pieces."""
    for document in documents:
        column = "text" if tokenizer is not None and "text" in document else "input_ids"
        if column not in document:
            raise InputError(
                f"columns {list(document)}: expected text (with a tokenizer) or input_ids"
            )
        content = document[column] or ""
        for start in range(0, len(content), PIECE_LENGTH):
            yield content[start : start + PIECE_LENGTH]


def text_pieces(config, tokenizer, part):
    """Yield the pieces of the text that belong to a part: "training", "held out" or "all".

    stdlib             files whose path in the library has crc32 modulo 20 = 0 are held out; the
                       bundled language model has not seen them either
    other local text   pieces whose number, counted over the whole text, is 19 modulo 20 are
    text of the hub    nothing is
    """
    wanted = {"training": (False,), "held out": (True,), "all": (False, True)}[part]
    if config.dataset == "stdlib":
        root, names = stdlib_files()
        for name in names:
            held_out = zlib.crc32(name.encode()) % 20 == 0
            if held_out in wanted:
                text = (root / name).read_text("utf-8", "replace")
                yield from pieces_of([{"text": text}], tokenizer)
        return
    is_local = local_path(config.dataset) is not None
    documents = load_documents(config.dataset, config.split)
    for number, piece in enumerate(pieces_of(documents, tokenizer)):
        held_out = is_local and number % 20 == 19
        if held_out in wanted:
            yield piece


def token_contexts(config, model, part, rank=0, world=1, n_pieces=None):
    """Yield contexts (context_size,) of token ids: one pass over a part of the text.

    A context is the BOS (or end-of-text) token and a row of packed pieces, each followed by the
    end-of-text token. Of `world` processes, number `rank` takes every world-th of the first
    n_pieces pieces (None: of all). InputError if the text cannot be read.
    """
    tokenizer = no_tokenizer = None
    try:
        tokenizer = load_tokenizer(config)
    except InputError as error:  # text that comes as token ids needs none
        no_tokenizer = error
    bos = special_id("bos_token_id", tokenizer, model)
    eos = special_id("eos_token_id", tokenizer, model)
    first = bos if bos is not None else eos
    start = [] if first is None else [first]
    end = [] if eos is None else [eos]
    width = config.context_size - len(start)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = np.array([], dtype=np.int64)  # that are not in a context yet
    try:
        pieces = itertools.islice(text_pieces(config, tokenizer, part), rank, n_pieces, world)
        while batch := list(itertools.islice(pieces, PIECES_AT_A_TIME)):
            if isinstance(batch[0], str):
                batch = tokenizer(batch, add_special_tokens=False, verbose=False).input_ids
            arrays = [np.array([*piece, *end], dtype=np.int64) for piece in batch]
            ids = np.concatenate([ids, *arrays])
            least, most = ids.min(initial=0), ids.max(initial=0)
            if least < 0 or most >= vocabulary:
                known = f"the model knows 0 to {vocabulary - 1}"
                raise InputError(f"token ids {least} to {most}; {known}")
            n_rows = len(ids) // width
            for row in ids[: n_rows * width].reshape(n_rows, width):
                yield np.array([*start, *row], dtype=np.int64)
            ids = ids[n_rows * width :]
    except Exception as error:  # whatever a library that reads text raises
        reason = f"--dataset {config.dataset}: {str(error) or repr(error)}"
        if no_tokenizer is not None:
            reason += f" ({no_tokenizer})"
        raise InputError(reason) from error


def training_contexts(config, model, rank, world, skip):
    """Yield contexts to train on, without the first `skip`; local text begins again at its end."""
    if skip and rank == 0:
        tqdm.write(f"reading the text again, up to context {skip:,}", sys.stderr)
    is_local = config.dataset == "stdlib" or local_path(config.dataset) is not None
    for number in itertools.count(1):  # of the pass over the text
        n = 0
        for context in token_contexts(config, model, "training", rank, world):
            n += 1
            if skip > 0:
                skip -= 1
            else:
                yield context
        if not is_local:
            raise InputError(f"{config.dataset} ended after {n:,} contexts, too few for --tokens")
        if n * config.context_size * world < config.batch_size:
            raise InputError(f"--dataset {config.dataset}: {n} contexts are less than one batch")
        skip %= n  # every pass has the same n contexts, so that whole ones need not be read
        if number == 1 and rank == 0:
            tqdm.write(f"{config.dataset} begins again after {n:,} contexts", sys.stderr)


class MLPReached(Exception):
    """Leaves a language model's forward pass at the MLP; carries x."""


@torch.no_grad()
def mlp_inputs(model, mlp, ids):
    """Token ids (contexts, T) -> x (contexts, T, d_model): the forward pass, left at the MLP."""

    def leave(module, args):
        raise MLPReached(args[0])

    with mlp.readers[0].register_forward_pre_hook(leave):
        try:
            model(input_ids=ids, use_cache=False)
        except MLPReached as reached:
            return reached.args[0].reshape(*ids.shape, -1)


def check_mlp(model, mlp, ids):
    """InputError if mlp(x) is not the y that the language model has for the ids (contexts, T)."""
    modules = nn.ModuleList([*mlp.readers, mlp.writer])
    _, calls = watched(modules, partial(model, input_ids=ids, use_cache=False))
    x, y = calls[mlp.readers[0]].x, calls[mlp.writer].y
    error = relative_error(mlp, x, y)
    if not error <= TOLERANCE[y.dtype]:
        raise InputError(f"the MLP differs from the model's by {error:.1g} of |y| on this text")


def one_ahead(items):
    """Yield the items; while one is in use, a thread makes the next."""
    item = next(items, None)  # not in the thread, where a long wait could not be interrupted
    thread = ThreadPoolExecutor(1)
    try:
        while item is not None:
            upcoming = thread.submit(next, items, None)
            yield item
            item = upcoming.result()
    finally:
        thread.shutdown(wait=False)


def activation_batches(config, model, mlp, done=0, rank=0, world=1):
    """Yield the batches x (batch_size / world, d_model), from number `done` on.

    A buffer is filled with buffer_batches batches, shuffled, used up and filled anew, with nothing
    carried over, so that `done` alone tells where to go on. The first token of every context is
    left out. InputError if an x is not finite, or the MLP is not what the model computes here.
    """
    width = config.context_size - 1
    batch_size = config.batch_size // world
    n_batches = config.tokens // config.batch_size
    first_batches = range(0, n_batches, config.buffer_batches)  # of each filling of the buffer
    sizes = [min(config.buffer_batches, n_batches - first) for first in first_batches]  # in batches
    n_contexts = [math.ceil(batch_size * size / width) for size in sizes]

    first_filling = done // config.buffer_batches  # the one to go on with
    done_in_it = done % config.buffer_batches
    n_skipped = sum(n_contexts[:first_filling])
    contexts = training_contexts(config, model, rank, world, n_skipped)
    token_ids = one_ahead(
        np.stack([*itertools.islice(contexts, n)]) for n in n_contexts[first_filling:]
    )
    buffer = torch.empty(max(n_contexts), width, mlp.W_in.shape[1], device=model.device)
    at_a_time = max(1, 2**13 // config.context_size)  # contexts in a forward pass
    autocast = autocast_of(config, model.device)
    for filling, ids in enumerate(token_ids, first_filling):
        ids = torch.from_numpy(ids).to(model.device)  # (contexts, context_size)
        with autocast():
            if filling == first_filling:
                check_mlp(model, mlp, ids[:1])
            for i in range(0, len(ids), at_a_time):
                x = mlp_inputs(model, mlp, ids[i : i + at_a_time])
                buffer[i : i + len(x)] = x[:, 1:]
        rows = buffer[: len(ids)].flatten(0, 1)[: batch_size * sizes[filling]]
        if not rows.isfinite().all():
            raise InputError(f"NaN or Inf among the inputs x of layer {config.layer}'s MLP")
        order = np.random.default_rng([config.seed, rank, filling]).permutation(len(rows))
        chosen_rows = torch.from_numpy(order).to(model.device).split(batch_size)
        for chosen in chosen_rows[done_in_it if filling == first_filling else 0 :]:
            yield rows[chosen]


# ---- 7. Training ---------------------------------------------------------------------------------


class Pair(nn.Module):
    """What a run trains: both SAEs, the number of steps done, and when each latent last fired."""

    def __init__(self, d_model, n_latents, k):
        super().__init__()
        self.sae_x = TopKSAE(d_model, n_latents, k)
        self.sae_y = TopKSAE(d_model, n_latents, k)
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self.register_buffer("last_fired", torch.zeros(2, n_latents, dtype=torch.long))  # in tokens

    def forward(self, mlp, x, coef, fraction, penalty):  # what DistributedDataParallel calls
        return jsae_loss(self.sae_x, self.sae_y, mlp, x, coef, fraction, penalty)

    @torch.no_grad()
    def finish_step(self, parts, tokens):
        """Set decoder norms to 1 and note which latents fired. parts: what jsae_loss returned."""
        self.sae_x.set_decoder_norm_to_one()
        self.sae_y.set_decoder_norm_to_one()
        for side, s in enumerate((parts["s_x"], parts["s_y"])):
            self.last_fired[side, s.idx[s.acts > 0]] = tokens
        self.step += 1

    def dead_latents(self, tokens):
        """-> [of x, of y]: how many latents had no value above 0 in the last 10M tokens or so far.

        Appendix E counts latents that TopK did not choose.
        """
        return (self.last_fired <= max(0, tokens - 10_000_000)).sum(1).tolist()


def schedule(config, step, n_steps):
    """-> lr and lambda of a step, counted from 1 (Appendix D).

    lr warms up over 1 % of the steps and falls to 0 over the last 20 %; lambda warms up over 5 %.
    """
    warm_up = min(1, step / (0.01 * n_steps))
    decay = min(1, (n_steps - step + 1) / (0.2 * n_steps))
    coef_warm_up = min(1, step / (0.05 * n_steps))
    return config.lr * warm_up * decay, config.jacobian_coef * coef_warm_up


@torch.no_grad()
def measure(sae_x, sae_y, mlp, x, penalty=l1):
    """Metrics of at most 512 tokens of x (B, d_model), for a row of metrics.jsonl; ev may be None.

    mse_x, mse_y            mean squared error over all elements
    ev_x, ev_y              explained variance: 1 - mse / variance about the mean
    jacobian_l1             mean of |J| over k x k elements and tokens
    jacobian_above_0.01     elements with |J| > 0.01 per token
    penalty                 mean over tokens of the penalty that is trained, if it is not l1
    """
    x = x[:512]
    y = mlp(x)
    row = {}
    for side, sae, values in (("x", sae_x, x), ("y", sae_y, y)):
        mse = F.mse_loss(sae(values), values).item()
        variance = values.var(0, correction=0).mean().item()
        row[f"mse_{side}"] = mse
        row[f"ev_{side}"] = 1 - mse / variance if variance > 0 else None
    J = active_jacobian(sae_x, sae_y, mlp, x, sae_x.encode(x), sae_y.encode(y))
    row["jacobian_l1"] = l1(J).mean().item()
    row["jacobian_above_0.01"] = (J.abs() > 0.01).sum().item() / len(J)
    if penalty is not l1:
        row["penalty"] = penalty(J).mean().item()
    return row


def process_number():
    """-> (number of this process, how many there are), as torchrun sets them; (0, 1) without it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def autocast_of(config, device):
    """-> a function that opens the torch.autocast of the settings."""
    bfloat16 = config.dtype == "bfloat16"
    if config.dtype == "auto" and device.type == "cuda":
        bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return partial(torch.autocast, device.type, torch.bfloat16, enabled=bfloat16)


def warn_of_slow_bfloat16(config, device):
    cpu = torch.backends.cpu.get_cpu_capability()
    if config.dtype == "bfloat16" and device.type == "cpu" and cpu != "AVX512":
        notice = f"--dtype bfloat16: this CPU ({cpu}) may have none, and be many times slower"
        tqdm.write(notice, sys.stderr)


def fitted(config, model, mlp, world):
    """-> the settings with context_size at most the model's. InputError if the sizes do not fit."""
    settings = model.config.get_text_config(decoder=True)
    longest = getattr(settings, "max_position_embeddings", None) or config.context_size
    n_latents = config.expansion_factor * mlp.W_in.shape[1]
    if config.k > n_latents:
        raise InputError(f"--k is {config.k}; expected 1 to {n_latents}, the number of latents")
    if config.tokens < config.batch_size:
        raise InputError(
            f"--tokens {config.tokens}: less than one --batch-size {config.batch_size}"
        )
    if config.batch_size % world:
        raise InputError(f"--batch-size {config.batch_size} is not a multiple of {world} processes")
    return dataclasses.replace(config, context_size=min(longest, config.context_size))


def train(config: Config, penalty=l1) -> Path:
    """Train a pair of SAEs -> the run's folder. penalty: of J (tokens, k, k) -> (tokens,).

    Under torchrun each process takes its share of the text and its part of every batch; the first
    one measures and writes. train seeds torch's global generator. An InputError (bad setting, text
    or number) or a KeyboardInterrupt in the first process saves a checkpoint, so that --resume
    loses no step; after any other error --resume goes on from the last checkpoint.
    """
    rank, world = process_number()
    if world > 1 and not distributed.is_initialized():
        distributed.init_process_group()
    model = load_language_model(config)
    if model.device.type == "cuda":
        torch.cuda.set_device(model.device)  # for barrier(), which is given none
    mlp = MLP.from_model(model, config.layer)
    config = fitted(config, model, mlp, world)
    folder = Path(config.output_dir)
    description = describe_run(config, penalty, mlp, world)
    check_folder(folder, config, description)
    if config.resume and is_finished(folder):
        return folder

    torch.manual_seed(config.seed)
    d_model = mlp.W_in.shape[1]
    pair = Pair(d_model, config.expansion_factor * d_model, config.k).to(model.device)
    adam = torch.optim.Adam(pair.parameters(), fused=True)
    if config.resume:
        load_checkpoint(folder, pair, adam, rank)
    if rank == 0:
        warn_of_slow_bfloat16(config, model.device)
    started = time.time()
    batches = activation_batches(config, model, mlp, int(pair.step), rank, world)
    first_batch = next(batches, None)  # now it is known that the text can be read
    if world > 1:
        distributed.barrier()  # all have looked at the folder before the first one writes there
    if rank == 0 and pair.step == 0:
        start_folder(folder, description)
    with saved_when_stopped(folder, pair, adam, rank):
        batches = itertools.chain([first_batch], batches)
        optimize(config, penalty, mlp, pair, adam, batches, folder, started)
    if rank == 0:
        finish_folder(folder, pair, config, model, mlp)
    return folder


def optimize(config, penalty, mlp, pair, adam, batches, folder, started):
    """The training loop: Adam on jsae_loss, from step pair.step + 1 to the last.

    Gradients are clipped to norm 1, of both SAEs together, as in the authors' code. started: the
    time before the first batch was made.
    """
    rank, world = process_number()
    loss_of = pair
    if world > 1:
        loss_of = nn.parallel.DistributedDataParallel(pair, broadcast_buffers=False)
    autocast = autocast_of(config, mlp.W_in.device)
    n_steps = config.tokens // config.batch_size
    log_every = max(1, min(50, n_steps // 10))
    done = int(pair.step)
    filled = saved = time.time()

    bar = tqdm(range(done + 1, n_steps + 1), initial=done, total=n_steps, disable=rank > 0)
    for step, x in zip(bar, batches):
        with signals_held():
            tokens = step * config.batch_size
            lr, coef = schedule(config, step, n_steps)
            adam.param_groups[0]["lr"] = lr
            # a run that is resumed draws the same tokens for jacobian_fraction
            torch.manual_seed((config.seed * n_steps + step) * world + rank)
            with autocast():
                loss, parts = loss_of(mlp, x, coef, config.jacobian_fraction, penalty)
            adam.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(pair.parameters(), 1.0)
            if not norm.isfinite():
                bar.close()
                raise InputError(f"loss {loss.item():g}, norm of the gradient {norm.item():g}")
            adam.step()
            pair.finish_step(parts, tokens)
            if world > 1:
                distributed.all_reduce(pair.last_fired, distributed.ReduceOp.MAX)

            now = time.time()
            if rank == 0 and (step % log_every == 0 or step == n_steps):
                row = {"step": step, "tokens": tokens, "lr": lr, "coef": coef}
                row |= measure(pair.sae_x, pair.sae_y, mlp, x, penalty)
                row["dead_x"], row["dead_y"] = pair.dead_latents(tokens)
                row["grad_norm"] = norm.item()
                row["seconds"] = now - started
                row["tokens_per_second"] = (step - done) * config.batch_size / (now - started)
                append_metrics(folder, row)
                bar.set_postfix(
                    {"ev_x": row["ev_x"], "ev_y": row["ev_y"], "|J|": row["jacobian_l1"]}
                )
            if rank == 0 and step == 10 and done == 0:
                # a step by itself, and its share of filling the buffer
                n_filled = min(config.buffer_batches, n_steps)
                per_step = (now - filled) / 10 + (filled - started) / n_filled
                minutes = per_step * n_steps / 60
                tqdm.write(f"about {minutes:,.1f} minutes; fewer --tokens are faster", sys.stderr)
            if rank == 0 and (step == n_steps or now - saved > 60 * config.checkpoint_minutes):
                save_checkpoint(folder, pair, adam)
                saved = now


# ---- 8. The run folder ---------------------------------------------------------------------------
#
#   config.json              settings, penalty, versions, and what --resume compares
#   sae_x/, sae_y/           cfg.json and sae_weights.safetensors, as SAELens 6 reads them
#   metrics.jsonl            a row for every 50 steps (or tenth of a shorter run)
#   checkpoint.safetensors   what --resume needs; gone when the run is finished

MAY_CHANGE = ("resume", "overwrite", "output_dir", "checkpoint_minutes", "device")  # on resuming


def write_file(path, data):
    """Write bytes so that after a crash the file is whole, or what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".tmp")
    with open(part, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def hash_of_local_text(dataset):
    """SHA-256 of the local files' names and sizes (stdlib: of Python's version); "" on the hub."""
    if dataset == "stdlib":
        return hashlib.sha256(sys.version.encode()).hexdigest()
    path = local_path(dataset)
    if path is None:
        return ""
    lines = [f"{file.relative_to(path)} {file.stat().st_size}" for file in local_files(path)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def hash_of_weights(mlp):
    return hashlib.sha256(safetensors.torch.save(mlp.state_dict())).hexdigest()


def describe_run(config, penalty, mlp, world):
    """-> what config.json holds. Evaluation looks for model and text where they were found."""
    model_path = local_path(config.model)
    text_path = None if config.dataset == "stdlib" else local_path(config.dataset)
    return {
        "config": dataclasses.asdict(config),
        "penalty": getattr(penalty, "__name__", type(penalty).__name__),
        "processes": world,
        "mlp_sha256": hash_of_weights(mlp),
        "text_sha256": hash_of_local_text(config.dataset),
        "model_path": str(model_path or config.model),
        "model_is_local": model_path is not None,
        "text_path": str(text_path or config.dataset),
        "text_is_local": text_path is not None or config.dataset == "stdlib",
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, datasets, np)},
    }


def read_description(folder):
    """-> what config.json holds; {} if there is none of a run. InputError if an old version's."""
    try:
        saved = json.loads((folder / "config.json").read_text())
        is_run = "mlp_sha256" in saved
    except (OSError, ValueError, TypeError):
        return {}
    if is_run and "penalty" not in saved:
        raise InputError(
            f"{folder} is a run of an earlier version of jsae.py: train it again elsewhere"
        )
    return saved if is_run else {}


def is_finished(folder):
    return (folder / "sae_y").exists()  # the last to be written


def check_folder(folder, config, description):
    """InputError unless a run can start in the folder or, with --resume, go on in it."""
    saved = read_description(folder)
    if config.resume:
        if not saved:
            raise InputError(f"--resume: {folder} holds no run (no config.json)")
        check_unchanged(saved, description)
        return
    held = [path for path in folder.glob("*") if path.suffix != ".tmp"]  # .tmp: after a crash
    taken = folder.is_file() or bool(held)
    if not taken or (saved and config.overwrite):
        return
    if not saved:
        raise InputError(f"--output-dir {folder} is taken by what is no run; name another folder")
    if is_finished(folder):
        raise InputError(f"{folder} holds a finished run; --overwrite replaces it")
    raise InputError(f"{folder} holds an unfinished run; --resume goes on, --overwrite replaces it")


def check_unchanged(saved, description):
    """InputError if a run is to go on with other settings, weights, text or processes."""
    for name, now in description.items():
        compared = name not in ("config", "versions", "model_path", "text_path")
        if compared and saved.get(name) != now:
            raise InputError(f"--resume: {name} was {saved.get(name)!r}, now {now!r}")
    for name, now in description["config"].items():
        before = saved["config"].get(name)
        if name not in MAY_CHANGE and before != now:
            raise InputError(f"--resume: {name} was {before!r}, now {now!r}")


def start_folder(folder, description):
    """Remove an earlier run and write the first files of this one."""
    shutil.rmtree(folder / "sae_y", ignore_errors=True)  # first, as it says that a run is finished
    for path in folder.glob("*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != "config.json":  # which is replaced: it says that the folder is a run's
            path.unlink()
    write_file(folder / "config.json", json.dumps(description, indent=2).encode())
    write_file(folder / "metrics.jsonl", b"")


def append_metrics(folder, row):
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")


def save_checkpoint(folder, pair, adam):
    """Both SAEs, step, last_fired and Adam's state, in one file."""
    tensors = pair.state_dict()
    for name, p in pair.named_parameters():
        for key, value in adam.state[p].items():
            tensors[f"adam.{key}.{name}"] = value
    write_file(folder / "checkpoint.safetensors", safetensors.torch.save(tensors))


def load_checkpoint(folder, pair, adam, rank):
    """Load the checkpoint, if there is one, and cut metrics.jsonl back to it."""
    path = folder / "checkpoint.safetensors"
    if path.exists():
        try:
            tensors = safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise InputError(f"{path} is damaged ({error}); --overwrite starts anew") from error
        for name, p in pair.named_parameters():
            for key in ("step", "exp_avg", "exp_avg_sq"):
                adam.state[p][key] = tensors.pop(f"adam.{key}.{name}").to(p.device)
        pair.load_state_dict(tensors)
    metrics = folder / "metrics.jsonl"
    if rank == 0 and metrics.exists():
        rows = metrics.read_text().splitlines(keepends=True)
        rows = [row for row in rows if row.endswith("}\n")]  # a kill can cut the last one short
        rows = [row for row in rows if json.loads(row)["step"] <= pair.step]
        write_file(metrics, "".join(rows).encode())


@contextmanager
def saved_when_stopped(folder, pair, adam, rank):
    """When bad input or a signal ends the body, save the steps that were done, and say so."""
    try:
        yield
    except (InputError, KeyboardInterrupt) as error:
        done = int(pair.step)
        hint = "; --resume goes on" if done else ""
        if done and rank == 0:
            save_checkpoint(folder, pair, adam)
        if isinstance(error, InputError):
            raise InputError(f"step {done + 1}: {error}{hint}") from error
        # its arguments: the signal's number (none for a plain Ctrl-C), a line for run_program
        number = error.args[0] if error.args else signal.SIGINT
        raise KeyboardInterrupt(number, f"stopped at step {done}{hint}") from error


@contextmanager
def signals_held():
    """SIGINT and SIGTERM that come in the body take effect after it; a second one does at once."""
    if threading.current_thread() is not threading.main_thread():  # which alone gets signals
        yield
        return
    caught = []

    def hold(number, frame):
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)

    handlers = {number: signal.signal(number, hold) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for number in caught:
        signal.raise_signal(number)


def finish_folder(folder, pair, config, model, mlp):
    """Write both SAEs in the format of SAELens 6, each folder whole or not at all.

    hook_name: x is the input of the module of that name, y the output.
    """
    names = {module: name for name, module in model.named_modules()}
    hooks = {"sae_x": names[mlp.readers[0]], "sae_y": names[mlp.writer]}
    for name, hook in hooks.items():
        tensors = getattr(pair, name).state_dict()
        n_latents, d_model = tensors["W_enc"].shape
        tensors["W_enc"] = tensors["W_enc"].T.contiguous()  # (d_in, d_sae) there
        cfg = {
            "architecture": "topk",
            "d_in": d_model,
            "d_sae": n_latents,
            "k": config.k,
            "apply_b_dec_to_input": False,
            "dtype": "float32",
            "device": "cpu",
            "metadata": {
                "sae_lens_version": "6.0.0",
                "model_name": config.model,
                "hook_name": hook,
                "context_size": config.context_size,
                "prepend_bos": True,
            },
        }
        part = folder / f"{name}.tmp"
        write_file(part / "cfg.json", json.dumps(cfg, indent=2).encode())
        write_file(part / "sae_weights.safetensors", safetensors.torch.save(tensors))
        shutil.rmtree(folder / name, ignore_errors=True)
        os.replace(part, folder / name)
    (folder / "checkpoint.safetensors").unlink(missing_ok=True)


def run_folder(path_or_hub_id) -> Path:
    """-> the local folder of a run, or a local copy of its files on the hub."""
    path = local_path(path_or_hub_id)
    if path is not None:
        return path
    files = ["config.json", "sae_x/*", "sae_y/*"]
    return Path(snapshot_download(str(path_or_hub_id), allow_patterns=files))


def load_run(path_or_hub_id):
    """-> (sae_x, sae_y, config) of a finished run: a folder, or the id of a hub repository."""
    try:
        folder = run_folder(path_or_hub_id)
        description = read_description(folder)
        if not description:
            raise InputError("it has no config.json of a run")
        config = Config(**description["config"])
        saes = []
        for name in ("sae_x", "sae_y"):
            tensors = safetensors.torch.load_file(folder / name / "sae_weights.safetensors")
            tensors["W_enc"] = tensors["W_enc"].T
            n_latents, d_model = tensors["W_enc"].shape
            sae = TopKSAE(d_model, n_latents, config.k)
            sae.load_state_dict(tensors)
            saes.append(sae)
    except Exception as error:  # whatever is wrong with the files or the hub
        raise InputError(f"{path_or_hub_id} is not a finished run: {error}") from error
    return *saes, config


# ---- 9. Finding the MLP in a transformers model --------------------------------------------------
#
# Names differ from model to model, so the MLP is found by what it computes. A forward pass shows
# which linear maps are called, with which input and output; every way in which those of one module
# can be the W_in, W_gate and W_out of an MLP is tried, with every phi, until one reproduces y.

LINEAR = (nn.Linear, transformers.Conv1D)
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
LOUDER = 50  # x is also taken this many times larger: it shows clamps, and tells phi's apart


class LinearCall(NamedTuple):
    """What a linear map did in a forward pass: y = x W^T + b, W (out, in)."""

    W: Tensor
    b: Tensor
    x: Tensor
    y: Tensor


class Candidate(NamedTuple):
    """What may be an MLP: its weights in the order of MLP's arguments, and their modules."""

    weights: tuple
    readers: list
    writer: nn.Module


@contextmanager
def without_dropout(model):
    """The model in evaluation mode; afterwards every module is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def mlp_of_model(model, layer):
    """The MLP of one layer of a transformers causal LM. InputError if it has no dense one."""
    n_words = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(32, device=model.device).reshape(2, 16) % n_words
    run = partial(model, input_ids=ids, use_cache=False)
    name = type(model).__name__
    with without_dropout(model):
        blocks = called_blocks(model, run)
        if not 0 <= layer < len(blocks):
            last = len(blocks) - 1
            raise InputError(f"there is no layer {layer} of {name}; --layer takes 0 to {last}")
        return find_mlp(blocks[layer], run, f"layer {layer} of {name}")


def mlp_of_module(module):
    """The MLP inside module(x). InputError if there is no single dense one."""
    name = type(module).__name__
    maps = [m for m in module.modules() if isinstance(m, LINEAR)]
    if not maps:
        raise InputError(f"{name} has no linear map; expected a dense MLP")
    W = maps[0].weight
    d_model = W.shape[1] if isinstance(maps[0], nn.Linear) else W.shape[0]
    x = torch.randn(2, 16, d_model, generator=torch.Generator().manual_seed(0))
    with without_dropout(module):
        try:
            return find_mlp(module, partial(module, x.to(W)), name)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # x has the width of the map that was registered first
            raise InputError(f"{name} does not take x of width {d_model}: {error}") from error


@torch.no_grad()
def called_blocks(model, run):
    """-> the largest nn.ModuleList of which run() calls every module: the blocks of the text."""
    called = set()

    def note(module, args):
        called.add(module)

    with nn.modules.module.register_module_forward_pre_hook(note):
        run()
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    lists = [blocks for blocks in lists if called.issuperset(blocks)]
    if not lists:
        raise InputError(f"{type(model).__name__} has no list of blocks; expected a transformer")
    return max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()))


@torch.no_grad()
def watched(block, run, amplified=()):
    """Call run() -> (the modules of block that it called, {linear map: LinearCall}).

    Both are in order of execution. A map that is called twice is left out: which of its inputs is x
    would be ambiguous. The input of the modules `amplified` is multiplied by LOUDER.
    """
    inside = set(block.modules())
    called = []
    calls = {}

    def amplify(module, args):
        if module in amplified:
            return (LOUDER * args[0], *args[1:])

    def note(module, args, output):
        if module not in inside:
            return
        called.append(module)
        if isinstance(module, LINEAR) and module.weight.is_floating_point() and args:
            W = module.weight if isinstance(module, nn.Linear) else module.weight.T
            # copies, because models may add to x and y in place
            calls[module] = LinearCall(W, module.bias, args[0].clone(), output.clone())

    hooks = nn.modules.module  # hooks for all modules: two handles instead of two for each
    with hooks.register_module_forward_pre_hook(amplify), hooks.register_module_forward_hook(note):
        run()
    calls = {module: call for module, call in calls.items() if called.count(module) == 1}
    return called, calls


def candidates_of(block, calls):
    """Yield every Candidate: two or three maps of one module, any of them as the writer.

    W_in, or W_gate and W_in in either order, are the weights of the other maps, or two halves of
    one other map.
    """
    for module in block.modules():
        children = set(module.children())
        maps = [m for m in calls if m in children]
        if len(maps) not in (2, 3):
            continue
        for writer in maps:
            readers = [m for m in maps if m is not writer]
            W_out, b_out = calls[writer].W, calls[writer].b
            d_mlp = W_out.shape[1]
            parts = []
            for reader in readers:
                W, b = calls[reader].W, calls[reader].b
                for start in range(0, len(W), d_mlp):  # one part, or two of a fused map
                    rows = slice(start, start + d_mlp)
                    parts.append((W[rows], None if b is None else b[rows]))
            if any(W.shape != W_out.T.shape for W, b in parts):
                continue
            if len(parts) == 1:
                yield Candidate((*parts[0], W_out, b_out), readers, writer)
            if len(parts) == 2:
                for (W_in, b_in), (W_gate, b_gate) in (parts, parts[::-1]):
                    weights = (W_in, b_in, W_out, b_out, W_gate, b_gate)
                    yield Candidate(weights, readers, writer)


def has_experts(called, candidates, calls):
    """Whether tokens go to experts.

    Then a called module has a stack of weights, or some candidates saw a part of the tokens only.
    """
    # the kernel of a convolution has three dimensions, too
    others = [m for m in called if not isinstance(m, nn.modules.conv._ConvNd)]
    weights = [p for m in others for p in m.parameters(recurse=False)]
    n_tokens = {calls[c.writer].y[..., 0].numel() for c in candidates}
    return any(p.ndim == 3 and min(p.shape) > 1 for p in weights) or len(n_tokens) > 1


def known_activation(act, device):
    """-> the known function that has the values of act, or act itself if elementwise; else None.

    A foreign module may raise anything when it is given a plain vector, which means None.
    """
    with suppress(Exception):
        z = torch.linspace(-LOUDER, LOUDER, 2001, device=device)
        values = act(z)
        for known in ACT_GRADS:
            if torch.allclose(values, known(z), rtol=1e-6, atol=1e-5):
                return known
        if is_elementwise(act):
            return act
    return None


def activations_of(block):
    """-> functions to try as phi: the elementwise ones that the block holds, then the known ones.

    Looked at: modules without children, and plain functions that are attributes of modules.
    """
    held = []
    for module in block.modules():
        if not isinstance(module, LINEAR) and not list(module.children()):
            held.append(module)
        for value in vars(module).values():
            if isinstance(value, (types.FunctionType, types.BuiltinFunctionType, partial)):
                held.append(value)
    device = next(block.parameters()).device
    found = [known_activation(act, device) for act in held]
    found = [act for act in found if act is not None]
    return list(dict.fromkeys([*found, *ACT_GRADS]))  # each once


def varies(v):
    """Whether v (..., d) is finite and differs between tokens: a constant y fits to many MLPs."""
    rows = v.flatten(0, -2)
    return bool(rows.isfinite().all()) and bool((rows != rows[0]).any())


def relative_error(mlp, x, y):
    """|mlp(x) - y| / |y|, over all elements."""
    y = y.to(mlp.W_in.dtype)
    return ((mlp(x.to(mlp.W_in.dtype)) - y).norm() / y.norm()).item()


@torch.no_grad()
def find_mlp(block, run, where) -> MLP:
    """The MLP in `block` that run() calls: the candidate that reproduces y best, within TOLERANCE.

    It must do so at x and, unless y is not finite there, at LOUDER times x. InputError if the block
    has experts, or nothing fits.
    """
    called, calls = watched(block, run)
    candidates = list(candidates_of(block, calls))
    if has_experts(called, candidates, calls):
        raise InputError(f"{where} is a mixture of experts; expected one dense MLP")
    activations = activations_of(block)
    best = None
    least = math.inf
    for weights, readers, writer in candidates:
        x, y = calls[readers[0]].x, calls[writer].y
        if not (varies(x) and varies(y)):
            continue
        for act in activations:
            mlp = MLP(*weights, act=act)
            error = relative_error(mlp, x, y)
            if not error <= TOLERANCE[y.dtype]:
                continue
            _, loud = watched(block, run, readers)
            loud_error = error
            if loud[writer].y.isfinite().all():
                loud_error = relative_error(mlp, loud[readers[0]].x, loud[writer].y)
            if loud_error <= TOLERANCE[y.dtype] and max(error, loud_error) < least:
                best = mlp
                best.readers = tuple(readers)
                vars(best)["writer"] = writer  # plain assignment would make it a part of the MLP
                least = max(error, loud_error)
    if best is None:
        raise InputError(f"{where} has no single dense MLP, plain or gated, that can be reproduced")
    return best


# ---- 10. Command line ----------------------------------------------------------------------------


def make_parser():
    """-> a parser of Config's fields; it returns only what was given, and raises InputError."""
    demo = ", ".join(f"{name} {value}" for name, value in DEMO.items())
    parser = argparse.ArgumentParser(
        prog="jsae.py",
        usage="python jsae.py [--setting value ...]",
        description="Train two sparse autoencoders and make the Jacobian between them sparse.",
        epilog=f"Without --model, the defaults are those of the demo: {demo}.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )

    def refuse(message):
        raise InputError(message)

    parser.error = refuse  # in place of a usage block and exit
    groups = {}
    for field in dataclasses.fields(Config):
        about = field.metadata
        if about["group"] not in groups:
            groups[about["group"]] = parser.add_argument_group(about["group"])
        group = groups[about["group"]]
        if field.type is bool:
            group.add_argument(flag(field.name), action="store_true", help=about["text"])
        else:
            text = about["text"]
            if field.default != "":
                text += f" (default: {field.default})"
            group.add_argument(
                flag(field.name), type=field.type, choices=about["choices"], help=text
            )
    return parser


def run_program(name, body, argv) -> int:
    """Call body(argv) -> exit status: 0; after one line on stderr 2, or 128 + a signal's number."""
    try:
        body(sys.argv[1:] if argv is None else argv)
        return 0
    except SystemExit as end:  # of --help
        return end.code or 0
    except KeyboardInterrupt as stop:
        number = stop.args[0] if stop.args else signal.SIGINT
        line = stop.args[1] if len(stop.args) > 1 else "stopped"
        status = 128 + number
    except (InputError, OSError, torch.OutOfMemoryError) as error:
        line = f"error: {error}"
        status = 2
    print(f"{name}:", " ".join(line.split()), file=sys.stderr)
    return status


def train_by_command(argv):
    """What `python jsae.py` does: parse, train, print the last metrics."""
    given = vars(make_parser().parse_args(argv))
    if "model" not in given:
        given = DEMO | given
        if not (HERE / DEMO["model"]).is_dir():
            missing = f"there is no {DEMO['model']} beside jsae.py"
            raise InputError(f"{missing}; try --model EleutherAI/pythia-70m --layer 3")
    config = Config(**given)

    def stop(number, frame):
        raise KeyboardInterrupt(number)

    rank, world = process_number()
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            # the first process saves and ends; torchrun then ends the others
            signal.signal(number, stop if rank == 0 else signal.SIG_IGN)
    if rank == 0:
        shown = [*DEMO, "output_dir"]
        print("settings:", ", ".join(f"{name} {getattr(config, name)}" for name in shown))
    folder = train(config)
    if world > 1:
        distributed.destroy_process_group()
    if rank == 0:
        last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        for name in ("ev_x", "ev_y", "jacobian_l1", "jacobian_above_0.01", "tokens_per_second"):
            if last[name] is not None:
                print(f"{name:22} {last[name]:,.4g}")
        print(f"{'evaluate it with':22} python {HERE / 'evaluate.py'} {folder}")


def main(argv=None) -> int:
    """-> exit status: 0, 2 after one line about what was given, 130 or 143 after a signal."""
    return run_program("jsae.py", train_by_command, argv)


if __name__ == "__main__":
    sys.exit(main())
