"""Evaluation of Jacobian SAEs: the measures of the paper, and scale-free ones beside them.

    python evaluate.py runs/A                one run: evaluation.json, figures/, report.html
    python evaluate.py runs/A runs/B         side by side, with one report in the first one's folder
    python evaluate.py runs/* --reuse --plot jacobian_coef jacobian.hoyer       a sweep, drawn

The symbols are those of jsae.py. All numbers are of held-out text; the first token of every context
is left out. Where a number of evaluation.json is defined, with its unit, range and the paper's
figure or equation:

    reconstruction.x, reconstruction.y          Reconstruction
    ce                                          CrossEntropy
    jacobian.count_above, .share_above          ElementsAbove
    jacobian.mean_abs, .norms                   Norms
    jacobian.mass, .hoyer, .paired, ...         Concentration
    jacobian.histogram                          Histogram
    jacobian.effective_inputs (hub, too)        EffectiveInputs
    global                                      GlobalJacobian
    linearity                                   class_shares, change_by_one, second_derivatives
    latents, examples                           OutputStrength, Edges, Examples
    pictures                                    Pictures
    training                                    about_run
    standard_error                              ratio

A number that is not defined, such as the mean over no token, is null there. Runs that differ in the
seed of training only make one column of the table.
"""

import argparse
import base64
import copy
import dataclasses
import html
import io
import json
import math
import sys
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from tqdm import tqdm

import jsae
from jsae import InputError, Latents, active_jacobian, flag

# ---- 1. Held-out text ----------------------------------------------------------------------------

MOST_TOKENS = 2**22  # of local text that is read, about 2^24 characters
CHUNK_BYTES = 2**24  # of the largest temporary tensor; on a GPU 32 times as many


class Text(NamedTuple):
    """What the two SAEs are evaluated on.

    ids          (contexts, T)  token ids
    documents    (contexts, T)  number of the document that each token is of, from 0
    n_documents  how many documents there are
    n_tokens     how many tokens are evaluated: all but the first of each context
    """

    ids: Tensor
    documents: Tensor
    n_documents: int
    n_tokens: int


def is_local(dataset):
    return dataset == "stdlib" or jsae.local_path(dataset) is not None


def document_numbers(ids, end):
    """Contexts in the order of the text, (contexts, T) -> the number of each token's document.

    A document ends with the token `end`; if that is None, each context is a document. The first
    token of a context is no part of the text and ends nothing.
    """
    if end is None:
        return torch.arange(len(ids)).unsqueeze(1).expand_as(ids)
    is_end = (ids == end).long()
    is_end[:, 0] = 0
    ends_so_far = is_end.flatten().cumsum(0).view_as(ids)
    return ends_so_far - is_end


def words_of(ids, tokenizer):
    """Token ids -> the text of each one, or its number if there is no tokenizer."""
    if tokenizer is None:
        return [f" {number}" for number in ids]
    return [tokenizer.decode([number]) for number in ids]


