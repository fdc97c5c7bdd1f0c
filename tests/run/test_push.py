"""An export on the Hub: what arrives there, and what a push that fails costs. The Hub is a server on loopback."""

import json
import shutil

import pytest
from conftest import exit_code
from world import rlmt_flags, sft_flags

from thinkmid.run.config import ExportConfig
from thinkmid.train import rlmt, sft

huggingface_hub = pytest.importorskip("huggingface_hub")

from huggingface_hub import constants  # noqa: E402
from huggingface_hub.utils import HFValidationError, validate_repo_id  # noqa: E402
from push_hub import TOKEN, FakeHub  # noqa: E402


@pytest.fixture
def hub(monkeypatch):
    server = FakeHub()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the server takes files by HTTP
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    folder = tmp_path_factory.mktemp("origin")
    assert exit_code(sft, sft_flags(folder)) == 0
    return folder


@pytest.fixture
def run(origin, tmp_path, capsys):
    """A run that is done, called again with flags: (exit code, lines of stdout, stderr, its folder)."""
    shutil.copytree(origin, tmp_path / "home")
    home = tmp_path / "home"

    def run(*flags):
        capsys.readouterr()
        code = exit_code(sft, [*sft_flags(home), *flags])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err, home / "sft"

    return run


def content(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def events(folder, kind):
    rows = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
    return [row for row in rows if row["kind"] == kind]


def test_what_is_pushed_is_the_export_byte_by_byte_and_private(hub, run):
    code, out, err, folder = run("--export.push=me/thinker")
    assert (code, err) == (0, "")
    pushed = hub.repositories["me/thinker"]
    assert pushed["files"] == content(folder / "export")
    assert {"README.md", "stages.json", "thinkmid.json", "model.safetensors"} <= pushed["files"].keys()
    assert (pushed["private"], len(pushed["commits"])) == (True, 1)
    assert out[-1] == f"{events(folder, 'push')[0]['address']} holds it too"


def test_a_second_push_replaces_weights_that_were_cut_into_other_files_and_keeps_what_people_wrote(hub, run):
    files = {"model-00001-of-00002.safetensors": b"old", "model.safetensors.index.json": b"{}", "paper.pdf": b"ours"}
    hub.repositories["me/thinker"] = {"private": False, "files": dict(files), "commits": []}
    code, *_, folder = run("--export.push=me/thinker")
    assert code == 0
    pushed = hub.repositories["me/thinker"]
    assert pushed["files"] == content(folder / "export") | {"paper.pdf": b"ours"}
    assert (pushed["private"], len(pushed["commits"])) == (False, 1)


def test_a_repository_is_public_only_where_that_was_asked_for(hub, run):
    assert run("--export.push=me/open", "--export.private=false")[0] == 0
    assert hub.repositories["me/open"]["private"] is False


@pytest.mark.parametrize(
    ("fault", "said"),
    [(("/repos/create", 403), "403"), (("/preupload/", 500), "500"), (("/commit/", 409), "409"), (None, "refused")],
)
def test_a_push_that_fails_costs_the_push_alone_and_the_same_command_pushes_later(hub, run, monkeypatch, fault, said):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the library waits before it asks again
    hub.fault = fault
    if fault is None:
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    code, out, err, folder = run("--export.push=me/thinker")
    assert (code, "Traceback" in err) == (0, False)
    whole = f"warning: {folder}/export is whole, but not on the Hub: "
    assert out[-1].startswith(whole)
    assert said in out[-1]
    assert out[-1].endswith(f"; the same command, or hf upload me/thinker {folder}/export ., pushes it")
    assert [row["repository"] for row in events(folder, "push_failed")] == ["me/thinker"]
    assert not hub.repositories.get("me/thinker", {"files": {}})["files"]
    before, hub.fault = content(folder / "export"), None
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    assert run("--export.push=me/thinker")[0] == 0
    assert hub.repositories["me/thinker"]["files"] == content(folder / "export") == before


def test_without_the_library_or_a_token_a_run_is_refused_before_it_begins(origin, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    argv = [*rlmt_flags(origin, "refused"), f"--run.folder={tmp_path}/run", "--export.push=me/thinker"]
    assert exit_code(rlmt, argv) == 2
    line = "error: export.push me/thinker: no token for the Hub; log in with `hf auth login`, or set HF_TOKEN\n"
    assert capsys.readouterr().err == line
    monkeypatch.setattr("thinkmid.run.push.find_spec", lambda name: None)
    assert exit_code(rlmt, argv) == 2
    line = "error: export.push me/thinker: needs huggingface_hub: pip install 'thinkmid[hub]'\n"
    assert capsys.readouterr().err == line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name",
    [
        "me/model", "me/model-7B.v1_x", "a/b", "1/2", "a" * 96 + "/" + "b" * 96, "model",
        "me/you/model", "me/mo del", "/model", "me/", "me/a--b", "me/a..b", "me/.a", "-me/a", "me/a-", "me/a.git",
        "me/é", "me/" + "b" * 97, "../model", "me/a\n", "hf://me/model", "me/model@main",
    ],
)  # fmt: skip
def test_names_are_taken_as_the_library_takes_them(name):
    try:
        validate_repo_id(name)
        is_name = name.count("/") == 1
    except HFValidationError:
        is_name = False
    if is_name:
        assert ExportConfig(push=name).push == name
    else:
        with pytest.raises(ValueError, match=r"^push must be ORG/NAME"):
            ExportConfig(push=name)
