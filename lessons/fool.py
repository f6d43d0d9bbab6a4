"""Lesson 3: rewards that can be fooled, and what learning makes of them.

python lessons/fool.py                       # four graders on handmade answers
python lessons/fool.py runs/base.jsonl       # and on those of a model, which eval_math.py wrote
python lessons/fool.py --train shows_work    # train.py, and its flags, with another reward
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import grpo
import train
from eval_math import verify
from run.answers import read_answers
from system.errors import UserError, run_cli
from verifier.extract import extract_answer

NUMBER = re.compile(r"(-?\d+(?:\.\d+)?)(?:/(\d+))?")


def substring(completion, gold):
    """Return whether the gold answer stands anywhere. Many a first reward was this."""
    return gold in completion


def string(completion, gold):
    """Return whether the box holds the same characters, as in ARCA's released code."""
    return extract_answer(completion) == gold


def number(completion, gold):
    """Return whether the last number is within a millionth of the gold one."""
    found = NUMBER.findall(completion)
    if not found or not gold.lstrip("-").isdigit():
        return False
    top, bottom = found[-1]
    return abs(float(top) / float(bottom or 1) - float(gold)) < 1e-6


def shows_work(completion, gold):
    """Return whether it calculates something, whatever it answers: a reward for form alone."""
    return "=" in completion


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


def on_handmade():
    """Print every grader's verdict on ANSWERS, with a ! where it is wrong, and how many are."""
    print(f"{'right?':7}" + "".join(f"{g.__name__:>11}" for g in GRADERS) + "   gold <- completion")
    wrong = dict.fromkeys(GRADERS, 0)
    for completion, gold, right in ANSWERS:
        line = f"{'yes' if right else 'no':7}"
        for grader in GRADERS:
            paid = bool(grader(completion, gold))
            cell = "yes" if paid else "no"
            if paid != right:
                cell += "!"
                wrong[grader] += 1
            line += f"{cell:>11}"
        print(f"{line}   {gold} <- {completion}")
    print(f"{'errors':7}" + "".join(f"{count:11}" for count in wrong.values()))


def on_a_model(path):
    """Print what each grader pays of a model's guesses and of what it worked out."""
    rows = [(row["completion"], row["gold"]) for row in read_answers(path, "completion", "gold")]
    guessed = [row for row in rows if "Clearly" in row[0]]
    worked_out = [row for row in rows if "Clearly" not in row[0]]
    for way, own in (("guessed", guessed), ("worked out", worked_out)):
        truth = [verify(*row) for row in own]
        print(f"{len(own)} {way}, {sum(truth)} right")
        for grader in GRADERS[:-1]:
            verdicts = [bool(grader(*row)) for row in own]
            pairs = list(zip(verdicts, truth, strict=True))
            paid = pairs.count((True, False))
            refused = pairs.count((False, True))
            print(f"  {grader.__name__:10} pays {paid} wrong ones, refuses {refused} right ones")


def main():
    if "--train" in sys.argv:
        at = sys.argv.index("--train")
        name = "".join(sys.argv[at + 1 : at + 2])
        rewards = {grader.__name__: grader for grader in (shows_work, *GRADERS)}
        if name not in rewards:
            raise UserError(f"--train {name}: give one of {', '.join(rewards)}")
        del sys.argv[at : at + 2]  # the rest are flags of train.py
        grpo.verify = rewards[name]  # the reward; evaluations keep eval_math's own
        return train.main()
    if len(sys.argv) > 1:
        return on_a_model(sys.argv[1])
    on_handmade()


if __name__ == "__main__":
    run_cli(main)
