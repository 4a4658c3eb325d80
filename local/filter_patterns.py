"""Filter patterns of CloudWatch Logs, for the emulator, to which every event matches a pattern of fields, and a phrase is any of its words.

Gap: `{ $.a.b = "c" }` compares fields of an event that is JSON, with `=`, `!=`, `&&`, `||` and parentheses; `*` stands for anything.
Any other pattern is of words and phrases in quotation marks, which an event has all (with `-`: not), upper and lower case told apart.
Other patterns are refused here.
(https://docs.aws.amazon.com/AmazonCloudWatch/latest/logs/FilterAndPatternSyntax.html)
"""

import fnmatch
import json
import re

import ministack.services.cloudwatch_logs as logs

TERM = re.compile(r'\s*(-?)(?:"((?:[^"\\]|\\.)*)"|([^\s"?%\[]+))')
FIELD = re.compile(r'\$\.([\w.]+)\s*(!?=)\s*(?:"([^"]*)"|([\w.*-]+))')
TOKEN = re.compile(rf"\s*(?:(?P<mark>[()]|&&|\|\|)|(?P<field>{FIELD.pattern}))")


class InvalidPattern(Exception):
    """The pattern is none of those above."""


def tokens(pattern, token):
    position, found = 0, []
    while pattern[position:].strip():
        match = token.match(pattern, position)
        if not match:
            raise InvalidPattern(pattern[position:].strip())
        found.append(match)
        position = match.end()
    return found


def field(event, path):
    for name in path.split("."):
        event = event.get(name) if isinstance(event, dict) else None
    return event


def comparison(text):
    path, operator, quoted, bare = FIELD.fullmatch(text).groups()
    wanted = bare if quoted is None else quoted

    def matches(event):
        value = field(event, path)
        text = value if isinstance(value, str) else json.dumps(value)
        return value is not None and fnmatch.fnmatchcase(text, wanted) == (operator == "=")

    return matches


def compiled_fields(pattern):
    """A pattern of fields, without its braces, as a function of an event."""
    rest = [match["mark"] or match["field"] for match in tokens(pattern, TOKEN)]

    def sequence(operator, part, of):
        terms = [part()]
        while rest and rest[0] == operator:
            rest.pop(0)
            terms.append(part())
        return lambda event: of(term(event) for term in terms)

    def alternatives():
        return sequence("||", lambda: sequence("&&", factor, all), any)

    def factor():
        token = rest.pop(0) if rest else ""
        if token.startswith("$"):
            return comparison(token)
        if token != "(":
            raise InvalidPattern(token)
        term = alternatives()
        if not rest or rest.pop(0) != ")":
            raise InvalidPattern("a parenthesis is not closed")
        return term

    term = alternatives()
    if rest:
        raise InvalidPattern(rest[0])
    return term


def compile_filter_pattern(pattern):
    """A pattern as a function of an event's message."""
    pattern = (pattern or "").strip()
    if pattern.startswith("{") and pattern.endswith("}"):
        matches = compiled_fields(pattern[1:-1])

        def of_message(message):
            try:
                return matches(json.loads(message))
            except ValueError:
                return False

        return of_message
    terms = []
    for match in tokens(pattern, TERM):
        without, phrase, word = match.groups()
        terms.append((re.sub(r"\\(.)", r"\1", phrase) if word is None else word, not without))
    return lambda message: all((text in message) == wanted for text, wanted in terms)


def install():
    """Makes the emulator match as CloudWatch Logs does."""
    filter_log_events = logs._filter_log_events

    def filtered(data):
        try:
            return filter_log_events(data)
        except InvalidPattern as error:
            return logs.error_response_json("InvalidParameterException", f"Invalid filter pattern: {error}", 400)

    logs._compile_filter_pattern = compile_filter_pattern
    logs._filter_log_events = filtered
