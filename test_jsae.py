"""Tests of jsae.py and evaluate.py, in the order of the paper. No network.

    python -m pytest               all of them
    python -m pytest -k oracle     those that matter most

test_oracle_J_equals_jacrev: J is what automatic differentiation says.
test_oracle_loss_and_gradients_equal_eq_5: the fast loss is Eq. 5, with its gradients.
test_oracle_every_number_is_what_its_definition_says: so is each number of evaluation.json.
"""

import dataclasses
import functools
import importlib.util
import io
import itertools
import json
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import evaluate
import jsae
from jsae import MLP, Config, InputError, Latents, TopKSAE, active_jacobian, find_mlp, jsae_loss

TINY = jsae.HERE / "assets" / "tiny-pythia"
TOKENIZER = transformers.AutoTokenizer.from_pretrained(TINY)
DOUBLE = torch.float64
torch.set_num_threads(1)  # the tensors are small
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}  # for the programs that tests start

ACTS = {
    "gelu": F.gelu,
    "tanh_gelu": jsae.tanh_gelu,
    "silu": F.silu,
    "relu": F.relu,
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
    "mish": nn.Mish(),
}
gated_or_plain = pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
every_act = pytest.mark.parametrize("act", ACTS)


def normal(*shape, seed=0):
    """Normal numbers in float64 that depend on nothing but the seed."""
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def random_mlp(act="gelu", gated=False, d=10, m=14):
    shapes = [(m, d), (m,), (d, m), (d,)] + [(m, d), (m,)] * gated
    return MLP(*[normal(*shape, seed=n) for n, shape in enumerate(shapes)], act=ACTS[act])


def random_pair(b_enc=0.0, sizes=((30, 4), (40, 5)), d=10):
    """SAEs of x and y in float64, of other sizes; a low b_enc makes ReLU cut latents off."""
    pair = []
    for side, (n, k) in enumerate(sizes):
        sae = TopKSAE(d, n, k).double()
        rows = F.normalize(normal(n, d, seed=10 + side))
        sae.W_dec.data = rows + 0.1 * normal(n, d, seed=20 + side)
        sae.W_enc.data = rows + 0.1 * normal(n, d, seed=30 + side)
        sae.b_enc.data = b_enc + 0.1 * normal(n, seed=40 + side)
        sae.b_dec.data = 0.1 * normal(d, seed=50 + side)
        pair.append(sae)
    return pair


def gradients(loss, pair):
    return torch.autograd.grad(loss, [p for sae in pair for p in sae.parameters()])


def assert_close(ours, expected, rtol=1e-10, atol=1e-12):
    torch.testing.assert_close(ours, expected, rtol=rtol, atol=atol)


def write_rows(path, contents):
    path.write_text("".join(json.dumps({"text": content}) + "\n" for content in contents))
    return path


@pytest.fixture(scope="session")
def settings(tmp_path_factory):
    """Of a run of 15 steps in 4 fillings of a one-layer model."""
    folder = tmp_path_factory.mktemp("model")
    sizes = {"vocab_size": 2560, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    torch.manual_seed(0)
    model = transformers.GPTNeoXConfig(**sizes, num_attention_heads=2, max_position_embeddings=64)
    model = transformers.AutoModelForCausalLM.from_config(model)
    for p in model.parameters():
        p.data += 0.02 * torch.randn_like(p)  # so that biases are not 0
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    texts = [f"Document {i}: " + " ".join(map(str, range(i, i + 60))) for i in range(400)]
    return {
        "model": str(folder),
        "layer": 0,
        "dataset": str(write_rows(tmp_path_factory.mktemp("text") / "docs.jsonl", texts)),
        "k": 4,
        "lr": 0.01,
        "tokens": 2000,
        "batch_size": 128,
        "expansion_factor": 4,
        "context_size": 32,
        "buffer_batches": 4,
        "normalize": True,
        "device": "cpu",
    }


@pytest.fixture(scope="session")
def whole(settings, tmp_path_factory):
    """The run that nothing stopped."""
    return jsae.train(Config(**settings, output_dir=str(tmp_path_factory.mktemp("whole") / "run")))


@pytest.fixture
def config(settings, tmp_path):
    return Config(**settings, output_dir=str(tmp_path / "run"))


@pytest.fixture
def run_copy(whole, tmp_path):
    """A finished run that a test may write into."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def loaded(config):
    """-> the four arguments of jsae.activation_batches."""
    model, tokenizer = jsae.load_model(config)
    return config, model, tokenizer, find_mlp(model, config.layer)


def flags(config):
    """The settings as arguments of jsae.py."""
    given = []
    for name, value in vars(config).items():
        if value is True:
            given.append(jsae.flag(name))
        elif value is not False and value != getattr(Config, name):
            given += [jsae.flag(name), str(value)]
    return given


def rows_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def one_line_of(capsys):
    """What a program printed on stderr, which must be one line without a traceback."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines and not any("Traceback" in line for line in lines)
    return lines[-1]


# ---- 1. Sparse autoencoders (Eq. 1, 2) -----------------------------------------------------------


def test_decoder_rows_are_of_norm_one_and_the_encoder_starts_as_their_copy():
    sae = TopKSAE(8, 40, 3)
    assert_close(sae.W_dec.norm(dim=1), torch.ones(40), rtol=1e-6)
    assert torch.equal(sae.W_enc, sae.W_dec)
    assert not sae.b_enc.any() and not sae.b_dec.any()
    sae.W_dec.data *= torch.arange(1, 41).unsqueeze(1)
    sae.set_decoder_norm_to_one()
    assert_close(sae.W_dec, sae.W_enc, rtol=1e-6, atol=1e-6)


def test_an_autoencoder_keeps_the_k_largest_and_clips_them_at_zero():
    sae = TopKSAE(2, 4, 3)
    sae.W_enc.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -2.0]])
    sae.b_enc.data = torch.tensor([0.0, 0.0, 0.0, 1.0])
    sae.W_dec.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [5.0, 5.0]])
    sae.b_dec.data = torch.tensor([0.5, -0.5])
    acts, idx = sae.encode(torch.tensor([3.0, 1.0]))  # pre-activations 3, 1, -3, -1
    assert dict(zip(idx.tolist(), acts.tolist())) == {0: 3.0, 1: 1.0, 3: 0.0}
    assert sae(torch.tensor([[3.0, 1.0]])).tolist() == [[3.5, 0.5]]


@pytest.mark.parametrize("k", [0, 9])
def test_k_that_is_not_from_1_to_the_number_of_latents_is_refused(k):
    with pytest.raises(ValueError, match=f"k is {k}; expected 1 to 8"):
        TopKSAE(4, 8, k)


# ---- 2. The MLP and its derivative (Eq. 8, 12, 17 to 28) -----------------------------------------


def derivative_of(mlp, x):
    """df/dx (..., d_model, d_model) from what mlp.derivative gives."""
    return sum(mlp.W_out @ (c.unsqueeze(-1) * W) for c, W in mlp.derivative(x))


PHIS = ACTS | {"in place": nn.LeakyReLU(0.1, inplace=True), "PReLU": nn.PReLU().double()}


@gated_or_plain
@pytest.mark.parametrize("act", PHIS.values(), ids=PHIS)
def test_the_mlp_is_eq_8_or_eq_21_and_its_derivative_is_that_of_autodiff(act, gated):
    weights = dict(random_mlp(gated=gated).named_buffers())
    mlp, x = MLP(**weights, act=act), normal(40, 10, seed=9)
    assert (mlp.act in jsae.ACT_GRADS) == (act in jsae.ACT_GRADS)
    assert jsae.with_derivative(nn.SiLU(inplace=True), x)[0] is F.silu

    def f(x):
        h = mlp.W_in @ x + mlp.b_in
        if not gated:
            return mlp.W_out @ act(h) + mlp.b_out
        return mlp.W_out @ (act(mlp.W_gate @ x + mlp.b_gate) * h) + mlp.b_out

    assert_close(mlp(x), torch.stack([f(token) for token in x]))
    expected = [torch.autograd.functional.jacobian(f, token) for token in x]
    assert_close(derivative_of(mlp, x), torch.stack(expected))


@pytest.mark.parametrize("act", [nn.Softmax(-1), nn.PReLU(3), lambda z: z[:1], torch.Tensor.half])
def test_an_activation_that_is_not_elementwise_is_refused(act):
    with pytest.raises(ValueError, match="is not elementwise; expected phi of an MLP"):
        MLP(torch.eye(3), None, torch.eye(3), None, act=act)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_mlp_holds_frozen_contiguous_copies_in_float32_or_more(dtype):
    weight = torch.randn(4, 6, dtype=dtype)
    act = nn.PReLU()
    mlp = MLP(weight, None, weight.T, None, act=act)
    weight.zero_()
    act.weight.data.fill_(9)
    assert mlp.W_in.any() and mlp.W_out.any()
    assert all(w.dtype == torch.float32 and w.is_contiguous() for w in mlp.buffers())
    assert mlp.act(torch.tensor(-1.0)) == -0.25
    assert act.weight.requires_grad and not any(p.requires_grad for p in mlp.parameters())


# ---- 3. The Jacobian and the loss (Eq. 5, 16, 29) ------------------------------------------------


def test_a_jacobian_worked_by_hand():
    W_in = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    W_out = torch.tensor([[1.0, 0.0], [2.0, 1.0]])
    mlp = MLP(W_in, None, W_out, None, act=F.relu)
    sae_x, sae_y = TopKSAE(2, 3, 2), TopKSAE(2, 3, 2)
    sae_x.W_dec.data = torch.tensor([[9.0, 9.0], [1.0, 0.0], [0.0, 1.0]])
    sae_y.W_enc.data = torch.tensor([[1.0, 0.0], [1.0, 1.0], [9.0, 9.0]])
    s_x = Latents(torch.tensor([2.0, 5.0]), torch.tensor([1, 2]))  # K_1 = {1, 2}
    s_y = Latents(torch.tensor([1.0, 1.0]), torch.tensor([0, 1]))  # K_2 = {0, 1}

    def J(x, s_x, s_y):
        return active_jacobian(sae_x, sae_y, mlp, torch.tensor(x), s_x, s_y).tolist()

    # z = (3, 2): both units on, df/dx = W_out W_in = [[1, 2], [5, 3]]
    assert J([1.0, 1.0], s_x, s_y) == [[1.0, 2.0], [6.0, 5.0]]
    # z = (9, -1): the second unit off, df/dx = [[1, 2], [2, 4]]
    assert J([1.0, 4.0], s_x, s_y) == [[1.0, 2.0], [3.0, 6.0]]
    one_on = torch.tensor([2.0, 0.0])  # the second latent is cut off by ReLU
    assert J([1.0, 1.0], Latents(one_on, s_x.idx), s_y) == [[1.0, 0.0], [6.0, 0.0]]
    assert J([1.0, 1.0], s_x, Latents(one_on, s_y.idx)) == [[1.0, 2.0], [0.0, 0.0]]


@pytest.mark.parametrize("literal", [False, True], ids=["at x (D.1)", "at x_hat (Eq. 3)"])
@gated_or_plain
@every_act
def test_oracle_J_equals_jacrev(act, gated, literal):
    """The whole n_y x n_x derivative of f_s: J inside K_2 x K_1, zero elsewhere."""
    sae_x, sae_y = random_pair(b_enc=-1.2)
    mlp = random_mlp(act, gated)
    x = normal(8, 10)
    s_x = sae_x.encode(x)
    x_hat = sae_x.decode(s_x)
    point = x_hat if literal else x
    sae_y.b_enc.data -= sae_y.encode(mlp(point)).acts.mean().detach()  # cuts some off
    s_y = sae_y.encode(mlp(point))
    error = (point - x_hat).detach()  # what the SAE of x leaves over; it stays as it is
    assert (s_x.acts == 0).any() and (s_y.acts == 0).any() and (s_y.acts > 0).any()
    J = active_jacobian(sae_x, sae_y, mlp, point, s_x, s_y).detach()
    for b in range(len(x)):

        def f_s(s, b=b):
            values, idx = s.topk(sae_x.k)
            x = sae_x.decode(Latents(F.relu(values), idx)) + error[b]
            out = sae_y.encode(mlp(x))
            return torch.zeros(40, dtype=DOUBLE).scatter(0, out.idx, out.acts)

        s = torch.zeros(30, dtype=DOUBLE).scatter(0, s_x.idx[b], s_x.acts[b]).detach()
        ours = torch.zeros(40, 30, dtype=DOUBLE)
        ours[s_y.idx[b].unsqueeze(1), s_x.idx[b]] = J[b]
        assert_close(ours, torch.func.jacrev(f_s)(s), atol=1e-10)


def test_sections_1_to_3_run_when_they_are_copied_as_one_block(tmp_path):
    source = (jsae.HERE / "jsae.py").read_text()
    method = source[source.index("# ---- 1.") : source.index("# ---- 4.")]
    imports = "import copy, math\nfrom typing import NamedTuple\nimport torch\n"
    imports += "import torch.nn.functional as F\nfrom torch import Tensor, nn\n"
    (tmp_path / "copied.py").write_text(imports + method)
    copied = types.SimpleNamespace(**runpy.run_path(tmp_path / "copied.py"))
    weights = normal(14, 10), normal(14), normal(10, 14), normal(10)
    pair = [copied.TopKSAE(10, 30, 4).double() for _ in range(2)]
    x = normal(20, 10)
    loss = copied.plain_jsae_loss(*pair, copied.MLP(*weights), x, 1.0)
    assert_close(loss, jsae.plain_jsae_loss(*pair, MLP(*weights), x, 1.0))
    assert all(gradient.any() for gradient in gradients(loss, pair))


# ---- 4. The same loss, fast ----------------------------------------------------------------------


def row_ratio(J):
    """Another penalty, which does not see the scale of a row."""
    return F.normalize(J, dim=2).abs().mean((1, 2))


every_penalty = pytest.mark.parametrize("penalty", [jsae.l1, row_ratio])


def loss_by_autodiff(sae_x, sae_y, mlp, x, coef, penalty):
    """Eq. 5 as it is written there, with autodiff's derivative of f at the true x."""
    y = mlp(x)
    s_x, s_y = sae_x.encode(x), sae_y.encode(y)
    df = torch.func.vmap(torch.func.jacrev(mlp))(x).detach()
    J = sae_y.W_enc[s_y.idx] @ df @ sae_x.W_dec[s_x.idx].mT
    J = J * (s_y.acts > 0).unsqueeze(2) * (s_x.acts > 0).unsqueeze(1)
    mse_x = ((sae_x(x) - x) ** 2).sum(1) / x.shape[1]
    mse_y = ((sae_y(y) - y) ** 2).sum(1) / y.shape[1]
    return (mse_x + mse_y + coef * penalty(J)).mean()


@every_penalty
@gated_or_plain
@every_act
def test_oracle_loss_and_gradients_equal_eq_5(act, gated, penalty, monkeypatch):
    pair, mlp, x = random_pair(b_enc=-0.8), random_mlp(act, gated), normal(50, 10)
    x[7:9] = 0  # none of their latents is active
    expected = loss_by_autodiff(*pair, mlp, x, 0.7, penalty)
    losses = [jsae_loss(*pair, mlp, x, 0.7, penalty)[0]]
    monkeypatch.setattr(jsae, "chunk_size", lambda *_: 9)  # the last chunk has 5 tokens
    losses.append(jsae_loss(*pair, mlp, x, 0.7, penalty)[0])
    if penalty is jsae.l1:
        losses.append(jsae.plain_jsae_loss(*pair, mlp, x, 0.7))
    expected_gradients = gradients(expected, pair)
    for loss in losses:
        assert_close(loss, expected)
        assert_close(gradients(loss, pair), expected_gradients)


