"""Tests of jsae.py and evaluate.py. No network.

    python -m pytest               all of them
    python -m pytest -k oracle     the three that matter most

test_oracle_J_equals_jacrev: J is what automatic differentiation says.
test_oracle_loss_and_gradients_equal_the_plain_formula: the fast loss is Eq. 5, with its gradients.
test_oracle_ce_equals_transformers_own_loss: cross-entropies are those of the language model itself.

 1 to 4  sparse autoencoders, the MLP's derivative, the Jacobian, the loss
 5       the MLP in a transformers model
 6       settings, text, activations
 7       training; runs that survive signals, kills, damage, full disks; several processes
 8       command line, bad input, README
 9       evaluation
"""

import dataclasses
import gzip
import importlib.util
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
import zlib
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pytest
import safetensors.torch
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers.activations import ACT2FN

import evaluate
import jsae
from jsae import (
    MLP,
    Config,
    InputError,
    Latents,
    TopKSAE,
    active_jacobian,
    find_mlp,
    jsae_loss,
)

TINY = jsae.HERE / "assets" / "tiny-pythia"
DOUBLE = torch.float64
torch.set_num_threads(1)  # the tensors are small

ACTS = {
    "gelu": nn.GELU(),
    "tanh_gelu": nn.GELU(approximate="tanh"),
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
    "silu": F.silu,
    "relu": F.relu,
    "relu2": lambda z: F.relu(z).square(),
    "mish": nn.Mish(),
}
BY_HAND = {"gelu": F.gelu, "tanh_gelu": jsae.tanh_gelu, "silu": F.silu, "relu": F.relu}

gated_or_plain = pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
every_act = pytest.mark.parametrize("act", ACTS)


def normal(*shape, seed=0):
    """Normal numbers in float64 that depend on nothing but the seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=DOUBLE, generator=generator)


def uniform(*shape, seed=0):
    """Numbers from 0 to 1 in float64 that depend on nothing but the seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, dtype=DOUBLE, generator=generator)


def random_ids(*shape, n_words=50):
    """Token ids that are always the same."""
    return torch.randint(n_words, shape, generator=torch.Generator().manual_seed(0))


def random_mlp(act="gelu", gated=False, d_model=10, d_mlp=14):
    weights = [
        normal(d_mlp, d_model, seed=1),
        normal(d_mlp, seed=2),
        normal(d_model, d_mlp, seed=3),
        normal(d_model, seed=4),
    ]
    if gated:
        weights += [normal(d_mlp, d_model, seed=5), normal(d_mlp, seed=6)]
    return MLP(*weights, act=BY_HAND.get(act, ACTS[act]))


def random_pair(d_model=10, n_latents=30, k=4, b_enc=0.0):
    """Two SAEs in float64, away from their initial values; a low b_enc makes ReLU cut latents off."""
    pair = TopKSAE(d_model, n_latents, k).double(), TopKSAE(d_model, n_latents, k).double()
    for side, sae in enumerate(pair):
        rows = F.normalize(normal(n_latents, d_model, seed=10 + side))
        sae.W_dec.data = rows + 0.1 * normal(n_latents, d_model, seed=20 + side)
        sae.W_enc.data = rows + 0.1 * normal(n_latents, d_model, seed=30 + side)
        sae.b_enc.data = b_enc + 0.1 * normal(n_latents, seed=40 + side)
        sae.b_dec.data = 0.1 * normal(d_model, seed=50 + side)
    return pair


def gradients(loss, pair):
    return torch.autograd.grad(loss, [p for sae in pair for p in sae.parameters()])


def assert_close(ours, expected, rtol=1e-10, atol=1e-12):
    torch.testing.assert_close(ours, expected, rtol=rtol, atol=atol)


# ---- 1. Sparse autoencoders (Eq. 1, 2) -----------------------------------------------------------


def test_a_new_autoencoder_has_unit_decoder_rows_and_the_encoder_as_their_copy():
    sae = TopKSAE(8, 40, 3)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(40))
    assert torch.equal(sae.W_enc, sae.W_dec)
    assert not sae.b_enc.any()
    assert not sae.b_dec.any()


def test_an_autoencoder_keeps_the_k_largest_and_clips_them_at_zero():
    sae = TopKSAE(2, 4, 3)
    sae.W_enc.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -2.0]])
    sae.W_dec.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [5.0, 5.0]])
    sae.b_dec.data = torch.tensor([0.5, -0.5])
    acts, idx = sae.encode(torch.tensor([3.0, 1.0]))  # pre-activations 3, 1, -3, -2
    assert dict(zip(idx.tolist(), acts.tolist())) == {0: 3.0, 1: 1.0, 3: 0.0}
    assert sae(torch.tensor([[3.0, 1.0]])).tolist() == [[3.5, 0.5]]


def test_k_above_the_number_of_latents_is_refused():
    with pytest.raises(ValueError, match="k is 9; expected 1 to 8"):
        TopKSAE(4, 8, 9)


# ---- 2. The MLP and its derivative (Eq. 8, 12, 17 to 28) -----------------------------------------


@every_act
def test_the_derivative_of_each_activation_equals_autodiff(act):
    z = torch.linspace(-6, 6, 1000, dtype=DOUBLE, requires_grad=True)  # ReLU's kink is not in it
    mlp = random_mlp(act)
    assert_close(mlp.act(z), ACTS[act](z))
    (expected,) = torch.autograd.grad(ACTS[act](z).sum(), z)
    assert_close(mlp.act_grad(z), expected)
    assert (mlp.act in jsae.ACT_GRADS) == (act in BY_HAND)


@gated_or_plain
@every_act
def test_the_derivative_of_the_mlp_equals_torch_func_jacrev(act, gated):
    mlp = random_mlp(act, gated)
    x = normal(10)
    ours = sum(mlp.W_out @ (c.unsqueeze(1) * W) for c, W in mlp.derivative(x))
    assert_close(ours, torch.func.jacrev(mlp)(x))


def test_an_activation_that_mixes_elements_is_refused():
    with pytest.raises(ValueError, match="not elementwise"):
        MLP(torch.eye(3), None, torch.eye(3), None, act=partial(torch.softmax, dim=-1))


def test_the_mlp_holds_contiguous_copies_in_float32_or_more():
    weight = torch.randn(4, 6, dtype=torch.bfloat16)
    act = nn.PReLU()
    mlp = MLP(weight, None, weight.T, None, act=act)
    weight.zero_()
    assert mlp.W_in.any()
    assert all(w.dtype == torch.float32 and w.is_contiguous() for w in mlp.buffers())
    assert not any(p.requires_grad for p in mlp.parameters())
    assert act.weight.requires_grad  # the model's own is left as it was


# ---- 3. The Jacobian (Eq. 16, 29) ----------------------------------------------------------------


def test_a_jacobian_worked_by_hand():
    W_in = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    W_out = torch.tensor([[1.0, 0.0], [2.0, 1.0]])
    mlp = MLP(W_in, None, W_out, None, act=F.relu)
    sae_x, sae_y = TopKSAE(2, 3, 2), TopKSAE(2, 3, 2)
    sae_x.W_dec.data = torch.tensor([[9.0, 9.0], [1.0, 0.0], [0.0, 1.0]])
    sae_y.W_enc.data = torch.tensor([[1.0, 0.0], [1.0, 1.0], [9.0, 9.0]])
    s_x = Latents(torch.tensor([2.0, 5.0]), torch.tensor([1, 2]))  # K_1 = {1, 2}
    s_y = Latents(torch.tensor([1.0, 1.0]), torch.tensor([0, 1]))  # K_2 = {0, 1}
    J = partial(active_jacobian, sae_x, sae_y, mlp)
    # z = (3, 2): both units on, df/dx = W_out W_in = [[1, 2], [5, 3]]
    assert J(torch.tensor([1.0, 1.0]), s_x, s_y).tolist() == [[1.0, 2.0], [6.0, 5.0]]
    # z = (9, -1): the second unit off, df/dx = [[1, 2], [2, 4]]
    assert J(torch.tensor([1.0, 4.0]), s_x, s_y).tolist() == [[1.0, 2.0], [3.0, 6.0]]
    off = Latents(torch.tensor([2.0, 0.0]), s_x.idx)  # the second input latent is cut off
    assert J(torch.tensor([1.0, 1.0]), off, s_y).tolist() == [[1.0, 0.0], [6.0, 0.0]]


@pytest.mark.parametrize("literal", [False, True], ids=["at x (D.1)", "at x_hat (Eq. 3)"])
@gated_or_plain
@every_act
def test_oracle_J_equals_jacrev(act, gated, literal):
    """The whole n_y x n_x derivative of f_s: J inside K_2 x K_1, zero elsewhere."""
    sae_x, sae_y = random_pair(b_enc=-1.0)
    sae_y.b_enc.data -= 3.0
    mlp = random_mlp(act, gated)
    n = len(sae_x.W_enc)
    x = normal(5, 10)
    s_x = sae_x.encode(x)
    x_hat = sae_x.decode(s_x)
    point = x_hat if literal else x
    s_y = sae_y.encode(mlp(point))
    error = (point - x_hat).detach()  # what the SAE of x leaves over; it stays as it is
    assert (s_x.acts == 0).any() or (s_y.acts == 0).any()
    J = active_jacobian(sae_x, sae_y, mlp, point, s_x, s_y)
    for b in range(len(x)):

        def f_s(s, b=b):
            values, idx = s.topk(sae_x.k)
            x = sae_x.decode(Latents(F.relu(values), idx)) + error[b]
            out = sae_y.encode(mlp(x))
            return torch.zeros(n, dtype=DOUBLE).scatter(0, out.idx, out.acts)

        s = torch.zeros(n, dtype=DOUBLE).scatter(0, s_x.idx[b], s_x.acts[b]).detach()
        ours = torch.zeros(n, n, dtype=DOUBLE)
        ours[s_y.idx[b].unsqueeze(1), s_x.idx[b]] = J[b].detach()
        assert_close(ours, torch.func.jacrev(f_s)(s), atol=1e-10)


def test_rows_and_columns_of_latents_that_relu_cut_off_are_exactly_zero():
    sae_x, sae_y = random_pair(b_enc=-2.0)
    mlp = random_mlp()
    x = normal(20, 10)
    s_x, s_y = sae_x.encode(x), sae_y.encode(mlp(x) / 4)
    J = active_jacobian(sae_x, sae_y, mlp, x, s_x, s_y)
    assert (s_x.acts == 0).any()
    assert (s_y.acts == 0).any()
    assert not J[s_y.acts == 0].any()
    assert not J.mT[s_x.acts == 0].any()
    assert J[s_y.acts > 0].any()


