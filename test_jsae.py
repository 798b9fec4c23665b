"""Tests of jsae.py and evaluate.py in the order of the paper: the Jacobian, the loss, real models, data, training,
evaluation, command line.

python -m pytest        (four minutes on two cores; no network)
"""

import importlib.util
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import types
import zlib
from functools import partial
from pathlib import Path

import datasets
import matplotlib.figure
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
ACTS = {
    "gelu": nn.GELU(),
    "tanh_gelu": nn.GELU(approximate="tanh"),
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
    "silu": nn.SiLU(),
    "relu": F.relu,
    "relu2": lambda z: F.relu(z).square(),
    "mish": nn.Mish(),  # goes through the autodiff fallback
}
gated_or_plain = pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
every_act = pytest.mark.parametrize("act", ACTS)


def random_mlp(act="gelu", gated=False, d_model=10, d_mlp=14):
    weights = [(d_mlp, d_model), (d_mlp,), (d_model, d_mlp), (d_model,)]
    weights += [(d_mlp, d_model), (d_mlp,)] if gated else []
    return MLP(*(torch.randn(*shape, dtype=DOUBLE) for shape in weights), act=ACTS[act])


def random_pair(d_model=10, n_latents=30, k=4, b_enc=0.0):
    """Two SAEs in float64, away from their initial values; a low b_enc makes ReLU switch latents off."""
    torch.manual_seed(1)
    pair = TopKSAE(d_model, n_latents, k).double(), TopKSAE(d_model, n_latents, k).double()
    for p in (p for sae in pair for p in sae.parameters()):
        p.data += 0.1 * torch.randn_like(p)
    for sae in pair:
        sae.b_enc.data += b_enc
    return pair


def gradients(loss, pair):
    return torch.autograd.grad(loss, [p for sae in pair for p in sae.parameters()])


# ---- Sparse autoencoders -------------------------------------------------------------------------
def test_sae_starts_with_unit_decoder_rows_and_the_encoder_as_their_copy():
    sae = TopKSAE(8, 40, 3)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(40))
    assert torch.equal(sae.W_enc, sae.W_dec)
    assert not sae.b_enc.any() and not sae.b_dec.any()


def test_sae_keeps_the_k_largest_and_clips_them_at_zero():
    sae = TopKSAE(2, 4, 3)
    sae.W_enc.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -2.0]])
    sae.W_dec.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [5.0, 5.0]])
    sae.b_dec.data = torch.tensor([0.5, -0.5])
    acts, idx = sae.encode(torch.tensor([3.0, 1.0]))  # pre-activations 3, 1, -3, -2
    assert dict(zip(idx.tolist(), acts.tolist())) == {0: 3.0, 1: 1.0, 3: 0.0}
    assert sae(torch.tensor([[3.0, 1.0]])).tolist() == [[3.5, 0.5]]


def test_sae_refuses_k_above_the_number_of_latents():
    with pytest.raises(ValueError, match="k is 9; expected 1 to 8"):
        TopKSAE(4, 8, 9)


# ---- The Jacobian (Eq. 16, Eq. 29) ---------------------------------------------------------------
def test_jacobian_of_a_case_worked_by_hand():
    W_in, W_out = torch.tensor([[1.0, 2.0], [3.0, -1.0]]), torch.tensor([[1.0, 0.0], [2.0, 1.0]])
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
    off = Latents(torch.tensor([2.0, 0.0]), s_x.idx)  # the second input latent is switched off
    assert J(torch.tensor([1.0, 1.0]), off, s_y).tolist() == [[1.0, 0.0], [6.0, 0.0]]


@every_act
def test_derivative_of_each_activation_equals_autodiff(act):
    z = torch.linspace(
        -6, 6, 1000, dtype=DOUBLE, requires_grad=True
    )  # 0, ReLU's kink, is not in it
    phi, derivative = jsae.with_derivative(ACTS[act])
    torch.testing.assert_close(phi(z), ACTS[act](z), rtol=1e-12, atol=1e-12)
    (expected,) = torch.autograd.grad(ACTS[act](z).sum(), z)
    torch.testing.assert_close(derivative(z), expected, rtol=1e-12, atol=1e-12)
    assert (phi in [known for known, _ in jsae.ACTIVATIONS]) == (act != "mish")


def test_an_activation_that_mixes_elements_is_refused():
    with pytest.raises(ValueError, match="elementwise"):
        random_mlp().__init__(*(torch.eye(3),) * 4, act=partial(torch.softmax, dim=-1))


@pytest.mark.parametrize("literal", [False, True], ids=["stable", "literal"])
@gated_or_plain
@every_act
def test_jacobian_equals_autodiff_of_f_s_and_is_zero_elsewhere(act, gated, literal):
    """The whole n_y x n_x Jacobian: ours inside K_2 x K_1, zero outside and where ReLU is off."""
    sae_x, sae_y = random_pair(b_enc=-1.0)
    mlp, n = random_mlp(act, gated), sae_x.n_latents
    sae_y.b_enc.data -= 3.0
    x = torch.randn(5, 10, dtype=DOUBLE)
    s_x = sae_x.encode(x)
    point = sae_x.decode(s_x) if literal else x
    s_y, error = sae_y.encode(mlp(point)), (point - sae_x.decode(s_x)).detach()
    assert (s_x.acts == 0).any() or (s_y.acts == 0).any()
    J = active_jacobian(sae_x, sae_y, mlp, point, s_x, s_y)
    for b in range(len(x)):

        def f_s(s, eps=error[b]):
            values, idx = s.topk(sae_x.k)  # tau_k
            out = sae_y.encode(mlp(sae_x.decode(Latents(F.relu(values), idx)) + eps))
            return torch.zeros(n, dtype=DOUBLE).scatter(0, out.idx, out.acts)

        s = torch.zeros(n, dtype=DOUBLE).scatter(0, s_x.idx[b], s_x.acts[b]).detach()
        ours = torch.zeros(n, n, dtype=DOUBLE)
        ours[s_y.idx[b].unsqueeze(1), s_x.idx[b]] = J[b].detach()
        torch.testing.assert_close(torch.func.jacrev(f_s)(s), ours, rtol=1e-10, atol=1e-10)


def test_rows_and_columns_of_latents_that_relu_switched_off_are_exactly_zero():
    sae_x, sae_y = random_pair(b_enc=-2.0)
    mlp, x = random_mlp(), torch.randn(20, 10, dtype=DOUBLE)
    s_x, s_y = sae_x.encode(x), sae_y.encode(mlp(x) / 4)
    J = active_jacobian(sae_x, sae_y, mlp, x, s_x, s_y)
    assert (s_x.acts == 0).any() and (s_y.acts == 0).any()
    assert not J[s_y.acts == 0].any() and not J.mT[s_x.acts == 0].any()
    assert J[s_y.acts > 0].any()


# ---- The loss (Eq. 5) ----------------------------------------------------------------------------
every_penalty = pytest.mark.parametrize("penalty", ["l1", "l1_over_l2"])


def plain_loss(sae_x, sae_y, mlp, x, coef, penalty="l1"):
    """Eq. 5 from the definitions, each term as it is written there; l1_over_l2 by torch's norms."""
    y = mlp(x)
    J = active_jacobian(sae_x, sae_y, mlp, x, sae_x.encode(x), sae_y.encode(y)).flatten(1)
    ratio = J.norm(1, dim=1) / J.shape[1] ** 0.5 / (J.norm(2, dim=1) + 1e-300)
    term = J.abs().mean() if penalty == "l1" else ratio.mean()
    return F.mse_loss(sae_x(x), x) + F.mse_loss(sae_y(y), y) + coef * term


@every_penalty
@gated_or_plain
@every_act
def test_fast_loss_and_every_gradient_equal_the_plain_formula(act, gated, penalty):
    pair, mlp = random_pair(b_enc=-0.8), random_mlp(act, gated)
    x, name = torch.randn(50, 10, dtype=DOUBLE), f"jacobian_{penalty}"
    fast, parts = jsae_loss(*pair, mlp, x, 0.7, jacobian_penalty=penalty)
    plain = plain_loss(*pair, mlp, x, 0.7, penalty)
    torch.testing.assert_close(fast, plain, rtol=1e-12, atol=1e-12)
    for ours, expected in zip(gradients(fast, pair), gradients(plain, pair)):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
    total = parts["mse_x"] + parts["mse_y"] + 0.7 * parts[name]
    torch.testing.assert_close(total, fast.detach())
    assert not any(parts[part].requires_grad for part in ("mse_x", "mse_y", name))
    assert torch.equal(parts["s_x"].idx, pair[0].encode(x).idx)


@every_penalty
def test_fast_loss_passes_gradcheck(penalty):
    pair, mlp = random_pair(), random_mlp(gated=True)
    x, names = torch.randn(6, 10, dtype=DOUBLE), [n for n, _ in pair[0].named_parameters()]

    def loss(*values):
        saes = [nn.Module(), nn.Module()]
        for i, (sae, name) in enumerate(itertools.product(saes, names)):
            setattr(sae, name, values[i])
        for sae in saes:
            sae.k = pair[0].k
        return jsae_loss(*saes, mlp, x, 0.5, jacobian_penalty=penalty)[0]

    values = [getattr(sae, n).detach().requires_grad_() for sae in pair for n in names]
    assert torch.autograd.gradcheck(loss, values, atol=1e-6, nondet_tol=1e-12)


@every_penalty
@gated_or_plain
def test_fast_loss_is_the_same_whatever_the_chunk(gated, penalty, monkeypatch):
    pair, mlp, x = random_pair(b_enc=-0.8), random_mlp(gated=gated), torch.randn(70, 10).double()
    whole = jsae_loss(*pair, mlp, x, 1.0, 1.0, penalty)[0]
    expected = gradients(whole, pair)
    monkeypatch.setitem(jsae.CHUNK, "cpu", 9 * 4 * 14 * 8)  # nine tokens for the Jacobian
    ours = jsae_loss(*pair, mlp, x, 1.0, 1.0, penalty)[0]
    torch.testing.assert_close(ours, whole, rtol=1e-12, atol=0)
    for one, other in zip(gradients(ours, pair), expected):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)


def test_only_the_l1_penalty_sees_the_scale_of_the_jacobian():
    (sae_x, sae_y), mlp, x = random_pair(), random_mlp(), torch.randn(40, 10, dtype=DOUBLE)
    before, after = {}, {}
    for parts in (before, after):
        for name in ("l1", "l1_over_l2"):
            parts |= jsae_loss(sae_x, sae_y, mlp, x, 1.0, 1.0, name)[1]
        for p in (sae_y.W_enc, sae_y.b_enc):  # the same latents are active, at half the value
            p.data /= 2
    assert after["jacobian_l1"] == pytest.approx(before["jacobian_l1"].item() / 2)
    assert after["jacobian_l1_over_l2"] == pytest.approx(before["jacobian_l1_over_l2"].item())
    assert 1 / 4 < before["jacobian_l1_over_l2"] < 1  # k = 4


