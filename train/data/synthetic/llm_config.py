"""Which language model writes and grades the data, where it is served, and its time limits."""

from __future__ import annotations

import hashlib
import ipaddress
import json
import math
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fusedgpt.kernels.errors import InputError

_ENV_PREFIX = "FUSEDGPT_OLLAMA_TIMEOUT_"
HEURISTICS = "heuristics"  # instead of a model, refine.score_sample grades
_DEFAULT_HOSTS = {"ollama": "http://localhost:11434", "openai": "http://localhost:8000"}
_ACCELERATORS = ("/dev/nvidia0", "/dev/kfd", "/dev/nvhost-gpu")  # CUDA, ROCm, Jetson
# Where clouds serve credentials, besides link-local addresses: Alibaba, Azure, AWS, Google, Oracle, Scaleway.
_METADATA = [
    ipaddress.ip_network(network)
    for network in (
        *("100.100.100.200", "168.63.129.16"),
        *("fd00:ec2::/32", "fd20:ce::/32", "fd00:c1::/32", "fd00:42::/32"),
    )
]
# IPv6 with an IPv4 address in the last 32 bits: compatible, mapped, translated, NAT64, local NAT64.
_HOLDS_IPV4 = [
    ipaddress.IPv6Network(network)
    for network in ("::/96", "::ffff:0:0/96", "::ffff:0:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48")
]


class Timeouts(NamedTuple):
    """Seconds: to connect, per answer, per grade, before the first retry, and in total."""

    connect: float
    generation: float
    grading: float
    interval: float
    total: float


PRESETS = {
    "gpu": Timeouts(connect=5, generation=30, grading=10, interval=0.5, total=4 * 3600),
    "cpu": Timeouts(connect=5, generation=300, grading=60, interval=1.0, total=48 * 3600),
}


def _setting(default: Any, text: str, *, unset: str = "", **limits: Any) -> Any:
    """A field as in train/config.py, whose --help shows `unset` as the default if that is None."""
    return Field(default=default, description=text, json_schema_extra={"unset": unset}, **limits)


def _seconds(name: str, purpose: str) -> Any:
    """A field that overrides one number of the preset."""
    return _setting(None, f"Seconds {purpose}; overrides {_ENV_PREFIX}{name}.", unset="by --timeouts", gt=0)


