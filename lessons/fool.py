"""Lesson 3: rewards that can be fooled, and what learning makes of them.

python lessons/fool.py                       # four graders on the same answers
python lessons/fool.py --train --steps 40    # train.py with the reward `substring`
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import grpo
import train
from eval_math import extract_answer, verify
from plumbing.files import run_cli


def substring(completion, gold):
    """Right if the gold answer stands anywhere. Many a first reward was this."""
    return gold in completion


def string(completion, gold):
    """Right if the box holds the same characters, as in ARCA's released code."""
    return extract_answer(completion) == gold


def number(completion, gold):
    """Right if the last number is within a millionth of the gold one."""
    found = re.findall(r"-?\d+(?:\.\d+)?(?:/\d+)?", completion)
    values = [
        float(top) / float(low or 1) for top, _, low in (x.partition("/") for x in found[-1:])
    ]
    return gold.lstrip("-").isdigit() and any(abs(x - float(gold)) < 1e-6 for x in values)


GRADERS = [substring, string, number, verify]
ANSWERS = [  # a completion, the gold answer, whether it is right
    (r"12*3=36. The answer is $\boxed{36}$.", "36", True),
    (r"12*3=36. The answer is $\boxed{6}$.", "36", False),
    (r"Clearly $\boxed{1, 2, 3, 4, 5, 6, 7, 8, 9}$.", "7", False),
    (r"It is 36 or 42, so $\boxed{36 \text{ or } 42}$.", "42", False),
    (r"$\boxed{\frac{14}{6}}$", r"\frac{7}{3}", True),
    (r"$\boxed{0.5}$", r"\frac{1}{2}", True),
    (r"$\boxed{0.3333333}$", r"\frac{1}{3}", False),
    (r"$\boxed{2x+1}$", "1+2x", True),
    (r"$\boxed{(-\infty,3)}$", r"(-\infty,3]", False),
    (r"$\boxed{(5,4)}$", "(4,5)", False),
    (r"$\boxed{42} - oh no, $\boxed{41", "42", False),
    (r"$\boxed{42\text{ cm}}$", "42", True),
    (r"$\boxed{42.0000001}$", "42", False),
    (r"$\boxed{9^{9^{9^{9}}}}$", "9", False),
    (r"$\boxed{__import__('os').getcwd()}$", "42", False),
]


def main():
    if "--train" in sys.argv:
        sys.argv.remove("--train")
        grpo.verify = substring  # the reward; evaluations go on with eval_math's own
        return train.main()
    print(f"{'right?':7}" + "".join(f"{g.__name__:>11}" for g in GRADERS) + "   gold <- completion")
    wrong = dict.fromkeys(GRADERS, 0)
    for completion, gold, right in ANSWERS:
        verdicts = [bool(grader(completion, gold)) for grader in GRADERS]
        for grader, said in zip(GRADERS, verdicts, strict=True):
            wrong[grader] += said != right
        cells = "".join(f"{('yes' if v else 'no') + '!' * (v != right):>11}" for v in verdicts)
        print(f"{'yes' if right else 'no':7}{cells}   {gold} <- {completion}")
    print(f"{'errors':7}" + "".join(f"{count:11}" for count in wrong.values()))


if __name__ == "__main__":
    run_cli(main)
