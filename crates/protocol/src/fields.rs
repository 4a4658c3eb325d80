//! What AWS takes in the fields that our values end in: the one table of patterns and lengths, with their sources.
//!
//! A value is checked where it enters ([`Field::check`]), so that whoever sent it hears why; text that nobody of ours has
//! written, such as a device's error message, is fitted ([`Field::fit`]).

use percent_encoding::percent_decode_str;
use unicode_general_category::{GeneralCategory, get_general_category};

/// A field of an API of AWS.
#[derive(Debug, Clone, Copy)]
pub struct Field {
    /// What a value of it is called.
    pub name: &'static str,
    /// The characters that it takes.
    pub characters: Characters,
    /// How many of them at most. AWS counts characters; where a character needs two units of UTF-16, we count two, so that
    /// a value fits whichever way an API counts.
    pub max: usize,
    /// Whether there must be at least one.
    pub is_required: bool,
}

/// The characters that a field takes.
#[derive(Debug, Clone, Copy)]
pub enum Characters {
    /// `a-z`, `A-Z`, `0-9` and these.
    Ascii(&'static str),
    /// `[^\p{C}]`: whatever is not of Unicode's category "other", which holds control characters, format characters (such as
    /// the joiner inside an emoji), private use and what is not assigned.
    Printable,
}

/// A value is not what a field takes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected {0}")]
pub struct Unfit(String);

impl Unfit {
    /// What was expected.
    pub fn expected(&self) -> &str {
        &self.0
    }
}

/// A thing's name (<https://docs.aws.amazon.com/iot/latest/apireference/API_CreateThing.html>).
pub const THING_NAME: Field = Field::required("thing name", Characters::Ascii(":_-"), 128);
/// A job's id, and that of a job template
/// (<https://docs.aws.amazon.com/iot/latest/apireference/API_CreateJob.html>, `API_CreateJobTemplate.html`).
pub const JOB_ID: Field = Field::required("job id", Characters::Ascii("_-"), 64);
/// The name of a thing's attribute (<https://docs.aws.amazon.com/iot/latest/apireference/API_AttributePayload.html>).
pub const ATTRIBUTE_NAME: Field = Field::required("attribute's name", Characters::Ascii("_.,@/:#-"), 128);
/// The value of a thing's attribute (<https://docs.aws.amazon.com/iot/latest/apireference/API_AttributePayload.html>). So it
/// has no `+`, which versions with build metadata have, and no blank.
pub const ATTRIBUTE_VALUE: Field =
    Field { is_required: false, ..Field::required("attribute's value", Characters::Ascii("_.,@/:#=[]-"), 800) };
/// A status detail of a job execution
/// (<https://docs.aws.amazon.com/iot/latest/apireference/API_iot-jobs-data_UpdateJobExecution.html>).
pub const STATUS_DETAIL: Field = Field::required("status detail", Characters::Printable, 1024);

/// A topic's bytes, and its slashes (<https://docs.aws.amazon.com/general/latest/gr/iot-core.html>, "Topic size" and "Maximum
/// number of slashes in topic and topic filter").
const TOPIC_MAX_BYTES: usize = 256;
const TOPIC_MAX_SLASHES: usize = 7;

impl Field {
    const fn required(name: &'static str, characters: Characters, max: usize) -> Self {
        Self { name, characters, max, is_required: true }
    }

    /// Whether AWS takes the value; what it takes, if not.
    pub fn check(&self, text: &str) -> Result<(), Unfit> {
        let min = usize::from(self.is_required);
        let fits = (min..=self.max).contains(&units(text)) && text.chars().all(|c| self.characters.include(c));
        if fits { Ok(()) } else { Err(Unfit(self.to_string())) }
    }

