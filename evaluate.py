"""Evaluation of Jacobian SAEs: the measures of the paper, and scale-free ones beside them.

    python evaluate.py runs/A                one run: evaluation.json, figures/, report.html
    python evaluate.py runs/A runs/B         side by side, with one report in the first one's folder
    python evaluate.py runs/* --reuse --plot jacobian_coef jacobian.hoyer       a sweep, drawn

Runs that differ in the seed only make one column, mean and standard deviation. All numbers are of
held-out text: local data and stdlib hold out a part (jsae.token_contexts), runs on hub data are
evaluated on C4's validation split, --dataset names another one. The first token of a context is
left out unless the run kept it. Each function says how its numbers are defined."""

import argparse
import base64
import dataclasses
import hashlib
import html
import json
import math
import sys
from collections import Counter
from contextlib import suppress
from copy import deepcopy
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm

import jsae
from jsae import InputError, Latents, active_jacobian, check

CLASSES = ("linear", "jumprelu", "other")
SCALES = ("raw", "l1", "l2", "linf")  # J as it is, or divided by a norm of each token's J
BIN, BINS = 0.001, 1100  # histogram of |J|: 1100 bins and one for all that lies above
WINDOW, WINDOWS, PICTURES = 16, 12, 4  # tokens of an example, examples of a latent, pictures of J
GRID, LARGEST = 100, 5.0  # points of [0, max(5, s + 1)] at which a function of one latent is taken
spread = lambda runs: (np.mean(runs, 0), np.std(runs, 0, ddof=int(len(runs) > 1)))  # mean, std
hoyer = lambda v: (v.shape[-1] ** 0.5 - v.sum(-1) / v.norm(dim=-1)) / (v.shape[-1] ** 0.5 - 1 or 1)
details = lambda head, *parts: f"<details><summary>{head}</summary>{''.join(parts)}</details>"


def held_out_contexts(config, options, model, tokenizer):
    """Yield token ids (contexts, T), --batch-size contexts at a time, --tokens evaluated tokens in
    all, rounded up to whole contexts. InputError if the held-out text has fewer."""
    width = config.context_size - (not config.keep_first_token)
    n, found = math.ceil(options.tokens / width), 0
    contexts = islice(jsae.token_contexts(config, model, tokenizer, held_out=True), n)
    while batch := list(islice(contexts, options.batch_size)):
        found += len(batch)
        yield torch.tensor(np.stack(batch), device=model.device)
    check(found == n, f"--tokens {options.tokens}; {config.dataset} holds out {found * width}")


def reconstruction_sums(sae, v, latents):
    """Sums over tokens from which `reconstruction` computes its numbers. v (B, d_model)."""
    v_hat, v = sae.decode(latents).double(), v.double()
    sums = {"error": (v_hat - v).square().sum(), "squares": v.square().sum(), "total": v.sum(0)}
    sums["cosine"], on = torch.cosine_similarity(v_hat, v).sum(), latents.acts > 0
    values, i = latents.acts[on].double(), latents.idx[on]
    for name, power in (("fired", 0), ("first", 1), ("second", 2)):  # moments of each latent
        sums[name] = torch.bincount(i, values**power, minlength=sae.n_latents)
    return sums


def reconstruction(sums, tokens, sae):
    """mse: mean over all elements. fvu: squared error / squares about the mean, over all elements;
    explained_variance = 1 - fvu. cosine: mean over tokens. dead: latents without a positive value.
    rare: latents below one token in 10^6, null if fewer were evaluated. density: how many latents
    have a positive value on 10^-6 to 10^-5.5, ... of the tokens (lower ends in density_log10).
    active: positive values per token. Means over all of these: variation, standard deviation / mean
    of the latent's positive values, W_enc_norm, the norm of its row of W_enc, and its b_enc."""
    variance = sums["squares"] - sums["total"].square().sum() / tokens
    fvu = (sums["error"] / variance).item()
    fired, share = sums["fired"], sums["fired"] / tokens
    edges = np.arange(-6, 0.5, 0.5)
    density = np.histogram(share[share > 0].log10().cpu().clamp(min=-6), edges)[0]
    result = {"mse": (sums["error"] / (tokens * len(sums["total"]))).item(), "fvu": fvu}
    result |= {"explained_variance": 1 - fvu, "cosine": (sums["cosine"] / tokens).item()}
    rare = int((share < 1e-6).sum()) if tokens >= 10**6 else None
    result |= {"dead": int((share == 0).sum()), "rare": rare, "active": share.sum().item()}
    mean, square = (sums[moment] / fired.clamp(min=1) for moment in ("first", "second"))
    std, some = (square - mean.square()).clamp(min=0).sqrt(), fired.sum().clamp(min=1)
    of = {"variation": std / (mean + 1e-9), "W_enc_norm": sae.W_enc.norm(dim=1), "b_enc": sae.b_enc}
    result |= {name: ((fired * values).sum() / some).item() for name, values in of.items()}
    return result | {"density": density.tolist(), "density_log10": edges[:-1].tolist()}


def log_probabilities(model, mlp, ids, skip, y=None):
    """-> (contexts, predictions, vocabulary): the model's predictions of the next token but for the
    first `skip` ones. y (tokens, d_model) takes the place of the MLP's outputs from `skip` on."""

    def replaced(_, args, output):
        old = output.reshape(*ids.shape, -1)
        new = old[:, skip:] if y is None else y.view_as(old[:, skip:])
        return torch.cat([old[:, :skip], new], 1).view_as(output)

    with mlp.sites[-1].register_forward_hook(replaced):
        logits = model(input_ids=ids, use_cache=False).logits
    return logits[:, skip:-1].log_softmax(-1)


