//! `device-simulator monitor`: sensors that report their surroundings and act on remediations.

use super::{Failure, PATIENCE, interrupted, selected};
use anyhow::Context as _;
use clap::{ArgGroup, Args, ValueEnum};
use device_simulator::monitor::{SensorEvent, SensorOptions, Sensors};
use device_simulator::progress::Display;
use device_simulator::{DeviceSpec, Endpoint};
use humantime::Duration;
use protocol::{Building, SensorId, ThingName};
use std::path::PathBuf;
use tokio::select;
use tokio::sync::mpsc::UnboundedReceiver;

/// Half of the chart's columns: the base is in the middle.
const HALF: u8 = 20;

#[derive(Debug, Args)]
#[command(group = ArgGroup::new("sensors").args(["count", "thing"]))]
pub(super) struct Monitor {
    /// The folder that `provision` has written
    #[arg(long, value_name = "DIR", env = "SIMULATOR_CERTIFICATES")]
    certificates: PathBuf,
    /// The broker; port 8883 unless given, with ALPN on port 443
    #[arg(long, value_name = "HOST[:PORT]", env = "SIMULATOR_ENDPOINT")]
    endpoint: Endpoint,
    /// PEM file of the authority behind the broker's certificate [default: the system's authorities]
    #[arg(long, value_name = "FILE", env = "SIMULATOR_CA")]
    ca: Option<PathBuf>,
    /// Run only the first N things, by name, as sensors
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    count: Option<u32>,
    /// Run only this thing as a sensor; can be repeated
    #[arg(long, value_name = "NAME")]
    thing: Vec<ThingName>,
    /// The sensor's id in its readings; the thing's attribute `sensors` must name it [default: the thing's name]
    #[arg(long, value_name = "ID")]
    device_id: Option<SensorId>,
    /// The building that the sensors are in: the end of their topics
    #[arg(long, value_name = "NAME", default_value = "1", env = "SIMULATOR_BUILDING")]
    building: Building,
    /// How high the waves of temperature (in °C) and humidity (in %) are
    #[arg(long, value_name = "NUMBER", default_value_t = 5.0, allow_negative_numbers = true)]
    velocity: f64,
    /// How long after a reading comes the next; a number alone is seconds
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = positive)]
    update_frequency: Duration,
    /// How much a remediation changes temperature (in °C) and humidity (in %)
    #[arg(long, value_name = "NUMBER", default_value_t = 1.0)]
    remediation_factor: f64,
    /// What the waves of temperature rise from, in °C
    #[arg(long, value_name = "NUMBER", default_value_t = 21.0, allow_negative_numbers = true)]
    min_temp: f64,
    /// What the waves of humidity rise from, in %
    #[arg(long, value_name = "NUMBER", default_value_t = 50.0)]
    min_hum: f64,
    /// End when each sensor has sent K readings [default: run until Ctrl-C]
    #[arg(long, value_name = "K", value_parser = clap::value_parser!(u32).range(1..))]
    readings: Option<u32>,
    /// End after this time at the latest
    #[arg(long, value_name = "TIME")]
    duration: Option<Duration>,
    /// Send neither id nor time with a reading, as older sensors do
    #[arg(long)]
    plain: bool,
    /// What is said: from `info` on a chart of a single sensor, of many what they are told; with `debug` each reading
    #[arg(long, value_enum, default_value_t = LogLevel::Info)]
    log_level: LogLevel,
    /// Say nothing but warnings, errors and the result
    #[arg(long, short, conflicts_with = "log_level")]
    quiet: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum LogLevel {
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

impl LogLevel {
    fn name(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }
}

/// A time; a number alone is seconds.
fn positive(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok().and_then(|seconds| std::time::Duration::try_from_secs_f64(seconds).ok());
    let duration = match seconds {
        Some(seconds) => seconds.into(),
        None => text.parse::<Duration>().map_err(|error| error.to_string())?,
    };
    if duration.is_zero() { Err("expected more than nothing".to_owned()) } else { Ok(duration) }
}

/// What the sensors have done.
#[derive(Debug, Default)]
struct Counts {
    readings: usize,
    remediations: usize,
}

impl Monitor {
    pub(super) async fn run(self) -> Result<bool, Failure> {
        let things = self.things()?;
        let sensors = things.len();
        let log_level = if self.quiet { LogLevel::Warn } else { self.log_level };
        if !self.quiet {
            eprintln!("sensors: {sensors}, building: {}, broker: {}", self.building, self.endpoint);
        }
        let display = Display::log(log_level.name());
        let options = SensorOptions {
            endpoint: self.endpoint.clone(),
            ca: self.ca.clone(),
            building: self.building.clone(),
            velocity: self.velocity,
            update_frequency: *self.update_frequency,
            remediation_factor: self.remediation_factor,
            min_temperature: self.min_temp,
            min_humidity: self.min_hum,
            readings: self.readings,
            plain: self.plain,
        };
        let (mut running, mut events) = Sensors::start(&options, things).context("the sensors cannot start")?;
        running.connected(PATIENCE).await.context("the sensors cannot run")?;
        let mut counts = Counts::default();
        let is_complete = {
            let time_is_up = async {
                match self.duration {
                    Some(duration) => tokio::time::sleep(*duration).await,
                    None => std::future::pending().await,
                }
            };
            select! {
                () = running.finished() => true,
                () = time_is_up => self.readings.is_none(),
                result = interrupted() => result.map(|()| self.readings.is_none())?,
                never = self.follow(&mut events, sensors, &mut counts) => never,
            }
        };
        while let Ok(event) = events.try_recv() {
            self.show(&event, sensors, &mut counts);
        }
        display.finish();
        println!("{sensors} sensors: {} readings sent, {} remediations", counts.readings, counts.remediations);
        Ok(is_complete)
    }

    /// The things, and the names that they report under.
    fn things(&self) -> Result<Vec<(DeviceSpec, SensorId)>, Failure> {
        let things = selected(&self.certificates, &self.thing, self.count)?;
        if self.device_id.is_some() && things.len() > 1 {
            let text = format!("--device-id is for one sensor: choose it of {} with --thing", things.len());
            return Err(Failure::Usage(text));
        }
        let named = things.into_iter().map(|spec| {
            let id = self.device_id.clone().unwrap_or_else(|| spec.thing.clone().into());
            (spec, id)
        });
        Ok(named.collect())
    }

    async fn follow(&self, events: &mut UnboundedReceiver<SensorEvent>, sensors: usize, counts: &mut Counts) -> ! {
        loop {
            match events.recv().await {
                Some(event) => self.show(&event, sensors, counts),
                None => std::future::pending().await,
            }
        }
    }

    fn show(&self, event: &SensorEvent, sensors: usize, counts: &mut Counts) {
        match event {
            SensorEvent::Measured { device, temperature, humidity, .. } => {
                counts.readings += 1;
                let line = format!("{device}: {temperature:5.1} °C  {humidity:5.1} %");
                if sensors == 1 {
                    tracing::info!("{line}  {}", chart(*temperature, self.min_temp, self.velocity));
                } else {
                    tracing::debug!("{line}");
                }
            }
            SensorEvent::Remediated { device, target, change, .. } => {
                counts.remediations += 1;
                let what = if *change < 0.0 { "cools" } else { "warms" };
                tracing::info!("{device}: told {target:.1} °C, {what} by {:.1} °C", change.abs());
            }
        }
    }
}

/// A line with a mark where the temperature is; the ends are twice the waves away from the base.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it is between 0 and the line's length")]
fn chart(temperature: f64, base: f64, velocity: f64) -> String {
    let reach = 2.0 * velocity.abs().max(0.5);
    let from_middle = ((temperature - base) / reach).clamp(-1.0, 1.0);
    let column = ((from_middle + 1.0) * f64::from(HALF)).round() as u8;
    let mark = |at| match at {
        at if at == column => '●',
        HALF => '┊',
        _ => ' ',
    };
    format!("│{}│", (0..=2 * HALF).map(mark).collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_between_readings_is_more_than_nothing_and_a_number_is_seconds() {
        let read = |text| positive(text).map(|duration| duration.as_millis());
        assert_eq!([read("250ms"), read("2"), read("0.5")], [Ok(250), Ok(2000), Ok(500)]);
        assert!(read("0s").is_err() && read("-1").is_err() && read("soon").is_err());
    }

    #[test]
    fn the_chart_shows_where_the_temperature_is() {
        let column = |temperature| chart(temperature, 20.0, 5.0).chars().position(|mark| mark == '●');
        let half = usize::from(HALF);
        assert_eq!(column(20.0), Some(half + 1));
        assert_eq!(column(10.0), Some(1));
        assert_eq!(column(99.0), Some(2 * half + 1));
        assert_eq!(chart(25.0, 20.0, 5.0).chars().count(), 2 * half + 3);
    }
}
