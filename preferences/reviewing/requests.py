"""Which requests the review page's routes answer: those of the page itself, never those of another site."""

import ipaddress
import os
import socket
from urllib.parse import urlsplit

from aiohttp import web

_HOSTS_VARIABLE = "SAFETY_EXPERTS_HOSTS"
_OWN_SITE = ("same-origin", "none")  # none: typed, or opened from a terminal


class Refused(Exception):
    """A request that is not answered.

    Args:
        status: the HTTP status.
        message: what is wrong, and the remedy.
    """

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


def check_same_origin(request: web.Request) -> None:
    """Raise `Refused` for a request that another site made a browser send, or that came by a name not ours.

    A site cannot read our answers, but it can send; and by DNS rebinding (its own name leading to this machine) it
    would be taken for ourselves. A browser says who asks in `Origin` and `Sec-Fetch-Site`, which no script can set.
    """
    headers = request.headers
    site = headers.get("Sec-Fetch-Site", "").lower()
    if site and site not in _OWN_SITE:
        raise Refused(403, f"refused a {site} request; open the review page itself")
    if len(headers.getall("Host", [])) != 1:
        raise Refused(403, "refused a request without one Host header")
    host = _authority(f"//{headers['Host']}")
    if host is None:
        raise Refused(403, "refused a request with a broken Host header")
    # Browsers send Sec-Fetch-Site only to https and loopback addresses, whose names cannot be rebound.
    if not (site or _is_our_name(host[0])):
        raise Refused(
            403, f"refused a request to an unknown host name; set {_HOSTS_VARIABLE} to the names of this server"
        )
    if "Origin" in headers:
        origins = [_authority(origin) for origin in headers.getall("Origin")]
        if origins != [host]:
            raise Refused(403, "refused a request from another origin; open the review page itself")


def _authority(url: str) -> tuple[str, int | None] | None:
    """Return (host, port) of `//host:port` or `scheme://host:port`, None for a usual port; None where it is neither."""
    try:
        parts = urlsplit(url)
        name, port = parts.hostname, parts.port
    except ValueError:
        return None
    if not name or parts.username is not None or parts.path or parts.query or parts.fragment:
        return None
    return name, None if port in (80, 443) else port


def _is_our_name(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
        return True  # an address is no name that could be made to lead elsewhere
    except ValueError:
        pass
    machine = socket.gethostname().lower()
    further = {given.strip().lower() for given in os.environ.get(_HOSTS_VARIABLE, "").split(",")}
    return name in {"localhost", machine, f"{machine}.local", *further}
