"""What the pages, the Makefile and the hooks promise about files and targets."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
WRITTEN = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(DOCS.rglob("*.md"))


def links(path):
    """Targets of a page's relative links, without anchors."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.S)
    found = re.findall(r"\]\(([^)\s]+)\)", text)
    return [target.partition("#")[0] for target in found if not re.match(r"[a-z]+:|#", target)]


def test_the_site_names_every_page_once():
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    named = re.findall(r"([\w/-]+\.md)", nav)
    assert len(named) == len(set(named))
    assert set(named) == PAGES


def test_the_overview_links_every_page():
    assert set(links(DOCS / "index.md")) == PAGES - {"index.md"}


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_relative_link_leads_to_a_file(path):
    assert not [target for target in links(path) if not (path.parent / target).exists()]


def test_configs_and_modules_that_pages_name_exist():
    text = "\n".join(path.read_text() for path in WRITTEN)
    configs = set(re.findall(r"configs/([\w.-]+\.toml)", text))
    assert configs
    assert not [name for name in configs if not (ROOT / "configs" / name).exists()]
    modules = set(re.findall(r"-m ((?:thinkmid|benchmarks)[\w.]*)", text))
    assert len(modules) > 8
    for module in modules:
        path = ROOT / module.rstrip(".").replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


def test_the_makefiles_header_lists_every_target():
    text = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", text, flags=re.M)[1].split()
    assert set(re.findall(r"^# make ([\w-]+)", text, flags=re.M)) == set(phony)


def test_the_hooks_check_what_ci_checks():
    ci = set(re.findall(r"^make ([\w -]+)$", (ROOT / ".ci" / "run").read_text(), flags=re.M))
    hooks = re.findall(r"entry: make --no-print-directory ([\w-]+)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert set(hooks) == ci - {"docs", "test", "test-vllm"}
