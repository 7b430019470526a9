"""Messages without secrets: an option's value is shown to the user, but not the login in it."""

from __future__ import annotations

import os
import re

_ADDRESS = re.compile(r"(?:\b[a-z][a-z0-9+.-]{0,20}://|\bhttps?:/)\S+", re.IGNORECASE)
_LOGIN = re.compile(r"(?<![^\s/@:'\"])[^\s/@:'\"]{1,200}:[^\s/@'\"]{1,200}@")
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{16,}")  # the hub's have 34; hf_reward.py is none
_SECRET = re.compile(r".*(TOKEN|KEY|PASSWORD|SECRET)", re.IGNORECASE)


def without_secrets(text: str) -> str:
    """A message without logins and queries of addresses, tokens of the hub, and the environment's.

    The latter are what variables named ``…TOKEN``, ``…KEY``, ``…PASSWORD`` or ``…SECRET`` hold.
    What an address gives away goes from the whole message, which may quote a part of the address.
    """
    for secret in sorted(_secrets(text), key=len, reverse=True):
        text = text.replace(secret, "***")
    text = _ADDRESS.sub(lambda found: without_login(found[0]), text)
    return _TOKEN.sub("hf_***", _LOGIN.sub("", text))


def without_login(address: str) -> str:
    """An address without user, password, query and fragment."""
    scheme, _, place, _ = _parts(address)
    return scheme + place


def _parts(address: str) -> tuple[str, str, str, str]:
    """Scheme with its slashes, login, place, query.

    All up to the last ``@`` is the login, since passwords hold slashes too; one slash after the
    scheme is enough, which is what pathlib leaves.
    """
    found = re.match(r"[^/]*:/+", address)
    scheme = found[0] if found else ""
    login, _, rest = address[len(scheme) :].rpartition("@")
    place, *query = re.split(r"[?#]", rest, maxsplit=1)
    return scheme, login, place, "".join(query)


def _secrets(text: str) -> set[str]:
    found = {v for name, v in os.environ.items() if _SECRET.fullmatch(name) and len(v) >= 8}
    for address in set(_ADDRESS.findall(text)):
        _, login, _, query = _parts(address.rstrip(".,:;)'\""))
        found |= {login, login.partition(":")[2], query}
    found |= {pair[:-1].partition(":")[2] for pair in set(_LOGIN.findall(text))}
    return {secret for secret in found if len(secret) >= 4}  # a shorter one may be any word
