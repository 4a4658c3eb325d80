//! Names of executions: the same cause always makes the same name, so that Step Functions refuses a second start.

use sha2::{Digest, Sha256};

/// The same parts always make the same name, other parts another one. At most 80 characters of the set that Step Functions allows
/// (<https://docs.aws.amazon.com/step-functions/latest/apireference/API_StartExecution.html>). The parts are there
/// to be read; the hash tells `a-b` + `c` from `a` + `b-c`.
pub(crate) fn execution_name(parts: &[String; 3]) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update(part.len().to_be_bytes());
        hash.update(part);
    }
    let digest: String = hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    let plain = |c: char| if c.is_ascii_alphanumeric() || c == '-' { c } else { '_' };
    let readable: String = parts.join("-").chars().map(plain).take(63).collect();
    format!("{readable}-{digest}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_deterministic_distinct_and_allowed() {
        let name_of = |parts: [&str; 3]| execution_name(&parts.map(str::to_owned));
        let name = name_of(["job-1", "gateway:7", "1"]);
        assert_eq!(name, name_of(["job-1", "gateway:7", "1"]));
        assert!(name.starts_with("job-1-gateway_7-1-"), "{name}");
        assert_ne!(name_of(["a-b", "c", "1"]), name_of(["a", "b-c", "1"]));
        assert_ne!(name_of(["a", "b:c", "1"]), name_of(["a", "b_c", "1"]));
        assert!(name_of(["gateway", "sessión/5", "0"]).starts_with("gateway-sessi_n_5-0-"));
        let long = name_of([&"j".repeat(64), &"t".repeat(128), "12"]);
        assert_eq!(long.len(), 80);
        assert!(long.chars().all(|c| c.is_ascii_alphanumeric() || "-_".contains(c)));
    }
}