def module_from_file(path):
    """The Python file as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # where NamedTuple looks
    spec.loader.exec_module(module)
    return module


def test_sections_1_to_3_run_when_they_are_copied_as_one_block(tmp_path):
    source = (jsae.HERE / "jsae.py").read_text()
    method = source[source.index("# ---- 1.") : source.index("# ---- 4.")]
    imports = "import copy, math\nfrom typing import NamedTuple\nimport torch\n"
    imports += "import torch.nn.functional as F\nfrom torch import Tensor, nn\n"
    (tmp_path / "copied.py").write_text(imports + method)
    copied = module_from_file(tmp_path / "copied.py")
    weights = normal(14, 10).float(), None, normal(10, 14).float(), None
    mlp = copied.MLP(*weights)
    pair = copied.TopKSAE(10, 30, 4), copied.TopKSAE(10, 30, 4)
    loss = copied.plain_jsae_loss(*pair, mlp, normal(20, 10).float(), 1.0)
    loss.backward()
    assert all(p.grad.any() for sae in pair for p in sae.parameters())
    assert_close(loss, jsae_loss(*pair, MLP(*weights), normal(20, 10), 1.0)[0], rtol=1e-5)


# ---- 4. The loss (Eq. 5) -------------------------------------------------------------------------


def squares(J):
    """Another penalty: the mean of J^2."""
    return J.square().mean((1, 2))


def row_ratio(J):
    """Another one, which does not see the scale of a row."""
    return F.normalize(J, dim=2).abs().mean((1, 2))


every_penalty = pytest.mark.parametrize("penalty", [jsae.l1, squares, row_ratio])


def loss_from_definitions(sae_x, sae_y, mlp, x, coef, penalty=jsae.l1):
    """Eq. 5, each term as it is written there."""
    y = mlp(x)
    J = active_jacobian(sae_x, sae_y, mlp, x, sae_x.encode(x), sae_y.encode(y))
    return F.mse_loss(sae_x(x), x) + F.mse_loss(sae_y(y), y) + coef * penalty(J).mean()


def test_the_plain_loss_is_the_sum_of_the_terms_of_eq_5():
    pair, mlp, x = random_pair(b_enc=-0.8), random_mlp(), normal(50, 10)
    y = mlp(x)
    s_x, s_y = pair[0].encode(x), pair[1].encode(y)
    elements = active_jacobian(*pair, mlp, x, s_x, s_y).abs().sum((1, 2))  # of each token
    expected = (pair[0](x) - x).square().sum(1) / 10 + (pair[1](y) - y).square().sum(1) / 10
    expected = (expected + 0.7 / 4**2 * elements).mean()
    assert_close(jsae.plain_jsae_loss(*pair, mlp, x, 0.7), expected)


@every_penalty
@gated_or_plain
@every_act
def test_oracle_loss_and_gradients_equal_the_plain_formula(act, gated, penalty):
    pair, mlp, x = random_pair(b_enc=-0.8), random_mlp(act, gated), normal(50, 10)
    fast, parts = jsae_loss(*pair, mlp, x, 0.7, penalty=penalty)
    plain = loss_from_definitions(*pair, mlp, x, 0.7, penalty)
    assert_close(fast, plain)
    for ours, expected in zip(gradients(fast, pair), gradients(plain, pair)):
        assert_close(ours, expected)
    total = parts["mse_x"] + parts["mse_y"] + 0.7 * parts["penalty"]
    assert_close(total, fast.detach())
    assert not any(parts[name].requires_grad for name in ("mse_x", "mse_y", "penalty"))
    assert torch.equal(parts["s_x"].idx, pair[0].encode(x).idx)


@pytest.mark.parametrize("penalty", [jsae.l1, row_ratio])
def test_the_fast_loss_passes_gradcheck(penalty):
    pair, mlp, x = random_pair(), random_mlp(gated=True), normal(6, 10)
    names = [name for name, _ in pair[0].named_parameters()]

    def loss(*values):
        saes = nn.Module(), nn.Module()
        for sae, own in zip(saes, (values[: len(names)], values[len(names) :])):
            sae.k = pair[0].k
            for name, value in zip(names, own):
                setattr(sae, name, value)
        return jsae_loss(*saes, mlp, x, 0.5, penalty=penalty)[0]

    values = [getattr(sae, name).detach().requires_grad_() for sae in pair for name in names]
    assert torch.autograd.gradcheck(loss, values, atol=1e-6, nondet_tol=1e-12)


@every_penalty
@gated_or_plain
def test_the_fast_loss_is_the_same_whatever_the_chunk(gated, penalty, monkeypatch):
    pair, mlp, x = random_pair(b_enc=-0.8), random_mlp(gated=gated), normal(70, 10)
    whole = jsae_loss(*pair, mlp, x, 1.0, penalty=penalty)[0]
    expected = gradients(whole, pair)
    asked = []

    def nine_tokens(device, bytes_per_token):
        asked.append(bytes_per_token)
        return 9

    monkeypatch.setattr(jsae, "chunk_size", nine_tokens)
    chunked = jsae_loss(*pair, mlp, x, 1.0, penalty=penalty)[0]
    assert asked == [30 * 8, 30 * 8, 4 * 14 * 8]  # of pre-activations of x and y, of J's products
    assert_close(chunked, whole)
    for ours, other in zip(gradients(chunked, pair), expected):
        assert_close(ours, other, atol=1e-13)


@pytest.mark.parametrize("k_y", [2, 4, 7])
def test_fast_penalty_serves_any_two_saes_whose_latents_are_rows(k_y):
    mlp, x = random_mlp(gated=True), normal(50, 10)
    sae_x = random_pair(n_latents=30, k=4)[0]
    sae_y = random_pair(n_latents=50, k=k_y)[1]
    theirs = types.SimpleNamespace(W_dec=sae_x.W_dec), types.SimpleNamespace(W_enc=sae_y.W_enc)
    s_x, s_y = sae_x.encode(x), sae_y.encode(mlp(x))
    J = active_jacobian(sae_x, sae_y, mlp, x, s_x, s_y)
    expected = J.abs().mean()
    ours = jsae.fast_penalty(*theirs, mlp, x, s_x, s_y)
    assert_close(ours, expected)
    weights = [sae_x.W_dec, sae_y.W_enc]
    for one, other in zip(
        torch.autograd.grad(ours, weights), torch.autograd.grad(expected, weights)
    ):
        assert_close(one, other)


def test_a_penalty_that_is_nan_for_no_active_pair_is_not_hidden():
    (sae_x, sae_y), mlp, x = random_pair(), random_mlp(), normal(9, 10)
    sae_y.b_enc.data.fill_(-1e9)
    loss, parts = jsae_loss(sae_x, sae_y, mlp, x, 1.0, penalty=row_ratio)
    assert parts["penalty"] == 0
    assert all(g.isfinite().all() for g in gradients(loss, (sae_x, sae_y)))
    broken = jsae_loss(sae_x, sae_y, mlp, x, 1.0, penalty=lambda J: J.sum((1, 2)) / J.norm())[0]
    assert broken.isnan()


def test_coefficient_zero_gives_the_gradients_of_two_independent_saes():
    pair, mlp, x = random_pair(), random_mlp(), normal(50, 10)
    loss, parts = jsae_loss(*pair, mlp, x, 0.0)
    assert "penalty" not in parts
    expected = []
    for sae, v in zip(pair, (x, mlp(x))):
        expected += gradients(F.mse_loss(sae(v), v), [sae])
    for ours, other in zip(gradients(loss, pair), expected):
        assert_close(ours, other, atol=1e-13)


def test_nothing_of_size_tokens_x_latents_or_k_x_d_mlp_is_kept_for_the_backward_pass():
    pair, mlp = random_pair(n_latents=600, k=8), random_mlp(d_mlp=300)
    kept = []

    def note(t):
        kept.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        jsae_loss(*pair, mlp, normal(200, 10), 1.0)
    assert 0 < max(kept) <= 600 * 300 < 200 * 8 * 300  # W_enc_y W_out, and not B k d_mlp


@every_penalty
@gated_or_plain
def test_autocast_sets_the_dtype_of_the_large_products_only(gated, penalty):
    pair = [sae.float() for sae in random_pair(d_model=16, n_latents=64)]
    mlp, x = random_mlp(gated=gated, d_model=16).float(), normal(64, 16).float()
    exact = jsae_loss(*pair, mlp, x, 1.0, penalty=penalty)[0]
    with torch.autocast("cpu", torch.bfloat16):
        loss, parts = jsae_loss(*pair, mlp, x, 1.0, penalty=penalty)
    assert loss.dtype == torch.float32
    assert parts["s_x"].acts.dtype == torch.float32
    assert_close(loss, exact, rtol=0.03, atol=0)
    assert loss != exact  # bfloat16 was at work
    for low, full in zip(gradients(loss, pair), gradients(exact, pair)):
        assert low.dtype == torch.float32
        assert (low - full).norm() < 0.3 * full.norm()  # some tokens have another latent
    acts, idx = parts["s_x"]  # the kept values are exact, though TopK chose them in bfloat16
    products = (pair[0].W_enc[idx] @ x.unsqueeze(2)).squeeze(2) + pair[0].b_enc[idx]
    assert_close(acts, F.relu(products), rtol=1e-5, atol=1e-6)


def test_a_step_on_two_threads_gives_the_same_bits_every_time():
    pair = [sae.float() for sae in random_pair(d_model=64, n_latents=512, k=16)]
    mlp, x = random_mlp(d_model=64, d_mlp=128).float(), normal(4096, 64).float()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    runs = [gradients(jsae_loss(*pair, mlp, x, 1.0)[0], pair) for _ in range(4)]
    torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(run, runs[0]))


def test_a_scaled_mlp_is_the_same_map_between_scaled_vectors_and_so_is_its_derivative():
    for gated in (False, True):
        mlp, x = random_mlp(gated=gated), normal(7, 10)
        scaled = mlp.scaled(3.0, 0.2)
        assert_close(scaled(x / 3), mlp(x) / 0.2)
        one, other = (
            sum(m.W_out @ (c.unsqueeze(-1) * W) for c, W in m.derivative(v))
            for m, v in ((mlp, x), (scaled, x / 3))
        )
        assert_close(other, one * 3 / 0.2)


# ---- 5. The MLP in a transformers model ----------------------------------------------------------

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 99,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "head_dim": 8,
    "ffn_dim": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OWN = {  # settings of models that have names of their own for sizes, or need more
    "gpt_neo": {
        "attention_types": [[["global", "local"], 1]],
        "num_layers": 2,
        "num_heads": 4,
        "head_dim": None,
    },
    "falcon": {"head_dim": None},
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4},
    "opt": {"word_embed_proj_dim": 32},
    "xglm": {"d_model": 32, "attention_heads": 4, "num_layers": 2},
    "bart": {
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 2,  # deeper than its encoder
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 40,
    },
    "prophetnet": {
        "num_hidden_layers": None,
        "num_encoder_layers": 3,
        "num_decoder_layers": 2,
        "num_decoder_attention_heads": 4,
        "decoder_ffn_dim": 40,
        "is_decoder": True,
    },
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 16, "mlp_only_layers": [0]},
    "granitemoehybrid": {
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "shared_intermediate_size": 48,
        "layer_types": ["attention", "attention"],
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
    },
    "gemma3n_text": {
        "vocab_size_per_layer_input": 99,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 0,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "cpmant": {"dim_head": 8, "dim_ff": 48, "prompt_length": 4},
    "xlm": {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "n_words": 99},
}
PLAIN = (
    "gpt_neox gpt2 gpt_neo gptj phi opt falcon starcoder2 persimmon codegen nemotron bloom mpt "
    "biogpt xglm gpt_bigcode arcee apertus ctrl openai-gpt bart gpt_neox_japanese"
)
GATED = (
    "llama mistral qwen2 qwen3 gemma gemma2 gemma3_text phi3 stablelm olmo2 granite glm cohere "
    "olmo smollm3 helium exaone4 glm4 lfm2 modernbert-decoder granitemoehybrid gemma3n_text"
)


def random_model(kind, **settings):
    """A tiny random model; only settings that its config has are changed."""
    defaults = transformers.AutoConfig.for_model(kind)
    own = {**OWN.get(kind, {}), **settings}
    given = {name: SIZES[name] for name in SIZES if hasattr(defaults, name)}
    if "d_model" in own or "emb_dim" in own:
        given.pop("hidden_size", None)
        given.pop("num_hidden_layers", None)
        given.pop("num_attention_heads", None)
    if getattr(defaults, "layer_types", None) is not None:
        given["layer_types"] = None
    given.update(own)
    given = {
        name: value for name, value in given.items() if value is not None or name == "layer_types"
    }
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **given)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("kind", PLAIN.split() + GATED.split())
def test_mlp_of_every_architecture_reproduces_the_models_own(kind):
    model = random_model(kind)
    mlp = find_mlp(model, 1)
    assert (mlp.W_gate is not None) == (kind in GATED.split())
    assert all(buffer.is_contiguous() for buffer in mlp.buffers())  # safetensors asks for it
    assert not set(mlp.maps) & set(mlp.modules())  # they stay part of the language model
    ids = torch.arange(3 * 20).reshape(3, 20) + 5
    _, y = jsae.watch(model, ids, mlp.maps)
    x = jsae.mlp_inputs(model, mlp, ids)
    assert x.shape == (3, 20, 32)
    torch.testing.assert_close(mlp(x).flatten(0, 1), y, rtol=1e-4, atol=1e-6)
    J = sum(mlp.W_out @ (c.unsqueeze(1) * W) for c, W in mlp.derivative(x[0, 0]))
    torch.testing.assert_close(torch.func.jacrev(mlp)(x[0, 0]), J, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "kind, settings, says",
    [
        ("mixtral", {}, "as experts"),
        ("gpt_oss", {}, "as experts"),
        ("granitemoeshared", {}, "as experts"),
        ("qwen2_moe", {}, "as experts|5 of its modules fit"),
        (
            "hunyuan_v1_moe",
            {},
            "as experts|2 of its modules fit",
        ),  # one expert that is routed to, one that is shared
        ("llama4_text", {}, "as experts"),
        ("phimoe", {}, "as experts"),
        (
            "prophetnet",
            {},
            "some are not called once, on all tokens",
        ),  # x has more rows than there are tokens
        ("bitnet", {}, "0 of its modules fit$"),
        ("rwkv", {}, "0 of its modules fit$"),
        ("cpmant", {}, "cpm"),
        ("gemma3n_text", {"activation_sparsity_pattern": [0.9, 0.9]}, "0 of its modules fit$"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "is not causal"),
        ("xlm", {}, "is not causal"),
    ],
)
def test_what_is_not_one_dense_mlp_of_a_causal_model_is_refused(kind, settings, says):
    known = vars(transformers.AutoConfig.for_model(kind))
    if not settings.keys() <= known.keys():
        pytest.skip(f"this version of transformers has no {list(settings)}")
    with pytest.raises(InputError, match=f"(?i){says}"):
        find_mlp(random_model(kind, **settings), 1)


def test_the_dense_layer_of_a_model_with_experts_is_found():
    assert find_mlp(random_model("qwen2_moe"), 0).W_in.shape == (48, 32)


def test_the_blocks_that_text_goes_through_are_chosen_and_counted():
    bart = random_model("bart", decoder_layers=4)
    find_mlp(bart, 3)
    with pytest.raises(InputError, match="BartForCausalLM has no layer 4; --layer takes 0 to 3"):
        find_mlp(bart, 4)
    vision = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    vision.update(intermediate_size=80, image_size=28, patch_size=14)
    text = {name: SIZES[name] for name in SIZES if name not in ("ffn_dim", "pad_token_id")}
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config=vision,
        image_token_index=98,
        boi_token_index=97,
        eoi_token_index=96,
    )
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    names = {module: name for name, module in model.named_modules()}
    assert names[find_mlp(model, 1).maps[-1]] == "model.language_model.layers.1.mlp.down_proj"


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(InputError, match="is in training mode; call its eval"):
        find_mlp(random_model("gpt2").train(), 0)


class BlockLM(nn.Module):
    """A language model of one block, between 8 dimensions."""

    def __init__(self, block):
        super().__init__()
        self.embed = nn.Embedding(40, 8)
        self.layers = nn.ModuleList([block])
        self.device = torch.device("cpu")

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, use_cache):
        return types.SimpleNamespace(logits=self.layers[0](self.embed(input_ids)))


def found_in(block):
    return find_mlp(BlockLM(block).to(next(block.parameters()).dtype).eval(), 0)


def small_mlp(act=None):
    return nn.Sequential(nn.Linear(8, 20), act or nn.GELU(), nn.Linear(20, 8))


class Computed(nn.Module):
    """A block that computes y from x by a function of itself and x."""

    def __init__(self, compute, *modules):
        super().__init__()
        self.compute = compute
        self.parts = nn.ModuleList(modules)

    def forward(self, x):
        return self.compute(x, *self.parts)


def by_router(choose):
    """Two experts, each of the tokens for which choose(x, number) is True."""

    def compute(x, *experts):
        y = torch.zeros_like(x)
        for number, expert in enumerate(experts):
            chosen = choose(x, number)
            if chosen.any():
                y[chosen] = expert(x[chosen])
        return y

    return Computed(compute, small_mlp(), small_mlp())


class Stack(nn.Module):
    """Weights of one expert, as a stack."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, 8, 8))


def of_zeros(bias):
    mlp = small_mlp()
    mlp[2].weight.data.zero_()
    mlp[2].bias.data.fill_(bias)
    return mlp


