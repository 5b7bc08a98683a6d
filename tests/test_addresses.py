"""Addresses of servers, databases and stores: no password, token or key of one is shown, kept or committed."""

from __future__ import annotations

import http.server
import re
import threading
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.settings.params import parse
from pipeline.settings.presets import overlay
from pipeline.sources.checks import require_no_secrets
from pipeline.workspace.addresses import VARIABLES, has_secret, redacted, shown
from pipeline.workspace.errors import UserError
from pipeline.workspace.yaml_files import read_yaml

ROOT = Path(__file__).parents[1]
PIECES = ("Xq7Zw", "kV4pN", "Rt9mB")
"""Of secrets, between which stands what an address gives a meaning to."""
SCHEMES = (
    "http",
    "https",
    "postgresql",
    "postgresql+psycopg",
    "mysql",
    "s3",
    "ssh",
    "webdavs",
    "azure",
    "ray",
    "redis",
)
HOSTS = ("127.0.0.1:5000", "db.example.org", "[::1]:9000", "bucket/results", "host/runs", "")
NAMES = (
    "token",
    "password",
    "sslpassword",
    "api_key",
    "apikey",
    "access_token",
    "sig",
    "X-Amz-Signature",
    "key",
    "auth",
)
SETTINGS: dict[str, Any] = {
    "tracking.uri": {"tracking": {"uri": ...}},
    "sweep.storage": {"sweep": {"storage": ...}},
    "rollout.engine.url": {"rollout": {"engine": {"kind": "vllm", "url": ...}}},
    "rollout.workers.address": {"rollout": {"workers": {"kind": "ray", "address": ...}}},
    "rollout.engine.arguments.1": {"rollout": {"engine": {"kind": "vllm", "arguments": ["--block-size=32", ...]}}},
    "environments.frozen_lake.settings.server": {"environments": {"frozen_lake": {"settings": {"server": ...}}}},
    "environments.frozen_lake.settings.stores.0.at": {
        "environments": {"frozen_lake": {"settings": {"stores": [{"at": ...}]}}}
    },
}


@st.composite
def secrets(draw: st.DrawFn) -> str:
    """A password of some pieces."""
    between = st.text("/@:?#&=;%+$!~'\"", max_size=3)
    first, *others = PIECES[: draw(st.integers(1, len(PIECES)))]
    return first + "".join(f"{draw(between)}{piece}" for piece in others)


@st.composite
def addresses(draw: st.DrawFn) -> str:
    """One with a secret somewhere, quoted as it should be or not at all."""
    secret, host = draw(secrets()), draw(st.sampled_from(HOSTS))
    secret = quote(secret, safe="") if draw(st.booleans()) else secret
    scheme, name = draw(st.sampled_from(SCHEMES)), draw(st.sampled_from(NAMES))
    match draw(st.integers(0, 4)):
        case 0:
            return f"{scheme}://me:{secret}@{host}"
        case 1:
            return f"http{draw(st.sampled_from(['', 's']))}://{secret}@{host}"
        case 2:
            return f"{scheme}://{host}?sslmode=require&{name}={secret}"
        case 3:
            return f"{scheme}://{host}/a#{name}={secret}"
        case _:
            return f"{scheme}://me:{secret}@{host}?{name}={secret}&mode=x"


def tells(text: str) -> bool:
    return any(piece in text for piece in PIECES)


@given(addresses())
def test_an_address_is_shown_without_what_lets_people_in(address: str) -> None:
    assert has_secret(address)
    assert not tells(shown(address))
    assert not has_secret(shown(address))
    assert shown(address).startswith(address.split("://")[0])


@given(
    addresses(), st.sampled_from(["cannot reach {}: refused", "InvalidURL('{}',)", "{{'uri': '{}', 'n': 1}}", "at={}"])
)
def test_words_of_others_have_no_address_whole(address: str, words: str) -> None:
    assert not tells(redacted(words.format(address)))


@given(addresses())
def test_words_of_others_have_no_piece_of_an_address_that_is_known(address: str) -> None:
    pieces = [piece for piece in re.split(r"[/@:?#&=;\s]+", address.split("://")[1]) if tells(piece)]
    for piece in (address, *pieces):
        assert not tells(redacted(f'could not translate host name "{piece}@host": {piece!r} is no port', address)), (
            piece
        )


