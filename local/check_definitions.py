"""Checks statemachine/*.asl.json: JSONata, placeholders, the schema of AWS, and that the local interpreter takes them.

Usage: python check_definitions.py [FOLDER OF THE PROJECT]; exit code 1 when there is a finding.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import jsonata
import yaml
from moto.stepfunctions.parser.asl.parse.asl_parser import AmazonStateLanguageParser

PLACEHOLDER = re.compile(r"\$\{([A-Za-z0-9]+)\}")
# What a placeholder stands for, where a number will not do.
VALUES = {"Partition": "aws"}
STATE_MACHINE_TYPES = ("AWS::Serverless::StateMachine", "AWS::StepFunctions::StateMachine")
# Fields that take a number or an expression; a heartbeat must be shorter than its time-out.
NUMBERS = {
    "HeartbeatSeconds": 1,
    "MaxConcurrency": 2,
    "Seconds": 2,
    "TimeoutSeconds": 2,
    "ToleratedFailureCount": 2,
    "ToleratedFailurePercentage": 2,
}


class TemplateLoader(yaml.SafeLoader):
    """Reads the short forms of intrinsic functions (`!Ref X`) as their plain content."""


def _short_form(loader, _suffix, node):
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    return loader.construct_scalar(node)


TemplateLoader.add_multi_constructor("!", _short_form)


def expressions(value, path="$"):
    """Every JSONata expression in the definition with the path that leads to it."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from expressions(item, f"{path}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from expressions(item, f"{path}[{index}]")
    elif isinstance(value, str) and value.startswith("{%"):
        yield path, value


def check_expressions(definition):
    """Each `{% … %}` compiles."""
    for path, text in expressions(definition):
        if not text.endswith("%}"):
            yield f"{path}: the expression does not end with %}}: {text}"
            continue
        try:
            jsonata.Jsonata(text[2:-2].strip())
        except Exception as error:
            yield f"{path}: {error}: {text}"


def check_placeholders(text, substitutions):
    """Each `${Name}` is supplied by the template, and the template supplies no other."""
    used = set(PLACEHOLDER.findall(text))
    for name in sorted(used - substitutions):
        yield f"${{{name}}} is not in DefinitionSubstitutions of template.yaml"
    for name in sorted(substitutions - used):
        yield f"DefinitionSubstitutions of template.yaml supplies {name}, which the definition does not use"


def with_plain_numbers(value):
    """The definition with a number for each expression where AWS takes either and the schema only knows the number."""
    if isinstance(value, list):
        return [with_plain_numbers(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: NUMBERS[key] if key in NUMBERS and str(item).startswith("{%") else with_plain_numbers(item)
        for key, item in value.items()
    }


def check_schema(definition):
    """cfn-lint finds the definition valid; it looks at definitions only where they stand inside a template."""
    properties = {"RoleArn": "arn:aws:iam::000000000000:role/any", "Definition": with_plain_numbers(definition)}
    template = {"Resources": {"Definition": {"Type": "AWS::StepFunctions::StateMachine", "Properties": properties}}}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "template.json")
        file.write_text(json.dumps(template))
        command = [Path(sys.executable).parent / "cfn-lint", "--format", "json", "--regions", "eu-west-1", "--", file]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    # Exit code 32 and below are sums of finding levels; anything without JSON is a failure of cfn-lint itself.
    try:
        findings = json.loads(result.stdout or "[]")
    except ValueError:
        raise SystemExit(f"cfn-lint failed: {result.stdout}{result.stderr}") from None
    for finding in findings:
        path = ".".join(str(part) for part in finding["Location"]["Path"][4:])
        yield f"$.{path}: {finding['Rule']['Id']} {finding['Message']}"


def check_parser(text):
    """The interpreter of the local cloud accepts the definition."""
    try:
        AmazonStateLanguageParser.parse(text)
    except Exception as error:
        # The parser's list of all words that it would have liked instead is long and says nothing.
        yield f"the local interpreter refuses it: {str(error).partition(' expecting {')[0]}"


def substitutions_by_file(root):
    """The names that template.yaml supplies to each definition file."""
    template = yaml.load((root / "template.yaml").read_text(), Loader=TemplateLoader)  # noqa: S506  a SafeLoader
    machines = [r for r in template["Resources"].values() if r["Type"] in STATE_MACHINE_TYPES]
    return {
        str(Path(machine["Properties"]["DefinitionUri"])): set(machine["Properties"].get("DefinitionSubstitutions", {}))
        for machine in machines
        if "DefinitionUri" in machine["Properties"]
    }


def check(file, root, substitutions):
    """All findings of one file."""
    text = file.read_text()
    name = str(file.relative_to(root))
    if name not in substitutions:
        yield "no state machine of template.yaml has this file as its DefinitionUri"
    else:
        yield from check_placeholders(text, substitutions[name])
    filled = PLACEHOLDER.sub(lambda placeholder: VALUES.get(placeholder[1], "1"), text)
    try:
        definition = json.loads(filled)
    except ValueError as error:
        yield f"not JSON: {error}"
        return
    yield from check_expressions(definition)
    yield from check_schema(definition)
    yield from check_parser(filled)


def main():
    root = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent.parent).resolve()
    substitutions = substitutions_by_file(root)
    files = sorted((root / "statemachine").glob("*.asl.json"))
    missing = sorted(set(substitutions) - {str(file.relative_to(root)) for file in files})
    findings = [f"{name}: template.yaml names this definition, but there is no such file" for name in missing]
    for file in files:
        findings += [f"{file.relative_to(root)}: {finding}" for finding in check(file, root, substitutions)]
    for finding in findings:
        print(finding)
    if findings:
        raise SystemExit(1)
    print(f"{len(files)} state machine definitions are valid")


if __name__ == "__main__":
    main()
