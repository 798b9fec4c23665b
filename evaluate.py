"""Evaluation of Jacobian SAEs: the paper's measures, others independent of J's scale, pictures.

    python evaluate.py runs/A                     one run: evaluation.json, figures/, report.html
    python evaluate.py runs/A runs/B --reuse      side by side, of what was measured before
    python evaluate.py --help                     every option

evaluation.json holds every number by its name. ROWS, in section 7, says what the numbers are: it is
the table that is printed, and the glossary of the report. The text is what the run held out of its
own, or --dataset, without the first token of every context.

Errors treat documents as independent; a document is a row of the data set, or a file. A number is
r = sum a / sum b over documents, and the influence of document d is r minus r without d, which is
(a_d - r b_d) / (sum b - b_d). The standard error is the jackknife's, sqrt(D - 1) times the standard
deviation of the D influences. For two runs on the same tokens, the error of their difference is that
of the difference of influences: often ten times smaller. Numbers of all text at once (medians, inputs
over the text, silent latents) have no error. Runs that differ in the seed only are one column: their
mean and standard deviation. The symbols are those of jsae.py.
"""

import base64
import dataclasses
import hashlib
import html
import io
import json
import math
import os
import sys
from itertools import islice, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import jsae
from jsae import Config, InputError, Latents, active_jacobian, notice

# ---- 1. A run and its held-out text --------------------------------------------------------------

TOKENS_AT_A_TIME = 2048  # of the language model; or one context, if that is longer
TOKENS_OF_J = 256  # at a time
MORE_TOKENS = 2**17  # read beyond those evaluated, so that they come from more documents


@dataclasses.dataclass
class Options:
    """How runs are evaluated and shown, each a flag (--tokens 50000)."""

    tokens: int = 50_000  # held-out tokens, or as many as there are (the paper: 10M)
    functions: int = 4000  # random elements of J whose function is looked at (the paper: 1M)
    latents: str = ""  # output latents to show, as 17,5; default: those of the strongest edges
    model: str = ""  # the language model, if it is no longer where it was in training
    dataset: str = ""  # a text to use whole; default: what the run held out of its own text
    split: str = "train"  # of --dataset (the paper: allenai/c4:en, validation)
    column: str = "text"  # of --dataset
    seed: int = 0  # of contexts, functions and random J
    device: str = "auto"  # auto, cpu, cuda, ...
    reuse: bool = False  # take evaluation.json where it holds what is asked for
    all: bool = False  # print every row of the table
    output_dir: str = ""  # of what is written; default: the folder of the (first) run

    def __post_init__(self):
        jsae.check_settings(self)
        if not self.dataset and (self.split, self.column) != ("train", "text"):
            raise InputError("--split and --column are those of --dataset: name it")
        for name in ("model", "dataset"):  # so that --reuse knows them again from another folder
            if os.path.exists(getattr(self, name)):
                setattr(self, name, os.path.abspath(getattr(self, name)))


class Run(NamedTuple):
    """A trained pair with its language model."""

    sae_x: jsae.TopKSAE
    sae_y: jsae.TopKSAE
    mlp: jsae.MLP
    model: nn.Module
    tokenizer: object
    config: Config  # the run's, but with the model, text and device of this evaluation
    part: str  # of the text: "held out" or "all"


def open_run(name, options) -> Run:
    """InputError if it is no finished run, or its language model is gone or has changed."""
    sae_x, sae_y, config = jsae.load_run(name)
    changes = {"device": options.device}
    if options.model:
        changes["model"] = options.model
    elif not Path(config.model).exists() and Path(config.model).name == "tiny-pythia":
        changes["model"] = jsae.DEMO["model"]  # the clone has moved
    if options.dataset:
        changes |= {field: getattr(options, field) for field in ("dataset", "split", "column")}
    config = dataclasses.replace(config, **changes)
    part = "all" if options.dataset else "held out"
    model, tokenizer = jsae.load_model(config)
    mlp = jsae.find_mlp(model, config.layer)
    trained = json.loads((jsae.run_folder(name) / "config.json").read_text())
    if jsae.hash_of_weights(mlp) != trained["mlp_sha256"]:
        raise InputError(f"{name}: the MLP of {config.model} is not the one that it was trained on")
    for module in (sae_x, sae_y, mlp):
        module.to(model.device).requires_grad_(False)
    return Run(sae_x, sae_y, mlp, model, tokenizer, config, part)


