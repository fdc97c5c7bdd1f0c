import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from golds import GOLDS, bare
from test_rules import RESTATEMENTS

import thinkmid
from thinkmid.errors import UserError
from thinkmid.rollout.grade import codes
from thinkmid.rollout.grade.config import VerifyConfig
from thinkmid.rollout.grade.grader import MathGrader
from thinkmid.rollout.grade.pool import Pool
from thinkmid.rollout.grade.reward import AnswerReward
from thinkmid.rollout.verdict import Verdict
from thinkmid.tokenizer import Tokenizer, train_tokenizer
from thinkmid.types import Prompt, Sample

ROOT = str(Path(thinkmid.__file__).parents[1])
# answers that rules leave to algebra, and gold answers
EQUAL = [
    (r"\frac{\sqrt{12}}{4}", r"\frac{\sqrt{3}}{2}"), ("2, 1", "1,2"), ("x=2, x=1", "1,2"), ("7,5,3", "3, 5, 7"),
    ("3 or 4", "3,4"), (r"\frac{2}{5}, -\frac{1}{3}", r"-\frac{1}{3}, \frac{2}{5}"), (r"0.5\pi", r"\frac{\pi}{2}"),
    ("(x-7)(x+2)", "(x+2)(x-7)"), ("x^2-5x-14", "(x+2)(x-7)"), ("-5i+6", "6-5i"), ("y=3+2x", "y = 2x + 3"),
    (r"(3, \infty) \cup (-\infty, 2)", r"(-\infty, 2) \cup (3, \infty)"), (r"3.141593", r"\pi"),
    (r"(0.5, -3, 4)", r"(\frac{1}{2}, -3, 4)"), (r"1+\sqrt{19}, 1-\sqrt{19}", r"1 \pm \sqrt{19}"), ("2(k+1)", "2k+2"),
    (r"\frac{n^2+n}{2}", r"\frac{n(n+1)}{2}"), (r"9^n-1", "3^{2n}-1"), (r"\frac{\ln 3}{\ln 2}", r"\log_{2} 3"),
    (r"2\sqrt3\text{ cm}", r"2\sqrt{3}"), (r"\frac{1}{2^{99}}", "2^{-99}"), ("x=2y", "y=x/2"),
]  # fmt: skip
UNEQUAL = [
    (r"\frac{\sqrt{12}}{5}", r"\frac{\sqrt{3}}{2}"), ("2, 3", "1,2"), ("1,2,3", "1,2"), ("1", "1,2"),
    ("(2,1)", "(1,2)"),
    ("[1,2]", "(1,2)"), ("(x-7)(x-2)", "(x+2)(x-7)"), ("6+5i", "6-5i"), ("y=2x", "y = 2x + 3"), ("3.14", r"\pi"),
    (r"1+\sqrt{19}", r"1 \pm \sqrt{19}"), ("2k+1", "2k+2"), ("q-p", "p - q"), (r"\{3,4\}", "3"), ("5", "A"),
    ("x", r"\pi"),
    ("2^{1009}", r"\log_{2} 3"), ("(x+1)^{500}", "x^{500}+1"),  # simplify() never finds out
    # what math-verify takes: it rounds to six decimals
    (r"\frac{1}{2006!}", r"\frac{1}{2004!}"), ("2^{-98}", "2^{-99}"), (r"1+\frac{1}{e}", r"1-\frac{1}{e}"),
    ("(2^{-98},1)", "(2^{-99},1)"), (r"10^{-20}x", "10^{-21}x"), ("0.0000001e", "0.0000002e"),
]  # fmt: skip
HOSTILE = [
    ("9^{9^{9}}", "4x"), ("10^9!", "4x"), (r"\binom{1000000000}{500000000}", r"\binom{4}{2}"),
    ("{" * 3000 + "4" + "}" * 3000, "x"),
    (r"\sum_{k=1}^{1000000000}k^3", r"\sum_{k=1}^{3}k"), (r"\prod_{k=1}^{100000000}k", r"\prod_{k=1}^{3}k"),
    (r"\ln(" * 30 + "x" + ")" * 30, r"\ln x"), ("(9^{9999})^{9999}", r"\sqrt{2}"), ("1" * 900 + "^{9999}", r"\pi"),
    (r"\int\frac{\sin(x^x)}{\log(x)+x^{x}}dx", r"\int x dx"), ("x^{20}+x^7+1=0", "x=2"),
    ("(x+y+z+1)^{60}=0", "(x+y)^{59}=1"),
    (r"\sin(" * 25 + "x" + ")" * 25, r"\sin x"), (r"\frac{1}{" * 25 + "x" + "}" * 25, "x"), ("20000!", "5!"),
    ("__import__('os').system('touch pwned')", "4x"), ("\\write18{touch pwned}", "4x"), ("\x00\ud800\u202e4", "4x"),
]  # fmt: skip


