"""results.py: the result file: one entry per item, kept across runs, written anew after every item.

    {"machine": {...}, "dry_run": false, "parts": {part: {item: {"status", "command", "machine", "date", "commit",
                                                                "seconds", "values"}}}}

status is "ok", "failed: why" or "skipped: why". A run replaces the items it measures and leaves all others; an item
that it only skipped does not replace one that was measured.
"""
import json
import os


class ResultsError(Exception):
    """A message for the user, one line."""


class Results:
    def __init__(self, path, machine, dry_run):
        self.path = path
        self.content = {"machine": machine, "dry_run": dry_run, "parts": {}}
        if path.exists():
            self.content["parts"] = read(path)["parts"]

    def get(self, part, item):
        return self.content["parts"].get(part, {}).get(item)

    def put(self, part, item, entry):
        before = self.get(part, item)
        if entry["status"].startswith("skipped") and before and not before["status"].startswith("skipped"):
            return
        self.content["parts"].setdefault(part, {})[item] = entry
        self.save()

    def save(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.content, indent=1) + "\n")
        os.replace(temporary, self.path)


def read(path):
    """The content of a result file. Throws ResultsError where it is none."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ResultsError(f"{path}: cannot be read as a result file ({error})") from None
    if not isinstance(content, dict) or not isinstance(content.get("parts"), dict) or "machine" not in content:
        raise ResultsError(f"{path}: is not a result file of this script")
    return content
