//! The history: one object a batch, lines of JSON, compressed, under the hour in which the batch came.

use super::readings::Sample;
use crate::error::{aws, code, unbuilt};
use crate::{Error, ErrorName};
use aws_sdk_s3::Client;
use aws_sdk_s3::primitives::{DateTime, DateTimeFormat};
use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;
use std::io::{Read, Write};

/// How long a batch's text is at most, in bytes: its messages are longer than its lines.
const MAX_TEXT_BYTES: u64 = crate::lambda::MAX_BATCH_BYTES as u64;

/// Where the objects are.
#[derive(Debug, Clone)]
pub(crate) struct History {
    client: Client,
    bucket: String,
}

/// The name of a batch, and the key of its object: partitions as Athena and Glue read them.
pub(crate) fn batch_name(now: i64) -> Result<String, Error> {
    let time = DateTime::from_millis(now).fmt(DateTimeFormat::DateTime).map_err(unbuilt)?;
    // 2026-11-24T09:…
    let part = |range| time.get(range).ok_or_else(|| unbuilt(format!("{time} is no time")));
    let (year, month, day, hour) = (part(0..4)?, part(5..7)?, part(8..10)?, part(11..13)?);
    Ok(format!("year={year}/month={month}/day={day}/hour={hour}/{}.ndjson.gz", uuid::Uuid::new_v4()))
}

impl History {
    pub(crate) fn new(config: &aws_config::SdkConfig, bucket: String) -> Self {
        Self { client: Client::new(config), bucket }
    }

    /// Writes a batch's object.
    pub(crate) async fn write<'a>(&self, batch: &str, samples: impl Iterator<Item = &'a Sample>) -> Result<(), Error> {
        let bytes = compress(samples).map_err(unbuilt)?;
        // No content encoding: what is named .gz is decompressed by who reads it.
        let put = self.client.put_object().bucket(&self.bucket).key(batch).content_type("application/gzip");
        put.body(bytes.into()).send().await.map(|_| ()).map_err(|error| aws("s3:PutObject", &error))
    }

    /// What a batch's object holds; nothing if there is none.
    pub(crate) async fn read(&self, batch: &str) -> Result<Option<Vec<Sample>>, Error> {
        let got = match self.client.get_object().bucket(&self.bucket).key(batch).send().await {
            Ok(got) => got,
            Err(error) if code(&error) == Some("NoSuchKey") => return Ok(None),
            Err(error) => return Err(aws("s3:GetObject", &error)),
        };
        let body = got.body.collect().await;
        let body = body.map_err(|error| Error::new(ErrorName::ServiceUnavailable, format!("s3:GetObject: {error}")))?;
        decompress(&body.into_bytes()).map(Some).map_err(unbuilt)
    }
}

fn compress<'a>(samples: impl Iterator<Item = &'a Sample>) -> std::io::Result<Vec<u8>> {
    let mut writer = GzEncoder::new(Vec::new(), Compression::default());
    for sample in samples {
        serde_json::to_writer(&mut writer, sample)?;
        writer.write_all(b"\n")?;
    }
    writer.finish()
}

/// Fails if it is longer than a batch can be.
fn decompress(bytes: &[u8]) -> std::io::Result<Vec<Sample>> {
    let mut text = String::new();
    GzDecoder::new(bytes).take(MAX_TEXT_BYTES + 1).read_to_string(&mut text)?;
    if text.len() as u64 > MAX_TEXT_BYTES {
        return Err(std::io::Error::other(format!("the object has more than {MAX_TEXT_BYTES} bytes")));
    }
    text.lines().map(|line| serde_json::from_str(line).map_err(Into::into)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_is_named_after_the_hour_in_which_it_came() {
        let name = batch_name(1_767_225_599_999).unwrap();
        assert!(name.starts_with("year=2025/month=12/day=31/hour=23/"), "{name}");
        assert!(name.ends_with(".ndjson.gz"), "{name}");
        assert_ne!(name, batch_name(1_767_225_599_999).unwrap());
    }

    #[test]
    fn what_is_written_is_read() {
        let sample = |id: &str| Sample {
            device: "sensor-1".parse().unwrap(),
            time: 1,
            id: id.parse().unwrap(),
            temperature: 27.4,
            humidity: 60.0,
            building: "1".parse().unwrap(),
            received_at: 2,
        };
        let samples = [sample("a"), sample("b")];
        let bytes = compress(samples.iter()).unwrap();
        assert_eq!(decompress(&bytes).unwrap(), samples);
        assert!(decompress(b"nothing").is_err());
    }

    #[test]
    fn an_object_that_would_become_too_large_is_not_read() {
        let mut writer = GzEncoder::new(Vec::new(), Compression::best());
        std::io::copy(&mut std::io::repeat(b'\n').take(MAX_TEXT_BYTES + 1), &mut writer).unwrap();
        assert!(decompress(&writer.finish().unwrap()).unwrap_err().to_string().contains("more than"));
    }
}
