"""Write one section of RESULTS.md and leave the others as they are."""

from __future__ import annotations

import datetime
import inspect
import os
import platform
import re
from pathlib import Path

import pandas as pd

FILE = Path(__file__).with_name("RESULTS.md")


def write_section(title: str, text: str, table: pd.DataFrame, command: str, images: tuple[str, ...] = ()) -> None:
    """Replace (or add) the section ``title``: what was run, when and where, and its table."""
    import torch

    where = f"{os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}"
    parts = [
        f"## {title}",
        inspect.cleandoc(text),
        f"`{command}` · {datetime.date.today()} · {where}",
        _markdown(table),
    ]
    parts += [f"![{Path(i).stem}]({i})" for i in images]
    section = "\n\n".join(parts) + "\n"
    old = FILE.read_text() if FILE.exists() else "# Results\n\nWhat was measured, also when it disappoints.\n"
    pattern = re.compile(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)
    new = pattern.sub(lambda _: section + "\n", old) if pattern.search(old) else old.rstrip() + "\n\n" + section
    FILE.write_text(new.rstrip() + "\n")


def _markdown(table: pd.DataFrame) -> str:
    rows = [list(map(str, table.columns)), ["---"] * table.shape[1]]
    rows += [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row] for row in table.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
