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

    python jsae.py                                             a small bundled model, a minute or two
    python jsae.py --model EleutherAI/pythia-70m --layer 3     the paper's setting
    python jsae.py --help                                      every setting

Sections 1 to 3 are the method and can be copied, with the imports, as one block. Section 4 is the
same loss in less time and memory, section 5 finds the MLP in a transformers model, 6 to 8 train.
test_oracle_J_equals_jacrev in test_jsae.py compares J with autodiff: taken at x_hat, it is the
derivative of f_s as Eq. 3 has it; taken at x (stable setup), of e_y . f . (d_x + constant) . tau_k,
where the constant is x - x_hat.
"""

import argparse
import copy
import dataclasses
import glob
import hashlib
import inspect
import itertools
import json
import math
import os
import shlex
import signal
import sys
import tempfile
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import datasets
import filelock
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


def with_derivative(act, device):
    """-> phi and phi': a function of ACT_GRADS if act has its values, else act itself and autodiff.

    ValueError if act is not elementwise: then act(z)[::7] differs from act(z[::7]).
    """
    z = torch.linspace(-50, 50, 2001, device=device)
    values = act(z.clone())  # it may work in place
    if values.shape != z.shape or not torch.allclose(values[::7], act(z[::7].clone()), atol=1e-6):
        raise ValueError(f"{act} is not elementwise; expected phi of an MLP")
    for known, grad in ACT_GRADS.items():
        if torch.allclose(values, known(z), rtol=1e-6, atol=1e-5):
            return known, grad
    return act, torch.func.grad(lambda z: act(z).sum())  # element by element


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
        self.act, self.act_grad = with_derivative(act, self.W_in.device)
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
        W_in, W_out = self.W_in * scale_x, self.W_out / scale_y
        b_out = None if self.b_out is None else self.b_out / scale_y
        W_gate = None if self.W_gate is None else self.W_gate * scale_x
        return MLP(W_in, self.b_in, W_out, b_out, W_gate, self.b_gate, self.act)


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
# Names differ from model to model, so the MLP is found by what it computes. Every way in which
# two or three linear maps of one module can be W_in, W_gate and W_out is a candidate. It fits, with
# one phi or another, if it gives y at the model's own x and at 50 times that, which reaches clamps
# and tells phi's apart. Exactly one must fit: a wrong MLP has a wrong Jacobian.

LINEAR = (nn.Linear, transformers.Conv1D)
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}


class InputError(ValueError):
    """What was given, what was expected, what to do: one line."""


def forward(model, ids):
    """The language model's output for ids (contexts, T). InputError if it cannot be had."""
    try:
        return model(input_ids=ids, use_cache=False)
    except Exception as error:  # whatever a model raises, of contexts that are too long for it
        name = type(model).__name__
        raise InputError(f"{name} on contexts of {ids.shape[1]} tokens: {error!r}") from error


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
        for writer in linear:
            readers = [m for m in linear if m is not writer]
            weights, biases = zip(*[weight_and_bias(m) for m in readers])
            W_out, b_out = weight_and_bias(writer)
            d_model, d_mlp = W_out.shape
            if any(W.shape[1] != d_model for W in weights):
                continue
            W = torch.cat(weights)
            b = torch.cat(biases)
            maps = (*readers, writer)
            if len(W) == d_mlp:
                yield maps, (W, b, W_out, b_out)
            if len(W) == 2 * d_mlp:  # W_in and W_gate, two maps or one, in either order
                one = W[:d_mlp], b[:d_mlp]
                other = W[d_mlp:], b[d_mlp:]
                yield maps, (*one, W_out, b_out, *other)
                yield maps, (*other, W_out, b_out, *one)


