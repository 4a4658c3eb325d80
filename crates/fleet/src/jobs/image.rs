//! The image of a job: one version of one object, so that every device gets the same bytes however long the job runs.

use crate::error::aws;
use crate::{Error, ErrorName};
use aws_sdk_s3::operation::head_object::{HeadObjectError, HeadObjectOutput};
use aws_sdk_s3::types::{ChecksumMode, ChecksumType};
use base64::{Engine, prelude::BASE64_STANDARD};
use protocol::job::Artifact;
use sha2::{Digest, Sha256};
use std::time::Duration;

/// How long an image may take to be read when nobody has said what its checksum is: the function has a minute in all.
const HASHING: Duration = Duration::from_secs(45);

/// The spellings of a checksum that are understood.
const SPELLINGS: &str = "a SHA-256: 64 hexadecimal digits, a line of sha256sum, or base64";

/// Looks an image in the bucket up and pins it: the object's version, its size, and its checksum, which the user, the object's
/// metadata or S3 knows, or which is computed here. What two of them say must agree.
pub(super) async fn pin(
    s3: &aws_sdk_s3::Client,
    bucket: &str,
    key: String,
    given: Artifact,
) -> Result<Artifact, Error> {
    let found = head(s3, bucket, &key, given.version_id.as_deref()).await?;
    let metadata = |name: &str| found.metadata.as_ref().and_then(|metadata| metadata.get(name)).map(String::as_str);
    let size = size(&given, &found)?;
    let version_id = given.version_id.or_else(|| found.version_id.clone());
    let checksums = [
        ("artifact.sha256", given.sha256.as_deref()),
        ("the object's metadata sha256", metadata("sha256")),
        ("the object's ChecksumSHA256", checksum_of_s3(&found)),
    ];
    let sha256 = match agreed(checksums)? {
        Some(sha256) => sha256,
        None => computed(s3, bucket, &key, version_id.as_deref()).await?,
    };
    let signature = match given.signature {
        Some(signature) => Some(signature),
        None => metadata("signature").map(|text| signature("the object's metadata signature", text)).transpose()?,
    };
    Ok(Artifact {
        url: None,
        bucket: Some(bucket.to_owned()),
        key: Some(key),
        version_id,
        sha256: Some(sha256),
        size,
        signature,
    })
}

async fn head(
    s3: &aws_sdk_s3::Client,
    bucket: &str,
    key: &str,
    version_id: Option<&str>,
) -> Result<HeadObjectOutput, Error> {
    let request = s3.head_object().bucket(bucket).key(key).set_version_id(version_id.map(str::to_owned));
    request.checksum_mode(ChecksumMode::Enabled).send().await.map_err(|error| {
        if error.as_service_error().is_some_and(HeadObjectError::is_not_found) {
            let version = version_id.map(|id| format!(" in version {id}")).unwrap_or_default();
            let message = format!("artifact: s3://{bucket}/{key} does not exist{version}; upload the image first");
            return Error::new(ErrorName::ArtifactNotFound, message);
        }
        aws("s3:HeadObject", &error)
    })
}

fn size(given: &Artifact, found: &HeadObjectOutput) -> Result<Option<u64>, Error> {
    let length = found.content_length.and_then(|length| u64::try_from(length).ok());
    match (given.size, length) {
        (Some(given), Some(length)) if given != length => {
            Err(Error::invalid("artifact.size", given, &format!("the object's {length} bytes")))
        }
        (given, length) => Ok(length.or(given)),
    }
}

/// S3's own SHA-256 of the whole object, if the upload asked for one. That of an upload in parts is a checksum of their checksums
/// (<https://docs.aws.amazon.com/AmazonS3/latest/userguide/checking-object-integrity.html>), which no device could check.
fn checksum_of_s3(found: &HeadObjectOutput) -> Option<&str> {
    let is_whole = found.checksum_type != Some(ChecksumType::Composite);
    found.checksum_sha256.as_deref().filter(|text| is_whole && !text.contains('-'))
}

/// What all that is said of the checksum comes to.
fn agreed(checksums: [(&str, Option<&str>); 3]) -> Result<Option<String>, Error> {
    let mut agreed: Option<(&str, String)> = None;
    for (field, text) in checksums {
        let Some(text) = text else { continue };
        let sha256 = sha256(field, text)?;
        match &agreed {
            Some((other, expected)) if *expected != sha256 => {
                return Err(Error::invalid(other, expected, &format!("{sha256}, as {field} says")));
            }
            Some(_) => {}
            None => agreed = Some((field, sha256)),
        }
    }
    Ok(agreed.map(|(_, sha256)| sha256))
}

/// Reads the image, in the version that devices will get.
async fn computed(s3: &aws_sdk_s3::Client, bucket: &str, key: &str, version_id: Option<&str>) -> Result<String, Error> {
    let reading = async {
        let get = s3.get_object().bucket(bucket).key(key).set_version_id(version_id.map(str::to_owned));
        let mut body = get.send().await.map_err(|error| aws("s3:GetObject", &error))?.body;
        let mut digest = Sha256::new();
        while let Some(bytes) = body.try_next().await.map_err(|error| unread(&error))? {
            digest.update(bytes);
        }
        Ok(hexadecimal(&digest.finalize()))
    };
    tokio::time::timeout(HASHING, reading).await.unwrap_or_else(|_| {
        let expected = format!(
            "{SPELLINGS}, for s3://{bucket}/{key} cannot be read within {} s; or upload the image with --metadata sha256=…",
            HASHING.as_secs()
        );
        Err(Error::invalid("artifact.sha256", "nothing", &expected))
    })
}

fn unread(error: &aws_sdk_s3::primitives::ByteStreamError) -> Error {
    Error::new(ErrorName::ServiceUnavailable, format!("s3:GetObject: {error}"))
}

