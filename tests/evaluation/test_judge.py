"""A judge behind HTTP, against a local stub: both orders, ties, one line for what goes wrong."""

import json
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mlx_grpo.cli import main
from mlx_grpo.config.settings import TrainConfig
from mlx_grpo.console.output import Console
from mlx_grpo.core.errors import InputError
from mlx_grpo.core.types import Completion, Group, Prompt
from mlx_grpo.evaluation.judge import Judge, Verdicts, compare_answers, outcome, question, verdict
from mlx_grpo.training.loop import train

KEY = "sk-very-secret"
Reply = tuple[int, bytes, dict[str, str]]


class Stub:
    """An endpoint whose replies a function of the question makes."""

    def __init__(self, answer: Callable[[str], str | Reply]):
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stub.requests.append({"path": self.path, **request})
                stub.keys.add(self.headers.get("Authorization"))
                found = answer(request["messages"][0]["content"])
                status, body, headers = found if isinstance(found, tuple) else completion(found)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_: Any) -> None:
                pass  # a client that gave up is what some tests are about

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def completion(text: Any) -> Reply:
    body = {"choices": [{"message": {"role": "assistant", "content": text}}]}
    return 200, json.dumps(body).encode(), {}


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[str], str | Reply]], Stub]]:
    """Start stubs; they end with the test."""
    stubs: list[Stub] = []

    def start(answer: Callable[[str], str | Reply]) -> Stub:
        stubs.append(Stub(answer))
        return stubs[-1]

    yield start
    for stub in stubs:
        stub.close()


Serve = Callable[[Callable[[str], str | Reply]], Stub]


def groups(*texts: str) -> list[Group]:
    return [
        Group(
            Prompt(str(i), ({"role": "user", "content": f"question {i}"},), (1,)),
            (Completion((1,), text, "stop", (0.0,)),),
        )
        for i, text in enumerate(texts)
    ]


def shown(asked: str) -> tuple[str, str]:
    """Answers A and B of a question."""
    rest = asked.split("[Answer A]\n")[1].split("\n\n[End]")[0]
    a, b = rest.split("\n\n[Answer B]\n")
    return a, b


def likes_the_longer(asked: str) -> str:
    a, b = shown(asked)
    return "T" if len(a) == len(b) else "A" if len(a) > len(b) else "B"


def test_each_pair_is_asked_in_both_orders_and_the_better_answer_wins(serve: Serve) -> None:
    stub = serve(likes_the_longer)
    before, after = groups("short", "a long answer", "same"), groups("longer", "long", "size")
    found = compare_answers(Judge(stub.url, "m"), before, after)
    assert found == Verdicts((1.0, 0.0, 0.5), disagreements=0, unreadable=0)
    asked = {shown(r["messages"][0]["content"]) for r in stub.requests}
    assert asked >= {("short", "longer"), ("longer", "short")}
    assert len(stub.requests) == 6
    assert {(r["path"], r["model"], r["temperature"]) for r in stub.requests} == {
        ("/v1/chat/completions", "m", 0)
    }


@pytest.mark.parametrize("favourite", ["A", "B"])
def test_a_judge_that_only_sees_the_position_gives_only_ties(serve: Serve, favourite: str) -> None:
    stub = serve(lambda _: favourite)
    found = compare_answers(Judge(stub.url, "m"), groups("a", "b"), groups("c", "d"))
    assert found == Verdicts((0.5, 0.5), disagreements=2, unreadable=0)


def test_replies_that_cannot_be_read_are_counted_and_make_a_tie(serve: Serve) -> None:
    stub = serve(lambda asked: "Well, hard to say." if shown(asked)[0] == "x" else "A")
    found = compare_answers(Judge(stub.url, "m"), groups("x", "b"), groups("c", "d"))
    assert found == Verdicts((0.5, 0.5), disagreements=1, unreadable=1)


def test_a_judge_that_is_never_understood_is_refused(serve: Serve) -> None:
    stub = serve(lambda _: "As an AI model")
    with pytest.raises(InputError, match="no reply begins with A, B or T; the first is 'As an AI"):
        compare_answers(Judge(stub.url, "m"), groups("x"), groups("c"))


@pytest.mark.parametrize(
    ("reply", "read"),
    [
        *(("A", "A"), ("b", "B"), (" T\n", "T"), ("**B**", "B"), ("[A]", "A"), ("Tie.", "T")),
        *(("Answer B", "B"), ("Answer: A", "A"), ("B is better.", "B"), ("A.\nIt is short.", "A")),
        *(("<think>A or B? A.</think>\n\nB", "B"), ("A: clearer", "A")),
        *(("A better answer would be B", None), ("Both", None), ("The first", None), ("", None)),
        *(("I prefer A", None), ("<think>A", None), ("AB", None)),
    ],
)
def test_a_verdict_is_a_letter_that_stands_alone(reply: str, read: str | None) -> None:
    assert verdict(reply) == read


@pytest.mark.parametrize(
    ("first", "second", "result"),
    [
        *(("B", "A", 1.0), ("A", "B", 0.0)),
        *(("A", "A", 0.5), ("B", "B", 0.5), ("T", "A", 0.5), ("B", "T", 0.5), (None, "A", 0.5)),
    ],
)
def test_only_agreement_in_both_orders_is_a_win(
    first: str | None, second: str | None, result: float
) -> None:
    assert outcome(first, second) == result


