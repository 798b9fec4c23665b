"""Evaluation of Jacobian SAEs: the measures of the paper, and scale-free ones beside them.

    python evaluate.py runs/A                     one run: evaluation.json, figures/, report.html
    python evaluate.py runs/A runs/B --reuse      side by side, of what was measured before
    python evaluate.py --help                     every option

evaluation.json holds every number by its name, and the standard error over documents of those that
are means. ROWS, in section 7, says what they are: it is the table that is printed and the glossary
of the report. The text is what the run held out of its own, or --dataset, without the first token
of every context. Runs that differ in the seed only are one column: mean and standard deviation. The
symbols are those of jsae.py.
"""

import base64
import dataclasses
import html
import io
import json
import math
import os
import shlex
import sys
import textwrap
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

TOKENS_AT_A_TIME = 2048  # or one context, if that is longer
MORE_TOKENS = 2**17  # at least so many more are read than are evaluated, and some drawn


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
    reuse: bool = False  # take evaluation.json, where there is one, whatever else is asked for
    all: bool = False  # print every row of the table
    output_dir: str = ""  # of report and figures; default: the first run's folder

    def __post_init__(self):
        jsae.check_settings(self)


class Run(NamedTuple):
    """A trained pair with its language model.

    config   the run's settings, but with the model, text and device of this evaluation
    part     which part of the text: "held out" or "all"
    trained  what the run's config.json holds
    """

    sae_x: jsae.TopKSAE
    sae_y: jsae.TopKSAE
    mlp: jsae.MLP
    model: nn.Module
    tokenizer: object
    config: Config
    part: str
    trained: dict


def found_again(name):
    """-> name if it is here or a hub id, else what its last parts name below this folder, if any.

    So a clone can move with its runs.
    """
    parts = Path(name).parts
    for n in range(len(parts)):  # of an absolute name, the first is name itself
        path = jsae.HERE.joinpath(*parts[n:])
        if path.exists():
            return str(path)
    return name


def open_run(name, options) -> Run:
    """InputError if it is no run, or its language model is gone or has changed."""
    sae_x, sae_y, config = jsae.load_run(name)
    folder = jsae.run_folder(name)
    if not jsae.is_finished(folder):
        notice(f"{name} is not finished: what is evaluated is its last checkpoint")
    changes = {"model": options.model or found_again(config.model), "device": options.device}
    if options.dataset:
        changes |= {field: getattr(options, field) for field in ("dataset", "split", "column")}
    elif config.dataset != "stdlib":
        changes["dataset"] = found_again(config.dataset)
    config = dataclasses.replace(config, **changes)
    part = "all" if options.dataset else "held out"
    model, tokenizer = jsae.load_model(config)
    mlp = jsae.find_mlp(model, config.layer)
    trained = json.loads((folder / "config.json").read_text())
    if jsae.hash_of_weights(mlp) != trained["mlp_sha256"]:
        raise InputError(f"{name}: the MLP of {config.model} is not the one that it was trained on")
    for module in (sae_x, sae_y, mlp):
        module.to(model.device).requires_grad_(False)
    return Run(sae_x, sae_y, mlp, model, tokenizer, config, part, trained)