@torch.no_grad()
def watch(model, ids, maps, factor=1):
    """-> x of maps[0] and y of maps[-1] in the forward pass, (tokens, d_model) each.

    The input of all maps but the last is multiplied by factor. None unless the two are called once,
    on all tokens.
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

    hooks = [reader.register_forward_pre_hook(note_x) for reader in maps[:-1]]
    hooks.append(maps[-1].register_forward_hook(note_y))
    try:
        forward(model, ids)
    finally:
        for hook in hooks:
            hook.remove()
    if [len(rows) for rows in (*xs, *ys)] != [ids.numel(), ids.numel()]:
        return None
    return xs[0], ys[0]


def is_reproduced(mlp, x, y):
    """Whether mlp(x) is y (tokens, d_model) but for rounding, measured by how y varies.

    It must be so of all tokens together, and of the median token: one of huge norm hides the rest.
    """
    tolerance = TOLERANCE[y.dtype]
    y = y.to(mlp.W_in.dtype)
    error = (mlp(x.to(y.dtype)) - y).norm(dim=1)
    varies = (y - y.median(0).values).norm(dim=1)  # a mean would be that of the largest
    is_small = error < tolerance * varies  # (tokens,)
    return bool(error.norm() < tolerance * varies.norm() and is_small.float().mean() > 0.5)


def activations(block):
    """-> functions to try as phi: the elementwise ones among the block's modules, the known ones."""
    device = next(block.parameters()).device
    found = []
    for module in block.modules():
        if not list(module.children()):
            with suppress(Exception):  # whatever a module raises that is given a plain vector
                found.append(with_derivative(module, device)[0])
    return list(dict.fromkeys([*found, *ACT_GRADS]))  # each once


def block_of(model, layer, ids):
    """The layer's block, of the largest list of modules that are all called for ids (2, 16).

    InputError if there is no such layer, or the model is not causal.
    """
    name = type(model).__name__
    called = set()

    def note(module, args, output):
        called.add(module)

    with nn.modules.module.register_module_forward_hook(note):
        one, other = forward(model, ids).logits[:, :8]  # the rows of ids begin with the same 8
    if not (one - other).norm() <= TOLERANCE[one.dtype] * one.norm():
        raise InputError(f"{name} is not causal: what it predicts depends on what comes later")
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    lists = [blocks for blocks in lists if called.issuperset(blocks)]
    blocks = max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()), default=[])
    if not 0 <= layer < len(blocks):
        raise InputError(f"{name} has no layer {layer}; --layer takes 0 to {len(blocks) - 1}")
    return blocks[layer]


@torch.no_grad()
def find_mlp(model, layer) -> MLP:
    """The MLP of one layer of a transformers causal LM that is in evaluation mode.

    InputError unless there is exactly one, no larger candidate, and nothing that looks like
    experts: a stack of weights, or a candidate that is not called once, on all tokens.
    """
    name = type(model).__name__
    if model.training:
        raise InputError(f"{name} is in training mode; call its eval() first")
    ids = torch.arange(24, device=model.device) % model.get_input_embeddings().weight.shape[0]
    ids = torch.stack([ids[:16], torch.cat([ids[:8], ids[16:]])])  # two rows that begin alike
    block = block_of(model, layer, ids)
    expected = f"layer {layer} of {name}: expected exactly one dense MLP"
    if any(p.ndim == 3 and p.shape[1] > 1 for p in block.parameters()):
        raise InputError(f"{expected}; it holds stacks of weights, as experts are")

    acts = activations(block)
    sizes = {}  # of each candidate's maps
    found = {}
    for maps, arguments in candidates(block):
        examples = [watch(model, ids, maps, factor) for factor in (1, 50)]
        if None in examples:
            raise InputError(f"{expected}; some are not called once, on all tokens, as experts are")
        sizes[maps] = sum(p.numel() for linear in maps for p in linear.parameters())
        for act in acts:
            mlp = MLP(*arguments, act=act)
            if all(is_reproduced(mlp, x, y) for x, y in examples):
                mlp.maps = maps
                found[maps] = mlp
                break
    if len(found) != 1:
        raise InputError(f"{expected}; {len(found)} of its modules fit")
    maps, mlp = found.popitem()
    if sizes[maps] < max(sizes.values()):
        raise InputError(f"{expected}; what fits is smaller than what does not")
    return mlp


# ---- 6. Settings, text, activations --------------------------------------------------------------

HERE = Path(__file__).resolve().parent
RANK = int(os.environ.get("RANK", "0"))  # torchrun: number of this process, of WORLD
WORLD = int(os.environ.get("WORLD_SIZE", "1"))
LEAST = {"layer": 0, "seed": 0, "jacobian_coef": 0, "lr": 1e-9, "context_size": 2}  # others: 1
CHOICES = {
    "randomize_weights": ("none", "init", "shuffle", "paper"),
    "dtype": ("auto", "float32", "bfloat16"),
}


