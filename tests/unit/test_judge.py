"""A judge over HTTP: places swapped, ties and tokens counted, an endpoint that says later, one that breaks."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from ftray.cli.main import call
from ftray.config import Decoding
from ftray.errors import ConfigError, RunError
from ftray.evaluate import endpoint as module
from ftray.evaluate.endpoint import Endpoint, ask_all
from ftray.evaluate.judge import Pair, judge, verdict_of
from ftray.evaluate.questions import Asked

Answerer = Callable[[str, dict[str, Any]], tuple[int, Any]]


@pytest.fixture
def served(monkeypatch) -> Iterator[Callable[[Answerer], Endpoint]]:
    """A real HTTP server that answers as a test says: (path, body) → (status, value)."""
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    servers: list[ThreadingHTTPServer] = []

    def serve(answer: Answerer) -> Endpoint:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, value = answer(self.path, body | {"authorization": self.headers.get("Authorization")})
                content = value if isinstance(value, bytes) else json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return Endpoint.of(f"http://127.0.0.1:{server.server_port}/v1#judge")

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def completion(text: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    usage = {"prompt_tokens": 100, "completion_tokens": 10}
    return {"choices": [{"message": message, "text": text, "finish_reason": "stop"}], "usage": usage}


def prefers(word: str) -> Answerer:
    """A judge that likes the answer with `word` in it, wherever it stands."""

    def answer(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        prompt = body["messages"][0]["content"]
        a, b = prompt.split("[Answer A]")[1].split("[Answer B]")
        verdict = "A" if word in a and word not in b else "B" if word in b and word not in a else "tie"
        return 200, completion(f"I have thought about it.\nVerdict: {verdict}")

    return answer


PAIRS = [Pair("q", "good", "bad"), Pair("q", "bad", "good"), Pair("q", "same ", "same"), Pair("q", "x", "y")]


def test_a_fair_judge(served):
    found = judge(served(prefers("good")), PAIRS)
    assert found.verdicts == ("first", "second", "tie", "tie")
    assert found.counts() == {"first": 1, "tie": 2, "second": 1}
    assert (found.wins, found.swayed, found.unclear) == (0.5, 0, 0)
    assert (found.prompt_tokens, found.answer_tokens) == (600, 60)  # three pairs, two orders; the equal one unasked
    assert found.cost(2.0, 10.0) == pytest.approx((600 * 2 + 60 * 10) / 1e6)


def test_a_judge_that_favours_a_place_decides_nothing(served):
    found = judge(served(lambda path, body: (200, completion("Verdict: A"))), PAIRS[:2])
    assert found.verdicts == ("tie", "tie")
    assert found.swayed == 2


def test_a_judge_without_a_verdict(served):
    with pytest.raises(RunError, match="no verdict at all"):
        judge(served(lambda path, body: (200, completion("Both are nice."))), PAIRS[:1])
    assert verdict_of("Verdict: A? No. **Verdict:** tie") == "tie"
    assert verdict_of("A is better") is None


def test_later_is_asked_again_and_no_is_no(served, monkeypatch):
    monkeypatch.setenv("FTRAY_API_KEY", "secret")
    seen: list[Any] = []

    def answer(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        seen.append(body["authorization"])
        return [(429, {}), (503, {}), (200, b"{cut off"), (200, completion("fine"))][len(seen) - 1]

    asked = [Asked("q", "a", ({"role": "user", "content": "q"},))]
    [found] = ask_all(served(answer), asked, Decoding())
    assert (found.text, found.prompt_tokens, found.reason) == ("fine", 100, "stop")
    assert seen == ["Bearer secret"] * 4
    with pytest.raises(RunError, match="HTTP 401"):
        ask_all(served(lambda path, body: (401, {"error": "who are you?"})), asked, Decoding())
    with pytest.raises(RunError, match="no completion"):
        ask_all(served(lambda path, body: (200, {"hello": 1})), asked, Decoding())


def test_a_plain_prompt_is_completed_with_the_decoding_that_is_stated(served):
    bodies: list[dict[str, Any]] = []

    def answer(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        bodies.append(body | {"path": path})
        return 200, completion("text")

    decoding = Decoding(max_tokens=7, temperature=0.5, top_k=3, stop=["\n"])
    ask_all(served(answer), [Asked("once", "", None)], decoding)
    assert bodies[0]["path"] == "/v1/completions"
    assert {key: bodies[0][key] for key in ("prompt", "max_tokens", "temperature", "top_k", "stop", "model")} == {
        "prompt": "once", "max_tokens": 7, "temperature": 0.5, "top_k": 3, "stop": ["\n"], "model": "judge",
    }  # fmt: skip


def test_an_endpoint_needs_a_model():
    with pytest.raises(ConfigError, match="which model"):
        Endpoint.of("https://example.org/v1")
    assert Endpoint.of("https://example.org#m").url == "https://example.org/v1"


@pytest.fixture
def numbers(tmp_path) -> str:
    """A run file whose rows ask for numbers, and whose answers are compared as they are."""
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{n}?", "completion": str(n)}) + "\n" for n in range(6))
    )
    source = {"path": str(tmp_path / "rows.jsonl"), "format": {"name": "prompt_completion", "chat": True}}
    run = {
        "name": "numbers",
        "model": {"path": "embedded"},
        "method": {"name": "lora"},
        "data": {"sources": [source], "held_out": [source]},
        "train": {"steps": 1},
        "evaluate": {"metrics": ["exact_match"], "examples": []},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(run))
    return str(tmp_path / "run.yaml")


def knows(numbers: str, asked: list[str] | None = None) -> Answerer:
    """A system that knows these; `asked` gets what it is asked."""

    def answer(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        number = body["messages"][0]["content"].rstrip("?")
        if asked is not None:
            asked.append(number)
        return 200, completion(number if number in numbers else "unknown")

    return answer


def test_an_endpoint_is_evaluated_and_judged(served, numbers, tmp_path, capsys):
    """A system over HTTP, and a judge over HTTP, through the command: no losses, scores, and the judge's verdicts."""
    systems = [served(knows("01")), served(knows("01234"))]
    names = [f"{each.url}#{name}" for each, name in zip(systems, ("weak", "strong"), strict=True)]
    referee = served(lambda path, body: prefers("unknown")(path, body))
    arguments = ["--like", numbers, "--to", str(tmp_path), "--judge", f"{referee.url}#referee"]
    assert call(["evaluate", *names, *arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [system["scores"]["exact_match"]["score"] for system in told["systems"]] == pytest.approx(
        [2 / 6, 5 / 6], abs=1e-5
    )
    assert all(system["loss"] is None for system in told["systems"])
    [judged] = told["judged"]
    assert (judged["system"], judged["than"]) == ("strong", "weak")
    assert (judged["better"], judged["tie"], judged["worse"]) == (0, 3, 3)  # this judge likes an honest "unknown"
    assert judged["prompt_tokens"] == 600
    assert told["overlap"]["exact"] == 6  # the rows held out are those of training
    assert call(["evaluate", *names, *arguments]) == 0
    text = capsys.readouterr().out
    assert "strong against weak, judged: better 0, tie 3, worse 3" in text
    assert "6 of 6 held-out rows (100.0 %) are training rows too" in text


def test_a_judges_failure_takes_no_answer_away(served, numbers, tmp_path, capsys):
    """The result is there and shown, with the judge's verdicts as far as they go; `--kept` judges it, asking nothing
    anew."""
    asked: list[str] = []
    weak, middling, strong = (served(knows(known, asked)) for known in ("01", "012", "01234"))
    names = [f"{each.url}#{name}" for each, name in ((weak, "weak"), (middling, "middling"), (strong, "strong"))]
    broken, calls = [True], [0]

    def referee(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        calls[0] += 1
        return (400, {"error": "no"}) if broken[0] and calls[0] > 2 else prefers("2")(path, body)

    judged_by = f"{served(referee).url}#referee"
    arguments = [*names, "--like", numbers, "--to", str(tmp_path), "--judge", judged_by]
    assert call(["evaluate", *arguments, "--json"]) == 3
    printed = capsys.readouterr()
    assert "the judge failed: the endpoint does not answer: HTTP 400" in printed.err
    assert "--kept" in printed.err
    assert len(asked) == 18
    kept = json.loads((tmp_path / "evaluation/result.json").read_text())
    assert kept["systems"] == json.loads(printed.out.splitlines()[-1])["systems"]
    assert [each["system"] for each in kept["judged"]] == ["middling"]
    answers = (tmp_path / "evaluation/answers.jsonl").read_text()
    assert len(answers.splitlines()) == 6

    broken[0] = False
    assert call(["evaluate", *arguments, "--kept", "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(each["system"], each["better"], each["tie"]) for each in told["judged"]] == [
        ("middling", 1, 5), ("strong", 1, 5),
    ]  # fmt: skip
    assert told["systems"] == kept["systems"]
    assert len(asked) == 18
    assert json.loads((tmp_path / "evaluation/result.json").read_text())["judged"] == told["judged"]
    assert (tmp_path / "evaluation/answers.jsonl").read_text() == answers

    assert call(["evaluate", *arguments, "--kept", "limit=3"]) == 2
    assert "other systems or settings" in capsys.readouterr().err
    assert call(["evaluate", *arguments[1:], "--kept"]) == 2
    assert "other systems or settings" in capsys.readouterr().err


def test_a_judge_without_answers_is_refused_before_anything_is_asked(served, numbers, tmp_path, capsys):
    asked: list[str] = []
    arguments = [f"{served(knows('0', asked)).url}#one", "--like", numbers, "metrics=[]", "--to", str(tmp_path)]
    assert call(["evaluate", *arguments, "--judge", "https://example.org/v1#referee"]) == 2
    assert "no answers to judge" in capsys.readouterr().err
    assert call(["evaluate", *arguments, "--kept"]) == 2
    assert "--kept goes with --judge" in capsys.readouterr().err
    assert not asked