def held_out_text(run, n_tokens, seed):
    """-> ids and documents, (contexts, T): token ids, the number of the document each is of.

    Text is packed into contexts as in training. More of them are read than are needed, and some of
    these drawn: of more documents, with smaller errors. InputError if there are none.
    """
    width = run.config.context_size - 1
    n_contexts = math.ceil(n_tokens / width)
    contexts = jsae.token_contexts(run.config, run.tokenizer, run.part)
    n_more = min(max(3 * n_contexts, MORE_TOKENS // width), 2**20 // width)
    ids = torch.tensor(list(islice(contexts, n_contexts + n_more)))  # (contexts, T)
    if not len(ids):
        text = f"{run.config.dataset} ({run.part})"
        raise InputError(f"{text} does not fill one context; name another text by --dataset")
    if len(ids) < n_contexts:
        notice(f"{run.config.dataset} ({run.part}) has only {len(ids) * width:,} tokens")
    is_end = torch.zeros_like(ids)
    for end in jsae.special_ids(run.tokenizer)[1]:
        is_end[:, 1:] |= ids[:, 1:] == end  # what a context starts with is no part of the text
    documents = is_end.flatten().cumsum(0).view_as(ids) - is_end
    if documents.max() == 0:
        notice("no end-of-text token is in this text: it counts as one document, without errors")
    chosen = np.random.default_rng(seed).permutation(len(ids))[:n_contexts]
    return ids[chosen], documents[chosen]


class Tokens(NamedTuple):
    """The B = contexts * (T - 1) tokens of some contexts, and what the pair makes of them.

    ids            (contexts, T)  with the first token of each context, which is not one of the B
    document       (B,)           number of the document that each token is of
    x, y           (B, d_model)   input and output of the MLP
    s_x, s_y       Latents (B, k)
    x_hat, y_hat   (B, d_model)
    J              (B, k, k)
    """

    ids: Tensor
    document: Tensor
    x: Tensor
    y: Tensor
    s_x: Latents
    s_y: Latents
    x_hat: Tensor
    y_hat: Tensor
    J: Tensor


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
    jsae.check_text(run.model, run.mlp, ids.to(run.model.device))
    sums = 0
    for _, x in inputs_of(run, ids):
        sums = sums + torch.stack([x.double().sum(0), run.mlp(x).double().sum(0)])
    return (sums / ids[:, 1:].numel()).float()


def batches(run, ids, documents):
    """Yield the Tokens of all contexts."""
    sae_x, sae_y, mlp = run.sae_x, run.sae_y, run.mlp
    done = 0
    with tqdm(total=len(ids), unit=" contexts", leave=False) as bar:
        for batch, x in inputs_of(run, ids):
            document = documents[done : done + len(batch), 1:].flatten()
            done += len(batch)
            y = mlp(x)
            s_x, s_y = sae_x.encode(x), sae_y.encode(y)
            x_hat, y_hat = sae_x.decode(s_x), sae_y.decode(s_y)
            J = active_jacobian(sae_x, sae_y, mlp, x, s_x, s_y)
            yield Tokens(batch, document, x, y, s_x, s_y, x_hat, y_hat, J)
            bar.update(len(batch))


# ---- 2. Means over tokens ------------------------------------------------------------------------


def ratio(a, b):
    """-> sum a / sum b and its standard error, for sums a, b (D,) over documents; None: undefined.

    Documents are drawn, not tokens, so the error of r = sum a / sum b is
        sqrt(D / (D - 1) sum_d (a_d - r b_d)^2) / |sum b|, over the D documents with tokens.
    """
    D = ((a != 0) | (b != 0)).sum()
    r = a.sum() / b.sum()
    squares = (a - r * b).square().sum()
    error = (D / (D - 1) * squares).sqrt() / b.sum().abs()
    return defined(r), defined(error)


def defined(number):
    return number.item() if number.isfinite() else None


class Means:
    """Means over tokens of any number of quantities, from their sums over each document."""

    def __init__(self, n_documents):
        self.n_documents = n_documents
        self.sums = {}  # name -> (n_documents,)
        self.counts = {}  # name -> (n_documents,), tokens

    def add(self, document, values):
        """values {name: (B,)}, of B tokens that are of the documents (B,)."""
        document = document.cpu()
        for name, value in values.items():
            value = value.cpu().double()
            if name not in self.sums:
                self.sums[name] = value.new_zeros(self.n_documents)
                self.counts[name] = value.new_zeros(self.n_documents)
            self.sums[name].index_add_(0, document, value)
            self.counts[name] += torch.bincount(document, minlength=self.n_documents)

    def results(self):
        """-> {name: (mean, standard error)}"""
        return {name: ratio(total, self.counts[name]) for name, total in self.sums.items()}


# ---- 3. The measures: what a batch of tokens says, one number a token ----------------------------

THRESHOLDS = (0.005, 0.01, 0.015, 0.02, 0.04)  # of |J|
BINS = 1100  # of the histogram of |J|, each 0.001 wide; what is above falls into one more


def reconstruction(side, v, v_hat, mean, s):
    """Of v (B, d_model), which is x or y, whose mean over all tokens is given (Appendix E)."""
    return {
        f"mse.{side}": (v_hat - v).square().mean(1),
        f"variance.{side}": (v - mean).square().mean(1),
        f"cosine.{side}": F.cosine_similarity(v_hat, v),
        f"active.{side}": (s.acts > 0).sum(1),
    }


def explained_variance(means, side):
    """1 - sum of (v_hat - v)^2 / sum of (v - mean v)^2, and its standard error."""
    unexplained, error = ratio(means.sums[f"mse.{side}"], means.sums[f"variance.{side}"])
    explained = None if unexplained is None else 1 - unexplained
    return explained, error


def by_token(side, reconstructed):
    """Of all tokens, by batches: few of huge norm can hold most of the variance."""
    mse = torch.cat([batch[f"mse.{side}"] for batch in reconstructed])
    variance = torch.cat([batch[f"variance.{side}"] for batch in reconstructed])
    explained = 1 - mse / variance
    largest = variance.sort(descending=True).values[: math.ceil(len(variance) / 100)]
    return {
        f"explained_variance_median.{side}": defined(explained.median()),
        f"variance_of_top_1_percent.{side}": defined(largest.sum() / variance.sum()),
    }


def cross_entropies(run, ids, y):
    """-log p of the tokens ids[:, 2:], in nats, (contexts * (T - 2),).

    y (contexts * (T - 1), d_model) takes the place of the MLP's output, but for the first token of
    each context, where it stays what it is; the prediction made there is not counted.
    """

    def replace(module, args, output):
        old = output.reshape(*ids.shape, -1)
        new = torch.cat([old[:, :1], y.view_as(old[:, 1:])], 1)
        return new.view_as(output)

    with run.mlp.maps[-1].register_forward_hook(replace):
        logits = run.model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(logits[:, 1:-1].flatten(0, 1), ids[:, 2:].flatten(), reduction="none")


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
        numbers[f"ce.{name}"] = cross_entropies(run, tokens.ids, y)
        numbers[f"ce_lost.{name}"] = numbers[f"ce.{name}"] - numbers["ce.clean"]
    return numbers


def ce_score(means, site, zero):
    """(ablated - sae) / (ablated - clean), and its standard error (Appendix E)."""
    clean, sae, ablated = (means.sums[f"ce.{name}"] for name in ("clean", site, zero))
    return ratio(ablated - sae, ablated - clean)


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
    """Of J (B, k, k), each with an element that is not 0: how few hold most of it, at any scale."""
    A = J.abs().double().flatten(1)
    l1, l2 = A.sum(1), A.norm(dim=1)
    root = A.shape[1] ** 0.5
    held = A.sort(1, descending=True).values.cumsum(1) / l1.unsqueeze(1)  # by the n largest
    numbers = {
        "hold_90": (held < 0.9).sum(1) + 1,
        "hoyer": (root - l1 / l2) / (root - 1),
    }
    for exponent in range(A.shape[1].bit_length()):
        numbers[f"held_by.{2**exponent}"] = held[:, 2**exponent - 1]
    for threshold in THRESHOLDS:
        numbers[f"above_l2.{threshold}"] = (A > threshold * l2.unsqueeze(1)).sum(1)
    return numbers


def effective_inputs(name, J, acts):
    """Of J (B, k, k) and s_x,j (B, k): on how many inputs an output latent depends, on average, and
    how much all of them depend on the same one. Likewise where an element is not 0.
    """
    c = J.double() * acts.double().unsqueeze(1)  # what input latent j adds to output latent i
    p = c.square() / c.square().sum(2, keepdim=True)  # a row without inputs is NaN
    return {
        f"effective_inputs{name}": (1 / p.square().sum(2)).nanmean(1),
        f"hub{name}": p.nanmean(1).amax(1),
    }


def histogram(J):
    bins = (J.abs() * 1000).long().clamp(max=BINS)
    return torch.bincount(bins.flatten(), minlength=BINS + 1)


def add_measures(means, run, tokens, mean_x, mean_y, generator):
    """Add all that is a mean over tokens -> what reconstruction says of each one.

    The generator draws random J, which are 0 where J is.
    """
    document, J = tokens.document, tokens.J
    reconstructed = reconstruction("x", tokens.x, tokens.x_hat, mean_x, tokens.s_x)
    reconstructed |= reconstruction("y", tokens.y, tokens.y_hat, mean_y, tokens.s_y)
    means.add(document, reconstructed)
    means.add(document, size(J))
    of_targets = document.view(len(tokens.ids), -1)[:, 1:].flatten()  # a prediction is of the next
    means.add(of_targets, losses(run, tokens))

    some = J.flatten(1).any(1)  # tokens with an active pair of latents
    document = document[some.cpu()]
    acts = tokens.s_x.acts[some]
    random_J = torch.randn(J.shape, generator=generator, device=J.device) * (J != 0)
    means.add(document, sparsity(J[some]))
    means.add(document, effective_inputs("", J[some], acts))
    means.add(document, effective_inputs("_random", random_J[some], acts))
    return reconstructed


# ---- 4. Functions of one latent (section 5.4, Appendix B) ----------------------------------------

KINDS = ("linear", "jumprelu", "other")


def along_latent(run, x, i, j, change):
    """s_y,i of a token x (d_model,) when s_x,j is changed by each of `change` (T,): (T,). Eq. 30.

    The true x is moved along the decoder row of j, so that the SAE's error stays what it is.
    """
    s_y = run.sae_y.encode(run.mlp(x + change.unsqueeze(1) * run.sae_x.W_dec[j]))
    return (s_y.acts * (s_y.idx == i)).sum(1)


def is_line(t, v, relative):
    """Whether all v are within 0.01 of a least-squares line in t; relative: within 0.01 range."""
    slope, intercept = np.polyfit(t, v, 1)
    residual = np.abs(v - slope * t - intercept).max()
    span = max(np.ptp(v), 1e-4 * np.abs(v).max())  # what is flat up to rounding is a line
    return residual <= 0.01 * (span if relative else 1)


def kind_of(t, v, relative):
    """linear, jumprelu (0 on one stretch that touches an end, a line on the rest) or other."""
    if is_line(t, v, relative):
        return "linear"
    rest = np.flatnonzero(v)
    is_one_stretch = rest[-1] - rest[0] == len(rest) - 1
    touches_an_end = rest[0] == 0 or rest[-1] == len(v) - 1
    jumps = is_one_stretch and touches_an_end and len(rest) >= 2
    return "jumprelu" if jumps and is_line(t[rest], v[rest], relative) else "other"


class Function(NamedTuple):
    """s_y,i = v at s_x,j = t, for a random active pair i, j of a random token.

    delta is how s_y,i changes when 1 is subtracted from s_x,j. relative_kind: by residual / range.
    """

    document: int
    J: float
    delta: float
    kind: str
    relative_kind: str
    t: list
    v: list


def random_functions(run, tokens, n, generator):
    """-> the Functions of n random elements of J, without those that ReLU cut off."""
    functions = []
    for _ in range(n):
        b, i, j = (int(torch.randint(size, (), generator=generator)) for size in tokens.J.shape)
        s = tokens.s_x.acts[b, j].item()
        if s == 0 or tokens.s_y.acts[b, i] == 0:
            continue
        t = np.linspace(0, max(5, s + 1), 100)
        change = torch.tensor([*(t - s), -1, 0]).to(tokens.x)
        v = along_latent(run, tokens.x[b], tokens.s_y.idx[b, i], tokens.s_x.idx[b, j], change)
        v = v.cpu().numpy()
        delta = v[-2] - v[-1]
        v = v[:-2]
        functions.append(
            Function(
                document=int(tokens.document[b]),
                J=tokens.J[b, i, j].item(),
                delta=float(delta),
                kind=kind_of(t, v, relative=False),
                relative_kind=kind_of(t, v, relative=True),
                t=t.tolist(),
                v=v.tolist(),
            )
        )
    return functions


def linearity(functions):
    """Of each function, 1 or 0: its kind, and whether J says what subtracting 1 does."""
    J = torch.tensor([f.J for f in functions])
    off = (J + torch.tensor([f.delta for f in functions])).abs()
    numbers = {"on_line": off < 0.1, "on_line_relative": off < 0.1 * J.abs()}
    for kind in KINDS:
        numbers[kind] = torch.tensor([f.kind == kind for f in functions])
        numbers[f"{kind}_relative"] = torch.tensor([f.relative_kind == kind for f in functions])
    return numbers


# ---- 5. Pairs of latents, and examples (figure 36, section 5.2, Appendix C) ----------------------

N_LATENTS = 8  # output latents that are shown
N_INPUTS = 8  # input latents that are shown of each
N_EXAMPLES = 8  # texts that are shown of a latent
EXAMPLE_TOKENS = 2**18  # of the text, in which they are looked for


class Connections:
    """Sums over tokens, for an output latent of each row and all n input latents.

    There are rows for all n output latents or, if n is above 4096, for those that are asked for and
    2^24 / n random ones.
    """

    def __init__(self, n_latents, asked, seed, device):
        n_rows = min(n_latents, max(1, 2**24 // n_latents))
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randperm(n_latents, generator=generator)[:n_rows].tolist()
        self.latents = list(dict.fromkeys([*asked, *drawn]))  # each once
        self.drawn = drawn
        n_rows = len(self.latents)
        self.row_of = torch.full((n_latents,), -1, device=device)  # -1: no row
        self.row_of[self.latents] = torch.arange(n_rows, device=device)
        self.n_tokens = torch.zeros(n_rows, device=device)  # on which the output latent is active
        self.n_both = torch.zeros(n_rows, n_latents, device=device)  # on which both are
        self.sum = torch.zeros_like(self.n_both)  # of J
        self.sum_abs = torch.zeros_like(self.n_both)  # of |J|
        self.contribution = torch.zeros_like(self.n_both)  # of |J s_x,j|

    def add(self, J, s_x, s_y):
        """J (B, k, k) and the Latents (B, k) of B tokens."""
        row = self.row_of[s_y.idx]  # (B, k)
        b, i = ((s_y.acts > 0) & (row >= 0)).nonzero(as_tuple=True)
        row = row[b, i]
        self.n_tokens += torch.bincount(row, minlength=len(self.n_tokens))
        places = row.unsqueeze(1), s_x.idx[b]  # of the elements of J[b, i], (rows of J, k)
        J = J[b, i]
        acts = s_x.acts[b]
        self.n_both.index_put_(places, (acts > 0).to(J.dtype), accumulate=True)
        self.sum.index_put_(places, J, accumulate=True)
        self.sum_abs.index_put_(places, J.abs(), accumulate=True)
        self.contribution.index_put_(places, (J * acts).abs(), accumulate=True)

    def shares_above(self):
        """-> {name: share}: of pairs, by the mean of |J| over the output latent's tokens."""
        drawn = self.row_of[self.drawn]
        mean = self.sum_abs[drawn] / self.n_tokens[drawn].clamp(min=1).unsqueeze(1)
        return {f"global.{t}": (mean > t).double().mean().item() for t in THRESHOLDS}

    def strongest(self, n=N_LATENTS):
        """-> n output latents, those of the edges that contribute most over the text."""
        strength, rows = self.contribution.amax(1).sort(descending=True)
        n = min(n, int((strength > 0).sum()))
        return [self.latents[row] for row in rows[:n].tolist()]

    def strongest_inputs(self, latent):
        """-> the input latents that contribute most to an output latent, with share and mean J."""
        row = self.row_of[latent]
        contribution, order = self.contribution[row].sort(descending=True)
        n = min(N_INPUTS, int((contribution > 0).sum()))
        shares = (contribution / contribution.sum()).tolist()
        inputs = []
        for j, share in zip(order[:n].tolist(), shares):
            n_both = int(self.n_both[row, j])
            mean = self.sum[row, j].item() / n_both
            inputs.append({"latent": j, "share": share, "mean_J": mean, "tokens": n_both})
        return inputs


def values_of(latent, s, ids):
    """-> the latent's values at all tokens but the first of contexts, (contexts, T - 1)."""
    return (s.acts * (s.idx == latent)).sum(1).view(len(ids), -1)


def examples_of(latent, ids, s, tokenizer):
    """-> where the latent is largest, a text from each context: 10 tokens before it and 5 after.

    ids (contexts, T) and the Latents of their tokens, (contexts * (T - 1), k).
    """
    values = values_of(latent, s, ids)
    largest, place = values.max(1)
    examples = []
    for n in largest.argsort(descending=True)[:N_EXAMPLES].tolist():
        if largest[n] > 0:
            start = max(0, int(place[n]) - 10)
            shown = slice(start, start + 16)
            acts = values[n, shown].tolist()
            examples.append({"tokens": words_of(ids[n, 1:][shown], tokenizer), "acts": acts})
    return examples


def latents_of(connections, chosen, kept, tokenizer):
    """-> the chosen output latents, with their input latents and examples of both.

    kept: (ids, s_x, s_y) of each batch in which examples are looked for.
    """
    ids, s_x, s_y = zip(*kept)
    ids = torch.cat(ids)
    s_x, s_y = joined(s_x), joined(s_y)
    latents = []
    for latent in chosen:
        is_active = values_of(latent, s_y, ids) > 0
        inputs = connections.strongest_inputs(latent)
        for edge in inputs:
            both = is_active & (values_of(edge["latent"], s_x, ids) > 0)
            edge["different_tokens"] = len(ids[:, 1:][both].unique())
            edge["examples"] = examples_of(edge["latent"], ids, s_x, tokenizer)
        examples = examples_of(latent, ids, s_y, tokenizer)
        latents.append({"latent": latent, "examples": examples, "inputs": inputs})
    return latents


def joined(parts):
    """Latents of several batches as one."""
    return Latents(torch.cat([s.acts for s in parts]), torch.cat([s.idx for s in parts]))


def words_of(ids, tokenizer):
    """Token ids -> the text that each one adds; the last of those that make up a character."""
    ids = ids.tolist()
    texts = [tokenizer.decode(ids[:n]).rstrip("\ufffd") for n in range(len(ids) + 1)]
    return [after[len(before) :] for before, after in pairwise(texts)]


def pictures_of(tokens, tokenizer):
    """-> |J| of three tokens of the first context, rows and columns by their sums, and the text."""
    T = tokens.ids.shape[1]
    pictures = []
    for place in (max(1, T // 3), max(1, 2 * T // 3), T - 1):  # in the context
        A = tokens.J[place - 1].abs()
        A = A[A.sum(1).argsort(descending=True)]
        A = A[:, A.sum(0).argsort(descending=True)]
        words = words_of(tokens.ids[0, max(1, place - 5) : place + 1], tokenizer)
        pictures.append({"text": "".join(words), "J": A.tolist()})
    return pictures


# ---- 6. One run ----------------------------------------------------------------------------------


def latents_asked_for(text, n_latents):
    """The numbers in --latents. InputError if one is none of a latent."""
    words = text.split(",") if text else []
    if not all(word.strip().isdecimal() and int(word) < n_latents for word in words):
        raise InputError(f"--latents is {text!r}; expected some of 0 to {n_latents - 1}, as 17,5")
    return [int(word) for word in words]


@torch.no_grad()
def evaluate(name, options):
    """-> what evaluation.json holds; None: not defined."""
    run = open_run(name, options)
    n_latents = len(run.sae_x.W_enc)
    asked = latents_asked_for(options.latents, n_latents)
    ids, documents = held_out_text(run, options.tokens, options.seed)
    n_tokens = ids[:, 1:].numel()
    device = run.model.device
    mean_x, mean_y = mean_activations(run, ids)
    drawing = torch.Generator().manual_seed(options.seed)
    drawing_J = torch.Generator(device).manual_seed(options.seed)

    means = Means(int(documents.max()) + 1)
    connections = Connections(n_latents, asked, options.seed, device)
    counts = torch.zeros(BINS + 1, dtype=torch.long, device=device)
    is_silent = torch.ones(2, n_latents, dtype=torch.bool, device=device)
    reconstructed = []
    functions = []
    n_drawn = n_done = 0  # functions, tokens
    pictures = []
    kept = []  # ids, s_x, s_y of batches, for examples
    for tokens in batches(run, ids, documents):
        reconstructed.append(add_measures(means, run, tokens, mean_x, mean_y, drawing_J))
        connections.add(tokens.J, tokens.s_x, tokens.s_y)
        counts += histogram(tokens.J)
        for side, s in enumerate((tokens.s_x, tokens.s_y)):
            is_silent[side, s.idx[s.acts > 0]] = False
        n_done += len(tokens.x)
        n_functions = options.functions * n_done // n_tokens - n_drawn
        n_drawn += n_functions
        functions += random_functions(run, tokens, n_functions, drawing)
        pictures = pictures or pictures_of(tokens, run.tokenizer)
        if n_done <= EXAMPLE_TOKENS or not kept:
            kept.append((tokens.ids, tokens.s_x, tokens.s_y))

    if functions:
        means.add(torch.tensor([f.document for f in functions]), linearity(functions))
    results = means.results()
    for side in ("x", "y"):
        results[f"explained_variance.{side}"] = explained_variance(means, side)
    for site, zero in (("x", "x_zero"), ("y", "y_zero"), ("path", "y_zero")):
        results[f"ce_score.{site}"] = ce_score(means, site, zero)
    numbers = {key: value for key, (value, _) in results.items()}
    numbers |= by_token("x", reconstructed) | by_token("y", reconstructed)
    numbers |= connections.shares_above()
    numbers["silent.x"], numbers["silent.y"] = is_silent.sum(1).tolist()
    n_words = run.model.get_input_embeddings().weight.shape[0]
    if numbers["ce.clean"] is not None and numbers["ce.clean"] > 0.8 * math.log(n_words):
        loss = f"the language model's loss is {numbers['ce.clean']:.2f} nats a token"
        notice(f"{loss}, near to guessing: is this the text, and the tokenizer, that it knows?")
    text = f"{run.config.dataset}, {run.config.split}, {run.config.column} ({run.part})"
    return {
        "settings": {
            **run.trained["config"],
            "penalty": run.trained["penalty"],
            "finished": jsae.is_finished(jsae.run_folder(name)),
            "evaluated on": f"{n_tokens:,} tokens of {text}, seed {options.seed}",
        },
        "numbers": numbers,
        "errors": {key: error for key, (_, error) in results.items()},
        "histogram": counts.tolist(),
        "scatter": [(f.J, f.delta) for f in functions[:1000]],
        "curves": {kind: [(f.t, f.v) for f in functions if f.kind == kind][:6] for kind in KINDS},
        "pictures": pictures,
        "latents": latents_of(connections, asked or connections.strongest(), kept, run.tokenizer),
        "versions": run.trained["versions"],
    }


# ---- 7. Table, figures, report -------------------------------------------------------------------

ABOVE = " / ".join(map(str, THRESHOLDS))
SHOWN = 7  # rows that are printed without --all
ROWS = [  # title, names of the numbers, what they are
    (
        "explained variance: x / y",
        ["explained_variance.x", "explained_variance.y"],
        (
            "1 - sum of (v_hat - v)^2 / sum of (v - mean v)^2, over all elements; 1: perfect (in figure 4 "
            "the authors average the ratios of tokens)"
        ),
    ),
    (
        "whole path: CE score / nats lost",
        ["ce_score.path", "ce_lost.path"],
        (
            "y computed from the latents of x alone, through both SAEs: CE loss score, and how much the "
            "language model's cross-entropy rises"
        ),
    ),
    ("mean |J|", ["mean_abs"], "over the k^2 elements and all tokens: the paper's penalty (Eq. 5)"),
    (
        "elements with |J| > 0.01",
        ["above.0.01"],
        "of a token's k^2; fewer if J is smaller as well as if it is sparser (figures 2, 7)",
    ),
    (
        "elements that hold 90 % of sum |J|",
        ["hold_90"],
        (
            "of a token's k^2; fewer only if J is sparser, whatever its scale. This and the next rows are "
            "means over the tokens with an element of J that is not 0"
        ),
    ),
    (
        "effective inputs: J / random J",
        ["effective_inputs", "effective_inputs_random"],
        (
            "of an output latent: 1 / sum_j p_ij^2, p_ij = c_ij^2 / sum_j c_ij^2, c_ij = J_ij s_x,j, a "
            "mean over output latents; random: with Gaussian J, what the sizes of s_x alone give"
        ),
    ),
    (
        "hub: J / random J",
        ["hub", "hub_random"],
        "max_j of the mean of p_ij over i; 1: one input latent feeds all output latents",
    ),
    (
        "explained variance of the median token: x / y",
        ["explained_variance_median.x", "explained_variance_median.y"],
        "1 - |v_hat - v|^2 / |v - mean v|^2, which no token of huge norm decides",
    ),
    (
        "share of the variance in the top 1 % of tokens: x / y",
        ["variance_of_top_1_percent.x", "variance_of_top_1_percent.y"],
        "near 1: explained variance is that of these few tokens",
    ),
    (
        "CE loss score: x / y",
        ["ce_score.x", "ce_score.y"],
        (
            "(ablated - sae) / (ablated - clean) of the cross-entropies; ablated: 0 instead; 1: as well "
            "as ever (figure 4)"
        ),
    ),
    ("nats lost: x / y", ["ce_lost.x", "ce_lost.y"], "with x_hat for x, with y_hat for y"),
    (
        "cross-entropy of the model as it is, nats",
        ["ce.clean"],
        "of the tokens after the first two of a context",
    ),
    (
        f"elements with |J| above {ABOVE}",
        [f"above.{t}" for t in THRESHOLDS],
        "of a token (figures 2, 7, 33, 38)",
    ),
    (
        "the same, each J at unit L2 norm",
        [f"above_l2.{t}" for t in THRESHOLDS],
        "fewer only if J is sparser, whatever its scale",
    ),
    ("Hoyer sparsity of J", ["hoyer"], "(k - L1 / L2) / (k - 1); 0: all alike, 1: only one"),
    ("norm of J: L1 / L2 / L4 / Linf", ["l1", "l2", "l4", "linf"], "of a token (figure 35)"),
    (
        "share of all pairs with mean |J| > 0.01",
        ["global.0.01"],
        (
            "over the tokens on which the output latent is active (figure 36); above 4096 latents, of a "
            "random sample of output latents"
        ),
    ),
    (
        "functions: linear / JumpReLU / other",
        list(KINDS),
        "s_y,i on s_x,j of [0, max(5, s_x,j + 1)]: within 0.01 of a line, or 0 and then a line (8b)",
    ),
    (
        "the same, within 0.01 of their range",
        [f"{kind}_relative" for kind in KINDS],
        "so that a function does not become a line by being small",
    ),
    (
        "|J + delta| < 0.1 / < 0.1 |J|",
        ["on_line", "on_line_relative"],
        (
            "delta: how s_y,i changes when 1 is subtracted from s_x,j, of the same random pairs (figure "
            "8c: of pairs of equal rank)"
        ),
    ),
    ("share of tokens with an element of J that is not 0", ["not_zero"], ""),
    ("mean squared error: x / y", ["mse.x", "mse.y"], "over all elements"),
    ("cosine of v and v_hat: x / y", ["cosine.x", "cosine.y"], "mean over tokens"),
    ("active latents: x / y", ["active.x", "active.y"], "of a token, with a value above 0"),
    ("silent latents: x / y", ["silent.x", "silent.y"], "without a value above 0 on this text"),
]


def name_of(settings):
    """What a pair is: traditional, or a JSAE with its lambda and penalty."""
    if settings["jacobian_coef"] == 0:
        return "traditional SAEs"
    penalty = "" if settings["penalty"] == "l1" else f" of {settings['penalty']}"
    return f"JSAE, lambda {settings['jacobian_coef']:g}{penalty}"


def grouped(results):
    """-> {label: results that differ in the seed only}, by lambda; the label says what differs.

    InputError if one of them is there twice.
    """
    groups = {}
    for result in sorted(results, key=lambda result: result["settings"]["jacobian_coef"]):
        settings = dict(result["settings"])
        for name in ("seed", "output_dir", "device"):
            settings.pop(name)
        if settings["jacobian_coef"] == 0:
            settings["penalty"] = "l1"  # whichever it is
        group = groups.setdefault(json.dumps(settings), [])
        seed = result["settings"]["seed"]
        if seed in [other["settings"]["seed"] for other in group]:
            raise InputError(f"{result['run']} is there twice: another run of seed {seed} is equal")
        group.append(result)
    settings = [json.loads(key) for key in groups]
    labeled = {}
    for own, group in zip(settings, groups.values()):
        label = name_of(own)
        for name, value in own.items():
            differs = any(other.get(name) != value for other in settings)
            if differs and name not in ("jacobian_coef", "penalty"):
                label += f", {name} {value}"
        if label in labeled:
            label += f", {group[0]['run']}"
        labeled[label] = group
    return labeled


def measured(group, name):
    """-> a number of a group of runs and its error; NaN for what is not defined.

    One run: the number, standard error over documents. Several: mean, standard deviation.
    """
    values = [result["numbers"].get(name) for result in group]
    if None in values:
        return math.nan, math.nan
    if len(group) == 1:
        error = group[0]["errors"].get(name)
        return values[0], math.nan if error is None else error
    return np.mean(values), np.std(values, ddof=1)


def cell_of(group, names):
    texts = []
    for name in names:
        value, error = measured(group, name)
        text = "-" if math.isnan(value) else f"{value:.4g}"
        texts.append(text if math.isnan(error) else f"{text} ± {error:.2g}")
    return " / ".join(texts)


def table_of(groups):
    """-> rows of strings: the labels, then a row for each of ROWS."""
    table = [["", *groups]]
    for title, names, _ in ROWS:
        table.append([title, *(cell_of(group, names) for group in groups.values())])
    return table


def aligned(table):
    """-> lines of text with columns of the same width."""
    table = [[text.replace("±", "+-") for text in row] for row in table]  # in any terminal
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = []
    for row in table:
        cells = [text.ljust(width) for text, width in zip(row, widths)]
        lines.append("  ".join(cells).rstrip())
    return lines


def as_flags(settings, defaults):
    """-> words of a command line for those that are not the defaults, both {name: value}."""
    words = []
    for name, value in settings.items():
        if value == defaults.get(name):
            continue
        if isinstance(value, bool):
            words.append(jsae.flag(name if value else f"no_{name}"))
        else:
            words += [jsae.flag(name), str(value)]
    return words


def commands_of_comparison(run, settings, options):
    """The commands that train a run again at lambda 0, and that show both."""
    own = {field.name: settings[field.name] for field in dataclasses.fields(Config)}
    own["model"] = found_again(own["model"])
    usual = vars(Config()) | {"model": "", "output_dir": ""}
    if own["model"] == jsae.DEMO["model"]:
        usual |= jsae.DEMO
    own["output_dir"], given = "", own["output_dir"]
    at_0 = own | {"jacobian_coef": 0.0}
    folder = Config(**at_0).output_dir
    if given != Config(**own).output_dir:  # not the default
        folder = at_0["output_dir"] = f"{given}-lambda0"
    train = ["python", "jsae.py", *as_flags(at_0, usual)]
    measured_alike = vars(options) | {"reuse": True, "all": False, "output_dir": ""}
    show = ["python", "evaluate.py", run, folder, *as_flags(measured_alike, vars(Options()))]
    return f"{shlex.join(train)} && {shlex.join(show)}"


def new_figure(height, title):
    from matplotlib.figure import Figure  # only here, as matplotlib may be missing

    figure = Figure(figsize=(10, height), layout="constrained")
    figure.suptitle(title, fontsize=10)
    return figure


def wrapped(label):
    return textwrap.fill(label, 32)


def draw_first_look(groups):
    """|J| of the same tokens, each divided by its sum: on one scale, that of J plays no part."""
    figure = new_figure(
        0.7 + 2.1 * max(2, len(groups)), "how many elements hold a token's Jacobian"
    )
    left, right = figure.subfigures(1, 2, width_ratios=(5, 4))
    left.suptitle(
        "|J| / sum |J| at the last token of three texts, rows (outputs) and columns sorted",
        fontsize=9,
    )
    grids = {}
    for label, group in groups.items():
        J = np.array([picture["J"] for picture in group[0]["pictures"]])  # (3, k, k)
        grids[label] = J / np.maximum(J.sum((1, 2), keepdims=True), 1e-30)
    darkest = np.quantile(np.concatenate([grid.ravel() for grid in grids.values()]), 0.99)
    n_most = max(grid[0].size for grid in grids.values())
    rows = left.subplots(len(groups), 3, squeeze=False)
    for axes, (label, grid) in zip(rows, grids.items()):
        for ax, shares, picture in zip(axes, grid, groups[label][0]["pictures"]):
            image = ax.imshow(shares, vmin=0, vmax=darkest or 1, cmap="Blues")
            held = -np.sort(-shares, axis=None)
            n = int((held.cumsum() < 0.9).sum()) + 1
            ax.set(xticks=[], yticks=[])
            ax.set_title(f"at “{picture['text'].strip()[-12:]}”", fontsize=8)
            ax.set_xlabel(f"{min(n, shares.size)} of {shares.size} hold 90 %", fontsize=8)
        axes[0].set_ylabel(wrapped(label), fontsize=8)
    left.colorbar(image, ax=rows, shrink=0.6, extend="max", format="%g", pad=0.02)

    curve, bars = right.subplots(2, 1)
    sizes = [2**n for n in range(n_most.bit_length())]
    for label, group in groups.items():
        held = [measured(group, f"held_by.{n}")[0] for n in sizes]
        curve.plot(sizes, held, ".-", label=wrapped(label))
    curve.axhline(0.9, color="gray", linewidth=0.5)
    curve.set_xscale("log", base=2)
    curve.set_xticks(sizes, map(str, sizes), fontsize=8)
    curve.set(xlim=(1, sizes[-1]), ylim=(0, 1), xlabel="n", ylabel="share of sum |J|")
    curve.set_title("held by a token's n largest elements, mean over tokens", fontsize=9)
    curve.legend(fontsize=8)
    draw_bars(bars, groups)
    return figure


def draw_bars(ax, groups):
    """Numbers of each group, as shares of the largest, with the numbers themselves above."""
    names = {
        "hold_90": "elements that\nhold 90 %",
        "effective_inputs": "effective\ninputs",
        "hub": "hub",
        "ce_lost.path": "nats lost",
    }
    values = np.array([[measured(group, name)[0] for name in names] for group in groups.values()])
    largest = np.fmax.reduce(np.abs(values))  # NaN: not defined
    width = 0.8 / len(groups)
    for n, (label, row) in enumerate(zip(groups, values)):
        places = np.arange(len(names)) + n * width
        drawn = ax.bar(places, row / largest, width, label=wrapped(label))
        ax.bar_label(drawn, [f"{value:.3g}" for value in row], fontsize=7)
    ax.set_xticks(np.arange(len(names)) + 0.4 - width / 2, names.values(), fontsize=8)
    ax.set(yticks=[], ylim=(0, 1.15))
    ax.set_title("less is sparser, or costs less; bars are relative to the largest", fontsize=9)


def draw_trade_off(groups):
    """Nats lost over four measures of J, a point for each group."""
    figure = new_figure(
        6, "what J gains against what the language model loses (figures 5, 27 to 29)"
    )
    names = {
        "mean_abs": "mean |J|",
        "above.0.01": "elements with |J| > 0.01",
        "hold_90": "elements that hold 90 % of sum |J|",
        "effective_inputs": "effective inputs of an output latent",
    }
    for ax, (name, words) in zip(figure.subplots(2, 2).flat, names.items()):
        for label, group in groups.items():
            x, x_error = measured(group, name)
            y, y_error = measured(group, "ce_lost.path")
            ax.errorbar(x, y, y_error, x_error, "o", label=wrapped(label))
        ax.set(xlabel=words, ylabel="nats lost, whole path")
    ax.legend(fontsize=8)
    return figure


def draw_functions(groups):
    """A row for each group: changes of s_y,i over J, and examples of functions of each kind."""
    title = "how s_y,i changes when 1 is subtracted from s_x,j (figure 8c); functions (8a, 9, 12)"
    figure = new_figure(0.5 + 2.4 * len(groups), title)
    rows = figure.subplots(len(groups), 4, squeeze=False)
    for axes, (label, group) in zip(rows, groups.items()):
        result = group[0]
        axes[0].scatter(*np.array(result["scatter"]).reshape(-1, 2).T, s=3)
        axes[0].axline((0, 0), slope=-1, color="gray", linewidth=0.5)
        axes[0].set(xlabel="J", ylabel=f"{wrapped(label)}\nchange of s_y,i")
        for ax, kind in zip(axes[1:], KINDS):
            for t, v in result["curves"][kind]:
                ax.plot(t, v)
            share = measured(group, kind)[0]
            title = kind.replace("jumprelu", "JumpReLU")
            ax.set(xlabel="s_x,j", ylabel="s_y,i", title=f"{title}: {share:.1%}")
    return figure


def draw(groups):
    """-> {name: PNG}; none if matplotlib is not installed. A group is shown by its first run."""
    try:
        import matplotlib
    except ImportError:
        notice("no figures; they need matplotlib: pip install matplotlib")
        return {}
    drawn = {"first_look": draw_first_look, "functions": draw_functions}
    if len(groups) > 1:
        drawn["trade_off"] = draw_trade_off
    figures = {}
    with matplotlib.rc_context({"text.parse_math": False}):  # a $ in the text is a $
        for name, draw_one in drawn.items():
            file = io.BytesIO()
            draw_one(groups).savefig(file, format="png", dpi=150)
            figures[name] = file.getvalue()
    return figures


STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: auto; padding: 1rem }
td { padding: 0 .5rem; border: 1px solid #8886 }
img { width: 100%; background: white }
details { margin: .2rem 1rem }
pre { margin: 0; white-space: pre-wrap }
span { background: rgba(255, 140, 0, var(--share)) }
"""
READING = (
    "Below it, the input latents that contribute most to it over the text (sum of |J s_x,j|). "
    "Every line is a place where a latent is large: its largest value there, and the text, shaded "
    "by the latent's value at each token."
)


def details(head, examples, inside="", is_open=False):
    """A line to open: windows of text, every token shaded by its share of the largest value."""
    lines = []
    for example in examples:
        largest = max(example["acts"])
        line = f"{largest:.2f}  "
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
        head += f"mean J {edge['mean_J']:.3g} on {edge['tokens']:,} tokens"
        head += f", of {edge['different_tokens']:,} different words or parts of words"
        inputs += details(head, edge["examples"], is_open=is_open)
    head = f"output latent {latent['latent']}"
    return details(head, latent["examples"], inputs, is_open)


def report(groups, table, figures):
    """-> report.html: one static page, with nothing that is loaded from elsewhere."""
    page = [f"<!doctype html><meta charset=utf-8><title>JSAEs</title><style>{STYLE}</style>"]
    page.append("<h1>Evaluation of Jacobian SAEs</h1>")
    last = [*groups][-1]  # of the largest lambda
    for latent in groups[last][0]["latents"][:1]:
        page.append(f"<h2>An output latent of {html.escape(last)}, and what feeds it</h2>")
        page.append(f"<p>{READING}")
        page.append(details_of(latent, is_open=True))
    page.append("<h2>All numbers</h2><table>")
    meanings = ["what it is", *(meaning for _, _, meaning in ROWS)]
    for row, meaning in zip(table, meanings):
        page.append("<tr>")
        page.extend(f"<td>{html.escape(text)}" for text in (*row, meaning))
    page.append(
        "</table><p>±: standard error over documents; of several runs, standard deviation over seeds"
    )
    for name, png in figures.items():
        data = base64.b64encode(png).decode()
        page.append(f'<p><img alt="{name}" src="data:image/png;base64,{data}">')
    for label, group in groups.items():
        page.append(f"<h2>{html.escape(label)}: output latents and what feeds them</h2>")
        page.extend(details_of(latent) for latent in group[0]["latents"])
    return "\n".join(page)


# ---- 8. Command line -----------------------------------------------------------------------------


def place_of(run, options):
    """-> the folder of a run's evaluation.json: its own or, where none can write, another."""
    folder = Path(run).expanduser()
    if folder.is_dir() and os.access(folder, os.W_OK):
        return folder
    return Path(options.output_dir or ".") / run.strip("/").replace("/", "--")


def result_of(run, options):
    """-> what evaluation.json of a run holds, evaluated anew unless --reuse says otherwise."""
    path = place_of(run, options) / "evaluation.json"
    if options.reuse and path.exists():
        result = json.loads(path.read_text())
        if result["settings"].get("finished") == jsae.is_finished(jsae.run_folder(run)):
            return result
    result = evaluate(run, options)
    jsae.write_file(path, json.dumps(result, allow_nan=False).encode())
    return result


def evaluate_by_command(argv):
    """What `python evaluate.py` does: evaluate each run, print the table, write the report."""
    parser = jsae.make_parser(Options, "python evaluate.py RUN [RUN ...] [--option value ...]")
    parser.add_argument("runs", nargs="+", help="folders or hub ids of runs")
    given = vars(parser.parse_args(argv))
    runs = list(dict.fromkeys(given.pop("runs")))  # each once
    options = Options(**given)
    folder = Path(options.output_dir or place_of(runs[0], options)).expanduser()
    if options.output_dir:
        folder.mkdir(parents=True, exist_ok=True)  # before all the work

    results = [{**result_of(run, options), "run": run} for run in runs]
    groups = grouped(results)
    table = table_of(groups)
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="replace")  # a terminal may know ASCII only
    for line in aligned(table if options.all else table[: 1 + SHOWN]):
        print(line)
    print("+-: standard error over documents; of several runs, standard deviation over seeds")
    figures = draw(groups)
    for name, png in figures.items():
        jsae.write_file(folder / "figures" / f"{name}.png", png)
    jsae.write_file(folder / "report.html", report(groups, table, figures).encode())
    print(f"all numbers, figures, latents and their text: {folder / 'report.html'}")
    if len(runs) == 1 and results[0]["settings"]["jacobian_coef"] > 0:
        commands = commands_of_comparison(runs[0], results[0]["settings"], options)
        print(f"beside it, two traditional SAEs:\n    {commands}")


def main(argv=None) -> int:
    """-> exit status: 0, 2 after one line about what was given, 130 after Ctrl-C."""
    return jsae.run_program("evaluate.py", evaluate_by_command, argv)


if __name__ == "__main__":
    sys.exit(main())
