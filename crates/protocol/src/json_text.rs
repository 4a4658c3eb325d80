//! JSON that is passed on.

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::value::{RawValue, to_raw_value};
use std::fmt;

/// JSON as the text that it came as: no number loses a digit, and no field its place. A parsed value keeps neither, because it
/// has numbers of 64 bits and, unless a feature of `serde_json` says otherwise, sorted fields.
///
/// It cannot stand in an enum with an internal tag, in an untagged enum or in a flattened struct: serde parses what these hold
/// before it asks for a type.
#[derive(Clone, Serialize, Deserialize)]
#[serde(transparent)]
pub struct JsonText(Box<RawValue>);

impl JsonText {
    /// Reads a text or bytes that hold one JSON value. Fails with what is wrong and where.
    pub fn parse(bytes: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(bytes)
    }

    /// A value's JSON. Fails if it has none, such as a map whose keys are no texts.
    pub fn of(value: &impl Serialize) -> Result<Self, serde_json::Error> {
        to_raw_value(value).map(Self)
    }

    /// JSON's null.
    pub fn null() -> Self {
        Self(RawValue::NULL.to_owned())
    }

    /// The text.
    pub fn get(&self) -> &str {
        self.0.get()
    }

    /// The same without white space between its parts: one line, as programs that read lines expect it.
    #[must_use]
    pub fn compact(&self) -> Self {
        let (mut in_text, mut is_escaped) = (false, false);
        let is_kept = |c: &char| {
            (in_text, is_escaped) = match c {
                _ if is_escaped => (in_text, false),
                '\\' => (in_text, in_text),
                '"' => (!in_text, false),
                _ => (in_text, false),
            };
            in_text || !c.is_ascii_whitespace()
        };
        let text = self.get().chars().filter(is_kept).collect();
        // Without white space it is the same JSON.
        RawValue::from_string(text).map_or_else(|_| self.clone(), Self)
    }

    /// Whether it is null.
    pub fn is_null(&self) -> bool {
        self.get() == "null"
    }
}

impl PartialEq for JsonText {
    fn eq(&self, other: &Self) -> bool {
        self.get() == other.get()
    }
}

impl Eq for JsonText {}

impl fmt::Debug for JsonText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.get())
    }
}

impl fmt::Display for JsonText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.get())
    }
}

/// What was computed here has no digits to lose.
impl From<serde_json::Value> for JsonText {
    fn from(value: serde_json::Value) -> Self {
        // A value always has a text.
        Self::of(&value).unwrap_or_else(|_| Self::null())
    }
}

/// For `deserialize_with`: JSON that must be an object.
pub fn json_object<'de, D: Deserializer<'de>>(deserializer: D) -> Result<JsonText, D::Error> {
    let text = JsonText::deserialize(deserializer)?;
    if text.get().starts_with('{') { Ok(text) } else { Err(D::Error::custom("expected an object")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Without `float_roundtrip` a parsed number of 17 digits may be another one, and 64 bits are not enough for each.
    const EXACT: &str = r#"{"z":117.63331139400017,"a":123456789012345678901234567890,"m":[1.0,1e2,-0,0.10]}"#;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Message {
        #[serde(deserialize_with = "json_object")]
        input: JsonText,
    }

    #[test]
    fn what_is_passed_on_stays_as_it_was() {
        let text = format!(r#"{{"input":{EXACT}}}"#);
        let message: Message = serde_json::from_str(&text).unwrap();
        assert_eq!(message.input.get(), EXACT);
        assert_eq!(serde_json::to_string(&message).unwrap(), text);
        assert_eq!(JsonText::parse(format!(" {EXACT}\n").as_bytes()).unwrap().get(), EXACT);
    }

    #[test]
    fn white_space_goes_from_between_the_parts_only() {
        for (text, compact) in [
            ("{ \"a\" :\r\n [ 1.0,\t2 ] }", r#"{"a":[1.0,2]}"#),
            (r#"[ " a \" b \\" , "\\\" {" ]"#, r#"[" a \" b \\","\\\" {"]"#),
            (EXACT, EXACT),
        ] {
            assert_eq!(JsonText::parse(text.as_bytes()).unwrap().compact().get(), compact);
        }
    }

    #[test]
    fn what_is_no_json_or_no_object_is_refused() {
        for text in ["", "{", "1 2", "NaN"] {
            assert!(JsonText::parse(text.as_bytes()).is_err(), "{text}");
        }
        for text in [r#"{"input":7}"#, r#"{"input":[{}]}"#, r#"{"input":null}"#] {
            let error = serde_json::from_str::<Message>(text).unwrap_err();
            assert!(error.to_string().contains("expected an object"), "{error}");
        }
        assert!(JsonText::parse(b" null ").unwrap().is_null() && JsonText::null().is_null());
    }
}
