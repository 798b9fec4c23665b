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

    python jsae.py                                             a small bundled model, in minutes
    python jsae.py --model EleutherAI/pythia-70m --layer 3     the paper's setting
    python jsae.py --help                                      every setting

Sections 1 to 3 are the method and can be copied, with the imports, as one block. Section 4 is the
same loss in less time and memory, section 5 finds the MLP in a transformers model, 6 to 8 train.
test_oracle_J_equals_jacrev in test_jsae.py compares J with autodiff: at x_hat, of f_s as Eq. 3 has
it; at x (stable setup), of e_y . f . (d_x + constant) . tau_k, where the constant is x - x_hat.
"""

import argparse
import copy
import csv
import dataclasses
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import shlex
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import datasets
import filelock
import fsspec
import numpy as np
import pyarrow.parquet
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


def with_derivative(act, like):
    """-> phi and phi': a function of ACT_GRADS if act has its values, else act itself and autodiff.

    act is tried on numbers of like's dtype and device. ValueError if it is not elementwise: then
    act(z)[::7] differs from act(z[::7]).
    """
    z = torch.linspace(-50, 50, 2001, dtype=like.dtype, device=like.device)
    message = f"{act} is not elementwise; expected phi of an MLP"
    try:
        values = act(z.clone())  # it may work in place
        is_elementwise = torch.allclose(values[::7], act(z[::7].clone()), atol=1e-6)
    except Exception as error:  # whatever act raises that cannot take a vector
        raise ValueError(message) from error
    if values.shape != z.shape or values.dtype != z.dtype or not is_elementwise:
        raise ValueError(message)
    for known, grad in ACT_GRADS.items():
        if torch.allclose(values, known(z), rtol=1e-6, atol=1e-5):
            return known, grad
    return act, torch.func.grad(lambda z: act(z.clone()).sum())  # element by element


def frozen_copy(weight):
    """A contiguous copy without gradient, in float32 if the model has less."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return weight.detach().to(dtype).contiguous().clone()


