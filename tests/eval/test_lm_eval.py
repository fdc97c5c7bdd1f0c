"""An export under lm-evaluation-harness: a local task gives the figure of our own evaluation."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import exit_code

from thinkmid.eval import run as evaluation
from thinkmid.train import sft

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed: requirements-lm-eval.txt"
)
PEOPLE = ["Ana", "Ben", "Cleo", "Dan", "Eva", "Finn"]
THINGS = ["coins", "cards", "pens", "cups"]
ROWS = [
    {"id": f"q{i}", "question": f"How many {thing} has {name}?", "answer": str(i * i % 83 + 10)}
    for i, (name, thing) in enumerate((name, thing) for name in PEOPLE for thing in THINGS)
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model that has learnt half of the answers by heart, and the questions."""
    folder = tmp_path_factory.mktemp("learnt")
    known = [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in ROWS[::2]]
    (folder / "known.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in known))
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    sizes = ["vocab=300", "width=32", "heads=2", "kv_heads=1", "head_dim=16", "ffn=64", "max_positions=128"]
    argv = [f"--run.folder={folder}/run", "--run.steps=150", f"--data.paths={folder}/known.jsonl"]
    argv += ["--data.batch_tokens=512", "--data.pack_tokens=512", "--data.max_len=64", "--optim.lr=2e-2"]
    assert exit_code(sft, [*argv, *(f"--fresh.{size}" for size in sizes)]) == 0
    return folder


def our_figure(world):
    argv = [f"--run.folder={world}/eval", f"--model.folder={world}/run/export", "--run.samples=1"]
    argv += [f"--data.sets=set:questions={world}/questions.jsonl", "--data.template=plain"]
    argv += [
        "--sampling.temperature=0",
        "--sampling.max_think=6",
        "--sampling.max_suffix=2",
        "--verify.kind=first-sentence",
    ]
    assert exit_code(evaluation, argv) == 0
    return json.loads((world / "eval/results.json").read_text())["sets"]["set"]["mean"]


# its command line, `lm_eval run --model hf --model_args pretrained=EXPORT --tasks TASK --include_path FOLDER`, indexes
# thousands of tasks first
HARNESS = """
import json, sys
import lm_eval
from lm_eval.tasks import TaskManager

export, tasks = sys.argv[1:]
manager = TaskManager(include_path=tasks, include_defaults=False)
args = f"pretrained={export},dtype=float32"
found = lm_eval.simple_evaluate(
    model="hf", model_args=args, tasks=["thinkmid_plain"], device="cpu", task_manager=manager, bootstrap_iters=0
)
texts = {sample["doc"]["id"]: sample["resps"][0][0] for sample in found["samples"]["thinkmid_plain"]}
print(json.dumps({"mean": found["results"]["thinkmid_plain"]["exact_match,first-number"], "texts": texts}))
"""


@needs_lm_eval
@pytest.mark.slow
def test_lm_evaluation_harness_gives_our_figure_on_a_local_task(world):
    command = [sys.executable, "-c", HARNESS, f"{world}/run/export", str(Path(__file__).with_name("lm_eval_tasks"))]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(world / "cache"), "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(command, cwd=world, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs, ours = json.loads(done.stdout.splitlines()[-1]), our_figure(world)
    assert 0.3 < ours < 0.9  # the half that was learnt, and not all
    assert theirs["mean"] == pytest.approx(ours, abs=1e-9)
    rows = [json.loads(line) for path in (world / "eval/generations").glob("*.jsonl") for line in path.open()]
    assert {row["id"]: row["text"] for row in rows} == theirs["texts"]