REFUSED = {
    "an adapter beside the MLP": lambda: Computed(
        lambda x, mlp, adapter: mlp(x) + adapter(x),
        small_mlp(),
        nn.Sequential(nn.Linear(8, 3), nn.Dropout(), nn.Linear(3, 8)),
    ),
    "an adapter beside an MLP with a norm inside": lambda: Computed(
        lambda x, mlp, adapter: mlp(x) + adapter(x),
        small_mlp(nn.Sequential(nn.GELU(), nn.LayerNorm(20))),
        nn.Sequential(nn.Linear(8, 3), nn.Dropout(), nn.Linear(3, 8)),
    ),
    "two MLPs, summed": lambda: Computed(lambda x, f, g: f(x) + g(x), small_mlp(), small_mlp()),
    "experts that see a part of the tokens": lambda: by_router(lambda x, n: (x[..., 0] > 0) == n),
    "an expert that sees none of these": lambda: by_router(lambda x, n: (x[..., 0] > -9) == n),
    "a stack of experts' weights beside an MLP": lambda: Computed(
        lambda x, mlp, stack: mlp(x) + x @ stack.weight[0], small_mlp(), Stack()
    ),
    "a clamp above": lambda: Computed(
        lambda x, up, down: down(F.silu(up(x)).clamp(max=7)), *list(small_mlp())[::2]
    ),
    "a clamp inside": lambda: nn.Sequential(
        nn.Linear(8, 20), nn.GELU(), nn.Hardtanh(-7, 7), nn.Linear(20, 8)
    ),
    "zeros": lambda: of_zeros(0.0),
    "the same y for all tokens": lambda: of_zeros(1.0),
    "the same maps twice": lambda: Computed(lambda x, mlp: mlp(F.normalize(mlp(x))), small_mlp()),
    "a norm between": lambda: small_mlp(nn.LayerNorm(20)),
    "one map": lambda: nn.Linear(8, 8),
    "no causal block": lambda: Computed(
        lambda x, mlp: mlp(x + x.mean(1, keepdim=True)), small_mlp()
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_block_in_which_not_exactly_one_mlp_fits_is_refused(name):
    torch.manual_seed(0)
    with pytest.raises(InputError, match="expected exactly one dense MLP|not causal"):
        found_in(REFUSED[name]())


@pytest.mark.parametrize("name", jsae.ACT_GRADS)
def test_a_known_activation_that_is_no_module_is_found_by_its_values(name):
    torch.manual_seed(0)
    maps = nn.Linear(8, 20, bias=False), nn.Linear(20, 8)
    maps[0].weight.data *= 0.05

    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = maps

        def forward(self, x):
            return self.down(name(self.up(x)))

    assert found_in(Functional()).act is name


@pytest.mark.parametrize(
    "name", ["gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "quick_gelu", "gelu_10"]
)
def test_the_activation_is_told_apart_even_where_small_weights_hide_it(name):
    mlp = find_mlp(random_model("gpt_neox", hidden_act=name, initializer_range=1e-3), 0)
    z = torch.linspace(-50, 50, 999)
    torch.testing.assert_close(mlp.act(z), ACT2FN[name](z), rtol=1e-6, atol=1e-5)


def test_odd_modules_do_not_hide_the_mlp():
    """A gate that is fused, reversed and oddly named; a picky neighbour; a map of other rows."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 20, bias=False), nn.Linear(10, 8)
            self.phi = nn.Tanh()

        def forward(self, x):
            up, gate = self.a(x).chunk(2, dim=-1)
            return self.b(up * self.phi(gate))

    class Picky(nn.Module):
        def forward(self, x):
            assert x.shape[-1] == 8
            return x

    torch.manual_seed(0)
    odd = Odd()
    block = Computed(
        lambda x, odd, picky, first: x + odd(picky(x)) + first(x[:, :1]),
        *(odd, Picky(), nn.Linear(8, 8)),
    )
    mlp, x = found_in(block), normal(7, 8).float()
    torch.testing.assert_close(mlp(x), odd(x))


def test_a_token_of_huge_norm_hides_no_activation():
    torch.manual_seed(0)
    block = Computed(
        lambda x, mlp: mlp.get_submodule("2")(
            F.gelu(mlp.get_submodule("0")(x), approximate="tanh")
        ),
        small_mlp(nn.Identity()),
    )
    model = BlockLM(block).eval()
    model.embed.weight.data[3] *= 3000
    assert find_mlp(model, 0).act is jsae.tanh_gelu
    x = model.embed.weight[:24].detach()
    y = block(x).detach()
    wrong = MLP(
        block.parts[0][0].weight,
        block.parts[0][0].bias,
        block.parts[0][2].weight,
        block.parts[0][2].bias,
    )
    error = (wrong(x) - y).norm() / y.norm()
    assert error < jsae.TOLERANCE[torch.float32]  # of all tokens together
    assert not jsae.is_reproduced(wrong, x, y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, DOUBLE])
def test_an_mlp_of_another_dtype_is_found_within_its_tolerance(dtype):
    torch.manual_seed(0)
    mlp = found_in(small_mlp(nn.SiLU()).to(dtype))
    assert mlp.act is F.silu
    assert mlp.W_in.dtype == (DOUBLE if dtype == DOUBLE else torch.float32)


# ---- 6. Settings, text, activations --------------------------------------------------------------


def test_the_default_folder_is_named_by_the_settings_that_differ_between_runs():
    assert Config().output_dir == "runs/pythia-70m-L3-R32-k32-lambda1-300M-seed0"
    control = Config(randomize_weights="paper", tokens=1_200_000, jacobian_coef=0.3, normalize=True)
    expected = "runs/pythia-70m-L3-R32-k32-lambda0.3-1.2M-seed0-normalize-paper"
    assert control.output_dir == expected


def test_values_are_checked_without_the_command_line_too():
    with pytest.raises(InputError, match="--dtype is 'float16'; expected auto, float32, bfloat16"):
        Config(dtype="float16")
    with pytest.raises(InputError, match="--tokens is 1.5; expected int, 1 or more"):
        Config(tokens=1.5)
    with pytest.raises(InputError, match="--lr is nan; expected float, 1e-09 or more"):
        Config(lr=math.nan)


def test_without_a_model_the_demo_settings_stand_in_and_flags_win(monkeypatch):
    given = []

    def note(config):
        given.append(config)
        raise InputError("noted")

    monkeypatch.setattr(jsae, "train", note)
    assert jsae.main(["--k", "5", "--jacobian-coef", "0"]) == 2
    for name, value in {**jsae.DEMO, "k": 5, "jacobian_coef": 0.0}.items():
        assert getattr(given[0], name) == value
    assert jsae.main(["--model", "EleutherAI/pythia-70m", "--normalize"]) == 2
    assert given[1] == Config(normalize=True)


def test_help_shows_every_setting_with_its_default_and_nothing_twice(capsys):
    assert jsae.main(["--help"]) == 0
    out = capsys.readouterr().out
    for field in dataclasses.fields(Config):
        assert out.count(f"    {field.name}: {field.type.__name__} = ") == 1
    assert "300_000_000  # rounded down to whole batches" in out
    assert "__post_init__" not in out


def test_an_existing_name_becomes_absolute_and_no_link_is_resolved(tmp_path, monkeypatch):
    (tmp_path / "blob").write_text("x")
    (tmp_path / "data.txt").symlink_to(tmp_path / "blob")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("data.txt", "~/data.txt"):
        assert Config(dataset=name).dataset == str(tmp_path / "data.txt")
    assert Config(model="gone/model").model == "gone/model"
    (tmp_path / "stdlib").write_text("not this one")
    assert Config(dataset="stdlib").dataset == "stdlib"


def changed(config, **settings):
    return dataclasses.replace(config, **settings)


def write_tiny_model(folder, tokenizer=True, **settings):
    """A random one-layer GPT-NeoX of the bundled vocabulary, with its tokenizer."""
    sizes = {
        "vocab_size": 2560,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(**{**sizes, **settings})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    if tokenizer:
        transformers.AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def numbered_text(i):
    return f"Document {i}: " + " ".join(map(str, range(i, i + 60)))


def is_held_out(text):
    return zlib.crc32(text.encode()) % 20 == 0


def write_rows(path, contents, column="text"):
    path.write_text("".join(json.dumps({column: content}) + "\n" for content in contents))
    return path


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    return write_rows(
        tmp_path_factory.mktemp("text") / "docs.jsonl", map(numbered_text, range(400))
    )


def small_config(model_dir, text_file, output_dir, **settings):
    small = {
        "model": str(model_dir),
        "layer": 0,
        "dataset": str(text_file),
        "k": 4,
        "lr": 0.01,
        "tokens": 2000,
        "batch_size": 128,
        "expansion_factor": 4,
        "context_size": 32,
        "buffer_batches": 4,
        "output_dir": str(output_dir),
        "device": "cpu",
    }
    return Config(**{**small, **settings})


@pytest.fixture
def config(model_dir, text_file, tmp_path):
    return small_config(model_dir, text_file, tmp_path / "run")


TOKENIZER = transformers.AutoTokenizer.from_pretrained(TINY)
END = "<|endoftext|>"


def contexts_of(config, part="training", rank=0, world=1):
    return list(jsae.token_contexts(config, TOKENIZER, part, rank, world))


def text_of(contexts):
    """The contexts' text, without the first token of each."""
    return TOKENIZER.decode([number for context in contexts for number in context[1:]])


def documents_in(contexts):
    return {int(number) for number in re.findall("Document ([0-9]+):", text_of(contexts))}


def test_contexts_are_packed_documents_behind_bos(config):
    contexts = contexts_of(config)
    assert all(len(context) == 32 and context[0] == 0 for context in contexts)
    texts = [numbered_text(i) for i in range(400)]
    whole = "".join(text + END for text in texts if not is_held_out(text))
    text = text_of(contexts)
    assert whole.startswith(text)
    assert len(whole) - len(text) < 31 * 8  # only what is less than a context is left


def test_what_is_held_out_depends_on_its_own_content_alone(config, tmp_path):
    texts = [numbered_text(i) for i in range(400)]
    held_out = {i for i, text in enumerate(texts) if is_held_out(text)}
    assert len(held_out) > 10
    assert documents_in(contexts_of(config, "held out")) >= held_out - {max(held_out)}
    assert not documents_in(contexts_of(config)) & held_out
    more = write_rows(tmp_path / "more.jsonl", ["one row before all others", *texts, *texts])
    config = changed(config, dataset=str(more))
    assert documents_in(contexts_of(config, "held out")) == held_out
    assert not documents_in(contexts_of(config)) & held_out
    ids = [TOKENIZER(text).input_ids for text in texts]
    held = [one for one in ids if zlib.crc32(str(one).encode()) % 20 == 0]
    config = changed(config, dataset=str(write_rows(tmp_path / "ids.jsonl", ids)))
    flat = [number for context in contexts_of(config, "held out") for number in context[1:]]
    assert flat == [number for one in held for number in one][: len(flat)]


def test_long_documents_are_cut_into_pieces_that_are_held_out_one_by_one(config, tmp_path):
    text = "".join(f"{i:07d} " for i in range(100 * 2**11))  # 100 pieces of 2^14 characters
    (tmp_path / "long.txt").write_text(text)
    config = changed(config, dataset=str(tmp_path / "long.txt"))
    found = list(jsae.pieces(config))
    assert "".join(piece for piece, _ in found) == text
    assert {len(piece) for piece, _ in found} == {2**14}
    assert [held_out for _, held_out in found] == [is_held_out(piece) for piece, _ in found]
    assert 0 < sum(held_out for _, held_out in found) < 15


def test_stdlib_holds_out_by_path_what_the_bundled_model_was_not_trained_on():
    files = list(jsae.stdlib_files())
    root = Path(os.__file__).parent
    held_out = {text for text, is_out in files if is_out}
    assert 0.02 < len(held_out) / len(files) < 0.08
    for name in ("textwrap.py", "json/decoder.py", "_strptime.py"):
        assert ((root / name).read_text() in held_out) == is_held_out(name)
    assert (root / "textwrap.py").read_text() in {text for text, _ in files}
    assert len(files) < 3000  # nothing that pip installed


def written_data(kind, folder, texts):
    """The texts, written in one way or another, as a data set's name."""
    table = datasets.Dataset.from_dict({"text": texts})
    lines = "".join(json.dumps({"text": text, "n": 1}) + "\n" for text in texts).encode()
    if kind == "a folder of txt":
        for i, text in enumerate(texts):
            (folder / f"{i:03}.txt").write_text(text)
        (folder / ".hidden.txt").write_text("hidden")
        return folder
    if kind == "save_to_disk":
        table.save_to_disk(folder)
        return folder
    if kind == "splits saved to disk":
        datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(folder)
        return folder
    if kind == "parquet":
        table.to_parquet(folder / "train.parquet")
        table.select([0]).to_parquet(folder / "test.parquet")  # of another split
        return folder
    if kind == "part[1].jsonl":
        (folder / "part1.jsonl").write_text('{"text": "another file"}\n')
        (folder / kind).write_bytes(lines)
    if kind == "a.jsonl.zst":
        zstandard = pytest.importorskip("zstandard")
        (folder / kind).write_bytes(zstandard.compress(lines))
    if kind == "a.json.gz":
        (folder / kind).write_bytes(gzip.compress(lines))
    return folder / kind


@pytest.mark.parametrize(
    "kind",
    [
        "a folder of txt",
        "save_to_disk",
        "splits saved to disk",
        "parquet",
        "part[1].jsonl",
        "a.jsonl.zst",
        "a.json.gz",
    ],
)
def test_every_kind_of_local_data_gives_the_same_documents(kind, config, tmp_path):
    texts = [f"text number {i}\n" * 30 for i in range(60)]
    name = written_data(kind, tmp_path, texts)
    config = changed(config, dataset=str(name))
    assert [piece for piece, _ in jsae.pieces(config)] == texts
    if kind in ("parquet", "splits saved to disk"):
        config = changed(config, split="test")
        assert [piece for piece, _ in jsae.pieces(config)] == texts[:1]


def test_text_that_is_not_utf8_is_read_with_replacement_and_no_text_is_left_out(config, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 ")
    assert next(jsae.pieces(changed(config, dataset=str(tmp_path / "a.txt"))))[0] == "caf\ufffd "
    rows = write_rows(tmp_path / "rows.jsonl", ["one", None, "", "two"])
    assert [piece for piece, _ in jsae.pieces(changed(config, dataset=str(rows)))] == ["one", "two"]


def test_rows_of_ids_are_taken_as_they_are(config, tmp_path):
    packed = [[0, *range(100 * i + 1, 100 * i + 8)] for i in range(9)]  # as long as a context
    path = write_rows(tmp_path / "packed.jsonl", packed, "ids")
    ids = changed(config, dataset=str(path), column="ids", context_size=8)
    assert contexts_of(ids, "all") == packed
    write_rows(path, [[10, 11, 12], [13, 14], [15, 0, 16]] * 2, "ids")
    expected = [[0, 10, 11, 12, 13], [0, 14, 15, 0, 16], [0, 10, 11, 12, 13], [0, 14, 15, 0, 16]]
    assert contexts_of(changed(ids, context_size=5), "all") == expected


def test_two_processes_share_the_training_pieces(config):
    shares = [documents_in(contexts_of(config, "training", rank, 2)) for rank in (0, 1)]
    assert not shares[0] & shares[1]
    assert len(shares[0] | shares[1]) >= len(documents_in(contexts_of(config))) - 2
    assert abs(len(shares[0]) - len(shares[1])) <= 2


def test_local_data_needs_no_writable_cache(config):
    code = f"import jsae\nconfig = jsae.Config(dataset={config.dataset!r})\n"
    code += "print(len(list(jsae.pieces(config))))"
    assert run_python(code, HF_HOME="/dev/null/nowhere") == "400\n"


def loaded(config):
    model, tokenizer = jsae.load_model(config)
    return config, model, tokenizer, find_mlp(model, config.layer)


def test_batches_hold_each_mlp_input_once_and_no_first_token(config):
    config, model, tokenizer, mlp = loaded(
        changed(config, batch_size=31, tokens=8 * 31, buffer_batches=8)
    )
    batches = list(jsae.activation_batches(config, model, tokenizer, mlp))
    assert len(batches) == 8
    ids = torch.tensor(contexts_of(config)[:8])
    seen = []
    model.gpt_neox.layers[0].mlp.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    model(ids)
    expected = seen[0][:, 1:].flatten(0, 1)
    x = torch.cat(batches)
    assert not torch.equal(x, expected)  # shuffled
    order, other = x[:, 0].argsort(), expected[:, 0].argsort()
    torch.testing.assert_close(x[order], expected[other], rtol=1e-4, atol=1e-5)


def test_each_filling_has_an_order_of_its_own(config, monkeypatch):
    contexts = contexts_of(config)[:17]  # 4 batches of 128 from contexts of 31
    monkeypatch.setattr(jsae, "training_contexts", lambda *_: itertools.cycle(contexts))
    batches = list(jsae.activation_batches(*loaded(config)))
    one, other = torch.cat(batches[:4]), torch.cat(batches[4:8])
    assert not torch.equal(one, other)
    left_out = 17 * 31 - 4 * 128  # by each filling, others
    assert len(np.setdiff1d(one[:, 0].numpy(), other[:, 0].numpy())) <= left_out


@pytest.mark.parametrize("done", [1, 4, 6, 15])
def test_batches_go_on_from_any_number(done, config):
    run = loaded(config)
    whole = list(jsae.activation_batches(*run))
    rest = list(jsae.activation_batches(*run, done))
    assert len(whole) == 16  # whole fillings
    assert len(rest) == 16 - done
    assert all(torch.equal(one, other) for one, other in zip(rest, whole[done:]))


def test_mlp_inputs_leaves_the_forward_pass_at_the_mlp():
    model = random_model("llama")
    mlp = find_mlp(model, 0)
    later = []
    for module in (*mlp.maps, model.model.layers[1], model.lm_head):
        module.register_forward_hook(lambda *_: later.append(1))
    x = jsae.mlp_inputs(model, mlp, torch.ones(2, 5, dtype=torch.long))
    assert x.shape == (2, 5, 32)
    assert not later


def test_an_mlp_that_is_not_what_the_model_computes_is_refused_in_every_filling(config):
    run = loaded(config)
    batches = jsae.activation_batches(*run)
    next(batches)
    run[1].gpt_neox.layers[0].mlp.dense_4h_to_h.weight.data *= 1.001
    with pytest.raises(InputError, match="the model's MLP is not the one that was found"):
        list(batches)


def test_ids_that_the_model_does_not_know_are_refused_bos_included(config, tmp_path):
    path = write_rows(tmp_path / "ids.jsonl", [[5, 99999, 7]] * 2000, "ids")
    ids = changed(config, dataset=str(path), column="ids")
    with pytest.raises(InputError, match="token ids 0 to 99999; the model knows 0 to 2559"):
        jsae.train(ids)
    small = write_tiny_model(tmp_path / "small", vocab_size=2000)
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    tokenizer.add_special_tokens({"bos_token": "<begin>"})
    tokenizer.save_pretrained(small)
    write_rows(path, [[5, 6, 7]] * 2000, "ids")
    with pytest.raises(InputError, match="token ids 5 to 2560; the model knows 0 to 1999"):
        jsae.train(changed(ids, model=str(small)))


def test_the_next_filling_is_made_by_a_thread_while_one_is_used():
    threads = []

    def items():
        for i in range(3):
            threads.append(threading.current_thread() is threading.main_thread())
            yield i

    assert list(jsae.one_ahead(items())) == [0, 1, 2]
    assert threads == [False, False, False]


def test_text_that_ends_begins_again_with_a_notice(config, tmp_path, capfd):
    short = write_rows(tmp_path / "short.jsonl", map(numbered_text, range(4)))
    run = jsae.train(changed(config, dataset=str(short)))
    assert rows_of(run)[-1]["step"] == 15
    error = capfd.readouterr().err
    assert error.count("begins again after") == 1


def test_a_text_that_holds_nothing_out_says_so_before_training(config, tmp_path, capfd):
    few = write_rows(tmp_path / "few.jsonl", [numbered_text(0)] * 20)
    assert not is_held_out(numbered_text(0))
    jsae.train(changed(config, dataset=str(few), tokens=128))
    assert "too short to hold any out: evaluate on another --dataset" in capfd.readouterr().err


def test_the_longest_context_of_the_model_is_taken_and_what_it_refuses_is_one_line(config):
    for kind in ("gpt_neox", "gpt2", "ctrl", "mpt"):
        size = {
            "gpt2": {"n_positions": 64},
            "ctrl": {"n_positions": 64},
            "mpt": {"max_seq_len": 64},
        }
        model = random_model(kind, **size.get(kind, {}))
        fitted = jsae.fitted(config, model, find_mlp(model, 0))
        assert fitted.context_size == 32
        fitted = jsae.fitted(changed(config, context_size=999), model, find_mlp(model, 0))
        assert fitted.context_size == 64, kind
    with pytest.raises(InputError, match="GPT2LMHeadModel on contexts of 65 tokens: IndexError"):
        jsae.forward(random_model("gpt2", n_positions=64), torch.ones(1, 65, dtype=torch.long))


def test_a_batch_that_the_processes_cannot_divide_is_refused(config, monkeypatch):
    monkeypatch.setattr(jsae, "WORLD", 2)
    with pytest.raises(InputError, match="--batch-size 127 is not a multiple of 2 processes"):
        jsae.fitted(changed(config, batch_size=127), *loaded(config)[1::2])


def test_a_model_whose_weights_did_not_all_load_is_refused(config, tmp_path):
    folder = write_tiny_model(tmp_path / "model")
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    name = "gpt_neox.layers.0.mlp.dense_h_to_4h.weight"
    del weights[name]
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=f"1 weights are missing or of another size, as {name}"):
        jsae.load_model(changed(config, model=str(folder)))


def test_a_model_with_code_of_its_own_is_not_run(config, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    settings = {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"},
    }
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'was run')!r}, 'w')")
    code = f"import sys, jsae\nsys.exit(jsae.main(['--model', {str(folder)!r}]))"
    done = run_python(code, check=False, input="y\n")
    assert done.returncode == 2
    assert "[y/N]" not in done.stdout + done.stderr
    assert not (tmp_path / "was run").exists()


def test_a_revision_of_a_model_is_asked_for_by_its_name(config, monkeypatch, tmp_path):
    asked = []

    def note(name, **options):
        asked.append((name, options.get("revision"), options["trust_remote_code"]))
        raise OSError("no network")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", note)
    (tmp_path / "a@b").mkdir()
    for name in ("EleutherAI/pythia-70m@step1000", "EleutherAI/pythia-70m", str(tmp_path / "a@b")):
        with pytest.raises(InputError, match="no network"):
            jsae.load_model(changed(config, model=name))
    expected = [("EleutherAI/pythia-70m", "step1000"), ("EleutherAI/pythia-70m", None)]
    assert asked == [(*names, False) for names in [*expected, (str(tmp_path / "a@b"), None)]]


def test_the_language_model_is_loaded_from_safetensors_only(config, tmp_path):
    folder = write_tiny_model(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="--model .*safetensors"):
        jsae.load_model(changed(config, model=str(folder)))


def test_a_model_without_its_tokenizer_is_not_trained_on_nothing(config, tmp_path):
    folder = write_tiny_model(tmp_path / "model", tokenizer=False)
    with pytest.raises(InputError, match="--model"):
        jsae.train(changed(config, model=str(folder)))


@pytest.mark.parametrize("how", ["init", "shuffle", "paper"])
def test_random_controls_come_from_the_seed_and_change_what_they_say(how, config):
    trained, _ = jsae.load_model(config)
    control = changed(config, randomize_weights=how, seed=5)
    model, again = (jsae.load_model(control)[0] for _ in range(2))
    parameters = zip(trained.named_parameters(), model.parameters(), again.parameters())
    for (name, old), p, q in parameters:
        assert torch.equal(p, q), name
        if how == "paper" and p.ndim < 2:
            assert torch.equal(p, old), name
            continue
        if how == "paper":
            assert p.std().item() == pytest.approx(0.8 / 16**0.5, rel=0.2), name
        if how == "shuffle":
            assert torch.equal(p.flatten().sort().values, old.flatten().sort().values), name
        if old.unique().numel() > 1:  # norms and biases of this untrained model are constant
            assert not torch.equal(p, old), name


# ---- 7. Training ---------------------------------------------------------------------------------


def flags(config, **settings):
    """The settings in which config differs from the defaults, as flags."""
    given = []
    for name, value in vars(changed(config, **settings)).items():
        if value is True:
            given.append(jsae.flag(name))
        elif value != getattr(Config, name):
            given += [jsae.flag(name), str(value)]
    return given


def rows_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights_of(run):
    return [p for sae in jsae.load_run(run)[:2] for p in sae.parameters()]


def test_a_run_holds_what_the_design_says(config):
    run = jsae.train(config)
    names = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    folders = {f"sae_{s}/{f}" for s in "xy" for f in ("cfg.json", "sae_weights.safetensors")}
    assert names == {"config.json", "metrics.jsonl", *folders}
    saved = json.loads((run / "config.json").read_text())
    assert Config(**saved["config"]) == config
    assert (saved["penalty"], saved["processes"]) == ("l1", 1)
    assert (saved["scale_x"], saved["scale_y"]) == (1, 1)
    assert len(saved["mlp_sha256"]) == 64
    rows = rows_of(run)
    assert rows[-1]["step"] == 2000 // 128
    assert rows[-1]["tokens"] == 2000 // 128 * 128
    expected = "step tokens mse_x mse_y ev_x ev_y jacobian_l1 jacobian_above_0.01 dead_x dead_y lr"
    assert set(expected.split()) <= rows[-1].keys()
    sae_x, sae_y, loaded_config = jsae.load_run(run)
    assert loaded_config == config
    for sae in (sae_x, sae_y):
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64))


