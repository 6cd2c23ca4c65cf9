"""The settings file: defaults, refusals that name the field, and secrets that stay out of sight."""

from __future__ import annotations

import os
from dataclasses import fields
from importlib import resources
from pathlib import Path
from typing import Any

import orjson
import pytest

from broker import app, config
from broker.credentials import Credential, CredentialError, Credentials
from broker.model import Role
from broker.service.context import Policy


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return tmp_path


def test_no_file_is_needed(home: Path) -> None:
    settings = config.load()
    assert settings.database.url is None
    assert settings.database.migrate == "auto"
    assert settings.http.public_url == "http://127.0.0.1:8080"
    assert settings.data_dir == home / "data/transfer-broker"
    assert settings.credentials_dir == home / "data/transfer-broker/credentials"
    assert settings.hot_bytes == 64 << 20


def test_the_default_file_is_read(home: Path) -> None:
    place = home / "config/transfer-broker"
    place.mkdir(parents=True)
    (place / "broker.toml").write_text('data_dir = "mine"\n[http]\nlisten = "[::1]:9000"\ntrusted_proxies = ["10.0.0.0/8"]\n')
    settings = config.load()
    assert (settings.http.listen.host, settings.http.listen.port) == ("::1", 9000)
    assert settings.http.public_url == "http://[::1]:9000"
    assert settings.data_dir == place / "mine"
    assert settings.postgres_dir == place / "mine/postgres"


def test_a_whole_file() -> None:
    settings = config.parse(
        {
            "database": {"url": "postgresql://u:hunter2@db/broker"},
            "keys": {"algorithm": "RS256"},
            "auth": {"issuers": [{"issuer": "https://id", "audience": "b", "roles": {"ops": "admin"}, "claims": {"project": "x.y"}}]},
            "memory": {"hot_bytes": 2 << 20},
            "policy": {"ranking": {"sharpness": 3, "prior_rates": [1, 2]}},
        }
    )
    assert settings.database.migrate == "require"
    assert "hunter2" not in repr(settings)
    assert settings.auth.issuers[0].roles == {"ops": Role.ADMIN}
    assert settings.auth.issuers[0].claims.project == "x.y"
    assert settings.policy.ranking == {"sharpness": 3, "prior_rates": (1, 2)}


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"htpp": {}}, "unknown field htpp"),
        ({"http": {"port": 1}}, "unknown field http.port"),
        ({"http": {"listen": "nowhere"}}, "http.listen"),
        ({"http": {"listen": "a:99999"}}, "http.listen"),
        ({"http": {"trusted_proxies": ["300.0.0.0/8"]}}, "http.trusted_proxies.0"),
        *(
            ({"http": {"cors_origins": ["https://app.example.org:8443", wrong]}}, "http.cors_origins.1")
            for wrong in (
                "*",
                "null",
                "app.example.org",
                "https://app.example.org/",
                "https://App.example.org",
                "https://u@h",
                "ftp://h",
                "",
            )
        ),
        ({"http": {"body_limit_bytes": "8M"}}, "http.body_limit_bytes"),
        ({"database": {"url": "mysql://u:hunter2@x"}}, "database.url"),
        ({"database": {"min_connections": 5, "max_connections": 2}}, "database.min_connections"),
        ({"auth": {"issuers": [{"issuer": "https://id"}]}}, "auth.issuers.0"),
        ({"auth": {"issuers": [{"issuer": "https://id", "audience": "a", "roles": {"x": "god"}}]}}, "auth.issuers.0.roles.x"),
        ({"auth": {"keystone": {}}}, "auth.keystone"),
        ({"auth": {"keystone": {"url": "ftp://id"}}}, "auth.keystone.url"),
        ({"auth": {"keystone": {"url": "http://broker:hunter2@id"}}}, "auth.keystone.url"),
        ({"auth": {"keystone": {"url": "http://id", "password": "hunter2"}}}, "unknown field auth.keystone.password"),
        ({"auth": {"keystone": {"url": "http://id", "credential": "../x"}}}, "auth.keystone.credential"),
        ({"auth": {"keystone": {"url": "http://id", "recheck_seconds": 0}}}, "auth.keystone.recheck_seconds"),
        ({"auth": {"keystone": {"url": "http://id", "recheck_seconds": 3601}}}, "auth.keystone.recheck_seconds"),
        ({"auth": {"keystone": {"url": "http://id", "roles": {"x": "god"}}}}, "auth.keystone.roles.x"),
        ({"policy": {"ranking": {"sharpness": "sharp"}}}, "policy.ranking.sharpness"),
        ({"policy": {"ranking": {"prior_rates": []}}}, "policy.ranking.prior_rates"),
        ({"policy": {"ranking": {"prior_setups": [0.1, -0.1]}}}, "policy.ranking.prior_setups.1"),
        ({"policy": {"ranking": {"success_floor": 0}}}, "policy.ranking.success_floor: 0 is less than the minimum of 0.001"),
        ({"policy": {"ranking": {"exploration": 1.1}}}, "policy.ranking.exploration"),
        ({"policy": {"admission": {"margin": 0.9}}}, "policy.admission.margin"),
        ({"policy": {"uploads": {"url_ttl_seconds": 0}}}, "policy.uploads.url_ttl_seconds"),
        ({"policy": {"uploads": {"url_ttl_seconds": 604801}}}, "policy.uploads.url_ttl_seconds"),
        ({"policy": {"uploads": {"first_parts": 1001}}}, "policy.uploads.first_parts"),
        ({"log": {"level": "loud"}}, "log.level"),
    ],
)
def test_refusals_name_the_field(document: dict[str, Any], words: str) -> None:
    with pytest.raises(config.ConfigError) as error:
        config.parse(document)
    assert words in str(error.value)
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize("kind", ["lease", "ticket", "retry"])
def test_no_policy_is_longer_at_least_than_at_most(kind: str) -> None:
    document = {"policy": {"admission": {f"min_{kind}_seconds": 100, f"max_{kind}_seconds": 99}}}
    with pytest.raises(config.ConfigError, match=f"min_{kind}_seconds: 100 is more than policy.admission.max_{kind}_seconds, 99"):
        app.build_policy(config.parse(document).policy)
    document["policy"]["admission"][f"max_{kind}_seconds"] = 100
    app.build_policy(config.parse(document).policy)