/// A SHA-256 as 64 small hexadecimal digits, out of the usual spellings: hexadecimal digits, the line that `sha256sum` prints of a
/// file, and base64, as S3 writes its checksums.
pub(super) fn sha256(field: &str, text: &str) -> Result<String, Error> {
    // sha256sum puts a backslash before a line whose file's name it has escaped.
    let first = text.trim().trim_start_matches('\\').split_whitespace().next().unwrap_or_default();
    if first.len() == 64 && first.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Ok(first.to_ascii_lowercase());
    }
    match BASE64_STANDARD.decode(text.trim()) {
        Ok(bytes) if bytes.len() == 32 => Ok(hexadecimal(&bytes)),
        _ => Err(Error::invalid(field, super::create_job::quoted(text), SPELLINGS)),
    }
}

/// An Ed25519 signature in base64, as it is.
pub(super) fn signature(field: &str, text: &str) -> Result<String, Error> {
    if BASE64_STANDARD.decode(text).is_ok_and(|bytes| bytes.len() == 64) {
        return Ok(text.to_owned());
    }
    Err(Error::invalid(field, super::create_job::quoted(text), "an Ed25519 signature: 64 bytes in base64"))
}

pub(super) fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use aws_sdk_s3::operation::get_object::GetObjectOutput;
    use aws_sdk_s3::operation::head_object::builders::HeadObjectOutputBuilder;
    use aws_sdk_s3::primitives::ByteStream;
    use aws_smithy_mocks::{RuleMode, mock, mock_client};

    /// What `sha256sum` and S3 say of the same image.
    const PRINTED: &str = "1b9f3f24145306bb1b2a0ececf7a49a4c5db5520039886ffef3182ca931e9448  image.bin";
    const BASE64: &str = "G58/JBRTBrsbKg7Oz3pJpMXbVSADmIb/7zGCypMelEg=";
    const HEX: &str = "1b9f3f24145306bb1b2a0ececf7a49a4c5db5520039886ffef3182ca931e9448";

    #[test]
    fn a_checksum_has_several_spellings() {
        let others = [HEX.to_uppercase(), format!("\\{HEX}  new\\nline.bin"), format!("{HEX} *image.bin")];
        for text in [PRINTED, BASE64, HEX].into_iter().chain(others.iter().map(String::as_str)) {
            assert_eq!(sha256("artifact.sha256", text).as_deref(), Ok(HEX), "{text}");
        }
        for bad in ["", "abc", &HEX[1..], "SHA256 (image.bin) = 1b9f", "1b9f3f24145306bb1b2a0ececf7a49a4"] {
            let error = sha256("the object's metadata sha256", bad).unwrap_err().message;
            assert!(
                error.starts_with(&format!("the object's metadata sha256: got {bad:?}, expected a SHA-256")),
                "{error}"
            );
        }
    }

    async fn pinned(found: HeadObjectOutputBuilder, given: Artifact) -> Result<Artifact, Error> {
        let found = found.content_length(3).version_id("v2");
        let head = mock!(aws_sdk_s3::Client::head_object)
            .match_requests(|request| request.checksum_mode() == Some(&ChecksumMode::Enabled))
            .then_output(move || found.clone().build());
        let get = mock!(aws_sdk_s3::Client::get_object)
            .match_requests(|request| request.version_id() == Some("v2"))
            .then_output(|| GetObjectOutput::builder().body(ByteStream::from_static(b"abc")).build());
        let s3 = mock_client!(aws_sdk_s3, RuleMode::MatchAny, [&head, &get]);
        pin(&s3, "firmware", "k".to_owned(), given).await
    }

    #[tokio::test]
    async fn an_image_is_pinned_with_what_is_known_of_it() {
        let given = |sha256: &str| Artifact { sha256: Some(sha256.to_owned()), ..Artifact::default() };
        let nothing = HeadObjectOutput::builder;
        let composite = nothing().checksum_sha256(format!("{BASE64}-2")).checksum_type(ChecksumType::Composite);
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        for (found, given, sha256) in [
            (nothing().metadata("sha256", PRINTED), Artifact::default(), HEX),
            (nothing().checksum_sha256(BASE64), Artifact::default(), HEX),
            (nothing().metadata("sha256", PRINTED).checksum_sha256(BASE64), given(HEX), HEX),
            (nothing(), given(BASE64), HEX),
            // Nobody knows it: it is computed of the pinned version.
            (nothing(), Artifact::default(), abc),
            (composite, Artifact::default(), abc),
        ] {
            let artifact = pinned(found, given).await.unwrap();
            assert_eq!(artifact.sha256.as_deref(), Some(sha256));
            assert_eq!((artifact.version_id.as_deref(), artifact.size), (Some("v2"), Some(3)));
        }
    }

    #[tokio::test]
    async fn what_does_not_agree_or_cannot_be_read_is_refused() {
        let other = "ab".repeat(32);
        let given = Artifact { sha256: Some(other.clone()), ..Artifact::default() };
        let found = HeadObjectOutput::builder().metadata("sha256", PRINTED);
        let expected = format!("artifact.sha256: got {other}, expected {HEX}, as the object's metadata sha256 says");
        assert_eq!(pinned(found, given).await.unwrap_err().message, expected);
        for (name, value) in [("sha256", "crc32:1b9f"), ("signature", "abc")] {
            let error =
                pinned(HeadObjectOutput::builder().metadata(name, value), Artifact::default()).await.unwrap_err();
            assert_eq!(error.name, ErrorName::InvalidInput);
            let start = format!("the object's metadata {name}: got {value:?}, expected");
            assert!(error.message.starts_with(&start), "{error}");
        }
    }
}
