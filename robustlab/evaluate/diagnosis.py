"""What the doctor says: findings, checks that passed, and checks that could not be made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Finding:
    """One likely mistake.

    Args:
        check: Name of the check, e.g. ``"double-normalisation"``.
        text: What was seen, with numbers and the number of samples; samples are named by their position in the set.
        fix: What to do about it.
    """

    check: str
    text: str
    fix: str


Outcome = Finding | str | None
"""Of one check: what was found, why it could not be made, or None where it passed."""


@dataclass(frozen=True)
class Diagnosis:
    """What the doctor found in a model and its data.

    Args:
        findings: Likely mistakes.
        passed: Names of the checks that found nothing.
        skipped: (check, reason) of checks that could not be made, or only on a part of the data.
    """

    findings: tuple[Finding, ...] = ()
    passed: tuple[str, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()

    @staticmethod
    def of(outcomes: Iterable[tuple[str, Outcome]]) -> Diagnosis:
        """Return the diagnosis of (check, outcome) pairs."""
        pairs = list(outcomes)
        findings = tuple(outcome for _, outcome in pairs if isinstance(outcome, Finding))
        skipped = tuple(dict.fromkeys((check, outcome) for check, outcome in pairs if isinstance(outcome, str)))
        found = {finding.check for finding in findings}
        passed = tuple(dict.fromkeys(check for check, outcome in pairs if outcome is None and check not in found))
        return Diagnosis(findings, passed, skipped)

    @property
    def healthy(self) -> bool:
        """Nothing was found."""
        return not self.findings

    def new(self, known: Diagnosis, role: str) -> Diagnosis:
        """Return the findings of checks that found nothing in ``known``, with the set they were made on."""
        found = {finding.check for finding in known.findings}
        new = (finding for finding in self.findings if finding.check not in found)
        return Diagnosis(tuple(Finding(item.check, f"On {role}: {item.text}", item.fix) for item in new))

    def merged(self, other: Diagnosis) -> Diagnosis:
        """Return both diagnoses as one; a check passed only if it found nothing in either."""
        findings = tuple(dict.fromkeys((*self.findings, *other.findings)))
        found = {finding.check for finding in findings}
        passed = tuple(name for name in dict.fromkeys((*self.passed, *other.passed)) if name not in found)
        return Diagnosis(findings, passed, tuple(dict.fromkeys((*self.skipped, *other.skipped))))

    def summary(self) -> str:
        """Return the diagnosis as plain text."""
        count = len(self.findings)
        head = "The doctor found nothing" if self.healthy else f"The doctor found {count} problem{'s' * (count > 1)}"
        lines = [f"{head} ({len(self.passed)} checks passed, {len(self.skipped)} skipped in whole or in part)."]
        for finding in self.findings:
            lines += [f"! {finding.check}: {finding.text}", f"  To do: {finding.fix}"]
        if self.passed:
            lines.append(f"Passed: {', '.join(self.passed)}.")
        lines += [f"Skipped {check}: {reason}." for check, reason in self.skipped]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return the diagnosis as JSON types."""
        return {
            "healthy": self.healthy,
            "findings": [{"check": f.check, "text": f.text, "fix": f.fix} for f in self.findings],
            "passed": list(self.passed),
            "skipped": [{"check": check, "reason": reason} for check, reason in self.skipped],
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Diagnosis:
        """Rebuild what ``to_dict`` wrote."""
        return Diagnosis(
            findings=tuple(Finding(item["check"], item["text"], item["fix"]) for item in data["findings"]),
            passed=tuple(data["passed"]),
            skipped=tuple((item["check"], item["reason"]) for item in data["skipped"]),
        )
