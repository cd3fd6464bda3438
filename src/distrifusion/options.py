"""Options that several commands of the command line take alike."""

from __future__ import annotations

from typing import Annotated

import typer

Patches = Annotated[
    list[str] | None,
    typer.Option(help="Of pipelined, see generate; none is one too; may be given again. Default: none."),
]
StageRanks = Annotated[
    list[int] | None,
    typer.Option(help="Of pipelined: ranks of each stage, see generate; may be given again. Default: 1."),
]
Strides = Annotated[list[int] | None, typer.Option(help="Of pipelined, see generate; may be given again. Default: 1.")]
