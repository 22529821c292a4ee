"""Serves a study: the page, the pictures under their ids, and three calls of JSON.

    POST api/raters                       -> {"rater": token}
    GET  api/sheet    Bearer token        -> {"questions": [...], "answered": n}
    POST api/answers  Bearer token        -> {"answered": n}, 409 if it is not the turn of that question

A rater is who holds the token; 401 where nobody does, or their sheet went to another for want of an answer. The page
keeps the token in the link (after #, so it reaches no log) and in the browser's storage; there are no cookies, so no
other site can answer in a rater's name. No path is ever made of what a request says: ids are looked up in the study.
"""

from __future__ import annotations

import re
import socket
from pathlib import Path

import uvicorn
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from coherent_ddrm.study.answers import Answer, Answers, Choice, OutOfTurn, Rater, Replaced, TooManyRaters
from coherent_ddrm.study.page import ASSETS, POLICY, asset, render
from coherent_ddrm.study.questions import PICTURES, Study, load, sheet

LONGEST = 1000  # bytes of a request's body
TOKEN = re.compile(r"Bearer ([0-9a-f]{32})")
NOBODY = "you are not known here, or did not answer for so long that your questions went to another; begin anew"
HEADERS = {
    "content-security-policy": f"{POLICY}; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


class SafeHeaders:
    """Adds HEADERS to every response."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                present = {name for name, _ in message["headers"]}
                more = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                more += [] if b"cache-control" in present else [(b"cache-control", b"no-store")]
                message["headers"] = [*message["headers"], *more]
            await send(message)

        await self.app(scope, receive, send_with_headers)


def make_app(folder: Path, most_raters: int = 1000) -> Starlette:
    """The study in `folder` as an ASGI application. UserError when there is no study."""
    service = Service(folder, load(folder), most_raters)
    routes = [
        Route("/", service.page),
        Route("/{name:str}", service.asset),
        Route("/pictures/{name:str}", service.picture),
        Route("/api/raters", service.admit, methods=["POST"]),
        Route("/api/sheet", service.sheet),
        Route("/api/answers", service.answer, methods=["POST"]),
    ]
    return Starlette(routes=routes, middleware=[Middleware(SafeHeaders)], exception_handlers={HTTPException: _as_json})


class Service:
    """What the routes do."""

    def __init__(self, folder: Path, study: Study, most_raters: int):
        self.study, self.answers, self.most = study, Answers(folder), most_raters
        self.files = {f"{name}.png": folder / PICTURES / f"{name}.png" for name in _ids(study)}

    def page(self, request: Request) -> Response:
        return Response(render(self.study, mode="server"), media_type="text/html")

    def asset(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in ASSETS:
            raise HTTPException(404, "not found")
        return Response(asset(name), media_type=ASSETS[name], headers={"cache-control": "no-cache"})

    def picture(self, request: Request) -> Response:
        file = self.files.get(request.path_params["name"])
        if file is None:
            raise HTTPException(404, "not found")
        cached = {"cache-control": "private, max-age=86400, immutable"}
        return Response(file.read_bytes(), media_type="image/png", headers=cached)

    async def admit(self, request: Request) -> Response:
        await _body(request)  # only JSON is taken, which a page of another site cannot send
        try:
            return JSONResponse({"rater": await run_in_threadpool(self.answers.admit, self.most)}, 201)
        except TooManyRaters as error:
            raise HTTPException(403, str(error)) from None

    def sheet(self, request: Request) -> Response:
        rater = self._rater(request)
        questions = [question.public() for question in sheet(self.study, rater.sheet)]
        return JSONResponse({"questions": questions, "answered": self.answers.count(rater)})

    async def answer(self, request: Request) -> Response:
        body = await _body(request)
        return await run_in_threadpool(self._answer, request, body)

    def _answer(self, request: Request, body: bytes) -> Response:
        rater = self._rater(request)
        try:
            given = Choice.model_validate_json(body)
        except ValidationError:
            raise HTTPException(422, "an answer has position, choice (left or right), milliseconds") from None
        questions = sheet(self.study, rater.sheet)
        if given.position >= len(questions):
            raise HTTPException(422, f"there are {len(questions)} questions")
        asked = questions[given.position]
        answer = Answer(given.position, asked.left, asked.right, given.choice, given.milliseconds)
        try:
            return JSONResponse({"answered": self.answers.add(rater, answer)})
        except OutOfTurn:
            raise HTTPException(409, "another question is next") from None
        except Replaced:
            raise HTTPException(401, NOBODY) from None

    def _rater(self, request: Request) -> Rater:
        token = TOKEN.fullmatch(request.headers.get("authorization", ""))
        rater = token and self.answers.rater(token[1])
        if rater is None:
            raise HTTPException(401, NOBODY)
        return rater


def serve(folder: Path, host: str, port: int, most_raters: int) -> None:
    """Serve until interrupted. UserError when there is no study, OSError when the port is taken."""
    config = uvicorn.Config(make_app(folder, most_raters), log_level="warning", server_header=False)
    with socket.create_server((host, port)) as listening:  # bound here: uvicorn would log and exit on its own
        host, port = listening.getsockname()[:2]
        print(f"http://{host}:{port}/ asks about {folder}; Ctrl-C ends", flush=True)
        uvicorn.Server(config).run(sockets=[listening])


async def _body(request: Request) -> bytes:
    """The body of a JSON request, never more than LONGEST bytes of it in memory."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise HTTPException(415, "send application/json")
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > LONGEST:
            raise HTTPException(413, "too long")
    return body


async def _as_json(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, headers=error.headers)


def _ids(study: Study) -> set[str]:
    """Every picture of the study."""
    found = set()
    for picture in study.pictures:
        found |= {picture.truth, picture.input, *picture.results}
        found |= {picture.catch.truth, picture.catch.broken} if picture.catch else set()
    return found