def test_training_lowers_the_loss_and_follows_the_schedules(config):
    rows = rows_of(jsae.train(changed(config, tokens=128 * 100)))
    few = changed(config, tokens=128 * 3, output_dir=config.output_dir + "-few")
    assert rows[1]["mse_x"] < 0.7 * rows_of(jsae.train(few))[-1]["mse_x"]
    assert [row["step"] for row in rows] == [50, 100]
    assert rows[0]["lr"] == config.lr
    assert math.isclose(rows[1]["lr"], config.lr / 20)
    assert rows[0]["coef"] == config.jacobian_coef  # the warm-up over 5 % is complete
    assert jsae.schedule(config, 2, 100)[1] == config.jacobian_coef * 2 / 5
    assert jsae.schedule(config, 2, 1000)[0] == config.lr * 2 / 10
    assert math.isclose(jsae.schedule(config, 90, 100)[0], config.lr * 11 / 20)


def token_ratio(J):
    """mean |J| / rms J of each token, up to a factor: the scale of J plays no part."""
    return F.normalize(J.flatten(1), dim=1).abs().mean(1)


def test_each_penalty_lowers_what_it_measures(config, tmp_path):
    last = {}
    cases = (("none", 1e-9, token_ratio), ("l1", 3, jsae.l1), ("ratio", 3, token_ratio))
    for name, coef, penalty in cases:
        folder = str(tmp_path / name)
        one = changed(config, jacobian_coef=coef, tokens=128 * 60, output_dir=folder)
        last[name] = rows_of(jsae.train(one, penalty))[-1]
    assert last["l1"]["jacobian_l1"] < 0.8 * last["none"]["jacobian_l1"]
    assert last["ratio"]["penalty"] < 0.9 * last["none"]["penalty"]
    assert json.loads((tmp_path / "ratio" / "config.json").read_text())["penalty"] == "token_ratio"


def test_measure_equals_the_parts_of_the_loss():
    pair, mlp, x = random_pair(b_enc=-0.8), random_mlp(), normal(300, 10)
    row = jsae.measure(*pair, mlp, x)
    parts = jsae_loss(*pair, mlp, x, 1.0)[1]
    for name, part in (("mse_x", "mse_x"), ("mse_y", "mse_y"), ("jacobian_l1", "penalty")):
        assert row[name] == pytest.approx(parts[part].item(), rel=1e-9)
    J = active_jacobian(*pair, mlp, x, pair[0].encode(x), pair[1].encode(mlp(x)))
    assert row["jacobian_above_0.01"] == pytest.approx((J.abs() > 0.01).sum().item() / 300)
    y = mlp(x)
    unexplained = (pair[1](y) - y).square().sum() / (y - y.mean(0)).square().sum()
    assert row["ev_y"] == pytest.approx(1 - unexplained.item(), rel=1e-9)


def test_a_latent_is_dead_after_ten_million_tokens_without_a_positive_value(config, monkeypatch):
    values = Latents(torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([[0, 1], [2, 1]]))
    real = jsae.jsae_loss

    def two_latents_fire(*args):
        loss, parts = real(*args)
        return loss, parts | {"s_x": values}

    monkeypatch.setattr(jsae, "jsae_loss", two_latents_fire)
    row = rows_of(jsae.train(config))[-1]
    assert row["dead_x"] == 62  # value 0 is not active
    monkeypatch.setattr(jsae, "measure", lambda *_: {"ev_x": 0, "ev_y": 0, "jacobian_l1": 0})
    pair = jsae.new_pair(config, 16)
    pair.last_fired[:] = 1280  # step 10 of a batch size of 128
    n_steps = 1 + 10_000_000 // 128
    config = changed(config, tokens=128 * (n_steps + 10))
    for step, dead in ((n_steps + 7, 0), (n_steps + 8, 62)):
        pair.step.fill_(step)
        pair.last_fired[0] = 1280
        adam = torch.optim.Adam(pair.parameters())
        x = torch.zeros(128, 16)
        folder = Path(config.output_dir)
        shorter = changed(config, tokens=128 * (step + 1))
        jsae.optimize(shorter, jsae.l1, random_mlp(d_model=16).float(), pair, adam, [x], folder)
        assert rows_of(folder)[-1]["dead_x"] == dead


def test_two_runs_are_bit_identical_and_seeds_differ(config, tmp_path):
    runs = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        runs.append(jsae.train(changed(config, output_dir=str(tmp_path / name), seed=seed)))
    a, b, c = map(weights_of, runs)
    assert all(map(torch.equal, a, b))
    assert not torch.equal(a[0], c[0])
    rows = [rows_of(run) for run in runs]
    assert rows[0] == rows[1] != rows[2]


def test_saved_saes_follow_the_saelens_format(config):
    run = jsae.train(config)
    x = normal(9, 16).float()
    for sae, name in zip(jsae.load_run(run), ("sae_x", "sae_y")):
        cfg = json.loads((run / name / "cfg.json").read_text())
        assert (cfg["architecture"], cfg["d_in"], cfg["d_sae"], cfg["k"]) == ("topk", 16, 64, 4)
        assert cfg["apply_b_dec_to_input"] is False
        assert cfg["dtype"] == "float32"
        assert cfg["metadata"]["sae_lens_version"] >= "6"
        t = safetensors.torch.load_file(run / name / "sae_weights.safetensors")
        values, idx = (x @ t["W_enc"] + t["b_enc"]).topk(4)
        dense = torch.zeros(9, 64).scatter(1, idx, F.relu(values))
        torch.testing.assert_close(dense @ t["W_dec"] + t["b_dec"], sae(x), rtol=1e-5, atol=1e-5)


def test_bfloat16_trains_to_about_the_same_loss_and_is_not_chosen_where_it_is_emulated(
    config, tmp_path, monkeypatch
):
    exact = rows_of(jsae.train(changed(config, tokens=128 * 40)))[-1]
    low = changed(config, tokens=128 * 40, dtype="bfloat16", output_dir=str(tmp_path / "low"))
    last = rows_of(jsae.train(low))[-1]
    assert last["mse_x"] == pytest.approx(exact["mse_x"], rel=0.05)
    assert last["mse_x"] != exact["mse_x"]
    asked = []

    def supported(including_emulation=True):
        asked.append(including_emulation)
        return including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    jsae.autocast(config, torch.device("cuda"))
    assert asked == [False]


def with_other_sizes(model_dir, folder, a, b):
    """The same language model but for its last layers: x is a times as large, y is b times."""
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
    layer = model.gpt_neox.layers[0]
    for parameter in layer.post_attention_layernorm.parameters():
        parameter.data *= a
    layer.mlp.dense_h_to_4h.weight.data /= a
    for parameter in layer.mlp.dense_4h_to_h.parameters():
        parameter.data *= b
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


