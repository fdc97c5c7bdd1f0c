"""Kill a small run again and again: in the end its files are those of a run that nobody touched.

python tests/helpers/drill.py --kills 30
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

STEPS = 8
BASE = """
run = {folder = "base", steps = 60}
fresh = {vocab = 301, width = 16, heads = 2, kv_heads = 1, head_dim = 8, ffn = 32, max_positions = 64, tags = "plain"}
data = {paths = ["think.jsonl"], batch_tokens = 512, pack_tokens = 512, max_len = 64}
optim = {lr = 2e-2}
"""
RLMT = """
run = {folder = "run", steps = 8, save_every = 2}
model = {folder = "base/export"}
data = {paths = ["think.jsonl"]}
sampling = {max_think = 24, max_suffix = 8, force_close = true}
batch = {prompts = 5, siblings = 4, pack_tokens = 256}
judge = {overlap = 0.3}
loss = {denom = 32}
optim = {lr = 3e-3}
"""  # five prompts and 301 rows of the embedding: no two ranks get the same share


def write_world(folder: Path) -> None:
    """A corpus whose thoughts decide the next word, and the configs of a base and of a run on it."""
    folder.mkdir(parents=True, exist_ok=True)
    answers = ["No, even", "Yes it is"]
    texts = [f"Is {n} odd? <think>{n % 2}</think>{answers[n % 2]}. Go on.\n" for n in range(10, 50)]
    (folder / "think.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "base.toml").write_text(BASE)
    (folder / "rlmt.toml").write_text(RLMT)


def launch(program, argv: list[str], ranks: int = 1) -> list[int]:
    """Process ids of a program's ranks, forked from here, where torch is already imported: a start takes no seconds."""
    store = tempfile.mktemp()
    return [_fork(program, argv, rank, ranks, store) for rank in range(ranks)]


def _fork(program, argv, rank, ranks, store) -> int:
    if pid := os.fork():
        return pid
    import torch.distributed as dist

    from thinkmid import config

    code = 1
    try:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
        log = os.open("out.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
        config.run(program, argv)
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.stdout.flush()
        os._exit(code)  # a fork of ours must not return into the caller's


def finish(pids: list[int]) -> set[int]:
    """Exit codes once all have ended; a signal's number is negative."""
    return {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids}


def num_steps(folder: str) -> int:
    path = Path(folder, "metrics.jsonl")
    return path.read_bytes().count(b"\n") if path.exists() else 0


def saved(folder: str) -> list[str]:
    return sorted(path.name for path in Path(folder, "checkpoints").glob("*"))


def kill(pids: list[int], folder: str, rng: random.Random, last: int) -> dict:
    """SIGKILL, while the run starts or some steps later, to one rank and soon after to the others."""
    began, start = time.perf_counter(), num_steps(folder)
    goal = min(start + rng.choice([0, 1, 2, 3]), last - 2)
    while goal > start and num_steps(folder) < goal and time.perf_counter() - began < 60:
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.6 if goal <= start else 0.1))
    rng.shuffle(pids)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        time.sleep(rng.choice([0, 0.05]))
    codes = finish(pids)
    after_s = round(time.perf_counter() - began, 2)
    return {"after_s": after_s, "steps": num_steps(folder), "saved": saved(folder), "codes": [*codes]}


def differences(ours: str, theirs: str) -> list[str]:
    """Names of what two runs left that is not the same, bit by bit; clocks aside."""
    a, b = Path(ours), Path(theirs)
    names = sorted({p.relative_to(x) for x in (a, b) for d in ("rollouts", "export") for p in (x / d).glob("*")})
    found = [str(n) for n in names if _bytes(a / n) != _bytes(b / n)]
    return found + (["metrics.jsonl"] if _metrics(a) != _metrics(b) else [])


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def _metrics(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.endswith("_s")} for row in rows]


def killed_run(rlmt, kills: int, seed: int) -> dict:
    """Two ranks, killed `kills` times; compared with two ranks left alone."""
    steps = max(STEPS, 2 * kills)
    argv = ["rlmt.toml", f"--run.steps={steps}", "--run.folder"]
    assert finish(launch(rlmt, [*argv, "whole"], 2)) == {0}
    rng = random.Random(seed)
    table = [kill(launch(rlmt, [*argv, "killed"], 2), "killed", rng, steps) for _ in range(kills)]
    codes = finish(launch(rlmt, [*argv, "killed"], 2))
    rewards = [row["reward"] for row in _metrics(Path("whole"))]
    return {"codes": [*codes], "differences": differences("killed", "whole"), "kills": table, "rewards": rewards}


