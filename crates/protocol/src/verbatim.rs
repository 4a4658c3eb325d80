//! Texts that some devices write as numbers: digit by digit, for `2.10` is not `2.1`.

use serde::de::{Deserialize, Deserializer, Error};
use serde_json::value::RawValue;
use std::fmt::Display;
use std::str::FromStr;

/// For `deserialize_with`: a text, or what a number is written as; none of anything else.
pub(crate) fn optional<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    let raw = Box::<RawValue>::deserialize(deserializer)?;
    let is_number = raw.get().starts_with(|c: char| c == '-' || c.is_ascii_digit());
    Ok(if is_number { Some(raw.get().to_owned()) } else { serde_json::from_str(raw.get()).ok() })
}

/// The same, read further.
pub(crate) fn parsed<'de, D: Deserializer<'de>, T: FromStr<Err: Display>>(deserializer: D) -> Result<T, D::Error> {
    let text = optional(deserializer)?.ok_or_else(|| D::Error::custom("expected a text"))?;
    text.parse().map_err(D::Error::custom)
}
