"""The report without a browser: its numbers are those of the runs, and a mistake is named in one line."""

import base64
import json
import re
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from report_runs import eval_run, jsonl, rl_run
from safetensors.numpy import save_file

from thinkmid.eval.stats import Estimate, average
from thinkmid.report import browse
from thinkmid.report.__main__ import main
from thinkmid.report.chain import Unknown, chain, cost

PAPER = tomllib.loads((Path(browse.__file__).parent / "paper.toml").read_text())
# the averages that tables 8 and 9 print
PRINTED = {
    8: [0.0475, 0.0999, 0.2221, 0.3348, 0.3390],
    9: [0.1197, 0.1645, 0.3480, 0.3346, 0.3663, 0.3693, 0.3569, 0.3785, 0.3837],
}


class Page(HTMLParser):
    """Tables as lists of rows of cell texts, and every attribute that names a place."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.places, self.cell = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.places += [(name, value) for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self.cell = tag

    def handle_endtag(self, tag):
        self.cell = None if tag == self.cell else self.cell

    def handle_data(self, data):
        if self.cell:
            self.rows[-1][-1] += data

    def row(self, name):
        return next(row for row in self.rows if row[0] == name)


def report(folder, *args):
    out = folder / "out" / "report.html"
    main([*map(str, args), "--out", str(out)])
    return Page(text := out.read_text()), text


def groups_of(text):
    return json.loads(re.search(r'id="samples">(.*?)</script>', text, re.S)[1])


def test_figures_of_the_paper_agree_with_its_printed_averages_and_numbers_of_samples():
    for t in PAPER["table"]:
        scores = np.array([row["scores"] for row in t["rows"]])
        assert scores.shape[1] == len(PAPER["benchmarks"]) == 5
        for column, samples in ((3, 640), (4, 3168)):  # 40 and 198 questions, 16 samples each
            shares = scores[:, column] * samples
            np.testing.assert_allclose(np.round(shares) / samples, scores[:, column], atol=5.1e-5)
        if t["number"] in PRINTED:
            np.testing.assert_allclose(scores.mean(1), PRINTED[t["number"]], atol=1.1e-4)


def test_tables_hold_the_numbers_of_results_json(tmp_path):
    sets = ("gsm8k", "math500", "olympiadbench", "amc23", "gpqa-diamond")
    run = eval_run(tmp_path / "eval", sets=sets)
    page, text = report(tmp_path, run)
    shown = page.row("gsm8k")
    assert shown[1:] == ["0.2500 0.150 to 0.400", "7 × 2", "12.5%", "50.0%", "25.0%", "6.2%", "321"]
    one = Estimate(mean=0.25, se=0.05, low=0.15, high=0.4, num_questions=7)
    whole = average([one] * 5)
    mean = f"{whole.mean:.4f} {whole.low:.3f} to {whole.high:.3f}"
    assert page.row("mean of the sets")[1] == mean
    assert page.row(f"ours: {run}")[2:] == ["0.2500 0.150 to 0.400"] * 5 + [mean]
    assert "temperature 0.6" in text
    assert "template as-is" in text


def test_a_model_after_rlpt_stands_in_the_table_of_those(tmp_path):
    rl_run(tmp_path / "rl" / "rlpt", "rlpt", start=tmp_path / "elsewhere")
    (tmp_path / "rl" / "rlpt" / "export").mkdir()
    (tmp_path / "elsewhere").mkdir()
    after = eval_run(tmp_path / "after", model=tmp_path / "rl" / "rlpt" / "export")
    before = eval_run(tmp_path / "before", model=tmp_path / "elsewhere")
    _, text = report(tmp_path, before, after)
    at = [text.index(words) for words in ("Table 8:", f"ours: {before}", "Table 9:", f"ours: {after}", "Table 10:")]
    assert at == sorted(at)


def test_the_sweep_is_read_in_both_its_layouts(tmp_path):
    means = dict(zip("012345", [0.2, 0.4, 0.6] * 2, strict=True))
    cells = {"mean": means, "sets": {"a": [1]}, "thinking": [10, 20, 30]}
    rows = {"base": {"before": cells, "after": {"mean": {"0": 0.5}}}, "control": {"before": cells}}
    for whole in (rows, {"seeds": [0, 1], "rows": rows, "differences": [{"mean": 1}]}):
        (tmp_path / "table.json").write_text(json.dumps(whole))
        page, _ = report(tmp_path, "--sweep", tmp_path / "table.json")
        by_seed = "0.200 0.400 0.600 0.200 0.400 0.600"
        # 0.4 +- 2.5706 * sqrt(4 * 0.04 / 5) / sqrt(6)
        assert page.rows[1] == ["base", "0.400 0.212 to 0.588", by_seed, "20", "0.500", "0.500", "–"]
        assert page.row("control")[4:] == ["–", "–", "–"]
        assert page.row("SFT(think) 10k + RLMT 5k")[1:] == ["0.3390", "0.3837"]


def test_a_sweeps_differences_and_replaced_thoughts_are_shown(tmp_path):
    cells = {"mean": {"0": 0.5, "1": 0.7}}
    gain = {"more": "B", "less": "A", "when": "before", "mean": 0.1, "low": -0.05, "high": 0.25, "each": [0.2, -0.1]}
    whole = {"rows": {"A": {"before": cells}}, "differences": [gain, gain | {"low": None, "high": None, "each": [0.1]}]}
    whole["thoughts"] = {"after SFT": {"own": [0.4, 0.6], "blank": [0.1]}}
    (tmp_path / "table.json").write_text(json.dumps(whole))
    page, _ = report(tmp_path, "--sweep", tmp_path / "table.json")
    shown = [row[1:] for row in page.rows if row[0].split() == ["B", "over", "A"]]
    assert shown == [["before", "+0.100", "-0.050 to +0.250", "1 of 2"], ["before", "+0.100", "one seed", "1 of 1"]]
    assert page.row("after SFT")[1:] == ["0.500", "0.100"]


def test_cost_adds_the_chain_of_runs_up_to_the_base_model(tmp_path):
    def made(name, rows, **config):
        jsonl(tmp_path / name / "metrics.jsonl", [{"step": i, **row} for i, row in enumerate(rows, 1)])
        words = "".join(f"[{key}]\n{value}\n" for key, value in config.items())
        (tmp_path / name / "config.toml").write_text(words)
        (tmp_path / name / "export").mkdir()
        save_file(
            {"a": np.zeros((3, 5), np.float32), "b": np.zeros(5)}, tmp_path / name / "export" / "model.safetensors"
        )
        return f"folder = {json.dumps(str(tmp_path / name / 'export'))}"

    base = made("base", [{"loss": 1, "tokens": 10**6}], model='folder = ""')
    sft = made("sft", [{"loss": 1, "tokens": 700}, {"loss": 1, "tokens": 300}], model=base)
    rl = {"reward": 0.5, "generated_tokens": 40, "trunk_tokens": 100}
    rlmt = made("rlmt", [rl, rl], model=sft, sampling="", judge="")
    made("rlpt", [rl], model=rlmt, sampling="", verify="")

    def cost_of(name):
        return cost(model := str(tmp_path / name / "export"), chain(model))

    found = {name: cost_of(name) for name in ("base", "sft", "rlmt", "rlpt")}
    assert {name: c.tokens for name, c in found.items()} == {"base": 0, "sft": 1000, "rlmt": 1080, "rlpt": 1080}
    weights = 20
    assert found["base"].flop == 0
    assert found["sft"].flop == 6 * weights * 1000
    assert found["rlmt"].flop - found["sft"].flop == pytest.approx(2 * (6 * weights * 100 + 2 * weights * 40))
    assert found["rlpt"].flop - found["rlmt"].flop == pytest.approx(6 * weights * 100 + 2 * weights * 40)
    jsonl(tmp_path / "sft" / "metrics.jsonl", [{"step": 1, "loss": 1}])
    with pytest.raises(Unknown, match="steps without tokens"):
        cost_of("rlpt")


def test_an_export_away_from_its_run_has_no_known_cost(tmp_path):
    rl_run(tmp_path / "rl", start=tmp_path / "base")
    for folder in (tmp_path / "base", tmp_path / "rl" / "export", tmp_path / "moved" / "export"):
        folder.mkdir(parents=True)
    for folder in (tmp_path / "rl" / "export", tmp_path / "moved" / "export"):
        (folder / "thinkmid.json").write_text("{}")
    assert [run.folder for run in chain(str(tmp_path / "rl" / "export"))] == [tmp_path / "rl"]
    assert chain(str(tmp_path / "base")) == []
    with pytest.raises(Unknown, match=f"{tmp_path / 'moved' / 'export'} was written by thinkmid, and the run"):
        chain(str(tmp_path / "moved" / "export"))


def test_hidden_characters_of_names_are_written_out(tmp_path):
    run = rl_run(tmp_path / "rl\u202e\u200b", start="from\u2066")
    page, text = report(tmp_path, run, eval_run(tmp_path / "eval", model="model\u202e", sets=("set\u202e",)))
    assert page.row(f"{tmp_path}/rl⟨U+202E⟩⟨U+200B⟩")[2] == "from⟨U+2066⟩"
    assert page.row("set⟨U+202E⟩")
    assert not re.findall("[\u202a-\u202e\u200b\u2066]", text)


def test_what_cannot_be_computed_is_said(tmp_path):
    run = eval_run(tmp_path / "eval", model=tmp_path / "gone")
    _, text = report(tmp_path, run)
    assert f"not shown: {run} (model folder {tmp_path / 'gone'} is not here)" in text


def test_the_page_names_no_place_outside_itself(tmp_path):
    page, text = report(tmp_path, rl_run(tmp_path / "rl"), eval_run(tmp_path / "eval"))
    assert {name for name, _ in page.places} == {"src", "href"}
    assert all(value.startswith(("data:", "#")) for _, value in page.places)
    assert not re.findall(r"url\(|@import|https?:|//[a-z]", re.sub(r"base64,[^\"]*", "", text))
    assert "default-src 'none'" in text


def tree(folder):
    return {path: path.is_file() and path.read_bytes() for path in sorted(folder.rglob("*"))}


def test_every_picture_is_in_the_page_and_beside_it_and_the_runs_are_only_read(tmp_path, capsys):
    runs = [rl_run(tmp_path / "a" / "rlmt"), rl_run(tmp_path / "b" / "rlmt"), rl_run(tmp_path / "rlpt", "rlpt", "x")]
    before = [tree(run) for run in runs]
    _, text = report(tmp_path, *runs)
    assert [tree(run) for run in runs] == before
    overlays = ["rlmt-reward.svg", "rlmt-thinking-length.svg", "rlpt-reward.svg"]
    own = [f"run-{n}-{panel}.svg" for n in (1, 2, 3) for panel in ("reward", "thinking-length")]
    beside = sorted((tmp_path / "out" / "report-svg").iterdir())
    assert [path.name for path in beside] == sorted(overlays + own)
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}/out/report-svg: 9 pictures", f"{tmp_path}/out/report.html",
    ]  # fmt: skip
    inside = re.findall(r"data:image/svg\+xml;base64,([^\"]*)", text)
    assert sorted(map(base64.b64decode, inside)) == sorted(path.read_bytes() for path in beside)


def test_a_picture_has_one_panel_as_wide_as_a_phone_and_a_line_through_all_its_points(tmp_path):
    report(tmp_path, rl_run(tmp_path / "rl", steps=30))
    for path in (tmp_path / "out" / "report-svg").iterdir():
        root = ElementTree.parse(path).getroot()
        assert float(root.get("width").removesuffix("pt")) <= 390 * 0.75  # CSS has 0.75 pt a pixel
        groups = [group.get("id", "") for group in root.iter("{http://www.w3.org/2000/svg}g")]
        assert sum(name.startswith("axes_") for name in groups) == 1
    rewards = ElementTree.parse(tmp_path / "out" / "report-svg" / "run-1-reward.svg")
    lines = [g for g in rewards.iter("{http://www.w3.org/2000/svg}g") if g.get("id", "").startswith("line2d")]
    dots = max(len(list(line.iter("{http://www.w3.org/2000/svg}use"))) for line in lines)
    assert dots == 30


def test_only_what_a_run_belongs_in_is_shown(tmp_path):
    _, text = report(tmp_path, rl_run(tmp_path / "rl"))
    assert not re.search("The paper|Table 8|post-training by|what it cost|Evaluations", text)
    _, text = report(tmp_path, eval_run(tmp_path / "own", sets=("own",)))
    assert "Table 8" not in text
    assert "Table 8" in report(tmp_path, eval_run(tmp_path / "gsm8k"))[1]


def test_one_model_is_no_point_to_compare(tmp_path):
    (tmp_path / "model").mkdir()
    run = eval_run(tmp_path / "eval", model=tmp_path / "model")
    assert "not shown: one model, so nothing to compare" in report(tmp_path, run)[1]
    rl = rl_run(tmp_path / "rl", start=tmp_path / "model")
    (rl / "export").mkdir()
    save_file({"a": np.zeros(3)}, rl / "export" / "model.safetensors")
    _, text = report(tmp_path, run, eval_run(tmp_path / "after", model=rl / "export"))
    assert "nothing to compare" not in text
    assert {"accuracy-tokens.svg", "accuracy-flop.svg"} == {
        path.name for path in (tmp_path / "out" / "report-svg").glob("accuracy-*")
    }


def test_a_folder_that_is_no_run_is_skipped_with_a_line(tmp_path, capsys):
    run = rl_run(tmp_path / "rl")
    (tmp_path / "notes").mkdir()
    page, _ = report(tmp_path, tmp_path / "notes", run)
    assert page.row(str(run))
    none = f"{tmp_path}/notes: no run: neither metrics.jsonl nor results.json, here or in its folders"
    assert capsys.readouterr().out.splitlines()[0] == none


@pytest.mark.parametrize("metrics", ["", '{"step": 1, "rew', '{"step": 1, "reward": null}\n'])
def test_a_run_without_steps_is_shown_as_one(tmp_path, metrics):
    run = rl_run(tmp_path / "rl", rollouts=False)
    (run / "metrics.jsonl").write_text(metrics)
    page, text = report(tmp_path, run)
    assert page.row(str(run))[3] == ("1" if "null" in metrics else "no steps yet")
    assert f"{run}: no rollouts kept" in text


def test_values_that_nobody_logged_break_no_page(tmp_path):
    rl, long = rl_run(tmp_path / "rl", start="x" * 5000), "x" * 5000
    with open(rl / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps({"step": s, "reward": r}) + "\n" for s, r in ((10**400, 0.3), (4, 10**400)))
    own = eval_run(tmp_path / "eval", model=long, sets=("own",), config=f'[data]\nsets = ["own:questions={long}"]\n')
    with open(own / "graded" / "own.jsonl", "a") as file:
        file.write(json.dumps({"question": "q9", "sample": []}) + "\n")
    results = json.loads((own / "results.json").read_text())
    results["sets"] |= {"huge": {"mean": 10**400}, "../own": {}, "*": {}, long: {}}
    (own / "results.json").write_text(json.dumps(results))
    page, text = report(tmp_path, rl, own)
    assert page.row(str(rl))[3:5] == ["4", "reward 0.100 → 0.300"]
    assert page.row("huge")[1] == "–"
    assert [s["reward"] for s in groups_of(text)[-1]["samples"]] == [1, 0]


def test_a_torn_last_row_is_left_out(tmp_path):
    run = rl_run(tmp_path / "rl")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "rew')
    page, _ = report(tmp_path, run)
    assert page.row(str(run))[3:5] == ["3", "reward 0.100 → 0.300"]


def test_a_spread_of_groups_is_embedded_and_what_it_leaves_out_is_said(tmp_path):
    run = rl_run(tmp_path / "rl", steps=9, groups=10)
    _, text = report(tmp_path, run, "--samples", "12")
    groups = groups_of(text)
    assert [g["where"] for g in groups] == ["step 1"] * 4 + ["step 5"] * 4 + ["step 9"] * 4
    assert [g["id"] for g in groups[:4]] == ["p1-0", "p1-3", "p1-6", "p1-9"]
    assert f"{run}: 12 of 30 groups of 3 of 9 steps, evenly spaced" in text
    assert groups_of(report(tmp_path, run, "--samples", "0")[1]) == []


@pytest.mark.parametrize("num", [1, 2, 7, 60])
def test_a_spread_has_its_ends_and_no_item_twice(num):
    for count in range(1, 70):
        found = browse.spread(list(range(num)), count)
        assert len(set(found)) == len(found) == min(num, count)
        assert found[0] == 0
        assert count == 1 or found[-1] == num - 1


def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    jsonl(path, [{"id": f"q{i}", "question": f"What is {i}?", "answer": str(i)} for i in range(3)])
    return path


def test_generations_stand_with_question_gold_and_grade(tmp_path):
    config = f'[data]\nsets = ["own:questions={questions(tmp_path)}"]\n'
    _, text = report(tmp_path, eval_run(tmp_path / "eval", sets=("own",), config=config))
    group = groups_of(text)[1]
    assert (group["id"], group["prompt"], group["gold"]) == ("q1", "What is 1?", "1")
    assert [(s["thought"], s["text"], s["reward"]) for s in group["samples"]] == [("hm", " 4", 1), ("hm", " 4", 0)]


@pytest.mark.parametrize("name", ["gpqa-diamond", "science"])
def test_texts_of_gpqa_are_withheld_unless_asked_for(tmp_path, name):
    config = f'[data]\nsets = ["{name}:gpqa-diamond={tmp_path / "secret.csv"}"]\n'
    run = eval_run(tmp_path / "eval", sets=(name,), text="SECRET</think> SECRET", config=config)
    rl = rl_run(tmp_path / "rl", "rlpt", text="SECRET", prompt="SECRET", prompt_id="gpqa-diamond-1234")
    _, text = report(tmp_path, run, rl)
    assert "SECRET" not in text
    assert "texts withheld" in text
    assert "SECRET" in report(tmp_path, run, rl, "--show-gpqa")[1]


def test_a_folder_stands_for_the_runs_in_it(tmp_path):
    rl_run(tmp_path / "seed-0" / "rlmt")
    eval_run(tmp_path / "seed-0" / "eval" / "rlmt")
    (tmp_path / "seed-0" / "data").mkdir()
    page, text = report(tmp_path, tmp_path / "seed-0")
    assert page.row(str(tmp_path / "seed-0" / "rlmt"))
    assert f"<h3>{tmp_path}/seed-0/eval/rlmt</h3>" in text


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda run: None, "{run}: no such folder"),
        (lambda run: run.mkdir(), "{run}: no run: neither metrics.jsonl nor results.json, here or in its folders"),
        (lambda run: jsonl(run / "metrics.jsonl", [[1], [2]]), "{run}/metrics.jsonl:1: not a JSON object"),
        (lambda run: jsonl(run / "results.json", [{"sets": 3}]), "{run}/results.json: no table 'sets'"),
        (lambda run: jsonl(run / "results.json", [[3]]), "{run}/results.json: not a JSON object"),
        (
            lambda run: (rl_run(run) / "config.toml").write_text("x"),
            "{run}/config.toml: cannot read it: Expected '=' after a key in a key/value pair (at end of document)",
        ),
        (
            lambda run: jsonl(eval_run(run) / "generations" / "gsm8k-001.jsonl", [{"text": "x"}]),
            "{run}/generations/gsm8k-001.jsonl:1: 'id' is missing or not of its kind",
        ),
    ],
)
def test_a_mistake_earns_one_line_and_exit_code_2(tmp_path, make, complaint):
    make(tmp_path / "run")
    command = [sys.executable, "-m", "thinkmid.report", tmp_path / "run", "--out", tmp_path / "report.html"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stderr == f"error: {complaint.format(run=tmp_path / 'run')}\n"
    assert done.returncode == 2
    assert not (tmp_path / "report.html").exists()