def stopped_run(rlmt) -> dict:
    """Two ranks, of which one gets SIGTERM after a few steps; without other checkpoints than the one that makes."""
    argv = ["rlmt.toml", "--run.steps=16", "--run.save_every=0", "--run.folder"]
    assert finish(launch(rlmt, [*argv, "alone"], 2)) == {0}
    pids = launch(rlmt, [*argv, "stopped"], 2)
    while num_steps("stopped") < 2:
        time.sleep(0.002)
    os.kill(pids[1], signal.SIGTERM)
    row = {"stopped": [*finish(pids)], "steps": num_steps("stopped"), "saved": saved("stopped")}
    row["codes"] = [*finish(launch(rlmt, [*argv, "stopped"], 2))]
    return row | {"differences": differences("stopped", "alone")}


def stopped_in_mid_step(main, argv: list[str], losses, loss: str) -> dict:
    """Two ranks, of which one gets two signals while it works on the second pack of the third step."""
    argv, folder = [*argv, "--run.save_every=0", "--run.folder"], argv[0].removesuffix(".toml") + "-mid-step"
    assert finish(launch(main, [*argv, f"{folder}-alone"], 2)) == {0}
    calls, work = [], getattr(losses, loss)

    def signalled(*args, **options):
        calls.append(num_steps(folder))
        if calls.count(2) == 2 and calls[-1] == 2 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGINT)
        return work(*args, **options)

    setattr(losses, loss, signalled)  # the ranks are forks
    row = {"stopped": [*finish(launch(main, [*argv, folder], 2))], "steps": num_steps(folder), "saved": saved(folder)}
    setattr(losses, loss, work)
    row["codes"] = [*finish(launch(main, [*argv, folder], 2))]
    return row | {"differences": differences(folder, f"{folder}-alone")}


def spoilt(main, argv: list[str], steps, alone: str) -> dict:
    """Two ranks, of which one has a weight that is not a number after the third update; the same command again."""
    folder, work, calls = f"{argv[0].removesuffix('.toml')}-spoilt", steps.train_step, []
    argv = [*argv, "--run.save_every=1", "--run.keep=1", "--run.folder", folder]

    def spoils(model, optimizer, *args, **options):
        stats = work(model, optimizer, *args, **options)
        calls.append(None)
        if len(calls) == 3 and os.environ["RANK"] == "1":
            optimizer.param_groups[0]["params"][0].detach().to_local()[-1, -1] = float("nan")
        return stats

    steps.train_step = spoils  # the ranks are forks
    row = {"spoilt": [*finish(launch(main, argv, 2))], "saved": saved(folder)}
    steps.train_step = work
    row["said"] = [line for line in Path("out.txt").read_text().splitlines() if line.startswith("error")][-2:]
    row["codes"] = [*finish(launch(main, argv, 2))]
    told = {"export/README.md", "export/stages.json"}  # the card holds run.save_every, which is another here
    return row | {"differences": [name for name in differences(folder, alone) if name not in told]}


def fewer_ranks(rlmt) -> dict:
    """Four steps on two ranks, the rest on one."""
    argv = ["rlmt.toml", "--run.folder", "fewer"]
    codes = finish(launch(rlmt, [*argv, "--run.steps=4"], 2)) | finish(launch(rlmt, argv, 1))
    assert finish(launch(rlmt, ["rlmt.toml", "--run.folder", "never"], 2)) == {0}
    prompts = [[row["prompt_id"] for row in _rollouts(folder, 5)] for folder in ("fewer", "never")]
    steps = [row["step"] for row in _metrics(Path("fewer"))]
    early = _metrics(Path("fewer"))[:4] == _metrics(Path("never"))[:4]
    return {"codes": [*codes], "steps": steps, "same_before": early, "same_prompts_after": prompts[0] == prompts[1]}