def test_normalized_the_scales_of_x_and_y_play_no_part(config, model_dir, tmp_path, capfd):
    other = with_other_sizes(model_dir, tmp_path / "other", 5.0, 0.02)
    ids = torch.tensor(contexts_of(config, "held out"))
    found = {}
    for normalize in (True, False):
        for name, model in (("own", str(model_dir)), ("other", str(other))):
            folder = str(tmp_path / f"{name}-{normalize}")
            one = changed(config, model=model, normalize=normalize, output_dir=folder)
            run = jsae.train(one)
            model, _ = jsae.load_model(one)
            mlp = find_mlp(model, 0)
            sae_x, sae_y, _ = jsae.load_run(run)
            x = jsae.mlp_inputs(model, mlp, ids)[:, 1:].flatten(0, 1)
            s_x, s_y = sae_x.encode(x), sae_y.encode(mlp(x))
            J = active_jacobian(sae_x, sae_y, mlp, x, s_x, s_y)
            found[normalize, name] = rows_of(run)[-1], s_x, s_y, J.detach()

    own, same = found[True, "own"], found[True, "other"]
    assert same[0] == pytest.approx(own[0], rel=1e-3)
    for s, t in (own[1:3], same[1:3]), (own[2:3], same[2:3]):
        assert (s[0].idx.sort().values == t[0].idx.sort().values).float().mean() > 0.999
    assert (own[3].norm() / same[3].norm()).item() == pytest.approx(1, rel=1e-3)
    own, other = found[False, "own"], found[False, "other"]
    assert abs(own[0]["ev_y"] - other[0]["ev_y"]) > 0.05
    assert (own[1].idx != other[1].idx).any()
    error = capfd.readouterr().err
    assert (
        len(re.findall("x has a mean norm of .*, y of .*; --normalize|--normalize divides", error))
        >= 1
    )


def test_a_pair_that_is_folded_back_has_the_latents_and_the_jacobian_of_training():
    pair, mlp, x = random_pair(b_enc=-0.8), random_mlp(gated=True), normal(50, 10)
    scale_x, scale_y = 0.3, 7.0
    folded = TopKSAE(10, 30, 4).double(), TopKSAE(10, 30, 4).double()
    for sae, own, scale in zip(folded, pair, (scale_x, scale_y)):
        sae.load_state_dict(jsae.raw_tensors(own.state_dict(), scale))
    values = []
    scaled = mlp.scaled(scale_x, scale_y)
    for saes, f, v, sizes in (
        (pair, scaled, x / scale_x, (scale_x, scale_y)),
        (folded, mlp, x, (1, 1)),
    ):
        s_x, s_y = saes[0].encode(v), saes[1].encode(f(v))
        J = active_jacobian(*saes, f, v, s_x, s_y)
        values.append((*s_x, *s_y, sizes[0] * saes[0](v), sizes[1] * saes[1](f(v)), J))
    for one, other in zip(*values):
        assert_close(one, other, rtol=1e-12)


def test_the_scales_are_mean_norms_and_are_used_again_by_a_run_that_goes_on(config, monkeypatch):
    config = changed(config, normalize=True)
    run = loaded(config)
    mlp = run[3]
    first = torch.cat(list(jsae.activation_batches(*run))[: config.buffer_batches])
    expected = [v.norm(dim=1).mean().item() / 4 for v in (first, mlp(first))]  # sqrt(16)
    stop_at(9, signal.SIGTERM, config, monkeypatch)
    saved = json.loads((Path(config.output_dir) / "config.json").read_text())
    assert [saved["scale_x"], saved["scale_y"]] == pytest.approx(expected, rel=1e-5)
    monkeypatch.setattr(jsae, "scales_of", None)
    jsae.train(config)
    norms = [sae.W_dec.norm(dim=1).mean().item() for sae in jsae.load_run(config.output_dir)[:2]]
    assert norms == pytest.approx(expected, rel=1e-5)


@pytest.fixture(scope="session")
def finished(model_dir, text_file, tmp_path_factory):
    """A trained pair, to be read only."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    return jsae.train(small_config(model_dir, text_file, folder, tokens=20_000, buffer_batches=32))


@pytest.fixture
def run_copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copy")


# ---- 7. Training: runs that survive signals, kills, damage, full disks ----------------------------


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same_run(one, other):
    for name in ("sae_x", "sae_y"):
        file = Path(name) / "sae_weights.safetensors"
        assert (one / file).read_bytes() == (other / file).read_bytes()
    assert rows_of(one) == rows_of(other)
    assert not [*one.glob("checkpoint*"), *other.glob("checkpoint*"), *other.glob("*.lock")]


def whole_run(config, tmp_path):
    return jsae.train(changed(config, output_dir=str(tmp_path / "whole")))


def stop_at(step, number, config, monkeypatch):
    """Train by command; a signal comes in the given step. -> exit status."""
    real = jsae.jsae_loss
    calls = itertools.count(1)

    def loss(*args):
        if next(calls) == step:
            signal.raise_signal(number)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(jsae, "jsae_loss", loss)
        return jsae.main(flags(config))


@pytest.fixture(autouse=True)
def signal_handlers_kept():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    "step, number, status",
    [(1, signal.SIGINT, 130), (4, signal.SIGTERM, 143), (14, signal.SIGTERM, 143)],
)  # a filling has 4 batches; 15 steps in all
def test_a_stopped_run_goes_on_to_the_same_bits_and_is_loaded_from_its_checkpoint(
    step, number, status, config, tmp_path, monkeypatch, capsys
):
    config = changed(config, normalize=True)
    whole = whole_run(config, tmp_path)
    assert stop_at(step, number, config, monkeypatch) == status
    line = f"jsae.py: stopped after step {step}; the same command goes on from there"
    assert capsys.readouterr().err.strip().splitlines()[-1] == line
    run = Path(config.output_dir)
    saved = json.loads((run / "config.json").read_text())
    state = safetensors.torch.load_file(run / "checkpoint.safetensors")
    torch.testing.assert_close(
        jsae.load_run(run)[1].W_dec, state["sae_y.W_dec"] * saved["scale_y"], rtol=1e-6, atol=0
    )
    assert jsae.main(flags(config)) == 0
    assert f"going on after step {step}" in capsys.readouterr().err
    assert_same_run(whole, run)


def test_a_second_ctrl_c_does_not_wait():
    caught = "import signal, jsae\nwith jsae.noted_signals():\n"
    caught += "    for _ in range(2): signal.raise_signal(signal.SIGINT)\n"
    caught += "    print('waited')"
    done = run_python(caught, check=False)
    assert done.returncode == -signal.SIGINT
    assert done.stdout == ""


def test_stopped_while_the_first_text_is_read_nothing_is_written(config, monkeypatch, capsys):
    monkeypatch.setattr(jsae, "mlp_inputs", lambda *_: signal.raise_signal(signal.SIGINT))
    assert jsae.main(flags(config)) == 130
    assert capsys.readouterr().err.strip().splitlines()[-1] == "jsae.py: stopped"
    assert not Path(config.output_dir).exists()


def test_killed_at_any_moment_a_run_goes_on_to_the_same_bits(config, tmp_path):
    config = changed(config, tokens=128 * 60)
    program = "import sys, jsae\njsae.CHECKPOINT_SECONDS = 0\nsys.exit(jsae.main(sys.argv[1:]))"
    program = [sys.executable, "-c", program]
    options = {"env": os.environ | {"PYTHONPATH": str(jsae.HERE)}, "stderr": subprocess.DEVNULL}
    whole = tmp_path / "whole"
    subprocess.run([*program, *flags(config, output_dir=str(whole))], check=True, **options)
    command = [*program, *flags(config)]
    run = Path(config.output_dir)
    with subprocess.Popen(command, **options) as process:
        while not (run / "checkpoint.safetensors").exists() and process.poll() is None:
            time.sleep(0.02)
        time.sleep(random.random() / 2)
        process.kill()
    subprocess.run(command, check=True, timeout=120, **options)
    assert_same_run(whole, run)


@pytest.fixture
def stopped(config, monkeypatch):
    """The settings of a run that was stopped after step 9 of 15."""
    assert stop_at(9, signal.SIGTERM, config, monkeypatch) == 143
    return config


def test_two_equal_commands_at_once_make_one_run_and_one_line(config, tmp_path):
    command = [sys.executable, jsae.HERE / "jsae.py", *flags(config, tokens=128 * 200)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(2)]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert sorted(process.returncode for process in processes) == [0, 2]
    lines = [error.strip().splitlines()[-1] for error in errors]
    expected = f"jsae.py: error: another process is training in {config.output_dir}"
    assert lines.count(expected) == 1
    assert len(weights_of(Path(config.output_dir))) == 8


@pytest.mark.parametrize("cut", [100, 5000])
def test_a_checkpoint_that_was_cut_off_is_refused_and_left_as_it_is(cut, stopped, capsys):
    path = Path(stopped.output_dir) / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-cut])
    before = contents(Path(stopped.output_dir))
    assert "delete it to start anew" in refusal(flags(stopped), capsys)
    assert contents(Path(stopped.output_dir)) == before


def test_a_folder_of_another_run_is_refused_with_all_that_differs(stopped, monkeypatch, capsys):
    before = contents(Path(stopped.output_dir))
    line = refusal(flags(stopped, k=5, lr=0.02), capsys)
    assert "holds a run with k 4 (not 5), lr 0.01 (not 0.02); name another --output-dir" in line
    with pytest.raises(InputError, match=r"penalty 'l1' \(not 'squares'\)"):
        jsae.train(stopped, squares)
    real = jsae.load_model

    def other(config):
        model, tokenizer = real(config)
        model.gpt_neox.layers[0].mlp.dense_h_to_4h.weight += 1
        return model, tokenizer

    monkeypatch.setattr(jsae, "load_model", other)
    assert "holds a run with mlp_sha256" in refusal(flags(stopped), capsys)
    assert contents(Path(stopped.output_dir)) == before


def test_a_run_goes_on_on_another_device_and_in_a_folder_that_moved(stopped, tmp_path):
    whole = whole_run(stopped, tmp_path)
    with open(Path(stopped.output_dir) / "metrics.jsonl", "a") as file:
        file.write('{"step": 12}\n')  # of steps that the checkpoint does not hold
    moved = shutil.move(stopped.output_dir, tmp_path / "moved")
    assert_same_run(whole, jsae.train(changed(stopped, device="cpu:0", output_dir=str(moved))))


def test_before_the_first_checkpoint_a_run_starts_over(stopped, tmp_path):
    (Path(stopped.output_dir) / "checkpoint.safetensors").unlink()
    assert_same_run(whole_run(stopped, tmp_path), jsae.train(stopped))


def test_a_finished_run_prints_its_table_again_and_trains_nothing(config, monkeypatch, capsys):
    assert jsae.main(flags(config)) == 0
    out = capsys.readouterr().out
    for name in ("ev_x", "jacobian_above_0.01", "evaluate it with"):
        assert name in out
    run = Path(config.output_dir)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    monkeypatch.setattr(jsae, "jsae_loss", None)
    assert jsae.main(flags(config)) == 0
    again = capsys.readouterr()
    assert again.out == out
    assert f"rm -r {run} makes room for a new one" in again.err
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}


@pytest.mark.parametrize(
    "file", ["config.json", "metrics.jsonl", "checkpoint.safetensors", "cfg.json"]
)
def test_a_full_disk_stops_a_run_that_can_go_on(file, config, tmp_path, monkeypatch, capsys):
    whole = whole_run(config, tmp_path)
    real = jsae.write_file

    def full(path, data):
        if path.name == file:
            raise OSError(28, "No space left on device")
        real(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(jsae, "write_file", full)
        assert "No space left on device" in refusal(flags(config), capsys)
    assert_same_run(whole, jsae.train(config))


def test_a_run_whose_checkpoint_is_still_there_is_not_finished(config, tmp_path, monkeypatch):
    whole = whole_run(config, tmp_path)
    real = Path.unlink

    def fails(path, **options):
        if path.name == "checkpoint.safetensors":
            raise OSError("killed before it was gone")
        real(path, **options)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="killed"):
        patch.setattr(Path, "unlink", fails)
        jsae.train(config)
    assert not jsae.is_finished(Path(config.output_dir))
    assert_same_run(whole, jsae.train(config))


def test_processes_that_do_not_see_the_same_folder_are_refused(monkeypatch):
    monkeypatch.setattr(jsae, "WORLD", 2)
    others = torch.tensor([7, 1])
    monkeypatch.setattr(jsae.distributed, "all_reduce", lambda own: own.add_(others))
    jsae.check_agreement(7, True, "cpu")
    with pytest.raises(InputError, match="do not see the same --output-dir"):
        jsae.check_agreement(6, True, "cpu")


def test_checkpoints_come_after_their_seconds(config, monkeypatch):
    clock = itertools.count(0, 30)  # half a minute between two looks at it
    monkeypatch.setattr(jsae.time, "time", lambda: float(next(clock)))
    monkeypatch.setattr(jsae, "CHECKPOINT_SECONDS", 150)
    saved = []
    real = jsae.save_checkpoint

    def note(folder, pair, adam):
        saved.append(int(pair.step))
        real(folder, pair, adam)

    monkeypatch.setattr(jsae, "save_checkpoint", note)
    jsae.train(config)
    assert 2 <= len(saved) <= 8
    assert saved == sorted(set(saved))


def test_a_stream_that_breaks_stops_the_run_which_goes_on(config, tmp_path, monkeypatch, capsys):
    config = changed(config, dataset="hub/text", tokens=128 * 100)
    texts = [{"text": f"text {i}"} for i in range(5000)]

    def breaks(config):
        yield from texts[:2500]
        raise ConnectionError("the stream broke")

    monkeypatch.setattr(jsae, "load_rows", lambda config: iter(texts))
    monkeypatch.setattr(jsae, "CHECKPOINT_SECONDS", 0)
    whole = whole_run(config, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(jsae, "load_rows", breaks)
        assert "--dataset hub/text: the stream broke" in refusal(flags(config), capsys)
    assert (Path(config.output_dir) / "checkpoint.safetensors").exists()
    assert jsae.main(flags(config)) == 0
    assert_same_run(whole, Path(config.output_dir))


def test_numbers_that_break_stop_the_run_before_a_weight_changes(config, monkeypatch):
    real = jsae.jsae_loss
    weights = []

    def breaks(sae_x, sae_y, *args):
        weights.append(sae_x.W_dec.detach().clone())
        loss, parts = real(sae_x, sae_y, *args)
        if len(weights) == 5:
            loss = loss + sae_y.b_enc.sum() * math.inf
        return loss, parts

    monkeypatch.setattr(jsae, "jsae_loss", breaks)
    monkeypatch.setattr(jsae, "CHECKPOINT_SECONDS", 0)
    with pytest.raises(InputError, match="step 5: loss -inf, gradient of norm inf"):
        jsae.train(config)
    tensors = safetensors.torch.load_file(Path(config.output_dir) / "checkpoint.safetensors")
    assert tensors["step"] == 4
    assert torch.equal(tensors["sae_x.W_dec"], weights[4])
    assert all(t.isfinite().all() for t in tensors.values())


def test_nan_among_the_activations_stops_the_run(config, monkeypatch):
    real = jsae.mlp_inputs
    calls = itertools.count(1)

    def nan_in_the_second_filling(*args):
        return real(*args) * (math.nan if next(calls) == 2 else 1)

    monkeypatch.setattr(jsae, "mlp_inputs", nan_in_the_second_filling)
    with pytest.raises(InputError, match="NaN or Inf among the inputs x of layer 0's MLP"):
        jsae.train(config)


# ---- 7. Training: several processes ---------------------------------------------------------------

PROBE = """
import json, sys, torch, jsae
settings, path = json.loads(sys.argv[1]), sys.argv[2]
settings["output_dir"] += f"-{jsae.WORLD}"
config = jsae.Config(**settings)
x = torch.randn(config.batch_size, 16, generator=torch.Generator().manual_seed(3))
half = config.batch_size // jsae.WORLD
jsae.activation_batches = lambda *_: iter([x[jsae.RANK * half :][:half]] * 3)