def test_the_scale_free_penalty_of_jacobians_with_one_element_or_none():
    (sae_x, sae_y), mlp, x = random_pair(), random_mlp(), torch.randn(9, 10, dtype=DOUBLE)
    ratio = lambda: jsae_loss(sae_x, sae_y, mlp, x, 1.0, 1.0, "l1_over_l2")
    for sae in (sae_x, sae_y):  # latent 0 is always active, and it alone
        sae.b_enc.data.fill_(-1e9)[0] = 1e9
    assert ratio()[1]["jacobian_l1_over_l2"] == pytest.approx(1 / 4)
    sae_y.b_enc.data.fill_(-1e9)
    loss, parts = ratio()
    assert parts["jacobian_l1_over_l2"] == 0
    assert all(g.isfinite().all() for g in gradients(loss, (sae_x, sae_y)))


def test_jacobian_fraction_averages_over_a_random_part_of_the_tokens():
    pair, mlp, x = random_pair(), random_mlp(), torch.randn(4, 10, dtype=DOUBLE)
    term = partial(jsae_loss, *pair, mlp)
    one_by_one = {round(term(x[i : i + 1], 1.0)[1]["jacobian_l1"].item(), 9) for i in range(4)}
    torch.manual_seed(0)
    drawn = {round(term(x, 1.0, 0.25)[1]["jacobian_l1"].item(), 9) for _ in range(60)}
    assert drawn == one_by_one and len(drawn) == 4
    mean = sum(one_by_one) / 4
    assert math.isclose(term(x, 1.0)[1]["jacobian_l1"].item(), mean, rel_tol=1e-6)


def test_coefficient_zero_gives_the_gradients_of_two_independent_saes():
    pair, mlp, x = random_pair(), random_mlp(), torch.randn(50, 10, dtype=DOUBLE)
    loss, parts = jsae_loss(*pair, mlp, x, 0.0)
    assert "jacobian_l1" not in parts
    alone = [F.mse_loss(sae(v), v) for sae, v in zip(pair, (x, mlp(x)))]
    expected = [g for value, sae in zip(alone, pair) for g in gradients(value, [sae])]
    for ours, other in zip(gradients(loss, pair), expected):
        torch.testing.assert_close(ours, other, rtol=1e-10, atol=1e-13)


def test_nothing_of_size_tokens_times_latents_or_k_times_d_mlp_is_kept_for_the_backward_pass():
    pair, mlp = random_pair(n_latents=600, k=8), random_mlp(d_mlp=300)
    x, kept = torch.randn(200, 10, dtype=DOUBLE), []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        jsae_loss(*pair, mlp, x, 1.0)
    assert 0 < max(kept) <= 600 * 300 < 200 * 8 * 300  # W_enc_y W_out, and not B k d_mlp


@every_penalty
def test_autocast_rules_the_large_products_only(penalty):
    torch.manual_seed(0)
    pair = [TopKSAE(16, 64, 4), TopKSAE(16, 64, 4)]
    mlp, x = random_mlp(d_model=16).float(), torch.randn(64, 16)
    exact = jsae_loss(*pair, mlp, x, 1.0, 1.0, penalty)[0]
    with torch.autocast("cpu", torch.bfloat16):
        loss, parts = jsae_loss(*pair, mlp, x, 1.0, 1.0, penalty)
    assert loss.dtype == torch.float32 and parts["s_x"].acts.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0)
    for low, full in zip(gradients(loss, pair), gradients(exact, pair)):
        assert low.dtype == torch.float32  # 2 of 64 tokens have another latent among their four
        assert (low - full).norm() < 0.25 * full.norm()
    acts, idx = parts["s_x"]  # the kept values are exact, though TopK chose them in bfloat16
    products = F.relu((pair[0].W_enc[idx] @ x.unsqueeze(2)).squeeze(2) + pair[0].b_enc[idx])
    torch.testing.assert_close(acts, products, rtol=1e-5, atol=1e-6)


# ---- MLPs of real models -------------------------------------------------------------------------
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
SIZES |= {"num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64}
SIZES |= {"head_dim": 8, "ffn_dim": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SPECIAL = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 4},
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4},
    "opt": {"word_embed_proj_dim": 32},
    "xglm": {"d_model": 32, "attention_heads": 4, "num_layers": 2},
    "bart": {
        "d_model": 32,
        "decoder_layers": 2,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 40,
    },
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 16, "decoder_sparse_step": 1},
}
PLAIN = "gpt_neox gpt2 gpt_neo gptj phi opt falcon starcoder2 persimmon codegen nemotron bloom mpt"
PLAIN += " biogpt xglm gpt_bigcode arcee apertus ctrl openai-gpt bart gpt_neox_japanese"
GATED = "llama mistral qwen2 qwen3 gemma gemma2 gemma3_text phi3 stablelm olmo2 granite glm cohere"
GATED += " olmo smollm3 helium exaone4 glm4 lfm2 modernbert-decoder"
OTHER = "mixtral qwen2_moe gpt_oss granitemoeshared bitnet rwkv"


def random_model(kind):
    """A tiny random model; only settings that its config has are changed."""
    defaults = transformers.AutoConfig.for_model(kind)
    own = SPECIAL.get(kind, {})
    sizes = {
        k: v
        for k, v in SIZES.items()
        if hasattr(defaults, k) and not ("d_model" in own and k in own)
    }
    if kind in ("falcon", "gpt_neo"):
        sizes.pop("head_dim", None)
    if getattr(defaults, "layer_types", None) is not None:
        own = own | {"layer_types": None}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **sizes, **own)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@pytest.mark.parametrize("kind", PLAIN.split() + GATED.split())
def test_mlp_of_every_architecture_reproduces_the_models_own(kind):
    model = random_model(kind)
    assert model.training
    mlp = MLP.from_model(model, 1)
    assert model.training and (mlp.W_gate is not None) == (kind in GATED.split())
    assert all(buffer.is_contiguous() for buffer in mlp.buffers())  # safetensors asks for it
    seen, model = [], model.eval()
    hook = mlp.sites[-1].register_forward_hook(lambda m, a, y: seen.append(y.detach().clone()))
    ids = torch.arange(3 * 20).reshape(3, 20) + 5
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    hook.remove()
    x = jsae.mlp_inputs(model, mlp, ids)
    assert x.shape == (3, 20, 32)
    torch.testing.assert_close(mlp(x).flatten(), seen[0].flatten(), rtol=1e-4, atol=1e-6)
    _, derivative = mlp.linearize(x[0, 0])
    J = sum(mlp.W_out @ (c.unsqueeze(1) * W) for c, W in derivative)
    torch.testing.assert_close(torch.func.jacrev(mlp)(x[0, 0]), J, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", OTHER.split())
def test_what_is_not_one_dense_mlp_is_refused(kind):
    with pytest.raises(ValueError, match="layer 1 of .*(mixture of experts|no single dense MLP)"):
        MLP.from_model(random_model(kind), 1)


@pytest.mark.parametrize(
    "name", ["gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "quick_gelu"]
)
def test_the_activation_is_told_apart_even_where_small_weights_hide_it(name):
    config = transformers.GPTNeoXConfig(**{k: SIZES[k] for k in list(SIZES)[:4]}, hidden_act=name)
    config.initializer_range, config.intermediate_size = 1e-3, 48
    mlp = MLP.from_model(transformers.AutoModelForCausalLM.from_config(config), 0)
    z = torch.linspace(-4, 4, 99)
    torch.testing.assert_close(mlp.act(z), ACT2FN[name](z), rtol=0, atol=1e-6)


def test_from_module_finds_a_fused_reversed_gate_with_odd_names():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 20, bias=False), nn.Linear(10, 6)

        def forward(self, x):
            up, gate = self.a(x).chunk(2, dim=-1)
            return x + self.b(up * torch.tanh(gate))  # the residual stays outside

    module = Odd()
    module.phi = torch.tanh
    mlp, x = MLP.from_module(module), torch.randn(7, 6)
    torch.testing.assert_close(x + mlp(x), module(x))


@pytest.mark.parametrize("module", [nn.Linear(4, 4), nn.LayerNorm(4), nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 4))])  # fmt: skip
def test_from_module_refuses_what_is_no_mlp(module):
    with pytest.raises(ValueError, match="dense MLP"):
        MLP.from_module(module)


def test_mlp_inputs_leaves_the_forward_pass_at_the_mlp():
    model, later = random_model("llama").eval(), []
    mlp = MLP.from_model(model, 0)
    for module in (*mlp.sites, model.model.layers[1], model.lm_head):
        module.register_forward_hook(lambda *_: later.append(1))
    jsae.mlp_inputs(model, mlp, torch.ones(2, 5, dtype=torch.long))
    assert not later


