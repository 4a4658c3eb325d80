"""Zips the functions that Cargo has built for development, and writes the template that deploys them.

Gap: `sam build` calls cargo-lambda for each function, which cross-compiles into a folder of its own: the AWS SDKs would be compiled
twice, and its calls alone take longer than a deployment. The tests still run it for a function (`cargo xtask test`).

Usage: python package_functions.py PROGRAMS OUTPUT [BUILT]

PROGRAMS holds the programs, OUTPUT gets the template, and functions that `sam build` has built into the folder BUILT are taken from
there.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from samcli.yamlhelper import yaml_parse

ROOT = Path(__file__).parent.parent.resolve()
# Quick, and half the size: a debug build is large, and the local cloud has to take all of it.
LEVEL = 1
EXECUTABLE = 0o755 << 16


def stripped(program):
    """A program without its symbols, which are half of it; as it is where there is no `strip`."""
    if not shutil.which("strip"):
        return program.read_bytes()
    with tempfile.NamedTemporaryFile() as file:
        subprocess.run(["strip", "-o", file.name, program], check=True)
        return Path(file.name).read_bytes()


def zipped(program):
    """The archive of a program, which lies beside it until the program is built anew."""
    archive = program.parent / "functions" / f"{program.name}.zip"
    built = program.stat().st_mtime_ns
    # Its time says of which build it is: Cargo may bring back an older one.
    if not archive.exists() or archive.stat().st_mtime_ns != built:
        archive.parent.mkdir(exist_ok=True)
        unfinished = archive.with_suffix(".unfinished")
        with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_DEFLATED, compresslevel=LEVEL) as file:
            entry = zipfile.ZipInfo("bootstrap")
            entry.external_attr = EXECUTABLE
            entry.compress_type = zipfile.ZIP_DEFLATED
            file.writestr(entry, stripped(program), compresslevel=LEVEL)
        os.utime(unfinished, ns=(built, built))
        unfinished.rename(archive)
    return archive


def code_of(name, function, programs, built):
    """Where a function's code is."""
    if built and (built / name / "bootstrap").exists():
        return built / name
    return zipped(programs / function["Metadata"]["BuildProperties"]["Binary"])


def main():
    programs, output, *built = (Path(argument).resolve() for argument in sys.argv[1:])
    template = yaml_parse((ROOT / "template.yaml").read_text())
    resources = template["Resources"].items()
    functions = {name: one for name, one in resources if one["Type"] == "AWS::Serverless::Function"}
    with ThreadPoolExecutor() as pool:
        codes = pool.map(lambda pair: code_of(*pair, programs, built[0] if built else None), functions.items())
        for function, code in zip(functions.values(), codes):
            function["Properties"]["CodeUri"] = str(code)
    for _, resource in resources:
        if resource["Type"] == "AWS::Serverless::StateMachine":
            properties = resource["Properties"]
            properties["DefinitionUri"] = str(ROOT / properties["DefinitionUri"])
    output.mkdir(parents=True, exist_ok=True)
    # JSON is YAML, which SAM takes seconds to read, again and again.
    (output / "template.yaml").write_text(json.dumps(template, indent=2))


if __name__ == "__main__":
    main()
