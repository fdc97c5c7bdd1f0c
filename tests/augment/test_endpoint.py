import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import misbehave
import pytest

from thinkmid.augment.annotators import AnnotatorConfig, Unanswered
from thinkmid.augment.config import EndpointConfig
from thinkmid.errors import UserError

pytest.importorskip("openai")

from thinkmid.augment.endpoint import PROBE, EndpointAnnotator
from thinkmid.rollout.endpoint import SAID, error_status, message

KEY = "sk-not-for-any-log"


def completion(text, finish="stop", **more):
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return json.dumps({"id": "1", "object": "chat.completion", "choices": [choice], **more}).encode()


USAGE = {"usage": {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}}


class Stub(BaseHTTPRequestHandler):
    """Prompts are "behave: NAME"; any other is an annotation, answered by the script after server.delay_s."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][0]["content"]
        with server.lock:
            server.calls[prompt] += 1
            first = server.calls[prompt] == 1
            server.now += 1
            server.most = max(server.most, server.now)
            server.last = self.headers, body
        try:
            self.answer(prompt.removeprefix("behave: "), first) if prompt.startswith("behave: ") else self.annotate(
                prompt
            )
        except OSError:
            self.close_connection = True
        finally:
            with server.lock:
                server.now -= 1

    def annotate(self, prompt):
        time.sleep(self.server.delay_s)
        if (body := self.server.spoil(prompt)) is not None:
            return self.send(body, self.server.status)
        reply = misbehave.reply(prompt)
        usage = {"usage": {"prompt_tokens": len(prompt), "completion_tokens": 5}}
        self.send(completion(reply.text, "length" if reply.cut else "stop", **usage))

    def answer(self, name, first):
        if name == "busy" and first:
            self.send(b"{}", 429, {"Retry-After": "0.3"})
        elif name == "broken" and first:
            self.send(b"<html>gateway</html>")
        elif name == "half" and first:
            self.send(completion("x")[:-9])
        elif name.isdecimal():
            self.send(b'{"error": {"message": "%s"}}' % KEY.encode(), int(name))
        elif name == "hang" or (name == "slow once" and first):
            self.server.over.wait(20)
            self.close_connection = True
        elif name == "trickle":
            self.connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n")
            while not self.server.over.wait(0.05):
                self.connection.sendall(b" ")
        elif name == "cut":
            self.send(completion("half an ans", "length"))
        elif name == "null":
            self.send(completion(None))
        else:
            self.send(completion(f"said {name}", **USAGE))

    def send(self, data, status=200, headers=()):
        self.send_response(status)
        for header, value in dict(headers).items():
            self.send_header(header, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request, address):
        assert isinstance(sys.exception(), (OSError, ValueError)), sys.exception()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Server(("127.0.0.1", 0), Stub)
    server.calls, server.last, server.over, server.lock = Counter(), None, threading.Event(), threading.Lock()
    server.now, server.most, server.delay_s = 0, 0, 0.0
    server.status, server.spoil = 400, lambda prompt: None  # what comes instead of an annotation
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def make(server, monkeypatch):
    made = []
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")

    def make(**options):
        options = {"url": server.url, "model": "m", "timeout_s": 5.0, "retries": 2} | options
        made.append(EndpointAnnotator(AnnotatorConfig(), EndpointConfig(**options), misbehave.Stop()))
        return made[-1]

    yield make
    for client in made:
        client.close()


def test_replies_come_in_order_with_their_tokens(make, server):
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(make().write, [f"behave: {n}x" for n in range(20)]))
    assert [reply.text for reply in found] == [f"said {n}x" for n in range(20)]
    assert {(r.prompt_tokens, r.written_tokens, r.cut, r.fault) for r in found} == {(11, 7, False, "")}
    headers, body = server.last
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0.8, 4096)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("busy", "HTTP 429"), ("broken", "answer is not JSON"), ("half", "answer is not JSON"), ("slow once", "timeout")],
)
def test_what_passes_is_tried_again_and_counted(make, server, name, reason):
    client = make(timeout_s=0.5 if "slow" in name else 5.0)
    began = time.monotonic()
    reply = client.write(f"behave: {name}")
    assert reply.text == f"said {name}"
    assert server.calls[f"behave: {name}"] == 2
    assert client.failures == {reason: 1}
    if name == "busy":
        assert time.monotonic() - began >= 0.3  # as long as Retry-After asked for


@pytest.mark.parametrize(
    ("name", "reason"), [("500", "HTTP 500"), ("425", "HTTP 425"), ("hang", "timeout"), ("trickle", "timeout")]
)
def test_what_does_not_pass_is_unanswered_after_its_tries_and_no_deadline_is_missed(make, server, name, reason):
    client = make(timeout_s=0.4)
    began = time.monotonic()
    with pytest.raises(Unanswered, match=reason):
        client.write(f"behave: {name}")
    assert time.monotonic() - began < 3
    assert server.calls[f"behave: {name}"] == 3
    assert client.failures == {reason: 3}


def test_no_server_is_unanswered(make):
    with pytest.raises(Unanswered, match="no connection"):
        make(url="http://127.0.0.1:9/v1").write("behave: x")


@pytest.mark.parametrize("status", ["401", "403", "404"])
def test_a_wrong_key_or_model_is_the_users_mistake_only_while_nothing_was_answered(make, server, status):
    client = make()
    with pytest.raises(UserError) as error:
        client.write(f"behave: {status}")
    assert str(error.value) == f"endpoint.url {server.url} answers HTTP {status} for model 'm'"
    client.write("behave: well")
    assert client.write(f"behave: {status}").fault == f"HTTP {status}"


def test_a_prompt_that_is_refused_is_not_asked_again(make, server):
    reply = make().write("behave: 400")
    assert (reply.text, reply.fault) == ("", "HTTP 400")
    assert server.calls == {"behave: 400": 1, PROBE: 1}


def test_who_refuses_the_simplest_question_is_no_endpoint(make, server):
    server.spoil = lambda prompt: b'{"error": {"message": "no field\\n max_tokens\\u001b"}}'
    client = make()
    client.write("behave: well")
    with pytest.raises(UserError) as error:
        client.write("a passage")
    assert str(error.value) == f"endpoint.url {server.url} answers HTTP 400 for model 'm': no field max_tokens"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ('{"error": {"message": "too  long", "code": 400}}', "too long"),
        ('{"object": "error", "message": "too long"}', "too long"),
        ('{"detail": [{"loc": ["body"], "msg": "field required"}]}', "[{'loc': ['body'], 'msg': 'field required'}]"),
        ('{"error": "no\\nroom \\ud800"}', "no room"),
        ("<html>\n<b>Bad</b></html>", "<html> <b>Bad</b></html>"),
        ("x" * 999, "x" * SAID),
        ("[" * 100_000, "[" * SAID),
        *[(body, "") for body in ("", "{}", '{"error": null}', '{"error": {}}')],
    ],
)
def test_the_words_of_an_error_are_one_line(body, said):
    assert message(400, body, KEY) == said


def test_words_that_may_hold_the_key_are_not_said(make):
    assert message(400, f'{{"error": "bad {KEY}"}}', KEY) == ""
    assert message(401, '{"error": "sk-no...log is wrong"}', KEY) == ""
    assert message(400, '{"error": "max_tokens"}', "x") == "max_tokens"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ('{"error": {"code": 429, "message": "slow down"}}', 429),
        ('{"error": {"code": 400}}', 400),
        ('{"error": {"code": "context_length"}}', 200),
        ('{"error": {"code": true}}', 200),
        ('{"error": "overloaded", "choices": []}', 200),
        ('{"error": null, "choices": []}', 0),
        ('{"choices": []}', 0),
        ("[]", 0),
        ("{", 0),
    ],
)
def test_an_error_that_comes_with_http_200_is_known_by_its_body(body, status):
    assert error_status(body.encode()) == status


def test_an_error_with_http_200_is_treated_as_its_code_says(make, server):
    server.status = 200
    for code, reason in ((429, "HTTP 429"), ("busy", "HTTP 200")):
        server.spoil = lambda prompt, code=code: json.dumps({"error": {"code": code, "message": "later"}}).encode()
        with pytest.raises(Unanswered, match=reason) as error:
            make().write("a passage")
        assert error.value.said == "later"
    server.spoil = lambda prompt: b'{"error": {"code": 400, "message": "never"}}'
    with pytest.raises(UserError, match=r"answers HTTP 400 for model 'm': never"):
        make().write("a passage")


def test_a_cut_answer_and_an_empty_one_say_so(make):
    client = make()
    cut, null = client.write("behave: cut"), client.write("behave: null")
    assert (cut.text, cut.cut) == ("half an ans", True)
    assert (null.text, null.cut) == ("", False)


def test_close_ends_what_is_on_its_way(make):
    client = make(timeout_s=30.0)
    found = []

    def wait():
        try:
            client.write("behave: hang")
        except Unanswered as error:
            found.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.3)
    began = time.monotonic()
    client.close()
    thread.join(5)
    assert found == ["closed"]
    assert time.monotonic() - began < 2
    with pytest.raises(Unanswered, match="closed"):
        client.write("behave: x")


CONFIG = """
run = {folder = "r", parts = 3, progress_s = 0.2}
data = {paths = ["corpus.jsonl"]}
chunks = {tokenizer = "tokenizer", max_tokens = 24}
annotator = {retries = 1}
split = {sft = 0.5, rl = 0.4, heldout = 0.1}
"""


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    misbehave.write_world(tmp_path, chars=40_000)
    Path("a.toml").write_text(CONFIG)
    return tmp_path


def start(server, *more):
    flags = ["--endpoint.url", server.url, "--endpoint.model", "m", "--endpoint.workers", "8", *more]
    command = [sys.executable, "-m", "thinkmid.augment.annotate", "a.toml", *flags]
    env = os.environ | {"OPENAI_API_KEY": KEY, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def num_lines():
    return sum(path.read_bytes().count(b"\n") for path in Path("r/journal").glob("*.jsonl"))


@pytest.mark.slow
def test_the_program_at_an_endpoint_killed_and_stopped_ends_as_if_undisturbed(world, server):
    server.delay_s = 0.02
    for number, code in ((signal.SIGKILL, -9), (signal.SIGTERM, 75), (signal.SIGINT, 75)):
        process, wanted = start(server), num_lines() + 40
        while process.poll() is None and num_lines() < wanted:
            time.sleep(0.02)
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
        assert process.returncode == code
        said = [f"stopping: {signal.Signals(number).name}"] * (code == 75)
        assert [line.partition(";")[0] for line in err.splitlines()] == said
    assert "stopped; the same command resumes" in out
    process = start(server, "--endpoint.price_written", "2.0")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert re.search(r"documents read, \d+ chunks \(\d+ refused\), [\d.]+ chunks/s", out)
    assert server.most == 8
    report = json.loads(Path("r/report.json").read_text())
    misbehave.annotated(misbehave.settings(world), misbehave.reply)
    files = list(Path("out").glob("*-*/part-*.jsonl"))
    assert len(files) == 3 * 2 * 3
    assert all(Path("r", *path.parts[1:]).read_bytes() == path.read_bytes() for path in files)
    asked = json.loads(Path("out/report.json").read_text())
    for name in ("chunks", "accepted", "refused", "refused_by", "retried_by", "splits"):
        assert report[name] == asked[name]
    assert report["written_tokens"] == 5 * report["calls"]
    assert report["cost"] == pytest.approx(report["written_tokens"] * 2e-6, abs=1e-4)
    # what was on its way when the run ended is asked again, nothing else: 8 at a time, 2 tries each; a first try that
    # was answered before a signal is counted both times
    assert asked["calls"] <= report["calls"] <= server.calls.total() <= asked["calls"] + 3 * 8 * 2
    assert not any(KEY in path.read_text() for path in Path("r").rglob("*.json*"))


def run(server, *more):
    """The program to its end: (exit code, stdout, stderr)."""
    process = start(server, "--endpoint.retries", "1", *more)
    out, err = process.communicate(timeout=100)
    return process.returncode, out, err


def outputs(folder):
    return {path.relative_to(folder): path.read_bytes() for path in Path(folder).glob("*-*/part-*.jsonl")}


def accounts(folder):
    told = json.loads(Path(folder, "report.json").read_text())
    return {name: told.get(name) for name in ("finished", "chunks", "accepted", "refused", "refused_by")}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A few dozen chunks."""
    folder = tmp_path_factory.mktemp("few")
    misbehave.write_world(folder, chars=40_000)
    rows = [json.loads(line) for line in (folder / "corpus.jsonl").open()][:20]
    lines = [json.dumps(row | {"text": row["text"][:250]}) + "\n" for row in rows]
    (folder / "corpus.jsonl").write_text("".join(lines))
    (folder / "a.toml").write_text(CONFIG)
    return folder


