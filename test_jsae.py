"""Tests of jsae.py and evaluate.py. No network; two and a half minutes on two cores.

    python -m pytest                                    all of them
    python -m pytest -k "mathematics or jacrev"         the method alone, sections 1 to 4: seconds

 1 to 4  sparse autoencoders, the MLP's derivative, the Jacobian, the loss
 5       settings
 6       text and activations
 7       training
 8       evaluation
 9       the MLP of a transformers model
10       command line, bad input, README, other programs
11       runs that survive signals, kills, damage, full disks
12       several processes
"""

import html
import importlib.util
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
import types
import zlib
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers.activations import ACT2FN

import evaluate
import jsae
from jsae import MLP, Config, InputError, Latents, TopKSAE, active_jacobian, jsae_loss

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


def test_mathematics_a_new_autoencoder_has_unit_decoder_rows_and_the_encoder_as_their_copy():
    sae = TopKSAE(8, 40, 3)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(40))
    assert torch.equal(sae.W_enc, sae.W_dec)
    assert not sae.b_enc.any()
    assert not sae.b_dec.any()


def test_mathematics_an_autoencoder_keeps_the_k_largest_and_clips_them_at_zero():
    sae = TopKSAE(2, 4, 3)
    sae.W_enc.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -2.0]])
    sae.W_dec.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [5.0, 5.0]])
    sae.b_dec.data = torch.tensor([0.5, -0.5])
    acts, idx = sae.encode(torch.tensor([3.0, 1.0]))  # pre-activations 3, 1, -3, -2
    assert dict(zip(idx.tolist(), acts.tolist())) == {0: 3.0, 1: 1.0, 3: 0.0}
    assert sae(torch.tensor([[3.0, 1.0]])).tolist() == [[3.5, 0.5]]


def test_mathematics_k_above_the_number_of_latents_is_refused():
    with pytest.raises(ValueError, match="k is 9; expected 1 to 8"):
        TopKSAE(4, 8, 9)


# ---- 2. The MLP and its derivative (Eq. 8, 12, 17 to 28) -----------------------------------------


@every_act
def test_mathematics_the_derivative_of_each_activation_equals_autodiff(act):
    z = torch.linspace(-6, 6, 1000, dtype=DOUBLE, requires_grad=True)  # ReLU's kink is not in it
    mlp = random_mlp(act)
    assert_close(mlp.act(z), ACTS[act](z))
    (expected,) = torch.autograd.grad(ACTS[act](z).sum(), z)
    assert_close(mlp.act_grad(z), expected)
    assert (mlp.act in jsae.ACT_GRADS) == (act in BY_HAND)


@gated_or_plain
@every_act
def test_mathematics_the_derivative_of_the_mlp_equals_torch_func_jacrev(act, gated):
    mlp = random_mlp(act, gated)
    x = normal(10)
    ours = sum(mlp.W_out @ (c.unsqueeze(1) * W) for c, W in mlp.derivative(x))
    assert_close(ours, torch.func.jacrev(mlp)(x))


def test_mathematics_an_activation_that_mixes_elements_is_refused():
    with pytest.raises(ValueError, match="not elementwise"):
        MLP(torch.eye(3), None, torch.eye(3), None, act=partial(torch.softmax, dim=-1))


def test_mathematics_the_mlp_holds_contiguous_copies_in_float32_or_more():
    weight = torch.randn(4, 6, dtype=torch.bfloat16)
    act = nn.PReLU()
    mlp = MLP(weight, None, weight.T, None, act=act)
    weight.zero_()
    assert mlp.W_in.any()
    assert all(w.dtype == torch.float32 and w.is_contiguous() for w in mlp.buffers())
    assert not any(p.requires_grad for p in mlp.parameters())
    assert act.weight.requires_grad  # the model's own is left as it was


# ---- 3. The Jacobian (Eq. 16, 29) ----------------------------------------------------------------


def test_mathematics_a_jacobian_worked_by_hand():
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
def test_active_jacobian_equals_torch_func_jacrev(act, gated, literal):
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


def test_mathematics_rows_and_columns_of_latents_that_relu_cut_off_are_exactly_zero():
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


def test_mathematics_sections_1_to_3_run_when_they_are_copied_as_one_block(tmp_path):
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


def test_mathematics_the_plain_loss_is_the_sum_of_the_terms_of_eq_5():
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
def test_mathematics_the_fast_loss_and_every_gradient_equal_the_plain_formula(act, gated, penalty):
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


@every_penalty
def test_mathematics_the_fast_loss_passes_gradcheck(penalty):
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
def test_mathematics_the_fast_loss_is_the_same_whatever_the_chunk(gated, penalty, monkeypatch):
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
def test_mathematics_fast_penalty_serves_any_two_saes_whose_latents_are_rows(k_y):
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


def test_mathematics_a_penalty_that_is_nan_for_no_active_pair_is_not_hidden():
    (sae_x, sae_y), mlp, x = random_pair(), random_mlp(), normal(9, 10)
    sae_y.b_enc.data.fill_(-1e9)
    loss, parts = jsae_loss(sae_x, sae_y, mlp, x, 1.0, penalty=row_ratio)
    assert parts["penalty"] == 0
    assert all(g.isfinite().all() for g in gradients(loss, (sae_x, sae_y)))
    broken = jsae_loss(sae_x, sae_y, mlp, x, 1.0, penalty=lambda J: J.sum((1, 2)) / J.norm())[0]
    assert broken.isnan()


def test_mathematics_jacobian_fraction_averages_over_a_random_part_of_the_tokens():
    pair, mlp, x = random_pair(), random_mlp(), normal(4, 10)

    def term(tokens, fraction=1.0):
        return round(jsae_loss(*pair, mlp, tokens, 1.0, fraction)[1]["penalty"].item(), 9)

    one_by_one = {term(x[i : i + 1]) for i in range(4)}
    torch.manual_seed(0)
    drawn = {term(x, 0.25) for _ in range(60)}
    assert drawn == one_by_one
    assert len(drawn) == 4
    assert math.isclose(term(x), sum(one_by_one) / 4, rel_tol=1e-6)


def test_mathematics_coefficient_zero_gives_the_gradients_of_two_independent_saes():
    pair, mlp, x = random_pair(), random_mlp(), normal(50, 10)
    loss, parts = jsae_loss(*pair, mlp, x, 0.0)
    assert "penalty" not in parts
    expected = []
    for sae, v in zip(pair, (x, mlp(x))):
        expected += gradients(F.mse_loss(sae(v), v), [sae])
    for ours, other in zip(gradients(loss, pair), expected):
        assert_close(ours, other, atol=1e-13)


def test_mathematics_nothing_of_size_tokens_x_latents_or_k_x_d_mlp_is_kept_for_the_backward_pass():
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
def test_mathematics_autocast_sets_the_dtype_of_the_large_products_only(gated, penalty):
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


def test_mathematics_autocast_reaches_fast_penalty_alone_and_dtype_wins():
    pair = [sae.float() for sae in random_pair(d_model=16, n_latents=64)]
    mlp, x = random_mlp(d_model=16).float(), normal(64, 16).float()
    s_x, s_y = pair[0].encode(x), pair[1].encode(mlp(x))
    exact = jsae.fast_penalty(*pair, mlp, x, s_x, s_y)
    with torch.autocast("cpu", torch.bfloat16):
        low = jsae.fast_penalty(*pair, mlp, x, s_x, s_y)
    asked = jsae.fast_penalty(*pair, mlp, x, s_x, s_y, dtype=torch.bfloat16)
    for value in (low, asked):
        assert value != exact
        assert_close(value, exact, rtol=0.03, atol=0)


def test_mathematics_a_step_on_two_threads_gives_the_same_bits_every_time():
    pair = [sae.float() for sae in random_pair(d_model=64, n_latents=512, k=16)]
    mlp, x = random_mlp(d_model=64, d_mlp=128).float(), normal(4096, 64).float()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    runs = [gradients(jsae_loss(*pair, mlp, x, 1.0)[0], pair) for _ in range(4)]
    torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(run, runs[0]))


# ---- 5. Settings ---------------------------------------------------------------------------------


def test_the_default_folder_is_named_by_model_sizes_lambda_tokens_seed_and_control():
    assert Config().output_dir == "runs/pythia-70m-L3-R32-k32-lambda1-300M-seed0"
    control = Config(randomize_weights="paper", tokens=1_200_000, jacobian_coef=0.3)
    assert control.output_dir == "runs/pythia-70m-L3-R32-k32-lambda0.3-1.2M-seed0-paper"


def test_values_are_checked_without_the_command_line_too():
    with pytest.raises(InputError, match="--dtype is 'float16'; expected auto, float32, bfloat16"):
        Config(dtype="float16")
    with pytest.raises(InputError, match="--tokens is 1.5; expected int from 1"):
        Config(tokens=1.5)
    with pytest.raises(InputError, match="--lr is nan; expected float from 1e-09"):
        Config(lr=math.nan)


def test_without_a_model_the_demo_settings_stand_in_and_flags_win(monkeypatch, capsys):
    given = []

    def note(config):
        given.append(config)
        raise InputError("noted")

    monkeypatch.setattr(jsae, "train", note)
    assert jsae.main(["--k", "5", "--jacobian-coef", "0"]) == 2
    for name, value in {**jsae.DEMO, "k": 5, "jacobian_coef": 0.0}.items():
        assert getattr(given[0], name) == value
    assert jsae.main(["--model", "EleutherAI/pythia-70m"]) == 2
    assert given[1] == Config()
    assert "tiny-pythia" in capsys.readouterr().out


def test_help_shows_groups_the_papers_defaults_and_every_option_once(capsys):
    assert jsae.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "(default: 300000000)" in out
    assert "--jacobian_coef" not in out
    for group in ("model:", "text:", "SAEs:", "Jacobian:", "training:", "run:"):
        assert f"\n{group}\n" in out
    for field in Config.__dataclass_fields__:
        assert out.count(f"  {jsae.flag(field)} ") + out.count(f"  {jsae.flag(field)}\n") == 1
    assert len(out.split("\n\n")[0].splitlines()) == 1  # the usage


# ---- 6. Text and activations ---------------------------------------------------------------------


def changed(config, **settings):
    values = {name: getattr(config, name) for name in config.__dataclass_fields__}
    return Config(**{**values, **settings})


