//! Text from outside: what it is worth, and what of it may be repeated.

use percent_encoding::percent_decode_str;

/// Stands for what was taken out.
const REDACTED: &str = "…";

/// Parameters whose values let their bearer in, as presigned addresses of S3, Google, Azure and `CloudFront` have them. In
/// small letters; with the `=` also where an address is a parameter of another one.
const SECRETS: [&str; 12] = [
    "x-amz-signature",
    "x-amz-credential",
    "x-amz-security-token",
    "x-goog-signature",
    "x-goog-credential",
    "awsaccesskeyid=",
    "signature=",
    "signature%3d",
    "sig=",
    "sig%3d",
    "token=",
    "token%3d",
];

/// The text without what is secret in its addresses: the query, and a user with a password. Scheme, host and path stay.
/// Every text from outside that is kept, logged or repeated goes through here.
#[must_use]
pub fn redacted(text: &str) -> String {
    let ends_word = |c: char| c.is_whitespace() || matches!(c, '"' | '\'' | '<' | '>' | '`');
    text.split_inclusive(ends_word)
        .map(|part| {
            let word = part.trim_end_matches(ends_word);
            redacted_word(word) + &part[word.len()..]
        })
        .collect()
}

fn redacted_word(word: &str) -> String {
    let lower = word.to_ascii_lowercase();
    // Slashes may be escaped, as in some devices' JSON.
    let host = ["://", ":\\/\\/"].iter().find_map(|mark| lower.find(mark).map(|at| at + mark.len()));
    let secret = SECRETS.iter().filter_map(|name| lower.find(name)).min();
    let begin = host.unwrap_or_default();
    let query = ["?", "#", "%3f"].iter().filter_map(|mark| lower[begin..].find(mark).map(|at| begin + at)).min();
    let cut = match (query, secret) {
        (Some(query), Some(secret)) => Some(query.min(secret)),
        // A question mark in a sentence is no query.
        (Some(query), None) => host.map(|_| query),
        (None, secret) => secret,
    };
    let kept = &word[..cut.unwrap_or(word.len())];
    let mut clean = without_user(kept, begin);
    if let Some(cut) = cut {
        let end = word[cut..].trim_end_matches([')', ']', '}', ',', ';', '.', ':']).len();
        // The mark shows that there was a query.
        clean.push_str(if word[cut..].starts_with('?') { "?" } else { "" });
        clean.push_str(REDACTED);
        clean.push_str(&word[cut + end..]);
    }
    clean
}

/// The address without the user and password before its host, which begins at `host`; 0 if it is no address.
fn without_user(address: &str, host: usize) -> String {
    let authority = address.get(host..).unwrap_or_default().split(['/', '\\']).next().unwrap_or_default();
    match authority.rfind('@') {
        Some(at) if host > 0 => format!("{}{REDACTED}{}", &address[..host], &address[host + at..]),
        _ => address.to_owned(),
    }
}

/// The version in what a device reports as one; none if nothing is left. The reference agent reports what follows the last
/// `/` of the address that it downloaded, a presigned address's query included, and percent-encoded as it stands there.
#[must_use]
pub fn reported_version(text: &str) -> Option<String> {
    let version = text.split(['?', '#']).next().unwrap_or_default();
    let version = percent_decode_str(version).decode_utf8_lossy().into_owned();
    Some(version).filter(|version| !version.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUERY: &str = "x-id=GetObject&X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=ASIAEXAMPLE%2F20261130%2Feu-west-1\
                         &X-Amz-Security-Token=IQoJb3JpZ2lu&X-Amz-Signature=0123456789abcdef";

    #[test]
    fn what_an_address_keeps_secret_is_not_repeated() {
        let escaped = QUERY.replace('=', "%3D").replace('&', "%26");
        for (text, expected) in [
            (
                format!("GET https://b.s3.example.com/firmware/1.2.3?{QUERY} failed"),
                "GET https://b.s3.example.com/firmware/1.2.3?… failed",
            ),
            (
                format!("error for url (https://h:8443/f?{QUERY}): refused"),
                "error for url (https://h:8443/f?…): refused",
            ),
            (format!("{{\"url\":\"https://h/f?{QUERY}\",\"x\":1}}"), "{\"url\":\"https://h/f?…\",\"x\":1}"),
            (format!("{{\"url\":\"https:\\/\\/h\\/f?{QUERY}\"}}"), "{\"url\":\"https:\\/\\/h\\/f?…\"}"),
            (format!("version 1.2.3?{QUERY} runs"), "version 1.2.3?… runs"),
            (
                format!("via http://proxy/get/https%3A%2F%2Fh%2Ff%3F{escaped}"),
                "via http://proxy/get/https%3A%2F%2Fh%2Ff…",
            ),
            ("cut: https://h/f?x-id=GetObj".to_owned(), "cut: https://h/f?…"),
            ("refused: X-Amz-Signature=0123, sig=abc".to_owned(), "refused: …, …"),
            ("https://h/f?sv=2026&sig=abc#top https://h/f#token".to_owned(), "https://h/f?… https://h/f…"),
            ("ftp://me:secret@h/f and https://me@h".to_owned(), "ftp://…@h/f and https://…@h"),
        ] {
            assert_eq!(redacted(&text), expected);
            assert_eq!(redacted(expected), expected, "once more");
        }
    }

    #[test]
    fn other_texts_stay_as_they_are() {
        for text in [
            "",
            "Download operation is failed, fault code (404)",
            "why? because",
            "what?=\n ä?ö",
            "#7: 100 % of 3F",
            "https://h:1/a/b.bin, again",
            "me@example.com",
            "x-amz-request-id: ABC",
            "{\"a\":1.2.1\"}",
            "config=design=1",
        ] {
            assert_eq!(redacted(text), text);
        }
    }

    #[test]
    fn a_reported_version_ends_where_an_address_query_begins() {
        for (reported, version) in [
            ("1.2.3", Some("1.2.3")),
            ("1.2.3?x-id=GetObject&X-Amz-Signature=0", Some("1.2.3")),
            ("1.2.3#x", Some("1.2.3")),
            ("1%2E2%2c3?a#b", Some("1.2,3")),
            ("100%", Some("100%")),
            ("", None),
            ("?a=b", None),
            ("ä%FF", Some("ä\u{fffd}")),
        ] {
            assert_eq!(reported_version(reported).as_deref(), version, "{reported}");
        }
    }
}