@pytest.mark.parametrize(
    "address",
    ["http://127.0.0.1:5000", "https://mlflow.example.org/team/", "sqlite:////home/me@work/mlflow.db", "s3://bucket/dvc",
     "databricks://profile", "auto", "head:6379", "http://[::1]:5000", "/mnt/shared/dvc", "file:///a@b/c", ""],
)  # fmt: skip
def test_an_address_without_a_secret_is_shown_as_it_is(address: str) -> None:
    assert shown(address) == redacted(address) == address
    assert not has_secret(address)


def test_what_is_no_address_is_left_as_it_is() -> None:
    text = (
        "params.yaml: rollout.x: context_tokens: 512 is less than max_tokens=640; allowed: a@b, #1, tokens: 5 (50 %)?"
    )
    assert redacted(text) == text
    assert not has_secret("Write to me@example.org: the agent @ the door")


def test_a_user_and_a_socket_are_hidden_and_allowed() -> None:
    address = "postgresql+psycopg://actfocus@/sweeps?host=/tmp/socket"
    assert shown(address) == "postgresql+psycopg://…@/sweeps?…"
    assert not has_secret(address)
    assert not has_secret("postgresql+psycopg://actfocus@127.0.0.1/sweeps")


@pytest.mark.parametrize("name", VARIABLES)
def test_what_the_environment_holds_is_in_nobodys_words(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "postgresql://me:Xq7Zw/kV4pN@host/x y")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "Rt9mB-Rt9mB")
    said = "postgresql://me:Xq7Zw/kV4pN@host/x y; port Xq7Zw; 401 for Rt9mB-Rt9mB; password=Xq7Zw; Bearer kV4pN"
    assert not tells(redacted(said))


# ------------------------------------------------------------------------------------------------------ what is committed


def filled(value: Any, address: str) -> Any:
    if isinstance(value, dict):
        return {key: filled(part, address) for key, part in value.items()}
    if isinstance(value, list):
        return [filled(part, address) for part in value]
    return address if value is ... else value


PARAMS = read_yaml(ROOT / "params.yaml")


def refused(changes: dict[str, Any]) -> list[str]:
    with pytest.raises(UserError) as caught:
        parse(overlay(PARAMS, changes))
    return str(caught.value).splitlines()


@given(addresses(), st.sampled_from(list(SETTINGS)))
def test_a_params_file_with_a_password_is_refused_in_a_line_that_says_where_to_put_it(address: str, key: str) -> None:
    (line,) = refused(filled(SETTINGS[key], address))
    assert line.startswith(f"params.yaml: {key}: has a password, token or key, and this file is committed; allowed: ")
    assert len(line) < 300
    assert not tells(line)


def test_each_setting_has_a_place_for_its_credentials() -> None:
    address = "http://me:secret@host"
    places = {key: refused(filled(changes, address))[0].rpartition("allowed: ")[2] for key, changes in SETTINGS.items()}
    assert "MLFLOW_TRACKING_PASSWORD" in places["tracking.uri"]
    assert "SWEEP_STORAGE" in places["sweep.storage"]
    assert "VLLM_API_KEY" in places["rollout.engine.url"]
    assert "HF_TOKEN" in places["rollout.engine.arguments.1"]
    assert places["environments.frozen_lake.settings.server"] == "a variable of the environment"


@pytest.mark.parametrize(
    "changes",
    [{"rollout": {"engine": {"kind": "vllm", "arguments": ["--api-key=Xq7Zw"]}}},
     {"rollout": {"engine": {"kind": "vllm", "arguments": ["--hf-token", "Xq7Zw"]}}},
     {"environments": {"frozen_lake": {"settings": {"api_key": "Xq7Zw"}}}},
     {"environments": {"frozen_lake": {"settings": {"password": "Xq7Zw"}}}},
     {"environments": {"frozen_lake": {"settings": {"postgresql://me:Xq7Zw@host": 1}}}}],
)  # fmt: skip
def test_a_secret_that_is_no_address_is_refused_too(changes: dict[str, Any]) -> None:
    lines = refused(changes)
    assert not tells("\n".join(lines))


