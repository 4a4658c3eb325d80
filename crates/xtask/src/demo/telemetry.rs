//! Telemetry: sensors drift out of their band and are brought back; what is kept of it, and a picture.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, anyhow, bail, ensure};
use plotters::prelude::*;
use serde::Deserialize;
use serde_json::Value;

use super::{Demo, DemoOptions, POLL_INTERVAL};
use crate::cloud::{Cloud, FixedPorts};
use crate::deploy;
use crate::program::Programs;
use crate::project::Project;

const BUILDING: &str = "1";
/// So many readings of each sensor are nearly a whole wave.
const READINGS: u32 = 240;
const FREQUENCY: &str = "250ms";
/// How high the waves are, and how much a remediation changes, in °C.
const VELOCITY: &str = "7";
const FACTOR: &str = "3";
/// What the temperature shall be, and how far off it may be, in °C: the template's own.
const TARGET: f64 = 21.0;
const BAND: f64 = 3.0;
/// Nobody wants to watch hours pass.
const PARAMETERS: &[(&str, &str)] = &[
    ("TelemetryWindowSeconds", "1"),
    ("TemperatureTarget", "21"),
    ("TemperatureBand", "3"),
    ("TemperatureCoolDownSeconds", "4"),
    ("TemperatureActionsAnHour", "100"),
    ("RemediationEffectSeconds", "3"),
];

/// A row of the table of readings.
#[derive(Deserialize)]
struct Row {
    device: String,
    time: String,
    temperature: String,
}

/// A row of the table of remediations.
#[derive(Deserialize)]
struct Record {
    device: String,
    time: String,
    acted: usize,
    escalated: usize,
}

/// What is kept of a sensor.
#[derive(Default)]
struct Sensor {
    /// Time in Unix milliseconds, and temperature in °C.
    readings: Vec<(i64, f64)>,
    /// When it was told to act.
    remediations: Vec<i64>,
    /// How often people were told.
    escalations: usize,
}

impl Sensor {
    fn lowest(&self) -> f64 {
        self.readings.iter().map(|(_, temperature)| *temperature).fold(f64::INFINITY, f64::min)
    }

    fn highest(&self) -> f64 {
        self.readings.iter().map(|(_, temperature)| *temperature).fold(f64::NEG_INFINITY, f64::max)
    }
}

/// Runs the whole demonstration; succeeds if every reading is kept, and every sensor was brought back.
pub(super) fn demo(project: &Project, options: &DemoOptions) -> Result<()> {
    if options.fail.is_some() {
        bail!("--fail is not for this demonstration: its sensors have no faults");
    }
    let programs = Programs::built(project)?;
    let simulator = programs.path("device-simulator")?.to_owned();
    let cloud = Cloud::start(project, FixedPorts::default(), false)?;
    let outputs = deploy::deploy(project, &cloud, &programs, &deploy::parameters(PARAMETERS))?;
    let demo = Demo { project, cloud: &cloud, outputs, simulator, options };
    demo.provision_sensors()?;
    demo.monitor()?;
    let sensors = demo.kept()?;
    demo.show_kept(&sensors)?;
    demo.keep()
}