@every_penalty
def test_the_parts_of_the_fast_loss_are_what_their_names_say_and_detached(penalty):
    pair, mlp, x = random_pair(b_enc=-0.8), random_mlp(), normal(50, 10)
    loss, parts = jsae_loss(*pair, mlp, x, 0.7, penalty)
    for side, sae, v in (("x", pair[0], x), ("y", pair[1], mlp(x))):
        assert_close(parts[f"mse_{side}"], F.mse_loss(sae(v), v).detach())
        assert torch.equal(parts[f"s_{side}"].idx, sae.encode(v).idx)
        assert_close(parts[f"s_{side}"].acts, sae.encode(v).acts.detach())
        assert not parts[f"mse_{side}"].requires_grad and not parts[f"s_{side}"].acts.requires_grad
    assert_close(parts["mse_x"] + parts["mse_y"] + 0.7 * parts["penalty"], loss.detach())
    rows = types.SimpleNamespace(W_dec=pair[0].W_dec), types.SimpleNamespace(W_enc=pair[1].W_enc)
    alone = jsae.fast_penalty(*rows, mlp, x, parts["s_x"], parts["s_y"], penalty)  # of any two SAEs
    assert alone.requires_grad and not parts["penalty"].requires_grad
    assert_close(alone.detach(), parts["penalty"])


def test_without_a_coefficient_the_fast_loss_is_that_of_two_independent_saes():
    pair, mlp, x = random_pair(), random_mlp(), normal(50, 10)
    loss, parts = jsae_loss(*pair, mlp, x, 0.0)
    assert "penalty" not in parts
    expected = F.mse_loss(pair[0](x), x) + F.mse_loss(pair[1](mlp(x)), mlp(x))
    assert_close(gradients(loss, pair), gradients(expected, pair))


@every_penalty
def test_the_fast_loss_passes_gradcheck(penalty):
    pair = random_pair(sizes=((8, 3), (9, 2)), d=4)
    mlp, x = random_mlp(gated=True, d=4, m=6), normal(6, 4)
    names = [name for name, _ in pair[0].named_parameters()]

    def loss(*values):
        halves = dict(zip(names, values[:4])), dict(zip(names, values[4:]))
        saes = [types.SimpleNamespace(k=sae.k, **half) for sae, half in zip(pair, halves)]
        return jsae_loss(*saes, mlp, x, 0.5, penalty)[0]

    values = [getattr(sae, name) for sae in pair for name in names]
    assert torch.autograd.gradcheck(loss, values, atol=1e-6, nondet_tol=1e-12)


def test_a_penalty_that_is_nan_without_an_active_pair_is_not_hidden():
    pair, mlp, x = random_pair(), random_mlp(), normal(9, 10)
    pair[1].b_enc.data.fill_(-1e9)
    assert jsae_loss(*pair, mlp, x, 1.0, row_ratio)[1]["penalty"] == 0
    assert jsae_loss(*pair, mlp, x, 1.0, lambda J: J.sum((1, 2)) / J.norm())[0].isnan()


@pytest.mark.parametrize("penalty, shape", [(torch.mean, "()"), (torch.abs, "(9, 5, 4)")])
def test_a_penalty_that_does_not_give_one_number_per_token_is_refused(penalty, shape):
    expected = f"penalty gives {shape}; expected one per token"
    with pytest.raises(ValueError, match=re.escape(expected)):
        jsae_loss(*random_pair(), random_mlp(), normal(9, 10), 1.0, penalty)


@every_penalty
@gated_or_plain
def test_autocast_sets_the_dtype_of_the_large_products_only(gated, penalty):
    pair = [sae.float() for sae in random_pair(sizes=((64, 4), (64, 4)), d=16)]
    mlp, x = random_mlp(gated=gated, d=16).float(), normal(64, 16).float()
    exact, exact_parts = jsae_loss(*pair, mlp, x, 1.0, penalty)
    with torch.autocast("cpu", torch.bfloat16):
        loss, parts = jsae_loss(*pair, mlp, x, 1.0, penalty)
    assert_close(loss, exact, rtol=0.03)
    assert not torch.equal(parts["s_x"].idx, exact_parts["s_x"].idx)  # bfloat16 was at work
    for ours, other in zip(gradients(loss, pair), gradients(exact, pair)):
        assert (ours - other).norm() < 0.3 * other.norm()  # some tokens have another latent
    acts, idx = parts["s_x"]  # the values are exact, though TopK chose them in bfloat16
    products = (pair[0].W_enc[idx] @ x.unsqueeze(2)).squeeze(2) + pair[0].b_enc[idx]
    assert_close(acts, F.relu(products).detach(), rtol=1e-5, atol=1e-6)
    assert_close(parts["mse_x"], F.mse_loss(pair[0].decode(parts["s_x"]), x).detach(), rtol=1e-5)


@pytest.mark.parametrize("has_biases", [True, False])
@gated_or_plain
def test_a_scaled_mlp_is_the_same_map_between_scaled_vectors_and_keeps_its_maps(gated, has_biases):
    mlp, x = random_mlp(gated=gated), normal(7, 10)
    if not has_biases:
        mlp.b_in = mlp.b_out = mlp.b_gate = None
    mlp.maps = (nn.Linear(1, 1), nn.Linear(1, 1))
    scaled = mlp.scaled(3.0, 0.2)
    assert scaled.maps == mlp.maps
    assert_close(scaled(x / 3), mlp(x) / 0.2)
    assert_close(derivative_of(scaled, x / 3), derivative_of(mlp, x) * 3 / 0.2)


# ---- 5. The MLP in a transformers model ----------------------------------------------------------

SIZES = {"hidden_size": 32, "intermediate_size": 48, "ffn_dim": 40, "head_dim": 8}
SIZES |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES |= {"max_position_embeddings": 64}
OWN_SIZES = {  # settings of models that need others
    "falcon": {"head_dim": None},
    "gptj": {"rotary_dim": 4},
    "opt": {"word_embed_proj_dim": 32},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 16, "mlp_only_layers": [0]},
}
PLAIN = (
    "gpt_neox gpt2 phi starcoder2 persimmon nemotron bloom biogpt gpt_bigcode arcee apertus ctrl "
    "openai-gpt gpt_neox_japanese gptj opt falcon"
)
GATED = (
    "llama mistral qwen2 qwen3 gemma gemma2 gemma3_text phi3 stablelm olmo2 granite glm cohere "
    "olmo smollm3 helium exaone4 glm4 lfm2 modernbert-decoder"
)


def random_model(kind, **settings):
    """A tiny random model; only settings that its config has are changed."""
    known = transformers.AutoConfig.for_model(kind)
    given = {name: value for name, value in SIZES.items() if hasattr(known, name)}
    given |= OWN_SIZES.get(kind, {}) | settings
    given = {name: value for name, value in given.items() if value is not None}
    if getattr(known, "layer_types", None) is not None:
        given["layer_types"] = None
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
    assert_close(mlp(x).flatten(0, 1), y, rtol=1e-4, atol=1e-6)
    df = torch.func.jacrev(mlp)(x[0, 0])
    assert_close(derivative_of(mlp, x[0, 0]), df, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "kind, settings, says",
    [
        ("mixtral", {}, "as experts"),
        ("gpt_oss", {}, "as experts"),
        ("qwen2_moe", {}, "as experts|5 of its modules fit"),
        ("bitnet", {}, "0 of its modules fit$"),
        ("rwkv", {}, "0 of its modules fit$"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "^not causal"),
        ("llama", {"num_hidden_layers": 1}, "has no layer 1; --layer takes 0 to 0"),
    ],
)
def test_what_is_not_one_dense_mlp_of_a_causal_model_is_refused(kind, settings, says):
    with pytest.raises(InputError, match=says):
        find_mlp(random_model(kind, **settings), 1)


def test_the_dense_layer_of_a_model_with_experts_is_found():
    assert find_mlp(random_model("qwen2_moe"), 0).W_in.shape == (48, 32)


class BlockLM(nn.Module):
    """A language model of one block that computes y from x by a function of x and some modules."""

    def __init__(self, compute, *modules):
        super().__init__()
        self.embed = nn.Embedding(40, 8)
        block = nn.Module()
        block.parts = nn.Sequential(*modules)
        block.forward = lambda x: compute(x, *modules)
        self.layers = nn.ModuleList([block])
        self.device = torch.device("cpu")

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, use_cache=False):
        return types.SimpleNamespace(logits=self.layers[0](self.embed(input_ids)))


def found_in(compute, *modules, dtype=torch.float32):
    return find_mlp(BlockLM(compute, *modules).to(dtype).eval(), 0)


def small_mlp(*between):
    return nn.Sequential(nn.Linear(8, 20), *(between or [nn.GELU()]), nn.Linear(20, 8))


def adapter():
    return nn.Sequential(nn.Linear(8, 3), nn.Dropout(), nn.Linear(3, 8))


def summed(x, *modules):
    return sum(module(x) for module in modules)


def by_halves(x, one, other):
    return torch.cat([one(x[:, :8]), other(x[:, 8:])], 1)


NONE_FITS = "0 of its modules fit$"
PART = "some are not called once, on all tokens, as experts are$"
REFUSED = {  # what find_mlp says; what is computed; what makes the modules
    "an adapter beside an MLP": ("2 of its modules fit$", summed, small_mlp, adapter),
    "an adapter beside an MLP with a norm inside": (
        "what fits is smaller than what does not$",
        summed,
        lambda: small_mlp(nn.GELU(), nn.LayerNorm(20)),
        adapter,
    ),
    "experts that see a part of the tokens": (PART, by_halves, small_mlp, small_mlp),
    "an expert that sees none of them": (PART, lambda x, f, g: f(x), small_mlp, small_mlp),
    "a clamp": (NONE_FITS, lambda x, mlp: mlp[2](mlp[1](mlp[0](x)).clamp(max=7)), small_mlp),
    "a norm inside": (NONE_FITS, summed, lambda: small_mlp(nn.LayerNorm(20))),
    "the same y for all tokens": (NONE_FITS, lambda x, mlp: mlp(0 * x), small_mlp),
    "the same maps twice": (PART, lambda x, mlp: mlp(F.normalize(mlp(x), dim=-1)), small_mlp),
    "no causal block": ("^not causal", lambda x, mlp: mlp(x + x.mean(1, True)), small_mlp),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_block_in_which_not_exactly_one_mlp_fits_is_refused(name):
    says, compute, *makers = REFUSED[name]
    torch.manual_seed(0)
    with pytest.raises(InputError, match=says):
        found_in(compute, *[make() for make in makers])


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_broken_weights_are_said_to_be_broken(number):
    mlp = small_mlp()
    mlp[2].weight.data[0, 0] = number
    with pytest.raises(InputError, match="NaN or Inf among what the model predicts"):
        found_in(summed, mlp)


def test_the_layers_of_a_model_are_its_largest_and_outermost_list_of_modules():
    maps = nn.ModuleList([nn.Linear(8, 20), nn.Linear(20, 8)])  # as large as the list of layers
    model = BlockLM(lambda x, maps: maps[1](F.relu(maps[0](x))), maps).eval()
    model.heads = nn.ModuleList([nn.Linear(2, 2) for _ in range(5)])
    assert find_mlp(model, 0).maps == tuple(maps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, DOUBLE])
@pytest.mark.parametrize("act", jsae.ACT_GRADS)
def test_a_known_activation_that_is_no_module_is_found_by_its_values(act, dtype):
    torch.manual_seed(0)
    maps = nn.Sequential(nn.Linear(8, 20, bias=False), nn.Linear(20, 8))
    maps[0].weight.data *= 0.3
    mlp = found_in(lambda x, maps: maps[1](act(maps[0](x))), maps, dtype=dtype)
    assert mlp.act is act or dtype in (torch.bfloat16, torch.float16)  # where some are alike
    assert mlp.W_in.dtype == torch.promote_types(dtype, torch.float32)


def test_the_mlp_and_the_loss_do_not_depend_on_the_default_dtype():
    pair, x = [sae.float() for sae in random_pair(d=8)], normal(50, 8).float()
    block = small_mlp(nn.Mish())
    results = []
    try:
        for default in (DOUBLE, torch.float32):
            torch.set_default_dtype(default)
            mlp = found_in(summed, block).scaled(2, 2)
            loss = jsae_loss(*pair, mlp, x, 1.0)[0]
            results.append([loss, *gradients(loss, pair), *mlp.buffers()])
    finally:
        torch.set_default_dtype(torch.float32)
    assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["gelu", "gelu_new", "gelu_fast", "quick_gelu", "gelu_10"])
def test_the_activation_is_told_apart_even_where_small_weights_hide_it(name):
    mlp = find_mlp(random_model("gpt_neox", hidden_act=name, initializer_range=1e-3), 0)
    z = torch.linspace(-50, 50, 999)
    assert_close(mlp.act(z), transformers.activations.ACT2FN[name](z), rtol=1e-6, atol=1e-5)


