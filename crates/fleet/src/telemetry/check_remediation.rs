//! Looks whether a remediation has had an effect: a sensor that has fallen silent shows none.

use super::remedies::{Adapters, Check, LONGEST_DELAY, settle};
use crate::{Error, queue};

/// Reads a check that is due; people are told if nothing has shown the effect. `now` is in Unix milliseconds.
pub async fn handle(adapters: &Adapters, body: &str, now: i64) -> Result<(), Error> {
    let Check { device, remedy } = queue::json("check", body.as_bytes())?;
    let name = device.as_str();
    let (climate, ()) = adapters.climates.change(name, |climate| climate.check(&remedy, now)).await?;
    settle(adapters, name, climate.pending(), now).await?;
    // The sensor may never say anything again.
    if climate.is_untold() { adapters.ask_for_check(&Check { device, remedy }, LONGEST_DELAY).await } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::super::climate::Climate;
    use super::super::climate::tests::{MINUTE, rules, sample};
    use super::super::remedies::Places;
    use super::*;
    use aws_smithy_http_client::test_util::infallible_client_fn;
    use std::sync::{Arc, Mutex};

    /// Which services a check calls, in that minute, when that is known of the sensor.
    async fn called(climate: &Climate, remedy: &str, minute: i64) -> Vec<String> {
        let item: serde_dynamo::Item = serde_dynamo::to_item(climate).unwrap();
        let item = serde_json::json!({"Item": item}).to_string();
        let calls = Arc::new(Mutex::new(Vec::new()));
        let noted = Arc::clone(&calls);
        let http = infallible_client_fn(move |request: ureq::http::Request<_>| {
            let service = request.uri().host().and_then(|host| host.split('.').next()).unwrap_or_default();
            noted.lock().unwrap().push(service.to_owned());
            let is_sns = service == "sns";
            let answer = if is_sns { "<PublishResponse><PublishResult/></PublishResponse>" } else { &item };
            ureq::http::Response::builder().body(answer.to_owned()).unwrap()
        });
        let config = crate::aws::of_test(http);
        let places = Places {
            climates_table: "x".into(),
            remediations_table: "x".into(),
            reading_days: 1,
            checks_queue_url: "https://sqs.eu-west-1.amazonaws.com/1/x".into(),
            alarm_topic_arn: "x".into(),
            dead_letter_queue_url: "https://sqs.eu-west-1.amazonaws.com/1/y".into(),
        };
        let mqtt = aws_sdk_iotdataplane::Client::from_conf((&config).into());
        let adapters = Adapters::new(&config, mqtt, places, rules());
        let body = serde_json::json!({"device": "sensor-1", "remedy": remedy}).to_string();
        handle(&adapters, &body, minute * MINUTE).await.unwrap();
        calls.lock().unwrap().clone()
    }

    /// It has fallen silent within the hour in which people were told of it: no reading will tell them when that is over.
    #[tokio::test]
    async fn a_check_whose_finding_must_wait_comes_again() {
        let mut climate = Climate::default();
        for (minute, temperature) in [(0, 26.0), (4, 26.0), (10, 21.0), (11, 26.0)] {
            climate.follow(&rules(), &sample(minute, "a", temperature, 50.0), minute * MINUTE);
            for remedy in climate.pending().to_vec() {
                climate.done(&remedy, Some(minute * MINUTE));
            }
        }
        let remedy = sample(11, "a", 26.0, 50.0).sort_key();
        assert_eq!(called(&climate, &remedy, 19).await, ["dynamodb", "dynamodb", "sqs"]);
        let told = called(&climate, &remedy, 64).await;
        assert!(told.contains(&"sns".to_owned()) && !told.contains(&"sqs".to_owned()), "{told:?}");
    }
}
