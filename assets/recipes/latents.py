"""The strongest output latents of a run, and the input latents that feed them, in a terminal.

    python assets/recipes/latents.py runs/NAME
    python assets/recipes/latents.py runs/NAME --latents 20 --tokens 100000

It chooses them as the report of evaluate.py does: by what their strongest input contributes on a
token, among latents active on 20 tokens of 5 documents at least. It leaves out the measures, which
take most of evaluate.py's time. Of each latent it prints three texts, [marked] at the token that the
text is of, with the latent's value there, and the three input latents that contribute most.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import evaluate
from evaluate import Connections, Options

N_TEXTS = N_INPUTS = 3


def show(head, examples, indent):
    print(f"{indent}{head}")
    for example in examples[:N_TEXTS]:
        at = example["at"]
        words = list(example["tokens"])
        words[at] = f"[{words[at]}]"
        print(f"{indent}  {example['acts'][at]:6.2f}  {''.join(words)!r}")


@torch.no_grad()
def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="a folder or hub id")
    parser.add_argument("--latents", type=int, default=20, help="how many output latents")
    parser.add_argument("--tokens", type=int, default=100_000, help="of held-out text")
    given = parser.parse_args(argv)
    options = Options(tokens=given.tokens)
    run = evaluate.open_run(given.run, options)
    ids, documents = evaluate.held_out_text(run, given.tokens, options.seed)
    n_documents = int(documents.max()) + 1
    n_latents = len(run.sae_x.W_enc)
    connections = Connections(n_latents, [], n_documents, options.seed, run.model.device)
    kept = []
    for tokens in evaluate.batches(run, ids, documents):
        connections.add(tokens, torch.zeros_like(tokens.J))
        kept.append((tokens.ids, tokens.s_x, tokens.s_y))
    all_ids, all_x, all_y = zip(*kept)
    kept = torch.cat(all_ids), evaluate.joined(all_x), evaluate.joined(all_y)

    chosen = connections.strongest(given.latents)
    for latent in evaluate.latents_of(connections, chosen, kept, run.tokenizer):
        show(f"output latent {latent['latent']}", latent["examples"], "")
        for edge in latent["inputs"][:N_INPUTS]:
            head = f"input latent {edge['latent']}: {edge['share']:.0%} of all contributions, "
            head += f"mean J {edge['mean_J']:.2g} on {edge['tokens']} tokens, "
            head += f"{edge['different_tokens']} different words or parts"
            show(head, edge["examples"], "    ")
        print()


if __name__ == "__main__":
    main()