def test_a_conversation_is_shown_whole() -> None:
    messages = (
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "tea {or} rain?"},
    )
    text = question(messages, "one", " ")
    assert "system: be brief\n\nuser: tea {or} rain?" in text
    assert "[Answer B]\n(empty)" in text


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(serve: Serve, status: int) -> None:
    replies: Iterator[str | Reply] = iter([(status, b"wait", {"Retry-After": "0"}), "A"])
    stub = serve(lambda _: next(replies))
    assert Judge(stub.url, "m", pause=0.0).ask("x") == "A"
    assert len(stub.requests) == 2


@pytest.mark.parametrize(
    ("answer", "requests", "message"),
    [
        ((429, b"slow down", {}), 4, "HTTP 429: slow down"),
        ((401, f"bad key {KEY}\nsecond line".encode(), {}), 1, "HTTP 401: bad key *** second line"),
        ((404, b"", {}), 1, "HTTP 404: Not Found"),
        ((307, b"", {"Location": "http://127.0.0.1:9/elsewhere"}), 1, "HTTP 307"),
        ((200, b"<html>", {}), 1, "the reply is not a chat completion"),
        ((200, b'{"choices": []}', {}), 1, "the reply is not a chat completion"),
        ((200, b"[1]", {}), 1, "the reply is not a chat completion"),
        (completion(None), 1, "the reply is not a chat completion"),
    ],
)
def test_what_goes_wrong_takes_one_line_without_the_key(
    serve: Serve, answer: Reply, requests: int, message: str
) -> None:
    stub = serve(lambda _: answer)
    with pytest.raises(InputError) as failure:
        Judge(stub.url, "m", KEY, pause=0.0).ask("x")
    line = str(failure.value)
    assert line.startswith(f"--judge {stub.url}: {message}")
    assert "\n" not in line
    assert KEY not in line
    assert len(stub.requests) == requests


def test_a_silent_server_is_given_up(serve: Serve) -> None:
    release = threading.Event()

    def silent(_: str) -> str:
        release.wait(10)
        return "A"

    stub = serve(silent)
    with pytest.raises(InputError, match=r"no reply in 0\.1 s"):
        Judge(stub.url, "m", timeout=0.1).ask("x")
    release.set()


def test_no_server_at_all_is_said(serve: Serve) -> None:
    stub = serve(lambda _: "A")
    stub.close()
    with pytest.raises(InputError, match="Connection refused"):
        Judge(stub.url, "m").ask("x")


@pytest.mark.parametrize("url", ["localhost:8080", "file:///etc/passwd", "http://", "nonsense"])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(InputError, match=r"not a URL; write it like http://localhost:8080/v1"):
        Judge(url, "m")


def test_the_key_is_sent_and_not_shown(serve: Serve) -> None:
    stub = serve(lambda _: "A")
    judge = Judge(stub.url, "m", KEY)
    judge.ask("x")
    assert stub.keys == {f"Bearer {KEY}"}
    assert KEY not in repr(judge)
    Judge(stub.url, "m").ask("x")
    assert None in stub.keys


@pytest.fixture
def run(train_arguments: dict[str, Any]) -> Path:
    """A finished run of two iterations."""
    config = TrainConfig(**{**train_arguments, "num_iterations": 2})
    assert train(config, Console(quiet=True))
    return config.run_directory


def evaluate(monkeypatch: pytest.MonkeyPatch, run: Path, *flags: str) -> int:
    monkeypatch.setattr(sys, "argv", ["mlx-grpo", "eval", str(run), *flags])
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    return main()


def test_eval_shows_and_writes_what_the_judge_said(
    run: Path,
    serve: Serve,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stub = serve(lambda asked: "B" if "[Answer A]" in asked else "A")
    file = tmp_path / "figures.json"
    flags = ("--judge", stub.url, "--json", str(file), "--limit", "2")
    flags += ("--eval-reward", "mlx_grpo.rubric:gold")
    assert evaluate(monkeypatch, run, *flags) == 0
    shown_text = capsys.readouterr()
    assert "judge (2 ties)" in shown_text.out and "50% (9% to 91%)" in shown_text.out
    assert "gold judge: gold" in shown_text.out
    assert KEY not in shown_text.out + shown_text.err + file.read_text()
    found = json.loads(file.read_text())
    assert found["prompts"]["count"] == 2
    assert found["adapter"] in (f"{run}/best", f"{run}/final")
    assert set(found["wins"]) == {"reward", "gold", "judge"}
    judged = found["wins"]["judge"]
    assert (judged["wins"], judged["ties"], judged["losses"]) == (0, 2, 0)
    assert (judged["disagreements"], judged["unreadable"]) == (2, 0)
    assert found["sft"]["eval_kl"] == 0.0
    assert found["grpo"]["eval_kl"] > 0.0


def test_a_judge_that_fails_midway_leaves_the_table_in_place(
    run: Path,
    serve: Serve,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stub = serve(lambda asked: (400, b"no more", {}) if "[Answer A]" in asked else "A")
    assert evaluate(monkeypatch, run, "--judge", stub.url) == 2
    shown_text = capsys.readouterr()
    assert "perplexity of reference answers" in shown_text.out
    assert shown_text.err.strip().startswith(f"error: --judge {stub.url}: HTTP 400: no more")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--judge", "http://127.0.0.1:9/v1"), "Connection refused"),
        (("--judge", "nowhere"), "not a URL"),
        (("--json", "no/such/directory/f.json"), "no such directory"),
        (("--json", "."), "--json .: a directory; name a file"),
    ],
)
def test_what_cannot_work_is_said_before_the_work(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
    message: str,
) -> None:
    assert evaluate(monkeypatch, tmp_path / "no-run-here", *flags) == 2
    assert message in capsys.readouterr().err
