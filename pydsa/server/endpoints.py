"""Endpoints that generate nothing: health, models, tokenization, metrics, slots."""
import asyncio
import os
import re

from pydantic import Field
from starlette.responses import JSONResponse, Response

from pydsa.errors import ContextFullError, SessionFileError
from pydsa.saved.parts import is_part_name, saved_bytes
from pydsa.server.bodies import Fields, Listed, expected, read_fields
from pydsa.server.errors import ApiError, as_api_error
from pydsa.server.service import make_folder, owner_of

PARTIAL = ".part"   # the end of names of files that are being written
ROWS = ".rows"      # the end of names of files in which the engine keeps conversations
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,127}")       # no folders, nothing hidden, no names of streams


async def health(service, request):
    """Whether the model is loaded: 200, or 503."""
    service.ready()
    return JSONResponse({"status": "ok"})


def _model(service):
    """The model, its context by the names that other servers have for it.

    Clients that find none of them take a default, and cut conversations or overflow.
    """
    config, setup = service.model.config, service.model.setup
    return {"id": service.name, "object": "model", "created": service.created, "owned_by": "pydsa",
            "context_length": service.model.n_ctx, "max_model_len": service.model.n_ctx,
            "meta": {"n_ctx": service.model.n_ctx, "n_ctx_train": config.n_ctx_train, "n_vocab": config.n_vocab, "n_embd": config.n_embd,
                     "n_params": setup.n_params, "size": setup.n_bytes}}


async def models(service, request):
    """The list of the one model."""
    service.ready()
    return JSONResponse({"object": "list", "data": [_model(service)]})


async def model(service, request):
    """The model, by its name."""
    service.ready()
    name = request.path_params["name"]
    if name != service.name:
        raise ApiError(404, f"The model {name!r:.80} does not exist, expected {service.name!r}.", "model", "model_not_found")
    return JSONResponse(_model(service))


class TokenizeRequest(Fields):
    """The body of /tokenize."""
    content: str = Field(description="a text")
    add_special: bool | None = expected("true or false")
    parse_special: bool | None = expected("true or false")
    with_pieces: bool | None = expected("true or false")


async def tokenize(service, request):
    """Text -> token ids."""
    service.ready()
    body = await read_fields(request, TokenizeRequest)
    ids = await service.tokenize(body.content, bool(body.add_special) and service.model.tokenizer.add_bos, body.parse_special is not False)
    if body.with_pieces:
        return JSONResponse({"tokens": [{"id": i, "piece": _piece(service, i)} for i in ids]})
    return JSONResponse({"tokens": ids})


def _piece(service, token):
    """The text of a token, or its bytes if they are only part of a character."""
    data = service.model.tokenizer.token_bytes(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return list(data)


class DetokenizeRequest(Fields):
    """The body of /detokenize."""
    tokens: Listed[int] = Field(description="a list of token ids")


async def detokenize(service, request):
    """Token ids -> text."""
    service.ready()
    body = await read_fields(request, DetokenizeRequest)
    return JSONResponse({"content": await asyncio.to_thread(service.model.detokenize, body.tokens)})


async def metrics(service, request):
    """What Prometheus reads."""
    text, kind = service.metrics.text()
    return Response(text, headers={"content-type": kind})


async def slots(service, request):
    """What each slot does; how long another user's conversation is, is null."""
    service.ready()
    counts, owner = ("n_past", "n_prompt", "n_generated"), owner_of(request.scope)
    return JSONResponse([{"id": slot.id, "n_ctx": slot.n_ctx, "state": slot.state, "is_processing": slot.state != "idle"}
                         | {name: getattr(slot, name) if slot.owner == owner else None for name in counts}
                         for slot in service.engine.slots()])


class SlotRequest(Fields):
    """The body of /slots/{id}; an action that needs no file has none."""
    filename: str | None = expected("the name of a file")


async def slot(service, request):
    """Save, restore or erase the conversation of a slot."""
    service.ready()
    action, number, owner = request.query_params.get("action", ""), request.path_params["number"], owner_of(request.scope)
    number = int(number) if number.isascii() and number.isdecimal() and len(number) < 9 else -1
    if number not in range(service.engine.n_parallel):
        raise ApiError(404, f"There is no slot {request.path_params['number']!r:.40}, expected 0 to {service.engine.n_parallel - 1}.")
    if action == "erase":
        n = await asyncio.to_thread(service.engine.erase_slot, number, owner)
        return JSONResponse({"id_slot": number, "n_erased": n})
    if action not in ("save", "restore"):
        raise ApiError(400, f"The action is {action!r:.40}, expected save, restore or erase.", "action", "invalid_value")
    name = (await read_fields(request, SlotRequest)).filename
    path = _slot_path(service, name, owner)
    if action == "restore" and not os.path.isfile(path):
        raise ApiError(404, f"There is no saved slot {name!r}.", "filename")
    move = service.engine.save_slot if action == "save" else service.engine.restore_slot
    try:
        n = await asyncio.to_thread(move, number, path, owner)
    except (SessionFileError, ContextFullError) as error:       # where the files lie is no client's business
        told = as_api_error(type(error)(str(error).replace(path, f"The saved slot {name!r}")))
        raise ApiError(500 if action == "save" else 400, told.message, "filename", told.code) from error
    counts = {"n_saved": n, "n_written": saved_bytes(path)} if action == "save" else {"n_restored": n, "n_read": saved_bytes(path)}
    return JSONResponse({"id_slot": number, "filename": name} | counts)


def _slot_path(service, name, owner):
    """The path of a saved slot: a plain name, in a folder of its owner's."""
    folder = service.settings.slot_folder
    if folder is None:
        raise ApiError(400, "Slots cannot be saved here: the server was started without --slot-save-path.")
    if name is None:
        raise ApiError(400, "The field 'filename' is missing.", "filename", "missing_required_parameter")
    if not FILE_NAME.fullmatch(name) or name.endswith((ROWS, PARTIAL)) or is_part_name(name):
        raise ApiError(400, f"filename is {name!r:.80}, expected up to 128 letters, digits, points, - and _, without a point at the "
                            f"beginning, {ROWS} or {PARTIAL} at the end, and the form of a stage's part.", "filename", "invalid_value")
    if owner:
        folder = os.path.join(folder, f"of-{owner[:32]}")
        make_folder(folder)
    return os.path.join(folder, name)
