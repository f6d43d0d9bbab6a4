"""A copy of the project in which functions have lost their body, for you to write them again.

    python lessons/blank.py --list              # what is worth writing, and which tests grade it
    python lessons/blank.py rotary rotate       # a copy without these two, beside the project

Decorators, signature and docstring stay, and so does every other byte. What grades you are the
project's own tests: they compare with other libraries, enumeration and rows worked out by hand,
never with the body that was here, so any way of writing it that is right passes.
"""

import ast
import shlex
import shutil
import sys
import tempfile
from difflib import get_close_matches
from fnmatch import fnmatch
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from system.errors import Parser, UserError, run_cli

HOUSE = Path(__file__).resolve().parent.parent
FILES = ["model.py", "lora.py", "sample.py", "eval_math.py", "credit.py", "grpo.py", "train.py"]
FILES += ["verifier/extract.py", "run/answers.py"]  # boxes, and intervals
UNNEEDED = ("runs", ".git", ".venv", "venv", "__pycache__", ".*_cache", ".hypothesis", "*.egg-info")
LESSONS = {
    1: "a transformer that samples",
    2: "LoRA and its two paths",
    3: "rewards that are hard to fool",
    4: "GRPO from the policy gradient",
    5: "token credit and how it degenerates",
    6: "reading a result with controls",
}
#   function: (lesson, the tests that grade it)
EXERCISES = {
    "rms_norm": (1, "test_model.py::test_logits_equal_transformers"),
    "rotary": (
        1,
        "test_model.py::test_logits_equal_transformers",
        "test_model.py::test_unequal_prompts_equal_each_alone",
    ),
    "rotate": (
        1,
        "test_model.py::test_logits_equal_transformers",
        "test_model.py::test_unequal_prompts_equal_each_alone",
    ),
    "attention": (
        1,
        "test_model.py::test_logits_equal_transformers",
        "test_model.py::test_cache_equals_full_forward",
        "test_model.py::test_unequal_prompts_equal_each_alone",
    ),
    "Attention.forward": (
        1,
        "test_model.py::test_logits_equal_transformers",
        "test_model.py::test_cache_equals_full_forward",
        "test_model.py::test_unequal_prompts_equal_each_alone",
    ),
    "KVCache.start": (
        1,
        "test_model.py::test_cache_equals_full_forward",
        "test_model.py::test_unequal_prompts_equal_each_alone",
    ),
    "KVCache.attend": (
        1,
        "test_model.py::test_cache_equals_full_forward",
        "test_model.py::test_unequal_prompts_equal_each_alone",
    ),
    "KVCache.copy_rows": (1, "test_sample.py::test_completion_depends_on_its_own_key_only"),
    "uniforms": (
        1,
        "test_sample.py::test_uniforms",
        "test_sample.py::test_other_keys_give_other_completions",
    ),
    "top_p_filter": (
        1,
        "test_sample.py::test_top_p_filter_by_hand",
        "test_sample.py::test_top_p_filter_equals_transformers",
    ),
    "inverse_cdf": (
        1,
        "test_sample.py::test_draw_at_the_edges",
        "test_sample.py::test_draw_equals_a_running_sum",
        "test_sample.py::test_draw_is_exact_over_a_large_vocabulary",
    ),
    "sample_token": (
        1,
        "test_sample.py::test_top_p_filter_equals_transformers",
        "test_sample.py::test_distribution_is_the_models",
    ),
    "LoRALinear.forward": (
        2,
        "test_lora.py::test_peft_loads_ours",
        "test_lora.py::test_adapter_off_is_the_base_model",
        "test_lora.py::test_fp32_adapter_on_a_bf16_base",
    ),
    "adapter_off": (
        2,
        "test_lora.py::test_adapter_off_is_the_base_model",
        "test_lora.py::test_adapter_off_restores_after_an_error",
    ),
    "add_lora": (
        2,
        "test_lora.py::test_initial_adapter",
        "test_lora.py::test_only_the_adapter_learns",
        "test_lora.py::test_add_lora_refuses",
    ),
    "last_boxed": (3, "test_eval_math.py::test_boxed_answers"),
    "extract_answer": (
        3,
        "test_eval_math.py::test_boxed_answers",
        "test_eval_math.py::test_stated_answers",
    ),
    "verify": (
        3,
        "test_eval_math.py::test_right_answers",
        "test_eval_math.py::test_wrong_answers",
        "test_eval_math.py::test_no_answer_is_run",
    ),
    "pass_at_k": (
        3,
        "test_eval_math.py::test_pass_at_k_counts_subsets",
        "test_eval_math.py::test_pass_at_k_refuses_nonsense",
        "test_eval_math.py::test_pass_at_k_of_many_samples",
    ),
    "group_advantages": (4, "test_grpo.py::test_advantages_by_hand"),
    "make_batch": (
        4,
        "test_grpo.py::test_every_completion_token_learns_and_nothing_else",
        "test_grpo.py::test_signals_are_those_of_the_predicting_state",
    ),
    "pad_rows": (
        4,
        "test_grpo.py::test_the_worked_example_of_pad_rows",
        "test_grpo.py::test_batches_equal_each_row_alone",
    ),
    "token_logps": (
        4,
        "test_grpo.py::test_chunks_change_nothing",
        "test_grpo.py::test_logits_are_not_kept_for_backward",
    ),
    "policy_objective": (
        4,
        "test_grpo.py::test_clip_by_hand",
        "test_grpo.py::test_loss_by_hand",
        "test_grpo.py::test_second_update_uses_ratio_and_clip",
    ),
    "kl_k3": (
        4,
        "test_grpo.py::test_kl_estimate_is_the_kl_in_expectation_and_never_negative",
        "test_grpo.py::test_kl_penalty_pulls_towards_the_base_model",
    ),
    "token_loss": (
        4,
        "test_grpo.py::test_loss_by_hand",
        "test_grpo.py::test_second_update_uses_ratio_and_clip",
        "test_grpo.py::test_kl_penalty_pulls_towards_the_base_model",
    ),
    "clip_and_step": (
        4,
        "test_grpo.py::test_gradients_are_clipped_jointly",
        "test_grpo.py::test_a_gradient_that_is_not_finite_is_skipped",
    ),
    "update": (
        4,
        "test_grpo.py::test_loss_by_hand",
        "test_grpo.py::test_micro_batches_change_nothing",
        "test_grpo.py::test_second_update_uses_ratio_and_clip",
    ),
    "normalize_scores": (
        5,
        "test_credit.py::test_rules_by_hand",
        "test_credit.py::test_a_row_whose_scores_vanish_is_exactly_uniform",
        "test_credit.py::test_only_scores_that_are_zero_vanish",
    ),
    "arca": (
        5,
        "test_credit.py::test_rules_by_hand",
        "test_grpo.py::test_arca_does_not_depend_on_the_scale_of_the_adapter",
    ),
    "entropy_reduction": (
        5,
        "test_credit.py::test_rules_by_hand",
        "test_credit.py::test_a_row_whose_scores_vanish_is_exactly_uniform",
    ),
    "score": (
        5,
        "test_grpo.py::test_signals_are_those_of_the_predicting_state",
        "test_grpo.py::test_credit_is_uniform_before_the_first_step",
    ),
    "gini": (
        5,
        "test_credit.py::test_concentration_of_uniform_and_one_hot_rows",
        "test_credit.py::test_concentration_by_brute_force",
        "test_credit.py::test_concentration_of_a_ramp",
    ),
    "effective_token_ratio": (
        5,
        "test_credit.py::test_concentration_of_uniform_and_one_hot_rows",
        "test_credit.py::test_concentration_by_brute_force",
        "test_credit.py::test_concentration_of_a_ramp",
    ),
    "permuted": (6, "test_credit.py::test_permuted"),
    "random": (6, "test_credit.py::test_random"),
    "wilson": (6, "test_eval_math.py::test_wilson_intervals"),
}


