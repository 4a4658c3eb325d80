//! CloudWatch metrics of readings, by sensor and by building.

use super::readings::Sample;
use crate::Error;
use crate::aws::CALL_LIMIT;
use crate::error::aws;
use aws_sdk_cloudwatch::Client;
use aws_sdk_cloudwatch::config::timeout::TimeoutConfig;
use aws_sdk_cloudwatch::primitives::DateTime;
use aws_sdk_cloudwatch::types::{Dimension, MetricDatum, StandardUnit};
use std::collections::BTreeMap;

/// The namespace of all of them.
pub const NAMESPACE: &str = "Device/Monitoring";
const TEMPERATURE: &str = "Temperature";
const HUMIDITY: &str = "Humidity";
const REMEDIATIONS: &str = "Remediations";
/// Their names.
pub const METRICS: [&str; 3] = [TEMPERATURE, HUMIDITY, REMEDIATIONS];
/// What CloudWatch keeps with a datum without more detail, in milliseconds.
const MINUTE: i64 = 60_000;
/// CloudWatch takes nothing that is two weeks old
/// (<https://docs.aws.amazon.com/AmazonCloudWatch/latest/APIReference/API_MetricDatum.html>); a call takes a while.
const OLDEST: i64 = (14 * 24 - 1) * 60 * MINUTE;
/// Limits of one call (<https://docs.aws.amazon.com/AmazonCloudWatch/latest/APIReference/API_PutMetricData.html>).
const DATA_OF_A_CALL: usize = 1000;
const VALUES_OF_A_DATUM: usize = 150;

/// Where the metrics go.
#[derive(Debug, Clone)]
pub(crate) struct Metrics {
    client: Client,
}

/// What has its own values: a metric of a sensor or of a building, in a minute.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Series {
    metric: &'static str,
    dimension: &'static str,
    of: String,
    /// In Unix seconds.
    minute: i64,
}

impl Metrics {
    pub(crate) fn new(config: &aws_config::SdkConfig) -> Self {
        // An attempt that is given up may have added them: it is not made again before it has failed.
        let limits = TimeoutConfig::builder().disable_operation_attempt_timeout().operation_timeout(CALL_LIMIT);
        let config = aws_sdk_cloudwatch::config::Builder::from(config).timeout_config(limits.build());
        Self { client: Client::from_conf(config.build()) }
    }

    /// Adds readings to the metrics `Temperature` and `Humidity`; returns with how many calls. Those that CloudWatch is too
    /// late for are left out.
    pub(crate) async fn add<'a>(&self, samples: impl Iterator<Item = &'a Sample>, now: i64) -> Result<usize, Error> {
        let data = data(samples, now);
        let calls = data.chunks(DATA_OF_A_CALL);
        let count = calls.len();
        for call in calls {
            self.put(call.to_vec()).await?;
        }
        Ok(count)
    }

    /// Counts an action in the metric `Remediations` of a sensor.
    pub(crate) async fn mark(&self, device: &str, time: i64) -> Result<(), Error> {
        let series = Series { metric: REMEDIATIONS, dimension: "Device", of: device.to_owned(), minute: time / 1000 };
        self.put(vec![datum(&series, &[(1.0, 1)])]).await
    }

    async fn put(&self, data: Vec<MetricDatum>) -> Result<(), Error> {
        let put = self.client.put_metric_data().namespace(NAMESPACE).set_metric_data(Some(data));
        put.send().await.map(|_| ()).map_err(|error| aws("cloudwatch:PutMetricData", &error))
    }
}

/// Values of one series and minute share a datum: every value counts, so that percentiles are right.
fn data<'a>(samples: impl Iterator<Item = &'a Sample>, now: i64) -> Vec<MetricDatum> {
    let mut series: BTreeMap<Series, Vec<f64>> = BTreeMap::new();
    for sample in samples.filter(|sample| sample.time > now - OLDEST) {
        let minute = sample.time.div_euclid(MINUTE) * MINUTE / 1000;
        for (metric, value) in [(TEMPERATURE, sample.temperature), (HUMIDITY, sample.humidity)] {
            for (dimension, of) in [("Device", sample.device.as_str()), ("Building", sample.building.as_str())] {
                let key = Series { metric, dimension, of: of.to_owned(), minute };
                series.entry(key).or_default().push(value);
            }
        }
    }
    let data = series.iter_mut().flat_map(|(series, values)| {
        let counted = count(values);
        let data = counted.chunks(VALUES_OF_A_DATUM).map(|values| datum(series, values));
        data.collect::<Vec<_>>()
    });
    data.collect()
}