def held_out_text(run, n_tokens, seed):
    """-> ids and documents, (contexts, T): token ids, the number of the document each is of.

    Text is packed into contexts as in training, and some of them are drawn. InputError if there are
    none.
    """
    width = run.config.context_size - 1
    n_contexts = math.ceil(n_tokens / width)
    contexts = jsae.token_contexts(run.config, run.tokenizer, run.part)
    text = list(islice(contexts, n_contexts + MORE_TOKENS // width))
    name = f"{run.config.dataset} ({run.part})"
    if not text:
        raise InputError(f"{name} does not fill one context; name another text by --dataset")
    if len(text) < n_contexts:
        notice(f"{name} has only {len(text) * width:,} tokens")
    chosen = np.random.default_rng(seed).permutation(len(text))[:n_contexts]
    ids, documents = zip(*[text[n] for n in chosen])
    _, documents = torch.tensor(documents).unique(return_inverse=True)  # counted from 0
    return torch.tensor(ids), documents


class Tokens(NamedTuple):
    """The B = contexts * (T - 1) tokens of some contexts, and what the pair makes of them."""

    ids: Tensor  # (contexts, T), with the first token of each context, which is not one of the B
    documents: Tensor  # (B,), number of the document that each token is of
    x: Tensor  # (B, d_model), input of the MLP
    y: Tensor  # (B, d_model), its output
    s_x: Latents  # (B, k)
    s_y: Latents  # (B, k)
    x_hat: Tensor  # (B, d_model)
    y_hat: Tensor  # (B, d_model)
    J: Tensor  # (B, k, k)


def inputs_of(run, ids):
    """Yield (ids, x (B, d_model)) of a few contexts at a time. InputError if an x is not finite."""
    at_a_time = max(1, TOKENS_AT_A_TIME // ids.shape[1])  # contexts
    for batch in ids.split(at_a_time):
        batch = batch.to(run.model.device)
        x = jsae.mlp_inputs(run.model, run.mlp, batch)[:, 1:].flatten(0, 1)
        if not x.isfinite().all():
            raise InputError("NaN or Inf among the inputs of the MLP on the held-out text")
        yield batch, x


def mean_activations(run, ids):
    """-> the means of x and of y over all tokens, (d_model,) each."""
    sums = 0
    for _, x in inputs_of(run, ids):
        sums = sums + torch.stack([x.double().sum(0), run.mlp(x).double().sum(0)])
    return (sums / ids[:, 1:].numel()).float()


def jacobian(run, x, s_x, s_y):
    """J (B, k, k) of x (B, d_model), some tokens at a time: (tokens, k, d_mlp) is large."""
    parts = []
    chunks = zip(*[t.split(TOKENS_OF_J) for t in (x, *s_x, *s_y)])
    for v, acts_x, idx_x, acts_y, idx_y in chunks:
        latents = Latents(acts_x, idx_x), Latents(acts_y, idx_y)
        parts.append(active_jacobian(run.sae_x, run.sae_y, run.mlp, v, *latents))
    return torch.cat(parts)


def batches(run, ids, documents):
    """Yield the Tokens of all contexts."""
    done = 0
    with tqdm(total=len(ids), unit=" contexts", leave=False) as bar:
        for batch, x in inputs_of(run, ids):
            own = documents[done : done + len(batch), 1:].flatten()
            y = run.mlp(x)
            s_x = run.sae_x.encode(x)
            s_y = run.sae_y.encode(y)
            x_hat = run.sae_x.decode(s_x)
            y_hat = run.sae_y.decode(s_y)
            J = jacobian(run, x, s_x, s_y)
            yield Tokens(batch, own, x, y, s_x, s_y, x_hat, y_hat, J)
            done += len(batch)
            bar.update(len(batch))


# ---- 2. Numbers and their errors over documents --------------------------------------------------


class Number(NamedTuple):
    """A number, and the influence on it of each of D documents, (D,)."""

    value: float
    influence: Tensor


def error_of(influence):
    """The jackknife's standard error, of a number or of the difference of two. NaN if D is 1."""
    influence = torch.as_tensor(influence, dtype=torch.double)
    D = len(influence)
    return (math.sqrt(D - 1) * influence.std(correction=0)).item() if D > 1 else math.nan


def ratio(a, b) -> Number:
    """r = sum a / sum b, for sums a, b (D,) over documents."""
    r = a.sum() / b.sum()
    return Number(r.item(), (a - r * b) / (b.sum() - b))


class Sums:
    """Sums over the tokens of each document, and counts, of any number of quantities by name."""

    def __init__(self, n_documents):
        self.n_documents = n_documents
        self.sums = {}  # name -> (D,)
        self.counts = {}  # name -> (D,), tokens

    def add(self, documents, values):
        """values {name: (B,)} of B tokens of the documents (B,). NaN: not defined, not counted."""
        for name, value in values.items():
            value = value.double().cpu()
            counted = ~value.isnan()
            document = documents[counted]
            total = torch.bincount(document, value[counted], self.n_documents)
            count = torch.bincount(document, minlength=self.n_documents)
            self.sums[name] = self.sums.get(name, 0) + total
            self.counts[name] = self.counts.get(name, 0) + count

    def numbers(self) -> dict[str, Number]:
        """-> the means of all quantities, and the ratios that are made of them."""
        sums = self.sums
        found = {name: ratio(total, self.counts[name]) for name, total in sums.items()}
        for side in ("x", "y"):
            variance = sums[f"variance.{side}"]
            explained = ratio(variance - sums[f"mse.{side}"], variance)
            found[f"explained_variance.{side}"] = explained
        for site, zero in (("x", "x_zero"), ("y", "y_zero"), ("path", "y_zero")):
            worth = found[f"ce_lost.{zero}"]  # what the language model loses without the MLP
            error = error_of(worth.influence)
            least = 0 if math.isnan(error) else 2 * error
            if worth.value > least:
                ablated = sums[f"ce_lost.{zero}"]
                found[f"ce_score.{site}"] = ratio(ablated - sums[f"ce_lost.{site}"], ablated)
            else:
                notice(f"no CE score of {site}: the language model hardly loses by {zero}")
        return found


# ---- 3. The measures: of a batch of tokens, one number a token -----------------------------------

THRESHOLDS = (0.005, 0.01, 0.015, 0.02, 0.04)  # of |J|


def reconstruction(side, v, v_hat, mean, s):
    """Of v (B, d_model), which is x or y, whose mean over all tokens is given (Appendix E)."""
    return {
        f"mse.{side}": (v_hat - v).square().mean(1),
        f"variance.{side}": (v - mean).square().mean(1),
        f"cosine.{side}": F.cosine_similarity(v_hat, v),
        f"active.{side}": (s.acts > 0).sum(1),
    }


def cross_entropies(run, ids, y):
    """-log p of the tokens ids[:, 1:], in nats, (contexts * (T - 1),).

    y (contexts * (T - 1), d_model) takes the place of the MLP's output, but for the first token of
    each context, where it stays what it is. The prediction made there is not counted: NaN.
    """

    def replace(module, args, output):
        old = output.reshape(*ids.shape, -1)
        new = torch.cat([old[:, :1], y.view_as(old[:, 1:])], 1)
        return new.view_as(output)

    with run.mlp.maps[-1].register_forward_hook(replace):
        logits = run.model(input_ids=ids, use_cache=False).logits
    values = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    values = values.view(len(ids), -1)
    values[:, 0] = math.nan
    return values.flatten()


def losses(run, tokens):
    """The cross-entropy with x, y or the whole path from x to y replaced, or set to 0."""
    y_of_x_hat = run.mlp(tokens.x_hat)
    replacements = {
        "clean": tokens.y,
        "x": y_of_x_hat,
        "y": tokens.y_hat,
        "path": run.sae_y(y_of_x_hat),
        "x_zero": run.mlp(torch.zeros_like(tokens.x)),
        "y_zero": torch.zeros_like(tokens.y),
    }
    numbers = {}
    for name, y in replacements.items():
        numbers[f"ce.{name}"] = cross_entropies(run, tokens.ids, y).double()
        numbers[f"ce_lost.{name}"] = numbers[f"ce.{name}"] - numbers["ce.clean"]
    return numbers


def size(J):
    """Of J (B, k, k): how large it is, and how many elements are above thresholds."""
    A = J.abs().double().flatten(1)
    numbers = {
        "mean_abs": A.mean(1),
        "l1": A.sum(1),
        "l2": A.norm(dim=1),
        "l4": A.norm(4, dim=1),
        "linf": A.amax(1),
        "not_zero": A.any(1),
    }
    for threshold in THRESHOLDS:
        numbers[f"above.{threshold}"] = (A > threshold).sum(1)
    return numbers


def sparsity(J):
    """Of J (B, k, k): how few elements hold most of it, independent of scale; NaN if all are 0."""
    A = J.abs().double().flatten(1)
    l1 = A.sum(1)
    root = A.shape[1] ** 0.5
    held = A.sort(1, descending=True).values.cumsum(1) / l1.unsqueeze(1)  # by the n largest
    n_least = (held < 0.9).sum(1) + 1
    numbers = {
        "hold_90": n_least.double().where(l1 > 0, math.nan),
        "hoyer": (root - l1 / A.norm(dim=1)) / (root - 1),
    }
    for exponent in range(A.shape[1].bit_length()):
        numbers[f"held_by.{2**exponent}"] = held[:, 2**exponent - 1]
    return numbers


def effective_inputs(ending, J, acts):
    """Of J (B, k, k) and s_x,j (B, k): on how many inputs an output latent depends, on average, and
    how much all of them depend on the same one. NaN if J is 0.
    """
    c = J.double() * acts.double().unsqueeze(1)  # what input latent j adds to output latent i
    p = c.square() / c.square().sum(2, keepdim=True)  # a row without inputs is NaN
    return {
        f"effective_inputs{ending}": (1 / p.square().sum(2)).nanmean(1),
        f"hub{ending}": p.nanmean(1).amax(1),
    }


def measures(run, tokens, random_J, mean_x, mean_y):
    """-> {name: (B,)}, all that is a mean over tokens. random_J is 0 where J is."""
    numbers = reconstruction("x", tokens.x, tokens.x_hat, mean_x, tokens.s_x)
    numbers |= reconstruction("y", tokens.y, tokens.y_hat, mean_y, tokens.s_y)
    numbers |= losses(run, tokens)
    numbers |= size(tokens.J)
    numbers |= sparsity(tokens.J)
    numbers |= effective_inputs("", tokens.J, tokens.s_x.acts)
    numbers |= effective_inputs("_random", random_J, tokens.s_x.acts)
    return numbers


def of_few_tokens(side, mse, variance):
    """From mse and variance (tokens,) of x or y: few of huge norm can hold most of the variance."""
    largest = variance.sort(descending=True).values[: math.ceil(len(variance) / 100)]
    return {
        f"explained_variance_median.{side}": (1 - mse / variance).median().item(),
        f"variance_of_top_1_percent.{side}": (largest.sum() / variance.sum()).item(),
    }


# ---- 4. Functions of one latent (section 5.4, Appendix B) ----------------------------------------

KINDS = ("linear", "jumprelu", "other")


def along_latent(run, x, i, j, change):
    """s_y,i of a token x (d_model,) when s_x,j is changed by each of `change` (n,): (n,). Eq. 30.

    The true x is moved along the decoder row of j, so that the SAE's error stays what it is.
    """
    s_y = run.sae_y.encode(run.mlp(x + change.unsqueeze(1) * run.sae_x.W_dec[j]))
    return (s_y.acts * (s_y.idx == i)).sum(1)


def residual(t, v):
    """The largest distance of v from a least-squares line in t."""
    slope, intercept = np.polyfit(t, v, 1)
    return np.abs(v - slope * t - intercept).max()


def span(v):
    """How far v ranges; what is flat up to rounding is a line."""
    return max(np.ptp(v), 1e-4 * np.abs(v).max())


def kind_of(t, v, relative):
    """linear, jumprelu (0 on one stretch that touches an end, a line on the rest) or other.

    Linear is what is within 0.01 of a line; relative: within 0.01 of its own range.
    """

    def is_line(t, v):
        return residual(t, v) <= 0.01 * (span(v) if relative else 1)

    if is_line(t, v):
        return "linear"
    rest = np.flatnonzero(v)
    is_one_stretch = rest[-1] - rest[0] == len(rest) - 1
    touches_an_end = rest[0] == 0 or rest[-1] == len(v) - 1
    jumps = is_one_stretch and touches_an_end and len(rest) >= 2
    return "jumprelu" if jumps and is_line(t[rest], v[rest]) else "other"


class Function(NamedTuple):
    """s_y,i = v where s_x,j is set to t, of a random active pair i, j. The token is at (s_x, s_y).

    delta is how s_y,i changes when 1 is subtracted from s_x,j.
    """

    document: int
    J: float
    s_x: float
    s_y: float
    delta: float
    t: np.ndarray
    v: np.ndarray


def random_functions(run, tokens, n, generator):
    """-> the Functions of n random elements of J, without those that ReLU cut off."""
    functions = []
    for _ in range(n):
        b, i, j = (int(torch.randint(n, (), generator=generator)) for n in tokens.J.shape)
        s = tokens.s_x.acts[b, j].item()
        if s == 0 or tokens.s_y.acts[b, i] == 0:
            continue
        place = tokens.x[b], tokens.s_y.idx[b, i], tokens.s_x.idx[b, j]
        t = np.linspace(0, max(5, s + 1), 100)
        v = along_latent(run, *place, torch.tensor(t - s).to(tokens.x))
        s_y, s_y_less = along_latent(run, *place, tokens.x.new_tensor([0, -1])).tolist()
        J = tokens.J[b, i, j].item()
        document = int(tokens.documents[b])
        functions.append(Function(document, J, s, s_y, s_y_less - s_y, t, v.cpu().numpy()))
    return functions


def linearity(functions):
    """Of each function, 1 or 0: its kind, and whether J says what subtracting 1 does."""
    J = torch.tensor([f.J for f in functions])
    off = (J + torch.tensor([f.delta for f in functions])).abs()
    numbers = {"on_line": off < 0.1, "on_line_relative": off < 0.1 * J.abs()}
    for ending, relative in (("", False), ("_relative", True)):
        kinds = [kind_of(f.t, f.v, relative) for f in functions]
        for kind in KINDS:
            numbers[f"{kind}{ending}"] = torch.tensor([own == kind for own in kinds])
    return numbers


def curves_of(functions):
    """-> {kind: six functions to draw}; of "other" those that are furthest from a line."""
    curves = {kind: [] for kind in KINDS}
    for f in functions:
        curves[kind_of(f.t, f.v, relative=False)].append(f)
    curves["other"].sort(key=lambda f: residual(f.t, f.v) / span(f.v), reverse=True)
    return {
        kind: [{"t": f.t.tolist(), "v": f.v.tolist(), "at": (f.s_x, f.s_y)} for f in own[:6]]
        for kind, own in curves.items()
    }


# ---- 5. What feeds an output latent over the text (figure 36, section 5.2, Appendix C) -----------

N_LATENTS = 8  # output latents that are shown
N_INPUTS = 8  # input latents that are shown of each
N_EXAMPLES = 8  # texts that are shown of a latent
EXAMPLE_TOKENS = 2**18  # of the text, in which they are looked for
LEAST_TOKENS = 20  # on which an output latent must be active to be counted or chosen
LEAST_DOCUMENTS = 5  # likewise, to be chosen


class Connections:
    """Sums over tokens, for an output latent of each row and all n input latents.

    There are rows for all n output latents or, if n is above 4096, for those that are asked for and
    2^24 / n random ones.
    """

    def __init__(self, n_latents, asked, n_documents, seed, device):
        n_rows = min(n_latents, max(1, 2**24 // n_latents))
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randperm(n_latents, generator=generator)[:n_rows].tolist()
        self.latents = list(dict.fromkeys([*drawn, *asked]))  # each once
        self.n_drawn = n_rows
        n_rows = len(self.latents)
        self.row_of = torch.full((n_latents,), -1, device=device)  # -1: no row
        self.row_of[self.latents] = torch.arange(n_rows, device=device)
        self.n_tokens = torch.zeros(n_rows, device=device)  # on which the output latent is active
        self.in_document = torch.zeros(n_rows, n_documents, dtype=torch.bool, device=device)
        self.n_both = torch.zeros(
            n_rows, n_latents, device=device
        )  # on which input and output latent are
        self.sum = torch.zeros_like(self.n_both)  # of J
        self.sum_abs = torch.zeros_like(self.n_both)  # of |J|
        self.C = torch.zeros_like(self.n_both)  # contributions: of |J s_x,j|
        self.C_random = torch.zeros_like(self.n_both)  # the same of a random J

    def add(self, tokens, random_J):
        """Add a batch: its Tokens, and a random J (B, k, k) that is 0 where J is."""
        row = self.row_of[tokens.s_y.idx]  # (B, k)
        b, i = ((tokens.s_y.acts > 0) & (row >= 0)).nonzero(as_tuple=True)
        row = row[b, i]  # of the N active output latents that have one
        self.n_tokens += torch.bincount(row, minlength=len(self.n_tokens))
        self.in_document[row, tokens.documents.to(row.device)[b]] = True
        acts = tokens.s_x.acts[b]  # (N, k)
        J = tokens.J[b, i]
        quantities = {
            "n_both": (acts > 0).to(J.dtype),
            "sum": J,
            "sum_abs": J.abs(),
            "C": (J * acts).abs(),
            "C_random": (random_J[b, i] * acts).abs(),
        }
        places = row.unsqueeze(1), tokens.s_x.idx[b]
        for name, values in quantities.items():
            getattr(self, name).index_put_(places, values, accumulate=True)

    def numbers(self):
        """-> {name: number}: of pairs of latents, and of the inputs of output latents.

        With p_ij = C_ij / sum_j C_ij, an output latent has 1 / sum_j p_ij^2 inputs effectively. Its
        weight in a mean is its contribution, sum_j C_ij.
        """
        drawn = slice(self.n_drawn)
        mean = self.sum_abs[drawn] / self.n_tokens[drawn].clamp(min=1).unsqueeze(1)
        numbers = {f"global.{t}": (mean > t).double().mean().item() for t in THRESHOLDS}
        is_counted = self.n_tokens[drawn] >= LEAST_TOKENS
        for ending, C in (("", self.C), ("_random", self.C_random)):
            C = C[drawn][is_counted]
            weight = C.sum(1)
            C = C[weight > 0]
            weight = weight[weight > 0].double()
            shares = (C / C.sum(1, keepdim=True)).double()
            effective = 1 / shares.square().sum(1)
            largest = shares.topk(min(10, shares.shape[1])).values
            numbers[f"text_inputs{ending}"] = weighted_mean(effective, weight)
            numbers[f"text_inputs_median{ending}"] = effective.median().item()
            for n, share in enumerate(largest.T, 1):
                numbers[f"input_share{ending}.{n}"] = weighted_mean(share, weight)
        return numbers

    def strongest(self, n=N_LATENTS):
        """-> n output latents, by what their strongest input contributes to them on a token.

        They are active on 20 tokens and in 5 documents at least (in all, if there are fewer).
        """
        strength = self.C.amax(1) / self.n_tokens.clamp(min=1)
        is_common = self.n_tokens >= LEAST_TOKENS
        is_common &= self.in_document.sum(1) >= min(LEAST_DOCUMENTS, self.in_document.shape[1])
        strength, rows = (strength * is_common).sort(descending=True)
        n = min(n, int((strength > 0).sum()))
        return [self.latents[row] for row in rows[:n].tolist()]

    def strongest_inputs(self, latent):
        """-> the input latents that contribute most to an output latent, with share and mean J."""
        row = self.row_of[latent]
        contribution, order = self.C[row].sort(descending=True)
        n = min(N_INPUTS, int((contribution > 0).sum()))
        shares = (contribution / contribution.sum()).tolist()
        inputs = []
        for j, share in zip(order[:n].tolist(), shares):
            mean = (self.sum[row, j] / self.n_both[row, j]).item()
            inputs.append({"latent": j, "share": share, "mean_J": mean})
        return inputs


def weighted_mean(values, weight):
    return ((values * weight).sum() / weight.sum()).item()


def values_of(latent, s, ids):
    """-> the latent's values at all tokens but the first of contexts, (contexts, T - 1)."""
    return (s.acts * (s.idx == latent)).sum(1).view(len(ids), -1)


def examples_of(latent, ids, s, tokenizer):
    """-> texts in which a latent is active, 10 tokens before it and 5 after, by falling value.

    The first is where it is largest; the others stand at equal steps of the sum of its values, so
    that they show what it stands for most. ids (contexts, T), Latents (contexts * (T - 1), k).
    """
    values = values_of(latent, s, ids)
    falling, order = values.flatten().sort(descending=True)
    total = falling.double().cumsum(0)
    steps = torch.arange(N_EXAMPLES, device=total.device) / N_EXAMPLES
    places = order[torch.searchsorted(total, steps * total[-1])].unique_consecutive()
    examples = []
    for place in places.tolist():
        n, token = divmod(place, values.shape[1])
        if values[n, token] > 0:
            start = max(0, token - 10)
            shown = slice(start, start + 16)
            words = words_of(ids[n, 1:][shown], tokenizer)
            at = token - start  # which of them
            examples.append({"tokens": words, "acts": values[n, shown].tolist(), "at": at})
    return examples


def latents_of(connections, chosen, kept, tokenizer):
    """-> the chosen output latents, with their input latents and examples of both.

    kept: ids (contexts, T) and Latents s_x, s_y of the text that examples, and the counts of tokens
    on which both are active, are taken from.
    """
    ids, s_x, s_y = kept
    latents = []
    for latent in chosen:
        is_active = values_of(latent, s_y, ids) > 0
        inputs = connections.strongest_inputs(latent)
        for edge in inputs:
            both = ids[:, 1:][is_active & (values_of(edge["latent"], s_x, ids) > 0)]
            edge["tokens"] = len(both)
            edge["different_tokens"] = len(both.unique())
            edge["examples"] = examples_of(edge["latent"], ids, s_x, tokenizer)
        inputs = [edge for edge in inputs if edge["examples"]]
        examples = examples_of(latent, ids, s_y, tokenizer)
        latents.append({"latent": latent, "examples": examples, "inputs": inputs})
    return latents


def with_inputs(latents):
    """-> those that are active together with their first input in the text of the examples."""
    return [latent for latent in latents if latent["inputs"] and latent["inputs"][0]["tokens"]]


def joined(parts):
    """Latents of several batches as one."""
    return Latents(torch.cat([s.acts for s in parts]), torch.cat([s.idx for s in parts]))


def words_of(ids, tokenizer):
    """Token ids -> the text that each one adds; the last of those that make up a character."""
    ids = ids.tolist()
    texts = [tokenizer.decode(ids[:n]).rstrip("\ufffd") for n in range(len(ids) + 1)]
    return [after[len(before) :] for before, after in pairwise(texts)]


def set_to_zero(run, kept, i, j):
    """What happens to output latent i when input latent j is set to 0, beside what J says.

    -> medians, over the tokens of at most 100 contexts on which both are active, of s_y,i, of its
    change and of -J s_x,j; the number of these tokens, and the share at which s_y,i becomes 0.
    """
    ids, s_x, s_y = kept
    both = (values_of(i, s_y, ids) > 0) & (values_of(j, s_x, ids) > 0)
    chosen = both.any(1).nonzero()[:100, 0]  # contexts
    x = torch.cat([x for _, x in inputs_of(run, ids[chosen])])[both[chosen].flatten()]
    s_x = run.sae_x.encode(x)  # of these tokens
    s_y = run.sae_y.encode(run.mlp(x))
    J = jacobian(run, x, s_x, s_y)
    at_i = (s_y.idx == i) & (s_y.acts > 0)  # (B, k)
    at_j = (s_x.idx == j) & (s_x.acts > 0)
    rows = []
    for b in (at_i.any(1) & at_j.any(1)).nonzero()[:, 0].tolist():
        s = s_x.acts[b, at_j[b]]  # (1,)
        before = s_y.acts[b, at_i[b]].item()
        after = along_latent(run, x[b], i, j, -s).item()
        predicted = -(J[b, at_i[b]][0, at_j[b]] * s).item()
        rows.append((before, after - before, predicted, after == 0))
    if not rows:  # an activation at the border, in another batch
        return None
    s_y_i, change, predicted, _ = np.median(rows, 0).tolist()
    return {
        "s_y": s_y_i,
        "change": change,
        "predicted": predicted,
        "tokens": len(rows),
        "gone": np.mean(rows, 0)[3].item(),
    }


# ---- 6. One run ----------------------------------------------------------------------------------


def latents_asked_for(text, n_latents):
    """The numbers in --latents. InputError unless all are numbers of latents."""
    words = text.split(",") if text else []
    if not all(word.strip().isdecimal() and int(word) < n_latents for word in words):
        raise InputError(f"--latents is {text!r}; expected some of 0 to {n_latents - 1}, as 17,5")
    return [int(word) for word in words]


class Measured(NamedTuple):
    """What one pass over the text gives."""

    sums: Sums
    connections: Connections
    by_token: dict  # of mse and variance of x and y: (tokens,) each
    is_silent: Tensor  # (2, n_latents), of x and of y
    functions: list
    kept: tuple  # ids, s_x, s_y of the text that examples are taken from


def measure(run, ids, documents, asked, options) -> Measured:
    """One pass over the contexts ids, documents (contexts, T); asked: output latents to show."""
    n_latents = len(run.sae_x.W_enc)
    n_tokens = ids[:, 1:].numel()
    n_documents = int(documents.max()) + 1
    device = run.model.device
    mean_x, mean_y = mean_activations(run, ids)
    drawing = torch.Generator().manual_seed(options.seed)
    drawing_J = torch.Generator(device).manual_seed(options.seed)
    sums = Sums(n_documents)
    connections = Connections(n_latents, asked, n_documents, options.seed, device)
    by_token = {name: [] for name in ("mse.x", "variance.x", "mse.y", "variance.y")}
    is_silent = torch.ones(2, n_latents, dtype=torch.bool, device=device)
    functions = []
    n_drawn = n_done = 0  # functions, tokens
    kept = []
    for tokens in batches(run, ids, documents):
        random_J = torch.randn(tokens.J.shape, generator=drawing_J, device=device)
        random_J *= tokens.J != 0
        values = measures(run, tokens, random_J, mean_x, mean_y)
        sums.add(tokens.documents, values)
        connections.add(tokens, random_J)
        for name, batch in by_token.items():
            batch.append(values[name])
        for side, s in enumerate((tokens.s_x, tokens.s_y)):
            is_silent[side, s.idx[s.acts > 0]] = False
        n_done += len(tokens.x)
        n_functions = options.functions * n_done // n_tokens - n_drawn
        n_drawn += n_functions
        functions += random_functions(run, tokens, n_functions, drawing)
        if n_done <= EXAMPLE_TOKENS or not kept:
            kept.append((tokens.ids, tokens.s_x, tokens.s_y))
    if functions:
        sums.add(torch.tensor([f.document for f in functions]), linearity(functions))
    by_token = {name: torch.cat(batch) for name, batch in by_token.items()}
    all_ids, all_x, all_y = zip(*kept)
    kept = torch.cat(all_ids), joined(all_x), joined(all_y)
    return Measured(sums, connections, by_token, is_silent, functions, kept)


@torch.no_grad()
def evaluate(name, options):
    """-> what evaluation.json holds. Numbers that are not defined are left out."""
    run = open_run(name, options)
    asked = latents_asked_for(options.latents, len(run.sae_x.W_enc))
    ids, documents = held_out_text(run, options.tokens, options.seed)
    jsae.check_text(run.model, run.mlp, ids.to(run.model.device))
    found = measure(run, ids, documents, asked, options)

    with_errors = found.sums.numbers()
    numbers = {key: number.value for key, number in with_errors.items()}
    for side in ("x", "y"):
        variance = found.by_token[f"variance.{side}"]
        numbers |= of_few_tokens(side, found.by_token[f"mse.{side}"], variance)
    numbers |= found.connections.numbers()
    numbers["silent.x"], numbers["silent.y"] = found.is_silent.sum(1).tolist()
    n_words = run.model.get_input_embeddings().weight.shape[0]
    if numbers["ce.clean"] > 0.8 * math.log(n_words):
        loss = f"the language model's loss is {numbers['ce.clean']:.2f} nats a token"
        notice(f"{loss}, near to guessing: is this the text, and the tokenizer, that it knows?")
    influence = {}
    for key, number in with_errors.items():
        if math.isfinite(error_of(number.influence)):
            influence[key] = [float(f"{value:.6g}") for value in number.influence.tolist()]

    chosen = asked or found.connections.strongest()
    latents = latents_of(found.connections, chosen, found.kept, run.tokenizer)
    for latent in with_inputs(latents)[:1]:  # the exhibit
        strongest = latent["inputs"][0]["latent"]
        latent["set_to_zero"] = set_to_zero(run, found.kept, latent["latent"], strongest)
    content = torch.stack([ids, documents]).numpy().tobytes()
    return {
        "text": {
            "dataset": f"{run.config.dataset}, {run.config.split}, {run.config.column} ({run.part})",
            "tokens": ids[:, 1:].numel(),
            "documents": int(documents.max()) + 1,
            "seed": options.seed,
            "sha256": hashlib.sha256(content).hexdigest(),
        },
        "numbers": {key: value for key, value in numbers.items() if math.isfinite(value)},
        "errors": {key: error_of(values) for key, values in influence.items()},
        "influence": influence,
        "scatter": [(f.J, f.delta) for f in found.functions[:1000]],
        "curves": curves_of(found.functions),
        "latents": latents,
    }


# ---- 7. Table, figures, report -------------------------------------------------------------------

N_SHOWN = 13  # rows that are printed without --all
ROWS = {  # name of a number: its title in the table
    "explained_variance.x": "explained variance of x",
    "explained_variance.y": "explained variance of y",
    "ce_score.path": "CE score of the whole path",
    "ce_lost.path": "nats lost by the whole path",
    "mean_abs": "mean |J|",
    "above.0.01": "elements with |J| > 0.01",
    "hold_90": "elements that hold 90 % of sum |J|",
    "effective_inputs": "effective inputs at a token",
    "effective_inputs_random": "  the same of a random J",
    "text_inputs": "effective inputs over the text",
    "text_inputs_random": "  the same of a random J",
    "input_share.1": "share of the strongest input",
    "input_share_random.1": "  the same of a random J",
    "text_inputs_median": "effective inputs over the text, median",
    "text_inputs_median_random": "  the same of a random J",
    "hub": "hub",
    "hub_random": "  the same of a random J",
    "hoyer": "Hoyer sparsity of J",
    "explained_variance_median.x": "explained variance of x, median token",
    "explained_variance_median.y": "explained variance of y, median token",
    "variance_of_top_1_percent.x": "share of x's variance in 1 % of tokens",
    "variance_of_top_1_percent.y": "share of y's variance in 1 % of tokens",
    "ce_score.x": "CE score of x",
    "ce_score.y": "CE score of y",
    "ce_lost.x": "nats lost by x",
    "ce_lost.y": "nats lost by y",
    "ce_lost.y_zero": "nats lost by y = 0",
    "ce.clean": "cross-entropy of the language model, nats",
    "above.0.005": "elements with |J| > 0.005",
    "above.0.015": "elements with |J| > 0.015",
    "above.0.02": "elements with |J| > 0.02",
    "above.0.04": "elements with |J| > 0.04",
    "l1": "L1 norm of J",
    "l2": "L2 norm of J",
    "l4": "L4 norm of J",
    "linf": "largest |J|",
    "global.0.01": "share of pairs with mean |J| > 0.01",
    "linear": "functions: linear",
    "jumprelu": "functions: JumpReLU",
    "other": "functions: other",
    "linear_relative": "linear, within 1 % of their range",
    "jumprelu_relative": "JumpReLU, within 1 % of their range",
    "on_line": "|J + delta| < 0.1",
    "on_line_relative": "|J + delta| < 0.1 |J|",
    "not_zero": "share of tokens whose J is not 0",
    "mse.x": "mean squared error of x",
    "mse.y": "mean squared error of y",
    "cosine.x": "cosine of x and x_hat",
    "cosine.y": "cosine of y and y_hat",
    "active.x": "active latents of x at a token",
    "active.y": "active latents of y at a token",
    "silent.x": "latents of x never active on this text",
    "silent.y": "latents of y never active on this text",
}
GLOSSARY = """
explained variance: 1 - sum of (x_hat - x)^2 / sum of (x - mean x)^2, over all elements; 1: perfect
whole path: y is computed from the latents of x alone, x_hat through the MLP and the SAE of y
CE score: (ablated - sae) / (ablated - clean), cross-entropies; ablated: x or y (of the path y) is 0
elements: of a token's k^2 elements of J; above a threshold: fewer if J is sparser or just smaller
hold 90 %: fewer only if J is sparser, independent of scale
effective inputs at a token: 1 / sum_j p_ij^2 of output latent i, p_ij = c_ij^2 / sum_j c_ij^2 with the
contributions c_ij = J_ij s_x,j; a mean over output latents and over tokens whose J is not 0
effective inputs over the text: 1 / sum_j P_ij^2, P_ij = C_ij / sum_j C_ij, where C_ij is the sum of
|c_ij| over tokens; a mean weighted by sum_j C_ij over output latents active on 20 tokens or more.
It grows with the text: compare on the same tokens. Above 4096 latents, of a random sample
share of the strongest input: max_j P_ij, the same mean; a random J: what the sizes of s_x alone give
hub: max_j of the mean of p_ij over i; 1: one input latent feeds all output latents of a token
Hoyer sparsity: (k - L1 / L2) / (k - 1); 0: all elements alike, 1: only one
median token: which no token of huge norm decides; 1 % of tokens: those of the largest variance
pairs: of input and output latents; mean |J| over tokens where the output latent is active (figure 36)
functions: s_y,i over s_x,j of [0, max(5, s_x,j + 1)], of random active pairs; linear: within 0.01 of
a line, JumpReLU: 0 and then a line (figure 8b); within 1 % of their range: not made so by being small
delta: how s_y,i changes when 1 is subtracted from s_x,j (figure 8c, there of pairs of equal rank)
"""


def name_of(settings):
    """What a pair is: traditional, or a JSAE with its lambda and penalty."""
    if settings["jacobian_coef"] == 0:
        return "traditional SAEs"
    penalty = "" if settings["penalty"] == "l1" else f" of {settings['penalty']}"
    return f"JSAE, lambda {settings['jacobian_coef']:g}{penalty}"


def facts_of(result):
    """A sentence about a run and its evaluation."""
    facts = "{model}, layer {layer}; k {k}, R {expansion_factor}; trained on {tokens:,} tokens of {dataset}"
    facts = facts.format(**result["settings"])
    if result["settings"]["randomize_weights"] != "none":
        facts = f"random control {result['settings']['randomize_weights']} of {facts}"
    on = "{tokens:,} tokens, {documents} documents of {dataset}, seed {seed}".format(
        **result["text"]
    )
    return f"{facts}; evaluated on {on}"


def without_seed(settings):
    """-> settings that are the same in runs that differ in the seed only."""
    left_out = ("seed", "output_dir", "device")
    same = {name: value for name, value in settings.items() if name not in left_out}
    if settings["jacobian_coef"] == 0:
        same["penalty"] = "l1"  # whichever it is
    return same


def grouped(results):
    """-> {label: results that differ in the seed only}, by lambda; the label says what differs."""
    groups = {}  # what results have in common, as JSON -> results
    for result in sorted(results, key=lambda result: result["settings"]["jacobian_coef"]):
        common = without_seed(result["settings"]) | {"text": result["text"]}
        groups.setdefault(json.dumps(common, sort_keys=True), []).append(result)
    commons = [json.loads(key) for key in groups]
    labeled = {}
    for common, group in zip(commons, groups.values()):
        label = name_of(common)
        for name, value in common.items():
            differs = any(other.get(name) != value for other in commons)
            if differs and name not in ("jacobian_coef", "penalty", "text"):
                label += f", {name} {value}"
        if any(other["text"] != common["text"] for other in commons):
            label += ", on {tokens:,} tokens, seed {seed}, of {dataset}".format(**common["text"])
        if label in labeled:
            label += f", {group[0]['run']}"
        labeled[label] = group
    return labeled


def measured(group, name):
    """-> a number of a group of runs and its error; NaN for what is not defined.

    One run: the number, standard error over documents. Several: mean, standard deviation.
    """
    values = [result["numbers"].get(name, math.nan) for result in group]
    if len(group) == 1:
        return values[0], group[0]["errors"].get(name, math.nan)
    return np.mean(values), np.std(values, ddof=1)


def difference(group, first, name):
    """-> a number of a group less that of the first group, and its error; NaN: not defined.

    Two runs on the same tokens: the error over their documents, paired. Groups that share several
    seeds: mean and standard deviation of the differences by seed.
    """
    if len(group) == len(first) == 1:
        old, new = first[0], group[0]
        change = measured(group, name)[0] - measured(first, name)[0]
        is_paired = old["text"]["sha256"] == new["text"]["sha256"]
        if not is_paired or name not in old["influence"] or name not in new["influence"]:
            return change, math.nan
        return change, error_of(np.subtract(new["influence"][name], old["influence"][name]))
    seeds = {result["settings"]["seed"]: result for result in first}
    changes = []
    for result in group:
        if result["settings"]["seed"] in seeds:
            pair = [result], [seeds[result["settings"]["seed"]]]
            changes.append(measured(pair[0], name)[0] - measured(pair[1], name)[0])
    if len(changes) < 2:
        return measured(group, name)[0] - measured(first, name)[0], math.nan
    return np.mean(changes), np.std(changes, ddof=1)


def with_error(number, error):
    return number if math.isnan(error) else f"{number} +- {error:.2g}"


def table_of(groups):
    """-> rows of strings: the labels, then a row for each of ROWS.

    The first column is numbers and their errors, the others are numbers and how they differ from it.
    """
    first, *_ = groups.values()
    table = [["", *groups]]
    for name, title in ROWS.items():
        row = [title]
        for group in groups.values():
            value, error = measured(group, name)
            if math.isnan(value):
                row.append("-")
            elif group is first:
                row.append(with_error(f"{value:.4g}", error))
            else:
                change, error = difference(group, first, name)
                shown = f"{value:.4g}" if math.isnan(change) else f"{value:.4g}  {change:+.3g}"
                row.append(with_error(shown, error))
        table.append(row)
    return table


def aligned(table):
    """-> lines of text with columns of the same width."""
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = []
    for row in table:
        cells = [text.ljust(width) for text, width in zip(row, widths)]
        lines.append("  ".join(cells).rstrip())
    return lines


def legend_of_errors(groups):
    """What +- is, in a sentence."""
    first, *_ = groups.values()
    legend = "{tokens:,} tokens of {documents} documents".format(**first[0]["text"])
    legend += "; +-: standard error over documents"
    if len(groups) > 1:
        legend += "; then the difference from the first column, its error over the same tokens"
    if any(len(group) > 1 for group in groups.values()):
        legend += "; of several runs: standard deviation over seeds"
    return legend


def new_figure(width, height, title):
    from matplotlib.figure import Figure  # only here, as matplotlib may be missing

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, fontsize=10)
    return figure


def draw_first_look(groups):
    """How large, how concentrated, and from how few inputs: three curves for each group."""
    figure = new_figure(12, 4, "the Jacobian of a token, and what feeds an output latent")
    above, held, share = figure.subplots(1, 3)
    k_squared = max(group[0]["settings"]["k"] ** 2 for group in groups.values())
    sizes = [2**n for n in range(k_squared.bit_length())]
    for label, group in groups.items():
        counts = [measured(group, f"above.{t}")[0] for t in THRESHOLDS]
        line = above.plot(THRESHOLDS, counts, "o-", label=label)[0]
        held.plot(sizes, [measured(group, f"held_by.{n}")[0] for n in sizes], ".-")
        for ending, style in (("", "o-"), ("_random", ":")):
            shares = [measured(group, f"input_share{ending}.{n}")[0] for n in range(1, 11)]
            share.plot(range(1, 11), shares, style, color=line.get_color())
    above.set(ylim=0, xlabel="threshold", ylabel=f"elements of J, of {k_squared}")
    above.set_title("elements of |J| above a threshold (figure 2)", fontsize=9)
    held.axhline(0.9, color="gray", linewidth=0.5)
    held.set_xlim(1, sizes[-1])
    held.set_xscale("log", base=2)
    held.set_xticks(sizes[::2], map(str, sizes[::2]))
    held.set(ylim=(0, 1), xlabel="n", ylabel="share of sum |J|")
    held.set_title("held by a token's n largest elements; line: 90 %", fontsize=9)
    share.set(ylim=0, xlabel="n", ylabel="share of contributions", xticks=range(1, 11))
    share.set_title("the n-th strongest input of an output latent", fontsize=9)
    share.plot([], [], ":", color="gray", label="random J")
    share.legend(fontsize=8)
    figure.legend(loc="outside lower center", fontsize=8, ncols=2, handles=above.lines)
    return figure


def words_around(example):
    """Three words before the one that an example is of, [the word], and three after it."""
    at = example["at"]
    words = [word.replace("\n", "↵") for word in example["tokens"]]
    before = "".join(words[max(0, at - 3) : at])
    after = "".join(words[at + 1 : at + 4])
    return f"{before}[{words[at]}]{after}"


def draw_edges(groups):
    """The first output latent of the first and of the last group, and its inputs as a fan."""
    first, *_ = groups
    *_, last = groups
    title = (
        "the output latent whose strongest input contributes most to it on a token (or the one asked "
        "for), and its inputs\nline width: the input's share of all contributions over the text; words: "
        "a typical place where the latent is active, [ ] marks the token"
    )
    figure = new_figure(12, 4.2, title)
    names = list(dict.fromkeys([first, last]))
    for ax, label in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        ax.set_title(label, fontsize=10)
        ax.set(xlim=(0, 1), ylim=(-0.7, N_INPUTS + 0.7))
        ax.axis("off")
        for latent in with_inputs(groups[label][0]["latents"])[:1]:
            draw_fan(ax, latent)
    return figure


def draw_fan(ax, latent):
    """An output latent and its inputs, of which each is a line as wide as its share."""
    middle = N_INPUTS / 2
    words = words_around(typical(latent["examples"]))
    ax.text(0.77, middle, f"{words}\nlatent {latent['latent']}", va="center", fontsize=9)
    inputs = [
        (words_around(typical(edge["examples"])), edge["share"], "C0") for edge in latent["inputs"]
    ]
    rest = max(0, 1 - sum(share for _, share, _ in inputs))
    inputs.append(("all other inputs", rest, "lightgray"))
    for n, (words, share, color) in enumerate(inputs):
        y = N_INPUTS - n
        ax.text(0.49, y, f"{words}  {share:.0%}", va="center", ha="right", fontsize=9)
        ax.plot([0.5, 0.75], [y, middle], color=color, linewidth=30 * share, solid_capstyle="butt")


def typical(examples):
    """The example in the middle of the sum of a latent's values."""
    return examples[len(examples) // 2]


def draw_trade_off(groups):
    """What is gained of four measures of J over the nats that it costs, from the first group on."""
    several = any(len(group) > 1 for group in groups.values())
    error = "deviation over seeds" if several else "error over documents"
    label_of_first, *_ = groups
    title = f"differences from {label_of_first} (figures 5, 27 to 29); bars: standard {error}"
    figure = new_figure(11, 7, title)
    names = {
        "mean_abs": "mean |J|",
        "above.0.01": "elements with |J| > 0.01",
        "hold_90": "elements that hold 90 % of sum |J|",
        "text_inputs": "effective inputs of an output latent over the text",
    }
    first, *_ = groups.values()
    axes = figure.subplots(2, 2).flat
    for ax, (name, words) in zip(axes, names.items()):
        points = [(0, 0)]
        for label, group in [*groups.items()][1:]:
            x, x_error = difference(group, first, name)
            y, y_error = difference(group, first, "ce_lost.path")
            if several and len(group) == 1:
                x_error = y_error = math.nan
            ax.errorbar(x, y, y_error, x_error, "o", label=label)
            points.append((x, y))
        ax.plot(*zip(*points), color="gray", linewidth=0.7, zorder=0)
        ax.plot(0, 0, "ks", label=label_of_first)
        ax.set(xlabel=f"change of {words}", ylabel="change of nats lost, whole path")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", fontsize=8, ncols=3)
    return figure


def draw_functions(groups):
    """A row for each group: changes of s_y,i over J, and examples of functions of each kind."""
    title = (
        "left: how s_y,i changes when 1 is subtracted from s_x,j; the line is -J, far below it the latent "
        "left TopK (figure 8c)\nright: s_y,i over s_x,j, of the others those furthest from a line; dots: "
        "where the token is (figures 8a, 9, 12)"
    )
    figure = new_figure(12, 0.5 + 2.6 * len(groups), title)
    rows = figure.subplots(len(groups), 4, squeeze=False)
    for axes, (label, group) in zip(rows, groups.items()):
        result = group[0]
        axes[0].scatter(*np.array(result["scatter"]).reshape(-1, 2).T, s=3)
        axes[0].axline((0, 0), slope=-1, color="gray", linewidth=0.5)
        axes[0].set(xlabel="J", ylabel=f"{label}\nchange of s_y,i")
        for ax, kind in zip(axes[1:], KINDS):
            for curve in result["curves"][kind]:
                line = ax.plot(curve["t"], curve["v"])[0]
                ax.plot(*curve["at"], "o", color=line.get_color())
            share = measured(group, kind)[0]
            kind_title = f"{kind.replace('jumprelu', 'JumpReLU')}: {share:.1%}"
            ax.set(xlabel="s_x,j", ylabel="s_y,i", title=kind_title)
    return figure


def draw(groups):
    """-> {name: PNG}; none if matplotlib is not installed. A group is shown by its first run."""
    try:
        import matplotlib
    except ImportError:
        notice("no figures; they need matplotlib: pip install matplotlib")
        return {}
    drawn = {"first_look": draw_first_look, "edges": draw_edges, "functions": draw_functions}
    if len(groups) > 1:
        drawn["trade_off"] = draw_trade_off
    figures = {}
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's own may ask for LaTeX
        matplotlib.rcParams["text.parse_math"] = False  # a $ in the text is a $
        for name, draw_one in drawn.items():
            file = io.BytesIO()
            draw_one(groups).savefig(file, format="png", dpi=150)
            figures[name] = file.getvalue()
    return figures


STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: auto; padding: 1rem }
td { padding: 0 .5rem; border: 1px solid #8886; white-space: pre }
img { width: 100%; background: white }
details { margin: .2rem 1rem }
pre { margin: 0; white-space: pre-wrap }
span { background: rgba(255, 140, 0, var(--share)) }
"""
READING = (
    "Below it, the input latents that contribute most to it over the text (sum of |J s_x,j|). Every "
    "line is a place where a latent is active: its value there, and the text, shaded by the latent's "
    "value at each token. The first line is where the latent is largest; the others stand at equal "
    "steps of the sum of its values, so that they show what it stands for most."
)


def details(head, examples, inside="", is_open=False):
    """A line to open: windows of text, every token shaded by its share of the largest value."""
    lines = []
    for example in examples:
        line = f"{example['acts'][example['at']]:.2f}  "
        largest = max(examples[0]["acts"])
        for token, value in zip(example["tokens"], example["acts"]):
            text = html.escape(token.replace("\n", "↵"))
            line += f'<span style="--share:{value / largest:.2f}">{text}</span>'
        lines.append(f"<pre>{line}</pre>")
    tag = "<details open>" if is_open else "<details>"
    return f"{tag}<summary>{html.escape(head)}</summary>{''.join(lines)}{inside}</details>"


def details_of(latent, is_open=False):
    """An output latent, and in it the input latents that feed it."""
    inputs = ""
    for edge in latent["inputs"]:
        head = f"input latent {edge['latent']}: {edge['share']:.0%} of all contributions, "
        head += f"mean J {edge['mean_J']:.3g}; both are active on {edge['tokens']:,} tokens, "
        head += f"{edge['different_tokens']:,} different words or parts of words"
        inputs += details(head, edge["examples"], is_open=is_open)
    head = f"output latent {latent['latent']}"
    return details(head, latent["examples"], inputs, is_open)


def exhibit(label, latent):
    """-> lines of HTML: an output latent, and what happens without its strongest input."""
    lines = [f"<h2>An output latent of {html.escape(label)}, and what feeds it</h2>"]
    lines.append(f"<p>{READING}")
    zero = latent.get("set_to_zero")
    if zero:
        lines.append(
            f"<p>Its first input latent set to 0 at {zero['tokens']} tokens, medians: s_y,i is "
            f"{zero['s_y']:.3g} and changes by {zero['change']:.3g}; J says {zero['predicted']:.3g}. "
            f"At {zero['gone']:.0%} of them s_y,i becomes 0."
        )
    lines.append(details_of(latent, is_open=True))
    return lines


def report(groups, table, figures):
    """-> report.html: one static page, with nothing that is loaded from elsewhere."""

    def picture(name):
        data = base64.b64encode(figures[name]).decode()
        return f'<p><img alt="{name}" src="data:image/png;base64,{data}">'

    page = [f"<!doctype html><meta charset=utf-8><title>JSAEs</title><style>{STYLE}</style>"]
    page.append("<h1>Evaluation of Jacobian SAEs</h1>")
    for label, group in groups.items():
        page.append(f"<p>{html.escape(label)}: {html.escape(facts_of(group[0]))}")
    page.append("<table>")
    for row in table:
        page.append("<tr>")
        page.extend(f"<td>{html.escape(text)}" for text in row)
    page.append(f"</table><p>{legend_of_errors(groups)}")
    page.append(
        f"<details><summary>what the numbers are</summary><pre>{html.escape(GLOSSARY)}</pre>"
    )
    page.append("</details>")
    page.extend(picture(name) for name in figures if name in ("first_look", "trade_off", "edges"))
    last = [*groups][-1]  # of the largest lambda
    for latent in with_inputs(groups[last][0]["latents"])[:1]:
        page.extend(exhibit(last, latent))
    page.extend(picture(name) for name in figures if name == "functions")
    for label, group in groups.items():
        page.append(f"<h2>{html.escape(label)}: output latents and what feeds them</h2>")
        page.extend(details_of(latent) for latent in group[0]["latents"])
    return "\n".join(page)


# ---- 8. Command line -----------------------------------------------------------------------------


def settings_of_all(runs):
    """-> {run: its settings and penalty}. InputError if one is no finished run, or there twice."""
    settings = {}
    known = {}
    for run in runs:
        jsae.load_run(run)
        saved = json.loads((jsae.run_folder(run) / "config.json").read_text())
        settings[run] = saved["config"] | {"penalty": saved["penalty"]}
        key = json.dumps(without_seed(settings[run]) | {"seed": saved["config"]["seed"]})
        if key in known:
            raise InputError(f"{known[key]} and {run} have the same settings and seed; name one")
        known[key] = run
    return settings


def place_of(run, options):
    """-> the folder of a run's evaluation.json. InputError if nothing can be written there."""
    folder = Path(run).expanduser()
    if options.output_dir:
        name = str(folder.resolve()) if folder.is_dir() else run
        folder = Path(options.output_dir).expanduser() / name.strip("/").replace("/", "--")
    elif not folder.is_dir():
        raise InputError(
            f"{run} is no folder of this machine: name an --output-dir for the results"
        )
    trial = folder / ".trial"
    jsae.write_file(trial, bytes(2**24))  # there must be room for this much
    trial.unlink()
    return folder


def result_of(run, settings, options, folder):
    """-> what evaluation.json of a run holds, evaluated anew unless --reuse finds what is asked."""
    weights = hashlib.sha256()
    for path in sorted(jsae.run_folder(run).glob("sae_*/*.safetensors")):
        weights.update(path.read_bytes())
    program = hashlib.sha256(Path(__file__).read_bytes())
    asked = {"weights": weights.hexdigest(), "program": program.hexdigest()}
    for name in ("tokens", "functions", "latents", "model", "dataset", "split", "column", "seed"):
        asked[name] = getattr(options, name)
    path = folder / "evaluation.json"
    if options.reuse and path.exists():
        try:
            result = json.loads(path.read_text())
        except ValueError:  # no JSON
            result = {}
        if isinstance(result, dict) and result.get("asked") == asked:
            return result
    result = {"asked": asked, "settings": settings, **evaluate(run, options)}
    try:
        jsae.write_file(path, json.dumps(result, allow_nan=False).encode())
    except InputError as error:  # the table can still be printed
        notice(str(error))
    return result


def evaluate_by_command(argv):
    """What `python evaluate.py` does: evaluate each run, print the table, write the report."""
    parser = jsae.make_parser(Options, "evaluate.py RUN [RUN ...]", "")
    parser.add_argument("runs", nargs="+", help="folders or hub ids of runs")
    given = vars(parser.parse_args(argv))
    runs = given.pop("runs")
    options = Options(**given)
    settings = settings_of_all(runs)
    places = [place_of(run, options) for run in runs]

    results = []
    for run, place in zip(runs, places):
        results.append({**result_of(run, settings[run], options, place), "run": run})
    groups = grouped(results)
    table = table_of(groups)
    for line in aligned(table if options.all else table[: 1 + N_SHOWN]):
        print(line)
    print(legend_of_errors(groups))
    folder = Path(options.output_dir or places[0]).expanduser()
    figures = draw(groups)
    for name, png in figures.items():
        jsae.write_file(folder / "figures" / f"{name}.png", png)
    jsae.write_file(folder / "report.html", report(groups, table, figures).encode())
    print(f"all numbers, figures, latents and their text: {folder / 'report.html'}")
    if len(groups) == 1 and settings[runs[0]]["jacobian_coef"] > 0:
        print("to compare: train with --jacobian-coef 0, then name both runs here")


def main(argv=None) -> int:
    """-> exit status: 0, 2 after one line about what was given, 130 after Ctrl-C."""
    return jsae.run_program("evaluate.py", evaluate_by_command, argv)


if __name__ == "__main__":
    sys.exit(main())