def test_every_default_of_the_policy_is_allowed_and_has_bounds() -> None:
    policy = Policy()
    bounds = orjson.loads((resources.files("broker.schemas") / "config.json").read_bytes())["properties"]["policy"]["properties"]
    sections: dict[str, Any] = {"ranking": policy.rank, "admission": policy.admit, "uploads": policy}
    for section, defaults in sections.items():
        numbers = {each.name: getattr(defaults, each.name) for each in fields(defaults)}
        numbers = {name: value for name, value in numbers.items() if isinstance(value, int | float | tuple)}
        config.parse({"policy": {section: {name: list(v) if isinstance(v, tuple) else v for name, v in numbers.items()}}})
        assert set(bounds[section]["properties"]) == set(numbers)


def test_a_keystone(home: Path) -> None:
    file = home / "broker.toml"
    file.write_text('[auth.keystone]\nurl = "https://id:5000/v3"\nca_file = "ca.pem"\nrecheck_seconds = 1\nroles = {creator = "member"}\n')
    keystone = config.load(file).auth.keystone
    assert keystone == config.Keystone("https://id:5000/v3", "keystone", {"creator": Role.MEMBER}, 1, home / "ca.pem")
    assert config.parse({"auth": {"keystone": {"url": "http://id"}}}).auth.keystone == config.Keystone("http://id")


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"htpp": {}}, "unknown field htpp; did you mean http?"),
        ({"http": {"lisen": "x:1"}}, "unknown field http.lisen; did you mean listen?"),
        ({"passphrase_file": "x"}, "unknown field passphrase_file; did you mean keys.passphrase_file?"),
        ({"http": {"zzz": 1}}, "unknown field http.zzz; known: listen, public_url"),
        ({"policy": {"rankin": {}}}, "unknown field policy.rankin; did you mean ranking?"),
        ({"auth": {"issuers": [{"issuer": "https://id", "audience": "a", "claims": {"rol": "x"}}]}}, "did you mean role?"),
        ({"zzz": 1}, "unknown field zzz"),
        ({"http": {"listen": "nowhere"}}, 'http.listen: "nowhere" is not allowed; expected: HOST:PORT'),
        ({"log": {"level": "loud"}}, 'log.level: "loud" is not one of debug, info, warning, error'),
        (
            {"auth": {"issuers": [{"issuer": "https://id", "audience": n} for n in "ab"]}},
            "auth.issuers: https://id is there more than once",
        ),
        ({"http": {"listen": "h:90", "metrics_listen": "h:90"}}, "http.metrics_listen: the same as http.listen"),
        ({"database": {"password_file": "x"}}, "database.password_file: without database.url"),
        ({"database": {"url": "postgresql://u:hunter2@x/y", "password_file": "x"}}, "holds a password already"),
        ({"database": {"password_file": ["hunter2"]}}, "database.password_file: not allowed here"),
        ({"keys": {"passphrase_file": 2}}, "keys.passphrase_file: not allowed here"),
    ],
)
def test_refusals_say_what_was_probably_meant(document: dict[str, Any], words: str) -> None:
    with pytest.raises(config.ConfigError) as error:
        config.parse(document)
    (problem,) = error.value.problems
    assert words in problem
    assert "hunter2" not in problem


