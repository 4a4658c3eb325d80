//! The built-in handler `add`: `a + b`, as Python adds.

use crate::{Failure, Outcome};
use serde_json::{Number, Value};

/// Adds the input's `a` and `b`: numbers, texts or lists.
pub(crate) fn add(input: &Value) -> Outcome {
    let Value::Object(fields) = input else {
        let cause = format!("expected an object with a and b, got {}", kind(input));
        return Err(Failure::new("TypeError", cause));
    };
    let field = |name: &str| fields.get(name).ok_or_else(|| Failure::new("KeyError", format!("'{name}'")));
    sum(field("a")?, field("b")?)
}

fn sum(a: &Value, b: &Value) -> Outcome {
    match (a, b) {
        (Value::Number(a), Value::Number(b)) => numbers(a, b),
        (Value::String(a), Value::String(b)) => Ok(format!("{a}{b}").into()),
        (Value::Array(a), Value::Array(b)) => Ok([a.as_slice(), b].concat().into()),
        _ => {
            let cause = format!("unsupported operand types for +: {} and {}", kind(a), kind(b));
            Err(Failure::new("TypeError", cause))
        }
    }
}

fn numbers(a: &Number, b: &Number) -> Outcome {
    if let (Some(a), Some(b)) = (a.as_i128(), b.as_i128())
        && let Some(sum) = Number::from_i128(a + b)
    {
        return Ok(sum.into());
    }
    let sum = a.as_f64().zip(b.as_f64()).and_then(|(a, b)| Number::from_f64(a + b));
    sum.map(Value::from).ok_or_else(|| Failure::new("OverflowError", format!("{a} + {b} is out of range")))
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "list",
        Value::Object(_) => "object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_can_be_added_is_added() {
        for (a, b, sum) in [
            (json!(15), json!(42), json!(57)),
            (json!(-1), json!(1), json!(0)),
            (json!(1), json!(0.5), json!(1.5)),
            (json!(i64::MIN), json!(-1), json!(-9_223_372_036_854_775_809.0)),
            (json!(u64::MAX), json!(1), json!(18_446_744_073_709_551_616.0)),
            (json!("a"), json!("b"), json!("ab")),
            (json!([1]), json!(["x"]), json!([1, "x"])),
        ] {
            assert_eq!(add(&json!({"a": a, "b": b, "c": null})), Ok(sum), "{a} + {b}");
        }
    }

    #[test]
    fn what_cannot_be_added_fails_as_in_python() {
        for (input, exception, cause) in [
            (json!({"a": 1}), "KeyError", "'b'"),
            (json!({"b": 1}), "KeyError", "'a'"),
            (json!([1, 2]), "TypeError", "expected an object with a and b, got list"),
            (json!(null), "TypeError", "expected an object with a and b, got null"),
            (json!({"a": 1, "b": "x"}), "TypeError", "unsupported operand types for +: number and string"),
            (json!({"a": {}, "b": {}}), "TypeError", "unsupported operand types for +: object and object"),
            (json!({"a": f64::MAX, "b": f64::MAX}), "OverflowError", "is out of range"),
        ] {
            let failure = add(&input).unwrap_err();
            assert_eq!(failure.exception, exception, "{input}");
            assert!(failure.cause.unwrap().ends_with(cause), "{input}");
        }
    }
}
