//! The built-in handler `add`: `a + b`, as Python adds.

use crate::{Failure, Outcome};
use num_bigint::BigInt;
use protocol::JsonText;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::HashMap;

/// Adds the input's `a` and `b`: numbers, texts or lists.
pub(crate) fn add(input: &JsonText) -> Outcome {
    if kind(input) != "object" {
        let cause = format!("expected an object with a and b, got {}", kind(input));
        return Err(Failure::new("TypeError", cause));
    }
    let fields: HashMap<String, JsonText> = read(input)?;
    let field = |name: &str| fields.get(name).ok_or_else(|| Failure::new("KeyError", format!("'{name}'")));
    sum(field("a")?, field("b")?)
}

fn sum(a: &JsonText, b: &JsonText) -> Outcome {
    match (kind(a), kind(b)) {
        ("number", "number") => numbers(a.get(), b.get()),
        ("string", "string") => written(&format!("{}{}", read::<String>(a)?, read::<String>(b)?)),
        ("list", "list") => written(&[read::<Vec<JsonText>>(a)?, read(b)?].concat()),
        (a, b) => Err(Failure::new("TypeError", format!("unsupported operand types for +: {a} and {b}"))),
    }
}

/// Whole numbers of any size are added as such, others as doubles.
fn numbers(a: &str, b: &str) -> Outcome {
    if let (Ok(a), Ok(b)) = (a.parse::<BigInt>(), b.parse::<BigInt>()) {
        return JsonText::parse((a + b).to_string().as_bytes()).map_err(|error| unusable(&error));
    }
    let sum = a.parse::<f64>().and_then(|a| Ok(a + b.parse::<f64>()?)).unwrap_or(f64::NAN);
    if sum.is_finite() {
        return written(&sum);
    }
    Err(Failure::new("OverflowError", format!("{a} + {b} is out of range")))
}

fn read<T: DeserializeOwned>(json: &JsonText) -> Result<T, Failure> {
    serde_json::from_str(json.get()).map_err(|error| unusable(&error))
}

fn written(value: &impl Serialize) -> Outcome {
    JsonText::of(value).map_err(|error| unusable(&error))
}

fn unusable(error: &serde_json::Error) -> Failure {
    Failure::new("ValueError", error.to_string())
}

fn kind(json: &JsonText) -> &'static str {
    match json.get().as_bytes().first() {
        Some(b'n') => "null",
        Some(b't' | b'f') => "boolean",
        Some(b'"') => "string",
        Some(b'[') => "list",
        Some(b'{') => "object",
        _ => "number",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn json(text: &str) -> JsonText {
        JsonText::parse(text.as_bytes()).unwrap()
    }

    #[test]
    fn what_can_be_added_is_added() {
        for (a, b, sum) in [
            ("15", "42", "57"),
            ("-1", "1", "0"),
            ("1", "0.5", "1.5"),
            ("117.63331139400017", "0", "117.63331139400017"),
            ("0.1", "0.2", "0.30000000000000004"),
            ("-9223372036854775808", "-1", "-9223372036854775809"),
            ("18446744073709551615", "1", "18446744073709551616"),
            ("123456789012345678901234567890", "-1", "123456789012345678901234567889"),
            (r#""a""#, r#""b\u00e4""#, r#""abä""#),
            (
                "[1.0,12345678901234567890123]",
                r#"[{"z":1,"a":0.10}]"#,
                r#"[1.0,12345678901234567890123,{"z":1,"a":0.10}]"#,
            ),
        ] {
            let input = json(&format!(r#"{{"a":{a},"b":{b},"c":null}}"#));
            assert_eq!(add(&input), Ok(json(sum)), "{a} + {b}");
        }
    }

    #[test]
    fn what_cannot_be_added_fails_as_in_python() {
        for (input, exception, cause) in [
            (r#"{"a":1}"#, "KeyError", "'b'"),
            (r#"{"b":1}"#, "KeyError", "'a'"),
            ("[1,2]", "TypeError", "expected an object with a and b, got list"),
            ("null", "TypeError", "expected an object with a and b, got null"),
            (r#"{"a":1,"b":"x"}"#, "TypeError", "unsupported operand types for +: number and string"),
            (r#"{"a":{},"b":{}}"#, "TypeError", "unsupported operand types for +: object and object"),
            (r#"{"a":1e308,"b":1e308}"#, "OverflowError", "is out of range"),
            (r#"{"a":1e999,"b":1}"#, "OverflowError", "is out of range"),
            (r#"{"a":"\ud800","b":""}"#, "ValueError", "line 1 column 8"),
        ] {
            let failure = add(&json(input)).unwrap_err();
            assert_eq!(failure.exception, exception, "{input}");
            let given = failure.cause.unwrap();
            assert!(given.ends_with(cause), "{input}: {given}");
        }
    }
}