class MLP(nn.Module):
    """The frozen weights of one transformer MLP. W_gate is None in a plain MLP; biases may be None.

    plain:  y = W_out phi(W_in x + b_in) + b_out                                          (Eq. 8)
    gated:  y = W_out (phi(W_gate x + b_gate) * (W_in x + b_in)) + b_out           (Eq. 17 to 21)

    act is phi, any elementwise function. ValueError if it is not elementwise.
    """

    def __init__(self, W_in, b_in, W_out, b_out, W_gate=None, b_gate=None, act=F.gelu):
        super().__init__()
        names = ("W_in", "b_in", "W_out", "b_out", "W_gate", "b_gate")
        for name, weight in zip(names, (W_in, b_in, W_out, b_out, W_gate, b_gate)):
            self.register_buffer(name, weight if weight is None else frozen_copy(weight))
        if isinstance(act, nn.Module):  # it may have parameters
            act = copy.deepcopy(act).requires_grad_(False)
        self.act, self.act_grad = with_derivative(act, self.W_in)
        self.maps = ()  # set by find_mlp: the language model's linear maps, W_out's last

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

    def scaled(self, scale_x: float, scale_y: float) -> "MLP":
        """The same map between x / scale_x and y / scale_y."""
        W_in = self.W_in * scale_x
        W_out = self.W_out / scale_y
        b_out = None if self.b_out is None else self.b_out / scale_y
        W_gate = None if self.W_gate is None else self.W_gate * scale_x
        mlp = MLP(W_in, self.b_in, W_out, b_out, W_gate, self.b_gate, self.act)
        mlp.maps = self.maps
        return mlp


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

    Let r = weighted_rows(w, W, idx), linear in w and in W. Its vector-Jacobian products with x are

        in w: dw[b, i] = x[b] . W[idx[b, i]], which is z, whatever w is;
        in W: dW[n] = the sum of w[b, i] x[b] over all b, i with idx[b, i] = n, which for w = dz is
        the gradient that z passes on to W.

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
    """x (B, d_model), a constant -> (MSE(x, x_hat) with gradients for the SAE, Latents (B, k)).

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
        return F.mse_loss(x_hat, x), Latents(acts.detach(), idx)


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
                values = penalty(J * active[chunk])
                if values.shape != J.shape[:1]:
                    raise ValueError(f"penalty gives {tuple(values.shape)}; expected one per token")
                S = torch.autograd.grad(values.sum(), J)[0]
            total += values.detach().sum()

            dA = S @ D.to(dtype)  # (chunk, k_y, d_mlp)
            dD = S.mT @ A.to(dtype)  # (chunk, k_x, d_mlp)
            dTs[0].index_add_(0, i_y, dA.flatten(0, 1))
            for c, dT_x in zip(chunk_cs, dTs[1:]):
                dT_x.index_add_(0, i_x, (c * dD).flatten(0, 1))

        ctx.save_for_backward(*dTs)
        return total

    @staticmethod
    def backward(ctx, dtotal):
        return None, None, None, None, None, *[dtotal * dT for dT in ctx.saved_tensors]


def fast_penalty(sae_x, sae_y, mlp, x, s_x, s_y, penalty=l1):
    """penalty(active_jacobian(...)).mean(), fast, with gradients in sae_x.W_dec and sae_y.W_enc.

    sae_x needs only W_dec, sae_y only W_enc, (n_latents, d_model). x (B, d_model), in the dtype of
    the MLP, counts as a constant: none of the gradient goes through phi'(x). Latents (B, k).
    penalty: a function of J (tokens, k, k) -> (tokens,).
    """
    dtype = dtype_of_large_products(x)
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


def jsae_loss(sae_x, sae_y, mlp, x, jacobian_coef, penalty=l1):
    """plain_jsae_loss in a fraction of its time and memory. x (B, d_model) -> (loss, parts).

    parts, all detached: mse_x, mse_y, the Latents s_x and s_y and, unless jacobian_coef is 0, the
    penalty.
    """
    x = x.detach().to(sae_x.W_enc.dtype)
    y = mlp(x).to(x.dtype)
    mse_x, s_x = mse_and_latents(sae_x, x)
    mse_y, s_y = mse_and_latents(sae_y, y)
    loss = mse_x + mse_y
    parts = {"mse_x": mse_x.detach(), "mse_y": mse_y.detach(), "s_x": s_x, "s_y": s_y}
    if jacobian_coef:
        value = fast_penalty(sae_x, sae_y, mlp, x, s_x, s_y, penalty)
        loss = loss + jacobian_coef * value
        parts["penalty"] = value.detach()
    return loss, parts


# ---- 5. The MLP in a transformers model ----------------------------------------------------------
#
# Names differ from model to model, so the MLP is found by what it computes. Every way in which the
# two or three linear maps of one module can be W_in, W_gate and W_out is a candidate. It fits if,
# with one phi or another, it gives y at the model's own x and at 50 times that, which reaches clamps
# and tells activation functions apart. Exactly one must fit, and it must be the largest candidate: an
# adapter beside an MLP is not the MLP, and a wrong MLP has a wrong Jacobian. While training, it is
# compared with the model again on each filling of the buffer.

LINEAR = (nn.Linear, transformers.Conv1D)
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}


class InputError(ValueError):
    """What was given, what was expected, what to do: one line."""


def weight_and_bias(linear):
    """-> W (out, in), b (out,)."""
    W = linear.weight if isinstance(linear, nn.Linear) else linear.weight.T
    b = torch.zeros_like(W[:, 0]) if linear.bias is None else linear.bias
    return W, b


def candidates(block):
    """Yield (maps, arguments): linear maps, W_out last, and the arguments of MLP they could be."""
    for module in block.modules():
        linear = [child for child in module.children() if isinstance(child, LINEAR)]
        if len(linear) not in (2, 3):
            continue
        for maps in itertools.permutations(linear):
            weights = [weight_and_bias(linear) for linear in maps]
            W, b = weights[0]
            second = weights[1:-1]  # W_in, if there are three
            W_out, b_out = weights[-1]
            d_model, d_mlp = W_out.shape
            if second and W.shape == second[0][0].shape == (d_mlp, d_model):
                yield maps, (*second[0], W_out, b_out, W, b)  # the first is the gate
            if not second and W.shape == (d_mlp, d_model):
                yield maps, (W, b, W_out, b_out)
            if not second and W.shape == (2 * d_mlp, d_model):  # W_in and W_gate in one
                one = W[:d_mlp], b[:d_mlp]
                other = W[d_mlp:], b[d_mlp:]
                yield maps, (*one, W_out, b_out, *other)
                yield maps, (*other, W_out, b_out, *one)


@torch.no_grad()
def watch(model, ids, maps, factor=1):
    """-> x of maps[0] and y of maps[-1] in the forward pass, (tokens, d_model) each.

    The inputs of all maps but the last are multiplied by factor. None unless the first and the last
    are each called once, on all tokens.
    """
    xs = []
    ys = []

    def note_x(module, args):
        x = factor * args[0]
        if module is maps[0]:
            xs.append(x.flatten(0, -2))
        return x

    def note_y(module, args, y):
        ys.append(y.flatten(0, -2).clone())  # the model may add to it in place

    with ExitStack() as hooks:
        for reader in maps[:-1]:
            hooks.enter_context(reader.register_forward_pre_hook(note_x))
        hooks.enter_context(maps[-1].register_forward_hook(note_y))
        model(input_ids=ids, use_cache=False)
    if [len(rows) for rows in (*xs, *ys)] != [ids.numel(), ids.numel()]:
        return None
    return xs[0], ys[0]


def is_reproduced(mlp, x, y):
    """Whether mlp(x) is y (tokens, d_model) but for rounding.

    Errors are compared with how far y is from its median, over all tokens together, and for the
    median token: one of huge norm hides the rest. Tokens whose y is the median itself, as in a text
    of one word, are left out.
    """
    tolerance = TOLERANCE[y.dtype]
    y = y.to(mlp.W_in.dtype)
    varies = (y - y.median(0).values).norm(dim=1)  # a mean would be that of the largest
    compared = varies > tolerance * y.norm(dim=1)  # (tokens,)
    varies = varies[compared]
    error = (mlp(x.to(y.dtype)) - y)[compared].norm(dim=1)
    fits_all = error.norm() < tolerance * varies.norm()
    return bool(fits_all and (error / varies).median() < tolerance)


@torch.no_grad()
def find_mlp(model, layer) -> MLP:
    """The MLP of one layer of a transformers causal LM, whose layers are its largest ModuleList.

    InputError unless there is exactly one, no larger candidate, and nothing that looks like
    experts: a stack of weights, or a candidate that is not called once, on all tokens. InputError if
    the model is not causal.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    n_weights = [sum(p.numel() for p in blocks.parameters()) for blocks in lists]
    blocks = lists[n_weights.index(max(n_weights))] if lists else ()  # of equal ones the outermost
    name = type(model).__name__
    if not 0 <= layer < len(blocks):
        raise InputError(f"{name} has no layer {layer}; --layer takes 0 to {len(blocks) - 1}")
    block = blocks[layer]
    expected = f"layer {layer} of {name}: expected exactly one dense MLP"
    if any(p.ndim == 3 and p.shape[1] > 1 for p in block.parameters()):
        raise InputError(f"{expected}; it holds stacks of weights, as experts are")
    embedding = model.get_input_embeddings().weight
    ids = torch.arange(24, device=model.device) % len(embedding)
    ids = torch.stack([ids[:16], torch.cat([ids[:8], ids[16:]])])  # two rows that begin alike
    one, other = model(input_ids=ids, use_cache=False).logits[:, :8]
    if not one.isfinite().all():
        raise InputError("NaN or Inf among what the model predicts; expected weights without any")
    if not (one - other).norm() <= TOLERANCE[one.dtype] * one.norm():
        raise InputError("not causal: what the model predicts depends on what comes later")

    acts = []  # the block's own first
    like = frozen_copy(embedding[0])
    for module in block.modules():
        with suppress(ValueError):
            acts.append(with_derivative(module, like)[0])
    acts += ACT_GRADS
    found = []
    sizes = []  # of all candidates
    for maps, arguments in candidates(block):
        examples = [watch(model, ids, maps, factor) for factor in (1, 50)]
        if None in examples:
            raise InputError(f"{expected}; some are not called once, on all tokens, as experts are")
        sizes.append(sum(linear.weight.numel() for linear in maps))
        for act in acts:
            mlp = MLP(*arguments, act=act)
            if all(is_reproduced(mlp, x, y) for x, y in examples):
                mlp.maps = maps
                found.append((sizes[-1], mlp))
                break
    if len(found) != 1:
        raise InputError(f"{expected}; {len(found)} of its modules fit")
    size, mlp = found[0]
    if size < max(sizes):
        raise InputError(f"{expected}; what fits is smaller than what does not")
    return mlp


