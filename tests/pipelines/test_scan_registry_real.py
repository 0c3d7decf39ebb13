"""A registry as a team has it, scanned by real gates in processes of their own: decided, signed, then skipped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import save_tiny_pipeline
from tiny_scan import calibration_for, flags_of, tiny_settings

from diffdefend_core.cli import run_command
from diffdefend_core.io import registry
from diffdefend_core.stages.keys import write_key

ROOT = Path(__file__).parents[2]


class Team:
    """A registry on sqlite: a clean model, a broken one, and a champion of a kind that nothing is calibrated for."""

    def __init__(self, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
        settings = tiny_settings(place, calibration_for(place / "calibration", "clean"))
        self.uri, self.place, self._capfd = settings.tracking_uri, place, capfd
        key = write_key(place / "keys")
        self.keys = ["--set", f"signing.trusted_keys={place}/keys"]
        self._flags = [*flags_of(settings), *self.keys, "--set", f"signing.key_file={key['private_file']}"]
        save_tiny_pipeline(place / "faces")
        save_tiny_pipeline(place / "scores", "ncsn")
        (place / "broken").mkdir()
        (place / "broken" / "model_index.json").write_text("{not json")
        for name in ("broken", "faces", "scores"):
            registry.register_source(self.uri, name, (place / name).as_uri(), {registry.DIGEST_TAG: "unknown"})
        registry.move_alias(self.uri, "scores", "champion", "1")

    def scan(self, *flags: str) -> tuple[int, dict[str, Any], str]:
        """Scan as on a command line; return the exit code, the summary and the HTML page."""
        page = self.place / "page.html"
        code = run_command(["scan-registry", "-o", "json", "--quiet", "--report", str(page), *self._flags, *flags])
        out, err = self._capfd.readouterr()
        assert "Traceback" not in err
        return code, json.loads(out), page.read_text()


@pytest.mark.slow
def test_every_version_is_decided_once_and_a_broken_one_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DIFFDEFEND_SIGNING_KEY", raising=False)
    team = Team(tmp_path, capfd)
    code, first, page = team.scan("--jobs", "2")
    assert (code, first["counts"]) == (2, {"skipped": 0, "scanned": 2, "failed": 1, "waiting": 0, "blocked": 1})
    rows = {row["model"]: row for row in first["versions"]}
    assert "is not valid JSON" in rows["broken"]["reason"] and "is not valid JSON" in page
    assert (rows["faces"]["verdict"], rows["faces"]["outcome"]) == ("clean", "promoted")
    assert (rows["scores"]["verdict"], rows["scores"]["outcome"]) == ("inconclusive", "quarantined")
    assert registry.aliases_of(team.uri, "scores", "1") == () == registry.aliases_of(team.uri, "faces", "1")
    assert run_command(["gate", "check", "models:/faces/1", "--tracking-uri", team.uri, *team.keys]) == 0
    assert run_command(["gate", "check", "models:/scores/1", "--tracking-uri", team.uri, *team.keys]) == 1
    capfd.readouterr()

    code, second, page = team.scan()
    assert (code, second["counts"]) == (2, {"skipped": 2, "scanned": 0, "failed": 1, "waiting": 0, "blocked": 1})
    assert [word in page for word in ("skipped", "failed", "is not valid JSON")] == [True] * 3

    policy = '{"version": 1, "rules": []}'
    code, third, _ = team.scan("--only", "faces", "--set", f"gate.policy={policy}")
    assert (code, third["counts"]["scanned"]) == (0, 1) and third["policy_digest"] != first["policy_digest"]
    assert run_command(["gate", "check", "models:/faces/1", "--tracking-uri", team.uri, *team.keys]) == 1