def keep(parameters, limit):
    grads = {str(i): p.grad for i, p in enumerate(parameters)}
    jsae.safetensors.torch.save_file(grads, f"{path}-{jsae.WORLD}-{jsae.RANK}")
    if jsae.WORLD > 1:
        torch.distributed.destroy_process_group()
    sys.exit(0)

torch.nn.utils.clip_grad_norm_ = keep
jsae.train(config)
"""

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def torchrun(*command, **options):
    """The command in two processes on this machine; -> (status, stdout, stderr)."""
    done = subprocess.run(
        [*TORCHRUN, *command], capture_output=True, text=True, timeout=120, check=False, **options
    )
    return done.returncode, done.stdout, done.stderr


def test_gradients_of_two_halves_in_two_processes_equal_those_of_the_whole(config, tmp_path):
    (tmp_path / "probe.py").write_text(PROBE)
    settings = {**vars(config), "normalize": True}
    command = [tmp_path / "probe.py", json.dumps(settings), tmp_path / "grads"]
    environment = os.environ | {"PYTHONPATH": str(jsae.HERE)}
    subprocess.run([sys.executable, *command], check=True, timeout=120, env=environment)
    status, _, error = torchrun(*command, env=environment)
    assert status == 0, error
    files = [tmp_path / f"grads-{name}" for name in ("1-0", "2-0", "2-1")]
    whole, one, other = map(safetensors.torch.load_file, files)
    assert len(whole) == 8
    for name, expected in whole.items():
        assert torch.equal(one[name], other[name])
        torch.testing.assert_close(one[name], expected, rtol=1e-4, atol=1e-7)


def test_two_processes_train_stop_together_and_go_on(config, tmp_path):
    config = changed(config, tokens=128 * 220, buffer_batches=2)
    command = [jsae.HERE / "jsae.py", *flags(config)]
    whole = tmp_path / "whole"
    status, out, error = torchrun(*command, "--output-dir", whole)
    assert status == 0, error
    assert out.count("evaluate it with") == 1
    assert json.loads((whole / "config.json").read_text())["processes"] == 2

    run = Path(config.output_dir)
    metrics = run / "metrics.jsonl"
    with subprocess.Popen([*TORCHRUN, *command], stderr=subprocess.PIPE, text=True) as process:
        while not (metrics.exists() and metrics.read_text()):
            time.sleep(0.02)
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)  # torchrun passes it on
        error = process.communicate(timeout=100)[1]
    assert error.count("jsae.py: stopped after step") == 1, error
    assert not (run / "sae_x").exists()
    assert (run / "checkpoint.safetensors").exists()
    status, _, error = torchrun(*command)
    assert status == 0, error
    assert_same_run(whole, run)
    with pytest.raises(InputError, match=r"processes 2 \(not 1\)"):
        jsae.train(config)


# ---- 8. Command line, bad input, README ----------------------------------------------------------


def refusal(argv, capsys, program=jsae):
    """The line about bad input: status 2, nothing of a traceback or of argparse's usage."""
    assert program.main([str(word) for word in argv]) == 2
    error = capsys.readouterr().err.strip()
    assert "Traceback" not in error
    assert "usage:" not in error
    line = error.splitlines()[-1]
    assert line.startswith(f"{program.__name__}.py: error:")
    return line


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize(
    "name, value, says",
    [
        ("model", "no-such-folder-or-model", "no-such-folder-or-model"),
        ("dataset", "no/such-data-set", "no/such-data-set"),
        ("dataset", "no-such-file.txt", "no-such-file.txt"),
        ("column", "body", "no column body among ['text']; name one by --column"),
        ("split", "test", "test"),
        ("layer", -1, "--layer is -1; expected int, 0 or more"),
        ("layer", 1, "--layer takes 0 to 0"),
        ("k", 65, "--k is 65; expected at most 64, the number of latents"),
        ("k", "many", "invalid int value: 'many'"),
        ("tokens", 100, "--tokens 100: less than --batch-size 128"),
        ("context_size", 1, "--context-size is 1; expected int, 2 or more"),
        ("lr", "nan", "--lr is nan"),
        ("jacobian_coef", "inf", "--jacobian-coef is inf"),
        ("dtype", "float16", "--dtype is 'float16'; expected auto, float32, bfloat16"),
        ("device", "tpu", "tpu"),
        ("device", "cuda:99", "cuda:99"),
        ("jacobian_penalty", "l1", "unrecognized arguments: --jacobian-penalty l1"),
    ],
)
def test_a_bad_setting_gets_one_line_and_writes_nothing(name, value, says, config, capsys):
    line = refusal([*flags(config), jsae.flag(name), value], capsys)
    assert says in line
    assert not Path(config.output_dir).exists()


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("empty.txt", b"", "empty.txt"),
        ("short.txt", b"only a few words", "does not fill one context"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": ', "broken.jsonl"),
        ("number.jsonl", b'{"text": 5}\n', "column text holds 5; expected text or a list of token"),
        ("list.jsonl", b'{"text": ["a"]}\n', "column text holds ['a']; expected text or a list"),
        ("dict.jsonl", b'{"text": {"a": 1}}\n', "column text holds {'a': 1}; expected text or"),
        ("below.jsonl", b'{"text": [5, -1]}\n' * 999, "token ids -1 to 5; the model knows 0 to"),
        ("broken.parquet", b"PAR1 is not enough", "broken.parquet"),
        ("broken.jsonl.zst", b"not compressed", "broken.jsonl.zst"),
        ("picture.png", b"", "picture.png"),
    ],
)
def test_bad_text_gets_one_line_and_writes_nothing(name, content, says, config, tmp_path, capsys):
    (tmp_path / name).write_bytes(content)
    line = refusal([*flags(config), "--dataset", tmp_path / name], capsys)
    assert says in line
    assert not Path(config.output_dir).exists()


def test_a_folder_that_holds_something_else_is_left_alone(config, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    line = refusal(flags(config, output_dir=str(tmp_path / "file")), capsys)
    assert "File exists" in line
    line = refusal(flags(config, output_dir=str(tmp_path)), capsys)
    assert "holds no run, but file; name another --output-dir" in line
    (tmp_path / "config.json").write_text("{}")
    assert "config.json is of no run" in refusal(flags(config, output_dir=str(tmp_path)), capsys)
    assert contents(tmp_path) == {tmp_path / "file": b"mine", tmp_path / "config.json": b"{}"}


def test_what_is_not_a_run_is_not_loaded_and_a_run_on_the_hub_is(finished, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="is not a run that can be loaded"):
        jsae.load_run(tmp_path)
    asked = []

    def download(repo_id, allow_patterns):
        asked.append((repo_id, allow_patterns))
        return str(finished)

    monkeypatch.setattr(jsae, "snapshot_download", download)
    sae_x, _, _ = jsae.load_run("someone/some-pair")
    assert torch.equal(sae_x.W_dec, weights_of(finished)[0])
    assert asked == [("someone/some-pair", ["config.json", "sae_x/*", "sae_y/*"])]


def run_python(code, check=True, folder=jsae.HERE, **options):
    """Run code in a process of its own -> what it printed, or the whole result if not check."""
    environment = {name: options.pop(name) for name in list(options) if name.isupper()}
    environment = os.environ | {"PYTHONPATH": str(jsae.HERE)} | environment
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **options,
    )
    if check:
        assert done.returncode == 0, done.stderr
        return done.stdout
    return done