def write_tiny_model(folder, **settings):
    """A random one-layer GPT-NeoX of the bundled vocabulary, without a tokenizer."""
    config = transformers.GPTNeoXConfig(
        vocab_size=2560,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
        **settings,
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    folder = write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")
    transformers.AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    return folder


def numbered_text(i):
    return f"Document {i}: " + " ".join(map(str, range(i, i + 60)))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "docs.jsonl"
    rows = [json.dumps({"text": numbered_text(i)}) for i in range(200)]
    path.write_text("\n".join(rows))
    return path


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


def contexts_of(config, part="training", rank=0, world=1):
    model = jsae.load_language_model(config)
    return list(jsae.token_contexts(config, model, part, rank, world))


def text_of(contexts):
    """The contexts' text, without the first token of each."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    return tokenizer.decode(np.concatenate([context[1:] for context in contexts]))


def documents_in(contexts):
    return set(re.findall("Document ([0-9]+):", text_of(contexts)))


END = "<|endoftext|>"


def test_contexts_are_packed_documents_behind_bos(config):
    contexts = contexts_of(config)
    assert all(context.shape == (32,) and context[0] == 0 for context in contexts)
    training = "".join(numbered_text(i) + END for i in range(200) if i % 20 != 19)
    text = text_of(contexts)
    assert training.startswith(text)
    assert len(training) - len(text) < 31 * 8  # only what is less than a context is left


def test_nothing_is_lost_of_documents_that_are_shorter_than_a_context(config, tmp_path):
    texts = [f"{i:05d}" for i in range(2000)]
    (tmp_path / "short.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    short = changed(config, dataset=str(tmp_path / "short.jsonl"), context_size=64)
    whole = "".join(text + END for text in texts)
    text = text_of(contexts_of(short, "all"))
    assert whole.startswith(text)
    assert len(whole) - len(text) < 63 * len(END)


def test_a_part_of_the_pieces_can_be_asked_for(config):
    model = jsae.load_language_model(config)
    contexts = list(jsae.token_contexts(config, model, "held out", n_pieces=3))
    assert documents_in(contexts) == {"19", "39", "59"}


def test_every_20th_piece_is_held_out_and_none_is_missed(config):
    held_out = documents_in(contexts_of(config, "held out"))
    assert held_out == {str(i) for i in range(19, 200, 20)}
    training = documents_in(contexts_of(config))
    assert not training & held_out
    assert len(training) == 190
    assert len(documents_in(contexts_of(config, "all"))) == 200


def test_long_documents_are_cut_into_pieces_of_which_every_20th_is_held_out(config, tmp_path):
    text = "".join(f"{i:07d} " for i in range(25 * 2**13))  # 25 pieces of 2^16 characters
    (tmp_path / "long.txt").write_text(text)
    one = changed(config, dataset=str(tmp_path / "long.txt"), context_size=64)
    pieces = [text[start : start + 2**16] for start in range(0, len(text), 2**16)]
    assert len(pieces) == 25
    held_out = text_of(contexts_of(one, "held out"))
    assert pieces[19].startswith(held_out[: 2**15])
    joined = END.join(pieces[:19] + pieces[20:])
    assert joined.startswith(text_of(contexts_of(one))[: 2**20])


def test_the_bundled_model_was_rescaled_exactly():
    """Multiplied back by 4, with eps times 16, it is the model that was trained: the same logits."""
    script = module_from_file(TINY / "train.py")
    model = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    ids = random_ids(2, 64, n_words=2560)
    layer = model.gpt_neox.layers[1]
    with torch.no_grad():
        balanced = model(ids).logits
        y = layer.mlp(torch.ones(1, 256))
        script.rescale(model, 1 / script.SCALE)
        as_trained = model(ids).logits
        y_as_trained = layer.mlp(torch.ones(1, 256))

    assert torch.equal(balanced, as_trained)
    assert torch.equal(4 * y, y_as_trained)
    assert model.config.layer_norm_eps == layer.input_layernorm.eps == 1e-5


def test_stdlib_holds_out_by_path_what_the_bundled_model_was_not_trained_on():
    root, names = jsae.stdlib_files()
    held_out = [name for name in names if zlib.crc32(name.encode()) % 20 == 0]
    assert 0.02 < len(held_out) / len(names) < 0.08
    assert not any("site-packages" in name for name in names)
    assert "textwrap.py" in names
    pieces = list(jsae.text_pieces(Config(dataset="stdlib"), object(), "held out"))
    assert "".join(pieces) == "".join((root / n).read_text("utf-8", "replace") for n in held_out)


def test_nothing_is_held_out_of_text_from_the_hub(config, monkeypatch):
    monkeypatch.setattr(jsae, "local_path", lambda name: None)
    documents = [{"text": numbered_text(i)} for i in range(40)]
    monkeypatch.setattr(jsae, "load_documents", lambda *_: documents)
    tokenizer = object()
    assert len(list(jsae.text_pieces(config, tokenizer, "training"))) == 40
    assert list(jsae.text_pieces(config, tokenizer, "held out")) == []


def written_data(kind, folder, texts):
    """The texts as a file of that kind, or as many, below the folder."""
    table = datasets.Dataset.from_dict({"text": texts})
    lines = "\n".join(json.dumps({"text": text, "n": 1}) for text in texts).encode()
    if kind == "txt":
        for i, text in enumerate(texts):
            (folder / f"{i:03}.txt").write_text(text)
    elif kind == "arrow":
        table.save_to_disk(folder)
    elif kind == "parquet":
        table.to_parquet(folder / "a.parquet")
    elif kind == "jsonl":
        (folder / "a.jsonl").write_bytes(lines)
    elif kind == "jsonl.zst":
        zstandard = pytest.importorskip("zstandard")
        (folder / "a.jsonl.zst").write_bytes(zstandard.compress(lines))
    elif kind == "input_ids":
        tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
        ids = [tokenizer(text).input_ids for text in texts]
        datasets.Dataset.from_dict({"input_ids": ids}).to_parquet(folder / "a.parquet")


@pytest.mark.parametrize("kind", ["txt", "jsonl", "jsonl.zst", "parquet", "arrow", "input_ids"])
def test_every_kind_of_local_data_gives_the_same_documents(kind, config, tmp_path):
    texts = [f"text number {i} " * 30 for i in range(60)]
    (tmp_path / "data").mkdir()
    written_data(kind, tmp_path / "data", texts)
    text = text_of(contexts_of(changed(config, dataset=str(tmp_path / "data"))))
    training = [text for i, text in enumerate(texts) if i % 20 != 19]
    whole = "".join(text + END for text in training)
    assert whole.startswith(text)
    assert len(whole) - len(text) < 31 * 16


def test_text_that_is_not_utf8_is_read_with_replacement(config, tmp_path):
    bad = b"caf\xe9 " * 50
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "' + bad + b'"}\n{"text": ""}\n')
    (tmp_path / "a.txt").write_bytes(bad)
    for name in ("a.jsonl", "a.txt"):
        contexts = contexts_of(changed(config, dataset=str(tmp_path / name)), "all")
        assert text_of(contexts).startswith("caf\ufffd caf")


@pytest.mark.parametrize("end", [2, [2, 5], None], ids=["one", "a list", "none"])
def test_ids_without_a_tokenizer_take_bos_and_eos_of_the_models_settings(end, config, tmp_path):
    folder = write_tiny_model(tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text())
    settings.update(bos_token_id=1, eos_token_id=end)
    (folder / "config.json").write_text(json.dumps(settings))
    rows = [json.dumps({"input_ids": [10, 11, 12]})] * 8
    (tmp_path / "ids.jsonl").write_text("\n".join(rows))
    ids = changed(config, model=str(folder), dataset=str(tmp_path / "ids.jsonl"), context_size=9)
    first = contexts_of(ids, "all")[0].tolist()
    document = [10, 11, 12] if end is None else [10, 11, 12, 2]
    assert first == [1, *(document * 3)[:8]]


def test_a_tokenizer_that_fails_to_load_is_named_with_its_cause(config, tmp_path):
    folder = write_tiny_model(tmp_path / "model")
    (folder / "tokenizer.json").write_text("{broken")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(
        InputError, match=r"expected text \(with a tokenizer\).*no tokenizer of.*\w+"
    ):
        contexts_of(changed(config, model=str(folder)))


def test_a_model_without_its_tokenizer_is_not_trained_on_nothing(config, tmp_path):
    folder = write_tiny_model(tmp_path / "model")
    with pytest.raises(InputError, match="no tokenizer of"):
        jsae.train(changed(config, model=str(folder)))


@pytest.mark.parametrize("n_files", [1, 2])
def test_two_processes_hold_out_what_one_does_and_share_the_rest(n_files, config, tmp_path):
    for part in range(n_files):
        numbers = range(part, 200, n_files)
        rows = [json.dumps({"text": numbered_text(i)}) for i in numbers]
        (tmp_path / f"{part}.jsonl").write_text("\n".join(rows))
    config = changed(config, dataset=str(tmp_path))
    held_out = documents_in(contexts_of(config, "held out"))
    shares = [documents_in(contexts_of(config, rank=rank, world=2)) for rank in (0, 1)]
    assert len(held_out) == 10
    assert not shares[0] & shares[1]
    assert not (shares[0] | shares[1]) & held_out
    assert [len(share) for share in shares] == [95, 95]


def all_batches(config, done=0):
    model = jsae.load_language_model(config)
    mlp = MLP.from_model(model, 0)
    return list(jsae.activation_batches(config, model, mlp, done))


def inputs_of_mlp(config, contexts):
    """x of the contexts' tokens but the first of each, by a hook on the model's own module."""
    model = jsae.load_language_model(config)
    seen = []
    mlp = model.gpt_neox.layers[0].mlp
    mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(torch.from_numpy(np.stack(contexts)))
    return seen[0][:, 1:].flatten(0, 1)


def test_batches_hold_each_mlp_input_once_and_no_first_token(config):
    eight = changed(config, batch_size=31, tokens=8 * 31, buffer_batches=8)
    x = torch.cat(all_batches(eight))
    expected = inputs_of_mlp(eight, contexts_of(eight)[:8])
    assert x.shape == expected.shape
    assert not torch.equal(x, expected)  # shuffled
    order, other = x[:, 0].argsort(), expected[:, 0].argsort()
    torch.testing.assert_close(x[order], expected[other], rtol=1e-4, atol=1e-5)


def test_each_filling_has_an_order_of_its_own_and_no_more_contexts_than_it_needs(
    config, monkeypatch
):
    contexts = contexts_of(config)[:17]  # 4 batches of 128 from contexts of 31
    monkeypatch.setattr(jsae, "training_contexts", lambda *_, **__: itertools.cycle(contexts))
    counts = []
    real = jsae.mlp_inputs

    def counted(model, mlp, ids):
        counts.append(len(ids))
        return real(model, mlp, ids)

    monkeypatch.setattr(jsae, "mlp_inputs", counted)
    batches = all_batches(changed(config, tokens=128 * 9))
    one, other = torch.cat(batches[:4]), torch.cat(batches[4:8])
    assert torch.equal(one[:, 0].sort().values, other[:, 0].sort().values)
    assert not torch.equal(one, other)
    assert len(batches) == 9
    assert sum(counts) == 17 + 17 + 5


@pytest.mark.parametrize("done", [1, 4, 6, 15])
def test_batches_go_on_from_any_number(done, config):
    whole = all_batches(config)
    rest = all_batches(config, done)
    assert len(whole) == 15
    assert len(rest) == 15 - done
    assert all(torch.equal(one, other) for one, other in zip(rest, whole[done:]))


def test_resuming_says_that_text_is_read_again(config, capfd):
    all_batches(config, done=6)
    assert "reading the text again, up to context 17" in capfd.readouterr().err


def test_mlp_inputs_leaves_the_forward_pass_at_the_mlp(model_dir):
    model = random_model("llama").eval()
    mlp = MLP.from_model(model, 0)
    later = []
    for module in (*mlp.readers, mlp.writer, model.model.layers[1], model.lm_head):
        module.register_forward_hook(lambda *_: later.append(1))
    x = jsae.mlp_inputs(model, mlp, torch.ones(2, 5, dtype=torch.long))
    assert x.shape == (2, 5, 32)
    assert not later


def test_an_mlp_that_is_not_what_the_model_computes_is_refused_on_the_first_text(config):
    model = jsae.load_language_model(config)
    mlp = MLP.from_model(model, 0)
    ids = torch.from_numpy(np.stack(contexts_of(config)[:2]))
    jsae.check_mlp(model, mlp, ids)
    mlp.W_out *= 1.001
    with pytest.raises(InputError, match="the MLP differs from the model's by 0.001"):
        jsae.check_mlp(model, mlp, ids)


def test_the_next_filling_is_read_by_a_thread_while_one_is_used():
    threads = []

    def items():
        for i in range(3):
            threads.append(jsae.threading.current_thread() is jsae.threading.main_thread())
            yield i

    found = list(jsae.one_ahead(items()))
    assert found == [0, 1, 2]
    assert threads == [True, False, False]


def test_local_text_that_ends_starts_again_with_a_notice(config, capfd):
    run = jsae.train(changed(config, tokens=60_000, batch_size=2048))
    assert rows_of(run)[-1]["step"] == 29
    assert "begins again" in capfd.readouterr().err


def test_a_name_is_a_path_if_it_or_its_first_folder_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("a")
    assert jsae.local_path("data/a.txt") == tmp_path / "data" / "a.txt"
    assert jsae.local_path("assets/tiny-pythia") == TINY  # beside jsae.py
    assert jsae.local_path("EleutherAI/pythia-70m") is None
    for name in ("data/typo", "typo.jsonl"):
        with pytest.raises(InputError, match=f"there is no file or folder {name}"):
            jsae.local_path(name)


# ---- 7. Training ---------------------------------------------------------------------------------


def flags(config, **settings):
    """The settings in which config differs from the defaults, as flags."""
    given = []
    for name in config.__dataclass_fields__:
        value = settings.get(name, getattr(config, name))
        if value != getattr(Config, name) and not isinstance(value, bool):
            given += [jsae.flag(name), str(value)]
    return given


def rows_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def without_timing(rows):
    timing = ("seconds", "tokens_per_second")
    return [{name: row[name] for name in row if name not in timing} for row in rows]


def weights_of(run):
    return [p for sae in jsae.load_run(run)[:2] for p in sae.parameters()]


def test_a_run_holds_what_the_design_says(config):
    run = jsae.train(config)
    names = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    folders = {f"sae_{s}/{f}" for s in "xy" for f in ("cfg.json", "sae_weights.safetensors")}
    assert names == {"config.json", "metrics.jsonl", *folders}
    saved = json.loads((run / "config.json").read_text())
    assert Config(**saved["config"]) == config
    assert saved["penalty"] == "l1"
    assert saved["processes"] == 1
    assert len(saved["mlp_sha256"]) == len(saved["text_sha256"]) == 64
    assert saved["model_is_local"] and Path(saved["model_path"]) == Path(config.model)
    assert saved["text_is_local"] and Path(saved["text_path"]) == Path(config.dataset)
    rows = rows_of(run)
    assert rows[-1]["step"] == 2000 // 128
    assert rows[-1]["tokens"] == 2000 // 128 * 128
    expected = "step tokens mse_x mse_y ev_x ev_y jacobian_l1 jacobian_above_0.01 dead_x dead_y lr"
    assert set(expected.split()) <= rows[-1].keys()
    sae_x, sae_y, loaded = jsae.load_run(run)
    assert loaded == config
    for sae in (sae_x, sae_y):
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64))


def test_training_lowers_the_loss_and_follows_the_schedules(config):
    rows = rows_of(jsae.train(changed(config, tokens=128 * 100)))
    assert rows[-1]["mse_x"] < 0.7 * rows[0]["mse_x"]
    rates = {row["step"]: row["lr"] for row in rows}
    assert rates[50] == config.lr
    assert math.isclose(rates[90], config.lr * 11 / 20)
    assert math.isclose(rates[100], config.lr / 20)
    assert rows[0]["coef"] == config.jacobian_coef  # step 10: the warm-up over 5 % is complete
    assert jsae.schedule(config, 2, 100)[1] == config.jacobian_coef * 2 / 5
    assert jsae.schedule(config, 2, 1000)[0] == config.lr * 2 / 10
    assert rows[0]["dead_x"] >= rows[-1]["dead_x"]


def token_ratio(J):
    """mean |J| / rms J of each token, up to a factor: the scale of J plays no part."""
    return F.normalize(J.flatten(1), dim=1).abs().mean(1)


def test_each_penalty_lowers_what_it_measures(config, tmp_path):
    last = {}
    cases = (("none", 0, token_ratio), ("l1", 3, jsae.l1), ("ratio", 3, token_ratio))
    for name, coef, penalty in cases:
        folder = str(tmp_path / name)
        one = changed(config, jacobian_coef=coef, tokens=128 * 60, output_dir=folder)
        last[name] = rows_of(jsae.train(one, penalty))[-1]
    assert last["l1"]["jacobian_l1"] < 0.8 * last["none"]["jacobian_l1"]
    assert last["ratio"]["penalty"] < 0.9 * last["none"]["penalty"]
    assert "penalty" not in last["l1"]
    assert json.loads((tmp_path / "ratio" / "config.json").read_text())["penalty"] == "token_ratio"


def test_measure_equals_the_parts_of_the_loss():
    pair, mlp, x = random_pair(b_enc=-0.8), random_mlp(), normal(300, 10)
    row = jsae.measure(*pair, mlp, x, squares)
    parts = jsae_loss(*pair, mlp, x, 1.0)[1]
    for name, part in (("mse_x", "mse_x"), ("mse_y", "mse_y"), ("jacobian_l1", "penalty")):
        assert row[name] == pytest.approx(parts[part].item(), rel=1e-9)
    assert row["penalty"] == pytest.approx(
        jsae_loss(*pair, mlp, x, 1.0, penalty=squares)[1]["penalty"].item(), rel=1e-9
    )
    J = active_jacobian(*pair, mlp, x, pair[0].encode(x), pair[1].encode(mlp(x)))
    assert row["jacobian_above_0.01"] == pytest.approx((J.abs() > 0.01).sum().item() / 300)
    y = mlp(x)
    unexplained = (pair[1](y) - y).square().sum() / (y - y.mean(0)).square().sum()
    assert row["ev_y"] == pytest.approx(1 - unexplained.item(), rel=1e-9)


def test_a_latent_is_dead_after_ten_million_tokens_without_a_positive_value():
    pair = jsae.Pair(4, 6, 2)
    s_x = Latents(torch.tensor([[1.0, 0.0]]), torch.tensor([[0, 1]]))
    s_y = Latents(torch.tensor([[1.0, 2.0]]), torch.tensor([[3, 5]]))
    pair.finish_step({"s_x": s_x, "s_y": s_y}, tokens=100)
    assert pair.dead_latents(100) == [5, 4]  # value 0 is not active
    assert pair.dead_latents(10_000_099) == [5, 4]
    assert pair.dead_latents(10_000_100) == [6, 6]
    assert pair.step == 1


def test_batches_of_one_token_are_trained_on(config, capsys):
    one = changed(config, batch_size=1, tokens=12)
    assert jsae.main(flags(one)) == 0
    assert rows_of(Path(config.output_dir))[-1]["ev_x"] is None  # of one token, nothing varies
    assert "jacobian_l1" in capsys.readouterr().out


def test_two_runs_are_bit_identical_and_seeds_differ(config, tmp_path):
    runs = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        runs.append(jsae.train(changed(config, output_dir=str(tmp_path / name), seed=seed)))
    a, b, c = map(weights_of, runs)
    assert all(map(torch.equal, a, b))
    assert not torch.equal(a[0], c[0])
    rows = [without_timing(rows_of(run)) for run in runs]
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


@pytest.mark.parametrize("how", ["init", "shuffle", "paper"])
def test_random_controls_come_from_the_seed_and_change_what_they_say(how, config):
    trained = jsae.load_language_model(config)
    control = changed(config, randomize_weights=how, seed=5)
    model, again = (jsae.load_language_model(control) for _ in range(2))
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


def test_bfloat16_trains_to_about_the_same_loss(config, tmp_path):
    exact = rows_of(jsae.train(changed(config, tokens=128 * 40)))[-1]
    low = changed(config, tokens=128 * 40, dtype="bfloat16", output_dir=str(tmp_path / "low"))
    assert rows_of(jsae.train(low))[-1]["mse_x"] == pytest.approx(exact["mse_x"], rel=0.05)


def test_a_cpu_without_bfloat16_gets_a_line_before_training(config, monkeypatch, capfd):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    jsae.train(changed(config, dtype="bfloat16"))
    assert "--dtype bfloat16: this CPU (AVX2)" in capfd.readouterr().err
    jsae.warn_of_slow_bfloat16(config, torch.device("cpu"))
    assert capfd.readouterr().err == ""


def test_bfloat16_is_not_chosen_on_a_gpu_that_emulates_it(config, monkeypatch):
    asked = []

    def supported(including_emulation=True):
        asked.append(including_emulation)
        return including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    autocast = jsae.autocast_of(config, torch.device("cuda"))
    assert autocast.keywords["enabled"] is False
    assert asked == [False]


def test_after_ten_steps_a_line_says_how_long_the_run_will_take(config, capfd):
    jsae.train(config)
    error = capfd.readouterr().err
    assert re.search(r"about [\d.]+ minutes; fewer --tokens are faster", error)
    assert "|J|=" in error
    assert max(map(len, re.split("[\r\n]", error))) < 120  # the bar does not wrap


@pytest.fixture(scope="session")
def finished(model_dir, text_file, tmp_path_factory):
    """A trained pair, to be read only."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    return jsae.train(small_config(model_dir, text_file, folder, tokens=20_000, buffer_batches=32))


@pytest.fixture
def run_copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copy")


# ---- 8. Evaluation: held-out text ----------------------------------------------------------------


SMALL = ["--tokens", "400", "--linear-samples", "60", "--second-samples", "3", "--n-latents", "3"]


def small_options(*flags):
    return evaluate.parse(["run", *SMALL, *flags])[0]


def edited(run, **changes):
    """The run's folder, its config.json changed: settings inside `config`, all else beside it."""
    description = json.loads((run / "config.json").read_text())
    description["config"] |= changes.pop("config", {})
    (run / "config.json").write_text(json.dumps(description | changes))
    return run


def held_out(config, part="held out", n_tokens=300, seed=0):
    model = jsae.load_language_model(config)
    tokenizer = jsae.load_tokenizer(config)
    text = evaluate.held_out_text(config, part, model, tokenizer, n_tokens, seed)
    return text, list(jsae.token_contexts(config, model, part))


def test_a_document_ends_with_its_end_token_and_the_start_token_ends_nothing():
    ids = torch.tensor([[0, 5, 5, 0], [0, 7, 0, 8], [0, 8, 8, 8]])
    expected = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 2], [2, 2, 2, 2]])
    assert torch.equal(evaluate.document_numbers(ids, 0), expected)


def test_without_an_end_token_a_context_is_a_document():
    ids = torch.tensor([[0, 5, 5], [0, 7, 0]])
    numbers = evaluate.document_numbers(ids, None)
    assert torch.equal(numbers, torch.tensor([[0, 0, 0], [1, 1, 1]]))


def test_evaluated_contexts_are_drawn_from_the_whole_held_out_text(config):
    text, contexts = held_out(config)
    rows = [context.tolist() for context in contexts]
    places = [rows.index(context.tolist()) for context in text.ids]
    assert text.n_tokens == 310 and len(places) == len(set(places)) == 10
    assert max(places) > 20, "the first ones are of the first documents only"
    assert text.n_documents == len(set(text.documents.flatten().tolist())) > 4


def test_tokens_of_one_number_are_of_one_document(config):
    text, _ = held_out(config, n_tokens=1300)
    tokenizer = jsae.load_tokenizer(config)
    headings = []
    for number in range(text.n_documents):
        ids = text.ids[:, 1:][text.documents[:, 1:] == number]
        words = tokenizer.decode(ids.tolist())
        assert words.count("<|endoftext|>") <= 1 and words.count("Document") <= 1
        headings += re.findall(r"Document \d+:", words)
    assert len(headings) == len(set(headings)) > 4
    ends = text.documents[:, 1:][text.ids[:, 1:] == 0]
    assert len(ends) == len(ends.unique()) > 4


def test_the_seed_chooses_contexts_and_more_tokens_only_add_some(config):
    text, _ = held_out(config)
    more, _ = held_out(config, n_tokens=500)
    other, _ = held_out(config, seed=1)
    assert torch.equal(more.ids[: len(text.ids)], text.ids)
    assert not torch.equal(other.ids, text.ids)


def test_of_a_long_local_text_only_the_beginning_is_read(config, monkeypatch):
    monkeypatch.setattr(evaluate, "MOST_TOKENS", 12 * 31)
    text, contexts = held_out(config)
    first = [context.tolist() for context in contexts[:12]]
    assert len(contexts) > 12 and all(context.tolist() in first for context in text.ids)


def test_of_hub_text_the_first_contexts_are_taken(config, monkeypatch):
    monkeypatch.setattr(evaluate, "is_local", lambda dataset: False)
    text, contexts = held_out(config)
    assert torch.equal(text.ids, torch.from_numpy(np.stack(contexts[:10])))


def test_a_dataset_that_is_named_is_used_whole(finished, tmp_path):
    path = tmp_path / "three.jsonl"
    rows = [json.dumps({"text": f"{word} " * 100}) for word in ("one", "two", "three")]
    path.write_text("\n".join(rows))
    options = small_options("--dataset", str(path), "--tokens", "300")
    opened = evaluate.open_run(finished, options)
    text = evaluate.held_out_text(
        opened.settings, opened.part, opened.model, opened.tokenizer, options.tokens, 0
    )
    assert text.n_documents == 3