def damaged_model(rlmt) -> dict:
    """A bit flipped in a file whose hash one of two ranks compares."""
    shutil.copytree("base/export", "flipped")
    content = bytearray(Path("flipped/model.safetensors").read_bytes())
    content[-3] ^= 64
    Path("flipped/model.safetensors").write_bytes(content)
    codes = finish(launch(rlmt, ["rlmt.toml", "--model.folder=flipped", "--run.folder=refused"], 2))
    said = [line for line in Path("out.txt").read_text().splitlines() if line.startswith("error") and "flipped" in line]
    return {
        "codes": [*codes],
        "said": sorted(said),
        "wrote": sorted(path.name for path in Path("refused").glob("[!.]*")),
    }


def adapters_run(rlmt) -> dict:
    """Two ranks that train adapters, killed after the third step; then the same with other weights in its base."""
    argv = ["rlmt.toml", "--model.lora_rank=3", "--engine.check_every=1", "--run.folder"]
    assert finish(launch(rlmt, [*argv, "adapters"], 2)) == {0}
    pids = launch(rlmt, [*argv, "adapters-killed"], 2)
    while num_steps("adapters-killed") < 3:
        time.sleep(0.002)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    row = {"killed": [*finish(pids)], "left": saved("adapters-killed")}
    row["codes"] = [*finish(launch(rlmt, [*argv, "adapters-killed"], 2))]
    row["differences"] = differences("adapters-killed", "adapters")
    manifest = json.loads(Path("adapters/checkpoints/step-000008/manifest.json").read_text())
    row["saved"] = sorted(manifest["tensors"])
    row["moved"] = same_elsewhere(rlmt, argv)
    shutil.rmtree("base/export")
    shutil.copytree("whole/export", "base/export")
    row["other"] = [*finish(launch(rlmt, [*argv, "adapters-killed"], 2))]
    row["said"] = [line for line in Path("out.txt").read_text().splitlines() if line.startswith("error")][-2:]
    return row


def same_elsewhere(rlmt, argv: list[str]) -> list[int]:
    """The base at another place is the same base."""
    shutil.copytree("base/export", "moved")
    return [*finish(launch(rlmt, [*argv, "adapters", "--model.folder=moved"], 2))]


def _rollouts(folder: str, step: int) -> list[dict]:
    return [json.loads(line) for line in Path(folder, f"rollouts/step-{step:06d}.jsonl").read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", default="", help="where results.json and the runs go (default: a temporary one)")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    os.chdir(args.folder or tempfile.mkdtemp())
    # once, for every fork; torch._dynamo is what an optimiser imports at its first step
    import torch._dynamo  # noqa: F401

    from thinkmid.rollout.engine import native  # noqa: F401
    from thinkmid.train import rl, rlmt, sft, supervised

    write_world(Path())
    assert finish(launch(sft.main, ["base.toml"])) == {0}
    results = {"killed": killed_run(rlmt.main, args.kills, args.seed), "stopped": stopped_run(rlmt.main)}
    packs = ["--run.steps=4", "--batch.pack_tokens=64", "--loss.entropy=0.01"]  # no group is dead
    results["rlmt"] = stopped_in_mid_step(rlmt.main, ["rlmt.toml", *packs], rl, "policy_loss")
    results["spoilt rlmt"] = spoilt(rlmt.main, ["rlmt.toml", *packs], rl, "rlmt-mid-step-alone")
    packs = ["--run.steps=4", "--data.pack_tokens=64"]
    results["sft"] = stopped_in_mid_step(sft.main, ["base.toml", *packs], supervised, "text_loss")
    results["spoilt sft"] = spoilt(sft.main, ["base.toml", *packs], supervised, "base-mid-step-alone")
    results |= {"fewer": fewer_ranks(rlmt.main), "damaged": damaged_model(rlmt.main)}
    results["adapters"] = adapters_run(rlmt.main)
    Path("results.json").write_text(json.dumps(results))
    for number, row in enumerate(results["killed"].pop("kills"), start=1):
        print(f"kill {number:2d} {row['after_s']:5.2f} s, {row['steps']:2d} steps logged, {' '.join(row['saved'])}")
    for name, result in results.items():
        print(name, json.dumps(result))


if __name__ == "__main__":
    main()