def held_out_text(settings, part, model, tokenizer, n_tokens, seed) -> Text:
    """The Text with n_tokens evaluated tokens, rounded up to whole contexts.

    settings: a Config that names the text; part: "held out" or "all". Text is packed into contexts
    as in training. Of local text, MOST_TOKENS are read and contexts are drawn from them by the
    seed, so that even a small --tokens covers many documents; of the hub, the first ones are taken.
    (The paper takes one context from each document.) InputError if there is less text.
    """
    width = settings.context_size - 1
    n_contexts = math.ceil(n_tokens / width)
    local = is_local(settings.dataset)
    n_read = max(n_contexts, MOST_TOKENS // width) if local else n_contexts
    contexts = list(islice(jsae.token_contexts(settings, model, part), n_read))
    if len(contexts) < n_contexts:
        raise InputError(
            f"--tokens is {n_tokens}, but {settings.dataset} ({part}) has {len(contexts) * width}; "
            "lower it, or name another text by --dataset"
        )
    ids = torch.from_numpy(np.stack(contexts))
    documents = document_numbers(ids, jsae.special_id("eos_token_id", tokenizer, model))
    if local:
        order = np.random.default_rng(seed).permutation(len(ids))
        chosen = torch.from_numpy(order[:n_contexts])
        ids = ids[chosen]
        documents = documents[chosen]
    names, documents = documents.unique(return_inverse=True)
    return Text(ids, documents, len(names), n_contexts * width)


class Tokens(NamedTuple):
    """B evaluated tokens, and what the pair makes of them.

    number        (B,)           counted over the whole Text
    document      (B,)           number of the token's document
    x, y          (B, d_model)   input and output of the MLP
    s_x, s_y      Latents (B, k)
    x_hat, y_hat  (B, d_model)
    """

    number: Tensor
    document: Tensor
    x: Tensor
    y: Tensor
    s_x: Latents
    s_y: Latents
    x_hat: Tensor
    y_hat: Tensor


def part_of(tokens, chosen):
    """The same of some of the tokens; chosen: a slice, a mask or indices."""
    return Tokens(
        number=tokens.number[chosen],
        document=tokens.document[chosen],
        x=tokens.x[chosen],
        y=tokens.y[chosen],
        s_x=Latents(tokens.s_x.acts[chosen], tokens.s_x.idx[chosen]),
        s_y=Latents(tokens.s_y.acts[chosen], tokens.s_y.idx[chosen]),
        x_hat=tokens.x_hat[chosen],
        y_hat=tokens.y_hat[chosen],
    )


def chunk_size(numbers_per_item, like):
    """Items in a chunk, if each takes so many numbers of the dtype of `like`."""
    n_bytes = CHUNK_BYTES if like.device.type == "cpu" else 32 * CHUNK_BYTES
    return max(1, n_bytes // (numbers_per_item * like.dtype.itemsize))


def chunks_of(tokens, numbers_per_token):
    """Yield the tokens in chunks."""
    size = chunk_size(numbers_per_token, tokens.x)
    for start in range(0, len(tokens.x), size):
        yield part_of(tokens, slice(start, start + size))


def encode_and_decode(sae, v):
    """v (B, d_model) -> its Latents (B, k) and v_hat (B, d_model), by chunks of tokens."""
    n_latents, d_model = sae.W_enc.shape
    acts = []
    idx = []
    decoded = []
    for chunk in v.split(chunk_size(max(n_latents, sae.k * d_model), v)):
        s = sae.encode(chunk)
        acts.append(s.acts)
        idx.append(s.idx)
        decoded.append(sae.decode(s))
    return Latents(torch.cat(acts), torch.cat(idx)), torch.cat(decoded)


def batches(model, mlp, sae_x, sae_y, text, title):
    """Yield (ids (contexts, T), Tokens) for all of the text; the title is for the progress bar.

    As many contexts at a time as their logits allow. InputError if an x is not finite.
    """
    n_words = model.get_input_embeddings().weight.shape[0]
    d_mlp = len(mlp.W_in)
    n_contexts, T = text.ids.shape
    size = chunk_size(T * max(n_words, d_mlp), mlp.W_in)
    for start in tqdm(range(0, n_contexts, size), title, leave=False):
        ids = text.ids[start : start + size].to(model.device)
        documents = text.documents[start : start + size, 1:].to(model.device)
        x = jsae.mlp_inputs(model, mlp, ids)[:, 1:].flatten(0, 1)  # (B, d_model)
        if not x.isfinite().all():
            raise InputError("NaN or Inf among the inputs of the MLP on the held-out text")
        y = mlp(x)
        s_x, x_hat = encode_and_decode(sae_x, x)
        s_y, y_hat = encode_and_decode(sae_y, y)
        number = start * (T - 1) + torch.arange(len(x), device=model.device)
        yield ids, Tokens(number, documents.flatten(), x, y, s_x, s_y, x_hat, y_hat)


class Estimate(NamedTuple):
    """A number of evaluation.json and its standard error over documents; None: not defined."""

    value: float | None
    error: float | None


def ratio(a, b) -> Estimate:
    """r = A / B, the sums of a and b over documents: those D of them where a_d or b_d is not 0.

    Documents are drawn, not tokens, so the standard error of r is
        sqrt(D / (D - 1) sum_d (a_d - r b_d)^2) / |B|.
    """
    present = (a != 0) | (b != 0)
    D = int(present.sum())
    B = b.sum()
    if B == 0:
        return Estimate(None, None)
    r = a.sum() / B
    if D < 2:
        return Estimate(r.item(), None)
    squares = (a - r * b).square().sum()
    error = (D / (D - 1) * squares).sqrt() / B.abs()
    return Estimate(r.item(), error.item())


def ratios(a, b):
    """a (D, m), b (D,) -> m Estimates."""
    return [ratio(column, b) for column in a.T]


class DocumentSums:
    """Sums over the tokens of each document, in float64: sums[name] is (D,) or (D, m)."""

    def __init__(self, n_documents):
        self.n_documents = n_documents
        self.sums = {}

    def __getitem__(self, name):
        return self.sums[name]

    def add(self, document, **values):
        """document (B,): number of each token's document; values (B,) or (B, m), by name."""
        for name, value in values.items():
            if name not in self.sums:
                shape = (self.n_documents, *value.shape[1:])
                self.sums[name] = torch.zeros(shape, dtype=torch.float64, device=value.device)
            self.sums[name].index_add_(0, document, value.double())


# ---- 2. Reconstruction ---------------------------------------------------------------------------


class Reconstruction:
    """How well one SAE reconstructs v, which is x or y (Appendix E, figures 4, 21, 23 to 26).

    mse                 mean of (v_hat - v)^2 over all elements; from 0
    fvu                 sum of (v_hat - v)^2 / sum of (v - mean v)^2, over all elements; 0: perfect
    explained_variance  1 - fvu; 1 is perfect (Appendix E words it as fvu)
    cosine              mean over tokens of the cosine of v and v_hat; -1 to 1
    active              latents with a positive value, per token; 0 to k
    silent              latents without a positive value on all of these tokens; 0 to n_latents
    rare                latents positive on less than one token in 10^6; null below 10^6 tokens
    density             latents by the share of tokens on which they are positive: a count for each
                        half power of ten, with lower ends 10^density_log10 (the first: above 0)
    """

    def __init__(self, sae, n_documents):
        self.sums = DocumentSums(n_documents)
        self.fired = torch.zeros(len(sae.W_enc), dtype=torch.long, device=sae.W_enc.device)

    def add(self, v, v_hat, s, document):
        v = v.double()
        v_hat = v_hat.double()
        self.sums.add(
            document,
            tokens=torch.ones_like(v[:, 0]),
            error=(v_hat - v).square().sum(1),
            square=v.square().sum(1),
            total=v,
            cosine=F.cosine_similarity(v_hat, v),
        )
        self.fired += torch.bincount(s.idx[s.acts > 0], minlength=len(self.fired))

    def squares_about_the_mean(self):
        """sum of (v - mean v)^2 for each document, (D,), where the mean is of all documents."""
        tokens = self.sums["tokens"]
        total = self.sums["total"]  # (D, d_model)
        mean = total.sum(0) / tokens.sum()
        return self.sums["square"] - 2 * total @ mean + tokens * mean.square().sum()

    def result(self):
        tokens = self.sums["tokens"]
        n_tokens = int(tokens.sum())
        d_model = self.sums["total"].shape[1]
        fvu = ratio(self.sums["error"], self.squares_about_the_mean())
        explained = Estimate(None, None)
        if fvu.value is not None:
            explained = Estimate(1 - fvu.value, fvu.error)
        share = self.fired.double() / n_tokens
        lower_ends = np.arange(-6, 0.5, 0.5)
        powers = share[share > 0].log10().clamp(min=-6).cpu().numpy()
        return {
            "mse": ratio(self.sums["error"], tokens * d_model),
            "fvu": fvu,
            "explained_variance": explained,
            "cosine": ratio(self.sums["cosine"], tokens),
            "active": int(self.fired.sum()) / n_tokens,
            "silent": int((self.fired == 0).sum()),
            "rare": int((share < 1e-6).sum()) if n_tokens >= 10**6 else None,
            "density": np.histogram(powers, lower_ends)[0].tolist(),
            "density_log10": lower_ends[:-1].tolist(),
        }


# ---- 3. Cross-entropy ----------------------------------------------------------------------------


def next_token_logits(model, ids):
    """ids (contexts, T) -> (contexts * (T - 2), vocabulary).

    A prediction is made at each token but the first, which is not evaluated, and the last, whose
    next token is not known.
    """
    logits = model(input_ids=ids, use_cache=False).logits
    return logits[:, 1:-1].flatten(0, 1)


def next_token_logits_with(y, model, mlp, ids):
    """The same with y (contexts * (T - 1), d_model) in place of the MLP's output, but for the first
    token of each context, where it stays what it is."""

    def replace(module, args, output):
        old = output.reshape(*ids.shape, -1)
        new = torch.cat([old[:, :1], y.view_as(old[:, 1:])], 1)
        return new.view_as(output)

    with mlp.writer.register_forward_hook(replace):
        return next_token_logits(model, ids)


def cross_entropies(logits, targets):
    """(B, vocabulary), (B,) -> -log p(target) in nats, (B,)."""
    size = chunk_size(logits.shape[1], logits)
    parts = []
    for chunk, target in zip(logits.split(size), targets.split(size)):
        parts.append(F.cross_entropy(chunk, target, reduction="none"))
    return torch.cat(parts)


def kl_divergences(clean, replaced):
    """KL(clean || replaced) of each prediction, in nats. Logits (B, vocabulary), twice -> (B,)."""
    size = chunk_size(clean.shape[1], clean)
    parts = []
    for p, q in zip(clean.split(size), replaced.split(size)):
        log_p = p.log_softmax(1)
        log_q = q.log_softmax(1)
        parts.append((log_p.exp() * (log_p - log_q)).sum(1))
    return torch.cat(parts)


ABLATION_OF = {"x": "x_ablated", "y": "y_ablated", "both": "y_ablated"}  # of each site


class CrossEntropy:
    """What the language model loses where x, y or the path from x to y is replaced (Appendix E).

    Means over predictions. Sites, one at a time: x, by x_hat; y, by y_hat; both, the whole path of
    f_s: y by the reconstruction of f(x_hat).

    clean           cross-entropy of the model as it is, in nats; from 0
    sae             the same with the site replaced, in nats
    ablated         the same with the site set to 0, in nats; for `both`, with y set to 0
    score           (ablated - sae) / (ablated - clean); 1 is perfect, 0 is no better than 0 in its
                    place (CE loss score: figures 4, 5, 22, 24 to 29)
    increase_ratio  1 - score = (sae - clean) / (ablated - clean), as Appendix E words it
    kl              KL(clean || replaced) of the predictions, in nats; 0 is perfect
    """

    def __init__(self, model, mlp, sae_y, n_documents):
        self.model = model
        self.mlp = mlp
        self.sae_y = sae_y
        self.sums = DocumentSums(n_documents)

    def add(self, ids, tokens):
        """ids (contexts, T) and their Tokens."""
        targets = ids[:, 2:].flatten()
        document = tokens.document.view(len(ids), -1)[:, 1:].flatten()  # of the targets
        clean = next_token_logits(self.model, ids)
        loss = cross_entropies(clean, targets)
        self.sums.add(document, predictions=torch.ones_like(loss), clean=loss)
        for name, y in self.replacements(tokens):
            replaced = next_token_logits_with(y, self.model, self.mlp, ids)
            self.sums.add(document, **{name: cross_entropies(replaced, targets)})
            if name in ABLATION_OF:  # a site, not an ablation
                self.sums.add(document, **{f"kl_{name}": kl_divergences(clean, replaced)})
            del replaced  # before the next ones are made

    def replacements(self, tokens):
        """Yield (name, what takes the place of y)."""
        y_of_x_hat = self.mlp(tokens.x_hat)
        yield "x", y_of_x_hat
        yield "y", tokens.y_hat
        yield "both", encode_and_decode(self.sae_y, y_of_x_hat)[1]
        yield "x_ablated", self.mlp(torch.zeros_like(tokens.x))
        yield "y_ablated", torch.zeros_like(tokens.y)

    def result(self):
        sums = self.sums
        n = sums["predictions"]
        result = {"clean": ratio(sums["clean"], n)}
        for site, ablation in ABLATION_OF.items():
            ablated = sums[ablation]
            result[site] = {
                "sae": ratio(sums[site], n),
                "ablated": ratio(ablated, n),
                "score": ratio(ablated - sums[site], ablated - sums["clean"]),
                "increase_ratio": ratio(sums[site] - sums["clean"], ablated - sums["clean"]),
                "kl": ratio(sums[f"kl_{site}"], n),
            }
        return result


# ---- 4. The Jacobian -----------------------------------------------------------------------------
#
# Each measure is added J (B, k, k) and the Tokens that it is of. J is 0 in the rows and columns of
# latents that ReLU cut off. A token counts as paired if its J is not all 0.


def magnitudes(J):
    """J (B, k, k) -> |J| (B, N) in float64, with N = k^2."""
    return J.abs().double().flatten(1)


def is_paired(A):
    """A (B, N) -> (B,), 1.0 or 0.0: whether a token is paired."""
    return A.any(1).double()


class ElementsAbove:
    """How many elements of J are above thresholds (figures 2, 7, 27, 28, 33, 38).

    thresholds         ascending
    count_above.raw    elements with |J| above each, a mean over tokens; 0 to N = k^2
    count_above.l1     the same of J divided by the L1 norm of the token's J, a mean over tokens
                       that are paired; changes of J's scale do not change it
    count_above.l2     the same with the L2 norm
    count_above.linf   the same with the largest |J|
    share_above        count_above / N; 0 to 1
    """

    def __init__(self, thresholds, k, n_documents):
        self.thresholds = thresholds
        self.n_elements = k * k
        self.sums = DocumentSums(n_documents)

    def add(self, J, tokens):
        A = magnitudes(J)
        paired = is_paired(A)
        norms = {
            "raw": torch.ones_like(paired),
            "l1": A.sum(1),
            "l2": A.norm(dim=1),
            "linf": A.amax(1),
        }
        self.sums.add(tokens.document, tokens=torch.ones_like(paired), paired=paired)
        for scale, norm in norms.items():
            scaled = A / norm.where(norm > 0, 1).unsqueeze(1)
            counts = [(scaled > threshold).sum(1) for threshold in self.thresholds]
            self.sums.add(tokens.document, **{scale: torch.stack(counts, 1)})

    def result(self):
        count_above = {}
        share_above = {}
        for scale in ("raw", "l1", "l2", "linf"):
            tokens = self.sums["tokens" if scale == "raw" else "paired"]
            count_above[scale] = ratios(self.sums[scale], tokens)
            share_above[scale] = ratios(self.sums[scale], tokens * self.n_elements)
        return {
            "thresholds": list(self.thresholds),
            "count_above": count_above,
            "share_above": share_above,
        }


class Norms:
    """How large J is: means over tokens of norms of its N = k^2 elements (figure 35).

    mean_abs             mean of |J| over tokens and elements; from 0. The penalty's term in Eq. 5
    norms.l1, l2, l4     (sum |J|^p)^(1/p); from 0
    norms.linf           the largest |J|; from 0
    """

    def __init__(self, n_documents):
        self.sums = DocumentSums(n_documents)

    def add(self, J, tokens):
        A = magnitudes(J)
        self.sums.add(
            tokens.document,
            tokens=torch.ones_like(A[:, 0]),
            mean_abs=A.mean(1),
            l1=A.sum(1),
            l2=A.norm(dim=1),
            l4=A.norm(4, dim=1),
            linf=A.amax(1),
        )

    def result(self):
        tokens = self.sums["tokens"]
        norms = {name: ratio(self.sums[name], tokens) for name in ("l1", "l2", "l4", "linf")}
        return {"mean_abs": ratio(self.sums["mean_abs"], tokens), "norms": norms}


def hoyer(l1, l2, n_elements):
    """(sqrt(N) - L1 / L2) / (sqrt(N) - 1): 0 if all are equal, 1 if one alone is not 0."""
    root = n_elements**0.5
    return (root - l1 / l2) / (root - 1)


class Concentration:
    """Whether few elements of J hold most of it; J's scale plays no part. N = k^2 elements.

    paired        share of tokens that are paired; mass and hoyer are means over these
    mass          how many of the largest elements it takes to hold 50, 90, 99 % of sum |J|; 1 to N
    hoyer         Hoyer sparsity of a token's J; 0 if all |J| are equal, 1 if one alone is not 0;
                  null if k = 1
    hoyer_pooled  Hoyer sparsity of the elements of all tokens together: of the means over tokens of
                  sum |J| and sum J^2, as they can be read from a histogram (figure 32); above 1 if
                  few tokens hold most
    """

    SHARES = (50, 90, 99)

    def __init__(self, k, n_documents):
        self.n_elements = k * k
        self.sums = DocumentSums(n_documents)

    def add(self, J, tokens):
        A = magnitudes(J)
        paired = is_paired(A)
        l1 = A.sum(1)
        l2 = A.norm(dim=1)
        self.sums.add(
            tokens.document,
            tokens=torch.ones_like(l1),
            paired=paired,
            l1=l1,
            square=l2.square(),
        )
        held = A.sort(1, descending=True).values.cumsum(1)
        for share in self.SHARES:
            fewer = (held < share / 100 * held[:, -1:]).sum(1)  # elements that are not yet enough
            self.sums.add(tokens.document, **{f"mass_{share}": (fewer + 1) * paired})
        if self.n_elements > 1:
            sparsity = hoyer(l1, l2.where(l2 > 0, 1), self.n_elements)
            self.sums.add(tokens.document, hoyer=sparsity * paired)

    def result(self):
        paired = self.sums["paired"]
        tokens = self.sums["tokens"].sum()
        sparsity = Estimate(None, None)
        pooled = None
        if self.n_elements > 1 and paired.sum() > 0:
            sparsity = ratio(self.sums["hoyer"], paired)
            l1 = self.sums["l1"].sum() / tokens
            l2 = (self.sums["square"].sum() / tokens).sqrt()
            pooled = hoyer(l1, l2, self.n_elements).item()
        return {
            "paired": ratio(paired, self.sums["tokens"]),
            "mass": {
                str(share): ratio(self.sums[f"mass_{share}"], paired) for share in self.SHARES
            },
            "hoyer": sparsity,
            "hoyer_pooled": pooled,
        }


class Histogram:
    """Elements of all tokens by |J| (figures 32, 34).

    histogram  how many elements: 1100 bins of 0.001, and one for all from 1.1 on
    """

    BIN = 0.001
    N_BINS = 1100

    def __init__(self, device):
        self.counts = torch.zeros(self.N_BINS + 1, dtype=torch.long, device=device)

    def add(self, J, tokens):
        bins = (magnitudes(J) / self.BIN).clamp(max=self.N_BINS).long()
        self.counts += torch.bincount(bins.flatten(), minlength=self.N_BINS + 1)

    def result(self):
        return {"histogram": self.counts.tolist()}


def shares_of_inputs(J, s_x):
    """p_ij = c_ij^2 / sum_j c_ij^2, (B, k, k), with c_ij = J_ij s_x,j.

    To first order, c_ij is what input latent j adds to s_y,i. A row of zeros stays one.
    """
    c = J.double() * s_x.acts.double().unsqueeze(1)
    squares = c.square()
    total = squares.sum(2, keepdim=True)
    return squares / total.where(total > 0, 1)


def gaussian_jacobian(tokens, seed):
    """Normal elements in place of J (B, k, k), drawn from the seed and each token's number."""
    k_y = tokens.s_y.acts.shape[1]
    k_x = tokens.s_x.acts.shape[1]
    drawn = []
    for number in tokens.number.tolist():
        drawn.append(np.random.default_rng([seed, number]).standard_normal((k_y, k_x)))
    J = torch.from_numpy(np.stack(drawn)).to(tokens.x.device)
    return J * (tokens.s_y.acts > 0).unsqueeze(2) * (tokens.s_x.acts > 0).unsqueeze(1)


class EffectiveInputs:
    """How many input latents account for an output latent (not in the paper).

    With p_ij = c_ij^2 / sum_j c_ij^2 and c_ij = J_ij s_x,j, which no rescaling of a latent changes:

    value         effective inputs, 1 / sum_j p_ij^2: a mean over all i of all tokens, where i is an
                  active output latent with sum_j c_ij^2 > 0; from 1, one input accounts for all, to
                  k, all do alike
    hub           max_j of the mean of p_ij over those i of a token; a mean over tokens that have
                  one; from 1 / k to 1. The share of the one input that feeds most outputs: each row
                  of J can be sparse because the same input feeds them all
    gaussian      value, with independent normal elements in place of J: what the activations alone
                  give
    hub_gaussian  hub, likewise
    """

    def __init__(self, seed, n_documents):
        self.seed = seed
        self.sums = DocumentSums(n_documents)
        self.gaussian_sums = DocumentSums(n_documents)

    def add(self, J, tokens):
        gaussian = gaussian_jacobian(tokens, self.seed)
        self.add_shares(self.sums, shares_of_inputs(J, tokens.s_x), tokens)
        self.add_shares(self.gaussian_sums, shares_of_inputs(gaussian, tokens.s_x), tokens)

    def add_shares(self, sums, p, tokens):
        has_inputs = p.any(2)  # (B, k): output latents
        n_outputs = has_inputs.sum(1)
        effective = 1 / p.square().sum(2).where(has_inputs, 1)
        mean_p = p.sum(1) / n_outputs.clamp(min=1).unsqueeze(1)  # (B, k): over output latents
        sums.add(
            tokens.document,
            effective=(effective * has_inputs).sum(1),
            outputs=n_outputs,
            hub=mean_p.amax(1),
            tokens=n_outputs > 0,
        )

    def result(self):
        sums = self.sums
        gaussian = self.gaussian_sums
        numbers = {
            "value": ratio(sums["effective"], sums["outputs"]),
            "gaussian": ratio(gaussian["effective"], gaussian["outputs"]),
            "hub": ratio(sums["hub"], sums["tokens"]),
            "hub_gaussian": ratio(gaussian["hub"], gaussian["tokens"]),
        }
        return {"effective_inputs": numbers}


def rows_in_table(row_of, n_latents, tokens):
    """Select the rows J[b, i] whose output latent has a row in a table (R, n_latents).

    row_of (n_latents,): an output latent's row in the table, -1 if it has none. -> b, i: which rows
    of J, with the row of the table for each; places (.., k): the index of each element of these
    J[b, i] in the flattened table.
    """
    latent = tokens.s_y.idx
    b, i = ((tokens.s_y.acts > 0) & (row_of[latent] >= 0)).nonzero(as_tuple=True)
    row = row_of[latent[b, i]]
    places = row.unsqueeze(1) * n_latents + tokens.s_x.idx[b]
    return b, i, row, places


class GlobalJacobian:
    """J averaged over tokens: how many of all n x n pairs of latents are connected (figure 36).

    The mean of |J_ij| over the tokens on which output latent i is active; an input latent that is
    not active counts as 0.

    rows         output latents looked at: all n, or if n is above 4096 a random sample of 2^24 / n
    share_above  share of their pairs with a mean above each threshold; 0 to 1. (The figure's
                 caption averages J; the authors' code and we |J|.)
    """

    def __init__(self, n_latents, thresholds, seed, device):
        n_rows = min(n_latents, max(1, 2**24 // n_latents))
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randperm(n_latents, generator=generator)[:n_rows]
        self.thresholds = thresholds
        self.row_of = torch.full((n_latents,), -1, device=device)  # -1: not in the sample
        self.row_of[rows.to(device)] = torch.arange(n_rows, device=device)
        self.tokens = torch.zeros(n_rows, dtype=torch.float64, device=device)
        self.total = torch.zeros(n_rows, n_latents, dtype=torch.float64, device=device)

    def add(self, J, tokens):
        b, i, row, places = rows_in_table(self.row_of, len(self.row_of), tokens)
        self.tokens.index_add_(0, row, torch.ones_like(row, dtype=torch.float64))
        self.total.view(-1).index_add_(0, places.flatten(), J[b, i].abs().double().flatten())

    def result(self):
        counts = torch.zeros(len(self.thresholds), dtype=torch.long)
        for total, n_tokens in zip(self.total, self.tokens.clamp(min=1)):
            mean = total / n_tokens
            counts += torch.tensor([int((mean > threshold).sum()) for threshold in self.thresholds])
        shares = counts.double() / self.total.numel()
        return {"rows": len(self.total), "share_above": shares.tolist()}


class Pictures:
    """|J| of random tokens, drawn from the seed.

    The same tokens for every pair that is evaluated with the same --tokens on the same contexts.

    token  its number
    text   the token and what stands before it
    J      |J|, rows and columns sorted by their sums, largest first
    """

    N = 3

    def __init__(self, n_tokens, seed):
        generator = torch.Generator().manual_seed(seed)
        self.numbers = torch.randperm(n_tokens, generator=generator)[: self.N].tolist()
        self.found = {}

    def add(self, J, tokens):
        first = int(tokens.number[0])
        for number in self.numbers:
            if first <= number < first + len(J):
                A = J[number - first].abs()
                A = A[A.sum(1).argsort(descending=True)]
                A = A[:, A.sum(0).argsort(descending=True)]
                self.found[number] = A.tolist()

    def result(self, text, tokenizer):
        width = text.ids.shape[1] - 1
        pictures = []
        for number in self.numbers:
            context = text.ids[number // width]
            end = number % width + 2  # after the token; the context's first is not counted
            ids = context[max(1, end - 6) : end].tolist()
            words = "".join(words_of(ids, tokenizer))
            pictures.append({"token": number, "text": words, "J": self.found[number]})
        return pictures


# ---- 5. Linearity --------------------------------------------------------------------------------

CLASSES = ("linear", "jumprelu", "other")
N_GRID = 100  # points at which a function is taken
LARGEST = 5.0  # of the grid, unless s_x,j + 1 is larger
N_SHOWN = 1000  # pairs of latents that figures may show
STEP = 0.005  # of second derivatives


class Pairs(NamedTuple):
    """S random pairs of an active output and an active input latent of a token.

    x     (S, d_model)  the token's input of the MLP
    s     (S,)          value of the input latent, s_x,j
    i, j  (S,)          output latent, input latent
    J     (S,)          J_ij
    rank  (S,)          a random order; those of low rank are shown
    """

    x: Tensor
    s: Tensor
    i: Tensor
    j: Tensor
    J: Tensor
    rank: Tensor


def along_latent(sae_x, sae_y, mlp, pairs, t):
    """s_y,i as a function of s_x,j, after full TopK and ReLU (Eq. 30).

    The true x is moved along the decoder row of j, so that the SAE's error stays what it is.
    t (S, T): values of s_x,j -> (S, T).
    """
    S, T = t.shape
    of_pair = torch.arange(S, device=t.device).repeat_interleave(T)
    size = chunk_size(max(len(sae_y.W_enc), len(mlp.W_in)), t)
    values = []
    for pair, s in zip(of_pair.split(size), t.flatten().split(size)):
        change = (s - pairs.s[pair]).unsqueeze(1)
        x = pairs.x[pair] + change * sae_x.W_dec[pairs.j[pair]]
        s_y = sae_y.encode(mlp(x))
        is_i = s_y.idx == pairs.i[pair].unsqueeze(1)
        values.append((s_y.acts * is_i).sum(1))
    return torch.cat(values).view(S, T)


def grid_of(pairs):
    """(S, N_GRID) values of s_x,j from 0 to max(5, s_x,j + 1) (Appendix B)."""
    unit = torch.linspace(0, 1, N_GRID, dtype=pairs.s.dtype, device=pairs.s.device)
    return (pairs.s + 1).clamp(min=LARGEST).unsqueeze(1) * unit


def largest_residual(t, v, kept):
    """Of the least-squares line through the kept points of each function, (S, T) -> (S,)."""
    n = kept.sum(1, keepdim=True)
    dt = (t - (t * kept).sum(1, keepdim=True) / n) * kept
    dv = (v - (v * kept).sum(1, keepdim=True) / n) * kept
    slope = (dt * dv).sum(1, keepdim=True) / dt.square().sum(1, keepdim=True)
    return (dv - slope * dt).abs().amax(1)


def is_line(t, v, kept):
    """The authors' test: no residual reaches 0.01. A function becomes a line by being small."""
    return largest_residual(t, v, kept) < 0.01


def is_line_by_range(t, v, kept):
    """No residual reaches 0.01 of the range of the kept points. What is flat up to rounding is a
    line: the range is taken as 10^-4 of the largest |v| at least."""
    highest = v.masked_fill(~kept, -math.inf).amax(1)
    lowest = v.masked_fill(~kept, math.inf).amin(1)
    span = (highest - lowest).maximum(1e-4 * v.abs().amax(1))
    return largest_residual(t, v, kept) < 0.01 * span + 1e-30


def classify(t, v, test):
    """Functions (S, T) of t -> (S,), an index of CLASSES each; test: is_line or is_line_by_range.

    linear    a line through all points
    jumprelu  exactly 0 on one stretch that touches an end, and a line through the rest, which has
              two points or more
    other     neither
    """
    t = t.double()
    v = v.double()
    is_zero = v == 0
    n_zeros = is_zero.sum(1)
    zeros_at_start = is_zero.int().cumprod(1).sum(1)
    zeros_at_end = is_zero.flip(1).int().cumprod(1).sum(1)
    one_stretch = (zeros_at_start == n_zeros) | (zeros_at_end == n_zeros)
    jumps = one_stretch & (n_zeros > 0) & (n_zeros <= v.shape[1] - 2)

    everywhere = torch.ones_like(is_zero)
    beside_zeros = torch.where(jumps.unsqueeze(1), ~is_zero, everywhere)
    linear = test(t, v, everywhere)
    jumprelu = jumps & test(t, v, beside_zeros)
    return torch.where(linear, 0, torch.where(jumprelu, 1, 2))


def class_shares(classes):
    """Shares of functions (figures 8b, 15 to 17), 0 to 1, of (S,) indices of CLASSES.

    linear    s_y,i is a line in s_x,j: no residual of least squares over the grid reaches 0.01
    jumprelu  0 up to a jump (or from one on), and a line on the rest
    other     neither
    relative  the same three, with residual / range of the points of the line below 0.01
    """
    shares = {}
    for number, name in enumerate(CLASSES):
        shares[name] = (classes == number).double().mean().item()
    return shares


def change_by_one(J, delta):
    """What J says of a large change: delta is that of s_y,i when 1 is subtracted from s_x,j.

    Shares of pairs, 0 to 1 (figures 8c, 10):
    on_line           |J + delta| < 0.1
    cluster           off the line, with |J| < 0.1
    outlier           off the line, the rest
    on_line_relative  |J + delta| < 0.1 |J|
    """
    off = (J + delta).abs()
    groups = {
        "on_line": off < 0.1,
        "cluster": (off >= 0.1) & (J.abs() < 0.1),
        "outlier": (off >= 0.1) & (J.abs() >= 0.1),
        "on_line_relative": off < 0.1 * J.abs(),
    }
    return {name: group.double().mean().item() for name, group in groups.items()}


def second_derivatives(sae_x, sae_y, mlp, pairs, classes):
    """Of functions of one latent, by differences over a step of 0.005, in float64.

    A jump of height h shows as h / 0.005^2. Lists, one number a function:
    mean, mean_abs, max_abs  over [0, max(5, s_x,j + 1)] (figure 13 a, b, c)
    class                    of CLASSES: figure 14 shows `other` alone
    """
    sae_x, sae_y, mlp = (copy.deepcopy(module).double() for module in (sae_x, sae_y, mlp))
    result = {"mean": [], "mean_abs": [], "max_abs": [], "class": []}
    for n in tqdm(range(len(pairs.s)), "second derivatives", leave=False):
        one = Pairs(*(value[n : n + 1] for value in pairs))
        one = one._replace(x=one.x.double(), s=one.s.double())
        n_steps = int(max(LARGEST, one.s.item() + 1) / STEP)
        t = STEP * torch.arange(n_steps + 1, dtype=torch.float64, device=one.s.device)
        values = along_latent(sae_x, sae_y, mlp, one, t.unsqueeze(0))[0]
        second = values.diff(n=2) / STEP**2
        result["mean"].append(second.mean().item())
        result["mean_abs"].append(second.abs().mean().item())
        result["max_abs"].append(second.abs().max().item())
        result["class"].append(CLASSES[classes[n]])
    return result


class Linearity:
    """Whether f_s is linear in one latent (section 5.4, Appendix B), of random pairs (i, j).

    samples    pairs: tokens are drawn from the seed, and of the k x k pairs of each one at random;
               those with a latent that ReLU cut off are left out
    linear, jumprelu, other, relative               class_shares
    on_line, cluster, outlier, on_line_relative     change_by_one
    second                                          second_derivatives
    scatter    J and delta of 1000 of the pairs
    examples   for each class, [t, s_y,i at t] of six pairs
    """

    def __init__(self, sae_x, sae_y, mlp, options, n_tokens):
        self.modules = sae_x, sae_y, mlp
        self.n_second = options.second_samples
        n_samples = options.linear_samples
        generator = torch.Generator().manual_seed(options.seed)
        number = torch.randint(n_tokens, (n_samples,), generator=generator)
        self.number = number.sort().values
        self.row = torch.randint(sae_y.k, (n_samples,), generator=generator)
        self.column = torch.randint(sae_x.k, (n_samples,), generator=generator)
        self.rank = torch.randperm(n_samples, generator=generator)
        self.pairs = []  # with rank < n_second, as they hold x
        self.curves = []  # (rank, class, t, values), with rank < N_SHOWN
        self.numbers = []  # a tensor (S, 5) for each batch

    def add(self, tokens):
        pairs = self.drawn_among(tokens)
        t = grid_of(pairs)
        values = along_latent(*self.modules, pairs, t)
        classes = classify(t, values, is_line)
        relative = classify(t, values, is_line_by_range)

        minus_one = torch.stack([pairs.s - 1, pairs.s], 1)
        changed, same = along_latent(*self.modules, pairs, minus_one).T
        numbers = [pairs.rank, pairs.J, changed - same, classes, relative]
        self.numbers.append(torch.stack([column.double() for column in numbers], 1))

        shown = pairs.rank < N_SHOWN
        curves = zip(pairs.rank[shown].tolist(), classes[shown], t[shown], values[shown])
        self.curves.extend(curves)
        second = pairs.rank < self.n_second
        self.pairs.append(Pairs(*(value[second] for value in pairs)))

    def drawn_among(self, tokens) -> Pairs:
        """The pairs that are drawn among consecutive tokens."""
        first = int(tokens.number[0])
        here = (self.number >= first) & (self.number < first + len(tokens.x))
        device = tokens.x.device
        b = (self.number[here] - first).to(device)
        row = self.row[here].to(device)
        column = self.column[here].to(device)
        rank = self.rank[here].to(device)

        s_x, s_y = tokens.s_x, tokens.s_y
        active = (s_x.acts[b, column] > 0) & (s_y.acts[b, row] > 0)
        b, row, column, rank = b[active], row[active], column[active], rank[active]
        J = self.elements(part_of(tokens, b), row, column)
        return Pairs(tokens.x[b], s_x.acts[b, column], s_y.idx[b, row], s_x.idx[b, column], J, rank)

    def elements(self, tokens, row, column):
        """J[b, row[b], column[b]] of each token b, (S,)."""
        sae_x, sae_y, mlp = self.modules
        values = [tokens.x.new_empty(0)]
        size = chunk_size(sae_x.k * len(mlp.W_in), tokens.x)
        for chosen in torch.arange(len(row), device=row.device).split(size):
            part = part_of(tokens, chosen)
            J = active_jacobian(sae_x, sae_y, mlp, part.x, part.s_x, part.s_y)
            b = torch.arange(len(J), device=J.device)
            values.append(J[b, row[chosen], column[chosen]])
        return torch.cat(values)

    def result(self):
        numbers = torch.cat(self.numbers)
        rank, J, delta, classes, relative = numbers[numbers[:, 0].argsort()].T
        pairs = Pairs(*(torch.cat(values) for values in zip(*self.pairs)))
        order = pairs.rank.argsort()
        pairs = Pairs(*(value[order] for value in pairs))
        second = second_derivatives(*self.modules, pairs, classes[: len(order)].long().tolist())
        return {
            "samples": len(rank),
            **class_shares(classes),
            "relative": class_shares(relative),
            **change_by_one(J, delta),
            "second": second,
            "scatter": {"J": J[:N_SHOWN].tolist(), "delta": delta[:N_SHOWN].tolist()},
            "examples": self.examples(),
        }

    def examples(self):
        """For each class, the functions of the six pairs of lowest rank."""
        found = {name: [] for name in CLASSES}
        for _, number, t, values in sorted(self.curves, key=itemgetter(0)):
            curves = found[CLASSES[number]]
            if len(curves) < 6:
                curves.append([t.tolist(), values.tolist()])
        return found


# ---- 6. Latents and examples ---------------------------------------------------------------------

N_TOKENS = 10  # on which an output latent, or both ends of an edge, must be active to be ranked
N_INPUTS = 10  # input latents that are shown of an output latent (section 5.2)
WINDOW = 16  # tokens of an example (Appendix C)
N_EXAMPLES = 12  # of a latent


class OutputStrength:
    """Of each output latent, all of them: how strongly it depends on input latents.

    mean_abs  mean of |J| over its active pairs: the active input latents of the tokens on which it
              is active; from 0
    tokens    on which it is active
    """

    def __init__(self, n_latents, device):
        self.total = torch.zeros(n_latents, dtype=torch.float64, device=device)
        self.pairs = torch.zeros_like(self.total)
        self.tokens = torch.zeros_like(self.total)

    def add(self, J, tokens):
        active = tokens.s_y.acts > 0  # (B, k)
        latent = tokens.s_y.idx[active]
        n_inputs = (tokens.s_x.acts > 0).sum(1, keepdim=True).expand_as(active)
        self.total.index_add_(0, latent, J.abs().double().sum(2)[active])
        self.pairs.index_add_(0, latent, n_inputs[active].double())
        self.tokens.index_add_(0, latent, torch.ones_like(latent, dtype=torch.float64))

    def mean_abs(self):
        return self.total / self.pairs  # NaN, not defined, where there is no pair

    def strongest(self, n):
        """The n output latents of largest mean_abs among those on N_TOKENS tokens or more."""
        often = (self.tokens >= N_TOKENS) & (self.pairs > 0)
        order = self.mean_abs().where(often, -1.0).argsort(descending=True, stable=True)
        return order[: min(n, int(often.sum()))].tolist()


class Edges:
    """What the chosen output latents are computed from (section 5.2, Appendix C).

    latent    the output latent
    tokens    on which it is active
    mean_abs  as OutputStrength defines it
    inputs    the 10 input latents of largest mean |J| over the tokens on which both are active, of
              which there must be 10. Of each one:
        latent     the input latent
        count      how many tokens that are
        mean, std  of J over these tokens
        mean_abs   of |J| over these tokens
    """

    def __init__(self, chosen, n_latents, device):
        self.chosen = chosen
        self.row_of = torch.full((n_latents,), -1, device=device)
        self.row_of[torch.tensor(chosen, dtype=torch.long, device=device)] = torch.arange(
            len(chosen), device=device
        )
        shape = (len(chosen), n_latents)
        self.count = torch.zeros(shape, dtype=torch.float64, device=device)
        self.sum = torch.zeros_like(self.count)
        self.sum_abs = torch.zeros_like(self.count)
        self.sum_square = torch.zeros_like(self.count)

    def concerned(self, tokens):
        """(B,): whether one of the chosen output latents is active."""
        return ((tokens.s_y.acts > 0) & (self.row_of[tokens.s_y.idx] >= 0)).any(1)

    def add(self, J, tokens):
        b, i, _, places = rows_in_table(self.row_of, len(self.row_of), tokens)
        values = J[b, i].double()
        is_active = (tokens.s_x.acts[b] > 0).double()
        for table, numbers in (
            (self.count, is_active),
            (self.sum, values),
            (self.sum_abs, values.abs()),
            (self.sum_square, values.square()),
        ):
            table.view(-1).index_add_(0, places.flatten(), numbers.flatten())

    def inputs_of(self, row):
        count = self.count[row]
        mean = self.sum[row] / count.clamp(min=1)
        mean_abs = self.sum_abs[row] / count.clamp(min=1)
        variance = self.sum_square[row] / count.clamp(min=1) - mean.square()
        often = count >= N_TOKENS
        order = mean_abs.where(often, -1.0).argsort(descending=True, stable=True)
        inputs = []
        for j in order[: min(N_INPUTS, int(often.sum()))].tolist():
            inputs.append(
                {
                    "latent": j,
                    "count": int(count[j]),
                    "mean": mean[j].item(),
                    "std": variance[j].clamp(min=0).sqrt().item(),
                    "mean_abs": mean_abs[j].item(),
                }
            )
        return inputs

    def result(self, strength):
        mean_abs = strength.mean_abs()
        latents = []
        for row, latent in enumerate(self.chosen):
            latents.append(
                {
                    "latent": latent,
                    "tokens": int(strength.tokens[latent]),
                    "mean_abs": mean_abs[latent].item(),
                    "inputs": self.inputs_of(row),
                }
            )
        return latents


def cut_into_windows(rows, filling):
    """(contexts, T - 1) -> (windows, WINDOW); the last window of a context is filled up."""
    missing = -rows.shape[1] % WINDOW
    return F.pad(rows, (0, missing), value=filling).view(-1, WINDOW)


class Examples:
    """Of some latents of one SAE, the windows of text in which they are largest (Appendix C).

    Contexts are cut into windows of 16 tokens; the 12 with the largest value above 0 are kept.

    tokens  the text of each token
    acts    the latent's value at each token
    max     the largest of these
    """

    def __init__(self, latents):
        self.best = {latent: [] for latent in latents}

    def add(self, ids, s):
        """ids (contexts, T) and the Latents of their tokens."""
        words = cut_into_windows(ids[:, 1:], -1)
        for latent, best in self.best.items():
            values = (s.acts * (s.idx == latent)).sum(1).view(len(ids), -1)
            values = cut_into_windows(values, 0.0)
            largest = values.amax(1).round(decimals=4)  # so that ties are ties in any batch
            order = largest.argsort(descending=True, stable=True)[:N_EXAMPLES]
            for n in order[largest[order] > 0].tolist():
                best.append((largest[n].item(), words[n].tolist(), values[n].tolist()))
            best.sort(key=itemgetter(0), reverse=True)
            del best[N_EXAMPLES:]

    def result(self, tokenizer):
        examples = {}
        for latent, best in self.best.items():
            examples[latent] = []
            for largest, ids, acts in best:
                texts = words_of([number for number in ids if number >= 0], tokenizer)
                examples[latent].append(
                    {"tokens": texts, "acts": acts[: len(texts)], "max": largest}
                )
        return examples


# ---- 7. One run ----------------------------------------------------------------------------------

HUB_TEXT = "allenai/c4:en"  # what runs on hub data are evaluated on, as in the paper
HUB_SPLIT = "validation"


def option(default, text, least=0, most=10**15, choices=None):
    """A field of Options; text is for --help, numbers lie between least and most."""
    about = {"text": text, "least": least, "most": most, "choices": choices}
    return dataclasses.field(default=default, metadata=about)


@dataclasses.dataclass
class Options:
    """How one run is evaluated; saved with the numbers. InputError if a number is out of bounds."""

    tokens: int = option(50_000, "held-out tokens (the paper: 10M)", least=1)
    linear_samples: int = option(
        4000, "random pairs of latents for linearity (the paper: 1M)", most=10**8
    )
    second_samples: int = option(100, "of these, those whose second derivatives are taken")
    n_latents: int = option(8, "output latents in the report: the strongest")
    latents: tuple[int, ...] = option((), "output latents in the report, in place of the strongest")
    thresholds: tuple[float, ...] = option((0.005, 0.01, 0.015, 0.02, 0.04), "of |J|", most=10**9)
    dataset: str = option("", "a text, all of it, in place of the run's held-out part")
    split: str = option("validation", "of --dataset on the hub")
    seed: int = option(0, "of all that is drawn at random here", most=2**31)
    device: str = option("auto", "auto, cpu, cuda, ...")
    dtype: str = option("float32", "of the model and the SAEs", choices=("float32", "float64"))

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = field.metadata["least"]
            most = field.metadata["most"]
            numbers = value if isinstance(value, (tuple, list)) else [value]
            for number in numbers:
                if not isinstance(number, str) and not least <= number <= most:  # or NaN
                    name = flag(field.name)
                    raise InputError(f"{name} is {number}; expected {least:g} to {most:g}")
        self.latents = tuple(dict.fromkeys(self.latents))  # each once
        self.thresholds = tuple(sorted(set(self.thresholds)))


class OpenRun(NamedTuple):
    """A finished run with its language model.

    settings     the run's Config, but with the text, device and model of this evaluation
    part         which part of the text: "held out" or "all"
    description  what the run's config.json holds
    """

    sae_x: jsae.TopKSAE
    sae_y: jsae.TopKSAE
    mlp: jsae.MLP
    model: torch.nn.Module
    tokenizer: object
    settings: jsae.Config
    part: str
    description: dict


def model_of(run, description, from_hub):
    """-> the name or folder of the run's language model. InputError if the folder is gone."""
    if not description["model_is_local"]:
        return description["config"]["model"]
    # from the hub: model_path is a path on the machine that trained the run, useless here
    path = description["model_path"]
    if from_hub:
        path = jsae.HERE / description["config"]["model"]
    if not Path(path).exists():
        raise InputError(f"{run}: its language model, {path}, is not there")
    return str(path)


def text_of(run, description, from_hub, options):
    """-> (data set, split, part) to evaluate on. InputError if it is local and not there.

    --dataset names a text, which is used whole. Else it is what the run held out of its own local
    text; for a run on hub data C4's validation split. No local file is read because a config.json
    from the hub names it.
    """
    if options.dataset:
        return options.dataset, options.split, "all"
    if not description["text_is_local"]:
        return HUB_TEXT, HUB_SPLIT, "all"
    path = description["text_path"]
    if path != "stdlib":
        if from_hub:
            raise InputError(f"{run} was trained on local text; name a text by --dataset")
        if not Path(path).exists():
            raise InputError(f"{run}: its text, {path}, is not there; name one by --dataset")
    return path, "train", "held out"


def open_run(run, options) -> OpenRun:
    """InputError if it is no finished run, or its model is gone or has another MLP than it had."""
    sae_x, sae_y, config = jsae.load_run(run)
    description = jsae.read_description(jsae.run_folder(run))
    from_hub = jsae.local_path(run) is None
    dataset, split, part = text_of(run, description, from_hub, options)
    model_name = model_of(run, description, from_hub)
    settings = dataclasses.replace(
        config, model=model_name, dataset=dataset, split=split, device=options.device
    )
    model = jsae.load_language_model(settings)
    mlp = jsae.MLP.from_model(model, config.layer)
    if jsae.hash_of_weights(mlp) != description["mlp_sha256"]:
        raise InputError(f"{run}: the MLP of {model_name} has changed since training")
    try:
        tokenizer = jsae.load_tokenizer(settings)
    except InputError:  # text that comes as token ids needs none
        tokenizer = None
    n_latents = len(sae_y.W_enc)
    if any(latent >= n_latents for latent in options.latents):
        raise InputError(f"--latents {options.latents}; {run} has 0 to {n_latents - 1}")
    dtype = getattr(torch, options.dtype)
    for module in (sae_x, sae_y, mlp, model):
        module.to(model.device, dtype).requires_grad_(False)
    return OpenRun(sae_x, sae_y, mlp, model, tokenizer, settings, part, description)


def strongest_latents(opened, text, strength, options):
    """-> (latents, examples): the output latents to show, with their inputs, and text of them all.

    A second and a third pass over the text: which latents these are is known only after the first,
    and which input latents belong to them only after the second.
    """
    sae_x, sae_y, mlp, model, tokenizer = opened[:5]
    chosen = options.latents or strength.strongest(options.n_latents)
    edges = Edges(chosen, len(sae_x.W_enc), model.device)
    if chosen:
        for _, tokens in batches(model, mlp, sae_x, sae_y, text, "edges"):
            concerned = part_of(tokens, edges.concerned(tokens))
            for chunk in chunks_of(concerned, sae_x.k * len(mlp.W_in)):
                J = active_jacobian(sae_x, sae_y, mlp, chunk.x, chunk.s_x, chunk.s_y)
                edges.add(J, chunk)

    latents = edges.result(strength)
    inputs = {edge["latent"] for latent in latents for edge in latent["inputs"]}
    examples_x = Examples(sorted(inputs))
    examples_y = Examples(chosen)
    if chosen:
        for ids, tokens in batches(model, mlp, sae_x, sae_y, text, "examples"):
            examples_x.add(ids, tokens.s_x)
            examples_y.add(ids, tokens.s_y)
    examples = {"x": examples_x.result(tokenizer), "y": examples_y.result(tokenizer)}
    return latents, examples


@torch.no_grad()
def evaluate(run, options):
    """-> what evaluation.json holds: numbers, lists and strings; None where one is not defined."""
    opened = open_run(run, options)
    sae_x, sae_y, mlp, model, tokenizer, settings, part, _ = opened
    seed = options.seed
    k = sae_x.k
    n_latents = len(sae_x.W_enc)
    text = held_out_text(settings, part, model, tokenizer, options.tokens, seed)
    jsae.check_mlp(model, mlp, text.ids[:1].to(model.device))
    D = text.n_documents

    reconstruction_x = Reconstruction(sae_x, D)
    reconstruction_y = Reconstruction(sae_y, D)
    cross_entropy = CrossEntropy(model, mlp, sae_y, D)
    of_jacobian = [
        ElementsAbove(options.thresholds, k, D),
        Norms(D),
        Concentration(k, D),
        Histogram(model.device),
        EffectiveInputs(seed, D),
    ]
    global_jacobian = GlobalJacobian(n_latents, options.thresholds, seed, model.device)
    strength = OutputStrength(n_latents, model.device)
    pictures = Pictures(text.n_tokens, seed)
    linearity = Linearity(sae_x, sae_y, mlp, options, text.n_tokens)

    for ids, tokens in batches(model, mlp, sae_x, sae_y, text, Path(run).name):
        reconstruction_x.add(tokens.x, tokens.x_hat, tokens.s_x, tokens.document)
        reconstruction_y.add(tokens.y, tokens.y_hat, tokens.s_y, tokens.document)
        cross_entropy.add(ids, tokens)
        linearity.add(tokens)
        for chunk in chunks_of(tokens, k * max(k, len(mlp.W_in))):
            J = active_jacobian(sae_x, sae_y, mlp, chunk.x, chunk.s_x, chunk.s_y)
            for measure in (*of_jacobian, global_jacobian, strength, pictures):
                measure.add(J, chunk)

    jacobian = {"elements": k * k}
    for measure in of_jacobian:
        jacobian.update(measure.result())
    estimates = {
        "reconstruction": {"x": reconstruction_x.result(), "y": reconstruction_y.result()},
        "ce": cross_entropy.result(),
        "jacobian": jacobian,
        "global": global_jacobian.result(),
        "linearity": linearity.result(),
    }
    latents, examples = strongest_latents(opened, text, strength, options)
    return {
        **values_of(estimates),
        "standard_error": errors_of(estimates),
        "latents": values_of(latents),
        "examples": examples,
        "pictures": pictures.result(text, tokenizer),
        **about_run(run, opened, text, options),
    }


def values_of(estimates):
    """The numbers themselves; what is not finite is not defined."""
    if isinstance(estimates, Estimate):
        return values_of(estimates.value)
    if isinstance(estimates, dict):
        return {name: values_of(part) for name, part in estimates.items()}
    if isinstance(estimates, list):
        return [values_of(part) for part in estimates]
    if isinstance(estimates, float) and not math.isfinite(estimates):
        return None
    return estimates


def errors_of(estimates):
    """The standard errors, at the same places; places without an Estimate below are left out."""
    if isinstance(estimates, Estimate):
        return values_of(estimates.error)
    if isinstance(estimates, dict):
        return {name: errors_of(part) for name, part in estimates.items() if has_errors(part)}
    return [errors_of(part) for part in estimates]


def has_errors(estimates):
    if isinstance(estimates, Estimate):
        return True
    if isinstance(estimates, dict):
        return any(has_errors(part) for part in estimates.values())
    return isinstance(estimates, list) and any(has_errors(part) for part in estimates)


def about_run(run, opened, text, options):
    """What was evaluated, on what, and how.

    training  the last row of metrics.jsonl: there, dead_x and dead_y are the latents that were
              silent for 10M tokens of training (Appendix E); null for a run on the hub
    """
    try:
        rows = (jsae.run_folder(run) / "metrics.jsonl").read_text().splitlines()
        training = json.loads(rows[-1])
    except (OSError, ValueError, IndexError):  # it is not there, or was cut short
        training = None
    description = opened.description
    return {
        "config": description["config"],
        "penalty": description["penalty"],
        "mlp_sha256": description["mlp_sha256"],
        "text_sha256": description["text_sha256"],
        "training": training,
        "n_latents": len(opened.sae_x.W_enc),
        "text": opened.settings.dataset,
        "text_part": opened.part,
        "tokens": text.n_tokens,
        "documents": text.n_documents,
        "seed": options.seed,
        "options": dataclasses.asdict(options),
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, np)},
    }


# ---- 8. Table, figures, report -------------------------------------------------------------------


def follow(tree, path):
    """What stands at a dotted path; KeyError, IndexError, TypeError or ValueError if nothing."""
    for name in path.split("."):
        tree = tree[int(name) if isinstance(tree, list) else name]
    return tree


def lookup(result, path):
    """The run's setting of that name, else what stands at a dotted path in evaluation.json."""
    if path in result["config"]:
        return result["config"][path]
    try:
        return follow(result, path)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise InputError(f"there is no {path} in the evaluation of {result['run']}") from error


NOT_COMPARED = ("seed", "output_dir", "overwrite", "resume", "checkpoint_minutes")


def compared(result):
    """-> {name: value} of all that must be equal where runs are merged: they differ in the seed."""
    settings = {}
    for name, value in result["config"].items():
        if name not in NOT_COMPARED:
            settings[name] = value
    settings["penalty"] = result["penalty"]
    settings["trained text"] = result["text_sha256"]
    if result["config"]["randomize_weights"] == "none":
        settings["MLP"] = result["mlp_sha256"]  # a random control has another one for each seed
    settings["text"] = result["text"]
    settings["part of the text"] = result["text_part"]
    for name, value in result["options"].items():
        if name != "dataset":  # the text says it
            settings[f"evaluation {name}"] = value
    return settings


def grouped(results):
    """-> lists of results that differ in the seed only. InputError if one is given twice."""
    groups = {}
    for result in results:
        key = json.dumps(compared(result), sort_keys=True)
        group = groups.setdefault(key, [])
        for other in group:
            if other["config"]["seed"] == result["config"]["seed"]:
                raise InputError(
                    f"{other['run']} and {result['run']} are one run given twice: "
                    "the same settings, the same seed"
                )
        group.append(result)
    return list(groups.values())


SHORT_NAMES = {"jacobian_coef": "lambda", "expansion_factor": "R", "randomize_weights": "weights"}


def short(value):
    """A setting as it stands in a label."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return " ".join(short(part) for part in value)
    return Path(str(value)).name[:24]


def labels_of(groups):
    """-> a short name for each group of runs: the settings that differ among them."""
    settings = [compared(group[0]) for group in groups]
    names = {name: None for setting in settings for name in setting}  # each once, in order
    differing = []
    for name in names:
        values = [json.dumps(setting.get(name)) for setting in settings]
        if len(set(values)) > 1:
            differing.append(name)
    labels = []
    for setting, group in zip(settings, groups):
        words = []
        for name in differing:
            if name in setting:
                words.append(
                    f"{SHORT_NAMES.get(name, name.replace('_', ' '))} {short(setting[name])}"
                )
        label = ", ".join(words) or Path(group[0]["run"]).name
        if label in labels:  # what differs was cut off
            label = f"{label} ({len(labels) + 1})"
        labels.append(label)
    return labels


class Row(NamedTuple):
    """A line of the table and a panel of the overview.

    paths   of each of its parts, by name
    figure  the paper's, if it shows the same
    """

    title: str
    paths: dict[str, str]
    figure: str = ""


def table_of(thresholds):
    """-> the Rows, in order."""
    above = {}
    above_l2 = {}
    for number, threshold in enumerate(thresholds):
        above[f"{threshold:g}"] = f"jacobian.count_above.raw.{number}"
        above_l2[f"{threshold:g}"] = f"jacobian.count_above.l2.{number}"
    explained = {
        "x": "reconstruction.x.explained_variance",
        "y": "reconstruction.y.explained_variance",
    }
    score = {"x": "ce.x.score", "y": "ce.y.score", "whole path": "ce.both.score"}
    kl = {"x": "ce.x.kl", "y": "ce.y.kl", "whole path": "ce.both.kl"}
    mean_abs = {"J": "jacobian.mean_abs"}
    mass = {"50": "jacobian.mass.50", "90": "jacobian.mass.90", "99": "jacobian.mass.99"}
    sparsity = {"J": "jacobian.hoyer"}
    effective = {
        "J": "jacobian.effective_inputs.value",
        "random J": "jacobian.effective_inputs.gaussian",
    }
    hub = {
        "J": "jacobian.effective_inputs.hub",
        "random J": "jacobian.effective_inputs.hub_gaussian",
    }
    norms = {
        "L1": "jacobian.norms.l1",
        "L2": "jacobian.norms.l2",
        "L4": "jacobian.norms.l4",
        "Linf": "jacobian.norms.linf",
    }
    functions = {
        "linear": "linearity.linear",
        "JumpReLU": "linearity.jumprelu",
        "other": "linearity.other",
    }
    functions_by_range = {
        "linear": "linearity.relative.linear",
        "JumpReLU": "linearity.relative.jumprelu",
        "other": "linearity.relative.other",
    }
    change = {"< 0.1": "linearity.on_line", "< 0.1 |J|": "linearity.on_line_relative"}
    active = {"x": "reconstruction.x.active", "y": "reconstruction.y.active"}
    silent = {"x": "reconstruction.x.silent", "y": "reconstruction.y.silent"}
    dead = {"x": "training.dead_x", "y": "training.dead_y"}
    return [
        Row("explained variance", explained, "4"),
        Row("CE loss score", score, "4"),
        Row("KL in nats", kl),
        Row("mean |J|", mean_abs),
        Row("elements with |J| above", above, "2, 7, 33, 38"),
        Row("elements above, J at unit L2 norm", above_l2),
        Row("elements that hold % of sum |J|", mass),
        Row("Hoyer sparsity of J", sparsity),
        Row("effective inputs", effective),
        Row("hub", hub),
        Row("norm of J", norms, "35"),
        Row("functions", functions, "8b"),
        Row("functions, by residual / range", functions_by_range),
        Row("|J + delta|", change),
        Row("active latents per token", active),
        Row("silent latents, on this text", silent),
        Row("dead latents, in training", dead, "23"),
    ]


def number_at(result, path):
    """-> the number at a path, None if it is null or was not written."""
    try:
        return follow(result, path)
    except (KeyError, IndexError, TypeError):
        return None


def measured(group, path):
    """-> a number of a group of runs and its error; None for what is not defined.

    One run: the number, standard error over documents. Several: mean and standard deviation (of a
    sample, n - 1) over the runs, which differ in the seed of training.
    """
    values = [number_at(result, path) for result in group]
    if None in values:
        return None, None
    if len(group) == 1:
        return values[0], number_at(group[0]["standard_error"], path)
    return float(np.mean(values)), float(np.std(values, ddof=1))


def cell_of(group, paths):
    """-> the text of a cell: a number for each path, with its error where it has one."""
    texts = []
    for path in paths:
        value, error = measured(group, path)
        if value is None:
            texts.append("-")
        elif error is None:
            texts.append(f"{value:.4g}")
        else:
            texts.append(f"{value:.4g} ± {error:.2g}")
    return " / ".join(texts)


def thresholds_of(groups):
    """-> the thresholds of all runs. InputError if they differ: then counts have no common row."""
    thresholds = groups[0][0]["jacobian"]["thresholds"]
    for group in groups:
        if group[0]["jacobian"]["thresholds"] != thresholds:
            raise InputError("--thresholds differ among the runs; evaluate them alike")
    return thresholds


def table_cells(groups, labels):
    """-> rows of strings: the labels, then a row for each Row."""
    rows = [["", *labels]]
    for row in table_of(thresholds_of(groups)):
        title = f"{row.title}: {' / '.join(row.paths)}"
        if len(row.paths) == 1:
            title = row.title
        cells = [cell_of(group, row.paths.values()) for group in groups]
        rows.append([title, *cells])
    return rows


def legend_lines(groups, labels):
    """-> lines of text: which runs are behind each label, and what the errors are."""
    lines = []
    for label, group in zip(labels, groups):
        runs = ", ".join(result["run"] for result in group)
        n_tokens = group[0]["tokens"]
        lines.append(f"{label}: {runs}; {n_tokens:,} tokens of {group[0]['text']}")
    if any(len(group) == 1 for group in groups):
        lines.append("±, one run: standard error over documents")
    if any(len(group) > 1 for group in groups):
        lines.append("±, several runs: standard deviation over their seeds")
    return lines


def new_figure(height):
    """An empty figure, 9 inches wide: 900 px at the width of a README."""
    from matplotlib.figure import Figure  # only here, as matplotlib may be missing

    return Figure(figsize=(9, height), layout="constrained")


def first_look_groups(groups):
    """-> a traditional pair and a JSAE that are alike but for lambda, or the first alone."""
    traditional = [group for group in groups if lambda_of(group) == 0]
    jsaes = [group for group in groups if lambda_of(group) > 0]
    for group in traditional:
        for other in jsaes:
            settings = compared(group[0])
            settings["jacobian_coef"] = lambda_of(other)
            settings["penalty"] = other[0]["penalty"]
            if settings == compared(other[0]):
                return [group, other]
    return groups[:1]


def kind_of(group):
    """-> what a group of runs is called in the figure for a first look."""
    if lambda_of(group) == 0:
        return "traditional SAEs"
    return f"JSAE, lambda {lambda_of(group):g}"


def draw_first_look(groups):
    """|J| of the same tokens under two pairs, the distribution of |J|, and effective inputs."""
    shown = first_look_groups(groups)
    figure = new_figure(1.3 + 1.6 * len(shown))
    left, right = figure.subfigures(1, 2, width_ratios=(5, 4))
    draw_pictures(left, shown)
    top, bottom = right.subplots(2, 1)
    draw_shares_above(top, shown)
    draw_effective_inputs(bottom, shown)
    return figure, "a first look: J of the same tokens, its distribution, what it adds up to"


def draw_pictures(figure, groups):
    """A row for each group: |J| of three tokens (figures 2, 30, 31), on the group's own scale.

    On a common scale a smaller J would look sparser than it is.
    """
    n_tokens = len(groups[0][0]["pictures"][:3])
    axes = figure.subplots(len(groups), n_tokens, squeeze=False)
    for group, row in zip(groups, axes):
        pictures = group[0]["pictures"][:n_tokens]
        elements = np.array([picture["J"] for picture in pictures])
        darkest = np.quantile(elements, 0.98)  # else one element would hide the rest
        row[0].set_ylabel(kind_of(group))
        for ax, picture in zip(row, pictures):
            image = ax.imshow(picture["J"], vmin=0, vmax=darkest or 1, cmap="Blues")
            ax.set_xticks([])
            ax.set_yticks([])
        figure.colorbar(image, ax=row, shrink=0.8, aspect=15, extend="max", label="|J|")
    for ax, picture in zip(axes[0], groups[0][0]["pictures"]):
        ax.set_title(f"at “{picture['text'].strip()[-14:]}”", fontsize=9)
    axes[-1, 0].set_xlabel("a row: an output latent\na column: an input latent", fontsize=8)


def draw_shares_above(ax, groups):
    """The share of all elements with |J| above a threshold (figure 32 b)."""
    thresholds = Histogram.BIN * np.arange(1, Histogram.N_BINS + 1)
    for group in groups:
        counts = np.array(group[0]["jacobian"]["histogram"])
        above = 1 - counts.cumsum()[:-1] / counts.sum()
        ax.plot(thresholds, above, label=kind_of(group))
    ax.set(xscale="log", xlabel="threshold", ylim=(0, 1))
    ax.set_title("share of elements with |J| above a threshold", fontsize=9)
    ax.legend(fontsize=8, loc="upper right")


def draw_effective_inputs(ax, groups):
    """Effective inputs of each group, and those of random J in grey."""
    names = []
    heights = []
    colors = []
    for number, group in enumerate(groups):
        names.append(kind_of(group))
        heights.append(measured(group, "jacobian.effective_inputs.value")[0] or 0)
        colors.append(f"C{number}")
        names.append("with a random J")
        heights.append(measured(group, "jacobian.effective_inputs.gaussian")[0] or 0)
        colors.append("lightgrey")
    places = np.arange(len(names))
    bars = ax.barh(places, heights, color=colors)
    ax.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    ax.set_yticks(places, names, fontsize=8)
    ax.invert_yaxis()
    ax.margins(x=0.15)
    ax.set_title("effective inputs of an output latent", fontsize=9)


def differs(values):
    """Whether the numbers of the groups, a list of lists, differ by more than 1 % anywhere."""
    for of_groups in zip(*values):
        if set(of_groups) == {None}:
            continue
        if None in of_groups or max(of_groups) - min(of_groups) > 0.01 * max(map(abs, of_groups)):
            return True
    return False


def draw_overview(groups, labels):
    """The rows of the table in which groups differ, as bars. None if there is none."""
    panels = []
    for row in table_of(thresholds_of(groups)):
        columns = [[measured(group, path) for path in row.paths.values()] for group in groups]
        if differs([[value for value, _ in column] for column in columns]):
            panels.append((row, columns))
    if not panels:
        return None
    n_rows = math.ceil(len(panels) / 3)
    legend_height = 0.25 * math.ceil(len(groups) / 3)
    figure = new_figure(2.0 * n_rows + legend_height)
    axes = figure.subplots(n_rows, 3, squeeze=False).flatten()
    width = 0.8 / len(groups)
    for ax, (row, columns) in zip(axes, panels):
        places = np.arange(len(row.paths))
        for n, (label, column) in enumerate(zip(labels, columns)):
            heights = [math.nan if value is None else value for value, _ in column]
            errors = [error or 0 for _, error in column]
            left = places - 0.4 + n * width
            ax.bar(left, heights, width, yerr=errors, align="edge", label=label)
        ax.set_xticks(places, list(row.paths))
        ax.set_title(row.title, fontsize=9)
        ax.tick_params(labelsize=8)
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=3, fontsize=8)
    figures = [row.figure for row, _ in panels if row.figure]
    of_paper = f" (figures {', '.join(dict.fromkeys(figures))})" if figures else ""
    return figure, f"what differs among the runs{of_paper}"


def draw_histogram(groups, labels):
    """The histogram of |J| and its distribution function, of the first run of each group."""
    figure = new_figure(3.4 + 0.2 * math.ceil(len(groups) / 3))
    left, right = figure.subplots(1, 2)
    lower_ends = Histogram.BIN * np.arange(Histogram.N_BINS)
    for label, group in zip(labels, groups):
        counts = np.array(group[0]["jacobian"]["histogram"])
        left.plot(lower_ends + Histogram.BIN / 2, counts[:-1] / group[0]["tokens"], label=label)
        right.plot(lower_ends + Histogram.BIN, counts.cumsum()[:-1] / counts.sum())
    left.set(xscale="log", yscale="log", xlabel="|J|", ylabel="elements per token")
    left.set_title(f"in bins of {Histogram.BIN:g}", fontsize=9)
    right.set(xscale="log", xlabel="|J|", ylabel="share of elements")
    right.set_title("with |J| below", fontsize=9)
    figure.legend(loc="outside upper center", ncols=3, fontsize=8)
    return figure, "histogram and distribution function of |J| (figures 32, 34)"


def draw_change(ax, linearity):
    """A scatter of J and the change of s_y,i when 1 is subtracted from s_x,j (figures 8c, 10)."""
    J = np.array(linearity["scatter"]["J"])
    delta = np.array(linearity["scatter"]["delta"])
    off = np.abs(J + delta) >= 0.1
    small = np.abs(J) < 0.1
    for name, group in (("line", ~off), ("cluster", off & small), ("outlier", off & ~small)):
        ax.scatter(J[group], delta[group], s=4, label=name)
    ax.set(xlabel="J", ylabel="delta", title="s_y,i changes by delta at s_x,j - 1")
    ax.legend(fontsize=8)


def draw_second(ax, linearity, name, title):
    """Histogram of log10 of second derivatives: all functions (figure 13), other ones (14)."""
    sizes = np.log10(np.maximum(linearity["second"][name], 1e-9))
    is_other = np.array(linearity["second"]["class"]) == "other"
    bins = np.histogram_bin_edges(sizes, 25)
    ax.hist(sizes, bins, color="lightgrey", label="all functions")
    ax.hist(sizes[is_other], bins, histtype="step", color="C3", label="class other")
    ax.set(xlabel=f"log10 {title}", title="second derivatives")
    ax.legend(fontsize=8)


def draw_functions(groups, labels):
    """For the first run of each group: functions of one latent, and what J says of them."""
    shown = []
    for label, group in zip(labels, groups):
        if group[0]["linearity"]["samples"] > 0:
            shown.append((label, group[0]["linearity"]))
    if not shown:
        return None
    figure = new_figure(5 * len(shown))
    parts = np.atleast_1d(figure.subfigures(len(shown), 1))
    for part, (label, linearity) in zip(parts, shown):
        part.suptitle(label, fontsize=10)
        axes = part.subplots(2, 3).flatten()
        draw_change(axes[0], linearity)
        for ax, name in zip(axes[1:4], CLASSES):
            for t, values in linearity["examples"][name]:
                ax.plot(t, values)
            title = "JumpReLU" if name == "jumprelu" else name
            ax.set(xlabel="s_x,j", ylabel="s_y,i", title=f"{title}: {linearity[name]:.1%}")
        draw_second(axes[4], linearity, "mean_abs", "mean |s''|")
        draw_second(axes[5], linearity, "max_abs", "max |s''|")
        for ax in axes:
            ax.title.set_fontsize(9)
            ax.tick_params(labelsize=8)
    return figure, functions_caption([linearity for _, linearity in shown])


def functions_caption(linearities):
    """Only the paper's figures of which there is something to see are named."""
    figures = ["8c", "9", "10"]
    if any(linearity["examples"]["other"] for linearity in linearities):
        figures.append("12")
    if any(linearity["second"]["class"] for linearity in linearities):
        figures.append("13")
    if any("other" in linearity["second"]["class"] for linearity in linearities):
        figures.append("14")
    return f"f_s as a function of one latent (figures {', '.join(figures)})"


def draw_plots(groups, paths, series):
    """For each (X, Y) of `paths`, a point for each group, a line for each value of `series`."""
    n_rows = math.ceil(len(paths) / 2)
    figure = new_figure(0.6 + 3.2 * n_rows)
    axes = figure.subplots(n_rows, 2, squeeze=False).flatten()
    for ax, (x_path, y_path) in zip(axes, paths):
        for name, members in by_series(groups, series).items():
            x, dx = zip(*(point_of(group, x_path) for group in members))
            y, dy = zip(*(point_of(group, y_path) for group in members))
            ax.errorbar(x, y, dy, dx, "o-", markersize=4, label=name)
            for group, place in zip(members, zip(x, y)):
                ax.annotate(
                    f"{lambda_of(group):g}",
                    place,
                    xytext=(4, 4),
                    textcoords="offset points",
                    fontsize=8,
                )
        ax.set(xlabel=x_path, ylabel=y_path)
        ax.legend(title=series, fontsize=8, title_fontsize=8)
    for ax in axes[len(paths) :]:
        ax.set_visible(False)
    return (
        figure,
        "numbers are lambda; bars: standard deviation over seeds, of one run over documents",
    )


def lambda_of(group):
    return group[0]["config"]["jacobian_coef"]


def by_series(groups, series):
    """-> {value of the setting `series`: its groups, by lambda}."""
    found = {}
    for group in sorted(groups, key=lambda_of):
        found.setdefault(str(lookup(group[0], series)), []).append(group)
    return found


def point_of(group, path):
    """-> a number and its error (0: none). InputError if it is no number in one of the runs."""
    values = [lookup(result, path) for result in group]
    for value, result in zip(values, group):
        if not isinstance(value, (int, float)):
            raise InputError(f"--plot {path}: it is {value!r} in {result['run']}, not a number")
    if path in group[0]["config"]:
        return values[0], 0
    value, error = measured(group, path)
    return value, error or 0


def draw(groups, labels, paths, series):
    """-> [(file name, caption, PNG bytes), ...]; none if matplotlib is not installed.

    Where each run has a panel or line of its own, a group of runs is shown by its first.
    """
    try:
        import matplotlib
    except ImportError:
        return []
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # white, whatever the user's style is
        matplotlib.rcParams["font.size"] = 9
        drawn = {
            "first_look": draw_first_look(groups),
            "overview": draw_overview(groups, labels),
            "histogram": draw_histogram(groups, labels),
            "functions": draw_functions(groups, labels),
        }
        if paths:
            drawn["plots"] = draw_plots(groups, paths, series)
        figures = []
        for name, figure_and_caption in drawn.items():
            if figure_and_caption is not None:
                figure, caption = figure_and_caption
                file = io.BytesIO()
                figure.savefig(file, format="png", dpi=150)
                figures.append((f"{name}.png", caption, file.getvalue()))
    return figures


STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: auto; padding: 1rem }
table { border-collapse: collapse }
td { padding: 0 .5rem; border: 1px solid #8886 }
.wide { overflow-x: auto }
img { width: 900px; background: white }
details { margin: .2rem 1rem }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere }
span { background: rgba(255, 140, 0, var(--share)) }
"""


ROWS_EXPLAINED = """\
explained variance: of x and y, by their SAEs; 1 is perfect
CE loss score: of the language model's predictions with x, y, or the path from x to y replaced by
    what the SAEs make of it; 1: as good as without, 0: as bad as with zeros; KL: lower is better
mean |J|, elements above a threshold, norms: lower if J is smaller or sparser
the same at unit L2 norm, elements that hold a share of sum |J|: lower only if J is sparser
Hoyer sparsity: (16 - L1 / L2) / 15 for 16 x 16 elements; 0 if all are equal, 1 if one is left
effective inputs: how many input latents an output latent depends on; random J: with these
    activations and Gaussian elements
hub: the share of one input latent in all output latents; 1 if all depend on it alone
functions: s_y,i as s_x,j goes from 0 to max(5, s_x,j + 1): a straight line up to 0.01 (or up to
    0.01 of its range), zero and then straight, or other
|J + delta|: delta is the change of s_y,i when s_x,j falls by 1; how often it is what J says
silent: without a value on this text. Where figures have numbers, these are the paper's."""
LATENTS_EXPLAINED = """\
Open an output latent to see the text in which it is largest, and the input latents with the largest
mean |J| to it. J: mean ± standard deviation over the tokens on which both are active; below 0, more
of the input latent means less of the output latent. An input latent's text is where it is largest
itself, whatever the output latent does there."""


def details(head, *parts):
    return f"<details><summary>{html.escape(head)}</summary>{''.join(parts)}</details>"


def snippets(examples):
    """Windows of text as HTML, every token shaded by its activation as a share of the largest."""
    largest = max((example["max"] for example in examples), default=0) or 1
    lines = []
    for example in examples:
        spans = []
        for token, value in zip(example["tokens"], example["acts"]):
            text = html.escape(token.replace("\n", "↵"))
            spans.append(f'<span style="--share:{value / largest:.2f}">{text}</span>')
        lines.append(f"<pre>{example['max']:.2f}  {''.join(spans)}</pre>")
    return "".join(lines)


def details_of_latents(result):
    """Nested details: output latents, their input latents with the edge, examples of both."""
    parts = []
    for output in result["latents"]:
        inputs = []
        for edge in output["inputs"]:
            head = f"input latent {edge['latent']}: J {edge['mean']:.3g} ± {edge['std']:.3g}"
            head += f" on {edge['count']} tokens"
            inputs.append(details(head, snippets(result["examples"]["x"][str(edge["latent"])])))
        mean_abs = "-" if output["mean_abs"] is None else f"{output['mean_abs']:.3g}"
        head = f"output latent {output['latent']}: mean |J| {mean_abs} on {output['tokens']} tokens"
        examples = result["examples"]["y"][str(output["latent"])]
        parts.append(details(head, snippets(examples), *inputs))
    return "".join(parts)


def report(groups, labels, cells, figures):
    """-> report.html: one static page; no script, and nothing that is loaded from elsewhere."""
    page = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>Jacobian SAEs</title>",
        f"<meta name=viewport content='width=device-width'><style>{STYLE}</style>",
        "<h1>Evaluation of Jacobian SAEs</h1><div class=wide><table>",
    ]
    for row in cells:
        page.append("<tr>")
        page.extend(f"<td>{html.escape(cell)}</td>" for cell in row)
        page.append("</tr>")
    page.append("</table></div>")
    page.extend(f"<p>{html.escape(line)}</p>" for line in legend_lines(groups, labels))
    page.append(details("what the rows mean", f"<pre>{html.escape(ROWS_EXPLAINED)}</pre>"))
    for _, caption, png in figures:
        caption = html.escape(caption)
        picture = base64.b64encode(png).decode()
        page.append(f"<h2>{caption}</h2><div class=wide>")
        page.append(f'<img alt="{caption}" src="data:image/png;base64,{picture}"></div>')
    for label, group in zip(labels, groups):
        page.append(f"<h2>{html.escape(label)}: its strongest latents</h2>")
        page.append(f"<p>{html.escape(LATENTS_EXPLAINED)}</p>")
        page.append(details_of_latents(group[0]))
    page.append("</html>")
    return "\n".join(page)


# ---- 9. Command line -----------------------------------------------------------------------------


def make_parser():
    """-> a parser of Options' fields and of what to draw; it raises InputError."""
    parser = argparse.ArgumentParser(
        prog="evaluate.py",
        usage="python evaluate.py RUN [RUN ...] [--option value ...]",
        description="Evaluate pairs of SAEs, side by side.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )

    def refuse(message):
        raise InputError(message)

    parser.error = refuse  # in place of a usage block and exit
    parser.add_argument("runs", nargs="+", help="folders or hub ids of finished runs")
    group = parser.add_argument_group("measuring")
    for field in dataclasses.fields(Options):
        about = field.metadata
        default = getattr(Options(), field.name)
        shown = "none" if default in ("", ()) else default
        text = f"{about['text']} (default: {shown})"
        if isinstance(default, tuple):
            numbers = {tuple[int, ...]: int, tuple[float, ...]: float}
            group.add_argument(flag(field.name), type=numbers[field.type], nargs="+", help=text)
        else:
            group.add_argument(
                flag(field.name), type=field.type, choices=about["choices"], help=text
            )
    group = parser.add_argument_group("showing")
    group.add_argument(
        "--reuse",
        action="store_true",
        default=False,
        help="take evaluation.json, where there is one, as it is",
    )
    group.add_argument(
        "--output-dir", default="", help="of report and figures (default: the first run's folder)"
    )
    group.add_argument(
        "--plot",
        nargs=2,
        action="append",
        default=[],
        metavar=("X", "Y"),
        help="draw Y against X over the runs: settings, or paths in evaluation.json",
    )
    group.add_argument(
        "--series",
        default="penalty",
        help="with --plot, a line for each value of this setting (default: penalty)",
    )
    return parser


def parse(argv):
    """-> (Options, the other arguments: runs, reuse, output_dir, plot, series)."""
    arguments = make_parser().parse_args(argv)
    given = vars(arguments)
    names = [field.name for field in dataclasses.fields(Options)]
    options = Options(**{name: given.pop(name) for name in names if name in given})
    return options, arguments


def check_runs(runs):
    """InputError if a run is given twice."""
    seen = {}
    for run in runs:
        place = jsae.local_path(run) or run
        if place in seen:
            raise InputError(f"{seen[place]} and {run} are one run given twice")
        seen[place] = run


def folder_of(run, output_dir):
    """-> where evaluation.json is: the run's folder; of a run on the hub, one in output_dir."""
    return jsae.local_path(run) or Path(output_dir, run.replace("/", "--"))


def evaluation_of(run, options, arguments):
    """-> what evaluation.json holds, evaluated now or, with --reuse, before."""
    path = folder_of(run, arguments.output_dir) / "evaluation.json"
    if not (arguments.reuse and path.exists()):
        result = evaluate(run, options)
        jsae.write_file(path, json.dumps(result, allow_nan=False).encode())
    try:
        result = json.loads(path.read_text())
        is_whole = "versions" in result and "standard_error" in result
    except (ValueError, TypeError):
        is_whole = False
    if not is_whole:
        raise InputError(f"{path} is no evaluation of this version; leave out --reuse")
    return {**result, "run": run}


def print_table(cells):
    """Print a Markdown table."""
    separator = ["--"] * len(cells[0])
    for row in (cells[0], separator, *cells[1:]):
        print("|", " | ".join(cell.replace("|", "\\|") for cell in row), "|")


def evaluate_by_command(argv):
    """What `python evaluate.py` does: evaluate each run, print the table, write the report."""
    options, arguments = parse(argv)
    check_runs(arguments.runs)
    folder = Path(arguments.output_dir or folder_of(arguments.runs[0], ""))
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output-dir {folder} is no folder")
    results = [evaluation_of(run, options, arguments) for run in arguments.runs]
    groups = grouped(results)
    labels = labels_of(groups)
    cells = table_cells(groups, labels)
    print_table(cells)
    print()
    for line in legend_lines(groups, labels):
        print(line)
    figures = draw(groups, labels, arguments.plot, arguments.series)
    for name, _, png in figures:
        jsae.write_file(folder / "figures" / name, png)
    page = report(groups, labels, cells, figures)
    jsae.write_file(folder / "report.html", page.encode())
    print(f"report: {folder / 'report.html'}")
    if not figures:
        raise InputError("figures need matplotlib: pip install matplotlib")


def main(argv=None) -> int:
    """-> exit status: 0, 2 after one line about what was given, 130 after Ctrl-C."""
    return jsae.run_program("evaluate.py", evaluate_by_command, argv)


if __name__ == "__main__":
    sys.exit(main())