def test_a_run_on_local_files_is_evaluated_on_them_from_any_folder(
    run_copy, model_dir, text_file, tmp_path, monkeypatch
):
    edited(run_copy, config={"dataset": text_file.name, "model": model_dir.name})
    monkeypatch.chdir(tmp_path)
    opened = evaluate.open_run(run_copy, small_options())
    assert opened.settings.dataset == str(text_file) and opened.part == "held out"
    assert opened.settings.model == str(model_dir)


def test_a_run_on_hub_text_is_evaluated_on_c4(run_copy):
    edited(run_copy, text_is_local=False, text_path="monology/pile-uncopyrighted")
    opened = evaluate.open_run(run_copy, small_options())
    assert (opened.settings.dataset, opened.settings.split) == ("allenai/c4:en", "validation")
    assert opened.part == "all"


def test_a_run_from_the_hub_reads_no_local_text_unless_it_is_named(
    finished, text_file, monkeypatch
):
    monkeypatch.setattr(jsae, "snapshot_download", lambda *args, **kwargs: str(finished))
    with pytest.raises(InputError, match="name a text by --dataset"):
        evaluate.open_run("someone/some-pair", small_options())
    opened = evaluate.open_run("someone/some-pair", small_options("--dataset", str(text_file)))
    assert opened.settings.dataset == str(text_file) and opened.part == "all"


def test_a_ratio_and_its_error_worked_by_hand():
    a = torch.tensor([1.0, 3.0, 0.0], dtype=DOUBLE)  # the third document has no token
    b = torch.tensor([2.0, 2.0, 0.0], dtype=DOUBLE)
    assert evaluate.ratio(a, b) == (1.0, pytest.approx(0.5))
    assert evaluate.ratio(a, -b) == (-1.0, pytest.approx(0.5))
    assert evaluate.ratio(a[:1], b[:1]) == (0.5, None)
    assert evaluate.ratio(a, 0 * b) == (None, None)


def test_the_error_is_what_a_ratio_varies_by_when_documents_are_drawn_anew():
    g = torch.Generator().manual_seed(0)
    values = []
    errors = []
    for _ in range(400):
        b = torch.randint(1, 50, (80,), generator=g).double()
        level = torch.randn(80, generator=g).double()  # tokens of a document are alike
        estimate = evaluate.ratio(b * (2 + level), b)
        values.append(estimate.value)
        errors.append(estimate.error)
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.1)


def test_sums_of_documents_add_up_over_batches():
    sums = evaluate.DocumentSums(3)
    sums.add(torch.tensor([0, 2, 0]), one=torch.tensor([1.0, 2.0, 3.0]))
    sums.add(torch.tensor([2]), one=torch.tensor([5.0]))
    assert sums["one"].tolist() == [4, 0, 7] and sums["one"].dtype == DOUBLE


# ---- 8. Evaluation: reconstruction and cross-entropy ---------------------------------------------


def tokens_of(pair, mlp, x, document=None):
    """Tokens of x (B, d_model), all of one document unless told otherwise."""
    sae_x, sae_y = pair
    y = mlp(x)
    if document is None:
        document = torch.zeros(len(x), dtype=torch.long)
    with torch.no_grad():
        s_x = sae_x.encode(x)
        s_y = sae_y.encode(y)
        return evaluate.Tokens(
            torch.arange(len(x)), document, x, y, s_x, s_y, sae_x.decode(s_x), sae_y.decode(s_y)
        )


def test_reconstruction_is_that_of_all_tokens_at_once():
    sae, _ = random_pair(b_enc=-2.0)
    v = normal(90, 10) + 1
    document = torch.arange(90) // 15
    measure = evaluate.Reconstruction(sae, 6)
    with torch.no_grad():
        s = sae.encode(v)
        v_hat = sae.decode(s)
        for part in torch.arange(90).split(35):
            own = Latents(s.acts[part], s.idx[part])
            measure.add(v[part], v_hat[part], own, document[part])
    found = measure.result()
    fvu = (v_hat - v).square().sum() / (v - v.mean(0)).square().sum()
    assert found["fvu"].value == pytest.approx(fvu.item())
    assert found["explained_variance"].value == pytest.approx(1 - fvu.item())
    assert found["mse"].value == pytest.approx((v_hat - v).square().mean().item())
    assert found["cosine"].value == pytest.approx(F.cosine_similarity(v_hat, v).mean().item())
    assert found["active"] == pytest.approx((s.acts > 0).sum().item() / 90) and found["active"] < 4
    n_positive = len(set(s.idx[s.acts > 0].tolist()))
    assert found["silent"] == 30 - n_positive > 0
    assert sum(found["density"]) == n_positive and found["rare"] is None


def test_density_counts_latents_by_half_powers_of_ten():
    sae, _ = random_pair(k=1)
    measure = evaluate.Reconstruction(sae, 1)
    v = torch.zeros(1000, 10, dtype=DOUBLE)
    idx = torch.full((1000, 1), 3)
    idx[:5] = 7
    measure.add(v, v, Latents(torch.ones(1000, 1), idx), torch.zeros(1000, dtype=torch.long))
    found = measure.result()
    counts = dict(zip(found["density_log10"], found["density"]))
    assert counts[-0.5] == 1 and counts[-2.5] == 1 and sum(counts.values()) == 2  # .995 and .005


def test_the_error_of_explained_variance_is_that_of_a_ratio_over_documents():
    sae, _ = random_pair()
    v = normal(60, 10) * torch.arange(60).view(-1, 1)
    document = torch.arange(60) // 10
    measure = evaluate.Reconstruction(sae, 6)
    with torch.no_grad():
        s = sae.encode(v)
        v_hat = sae.decode(s)
        measure.add(v, v_hat, s, document)
    error = (v_hat - v).square().sum(1).view(6, 10).sum(1)
    square = (v - v.mean(0)).square().sum(1).view(6, 10).sum(1)
    residual = error - error.sum() / square.sum() * square
    expected = math.sqrt(6 / 5 * residual.square().sum()) / square.sum()
    assert measure.result()["explained_variance"].error == pytest.approx(expected.item())


