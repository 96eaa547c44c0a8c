"""``imgcap plan``: what an experiment needs, and how long it takes, on a machine that need not be present."""

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from imgcap_jax.cli.experiments import find
from imgcap_jax.cli.options import options_help, override
from imgcap_jax.errors import UserError, check_range
from imgcap_jax.files import check_writable, write_text
from imgcap_jax.plan.topology import LOCAL
from imgcap_jax.user_code import load_all_code


@contextmanager
def _without_cache() -> Iterator[None]:
    """While entered, JAX does not keep compiled programs: it cannot read those for devices that are not there."""
    import jax

    before: bool = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


def _announcement(programs: Sequence[str]) -> str:
    """What is compiled, and how to compile less."""
    if len(programs) == 1:
        return "1 program to compile, which can take minutes"
    first = programs[0]
    return f"{len(programs)} programs to compile, each can take minutes; --programs {first} compiles one"


def plan(options: argparse.Namespace) -> int:
    """Runs the command."""
    if options.help:
        options.parser.print_help()
        if options.experiment is not None:
            print("\n" + options_help(find(options.experiment), command=f"imgcap plan {options.experiment}"))
        return 0
    if options.experiment is None:
        raise UserError("no experiment; give a Python file, or a name such as flickr8k")
    check_range("--words", options.words, above=0)
    if options.json is not None:
        check_writable(options.json)
    if options.topology != LOCAL:
        import jax

        jax.config.update("jax_platforms", "cpu")  # the programs are for other devices than those of this machine
    load_all_code(options.code)
    experiment = override(find(options.experiment), options.rest)
    from imgcap_jax.plan.datasets import sizes_of
    from imgcap_jax.plan.plan import PROGRAMS, make_plan, to_compile
    from imgcap_jax.plan.topology import open_topology
    from imgcap_jax.precision import compute_dtype
    from imgcap_jax.report.plan import lines

    programs = options.programs.split(",") if options.programs else list(PROGRAMS)
    for name in programs:
        if name not in PROGRAMS:
            raise UserError(f"--programs has {name!r}; it must be a comma-separated list of {', '.join(PROGRAMS)}")
    topology = open_topology(options.topology, compute_dtype(experiment.training.dtype))
    sizes = sizes_of(experiment, options.images, options.vocabulary)
    compiled = to_compile(experiment, programs)
    print(_announcement(compiled), flush=True)
    with _without_cache():
        made = make_plan(experiment, sizes, topology, words=options.words, programs=compiled)
    print("\n".join(lines(made, options.experiment)))
    if options.json is not None:
        write_text(options.json, json.dumps(made.results(), indent=2) + "\n")
        print(f"all figures: {options.json}")
    return 0
