//! What is read at all: limits on size and depth, looked at before anything is parsed.

use crate::DecodeError;
use serde::de::DeserializeOwned;

/// The largest MQTT payload that AWS IoT takes, in bytes
/// (<https://docs.aws.amazon.com/general/latest/gr/iot-core.html>).
pub const MAX_PAYLOAD_BYTES: usize = 128 * 1024;

/// How deep arrays and objects of JSON may lie in each other. Each level costs whoever parses it, prints it or drops it a piece
/// of its stack. (USP's messages cannot lie in themselves.)
pub const MAX_JSON_DEPTH: usize = 64;

pub(crate) fn check_size(payload: &[u8]) -> Result<(), DecodeError> {
    if payload.len() > MAX_PAYLOAD_BYTES { Err(DecodeError::TooLarge(payload.len())) } else { Ok(()) }
}

/// Fails if JSON is deeper than [`MAX_JSON_DEPTH`]. What is no JSON may pass: who parses it says so.
pub fn check_depth(json: &[u8]) -> Result<(), DecodeError> {
    let (mut depth, mut in_text, mut is_escaped) = (0_usize, false, false);
    for byte in json {
        match byte {
            _ if is_escaped => is_escaped = false,
            b'\\' => is_escaped = in_text,
            b'"' => in_text = !in_text,
            b'[' | b'{' if !in_text => depth += 1,
            b']' | b'}' if !in_text => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth > MAX_JSON_DEPTH {
            return Err(DecodeError::TooDeep);
        }
    }
    Ok(())
}

/// Fails if JSON is an array, whose elements serde would take for an object's fields, one after the other; `what` is named in the
/// error.
pub fn check_object(what: &str, json: &[u8]) -> Result<(), DecodeError> {
    let is_array = json.trim_ascii_start().starts_with(b"[");
    if is_array { Err(DecodeError::malformed(what, "got an array, expected an object")) } else { Ok(()) }
}

/// JSON without what some devices put around it: a byte order mark, and the NUL that ends a text in C.
#[must_use]
pub fn trimmed(json: &[u8]) -> &[u8] {
    let json = json.strip_prefix(b"\xef\xbb\xbf").unwrap_or(json);
    let end = json.iter().rposition(|byte| *byte != 0 && !byte.is_ascii_whitespace()).map_or(0, |last| last + 1);
    &json[..end]
}

/// Reads a JSON payload within the limits; `what` is named in the error, and the field at which it went wrong.
pub(crate) fn json<T: DeserializeOwned>(what: &str, payload: &[u8]) -> Result<T, DecodeError> {
    check_size(payload)?;
    let payload = trimmed(payload);
    check_depth(payload)?;
    check_object(what, payload)?;
    let deserializer = &mut serde_json::Deserializer::from_slice(payload);
    let value = serde_path_to_error::deserialize(&mut *deserializer).map_err(|error| {
        let path = error.path().to_string();
        let reason = error.inner();
        DecodeError::malformed(what, if path == "." { reason.to_string() } else { format!("{path}: {reason}") })
    })?;
    deserializer.end().map_err(|error| DecodeError::malformed(what, error))?;
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn brackets_count_outside_of_texts_only() {
        let nested = |depth: usize| [b"[".repeat(depth), b"]".repeat(depth)].concat();
        assert_eq!(check_depth(&nested(MAX_JSON_DEPTH)), Ok(()));
        assert_eq!(check_depth(&nested(MAX_JSON_DEPTH + 1)), Err(DecodeError::TooDeep));
        assert_eq!(check_depth(&b"{\"a\":".repeat(MAX_JSON_DEPTH + 1)), Err(DecodeError::TooDeep));
        assert_eq!(check_depth(&b"[],".repeat(1000)), Ok(()));
        assert_eq!(check_depth(format!(r#"["{}\\","\"{}"]"#, "[".repeat(100), "{".repeat(100)).as_bytes()), Ok(()));
        assert_eq!(check_depth(format!(r#"["\\"{}"#, "[".repeat(100)).as_bytes()), Err(DecodeError::TooDeep));
    }

    #[test]
    fn what_some_devices_put_around_json_is_left_out() {
        for payload in [&b"\xef\xbb\xbf7"[..], b"7\0", b"\xef\xbb\xbf 7 \r\n\0\0", b"7\0\r\n", b"7 \0 \0\n"] {
            assert_eq!(json::<u8>("number", payload), Ok(7), "{payload:?}");
        }
        for payload in [&b"7\0 8"[..], b"\0", b"\xef\xbb7"] {
            assert!(json::<u8>("number", payload).is_err(), "{payload:?}");
        }
    }

    #[test]
    fn what_follows_the_json_is_not_passed_over() {
        assert_eq!(json::<u8>("number", b" 7 "), Ok(7));
        assert!(json::<u8>("number", b"7 8").is_err());
    }

    /// Found by made-up faults: a worker's `["nonsense", "…"]` was taken for an answer with these two as its first fields.
    #[test]
    fn an_array_is_no_message() {
        #[derive(Debug, PartialEq, serde::Deserialize)]
        struct Message {
            text: String,
        }
        let text = "a".to_owned();
        assert_eq!(json("message", br#" {"text": "a"}"#), Ok(Message { text }));
        let error = json::<Message>("message", br#" ["a"]"#).expect_err("an array");
        assert!(error.to_string().contains("expected an object"), "{error}");
    }
}