@dataclasses.dataclass
class Config:
    """A run's settings, each a flag (--batch-size 4096, --no-normalize). Defaults: the paper's.

    Without --model, the settings of DEMO take their place: a small bundled model.
    """

    model: str = "EleutherAI/pythia-70m"  # hub id, ID@REVISION or folder of a causal LM
    layer: int = 3  # whose MLP is decomposed, from 0
    randomize_weights: str = "none"  # control of section 5.3: none, init, shuffle or paper
    dataset: str = "monology/pile-uncopyrighted"  # hub id, or ID:CONFIG; local file, folder; stdlib
    split: str = "train"  # of the data set
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
        self.model = absolute_if_local(self.model)
        if self.dataset != "stdlib":
            self.dataset = absolute_if_local(self.dataset)
        if not self.output_dir:
            name = f"{Path(self.model).name}-L{self.layer}-R{self.expansion_factor}-k{self.k}"
            name += f"-lambda{self.jacobian_coef:g}-{self.tokens / 1e6:g}M-seed{self.seed}"
            if self.normalize:
                name += "-normalize"
            if self.randomize_weights != "none":
                name += f"-{self.randomize_weights}"
            self.output_dir = f"runs/{name}"
        self.output_dir = str(Path(self.output_dir).expanduser())


DEMO = {
    "model": str(HERE / "assets" / "tiny-pythia"),
    "layer": 0,
    "jacobian_coef": 1.0,
    "normalize": True,
    "dataset": "stdlib",
    "context_size": 256,
    "k": 16,
    "expansion_factor": 4,
    "tokens": 500_000,
    "lr": 3e-3,
    "batch_size": 2048,
}


def notice(text):
    """Print a line on stderr, above the progress bar, in the first process only."""
    if RANK == 0:
        tqdm.write(text, sys.stderr)


def flag(name):
    return "--" + name.replace("_", "-")


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
            if not is_number or not least <= value < math.inf:  # NaN is not
                raise InputError(f"{given}; expected {field.type.__name__}, {least} or more")


def absolute_if_local(name):
    """The absolute path of a file or folder of that name; if there is none, the name: a hub id."""
    path = Path(name).expanduser()
    return str(path.absolute()) if path.exists() else name


def load_model(config):
    """-> the causal LM of the settings or its random control, frozen, in float32; its tokenizer."""
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"  # what torchrun gives this process
    name = config.model
    options = {"trust_remote_code": False}
    if not Path(name).exists() and "@" in name:
        name, options["revision"] = name.split("@", 1)
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **options
        )
        wrong = [*info["missing_keys"], *info["mismatched_keys"]]
        if wrong:
            raise InputError(f"{len(wrong)} weights are missing or of another size, as {wrong[0]}")
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **options)
        model = randomized(model, config.randomize_weights, config.seed)
        model = model.eval().requires_grad_(False).to(device)
        words = tokenizer("a", add_special_tokens=False).input_ids
    except Exception as error:  # whatever transformers, the hub or the device raises
        raise InputError(f"--model {config.model} on {device}: {error}") from error
    if not words:  # its files are missing
        raise InputError(f"--model {config.model}: its tokenizer knows no words")
    return model, tokenizer


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


def load_rows(config):
    """Yield the rows, dicts, of a data set of the hub or of a local file or folder."""
    path = Path(config.dataset)
    if not path.exists():
        name = config.dataset.split(":", 1)
        yield from datasets.load_dataset(*name, split=config.split, streaming=True)
    elif (path / "dataset_dict.json").exists():
        yield from datasets.load_from_disk(str(path))[config.split]
    elif (path / "state.json").exists():
        yield from datasets.load_from_disk(str(path))
    else:
        options = {}
        if path.is_file():
            options["data_files"] = glob.escape(path.name)
            path = path.parent
        with tempfile.TemporaryDirectory() as cache:  # the hub's may not be writable
            builder = datasets.load_dataset_builder(str(path), cache_dir=cache, **options)
            if hasattr(builder.config, "sample_by"):  # plain text
                builder.config.sample_by = "document"  # a file
                builder.config.encoding_errors = "replace"
            yield from builder.as_streaming_dataset(split=config.split)


def pieces(config):
    """Yield (text or token ids, whether it is held out): one pass over the text.

    A piece is at most 2^14 characters or ids of a document. Its content alone decides whether it is
    held out, so that no other text can move it from one part to the other (of stdlib, the path of a
    file, which is one piece).
    """
    if config.dataset == "stdlib":
        yield from stdlib_files()
        return
    for row in load_rows(config):
        if config.column not in row:
            raise InputError(f"no column {config.column} among {list(row)}; name one by --column")
        content = row[config.column]
        if content is None:
            continue
        is_ids = isinstance(content, list) and all(isinstance(i, int) for i in content)
        if not is_ids and not isinstance(content, str):
            expected = "expected text or a list of token ids"
            raise InputError(f"column {config.column} holds {str(content)[:40]}; {expected}")
        for start in range(0, len(content), 2**14):
            piece = content[start : start + 2**14]
            yield piece, is_held_out(str(piece).encode("utf-8", "replace"))


