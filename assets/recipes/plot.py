"""Any number of evaluation.json against any other, a point for each run.

    python assets/recipes/plot.py hold_90 ce_lost.path runs/*/evaluation.json

draws plot.png. The names are the keys of `numbers`; ROWS in evaluate.py says what they are.
"""

import json
import sys
from pathlib import Path

from matplotlib import pyplot as plt

x, y, *paths = sys.argv[1:]
for path in paths:
    result = json.loads(Path(path).read_text())
    numbers, errors = result["numbers"], result["errors"]
    label = f"lambda {result['settings']['jacobian_coef']:g}, {Path(path).parent.name}"
    plt.errorbar(numbers[x], numbers[y], errors.get(y), errors.get(x), "o", label=label)
plt.xlabel(x)
plt.ylabel(y)
plt.legend(fontsize=7)
plt.savefig("plot.png", dpi=150)
