"""The chat page, with headers that let it load nothing from elsewhere."""
import base64
import functools
import hashlib
import os
import re

from starlette.responses import Response

from pydsa.server.errors import ApiError

PATH = os.path.join(os.path.dirname(__file__), "page.html")
_SCRIPT = re.compile(r"<script[^>]*>(.*?)</script>", re.DOTALL)


@functools.cache
def _page():
    """The page's bytes and headers; its scripts are allowed by their hashes."""
    with open(PATH, encoding="utf-8", newline="") as file:
        text = file.read().replace("\r\n", "\n")       # as browsers hash it
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in _SCRIPT.findall(text)]
    policy = ["default-src 'none'", "connect-src 'self'", "img-src data:", "style-src 'unsafe-inline'",
              " ".join(["script-src", *(f"'sha256-{value}'" for value in hashes)]), "base-uri 'none'", "form-action 'none'",
              "frame-ancestors 'none'"]
    return text.encode(), {"content-type": "text/html; charset=utf-8", "content-security-policy": "; ".join(policy),
                           "x-content-type-options": "nosniff", "referrer-policy": "no-referrer", "cache-control": "no-cache"}


async def page(service, request):
    """The chat page; it asks for a key itself, where one is needed."""
    if not os.path.exists(PATH):
        raise ApiError(404, "The chat page is not installed.")
    data, headers = _page()
    return Response(data, headers=headers)
