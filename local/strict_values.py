"""What AWS looks at in values and the emulator does not: the emulator takes anything, and what AWS refuses shows only there.

Each pattern is that of the API's reference; `crates/protocol/src/fields.rs` has the same ones for the product.
"""

import re
import unicodedata

import ministack.services.iot as iot

# https://docs.aws.amazon.com/iot/latest/apireference/API_AttributePayload.html
ATTRIBUTE_NAME = re.compile(r"[a-zA-Z0-9_.,@/:#-]{1,128}")
ATTRIBUTE_VALUE = re.compile(r"[a-zA-Z0-9_.,@/:#=\[\]-]{0,800}")
# https://docs.aws.amazon.com/iot/latest/apireference/API_iot-jobs-data_UpdateJobExecution.html
DETAIL_NAME = re.compile(r"[a-zA-Z0-9:_-]{1,128}")
DETAIL_CHARACTERS = 1024
# "Topic and topic filter": https://docs.aws.amazon.com/general/latest/gr/iot-core.html
MAX_SLASHES = 7
BASIC_INGEST = re.compile(r"\$aws/rules/[^/]+/")


def is_printable(text, maximum):
    """[^\\p{C}]+, where C is more than control characters: format, surrogate, private use and unassigned ones as well."""
    units = len(text.encode("utf-16-le")) // 2
    return 1 <= units <= maximum and not any(unicodedata.category(c).startswith("C") for c in text)


def refused(value, member, constraint):
    return iot._job_validation_error([iot._job_validation_clause(value, member, constraint)])


def attributes_error(payload):
    for name, value in ((payload.get("attributePayload") or {}).get("attributes") or {}).items():
        for text, pattern in ((name, ATTRIBUTE_NAME), (value or "", ATTRIBUTE_VALUE)):
            if not pattern.fullmatch(text):
                constraint = f"Member must satisfy regular expression pattern: {pattern.pattern}"
                return refused(text, "attributePayload.attributes", constraint)
    return None


def details_error(details):
    for name, value in (details or {}).items():
        if not DETAIL_NAME.fullmatch(name) or not is_printable(value, DETAIL_CHARACTERS):
            return refused(value, f"statusDetails.{name}", r"Member must satisfy regular expression pattern: [^\p{C}]+")
    return None


def job_error(name, payload):
    """The emulator looks at all of a job only when it is updated."""
    violations = iot._job_update_violations(name, payload)
    return iot._job_validation_error(violations) if violations else None


def has_too_many_slashes(topic):
    """Of topics that clients publish on; topic_decoding.py counts those of topics that are published over HTTPS."""
    return BASIC_INGEST.sub("", topic).count("/") > MAX_SLASHES


def install():
    """Makes the emulator refuse what AWS refuses."""
    handle_thing, handle_job = iot._handle_thing, iot._handle_job
    status_details_error, validate_publish_topic = iot._jobs_status_details_error, iot._validate_publish_topic
    create_job_template = iot._create_job_template

    def strict_thing(method, path, body, qp):
        error = attributes_error(iot._parse_body(body)) if method in ("POST", "PATCH") else None
        return error or handle_thing(method, path, body, qp)

    async def strict_job(method, path, body, qp):
        error = None
        if method == "PUT" and path.count("/") == 2:
            error = job_error(path.rsplit("/", 1)[1], iot._parse_body(body))
        return error or await handle_job(method, path, body, qp)

    def strict_job_template(name, payload):
        return job_error(name, payload) or create_job_template(name, payload)

    def strict_details(details):
        return status_details_error(details) or details_error(details)

    iot._handle_thing = strict_thing
    iot._handle_job = strict_job
    iot._create_job_template = strict_job_template
    iot._jobs_status_details_error = strict_details
    iot._validate_publish_topic = lambda topic: validate_publish_topic(topic) and not has_too_many_slashes(topic)