def test_jsae_alone_is_a_program_when_it_is_copied(config, tmp_path):
    shutil.copy(jsae.HERE / "jsae.py", tmp_path)

    def run(*args):
        command = [sys.executable, tmp_path / "jsae.py", *args]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    done = run()
    assert done.returncode == 2
    assert "--model EleutherAI/pythia-70m --layer 3" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    done = run(*flags(config, output_dir="a folder"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"python {tmp_path}/evaluate.py 'a folder'\n")  # to be pasted
    assert len(weights_of(tmp_path / "a folder")) == 8


def snippet(word):
    """The one piece of Python in README.md in which the word stands."""
    pieces = (jsae.HERE / "README.md").read_text().split("```python\n")[1:]
    (found,) = [piece.split("```")[0] for piece in pieces if word in piece.split("```")[0]]
    return found


def run_snippet(code, folder, monkeypatch):
    """-> the names that the code defines, run where the README is read."""
    monkeypatch.chdir(jsae.HERE)
    (folder / "snippet.py").write_text(code)
    return module_from_file(folder / "snippet.py")


def test_the_readmes_snippet_of_the_loss_and_of_the_penalty_runs(tmp_path, monkeypatch):
    names = run_snippet(snippet("parts = jsae_loss"), tmp_path, monkeypatch)
    assert names.sae_x.W_dec.grad.any()
    assert names.J.shape == (64, 16, 16)
    torch.testing.assert_close(names.penalty, names.J.abs().mean())


def test_a_penalty_of_ones_own_trains(config):
    def row_sparsity(J):
        return jsae.F.normalize(J, dim=2).abs().mean((1, 2))

    folder = jsae.train(changed(config, tokens=4096), penalty=row_sparsity)
    saved = json.loads((folder / "config.json").read_text())
    assert saved["penalty"] == "row_sparsity"
    *_, row = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    assert 0.25 <= row["penalty"] <= 0.5  # what it can be of rows of 4; mean |J| is far smaller


def test_the_readmes_snippet_of_a_trained_pair_prints_an_edge_for_each_token(
    run_copy, tmp_path, monkeypatch, capsys
):
    code = snippet("jsae.load_run")
    (name,) = re.findall('run = "(.*?)"', code)
    assert name == Config(**jsae.DEMO).output_dir
    run_snippet(code.replace(name, str(run_copy)), tmp_path, monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7  # tokens
    assert all(re.fullmatch(r"'.*' +\d+ -> +\d+ +-?[.\d]+", line) for line in lines)


def test_uv_installs_what_requirements_txt_names():
    source = (jsae.HERE / "jsae.py").read_text()
    block = re.search(r"(?m)^# /// script\n(.*?)^# ///$", source, re.DOTALL)[1]
    named = re.search(r"# dependencies = (.*)", block)[1]
    lines = (jsae.HERE / "requirements.txt").read_text().splitlines()
    packages = [line.split("#")[0].strip() for line in lines]
    for_tests_and_figures = ("pytest", "matplotlib")
    assert json.loads(named) == [name for name in packages if name not in for_tests_and_figures]


# ---- 9. Evaluation -------------------------------------------------------------------------------


SMALL = ["--tokens", "400", "--functions", "60"]


def options_of(**changed):
    return evaluate.Options(tokens=400, functions=60, **changed)


def edited(run, **changes):
    """The run's folder, its config.json changed: settings inside `config`, all else beside it."""
    description = json.loads((run / "config.json").read_text())
    description["config"] |= changes.pop("config", {})
    (run / "config.json").write_text(json.dumps(description | changes))
    return run


def random_run(n_documents=6, T=9, **settings):
    """A Run of a random pair in float64 and a random language model, ids and their documents."""
    config = transformers.GPTNeoXConfig(
        vocab_size=50,
        hidden_size=10,
        intermediate_size=14,
        num_hidden_layers=2,
        num_attention_heads=1,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    for p in model.parameters():  # so that biases are not 0 and the MLP matters
        p.data += 0.5 * torch.randn_like(p)
        p.requires_grad_(False)
    pair = random_pair(**settings)
    for sae in pair:
        sae.requires_grad_(False)
    run = evaluate.Run(*pair, find_mlp(model, 0), model, TOKENIZER, None, "all", {})
    ids = random_ids(n_documents, T)
    return run, ids, torch.arange(n_documents).view(-1, 1).expand_as(ids)


def all_tokens(run, ids, documents):
    (tokens,) = evaluate.batches(run, ids, documents)
    return tokens


def means_of(values, document=None):
    """{name: mean} of values of tokens."""
    means = evaluate.Means(9)
    n = len(next(iter(values.values())))
    means.add(torch.zeros(n, dtype=torch.long) if document is None else document, values)
    return {name: mean for name, (mean, _) in means.results().items()}


def test_oracle_ce_equals_transformers_own_loss():
    """x, y or the whole path replaced inside the model's own MLP, by another way than evaluate's."""
    run, ids, documents = random_run()
    module = run.model.gpt_neox.layers[0].mlp
    f = module.forward
    changes = {
        "clean": f,
        "x": lambda x: f(run.sae_x(x)),
        "y": lambda x: run.sae_y(f(x)),
        "path": lambda x: run.sae_y(f(run.sae_x(x))),
        "x_zero": lambda x: f(0 * x),
        "y_zero": lambda x: 0 * f(x),
    }
    labels = ids.clone()
    labels[:, :2] = -100  # no prediction is counted at the first token
    expected = {}
    for name, change in changes.items():

        def forward(x, change=change):
            return torch.cat([f(x[:, :1]), change(x[:, 1:])], 1)  # the first token is left alone

        module.forward = forward
        expected[f"ce.{name}"] = run.model(input_ids=ids, labels=labels).loss.item()
        expected[f"ce_lost.{name}"] = expected[f"ce.{name}"] - expected["ce.clean"]
    module.forward = f
    found = means_of(evaluate.losses(run, all_tokens(run, ids, documents)))
    assert found == pytest.approx(expected, abs=1e-6)  # their loss is in float32
    assert len({round(value, 3) for value in found.values()}) == 6 + 6


def test_the_ce_score_is_a_ratio_with_its_error_over_the_documents_of_the_targets():
    run, ids, _ = random_run()  # 6 contexts of 9 tokens
    documents = torch.tensor([0] * 15 + [1] * 20 + [2] * 19).view_as(ids)
    means = evaluate.Means(3)
    mean_x, mean_y = evaluate.mean_activations(run, ids)
    tokens = all_tokens(run, ids, documents)
    evaluate.add_measures(means, run, tokens, mean_x, mean_y, torch.Generator())
    torch.testing.assert_close(mean_y, tokens.y.mean(0).float())
    clean, path, zero = (means.sums[f"ce.{name}"] for name in ("clean", "path", "y_zero"))
    of_targets = documents[:, 2:].flatten()
    assert means.counts["ce.clean"].tolist() == torch.bincount(of_targets).tolist()
    gained, possible = zero - path, zero - clean
    r = gained.sum() / possible.sum()
    error = (3 / 2 * (gained - r * possible).square().sum()).sqrt() / possible.sum().abs()
    score = evaluate.ce_score(means, "path", "y_zero")
    assert score == (pytest.approx(r.item()), pytest.approx(error.item()))


def test_a_mean_and_its_error_over_documents_worked_by_hand():
    means = evaluate.Means(3)
    means.add(torch.tensor([0, 2, 0]), {"a": torch.tensor([1.0, 3.0, 1.0])})
    means.add(torch.tensor([2]), {"a": torch.tensor([5.0])})
    # sums 2 and 8 of two tokens each, r = 2.5: sqrt(2 / 1 * (9 + 9)) / 4
    assert means.results()["a"] == (2.5, pytest.approx(1.5))
    one = torch.tensor([3.0], dtype=DOUBLE)
    assert evaluate.ratio(one, 2 * one) == (0.5, None)
    assert evaluate.ratio(one, 0 * one) == (None, None)


def test_the_error_is_what_a_mean_varies_by_when_documents_are_drawn_anew():
    g = torch.Generator().manual_seed(0)
    found = []
    for _ in range(400):
        n = torch.randint(1, 50, (80,), generator=g).double()
        level = torch.randn(80, generator=g).double()  # tokens of a document are alike
        found.append(evaluate.ratio(n * (2 + level), n))
    values, errors = zip(*found)
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.1)


def test_explained_variance_is_that_of_all_tokens_at_once():
    sae, _ = random_pair()
    v = normal(60, 10) * torch.arange(60).view(-1, 1) + 5
    v[7] *= 100  # a token of huge norm
    document = torch.arange(60) // 10
    s = sae.encode(v)
    v_hat = sae.decode(s).detach()
    means = evaluate.Means(6)
    parts = []
    for part in torch.arange(60).split(25):
        own = Latents(s.acts[part].detach(), s.idx[part])
        parts.append(evaluate.reconstruction("x", v[part], v_hat[part], v.mean(0), own))
        means.add(document[part], parts[-1])
    errors = (v_hat - v).square().sum(1)
    squares = (v - v.mean(0)).square().sum(1)
    expected = evaluate.ratio(errors.view(6, 10).sum(1), squares.view(6, 10).sum(1))
    found = evaluate.explained_variance(means, "x")
    assert found == (pytest.approx(1 - expected[0]), pytest.approx(expected[1]))
    results = means.results()
    assert results["mse.x"][0] == pytest.approx((v_hat - v).square().mean().item())
    assert results["active.x"][0] == pytest.approx((s.acts > 0).sum().item() / 60)
    spread = evaluate.by_token("x", parts)
    share = squares.max() / squares.sum()  # 1 % of 60 tokens is one
    assert share > 0.8
    assert spread["variance_of_top_1_percent.x"] == pytest.approx(share.item())
    median = (1 - errors / squares).sort().values[29].item()
    assert spread["explained_variance_median.x"] == pytest.approx(median)


def test_measures_of_jacobians_worked_by_hand():
    J = torch.zeros(2, 2, 2, dtype=DOUBLE)
    J[0, 0, 1] = -5.0
    J[1] = torch.tensor([[0.3, -0.3], [0.3, 0.3]])
    found = means_of(evaluate.size(J) | evaluate.sparsity(J))
    assert found["mean_abs"] == pytest.approx(6.2 / 8)
    norms = [found[name] for name in ("l1", "l2", "l4", "linf")]
    assert norms == pytest.approx([6.2 / 2, 5.6 / 2, (5 + 0.3 * 2**0.5) / 2, 5.3 / 2])
    assert found["above.0.04"] == 5 / 2
    assert found["hold_90"] == 5 / 2
    held = [found[f"held_by.{n}"] for n in (1, 2, 4)]
    assert held == pytest.approx([(1 + 1 / 4) / 2, (1 + 2 / 4) / 2, 1])
    assert found["hoyer"] == pytest.approx(1 / 2)  # 1 for one element, 0 for four equal ones
    counts = evaluate.histogram(J).tolist()
    assert counts[0] == 3 and sum(counts[299:302]) == 4 and counts[-1] == 1


def test_effective_inputs_and_hub_worked_by_hand():
    J = torch.tensor([[[2.0, 0.0, 0.0], [1.0, -2.0, 0.0], [0.0, 0.0, 0.0]]])
    acts = torch.tensor([[1.0, 0.5, 9.0]])  # J s: (2, 0, 0), (1, -1, 0); the third has no input
    found = means_of(evaluate.effective_inputs("", J, acts))
    assert found == pytest.approx({"effective_inputs": (1 + 2) / 2, "hub": (1 + 1 / 2) / 2})
    each_its_own = means_of(evaluate.effective_inputs("", torch.eye(4)[None], torch.ones(1, 4)))
    assert each_its_own == pytest.approx({"effective_inputs": 1, "hub": 1 / 4})


def test_no_scale_changes_sparsity_and_no_rescaling_of_a_latent_effective_inputs():
    J, acts = normal(50, 5, 5), uniform(50, 5, seed=1)
    of_x, of_y = 10 * uniform(5, seed=2), 10 * uniform(5, seed=3)
    assert means_of(evaluate.sparsity(J / 99)) == pytest.approx(means_of(evaluate.sparsity(J)))
    before = means_of(evaluate.effective_inputs("", J, acts))
    rescaled = J * of_y.unsqueeze(1) / of_x  # s_x,j grows, its decoder row shrinks
    assert means_of(evaluate.effective_inputs("", rescaled, acts * of_x)) == pytest.approx(before)
    assert 1 < before["effective_inputs"] < 5


@pytest.mark.parametrize(
    "kind, v",
    [
        ("linear", lambda t: 3 - 2 * t),
        ("linear", lambda t: 0 * t),
        ("jumprelu", lambda t: (t > 2) * (1 + 2 * t)),
        ("jumprelu", lambda t: (t < 2) * (1 + 2 * t)),
        ("other", lambda t: t**2),
        ("other", lambda t: (t > 2) * t**2),
        ("other", lambda t: (t < 2) * (1 + t) + (t > 3) * (1 + t)),
        ("other", lambda t: (abs(t - 2) < 1) * (1 + t)),
        ("other", lambda t: 1.0 * (t == 5)),
    ],
)
def test_kinds_of_functions(kind, v):
    t = np.linspace(0, 5, 100)
    for scale in (1, 1e-6):
        assert evaluate.kind_of(t, scale * v(t), relative=True) == kind
    assert evaluate.kind_of(t, v(t), relative=False) == kind
    assert evaluate.kind_of(t, 1e-6 * v(t), relative=False) == "linear"  # as it is small


def test_functions_of_one_latent_start_at_the_true_x_with_the_slope_j(monkeypatch):
    run, ids, documents = random_run()
    tokens = all_tokens(run, ids, documents)
    real = evaluate.along_latent

    def noted(run, x, i, j, change):
        b = (tokens.x == x).all(1)
        s = tokens.s_x.acts[b][tokens.s_x.idx[b] == j][0].item()  # layer 0: of the token alone
        assert change[0].item() == pytest.approx(-s)  # the first point is at s_x,j = 0
        assert change[-2:].tolist() == [-1, 0]
        return real(run, x, i, j, change)

    monkeypatch.setattr(evaluate, "along_latent", noted)
    functions = evaluate.random_functions(run, tokens, 40, torch.Generator().manual_seed(0))
    assert len(functions) > 20
    assert all(f.t[0] == 0 and f.t[-1] >= 5 and len(f.t) == 100 for f in functions)
    assert np.median([f.J * f.delta for f in functions]) < 0  # 1 less of s_x,j changes s_y,i by -J
    monkeypatch.undo()
    step = torch.tensor([0, 1e-6], dtype=DOUBLE)
    for b, i, j in itertools.product((3, 30), range(4), range(4)):
        index = tokens.s_y.idx[b, i], tokens.s_x.idx[b, j]
        same, moved = evaluate.along_latent(run, tokens.x[b], *index, step)
        assert same == pytest.approx(tokens.s_y.acts[b, i].item())
        assert (moved - same).item() == pytest.approx(1e-6 * tokens.J[b, i, j].item(), rel=1e-3)


def test_linearity_worked_by_hand():
    J, delta = [0.5, 0.05, -2.0, 0.3], [-0.5, -3.0, 1.0, -0.35]
    functions = []
    for number, kind in enumerate(("linear", "other", "jumprelu", "linear")):
        functions.append(evaluate.Function(0, J[number], delta[number], kind, "other", [], []))
    found = means_of(evaluate.linearity(functions))
    assert (found["linear"], found["jumprelu"], found["other_relative"]) == (1 / 2, 1 / 4, 1)
    assert (found["on_line"], found["on_line_relative"]) == (1 / 2, 1 / 4)


def test_connections_are_means_over_the_tokens_where_latents_are_active():
    (sae_x, sae_y), mlp, x = random_pair(b_enc=-1.5), random_mlp(), normal(2000, 10)
    sae_y.b_enc.data -= 10  # so that ReLU cuts latents off on both sides
    connections = evaluate.Connections(30, [], 0, "cpu")
    dense = torch.zeros(2000, 30, 30, dtype=DOUBLE)
    values = torch.zeros(2000, 30, dtype=DOUBLE)
    active_x = torch.zeros(2000, 30, dtype=torch.bool)
    active_y = torch.zeros(2000, 30, dtype=torch.bool)
    with torch.no_grad():
        for part in torch.arange(2000).split(300):
            s_x, s_y = sae_x.encode(x[part]), sae_y.encode(mlp(x[part]))
            J = active_jacobian(sae_x, sae_y, mlp, x[part], s_x, s_y)
            connections.add(J.float(), Latents(s_x.acts.float(), s_x.idx), s_y)
            for n, b in enumerate(part.tolist()):
                dense[b][s_y.idx[n].unsqueeze(1), s_x.idx[n]] = J[n]
                active_x[b, s_x.idx[n][s_x.acts[n] > 0]] = True
                values[b, s_x.idx[n]] = s_x.acts[n]
                active_y[b, s_y.idx[n][s_y.acts[n] > 0]] = True
    assert active_x.sum() < 4 * 2000 and active_y.sum() < 4 * 2000

    mean = dense.abs().sum(0) / active_y.sum(0).clamp(min=1).unsqueeze(1)
    assert connections.shares_above()["global.0.01"] == (mean > 0.01).double().mean()
    n_both = active_y.double().T @ active_x.double()
    contribution = (dense * values.unsqueeze(1)).abs().sum(0)  # (outputs, inputs)
    order = contribution.amax(1).argsort(descending=True)[:8].tolist()
    assert connections.strongest() == order
    for latent in order:
        inputs = connections.strongest_inputs(latent)
        expected = contribution[latent].argsort(descending=True)[:8].tolist()
        assert [edge["latent"] for edge in inputs] == expected
        assert [edge["tokens"] for edge in inputs] == n_both[latent][expected].tolist()
        means = dense[:, latent].sum(0)[expected] / n_both[latent][expected]
        assert [edge["mean_J"] for edge in inputs] == pytest.approx(means.tolist(), rel=1e-3)
        shares = contribution[latent][expected] / contribution[latent].sum()
        assert [edge["share"] for edge in inputs] == pytest.approx(shares.tolist(), rel=1e-4)


def test_of_many_latents_connections_are_of_a_sample_and_of_those_asked_for():
    connections = evaluate.Connections(8192, [17, 5], 0, "cpu")
    assert connections.latents[:2] == [17, 5]
    assert 2048 <= len(set(connections.latents)) == len(connections.sum) <= 2050


def test_examples_are_texts_around_the_largest_values():
    acts = torch.zeros(3, 40, 2)
    acts[0, 30, 0], acts[1, 2, 0], acts[1, 39, 0] = 5.0, 9.0, 1.0
    s = Latents(acts.view(120, 2), torch.tensor([7, 8]).expand(120, 2))
    ids = torch.arange(3 * 41).view(3, 41)
    tokenizer = types.SimpleNamespace(decode=lambda ids: "".join(f" {n}" for n in ids))
    one, two = evaluate.examples_of(7, ids, s, tokenizer)
    assert one["tokens"] == [f" {n}" for n in range(42, 58)] and one["acts"][2] == 9
    assert two["tokens"] == [f" {n}" for n in range(21, 37)] and two["acts"][10] == 5
    assert evaluate.examples_of(8, ids, s, tokenizer) == []


def test_words_are_readable_in_any_script_and_with_any_tokenizer():
    text = "naïve 🙂🙂 日本 it"
    ids = torch.tensor(TOKENIZER(text).input_ids)
    words = evaluate.words_of(ids, TOKENIZER)
    assert len(words) == len(ids) > 12
    assert "".join(words) == text
    tokens = tokenizers.Tokenizer(tokenizers.models.WordLevel({"▁quick": 0, "▁fox": 1, "es": 2}))
    tokens.decoder = tokenizers.decoders.Metaspace()  # as Llama's, which drops the first space
    llama = transformers.PreTrainedTokenizerFast(tokenizer_object=tokens)
    assert evaluate.words_of(torch.tensor([0, 1, 2, 0]), llama) == ["quick", " fox", "es", " quick"]


def test_of_an_edge_the_different_tokens_are_counted():
    connections = evaluate.Connections(4, [], 0, "cpu")
    s = Latents(torch.ones(6, 1), torch.tensor([[1], [1], [1], [2], [1], [1]]))
    connections.add(torch.ones(6, 1, 1), s, s)
    ids = torch.tensor([[0, 5, 5, 6], [0, 7, 5, 5]])
    (latent,) = evaluate.latents_of(connections, [1], [(ids, s, s)], TOKENIZER)
    (edge,) = latent["inputs"]
    assert (edge["latent"], edge["tokens"], edge["different_tokens"]) == (1, 5, 2)


def test_documents_end_with_the_end_token_and_the_start_token_ends_nothing(monkeypatch, capfd):
    contexts = [[0, 5, 5, 0], [0, 7, 0, 8], [0, 8, 8, 8]]
    monkeypatch.setattr(jsae, "token_contexts", lambda *_: iter(contexts))
    config = types.SimpleNamespace(context_size=4, dataset="text")
    run = evaluate.Run(None, None, None, None, TOKENIZER, config, "all", {})
    ids, documents = evaluate.held_out_text(run, 9, seed=0)
    order = [contexts.index(context) for context in ids.tolist()]
    expected = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 2], [2, 2, 2, 2]])
    assert torch.equal(documents, expected[order])
    assert capfd.readouterr().err == ""
    assert len(evaluate.held_out_text(run, 100, seed=0)[0]) == 3
    assert "text (all) has only 9 tokens" in capfd.readouterr().err
    monkeypatch.setattr(jsae, "token_contexts", lambda *_: iter([]))
    with pytest.raises(InputError, match="text .all. does not fill one context; name another"):
        evaluate.held_out_text(run, 10, seed=0)


@pytest.mark.parametrize("more, n_read", [(0, 20), (60, 65)])  # contexts: 4 times 5, or 5 + 60
def test_contexts_are_drawn_from_more_held_out_text_by_the_seed(
    more, n_read, finished, monkeypatch
):
    run = evaluate.open_run(finished, options_of())
    monkeypatch.setattr(evaluate, "MORE_TOKENS", more * (run.config.context_size - 1))
    rows = contexts_of(run.config, "held out")
    drawn = []
    for seed in (0, 1):
        ids, documents = evaluate.held_out_text(run, 150, seed)
        drawn.append([rows.index(context) for context in ids.tolist()])
        assert len(set(drawn[-1])) == 5 and n_read / 2 < max(drawn[-1]) < n_read
        assert len(documents.unique()) > 2
    assert drawn[0] != drawn[1]