def functions() -> dict:
    """Return every function of FILES by its name, such as `rotary` or `Attention.forward`: its file
    and its node in the syntax tree. Not `main`, of which each command line has one."""
    found = {}
    for file in FILES:
        for node in ast.parse((HOUSE / file).read_bytes()).body:
            if isinstance(node, ast.FunctionDef) and node.name != "main":
                found[node.name] = (file, node)
            if isinstance(node, ast.ClassDef):
                methods = [inner for inner in node.body if isinstance(inner, ast.FunctionDef)]
                found.update({f"{node.name}.{inner.name}": (file, inner) for inner in methods})
    return found


def body(node) -> slice:
    """Return the lines of a function's body, without its docstring; line 1 of the file is 0."""
    first = node.body[0]
    start = first.end_lineno if ast.get_docstring(node) is not None else first.lineno - 1
    return slice(start, node.end_lineno)


def blanked(source: str, nodes: dict) -> str:
    """Return the source of a file without the bodies of these functions of it, given by name."""
    lines = source.split("\n")
    for name, node in sorted(nodes.items(), key=lambda item: -item[1].lineno):
        say = f'raise NotImplementedError("yours to write: {name}")'
        lines[body(node)] = [" " * node.body[0].col_offset + say]
    return "\n".join(lines)