# ---- Text and activations ------------------------------------------------------------------------
@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """A random one-layer GPT-NeoX of the bundled vocabulary, with the bundled tokenizer."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    sizes = {"vocab_size": 2560, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config = transformers.GPTNeoXConfig(
        **sizes, num_attention_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "docs.jsonl"
    rows = [{"text": f"Document {i}: " + " ".join(map(str, range(i, i + 60)))} for i in range(200)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def config(model_dir, text_file, tmp_path):
    settings = {"model": str(model_dir), "layer": 0, "dataset": str(text_file), "k": 4, "lr": 0.01}
    settings |= {"tokens": 2000, "batch_size": 128, "expansion_factor": 4, "context_size": 32}
    return Config(**settings, buffer_batches=4, output_dir=str(tmp_path / "run"), device="cpu")


def contexts_of(config, held_out=False, n=10**9):
    model, tokenizer = jsae.load_language_model(config)
    stream = jsae.token_contexts(config, model, tokenizer, held_out)
    return list(itertools.islice(stream, n)), tokenizer


def changed(config, **settings):
    return Config(**{f: getattr(config, f) for f in config.__dataclass_fields__} | settings)


def test_contexts_are_packed_documents_behind_bos(config, text_file):
    contexts, tokenizer = contexts_of(config, n=50)
    assert all(c.shape == (32,) and c[0] == tokenizer.bos_token_id for c in contexts)
    texts = [json.loads(line)["text"] for line in text_file.read_text().splitlines()]
    training = [t for t in texts if zlib.crc32(t.encode()) % 20]
    stream = "".join(t + tokenizer.eos_token for t in training)
    assert stream.startswith(tokenizer.decode(np.concatenate([c[1:] for c in contexts])))


def test_training_and_held_out_text_share_no_document_and_miss_none(config, text_file):
    held_out, tokenizer = contexts_of(config, held_out=True)
    text = tokenizer.decode(np.concatenate([c[1:] for c in held_out]))
    for line in text_file.read_text().splitlines():
        document = json.loads(line)["text"]
        name = document.split(":")[0] + ":"
        assert (name in text) == (zlib.crc32(document.encode()) % 20 == 0)


def test_one_document_is_split_by_contexts(config, tmp_path):
    (tmp_path / "one.txt").write_text(" ".join(map(str, range(3000))))
    one = changed(config, dataset=str(tmp_path / "one.txt"))
    held_out, _ = contexts_of(one, held_out=True)
    training, _ = contexts_of(one, n=19 * len(held_out))
    joined = [tuple(c) for c in training + held_out]
    assert len(held_out) > 1 and len(set(joined)) == len(joined)


def test_stdlib_holds_out_by_path():
    documents, local = jsae.load_documents("stdlib", "train")
    documents = list(documents)
    held = [d["stdlib"] for d in documents if zlib.crc32(d["stdlib"].encode()) % 20 == 0]
    assert local and 0.02 < len(held) / len(documents) < 0.08
    assert not any("site-packages" in d["stdlib"] for d in documents)
    assert "textwrap.py" in [d["stdlib"] for d in documents]


@pytest.mark.parametrize("kind", ["txt", "jsonl", "jsonl.zst", "parquet", "arrow", "input_ids"])
def test_every_kind_of_local_data_gives_the_same_documents(kind, config, tmp_path):
    texts = [f"text number {i} " * 30 for i in range(60)]
    folder = tmp_path / "data"
    folder.mkdir()
    table = datasets.Dataset.from_dict({"text": texts})
    if kind == "txt":
        for i, text in enumerate(texts):
            (folder / f"{i:03}.txt").write_text(text)
    elif kind == "arrow":
        table.save_to_disk(folder)
    elif kind == "parquet":
        table.to_parquet(folder / "a.parquet")
    elif kind == "input_ids":
        tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
        table.map(lambda d: {"input_ids": tokenizer(d["text"]).input_ids}, remove_columns="text").to_parquet(folder / "a.parquet")  # fmt: skip
    else:
        import zstandard

        data = "\n".join(json.dumps({"text": t, "n": 1}) for t in texts).encode()
        data = zstandard.compress(data) if kind == "jsonl.zst" else data
        (folder / f"a.{kind}").write_bytes(data)
    contexts, tokenizer = contexts_of(changed(config, dataset=str(folder)), n=20)
    training = [t for t in texts if kind == "input_ids" or zlib.crc32(t.encode()) % 20]
    text = tokenizer.decode(np.concatenate([c[1:] for c in contexts]))
    if kind == "input_ids":
        assert all(part in tokenizer.eos_token.join(training) for part in text.split(tokenizer.eos_token)[1:-1])  # fmt: skip
    else:
        assert "".join(t + tokenizer.eos_token for t in training).startswith(text)


def batches_of(config, n_contexts, done=0):
    """-> (all batches that come from the first contexts of the text, from number `done` on; model)."""
    model, tokenizer = jsae.load_language_model(config)
    mlp, no_autocast = MLP.from_model(model, 0), partial(torch.autocast, "cpu", enabled=False)
    real = jsae.token_contexts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            jsae,
            "token_contexts",
            lambda *a, skip, **k: itertools.islice(real(*a, **k), skip, n_contexts),
        )
        return [*jsae.activation_batches(config, model, mlp, tokenizer, no_autocast, done)], model


@pytest.mark.parametrize("keep", [False, True])
def test_batches_hold_each_mlp_input_once_and_no_first_token(config, keep):
    kept = changed(config, keep_first_token=keep, batch_size=32 if keep else 31)
    contexts, _ = contexts_of(config, n=8)
    batches, model = batches_of(changed(kept, tokens=8 * kept.batch_size), 8)
    x, seen = torch.cat(batches), []
    model.gpt_neox.layers[0].mlp.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    model(torch.from_numpy(np.stack(contexts)))
    expected = seen[0][:, 0 if keep else 1 :].flatten(0, 1)
    assert x.shape == expected.shape and not torch.equal(x, expected)  # shuffled
    order, other = x[:, 0].argsort(), expected[:, 0].argsort()
    torch.testing.assert_close(x[order], expected[other], rtol=1e-4, atol=1e-5)


def test_each_filling_has_an_order_of_its_own_and_no_more_contexts_than_it_needs(
    config, monkeypatch
):
    contexts, _ = contexts_of(config, n=17)  # a filling: 4 batches of 128 from contexts of 31
    monkeypatch.setattr(jsae, "token_contexts", lambda *a, **k: itertools.cycle(contexts))
    seen, real = [], jsae.mlp_inputs
    monkeypatch.setattr(jsae, "mlp_inputs", lambda *a: seen.append(len(a[2])) or real(*a))
    model, tokenizer = jsae.load_language_model(config)
    mlp, no_autocast = MLP.from_model(model, 0), partial(torch.autocast, "cpu", enabled=False)
    nine = changed(config, tokens=128 * 9)
    batches = [*jsae.activation_batches(nine, model, mlp, tokenizer, no_autocast)]
    one, other = torch.cat(batches[:4]), torch.cat(batches[4:8])
    assert torch.equal(one[:, 0].sort().values, other[:, 0].sort().values)
    assert not torch.equal(one, other) and len(batches) == 9
    assert sum(seen) == 17 + 17 + 5


def test_nothing_is_lost_of_a_long_document(config, tmp_path):
    (tmp_path / "long.txt").write_text("ab cd " * 200_000)  # 1.2M characters
    one = changed(config, dataset=str(tmp_path / "long.txt"), context_size=64)
    held_out, tokenizer = contexts_of(one, held_out=True)
    n = len(tokenizer("ab cd " * 1000).input_ids) / 1000 * 200_000 / 63
    assert len(held_out) == pytest.approx(n / 20, rel=0.01)


def test_text_that_ends_gives_the_whole_batches_that_it_holds(config):
    batches, _ = batches_of(changed(config, tokens=128 * 99), 10)
    assert len(batches) == 10 * 31 // 128


# ---- Training ------------------------------------------------------------------------------------
def flags(config, **settings):
    names = ["model", "layer", "dataset", "k", "tokens", "batch_size", "expansion_factor"]
    names += ["context_size", "buffer_batches", "lr", "device", "output_dir"]
    given = {name: getattr(config, name) for name in names} | settings
    return [part for name, v in given.items() for part in (f"--{name.replace('_', '-')}", str(v))]


def rows_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights_of(run):
    return [p for sae in jsae.load_run(run)[:2] for p in sae.parameters()]


def test_a_run_holds_what_the_design_says(config):
    run = jsae.train(config)
    names = {str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()}
    folders = [f"sae_{s}/{f}" for s in "xy" for f in ("cfg.json", "sae_weights.safetensors")]
    assert names == {"config.json", "metrics.jsonl", *folders}
    saved = json.loads((run / "config.json").read_text())
    assert Config(**saved["config"]) == config and len(saved["mlp_sha256"]) == 64
    rows = rows_of(run)
    assert rows[-1]["step"] == 2000 // 128 and rows[-1]["tokens"] == 2000 // 128 * 128
    expected = "step tokens mse_x mse_y ev_x ev_y jacobian_l1 jacobian_l1_over_l2 dead_x dead_y lr seconds"  # fmt: skip
    assert set(expected.split()) <= rows[-1].keys()
    sae_x, sae_y, loaded = jsae.load_run(run)
    assert loaded == config
    torch.testing.assert_close(sae_x.W_dec.norm(dim=1), torch.ones(64))
    torch.testing.assert_close(sae_y.W_dec.norm(dim=1), torch.ones(64))


def test_training_lowers_the_loss_and_follows_the_schedules(config):
    rows = rows_of(jsae.train(changed(config, tokens=128 * 100)))
    assert rows[-1]["mse_x"] < 0.7 * rows[0]["mse_x"]
    rates = {row["step"]: row["lr"] for row in rows}
    assert rates[50] == config.lr and math.isclose(rates[90], config.lr * 11 / 20)
    assert math.isclose(rates[100], config.lr / 20)
    coefs = [row["coef"] for row in rows]
    assert coefs[0] == config.jacobian_coef  # step 5 of 100: the warm-up over 5 % is complete
    assert rows[0]["dead_x"] >= rows[-1]["dead_x"]


def test_each_penalty_lowers_what_it_measures(config, tmp_path):
    cases, last = {"none": (0.0, "l1"), "l1": (3.0, "l1"), "l1_over_l2": (3.0, "l1_over_l2")}, {}
    for name, (coef, penalty) in cases.items():
        settings = {"jacobian_coef": coef, "jacobian_penalty": penalty, "tokens": 128 * 60}
        run = changed(config, **settings, output_dir=str(tmp_path / name))
        last[name] = rows_of(jsae.train(run))[-1]  # both are measured at coefficient 0, too
    l1, ratio = ({n: row[f"jacobian_{p}"] for n, row in last.items()} for p in ("l1", "l1_over_l2"))
    assert l1["l1"] < 0.8 * l1["none"] and l1["l1"] < 0.8 * l1["l1_over_l2"]
    assert ratio["l1_over_l2"] < 0.9 * ratio["none"] and ratio["l1_over_l2"] < 0.9 * ratio["l1"]


def test_measure_equals_the_parts_of_the_loss():
    pair, mlp, x = random_pair(b_enc=-0.8), random_mlp(), torch.randn(300, 10, dtype=DOUBLE)
    row = jsae.measure(*pair, mlp, x)
    for penalty in ("l1", "l1_over_l2"):
        for name, value in jsae_loss(*pair, mlp, x, 1.0, 1.0, penalty)[1].items():
            assert name[:2] == "s_" or row[name] == pytest.approx(value.item(), rel=1e-9)
    J = active_jacobian(*pair, mlp, x, pair[0].encode(x), pair[1].encode(mlp(x)))
    assert row["jacobian_above_0.01"] == pytest.approx((J.abs() > 0.01).sum().item() / 300)


def test_choices_are_checked_without_the_command_line_too():
    with pytest.raises(InputError, match="--dtype is 'float16'; expected"):
        Config(dtype="float16")
    with pytest.raises(KeyError, match="l2"):
        jsae_loss(*random_pair(), random_mlp(), torch.randn(3, 10).double(), 1.0, 1.0, "l2")


def test_the_default_folder_tells_the_penalties_apart():
    names = [Config(jacobian_penalty=p).output_dir for p in ("l1", "l1_over_l2")]
    assert names[0] == "runs/pythia-70m-L3-R32-k32-lambda1-seed0"
    assert names[1] == "runs/pythia-70m-L3-R32-k32-lambda1-l1_over_l2-seed0"


def test_two_runs_are_bit_identical_and_seeds_differ(config, tmp_path):
    runs = [
        jsae.train(changed(config, output_dir=str(tmp_path / n), seed=int(n == "c"))) for n in "abc"
    ]
    a, b, c = map(weights_of, runs)
    assert all(map(torch.equal, a, b)) and not any(map(torch.equal, a[:1], c[:1]))
    timing = ("seconds", "tokens_per_second")
    strip = [
        [{k: v for k, v in row.items() if k not in timing} for row in rows_of(r)] for r in runs
    ]
    assert strip[0] == strip[1] != strip[2]


def test_saved_saes_follow_the_saelens_format(config):
    run, x = jsae.train(config), torch.randn(9, 16)
    for sae, s in zip(jsae.load_run(run), "xy"):
        cfg = json.loads((run / f"sae_{s}" / "cfg.json").read_text())
        expected = {"architecture": "topk", "d_in": 16, "d_sae": 64, "k": 4, "dtype": "float32"}
        expected["apply_b_dec_to_input"] = False
        assert expected.items() <= cfg.items() and cfg["metadata"]["sae_lens_version"] >= "6"
        t = safetensors.torch.load_file(run / f"sae_{s}" / "sae_weights.safetensors")
        values, idx = (x @ t["W_enc"] + t["b_enc"]).topk(4)
        dense = torch.zeros(9, 64).scatter(1, idx, F.relu(values))
        torch.testing.assert_close(dense @ t["W_dec"] + t["b_dec"], sae(x), rtol=1e-5, atol=1e-5)


def test_random_controls_redraw_or_permute_every_parameter(config):
    trained, _ = jsae.load_language_model(config)
    for how in ("init", "shuffle"):
        control = changed(config, randomize_weights=how, seed=5)
        model, again = (jsae.load_language_model(control)[0] for _ in range(2))
        for (name, p), q, old in zip(
            model.named_parameters(), again.parameters(), trained.parameters()
        ):
            assert torch.equal(p, q) and p.shape == old.shape
            constant = old.unique().numel() == 1  # norms and biases of this untrained model
            assert constant or not torch.equal(p, old), name
            if how == "shuffle":
                assert torch.equal(p.flatten().sort().values, old.flatten().sort().values)
    assert control.output_dir != changed(control, output_dir="").output_dir


def test_a_hub_stream_that_ends_stops_the_run_with_its_weights_saved(config, monkeypatch):
    documents = [{"text": "a b c d e f " * 40}] * 10
    stream = datasets.Dataset.from_list(documents).to_iterable_dataset()
    monkeypatch.setattr(jsae, "load_documents", lambda *_: (stream, False))
    with pytest.raises(InputError, match="step"):
        jsae.train(changed(config, tokens=10**6))
    assert [*(Path(config.output_dir) / "checkpoint").iterdir()]


def test_local_text_that_ends_starts_again_with_a_notice(config, capfd):
    run = jsae.train(changed(config, tokens=60_000, batch_size=2048))
    assert rows_of(run)[-1]["step"] == 29 and "begins again" in capfd.readouterr().err


# ---- Runs that survive ---------------------------------------------------------------------------
TIMING = ("seconds", "tokens_per_second")


def deterministic(run):
    return [{k: v for k, v in row.items() if k not in TIMING} for row in rows_of(run)]


def assert_same_run(one, other):
    for s in "xy":
        file = Path(f"sae_{s}") / "sae_weights.safetensors"
        assert (one / file).read_bytes() == (other / file).read_bytes()
    assert deterministic(one) == deterministic(other)


def interrupted_at(step, number, monkeypatch):
    """A loss that sends the process a signal in the given step."""
    real, calls = jsae.jsae_loss, itertools.count(1)

    def loss(*args):
        if next(calls) == step:
            signal.raise_signal(number)
        return real(*args)

    monkeypatch.setattr(jsae, "jsae_loss", loss)


@pytest.fixture
def signals_kept():
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize(
    "step", [1, 4, 7, 14]
)  # a buffer has 4 batches; the text ends in the third
@pytest.mark.parametrize("text", ["documents", "one document"])
def test_a_stopped_run_goes_on_to_the_same_bits(
    number, status, step, text, config, tmp_path, monkeypatch, capsys, signals_kept
):
    if text == "one document":
        (tmp_path / "one.txt").write_text(" ".join(map(str, range(400))))
        config = changed(config, dataset=str(tmp_path / "one.txt"))
    config = changed(config, jacobian_fraction=0.5)
    whole = jsae.train(changed(config, output_dir=str(tmp_path / "whole")))
    given = [*flags(config, jacobian_fraction=0.5), "--overwrite"]
    with monkeypatch.context() as patch:
        interrupted_at(step, number, patch)
        assert jsae.main(given) == status
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error == f"jsae.py: stopped at step {step}; --resume goes on"
    assert len([*Path(config.output_dir).glob("checkpoint/*")]) == 1
    assert jsae.main([*given, "--resume", "--checkpoint-minutes", "3"]) == 0
    assert_same_run(whole, Path(config.output_dir))
    assert not (whole / "checkpoint").exists()
    assert not (Path(config.output_dir) / "checkpoint").exists()


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_any_moment_a_run_goes_on_to_the_same_bits(seed, config, tmp_path):
    config = changed(config, tokens=128 * 60, checkpoint_minutes=0.0)  # one after every step
    whole = jsae.train(changed(config, output_dir=str(tmp_path / "whole"), checkpoint_minutes=9.0))
    command = [sys.executable, jsae.HERE / "jsae.py", *flags(config, checkpoint_minutes=0.0)]
    draw, run = random.Random(seed), Path(config.output_dir)
    for _ in range(2):
        resume = ["--resume"] if (run / "config.json").exists() else []
        with subprocess.Popen([*command, *resume], stderr=subprocess.DEVNULL) as process:
            while not (run / "checkpoint").exists() and process.poll() is None:
                time.sleep(0.02)
            time.sleep(draw.uniform(0, 0.5))
            process.kill()
    subprocess.run([*command, "--resume"], check=True, timeout=120, capture_output=True)
    assert_same_run(whole, run)


@pytest.fixture
def stopped(config, monkeypatch, signals_kept):
    """A run with two checkpoints, after steps 8 and 9 of 15."""
    config = changed(config, checkpoint_minutes=0.0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted_at(9, signal.SIGTERM, patch)
        jsae.train(config, graceful=True)
    return config


def test_a_damaged_checkpoint_is_left_out_for_the_one_before_it(stopped, tmp_path, capsys):
    whole = jsae.train(changed(stopped, output_dir=str(tmp_path / "whole")))
    _, new = sorted(Path(stopped.output_dir).glob("checkpoint/*"))
    data = new.read_bytes()
    new.write_bytes(data[:5000] + bytes([data[5000] ^ 1]) + data[5001:])
    run = jsae.train(changed(stopped, resume=True))
    assert_same_run(whole, run)
    assert f"{new} is damaged" in capsys.readouterr().err


def test_without_a_whole_checkpoint_resume_stops_and_deletes_nothing(stopped, capsys):
    paths = sorted(Path(stopped.output_dir).glob("checkpoint/*"))
    for path in paths:
        path.write_bytes(path.read_bytes()[:-100])
    before = [path.read_bytes() for path in paths]
    with pytest.raises(InputError, match="no whole checkpoint"):
        jsae.train(changed(stopped, resume=True))
    assert [path.read_bytes() for path in paths] == before


@pytest.mark.parametrize("setting", [{"k": 5}, {"lr": 0.02}, {"seed": 1}, {"tokens": 3000}, {"buffer_batches": 3}])  # fmt: skip
def test_resume_refuses_another_setting_and_names_it(setting, stopped):
    (name,) = setting
    with pytest.raises(InputError, match=f"--resume: {name} was "):
        jsae.train(changed(stopped, resume=True, **setting))


def test_resume_refuses_a_model_that_has_changed(stopped, model_dir, tmp_path):
    folder = shutil.copytree(model_dir, tmp_path / "model")
    info = Path(stopped.output_dir) / "config.json"
    saved = json.loads(info.read_text())
    saved["config"]["model"] = str(folder)
    info.write_text(json.dumps(saved))
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "dense_h_to_4h.weight" in name)
    tensors[name] = tensors[name] + 1
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="--resume: mlp_sha256 was"):
        jsae.train(changed(stopped, resume=True, model=str(folder)))


def test_resume_before_the_first_checkpoint_starts_over(stopped, tmp_path):
    shutil.rmtree(Path(stopped.output_dir) / "checkpoint")
    run = jsae.train(changed(stopped, resume=True))
    assert_same_run(jsae.train(changed(stopped, output_dir=str(tmp_path / "whole"))), run)


def test_resume_of_a_finished_run_leaves_it_as_it_is(config, monkeypatch):
    run = jsae.train(config)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    monkeypatch.setattr(jsae, "jsae_loss", lambda *_: 1 / 0)
    assert jsae.main([*flags(config), "--resume"]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}


@pytest.mark.parametrize("what", ["metrics.jsonl", "checkpoint"])
def test_a_full_disk_stops_a_run_that_can_go_on(what, config, tmp_path, monkeypatch, capsys):
    config = changed(config, checkpoint_minutes=0.0)
    whole, calls = jsae.train(changed(config, output_dir=str(tmp_path / "whole"))), []
    real = jsae.write_file if what == "checkpoint" else json.dumps

    def full(first, *args, **kwargs):
        hit = what in str(first) if what == "checkpoint" else "ev_x" in first
        calls.extend([1] * hit)
        if hit and len(calls) == 6:
            raise OSError(28, "No space left on device", str(first)[:40])
        return real(first, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(*(jsae, "write_file") if what == "checkpoint" else (json, "dumps"), full)
        assert jsae.main(flags(config, checkpoint_minutes=0.0)) == 2
    assert "No space left on device" in capsys.readouterr().err.strip().splitlines()[-1]
    assert_same_run(whole, jsae.train(changed(config, resume=True)))


def test_checkpoints_come_after_their_minutes_and_two_are_kept(config, monkeypatch):
    saved, real, clock = [], jsae.save_checkpoint, itertools.count(0, 30)  # half a minute per look
    monkeypatch.setattr(jsae.time, "time", lambda: float(next(clock)))
    monkeypatch.setattr(jsae, "save_checkpoint", lambda *a: saved.append(a[-1]) or real(*a))
    kept = []
    monkeypatch.setattr(jsae, "save_pair", lambda folder, *_: kept.extend(folder.glob("checkpoint/*")))  # fmt: skip
    jsae.train(changed(config, checkpoint_minutes=2.5))
    assert 2 <= len(saved) < 15 and len(kept) == 2
    assert [int(path.name[:9]) for path in sorted(kept)] == saved[-2:]


def test_stopped_before_the_first_step_nothing_is_written(
    config, monkeypatch, capsys, signals_kept
):
    real = jsae.mlp_inputs
    stop = lambda *args: signal.raise_signal(signal.SIGTERM) or real(*args)  # in the first filling
    with monkeypatch.context() as patch:
        patch.setattr(jsae, "mlp_inputs", stop)
        assert jsae.main(flags(changed(config, tokens=128 * 40, buffer_batches=40))) == 143
    assert capsys.readouterr().err.strip().splitlines()[-1] == "jsae.py: stopped at step 0"
    assert not Path(config.output_dir).exists()


def test_overwriting_leaves_what_a_link_points_to(config, tmp_path):
    run, other = jsae.train(config), tmp_path / "other"
    other.mkdir()
    (other / "file").write_text("mine")
    (run / "figures").symlink_to(other)
    jsae.train(changed(config, overwrite=True, seed=1))
    assert (other / "file").read_text() == "mine" and not (run / "figures").exists()


def test_a_model_without_its_tokenizer_is_not_trained_on_nothing(config, model_dir, tmp_path):
    folder = tmp_path / "model"
    transformers.AutoModelForCausalLM.from_pretrained(model_dir).save_pretrained(folder)
    with pytest.raises(InputError, match="no text with a tokenizer"):
        jsae.train(changed(config, model=str(folder)))


def test_processes_that_share_one_document_train_on_no_held_out_text(config, tmp_path, monkeypatch):
    (tmp_path / "one.txt").write_text(" ".join(map(str, range(3000))))
    config = changed(config, dataset=str(tmp_path / "one.txt"))
    held_out, _ = contexts_of(config, held_out=True)
    whole, _ = contexts_of(config, n=19 * len(held_out))
    shares = []
    for rank in range(2):
        monkeypatch.setattr(jsae, "RANK", rank)
        monkeypatch.setattr(jsae, "WORLD", 2)
        shares += contexts_of(config, n=len(whole) // 2)[0]
    assert {*map(tuple, shares)} <= {*map(tuple, whole)} and len({*map(tuple, shares)}) > 1.9 * (len(whole) // 2)  # fmt: skip


def broken_stream(n):
    def documents():
        for i in range(n):
            yield {"text": f"Document {i}: " + " ".join(map(str, range(i, i + 60)))}
        raise ConnectionError("the stream broke")

    return lambda *_: (datasets.IterableDataset.from_generator(documents), False)


def test_a_stream_that_breaks_stops_the_run_which_can_go_on(config, tmp_path, monkeypatch, capsys):
    config = changed(config, tokens=128 * 100)
    monkeypatch.setattr(jsae, "load_documents", broken_stream(300))
    whole = jsae.train(changed(config, output_dir=str(tmp_path / "whole")))
    monkeypatch.setattr(jsae, "load_documents", broken_stream(100))
    assert jsae.main(flags(config)) == 2
    assert "the stream broke" in capsys.readouterr().err.strip().splitlines()[-1]
    monkeypatch.setattr(jsae, "load_documents", broken_stream(300))
    assert jsae.main([*flags(config), "--resume"]) == 0
    assert_same_run(whole, Path(config.output_dir))


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_documents_that_are_empty_enormous_or_not_utf8_are_counted(suffix, config, tmp_path):
    folder = tmp_path / "odd"
    folder.mkdir()
    texts = [b"", b"", b"caf\xe9 " * 50, b"ab " * 400_000, *(b"plain %d " % i * 40 for i in range(40))]  # fmt: skip
    texts = [t for t in texts if not t or zlib.crc32(t.decode("utf-8", "replace").encode()) % 20]
    if suffix == "jsonl":
        lines = [b'{"text": "' + t + b'"}' for t in texts]
        (folder / "a.jsonl").write_bytes(b"\n".join(lines))
    for i, text in enumerate(texts if suffix == "txt" else ()):
        (folder / f"{i:02}.txt").write_bytes(text)
    run = jsae.train(changed(config, dataset=str(folder), tokens=128 * 800, context_size=64))
    assert rows_of(run)[-1]["odd_documents"] == {"empty": 2, "long": 1, "not_utf8": 1}


def test_numbers_that_break_are_named_before_a_weight_changes(config, monkeypatch):
    real, pairs = jsae.jsae_loss, []

    def breaks(sae_x, sae_y, *args):
        pairs.append([p.detach().clone() for sae in (sae_x, sae_y) for p in sae.parameters()])
        loss, parts = real(sae_x, sae_y, *args)
        bad = (sae_y.b_enc * 0).sum() if len(pairs) == 5 else 0.0
        return loss + (bad * math.inf if len(pairs) == 5 else 0.0), parts

    monkeypatch.setattr(jsae, "jsae_loss", breaks)
    with pytest.raises(InputError, match=r"step 5: loss nan, NaN or Inf in gradients of \['y.b_enc'\]"):  # fmt: skip
        jsae.train(config)
    (path,) = Path(config.output_dir).glob("checkpoint/*")
    tensors = safetensors.torch.load_file(path)
    assert path.name.startswith("000000004-") and torch.equal(tensors["x.W_dec"], pairs[4][0])
    assert all(t.isfinite().all() for t in tensors.values())


def test_nan_among_the_activations_stops_the_run(config, monkeypatch):
    real, calls = jsae.mlp_inputs, itertools.count(1)
    monkeypatch.setattr(jsae, "mlp_inputs", lambda *a: real(*a) * (math.nan if next(calls) == 4 else 1))  # fmt: skip
    with pytest.raises(InputError, match=r"step 5: NaN or Inf among the inputs x of layer 0's MLP"):
        jsae.train(config)
    assert len([*Path(config.output_dir).glob("checkpoint/000000004-*")]) == 1


def test_nothing_is_pickled_and_no_remote_code_is_trusted():
    for program in ("jsae.py", "evaluate.py"):
        text = (jsae.HERE / program).read_text()
        assert not re.search(
            r"(?<!safetensors\.)torch\.(load|save)\b|pickle|trust_remote_code|_object\(", text
        )


# ---- Several processes ---------------------------------------------------------------------------
def test_each_process_reads_its_own_share_of_the_documents(config, monkeypatch):
    model, tokenizer = jsae.load_language_model(config)
    monkeypatch.setattr(jsae, "WORLD", 2)
    found = []
    for rank in range(2):
        monkeypatch.setattr(jsae, "RANK", rank)
        contexts = itertools.islice(jsae.token_contexts(config, model, tokenizer), 190)
        text = tokenizer.decode(np.concatenate([c[1:] for c in contexts]))
        found.append(set(re.findall("Document [0-9]+:", text)))
    assert min(map(len, found)) > 40 and not found[0] & found[1]


PROBE = """
import sys, torch, jsae
config, world = jsae.Config(**eval(sys.argv[1])), jsae.WORLD
config = jsae.dataclasses.replace(config, output_dir=f"{config.output_dir}-{world}")
x = torch.randn(config.batch_size, 16, generator=torch.Generator().manual_seed(3))
half = config.batch_size // world
jsae.activation_batches = lambda *_: iter([x[jsae.RANK * half :][:half]] * 3)
real = torch.nn.utils.get_total_norm
def norm(grads):
    named = {str(i): g for i, g in enumerate(grads)}
    jsae.safetensors.torch.save_file(named, f"{sys.argv[2]}-{world}-{jsae.RANK}")
    sys.exit(0)