def special_ids(tokenizer):
    """-> what every context starts with, BOS or else EOS, and what ends a text: [id], or []."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    start = end if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return start, end


def token_contexts(config, tokenizer, part, rank=0, world=1):
    """Yield contexts, lists of context_size token ids: one pass over a part of the text.

    part: "training", "held out" or "all"; of `world` processes, number `rank` takes every world-th
    piece of it. A context is the start token and a row of packed pieces, those of text with the end
    token behind each. Rows of ids are taken as they are, and may bring the start token.
    InputError if the text cannot be read.
    """
    wanted = {"training": (False,), "held out": (True,), "all": (False, True)}[part]
    start, end = special_ids(tokenizer)
    ids = []  # that are not in a context yet
    try:
        chosen = (piece for piece, held_out in pieces(config) if held_out in wanted)
        chosen = itertools.islice(chosen, rank, None, world)
        while True:
            batch = list(itertools.islice(chosen, 64))
            if not batch:
                return
            is_text = isinstance(batch[0], str)
            if is_text:
                batch = tokenizer(batch, add_special_tokens=False, verbose=False).input_ids
            for piece in batch:
                ids += piece
                ids += end if is_text else []
            done = 0
            while True:
                has_start = not is_text and ids[done : done + 1] == start
                first = [] if has_start else start
                row = ids[done : done + config.context_size - len(first)]
                if len(first) + len(row) < config.context_size:
                    break
                yield [*first, *row]
                done += len(row)
            ids = ids[done:]
    except Exception as error:  # whatever a library that reads text raises
        raise InputError(f"--dataset {config.dataset}: {str(error) or repr(error)}") from error


def training_contexts(config, tokenizer):
    """Yield contexts to train on without end: text that ends begins again, with a notice."""
    for number in itertools.count(1):
        n = 0
        for context in token_contexts(config, tokenizer, "training", RANK, WORLD):
            yield context
            n += 1
        if n == 0:
            raise InputError(f"--dataset {config.dataset} does not fill one context")
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
    n_words = model.get_input_embeddings().weight.shape[0]
    least, most = ids.min().item(), ids.max().item()
    if least < 0 or most >= n_words:
        raise InputError(f"token ids {least} to {most}; the model knows 0 to {n_words - 1}")
    seen = watch(model, ids[:1], mlp.maps)
    if seen is None or not is_reproduced(mlp, *seen):
        raise InputError("on this text, the model's MLP is not the one that was found")


def one_ahead(items):
    """Yield the items of an iterator; while one is in use, a thread makes the next."""
    with ThreadPoolExecutor(1) as thread:
        upcoming = thread.submit(next, items, None)
        while True:
            item = upcoming.result()
            if item is None:
                return
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
    n_fillings = math.ceil(config.tokens // config.batch_size / config.buffer_batches)
    first, done_in_first = divmod(done, config.buffer_batches)  # filling to go on with
    contexts = training_contexts(config, tokenizer)
    for _ in itertools.islice(contexts, first * n_contexts):
        pass  # here and not in the thread below, where Ctrl-C would wait for the end
    texts = (list(itertools.islice(contexts, n_contexts)) for _ in range(first, n_fillings))
    buffer = torch.empty(n_contexts, width, mlp.W_in.shape[1], device=model.device)
    at_a_time = max(1, 2**13 // config.context_size)  # contexts in a forward pass

    for filling, ids in enumerate(one_ahead(texts), first):
        ids = torch.tensor(ids, device=model.device)  # (n_contexts, context_size)
        with autocast(config, model.device):
            check_text(model, mlp, ids)
            for i in range(0, n_contexts, at_a_time):
                x = mlp_inputs(model, mlp, ids[i : i + at_a_time])
                buffer[i : i + len(x)] = x[:, 1:]
        rows = buffer.flatten(0, 1)
        if not rows.isfinite().all():
            raise InputError(f"NaN or Inf among the inputs x of layer {config.layer}'s MLP")
        order = np.random.default_rng([config.seed, RANK, filling]).permutation(len(rows))
        chosen_rows = torch.from_numpy(order).to(model.device).split(batch_size)
        n_done = done_in_first if filling == first else 0
        for chosen in chosen_rows[n_done : config.buffer_batches]:
            yield rows[chosen]


# ---- 7. Training ---------------------------------------------------------------------------------
#
# A run's folder:
#   config.json              settings, penalty, processes, hash of the MLP's weights, scales, versions
#   metrics.jsonl            a row for every 50 steps
#   checkpoint.safetensors   from which the same command goes on; gone when the run is finished
#   sae_x/, sae_y/           cfg.json and sae_weights.safetensors, as SAELens 6 reads them

CHECKPOINT_SECONDS = 600
LONGEST_CONTEXT = ("max_position_embeddings", "n_positions", "max_seq_len", "context_length")
MAY_DIFFER = ("device", "output_dir", "config", "versions")  # when a run goes on


def autocast(config, device):
    """-> the torch.autocast of the settings."""
    bfloat16 = config.dtype == "bfloat16"
    if config.dtype == "auto" and device.type == "cuda":
        bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=bfloat16)


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
    with open(part, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def fitted(config, model, mlp):
    """-> the settings with a context_size that the model takes. InputError if sizes do not fit."""
    n_latents = config.expansion_factor * mlp.W_in.shape[1]
    if config.k > n_latents:
        raise InputError(f"--k is {config.k}; expected at most {n_latents}, the number of latents")
    if config.tokens < config.batch_size:
        raise InputError(f"--tokens {config.tokens}: less than --batch-size {config.batch_size}")
    if config.batch_size % WORLD:
        raise InputError(f"--batch-size {config.batch_size} is not a multiple of {WORLD} processes")
    settings = model.config.get_text_config(decoder=True)
    longest = [getattr(settings, name, None) or math.inf for name in LONGEST_CONTEXT]
    return dataclasses.replace(config, context_size=min(config.context_size, *longest))


def hash_of_weights(mlp):
    return hashlib.sha256(safetensors.torch.save(mlp.state_dict())).hexdigest()


def describe(config, penalty, mlp):
    """-> what config.json holds, without the scales."""
    return {
        "config": dataclasses.asdict(config),
        "penalty": getattr(penalty, "__name__", type(penalty).__name__),
        "processes": WORLD,
        "mlp_sha256": hash_of_weights(mlp),
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, datasets, np)},
    }


@contextmanager
def locked(folder):
    """Hold the folder, which is made if need be. InputError if another process holds it."""
    if RANK > 0:  # the first process holds it for all
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "training.lock"
    try:
        lock = filelock.FileLock(path)
        lock.acquire(blocking=False)
    except filelock.Timeout as error:
        raise InputError(f"another process is training in {folder}") from error
    try:
        yield
    finally:
        with suppress(OSError):  # of the folder: it is not empty
            path.unlink()
            folder.rmdir()
        lock.release()


def check_folder(folder, description):
    """-> what config.json holds if this very run is in the folder, {} if nothing is.

    InputError if anything else is in it.
    """
    path = folder / "config.json"
    if not path.exists():
        held = [file for file in folder.glob("*") if file.suffix not in (".lock", ".tmp")]
        if held:
            raise InputError(
                f"{folder} holds no run, but {held[0].name}; name another --output-dir"
            )
        return {}
    try:
        saved = json.loads(path.read_text())
    except ValueError:  # no JSON
        saved = {}
    if "mlp_sha256" not in saved:
        raise InputError(f"{path} is of no run; name another --output-dir")
    before = saved["config"] | saved
    now = description["config"] | description
    names = [name for name in now if name not in MAY_DIFFER and before.get(name) != now[name]]
    if names:
        differ = ", ".join(f"{name} {before.get(name)!r} (not {now[name]!r})" for name in names)
        raise InputError(f"{folder} holds a run with {differ}; name another --output-dir")
    return saved


def is_finished(folder):
    has_saes = (folder / "sae_y" / "sae_weights.safetensors").exists()  # the last to be written
    return has_saes and not (folder / "checkpoint.safetensors").exists()


def new_pair(config, d_model):
    """Two SAEs, the number of steps that they were trained, and when each latent last fired."""
    torch.manual_seed(config.seed)
    n_latents = config.expansion_factor * d_model
    saes = {name: TopKSAE(d_model, n_latents, config.k) for name in ("sae_x", "sae_y")}
    pair = nn.ModuleDict(saes)
    pair.register_buffer("step", torch.zeros((), dtype=torch.long))
    pair.register_buffer("last_fired", torch.zeros(2, n_latents, dtype=torch.long))  # in tokens
    return pair


def save_checkpoint(folder, pair, adam):
    """Write both SAEs, step, last_fired and Adam's state into one file."""
    tensors = pair.state_dict()
    for name, p in pair.named_parameters():
        for key, value in adam.state[p].items():
            tensors[f"adam.{key}.{name}"] = value
    write_file(folder / "checkpoint.safetensors", safetensors.torch.save(tensors))