impl Demo<'_> {
    fn provision_sensors(&self) -> Result<()> {
        let mut command = self.simulate("provision");
        command
            .args(["--count", &self.options.devices.to_string(), "--prefix", "sensor"])
            .args(["--policy", self.outputs.get("MonitoringDevicePolicyName")?])
            .args(["--thing-type", self.outputs.get("SensorTypeName")?])
            .args(["--attribute", &format!("building={BUILDING}"), "--protocol", "json", "--no-external-id"]);
        self.run("provision", &mut command).map(drop)
    }

    /// Lets the sensors measure, and shows what is kept meanwhile.
    fn monitor(&self) -> Result<()> {
        let mut command = self.simulate("monitor");
        command
            .args(["--endpoint", &self.cloud.mqtt])
            .arg("--ca")
            .arg(&self.cloud.ca)
            .args(["--building", BUILDING, "--readings", &READINGS.to_string(), "--update-frequency", FREQUENCY])
            .args(["--velocity", VELOCITY, "--remediation-factor", FACTOR, "--min-temp", &TARGET.to_string()]);
        let sensors = self.start_fleet(&mut command, Some(&self.cloud.run.log("simulator")))?;
        let total = self.options.devices as usize * READINGS as usize;
        let mut shown = String::new();
        self.project.processes.wait_for("the sensors' readings", POLL_INTERVAL, self.time_limit(), || {
            let ended = sensors.status();
            let rows: usize = self.count("MonitoringTableName")?;
            let line =
                format!("  {rows} of {total} readings kept, {} remediations", self.count("RemediationsTableName")?);
            if line != shown {
                eprintln!("{line}");
                shown = line;
            }
            match ended {
                Some(status) if !status.success() => Err(sensors.ended_early(status)),
                Some(_) if rows >= total => Ok(Some(())),
                _ => Ok(None),
            }
        })
    }

    fn count(&self, table: &str) -> Result<usize> {
        let table = self.outputs.get(table)?;
        self.aws(&["dynamodb", "scan", "--table-name", table, "--select", "COUNT", "--query", "Count"])
    }

    /// What the tables hold, by sensor.
    fn kept(&self) -> Result<BTreeMap<String, Sensor>> {
        let scan = |table: &str, query: &str| -> Result<Value> {
            let table = self.outputs.get(table)?;
            self.aws(&["dynamodb", "scan", "--table-name", table, "--query", query])
        };
        let rows = "Items[].{device:device.S,time:time.N,temperature:temperature.N}";
        let rows: Vec<Row> = serde_json::from_value(scan("MonitoringTableName", rows)?)?;
        let records = "Items[].{device:device.S,time:decidedAt.N,acted:length(actOn.L),escalated:length(escalate.L)}";
        let records: Vec<Record> = serde_json::from_value(scan("RemediationsTableName", records)?)?;
        let mut sensors = BTreeMap::<String, Sensor>::new();
        for row in rows {
            sensors.entry(row.device).or_default().readings.push((row.time.parse()?, row.temperature.parse()?));
        }
        for record in records {
            let sensor = sensors.entry(record.device).or_default();
            sensor.escalations += record.escalated;
            if record.acted > 0 {
                sensor.remediations.push(record.time.parse()?);
            }
        }
        for sensor in sensors.values_mut() {
            sensor.readings.sort_by_key(|(time, _)| *time);
            sensor.remediations.sort_unstable();
        }
        Ok(sensors)
    }

    fn show_kept(&self, sensors: &BTreeMap<String, Sensor>) -> Result<()> {
        println!(
            "\n{:<14} {:>8}  {:>9}  {:>10}  {:>12}  {:>11}",
            "sensor", "readings", "lowest", "highest", "remediations", "escalations"
        );
        for (name, sensor) in sensors {
            let [lowest, highest] = [sensor.lowest(), sensor.highest()].map(|value| format!("{value:.1} °C"));
            let Sensor { readings, remediations, escalations } = sensor;
            println!(
                "{name:<14} {:>8}  {lowest:>9}  {highest:>10}  {:>12}  {escalations:>11}",
                readings.len(),
                remediations.len()
            );
        }
        let Some((name, first)) = sensors.first_key_value() else { bail!("nothing is kept of any sensor") };
        let picture = self.cloud.run.file("telemetry.svg");
        draw(name, first, &picture).map_err(|error| anyhow!("the picture cannot be drawn: {error}"))?;
        self.places(name)?;
        println!("picture   {}", picture.display());

        let kept: usize = sensors.values().map(|sensor| sensor.readings.len()).sum();
        let sent = self.options.devices as usize * READINGS as usize;
        ensure!(kept == sent, "{kept} readings are kept of {sent}");
        let left_alone = sensors.values().filter(|sensor| sensor.remediations.is_empty()).count();
        ensure!(left_alone == 0, "{left_alone} sensors were not told to act");
        let remediations: usize = sensors.values().map(|sensor| sensor.remediations.len()).sum();
        println!("\n{} sensors: {kept} of {sent} readings kept, {remediations} remediations", sensors.len());
        Ok(())
    }

    /// Says where all of it is, and how to see it while the local cloud runs.
    fn places(&self, sensor: &str) -> Result<()> {
        let [table, remediations, bucket] =
            ["MonitoringTableName", "RemediationsTableName", "TelemetryBucketName"].map(|name| self.outputs.get(name));
        let (table, remediations, bucket) = (table?, remediations?, bucket?);
        let objects: usize =
            self.aws(&["s3api", "list-objects-v2", "--bucket", bucket, "--query", "length(Contents || `[]`)"])?;
        let first: Vec<String> =
            self.aws(&["s3api", "list-objects-v2", "--bucket", bucket, "--query", "Contents[:1].Key"])?;
        println!(
            "\nrows      {table}: aws dynamodb query --table-name {table} --key-condition-expression 'device = :d' --expression-attribute-values '{{\":d\":{{\"S\":\"{sensor}\"}}}}'"
        );
        println!("          {remediations}: what sensors were told, in the same way");
        println!("history   {objects} objects in s3://{bucket}, such as {}", first.join(""));
        println!(
            "metrics   aws cloudwatch list-metrics --namespace Device/Monitoring --dimensions Name=Device,Value={sensor}"
        );
        println!("dashboard {}", self.outputs.get("TelemetryDashboardName")?);
        Ok(())
    }
}

