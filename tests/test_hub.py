"""thinkmid.hub against a Hub on this machine: names become folders and files at a commit, or one line says why not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest_plugins = ["fake_hub"]  # web
datasets = pytest.importorskip("datasets")
huggingface_hub = pytest.importorskip("huggingface_hub")

from huggingface_hub import constants  # noqa: E402

from thinkmid import config, hub  # noqa: E402
from thinkmid.data import source  # noqa: E402
from thinkmid.data.source import read_documents  # noqa: E402
from thinkmid.errors import UserError  # noqa: E402
from thinkmid.eval.config import EvalConfig, load_sets  # noqa: E402
from thinkmid.train import config as train  # noqa: E402

KEPT = (
    *("README.md", "LICENSE.txt"),  # of a card's licence
    *("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "model.safetensors"),
)
MODEL = {name: f"of {name}" for name in (*KEPT, "pytorch_model.bin", "onnx/config.json", "modeling.py", "x/README.md")}
ROWS = [{"id": f"r{n}", "text": f"text {n}", "question": f"{n}?", "answer": str(n)} for n in range(6)]


def jsonl(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def unplug(web, monkeypatch, how="refused"):
    """No network from here on."""
    if how == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        web.close()


def files(folder: str) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()}


def refused(call, *args, **kwargs) -> str:
    with pytest.raises(UserError) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


# Models


@pytest.mark.parametrize("name", ["org/name", "hf://org/name", "org/name@v1", "hf://org/name@v1"])
def test_a_model_is_its_snapshot_without_pickles_and_code(web, name):
    commit = web.repo("org/name").push(MODEL, "v1")
    web.repo("org/name").refs["main"] = commit
    found = hub.model(name)
    assert files(found) == {*KEPT} == web.files_asked()
    assert all(Path(found, name).read_text() == f"of {name}" for name in KEPT)
    assert (found.asked, found.pinned, Path(found).name) == (name, f"org/name@{commit}", commit)


def test_weights_are_those_that_the_index_names(web):
    index = {
        "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "../out", "d": "*", "e": "x.bin"}
    }
    parts = {f"model-{n}.safetensors": bytes([n]) for n in (1, 2)}
    others = {"x.bin": b"pickle", "consolidated.safetensors": b"the same again", "config.json": "{}"}
    web.repo("org/name").push({**parts, **others, "model.safetensors.index.json": json.dumps(index)})
    found = hub.model("org/name")
    assert files(found) == {*parts, "config.json", "model.safetensors.index.json"}


def test_without_weights_none_are_asked_for(web):
    web.repo("org/name").push(MODEL)
    assert "model.safetensors" not in files(hub.model("org/name", weights=False))
    assert "model.safetensors" not in web.files_asked()
    assert "model.safetensors" in files(hub.model("org/name"))


@pytest.mark.parametrize(
    ("file", "why"),
    [
        ("pytorch_model.bin", "no model.safetensors; pytorch_model.bin is not read: unpickling runs code"),
        ("q8.gguf", "no model.safetensors; q8.gguf is not read: python -m thinkmid.model.gguf makes a folder of it"),
        ("x.msgpack", "no model.safetensors; the repository holds config.json, x.msgpack"),
    ],
)
def test_weights_that_are_not_read_are_named(web, file, why):
    web.repo("org/name").push({"config.json": "{}", file: "x"})
    assert refused(hub.model, "org/name") == f"org/name: {why}"
    assert file not in web.files_asked()


def test_what_is_no_model_says_so(web):
    web.repo("org/name").push({"a.txt": "x"})
    assert refused(hub.model, "org/name") == "org/name: no config.json; the repository holds a.txt"
    for name, why in {
        "hf://datasets/org/name": "names a dataset; a model is hf://ORG/NAME",
        "hf://org/name/sub": "a model is a whole repository: hf://ORG/NAME[@REVISION]",
        "hf://name": "Invalid HF URI 'hf://name'. Repository id must be 'namespace/name', got 'name'.",
    }.items():
        assert refused(hub.model, name) == f"{name}: {why}"


def test_a_folder_wins_over_a_name(web):
    web.repo("org/name").push(MODEL)
    Path("org/name").mkdir(parents=True)
    assert hub.model("org/name") == "org/name"
    assert web.asked == []
    assert isinstance(hub.model("hf://org/name"), hub.Snapshot)


@pytest.mark.parametrize(
    "text", ["", "name", "runs/sft/exprot", "models/x", "./org/name", "./name", "../name", "/o/n", "~/name"]
)
def test_what_cannot_be_a_name_is_left_to_be_a_folder(web, text):
    assert hub.model(text) is text
    assert web.asked == []


def test_a_mistyped_folder_is_no_name(web):
    Path("runs/sft").mkdir(parents=True)
    want = "runs/stf: no such folder in runs; for the model of this name on the Hub: hf://runs/stf"
    assert refused(hub.model, "runs/stf") == want
    assert web.asked == []


def test_a_name_that_is_neither_says_both(web):
    reason = "no such repository, or a private one; HF_TOKEN holds your token"
    assert refused(hub.model, "org/nmae") == f"org/nmae: no such folder; on the Hub: {reason}"
    assert refused(hub.model, "hf://org/nmae") == f"hf://org/nmae: {reason}"


@pytest.mark.parametrize("access", ["gated", "private"])
def test_a_token_opens_what_is_closed(web, monkeypatch, access):
    web.repo("org/name").push(MODEL)
    web.repo("org/name").access, web.repo("org/name").token = access, "hf_secret"
    why = {
        "gated": "access is gated: ask for it on the repository's page",
        "private": "no such repository, or a private one",
    }[access]
    assert refused(hub.model, "hf://org/name") == f"hf://org/name: {why}; HF_TOKEN holds your token"
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert "model.safetensors" in files(hub.model("org/name"))


def test_a_revision_that_is_not_there_is_named(web):
    web.repo("org/name").push(MODEL)
    for revision in ("v9", "0" * 40):
        assert refused(hub.model, f"hf://org/name@{revision}") == f"hf://org/name@{revision}: no such revision"


@pytest.mark.parametrize("how", ["refused", "offline"])
def test_without_network_the_cache_serves_or_one_line_says_so_at_once(web, monkeypatch, how):
    commit = web.repo("org/name").push(MODEL)
    first = hub.model("org/name")
    unplug(web, monkeypatch, how)
    began = time.monotonic()
    assert hub.model("org/name") == hub.model(f"org/name@{commit}") == first
    why = "HF_HUB_OFFLINE is set" if how == "offline" else "the Hub cannot be reached ([Errno 111] Connection refused)"
    for name in ("org/other", "hf://org/name@v2", f"hf://org/other@{commit}"):
        said = refused(hub.model, name)
        assert said.startswith(name)
        assert said.endswith(f"not in the cache, and {why}")
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("how", ["refused", "offline"])
def test_what_another_program_left_in_the_cache_serves_too(web, monkeypatch, how):
    web.repo("org/name").push(MODEL)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        huggingface_hub.hf_hub_download("org/name", name)  # file by file: without a list of what there is
    unplug(web, monkeypatch, how)
    assert {"config.json", "tokenizer.json", "model.safetensors"} == files(hub.model("org/name"))


def test_half_a_snapshot_and_no_network_is_one_line(web, monkeypatch):
    web.repo("org/name").push(MODEL)
    hub.model("org/name", weights=False)
    unplug(web, monkeypatch)
    assert refused(hub.model, "hf://org/name").startswith("hf://org/name: not in the cache, and ")


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        (500, "the Hub answers 500"),
        (429, "the Hub answers 429"),
        ("slow", "not in the cache, and the Hub cannot be reached (timed out)"),
    ],
)
def test_a_server_that_fails_or_is_silent_is_one_line_soon_and_the_cache_serves(web, monkeypatch, fault, why):
    web.repo("org/name").push(MODEL)
    monkeypatch.setattr(hub, "TIMEOUT_S", 0.5)
    web.faults["/api/"] = fault
    began = time.monotonic()
    assert refused(hub.model, "hf://org/name") == f"hf://org/name: {why}"
    web.faults.clear()
    first = hub.model("org/name")
    web.faults["/api/"] = fault
    if fault != 429:
        assert hub.model("org/name") == first
    assert hub.model(first.pinned) == first
    assert time.monotonic() - began < 5


def test_bytes_that_end_early_are_noticed_and_fetched_again(web, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda s: None)  # between the library's tries
    web.repo("org/name").push(MODEL | {"model.safetensors": b"0123456789" * 1000})
    web.faults["/cdn/"] = "cut"
    said = refused(hub.model, "hf://org/name")
    assert said.startswith("hf://org/name: ")
    assert not list(Path(constants.HF_HUB_CACHE).rglob("model.safetensors"))
    web.faults.clear()
    assert Path(hub.model("org/name"), "model.safetensors").read_bytes() == b"0123456789" * 1000


def test_a_full_disk_is_one_line(web, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", "/cache/x")

    web.repo("org/name").push(MODEL)
    monkeypatch.setattr(huggingface_hub.file_download, "http_get", full)
    assert refused(hub.model, "hf://org/name") == "hf://org/name: No space left on device (/cache/x)"


def test_a_missing_library_is_named_with_its_remedy(web, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    said = "huggingface_hub is not installed; pip install thinkmid[hub]"
    assert refused(hub.model, "org/name") == f"org/name: no such folder; on the Hub: {said}"
    assert refused(hub.data, "hf://datasets/org/name/a.txt") == f"hf://datasets/org/name/a.txt: {said}"


# Data


def texts(*paths: str) -> list[str]:
    return [document.text for document in read_documents([path for name in paths for path in hub.data(name)])]


@pytest.fixture
def corpus(web):
    """A data set of two configs and two splits, with files that are no data."""
    push_set(web, ROWS)
    return web


def push_set(web, rows):
    parts = {
        f"{config}/{split}-{n}.jsonl": jsonl(rows[2 * n : 2 * n + 2])
        for config in ("main", "extra")
        for split, shards in (("train", 2), ("test", 1))
        for n in range(shards)
    }
    card = (
        "---\nconfigs:\n"
        + "".join(
            f"- config_name: {config}\n  data_files:\n  - {{split: train, path: {config}/train-*}}\n"
            f"  - {{split: test, path: {config}/test-*}}\n"
            for config in ("main", "extra")
        )
        + "---\n# A card\n"
    )
    web.repo("org/set", "datasets").push({**parts, "README.md": card, "load.py": "raise", "x.pkl": "x", "i.png": "x"})


def test_a_path_in_a_data_set_is_a_file_a_folder_or_what_a_star_matches(corpus):
    assert texts("hf://datasets/org/set/main/train-1.jsonl") == ["text 2", "text 3"]
    assert texts("hf://datasets/org/set/main") == ["text 0", "text 1", "text 0", "text 1", "text 2", "text 3"]
    assert texts("hf://datasets/org/set/main/train-*.jsonl") == ["text 0", "text 1", "text 2", "text 3"]
    assert corpus.files_asked() <= {"train-0.jsonl", "train-1.jsonl", "test-0.jsonl"}
    name = "hf://datasets/org/set/main/trian-*"
    assert refused(hub.data, name).startswith(f"{name}: no data at main/trian-*; the repository holds main/train-0")
    assert "no data at ../x" in refused(hub.data, "hf://datasets/org/set/../x")
    assert "no data at x.pkl" in refused(hub.data, "hf://datasets/org/set/x.pkl")


def test_local_paths_are_left_alone(corpus):
    for path in ("a.jsonl", "datasets/org", "gsm8k=a.jsonl", "org/set", "a/hf://b"):
        assert hub.data(path) == [path]
    assert corpus.asked == []


def test_config_and_split_are_what_the_card_says(corpus):
    name = "hf://datasets/org/set?config=main&split=train"
    assert texts(name) == ["text 0", "text 1", "text 2", "text 3"]
    found = hub.data(name)
    commit = corpus.repo("org/set", "datasets").refs["main"]
    assert [path.pinned for path in found] == [f"hf://datasets/org/set@{commit}/main/train-{n}.jsonl" for n in (0, 1)]
    assert not {"load.py", "x.pkl", "i.png"} & corpus.files_asked()
    assert "no split is named; there are train, test: " in refused(hub.data, "hf://datasets/org/set?config=main")
    assert "no split 'dev'; there are train, test: " in refused(hub.data, "hf://datasets/org/set?config=main&split=dev")
    assert "main, extra" in refused(hub.data, "hf://datasets/org/set?split=train").replace("'", "")
    assert "main', 'extra'" in refused(hub.data, "hf://datasets/org/set")
    assert "unknown option 'part'" in refused(hub.data, "hf://datasets/org/set?part=train")
    assert "a path or ?split=train, not both" in refused(hub.data, "hf://datasets/org/set/main?split=train")


def test_a_data_set_of_one_split_needs_no_option_and_no_card(web):
    web.repo("org/set", "datasets").push({"data/train.jsonl": jsonl(ROWS)})
    assert texts("hf://datasets/org/set") == [row["text"] for row in ROWS]


def test_brackets_in_the_name_of_a_file_are_letters(web):
    web.repo("org/set", "datasets").push({"a[1].jsonl": jsonl(ROWS), "a1.jsonl": jsonl(ROWS[:1])})
    assert texts("hf://datasets/org/set/a[1].jsonl") == [row["text"] for row in ROWS]


def test_scripts_are_not_run(web):
    web.repo("org/set", "datasets").push({"set.py": "import os; os.mkdir('ran')"})
    assert refused(hub.data, "hf://datasets/org/set").startswith("hf://datasets/org/set: ")
    assert not Path("ran").exists()


def test_splits_of_other_kinds_of_files_are_refused_by_name(web):
    web.repo("org/set", "datasets").push({"train.xml": "<a/>"})
    said = refused(hub.data, "hf://datasets/org/set")
    assert said.endswith("train.xml is not read; the Hub's copy, if any: hf://datasets/org/set@refs/convert/parquet")


def test_a_data_set_is_read_by_the_names_in_its_snapshot(web, tmp_path):
    """Parquet and arrow, which the cache stores under other names."""
    folder = tmp_path / "made"
    made = datasets.Dataset.from_list(ROWS)
    made.save_to_disk(folder / "saved")
    made.to_parquet(folder / "a.parquet")
    pushed = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    web.repo("org/set", "datasets").push(pushed)
    for part in ("a.parquet", "saved"):
        assert texts(f"hf://datasets/org/set/{part}") == [row["text"] for row in ROWS]
    (path,) = hub.data("hf://datasets/org/set/saved")
    assert source.left_out([path]) == [f"{path}: 2 files left out: *.json (2), such as dataset_info.json"]


@pytest.mark.parametrize("how", ["refused", "offline"])
def test_data_that_are_in_the_cache_need_no_network(corpus, monkeypatch, how):
    name = "hf://datasets/org/set/main/train-*.jsonl"
    first = texts(name)
    unplug(corpus, monkeypatch, how)
    assert texts(name) == first
    began = time.monotonic()
    other = "hf://datasets/org/set/main/test-0.jsonl"
    assert refused(hub.data, other).startswith(f"{other}: not in the cache, and ")
    split = "hf://datasets/org/set?config=main&split=train"
    assert refused(hub.data, split).startswith(f"{split}: not in the cache, and ")
    assert time.monotonic() - began < 5


# Configs


def sft(*flags: str, dry_run: bool = False):
    base = ["--run.folder=run", "--run.steps=1", "--optim.lr=1", *flags]
    return config.load(train.SFTConfig, [*base, *(["--dry-run"] if dry_run else [])], prog="x", description="")[0]


def test_keys_that_hold_names_are_keys_of_configs():
    from thinkmid.augment.config import AnnotateConfig

    keys = {key for cls in (train.SFTConfig, train.RLMTConfig, train.RLPTConfig, EvalConfig, AnnotateConfig)
            for key in config._keys(cls)}  # fmt: skip
    assert {*hub.MODELS, *hub.DATA} <= keys


def test_a_config_keeps_names_at_their_commits_and_says_what_it_found(corpus, capsys):
    commit = corpus.repo("org/name").push(MODEL)
    at = corpus.repo("org/set", "datasets").refs["main"]
    cfg = sft("--model.folder=org/name", "--data.paths=x.jsonl,hf://datasets/org/set?config=main&split=train")
    assert Path(cfg.model.folder, "config.json").is_file()
    assert cfg.data.paths[0] == "x.jsonl"
    assert [Path(path).name for path in cfg.data.paths[1:]] == ["train-0.jsonl", "train-1.jsonl"]
    said = capsys.readouterr().out
    assert said == f"org/name: commit {commit}\nhf://datasets/org/set?config=main&split=train: commit {at}\n"
    text = config.to_toml(cfg)
    assert f'folder = "org/name@{commit}"' in text
    assert f'"hf://datasets/org/set@{at}/main/train-1.jsonl"' in text
    Path("again.toml").write_text(text)
    again = sft("again.toml")
    assert (again.model, again.data) == (cfg.model, cfg.data)


def test_a_resumed_run_keeps_the_commits_that_it_began_with(corpus, monkeypatch):
    names = ["--model.folder=org/name", "--data.paths=hf://datasets/org/set?config=main&split=train"]
    corpus.repo("org/name").push(MODEL)
    first = sft(*names)
    config.save_run("run", first, {})
    corpus.repo("org/name").push(MODEL | {"model.safetensors": b"other"})
    push_set(corpus, ROWS[::-1])
    assert sft(*names) == first
    anew = sft(*names, "--run.fresh=true")
    assert anew.model != first.model
    assert anew.data != first.data
    assert sft("--model.folder=org/name@main", *names[1:]).model != first.model  # another name is asked about anew
    unplug(corpus, monkeypatch)
    assert sft(*names) == first


def test_a_dry_run_reads_no_weights_and_no_data(corpus, capsys):
    commit = corpus.repo("org/name").push(MODEL)
    cfg = sft("--model.folder=org/name", "--data.paths=hf://datasets/org/set/main", dry_run=True)
    assert cfg.data.paths == ("hf://datasets/org/set/main",)
    assert files(cfg.model.folder) == {*KEPT[:-1]}
    assert capsys.readouterr().out == f"# org/name: commit {commit}\n"


def test_judges_annotators_and_their_texts_come_by_name(corpus):
    from thinkmid.augment.config import AnnotateConfig

    for name in ("judge", "writer", "tokenizer"):
        corpus.repo(f"org/{name}").push(MODEL)
    texts = "hf://datasets/org/set/main/test-0.jsonl"
    flags = [
        "--run.folder=a",
        "--annotator.kind=engine",
        "--writer.folder=org/writer",
        "--chunks.tokenizer=org/tokenizer",
    ]
    flags += [f"--data.paths={texts}", f"--split.evals={texts}"]
    cfg, _ = config.load(AnnotateConfig, flags, prog="x", description="")
    assert files(cfg.writer.folder) == {*KEPT}
    assert files(cfg.chunks.tokenizer) == {*KEPT[:-1]}
    assert [Path(path).is_file() for path in (*cfg.data.paths, *cfg.split.evals)] == [True, True]
    flags = ["--run.folder=r", "--run.steps=1", "--optim.lr=1", "--loss.denom=1", f"--data.paths={texts}"]
    flags += ["--model.folder=./m", "--judge.kind=swap", "--judge.folder=org/judge"]
    cfg, _ = config.load(train.RLMTConfig, flags, prog="x", description="")
    assert files(cfg.judge.folder) == {*KEPT}
    assert set(hub.record(cfg)) == {"org/judge", texts}


def test_sets_of_questions_are_read_by_name(corpus):
    flags = ["--run.folder=e", "--model.folder=m", "--run.regrade=true"]
    asked = "own:questions=hf://datasets/org/set/main/train-*.jsonl"
    cfg, _ = config.load(EvalConfig, [*flags, f"--data.sets={asked}"], prog="x", description="")
    assert [q.question for q in load_sets(cfg.data)["own"].questions] == ["0?", "1?", "2?", "3?"]
    split = "own:questions=hf://datasets/org/set?config=main&split="
    cfg, _ = config.load(EvalConfig, [*flags, f"--data.sets={split}test"], prog="x", description="")
    assert [q.question for q in load_sets(cfg.data)["own"].questions] == ["0?", "1?"]


def test_one_path_is_one_file(corpus):
    from thinkmid.train.config import RLPTConfig

    flags = ["--run.folder=r", "--run.steps=1", "--optim.lr=1", "--loss.denom=1", "--model.folder=./m"]
    where = "--data.path=hf://datasets/org/set?config=main&split=train"
    said = refused(config.load, RLPTConfig, [*flags, where], prog="x", description="")
    at = corpus.repo("org/set", "datasets").refs["main"]
    start = "data.path: hf://datasets/org/set?config=main&split=train is 2 files; name them with *, as in "
    assert said == f"{start}hf://datasets/org/set@{at}/main/train-0.jsonl"


# Processes


def test_processes_that_ask_at_once_find_the_same_snapshot(web):
    web.repo("org/name").push(MODEL | {"model.safetensors": os.urandom(3_000_000)})
    ask = "import sys; from thinkmid import hub; print(hub.model(sys.argv[1]))"
    ranks = [
        subprocess.Popen([sys.executable, "-c", ask, "org/name"], stdout=subprocess.PIPE, text=True,
                         env=os.environ | {"RANK": str(rank), "PYTHONPATH": str(Path(hub.__file__).parents[1])})
        for rank in range(3)
    ]  # fmt: skip
    found = {rank.communicate()[0].strip() for rank in ranks}
    assert [rank.returncode for rank in ranks] == [0, 0, 0]
    (folder,) = found
    assert len(Path(folder, "model.safetensors").read_bytes()) == 3_000_000


def test_an_empty_cache_and_no_network_end_a_program_with_one_line_and_code_2(web, tmp_path):
    web.close()
    program = [sys.executable, "-m", "thinkmid.train.rlmt"]
    flags = ["--run.folder=run", "--run.steps=1", "--optim.lr=1", "--loss.denom=1", "--data.paths=a.jsonl"]
    began = time.monotonic()
    done = subprocess.run([*program, *flags, "--model.folder=org/name"], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(Path(hub.__file__).parents[1])})  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: org/name: no such folder; on the Hub: not in the cache, and the Hub cannot be reached "
        "([Errno 111] Connection refused)\n"
    )
    assert time.monotonic() - began < 60
    assert not Path("run").exists()