def load_checkpoint(folder, pair, adam):
    """Load the checkpoint, if there is one."""
    path = folder / "checkpoint.safetensors"
    if not path.exists():
        return
    try:
        tensors = safetensors.torch.load_file(path)
        for name, p in pair.named_parameters():
            for key in ("step", "exp_avg", "exp_avg_sq"):
                adam.state[p][key] = tensors.pop(f"adam.{key}.{name}").to(p.device)
        pair.load_state_dict(tensors)
    except (safetensors.SafetensorError, KeyError, RuntimeError) as error:
        raise InputError(f"{path} is damaged ({error}); delete it to start anew") from error


def scales_of(config, mlp, batches):
    """-> what x and y are divided by: with --normalize their mean norms / sqrt(d_model), else 1.

    The means are over batches x (B, d_model), and over all processes.
    """
    means = torch.zeros(2, device=mlp.W_in.device)
    for x in batches:
        norms = torch.stack([x.norm(dim=1).mean(), mlp(x).norm(dim=1).mean()])
        means += norms / math.sqrt(x.shape[1]) / len(batches) / WORLD
    if WORLD > 1:
        distributed.all_reduce(means)
    scale_x, scale_y = means.tolist()
    if config.normalize:
        return {"scale_x": scale_x, "scale_y": scale_y}
    if not 1 / 3 < scale_x / scale_y < 3:
        sizes = f"x has a mean norm of {scale_x:.2g} sqrt(d_model), y of {scale_y:.2g}"
        notice(f"{sizes}: the loss will see little but one of them; --normalize divides it out")
    return {"scale_x": 1.0, "scale_y": 1.0}


