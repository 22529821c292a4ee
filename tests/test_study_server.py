"""The server over HTTP: the whole way of a rater, forty at once, and requests that nobody should send."""

import sqlite3
import sys

import numpy as np
import pytest
from study_raters import Judge, make_study

from coherent_ddrm.cli import main
from coherent_ddrm.study.analysis import analyse
from coherent_ddrm.study.answers import Answers
from coherent_ddrm.study.questions import sheet

pytest.importorskip("starlette")
pytest.importorskip("httpx")
from starlette.testclient import TestClient

from coherent_ddrm.study.server import make_app


@pytest.fixture
def study(tmp_path):
    return make_study(tmp_path, "AB", questions=3, catches=1)


@pytest.fixture
def client(tmp_path, study):
    with TestClient(make_app(tmp_path / "study", most_raters=4), raise_server_exceptions=False) as client:
        yield client


def join(client):
    """A new rater: the headers to use from now on."""
    made = client.post("/api/raters", json={})
    assert made.status_code == 201
    return {"authorization": f"Bearer {made.json()['rater']}"}


def answer(client, who, position, choice="left", **more):
    body = {"position": position, "choice": choice, "milliseconds": 700, **more}
    return client.post("/api/answers", json=body, headers=who)


def test_a_rater_comes_stops_and_goes_on(client, study, tmp_path):
    who = join(client)
    first = client.get("/api/sheet", headers=who).json()
    assert first == {"questions": [question.public() for question in sheet(study, 0)], "answered": 0}
    for position, choice in enumerate(["left", "right"]):
        assert answer(client, who, position, choice).json() == {"answered": position + 1}
    with TestClient(make_app(tmp_path / "study")) as restarted:
        again = restarted.get("/api/sheet", headers=who).json()
        assert again == {**first, "answered": 2} and answer(restarted, who, 2).status_code == 200
    ((_, kept),) = Answers(tmp_path / "study").all().items()
    assert [one.choice for one in kept] == ["left", "right", "left"] and kept[1].milliseconds == 700
    assert kept[1].chosen == first["questions"][1]["right"]


def test_out_of_turn(client):
    who = join(client)
    assert answer(client, who, 1).status_code == 409
    assert answer(client, who, 0).status_code == 200 and answer(client, who, 0, "right").status_code == 409
    assert client.get("/api/sheet", headers=who).json()["answered"] == 1


def test_pictures_by_id_only(client, study, tmp_path):
    for name in study.pictures[0].results:
        response = client.get(f"/pictures/{name}.png")
        assert response.status_code == 200 and response.headers["content-type"] == "image/png"
        assert response.content == (tmp_path / "study" / "pictures" / f"{name}.png").read_bytes()
    for path in (
        "../study.json",
        "..%2fstudy.json",
        "%2e%2e/study.json",
        "/etc/passwd",
        "study.json",
        "0" * 24 + ".png",
    ):
        for start in ("/pictures/", "/"):
            assert client.get(start + path).status_code == 404


def test_nothing_names_a_method_or_a_catch_trial(client, study, tmp_path):
    pages = [client.get("/").text, client.get("/api/sheet", headers=join(client)).text]
    assert not any(word in page for page in pages for word in ("by-A", "catch", "broken", "picture-0", str(tmp_path)))


def test_headers(client):
    for path in ("/", "/study.js", "/nothing", "/api/sheet"):
        headers = client.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
        assert "server" not in headers and "cache-control" in headers