class LLMConfig(BaseModel):
    """Where the texts come from, and how to reach the server that writes and grades them."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    data_source: Literal["template", "ollama", "openai"] = _setting(
        "template", "What writes and grades texts; openai is any OpenAI-compatible server."
    )
    llm_host: str | None = _setting(
        None, "URL of the server.", unset="http://localhost, port 11434 for ollama, 8000 for openai"
    )
    gen_model: str | None = _setting(None, "The model that writes the samples.")
    refine_model: str | None = _setting(
        None, f"The model that grades them, or {HEURISTICS} for none.", unset="--gen-model"
    )
    llm_endpoint: Literal["chat", "completions"] = _setting(
        "chat", "Endpoint of an openai server; completions works without a chat template."
    )
    llm_concurrency: int = _setting(4, "Requests in flight.", ge=1, le=64)
    llm_max_tokens: int = _setting(768, "Maximum tokens per answer.", ge=16, le=32_768)
    llm_api_key_env: str | None = _setting(
        None, "Environment variable of the API key.", unset="OPENAI_API_KEY, for api.openai.com"
    )
    llm_allow_http: bool = _setting(
        False, "Send the API key unencrypted where --llm-host is http:// and not this machine."
    )
    timeouts: Literal["auto", "gpu", "cpu"] = _setting(
        "auto", "Time limits for a server with or without a GPU; auto looks for one."
    )
    timeout_connect: float | None = _seconds("CONNECT", "to connect")
    timeout_generation: float | None = _seconds("GENERATION", "per answer")
    timeout_grading: float | None = _seconds("GRADING", "per grade")
    timeout_interval: float | None = _seconds("INTERVAL", "before the first retry")
    timeout_total: float | None = _seconds("TOTAL", "for all generation and grading")
    fallback: Literal["none", "templates"] = _setting(
        "none", "What writes the missing texts if the server fails; none stops with an error."
    )

    @model_validator(mode="after")
    def _checks(self) -> Self:
        if self.llm_host is not None:
            check_host(self.llm_host)
        name = self.llm_api_key_env
        if name is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,99}", name):
            raise InputError("llm_api_key_env must name an environment variable; the key itself goes in it")
        if "data_source" not in self.model_fields_set:
            for given in ("llm_host", "gen_model", "refine_model", "llm_api_key_env"):
                if getattr(self, given) not in (None, HEURISTICS):
                    unused = f"{given} is given, but no model is used"
                    raise InputError(f"{unused}: add --data-source ollama or openai")
        return self

    @property
    def origin(self) -> str:
        """The server's URL, without a slash or /v1 at its end."""
        host = self.llm_host or _DEFAULT_HOSTS.get(self.data_source, "")
        return host.rstrip("/").removesuffix("/v1")

    @property
    def grader(self) -> str | None:
        """The model that grades, None for the heuristics; "" if it should be a model and none is named."""
        if self.data_source == "template" or self.refine_model == HEURISTICS:
            return None
        return self.refine_model or self.gen_model or ""

    def resolve_timeouts(self, environ: Mapping[str, str] = os.environ) -> Timeouts:
        """Each from its flag, else its environment variable, else the preset. Raises ValueError."""
        kind = self.timeouts if self.timeouts != "auto" else _guess_preset(self.origin)
        changed: dict[str, float] = {}
        for name in Timeouts._fields:
            variable = _ENV_PREFIX + name.upper()
            if (value := getattr(self, f"timeout_{name}")) is not None:
                changed[name] = value
            elif variable in environ:
                changed[name] = _positive(variable, environ[variable])
        return PRESETS[kind]._replace(**changed)

    def api_key(self, environ: Mapping[str, str] = os.environ) -> str | None:
        """The key for the server, None if it needs none. Raises ValueError, without showing the key."""
        name = self.llm_api_key_env or ("OPENAI_API_KEY" if self.origin == "https://api.openai.com" else None)
        if name is None:
            return None
        key = environ.get(name, "").strip()
        if not key:
            shown = name if name.isupper() else "of --llm-api-key-env"  # users may have given the key itself
            raise InputError(
                f"the environment variable {shown} holds no API key for {self.origin}; export one"
            )
        if not (key.isascii() and key.isprintable() and " " not in key):
            raise InputError(f"the environment variable {name} holds characters that no API key has")
        return key

    def fingerprint(self, prompt: str, domain: str, seed: int) -> str:
        """A hash of what a file of samples is made for; only with the same one may it be continued."""
        made_by = {"source": self.data_source, "model": self.gen_model, "endpoint": self.llm_endpoint}
        made_for = {"prompt": prompt, "domain": domain, "seed": seed, "max_tokens": self.llm_max_tokens}
        text = json.dumps([made_by, made_for], sort_keys=True)  # ASCII, even for lone surrogates
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_host(url: str) -> None:
    """Raises ValueError unless it is a plain http or https URL of a host that may be contacted."""
    if "@" in url:  # not shown: it may hold a password
        raise InputError("llm_host holds a user name or password; name the key's variable: --llm-api-key-env")
    try:
        parts = urlsplit(url)
        fine = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        fine = False
    if not fine or parts.query or parts.fragment or not url.isprintable() or " " in url or "\\" in url:
        raise InputError(f"llm_host {url!r} is not an http:// or https:// URL like http://localhost:11434")
    try:
        address = str(ipaddress.ip_address(parts.hostname or ""))
    except ValueError:
        return  # a name, whose addresses are checked before connecting
    check_address(address)


def check_address(address: str) -> None:
    """Raises ValueError for a multicast or link-local address, and for those of cloud metadata services.

    IPv6 addresses that lead to such an IPv4 one, by NAT64, 6to4, Teredo or mapping, are refused too.
    """
    ip = ipaddress.ip_address(address)
    for each in (ip, *_ipv4_within(ip)):
        if each.is_link_local or each.is_multicast or any(each in network for network in _METADATA):
            kind = "link-local, multicast or a cloud's metadata service"
            raise InputError(f"llm_host leads to {address}, which is {kind} and never contacted")


def _ipv4_within(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> list[ipaddress.IPv4Address]:
    """The IPv4 addresses that an IPv6 address holds."""
    if isinstance(ip, ipaddress.IPv4Address):
        return []
    last = [ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)] if any(ip in net for net in _HOLDS_IPV4) else []
    return [*last, *filter(None, (ip.sixtofour, *(ip.teredo or ())))]


def is_loopback(address: str) -> bool:
    """Whether what is sent to the address stays on this machine."""
    ip = ipaddress.ip_address(address)
    ip = getattr(ip, "ipv4_mapped", None) or ip
    return ip.is_loopback or ip.is_unspecified


def _guess_preset(origin: str) -> str:
    """gpu, unless the server is on this machine and this machine has no GPU."""
    if urlsplit(origin).hostname not in ("localhost", "127.0.0.1", "::1", "0.0.0.0"):
        return "gpu"
    metal = platform.system() == "Darwin" and platform.machine() == "arm64"
    return "gpu" if metal or any(Path(device).exists() for device in _ACCELERATORS) else "cpu"


def _positive(variable: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise InputError(f"{variable} is {text!r}, not a positive number of seconds")
    return value