    /// The text without what AWS refuses: a line break or a tab becomes a blank, other characters that the field does not take
    /// are left out, and so is what is too much. `None` if nothing remains.
    pub fn fit(&self, text: &str) -> Option<String> {
        let mut left = self.max;
        let characters = text.chars().map(|c| if matches!(c, '\n' | '\r' | '\t') { ' ' } else { c });
        let fitted = characters.filter(|c| self.characters.include(*c)).take_while(|c| {
            let enough = c.len_utf16() <= left;
            left = left.saturating_sub(c.len_utf16());
            enough
        });
        Some(fitted.collect::<String>()).filter(|text| !text.is_empty())
    }
}

impl std::fmt::Display for Field {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let count = if self.is_required { format!("1 to {}", self.max) } else { format!("at most {}", self.max) };
        match self.characters {
            Characters::Ascii(extra) => {
                let extra = extra.chars().map(|c| format!(" {c}")).collect::<String>();
                write!(f, "{count} characters of a-z A-Z 0-9{extra}")
            }
            Characters::Printable => {
                write!(f, "{count} characters, none of them a control, format, private-use or unassigned character")
            }
        }
    }
}

impl Characters {
    fn include(self, c: char) -> bool {
        match self {
            Self::Ascii(extra) => c.is_ascii_alphanumeric() || extra.contains(c),
            Self::Printable => !matches!(
                get_general_category(c),
                GeneralCategory::Control
                    | GeneralCategory::Format
                    | GeneralCategory::Surrogate
                    | GeneralCategory::PrivateUse
                    | GeneralCategory::Unassigned
            ),
        }
    }
}

fn units(text: &str) -> usize {
    text.encode_utf16().count()
}

/// Whether AWS takes a message on that topic. No document says how often a topic is decoded that is published over HTTPS, so
/// what is percent-encoded in it must fit decoded as well.
pub fn check_topic(topic: &str) -> Result<(), Unfit> {
    let decoded = percent_decode_str(topic).decode_utf8_lossy();
    let slashes = |text: &str| text.matches('/').count();
    if topic.len() <= TOPIC_MAX_BYTES && slashes(&decoded) <= TOPIC_MAX_SLASHES {
        return Ok(());
    }
    Err(Unfit(format!("a topic of at most {TOPIC_MAX_BYTES} bytes and {TOPIC_MAX_SLASHES} slashes, also when decoded")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_with_build_metadata_is_no_attributes_value() {
        assert_eq!(ATTRIBUTE_VALUE.check("1.1.0-rc.1"), Ok(()));
        assert_eq!(ATTRIBUTE_VALUE.check(""), Ok(()));
        let error = ATTRIBUTE_VALUE.check("1.1.0-rc.1+build5").unwrap_err().to_string();
        assert_eq!(error, "expected at most 800 characters of a-z A-Z 0-9 _ . , @ / : # = [ ] -");
        assert!(ATTRIBUTE_VALUE.check(&"x".repeat(801)).is_err());
        assert!(ATTRIBUTE_NAME.check("").is_err());
    }

    #[test]
    fn a_text_is_fitted_by_category_and_length() {
        // A byte order mark, soft hyphens, a zero-width joiner, a private character, one that is not assigned.
        let text = "\u{feff}no\u{ad}space\u{ad} on 👨\u{200d}🔧\u{e000}\u{378}\u{7}\nE7";
        assert!(STATUS_DETAIL.check(text).is_err());
        assert_eq!(STATUS_DETAIL.fit(text).as_deref(), Some("nospace on 👨🔧 E7"));
        assert_eq!(STATUS_DETAIL.fit("\u{200b}\u{7}"), None);
        for long in ["ä".repeat(2000), "🔧".repeat(2000)] {
            let fitted = STATUS_DETAIL.fit(&long).unwrap();
            assert_eq!(fitted.encode_utf16().count(), 1024);
            assert_eq!(STATUS_DETAIL.check(&fitted), Ok(()));
        }
    }

    #[test]
    fn topics_have_bytes_and_slashes() {
        assert_eq!(check_topic("a/b/c/d/e/f/g/h"), Ok(()));
        for bad in ["a/b/c/d/e/f/g/h/i", "a/b/c/d/e/f=g%2Fh%2Fi%2Fj", &"x".repeat(257)] {
            assert!(check_topic(bad).is_err(), "{bad}");
        }
    }
}