BAD = {  # what is sent as an answer, the status
    "not JSON": (b"{", 422),
    "no object": (b"[]", 422),
    "missing": (b'{"position": 0, "choice": "left"}', 422),
    "too much": (b'{"position": 0, "choice": "left", "milliseconds": 1, "rater": 2}', 422),
    "choice": (b'{"position": 0, "choice": "both", "milliseconds": 1}', 422),
    "number as text": (b'{"position": "0", "choice": "left", "milliseconds": 1}', 422),
    "true as number": (b'{"position": 0, "choice": "left", "milliseconds": true}', 422),
    "negative": (b'{"position": -1, "choice": "left", "milliseconds": 1}', 422),
    "past the end": (b'{"position": 4, "choice": "left", "milliseconds": 1}', 422),
    "days": (b'{"position": 0, "choice": "left", "milliseconds": 86400001}', 422),
    "huge number": (b'{"position": 0, "choice": "left", "milliseconds": ' + b"9" * 400 + b"}", 422),
    "deep": (b"[" * 900, 422),
    "long": (b" " * 1001, 413),
    "bytes": (b"\xff\xfe\x00", 422),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_answers(client, case):
    content, status = BAD[case]
    who = join(client)
    response = client.post("/api/answers", content=content, headers={**who, "content-type": "application/json"})
    assert response.status_code == status and set(response.json()) == {"error"}
    assert client.get("/api/sheet", headers=who).json()["answered"] == 0


def test_who_may_answer(client):
    for header in (
        "",
        "Bearer",
        f"Bearer {'0' * 32}",
        f"Bearer {'0' * 31}\u00e9",
        "Basic eDp5",
        f"Bearer {'a' * 5000}",
    ):
        assert answer(client, {"authorization": header.encode("latin-1")}, 0).status_code == 401
        assert client.get("/api/sheet", headers={"authorization": header.encode("latin-1")}).status_code == 401
    form = client.post("/api/raters", content=b"{}", headers={"content-type": "text/plain"})
    assert form.status_code == 415  # what a form on another site could send
    assert client.get("/api/raters").status_code == 405 and client.delete("/").status_code == 405
    for _ in range(4):
        assert answer(client, join(client), 0).status_code == 200
    assert client.post("/api/raters", json={}).status_code == 403


def test_who_comes_back_to_a_sheet_that_is_gone_begins_anew(client, tmp_path):
    who = join(client)
    with sqlite3.connect(tmp_path / "study" / "answers.sqlite") as database:
        database.execute("UPDATE raters SET came = came - 1801")
    other = join(client)
    for response in (answer(client, who, 0), client.get("/api/sheet", headers=who)):
        assert response.status_code == 401 and "begin anew" in response.json()["error"]
    assert client.get("/api/sheet", headers=other).json()["answered"] == 0
    assert answer(client, join(client), 0).status_code == 200


def test_a_script_that_only_begins_is_stopped(client):
    assert [client.post("/api/raters", json={}).status_code for _ in range(201)] == [201] * 200 + [403]


def test_a_title_cannot_end_the_script(tmp_path):
    title = "</script><script>alert(1)</script>&{{policy}}"
    make_study(tmp_path, "AB", questions=3, catches=0, title=title)
    with TestClient(make_app(tmp_path / "study")) as client:
        page = client.get("/").text
    assert "alert(1)" in page and page.count("</script>") == 2 and "<script>alert" not in page


def test_forty_raters_at_once_are_recovered(tmp_path):
    """Interleaved: each answers one question in turn, as people do."""
    true = (0.8, 0.0, -0.8)
    study = make_study(tmp_path, "ABC", questions=6, catches=3)
    judges = [Judge(study, true, seed) for seed in range(40)]
    with TestClient(make_app(tmp_path / "study")) as client:
        people = [join(client) for _ in judges]
        sheets = [client.get("/api/sheet", headers=who).json()["questions"] for who in people]
        for position in range(9):
            for who, judge, questions in zip(people, judges, sheets, strict=True):
                shown = questions[position]
                assert answer(client, who, position, judge.choose(shown["left"], shown["right"])).status_code == 200
    results = analyse(tmp_path / "study")
    assert results["answers"]["raters_kept"] == 40 and results["answers"]["comparisons"] == 240
    for row, score in zip(results["methods"], true, strict=True):
        assert row["score_interval"][0] < score < row["score_interval"][1]
        assert row["score"] == pytest.approx(score, abs=0.5)
    assert np.ptp([row["asked"] for row in results["methods"]]) == 0


# -- the verb ----------------------------------------------------------------------------------------------------------


def test_a_missing_extra_is_named(tmp_path, study, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "starlette.applications", None)
    monkeypatch.delitem(sys.modules, "coherent_ddrm.study.server")
    assert main(["study", "serve", str(tmp_path / "study")]) == 2
    assert "pip install 'coherent-ddrm[study]'" in capsys.readouterr().err


def test_a_port_that_is_taken(tmp_path, study, capsys):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["study", "serve", str(tmp_path / "study"), "--port", port]) == 2
    assert "in use" in capsys.readouterr().err
    assert main(["study", "serve", str(tmp_path / "study"), "--port", "70000"]) == 2
