"""LLMConfig: what is refused, where each timeout comes from, where the API key may go."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from fusedgpt.train.data.synthetic import llm_config
from fusedgpt.train.data.synthetic.llm_config import PRESETS, LLMConfig, check_address, is_loopback


@pytest.mark.parametrize(
    "host",
    [
        "http://localhost:11434",
        "https://api.example.com",
        "http://192.168.1.7:8000/v1/",
        "http://[::1]:11434",
        "https://openrouter.ai/api",
    ],
)
def test_hosts(host: str) -> None:
    assert LLMConfig(data_source="openai", llm_host=host).origin == host.rstrip("/").removesuffix("/v1")


@pytest.mark.parametrize(
    "host",
    [
        "localhost:11434",
        "ftp://localhost",
        "file:///etc/passwd",
        "http://",
        "http://host:port",
        "http://host:99999",
        "http://host/?a=b",
        "http://host/#a",
        "http://ho st",
        "http://host\n",
        "http:\\\\host",
        "http://169.254.169.254",
        "http://[fe80::1]",
        "http://[fe80::1%25eth0]",
        "http://[::ffff:169.254.169.254]",
        "http://[64:ff9b::a9fe:a9fe]",
        "http://224.0.0.1",
        "",
    ],
)
def test_hosts_refused(host: str) -> None:
    with pytest.raises(ValidationError, match="llm_host"):
        LLMConfig(data_source="ollama", llm_host=host)


def test_a_password_or_key_is_refused_and_not_shown() -> None:
    for options in (
        {"llm_host": "http://me:hunter2@host"},
        {"llm_host": "http://hunter2@host"},
        {"llm_api_key_env": "sk-hunter2"},
    ):
        with pytest.raises(ValidationError) as caught:
            LLMConfig(data_source="openai", **options)  # type: ignore[arg-type]
        assert "hunter2" not in caught.value.errors()[0]["msg"]
        assert caught.value.errors()[0]["type"] == "value_error"  # those are shown without their input


@pytest.mark.parametrize(
    "address",
    [
        *("169.254.1.1", "fe80::1%eth0", "224.0.0.1", "ff02::1"),
        *("100.100.100.200", "168.63.129.16", "fd00:ec2::254", "fd20:ce::254", "fd00:c1::a9fe:a9fe"),
        *("::a9fe:a9fe", "::ffff:169.254.169.254", "::ffff:0:169.254.169.254", "::ffff:100.100.100.200"),
        *("64:ff9b::a9fe:a9fe", "64:ff9b:1::a9fe:a9fe", "64:ff9b::6464:64c8"),
        *("2002:a9fe:a9fe::", "2002:a9fe:a9fe::1", "2001:0:a9fe:a9fe::1", "2001:0:1::5601:5601"),
    ],
)
def test_addresses_refused(address: str) -> None:
    with pytest.raises(ValueError, match="link-local, multicast or a cloud's metadata service"):
        check_address(address)


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "::1", "192.168.1.7", "100.100.100.201", "8.8.8.8", "fd00:ec3::254"),
        *("::ffff:10.0.0.1", "64:ff9b::808:808", "2002:808:808::1", "2606:4700::a9fe:a9fe"),
    ],
)
def test_other_addresses_are_contacted(address: str) -> None:
    check_address(address)


def test_what_stays_on_this_machine() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.8.0.1", "::1", "::ffff:127.0.0.1", "0.0.0.0", "::")))
    assert not any(map(is_loopback, ("10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "fd00::1", "8.8.8.8")))


def test_presets_are_those_of_the_issue() -> None:
    assert PRESETS["gpu"][:4] == (5, 30, 10, 0.5)
    assert PRESETS["cpu"][:4] == (5, 300, 60, 1.0)


def test_a_flag_goes_before_its_variable_and_both_before_the_preset() -> None:
    environ = {"FUSEDGPT_OLLAMA_TIMEOUT_GENERATION": "7.5", "FUSEDGPT_OLLAMA_TIMEOUT_GRADING": "8"}
    config = LLMConfig(data_source="ollama", timeouts="cpu", timeout_grading=9)
    resolved = config.resolve_timeouts(environ)
    assert (resolved.connect, resolved.generation, resolved.grading, resolved.interval) == (5, 7.5, 9, 1.0)
    for name in resolved._fields:
        environ = {f"FUSEDGPT_OLLAMA_TIMEOUT_{name.upper()}": "123"}
        assert getattr(LLMConfig().resolve_timeouts(environ), name) == 123


@pytest.mark.parametrize("text", ["", "soon", "0", "-1", "nan", "inf"])
def test_a_variable_that_is_no_time_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="FUSEDGPT_OLLAMA_TIMEOUT_CONNECT is"):
        LLMConfig().resolve_timeouts({"FUSEDGPT_OLLAMA_TIMEOUT_CONNECT": text})


@pytest.mark.parametrize("value", [0, -1, float("inf"), float("nan")])
def test_a_flag_that_is_no_time_is_an_error(value: float) -> None:
    with pytest.raises(ValidationError, match="timeout_total"):
        LLMConfig(timeout_total=value)


def test_auto_looks_for_a_gpu_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm_config, "_ACCELERATORS", ("/nonexistent",))
    here, there = LLMConfig(data_source="ollama"), LLMConfig(data_source="ollama", llm_host="http://far:1")
    assert here.resolve_timeouts({}) == PRESETS["cpu"]
    assert there.resolve_timeouts({}) == PRESETS["gpu"]
    monkeypatch.setattr(llm_config, "_ACCELERATORS", ("/dev/null",))
    assert here.resolve_timeouts({}) == PRESETS["gpu"]


def test_the_usual_key_goes_to_openai_only() -> None:
    environ = {"OPENAI_API_KEY": "sk-1", "MINE": "sk-2\n"}
    for host, key in (("https://api.openai.com/v1", "sk-1"), ("http://api.openai.com", None), (None, None)):
        assert LLMConfig(data_source="openai", llm_host=host).api_key(environ) == key
    named = LLMConfig(data_source="openai", llm_host="http://box:1", llm_api_key_env="MINE")
    assert named.api_key(environ) == "sk-2"
    with pytest.raises(ValueError, match="MINE holds no API key for http://box:1"):
        named.api_key({})
    mistaken = LLMConfig(data_source="openai", llm_api_key_env="gsk_hunter2")  # the key in the name's place
    with pytest.raises(ValueError, match="holds no API key") as caught:
        mistaken.api_key({})
    assert "hunter2" not in str(caught.value)
    with pytest.raises(ValueError, match="characters that no API key has") as caught:
        named.api_key({"MINE": "sk-2\r\nX: y"})
    assert "sk-2" not in str(caught.value)


def test_fingerprints_part_what_must_not_be_mixed() -> None:
    base = LLMConfig(data_source="ollama", gen_model="a")
    same = base.model_copy(update={"llm_concurrency": 9, "llm_host": "http://x:1", "timeout_total": 3.0})
    assert base.fingerprint("p", "d", 0) == same.fingerprint("p", "d", 0)
    others = [
        base.fingerprint("q", "d", 0),
        base.fingerprint("p", "e", 0),
        base.fingerprint("p", "d", 1),
        base.model_copy(update={"gen_model": "b"}).fingerprint("p", "d", 0),
        base.model_copy(update={"data_source": "openai"}).fingerprint("p", "d", 0),
    ]
    assert len({base.fingerprint("p", "d", 0), *others}) == 6
    assert base.fingerprint("\ud800", "d", 0)


def test_who_grades() -> None:
    assert LLMConfig(data_source="template", gen_model="a").grader is None
    assert LLMConfig(data_source="ollama", gen_model="a").grader == "a"
    assert LLMConfig(data_source="ollama", gen_model="a", refine_model="b").grader == "b"
    assert LLMConfig(data_source="ollama", gen_model="a", refine_model="heuristics").grader is None
    assert LLMConfig(data_source="ollama").grader == ""


@pytest.mark.parametrize(
    "options",
    [{"llm_host": "http://box:1"}, {"gen_model": "a"}, {"refine_model": "a"}, {"llm_api_key_env": "MY_KEY"}],
)
def test_a_model_that_nothing_would_ask_is_an_error(options: dict[str, str]) -> None:
    """Templates never take the place of a model in silence; who names them may keep the other settings."""
    with pytest.raises(ValidationError, match=r"no model is used: add --data-source ollama or openai"):
        LLMConfig.model_validate(options)
    assert LLMConfig.model_validate({**options, "data_source": "template"}).data_source == "template"
    assert LLMConfig(refine_model="heuristics", fallback="templates").grader is None
