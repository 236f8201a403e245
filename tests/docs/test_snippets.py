"""Every code block of README.md and docs/ is understood; and runs (slow), unless the page says why it cannot."""

import sys

import pytest

from tests.docs.snippets import PAGES, REPOSITORY, Block, Parser, blocks, check, commands, links, quick, run

NAMES = [page.relative_to(REPOSITORY).as_posix() for page in PAGES]
WITH_BLOCKS = [name for name in NAMES if blocks(REPOSITORY / name)]
# Reading a command takes a third of a second: the commands of all other pages are read when they are run.
QUICK = [n for n in WITH_BLOCKS if n == "README.md" or all(b.language != "bash" for b in blocks(REPOSITORY / n))]


@pytest.fixture(scope="module")
def parser():
    return Parser()


def places(module):
    """Where a module lies; a folder without __init__.py has a path only."""
    return [str(getattr(module, name, "")) for name in ("__file__", "__path__")]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder like the repository's root; modules that a page writes into it are forgotten."""
    links(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    before = set(sys.modules)
    yield tmp_path
    new = {name: sys.modules[name] for name in sys.modules.keys() - before}
    for name in [name for name, module in new.items() if any(str(tmp_path) in place for place in places(module))]:
        del sys.modules[name]
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.filterwarnings("ignore")
def test_blocks_are_understood(name, parser, folder):
    for block in blocks(REPOSITORY / name):
        try:
            check(block, parser, folder)
        except (Exception, SystemExit) as error:
            pytest.fail(f"{name}:{block.line}: {error!r}\n{block.text}")


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_BLOCKS)
@pytest.mark.filterwarnings("ignore")
def test_blocks_run(name, parser, folder):
    names: dict = {"__name__": "page"}
    for block in blocks(REPOSITORY / name):
        try:
            run(block, parser, folder, names)
        except Exception as error:
            raise AssertionError(f"{name}:{block.line}: {error!r}\n{block.text}") from error


def test_a_wrong_block_is_found(parser, folder):
    for language, text in (
        ("bash", "fedlight fit -c configs/quickstart.yaml --trainer.max_round 3"),
        ("bash", "fedlight study sweeps/none.yaml"),
        ("python", "def f(:"),
        ("yaml", "- a\n- b"),
    ):
        with pytest.raises((Exception, SystemExit)):
            check(Block(language, "", text, 1), parser, folder)


def test_how_a_page_is_read(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        '<!-- first\nx = 1\n-->\n```python title="a.py"\ny = x\n```\n\n<!-- parsed only: needs a GPU -->\n'
        "```bash\nA=1 fedlight fit -c a.yaml \\\n    --seed_everything 1  # why\n# no\nfedlight test && ls\n```\n"
    )
    first, python, bash = blocks(page)
    assert (first.text, first.shown) == ("x = 1", False)
    assert (python.title, python.text, python.runs) == ("a.py", "y = x\n", True)
    assert (bash.line, bash.runs) == (9, False)
    assert commands(bash) == [
        ["A=1", "fedlight", "fit", "-c", "a.yaml", "--seed_everything", "1"], ["fedlight", "test"], ["ls"],
    ]  # fmt: skip
    assert "--trainer.max_rounds=1" in quick(["fit"])
    page.write_text("<!-- parsed only: -->\n```bash\nls\n```\n")
    with pytest.raises(AssertionError, match="say why"):
        blocks(page)