def performance_sums(model, mlp, sae_x, sae_y, ids, x, skip):
    """Summed cross-entropy (nats) of the model as it is and with a site replaced at the tokens of x
    (tokens, d_model), and summed KL(clean || replaced). Sites: x by x_hat; y by y_hat; both: the
    whole path x -> s_x -> f_s -> s_y -> y_hat in y's place. Ablated: x or y is set to zero."""
    y, new_y = mlp(x), {"x": mlp(sae_x(x)), "x_ablated": mlp(torch.zeros_like(x))}
    new_y |= {"y": sae_y(y), "both": sae_y(new_y["x"]), "y_ablated": torch.zeros_like(y)}
    target = ids[:, skip + 1 :].unsqueeze(-1)
    clean = log_probabilities(model, mlp, ids, skip)
    sums = {"clean": -clean.gather(-1, target).double().sum()}
    for name, new in new_y.items():
        logp = log_probabilities(model, mlp, ids, skip, new)
        sums[name] = -logp.gather(-1, target).double().sum()
        if "ablated" not in name:
            sums[f"kl_{name}"] = (clean.exp() * (clean - logp)).sum(-1).double().sum()
    return sums | {"predictions": torch.tensor(target.numel())}


def performance(sums):
    """Means over tokens. score = (ablated - sae) / (ablated - clean), 1 is perfect; its complement
    is increase_ratio, Appendix E's wording. both: with y's ablation."""
    mean = {name: (value / sums["predictions"]).item() for name, value in sums.items()}
    result = {"clean": mean["clean"]}
    for site in ("x", "y", "both"):
        ablated = mean["y_ablated" if site == "both" else f"{site}_ablated"]
        ratio = (mean[site] - mean["clean"]) / (ablated - mean["clean"] or math.nan)
        result[site] = {"sae": mean[site], "ablated": ablated, "kl": mean[f"kl_{site}"]}
        result[site] |= {"score": 1 - ratio, "increase_ratio": ratio}
    return result


def jacobian_sums(J, thresholds):
    """Sums over tokens of the measures that `jacobian` explains. J (B, k, k)."""
    rows, A = (v := J.abs().double()), v.flatten(1)  # (B, k, k), (B, N)
    some, on = A.any(1), rows.any(2)  # tokens, and rows, with an active pair
    norms = {"l1": A.sum(1), "l2": A.norm(dim=1), "l4": A.norm(4, dim=1), "linf": A.amax(1)}
    sums = {f"norm_{name}": norm.sum() for name, norm in norms.items()}
    for scale in SCALES:
        scaled = A if scale == "raw" else A[some] / norms[scale][some].unsqueeze(1)
        sums[f"above_{scale}"] = torch.stack([(scaled > t).sum() for t in thresholds])
    mass = A.sort(1, descending=True).values.cumsum(1)
    for share in (50, 90, 99):
        sums[f"mass_{share}"] = ((mass < share / 100 * mass[:, -1:]).sum(1) + 1)[some].sum()
    sums["hoyer"], row_hoyer = hoyer(A[some]).sum(), hoyer(rows).where(on, 0.0)
    sums["hoyer_rows"] = (row_hoyer.sum(1) / on.sum(1).clamp(min=1)).sum()
    sums["participation"] = (norms["l2"] / norms["l4"])[some].pow(4).sum()
    sums["largest"], sums["paired"] = (norms["linf"] / norms["l2"])[some].pow(2).sum(), some.sum()
    bins = (A.flatten() / BIN).long().clamp(max=BINS)
    return sums | {"histogram": torch.bincount(bins, minlength=BINS + 1)}


def jacobian(sums, tokens, thresholds, elements):
    """Means per token, N = k^2 elements. count_above, share_above: elements with |J| above each
    threshold, raw or with J divided by its L1, L2 or Linf norm. norms: of its elements. histogram: of
    all tokens, bins of 0.001, the last from 1.1 on. paired: share of tokens with an active pair. Over
    these: counts at unit norm; mass: how many of the largest hold 50, 90, 99 % of sum |J|; hoyer: (sqrt
    N - L1/L2) / (sqrt N - 1), 0 if all are equal, 1 if one is not 0 (l1_over_l2 trains it); hoyer_rows:
    of J's rows; participation: (sum J^2)^2 / sum J^4; largest: one element's share of sum J^2."""
    n, raw = max(1, int(sums["paired"])), ("above_raw", "norm", "paired")
    mean = {m: (v / (tokens if m.startswith(raw) else n)).tolist() for m, v in sums.items()}
    above = {scale: mean[f"above_{scale}"] for scale in SCALES}
    result = {"thresholds": thresholds, "elements": elements, "count_above": above}
    result["share_above"] = {s: [n / elements for n in counts] for s, counts in above.items()}
    result["norms"] = {name: mean[f"norm_{name}"] for name in ("l1", "l2", "l4", "linf")}
    result["mass"] = {str(share): mean[f"mass_{share}"] for share in (50, 90, 99)}
    more = ("hoyer", "hoyer_rows", "participation", "largest", "paired")
    return result | {m: mean[m] for m in more} | {"histogram": sums["histogram"].tolist()}