torch.nn.utils.get_total_norm = norm
if world > 1:
    torch.distributed.init_process_group()
jsae.train(config)
"""


def torchrun(*command, **kwargs):
    """The command in two processes on this machine; -> (status, stdout, stderr)."""
    here = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*here, *command], capture_output=True, text=True, timeout=120, check=False, **kwargs)  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_gradients_of_two_halves_in_two_processes_equal_those_of_the_whole(config, tmp_path):
    (tmp_path / "probe.py").write_text(PROBE)
    settings = {name: getattr(config, name) for name in config.__dataclass_fields__}
    command = [tmp_path / "probe.py", repr(settings), tmp_path / "grads"]
    environment = os.environ | {"PYTHONPATH": str(jsae.HERE)}
    subprocess.run([sys.executable, *command], check=True, timeout=120, env=environment)
    status, _, error = torchrun(*command, env=environment)
    assert status == 0, error
    files = [tmp_path / f"grads-{n}" for n in ("1-0", "2-0", "2-1")]
    whole, one, other = map(safetensors.torch.load_file, files)
    assert len(whole) == 8 and all(torch.equal(one[name], other[name]) for name in whole)
    for name, expected in whole.items():
        torch.testing.assert_close(one[name], expected, rtol=1e-4, atol=1e-8)


def test_two_processes_train_stop_together_and_go_on(config, tmp_path):
    command = [jsae.HERE / "jsae.py", *flags(config, tokens=128 * 400, buffer_batches=2)]
    status, out, error = torchrun(*command[:-1], tmp_path / "whole")
    assert status == 0 and out.count("evaluate it with") == 1, error
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["processes"] == 2
    run = Path(config.output_dir)
    here = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    with subprocess.Popen([*here, *command], stderr=subprocess.PIPE, text=True) as process:
        while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
            time.sleep(0.02)
            assert process.poll() is None
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(workers[-1]), signal.SIGTERM)  # one of the two
        error = process.communicate(timeout=60)[1]
    assert len(re.findall("stopped at step ([0-9]+);", error)) == 2, error
    assert not (run / "sae_x").exists() and [*run.glob("checkpoint/*")]
    status, _, error = torchrun(*command, "--resume")
    assert status == 0, error
    assert_same_run(tmp_path / "whole", run)
    with pytest.raises(InputError, match="processes was 2, now 1"):
        jsae.train(changed(config, tokens=128 * 400, buffer_batches=2, resume=True))


def test_a_batch_that_two_processes_cannot_divide_is_refused(config):
    status, _, error = torchrun(jsae.HERE / "jsae.py", *flags(config, batch_size=127))
    assert status != 0 and "--batch-size 127: no batch for 2 processes" in error


# ---- Evaluation ----------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def finished(model_dir, text_file, tmp_path_factory):
    """A trained pair, to be read only."""
    settings = {"model": str(model_dir), "layer": 0, "dataset": str(text_file), "k": 4, "lr": 0.01}
    settings |= {"tokens": 20_000, "batch_size": 128, "expansion_factor": 4, "context_size": 32}
    folder = tmp_path_factory.mktemp("finished") / "run"
    return jsae.train(Config(**settings, output_dir=str(folder), device="cpu"))


@pytest.fixture
def run_copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copy")


def with_settings(run, **settings):
    """The run's folder, its config.json changed."""
    info = json.loads((run / "config.json").read_text())
    info["config"] |= settings
    (run / "config.json").write_text(json.dumps(info))
    return run


