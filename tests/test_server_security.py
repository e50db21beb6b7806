"""Who may use pydsa serve: keys, hosts, origins, and what one key's user sees of another's."""
import base64
import hashlib
import re

import pytest
from serving import TINY, address, call, post, serving

from pydsa.errors import OutOfMemoryError, PydsaError, StageError
from pydsa.server import guard, page
from pydsa.server.errors import as_api_error
from pydsa.engine.requests import Cancelled
from pydsa.server.running import serve
from pydsa.server.service import Service
from pydsa.server.settings import Settings, read_keys

CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "The secret of the kettle is 4711, and nobody else knows it."}], "max_tokens": 2}
ANN, BOB = {"authorization": "Bearer ann-key"}, {"x-api-key": "bob schlüssel".encode().decode("latin-1")}


@pytest.fixture(scope="module")
def model(small_model, load):
    return load(small_model(**TINY), n_ctx=1024, device="reference", threads=None)


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    with serving(model, keys=("ann-key", "bob schlüssel"), slot_folder=str(tmp_path_factory.mktemp("slots")), allowed_hosts=("box.lan",),
                 cors_origins=("https://chat.example",)) as server:
        yield server


def test_keys(server):
    assert post(server, CHAT, BODY, **ANN)[0] == post(server, CHAT, BODY, **BOB)[0] == 200
    for headers in ANN | {"x-api-key": "dummy"}, BOB | {"authorization": "Bearer dummy"}:
        assert post(server, CHAT, BODY, **headers)[0] == 200
    assert call(server, "GET", "/health")[0] == 200 and call(server, "GET", "/")[0] in (200, 404)
    for headers in ({}, {"authorization": "Bearer ann-ke"}, {"authorization": "Bearer"}, {"authorization": "Basic ann-key"},
                    {"x-api-key": ""}, {"authorization": "ann-key"}, {"x-api-key": "ÿ"}):
        for path in (CHAT, "/tokenize", "/slots/0?action=erase", "/nothing"):
            status, body = post(server, path, BODY, **headers)
            assert status == 401 and body["error"]["code"] == "invalid_api_key"
        for path in ("/v1/models", "/metrics", "/slots"):
            assert call(server, "GET", path, **headers)[0] == 401
    assert post(server, "/v1/messages", BODY)[1]["error"]["type"] == "authentication_error"


def test_keys_are_compared_in_constant_time(monkeypatch, server):
    """Every key is, whether or not one before it was right."""
    compared = []
    monkeypatch.setattr(guard.hmac, "compare_digest", lambda a, b: compared.append(a) or a == b)
    call(server, "GET", "/v1/models", **ANN)
    assert compared == [b"ann-key", "bob schlüssel".encode()]


def test_prefixes_belong_to_a_key(server):
    body = BODY | {"messages": [{"role": "user", "content": "What was said between Ann and the kettle in the autumn?"}]}

    def cached(headers):
        return post(server, CHAT, body, **headers)[1]["usage"]["prompt_tokens_details"]["cached_tokens"]
    cached(ANN)
    assert cached(ANN) > 20 and cached(BOB) < 5 and cached(BOB) > 20      # what all prompts begin with


def test_saved_slots_belong_to_a_key(server):
    body = BODY | {"id_slot": 1}
    post(server, CHAT, body, **ANN)
    assert post(server, "/slots/1?action=save", {"filename": "a.bin"}, **ANN)[0] == 200
    assert call(server, "GET", "/slots", **ANN)[2][1]["n_past"] > 20 and call(server, "GET", "/slots", **BOB)[2][1]["n_past"] is None
    for action, body in (("save", {"filename": "b.bin"}), ("erase", None)):
        status, answer = post(server, f"/slots/1?action={action}", body, **BOB)
        assert status == 400 and "another user" in answer["error"]["message"]
    assert post(server, "/slots/1?action=restore", {"filename": "a.bin"}, **BOB)[0] == 404
    assert post(server, "/slots/1?action=restore", {"filename": "a.bin"}, **ANN)[0] == 200


def test_where_saved_slots_lie_is_not_told(server, small_model, load):
    """... also where the context is too small for one."""
    post(server, CHAT, BODY | {"id_slot": 1}, **ANN)
    post(server, "/slots/1?action=save", {"filename": "a.bin"}, **ANN)
    small = load(small_model(**TINY), n_ctx=16, device="reference", threads=None)
    with serving(small, keys=("ann-key",), slot_folder=server.service.settings.slot_folder) as other:
        status, body = post(other, "/slots/0?action=restore", {"filename": "a.bin"}, **ANN)
    assert status == 400 and body["error"]["code"] == "context_length_exceeded"
    assert body["error"]["message"].startswith("The saved slot 'a.bin': the session has ")


def test_a_server_that_is_stopped_while_it_loads(model):
    """The engine that comes too late ends too."""
    service = Service(Settings(port=0))
    service.close()
    service.start(model)
    with pytest.raises(Cancelled, match="closed"):
        service.engine.erase_slot(0, "")


