"""Studies whose runs are the stub."""

import sys
from pathlib import Path
from typing import Any

import yaml

from fedlight.studies.command import StudyRunner
from fedlight.studies.plan import PlannedRun, plan
from fedlight.studies.study import Study, load_study

STUB = Path(__file__).with_name("stub_fit.py")


def write_study(folder: Path, parameters: dict[str, Any], name: str = "tiny", **settings: Any) -> Path:
    content = {
        "name": name,
        "method": "grid",
        "command": [sys.executable, str(STUB), "fit", "${args}"],
        "parameters": {k: {"values": v} if isinstance(v, list) else v for k, v in parameters.items()},
        **settings,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def read(path: Path) -> tuple[Study, list[PlannedRun]]:
    study = load_study(path)
    return study, plan(study)


def run(path: Path, jobs: int = 1) -> tuple[int, StudyRunner]:
    study, runs = read(path)
    runner = StudyRunner(study, runs, path.parent / "runs", jobs)
    return runner.run(), runner