def unneeded(folder, names):
    """Return those of the names in a folder of the project that a copy can do without: what runs,
    git and tools leave, and other copies."""
    left_out = []
    for name in names:
        is_copy = (Path(folder) / name / "pyproject.toml").exists()
        if is_copy or any(fnmatch(name, pattern) for pattern in UNNEEDED):
            left_out.append(name)
    return left_out


def copy_project(out: Path):
    """Copy the project to a folder that is not there yet, else UserError."""
    if out.exists():
        raise UserError(f"{out} exists: give another --out")
    with tempfile.TemporaryDirectory() as scratch:  # so that a copy inside does not hold itself
        copy = shutil.copytree(HOUSE, Path(scratch) / "copy", ignore=unneeded)
        shutil.move(copy, out)


def make_blank(names, out: Path):
    """Make a copy of the project in `out` in which these functions of it have no body."""
    known = functions()
    copy_project(out)
    for file in FILES:
        nodes = {name: known[name][1] for name in names if known[name][0] == file}
        source = (HOUSE / file).read_bytes().decode()
        (out / file).write_bytes(blanked(source, nodes).encode())


def tests_of(name) -> list[str]:
    """Return the tests that grade a function, as pytest wants them; none if it is not listed."""
    _, *tests = EXERCISES.get(name, (0,))
    return [f"tests/{test}" for test in tests]


def show_list():
    known = functions()
    for lesson, title in LESSONS.items():
        print(f"lesson {lesson}: {title}")
        for name, (number, *_) in EXERCISES.items():
            if number == lesson:
                file, node = known[name]
                print(f"  {name}  ({file}, line {node.lineno})")
                print(*(f"    {test}" for test in tests_of(name)), sep="\n")


def main():
    parser = Parser(description="Blank functions in a copy of the project.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="rotary, Attention.forward, ...")
    parser.add_argument("--list", action="store_true", help="functions by lesson, and their tests")
    parser.add_argument("--out", help="the copy; default: beside the project, with the first NAME")
    args = parser.parse_args()
    if args.list:
        return show_list()
    if not args.names:
        raise UserError("name a function to blank: --list shows those worth it")
    known = functions()
    names = list(dict.fromkeys(args.names))
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, cutoff=0.5) or ["see --list"]
            raise UserError(f"no function {name}: {', '.join(near)}")

    out = Path(args.out) if args.out else HOUSE.with_name(f"{HOUSE.name}-{names[0]}")
    make_blank(names, out)
    for name in names:
        file, node = known[name]
        print(f"{name} is yours to write: {out / file}, line {node.lineno}")
    tests = list(dict.fromkeys(test for name in names for test in tests_of(name)))
    print("graded by" if tests else "graded by all tests, as not all of these have their own")
    command = f"python -m pytest -n 0 -x --tb=short {shlex.join(tests)}"
    print(f"\n    cd {shlex.quote(str(out))} && {command}")


if __name__ == "__main__":
    run_cli(main)