def noisy_model():
    """Two layers in which biases are not 0 and the MLP matters."""
    settings = transformers.GPTNeoXConfig(
        vocab_size=50,
        hidden_size=10,
        intermediate_size=14,
        num_hidden_layers=2,
        num_attention_heads=1,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(settings).double().eval()
    for p in model.parameters():
        p.data += 0.5 * torch.randn_like(p)
        p.requires_grad_(False)
    return model


def text_of_ids(ids, end=None):
    documents = evaluate.document_numbers(ids, end)
    return evaluate.Text(ids, documents, int(documents.max()) + 1, ids[:, 1:].numel())


def cross_entropies_by_loss(model, ids, sae_x, sae_y):
    """transformers' own loss, and log-probabilities, with forward() of the MLP replaced."""
    module = model.gpt_neox.layers[0].mlp
    original = module.forward
    is_first = torch.arange(ids.shape[1]).view(1, -1, 1) == 0
    labels = ids.clone()
    labels[:, :2] = -100  # no prediction is counted at the first token

    def zero_x(x):
        return original(torch.zeros_like(x))

    def zero_y(x):
        return 0 * original(x)

    def patched_x(x):
        return original(sae_x(x))

    def patched_y(x):
        return sae_y(original(x))

    def patched_both(x):
        return sae_y(original(sae_x(x)))

    found = {}
    for change in (original, zero_x, zero_y, patched_x, patched_y, patched_both):

        def forward(x, change=change):
            return torch.where(is_first, original(x), change(x))

        module.forward = forward
        output = model(input_ids=ids, labels=labels)
        found[change.__name__] = output.loss.item(), output.logits[:, 1:-1].log_softmax(-1)
    module.forward = original
    return found


def test_cross_entropies_equal_transformers_own_loss():
    model = noisy_model()
    mlp = MLP.from_model(model, 0)
    sae_x, sae_y = random_pair()
    ids = random_ids(3, 12)
    measure = evaluate.CrossEntropy(model, mlp, sae_y, 3)
    with torch.no_grad():
        for batch_ids, tokens in evaluate.batches(model, mlp, sae_x, sae_y, text_of_ids(ids), ""):
            measure.add(batch_ids, tokens)
        expected = cross_entropies_by_loss(model, ids, sae_x, sae_y)
    found = measure.result()
    clean, log_p = expected["forward"]
    assert found["clean"].value == pytest.approx(clean)
    for site, name, ablation in (
        ("x", "patched_x", "zero_x"),
        ("y", "patched_y", "zero_y"),
        ("both", "patched_both", "zero_y"),
    ):
        sae, log_q = expected[name]
        ablated, _ = expected[ablation]
        score = (ablated - sae) / (ablated - clean)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
        values = evaluate.values_of(found[site])
        assert values["sae"] == pytest.approx(sae) and values["ablated"] == pytest.approx(ablated)
        assert values["kl"] == pytest.approx(kl)
        assert values["score"] == pytest.approx(score, rel=1e-4)  # their loss is in float32
        assert values["increase_ratio"] == pytest.approx(1 - values["score"])
    assert found["x"]["ablated"].value != pytest.approx(found["y"]["ablated"].value, rel=1e-3)


def test_a_prediction_belongs_to_the_document_of_its_target():
    model = noisy_model()
    mlp = MLP.from_model(model, 0)
    pair = random_pair()
    ids = torch.tensor([[0, 5, 0, 6, 7, 8]])  # the predictions at 5, 0, 6, 7 are of 0, 6, 7, 8
    measure = evaluate.CrossEntropy(model, mlp, pair[1], 2)
    with torch.no_grad():
        for batch_ids, tokens in evaluate.batches(model, mlp, *pair, text_of_ids(ids, 0), ""):
            measure.add(batch_ids, tokens)
    assert measure.sums["predictions"].tolist() == [1, 3]


def test_the_score_has_the_error_of_a_ratio_over_documents():
    model = noisy_model()
    mlp = MLP.from_model(model, 0)
    pair = random_pair()
    ids = random_ids(4, 9)
    measure = evaluate.CrossEntropy(model, mlp, pair[1], 4)
    with torch.no_grad():
        for batch_ids, tokens in evaluate.batches(model, mlp, *pair, text_of_ids(ids), ""):
            measure.add(batch_ids, tokens)
    sums = measure.sums
    gained = sums["y_ablated"] - sums["both"]
    possible = sums["y_ablated"] - sums["clean"]
    r = gained.sum() / possible.sum()
    error = (4 / 3 * (gained - r * possible).square().sum()).sqrt() / possible.sum().abs()
    score = measure.result()["both"]["score"]
    assert score == (pytest.approx(r.item()), pytest.approx(error.item())) and score.error > 0


# ---- 8. Evaluation: the Jacobian -----------------------------------------------------------------


def plain_tokens(J, s=None, document=None):
    """Tokens for a given J (B, k, k): all latents are active, latent i is number i."""
    B, k, _ = J.shape
    acts = torch.ones(B, k, dtype=DOUBLE) if s is None else s
    idx = torch.arange(k).expand(B, k)
    if document is None:
        document = torch.zeros(B, dtype=torch.long)
    x = torch.zeros(B, 1, dtype=DOUBLE)
    ones = torch.ones(B, k, dtype=DOUBLE)
    number = torch.arange(B)
    return evaluate.Tokens(number, document, x, x, Latents(acts, idx), Latents(ones, idx), x, x)


def measures_of(J, thresholds=(0.4, 0.6)):
    """The numbers of all measures of J alone."""
    k = J.shape[1]
    numbers = {}
    for measure in (
        evaluate.ElementsAbove(thresholds, k, 1),
        evaluate.Norms(1),
        evaluate.Concentration(k, 1),
        evaluate.Histogram("cpu"),
    ):
        measure.add(J[:1], plain_tokens(J[:1]))
        measure.add(J[1:], plain_tokens(J[1:]))
        numbers.update(evaluate.values_of(measure.result()))
    return numbers


def test_measures_of_jacobians_worked_by_hand():
    J = torch.zeros(3, 2, 2, dtype=DOUBLE)  # the third token has no active pair
    J[0, 0, 1] = -5.0
    J[1] = torch.tensor([[0.3, -0.3], [0.3, 0.3]])
    found = measures_of(J)
    assert found["thresholds"] == [0.4, 0.6]
    assert found["count_above"]["raw"] == pytest.approx([1 / 3, 1 / 3])
    assert found["paired"] == pytest.approx(2 / 3)  # and means over these two
    assert found["count_above"]["l1"] == pytest.approx([1 / 2, 1 / 2])
    assert found["count_above"]["l2"] == pytest.approx([5 / 2, 1 / 2])
    assert found["share_above"]["linf"] == pytest.approx([5 / 8, 5 / 8])
    assert found["mean_abs"] == pytest.approx(6.2 / 12)
    expected = {"l1": 6.2 / 3, "l2": 5.6 / 3, "l4": (5 + 0.3 * 2**0.5) / 3, "linf": 5.3 / 3}
    assert found["norms"] == pytest.approx(expected)
    assert found["mass"] == pytest.approx({"50": 3 / 2, "90": 5 / 2, "99": 5 / 2})
    assert found["hoyer"] == pytest.approx(1 / 2)  # 1 for one element, 0 for four equal ones
    pooled = 2 - (6.2 / 3) / math.sqrt(25.36 / 3)
    assert found["hoyer_pooled"] == pytest.approx(pooled)
    assert sum(found["histogram"]) == J.numel() and found["histogram"][-1] == 1
    assert found["histogram"][0] == 3 + 4 and sum(found["histogram"][299:302]) == 4


def test_scaling_every_jacobian_moves_only_the_measures_that_see_scale():
    J = normal(20, 5, 5)
    one = measures_of(J, (0.1,))
    small = measures_of(0.01 * J, (0.1,))
    for name in ("hoyer", "hoyer_pooled", "mass", "paired"):
        assert one[name] == pytest.approx(small[name])
    for scale in ("l1", "l2", "linf"):
        assert one["count_above"][scale] == pytest.approx(small["count_above"][scale])
    assert one["count_above"]["raw"][0] > 20 > small["count_above"]["raw"][0]
    assert one["norms"]["l4"] == pytest.approx(100 * small["norms"]["l4"])


def test_hoyer_of_one_element_is_not_defined():
    found = measures_of(torch.ones(2, 1, 1, dtype=DOUBLE))
    assert found["hoyer"] is None and found["hoyer_pooled"] is None and found["paired"] == 1


def test_errors_of_the_jacobians_numbers_are_over_documents():
    J = torch.tensor([1.0, 1.0, 3.0, 5.0], dtype=DOUBLE).view(4, 1, 1)
    document = torch.tensor([0, 0, 1, 1])
    measure = evaluate.Norms(2)
    measure.add(J, plain_tokens(J, document=document))
    # sums 2 and 8 of two tokens each, r = 2.5: sqrt(2 / 1 * (9 + 9)) / 4
    assert measure.result()["mean_abs"] == (2.5, pytest.approx(1.5))


def effective_inputs_of(J, s, n_documents=1, document=None):
    measure = evaluate.EffectiveInputs(0, n_documents)
    measure.add(J, plain_tokens(J, s, document))
    return measure.result()["effective_inputs"]


def test_effective_inputs_and_hub_worked_by_hand():
    J = torch.zeros(2, 3, 3, dtype=DOUBLE)
    J[0] = torch.tensor([[2.0, 0.0, 0.0], [1.0, -2.0, 0.0], [0.0, 0.0, 0.0]])
    s = torch.tensor([[1.0, 0.5, 9.0], [1.0, 1.0, 1.0]], dtype=DOUBLE)  # c: (2, 0, 0), (1, -1, 0)
    found = effective_inputs_of(J, s)  # the third row and the second token have no input
    assert found["value"].value == pytest.approx((1 + 2) / 2)
    assert found["hub"].value == pytest.approx((1 + 1 / 2) / 2)


def test_hub_tells_one_input_for_all_outputs_from_one_for_each():
    eye = torch.eye(4, dtype=DOUBLE).expand(3, 4, 4)
    column = torch.zeros(3, 4, 4, dtype=DOUBLE)
    column[:, :, 2] = 1.0
    s = uniform(3, 4) + 1
    for J, hub in ((eye, 1 / 4), (column, 1.0)):
        found = effective_inputs_of(J, s)
        assert found["value"].value == pytest.approx(1.0)
        assert found["hub"].value == pytest.approx(hub)
    alike = effective_inputs_of(1 / s.unsqueeze(1).expand(3, 4, 4), s)
    assert alike["value"].value == pytest.approx(4.0)


def test_no_rescaling_of_a_latent_changes_effective_inputs_or_hub():
    J = normal(50, 5, 5)
    s = uniform(50, 5, seed=1)
    a = uniform(5, seed=2) * 10  # of input latents: s_x,j grows, its decoder row shrinks
    b = uniform(5, seed=3) * 10  # of output latents
    before = effective_inputs_of(J, s)
    after = effective_inputs_of(J * b.unsqueeze(1) / a, s * a)
    assert after["value"].value == pytest.approx(before["value"].value)
    assert after["hub"].value == pytest.approx(before["hub"].value)
    assert 1 < before["value"].value < 5


def test_gaussian_jacobians_depend_on_the_seed_and_the_tokens_number_alone():
    J = normal(40, 4, 4)
    s = uniform(40, 4)
    s[:, 3] = 0  # ReLU cut it off
    tokens = plain_tokens(J, s)
    whole = evaluate.gaussian_jacobian(tokens, 5)
    part = evaluate.gaussian_jacobian(evaluate.part_of(tokens, slice(13, 20)), 5)
    assert torch.equal(whole[13:20], part) and (whole[:, :, 3] == 0).all()
    assert not torch.equal(whole, evaluate.gaussian_jacobian(tokens, 6))
    drawn = whole[:, :, :3]
    assert abs(drawn.mean()) < 0.2 and abs(drawn.std() - 1) < 0.1


def test_the_gaussian_baseline_is_what_the_activations_alone_give():
    J = torch.zeros(400, 4, 4, dtype=DOUBLE)
    J[:, :, 0] = 1.0
    equal = torch.ones(400, 4, dtype=DOUBLE)
    uneven = equal * torch.tensor([100.0, 1.0, 1.0, 1.0])
    found = effective_inputs_of(J, equal)
    assert found["value"].value == 1.0 and 2 < found["gaussian"].value < 3
    assert found["hub"].value == 1.0 and found["hub_gaussian"].value < 0.6
    uneven = effective_inputs_of(J, uneven)
    assert uneven["gaussian"].value < 1.2 and uneven["hub_gaussian"].value > 0.9


def test_effective_inputs_have_errors_over_documents_by_pairs():
    J = torch.ones(3, 2, 2, dtype=DOUBLE)
    J[0, :, 1] = 0  # 1 effective input, twice; then 2 effective inputs, four times
    s = torch.ones(3, 2, dtype=DOUBLE)
    found = effective_inputs_of(J, s, 2, torch.tensor([0, 1, 1]))["value"]
    r = 10 / 6
    error = math.sqrt(2 * ((2 - 2 * r) ** 2 + (8 - 4 * r) ** 2)) / 6
    assert found == (pytest.approx(r), pytest.approx(error))


def random_tokens():
    """2000 tokens, their J and it in full, of a pair whose ReLU cuts latents off on both sides."""
    pair = random_pair(b_enc=-1.5)
    pair[1].b_enc.data -= 10  # the outputs are larger
    mlp = random_mlp()
    tokens = tokens_of(pair, mlp, normal(2000, 10))
    J = active_jacobian(*pair, mlp, tokens.x, tokens.s_x, tokens.s_y).detach()
    dense = torch.zeros(2000, 30, 30, dtype=DOUBLE)
    active_x = torch.zeros(2000, 30, dtype=torch.bool)
    active_y = torch.zeros(2000, 30, dtype=torch.bool)
    for b in range(2000):
        s_x = Latents(tokens.s_x.acts[b], tokens.s_x.idx[b])
        s_y = Latents(tokens.s_y.acts[b], tokens.s_y.idx[b])
        dense[b][s_y.idx.unsqueeze(1), s_x.idx] = J[b]
        active_x[b, s_x.idx[s_x.acts > 0]] = True
        active_y[b, s_y.idx[s_y.acts > 0]] = True
    assert (tokens.s_x.acts == 0).any() and (tokens.s_y.acts == 0).any()
    return tokens, J, dense, active_x, active_y


def add_in_parts(measure, J, tokens):
    for part in torch.arange(len(J)).split(300):
        measure.add(J[part], evaluate.part_of(tokens, part))
    return measure


def test_global_jacobian_is_the_mean_over_the_output_latents_tokens():
    tokens, J, dense, _, active_y = random_tokens()
    measure = evaluate.GlobalJacobian(30, (0.02, 0.1), 0, "cpu")
    found = add_in_parts(measure, J, tokens).result()
    mean = dense.abs().sum(0) / active_y.sum(0).clamp(min=1).unsqueeze(1)
    expected = [(mean > t).double().mean().item() for t in (0.02, 0.1)]
    assert found == {"rows": 30, "share_above": expected} and 0 < expected[1] < expected[0]


def test_global_jacobian_of_many_latents_is_of_a_sample_of_rows():
    measure = evaluate.GlobalJacobian(8192, (0.1,), 0, "cpu")
    assert measure.result() == {"rows": 2048, "share_above": [0.0]}
    assert sorted(measure.row_of[measure.row_of >= 0].tolist()) == list(range(2048))


def test_pictures_are_of_the_same_tokens_under_every_pair_and_sorted():
    J = normal(50, 3, 3)
    text = evaluate.Text(torch.arange(55).view(5, 11), None, 1, 50)
    shown = []
    for scale in (1, 2):
        measure = evaluate.Pictures(50, seed=3)
        tokens = plain_tokens(J)
        for part in torch.arange(50).split(20):
            measure.add(scale * J[part], evaluate.part_of(tokens, part))
        shown.append(measure.result(text, None))
    one, two = shown
    assert [p["token"] for p in one] == [p["token"] for p in two] and len(one) == 3
    for picture in one:
        A = np.array(picture["J"])
        assert (np.diff(A.sum(0)) <= 1e-9).all() and (np.diff(A.sum(1)) <= 1e-9).all()
        expected = J[picture["token"]].abs().flatten().sort().values
        assert np.allclose(np.sort(A.flatten()), expected)
        context, place = divmod(picture["token"], 10)
        assert picture["text"].split()[-1] == str(context * 11 + place + 1)


# ---- 8. Evaluation: linearity --------------------------------------------------------------------


def class_by_lstsq(t, v, relative):
    """The authors' way, one pair at a time: least squares, on all points or beside a run of zeros."""
    top = np.abs(v).max()

    def straight(t, v):
        A = np.stack([t, np.ones_like(t)], 1)
        residual = np.abs(A @ np.linalg.lstsq(A, v, rcond=None)[0] - v).max()
        span = max(v.max() - v.min(), 1e-4 * top) if relative else 1
        return residual < 0.01 * span + 1e-30

    if straight(t, v):
        return 0
    zero = np.flatnonzero(v == 0)
    one_run = len(zero) > 0 and len(zero) == zero[-1] - zero[0] + 1
    rest = v != 0
    if one_run and (zero[0] == 0 or zero[-1] == len(v) - 1) and rest.sum() >= 2:
        return 1 if straight(t[rest], v[rest]) else 2
    return 2


@pytest.mark.parametrize("relative", [False, True])
def test_classes_equal_those_of_one_least_squares_fit_per_pair(relative):
    g = torch.Generator().manual_seed(0)
    t = torch.linspace(0, 1, 100, dtype=DOUBLE) * (5 + torch.rand(400, 1, generator=g))
    slope, bend, cut, size = normal(4, 400, 1, seed=1)
    is_bent = torch.arange(400).view(-1, 1) % 3 > 0
    v = 3 + slope * t + 0.01 * bend * t**2 * is_bent
    v = torch.where((t < 2 + cut) == (bend > 0), v, 0) * 10 ** (2 * size - 1)
    v[:40] = v[:40, :1]  # flat
    v[40:60, 50:60] = 0  # a run of zeros that touches no end
    v[60:80, :99] = 0  # too few points beside it
    v[60:80, 99] = 1.0
    test = evaluate.is_line_by_range if relative else evaluate.is_line
    ours = evaluate.classify(t, v, test).tolist()
    expected = []
    for a, b in zip(t.numpy(), v.numpy()):
        expected.append(class_by_lstsq(a, b, relative))
    assert ours == expected and {0, 1, 2} <= set(ours)


def some_pairs(pair, mlp, n=8):
    """Pairs of the tokens' output latent in place 2 and input latent in place 1."""
    x = normal(n, 10)
    tokens = tokens_of(pair, mlp, x)
    J = active_jacobian(*pair, mlp, x, tokens.s_x, tokens.s_y)[:, 2, 1].detach()
    pairs = evaluate.Pairs(
        x, tokens.s_x.acts[:, 1], tokens.s_y.idx[:, 2], tokens.s_x.idx[:, 1], J, torch.arange(n)
    )
    return pairs, tokens


def test_a_function_of_one_latent_moves_the_true_x_along_its_decoder_row(monkeypatch):
    pair = random_pair()
    mlp = random_mlp()
    pairs, tokens = some_pairs(pair, mlp)
    monkeypatch.setattr(evaluate, "CHUNK_BYTES", 5 * 30 * 8)  # five points at a time
    t = torch.stack([pairs.s, pairs.s + 1e-6, torch.full_like(pairs.s, 0.7)], 1)
    with torch.no_grad():
        v = evaluate.along_latent(*pair, mlp, pairs, t)
    torch.testing.assert_close(v[:, 0], tokens.s_y.acts[:, 2])  # at s itself nothing has changed
    torch.testing.assert_close((v[:, 1] - v[:, 0]) / 1e-6, pairs.J, rtol=1e-3, atol=1e-5)
    for b in range(8):
        moved = pairs.x[b] + (0.7 - pairs.s[b]) * pair[0].W_dec[pairs.j[b]]
        acts, idx = pair[1].encode(mlp(moved))
        expected = (acts * (idx == pairs.i[b])).sum().item()
        assert v[b, 2].item() == pytest.approx(expected, abs=1e-9)


def test_the_grid_reaches_from_zero_to_five_or_one_above_s():
    s = torch.tensor([1.0, 8.0], dtype=DOUBLE)
    pairs = evaluate.Pairs(None, s, None, None, None, None)
    t = evaluate.grid_of(pairs)
    assert t.shape == (2, 100) and t[:, 0].tolist() == [0, 0] and t[:, -1].tolist() == [5, 9]


def test_shares_of_classes_and_of_changes_worked_by_hand():
    shares = evaluate.class_shares(torch.tensor([0, 0, 2, 1, 0]))
    assert shares == pytest.approx({"linear": 0.6, "jumprelu": 0.2, "other": 0.2})
    J = torch.tensor([0.5, 0.05, -2.0, 0.3], dtype=DOUBLE)
    delta = torch.tensor([-0.5, -3.0, 1.0, -0.35], dtype=DOUBLE)
    assert evaluate.change_by_one(J, delta) == pytest.approx(
        {"on_line": 0.5, "cluster": 0.25, "outlier": 0.25, "on_line_relative": 0.25}
    )


def test_second_derivatives_of_a_parabola_and_the_class_of_each_function(monkeypatch):
    monkeypatch.setattr(evaluate, "along_latent", lambda *args: -1.5 * args[-1] ** 2)
    s = torch.tensor([1.0, 8.0, 2.0])
    pairs = evaluate.Pairs(torch.zeros(3, 10), s, s.long(), s.long(), s, s)
    found = evaluate.second_derivatives(*random_pair(), random_mlp(), pairs, [0, 2, 1])
    assert found["mean"] == pytest.approx([-3.0] * 3)
    assert found["mean_abs"] == pytest.approx([3.0] * 3) == found["max_abs"]
    assert found["class"] == ["linear", "other", "jumprelu"]


def test_pairs_are_drawn_among_active_latents_with_their_own_numbers():
    pair = random_pair(b_enc=-1.5)
    pair[1].b_enc.data -= 10
    mlp = random_mlp()
    tokens = tokens_of(pair, mlp, normal(200, 10))
    options = small_options("--linear-samples", "500")
    linearity = evaluate.Linearity(*pair, mlp, options, 200)
    with torch.no_grad():
        pairs = linearity.drawn_among(tokens)
    assert 50 < len(pairs.s) < 500 and (pairs.s > 0).all()  # the rest had a latent cut off
    J = active_jacobian(*pair, mlp, tokens.x, tokens.s_x, tokens.s_y)
    for n in range(0, len(pairs.s), 10):
        b = (tokens.x == pairs.x[n]).all(1).nonzero().item()
        row = (tokens.s_y.idx[b] == pairs.i[n]).nonzero().item()
        column = (tokens.s_x.idx[b] == pairs.j[n]).nonzero().item()
        assert pairs.J[n].item() == pytest.approx(J[b, row, column].item())
        assert pairs.s[n] == tokens.s_x.acts[b, column] and tokens.s_y.acts[b, row] > 0


def test_each_second_derivative_has_the_class_of_its_own_function():
    pair = random_pair()
    mlp = random_mlp()
    tokens = tokens_of(pair, mlp, normal(60, 10))
    options = small_options("--linear-samples", "80", "--second-samples", "80")
    linearity = evaluate.Linearity(*pair, mlp, options, 60)
    with torch.no_grad():
        for part in torch.arange(60).split(25):
            linearity.add(evaluate.part_of(tokens, part))
        found = linearity.result()
    second = found["second"]
    assert len(second["class"]) == found["samples"] > 20
    counts = {name: second["class"].count(name) / found["samples"] for name in evaluate.CLASSES}
    assert counts == pytest.approx({name: found[name] for name in evaluate.CLASSES})
    sizes = {name: [0.0] for name in evaluate.CLASSES}
    for name, size in zip(second["class"], second["max_abs"]):
        sizes[name].append(size)
    assert max(sizes["linear"]) < 10 < min(sizes["jumprelu"][1:], default=11)  # jumps are huge


# ---- 8. Evaluation: latents and examples ---------------------------------------------------------


def test_the_strength_of_an_output_latent_is_a_mean_over_its_active_pairs():
    tokens, J, dense, active_x, active_y = random_tokens()
    strength = add_in_parts(evaluate.OutputStrength(30, "cpu"), J, tokens)
    pairs = active_y.unsqueeze(2) & active_x.unsqueeze(1)
    n_pairs = pairs.sum((0, 2))
    expected = dense.abs().sum((0, 2)) / n_pairs
    torch.testing.assert_close(strength.mean_abs(), expected, equal_nan=True)
    assert strength.tokens.tolist() == active_y.sum(0).tolist()
    often = (active_y.sum(0) >= 10) & (n_pairs > 0)
    order = expected.where(often, -1.0).argsort(descending=True).tolist()
    assert strength.strongest(4) == order[:4] and len(strength.strongest(30)) == often.sum()


def test_a_planted_strength_is_found_where_most_inputs_are_cut_off():
    J = torch.zeros(20, 4, 4, dtype=DOUBLE)
    J[:, :, 0] = 0.286
    s = torch.zeros(20, 4, dtype=DOUBLE)
    s[:, 0] = 1.0
    strength = evaluate.OutputStrength(4, "cpu")
    strength.add(J, plain_tokens(J, s))
    assert strength.mean_abs().tolist() == pytest.approx([0.286] * 4)


def test_the_strongest_of_many_latents_is_found_wherever_it_is():
    n = 8192  # more than GlobalJacobian has rows
    rows = evaluate.GlobalJacobian(n, (0.1,), 0, "cpu").row_of
    outside = (rows < 0).nonzero()[0].item()
    inside = (rows >= 0).nonzero()[0].item()
    J = torch.ones(12, 2, 2, dtype=DOUBLE)
    J[:, 1] = 0.5
    tokens = plain_tokens(J)
    idx = torch.tensor([outside, inside]).expand(12, 2)
    tokens = tokens._replace(s_y=Latents(tokens.s_y.acts, idx))
    strength = evaluate.OutputStrength(n, "cpu")
    strength.add(J, tokens)
    assert strength.strongest(8) == [outside, inside]


def test_edges_are_the_means_over_tokens_where_both_latents_are_active():
    tokens, J, dense, active_x, active_y = random_tokens()
    strength = add_in_parts(evaluate.OutputStrength(30, "cpu"), J, tokens)
    chosen = strength.strongest(3)
    edges = evaluate.Edges(chosen, 30, "cpu")
    concerned = edges.concerned(tokens)
    assert torch.equal(concerned, active_y[:, chosen].any(1)) and not concerned.all()
    add_in_parts(edges, J[concerned], evaluate.part_of(tokens, concerned))
    found = edges.result(strength)
    assert [latent["latent"] for latent in found] == chosen
    for latent in found:
        assert len(latent["inputs"]) > 3
        for edge in latent["inputs"]:
            both = active_y[:, latent["latent"]] & active_x[:, edge["latent"]]
            values = dense[both, latent["latent"], edge["latent"]]
            assert edge["count"] == len(values) >= 10
            assert edge["mean"] == pytest.approx(values.mean().item())
            assert edge["std"] == pytest.approx(values.std(correction=0).item(), abs=1e-7)
            assert edge["mean_abs"] == pytest.approx(values.abs().mean().item())


def test_edges_are_ranked_without_counting_absent_inputs_as_zero():
    B, k = 100, 13
    J = torch.zeros(B, k, k, dtype=DOUBLE)
    s = torch.zeros(B, k, dtype=DOUBLE)
    for j in range(k):  # input j is active on 10 tokens (0), on 9 (1), or on all, and ever weaker
        n = {0: 10, 1: 9}.get(j, B)
        s[:n, j] = 1.0
        J[:n, 0, j] = {0: 1.0, 1: 9.0}.get(j, 0.5 / (j + 1))
    edges = evaluate.Edges([0], k, "cpu")
    edges.add(J, plain_tokens(J, s))
    inputs = edges.inputs_of(0)
    assert [edge["latent"] for edge in inputs] == [0, *range(2, 11)]
    assert inputs[0]["mean"] == 1.0 and inputs[0]["count"] == 10


def test_examples_are_the_windows_where_a_latent_is_largest():
    model = noisy_model()
    mlp = MLP.from_model(model, 0)
    _, sae_y = random_pair()
    ids = random_ids(13, 32)
    with torch.no_grad():
        x = jsae.mlp_inputs(model, mlp, ids)[:, 1:]  # (13, 31, 10)
        acts, idx = sae_y.encode(mlp(x))
    dense = torch.zeros(13, 31, 30, dtype=DOUBLE).scatter(2, idx, acts)
    latent = (dense.amax(1) > 0).sum(0).argmax().item()  # active in most contexts
    values = dense[..., latent]
    expected = torch.stack([values[:, :16].amax(1), values[:, 16:].amax(1)]).flatten()
    top = expected[expected > 0].sort(descending=True).values[:12]
    assert len(top) == 12 and top[0] > 1.05 * top[-1]

    measure = evaluate.Examples([latent])
    for part in torch.arange(13).split(5):
        measure.add(ids[part], Latents(acts[part].flatten(0, 1), idx[part].flatten(0, 1)))
    found = measure.result(None)[latent]
    assert [example["max"] for example in found] == pytest.approx(top.tolist(), abs=1e-4)
    words = ["".join(f" {i}" for i in row) for row in ids[:, 1:].tolist()]
    assert {len(example["tokens"]) for example in found} == {15, 16}  # 31 are cut into 16 and 15
    for example in found:
        assert example["max"] == pytest.approx(max(example["acts"]), abs=1e-4)
        assert any("".join(example["tokens"]) in text for text in words)


# ---- 8. Evaluation: one run ----------------------------------------------------------------------


def flat(value, path=""):
    """{dotted path: leaf}."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        return {path: value}
    leaves = {}
    for name, part in items:
        leaves.update(flat(part, f"{path}.{name}"))
    return leaves


def test_the_size_of_chunks_changes_no_number(finished, monkeypatch):
    options = small_options("--dtype", "float64", "--tokens", "200")
    one = flat(evaluate.evaluate(finished, options))
    monkeypatch.setattr(evaluate, "CHUNK_BYTES", 2 * 8 * 32 * 2560)  # two contexts, few tokens
    other = flat(evaluate.evaluate(finished, options))
    assert one.keys() == other.keys() and len(one) > 1000
    for path, value in one.items():
        if isinstance(value, float):
            value = pytest.approx(value, rel=1e-9, abs=1e-11)
        assert other[path] == value, path


def test_no_large_tensor_is_made_of_more_than_a_chunk(finished, monkeypatch):
    limit = 20 * 64 * 4
    monkeypatch.setattr(evaluate, "CHUNK_BYTES", limit)  # 20 tokens, a context has 31
    largest = {"encode": 0, "contexts": 0}
    encode = TopKSAE.encode
    inputs = jsae.mlp_inputs

    def watched_encode(sae, x):
        largest["encode"] = max(largest["encode"], len(x) * len(sae.W_enc) * 4)
        return encode(sae, x)

    def watched_inputs(model, mlp, ids):
        largest["contexts"] = max(largest["contexts"], len(ids))
        return inputs(model, mlp, ids)

    monkeypatch.setattr(TopKSAE, "encode", watched_encode)
    monkeypatch.setattr(jsae, "mlp_inputs", watched_inputs)
    options = small_options("--tokens", "100", "--second-samples", "0", "--linear-samples", "5")
    evaluate.evaluate(finished, options)
    assert 0 < largest["encode"] <= limit and largest["contexts"] == 1


def test_the_text_is_read_and_tokenized_once(finished, monkeypatch):
    calls = []
    original = jsae.token_contexts

    def counted(*args, **kwargs):
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(jsae, "token_contexts", counted)
    result = evaluate.evaluate(finished, small_options())
    assert len(calls) == 1 and any(result["examples"]["y"].values())


def test_evaluation_holds_every_path_of_the_design(finished):
    thresholds = ("1e-6", "1e-5", "0.1", "0.2", "0.3")  # the random model's J is small
    result = evaluate.evaluate(finished, small_options("--thresholds", *thresholds))
    numbers = [
        *(f"reconstruction.{s}.{n}" for s in "xy" for n in ("mse", "fvu", "cosine", "active")),
        *(f"reconstruction.{s}.{n}" for s in "xy" for n in ("silent", "explained_variance")),
        *(f"ce.{s}.{n}" for s in ("x", "y", "both") for n in ("sae", "ablated", "score", "kl")),
        *(f"ce.{s}.increase_ratio" for s in ("x", "y", "both")),
        *(f"jacobian.norms.{n}" for n in ("l1", "l2", "l4", "linf")),
        *(f"jacobian.mass.{n}" for n in ("50", "90", "99")),
        *(f"jacobian.{n}" for n in ("hoyer", "hoyer_pooled", "paired", "mean_abs")),
        *(f"jacobian.count_above.{s}.0" for s in ("raw", "l1", "l2", "linf")),
        *(f"jacobian.share_above.{s}.4" for s in ("raw", "l1", "l2", "linf")),
        *(f"jacobian.effective_inputs.{n}" for n in ("value", "gaussian", "hub", "hub_gaussian")),
        *(f"linearity.{n}" for n in ("linear", "jumprelu", "other", "on_line", "relative.other")),
        *("ce.clean", "global.rows", "global.share_above.0", "tokens", "documents", "seed"),
        *("training.dead_x", "training.dead_y"),
    ]
    for path in numbers:
        assert math.isfinite(evaluate.follow(result, path)), path
    assert result["penalty"] == "l1" and "torch" in result["versions"]
    with_errors = [
        *(f"ce.{s}.score" for s in ("x", "y", "both")),
        *(f"reconstruction.{s}.explained_variance" for s in "xy"),
        *("jacobian.mean_abs", "jacobian.effective_inputs.value"),
        *(f"jacobian.count_above.{s}" for s in ("raw.0", "l1.2", "l2.2", "linf.2")),
    ]
    for path in with_errors:
        assert evaluate.follow(result["standard_error"], path) > 0, path
    assert "linearity" not in result["standard_error"]


def test_effective_inputs_of_a_run_are_those_of_the_formula(finished):
    options = small_options("--dtype", "float64")
    found = evaluate.evaluate(finished, options)["jacobian"]["effective_inputs"]
    opened = evaluate.open_run(finished, options)
    sae_x, sae_y, mlp, model = opened[:4]
    text = evaluate.held_out_text(opened.settings, opened.part, model, opened.tokenizer, 400, 0)
    with torch.no_grad():
        x = jsae.mlp_inputs(model, mlp, text.ids)[:, 1:].flatten(0, 1)
        s_x = sae_x.encode(x)
        J = active_jacobian(sae_x, sae_y, mlp, x, s_x, sae_y.encode(mlp(x)))
    effective = []
    hubs = []
    for b in range(len(x)):
        rows = []
        for i in range(4):
            c = J[b, i] * s_x.acts[b]
            if c.square().sum() > 0:
                rows.append(c.square() / c.square().sum())
        effective += [1 / row.square().sum().item() for row in rows]
        if rows:
            hubs.append(torch.stack(rows).mean(0).max().item())
    assert found["value"] == pytest.approx(np.mean(effective))
    assert found["hub"] == pytest.approx(np.mean(hubs))


def set_weights(run, change):
    """Change the saved tensors of both SAEs: change(tensors) works in place."""
    for name in ("sae_x", "sae_y"):
        path = run / name / "sae_weights.safetensors"
        tensors = safetensors.torch.load_file(path)
        change(tensors)
        safetensors.torch.save_file(tensors, path)


def no_constant(text):
    raise AssertionError(f"{text} is no JSON")


def test_a_pair_without_any_active_latent_is_evaluated_as_far_as_it_is_defined(run_copy):
    set_weights(run_copy, lambda tensors: tensors["b_enc"].fill_(-1e6))
    assert evaluate.main([str(run_copy), *SMALL, "--latents", "5"]) == 0
    text = (run_copy / "evaluation.json").read_text()
    result = json.loads(text, parse_constant=no_constant)
    assert result["reconstruction"]["x"]["silent"] == 64
    assert math.isfinite(result["ce"]["both"]["score"])
    assert result["jacobian"]["paired"] == 0 == result["jacobian"]["mean_abs"]
    for path in ("hoyer", "hoyer_pooled", "mass.50", "effective_inputs.value", "count_above.l2.0"):
        assert evaluate.follow(result["jacobian"], path) is None
    assert result["linearity"]["samples"] == 0 and result["linearity"]["linear"] is None
    assert result["latents"][0]["mean_abs"] is None
    assert (run_copy / "report.html").exists()


def test_contexts_of_two_tokens_have_no_cross_entropy_and_all_else(run_copy):
    edited(run_copy, config={"context_size": 2})
    assert evaluate.main([str(run_copy), *SMALL]) == 0
    text = (run_copy / "evaluation.json").read_text()
    result = json.loads(text, parse_constant=no_constant)
    assert result["ce"]["clean"] is None and result["ce"]["x"]["score"] is None
    assert math.isfinite(result["jacobian"]["hoyer"])


def test_a_run_on_the_hub_is_evaluated_by_its_id(
    finished, text_file, tmp_path, monkeypatch, capsys
):
    hub = shutil.copytree(finished, tmp_path / "hub")
    (hub / "metrics.jsonl").unlink()  # is not downloaded
    monkeypatch.setattr(jsae, "snapshot_download", lambda *args, **kwargs: str(hub))
    monkeypatch.chdir(tmp_path)
    flags = ["--dataset", str(text_file), "--plot", "lr", "tokens"]
    assert evaluate.main(["someone/some-pair", *SMALL, *flags]) == 0
    assert "| dead latents, in training: x / y | - / - |" in capsys.readouterr().out
    folder = Path("someone--some-pair")
    names = {path.name for path in folder.iterdir()}
    assert names == {"evaluation.json", "figures", "report.html"}
    assert not (hub / "evaluation.json").exists()


# ---- 8. Evaluation: table, figures, report -------------------------------------------------------


@pytest.fixture(scope="session")
def evaluated(finished):
    """What evaluation.json of the finished run holds, as read from it."""
    result = evaluate.evaluate(finished, small_options())
    return json.dumps({**result, "run": "runs/a"})


def variants(evaluated, *changes):
    """Copies of the result, each with (path, value) pairs changed."""
    results = []
    for number, change in enumerate(changes):
        result = json.loads(evaluated)
        result["run"] = f"runs/{'abcdef'[number]}"
        for path, value in change.items():
            *parents, last = path.split(".")
            place = evaluate.follow(result, ".".join(parents)) if parents else result
            place[int(last) if isinstance(place, list) else last] = value
        results.append(result)
    return results


def test_the_program_writes_numbers_figures_and_a_report(run_copy, finished, tmp_path, capsys):
    second = shutil.copytree(finished, tmp_path / "second")
    edited(second, config={"jacobian_coef": 0.0})
    set_weights(second, lambda tensors: tensors["W_enc"].mul_(0.5))
    plot = ["--plot", "jacobian_coef", "jacobian.hoyer"]
    assert evaluate.main([str(run_copy), str(second), *SMALL, *plot]) == 0
    out = capsys.readouterr().out
    saved = json.loads((run_copy / "evaluation.json").read_text())
    assert "|  | lambda 1 | lambda 0 |" in out and f"lambda 0: {second}; 403 tokens" in out
    hoyer = f"{saved['jacobian']['hoyer']:.4g} ± {saved['standard_error']['jacobian']['hoyer']:.2g}"
    assert f"| Hoyer sparsity of J | {hoyer} |" in out
    assert "±, one run: standard error over documents" in out
    dead = json.loads((run_copy / "metrics.jsonl").read_text().splitlines()[-1])
    row = f"| dead latents, in training: x / y | {dead['dead_x']} / {dead['dead_y']} |"
    assert row in out and "silent latents, on this text: x / y" in out
    figures = {path.stem for path in (run_copy / "figures").glob("*.png")}
    assert figures == {"first_look", "overview", "histogram", "functions", "plots"}
    page = (run_copy / "report.html").read_text()
    assert page.count("<div class=wide>") == 6 and ".wide { overflow-x: auto }" in page
    assert "<script" not in page and page.count("data:image/png;base64,") == 5
    sources = re.findall(r'(?:src|href)="([^"]*)', page)
    assert all(source.startswith("data:") for source in sources)
    assert page.count("<details>") == page.count("</details>") > 6
    assert page.count("what the rows mean") == 1
    assert page.count(html.escape(evaluate.LATENTS_EXPLAINED)) == 2
    assert not (second / "report.html").exists()


def test_reuse_takes_what_was_evaluated_as_it_is(run_copy, evaluated, monkeypatch):
    monkeypatch.setattr(evaluate, "draw", lambda *args: [("a.png", "a", b"")])
    path = run_copy / "evaluation.json"
    path.write_text(evaluated)
    monkeypatch.setattr(evaluate, "evaluate", None)
    assert evaluate.main([str(run_copy), "--reuse"]) == 0
    assert path.read_text() == evaluated


def test_runs_that_differ_in_the_seed_only_are_one_column(evaluated):
    results = variants(
        evaluated,
        {"config.seed": 7, "config.output_dir": "elsewhere", "jacobian.hoyer": 0.25},
        {"jacobian.hoyer": 0.35},
        {"config.jacobian_coef": 0.5, "jacobian.hoyer": 0.5},
    )
    groups = evaluate.grouped(results)
    assert [[r["run"] for r in group] for group in groups] == [["runs/a", "runs/b"], ["runs/c"]]
    assert evaluate.measured(groups[0], "jacobian.hoyer") == (0.3, pytest.approx(0.1 / 2**0.5))
    error = results[2]["standard_error"]["jacobian"]["hoyer"]
    assert evaluate.measured(groups[1], "jacobian.hoyer") == (0.5, error)
    labels = evaluate.labels_of(groups)
    assert labels == ["lambda 1", "lambda 0.5"]
    cells = {row[0]: row[1:] for row in evaluate.table_cells(groups, labels)}
    assert cells["Hoyer sparsity of J"][0] == "0.3 ± 0.071"
    lines = evaluate.legend_lines(groups, labels)
    assert lines[0].startswith("lambda 1: runs/a, runs/b;")
    assert lines[-1] == "±, several runs: standard deviation over their seeds"


@pytest.mark.parametrize(
    "path, value",
    [
        ("options.seed", 1),
        ("options.linear_samples", 61),
        ("options.dtype", "float64"),
        ("options.split", "test"),
        ("options.tokens", 401),
        ("penalty", "l1_of_rows"),
        ("text", "other.txt"),
        ("text_part", "all"),
        ("config.k", 5),
        ("text_sha256", "0"),
    ],
)
def test_runs_that_were_trained_or_evaluated_otherwise_are_not_merged(path, value, evaluated):
    results = variants(evaluated, {"config.seed": 7}, {path: value})
    groups = evaluate.grouped(results)
    assert len(groups) == 2
    one, other = evaluate.labels_of(groups)
    assert one != other and str(value) in other


def test_random_controls_of_several_seeds_are_merged_though_their_weights_differ(evaluated):
    control = {"config.randomize_weights": "init"}
    results = variants(
        evaluated,
        control | {"mlp_sha256": "1"},
        control | {"mlp_sha256": "2", "config.seed": 7},
    )
    assert len(evaluate.grouped(results)) == 1


def test_one_run_given_twice_is_refused(evaluated):
    with pytest.raises(InputError, match="runs/a and runs/b are one run given twice"):
        evaluate.grouped(variants(evaluated, {}, {}))


def test_one_group_is_called_by_its_folder(evaluated):
    assert evaluate.labels_of(evaluate.grouped(variants(evaluated, {}))) == ["a"]


def test_rows_of_the_table_are_data_with_paths_that_exist(evaluated):
    result = json.loads(evaluated)
    rows = evaluate.table_of(result["jacobian"]["thresholds"])
    for row in rows:
        for path in row.paths.values():
            assert isinstance(evaluate.follow(result, path), (int, float)), path
    above = next(row for row in rows if row.title == "elements with |J| above")
    assert list(above.paths) == ["0.005", "0.01", "0.015", "0.02", "0.04"]


def test_the_overview_shows_only_what_differs(evaluated):
    results = variants(
        evaluated,
        {"jacobian.hoyer": 0.2},
        {"jacobian.hoyer": 0.3, "config.jacobian_coef": 0.0, "jacobian.mean_abs": None},
    )
    results[0]["jacobian"]["norms"]["l2"] = 1.001 * results[1]["jacobian"]["norms"]["l2"]
    groups = evaluate.grouped(results)
    figure, caption = evaluate.draw_overview(groups, evaluate.labels_of(groups))
    shown = [ax.get_title() for ax in figure.axes if ax.get_visible()]
    assert shown == ["mean |J|", "Hoyer sparsity of J"]
    assert "figure" not in caption  # neither of these is one of the paper
    assert evaluate.draw_overview(groups[:1], ["a"]) is None
    undefined = evaluate.grouped(variants(evaluated, {"training": None, "jacobian.hoyer": None}))
    assert evaluate.draw_overview(undefined, ["a"]) is None


def test_an_undefined_number_has_no_bar(evaluated):
    results = variants(evaluated, {"jacobian.hoyer": None}, {"config.jacobian_coef": 0.0})
    figure, _ = evaluate.draw_overview(evaluate.grouped(results), ["a", "b"])
    (panel,) = [ax for ax in figure.axes if ax.get_title() == "Hoyer sparsity of J"]
    undefined, defined = [bar.get_height() for bar in panel.patches]
    assert math.isnan(undefined)
    assert defined > 0


def test_the_overview_names_the_figures_of_its_panels(evaluated):
    results = variants(
        evaluated, {"config.k": 5}, {"jacobian.norms.l1": 1e9, "linearity.linear": 2.0}
    )
    groups = evaluate.grouped(results)
    _, caption = evaluate.draw_overview(groups, evaluate.labels_of(groups))
    assert caption.endswith("(figures 35, 8b)")


def test_the_first_look_is_of_a_traditional_pair_and_a_jsae_on_the_same_tokens(evaluated):
    traditional = {"config.jacobian_coef": 0.0}
    other_layer = {**traditional, "config.layer": 2}
    results = variants(evaluated, {}, other_layer, {**traditional, "config.seed": 9})
    groups = evaluate.grouped(results)
    shown = evaluate.first_look_groups(groups)
    assert [group[0]["run"] for group in shown] == ["runs/c", "runs/a"]
    assert evaluate.first_look_groups(groups[:2]) == groups[:1]
    for picture in shown[1][0]["pictures"]:
        picture["J"] = (0.1 * np.array(picture["J"])).tolist()
    figure, _ = evaluate.draw_first_look(groups)
    axes = [ax for ax in figure.findobj() if hasattr(ax, "get_images") and ax.get_images()]
    darkest = [ax.get_images()[0].get_clim()[1] for ax in axes]
    assert len(darkest) == 6  # each pair on its own scale
    assert darkest[3:] == pytest.approx([0.1 * value for value in darkest[:3]])


def test_captions_name_figure_14_only_if_a_function_of_class_other_is_there():
    linearity = {"examples": {"other": []}, "second": {"class": ["linear"]}}
    caption = evaluate.functions_caption([linearity])
    assert "13" in caption and "14" not in caption and "12" not in caption
    linearity = {"examples": {"other": [[[0], [0]]]}, "second": {"class": ["linear", "other"]}}
    assert "14" in evaluate.functions_caption([linearity])
    linearity = {"examples": {"other": []}, "second": {"class": []}}
    assert "13" not in evaluate.functions_caption([linearity])


def test_figures_are_900_pixels_wide_or_more_and_white_whatever_the_users_style(evaluated):
    import matplotlib

    groups = evaluate.grouped(variants(evaluated, {}))
    with matplotlib.rc_context({"figure.facecolor": "black", "savefig.facecolor": "black"}):
        figures = evaluate.draw(groups, ["a"], [], "penalty")
        assert matplotlib.rcParams["figure.facecolor"] == "black"
    assert [name for name, _, _ in figures] == ["first_look.png", "histogram.png", "functions.png"]
    import io

    for _, _, png in figures:
        image = matplotlib.image.imread(io.BytesIO(png))
        assert image.shape[1] == 1350 and (image[0, 0, :3] == 1).all()


def test_a_plot_has_a_point_for_each_group_in_order_of_lambda(evaluated):
    results = variants(
        evaluated,
        {"config.seed": 7, "jacobian.hoyer": 0.25},
        {"jacobian.hoyer": 0.35},
        {"config.jacobian_coef": 0.5, "jacobian.hoyer": 0.5},
    )
    results[2]["standard_error"]["jacobian"]["hoyer"] = 0.02
    groups = evaluate.grouped(results)
    figure, _ = evaluate.draw_plots(groups, [("jacobian.hoyer", "lr")], "penalty")
    line, _, (bars,) = figure.axes[0].containers[0][0], None, figure.axes[0].containers[0][2][:1]
    assert line.get_xdata() == pytest.approx((0.5, 0.3))  # lambda 0.5, then 1
    widths = [end - start for (start, _), (end, _) in bars.get_segments()]
    assert widths == pytest.approx((2 * 0.02, 2 * 0.1 / 2**0.5))
    assert [text.get_text() for text in figure.axes[0].texts] == ["0.5", "1"]
    assert list(evaluate.by_series(groups, "jacobian_coef")) == ["0.5", "1.0"]


def test_text_from_data_is_escaped_in_the_report():
    example = {"tokens": ["<b>", "&"], "acts": [1.0, 2.0], "max": 2.0}
    page = evaluate.snippets([example])
    assert "<b>" not in page and "&lt;b&gt;" in page and "--share:0.50" in page and "&amp;" in page
    assert "&lt;b&gt;" in evaluate.details("<b>")


# ---- 8. Evaluation: bad input --------------------------------------------------------------------


def refused(capsys, tmp_path, *argv):
    """Run evaluate.py, which must refuse -> its one line; no file that was there has changed."""
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    status = evaluate.main([str(part) for part in argv])
    lines = capsys.readouterr().err.strip().splitlines()
    assert status == 2 and lines[-1].startswith("evaluate.py: error: ")
    assert "Traceback" not in "".join(lines)
    assert before == {path: path.read_bytes() for path in before}
    assert not list(tmp_path.rglob("*.tmp"))
    return lines[-1]


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--tokens", "0"], "--tokens is 0; expected 1 to"),
        (["--tokens", "many"], "many"),
        (["--tokens", "100000000"], "lower it, or name another text by --dataset"),
        (["--seed", "-1"], "--seed is -1"),
        (["--linear-samples", "-1"], "--linear-samples is -1"),
        (["--dtype", "float16"], "float16"),
        (["--thresholds", "low"], "low"),
        (["--thresholds", "0.1", "nan"], "--thresholds is nan"),
        (["--latents", "64"], "has 0 to 63"),
        (["--latents", "-1"], "--latents is -1"),
        (["--plot", "nothing", "jacobian.hoyer"], "there is no nothing in the evaluation"),
        (["--plot", "model", "jacobian.hoyer"], "--plot model"),
        (["--plot", "lr", "jacobian.hoyer", "--series", "nothing"], "there is no nothing"),
        (["--dataset", "no-such-file.txt"], "no-such-file.txt"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--no-such-flag"], "--no-such-flag"),
        (["--token", "400"], "--token"),
    ],
)
def test_a_bad_flag_gets_one_line_and_status_2(flags, says, run_copy, tmp_path, capsys):
    assert says in refused(capsys, tmp_path, run_copy, *SMALL, *flags)


def test_what_is_no_finished_run_is_refused(run_copy, tmp_path, capsys):
    weights = run_copy / "sae_y" / "sae_weights.safetensors"
    weights.write_bytes(b"\x10" * 50)
    assert "not a finished run" in refused(capsys, tmp_path, run_copy)
    weights.unlink()
    assert "not a finished run" in refused(capsys, tmp_path, run_copy)
    (run_copy / "config.json").unlink()
    assert "not a finished run" in refused(capsys, tmp_path, run_copy)
    assert "no-such-run" in refused(capsys, tmp_path, tmp_path / "no-such-run")


def test_a_run_that_is_given_twice_is_refused_before_it_is_evaluated(run_copy, tmp_path, capsys):
    again = run_copy / ".." / run_copy.name
    assert "one run given twice" in refused(capsys, tmp_path, run_copy, again, *SMALL)
    assert not (run_copy / "evaluation.json").exists()


def test_a_model_that_is_gone_is_not_asked_of_the_hub(run_copy, tmp_path, capsys):
    edited(run_copy, model_path=str(tmp_path / "gone"), config={"model": "gone"})
    line = refused(capsys, tmp_path, run_copy, *SMALL)
    assert "its language model" in line and "gone" in line


def test_a_model_that_has_changed_is_refused(run_copy, tmp_path, capsys):
    edited(run_copy, mlp_sha256="0" * 64)
    assert "has changed since training" in refused(capsys, tmp_path, run_copy, *SMALL)


def test_local_text_that_is_gone_is_not_replaced_by_c4(run_copy, tmp_path, capsys):
    edited(run_copy, text_path=str(tmp_path / "gone.jsonl"), config={"dataset": "gone.jsonl"})
    line = refused(capsys, tmp_path, run_copy, *SMALL)
    assert "gone.jsonl, is not there; name one by --dataset" in line


def test_text_that_holds_nothing_out_says_so_and_names_dataset(
    run_copy, tmp_path, monkeypatch, capsys
):
    short = tmp_path / "short.jsonl"
    short.write_text(json.dumps({"text": "one document " * 500}))
    edited(run_copy, text_path=str(short))
    line = refused(capsys, tmp_path, run_copy, *SMALL)
    assert "(held out) has 0" in line and "--dataset" in line


def test_an_evaluation_that_is_not_whole_is_not_reused(run_copy, tmp_path, capsys):
    for text in ('{"config": {}', "[1]", '{"versions": {}}'):
        (run_copy / "evaluation.json").write_text(text)
        assert "leave out --reuse" in refused(capsys, tmp_path, run_copy, "--reuse")


def test_an_output_folder_that_is_a_file_is_refused_at_once(run_copy, tmp_path, capsys):
    (tmp_path / "taken").write_text("mine")
    line = refused(capsys, tmp_path, run_copy, *SMALL, "--output-dir", tmp_path / "taken")
    assert "is no folder" in line and not (run_copy / "evaluation.json").exists()


def test_a_full_disk_leaves_the_earlier_evaluation_whole(run_copy, tmp_path, monkeypatch, capsys):
    def full(*args):
        raise OSError(28, "No space left on device")

    (run_copy / "evaluation.json").write_text("earlier")
    monkeypatch.setattr(jsae.os, "fsync", full)
    status = evaluate.main([str(run_copy), *SMALL])
    assert status == 2 and "No space left" in capsys.readouterr().err
    assert (run_copy / "evaluation.json").read_text() == "earlier"


def test_inputs_that_are_not_finite_are_named(run_copy, tmp_path, monkeypatch, capsys):
    original = jsae.mlp_inputs
    monkeypatch.setattr(jsae, "mlp_inputs", lambda *args: original(*args) * math.nan)
    assert "NaN or Inf" in refused(capsys, tmp_path, run_copy, *SMALL)


def test_an_mlp_that_differs_on_this_text_is_refused(run_copy, tmp_path, monkeypatch, capsys):
    def differs(model, mlp, ids):
        raise InputError(f"the MLP differs on {tuple(ids.shape)}")

    monkeypatch.setattr(jsae, "check_mlp", differs)
    assert "the MLP differs on (1, 32)" in refused(capsys, tmp_path, run_copy, *SMALL)


def test_without_matplotlib_the_numbers_and_the_report_are_there(
    run_copy, evaluated, monkeypatch, capsys
):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    (run_copy / "evaluation.json").write_text(evaluated)
    status = evaluate.main([str(run_copy), "--reuse"])
    out, err = capsys.readouterr()
    assert status == 2 and "pip install matplotlib" in err and "Hoyer" in out
    assert (run_copy / "report.html").exists()
    assert "Traceback" not in err


def test_help_names_every_option(capsys):
    assert evaluate.main(["--help"]) == 0
    out = capsys.readouterr().out
    for name in evaluate.Options.__dataclass_fields__:
        assert evaluate.flag(name) in out


# ---- 9. The MLP of a transformers model ----------------------------------------------------------

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
}
PLAIN = (
    "gpt_neox gpt2 gpt_neo gptj phi opt falcon starcoder2 persimmon codegen nemotron bloom mpt "
    "biogpt xglm gpt_bigcode arcee apertus ctrl openai-gpt bart gpt_neox_japanese prophetnet"
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
    if "d_model" in own:
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
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def check_of_layer(model, layer, width=32):
    """The MLP of a layer has its readers' x and its writer's y on other text; -> the MLP."""
    mlp = MLP.from_model(model, layer)
    model.eval()
    seen = []
    hook = mlp.writer.register_forward_hook(lambda m, a, y: seen.append(y.detach().clone()))
    ids = torch.arange(3 * 20).reshape(3, 20) + 5
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    hook.remove()
    x = jsae.mlp_inputs(model, mlp, ids)
    torch.testing.assert_close(mlp(x).flatten(), seen[0].flatten(), rtol=1e-4, atol=1e-6)
    return mlp, x


@pytest.mark.parametrize("kind", PLAIN.split() + GATED.split())
def test_mlp_of_every_architecture_reproduces_the_models_own(kind):
    model = random_model(kind)
    assert model.training
    mlp = MLP.from_model(model, 1)
    assert model.training
    assert all(module.training for module in model.modules())
    assert (mlp.W_gate is not None) == (kind in GATED.split())
    assert all(buffer.is_contiguous() for buffer in mlp.buffers())  # safetensors asks for it
    assert mlp.writer not in set(mlp.modules())  # it stays part of the language model
    if kind != "prophetnet":  # its ngram streams make more rows than tokens
        mlp, x = check_of_layer(model, 1)
        assert x.shape == (3, 20, 32)
        J = sum(mlp.W_out @ (c.unsqueeze(1) * W) for c, W in mlp.derivative(x[0, 0]))
        torch.testing.assert_close(torch.func.jacrev(mlp)(x[0, 0]), J, rtol=1e-3, atol=1e-6)


def test_a_dense_layer_of_a_model_with_experts_is_found_and_the_others_are_refused():
    model = random_model("qwen2_moe")
    check_of_layer(model, 0)
    with pytest.raises(InputError, match="layer 1 of Qwen2MoeForCausalLM is a mixture of experts"):
        MLP.from_model(model, 1)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "granitemoeshared"])
def test_a_mixture_of_experts_is_refused(kind):
    with pytest.raises(InputError, match="layer 1 of .* is a mixture of experts"):
        MLP.from_model(random_model(kind), 1)


def test_experts_in_a_list_that_see_a_part_of_the_tokens_are_a_mixture():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.router = nn.Linear(6, 2)
            self.experts = nn.ModuleList(
                nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6)) for _ in range(2)
            )

        def forward(self, x):
            chosen = self.router(x).argmax(-1)
            y = torch.zeros_like(x)
            for number, expert in enumerate(self.experts):
                y[chosen == number] = expert(x[chosen == number])
            return y

    torch.manual_seed(0)
    with pytest.raises(InputError, match="mixture of experts"):
        MLP.from_module(Experts())


@pytest.mark.parametrize("kind", ["bitnet", "rwkv", "cpmant"])
def test_what_is_not_one_dense_mlp_is_refused(kind):
    with pytest.raises(InputError, match="layer 1 of .* has no single dense MLP"):
        MLP.from_model(random_model(kind), 1)


def test_activation_sparsity_is_refused():
    sparse = random_model("gemma3n_text", activation_sparsity_pattern=[0.9, 0.9])
    with pytest.raises(InputError, match="no single dense MLP"):
        MLP.from_model(sparse, 1)


def test_the_blocks_that_text_goes_through_are_chosen_and_counted():
    bart = random_model("bart", decoder_layers=4)
    check_of_layer(bart, 3)
    with pytest.raises(InputError, match="no layer 4 of BartForCausalLM; --layer takes 0 to 3"):
        MLP.from_model(bart, 4)
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision.update(intermediate_size=40, image_size=28, patch_size=14)
    text = {name: SIZES[name] for name in SIZES if name not in ("ffn_dim", "pad_token_id")}
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config=vision,
        image_token_index=98,
        boi_token_index=97,
        eoi_token_index=96,
    )
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config)
    mlp = MLP.from_model(model, 1)
    names = {module: name for name, module in model.named_modules()}
    assert names[mlp.writer] == "model.language_model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    "name", ["gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "quick_gelu", "gelu_10"]
)
def test_the_activation_is_told_apart_even_where_small_weights_hide_it(name):
    model = random_model("gpt_neox", hidden_act=name, initializer_range=1e-3)
    mlp = MLP.from_model(model, 0)
    z = torch.linspace(-50, 50, 999)
    torch.testing.assert_close(mlp.act(z), ACT2FN[name](z), rtol=1e-6, atol=1e-5)


class FunctionalMLP(nn.Module):
    """An MLP whose activation is no attribute, with small weights."""

    def __init__(self, act):
        super().__init__()
        self.up, self.down = nn.Linear(8, 20, bias=False), nn.Linear(20, 8)
        self.up.weight.data *= 0.05
        self.compute = [act]  # in a list, where nothing looks

    def forward(self, x):
        return self.down(self.compute[0](self.up(x)))


@pytest.mark.parametrize("name", jsae.ACT_GRADS)
def test_a_known_function_that_the_module_does_not_hold_is_found_by_its_values(name):
    torch.manual_seed(0)
    module = FunctionalMLP(name)
    assert MLP.from_module(module).act is name


class ClampedMLP(nn.Module):
    def __init__(self, low):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 20), nn.Linear(8, 20), nn.Linear(20, 8)
        self.low = low

    def forward(self, x):
        gate = self.gate(x).clamp(max=7)
        return self.down(F.silu(gate) * self.up(x).clamp(self.low, 7))


@pytest.mark.parametrize("low", [-math.inf, -7])
def test_clamps_that_small_inputs_do_not_reach_are_seen_at_50_times_the_input(low):
    torch.manual_seed(0)
    with pytest.raises(InputError, match="no single dense MLP"):
        MLP.from_module(ClampedMLP(low))


def test_a_linear_map_that_sees_another_number_of_rows_is_no_expert():
    class WithPositions(nn.Module):
        def __init__(self):
            super().__init__()
            self.positions = nn.Linear(6, 6)
            self.mlp = nn.Sequential(nn.Linear(6, 20), nn.GELU(), nn.Linear(20, 6))

        def forward(self, x):
            return self.mlp(x) + self.positions(x[:, :1])

    torch.manual_seed(0)
    assert MLP.from_module(WithPositions()).act is F.gelu


def test_an_mlp_of_zeros_fits_anything_and_is_refused():
    module = nn.Sequential(nn.Linear(8, 20), nn.GELU(), nn.Linear(20, 8))
    for p in module[2].parameters():
        p.data.zero_()
    with pytest.raises(InputError, match="no single dense MLP"):
        MLP.from_module(module)
    module[2].bias.data += 1  # y is the same for every token
    with pytest.raises(InputError, match="no single dense MLP"):
        MLP.from_module(module)


def test_a_linear_map_that_is_called_twice_is_refused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down, self.norm = nn.Linear(8, 20), nn.Linear(20, 8), nn.LayerNorm(8)

        def once(self, x):
            return self.down(F.gelu(self.up(x)))

        def forward(self, x):
            return self.once(self.norm(x + self.once(x)))

    torch.manual_seed(0)
    with pytest.raises(InputError, match="no single dense MLP"):
        MLP.from_module(Twice())


def test_a_foreign_module_may_raise_anything_while_it_is_probed():
    class Picky(nn.Module):
        def forward(self, x):
            if x.shape[-1] != 6:
                raise AssertionError("width")
            return x

    torch.manual_seed(0)
    module = nn.Sequential(Picky(), nn.Linear(6, 20), nn.GELU(), nn.Linear(20, 6))
    assert MLP.from_module(module).act is F.gelu


def test_from_module_finds_a_fused_reversed_gate_with_odd_names():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 20, bias=False), nn.Linear(10, 6)
            self.phi = torch.tanh

        def forward(self, x):
            up, gate = self.a(x).chunk(2, dim=-1)
            return x + self.b(up * torch.tanh(gate))  # the residual stays outside

    torch.manual_seed(0)
    module = Odd()
    mlp, x = MLP.from_module(module), normal(7, 6).float()
    torch.testing.assert_close(x + mlp(x), module(x))


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(4, 4),
        nn.LayerNorm(4),
        nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 4)),
    ],
    ids=["one map", "no map", "a norm between"],
)
def test_from_module_refuses_what_is_no_mlp(module):
    with pytest.raises(InputError, match="dense MLP"):
        MLP.from_module(module)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, DOUBLE])
def test_an_mlp_of_another_dtype_is_found_within_its_tolerance(dtype):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 20), nn.SiLU(), nn.Linear(20, 8)).to(dtype)
    mlp = MLP.from_module(module)
    assert mlp.act is F.silu
    assert mlp.W_in.dtype == (DOUBLE if dtype == DOUBLE else torch.float32)


# ---- 10. Command line, bad input, README, other programs -----------------------------------------


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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


@pytest.fixture(autouse=True)
def signal_handlers_kept():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


BAD_SETTINGS = [  # name, value, what the line must say
    ("model", "no-such-folder-or-model", "no-such-folder-or-model"),
    ("dataset", "no/such-data-set", "no/such-data-set"),
    ("dataset", "no-such-file.txt", "there is no file or folder no-such-file.txt"),
    ("layer", -1, "--layer is -1; expected int from 0"),
    ("layer", 1, "--layer takes 0 to 0"),
    ("k", 65, "--k is 65; expected 1 to 64, the number of latents"),
    ("k", 0, "--k is 0; expected int from 1"),
    ("k", "many", "invalid int value: 'many'"),
    ("tokens", 0, "--tokens is 0"),
    ("tokens", 1.5, "invalid int value: '1.5'"),
    ("tokens", 100, "--tokens 100: less than one --batch-size 128"),
    ("batch_size", -4, "--batch-size is -4"),
    ("expansion_factor", 0, "--expansion-factor is 0"),
    ("buffer_batches", 0, "--buffer-batches is 0"),
    ("context_size", 1, "--context-size is 1; expected int from 2"),
    ("seed", -1, "--seed is -1"),
    ("lr", 0, "--lr is 0"),
    ("lr", "inf", "--lr is inf"),
    ("lr", "nan", "--lr is nan"),
    ("jacobian_coef", -1, "--jacobian-coef is -1"),
    ("jacobian_coef", "nan", "--jacobian-coef is nan"),
    ("jacobian_fraction", 0, "--jacobian-fraction is 0"),
    ("jacobian_fraction", 1.5, "--jacobian-fraction is 1.5; expected float from 1e-09 to 1"),
    ("checkpoint_minutes", -1, "--checkpoint-minutes is -1"),
    ("checkpoint_minutes", "nan", "--checkpoint-minutes is nan"),
    ("dtype", "float16", "--dtype: invalid choice: 'float16'"),
    ("device", "tpu", "--device tpu"),
    ("device", "cuda:99", "--device cuda:99"),
    ("randomize_weights", "yes", "weights: invalid choice: 'yes'"),
    ("jacobian_penalty", "l1", "unrecognized arguments: --jacobian-penalty l1"),
]


@pytest.mark.parametrize("name, value, says", BAD_SETTINGS)
def test_a_bad_setting_gets_one_line_and_writes_nothing(name, value, says, config, capsys):
    line = refusal([*flags(config), jsae.flag(name), value], capsys)
    assert says in line
    assert not Path(config.output_dir).exists()


BAD_TEXT = [  # file name, content, what the line must say
    ("empty.txt", b"", "empty.txt: 0 contexts are less than one batch"),
    ("short.txt", b"only a few words", "less than one batch"),
    ("broken.jsonl", b'{"text": "a"}\n{"text": ', "broken.jsonl"),
    ("other.jsonl", b'{"body": "a"}\n', "columns ['body']: expected text"),
    (
        "ids.jsonl",
        b'{"input_ids": [5, 99999, 7]}\n',
        "token ids 0 to 99999; the model knows 0 to 2559",
    ),
    ("below.jsonl", b'{"input_ids": [5, -1, 7]}\n', "token ids -1 to 7"),
    ("broken.parquet", b"PAR1 is not enough", "broken.parquet"),
    ("broken.jsonl.zst", b"not compressed", "broken.jsonl.zst"),
    ("picture.png", b"", "expected files of one kind that end in .txt, .jsonl"),
]


@pytest.mark.parametrize("name, content, says", BAD_TEXT)
def test_bad_text_gets_one_line_and_writes_nothing(name, content, says, config, tmp_path, capsys):
    (tmp_path / name).write_bytes(content)
    line = refusal([*flags(config), "--dataset", tmp_path / name], capsys)
    assert says in line
    assert not Path(config.output_dir).exists()


def test_files_of_two_kinds_are_refused(config, tmp_path, capsys):
    for name in ("a.txt", "b.parquet"):
        (tmp_path / name).write_text("a")
    line = refusal([*flags(config), "--dataset", tmp_path], capsys)
    assert "expected files of one kind" in line


def test_cuda_without_a_gpu_is_refused(config, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert "--device cuda:0" in refusal([*flags(config), "--device", "cuda"], capsys)


def test_a_file_in_the_place_of_the_folder_is_left_alone(config, tmp_path, capsys):
    (tmp_path / "taken").write_text("mine")
    line = refusal([*flags(config), "--output-dir", tmp_path / "taken"], capsys)
    assert "is taken by what is no run" in line
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_folder_that_cannot_be_made_gets_one_line(config, tmp_path, capsys):
    (tmp_path / "taken").write_text("mine")
    line = refusal([*flags(config), "--output-dir", tmp_path / "taken" / "inside"], capsys)
    assert "Not a directory" in line


@pytest.mark.parametrize("name", ["thesis.tex", "config.json"])
def test_overwrite_replaces_runs_only(name, config, tmp_path, capsys):
    (tmp_path / name).write_text("{}")
    line = refusal([*flags(config), "--overwrite", "--output-dir", tmp_path], capsys)
    assert "is taken by what is no run" in line
    assert contents(tmp_path) == {tmp_path / name: b"{}"}


def test_a_finished_run_is_replaced_only_if_asked(config, capsys):
    assert jsae.main(flags(config)) == 0
    out = capsys.readouterr().out
    for name in ("ev_x", "jacobian_above_0.01", "tokens_per_second", "evaluate it with"):
        assert name in out
    run = Path(config.output_dir)
    before = contents(run)
    assert "holds a finished run; --overwrite replaces it" in refusal(flags(config), capsys)
    assert contents(run) == before
    assert jsae.main([*flags(config, seed=1), "--overwrite"]) == 0
    assert contents(run) != before


def test_overwriting_leaves_what_a_link_points_to(config, tmp_path):
    run = jsae.train(config)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    (run / "figures").symlink_to(tmp_path / "other")
    jsae.train(changed(config, overwrite=True, seed=1))
    assert (tmp_path / "other" / "file").read_text() == "mine"
    assert not (run / "figures").exists()


def test_a_full_disk_at_the_start_gets_one_line(config, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(jsae.os, "fsync", full)
    assert "No space left" in refusal(flags(config), capsys)


@pytest.mark.parametrize("exists", [False, True])
def test_there_is_nothing_to_resume_without_a_run(exists, config, tmp_path, capsys):
    if exists:
        (tmp_path / "empty").mkdir()
    line = refusal([*flags(config), "--resume", "--output-dir", tmp_path / "empty"], capsys)
    assert "holds no run (no config.json)" in line


def as_earlier_version_wrote(run):
    saved = json.loads((run / "config.json").read_text())
    del saved["penalty"]
    saved["config"]["jacobian_penalty"] = "l1"
    (run / "config.json").write_text(json.dumps(saved))
    return run


def test_a_run_of_an_earlier_version_is_refused_in_one_line(config, capsys):
    run = as_earlier_version_wrote(jsae.train(config))
    with pytest.raises(InputError, match="earlier version of jsae.py"):
        jsae.load_run(run)
    assert "earlier version of jsae.py" in refusal([*flags(config), "--resume"], capsys)


def test_what_is_not_a_run_is_not_loaded(tmp_path):
    with pytest.raises(InputError, match="is not a finished run"):
        jsae.load_run(tmp_path)


def test_a_run_is_loaded_by_its_hub_id_and_only_its_own_files_are_asked_for(config, monkeypatch):
    run = jsae.train(config)
    asked = []

    def download(repo_id, allow_patterns):
        asked.append((repo_id, allow_patterns))
        return str(run)

    monkeypatch.setattr(jsae, "snapshot_download", download)
    sae_x, _, loaded = jsae.load_run("someone/some-pair")
    assert loaded == config
    assert torch.equal(sae_x.W_dec, weights_of(run)[0])
    assert asked == [("someone/some-pair", ["config.json", "sae_x/*", "sae_y/*"])]


def test_a_mistyped_folder_is_not_asked_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    monkeypatch.setattr(jsae, "snapshot_download", None)
    with pytest.raises(InputError, match="runs/typo"):
        jsae.load_run("runs/typo")


def test_the_language_model_is_loaded_from_safetensors_only(config, monkeypatch, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(config.model)
    folder = tmp_path / "pickled"
    model.config.save_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(InputError, match="--model .*pickled: .*safetensors"):
        jsae.load_language_model(changed(config, model=str(folder)))


def test_nothing_is_pickled_and_no_remote_code_is_trusted():
    forbidden = r"(?<!safetensors\.)torch\.(load|save)\b|pickle|trust_remote_code|_object\("
    for program in ("jsae.py", "evaluate.py"):
        assert not re.search(forbidden, (jsae.HERE / program).read_text())


def run_alone(folder, *args):
    """jsae.py as a program, in another folder; -> (status, stdout, stderr)."""
    command = [sys.executable, folder / "jsae.py", *args]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    return done.returncode, done.stdout, done.stderr


def test_jsae_alone_is_a_program_when_it_is_copied(config, tmp_path):
    shutil.copy(jsae.HERE / "jsae.py", tmp_path)
    status, _, error = run_alone(tmp_path)
    assert status == 2
    assert "--model EleutherAI/pythia-70m --layer 3" in error
    assert len(error.strip().splitlines()) == 1
    status, out, error = run_alone(tmp_path, *flags(config))
    assert status == 0, error
    assert "ev_x" in out
    assert len(weights_of(Path(config.output_dir))) == 8
    status, _, error = run_alone(tmp_path, *flags(config, k="x"))
    assert status == 2
    assert error.strip() == "jsae.py: error: argument --k: invalid int value: 'x'"


def test_uv_installs_what_requirements_txt_names():
    source = (jsae.HERE / "jsae.py").read_text()
    block = re.search(r"(?m)^# /// script\n(.*?)^# ///$", source, re.DOTALL)[1]
    named = re.search(r"# dependencies = (.*)", block)[1]
    lines = (jsae.HERE / "requirements.txt").read_text().splitlines()
    packages = [line.split("#")[0].strip() for line in lines]
    for_tests_and_figures = ("pytest", "matplotlib", "marked")
    assert json.loads(named) == [name for name in packages if name not in for_tests_and_figures]


def snippet(word):
    """The one piece of Python in README.md and RESULTS.md in which the word stands."""
    texts = [jsae.HERE / "README.md", jsae.HERE / "assets" / "RESULTS.md"]
    pieces = "\n".join(path.read_text() for path in texts).split("```python\n")[1:]
    (found,) = [piece.split("```")[0] for piece in pieces if word in piece.split("```")[0]]
    return found


def run_snippet(code, folder=jsae.HERE, check=True):
    environment = os.environ | {"PYTHONPATH": str(jsae.HERE)}
    settings = {"cwd": folder, "env": environment, "stdout": subprocess.PIPE, "text": True}
    return subprocess.run([sys.executable, "-c", code], check=check, timeout=120, **settings)


def test_the_readmes_snippet_of_the_loss_runs():
    run_snippet(
        snippet("jsae_loss") + "\nassert sae_x.W_dec.grad.any() and J.shape == (64, 16, 16)"
    )


def test_the_readmes_snippet_of_a_gated_mlp_runs():
    run_snippet(snippet("LlamaConfig") + "\nassert mlp.W_gate is not None and J.any()")


def test_the_readmes_snippet_of_fast_penalty_runs():
    code = snippet("fast_penalty") + "\nimport jsae\n"
    code += "J = jsae.active_jacobian(sae_x, sae_y, mlp, x, s_x, s_y)\n"
    run_snippet(code + "assert (J.abs().mean() / penalty - 1).abs() < 1e-5")


def test_the_readmes_snippet_of_another_penalty_trains(tmp_path):
    code = snippet("row_sparsity").replace("runs/mine", str(tmp_path / "mine"))
    code = code.replace("**jsae.DEMO,", "**{**jsae.DEMO, 'tokens': 8192, 'batch_size': 1024},")
    run_snippet(code)
    saved = json.loads((tmp_path / "mine" / "config.json").read_text())
    assert saved["penalty"] == "row_sparsity"


def test_the_ratio_penalties_of_the_results_take_a_row_of_zeros(tmp_path):
    definitions = snippet("rows_and_columns").split("\nfor penalty in")[0]
    (tmp_path / "penalties.py").write_text(definitions)
    penalties = module_from_file(tmp_path / "penalties.py")
    J = normal(5, 4, 4)
    J[1, 2] = 0  # an output latent that is not active
    J[2, :, 3] = 0
    J[3] = 0
    J.requires_grad_()
    for penalty in (penalties.rows, penalties.rows_and_columns):
        value = penalty(J)
        torch.testing.assert_close(value, penalty(3 * J))  # which no scale changes
        (gradient,) = torch.autograd.grad(value.sum(), J)
        assert value.shape == (5,)
        assert gradient.isfinite().all()
    assert penalties.rows(torch.eye(4)[None]) == 1 / 4
    assert penalties.rows(torch.ones(1, 4, 4)) == 1 / 2


def test_the_lines_of_the_results_on_a_small_jacobian_print_its_factors(run_copy):
    code = snippet("constant share").replace("10_000", "200")
    code = code.replace(
        "import sys\n", f"import sys\nsys.argv[1:] = ['f.png', {str(run_copy)!r}]\n"
    )
    code += "\nassert 0.5 < numbers['reading'] < 2 and 0 < numbers['constant share'] < 1"
    out = run_snippet(code, run_copy).stdout
    assert out.startswith(str(run_copy))
    assert (run_copy / "f.png").read_bytes().startswith(b"\x89PNG")


def test_sae_lens_opens_the_folders_and_what_it_saves_comes_back(run_copy):
    sae_lens = pytest.importorskip("sae_lens")
    *saes, config = jsae.load_run(run_copy)
    for name, sae in zip(("sae_x", "sae_y"), saes):
        folder = run_copy / name
        n_latents, d_model = sae.W_enc.shape
        x = 3 * normal(50, d_model).float()
        theirs = sae_lens.SAE.load_from_disk(str(folder), device="cpu")
        acts, idx = sae.encode(x)
        dense = torch.zeros(50, n_latents).scatter(1, idx, acts)
        torch.testing.assert_close(theirs.encode(x), dense, rtol=0, atol=1e-5)
        torch.testing.assert_close(theirs(x), sae(x), rtol=0, atol=1e-5)
        assert theirs.cfg.metadata.model_name == config.model
        assert theirs.cfg.metadata.hook_name.startswith("gpt_neox.layers.0.mlp")
        shutil.rmtree(folder)
        theirs.save_model(folder)
    for sae, again in zip(saes, jsae.load_run(run_copy)[:2]):
        assert all(torch.equal(p, q) for p, q in zip(sae.parameters(), again.parameters()))


def test_sparsify_opens_what_the_readmes_lines_write(run_copy):
    sparsify = pytest.importorskip("sparsify")
    run_snippet(snippet("sparsify").replace("runs/NAME", str(run_copy)), run_copy)
    for side, sae in zip("xy", jsae.load_run(run_copy)[:2]):
        folder = run_copy / "sparsify" / side
        x = 3 * normal(50, sae.W_enc.shape[1]).float()
        theirs = sparsify.SparseCoder.load_from_disk(folder)
        acts, idx, _ = theirs.encode(x)
        ours = sae.encode(x)
        assert torch.equal(idx.sort().values, ours.idx.sort().values)
        torch.testing.assert_close(theirs.decode(acts, idx), sae(x), rtol=0, atol=1e-5)


# delphi's engine for local LLMs is imported with the rest of it, but never called here.
VLLM = {
    "vllm": {"LLM": None, "SamplingParams": None},
    "vllm.distributed": {},
    "vllm.distributed.parallel_state": {
        "destroy_distributed_environment": None,
        "destroy_model_parallel": None,
    },
    "vllm.inputs": {"TokensPrompt": None},
}


@pytest.fixture
def interpreted(tmp_path, monkeypatch):
    """-> a function that has a client judge a run by the lines of RESULTS.md, and the run."""
    pytest.importorskip("delphi")
    for name, contents in VLLM.items():
        module = types.ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    (tmp_path / "interpret.py").write_text(snippet("delphi"))
    interpret = module_from_file(tmp_path / "interpret.py")

    sizes = {"tokens": 61440, "checkpoint_minutes": 60}
    run = jsae.train(Config(**{**jsae.DEMO, **sizes}, output_dir=str(tmp_path / "run")))

    def judged_by(client, *args):
        settings = ["--latents", "20", "--tokens", "25500", "--min-examples", "20", *args]
        interpret.main([str(run), *settings], client)
        return json.loads((run / "interpretability.json").read_text())

    return judged_by, run


class MarkedText:
    """What delphi must show, from our own activations: windows of 32 tokens, marked at >= .3 max."""

    def __init__(self, run):
        opened = evaluate.open_run(run, evaluate.Options())
        self.tokenizer = opened.tokenizer
        self.text = evaluate.held_out_text(
            opened.settings, opened.part, opened.model, opened.tokenizer, 25500, 0
        )
        words = self.tokenizer.batch_decode(self.text.ids.reshape(-1, 1))
        self.words = [words[n : n + 32] for n in range(0, len(words), 32)]
        self.saes = {"x": opened.sae_x, "y": opened.sae_y}
        self.acts = {}
        with torch.no_grad():
            x = opened.model.gpt_neox.embed_in(self.text.ids)
            x = opened.model.gpt_neox.layers[0].post_attention_layernorm(x)  # of layer 0
            for side, site in (("x", x), ("y", opened.mlp(x))):
                s = self.saes[side].encode(site.flatten(0, 1))
                acts = torch.zeros(len(s.acts), len(self.saes[side].W_enc))
                acts = acts.scatter(1, s.idx, s.acts).view(*self.text.ids.shape, -1)
                acts[:, 0] = 0
                self.acts[side] = acts.view(-1, 32, acts.shape[-1])  # (windows, 32, n_latents)

    def windows(self, side, latent):
        return [n for n, acts in enumerate(self.acts[side][:, :, latent]) if acts.any()]

    def marked(self, side, latent, window):
        acts = self.acts[side][window, :, latent].tolist()
        text = ""
        for important, tokens in itertools.groupby(
            zip(acts, self.words[window]), lambda token: token[0] >= 0.3 * max(acts)
        ):
            piece = "".join(word for _, word in tokens)
            text += f"<<{piece}>>" if important else piece
        return text

    def chosen(self, side, n_latents=20, least=20):
        """-> the latents that the script must take, in its order, and how many it leaves out."""
        n = len(self.saes[side].W_enc)
        drawn = torch.randperm(n, generator=torch.Generator().manual_seed(0))
        taken = []
        left_out = {}
        for latent in drawn[: 2 * n_latents].tolist():
            found = len(self.windows(side, latent))
            if len(taken) == n_latents:
                break
            if found == 0:
                why = "silent"
            elif found < least:
                why = "rare"
            elif len(self.words) - found < 50:
                why = "in every window"
            else:
                taken.append(latent)
                continue
            left_out[why] = left_out.get(why, 0) + 1
        return taken, left_out


class ScriptedClient:
    """In place of an LLM: explains a latent by its number and judges by `answer(name, text)`."""

    def __init__(self, marked, answer):
        self.names = [(side, latent) for side in "xy" for latent in marked.chosen(side)[0]]
        self.answer = answer
        self.explained = []
        self.judged = []

    async def generate(self, prompt, **kwargs):
        from delphi.clients.client import Response

        question = prompt[-1]["content"]
        if not question.startswith("Latent explanation: "):
            name = self.names[len(self.explained)]
            self.explained.append(question)
            return Response(f"[EXPLANATION]: {name[0]} {name[1]}")
        side, latent = question.split("\n")[0].split()[2:]
        examples = question.split("Text examples:\n\n")[1].removesuffix("\n")
        texts = re.split(r"(?:^|\n)Example \d: ", examples)[1:]
        self.judged += [(side, int(latent), text) for text in texts]
        return Response(str([int(self.answer(side, int(latent), text)) for text in texts]))


def scores_of(results):
    return [latent["score"] for side in "xy" for latent in results[side]["latents"]]


def test_delphi_shows_the_latents_where_they_are_active_and_counts_the_rest(interpreted):
    judged_by, run = interpreted
    marked = MarkedText(run)
    true = {
        (side, latent): {marked.marked(side, latent, n) for n in marked.windows(side, latent)}
        for side in "xy"
        for latent in marked.chosen(side)[0]
    }

    client = ScriptedClient(marked, lambda side, latent, text: text in true[side, latent])
    results = judged_by(client)
    assert scores_of(results) == [1.0] * 40
    for side in "xy":
        latents, left_out = marked.chosen(side)
        assert [one["latent"] for one in results[side]["latents"]] == latents
        assert results[side]["left_out"] == left_out
        assert not any(one["not_understood"] for one in results[side]["latents"])

    share = {}  # of true examples among those shown
    for side, latent, text in client.judged:
        share.setdefault((side, latent), []).append(text in true[side, latent])
    always = scores_of(judged_by(ScriptedClient(marked, lambda *example: True)))
    assert always == pytest.approx([statistics.mean(shown) for shown in share.values()])
    rng = np.random.default_rng(0)
    guessed = scores_of(judged_by(ScriptedClient(marked, lambda *example: rng.random() < 0.5)))
    assert abs(statistics.mean(guessed) - 0.5) < 4 * 0.5 / len(client.judged) ** 0.5


def test_delphi_explains_latents_by_the_text_that_evaluate_shows(interpreted):
    judged_by, run = interpreted
    marked = MarkedText(run)
    client = ScriptedClient(marked, lambda *example: True)
    judged_by(client)
    compared = 0
    for (side, latent), question in zip(client.names, client.explained):
        if len(marked.windows(side, latent)) >= 50:
            continue  # delphi shows a sample of them
        sae = marked.saes[side]
        examples = evaluate.Examples([latent])
        acts = marked.acts[side].view(*marked.text.ids.shape, -1)[:, 1:].flatten(0, 1)
        s = jsae.Latents(*acts.topk(sae.k))
        examples.add(marked.text.ids, s)
        best = examples.result(marked.tokenizer)[latent][0]
        word = best["tokens"][int(np.argmax(best["acts"]))]
        largest = marked.acts[side][:, :, latent].amax(1).argmax().item()
        assert marked.acts[side][largest, :, latent].max().item() == pytest.approx(
            best["max"], abs=1e-3
        )
        shown = marked.marked(side, latent, largest)
        assert shown in question
        assert any(word in piece for piece in re.findall(r"<<(.*?)>>", shown, re.DOTALL))
        compared += 1
    assert compared >= 5


def test_the_benchmark_runs_and_times_what_it_says(monkeypatch, capsys):
    speed = module_from_file(jsae.HERE / ".ci" / "speed.py")
    monkeypatch.setattr(sys, "argv", ["speed.py", "--scale", "32", "--rounds", "1"])
    speed.main()
    assert "JSAE pair" in capsys.readouterr().out
    options = types.SimpleNamespace(device="cpu")
    losses = []
    for plain in (False, True):
        torch.manual_seed(0)
        losses.append(speed.pair(options, B=128, d=16, n=512, h=64, k=1, plain=plain)[1]())
    torch.testing.assert_close(*losses)


# ---- 11. Runs that survive signals, kills, damage, full disks ------------------------------------


def assert_same_run(one, other):
    for name in ("sae_x", "sae_y"):
        file = Path(name) / "sae_weights.safetensors"
        assert (one / file).read_bytes() == (other / file).read_bytes()
    assert without_timing(rows_of(one)) == without_timing(rows_of(other))
    assert not (one / "checkpoint.safetensors").exists()
    assert not (other / "checkpoint.safetensors").exists()


def whole_run(config, tmp_path):
    return jsae.train(changed(config, output_dir=str(tmp_path / "whole")))


def interrupted_at(step, number, monkeypatch):
    """A loss that sends the process a signal in the given step."""
    real = jsae.jsae_loss
    calls = itertools.count(1)

    def loss(*args):
        if next(calls) == step:
            signal.raise_signal(number)
        return real(*args)

    monkeypatch.setattr(jsae, "jsae_loss", loss)


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("step", [1, 4, 7, 14])  # a filling has 4 batches; 15 steps in all
def test_a_stopped_run_goes_on_to_the_same_bits(
    number, status, step, config, tmp_path, monkeypatch, capsys
):
    config = changed(config, jacobian_fraction=0.5)
    whole = whole_run(config, tmp_path)
    with monkeypatch.context() as patch:
        interrupted_at(step, number, patch)
        assert jsae.main(flags(config)) == status
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error == f"jsae.py: stopped at step {step}; --resume goes on"
    run = Path(config.output_dir)
    assert (run / "checkpoint.safetensors").exists()
    line = refusal(flags(config), capsys)
    assert "unfinished run; --resume goes on, --overwrite replaces it" in line
    assert jsae.main([*flags(config), "--resume", "--checkpoint-minutes", "3"]) == 0
    assert_same_run(whole, run)


def test_a_second_signal_does_not_wait(config):
    caught = "import signal, jsae\nwith jsae.signals_held():\n"
    caught += "    for _ in range(2): signal.raise_signal(signal.SIGTERM)\n"
    caught += "    print('waited')"
    done = run_snippet(caught, check=False)
    assert done.returncode == -signal.SIGTERM
    assert done.stdout == ""


def test_a_signal_in_a_filling_stops_at_once_with_the_steps_before_it(
    config, tmp_path, monkeypatch, capsys
):
    whole = whole_run(config, tmp_path)
    real = jsae.mlp_inputs
    calls = itertools.count(1)

    def stop_in_the_third_filling(*args):
        if next(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(jsae, "mlp_inputs", stop_in_the_third_filling)
        assert jsae.main(flags(config)) == 143
    assert "stopped at step 8; --resume goes on" in capsys.readouterr().err
    assert jsae.main([*flags(config), "--resume"]) == 0
    assert_same_run(whole, Path(config.output_dir))


def test_stopped_before_the_first_step_nothing_is_written(config, monkeypatch, capsys):
    def stop(*args):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(jsae, "mlp_inputs", stop)
    assert jsae.main(flags(config)) == 143
    assert capsys.readouterr().err.strip().splitlines()[-1] == "jsae.py: stopped"
    assert not Path(config.output_dir).exists()


def test_a_signal_while_text_is_skipped_stops_at_once(config, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        interrupted_at(9, signal.SIGTERM, patch)
        jsae.main(flags(config))
    before = contents(Path(config.output_dir))

    def stop(*args):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(jsae, "token_contexts", stop)
    assert jsae.main([*flags(config), "--resume"]) == 130
    assert contents(Path(config.output_dir)) == before


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_any_moment_a_run_goes_on_to_the_same_bits(seed, config, tmp_path):
    config = changed(config, tokens=128 * 60)
    program = [sys.executable, jsae.HERE / "jsae.py"]
    whole = tmp_path / "whole"
    subprocess.run([*program, *flags(config, output_dir=whole)], check=True, capture_output=True)
    command = [*program, *flags(config, checkpoint_minutes=0.0)]
    draw = random.Random(seed)
    run = Path(config.output_dir)
    for _ in range(2):
        resume = ["--resume"] if (run / "config.json").exists() else []
        with subprocess.Popen([*command, *resume], stderr=subprocess.DEVNULL) as process:
            while not (run / "checkpoint.safetensors").exists() and process.poll() is None:
                time.sleep(0.02)
            time.sleep(draw.uniform(0, 0.5))
            process.kill()
    subprocess.run([*command, "--resume"], check=True, timeout=120, capture_output=True)
    assert_same_run(whole, run)


@pytest.fixture
def stopped(config, monkeypatch):
    """A run that was stopped after step 9 of 15."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted_at(9, signal.SIGINT, patch)
        jsae.train(config)
    return config


@pytest.mark.parametrize("cut", [100, 5000])
def test_a_checkpoint_that_was_cut_off_is_refused_and_left_as_it_is(cut, stopped, capsys):
    path = Path(stopped.output_dir) / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-cut])
    before = contents(Path(stopped.output_dir))
    line = refusal([*flags(stopped), "--resume"], capsys)
    assert "checkpoint.safetensors is damaged" in line
    assert "--overwrite starts anew" in line
    assert contents(Path(stopped.output_dir)) == before


