"""`recache-compile rebuild`: new engines for an artifact."""

from pathlib import Path
from typing import Any

import click

from recache_compile.cli.building import RUNTIME_HELP, cache_size_option, chosen_runtime, tensorrt_options
from recache_compile.cli.console import notice, say, showing_stages


@click.command("rebuild")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--runtime", help=f"{RUNTIME_HELP}  [default: the artifact's]")
@click.option("--device", help="cpu, cuda or cuda:1.  [default: the artifact's where it is here, else cpu]")
@click.option("--output", type=click.Path(path_type=Path), help="Artifact folder.  [default: ARTIFACT itself]")
@cache_size_option
@tensorrt_options
def rebuild_command(
    artifact: Path, runtime: str | None, device: str | None, output: Path | None, **building: Any
) -> None:
    """Build the engines of an ARTIFACT anew: for this machine, another GPU or another runtime.

    Neither the model nor its checkpoint is needed; schedules and weights stay as they are.
    """
    folder = output or artifact
    with showing_stages():
        from recache_compile.artifact.manifest import read_manifest
        from recache_compile.artifact.rebuild import rebuild
        from recache_compile.artifact.store import check_writable
        from recache_compile.runtimes.base import requirement_texts
        from recache_compile.support.files import check_place, output_errors

        name = read_manifest(artifact).description.config.runtime
        if output is None:
            with output_errors(folder, "folder"):
                check_place(folder)
        else:
            check_writable(output)
        chosen = None
        if runtime is not None or any(value not in (None, False) for value in building.values()):
            chosen = chosen_runtime(runtime or name, building, notice)
        compiled = rebuild(artifact, chosen, device)
        compiled.save(folder)
    built_for = ", ".join(requirement_texts(compiled.engines.requirements)) or "any machine"
    say(f"{folder}  ({compiled.description.config.runtime}, for {built_for})")