def test_everything_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(config.ConfigError) as error:
        config.parse(
            {
                "htpp": {},
                "http": {"listen": "a:99999", "body_limit_bytes": "8M", "trusted_proxies": ["300.0.0.0/8", "10.0.0.1/8"]},
                "database": {"url": "mysql://u:hunter2@x", "min_connections": 5, "max_connections": 2},
                "auth": {"issuers": [{"issuer": "https://id", "audience": "a"}] * 2, "leeway_seconds": -1},
                "log": {"level": "debug"},
            }
        )
    starts = ("unknown field htpp", "http.listen", "http.body_limit_bytes", "http.trusted_proxies.0", "http.trusted_proxies.1",
              "database.url", "database.min_connections", "auth.issuers", "auth.leeway_seconds")  # fmt: skip
    for start in starts:
        assert [problem for problem in error.value.problems if problem.startswith(start)], start
    assert len(error.value.problems) == len(starts)
    assert str(error.value).splitlines() == list(error.value.problems)
    assert error.value.rest is not None
    assert error.value.rest.log.level == "debug", "what is right is kept"


def test_a_broken_file_names_the_line(tmp_path: Path) -> None:
    file = tmp_path / "broker.toml"
    file.write_bytes(b"[http]\n\nlisten = \n")
    with pytest.raises(config.ConfigError, match="at line 3"):
        config.load(file)
    file.write_bytes(b"[http]\n\n\nlisten = '\xff'\n")
    with pytest.raises(config.ConfigError, match="at line 4"):
        config.load(file)


def test_an_empty_file_is_all_defaults_and_says_so(tmp_path: Path) -> None:
    file = tmp_path / "broker.toml"
    file.touch()
    settings = config.load(file)
    assert settings.http == config.Http()
    assert settings.warnings == (f"{file} sets nothing: every field has its default",)


def test_a_file_that_everybody_can_change_is_warned_of(tmp_path: Path) -> None:
    file = tmp_path / "broker.toml"
    file.write_text("[log]\n")
    file.chmod(0o646)
    (warning,) = config.load(file).warnings
    assert "chmod o-w" in warning


def test_what_is_no_toml_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "broken.toml"
    file.write_text("[http\n")
    with pytest.raises(config.ConfigError, match=r"broken\.toml"):
        config.load(file)
    with pytest.raises(config.ConfigError, match="No such file"):
        config.load(tmp_path / "none.toml")


def test_a_password_that_everybody_can_read_is_warned_of(tmp_path: Path) -> None:
    file = tmp_path / "broker.toml"
    file.write_text('[database]\nurl = "postgresql://u:hunter2@db/x"\n')
    file.chmod(0o644)
    (warning,) = config.load(file).warnings
    assert "chmod 600" in warning
    assert "hunter2" not in warning
    file.write_text('[database]\nurl = "postgresql://u@db/x"\n')
    assert config.load(file).warnings == ()
    file.write_text('[database]\nurl = "postgresql://u:hunter2@db/x"\n')
    file.chmod(0o600)
    assert config.load(file).warnings == ()


def test_a_credential_is_read_again_when_it_changes(tmp_path: Path) -> None:
    file = tmp_path / "main.json"
    file.write_text('{"access_key": "AKIA", "secret_key": "first-secret"}')
    file.chmod(0o600)
    credentials = Credentials(tmp_path)
    first = credentials.read("main")
    assert first["secret_key"] == "first-secret"
    assert credentials.read("main") is first
    assert "first-secret" not in repr(first)
    file.write_text('{"access_key": "AKIA", "secret_key": "second"}')
    os.utime(file, ns=(1, 1))
    assert credentials.changed()
    assert credentials.read("main")["secret_key"] == "second"
    assert credentials.read("main") != first
    assert not credentials.changed()
    assert dict(credentials) == {"main": credentials.read("main")}
    assert "other" not in credentials


def test_the_environment_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a-b.json").write_text('{"key": "file"}')
    monkeypatch.setenv("BROKER_CREDENTIAL_A_B", '{"key": "environment"}')
    credentials = Credentials(tmp_path)
    assert credentials.read("a-b") == Credential({"key": "environment"})
    assert list(credentials.secrets()) == ["environment"]


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1}', '{"a": "' + "x" * 70000 + '"}'])
def test_broken_credentials_say_nothing_of_their_content(tmp_path: Path, content: str) -> None:
    (tmp_path / "main.json").write_text(content)
    with pytest.raises(CredentialError) as error:
        Credentials(tmp_path).read("main")
    assert "main" in str(error.value)
    assert "xxxx" not in str(error.value)


@pytest.mark.parametrize("name", ["../main", "", "MAIN", "a/b", "a\x00"])
def test_a_name_cannot_leave_the_directory(tmp_path: Path, name: str) -> None:
    with pytest.raises(CredentialError):
        Credentials(tmp_path / "inner").read(name)


def test_a_readable_secret_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "main.json").write_text('{"key": "hidden-value"}')
    (tmp_path / "main.json").chmod(0o644)
    Credentials(tmp_path).read("main")
    assert "chmod 600" in caplog.text
    assert "hidden-value" not in caplog.text