# ---- 6. Settings, text, activations --------------------------------------------------------------

HERE = Path(globals().get("__file__", "jsae.py")).resolve().parent  # a notebook has no __file__
UNDER_TORCHRUN = "TORCHELASTIC_RUN_ID" in os.environ  # without it, RANK is left from something else
WORLD = int(os.environ.get("WORLD_SIZE") or 1) if UNDER_TORCHRUN else 1  # processes
RANK = int(os.environ.get("RANK") or 0) if UNDER_TORCHRUN else 0  # number of this one
LEAST = {"layer": 0, "seed": 0, "jacobian_coef": 0, "lr": 1e-9, "context_size": 2}  # else 1
MOST = 2**63 - 1
CHOICES = {
    "randomize_weights": ("none", "init", "shuffle", "paper"),
    "dtype": ("auto", "float32", "bfloat16"),
}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


@dataclasses.dataclass
class Config:
    """A run's settings, each a flag (--batch-size 4096, --no-normalize). Defaults: the paper's.

    Without --model, the settings of DEMO take their place: a small bundled model.
    """

    model: str = "EleutherAI/pythia-70m"  # hub id, ID@REVISION or folder of a causal LM
    layer: int = 3  # whose MLP is decomposed, from 0
    randomize_weights: str = "none"  # control of section 5.3: none, init, shuffle or paper
    dataset: str = "monology/pile-uncopyrighted"  # hub id, or ID:CONFIG; local file, folder; stdlib
    split: str = "train"  # of a data set of the hub
    column: str = "text"  # of the data set: text, or lists of token ids
    context_size: int = 2048  # tokens, at most what the model takes
    k: int = 32  # active latents per token, in both SAEs
    expansion_factor: int = 32  # R: latents of an SAE per dimension of x
    jacobian_coef: float = 1.0  # lambda; 0: two traditional SAEs
    normalize: bool = False  # divide x and y by their mean norm / sqrt(d_model), one number each
    tokens: int = 300_000_000  # rounded down to whole batches
    lr: float = 5e-4  # Adam's learning rate
    batch_size: int = 4096  # tokens per step
    buffer_batches: int = 32  # batches of activations that are shuffled together
    seed: int = 0  # of SAEs, order and random control
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    dtype: str = "auto"  # of large products: float32, bfloat16; auto: bfloat16 on a GPU that has it
    output_dir: str = ""  # default: a folder in runs/, named after the settings

    def __post_init__(self):
        check_settings(self)
        if not self.dataset:
            raise InputError("--dataset is ''; expected a name, a file or a folder")
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.dtype == "auto":
            is_fast = torch.cuda.is_bf16_supported(including_emulation=False)
            self.dtype = "bfloat16" if "cuda" in self.device and is_fast else "float32"
        for name in ("model", "dataset"):  # to be found again from another folder
            path = os.path.expanduser(getattr(self, name))
            if os.path.exists(path) and path != "stdlib":
                setattr(self, name, os.path.abspath(path))
        if not self.output_dir:
            name = f"{Path(self.model).name}-L{self.layer}-R{self.expansion_factor}-k{self.k}"
            name += f"-lambda{self.jacobian_coef:g}-{self.tokens / 1e6:g}M-seed{self.seed}"
            if self.normalize:
                name += "-normalize"
            if self.randomize_weights != "none":
                name += f"-{self.randomize_weights}"
            self.output_dir = f"runs/{name}"
        self.output_dir = os.path.expanduser(self.output_dir)


DEMO = {  # with settings of your own: Config(**DEMO | {"tokens": 1_000_000})
    "model": str(HERE / "assets" / "tiny-pythia"),
    "layer": 0,
    "normalize": True,
    "dataset": "stdlib",
    "context_size": 256,
    "k": 16,
    "expansion_factor": 4,
    "tokens": 500_000,
    "lr": 3e-3,
    "batch_size": 2048,
}


def flag(name):
    return "--" + name.replace("_", "-")


def notice(text):
    """Print a line on stderr, above the progress bar, in the first process only."""
    if RANK == 0:
        tqdm.write(text, sys.stderr)