def test_odd_modules_do_not_hide_the_mlp():
    """A gate that is fused, reversed and of an odd phi; a picky neighbour; a map of other rows."""
    torch.manual_seed(0)
    odd = nn.ModuleList([nn.Linear(8, 20, bias=False), nn.Linear(10, 8), nn.Tanh()])

    def y_of(x):
        up, gate = odd[0](x).chunk(2, dim=-1)
        return odd[1](up * odd[2](gate))

    def compute(x, odd, picky, first):
        return x + y_of(picky(x)) + first(x[:, :1])

    mlp, x = found_in(compute, odd, nn.LayerNorm(8), nn.Linear(8, 8)), normal(7, 8).float()
    assert_close(mlp(x), y_of(x).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("hidden_by", ["a token of huge norm", "a large bias"])
def test_another_activation_is_seen_whatever_hides_it(hidden_by):
    mlp, wrong = random_mlp("tanh_gelu").float(), random_mlp("gelu").float()
    x = normal(24, 10).float()
    if hidden_by == "a token of huge norm":
        x[3] *= 3000
    else:
        mlp.b_out = wrong.b_out = mlp.b_out + 300
    y = mlp(x)
    assert (wrong(x) - y).norm() < jsae.TOLERANCE[torch.float32] * y.norm()  # of all together
    assert jsae.is_reproduced(mlp, x, y)
    assert not jsae.is_reproduced(wrong, x, y)


@pytest.mark.parametrize("noise", [0, 1e-6])
def test_a_text_of_mostly_one_word_is_reproduced_by_the_right_mlp_only(noise):
    mlp, wrong = random_mlp("tanh_gelu").float(), random_mlp("gelu").float()
    x = normal(1, 10).float().repeat(24, 1)
    x[[5, 11, 12]] = normal(3, 10, seed=1).float()
    y = mlp(x)
    y = y * (1 + noise * normal(*y.shape, seed=2).float())
    assert jsae.is_reproduced(mlp, x, y)
    assert not jsae.is_reproduced(wrong, x, y)
    y[5] *= 1.1
    assert not jsae.is_reproduced(mlp, x, y)  # of one token it is not


@pytest.mark.parametrize("kind", ["gpt_neox", "llama", "gpt2", "gpt_bigcode", "phi"])
def test_hook_names_are_those_of_the_modules_whose_outputs_x_and_y_are(kind):
    model = random_model(kind)
    mlp = find_mlp(model, 1)
    ids = torch.arange(20).reshape(1, 20) + 5
    outputs = []
    for name in jsae.hook_names(model, mlp):
        model.get_submodule(name).register_forward_hook(lambda m, args, y: outputs.append(y))
    model(ids)
    assert torch.equal(outputs[0], jsae.mlp_inputs(model, mlp, ids))
    assert_close(outputs[1], mlp(outputs[0]), rtol=1e-4, atol=1e-6)


def test_no_module_is_named_where_none_has_x_as_its_output():
    model = BlockLM(lambda x, mlp: mlp(2 * x), small_mlp())
    assert jsae.hook_names(model, find_mlp(model, 0)) == (None, "layers.0.parts.0.2")


# ---- 6. Settings, text, activations --------------------------------------------------------------

END = "<|endoftext|>"
changed = dataclasses.replace


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


def numbered_text(i):
    return f"Document {i}: " + " ".join(map(str, range(i, i + 60)))


def is_held_out(content):
    return zlib.crc32(str(content).encode()) % 20 == 0


def contexts_of(config, part="all", rank=0, world=1):
    return list(jsae.token_contexts(config, TOKENIZER, part, rank, world))


def tokens_by_document(contexts):
    """-> {document number: its token ids}, without the first token of each context, BOS."""
    found = {}
    for ids, documents in contexts:
        assert (len(ids), len(documents), ids[0]) == (32, 32, TOKENIZER.bos_token_id)
        assert documents[0] == documents[1]
        for token, document in zip(ids[1:], documents[1:]):
            found.setdefault(document, []).append(token)
    return found


def documents_of(dataset):
    """-> the text of each document of a data set, in order; its pieces put together."""
    found = {}
    for piece, _, number in jsae.pieces(Config(dataset=str(dataset))):
        found[number] = found.get(number, "") + piece
    return list(found.values())


@pytest.mark.parametrize("kind", ["rows", "files", "rows of ids"])
def test_contexts_are_packed_documents_whose_number_every_token_has(kind, config, tmp_path):
    long_text = " ".join(map(str, range(9000)))  # in three pieces
    special = f"names of special tokens, as {END}, are plain text"
    texts = [*map(numbered_text, range(30)), long_text, special, *map(numbered_text, range(70))]
    documents = [TOKENIZER(text).input_ids for text in texts]
    if kind == "files":
        for i, text in enumerate(texts):
            (tmp_path / f"{i:03}.txt").write_text(text)
    else:
        write_rows(tmp_path / "rows.jsonl", texts if kind == "rows" else documents)
    found = tokens_by_document(contexts_of(changed(config, dataset=str(tmp_path))))
    *complete, last = found
    assert complete == list(range(last)) and last >= 100
    for number in complete:
        text = texts[number]
        pieces = [text[start : start + 2**14] + END for start in range(0, len(text), 2**14)]
        if kind == "rows of ids":
            assert found[number] == documents[number]
        else:
            assert TOKENIZER.decode(found[number]) == "".join(pieces)
            assert found[number].count(TOKENIZER.eos_token_id) == len(pieces)


def test_what_is_held_out_depends_on_its_own_content_alone(config, tmp_path):
    texts = [numbered_text(i) for i in range(400)]
    for before in ([], ["one row before all others"], texts[7:]):
        path = write_rows(tmp_path / "rows.jsonl", [*before, *texts])
        pieces = list(jsae.pieces(changed(config, dataset=str(path))))
        assert all(is_out == is_held_out(piece) for piece, is_out, _ in pieces)
    held_out = {i for i, text in enumerate(texts) if is_held_out(text)}
    assert len(held_out) > 10
    assert held_out >= set(tokens_by_document(contexts_of(config, "held out"))) > set()
    trained = set(tokens_by_document(contexts_of(config, "training")))
    assert not trained & held_out
    share, other = [contexts_of(config, "training", rank, 2) for rank in (0, 1)]
    assert not set(tokens_by_document(share)) & set(tokens_by_document(other))
    assert len(trained - set(tokens_by_document(share + other))) <= 2  # at their ends
    for content in (" ".join(map(str, range(100_000))), list(range(2**20))):  # long: by pieces
        path = write_rows(tmp_path / "long.jsonl", [content])
        pieces = [piece[:2] for piece in jsae.pieces(changed(config, dataset=str(path)))]
        expected = [content[start : start + 2**14] for start in range(0, len(content), 2**14)]
        assert pieces == [(piece, is_held_out(piece)) for piece in expected]
        assert any(is_out for _, is_out in pieces)


def test_of_the_stdlib_files_are_held_out_by_their_paths(config):
    pieces = list(jsae.pieces(changed(config, dataset="stdlib")))
    assert [number for _, _, number in pieces] == list(range(len(pieces)))
    is_out_of = {text: is_out for text, is_out, _ in pieces}
    assert 0.02 < sum(is_out_of.values()) / len(is_out_of) < 0.08
    for name in ("textwrap.py", "json/decoder.py", "_strptime.py"):
        text = (Path(os.__file__).parent / name).read_text()
        assert is_out_of[text] == is_held_out(name)
    assert Path(pytest.__file__).read_text() not in is_out_of


TEXTS = [f'text number {i}, "quoted", naïve ελ\n\n' * 9 for i in range(40)]
DATA = list(
    itertools.product(
        (".jsonl", ".csv", ".txt", ".md"), ("", ".gz", ".zst", ".xz", ".bz2"), ["as it is"]
    )
)
DATA += [(kind, "", how) for kind in (".jsonl", ".csv", ".txt") for how in ("BOM", "CRLF")]
DATA += [(".parquet", "", "as it is"), (".csv", ".gz", "BOM"), (".jsonl", ".zst", "CRLF")]


def files_of_data(kind):
    """-> {name: bytes} of files that hold TEXTS."""
    table = jsae.datasets.Dataset.from_dict({"n": list(range(len(TEXTS))), "text": TEXTS})
    if kind in (".txt", ".md"):
        return {f"{i:03}{kind}": text.encode() for i, text in enumerate(TEXTS)}
    file = io.BytesIO()
    write = {".jsonl": table.to_json, ".csv": table.to_csv, ".parquet": table.to_parquet}[kind]
    write(file)
    return {f"data{kind}": file.getvalue()}


@pytest.mark.parametrize("kind, compression, how", DATA)
def test_every_kind_of_local_data_gives_the_same_documents(kind, compression, how, tmp_path):
    for folder in ("nested/folder", ".git"):
        (tmp_path / folder).mkdir(parents=True)
    for name, data in files_of_data(kind).items():
        (tmp_path / ".git" / name).write_bytes(data)
        (tmp_path / f".{name}").write_bytes(data)
        if how == "BOM":
            data = b"\xef\xbb\xbf" + data
        if how == "CRLF":
            data = data.replace(b"\n", b"\r\n")
        path = tmp_path / "nested" / "folder" / (name + compression)
        path.write_bytes(data)
        if compression:
            with jsae.fsspec.open(str(path), "wb", compression="infer") as file:
                file.write(data)
    assert documents_of(tmp_path) == TEXTS
    if kind == ".parquet":
        jsae.datasets.Dataset.from_parquet(str(path)).save_to_disk(tmp_path / "saved")
        assert documents_of(tmp_path / "saved") == TEXTS


def test_of_a_folder_what_is_text_is_read_and_the_rest_is_named(config, tmp_path, capsys):
    texts = {"chapter1.txt": "one", "chapter2.txt": "two", "empty.txt": "", "more/README": "three"}
    texts |= {"train.txt": "four " * 999, "x.jsonl": '{"text": "five"}'}
    names = "a.zip link picture.png run/config.json run/sae_x/notes.txt settings.json utf16.txt"
    folder = tmp_path / "texts"
    for name in ("more", "run/sae_x"):
        (folder / name).mkdir(parents=True)
    written = texts | {"run/config.json": "mlp_sha256", "run/sae_x/notes.txt": "a", "a.zip": "PK\0"}
    written |= {"picture.png": "\0", "settings.json": "{}", "utf16.txt": "not ours"}
    for name, text in written.items():
        (folder / name).write_text(text, "utf-16" if name == "utf16.txt" else "utf-8")
    (folder / "link").symlink_to(folder / "more")
    read = [folder / name for name in texts]
    left = [folder / name for name in names.split()]
    assert jsae.local_files(folder) == (read, left)
    assert documents_of(folder) == ["one", "two", "three", "four " * 999, "five"]
    jsae.train(changed(config, dataset=str(folder), tokens=128))
    says = "6 files are read, 7 passed over: " + " ".join(map(str, left))
    assert says in capsys.readouterr().err


ODD_ROWS = [  # file, its content, the documents in it
    ("long_field.csv", b"text,n\n" + b"a" * 300_000 + b",1\n", ["a" * 300_000]),
    ("kinds.jsonl", b'{"n": 1, "text": "a"}\n{"n": "one", "text": "b"}', ["a", "b"]),
    ("columns.jsonl", b'{"text": "a"}\n\n{"m": [1], "text": "b"}\n', ["a", "b"]),
    ("no_text.jsonl", b'{"text": ""}\n{"text": null}\n{"text": "b"}\n', ["b"]),
    ("bad_bytes.txt", b"caf\xe9 ", ["caf\ufffd "]),
    ("half_a_pair.jsonl", b'{"text": "a\\ud83d b"}\n', ["a? b"]),
    ("empty.txt", b"", []),
    ("dir[1]/a.txt", b"this one", ["this one"]),
    ("a::b?#*.txt", b"this one", ["this one"]),
    (".hidden.txt", b"named by itself", ["named by itself"]),
    ("other.tex", b'{"text": 1}\n', ['{"text": 1}\n']),
]


@pytest.mark.parametrize("name, content, expected", ODD_ROWS, ids=lambda value: str(value)[:20])
def test_odd_names_and_rows_are_read(name, content, expected, tmp_path):
    for folder in ("dir1", "dir[1]"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text("another")
    (tmp_path / name).write_bytes(content)
    assert documents_of(tmp_path / name) == expected


def test_rows_of_ids_are_taken_as_they_are(config, tmp_path):
    packed = [[0, *range(100 * i + 1, 100 * i + 8)] for i in range(9)]  # as long as a context
    path = write_rows(tmp_path / "packed.jsonl", packed)
    config = changed(config, dataset=str(path), context_size=8)
    assert contexts_of(config) == [(row, [i] * 8) for i, row in enumerate(packed)]
    write_rows(path, [[10, 11, 12], [13, 14], [15, 0, 16]])
    expected = [([0, 10, 11, 12, 13], [0, 0, 0, 0, 1]), ([0, 14, 15, 0, 16], [1, 1, 2, 2, 2])]
    assert contexts_of(changed(config, context_size=5)) == expected


def refusal(argv, capsys):
    """What jsae.py says of bad input: status 2 and one line."""
    assert jsae.main([str(word) for word in argv]) == 2
    return one_line_of(capsys).removeprefix("jsae.py: error: ")


def files_in(folder):
    return [path for path in Path(folder).rglob("*") if path.is_file() and path.name != ".lock"]


GOOD_ROW = json.dumps({"text": numbered_text(1)}) + "\n"
BAD_TEXT = {  # file: its content, what the line says
    "empty.txt": ("", "empty.txt"),
    "short.txt": ("only a few words", "short.txt"),
    "alone.json": (GOOD_ROW, "alone.json"),
    "folder/settings.json": (GOOD_ROW, "folder"),
    "folder/broken.txt.xz": ("not compressed", "broken.txt.xz"),
    "folder/broken.txt.gz": ("not compressed", "broken.txt.gz"),
    "broken.jsonl.zst": ("not compressed", "broken.jsonl.zst"),
    "other.jsonl": (2 * GOOD_ROW + '{"body": "a"}', "other.jsonl, row 3: "),
    "list.jsonl": (2 * GOOD_ROW + '{"text": ["a"]}', "list.jsonl, row 3: "),
    "broken.jsonl": (2 * GOOD_ROW + '{"text": ', "broken.jsonl, after row 2: Expecting value"),
    "array.jsonl": (2 * GOOD_ROW + '["a"]', "array.jsonl, "),
    "other.csv": ("title,body\na,b\n", "other.csv, row 1: "),
    "broken.parquet": ("PAR1 is not enough", "broken.parquet, after row 0"),
    "unknown.jsonl": ('{"text": [5, 99999]}\n' * 999, "token ids 0 to 99999; the model knows 0 to"),
    "below.jsonl": ('{"text": [5, -1]}\n' * 999, "token ids -1 to 5; the model knows 0 to 2559"),
    "huge.jsonl": (f'{{"text": [5, {2**70}]}}\n' * 999, "token ids"),
}


@pytest.mark.parametrize("name", BAD_TEXT)
def test_bad_text_gets_one_line_and_writes_nothing(name, config, tmp_path, capsys):
    content, says = BAD_TEXT[name]
    (tmp_path / "folder").mkdir()
    (tmp_path / name).write_text(content)
    dataset = tmp_path / name.split("/")[0]
    assert says in refusal([*flags(config), "--dataset", dataset], capsys)
    assert not files_in(config.output_dir)


def test_batches_hold_each_mlp_input_once_and_no_first_token(config):
    config = changed(config, batch_size=31 * 33, tokens=8 * 31 * 33, buffer_batches=8)
    _, model, _, mlp = run = loaded(config)
    x = torch.cat(list(jsae.activation_batches(*run)))
    contexts = contexts_of(config, "training")[: 8 * 33]
    ids = torch.tensor([ids for ids, _ in contexts])  # of 264, 256 are in one forward pass
    expected = jsae.watch(model, ids, mlp.maps)[0].view(264, 32, 16)[:, 1:].flatten(0, 1)
    assert not torch.equal(x, expected)  # shuffled
    assert_close(x.sort(0).values, expected.sort(0).values, rtol=1e-4, atol=1e-5)


def test_the_order_depends_on_filling_and_seed_and_the_saes_on_the_seed_alone(config, monkeypatch):
    contexts = [ids for ids, _ in contexts_of(config, "training")[:16]]  # a filling of 4 x 124
    monkeypatch.setattr(jsae, "training_contexts", lambda *_: itertools.cycle(contexts))
    orders = []
    saes = []
    for seed in (0, 0, 1):
        of_seed = changed(config, seed=seed, batch_size=124)
        torch.rand(len(orders))  # what was drawn before plays no part
        saes.append(jsae.new_pair(of_seed, 16, "cpu")[0].state_dict())
        orders += torch.cat(list(jsae.activation_batches(*loaded(of_seed))))[:992].split(496)
    one, second, *again, other, _ = orders
    assert torch.equal(one, again[0]) and torch.equal(second, again[1])
    for x in (second, other):
        assert not torch.equal(x, one)
        assert torch.equal(x.sort(0).values, one.sort(0).values)
    rows = [pair[name] for pair in saes for name in ("sae_x.W_enc", "sae_y.W_enc")]
    assert torch.equal(rows[0], rows[2]) and torch.equal(rows[1], rows[3])
    for one, other in itertools.combinations([*rows[:2], *rows[4:]], 2):
        assert not torch.equal(one, other)


@pytest.mark.parametrize("n_batches", [0, 1, 5])
def test_an_mlp_that_is_not_the_models_is_refused_in_every_filling(n_batches, config):
    run = loaded(config)
    batches = jsae.activation_batches(*run)
    for _ in range(n_batches):
        next(batches)
    run[1].gpt_neox.layers[0].mlp.dense_4h_to_h.weight.data *= 1.001
    with pytest.raises(InputError, match="the model's MLP is not the one that was found"):
        for _ in range(5):  # a filling has 4
            next(batches)


@pytest.mark.parametrize(
    "content",
    ["no " * 400, "no no no no no what was " * 90, [5] * 400, [0] * 400, [5, 5, 5, 6] * 90],
    ids=lambda content: str(content)[:9],
)
def test_a_repetitive_text_trains(content, config, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [content] * 90)
    run = jsae.train(changed(config, dataset=str(path), tokens=128 * 6))
    assert rows_of(run)[-1]["step"] == 6


def test_text_that_ends_begins_again_with_a_notice(config, tmp_path, capsys):
    texts = [numbered_text(i) for i in range(4)]
    assert not any(map(is_held_out, texts))
    short = changed(config, dataset=str(write_rows(tmp_path / "short.jsonl", texts)))
    one_pass = [ids for ids, _ in contexts_of(short)]
    endless = jsae.training_contexts(short, TOKENIZER)
    assert list(itertools.islice(endless, 3 * len(one_pass))) == 3 * one_pass
    assert capsys.readouterr().err.count(f"begins again after {len(one_pass)} contexts") == 1
    assert rows_of(jsae.train(short))[-1]["step"] == 15
    assert "too short to hold any out: evaluate on another --dataset" in capsys.readouterr().err


@pytest.mark.parametrize("longest, taken", [(64, 64), (-1, 80), (100, 80)])
def test_a_context_is_at_most_what_the_model_takes(longest, taken, config, tmp_path):
    folder = shutil.copytree(config.model, tmp_path / "model")
    own = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": longest}
    (folder / "config.json").write_text(json.dumps(own))
    run = jsae.train(changed(config, model=str(folder), context_size=80, tokens=128))
    assert jsae.load_run(run)[2].context_size == taken


INSIDE = "gpt_neox.layers.0.mlp.dense_h_to_4h.weight"
OWN = {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}
BAD_MODELS = {  # what is removed, what is written, what the line says
    "NaN": ("", {}, "NaN or Inf among what the model predicts"),
    "a weight less": ("", {}, f"1 weights are missing or of another size, as {INSIDE}"),
    "an adapter": ("", {"adapter_config.json": "{}"}, "holds an adapter: merge it into its model"),
    "no tokenizer": ("tokenizer*", {}, "--model"),
    "pickle": ("model.safetensors", {"pytorch_model.bin": ""}, "safetensors"),
    "code": ("", {"config.json": json.dumps(OWN), "own.py": "raise KeyboardInterrupt"}, "--model"),
}


@pytest.mark.parametrize("how", BAD_MODELS)
def test_a_model_that_is_not_what_it_should_be_gets_one_line(how, config, tmp_path, capsys):
    removed, written, says = BAD_MODELS[how]
    folder = shutil.copytree(config.model, tmp_path / "model")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    if how == "NaN":
        tensors[INSIDE][0, 0] = math.nan
    if how == "a weight less":
        tensors.pop(INSIDE)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for path in folder.glob(removed or "nothing"):
        path.unlink()
    for name, text in written.items():
        (folder / name).write_text(text)
    assert says in refusal([*flags(config), "--model", folder], capsys)
    assert not Path(config.output_dir).exists()


def test_a_revision_follows_an_at_unless_a_folder_has_that_name(config, monkeypatch, tmp_path):
    def fails(name, revision="main", **options):
        raise OSError(f"{name} at {revision}")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fails)
    folder = f"{tmp_path}/a@b"
    Path(folder).mkdir()
    asked = {"a/b@c": "a/b at c", "a/b": "a/b at main", folder: f"{folder} at main"}
    for name, says in asked.items():
        with pytest.raises(InputError, match=f": {says}$"):
            jsae.load_model(changed(config, model=name))


@pytest.mark.parametrize("how", ["init", "shuffle", "paper"])
def test_random_controls_come_from_the_seed_and_change_what_they_say(how, config):
    trained = jsae.load_model(config)[0]
    control = changed(config, randomize_weights=how, seed=5)
    one, again = (jsae.load_model(control)[0] for _ in range(2))
    other = jsae.load_model(changed(control, seed=6))[0]
    four = [model.parameters() for model in (trained, one, again, other)]
    for before, p, same, q in zip(*four, strict=True):
        assert torch.equal(p, same)
        assert torch.equal(p, before) == (how == "paper" and p.ndim < 2)
        if how == "shuffle":
            assert torch.equal(p.flatten().sort().values, before.flatten().sort().values)
        elif p.ndim >= 2:
            std = 0.02 if how == "init" else 0.8 / 16**0.5
            assert p.std().item() == pytest.approx(std, rel=0.2)
        if how == "shuffle" or p.ndim >= 2:
            assert not torch.equal(p, q)
    assert not one.training
    assert not any(p.requires_grad for p in one.parameters())


BAD_SETTINGS = [  # field, value, what the line says
    ("model", "no-such-folder-or-model", "no-such-folder-or-model"),
    ("dataset", "no/such-data-set", "no/such-data-set"),
    ("column", "body", "in column body"),
    ("k", 65, "k is 65; expected 1 to 64, the number of latents"),
    ("k", "many", "--k"),
    ("seed", -1, "--seed is -1; expected"),
    ("seed", 2**64, f"--seed is {2**64}; expected"),
    ("tokens", 100, "--batch-size is 128; expected at most --tokens, which is 100"),
    ("context_size", 1, "--context-size is 1; expected a whole number from 2"),
    ("lr", math.nan, "--lr is nan; expected a number"),
    ("jacobian_coef", math.inf, "--jacobian-coef is inf; expected a number from 0"),
    ("jacobian_coef", -1.0, "--jacobian-coef is -1.0; expected a number from 0"),
    ("dtype", "float16", "--dtype is 'float16'; expected auto, float32, bfloat16"),
    ("randomize_weights", "all", "--randomize-weights is 'all'; expected none, init, shuffle, pap"),
    ("device", "tpu", "tpu"),
    ("device", "cuda:0", "--device is cuda:0; expected cuda: each process has its GPU"),
    ("batch_size", 127, "--batch-size is 127; expected a multiple of 2, the number of processes"),
]


@pytest.mark.parametrize("name, value, says", BAD_SETTINGS)
def test_a_bad_setting_gets_one_line(name, value, says, config, monkeypatch, capsys):
    if "process" in says:
        monkeypatch.setattr(jsae, "WORLD", 2)
    assert says in refusal([*flags(config), f"{jsae.flag(name)}={value}"], capsys)
    with pytest.raises(ValueError, match=re.escape(says)):
        jsae.train(changed(config, **{name: value}))
    assert not files_in(config.output_dir)


def test_without_a_model_the_demo_stands_in_and_flags_win(tmp_path, monkeypatch):
    files = list(itertools.islice(jsae.stdlib_files(), 50))
    monkeypatch.setattr(jsae, "stdlib_files", lambda: iter(files))
    small = {"tokens": 512, "batch_size": 256, "buffer_batches": 1, "k": 5}
    words = [f"{jsae.flag(name)}={value}" for name, value in small.items()]
    assert jsae.main([*words, f"--output-dir={tmp_path}"]) == 0
    demo = Config(**jsae.DEMO | small, output_dir=str(tmp_path))
    assert jsae.load_run(tmp_path)[2] == demo


# ---- 7. Training ---------------------------------------------------------------------------------


def assert_same_run(one, other):
    """The same bits and metrics, and nothing left of a checkpoint."""
    for file in ("sae_x/sae_weights.safetensors", "sae_y/sae_weights.safetensors"):
        assert (one / file).read_bytes() == (other / file).read_bytes()
    assert rows_of(one) == rows_of(other)
    assert not list(other.glob("checkpoint*"))


def test_the_schedule_warms_up_and_decays(config):
    config = changed(config, jacobian_coef=3.0)
    expected = {1: (1 / 2, 1 / 10), 2: (1, 2 / 10), 10: (1, 1), 161: (1, 1), 200: (1 / 40, 1)}
    for step, (lr, coef) in expected.items():
        assert jsae.schedule(config, step, 200) == pytest.approx((lr * config.lr, coef * 3.0))
    assert jsae.schedule(config, 181, 200)[0] == pytest.approx(config.lr / 2)


def test_every_step_is_adam_on_the_clipped_gradient_of_the_loss(config, monkeypatch):
    """Training again, in 20 lines, with a schedule whose every value counts."""
    config = changed(config, tokens=128 * 6, expansion_factor=32)
    monkeypatch.setattr(jsae, "schedule", lambda config, step, n_steps: (0.02 / step, 4.0 * step))
    real = jsae.new_pair

    def new_pair(*args):
        pair, adam = real(*args)
        pair.sae_x.b_enc.data -= 2.5  # ReLU cuts latents off
        return pair, adam

    monkeypatch.setattr(jsae, "new_pair", new_pair)
    run = jsae.train(config)
    _, _, _, mlp = loaded_run = loaded(config)
    batches = list(jsae.activation_batches(*loaded_run))[:6]
    scales = [v.norm(dim=1).mean().item() / 4 for v in (batches[0], mlp(batches[0]))]  # sqrt(16)
    pair, _ = jsae.new_pair(config, 16, "cpu")
    saes = pair.sae_x, pair.sae_y
    adam = torch.optim.Adam(pair.parameters())
    is_dead = torch.ones(2, 512, dtype=torch.bool)
    for step, x in enumerate(batches, 1):
        values = x / scales[0], mlp(x) / scales[1]
        for dead, sae, v in zip(is_dead, saes, values):
            s = sae.encode(v)
            dead[s.idx[s.acts > 0]] = False
        adam.param_groups[0]["lr"] = 0.02 / step
        adam.zero_grad()
        jsae.plain_jsae_loss(*saes, mlp.scaled(*scales), values[0], 4.0 * step).backward()
        assert nn.utils.clip_grad_norm_(pair.parameters(), 1.0) > 1
        adam.step()
        for sae in saes:
            sae.set_decoder_norm_to_one()
    row = rows_of(run)[-1]
    assert [row["dead_x"], row["dead_y"]] == is_dead.sum(1).tolist()
    assert 5 < is_dead[1].sum() < is_dead[0].sum() < 512
    raw = jsae.measure(*jsae.load_run(run)[:2], mlp, x)  # of the saved pair, on raw activations
    for name, factor in (("mse_x", scales[0] ** 2), ("mse_y", scales[1] ** 2), ("ev_y", 1)):
        assert raw[name] == pytest.approx(factor * row[name], rel=1e-3)
    for name in ("ev_x", "jacobian_l1", "jacobian_above_0.01"):
        assert raw[name] == pytest.approx(row[name], rel=1e-3)
    s_x, s_y = (sae.encode(v) for sae, v in zip(saes, values))
    J = active_jacobian(*saes, mlp.scaled(*scales), values[0], s_x, s_y)
    assert row["jacobian_l1"] == pytest.approx(J.abs().mean().item(), rel=1e-3)
    mse = F.mse_loss(saes[1](values[1]), values[1]).item()
    assert row["ev_y"] == pytest.approx(1 - mse / values[1].var(0, False).mean().item(), rel=1e-3)
    for sae, ours, scale in zip(jsae.load_run(run), saes, scales):
        factors = {"W_dec": 1 / scale, "W_enc": scale, "b_dec": 1 / scale, "b_enc": 1}
        for name, factor in factors.items():
            expected = getattr(ours, name)
            found = getattr(sae, name) * factor
            assert (found - expected).norm() < 1e-5 * expected.norm(), name


def test_a_latent_is_dead_after_ten_million_tokens_without_a_positive_value(config, monkeypatch):
    idx = torch.tensor([[0, 1], [2, 3]])
    of_x = Latents(torch.tensor([[1.0, 0.0], [2.0, 0.0]]), idx)
    of_y = Latents(torch.tensor([[1.0, 3.0], [2.0, 0.0]]), idx)
    parts = {"s_x": of_x, "s_y": of_y}
    real = jsae.jsae_loss
    monkeypatch.setattr(jsae, "jsae_loss", lambda *args: (real(*args)[0], parts))
    folder = Path(config.output_dir)
    steps = 10_000_000 // 128  # exactly
    for more, dead in ((9, [0, 0]), (10, [62, 0]), (11, [62, 61])):
        pair, adam = jsae.new_pair(config, 16, "cpu")
        pair.step.fill_(steps + more - 1)
        pair.last_fired[0] = 128 * 10
        pair.last_fired[1] = 128 * 11
        last = changed(config, tokens=128 * (steps + more))
        x = normal(128, 16).float()
        jsae.optimize(last, jsae.l1, random_mlp(d=16).float(), pair, adam, iter([x]), folder)
        row = rows_of(folder)[-1]
        assert [row["dead_x"], row["dead_y"]] == dead


def test_a_run_holds_its_settings_and_saes_in_the_saelens_format(config, whole):
    files = {str(path.relative_to(whole)) for path in files_in(whole)}
    saes = {f"sae_{s}/{f}" for s in "xy" for f in ("cfg.json", "sae_weights.safetensors")}
    assert files == {"config.json", "metrics.jsonl", *saes}
    saved = json.loads((whole / "config.json").read_text())
    assert saved.keys() == {"config", "penalty", "processes", "mlp_sha256", "versions"}
    assert changed(Config(**saved["config"]), output_dir=config.output_dir) == config
    _, model, _, mlp = loaded(config)
    x, y = jsae.watch(model, torch.tensor([contexts_of(config)[0][0]]), mlp.maps)
    values = {"sae_x": x, "sae_y": y}
    hooks = "gpt_neox.layers.0.post_attention_layernorm", "gpt_neox.layers.0.mlp.dense_4h_to_h"
    for sae, name, hook in zip(jsae.load_run(whole), values, hooks):
        cfg = json.loads((whole / name / "cfg.json").read_text())
        metadata = cfg.pop("metadata")
        sizes = {"architecture": "topk", "d_in": 16, "d_sae": 64, "k": 4}
        assert cfg == sizes | {"apply_b_dec_to_input": False, "dtype": "float32"}
        assert (metadata["hook_name"], metadata["prepend_bos"]) == (hook, True)
        t = safetensors.torch.load_file(whole / name / "sae_weights.safetensors")
        v = values[name]
        acts, idx = (v @ t["W_enc"] + t["b_enc"]).topk(4)
        dense = torch.zeros(len(v), 64).scatter(1, idx, F.relu(acts))
        assert_close(dense @ t["W_dec"] + t["b_dec"], sae(v), rtol=1e-5, atol=1e-5)


def test_bfloat16_trains_to_about_the_same_loss(config, tmp_path):
    config = changed(config, lr=0.001, tokens=128 * 40)
    (exact,) = rows_of(jsae.train(config))
    (row,) = rows_of(jsae.train(changed(config, dtype="bfloat16", output_dir=str(tmp_path / "b"))))
    for name in ("mse_x", "mse_y"):
        assert row[name] != exact[name]
        assert row[name] == pytest.approx(exact[name], rel=0.1)


@pytest.fixture
def steps_save(monkeypatch):
    """A checkpoint after each step: the clock runs backwards, so that no time is too short."""
    clock = types.SimpleNamespace(time=itertools.count(0, -1).__next__, sleep=lambda seconds: None)
    monkeypatch.setattr(jsae, "time", clock)
    monkeypatch.setattr(jsae, "CHECKPOINT_SECONDS", -math.inf)


def in_call(number, happens, name="jsae_loss"):
    """-> what changes a function of jsae.py: in one call, its result is given to happens."""

    def patch(monkeypatch, run):
        real = getattr(jsae, name)
        calls = itertools.count(1)

        def function(*args):
            result = real(*args)
            return happens(result) if next(calls) == number else result

        monkeypatch.setattr(jsae, name, function)

    return patch


def ctrl_c(result):
    raise KeyboardInterrupt


def no_room_for(name):
    def patch(monkeypatch, run):
        (run / name).parent.mkdir(parents=True)
        (run / f"{name}.tmp").symlink_to("/dev/full")  # a real disk without room

    return patch


def broken_text(monkeypatch, run):
    """The text of the third filling cannot be read."""
    real = jsae.token_contexts

    def token_contexts(*args):
        yield from itertools.islice(real(*args), 40)
        raise InputError("docs.jsonl: the stream broke")

    monkeypatch.setattr(jsae, "token_contexts", token_contexts)


nan_x = in_call(3, lambda x: x * math.nan, "mlp_inputs")
nan_loss = in_call(6, lambda result: (result[0] * math.nan, result[1]))
FULL = "bytes: [Errno 28] No space left on device"
STOPS = {  # what happens, exit status, what the line says, the step that is saved
    "Ctrl-C at once": (in_call(1, ctrl_c, "load_model"), 130, "stopped", None),
    "Ctrl-C after a filling": (in_call(5, ctrl_c), 130, "stopped", 4),
    "Ctrl-C in a filling": (in_call(2, ctrl_c, "mlp_inputs"), 130, "stopped", 4),
    "Ctrl-C in the last filling": (in_call(14, ctrl_c), 130, "stopped", 13),
    "Ctrl-C at the end": (in_call(1, ctrl_c, "hook_names"), 130, "stopped", 14),
    "no room for settings": (no_room_for("config.json"), 2, FULL, None),
    "no room for a checkpoint": (no_room_for("checkpoint.safetensors"), 2, FULL, None),
    "no room for sae_y": (no_room_for("sae_y/sae_weights.safetensors"), 2, FULL, 14),
    "NaN loss": (nan_loss, 2, "step 6: loss nan, gradient of norm nan", 5),
    "NaN x": (nan_x, 2, "NaN or Inf among the inputs x of layer 0's MLP", 8),
    "broken text": (broken_text, 2, "docs.jsonl: the stream broke", 8),
}


@pytest.mark.parametrize("name", STOPS)
def test_stopped_runs_go_on_to_the_same_bits(name, config, whole, steps_save, monkeypatch, capsys):
    happens, status, says, step = STOPS[name]
    if says == FULL and not Path("/dev/full").exists():
        pytest.skip("only Linux has a disk that is always full")
    if name in ("NaN x", "broken text"):  # what was done is kept without a checkpoint before
        monkeypatch.setattr(jsae, "CHECKPOINT_SECONDS", math.inf)
    run = Path(config.output_dir)
    with monkeypatch.context() as patch:
        happens(patch, run)
        assert jsae.main(flags(config)) == status
    line = one_line_of(capsys)
    assert line.startswith("jsae.py: ") and line.endswith(says)
    if says == FULL:
        assert re.search(r"/run/\S+ cannot be written, [\d,]+ bytes", line)
    assert not list(run.rglob("*.tmp"))
    checkpoint = run / "checkpoint.safetensors"
    assert checkpoint.exists() == (step is not None)
    if step is not None:
        state = safetensors.torch.load_file(checkpoint)
        assert state["step"] == step
        assert all(tensor.isfinite().all() for tensor in state.values())
    if name == "Ctrl-C in the last filling":  # it may go on elsewhere
        run = Path(shutil.move(run, run.parent / "moved"))
        (run / "metrics.jsonl").write_text('{"step": 14}\n')  # which the checkpoint does not hold
        config = changed(config, output_dir=str(run), device="cpu:0")
    with torch.no_grad():  # a notebook may be so
        assert jsae.main(flags(config)) == 0
    assert (f"going on after step {step};" in capsys.readouterr().err) == (step is not None)
    assert_same_run(whole, run)


def test_a_file_that_is_not_replaced_at_once_is_tried_again(tmp_path, monkeypatch):
    failures = [OSError("busy")]
    real = os.replace

    def replace(part, path):
        if failures:
            raise failures.pop()
        real(part, path)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    jsae.write_file(tmp_path / "file", b"new")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"new"]


