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


def shows_work(completion, gold):
    """Right if it calculates something, whatever it answers: a reward for form alone."""
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
    """Every grader's verdict on ANSWERS, with a ! where it is wrong, and how many of those."""
    print(f"{'right?':7}" + "".join(f"{g.__name__:>11}" for g in GRADERS) + "   gold <- completion")
    wrong = dict.fromkeys(GRADERS, 0)
    for completion, gold, right in ANSWERS:
        verdicts = [bool(grader(completion, gold)) for grader in GRADERS]
        for grader, said in zip(GRADERS, verdicts, strict=True):
            wrong[grader] += said != right
        cells = "".join(f"{('yes' if v else 'no') + '!' * (v != right):>11}" for v in verdicts)
        print(f"{'yes' if right else 'no':7}{cells}   {gold} <- {completion}")
    print(f"{'errors':7}" + "".join(f"{count:11}" for count in wrong.values()))


def on_a_model(path):
    """What each grader pays of a model's guesses and of what it worked out, beside `verify`."""
    rows = [(r["completion"], r["gold"]) for r in read_answers(path, "completion", "gold")]
    ways = {"guessed": [x for x in rows if "Clearly" in x[0]]}
    ways["worked out"] = [x for x in rows if "Clearly" not in x[0]]
    for way, own in ways.items():
        truth = [verify(*x) for x in own]
        print(f"{len(own)} {way}, {sum(truth)} right")
        for grader in GRADERS[:-1]:
            pairs = [(bool(grader(*x)), right) for x, right in zip(own, truth, strict=True)]
            paid, refused = pairs.count((True, False)), pairs.count((False, True))
            print(f"  {grader.__name__:10} pays {paid} wrong ones, refuses {refused} right ones")


def main():
    if "--train" in sys.argv:
        at = sys.argv.index("--train")
        name = sys.argv[at + 1] if at + 1 < len(sys.argv) else ""
        rewards = {grader.__name__: grader for grader in (shows_work, *GRADERS)}
        if name not in rewards:
            raise UserError(f"--train {name}: give one of {', '.join(rewards)}")
        del sys.argv[at : at + 2]
        grpo.verify = rewards[name]  # the reward; evaluations go on with eval_math's own
        return train.main()
    if len(sys.argv) > 1:
        return on_a_model(sys.argv[1])
    on_handmade()


if __name__ == "__main__":
    run_cli(main)
