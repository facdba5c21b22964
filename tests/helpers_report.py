"""What tests of several kinds need to compare saved reports."""

import json
from pathlib import Path

TIMES = ("created", "wall_seconds")


def folder_without_times(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file of a saved report, hidden ones too; of report.json without its times."""
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
    files["report.json"] = report_without_times(files["report.json"].decode()).encode()
    return files


def report_without_times(text: str) -> str:
    """Return the text of report.json with its times blanked where they stand, all else as it is."""
    manifest = json.loads(text)["manifest"]
    for name in TIMES:
        if name in manifest:
            entry = f"\n {json.dumps(name)}: "
            line = entry + json.dumps(manifest[name])
            assert text.count(line) == 1, f"{name} is not where the manifest is expected to hold it"
            text = text.replace(line, entry + "null")
    return text


def assert_same_report(a: Path, b: Path) -> None:
    """Fail where two saved reports differ in more than their times."""
    first, second = folder_without_times(Path(a)), folder_without_times(Path(b))
    assert sorted(first) == sorted(second)
    assert [name for name in first if first[name] != second[name]] == []