@pytest.fixture
def tame(made, tmp_path, monkeypatch):
    """A copy to work in; the script's answers are all accepted."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(misbehave, "way", lambda prompt: "well")
    return tmp_path


def told(message, **more):
    return json.dumps({"error": {"message": message, **more}}).encode()


@pytest.mark.parametrize("answered", [0, 20])
def test_an_endpoint_that_refuses_everything_stops_the_run_and_nothing_is_lost(tame, server, answered):
    asked, words = Counter(), "max_tokens 4096 exceeds the context"

    def spoil(prompt):
        asked["all"] += 1
        return told(words) if asked["all"] > answered else None

    server.spoil = spoil
    for _ in range(2):  # it is as broken the second time
        code, _, err = run(server)
        assert (code, err) == (2, f"error: endpoint.url {server.url} answers HTTP 400 for model 'm': {words}\n")
    assert not any('"refused"' in path.read_text() for path in Path("r/journal").glob("*"))
    server.spoil = lambda prompt: None
    assert run(server)[0] == 0
    assert run(server, "--run.folder", "whole")[0] == 0
    assert outputs("r") == outputs("whole")
    assert accounts("r") == accounts("whole")
    assert accounts("r")["refused"] == 0


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        # a context too small for any chunk, which a short question does not show
        (400, told("the prompt is too long"), r"HTTP 400 \d+ \(the prompt is too long\)"),
        (200, told("no credit"), r"HTTP 200 \d+ \(no credit\)"),
        (200, b'{"choices": []}', r"incomplete answer \d+"),
    ],
)
def test_chunks_without_a_response_stay_open(tame, server, status, body, says):
    server.status, server.spoil = status, lambda prompt: None if prompt == PROBE else body
    code, _, err = run(server)
    assert code == 2
    assert re.fullmatch(rf"error: r: chunks without a response: {says}; the same command resumes\n", err)
    assert not accounts("r")["chunks"]
    assert len(server.calls) < 60  # it does not ask about all of them
    server.spoil = lambda prompt: None
    assert run(server)[0] == 0
    assert accounts("r")["refused"] == 0


@pytest.mark.parametrize(
    ("body", "reason"), [(completion("half an", "length"), "cut off"), (completion(None), "empty answer")]
)
def test_answers_that_are_of_no_use_are_no_success_and_are_asked_for_again(tame, server, body, reason):
    server.status, server.spoil = 200, lambda prompt: body
    code, _, err = run(server)
    assert code == 2
    n = accounts("r")["refused"]
    assert err == f"error: r: none of {n} chunks accepted, most often: {reason} ({n}); the same command asks again\n"
    server.spoil = lambda prompt: None
    assert run(server)[0] == 0
    assert (accounts("r")["chunks"], accounts("r")["refused"]) == (n, 0)


def test_a_chunk_that_the_endpoint_refuses_among_others_is_refused_and_ends_nothing(tame, server):
    with open("corpus.jsonl", "a") as file:
        file.writelines(json.dumps({"text": f"This is forbidden {n}."}) + "\n" for n in range(3))
    server.spoil = lambda prompt: told("content filter") if "forbidden" in prompt else None
    assert run(server)[0] == 0
    assert accounts("r")["refused_by"] == {"HTTP 400": 3}
    rows = [json.loads(line) for path in Path("r/journal").glob("*") for line in path.open()]
    assert [row["said"] for row in rows if "refused" in row] == ["content filter"] * 3
    # a killed run may leave nothing but these
    for path in Path("r/journal").glob("*"):
        path.write_text("".join(line for line in path.open() if '"refused"' not in line))
    for path in Path("r/parts").glob("*"):
        path.unlink()
    server.calls.clear()
    assert run(server)[0] == 0
    assert accounts("r")["refused_by"] == {"HTTP 400": 3}
    assert server.calls.total() == 3 + 3  # with the short question each


def test_a_wrong_key_ends_the_program_with_one_line(world, server, monkeypatch):
    monkeypatch.setattr(Stub, "annotate", lambda self, prompt: self.send(b"{}", 401))
    process = start(server, "--endpoint.url", server.url + "/404")
    _, err = process.communicate(timeout=30)
    assert process.returncode == 2
    assert err == f"error: endpoint.url {server.url}/404 answers HTTP 401 for model 'm'\n"