KILLED = """
import os, signal, sys, jsae
jsae.CHECKPOINT_SECONDS = -1
fsync = os.fsync
def kill(file):
    fsync(file)
    if os.path.exists(sys.argv[1] + "/checkpoint.safetensors"):
        os.kill(os.getpid(), signal.SIGKILL)
os.fsync = kill
jsae.main(sys.argv[2:])
"""


def test_killed_while_it_writes_a_run_goes_on_to_the_same_bits(config, whole, steps_save):
    run = Path(config.output_dir)
    command = [sys.executable, "-c", KILLED, str(run), *flags(config)]
    environment = ONE_THREAD | {"PYTHONPATH": str(jsae.HERE)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list(run.glob("*.tmp"))) == 1
    assert_same_run(whole, jsae.train(config))


def test_of_two_equal_commands_one_trains_and_the_other_says_so(config, capsys):
    run = Path(config.output_dir)
    run.mkdir()
    with jsae.filelock.FileLock(run / ".lock"):
        assert str(run / ".lock") in refusal(flags(config), capsys)
    assert not files_in(run)


def test_a_finished_run_prints_its_table_and_writes_nothing(run_copy, config, monkeypatch, capsys):
    before = {path: path.read_bytes() for path in files_in(run_copy)}
    (run_copy / "checkpoint.safetensors").write_text("of a run that was killed at its end")

    def writes(*args, **options):
        raise OSError("read-only")

    monkeypatch.setattr(jsae, "write_file", writes)
    monkeypatch.setattr(jsae.filelock, "FileLock", writes)
    monkeypatch.setattr(Path, "mkdir", writes)
    assert jsae.main(flags(changed(config, output_dir=str(run_copy)))) == 0
    out, error = capsys.readouterr()
    (row,) = rows_of(run_copy)
    for name in ("ev_x", "ev_y", "jacobian_l1", "jacobian_above_0.01"):
        assert re.search(rf"^{name} +{re.escape(f'{row[name]:,.4g}')}$", out, re.MULTILINE)
    assert out.endswith(f"evaluate.py {run_copy}\n")
    assert f"rm -r {run_copy} makes room for a new one" in error
    assert before == {path: path.read_bytes() for path in files_in(run_copy)}