@pytest.mark.parametrize("host, status", [
    ("localhost", 200), ("localhost:8080", 200), ("127.0.0.1:1", 200), ("[::1]:80", 200), ("LOCALHOST", 200), ("box.lan:8080", 200),
    ("localhost.", 200), ("a.localhost", 200), ("evil.example", 403), ("localhost.evil.example", 403), ("127.0.0.1.evil.example", 403),
    ("192.168.1.5", 403), ("", 403), ("evil.example@localhost", 403), ("localhost@evil.example", 403), ("[::1", 403), ("localhost/x", 403)])
def test_hosts(server, host, status):
    """Names that others can bind to this machine's address are refused."""
    assert call(server, "GET", "/health", host=host)[0] == status


def test_hosts_of_a_public_server(model):
    """Addresses are allowed, as nobody can bind another name to them."""
    with serving(model, host="0.0.0.0") as server:
        for host, status in (("192.168.1.5:8080", 200), ("[2001:db8::1]", 200), ("localhost", 200), ("evil.example", 403)):
            assert call(server, "GET", "/health", host=host)[0] == status


def test_origins(server):
    own = "http://{}:{}".format(*address(server))
    for origin, status in ((own, 200), ("https://chat.example", 200), ("https://evil.example", 403), ("null", 403),
                           ("http://127.0.0.1:1", 403), ("https://chat.example.evil", 403)):
        met, headers, _ = call(server, "POST", CHAT, BODY, origin=origin, **ANN)
        assert met == status
        assert headers.get("access-control-allow-origin") == (origin if origin == "https://chat.example" else None)


def test_preflight_requests(server):
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    status, headers, _ = call(server, "OPTIONS", CHAT, origin="https://chat.example", **asked)
    assert status == 200 and "authorization" in headers["access-control-allow-headers"].lower()
    assert call(server, "OPTIONS", CHAT, origin="https://evil.example", **asked)[0] == 403
    # errors bear the header too, as a page could not read them otherwise
    assert call(server, "GET", "/v1/models", origin="https://chat.example")[1]["access-control-allow-origin"] == "https://chat.example"


def test_without_origins_there_is_no_cors(model):
    with serving(model) as server:
        for method in ("GET", "OPTIONS"):
            status, headers, _ = call(server, method, "/v1/models", origin="https://chat.example")
            assert status == 403 and not any(name.lower().startswith("access-control") for name in headers)
    with serving(model, cors_origins=("*",)) as server:
        assert call(server, "GET", "/v1/models", origin="https://any.example")[1]["access-control-allow-origin"] == "*"


def test_files_of_keys(tmp_path):
    path = tmp_path / "keys"
    path.write_text("\ufeff# of the team\none\n\n two \n", encoding="utf-8")      # as editors of Windows begin files
    assert read_keys(("zero", "one"), path) == ("zero", "one", "two")
    for text in ("", "# nothing\n", "a\x01b\n"):
        path.write_text(text)
        with pytest.raises(PydsaError, match="key"):
            read_keys((), path)
    with pytest.raises(PydsaError, match="API key 1"):
        read_keys(("",))


def test_the_page_may_load_nothing_else(server, monkeypatch, tmp_path):
    """Only its own scripts run, and nothing comes from elsewhere."""
    script = "\nlet a = '<é>';\n"
    (tmp_path / "page.html").write_bytes(f"<!doctype html><script>{script}</script>".replace("\n", "\r\n").encode())
    monkeypatch.setattr(page, "PATH", tmp_path / "page.html")
    page._page.cache_clear()
    status, headers, text = call(server, "GET", "/")
    page._page.cache_clear()
    policy = headers["content-security-policy"]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert status == 200 and script in text and "default-src 'none'; connect-src 'self'" in policy
    assert re.search("script-src ([^;]*)", policy)[1] == f"'sha256-{digest}'"


def test_a_warning_where_anybody_can_ask(monkeypatch, capfd):
    monkeypatch.setattr("pydsa.server.running.Server.run", lambda self, sockets: None)

    def load():
        raise PydsaError("no model")
    with pytest.raises(PydsaError, match="no model"):
        serve(Settings(host="0.0.0.0", port=0), load)
    assert "warning: anybody" in capfd.readouterr().err


@pytest.mark.parametrize("error, said", [
    (StageError("Stage 2 of 3 (layers 1-2, node 10.0.0.2) has failed: nothing answers at 10.0.0.2:41000"), "the server's log has it"),
    (OutOfMemoryError("Stage 1 of 2 (layer 0, node fd00::2): the caches are large"), "Stage 1 of 2 (layer 0): the caches are large.")])
def test_addresses_of_nodes_are_no_clients_business(error, said):
    met = as_api_error(error)
    assert met.status == 500 and said in met.message and "node" not in met.message and "10.0" not in met.message
