"""Lesson 6: how many seeds it takes to see a difference between two rules.

python lessons/power.py 93.2 90.6 93.6    # the results of one rule's seeds, in per cent
"""

import math
import sys
from pathlib import Path
from statistics import NormalDist, mean, stdev

sys.path.insert(0, str(Path(__file__).parent.parent))
from system.errors import Parser, UserError, run_cli


def seeds_needed(spread, difference, power=0.8, level=0.05):
    """Return how many seeds of each of two rules a two-sided test at this level needs to see the
    difference with this probability: 2 ((z_level + z_power) spread / difference)^2.

    That is for normal results of known spread, so for few seeds it is too small by one or two.
    """
    z = NormalDist().inv_cdf(1 - level / 2) + NormalDist().inv_cdf(power)
    return 2 * (z * spread / difference) ** 2


def main():
    parser = Parser(description="Seeds that it takes to tell two rules apart.")
    parser.add_argument("results", nargs="+", type=float, help="of a rule's seeds, in per cent")
    results = parser.parse_args().results
    if len(results) < 2:
        raise UserError("one result has no spread: give those of two seeds or more")
    center = mean(results)
    spread = stdev(results)
    print(f"{len(results)} seeds: mean {center:.1f} %, standard deviation {spread:.2f} points")
    for difference in (0.5, 1, 2, 3, 5, 10):
        n = max(2, math.ceil(seeds_needed(spread, difference)))
        print(f"a difference of {difference:4} points: {n:4} seeds of each rule")


if __name__ == "__main__":
    run_cli(main)