/// Each value once, and how often it is there.
fn count(values: &mut [f64]) -> Vec<(f64, u32)> {
    values.sort_by(f64::total_cmp);
    let counted = values.chunk_by(|one, other| one.total_cmp(other).is_eq());
    counted.map(|equal| (equal[0], u32::try_from(equal.len()).unwrap_or(u32::MAX))).collect()
}

fn datum(series: &Series, values: &[(f64, u32)]) -> MetricDatum {
    let dimension = Dimension::builder().name(series.dimension).value(&series.of).build();
    let unit = match series.metric {
        HUMIDITY => StandardUnit::Percent,
        REMEDIATIONS => StandardUnit::Count,
        // CloudWatch has no unit of temperature.
        _ => StandardUnit::None,
    };
    MetricDatum::builder()
        .metric_name(series.metric)
        .dimensions(dimension)
        .timestamp(DateTime::from_secs(series.minute))
        .unit(unit)
        .set_values(Some(values.iter().map(|(value, _)| *value).collect()))
        .set_counts(Some(values.iter().map(|(_, count)| f64::from(*count)).collect()))
        .build()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(device: &str, time: i64, temperature: f64) -> Sample {
        Sample {
            device: device.parse().unwrap(),
            time,
            id: "r".parse().unwrap(),
            temperature,
            humidity: 50.0,
            building: "1".parse().unwrap(),
            received_at: time,
        }
    }

    /// Metric, dimension and minute of each datum, and its values with how often each is there.
    fn described(data: &[MetricDatum]) -> Vec<(String, Vec<(f64, f64)>)> {
        data.iter()
            .map(|datum| {
                let dimension = &datum.dimensions()[0];
                let name = format!(
                    "{} {}={} {}",
                    datum.metric_name().unwrap(),
                    dimension.name().unwrap(),
                    dimension.value().unwrap(),
                    datum.timestamp().unwrap().secs()
                );
                (name, datum.values().iter().copied().zip(datum.counts().iter().copied()).collect())
            })
            .collect()
    }

    #[test]
    fn values_of_a_minute_share_a_datum_and_none_is_lost() {
        let now = 1_700_000_000_000;
        let minute = 1_699_999_980;
        let samples = [
            sample("a", now, 20.0),
            sample("a", now + 1, 21.0),
            sample("b", now, 22.0),
            sample("a", now + MINUTE, 23.0),
        ];
        let found = described(&data(samples.iter(), now));
        let expected = [
            (format!("Humidity Building=1 {minute}"), vec![(50.0, 3.0)]),
            (format!("Humidity Building=1 {}", minute + 60), vec![(50.0, 1.0)]),
            (format!("Humidity Device=a {minute}"), vec![(50.0, 2.0)]),
            (format!("Humidity Device=a {}", minute + 60), vec![(50.0, 1.0)]),
            (format!("Humidity Device=b {minute}"), vec![(50.0, 1.0)]),
            (format!("Temperature Building=1 {minute}"), vec![(20.0, 1.0), (21.0, 1.0), (22.0, 1.0)]),
            (format!("Temperature Building=1 {}", minute + 60), vec![(23.0, 1.0)]),
            (format!("Temperature Device=a {minute}"), vec![(20.0, 1.0), (21.0, 1.0)]),
            (format!("Temperature Device=a {}", minute + 60), vec![(23.0, 1.0)]),
            (format!("Temperature Device=b {minute}"), vec![(22.0, 1.0)]),
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn many_values_get_several_data_and_old_ones_none() {
        let now = 1_700_000_000_000;
        let many: Vec<_> = (0u8..151).map(|one| sample("a", now, f64::from(one))).collect();
        let lengths: Vec<usize> = data(many.iter(), now).iter().map(|datum| datum.values().len()).collect();
        assert_eq!(lengths, [1, 1, 150, 1, 150, 1]);
        assert_eq!(data([sample("a", now - OLDEST, 20.0)].iter(), now), vec![]);
    }
}
