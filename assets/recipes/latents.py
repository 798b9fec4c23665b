"""The output latents of a run with the strongest edges, and the input latents that feed them.

    python assets/recipes/latents.py runs/NAME            # or: runs/NAME 20 100000

prints 20 output latents over 100,000 held-out tokens, as the report of evaluate.py shows them, but
more of them and without the measures, which take most of its time: for each latent three texts in
which it is large, [marked] where it is above half of its largest value there, and its three input
latents that contribute most (sum of |J s_x,j|), with their texts.
"""

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
        largest = max(example["acts"])
        text = ""
        for token, value in zip(example["tokens"], example["acts"]):
            text += f"[{token}]" if value > largest / 2 else token
        print(f"{indent}  {largest:6.2f}  {text!r}")


@torch.no_grad()
def main(run, n=20, n_tokens=100_000):
    options = Options()
    run = evaluate.open_run(run, options)
    ids, documents = evaluate.held_out_text(run, int(n_tokens), options.seed)
    connections = Connections(len(run.sae_x.W_enc), [], options.seed, run.model.device)
    kept = []
    for tokens in evaluate.batches(run, ids, documents):
        connections.add(tokens.J, tokens.s_x, tokens.s_y)
        kept.append((tokens.ids, tokens.s_x, tokens.s_y))

    chosen = connections.strongest(int(n))
    for latent in evaluate.latents_of(connections, chosen, kept, run.tokenizer):
        show(f"output latent {latent['latent']}", latent["examples"], "")
        for edge in latent["inputs"][:N_INPUTS]:
            head = f"input latent {edge['latent']}: {edge['share']:.0%} of all contributions, "
            head += f"mean J {edge['mean_J']:.2g} on {edge['tokens']} tokens, "
            head += f"{edge['different_tokens']} different words or parts"
            show(head, edge["examples"], "    ")
        print()


if __name__ == "__main__":
    main(*sys.argv[1:])