def squares(J):
    return J.square().mean((1, 2))


def test_another_run_is_refused_with_all_that_differs(run_copy, config, monkeypatch, capsys):
    config = changed(config, output_dir=str(run_copy))
    before = {path: path.read_bytes() for path in files_in(run_copy)}
    line = refusal([*flags(config), "--k", 5, "--lr", 0.02], capsys)
    assert line.endswith("k 4 (not 5), lr 0.01 (not 0.02); name another --output-dir")
    with pytest.raises(InputError, match=r"with penalty 'l1' \(not 'squares'\); name another"):
        jsae.train(config, squares)
    change = in_call(1, lambda mlp: mlp.scaled(1.0, 2.0), "find_mlp")
    change(monkeypatch, run_copy)
    assert "holds a run with mlp_sha256" in refusal(flags(config), capsys)
    assert before == {path: path.read_bytes() for path in files_in(run_copy)}


def test_a_penalty_of_ones_own_is_trained_and_one_without_a_name_refused(config):
    for penalty in (lambda J: squares(J), functools.partial(squares), nn.L1Loss()):
        with pytest.raises(InputError, match="the penalty is known by its name: define it by def"):
            jsae.train(config, penalty)
    row = rows_of(jsae.train(config, squares))[-1]
    assert 0 < row["penalty"] < 0.2 * row["jacobian_l1"]


def test_a_run_is_loaded_from_the_hub_and_only_if_it_is_finished(run_copy, monkeypatch):
    def download(name, allow_patterns):
        needed = {path for pattern in allow_patterns for path in run_copy.glob(pattern)}
        assert set(files_in(run_copy)) - needed == {run_copy / "metrics.jsonl"}
        return str(run_copy)

    monkeypatch.setattr(jsae, "snapshot_download", download)
    assert torch.equal(jsae.load_run("someone/a-pair")[1].W_dec, jsae.load_run(run_copy)[1].W_dec)
    for file in (jsae.LAST_FILE, "sae_x/sae_weights.safetensors", "config.json"):
        (run_copy / file).unlink()
        with pytest.raises(InputError, match=f"^{run_copy} is no finished run: .*$"):
            jsae.load_run(run_copy)


TWO = """
import json, math, sys, torch, jsae
folder, settings = sys.argv[1] + "/", json.loads(sys.argv[2])
batches, inputs, clip = jsae.activation_batches, jsae.mlp_inputs, torch.nn.utils.clip_grad_norm_
def train(name, **more):
    return jsae.train(jsae.Config(**settings | {"output_dir": folder + name} | more))
def keep(parameters, limit):
    grads = {str(n): p.grad for n, p in enumerate(parameters)}
    jsae.safetensors.torch.save_file(grads, f"{folder}grads-{jsae.RANK}")
    return torch.ones(())
x = torch.load(folder + "x.pt").chunk(2)[jsae.RANK]
jsae.activation_batches, torch.nn.utils.clip_grad_norm_ = lambda *_: iter([x]), keep
train("one-step", tokens=2 * len(x))
jsae.activation_batches, torch.nn.utils.clip_grad_norm_ = batches, clip
train("whole")
factors = iter([1, 1, math.nan])
jsae.mlp_inputs = lambda *args: inputs(*args) * next(factors)
try:
    train("stopped")
except jsae.InputError as error:
    print(error)
jsae.mlp_inputs = inputs
train("stopped")
torch.distributed.destroy_process_group()
"""


