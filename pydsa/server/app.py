"""The routes of the server, as one ASGI app."""
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import Route

from pydsa.server import anthropic, endpoints
from pydsa.server.errors import ApiError, as_api_error, error_response
from pydsa.server.guard import GONE, Guard, Keys, Log, Paths
from pydsa.server.openai_chat import chat_completions
from pydsa.server.openai_completions import completions
from pydsa.server.page import page
from pydsa.server.service import ClientGone

# (method, paths, function of the service and the request)
ROUTES = [("GET", ("/", "/index.html"), page),
          ("GET", ("/health", "/v1/health"), endpoints.health),
          ("GET", ("/v1/models", "/models"), endpoints.models),
          ("GET", ("/v1/models/{name:path}", "/models/{name:path}"), endpoints.model),
          ("POST", ("/v1/chat/completions", "/chat/completions"), chat_completions),
          ("POST", ("/v1/completions", "/completions"), completions),
          ("POST", ("/v1/messages",), anthropic.messages),
          ("POST", ("/v1/messages/count_tokens",), anthropic.count_tokens),
          ("POST", ("/tokenize",), endpoints.tokenize),
          ("POST", ("/detokenize",), endpoints.detokenize),
          ("GET", ("/metrics",), endpoints.metrics),
          ("GET", ("/slots",), endpoints.slots),
          ("POST", ("/slots/{number}",), endpoints.slot)]


def make_app(service):
    """The ASGI app that answers for a Service."""
    routes = [Route(path, _endpoint(service, function, path), methods=[method]) for method, paths, function in ROUTES for path in paths]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _refuse_route})
    app.router.redirect_slashes = False
    app = Keys(app, service.settings.keys)
    if service.settings.cors_origins:
        app = CORSMiddleware(app, service.settings.cors_origins, allow_methods=["GET", "POST"], allow_headers=["*"])
    return Paths(Log(Guard(app, service.settings), service))


def _endpoint(service, function, path):
    """The endpoint of a route: a function's response, or its error's."""
    async def answer(request):
        request.scope["pydsa.route"] = path
        try:
            return await function(service, request)
        except (ClientDisconnect, ClientGone):
            return Response(status_code=GONE)       # for the log
        except Exception as error:
            error = as_api_error(error)
            request.scope["pydsa.log"]["error"] = error.message
            return error_response(request.url.path, error)
    return answer


async def _refuse_route(request, error):
    """What Starlette itself refuses: paths and methods."""
    path, status = request.url.path, error.status_code
    if status == 405:
        return error_response(path, ApiError(405, f"{request.method:.20} is not allowed here, expected {error.headers['Allow']}."))
    return error_response(path, ApiError(status, f"There is nothing at {path:.80}.", code="unknown_url"))
