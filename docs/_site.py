"""What the site has besides the pages of this folder: a hook of mkdocs, which mkdocs.yml names.

The home page is README.md. Files of the repository that pages link to become pages themselves. Each algorithm and each
perturbation has a page, made of its section in algorithms.md, its YAML in configs/ and its docstring; the API reference
is made of docstrings.
"""

import importlib
import inspect
import posixpath
import re
from pathlib import Path

import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pymdownx.slugs import slugify

ROOT = Path(__file__).parents[1]
CONFIGS = next(folder for folder in (ROOT / "fedlight" / "configs", ROOT / "configs") if folder.is_dir())
LINK = re.compile(r"(?<=\]\()([^)#\s:]+)(?=[)#])")
# The pages of the reference: what each lists is `__all__` of its package.
REFERENCE = ["algorithms", "perturbations", "transforms", "callbacks", "data", "models", "engines", "analysis"]
BASES = ("Algorithm", "Message", "Perturbation")
COMMANDS = "[validate, test, predict, analyze, export, summary]"
MAIN = ["FederatedTrainer", "LocalObjective", "ClientResult", "sampling.Sampler", "sampling.Uniform"]


def section(heading: str, level: str = "###") -> str:
    """What algorithms.md says under the heading that has this word."""
    text = (ROOT / "docs" / "algorithms.md").read_text()
    found = re.search(rf"^{level} [^\n]*\b{heading}\b[^\n]*\n(.*?)(?=^##|\Z)", text, re.M | re.S)
    text = re.sub(r"\]\((?=[\w-]+\.md)", "](../", found[1].strip()) if found else ""
    return re.sub(r"\]\(#", "](../algorithms.md#", text)


def row(name: str) -> str:
    """The class's row of the tables in algorithms.md, with the table's head."""
    lines = (ROOT / "docs" / "algorithms.md").read_text().splitlines()
    at = next((i for i, line in enumerate(lines) if line.startswith("|") and f"`{name}`" in line.split("|")[1]), None)
    if at is None:
        return ""
    top = next(i for i in range(at, 0, -1) if not lines[i - 1].startswith("|"))
    cells = [re.sub(r"\]\(#", "](../algorithms.md#", lines[i].strip("|").split("|", 1)[1]) for i in (top, top + 1, at)]
    return "\n".join(f"|{cell}|" for cell in cells)


def parts(folder: str) -> dict[str, Path]:
    """The files of configs/ by the class that they name."""
    files = sorted((CONFIGS / folder).glob("*.yaml"))
    return {yaml.safe_load(path.read_text())["class_path"].split(".")[-1]: path for path in files}


def path_of(thing: object) -> str:
    """Where an object is defined, for mkdocstrings."""
    return f"{thing.__module__}.{thing.__qualname__}"


def plugin_page(folder: str, name: str) -> str:
    """The page of an algorithm or a perturbation."""
    return f"{folder}/{name.lower()}.md"


def plugin_pages(folder: str) -> dict[str, str]:
    """A page for each algorithm or perturbation, by its path."""
    package, files, key = importlib.import_module(f"fedlight.{folder}"), parts(folder[:-1]), folder[:-1]
    pages = {}
    for name in package.__all__:
        cls = getattr(package, name)
        if name in BASES:
            continue
        text = f"# {name}\n\n{row(name)}\n\n{section(name)}\n\n## Use\n\n"
        text += f"```bash\nfedlight fit -c quickstart --{key} {name}\n```\n\n"
        if name in files:
            shown = files[name].relative_to(CONFIGS.parent)
            text += f'```yaml title="{shown}"\n{files[name].read_text().strip()}\n```\n\n'
        text += f"## Definition\n\n::: {path_of(cls)}\n    options: {{members: false, heading_level: 3}}\n"
        pages[plugin_page(folder, name)] = text
    return pages


