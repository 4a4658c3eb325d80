//! Whole numbers as state machines write them: `JSONata` has one kind of number, so that what it computes may come as `3600.0`.

use serde::de::{Deserialize, Deserializer, Error, Unexpected, Visitor};
use std::fmt;
use std::marker::PhantomData;

/// The largest whole number of which floating point knows the neighbours.
const MAX_EXACT: f64 = 9_007_199_254_740_991.0;

/// For `deserialize_with`: a whole number, however it is written.
pub fn whole<'de, D: Deserializer<'de>, T: TryFrom<i128>>(deserializer: D) -> Result<T, D::Error> {
    deserializer.deserialize_any(Whole(PhantomData))
}

/// The same where the number may be missing, together with `default`.
pub fn optional_whole<'de, D: Deserializer<'de>, T: TryFrom<i128>>(deserializer: D) -> Result<Option<T>, D::Error> {
    let number = Option::<Number<T>>::deserialize(deserializer)?;
    Ok(number.map(|Number(number)| number))
}

struct Number<T>(T);

impl<'de, T: TryFrom<i128>> Deserialize<'de> for Number<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        whole(deserializer).map(Self)
    }
}

struct Whole<T>(PhantomData<T>);

impl<T: TryFrom<i128>> Visitor<'_> for Whole<T> {
    type Value = T;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}", std::any::type_name::<T>())
    }

    fn visit_i64<E: Error>(self, number: i64) -> Result<T, E> {
        T::try_from(number.into()).map_err(|_| E::invalid_value(Unexpected::Signed(number), &self))
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<T, E> {
        T::try_from(number.into()).map_err(|_| E::invalid_value(Unexpected::Unsigned(number), &self))
    }

    fn visit_f64<E: Error>(self, number: f64) -> Result<T, E> {
        let is_whole = number.fract() == 0.0 && number.abs() <= MAX_EXACT;
        // Within the bounds the conversion keeps the value.
        #[allow(clippy::cast_possible_truncation)]
        let exact = is_whole.then_some(number as i128);
        let value = exact.and_then(|number| T::try_from(number).ok());
        value.ok_or_else(|| E::invalid_value(Unexpected::Float(number), &self))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, serde::Deserialize)]
    struct Numbers {
        #[serde(deserialize_with = "whole")]
        seconds: u32,
        #[serde(default, deserialize_with = "optional_whole")]
        at: Option<i64>,
    }

    #[test]
    fn a_number_that_was_computed_is_as_good_as_one_that_was_written() {
        let read = |text: &str| serde_json::from_str::<Numbers>(text).map_err(|error| error.to_string());
        for text in [r#"{"seconds":3600}"#, r#"{"seconds":3600.0}"#, r#"{"seconds":3.6e3,"at":null}"#] {
            assert_eq!(read(text), Ok(Numbers { seconds: 3600, at: None }), "{text}");
        }
        let at = Some(1_795_238_492_000);
        assert_eq!(read(r#"{"seconds":0,"at":1795238492000}"#), Ok(Numbers { seconds: 0, at }));
        assert_eq!(read(r#"{"seconds":0,"at":1.795238492E12}"#), Ok(Numbers { seconds: 0, at }));
        for text in [
            r#"{"seconds":3600.5}"#,
            r#"{"seconds":-1}"#,
            r#"{"seconds":-1.0}"#,
            r#"{"seconds":4294967296}"#,
            r#"{"seconds":4294967296.0}"#,
            r#"{"seconds":"3600"}"#,
            r#"{"seconds":null}"#,
            r#"{"seconds":0,"at":1e300}"#,
        ] {
            assert!(read(text).is_err(), "{text}");
        }
        let error = read(r#"{"seconds":-1}"#).unwrap_err();
        assert!(error.starts_with("invalid value: integer `-1`, expected u32"), "{error}");
    }
}
