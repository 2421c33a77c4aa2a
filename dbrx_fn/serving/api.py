"""The HTTP API: OpenAI's completions and chats, vLLM's tokenizing, health, metrics, and the chat page."""

from collections.abc import Awaitable, Callable

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from dbrx_fn.errors import DbrxError
from dbrx_fn.serving.access import Access
from dbrx_fn.serving.answers import Answers
from dbrx_fn.serving.chat_completions import read_chat
from dbrx_fn.serving.completions import read_completion
from dbrx_fn.serving.failures import client_gone, fault, json_response, no_endpoint, refused
from dbrx_fn.serving.gate import Gate
from dbrx_fn.serving.openai_objects import Object, models, one_model
from dbrx_fn.serving.page import read_page
from dbrx_fn.serving.served_model import ServedModel
from dbrx_fn.serving.service import Service
from dbrx_fn.serving.token_requests import detokenized, tokenized, tokenizer_info

Endpoint = Callable[[Request], Awaitable[Response]]


def make_app(service: Service, access: Access) -> Starlette:
    """The API as an ASGI application.

    Args:
        service: serves the requests.
        access: who may send requests.
    """
    middleware = [Middleware(Gate, access=access, service=service)]
    if access.origins:
        cross_origin = Middleware(
            CORSMiddleware,
            allow_origins=sorted(access.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After"],
        )
        middleware.insert(0, cross_origin)
    app = Starlette(
        routes=_routes(service),
        middleware=middleware,
        exception_handlers={
            HTTPException: no_endpoint,
            DbrxError: refused,
            ClientDisconnect: client_gone,
            Exception: fault,
        },
    )
    # A redirect would repeat the host name that the client sent.
    app.router.redirect_slashes = False
    return app


def _routes(service: Service) -> list[Route]:
    return [
        Route("/", _page()),
        Route("/health", _health(service)),
        Route("/metrics", _figures(service)),
        Route("/v1/models", _models(service)),
        Route("/v1/models/{name:path}", _one_model(service)),
        Route("/v1/completions", Answers(service, "completion", read_completion), methods=["POST"]),
        Route("/v1/chat/completions", Answers(service, "chat", read_chat), methods=["POST"]),
        Route("/tokenizer_info", _tokenizer_info(service)),
        Route("/tokenize", _reading(service, tokenized), methods=["POST"]),
        Route("/detokenize", _reading(service, detokenized), methods=["POST"]),
    ]


def _page() -> Endpoint:
    page = read_page()

    async def show(request: Request) -> Response:
        if page is None:
            raise HTTPException(404)
        return Response(page.content, headers=page.headers, media_type="text/html")

    return show


def _health(service: Service) -> Endpoint:
    async def health(request: Request) -> Response:
        status = "ok" if service.is_well else "ending" if service.draining else "failed"
        return json_response({"status": status}, 200 if service.is_well else 503)

    return health


def _figures(service: Service) -> Endpoint:
    async def figures(request: Request) -> Response:
        return Response(service.metrics.page(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    return figures


def _models(service: Service) -> Endpoint:
    async def all_models(request: Request) -> Response:
        return json_response(models(service.model))

    return all_models


def _one_model(service: Service) -> Endpoint:
    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in service.model.names:
            raise service.model.unknown(name)
        return json_response(one_model(service.model, name))

    return model


def _tokenizer_info(service: Service) -> Endpoint:
    async def info(request: Request) -> Response:
        return json_response(tokenizer_info(service.model))

    return info


def _reading(service: Service, answer: Callable[[bytes, ServedModel], Object]) -> Endpoint:
    """An endpoint that needs only a body and the model."""

    async def answered(request: Request) -> Response:
        with service.one_more_open():
            return json_response(await service.read(request, answer))

    return answered