@given(addresses(), st.sampled_from(["sweep", "tracking", "rollout", "seeds", "threads", "comparison"]))
def test_a_mistake_beside_an_address_does_not_tell_it(address: str, key: str) -> None:
    assert not tells("\n".join(refused({key: [{"at": address}]})))


def test_yaml_that_cannot_be_read_does_not_tell_its_addresses(tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    for text in ("tracking: {uri: http://me:Xq7Zw/kV4pN@host: x}", "a: [\nuri: 'postgresql://me:Xq7Zw@host/kV4pN@x"):
        file.write_text(text)
        with pytest.raises(UserError) as caught:
            read_yaml(file)
        assert not tells(str(caught.value))


def test_the_sweeps_lock_has_no_address() -> None:
    """DVC writes what a stage depends on into dvc.lock, as it is."""
    (entry,) = read_yaml(ROOT / "sweeps" / "dvc.yaml")["stages"]["sweep"]["params"][0].values()
    assert not {key.split(".")[0] for key in entry} & {"sweep", "tracking"}
    for stage in read_yaml(ROOT / "dvc.yaml")["stages"].values():
        for part in stage.get("do", stage).get("params", []):
            assert not {key.split(".")[0] for keys in part.values() for key in keys} & {"sweep", "tracking"}


def test_the_settings_of_another_revision_are_shown_without_secrets() -> None:
    """It may be of a time at which they were not refused."""
    from pipeline.analysis.revisions import changed_settings  # imports what takes seconds

    a = {
        "sweep": {"storage": "postgresql://me:Xq7Zw/kV4pN@host/x"},
        "environments": {"x": {"settings": {"api_key": "Rt9mB"}}},
    }
    b = {"sweep": {"storage": "postgresql://host/x"}}
    rows = changed_settings(a, b)
    assert [key for key, *_ in rows] == ["environments.x.settings.api_key", "sweep.storage"]
    assert not tells(str(rows))


class _Asked(http.server.BaseHTTPRequestHandler):
    keys: ClassVar[list[str | None]] = []

    def do_GET(self) -> None:
        self.keys.append(self.headers["Authorization"])
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


def test_the_key_of_a_vllm_server_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.rollout.vllm_server import wait_until_ready

    monkeypatch.setenv("VLLM_API_KEY", "Xq7Zw")
    with http.server.HTTPServer(("127.0.0.1", 0), _Asked) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        wait_until_ready(f"http://127.0.0.1:{server.server_port}", 60)
        server.shutdown()
    assert _Asked.keys == ["Bearer Xq7Zw"]


# ------------------------------------------------------------------------------------------------------------ DVC's remotes


@pytest.mark.parametrize(
    "line",
    ["url = https://me:Xq7Zw@host/dvc", "url = webdavs://host/dvc?token=Xq7Zw", "password = Xq7Zw",
     "secret_access_key = Xq7Zw", "session_token = Xq7Zw", "connection_string = AccountKey=Xq7Zw", "sas_token = Xq7Zw"],
)  # fmt: skip
def test_a_password_in_dvcs_committed_settings_is_refused_in_a_line(line: str, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text(f"[core]\n    analytics = false\n['remote \"shared\"']\n    url = s3://bucket/dvc\n    {line}\n")
    with pytest.raises(UserError) as caught:
        require_no_secrets(config)
    (said,) = str(caught.value).splitlines()
    assert said.startswith(f'{config}: remote "shared": {line.split()[0]}: has a password, token or key')
    assert "config.local" in said
    assert not tells(said)


def test_dvcs_settings_without_a_password_are_taken(tmp_path: Path) -> None:
    require_no_secrets(ROOT / ".dvc" / "config")
    require_no_secrets(tmp_path / "none")
    (tmp_path / "config").write_text(
        "['remote \"shared\"']\n    url = s3://actfocus/dvc\n    endpointurl = http://127.0.0.1:8333\n"
        "    ask_password = true\n    auth = basic\n    profile = me\n"
    )
    require_no_secrets(tmp_path / "config")
