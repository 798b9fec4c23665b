"""What the penalty changes, by length of training: a table, and a picture of the differences.

    python assets/recipes/lengths.py runs/*/evaluation.json --output lengths.png

A run is compared with the one at lambda 0 that has the same other settings and was evaluated on the same
tokens. ±: standard error of the difference over documents, paired.
"""

import argparse
import json
import math
import sys
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from evaluate import ROWS, difference, name_of

NUMBERS = ["ce_lost.path", "hold_90", "text_inputs", "input_share.1", "mean_abs"]


def common(result):
    """-> what a run shares with the one at lambda 0 that it is compared with."""
    left_out = {"jacobian_coef", "penalty", "output_dir", "device"}
    settings = {name: v for name, v in result["settings"].items() if name not in left_out}
    return json.dumps([settings, result["text"]], sort_keys=True)


def cell(old, new, name):
    change, error = difference([new], [old], name)
    plus_minus = "" if math.isnan(error) else f" ± {error:.2g}"
    return f"{old['numbers'][name]:.4g} -> {new['numbers'][name]:.4g}: {change:+.3g}{plus_minus}"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("evaluations", nargs="+", help="evaluation.json of runs")
    parser.add_argument("--numbers", nargs="+", default=NUMBERS, help="keys of `numbers`")
    parser.add_argument("--output", default="lengths.png", help="the picture")
    given = parser.parse_args()
    if not given.output.endswith(".png"):
        parser.error(f"--output is {given.output}; expected a .png")

    results = [json.loads(Path(path).read_text()) for path in given.evaluations]
    results.sort(key=lambda result: result["settings"]["tokens"])
    at_0 = {common(r): r for r in results if r["settings"]["jacobian_coef"] == 0}
    lines = {}  # label -> [(run at lambda 0, run), ...], by length
    for result in results:
        old = at_0.get(common(result))
        if old and old is not result:
            label = f"{name_of(result['settings'])}, seed {result['settings']['seed']}"
            lines.setdefault(label, []).append((old, result))
    if not lines:
        parser.error("no run has one at lambda 0 beside it with the same settings and text")

    titles = [ROWS.get(name, name) for name in given.numbers]
    print("| tokens | |", " | ".join(titles).replace("|J|", r"\|J\|"), "|")
    print("|---" * (2 + len(titles)) + "|")
    for label, pairs in lines.items():
        for old, new in pairs:
            cells = [cell(old, new, name) for name in given.numbers]
            print(f"| {new['settings']['tokens'] / 1e6:g}M | {label} | {' | '.join(cells)} |")

    figure = Figure(figsize=(2.6 * len(titles), 2.8), layout="constrained")
    panels = figure.subplots(1, len(titles), squeeze=False)[0]
    for ax, name, title in zip(panels, given.numbers, titles):
        for label, pairs in lines.items():
            millions = [new["settings"]["tokens"] / 1e6 for _, new in pairs]
            changes, errors = zip(*[difference([new], [old], name) for old, new in pairs])
            ax.errorbar(millions, changes, errors, marker="o", capsize=3, label=label)
        ax.axhline(0, color="gray", linewidth=0.8)
        ax.set_title(title, fontsize=9)
        ax.set(xscale="log", xlabel="million tokens of training")
        lengths = sorted({result["settings"]["tokens"] / 1e6 for result in results})
        ax.set_xticks(lengths, [f"{length:g}" for length in lengths], minor=False)
        ax.set_xticks([], minor=True)
    panels[0].set_ylabel("difference from lambda 0")
    panels[0].legend(fontsize=7)
    figure.savefig(given.output, dpi=110)


if __name__ == "__main__":
    main()