def check_settings(settings):
    """InputError if a field of a dataclass has a value that makes no sense."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        given = f"{flag(field.name)} is {value!r}"
        choices = CHOICES.get(field.name)
        if choices and value not in choices:
            raise InputError(f"{given}; expected {', '.join(choices)}")
        if field.type in (int, float):
            least = LEAST.get(field.name, 1)
            is_number = isinstance(value, (int, field.type))
            if not is_number or not least <= value <= MOST:  # NaN is not
                kind = "a whole number" if field.type is int else "a number"
                raise InputError(f"{given}; expected {kind} from {least} to 2^63 - 1")


def load_model(config):
    """-> the causal LM of the settings or its random control, frozen, in float32; its tokenizer."""
    name = config.model
    options = {"trust_remote_code": False}
    if "@" in name and not Path(name).exists():
        name, options["revision"] = name.split("@", 1)
    if Path(name, "adapter_config.json").exists():  # transformers may ignore it without a word
        raise InputError(f"--model {name} holds an adapter: merge it into its model first")
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **options
        )
        wrong = [*info["missing_keys"], *info["mismatched_keys"]]
        if wrong:
            raise InputError(f"{len(wrong)} weights are missing or of another size, as {wrong[0]}")
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **options)
        if not tokenizer("a", add_special_tokens=False).input_ids:  # its files are missing
            raise InputError("its tokenizer knows no words")
        model = randomized(model, config.randomize_weights, config.seed)
        return model.eval().requires_grad_(False).to(config.device), tokenizer
    except Exception as error:  # whatever transformers, the hub or the device raises
        raise InputError(f"--model {config.model} on {config.device}: {error}") from error


@torch.no_grad()
def randomized(model, how, seed):
    """The control of section 5.3, drawn on the CPU.

    init: every parameter is drawn anew as by the model's own initialiser; shuffle: the entries of
    every parameter are permuted; paper, what the authors' code does: every parameter of two or more
    dimensions is normal with std 0.8 / sqrt(d_model), the rest is kept.
    """
    torch.manual_seed(seed)
    if how == "init":
        return transformers.AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    d_model = model.get_input_embeddings().weight.shape[1]
    for p in model.parameters():
        if how == "shuffle":
            p.copy_(p.flatten()[torch.randperm(p.numel())].view_as(p))
        if how == "paper" and p.ndim >= 2:
            p.normal_(std=0.8 / math.sqrt(d_model))
    return model


def is_held_out(data):
    """Whether bytes belong to the twentieth of the text that is never trained on."""
    return zlib.crc32(data) % 20 == 0


def stdlib_files():
    """Yield (text, whether it is held out) of the files of Python's own library, subjects mixed.

    Held out, by their paths, are those that the bundled language model has not seen either.
    """
    root = Path(os.__file__).parent
    names = [path.relative_to(root).as_posix() for path in root.rglob("*.py")]
    names = [name for name in names if "-packages/" not in name]  # not what pip installed
    for name in sorted(names, key=lambda name: zlib.crc32(name.encode())):
        yield (root / name).read_text("utf-8", "replace"), is_held_out(name.encode())


def kind_of_file(path):
    """The suffix of a file's name in small letters, without that of a compression."""
    return (path.with_suffix("") if path.suffix in COMPRESSED else path).suffix.lower()


def open_file(path):
    """Open a local file as bytes, decompressed."""
    compression = "infer" if path.suffix in COMPRESSED else None
    return fsspec.filesystem("file").open(path, "rb", compression=compression)


def is_text(path):
    """Whether a local path is a file that can be read: no .json, no zero byte at its start."""
    if kind_of_file(path) == ".parquet":
        return True
    with suppress(Exception), open_file(path) as file:  # a folder, a damaged archive
        return kind_of_file(path) != ".json" and b"\0" not in file.read(2**16)
    return False


def local_files(root):
    """-> (files to read, in order of names; files passed over) of a local file or folder.

    A folder is all files below it but hidden ones. Passed over is what cannot be text (pictures,
    UTF-16, .zip), a .json, a link to a folder, and what is in the folder of a run.
    """
    paths = sorted(root.rglob("*")) if root.is_dir() else [root]
    settings = [path for path in paths if path.name == "config.json" and path.is_file()]
    runs = {path.parent for path in settings if b"mlp_sha256" in path.read_bytes()}
    files = []
    passed_over = []
    for path in paths:
        is_hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
        is_folder = path.is_dir() and not path.is_symlink()
        if is_hidden or is_folder:
            continue
        if runs.isdisjoint(path.parents) and is_text(path):
            files.append(path)
        else:
            passed_over.append(path)
    return files, passed_over


def rows_of(path, column):
    """Yield the rows, dicts, of a local file: .jsonl, .csv or .parquet; any other is one text.

    A byte that is not UTF-8 is replaced.
    """
    kind = kind_of_file(path)
    if kind == ".parquet":
        table = pyarrow.parquet.ParquetFile(path)
        columns = [column] if column in table.schema_arrow.names else None
        for batch in table.iter_batches(64, columns=columns):
            yield from batch.to_pylist()
        return
    with open_file(path) as file:
        text = io.TextIOWrapper(file, "utf-8-sig", "replace")
        if kind in (".jsonl", ".ndjson"):
            yield from (json.loads(line) for line in text if line.strip())
        elif kind == ".csv":
            csv.field_size_limit(2**31 - 1)  # characters of a field; the default is 2^17
            yield from csv.DictReader(text)
        else:
            yield {column: text.read()}


def load_rows(config):
    """Yield (row, where it stands) of a data set of the hub, or of a local file or folder."""
    path = Path(config.dataset)
    source = path
    number = 0
    try:
        if not path.exists():
            name = config.dataset.split(":", 1)
            sources = {path: datasets.load_dataset(*name, split=config.split, streaming=True)}
        elif (path / "state.json").exists():  # by save_to_disk
            sources = {path: datasets.load_from_disk(str(path))}
        else:
            files, passed_over = local_files(path)
            sources = {file: rows_of(file, config.column) for file in files}
            if not files:
                raise InputError(f"no text; passed over: {' '.join(map(str, passed_over[:9]))}")
        for source, rows in sources.items():
            number = 0
            for number, row in enumerate(rows, 1):
                yield row, f"{source}, row {number}"
    except Exception as error:  # whatever a library that reads text raises
        reason = str(error) or repr(error)
        raise InputError(f"--dataset {source}, after row {number}: {reason}") from error


def pieces(config):
    """Yield (text or token ids, whether it is held out, number of its document): one pass.

    A document is a row or, of stdlib and plain texts, a file. A piece is at most 2^14 characters or
    ids of it. Its content alone decides whether it is held out, so that no other text can move it
    from one part to the other. Of stdlib a piece is a file, and its path decides.
    """
    if config.dataset == "stdlib":
        for number, (text, held_out) in enumerate(stdlib_files()):
            yield text, held_out, number
        return
    kind = None
    for number, (row, place) in enumerate(load_rows(config)):
        columns = list(row) if isinstance(row, dict) else []
        content = row[config.column] if config.column in columns else 0
        if content in ("", [], None):
            continue
        is_ids = isinstance(content, list) and all(
            isinstance(i, int) and i < 2**31 for i in content
        )
        kind = kind or type(content)  # of all documents
        if not is_ids and not isinstance(content, str) or type(content) is not kind:
            expected = f"expected text, or lists of token ids throughout, in column {config.column}"
            raise InputError(f"{place}: {expected}; --column names another of {columns}")
        for start in range(0, len(content), 2**14):
            piece = content[start : start + 2**14]
            data = str(piece).encode("utf-8", "replace")  # half a pair of surrogates becomes "?"
            yield piece if is_ids else data.decode(), is_held_out(data), number


