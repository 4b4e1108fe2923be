"""What came out: a line for each check on the terminal, JUnit XML for machines that collect tests, JSON with all of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

Verdict = Literal["ok", "FAILED", "left out"]


@dataclass(frozen=True)
class Outcome:
    """How a check ended; `text` is what it told, the failure, or the reason why it was left out."""

    name: str
    title: str
    verdict: Verdict
    seconds: float
    text: str = ""


@dataclass
class Report:
    """All outcomes of a run."""

    facts: Mapping[str, object]
    outcomes: list[Outcome] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        """Keep an outcome and say it: one line, and all of a failure's text below it."""
        self.outcomes.append(outcome)
        first, _, rest = outcome.text.partition("\n")
        print(f"{outcome.verdict:8} {outcome.seconds:7.1f} s  {outcome.title}{': ' if first else ''}{first}")
        if outcome.verdict == "FAILED":
            for line in rest.splitlines():
                print(f"    {line}")
        sys.stdout.flush()

    def count(self, verdict: Verdict) -> int:
        """How many checks ended so."""
        return sum(outcome.verdict == verdict for outcome in self.outcomes)

    @property
    def good(self) -> bool:
        """Whether something was checked, and nothing failed."""
        return bool(self.count("ok")) and not self.count("FAILED")

    def summary(self) -> str:
        """One line: the numbers."""
        return f"{self.count('ok')} passed, {self.count('FAILED')} failed, {self.count('left out')} left out"

    def write(self, directory: Path) -> None:
        """Write `junit.xml` and `results.json` into `directory`."""
        directory.mkdir(parents=True, exist_ok=True)
        ElementTree.ElementTree(self._junit()).write(directory / "junit.xml", encoding="utf-8", xml_declaration=True)
        whole = {
            "format": 1,
            "passed": self.count("ok"),
            "failed": self.count("FAILED"),
            "left_out": self.count("left out"),
            "facts": dict(self.facts),
            "checks": [asdict(outcome) for outcome in self.outcomes],
        }
        (directory / "results.json").write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n")

    def _junit(self) -> ElementTree.Element:
        suite = ElementTree.Element("testsuite", name="unionfs integration", tests=str(len(self.outcomes)))
        suite.set("failures", str(self.count("FAILED")))
        suite.set("skipped", str(self.count("left out")))
        suite.set("time", f"{sum(outcome.seconds for outcome in self.outcomes):.3f}")
        properties = ElementTree.SubElement(suite, "properties")
        for name, value in self.facts.items():
            ElementTree.SubElement(properties, "property", name=name, value=_xml(str(value)))
        for outcome in self.outcomes:
            case = ElementTree.SubElement(suite, "testcase", classname="integration", name=outcome.name)
            case.set("time", f"{outcome.seconds:.3f}")
            text = _xml(outcome.text)
            if outcome.verdict == "FAILED":
                ElementTree.SubElement(case, "failure", message=text.partition("\n")[0]).text = text
            elif outcome.verdict == "left out":
                ElementTree.SubElement(case, "skipped", message=text)
            else:
                ElementTree.SubElement(case, "system-out").text = text
        return suite


def _xml(text: str) -> str:
    """Text without the control characters that XML can't hold."""
    return "".join(char if char in "\t\n\r" or char >= " " else f"\\x{ord(char):02x}" for char in text)