def check_agreement(done, is_saved, device):
    """InputError unless all processes go on from the same step, of the same folder."""
    if WORLD > 1:
        own = torch.tensor([done, is_saved], device=device)
        total = own.clone()
        distributed.all_reduce(total)
        if not torch.equal(total, WORLD * own):
            raise InputError("the processes of this run do not see the same --output-dir")


def train(config: Config, penalty=l1) -> Path:
    """Train a pair of SAEs -> the run's folder. penalty: of J (tokens, k, k) -> (tokens,).

    A run that was stopped, by whatever, goes on from its last checkpoint; a finished one is left as
    it is. Under torchrun each process takes its share of the text and of every batch; the first one
    measures and writes. InputError if settings, text or folder are not what they should be, or
    numbers break; SystemExit after SIGINT or SIGTERM.
    """
    if WORLD > 1 and not distributed.is_initialized():
        distributed.init_process_group(timeout=timedelta(hours=2))  # each reads its own text
    model, tokenizer = load_model(config)
    mlp = find_mlp(model, config.layer)
    config = fitted(config, model, mlp)
    folder = Path(config.output_dir)
    description = describe(config, penalty, mlp)
    with locked(folder):
        saved = check_folder(folder, description)
        if is_finished(folder):
            notice(f"{folder} holds this run, finished; rm -r {folder} makes room for a new one")
            return folder
        notice(f"settings: {', '.join(f'{name} {value}' for name, value in vars(config).items())}")
        pair = new_pair(config, mlp.W_in.shape[1]).to(model.device)
        adam = torch.optim.Adam(pair.parameters(), fused=True)
        load_checkpoint(folder, pair, adam)
        done = int(pair.step)
        if done:
            notice(f"going on after step {done}; the text is read again up to there")
        check_agreement(done, bool(saved), model.device)
        if not saved and next(token_contexts(config, tokenizer, "held out"), None) is None:
            notice("this text is too short to hold any out: evaluate on another --dataset")

        batches = activation_batches(config, model, tokenizer, mlp, done)
        # what is slow to read is read here, where a signal ends the program at once
        first = list(itertools.islice(batches, 1 if saved else config.buffer_batches))
        if not saved:
            saved = description | scales_of(config, mlp, first)
            if RANK == 0:
                write_file(folder / "config.json", json.dumps(saved, indent=2).encode())
        scale_x, scale_y = saved["scale_x"], saved["scale_y"]
        batches = (x / scale_x for x in itertools.chain(first, batches))
        del first  # so that it goes when it is used up
        optimize(config, penalty, mlp.scaled(scale_x, scale_y), pair, adam, batches, folder)
        if RANK == 0:
            names = {module: name for name, module in model.named_modules()}  # SAELens' hooks
            save_sae(folder / "sae_x", pair.sae_x, scale_x, config, names[mlp.maps[0]])
            save_sae(folder / "sae_y", pair.sae_y, scale_y, config, names[mlp.maps[-1]])
            (folder / "checkpoint.safetensors").unlink()
    return folder


