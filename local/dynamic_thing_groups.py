"""Dynamic thing groups for the emulator, which has none: groups whose members are those things that a query finds.

Gap: the emulator refuses CreateDynamicThingGroup and its relatives. On AWS the index follows a change within seconds to
minutes; here a thing joins and leaves with the call that changes it. Queries are of fleet indexing's language: terms
`field:value` (also with a space after the colon) with wildcards and quotation marks, AND, OR, NOT and parentheses; no ranges, and
nothing about connectivity.
(https://docs.aws.amazon.com/iot/latest/developerguide/query-syntax.html)
"""

import re

import ministack.services.iot as iot

PREFIX = "/dynamic-thing-groups/"
TOKEN = re.compile(r'\s*(?:(?P<mark>[()])|(?P<word>AND|OR|NOT)\b|(?P<field>[\w.]+):\s*(?P<value>"[^"]*"|(?:\\.|[^\s()])+))')


class InvalidQuery(Exception):
    """The query is not of the language."""


def tokens(query):
    position, found = 0, []
    while query[position:].strip():
        match = TOKEN.match(query, position)
        if not match:
            raise InvalidQuery(query[position:].strip())
        found.append(match.groupdict())
        position = match.end()
    return found


def compiled(query):
    """The query as a function of a thing."""
    rest = tokens(query)

    def take(kind, text):
        if rest and rest[0][kind] == text:
            return rest.pop(0)
        return None

    def alternatives():
        terms = [conjunction()]
        while take("word", "OR"):
            terms.append(conjunction())
        return lambda thing: any(term(thing) for term in terms)

    def conjunction():
        terms = [factor()]
        # Terms that stand side by side are joined by AND.
        while take("word", "AND") or (rest and rest[0]["word"] != "OR" and rest[0]["mark"] != ")"):
            terms.append(factor())
        return lambda thing: all(term(thing) for term in terms)

    def factor():
        if take("word", "NOT"):
            term = factor()
            return lambda thing: not term(thing)
        if take("mark", "("):
            term = alternatives()
            if not take("mark", ")"):
                raise InvalidQuery("a parenthesis is not closed")
            return term
        if not rest or rest[0]["field"] is None:
            raise InvalidQuery("a term is missing")
        token = rest.pop(0)
        value = re.sub(r"\\(.)", r"\1", token["value"].strip('"'))
        return lambda thing: iot._search_value_matches(iot._search_field_value(thing, token["field"], None, {}), value)

    query_of = alternatives()
    if rest:
        raise InvalidQuery("it goes on after its end")
    return query_of


def refused(message, name="InvalidRequestException"):
    return iot.error_response_json(name, message, 400)


async def refresh(groups, things):
    """Lets the things join and leave the groups, with all that follows for jobs."""
    for group in groups:
        matches = compiled(group["queryString"])
        for thing in things:
            names = {"thingGroupName": group["thingGroupName"], "thingName": thing["thingName"]}
            is_member = thing["thingName"] in group.get("things", [])
            if matches(thing) and not is_member:
                await iot._add_thing_to_group(names)
            elif is_member and not matches(thing):
                await iot._remove_thing_from_group(names)


def is_dynamic(group):
    return group is not None and "queryString" in group


async def handle(method, name, payload):
    """CreateDynamicThingGroup, UpdateDynamicThingGroup, DeleteDynamicThingGroup."""
    if method == "DELETE":
        return iot._delete_thing_group(name)
    if iot._thing_indexing_mode() == "OFF":
        return refused("Thing indexing is not enabled")
    query = payload.get("queryString")
    try:
        if query is not None or method == "POST":
            compiled(query or "")
    except InvalidQuery as error:
        return refused(f"{query!r}: {error}", "InvalidQueryException")
    answer = iot._create_thing_group(name, payload) if method == "POST" else iot._update_thing_group(name, payload)
    if answer[0] >= 300:
        return answer
    group = iot._thing_groups[name]
    if query is not None:
        group.update(queryString=query, indexName="AWS_Things", queryVersion="2017-09-30", status="ACTIVE")
        iot._thing_groups[name] = group
    await refresh([group], list(iot._things.values()))
    if method == "PATCH":
        return answer
    members = ("thingGroupName", "thingGroupArn", "thingGroupId", "indexName", "queryString", "queryVersion")
    return iot.json_response({member: group[member] for member in members})


_route_request = iot._route_request


async def route_request(method, path, headers, body, query_params):
    if path.startswith(PREFIX) and method in ("POST", "PATCH", "DELETE"):
        return await handle(method, path.removeprefix(PREFIX), iot._parse_body(body))
    if path in ("/thing-groups/addThingToThingGroup", "/thing-groups/removeThingFromThingGroup"):
        name, _, error = iot._membership_names(iot._parse_body(body))
        if not error and is_dynamic(iot._thing_groups.get(name)):
            return refused(f"{name} is a dynamic thing group: its query decides who is in it")
    answer = await _route_request(method, path, headers, body, query_params)
    thing = iot._things.get(path.removeprefix("/things/")) if path.startswith("/things/") else None
    if thing is not None and method in ("POST", "PATCH"):
        await refresh([group for group in iot._thing_groups.values() if is_dynamic(group)], [thing])
    return answer


def install():
    """Makes the emulator know dynamic thing groups."""
    iot._route_request = route_request
