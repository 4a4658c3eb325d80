//! Hostile messages: good ones, damaged in several ways at once; and what reading them may cost.

use proptest::prelude::*;
use proptest::sample::Index;

/// How much memory a decoder may need at once, in bytes: so much in any case, and so much for each byte of the message.
const MAX_MEMORY_BYTES: usize = 1024 * 1024;
const MAX_MEMORY_FACTOR: usize = 128;

/// What does not belong where a value is expected.
const WORDS: [&str; 16] = [
    "null",
    "true",
    "-1",
    "1e999",
    "-1e-999",
    "9223372036854775807",
    "-9223372036854775808",
    "18446744073709551616",
    "0.1234567890123456789",
    r#""""#,
    r#""\ud800""#,
    r#""\u0000\n""#,
    r#""../#+$aws""#,
    r#""🦀""#,
    "[0]",
    r#"{"a":0}"#,
];

/// What is done to a message.
#[derive(Debug, Clone)]
pub(crate) enum Damage {
    Set(Index, u8),
    Cut(Index, Index),
    Insert(Index, Vec<u8>),
    /// A piece again and again.
    Repeat(Index, usize, usize),
    /// A piece of another message.
    Splice(Index, Index, Index),
    /// Brackets that are never closed.
    Nest(Index, usize),
    /// A number of so many digits.
    Number(Index, usize),
    /// One of [`WORDS`] in place of the next value.
    Word(Index, Index),
}

fn one() -> impl Strategy<Value = Damage> {
    let at = any::<Index>;
    prop_oneof![
        1 => (at(), any::<u8>()).prop_map(|(at, value)| Damage::Set(at, value)),
        1 => (at(), at()).prop_map(|(from, to)| Damage::Cut(from, to)),
        1 => (at(), proptest::collection::vec(any::<u8>(), 1..20)).prop_map(|(at, bytes)| Damage::Insert(at, bytes)),
        1 => (at(), 0_usize..64, 0_usize..64).prop_map(|(at, length, times)| Damage::Repeat(at, length, times)),
        1 => (at(), at(), at()).prop_map(|(at, other, from)| Damage::Splice(at, other, from)),
        1 => (at(), 0_usize..4096).prop_map(|(at, depth)| Damage::Nest(at, depth)),
        1 => (at(), 0_usize..4096).prop_map(|(at, digits)| Damage::Number(at, digits)),
        4 => (at(), at()).prop_map(|(at, word)| Damage::Word(at, word)),
    ]
}

/// Some damage.
pub(crate) fn damages() -> impl Strategy<Value = Vec<Damage>> {
    proptest::collection::vec(one(), 1..6)
}

/// A message of the corpus with that damage.
pub(crate) fn damaged(corpus: &[Vec<u8>], which: Index, damages: &[Damage]) -> Vec<u8> {
    let mut bytes = which.get(corpus).clone();
    for damage in damages {
        apply(damage, &mut bytes, corpus);
    }
    bytes
}

fn apply(damage: &Damage, bytes: &mut Vec<u8>, corpus: &[Vec<u8>]) {
    let place = |at: &Index, bytes: &Vec<u8>| at.index(bytes.len() + 1);
    let put = |at: &Index, bytes: &mut Vec<u8>, piece: &[u8]| {
        let at = place(at, bytes);
        bytes.splice(at..at, piece.iter().copied());
    };
    match damage {
        Damage::Set(at, value) => {
            let at = place(at, bytes);
            if let Some(byte) = bytes.get_mut(at) {
                *byte = *value;
            }
        }
        Damage::Cut(from, to) => {
            let (from, to) = (place(from, bytes), place(to, bytes));
            bytes.drain(from.min(to)..from.max(to));
        }
        Damage::Insert(at, inserted) => put(at, bytes, inserted),
        Damage::Repeat(at, length, times) => {
            let at = place(at, bytes);
            let piece = bytes[at..bytes.len().min(at + *length)].repeat(*times);
            bytes.splice(at..at, piece);
        }
        Damage::Splice(at, other, from) => {
            bytes.truncate(place(at, bytes));
            let other = other.get(corpus);
            bytes.extend_from_slice(&other[from.index(other.len())..]);
        }
        Damage::Nest(at, depth) => put(at, bytes, &b"[".repeat(*depth)),
        Damage::Number(at, digits) => put(at, bytes, &b"9".repeat(*digits)),
        Damage::Word(at, word) => {
            let at = place(at, bytes);
            let find = |from: usize, ends: &[u8]| bytes[from..].iter().position(|byte| ends.contains(byte));
            let Some(begin) = find(at, b":").map(|colon| at + colon + 1) else { return };
            let end = find(begin, b",}]").map_or(bytes.len(), |end| begin + end);
            bytes.splice(begin..end, word.get(&WORDS).bytes());
        }
    }
}

/// Runs a decoder on a message of so many bytes; fails if it needs more memory than such a message is worth.
pub(crate) fn within_memory<T>(what: &str, message_bytes: usize, decode: impl FnOnce() -> T) -> T {
    let mut result = None;
    let used = allocation_counter::measure(|| result = Some(decode())).bytes_max;
    let allowed = MAX_MEMORY_BYTES + MAX_MEMORY_FACTOR * message_bytes;
    assert!(used <= allowed as u64, "{what} needs {used} bytes of memory for a message of {message_bytes}");
    result.expect("the closure has run")
}