/// Draws a sensor's temperature, its band, and when it was told to act.
fn draw(name: &str, sensor: &Sensor, file: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let Some((begin, _)) = sensor.readings.first() else { return Ok(()) };
    let seconds = |time: i64| Duration::from_millis(u64::try_from(time - begin).unwrap_or_default()).as_secs_f64();
    let end = sensor.readings.last().map_or(1.0, |(time, _)| seconds(*time)).max(1.0);
    let (low, high) = (sensor.lowest().min(TARGET - BAND) - 1.0, sensor.highest().max(TARGET + BAND) + 1.0);
    let root = SVGBackend::new(file, (960, 480)).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption(format!("{name}: temperature and remediations"), ("sans-serif", 20))
        .margin(16)
        .x_label_area_size(40)
        .y_label_area_size(50)
        .build_cartesian_2d(0.0..end, low..high)?;
    chart.configure_mesh().x_desc("seconds").y_desc("°C").light_line_style(WHITE.mix(0.0)).draw()?;
    let band = Rectangle::new([(0.0, TARGET - BAND), (end, TARGET + BAND)], GREEN.mix(0.12).filled());
    chart
        .draw_series([band])?
        .label("band")
        .legend(|(x, y)| Rectangle::new([(x, y - 5), (x + 18, y + 5)], GREEN.mix(0.3).filled()));
    let temperature = sensor.readings.iter().map(|(time, value)| (seconds(*time), *value));
    chart
        .draw_series(LineSeries::new(temperature, BLUE.stroke_width(2)))?
        .label("temperature")
        .legend(|(x, y)| PathElement::new([(x, y), (x + 18, y)], BLUE.stroke_width(2)));
    let moments = sensor
        .remediations
        .iter()
        .map(|time| PathElement::new([(seconds(*time), low), (seconds(*time), high)], RED.mix(0.7)));
    chart
        .draw_series(moments)?
        .label("remediation")
        .legend(|(x, y)| PathElement::new([(x, y), (x + 18, y)], RED.mix(0.7)));
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::LowerLeft)
        .background_style(WHITE.mix(0.85))
        .border_style(BLACK.mix(0.4))
        .draw()?;
    root.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_picture_shows_the_line_and_each_remediation() {
        let readings = (0..100)
            .map(|n| (1_000_000 + n * 250, 21.0 + 5.0 * (f64::from(i32::try_from(n).unwrap_or(0)) / 15.0).sin()))
            .collect();
        let sensor = Sensor { readings, remediations: vec![1_005_000, 1_010_000], escalations: 0 };
        let file = std::env::temp_dir().join(format!("{}.svg", uuid::Uuid::new_v4()));
        draw("sensor-0001", &sensor, &file).expect("drawn");
        let picture = std::fs::read_to_string(&file).expect("the picture");
        std::fs::remove_file(&file).expect("removed");
        assert!(picture.starts_with("<svg") && picture.contains("sensor-0001: temperature and remediations"));
        // One in the legend.
        assert_eq!(picture.matches("stroke=\"#FF0000\"").count(), 3, "{picture}");
    }
}