@pytest.mark.parametrize(
    "name, value", [("k", 5), ("lr", 0.02), ("seed", 1), ("tokens", 3000), ("buffer_batches", 3)]
)
def test_resume_refuses_another_setting_and_names_it(name, value, stopped):
    with pytest.raises(InputError, match=f"--resume: {name} was .*, now {value}"):
        jsae.train(changed(stopped, resume=True, **{name: value}))


def test_resume_goes_on_on_another_device(stopped, tmp_path):
    assert stopped.device == "cpu"
    assert_same_run(
        whole_run(stopped, tmp_path), jsae.train(changed(stopped, resume=True, device="cpu:0"))
    )


def test_resume_refuses_another_penalty(stopped):
    with pytest.raises(InputError, match="--resume: penalty was 'l1', now 'squares'"):
        jsae.train(changed(stopped, resume=True), squares)


def test_resume_refuses_a_model_that_has_changed(stopped, model_dir, monkeypatch):
    real = jsae.load_language_model

    def other(config):
        model = real(config)
        model.gpt_neox.layers[0].mlp.dense_h_to_4h.weight += 1
        return model

    monkeypatch.setattr(jsae, "load_language_model", other)
    with pytest.raises(InputError, match="--resume: mlp_sha256 was"):
        jsae.train(changed(stopped, resume=True))


