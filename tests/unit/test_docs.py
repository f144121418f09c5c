"""What the docs say of the code is what the code says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from docs.generate import ROOT, stale
from service import __version__
from service.config import Settings, UpstreamConfig


def test_the_tables_of_the_docs_are_as_the_code_is() -> None:
    assert stale() == [], "run `make docs`"


def test_every_setting_is_in_the_example_and_in_the_docs() -> None:
    example = (ROOT / ".env.example").read_text()
    page = (ROOT / "docs/settings.md").read_text()
    for name, field in Settings.model_fields.items():
        assert re.search(rf"^#{name.upper()}=", example, re.MULTILINE)
        assert f"| `{name.upper()}` |" in page
        assert field.description


def test_the_example_as_it_stands_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    lines = re.findall(r"^#([A-Z_]+=.+)$", (ROOT / ".env.example").read_text(), re.MULTILINE)
    assert len(lines) > 50
    monkeypatch.chdir(tmp_path)
    defaults = Settings()
    (tmp_path / ".env").write_text("\n".join(lines))
    assert Settings() == defaults


def test_the_readme_names_only_settings_that_exist() -> None:
    table = (ROOT / "README.md").read_text().partition("## Settings")[2].partition("\n## ")[0]
    named = set(re.findall(r"`([A-Z][A-Z_]+)`", table))
    assert named
    assert named <= {name.upper() for name in Settings.model_fields}


def test_the_example_yaml_of_the_docs_is_valid() -> None:
    import yaml

    from service.config import FileConfig

    page = (ROOT / "docs/settings.md").read_text()
    block = re.search(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert block
    file = FileConfig.model_validate(yaml.safe_load(block[1]))
    told = set().union(*(u.model_fields_set for u in file.upstreams))
    assert told == set(UpstreamConfig.model_fields), "the example shows every field of an upstream"


@pytest.mark.parametrize(
    "page", sorted(p.relative_to(ROOT) for p in ROOT.glob("**/*.md") if ".venv" not in p.parts)
)
def test_links_between_pages_lead_somewhere(page: object) -> None:
    path = ROOT / str(page)
    for link in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        if "://" not in link:
            assert (path.parent / link).exists(), f"{page}: {link}"


def test_the_version_is_in_one_place() -> None:
    for file in ("pyproject.toml", "Dockerfile", "Makefile"):
        assert __version__ not in re.findall(r"(?<![\d.>=])\d+\.\d+\.\d+(?![\d.])", (ROOT / file).read_text())