def reference_pages() -> dict[str, str]:
    """The API reference: a page for the trainer and one for each package."""
    fedlight = importlib.import_module("fedlight")
    pages = {}
    for page in ["trainer", *REFERENCE]:
        package = fedlight if page == "trainer" else importlib.import_module(f"fedlight.{page}")
        names = MAIN if page == "trainer" else package.__all__
        things = []
        for name in names:
            thing = package
            for part in name.split("."):
                thing = getattr(thing, part)
            if (inspect.isclass(thing) or inspect.isfunction(thing)) and getattr(thing, "__doc__", None):
                things.append(path_of(thing))
        text = f"# {'fedlight' if page == 'trainer' else 'fedlight.' + page}\n\n{inspect.getdoc(package)}\n\n"
        if page in ("algorithms", "perturbations"):  # each has a page of its own
            own = [name for name in names if name not in BASES]
            text += "\n".join(f"- [{name}](../{plugin_page(page, name)})" for name in own) + "\n\n"
            things = [path for path in things if path.rsplit(".", 1)[-1] in BASES]
        options = {"fedlight.trainer.FederatedTrainer": f"\n    options: {{inherited_members: {COMMANDS}}}"}
        text += "\n\n".join(f"::: {path}{options.get(path, '')}" for path in dict.fromkeys(things))
        pages[f"reference/{page}.md"] = text
    return pages


def source_page(path: Path) -> str:
    """A file of the repository as a page; of a folder, its YAML files."""
    if path.is_dir():
        files = {file: file.read_text().splitlines() for file in sorted(path.rglob("*.yaml"))}
        lines = [f"- `{file.relative_to(ROOT)}`: {text[0].lstrip('# ')}" for file, text in files.items()]
        return f"# {path.name}/\n\n" + "\n".join(lines) + "\n"
    if path.suffix == ".md":
        return path.read_text()
    language = {".py": "python", ".yaml": "yaml"}.get(path.suffix, "text")
    return f"# {path.name}\n\n````{language}\n{path.read_text()}\n````\n"


GENERATED: dict[str, str] = {}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Generate the pages, and put them into the navigation."""
    GENERATED.clear()
    config.mdx_configs["toc"]["slugify"] = slugify(case="lower")  # anchors as GitHub has them, "choosing-ζ"
    algorithms, perturbations = plugin_pages("algorithms"), plugin_pages("perturbations")
    reference = reference_pages()
    GENERATED.update({"index.md": (ROOT / "README.md").read_text()} | algorithms | perturbations | reference)
    GENERATED["sources/CHANGELOG.md"] = (ROOT / "CHANGELOG.md").read_text()
    for entry in config.nav or []:
        for title, pages in entry.items():
            if title == "Algorithms":
                pages += [*algorithms, {"Perturbations": [*perturbations]}]
            elif title == "API":
                pages += [{page.split("/")[1][:-3]: page} for page in reference]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, and those of files that pages link to."""
    written = {
        file.src_uri: file.content_string for file in files.documentation_pages() if not file.inclusion.is_excluded()
    }
    for uri, text in {**written, **GENERATED}.items():
        for target in LINK.findall(text):
            path = ROOT / linked(uri, target)
            if path.exists() and not path.is_relative_to(ROOT / "docs") and path.name != "README.md":
                GENERATED[f"sources/{path.relative_to(ROOT).with_suffix('.md')}"] = source_page(path)
    for uri, text in GENERATED.items():
        files.append(File.generated(config, uri, content=text))
    return files


def linked(uri: str, target: str) -> str:
    """The file of the repository that a link of this page leads to."""
    folder = {"index.md": "", "sources/CHANGELOG.md": ""}.get(uri, posixpath.join("docs", posixpath.dirname(uri)))
    return posixpath.normpath(posixpath.join(folder, target))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as they are in the repository become links of the site."""
    uri = page.file.src_uri

    def site_link(match: re.Match[str]) -> str:
        path = linked(uri, match[1])
        if path == "README.md":
            goal = "index.md"
        elif path.startswith("docs/"):
            goal = path.removeprefix("docs/")
        elif (ROOT / path).exists():
            goal = f"sources/{Path(path).with_suffix('.md')}"
        else:
            return match[1]
        return posixpath.relpath(goal, posixpath.dirname(uri) or ".")

    return markdown if uri.startswith("sources/") and uri != "sources/CHANGELOG.md" else LINK.sub(site_link, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The few marks of reStructuredText that docstrings have become what they mean."""
    html = re.sub(r":(?:class|meth|func|mod|attr):<code>~?(?:[\w.]*\.)?(\w+)</code>", r"<code>\1</code>", html)
    return html.replace("::</p>", ":</p>")
