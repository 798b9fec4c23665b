"""Any number of evaluation.json against any other, a point for each run.

    python assets/recipes/plot.py hold_90 ce_lost.path runs/*/evaluation.json --output plot.png

The names are the keys of `numbers`; ROWS and GLOSSARY in evaluate.py say what they are. Bars are the
standard errors over documents of each run by itself.
"""

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("x", help="name of a number")
    parser.add_argument("y", help="name of another")
    parser.add_argument("evaluations", nargs="+", help="evaluation.json of runs")
    parser.add_argument("--output", default="plot.png", help="the picture")
    given = parser.parse_args()
    if not given.output.endswith(".png"):
        parser.error(f"--output is {given.output}; expected a .png")

    figure = Figure(layout="constrained")
    ax = figure.subplots()
    for path in given.evaluations:
        result = json.loads(Path(path).read_text())
        numbers, errors = result["numbers"], result["errors"]
        for name in (given.x, given.y):
            if name not in numbers:
                parser.error(f"{path} has no {name}; it has {', '.join(numbers)}")
        label = f"lambda {result['settings']['jacobian_coef']:g}, {Path(path).parent.name}"
        bars = errors.get(given.y), errors.get(given.x)
        ax.errorbar(numbers[given.x], numbers[given.y], *bars, "o", label=label)
    ax.set(xlabel=given.x, ylabel=given.y)
    ax.legend(fontsize=7)
    figure.savefig(given.output, dpi=150)


if __name__ == "__main__":
    main()