@pytest.fixture(scope="module")
def grader():
    grader = MathGrader(VerifyConfig(workers=2))
    yield grader
    grader.close()


def boxed(pairs):
    return [(rf"\boxed{{{answer}}}", gold) for answer, gold in pairs]


def graded(grader, pairs):
    """Verdicts, all asked before the first is read."""
    return [pending.result() for pending in [grader(text, gold) for text, gold in pairs]]


def children(pid):
    """Processes below one, by /proc."""
    parents = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if fields[0] != "Z":
                parents[int(folder.name)] = int(fields[1])
    found = {pid}
    while more := {p for p, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


def gone(pids, within_s):
    end = time.monotonic() + within_s
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_algebra_finds_equal_what_is_equal_and_nothing_else(grader):
    for pairs, value in ((EQUAL, 1), (UNEQUAL, 0)):
        said = graded(grader, boxed(pairs))
        assert not [(pair, v) for pair, v in zip(pairs, said, strict=True) if v.value != value]


@pytest.mark.parametrize("layout", ["math", "olympiad"])
def test_no_gold_answer_is_taken_for_another(grader, layout):
    same = {("(1,2)", "$1,2$"), ("1,2", "$(1,2)$")}  # an ordered pair or two solutions: math-verify takes either
    golds = GOLDS[layout]
    pairs = [
        (bare(a), b) for i, a in enumerate(golds) for b in golds[i % 7 :: 7] if a != b and (bare(a), b) not in same
    ]
    said = graded(grader, boxed(pairs))
    assert not [(pair, v) for pair, v in zip(pairs, said, strict=True) if v.value != 0]


def test_restatements_are_wrong_to_the_end(grader):
    assert {v.value for v in graded(grader, boxed(RESTATEMENTS))} == {0}


@pytest.mark.slow
def test_a_hostile_answer_takes_one_and_a_half_seconds_at_most_and_leaves_no_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = children(os.getpid())
    pool = Pool(VerifyConfig(workers=1))
    assert pool.ask("x+1", "1+x").result().value == 1  # it has loaded
    with_keeper = children(os.getpid())
    for answer, gold in HOSTILE:  # past the guards
        began = time.perf_counter()
        said = pool.ask(answer, gold).result()
        assert time.perf_counter() - began < 1.5, answer[:40]
        assert said.value != 1, answer[:40]
        assert pool.ask("x+1", "1+x").result().value == 1, "the next answer"
    assert children(os.getpid()) == with_keeper
    assert len(with_keeper - before) == 1
    assert pool.ask(*HOSTILE[0]).result() == Verdict(None, "took too long")
    pool.close()
    assert children(os.getpid()) == before
    assert not list(tmp_path.iterdir())


def test_the_guards_let_no_hostile_answer_pass_as_right(grader):
    assert 1 not in {v.value for v in graded(grader, boxed(HOSTILE))}


# what a comparison may do to its process, and the verdict
LIMITS = {
    "while True: pass": -signal.SIGPROF,
    "time.sleep(99)": -signal.SIGALRM,
    "'x' * (1 << 34)": codes.MEMORY,
    "[bytes(1 << 20) for _ in range(1 << 12)]": codes.MEMORY,
    "swallow()": codes.MEMORY,
    "f = lambda: f(); f()": codes.MEMORY,
    "1 / 0": codes.ERROR,
    "os.kill(os.getpid(), 11)": -signal.SIGSEGV,
    "open('written', 'w').write('a')": -signal.SIGXFSZ,
    "pass": codes.NO,
}


@pytest.mark.parametrize(("does", "code"), LIMITS.items(), ids=LIMITS)
def test_a_child_is_held_to_its_limits(does, code, tmp_path):
    program = f"""
import os, time
from thinkmid.rollout.grade import codes, sandbox
def swallow():  # as math-verify does
    kept = []
    try:
        while True: kept.append(bytearray(1 << 20))
    except Exception: pass
def compare(gold, answer):
    {does}
    return codes.NO
sandbox.SLACK = 1.4 if {"sleep" in does} else 1e3  # a busy machine takes CPU time slowly
os._exit(sandbox.judge(compare, '["x", "y"]', 0.5, 1 << 28))
"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=os.environ | {"PYTHONPATH": ROOT})
    if does.startswith("open"):  # Python ignores the signal: the write itself fails
        assert (tmp_path / "written").read_bytes() == b""
    else:
        assert ended.returncode == code
        assert codes.VALUES.get(code) is (0 if code == codes.NO else None)


def test_a_keeper_that_dies_fails_one_verdict_and_is_started_again():
    grader = MathGrader(VerifyConfig(workers=1))
    assert grader(r"\boxed{1+x}", "x+1").result().value == 1
    pid = grader.pool.keepers[0]._process.pid
    os.kill(pid, signal.SIGSTOP)
    pending = grader(r"\boxed{2+x}", "x+2")
    os.kill(pid, signal.SIGKILL)
    failed = pending.result()
    assert failed.value is None
    assert np.isnan(failed.reward)
    again = grader(r"\boxed{2+x}", "x+2").result()  # a failure is not remembered
    assert again.value == 1
    assert grader.row()["verify_failed"] == 1
    grader.close()


@pytest.mark.parametrize("busy", [False, True])
def test_nothing_outlives_a_trainer_that_is_killed(busy):
    program = """
import sys, time
from thinkmid.rollout.grade.config import VerifyConfig
from thinkmid.rollout.grade.pool import Pool
pool = Pool(VerifyConfig(workers=2))
[pool.ask("x+1", "1+x").result() for _ in range(4)]
[pool.ask("9^{9^{9}}", "4x") for _ in range(20 * int(sys.argv[1]))]
time.sleep(0.3)
print("now", flush=True)
time.sleep(99)
"""
    env = os.environ | {"PYTHONPATH": ROOT}
    trainer = subprocess.Popen([sys.executable, "-c", program, str(int(busy))], stdout=subprocess.PIPE, env=env)
    trainer.stdout.readline()
    workers = children(trainer.pid)
    assert len(workers) >= (4 if busy else 2)
    trainer.kill()
    trainer.communicate()
    assert gone(workers, within_s=4)


def test_verdicts_do_not_depend_on_order_or_number_of_workers(grader, monkeypatch):
    pairs = boxed(EQUAL + UNEQUAL + RESTATEMENTS[:5])
    expected = graded(grader, pairs)
    monkeypatch.setattr("thinkmid.rollout.grade.grader.CACHE_SIZE", 0)
    alone = MathGrader(VerifyConfig(workers=1))
    order = random.Random(0).sample(range(len(pairs)), len(pairs))
    shuffled = graded(alone, [pairs[i] for i in order])
    alone.close()
    assert [expected[i] for i in order] == shuffled


def test_siblings_with_one_answer_ask_once():
    grader = MathGrader(VerifyConfig(workers=1))
    # two spellings, one normal form
    texts = [r"\boxed{\frac{1}{2}+x}", r"The answer is $\dfrac12+x$.", r"\boxed{ \tfrac{1}{2}+x }"]
    pendings = [grader(text, r"x+\frac{1}{2}") for text in texts]
    assert {pending.result() for pending in pendings} == {Verdict(1, "equal by algebra")}
    assert grader(texts[0], r"x+\frac{1}{2}").result().value == 1
    assert grader(texts[0], r"x+\frac{1}{3}").result().value == 0
    assert grader(r"\boxed{4}", "4").result().value == 1
    row = grader.row()
    assert row.pop("verify_wait_s") > (0, 0)
    assert row == {"verify_asked": 2, "verify_exact": 1, "verify_failed": 0, "verify_cached": 3}
    assert set(grader.row().values()) == {0, (0, 0)}
    grader.close()


def test_closing_fails_what_waits_and_leaves_no_process():
    before = children(os.getpid())
    grader = MathGrader(VerifyConfig(workers=2))
    waiting = [grader(rf"\boxed{{(9^{{9999}})^{{9999}}+{i}}}", r"\sqrt{2}") for i in range(6)]
    time.sleep(0.2)
    grader.close()
    assert {pending.result().value for pending in waiting} == {None}
    assert children(os.getpid()) == before
    with pytest.raises(RuntimeError):
        grader(r"\boxed{x+1}", "1+x")


@pytest.mark.parametrize("wrong", [{"workers": 0}, {"cpu_s": 0}, {"cpu_s": float("nan")}, {"memory_mib": 1}])
def test_a_grader_that_could_not_grade_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        VerifyConfig(**wrong)


def test_a_keeper_finds_the_package_of_its_starter_from_any_folder(tmp_path):
    program = f"""
import os, sys
sys.path.insert(0, {ROOT!r})
from thinkmid.rollout.grade.config import VerifyConfig
from thinkmid.rollout.grade.pool import Pool
os.chdir({str(tmp_path)!r})
pool = Pool(VerifyConfig(workers=1))
print(pool.ask("x+1", "1+x").result())
pool.close()
"""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert ran.stdout.strip() == repr(Verdict(1, "equal by algebra")), ran.stderr


@pytest.mark.slow
def test_ten_thousand_answers_leak_nothing():
    grader, before = MathGrader(VerifyConfig(workers=2)), None
    for start in range(0, 10_000, 500):
        pairs = [(rf"\boxed{{{i}+x}}" if i % 8 == 0 else rf"\boxed{{{i}}}", f"x+{i}" if i % 8 == 0 else str(i))
                 for i in range(start, start + 500)]  # fmt: skip
        pairs.append((rf"\boxed{{(9^{{9999}})^{{9999}}+{start}}}", r"\sqrt{2}"))
        said = graded(grader, pairs)
        assert all(v.value == 1 for v in said[:-1])
        assert said[-1].value is None
        now = children(os.getpid()), len(os.listdir("/proc/self/fd"))
        assert now == (before or now)
        before = now
    grader.close()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["The answer is 4. So 7 remain."], 290, folder, "plain")
    return Tokenizer.load(folder)


def sample(text, written):
    tokens = np.array(text.encode(written), np.int32)
    zeros = np.zeros(len(tokens), np.float32)
    return Sample(
        tokens=tokens,
        logp=zeros,
        drawn=zeros == 0,
        finish="eos",
        num_think=len(tokens),
        versions=zeros.astype(np.int32),
    )


@pytest.mark.parametrize(
    ("written", "meta", "thinks", "said"),
    [
        (r"3 + 1</think> \boxed{4}", {"gold": "4"}, True, Verdict(1, "identical")),
        (r"3 + 1</think> \boxed{4}", {"gold": 4}, True, Verdict(1, "identical")),
        (r"\boxed{4}</think> \boxed{5}", {"gold": "4"}, True, Verdict(0, "another number")),
        (r"\boxed{4}</think> so", {"gold": "4"}, True, Verdict(0, "no answer")),
        (r"\boxed{4}", {"gold": "4"}, True, Verdict(0, "unclosed")),
        (r"a</think>\boxed{4}</think>", {"gold": "4"}, True, Verdict(0, "closed more than once")),
        (r"3 + 1 = 4. The answer is 4.", {"gold": "4"}, False, Verdict(1, "identical")),
        (r"</think>\boxed{1+x}", {"gold": "x+1"}, True, Verdict(1, "equal by algebra")),
        (
            r"</think>\boxed{1+x}",
            {"gold": "x+1", "question": "Sort $1 + x$."},
            True,
            Verdict(0, "restates the question"),
        ),
    ],
)
def test_the_reward_reads_what_follows_the_thought(grader, text, written, meta, thinks, said):
    reward = AnswerReward(text, grader, thinks=thinks)
    assert reward(Prompt(id="p", tokens=[1], meta=meta), sample(text, written)).result() == said
    assert set(reward.finish(0)) == {f"verify_{name}" for name in ("asked", "exact", "failed", "cached", "wait_s")}


@pytest.mark.parametrize(
    ("prompt", "written", "thinks", "said"),
    [
        ("Q?", "t</think> So \\boxed{4}\n\nQ: 1?\n\\boxed{5}", True, Verdict(1, "identical")),
        ("Q?", "t\n\nQ: 1?</think> \\boxed{4}", True, Verdict(1, "identical")),
        ("Q?", "\\boxed{4}\n\nQ: 1?\n\\boxed{5}", False, Verdict(1, "identical")),
        ("Q?", "<think>t\n\nQ: 1?</think>\\boxed{4}\n\nQ: 1?\n\\boxed{5}", False, Verdict(1, "identical")),
        ("Q?", "We add.\n\nQ: 1?\n\\boxed{4}", False, Verdict(0, "no answer")),
        ("Q? Answer:", " 4 apples, of course.", False, Verdict(1, "number")),
        ("Q? Answer:<think>", "t</think> 4 apples\nor so", True, Verdict(1, "number")),
        ("Q? Answer: yes. Q?", " 4 apples, of course.", False, Verdict(0, "no answer")),
    ],
)
def test_the_reward_reads_up_to_a_stop_text_and_knows_how_the_prompt_ends(grader, text, prompt, written, thinks, said):
    reward = AnswerReward(text, grader, thinks=thinks, stops=("\n\nQ:",))
    asked = Prompt(id="p", tokens=text.encode(prompt), meta={"gold": "4"})
    assert reward(asked, sample(text, written)).result() == said


@pytest.mark.parametrize("marked", [False, True])
def test_what_a_text_answers_is_what_it_votes_for(grader, marked):
    texts = {
        " 5": "5", " 5\n\nBecause 2+3=5.": "5", " B\n\nQuestion: 1?\nAnswer: C": "B", " (B)": "B",
        "t</think> 18\n\nQuestion: Tom has 3 pens. How many?\nAnswer: 3": "18",
        "\\boxed{18}\n\nProblem: Find 1+1.\n\nSolution: It is \\boxed{2}": "18",
    }  # fmt: skip
    for text, answer in texts.items():
        assert (grader.answer(text, marked), grader(text, answer, "", marked).result().value) == (answer, 1)
        assert grader(text, "3", "", marked).result().value == 0
    assert (grader.answer(" even\nfor sure", marked), grader.answer("t\n</think>", marked)) == (
        "even" if marked else None, None,
    )  # fmt: skip


def test_a_prompt_without_gold_answer_is_named(grader, text):
    for meta in ({}, {"gold": " "}):
        with pytest.raises(UserError, match="prompt p7: no gold"):
            AnswerReward(text, grader)(Prompt(id="p7", tokens=[1], meta=meta), sample(text, "</think>4"))