SMALL = ["--tokens", "400", "--linear-samples", "60", "--second-samples", "3", "--n-latents", "3"]


def opened(run, *flags):
    """-> options, and what evaluate.open_run returns for them."""
    options = evaluate.parse([str(run), *SMALL, *flags])
    return options, *evaluate.open_run(str(run), options)


def test_reconstruction_is_that_of_all_held_out_tokens_at_once(finished):
    options, sae_x, sae_y, model, tokenizer, mlp, _, text = opened(finished)
    ids = torch.cat([*evaluate.held_out_contexts(text, options, model, tokenizer)])
    x = jsae.mlp_inputs(model, mlp, ids)[:, 1:].flatten(0, 1)
    assert len(x) == 403  # 13 contexts of 32 tokens, the first token of each left out
    result = evaluate.evaluate(str(finished), options)["reconstruction"]
    for side, sae, v in (("x", sae_x, x), ("y", sae_y, mlp(x))):
        error, found = sae(v) - v, result[side]
        fvu = error.square().sum() / (v - v.mean(0)).square().sum()
        assert math.isclose(found["fvu"], fvu, rel_tol=1e-5)
        assert math.isclose(found["explained_variance"], 1 - fvu, rel_tol=1e-5)
        assert math.isclose(found["mse"], error.square().mean(), rel_tol=1e-5)
        assert math.isclose(found["cosine"], F.cosine_similarity(sae(v), v).mean(), rel_tol=1e-5)
        latents = sae.encode(v)
        active = len(set(latents.idx[latents.acts > 0].tolist()))
        assert found["dead"] == sae.n_latents - active and found["rare"] is None
        assert sum(found["density"]) == active
        values, norms = latents.acts[latents.acts > 0], sae.W_enc[latents.idx].norm(dim=-1)
        assert found["active"] == pytest.approx(len(values) / len(x))
        on = latents.acts > 0
        assert found["W_enc_norm"] == pytest.approx(norms[on].mean().item())
        assert found["b_enc"] == pytest.approx(sae.b_enc[latents.idx[on]].mean().item())
        variations = []
        for latent in latents.idx[on].tolist():
            own = latents.acts[on & (latents.idx == latent)].double()
            variations.append((own.std(correction=0) / own.mean()).item())
        assert found["variation"] == pytest.approx(np.mean(variations), rel=1e-4)


def noisy_model():
    """Two layers in which biases are not 0 and the MLP matters."""
    sizes = {"vocab_size": 50, "hidden_size": 10, "intermediate_size": 14, "num_hidden_layers": 2}
    settings = transformers.GPTNeoXConfig(**sizes, num_attention_heads=1)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(settings).double().eval()
    for p in model.parameters():
        p.data += 0.5 * torch.randn_like(p)
        p.requires_grad_(False)
    return model


