"""Both SAEs of a run as EleutherAI's sparsify saves them, which subtracts b_dec before it encodes.

    python assets/recipes/to_sparsify.py runs/NAME sparsify

Then sparsify.SparseCoder.load_from_disk("sparsify/x").
"""

import argparse
import json
import sys
from pathlib import Path

import safetensors.torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from jsae import load_run


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="a folder or hub id")
    parser.add_argument("output", help="a folder that does not exist yet")
    given = parser.parse_args()
    if Path(given.output).exists():
        parser.error(f"{given.output} exists; name another folder")

    sae_x, sae_y, _ = load_run(given.run)
    for side, sae in (("x", sae_x), ("y", sae_y)):
        folder = Path(given.output, side)
        folder.mkdir(parents=True)
        n_latents, d_model = sae.W_enc.shape
        tensors = sae.state_dict()
        theirs = {
            "encoder.weight": tensors["W_enc"],
            "encoder.bias": tensors["b_enc"] + tensors["W_enc"] @ tensors["b_dec"],
            "W_dec": tensors["W_dec"],
            "b_dec": tensors["b_dec"],
        }
        safetensors.torch.save_file(theirs, folder / "sae.safetensors")
        sizes = {"d_in": d_model, "num_latents": n_latents, "k": sae.k}
        (folder / "cfg.json").write_text(json.dumps(sizes))


if __name__ == "__main__":
    main()