def token_contexts(config, tokenizer, part, rank=0, world=1):
    """Yield contexts, (token ids, number of the document of each): one pass over a part of the text.

    part: "training", "held out" or "all"; of `world` processes, number `rank` takes every world-th
    piece of it. A context has context_size tokens: the BOS (or end-of-text) token and a row of
    packed pieces, those of text with the end-of-text token behind each. Names of special tokens in a
    text are plain text. Rows of ids are taken as they are; one that begins with the first token
    keeps it as the context's. InputError if the text cannot be read.
    """
    wanted = {"training": (False,), "held out": (True,), "all": (False, True)}[part]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    start = end if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    plain = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    ids = []  # that are not in a context yet
    documents = []
    chosen = ((piece, number) for piece, held_out, number in pieces(config) if held_out in wanted)
    chosen = itertools.islice(chosen, rank, None, world)
    while batch := list(itertools.islice(chosen, 64)):
        contents, numbers = zip(*batch)
        is_text = isinstance(contents[0], str)
        if is_text:
            contents = tokenizer(list(contents), **plain).input_ids
        for piece, number in zip(contents, numbers):
            piece = piece + end if is_text else piece
            ids += piece
            documents += [number] * len(piece)
        done = 0
        while True:
            has_start = not is_text and ids[done : done + 1] == start
            first = [] if has_start else start
            row = slice(done, done + config.context_size - len(first))
            if len(ids) < row.stop:
                break
            yield first + ids[row], documents[done : done + len(first)] + documents[row]
            done = row.stop
        ids = ids[done:]
        documents = documents[done:]


def training_contexts(config, tokenizer):
    """Yield contexts to train on without end: text that ends begins again, with a notice."""
    for number in itertools.count(1):
        n = 0
        for ids, _ in token_contexts(config, tokenizer, "training", RANK, WORLD):
            yield ids
            n += 1
        if n == 0:
            given = f"--dataset {config.dataset} does not fill one context"
            raise InputError(f"{given} of {config.context_size} tokens for each process")
        if number == 1:
            notice(f"{config.dataset} begins again after {n:,} contexts")


class MLPReached(Exception):
    """Leaves a language model's forward pass at the MLP; carries x."""


@torch.no_grad()
def mlp_inputs(model, mlp, ids):
    """Token ids (contexts, T) -> x (contexts, T, d_model): the forward pass, left at the MLP."""

    def leave(module, args):
        raise MLPReached(args[0])

    with mlp.maps[0].register_forward_pre_hook(leave):
        try:
            model(input_ids=ids, use_cache=False)
        except MLPReached as reached:
            return reached.args[0].reshape(*ids.shape, -1)


def check_text(model, mlp, ids):
    """InputError unless the model knows all ids (contexts, T), and mlp gives its y in the first."""
    n_words = len(model.get_input_embeddings().weight)
    least, most = ids.min().item(), ids.max().item()
    if least < 0 or most >= n_words:
        raise InputError(f"token ids {least} to {most}; the model knows 0 to {n_words - 1}")
    if len(ids[0].unique()) == 1:  # one word, whose y has nothing to be compared by
        return
    seen = watch(model, ids[:1], mlp.maps)
    if seen is None or not is_reproduced(mlp, *seen):
        raise InputError("on this text, the model's MLP is not the one that was found")


def one_ahead(items):
    """Yield the items of an iterator; while one is in use, a thread makes the next."""
    with ThreadPoolExecutor(1) as thread:
        upcoming = thread.submit(next, items, None)
        while (item := upcoming.result()) is not None:
            upcoming = thread.submit(next, items, None)
            yield item