@contextmanager
def noted_signals():
    """-> a list that gets the number of a SIGINT or SIGTERM, which then does nothing else.

    A second Ctrl-C ends the program. A second SIGTERM does not: job managers send it twice.
    """
    noted = []

    def note(number, frame):
        noted.append(number)
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)

    handlers = {}
    if threading.current_thread() is threading.main_thread():  # which alone gets signals
        for number in (signal.SIGINT, signal.SIGTERM):
            handlers[number] = signal.signal(number, note)
    try:
        yield noted
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def optimize(config, penalty, mlp, pair, adam, batches, folder):
    """The training loop, from step pair.step + 1 to the last: Adam on jsae_loss.

    Gradients are clipped to norm 1, of both SAEs together, as in the authors' code.
    """
    n_steps = config.tokens // config.batch_size
    done = int(pair.step)
    saes = pair.sae_x, pair.sae_y
    metrics = folder / "metrics.jsonl"
    rows = []
    if metrics.exists():
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
        rows = [row for row in rows if row["step"] <= done]
    stop = 0  # the number of a signal that came
    last_saved = time.time()
    bar = tqdm(range(done + 1, n_steps + 1), initial=done, total=n_steps, disable=RANK > 0)
    with noted_signals() as signals, bar:
        for step, x in zip(bar, batches):
            lr, coef = schedule(config, step, n_steps)
            adam.param_groups[0]["lr"] = lr
            with autocast(config, x.device):
                loss, parts = jsae_loss(*saes, mlp, x, coef, penalty)
            adam.zero_grad()
            loss.backward()
            if WORLD > 1:
                for p in pair.parameters():
                    distributed.all_reduce(p.grad)
                    p.grad /= WORLD
            norm = nn.utils.clip_grad_norm_(pair.parameters(), 1.0)
            if not norm.isfinite():
                raise InputError(f"step {step}: loss {loss.item():g}, gradient of norm {norm:g}")
            adam.step()
            tokens = step * config.batch_size
            for sae, s, fired in zip(saes, (parts["s_x"], parts["s_y"]), pair.last_fired):
                sae.set_decoder_norm_to_one()
                fired[s.idx[s.acts > 0]] = tokens
            pair.step += 1
            stop = max(signals, default=0)
            if WORLD > 1:
                stop = torch.tensor(stop, device=x.device)
                for tensor in (pair.last_fired, stop):
                    distributed.all_reduce(tensor, distributed.ReduceOp.MAX)
                stop = stop.item()

            if RANK == 0 and (step % 50 == 0 or step == n_steps):
                row = {"step": step, "tokens": tokens, "lr": lr, "coef": coef}
                row |= measure(*saes, mlp, x[:512])
                if "penalty" in parts:
                    row["penalty"] = parts["penalty"].item()
                dead = pair.last_fired <= max(0, tokens - 10_000_000)  # or never so far; Appendix E
                row["dead_x"], row["dead_y"] = dead.sum(1).tolist()
                rows.append(row)
                write_file(metrics, "".join(json.dumps(row) + "\n" for row in rows).encode())
                shown = {"ev_x": row["ev_x"], "ev_y": row["ev_y"], "|J|": row["jacobian_l1"]}
                bar.set_postfix(shown)
            is_due = stop or step == n_steps or time.time() - last_saved > CHECKPOINT_SECONDS
            if RANK == 0 and is_due:
                save_checkpoint(folder, pair, adam)
                last_saved = time.time()
            if stop:
                break
    if stop:
        notice(f"jsae.py: stopped after step {step}; the same command goes on from there")
        sys.exit(128 + stop)


def raw_tensors(tensors, scale):
    """Of an SAE trained on v / scale, the tensors of one that takes and gives v; same latents."""
    return tensors | {
        "W_enc": tensors["W_enc"] / scale,
        "W_dec": tensors["W_dec"] * scale,
        "b_dec": tensors["b_dec"] * scale,
    }