@pytest.mark.parametrize("skip", [0, 1])
def test_cross_entropies_equal_transformers_own_loss(skip):
    model = noisy_model()
    mlp, (sae_x, sae_y), T = MLP.from_model(model, 0), random_pair(), 12
    ids = torch.randint(50, (3, T))
    with torch.no_grad():
        x = jsae.mlp_inputs(model, mlp, ids)[:, skip:].flatten(0, 1)
        sums = evaluate.performance_sums(model, mlp, sae_x, sae_y, ids, x, skip)
    found = evaluate.performance(sums)
    labels, module = ids.clone(), model.gpt_neox.layers[0].mlp
    labels[:, : skip + 1] = -100
    original, first = module.forward, torch.arange(T).view(1, -1, 1) < skip

    def loss(change_x, change_y):
        def forward(x):
            x_new = torch.where(first, x, change_x(x))
            y = original(x_new)
            return torch.where(first, y, change_y(x, y))

        module.forward = forward
        logits = model(input_ids=ids, labels=labels)
        module.forward = original
        return logits.loss.item(), logits.logits[:, skip:-1].log_softmax(-1)

    keep, same = (lambda x: x), (lambda x, y: y)
    clean, logp = loss(keep, same)
    assert math.isclose(found["clean"], clean, rel_tol=1e-6)
    sites = {"x": (sae_x, same), "y": (keep, lambda x, y: sae_y(y))}
    sites["both"] = keep, lambda x, y: sae_y(original(sae_x(x)))
    ablations = {"x": (torch.zeros_like, same), "y": (keep, lambda x, y: 0 * y)}
    for site, changes in sites.items():
        sae, patched = loss(*changes)
        ablated = loss(*ablations.get(site, ablations["y"]))[0]
        kl = (logp.exp() * (logp - patched)).sum(-1).mean().item()
        for name, value in (("sae", sae), ("ablated", ablated), ("kl", kl)):
            assert found[site][name] == pytest.approx(value, rel=1e-6, abs=1e-12)
        sae, ablated = found[site]["sae"], found[site]["ablated"]
        score = (ablated - sae) / (ablated - found["clean"])
        assert found[site]["score"] == pytest.approx(score)
        assert found[site]["increase_ratio"] == pytest.approx(1 - score)
    assert found["x"]["ablated"] != pytest.approx(found["y"]["ablated"], rel=1e-3)


def test_measures_of_jacobians_worked_by_hand():
    J = torch.zeros(3, 2, 2)
    J[0, 0, 1], J[1] = -5.0, torch.tensor([[0.3, -0.3], [0.3, 0.3]])  # the third has no active pair
    sums = evaluate.jacobian_sums(J, [0.4, 0.6])
    found = evaluate.jacobian(sums, 3, [0.4, 0.6], 4)
    assert found["count_above"]["raw"] == pytest.approx([1 / 3, 1 / 3])
    assert found["paired"] == pytest.approx(2 / 3)  # and means over these two
    assert found["count_above"]["l1"] == pytest.approx([1 / 2, 1 / 2])
    assert found["count_above"]["l2"] == pytest.approx([5 / 2, 1 / 2])
    assert found["share_above"]["linf"] == pytest.approx([5 / 8, 5 / 8])
    assert found["norms"] == pytest.approx(
        {"l1": 6.2 / 3, "l2": 5.6 / 3, "l4": (5 + 0.3 * 2**0.5) / 3, "linf": 5.3 / 3}
    )
    assert found["mass"] == pytest.approx({"50": 3 / 2, "90": 5 / 2, "99": 5 / 2})
    assert found["hoyer"] == pytest.approx(1 / 2)  # 1 for one element, 0 for four equal ones
    assert found["hoyer_rows"] == pytest.approx(1 / 2)  # the row without an active pair is left out
    assert found["participation"] == pytest.approx((1 + 4) / 2)
    assert found["largest"] == pytest.approx((1 + 1 / 4) / 2)
    assert sum(found["histogram"]) == J.numel() and found["histogram"][-1] == 1
    assert found["histogram"][0] == 3 + 4 and sum(found["histogram"][299:302]) == 4


def test_scaling_every_jacobian_moves_only_the_measures_that_see_scale():
    J = torch.randn(20, 5, 5, dtype=DOUBLE)
    one, small = (
        evaluate.jacobian(evaluate.jacobian_sums(s * J, [0.1]), 20, [0.1], 25) for s in (1, 0.01)
    )
    for name in ("hoyer", "hoyer_rows", "participation", "largest", "mass"):
        assert one[name] == pytest.approx(small[name])
    J[:, 0] *= 100  # one output latent's scale
    louder = evaluate.jacobian(evaluate.jacobian_sums(J, [0.1]), 20, [0.1], 25)
    assert louder["hoyer_rows"] == pytest.approx(one["hoyer_rows"])
    assert louder["hoyer"] > one["hoyer"] + 0.1 and louder["largest"] > one["largest"] + 0.1
    assert one["count_above"]["l2"] == small["count_above"]["l2"]
    assert one["count_above"]["raw"][0] > 20 > small["count_above"]["raw"][0]


def test_global_jacobian_is_the_mean_over_the_output_latents_tokens():
    pair, mlp = random_pair(b_enc=-1.5), random_mlp()
    pair[1].b_enc.data -= 10  # the outputs are larger
    x = torch.randn(300, 10, dtype=DOUBLE)
    s_x, s_y = pair[0].encode(x), pair[1].encode(mlp(x))
    assert (s_x.acts == 0).any() and (s_y.acts == 0).any()
    J = active_jacobian(*pair, mlp, x, s_x, s_y).detach()
    dense, active = torch.zeros(300, 30, 30, dtype=DOUBLE), torch.zeros(300, 30, dtype=torch.bool)
    for b in range(300):
        dense[b][s_y.idx[b].unsqueeze(1), s_x.idx[b]] = J[b]
        active[b, s_y.idx[b][s_y.acts[b] > 0]] = True
    mean = dense.abs().sum(0) / active.sum(0).clamp(min=1).unsqueeze(1)
    table = evaluate.GlobalJacobian(30, [], torch.Generator(), "cpu")
    for rows in torch.arange(300).split(70):
        part = [Latents(s.acts[rows].detach(), s.idx[rows]) for s in (s_y, s_x)]
        table.add(J[rows], *part)
    options = evaluate.parse(["run", "--thresholds", "0.02", "0.1", "--n-latents", "4"])
    found, latents = table.result(4, options)
    assert found["rows"] == 30
    assert found["share_above"] == [(mean > t).double().mean().item() for t in (0.02, 0.1)]
    strength = dense.abs().sum((0, 2)) / (4 * active.sum(0)).clamp(min=1)
    often = [i for i in strength.argsort(descending=True).tolist() if active[:, i].sum() >= 10]
    assert [o["latent"] for o in latents] == often[:4]
    for o in latents:
        for edge in o["inputs"]:
            on = active[:, o["latent"]] & ((s_x.idx == edge["latent"]) & (s_x.acts > 0)).any(1)
            values = dense[on, o["latent"], edge["latent"]]
            assert edge["count"] == len(values) >= 3
            assert edge["mean"] == pytest.approx(values.mean().item())
            assert edge["std"] == pytest.approx(values.std(correction=0).item(), abs=1e-9)


def class_by_lstsq(t, v, relative):
    """The authors' way, one pair at a time: least squares, on all points or beside a run of zeros."""

    def straight(t, v):
        A = np.stack([t, np.ones_like(t)], 1)
        residual = np.abs(A @ np.linalg.lstsq(A, v, rcond=None)[0] - v).max()
        span = max(v.max() - v.min(), 1e-4 * top) if relative else 1
        return residual < 0.01 * span + 1e-30

    zero, top = np.flatnonzero(v == 0), np.abs(v).max()
    if straight(t, v):
        return 0
    one_run = len(zero) > 0 and len(zero) == zero[-1] - zero[0] + 1
    rest = v != 0
    if one_run and (zero[0] == 0 or zero[-1] == len(v) - 1) and rest.sum() >= 2:
        return 1 if straight(t[rest], v[rest]) else 2
    return 2


@pytest.mark.parametrize("relative", [False, True])
def test_classes_equal_those_of_one_least_squares_fit_per_pair(relative):
    g = torch.Generator().manual_seed(0)
    t = torch.linspace(0, 1, 100, dtype=DOUBLE) * (5 + torch.rand(400, 1, generator=g))
    slope, bend, cut, size = torch.randn(4, 400, 1, generator=g, dtype=DOUBLE)
    v = 3 + slope * t + 0.01 * bend * t**2 * (torch.arange(400).view(-1, 1) % 3 > 0)
    v = torch.where((t < 2 + cut) == (bend > 0), v, 0) * 10 ** (2 * size - 1)
    v[:40] = v[:40, :1]  # flat
    v[40:60, 50:60] = 0  # a run of zeros that touches no end
    v[60:80, :99], v[60:80, 99] = 0, 1.0  # too few points beside it
    ours = evaluate.classify(t, v, relative).tolist()
    assert ours == [class_by_lstsq(a, b, relative) for a, b in zip(t.numpy(), v.numpy())]
    assert {0, 1, 2} <= set(ours)


def test_a_function_of_one_latent_moves_the_true_x_along_its_decoder_row():
    pair, mlp = random_pair(), random_mlp()
    x = torch.randn(8, 10, dtype=DOUBLE)
    s_x, s_y = pair[0].encode(x), pair[1].encode(mlp(x))
    samples = {"x": x, "s": s_x.acts[:, 1], "j": s_x.idx[:, 1], "i": s_y.idx[:, 2]}
    t = torch.stack([samples["s"], samples["s"] + 1e-6, samples["s"] * 0 + 0.7], 1)
    v = evaluate.along_latent(*pair, mlp, samples, t)
    torch.testing.assert_close(v[:, 0], s_y.acts[:, 2])  # at s itself nothing has changed
    J = active_jacobian(*pair, mlp, x, s_x, s_y)[:, 2, 1]
    torch.testing.assert_close((v[:, 1] - v[:, 0]) / 1e-6, J, rtol=1e-3, atol=1e-5)
    for b in range(8):
        moved = x[b] + (0.7 - s_x.acts[b, 1]) * pair[0].W_dec[s_x.idx[b, 1]]
        acts, idx = pair[1].encode(mlp(moved))
        assert math.isclose(
            v[b, 2].item(), (acts * (idx == s_y.idx[b, 2])).sum().item(), abs_tol=1e-9
        )


def test_second_differences_of_a_parabola_are_its_second_derivative(finished, monkeypatch):
    options, sae_x, sae_y, *_, mlp, _, _ = opened(finished)
    monkeypatch.setattr(evaluate, "along_latent", lambda *args: -1.5 * args[-1] ** 2)
    samples = {"s": torch.tensor([1.0, 8.0, 2.0]), "x": torch.zeros(3, 16)}
    found = evaluate.second_differences(sae_x, sae_y, mlp, samples, options)
    assert found["mean"] == pytest.approx([-3.0] * 3) and len(found["max_abs"]) == 3
    assert found["mean_abs"] == pytest.approx([3.0] * 3)