def test_resume_refuses_text_that_has_changed(config, text_file, tmp_path, monkeypatch):
    text = shutil.copy(text_file, tmp_path / "text.jsonl")
    config = changed(config, dataset=str(text))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted_at(9, signal.SIGINT, patch)
        jsae.train(config)
    with open(text, "a") as file:
        file.write('\n{"text": "more"}')
    with pytest.raises(InputError, match="--resume: text_sha256 was"):
        jsae.train(changed(config, resume=True))


def test_resume_before_the_first_checkpoint_starts_over(stopped, tmp_path):
    (Path(stopped.output_dir) / "checkpoint.safetensors").unlink()
    run = jsae.train(changed(stopped, resume=True))
    assert_same_run(whole_run(stopped, tmp_path), run)


def test_resume_of_a_finished_run_leaves_it_as_it_is(config, monkeypatch):
    run = jsae.train(config)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    monkeypatch.setattr(jsae, "jsae_loss", None)
    assert jsae.main([*flags(config), "--resume"]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}


def test_a_run_that_cannot_be_finished_keeps_all_its_steps(config, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    whole = whole_run(config, tmp_path)
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(jsae, "finish_folder", full)
        jsae.train(config)
    path = Path(config.output_dir) / "checkpoint.safetensors"
    assert safetensors.torch.load_file(path)["step"] == 15
    assert_same_run(whole, jsae.train(changed(config, resume=True)))


@pytest.mark.parametrize("function", ["append_metrics", "save_checkpoint"])
def test_a_full_disk_stops_a_run_that_can_go_on(function, config, tmp_path, monkeypatch, capsys):
    whole = whole_run(config, tmp_path)
    real = getattr(jsae, function)
    calls = itertools.count(1)

    def full(*args):
        if next(calls) == 6:
            raise OSError(28, "No space left on device")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(jsae, function, full)
        line = refusal(flags(config, checkpoint_minutes=0.0), capsys)
    assert "No space left on device" in line
    assert_same_run(whole, jsae.train(changed(config, resume=True)))


def test_checkpoints_come_after_their_minutes(config, monkeypatch):
    clock = itertools.count(0, 30)  # half a minute between two looks at it
    monkeypatch.setattr(jsae.time, "time", lambda: float(next(clock)))
    saved = []
    real = jsae.save_checkpoint

    def note(folder, pair, adam):
        saved.append(int(pair.step))
        real(folder, pair, adam)

    monkeypatch.setattr(jsae, "save_checkpoint", note)
    jsae.train(changed(config, checkpoint_minutes=2.5))
    assert 2 <= len(saved) <= 8
    assert saved == sorted(set(saved))


def broken_stream(n):
    """A stand-in for load_documents: a hub stream that breaks after n documents."""

    def documents():
        for i in range(n):
            yield {"text": numbered_text(i)}
        raise ConnectionError("the stream broke")

    return lambda *_: documents()


def from_the_hub(config, monkeypatch):
    """The settings, with text that counts as coming from the hub."""
    real = jsae.local_path
    monkeypatch.setattr(jsae, "local_path", lambda name: None if name == "hub/text" else real(name))
    return changed(config, dataset="hub/text", tokens=128 * 300)


def test_a_stream_that_breaks_stops_the_run_which_can_go_on(config, tmp_path, monkeypatch, capsys):
    config = from_the_hub(config, monkeypatch)
    monkeypatch.setattr(jsae, "load_documents", broken_stream(500))
    whole = whole_run(config, tmp_path)
    monkeypatch.setattr(jsae, "load_documents", broken_stream(150))
    line = refusal(flags(config), capsys)
    assert "the stream broke; --resume goes on" in line
    assert (Path(config.output_dir) / "checkpoint.safetensors").exists()
    monkeypatch.setattr(jsae, "load_documents", broken_stream(500))
    assert jsae.main([*flags(config), "--resume"]) == 0
    assert_same_run(whole, Path(config.output_dir))


def test_a_hub_stream_that_ends_stops_the_run_with_a_checkpoint(config, monkeypatch, capsys):
    config = from_the_hub(config, monkeypatch)
    documents = [{"text": numbered_text(i)} for i in range(150)]
    monkeypatch.setattr(jsae, "load_documents", lambda *_: documents)
    line = refusal(flags(config), capsys)
    assert re.search("step [0-9]+: hub/text ended after [0-9,]+ contexts, too few for", line)
    assert (Path(config.output_dir) / "checkpoint.safetensors").exists()


def test_numbers_that_break_stop_the_run_before_a_weight_changes(config, monkeypatch):
    real = jsae.jsae_loss
    pairs = []

    def breaks(sae_x, sae_y, *args):
        pairs.append(sae_x.W_dec.detach().clone())
        loss, parts = real(sae_x, sae_y, *args)
        if len(pairs) == 5:
            loss = loss + sae_y.b_enc.sum() * math.inf
        return loss, parts

    monkeypatch.setattr(jsae, "jsae_loss", breaks)
    with pytest.raises(InputError, match="step 5: loss -inf, norm of the gradient inf; --resume"):
        jsae.train(config)
    tensors = safetensors.torch.load_file(Path(config.output_dir) / "checkpoint.safetensors")
    assert tensors["step"] == 4
    assert torch.equal(tensors["sae_x.W_dec"], pairs[4])
    assert all(t.isfinite().all() for t in tensors.values())


def test_nan_among_the_activations_stops_the_run(config, monkeypatch):
    real = jsae.mlp_inputs
    calls = itertools.count(1)

    def nan_in_the_second_filling(*args):
        return real(*args) * (math.nan if next(calls) == 2 else 1)

    monkeypatch.setattr(jsae, "mlp_inputs", nan_in_the_second_filling)
    with pytest.raises(InputError, match="step 5: NaN or Inf among the inputs x of layer 0's MLP"):
        jsae.train(config)
    tensors = safetensors.torch.load_file(Path(config.output_dir) / "checkpoint.safetensors")
    assert tensors["step"] == 4


# ---- 12. Several processes -----------------------------------------------------------------------

PROBE = """
import json, sys, torch, jsae
settings, path = json.loads(sys.argv[1]), sys.argv[2]
rank, world = jsae.process_number()
settings["output_dir"] += f"-{world}"
config = jsae.Config(**settings)
x = torch.randn(config.batch_size, 16, generator=torch.Generator().manual_seed(3))
half = config.batch_size // world
jsae.activation_batches = lambda *_: iter([x[rank * half :][:half]] * 3)

def keep(parameters, limit):
    grads = {str(i): p.grad for i, p in enumerate(parameters)}
    jsae.safetensors.torch.save_file(grads, f"{path}-{world}-{rank}")
    if world > 1:
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
    settings = {name: getattr(config, name) for name in config.__dataclass_fields__}
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
        torch.testing.assert_close(one[name], expected, rtol=1e-4, atol=1e-8)


def test_two_processes_train_stop_together_and_go_on(config, tmp_path):
    config = changed(config, tokens=128 * 400, buffer_batches=2)
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
    assert len(re.findall("jsae.py: stopped at step [0-9]+; --resume goes on", error)) == 1, error
    assert not (run / "sae_x").exists()
    assert (run / "checkpoint.safetensors").exists()
    status, _, error = torchrun(*command, "--resume")
    assert status == 0, error
    assert_same_run(whole, run)
    with pytest.raises(InputError, match="processes was 2, now 1"):
        jsae.train(changed(config, resume=True))


def test_a_batch_that_two_processes_cannot_divide_is_refused(config):
    status, _, error = torchrun(jsae.HERE / "jsae.py", *flags(config, batch_size=127))
    assert status != 0
    assert "--batch-size 127 is not a multiple of 2 processes" in error
