"""deploy/prometheus: the rules are sound, each alert fires when it should, and says what to do in a place that is there."""

from __future__ import annotations

import re
import subprocess

from click.testing import CliRunner
from docutils.core import publish_doctree

from broker.cli.main import main as command
from tests.parts import rules
from tests.parts.process import find_program

PLACE = rules.ROOT / "deploy" / "prometheus"


def promtool(*arguments: str) -> None:
    program = find_program("promtool", rules.INSTALL)
    done = subprocess.run([program, *arguments], cwd=PLACE, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_example_is_a_configuration_with_its_rules() -> None:
    promtool("check", "config", "prometheus.yml")


def test_each_alert_fires_when_it_should_and_not_before() -> None:
    promtool("test", "rules", "alerts_test.yml")


def test_each_alert_is_tested() -> None:
    tested = (PLACE / "alerts_test.yml").read_text()
    for alert in rules.alerts():
        assert f'{{alertname="{alert["alert"]}"}}' in tested


def test_each_alert_says_what_to_do() -> None:
    known = set(publish_doctree((rules.ROOT / "README.rst").read_text(), settings_overrides={"report_level": 5}).ids)
    for alert in rules.alerts():
        told = alert["annotations"]
        assert told["summary"] and told["description"].endswith(".")
        file, _, anchor = told["runbook"].partition("#")
        assert file == "README.rst" and anchor in known
        assert alert["labels"]["severity"] in ("warning", "critical")


def test_the_readme_says_of_each_alert_what_it_says_itself() -> None:
    readme = (rules.ROOT / "README.rst").read_text()
    listed = dict(re.findall(r"^   _`(\w+)` \| [^|]+ \| (.+)$", readme, re.MULTILINE))
    assert listed == {alert["alert"]: alert["annotations"]["description"] for alert in rules.alerts()}


def test_commands_that_alerts_name_are_there() -> None:
    told = " ".join(alert["annotations"]["description"] for alert in rules.alerts())
    named = set(re.findall(r"broker ((?:store|key|ls) \w+)", told))
    assert len(named) == 5
    for words in named:
        assert CliRunner().invoke(command, [*words.split(), "--help"]).exit_code == 0, words