def test_examples_are_the_windows_where_a_latent_is_largest():
    model, (sae_x, sae_y) = noisy_model(), random_pair()
    mlp, batches = MLP.from_model(model, 0), torch.randint(50, (13, 32)).split(5)
    with torch.no_grad():
        x = jsae.mlp_inputs(model, mlp, torch.cat(batches))[:, 1:]  # (13, 31, 10)
        acts, idx = sae_y.encode(mlp(x))
    dense = torch.zeros(13, 31, 30, dtype=DOUBLE).scatter(2, idx, acts)
    latent = (dense.amax(1) > 0).sum(0).argmax().item()  # active in most contexts
    values = dense[..., latent]
    expected = torch.stack([values[:, :16].amax(1), values[:, 16:].amax(1)]).flatten()
    wanted, saes = {"x": [], "y": [latent]}, {"x": sae_x, "y": sae_y}
    with torch.no_grad():
        found = evaluate.examples(saes, mlp, model, None, wanted, batches, 1)["y"][latent]
    top = expected[expected > 0].sort(descending=True).values[:12]
    assert len(top) == 12 and top[0] > 1.05 * top[-1]
    assert [e["max"] for e in found] == pytest.approx(top.tolist(), abs=1e-4)
    assert all(math.isclose(e["max"], max(e["acts"]), abs_tol=1e-4) for e in found)
    words = [" ".join(map(str, ids)) for ids in torch.cat(batches)[:, 1:].tolist()]
    assert {len(e["tokens"]) for e in found} == {15, 16}  # 31 tokens are cut into 16 and 15
    assert all(any(" ".join(e["tokens"]) in text for text in words) for e in found)


def flat(value, path=""):
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for i, part in items for k, v in flat(part, f"{path}.{i}").items()}
    return {path: value}


def test_the_batch_size_does_not_change_a_number(finished):
    results = []
    for size in ("1", "5"):
        options = evaluate.parse(
            [str(finished), *SMALL, "--dtype", "float64", "--batch-size", size]
        )
        results.append(flat(evaluate.evaluate(str(finished), options)))
    one, other = results
    assert one.keys() == other.keys() and len(one) > 1000 and one[".text"].endswith("docs.jsonl")
    for path, value in one.items():
        number = isinstance(value, float)
        expected = pytest.approx(other[path], rel=1e-9, abs=1e-11) if number else other[path]
        assert value == expected, path


def test_the_program_writes_numbers_figures_and_a_report(run_copy, finished, tmp_path, capsys):
    second = with_settings(shutil.copytree(finished, tmp_path / "second"), lr=0.5)
    plot = ["--plot", "jacobian_coef", "jacobian.hoyer"]
    assert evaluate.main([str(run_copy), str(second), *SMALL, *plot]) == 0
    out = capsys.readouterr().out
    saved = json.loads((run_copy / "evaluation.json").read_text())
    assert f"{saved['jacobian']['hoyer']:.4g}" in out and f"| {run_copy} | {second} |" in out
    paths = ("reconstruction.x.fvu", "ce.both.kl", "jacobian.count_above.linf", "tokens", "seed")
    for path in paths:
        assert evaluate.lookup(saved, path) is not None
    assert saved["linearity"]["linear"] == evaluate.lookup(json.loads((second / "evaluation.json").read_text()), "linearity.linear")  # fmt: skip
    kinds = [saved["linearity"][kind] for kind in ("linear", "jumprelu", "other")]
    assert sum(kinds) == pytest.approx(1) == sum(saved["linearity"]["relative"].values())
    groups = [saved["linearity"][name] for name in ("on_line", "cluster", "outlier")]
    assert sum(groups) == pytest.approx(1)
    figures = {p.name for p in (run_copy / "figures").glob("*.png")}
    assert figures == {
        f"{n}.png" for n in ("overview", "histogram", "functions", "jacobians", "plots")
    }
    page = (run_copy / "report.html").read_text()
    assert "<script" not in page and page.count("data:image/png;base64,") == len(figures)
    assert all(v.startswith("data:") for v in re.findall(r'(?:src|href)="([^"]*)', page))
    assert (
        page.count("<details>") == page.count("</details>") > 6
        and not (second / "report.html").exists()
    )
    changed_text = json.dumps(saved | {"tokens": 1})
    (run_copy / "evaluation.json").write_text(changed_text)
    assert evaluate.main([str(run_copy), "--reuse", *SMALL]) == 0
    assert (run_copy / "evaluation.json").read_text() == changed_text


def test_runs_that_differ_in_the_seed_only_are_one_column_and_one_point(finished, tmp_path, capsys):
    options, runs = evaluate.parse([str(finished), *SMALL]), [tmp_path / name for name in "abc"]
    saved = evaluate.evaluate(str(finished), options)
    settings = {"seed": 7, "output_dir": "elsewhere"}, {}, {"jacobian_coef": 0.5}
    for run, change, hoyer in zip(runs, settings, (0.25, 0.35, 0.5)):
        run.mkdir()
        saved |= {"config": saved["config"] | change}
        saved["jacobian"] |= {"hoyer": hoyer}
        (run / "evaluation.json").write_text(json.dumps(saved))
        saved["config"] |= {"seed": 0}
    plot = ["--plot", "jacobian.hoyer", "ce.y.score", "--series", "lr"]
    assert evaluate.main([*map(str, runs), "--reuse", *plot, *plot[:3]]) == 0
    out = capsys.readouterr().out
    assert (
        f"| {runs[0]}, 2 runs | {runs[2]} |" in out
        and "| Hoyer sparsity: J / its rows | 0.3 ± 0.071 / " in out
    )
    assert (tmp_path / "a" / "figures" / "plots.png").exists()
    results = [evaluate.evaluation_of(str(run), evaluate.parse([str(run), "--reuse"]))[0] for run in runs]  # fmt: skip
    saved["jacobian"]["thresholds"] = [1.0] * 5
    (runs[2] / "evaluation.json").write_text(json.dumps(saved))
    assert evaluate.main([*map(str, runs), "--reuse"]) == 2
    assert "--thresholds differ" in capsys.readouterr().err
    assert len(evaluate.merged([results[0], results[1] | {"tokens": 5}])) == 2
    ax = matplotlib.figure.Figure().subplots()
    evaluate.draw_plots(evaluate.parse(["a", *plot]), [], evaluate.merged(results), np.array([ax]))
    line, _, (bars, _) = ax.containers[0]
    assert line.get_xdata() == pytest.approx((0.5, 0.3))  # in order of jacobian_coef, .5 and 1
    widths = [end - start for (start, _), (end, _) in bars.get_segments()]
    assert widths == pytest.approx((0, 2 * 0.1 / 2**0.5))
    assert [text.get_text() for text in ax.texts] == ["0.5", "1"]


def test_text_from_data_is_escaped_in_the_report():
    example = {"tokens": ["<b>", "&"], "acts": [1.0, 2.0], "max": 2.0}
    page = evaluate.snippets([example])
    assert "<b>" not in page and "&lt;b&gt;" in page and "--a:0.50" in page and "&amp;" in page


# ---- Bad input -----------------------------------------------------------------------------------
DATA = {  # file name: (content, what the line must say)
    "empty.txt": (b"", "empty.txt"),
    "short.txt": (b"only a few words", "less than one batch"),
    "broken.jsonl": (b'{"text": "a"}\n{"text": ', "broken.jsonl"),
    "other.jsonl": (b'{"body": "a"}\n', "body"),
    "ids.jsonl": (b'{"input_ids": [5, 99999, 7]}\n', "99999"),
    "below.jsonl": (b'{"input_ids": [5, -1, 7]}\n', "-1"),
    "broken.parquet": (b"PAR1 is not enough", "broken.parquet"),
    "broken.jsonl.zst": (b"not compressed", "broken.jsonl.zst"),
    "picture.png": (b"", "files of one kind"),
}
BAD = [  # program; settings, flags, or what is wrong (see arrange); what the line must say
    ("jsae", {"model": "no-such-folder-or-model"}, "no-such-folder-or-model"),
    ("jsae", {"dataset": "no/such-data-set"}, "no/such-data-set"),
    ("jsae", {"dataset": "no-such-file.txt"}, "no-such-file.txt"),
    ("jsae", {"layer": -1}, "--layer is -1; expected int from 0"),
    ("jsae", {"layer": 1}, "--layer takes 0 to 0"),
    ("jsae", {"k": 65}, "k is 65; expected 1 to 64"),
    ("jsae", {"k": 0}, "--k is 0; expected int from 1"),
    ("jsae", {"k": "many"}, "many"),
    ("jsae", {"tokens": 0}, "--tokens is 0"),
    ("jsae", {"tokens": 1.5}, "1.5"),
    ("jsae", {"tokens": 100}, "--tokens 100"),
    ("jsae", {"batch_size": -4}, "--batch-size is -4"),
    ("jsae", {"expansion_factor": 0}, "--expansion-factor is 0"),
    ("jsae", {"buffer_batches": 0}, "--buffer-batches is 0"),
    ("jsae", {"context_size": 1}, "--context-size is 1; expected int from 2"),
    ("jsae", {"seed": -1}, "--seed is -1"),
    ("jsae", {"lr": 0}, "--lr is 0"),
    ("jsae", {"lr": "inf"}, "--lr is inf"),
    ("jsae", {"lr": "nan"}, "--lr is nan"),
    ("jsae", {"jacobian_coef": -1}, "--jacobian-coef is -1"),
    ("jsae", {"jacobian_coef": "nan"}, "--jacobian-coef is nan"),
    ("jsae", {"jacobian_fraction": 0}, "--jacobian-fraction is 0"),
    (
        "jsae",
        {"jacobian_fraction": 1.5},
        "--jacobian-fraction is 1.5; expected float from 1e-09 to 1",
    ),
    ("jsae", {"checkpoint_minutes": -1}, "--checkpoint-minutes is -1"),
    ("jsae", {"checkpoint_minutes": "nan"}, "--checkpoint-minutes is nan"),
    ("jsae", {"dtype": "float16"}, "--dtype: invalid choice: 'float16'"),
    ("jsae", {"device": "tpu"}, "--device tpu"),
    ("jsae", {"randomize_weights": "yes"}, "weights: invalid choice: 'yes'"),
    ("jsae", {"jacobian_penalty": "l2"}, "penalty: invalid choice: 'l2'"),
    ("jsae", {"no_such_flag": 1}, "--no-such-flag"),
    *(("jsae", name, says) for name, (_, says) in DATA.items()),
    ("jsae", "no CUDA", "--device cuda"),
    ("jsae", "a file stands there", "is taken"),
    ("jsae", "other things stand there", "is taken"),
    ("jsae", "a config.json of others stands there", "is taken"),
    ("jsae", "a finished run stands there", "is taken; --overwrite"),
    ("jsae", "the folder cannot be made", "Not a directory"),
    ("jsae", "the disk is full", "No space left"),
    ("jsae", "nothing to resume", "holds no run (no config.json)"),
    ("jsae", "resume an empty folder", "holds no run (no config.json)"),
    ("jsae", "resume with another k", "--resume: k was 4, now 5"),
    ("evaluate", ["--tokens", "0"], "--tokens is 0"),
    ("evaluate", ["--tokens", "many"], "many"),
    ("evaluate", ["--tokens", "100000000"], "holds out"),
    ("evaluate", ["--batch-size", "-1"], "--batch-size is -1"),
    ("evaluate", ["--seed", "-1"], "--seed is -1"),
    ("evaluate", ["--dtype", "float16"], "float16"),
    ("evaluate", ["--thresholds", "low"], "low"),
    ("evaluate", ["--latents", "64"], "output latents 0 to 63"),
    ("evaluate", ["--plot", "nothing", "jacobian.hoyer"], "no nothing in the evaluation"),
    ("evaluate", ["--plot", "model", "jacobian.hoyer"], "--plot model"),
    ("evaluate", ["--plot", "lr", "jacobian.hoyer", "--series", "nothing"], "no nothing"),
    ("evaluate", ["--dataset", "no-such-file.txt"], "no-such-file.txt"),
    ("evaluate", ["--device", "cuda:99"], "cuda:99"),
    ("evaluate", ["--no-such-flag"], "--no-such-flag"),
    ("evaluate", "no run", "not a finished run"),
    ("evaluate", "no weights", "not a finished run"),
    ("evaluate", "damaged weights", "not a finished run"),
    ("evaluate", "model gone", "no-such-model"),
    ("evaluate", "model changed", "changed"),
    ("evaluate", "text gone", "gone.jsonl"),
    ("evaluate", "unfinished evaluation", "leave out --reuse"),
    ("evaluate", "output is a file", "taken"),
    ("evaluate", "the disk is full", "No space left"),
    ("evaluate", "no matplotlib", "pip install matplotlib"),
]