def test_two_processes_have_the_gradients_of_one_and_train_stop_and_go_on(config, tmp_path):
    x = normal(128, 16).float()
    torch.save(x, tmp_path / "x.pt")
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = ONE_THREAD | {"PYTHONPATH": str(jsae.HERE), "WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    environment |= {"TORCHELASTIC_RUN_ID": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    command = [sys.executable, "-c", TWO, str(tmp_path), json.dumps(vars(config))]
    processes = []
    for rank in "01":
        own = environment | {"RANK": rank, "LOCAL_RANK": rank}
        with (
            open(tmp_path / f"stdout-{rank}", "w") as out,
            open(tmp_path / f"stderr-{rank}", "w") as err,
        ):
            processes.append(subprocess.Popen(command, env=own, stdout=out, stderr=err))
    try:
        statuses = [process.wait(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    errors = [(tmp_path / f"stderr-{rank}").read_text() for rank in "01"]
    assert statuses == [0, 0], errors
    mlp = loaded(config)[3]
    scales = jsae.scales_of(config, mlp, x)
    pair, _ = jsae.new_pair(config, 16, "cpu")
    saes = pair.sae_x, pair.sae_y
    expected = gradients(jsae_loss(*saes, mlp.scaled(*scales), x / scales[0], 1.0)[0], saes)
    for rank in "01":
        grads = safetensors.torch.load_file(tmp_path / f"grads-{rank}")
        for n, grad in enumerate(expected):
            assert_close(grads[str(n)], grad, rtol=1e-4, atol=1e-7)
        assert "NaN or Inf among the inputs x" in (tmp_path / f"stdout-{rank}").read_text()
    assert "going on after step 8;" in errors[0]
    assert "15/15" in errors[0] and "15/15" not in errors[1]  # one progress bar
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    assert rows_of(tmp_path / "whole")[-1]["step"] == 15
    with pytest.raises(InputError, match=r"processes 2 \(not 1\)"):
        jsae.train(changed(config, output_dir=str(tmp_path / "whole")))


# ---- 8. Command line -----------------------------------------------------------------------------


def test_copied_alone_it_runs_with_left_over_variables_and_no_greek(config, whole, tmp_path):
    shutil.copy(jsae.HERE / "jsae.py", tmp_path)
    command = [sys.executable, "jsae.py", *flags(changed(config, output_dir="λ and μ"))]
    left_over = ONE_THREAD | {"RANK": "1", "WORLD_SIZE": "4", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=tmp_path, env=left_over, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode("ascii").endswith("evaluate.py '? and ?'\n")
    assert_same_run(whole, tmp_path / "λ and μ")


@pytest.mark.parametrize("file", [subprocess.__file__, None], ids=["profiler", "standard input"])
def test_it_runs_under_a_profiler_and_from_standard_input(file, monkeypatch, capsys):
    """There the module __main__ is another file, or none."""
    main = types.ModuleType("__main__")
    if file:
        main.__file__ = file
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(sys, "argv", ["jsae.py", "--help"])
    for name, value in {"TORCHELASTIC_RUN_ID": "1", "RANK": "", "WORLD_SIZE": ""}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="^0$"):
        code = compile((jsae.HERE / "jsae.py").read_text(), "jsae", "exec")
        types.FunctionType(code, {"__name__": "__main__"})()
    out = capsys.readouterr().out
    assert all(f"{field.name}=" in out for field in dataclasses.fields(Config))
    assert "DEMO: {" in out


def test_help_shows_every_setting_once_and_errors_are_one_line(capsys):
    assert jsae.main(["--help"]) == 0
    out = capsys.readouterr().out
    for field in dataclasses.fields(Config):
        assert out.count(f"    {field.name}: {field.type.__name__} = ") == 1
    assert "300_000_000  # rounded down to whole batches" in out
    assert f"DEMO: {jsae.DEMO}" in out
    errors = {
        "--jacobian-penalty l1": "unrecognized arguments: --jacobian-penalty l1",
        "--tok 5": "unrecognized arguments: --tok 5",
        "--k": "argument --k: expected one argument",
        "--k many": "argument --k: invalid int value: 'many'",
    }
    for words, says in errors.items():
        assert jsae.main(words.split()) == 2
        assert capsys.readouterr() == ("", f"jsae.py: error: {says}\n")


def test_a_failed_allocation_is_one_line_and_no_other_error_is_hidden(config, monkeypatch, capsys):
    def new_pair(*args):
        raise error

    monkeypatch.setattr(jsae, "new_pair", new_pair)
    for kind in (RuntimeError, torch.OutOfMemoryError):
        error = kind("can't allocate memory: 1 byte\nTraceback")
        line = refusal(flags(config), capsys)
        assert line == "too little memory: can't allocate memory: 1 byte"
    error = RuntimeError("shapes differ")
    with pytest.raises(RuntimeError, match="shapes differ"):
        jsae.main(flags(config))


# ---- 9. Evaluation: the text ---------------------------------------------------------------------


def opened(run, **options):
    return evaluate.open_run(str(run), evaluate.Options(device="cpu", **options))


def edited(run, **settings):
    """The run's folder, some of its settings changed."""
    saved = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(saved | {"config": saved["config"] | settings}))
    return run


@pytest.mark.parametrize("more, n_read", [(0, 5), (60, 65)])
def test_contexts_are_drawn_by_the_seed_from_more_held_out_text(more, n_read, whole, monkeypatch):
    run = opened(whole)
    monkeypatch.setattr(evaluate, "MORE_TOKENS", more * 31)
    rows, numbers = zip(*jsae.token_contexts(run.config, run.tokenizer, "held out"))
    drawn = []
    for seed in (0, 0, 1):
        ids, documents = evaluate.held_out_text(run, 150, seed)
        drawn.append([rows.index(context) for context in ids.tolist()])
        assert len(set(drawn[-1])) == 5 and n_read / 2 < max(drawn[-1]) < n_read < len(rows)
        known = torch.tensor([numbers[place] for place in drawn[-1]])
        assert torch.equal(known.unique()[documents], known)  # they are counted from 0
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("names, n", [(["one.txt"], 1), (["a.txt", "b.txt"], 2), (["a.jsonl"], 5)])
def test_a_named_text_is_used_whole_of_files_or_rows(names, n, whole, tmp_path, capsys):
    texts = [" ".join(map(str, range(start, start + 1000))) for start in range(5)]
    for name in names:
        (tmp_path / name).write_text(" ".join(texts))  # more than one piece of 2^14 characters
        if name.endswith(".jsonl"):
            write_rows(tmp_path / name, texts)
    ids, documents = evaluate.held_out_text(opened(whole, dataset=str(tmp_path)), 10**6, 0)
    n_tokens = len(names) * sum(len(TOKENIZER(text).input_ids) for text in texts)
    assert len(ids) * 31 == pytest.approx(n_tokens, rel=0.01)
    assert documents.unique().tolist() == list(range(n))
    assert f"(all) has only {len(ids) * 31:,} tokens" in capsys.readouterr().err


def test_the_text_is_what_the_run_held_out_or_the_one_that_is_named(whole, settings, tmp_path):
    named = {"dataset": "allenai/c4:en", "split": "validation", "column": "body"}
    own = {"dataset": settings["dataset"], "split": "train", "column": "text"}
    cases = ({}, own, "held out"), (named, named, "all")
    with pytest.raises(InputError, match="--split and --column are those of --dataset"):
        opened(whole, split="test")
    for options, expected, part in cases:
        run = opened(whole, **options)
        assert vars(run.config).items() >= expected.items() and run.part == part
    (tmp_path / "short.txt").write_text("a few words")
    with pytest.raises(InputError, match="does not fill one context; name another text"):
        evaluate.held_out_text(opened(whole, dataset=str(tmp_path / "short.txt")), 10, 0)


def test_only_the_bundled_model_is_found_anew(run_copy, settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(jsae.DEMO, "model", settings["model"])
    edited(run_copy, model="/old/clone/assets/tiny-pythia")
    assert opened(run_copy).config.model == settings["model"]
    edited(run_copy, model="/old/clone/assets/model")
    shutil.copytree(settings["model"], tmp_path / "model")
    with pytest.raises(InputError, match="--model /old/clone/assets/model"):
        opened(run_copy)
    edited(run_copy, dataset="/gone/docs.jsonl")
    shutil.copy(settings["dataset"], tmp_path / "docs.jsonl")
    with pytest.raises(InputError, match="--dataset /gone/docs.jsonl"):
        evaluate.held_out_text(opened(run_copy, model="model"), 10, 0)
    model = transformers.AutoModelForCausalLM.from_pretrained("model")
    model.gpt_neox.layers[0].mlp.dense_4h_to_h.weight.data[0, 0] += 1e-3
    model.save_pretrained("model")
    with pytest.raises(InputError, match="is not the one that it was trained on"):
        opened(run_copy, model="model")


def test_a_mean_and_its_error_worked_by_hand():
    sums = evaluate.Sums(3)
    sums.add(torch.tensor([0, 2, 0]), {"a": torch.tensor([1.0, 3.0, 1.0])})
    sums.add(torch.tensor([2, 1, 1]), {"a": torch.tensor([5.0, math.nan, 4.0])})
    mean = evaluate.ratio(sums.sums["a"], sums.counts["a"])
    assert mean.value == pytest.approx(14 / 5)  # sums 2, 4, 8 of 2, 1, 2 tokens
    assert mean.influence.tolist() == pytest.approx([2.8 - 12 / 3, 2.8 - 10 / 4, 2.8 - 6 / 3])
    assert evaluate.error_of(mean.influence) == pytest.approx(13**0.5 / 3)
    assert math.isnan(evaluate.error_of([1.0]))  # one document has no error


def test_errors_are_what_numbers_and_their_differences_vary_by_when_documents_are_redrawn():
    g = torch.Generator().manual_seed(0)
    numbers, differences = [], []
    for _ in range(500):
        n = torch.randint(1, 50, (80,), generator=g).double()  # tokens of a document,
        level, change = torch.randn(2, 80, generator=g).double()  # which are alike
        one = evaluate.ratio(n * (2 + level), n)
        other = evaluate.ratio(n * (2.5 + level + 0.1 * change), n)
        numbers.append((one.value, evaluate.error_of(one.influence)))
        paired = evaluate.error_of(other.influence - one.influence)
        differences.append((other.value - one.value, paired))
    for truth, found in ((2, numbers), (0.5, differences)):
        values, errors = np.array(found).T
        assert errors.mean() == pytest.approx(values.std(), rel=0.1)
        assert 0.92 < (np.abs(values - truth) < 1.96 * errors).mean() < 0.98


@pytest.mark.parametrize(
    "worth, has_score", [([1.85, 0.15, 1], True), ([1.88, 0.12, 1], False), ([2.0], True)]
)
def test_a_model_that_loses_nothing_without_its_mlp_has_no_ce_score(worth, has_score, capsys):
    """Nothing: less than two errors, here (worth[0] - 1) / sqrt(3); one document has none."""
    worth = torch.tensor(worth, dtype=DOUBLE)
    values = {f"{name}.{side}": worth for name in ("mse", "variance") for side in ("x", "y")}
    values |= {f"ce_lost.{name}": worth for name in ("x_zero", "y_zero")}
    values |= {f"ce_lost.{name}": worth / 4 for name in ("x", "y", "path")}
    sums = evaluate.Sums(len(worth))
    sums.add(torch.arange(len(worth)), values)
    numbers = sums.numbers()
    says = capsys.readouterr().err
    for site in ("x", "y", "path"):
        assert (f"no CE score of {site}: the language model hardly loses" in says) != has_score
        assert (f"ce_score.{site}" in numbers) == has_score
        assert not has_score or numbers[f"ce_score.{site}"].value == pytest.approx(3 / 4)


# ---- Evaluation: the oracle ----------------------------------------------------------------------


@pytest.fixture
def random_run(monkeypatch):
    """A random pair and language model that evaluate.py takes for a run; ids, documents."""
    torch.set_default_dtype(DOUBLE)  # of evaluate.py's sums
    sizes = {"hidden_size": 10, "intermediate_size": 14, "num_hidden_layers": 2}
    config = transformers.GPTNeoXConfig(vocab_size=50, num_attention_heads=1, **sizes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    for p in model.parameters():  # so that biases are not 0 and the MLP matters
        p.data += 0.5 * torch.randn_like(p)
    pair = random_pair(-0.9, ((30, 4), (30, 4)))
    pair[1].b_enc.data -= 2  # so that ReLU cuts latents off on both sides
    for module in (model, *pair):
        module.requires_grad_(False)
    text = types.SimpleNamespace(dataset="docs", split="train", column="text")
    run = evaluate.Run(*pair, find_mlp(model, 0), model, TOKENIZER, text, "all")
    ids = torch.randint(50, (8, 9), generator=torch.Generator().manual_seed(0))
    documents = (torch.arange(72) // 13).view_as(ids)  # 6 of them, across contexts
    monkeypatch.setattr(evaluate, "open_run", lambda *_: run)
    monkeypatch.setattr(evaluate, "held_out_text", lambda *_: (ids, documents))
    yield run, ids, documents
    torch.set_default_dtype(torch.float32)


def dense(sae, v):
    """Eq. 1 with every latent in its place: v (..., d_model) -> (..., 30)."""
    values, idx = (v @ sae.W_enc.T + sae.b_enc).topk(sae.k)
    return torch.zeros(*v.shape[:-1], 30, dtype=DOUBLE).scatter(-1, idx, F.relu(values))


def dense_tensors(run, ids, random_J):
    """x, y, latents S_x, S_y (B, 30), Jacobians J and R (B, 30, 30), R the random one."""
    x = jsae.mlp_inputs(run.model, run.mlp, ids)[:, 1:].flatten(0, 1)
    y = run.mlp(x)
    S_x, S_y = dense(run.sae_x, x), dense(run.sae_y, y)

    def f_s(s, is_on, rest):
        return dense(run.sae_y, run.mlp((s * is_on) @ run.sae_x.W_dec + rest))

    J = torch.func.vmap(torch.func.jacrev(f_s))(S_x, S_x > 0, x - S_x @ run.sae_x.W_dec)
    b = torch.arange(len(x)).view(-1, 1, 1)
    R = torch.zeros_like(J)
    R[b, run.sae_y.encode(y).idx.unsqueeze(2), run.sae_x.encode(x).idx.unsqueeze(1)] = random_J
    return types.SimpleNamespace(x=x, y=y, S_x=S_x, S_y=S_y, J=J, R=R * (J != 0))


def cross_entropies_by_forward(run, ids):
    """{name: (contexts, T - 2)}: the MLP's forward is changed, its output is not hooked."""
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
    found = {}
    for name, change in changes.items():  # the first token is left alone
        module.forward = lambda x, change=change: torch.cat([f(x[:, :1]), change(x[:, 1:])], 1)
        log_p = run.model(ids).logits.log_softmax(2)[:, 1:-1]  # of the third token and later ones
        found[name] = -log_p.gather(2, ids[:, 2:].unsqueeze(2)).squeeze(2)
    module.forward = f
    return found


def numbers_by_definition(run, ids, documents, t):
    """Of dense tensors t -> {name: (a, b, documents)}, a number is sum a / sum b; {name: number}."""
    ratios, single = {}, {}
    of = documents[:, 1:].flatten()

    def add(of, values, b=None):
        for name, a in values.items():
            ratios[name] = a.double(), torch.ones_like(a).double() if b is None else b, of

    for side, sae, v, S in (("x", run.sae_x, t.x, t.S_x), ("y", run.sae_y, t.y, t.S_y)):
        v_hat = S @ sae.W_dec + sae.b_dec
        error = (v_hat - v).square().sum(1)
        variance = (v - v.mean(0)).square().sum(1)
        cosine = (v * v_hat).sum(1) / v.norm(dim=1) / v_hat.norm(dim=1)
        add(of, {f"mse.{side}": error / 10, f"variance.{side}": variance / 10})
        add(of, {f"cosine.{side}": cosine, f"active.{side}": (S > 0).sum(1)})
        add(of, {f"explained_variance.{side}": variance - error}, variance)
        single[f"silent.{side}"] = (S == 0).all(0).sum()
        median = (1 - error / variance).sort().values[31]  # of 64
        single[f"explained_variance_median.{side}"] = median
        single[f"variance_of_top_1_percent.{side}"] = variance.max() / variance.sum()

    A = t.J.abs().flatten(1)
    add(of, {"mean_abs": A.sum(1) / 16, "l1": A.sum(1), "linf": A.amax(1), "not_zero": A.any(1)})
    add(of, {f"l{p}": (A**p).sum(1) ** (1 / p) for p in (2, 4)})
    add(of, {f"above.{limit}": (A > limit).sum(1) for limit in evaluate.THRESHOLDS})
    is_on = A.any(1)
    assert 0 < is_on.sum() < 64  # of the others, what follows is not defined
    A = A[is_on]
    held = A.sort(1, descending=True).values.cumsum(1) / A.sum(1, keepdim=True)
    hold_90 = [next(n for n, share in enumerate(row, 1) if share >= 0.9) for row in held]
    hoyer = (4 - A.sum(1) / A.norm(dim=1)) / (4 - 1)
    add(of[is_on], {"hold_90": torch.tensor(hold_90), "hoyer": hoyer})
    add(of[is_on], {f"held_by.{n}": held[:, n - 1] for n in (1, 2, 4, 8, 16)})

    n_tokens = (t.S_y > 0).sum(0)
    mean = t.J.abs().sum(0) / n_tokens.clamp(min=1).unsqueeze(1)
    single |= {f"global.{t}": (mean > t).double().mean() for t in evaluate.THRESHOLDS}
    for ending, J in (("", t.J), ("_random", t.R)):
        c = J * t.S_x.unsqueeze(1)
        p = [F.normalize(own[own.any(1)].square(), p=1) for own in c[is_on]]  # of rows with inputs
        effective = torch.stack([(1 / own.square().sum(1)).mean() for own in p])
        hub = torch.stack([own.mean(0).max() for own in p])
        add(of[is_on], {f"effective_inputs{ending}": effective, f"hub{ending}": hub})
        C = c.abs().sum(0)[n_tokens >= evaluate.LEAST_TOKENS]
        assert 3 < len(C) < (n_tokens > 0).sum()
        weight = C.sum(1) / C.sum()
        P = (C / C.sum(1, keepdim=True)).sort(1, descending=True).values
        inputs = 1 / P.square().sum(1)
        single[f"text_inputs{ending}"] = inputs @ weight
        single[f"text_inputs_median{ending}"] = inputs.sort().values[(len(C) - 1) // 2]
        single |= {f"input_share{ending}.{n + 1}": P[:, n] @ weight for n in range(10)}

    of = documents[:, 2:].flatten()
    ce = cross_entropies_by_forward(run, ids)
    ce = {name: value.flatten() for name, value in ce.items()}
    add(of, {f"ce.{name}": value for name, value in ce.items()})
    add(of, {f"ce_lost.{name}": value - ce["clean"] for name, value in ce.items()})
    for site, zero in (("x", "x_zero"), ("y", "y_zero"), ("path", "y_zero")):
        add(of, {f"ce_score.{site}": ce[zero] - ce[site]}, ce[zero] - ce["clean"])
    return ratios, single


@pytest.mark.parametrize("at_a_time, of_J, kept, least", [(2048, 256, 2**18, 6), (1, 3, 48, 5)])
def test_oracle_every_number_is_what_its_definition_says(
    at_a_time, of_J, kept, least, random_run, monkeypatch
):
    run, ids, documents = random_run
    monkeypatch.setattr(evaluate, "TOKENS_AT_A_TIME", at_a_time)
    monkeypatch.setattr(evaluate, "TOKENS_OF_J", of_J)
    monkeypatch.setattr(evaluate, "EXAMPLE_TOKENS", kept)
    monkeypatch.setattr(evaluate, "LEAST_DOCUMENTS", least)
    monkeypatch.setattr(evaluate, "LEAST_TOKENS", 8)
    drawn = []

    def randn(*shape, real=torch.randn, **options):
        drawn.append(real(*shape, **options))
        return drawn[-1].clone()

    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", randn)
        result = evaluate.evaluate("run", evaluate.Options(functions=300))
    t = dense_tensors(run, ids, torch.cat(drawn))
    ratios, single = numbers_by_definition(run, ids, documents, t)
    numbers = result["numbers"]
    assert {*ratios, *single, *evaluate.linearity([])} == set(numbers) >= set(evaluate.ROWS)
    for name, (a, b, of) in ratios.items():
        value = (a.sum() / b.sum()).item()
        assert numbers[name] == pytest.approx(value, rel=1e-5, abs=1e-9), name
        left = np.array([(a[of != d].sum() / b[of != d].sum()).item() for d in range(6)])
        assert result["influence"][name] == pytest.approx(value - left, rel=1e-3, abs=1e-6), name
        error = (5 / 6 * np.square(left - left.mean()).sum()) ** 0.5
        assert result["errors"][name] == pytest.approx(error, rel=1e-4, abs=1e-7), name
    for name, value in single.items():
        assert numbers[name] == pytest.approx(value.item(), rel=1e-5, abs=1e-9), name
        assert name not in result["errors"]
    assert (result["text"]["tokens"], result["text"]["documents"]) == (64, 6)

    J = t.J[t.J != 0]  # functions are of elements that are not cut off, in all documents
    assert max((J - own).abs().min() for own, _ in result["scatter"]) < 1e-9
    assert all(result["influence"]["on_line"])
    check_latents(result["latents"], run, ids, documents, t, min(kept, 64))


def check_latents(latents, run, ids, documents, t, n_kept):
    """Which are shown, their inputs, and what is counted in the first n_kept tokens."""
    C = (t.J * t.S_x.unsqueeze(1)).abs().sum(0)
    n_tokens = (t.S_y > 0).sum(0)
    of = documents[:, 1:].flatten()
    n_documents = torch.tensor([len(of[s > 0].unique()) for s in t.S_y.T])
    is_common = (n_tokens >= 8) & (n_documents >= evaluate.LEAST_DOCUMENTS)
    order = (C.amax(1) / n_tokens).where(is_common, -1).argsort(descending=True)
    assert (is_common.sum() < 6) == (evaluate.LEAST_DOCUMENTS == 6)
    shown = order[: is_common.sum()][:8].tolist()
    assert [latent["latent"] for latent in latents] == shown
    words = ids[:, 1:].flatten()[:n_kept]
    for i, latent in zip(shown, latents):
        order = C[i].argsort(descending=True)[: (C[i] > 0).sum()][:8].tolist()
        assert [edge["latent"] for edge in latent["inputs"]] == order
        for j, edge in zip(order, latent["inputs"]):
            both = (t.S_y[:, i] > 0) & (t.S_x[:, j] > 0)
            expected = (C[i, j] / C[i].sum()).item(), t.J[both, i, j].mean().item()
            assert (edge["share"], edge["mean_J"]) == pytest.approx(expected)
            counts = both[:n_kept].sum(), len(words[both[:n_kept]].unique())
            assert (edge["tokens"], edge["different_tokens"]) == counts
            first = edge["examples"][0]
            assert first["acts"][first["at"]] == pytest.approx(t.S_x[:n_kept, j].max().item())
    i, j = shown[0], latents[0]["inputs"][0]["latent"]  # of these, j is set to 0
    b = ((t.S_y[:, i] > 0) & (t.S_x[:, j] > 0))[:n_kept].nonzero()[:, 0]
    before, s = t.S_y[b, i], t.S_x[b, j]
    moved = t.x[b] - s.unsqueeze(1) * run.sae_x.W_dec[j]
    after = dense(run.sae_y, run.mlp(moved))[:, i]
    medians = [np.median(v) for v in (before, after - before, -t.J[b, i, j] * s)]
    expected = [*medians, len(b), (after == 0).double().mean().item()]
    names = ("s_y", "change", "predicted", "tokens", "gone")
    assert [latents[0]["set_to_zero"][name] for name in names] == pytest.approx(expected)


def test_no_scale_changes_sparsity_and_no_rescaling_of_a_latent_effective_inputs():
    J, acts = normal(50, 5, 5), normal(50, 5, seed=1).abs()
    before = evaluate.sparsity(J) | evaluate.effective_inputs("", J, acts)
    of_x, of_y = normal(5, seed=2).abs(), normal(5, seed=3).abs()
    rescaled = J * of_y.unsqueeze(1) / of_x  # s_x,j grows, its decoder row shrinks
    after = evaluate.sparsity(J / 99) | evaluate.effective_inputs("", rescaled, acts * of_x)
    for name, values in before.items():
        assert_close(after[name].double(), values.double())
    assert 1 < before["effective_inputs"].mean() < 5


T = np.linspace(0, 5, 100)


@pytest.mark.parametrize(
    "kind, v",
    [
        ("linear", 3 - 2 * T),
        ("linear", 0 * T),
        ("jumprelu", (T > 2) * (1 + 2 * T)),
        ("jumprelu", (T < 2) * (1 + 2 * T)),
        ("other", T**2),
        ("other", (T > 2) * T**2),
        ("other", (T < 2) * (1 + T) + (T > 3) * (1 + T)),
        ("other", (abs(T - 2) < 1) * (1 + T)),
        ("other", 1.0 * (T == 5)),
    ],
)
def test_kinds_of_functions(kind, v):
    assert evaluate.kind_of(T, v, relative=False) == kind
    assert evaluate.kind_of(T, 1e-6 * v, relative=True) == kind
    assert evaluate.kind_of(T, 1e-6 * v, relative=False) == "linear"  # as it is small


def test_functions_are_those_of_the_true_x_and_pass_its_value_with_slope_J(random_run):
    run, ids, documents = random_run
    run.sae_x.W_enc.data *= 1.5
    (tokens,) = evaluate.batches(run, ids, documents)
    functions = evaluate.random_functions(run, tokens, 120, torch.Generator().manual_seed(0))
    assert len({f.s_x > 4 for f in functions}) == 2  # the end is 5, or beyond s_x
    for f in functions:
        found = (tokens.J == f.J).nonzero()  # more than one, if a token is there twice
        b, i, j = found[0].tolist()
        place = tokens.s_y.idx[b, i].item(), tokens.s_x.idx[b, j].item()
        values = tokens.s_x.acts[b, j].item(), tokens.s_y.acts[b, i].item()
        assert f.document in documents[:, 1:].flatten()[found[:, 0]]
        assert (f.s_x, f.s_y) == pytest.approx(values)
        np.testing.assert_allclose(f.t, np.linspace(0, max(5, f.s_x + 1), 100))
        change = torch.tensor([*(f.t - f.s_x), -1, 1e-7]).unsqueeze(1)
        moved = tokens.x[b] + change * run.sae_x.W_dec[place[1]]
        *v, less, more = dense(run.sae_y, run.mlp(moved))[:, place[0]].tolist()
        assert f.v.tolist() == pytest.approx(v) and f.delta == pytest.approx(less - f.s_y)
        assert (more - f.s_y) / 1e-7 == pytest.approx(f.J, rel=1e-3, abs=1e-5)


def test_linearity_and_the_curves_that_are_drawn_worked_by_hand():
    deltas = {0.5: -0.5, 0.05: -3.0, -2.0: 1.0, 0.3: -0.35}  # J: delta
    kinds = T, (T > 2) * T, T**2, 3 * T
    functions = [
        evaluate.Function(0, J, n, 10 * n, deltas[J], T, v)
        for n, (J, v) in enumerate(zip(deltas, kinds))
    ]
    found = {name: own.double().mean() for name, own in evaluate.linearity(functions).items()}
    assert (found["linear"], found["jumprelu"], found["other_relative"]) == (1 / 2, 1 / 4, 1 / 4)
    assert (found["on_line"], found["on_line_relative"]) == (1 / 2, 1 / 4)
    for n, power in enumerate((1.5, 3, 1.2, 2.5, 1.1, 4, 1.3, 2)):  # of larger range if straighter
        v = (10 - power) * (T / 5) ** power
        functions.append(evaluate.Function(0, 1.0, power, n, 0.0, T, v))
    curves = evaluate.curves_of(functions)
    assert [curve["at"] for curve in curves["linear"]] == [(0, 0), (3, 30)]
    assert [curve["at"][0] for curve in curves["other"]] == [4, 3, 2.5, 2, 2, 1.5]
    assert curves["other"][0]["v"] == functions[9].v.tolist()


def test_connections_of_many_latents_are_of_a_sample_and_of_those_asked_for_beside_it():
    asked = list(range(16))
    connections = evaluate.Connections(8192, asked, 1, 0, "cpu")
    ones = torch.ones(16, 1)
    s_x = Latents(ones, torch.full((16, 1), 20))
    s_y = Latents(ones, torch.tensor(asked).unsqueeze(1))
    documents = torch.zeros(16, dtype=torch.long)
    J = ones.unsqueeze(2)
    tokens = types.SimpleNamespace(documents=documents, s_x=s_x, s_y=s_y, J=J)
    connections.add(tokens, J)
    sample = connections.latents[: connections.n_drawn]
    beside = set(asked) - set(sample)
    assert len(set(sample)) == 2048 and max(sample) > 8000 and len(beside) > 8
    assert sorted(connections.latents) == sorted([*sample, *beside])
    of_sample = (16 - len(beside)) / (2048 * 8192)
    assert connections.numbers()["global.0.01"] == of_sample
    (edge,) = connections.strongest_inputs(min(beside))
    assert edge == {"latent": 20, "share": 1, "mean_J": 1}


def test_examples_are_the_largest_value_and_those_at_equal_steps_of_the_sum():
    acts = torch.zeros(3, 40)
    places = [(n % 3, n * 2 + 1) for n in range(16)]
    for value, place in enumerate(places, 1):
        acts[place] = value  # sum 136, steps of 17
    s = Latents(acts.view(120, 1), torch.full((120, 1), 7))
    ids = torch.arange(3 * 41).view(3, 41)
    tokenizer = types.SimpleNamespace(decode=lambda ids: "".join(f" {n}" for n in ids))
    examples = evaluate.examples_of(7, ids, s, tokenizer)
    values = [16, 15, 14, 13, 12, 10, 8, 6]
    assert [example["acts"][example["at"]] for example in examples] == values
    for value, example in zip(values, examples):
        row, at = places[value - 1]
        shown = slice(max(0, at - 10), max(0, at - 10) + 16)
        assert example["tokens"] == [f" {n}" for n in ids[row, 1:][shown].tolist()]
        assert example["acts"] == acts[row, shown].tolist()


def test_words_are_readable_in_any_script():
    text = "naïve 🙂🙂 日本 it"
    ids = torch.tensor(TOKENIZER(text).input_ids)
    words = evaluate.words_of(ids, TOKENIZER)
    assert "".join(words) == text and len(words) == len(ids) > 12


# ---- Evaluation: the program ---------------------------------------------------------------------


def program(*arguments):
    small = ("--tokens", "400", "--functions", "60", "--device", "cpu")
    return evaluate.main([*small, *map(str, arguments)])


@pytest.fixture
def no_figures(monkeypatch):
    """As if matplotlib were not installed, which also saves time."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)


@pytest.fixture(scope="session")
def evaluated(whole, tmp_path_factory):
    """The text of evaluation.json of the whole run."""
    folder = tmp_path_factory.mktemp("evaluated")
    options = evaluate.Options(tokens=400, functions=60, device="cpu")
    settings = evaluate.settings_of_all([str(whole)])
    evaluate.result_of(str(whole), settings[str(whole)], options, folder)
    return (folder / "evaluation.json").read_text()


def variants(evaluated, coefs, factors):
    """Groups of one run each, with other lambdas and all numbers multiplied, in any order."""
    results = []
    for coef, factor in zip(coefs, factors):
        result = json.loads(evaluated) | {"run": str(coef)}
        result["settings"]["jacobian_coef"] = coef
        result["numbers"] = {key: factor * value for key, value in result["numbers"].items()}
        result["influence"] = {key: factor * np.array(c) for key, c in result["influence"].items()}
        results.append(result)
    return evaluate.grouped(results)


def test_two_runs_get_a_table_figures_and_a_report(run_copy, whole, tmp_path, capsys):
    old = edited(Path(shutil.copytree(whole, tmp_path / "old")), jacobian_coef=0.0)
    path = old / "sae_x" / "sae_weights.safetensors"
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file(tensors | {"W_enc": 0.9 * tensors["W_enc"]}, path)
    assert program(run_copy, old) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(" +traditional SAEs +JSAE, lambda 1", lines[0])
    results = [json.loads((run / "evaluation.json").read_text()) for run in (old, run_copy)]
    one, other = [result["numbers"]["mean_abs"] for result in results]
    c, c_other = [np.array(result["influence"]["mean_abs"]) for result in results]
    error, paired = [math.sqrt(len(c) - 1) * np.std(own) for own in (c, c_other - c)]
    cells = f"{one:.4g} +- {error:.2g}", f"{other:.4g}  {other - one:+.3g} +- {paired:.2g}"
    assert re.split("  +", lines[5]) == ["mean |J|", *"  ".join(cells).split("  ")]
    assert paired > 0 and lines[14].startswith("403 tokens of 11 documents; +-: standard error")
    figures = {path.name for path in (run_copy / "figures").iterdir()}
    assert figures == {f"{name}.png" for name in ("first_look", "edges", "functions", "trade_off")}
    page = (run_copy / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)', page)
    assert len(sources) == 4 and all(source.startswith("data:image/png") for source in sources)
    order = ["layer 0; k 4, R 4; trained on 2,000 tokens", "<table>", "what the numbers are"]
    order += ["An output latent of JSAE, lambda 1", "Its first input latent set to 0 at"]
    places = [page.index(words) for words in order]
    assert places == sorted(places) and "<td>Hoyer sparsity of J" in page  # which is not printed
    assert page.count("<details") == page.count("</details>") > 6 and "<script" not in page


def result(value, influence=(-1, 1, 0), text=None, seed=0, **settings):
    """What is known of a run with one number."""
    own = {"jacobian_coef": 1.0, "penalty": "l1", "seed": seed, "k": 4, "output_dir": str(value)}
    of_text = {"dataset": "docs", "tokens": 9, "documents": 3, "seed": 0, "sha256": "a"}
    found = {"run": f"run {value}", "settings": own | settings, "text": of_text | (text or {})}
    found |= {"numbers": {"hoyer": value}, "errors": {"hoyer": evaluate.error_of(influence)}}
    return found | {"influence": {"hoyer": influence}}


def cells_of(*results):
    groups = evaluate.grouped(results)
    return {row[0]: row[1:] for row in evaluate.table_of(groups)}["Hoyer sparsity of J"]


def test_differences_are_paired_by_document_or_by_seed():
    old = result(2.8, (-1.2, 0.3, 0.8), jacobian_coef=0.0)
    new = result(3.0, (-1.0, 0.4, 0.9))  # the differences are 0.2, 0.1, 0.1
    assert cells_of(old) == ["2.8 +- 1.2"]
    assert cells_of(new, old) == ["2.8 +- 1.2", "3  +0.2 +- 0.067"]
    olds = [result(value, seed=seed, jacobian_coef=0.0) for seed, value in enumerate((2, 2.2, 2.7))]
    news = [result(value, seed=seed) for seed, value in enumerate((3, 3.4))]
    assert cells_of(*news, *olds) == ["2.3 +- 0.36", "3.2  +1.1 +- 0.14"]


@pytest.mark.parametrize(
    "change, label",
    [
        ({"k": 5}, ", k 5"),
        ({"text": {"tokens": 500, "sha256": "b"}}, ", on 500 tokens, seed 0, of docs"),
        ({"text": {"seed": 7, "sha256": "b"}}, ", on 9 tokens, seed 7, of docs"),
        ({"text": {"sha256": "b"}}, ", on 9 tokens, seed 0, of docs, run 2.0"),
    ],
)
def test_runs_of_other_settings_or_tokens_are_not_merged_nor_paired(change, label):
    assert len(evaluate.grouped([result(1.0), result(2.0, seed=1)])) == 1
    groups = evaluate.grouped([result(1.0), result(2.0, seed=1, **change)])
    assert list(groups)[1] == f"JSAE, lambda 1{label}"
    first, other = groups.values()
    assert math.isnan(evaluate.difference(other, first, "hoyer")[1]) == ("text" in change)


def test_figures_draw_the_numbers_and_their_errors(evaluated):
    groups = variants(evaluated, (2.0, 0.0, 1.0), (2, 1, 3))
    runs = [group[0] for group in groups.values()]
    assert [run["settings"]["jacobian_coef"] for run in runs] == [0, 1, 2]
    above, held, share = evaluate.draw_first_look(groups).axes
    shown = {"above.": above.lines, "held_by.": held.lines[:3], "input_share.": share.lines[:6:2]}
    shown["input_share_random."] = share.lines[1:6:2]
    for name, lines in shown.items():
        for line, run in zip(lines, runs, strict=True):
            expected = [run["numbers"][f"{name}{x:g}"] for x in line.get_xdata()]
            assert line.get_ydata() == pytest.approx(expected) and len(expected) > 4

    ax = evaluate.draw_trade_off(groups).axes[0]
    names = "mean_abs", "ce_lost.path"
    points = [[run["numbers"][name] - runs[0]["numbers"][name] for name in names] for run in runs]
    assert any(np.allclose(line.get_xydata(), points) for line in ax.lines)  # joined
    for container, run, point in zip(ax.containers, runs[1:], points[1:], strict=True):
        assert np.allclose(container[0].get_xydata(), [point])
        bars = [np.ptp(bar.get_segments()[0], axis=0).max() / 2 for bar in container[2]]
        paired = [np.subtract(run["influence"][name], runs[0]["influence"][name]) for name in names]
        assert bars == pytest.approx([math.sqrt(len(c) - 1) * np.std(c) for c in paired])

    for ax, run in zip(evaluate.draw_edges(groups).axes, (runs[0], runs[-1]), strict=True):
        inputs = run["latents"][0]["inputs"]
        shares = [edge["share"] for edge in inputs]
        widths = [line.get_linewidth() / 30 for line in ax.lines]
        assert widths == pytest.approx([*shares, 1 - sum(shares)])
        for text, edge in zip(ax.texts[1:], inputs):
            example = edge["examples"][len(edge["examples"]) // 2]
            word = example["tokens"][example["at"]]
            assert re.fullmatch(rf".*\[{re.escape(word)}\].*  {edge['share']:.0%}", text.get_text())

    axes = evaluate.draw_functions(groups).axes
    assert axes[0].collections[0].get_offsets().tolist() == runs[0]["scatter"]
    assert axes[0].lines[0].get_slope() == -1
    for ax, kind in zip(axes[1:4], evaluate.KINDS):
        curves = runs[0]["curves"][kind]
        dots = [line.get_xydata()[0].tolist() for line in ax.lines[1::2]]
        assert dots == [curve["at"] for curve in curves]
        assert [line.get_ydata().tolist() for line in ax.lines[::2]] == [c["v"] for c in curves]


@pytest.mark.filterwarnings("ignore:Glyph")
def test_any_text_is_drawn_and_escaped_whatever_a_users_matplotlibrc_says(evaluated):
    matplotlib = pytest.importorskip("matplotlib")
    odd = r"<b>$\frac{$ 日本"
    text = evaluated.replace('"tokens": ["', f'"tokens": [{json.dumps(odd)}, "')
    groups = {odd: variants(text, (1.0,), (1,)).popitem()[1]}
    expected = evaluate.draw(groups)
    with matplotlib.rc_context({"text.usetex": True, "font.size": 20}):
        assert evaluate.draw(groups) == expected
        assert matplotlib.rcParams["text.usetex"]
    page = evaluate.report(groups, evaluate.table_of(groups), {})
    assert "<b>" not in page and page.count("&lt;b&gt;$\\frac{$ 日本") > 50


@pytest.fixture
def is_measured_anew(run_copy, evaluated, no_figures, monkeypatch, capsys):
    """Whether the program evaluates, with these flags, a run that was evaluated before."""
    (run_copy / "evaluation.json").write_text(evaluated)

    def measured_anew(*_):
        raise InputError("measured anew")

    def is_measured_anew(*arguments):
        status = program(run_copy, *arguments)
        return status == 2 and "measured anew" in one_line_of(capsys)

    monkeypatch.setattr(evaluate, "evaluate", measured_anew)
    return is_measured_anew


def test_reuse_takes_only_what_holds_what_is_asked_for(run_copy, is_measured_anew, capsys):
    assert program(run_copy, "--reuse") == 0
    out, err = capsys.readouterr()
    assert "effective inputs" in out and "pip install matplotlib" in err
    assert (run_copy / "report.html").exists() and not (run_copy / "figures").exists()
    assert is_measured_anew()
    for change in ("--tokens 300", "--seed 1", "--latents 5", "--dataset stdlib"):
        assert is_measured_anew("--reuse", *change.split())
    weights = run_copy / jsae.LAST_FILE
    weights.write_bytes(weights.read_bytes()[:-1] + b"0")
    assert is_measured_anew("--reuse")


@pytest.mark.parametrize("broken", ['{"asked": {', "[]"])
def test_reuse_of_a_broken_evaluation_measures_anew(broken, run_copy, is_measured_anew):
    (run_copy / "evaluation.json").write_text(broken)
    assert is_measured_anew("--reuse")


@pytest.mark.parametrize("name", ["someone/run", ".."])
def test_everything_goes_to_output_dir(name, run_copy, no_figures, tmp_path, monkeypatch):
    monkeypatch.chdir(run_copy / "sae_x")  # ".." is the run
    monkeypatch.setattr(jsae, "snapshot_download", lambda *_, **__: str(run_copy))
    before = {path: path.is_dir() or path.read_bytes() for path in tmp_path.rglob("*")}
    assert program(name, "--output-dir", tmp_path / "new" / "out") == 0
    after = {path: path.is_dir() or path.read_bytes() for path in tmp_path.rglob("*")}
    written = [path for path in after if path not in before and path.is_file()]
    assert before == {path: after[path] for path in before}
    assert sorted(path.name for path in written) == ["evaluation.json", "report.html"]
    assert all(tmp_path / "new" / "out" in path.parents for path in written)
    assert (tmp_path / "new" / "out" / "report.html").exists()


@pytest.mark.parametrize(
    "arguments, says",
    [
        ("A A", "have the same settings and seed; name one"),
        ("A A/", "have the same settings"),
        ("A copy", "A and copy have the same settings"),
        ("someone/run", "is no folder of this machine: name an --output-dir"),
        ("A --output-dir A/config.json/out", "config.json"),
        ("unfinished", "unfinished is no finished run"),
        ("A --tokens 0", "--tokens is 0; expected a whole number from 1"),
        ("A --tokens many", "invalid int value: 'many'"),
        ("A --no-such-flag", "--no-such-flag"),
        ("", "the following arguments are required: runs"),
        ("A --latents 64", "--latents is '64'; expected some of 0 to 63, as 17,5"),
        ("A --latents five", "--latents is 'five'; expected"),
        ("A --device cuda:99", "cuda:99"),
        ("A --dataset /gone/text.jsonl", "--dataset /gone/text.jsonl"),
    ],
)
def test_errors_get_a_line_before_the_work(arguments, says, whole, tmp_path, monkeypatch, capsys):
    for name in ("A", "copy", "unfinished"):
        shutil.copytree(whole, tmp_path / name)
    (tmp_path / "unfinished" / jsae.LAST_FILE).unlink()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jsae, "snapshot_download", lambda *_, **__: str(whole))
    monkeypatch.setattr(evaluate, "mean_activations", None)  # the first work; it cannot be called
    assert program(*arguments.split()) == 2
    assert says in one_line_of(capsys)


def test_a_full_disk_leaves_the_table(run_copy, no_figures, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    def evaluate_and_fill(*arguments, real=evaluate.evaluate):
        result = real(*arguments)
        monkeypatch.setattr(os, "fsync", full)
        return result

    monkeypatch.setattr(evaluate, "evaluate", evaluate_and_fill)
    assert program(run_copy) == 2
    out, err = capsys.readouterr()
    assert "effective inputs over the text" in out
    assert "evaluation.json cannot be written" in err and "No space left" in err.splitlines()[-1]
    assert not [
        path for path in run_copy.iterdir() if re.match("evaluation|report|.trial", path.name)
    ]


def test_an_ascii_terminal_is_survived(run_copy, no_figures, monkeypatch):
    path = run_copy / "config.json"
    path.write_text(path.read_text().replace('"penalty": "l1"', '"penalty": "größe"'))
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert program(run_copy, "--all") == 0
    terminal.flush()
    out = terminal.buffer.getvalue().decode("ascii")
    assert "JSAE, lambda 1 of gr??e" in out and "+-" in out


@pytest.mark.parametrize("latents", [[], ["--latents", "5"]])
def test_a_pair_without_active_latents_gets_what_is_defined(latents, run_copy):
    for name in ("sae_x", "sae_y"):
        path = run_copy / name / "sae_weights.safetensors"
        tensors = safetensors.torch.load_file(path)
        tensors["b_enc"].fill_(-1e6)
        safetensors.torch.save_file(tensors, path)
    assert program(run_copy, *latents) == 0
    numbers = json.loads((run_copy / "evaluation.json").read_text())["numbers"]
    assert (numbers["silent.x"], numbers["mean_abs"], numbers["not_zero"]) == (64, 0, 0)
    assert "ce_lost.path" in numbers and not {"hoyer", "text_inputs", "linear"} & set(numbers)
    assert (run_copy / "figures" / "edges.png").exists()


# ---- README, METHOD.md, recipes ------------------------------------------------------------------


def code_of(name):
    return re.findall(r"```python\n(.*?)```", (jsae.HERE / name).read_text(), re.DOTALL)


def run_code(code, tmp_path):
    (tmp_path / "code.py").write_text(code)
    runpy.run_path(tmp_path / "code.py")


def test_the_readmes_snippet_shows_what_j_says_and_what_happens(run_copy, tmp_path, capsys):
    (snippet,) = code_of("README.md")
    name = re.search(r'load_run\("(.*?)"\)', snippet).group(1)
    run_code(snippet.replace(name, str(run_copy)), tmp_path)
    lines = capsys.readouterr().out.splitlines()
    pattern = r"(\d+) -> (\d+): J says (-?\d+\.\d\d), it is (-?\d+\.\d\d)"
    found = [re.fullmatch(pattern, line).groups() for line in lines]
    assert len(found) == 3
    assert len({j for j, *_ in found}) == 3 and len({i for _, i, *_ in found}) == 1
    sizes = [abs(float(says)) for *_, says, _ in found]
    assert sizes == sorted(sizes, reverse=True)


def test_the_code_of_method_md_runs_and_the_toys_wiring_is_found(tmp_path, capsys):
    code = "\n".join(code_of("assets/METHOD.md"))
    assert "in (0, 0.03, 0.1, 0.3)" in code
    run_code(code.replace("in (0, 0.03, 0.1, 0.3)", "in (0, 0.1)"), tmp_path)
    at_0, at_1 = capsys.readouterr().out.splitlines()
    numbers = [
        [float(word) for word in re.findall(r"\d+(?:\.\d+)?", line)] for line in (at_0, at_1)
    ]
    (_, found, right, share, ev), (_, _, _, larger, less) = numbers
    assert found >= 23 and right == found
    assert larger > share and less < ev  # what the penalty gives and takes


def recipe(name):
    spec = importlib.util.spec_from_file_location(name, jsae.HERE / "assets/recipes" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RECIPES = ["text", "smollm2", "plot", "lengths", "latents", "to_sparsify"]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_how_it_is_run_and_refuses_what_it_does_not_know(name, monkeypatch, capsys):
    for arguments, status in ((["--help"], 0), ([], 2)):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        with pytest.raises(SystemExit) as end:
            recipe(name).main()
        assert end.value.code == status
    assert f"python assets/recipes/{name}.py" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, before, after", [("text", ["a.deb", "--output"], []), ("smollm2", ["a.whl"], [])]
)
def test_a_recipe_does_not_write_over_what_is_there(name, before, after, tmp_path, monkeypatch):
    path = tmp_path / "kept"
    path.write_text("kept")
    monkeypatch.setattr(sys, "argv", [name, *before, str(path), *after])
    with pytest.raises(SystemExit) as end:
        recipe(name).main()
    assert end.value.code == 2 and path.read_text() == "kept"


def test_the_recipes_of_latents_and_plots_show_what_evaluate_found(run_copy, monkeypatch, capsys):
    given = [str(run_copy), "--tokens", "800", "--functions", "20"]
    assert evaluate.main(given) == 0
    result = json.loads((run_copy / "evaluation.json").read_text())
    capsys.readouterr()
    recipe("latents").main([str(run_copy), "--tokens", "800", "--latents", "4"])
    printed = capsys.readouterr().out
    shown = [int(number) for number in re.findall(r"output latent (\d+)", printed)]
    assert shown == [latent["latent"] for latent in result["latents"][:4]]
    first = result["latents"][0]["inputs"][0]
    assert f"input latent {first['latent']}: {first['share']:.0%} of all" in printed

    picture = run_copy / "plot.png"
    names = ["hold_90", "ce_lost.path", str(run_copy / "evaluation.json")]
    monkeypatch.setattr(sys, "argv", ["plot", *names, "--output", str(picture)])
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.errorbar", lambda ax, *args, **_: drawn.append(args))
    recipe("plot").main()
    numbers, errors = result["numbers"], result["errors"]
    expected = numbers["hold_90"], numbers["ce_lost.path"], errors["ce_lost.path"]
    assert drawn[0][:3] == expected and picture.exists()


def test_the_recipe_of_lengths_compares_with_lambda_0_of_the_same_length(
    run_copy, tmp_path, monkeypatch, capsys
):
    assert evaluate.main([str(run_copy), "--tokens", "800", "--functions", "20"]) == 0
    new = json.loads((run_copy / "evaluation.json").read_text())
    old, longer, other = (json.loads(json.dumps(new)) for _ in range(3))
    for result in (old, other):
        result["settings"]["jacobian_coef"] = 0
    old["numbers"]["hold_90"] += 10
    old["influence"]["hold_90"] = [3 * value for value in new["influence"]["hold_90"]]
    other["settings"]["layer"] += 1
    longer["settings"]["tokens"] *= 2  # no run at lambda 0 is as long
    paths = []
    for n, result in enumerate((new, longer, other, old)):
        paths.append(str(tmp_path / f"{n}.json"))
        Path(paths[-1]).write_text(json.dumps(result))
    arguments = ["lengths", *paths, "--numbers", "hold_90", "--output", str(tmp_path / "l.png")]
    monkeypatch.setattr(sys, "argv", arguments)
    capsys.readouterr()
    recipe("lengths").main()
    *_, line = lines = capsys.readouterr().out.splitlines()
    value, error = new["numbers"]["hold_90"], 2 * new["errors"]["hold_90"]
    assert len(lines) == 3
    assert line.endswith(f" {value + 10:.4g} -> {value:.4g}: -10 ± {error:.2g} |")
    assert (tmp_path / "l.png").exists()

    monkeypatch.setattr(sys, "argv", ["lengths", *paths[:3]])
    with pytest.raises(SystemExit) as end:
        recipe("lengths").main()
    assert end.value.code == 2
