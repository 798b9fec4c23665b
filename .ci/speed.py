"""Seconds of one training step, in turns, with the median.

    python .ci/speed.py [--dtype bfloat16] [--device cuda] [--rounds 5] [--only sparsify] [--scale 1]

A step is forward, backward, clipping and fused Adam. Rows: the JSAE pair at Pythia-70m's shape; the
same at lambda 0, and with every size doubled; the paper's formula (dense latents, whole tables,
autograd); one SAE of each peer that is installed.
"""

import argparse
import importlib
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from jsae import MLP, TopKSAE, jsae_loss

SHAPE = {"B": 4096, "d": 512, "n": 16384, "h": 2048, "k": 32}  # Pythia-70m's, R = 32


def papers_loss(sae_x, sae_y, mlp, x, coef):
    """Eq. 5 by dense latents, tables of all latents, a gather for each token, and autograd."""
    y = mlp(x)
    ((c, W),) = mlp.derivative(x)
    loss = 0.0
    indices = []
    for sae, v in ((sae_x, x), (sae_y, y)):
        acts, idx = sae.encode(v)
        dense = torch.zeros(len(v), len(sae.W_enc), device=v.device, dtype=acts.dtype)
        v_hat = dense.scatter(1, idx, acts) @ sae.W_dec + sae.b_dec
        loss = loss + F.mse_loss(v_hat, v)
        indices.append(idx.split(128))
    left = sae_y.W_enc @ mlp.W_out
    right = sae_x.W_dec @ W.T
    for idx_x, idx_y, chunk in zip(*indices, c.unsqueeze(1).split(128)):
        J = left[idx_y] @ (chunk * right[idx_x]).mT
        loss = loss + coef * J.abs().sum() / (len(x) * J.shape[1] * J.shape[2])
    return loss


def pair(options, B, d, n, h, k, coef=1.0, plain=False):
    """-> the parameters of two SAEs, and a function that gives their loss on one random batch."""
    W_in, W_out = torch.randn(h, d) / d**0.5, torch.randn(d, h) / h**0.5
    mlp = MLP(W_in, torch.zeros(h), W_out, None).to(options.device)
    saes = torch.nn.ModuleList(TopKSAE(d, n, k) for _ in "xy").to(options.device)
    x = torch.randn(B, d).to(options.device)

    def loss():
        if plain:
            return papers_loss(*saes, mlp, x, coef)
        return jsae_loss(*saes, mlp, x, coef)[0]

    return list(saes.parameters()), loss


def sparsify(options, B, d, n, h, k):
    module = importlib.import_module("sparsify")
    sae = module.SparseCoder(d, module.SparseCoderConfig(num_latents=n, k=k), options.device)
    x = torch.randn(B, d, device=options.device)
    return list(sae.parameters()), lambda: sae(x).fvu


def dictionary_learning(options, B, d, n, h, k):
    module = importlib.import_module("dictionary_learning.trainers.top_k")
    sae = module.AutoEncoderTopK(d, n, k).to(options.device)
    x = torch.randn(B, d, device=options.device)
    return list(sae.parameters()), lambda: F.mse_loss(sae(x), x)


def sae_lens(options, B, d, n, h, k):
    module = importlib.import_module("sae_lens")
    config = module.TopKTrainingSAEConfig(d_in=d, d_sae=n, k=k, device=options.device)
    sae = module.TopKTrainingSAE(config)
    x = torch.randn(B, d, device=options.device)
    return list(sae.parameters()), lambda: F.mse_loss(
        sae.decode(sae.encode_with_hidden_pre(x)[0]), x
    )


def step_of(options, parameters, loss_of):
    """-> a function that does one training step and gives its seconds."""
    adam = torch.optim.Adam(parameters, fused=True)
    device = torch.device(options.device).type

    def step():
        start = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=options.dtype == "bfloat16"):
            loss = loss_of()
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()
        parameters[0].view(-1)[0].item()  # waits for a GPU
        return time.perf_counter() - start

    return step


def cases_of(options):
    """-> {row: (function that makes it, sizes and settings)}."""
    shape = {name: size // options.scale for name, size in SHAPE.items()}
    cases = {
        "JSAE pair": (pair, shape),
        "lambda 0": (pair, {**shape, "coef": 0.0}),
        "paper's formula": (pair, {**shape, "plain": True}),
    }
    for name, size in shape.items():
        cases[f"{name} {2 * size}"] = (pair, {**shape, name: 2 * size})
    for peer in (sparsify, dictionary_learning, sae_lens):
        cases[f"one SAE of {peer.__name__}"] = (peer, shape)
    return {name: case for name, case in cases.items() if options.only in name}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="only rows with this in their name")
    parser.add_argument("--scale", type=int, default=1, help="divides every size, to try it out")
    options = parser.parse_args()

    steps = {}
    for name, (make, settings) in cases_of(options).items():
        try:
            steps[name] = step_of(options, *make(options, **settings))
        except ImportError as error:
            print(f"{name} is left out: {error}")
    times = {name: [] for name in steps}
    for _ in range(1 + options.rounds):
        for name, step in steps.items():
            times[name].append(step())
    medians = {name: statistics.median(seconds[1:]) for name, seconds in times.items()}  # warm

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {vars(options)}")
    for name, seconds in medians.items():
        ratio = seconds / medians.get("JSAE pair", float("nan"))
        print(f"{name:30} {seconds:8.4f} s {ratio:6.2f}")


if __name__ == "__main__":
    main()