def arrange(case, run, folder, monkeypatch):
    """Make wrong in the run or around it what the case says -> flags for the program."""

    def edit(**changes):
        info = json.loads((run / "config.json").read_text())
        changed = {name: info[name] | value if isinstance(value, dict) else value for name, value in changes.items()}  # fmt: skip
        (run / "config.json").write_text(json.dumps(info | changed))

    output = folder / "output"
    if case in DATA:
        (folder / case).write_bytes(DATA[case][0])
        return ["--dataset", str(folder / case)]
    if case == "no CUDA":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        return ["--device", "cuda"]
    if case in ("a file stands there", "output is a file", "the folder cannot be made"):
        (folder / "taken").write_text("mine")
        inside = "inside" if case == "the folder cannot be made" else ""
        return ["--output-dir", str(folder / "taken" / inside)]
    if case in ("other things stand there", "a config.json of others stands there"):
        output.mkdir()
        name = "thesis.tex" if case == "other things stand there" else "config.json"
        (output / name).write_text("{}")
        return ["--overwrite", "--output-dir", str(output)]
    if case == "a finished run stands there":
        return ["--output-dir", str(run)]
    if case == "the disk is full":

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(jsae.os, "fsync", full)
    if case in ("nothing to resume", "resume an empty folder"):
        if case == "resume an empty folder":
            output.mkdir()
        return ["--resume", "--output-dir", str(output)]
    if case == "resume with another k":
        return ["--resume", "--output-dir", str(run), "--tokens", "20000", "--buffer-batches", "32", "--k", "5"]  # fmt: skip
    if case == "no run":
        (run / "config.json").unlink()
    if case in ("no weights", "damaged weights"):
        weights = run / "sae_y" / "sae_weights.safetensors"
        weights.unlink() if case == "no weights" else weights.write_bytes(b"\x10" * 50)
    if case == "model gone":
        edit(config={"model": str(folder / "no-such-model")})
    if case == "model changed":
        edit(mlp_sha256="0" * 64)
    if case == "text gone":
        edit(config={"dataset": "gone.jsonl"})
    if case == "unfinished evaluation":
        (run / "evaluation.json").write_text('{"config": {}')
        return ["--reuse"]
    if case == "no matplotlib":
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    return []


@pytest.mark.parametrize("program, case, says", BAD, ids=[f"{p} {c}" for p, c, _ in BAD])
def test_bad_input_gets_one_line_and_status_2_and_damages_nothing(
    program, case, says, config, run_copy, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    wrong = arrange(case, run_copy, tmp_path, monkeypatch) if isinstance(case, str) else []
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    if program == "jsae":
        given = flags(config, **(case if isinstance(case, dict) else {}))
        status = jsae.main([*given, *wrong])
    else:
        status = evaluate.main(
            [str(run_copy), *SMALL, *(case if isinstance(case, list) else wrong)]
        )
    out, err = capsys.readouterr()
    line = err.strip().splitlines()[-1]
    assert status == 2 and line.startswith(f"{program}.py: error:") and "Traceback" not in err
    assert says in line, line
    assert before == {path: path.read_bytes() for path in before}
    assert not (Path(config.output_dir) / "sae_x").exists()
    if case == "no matplotlib":
        assert "Hoyer" in out and (run_copy / "evaluation.json").exists()


# ---- Command line --------------------------------------------------------------------------------
def test_the_command_trains_prints_its_table_and_refuses_to_overwrite(config, capsys):
    assert jsae.main(flags(config)) == 0
    out = capsys.readouterr().out
    for line in ("ev_x", "jacobian_above_0.01", "tokens_per_second", "evaluate it with"):
        assert line in out
    before = weights_of(Path(config.output_dir))
    assert jsae.main(flags(config)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "--overwrite" in error and all(
        map(torch.equal, before, weights_of(Path(config.output_dir)))
    )
    assert jsae.main([*flags(config, seed=1), "--overwrite"]) == 0


def test_without_a_model_the_demo_settings_stand_in_and_flags_win(monkeypatch, capsys):
    given = []
    monkeypatch.setattr(jsae, "train", lambda config, **_: given.append(config) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        jsae.main(["--k", "5", "--jacobian-coef", "0"])
    demo = jsae.DEMO | {"k": 5, "jacobian_coef": 0.0}
    assert all(getattr(given[0], name) == value for name, value in demo.items())
    assert given[0].layer > 0 and "tiny-pythia" in capsys.readouterr().out
    with pytest.raises(ZeroDivisionError):
        jsae.main(["--model", "EleutherAI/pythia-70m"])
    assert given[1] == Config() and Config().k == 32 and Config().batch_size == 4096


def test_a_run_is_loaded_and_evaluated_by_its_hub_id(finished, tmp_path, monkeypatch, capsys):
    ours, asked = jsae.load_run(finished), []
    download = lambda repo_id: asked.append(repo_id) or str(finished)
    monkeypatch.setattr(jsae, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    for sae, other in zip(ours[:2], jsae.load_run("someone/some-pair")[:2]):
        assert all(torch.equal(p, q) for p, q in zip(sae.parameters(), other.parameters()))
    assert evaluate.main(["someone/some-pair", *SMALL]) == 0
    assert {*asked} == {"someone/some-pair"} and "| someone/some-pair |" in capsys.readouterr().out
    assert {p.name for p in Path("someone--some-pair").iterdir()} == {"evaluation.json", "figures", "report.html"}  # fmt: skip


def test_sae_lens_opens_the_folders_and_what_it_saves_comes_back(run_copy):
    sae_lens = pytest.importorskip("sae_lens")
    *saes, config = jsae.load_run(run_copy)
    for s, sae in zip("xy", saes):
        folder, x = run_copy / f"sae_{s}", 3 * torch.randn(50, sae.d_model)
        theirs = sae_lens.SAE.load_from_disk(str(folder), device="cpu")
        acts, idx = sae.encode(x)
        dense = torch.zeros(50, sae.n_latents).scatter(1, idx, acts)
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
    for s, sae in zip("xy", jsae.load_run(run_copy)[:2]):
        folder, x = run_copy / "sparsify" / s, 3 * torch.randn(50, sae.d_model)
        theirs = sparsify.SparseCoder.load_from_disk(folder)
        acts, idx, _ = theirs.encode(x)
        ours = sae.encode(x)
        assert torch.equal(idx.sort().values, ours.idx.sort().values)
        torch.testing.assert_close(theirs.decode(acts, idx), sae(x), rtol=0, atol=1e-5)


def test_what_is_not_a_run_is_not_loaded(tmp_path):
    with pytest.raises(InputError, match="is not a finished run"):
        jsae.load_run(tmp_path)


def run_alone(folder, *args):
    """jsae.py as a program, in another folder; -> (status, stdout, stderr)."""
    command = [sys.executable, folder / "jsae.py", *args]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    return done.returncode, done.stdout, done.stderr


def test_help_shows_the_papers_defaults(capsys):
    assert jsae.main(["--help"]) == 0
    assert "(default: 300000000)" in capsys.readouterr().out


def test_as_a_program_copied_alone(config, tmp_path):
    shutil.copy(jsae.HERE / "jsae.py", tmp_path)
    status, out, _ = run_alone(tmp_path, "--help")
    assert status == 0 and "--jacobian-coef" in out.replace("_", "-")
    status, _, error = run_alone(tmp_path)
    assert status == 2 and "--model EleutherAI/pythia-70m --layer 3" in error
    assert len(error.strip().splitlines()) == 1
    status, out, error = run_alone(tmp_path, *flags(config))
    assert status == 0 and "evaluate it with" in out, error
    assert len(weights_of(Path(Path(config.output_dir)))) == 8
    status, _, error = run_alone(tmp_path, *flags(config, k="x"))
    assert status == 2 and "'x'" in error.strip().splitlines()[-1] and "Traceback" not in error


SNIPPETS = (jsae.HERE / "README.md").read_text().split("```python\n")[1:]


def snippet(word):
    """The README's Python in which the word stands."""
    (found,) = [text.split("```")[0] for text in SNIPPETS if word in text.split("```")[0]]
    return found


def run_snippet(code, folder=jsae.HERE):
    environment = os.environ | {"PYTHONPATH": str(jsae.HERE)}
    settings = {"cwd": folder, "env": environment, "stdout": subprocess.PIPE, "text": True}
    return subprocess.run([sys.executable, "-c", code], check=True, timeout=120, **settings)


@pytest.mark.parametrize("word, check", [
    ("jacobian_coef=1.0", "assert sae_x.W_dec.grad.any() and J.shape == (64, 16, 16)"),
    ("LlamaConfig", "assert mlp.W_gate is not None and J.shape == (64, 8, 8) and J.any()"),
    ("JacobianPenalty", "J = jsae.active_jacobian(sae_x, sae_y, mlp, x, s_x, s_y); assert (J.abs().mean() / penalty - 1).abs() < 1e-5"),
])  # fmt: skip
def test_the_readmes_snippets_run(word, check):
    run_snippet(snippet(word) + "\nimport jsae\n" + check)


def test_the_readmes_lines_on_how_a_penalty_is_met_run(finished):
    code = snippet("loudest").replace(
        "import sys,", f"import sys; sys.argv = ['', {str(finished)!r}]; import"
    )
    done = run_snippet(code.replace('"4000"', '"400"'))
    found = re.search(
        r"W_in d. ([\d.]+), .cos. ([\d.]+), .*three loudest ([\d.]+)", done.stdout, re.DOTALL
    )
    assert all(0 < float(number) for number in found.groups()) and float(found[2]) < 1


def test_the_benchmark_runs_and_times_what_it_says(monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("speed", jsae.HERE / ".ci" / "speed.py")
    spec.loader.exec_module(speed := importlib.util.module_from_spec(spec))
    monkeypatch.setattr(sys, "argv", ["speed.py", "--scale", "32", "--rounds", "1"])
    speed.main()
    assert "JSAE pair" in capsys.readouterr().out
    options, sizes = types.SimpleNamespace(device="cpu"), {"B": 128, "d": 16, "n": 512, "h": 64}
    losses = []
    for plain in (False, True):
        torch.manual_seed(0)
        losses.append(speed.pair(options, **sizes, k=1, plain=plain)[1]())
    torch.testing.assert_close(*losses)