class GlobalJacobian:
    """Figure 36: mean |J_ij| over the tokens on which output latent i is active, where an input
    latent that is not active counts as 0. All n output latents, or if n is above 4096 a random
    sample of 2^24 / n, so that memory is bounded and shares stay unbiased; and the given `rows`."""

    def __init__(self, n, rows, generator, device):
        size = max(1, min(n, 2**24 // n))
        drawn = torch.randperm(n, generator=generator)[:size].sort().values.tolist()
        self.rows = torch.tensor([*drawn, *({*rows} - {*drawn})], device=device)
        self.where = torch.full((n,), -1, device=device)  # row of an output latent
        self.where[self.rows] = torch.arange(len(self.rows), device=device)
        self.tokens = torch.zeros(len(self.rows), dtype=torch.float64, device=device)
        # sums of |J|, J, J^2 and the number of tokens on which both latents are active
        self.sums = torch.zeros(4, len(self.rows) * n, dtype=torch.float64, device=device)
        self.n, self.size = n, size

    def add(self, J, s_y, s_x):
        b, i = ((s_y.acts > 0) & (self.where[s_y.idx] >= 0)).nonzero(as_tuple=True)
        row, values, on = self.where[s_y.idx[b, i]], J[b, i].double(), (s_x.acts > 0)[b]
        self.tokens.index_add_(0, row, torch.ones_like(row, dtype=torch.float64))
        at = (row.unsqueeze(1) * self.n + s_x.idx[b]).flatten()
        for total, value in zip(self.sums, (values.abs(), values, values.square(), on.double())):
            total.index_add_(0, at, value.flatten())

    def result(self, k, options):
        """Counts above the thresholds as a share of all pairs, and the strongest output latents, by
        mean |J| over their active pairs, with their 5 strongest input latents: mean and standard
        deviation of J over the `count` tokens on which both are active. An output latent must be
        active on 10 tokens, unless it was asked for; an edge comes before others if it is on 3."""
        total, signed, squares, count = self.sums.view(4, len(self.rows), self.n)
        mean = total / self.tokens.clamp(min=1).unsqueeze(1)  # (rows, n_x)
        shares = [(mean[: self.size] > t).double().mean().item() for t in options.thresholds]
        strength = total.sum(1) / (k * self.tokens).clamp(min=1)
        usual = torch.where(self.tokens >= 10, strength, -1.0)
        order = usual.topk(min(options.n_latents, int((usual >= 0).sum()))).indices
        chosen = self.where[options.latents] if options.latents else order
        edges, latents = torch.where(count >= 3, mean, -1.0), []
        for row in chosen.tolist():
            inputs, strongest = [], edges[row].argsort(descending=True, stable=True)
            for j in strongest[:5].tolist():
                if n := int(count[row, j]):
                    average = (signed[row, j] / n).item()
                    std = max(0.0, (squares[row, j] / n).item() - average**2) ** 0.5
                    inputs.append({"latent": j, "mean": average, "std": std, "count": n})
            latents.append({"latent": self.rows[row].item(), "tokens": int(self.tokens[row])})
            latents[-1] |= {"mean_abs": strength[row].item(), "inputs": inputs}
        return {"rows": self.size, "share_above": shares}, latents


def classify(t, v, relative=False):
    """Each function (S, T) of t is 0 linear, 1 JumpReLU or 2 other. Linear: no residual of its
    least-squares line reaches 0.01. JumpReLU: exactly 0 on one stretch that touches an end, linear
    on the rest (2 points or more). relative: residual / range of the points of the line < 0.01, so
    that no function becomes linear by being small; what is flat to float32's rounding is linear."""
    t, v = t.double(), v.double()

    def straight(keep):  # through the points with keep
        n, span = keep.sum(1, keepdim=True), 1.0
        dt, dv = ((u - (u * keep).sum(1, keepdim=True) / n) * keep for u in (t, v))
        slope = (dt * dv).sum(1, keepdim=True) / dt.square().sum(1, keepdim=True)
        if relative:
            highest, lowest = v.masked_fill(~keep, -math.inf), v.masked_fill(~keep, math.inf)
            span = (highest.amax(1) - lowest.amin(1)).maximum(1e-4 * v.abs().amax(1))
        return (dv - slope * dt).abs().amax(1) < 0.01 * span + 1e-30

    zero, everywhere, n = v == 0, torch.ones_like(v, dtype=torch.bool), (v == 0).sum(1)
    at_end = (zero.int().cumprod(1).sum(1) == n) | (zero.flip(1).int().cumprod(1).sum(1) == n)
    jump = at_end & (n > 0) & (n <= v.shape[1] - 2)
    rest = torch.where(jump.unsqueeze(1), ~zero, everywhere)
    return torch.where(straight(everywhere), 0, torch.where(jump & straight(rest), 1, 2))


def along_latent(sae_x, sae_y, mlp, samples, t):
    """s_y,i as a function of s_x,j: the true x moves along decoder row j, the SAE's error stays
    (Eq. 30). t (S, T) values of s_x,j -> (S, T), after full TopK and ReLU."""
    row = sae_x.W_dec[samples["j"]].unsqueeze(1)  # (S, 1, d_model)
    x = samples["x"].unsqueeze(1) + (t - samples["s"].unsqueeze(1)).unsqueeze(2) * row
    acts, idx = sae_y.encode(mlp(x))  # (S, T, k)
    return (acts * (idx == samples["i"].view(-1, 1, 1))).sum(2)


def linearity(sae_x, sae_y, mlp, samples, options):
    """Fractions of random pairs (i, j) of active latents. linear, jumprelu, other: 100 points of
    [0, max(5, s + 1)], tolerance 0.01; relative: the same by residual / range. on_line: |J + delta|
    < 0.1, delta the change of s_y,i when 1 is subtracted from s_x,j; cluster: off the line with
    |J| < 0.1; outlier: the rest; on_line_relative: |J + delta| < 0.1 |J|. second: in float64, on a
    part of the samples."""
    S, device, dtype = len(samples["s"]), samples["x"].device, sae_x.W_dec.dtype
    unit, classes, relative, deltas, curves = torch.linspace(0, 1, GRID), [], [], [], []
    size = max(1, 2**23 // (GRID * max(sae_y.n_latents, mlp.W_in.shape[0])))
    for at in tqdm(range(0, S, size), "linearity", leave=False):
        some = {name: value[at : at + size] for name, value in samples.items()}
        t = unit.to(device, dtype) * (some["s"] + 1).clamp(min=LARGEST).unsqueeze(1)  # (S, T)
        v = along_latent(sae_x, sae_y, mlp, some, t)
        classes.append(classify(t, v))
        relative.append(classify(t, v, relative=True))
        ends = torch.stack([some["s"] - 1, some["s"]], 1)
        deltas.append(along_latent(sae_x, sae_y, mlp, some, ends) @ v.new_tensor([1.0, -1.0]))
        curves += [*zip(t, v)] if at < 10 * size else []
    classes, relative, delta = torch.cat(classes), torch.cat(relative), torch.cat(deltas)
    J = samples["J"].to(delta.dtype)
    off, small = (J + delta).abs(), J.abs() < 0.1
    masks = {name: classes == c for c, name in enumerate(CLASSES)}
    masks |= {"on_line": off < 0.1, "on_line_relative": off < 0.1 * J.abs()}
    masks |= {"cluster": (off >= 0.1) & small, "outlier": (off >= 0.1) & ~small}
    result = {"samples": S} | {name: mask.double().mean().item() for name, mask in masks.items()}
    shares = torch.bincount(relative, minlength=3).double() / S
    result["relative"] = dict(zip(CLASSES, shares.tolist()))
    result["scatter"] = {"J": J[:1000].tolist(), "delta": delta[:1000].tolist()}
    first = {name: mask[: len(curves)].nonzero()[:6, 0].tolist() for name, mask in masks.items()}
    result["examples"] = {k: [[u.tolist() for u in curves[i]] for i in first[k]] for k in CLASSES}
    return result | {"second": second_differences(sae_x, sae_y, mlp, samples, options)}


def second_differences(sae_x, sae_y, mlp, samples, options):
    """Figures 13, 14: mean, mean |.| and largest |.| of each function's second derivative, by
    differences over a grid of 0.005, where a jump of height h shows as h / 0.005^2."""
    step, result = 0.005, {"mean": [], "mean_abs": [], "max_abs": []}
    *saes, mlp = (deepcopy(module).double() for module in (sae_x, sae_y, mlp))
    for n in tqdm(range(min(options.second_samples, len(samples["s"]))), "second", leave=False):
        one = {k: v[[n]] if k in "ij" else v[[n]].double() for k, v in samples.items()}
        points = int(max(LARGEST, one["s"].item() + 1) / step) + 1
        t = step * torch.arange(points, dtype=torch.float64, device=one["x"].device).unsqueeze(0)
        second = along_latent(*saes, mlp, one, t).diff(n=2).squeeze(0) / step**2
        for name, v in zip(result, (second.mean(), second.abs().mean(), second.abs().max())):
            result[name].append(v.item())
    return result


def examples(saes, mlp, model, tokenizer, wanted, batches, skip):
    """-> {side: {latent: [{tokens, acts, max}, ...]}} for the latents `wanted` {side: latents}: the
    12 windows of 16 tokens (contexts cut into pieces) in which the latent is largest."""
    found = {side: {latent: [] for latent in latents} for side, latents in wanted.items()}
    for ids in batches:
        x = jsae.mlp_inputs(model, mlp, ids)[:, skip:]  # (contexts, width, d_model)
        encoded, more = [saes["x"].encode(x), saes["y"].encode(mlp(x))], -x.shape[1] % WINDOW
        pieces = F.pad(ids[:, skip:], (0, more), value=-1).view(-1, WINDOW)
        for (acts, idx), latents in zip(encoded, (found["x"], found["y"])):
            for latent, best in latents.items():
                values = F.pad((acts * (idx == latent)).sum(2), (0, more)).view(-1, WINDOW)
                most = values.amax(1).round(decimals=4)  # so that ties are ties in any batch
                at = most.argsort(descending=True, stable=True)[:WINDOWS]
                kept = zip(most[at].tolist(), pieces[at].tolist(), values[at].tolist())
                best += [window for window in kept if window[0] > 0]
                best[:] = sorted(best, key=lambda window: -window[0])[:WINDOWS]
    text = (lambda t: tokenizer.decode([t])) if tokenizer else str
    for best in (best for latents in found.values() for best in latents.values()):
        for n, (most, tokens, acts) in enumerate(best):
            texts = [text(t) for t in tokens if t >= 0]
            best[n] = {"tokens": texts, "acts": acts[: len(texts)], "max": most}
    return found


def open_run(run, options):
    """-> (sae_x, sae_y, model, tokenizer, mlp, the run's config, the same with the held-out text).
    InputError if it is no finished run, its model is gone or has another MLP than at training."""
    sae_x, sae_y, config = jsae.load_run(run)
    folder = Path(run) if Path(run).is_dir() else Path(jsae.snapshot_download(run))
    info = json.loads((folder / "config.json").read_text())
    model, tokenizer = jsae.load_language_model(dataclasses.replace(config, device=options.device))
    mlp = jsae.MLP.from_model(model, config.layer)
    weights = hashlib.sha256(safetensors.torch.save(mlp.state_dict())).hexdigest()
    check(weights == info["mlp_sha256"], f"{run}: {config.model} has changed since training")
    path, dtype = Path(config.dataset), getattr(torch, options.dtype)
    local = path.suffix in jsae.KINDS or path.exists() or config.dataset == "stdlib"
    own = (config.dataset, config.split) if local else ("allenai/c4:en", "validation")
    dataset, split = (options.dataset, options.split) if options.dataset else own
    text = dataclasses.replace(config, dataset=dataset, split=split)
    saes = (sae.to(model.device, dtype).requires_grad_(False) for sae in (sae_x, sae_y))
    return *saes, model.to(dtype), tokenizer, mlp.to(dtype), config, text


class Draws:
    """What is drawn at random: tokens, and with them pairs of active latents and pictures of J. All
    by the number of the token and from the seed, so that the batch size plays no part."""

    def __init__(self, tokens, k, options):
        self.generator = torch.Generator().manual_seed(options.seed)
        n, self.pairs, self.pictures = options.linear_samples, [], {}
        self.tokens = torch.randint(tokens, (n,), generator=self.generator).sort().values
        self.i, self.j = torch.randint(k, (2, n), generator=self.generator)
        shown = torch.randperm(tokens, generator=self.generator)[:PICTURES]
        orders = torch.rand(len(shown), 2, k, generator=self.generator).argsort(-1)
        self.shown = dict(zip(shown.tolist(), orders))

    def add(self, first, J, x, s_x, s_y):
        """Pick what is drawn among the tokens that start with number `first`."""
        here = (self.tokens >= first) & (self.tokens < first + len(J))
        b, i, j = (v[here].to(J.device) for v in (self.tokens - first, self.i, self.j))
        on = (s_x.acts[b, j] > 0) & (s_y.acts[b, i] > 0)
        b, i, j = b[on], i[on], j[on]
        pair = {"x": x[b], "J": J[b, i, j], "s": s_x.acts[b, j]}
        self.pairs.append(pair | {"i": s_y.idx[b, i], "j": s_x.idx[b, j]})
        for token, (rows, columns) in self.shown.items():
            if first <= token < first + len(J):
                self.pictures[token] = J[token - first].abs()[rows][:, columns].tolist()


@torch.no_grad()
def evaluate(run, options):
    """-> what evaluation.json holds: numbers, lists and strings. One pass over the held-out text
    with streaming sums, and a second one for the text of the examples."""
    sae_x, sae_y, model, tokenizer, mlp, config, text = open_run(run, options)
    skip, k, n = 0 if config.keep_first_token else 1, config.k, sae_x.n_latents
    fine = all(0 <= latent < n for latent in options.latents)
    check(fine, f"--latents {options.latents}; {run} has output latents 0 to {n - 1}")
    width = config.context_size - skip
    batches = partial(held_out_contexts, text, options, model, tokenizer)
    tokens = math.ceil(options.tokens / width) * width
    draws, saes, done = Draws(tokens, k, options), {"x": sae_x, "y": sae_y}, 0
    table = GlobalJacobian(n, options.latents, draws.generator, model.device)
    sums = {name: Counter() for name in ("x", "y", "J", "ce")}  # Counter.update adds
    chunk = max(1, 2**23 // (k * len(mlp.W_in)))
    for ids in tqdm(batches(), Path(run).name, -(-tokens // width // options.batch_size)):
        x = jsae.mlp_inputs(model, mlp, ids)[:, skip:].flatten(0, 1)  # (tokens, d_model)
        latents = {"x": sae_x.encode(x), "y": sae_y.encode(mlp(x))}
        for side, v in (("x", x), ("y", mlp(x))):
            sums[side].update(reconstruction_sums(saes[side], v, latents[side]))
        sums["ce"].update(performance_sums(model, mlp, sae_x, sae_y, ids, x, skip))
        for part in torch.arange(len(x), device=x.device).split(chunk):
            s_x, s_y = (Latents(s.acts[part], s.idx[part]) for s in latents.values())
            J = active_jacobian(sae_x, sae_y, mlp, x[part], s_x, s_y)
            sums["J"].update(jacobian_sums(J, options.thresholds))
            table.add(J, s_y, s_x)
            draws.add(done + int(part[0]), J, x[part], s_x, s_y)
        done += len(x)
    result = {"config": dataclasses.asdict(config), "n_latents": n}
    result["reconstruction"] = {s: reconstruction(sums[s], tokens, saes[s]) for s in saes}
    result["ce"] = performance(sums["ce"])
    result["jacobian"] = jacobian(sums["J"], tokens, options.thresholds, k * k)
    result["jacobian_pictures"] = [draws.pictures[token] for token in sorted(draws.pictures)]
    pairs = {name: torch.cat([pair[name] for pair in draws.pairs]) for name in draws.pairs[0]}
    order = torch.randperm(len(pairs["s"]), generator=draws.generator).to(model.device)
    pairs = {name: value[order] for name, value in pairs.items()}
    check(len(order), f"{run} has no active latents on {tokens} tokens; expected a trained pair")
    result["linearity"] = linearity(sae_x, sae_y, mlp, pairs, options)
    result["global"], result["latents"] = table.result(k, options)
    wanted = {"y": [latent["latent"] for latent in result["latents"]]}
    wanted["x"] = sorted({e["latent"] for latent in result["latents"] for e in latent["inputs"]})
    result["examples"] = examples(saes, mlp, model, tokenizer, wanted, batches(), skip)
    result |= {"text": text.dataset, "tokens": tokens, "seed": options.seed}
    return result | {"versions": {m.__name__: m.__version__ for m in (torch, transformers, np)}}


TABLE = (  # what: its parts, path in evaluation.json, what {} in it stands for
    ("explained variance: x / y", "reconstruction.{}.explained_variance", "x y"),
    ("dead latents: x / y", "reconstruction.{}.dead", "x y"),
    ("active latents per token: x / y", "reconstruction.{}.active", "x y"),
    ("variation of active values: x / y", "reconstruction.{}.variation", "x y"),
    ("norm of active W_enc rows: x / y", "reconstruction.{}.W_enc_norm", "x y"),
    ("b_enc of active latents: x / y", "reconstruction.{}.b_enc", "x y"),
    ("CE loss score: x / y / whole path", "ce.{}.score", "x y both"),
    ("KL in nats: x / y / whole path", "ce.{}.kl", "x y both"),
    ("functions: linear / JumpReLU / other", "linearity.{}", "linear jumprelu other"),
    ("relative: linear / JumpReLU / other", "linearity.relative.{}", "linear jumprelu other"),
    ("|J + delta|: < 0.1 / < 0.1 |J|", "linearity.{}", "on_line on_line_relative"),
    ("Hoyer sparsity: J / its rows", "jacobian.{}", "hoyer hoyer_rows"),
    ("share of sum J^2 in one element: largest", "jacobian.{}", "largest"),
    ("participation ratio: J", "jacobian.{}", "participation"),
    ("elements with % of sum |J|: 50 / 90 / 99", "jacobian.mass.{}", "50 90 99"),
    ("norm of J: L1 / L2 / L4 / Linf", "jacobian.norms.{}", "l1 l2 l4 linf"),
    ("elements above: {}", "jacobian.count_above.raw.{}", "thresholds"),
    ("the same at unit L2: {}", "jacobian.count_above.l2.{}", "thresholds"),
)


def lookup(result, path):
    """The run's setting of that name, else what stands at a dotted path in evaluation.json."""
    value = result["config"] if path in result["config"] else result
    try:
        for part in path.split("."):
            value = value[int(part) if isinstance(value, list) else part]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise InputError(f"no {path} in the evaluation of {result['run']}") from error
    return value


def merged(results):
    """-> groups of results: runs that differ in the seed and the folder only, evaluated alike."""
    groups, aside = {}, ("seed", "output_dir", "overwrite", "resume", "checkpoint_minutes")
    for r in results:
        kept = {name: value for name, value in r["config"].items() if name not in aside}
        groups.setdefault(str((kept, r["text"], r["tokens"])), []).append(r)
    return [*groups.values()]


def measures(groups):
    """Yield what is in a line of TABLE, its parts' names, and for each group of runs the mean and
    the standard deviation (of a sample: n - 1) of each part."""
    thresholds, *others = [r["jacobian"]["thresholds"] for group in groups for r in group]
    check(all(t == thresholds for t in others), "--thresholds differ among the runs with --reuse")
    for label, path, parts in TABLE:
        title, _, names = label.partition(": ")
        names, parts = names.split(" / "), parts.split()
        if parts == ["thresholds"]:
            names, parts = [f"{t:g}" for t in thresholds], range(len(thresholds))
        found = [[[lookup(r, path.format(part)) for part in parts] for r in g] for g in groups]
        yield title, names, [spread(numbers) for numbers in found]


def table_rows(groups):
    """-> rows of strings: the runs, then a row for each line of TABLE."""
    rows = [["", *(g[0]["run"] + f", {len(g)} runs" * (len(g) > 1) for g in groups)]]
    for title, parts, columns in measures(groups):
        rows.append([f"{title}: {' / '.join(parts)}"])
        for group, column in zip(groups, columns):
            cell = "{:.4g} ± {:.2g}" if len(group) > 1 else "{:.4g}"
            rows[-1].append(" / ".join(cell.format(*numbers) for numbers in zip(*column)))
    return rows


def draw_overview(names, groups, axes):
    width = 0.8 / len(groups)
    for ax, (title, parts, columns) in zip(axes.flat, measures(groups)):
        for n, (mean, std) in enumerate(columns):
            ax.bar(np.arange(len(parts)) + (n + 0.5) * width - 0.4, mean, width, yerr=std)
        ax.set_xticks(range(len(parts)), parts)
        ax.set_title(title)
    ax.figure.legend(ax.containers[1::2], names, loc="outside upper center", ncols=2)
    return "the table as bars (figures 2, 7, 8, 33, 35, 38)"


def draw_histogram(names, results, axes):
    middles, (left, right) = BIN * (np.arange(BINS) + 0.5), axes[0]
    for name, r in zip(names, results):
        counts = np.array(r["jacobian"]["histogram"]) / r["tokens"]
        left.plot(middles, counts[:-1], label=f"{name}; {counts[-1]:.3g} above {BIN * BINS:g}")
        right.plot(middles + BIN / 2, counts.cumsum()[:-1] / counts.sum(), label=name)
    left.set(xlabel="|J|", ylabel=f"elements per token in {BIN:g}", xscale="log", yscale="log")
    right.set(xlabel="|J|", ylabel="share of elements below", xscale="log")
    return "histogram and distribution function of |J| (figures 32, 34)"


def draw_functions(names, results, axes):
    for name, row, lin in zip(names, axes, (r["linearity"] for r in results)):
        J, delta = np.array(lin["scatter"]["J"]), np.array(lin["scatter"]["delta"])
        off, small = np.abs(J + delta) >= 0.1, np.abs(J) < 0.1
        for label, group in (("line", ~off), ("cluster", off & small), ("outlier", off & ~small)):
            row[0].scatter(J[group], delta[group], s=4, label=label)
        row[0].set(xlabel="J", ylabel="change of s_y,i at s_x,j - 1", title=name)
        for ax, kind in zip(row[1:], CLASSES):
            for t, v in lin["examples"][kind]:
                ax.plot(t, v)
            ax.set(xlabel="s_x,j", ylabel="s_y,i", title=kind)
        row[4].hist(np.log10(np.maximum(lin["second"]["max_abs"], 1e-9)), 30)
        row[4].set(xlabel="log10 max |second derivative|", ylabel="functions")
    return "J against a change by 1, functions of each kind, second derivatives (figures 8 to 14)"


def draw_jacobians(names, results, axes):
    top = max((np.max(J) for r in results for J in r["jacobian_pictures"]), default=1)
    for name, row, r in zip(names, axes, results):
        row[0].set_ylabel(name, fontsize=7)
        for ax, J in zip(row, r["jacobian_pictures"]):
            ax.imshow(J, vmin=0, vmax=top, cmap="magma")
    return f"|J| of tokens, rows and columns shuffled, 0 to {top:.3g} (figures 30, 31)"


def draw_plots(options, names, groups, axes):
    for ax, (x, y) in zip(axes.flat, options.plot):
        series = {}
        for group in groups:
            points = [(lookup(r, x), lookup(r, y)) for r in group]
            fine = all(isinstance(value, (int, float)) for point in points for value in point)
            check(fine, f"--plot {x} {y}: expected what is a number in every run")
            point = (lookup(group[0], "jacobian_coef"), *np.concatenate(spread(points)))
            series.setdefault(str(lookup(group[0], options.series)), []).append(point)
        for name, points in series.items():
            _, *means, dx, dy = zip(*sorted(points))
            ax.errorbar(*means, dy, dx, "o-", markersize=4, label=name)
            for coef, *at in sorted(points):
                ax.annotate(f"{coef:g}", at[:2], fontsize=7)
        ax.set(xlabel=x, ylabel=y)
    return f"runs by {options.series}; bars: standard deviation over seeds; numbers: jacobian_coef"


def draw(names, groups, options, folder):
    """Write the figures -> [(file name, caption), ...], none if matplotlib is not installed. Where
    each run has a row or line of its own, a group of runs is shown by its first."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        return []
    plt.switch_backend("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    results, n, done = [group[0] for group in groups], len(options.plot), []
    pictures = max(len(r["jacobian_pictures"]) for r in results)
    jobs = {"overview": (draw_overview, groups, -(-len(TABLE) // 3), 3)}
    jobs["histogram"] = draw_histogram, results, 1, 2
    jobs["functions"] = draw_functions, results, len(results), 5
    jobs["jacobians"] = draw_jacobians, results, len(results), pictures
    jobs |= {"plots": (partial(draw_plots, options), groups, -(-n // 3), min(n, 3))} if n else {}
    for name, (paint, what, rows, columns) in jobs.items():
        size = min(14, 2 + 4 * columns), 1 + 2.7 * rows
        fig, axes = plt.subplots(rows, columns, squeeze=False, figsize=size, layout="constrained")
        caption = paint(names if what is groups else [r["run"] for r in results], what, axes)
        for ax in fig.axes:
            ax.set_visible(ax.has_data())
            ax.tick_params(labelsize=7)
            if ax.get_legend_handles_labels()[0]:
                ax.legend(fontsize=7)
        fig.savefig(folder / f"{name}.png", dpi=120)
        plt.close(fig)
        done.append((f"{name}.png", caption))
    return done


STYLE = """:root{color-scheme:light dark}body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;
margin:auto;padding:1rem}table{border-collapse:collapse;display:block;overflow-x:auto}td{padding:0
.5rem;border:1px solid #8886}img{max-width:100%;background:#fff}details{margin:.2rem 1rem}pre{
margin:0;white-space:pre-wrap;overflow-wrap:anywhere}span{background:rgba(255,140,0,var(--a))}"""


def snippets(examples):
    """Windows of text as HTML, every token shaded by its activation as a share of the largest."""
    lines, top = [], max((example["max"] for example in examples), default=0) or 1
    for example in examples:
        shades = (f'<span style="--a:{value / top:.2f}">' for value in example["acts"])
        texts = (html.escape(token.replace("\n", "↵")) for token in example["tokens"])
        spans = (f"{shade}{text}</span>" for shade, text in zip(shades, texts))
        lines.append(f"<pre>{example['max']:.2f}  {''.join(spans)}</pre>")
    return "".join(lines)


def latents_of(result):
    """Nested details: output latents, their input latents with the edge, examples of both."""
    parts, texts = [], {s: {int(i): e for i, e in v.items()} for s, v in result["examples"].items()}
    for o in result["latents"]:
        inputs = []
        for e in o["inputs"]:
            head = "input latent {latent}: J {mean:.3g} ± {std:.3g}, {count} tokens".format(**e)
            inputs.append(details(head, snippets(texts["x"][e["latent"]])))
        head = f"output latent {o['latent']}: mean |J| {o['mean_abs']:.3g} on {o['tokens']} tokens"
        parts.append(details(head, snippets(texts["y"][o["latent"]]), *inputs))
    return "".join(parts)


def report(results, rows, drawn, folder):
    """-> report.html: one static page; no script, and nothing that is loaded from elsewhere."""
    page = ["<!doctype html><html lang=en><meta charset=utf-8><title>Jacobian SAEs</title>"]
    page += [f"<meta name=viewport content='width=device-width'><style>{STYLE}</style><table>"]
    for row in rows:
        page += ["<tr>", *(f"<td>{html.escape(cell)}</td>" for cell in row), "</tr>"]
    page += ["</table>"]
    for name, caption in drawn:
        picture = base64.b64encode((folder / name).read_bytes()).decode()
        caption = html.escape(caption)
        page += [f'<h2>{caption}</h2><img alt="{caption}" src="data:image/png;base64,{picture}">']
    for r in results:
        page += [f"<h2>{html.escape(r['run'])}: its strongest pairs</h2>", latents_of(r)]
    return "\n".join([*page, "</html>"])


FLAGS = {  # default and help
    "tokens": (50_000, "held-out tokens (the paper: 10M)"),
    "linear-samples": (4000, "random pairs of active latents for linearity (the paper: 1M)"),
    "second-samples": (100, "those whose second derivative is taken"),
    "batch-size": (8, "contexts at a time"),
    "n-latents": (8, "output latents in the report, the strongest"),
    "dataset": ("", "other text than the run's own held-out part"),
    "split": ("validation", "of --dataset on the hub"),
    "seed": (0, "of all that is drawn at random"),
    "device": ("auto", "auto, cpu, cuda, ..."),
    "output-dir": ("", "of report and figures; default: the first run's folder"),
    "series": ("jacobian_penalty", "with --plot, a line for each value of this setting"),
}


def parse(argv):
    """-> the flags as a namespace. After an error, one line on stderr, argparse exits with 2."""
    parser = argparse.ArgumentParser("evaluate.py", description=__doc__.splitlines()[0])
    parser.print_usage = lambda file: None  # an error is one line
    parser.add_argument("runs", nargs="+", help="folders or hub ids of finished runs")
    for name, (default, text) in FLAGS.items():
        text = f"{text} (default: {default or 'none'})"
        parser.add_argument(f"--{name}", type=type(default), default=default, help=text)
    thresholds = [0.005, 0.01, 0.015, 0.02, 0.04]
    parser.add_argument("--thresholds", type=float, nargs="+", default=thresholds, help="of |J|")
    parser.add_argument("--latents", type=int, nargs="+", default=[], help="output latents to show")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--reuse", action="store_true", help="take evaluation.json as it is")
    xy = "draw Y against X over the runs: settings, or paths in evaluation.json"
    parser.add_argument("--plot", nargs=2, action="append", default=[], metavar=("X", "Y"), help=xy)
    options = parser.parse_args(argv)
    options.thresholds.sort()
    for name, value in vars(options).items():
        if type(value) is int and value < (name != "seed"):
            parser.error(f"--{name.replace('_', '-')} is {value}; expected a whole number above 0")
    return options


def evaluation_of(run, options):
    """-> (what evaluation.json holds, its folder: the run's, or of a hub run the output folder)."""
    folder = Path(run) if Path(run).is_dir() else Path(options.output_dir, run.replace("/", "--"))
    saved = folder / "evaluation.json"
    if not (options.reuse and saved.exists()):
        jsae.write_file(saved, json.dumps(evaluate(run, options)).encode())
    with suppress(ValueError):
        result = json.loads(saved.read_text())
        if isinstance(result, dict) and "versions" in result:  # the last key
            return result | {"run": run}, folder
    raise InputError(f"{saved} is no whole evaluation; leave out --reuse")


def main(argv=None) -> int:
    """-> exit status: 0, 2 after one line about what was given, 130 after Ctrl-C."""
    try:
        options = parse(argv)
        results, folders = zip(*(evaluation_of(run, options) for run in options.runs))
        folder, groups = Path(options.output_dir or folders[0]), merged(results)
        rows = table_rows(groups)
        for row in (rows[0], ["--"] * len(rows[0]), *rows[1:]):
            print("|", " | ".join(cell.replace("|", "\\|") for cell in row), "|")
        drawn = draw(rows[0][1:], groups, options, folder / "figures")
        page = report([group[0] for group in groups], rows, drawn, folder / "figures")
        jsae.write_file(folder / "report.html", page.encode())
        check(drawn, "the figures need matplotlib: pip install matplotlib")
        print(f"\nfigures and report: {folder / 'report.html'}")
    except (InputError, OSError, torch.OutOfMemoryError, KeyboardInterrupt, SystemExit) as error:
        return jsae.status_of(error, "evaluate.py")
    return 0


if __name__ == "__main__":
    sys.exit(main())