def activation_batches(config, model, tokenizer, mlp, done=0):
    """Yield the batches x (batch_size / WORLD, d_model) of a run, from number `done` on.

    A buffer is filled with the x of whole contexts (without the first token of each), shuffled, cut
    into buffer_batches batches, used up and filled anew, so that `done` alone tells where to go on.
    InputError if an x is not finite, or the MLP is not what the model computes on this text.
    """
    width = config.context_size - 1
    batch_size = config.batch_size // WORLD
    n_contexts = math.ceil(config.buffer_batches * batch_size / width)
    n_steps = config.tokens // config.batch_size
    n_fillings = math.ceil(n_steps / config.buffer_batches)
    first, n_used = divmod(done, config.buffer_batches)  # filling to go on with, batches used of it
    contexts = training_contexts(config, tokenizer)
    for _ in itertools.islice(contexts, first * n_contexts):
        pass  # here and not in the thread below, where Ctrl-C would wait for the end
    texts = (list(itertools.islice(contexts, n_contexts)) for _ in range(first, n_fillings))
    buffer = mlp.W_in.new_empty(n_contexts, width, mlp.W_in.shape[1])
    at_a_time = max(1, 2**13 // config.context_size)  # contexts in a forward pass

    for filling, ids in enumerate(one_ahead(texts), first):
        ids = torch.tensor(ids, device=model.device)  # (n_contexts, context_size)
        with torch.autocast(model.device.type, torch.bfloat16, config.dtype == "bfloat16"):
            check_text(model, mlp, ids)
            for i in range(0, n_contexts, at_a_time):
                x = mlp_inputs(model, mlp, ids[i : i + at_a_time])
                buffer[i : i + len(x)] = x[:, 1:]
        rows = buffer.flatten(0, 1)
        if not rows.isfinite().all():
            raise InputError(f"NaN or Inf among the inputs x of layer {config.layer}'s MLP")
        order = np.random.default_rng([config.seed, RANK, filling]).permutation(len(rows))
        batches = torch.from_numpy(order).to(model.device).split(batch_size)
        for chosen in batches[n_used : config.buffer_batches]:
            yield rows[chosen]
        n_used = 0


# ---- 7. Training ---------------------------------------------------------------------------------
#
# A run's folder:
#   config.json              settings, penalty, processes, hash of the MLP's weights, versions
#   metrics.jsonl            a row for every 50 steps
#   checkpoint.safetensors   from which the same command goes on; gone when the run is finished
#   sae_x/, sae_y/           cfg.json and sae_weights.safetensors, as SAELens 6 reads them
#   .lock                    held while it is trained
#
# The last file of sae_y is the last to be written: a run that has it is finished.

CHECKPOINT = "checkpoint.safetensors"
LAST_FILE = "sae_y/sae_weights.safetensors"
CHECKPOINT_SECONDS = 30  # at least; and twenty times as long as it takes to write one
MAY_DIFFER = ("device", "output_dir", "config", "versions")  # when a run goes on


def schedule(config, step, n_steps):
    """-> lr and lambda of a step, counted from 1 (Appendix D).

    lr warms up over 1 % of the steps and falls to 0 over the last 20 %; lambda warms up over 5 %.
    """
    warm_up = min(1, step / (0.01 * n_steps))
    decay = min(1, (n_steps - step + 1) / (0.2 * n_steps))
    coef_warm_up = min(1, step / (0.05 * n_steps))
    return config.lr * warm_up * decay, config.jacobian_coef * coef_warm_up


@torch.no_grad()
def measure(sae_x, sae_y, mlp, x):
    """Metrics of x (B, d_model): ev is 1 - mse / variance, |J| > 0.01 is counted per token."""
    row = {}
    y = mlp(x)
    for side, sae, values in (("x", sae_x, x), ("y", sae_y, y)):
        mse = F.mse_loss(sae(values), values)
        row[f"mse_{side}"] = mse.item()
        row[f"ev_{side}"] = (1 - mse / values.var(0, correction=0).mean()).item()
    J = active_jacobian(sae_x, sae_y, mlp, x, sae_x.encode(x), sae_y.encode(y))
    row["jacobian_l1"] = l1(J).mean().item()
    row["jacobian_above_0.01"] = (J.abs() > 0.01).sum().item() / len(J)
    return row


def write_file(path, data):
    """Write bytes so that after a crash the file is whole, or what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".tmp")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.replace(part, path)
        except OSError:  # a network disk may need another moment
            time.sleep(1)
            os.replace(part, path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()  # of a full disk
        raise InputError(f"{path} cannot be written, {len(data):,} bytes: {error}") from error


def hash_of_weights(mlp):
    return hashlib.sha256(safetensors.torch.save(mlp.state_dict())).hexdigest()


def check_folder(folder, description):
    """InputError if the folder holds another run than that of the description."""
    path = folder / "config.json"
    if not any((folder / name).exists() for name in (path.name, CHECKPOINT, LAST_FILE)):
        return
    try:
        saved = json.loads(path.read_text())
        before = saved["config"] | saved
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} is of no run ({error!r}); name another --output-dir") from error
    now = description["config"] | description
    names = [name for name in now if name not in MAY_DIFFER and before.get(name) != now[name]]
    if names:
        differ = ", ".join(f"{name} {before.get(name)!r} (not {now[name]!r})" for name in names)
        raise InputError(f"{folder} holds a run with {differ}; name another --output-dir")


def new_pair(config, d_model, device):
    """-> two SAEs, and their Adam. The pair's state_dict holds all that a run goes on from.

    Beside the SAEs these are the steps done, what x and y are divided by, when each latent last had
    a positive value (in tokens), and Adam's own state.
    """
    torch.manual_seed(config.seed)
    n_latents = config.expansion_factor * d_model
    saes = {name: TopKSAE(d_model, n_latents, config.k) for name in ("sae_x", "sae_y")}
    pair = nn.ModuleDict(saes).to(device, torch.float32)
    pair.register_buffer("step", torch.zeros((), dtype=torch.long))
    pair.register_buffer("scales", torch.ones(2, dtype=torch.float32))
    fired = torch.zeros(2, n_latents, dtype=torch.long, device=device)
    pair.register_buffer("last_fired", fired)
    adam = torch.optim.Adam(pair.parameters(), fused=True)
    for n, p in enumerate(pair.parameters()):
        mean, square = torch.zeros_like(p), torch.zeros_like(p)
        adam.state[p] = {"step": mean.new_zeros(()), "exp_avg": mean, "exp_avg_sq": square}
        for key, tensor in adam.state[p].items():
            pair.register_buffer(f"adam_{n}_{key}", tensor)
    return pair, adam


def hook_names(model, mlp):
    """-> names of the modules whose outputs x and y are, as SAELens wants; None where none is."""
    names = {module: name for name, module in model.named_modules()}
    outputs = []
    sources = []

    def note(module, args, output):
        outputs.append((names.get(module), output))
        if module is mlp.maps[0]:
            sources.extend(name for name, output in outputs if output is args[0])

    with torch.no_grad(), nn.modules.module.register_module_forward_hook(note):
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device))
    return sources[0] if sources else None, names[mlp.maps[-1]]


def check_start(config, penalty):
    """InputError if the settings do not fit the processes, or the penalty has no name."""
    given = f"--batch-size is {config.batch_size}"
    if config.tokens < config.batch_size:
        raise InputError(f"{given}; expected at most --tokens, which is {config.tokens}")
    if config.batch_size % WORLD:
        raise InputError(f"{given}; expected a multiple of {WORLD}, the number of processes")
    if WORLD > 1 and ":" in config.device:
        raise InputError(f"--device is {config.device}; expected cuda: each process has its GPU")
    if "<" in getattr(penalty, "__name__", "<>"):  # a lambda, a partial
        raise InputError("the penalty is known by its name: define it by def")


@torch.enable_grad()  # a notebook may have switched it off
def train(config: Config, penalty=l1) -> Path:
    """Train a pair of SAEs -> the run's folder. penalty: of J (tokens, k, k) -> (tokens,).

    A run that was stopped goes on from its last checkpoint; a finished one is left as it is. On a
    CPU it ends at the same bits; on CUDA sums are added in any order. Under torchrun each process
    takes its share of the text and of every batch, and must see the same folder; the first one
    measures and writes. InputError if settings, text or folder are not what they should be, or
    numbers break.
    """
    check_start(config, penalty)
    if WORLD > 1 and not distributed.is_initialized():
        if config.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group(timeout=timedelta(hours=2))  # each reads its own text
    model, tokenizer = load_model(config)
    settings = model.config.get_text_config(decoder=True)
    longest = getattr(settings, "max_position_embeddings", None) or 0
    if longest > 0:
        config = dataclasses.replace(config, context_size=min(config.context_size, longest))
    mlp = find_mlp(model, config.layer)
    folder = Path(config.output_dir)
    description = {
        "config": dataclasses.asdict(config),
        "penalty": penalty.__name__,
        "processes": WORLD,
        "mlp_sha256": hash_of_weights(mlp),
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, datasets, np)},
    }
    check_folder(folder, description)
    checkpoint = folder / CHECKPOINT
    if (folder / LAST_FILE).exists():
        if RANK == 0:
            checkpoint.unlink(missing_ok=True)  # killed before it was gone
        notice(f"{folder} holds this run, finished; rm -r {folder} makes room for a new one")
        return folder

    folder.mkdir(parents=True, exist_ok=True)
    lock = nullcontext()
    if RANK == 0:
        lock = filelock.FileLock(folder / ".lock", timeout=0)
    with lock:  # filelock's Timeout, if another process holds it, is an OSError
        pair, adam = new_pair(config, mlp.W_in.shape[1], model.device)
        files, passed_over = local_files(Path(config.dataset))
        if len(files) > 1 or files and passed_over:
            names = " ".join(str(path) for path in passed_over[:9])
            notice(f"{len(files)} files are read, {len(passed_over)} passed over: {names}")
        if checkpoint.exists():
            load_checkpoint(checkpoint, pair)
            notice(f"going on after step {pair.step}; the text is read again up to there")
        elif next(token_contexts(config, tokenizer, "held out"), None) is None:
            notice("this text is too short to hold any out: evaluate on another --dataset")
        batches = activation_batches(config, model, tokenizer, mlp, int(pair.step))
        first = next(batches)
        if pair.step == 0:
            pair.scales.copy_(scales_of(config, mlp, first))
        scale_x, scale_y = pair.scales.tolist()
        batches = (x / scale_x for x in itertools.chain([first], batches))
        if RANK == 0:
            write_file(folder / "config.json", json.dumps(description, indent=2).encode())
        optimize(config, penalty, mlp.scaled(scale_x, scale_y), pair, adam, batches, folder)
        if RANK == 0:
            name_x, name_y = hook_names(model, mlp)
            save_sae(folder / "sae_x", pair.sae_x, scale_x, config, name_x)
            save_sae(folder / "sae_y", pair.sae_y, scale_y, config, name_y)
            checkpoint.unlink(missing_ok=True)
    return folder


def scales_of(config, mlp, x):
    """-> what x and y are divided by, (2,): 1 or, with --normalize, their mean norms / sqrt(d_model).

    The means are over the first batch x (B, d_model) of all processes.
    """
    norms = torch.stack([x.norm(dim=1).mean(), mlp(x).norm(dim=1).mean()])
    if WORLD > 1:
        distributed.all_reduce(norms)
    norms /= WORLD * math.sqrt(x.shape[1])
    if config.normalize:
        return norms
    if not 1 / 3 < norms[0] / norms[1] < 3:
        sizes = f"norms of x and y, {norms[0]:.2g} and {norms[1]:.2g} sqrt(d_model), differ"
        notice(f"{sizes}: the larger one dominates the loss; --normalize makes them equal")
    return torch.ones_like(norms)


def save_checkpoint(path, pair):
    write_file(path, safetensors.torch.save(pair.state_dict()))


def load_checkpoint(path, pair):
    try:
        pair.load_state_dict(safetensors.torch.load_file(path))
    except (safetensors.SafetensorError, RuntimeError) as error:  # cut off, other sizes
        raise InputError(f"{path} is damaged; delete it to start anew: {error}") from error


def optimize(config, penalty, mlp, pair, adam, batches, folder):
    """The training loop, from step pair.step + 1 to the last: Adam on jsae_loss."""
    n_steps = config.tokens // config.batch_size
    done = int(pair.step)
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    rows = [row for row in map(json.loads, lines) if row["step"] <= done]
    saved = time.time()
    seconds = CHECKPOINT_SECONDS
    bar = tqdm(range(done + 1, n_steps + 1), initial=done, total=n_steps, disable=RANK > 0)
    for step in bar:
        try:
            x = next(batches)
        except InputError:  # of the text: what was done so far is kept
            if RANK == 0:
                save_checkpoint(folder / CHECKPOINT, pair)
            raise
        lr, coef = schedule(config, step, n_steps)
        adam.param_groups[0]["lr"] = lr
        with torch.autocast(x.device.type, torch.bfloat16, config.dtype == "bfloat16"):
            loss, parts = jsae_loss(pair.sae_x, pair.sae_y, mlp, x, coef, penalty)
        adam.zero_grad()
        loss.backward()
        if WORLD > 1:
            for p in pair.parameters():
                distributed.all_reduce(p.grad)
                p.grad /= WORLD
        norm = nn.utils.clip_grad_norm_(pair.parameters(), 1.0)  # of both, as the authors do
        if not norm.isfinite():
            raise InputError(f"step {step}: loss {loss.item():g}, gradient of norm {norm:g}")
        adam.step()
        tokens = step * config.batch_size
        saes = (pair.sae_x, parts["s_x"]), (pair.sae_y, parts["s_y"])
        for (sae, s), fired in zip(saes, pair.last_fired):
            sae.set_decoder_norm_to_one()
            fired[s.idx[s.acts > 0]] = tokens
        pair.step += 1

        is_measured = step % 50 == 0 or step == n_steps
        if is_measured and WORLD > 1:
            distributed.all_reduce(pair.last_fired, distributed.ReduceOp.MAX)
        if is_measured and RANK == 0:
            row = {"step": step, "tokens": tokens, "lr": lr, "coef": coef}
            row |= measure(pair.sae_x, pair.sae_y, mlp, x[:512])
            if "penalty" in parts:
                row["penalty"] = parts["penalty"].item()
            dead = pair.last_fired <= max(0, tokens - 10_000_000)  # in 10M tokens, or never
            row["dead_x"], row["dead_y"] = dead.sum(1).tolist()
            rows.append(row)
            write_file(metrics, "".join(json.dumps(row) + "\n" for row in rows).encode())
            bar.set_postfix({"ev_x": row["ev_x"], "ev_y": row["ev_y"], "|J|": row["jacobian_l1"]})
        if RANK == 0 and step < n_steps and time.time() - saved > seconds:
            begun = time.time()
            save_checkpoint(folder / CHECKPOINT, pair)
            saved = time.time()
            seconds = max(CHECKPOINT_SECONDS, 20 * (saved - begun))


def save_sae(folder, sae, scale, config, hook_name):
    """Write an SAE that was trained on v / scale so that it takes and gives v, for SAELens 6.

    hook_name: the module whose output v is, or None.
    """
    tensors = sae.state_dict()
    n_latents, d_model = tensors["W_enc"].shape
    tensors["W_enc"] = (tensors["W_enc"] / scale).T.contiguous()  # (d_in, d_sae) there
    tensors["W_dec"] = tensors["W_dec"] * scale
    tensors["b_dec"] = tensors["b_dec"] * scale
    cfg = {
        "architecture": "topk",
        "d_in": d_model,
        "d_sae": n_latents,
        "k": sae.k,
        "apply_b_dec_to_input": False,
        "dtype": "float32",
        "metadata": {
            "sae_lens_version": "6.0.0",
            "model_name": config.model,
            "model_class_name": "AutoModelForCausalLM",
            "context_size": config.context_size,
            "prepend_bos": True,
        },
    }
    if hook_name is not None:
        cfg["metadata"]["hook_name"] = hook_name
    write_file(folder / "cfg.json", json.dumps(cfg, indent=2).encode())
    write_file(folder / "sae_weights.safetensors", safetensors.torch.save(tensors))


def run_folder(path_or_hub_id) -> Path:
    """-> the folder of a run, or a local copy of its files on the hub."""
    path = Path(path_or_hub_id).expanduser()
    if path.exists():
        return path
    files = ["config.json", "sae_x/*", "sae_y/*"]
    return Path(snapshot_download(str(path_or_hub_id), allow_patterns=files))


def load_run(path_or_hub_id):
    """-> (sae_x, sae_y, config) of a finished run: a folder, or the id of a hub repository.

    They take and give raw x and y. InputError if it is no finished run.
    """
    try:
        folder = run_folder(path_or_hub_id)
        saved = json.loads((folder / "config.json").read_text())["config"]
        config = Config(**saved | {"device": "auto"})  # the one it was trained on may not be here
        saes = []
        for name in ("sae_x", "sae_y"):
            tensors = safetensors.torch.load_file(folder / name / "sae_weights.safetensors")
            tensors["W_enc"] = tensors["W_enc"].T
            n_latents, d_model = tensors["W_enc"].shape
            sae = TopKSAE(d_model, n_latents, config.k)
            sae.load_state_dict(tensors)
            saes.append(sae)
    except Exception as error:  # whatever is wrong with the files or the hub
        raise InputError(f"{path_or_hub_id} is no finished run: {error}") from error
    return *saes, config


# ---- 8. Command line -----------------------------------------------------------------------------


def make_parser(settings, name, more):
    """-> a parser of a dataclass's fields, which returns what was given. `more` ends its help."""
    try:  # the source, whose comments say what each setting is
        description = inspect.getsource(settings).split("    def __post_init__")[0]
    except (OSError, TypeError):  # there is none under a profiler, or from standard input
        description = str(settings())
    parser = argparse.ArgumentParser(
        prog=name,
        usage=argparse.SUPPRESS,  # so that an error is one line
        description=description + more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for field in dataclasses.fields(settings):
        kind = {"type": field.type}
        if field.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}  # --name and --no-name
        parser.add_argument(flag(field.name), help=argparse.SUPPRESS, **kind)
    return parser


def run_program(name, body, argv) -> int:
    """Call body(argv) -> exit status: 0; after one line on stderr 2, or 130 after Ctrl-C."""
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="replace")  # its encoding may lack a letter
    try:
        body(argv)
        return 0
    except SystemExit as end:  # of argparse, after --help or its line
        return end.code
    except KeyboardInterrupt:
        line, status = "stopped", 130
    except (ValueError, OSError) as error:
        line, status = f"error: {error}", 2
    except RuntimeError as error:
        if "alloc" not in str(error).lower():  # as all failed allocations say
            raise
        line, status = f"error: too little memory: {str(error).splitlines()[0]}", 2
    print(f"{name}:", " ".join(line.split()), file=sys.stderr)
    return status


def train_by_command(argv):
    """What `python jsae.py` does: parse, train, print the last metrics."""
    given = vars(make_parser(Config, "jsae.py", f"\nDEMO: {DEMO}").parse_args(argv))
    if "model" not in given:
        given = DEMO | given
    folder = train(Config(**given))
    if distributed.is_initialized():
        distributed.destroy_process_group()
    if RANK == 0:
        last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        for name in ("ev_x", "ev_y", "jacobian_l1", "jacobian_above_0.01"):
            print(f"{name:22} {last[name]:,.4g}")
        command = shlex.join(["python", str(HERE / "evaluate.py"), str(folder)])
        print(f"{'evaluate it with':22} {command}")


def main(argv=None) -> int:
    """-> exit status: 0, 2 after one line about what was given, 130 after Ctrl-C."""
    return run_program("jsae.py", train_by_command, argv)


if __name__ == "__main__":
    sys.exit(main())
