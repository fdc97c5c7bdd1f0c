import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import misbehave
import pytest

from thinkmid import config
from thinkmid.augment import annotators, insert, prompts, split
from thinkmid.augment.config import share
from thinkmid.augment.shards import part_of
from thinkmid.data.source import read_documents
from thinkmid.errors import UserError
from thinkmid.mini import annotate
from thinkmid.tokenizer import Tokenizer

KINDS = ("heldout", "rl", "sft")


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    folder = tmp_path_factory.mktemp("big")
    misbehave.write_world(folder)
    return folder


@pytest.fixture(scope="module")
def asked(big):
    """Prompts of an undisturbed run over more than 10,000 chunks, which left its output in big/out."""
    asked = []
    write = lambda prompt: asked.append(prompt) or misbehave.reply(prompt)  # noqa: E731
    assert misbehave.annotated(misbehave.settings(big), write) == 0
    return asked


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    misbehave.write_world(folder, chars=60_000)
    return folder


@pytest.fixture
def small(made, tmp_path):
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


def rows(out, kind):
    files = sorted(Path(out).glob(f"*-{kind}/*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def files(out):
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(Path(out).glob("*-*/part-*.jsonl"))}


def chunks_of(folder, max_tokens=24):
    """{row id: chunk} straight from the corpus."""
    text = Tokenizer.load(folder / "tokenizer")
    documents = list(read_documents([folder / "corpus.jsonl"]))
    return {f"{doc.id}#{k}": c for doc in documents for k, c in enumerate(text.chunks(doc.text, max_tokens))}


def expected(chunk, retries):
    """Whether the script gives a usable answer within the tries, and the reason of none if not."""
    first = prompts.ask("plain", "insert", insert.show(chunk))
    prompt = first
    for _ in range(retries + 1):
        if misbehave.way(prompt) in misbehave.GOOD:
            return True
        out = annotators.by_model(
            chunk, annotators.AnnotatorConfig(retries=0), lambda p, at=prompt: misbehave.reply(at)
        )
        prompt = prompts.again(first, out.refused)
    return False


@pytest.mark.slow
def test_ten_thousand_chunks_and_an_annotator_that_misbehaves_in_25_ways_give_no_altered_chunk(big, asked):
    ways = Counter(map(misbehave.way, asked))
    assert len(misbehave.BAD) >= 20
    assert min(ways[way] for way in misbehave.WAYS) > 200
    chunks, woven, raw = chunks_of(big), rows(big / "out", "think"), rows(big / "out", "raw")
    report = json.loads((big / "out" / "report.json").read_text())
    assert report["chunks"] >= 10_000
    assert len(woven) == len(raw) == report["accepted"]
    for row, plain in zip(woven, raw, strict=True):
        bare = re.sub("<think>.*?</think>", "", row["text"], flags=re.DOTALL)
        assert row["id"] == plain["id"]
        assert bare == plain["text"] == chunks[row["id"]]
        # one thought, as the script wrote it, and nothing else between tags
        assert re.findall("<think>(.*?)</think>", row["text"], flags=re.DOTALL) == [misbehave.THOUGHT]
    assert sum(sizes["thoughts"] for sizes in report["splits"].values()) == len(woven)
    kept = {row["id"] for row in woven}
    listed = [json.loads(line) for line in (big / "out" / "split" / "documents.jsonl").read_text().splitlines()]
    out = {row["id"] for row in listed if "dropped" in row}
    sample = random.Random(0).sample([name for name in chunks if name.partition("#")[0] not in out], 500)
    assert all((name in kept) == bool(chunks[name].strip() and expected(chunks[name], 1)) for name in sample)
    assert report["accepted"] + report["refused"] == report["chunks"]
    assert sum(report["refused_by"].values()) == report["refused"]
    assert report["calls"] == len(asked)
    assert report["calls"] == report["chunks"] - report["refused_by"].get("blank", 0) + sum(
        report["retried_by"].values()
    )


def start(folder, out, calls, shard=""):
    command = [sys.executable, misbehave.__file__, str(folder), out, str(calls), shard]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


@pytest.mark.slow
def test_killed_again_and_again_it_loses_and_repeats_nothing(big, asked):
    work, calls, kills, rng = big / "killed", big / "calls.txt", 0, random.Random(1)

    def lines():
        return sum(path.read_bytes().count(b"\n") for path in (work / "journal").glob("*.jsonl"))

    while kills < 6:
        process = start(big, "killed", calls)
        wanted = lines() + rng.randrange(1, 2500)
        while process.poll() is None and lines() < wanted:
            time.sleep(0.01)
        assert process.poll() is None, process.stderr.read()
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert start(big, "killed", calls).wait() == 0
    assert files(work) == files(big / "out")
    journaled = [json.loads(line) for path in (work / "journal").glob("*.jsonl") for line in path.open()]
    assert set(Counter((row["key"], row["chunk"]) for row in journaled).values()) == {1}
    # a call is made again only if the kill came before its chunk was written down: 8 chunks in the pool, 2 tries each
    log = Counter(calls.read_text().split())
    assert log.keys() == {misbehave.name(prompt) for prompt in asked}
    assert 0 <= log.total() - len(asked) <= kills * 8 * 2


def test_jobs_side_by_side_give_the_files_of_one_job_and_another_number_may_go_on(small):
    misbehave.annotated(misbehave.settings(small, out="whole"), misbehave.reply)
    assert start(small, "out", small / "calls.txt", "1/2").wait() == 0
    assert not (small / "out" / "manifest.json").exists()
    jobs = [start(small, "out", small / "calls.txt", f"{i}/3") for i in range(3)]
    assert [job.wait() for job in jobs] == [0, 0, 0]
    assert files(small / "out") == files(small / "whole")
    one, three = (json.loads((small / out / "report.json").read_text()) for out in ("whole", "out"))
    for report in (one, three):
        del report["last_run"]
    assert one == three
    assert (small / "out" / "manifest.json").read_bytes() == (small / "whole" / "manifest.json").read_bytes()


def test_a_finished_run_asks_nothing_and_a_damaged_file_is_made_again_without_a_call(small):
    cfg = misbehave.settings(small)
    misbehave.annotated(cfg, misbehave.reply)
    before, victim = files(small / "out"), next((small / "out").glob("sft-think/*.jsonl"))

    def never(prompt):
        raise AssertionError("asked again")

    for spoil in (lambda: None, lambda: victim.write_text("{}"), victim.unlink):
        spoil()
        assert misbehave.annotated(cfg, never) == 0
        assert files(small / "out") == before


def test_documents_do_not_cross_splits_and_every_document_is_somewhere(small):
    misbehave.annotated(misbehave.settings(small), misbehave.reply)
    found = {
        kind: {
            json.loads(line)["id"].partition("#")[0]
            for f in (small / "out" / f"{kind}-raw").glob("*")
            for line in f.open()
        }
        for kind in KINDS
    }
    assert sum(map(len, found.values())) == len(set.union(*found.values()))
    listed = [json.loads(line) for line in (small / "out" / "split" / "documents.jsonl").read_text().splitlines()]
    for row in listed:
        assert all((row["id"] not in found[kind]) for kind in KINDS if kind != row["split"])
        assert not ("dropped" in row and row["id"] in found[row["split"]])


def test_tokens_are_counted_as_training_counts_them(small):
    from thinkmid.data.sequences import read_sequences

    misbehave.annotated(misbehave.settings(small), misbehave.reply)
    report = json.loads((small / "out" / "report.json").read_text())
    text = Tokenizer.load(small / "tokenizer")
    for kind in ("think", "raw"):
        sequences = read_sequences([str(small / "out" / f"sft-{kind}")], text, 4096)
        ends = len(sequences) * len(text.eos_ids[:1])
        sizes = report["splits"]["sft"]
        assert sum(len(tokens) for tokens, _ in sequences) - ends == sizes[f"{kind}_tokens"]
        if kind == "think":
            assert sum(int(thought.sum()) for _, thought in sequences) == sizes["thought_tokens"]


def test_the_annotated_rl_half_gives_prompts_whose_reference_is_the_raw_text(small):
    from thinkmid.data.prompts import at_thoughts

    misbehave.annotated(misbehave.settings(small), misbehave.reply)
    text = Tokenizer.load(small / "tokenizer")
    raw = {row["id"]: row["text"] for row in rows(small / "out", "raw")}
    found = list(at_thoughts(read_documents([small / "out" / "rl-think"]), text, max_prefix=4096))
    assert len(found) > 20
    for prompt in found:
        before = text.decode(prompt.tokens).removesuffix("<think>")
        assert before + prompt.meta["reference"] == raw[prompt.id.rpartition("#")[0]]


def call(capsys, *argv):
    with pytest.raises(SystemExit) as end:
        config.run(annotate.main, list(argv))
    out, err = capsys.readouterr()
    return end.value.code, out, err


@pytest.fixture
def mini(small, monkeypatch):
    monkeypatch.chdir(small)
    text = "Ana has 5 coins. On Monday Ana finds 3 more. Now Ana has 8 coins."
    odd = "Colourless ideas sleep."
    lines = [json.dumps({"id": f"d{i}", "text": t}) + "\n" for i, t in enumerate([text, odd, text])]
    Path("mini.jsonl").write_text("".join(lines))
    Path("a.toml").write_text(
        'run = {folder = "r", parts = 2}\ndata = {paths = ["mini.jsonl"]}\n'
        'chunks = {tokenizer = "tokenizer", max_tokens = 64}\nannotator = {kind = "rules"}\n'
        "split = {sft = 1.0, rl = 0.0, heldout = 0.0}\n"
    )
    return small


def test_the_program_annotates_by_rule_and_says_what_came_of_it(mini, capsys):
    code, out, err = call(capsys, "a.toml")
    assert (code, err) == (0, "")
    [row] = rows("r", "think")
    assert row["id"] == "d0#0"
    assert re.fullmatch("Ana has 5.*more.<think> .*8.*</think> Now Ana has 8 coins.", row["text"])
    assert "1 chunks accepted, 1 refused (too few thoughts 1)" in out
    listed = [json.loads(line) for line in Path("r/split/documents.jsonl").read_text().splitlines()]
    assert [row.get("dropped") for row in listed] == [None, None, "copy"]


def test_documents_left_out_are_counted_and_the_first_of_them_named_by_reason(mini, capsys):
    texts = [f"Ana has {n} coins. On Monday Ana finds 3 more. Now Ana has {n + 3} coins." for n in range(5, 9)]
    rows = [{"id": f"d{i}", "text": text} for i, text in enumerate([*texts, *texts, "So it goes. " * 3])]
    Path("mini.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("evals.jsonl").write_text(json.dumps({"text": rows[-1]["text"]}) + "\n")
    code, out, _ = call(capsys, "a.toml", "--split.evals", "evals.jsonl", "--split.eval_words", "1")
    assert code == 0
    assert "documents left out, copy: 4 (d4, d5, d6, ...)\n" in out
    assert "documents left out, evaluation: evals.jsonl: 1 (d8)\n" in out
    told = json.loads(Path("r/report.json").read_text())["left_out"]
    assert told == {
        "copy": {"count": 4, "first": ["d4", "d5", "d6"]},
        "evaluation: evals.jsonl": {"count": 1, "first": ["d8"]},
    }


def test_rules_are_of_the_miniature_world_alone(mini, capsys):
    from thinkmid.augment import annotate as product

    for program, flags, line in (
        (product, (), "annotator.kind 'rules' is for the miniature world: python -m thinkmid.mini.annotate"),
        (annotate, ("--annotator.kind", "engine", "--writer.folder", "x"), "annotator.kind must be 'rules' here"),
    ):
        with pytest.raises(SystemExit) as end:
            config.run(program.main, ["a.toml", *flags])
        assert end.value.code == 2
        assert capsys.readouterr().err.startswith(f"error: {line}")


def test_nothing_accepted_is_no_success_by_rule_either(mini, capsys):
    Path("mini.jsonl").write_text('{"text": "Colourless ideas sleep."}\n{"text": "They do so furiously."}\n')
    line = "error: r: none of 2 chunks accepted, most often: too few thoughts (2); the same command asks again\n"
    for _ in range(2):
        assert call(capsys, "a.toml")[::2] == (2, line)
    code, _, err = call(
        capsys, "a.toml", "--run.folder", "out", "--split.evals", "mini.jsonl", "--split.eval_words", "1"
    )
    assert code == 2
    assert err.startswith("error: out: none of 0 chunks accepted, their documents are left out")


def test_a_job_whose_chunks_are_all_refused_fails_the_run_only_where_no_other_has_accepted(mini, capsys):
    good = [f"Ana has {n} coins. On Monday Ana finds 3 more. Now Ana has {n + 3} coins." for n in range(1, 20)]
    odd = [f"Colourless ideas sleep {n}." for n in range(20)]
    texts = [next(t for t in of if part_of(split.key(t), 2) == part) for part, of in enumerate((good, odd))]
    Path("mini.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    codes = [call(capsys, "a.toml", "--shard", f"{i}/2")[0] for i in (1, 0)]
    told = json.loads(Path("r/report.json").read_text())
    assert (codes, told["accepted"], told["refused"]) == ([0, 0], 1, 1)


def test_documents_with_the_same_id_are_both_kept(mini, capsys):
    texts = [f"Ana has {n} coins. On Monday Ana finds 3 more. Now Ana has {n + 3} coins." for n in (5, 6)]
    Path("mini.jsonl").write_text("".join(json.dumps({"id": "same", "text": text}) + "\n" for text in texts))
    assert call(capsys, "a.toml")[0] == 0
    assert {row["text"] for row in rows("r", "raw")} == set(texts)


def test_torchrun_names_the_job_unless_the_flag_does(monkeypatch):
    assert share("") == (0, 1)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert share("") == (2, 4)
    assert share("0/3") == (0, 3)


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--annotator.kind", "openai"], "annotator.kind 'openai' needs endpoint.url"),
        (["--shard", "2/2"], "shard must be i/n with i in 0..n-1, got '2/2'"),
        (["--shard", "0/5"], "5 jobs for 2 parts: raise run.parts"),
        (
            ["--split.sft", "0.5"],
            "split: sft, rl, heldout and control must be 0 or more and sum to 1, got (0.5, 0.0, 0.0, 0.0)",
        ),
        (["--data.paths", "none.jsonl"], "none.jsonl: no such file or folder"),
        (["--chunks.tokenizer", "none"], "none/tokenizer.json: no such file"),
        (["--split.evals", "a.toml"], "a.toml: unknown kind of file"),
        (
            ["--split.evals", "tokenizer"],
            "tokenizer: no file to read (split.evals); tokenizer: 2 files left out: *.json",
        ),
        (
            ["--split.evals", "mini.jsonl", "--split.eval_fields", "question"],
            "mini.jsonl:1: none of question is a string",
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(mini, capsys, argv, line):
    code, _, err = call(capsys, "a.toml", *argv)
    assert code == 2
    assert err.startswith(f"error: {line}")
    assert err.count("\n") == 1


def test_files_of_a_folder_that_are_not_read_are_named_by_the_first_job(mini, capsys):
    Path("mixed").mkdir()
    Path("mini.jsonl").rename("mixed/mini.jsonl")
    Path("mixed/more.json.gz").touch()
    for shard, lines in (("0/2", 1), ("1/2", 0)):
        code, out, _ = call(capsys, "a.toml", "--data.paths", "mixed", "--shard", shard)
        assert (code, out.count("mixed: 1 file left out: *.json.gz (1)")) == (0, lines)


def test_a_folder_made_with_other_settings_or_data_is_refused(mini, capsys):
    assert call(capsys, "a.toml")[0] == 0
    code, _, err = call(capsys, "a.toml", "--chunks.max_tokens", "32")
    assert (code, err) == (2, "error: r: was begun with chunks.max_tokens = 64, now 32; name another run.folder\n")
    with open("mini.jsonl", "a") as file:
        file.write('{"text": "More."}\n')
    code, _, err = call(capsys, "a.toml")
    assert (code, err) == (
        2,
        "error: r/split was made with other settings or from other files; name another run.folder\n",
    )


@pytest.mark.parametrize("older", [{}, {"chunks.cut": 1}])
def test_a_run_whose_chunks_another_rule_cut_is_not_added_to(mini, capsys, older):
    """Journals name a chunk by its number: what one rule cut joins nothing that another did."""
    assert call(capsys, "a.toml")[0] == 0
    path = Path("r/made-of.json")
    told = json.loads(path.read_text())
    del told["chunks.cut"]
    path.write_text(json.dumps(told | older))
    line = "r: was begun by a version that cut documents into other chunks; name another run.folder"
    assert call(capsys, "a.toml")[::2] == (2, f"error: {line}\n")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000])
def test_a_damaged_record_of_settings_is_named(mini, capsys, text):
    assert call(capsys, "a.toml")[0] == 0
    Path("r/made-of.json").write_text(text)
    code, _, err = call(capsys, "a.toml")
    assert code == 2
    assert err.startswith("error: r/made-of.json: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("victim", "change"),
    [
        ("split/manifest.json", lambda d: d.pop("documents")),
        *[
            ("parts/part-0000.json", change)
            for change in (
                lambda d: d.update(files=3),
                lambda d: d["files"].update({"sft-think/part-0000.jsonl": None}),
                lambda d: d["counts"].update(calls="7"),
                lambda d: d["counts"].update(refused_by=[]),
                lambda d: d["splits"]["sft"].pop("rows"),
                lambda d: d.pop("control"),
            )
        ],
    ],
)
def test_a_damaged_record_of_what_is_done_is_made_again(mini, capsys, victim, change):
    assert call(capsys, "a.toml")[0] == 0
    path, before = Path("r", victim), files("r")
    whole, report = path.read_bytes(), json.loads(Path("r/report.json").read_text())
    change(record := json.loads(whole))
    path.write_text(json.dumps(record))
    assert call(capsys, "a.toml")[::2] == (0, "")
    assert (path.read_bytes(), files("r")) == (whole, before)
    assert json.loads(Path("r/report.json").read_text()) | {"last_run": 0} == report | {"last_run": 0}


def test_a_place_that_is_not_the_runs_is_refused_and_left_alone(mini, capsys):
    Path("theirs").mkdir()
    Path("theirs/config.toml").write_text("x")
    Path("file").touch()
    for folder, line in (("theirs", "holds the run of another program"), ("file", "cannot be written (File exists)")):
        code, _, err = call(capsys, "a.toml", f"--run.folder={folder}")
        assert (code, err.partition(";")[0].strip()) == (2, f"error: {folder}: {line}")
    assert [path.read_text() for path in Path("theirs").iterdir()] == ["x"]


def test_two_processes_cannot_write_one_part(small):
    cfg = misbehave.settings(small)
    inner = []

    def write(prompt):
        if not inner:
            inner.append(start(small, "out", small / "calls.txt"))
            inner[0].wait()
        return misbehave.reply(prompt)

    assert misbehave.annotated(cfg, write) == 0
    assert b"another process works on this part" in inner[0].stderr.read()


def test_what_nobody_answered_is_asked_again_and_its_calls_are_counted_once(small):
    cfg, down = misbehave.settings(small), [True]
    seen = Counter()

    def write(prompt):
        seen["calls"] += 1
        if down[0] and seen["calls"] % 5 == 0:
            raise annotators.Unanswered("HTTP 503")
        seen["answered"] += 1
        return misbehave.reply(prompt)

    with pytest.raises(UserError, match=r"HTTP 503 .*the same command resumes"):
        misbehave.annotated(cfg, write)
    part_way = json.loads((small / "out" / "report.json").read_text())
    assert part_way["finished"] == 0
    assert part_way["calls"] == seen["answered"]
    down[0] = False
    assert misbehave.annotated(cfg, write) == 0
    assert json.loads((small / "out" / "report.json").read_text())["calls"] == seen["answered"]
    misbehave.annotated(misbehave.settings(small, out="whole"), misbehave.reply)
    assert files(small / "out") == files(small / "whole")


def test_an_endpoint_that_is_gone_ends_the_run_early(small):
    calls = []

    def write(prompt):
        calls.append(prompt)
        raise annotators.Unanswered("timeout")

    with pytest.raises(UserError, match="timeout"):
        misbehave.annotated(misbehave.settings(small), write, workers=3)
    assert len(calls) < 40
