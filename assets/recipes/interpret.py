"""Automatic interpretability: fuzzing scores of random latents of both SAEs, by EleutherAI's delphi.

    pip install eai-delphi==0.1.3                             # brings vllm, for a local LLM on a GPU
    python assets/recipes/interpret.py runs/A runs/B          # as the paper: Llama-3.1-70B, 4 bits
    python assets/recipes/interpret.py runs/A --latents 100 --tokens 400000 --llm NAME \\
        --url http://localhost:8000/v1/chat/completions       # any endpoint; its key in $API_KEY

An LLM explains a latent from text in which the tokens where it is active are marked, then judges
whether other marked text fits the explanation (section 3.2, figures 6 and 37). Half of that text
holds the latent, marked where it is active; the other half does not, and is marked at random. The
score is the share of right judgements, .5 by guessing. Explanations and scores go to
interpretability.json of the run.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
from pathlib import Path

import torch
from delphi.clients import Offline, OpenRouter
from delphi.config import ConstructorConfig, SamplerConfig
from delphi.explainers import DefaultExplainer
from delphi.latents import Latent, LatentCache, LatentRecord, constructor, sampler
from delphi.latents.latents import ActivationData
from delphi.scorers import FuzzingScorer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from evaluate import Options, held_out_text, open_run
from jsae import run_folder, write_file


def activations_of(opened, side, ids, latents):
    """-> where the latents are active, (n, 3): context, position, latent; and how strongly, (n,)."""
    sae = opened.sae_x if side == "x" else opened.sae_y
    module = opened.mlp.maps[0] if side == "x" else opened.mlp.maps[-1]

    def encode(site):  # (contexts, T, d_model) -> (contexts, T, n_latents)
        s = sae.encode(site.flatten(0, 1))
        dense = site.new_zeros(len(s.acts), len(sae.W_enc)).scatter(1, s.idx, s.acts)
        dense = dense.unflatten(0, site.shape[:2])
        dense[:, 0] = 0  # the first token of a context is left out, as in training
        return dense

    name = next(name for name, part in opened.model.named_modules() if part is module)
    cache = LatentCache(  # transcode: what enters the module, not what leaves it
        opened.model, {name: encode}, batch_size=1, transcode=side == "x", filters={name: latents}
    )
    cache.run(ids.numel(), ids)
    return cache.cache.latent_locations[name], cache.cache.latent_activations[name]


def record_of(latent, locations, acts, ids, tokenizer, settings):
    """-> delphi's record of a latent with its examples, or a word that says why there is none."""
    chosen = locations[:, 2] == latent
    if not chosen.any():
        return "silent"
    data = ActivationData(locations[chosen], acts[chosen])
    windows = ConstructorConfig(
        min_examples=settings.min_examples, n_non_activating=settings.examples
    )
    record = constructor(LatentRecord(Latent("", latent)), data, windows, ids, tokenizer)
    if record is None:
        return "rare"
    if not record.not_active:
        return "in every window"
    record = sampler(record, SamplerConfig(n_examples_test=settings.examples), tokenizer)
    for example in [*record.train, *record.test, *record.not_active]:
        # one string for each token: transformers 5 decodes delphi's 1-D ids to a single string
        example.str_tokens = tokenizer.batch_decode(example.tokens.unsqueeze(1))
    return record


async def judge(record, client, slots):
    """Explain a latent and score the explanation: the share of marked examples judged rightly."""
    async with slots:
        explain = DefaultExplainer(client, generation_kwargs={"max_retries": 5})
        record.explanation = (await explain(record)).explanation
        score = FuzzingScorer(client, n_examples_shown=5, max_retries=5)  # seeded: one for each
        answers = (await score(record)).score

    right = [answer.correct for answer in answers if answer.correct is not None]
    return {
        "latent": record.latent.latent_index,
        "explanation": record.explanation,
        "score": statistics.mean(right) if right else None,
        "not_understood": len(answers) - len(right),
    }


async def interpret(run, client, settings):
    """-> {"x": ..., "y": ...}: scores of random latents of each SAE, and how many were left out."""
    opened = open_run(run, Options(device=settings.device))
    ids, _ = held_out_text(opened, settings.tokens, settings.seed)
    results = {}
    for side in "xy":
        rng = torch.Generator().manual_seed(settings.seed)
        drawn = torch.randperm(len(opened.sae_x.W_enc), generator=rng)
        drawn = drawn[: 2 * settings.latents]  # if more than half are left out, there are fewer
        locations, acts = activations_of(opened, side, ids, drawn.to(opened.model.device))

        records, left_out = [], {}
        for latent in drawn.tolist():
            if len(records) == settings.latents:
                break
            record = record_of(latent, locations, acts, ids, opened.tokenizer, settings)
            if isinstance(record, str):
                left_out[record] = left_out.get(record, 0) + 1
            else:
                records.append(record)

        slots = asyncio.Semaphore(32)  # latents at a time
        latents = await asyncio.gather(*[judge(record, client, slots) for record in records])
        results[side] = {"left_out": left_out, "latents": latents}
    return results


def row(run, side, result):
    """One line of a table: mean of the scores with its standard error over latents."""
    scores = [one["score"] for one in result["latents"] if one["score"] is not None]
    error = statistics.stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else float("nan")
    mean = statistics.mean(scores) if scores else float("nan")
    left_out = ", ".join(f"{n} {word}" for word, n in result["left_out"].items()) or "none"
    lost = sum(one["not_understood"] for one in result["latents"])
    return f"| {run} | {side} | {mean:.3f} ± {error:.3f} | {len(scores)} | {left_out} | {lost} |"


def main(argv=None, client=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", help="folders or hub ids")
    parser.add_argument("--llm", default="hugging-quants/Meta-Llama-3.1-70B-Instruct-AWQ-INT4")
    parser.add_argument("--url", help="an OpenAI-compatible .../chat/completions; key: $API_KEY")
    parser.add_argument("--gpus", type=int, default=1, help="for the LLM, when there is no --url")
    parser.add_argument("--latents", type=int, default=512, help="of each SAE")
    parser.add_argument("--min-examples", type=int, default=200, help="rarer latents are left out")
    parser.add_argument("--examples", type=int, default=50, help="with the latent, and without it")
    parser.add_argument("--tokens", type=int, default=10_000_000, help="of held-out text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="of the language model and the SAEs")
    settings = parser.parse_args(argv)

    if client is None and settings.url:
        client = OpenRouter(settings.llm, os.environ.get("API_KEY"), settings.url)
    elif client is None:
        client = Offline(settings.llm, max_model_len=5120, num_gpus=settings.gpus)

    print("| run | SAE | fuzzing score | latents | left out | answers not understood |")
    print("|---|---|---|---|---|---|")
    for run in settings.runs:
        results = asyncio.run(interpret(run, client, settings))
        path = run_folder(run) / "interpretability.json"
        write_file(path, json.dumps(results, indent=2).encode())
        for side, result in results.items():
            print(row(run, side, result))


if __name__ == "__main__":
    main()