def save_sae(folder, sae, scale, config, hook_name):
    """Write an SAE, trained on v / scale, in the format of SAELens 6, where it is one of v.

    hook_name: x is the input of the module of that name, y the output.
    """
    tensors = raw_tensors(sae.state_dict(), scale)
    n_latents, d_model = tensors["W_enc"].shape
    tensors["W_enc"] = tensors["W_enc"].T.contiguous()  # (d_in, d_sae) there
    cfg = {
        "architecture": "topk",
        "d_in": d_model,
        "d_sae": n_latents,
        "k": sae.k,
        "apply_b_dec_to_input": False,
        "dtype": "float32",
        "device": "cpu",
        "metadata": {
            "sae_lens_version": "6.0.0",
            "model_name": config.model,
            "hook_name": hook_name,
            "dataset_path": config.dataset,
            "context_size": config.context_size,
            "prepend_bos": True,
        },
    }
    write_file(folder / "cfg.json", json.dumps(cfg, indent=2).encode())
    write_file(folder / "sae_weights.safetensors", safetensors.torch.save(tensors))


def run_folder(path_or_hub_id) -> Path:
    """-> the local folder of a run, or a local copy of its files on the hub."""
    path = Path(path_or_hub_id).expanduser()
    if path.exists():
        return path
    files = ["config.json", "sae_x/*", "sae_y/*"]
    return Path(snapshot_download(str(path_or_hub_id), allow_patterns=files))


def load_run(path_or_hub_id):
    """-> (sae_x, sae_y, config) of a run: a folder, or the id of a hub repository.

    They take and give raw x and y. While the run is unfinished, they are those of its checkpoint.
    """
    try:
        folder = run_folder(path_or_hub_id)
        saved = json.loads((folder / "config.json").read_text())
        config = Config(**saved["config"])
        saes = []
        is_whole = is_finished(folder)
        if not is_whole:
            state = safetensors.torch.load_file(folder / "checkpoint.safetensors")
        for side in ("x", "y"):
            if is_whole:
                path = folder / f"sae_{side}" / "sae_weights.safetensors"
                tensors = safetensors.torch.load_file(path)
                tensors["W_enc"] = tensors["W_enc"].T
            else:
                names = ("W_enc", "b_enc", "W_dec", "b_dec")
                tensors = {name: state[f"sae_{side}.{name}"] for name in names}
                tensors = raw_tensors(tensors, saved[f"scale_{side}"])
            n_latents, d_model = tensors["W_enc"].shape
            sae = TopKSAE(d_model, n_latents, config.k)
            sae.load_state_dict(tensors)
            saes.append(sae)
    except Exception as error:  # whatever is wrong with the files or the hub
        raise InputError(f"{path_or_hub_id} is not a run that can be loaded: {error}") from error
    return *saes, config


# ---- 8. Command line -----------------------------------------------------------------------------


def make_parser(settings, usage):
    """-> a parser with a flag for each field of a dataclass, whose source is the help.

    It returns only what was given, and raises InputError.
    """
    parser = argparse.ArgumentParser(
        usage=usage,
        description=inspect.getsource(settings).split("    def __post_init__")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )

    def refuse(message):
        raise InputError(message)

    parser.error = refuse  # in place of a usage block and exit
    for field in dataclasses.fields(settings):
        kind = {"type": field.type}
        if field.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}  # --name and --no-name
        parser.add_argument(flag(field.name), help=argparse.SUPPRESS, **kind)
    return parser


def run_program(name, body, argv) -> int:
    """Call body(argv) -> exit status: 0; after one line on stderr 2, or 130 or 143 (signals)."""
    try:
        body(sys.argv[1:] if argv is None else argv)
        return 0
    except SystemExit as end:  # of --help, or of a run that a signal ended
        return end.code or 0
    except KeyboardInterrupt:
        line, status = "stopped", 130
    except (InputError, OSError, torch.OutOfMemoryError) as error:
        line, status = f"error: {error}", 2
    print(f"{name}:", " ".join(line.split()), file=sys.stderr)
    return status


def train_by_command(argv):
    """What `python jsae.py` does: parse, train, print the last metrics."""
    given = vars(make_parser(Config, "python jsae.py [--setting value ...]").parse_args(argv))
    if "model" not in given:
        given = DEMO | given
        if not Path(DEMO["model"]).exists():  # this file was copied alone
            missing = f"there is no {DEMO['model']}"
            raise InputError(f"{missing}; try --model EleutherAI/pythia-70m --layer 3")
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
    """-> exit status: 0, 2 after one line about what was given, 130 or 143 after a signal."""
    return run_program("jsae.py", train_by_command, argv)


if __name__ == "__main__":
    sys.exit(main())
