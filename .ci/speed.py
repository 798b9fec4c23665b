"""Seconds of one training step (forward, backward, clipping, fused Adam) of the JSAE pair, of smaller and larger ones,
of the paper's formula, and of one SAE of each peer that is installed; in turns, with the median.

python .ci/speed.py [--dtype bfloat16] [--device cuda] [--rounds 5] [--only sparsify] [--scale 1]
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


def pair(options, B, d, n, h, k, coef=1.0, fraction=1.0, plain=False):
    """-> the parameters of two SAEs, and their loss on one random batch."""
    mlp = MLP(torch.randn(h, d) / d**0.5, torch.zeros(h), torch.randn(d, h) / h**0.5, None)
    saes, x = torch.nn.ModuleList(TopKSAE(d, n, k) for _ in "xy"), torch.randn(B, d)
    saes, mlp, x = saes.to(options.device), mlp.to(options.device), x.to(options.device)

    def paper():  # dense latents, whole tables, a gather for each token, and autograd
        loss, found = 0.0, []
        y, ((c, W),) = mlp.linearize(x)
        for sae, v in zip(saes, (x, y)):
            acts, idx = sae.encode(v)
            dense = torch.zeros(B, n, device=v.device, dtype=acts.dtype).scatter(1, idx, acts)
            loss = loss + F.mse_loss(dense @ sae.W_dec + sae.b_dec, v)
            found.append(idx.split(128))
        left, right = saes[1].W_enc @ mlp.W_out, saes[0].W_dec @ W.T
        for i_x, i_y, some in zip(*found, c.unsqueeze(1).split(128)):
            loss = loss + (left[i_y] @ (some * right[i_x]).mT).abs().sum() / (B * k * k)
        return loss

    fast = lambda: jsae_loss(*saes, mlp, x, coef, fraction)[0]
    return list(saes.parameters()), paper if plain else fast


def sparsify(options, B, d, n, h, k):
    module, x = importlib.import_module("sparsify"), torch.randn(B, d, device=options.device)
    sae = module.SparseCoder(d, module.SparseCoderConfig(num_latents=n, k=k), options.device)
    return list(sae.parameters()), lambda: sae(x).fvu


def dictionary_learning(options, B, d, n, h, k):
    module = importlib.import_module("dictionary_learning.trainers.top_k")
    sae, x = module.AutoEncoderTopK(d, n, k), torch.randn(B, d, device=options.device)
    return list(sae.to(options.device).parameters()), lambda: F.mse_loss(sae(x), x)


def sae_lens(options, B, d, n, h, k):
    module, x = importlib.import_module("sae_lens"), torch.randn(B, d, device=options.device)
    sizes = {"d_in": d, "d_sae": n, "k": k, "device": options.device}
    sae = module.TopKTrainingSAE(module.TopKTrainingSAEConfig(**sizes))
    decoded = lambda: sae.decode(sae.encode_with_hidden_pre(x)[0])
    return list(sae.parameters()), lambda: F.mse_loss(decoded(), x)


def step(options, parameters, loss_of):
    adam = torch.optim.Adam(parameters, fused=True)
    device, low = torch.device(options.device).type, options.dtype == "bfloat16"

    def run():
        start = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=low):
            loss = loss_of()
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()
        parameters[0].view(-1)[0].item()  # waits for a GPU
        return time.perf_counter() - start

    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="only rows with this in their name")
    parser.add_argument("--scale", type=int, default=1, help="divides every size, to try it out")
    options = parser.parse_args()
    changes = {"JSAE pair": {}, "1 token in 8": {"fraction": 1 / 8}, "lambda 0": {"coef": 0.0}}
    changes |= {f"{name} {2 * SHAPE[name]}": {name: 2 * SHAPE[name]} for name in SHAPE}
    changes["paper's formula"] = {"plain": True}
    cases = {name: (pair, change) for name, change in changes.items()}
    cases |= {
        f"one SAE of {f.__name__}": (f, {}) for f in (sparsify, dictionary_learning, sae_lens)
    }
    steps = {}
    for name, (make, change) in cases.items():
        sizes = {
            key: v // options.scale if key in SHAPE else v for key, v in (SHAPE | change).items()
        }
        try:
            if options.only in name:
                steps[name] = step(options, *make(options, **sizes))
        except ImportError as error:
            print(f"{name} is left out: {error}")
    times = {name: [] for name in steps}
    for _ in range(1 + options.rounds):  # the first one to warm up
        for name, run in steps.items():
            times[name].append(run())
    medians = {name: statistics.median(seconds[1:]) for name, seconds in times.items()}
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {vars(options)}")
    for name, seconds in medians.items():
        ratio = seconds / medians.get("JSAE pair", float("nan"))
        print(f"{name:30} {seconds:8.4f} s {ratio:6.2f}")


if __name__ == "__main__":
    main()
