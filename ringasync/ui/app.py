"""The page's routes. GET only, nothing is changed; what comes from outside is text, never markup.

Safe by: Jinja's autoescape for every value; a content security policy that lets the browser run and
load nothing but this server's two static files; and, on a loopback address, a check of the host's
name, so that a page of another site cannot read this one through a name that it points here.
"""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ringasync.broker.client import Broker
from ringasync.config.schema import Config
from ringasync.errors import BrokerUnreachableError
from ringasync.observability.plain import printable
from ringasync.observability.record_views import history_rows, inspect_rows
from ringasync.ui import live

FOLDER = Path(__file__).parent
GROUPS_A_PAGE = 50
SAMPLES = 32
LOOPBACK = ("localhost", "127.0.0.1")
_ID = re.compile(r"[A-Za-z0-9._-]{1,80}")
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}

Page = Callable[[Request], Awaitable[Response]]


class SafeHeaders:
    """Puts ``HEADERS`` on every answer, errors included."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self._app(scope, receive, send_with_headers)


class Pages:
    """One run's pages."""

    def __init__(self, broker: Broker, config: Config) -> None:
        self._broker, self._run = broker, config.run.name
        self._live = live.LiveReader(broker, config)
        self._templates = Environment(
            loader=FileSystemLoader(FOLDER / "templates"),
            autoescape=select_autoescape(default=True),
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.filters["clock"] = lambda at_ms: time.strftime(
            "%H:%M:%S", time.gmtime(at_ms / 1000)
        )
        self._templates.filters["shown"] = lambda value: printable(str(value), "\n\t")

    async def run(self, _: Request) -> Response:
        """The live view."""
        return self._page("run.html", **await self._now())

    async def now(self, _: Request) -> Response:
        """The part of it that the browser fetches again and again."""
        return self._page("now.html", **await self._now())

    async def rollouts(self, request: Request) -> Response:
        """Groups that have not ended, newest first, a page of them with each rollout's state."""
        text = request.query_params.get("page", "1")
        page = int(text) if re.fullmatch(r"[1-9][0-9]{0,5}", text) else 1
        ids = sorted(await self._broker.live_groups(), reverse=True)
        chosen = ids[(page - 1) * GROUPS_A_PAGE : page * GROUPS_A_PAGE]
        return self._page(
            "rollouts.html",
            groups=await self._broker.group_states(chosen),
            total=len(ids),
            page=page,
            pages=max(1, -(-len(ids) // GROUPS_A_PAGE)),
        )

    async def rollout(self, request: Request) -> Response:
        """One rollout's life."""
        rollout = request.path_params["rollout"]
        if not _ID.fullmatch(rollout):
            raise HTTPException(404)
        fields, history = await self._broker.rollout(rollout), await self._broker.history(rollout)
        if not fields and not history:
            raise HTTPException(404, "nothing is known of it: no such rollout, or gone for an hour")
        group = await self._broker.group(rollout.rpartition(".")[0])
        sample = next(
            (s for s in await self._broker.samples(SAMPLES) if s.get("rollout") == rollout), None
        )
        return self._page(
            "rollout.html",
            rollout=rollout,
            rows=inspect_rows(fields or {}, group),
            history=history_rows(history),
            sample=sample,
        )

    async def find(self, request: Request) -> Response:
        """From the search field to the rollout's page."""
        rollout = request.query_params.get("id", "").strip()
        if not _ID.fullmatch(rollout):
            raise HTTPException(404, "a rollout's id looks like g000012.3")
        return RedirectResponse(request.url_for("rollout", rollout=rollout).path, 303)

    async def samples(self, _: Request) -> Response:
        """The newest graded answers."""
        return self._page("samples.html", samples=await self._broker.samples(SAMPLES))

    async def problem(self, _: Request, error: Exception) -> Response:
        """A page for what could not be shown."""
        if isinstance(error, HTTPException):
            return self._page("problem.html", error.status_code, why=error.detail)
        return self._page("problem.html", 503, why=str(error))

    async def _now(self) -> dict[str, Any]:
        snapshot = await self._live.snapshot()
        return {
            "problem": snapshot.problem,
            "stalls": snapshot.stalls,
            "headline": list(live.headline(snapshot)),
            "charts": list(live.charts(snapshot)),
            "queues": list(live.queues(snapshot)),
            "accounts": list(live.accounts(snapshot)),
            "balance": live.balance(snapshot),
            "sessions": live.session_rows(snapshot),
            "width": live.WIDTH,
            "height": live.HEIGHT,
        }

    def _page(self, template: str, status: int = 200, **values: Any) -> Response:
        text = self._templates.get_template(template).render(run=self._run, **values)
        # A lone surrogate in a model's text must not cost the page.
        return HTMLResponse(text.encode("utf-8", "replace"), status)


def make_app(broker: Broker, config: Config, *, any_host: bool = False) -> Starlette:
    """The application. ``any_host``: it is reached by names that are not known beforehand."""
    pages = Pages(broker, config)

    def route(path: str, page: Page) -> Route:
        return Route(path, page, methods=["GET"], name=path.split("/")[1])

    return Starlette(
        routes=[
            route("/", pages.run),
            route("/now", pages.now),
            route("/rollouts", pages.rollouts),
            route("/rollout/{rollout}", pages.rollout),
            route("/find", pages.find),
            route("/samples", pages.samples),
            Mount("/static", StaticFiles(directory=FOLDER / "static")),
        ],
        middleware=[
            Middleware(SafeHeaders),
            Middleware(TrustedHostMiddleware, allowed_hosts=["*"] if any_host else list(LOOPBACK)),
        ],
        exception_handlers={
            HTTPException: pages.problem,
            BrokerUnreachableError: pages.problem,
        },
    )
