"""`ftray report`: a run's page made anew, or several runs on one."""

from __future__ import annotations

import json

from ftray.config import load_run


def report_command(names: list[str], to: str, *, as_json: bool) -> None:
    from ftray.cli.export import folder_of
    from ftray.evaluate.report import write_report
    from ftray.evaluate.together import write_comparison

    folders = [folder_of(name, load_run(name).folder) for name in names]
    written = write_report(folders[0]) if len(folders) == 1 else write_comparison(folders, to)
    print(json.dumps({"runs": folders, "report": written}) if as_json else written)