def test_the_text_is_what_the_run_held_out_or_the_one_that_is_named(finished, text_file):
    def found(**options):
        run = evaluate.open_run(finished, options_of(**options))
        return run.config.dataset, run.part, run.config.split, run.config.column

    assert found() == (str(text_file), "held out", "train", "text")
    named = {"dataset": "allenai/c4:en", "split": "validation", "column": "body"}
    assert found(**named) == ("allenai/c4:en", "all", "validation", "body")


def test_a_model_that_moved_with_the_clone_is_found_and_another_is_refused(
    run_copy, model_dir, tmp_path, monkeypatch
):
    edited(run_copy, config={"model": "/old/clone/assets/tiny"})
    with pytest.raises(InputError, match="--model /old/clone/assets/tiny"):
        evaluate.open_run(run_copy, options_of())
    assert evaluate.open_run(run_copy, options_of(model=str(model_dir)))
    shutil.copytree(model_dir, tmp_path / "assets" / "tiny")
    monkeypatch.setattr(jsae, "HERE", tmp_path)
    assert evaluate.open_run(run_copy, options_of()).config.model == str(tmp_path / "assets/tiny")
    with pytest.raises(InputError, match="is not the one that it was trained on"):
        evaluate.open_run(
            run_copy,
            options_of(
                model=str(
                    write_tiny_model(tmp_path / "b", hidden_act="relu", initializer_range=0.1)
                )
            ),
        )


def test_an_unfinished_run_is_evaluated_from_its_checkpoint_with_a_line(stopped, capsys):
    assert evaluate.main([stopped.output_dir, *SMALL]) == 0
    out, err = capsys.readouterr()
    assert "is not finished: what is evaluated is its last checkpoint" in err
    assert "explained variance" in out


@pytest.fixture(scope="session")
def evaluated(finished):
    """What evaluation.json of the finished run holds, as read from it."""
    return json.dumps({**evaluate.evaluate(finished, options_of()), "run": "runs/a"})


def variants(evaluated, *changes):
    """Copies of the result, each with some settings or numbers changed."""
    results = []
    for name, change in zip("abcdef", changes):
        result = json.loads(evaluated)
        result["run"] = f"runs/{name}"
        for key, value in change.items():
            place = "settings" if key in result["settings"] else "numbers"
            result[place][key] = value
        results.append(result)
    return results


def test_every_number_of_the_table_is_there_with_an_error(evaluated):
    result = json.loads(evaluated)
    for _, names, _ in evaluate.ROWS:
        for name in names:
            assert math.isfinite(result["numbers"][name]), name
            has_error = not re.match("silent|global|.*median|.*top_1", name)
            assert (result["errors"].get(name) is not None) == has_error, name
    assert sum(result["histogram"]) == 403 * 4 * 4
    assert result["numbers"].keys() >= {f"held_by.{2**n}" for n in range(5)}
    assert len(result["pictures"]) == 3
    assert all(latent["examples"] and latent["inputs"] for latent in result["latents"])


def test_the_number_of_tokens_at_a_time_changes_no_mean(finished, evaluated, monkeypatch):
    monkeypatch.setattr(evaluate, "TOKENS_AT_A_TIME", 1)  # a context at a time
    one, other = evaluate.evaluate(finished, options_of()), json.loads(evaluated)
    drawn = {*evaluate.linearity([]), "effective_inputs_random", "hub_random"}
    for name in set(one["numbers"]) - drawn:
        assert one["numbers"][name] == pytest.approx(other["numbers"][name], rel=1e-4), name
    shown = [[latent["latent"] for latent in result["latents"]] for result in (one, other)]
    assert shown[0] == shown[1]


def set_weights(run, change):
    """Change the saved tensors of both SAEs: change(tensors) works in place."""
    for name in ("sae_x", "sae_y"):
        path = run / name / "sae_weights.safetensors"
        tensors = safetensors.torch.load_file(path)
        change(tensors)
        safetensors.torch.save_file(tensors, path)


def test_a_pair_without_any_active_latent_is_evaluated_as_far_as_it_is_defined(run_copy):
    set_weights(run_copy, lambda tensors: tensors["b_enc"].fill_(-1e6))
    assert evaluate.main([str(run_copy), *SMALL, "--latents", "5"]) == 0
    result = json.loads((run_copy / "evaluation.json").read_text())
    numbers = result["numbers"]
    assert numbers["silent.x"] == 64 and numbers["mean_abs"] == 0
    assert math.isfinite(numbers["ce_score.path"])
    assert numbers["hoyer"] is None and numbers["effective_inputs"] is None
    assert result["latents"] == [{"latent": 5, "examples": [], "inputs": []}]


def test_the_program_writes_numbers_figures_and_a_report(run_copy, finished, tmp_path, capsys):
    second = shutil.copytree(finished, tmp_path / "second")
    edited(second, config={"jacobian_coef": 0.0})
    set_weights(second, lambda tensors: tensors["W_enc"].mul_(0.5))
    assert evaluate.main([str(run_copy), str(second), *SMALL]) == 0
    out = capsys.readouterr().out
    saved = json.loads((run_copy / "evaluation.json").read_text())
    hold = f"{saved['numbers']['hold_90']:.4g} +- {saved['errors']['hold_90']:.2g}"
    lines = out.splitlines()
    assert re.fullmatch(" +traditional SAEs +JSAE, lambda 1", lines[0])
    assert [line.split("  ")[0] for line in lines[1:8]] == [row[0] for row in evaluate.ROWS[:7]]
    assert lines[5].endswith(hold) and lines[5].index(hold) == lines[0].index("JSAE")
    assert "Hoyer" not in out
    figures = {path.stem for path in (run_copy / "figures").glob("*.png")}
    assert figures == {"first_look", "trade_off", "functions"}
    page = (run_copy / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)', page)
    assert len(sources) == 3 and all(source.startswith("data:") for source in sources)
    assert "<script" not in page
    assert page.count("<details") == page.count("</details>") > 6
    assert page.index("An output latent of JSAE, lambda 1") < page.index("<table>")
    assert page.count("<details open>") > 1
    before = (second / "evaluation.json").read_bytes()
    folder = tmp_path / "together"
    flags = ["--reuse", "--all", "--output-dir", str(folder)]
    assert evaluate.main([str(second), str(run_copy), str(second), *flags]) == 0
    assert (second / "evaluation.json").read_bytes() == before
    assert "Hoyer sparsity of J" in capsys.readouterr().out
    assert (folder / "report.html").exists() and not (second / "report.html").exists()


def test_runs_that_differ_in_the_seed_only_are_one_column(evaluated):
    results = variants(
        evaluated,
        {"seed": 7, "output_dir": "elsewhere", "hoyer": 0.25},
        {"hoyer": 0.35},
        {"jacobian_coef": 0.5, "hoyer": 0.5},
    )
    groups = evaluate.grouped(results)
    assert list(groups) == ["JSAE, lambda 0.5", "JSAE, lambda 1"]
    assert [result["run"] for result in groups["JSAE, lambda 1"]] == ["runs/a", "runs/b"]
    cells = {row[0]: row[1:] for row in evaluate.table_of(groups)}
    error = results[2]["errors"]["hoyer"]
    assert cells["Hoyer sparsity of J"] == [f"0.5 ± {error:.2g}", "0.3 ± 0.071"]
    own = variants(evaluated, {"penalty": "mine"}, {"jacobian_coef": 0.0})
    assert list(evaluate.grouped(own)) == ["traditional SAEs", "JSAE, lambda 1 of mine"]


@pytest.mark.parametrize("name", ["k", "evaluated on", "dataset"])
def test_runs_that_were_trained_or_evaluated_otherwise_are_not_merged(name, evaluated):
    one, other = evaluate.grouped(variants(evaluated, {"seed": 7}, {name: "another"}))
    assert one != other == f"JSAE, lambda 1, {name} another"


def test_text_is_escaped_in_the_report():
    example = {"tokens": ["<b>", "&"], "acts": [1.0, 2.0]}
    page = evaluate.details("head", [example])
    assert "<b>" not in page and "&lt;b&gt;" in page and "--share:0.50" in page and "&amp;" in page


def test_figures_are_drawn_from_one_run_two_kinds_and_several_seeds_with_any_text(evaluated):
    one = variants(evaluated, {})
    kinds = variants(evaluated, {"seed": 1}, {"seed": 2}, {"jacobian_coef": 0.0})
    odd = "🙂 日本 \ufffd <b> $\\frac{$"  # which is no mathematics, and would end in an error
    for results, names in (
        (one, ["first_look", "functions"]),
        (kinds, ["first_look", "functions", "trade_off"]),
    ):
        for result in results:
            for picture in result["pictures"]:
                picture["text"] = odd
            result["settings"]["model"] = odd  # in no label, as it is the same in all
        figures = evaluate.draw(evaluate.grouped(results))
        assert list(figures) == names
        for png in figures.values():
            width = int.from_bytes(png[16:20], "big")
            assert png.startswith(b"\x89PNG") and width >= 1200


def test_the_first_look_draws_what_no_scale_of_j_changes(evaluated, monkeypatch):
    drawn = []
    one, other = variants(evaluated, {}, {"jacobian_coef": 0.0})
    for picture in other["pictures"]:
        picture["J"] = (1000 * np.array(picture["J"])).tolist()
    figure = evaluate.draw_first_look(evaluate.grouped([one, other]))
    images = [image for ax in figure.subfigs[0].axes for image in ax.get_images()]
    drawn = [image.get_array() for image in images]
    assert len(drawn) == 6
    for n in range(3):
        np.testing.assert_allclose(drawn[n], drawn[n + 3])
        assert drawn[n].sum() == pytest.approx(1)
        held = np.sort(drawn[n], axis=None)[::-1].cumsum()
        expected = f"{(held < 0.9 * held[-1]).sum() + 1} of 16 hold 90 %"
        assert images[n].axes.get_xlabel() == expected
    assert len({image.get_clim() for image in images}) == 1


def test_one_run_ends_with_the_command_of_its_comparison_which_trains_it(
    config, tmp_path, monkeypatch, capsys
):
    run = jsae.train(changed(config, normalize=True))
    assert evaluate.main([str(run), *SMALL]) == 0
    command = capsys.readouterr().out.strip().splitlines()[-1].strip()
    train, show = command.split(" && ")
    words = shlex.split(train)
    assert words[:2] == ["python", "jsae.py"]
    assert jsae.main(words[2:]) == 0
    _, _, beside = jsae.load_run(str(run) + "-lambda0")
    expected = changed(config, normalize=True, jacobian_coef=0.0, output_dir=beside.output_dir)
    assert beside == expected
    assert evaluate.main([*shlex.split(show)[2:], *SMALL]) == 0
    assert "traditional SAEs" in capsys.readouterr().out
    demo = Config(**jsae.DEMO, output_dir="")
    command = evaluate.commands_of_comparison("runs/x", vars(demo), evaluate.Options(seed=3))
    assert command.startswith("python jsae.py --jacobian-coef 0.0 && python evaluate.py runs/x ")


def test_a_run_where_none_can_write_is_evaluated_elsewhere(run_copy, tmp_path, monkeypatch, capsys):
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != run_copy and real(path, mode))
    before = contents(run_copy)
    assert evaluate.main([str(run_copy), *SMALL, "--output-dir", str(tmp_path / "out")]) == 0
    assert contents(run_copy) == before
    assert (tmp_path / "out" / "report.html").exists()
    assert list((tmp_path / "out").glob("*/evaluation.json"))


def test_an_ascii_terminal_and_another_vocabulary_are_survived(run_copy):
    code = (
        f"import sys, evaluate\nsys.exit(evaluate.main([{str(run_copy)!r}, *{SMALL!r}, '--all']))"
    )
    done = run_python(code, check=False, PYTHONIOENCODING="ascii", LC_ALL="C")
    assert done.returncode == 0, done.stderr
    assert " +- " in done.stdout
    assert "near to guessing: is this the text" in done.stderr  # the tiny model is a random one


BAD_EVALUATIONS = [  # flags, what the line must say
    (["--tokens", "0"], "--tokens is 0; expected int, 1 or more"),
    (["--latents", "64"], "--latents is '64'; expected some of 0 to 63, as 17,5"),
    (["--latents", "five"], "--latents is 'five'; expected some of 0 to 63, as 17,5"),
    (["--dataset", "no-such-file.txt"], "no-such-file.txt"),
    (["--device", "cuda:99"], "cuda:99"),
    (["--no-such-flag"], "--no-such-flag"),
]


@pytest.mark.parametrize("flags, says", BAD_EVALUATIONS)
def test_a_bad_flag_of_evaluate_gets_one_line(flags, says, run_copy, capsys):
    assert says in refusal([run_copy, *SMALL, *flags], capsys, evaluate)
    assert not (run_copy / "evaluation.json").exists()


def test_what_is_no_run_and_text_that_is_gone_get_one_line(run_copy, tmp_path, capsys):
    assert "is not a run that can be loaded" in refusal([tmp_path, *SMALL], capsys, evaluate)
    edited(run_copy, config={"dataset": "/gone/text.jsonl"})
    assert "--dataset /gone/text.jsonl" in refusal([run_copy, *SMALL], capsys, evaluate)


def test_without_matplotlib_the_numbers_and_the_report_are_there(
    run_copy, evaluated, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (run_copy / "evaluation.json").write_text(evaluated)
    assert evaluate.main([str(run_copy), "--reuse"]) == 0
    out, err = capsys.readouterr()
    assert "pip install matplotlib" in err and "effective inputs" in out
    assert (run_copy / "report.html").exists()


@pytest.mark.parametrize("script", ["smollm2.py", "text.py", "plot.py"])
def test_a_recipe_says_how_it_is_run(script):
    path = jsae.HERE / "assets" / "recipes" / script
    assert f"python assets/recipes/{script}" in path.read_text()
    compile(path.read_text(), script, "exec")


def test_the_recipe_of_latents_prints_those_of_the_report(run_copy, capsys):
    recipe = module_from_file(jsae.HERE / "assets" / "recipes" / "latents.py")
    assert evaluate.main([str(run_copy), "--tokens", "2000", "--functions", "2"]) == 0
    expected = json.loads((run_copy / "evaluation.json").read_text())["latents"][:3]
    capsys.readouterr()
    recipe.main(str(run_copy), "3", "2000")
    out = capsys.readouterr().out
    latents = re.findall(r"(?m)^output latent (\d+)", out)
    assert latents == [str(latent["latent"]) for latent in expected]
    inputs = re.findall(r"(?m)^    input latent (\d+): (\d+)%", out)
    edges = [edge for latent in expected for edge in latent["inputs"][:3]]
    assert inputs == [(str(edge["latent"]), f"{100 * edge['share']:.0f}") for edge in edges]
    example = expected[0]["examples"][0]
    largest = max(example["acts"])
    marked = example["tokens"][example["acts"].index(largest)]
    (line,) = [line for line in out.splitlines()[1:2] if line.startswith(f"  {largest:6.2f}  ")]
    assert repr(f"[{marked}]")[1:-1] in line
